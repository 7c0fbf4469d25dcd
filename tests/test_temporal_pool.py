"""temporal_pool against its specification, and what must not change a result. NumPy arrays: the kernels alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import temporal_cases as cases
from temporal_cases import CELLS, cast, expected, offsets, pad, sequences
from tolerances import TEMPORAL

import pycm
from pycm.temporal import POOLS

LENGTHS = (4, 0, 6, 1, 3)
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-bias": {"bias": False},
    "both-directions": {"bidirectional": True},
    "layers": {"layers": 3, "bidirectional": True},
    "projection": {"layers": 2, "bidirectional": True, "proj": 3},
}


def options_of(pool: str, features: int) -> dict[str, Any]:
    rng = np.random.default_rng(3)
    return {
        "attention": rng.standard_normal(features) if pool == "attention" else None,
        "gpo": cases.gpo_weights() if pool == "gpo" else None,
    }


def run(x: Any, lengths: Any, weights: Any, cell: str, pool: str, **options: Any) -> tuple[Any, Any, Any]:
    pooled, state = pycm.temporal_pool(x, lengths, weights, cell, pool, return_state=True, **options)
    return pooled, *(state if cell == "lstm" else (state, None))


def same_bits(a: Any, b: Any) -> None:
    assert a.dtype == b.dtype
    assert a.tobytes() == b.tobytes()


# ---- the specification ----


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(("cell", "shape"), [(c, s) for c in CELLS for s in SHAPES if (c, s) != ("gru", "projection")])
def test_follows_the_specification(cell: str, shape: str, pool: str, level: str) -> None:
    kinds = SHAPES[shape]
    directions, state = 1 + kinds.get("bidirectional", False), kinds.get("proj", 7)
    weights, parts = cases.rnn_weights(cell, 5, 7, **kinds), sequences(LENGTHS, 5)
    rng = np.random.default_rng(4)
    count = directions * kinds.get("layers", 1)
    h0 = rng.standard_normal((count, len(parts), state))
    c0 = rng.standard_normal((count, len(parts), 7)) if cell == "lstm" else None
    for combine in ("concat", "average", "sum") if directions == 2 else ("concat",):
        features = state * (directions if combine == "concat" else 1)
        options = {"combine": combine, "h0": h0, "c0": c0, **options_of(pool, features)}
        want = expected(parts, weights, cell, pool, **options)
        for dtype in ("float64", "float32"):
            found = run(
                cast(np.concatenate(parts), dtype), None, cast(weights, dtype), cell, pool,
                cu_seqlens=offsets(parts), **cast(options, dtype),
            )  # fmt: skip
            for ours, theirs in zip(found, want, strict=True):
                if ours is not None:
                    assert ours.dtype == dtype
                    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TEMPORAL[dtype])


@pytest.mark.parametrize("pool", ["mean", "max", "attention", "gpo", "meanmax", "none"])
@pytest.mark.parametrize("head", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)])
def test_residual_and_norms(head: tuple[bool, ...], pool: str) -> None:
    names = ("residual", "normalize_states", "normalize")
    flags: dict[str, Any] = dict(zip(names, head, strict=True))
    parts = sequences(LENGTHS, 6)
    for combine, hidden in (("concat", 3), ("sum", 6)):
        weights = cases.rnn_weights("lstm", 6, hidden, bidirectional=True)
        options = {"combine": combine, **options_of(pool, 6), **flags}
        want = expected(parts, weights, "lstm", pool, **options)[0]
        found = pycm.temporal_pool(pad(parts), LENGTHS, weights, "lstm", pool, **options)
        if pool == "none":
            found = np.concatenate([row[:length] for row, length in zip(found, LENGTHS, strict=True)])
        np.testing.assert_allclose(found, want, rtol=0, atol=TEMPORAL["float64"])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("hidden", [1, 3, 8, 13, 16, 31, 65])
def test_hidden_sizes(cell: str, hidden: int, level: str) -> None:
    parts = sequences((9, 1, 5), 7)
    weights = cases.rnn_weights(cell, 7, hidden)
    for pool in ("last", "mean"):
        want = expected(parts, weights, cell, pool)[0]
        found = pycm.temporal_pool(
            cast(pad(parts), np.float32), (9, 1, 5), cast(weights, np.float32), cell, pool
        )  # fmt: skip
        np.testing.assert_allclose(found, want, rtol=0, atol=TEMPORAL["float32"])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("batch", "steps"), [(1, 1), (1, 128), (7, 127), (8, 2), (9, 129), (129, 2), (129, 3)])
def test_batches_and_steps(cell: str, batch: int, steps: int, level: str) -> None:
    lengths = 1 + np.random.default_rng(5).integers(0, steps, batch)
    lengths[0] = steps
    parts = sequences(lengths.tolist(), 3)
    weights = cases.rnn_weights(cell, 3, 10)
    want, h_n, c_n = expected(parts, weights, cell, "max")
    found = run(cast(pad(parts), np.float32), lengths, cast(weights, np.float32), cell, "max")
    for ours, theirs in zip(found, (want, h_n, c_n), strict=True):
        if ours is not None:
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=TEMPORAL["float32"])


@pytest.mark.parametrize("cell", CELLS)
def test_more_steps_than_16_bits_count(cell: str) -> None:
    """torch's packed sequences and some kernels end at 65,535."""
    steps = 70_000
    rng = np.random.default_rng(6)
    x = rng.standard_normal((steps, 2)).astype(np.float32)
    weights = cast(cases.rnn_weights(cell, 2, 4), np.float32)
    whole = pycm.temporal_pool(x, None, weights, cell, "mean")
    # Only the last steps reach the end: an LSTM of this size has forgotten what was before.
    late = x[-2000:].astype(np.float64)
    want = expected([late], cast(weights, np.float64), cell, "last")[0][0]
    np.testing.assert_allclose(
        pycm.temporal_pool(x, None, weights, cell, "last"), want, rtol=0, atol=TEMPORAL["float32"]
    )
    states = pycm.temporal_pool(x, None, weights, cell, "none")
    np.testing.assert_allclose(whole, states.mean(0, dtype=np.float64), rtol=0, atol=TEMPORAL["float32"])


