"""The rule of tolerances.py: as accurate as torch's own fp32, against long double."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from oracles import truth, widen
from tolerances import SLACK

torch = pytest.importorskip("torch")
F = torch.nn.functional


def torch_similarity(x: torch.Tensor, y: torch.Tensor, metric: str) -> torch.Tensor:
    """torch's most accurate way, in the output's dtype."""
    if x.dtype in (torch.float16, torch.bfloat16):
        x, y = x.float(), y.float()
    if metric == "dot":
        return x @ y.mT
    if metric == "cosine":
        return F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).mT
    if metric == "pearson":
        return torch_similarity(x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True), "cosine")
    distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return distance if metric == "euclidean" else distance.square()


def score_scale(x: torch.Tensor, y: torch.Tensor, metric: str) -> float:
    if metric in ("cosine", "pearson"):
        return 1.0
    a, b = (float(np.linalg.norm(widen(t).astype(float), axis=-1).max()) for t in (x, y))
    return a * b if metric == "dot" else a + b if metric == "euclidean" else (a + b) ** 2


def assert_accurate(
    similarity: Callable[[torch.Tensor, torch.Tensor, str], torch.Tensor],
    x: torch.Tensor,
    y: torch.Tensor,
    metric: str,
    what: str = "",
) -> torch.Tensor:
    ours = similarity(x, y, metric)
    want = truth(x, y, metric)
    assert ours.shape == want.shape
    assert ours.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    error = np.abs(ours.numpy().astype(np.longdouble) - want).max(initial=0)
    peer = np.abs(torch_similarity(x, y, metric).numpy().astype(np.longdouble) - want).max(initial=0)
    slack = SLACK[metric] * torch.finfo(ours.dtype).eps * score_scale(x, y, metric)
    assert error <= peer + slack, f"{what} {metric} {tuple(x.shape)} {x.dtype}: {error} > torch's {peer} + {slack}"
    return ours
