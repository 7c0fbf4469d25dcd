"""One call on inputs so small that calling is all it costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from ..cases import Case
from ..data import Data
from ..features import UnavailableError
from .base import Call, Prepare, Provider, use

# (x, y, k) as NumPy arrays or tensors, k = 0 for scores, to the call.
Make: TypeAlias = Callable[[Any, Any, int], Call]


def _pycm(x: Any, y: Any, k: int) -> Call:
    import pycm

    return (lambda: pycm.topk(x, y, k, "dot")) if k else (lambda: pycm.similarity(x, y, "dot"))


def _mm(x: Any, y: Any, k: int) -> Call:
    if not k:
        return lambda: x @ y.T
    topk = use("torch").topk
    return lambda: topk(x @ y.T, k)


def _add(x: Any, y: Any, k: int) -> Call:
    add = use("torch").add
    return lambda: add(x, y)


def _matmul(x: Any, y: Any, k: int) -> Call:
    if k:
        raise UnavailableError("NumPy has no top-k")
    return lambda: x @ y.T


def _provider(name: str, about: str, make: Make, tensors: bool) -> Provider:
    def prepare(case: Case, data: Data) -> Call:
        x, y = data.queries, data.gallery
        if not tensors:
            return make(x, y, case.k)
        torch = use("torch")
        return make(torch.from_numpy(x), torch.from_numpy(y), case.k)

    prepare.__doc__ = about
    typed: Prepare = prepare
    return Provider(name, typed, ("torch",) if tensors else ())


PROVIDERS = (
    _provider("pycm", "pycm on NumPy arrays", _pycm, tensors=False),
    _provider("pycm-torch", "pycm on tensors", _pycm, tensors=True),
    _provider("torch", "torch.mm, and torch.topk", _mm, tensors=True),
    _provider("torch-add", "torch.add, the least a torch operator costs", _add, tensors=True),
    _provider("numpy", "NumPy's product", _matmul, tensors=False),
)
