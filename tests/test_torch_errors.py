"""Wrong tensors are named, by the kernels and by the operators without values alike."""

from __future__ import annotations

from typing import Any

import pytest
from oracles import METRICS, assert_same
from torch_cases import pair, raises

import pycm

torch = pytest.importorskip("torch")
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

METRIC = pytest.mark.parametrize("metric", METRICS)


# ---- errors ----


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
