"""similarity's wgmma kernel, on the host executor as compute capability 9.0 and on the chip.

Which shapes and layouts it takes; tiles, stages, runs and batches; answers by the rule of tolerances.py. What it shares
with similarity.cu test_similarity.py covers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import assert_accurate, score_scale
from oracles import DISTANCES, METRICS, truth, widen

from pycm import reference
from simt.conftest import ARCHITECTURES

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(params=[arch for arch in ARCHITECTURES if arch != "80"])
def arch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "chip":
        if torch.cuda.get_device_capability(request.getfixturevalue("gpu")) != (9, 0):
            pytest.skip("not a Hopper GPU")
    else:
        monkeypatch.setenv("PYCM_SIMT_ARCH", request.param)
    return str(request.param)


@pytest.fixture
def ran(arch: str, request: pytest.FixtureRequest) -> Iterator[Callable[[bool], None]]:
    """`ran(True)` asserts that the products since the last call were this kernel's, `ran(False)` another's."""
    if arch == "chip":
        yield lambda ours: None
        return
    module: ModuleType = request.getfixturevalue("module")
    module.take_launches()

    def check(ours: bool) -> None:
        tiles = {name for name in module.take_launches() if name.endswith("tiles")}
        assert tiles == {"similarity: sm90 tiles" if ours else "similarity: tiles"}

    yield check


def rows(seed: int, *shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---- tiles and stages ----

# Around the edges of a warpgroup (64), a block's rows (192) and columns (128, a cluster's 256), a stage (64, or 32 of
# codes), a run of 16 stages; whole tiles and rests, more tiles than clusters, outputs with rows of odd length.
RAW = [(65, 65, 8), (193, 130, 64), (192, 256, 72), (70, 257, 328), (66, 65, 1096), (400, 300, 64), (129, 514, 136)]
CODED = [(256, 256, 17), (257, 300, 32), (256, 257, 97), (256, 256, 520), (400, 258, 33)]


@pytest.mark.parametrize("metric", ["dot", "cosine"])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_raw_rows(cuda: Any, ran: Callable[[bool], None], metric: str, dtype: torch.dtype) -> None:
    for n, m, d in RAW[metric == "dot" :: 2] if dtype == F16 else RAW:
        assert_accurate(cuda.similarity, rows(n, n, d, dtype=dtype), rows(n + 1, m, d, dtype=dtype), metric)
        ran(True)


@pytest.mark.parametrize(
    ("metric", "dtype", "shapes"),
    [
        ("dot", F32, CODED[1:3]),
        ("cosine", F32, CODED[2:]),
        ("pearson", BF16, CODED[:2]),
        ("euclidean", F32, CODED),
        ("sqeuclidean", F16, CODED[:2]),
    ],
)
def test_coded_rows(
    cuda: Any, ran: Callable[[bool], None], metric: str, dtype: torch.dtype, shapes: list[tuple[int, int, int]]
) -> None:
    for n, m, d in shapes:
        assert_accurate(cuda.similarity, rows(n, n, d, dtype=dtype) + 1, rows(n + 1, m, d, dtype=dtype) + 1, metric)
        ran(True)


def test_more_tiles_than_clusters(cuda: Any, ran: Callable[[bool], None]) -> None:
    """Tiles of one stage: the producer is as far ahead as the ring allows."""
    x, y = rows(1, 3 * 192 + 7, 8, dtype=BF16), rows(2, 3 * 256 + 2, 8, dtype=BF16)
    assert_accurate(cuda.similarity, x, y, "cosine")
    ran(True)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_one_sign(cuda: Any, ran: Callable[[bool], None], dtype: torch.dtype) -> None:
    for n, d in [(256, 64), (256, 776)] if dtype == F32 else [(66, 64), (66, 2056)]:
        assert_accurate(cuda.similarity, rows(1, n, d, dtype=dtype).abs(), rows(2, n, d, dtype=dtype).abs(), "dot")
        ran(True)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_integers_are_exact(cuda: Any, ran: Callable[[bool], None], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randint(-3, 4, (n, 72), generator=generator).to(dtype) for n in (257, 258))
    want = reference.similarity(widen(x), widen(y), "dot")
    np.testing.assert_array_equal(cuda.similarity(x, y, "dot").numpy(), want)
    ran(True)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_tf32_where_it_is_allowed(
    cuda: Any, ran: Callable[[bool], None], metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eleven bits an element: no fewer, and no more."""
    x, y = rows(5, 256, 100), rows(6, 300, 100)
    want, limit = truth(x, y, metric), score_scale(x, y, metric) * 2.0**-11
    full = np.abs(cuda.similarity(x, y, metric).numpy() - want).max()
    monkeypatch.setattr(cuda, "_allows_tf32", lambda: True)
    error = np.abs(cuda.similarity(x, y, metric).numpy() - want).max()
    assert 16 * full < error <= limit
    ran(True)


# ---- runs, batches, layouts ----


