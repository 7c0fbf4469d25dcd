"""pycm.compat.torch beside torch: the same calls on both."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
from compat_peers import assert_close, assert_same_error, only_pycm, parameters

torch = pytest.importorskip("torch")

import pycm.compat.torch as ours  # noqa: E402

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def rows(*shape: int, seed: int = 0, dtype: Any = torch.float32) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


X, Y = rows(31, 20, seed=1), rows(120, 20, seed=2)


def matmul_then_topk(input: Any, other: Any, k: Any, dim: Any = None, largest: bool = True, sorted: bool = True) -> Any:
    return torch.topk(torch.matmul(input, other), k, -1 if dim is None else dim, largest, sorted)


def test_signatures() -> None:
    assert parameters(ours.cdist) == parameters(torch.cdist)
    names = inspect.signature(ours.matmul_topk).parameters
    assert list(names) == ["input", "other", "k", "dim", "largest", "sorted"]
    assert [p.default for p in names.values()][2:] == [inspect.Parameter.empty, None, True, True]  # as torch.topk says


# ---- cdist ----


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(
    ("x_shape", "y_shape"),
    [((31, 20), (120, 20)), ((1, 1), (1, 1)), ((3, 7, 5), (3, 9, 5)), ((2, 3, 7, 5), (9, 5)), ((7, 5), (4, 9, 5))],
)
@pytest.mark.parametrize("mode", ours._COMPUTE_MODES)
def test_cdist(dtype: Any, x_shape: Any, y_shape: Any, mode: str) -> None:
    x, y = rows(*x_shape, seed=3, dtype=dtype), rows(*y_shape, seed=4, dtype=dtype)
    with only_pycm(torch, "cdist"):
        mine = ours.cdist(x, y, 2, mode)
    assert_close(mine, torch.cdist(x, y, 2, "donot_use_mm_for_euclid_dist"))


@pytest.mark.parametrize("p", [0, 1, 1.5, float("inf")])
def test_cdist_of_other_norms_is_torchs(p: float) -> None:
    assert torch.equal(ours.cdist(X, Y, p), torch.cdist(X, Y, p))


def test_cdist_of_unusual_shapes_is_torchs() -> None:
    for x, y in [(X[:0], Y), (X, Y[:0]), (X[:, :0], Y[:, :0]), (rows(2, 1, 7, 5), rows(3, 9, 5))]:
        assert torch.equal(ours.cdist(x, y), torch.cdist(x, y))


def test_cdist_of_close_rows() -> None:
    """Through a matrix product, torch's default for more than 25 rows, the distances are lost."""
    x = rows(40, 16, dtype=torch.float64) + 1000
    y = x + 1e-2 * rows(40, 16, seed=5, dtype=torch.float64)
    x, y = x.float(), y.float()
    exact = torch.cdist(x.double(), y.double(), 2, "donot_use_mm_for_euclid_dist").diagonal()
    np.testing.assert_allclose(ours.cdist(x, y).diagonal(), exact, rtol=1e-6)
    assert not np.allclose(torch.cdist(x, y).diagonal(), exact, rtol=0.1)
    assert (ours.cdist(x, x).diagonal() == 0).all()


def test_cdist_gradient() -> None:
    gradients = []
    for function in (ours.cdist, torch.cdist):
        x, y = X.double().requires_grad_(), torch.cat([Y, X[:2]]).double().requires_grad_()  # some 0 apart
        (function(x, y) * torch.linspace(-1, 1, len(y))).sum().backward()
        gradients.append((x.grad, y.grad))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    "args",
    [
        (X, Y[:, :3]),
        (X[0], Y),
        (X[:3].half(), Y[:3].half()),
        (X.long(), Y.long()),
        (X, Y.double()),
        (X, Y.numpy()),
        (rows(2, 7, 20), rows(3, 7, 20)),
        (X, Y, -1),
        (X, Y, 2, "none"),
        (X, Y.to_sparse()),
    ],
    ids=["features", "vector", "half", "integers", "dtypes", "numpy", "batches", "norm", "mode", "sparse"],
)
def test_cdist_errors(args: tuple[Any, ...]) -> None:
    assert_same_error(ours.cdist, torch.cdist, *args)


