"""Few queries, and galleries encoded beforehand, on the host executor and the chip: bit for bit with pycm.reference."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from pycm import reference
from simt.searches import METRICS, make_special, numpy_rows, rows


def check(
    cuda: Any,
    queries: torch.Tensor,
    gallery: torch.Tensor,
    k: int,
    metric: str,
    mask: torch.Tensor | None = None,
    exclude: torch.Tensor | None = None,
    encoded: bool = True,
) -> None:
    """`exclude`: one index for each query."""
    allowed = torch.ones(len(queries), len(gallery), dtype=torch.bool)
    if mask is not None:
        allowed &= mask
    offsets = None
    if exclude is not None:
        offsets = torch.arange(len(queries) + 1)
        allowed[torch.arange(len(queries)), exclude] = False
    arguments = (mask, exclude, offsets, "exact", "auto", cuda.encode(gallery, metric) if encoded else None)
    scores, indices = cuda.topk(queries, gallery, k, metric, *arguments)
    with np.errstate(all="ignore"):
        expected = reference.topk(numpy_rows(queries), numpy_rows(gallery), k, metric, allowed.numpy())
    np.testing.assert_array_equal(indices.numpy(), expected.indices)
    assert scores.numpy().tobytes() == expected.scores.tobytes()


@pytest.mark.parametrize("n", [1, 2, 8, 9, 17, 63, 64, 65])
def test_few_queries(cuda: Any, n: int) -> None:
    metric = METRICS[n % len(METRICS)]
    check(cuda, rows(0, n, 33), rows(1, 330 if n > 9 else 700, 33), 5, metric, encoded=n % 2 == 0)


@pytest.mark.parametrize("metric", METRICS)
def test_metrics(cuda: Any, metric: str) -> None:
    gallery = rows(2, 600, 21)
    gallery[100:400:3] = gallery[7]  # ties
    check(cuda, gallery[5:9].clone(), gallery, 30, metric)


@pytest.mark.parametrize(
    ("m", "dim", "k"),
    [
        (1, 1, 1),
        (257, 7, 257),
        (2600, 129, 40),  # several phases
        (515, 700, 3),  # more steps than stages
    ],
)
def test_shapes(cuda: Any, m: int, dim: int, k: int) -> None:
    check(cuda, rows(3, 2, dim), rows(4, m, dim), k, "cosine")


def test_codes_beyond_shared_memory_take_the_other_screen(cuda: Any) -> None:
    check(cuda, rows(5, 40, 2000), rows(6, 90, 2000), 4, "dot")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(cuda: Any, dtype: torch.dtype) -> None:
    check(cuda, rows(7, 3, 33, dtype), rows(8, 300, 33, dtype), 5, "euclidean")


def test_masks_and_excludes(cuda: Any) -> None:
    queries, gallery = rows(9, 10, 16), rows(10, 640, 16)
    mask = torch.rand(10, 640, generator=torch.Generator().manual_seed(11)) < 0.5
    mask[1] = False
    mask[2, 3:] = False
    best = (queries @ gallery.T).argmax(1)
    check(cuda, queries, gallery, 10, "dot", mask, best)
    check(cuda, queries, gallery, 10, "dot", mask[0])


@pytest.mark.parametrize("n", [8, 70])
def test_special_rows(cuda: Any, n: int) -> None:
    queries, gallery = rows(12, n, 20), rows(13, 560, 20)
    make_special(queries, gallery)
    check(cuda, queries, gallery, 12, "euclidean" if n == 8 else "dot")


@pytest.mark.parametrize("k", [3, 150])
def test_the_direct_path_is_divided(cuda: Any, k: int) -> None:
    # 1700 equal rows overflow a query's room; parts of 512 rows each keep their own best.
    gallery = rows(14, 1, 8).repeat(1700, 1)
    gallery[5::400] *= 2
    gallery[1650:] = float("nan")
    mask = torch.ones(1700, dtype=torch.bool)
    mask[:3] = False
    check(cuda, rows(15, 2, 8), gallery, k, "dot", mask)


def test_more_direct_queries_than_parts(cuda: Any) -> None:
    # Beyond the screen's range all of them: each has one block, and no lists.
    check(cuda, rows(16, 20, 6) * 1e30, rows(17, 40, 6), 7, "euclidean")


def test_rank(cuda: Any) -> None:
    for n, metric in ((3, "cosine"), (65, "euclidean")):
        queries, gallery = rows(18, n, 24), rows(19, 300, 24)
        gallery[40:80] = gallery[3]
        positives = [[3, i, i + 100] for i in range(n)]
        offsets = torch.arange(0, 3 * n + 1, 3)
        flat = torch.tensor(positives).view(-1)
        encoded = cuda.encode(gallery, metric)
        mask = torch.rand(300, generator=torch.Generator().manual_seed(20)) < 0.8
        got = cuda.rank(queries, gallery, flat, offsets, metric, mask, None, None, "auto", encoded)
        expected = reference.rank(queries.numpy(), gallery.numpy(), positives, metric, mask.numpy())
        for part, other in zip(got, (expected.greater, expected.equal, expected.scores), strict=True):
            assert part.numpy().tobytes() == other.tobytes()


def test_fast(cuda: Any) -> None:
    queries, gallery = rows(21, 3, 64), rows(22, 600, 64)
    gallery[5] = float("inf")
    for metric in METRICS:
        plain = cuda.topk(queries, gallery, 9, metric, None, None, None, "fast", "auto")
        encoded = cuda.encode(gallery, metric)
        scores, indices = cuda.topk(queries, gallery, 9, metric, None, None, None, "fast", "auto", encoded)
        if metric in reference.DISTANCES:  # whose bias is raised by its own error, 16 half-ulps of its square
            assert torch.allclose(scores, plain[0], rtol=0, atol=2.0**-18 * float(gallery[6:].square().sum(1).max()))
        else:
            assert torch.equal(scores, plain[0])
            assert torch.equal(indices, plain[1])


def test_an_encoding_of_another_size_is_refused(cuda: Any, module: ModuleType, arch: str) -> None:
    if arch == "chip":
        pytest.skip("asked of the executor's module")
    gallery = rows(23, 30, 8)
    with pytest.raises(ValueError, match=r"topk: encoded must have shape \[\d+\], got \[7\]"):
        cuda.topk(gallery, gallery, 3, "dot", None, None, None, "exact", "auto", torch.zeros(7, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"encode: encoded must have shape \[\d+\], got \[7\]"):
        module.cuda_encode(gallery, "dot", torch.zeros(7, dtype=torch.uint8), 0)
    with pytest.raises(ValueError, match=r"encode: gallery must have shape \[M, D\]"):
        cuda.encode(gallery[:0], "dot")
