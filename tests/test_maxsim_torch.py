"""maxsim as a torch operator: the same bits as NumPy, gradients, tracing, autocast, errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from interaction_cases import COUNTS, OTHER_COUNTS, forms, make, padded, ways
from oracles import assert_same
from tolerances import GRADCHECK
from torch_cases import raises

import pycm

torch = pytest.importorskip("torch")

WAY = pytest.mark.parametrize("way", list(ways()), ids=lambda way: "-".join(way.values()))


def as_torch(value: Any) -> Any:
    """Every array of a form as a tensor."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value)) if min(value.strides) < 0 else torch.from_numpy(value)
    return type(value)(as_torch(v) for v in value) if isinstance(value, (tuple, list)) else value


def tensors(counts: list[int], dim: int, seed: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    arrays = make(counts, dim, seed, np.float64)
    return [torch.empty(x.shape, dtype=dtype).copy_(torch.from_numpy(x)).requires_grad_() for x in arrays]


def plain_maxsim(queries: Any, gallery: Any, metric: str, reduce: str, direction: str) -> torch.Tensor:
    """In torch's own differentiable operations."""
    rows = []
    for x in queries:
        for y in gallery:
            total = (x.sum() + y.sum()) * 0
            if len(x) and len(y):
                a, b = (v / v.norm(dim=-1, keepdim=True) if metric == "cosine" else v for v in (x, y))
                s = a @ b.T
                ends = {"t2i": (s.amax(1),), "i2t": (s.amax(0),), "both": (s.amax(1), s.amax(0))}
                for best in ends[direction]:
                    total = total + (best.mean() if reduce == "mean" else best.sum())
            rows.append(total)
    return torch.stack(rows).reshape(len(queries), len(gallery))


# ---- values ----


@WAY
def test_the_same_bits_as_numpy(way: dict[str, str]) -> None:
    q, g = make(COUNTS, 24), make(OTHER_COUNTS, 24)
    want, found = pycm.maxsim(q, g, **way), pycm.maxsim_topk(q, g, 4, **way)
    for (name, a, a_lengths), (_, b, b_lengths) in zip(forms(q), forms(g), strict=True):
        arguments = [as_torch(a), as_torch(b)]
        lengths = [as_torch(a_lengths), as_torch(b_lengths)]
        scores = pycm.maxsim(*arguments, *lengths, **way)
        assert isinstance(scores, torch.Tensor)
        np.testing.assert_array_equal(scores.numpy(), want, name)
        assert_same(pycm.maxsim_topk(*arguments, 4, *lengths, **way), found, name)


def test_bfloat16_is_widened() -> None:
    q, g = (torch.from_numpy(padded(make(counts, 40))[0]).bfloat16() for counts in (COUNTS, OTHER_COUNTS))
    lengths = [torch.tensor(counts) for counts in (COUNTS, OTHER_COUNTS)]
    for way in ways():
        assert torch.equal(pycm.maxsim(q, g, *lengths, **way), pycm.maxsim(q.float(), g.float(), *lengths, **way))
        assert_same(
            pycm.maxsim_topk(q, g, 3, *lengths, **way), pycm.maxsim_topk(q.float(), g.float(), 3, *lengths, **way)
        )


def test_bfloat16_where_it_lies(level: str) -> None:
    """Rows at odd places, strides, runs longer than a screen's, what bf16 arithmetic flushes or cannot hold."""
    generator = torch.Generator().manual_seed(3)
    q, wide = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((3, 40, 66), (5, 500, 70)))
    hard = wide[..., :66].contiguous()
    hard[2, 450, 3], hard[3], hard[4] = torch.nan, hard[3] * 1e-39, hard[4] * 1e30
    for g in (hard, wide[..., :66], wide[..., 1:67], wide[:, ::3, 2:68], wide[..., :65]):
        x = q[..., : g.shape[2]]
        torch.testing.assert_close(pycm.maxsim(x, g), pycm.maxsim(x.float(), g.float()), rtol=0, atol=0, equal_nan=True)


def test_lengths_of_any_kind() -> None:
    x = torch.randn(3, 5, 8)
    want = pycm.maxsim(x, x, torch.tensor([1, 5, 0]))
    for lengths in (
        [1, 5, 0],
        np.array([1, 5, 0]),
        torch.tensor([1, 5, 0], dtype=torch.int32),
        torch.tensor([1, 9, 5, 9, 0])[::2],
    ):
        assert torch.equal(pycm.maxsim(x, x, lengths), want)


# ---- gradients ----


