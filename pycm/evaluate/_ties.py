"""Expected values of rank metrics when scores tie.

Positives of one query with one score form a block. With G rows above it, n rows in it, p of them positives, and A
positives above it, the block's rows take the places G, ..., G + n - 1 (0-based), every order being equally likely. So

    a place holds a positive with probability p / n,
    place G + j - 1 holds one with A + 1 + (j - 1) (p - 1) / (n - 1) positives up to it, in the mean,

and every metric that is a sum over places has a closed expectation (McSherry & Najork 2008). An optimistic or
pessimistic order leaves no chance: each positive is a block of its own, n = p = 1, and the formulas reduce to the
textbook ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from ._inputs import Float64, Int64

if TYPE_CHECKING:
    from ..ranking import Ties

TIES: tuple[Ties, ...] = ("realistic", "optimistic", "pessimistic")

LongDouble: TypeAlias = npt.NDArray[np.longdouble]


class Blocks(NamedTuple):
    """Blocks of all queries, best first within a query.

    Attributes:
        rows: int64 [B], the query.
        above: int64 [B], G.
        size: int64 [B], n.
        positives: int64 [B], p.
        before: int64 [B], A.
        gain: float64 [B], sum of the grades of its positives.
        first: int64 [N], each query's first block.
        total: int64 [N], positives of each query, R.
    """

    rows: Int64
    above: Int64
    size: Int64
    positives: Int64
    before: Int64
    gain: Float64
    first: Int64
    total: Int64


def tie_blocks(
    function: str, greater: Int64, equal: Int64, rows: Int64, offsets: Int64, relevance: Float64, ties: Ties
) -> Blocks:
    """Blocks of positives given by their counts, flat [P] and grouped by query."""
    if ties not in TIES:
        raise ValueError(f"{function}: ties must be one of {', '.join(TIES)}, got {ties!r}")
    order = np.lexsort((relevance if ties == "pessimistic" else -relevance, greater, rows))
    greater, equal, rows, gain = greater[order], equal[order], rows[order], relevance[order]
    count = len(rows)
    starts = np.flatnonzero(np.r_[True, (np.diff(rows) != 0) | (np.diff(greater) != 0)][:count])
    sizes = np.diff(np.r_[starts, count])
    others = equal[starts] + 1 - sizes
    if (others < 0).any():
        raise ValueError(f"{function}: positives of query {rows[starts][others < 0][0]} repeat")
    if ties != "realistic":
        place = np.arange(count) - np.repeat(starts, sizes)
        greater = greater + place + (np.repeat(others, sizes) if ties == "pessimistic" else 0)
        starts, sizes, others = np.arange(count), np.ones(count, np.int64), np.zeros(count, np.int64)
    rows_of_blocks = rows[starts]
    return Blocks(
        rows=rows_of_blocks,
        above=greater[starts],
        size=sizes + others,
        positives=sizes,
        before=starts - offsets[rows_of_blocks],
        gain=np.add.reduceat(gain, starts),
        first=np.searchsorted(rows_of_blocks, np.arange(len(offsets) - 1)),
        total=np.diff(offsets),
    )


def per_query(blocks: Blocks, values: npt.NDArray[np.floating]) -> Float64:
    """Sums of one value a block, [N]."""
    weights = values.astype(np.float64)
    return np.asarray(np.bincount(blocks.rows, weights, len(blocks.total)), np.float64)


def _inside(blocks: Blocks, k: int | Int64) -> Int64:
    """How many of each block's places are among the first k."""
    return np.clip(k - blocks.above, 0, blocks.size)


def first_rank(blocks: Blocks) -> Float64:
    """Expected rank, from 0, of each query's first positive: it stands behind t / (p + 1) of t tied others."""
    b = blocks.first
    others = blocks.size[b] - blocks.positives[b]
    return np.asarray(blocks.above[b] + others / (blocks.positives[b] + 1))


