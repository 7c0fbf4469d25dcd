"""Features on disk, by key: a folder of small immutable files, safe against crashes and rivals.

Each finished batch is one shard, an uncompressed .npz of `keys` uint8 [n, 32] and the arrays of the n values:
`features` float32 [n, dim] where a value is a row (`RowStore`); `features` [S, dim], `times` float64 [S] and
`lengths` int64 [n] where it is a sequence of steps (`StepStore`). It is written under a temporary name and
renamed, and never changed. There is no index file that could disagree with the shards: a reader lists the
folder. Zip's CRC-32 of the arrays tells a damaged shard. Small shards are merged now and then; a merged shard
is complete on disk before those that it replaces are removed, so whoever lists the folder at any moment finds
every value at least once (or lists it again).
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from .._files import TEMPORARY_SUFFIX, atomic_write
from .base import Features

KEY_BYTES = 32
_SHARD_BYTES = 64 << 20  # of features, in a merged shard
_MERGE_AT = 16  # small shards
_STALE_SECONDS = 24 * 3600


Arrays = dict[str, npt.NDArray[Any]]
V = TypeVar("V")


class Steps(NamedTuple):
    """One sequence: a row of features at each time.

    Attributes:
        values: float32 [T, dim]; T = 0 where an item has no such sequence.
        times: float64 [T], seconds, ascending.
    """

    values: Features
    times: npt.NDArray[np.float64]


class ShardStore(ABC, Generic[V]):
    """Values of one encoder's method, in `folder` (made when first written to)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def _pack(self, values: Sequence[V]) -> Arrays:
        """The arrays that hold `values`."""

    @abstractmethod
    def _unpack(self, arrays: Mapping[str, npt.NDArray[Any]], n: int) -> list[V | None]:
        """What `_pack` packed, None for a value that is not finite. Raises ValueError for arrays of another kind."""

    @abstractmethod
    def _width(self, value: V) -> int:
        """Features in a row of `value`."""

    def read(self, keys: Sequence[bytes]) -> dict[bytes, V]:
        """The values of those `keys` that are there.

        A damaged shard is reported by a RuntimeWarning naming the file, and removed where the folder allows.
        """
        found: dict[bytes, V] = {}
        missing = set(keys)
        seen: set[Path] = set()
        while missing:
            vanished = False
            for path in self._shards():
                if path in seen:
                    continue
                try:
                    rows = self._read_shard(path, missing)
                except FileNotFoundError:  # another process has just merged it: list the folder again
                    vanished = True
                    continue
                seen.add(path)
                found |= rows
                missing -= rows.keys()
                if not missing:
                    break
            if not vanished:
                break
        return found

    def prepare(self, about: Mapping[str, Any]) -> None:
        """Make the folder ready for `write`. Raises OSError, before any work is lost, where it cannot be."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.folder / "about.json") as file:
            json.dump(dict(about), file, indent=2, ensure_ascii=False)
        for leftover in self.folder.glob(f".*{TEMPORARY_SUFFIX}"):  # of runs that were killed
            with suppress(OSError):
                if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                    leftover.unlink()

    def write(self, keys: Sequence[bytes], values: Sequence[V]) -> None:
        """Add one shard; when it returns, the values are on the disk. Raises OSError."""
        packed = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(len(keys), KEY_BYTES)
        arrays = self._pack(values)
        with atomic_write(self.folder / f"{secrets.token_hex(8)}.npz", "wb") as file:
            np.savez(file, keys=packed, **arrays)  # type: ignore[arg-type]

    def merge(self) -> None:
        """Merge small shards where there are many, so that reading stays fast."""
        small = [path for path in self._shards() if _size(path) < _SHARD_BYTES // 2]
        if len(small) < _MERGE_AT:
            return
        group: list[Path] = []
        for path in small:
            group.append(path)
            if sum(_size(p) for p in group) >= _SHARD_BYTES:
                self._merge(group)
                group = []
        if len(group) > 1:
            self._merge(group)

    def _merge(self, paths: Iterable[Path]) -> None:
        values: dict[bytes, V] = {}
        merged = []
        for path in paths:
            with suppress(FileNotFoundError):  # merged by another process meanwhile
                values |= self._read_shard(path, None)
                merged.append(path)
        if len({self._width(value) for value in values.values()}) != 1:
            return
        self.write(list(values), list(values.values()))
        for path in merged:
            with suppress(FileNotFoundError):
                path.unlink()

    def _shards(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.glob("*.npz") if not path.name.startswith("."))

    def _read_shard(self, path: Path, wanted: set[bytes] | None) -> dict[bytes, V]:
        """Values of `wanted` (None: all) in a shard; none, with a warning, if it is damaged."""
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as shard:
                names = [key.tobytes() for key in _checked(shard["keys"], np.uint8, (None, KEY_BYTES))]
                if wanted is not None and wanted.isdisjoint(names):
                    return {}
                values = self._unpack(shard, len(names))
            # A value that is not finite is none: earlier versions kept what a failing device returned.
            pairs = zip(names, values, strict=True)
            return {name: value for name, value in pairs if value is not None and (wanted is None or name in wanted)}
        except MemoryError:
            raise
        except Exception as error:  # a damaged zip or npy makes the readers raise nearly anything
            # The disk, the network or too many open files say nothing of the shard; EINVAL: a seek to nowhere does.
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                raise
            warnings.warn(
                f"FeatureCache: {path} is damaged ({error or type(error).__name__}); its rows are encoded again",
                RuntimeWarning,
                stacklevel=2,
            )
            with suppress(OSError):
                path.unlink()
            return {}


class RowStore(ShardStore[Features]):
    """A value is a row of features, float32 [dim]."""

    def _pack(self, values: Sequence[Features]) -> Arrays:
        return {"features": np.ascontiguousarray(values, dtype=np.float32)}

    def _unpack(self, arrays: Mapping[str, npt.NDArray[Any]], n: int) -> list[Features | None]:
        features = _checked(arrays["features"], np.float32, (n, None))
        finite = np.isfinite(features).all(axis=1)
        return [row if good else None for row, good in zip(features, finite, strict=True)]

    def _width(self, value: Features) -> int:
        return len(value)


class StepStore(ShardStore[Steps]):
    """A value is a sequence of rows."""

    def _pack(self, values: Sequence[Steps]) -> Arrays:
        return {
            "features": np.concatenate([steps.values for steps in values]),
            "times": np.concatenate([steps.times for steps in values]),
            "lengths": np.array([len(steps.values) for steps in values], dtype=np.int64),
        }

    def _unpack(self, arrays: Mapping[str, npt.NDArray[Any]], n: int) -> list[Steps | None]:
        lengths = _checked(arrays["lengths"], np.int64, (n,))
        if (lengths < 0).any():
            raise ValueError("a negative length")
        total = int(lengths.sum())
        features = _checked(arrays["features"], np.float32, (total, None))
        times = _checked(arrays["times"], np.float64, (total,))
        cuts = np.cumsum(lengths)[:-1]
        both = zip(np.split(features, cuts), np.split(times, cuts), strict=True)
        return [Steps(values, at) if np.isfinite(values).all() else None for values, at in both]

    def _width(self, value: Steps) -> int:
        return int(value.values.shape[1])


def _checked(array: npt.NDArray[Any], dtype: type, shape: tuple[int | None, ...]) -> npt.NDArray[Any]:
    """`array`, or ValueError unless it has that type and shape; None is any size."""
    fits = len(array.shape) == len(shape) and all(a in (None, b) for a, b in zip(shape, array.shape, strict=True))
    if array.dtype != dtype or not fits:
        raise ValueError(f"unexpected {array.dtype} of shape {array.shape}")
    return array


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return _SHARD_BYTES
