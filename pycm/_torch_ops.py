"""The kernels as torch operators: `torch.ops.pycm.similarity`, `torch.ops.pycm.topk` and `torch.ops.pycm.rank`.

They trace (`torch.compile`, `torch.export`), differentiate, and widen under autocast. A plain eager call that
needs none of that goes from `pycm.functional` straight to the kernel: the dispatcher alone would cost more than a
small product.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import Tensor

from pycm import _C, _torch_cuda, functional
from pycm._torch_arguments import (
    _check_devices,
    _check_filters,
    _check_metric,
    _check_pair,
    _check_rows,
    _check_screen,
    _check_tangents,
    _compressed_tensors,
    _eager,
    _filters,
    _is_compiling,
    _name,
    _one_each,
    _plain,
    _require,
    _score_dtype,
)
from pycm._torch_gradients import full_precision, similarity_gradients, topk_gradients
from pycm.functional import Matches
from pycm.ranking import _check_scores

torch.library.define("pycm::similarity", "(Tensor x, Tensor y, str metric) -> Tensor")
torch.library.define(
    "pycm::topk",
    "(Tensor queries, Tensor gallery, SymInt k, str metric, Tensor? mask, Tensor? exclude, "
    "Tensor? exclude_offsets, str precision, str screen='auto') -> (Tensor, Tensor)",
)
torch.library.define(
    "pycm::rank",
    "(Tensor queries, Tensor gallery, Tensor positives, Tensor offsets, str metric, Tensor? mask, Tensor? exclude, "
    "Tensor? exclude_offsets, str screen='auto') -> (Tensor, Tensor, Tensor)",
)


# ---- the functions behind pycm.similarity, pycm.topk and pycm.rank ----


def similarity(x: Tensor, y: Tensor, metric: str, out: Tensor | None = None) -> Tensor:
    _check_devices("similarity", x=x, y=y)
    if not _is_compiling():
        _check_tangents("similarity", x=x, y=y)  # here too: in torch.func.jvp the operator is past them
    scores = cast(Tensor, torch.ops.pycm.similarity(x, y, metric))
    if out is None:
        return scores
    if scores.requires_grad:
        raise ValueError("similarity: out must be None where a gradient is wanted")
    if out.shape != scores.shape or out.dtype != scores.dtype:
        raise ValueError(
            f"similarity: out must be {_name(scores.dtype)} of shape {list(scores.shape)}, "
            f"got {_name(out.dtype)} of shape {list(out.shape)}"
        )
    return out.copy_(scores)


def topk(
    queries: Tensor, gallery: Tensor, k: Any, metric: str, mask: Any, exclude: Any, precision: str, screen: str
) -> Matches:
    _check_devices("topk", queries=queries, gallery=gallery)
    if not _is_compiling():
        _check_tangents("topk", queries=queries, gallery=gallery)
        # A k being traced is left alone: to make it an integer would be a graph for each.
        k = k if isinstance(k, torch.SymInt) else _integer_k(k)
    filters = _filters("topk", queries, gallery, mask, exclude)
    return Matches(*torch.ops.pycm.topk(queries, gallery, k, metric, *filters, precision, screen))


def rank(
    queries: Tensor, gallery: Tensor, positives: Any, metric: str, mask: Any, exclude: Any, screen: str
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(greater, equal, scores, offsets); offsets are None where every query has one positive."""
    _check_devices("rank", queries=queries, gallery=gallery)
    if not _is_compiling():
        _check_tangents("rank", queries=queries, gallery=gallery)
    filters = _filters("rank", queries, gallery, mask, exclude)
    indices, offsets = _compressed_tensors("rank", "positives", positives, queries, gallery)
    starts = _one_each(indices) if offsets is None else offsets
    return *torch.ops.pycm.rank(queries, gallery, indices, starts, metric, *filters, screen), offsets


def _integer_k(k: Any) -> int:
    try:
        k = operator.index(k)
    except TypeError:
        raise TypeError(f"topk: k must be an integer, got {type(k).__name__}") from None
    if abs(k) >= 2**63:  # what an operator cannot take
        raise ValueError(f"topk: k must be from 1 to the gallery's rows, got {k}")
    return cast(int, k)


_grad_enabled = torch.is_grad_enabled
_num_threads = torch.get_num_threads


def _direct(a: Tensor, b: Tensor) -> bool:
    """Whether nothing but the values is asked for: no gradient, trace, transform, cast or profile."""
    return (
        _eager()
        and type(a) is Tensor
        and type(b) is Tensor
        and a.is_cpu
        and b.is_cpu
        and a.dtype is b.dtype
        and not ((a.requires_grad or b.requires_grad) and _grad_enabled())
        # torch negates lazily, which its memory does not show
        and not a.is_neg()
        and not b.is_neg()
    )


functional._direct_tensors = _direct
functional._torch_threads = _num_threads


# ---- CPU kernels ----


@torch.library.impl("pycm::similarity", "CPU")
def _similarity_cpu(x: Tensor, y: Tensor, metric: str) -> Tensor:
    _check_tangents("similarity", x=x, y=y)
    return cast(Tensor, _C.similarity(_plain(x), _plain(y), metric, torch.get_num_threads()))


@torch.library.impl("pycm::topk", "CPU")
def _topk_cpu(
    queries: Tensor,
    gallery: Tensor,
    k: int,
    metric: str,
    mask: Tensor | None,
    exclude: Tensor | None,
    exclude_offsets: Tensor | None,
    precision: str,
    screen: str = "auto",
) -> tuple[Tensor, Tensor]:
    _check_tangents("topk", queries=queries, gallery=gallery)
    return _C.topk(
        _plain(queries),
        _plain(gallery),
        k,
        metric,
        precision,
        mask,
        None if exclude is None else exclude.contiguous(),
        None if exclude_offsets is None else exclude_offsets.contiguous(),
        screen,
        torch.get_num_threads(),
    )


