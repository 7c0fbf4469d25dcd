"""What temporal_pool's forward pass keeps for its backward pass."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import temporal_cases as cases
from temporal_cases import CELLS, GATES
from test_temporal_pool_torch import LENGTHS, frames, rnn_of, states_of, torch
from tolerances import TEMPORAL, TEMPORAL_LOW_PRECISION_RATIO
from torch.utils.checkpoint import checkpoint

import pycm
import pycm._torch_temporal
from pycm import _reference_temporal as specification
from pycm.temporal import POOLS

CELL = pytest.mark.parametrize("cell", CELLS)
KEPT = {"lstm": 5, "gru": 4}
# Threads own rows of the first, and share the units of the second.
BATCHES = ([14, *np.random.default_rng(9).integers(0, 14, 69)], [9, 0, 4, 7])


def arguments(
    cell: str, pool: str, reverse: bool, lengths: Any, hidden: int, proj: int = 0, dtype: Any = torch.float64,
    padded: bool = False,
) -> list[Any]:  # fmt: skip
    """Of the operator, up to what it is to keep."""
    rng = np.random.default_rng(3)
    parts = cases.sequences(lengths, 6)
    starts = cases.offsets(parts)
    x = np.nan_to_num(cases.pad(parts)) if padded else np.concatenate(parts)
    weights = cases.rnn_weights(cell, 6, hidden, proj=proj)
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    state = proj or hidden
    pool_weights = {"attention": rng.standard_normal(state), "gpo": rng.standard_normal(starts[-1])}.get(pool)
    h0 = rng.standard_normal((len(lengths), state))
    c0 = rng.standard_normal((len(lengths), hidden)) if cell == "lstm" else None
    values = [x, *(weights.get(f"{kind}_l0") for kind in kinds), pool_weights, h0, c0]
    tensors = [None if value is None else torch.from_numpy(value).to(dtype) for value in values]
    return [tensors[0], torch.from_numpy(starts), *tensors[1:], cell, pool, reverse]


def gates_of(given: list[Any], hidden: int) -> Any:
    """[S, R, H] by the equations, row by row."""
    x, starts, w_ih, w_hh, b_ih, b_hh, w_hr, _, h0, c0, cell, _, reverse = (
        value.double().numpy() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for value in given
    )
    found = np.full((int(starts[-1]), KEPT[cell], hidden), np.nan)
    sigmoid = specification.sigmoid
    for b, (begin, end) in enumerate(itertools.pairwise(starts.tolist())):
        h, c = h0[b], None if c0 is None else c0[b]
        row = x[b] if x.ndim == 3 else x[begin:end]
        for t in reversed(range(end - begin)) if reverse else range(end - begin):
            of_x, of_h = (np.split(part, GATES[cell]) for part in (w_ih @ row[t] + b_ih, w_hh @ h + b_hh))
            if cell == "lstm":
                i, f, g, o = (u + v for u, v in zip(of_x, of_h, strict=True))
                i, f, g, o = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
                c = f * c + i * g
                h = o * np.tanh(c) if w_hr is None else w_hr @ (o * np.tanh(c))
                kept = (i, f, g, o, c)
            else:
                r, z = sigmoid(of_x[0] + of_h[0]), sigmoid(of_x[1] + of_h[1])
                n = np.tanh(of_x[2] + r * of_h[2])
                h = (1 - z) * n + z * h
                kept = (n, r, z, of_h[2])
            found[begin + t] = kept
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("lengths", "hidden"), [(BATCHES[0], 40), (BATCHES[1], 136)])
@pytest.mark.parametrize(("reverse", "padded"), [(False, True), (True, False)])
@CELL
def test_gates(cell: str, reverse: bool, padded: bool, lengths: Any, hidden: int, dtype: Any) -> None:
    proj = 7 if cell == "lstm" and reverse else 0
    given = arguments(cell, "mean", reverse, lengths, hidden, proj, dtype, padded)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        reserve = torch.ops.pycm.temporal_pool(*given, False, True)[4]
    finally:
        torch.set_num_threads(before)
    assert reserve.dtype == dtype
    want = gates_of(given, hidden)
    assert len(reserve) == (len(lengths) * max(lengths) if padded else len(want))
    tolerance = TEMPORAL[str(dtype).removeprefix("torch.")]
    np.testing.assert_allclose(reserve[: len(want)].double().numpy(), want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@CELL
def test_training_and_inference_give_the_same_bits(cell: str, dtype: Any) -> None:
    for pool, (lengths, hidden), reverse in itertools.product(POOLS, zip(BATCHES, (40, 136), strict=True), (0, 1)):
        given = arguments(cell, pool, bool(reverse), lengths, hidden, 7 if cell == "lstm" and reverse else 0, dtype)
        given[7:10] = (None if t is None else t.to(torch.float64 if t.dtype == torch.float64 else torch.float32)
                       for t in given[7:10])  # fmt: skip
        inference = torch.ops.pycm.temporal_pool(*given, pool == "none", False)
        training = torch.ops.pycm.temporal_pool(*given, True, True)
        assert not inference[4].numel()
        for name, a, b in zip(("pooled", "states", "h_n", "c_n"), inference, training, strict=False):
            assert (name == "states" and not a.numel()) or torch.equal(a, b), (name, pool)


@CELL
def test_gradients_read_every_gate_and_leave_it(cell: str) -> None:
    """The backward pass computes no gate again: each one changes a gradient; and it can run twice."""
    given = arguments(cell, "mean", False, [4, 2], 5)
    pooled, states, _, _, reserve = torch.ops.pycm.temporal_pool(*given, True, True)
    grad, needs = torch.ones_like(pooled), [tensor is not None for tensor in (*given[:1], *given[2:7], *given[8:10])]

    def gradients(reserve: torch.Tensor) -> Any:
        return torch.ops.pycm.temporal_pool_backward(
            *given[:10], states, reserve, grad, None, None, None, *given[10:], [*needs, False]
        )

    kept, want = reserve.clone(), gradients(reserve)
    assert torch.equal(reserve, kept)
    for step, part, unit in np.ndindex(*reserve.shape):
        wrong = reserve.clone()
        wrong[step, part, unit] += 0.5
        assert any(not torch.equal(a, b) for a, b in zip(gradients(wrong), want, strict=True)), (step, part, unit)
    assert all(torch.equal(a, b) for a, b in zip(gradients(reserve), want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@CELL
def test_opcheck(cell: str, dtype: Any) -> None:
    given = arguments(cell, "attention", True, [4, 2, 3], 8, dtype=dtype)
    given[7:10] = (None if t is None else t.float() for t in given[7:10])
    torch.library.opcheck(torch.ops.pycm.temporal_pool.default, (*given, False, False))
    for i in (0, 2, 3, 4, 5, 7, 8, 9):
        given[i] = None if given[i] is None else given[i].requires_grad_()
    torch.library.opcheck(torch.ops.pycm.temporal_pool.default, (*given, True, True))


@pytest.mark.parametrize("reentrant", [False, True])
@CELL
def test_checkpoint(cell: str, reentrant: bool) -> None:
    module = pycm.nn.TemporalPool(6, 8, cell, "meanmax", num_layers=2, bidirectional=True)
    x = torch.nan_to_num(frames()).requires_grad_()
    tensors = [x, *module.parameters()]
    want = module(x, LENGTHS)
    expected = torch.autograd.grad(want.square().sum(), tensors)
    found = checkpoint(module, x, LENGTHS, use_reentrant=reentrant)
    assert torch.equal(found, want)
    found.square().sum().backward()
    assert all(torch.equal(tensor.grad, grad) for tensor, grad in zip(tensors, expected, strict=True))


SIZES = [((12,) * 8, 6, 40, 0), ((9, 5, 4, 1), 7, 41, 0), ((1,) * 9, 9, 21, 0), ((9, 5, 4), 6, 41, 13)]


# Odd numbers of steps, inputs and units leave words of two elements half filled.
@pytest.mark.parametrize(("lengths", "inputs", "hidden", "proj"), [*SIZES, ([*range(3, 36)], 24, 136, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@CELL
def test_gradients_in_low_precision(cell: str, dtype: Any, lengths: Any, inputs: int, hidden: int, proj: int) -> None:
    """Against fp64, of weights and inputs of half precision; torch's own error is the measure."""
    sizes = {"proj_size": proj} if proj and cell == "lstm" else {}
    rnn, wide = (rnn_of(cell, inputs, hidden, **sizes).to(kind) for kind in (dtype, torch.float64))
    wide.load_state_dict(rnn.state_dict())
    x = torch.nan_to_num(frames(lengths, inputs)).to(dtype)
    exists = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    generator = torch.Generator().manual_seed(5)
    direction = torch.randn(sum(lengths), sizes.get("proj_size", hidden), generator=generator)

    def gradients(states: Any, module: Any, dtype: Any) -> Any:
        steps = x.to(dtype).requires_grad_()
        found = states(module, steps)
        return torch.autograd.grad((found.double() * direction).sum(), [steps, *module.parameters()])

    def ours(module: Any, steps: Any) -> Any:
        return pycm.temporal_pool(steps[exists], lengths, dict(module.named_parameters()), cell, "none")

    def theirs(module: Any, steps: Any) -> Any:
        return states_of(module, steps, lengths)[0][exists]

    found = (gradients(ours, rnn, dtype), gradients(theirs, rnn, dtype), gradients(theirs, wide, torch.float64))
    for name, mine, other, want in zip(["x", *rnn.state_dict()], *found, strict=True):
        error, allowed = ((grad.double() - want).norm() for grad in (mine, other))
        assert error <= TEMPORAL_LOW_PRECISION_RATIO * allowed, (name, error / allowed)
