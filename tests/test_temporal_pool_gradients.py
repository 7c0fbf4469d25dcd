"""Gradients of temporal_pool and pool_states on tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import temporal_cases as cases
from test_temporal_pool_torch import CELL, LENGTHS, close, frames, rnn_of, torch
from tolerances import GRADCHECK, TEMPORAL_GRADIENT

import pycm
from pycm.temporal import POOLS


def gradient_case(
    cell: str, pool: str, bidirectional: bool, combine: str, proj: int = 0
) -> tuple[Any, tuple[Any, ...]]:
    """(function of the tensors, the tensors): all that can have a gradient, in fp64."""
    kinds = {"bidirectional": bidirectional, "proj": proj}
    weights = {k: torch.from_numpy(w).requires_grad_() for k, w in cases.rnn_weights(cell, 3, 4, **kinds).items()}
    generator = torch.Generator().manual_seed(7)
    directions, state = 1 + bidirectional, proj or 4
    features = state * (directions if combine == "concat" else 1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    tensors: dict[str, Any] = {"x": draw(8, 3), "h0": draw(directions, 4, state)}
    if cell == "lstm":
        tensors["c0"] = draw(directions, 4, 4)
    if pool == "attention":
        tensors["attention"] = draw(features)
    extra = cases.gpo_weights(4, 3) if pool == "gpo" else {}
    gpo = {k: torch.from_numpy(w).requires_grad_() for k, w in extra.items()}
    names, parts = list(tensors), (*tensors.values(), *weights.values(), *gpo.values())

    def function(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        options: dict[str, Any] = dict(zip(names, given, strict=False))
        rest = given[len(names) :]
        found, state = pycm.temporal_pool(
            options.pop("x"),
            None,
            dict(zip(weights, rest, strict=False)),
            cell,
            pool,
            cu_seqlens=torch.tensor([0, 4, 4, 7, 8]),
            combine=combine,
            gpo=dict(zip(gpo, rest[len(weights) :], strict=True)) or None,
            return_state=True,
            **options,
        )
        return (found, *state) if cell == "lstm" else (found, state)

    return function, parts


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("combine", ["one", "concat", "average"])
@CELL
def test_gradients(cell: str, combine: str, pool: str) -> None:
    """Of x, the weights, h0, c0 and the pool's own, through the result and the final states, with an empty row."""
    two = combine != "one"
    function, tensors = gradient_case(cell, pool, two, combine if two else "concat", 2 if cell == "lstm" and two else 0)
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True, **GRADCHECK)


@CELL
def test_every_gradient_by_itself(cell: str) -> None:
    function, tensors = gradient_case(cell, "mean", False, "concat")
    assert torch.autograd.gradcheck(function, tensors, **GRADCHECK)
    weights = [torch.randn_like(part) for part in function(*tensors)]
    every = torch.autograd.grad(function(*tensors), tensors, weights)
    for i, tensor in enumerate(tensors):
        alone = [part if j == i else part.detach() for j, part in enumerate(tensors)]
        assert torch.equal(torch.autograd.grad(function(*alone), tensor, weights)[0], every[i])


@pytest.mark.parametrize("pool", ["mean", "attention", "gpo"])
@CELL
def test_second_derivatives(cell: str, pool: str) -> None:
    function, tensors = gradient_case(cell, pool, pool == "attention", "concat")
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True, **GRADCHECK)


@pytest.mark.parametrize("pool", ["max", "gpo", "lastmean"])
@pytest.mark.parametrize("kinds", [{"combine": "sum"}, {"legacy_padding": True}, {"residual": True}])
@CELL
def test_gradients_of_padded_x(cell: str, kinds: dict[str, Any], pool: str) -> None:
    if "residual" in kinds:
        pool = "meanmax" if pool == "lastmean" else pool
        kinds = {"combine": "sum", "residual": True, "normalize_states": True, "normalize": True}
    module = pycm.nn.TemporalPool(4, 4, cell, pool, bidirectional=True, dtype=torch.float64, **kinds)
    names, parameters = zip(*module.named_parameters(), strict=True)
    x = torch.nan_to_num(frames((3, 0, 4), 4, dtype=torch.float64)).requires_grad_()

    def function(x: torch.Tensor, *given: torch.Tensor) -> Any:
        return torch.func.functional_call(module, dict(zip(names, given, strict=True)), (x, (3, 0, 4)))

    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True, **GRADCHECK)


