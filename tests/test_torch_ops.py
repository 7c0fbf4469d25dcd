"""The torch operators: gradients, tracing, transforms, autocast, and the paths that must give the same bits."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import oracles
import pytest
from oracles import METRICS, assert_exact, assert_same
from tolerances import GRADCHECK

import pycm

torch = pytest.importorskip("torch")
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from pycm import _torch_ops  # noqa: E402

METRIC = pytest.mark.parametrize("metric", METRICS)


def pair(
    n: int = 4, m: int = 9, d: int = 5, dtype: torch.dtype = torch.float64, seed: int = 0, grad: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, g = (torch.randn(rows, d, generator=generator, dtype=torch.float64).to(dtype) for rows in (n, m))
    return q.requires_grad_(grad), g.requires_grad_(grad)


def plain_similarity(x: torch.Tensor, y: torch.Tensor, metric: str) -> torch.Tensor:
    """The metric in torch's own differentiable operations."""
    if metric in oracles.DISTANCES:
        square = (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)
        return square.sqrt() if metric == "euclidean" else square
    if metric == "pearson":
        x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    if metric != "dot":
        x, y = x / x.norm(dim=-1, keepdim=True), y / y.norm(dim=-1, keepdim=True)
    return x @ y.mT


# ---- gradients ----


@METRIC
def test_similarity_gradients(metric: str) -> None:
    x, y = pair()
    assert torch.autograd.gradcheck(lambda a, b: pycm.similarity(a, b, metric), (x, y), **GRADCHECK)
    assert torch.autograd.gradgradcheck(lambda a, b: pycm.similarity(a, b, metric), (x, y), **GRADCHECK)


@METRIC
def test_gradients_of_broadcast_batches(metric: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 1, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: pycm.similarity(a, b, metric), (x, y), **GRADCHECK)
    grads = torch.autograd.grad(pycm.similarity(x, y, metric).sin().sum(), (x, y))
    want = torch.autograd.grad(plain_similarity(x, y, metric).sin().sum(), (x, y))
    for ours, theirs in zip(grads, want, strict=True):
        torch.testing.assert_close(ours, theirs)


