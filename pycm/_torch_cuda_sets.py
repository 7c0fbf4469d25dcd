"""The CUDA kernels of late interaction: maxsim, its gradients and its top-k, xattn_score. See `_torch_cuda`.

Both sides come as values, lengths and offsets: ``[items, T, D]`` with lengths or None, or ``[total, D]`` with offsets.
What lengths and offsets hold is checked on the device, by an assertion.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pycm import _torch_cuda
from pycm._torch_arguments import _check_devices, _check_tangents, _plain, _score_dtype


def maxsim(*args: Any) -> Tensor:
    """Both sides, metric, reduce, direction."""
    arguments = _arguments("maxsim", ("queries", "gallery"), args)
    with _torch_cuda._on(args[0].device):
        workspace = _workspace("maxsim", arguments)
        scores = _new_scores(arguments, _items(arguments, 3))
        if scores.numel():
            _torch_cuda._kernels.cuda_maxsim(*arguments, scores, workspace, _torch_cuda._stream())
    return scores


def maxsim_backward(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """The scores' gradient, both sides, metric, reduce, direction, which gradients are needed; else [0]."""
    arguments = _arguments("maxsim_backward", ("queries", "gallery"), args[:9])
    _check_devices("maxsim_backward", queries=args[0], grad=grad)
    grad = _plain(grad).contiguous()
    with _torch_cuda._on(grad.device):
        workspace = _workspace("maxsim_backward", arguments)
        grads = [grad.new_empty(args[side].shape if needed else 0) for side, needed in ((0, args[9]), (3, args[10]))]
        wanted = [part if needed else None for part, needed in zip(grads, args[9:], strict=True)]
        if grads[0].numel() or grads[1].numel():
            _torch_cuda._kernels.cuda_maxsim_backward(grad, *arguments, *wanted, workspace, _torch_cuda._stream())
    return grads[0], grads[1]


def maxsim_topk(*args: Any) -> tuple[Tensor, Tensor]:
    """Both sides, k, metric, reduce, direction, precision."""
    arguments = _arguments("maxsim_topk", ("queries", "gallery"), args)
    with _torch_cuda._on(args[0].device):
        workspace = _workspace("maxsim_topk", arguments)
        scores = _new_scores(arguments, args[6])
        indices = torch.empty_like(scores, dtype=torch.int64)
        if scores.numel():
            _torch_cuda._kernels.cuda_maxsim_topk(*arguments, scores, indices, workspace, _torch_cuda._stream())
    return scores, indices


def xattn_score(*args: Any) -> Tensor:
    """Both sides, direction, feature_norm, aggregation, lambda_softmax, lambda_lse, eps."""
    arguments = _arguments("xattn_score", ("images", "captions"), args)
    with _torch_cuda._on(args[0].device):
        workspace = _workspace("xattn_score", arguments)
        scores = _new_scores(arguments, _items(arguments, 3))
        if scores.numel():
            _torch_cuda._kernels.cuda_xattn_score(*arguments, scores, workspace, _torch_cuda._stream())
    return scores


def _arguments(function: str, names: tuple[str, str], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What the kernels take of what the operator was given."""
    a, a_lengths, a_offsets, b, b_lengths, b_offsets = args[:6]
    values = dict(zip(names, (a, b), strict=True))
    borders = {"lengths": a_lengths, "offsets": a_offsets, "other_lengths": b_lengths, "other_offsets": b_offsets}
    _check_devices(function, **values, **borders)
    _check_tangents(function, **values)
    first, second = (
        (_plain(part[0]), _torch_cuda._contiguous(part[1]), _torch_cuda._contiguous(part[2]))
        for part in (args[:3], args[3:6])
    )
    return *first, *second, *args[6:]


def _workspace(function: str, arguments: tuple[Any, ...]) -> Tensor:
    """Scratch for the call, whose arguments are checked on the way."""
    values = arguments[0]
    size = getattr(_torch_cuda._kernels, f"cuda_{function}_workspace_bytes")(*arguments)
    for sets, lengths, offsets in (arguments[:3], arguments[3:6]):
        if lengths is not None:
            inside = ((lengths >= 0) & (lengths <= sets.shape[1])).all()
            torch._assert_async(inside, f"{function}: lengths must be in [0, {sets.shape[1]}]")
        if offsets is not None:
            rising = (offsets[1:] >= offsets[:-1]).all() & (offsets[0] == 0) & (offsets[-1] == sets.shape[0])
            torch._assert_async(rising, f"{function}: offsets must rise from 0 to {sets.shape[0]}")
    return _torch_cuda._workspace(values, size)


def _items(arguments: tuple[Any, ...], side: int) -> int:
    values, _, offsets = arguments[side : side + 3]
    return int(values.shape[0] if offsets is None else offsets.shape[0] - 1)


def _new_scores(arguments: tuple[Any, ...], columns: int) -> Tensor:
    values: Tensor = arguments[0]
    return values.new_empty((_items(arguments, 0), columns), dtype=_score_dtype(values.dtype))
