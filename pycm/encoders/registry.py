"""`get_encoder`: encoders by name, for command lines and configuration files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .backbones import TimmBackbone, TorchvisionBackbone
from .base import Encoder, Modality, check_device
from .dual import DualEncoder, OpenCLIP, TransformersCLIP, TransformersSigLIP
from .efficientnet import EfficientNetLite0
from .sentence import MiniLM, SentenceTransformerEncoder

_PLAIN: dict[str, tuple[Modality, Callable[..., Encoder]]] = {
    "efficientnet-lite0": ("image", EfficientNetLite0),
    "minilm": ("text", MiniLM),
}
_TEXT = ("bag-of-words", "tfidf")
_NAMED: dict[str, tuple[Modality, Callable[..., Encoder]]] = {
    "sentence-transformers": ("text", SentenceTransformerEncoder),
    "timm": ("image", TimmBackbone),
    "torchvision": ("image", TorchvisionBackbone),
}
_DUAL: dict[str, Callable[..., DualEncoder]] = {
    "clip": TransformersCLIP,
    "open_clip": OpenCLIP,
    "siglip": TransformersSigLIP,
}


def known_encoders() -> list[str]:
    """The specs that `get_encoder` takes; NAME stands for a model's name or folder."""
    named = [f"{family}:NAME" for family in (*_NAMED, *_DUAL)]
    return sorted([*_PLAIN, *_TEXT, *named, "words:FILE"])


def get_encoder(spec: str, modality: Modality | None = None, *, device: Any = None) -> Encoder:
    """The encoder that `spec` names.

    Args:
        spec: "efficientnet-lite0", "minilm", "bag-of-words", "tfidf" (the last two are to be fitted),
            "words:FILE" (averaged word vectors), or FAMILY:NAME with a family of
            `known_encoders()` and the name or folder of one of its models, e.g.
            "clip:openai/clip-vit-base-patch32".
        modality: which side of a model that has two (CLIP, SigLIP, open_clip): "image" or "text". For the
            others it may be given, and is checked.
        device: where to run it; None is the CPU.

    Raises:
        ValueError: an unknown spec (the message lists the known ones), a family without a name, a model with
            two sides and no `modality`, or one of the other modality.
        ImportError: the package it needs is not installed.
    """
    if modality not in (None, "image", "text"):
        raise ValueError(f'get_encoder: modality must be "image" or "text", got {modality!r}')
    check_device("get_encoder", device)
    family, colon, name = spec.partition(":")
    if colon and not name and family in ("words", *_NAMED, *_DUAL):
        raise ValueError(f"get_encoder: {spec!r} lacks a model name, expected {family}:NAME")
    if family in _DUAL and colon:
        if modality is None:
            raise ValueError(f'get_encoder: {spec!r} has two sides; pass modality="image" or "text"')
        return _DUAL[family](name, device=device).side(modality)
    if spec in _TEXT or (family == "words" and name):
        if modality == "image":
            raise ValueError(f"get_encoder: {spec!r} encodes texts, not images")
        return _text_encoder(spec, name)
    if spec in _PLAIN:
        own, build = _PLAIN[spec]
        arguments: tuple[str, ...] = ()
    elif family in _NAMED and colon:
        own, build = _NAMED[family]
        arguments = (name,)
    else:
        raise ValueError(f"get_encoder: unknown encoder {spec!r}; known: {', '.join(known_encoders())}")
    if modality not in (None, own):
        raise ValueError(f"get_encoder: {spec!r} encodes {own}s, not {modality}s")
    return build(*arguments, device=device)


def get_encoders(image_spec: str, text_spec: str, *, device: Any = None) -> tuple[Encoder, Encoder]:
    """An image encoder and a text encoder.

    Where both specs name one model with two sides ("clip:NAME" twice), it is loaded once, and both encoders
    share its weights. Otherwise `(get_encoder(image_spec, "image"), get_encoder(text_spec, "text"))`; errors as there.
    """
    check_device("get_encoders", device)
    family, _, name = image_spec.partition(":")
    if image_spec == text_spec and family in _DUAL and name:
        both = _DUAL[family](name, device=device)
        return both.image, both.text
    return get_encoder(image_spec, "image", device=device), get_encoder(text_spec, "text", device=device)


def _text_encoder(spec: str, path: str) -> Encoder:
    from ..text import (  # pycm.text imports this package
        BagOfWords,
        Tfidf,
        WordEmbeddings,
    )

    if spec.startswith("words:"):
        return WordEmbeddings.load(path)
    return BagOfWords() if spec == "bag-of-words" else Tfidf()
