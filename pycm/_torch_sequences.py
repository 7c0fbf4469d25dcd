"""`pycm.temporal_pool` for torch: padded, ragged, packed and nested sequences, autocast, and their forms again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from pycm import _torch_temporal_int8 as int8_operator
from pycm._temporal_arguments import (
    check_embedding,
    check_ids,
    check_lengths,
    check_sequences,
    evaluate,
    evaluate_pool,
    is_scalar,
    require,
    starts_of,
)
from pycm._temporal_layers import Direction, Options, Sequences, padded
from pycm._torch_arguments import _check_devices, _check_tangents, _eager, _integers
from pycm._torch_gradients import full_precision
from pycm._torch_temporal import lowered, temporal_pool_cpu, work_dtype
from pycm._torch_temporal_direct import OWN, direct
from pycm._torch_temporal_words import Words, has_kernel, temporal_pool_words


class _Torch:
    """The operators on torch tensors."""

    xp: Any = torch

    def cell(self, direction: Direction) -> tuple[Any, Any, Any, Any]:
        if isinstance(direction.x, Words):
            words, cu_seqlens, weights, cell, reverse, pool, *others, _ = direction
            return temporal_pool_words(  # type: ignore[no-any-return]
                words, cu_seqlens, *weights, *others, cell, pool, reverse, pool == "none"
            )
        x, cu_seqlens, weights, cell, reverse, pool, *others, int8 = direction
        if int8:
            return torch.ops.pycm.temporal_pool_int8(  # type: ignore[no-any-return]
                x, cu_seqlens, *weights, *others, cell, pool, reverse, pool == "none"
            )
        given = [t for t in (x, *weights, *others) if t is not None]
        trained = torch.is_grad_enabled() and any(map(_requires_grad, given))
        # The dispatcher alone would cost a tenth of a short sequence.
        direct = _eager() and not trained and all(type(t) in OWN and t.is_cpu for t in (cu_seqlens, *given))
        operator: Any = temporal_pool_cpu if direct else torch.ops.pycm.temporal_pool
        results = operator(x, cu_seqlens, *weights, *others, cell, pool, reverse, pool == "none" or trained, trained)
        return cast(tuple[Any, Any, Any, Any], results[:4])

    def pool(self, x: Any, cu_seqlens: Any, pool: str, pool_weights: Any) -> Any:
        return torch.ops.pycm.pool_states(x, cu_seqlens, pool_weights, pool)

    def dropout(self, x: Any, p: float) -> Any:
        return torch.nn.functional.dropout(x, p, training=True)

    def work(self, array: Any) -> Any:
        return array.to(work_dtype(array.dtype))

    def cast(self, array: Any, like: Any) -> Any:
        return array.to(like.dtype)

    def double(self, array: Any) -> Any:
        return array.double()

    def arange(self, count: int, like: Any) -> Any:
        return torch.arange(count, device=like.device)

    def rows_of(self, cu_seqlens: Any, count: int) -> Any:
        steps = torch.arange(count, device=cu_seqlens.device)
        rows = torch.searchsorted(cu_seqlens[1:].contiguous(), steps, right=True)
        return rows.clip(0, max(cu_seqlens.shape[0] - 2, 0))

    def distinct(self, lengths: Any, count: int) -> tuple[Any, Any, int]:
        # As many as `lengths`, zeros in the place of what is there already: a trace does not know how many differ.
        ordered = lengths.sort().values
        first = torch.nn.functional.pad(ordered, (1, 0), value=-1).diff() != 0
        unique = torch.where(first, ordered, 0)
        total = max(int(unique.sum()), min(count, 1)) if _has_values(lengths) else count
        return unique, torch.searchsorted(ordered, lengths), total


_BACKEND = _Torch()
_POOL = "temporal_pool"


def temporal_pool(x: Any, lengths: Any, cu_seqlens: Any, weights: Any, options: Options) -> Any:
    pooled = direct(x, lengths, cu_seqlens, weights, options)
    if pooled is not None:
        return pooled
    values = x.data if isinstance(x, PackedSequence) else x
    states = {"h0": options.h0, "c0": options.c0, "attention": options.attention, "embedding": options.embedding}
    _check_tensors(_POOL, values, weights, options.gpo, **states)
    if options.int8_weights:
        int8_operator.check(_POOL, values, _trained(values, options, weights))
    dtype = _autocast_dtype(values if options.embedding is None else options.embedding)
    if dtype is not None and isinstance(weights, Mapping):
        weights = {name: _lowered(tensor, dtype) for name, tensor in weights.items()}
    if options.embedding is not None:
        sequences = _words(x, lengths, cu_seqlens, weights, options, dtype)
    else:
        x = x if dtype is None else x.to(dtype)
        sequences = _sequences(_POOL, x, lengths, cu_seqlens, options.batch_first, options.legacy_padding)
    with full_precision(sequences.x):  # the kernels' dtype is that of x and the weights
        return evaluate(_POOL, _BACKEND, sequences, weights, options)


def pool_states(x: Any, lengths: Any, cu_seqlens: Any, pool: str, attention: Any, gpo: Any) -> Tensor:
    function = "pool_states"
    _check_tensors(function, x.data if isinstance(x, PackedSequence) else x, None, gpo, attention=attention)
    sequences = _sequences(function, x, lengths, cu_seqlens, batch_first=True, legacy_padding=False)
    with full_precision(sequences.x):
        return cast(Tensor, evaluate_pool(function, _BACKEND, sequences, pool, attention, gpo))


# ---- arguments ----


def _check_tensors(function: str, x: Tensor, weights: Any, gpo: Any, **others: Any) -> None:
    named: dict[str, Any] = {"x": x}
    for mapping in (weights, gpo):
        if isinstance(mapping, Mapping):
            named.update(mapping)
    named.update((name, tensor) for name, tensor in others.items() if tensor is not None)
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{function}: {name} must be a torch tensor, as x is, got {type(tensor).__name__}")
        if tensor.layout != torch.strided and not tensor.is_nested:
            raise TypeError(f"{function}: {name} must be dense, got {tensor.layout}")
    _check_devices(function, **named)
    if torch.compiler.is_compiling():
        return
    _check_tangents(function, **named)
    for name, tensor in named.items():
        if torch._C._functorch.is_gradtrackingtensor(tensor):
            raise NotImplementedError(
                f"{function}: {name} is differentiated by torch.func (grad, vjp, jacrev), which is not implemented; "
                "torch.autograd is"
            )


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _lowered(weight: Tensor, dtype: torch.dtype) -> Tensor:
    kept = _eager() and type(weight) in OWN and weight.is_cpu and not (torch.is_grad_enabled() and weight.requires_grad)
    return lowered(weight, dtype) if kept else weight.to(dtype)


def _has_values(tensor: Tensor) -> bool:
    """Whether a number may be read from it without a wait or a break of a trace."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and not torch._C._functorch.is_batchedtensor(tensor)
    )


