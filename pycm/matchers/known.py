"""What is known of pairs [P, 2] of rows, int64: which items belong to each, and which scores of a batch are no
negatives.

Only what is given counts, nothing that follows from it: a caption that all clips share belongs to all of them, and
their other captions stay wrong of each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Int64: TypeAlias = npt.NDArray[np.int64]


def unique_texts(texts: Sequence[str], owner: Int64) -> tuple[list[str], Int64]:
    """Each different text once, in the order of their first places, and the pairs (owner, text), ascending."""
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    pairs = np.stack([owner, np.array([place[text] for text in texts], np.int64)], 1)
    return list(place), np.unique(pairs, axis=0)


def belonging(pairs: Int64, count: int, side: int) -> list[Int64]:
    """For each of `count` rows of one side (0 or 1) the rows of the other side that belong to it, ascending.

    `pairs` hold none twice.
    """
    order = np.lexsort((pairs[:, 1 - side], pairs[:, side]))
    borders = np.searchsorted(pairs[order, side], np.arange(1, count))
    return np.split(pairs[order, 1 - side], borders)


class KnownPairs:
    """Pairs to look batches up in. O(P log P) to make."""

    def __init__(self, pairs: Int64) -> None:
        self._pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]

    def within(self, first: Int64, second: Int64) -> Int64:
        """Places [E, 2] (p, q), p != q, of a batch of pairs (first[p], second[p]) where (first[p], second[q]) is known.

        O(B log P + K log B + E) for a batch of B and the K known pairs of its first items; nothing is B x B but what
        is found.
        """
        p, row = _equal(first, self._pairs[:, 0])
        order = np.argsort(second, kind="stable")
        at, q = _equal(self._pairs[row, 1], second[order])
        p, q = p[at], order[q]
        found: Int64 = np.stack([p, q], 1)[p != q]
        return found


def _equal(left: Int64, right: Int64) -> tuple[Int64, Int64]:
    """All (i, j) with left[i] == right[j], `right` ascending: i and j."""
    low, high = (np.searchsorted(right, left, side=side) for side in ("left", "right"))
    counts = high - low
    i = np.repeat(np.arange(len(left)), counts)
    return i, np.arange(len(i)) + np.repeat(low - np.cumsum(counts) + counts, counts)
