"""Sets of vectors in every form that late interaction takes, for its tests."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import oracles

from pycm import reference

Sets = list[npt.NDArray[Any]]

# Numbers of vectors around the heights and widths of tiles; some items are empty.
COUNTS = [3, 0, 12, 1, 17, 32, 33, 2, 16, 7, 0, 25]
OTHER_COUNTS = [5, 13, 0, 1, 24, 36, 11, 4, 31, 2, 8, 65, 12, 6]


def make(counts: Sequence[int], dim: int, seed: int = 0, dtype: Any = np.float32, values: str = "normal") -> Sets:
    rng = np.random.default_rng([seed, dim])
    if values == "integers":
        return [rng.integers(-3, 4, (count, dim)).astype(dtype) for count in counts]
    return [rng.standard_normal((count, dim)).astype(dtype) for count in counts]


def padded(sets: Sets, width: int | None = None) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """[N, T, D] with NaN in the padding, and lengths."""
    lengths = np.array([len(item) for item in sets], np.int64)
    out = np.full((len(sets), max(lengths, default=0) if width is None else width, sets[0].shape[1]), np.nan)
    for i, item in enumerate(sets):
        out[i, : len(item)] = item
    return out.astype(sets[0].dtype), lengths


def ragged(sets: Sets) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    return np.concatenate(sets), np.cumsum([0, *map(len, sets)], dtype=np.int64)


def forms(sets: Sets) -> Iterator[tuple[str, Any, Any]]:
    """(name, items, lengths): what must all give the same bits."""
    values, lengths = padded(sets, 70)
    yield "padded", values, lengths
    yield "lengths as a list", values, lengths.tolist()
    yield "ragged", ragged(sets), None
    yield "list", list(sets), None
    yield "strided", np.repeat(np.repeat(values, 2, axis=0), 3, axis=2)[::2, :, ::3], lengths
    yield "transposed", np.ascontiguousarray(values.transpose(2, 0, 1)).transpose(1, 2, 0), lengths
    backwards = np.ascontiguousarray(values[::-1, ::-1, ::-1])
    yield "backwards", backwards[::-1, ::-1, ::-1], lengths


def ways(metrics: Sequence[str] = ("dot", "cosine")) -> Iterator[dict[str, str]]:
    for metric, reduce, direction in itertools.product(metrics, ("sum", "mean"), ("t2i", "i2t", "both")):
        yield {"metric": metric, "reduce": reduce, "direction": direction}


# ---- the specification, quickly: every product at once ----


def products(queries: Sets, gallery: Sets, metric: str) -> list[list[npt.NDArray[np.float64]]]:
    """The fp64 similarities [T, S] of each pair."""
    table = reference.similarity(np.concatenate(queries), np.concatenate(gallery), metric)
    rows, columns = (np.cumsum([0, *map(len, side)]) for side in (queries, gallery))
    return [[table[a:b, c:d] for c, d in itertools.pairwise(columns)] for a, b in itertools.pairwise(rows)]


def maxsim_of(pairs: list[list[npt.NDArray[np.float64]]], reduce: str, direction: str) -> npt.NDArray[np.float64]:
    """[N, M], as reference.maxsim has it."""
    scores = np.zeros((len(pairs), len(pairs[0])))
    for (i, row), j in itertools.product(enumerate(pairs), range(len(pairs[0]))):
        if row[j].size == 0:
            continue
        ways = {"t2i": (row[j].max(1),), "i2t": (row[j].max(0),), "both": (row[j].max(1), row[j].max(0))}
        for best in ways[direction]:
            scores[i, j] += reference.fixed_order_sum(best) / (len(best) if reduce == "mean" else 1)
    return scores


def best_items(table: npt.NDArray[np.float64], k: int, dtype: Any) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    return oracles.best_of(table.astype(np.float64 if dtype == np.float64 else np.float32), k, "dot")


class Case:
    """Two sets of items, and what is to come out; kept between tests, as the specification is slow."""

    def __init__(self, dim: int, dtype: Any, seed: int, values: str = "normal") -> None:
        self.dtype = dtype
        self.queries = make(COUNTS, dim, seed, dtype, values)
        self.gallery = make(OTHER_COUNTS, dim, seed + 1, dtype, values)
        self.pairs = {metric: products(self.queries, self.gallery, metric) for metric in ("dot", "cosine")}

    def want(self, metric: str, reduce: str, direction: str) -> npt.NDArray[np.float64]:
        return maxsim_of(self.pairs[metric], reduce, direction)


@functools.cache
def case(dim: int, dtype: Any, seed: int = 1, values: str = "normal") -> Case:
    return Case(dim, dtype, seed, values)
