"""What every provider is, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

from ..._optional import require
from ..cases import Case
from ..data import Data
from ..features import UnavailableError

#: What is timed. topk: (scores or distances [N, k], indices [N, k]); rank: (greater [N, P], equal [N, P]) or a mean
#: reciprocal rank; join: (query rows, indices); pairs: (i, j, scores); similarity: scores [N, M]; call: anything.
Call: TypeAlias = Callable[[], Any]
#: Makes what a library may keep between calls, outside the timing. Raises UnavailableError for a case it does not do.
Prepare: TypeAlias = Callable[[Case, Data], Call]

# The scores that a library's product may write at once; more queries are taken in chunks.
CHUNK_SCORES = 100_000_000


@dataclass(frozen=True)
class Provider:
    """One way to solve the cases of an operation.

    The first of each operation is what ratios are taken to. `packages` are distributions it needs. `asked` marks one
    that runs only when --provider names it.
    """

    name: str
    prepare: Prepare
    packages: tuple[str, ...] = ()
    asked: bool = False

    @property
    def about(self) -> str:
        return (self.prepare.__doc__ or "").partition("\n")[0]


def use(module: str) -> ModuleType:
    return require(module, "bench", "pycm bench")


def chunks(case: Case) -> Iterator[slice]:
    """Queries whose scores fit into CHUNK_SCORES."""
    step = max(1, CHUNK_SCORES // case.gallery)
    return (slice(begin, min(begin + step, case.queries)) for begin in range(0, case.queries, step))


def chunk_buffer(case: Case) -> Any:
    return np.empty((min(case.queries, max(1, CHUNK_SCORES // case.gallery)), case.gallery), np.float32)


def only(case: Case, *metrics: str) -> None:
    if case.metric not in metrics:
        raise UnavailableError(f"does not have {case.metric}")


def encoded(case: Case, data: Data, screen: str = "auto") -> Any:
    """The gallery as `Gallery` holds it: encoded once for many searches."""
    from pycm import _C

    gallery = _C.EncodedGallery(case.metric, screen)
    gallery.extend(data.gallery)
    return gallery
