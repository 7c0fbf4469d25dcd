"""Late interaction as torch operators: `torch.ops.pycm.maxsim`, `maxsim_topk` and `xattn_score`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from pycm import _C, _torch_cuda_sets
from pycm._torch_arguments import (
    _check_devices,
    _check_tangents,
    _integers,
    _name,
    _plain,
    _require,
    _score_dtype,
    _to_torch,
)
from pycm._torch_gradients import full_precision
from pycm._torch_xattn import xattn_gradients
from pycm.functional import _int64
from pycm.late_interaction import AGGREGATIONS, FEATURE_NORMS, ITEM, Sets, check_list, split

if TYPE_CHECKING:
    from pycm.late_interaction import Items

_SETS = (
    "Tensor queries, Tensor? query_lengths, Tensor? query_offsets, "
    "Tensor gallery, Tensor? gallery_lengths, Tensor? gallery_offsets, "
)
_WAY = "str metric, str reduce, str direction"
_XATTN = (
    "Tensor images, Tensor? image_lengths, Tensor? image_offsets, "
    "Tensor captions, Tensor? caption_lengths, Tensor? caption_offsets, "
    "str direction, str feature_norm, str aggregation, float lambda_softmax, float lambda_lse, float eps"
)
torch.library.define("pycm::maxsim", f"({_SETS}{_WAY}) -> Tensor")
torch.library.define(
    "pycm::maxsim_backward",
    f"(Tensor grad, {_SETS}{_WAY}, bool needs_queries, bool needs_gallery) -> (Tensor, Tensor)",
)
torch.library.define("pycm::maxsim_topk", f"({_SETS}SymInt k, {_WAY}, str precision) -> (Tensor, Tensor)")
torch.library.define("pycm::xattn_score", f"({_XATTN}) -> Tensor")
torch.library.define("pycm::xattn_score_backward", f"(Tensor grad, {_XATTN}) -> (Tensor, Tensor)")


# ---- the functions behind pycm.maxsim, pycm.maxsim_topk and pycm.xattn_score ----


def maxsim(queries: Sets, gallery: Sets, *way: str) -> Tensor:
    _check_same("maxsim", ("queries", "gallery"), queries, gallery)
    return cast(Tensor, torch.ops.pycm.maxsim(*queries, *gallery, *way))


def maxsim_topk(queries: Sets, gallery: Sets, k: int, *way: str) -> tuple[Tensor, Tensor]:
    _check_same("maxsim_topk", ("queries", "gallery"), queries, gallery)
    return cast(tuple[Tensor, Tensor], torch.ops.pycm.maxsim_topk(*queries, *gallery, k, *way))


def xattn_score(images: Sets, captions: Sets, *options: Any) -> Tensor:
    _check_same("xattn_score", ("images", "captions"), images, captions)
    return cast(Tensor, torch.ops.pycm.xattn_score(*images, *captions, *options))


def sets(function: str, name: str, items: Items, lengths: Any) -> Sets:
    """One side's argument as tensors."""
    values, offsets = split(function, name, items, lengths)
    if isinstance(values, list):
        for i, array in enumerate(values):
            if not isinstance(array, Tensor):
                raise TypeError(f"{function}: {name}[{i}] must be a torch tensor, got {type(array).__name__}")
        check_list(function, name, [array.shape for array in values], [_name(array.dtype) for array in values])
        counts = torch.tensor([0, *(len(array) for array in values)], device=values[0].device)
        return Sets(torch.cat(values), None, counts.cumsum(0))
    item = ITEM[name]
    return Sets(
        values,
        _vector(function, f"{item}_lengths", lengths, values),
        _vector(function, f"{item}_offsets", offsets, values),
    )


def _vector(function: str, name: str, value: Any, like: Tensor) -> Tensor | None:
    if value is None:
        return None
    if isinstance(value, Tensor):
        _check_devices(function, **{"values": like, name: value})
        return _integers(function, name, value)
    return _to_torch(_int64(function, name, value), like)


def _check_same(function: str, names: tuple[str, str], a: Sets, b: Sets) -> None:
    pair = dict(zip(names, (a.values, b.values), strict=True))
    _check_devices(function, **pair)
    if not torch.compiler.is_dynamo_compiling():
        _check_tangents(function, **pair)


# ---- CPU kernels ----


def _arguments(*args: Any) -> Any:
    """As the kernels take them: plain values, contiguous lengths and offsets, the number of threads."""
    values, borders = (args[0], args[3]), (args[1:3], args[4:6])
    six = (
        part
        for tensor, pair in zip(values, borders, strict=True)
        for part in (_plain(tensor), *(None if border is None else border.contiguous() for border in pair))
    )
    return *six, *args[6:], torch.get_num_threads()


@torch.library.impl("pycm::maxsim", "CPU")
def _maxsim_cpu(*args: Any) -> Tensor:
    _check_tangents("maxsim", queries=args[0], gallery=args[3])
    return cast(Tensor, _C.maxsim(*_arguments(*args)))


