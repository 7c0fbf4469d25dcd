"""Gradients of the torch operators: right, bounded in memory, and refused where there are none."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracles
import pytest
from oracles import METRICS
from tolerances import GRADCHECK
from torch_cases import pair, plain_similarity, raises

import pycm

torch = pytest.importorskip("torch")
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

METRIC = pytest.mark.parametrize("metric", METRICS)


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
