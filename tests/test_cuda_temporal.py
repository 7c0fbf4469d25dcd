"""Temporal pooling of CUDA tensors, against the CPU's in fp64. What is skipped where: tests/test_cuda.py."""

from __future__ import annotations

from typing import Any

import pytest
from tolerances import TEMPORAL, TEMPORAL_GRADIENT

import pycm

torch = pytest.importorskip("torch")

LENGTHS = (5, 0, 33, 1, 12, 33, 7)


def steps(items: int, count: int, dim: int, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(items, count, dim, generator=generator, dtype=torch.float64).float()


def temporal(cell: str, pool: str, dtype: Any, device: Any, **kinds: Any) -> Any:
    torch.manual_seed(37)
    return pycm.nn.TemporalPool(20, 40, cell, pool=pool, **kinds).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("pool", pycm.temporal.POOLS)
@pytest.mark.parametrize("cell", pycm.temporal.CELLS)
def test_results_and_gradients(gpu: Any, cell: str, pool: str, dtype: Any) -> None:
    kinds = {"bidirectional": True, "num_layers": 2, "combine": "average"}
    x = steps(7, 33, 20, 38)
    truth = temporal(cell, pool, torch.float64, "cpu", **kinds)
    low = dtype == torch.bfloat16
    if low:  # what is rounded before is no error of ours
        x = x.to(dtype)
        truth.load_state_dict({name: w.to(dtype).double() for name, w in truth.state_dict().items()})
    mine = temporal(cell, pool, torch.float64, "cpu", **kinds)
    mine.load_state_dict(truth.state_dict())
    mine.to(gpu, dtype)
    want = truth(x.double(), torch.tensor(LENGTHS))
    found = mine(x.to(gpu, dtype), torch.tensor(LENGTHS, device=gpu))
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(39)).double()
    (want * weight).sum().backward()
    (found.double() * weight.to(gpu)).sum().backward()
    tolerance = {torch.float64: 1e-12, torch.float32: TEMPORAL["float32"], torch.bfloat16: 2.0**-6}[dtype]
    torch.testing.assert_close(found.double().cpu(), want, rtol=0, atol=tolerance)
    if low and pool in ("max", "meanmax", "gpo"):  # another step may be greatest
        return
    allowed = {torch.float64: 1e-10, torch.float32: TEMPORAL_GRADIENT, torch.bfloat16: 0.1}[dtype]
    for (name, ours), theirs in zip(mine.named_parameters(), truth.parameters(), strict=True):
        error = (ours.grad.double().cpu() - theirs.grad).abs().max() / theirs.grad.abs().max().clamp(min=1e-3)
        assert error <= allowed, name


@pytest.mark.parametrize("hidden", [64, 128, 256, 384, 512, 768, 1024])
@pytest.mark.parametrize("cell", pycm.temporal.CELLS)
def test_every_team(gpu: Any, cell: str, hidden: int) -> None:
    """One block to sixteen, and matrices that no team can hold."""
    for dtype, tolerance in ((torch.float16, 2.0**-9), (torch.float32, TEMPORAL["float32"])):
        torch.manual_seed(40)
        module = pycm.nn.TemporalPool(32, hidden, cell, pool="mean").to(dtype)
        lengths = torch.arange(1, 41)
        x = steps(40, 40, 32, 41).to(dtype)
        want = module.double()(x.double(), lengths)
        module = module.to(gpu, dtype).requires_grad_()
        found = module(x.to(gpu), lengths)
        torch.testing.assert_close(found.double().cpu(), want, rtol=0, atol=tolerance)
        gradients = [torch.autograd.grad(module(x.to(gpu), lengths).sum(), list(module.parameters())) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


POOL = pytest.mark.parametrize("pool", pycm.temporal.POOLS)
CELL = pytest.mark.parametrize("cell", pycm.temporal.CELLS)


def queued(cell: str, pool: str, device: Any) -> tuple[Any, Any]:
    """A module, and frames."""
    module = temporal(cell, pool, torch.float16, device, bidirectional=True, num_layers=2, combine="average")
    return module, steps(7, 33, 20, 42).half().to(device)


def trained(module: Any, x: Any, **counts: Any) -> list[Any]:
    pooled = module(x, **counts)
    return [pooled, *torch.autograd.grad(pooled.float().square().sum(), list(module.parameters()))]


def same_bits(found: Any, want: Any) -> None:
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, want, strict=True))


@POOL
@CELL
def test_nothing_waits_for_the_device(gpu: Any, cell: str, pool: str) -> None:
    """Inference and training, whatever knows the lengths, and wherever that is."""
    module, x = queued(cell, pool, gpu)
    lengths = torch.tensor(LENGTHS)
    ragged = torch.cat([row[:length] for row, length in zip(x, LENGTHS, strict=True)])
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    calls = [
        *((x, {"lengths": counts}) for counts in (lengths, lengths.int(), list(LENGTHS), lengths.to(gpu))),
        *((ragged, {"lengths": counts}) for counts in (lengths, lengths.to(gpu))),
        *((ragged, {"cu_seqlens": counts}) for counts in (starts, starts.to(gpu))),
    ]
    want = [trained(module, values, **counts) for values, counts in calls]  # makes what is kept for the next time, too
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            pooled = [module(values, **counts) for values, counts in calls]
        found = [trained(module, values, **counts) for values, counts in calls]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    same_bits(pooled, [first for first, *_ in want])
    for ours, theirs in zip(found, want, strict=True):
        same_bits(ours, theirs)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@POOL
@CELL
def test_a_captured_graph_gives_the_same_bits(gpu: Any, cell: str, pool: str, training: bool) -> None:
    """Of frames and lengths that it has not seen: launches depend on shapes alone."""
    module, x = queued(cell, pool, gpu)
    lengths = torch.tensor(LENGTHS, device=gpu)

    def call() -> list[Any]:
        if training:
            return trained(module, x, lengths=lengths)
        with torch.no_grad():
            return [module(x, lengths)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as torch asks for before a capture
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for seed, counts in ((43, LENGTHS), (44, (33, 1, 0, 0, 20, 2, 31)), (45, (0,) * 7)):
        x.copy_(steps(7, 33, 20, seed))
        lengths.copy_(torch.tensor(counts))
        graph.replay()
        same_bits(captured, call())
