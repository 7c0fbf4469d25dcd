"""rank's CUDA kernels on the host executor: counts and scores bit for bit with pycm.reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pycm import reference
from simt.searches import METRICS, compressed, excluding, make_special, numpy_rows, rows


def check(
    cuda: Any,
    queries: torch.Tensor,
    gallery: torch.Tensor,
    positives: list[list[int]],
    metric: str,
    mask: torch.Tensor | None = None,
    exclude: list[list[int]] | None = None,
) -> None:
    greater, equal, scores = cuda.rank(
        queries, gallery, *compressed(positives), metric, mask, *excluding(exclude), "auto"
    )
    allowed = None if mask is None else mask.numpy()
    with np.errstate(all="ignore"):
        expected = reference.rank(numpy_rows(queries), numpy_rows(gallery), positives, metric, allowed, exclude)
    unknown = np.isnan(expected.scores)
    assert scores.numpy()[~unknown].tobytes() == expected.scores[~unknown].tobytes()
    assert np.isnan(scores.numpy()[unknown]).all()
    np.testing.assert_array_equal(greater.numpy(), np.where(unknown, 0, expected.greater))
    np.testing.assert_array_equal(equal.numpy(), np.where(unknown, 0, expected.equal))


@pytest.mark.parametrize("metric", METRICS)
def test_metrics(cuda: Any, metric: str) -> None:
    check(cuda, rows(0, 5, 40), rows(1, 600, 40), [[3], [599], [], [7, 100, 7], [0]], metric)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(cuda: Any, dtype: torch.dtype) -> None:
    check(cuda, rows(2, 3, 33, dtype), rows(3, 500, 33, dtype), [[1], [2, 3], [499]], "cosine")


@pytest.mark.parametrize(("n", "m", "dim"), [(1, 1, 1), (130, 300, 16), (257, 20, 3), (1, 2600, 129)])
def test_shapes(cuda: Any, n: int, m: int, dim: int) -> None:
    check(cuda, rows(4, n, dim), rows(5, m, dim), [[i % m] for i in range(n)], "dot")


@pytest.mark.parametrize("metric", ["dot", "euclidean"])
def test_ties(cuda: Any, metric: str) -> None:
    gallery = torch.randint(-1, 2, (700, 4), generator=torch.Generator().manual_seed(6)).float()
    check(cuda, gallery[:4].clone(), gallery, [[i, i + 50, 699] for i in range(4)], metric)


def test_more_doubtful_pairs_than_there_is_room_for(cuda: Any) -> None:
    gallery = rows(7, 1, 8).repeat(2400, 1)
    gallery[2300:] *= 2
    check(cuda, rows(8, 2, 8), gallery, [[5, 2350], list(range(2290, 2330))], "dot")


@pytest.mark.parametrize("metric", METRICS)
def test_special_rows(cuda: Any, metric: str) -> None:
    queries, gallery = rows(9, 8, 20), rows(10, 400, 20)
    make_special(queries, gallery)
    check(cuda, queries, gallery, [[i, 20 + i, 7] for i in range(8)], metric)


def test_masks_and_excludes(cuda: Any) -> None:
    queries, gallery = rows(11, 4, 16), rows(12, 640, 16)
    mask = torch.rand(4, 640, generator=torch.Generator().manual_seed(13)) < 0.5
    positives = [[3], [4, 5], [6], [639]]
    exclude = [[3, 10], [-1], [], list(range(600))]
    check(cuda, queries, gallery, positives, "dot", mask, exclude)
    check(cuda, queries, gallery, positives, "cosine", mask[0])
    check(cuda, queries, gallery, positives, "euclidean", exclude=exclude)


def test_no_positives(cuda: Any) -> None:
    check(cuda, rows(14, 2, 5), rows(15, 3, 5), [[], []], "dot")
