"""Temporal pooling: the recurrence and the pools against the specification, gradients against the CPU's in fp64.

`shared` leaves the executor so little shared memory that teams of several blocks, and matrices that are read from
global memory, come with sizes a test can afford.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import temporal_cases as cases
import torch
from temporal_cases import CELLS, GATES
from tolerances import GRADCHECK, TEMPORAL, TEMPORAL_GRADIENT, TEMPORAL_LOW_PRECISION_RATIO
from torch._subclasses import FakeTensorMode

import pycm
from pycm import _reference_temporal as specification
from pycm import _torch_temporal, _torch_temporal_cuda, _torch_temporal_runs, _torch_temporal_words  # noqa: F401
from pycm.temporal import POOLS, STATE_POOLS

HALVES = (torch.float16, torch.bfloat16)
CELL = pytest.mark.parametrize("cell", CELLS)
# What does not depend on the compute capability, which decides what a team is.
ANY_ARCH = pytest.mark.parametrize("arch", ["90", "chip"], indirect=True)


class Case:
    """One direction of one layer, in fp64, rounded to `dtype`; x is ragged, or padded with NaN."""

    def __init__(
        self, cell: str, pool: str, hidden: int, lengths: Any, dtype: Any = torch.float32, *,
        inputs: int = 6, reverse: bool = False, padded: bool = False, initial: bool = True, proj: int = 0,
        bias: bool = True, seed: int = 0,
    ) -> None:  # fmt: skip
        rng = np.random.default_rng(seed)
        state = proj or hidden
        work = torch.float64 if dtype == torch.float64 else torch.float32
        weights = cases.rnn_weights(cell, inputs, hidden, bias=bias, proj=proj, seed=seed)
        parts = cases.sequences(lengths, inputs, seed + 1)
        x = cases.pad(parts) if padded else np.concatenate(parts)
        rows = x.shape[0] * x.shape[1] if padded else x.shape[0]
        some = {"attention": rng.standard_normal(state), "gpo": rng.random(rows)}.get(pool)
        h0 = rng.standard_normal((len(parts), state)) if initial else None
        c0 = rng.standard_normal((len(parts), hidden)) if initial and cell == "lstm" else None

        def rounded(value: Any, to: Any = work) -> Any:
            return None if value is None else torch.from_numpy(value).to(to)

        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        self.weights = [rounded(weights.get(f"{kind}_l0"), dtype) for kind in kinds]
        self.x, self.starts = rounded(x, dtype), torch.from_numpy(cases.offsets(parts))
        self.others = [rounded(some), rounded(h0), rounded(c0)]
        self.cell, self.pool, self.reverse, self.hidden, self.state = cell, pool, reverse, hidden, state
        self.steps, self.padded, self.work = int(self.starts[-1]), padded, work

    @property
    def tensors(self) -> tuple[Any, ...]:
        return (self.x, self.starts, *self.weights, *self.others)

    @property
    def choices(self) -> tuple[str, str, bool]:
        return self.cell, self.pool, self.reverse

    def wide(self) -> tuple[Any, ...]:
        return tuple(t.double() if t is not None and t.is_floating_point() else t for t in self.tensors)

    def expected(self) -> tuple[Any, Any, Any, Any]:
        """The specification's answer, row by row."""
        x, starts, *weights, pool_weights, h0, c0 = (None if t is None else t.numpy() for t in self.wide())
        zeros = np.zeros(GATES[self.cell] * self.hidden)
        biases = (zeros if bias is None else bias for bias in weights[2:4])
        w = specification.Direction(*weights[:2], *biases, weights[4])
        pooled, states, h_n, c_n = [], [], [], []
        for b, (begin, end) in enumerate(itertools.pairwise(starts)):
            row = x[b, : end - begin] if self.padded else x[begin:end]
            h = np.zeros(self.state) if h0 is None else h0[b]
            c = np.zeros(self.hidden) if c0 is None else c0[b]
            found, h, c = specification.run(row, h, c, w, self.cell, self.reverse)
            states.append(found), h_n.append(h), c_n.append(c)
            pooled.append(self.pool_of(found, pool_weights, begin))
        some = np.zeros(0) if self.pool == "none" else np.stack(pooled)
        return some, np.concatenate(states), np.stack(h_n), np.stack(c_n) if self.cell == "lstm" else np.zeros(0)

    def pool_of(self, states: Any, weights: Any, begin: int) -> Any:
        if self.pool in ("meanmax", "lastmean") and not len(states):
            return np.zeros(2 * self.state)
        if not len(states):
            return np.zeros(self.state)
        order = states[::-1] if self.reverse else states
        mean, most = states.mean(0), states.max(0)
        return {
            "last": lambda: order[-1],
            "first": lambda: order[0],
            "mean": lambda: mean,
            "max": lambda: most,
            "meanmax": lambda: np.concatenate([mean, most]),
            "lastmean": lambda: np.concatenate([order[-1], mean]),
            "attention": lambda: specification.attention(states, weights),
            "gpo": lambda: weights[begin : begin + len(states)] @ -np.sort(-states, axis=0),
            "none": lambda: None,
        }[self.pool]()

    def run(self, temporal: Any, keep_states: bool = True) -> Any:
        return temporal.temporal_pool(*self.tensors, *self.choices, keep_states, keep_states)[:4]

    def check(self, temporal: Any, tolerance: float | None = None) -> None:
        tolerance = TEMPORAL[str(self.work).removeprefix("torch.")] if tolerance is None else tolerance
        for name, found, want in zip(
            ("pooled", "states", "h_n", "c_n"), self.run(temporal), self.expected(), strict=True
        ):
            found = found[: self.steps] if name == "states" else found
            assert found.dtype == self.work
            np.testing.assert_allclose(found.double().numpy(), want, rtol=0, atol=tolerance, err_msg=name)

    def check_gradients(self, temporal: Any, tolerance: float = TEMPORAL_GRADIENT) -> None:
        """Against the CPU's in fp64, from the gradients of all results."""
        *outputs, reserve = torch.ops.pycm.temporal_pool(*self.wide(), *self.choices, True, True)
        generator = torch.Generator().manual_seed(7)
        grads = [None if not out.numel() else torch.randn(out.shape, generator=generator).double() for out in outputs]
        needs = [self.tensors[i] is not None for i in (0, 2, 3, 4, 5, 6, 8, 9, 7)]
        want = torch.ops.pycm.temporal_pool_backward(*self.wide(), outputs[1], reserve, *grads, *self.choices, needs)
        grads = [None if grad is None else grad.to(self.work) for grad in grads]
        _, states, *_, memory = temporal.temporal_pool(*self.tensors, *self.choices, True, True)
        found = temporal.temporal_pool_backward(*self.tensors, states, memory, *grads, *self.choices, needs)
        names = ("x", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr", "h0", "c0", "pool_weights")
        for name, ours, theirs, needed in zip(names, found, want, needs, strict=True):
            if not needed:
                continue
            if name == "pool_weights" and self.pool == "gpo":
                ours, theirs = ours[: self.steps], theirs[: self.steps]
            error = (ours.double() - theirs).abs().max() / theirs.abs().max().clamp(min=1e-3)
            assert error <= tolerance, (name, error)


def integers(case: Case) -> Case:
    """With inputs and weights whose products are exact, in any order."""
    case.x, case.weights[0] = case.x.mul(4).round(), case.weights[0].mul(64).round() / 64
    case.weights[2] = case.weights[2].mul(64).round() / 64
    case.weights[3] = case.weights[3].mul(64).round() / 64 if case.cell == "lstm" else case.weights[3] * 0
    return case


def shared(monkeypatch: pytest.MonkeyPatch, size: int | None) -> None:
    if size is not None:
        monkeypatch.setenv("PYCM_SIMT_SHARED", str(size))


# ---- the specification ----


@ANY_ARCH
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("pool", POOLS)
@CELL
def test_follows_the_specification(temporal: Any, cell: str, pool: str, reverse: bool) -> None:
    for padded in (False, True):
        case = Case(cell, pool, 13, reverse=reverse, padded=padded, lengths=(3, 0, 33 if pool == "mean" else 5, 1))
        case.check(temporal)
        case.check_gradients(temporal)


@pytest.mark.parametrize("size", [None, 9000, 1500], ids=["resident", "teams", "global"])
@CELL
def test_of_many_sizes(temporal: Any, monkeypatch: pytest.MonkeyPatch, cell: str, size: int | None) -> None:
    shared(monkeypatch, size)
    for hidden, lengths, pool in (
        (1, (1,), "last"),
        (15, (2,) * 7, "mean"),
        (16, (1, 2, 5, 2, 1, 0, 5, 3), "max"),
        (33, (5,) * 8 + (2,), "meanmax"),
        (70, (9,), "lastmean"),
        (50, tuple(range(4)) * 11, "first"),  # more rows than teams of eight
    ):
        case = Case(cell, pool, hidden, lengths, reverse=hidden % 2 == 0, initial=hidden != 33)
        case.check(temporal)
        case.check_gradients(temporal)


@ANY_ARCH
@pytest.mark.parametrize("size", [None, 3000], ids=["resident", "global"])
def test_with_a_projection(temporal: Any, monkeypatch: pytest.MonkeyPatch, size: int | None) -> None:
    shared(monkeypatch, size)
    for pool, hidden, proj in (("meanmax", 20, 7), ("lastmean", 9, 5), ("first", 40, 33)):
        case = Case("lstm", pool, hidden, proj=proj, padded=True, reverse=True, lengths=(3, 0, 6, 1, 1, 2, 2, 4, 6))
        case.check(temporal)
        case.check_gradients(temporal)


@ANY_ARCH
@CELL
def test_without_biases_and_initial_states(temporal: Any, cell: str) -> None:
    case = Case(cell, "mean", 12, bias=False, initial=False, lengths=(3, 6))
    case.check(temporal)
    case.check_gradients(temporal)


@ANY_ARCH
@pytest.mark.parametrize("size", [None, 6000], ids=["resident", "teams"])
@CELL
def test_in_double_precision(temporal: Any, monkeypatch: pytest.MonkeyPatch, cell: str, size: int | None) -> None:
    shared(monkeypatch, size)
    case = Case(cell, "attention", 21, (4, 0, 6), torch.float64)
    case.check(temporal)
    case.check_gradients(temporal, 1e-11)


@pytest.mark.parametrize("dtype", HALVES, ids=["float16", "bfloat16"])
@pytest.mark.parametrize("size", [None, 9000], ids=["resident", "teams"])
@pytest.mark.parametrize("pool", ["none", "first", "lastmean"])
@CELL
def test_in_low_precision(
    temporal: Any, monkeypatch: pytest.MonkeyPatch, cell: str, pool: str, dtype: Any, size: int | None
) -> None:
    """Errors against fp64 beside those of torch's own cell in this dtype; for a linear pool states are in it, too."""
    shared(monkeypatch, size)
    short_runs(monkeypatch)
    case = Case(cell, pool, 60, (12, 3, 7, 7, 1, 2, 12, 5, 4), dtype, initial=False)
    width = {"none": 0, "first": 60, "lastmean": 120}[pool]
    pooled = torch.randn(9, width, generator=torch.Generator().manual_seed(2))
    grad = of_steps(case, pooled) if width else torch.randn(case.steps, 60, generator=torch.Generator().manual_seed(3))
    needs = [True] * 5 + [False] * 4
    _, states, *_, memory = temporal.temporal_pool(*case.tensors, *case.choices, True, True)
    assert states.dtype == (dtype if width else torch.float32)
    incoming = (pooled, None) if width else (None, grad)
    gradients = temporal.temporal_pool_backward(
        *case.tensors, states, memory, *incoming, None, None, *case.choices, needs
    )
    assert gradients[0].dtype == dtype
    ours = (states[: case.steps], *gradients[:5])
    for mine, theirs, want in zip(ours, torchs(case, grad, dtype), torchs(case, grad, torch.float64), strict=True):
        errors = [(found.double() - want).norm() for found in (mine, theirs)]
        assert errors[0] <= TEMPORAL_LOW_PRECISION_RATIO * errors[1]


def of_steps(case: Case, grad: torch.Tensor) -> torch.Tensor:
    """What the gradient of pooled states is of the states."""
    states = torch.zeros(case.steps, case.state, requires_grad=True)
    rows = states.tensor_split(case.starts[1:-1])
    pooled = [row[0] if case.pool == "first" else torch.cat([row[-1], row.mean(0)]) for row in rows]
    return torch.autograd.grad(torch.stack(pooled), states, grad)[0]


def torchs(case: Case, grad: torch.Tensor, dtype: Any) -> list[torch.Tensor]:
    """States and gradients of torch's cell, each row on its own."""
    rnn = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[case.cell](case.x.shape[1], case.hidden).to(dtype)
    with torch.no_grad():
        for parameter, value in zip(rnn.parameters(), case.weights, strict=False):
            parameter.copy_(value)
    x = case.x.to(dtype).requires_grad_()
    states = torch.cat([rnn(row)[0] for row in x.tensor_split(case.starts[1:-1])])
    return [states.detach(), *torch.autograd.grad(states, [x, *rnn.parameters()], grad.to(dtype))]


@pytest.mark.parametrize("size", [None, 20000], ids=["resident", "teams"])
@CELL
def test_tensor_cores_that_truncate(
    temporal: Any, monkeypatch: pytest.MonkeyPatch, cell: str, size: int | None, arch: str
) -> None:
    monkeypatch.setenv("PYCM_SIMT_MMA", "truncate")
    shared(monkeypatch, size)
    case = Case(cell, "lastmean", 130, (4, 2))
    case.check(temporal)
    case.check_gradients(temporal)


# ---- the same bits ----


@CELL
def test_a_row_has_the_same_bits_whatever_is_beside_it(
    temporal: Any, monkeypatch: pytest.MonkeyPatch, cell: str, arch: str
) -> None:
    """Alone or in a batch, in one block or a team, from shared or from global memory, under any schedule."""
    case = integers(Case(cell, "meanmax", 50, (6, 0, 3, 6, 1, 5, 2, 6, 4, 4) * 4, initial=False, inputs=2))
    pooled = case.run(temporal)[0]
    for seed, size in ((1, None), (2, 9000), (3, 30000), (4, 2000)):
        monkeypatch.setenv("PYCM_SIMT_SEED", str(seed))
        shared(monkeypatch, size)
        assert torch.equal(case.run(temporal, keep_states=False)[0], pooled)
    monkeypatch.delenv("PYCM_SIMT_SHARED")
    for b in (0, 3, 9):
        begin, end = case.starts[b : b + 2].tolist()
        arguments = (case.x[begin:end], torch.tensor([0, end - begin]), *case.weights, None, None, None, *case.choices)
        assert torch.equal(temporal.temporal_pool(*arguments, False, False)[0][0], pooled[b])


# ---- runs of steps ----


@pytest.mark.parametrize("size", [None, 7000], ids=["resident", "teams"])
@CELL
def test_in_runs(temporal: Any, monkeypatch: pytest.MonkeyPatch, cell: str, size: int | None) -> None:
    """Products of a part of the steps at a time, each run going on where the one before has ended."""
    short_runs(monkeypatch)
    shared(monkeypatch, size)
    for pool, options in (
        ("meanmax", {"padded": True}),
        ("lastmean", {"reverse": True}),
        ("attention", {"reverse": True, "padded": True, "initial": False}),
        ("max", {"bias": False, "proj": 7 if cell == "lstm" else 0}),
        ("none", {"lengths": (40,), "padded": True}),
    ):
        case = Case(cell, pool, 20, **{"lengths": (9, 0, 41, 1, 41, 17, 9)} | options)
        batch = len(case.starts) - 1
        division = _torch_temporal_runs.training_runs(case.x, batch, cell, case.weights[1])
        assert division.rows == 8 * batch
        assert division.runs > 1
        case.check(temporal)
        case.check_gradients(temporal)


def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight steps of every row."""
    for name in ("_RUN_BYTES", "_TRAINING_RUN_BYTES"):
        monkeypatch.setattr(_torch_temporal_runs, name, 1)


@CELL
def test_runs_change_no_bit(temporal: Any, monkeypatch: pytest.MonkeyPatch, cell: str) -> None:
    case = integers(Case(cell, "meanmax", 30, (41, 0, 9, 41, 1, 17, 9), inputs=2, reverse=True))
    whole = case.run(temporal)
    short_runs(monkeypatch)
    for a, b in zip(whole, case.run(temporal), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("arch", ["90"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@CELL
def test_results_have_the_shapes_and_dtypes_that_are_traced(
    temporal: Any, monkeypatch: pytest.MonkeyPatch, cell: str, dtype: Any
) -> None:
    def kinds(results: Any) -> list[Any]:
        return [(list(part.shape), part.dtype) for part in results]

    short_runs(monkeypatch)
    for pool, padded, keep in itertools.product(("last", "max"), (False, True), (False, True)):
        case = Case(cell, pool, 5, (20, 3), dtype, padded=padded)
        results = temporal.temporal_pool(*case.tensors, *case.choices, keep, keep)
        needs = [case.tensors[i] is not None for i in (0, 2, 3, 4, 5, 6, 8, 9, 7)]
        grads = (torch.ones_like(results[0]), None, None, None)
        with FakeTensorMode():
            fakes, fake_grads = (
                [None if t is None else torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in part]
                for part in (case.tensors, grads)
            )
            traced = torch.ops.pycm.temporal_pool(*fakes, *case.choices, keep, keep)
            back = (*fakes, traced[1], traced[4], *fake_grads, *case.choices, needs)
            traced_back = torch.ops.pycm.temporal_pool_backward(*back)
        assert kinds(traced) == kinds(results)
        if keep:
            back = (*case.tensors, results[1], results[4], *grads, *case.choices, needs)
            assert kinds(traced_back) == kinds(temporal.temporal_pool_backward(*back))


# ---- words ----


@ANY_ARCH
@pytest.mark.parametrize("words", [9, 50], ids=["table", "vectors"])
@CELL
def test_words(functions: Any, cell: str, words: int) -> None:
    """Steps that read rows of a table, or vectors where there are more of these than steps."""
    operators = functions(_torch_temporal_words)
    for padded, reverse in ((False, True), (True, False)):
        case = Case(cell, "lastmean", 13, (5, 0, 7, 1), padded=padded, reverse=reverse)
        ids = torch.randint(0, 9, case.x.shape[:-1], generator=torch.Generator().manual_seed(words))
        embedding = torch.randn(words, 6, generator=torch.Generator().manual_seed(3))
        case.x = embedding[ids]
        arguments = (case.starts, *case.weights, *case.others, *case.choices, True)
        found = operators.temporal_pool_words_cuda(ids, embedding, *arguments)
        for ours, want in zip(found, case.expected(), strict=True):
            np.testing.assert_allclose(ours[: len(want)].numpy(), want, rtol=0, atol=TEMPORAL["float32"])


# ---- pools alone ----


@ANY_ARCH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("pool", STATE_POOLS)
def test_pool_states(temporal: Any, pool: str, dtype: Any) -> None:
    rng, lengths, dim = np.random.default_rng(0), (3, 0, 40, 1, 9), 131
    starts = torch.from_numpy(np.cumsum([0, *lengths]))
    x = torch.from_numpy(rng.standard_normal((int(starts[-1]) + 2, dim)).round(1)).to(dtype)  # with ties
    x[-2:] = torch.nan
    some = {"attention": rng.standard_normal(dim) / 4, "gpo": rng.random(len(x))}.get(pool)
    weights = None if some is None else torch.from_numpy(some).to(dtype)
    valid = int(starts[-1])
    wide = (
        x[:valid].double(),
        starts,
        None if weights is None else weights[: valid if pool == "gpo" else dim].double(),
    )
    want = torch.ops.pycm.pool_states(*wide, pool)
    found = temporal.pool_states(x, starts, weights, pool)
    tolerance = TEMPORAL[str(dtype).removeprefix("torch.")] * 10  # of values up to 4
    torch.testing.assert_close(found.double(), want, rtol=0, atol=tolerance)
    grad = torch.from_numpy(rng.standard_normal(want.shape)).to(dtype)
    for needs in ([True, weights is not None], [weights is None, weights is not None]):
        theirs = torch.ops.pycm.pool_states_backward(*wide, grad.double(), pool, needs)
        ours = temporal.pool_states_backward(x, starts, weights, grad, pool, needs)
        for a, b, needed in zip(ours, theirs, needs, strict=True):
            if needed:
                torch.testing.assert_close(a[: len(b)].double(), b, rtol=0, atol=tolerance * 10)
        if needs[0]:
            assert not ours[0][valid:].any()


@ANY_ARCH
def test_nan_and_infinity_are_ordered_as_on_the_cpu(temporal: Any) -> None:
    starts = torch.tensor([0, 4, 9])
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    x[2, 0], x[1, 1], x[5, 2], x[7, 2], x[6, 3] = torch.nan, torch.inf, torch.nan, torch.nan, -torch.inf
    grad = torch.ones(2, 5)
    for pool in ("max", "mean"):
        arguments = (x, starts, None)
        torch.testing.assert_close(
            temporal.pool_states(*arguments, pool), torch.ops.pycm.pool_states(*arguments, pool), equal_nan=True
        )
        ours, theirs = (
            backward(*arguments, grad, pool, [True, False])[0]
            for backward in (temporal.pool_states_backward, torch.ops.pycm.pool_states_backward)
        )
        torch.testing.assert_close(ours, theirs)


@ANY_ARCH
def test_nan_ranks_first_and_by_time(temporal: Any) -> None:
    """Each value's gradient is the weight of its rank, to the bit, in rows longer than what is ranked at a time."""
    draw = torch.Generator().manual_seed(0)
    starts, count = torch.tensor([0, 8, 29, 53]), 53
    x = torch.randint(-3, 4, (count, 6), generator=draw).float()
    x[torch.rand(x.shape, generator=draw) < 0.3] = torch.nan
    x[::5] *= -torch.inf  # NaN where it was 0
    weights = torch.randn(count, generator=draw)
    both = (torch.ones(3, 6), "gpo", [True, True])
    ours, theirs = (
        backward(x, starts, weights, *both)
        for backward in (temporal.pool_states_backward, torch.ops.pycm.pool_states_backward)
    )
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0)
    torch.testing.assert_close(ours[1], theirs[1], equal_nan=True)


