"""Writing files so that a reader, or a run killed at any moment, never sees half of one."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal, overload

TEMPORARY_SUFFIX = ".tmp"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@overload
def atomic_write(path: str | os.PathLike[str], mode: Literal["wb"]) -> AbstractContextManager[IO[bytes]]: ...
@overload
def atomic_write(path: str | os.PathLike[str], mode: Literal["w"] = "w") -> AbstractContextManager[IO[str]]: ...
def atomic_write(path: str | os.PathLike[str], mode: Literal["w", "wb"] = "w") -> AbstractContextManager[IO[Any]]:
    """Open a file that appears under `path`, complete, when the block ends, or not at all.

    The data go to a hidden file beside `path` (same file system), are flushed to the disk, and the file is
    renamed over `path`. If the block raises, KeyboardInterrupt included, the hidden file is removed and an
    older `path` stays as it was. Concurrent writers do not disturb each other: the last rename wins.

    Args:
        path: the final name; its folder must exist.
        mode: "w" (UTF-8, newlines written as they are) or "wb".

    Raises:
        OSError: from opening, writing or renaming; of a full disk with the name of `path`.
    """
    if mode not in ("w", "wb"):
        raise ValueError(f'atomic_write: mode must be "w" or "wb", got {mode!r}')
    return _atomic_write(Path(path), mode)


@contextmanager
def _atomic_write(path: Path, mode: str) -> Iterator[IO[Any]]:
    temporary = path.with_name(f".{path.name[:64]}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    # Mode "x" and not tempfile: files keep the permissions that the user's umask gives.
    try:
        with open(temporary, mode.replace("w", "x"), **text) as file:  # type: ignore[call-overload]
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # the first error is the one to report
            temporary.unlink()
        if isinstance(error, OSError) and error.errno in _FULL and error.filename is None:
            error.filename = str(path)  # a write knows none
        raise
