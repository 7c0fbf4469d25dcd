"""What a stream is: the protocol that systems, the feature cache and users' own classes share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from ..video import Clip
from .sequences import Sequences


@runtime_checkable
class Stream(Protocol):
    """Turns clips into sequences of features.

    Attributes:
        name: for people, e.g. ``"motion"``; distinct among the streams of a system.
        dim: features of a step.
        fingerprint: hex digest of all that determines the features; it keys the cache, as that of an `Encoder`.
        needs_sound: whether it looks at the clips' sound, and not at their frames.
    """

    @property
    def name(self) -> str: ...
    @property
    def dim(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def needs_sound(self) -> bool: ...

    def extract(self, clips: Sequence[Clip], *, batch_size: int = 32) -> Sequences:
        """The sequence of each clip, in order; `batch_size` frames go through a network at a time."""
        ...


@runtime_checkable
class DerivedStream(Stream, Protocol):
    """A stream that is computed from another one's features, which are then encoded and kept once for both.

    Attributes:
        source: that stream.
    """

    @property
    def source(self) -> Stream: ...

    def derive(self, sequences: Sequences) -> Sequences:
        """This stream of the clips whose `source` is `sequences`."""
        ...
