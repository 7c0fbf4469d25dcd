"""The systems as the commands see them: two kinds of items, and what a matcher returns of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..functional import Matches


@dataclass(frozen=True)
class Kind:
    """A kind of items.

    Attributes:
        one, many: what a reader calls them.
        field: what attributes of results call it, as in ``image_to_text``.
        embed: the method of a matcher that embeds them; "" where none does.
    """

    one: str
    many: str
    field: str
    embed: str


IMAGE = Kind("image", "images", "image", "embed_images")
TEXT = Kind("text", "texts", "text", "embed_texts")
CLIP = Kind("clip", "clips", "video", "embed_clips")
LABEL = Kind("label", "labels", "label", "")


@dataclass(frozen=True)
class System:
    """Two kinds of items that are matched."""

    name: str
    left: Kind
    right: Kind

    @property
    def forward(self) -> str:
        """The direction from the first kind to the second, as in ``image_to_text``."""
        return f"{self.left.field}_to_{self.right.field}"

    @property
    def backward(self) -> str:
        return f"{self.right.field}_to_{self.left.field}"


IMAGE_TEXT = System("image-text", IMAGE, TEXT)
VIDEO_TEXT = System("video-text", CLIP, TEXT)
VIDEO_LABELS = System("video-labels", CLIP, LABEL)
IMAGE_VIDEO = System("image-video", IMAGE, CLIP)
SYSTEMS = {system.name: system for system in (IMAGE_TEXT, VIDEO_TEXT, VIDEO_LABELS, IMAGE_VIDEO)}
MATCHERS = {
    "ImageTextMatcher": IMAGE_TEXT,
    "RegionTextMatcher": IMAGE_TEXT,
    "VideoTextMatcher": VIDEO_TEXT,
    "ImageVideoMatcher": IMAGE_VIDEO,
}


def system_named(kind: str, head: str) -> System:
    """The system of a class of matchers with that head. Raises KeyError for a class that is none of them."""
    return VIDEO_LABELS if head == "labels" else MATCHERS[kind]


def system_of(matcher: Any) -> System:
    """The system of a matcher."""
    return system_named(type(matcher).__name__, getattr(matcher, "head", "ranking"))


@dataclass(frozen=True)
class Found:
    """What any matcher's `match` returned, under names that do not depend on the system.

    Attributes:
        forward, backward: matches of the first kind among the second, and the reverse.
        kept: which of the given items of each kind these are.
        metric: of the scores; "logit" for a classifier of pairs, "probability" for one of labels.
        errors: (name, reason) of each item left out.
        seconds: what took how long.
    """

    forward: Matches
    backward: Matches
    kept: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
    metric: str
    errors: Sequence[tuple[str, str]]
    seconds: Mapping[str, float]

    @classmethod
    def of(cls, system: System, found: Any) -> Found:
        """From `ImageTextMatches`, `VideoTextMatches` or `ImageVideoMatches`."""
        if system is IMAGE_VIDEO:
            kept = (found.kept_images, found.kept_clips)
        else:
            kept = (found.kept, np.arange(len(found.texts)))
        forward, backward = getattr(found, system.forward), getattr(found, system.backward)
        return cls(forward, backward, kept, found.metric, found.errors, found.seconds)
