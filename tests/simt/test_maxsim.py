"""maxsim, its gradients and its top-k: kernels against fp64, NaN in the padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from simt.sets import Float64, Sets, padded, ragged

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
WAYS = [(r, d) for r in ("sum", "mean") for d in ("t2i", "i2t", "both")]
# Around the edges of groups (8), tiles (128 and 256) and a warp's lanes.
QUERIES, GALLERY = [3, 0, 33, 1, 93], [5, 0, 17, 8, 257, 1, 16]


def fixed_order_sum(terms: Float64) -> Float64:
    """The library's order: 32 lanes, then halves."""
    steps = -(-terms.shape[-1] // 32)
    filled = np.zeros((*terms.shape[:-1], steps * 32))
    filled[..., : terms.shape[-1]] = terms
    lanes = np.zeros((*terms.shape[:-1], 32))
    for step in range(steps):
        lanes = lanes + filled[..., 32 * step : 32 * step + 32]
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def similarities(x: Float64, y: Float64, metric: str) -> Float64:
    products = fixed_order_sum(x[:, None] * y[None])
    if metric == "dot":
        return products
    norms = np.sqrt(fixed_order_sum(x * x))[:, None] * np.sqrt(fixed_order_sum(y * y))[None]
    return np.where(norms == 0, 0.0, products / np.where(norms == 0, 1.0, norms))


def pair(x: Float64, y: Float64, metric: str, reduce: str, direction: str) -> tuple[float, float]:
    """The score, and the sum of the magnitudes that an error of it is relative to."""
    if not len(x) or not len(y):
        return 0.0, 0.0
    values, score, scale = similarities(x, y, metric), 0.0, 0.0
    lengths = [np.ones(len(part)) if metric == "cosine" else np.linalg.norm(part, axis=1) for part in (x, y)]
    for axis, way in ((1, "t2i"), (0, "i2t")):
        if direction in (way, "both"):
            best = values.max(axis=axis)
            part = len(best) if reduce == "mean" else 1
            score += float(fixed_order_sum(best)) / part
            scale += lengths[1 - axis].sum() * lengths[axis].max() / part
    return score, scale


def oracle(queries: Sets, gallery: Sets, metric: str, reduce: str, direction: str) -> tuple[Float64, Float64]:
    table = [[pair(x, y, metric, reduce, direction) for y in gallery.items] for x in queries.items]
    return np.array([[p[0] for p in row] for row in table]), np.array([[p[1] for p in row] for row in table])


def check(cuda_sets: Any, queries: Sets, gallery: Sets, metric: str, reduce: str, direction: str) -> None:
    scores = cuda_sets.maxsim(*queries.arguments, *gallery.arguments, metric, reduce, direction).numpy()
    expected, scale = oracle(queries, gallery, metric, reduce, direction)
    if scores.dtype == np.float64:  # the fixed order, hence every bit
        np.testing.assert_array_equal(scores, expected)
        return
    # Sums of D products and of the maxima in fp32, each rounding at most an ulp (a tensor core truncates).
    dim = queries.values.shape[-1]
    roundings = dim + max(map(len, queries.items + gallery.items)) / 32 + 16
    assert np.all(np.abs(scores - expected) <= roundings * 2.0**-24 * scale), np.abs(scores - expected).max()


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_dtypes(cuda_sets: Any, metric: str, dtype: torch.dtype) -> None:
    small = dtype == torch.float64  # one warp a product: slow here
    counts = ([3, 0, 33], [5, 0, 17, 8]) if small else (QUERIES, GALLERY)
    queries, gallery = ragged(0, counts[0], 40, dtype), padded(1, counts[1], 40, dtype)
    check(cuda_sets, queries, gallery, metric, "sum", "t2i")
    check(cuda_sets, queries, gallery, metric, "mean", "both")


@pytest.mark.parametrize(("reduce", "direction"), WAYS)
def test_ways(cuda_sets: Any, reduce: str, direction: str) -> None:
    queries, gallery = padded(2, [2, 9, 0], 24, torch.bfloat16), ragged(3, [1, 30, 0, 8], 24, torch.bfloat16)
    check(cuda_sets, queries, gallery, "cosine", reduce, direction)


@pytest.mark.parametrize("dim", [1, 7, 33, 64, 65, 136, 512, 520])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dims(cuda_sets: Any, dtype: torch.dtype, dim: int) -> None:
    check(cuda_sets, padded(4, [4, 2], dim, dtype), ragged(5, [9, 3, 70], dim, dtype), "dot", "sum", "t2i")


def test_many_items(cuda_sets: Any) -> None:
    """More items than a block walks over, and more query vectors than a block holds."""
    counts = [(7 * i) % 5 for i in range(300)]
    check(cuda_sets, ragged(6, [100, 60], 8, torch.float16), ragged(7, counts, 8, torch.float16), "dot", "sum", "both")


@pytest.mark.parametrize("dtype", FLOATS)
def test_strides(cuda_sets: Any, dtype: torch.dtype) -> None:
    """Rows that neither cp.async nor TMA can read, and items with gaps between them."""
    wide = padded(8, [20, 9, 4], 48, dtype)
    queries = Sets(wide.values[..., ::3], lengths=wide.lengths)
    gallery = Sets(padded(9, [40, 21, 33, 30], 32, dtype).values[1::2, :30, 8:24].nan_to_num(0.5))
    check(cuda_sets, queries, gallery, "cosine", "sum", "t2i")
    turned = Sets(padded(10, [6, 6, 6], 16, dtype).values.transpose(0, 1))
    check(cuda_sets, turned, gallery, "dot", "sum", "t2i")


@pytest.mark.parametrize("dtype", FLOATS)
def test_integers_are_exact(cuda_sets: Any, dtype: torch.dtype) -> None:
    queries, gallery = ragged(11, [9, 30], 72, dtype, integers=True), padded(12, [12, 40, 3], 72, dtype, integers=True)
    scores = cuda_sets.maxsim(*queries.arguments, *gallery.arguments, "dot", "sum", "both")
    np.testing.assert_array_equal(scores.numpy(), oracle(queries, gallery, "dot", "sum", "both")[0])


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_infinity(cuda_sets: Any, dtype: torch.dtype) -> None:
    """A NaN reaches every pair it is in and no other; an infinity is a score like any other."""
    queries, gallery = padded(13, [3, 4], 16, dtype), padded(14, [9, 2, 12, 20], 16, dtype)
    gallery.values[1, 1, 3] = torch.nan
    gallery.values[2, 5] = gallery.values[2, 6]
    gallery.values[2, 5, 0] = torch.inf
    queries.values[0, :3, 0] = 1.0
    queries.values[1, :4, 0] = torch.tensor([1.0, -1.0, 2.0, 0.5])
    scores = cuda_sets.maxsim(*queries.arguments, *gallery.arguments, "dot", "sum", "t2i").numpy()
    with np.errstate(invalid="ignore"):
        expected, _ = oracle(queries, gallery, "dot", "sum", "t2i")
    assert np.isnan(expected[:, 1]).all()
    assert np.isposinf(expected[:, 2]).all()
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_topk(cuda_sets: Any, precision: str, dtype: torch.dtype) -> None:
    for seed, (metric, (reduce, direction)) in enumerate(zip(("dot", "cosine") * 3, WAYS, strict=True)):
        queries = ragged(seed, [3, 0, 7], 40, dtype, integers=seed % 2 == 0)
        counts = [(5 * i) % 6 for i in range(20)]
        gallery = padded(seed + 50, counts, 40, dtype, integers=seed % 2 == 0)
        gallery.values[7, 0, 5] = torch.nan  # of 5 vectors
        table, _ = oracle(queries, gallery, metric, reduce, direction)
        if precision == "fast":
            table = cuda_sets.maxsim(*queries.arguments, *gallery.arguments, metric, reduce, direction).numpy()
        table = table.astype(np.float64 if dtype == torch.float64 else np.float32)
        for k in (5, 20):
            scores, indices = cuda_sets.maxsim_topk(
                *queries.arguments, *gallery.arguments, k, metric, reduce, direction, precision
            )
            order = np.argsort(np.where(np.isnan(table), np.inf, -table), axis=1, kind="stable")[:, :k]
            best = np.take_along_axis(table, order, axis=1)
            np.testing.assert_array_equal(indices.numpy(), np.where(np.isnan(best), -1, order))
            np.testing.assert_array_equal(scores.numpy(), np.where(np.isnan(best), -np.inf, best))


def test_topk_of_near_ties(cuda_sets: Any) -> None:
    """Items that differ by less than an error of the tensor cores: only the verification can order them."""
    queries, gallery = ragged(20, [4], 64, torch.float32), padded(21, [3] * 24, 64, torch.float32)
    # Two large terms that cancel: what is left is below the rounding of the sum while they are in it.
    gallery.values *= 0.01
    queries.values[:, 0] = queries.values[:, 63] = gallery.values[:, :, 0] = 300
    gallery.values[:, :, 63] = -300
    table = oracle(queries, gallery, "dot", "sum", "t2i")[0].astype(np.float32)
    scores, indices = cuda_sets.maxsim_topk(*queries.arguments, *gallery.arguments, 6, "dot", "sum", "t2i", "exact")
    np.testing.assert_array_equal(indices.numpy(), np.argsort(-table, axis=1, kind="stable")[:, :6])
    np.testing.assert_array_equal(scores.numpy(), -np.sort(-table, axis=1)[:, :6])


def expected_gradients(
    queries: Sets, gallery: Sets, grad: torch.Tensor, metric: str, reduce: str, direction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """By autograd in fp64 through the first of the largest."""
    leaves = [side.values.double().nan_to_num().requires_grad_() for side in (queries, gallery)]
    total = leaves[0].sum() * 0 + leaves[1].sum() * 0
    for i, x in enumerate(queries.parts(leaves[0])):
        for j, y in enumerate(gallery.parts(leaves[1])):
            if not len(x) or not len(y):
                continue
            values = similarities(x.detach().numpy(), y.detach().numpy(), metric)
            products = x @ y.T
            if metric == "cosine":
                products = products / (x.norm(dim=1)[:, None] * y.norm(dim=1))
            for axis, way in ((1, "t2i"), (0, "i2t")):
                if direction in (way, "both"):
                    chosen = torch.from_numpy(values.argmax(axis=axis)).unsqueeze(axis)
                    best = products.gather(axis, chosen)
                    total = total + grad[i, j].double() * (best.mean() if reduce == "mean" else best.sum())
    total.backward()
    return leaves[0].grad, leaves[1].grad


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_gradients(cuda_sets: Any, metric: str, dtype: torch.dtype) -> None:
    for seed, (reduce, direction) in enumerate(WAYS):
        integers = metric == "dot" and seed % 2 == 0  # ties
        dim = 300 if seed == 0 else 20
        queries = ragged(seed, [5, 0, 34, 1], dim, dtype, integers)
        gallery = padded(seed + 30, [7, 18, 0, 3], dim, dtype, integers)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        grad = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(wide)
        grad[0, 1] = 0
        found = cuda_sets.maxsim_backward(
            grad, *queries.arguments, *gallery.arguments, metric, reduce, direction, True, True
        )
        expected = expected_gradients(queries, gallery, grad, metric, reduce, direction)
        eps = torch.finfo(wide).eps
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == wide
            # Up to 4 x 34 terms in turn, on a scale of the largest entry.
            assert (ours.double() - theirs).abs().max() <= 64 * eps * theirs.abs().max()


def test_only_one_gradient(cuda_sets: Any) -> None:
    queries, gallery = ragged(1, [3, 2], 8, torch.float32), ragged(2, [4, 5], 8, torch.float32)
    call = (torch.ones(2, 2), *queries.arguments, *gallery.arguments, "dot", "sum", "both")
    both = cuda_sets.maxsim_backward(*call, True, True)
    assert torch.equal(cuda_sets.maxsim_backward(*call, True, False)[0], both[0])
    assert torch.equal(cuda_sets.maxsim_backward(*call, False, True)[1], both[1])


def test_gradient_of_zero_vectors(cuda_sets: Any) -> None:
    """Cosine with a zero vector is 0 wherever the other goes, and its own gradient is taken as 0."""
    queries, gallery = ragged(1, [2], 8, torch.float32), ragged(2, [3], 8, torch.float32)
    queries.values[1] = 0
    grads = cuda_sets.maxsim_backward(
        torch.ones(1, 1), *queries.arguments, *gallery.arguments, "cosine", "sum", "t2i", True, True
    )
    assert torch.isfinite(grads[1]).all()
    assert grads[0][0].abs().max() > 0
    assert not grads[0][1].any()


def test_same_bits_in_every_schedule(cuda_sets: Any, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, gallery = ragged(3, [40, 7], 24, torch.float16), ragged(4, [30, 1, 60], 24, torch.float16)
    grad = torch.randn(2, 3, generator=torch.Generator().manual_seed(5))
    results = []
    for seed in ("1", "2", "3"):
        monkeypatch.setenv("PYCM_SIMT_SEED", seed)
        scores = cuda_sets.maxsim(*queries.arguments, *gallery.arguments, "cosine", "mean", "both")
        grads = cuda_sets.maxsim_backward(
            grad, *queries.arguments, *gallery.arguments, "cosine", "mean", "both", True, True
        )
        results.append([part.numpy().tobytes() for part in (scores, *grads)])
    assert results[0] == results[1] == results[2]
