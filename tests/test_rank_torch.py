"""rank of torch tensors and DLPack arrays: the operator traces, and gives the bits that NumPy gets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from oracles import METRICS
from pair_oracles import counts, table
from test_functional import OnGPU, OnlyDLPack
from test_rank import assert_counts, owners, random_rows
from torch_cases import pair

from pycm.ranking import Ranks, rank

torch = pytest.importorskip("torch")

METRIC = pytest.mark.parametrize("metric", METRICS)


def assert_same(got: Ranks, want: Ranks) -> None:
    for ours, theirs in zip(got, want, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@METRIC
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_tensors(level: str, metric: str, dtype: torch.dtype) -> None:
    q, g = pair(30, 500, 40, dtype, grad=False)
    rng = np.random.default_rng(0)
    offsets, indices = random_rows(rng, 30, 500, 3)
    mask = rng.random((30, 500)) < 0.7
    got = rank(q, g, (torch.from_numpy(offsets), torch.from_numpy(indices)), metric, mask=torch.from_numpy(mask))
    assert all(isinstance(part, torch.Tensor) for part in got)
    assert got.ranks.dtype == torch.float64
    assert_counts(got, counts(table(q, g, metric), owners(offsets), indices, metric, mask))
    assert_same(rank(q, g, (offsets, indices), metric, mask=mask.tolist()), got)
    one = rank(q, g, torch.arange(30, dtype=torch.int16), metric, exclude=torch.arange(30))
    assert one.offsets is None
    assert_counts(one, counts(table(q, g, metric), np.arange(30), np.arange(30), metric))


def test_large_ranks_are_not_rounded_to_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond 2^24, where float32, torch's default dtype for such sums, has no halves."""
    found = torch.tensor([1 << 24]), torch.tensor([3]), torch.ones(1), None
    monkeypatch.setattr("pycm._torch_ops.rank", lambda *arguments: found)
    x, _ = pair(1, 1, 1)
    assert rank(x, x, torch.zeros(1, dtype=torch.long)).ranks.item() == (1 << 24) + 1.5


def test_no_gradient_and_no_lost_tangent() -> None:
    q, g = pair(4, 9, 5)
    got = rank(q, g, torch.arange(4))
    assert not any(part.requires_grad for part in got if part is not None)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q.detach(), torch.ones_like(q))
        with pytest.raises(NotImplementedError, match="rank: queries has a forward-mode tangent"):
            rank(dual, g.detach(), torch.arange(4))


def test_lazy_views_and_layouts() -> None:
    q, g = pair(6, 70, 12, torch.float32, grad=False)
    want = rank(q, g, torch.arange(6))
    negated = torch.complex(torch.zeros_like(q), -q).conj().imag
    assert negated.is_neg()
    assert_same(rank(negated, g, torch.arange(6)), want)
    assert_same(rank(q.T.contiguous().T, g, torch.arange(12)[::2] // 2), want)


@METRIC
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_opcheck(metric: str, dtype: torch.dtype) -> None:
    x, y = pair(dtype=dtype)
    offsets, positives = torch.tensor([0, 2, 2, 3, 5]), torch.tensor([1, 2, 8, 0, 1])
    mask, exclude = torch.rand(4, 9, generator=torch.Generator().manual_seed(0)) < 0.8, torch.arange(4)
    for filters in ((None, None, None), (mask, None, None), (mask[0], exclude, torch.arange(5))):
        arguments = (x, y, positives, offsets, metric, *filters, "auto")
        torch.library.opcheck(
            torch.ops.pycm.rank.default,
            arguments,
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


def test_meta_tensors() -> None:
    for dtype, wide in (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ):
        q, g = torch.empty(3, 8, dtype=dtype, device="meta"), torch.empty(9, 8, dtype=dtype, device="meta")
        got = rank(q, g, torch.empty(3, dtype=torch.long, device="meta"))
        assert (got.ranks.shape, got.ranks.dtype, got.ranks.device.type) == ((3,), torch.float64, "meta")
        assert (got.scores.shape, got.scores.dtype) == ((3,), wide)
        several = torch.empty(4, dtype=torch.long, device="meta"), torch.empty(7, dtype=torch.long, device="meta")
        assert rank(q, g, several).greater.shape == (7,)


@pytest.mark.filterwarnings("ignore")
def test_compile_without_a_graph_break() -> None:
    q, g = pair(6, 50, 8, torch.float32, grad=False)
    mask = torch.rand(50, generator=torch.Generator().manual_seed(2)) < 0.7

    def mean_rank(a: torch.Tensor, b: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
        return rank(a, b, positives, "euclidean", mask=mask).ranks.mean()

    compiled = torch.compile(mean_rank, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (6, 4, 5):
        arguments = (q[:rows], g, torch.arange(rows) + 7)
        assert torch.equal(compiled(*arguments), mean_rank(*arguments))
    torch.compiler.reset()


@METRIC
def test_autocast_widens(metric: str) -> None:
    q, g = pair(6, 50, 8, torch.bfloat16, grad=False)
    want = rank(q.float(), g.float(), torch.arange(6), metric)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(rank(q, g.float(), torch.arange(6), metric), want)


def test_dlpack() -> None:
    q, g = (part.numpy() for part in pair(5, 40, 6, torch.float32, grad=False))
    assert_same(rank(OnlyDLPack(q), OnlyDLPack(g), [1, 2, 3, 4, 5]), rank(q, g, [1, 2, 3, 4, 5]))  # type: ignore[type-var]
    with pytest.raises(NotImplementedError, match="rank: gallery is on DLPack device type 2"):
        rank(q, OnGPU(g), [1, 2, 3, 4, 5])  # type: ignore[type-var]


def test_errors() -> None:
    q, g = pair(4, 9, 5, torch.float32, grad=False)
    meta = (
        torch.empty(4, 5, device="meta"),
        torch.empty(9, 5, device="meta"),
        torch.empty(4, dtype=torch.long, device="meta"),
    )
    calls: list[tuple[Any, type[Exception], str]] = [
        (lambda: rank(q, g.numpy(), [0] * 4), TypeError, "rank: queries and gallery must be of one kind"),
        (lambda: rank(q, g, torch.zeros(4)), TypeError, "rank: positives must hold integers, got float32"),
        (lambda: rank(q, g, torch.zeros(3, dtype=torch.long)), ValueError, r"rank: positives .*\[4\], got \[3\]"),
        (lambda: rank(q, g, torch.full((4,), 9)), ValueError, r"rank: positives must be in \[0, 9\), got 9"),
        (lambda: rank(q, g, meta[2]), ValueError, "rank: positives must be on queries's device cpu, got meta"),
        (lambda: rank(q * float("nan"), g, torch.arange(4)), ValueError, "rank: .*NaN"),
        (lambda: rank(*meta, "l2"), ValueError, "rank: metric must be one of"),  # type: ignore[arg-type]
        (lambda: rank(meta[0], meta[1][:, :3], meta[2]), ValueError, "rank: gallery must have the queries' 5 features"),
        (lambda: rank(meta[0], meta[1][:0], meta[2]), ValueError, "rank: gallery must have at least one row"),
        (
            lambda: rank(meta[0], meta[1], (meta[2], meta[2])),
            ValueError,
            r"rank: positives must have offsets of .*\[5\]",
        ),
    ]
    for call, error, message in calls:
        with pytest.raises(error, match=message):
            call()
