"""A training's state on the disk, and Ctrl-C held back until it can be written."""

from __future__ import annotations

import io
import os
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import torch

from .._files import atomic_write

if TYPE_CHECKING:
    from typing_extensions import Self

_NAME = "training.pt"
_FORMAT = 1


class Checkpoint:
    """training.pt in a folder: tensors and plain values, read without running code."""

    def __init__(self, folder: str | os.PathLike[str], identity: str) -> None:
        self.path = Path(folder) / _NAME
        self.identity = identity
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def read(self, device: torch.device) -> dict[str, Any] | None:
        """The state, or None where there is none yet. ValueError for one that is damaged or of another training."""
        if not self.path.exists():
            return None
        try:
            found = torch.load(self.path, map_location=device, weights_only=True)
            version, identity, state = found["format"], found["identity"], found["state"]
        except OSError:
            raise
        except Exception as error:  # what is no pickle, or half of one, makes the unpickler raise anything
            raise ValueError(
                f"fit: {self.path} is not a checkpoint, or a damaged one; remove it, or pass another folder as "
                "checkpoint"
            ) from error
        if version != _FORMAT:
            raise ValueError(f"fit: {self.path} has format {version!r}, this version reads {_FORMAT}")
        if identity != self.identity:
            raise ValueError(
                f"fit: {self.path} is of a training on other data or with other options; remove it, or pass another "
                "folder as checkpoint"
            )
        return dict(state)

    def write(self, state: dict[str, Any]) -> None:
        """Replace the file in one step. Raises OSError; the older file is then still there."""
        buffer = io.BytesIO()  # torch.save itself makes an obscure RuntimeError of a full disk
        torch.save({"format": _FORMAT, "identity": self.identity, "state": state}, buffer)
        with atomic_write(self.path, "wb") as file:
            file.write(buffer.getbuffer())


class Interrupts:
    """While entered, the first Ctrl-C only sets `pending`; a second one raises at once.

    Signals go to the main thread: in another one, or when not active, this does nothing.
    """

    def __init__(self, *, active: bool) -> None:
        self.pending = False
        self._active = active and threading.current_thread() is threading.main_thread()
        self._before: Any = None

    def __enter__(self) -> Self:
        if self._active:
            self._before = signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._active:
            signal.signal(signal.SIGINT, self._before)
        if kind is None:
            self.raise_pending()

    def raise_pending(self) -> None:
        """KeyboardInterrupt, if there was one."""
        if self.pending:
            raise KeyboardInterrupt

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.pending:
            raise KeyboardInterrupt
        self.pending = True
