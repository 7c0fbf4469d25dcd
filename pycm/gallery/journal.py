"""The journal beside a gallery's file: the operations since that file was written. Specified in docs/gallery.md.

An operation is acknowledged when its record, and then the mark after it, are written; the record is on the disk
before its mark is written. So a damaged stretch that no mark follows was never acknowledged, and is what a killed
writer leaves; before a mark, damage is damage.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .._files import atomic_write
from .storage import sync_folder

_MAGIC = b"PYCMJRNL"
_VERSION = 1
_HEADER = struct.Struct("<8sI16sI")  # magic, version, generation, CRC-32 of those
_FRAME = struct.Struct("<QII")  # bytes of the payload, its CRC-32, CRC-32 of those two
_LENGTH = struct.Struct("<I")
_MARK = b"\x8bPYCMok\n"
_PIECE = 1 << 20
_MAX_WRITE = 1 << 30

Buffer = bytes | bytearray | memoryview


class Record(NamedTuple):
    """One operation: what it is, and its data. `about["sizes"]` are the lengths of the parts of the data."""

    about: dict[str, Any]
    parts: list[memoryview]


def journal_path(path: Path) -> Path:
    return path.with_name(path.name + ".journal")


def journal_generation(function: str, path: Path) -> str | None:
    """The generation that the journal at `path` belongs to; None where there is no journal."""
    try:
        with open(path, "rb") as file:
            head = file.read(_HEADER.size)
    except FileNotFoundError:
        return None
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise ValueError(f"{function}: {path}: not the journal of a gallery")
    _, version, generation, checksum = _HEADER.unpack(head)
    if checksum != zlib.crc32(head[:-4]):
        raise ValueError(f"{function}: {path}: damaged: the checksum of its header does not match")
    if version != _VERSION:
        raise ValueError(f"{function}: {path}: its format has version {version}, this pycm reads {_VERSION}")
    return str(generation.hex())


class JournalReader:
    """The records of the journal at `path`, in order.

    After the iteration `end` is where the last whole record ends, and `marked` whether its mark is there too.
    """

    def __init__(self, function: str, path: Path) -> None:
        self._function, self._path = function, path
        self.end = _HEADER.size
        self.marked = True

    def __iter__(self) -> Iterator[Record]:
        with open(self._path, "rb", buffering=0) as file:
            descriptor = file.fileno()
            while True:
                frame = os.pread(descriptor, _FRAME.size, self.end)
                if not frame:
                    return
                payload = self._payload(descriptor, frame)
                if payload is None:
                    if not self._acknowledged_beyond(descriptor):
                        return
                    # A writer may have finished the record since it was read; damage stays.
                    payload = self._payload(descriptor, os.pread(descriptor, _FRAME.size, self.end))
                    if payload is None:
                        raise self._damage()
                (length,) = _LENGTH.unpack_from(payload)
                about = json.loads(payload[_LENGTH.size : _LENGTH.size + length])
                position, parts = _LENGTH.size + length, []
                for size in about["sizes"]:
                    parts.append(memoryview(payload)[position : position + size])
                    position += size
                yield Record(about, parts)
                self.end += _FRAME.size + len(payload)
                mark = os.pread(descriptor, len(_MARK), self.end)
                self.marked = mark == _MARK
                if not self.marked:
                    if not self._acknowledged_beyond(descriptor):
                        return
                    self.marked = os.pread(descriptor, len(_MARK), self.end) == _MARK
                    if not self.marked:
                        raise self._damage()
                self.end += len(_MARK)

    def _payload(self, descriptor: int, frame: bytes) -> bytearray | None:
        """The payload at `end`; None where it is not whole."""
        if len(frame) < _FRAME.size:
            return None
        length, checksum, frame_checksum = _FRAME.unpack(frame)
        if frame_checksum != zlib.crc32(frame[:-4]):
            return None
        start = self.end + _FRAME.size
        if start + length > os.fstat(descriptor).st_size:
            return None
        payload = bytearray(length)
        with memoryview(payload) as view:
            for offset in range(0, length, _MAX_WRITE):
                os.preadv(descriptor, [view[offset : offset + _MAX_WRITE]], start + offset)
        return payload if zlib.crc32(payload) == checksum else None

    def _acknowledged_beyond(self, descriptor: int) -> bool:
        """Whether there is a mark, hence an acknowledged operation, beyond `end`."""
        position, before = self.end, b""
        while piece := os.pread(descriptor, _PIECE, position):
            if _MARK in before + piece:
                return True
            position, before = position + len(piece), piece[1 - len(_MARK) :]
        return False

    def _damage(self) -> ValueError:
        return ValueError(
            f"{self._function}: {self._path}: damaged at byte {self.end}, before operations that were "
            "acknowledged; nothing was changed"
        )


class JournalWriter:
    """Appends records to the journal at `path`. The file appears, whole, with the first record.

    Args:
        path, generation: of the journal.
        end: where the last whole record ends, from `JournalReader`; None where there is no journal. What lies
            beyond it is cut off.
        marked: whether that record has its mark.
        sync: wait for the disk before an operation is acknowledged. Without it a killed process loses nothing, a
            machine that loses power may.
    """

    def __init__(self, path: Path, generation: str, end: int | None, marked: bool, sync: bool) -> None:
        self._path, self._generation, self._sync = path, generation, sync
        self._descriptor = -1
        self._size = 0
        if end is None:
            return
        self._open()
        try:
            self._size = end
            if os.fstat(self._descriptor).st_size != end:
                os.ftruncate(self._descriptor, end)
            if not marked:
                os.fsync(self._descriptor)
                _write(self._descriptor, _MARK)
                self._size += len(_MARK)
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        """Bytes of the journal; 0 where there is none."""
        return self._size

    def append(self, about: dict[str, Any], parts: Sequence[Buffer]) -> None:
        """Write one operation; it is acknowledged when this returns, and has not happened when this raises."""
        head = json.dumps({**about, "sizes": [len(part) for part in parts]}).encode()
        pieces: list[Buffer] = [_LENGTH.pack(len(head)) + head, *parts]
        checksum = 0
        for piece in pieces:
            checksum = zlib.crc32(piece, checksum)
        frame = struct.pack("<QI", sum(map(len, pieces)), checksum)
        pieces.insert(0, frame + struct.pack("<I", zlib.crc32(frame)))
        size = sum(map(len, pieces)) + len(_MARK)
        if self._descriptor < 0:
            head = struct.pack("<8sI16s", _MAGIC, _VERSION, bytes.fromhex(self._generation))
            pieces.insert(0, head + struct.pack("<I", zlib.crc32(head)))
            self._create([*pieces, _MARK])
            self._size = _HEADER.size + size
            return
        self.check()
        try:
            for piece in pieces:
                _write(self._descriptor, piece)
            if self._sync:
                os.fsync(self._descriptor)
            _write(self._descriptor, _MARK)
            self._size += size
        except BaseException:
            os.ftruncate(self._descriptor, self._size)
            raise

    def check(self) -> None:
        """Raise RuntimeError where the file does not end where this writer left it."""
        if self._descriptor >= 0 and os.fstat(self._descriptor).st_size != self._size:
            raise RuntimeError(
                f"Gallery: {self._path} was changed by someone else; close the gallery and open it again"
            )

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _create(self, pieces: Sequence[Buffer]) -> None:
        try:
            with atomic_write(self._path, "wb") as file:  # on the disk, mark and all, before it has its name
                for piece in pieces:
                    file.write(piece)
            self._open()
            sync_folder(self._path)
        except BaseException:
            self.close()
            self._path.unlink(missing_ok=True)  # it held this operation alone, or nothing that counts
            raise

    def _open(self) -> None:
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)


def _write(descriptor: int, data: Buffer) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view[:_MAX_WRITE]) :]
