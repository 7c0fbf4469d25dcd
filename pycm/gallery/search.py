"""Top-k and ranks over the blocks of a gallery: the same bits as over all rows in one array."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pycm import _C

from ..functional import DISTANCES
from .blocks import Block, WholeBlock
from .ids import Ids

Array = npt.NDArray[Any]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
Excluded = tuple[Int64, Int64]  # offsets [N + 1], rows

_WIDENED = 1 << 22  # matches held at once while ties are widened
_RANK_BYTES = 64 << 20  # of rows ranked at once where a gallery is more than one array
_POSITIVES = 4096  # laid beside those rows


class GalleryMatches(NamedTuple):
    """The best matches of each query, best first.

    Attributes:
        scores: ``[N, k]``, float32 (float64 in a float64 gallery); distances, smallest first, for distance metrics.
        ids: ``[N, k]``, int64, or str in an object array; -1, or None, where fewer than k rows could match.
        indices: ``[N, k]`` int64, the positions of the rows among those in the gallery, in the order of addition; -1
            where there is no match.
    """

    scores: Any
    ids: Any
    indices: Any


class Filter(NamedTuple):
    """Which pairs may match.

    Attributes:
        mask: booleans [P] or [N, P] for the P rows, or None.
        exclude: compressed rows, or None.
    """

    mask: Any
    exclude: Excluded | None

    def part(self, start: int, stop: int) -> Filter:
        """Of rows start to stop, numbered from start."""
        mask = None if self.mask is None else np.ascontiguousarray(self.mask[..., start:stop])
        if self.exclude is None:
            return Filter(mask, None)
        offsets, rows = self.exclude
        keep = (rows >= start) & (rows < stop)
        kept = np.concatenate([np.zeros(1, np.int64), np.cumsum(keep)])
        return Filter(mask, (kept[offsets], rows[keep] - start))

    def queries(self, chosen: Int64) -> Filter:
        """Of those queries."""
        mask = self.mask if self.mask is None or self.mask.ndim == 1 else self.mask[chosen]
        if self.exclude is None:
            return self._replace(mask=mask)
        offsets, rows = self.exclude
        lists = [rows[offsets[i] : offsets[i + 1]] for i in chosen.tolist()]
        lengths = np.cumsum([0, *map(len, lists)], dtype=np.int64)
        return self._replace(mask=mask, exclude=(lengths, np.concatenate([np.empty(0, np.int64), *lists])))


# ---- top-k ----


class Searcher(NamedTuple):
    """One search: `topk` gives scores [N, k] and rows [N, k], best first, ties by row."""

    blocks: Sequence[Block]
    metric: str
    precision: str
    threads: int

    def topk(self, queries: Array, k: int, allowed: Filter) -> tuple[Array, Int64]:
        if len(self.blocks) == 1 and isinstance(self.blocks[0], WholeBlock):
            return self._part(queries, k, allowed, 0, 0, len(self.blocks[0]), self.blocks[0].encoded())
        distance = self.metric in DISTANCES
        dtype = _score_dtype(queries)
        scores = np.full((len(queries), k), np.inf if distance else -np.inf, dtype)
        rows = np.full((len(queries), k), -1, np.int64)
        first = 0
        for block in self.blocks:
            for more, found in block.search(partial(self._part, queries, k, allowed, first)):
                scores, rows = merge(scores, rows, more, found, distance)
            first += len(block)
        return scores, rows

    def _part(
        self, queries: Array, k: int, allowed: Filter, first: int, start: int, stop: int, encoded: Any
    ) -> tuple[Array, Int64]:
        start, stop = first + start, first + stop
        mask, exclude = allowed.part(start, stop)
        offsets, excluded = (None, None) if exclude is None else exclude
        scores, found = encoded.topk(
            queries, min(k, stop - start), mask, excluded, offsets, precision=self.precision, num_threads=self.threads
        )
        return scores, np.where(found < 0, -1, found + start) if start else found

    def topk_by_id(self, queries: Array, k: int, allowed: Filter, ids: Ids) -> tuple[Array, Int64]:
        """The same with ties by id: more matches are asked for, until the score falls below the k-th one's."""
        if ids.ordered or self.precision == "fast":
            return self.topk(queries, k, allowed)
        scores = np.empty((len(queries), k), _score_dtype(queries))
        rows = np.empty((len(queries), k), np.int64)
        pending, width = np.arange(len(queries)), min(k + 1, len(ids))
        while len(pending):
            unsettled = []
            for start in range(0, len(pending), max(1, _WIDENED // width)):
                chosen = pending[start : start + max(1, _WIDENED // width)]
                some = allowed if len(chosen) == len(queries) else allowed.queries(chosen)
                more, found = self.topk(queries[chosen], width, some)
                open_ended = np.zeros(len(chosen), bool)
                if width < len(ids):
                    open_ended = (more[:, k - 1] == more[:, -1]) & (found[:, -1] >= 0)
                more, found = _order_ties(more, found, ids)
                settled = chosen[~open_ended]
                scores[settled], rows[settled] = more[~open_ended, :k], found[~open_ended, :k]
                unsettled.append(chosen[open_ended])
            pending, width = np.concatenate(unsettled), min(4 * width, len(ids))
        return scores, rows


def _score_dtype(queries: Any) -> Any:
    """Of NumPy's or torch's queries."""
    return np.float64 if str(queries.dtype).endswith("float64") else np.float32


def merge(scores: Array, rows: Int64, more: Array, found: Int64, distance: bool) -> tuple[Array, Int64]:
    """The best k of two lists of matches, best first; ties to the first list, whose rows are the lower ones."""
    k = scores.shape[1]
    scores, rows = np.concatenate([scores, more], axis=1), np.concatenate([rows, found], axis=1)
    best = np.lexsort((rows < 0, scores if distance else -scores), axis=1)[:, :k]  # stable
    return np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1)


def _order_ties(scores: Array, rows: Int64, ids: Ids) -> tuple[Array, Int64]:
    """Matches of equal score in the order of their ids."""
    tied = ((scores[:, 1:] == scores[:, :-1]) & (rows[:, 1:] >= 0)).any(axis=1)
    scores, rows = scores.copy(), rows.copy()
    for i in np.flatnonzero(tied).tolist():
        valid = int((rows[i] >= 0).sum())
        run = np.cumsum(np.concatenate([[0], scores[i, 1:valid] != scores[i, : valid - 1]]))
        by_id = np.argsort(ids.take(rows[i, :valid]), kind="stable")
        order = by_id[np.argsort(run[by_id], kind="stable")]
        scores[i, :valid], rows[i, :valid] = scores[i, order], rows[i, order]  # 0.0 and -0.0 tie
    return scores, rows


# ---- ranks ----


class Positives(NamedTuple):
    """Rows that each query is to be ranked against: `rows` [P], those of query i from offsets[i] to offsets[i + 1]."""

    rows: Int64
    offsets: Int64

    def only(self, keep: Bool) -> Positives:
        kept = np.concatenate([np.zeros(1, np.int64), np.cumsum(keep)])
        return Positives(self.rows[keep], kept[self.offsets])


class Counts(NamedTuple):
    """For each positive [P]: other rows that score above it, and the same as it, and its own score."""

    greater: Int64
    equal: Int64
    scores: Array


def rank(
    blocks: Sequence[Block],
    metric: str,
    screen: str,
    queries: Array,
    positives: Positives,
    allowed: Filter,
    threads: int,
) -> Counts:
    """The counts over all blocks. A block knows the scores of its own positives; others are laid beside its rows."""
    count, dtype = len(positives.rows), _score_dtype(queries)
    total = Counts(np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(count, dtype))
    start = 0
    for block in blocks:
        stop = start + len(block)
        beside = np.ones(count, bool)
        if isinstance(block, WholeBlock):
            inside = (positives.rows >= start) & (positives.rows < stop)
            own = positives.only(inside)
            found = _rank(
                block.encoded(), queries, own._replace(rows=own.rows - start), allowed.part(start, stop), threads
            )
            _add(total, found, inside)
            beside = ~inside
        if beside.any():
            found = _rank_beside(
                blocks, block, start, metric, screen, queries, positives.only(beside), allowed, threads
            )
            _add(total, found, beside)
        start = stop
    return total


def _add(total: Counts, found: Counts, places: Bool) -> None:
    total.greater[places] += found.greater
    total.equal[places] += found.equal
    total.scores[places] = found.scores


def _rank_beside(
    blocks: Sequence[Block],
    block: Block,
    first: int,
    metric: str,
    screen: str,
    queries: Array,
    positives: Positives,
    allowed: Filter,
    threads: int,
) -> Counts:
    """Counts over the rows of `block`, the first of which is row `first`, piece by piece.

    To each piece the rows of the positives are added, masked out, so that they have a score and count for nothing.
    """
    counted = []
    for begin, end in _batches(positives.offsets):
        low, high = positives.offsets[begin], positives.offsets[end]
        some = Positives(positives.rows[low:high], positives.offsets[begin : end + 1] - low)
        filtered = allowed.queries(np.arange(begin, end))
        own = _is_candidate(some, filtered)
        distinct, places = np.unique(some.rows, return_inverse=True)
        laid = take(blocks, distinct)
        greater, equal = np.zeros(high - low, np.int64), np.zeros(high - low, np.int64)
        scores, start = np.empty(0), first
        for piece in block.pieces(_RANK_BYTES):
            stop = start + len(piece)
            encoded = _C.EncodedGallery(metric, screen)
            encoded.extend(np.concatenate([piece, laid]))
            mask, exclude = filtered.part(start, stop)
            mask = np.ones(len(piece), bool) if mask is None else mask
            mask = np.concatenate([mask, np.zeros((*mask.shape[:-1], len(laid)), bool)], axis=-1)
            beside = some._replace(rows=len(piece) + places.reshape(-1))
            more, same, scores = _rank(encoded, queries[begin:end], beside, Filter(mask, exclude), threads)
            greater += more
            equal += same - (own & (some.rows >= start) & (some.rows < stop))  # itself, where it is in this piece
            start = stop
        counted.append(Counts(greater, equal, scores))
    return Counts(*(np.concatenate(parts) for parts in zip(*counted, strict=True)))


def _rank(encoded: Any, queries: Array, positives: Positives, allowed: Filter, threads: int) -> Counts:
    offsets, excluded = (None, None) if allowed.exclude is None else allowed.exclude
    return Counts(
        *encoded.rank(queries, positives.rows, positives.offsets, allowed.mask, excluded, offsets, num_threads=threads)
    )


def _batches(offsets: Int64) -> Iterator[tuple[int, int]]:
    """Runs of queries with at most `_POSITIVES` positives, or a single one."""
    begin = 0
    while begin < len(offsets) - 1:
        end = int(np.searchsorted(offsets, offsets[begin] + _POSITIVES, side="right")) - 1
        end = max(begin + 1, end)
        yield begin, end
        begin = end


def _is_candidate(positives: Positives, allowed: Filter) -> Bool:
    """Whether each positive [P] is a row that its query may match, and so meets its own copy beside a part."""
    query = np.repeat(np.arange(len(positives.offsets) - 1), np.diff(positives.offsets))
    own = np.ones(len(positives.rows), bool)
    if allowed.mask is not None:
        own = allowed.mask[positives.rows] if allowed.mask.ndim == 1 else allowed.mask[query, positives.rows]
    if allowed.exclude is not None:
        offsets, rows = allowed.exclude
        excluded = set(
            zip(np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)).tolist(), rows.tolist(), strict=True)
        )
        own = own & np.array(
            [pair not in excluded for pair in zip(query.tolist(), positives.rows.tolist(), strict=True)], bool
        )
    return own


def take(blocks: Sequence[Block], rows: Int64) -> Array:
    """Copies of those rows, which may lie in any block; rows [n] to [n, D]."""
    found: list[Array] = []
    order, first, count = np.empty(len(rows), np.int64), 0, 0
    for block in blocks:
        inside = np.flatnonzero((rows >= first) & (rows < first + len(block)))
        order[inside] = count + np.arange(len(inside))
        found.append(block.take(rows[inside] - first))
        first, count = first + len(block), count + len(inside)
    return np.asarray(np.concatenate(found)[order])
