"""topk's CUDA kernels on the host executor: bit for bit with pycm.reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pycm import reference
from simt.searches import METRICS, excluding, make_special, numpy_rows, rows


def check(
    cuda: Any,
    queries: torch.Tensor,
    gallery: torch.Tensor,
    k: int,
    metric: str,
    mask: torch.Tensor | None = None,
    exclude: list[list[int]] | None = None,
) -> None:
    allowed = torch.ones(len(queries), len(gallery), dtype=torch.bool)
    if mask is not None:
        allowed &= mask
    for i, row in enumerate(exclude or []):
        allowed[i, [j for j in row if j >= 0]] = False
    scores, indices = cuda.topk(queries, gallery, k, metric, mask, *excluding(exclude), "exact", "auto")
    expected = reference.topk(numpy_rows(queries), numpy_rows(gallery), k, metric, allowed.numpy())
    np.testing.assert_array_equal(indices.numpy(), expected.indices)
    assert scores.numpy().tobytes() == expected.scores.tobytes()


@pytest.mark.parametrize("metric", METRICS)
def test_metrics(cuda: Any, metric: str) -> None:
    check(cuda, rows(0, 9, 40), rows(1, 700, 40), 5, metric)


@pytest.mark.parametrize(
    ("dtype", "metric"), [(torch.float16, "pearson"), (torch.bfloat16, "euclidean"), (torch.float64, "cosine")]
)
def test_dtypes(cuda: Any, dtype: torch.dtype, metric: str) -> None:
    check(cuda, rows(0, 3, 33, dtype), rows(1, 600, 33, dtype), 5, metric)


@pytest.mark.parametrize(
    ("n", "m", "dim", "k"),
    [
        (1, 1, 1, 1),
        (2, 257, 7, 257),  # k = M
        (1, 600, 65, 130),  # more room than rows
        (1, 2600, 129, 40),  # several phases, and runs of the gallery
        (130, 300, 16, 2),  # two tiles of queries: a cluster
        (257, 20, 3, 3),  # two batches
    ],
)
def test_shapes(cuda: Any, n: int, m: int, dim: int, k: int) -> None:
    check(cuda, rows(2, n, dim), rows(3, m, dim), k, "cosine")


@pytest.mark.parametrize("metric", ["dot", "sqeuclidean"])
def test_ties_go_to_the_lower_index(cuda: Any, metric: str) -> None:
    generator = torch.Generator().manual_seed(4)
    gallery = torch.randint(-1, 2, (900, 4), generator=generator).float()
    check(cuda, gallery[:5].clone(), gallery, 30, metric)


def test_duplicates_overflow_into_the_direct_path(cuda: Any) -> None:
    # All upper ends reach the threshold, and 1500 pairs are more than a query has room for.
    gallery = rows(5, 1, 8).repeat(1500, 1)
    gallery[700:] *= 2
    check(cuda, rows(6, 2, 8), gallery, 3, "dot")


def test_one_ulp_apart(cuda: Any) -> None:
    query = rows(7, 1, 24)
    gallery = query.repeat(500, 1)
    steps = torch.randint(-2, 3, gallery.shape, generator=torch.Generator().manual_seed(8), dtype=torch.int32)
    gallery = (gallery.view(torch.int32) + steps).view(torch.float32)
    for metric in ("cosine", "euclidean"):
        check(cuda, query, gallery, 7, metric)


@pytest.mark.parametrize("metric", ["dot", "cosine", "sqeuclidean"])
def test_nearer_than_fp16_can_tell(cuda: Any, metric: str) -> None:
    # 200 rows within fp16's rounding of each other, among others that are surely worse: the bound alone keeps the best.
    query = rows(24, 1, 48)
    gallery = torch.cat([query + 2.0**-12 * rows(25, 200, 48), 0.5 * rows(26, 1800, 48)])
    check(cuda, query, gallery[torch.randperm(2000, generator=torch.Generator().manual_seed(27))], 9, metric)


@pytest.mark.parametrize("descending", [False, True])
def test_sorted_gallery(cuda: Any, descending: bool) -> None:
    query, gallery = rows(9, 1, 16), rows(10, 3000, 16)
    order = (gallery @ query[0]).argsort(descending=descending)
    check(cuda, query, gallery[order].contiguous(), 10, "dot")


@pytest.mark.parametrize("metric", METRICS)
def test_special_rows(cuda: Any, metric: str) -> None:
    queries, gallery = rows(11, 8, 20), rows(12, 560, 20)
    make_special(queries, gallery)
    check(cuda, queries, gallery, 12, metric)


def test_rows_of_very_different_norms(cuda: Any) -> None:
    gallery = rows(13, 800, 32) * torch.logspace(-8, 8, 800)[:, None]
    for metric in ("dot", "euclidean"):
        check(cuda, rows(14, 4, 32), gallery, 9, metric)


def test_masks_and_excludes(cuda: Any) -> None:
    queries, gallery = rows(15, 4, 16), rows(16, 640, 16)
    mask = torch.rand(4, 640, generator=torch.Generator().manual_seed(17)) < 0.5
    mask[1] = False
    mask[2, 3:] = False
    best = [row.tolist() for row in (queries @ gallery.T).topk(6).indices]
    best[3] = [-1]
    check(cuda, queries, gallery, 10, "dot", mask, best)
    check(cuda, queries, gallery, 10, "dot", mask[0])
    check(cuda, queries, gallery, 10, "dot", exclude=best)


def test_strides(cuda: Any) -> None:
    check(cuda, rows(18, 12, 10).T[:, ::2], rows(19, 24, 560).T[::2, 3:9], 4, "cosine")


def test_no_queries(cuda: Any) -> None:
    check(cuda, rows(20, 0, 5), rows(21, 3, 5), 2, "dot")


@pytest.mark.parametrize("metric", METRICS)
def test_fast(cuda: Any, metric: str) -> None:
    queries, gallery = rows(22, 3, 64), rows(23, 700, 64)
    scores, indices = cuda.topk(queries, gallery, 5, metric, None, None, None, "fast", "auto")
    exact = torch.from_numpy(reference.similarity(queries.numpy(), gallery.numpy(), metric))
    lengths = 1 if metric in ("cosine", "pearson") else queries.norm(dim=1).max() * gallery.norm(dim=1).max()
    error = 2.0**-9 * float(lengths) * (4 if metric in reference.DISTANCES else 1)
    values = exact.gather(1, indices)
    assert float((values - scores).abs().max()) < error
    best = exact.topk(5, largest=metric not in reference.DISTANCES).values
    assert float((values - best).abs().max()) < 2 * error
    assert not torch.equal(values.float(), scores)  # nothing was verified
