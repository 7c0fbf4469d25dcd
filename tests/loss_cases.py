"""The contrastive losses written out over the whole matrix in torch, and calls of pycm's by the same names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pycm import losses

KINDS = ("max_hinge", "sum_hinge", "semi_hard", "info_nce", "sigmoid", "listed")
METRICS = ("cosine", "dot", "pearson")
MARGIN = 0.2
GRADIENTS = ("queries", "gallery", "temperature", "bias")


def scores(queries: Tensor, gallery: Tensor, metric: str) -> Tensor:
    if metric == "pearson":
        queries, gallery = (x - x.mean(-1, keepdim=True) for x in (queries, gallery))
    if metric != "dot":
        queries, gallery = functional.normalize(queries, eps=0.0), functional.normalize(gallery, eps=0.0)
    return queries @ gallery.T


def expected(
    kind: str, queries: Tensor, gallery: Tensor, temperature: Tensor, bias: Tensor,
    groups: Tensor | None = None, negatives: Tensor | None = None, metric: str = "cosine",
    ignored: Tensor | None = None,
) -> Tensor:  # fmt: skip
    s, n = scores(queries, gallery, metric), len(queries)
    positive = s.diagonal()
    if kind == "listed":
        assert negatives is not None
        cost = (MARGIN + s.gather(1, negatives.clamp(min=0)) - positive[:, None]).clamp(min=0)
        return cost[negatives >= 0].sum() / max(1, int((negatives >= 0).sum()))
    groups = torch.arange(n) if groups is None else groups
    same = groups[:, None] == groups
    if ignored is not None:
        same[ignored[:, 0], ignored[:, 1]] = True
    if kind == "info_nce":
        logits = (s / temperature).masked_fill(same & ~torch.eye(n, dtype=torch.bool), -torch.inf)
        target = torch.arange(n)
        return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2
    if kind == "sigmoid":
        logits = s / temperature + bias
        return -(functional.logsigmoid(logits.diagonal()).sum() + functional.logsigmoid(-logits[~same]).sum()) / n
    by_row, by_column = s - positive[:, None], s - positive
    if kind == "sum_hinge":
        return sum((MARGIN + by[~same]).clamp(min=0).sum() for by in (by_row, by_column)) / n
    if kind == "semi_hard":
        by_row, by_column = (by.masked_fill(by >= 0, -torch.inf) for by in (by_row, by_column))
    rows, columns = by_row.masked_fill(same, -torch.inf), by_column.masked_fill(same, -torch.inf)
    return ((MARGIN + rows.amax(1)).clamp(min=0).sum() + (MARGIN + columns.amax(0)).clamp(min=0).sum()) / n


def actual(
    kind: str, queries: Tensor, gallery: Tensor, temperature: Any = 0.4, bias: Any = -1.0,
    groups: Tensor | None = None, negatives: Tensor | None = None, metric: Any = "cosine",
    ignored: Tensor | None = None,
) -> Tensor:  # fmt: skip
    options: dict[str, Any] = {"groups": groups, "ignored": ignored, "metric": metric}
    if kind == "info_nce":
        return losses.info_nce(queries, gallery, temperature=temperature, **options)
    if kind == "sigmoid":
        return losses.sigmoid_loss(queries, gallery, temperature=temperature, bias=bias, **options)
    if kind in ("max_hinge", "sum_hinge"):
        return losses.max_hinge(queries, gallery, margin=MARGIN, hardest=kind == "max_hinge", **options)
    chosen: Any = "semi-hard" if negatives is None else negatives
    return losses.triplet(queries, gallery, margin=MARGIN, negatives=chosen, **options)


#: Which scores of other rows are no negatives: `listed` negatives have no such rows.
LEFT_OUT = ("", "groups", "ignored")


def problem(n: int, dim: int, kind: str, dtype: torch.dtype, left_out: str = "", seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of both functions above, leaves where they have a gradient."""
    random = torch.Generator().manual_seed(seed)
    make = {"generator": random, "dtype": torch.float64}
    queries = torch.randn(n, dim, **make)
    gallery = queries + torch.randn(n, dim, **make)
    temperature, bias = torch.tensor(0.3), torch.tensor(-0.7)
    leaves = {"queries": queries, "gallery": gallery, "temperature": temperature, "bias": bias}
    # Values of float32, so that every dtype computes the same problem.
    found: dict[str, Any] = {k: v.float().to(dtype).requires_grad_() for k, v in leaves.items()}
    if left_out == "ignored":  # about a sixth of the pairs, some of them twice, a row and a column whole
        pairs = torch.randint(0, n, (n * n // 5, 2), generator=random)
        numbers = torch.arange(n)
        whole = [torch.stack([torch.full_like(numbers, n // 2), numbers][:: 1 - 2 * turned], 1) for turned in (0, 1)]
        pairs = torch.cat([pairs, *whole] if n > 2 else [pairs])
        found["ignored"] = pairs[pairs[:, 0] != pairs[:, 1]]
    if left_out == "groups":
        found["groups"] = torch.randint(0, max(2, n // 3), (n,), generator=random)
    if kind == "listed":
        found["negatives"] = torch.randint(-1, n, (n, 3), generator=random)
    return found


def gradients(loss: Tensor, case: dict[str, Any]) -> dict[str, Tensor]:
    """The loss and its gradients, 0 where there is none."""
    found = torch.autograd.grad(loss, [case[name] for name in GRADIENTS], allow_unused=True)
    parts = zip(GRADIENTS, found, strict=True)
    return {"loss": loss.detach()} | {
        name: torch.zeros_like(case[name]) if part is None else part for name, part in parts
    }