# ---- matmul_topk ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [None, -1, 1, 0, -2])
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("k", [1, 6, 31])
def test_matmul_topk(dtype: Any, dim: int | None, largest: bool, k: int) -> None:
    x, y = X.to(dtype), Y.to(dtype)
    for other in (y.T, y.T.contiguous()):
        with only_pycm(torch, "topk", "matmul"):
            mine = ours.matmul_topk(x, other, k, dim, largest)
        theirs = matmul_then_topk(x.double(), y.double().T, k, dim, largest)
        assert type(mine) is type(theirs) is torch.return_types.topk
        assert mine.values.dtype == dtype
        assert torch.equal(mine.indices, theirs.indices)
        # Rounded once more to the dtype of the inputs.
        torch.testing.assert_close(mine.values.double(), theirs.values, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_matmul_topk_ties_and_nan() -> None:
    gallery = torch.tensor([[1.0], [3.0], [float("nan")], [3.0], [2.0]])
    values, indices = ours.matmul_topk(torch.tensor([[1.0], [-1.0]]), gallery.T, 5)
    assert indices.tolist() == [[1, 3, 4, 0, -1], [0, 4, 1, 3, -1]]
    assert values.tolist() == [[3, 3, 2, 1, -np.inf], [-1, -2, -3, -3, -np.inf]]
    smallest = ours.matmul_topk(torch.tensor([[1.0]]), gallery.T, 5, largest=False)
    assert smallest.indices.tolist() == [[0, 4, 1, 3, -1]]
    assert smallest.values.tolist() == [[1, 2, 3, 3, np.inf]]


@pytest.mark.parametrize("largest", [True, False])
def test_matmul_topk_gradient(largest: bool) -> None:
    gradients = []
    for function in (ours.matmul_topk, matmul_then_topk):
        x, y = X.double().requires_grad_(), Y.double().requires_grad_()
        values = function(x, y.T, 4, largest=largest).values
        (values * torch.linspace(-1, 1, 4)).sum().backward()
        gradients.append((x.grad, y.grad))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_matmul_topk_of_other_shapes_is_torchs() -> None:
    for args in [
        (rows(2, 7, 5), rows(2, 5, 9), 3),
        (X[0], Y.T, 3),
        (X, Y[0], 3, 0),
        (X, Y.T, 0),
        (X[:0], Y.T, 2),
        (X[:, :0], Y[:, :0].T, 1),
        (X.round().long(), Y.round().long().T, 1),
    ]:
        mine, theirs = ours.matmul_topk(*args), matmul_then_topk(*args)
        assert torch.equal(mine.values, theirs.values)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours.matmul_topk(X, Y.T, 3).values.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "args",
    [(X, Y, 3), (X, Y.T, 121), (X, Y.T, -1), (X, Y.T, 1.5), (X, Y.T, 1, 2), (X, Y.double().T, 1), (X, Y.numpy().T, 1)],
    ids=["shapes", "k > M", "k < 0", "k", "dim", "dtypes", "numpy"],
)
def test_matmul_topk_errors(args: tuple[Any, ...]) -> None:
    assert_same_error(ours.matmul_topk, matmul_then_topk, *args)


@pytest.mark.parametrize("name", ["cdist", "matmul_topk"])
def test_traces(name: str) -> None:
    """Compiled into one graph, with the eager backend: nothing is generated."""
    call = (lambda x: ours.cdist(x, Y)) if name == "cdist" else (lambda x: tuple(ours.matmul_topk(x, Y.T, 3)))
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), call(X), rtol=0, atol=0)
