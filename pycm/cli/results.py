"""Matches with names for people, and the truth where it is known: what the commands print, write and report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from .output import Ranked
from .systems import Found, System


@dataclass(frozen=True)
class Results:
    """Matches with names for people, and the truth where it is known.

    Attributes:
        system: which kinds of items they are of.
        found: the matches.
        left, right: the names of the items of both kinds, in the order of `found`.
        owner: for each right item the first left one that it belongs to, -1 if that is not in `found`, None if it is
            not known; or None where no truth is known.
        also: further (left, right) that belong together: a text of several items.
        own: where the right items are labels, that of each left one.
    """

    system: System
    found: Found
    left: Sequence[str]
    right: Sequence[str]
    owner: list[int | None] | None = None
    also: frozenset[tuple[int, int]] = frozenset()
    own: list[int] | None = None

    def rows(self, direction: str, keep: int | None = None) -> list[Ranked]:
        """The ranked rows of one direction, at most `keep` a query."""
        forward = direction == self.system.forward
        matches = self.found.forward if forward else self.found.backward
        queries, gallery = (self.left, self.right) if forward else (self.right, self.left)
        rows = []
        for i, (scores, indices) in enumerate(zip(matches.scores, matches.indices, strict=True)):
            for rank, (score, j) in enumerate(zip(scores[:keep], indices[:keep], strict=True)):
                if j < 0:  # no further candidate
                    break
                value = float(f"{score:.9g}")  # the shortest text that gives the float32 back
                truth = self._correct(*((i, j) if forward else (j, i)))
                rows.append(Ranked(direction, i, queries[i], rank, int(j), gallery[j], value, truth))
        return rows

    def _correct(self, left: Any, right: Any) -> bool | None:
        if self.own is not None:
            return self.own[int(left)] == int(right)
        if self.owner is None:
            return None
        owner = self.owner[int(right)]
        return None if owner is None else owner == int(left) or (int(left), int(right)) in self.also

    def right_of(self, direction: str) -> tuple[int, int]:
        """(queries whose best match is right, queries that have a right match)."""
        best = self.rows(direction, keep=1)
        if self.owner is not None:
            known = {i for i, owner in enumerate(self.owner) if owner is not None and owner >= 0}
            lefts = {self.owner[i] for i in known} | {left for left, _ in self.also}
            have = known if direction == self.system.backward else lefts
            best = [row for row in best if row.query_index in have]
        if self.own is not None and direction == self.system.backward:
            best = [row for row in best if row.query_index in self.own]
        return sum(row.correct is True for row in best), len(best)

    def places(self, direction: str) -> dict[int, int | None]:
        """Query -> the rank of its first right match, None where it is not among those found."""
        return {
            query: next((row.rank for row in rows if row.correct), None)
            for query, rows in groupby_query(self.rows(direction)).items()
        }


def groupby_query(rows: Sequence[Ranked]) -> dict[int, list[Ranked]]:
    """Rows by query, in their order."""
    return {query: list(group) for query, group in groupby(rows, key=lambda row: row.query_index)}
