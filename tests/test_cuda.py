"""CUDA tensors through the public functions: the answers of the CPU, bit for bit where results are exact.

What needs a device is skipped without one, and fails under PYCM_REQUIRE_GPU=1. The kernels run everywhere on the host
executor: tests/simt.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import oracles
import pytest
from oracles import METRICS, assert_exact, assert_same
from tolerances import SLACK
from torch_cases import raises

import pycm

torch = pytest.importorskip("torch")

from pycm import _torch_cuda, _torch_ops, _torch_temporal  # noqa: E402, F401

METRIC = pytest.mark.parametrize("metric", METRICS)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
# Around the edges of tiles, warps and vector loads: (N, M, D, k).
SIZES = (
    (1, 1, 1, 1),
    (1, 257, 33, 10),
    (15, 129, 17, 129),
    (16, 1000, 64, 7),
    (65, 4097, 127, 33),
    (129, 2049, 256, 100),
    (257, 5000, 513, 1000),
)


def rows(count: int, dim: int, seed: int, dtype: Any = torch.float32) -> Any:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def brought_back(found: Any) -> tuple[Any, Any]:
    assert found.scores.is_cuda
    assert found.indices.is_cuda
    return found.scores.cpu(), found.indices.cpu()


# ---- exact results ----


@METRIC
@DTYPE
def test_topk_of_every_metric_and_dtype(gpu: Any, metric: str, dtype: Any) -> None:
    q, g = rows(33, 70, 0, dtype), rows(3000, 70, 1, dtype)
    assert_exact(brought_back(pycm.topk(q.to(gpu), g.to(gpu), 12, metric)), q, g, 12, metric)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_topk_of_many_sizes(gpu: Any, size: tuple[int, int, int, int]) -> None:
    n, m, d, k = size
    q, g = rows(n, d, 2), rows(m, d, 3)
    for metric in ("cosine", "euclidean"):
        assert_exact(brought_back(pycm.topk(q.to(gpu), g.to(gpu), k, metric)), q, g, k, metric)


@METRIC
def test_topk_of_ties_and_small_integers(gpu: Any, metric: str) -> None:
    generator = torch.Generator().manual_seed(4)
    q, g = (torch.randint(-2, 3, (count, 8), generator=generator).float() for count in (40, 6000))
    assert_exact(brought_back(pycm.topk(q.to(gpu), g.to(gpu), 50, metric)), q, g, 50, metric)


@METRIC
def test_topk_with_odd_values(gpu: Any, metric: str) -> None:
    q, g = rows(20, 24, 5), rows(900, 24, 6)
    g[3], g[5], g[7, 2], q[1, 0], q[2] = 0, 1, float("nan"), float("inf"), 0
    g[9], g[11] = g[9] * 1e-40, g[11] * 1e30
    with np.errstate(all="ignore"):
        assert_exact(brought_back(pycm.topk(q.to(gpu), g.to(gpu), 900, metric)), q, g, 900, metric)


def test_topk_with_masks_and_excludes(gpu: Any) -> None:
    q, g = rows(30, 40, 7), rows(2000, 40, 8)
    generator = torch.Generator().manual_seed(9)
    one, each = torch.rand(2000, generator=generator) < 0.3, torch.rand(30, 2000, generator=generator) < 0.02
    lists = [list(range(i)) for i in range(30)]
    for mask in (one, each):
        allowed = mask.expand(30, 2000).clone()
        for i, left in enumerate(lists):
            allowed[i, left] = False
        found = pycm.topk(q.to(gpu), g.to(gpu), 60, mask=mask.to(gpu), exclude=lists)
        assert_exact(brought_back(found), q, g, 60, "cosine", allowed.numpy())
    single = torch.arange(30) - 1
    allowed = torch.ones(30, 2000, dtype=torch.bool)
    allowed[torch.arange(1, 30), single[1:]] = False
    found = pycm.topk(q.to(gpu), g.to(gpu), 5, "dot", exclude=single.to(gpu))
    assert_exact(brought_back(found), q, g, 5, "dot", allowed.numpy())


def test_topk_of_strided_and_unaligned_rows(gpu: Any) -> None:
    q, g = rows(20, 41, 10), rows(1500, 41, 11)
    want = pycm.topk(q, g, 9)
    for make in (
        lambda t: t.T.contiguous().T,
        lambda t: torch.cat((t, t), 1)[:, : t.shape[1]],
        lambda t: torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape),
        lambda t: t.repeat_interleave(2, 0)[::2],
        lambda t: t.repeat_interleave(2, 1)[:, ::2],
    ):
        assert_same(brought_back(pycm.topk(make(q.to(gpu)), make(g.to(gpu)), 9)), want)


@METRIC
@DTYPE
def test_rank_agrees_with_the_cpu(gpu: Any, metric: str, dtype: Any) -> None:
    q, g = rows(50, 48, 12, dtype), rows(2500, 48, 13, dtype)
    offsets, indices = (
        torch.arange(0, 151, 3),
        torch.randint(0, 2500, (150,), generator=torch.Generator().manual_seed(1)),
    )
    for positives in (indices[:50], (offsets, indices)):
        there = tuple(p.to(gpu) for p in positives) if isinstance(positives, tuple) else positives.to(gpu)
        ours, want = pycm.rank(q.to(gpu), g.to(gpu), there, metric), pycm.rank(q, g, positives, metric)
        for a, b in zip(ours[:4], want[:4], strict=True):
            assert a.is_cuda
            assert torch.equal(a.cpu(), b)


def test_a_positive_without_a_score_has_no_rank(gpu: Any) -> None:
    q, g = rows(4, 8, 14), rows(30, 8, 15)
    q[2] = float("nan")
    found = pycm.rank(q.to(gpu), g.to(gpu), torch.arange(4, device=gpu))
    assert found.ranks.isnan().tolist() == found.scores.isnan().tolist() == [False, False, True, False]


# ---- scores ----


@METRIC
@DTYPE
def test_similarity_is_as_accurate_as_torch(gpu: Any, metric: str, dtype: Any) -> None:
    for shape_x, shape_y in (((37, 100), (91, 100)), ((3, 1, 36, 64), (5, 32, 64)), ((130, 513), (129, 513))):
        generator = torch.Generator().manual_seed(16)
        x, y = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in (shape_x, shape_y))
        ours = pycm.similarity(x.to(gpu), y.to(gpu), metric)
        assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        truth, wide = oracles.truth(x, y, metric), np.finfo(oracles.widen(ours.cpu()).dtype)
        theirs = pycm.similarity(x, y, metric)  # held to torch's own error by tests/test_similarity.py
        scale = {"dot": 64.0, "euclidean": 64.0, "sqeuclidean": 4096.0}.get(metric, 1.0)
        worst, reference = (np.abs(oracles.widen(part.cpu()) - truth).max() for part in (ours, theirs))
        assert worst <= 2 * reference + SLACK[metric] * wide.eps * scale


@METRIC
def test_identical_rows_are_exactly_zero_apart(gpu: Any, metric: str) -> None:
    x = rows(70, 90, 17).to(gpu)
    scores = pycm.similarity(x, x, metric)
    if metric in pycm.DISTANCES:
        assert (scores.diagonal() == 0).all()
    else:
        assert (scores.diagonal() > 0.99).all()


# ---- torch ----


@METRIC
def test_gradients(gpu: Any, metric: str) -> None:
    x, y = (t.to(gpu).requires_grad_() for t in (rows(4, 6, 18, torch.float64), rows(9, 6, 19, torch.float64)))
    assert torch.autograd.gradcheck(lambda a, b: pycm.similarity(a, b, metric), (x, y), nondet_tol=0.0)
    assert torch.autograd.gradcheck(lambda a, b: pycm.topk(a, b, 3, metric).scores, (x, y), nondet_tol=0.0)


def test_two_runs_give_the_same_bits(gpu: Any) -> None:
    q, g = rows(500, 64, 20).to(gpu), rows(5000, 64, 21).to(gpu).requires_grad_()

    def run() -> tuple[Any, ...]:
        found = pycm.topk(q, g, 20)
        return (*(part.detach() for part in found), *torch.autograd.grad(found.scores.sum(), g))

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


def test_autocast_and_compile(gpu: Any) -> None:
    q, g = rows(6, 40, 22, torch.bfloat16).to(gpu), rows(300, 40, 23, torch.bfloat16).to(gpu)
    want = pycm.topk(q.float(), g.float(), 4)
    with torch.autocast("cuda", torch.bfloat16):
        assert_same(brought_back(pycm.topk(q, g, 4)), brought_back(want))
    compiled = torch.compile(lambda a, b: pycm.topk(a * 2, b, 4, "dot"), fullgraph=True, backend="aot_eager")
    assert_same(brought_back(compiled(q, g)), brought_back(pycm.topk(q * 2, g, 4, "dot")))
    torch.compiler.reset()


def test_streams_and_graphs(gpu: Any) -> None:
    q, g = rows(100, 64, 24).to(gpu), rows(8000, 64, 25).to(gpu)
    positives = torch.arange(100, device=gpu)
    with torch.cuda.stream(torch.cuda.Stream()):
        found = pycm.topk(q, g, 10)
    torch.cuda.synchronize()
    assert_exact(brought_back(found), q.cpu(), g.cpu(), 10, "cosine")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = pycm.topk(q, g, 10)
        ranks = pycm.rank(q, g, positives)
        scores = pycm.similarity(q, g)
    q.copy_(rows(100, 64, 26))
    graph.replay()
    assert_exact(brought_back(captured), q.cpu(), g.cpu(), 10, "cosine")
    assert torch.equal(ranks.greater.cpu(), pycm.rank(q.cpu(), g.cpu(), positives.cpu()).greater)
    assert torch.equal(scores, pycm.similarity(q, g))


def test_nothing_waits_for_the_device(gpu: Any) -> None:
    q, g = rows(100, 64, 27).to(gpu), rows(8000, 64, 28).to(gpu)
    positives, mask = torch.arange(100, device=gpu), torch.ones(8000, dtype=torch.bool, device=gpu)
    pycm.topk(q, g, 10)
    torch.cuda.set_sync_debug_mode("error")
    try:
        pycm.topk(q, g, 10, mask=mask, exclude=positives)
        pycm.rank(q, g, positives)
        pycm.similarity(q, g)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_every_device(gpu: Any) -> None:
    q, g = rows(10, 16, 29), rows(200, 16, 30)
    want = pycm.topk(q, g, 3)
    for i in range(torch.cuda.device_count()):
        device = torch.device("cuda", i)
        found = pycm.topk(q.to(device), g.to(device), 3)
        assert found.scores.device == device
        assert_same(brought_back(found), want)


def test_memory_of_topk(gpu: Any) -> None:
    """Nothing of size N×M: here the matrix of scores would be 1.6 GB."""
    q, g = rows(20_000, 64, 31).to(gpu), rows(20_000, 64, 32).to(gpu)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    pycm.topk(q, g, 10)
    taken = torch.cuda.max_memory_allocated() - before
    results = 20_000 * 10 * 12
    assert taken <= pycm.workspace_bytes(20_000, 20_000, 64, 10, device=gpu) + results + (1 << 20)
    assert taken < 400 << 20


def test_a_prepared_search_takes_less_memory_and_does_not_wait(gpu: Any) -> None:
    q, g = rows(16, 256, 40).to(gpu), rows(50_000, 256, 41).to(gpu)
    gallery = pycm.Gallery(g)
    expected = gallery.topk(q, 10)
    assert_same((expected.scores.cpu(), expected.indices.cpu()), pycm.topk(q.cpu(), g.cpu(), 10))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = gallery.topk(q, 10)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.ids, expected.ids)
    taken = torch.cuda.max_memory_allocated() - before
    scratch = pycm.workspace_bytes(16, 50_000, 256, 10, device=gpu, prepared=True)
    assert taken <= scratch + 16 * 10 * 20 + (1 << 20)
    assert scratch < pycm.workspace_bytes(16, 50_000, 256, 10, device=gpu) - 50_000 * 2 * 256


@pytest.mark.parametrize("empty", ["queries", "batch"])
def test_empty(gpu: Any, empty: str) -> None:
    if empty == "queries":
        found = pycm.topk(torch.empty(0, 8, device=gpu), torch.ones(5, 8, device=gpu), 2)
        assert found.scores.shape == found.indices.shape == (0, 2)
        return
    assert pycm.similarity(torch.empty(0, 3, 8, device=gpu), torch.ones(5, 8, device=gpu)).shape == (0, 3, 5)


def test_errors_are_those_of_the_cpu(gpu: Any) -> None:
    q, g = rows(4, 8, 33).to(gpu), rows(30, 8, 34).to(gpu)
    raises(ValueError, ["topk", "gallery", "cuda:0", "cpu"], lambda: pycm.topk(q, g.cpu(), 2))
    raises(ValueError, ["topk: k must be in [1, 30], got 31"], lambda: pycm.topk(q, g, 31))
    raises(TypeError, ["gallery", "dtype float32", "float16"], lambda: pycm.topk(q, g.half(), 2))
    raises(ValueError, ["exclude", "-1 for none", "30"], lambda: pycm.topk(q, g, 2, exclude=[30, 0, 0, 0]))
    raises(ValueError, ["rank", "positives", "30"], lambda: pycm.rank(q, g, [30, 0, 0, 0]))
    raises(ValueError, ["threshold_join", "gallery", "cuda:0", "cpu"], lambda: pycm.threshold_join(q, g.cpu(), 0.5))


# ---- without a device ----


def test_the_operators_have_cuda_kernels() -> None:
    for name in ("temporal_pool", "temporal_pool_backward", "pool_states", "pool_states_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pycm::{name}", "CUDA"), name
    for name in ("similarity", "topk", "rank"):
        for key in ("CPU", "CUDA", "AutocastCUDA", "AutocastCPU", "Meta", "Autograd"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pycm::{name}", key), (name, key)


def test_other_memory_is_refused() -> None:
    q, g = rows(2, 4, 35), rows(5, 4, 36)
    with pytest.raises(NotImplementedError, match="topk: queries is on cpu, and this function is for CUDA only"):
        pycm._C.cuda_topk_workspace_bytes(q, g, 2, "dot", "exact", None, None, None, "auto", None)
    with pytest.raises(NotImplementedError, match="similarity: x is on cpu"):
        pycm._C.cuda_similarity_workspace_bytes(q, g, "dot")
    with pytest.raises(TypeError, match="topk: queries must be a torch tensor"):
        pycm._C.cuda_topk_workspace_bytes(q.numpy(), g.numpy(), 2, "dot", "exact", None, None, None, "auto", None)
    pycm._C.use_exchange_table(False)
    try:
        with pytest.raises(NotImplementedError, match="similarity: y is on meta"):
            pycm._C.similarity(q, g.to("meta"), "dot")
        with pytest.raises(NotImplementedError, match="similarity: x is on cpu"):
            pycm._C.cuda_similarity_workspace_bytes(q, g, "dot")
    finally:
        pycm._C.use_exchange_table(True)


def test_workspace_bytes_of_other_devices() -> None:
    with pytest.raises(ValueError, match="device must be cpu or a CUDA device, got xpu"):
        pycm.workspace_bytes(1, 1, 1, 1, device="xpu")
    assert pycm.workspace_bytes(100, 1000, 64, 10) == pycm.workspace_bytes(100, 1000, 64, 10, device="cpu") > 0


def test_whether_tf32_is_allowed_is_asked_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        allow_tf32 = True

    class New:
        fp32_precision = "ieee"

        @property
        def allow_tf32(self) -> bool:
            raise RuntimeError("both names were set")

    for settings, allowed in ((Old, True), (New, False)):
        monkeypatch.setattr(torch.backends.cuda, "matmul", settings())
        assert _torch_cuda._allows_tf32() is allowed
