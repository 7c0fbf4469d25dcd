"""Contrastive losses and their gradients in torch's own operations, some rows of the score matrix at a time.

What CUDA tensors take. Never N x N: a block of scores has at most `BLOCK` elements (or one row), beside a few
temporaries of its size. Nothing waits for the device. The losses are defined in csrc/ops/contrastive.h.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pycm._torch_gradients import _add_rows, _normalise, full_precision

BLOCK = 1 << 24


class Arguments(NamedTuple):
    """What the operator `pycm::contrastive` takes, in its order."""

    queries: Tensor
    gallery: Tensor
    scale: Tensor
    bias: Tensor
    groups: Tensor | None
    ignored: Tensor | None
    negatives: Tensor | None
    function: str
    loss: str
    metric: str
    margin: float
    needs_queries: bool
    needs_gallery: bool
    needs_scale: bool


def contrastive_tiled(given: Arguments) -> tuple[Tensor, ...]:
    """As the operator: loss, gradients of queries, gallery, scale and bias."""
    device, loss = given.queries.device, given.loss
    dtype = torch.float64 if given.queries.dtype == torch.float64 else torch.float32
    with full_precision(given.queries):
        call = _Call(
            _Side(given.queries.to(dtype), given.metric, given.needs_queries),
            _Side(given.gallery.to(dtype), given.metric, given.needs_gallery),
            given.scale.to(device, dtype),
            given.bias.to(device, dtype),
            given.groups,
            given.ignored,
            given.margin,
        )
        if loss == "listed":
            assert given.negatives is not None
            call.listed(given.negatives)
        elif loss in ("max_hinge", "semi_hard"):
            call.maxima(below=loss == "semi_hard")
        else:
            getattr(call, loss)()
        return (*call.finish(), call.grad_scale.to(given.scale), call.grad_bias.to(given.bias))


class _Side:
    """Rows whose dot products are the metric's scores, and their gradient."""

    def __init__(self, source: Tensor, metric: str, needed: bool) -> None:
        self.metric = metric
        self.rows, self.inverse = source, None
        if metric != "dot":
            centred = source - source.mean(-1, keepdim=True) if metric == "pearson" else source
            self.rows, self.inverse = _normalise(centred, source, metric)
        self.grad = torch.zeros_like(self.rows) if needed else None

    def finish(self) -> Tensor:
        if self.grad is None:
            return self.rows.new_empty(0)
        if self.inverse is None:
            return self.grad
        along = (self.grad * self.rows).sum(-1, keepdim=True)
        grad = (self.grad - along * self.rows) * self.inverse
        return grad - grad.mean(-1, keepdim=True) if self.metric == "pearson" else grad


