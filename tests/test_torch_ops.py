"""The torch operators: tracing, transforms, autocast, and the paths that must give the same bits."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
from oracles import METRICS, assert_exact, assert_same
from torch_cases import pair

import pycm

torch = pytest.importorskip("torch")

from pycm import _torch_ops  # noqa: E402

METRIC = pytest.mark.parametrize("metric", METRICS)


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
    monkeypatch.setattr("pycm._torch_arguments._states_known", known)
    x, y = torch.tensor([[1 + 2j]]).conj().imag, torch.tensor([[3.0]])
    assert x.is_neg()
    assert x.is_contiguous()
    assert pycm.similarity(x, y, "dot").item() == pycm.similarity(y, x, "dot").item() == -6
    assert pycm.topk(x, y, 1, "dot").scores.item() == pycm.topk(y, x, 1, "dot").scores.item() == -6
    whole = torch._neg_view(torch.ones(2, 3))
    assert (pycm.similarity(whole, torch.ones(2, 3)) == -1).all()


def test_without_torchs_private_states_everything_is_an_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pycm._torch_arguments._states_known", False)
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
