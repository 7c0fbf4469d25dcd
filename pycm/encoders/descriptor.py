"""What text descriptors share: fitting, encoding in batches, fingerprint, saving and loading."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from .._files import atomic_write
from .._optional import require
from .base import Features, Modality, check_batch_size, check_texts, progress_bar
from .fingerprint import digest_of

Self = TypeVar("Self", bound="TextDescriptor")
_FORMAT = 1


class TextDescriptor(ABC):
    """Base class of text descriptors: an `Encoder` of modality "text" that can be fitted and saved."""

    name: str
    modality: Modality = "text"
    _kinds: ClassVar[dict[str, type[TextDescriptor]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        other = TextDescriptor._kinds.setdefault(cls.__name__, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"{cls.__module__}: {other.__module__} has a text descriptor called {cls.__name__} already")
        TextDescriptor._kinds[cls.__name__] = cls  # one that a notebook defines anew

    @abstractmethod
    def fit(self: Self, texts: Sequence[str]) -> Self:
        """Learn what the descriptor needs from `texts`, and return self. An earlier fit is replaced."""

    @property
    @abstractmethod
    def fitted(self) -> bool:
        """Whether `encode` can be called."""

    @property
    @abstractmethod
    def dim(self) -> int:
        """Features per row. Raises RuntimeError before `fit`."""

    @abstractmethod
    def _rows(self, texts: list[str]) -> Features: ...

    @abstractmethod
    def _state(self) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
        """All that determines the features: JSON values, and arrays."""

    @classmethod
    @abstractmethod
    def _from_state(cls: type[Self], config: dict[str, Any], arrays: dict[str, npt.NDArray[Any]]) -> Self: ...

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 over class, settings and what was learned. Raises RuntimeError before `fit`."""
        self._check_fitted("fingerprint")
        return digest_of(type(self), *self._state())

    def encode(self, items: Sequence[str], *, batch_size: int = 1024, progress: bool | None = None) -> Features:
        """Encode texts to float32 [N, dim], dense: N * dim * 4 bytes. See `Encoder.encode`.

        A text without a known word gives a row of zeros, whose cosine with everything is 0.
        """
        function = f"{type(self).__name__}.encode"
        check_batch_size(function, batch_size)
        check_texts(function, items)
        self._check_fitted("encode")
        out = np.zeros((len(items), self.dim), dtype=np.float32)
        starts = range(0, len(items), batch_size)
        for start in progress_bar(starts, progress=progress, desc=self.name):
            out[start : start + batch_size] = self._rows(list(items[start : start + batch_size]))
        return out

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json, and weights.safetensors if there are arrays, to `folder` (made if missing).

        config.json is written last and holds the digest of the weights, so that `load` notices a save that
        was cut off. Raises OSError untouched; RuntimeError before `fit`.
        """
        self._check_fitted("save")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config, arrays = self._state()
        digest = None
        if arrays:
            dump = require("safetensors.numpy", "text", f"{type(self).__name__}.save").save
            data = dump({key: np.ascontiguousarray(value) for key, value in arrays.items()})
            digest = hashlib.sha256(data).hexdigest()
            with atomic_write(folder / "weights.safetensors", "wb") as binary:
                binary.write(data)
        document = {"class": type(self).__name__, "format": _FORMAT, "weights_sha256": digest, "config": config}
        with atomic_write(folder / "config.json") as text:
            json.dump(document, text, ensure_ascii=False, indent=1)

    @classmethod
    def load(cls: type[Self], folder: str | os.PathLike[str]) -> Self:
        """What `save` wrote.

        Raises:
            OSError: a file is missing.
            ValueError: not such a folder, another class, or weights that do not belong to the configuration.
        """
        loaded = load_text_encoder(folder)
        if not isinstance(loaded, cls):
            raise ValueError(f"{cls.__name__}.load: {folder} holds a {type(loaded).__name__}")
        return loaded

    def _check_fitted(self, method: str) -> None:
        if not self.fitted:
            raise RuntimeError(f"{type(self).__name__}.{method}: call fit(texts) first")


def load_text_encoder(folder: str | os.PathLike[str]) -> TextDescriptor:
    """The descriptor in a folder, of whichever class; errors as `TextDescriptor.load`."""
    path = Path(folder) / "config.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        kind = TextDescriptor._kinds[document["class"]]
        config, digest, version = document["config"], document["weights_sha256"], document["format"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the configuration of a text descriptor: {error!r}") from error
    if version != _FORMAT:
        raise ValueError(f"{path}: format {version!r}, but this version of pycm reads {_FORMAT}")
    arrays: dict[str, npt.NDArray[Any]] = {}
    if digest is not None:
        weights = path.with_name("weights.safetensors")
        data = weights.read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(f"{weights}: its bytes are not those that {path} was saved with")
        arrays = require("safetensors.numpy", "text", f"{kind.__name__}.load").load(data)
    return kind._from_state(config, arrays)