@ANY_ARCH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("pool", STATE_POOLS)
def test_states_in_16_bits_are_pooled_as_their_values(temporal: Any, pool: str, dtype: Any) -> None:
    """The gradients of some vectors, in any order, to the bit; of vectors of no row none."""
    rng = np.random.default_rng(0)
    starts, count, dim = torch.tensor([0, 3, 3, 43, 44, 53]), 55, 131
    x = torch.from_numpy(rng.standard_normal((count, dim)).round(1)).to(dtype)  # with ties
    weights = {"attention": torch.randn(dim) / 4, "gpo": torch.rand(count)}.get(pool)
    grad = torch.randn(5, (2 if pool == "meanmax" else 1) * dim)
    some = torch.tensor([52, 0, 7, 43, 54, 20])
    rows = torch.searchsorted(starts, some, right=True) - 1
    want = temporal.pool_states_backward(x.float(), starts, weights, grad, pool, [True, weights is not None])
    gradient = temporal._PoolGradient(x, starts, weights, grad, pool, weights is not None)
    found = torch.ones(len(some), dim)
    gradient.add(some, rows, found)
    torch.testing.assert_close(found, want[0][some] + 1, rtol=0, atol=0)
    assert want[0][some[:4]].any(1).all() or pool == "max"
    torch.testing.assert_close(gradient.of_weights, want[1], rtol=0, atol=0)


