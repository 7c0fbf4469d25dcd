"""Joins and pairs of rows on a device: the pairs, the order and the bits of the host's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import pycm
from pycm import _torch_cuda_encoded, mining


def assert_same(there: Any, here: Any) -> None:
    for part, expected in zip(there, here, strict=True):
        assert isinstance(part, torch.Tensor)
        assert part.cpu().numpy().tobytes() == expected.tobytes()


def joined(blocks: Any) -> tuple[Any, ...]:
    parts = [tuple(np.asarray(part.cpu() if hasattr(part, "cpu") else part) for part in block) for block in blocks]
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Some of them alike, so that a query has more partners than a join looks at first."""
    monkeypatch.setattr(_torch_cuda_encoded, "_FIRST", 8)
    rng = np.random.default_rng(0)
    rows = rng.integers(-2, 3, (60, 6)).astype(np.float32)
    rows[20:32] = rows[3]
    rows[7, 2] = np.nan
    return rows


@pytest.mark.parametrize(
    ("metric", "limit", "first", "cuts"),
    [
        ("cosine", {"min_score": 0.8}, None, {}),
        ("dot", {"min_score": 6.0}, None, {"block": 25, "max_pairs": 60}),
        ("euclidean", {"max_distance": 2.0}, 25, {}),
    ],
)
def test_threshold_join(
    place: Any, rows: Any, metric: Any, limit: dict[str, float], first: int | None, cuts: dict[str, int]
) -> None:
    here = None if first is None else rows[first:]
    there = None if here is None else place(here)
    found = joined(pycm.threshold_join(place(rows), there, metric=metric, **limit, **cuts))
    expected = joined(pycm.threshold_join(rows, here, metric=metric, **limit))
    assert len(expected[0]) > 60
    for part, other in zip(found, expected, strict=True):
        assert part.tobytes() == other.tobytes()


def test_all_pairs_topk(place: Any, rows: Any) -> None:
    for per_row in (None, 4):
        found = pycm.all_pairs_topk(place(rows), 80, "dot", per_row=per_row)
        assert_same(found, pycm.all_pairs_topk(rows, 80, "dot", per_row=per_row))


@pytest.mark.parametrize("mode", ["greedy", "components"])
def test_deduplicate(place: Any, rows: Any, mode: Any) -> None:
    assert_same(mining.deduplicate(place(rows), 0.9, mode=mode), mining.deduplicate(rows, 0.9, mode=mode))


def test_hard_negatives(place: Any, arch: str) -> None:
    if arch != "chip":
        pytest.skip("by torch.ops.pycm.topk, which goes by the tensors' own device")
    rng = np.random.default_rng(1)
    queries, gallery = (rng.standard_normal((n, 8)).astype(np.float32) for n in (20, 300))
    options: dict[str, Any] = {"k": 5, "absolute_margin": 0.1, "range_min": 2}
    found = pycm.mine_hard_negatives(place(queries), place(gallery), place(np.arange(20)), **options)
    assert_same(found, pycm.mine_hard_negatives(queries, gallery, range(20), **options))


def test_devices_are_not_mixed(place: Any, rows: Any, arch: str) -> None:
    if arch != "chip":
        pytest.skip("one device")
    with pytest.raises(ValueError, match="gallery must be on the queries' device cuda:0, got cpu"):
        pycm.threshold_join(place(rows), torch.from_numpy(rows), min_score=0.5)
