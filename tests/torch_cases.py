"""What the tests of the torch operators share."""

from __future__ import annotations

from typing import Any

import oracles
import pytest

torch = pytest.importorskip("torch")


def pair(
    n: int = 4, m: int = 9, d: int = 5, dtype: torch.dtype = torch.float64, seed: int = 0, grad: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, g = (torch.randn(rows, d, generator=generator, dtype=torch.float64).to(dtype) for rows in (n, m))
    return q.requires_grad_(grad), g.requires_grad_(grad)


def plain_similarity(x: torch.Tensor, y: torch.Tensor, metric: str) -> torch.Tensor:
    """The metric in torch's own differentiable operations."""
    if metric in oracles.DISTANCES:
        square = (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)
        return square.sqrt() if metric == "euclidean" else square
    if metric == "pearson":
        x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    if metric != "dot":
        x, y = x / x.norm(dim=-1, keepdim=True), y / y.norm(dim=-1, keepdim=True)
    return x @ y.mT


def raises(error: type[Exception], words: list[str], call: Any) -> None:
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