@METRIC
def test_topk_gradients(metric: str) -> None:
    q, g = pair(5, 20, 6)

    def scores(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return pycm.topk(a, b, 3, metric).scores

    assert torch.autograd.gradcheck(scores, (q, g), **GRADCHECK)
    assert torch.autograd.gradgradcheck(scores, (q, g), **GRADCHECK)
    chosen = pycm.topk(q, g, 3, metric)
    want = plain_similarity(q, g, metric).gather(1, chosen.indices)
    torch.testing.assert_close(chosen.scores, want)
    weights = torch.arange(15, dtype=torch.float64).view(5, 3)
    ours = torch.autograd.grad((chosen.scores * weights).sum(), (q, g))
    for mine, theirs in zip(ours, torch.autograd.grad((want * weights).sum(), (q, g)), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert not chosen.indices.requires_grad


@METRIC
def test_missing_matches_have_no_gradient(metric: str) -> None:
    q, g = pair(4, 12, 5)
    mask = torch.zeros(4, 12, dtype=torch.bool)
    mask[0, 3] = mask[2, 7] = mask[2, 8] = True
    found = pycm.topk(q, g, 4, metric, mask=mask)
    assert (found.indices[1] == -1).all()
    grad_q, grad_g = torch.autograd.grad(found.scores, (q, g), torch.ones(4, 4, dtype=torch.float64))
    assert torch.isfinite(grad_q).all()
    assert torch.isfinite(grad_g).all()
    assert not grad_q[[1, 3]].any()
    assert grad_q[[0, 2]].any(dim=1).all()
    untouched = [i for i in range(12) if i not in (3, 7, 8)]
    assert not grad_g[untouched].any()
    want = plain_similarity(q, g, metric)[mask].sum()
    for ours, theirs in zip((grad_q, grad_g), torch.autograd.grad(want, (q, g)), strict=True):
        torch.testing.assert_close(ours, theirs)


@METRIC
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_of_low_precision_inputs(metric: str, dtype: torch.dtype) -> None:
    x, y = pair(6, 7, 8, dtype)
    grads = torch.autograd.grad(pycm.similarity(x, y, metric).sum(), (x, y))
    wide = x.detach().double().requires_grad_(), y.detach().double().requires_grad_()
    want = torch.autograd.grad(plain_similarity(*wide, metric).sum(), wide)
    for ours, theirs in zip(grads, want, strict=True):
        assert ours.dtype == dtype
        tolerance = 8 * torch.finfo(dtype).eps * theirs.abs().max().item()
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=tolerance)


@METRIC
def test_gradients_at_the_defined_zeros(metric: str) -> None:
    """Zero rows, constant rows and identical rows have a score by definition; their gradient is finite."""
    x = torch.tensor([[0.0, 0, 0], [1, 1, 1], [1, 2, 3], [0.1, 0.1, 0.1]], requires_grad=True)
    grads = torch.autograd.grad(pycm.similarity(x, x, metric).sum(), x)[0]
    assert torch.isfinite(grads).all()
    if metric == "cosine":
        assert not grads[0].any()
    if metric == "pearson":
        assert not grads[[0, 1, 3]].any()
    if metric == "euclidean":
        alone = torch.autograd.grad(pycm.similarity(x[2:3], x[2:3].detach(), metric).sum(), x)[0]
        assert not alone.any()


@METRIC
def test_only_one_input_needs_a_gradient(metric: str) -> None:
    x, y = pair()
    both = torch.autograd.grad(pycm.similarity(x, y, metric).cos().sum(), (x, y))
    assert torch.equal(torch.autograd.grad(pycm.similarity(x, y.detach(), metric).cos().sum(), x)[0], both[0])
    assert torch.equal(torch.autograd.grad(pycm.similarity(x.detach(), y, metric).cos().sum(), y)[0], both[1])


@METRIC
def test_only_needed_gradients_are_computed(metric: str) -> None:
    """One gradient of the two costs about half the products."""
    x, y = pair(dtype=torch.float32)

    def operations(a: torch.Tensor, b: torch.Tensor, call: Any) -> int:
        result = call(a, b)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            result.sum().backward()
        names = ("aten::mm", "aten::bmm", "aten::index_add_")
        return sum(event.count for event in profile.key_averages() if event.key in names)

    for call in (lambda a, b: pycm.similarity(a, b, metric), lambda a, b: pycm.topk(a, b, 2, metric).scores):
        both = operations(x, y, call)
        assert operations(x, y.detach(), call) < both
        assert operations(x.detach(), y, call) < both or metric in oracles.DISTANCES


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean"])
def test_gradients_of_close_rows_do_not_cancel(metric: str) -> None:
    generator = torch.Generator().manual_seed(4)
    g = torch.randn(60, 32, generator=generator) + 100
    q = g + 1e-3 * torch.randn(60, 32, generator=generator)
    eye = torch.eye(60)

    def gradients(a: torch.Tensor, b: torch.Tensor, which: str) -> tuple[torch.Tensor, ...]:
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        if which == "similarity":
            scores = pycm.similarity(a, b, metric) * eye
        elif which == "topk":
            scores = pycm.topk(a, b, 1, metric).scores
        else:
            scores = plain_similarity(a, b, metric).diagonal()
        return torch.autograd.grad(scores.sum(), (a, b))

    want = gradients(q.double(), g.double(), "plain")
    for which in ("similarity", "topk"):
        for ours, theirs in zip(gradients(q, g, which), want, strict=True):
            tolerance = 4 * torch.finfo(torch.float32).eps * theirs.abs().max().item()
            torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=tolerance)


@METRIC
def test_nothing_flows_from_what_is_not_there(metric: str) -> None:
    """A filler has index -1: no row of the gallery, however bad its values, takes part in its gradient."""
    q, g = pair(4, 6, 5, torch.float32, grad=False)
    g[0], q[1], q[3, 2] = torch.nan, torch.nan, torch.inf
    q.requires_grad_(), g.requires_grad_()
    mask = torch.tensor([False, True, True, False, False, False])
    found = pycm.topk(q, g, 4, metric, mask=mask)
    assert (found.indices[1] == -1).all()
    scores = torch.where(found.indices >= 0, found.scores, 0.0)[[0, 2]]
    # With a graph, as second derivatives run through the same values.
    grad_q, grad_g = torch.autograd.grad(scores.sum(), (q, g), create_graph=True)
    assert torch.isfinite(grad_q[[0, 2]]).all()
    assert torch.isfinite(grad_g[0]).all()
    again = torch.autograd.grad(grad_q[[0, 2]].sum(), g, allow_unused=True, retain_graph=True)[0]
    assert again is None or torch.isfinite(again[0]).all()
    every = torch.autograd.grad(torch.where(found.indices >= 0, found.scores, 0.0).sum(), g)[0]
    assert not every[[0, 3, 4, 5]].any()