def _requires_grad(tensor: Tensor) -> bool:
    """Also of a batch of `torch.vmap`, which says no where it holds what does."""
    if not torch.compiler.is_compiling():
        while torch._C._functorch.is_batchedtensor(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def _steps(x: Tensor, cu_seqlens: Tensor) -> int:
    """Of the longest ragged sequence, or a bound of it; at least 1."""
    if not _has_values(cu_seqlens) or cu_seqlens.shape[0] < 2:
        return max(1, x.shape[0])
    return max(1, int(np.diff(cu_seqlens.numpy()).max()))


def _counts(function: str, name: str, values: Any, shape: str, like: Tensor) -> Tensor:
    """Integers on the device of `like`, without waiting for it."""
    if not isinstance(values, Tensor):
        try:
            found = torch.as_tensor(values, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:  # of torch, which names no argument
            raise TypeError(
                f"{function}: {name} must be integers of shape {shape}, got {type(values).__name__}"
            ) from error
        values = found if found.numel() else found.long()  # an empty list has no dtype
    values = _moved(_integers(function, name, values), like.device)
    if values.ndim != 1:
        raise ValueError(f"{function}: {name} must have shape {shape}, got {list(values.shape)}")
    return cast(Tensor, values)


def _moved(counts: Tensor, device: torch.device) -> Tensor:
    """From the CPU without a wait. Of memory that is not pinned, as that of a copy, CUDA has read all on return."""
    if counts.device == device:
        return counts
    return counts.clone().to(device, non_blocking=True) if counts.is_cpu else counts.to(device)


def _starts(lengths: Tensor) -> Tensor:
    if _has_values(lengths):  # a few NumPy calls take a tenth of the time of torch's
        return torch.from_numpy(starts_of(lengths.numpy()))
    starts: Tensor = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    return starts


def _check_end(cu_seqlens: Tensor, steps: int, expected: str) -> None:
    if int(cu_seqlens[-1]) != steps:
        raise ValueError(f"{expected} the {steps} steps of x, got {int(cu_seqlens[-1])}")


# The same where the number is known when it runs: cu_seqlens again, so that no trace leaves the check out.
torch.library.define("pycm::checked_end", "(Tensor cu_seqlens, SymInt steps, str expected) -> Tensor")


@torch.library.impl("pycm::checked_end", "CPU")
def _checked_end_cpu(cu_seqlens: Tensor, steps: int, expected: str) -> Tensor:
    _check_end(cu_seqlens, steps, expected)
    return cu_seqlens.clone()


@torch.library.impl("pycm::checked_end", "CUDA")
def _checked_end_cuda(cu_seqlens: Tensor, steps: int, expected: str) -> Tensor:
    torch._assert_async(cu_seqlens[-1] == steps, f"{expected} the {steps} steps of x")
    return cu_seqlens.clone()


@torch.library.register_fake("pycm::checked_end")  # type: ignore[untyped-decorator]
def _checked_end_fake(cu_seqlens: Tensor, steps: int, expected: str) -> Tensor:
    return torch.empty_like(cu_seqlens)


def _sequences(
    function: str, x: Any, lengths: Any, cu_seqlens: Any, batch_first: bool, legacy_padding: bool
) -> Sequences:
    if _knows_lengths(x):
        return _of_known_lengths(function, x, lengths, cu_seqlens, legacy_padding)
    check_sequences(function, x, lengths, cu_seqlens, legacy_padding)
    if x.ndim == 3:
        return _padded(function, x if batch_first else x.transpose(0, 1), lengths, batch_first, legacy_padding)
    if lengths is None and cu_seqlens is None:
        starts = torch.arange(2, device=x.device) * x.shape[0]
        return Sequences(x, starts, _steps(x, starts), lambda states: states, single=True)
    if cu_seqlens is None:
        starts = _starts(_counts(function, "lengths", lengths, "[B]", x))
    else:
        starts = _counts(function, "cu_seqlens", cu_seqlens, "[B + 1]", x)
        if starts.shape[0] < 1:
            raise ValueError(f"{function}: cu_seqlens must have shape [B + 1], got [0]")
    expected = f"{function}: {'lengths must sum to' if cu_seqlens is None else 'cu_seqlens must end at'}"
    if _has_values(starts):
        _check_end(starts, x.shape[0], expected)
    else:
        starts = torch.ops.pycm.checked_end(starts, x.shape[0], expected)
    return Sequences(x, starts, _steps(x, starts), lambda states: states)


def _knows_lengths(x: Any) -> bool:
    return isinstance(x, PackedSequence) or (isinstance(x, Tensor) and x.is_nested)


def _of_known_lengths(
    function: str, x: Any, lengths: Any, cu_seqlens: Any, legacy_padding: bool, words: bool = False
) -> Sequences:
    """Packed or nested; with `words` ids, without features."""
    for name, value in (("lengths", lengths), ("cu_seqlens", cu_seqlens)):
        if value is not None:
            raise ValueError(f"{function}: {name} must be None for {type(x).__name__}, which knows its lengths")
    if legacy_padding:
        raise ValueError(f"{function}: legacy_padding needs padded x [B, T, I], got {type(x).__name__}")
    return _packed(x) if isinstance(x, PackedSequence) else _nested(function, x, words)


def _words(x: Any, lengths: Any, cu_seqlens: Any, weights: Any, options: Options, dtype: Any) -> Sequences:
    """Sequences of ids, as Words where there is a kernel for them, else as their vectors; in `dtype` where given."""
    embedding = options.embedding
    check_embedding(_POOL, embedding)
    if _knows_lengths(x):
        sequences = _of_known_lengths(_POOL, x, lengths, cu_seqlens, options.legacy_padding, words=True)
        sequences = sequences._replace(x=Words(_integers(_POOL, "x", sequences.x), embedding))
    else:
        words = Words(_integers(_POOL, "x", x), embedding)
        sequences = _sequences(_POOL, words, lengths, cu_seqlens, options.batch_first, options.legacy_padding)
    known = sequences.x.known(None if options.legacy_padding else sequences.cu_seqlens)
    if _has_values(known.ids) and known.ids.numel():
        check_ids(_POOL, known.ids.numpy(), embedding.shape[0])
    trained = _trained(known.ids, options, weights)
    # A table would be cast whole, be it for few ids.
    few = dtype is not None and known.ids.numel() <= embedding.shape[0]
    if trained or few or options.residual or options.legacy_padding or not has_kernel(known):
        vectors = known.vectors()
        return sequences._replace(x=vectors if dtype is None else vectors.to(dtype))
    return sequences._replace(x=known if dtype is None else known._replace(embedding=embedding.to(dtype)))


def _trained(values: Tensor, options: Options, weights: Any) -> bool:
    states = (options.h0, options.c0, options.attention, options.embedding)
    given = (values, *states, *_tensors(weights), *_tensors(options.gpo))
    return torch.is_grad_enabled() and any(t is not None and _requires_grad(t) for t in given)


def _tensors(mapping: Any) -> Any:
    return mapping.values() if isinstance(mapping, Mapping) else ()


def _padded(function: str, x: Tensor, lengths: Any, batch_first: bool, legacy_padding: bool) -> Sequences:
    if isinstance(lengths, bool):
        raise TypeError(f"{function}: lengths must be integers, got bool")
    if isinstance(lengths, (int, torch.SymInt)):
        lengths = torch.full((x.shape[0],), cast(int, lengths), dtype=torch.int64, device=x.device)
    elif is_scalar(lengths):
        lengths = torch.as_tensor(lengths).expand(x.shape[0])
    lengths = _counts(function, "lengths", lengths, "[B]", x)
    require(
        lengths.shape[0] == x.shape[0],
        lambda: f"{function}: lengths must have shape [{x.shape[0]}], got {list(lengths.shape)}",
    )
    if _has_values(lengths):
        check_lengths(function, lengths.numpy(), x.shape[1])
    starts = _starts(lengths)

    def restore(states: Tensor) -> Tensor:
        if legacy_padding:
            full = states.reshape(*x.shape[:2], states.shape[-1])
        else:
            full = padded(_BACKEND, states, starts, x.shape[1])
        return full if batch_first else full.transpose(0, 1)

    return Sequences(x, starts, max(1, x.shape[1]), restore)


def _packed(x: PackedSequence) -> Sequences:
    sizes, device = x.batch_sizes, x.data.device
    count = int(sizes[0])
    lengths = _moved((sizes > torch.arange(count, device="cpu")[:, None]).sum(1), device)
    place = torch.arange(count, device=device)  # of each sequence in the packed order
    if x.unsorted_indices is not None:
        place = x.unsorted_indices
        lengths = lengths[place]
    starts = _starts(lengths)
    row = _BACKEND.rows_of(starts, x.data.shape[0])
    step = torch.arange(x.data.shape[0], device=device) - starts[row]
    packed_step = _moved(sizes.cumsum(0) - sizes, device)[step] + place[row]
    ragged_step = torch.empty_like(packed_step)
    ragged_step[packed_step] = torch.arange(x.data.shape[0], device=device)

    def restore(states: Tensor) -> PackedSequence:
        data = states.index_select(0, ragged_step)
        return PackedSequence(data, x.batch_sizes, x.sorted_indices, x.unsorted_indices)

    return Sequences(x.data.index_select(0, packed_step), starts, len(sizes), restore)


def _nested(function: str, x: Any, words: bool) -> Sequences:
    dims, shape = (2, "[B, *]") if words else (3, "[B, *, I]")
    if x.dim() != dims:
        raise ValueError(f"{function}: x must be nested {shape}, got {x.dim()} dimensions")
    if x.layout == torch.jagged:
        if x._ragged_idx != 1:
            raise ValueError(f"{function}: x must be nested {shape}, got its dimension {x._ragged_idx} ragged")
        x = x if x.lengths() is None else x.contiguous()
        values, starts = x.values(), x.offsets().long()

        def restore(states: Tensor) -> Any:
            return torch.nested.nested_tensor_from_jagged(states, x.offsets())

        return Sequences(values, starts, _steps(values, starts), restore)
    parts = x.unbind()
    counts = [part.shape[0] for part in parts]
    starts = _starts(_moved(torch.tensor(counts, device="cpu"), x.device))
    steps = max([1, *counts])
    return Sequences(
        torch.cat(parts), starts, steps, lambda states: torch.nested.as_nested_tensor(list(states.split(counts)))
    )
