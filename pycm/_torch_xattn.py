"""The gradient of xattn_score by hand, in torch's own operations: one caption and some images at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Elements of the attended vectors of a block of images, the largest of the temporaries.
_BLOCK = 1 << 22


def xattn_gradients(
    grad: Tensor,
    images: Tensor,
    image_lengths: Tensor | None,
    image_offsets: Tensor | None,
    captions: Tensor,
    caption_lengths: Tensor | None,
    caption_offsets: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """Gradients of sum(grad * scores) with scores = xattn_score(images, captions); of the inputs' shapes and dtypes."""
    regions, counts = _padded(images, image_lengths, image_offsets, grad.dtype)
    words, word_counts = _padded(captions, caption_lengths, caption_offsets, grad.dtype)
    grad_regions, grad_words = torch.zeros_like(regions), torch.zeros_like(words)
    some = counts.nonzero().squeeze(1)  # a pair with an empty item scores 0, whatever the other
    for j, count in enumerate(word_counts.tolist()):
        if count == 0:
            continue
        step = max(1, _BLOCK // (regions.shape[2] * max(count, regions.shape[1])))
        for rows in torch.split(some, step):
            by_region, by_word = _block(regions[rows], counts[rows], words[j, :count], grad[rows, j], *options)
            grad_regions[rows] += by_region
            grad_words[j, :count] += by_word
    return (
        _unpadded(grad_regions, images, image_offsets),
        _unpadded(grad_words, captions, caption_offsets),
    )


def _padded(
    values: Tensor, lengths: Tensor | None, offsets: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """[N, T, D] with zeros beyond an item's vectors, and their numbers [N]."""
    if offsets is not None:
        counts = offsets.diff()
        width = int(counts.max()) if len(counts) else 0
        padded = values.new_zeros((len(counts), width, values.shape[1]), dtype=dtype)
        padded[_mask(counts, width)] = values.to(dtype)
        return padded, counts
    counts = torch.full((len(values),), values.shape[1], device=values.device) if lengths is None else lengths
    return torch.where(_mask(counts, values.shape[1]).unsqueeze(-1), values, 0.0).to(dtype), counts


def _mask(counts: Tensor, width: int) -> Tensor:
    return torch.arange(width, device=counts.device) < counts.unsqueeze(-1)


def _unpadded(padded: Tensor, values: Tensor, offsets: Tensor | None) -> Tensor:
    """A gradient in the form of its argument."""
    rows = padded if offsets is None else padded[_mask(offsets.diff(), padded.shape[1])]
    return rows.to(values.dtype)


def _block(
    images: Tensor,
    counts: Tensor,
    caption: Tensor,
    grad: Tensor,
    direction: str,
    feature_norm: str,
    aggregation: str,
    lambda_softmax: float,
    lambda_lse: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of images [n, R, D], of which `counts` >= 1 regions count, and of a caption [W, D], for grad [n]."""
    regions = _mask(counts, images.shape[1])
    words = caption.expand(len(images), -1, -1)
    every = regions.new_ones(words.shape[:2])
    to_images = direction == "t2i"
    x, x_mask, y, y_mask = (words, every, images, regions) if to_images else (images, regions, words, every)

    # The forward, as in csrc/ops/xattn.h; s [n, Y, X].
    s = y @ x.mT
    f, feature_gradient = _feature_norm(s, x_mask.unsqueeze(1), feature_norm, eps)
    weights = (lambda_softmax * f).masked_fill(~y_mask.unsqueeze(-1), -torch.inf).softmax(1)
    attended = weights.mT @ y
    x_norm, attended_norm = x.norm(dim=-1, keepdim=True), attended.norm(dim=-1, keepdim=True)
    norms = x_norm * attended_norm
    least = torch.where(x_mask.unsqueeze(-1), norms.clamp(min=eps), 1.0)
    relevance = (x * attended).sum(-1, keepdim=True) / least

    # And back.
    grad_relevance = grad[:, None, None] * _aggregation_gradient(relevance, x_mask, aggregation, lambda_lse)
    free = x_mask.unsqueeze(-1) & (norms > eps)  # else the norms are held at eps
    cosine = grad_relevance * relevance
    zero = grad.new_zeros(())
    grad_x = grad_relevance * attended / least - torch.where(free, cosine / x_norm.square(), zero) * x
    grad_attended = grad_relevance * x / least - torch.where(free, cosine / attended_norm.square(), zero) * attended
    grad_weights = y @ grad_attended.mT
    grad_y = weights @ grad_attended
    grad_f = lambda_softmax * weights * (grad_weights - (weights * grad_weights).sum(1, keepdim=True))
    grad_s = feature_gradient(grad_f)
    grad_x = grad_x + grad_s.mT @ y
    grad_y = grad_y + grad_s @ x
    return (grad_y, grad_x.sum(0)) if to_images else (grad_x, grad_y.sum(0))


def _aggregation_gradient(relevance: Tensor, mask: Tensor, aggregation: str, lambda_lse: float) -> Tensor:
    """Of the aggregate of relevance [n, X, 1] by each of them."""
    mask = mask.unsqueeze(-1)
    if aggregation == "LogSumExp":
        return (lambda_lse * relevance).masked_fill(~mask, -torch.inf).softmax(1)
    if aggregation == "Max":
        best = relevance.masked_fill(~mask, -torch.inf).argmax(1, keepdim=True)
        return torch.zeros_like(relevance).scatter(1, best, 1.0)
    ones = mask.to(relevance.dtype)
    return ones / ones.sum(1, keepdim=True) if aggregation == "Mean" else ones


def _feature_norm(s: Tensor, mask: Tensor, feature_norm: str, eps: float) -> tuple[Tensor, Any]:
    """The feature norm of s [n, Y, X] over the X that count, 0 elsewhere; and its gradient's way back to s."""
    slope = torch.ones_like(s)
    if feature_norm.startswith("clipped"):
        slope = slope.masked_fill(~(s > 0), 0.1)
    slope = slope.masked_fill(~mask, 0.0)
    kind = feature_norm.removeprefix("clipped_")
    if kind == "softmax":
        f = s.masked_fill(~mask, -torch.inf).softmax(-1)
        return f, lambda grad: f * (grad - (f * grad).sum(-1, keepdim=True))
    s = s * slope
    if kind in ("no_norm", "clipped"):
        return s, lambda grad: grad * slope
    norm = s.norm(p=2 if kind == "l2norm" else 1, dim=-1, keepdim=True)
    whole = norm + eps
    by_norm = s / torch.where(norm > 0, norm, 1.0) if kind == "l2norm" else s.sign()
    return s / whole, lambda grad: slope * (grad / whole - by_norm * (grad * s).sum(-1, keepdim=True) / whole.square())