@METRIC
def test_topk_gradients_in_pieces(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient does not depend on how many queries are taken at a time, twice differentiated or batched too."""
    q, g = pair(7, 20, 6)

    def gradients() -> list[torch.Tensor]:
        scores = pycm.topk(q, g, 3, metric).scores
        first = torch.autograd.grad(scores.sin().sum(), (q, g), create_graph=True)
        second = torch.autograd.grad(sum(part.square().sum() for part in first), (q, g), retain_graph=True)
        batch = torch.autograd.grad(scores, (q, g), torch.eye(21).double().view(21, 7, 3), is_grads_batched=True)
        return [*first, *second, *batch]

    want = gradients()
    monkeypatch.setattr("pycm._torch_gradients.GATHERED_BYTES", 2 * 3 * 6 * 8)
    for ours, theirs in zip(gradients(), want, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.autograd.gradgradcheck(lambda a, b: pycm.topk(a, b, 3, metric).scores, (q, g), **GRADCHECK)
    empty = q[:0].detach().requires_grad_()
    assert torch.autograd.grad(pycm.topk(empty, g, 3, metric).scores.sum(), empty)[0].shape == (0, 6)


class Largest(TorchDispatchMode):
    """The most bytes of one tensor that any operation made."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@METRIC
def test_topk_backward_is_bounded(metric: str) -> None:
    q, g = pair(2000, 300, 256, torch.float32)
    scores = pycm.topk(q, g, 50, metric).scores
    with Largest() as largest:
        scores.sum().backward()
    assert largest.bytes <= 32 << 20  # all gathered rows are 102 MB


@pytest.mark.filterwarnings("ignore")
@METRIC
def test_backward_inside_autocast_keeps_its_precision(metric: str) -> None:
    x, y = pair(20, 30, 40, torch.float32)
    for call in (lambda: pycm.similarity(x, y, metric), lambda: pycm.topk(x, y, 5, metric).scores):
        want = torch.autograd.grad(call().sum(), (x, y))
        with torch.autocast("cpu", torch.bfloat16):
            inside = torch.autograd.grad(call().sum(), (x, y))
        for ours, theirs in zip(inside, want, strict=True):
            assert torch.equal(ours, theirs)


# ---- forward-mode derivatives are refused, and never lost ----


@pytest.mark.parametrize("leaf", [False, True])
def test_forward_mode_is_refused(leaf: bool) -> None:
    x, y = pair(dtype=torch.float32, grad=False)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.clone().requires_grad_(leaf), torch.ones_like(x))
        words = ["similarity", "x", "forward-mode"]
        raises(NotImplementedError, words, lambda: pycm.similarity(dual, y))
        raises(NotImplementedError, ["similarity", "y", "forward-mode"], lambda: pycm.similarity(y, dual))
        raises(NotImplementedError, ["topk", "queries", "forward-mode"], lambda: pycm.topk(dual, y, 2))
        raises(NotImplementedError, ["topk", "gallery", "forward-mode"], lambda: pycm.topk(y, dual, 2))
        raises(NotImplementedError, [], lambda: torch.ops.pycm.similarity(dual, y, "dot"))
        raises(NotImplementedError, [], lambda: torch.ops.pycm.topk(y, dual, 2, "dot", None, None, None, "exact"))
        np.testing.assert_array_equal(pycm.similarity(x, y).numpy(), pycm.similarity(x.numpy(), y.numpy()))
    raises(
        NotImplementedError,
        ["similarity", "x", "forward-mode"],
        lambda: torch.func.jvp(lambda a: pycm.similarity(a, y), (x,), (x,)),
    )
    raises(NotImplementedError, ["topk"], lambda: torch.func.jacfwd(lambda a: pycm.topk(a, y, 2).scores)(x))