@torch.library.impl("pycm::rank", "CPU")
def _rank_cpu(
    queries: Tensor,
    gallery: Tensor,
    positives: Tensor,
    offsets: Tensor,
    metric: str,
    mask: Tensor | None,
    exclude: Tensor | None,
    exclude_offsets: Tensor | None,
    screen: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    _check_tangents("rank", queries=queries, gallery=gallery)
    positives, offsets = positives.contiguous(), offsets.contiguous()
    greater, equal, scores = _C.rank(
        _plain(queries),
        _plain(gallery),
        positives,
        offsets,
        metric,
        mask,
        None if exclude is None else exclude.contiguous(),
        None if exclude_offsets is None else exclude_offsets.contiguous(),
        screen,
        torch.get_num_threads(),
    )
    _check_scores("rank", scores, positives, offsets)
    return greater, equal, scores


# ---- shapes without values ----


@torch.library.register_fake("pycm::similarity")  # type: ignore[untyped-decorator]
def _similarity_fake(x: Tensor, y: Tensor, metric: str) -> Tensor:
    _check_pair("similarity", ("x", "y"), ("[..., N, D]", "[..., M, D]"), x, y)
    _check_metric("similarity", metric)
    try:
        batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])  # type: ignore[no-untyped-call]
    except RuntimeError:
        raise ValueError(
            f"similarity: batch axes of x {list(x.shape)} and y {list(y.shape)} do not broadcast"
        ) from None
    return x.new_empty((*batch, x.shape[-2], y.shape[-2]), dtype=_score_dtype(x.dtype))


@torch.library.register_fake("pycm::topk")  # type: ignore[untyped-decorator]
def _topk_fake(
    queries: Tensor,
    gallery: Tensor,
    k: int,
    metric: str,
    mask: Tensor | None,
    exclude: Tensor | None,
    exclude_offsets: Tensor | None,
    precision: str,
    screen: str = "auto",
) -> tuple[Tensor, Tensor]:
    _check_pair("topk", ("queries", "gallery"), ("[N, D]", "[M, D]"), queries, gallery)
    _check_devices("topk", queries=queries, mask=mask, exclude=exclude, exclude_offsets=exclude_offsets)
    _check_metric("topk", metric)
    rows, columns = queries.shape[0], gallery.shape[0]
    _require(columns > 0, lambda: f"topk: gallery must have at least one row, got shape {list(gallery.shape)}")
    for condition in (k >= 1, k <= columns):
        _require(condition, lambda: f"topk: k must be in [1, {columns}], got {k}")
    if precision not in ("exact", "fast"):
        raise ValueError(f"topk: precision must be exact or fast, got '{precision}'")
    _check_screen("topk", screen)
    _check_filters("topk", rows, columns, mask, exclude, exclude_offsets)
    shape = (rows, k)
    return (
        queries.new_empty(shape, dtype=_score_dtype(queries.dtype)),
        queries.new_empty(shape, dtype=torch.int64),
    )


@torch.library.register_fake("pycm::rank")  # type: ignore[untyped-decorator]
def _rank_fake(
    queries: Tensor,
    gallery: Tensor,
    positives: Tensor,
    offsets: Tensor,
    metric: str,
    mask: Tensor | None,
    exclude: Tensor | None,
    exclude_offsets: Tensor | None,
    screen: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    _check_pair("rank", ("queries", "gallery"), ("[N, D]", "[M, D]"), queries, gallery)
    _check_devices("rank", queries=queries, positives=positives, offsets=offsets, mask=mask, exclude=exclude)
    _check_metric("rank", metric)
    _check_screen("rank", screen)
    rows, columns = queries.shape[0], gallery.shape[0]
    _require(columns > 0, lambda: f"rank: gallery must have at least one row, got shape {list(gallery.shape)}")
    _check_rows("rank", "positives", rows, positives, offsets)
    _check_filters("rank", rows, columns, mask, exclude, exclude_offsets)
    greater, equal = (queries.new_empty(positives.shape, dtype=torch.int64) for _ in range(2))
    return greater, equal, queries.new_empty(positives.shape, dtype=_score_dtype(queries.dtype))


# ---- gradients ----


def _similarity_setup(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
    x, y, ctx.metric = inputs
    ctx.save_for_backward(x, y, output)


def _similarity_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, y, scores = ctx.saved_tensors
    with full_precision(grad):
        return *similarity_gradients(x, y, scores, grad, ctx.metric, ctx.needs_input_grad), None


def _topk_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.metric = inputs[3]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[0], inputs[1], *output)


def _topk_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    queries, gallery, scores, indices = ctx.saved_tensors
    with full_precision(grad):
        both = topk_gradients(queries, gallery, scores, indices, grad, ctx.metric, ctx.needs_input_grad)
    return *both, *(None,) * 7


def _rank_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output)


def _rank_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    return (None,) * 9


torch.library.register_autograd("pycm::similarity", _similarity_backward, setup_context=_similarity_setup)
torch.library.register_autograd("pycm::topk", _topk_backward, setup_context=_topk_setup)
torch.library.register_autograd("pycm::rank", _rank_backward, setup_context=_rank_setup)
for _op, _cuda_kernel in (
    ("similarity", _torch_cuda.similarity),
    ("topk", _torch_cuda.topk),
    ("rank", _torch_cuda.rank),
):
    torch.library.impl(f"pycm::{_op}", "CUDA", _cuda_kernel)
    for _device in ("cpu", "cuda"):
        torch.library.register_autocast(f"pycm::{_op}", _device, torch.float32)
