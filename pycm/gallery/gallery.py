"""`Gallery`: embeddings prepared once and searched many times, in memory or in a file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from ..functional import Metric, Precision
from ..ranking import Ranks, Screen, Ties
from . import searches
from .arguments import as_batch, as_device, check_names, rows_of
from .batches import write_batches
from .ids import NO_ID, IdArray, as_ids, kind_of, without_repeats
from .kept import Kept
from .search import GalleryMatches
from .storage import dtype_of
from .store import Store

Mode: TypeAlias = Literal["r", "r+", "c"]
_MODES = ("r", "r+", "c")
_ITERATED = 1024  # rows read at once


class Gallery:
    """Embeddings with ids, encoded once for many exact searches; kept in memory, or in a file with a journal.

    A gallery is a set of (id, row) pairs: what a search finds depends on them alone, to the bit, whatever the order
    and the number of calls they were added in, whatever was removed in between, and however they are kept.

    Args:
        embeddings: ``[M, D]`` float32, float16, bfloat16 or float64; torch, NumPy or DLPack. They are copied, and kept
            where the first ones are: in CPU memory, or on a CUDA device.
        dim: D, where no embeddings are given; else it comes with the first ones.
        metric: ``dot``, ``cosine``, ``pearson``, ``euclidean`` or ``sqeuclidean``, of every search.
        ids, metadata: as in `add`.
        screen: the low-precision pass of the searches, as in `pycm.topk`; it changes time and memory alone.
        dtype: of the rows, a name; what is added is converted to it. By default that of the first embeddings, and
            then others are refused.

    Raises:
        TypeError, ValueError: as in `add`, or for an unknown name.

    On a CUDA device ids and metadata stay in the host's memory, and there are no files: ``to("cpu")`` gives what can be
    saved.

    Searches may run in any number of threads at once; `add`, `remove`, `compact` and `close` wait for them and then
    run alone. Memory: the rows, their encoding (from D to 4·D bytes a row), and about 100 bytes for each id added.
    """

    def __init__(
        self,
        embeddings: Any = None,
        *,
        dim: int | None = None,
        metric: Metric = "cosine",
        ids: Any = None,
        metadata: Any = None,
        screen: Screen = "auto",
        dtype: str | None = None,
    ) -> None:
        check_names(metric, screen, dtype)
        if dim is not None and dim < 1:
            raise ValueError(f"Gallery: dim must be at least 1, got {dim}")
        wanted = None if dtype is None else dtype_of(dtype)
        self._kept = Kept(Store(metric, screen, dim, wanted))
        self._converts = wanted is not None
        if embeddings is not None:
            self.add(embeddings, ids, metadata)
        elif ids is not None or metadata is not None:
            raise ValueError("Gallery: ids and metadata need embeddings")

    # ---- files ----

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        mode: Mode = "r",
        *,
        stream: bool | None = None,
        memory: int | None = None,
        verify: bool = False,
        sync: bool = True,
    ) -> Gallery:
        """The gallery of a file that `save` wrote, with what was added and removed since.

        Args:
            path: the file; its journal lies beside it, as ``<path>.journal``.
            mode: ``r`` refuses changes; ``r+`` appends each to the journal before the call returns, and keeps other
                writers out; ``c`` keeps changes in memory, until `save`.
            stream: search the rows in windows instead of mapping the whole file; None does so for a file larger than
                `memory`.
            memory: bytes that a search may take for rows and their encoding, beside the queries and what was added
                since the file was written; half the machine's memory by default.
            verify: read and check every byte now. Otherwise the header, the file's size and tensors of up to 8 MiB
                are checked now, which takes milliseconds whatever the size, and the rest by `verify`.
            sync: wait for the disk at each change. Without it what was acknowledged survives the death of the
                process, but not always that of the machine.

        Raises:
            ValueError: naming the file and the reason: it, or its journal, is truncated, damaged, not a gallery's, or
                of a newer format.
            BlockingIOError: mode ``r+``, and the file is open for writing elsewhere.
            OSError: untouched.
        """
        if mode not in _MODES:
            raise ValueError(f"Gallery.open: mode must be one of {', '.join(_MODES)}, got {mode!r}")
        if memory is not None and memory < 1:
            raise ValueError(f"Gallery.open: memory must be at least 1 byte, got {memory}")
        gallery = cls.__new__(cls)
        gallery._kept, gallery._converts = Kept.open(Path(path), mode, stream, memory, verify, sync), False
        return gallery

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        batches: Iterable[Any],
        *,
        metric: Metric = "cosine",
        screen: Screen = "auto",
        dtype: str | None = None,
    ) -> None:
        """Write a file from batches as they come: a gallery larger than memory. It appears whole, or not at all.

        Args:
            path: the file; an older one, with its journal, is replaced.
            batches: what `add` takes, one or more: embeddings ``[n, D]``, or tuples (embeddings, ids), or (embeddings,
                ids, metadata), where ids and metadata may be None.
            metric, screen, dtype: as of a gallery.

        Raises:
            TypeError, ValueError, BlockingIOError, OSError: as in `add` and `save`; or there is no batch.

        One batch is in memory at a time, and the ids and metadata of all. The encoding of the rows is left to the
        first search, or to `compact`.
        """
        check_names(metric, screen, dtype)
        write_batches(Path(path), batches, Store(metric, screen, None, None if dtype is None else dtype_of(dtype)))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, verify: bool = False) -> Gallery:
        """``open(path, "c")``: mapped, not read; changes stay in memory until `save`."""
        return cls.open(path, "c", verify=verify)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the gallery to a file of its own, whole or not at all; an older file, with its journal, is replaced.

        The rows that are there are written in their order, with their encoding (not that of a streamed gallery).
        Saved over its own file, a gallery opened with ``r+`` is compacted.

        Raises:
            ValueError: the gallery has no `dim` yet, or the journal beside an older file cannot be read.
            BlockingIOError: an older file is open for writing.
            OSError: untouched.
        """
        self._kept.save(Path(path))

    def compact(self) -> None:
        """Drop removed rows for good, and put what was added into the file.

        Opened with ``r+``, a new file takes the place of the old one at once, and the journal starts anew: killed at
        any moment, one of the two is there, whole. In memory the rows that are there are gathered. O(M·D) time.
        """
        self._kept.compact()

    def verify(self) -> None:
        """Compare every byte of the file with its checksums. ValueError names what is damaged."""
        self._kept.verify()

    def close(self) -> None:
        """Give the file, its lock and the memory back. Nothing is written: each change already is."""
        self._kept.close()

    def __enter__(self) -> Gallery:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise TypeError("Gallery: must be saved to be copied or sent to another process, which opens the file")

    def to(self, device: Any) -> Gallery:
        """The gallery with its rows on ``"cpu"`` or a CUDA device; itself where they are there, else a copy in memory.

        The copy has the same ids, metadata and results, and is its own: changes to one do not show in the other.
        """
        wanted, kept = as_device("Gallery.to", device), self._kept
        if wanted == kept.store.device:
            return self
        gallery = Gallery.__new__(Gallery)
        gallery._kept, gallery._converts = kept.to(wanted), self._converts
        return gallery

    # ---- changes ----

    def add(self, embeddings: Any, ids: Any = None, metadata: Any = None) -> IdArray:
        """Add rows, all or none; returns their ids, int64 ``[n]`` or str in an object array.

        Args:
            embeddings: ``[n, D]``, of the gallery's dtype.
            ids: n integers (any int64 but -1) or n strings, as those that are there. By default the integers that
                follow the highest one ever added, from 0 on.
            metadata: columns of n rows: a ``pyarrow.Table``, a dict of columns, or what has an Arrow stream (pandas,
                polars). Columns that a row does not have are null.

        Raises:
            TypeError: embeddings of another dtype, or ids of another kind.
            ValueError: shapes that do not fit, ids that are there already or come twice (they are named), or metadata
                that does not fit the columns that are there.
            io.UnsupportedOperation: opened with mode ``r``.
            OSError: the journal cannot be written; the gallery is as before.
        """
        with self._kept.changing("Gallery.add") as store:
            names, rows, table = as_batch("Gallery.add", store, embeddings, ids, metadata, self._converts)
            if len(rows):
                self._kept.add(names, rows, table)
            return names.copy()

    def remove(self, ids: Any) -> None:
        """Remove rows by id, all or none. They are passed over at once, and gone from the file with `compact`.

        Raises:
            KeyError: ids that are not there; they are named and nothing is removed.
            TypeError, ValueError: not a sequence of ids, or one that comes twice.
            io.UnsupportedOperation, OSError: as in `add`.
        """
        with self._kept.changing("Gallery.remove") as store:
            names = without_repeats("Gallery.remove", as_ids("Gallery.remove", "ids", ids))
            rows = rows_of("Gallery.remove", "ids", store, names)
            if len(rows):
                self._kept.remove(rows)

    # ---- searches ----

    def topk(
        self,
        queries: Any,
        k: int,
        *,
        mask: Any = None,
        ids: Any = None,
        where: Any = None,
        exclude: Any = None,
        precision: Precision = "exact",
    ) -> GalleryMatches:
        """The k best rows for each query.

        Args:
            queries: ``[N, D]``, of the gallery's dtype, on its device; torch, NumPy or DLPack.
            k: from 1 to ``len(gallery)``.
            mask: booleans ``[M]`` or ``[N, M]`` over the rows in the gallery, in the order of addition; only where it
                is true may a row match. In CPU memory, or on the gallery's device.
            ids: only these may match. KeyError for one that is not there.
            where: only rows whose metadata satisfy this pyarrow.compute expression may match, such as
                ``pc.field("year") > 2000``. mask, ids and where together must all allow a row.
            exclude: ids that a query must not match, such as its own: one for each query (-1 or None for none), a
                list of ids for each, or a pair ``(offsets [N + 1], ids)``. Ids that are not there exclude nothing.
            precision: as in `pycm.topk`. ``fast`` scores may depend on how the rows came and are kept.

        Returns:
            ``GalleryMatches(scores, ids, indices)``, each ``[N, k]``, of the queries' kind and on their device (strings
            in NumPy), ordered by score, then by id (strings by code point). No gradient flows through it. On CUDA a
            call waits for its result where ids are strings, or do not rise in the order of addition, and for the stream
            where exclude, ids, where or a mask of the host's is uploaded.

        Raises:
            TypeError, ValueError: queries, k or filters that do not fit, an empty gallery.
            KeyError: an id of `ids` that is not there.

        O(N·M·D) time. Where ids do not rise in the order of addition, one match more is asked for, and where the k-th
        and the next score the same, as many more as are needed to order the ties.
        """
        with self._kept.reading("Gallery.topk") as store:
            return searches.topk(store, queries, k, precision, mask, ids, where, exclude)

    def rank(
        self,
        queries: Any,
        positives: Any,
        *,
        ties: Ties = "realistic",
        mask: Any = None,
        ids: Any = None,
        where: Any = None,
        exclude: Any = None,
    ) -> Ranks:
        """How many rows stand before each query's positives; `pycm.rank` over the gallery.

        Args:
            queries: as in `topk`.
            positives: ids that are to be found: one for each query, a list of ids for each, possibly none, or a pair
                ``(offsets [N + 1], ids)``.
            ties: as in `pycm.rank`.
            mask, ids, where, exclude: rows that count, as in `topk`. A positive that does not count still has a rank.

        Returns:
            ``Ranks(ranks, greater, equal, scores, offsets)``.

        Raises:
            KeyError: a positive that is not there.
            TypeError, ValueError: as in `topk`, or a positive whose score is NaN.
        """
        with self._kept.reading("Gallery.rank") as store:
            return searches.ranks(store, queries, positives, ties, mask, ids, where, exclude)

    # ---- what is in it ----

    def get(self, ids: Any) -> Any:
        """The embeddings of some ids, copied: ``[n, D]`` for a sequence, ``[D]`` for one; tensors on a CUDA device.

        Raises:
            KeyError: ids that are not there; they are named.
        """
        single = isinstance(ids, (str, int, np.integer))
        with self._kept.reading("Gallery.get") as store:
            names = as_ids("Gallery.get", "ids", [ids] if single else ids)
            found = store.take(rows_of("Gallery.get", "ids", store, names))
        return found[0] if single else found

    def __contains__(self, id: Any) -> bool:
        if not isinstance(id, str):
            if not isinstance(id, (int, np.integer)) or isinstance(id, bool):
                return False
            if id == NO_ID or not -(2**63) <= id < 2**63:
                return False
        with self._kept.reading("Gallery") as store:
            names = as_ids("Gallery", "id", [id])
            return store.ids.kind == kind_of(names) and bool(store.find(names)[0] >= 0)

    def __len__(self) -> int:
        return self._kept.store.count

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        """Pairs (id, embedding [D]) in the order of addition. RuntimeError where the gallery changes meanwhile."""
        with self._kept.reading("Gallery") as store:
            rows, version = store.rows_at(), store.version
        for start in range(0, len(rows), _ITERATED):
            with self._kept.reading("Gallery") as now:
                if now is not store or now.version != version:
                    raise RuntimeError("Gallery: changed during iteration")
                chosen = rows[start : start + _ITERATED]
                names, embeddings = store.ids.take(chosen).tolist(), store.take(chosen)
            yield from zip(names, embeddings, strict=True)

    @property
    def ids(self) -> IdArray:
        """The ids in the order of addition, int64 ``[M]``, or str in an object array."""
        with self._kept.reading("Gallery.ids") as store:
            return store.ids.take(store.rows_at())

    @property
    def metadata(self) -> Any:
        """The metadata in the order of addition, a ``pyarrow.Table`` of M rows; None where there never was any."""
        with self._kept.reading("Gallery.metadata") as store:
            return None if store.metadata.empty else store.metadata.take(store.alive)

    @property
    def metric(self) -> str:
        """The metric of every search."""
        return self._kept.store.metric

    @property
    def dim(self) -> int | None:
        """D; None before the first rows, where it was not given."""
        return self._kept.store.dim

    @property
    def dtype(self) -> np.dtype[Any] | None:
        """Of the rows; None before the first, where it was not given."""
        return self._kept.store.dtype

    @property
    def device(self) -> str:
        """Where the rows are: ``cpu``, or a CUDA device such as ``cuda:0``."""
        return str(self._kept.store.device or "cpu")

    @property
    def path(self) -> Path | None:
        """The file that the gallery was opened from."""
        return self._kept.path

    def __repr__(self) -> str:
        kept = self._kept
        about = f"{len(self)} rows, dim={self.dim}, dtype={self.dtype}, metric={self.metric!r}"
        about += "" if self.device == "cpu" else f", device={self.device!r}"
        place = "" if kept.path is None else f", path={str(kept.path)!r}, mode={kept.mode!r}"
        return f"Gallery({'closed' if kept.closed else about}{place})"
