"""Saved matchers with a network: config.json, and in its parts network.safetensors, space/, text_encoder/ and the
weights of fine-tuned encoders."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from .._files import atomic_write
from .._optional import require
from ..encoders.descriptor import TextDescriptor
from ..spaces import Ridge, load_space
from ..text import load_text_encoder  # from there, so that every descriptor is known
from .networks import load_weights, make_network, read_weights, weights_of
from .sides import ClipSide, RowSide, WordSide
from .storage import CONFIG, SPACE, TEXT_ENCODER, check_options, is_parts, write_folder
from .storage_tuned import names_in, pack, unpack

if TYPE_CHECKING:
    from .trained import TrainedMatcher

_FORMAT = 1
_NETWORK, _EMBEDDING_SPACE = "network.safetensors", "embedding_space"
# What depends on the machine, and what config.json has in a form of its own.
_NOT_SAVED = {"cache", "workers", "batch_size", "device", "progress", "space", "streams", _EMBEDDING_SPACE}


def save(matcher: TrainedMatcher, folder: str | os.PathLike[str]) -> None:
    """See `TrainedMatcher.save`."""
    dump = require("safetensors.torch", "text", f"{type(matcher).__name__}.save").save
    params = matcher.get_params()
    encoders, vocabulary = {}, None
    fitted: TextDescriptor | None = None
    for side in matcher._sides:
        if isinstance(side, RowSide) and not (matcher.head == "labels" and side.kind == "text"):
            encoder = side.given_encoder(matcher._options().device)
            if isinstance(encoder, TextDescriptor):
                fitted = encoder
            encoders[f"{side.kind}_encoder"] = {
                "name": encoder.name,
                "spec": side.spec,
                "saved": encoder is fitted,
                "fingerprint": encoder.fingerprint,
                "fits": side._fits,
            }
        elif isinstance(side, WordSide):
            vocabulary = side.vocabulary
    given = {f"{side.kind}_encoder": side.spec for side in matcher._sides if isinstance(side, RowSide)}
    plain = {name: value for name, value in params.items() if name not in _NOT_SAVED}
    if not isinstance(matcher.loss, str):  # a module of one's own: only a later fit would need it
        del plain["loss"]
    given_parts, used_parts = (
        {name: part for side in matcher._sides for name, part in side.made_parts(tuned=tuned).items()}
        for tuned in (False, True)
    )
    fine_tuned, files = pack(given_parts, used_parts)
    document = {
        "class": type(matcher).__name__,
        "format": _FORMAT,
        "params": {name: _plain(given.get(name, value)) for name, value in plain.items()},
        "streams": next(side for side in matcher._sides if isinstance(side, ClipSide)).describe(),
        "encoders": encoders,
        "vocabulary": vocabulary,
        "space": matcher.space_ is not None,
        _EMBEDDING_SPACE: matcher.embedding_space_ is not None,
        "labels": matcher.labels_,
        "network": matcher._about,
        "fine_tuned": fine_tuned,
    }
    files[_NETWORK] = dump(weights_of(matcher.network))

    def write(parts: Path) -> None:
        for name, data in files.items():
            with atomic_write(parts / name, "wb") as file:
                file.write(data)
        if matcher.space_ is not None:
            matcher.space_.save(parts / SPACE)
        if matcher.embedding_space_ is not None:
            matcher.embedding_space_.save(parts / _EMBEDDING_SPACE)
        if fitted is not None:
            fitted.save(parts / TEXT_ENCODER)

    write_folder(Path(folder), document, write)


def load(
    kind: type[TrainedMatcher], folder: str | os.PathLike[str], options: dict[str, Any], *, strict: bool
) -> TrainedMatcher:
    """See `TrainedMatcher.load`."""
    function = f"{kind.__name__}.load"
    path = Path(folder) / CONFIG
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["class"] != kind.__name__:
            raise ValueError(f"{function}: {path} is not a saved {kind.__name__}, but {document['class']!r}")
        version, parts = document["format"], document["parts"]
        params, streams, encoders = document["params"], document["streams"], document["encoders"]
        about, vocabulary, labels = document["network"], document["vocabulary"], document["labels"]
        has_space, fine_tuned = document["space"], document.get("fine_tuned", [])
        asked = names_in(fine_tuned)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{function}: {path} is not a saved matcher: {error!r}") from error
    if version != _FORMAT:
        raise ValueError(f"{function}: {path} has format {version!r}, this version reads {_FORMAT}")
    if not is_parts(parts):
        raise ValueError(f"{function}: {path} does not name the folder of its parts, got {parts!r}")
    check_options(function, kind, options)
    arguments = {**params, "streams": [stream["spec"] for stream in streams]}
    for name, encoder in encoders.items():
        if encoder["saved"]:
            arguments[name] = load_text_encoder(path.parent / parts / TEXT_ENCODER)
    arguments |= options
    lost = {"streams": next((s["name"] for s in streams if s["spec"] is None), None)}
    lost |= {name: encoder["name"] for name, encoder in encoders.items() if arguments[name] is None}
    for name, what in lost.items():
        if what is not None and name not in options:
            raise ValueError(
                f"{function}: {what!r} in {path} was not made from a spec and is not saved; make it again and pass it: "
                f"load(folder, {name}=...)"
            )
    for name in [name for name in arguments if name.endswith("_encoder") and arguments[name] is None]:
        del arguments[name]  # a classifier of labels has none
    space = Ridge.load(path.parent / parts / SPACE) if has_space else None
    after = load_space(path.parent / parts / _EMBEDDING_SPACE) if document.get(_EMBEDDING_SPACE) else None
    arguments |= {
        "space": None if space is None else Ridge(**space.get_params()),
        _EMBEDDING_SPACE: copy.deepcopy(after),
    }
    matcher = kind(**arguments)
    matcher.space_, matcher.embedding_space_ = space, after
    device = matcher._options().device
    for side in matcher._sides:
        if isinstance(side, WordSide):
            side.set_vocabulary(vocabulary)
        elif isinstance(side, RowSide) and f"{side.kind}_encoder" in encoders:
            saved = encoders[f"{side.kind}_encoder"]
            if f"{side.kind}_encoder" not in options:  # fitted, but still this matcher's to fit again
                side._fits = saved.get("fits", True)
            encoder = side.given_encoder(device)
            if strict and encoder.fingerprint != saved["fingerprint"]:
                raise ValueError(_differs(function, f"{side.kind}_encoder {encoder.name!r}", path))
        elif isinstance(side, ClipSide):
            side.expect(
                {s["name"]: s["fingerprint"] for s in streams} if strict else {}, _differs(function, "{}", path)
            )
    network = make_network(about, nn.Identity())  # the loss is not needed any more
    load_weights(network, read_weights(function, path.parent / parts / _NETWORK))
    matcher._network, matcher._about, matcher.labels_ = network.to(device).eval(), about, labels
    if asked:
        made = {name: part for side in matcher._sides for name, part in side.parts(device, asked).items()}
        matcher._use(unpack(function, path.parent / parts, fine_tuned, made))
    return matcher


def _differs(function: str, what: str, path: Path) -> str:
    return (
        f"{function}: {what} is not the one that {path} was saved with (its fingerprint differs); strict=False uses it "
        "nevertheless"
    )


def _plain(value: Any) -> Any:
    """A constructor's argument as JSON has it."""
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else str(value)
