"""temporal_pool where tensors are more than their values: traces, torch.func, other devices, autocast, swaps."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import temporal_cases as cases
from test_temporal_pool_reserve import arguments
from test_temporal_pool_torch import CELL, LENGTHS, close, frames, rnn_of, torch
from tolerances import TEMPORAL, TEMPORAL_GRADIENT
from torch.utils._python_dispatch import TorchDispatchMode
from torch_cases import raises

import pycm
from pycm import _torch_cuda, _torch_temporal_cuda, _torch_temporal_runs
from pycm.temporal import POOLS, STATE_POOLS

STARTS = torch.tensor(cases.offsets([range(length) for length in LENGTHS]))


def ragged() -> torch.Tensor:
    return torch.cat([row[:length] for row, length in zip(frames(), LENGTHS, strict=True)])


class Seen(TorchDispatchMode):
    """Names and arguments of the operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((str(func), args, kwargs or {}))
        return func(*args, **(kwargs or {}))


# ---- traces of ragged sequences ----


@pytest.mark.parametrize(("given", "backend"), [("cu_seqlens", "aot_eager"), ("lengths", "eager")])
def test_ragged_sequences_compile_and_are_checked(given: str, backend: str) -> None:
    torch._dynamo.reset()
    module = pycm.nn.TemporalPool(6, 8, "gru", "attention")
    compiled = torch.compile(module, fullgraph=True, backend=backend, dynamic=True)
    counts = STARTS if given == "cu_seqlens" else torch.tensor(LENGTHS)
    x, parameters = ragged(), list(module.parameters())
    for rows, size in ((counts, 15), (counts[:-1], 14)):
        found, want = compiled(x[:size], **{given: rows}), module(x[:size], **{given: rows})
        torch.testing.assert_close(found, want, rtol=0, atol=TEMPORAL["float32"])
        grads = (torch.autograd.grad(pooled.square().sum(), parameters) for pooled in (found, want))
        for ours, theirs in zip(*grads, strict=True):
            close(ours, theirs, TEMPORAL_GRADIENT)
    for function in (compiled, module):
        words = ["temporal_pool: ", given, "the 14 steps of x, got 15"]
        raises(ValueError, words, lambda function=function: function(x[:14], **{given: counts}))
        words = ["temporal_pool: ", given, "the 15 steps of x, got 14"]
        raises(ValueError, words, lambda function=function: function(x, **{given: counts[:-1]}))


def test_ragged_sequences_are_exported() -> None:
    module = pycm.nn.TemporalPool(6, 8, "lstm", "gpo").eval()
    steps, ends = torch.export.Dim("steps"), torch.export.Dim("ends", min=3)
    shapes = {"x": {0: steps}, "lengths": None, "hx": None, "cu_seqlens": {0: ends}}
    program = torch.export.export(
        module, (ragged(), None, None), {"cu_seqlens": STARTS}, dynamic_shapes=shapes, strict=False
    ).module()
    x, starts = torch.randn(9, 6), torch.tensor([0, 4, 4, 9])
    assert torch.equal(program(x, None, None, cu_seqlens=starts), module(x, cu_seqlens=starts))
    raises(ValueError, ["the 9 steps", "8"], lambda: program(x, None, None, cu_seqlens=torch.tensor([0, 4, 8])))


