"""A store from a file and its journal, and into a file."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pycm import _C

from .._files import TEMPORARY_SUFFIX, atomic_write
from ._locks import lock_open_file
from .blocks import Block, RowsBlock, StreamBlock
from .ids import Ids, decode_ids, encode_ids, kind_of
from .journal import JournalReader, JournalWriter, Record, journal_generation, journal_path
from .metadata import Metadata, encode_table
from .storage import GalleryFile, GalleryWriter, Info, bytes_of, dtype_of, progress, sync_folder
from .store import Store

Array = npt.NDArray[Any]
_ENCODED = "encoded."


class Opened(NamedTuple):
    """A store, the file that it maps, and the journal's state: None where there is none."""

    store: Store
    file: GalleryFile
    journal: JournalReader | None


def read(function: str, path: Path, verify: bool, window_bytes: int | None) -> Opened:
    """The gallery at `path` with the operations of its journal; windows of so many bytes, None for a whole map.

    Raises:
        ValueError: naming the file and the reason, where it or its journal is damaged, not a gallery's, or newer.
        OSError: untouched.
    """
    while True:
        file = GalleryFile(function, path)
        opened: Opened | None = None
        refused: Exception | None = None
        try:
            if verify:
                file.verify()
            store = _base(function, file, window_bytes)
            opened = Opened(store, file, _replay(function, file, store))
        except (ValueError, FileNotFoundError) as error:
            refused = error
        finally:
            if opened is None:
                file.close()
        # A writer that compacts puts a new file here and then takes the journal away: what was read belongs together,
        # and what was wrong is wrong, if the file is still the same.
        if os.path.samestat(file.stat, os.stat(path)):
            if opened is None:
                assert refused is not None
                raise refused
            return opened
        file.close()


def _base(function: str, file: GalleryFile, window_bytes: int | None) -> Store:
    info, tensor = file.info, file.tensors["rows"]
    names = [name for name in file.tensors if name.startswith(_ENCODED)]
    base: Block
    if window_bytes is not None:
        base = StreamBlock(info.metric, info.screen, file, window_bytes)
    else:
        state = {name.removeprefix(_ENCODED): file.array(name) for name in names}
        try:
            base = RowsBlock(info.metric, info.screen, file.array("rows"), state or None)
        except ValueError as error:
            raise ValueError(f"{function}: {file.path}: {error}") from error
    column = decode_ids({name: file.array(name) for name in ("ids", "ids.offsets") if name in file.tensors})
    ids = Ids(column, ordered=info.ordered, next_id=info.next_id)
    metadata = Metadata(file.array("metadata") if "metadata" in file.tensors else None, tensor.shape[0])
    return Store(info.metric, info.screen, tensor.shape[1], dtype_of(tensor.dtype), base, ids, metadata)


# ---- the journal ----


def add_record(store: Store, ids: Any, rows: Array, table: Any) -> tuple[dict[str, Any], list[Any]]:
    """An addition as a record of the journal."""
    texts = encode_ids(ids)
    about = {"op": "add", "at": store.rows, "rows": len(rows), "ids": list(texts), "metadata": table is not None}
    arrays = [*texts.values(), *([] if table is None else [np.frombuffer(encode_table(table), np.uint8)]), rows]
    return about, [bytes_of(array) for array in arrays]


def remove_record(store: Store, rows: npt.NDArray[np.int64]) -> tuple[dict[str, Any], list[Any]]:
    """A removal as a record of the journal."""
    return {"op": "remove", "at": store.rows}, [bytes_of(rows)]


def _apply(store: Store, record: Record) -> None:
    about, parts = record
    if about["at"] != store.rows:
        raise ValueError(f"an operation on {about['at']} rows, where there are {store.rows}")
    if about["op"] == "remove":
        store.remove(np.frombuffer(parts[0], np.int64))
        return
    if about["op"] != "add":
        raise ValueError(f"an unknown operation {about['op']!r}")
    dtypes = {"ids": np.uint8 if len(about["ids"]) == 2 else np.int64, "ids.offsets": np.int64}
    texts = {name: np.frombuffer(part, dtypes[name]) for name, part in zip(about["ids"], parts, strict=False)}
    column = decode_ids(texts)
    table = bytes(parts[-2]) if about["metadata"] else None
    assert store.dtype is not None
    assert store.dim is not None
    rows = np.frombuffer(parts[-1], store.dtype).reshape(about["rows"], store.dim)
    store.add(column[np.arange(len(column))], rows, table)


