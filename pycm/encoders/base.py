"""What an encoder is: the protocols that matchers, the feature cache and users' own classes share."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    Protocol,
    TypeAlias,
    TypeVar,
    runtime_checkable,
)

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL.Image import Image

Modality: TypeAlias = Literal["image", "text"]
Features: TypeAlias = npt.NDArray[np.float32]
#: A path, a PIL image, or uint8 pixels of shape [H, W], [H, W, 1], [H, W, 3] (RGB) or [H, W, 4] (RGBA).
ImageItem: TypeAlias = "str | os.PathLike[str] | Image | npt.NDArray[np.uint8]"

T = TypeVar("T")


@runtime_checkable
class Encoder(Protocol):
    """Turns items of one modality into rows of features.

    Attributes:
        name: for people, e.g. ``"efficientnet-lite0"``.
        modality: "image" (items are `ImageItem`) or "text" (items are str). It tells a path from a sentence.
        dim: features per row.
        fingerprint: hex digest of all that determines the features: class, configuration, weights,
            preprocessing. Two encoders with one fingerprint give the same features; it keys the cache.
    """

    @property
    def name(self) -> str: ...
    @property
    def modality(self) -> Modality: ...
    @property
    def dim(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...

    def encode(self, items: Sequence[Any], *, batch_size: int = 32, progress: bool | None = None) -> Features:
        """Encode `items` to float32 [N, dim], row i being item i; N = 0 gives [0, dim].

        Args:
            items: images or texts, after `modality`.
            batch_size: items per forward pass; it changes a row by float rounding at most.
            progress: None shows a bar on a terminal only, True always, False never.

        Raises:
            UnreadableInputError: some images cannot be read; all are tried, and every one is named.
        """
        ...


@runtime_checkable
class ClassifierEncoder(Encoder, Protocol):
    """An image encoder that also classifies."""

    @property
    def class_names(self) -> list[str]: ...

    def classify(self, items: Sequence[Any], *, batch_size: int = 32, progress: bool | None = None) -> Features:
        """Class probabilities, float32 [N, len(class_names)], rows summing to 1."""
        ...


@contextmanager
def loading(kind: str, model: str) -> Iterator[None]:
    """Turns the many errors of hubs and libraries into a ValueError that names the model.

    The hub's client is told to be quiet about its retries, unless its logger was set to a level of its own.
    """
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    if level in (logging.NOTSET, logging.WARNING):
        logger.setLevel(logging.ERROR)
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"{kind}: cannot load {model!r}: {reason}") from error
    finally:
        logger.setLevel(level)


def check_batch_size(function: str, batch_size: int) -> None:
    """Raise ValueError unless `batch_size` is a positive int."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
        raise ValueError(f"{function}: batch_size must be a positive int, got {batch_size!r}")


def check_device(function: str, device: Any) -> None:
    """Raise ValueError for a device that torch does not know or find; None is always there."""
    if device is None:
        return
    import torch

    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{function}: device must be cpu, cuda or cuda:N, got {device!r}") from error
    count = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= count:
        there = f"torch finds {count or 'no'} CUDA device{'s' if count > 1 else ''}"
        raise ValueError(f"{function}: device must be there, got {device!r}, and {there}")


def check_seed(function: str, seed: Any) -> None:
    """Raise ValueError unless `seed` is one that NumPy and torch take."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**63:
        raise ValueError(f"{function}: seed must be an int in [0, 2**63), got {seed!r}")


def check_items(function: str, items: Sequence[Any]) -> None:
    """Raise TypeError for a lone string, path or image where a sequence of items belongs."""
    if isinstance(items, (str, bytes, os.PathLike)) or not hasattr(items, "__len__"):
        raise TypeError(f"{function}: items must be a sequence of items, got a single {type(items).__name__}")


def check_texts(function: str, items: Sequence[Any], what: str = "items") -> None:
    """Raise TypeError naming the first item that is not a str; `what` is the argument's name."""
    check_items(function, items)
    for i, item in enumerate(items):
        if not isinstance(item, str):
            raise TypeError(f"{function}: {what}[{i}] must be a str, got {type(item).__name__}")


def progress_bar(
    iterable: Iterable[T], *, progress: bool | None, total: int | None = None, desc: str | None = None
) -> Iterator[T]:
    """Iterate under a tqdm bar: None on a terminal only, True always, False never.

    A missing tqdm is an error only where a bar was asked for (`progress=True`).
    """
    if progress is False:
        return iter(iterable)
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        if progress is None:
            return iter(iterable)
        raise ImportError("progress=True needs tqdm: pip install tqdm") from None
    return iter(tqdm(iterable, total=total, desc=desc, disable=None if progress is None else False, leave=False))
