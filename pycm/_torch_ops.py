"""The kernels as torch operators: `torch.ops.pycm.similarity` and `torch.ops.pycm.topk`.

They trace (`torch.compile`, `torch.export`), differentiate, and widen under autocast. A plain eager call that
needs none of that goes straight to the kernel: the dispatcher alone would cost more than a small product.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import Tensor

from pycm import _C
from pycm.functional import Matches, _exclude_rows

torch.library.define("pycm::similarity", "(Tensor x, Tensor y, str metric) -> Tensor")
torch.library.define(
    "pycm::topk",
    "(Tensor queries, Tensor gallery, int k, str metric, Tensor? mask, Tensor? exclude, "
    "Tensor? exclude_offsets, str precision) -> (Tensor, Tensor)",
)


# ---- the functions behind pycm.similarity and pycm.topk ----


def similarity(x: Tensor, y: Tensor, metric: str) -> Tensor:
    if _direct(x, y):
        return cast(Tensor, _C.similarity(x, y, metric, torch.get_num_threads()))
    _check_devices("similarity", "x", x, "y", y)
    return cast(Tensor, torch.ops.pycm.similarity(x, y, metric))


def topk(queries: Tensor, gallery: Tensor, k: int, metric: str, mask: Any, exclude: Any, precision: str) -> Matches:
    if mask is None and exclude is None and _direct(queries, gallery):
        threads = torch.get_num_threads()
        return tuple.__new__(Matches, _C.topk(queries, gallery, k, metric, precision, None, None, None, threads))
    _check_devices("topk", "queries", queries, "gallery", gallery)
    try:
        k = operator.index(k)
    except TypeError:
        raise TypeError(f"topk: k must be an integer, got {type(k).__name__}") from None
    if mask is not None:
        mask = torch.as_tensor(mask)
        _check_devices("topk", "queries", queries, "mask", mask)
    indices, offsets = (None, None) if exclude is None else _exclude_tensors(exclude, queries)
    scores, found = torch.ops.pycm.topk(queries, gallery, k, metric, mask, indices, offsets, precision)
    return Matches(scores, found)


# Bound once: each lookup would cost as much as the answer.
_is_compiling = torch.compiler.is_dynamo_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_in_transform = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
_profiling = torch._C._autograd._profiler_enabled


def _direct(a: Tensor, b: Tensor) -> bool:
    """Whether nothing but the values is asked for: no gradient, trace, transform, cast or profile."""
    return (
        not _is_compiling()
        and type(a) is Tensor
        and type(b) is Tensor
        and a.is_cpu
        and b.is_cpu
        and a.dtype is b.dtype
        and not ((a.requires_grad or b.requires_grad) and torch.is_grad_enabled())
        # torch negates lazily; only a strided view can be in that state
        and (a.is_contiguous() or not a.is_neg())
        and (b.is_contiguous() or not b.is_neg())
        and not _dispatch_modes()
        and not _in_transform()
        and _tracing_state() is None
        and not _profiling()
    )


def _check_devices(function: str, a_name: str, a: Tensor, b_name: str, b: Tensor) -> None:
    if a.device != b.device:
        raise ValueError(f"{function}: {b_name} must be on {a_name}'s device {a.device}, got {b.device}")
    if a.device.type not in ("cpu", "meta"):
        raise NotImplementedError(
            f"{function}: {a_name} is on {a.device}, and this version has kernels for the CPU only"
        )


def _exclude_tensors(exclude: Any, queries: Tensor) -> tuple[Tensor, Tensor]:
    """`exclude` as compressed rows (indices, offsets)."""
    for part in exclude if isinstance(exclude, tuple) else (exclude,):
        if isinstance(part, Tensor):
            _check_devices("topk", "queries", queries, "exclude", part)
    if isinstance(exclude, Tensor) and exclude.layout == torch.sparse_csr:
        return exclude.col_indices().long(), exclude.crow_indices().long()
    if isinstance(exclude, Tensor):
        if exclude.is_floating_point() or exclude.dtype == torch.bool:
            raise TypeError(f"topk: exclude must hold integers, got {exclude.dtype}")
        if exclude.shape != queries.shape[:1]:
            raise ValueError(f"topk: exclude must have shape [{queries.shape[0]}], got {list(exclude.shape)}")
        return exclude.long(), torch.arange(queries.shape[0] + 1)
    indices, offsets = _exclude_rows(exclude, queries.shape[0])
    return torch.from_numpy(indices), torch.from_numpy(offsets)


# ---- CPU kernels ----


@torch.library.impl("pycm::similarity", "CPU")
def _similarity_cpu(x: Tensor, y: Tensor, metric: str) -> Tensor:
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
) -> tuple[Tensor, Tensor]:
    return _C.topk(
        _plain(queries),
        _plain(gallery),
        k,
        metric,
        precision,
        mask,
        None if exclude is None else exclude.contiguous(),
        None if exclude_offsets is None else exclude_offsets.contiguous(),
        torch.get_num_threads(),
    )


def _plain(tensor: Tensor) -> Tensor:
    """Without torch's lazy negation, which a strided view cannot express."""
    return tensor.detach().resolve_neg()