@WAY
def test_gradcheck(way: dict[str, str]) -> None:
    q, g = tensors([3, 0, 5, 1], 6, 1), tensors([4, 7, 0, 2, 1], 6, 2)

    def scores(*items: torch.Tensor) -> Any:
        return pycm.maxsim(list(items[:4]), list(items[4:]), **way)

    def best(*items: torch.Tensor) -> Any:
        return pycm.maxsim_topk(list(items[:4]), list(items[4:]), 3, **way).scores

    assert torch.autograd.gradcheck(scores, (*q, *g), **GRADCHECK)
    assert torch.autograd.gradcheck(best, (*q, *g), **GRADCHECK)


@WAY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_are_torchs(level: str, dtype: torch.dtype, way: dict[str, str]) -> None:
    q, g = tensors(COUNTS, 33, 3, dtype), tensors(OTHER_COUNTS, 33, 4, dtype)
    weights = torch.randn(len(q), len(g), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    weights[::2, 1::3] = 0
    scores = pycm.maxsim(q, g, **way)
    got = torch.autograd.grad((scores * weights).sum(), (*q, *g))
    wide = [x.detach().double().requires_grad_() for x in (*q, *g)]
    want = torch.autograd.grad((plain_maxsim(wide[: len(q)], wide[len(q) :], **way) * weights).sum(), wide)
    limit = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        scale = max(1.0, float(b.abs().max()) if b.numel() else 0.0)
        assert (a.double() - b).abs().max() <= limit * scale if b.numel() else True


def test_gradient_of_padding_is_zero_and_of_one_side_alone() -> None:
    (q, q_lengths), (g, g_lengths) = (padded(make(counts, 9), 70) for counts in (COUNTS, OTHER_COUNTS))
    x, y = torch.from_numpy(q).requires_grad_(), torch.from_numpy(g).requires_grad_()
    for way in ways():
        pair = torch.autograd.grad(pycm.maxsim(x, y, q_lengths, g_lengths, **way).sum(), (x, y))
        for grad, lengths in zip(pair, (q_lengths, g_lengths), strict=True):
            outside = torch.arange(70) >= torch.from_numpy(lengths)[:, None]
            assert not grad[outside].any()
            assert grad[~outside].any()
        for side in (0, 1):
            one = [x.detach(), y.detach()]
            one[side] = (x, y)[side]
            scores = pycm.maxsim(*one, q_lengths, g_lengths, **way)
            assert torch.equal(torch.autograd.grad(scores.sum(), one[side])[0], pair[side])


def test_the_first_of_equal_maxima_has_the_gradient(level: str) -> None:
    x = torch.tensor([[[1.0, 0.0]]], requires_grad=True)
    rows = torch.zeros(1, 40, 2)
    rows[0, [7, 8, 30], 0] = 2
    rows[0, :, 1] = torch.arange(40.0)
    y = rows.clone().requires_grad_()
    grad_x, grad_y = torch.autograd.grad(pycm.maxsim(x, y).sum(), (x, y))
    assert grad_y[0, :, 0].nonzero().tolist() == [[7]]
    assert grad_x.tolist() == [[[2.0, 7.0]]]


@WAY
@pytest.mark.usefixtures("threads")
def test_threads_change_no_bit_of_a_gradient(way: dict[str, str]) -> None:
    q, g = torch.randn(90, 20, 48, requires_grad=True), torch.randn(70, 15, 48, requires_grad=True)
    results = []
    for count in (1, 2, 5, 2):
        pycm.set_num_threads(count)
        results.append(torch.autograd.grad(pycm.maxsim(q, g, **way).square().sum(), (q, g)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_gradient_where_the_product_overflows_in_float32() -> None:
    """It goes to the vector with the largest product all the same."""
    x = torch.tensor([[[1e20, 1.0]]], requires_grad=True)
    y = torch.tensor([[[1.0, 1.0], [1e19, 2.0], [2e19, 3.0]]], requires_grad=True)
    (grad,) = torch.autograd.grad(pycm.maxsim(x, y).sum(), x)
    assert torch.equal(grad[0, 0], y[0, 2])


def test_second_derivatives_are_refused() -> None:
    q, g = tensors([3], 4, 6), tensors([5], 4, 7)
    (grad,) = torch.autograd.grad(pycm.maxsim(q, g).square().sum(), q, create_graph=True)
    raises(NotImplementedError, ["maxsim", "second derivatives"], lambda: grad.sum().backward())


def test_forward_mode_is_refused() -> None:
    x = torch.randn(2, 3, 4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        raises(NotImplementedError, ["maxsim", "queries", "tangent"], lambda: pycm.maxsim(dual, x))
        raises(NotImplementedError, ["maxsim_topk", "gallery", "tangent"], lambda: pycm.maxsim_topk(x, dual, 1))


# ---- transforms ----


def arguments(dtype: torch.dtype = torch.float32, grad: bool = True) -> tuple[Any, ...]:
    """Padded queries, a ragged gallery."""
    q = torch.randn(3, 5, 8, dtype=dtype, requires_grad=grad)
    g = torch.randn(9, 8, dtype=dtype, requires_grad=grad)
    return q, torch.tensor([5, 0, 3]), None, g, None, torch.tensor([0, 4, 4, 9])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype: torch.dtype) -> None:
    way = ("cosine", "mean", "both")
    torch.library.opcheck(torch.ops.pycm.maxsim, (*arguments(dtype), *way))
    torch.library.opcheck(torch.ops.pycm.maxsim_topk, (*arguments(dtype), 2, *way, "exact"))
    scores = torch.randn(3, 3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for needs in ((True, True), (False, True), (True, False)):
        call = (scores, *arguments(dtype, grad=False), *way, *needs)
        torch.library.opcheck(torch.ops.pycm.maxsim_backward, call)


def test_compile_and_export() -> None:
    q, lengths, _, g, _, offsets = arguments()

    def loss(q: Any, lengths: Any, g: Any, offsets: Any) -> Any:
        return pycm.maxsim(q, (g, offsets), lengths, metric="cosine").square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(loss(q, lengths, g, offsets), (q, g))
    got = torch.autograd.grad(compiled(q, lengths, g, offsets), (q, g))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

    class Model(torch.nn.Module):
        def forward(self, q: Any, lengths: Any, g: Any, offsets: Any) -> Any:
            return pycm.maxsim_topk(q, (g, offsets), 2, lengths).scores

    inputs = (q.detach(), lengths, g.detach(), offsets)
    exported = torch.export.export(Model(), inputs).module()
    assert torch.equal(exported(*inputs), Model()(*inputs))


def test_autocast_widens() -> None:
    q, g = torch.randn(2, 3, 8), torch.randn(4, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        half = torch.nn.functional.linear(q, torch.eye(8))
        assert half.dtype == torch.bfloat16
        assert torch.equal(pycm.maxsim(half, g), pycm.maxsim(half.float(), g))


# ---- errors ----


def test_errors_without_values() -> None:
    """Tensors without values get the kernels' errors."""
    for device in ("cpu", "meta"):
        x = torch.ones(2, 3, 4, device=device)
        for error, words, call in (
            (ValueError, ["gallery must have shape [items, T, D], got [3, 4]"], lambda x=x: pycm.maxsim(x, x[0])),
            (ValueError, ["gallery must have the queries' 4 features"], lambda x=x: pycm.maxsim(x, x[..., :2])),
            (TypeError, ["gallery must have the queries' dtype float32"], lambda x=x: pycm.maxsim(x, x.double())),
            (TypeError, ["queries must be float32", "int64"], lambda x=x: pycm.maxsim(x.long(), x)),
            (ValueError, ["query_lengths must have shape [2], got [3]"], lambda x=x: pycm.maxsim(x, x, [1, 1, 1])),
            (TypeError, ["query_lengths must hold integers"], lambda x=x: pycm.maxsim(x, x, x[:, 0, 0])),
            (ValueError, ["metric"], lambda x=x: pycm.maxsim(x, x, metric="euclidean")),
            (ValueError, ["reduce must be sum or mean, got 'max'"], lambda x=x: pycm.maxsim(x, x, reduce="max")),
            (ValueError, ["direction must be t2i, i2t or both"], lambda x=x: pycm.maxsim(x, x, direction="no")),
            (ValueError, ["maxsim_topk: k must be in [1, 2], got 3"], lambda x=x: pycm.maxsim_topk(x, x, 3)),
            (ValueError, ["precision must be exact"], lambda x=x: pycm.maxsim_topk(x, x, 1, precision="no")),
        ):
            raises(error, words, call)


def test_kinds_and_devices_do_not_mix() -> None:
    x = torch.ones(2, 3, 4)
    raises(TypeError, ["maxsim", "must be of one kind"], lambda: pycm.maxsim(x, x.numpy()))
    raises(ValueError, ["gallery", "device cpu", "meta"], lambda: pycm.maxsim(x, x.to("meta")))
    raises(ValueError, ["query_lengths", "device cpu", "meta"], lambda: pycm.maxsim(x, x, torch.ones(2, device="meta")))
    raises(TypeError, ["queries[1] must be a torch tensor"], lambda: pycm.maxsim([x[0], x[0].numpy()], x))
