"""Temporal pooling with 8-bit weights: the same rounding in NumPy, how far it is from fp32, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import temporal_cases as cases
from torch_cases import raises

import pycm

torch = pytest.importorskip("torch")

from pycm import _C  # noqa: E402

Array = npt.NDArray[Any]
LENGTHS = [7, 0, 3, 1, 7]


def rounded(rows: Array) -> Array:
    """Each row as multiples of a 127th of its largest value."""
    rows = rows.astype(np.float32)
    largest = np.abs(rows).max(-1, keepdims=True)
    factor = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    return np.rint(rows * factor).astype(np.float64) * (largest / np.float32(127))


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))  # type: ignore[no-any-return]


def one_step(cell: str, x: Array, h: Array, c: Array, weights: dict[str, Array]) -> Array:
    """The state after one step, from the equations, the products of states being those of rounded rows."""
    w = {name.removesuffix("_l0"): value for name, value in weights.items()}
    of_x = x @ w["weight_ih"].T + w["bias_ih"]
    of_h = rounded(h) @ rounded(w["weight_hh"]).T + w["bias_hh"]
    if cell == "gru":
        (r, z, n), (r_h, z_h, n_h) = np.split(of_x, 3, 1), np.split(of_h, 3, 1)
        update = sigmoid(z + z_h)
        return (1 - update) * np.tanh(n + sigmoid(r + r_h) * n_h) + update * h  # type: ignore[no-any-return]
    i, f, g, o = np.split(of_x + of_h, 4, 1)
    state = sigmoid(o) * np.tanh(sigmoid(f) * c + sigmoid(i) * np.tanh(g))
    return rounded(state) @ rounded(w["weight_hr"]).T if "weight_hr" in w else state


def tensors(arrays: dict[str, Array], dtype: Any = torch.float32) -> dict[str, Any]:
    return {name: torch.from_numpy(array).to(dtype) for name, array in arrays.items()}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("cell", "inputs", "units", "proj"), [("lstm", 37, 70, 0), ("lstm", 5, 33, 9), ("gru", 3, 34, 0)]
)
def test_one_step_is_that_of_rounded_rows(
    cell: Any, inputs: int, units: int, proj: int, dtype: str, level: str
) -> None:
    weights = tensors(cases.rnn_weights(cell, inputs, units, proj=proj), getattr(torch, dtype))
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((13, 1, inputs))).to(getattr(torch, dtype))
    h, c = (rng.uniform(-1, 1, (13, size)).astype(np.float32) for size in (proj or units, units))
    state = {"h0": torch.from_numpy(h)[None].to(x.dtype)}
    if cell == "lstm":
        state["c0"] = torch.from_numpy(c)[None].to(x.dtype)
    # The result is rounded to x's dtype; the final state is not finer.
    got = pycm.temporal_pool(x, 1, weights, cell, "last", int8_weights=True, **state).double().numpy()
    given = {name: w.double().numpy() for name, w in weights.items()}
    start = [s[0].double().numpy() for s in state.values()]
    want = one_step(cell, x[:, 0].double().numpy(), start[0], start[-1], given)
    atol = {"float32": 3e-6, "float16": 1e-3, "bfloat16": 4e-3}[dtype]
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)


@pytest.mark.parametrize("pool", ["mean", "max", "last", "attention", "gpo", "none"])
@pytest.mark.parametrize("cell", cases.CELLS)
def test_whole_networks_stay_close_to_fp32(cell: Any, pool: Any) -> None:
    torch.manual_seed(0)
    module = pycm.nn.TemporalPool(40, 64, cell, pool, num_layers=2, bidirectional=True).eval()
    x, lengths = torch.randn(5, 7, 40), torch.tensor(LENGTHS)
    with torch.no_grad():
        want = module(x, lengths)
        module.int8_weights = True
        got = module(x, lengths)
    assert "int8_weights=True" in repr(module)
    error = float((got - want).abs().max())
    assert 1e-6 < error < 0.01, error  # another result, and not far


def test_rows_threads_padding_and_forms_change_no_bit(threads: None) -> None:
    weights = tensors(cases.rnn_weights("lstm", 12, 40, bidirectional=True))
    parts = cases.sequences(LENGTHS, 12)
    x, starts = torch.from_numpy(cases.pad(parts)).float(), torch.from_numpy(cases.offsets(parts))
    ragged = torch.from_numpy(np.concatenate(parts)).float()

    def pool(x: Any, lengths: Any = None, **given: Any) -> Any:
        return pycm.temporal_pool(x, lengths, weights, "lstm", "mean", int8_weights=True, **given)

    want = pool(x, torch.tensor(LENGTHS))
    assert torch.equal(pool(ragged, cu_seqlens=starts), want)
    for row, length in enumerate(LENGTHS):
        assert torch.equal(pool(x[row : row + 1], length), want[row : row + 1])
    by_numpy = pycm.temporal_pool(
        x.numpy(), LENGTHS, {name: w.numpy() for name, w in weights.items()}, "lstm", int8_weights=True
    )
    np.testing.assert_array_equal(by_numpy, want.numpy())
    before = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(pool(x, torch.tensor(LENGTHS)), want)
    finally:
        torch.set_num_threads(before)


def test_what_is_not_finite_stays_in_its_row() -> None:
    weights = tensors(cases.rnn_weights("gru", 6, 9))
    x, h0 = torch.randn(5, 4, 6), torch.zeros(1, 5, 9)

    def pool(steps: int = 4) -> Any:
        return pycm.temporal_pool(x[:, :steps], steps, weights, "gru", h0=h0, int8_weights=True)

    want = pool()
    x[1, 2, 1] = torch.nan
    h0[0, 3, 5] = torch.inf
    got = pool()
    assert got.isnan().all(1).tolist() == [False, True, False, True, False]
    assert torch.equal(got[[0, 2, 4]], want[[0, 2, 4]])
    x[4] = x[0]
    h0[0, 4] = 1e-38  # whose reciprocal is infinite
    near = pool(1)
    torch.testing.assert_close(near[4], near[0], rtol=0, atol=1e-30)


def test_both_forms_of_the_weights_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bool] = []
    real = _C.TemporalCell

    def cell(*arguments: Any, int8: bool, **named: Any) -> Any:
        made.append(int8)
        return real(*arguments, int8=int8, **named)

    monkeypatch.setattr(_C, "TemporalCell", cell)
    weights = tensors(cases.rnn_weights("lstm", 6, 9))
    x, lengths = torch.randn(5, 7, 6), torch.tensor(LENGTHS)
    results = [[pycm.temporal_pool(x, lengths, weights, int8_weights=int8) for int8 in (False, True)] for _ in range(3)]
    assert made == [False, True]
    assert all(torch.equal(ours, first) for pair in results for ours, first in zip(pair, results[0], strict=True))
    weights["weight_hh_l0"].mul_(2)
    changed = pycm.temporal_pool(x, lengths, weights, int8_weights=True)
    assert made == [False, True, True]
    assert not torch.equal(changed, results[0][1])


def test_traces_and_autocast() -> None:
    torch._dynamo.reset()
    module = pycm.nn.TemporalPool.from_torch(
        torch.nn.GRU(6, 9, batch_first=True), "max", int8_weights=True
    ).requires_grad_(False)
    x, lengths = torch.randn(5, 7, 6), torch.tensor(LENGTHS)
    want = module(x, lengths)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x, lengths), want)
    with torch.autocast("cpu", torch.bfloat16):
        low = module(x, lengths)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), want, rtol=0, atol=0.02)


def test_words_are_read_as_their_vectors() -> None:
    weights, embedding = tensors(cases.rnn_weights("gru", 6, 9)), torch.randn(20, 6)
    ids = torch.randint(20, (5, 7))
    got = pycm.temporal_pool(ids, LENGTHS, weights, "gru", embedding=embedding, int8_weights=True)
    want = pycm.temporal_pool(embedding[ids], LENGTHS, weights, "gru", int8_weights=True)
    assert torch.equal(got, want)


def test_refused() -> None:
    arrays = cases.rnn_weights("lstm", 6, 9)
    weights = tensors(arrays)
    x = torch.randn(5, 7, 6)

    def call(x: Any, weights: Any = weights, **given: Any) -> Any:
        return lambda: pycm.temporal_pool(x, 7, weights, int8_weights=True, **given)

    gradient = ["temporal_pool: int8_weights has no gradient", "torch.no_grad()"]
    raises(ValueError, gradient, call(x.clone().requires_grad_()))
    raises(ValueError, gradient, call(x, {name: w.requires_grad_() for name, w in tensors(arrays).items()}))
    raises(ValueError, gradient, call(x, h0=torch.zeros(1, 5, 9, requires_grad=True)))
    embedding = torch.randn(20, 6, requires_grad=True)
    raises(ValueError, gradient, call(torch.zeros(5, 7, dtype=torch.int64), embedding=embedding))
    raises(
        TypeError,
        ["temporal_pool: int8_weights", "float32", "got float64"],
        call(x.double(), tensors(arrays, torch.float64)),
    )
    raises(TypeError, ["temporal_pool: int8_weights", "got float64"], call(x.double().numpy(), arrays))
    other = {name: w.to("meta") for name, w in weights.items()}
    raises(NotImplementedError, ["temporal_pool: int8_weights is for the CPU", "meta"], call(x.to("meta"), other))
    units = (1 << 17) + 1
    wide = (torch.zeros(4 * units, 1), torch.zeros(4 * units, 1), None, None, torch.zeros(1, units))
    raises(ValueError, ["int8 needs at most 131072", "131073"], lambda: _C.TemporalCell("lstm", *wide, int8=True))
