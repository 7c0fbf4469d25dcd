"""What the tests of topk and rank share: metrics, rows, and lists of indices as the operators take them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

METRICS = ("dot", "cosine", "pearson", "euclidean", "sqeuclidean")


def rows(seed: int, count: int, dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def compressed(lists: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    offsets = np.cumsum([0, *(len(row) for row in lists)])
    return torch.tensor([i for row in lists for i in row], dtype=torch.int64), torch.from_numpy(offsets)


def excluding(lists: list[list[int]] | None) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """`exclude` and `exclude_offsets`."""
    return (None, None) if lists is None else compressed(lists)


def numpy_rows(tensor: torch.Tensor) -> Any:
    return (tensor if tensor.dtype == torch.float64 else tensor.float()).numpy()


def make_special(queries: torch.Tensor, gallery: torch.Tensor) -> None:
    """Their first eight rows: zero, constant, with NaN and infinity, huge, tiny, subnormal, and the same in both."""
    for tensor in (queries, gallery):
        tensor[0] = 0
        tensor[1] = 3.5
        tensor[2, 4] = float("nan")
        tensor[3, 5] = float("inf")
        tensor[4] *= 1e37
        tensor[5] *= 1e-30
        tensor[6] = 1e-42
    gallery[7] = queries[7]