@pytest.mark.parametrize("pool", pycm.temporal.STATE_POOLS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_pools_alone(pool: str, dtype: str, level: str) -> None:
    """Vectors that no cell made: with weights that are all zero, the residual alone is pooled."""
    parts = sequences((5, 0, 1, 9), 6)
    options = options_of(pool, 6)
    still = {name: 0 * w for name, w in cases.rnn_weights("lstm", 6, 6).items()}
    want = expected(parts, still, "lstm", pool, residual=True, **options)[0]
    options = cast(options, dtype)
    for x, given in (
        (pad(parts), {"lengths": (5, 0, 1, 9)}),
        (np.concatenate(parts), {"lengths": None, "cu_seqlens": offsets(parts)}),
    ):
        found = pycm.pool_states(cast(x, dtype), pool=pool, **given, **options)
        assert found.dtype == dtype
        np.testing.assert_allclose(found, want, rtol=0, atol=10 * TEMPORAL[dtype])
    single = pycm.pool_states(cast(parts[0], dtype), None, pool, **options)
    np.testing.assert_allclose(single, want[0], rtol=0, atol=10 * TEMPORAL[dtype])


def test_legacy_padding_runs_over_the_padding() -> None:
    parts = sequences((2, 5, 3), 4)
    x = pad(parts, fill=0.25)
    weights = cases.rnn_weights("gru", 4, 3, layers=2, bidirectional=True)
    states = expected(list(x), weights, "gru", "none")[0].reshape(3, 5, 6)
    for pool, one in (("mean", lambda s: s.mean(0)), ("max", lambda s: s.max(0))):
        want = np.stack([one(row[: len(part)]) for row, part in zip(states, parts, strict=True)])
        found = pycm.temporal_pool(x, (2, 5, 3), weights, "gru", pool, legacy_padding=True)
        np.testing.assert_allclose(found, want, rtol=0, atol=TEMPORAL["float64"])
    full = expected(list(x), weights, "gru", "last")[0]
    found = pycm.temporal_pool(x, (2, 5, 3), weights, "gru", "last", legacy_padding=True)
    np.testing.assert_allclose(found, full, rtol=0, atol=TEMPORAL["float64"])
    found = pycm.temporal_pool(x, (2, 5, 3), weights, "gru", "lastmean", legacy_padding=True)
    np.testing.assert_allclose(found[:, :6], full, rtol=0, atol=TEMPORAL["float64"])
    found = pycm.temporal_pool(x, (2, 5, 3), weights, "gru", "none", legacy_padding=True)
    np.testing.assert_allclose(found, states, rtol=0, atol=TEMPORAL["float64"])


# ---- what must not change a bit ----

BITS = pytest.mark.parametrize("pool", POOLS[:-1])


def fp32_case(
    cell: str, pool: str, lengths: tuple[int, ...] = (5, 9, 0, 2, 7, 9, 1, 3, 8)
) -> tuple[list[Any], Any, dict[str, Any]]:
    weights = cast(cases.rnn_weights(cell, 11, 13, layers=2, bidirectional=True), np.float32)
    return cast(sequences(lengths, 11), np.float32), weights, cast(options_of(pool, 26), np.float32)


@BITS
@pytest.mark.parametrize("cell", CELLS)
def test_form_padding_and_batch(cell: str, pool: str) -> None:
    parts, weights, options = fp32_case(cell, pool)
    lengths = [len(part) for part in parts]
    ragged = pycm.temporal_pool(
        np.concatenate(parts), None, weights, cell, pool, cu_seqlens=offsets(parts), **options
    )  # fmt: skip
    for x in (pad(parts).astype(np.float32), pad(parts, 14, fill=np.inf).astype(np.float32)):
        same_bits(pycm.temporal_pool(x, lengths, weights, cell, pool, **options), ragged)
        first = np.ascontiguousarray(x.swapaxes(0, 1))
        same_bits(pycm.temporal_pool(first, lengths, weights, cell, pool, batch_first=False, **options), ragged)
        strided = np.repeat(x, 2, axis=2)[:, :, ::2]
        same_bits(pycm.temporal_pool(strided, lengths, weights, cell, pool, **options), ragged)
    for row, part in enumerate(parts):  # alone, and beside one other
        same_bits(pycm.temporal_pool(part, None, weights, cell, pool, **options), ragged[row])
    pair = pycm.temporal_pool(
        np.concatenate([parts[6], parts[1]]), (1, 9), weights, cell, pool, **options
    )  # fmt: skip
    same_bits(pair, ragged[[6, 1]])
    order = np.random.default_rng(7).permutation(len(parts))
    shuffled = pycm.temporal_pool(
        pad([parts[i] for i in order]).astype(np.float32), [lengths[i] for i in order], weights, cell, pool, **options
    )  # fmt: skip
    same_bits(shuffled, ragged[order])
    assert not ragged[2].any()


@pytest.mark.parametrize("cell", CELLS)
def test_threads_and_runs(cell: str, threads: None) -> None:
    """Few rows and many, small states and large: the ways in which threads share the work."""
    for batch, hidden in ((1, 96), (3, 96), (64, 24)):
        lengths = np.random.default_rng(8).integers(0, 12, batch)
        lengths[0] = 12
        parts = cast(sequences(lengths.tolist(), 16), np.float32)
        weights = cast(cases.rnn_weights(cell, 16, hidden, bidirectional=True), np.float32)
        for pool in ("meanmax", "attention", "gpo"):
            options = cast(options_of(pool, 2 * hidden), np.float32)
            results = []
            for count in (1, 2, 3, 4, 4):
                pycm.set_num_threads(count)
                results.append(
                    pycm.temporal_pool(pad(parts).astype(np.float32), lengths, weights, cell, pool, **options)
                )
            for other in results[1:]:
                same_bits(other, results[0])


@pytest.mark.parametrize("pool", [pool for pool in POOLS if pool != "none"])
@pytest.mark.parametrize("cell", CELLS)
def test_reverse_is_the_flip_of_each_row(cell: str, pool: str) -> None:
    parts, weights, _ = fp32_case(cell, pool)
    one = {name: w for name, w in weights.items() if name.startswith(("weight_ih_l0", "weight_hh_l0", "bias"))}
    two = {name: w for name, w in one.items() if "l0" in name}
    forward = {name: w for name, w in two.items() if not name.endswith("_reverse")}
    backward = {name.removesuffix("_reverse"): w for name, w in two.items() if name.endswith("_reverse")}
    options = cast(options_of(pool, 13), np.float32)
    if pool == "attention":  # one softmax for both directions: compared where the other direction has no say
        wide = np.concatenate([np.zeros(13, np.float32), options["attention"]])
        both = pycm.temporal_pool(pad(parts).astype(np.float32), [*map(len, parts)], two, cell, pool, attention=wide)
        flipped = pycm.temporal_pool(np.concatenate([p[::-1] for p in parts]), [*map(len, parts)], backward, cell, pool,
                                     **options)  # fmt: skip
        np.testing.assert_allclose(both[:, 13:], flipped, rtol=0, atol=TEMPORAL["float32"])
        return
    both = pycm.temporal_pool(pad(parts).astype(np.float32), [*map(len, parts)], two, cell, pool, **options)
    straight = pycm.temporal_pool(np.concatenate(parts), [*map(len, parts)], forward, cell, pool, **options)
    turned = [part[::-1] for part in parts]
    flipped = pycm.temporal_pool(np.concatenate(turned), [*map(len, parts)], backward, cell, pool, **options)
    halves = [straight, flipped]
    if pool in ("meanmax", "lastmean"):
        halves = [straight[:, :13], flipped[:, :13], straight[:, 13:], flipped[:, 13:]]
    exact = pool in ("last", "first", "max", "lastmean", "meanmax", "mean")
    np.testing.assert_allclose(both, np.concatenate(halves, 1), rtol=0, atol=0 if exact else TEMPORAL["float32"])


def test_rows_of_length_zero_keep_their_state() -> None:
    weights = cases.rnn_weights("lstm", 4, 3, layers=2)
    h0, c0 = np.random.default_rng(9).standard_normal((2, 2, 2, 3))
    for x, lengths in ((np.full((2, 5, 4), np.nan), (0, 0)), (np.empty((0, 4)), (0, 0)), (np.empty((2, 0, 4)), (0, 0))):
        pooled, h_n, c_n = run(x, lengths, weights, "lstm", "meanmax", h0=h0, c0=c0)
        assert not pooled.any()
        assert pooled.shape == (2, 6)
        np.testing.assert_array_equal(h_n, h0)
        np.testing.assert_array_equal(c_n, c0)


@pytest.mark.parametrize("pool", POOLS)
def test_no_rows(pool: str) -> None:
    options = options_of(pool, 3)
    weights = cases.rnn_weights("gru", 4, 3)
    found, h_n, _ = run(np.empty((0, 5, 4)), np.zeros(0, int), weights, "gru", pool, **options)
    want = {"none": (0, 5, 3), "meanmax": (0, 6), "lastmean": (0, 6)}.get(pool, (0, 3))
    assert found.shape == want
    assert h_n.shape == (1, 0, 3)


@pytest.mark.parametrize("pool", [pool for pool in POOLS if pool not in ("first", "none")])
def test_nan_steps_are_not_hidden(pool: str) -> None:
    parts = sequences((4, 4), 3)
    parts[0][2] = np.nan
    weights = cases.rnn_weights("lstm", 3, 4)
    found = pycm.temporal_pool(pad(parts), (4, 4), weights, "lstm", pool, **options_of(pool, 4))
    assert np.isnan(found[0]).all()
    assert np.isfinite(found[1]).all()


@pytest.mark.parametrize("cell", CELLS)
def test_half_precision(cell: str) -> None:
    """States and sums are fp32: the result is that of the rounded inputs, rounded once."""
    parts, weights = sequences((6, 3), 8), cases.rnn_weights(cell, 8, 9)
    rounded = cast([*parts], np.float16)
    want = expected(cast(rounded, np.float64), cast(cast(weights, np.float16), np.float64), cell, "mean")[0]
    found = pycm.temporal_pool(pad(parts).astype(np.float16), (6, 3), cast(weights, np.float16), cell, "mean")
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, want, rtol=0, atol=2.0**-11)