@pytest.mark.parametrize(("n", "m"), [(521, 523), (256, 1100)])
def test_runs_of_codes(cuda: Any, ran: Callable[[bool], None], n: int, m: int) -> None:
    """Each side in several runs; codes take no more memory than one run of each."""
    x, y = rows(1, n, 20), rows(2, m, 20)
    assert_accurate(cuda.similarity, x, y, "euclidean")
    ran(True)


def test_memory_of_codes(cuda: Any, module: ModuleType, arch: str) -> None:
    if arch == "chip":
        pytest.skip("runs are longer there")
    bytes_of = [module.cuda_similarity_workspace_bytes(rows(1, 640, 64), rows(2, m, 64), "dot") for m in (640, 6400)]
    assert bytes_of[1] - bytes_of[0] == 16 * (6400 - 640)  # the rows' numbers


@pytest.mark.parametrize(
    ("metric", "dtype", "x_shape", "y_shape"),
    [
        ("cosine", BF16, (3, 66, 16), (3, 70, 16)),
        ("cosine", F16, (2, 1, 66, 16), (1, 3, 70, 16)),
        ("dot", BF16, (2, 66, 16), (65, 16)),
        ("pearson", F32, (2, 256, 20), (2, 257, 20)),
        ("euclidean", F32, (2, 256, 20), (256, 20)),
        ("euclidean", BF16, (260, 20), (2, 256, 20)),
    ],
)
def test_batches(
    cuda: Any,
    ran: Callable[[bool], None],
    metric: str,
    dtype: torch.dtype,
    x_shape: tuple[int, ...],
    y_shape: tuple[int, ...],
) -> None:
    x, y = rows(3, *x_shape, dtype=dtype), rows(4, *y_shape, dtype=dtype)
    ours = assert_accurate(cuda.similarity, x, y, metric)
    ran(True)
    batch = np.broadcast_shapes(x_shape[:-2], y_shape[:-2])
    last = tuple(size - 1 for size in batch)
    alone = cuda.similarity(
        x.expand(*batch, *x_shape[-2:])[last].contiguous(), y.expand(*batch, *y_shape[-2:])[last].contiguous(), metric
    )
    assert torch.equal(ours[last], alone)


def test_layouts(cuda: Any, ran: Callable[[bool], None]) -> None:
    """What TMA can map this kernel reads in place: the bits of a copy. What it cannot goes to similarity.cu's."""
    base, y = rows(4, 3, 90, 96, dtype=BF16), rows(5, 80, 64, dtype=BF16)
    for view, ours in [
        (base[0, :70, :64], True),  # rows apart
        (base[0, :70, 8:72], True),  # a row begins at 16 bytes
        (base[:, :70, :64], True),  # matrices apart
        (base[::2, :70, :64], True),
        (base[:2].flip(0)[:, :70, :64], True),
        (base[0, :70, 1:65], False),
        (base[0, :64, :70].T, False),
        (base[0, 0, :64].expand(70, 64), False),
        (torch.as_strided(base, (2, 70, 64), (40, 96, 1)), False),  # matrices that do not begin at a row
        (base.flatten()[: 70 * 68].reshape(70, 68)[:, :64], False),
    ]:
        scores = cuda.similarity(view, y, "cosine")
        ran(ours)
        copied = cuda.similarity(view.contiguous(), y, "cosine")
        ran(True)
        if ours:
            assert torch.equal(scores, copied), view.stride()
        else:
            assert_accurate(cuda.similarity, view, y, "cosine")
            ran(False)


def test_small_matrices_go_elsewhere(cuda: Any, ran: Callable[[bool], None]) -> None:
    for n, m, d, dtype in [(64, 200, 64, BF16), (200, 64, 64, BF16), (255, 300, 20, F32), (70, 70, 64, F32)]:
        cuda.similarity(rows(1, n, d, dtype=dtype), rows(2, m, d, dtype=dtype), "cosine")
        ran(False)


# ---- pairs that are scored exactly ----


@pytest.mark.parametrize("metric", METRICS)
def test_hard_rows(cuda: Any, ran: Callable[[bool], None], metric: str) -> None:
    """Equal rows, zeros, NaN, infinities, norms at the ends of fp32, in rows of every warpgroup and both blocks."""
    x, y = rows(6, 256, 24), rows(7, 260, 24)
    y[3], y[70], y[140], y[259] = x[2], x[130], x[255], x[64]
    x[5], x[199] = 0, 3e38
    y[9, 1], y[137, 0], y[255], y[200, 23] = np.nan, np.inf, 1e-41, -np.inf
    got = cuda.similarity(x, y, metric).numpy()
    ran(True)
    with np.errstate(all="ignore"):
        want = reference.similarity(x.numpy(), y.numpy(), metric).astype(np.float32)
    limit = 1e-5 * (np.abs(want) if metric in DISTANCES else np.maximum(np.abs(want), 1))
    with np.errstate(invalid="ignore"):
        close = (got == want) | (np.isnan(got) & np.isnan(want)) | (np.abs(got - want) <= limit)
    assert close.all(), np.argwhere(~close)[:5]
    if metric in DISTANCES:
        assert [got[2, 3], got[130, 70], got[255, 140], got[64, 259]] == [0, 0, 0, 0]
