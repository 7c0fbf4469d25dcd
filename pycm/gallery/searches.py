"""A gallery's searches: from what a caller passes to what it gets, on the device that the rows are on."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..ranking import _TIES_BEFORE, Ranks
from . import device
from .arguments import as_device_filter, as_filter, as_id_lists, as_queries, like, rows_of, threads_of
from .ids import name_some
from .search import GalleryMatches, Positives, Searcher, rank
from .store import Store


def topk(
    store: Store, queries: Any, k: Any, precision: Any, mask: Any, ids: Any, where: Any, exclude: Any
) -> GalleryMatches:
    """See `Gallery.topk`."""
    rows = as_queries("Gallery.topk", queries, store)
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)):
        raise TypeError(f"Gallery.topk: k must be an integer, got {type(k).__name__}")
    if not 1 <= k <= store.count:
        raise ValueError(f"Gallery.topk: k must be in [1, {store.count}], got {k}")
    if precision not in ("exact", "fast"):
        raise ValueError(f"Gallery.topk: precision must be exact or fast, got {precision!r}")
    filters = as_filter if store.device is None else as_device_filter
    allowed = filters("Gallery.topk", store, len(rows), mask, ids, where, exclude)
    if store.device is not None and (store.ids.ordered or precision == "fast"):
        return GalleryMatches(*device.topk(store, rows, int(k), allowed, precision))
    searcher = Searcher(store.blocks, store.metric, precision, threads_of(queries))
    scores, found = searcher.topk_by_id(rows, int(k), allowed, store.ids)
    return GalleryMatches(*(like(part, queries) for part in (scores, store.ids.take(found), store.positions(found))))


def ranks(
    store: Store, queries: Any, positives: Any, ties: Any, mask: Any, ids: Any, where: Any, exclude: Any
) -> Ranks:
    """See `Gallery.rank`."""
    if ties not in _TIES_BEFORE:
        raise ValueError(f"Gallery.rank: ties must be one of {', '.join(_TIES_BEFORE)}, got {ties!r}")
    rows = as_queries("Gallery.rank", queries, store)
    lists = as_id_lists("Gallery.rank", "positives", positives, len(rows), optional=False)
    wanted = Positives(rows_of("Gallery.rank", "positives", store, lists.ids), lists.offsets)
    filters = as_filter if store.device is None else as_device_filter
    allowed = filters("Gallery.rank", store, len(rows), mask, ids, where, exclude)
    greater, equal, scores = rank(store.blocks, store.metric, store.screen, rows, wanted, allowed, threads_of(queries))
    missing = np.flatnonzero(np.isnan(scores))
    if len(missing):
        row = int(np.searchsorted(lists.offsets, missing[0], side="right")) - 1
        name = name_some(lists.ids[missing[:1]])
        raise ValueError(f"Gallery.rank: queries row {row} has a NaN score with its positive {name}")
    parts = (greater + _TIES_BEFORE[ties] * equal, greater, equal, scores, None if lists.single else lists.offsets)
    return Ranks(*(like(part, queries) for part in parts))
