"""How work is divided must not show: folded batches, shared tiles, chunks, and the fast mode's thresholds."""

from __future__ import annotations

import numpy as np
import pytest
from oracles import METRICS

import pycm
from pycm import reference

RNG = np.random.default_rng(17)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_batch_that_shares_y_equals_its_members(metric: str, rows: int) -> None:
    """One tall matrix where x lies in one run, matrix by matrix where it does not."""
    whole = RNG.standard_normal((4, 6, rows, 24), dtype=np.float32)
    y = RNG.standard_normal((50, 24), dtype=np.float32)
    for x in (whole, whole[:, ::2], whole.transpose(1, 0, 2, 3), whole[:1], whole[..., ::-1, :]):
        got = pycm.similarity(x, y, metric)
        assert got.shape == (*x.shape[:-1], 50)
        want = np.stack([pycm.similarity(np.ascontiguousarray(m), y, metric) for m in x.reshape(-1, rows, 24)])
        np.testing.assert_allclose(got.reshape(want.shape), want, rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(got, reference.similarity(x, y, metric), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "m"), [(5000, 5), (9000, 40), (37, 3000), (2, 3000), (1, 7)])
def test_shares_of_tiles_and_columns_leave_no_gap(metric: str, n: int, m: int) -> None:
    x = RNG.standard_normal((n, 9), dtype=np.float32)
    y = RNG.standard_normal((m, 9), dtype=np.float32)
    pycm.set_num_threads(1)
    want = pycm.similarity(x, y, metric)
    np.testing.assert_allclose(want, reference.similarity(x, y, metric), rtol=1e-5, atol=1e-5)
    for threads in (2, 3, 8):
        pycm.set_num_threads(threads)
        assert pycm.similarity(x, y, metric).tobytes() == want.tobytes()


@pytest.mark.parametrize("scale", [1e-19, 1e-21, 1e-23])
def test_distances_of_rows_whose_squares_underflow(scale: float) -> None:
    x = (RNG.standard_normal((9, 8)) * scale).astype(np.float32)
    y = (RNG.standard_normal((40, 8)) * scale).astype(np.float32)
    np.testing.assert_allclose(
        pycm.similarity(x, y, "euclidean"), reference.similarity(x, y, "euclidean"), rtol=1e-5, atol=0
    )


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "dot"])
def test_fast_gives_the_same_bits_every_time(metric: str) -> None:
    """Rows so close that their distances collapse to few floats, while thresholds rise in any order."""
    base = RNG.standard_normal(16).astype(np.float32) * 100
    gallery = base + (RNG.standard_normal((20000, 16)) * 1e-4).astype(np.float32)
    queries = base + (RNG.standard_normal((64, 16)) * 1e-4).astype(np.float32)
    pycm.set_num_threads(1)
    scores, indices = pycm.topk(queries, gallery, 7, metric, precision="fast")
    for threads in (1, 2, 8):
        pycm.set_num_threads(threads)
        for _ in range(5):
            again = pycm.topk(queries, gallery, 7, metric, precision="fast")
            assert again.indices.tobytes() == indices.tobytes()
            assert again.scores.tobytes() == scores.tobytes()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("n", "m", "k"), [(700, 900, 200), (64, 5000, 1200), (300, 300, 300), (9, 4000, 1001)])
def test_long_lists_are_the_specification(n: int, m: int, k: int) -> None:
    """k near M: the fp64 scan and the screen with queries divided among threads."""
    queries = RNG.integers(-3, 4, (n, 6)).astype(np.float32)
    gallery = RNG.integers(-3, 4, (m, 6)).astype(np.float32)
    want = reference.topk(queries, gallery, k, "cosine")
    for threads in (1, 2, 5):
        pycm.set_num_threads(threads)
        got = pycm.topk(queries, gallery, k, "cosine")
        assert got.indices.tobytes() == want.indices.tobytes()
        assert got.scores.tobytes() == want.scores.tobytes()


def test_a_dtype_without_bytes_is_refused() -> None:
    nothing = np.empty((2, 2), np.dtype([]))
    with pytest.raises(TypeError, match="similarity: x must be float32"):
        pycm.similarity(nothing, nothing)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_out_takes_the_result(dtype: type) -> None:
    x, y = RNG.standard_normal((3, 5, 8)).astype(dtype), RNG.standard_normal((7, 8)).astype(dtype)
    want = pycm.similarity(x, y)
    out = np.full((3, 5, 7), np.nan, want.dtype)
    assert pycm.similarity(x, y, out=out) is out
    assert out.tobytes() == want.tobytes()
    torch = pytest.importorskip("torch")
    tensor = torch.full((3, 5, 7), torch.nan, dtype=torch.float64 if dtype == np.float64 else torch.float32)
    assert pycm.similarity(torch.from_numpy(x), torch.from_numpy(y), out=tensor) is tensor
    assert tensor.numpy().tobytes() == want.tobytes()


def test_out_that_cannot_take_the_result() -> None:
    x, y = np.ones((5, 8), np.float32), np.ones((7, 8), np.float32)
    frozen = np.empty((5, 7), np.float32)
    frozen.flags.writeable = False
    for out, error, words in (
        (np.empty((5, 6), np.float32), ValueError, r"out must have shape \[5, 7\], got \[5, 6\]"),
        (np.empty((5, 7)), TypeError, "out must be float32, got float64"),
        (np.empty((7, 5), np.float32).T, ValueError, "out must be contiguous"),
        (frozen, ValueError, "out must be writable"),
        ([[0.0]], TypeError, "out must be a torch tensor, a NumPy array"),
    ):
        with pytest.raises(error, match=words):
            pycm.similarity(x, y, out=out)  # type: ignore[type-var]
    square = np.ones((8, 8), np.float32)
    with pytest.raises(ValueError, match="out must not overlap x"):
        pycm.similarity(square, np.ones((8, 8), np.float32), out=square)
    torch = pytest.importorskip("torch")
    needs = torch.ones(5, 8, requires_grad=True)
    with pytest.raises(ValueError, match="out must be None where a gradient is wanted"):
        pycm.similarity(needs, torch.ones(7, 8), out=torch.empty(5, 7))