class _Call:
    def __init__(
        self,
        queries: _Side,
        gallery: _Side,
        scale: Tensor,
        bias: Tensor,
        groups: Tensor | None,
        ignored: Tensor | None,
        margin: float,
    ) -> None:
        self.queries, self.gallery, self.scale, self.bias = queries, gallery, scale, bias
        self.margin, self.groups, self.ignored = margin, groups, ignored
        self.n = len(queries.rows)
        self.positive = (queries.rows * gallery.rows[: self.n]).sum(-1)
        # d loss / d positive. A NaN there is NaN in the loss, negatives or not.
        self.weight = torch.zeros_like(self.positive)
        self.loss = (0 * self.positive).sum()
        self.grad_scale, self.grad_bias = torch.zeros_like(self.loss), torch.zeros_like(self.loss)
        self.absent = torch.finfo(self.positive.dtype).min / 4  # of a score that must not count; times 0 it is 0

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        for side, other in ((self.queries, self.gallery), (self.gallery, self.queries)):
            if side.grad is not None:
                side.grad[: self.n] += self.weight.unsqueeze(1) * other.rows[: self.n]
        return self.loss, self.queries.finish(), self.gallery.finish()

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows, and their scores with the whole gallery."""
        step = max(1, BLOCK // self.n)
        numbers = torch.arange(self.n, device=self.positive.device) if self.groups is None else self.groups
        for start in range(0, self.n, step):
            rows = slice(start, min(start + step, self.n))
            scores = self.queries.rows[rows] @ self.gallery.rows.T
            scores.masked_fill_(numbers[rows].unsqueeze(1) == numbers, self.absent)
            if self.ignored is not None:
                # Which pairs are in the block is the device's to know: those that are not fall on its first positive.
                i, j = self.ignored.unbind(1)
                here = (i >= rows.start) & (i < rows.stop)
                scores[torch.where(here, i - rows.start, 0), torch.where(here, j, rows.start)] = self.absent
            yield rows, scores

    def _add_gradients(self, rows: slice, weights: Tensor) -> None:
        """`weights`: the gradient of a block's scores."""
        if self.queries.grad is not None:
            self.queries.grad[rows] = weights @ self.gallery.rows
        if self.gallery.grad is not None:
            self.gallery.grad += weights.T @ self.queries.rows[rows]

    def _choose(self, query: Tensor, row: Tensor, owner: Tensor, score: Tensor) -> None:
        """Hinges of single pairs, their gradients 1 where they are above 0."""
        cost = torch.where(row >= 0, (self.margin + score - self.positive[owner]), 0.0).where(query >= 0, 0.0)
        above = cost > 0
        self.loss = self.loss + torch.where(cost <= 0, 0.0, cost).sum()
        weight = above.to(score.dtype)
        _add_rows(self.weight, owner, -weight)
        query, row = query.clamp(min=0), row.clamp(min=0)
        for side, to, other, of in (
            (self.queries, query, self.gallery, row),
            (self.gallery, row, self.queries, query),
        ):
            if side.grad is not None:
                _add_rows(side.grad, to, weight.unsqueeze(1) * other.rows[of])

    def maxima(self, below: bool) -> None:
        numbers = torch.arange(self.n, device=self.positive.device)
        best, where = torch.full_like(self.positive, self.absent), torch.full_like(numbers, -1)

        def allowed(scores: Tensor, ceiling: Tensor) -> Tensor:
            return torch.where(scores >= ceiling, self.absent, scores) if below else scores

        for rows, scores in self._blocks():
            score, row = allowed(scores, self.positive[rows].unsqueeze(1)).max(1)
            self._choose(numbers[rows], torch.where(score > self.absent, row, -1), numbers[rows], score)
            score, row = allowed(scores, self.positive).max(0)
            better = (score > best) | (score.isnan() & ~best.isnan())
            best, where = torch.where(better, score, best), torch.where(better, row + rows.start, where)
        self._choose(where, numbers, numbers, best)

    def listed(self, negatives: Tensor) -> None:
        queries = self.queries.rows.unsqueeze(1)
        numbers = torch.arange(self.n, device=self.positive.device)
        step = max(1, BLOCK // max(1, negatives.shape[1] * queries.shape[2]))
        for part in torch.split(numbers, step):
            chosen = negatives[part]
            scores = (queries[part] * self.gallery.rows[chosen.clamp(min=0)]).sum(-1)
            owner = part.unsqueeze(1).expand_as(chosen).reshape(-1)
            self._choose(owner, chosen.reshape(-1), owner, scores.reshape(-1))

    def sum_hinge(self) -> None:
        for rows, scores in self._blocks():
            by_row = self.margin + scores - self.positive[rows].unsqueeze(1)
            by_column = self.margin + scores - self.positive
            self.loss = self.loss + by_row.clamp(min=0).sum() + by_column.clamp(min=0).sum()
            row_weight, column_weight = (by_row > 0).to(scores), (by_column > 0).to(scores)
            self.weight[rows] -= row_weight.sum(1)
            self.weight -= column_weight.sum(0)
            self._add_gradients(rows, row_weight + column_weight)

    def sigmoid(self) -> None:
        positive = self.scale * self.positive + self.bias
        self._add_logistic(softplus(-positive), -torch.sigmoid(-positive), self.positive)
        self.weight = -torch.sigmoid(-positive) * self.scale
        for rows, scores in self._blocks():
            logits = self.scale * scores + self.bias
            weight = torch.sigmoid(logits)
            self._add_logistic(softplus(logits), weight, scores)
            self._add_gradients(rows, weight * self.scale)

    def _add_logistic(self, cost: Tensor, slope: Tensor, scores: Tensor) -> None:
        self.loss = self.loss + cost.sum()
        self.grad_bias = self.grad_bias + slope.sum()
        self.grad_scale = self.grad_scale + (slope * scores).sum()

    def info_nce(self) -> None:
        positive = self.scale * self.positive
        by_row, by_column = (
            positive.clone(),
            positive.clone(),
        )  # log of the sums of exp, the positives' own to begin with
        for rows, scores in self._blocks():
            logits = self.scale * scores
            by_row[rows] = torch.logaddexp(by_row[rows], logits.logsumexp(1))
            by_column = torch.logaddexp(by_column, logits.logsumexp(0))
        self.loss = self.loss + (by_row - positive).sum() + (by_column - positive).sum()
        slope = (positive - by_row).expm1() + (positive - by_column).expm1()
        self.weight = slope * self.scale
        self.grad_scale = (slope * self.positive).sum()
        for rows, scores in self._blocks():
            logits = self.scale * scores
            weight = (logits - by_row[rows].unsqueeze(1)).exp() + (logits - by_column).exp()
            self.grad_scale = self.grad_scale + (weight * scores).sum()
            self._add_gradients(rows, weight * self.scale)
