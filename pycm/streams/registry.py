"""`get_stream`: streams by name, for command lines and configuration files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..encoders import Encoder, get_encoder
from .appearance import Appearance
from .base import Stream
from .differences import FeatureDifferences, PixelDifferences
from .motion import Motion
from .sound import Sound
from .speech import Speech
from .voice import Voice

_OF_ENCODER: dict[str, Callable[..., Stream]] = {"appearance": Appearance, "differences": FeatureDifferences}
_PLAIN: dict[str, Callable[..., Stream]] = {
    "pixel-differences": PixelDifferences,
    "motion": lambda name: Motion("phase", name=name),
    "flow": lambda name: Motion("flow", name=name),
    "sound": Sound,
    "speech": Speech,
    "voice": lambda name: Voice(name=name),
}
_OF_SOUND = {"sound", "speech", "voice"}
_ENCODER = "efficientnet-lite0"


def known_streams() -> list[str]:
    """The specs that `get_stream` takes; SPEC stands for an image encoder's."""
    return sorted([*_PLAIN, *_OF_ENCODER, *(f"{kind}:SPEC" for kind in _OF_ENCODER)])


def get_stream(spec: str, *, device: Any = None) -> Stream:
    """The stream that `spec` names; the spec is its name.

    Args:
        spec: one of `known_streams()`: "appearance" and "differences" are of EfficientNet-Lite0,
            "appearance:SPEC" and "differences:SPEC" of the image encoder that `get_encoder` makes of SPEC.
        device: where to run a network; None is the CPU.

    Raises:
        ValueError: an unknown spec (the message lists the known ones).
        ImportError: the package it needs is not installed.
    """
    return get_streams([spec], device=device)[0]


def stream_name(stream: str | Stream) -> str:
    """What `get_streams` calls a stream, told without making it. Raises ValueError for an unknown spec."""
    if not isinstance(stream, str):
        return stream.name
    kind, colon, encoder = stream.partition(":")
    if stream not in _PLAIN and (kind not in _OF_ENCODER or bool(colon) != bool(encoder)):
        raise ValueError(f"unknown stream {stream!r}; known: {', '.join(known_streams())}")
    return stream


def needs_sound(stream: str | Stream) -> bool:
    """Whether a stream looks at the clips' sound, told without making it. Raises ValueError for an unknown spec."""
    return stream_name(stream) in _OF_SOUND if isinstance(stream, str) else stream.needs_sound


def get_streams(specs: Sequence[str | Stream], *, device: Any = None) -> list[Stream]:
    """The streams of several specs; an encoder that several of them name is made once. Streams are taken as they are.

    Raises:
        ValueError: as `get_stream`; two streams of one name.
        TypeError: something else than specs and streams.
    """
    if isinstance(specs, str) or not hasattr(specs, "__len__"):
        raise TypeError(f"streams must be a sequence of streams and specs, got a single {type(specs).__name__}")
    encoders: dict[str, Encoder] = {}
    streams: list[Stream] = []
    for spec in specs:
        if not isinstance(spec, str):
            if not callable(getattr(spec, "extract", None)):
                raise TypeError(f"streams must hold streams and specs, got {type(spec).__name__}")
            streams.append(spec)
            continue
        name = stream_name(spec)
        if spec in _PLAIN:
            streams.append(_PLAIN[spec](name=name))
            continue
        kind, _, encoder = spec.partition(":")
        encoder = encoder or _ENCODER
        if encoder not in encoders:
            encoders[encoder] = get_encoder(encoder, "image", device=device)
        streams.append(_OF_ENCODER[kind](encoders[encoder], name=name))
    names = [stream.name for stream in streams]
    if len(set(names)) < len(names):
        raise ValueError(f"streams must have distinct names, got {', '.join(names)}")
    return streams