# ---- the public functions ----


@pytest.mark.parametrize("arch", ["90"], indirect=True)
def test_layers_directions_and_pools(dispatched: None) -> None:
    kinds = {"layers": 2, "bidirectional": True}
    parts = cases.sequences((4, 0, 6, 1), 5)
    for cell, pool in itertools.product(CELLS, POOLS):
        weights = cases.rnn_weights(cell, 5, 7, **kinds)
        options = {
            "attention": np.random.default_rng(3).standard_normal(14) if pool == "attention" else None,
            "gpo": cases.gpo_weights() if pool == "gpo" else None,
        }
        want = cases.expected(parts, weights, cell, pool, **options)[0]

        def tensors(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: tensors(part) for name, part in value.items()}
            return None if value is None else torch.from_numpy(value).float()

        x, lengths = tensors(np.concatenate(parts)), [len(part) for part in parts]
        found = pycm.temporal_pool(x, lengths, tensors(weights), cell, pool, **tensors(options))
        np.testing.assert_allclose(found.numpy(), want, rtol=0, atol=TEMPORAL["float32"])


@pytest.mark.parametrize("arch", ["90"], indirect=True)
def test_words_through_layers_directions_and_pools(dispatched: None) -> None:
    """As their vectors; ids beyond a sequence may be anything."""
    lengths = torch.tensor([4, 0, 6, 1])
    ids, embedding = torch.randint(0, 9, (4, 6), generator=torch.Generator().manual_seed(0)), torch.randn(9, 8)
    outside = torch.arange(6) >= lengths[:, None]
    for cell, pool, x in itertools.product(CELLS, POOLS, (ids.masked_fill(outside, -5), ids[~outside])):
        module = pycm.nn.TemporalPool(8, 4, cell, pool, 2, bidirectional=True).requires_grad_(False)
        vectors = embedding[x.clip(min=0)]
        torch.testing.assert_close(module(x, lengths, embedding=embedding), module(vectors, lengths), rtol=0, atol=1e-6)
    module = pycm.nn.TemporalPool(8, 4).requires_grad_(False)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(ids, lengths, embedding=embedding), module(ids, lengths, embedding=embedding))
    for table in (embedding, torch.cat([embedding, torch.randn(99, 8)])):  # which is not cast for so few ids
        with torch.autocast("cpu", torch.bfloat16):
            found, want = module(ids, lengths, embedding=table), module(embedding[ids], lengths)
        torch.testing.assert_close(found, want, rtol=0, atol=2.0**-8)
    with pytest.raises(ValueError, match=r"temporal_pool: x must hold ids in \[0, 9\), the rows of embedding, got 9"):
        module(ids.masked_fill(~outside, 9), lengths, embedding=embedding)


