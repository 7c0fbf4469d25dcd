"""What the CUDA operators check before a kernel is queued, and what they leave to the device."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from pycm import _torch_cuda


def rows(count: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


Q, G = rows(4, 8, 0), rows(30, 8, 1)


def topk(module: ModuleType, **changes: Any) -> None:
    results = {
        "scores": torch.empty(4, 3),
        "indices": torch.empty(4, 3, dtype=torch.int64),
        "workspace": torch.empty(1 << 20, dtype=torch.uint8),
    } | changes
    module.cuda_topk(Q, G, 3, "dot", "exact", None, None, None, "auto", None, *results.values(), 0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"workspace": torch.empty(0, dtype=torch.uint8)}, ValueError, r"topk: workspace must have shape \[\d+\], got"),
        ({"workspace": torch.empty(8)}, TypeError, "topk: workspace must be a uint8 array, got float32"),
        ({"scores": torch.empty(4, 2)}, ValueError, r"topk: scores must have shape \[4, 3\], got \[4, 2\]"),
        ({"scores": torch.empty(3, 4).T}, ValueError, "topk: scores must be contiguous"),
        ({"scores": torch.empty(4, 3, dtype=torch.float64)}, TypeError, "topk: scores must be float32, got float64"),
        ({"scores": Q.view(-1)[:12].view(4, 3)}, ValueError, "topk: scores must not overlap queries"),
        ({"indices": torch.empty(4, 3)}, TypeError, "topk: indices must be an int64 array, got float32"),
    ],
)
def test_results_and_scratch_are_checked(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    monkeypatch.setenv("PYCM_SIMT_ARCH", "90")
    with pytest.raises(error, match=message):
        topk(module, **changes)


def test_indices_on_the_device_fail_an_assertion(cuda: Any, arch: str) -> None:
    if arch == "chip":
        pytest.skip("a failed device-side assertion ends the process's use of the chip")
    offsets = torch.arange(5)
    for exclude, starts in (
        (torch.tensor([30, 0, 0, 0]), offsets),
        (torch.tensor([-2, 0, 0, 0]), offsets),
        (torch.zeros(4, dtype=torch.int64), torch.tensor([0, 2, 1, 3, 4])),
        (torch.zeros(4, dtype=torch.int64), torch.tensor([0, 1, 2, 3, 5])),
    ):
        with pytest.raises(RuntimeError, match=r"topk: exclude must be compressed rows of indices in \[0, 30\)"):
            cuda.topk(Q, G, 3, "dot", None, exclude, starts, "exact")
    with pytest.raises(RuntimeError, match="rank: positives must be"):
        cuda.rank(Q, G, torch.tensor([0, 1, 2, -1]), offsets, "dot", None, None, None)
    with pytest.raises(RuntimeError, match="rank: positives must be"):
        cuda.rank(Q, G, torch.tensor([0, 1, 2, 30]), offsets, "dot", None, None, None)


def test_lengths_on_the_device_fail_an_assertion(cuda_sets: Any, arch: str) -> None:
    if arch == "chip":
        pytest.skip("a failed device-side assertion ends the process's use of the chip")
    words = rows(4, 8, 2).view(2, 2, 8)
    way = ("dot", "sum", "t2i")
    with pytest.raises(RuntimeError, match=r"maxsim: lengths must be in \[0, 2\]"):
        cuda_sets.maxsim(words, torch.tensor([1, 3]), None, words, None, None, *way)
    with pytest.raises(RuntimeError, match="maxsim: offsets must rise from 0 to 4"):
        cuda_sets.maxsim(words, None, None, words.view(4, 8), None, torch.tensor([0, 3]), *way)


def test_nothing_is_launched_for_nothing(cuda: Any, cuda_sets: Any) -> None:
    scores, indices = cuda.topk(Q[:0], G, 3, "dot", None, None, None, "exact")
    assert scores.shape == indices.shape == (0, 3)
    empty = torch.empty(0, dtype=torch.int64)
    assert all(
        not part.numel() for part in cuda.rank(Q[:0], G, empty, torch.zeros(1, dtype=torch.int64), "dot", *[None] * 3)
    )
    assert cuda.similarity(Q[:0], G, "dot").shape == (0, 30)
    assert cuda_sets.maxsim(
        Q.view(4, 1, 8)[:0], None, None, G.view(30, 1, 8), None, None, "dot", "sum", "t2i"
    ).shape == (0, 30)


def test_the_most_scratch_of_any_metric_is_told_ahead(module: ModuleType, cuda: Any, arch: str) -> None:
    if arch == "chip":
        pytest.skip("tests/test_cuda.py asks the allocator")
    ahead = _torch_cuda.workspace_bytes(4, 30, 8, 3, Q.device)
    for metric in ("dot", "cosine", "pearson", "euclidean", "sqeuclidean"):
        needed = module.cuda_topk_workspace_bytes(Q, G, 3, metric, "exact", None, None, None, "auto", None)
        assert 0 < needed <= ahead
        encoded = cuda.encode(G, metric)
        for precision in ("exact", "fast"):
            needed = module.cuda_topk_workspace_bytes(Q, G, 3, metric, precision, None, None, None, "auto", encoded)
            assert 0 < needed <= _torch_cuda.workspace_bytes(4, 30, 8, 3, Q.device, encoded=True) < ahead
