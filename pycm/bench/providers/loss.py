"""Contrastive losses of raw rows, with the gradients of both sides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..cases import Case
from ..contrastive import Loss, LossCase
from ..features import UnavailableError
from .base import Call, Provider, use

MARGIN, TEMPERATURE, BIAS = 0.2, 0.07, -10.0
_WORTH_COMPILING = 512  # rows
_MOST_CHECKED = 2048
TOLERANCE = 1e-4


def _step(data: Any, loss: Callable[[Any, Any], Any], dtype: Any = np.float32) -> Call:
    torch = use("torch")
    sides = [torch.from_numpy(rows.astype(dtype)).requires_grad_() for rows in (data.queries, data.gallery)]

    def step() -> Any:
        found = loss(*sides)
        grads = torch.autograd.grad(found, sides)
        return found.detach().numpy(), *(grad.numpy() for grad in grads)

    return step


def formula(loss: Loss) -> Callable[[Any, Any], Any]:
    """As it is usually written in torch, over the whole matrix."""
    torch = use("torch")
    functional = torch.nn.functional

    def value(queries: Any, gallery: Any) -> Any:
        scores = functional.normalize(queries) @ functional.normalize(gallery).T
        n = len(scores)
        if loss == "info_nce":
            logits, target = scores / TEMPERATURE, torch.arange(n)
            return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2
        if loss == "sigmoid":
            signs = 2 * torch.eye(n) - 1
            return -functional.logsigmoid(signs * (scores / TEMPERATURE + BIAS)).sum() / n
        positive, same = scores.diagonal(), torch.eye(n, dtype=torch.bool)
        if loss == "semi_hard":  # the hardest of those below the positive, where there is one
            below = (scores.masked_fill(scores >= pair, -torch.inf) for pair in (positive[:, None], positive))
            hardest = (masked.amax(axis) for axis, masked in zip((1, 0), below, strict=True))
            return sum((MARGIN + best - positive).clamp(min=0).sum() for best in hardest) / n
        rows = (MARGIN + scores - positive[:, None]).clamp(min=0).masked_fill(same, 0)
        columns = (MARGIN + scores - positive).clamp(min=0).masked_fill(same, 0)
        if loss == "sum_hinge":
            return (rows.sum() + columns.sum()) / n
        return (rows.amax(1).sum() + columns.amax(0).sum()) / n

    return value


def pycm_loss(case: Case, data: Any) -> Call:
    """the function of pycm.losses"""
    from pycm import losses

    assert isinstance(case, LossCase)
    functions: dict[Loss, Callable[[Any, Any], Any]] = {
        "max_hinge": lambda q, g: losses.max_hinge(q, g, margin=MARGIN),
        "sum_hinge": lambda q, g: losses.max_hinge(q, g, margin=MARGIN, hardest=False),
        "info_nce": lambda q, g: losses.info_nce(q, g, temperature=TEMPERATURE),
        "semi_hard": lambda q, g: losses.triplet(q, g, margin=MARGIN),
        "sigmoid": lambda q, g: losses.sigmoid_loss(q, g, temperature=TEMPERATURE, bias=BIAS),
    }
    return _step(data, functions[case.loss])


def torch_eager(case: Case, data: Any) -> Call:
    """the formula over the whole score matrix, by autograd"""
    assert isinstance(case, LossCase)
    return _step(data, formula(case.loss))


def torch_compiled(case: Case, data: Any) -> Call:
    """the same through torch.compile; compiling is not counted"""
    assert isinstance(case, LossCase)
    if case.queries < _WORTH_COMPILING:
        raise UnavailableError("compiling would take longer than the rest of the tiny cases")
    return _step(data, use("torch").compile(formula(case.loss)))


def check(case: Case, data: Any, result: Any, first: Any) -> str | None:
    """What is wrong with a loss and its gradients: beside the formula in fp64, or, where that would take long, beside
    the first provider's."""
    if case.queries <= _MOST_CHECKED:
        assert isinstance(case, LossCase)
        first = _step(data, formula(case.loss), np.float64)()
    for name, ours, theirs in zip(("loss", "gradient", "gradient"), result, first or result, strict=True):
        error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
        if not error <= TOLERANCE:
            return f"the {name} is off by {error:.1e} of the largest"
    return None


PROVIDERS = (
    Provider("pycm", pycm_loss),
    Provider("torch", torch_eager, ("torch",)),
    Provider("torch-compiled", torch_compiled, ("torch",)),
)