def hit(blocks: Blocks, k: int) -> Float64:
    """Probability of a positive among the first k: 1 - C(n - p, s) / C(n, s), s of the block's places being inside."""
    b = blocks.first
    n, p, s = blocks.size[b], blocks.positives[b], _inside(blocks, k)[b]
    miss = np.ones(len(b))
    small, large = np.minimum(s, p), np.maximum(s, p)  # the ratio is symmetric in s and p
    for i in range(int(small[n > p].max(initial=0))):
        miss *= np.where(i < small, np.maximum(n - large - i, 0) / np.maximum(n - i, 1), 1.0)
    return np.where(s == 0, 0.0, np.where(n == p, 1.0, 1.0 - miss))


def reciprocal_rank(blocks: Blocks) -> Float64:
    """Expected 1 / (rank from 1) of the first positive."""
    b = blocks.first
    g, n, p = blocks.above[b], blocks.size[b], blocks.positives[b]
    out = 1.0 / (g + 1)
    lone = (p == 1) & (n > 1)
    out[lone] = (_harmonic(g, g + n, lone)[lone] / n[lone]).astype(np.float64)
    for i in np.flatnonzero((p > 1) & (n > p)):
        j = np.arange(n[i] - p[i] + 1)
        ratios = (n[i] - p[i] - j + 1) / (n[i] - j)  # of P(first at j) to P(first at j - 1)
        ratios[0] = p[i] / n[i]
        out[i] = (np.cumprod(ratios) / (g[i] + j + 1)).sum()
    return out


def average_precision(blocks: Blocks, at_r: bool = False) -> Float64:
    """Expected sum of the precisions at the positives, over R; of those among the first R only, `at_r`."""
    g, n, p = blocks.above, blocks.size, blocks.positives
    s = _inside(blocks, blocks.total[blocks.rows]) if at_r else n
    h = (s / (g + 1)).astype(np.longdouble)  # sum of 1 / (G + j) over j = 1 ... s
    tied = n > 1
    h[tied] = _harmonic(g, g + s, tied)[tied]
    pairs = (p - 1) / np.maximum(n - 1, 1)
    return per_query(blocks, p / n * ((blocks.before + 1) * h + pairs * (s - (g + 1) * h))) / blocks.total


def precision_at_r(blocks: Blocks) -> Float64:
    """Expected share of positives among the first R."""
    s = _inside(blocks, blocks.total[blocks.rows])
    return per_query(blocks, blocks.positives * s / blocks.size) / blocks.total


def recall_of_positives(blocks: Blocks, k: int) -> Float64:
    """Expected share of the positives that are among the first k."""
    return per_query(blocks, blocks.positives * _inside(blocks, k) / blocks.size) / blocks.total


def ndcg(blocks: Blocks, k: int, relevance: Float64, rows: Int64, offsets: Int64) -> Float64:
    """Expected DCG of the first k over that of the best order, gain = grade, discount 1 / log2(2 + place)."""
    ideal = np.lexsort((-relevance, rows))
    place = np.arange(len(rows)) - offsets[rows]
    deepest = min(k, int(max((blocks.above + blocks.size).max(), place.max() + 1)))
    discount = 1.0 / np.log2(np.arange(2, deepest + 2))
    total = np.r_[0.0, np.cumsum(discount)]
    g, n = blocks.above, blocks.size
    mass = total[np.minimum(g + n, deepest)] - total[np.minimum(g, deepest)]
    single = n == 1
    mass[single] = np.where(g[single] < deepest, 1.0 / np.log2(g[single] + 2), 0.0)
    best = np.where(place < deepest, relevance[ideal] * discount[np.minimum(place, deepest - 1)], 0.0)
    return per_query(blocks, blocks.gain * mass / n) / np.bincount(rows, weights=best, minlength=len(offsets) - 1)


def _harmonic(start: Int64, stop: Int64, where: npt.NDArray[np.bool_]) -> LongDouble:
    """Sums of 1 / i over i = start + 1 ... stop, [B], defined where asked for."""
    out = np.zeros(len(start), np.longdouble)
    if where.any():
        table = np.r_[np.longdouble(0), np.cumsum(1 / np.arange(1, stop[where].max() + 1, dtype=np.longdouble))]
        out[where] = table[stop[where]] - table[start[where]]
    return out