def _replay(function: str, file: GalleryFile, store: Store) -> JournalReader | None:
    path = journal_path(file.path)
    generation = journal_generation(function, path)
    if generation is None or generation == file.info.replaces:
        return None
    if generation != file.info.generation:
        raise ValueError(f"{function}: {path}: the journal of another gallery than {file.path}; nothing was changed")
    reader = JournalReader(function, path)
    with progress(path.stat().st_size, "replay") as bar:
        for record in reader:
            try:
                _apply(store, record)
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise ValueError(f"{function}: {path}: cannot be replayed at byte {reader.end}: {error}") from error
            bar.update(sum(map(len, record.parts)))
    return reader


def journal_writer(opened: Opened, sync: bool) -> JournalWriter:
    """The journal of an opened gallery, to append to; for the one who holds the lock."""
    path, reader = journal_path(opened.file.path), opened.journal
    end, marked = (None, True) if reader is None else (reader.end, reader.marked)
    return JournalWriter(path, opened.file.info.generation, end, marked, sync)


# ---- writing ----


def save(function: str, path: Path, store: Store, encode: bool) -> int:
    """`write` the rows of the store that are there."""
    if store.dim is None:
        raise ValueError(f"{function}: the gallery has no rows and no dim; give dim when it is made")
    dtype, dim = np.dtype(np.float32) if store.dtype is None else store.dtype, store.dim

    def fill(writer: GalleryWriter) -> None:
        with progress(store.count * dim * dtype.itemsize, "write") as bar:
            writer.write("rows", dtype, (dim,), _watch(store.pieces(), bar))
        if encode and store.count:
            for name, array in _encoded(writer, store).items():
                writer.write_array(_ENCODED + name, array)

    return write(function, path, store, fill)


def write(function: str, path: Path, store: Store, fill: Callable[[GalleryWriter], object]) -> int:
    """Write a file at `path`, whole or not at all; for the one who holds the lock of an older one.

    `fill` writes the rows, and then there are the ids and metadata of the store's rows that are there. The journal
    that lies beside an older file is removed: its operations are in the new one, or belong to what is overwritten.
    Returns a descriptor that holds the lock of the new file.
    """
    journal = journal_path(path)
    replaces = journal_generation(function, journal) or ""
    descriptor = -1
    try:
        with atomic_write(path, "wb") as file:
            lock_open_file(function, file.name, file.fileno())
            descriptor = os.dup(file.fileno())  # keeps the lock while the file gets its name
            writer = GalleryWriter(file)
            fill(writer)
            _write_names(writer, store, replaces)
        sync_folder(path)
        if replaces:
            journal.unlink()
            sync_folder(path)
    except BaseException:
        if descriptor >= 0:
            os.close(descriptor)
        raise
    return descriptor


def _write_names(writer: GalleryWriter, store: Store, replaces: str) -> None:
    """Ids, metadata and the header."""
    ids = store.ids.take(store.rows_at())
    for name, array in encode_ids(ids).items():
        writer.write_array(name, array)
    if not store.metadata.empty:
        writer.write_array("metadata", np.frombuffer(encode_table(store.metadata.take(store.alive)), np.uint8))
    ordered = store.ids.ordered or bool(np.all(ids[:-1] < ids[1:]))
    generation = secrets.token_hex(16)
    writer.finish(Info(generation, replaces, store.metric, store.screen, kind_of(ids), store.ids.next_id, ordered))


def _encoded(writer: GalleryWriter, store: Store) -> Mapping[str, Array]:
    """The encoding of the rows just written: the store's own where it has one of just these rows."""
    if len(store.blocks) == 1 and store.complete and isinstance(store.blocks[0], RowsBlock):
        return dict(store.blocks[0].encoded().state())
    encoded = _C.EncodedGallery(store.metric, store.screen)
    encoded.extend(writer.map_tensor("rows"))
    return dict(encoded.state())


def _watch(pieces: Any, bar: Any) -> Any:
    for piece in pieces:
        yield piece
        bar.update(piece.nbytes)


def remove_leftovers(path: Path) -> None:
    """Remove what killed writers of `path` left half-written; those still at work hold a lock."""
    names = "|".join(re.escape(name) for name in (path.name, journal_path(path).name) if len(name) <= 64)
    ours = re.compile(rf"\.({names})\.\d+-[0-9a-f]{{8}}{re.escape(TEMPORARY_SUFFIX)}")
    for leftover in path.parent.iterdir():
        if not names or not ours.fullmatch(leftover.name):
            continue
        try:
            descriptor = os.open(leftover, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink(missing_ok=True)
        except BlockingIOError:
            continue
        finally:
            os.close(descriptor)
