"""`FeatureCache`: features kept on disk by content, so that nothing is encoded twice."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from .base import (
    Encoder,
    Features,
    check_batch_size,
    check_items,
    check_texts,
    progress_bar,
)
from .images import (
    PIXELS_VERSION,
    ImageReadError,
    UnreadableInputError,
    check_image,
    is_path,
    item_name,
    load_image,
    read_bytes,
)
from .store import RowStore, StepStore

_FORMAT = 1


class EncodeResult(NamedTuple):
    """What `FeatureCache.encode` returns.

    Attributes:
        features: float32 [len(kept), dim].
        kept: int64 [len(kept)], ascending: row r belongs to `items[kept[r]]`.
        errors: (item name, reason) of each image left out; empty unless on_error="skip".
    """

    features: Features
    kept: npt.NDArray[np.int64]
    errors: list[tuple[str, str]]


class FeatureCache:
    """A folder of features, keyed by each item's content (SHA-256), the encoder's fingerprint and the method.

    A file may be renamed or copied and is still found; when its bytes, the encoder's weights or its
    preprocessing change, it is encoded anew. Each finished batch is on the disk before the next begins: a run
    that was killed goes on from there. Damaged files are reported by a RuntimeWarning and their rows encoded
    again. Several processes may use one folder at once; at worst they encode the same batch twice.

    Cost of a second run: reading and hashing the inputs and reading the features; the encoder is not called.

    Args:
        folder: made if missing.

    Raises:
        OSError: the folder can be neither found nor made.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).expanduser()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(self.folder, error) from error

    def __repr__(self) -> str:
        return f"FeatureCache({str(self.folder)!r})"

    def encode(
        self,
        encoder: Encoder,
        items: Sequence[Any],
        *,
        method: str = "encode",
        batch_size: int = 32,
        progress: bool | None = None,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> EncodeResult:
        """`encoder.<method>(items)`, taking from the folder what is there and adding what is not.

        Equal items are encoded once. Memory: the features, twice while they are put in order, and one batch
        of images.

        Args:
            encoder: its `modality` tells whether items are images or texts; `fingerprint` is part of the key.
            items: images (`ImageItem`) or texts.
            method: "encode", or another method of the same signature, e.g. "classify".
            batch_size: items per call of the encoder, and per file written.
            progress: None shows a bar on a terminal only, True always, False never.
            on_error: what to do with images that cannot be read. All items are tried in either case, and the
                readable ones are encoded and kept. "raise" then raises; "skip" lists the others in `.errors`.

        Raises:
            UnreadableInputError: naming every unreadable image, with the reason.
            OSError: the folder cannot be written to; raised before anything is encoded.
            ValueError: an encoder that returns NaN or infinity (such rows are never kept; the item is named) or
                another shape than [B, dim]; wrong arguments.
            TypeError: wrong arguments.
        """
        function = "FeatureCache.encode"
        check_batch_size(function, batch_size)
        if on_error not in ("raise", "skip"):
            raise ValueError(f'{function}: on_error must be "raise" or "skip", got {on_error!r}')
        call = getattr(encoder, method, None)
        if not callable(call):
            raise TypeError(f"{function}: {type(encoder).__name__} has no method {method!r}")
        image = _is_image(function, encoder)
        (check_items if image else check_texts)(function, items)

        keys: list[bytes | None] = []
        reasons: dict[int, str] = {}
        for i, item in enumerate(items):
            try:
                keys.append(image_key(function, item, i) if image else text_key(item))
            except ImageReadError as error:
                keys.append(None)
                reasons[i] = str(error)
        first = {key: i for i, key in reversed(list(enumerate(keys))) if key is not None}
        store = self._store(encoder, method)
        rows = store.read(list(first))
        todo = sorted(i for key, i in first.items() if key not in rows)
        if todo:
            try:
                store.prepare(_about(encoder.name, encoder.fingerprint, method))
            except OSError as error:
                raise cannot_write(self.folder, error) from error
            run = _Run(function, encoder.name, call, store, rows, image, batch_size)
            for start in progress_bar(
                range(0, len(todo), batch_size), progress=progress, desc=f"{encoder.name} {method}"
            ):
                batch = {i: keys[i] for i in todo[start : start + batch_size]}
                try:
                    run.batch({i: items[i] for i in batch}, batch)
                except OSError as error:
                    raise cannot_write(self.folder, error) from error
            failed = {keys[i]: reason for i, reason in run.reasons.items()}
            reasons |= {i: failed[key] for i, key in enumerate(keys) if key in failed}
            store.merge()

        errors = [(item_name(items[i], i), reasons[i]) for i in sorted(reasons)]
        if errors and on_error == "raise":
            raise UnreadableInputError(errors, len(items))
        kept = np.array([i for i in range(len(items)) if i not in reasons], dtype=np.int64)
        chosen = [rows[key] for key in keys if key in rows]  # None is in no store
        features = np.stack(chosen) if chosen else np.asarray(call([]), dtype=np.float32)
        return EncodeResult(features, kept, errors)

    def steps(self, name: str, fingerprint: str, method: str) -> StepStore:
        """The sequences of a stream of clips, by `content_key`; `method` tells how the clips were sampled.

        Raises OSError where the folder cannot be written to.
        """
        store = StepStore(self._folder(fingerprint, method))
        try:
            store.prepare(_about(name, fingerprint, method))
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        return store

    def _store(self, encoder: Encoder, method: str) -> RowStore:
        fingerprint = encoder.fingerprint
        if not isinstance(fingerprint, str) or not fingerprint:
            raise TypeError(f"FeatureCache.encode: {type(encoder).__name__}.fingerprint must be a non-empty str")
        return RowStore(self._folder(fingerprint, method))

    def _folder(self, fingerprint: str, method: str) -> Path:
        return self.folder / hashlib.sha256(f"{_FORMAT}\0{fingerprint}\0{method}".encode()).hexdigest()[:32]


class _Run:
    """The batches that have to be encoded: results go to `rows` and the store, failures to `reasons`."""

    def __init__(
        self,
        function: str,
        encoder: str,
        call: Any,
        store: RowStore,
        rows: dict[bytes, Features],
        image: bool,
        batch_size: int,
    ) -> None:
        self.function, self.encoder, self.call, self.store, self.rows = function, encoder, call, store, rows
        self.image, self.batch_size = image, batch_size
        self.reasons: dict[int, str] = {}

    def batch(self, items: dict[int, Any], keys: dict[int, bytes | None]) -> None:
        inputs = dict(items)
        if self.image:
            inputs = {}
            for i, item in items.items():
                try:
                    inputs[i] = load_image(self._same_bytes(item, i, keys[i]) if is_path(item) else item)
                except ImageReadError as error:
                    self.reasons[i] = str(error)
        if not inputs:
            return
        features = self._encoded(list(inputs.values()))
        names = [key for i in inputs if (key := keys[i]) is not None]
        finite: npt.NDArray[np.bool_] = np.asarray(np.isfinite(features).all(axis=1))
        kept = [name for name, good in zip(names, finite, strict=True) if good]
        if kept:
            self.store.write(kept, list(features[finite]))
            self.rows.update(zip(kept, features[finite], strict=True))
        if len(kept) < len(names):
            bad = [i for i, good in zip(inputs, finite, strict=True) if not good]
            raise ValueError(
                f"{self.function}: {self.encoder} gives NaN or infinity for {len(bad)} of {len(names)} items of a "
                f"batch, the first being {_label(items[bad[0]], bad[0])}; rows like this are not kept"
            )

    def _same_bytes(self, path: Any, index: int, key: bytes | None) -> bytes:
        data = read_bytes(path)
        if _key("file", data) != key:
            raise ImageReadError("it changed while it was being read")
        return data

    def _encoded(self, inputs: list[Any]) -> Features:
        try:
            out = self.call(inputs, batch_size=self.batch_size, progress=False)
        except OSError as error:  # not one of this cache's files
            raise RuntimeError(f"{self.function}: the encoder failed: {error}") from error
        features: Features = np.asarray(out, dtype=np.float32)
        width = next((len(row) for row in self.rows.values()), None)
        if features.ndim != 2 or len(features) != len(inputs) or width not in (None, features.shape[1]):
            expected = "dim" if width is None else str(width)
            raise ValueError(
                f"{self.function}: the encoder must return [{len(inputs)}, {expected}], got {list(features.shape)}"
            )
        return features


def _about(name: str, fingerprint: str, method: str) -> dict[str, Any]:
    return {"format": _FORMAT, "encoder": name, "fingerprint": fingerprint, "method": method}


def _label(item: Any, index: int) -> str:
    """A path, or "items[i]" with the beginning of a text."""
    return f"items[{index}] {item[:60]!r}" if isinstance(item, str) else item_name(item, index)


def _is_image(function: str, encoder: Encoder) -> bool:
    modality = getattr(encoder, "modality", None)
    if modality not in ("image", "text"):
        raise TypeError(f'{function}: {type(encoder).__name__}.modality must be "image" or "text", got {modality!r}')
    return bool(modality == "image")


def content_key(kind: str, version: int, *parts: bytes | memoryview) -> bytes:
    """SHA-256 of an item's content; `version` is that of the code which reads it."""
    digest = hashlib.sha256(f"{kind}\0{version}\0{[len(part) for part in parts]}\0".encode())
    for part in parts:
        digest.update(part)
    return digest.digest()


def _key(kind: str, *parts: bytes) -> bytes:
    return content_key(kind, PIXELS_VERSION, *parts)


def text_key(text: str) -> bytes:
    """SHA-256 of a text, of any str."""
    return _key("text", text.encode("utf-8", "surrogatepass"))


def image_key(function: str, item: Any, index: int) -> bytes:
    """SHA-256 of an image's content: the file's bytes, or the pixels. Raises ImageReadError, TypeError."""
    check_image(function, item, index)
    if is_path(item):
        return _key("file", read_bytes(item))
    image = load_image(item)
    return _key("pixels", repr(image.size).encode(), image.tobytes())


def cannot_write(folder: Path, error: OSError) -> OSError:
    """`error` as one that names the cache's folder."""
    reason = error.strerror or str(error)
    return OSError(error.errno or 0, f"FeatureCache: cannot write to {folder}: {reason}")
