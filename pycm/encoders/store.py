"""Feature rows on disk, by key: a folder of small immutable files, safe against crashes and rivals.

Each finished batch is one shard, an uncompressed .npz of `keys` uint8 [n, 32] and `features` float32
[n, dim], written under a temporary name and renamed. A shard is never changed. There is no index file
that could disagree with the shards: a reader lists the folder. Zip's CRC-32 of both arrays tells a damaged
shard. Small shards are merged now and then; a merged shard is complete on disk before those that it
replaces are removed, so whoever lists the folder at any moment finds every row at least once (or lists it
again).
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .._files import TEMPORARY_SUFFIX, atomic_write
from .base import Features

KEY_BYTES = 32
_SHARD_BYTES = 64 << 20  # of features, in a merged shard
_MERGE_AT = 16  # small shards
_STALE_SECONDS = 24 * 3600


class ShardStore:
    """Rows of one encoder's method, in `folder` (made when first written to)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, keys: Sequence[bytes]) -> dict[bytes, Features]:
        """The rows of those `keys` that are there.

        A damaged shard is reported by a RuntimeWarning naming the file, and removed where the folder allows.
        """
        found: dict[bytes, Features] = {}
        missing = set(keys)
        seen: set[Path] = set()
        while missing:
            vanished = False
            for path in self._shards():
                if path in seen:
                    continue
                try:
                    rows = _read_shard(path, missing)
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

    def write(self, keys: Sequence[bytes], features: Features) -> None:
        """Add one shard; when it returns, the rows are on the disk. Raises OSError."""
        packed = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(len(keys), KEY_BYTES)
        with atomic_write(self.folder / f"{secrets.token_hex(8)}.npz", "wb") as file:
            np.savez(file, keys=packed, features=np.ascontiguousarray(features, dtype=np.float32))

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
        rows: dict[bytes, Features] = {}
        merged = []
        for path in paths:
            with suppress(FileNotFoundError):  # merged by another process meanwhile
                rows |= _read_shard(path, None)
                merged.append(path)
        widths = {row.shape[0] for row in rows.values()}
        if len(widths) != 1:
            return
        self.write(list(rows), np.stack(list(rows.values())))
        for path in merged:
            with suppress(FileNotFoundError):
                path.unlink()

    def _shards(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.glob("*.npz") if not path.name.startswith("."))


def _read_shard(path: Path, wanted: set[bytes] | None) -> dict[bytes, Features]:
    """Rows of `wanted` (None: all) in a shard; none, with a warning, if it is damaged."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as shard:
            keys = _checked(shard["keys"], np.uint8, KEY_BYTES)
            names = [key.tobytes() for key in keys]
            chosen = [i for i, name in enumerate(names) if wanted is None or name in wanted]
            if not chosen:
                return {}
            features = _checked(shard["features"], np.float32, None)
            if len(features) != len(names):
                raise ValueError(f"{len(names)} keys but {len(features)} rows")
        # A row that is not finite is none: earlier versions kept what a failing device returned.
        return {names[i]: features[i] for i in chosen if np.isfinite(features[i]).all()}
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


def _checked(array: npt.NDArray[Any], dtype: type, columns: int | None) -> npt.NDArray[Any]:
    if array.dtype != dtype or array.ndim != 2 or (columns is not None and array.shape[1] != columns):
        raise ValueError(f"unexpected {array.dtype} of shape {array.shape}")
    return array


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return _SHARD_BYTES
