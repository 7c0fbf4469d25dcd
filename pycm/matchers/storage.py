"""Saved matchers: a folder with config.json and parts-*/, which holds space/ and text_encoder/.

config.json names the folder of its parts. To save over an older matcher is to write new parts beside its own
and then to replace config.json: whenever that is cut off, one of the two is there whole.
"""

from __future__ import annotations

import inspect
import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .._files import atomic_write
from ..encoders import Encoder
from ..encoders.base import Modality
from ..encoders.descriptor import TextDescriptor
from ..functional import METRICS, Metric
from ..spaces import Space, load_space
from ..spaces.base import BaseSpace
from ..text import load_text_encoder  # from there, so that every descriptor is known
from .features import make_encoders

if TYPE_CHECKING:
    from .image_text import ImageTextMatcher

_FORMAT = 1
CONFIG, SPACE, TEXT_ENCODER = "config.json", "space", "text_encoder"
_PARTS = "parts-"
# What a matcher with a network may be loaded with: the rest is the network's, or was only there to train it.
_LOADED = {"streams", "text_encoder", "image_encoder", "cache", "workers", "batch_size", "device", "progress"}


class Parts(NamedTuple):
    """What a matcher is made of."""

    image_encoder: Encoder
    text_encoder: Encoder
    space: Space | None
    metric: Metric
    image_spec: str | None
    text_spec: str | None
    fits_text: bool


def save(matcher: ImageTextMatcher, folder: str | os.PathLike[str]) -> None:
    """See `ImageTextMatcher.save`."""
    encoders = {  # RuntimeError of a text encoder that is not fitted
        "image_encoder": _describe(matcher.image_encoder, matcher.image_spec),
        "text_encoder": _describe(matcher.text_encoder, matcher.text_spec),
    }
    space, text_encoder = matcher.space, matcher.text_encoder
    # A space of another make has no way to be loaded: `load` asks for it.
    own = space if isinstance(space, BaseSpace) else None
    if own is not None and not own.fitted:
        raise RuntimeError(f"ImageTextMatcher.save: {type(own).__name__} is not fitted, call fit(images, texts) first")
    document = {
        "class": type(matcher).__name__,
        "format": _FORMAT,
        "metric": matcher.metric,
        **encoders,
        "space": None if space is None else {"class": type(space).__name__, "saved": own is not None},
        "fits_text": matcher._fits_text,
    }

    def write(parts: Path) -> None:
        if own is not None:
            own.save(parts / SPACE)
        if isinstance(text_encoder, TextDescriptor):
            text_encoder.save(parts / TEXT_ENCODER)

    write_folder(Path(folder), document, write)


def check_options(function: str, kind: type, options: Mapping[str, Any]) -> None:
    """Raise TypeError for an option of `load` that would contradict the saved network, or does not exist."""
    known = [name for name in inspect.signature(kind).parameters if name in _LOADED]
    for name in options:
        if name not in known:
            raise TypeError(f"{function}: unknown argument {name!r}; there are: {', '.join(known)}")


def write_folder(folder: Path, document: dict[str, Any], write: Callable[[Path], None]) -> None:
    """Save: `write` fills a new folder of parts, then `document` becomes config.json, then older parts go."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = folder / f"{_PARTS}{secrets.token_hex(6)}"
    older = _parts_of(folder)
    try:
        parts.mkdir()
        write(parts)
        with atomic_write(folder / CONFIG) as file:
            json.dump({**document, "parts": parts.name}, file, indent=2, ensure_ascii=False)
    except BaseException:
        # Not where an interrupt came after the replacement: then they are the saved matcher's.
        if _parts_of(folder) != parts:
            shutil.rmtree(parts, ignore_errors=True)  # the first error is the one to report
        raise
    if older is not None:
        shutil.rmtree(older, ignore_errors=True)  # the new matcher is saved; what is left is only space


def _parts_of(folder: Path) -> Path | None:
    """The folder of parts of the matcher saved in `folder`; None where there is none."""
    try:
        name = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["parts"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return folder / name if is_parts(name) else None


def is_parts(name: Any) -> bool:
    """Whether `name` is that of a folder of parts, and not of anything elsewhere."""
    return isinstance(name, str) and name.startswith(_PARTS) and name.removeprefix(_PARTS).isalnum()


def load(
    folder: str | os.PathLike[str],
    image_encoder: Encoder | str | None,
    text_encoder: Encoder | str | None,
    space: Space | None,
    device: Any,
    *,
    strict: bool,
) -> Parts:
    """See `ImageTextMatcher.load`."""
    path = Path(folder) / CONFIG
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        known = document["class"] == "ImageTextMatcher" and document["metric"] in METRICS
        version, parts = document["format"], document.get("parts")
        saved = {side: document[f"{side}_encoder"] for side in ("image", "text")}
        about_space, fits_text = document["space"], document.get("fits_text")
        space_saved = about_space is not None and about_space.get("saved")
        specs = {side: about["spec"] for side, about in saved.items()}
        fingerprints = {side: about["fingerprint"] for side, about in saved.items()}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"ImageTextMatcher.load: {path} is not a saved matcher: {error!r}") from error
    if not known:
        raise ValueError(f"ImageTextMatcher.load: {path} is not a saved matcher")
    if version != _FORMAT:
        raise ValueError(f"ImageTextMatcher.load: {path} has format {version!r}, this version reads {_FORMAT}")
    if not is_parts(parts):
        raise ValueError(f"ImageTextMatcher.load: {path} does not name the folder of its parts, got {parts!r}")
    parts_folder = path.parent / parts
    if space is None and space_saved:
        space = load_space(parts_folder / SPACE)
    elif space is None and about_space is not None:
        raise ValueError(
            f"ImageTextMatcher.load: the space of {path} is a {about_space.get('class')}, which is not saved; "
            "make it again and pass it: load(folder, space=...)"
        )
    found: dict[str, Encoder | str] = {}
    given: dict[Modality, Encoder | str | None] = {"image": image_encoder, "text": text_encoder}
    for side, replacement in given.items():
        if replacement is not None:
            specs[side] = replacement if isinstance(replacement, str) else None
        found[side] = _find(path, parts_folder, side, saved[side]) if replacement is None else replacement
    encoders = dict(zip(given, make_encoders(found["image"], found["text"], device), strict=True))
    for side, encoder in encoders.items():
        if strict and encoder.fingerprint != fingerprints[side]:
            raise ValueError(
                f"ImageTextMatcher.load: {side}_encoder {encoder.name!r} is not the one that {path} "
                "was saved with (its fingerprint differs); strict=False uses it nevertheless"
            )
    return Parts(
        encoders["image"],
        encoders["text"],
        space,
        document["metric"],
        specs["image"],
        specs["text"],
        isinstance(encoders["text"], TextDescriptor) and bool(fits_text),
    )


def _describe(encoder: Encoder, spec: str | None) -> dict[str, Any]:
    return {
        "name": encoder.name,
        "spec": spec,
        "saved": isinstance(encoder, TextDescriptor),
        "fingerprint": encoder.fingerprint,
    }


def _find(path: Path, folder: Path, side: Modality, about: dict[str, Any]) -> Encoder | str:
    """The saved text encoder, or the spec of one."""
    if about.get("saved"):
        return load_text_encoder(folder / TEXT_ENCODER)
    if about["spec"] is None:
        raise ValueError(
            f"ImageTextMatcher.load: the {side} encoder {about.get('name')!r} in {path} was not made from a "
            f"spec and is not saved; make it again and pass it: load(folder, {side}_encoder=...)"
        )
    return str(about["spec"])
