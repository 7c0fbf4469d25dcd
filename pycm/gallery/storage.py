"""The gallery's file: one safetensors file, mapped and not read. Specified in docs/gallery.md.

The safetensors package reads these files; it is not what writes them, because it lays tensors out without alignment
and wants all of them in memory at once.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .._optional import require

Array = npt.NDArray[Any]

FORMAT = "pycm.gallery"
VERSION = 1
ALIGNMENT = 64
HEADER_BYTES = 16384  # the length and the JSON, padded with spaces; the rows begin here
SMALL_TENSOR = 8 << 20  # tensors of at most so many bytes are checked whenever a file is opened
_PIECE = 16 << 20
_AHEAD = 128 << 10  # what the kernel reads ahead for one request, and no more
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "U32": "uint32", "I16": "int16", "U16": "uint16", "I8": "int8", "U8": "uint8",
}  # fmt: skip
_NAMES = {name: code for code, name in _DTYPES.items()}

if sys.byteorder != "little":
    raise ImportError("pycm.gallery: the file format is little-endian, and so must the machine be")


def dtype_of(name: str) -> np.dtype[Any]:
    """The dtype called so, bfloat16 included (ml_dtypes has it)."""
    if name == "bfloat16":
        bfloat16: np.dtype[Any] = np.dtype(require("ml_dtypes", "gallery", "a gallery of bfloat16").bfloat16)
        return bfloat16
    return np.dtype(name)


def bytes_of(array: Array) -> memoryview:
    """The bytes of an array, without a copy where it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


class Tensor(NamedTuple):
    """Where a tensor lies: bytes [start, stop) of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Info(NamedTuple):
    """What a file says of its gallery.

    Attributes:
        generation: a random name, new whenever the file is written; the journal beside it bears it too.
        replaces: the generation whose journal is done with, because its operations are in this file; or "".
        metric, screen: of the gallery.
        ids: "int64" or "str".
        next_id: what the next row gets that comes without an id.
        ordered: whether ids rise from row to row.
    """

    generation: str
    replaces: str
    metric: str
    screen: str
    ids: str
    next_id: int
    ordered: bool


# ---- reading ----


class GalleryFile:
    """An open gallery file, its header checked. Tensors are mapped when asked for.

    Raises:
        ValueError: naming the file and the reason, where it is truncated, damaged, not a gallery, or newer.
        OSError: untouched.
    """

    def __init__(self, function: str, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._function = function
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.stat = os.fstat(self.descriptor)
            self.tensors, self._sums, fields = self._read_header()
            self.info = self._parse(fields)
            for name, tensor in self.tensors.items():
                if tensor.stop - tensor.start <= SMALL_TENSOR:
                    self._verify(name, None)
        except BaseException:
            os.close(self.descriptor)
            raise

    def array(self, name: str) -> Array:
        """The tensor, mapped read-only. The map lives as long as the array."""
        tensor = self.tensors[name]
        return self.window(name, 0, tensor.shape[0], ahead=False)

    def window(self, name: str, start: int, stop: int, *, ahead: bool) -> Array:
        """Rows start to stop of the tensor, mapped read-only; `ahead` begins to read them from the disk."""
        tensor = self.tensors[name]
        dtype = dtype_of(tensor.dtype)
        row = dtype.itemsize * int(np.prod(tensor.shape[1:], dtype=np.int64))
        shape = (stop - start, *tensor.shape[1:])
        if (stop - start) * row == 0:
            return np.empty(shape, dtype)
        first = tensor.start + start * row
        base = first - first % mmap.ALLOCATIONGRANULARITY
        mapped = mmap.mmap(self.descriptor, first - base + (stop - start) * row, access=mmap.ACCESS_READ, offset=base)
        if ahead:
            for offset in range(first, first + (stop - start) * row, _AHEAD):
                os.posix_fadvise(self.descriptor, offset, _AHEAD, os.POSIX_FADV_WILLNEED)
        return np.frombuffer(mapped, dtype, (stop - start) * row // dtype.itemsize, first - base).reshape(shape)

    def verify(self) -> None:
        """Read every byte and compare with the checksums. Raises ValueError naming the tensor."""
        with progress(self.stat.st_size, "verify") as bar:
            for name in self.tensors:
                self._verify(name, bar)

    def close(self) -> None:
        """Arrays that were mapped stay valid."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _fail(self, reason: str) -> ValueError:
        return ValueError(f"{self._function}: {self.path}: {reason}")

    def _read_header(self) -> tuple[dict[str, Tensor], dict[str, int], dict[str, Any]]:
        size = self.stat.st_size
        head = os.pread(self.descriptor, 8, 0)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > 100_000_000:  # the limit of the safetensors package
            raise self._fail("not a safetensors file")
        if 8 + length > size:
            raise self._fail(
                f"truncated or not a safetensors file: its header should end at byte {8 + length} of {size}"
            )
        try:
            header: dict[str, Any] = json.loads(os.pread(self.descriptor, length, 8).decode("utf-8"))
            fields: dict[str, Any] = header.pop("__metadata__", {})
            form, version = fields.get("format"), fields.get("version")
        except (ValueError, AttributeError, RecursionError) as error:
            raise self._fail(f"not a safetensors file: its header is no JSON object ({error})") from None
        if form != FORMAT:
            raise self._fail(f"a safetensors file, but not a gallery: its format is {form!r}, expected {FORMAT!r}")
        if version != str(VERSION):
            raise self._fail(f"its format has version {version!r}, this pycm reads {VERSION}")
        expected = fields.pop("checksum", None)
        if expected != _header_checksum(header, fields):
            raise self._fail("damaged: the checksum of its header does not match")
        tensors = {}
        for name, about in header.items():  # the checksum matches, so this is as it was written
            start, stop = (8 + length + offset for offset in about["data_offsets"])
            tensors[name] = Tensor(_DTYPES[about["dtype"]], tuple(about["shape"]), start, stop)
        expected = max(tensor.stop for tensor in tensors.values())
        if expected != size:
            raise self._fail(f"truncated or extended: expected {expected} bytes, got {size}")
        return tensors, {name: int(value, 16) for name, value in json.loads(fields["crc32"]).items()}, fields

    @staticmethod
    def _parse(fields: dict[str, Any]) -> Info:
        generation, replaces, metric, screen, ids = (fields[name] for name in Info._fields[:5])
        return Info(generation, replaces, metric, screen, ids, int(fields["next_id"]), fields["ordered"] == "true")

    def _verify(self, name: str, bar: Any) -> None:
        tensor, value = self.tensors[name], 0
        for start in range(tensor.start, tensor.stop, _PIECE):
            piece = os.pread(self.descriptor, min(_PIECE, tensor.stop - start), start)
            value = zlib.crc32(piece, value)
            if bar is not None:
                bar.update(len(piece))
        if value != self._sums[name]:
            raise self._fail(f"damaged: the checksum of {name!r} does not match")


