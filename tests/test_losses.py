"""pycm.losses on the CPU against the formulas over the whole matrix, in torch and fp64."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from loss_cases import KINDS, LEFT_OUT, MARGIN, METRICS, actual, expected, gradients, problem, scores  # noqa: E402
from tolerances import GRADCHECK, LOSS  # noqa: E402

from pycm import losses  # noqa: E402


def check(kind: str, case: dict[str, Any], metric: str, tolerance: float) -> None:
    exact = {k: v.detach().double().requires_grad_() if v.is_floating_point() else v for k, v in case.items()}
    wanted = gradients(expected(kind, **exact, metric=metric), exact)
    found = gradients(actual(kind, **case, metric=metric), case)
    for name, value in wanted.items():
        assert found[name].dtype == case["queries"].dtype
        scale = max(float(value.abs().max()), 0.1)
        error = float((found[name].double() - value).abs().max()) / scale
        assert error <= tolerance, f"{name}: {error:.1e} of {scale:.1e}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
def test_values_and_gradients(kind: str, metric: str, level: str) -> None:
    for n, dim in ((1, 3), (2, 5), (3, 4), (15, 17), (33, 16), (65, 31), (131, 12)):
        for left_out in LEFT_OUT if kind != "listed" else [""]:
            check(kind, problem(n, dim, kind, torch.float64, left_out, seed=n), metric, LOSS["float64"])
            check(kind, problem(n, dim, kind, torch.float32, left_out, seed=n), metric, LOSS["float32"])


@pytest.mark.parametrize("left_out", LEFT_OUT[1:])
@pytest.mark.parametrize("kind", KINDS[:-1])
def test_several_blocks(kind: str, left_out: str) -> None:
    check(kind, problem(2051, 5, kind, torch.float64, left_out), "cosine", LOSS["float64"])


@pytest.mark.parametrize("left_out", LEFT_OUT)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, left_out: str) -> None:
    case = problem(9, 4, kind, torch.float64, left_out if kind != "listed" else "")
    rest = {k: v for k, v in case.items() if not v.is_floating_point()}

    def loss(*leaves: Any) -> Any:
        return actual(kind, *leaves, **rest)

    leaves = tuple(v for v in case.values() if v.is_floating_point())
    used = leaves if kind == "sigmoid" else leaves[:3] if kind == "info_nce" else leaves[:2]
    assert torch.autograd.gradcheck(loss, used, **GRADCHECK)


@pytest.mark.parametrize("kind", KINDS)
def test_no_bit_depends_on_threads(kind: str) -> None:
    case = problem(700, 48, kind, torch.float32, "ignored" if kind != "listed" else "")
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(gradients(actual(kind, **case), case))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


def test_only_wanted_gradients_change_nothing() -> None:
    for kind in KINDS:
        case = problem(40, 8, kind, torch.float32)
        every = gradients(actual(kind, **case), case)
        for name in ("queries", "gallery", "temperature", "bias"):
            if not every[name].any():
                continue
            alone = {k: v.detach() if v.is_floating_point() and k != name else v for k, v in case.items()}
            (found,) = torch.autograd.grad(actual(kind, **alone), [case[name]])
            assert torch.equal(found, every[name]), (kind, name)
        with torch.no_grad():
            assert torch.equal(actual(kind, **case), every["loss"])


# ---- what is special ----


def test_ties_go_to_the_lowest_index() -> None:
    """Rows of few small integers: most maxima are shared."""
    torch.manual_seed(0)
    for n in (7, 50, 2100):
        queries, gallery = (torch.randint(-1, 2, (n, 3), dtype=torch.float32).requires_grad_() for _ in range(2))
        s = queries @ gallery.T
        negatives = s.detach().numpy().copy()
        np.fill_diagonal(negatives, -np.inf)
        rows, columns = negatives.argmax(1), negatives.argmax(0)  # NumPy's is the first
        numbers = np.arange(n)
        costs = (MARGIN + s[numbers, rows] - s.diagonal(), MARGIN + s[columns, numbers] - s.diagonal())
        wanted = sum(cost.clamp(min=0).sum() for cost in costs)
        loss = losses.max_hinge(queries, gallery, margin=MARGIN, metric="dot", reduction="sum")
        torch.testing.assert_close(loss, wanted)
        for found, part in zip(
            torch.autograd.grad(loss, (queries, gallery)), torch.autograd.grad(wanted, (queries, gallery)), strict=True
        ):
            torch.testing.assert_close(found, part)


def test_a_duplicate_of_the_positive_is_not_below_it() -> None:
    torch.manual_seed(0)
    for n in (3, 40, 67):  # tiles and tails
        gallery = torch.randn(1, 19).expand(n, 19)
        assert losses.triplet(torch.randn(n, 19), gallery, margin=1.0) > 0  # the columns' negatives differ
        assert losses.triplet(gallery, gallery, margin=1.0) == 0


def test_one_row_and_one_group_have_no_negatives() -> None:
    for n in (1, 30):
        q, g = torch.randn(n, 6, requires_grad=True), torch.randn(n, 6, requires_grad=True)
        groups = torch.zeros(n, dtype=torch.int64)
        for kind in ("max_hinge", "sum_hinge", "semi_hard", "info_nce"):
            loss = actual(kind, q, g, groups=groups)
            assert loss == 0
            assert not any(part.any() for part in torch.autograd.grad(loss, (q, g)))
        positive = torch.nn.functional.cosine_similarity(q, g) / 0.4 - 1
        torch.testing.assert_close(
            actual("sigmoid", q, g, groups=groups), -torch.nn.functional.logsigmoid(positive).mean()
        )


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_groups_are_ignored_pairs(kind: str) -> None:
    for n in (20, 2051):
        case = problem(n, 6, kind, torch.float32, "groups")
        groups = case.pop("groups")
        pairs = torch.nonzero(groups[:, None] == groups)
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]
        wanted = gradients(actual(kind, **case, groups=groups), case)
        for order in (pairs, pairs[torch.randperm(len(pairs))].repeat(2, 1)):
            found = gradients(actual(kind, **case, ignored=order), case)
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        none = torch.empty(2, 0, dtype=torch.int64).T  # whose strides say nothing
        assert torch.equal(actual(kind, **case, ignored=none), actual(kind, **case))


def test_what_is_right_for_all_is_no_group_of_all() -> None:
    """One caption of every image takes that column's negatives alone."""
    torch.manual_seed(0)
    q, g = torch.randn(8, 5, requires_grad=True), torch.randn(8, 5)
    pairs = torch.tensor([(i, 0) for i in range(1, 8)])
    for kind in KINDS[:-1]:
        assert actual(kind, q, g, ignored=pairs) > 0
    (grad,) = torch.autograd.grad(losses.max_hinge(q, g, margin=3.0, hardest=False, ignored=pairs), q)
    others = [losses.max_hinge(q[1:], g[1:], margin=3.0, hardest=False, reduction="sum")]
    s = scores(q, g, "cosine")  # query 0 keeps its negatives; the others are its negatives in their columns
    others += [(3 + s[0, 1:] - s[0, 0]).sum() + (3 + s[0, 1:] - s.diagonal()[1:]).sum()]
    torch.testing.assert_close(grad, torch.autograd.grad(sum(others) / 8, q)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_nan_reaches_the_loss(kind: str) -> None:
    for n, row in ((1, 0), (35, 0), (35, 34), (2100, 1500)):
        for side in ("queries", "gallery"):
            case = problem(n, 4, kind, torch.float32)
            with torch.no_grad():
                case[side][row, 1] = torch.nan
            assert torch.isnan(actual(kind, **case)), (n, row, side)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_rows_score_zero_and_have_no_gradient(kind: str) -> None:
    case = problem(20, 5, kind, torch.float32)
    with torch.no_grad():
        case["queries"][3] = 0
        case["gallery"][7] = 0
    found = gradients(actual(kind, **case), case)
    assert not found["queries"][3].any()
    assert not found["gallery"][7].any()
    assert all(torch.isfinite(part).all() for part in found.values())
    # Their scores are 0: the same loss as of rows at a right angle to all others.
    wide = {
        k: torch.nn.functional.pad(v.detach(), (0, 2)) if v.ndim == 2 and v.is_floating_point() else v
        for k, v in case.items()
    }
    wide["queries"][3, 5] = wide["gallery"][7, 6] = 1
    torch.testing.assert_close(actual(kind, **wide).detach(), found["loss"])


def test_extreme_temperatures_do_not_overflow() -> None:
    for temperature in (1e-4, 1e-2, 1e3):
        for kind in ("info_nce", "sigmoid"):
            case = problem(50, 6, kind, torch.float32)
            case["temperature"] = torch.tensor(temperature, requires_grad=True)
            check(kind, case, "cosine", 20 * LOSS["float32"] if temperature < 1e-3 else LOSS["float32"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_is_computed_in_float32(kind: str, dtype: Any) -> None:
    case = problem(40, 24, kind, torch.float32)
    low = {
        k: v.detach().to(dtype).requires_grad_() if v.ndim == 2 and v.is_floating_point() else v
        for k, v in case.items()
    }
    high = {k: v.detach().float().requires_grad_() if v.dtype == dtype else v for k, v in low.items()}
    found, wanted = gradients(actual(kind, **low), low), gradients(actual(kind, **high), high)
    assert found["loss"].dtype == torch.float32
    assert torch.equal(found["loss"], wanted["loss"])
    for side in ("queries", "gallery"):
        assert found[side].dtype == dtype
        assert torch.equal(found[side], wanted[side].to(dtype))


def test_any_strides() -> None:
    for kind in KINDS:
        case = problem(30, 8, kind, torch.float32)
        strided = dict(case)
        for side in ("queries", "gallery"):
            strided[side] = case[side].detach().T.contiguous().T.requires_grad_()
        found, wanted = gradients(actual(kind, **strided), strided), gradients(actual(kind, **case), case)
        assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_given_negatives_may_be_rows_beyond_the_pairs() -> None:
    torch.manual_seed(0)
    q, g = torch.randn(4, 6, requires_grad=True), torch.randn(9, 6, requires_grad=True)
    negatives = torch.tensor([[8, 4], [5, -1], [0, 3], [-1, -1]])
    loss = losses.triplet(q, g, margin=MARGIN, negatives=negatives)
    s = scores(q, g, "cosine")
    costs = [MARGIN + s[i, j] - s[i, i] for i, row in enumerate(negatives.tolist()) for j in row if j >= 0]
    wanted = torch.stack(costs).clamp(min=0).mean()
    torch.testing.assert_close(loss, wanted)
    for found, part in zip(torch.autograd.grad(loss, (q, g)), torch.autograd.grad(wanted, (q, g)), strict=True):
        torch.testing.assert_close(found, part)


def test_memory_is_no_matrix() -> None:
    """8,000 x 8,000 scores would be 256 MB."""
    code = """
import resource, torch
from pycm import losses
q, g = (torch.randn(8_000, 8, requires_grad=True) for _ in range(2))
losses.info_nce(q[:9], g[:9]).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
losses.info_nce(q, g).backward()
losses.max_hinge(q, g, hardest=False).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 32 * 1024  # kilobytes: an eighth of it
