"""FAISS's selectors of ids, over masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Members = npt.NDArray[np.bool_]


class IDSelector:
    """A set of ids: which rows of an index may be found, or are to be removed."""

    def members(self, ntotal: int) -> Members:
        """Which of the ids 0 ... ntotal - 1 are in the set."""
        raise NotImplementedError

    def is_member(self, id: int) -> bool:
        """Whether the set has this id."""
        return id >= 0 and bool(self.members(id + 1)[id])


class IDSelectorAll(IDSelector):
    """Every id."""

    def members(self, ntotal: int) -> Members:
        return np.ones(ntotal, np.bool_)


class IDSelectorRange(IDSelector):
    """Ids from imin to imax - 1."""

    def __init__(self, imin: int, imax: int, assume_sorted: bool = False) -> None:
        self.imin, self.imax, self.assume_sorted = imin, imax, assume_sorted

    def members(self, ntotal: int) -> Members:
        ids = np.arange(ntotal)
        return (ids >= self.imin) & (ids < self.imax)


class IDSelectorBatch(IDSelector):
    """The given ids; those that an index does not have are ignored."""

    def __init__(self, indices: Any) -> None:
        self.ids = np.array(indices, np.int64).reshape(-1)

    def members(self, ntotal: int) -> Members:
        chosen = np.zeros(ntotal, np.bool_)
        chosen[self.ids[(self.ids >= 0) & (self.ids < ntotal)]] = True
        return chosen


class IDSelectorArray(IDSelectorBatch):
    """The given ids. One that is given twice is found once; FAISS finds it twice."""


class IDSelectorNot(IDSelector):
    """The ids that another selector leaves out."""

    def __init__(self, sel: IDSelector) -> None:
        self.sel = sel

    def members(self, ntotal: int) -> Members:
        return ~self.sel.members(ntotal)


@dataclass
class _Pair(IDSelector):
    lhs: IDSelector
    rhs: IDSelector


class IDSelectorAnd(_Pair):
    """The ids in both selectors."""

    def members(self, ntotal: int) -> Members:
        return self.lhs.members(ntotal) & self.rhs.members(ntotal)


class IDSelectorOr(_Pair):
    """The ids in either selector."""

    def members(self, ntotal: int) -> Members:
        return self.lhs.members(ntotal) | self.rhs.members(ntotal)


class IDSelectorXOr(_Pair):
    """The ids in exactly one of two selectors."""

    def members(self, ntotal: int) -> Members:
        return self.lhs.members(ntotal) ^ self.rhs.members(ntotal)


@dataclass
class SearchParameters:
    """What one search may find: the ids of `sel`, or all."""

    sel: IDSelector | None = None