@torch.library.impl("pycm::maxsim_backward", "CPU")
def _maxsim_backward_cpu(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    grads = _C.maxsim_backward(_plain(grad).contiguous(), *_arguments(*args))
    queries, gallery = (grad.new_empty(0) if part is None else part for part in grads)
    return queries, gallery


@torch.library.impl("pycm::maxsim_topk", "CPU")
def _maxsim_topk_cpu(*args: Any) -> tuple[Tensor, Tensor]:
    _check_tangents("maxsim_topk", queries=args[0], gallery=args[3])
    return _C.maxsim_topk(*_arguments(*args))


@torch.library.impl("pycm::xattn_score", "CPU")
def _xattn_cpu(*args: Any) -> Tensor:
    _check_tangents("xattn_score", images=args[0], captions=args[3])
    return cast(Tensor, _C.xattn_score(*_arguments(*args)))


def _xattn_backward_kernel(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return xattn_gradients(grad, *args)


# ---- shapes without values ----


def _items(function: str, name: str, values: Tensor, lengths: Tensor | None, offsets: Tensor | None) -> Any:
    """The number of items; checks what needs no values."""
    if values.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise TypeError(f"{function}: {name} must be float32, float16, bfloat16 or float64, got {_name(values.dtype)}")
    expected = "[items, T, D]" if offsets is None else "[total, D] where offsets are given"
    if values.ndim != (3 if offsets is None else 2):
        raise ValueError(f"{function}: {name} must have shape {expected}, got {list(values.shape)}")
    if lengths is not None and offsets is not None:
        raise ValueError(f"{function}: {name} must have lengths or offsets, not both")
    count = values.shape[0] if offsets is None else offsets.shape[0] - 1
    if lengths is not None:
        borders, label, size = lengths, f"{ITEM[name]}_lengths", count
    elif offsets is not None:
        borders, label, size = offsets, f"{ITEM[name]}_offsets", count + 1
    else:
        return count
    if borders.dtype != torch.int64:
        raise TypeError(f"{function}: {label} must be an int64 array, got {_name(borders.dtype)}")
    _require(
        borders.ndim == 1 and borders.shape[0] == size,
        lambda: f"{function}: {label} must have shape [{size}], got {list(borders.shape)}",
    )
    return count


def _shape(function: str, names: tuple[str, str], six: Any) -> tuple[Any, Any]:
    """(N, M)."""
    a, a_lengths, a_offsets, b, b_lengths, b_offsets = six
    _check_devices(
        function,
        **dict(zip(names, (a, b), strict=True)),
        lengths=a_lengths,
        offsets=a_offsets,
        other_lengths=b_lengths,
        other_offsets=b_offsets,
    )
    rows = _items(function, names[0], a, a_lengths, a_offsets)
    columns = _items(function, names[1], b, b_lengths, b_offsets)
    if a.dtype != b.dtype:
        raise TypeError(
            f"{function}: {names[1]} must have the {names[0]}' dtype {_name(a.dtype)}, got {_name(b.dtype)}"
        )
    _require(
        a.shape[-1] == b.shape[-1],
        lambda: f"{function}: {names[1]} must have the {names[0]}' {a.shape[-1]} features, got shape {list(b.shape)}",
    )
    _require(
        a.shape[-1] > 0, lambda: f"{function}: {names[0]} must have at least one feature, got shape {list(a.shape)}"
    )
    return rows, columns


def _check_way(function: str, metric: str, reduce: str, direction: str) -> None:
    for name, value, allowed in (
        ("metric", metric, ("dot", "cosine")),
        ("reduce", reduce, ("sum", "mean")),
        ("direction", direction, ("t2i", "i2t", "both")),
    ):
        if value not in allowed:
            *most, last = allowed
            raise ValueError(f"{function}: {name} must be {', '.join(most)} or {last}, got '{value}'")


def _check_xattn(
    direction: str, feature_norm: str, aggregation: str, lambda_softmax: float, lambda_lse: float, eps: float
) -> None:
    if direction not in ("t2i", "i2t"):
        raise ValueError(f"xattn_score: direction must be t2i or i2t, got '{direction}'")
    for name, value, allowed in (
        ("feature_norm", feature_norm, FEATURE_NORMS),
        ("aggregation", aggregation, AGGREGATIONS),
    ):
        if value not in allowed:
            raise ValueError(f"xattn_score: {name} must be one of {', '.join(allowed)}, got '{value}'")
    if eps < 0:
        raise ValueError(f"xattn_score: eps must be at least 0, got {eps:g}")
    if lambda_lse == 0:
        raise ValueError("xattn_score: lambda_lse must not be 0")


@torch.library.register_fake("pycm::maxsim")  # type: ignore[untyped-decorator]
def _maxsim_fake(*args: Any) -> Tensor:
    shape = _shape("maxsim", ("queries", "gallery"), args[:6])
    _check_way("maxsim", *args[6:])
    return cast(Tensor, args[0].new_empty(shape, dtype=_score_dtype(args[0].dtype)))


@torch.library.register_fake("pycm::maxsim_backward")  # type: ignore[untyped-decorator]
def _maxsim_backward_fake(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    queries, gallery = (
        grad.new_empty(values.shape if needed else (0,)) for values, needed in ((args[0], args[9]), (args[3], args[10]))
    )
    return queries, gallery


@torch.library.register_fake("pycm::maxsim_topk")  # type: ignore[untyped-decorator]
def _maxsim_topk_fake(*args: Any) -> tuple[Tensor, Tensor]:
    rows, columns = _shape("maxsim_topk", ("queries", "gallery"), args[:6])
    k, precision = args[6], args[10]
    _check_way("maxsim_topk", *args[7:10])
    _require(columns > 0, lambda: f"maxsim_topk: gallery must have at least one item, got shape {list(args[3].shape)}")
    for condition in (k >= 1, k <= columns):
        _require(condition, lambda: f"maxsim_topk: k must be in [1, {columns}], got {k}")
    if precision not in ("exact", "fast"):
        raise ValueError(f"maxsim_topk: precision must be exact or fast, got '{precision}'")
    values = args[0]
    return (
        values.new_empty((rows, k), dtype=_score_dtype(values.dtype)),
        values.new_empty((rows, k), dtype=torch.int64),
    )


@torch.library.register_fake("pycm::xattn_score")  # type: ignore[untyped-decorator]
def _xattn_fake(*args: Any) -> Tensor:
    shape = _shape("xattn_score", ("images", "captions"), args[:6])
    _check_xattn(*args[6:])
    return cast(Tensor, args[0].new_empty(shape, dtype=_score_dtype(args[0].dtype)))


@torch.library.register_fake("pycm::xattn_score_backward")  # type: ignore[untyped-decorator]
def _xattn_backward_fake(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(args[0]), torch.empty_like(args[3])


# ---- gradients ----


def _save(ctx: Any, inputs: tuple[Any, ...], *more: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6], *more)
    ctx.options = inputs[6:]


def _maxsim_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save(ctx, inputs)


def _maxsim_gradients(ctx: Any, grad: Tensor, way: tuple[str, ...]) -> tuple[Any, ...]:
    """Of all inputs but the strings."""
    six = ctx.saved_tensors[:6]
    needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[3])
    with full_precision(grad):
        grads = torch.ops.pycm.maxsim_backward(grad, *six, *way, *needs)
    queries, gallery = (
        part.to(values.dtype) if needed else None
        for part, values, needed in zip(grads, (six[0], six[3]), needs, strict=True)
    )
    return queries, None, None, gallery, None, None


def _maxsim_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return *_maxsim_gradients(ctx, grad, ctx.options), None, None, None


def _topk_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    _save(ctx, inputs, output[1])


def _topk_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    indices = ctx.saved_tensors[6]
    gallery, offsets = ctx.saved_tensors[3], ctx.saved_tensors[5]
    columns = gallery.shape[0] if offsets is None else offsets.shape[0] - 1
    found = indices >= 0
    # Pairs that are no match have gradient 0, which costs the kernel nothing.
    full = grad.new_zeros((indices.shape[0], columns))
    full = full.scatter_add(1, indices.clamp(min=0), torch.where(found, grad, 0.0))
    return *_maxsim_gradients(ctx, full, ctx.options[1:4]), *(None,) * 5


def _xattn_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    with full_precision(grad):
        images, captions = torch.ops.pycm.xattn_score_backward(grad, *ctx.saved_tensors, *ctx.options)
    needs = ctx.needs_input_grad
    return images if needs[0] else None, None, None, captions if needs[3] else None, None, None, *(None,) * 6


def _once(name: str) -> Any:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"{name}: second derivatives are not implemented")

    return backward


_AUTOGRAD = (
    ("pycm::maxsim", _maxsim_backward, _maxsim_setup),
    ("pycm::maxsim_topk", _topk_backward, _topk_setup),
    ("pycm::xattn_score", _xattn_backward, _maxsim_setup),
    ("pycm::maxsim_backward", _once("maxsim"), None),
    ("pycm::xattn_score_backward", _once("xattn_score"), None),
)
for _op, _backward, _setup in _AUTOGRAD:
    torch.library.register_autograd(_op, _backward, setup_context=_setup)
for _op in ("pycm::maxsim", "pycm::maxsim_topk", "pycm::xattn_score"):
    for _device in ("cpu", "cuda"):
        torch.library.register_autocast(_op, _device, torch.float32)
torch.library.impl("pycm::xattn_score_backward", "CPU", _xattn_backward_kernel)
for _op, _cuda_kernel in (
    ("pycm::maxsim", _torch_cuda_sets.maxsim),
    ("pycm::maxsim_backward", _torch_cuda_sets.maxsim_backward),
    ("pycm::maxsim_topk", _torch_cuda_sets.maxsim_topk),
    ("pycm::xattn_score", _torch_cuda_sets.xattn_score),
    ("pycm::xattn_score_backward", _xattn_backward_kernel),
):
    torch.library.impl(_op, "CUDA", _cuda_kernel)