@pytest.mark.parametrize("form", ["padded", "ragged"])
def test_gpo_of_a_trace_runs_each_length_once(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cell gets the distinct lengths, and no more rows of states than x has."""
    torch._dynamo.reset()
    module = pycm.nn.GPO()
    lengths = torch.tensor([5, 2, 5, 0, 2, 5])
    x = torch.randn(6, 7, 3) if form == "padded" else torch.randn(19, 3)
    runs: list[tuple[list[int], int]] = []
    real = pycm._C.temporal_pool

    def watch(*arguments: Any) -> Any:
        runs.append((arguments[2].diff().tolist(), arguments[1].shape[0]))
        return real(*arguments)

    monkeypatch.setattr(pycm._C, "temporal_pool", watch)
    with torch.no_grad():
        want = module(x, lengths)
        found = torch.compile(module, fullgraph=True, backend="eager", dynamic=True)(x, lengths)
    torch.testing.assert_close(found, want, rtol=0, atol=TEMPORAL["float32"])
    assert len(runs) == 4
    for counts, rows in runs:
        assert sorted(count for count in counts if count) == [2, 5]
        assert rows == 7


# ---- torch.func ----


@CELL
def test_vmap_of_what_requires_a_gradient(cell: str) -> None:
    """A batch of torch.func does not say that it requires one."""
    frozen = pycm.nn.TemporalPool(6, 8, cell, "max").requires_grad_(False)
    x = torch.nan_to_num(frames()).repeat(2, 1, 1, 1) * torch.tensor([1.0, 2.0])[:, None, None, None]
    x.requires_grad_()
    weight = torch.randn(2, 4, 8)
    (found,) = torch.autograd.grad((torch.vmap(lambda row: frozen(row, LENGTHS))(x) * weight).sum(), x)
    want = torch.autograd.grad((torch.stack([frozen(row, LENGTHS) for row in x]) * weight).sum(), x)[0]
    assert torch.equal(found, want)

    modules = [pycm.nn.TemporalPool(6, 8, cell, "max") for _ in range(2)]
    parameters, _ = torch.func.stack_module_state(modules)
    data = x.detach()[0]
    pooled = torch.vmap(lambda given: torch.func.functional_call(modules[0], given, (data, LENGTHS)))(parameters)
    torch.autograd.backward((pooled * weight).sum())
    sum((module(data, LENGTHS) * w).sum() for module, w in zip(modules, weight, strict=True)).backward()
    for name, stacked in parameters.items():
        assert torch.equal(stacked.grad, torch.stack([module.get_parameter(name).grad for module in modules]))


def test_derivatives_of_torch_func_are_refused() -> None:
    module, x = pycm.nn.TemporalPool(6, 8), torch.nan_to_num(frames())

    def pooled(x: torch.Tensor) -> torch.Tensor:
        return module(x, LENGTHS)

    for call in (
        lambda: torch.func.grad(lambda x: pooled(x).sum())(x),
        lambda: torch.func.vjp(pooled, x),
        lambda: torch.func.jacrev(pooled)(x),
    ):
        raises(NotImplementedError, ["temporal_pool: x", "torch.func"], call)
    alone = torch.func.grad(lambda x: pycm.pool_states(x, LENGTHS, "mean").sum())
    raises(NotImplementedError, ["pool_states: x", "torch.func"], lambda: alone(x))


# ---- other devices ----


def test_counts_of_the_cpu_are_moved_without_a_wait() -> None:
    """Here to the device without values: a copy to CUDA that is not `non_blocking` waits for all that is queued."""
    module, x = pycm.nn.TemporalPool(6, 8, device="meta"), torch.nan_to_num(frames())
    parts = [row[:length] for row, length in zip(x, LENGTHS, strict=True)]
    packed = torch.nn.utils.rnn.pack_sequence(parts, enforce_sorted=False)
    # What its method `to` has always moved with a wait; not of interest here.
    on_meta = torch.nn.utils.rnn.PackedSequence(
        packed.data.to("meta"), packed.batch_sizes, packed.sorted_indices.to("meta"), packed.unsorted_indices.to("meta")
    )
    x, steps = x.to("meta"), ragged().to("meta")
    for call in (
        lambda: module(x, torch.tensor(LENGTHS)),
        lambda: module(x, torch.tensor(LENGTHS, dtype=torch.int32)),
        lambda: module(x, list(LENGTHS)),
        lambda: module(steps, cu_seqlens=STARTS),
        lambda: module(on_meta),
    ):
        with Seen() as seen:
            assert call().shape == (4, 8)
        moves = [kinds for name, _, kinds in seen.calls if "_to_copy" in name and str(kinds.get("device")) == "meta"]
        assert moves
        assert all(kinds.get("non_blocking") for kinds in moves)


@pytest.mark.parametrize("pool", POOLS)
@CELL
def test_cuda_reads_no_values(cell: str, pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors that have none: what reads one on the host, and so waits for the device, cannot go on."""
    monkeypatch.setattr(_torch_temporal_cuda, "_call", lambda *arguments: None)
    monkeypatch.setattr(_torch_cuda, "_on", lambda device: contextlib.nullcontext())
    for name in ("_RUN_BYTES", "_TRAINING_RUN_BYTES"):
        monkeypatch.setattr(_torch_temporal_runs, name, 1)  # so several runs
    for padded in (False, True):
        given = arguments(cell, pool, padded, [20, 0, 9], 8, 5 if cell == "lstm" else 0, torch.float32, padded)
        given = [value.to("meta") if isinstance(value, torch.Tensor) else value for value in given]
        _torch_temporal_cuda.temporal_pool(*given, pool == "none", False)
        pooled, states, h_n, c_n, reserve = _torch_temporal_cuda.temporal_pool(*given, True, True)
        inputs = [given[0], *given[2:7], *given[8:10], given[7]]
        grads = _torch_temporal_cuda.temporal_pool_backward(
            *given[:10], states, reserve, *((None, states) if pool == "none" else (pooled, None)), h_n,
            c_n if cell == "lstm" else None, *given[10:], [tensor is not None for tensor in inputs],
        )  # fmt: skip
        for grad, tensor in zip(grads, inputs, strict=True):
            assert tensor is None or grad.shape == tensor.shape


@pytest.mark.parametrize("pool", POOLS)
def test_what_calls_the_operators_reads_no_values_either(pool: str) -> None:
    head = {"residual": True, "normalize_states": True} if pool in STATE_POOLS else {}
    module = pycm.nn.TemporalPool(6, 6, "gru", pool, 2, bidirectional=True, combine="sum", device="meta", **head)
    x, steps = torch.empty(4, 7, 6, device="meta"), torch.empty(15, 6, device="meta")
    for device in ("cpu", "meta"):
        lengths, starts = (counts.to(device) for counts in (torch.tensor(LENGTHS), STARTS))
        for given in (
            (x, {"lengths": lengths}),
            (steps, {"lengths": lengths}),
            (steps, {"cu_seqlens": starts}),
        ):
            with torch.no_grad():
                module(given[0], **given[1])
            module(given[0], **given[1]).sum().backward()


def test_lists_are_read_on_the_cpu_whatever_the_default_device_is() -> None:
    module, x = pycm.nn.TemporalPool(6, 8), frames()
    want = module(x, torch.tensor(LENGTHS))
    with torch.device("meta"):
        assert torch.equal(module(x, LENGTHS), want)


# ---- what is kept of weights ----


def test_autocast_packs_once(packed: list[str]) -> None:
    module, x = pycm.nn.TemporalPool(6, 8, bidirectional=True), frames()

    def pooled(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype):
            return module(x, LENGTHS)

    want = pooled()
    assert all(torch.equal(pooled(), want) for _ in range(2))
    assert len(packed) == 2
    assert pooled(torch.float16).dtype == torch.float16
    assert len(packed) == 4
    with torch.no_grad():
        module.weight_hh_l0[0, 1] += 1
    fresh = {name: w.detach().clone() for name, w in module.weights().items()}
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pooled(), pycm.temporal_pool(x, LENGTHS, fresh, "lstm"))
        module(x, LENGTHS).float().sum().backward()  # and trains, though casts are kept
    assert module.weight_hh_l0.grad.abs().sum() > 0
    with torch.inference_mode():
        module.weight_hh_l0.data = module.weight_hh_l0 * 2
        assert torch.equal(pooled(), pooled())


def test_parameters_can_be_swapped() -> None:
    module, other, x = pycm.nn.TemporalPool(6, 8, "lstm", "gpo"), rnn_of("lstm", 6, 8), frames()
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for _ in range(2):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                module(x, LENGTHS)
            module.double()
            assert module(x.double(), LENGTHS).dtype == torch.float64
            module.float()
            with torch.no_grad():
                module(x, LENGTHS)
                module.load_state_dict({**module.state_dict(), **other.state_dict()})
                plain = pycm.temporal_pool(x, LENGTHS, other.state_dict(), "lstm", "gpo", gpo=module.gpo.weights())
                assert torch.equal(module(x, LENGTHS), plain)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def test_a_turned_nested_tensor_is_refused() -> None:
    nested = torch.nested.nested_tensor([torch.randn(6, 6), torch.randn(6, 6)], layout=torch.jagged)
    module = pycm.nn.TemporalPool(6, 8)
    assert module(nested).shape == (2, 8)
    raises(ValueError, ["temporal_pool: x", "[B, *, I]", "2"], lambda: module(nested.transpose(1, 2)))
