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