# ---- every path gives the same bits ----


@METRIC
def test_fast_path_and_operator_agree(metric: str) -> None:
    q, g = pair(30, 500, 40, torch.float32, grad=False)
    scores = pycm.similarity(q, g, metric)
    found = pycm.topk(q, g, 8, metric)
    assert_exact(found, q, g, 8, metric)
    assert_same(pycm.topk(q.numpy(), g.numpy(), 8, metric), found)
    np.testing.assert_array_equal(pycm.similarity(q.numpy(), g.numpy(), metric), scores.numpy())
    for a, b in ((q.clone().requires_grad_(), g), (q, torch.nn.Parameter(g.clone()))):
        assert torch.equal(pycm.similarity(a, b, metric).detach(), scores)
        again = pycm.topk(a, b, 8, metric)
        assert again.scores.requires_grad
        assert_same((again.scores.detach(), again.indices), found)
        with torch.no_grad():
            assert not pycm.similarity(a, b, metric).requires_grad
            assert_same(pycm.topk(a, b, 8, metric), found)
        with torch.inference_mode():
            assert torch.equal(pycm.similarity(a, b, metric), scores)
    with torch.inference_mode():
        assert_same(pycm.topk(q.clone(), g.clone(), 8, metric), found)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert_same(pycm.topk(q, g, 8, metric), found)
    assert any(event.key == "pycm::topk" for event in profile.key_averages())


class Tagged(torch.Tensor):
    pass


def test_subclasses_and_lazy_views() -> None:
    q, g = pair(6, 70, 12, torch.float32, grad=False)
    want = pycm.topk(q, g, 5)
    tagged = pycm.topk(q.as_subclass(Tagged), g, 5)
    assert_same((tagged.scores.as_subclass(torch.Tensor), tagged.indices.as_subclass(torch.Tensor)), want)
    negated = torch.complex(torch.zeros_like(q), -q).conj().imag
    assert negated.is_neg()
    assert_same(pycm.topk(negated, g, 5), want)
    assert torch.equal(pycm.similarity(negated, g), pycm.similarity(q, g))
    assert torch.equal(pycm.similarity(q, torch.complex(g * 0, -g).conj().imag), pycm.similarity(q, g))
    assert torch.equal(pycm.similarity(q.T.contiguous().T, g), pycm.similarity(q, g))


