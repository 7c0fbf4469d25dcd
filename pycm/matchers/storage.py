"""Saved matchers: a folder of config.json, space/ and text_encoder/."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .._files import atomic_write
from ..encoders import Encoder, get_encoder
from ..encoders.base import Modality
from ..encoders.descriptor import TextDescriptor
from ..functional import METRICS, Metric
from ..spaces import Space, load_space
from ..text import load_text_encoder  # from there, so that every descriptor is known

if TYPE_CHECKING:
    from .image_text import ImageTextMatcher

_FORMAT = 1
_CONFIG = "config.json"
_SPACE, _TEXT_ENCODER = "space", "text_encoder"


class Parts(NamedTuple):
    """What a matcher is made of."""

    image_encoder: Encoder
    text_encoder: Encoder
    space: Space | None
    metric: Metric
    image_spec: str | None
    text_spec: str | None


def save(matcher: ImageTextMatcher, folder: str | os.PathLike[str]) -> None:
    """See `ImageTextMatcher.save`."""
    folder = Path(folder)
    encoders = {
        "image_encoder": _describe(matcher.image_encoder, matcher.image_spec),
        "text_encoder": _describe(matcher.text_encoder, matcher.text_spec),
    }
    document = {
        "class": type(matcher).__name__,
        "format": _FORMAT,
        "metric": matcher.metric,
        **encoders,
        "space": None if matcher.space is None else _SPACE,
    }
    folder.mkdir(parents=True, exist_ok=True)
    # Whoever finds config.json finds the rest: an older one goes first, the new one comes last.
    (folder / _CONFIG).unlink(missing_ok=True)
    if matcher.space is not None:
        matcher.space.save(folder / _SPACE)
    if isinstance(matcher.text_encoder, TextDescriptor):
        matcher.text_encoder.save(folder / _TEXT_ENCODER)
    with atomic_write(folder / _CONFIG) as file:
        json.dump(document, file, indent=2, ensure_ascii=False)


def load(
    folder: str | os.PathLike[str],
    image_encoder: Encoder | str | None,
    text_encoder: Encoder | str | None,
    *,
    strict: bool,
) -> Parts:
    """See `ImageTextMatcher.load`."""
    path = Path(folder) / _CONFIG
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        known = document["class"] == "ImageTextMatcher" and document["metric"] in METRICS
        version = document["format"]
        saved = {side: document[f"{side}_encoder"] for side in ("image", "text")}
        space_folder = document["space"]
        specs = {side: about["spec"] for side, about in saved.items()}
        fingerprints = {side: about["fingerprint"] for side, about in saved.items()}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"ImageTextMatcher.load: {path} is not a saved matcher: {error!r}") from error
    if not known:
        raise ValueError(f"ImageTextMatcher.load: {path} is not a saved matcher")
    if version != _FORMAT:
        raise ValueError(f"ImageTextMatcher.load: {path} has format {version!r}, this version reads {_FORMAT}")
    space = None if space_folder is None else load_space(path.parent / _SPACE)
    encoders: dict[str, Encoder] = {}
    given: dict[Modality, Encoder | str | None] = {"image": image_encoder, "text": text_encoder}
    for side, replacement in given.items():
        if isinstance(replacement, str):
            specs[side] = replacement
        elif replacement is not None:
            specs[side] = None
        encoders[side] = _restore(path, side, saved[side], replacement)
        if strict and encoders[side].fingerprint != fingerprints[side]:
            raise ValueError(
                f"ImageTextMatcher.load: {side}_encoder {encoders[side].name!r} is not the one that {path} "
                "was saved with (its fingerprint differs); strict=False uses it nevertheless"
            )
    return Parts(encoders["image"], encoders["text"], space, document["metric"], specs["image"], specs["text"])


def _describe(encoder: Encoder, spec: str | None) -> dict[str, Any]:
    return {
        "name": encoder.name,
        "spec": spec,
        "saved": isinstance(encoder, TextDescriptor),
        "fingerprint": encoder.fingerprint,
    }


def _restore(path: Path, side: Modality, about: dict[str, Any], given: Encoder | str | None) -> Encoder:
    if given is not None:
        return get_encoder(given, side) if isinstance(given, str) else given
    if about.get("saved"):
        return load_text_encoder(path.parent / _TEXT_ENCODER)
    if about["spec"] is None:
        raise ValueError(
            f"ImageTextMatcher.load: the {side} encoder {about.get('name')!r} in {path} was not made from a "
            f"spec and is not saved; make it again and pass it: load(folder, {side}_encoder=...)"
        )
    return get_encoder(about["spec"], side)
