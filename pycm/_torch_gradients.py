"""Gradients of the torch operators, written in differentiable operations, so that second derivatives exist."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pycm.functional import DISTANCES

# Bytes of gathered gallery rows that topk's backward holds at a time; its temporaries are a few times that.
GATHERED_BYTES = 8 << 20

Gradients = tuple[Tensor | None, Tensor | None]


def full_precision(tensor: Tensor) -> AbstractContextManager[Any]:
    """No autocast: a backward called inside it would be rounded to its dtype, unlike the forward."""
    device = tensor.device.type
    active = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if active else nullcontext()


def similarity_gradients(
    x: Tensor, y: Tensor, scores: Tensor, grad: Tensor, metric: str, needs: tuple[bool, ...]
) -> Gradients:
    """Gradients of sum(grad * scores) with scores = similarity(x [..., N, D], y [..., M, D]), where needed."""
    pair = _distance_gradients if metric in DISTANCES else _product_gradients
    grad_x, grad_y = pair(x, y, scores, grad, metric, needs)
    return (
        None if grad_x is None else grad_x.sum_to_size(x.shape).to(x.dtype),
        None if grad_y is None else grad_y.sum_to_size(y.shape).to(y.dtype),
    )


def topk_gradients(
    queries: Tensor,
    gallery: Tensor,
    scores: Tensor,
    indices: Tensor,
    grad: Tensor,
    metric: str,
    needs: tuple[bool, ...],
) -> Gradients:
    """Gradients of sum(grad * scores) with scores, indices [N, k] = topk(queries [N, D], gallery [M, D])."""
    count, k, dim = *indices.shape, queries.shape[1]
    # A trace with symbolic sizes has no number of chunks, and takes one.
    symbolic = any(isinstance(size, torch.SymInt) for size in (count, k, dim))
    step = count if symbolic else max(1, GATHERED_BYTES // (k * dim * scores.element_size()))
    by_query: list[Tensor] = []
    # Made of grad, so that a batch of gradients (vmap) gets a batch of sums.
    grad_gallery = grad.new_zeros(gallery.shape) if needs[1] else None
    for start in range(0, count, step) if not symbolic else (0,):
        part = slice(start, start + step)
        found, rows = indices[part] >= 0, indices[part].clamp(min=0)
        # What is not there (index -1) must not be computed with: 0 * nan is nan, at any derivative.
        chosen = torch.where(found.unsqueeze(-1), gallery[rows], 0.0)
        asked = torch.where(found.any(-1, keepdim=True), queries[part], 0.0)
        grad_queries, grad_rows = _row_gradients(
            asked,
            chosen,
            torch.where(found, scores[part], 0.0),
            torch.where(found, grad[part], 0.0),
            metric,
            needs,
        )
        if grad_queries is not None:
            by_query.append(grad_queries)
        if grad_gallery is not None and grad_rows is not None:
            # An infinite query has matches and fillers both.
            grad_rows = torch.where(found.unsqueeze(-1), grad_rows, 0.0)
            _add_rows(grad_gallery, rows.reshape(-1), grad_rows.reshape(-1, dim))
    grad_all = None
    if needs[0]:
        grad_all = torch.cat(by_query).to(queries.dtype) if by_query else torch.zeros_like(queries)
    return grad_all, None if grad_gallery is None else grad_gallery.to(gallery.dtype)


def _add_rows(total: Tensor, rows: Tensor, values: Tensor) -> None:
    """total[rows] += values, with the same bits every time: on CUDA index_add_ adds by atomics, index_put_ sorts."""
    if total.is_cuda:
        total.index_put_((rows,), values, accumulate=True)
    else:
        total.index_add_(0, rows, values)


def _row_gradients(
    queries: Tensor, rows: Tensor, scores: Tensor, grad: Tensor, metric: str, needs: tuple[bool, ...]
) -> Gradients:
    """Of queries [n, D] and the rows [n, k, D] that each was scored with; in the dtype of the scores."""
    queries, rows = queries.to(scores.dtype).unsqueeze(-2), rows.to(scores.dtype)
    if metric in DISTANCES:
        # The best matches are the closest rows: only their differences keep the digits.
        grad_rows = _distance_weight(scores, grad, metric).unsqueeze(-1) * (rows - queries)
        return -grad_rows.sum(-2) if needs[0] else None, grad_rows if needs[1] else None
    grad_queries, grad_rows_ = _product_gradients(
        queries, rows, scores.unsqueeze(-2), grad.unsqueeze(-2), metric, needs
    )
    return None if grad_queries is None else grad_queries.squeeze(-2), grad_rows_


def _product_gradients(
    x: Tensor, y: Tensor, scores: Tensor, grad: Tensor, metric: str, needs: tuple[bool, ...]
) -> Gradients:
    """For dot, cosine and pearson; broadcast batch axes are not summed yet."""
    dtype = scores.dtype
    a, b = x.to(dtype), y.to(dtype)
    if metric == "dot":
        return grad @ b if needs[0] else None, grad.mT @ a if needs[1] else None
    if metric == "pearson":
        a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    a, a_inverse = _normalise(a, x, metric)
    b, b_inverse = _normalise(b, y, metric)
    weighted = grad * scores
    grad_a = (grad @ b - weighted.sum(-1, keepdim=True) * a) * a_inverse if needs[0] else None
    grad_b = (grad.mT @ a - weighted.sum(-2).unsqueeze(-1) * b) * b_inverse if needs[1] else None
    if metric == "pearson":
        grad_a = None if grad_a is None else grad_a - grad_a.mean(-1, keepdim=True)
        grad_b = None if grad_b is None else grad_b - grad_b.mean(-1, keepdim=True)
    return grad_a, grad_b


def _distance_gradients(
    x: Tensor, y: Tensor, scores: Tensor, grad: Tensor, metric: str, needs: tuple[bool, ...]
) -> Gradients:
    """For distances; broadcast batch axes are not summed yet.

    The sum of weight * (a - b) over the pairs is taken apart into products, and a close pair cancels in it: hence
    fp64, and a common centre of the rows, which leaves the differences as they are.
    """
    weight = _distance_weight(scores, grad, metric).double()
    a, b = x.double(), y.double()
    centre = b.detach().mean(-2, keepdim=True).mean(tuple(range(b.ndim - 2)), keepdim=True)
    a, b = a - centre, b - centre
    grad_a = a * weight.sum(-1, keepdim=True) - weight @ b if needs[0] else None
    grad_b = b * weight.sum(-2).unsqueeze(-1) - weight.mT @ a if needs[1] else None
    return grad_a, grad_b


def _distance_weight(scores: Tensor, grad: Tensor, metric: str) -> Tensor:
    """What a pair's difference is multiplied with."""
    if metric == "sqeuclidean":
        return 2 * grad
    # At distance 0 the subgradient 0 is taken.
    apart = scores > 0
    return torch.where(apart, grad / torch.where(apart, scores, 1.0), 0.0)


def _normalise(centred: Tensor, original: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Rows of norm 1, and the inverse norms; both 0 for a row whose score is defined as 0.

    In fp64, where the squares of no fp32 row underflow.
    """
    zero = (original == (original[..., :1] if metric == "pearson" else 0)).all(-1, keepdim=True)
    rows = centred.double()
    square = rows.square().sum(-1, keepdim=True)
    inverse = torch.where(zero, 0.0, torch.where(zero, 1.0, square).rsqrt())
    return (rows * inverse).to(centred.dtype), inverse.to(centred.dtype)