# ---- writing ----


class GalleryWriter:
    """Writes a gallery's tensors into `file` one after another, each from pieces, then the header before them."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._header: dict[str, Any] = {}
        self._sums: dict[str, str] = {}
        self._position = 0
        file.write(bytes(HEADER_BYTES))

    def write(self, name: str, dtype: np.dtype[Any], row: tuple[int, ...], pieces: Iterable[Array]) -> int:
        """Add tensor `name` of shape [n, *row], where n is what the pieces come to; returns n."""
        start, value, count = self._position, 0, 0
        for piece in pieces:
            data = bytes_of(piece)
            value = zlib.crc32(data, value)
            self._file.write(data)
            self._position += len(data)
            count += len(piece)
        self._header[name] = {
            "dtype": _NAMES[dtype.name],
            "shape": [count, *row],
            "data_offsets": [start, self._position],
        }
        self._sums[name] = f"{value:08x}"
        gap = -self._position % ALIGNMENT
        if gap:  # safetensors allows no bytes between tensors, so these are one
            self.write(f"padding.{len(self._header)}", np.dtype(np.uint8), (), [np.zeros(gap, np.uint8)])
        return count

    def write_array(self, name: str, array: Array) -> None:
        self.write(name, array.dtype, array.shape[1:], [array])

    def map_tensor(self, name: str) -> Array:
        """A tensor already written, mapped from the file."""
        self._file.flush()
        about = self._header[name]
        start, stop = about["data_offsets"]
        dtype, shape = dtype_of(_DTYPES[about["dtype"]]), tuple(about["shape"])
        if start == stop:
            return np.empty(shape, dtype)
        return np.memmap(self._file.name, dtype, "r", HEADER_BYTES + start, shape).view(np.ndarray)

    def finish(self, info: Info) -> None:
        """Write the header; the file is then whole."""
        text = {name: str(value) for name, value in info._asdict().items()}
        fields = {
            "format": FORMAT,
            "version": str(VERSION),
            **text,
            "ordered": "true" if info.ordered else "false",
            "crc32": json.dumps(self._sums),
        }
        fields["checksum"] = _header_checksum(self._header, fields)
        text_header = json.dumps({"__metadata__": fields, **self._header}, separators=(",", ":")).encode()
        length = HEADER_BYTES - 8
        if len(text_header) > length:
            raise ValueError(f"Gallery: the header of the file needs {len(text_header)} bytes, {length} are there")
        self._file.seek(0)
        self._file.write(length.to_bytes(8, "little") + text_header.ljust(length))


def _header_checksum(tensors: Mapping[str, Any], fields: Mapping[str, Any]) -> str:
    """CRC-32 of the header without this field, in one spelling."""
    canonical = json.dumps({"__metadata__": fields, **tensors}, sort_keys=True, separators=(",", ":"))
    return f"{zlib.crc32(canonical.encode()):08x}"


def sync_folder(path: Path) -> None:
    """Make a rename or a removal in the folder of `path` last."""
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _NoBar:
    def update(self, count: int) -> None:
        """Nothing to show."""


@contextmanager
def progress(total: int, label: str) -> Iterator[Any]:
    """A bar over bytes for what takes long, on a terminal and where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        yield _NoBar()
        return
    disable = True if total < 1 << 30 else None
    with tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=disable, leave=False) as bar:
        yield bar