@pytest.mark.parametrize("arch", ["90"], indirect=True)
@CELL
def test_gradcheck(dispatched: None, cell: str) -> None:
    torch.manual_seed(0)
    module = pycm.nn.TemporalPool(3, 5, cell, pool="attention", bidirectional=True).double()
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in module.named_parameters()]

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        arguments = (x, torch.tensor([4, 2]))
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), arguments)

    assert torch.autograd.gradcheck(run, (x, *module.parameters()), fast_mode=True, **GRADCHECK)


# ---- bad input ----


@ANY_ARCH
def test_bad_lengths_fail_an_assertion(temporal: Any, arch: str) -> None:
    if arch == "chip":
        pytest.skip("a failed device-side assertion ends the process's use of the chip")
    case = Case("gru", "mean", 5, (3, 2))
    for starts in ([0, 3, 6], [1, 3, 5], [0, 4, 3]):
        case.starts = torch.tensor(starts)
        with pytest.raises(RuntimeError, match="temporal_pool: lengths must be in"):
            case.run(temporal)


@ANY_ARCH
def test_an_empty_batch(temporal: Any) -> None:
    case = Case("lstm", "meanmax", 5, (2,))
    case.x, case.starts, case.others = case.x[:0], torch.zeros(1, dtype=torch.int64), [None, None, None]
    pooled, states, h_n, c_n = case.run(temporal)
    assert [list(part.shape) for part in (pooled, states, h_n, c_n)] == [[0, 10], [0, 5], [0, 5], [0, 5]]
