"""What the tests of `VideoTextMatcher` share: clips whose kind only their order tells, and a small matcher of them."""

from __future__ import annotations

from typing import Any

from clip_cases import WORDS, ramps

from pycm import VideoTextMatcher

TRAIN, KINDS = ramps(240, 0)
TEST, TRUTH = ramps(100, 1)
TEXTS = [WORDS[kind] for kind in KINDS]
FIT: dict[str, Any] = {"epochs": 25, "lr": 5e-3, "batch_size": 32}
SHORT: dict[str, Any] = {"epochs": 2, "lr": 5e-3, "batch_size": 32}


def make(**options: Any) -> VideoTextMatcher:
    given = {"text_encoder": "words", "pool": "last", "hidden": 32, "dim": 32, "progress": False}
    return VideoTextMatcher(["ramp"], **(given | options))


def accuracy(matcher: VideoTextMatcher) -> float:
    """The share of TEST whose best text is the right one."""
    found = matcher.match(TEST, WORDS, k=1).video_to_text.indices[:, 0]
    return float((found == TRUTH).mean())