# ---- shapes without values ----


def _score_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.register_fake("pycm::similarity")  # type: ignore[untyped-decorator]
def _similarity_fake(x: Tensor, y: Tensor, metric: str) -> Tensor:
    batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])  # type: ignore[no-untyped-call]
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
) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], k)
    return (
        queries.new_empty(shape, dtype=_score_dtype(queries.dtype)),
        queries.new_empty(shape, dtype=torch.int64),
    )


# ---- gradients, written in differentiable operations, so that second derivatives exist ----


def _pair_gradients(x: Tensor, y: Tensor, scores: Tensor, grad: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Gradients of sum(grad * scores) with scores = similarity(x [..., N, D], y [..., M, D])."""
    dtype = scores.dtype
    a, b = x.to(dtype), y.to(dtype)
    if metric == "pearson":
        a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    if metric in ("cosine", "pearson"):
        a, a_inverse = _normalise(a, x, metric)
        b, b_inverse = _normalise(b, y, metric)
        weighted = grad * scores
        grad_a = (grad @ b - weighted.sum(-1, keepdim=True) * a) * a_inverse
        grad_b = (grad.mT @ a - weighted.sum(-2).unsqueeze(-1) * b) * b_inverse
        if metric == "pearson":
            grad_a = grad_a - grad_a.mean(-1, keepdim=True)
            grad_b = grad_b - grad_b.mean(-1, keepdim=True)
    elif metric == "dot":
        grad_a, grad_b = grad @ b, grad.mT @ a
    else:
        if metric == "euclidean":
            # At distance 0 the subgradient 0 is taken.
            apart = scores > 0
            weight = torch.where(apart, grad / torch.where(apart, scores, 1.0), 0.0)
        else:
            weight = 2 * grad
        grad_a = a * weight.sum(-1, keepdim=True) - weight @ b
        grad_b = b * weight.sum(-2).unsqueeze(-1) - weight.mT @ a
    return grad_a.sum_to_size(x.shape).to(x.dtype), grad_b.sum_to_size(y.shape).to(y.dtype)


def _normalise(centred: Tensor, original: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Rows of norm 1, and the inverse norms; both 0 for a row whose score is defined as 0.

    In fp64, where the squares of no fp32 row underflow.
    """
    zero = (original == (original[..., :1] if metric == "pearson" else 0)).all(-1, keepdim=True)
    rows = centred.double()
    square = rows.square().sum(-1, keepdim=True)
    inverse = torch.where(zero, 0.0, torch.where(zero, 1.0, square).rsqrt())
    return (rows * inverse).to(centred.dtype), inverse.to(centred.dtype)


def _similarity_setup(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
    x, y, ctx.metric = inputs
    ctx.save_for_backward(x, y, output)


def _similarity_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, y, scores = ctx.saved_tensors
    return (*_pair_gradients(x, y, scores, grad, ctx.metric), None)


def _topk_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.metric = inputs[3]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[0], inputs[1], *output)


def _topk_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    queries, gallery, scores, indices = ctx.saved_tensors
    found = indices >= 0
    rows = indices.clamp(min=0)
    grad = torch.where(found, grad, 0.0).unsqueeze(-2)
    scores = torch.where(found, scores, 0.0).unsqueeze(-2)
    grad_queries, grad_rows = _pair_gradients(queries.unsqueeze(-2), gallery[rows], scores, grad, ctx.metric)
    grad_gallery = torch.zeros_like(gallery).index_add(0, rows.flatten(), grad_rows.flatten(0, 1))
    return grad_queries.squeeze(-2), grad_gallery, None, None, None, None, None, None


torch.library.register_autograd("pycm::similarity", _similarity_backward, setup_context=_similarity_setup)
torch.library.register_autograd("pycm::topk", _topk_backward, setup_context=_topk_setup)
for _op in ("pycm::similarity", "pycm::topk"):
    torch.library.register_autocast(_op, "cpu", torch.float32)
