"""Properties that hold for every input, over shapes, layouts, dtypes, metrics and masks that hypothesis chooses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import oracles
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import METRICS, assert_exact, assert_same

import pycm

CHECK = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))

VALUES = ("normal", "integers", "few rows", "wild", "special")
LAYOUTS = ("dense", "transposed", "reversed", "strided", "broadcast", "offset")


@dataclass
class Case:
    queries: np.ndarray
    gallery: np.ndarray
    k: int
    metric: str


def fill(rng: np.random.Generator, kind: str, shape: tuple[int, int]) -> np.ndarray:
    if kind == "integers":
        return rng.integers(-2, 3, shape).astype(float)
    values = rng.standard_normal(shape)
    if kind == "few rows":
        return values[rng.integers(0, min(3, shape[0]), shape[0])] if shape[0] else values
    if kind == "wild":
        return values * 10.0 ** rng.uniform(-30, 30, (shape[0], 1))
    if kind == "special":
        hard = np.array([0, -0.0, np.nan, np.inf, -np.inf, 1e-40, 3e38, 1, 1, 1])
        return np.where(rng.random(shape) < 0.02, rng.choice(hard, shape), values)
    return values


def lay_out(values: np.ndarray, layout: str) -> np.ndarray:
    """The same values in another layout ("broadcast" repeats the first row)."""
    if layout == "transposed":
        return np.asfortranarray(values)
    if layout == "reversed":
        return values[::-1, ::-1].copy()[::-1, ::-1]
    if layout == "strided":
        base = np.zeros((2 * values.shape[0], 3 * values.shape[1]), values.dtype)
        base[::2, 1::3] = values
        return base[::2, 1::3]
    if layout == "broadcast" and len(values):
        return np.broadcast_to(values[0], values.shape)
    if layout == "offset":
        base = np.zeros(values.size + 1, values.dtype)
        base[1:] = values.ravel()
        return base[1:].reshape(values.shape)
    return values


@st.composite
def cases(draw: st.DrawFn, special: bool = True) -> Case:
    edges = st.sampled_from([1, 2, 3, 4, 11, 12, 13, 31, 32, 33, 64, 65])
    n = draw(st.one_of(st.integers(1, 40), edges, st.just(0)))
    m = draw(st.one_of(st.integers(1, 300), edges))
    d = draw(st.one_of(st.integers(1, 40), edges, st.sampled_from([127, 128, 129, 513])))
    k = draw(st.one_of(st.integers(1, m), st.just(1), st.just(m), st.just(max(1, m // 4))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(VALUES if special else VALUES[:3]))
    dtype = draw(st.sampled_from(["float32", "float16", "float64"]))
    sides = []
    with np.errstate(all="ignore"):
        for rows in (n, m):
            values = fill(rng, kind, (rows, d)).astype(dtype)
            sides.append(lay_out(values, draw(st.sampled_from(LAYOUTS))))
    return Case(sides[0], sides[1], k, draw(st.sampled_from(METRICS)))


@CHECK
@given(cases(), st.booleans(), st.integers(0, 2**32 - 1), st.sampled_from([0.02, 0.5, 0.98]))
def test_topk_is_the_specification(case: Case, masked: bool, seed: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    shape = (len(case.queries), len(case.gallery))
    mask = rng.random(shape if seed % 2 else shape[1]) < density if masked else None
    got = pycm.topk(case.queries, case.gallery, case.k, case.metric, mask=mask)
    assert_exact(got, case.queries, case.gallery, case.k, case.metric, mask)


@CHECK
@given(cases(), st.integers(0, 2**32 - 1))
def test_batches_of_queries_do_not_matter(case: Case, seed: int) -> None:
    whole = pycm.topk(case.queries, case.gallery, case.k, case.metric)
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.integers(0, len(case.queries) + 1, 3))
    parts = [pycm.topk(part, case.gallery, case.k, case.metric) for part in np.split(case.queries, cuts) if len(part)]
    if parts:
        assert_same((np.concatenate([p.scores for p in parts]), np.concatenate([p.indices for p in parts])), whole)


@CHECK
@given(cases(), st.integers(0, 2**32 - 1))
def test_order_of_the_gallery_does_not_matter(case: Case, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(case.gallery))
    scores, indices = pycm.topk(case.queries, case.gallery, case.k, case.metric)
    again, moved = pycm.topk(case.queries, np.ascontiguousarray(case.gallery[order]), case.k, case.metric)
    assert again.tobytes() == scores.tobytes() or np.array_equal(again, scores)  # -0 and 0 are a tie
    back = np.where(moved >= 0, order[moved], -1)
    # Only ties at the same score may change places.
    for row in range(len(scores)):
        for score in np.unique(scores[row]):
            same = scores[row] == score
            if score != scores[row, -1]:
                assert set(back[row, same]) == set(indices[row, same])


@CHECK
@given(cases(), st.data())
def test_a_smaller_k_is_a_prefix(case: Case, data: st.DataObject) -> None:
    fewer = data.draw(st.integers(1, case.k))
    full = pycm.topk(case.queries, case.gallery, case.k, case.metric)
    part = pycm.topk(case.queries, case.gallery, fewer, case.metric)
    assert_same(part, (full.scores[:, :fewer].copy(), full.indices[:, :fewer].copy()))


@CHECK
@given(cases(), st.data())
def test_a_mask_is_a_smaller_gallery(case: Case, data: st.DataObject) -> None:
    """And excluding a match brings up the next one."""
    seed = data.draw(st.integers(0, 2**32 - 1))
    keep = np.random.default_rng(seed).random(len(case.gallery)) < 0.5
    if not keep.any():
        return
    k = min(case.k, int(keep.sum()))
    scores, indices = pycm.topk(case.queries, np.ascontiguousarray(case.gallery[keep]), k, case.metric)
    rows = np.flatnonzero(keep)
    want = scores, np.where(indices >= 0, rows[indices], -1)
    assert_same(pycm.topk(case.queries, case.gallery, k, case.metric, mask=keep), want)
    if case.k < 2 or not len(case.queries):
        return
    full = pycm.topk(case.queries, case.gallery, case.k, case.metric)
    without = pycm.topk(case.queries, case.gallery, case.k - 1, case.metric, exclude=full.indices[:, 0].copy())
    assert_same(without, (full.scores[:, 1:].copy(), full.indices[:, 1:].copy()))


@CHECK
@given(cases(special=False))
def test_similarity_is_near_the_truth(case: Case) -> None:
    got = pycm.similarity(case.queries, case.gallery, case.metric)
    want = oracles.truth(case.queries, case.gallery, case.metric)
    assert got.shape == want.shape
    dim = case.queries.shape[1]
    norms = [np.linalg.norm(side.astype(float), axis=1) for side in (case.queries, case.gallery)]
    scale = 1.0
    if case.metric == "dot":
        scale = norms[0][:, None] * norms[1]
    elif case.metric in oracles.DISTANCES:
        scale = (norms[0][:, None] + norms[1]) ** (1 if case.metric == "euclidean" else 2)
    error = np.abs(got - want)
    if case.metric == "pearson":  # nearly constant rows lose digits to their mean, whatever the order of operations
        spread = [
            np.abs(s - s.mean(1, keepdims=True)).max(1, initial=0)
            for s in (case.queries.astype(float), case.gallery.astype(float))
        ]
        error = error[np.ix_(*(np.asarray((s == 0) | (s > 1e-3)) for s in spread))]
    limit = (dim + 16) * np.finfo(got.dtype).eps * np.asarray(scale)
    assert (error <= np.broadcast_to(limit, got.shape)[: error.shape[0], : error.shape[1]]).all()


@CHECK
@given(cases())
def test_similarity_is_symmetric_in_its_arguments(case: Case) -> None:
    """Swapping the arguments transposes the result, up to rounding; NaN and infinity exactly."""
    one = pycm.similarity(case.queries, case.gallery, case.metric)
    other = pycm.similarity(case.gallery, case.queries, case.metric).T
    np.testing.assert_array_equal(np.isnan(one), np.isnan(other))


@CHECK
@given(cases(special=False), st.sampled_from([-3, 5]))
def test_powers_of_two_scale_exactly(case: Case, power: int) -> None:
    """Scaling the gallery by a power of two changes no order and no digit."""
    if case.gallery.dtype == np.float16:
        return
    factor = case.gallery.dtype.type(2.0**power)
    plain = pycm.topk(case.queries, case.gallery, case.k, case.metric)
    if case.metric in oracles.DISTANCES:
        scaled = pycm.topk(case.queries * factor, case.gallery * factor, case.k, case.metric)
        unit = factor if case.metric == "euclidean" else factor * factor
    else:
        scaled = pycm.topk(case.queries, case.gallery * factor, case.k, case.metric)
        unit = factor if case.metric == "dot" else type(factor)(1)
    assert_same(scaled, (plain.scores * unit, plain.indices))