@pytest.mark.parametrize("known", [True, False])
def test_negated_contiguous_tensors(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch negates lazily: a contiguous tensor may hold the opposite of its memory. With and without the fast path."""
    monkeypatch.setattr("pycm._torch_ops._states_known", known)
    x, y = torch.tensor([[1 + 2j]]).conj().imag, torch.tensor([[3.0]])
    assert x.is_neg()
    assert x.is_contiguous()
    assert pycm.similarity(x, y, "dot").item() == pycm.similarity(y, x, "dot").item() == -6
    assert pycm.topk(x, y, 1, "dot").scores.item() == pycm.topk(y, x, 1, "dot").scores.item() == -6
    whole = torch._neg_view(torch.ones(2, 3))
    assert (pycm.similarity(whole, torch.ones(2, 3)) == -1).all()


def test_without_torchs_private_states_everything_is_an_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pycm._torch_ops._states_known", False)
    q, g = pair(6, 70, 12, torch.float32, grad=False)
    assert not _torch_ops._direct(q, g)
    assert_same(pycm.topk(q, g, 5), pycm.topk(q.numpy(), g.numpy(), 5))
    np.testing.assert_array_equal(pycm.similarity(q, g).numpy(), pycm.similarity(q.numpy(), g.numpy()))


def test_inputs_are_left_alone() -> None:
    q, g = pair(6, 70, 12, torch.float32, grad=False)
    before = copy.deepcopy((q, g))
    pycm.topk(q, g, 5, "pearson", mask=torch.ones(70, dtype=torch.bool), exclude=torch.arange(6))
    pycm.similarity(q, g, "euclidean")
    assert torch.equal(q, before[0])
    assert torch.equal(g, before[1])
    # Results are new memory, writable, and no view of each other.
    scores, indices = pycm.topk(q, g, 5)
    scores.zero_()
    assert indices.any()


# ---- operators as torch wants them ----


@METRIC
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_opcheck(metric: str, dtype: torch.dtype) -> None:
    x, y = pair(dtype=dtype)
    # Gradients are checked by gradcheck above; aot_dispatch compares them too, in fp64.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    if dtype == torch.float64 and metric in ("pearson", "euclidean"):  # the slow part
        checks = (*checks, "test_aot_dispatch_dynamic")
    mask, exclude = torch.rand(4, 9) < 0.8, torch.arange(4)
    offsets = torch.arange(5)
    torch.library.opcheck(torch.ops.pycm.similarity.default, (x, y, metric), test_utils=checks)
    for arguments in ((None, None, None), (mask, None, None), (mask, exclude, offsets)):
        torch.library.opcheck(torch.ops.pycm.topk.default, (x, y, 3, metric, *arguments, "exact"), test_utils=checks)


@METRIC
def test_meta_tensors(metric: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x, y = (
            torch.empty(2, 1, 3, 8, dtype=dtype, device="meta"),
            torch.empty(5, 4, 8, dtype=dtype, device="meta"),
        )
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        scores = pycm.similarity(x, y, metric)
        assert (scores.shape, scores.dtype, scores.device.type) == ((2, 5, 3, 4), wide, "meta")
        found = pycm.topk(x[0, 0], y[0], 2, metric)
        assert (found.scores.shape, found.scores.dtype) == ((3, 2), wide)
        assert (found.indices.shape, found.indices.dtype) == ((3, 2), torch.int64)


def model(q: torch.Tensor, g: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
    found = pycm.topk(q * 2, g, 3, "pearson", mask=mask, exclude=torch.arange(q.shape[0]))
    return pycm.similarity(q, g[found.indices[:, 0]], "euclidean") + 1, found.scores.exp(), found.indices


@pytest.mark.filterwarnings("ignore")
def test_compile_without_a_graph_break() -> None:
    q, g = pair(6, 50, 8, torch.float32)
    mask = torch.rand(50, generator=torch.Generator().manual_seed(2)) < 0.7
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (6, 4, 5):
        ours, want = compiled(q[:rows], g, mask), model(q[:rows], g, mask)
        for a, b in zip(ours, want, strict=True):
            assert torch.equal(a, b)
        grads = [torch.autograd.grad(result[0].sum() + result[1].sum(), (q, g)) for result in (ours, want)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore")
def test_one_graph_for_every_k_and_size() -> None:
    q, g = pair(6, 50, 8, torch.float32, grad=False)
    graphs: list[Any] = []

    def backend(graph: Any, example: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    def scores(a: torch.Tensor, b: torch.Tensor, k: int, mask: torch.Tensor) -> pycm.Matches:
        return pycm.topk(a, b, k, "euclidean", mask=mask, exclude=torch.arange(a.shape[0]))

    mask = torch.rand(50, generator=torch.Generator().manual_seed(2)) < 0.7
    compiled = torch.compile(scores, fullgraph=True, backend=backend, dynamic=True)
    for rows, columns, k in ((6, 50, 3), (6, 50, 5), (5, 40, 2), (4, 30, 30), (3, 45, 7)):
        arguments = (q[:rows].clone(), g[:columns].clone(), k, mask[:columns].clone())
        assert_same(compiled(*arguments), scores(*arguments))
    assert len(graphs) == 1
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore")
def test_compile_with_other_kinds_of_masks() -> None:
    q, g = pair(6, 50, 8, torch.float32, grad=False)
    mask = np.arange(50) % 3 > 0
    want = pycm.topk(q, g, 3, mask=mask)
    for kind in (mask, mask.tolist(), torch.from_numpy(mask)):
        compiled = torch.compile(lambda m: pycm.topk(q, g, 3, mask=m), fullgraph=True, backend="eager")
        assert_same(compiled(kind), want)
        torch.compiler.reset()


def test_backward_without_values() -> None:
    x, y = (torch.zeros(n, 5, device="meta", requires_grad=True) for n in (4, 9))
    for scores in (pycm.similarity(x, y, "euclidean"), pycm.topk(x, y, 3, "pearson").scores):
        grads = torch.autograd.grad(scores.sum(), (x, y))
        assert [grad.shape for grad in grads] == [x.shape, y.shape]


@pytest.mark.filterwarnings("ignore")
def test_export() -> None:
    class Module(torch.nn.Module):
        def forward(self, q: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            found = pycm.topk(q, g, 4, "cosine")
            return pycm.similarity(q, g, "dot").sum(-1), found.indices

    q, g = pair(6, 50, 8, torch.float32, grad=False)
    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(Module(), (q, g), dynamic_shapes={"q": {0: rows}, "g": None})
    targets = [str(node.target) for node in program.graph.nodes]
    assert "pycm.topk.default" in targets
    for count in (6, 3):
        for a, b in zip(program.module()(q[:count], g), Module()(q[:count], g), strict=True):
            assert torch.equal(a, b)


@METRIC
def test_autocast_widens(metric: str) -> None:
    q, g = pair(6, 50, 8, torch.bfloat16, grad=False)
    want = pycm.topk(q.float(), g.float(), 4, metric)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(pycm.topk(q, g, 4, metric), want)
        scores = pycm.similarity(q, g.float(), metric)  # mixed dtypes, as autocast leaves them behind
        product = torch.mm(q, g.T)
        assert product.dtype == torch.bfloat16
        assert_same(pycm.topk(q.float(), g, 4, metric), want)
    assert torch.equal(scores, pycm.similarity(q.float(), g.float(), metric))
    with pytest.raises(TypeError, match="dtype"):
        pycm.similarity(q, g.float(), metric)


@METRIC
def test_vmap(metric: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(3, 4, 6, generator=generator), torch.randn(3, 9, 6, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a loop is taken where no batching rule is registered
        for dims, arguments in (((0, 0), (x, y)), ((0, None), (x, y[0])), ((None, 0), (x[0], y))):
            ours = torch.vmap(lambda a, b: pycm.similarity(a, b, metric), in_dims=dims)(*arguments)
            assert torch.equal(ours, pycm.similarity(*arguments, metric))
        found = torch.vmap(lambda a, b: tuple(pycm.topk(a, b, 2, metric)))(x, y)
    for i in range(3):
        assert_same((found[0][i], found[1][i]), pycm.topk(x[i], y[i], 2, metric))


def test_functional_gradients_are_refused() -> None:
    """torch.func.grad does not reach operators of torch.library (its limit): an error, not a wrong gradient."""
    x, y = pair(dtype=torch.float32, grad=False)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda a: pycm.similarity(a, y).sum())(x)


def test_training_step() -> None:
    """A contrastive step lowers its loss: the gradients point the right way."""
    torch.manual_seed(0)
    images, texts = torch.randn(32, 16), torch.randn(32, 12)
    left, right = torch.nn.Linear(16, 8), torch.nn.Linear(12, 8)
    optimiser = torch.optim.SGD([*left.parameters(), *right.parameters()], lr=0.5)
    losses: list[float] = []
    for _ in range(30):
        logits = 10 * pycm.similarity(left(images), right(texts), "cosine")
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(32))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


# ---- errors ----


def raises(error: type[Exception], words: list[str], call: Any) -> None:
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def test_mixed_devices_are_named() -> None:
    q, g = pair(dtype=torch.float32, grad=False)
    meta = g.to("meta")
    raises(ValueError, ["topk", "gallery", "cpu", "meta"], lambda: pycm.topk(q, meta, 2))
    raises(ValueError, ["topk", "gallery", "meta", "cpu"], lambda: pycm.topk(q.to("meta"), g, 2))
    raises(ValueError, ["similarity", "y", "cpu", "meta"], lambda: pycm.similarity(q, meta))
    mask = torch.ones(9, dtype=torch.bool, device="meta")
    raises(ValueError, ["topk", "mask", "cpu", "meta"], lambda: pycm.topk(q, g, 2, mask=mask))
    raises(
        ValueError,
        ["topk", "exclude", "cpu", "meta"],
        lambda: pycm.topk(q, g, 2, exclude=torch.arange(4, device="meta")),
    )


def test_mixed_devices_in_the_operators() -> None:
    q, g = pair(dtype=torch.float32, grad=False)
    meta = g.to("meta")
    for x, y in ((q, meta), (meta, q)):
        raises(ValueError, ["similarity", "y", "cpu", "meta"], lambda x=x, y=y: torch.ops.pycm.similarity(x, y, "dot"))
    mask, exclude, offsets = torch.ones(9, dtype=torch.bool), torch.arange(4), torch.arange(5)
    call = torch.ops.pycm.topk
    for name, filters in (
        ("gallery", (mask, exclude, offsets)),
        ("mask", (mask.to("meta"), None, None)),
        ("exclude", (None, exclude.to("meta"), offsets)),
        ("exclude_offsets", (mask, exclude, offsets.to("meta"))),
    ):
        rows = meta if name == "gallery" else g
        raises(
            ValueError,
            ["topk", name, "cpu", "meta"],
            lambda rows=rows, filters=filters: call(q, rows, 2, "dot", *filters, "exact"),
        )


@pytest.mark.parametrize("as_kind", [lambda t: t, lambda t: t.numpy(), lambda t: t.tolist()])
def test_the_default_device_changes_nothing(as_kind: Any) -> None:
    q, g = pair(dtype=torch.float32, grad=False)
    exclude, mask = torch.arange(4), torch.arange(9) % 4 > 0
    want = pycm.topk(q, g, 2, mask=mask, exclude=exclude)
    torch.set_default_device("meta")
    try:
        found = pycm.topk(q, g, 2, mask=as_kind(mask), exclude=as_kind(exclude))
        scores = pycm.similarity(q, g)
    finally:
        torch.set_default_device(None)
    assert_same(found, want)
    assert torch.equal(scores, pycm.similarity(q, g))
    found = pycm.topk(q.to("meta"), g.to("meta"), 2, mask=mask.tolist(), exclude=exclude.numpy())
    assert found.indices.is_meta
    pairs = (torch.arange(5), exclude)
    assert_same(pycm.topk(q, g, 2, mask=mask, exclude=pairs), want)
    assert pycm.topk(q.to("meta"), g.to("meta"), 2, exclude=tuple(part.to("meta") for part in pairs)).scores.is_meta


# Arguments of topk that are wrong, as changes to (queries, gallery, k, metric, mask, exclude, offsets, precision).
WRONG: dict[str, dict[int, Any]] = {
    "k above M": {2: 10},
    "k of zero": {2: 0},
    "metric": {3: "nonsense"},
    "precision": {7: "int8"},
    "features": {1: torch.zeros(9, 7)},
    "no features": {0: torch.zeros(4, 0), 1: torch.zeros(9, 0)},
    "empty gallery": {1: torch.zeros(0, 5)},
    "a vector": {0: torch.zeros(5)},
    "a batch": {1: torch.zeros(1, 9, 5)},
    "dtypes": {1: torch.zeros(9, 5).double()},
    "integers": {0: torch.zeros(4, 5, dtype=torch.int32)},
    "complex": {1: torch.zeros(9, 5, dtype=torch.complex64)},
    "mask of floats": {4: torch.ones(9)},
    "mask of queries": {4: torch.ones(4, dtype=torch.bool)},
    "mask transposed": {4: torch.ones(9, 4, dtype=torch.bool)},
    "mask 0-d": {4: torch.ones((), dtype=torch.bool)},
    "exclude floats": {5: torch.zeros(4), 6: torch.arange(5)},
    "exclude 2-d": {5: torch.zeros(2, 2, dtype=torch.int64), 6: torch.arange(5)},
    "offsets short": {5: torch.arange(4), 6: torch.arange(4)},
}


@pytest.mark.parametrize("name", WRONG)
def test_tensors_without_values_are_checked_alike(name: str) -> None:
    """The same error, with the same words, from the kernel and from the shapes alone."""
    arguments = [torch.zeros(4, 5), torch.zeros(9, 5), 2, "dot", None, None, None, "exact"]
    for place, value in WRONG[name].items():
        arguments[place] = value
    meta = [value.to("meta") if isinstance(value, torch.Tensor) else value for value in arguments]
    with pytest.raises((ValueError, TypeError)) as real:
        torch.ops.pycm.topk(*arguments)
    with pytest.raises(real.type) as fake:
        torch.ops.pycm.topk(*meta)
    assert str(fake.value) == str(real.value)
    with FakeTensorMode() as mode, pytest.raises(real.type):
        torch.ops.pycm.topk(*(mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in arguments))


@pytest.mark.parametrize(
    ("x", "y", "metric"),
    [
        ((2, 3), (2, 7), "dot"),
        ((2, 3), (2, 3), "nonsense"),
        ((3,), (2, 3), "dot"),
        ((2, 3), (3,), "dot"),
        ((2, 0), (2, 0), "dot"),
        ((2, 3, 4), (3, 3, 4), "dot"),
    ],
)
def test_similarity_without_values_is_checked_alike(x: Any, y: Any, metric: str) -> None:
    with pytest.raises(ValueError, match="similarity: ") as real:
        torch.ops.pycm.similarity(torch.zeros(x), torch.zeros(y), metric)
    with pytest.raises(ValueError, match="similarity: ") as fake:
        pycm.similarity(torch.zeros(x, device="meta"), torch.zeros(y, device="meta"), metric)
    assert str(fake.value) == str(real.value)


def test_exclude_of_another_size_or_rank() -> None:
    q, g = pair(dtype=torch.float32, grad=False)
    wide = torch.tensor([[0, 1.0] + [0] * 10] * 4).to_sparse_csr()
    raises(ValueError, ["topk", "exclude", "[4, 9]", "[4, 12]"], lambda: pycm.topk(q, g, 2, exclude=wide))
    raises(ValueError, ["exclude", "[4, 9]", "[4, 12]"], lambda: pycm.topk(q.numpy(), g.numpy(), 2, exclude=wide))
    for exclude in (torch.arange(4), [0, 1, 2, 3]):
        words = ["topk", "queries", "[N, D]", "got []"]
        raises(ValueError, words, lambda exclude=exclude: pycm.topk(q[0, 0], g, 2, exclude=exclude))
        raises(ValueError, ["gallery", "[M, D]"], lambda exclude=exclude: pycm.topk(q, g[0], 2, exclude=exclude))
    raises(TypeError, ["k must be an integer", "float"], lambda: pycm.topk(q, g, 2.0, mask=[True] * 9))
    raises(ValueError, ["k must be", str(10**30)], lambda: pycm.topk(q, g, 10**30, mask=[True] * 9))


def test_wrong_tensors_are_named() -> None:
    q, g = pair(dtype=torch.float32, grad=False)
    for bad in (q.int(), q.bool(), q.to(torch.complex64), q.to(torch.uint8)):
        name = str(bad.dtype).removeprefix("torch.")
        raises(
            TypeError,
            ["topk", "queries", "float32", name],
            lambda bad=bad: pycm.topk(bad, g.to(bad.dtype), 2),
        )
        raises(TypeError, ["similarity", "x", name], lambda bad=bad: pycm.similarity(bad, g.to(bad.dtype)))
    raises(TypeError, ["gallery", "float32", "float64"], lambda: pycm.topk(q, g.double(), 2))
    raises(TypeError, ["queries", "gallery"], lambda: pycm.topk(q, g.numpy(), 2))
    raises(TypeError, ["x", "y"], lambda: pycm.similarity(q.numpy(), g))
    raises((TypeError, ValueError), ["queries"], lambda: pycm.topk(q.to_sparse(), g, 2))  # type: ignore[arg-type]
    raises(TypeError, ["mask", "bool"], lambda: pycm.topk(q, g, 2, mask=torch.ones(9)))
    raises(
        ValueError,
        ["mask", "[9]", "[4, 9]"],
        lambda: pycm.topk(q, g, 2, mask=torch.ones(4, dtype=torch.bool)),
    )
    raises(TypeError, ["exclude", "integers"], lambda: pycm.topk(q, g, 2, exclude=torch.ones(4)))
    raises(ValueError, ["exclude", "[4]", "[3]"], lambda: pycm.topk(q, g, 2, exclude=torch.arange(3)))
    raises(ValueError, ["exclude", "9"], lambda: pycm.topk(q, g, 2, exclude=torch.tensor([0, 1, 2, 9])))
    raises(ValueError, ["k must be in [1, 9]", "got 10"], lambda: pycm.topk(q.clone().requires_grad_(), g, 10))
