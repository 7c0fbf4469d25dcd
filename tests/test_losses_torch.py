"""pycm.losses as torch sees them: compiled, under autocast, as modules, on CUDA; and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from loss_cases import KINDS, LEFT_OUT, METRICS, actual, gradients, problem  # noqa: E402
from tolerances import LOSS  # noqa: E402

from pycm import _torch_losses_tiled, losses  # noqa: E402

OPERATOR = torch.ops.pycm.contrastive


def arguments(kind: str, metric: str, n: int, left_out: str, dtype: Any) -> tuple[Any, ...]:
    case = problem(n, 5, kind, dtype, left_out)
    scale = 1 / case["temperature"].detach()
    parts = (case["queries"], case["gallery"], scale.requires_grad_(), case["bias"])
    return (
        *parts,
        case.get("groups"),
        case.get("ignored"),
        case.get("negatives"),
        "loss",
        kind,
        metric,
        0.2,
        True,
        True,
        True,
    )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_tiles_of_cuda_tensors(kind: str, metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their operations are torch's own, which run here as well."""
    monkeypatch.setattr(_torch_losses_tiled, "BLOCK", 300)
    for n, left_out in (
        (1, ""),
        (2, ""),
        *((61, left_out) for left_out in LEFT_OUT if kind != "listed" or not left_out),
    ):
        args = arguments(kind, metric, n, left_out, torch.float64)
        with torch.no_grad():
            found, wanted = _torch_losses_tiled.contrastive_tiled(_torch_losses_tiled.Arguments(*args)), OPERATOR(*args)
        used = len(wanted) if kind == "sigmoid" else 4 if kind == "info_nce" else 3
        for one, other in zip(found[:used], wanted[:used], strict=True):
            torch.testing.assert_close(one, other, rtol=LOSS["float64"], atol=LOSS["float64"])


@pytest.mark.parametrize("left_out", LEFT_OUT)
@pytest.mark.parametrize("kind", KINDS)
def test_cuda(kind: str, left_out: str, gpu: Any) -> None:
    case = problem(300, 17, kind, torch.float32, left_out if kind != "listed" else "")
    there = {k: v.detach().to(gpu).requires_grad_(v.requires_grad) for k, v in case.items()}
    found, wanted = gradients(actual(kind, **there), there), gradients(actual(kind, **case), case)
    for name, value in wanted.items():
        scale = float(value.abs().max()) + 1e-6
        assert float((found[name].cpu() - value).abs().max()) <= LOSS["float32"] * scale, name


@pytest.mark.parametrize("kind", KINDS)
def test_operator(kind: str) -> None:
    for left_out in LEFT_OUT if kind == "info_nce" else [""]:
        torch.library.opcheck(OPERATOR, arguments(kind, "cosine", 6, left_out, torch.float32))


def test_compile() -> None:
    for kind, left_out in (("max_hinge", "groups"), ("sigmoid", "groups"), ("max_hinge", "ignored")):
        case = problem(40, 8, kind, torch.float32, left_out)

        def step(case: dict[str, Any], kind: str = kind, left_out: str = left_out) -> Any:
            return 3 * actual(kind, case["queries"] * 2, case["gallery"], 0.3, -1.0, **{left_out: case[left_out]})

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        found, wanted = gradients(compiled(case), case), gradients(step(case), case)
        for name, value in wanted.items():
            assert torch.equal(found[name], value), (kind, name)