@pytest.mark.parametrize("pool", pycm.temporal.STATE_POOLS)
def test_gradients_of_pools_alone(pool: str) -> None:
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    w = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    gpo = {k: torch.from_numpy(v).requires_grad_() for k, v in cases.gpo_weights(4, 3).items()}

    def function(x: torch.Tensor, w: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return pycm.pool_states(
            x, torch.tensor([4, 0, 2]), pool, attention=w if pool == "attention" else None,
            gpo=dict(zip(gpo, rest, strict=True)) if pool == "gpo" else None,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, (x, w, *gpo.values()), **GRADCHECK)
    assert torch.autograd.gradgradcheck(function, (x, w, *gpo.values()), fast_mode=True, **GRADCHECK)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("head", [{}, {"combine": "average", "residual": True, "normalize_states": True}])
def test_memory_beyond_the_steps_is_never_used(pool: str, head: dict[str, Any]) -> None:
    """Padded input leaves rows of the states unwritten. They hold NaN here, and nothing may come of it."""
    if head and pool in ("last", "first", "lastmean"):
        head = {"combine": "average"}
    module = pycm.nn.TemporalPool(6, 6, "gru", pool, num_layers=2, bidirectional=True, dropout=0.0, **head)
    x = frames().requires_grad_()  # beyond each length NaN too
    ragged = torch.cat([row[:length] for row, length in zip(x, LENGTHS, strict=True)])
    tensors = [x, *module.parameters()]
    want = torch.autograd.grad(module(ragged, LENGTHS).square().sum(), tensors)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # which fills what is not written with NaN
    try:
        assert torch.empty(3).isnan().all()
        found = torch.autograd.grad(module(x, LENGTHS).square().sum(), tensors)
        first = torch.autograd.grad(module(x, LENGTHS).square().sum(), tensors, create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in first), tensors)
    finally:
        torch.use_deterministic_algorithms(before)
    for ours, theirs in zip(found, want, strict=True):
        close(ours, theirs, TEMPORAL_GRADIENT)
    assert all(grad.isfinite().all() for grad in (*first, *second))


@CELL
def test_padding_and_other_rows_have_no_part_in_gradients(cell: str) -> None:
    rnn = rnn_of(cell)
    x = frames().requires_grad_()
    pycm.temporal_pool(x, LENGTHS, dict(rnn.named_parameters()), cell, "max").sum().backward()
    for row, length in zip(x.grad, LENGTHS, strict=True):
        assert not row[length:].any()
        assert row[:length].abs().sum(1).gt(0).all()
    assert torch.isfinite(rnn.weight_ih_l0.grad).all()
    alone = x.detach()[1:2, :2].requires_grad_()
    pycm.temporal_pool(alone, 2, dict(rnn.named_parameters()), cell, "max").sum().backward()
    assert torch.equal(alone.grad[0], x.grad[1, :2])


@pytest.mark.parametrize(("rows", "hidden"), [(70, 40), (4, 136)])  # threads own rows, or share the units
@CELL
def test_gradients_do_not_depend_on_threads_or_runs(cell: str, rows: int, hidden: int) -> None:
    lengths = np.random.default_rng(9).integers(0, 14, rows)
    rnn = rnn_of(cell, 6, hidden, bidirectional=True)
    x = torch.nan_to_num(frames((14, *lengths))).requires_grad_()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4, 4):
            torch.set_num_threads(threads)
            found = pycm.temporal_pool(x, (14, *lengths), dict(rnn.named_parameters()), cell, "meanmax")
            results.append((found, *torch.autograd.grad(found.square().sum(), [x, *rnn.parameters()])))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for ours, first in zip(other, results[0], strict=True):
            assert torch.equal(ours, first)


@pytest.mark.parametrize("alone", [False, True])
def test_gpo_of_no_steps(alone: bool) -> None:
    """An empty array of coefficients is an array."""
    x, lengths = torch.randn(2, 3, 4, requires_grad=True), torch.tensor([0, 0])
    module = pycm.nn.GPO() if alone else pycm.nn.TemporalPool(4, 5, "gru", "gpo")
    module(x, lengths).sum().backward()
    for tensor in (x, *module.parameters()):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))
