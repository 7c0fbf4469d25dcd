"""The same call on an original and on pycm's drop-in, and what is compared."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

# A score of normalised rows in fp32, by two orders of summation. Values of other sizes: relative to the largest.
RTOL = 2e-6


def parameters(function: Callable[..., Any], same: dict[Any, Any] | None = None) -> list[tuple[Any, ...]]:
    """Name, kind and default of each parameter; `same` names the originals of defaults that are functions."""
    found = inspect.signature(function).parameters.values()
    return [
        (p.name, p.kind, (same or {}).get(p.default, p.default) if callable(p.default) else p.default) for p in found
    ]


def outcome(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a call returns, or the type and the text of what it raises."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return type(error), str(error)


def assert_same_error(ours: Callable[..., Any], theirs: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    expected = outcome(theirs, *args, **kwargs)
    assert isinstance(expected, tuple), "the original raises no error here"
    assert isinstance(expected[0], type), "the original raises no error here"
    assert outcome(ours, *args, **kwargs) == expected


def assert_close(ours: Any, theirs: Any) -> None:
    """Same kind, dtype and shape, and values within RTOL of the largest."""
    assert type(ours) is type(theirs)
    assert ours.dtype == theirs.dtype
    assert tuple(ours.shape) == tuple(theirs.shape)
    a, b = (np.asarray(x.detach() if hasattr(x, "detach") else x, np.float64) for x in (ours, theirs))
    np.testing.assert_allclose(a, b, rtol=RTOL, atol=RTOL * float(np.abs(b).max(initial=0)))


@contextmanager
def only_pycm(module: Any, *originals: str) -> Iterator[None]:
    """Any call of these originals by the drop-in fails: the answer is pycm's."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("handed to the original")

    with pytest.MonkeyPatch.context() as patch:
        for name in originals:
            patch.setattr(module, name, refuse)
        yield
