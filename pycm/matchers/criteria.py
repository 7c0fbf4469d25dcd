"""The losses of the ranking embedding, by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LOSSES = ("max_hinge", "info_nce", "sigmoid", "triplet")


class _Hinge(nn.Module):  # PRIVATE until pycm.losses is merged
    hardest = True

    def forward(self, q: Tensor, g: Tensor, *, groups: Tensor) -> Tensor:
        s = F.normalize(q) @ F.normalize(g).T
        ok = groups[:, None] != groups[None]
        d = s.diagonal()
        rows = torch.where(ok, (0.2 + s - d[:, None]).clamp(min=0), 0.0)
        cols = torch.where(ok, (0.2 + s - d[None]).clamp(min=0), 0.0)
        if self.hardest:
            return (rows.amax(1) + cols.amax(0)).sum()
        return (rows + cols).sum()


class _InfoNCE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(2.65))

    def forward(self, q: Tensor, g: Tensor, *, groups: Tensor) -> Tensor:
        s = F.normalize(q) @ F.normalize(g).T * self.log_scale.exp()
        eye = torch.eye(len(s), dtype=torch.bool)
        s = torch.where((groups[:, None] != groups[None]) | eye, s, -torch.inf)
        t = torch.arange(len(s))
        return (F.cross_entropy(s, t) + F.cross_entropy(s.T, t)) / 2


def make_criterion(loss: Any, metric: str) -> nn.Module:
    return _Hinge() if loss == "max_hinge" else _InfoNCE()