def test_autocast_computes_in_float32() -> None:
    q, g = torch.randn(20, 8), torch.randn(20, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(losses.info_nce(q, g), losses.info_nce(q, g))
        low = losses.info_nce(q.bfloat16(), g.bfloat16())
    assert low.dtype == torch.float32
    assert torch.equal(low, losses.info_nce(q.bfloat16().float(), g.bfloat16().float()))


def test_modules_are_the_functions() -> None:
    torch.manual_seed(0)
    q, g = torch.randn(12, 6), torch.randn(12, 6)
    groups, pairs = torch.arange(12) // 2, torch.tensor([(0, 1), (3, 7), (9, 2)])
    made: list[tuple[Any, Any, dict[str, Any]]] = [
        (losses.MaxHinge(0.3), losses.max_hinge, {"margin": 0.3}),
        (losses.MaxHinge(0.3, hardest=False), losses.max_hinge, {"margin": 0.3, "hardest": False}),
        (losses.InfoNCE(0.2, metric="dot"), losses.info_nce, {"temperature": 0.2, "metric": "dot"}),
        (losses.SigmoidLoss(0.2, -3), losses.sigmoid_loss, {"temperature": 0.2, "bias": -3}),
        (losses.Triplet(0.3, "hard"), losses.max_hinge, {"margin": 0.3}),
    ]
    for module, function, options in made:
        torch.testing.assert_close(module(q, g, groups), function(q, g, groups=groups, **options))
        torch.testing.assert_close(module(q, g, ignored=pairs), function(q, g, ignored=pairs, **options))
        repr(module)
    negatives = torch.randint(0, 12, (12, 2))
    assert torch.equal(losses.Triplet()(q, g, negatives=negatives), losses.triplet(q, g, negatives=negatives))


def test_learned_temperature_and_bias() -> None:
    torch.manual_seed(0)
    q = torch.nn.functional.normalize(torch.randn(30, 8))
    for module in (losses.InfoNCE(1.0), losses.SigmoidLoss(1.0, 0.0)):
        optimiser = torch.optim.Adam(module.parameters(), 0.05)
        before = [float(part) for part in module.parameters()]
        first = float(module(q, q).detach())
        for _ in range(20):
            optimiser.zero_grad()
            loss = module(q, q)
            loss.backward()
            optimiser.step()
        assert float(loss.detach()) < first
        assert all(abs(float(part) - old) > 0.1 for part, old in zip(module.parameters(), before, strict=True))
    frozen = losses.InfoNCE(0.5, learned=False)
    assert not any(part.requires_grad for part in frozen.parameters())
    least = losses.InfoNCE(1e-3)
    assert float(least.temperature) == pytest.approx(0.01)
    assert set(losses.SigmoidLoss().state_dict()) == {"log_temperature", "bias"}


def test_second_derivatives_are_refused() -> None:
    q, g = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
    (first,) = torch.autograd.grad(losses.info_nce(q, g), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="info_nce: second derivatives"):
        first.sum().backward()


X = torch.randn(4, 3)
INFO, HINGE, SIGMOID, TRIPLET = losses.info_nce, losses.max_hinge, losses.sigmoid_loss, losses.triplet
WRONG: list[tuple[Any, tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    (INFO, (X[:0], X[:0]), {}, ValueError, r"info_nce: queries must have at least one row, got shape \[0, 3\]"),
    (INFO, (X, X[:3]), {}, ValueError, r"info_nce: gallery must have the queries' 4 rows, got shape \[3, 3\]"),
    (INFO, (X, X[:, :2]), {}, ValueError, r"info_nce: gallery must have the queries' 3 features"),
    (INFO, (X[0], X), {}, ValueError, r"info_nce: queries must have shape \[N, D\], got \[3\]"),
    (HINGE, (X.long(), X), {}, TypeError, "max_hinge: queries must be float32.*got int64"),
    (HINGE, (X, X.double()), {}, TypeError, "max_hinge: gallery must have the queries' dtype float32"),
    (HINGE, (X, X), {"metric": "euclidean"}, ValueError, "metric must be one of cosine, dot, pearson, got 'eucl"),
    (HINGE, (X, X), {"reduction": "none"}, ValueError, "reduction must be mean or sum, got 'none'"),
    (HINGE, (X, X), {"margin": "wide"}, TypeError, "max_hinge: margin must be a number, got str"),
    (HINGE, (X, X), {"groups": [1, 2]}, ValueError, r"groups must have shape \[N\] for the 4 queries, got \[2\]"),
    (HINGE, (X, X), {"groups": X[0]}, TypeError, "max_hinge: groups must hold integers, got float32"),
    (INFO, (X, X), {"temperature": 0.0}, ValueError, "info_nce: temperature must be positive, got 0"),
    (INFO, (X, X), {"temperature": torch.tensor(-2.0)}, ValueError, "temperature must be positive.* got -2"),
    (INFO, (X, X), {"temperature": torch.ones(2)}, ValueError, r"temperature must be a number or .* got float32 \[2\]"),
    (SIGMOID, (X, X), {"bias": torch.tensor(1)}, ValueError, r"bias must be a number or .* got int64 \[\]"),
    (TRIPLET, (X, X), {"negatives": "easy"}, ValueError, "negatives must be semi-hard, hard or a tensor, got 'easy'"),
    (TRIPLET, (X, X), {"negatives": [[4]] * 4}, ValueError, r"negatives must be in \[0, 4\) or -1 for none, got 4"),
    (TRIPLET, (X, X), {"negatives": [0] * 4}, ValueError, r"negatives must have shape \[N, K\]"),
    (TRIPLET, (X, X), {"negatives": [[0]] * 4, "groups": [0] * 4}, ValueError, "groups must be None"),
    (TRIPLET, (X, X), {"negatives": [[0]] * 4, "ignored": [[0, 1]]}, ValueError, "ignored must be None where"),
    (HINGE, (X, X), {"groups": [0] * 4, "ignored": [[0, 1]]}, ValueError, "max_hinge: groups and ignored do not go"),
    (HINGE, (X, X), {"ignored": X[:, :2]}, TypeError, "max_hinge: ignored must hold integers, got float32"),
    (INFO, (X, X), {"ignored": [0, 1]}, ValueError, r"ignored must have shape \[E, 2\] for the 4 queries, got \[2\]"),
    (INFO, (X, X), {"ignored": [[0, 1, 2]]}, ValueError, r"ignored must have shape \[E, 2\] .* got \[1, 3\]"),
    (
        SIGMOID,
        (X, X),
        {"ignored": [[0, 1], [2, 4]]},
        ValueError,
        r"sigmoid_loss: .* different rows in \[0, 4\), got \(2, 4",
    ),
    (TRIPLET, (X, X), {"ignored": [[-1, 1]]}, ValueError, r"triplet: ignored must hold pairs .* got \(-1, 1\)"),
    (
        INFO,
        (X, X),
        {"ignored": [[1, 1]]},
        ValueError,
        r"info_nce: ignored must hold pairs of different .* got \(1, 1\)",
    ),
    (losses.InfoNCE, (0.0,), {}, ValueError, "InfoNCE: temperature must be positive, got 0.0"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_errors(case: int) -> None:
    function, args, options, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        function(*args, **options)
