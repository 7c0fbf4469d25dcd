"""A classifier's labels, ranked like any other items: the labels of each clip, and the clips of each label."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..functional import Matches
from ..matchers.features import check_k
from ..report import HeatMap, heat_map
from .embedding import readable
from .systems import Found

_NAMED = 12  # labels that a caption has room for
Floats = npt.NDArray[np.float32]


class Told(NamedTuple):
    """What a classifier said: the matches by probability, and the probabilities [N, labels] of all."""

    found: Found
    probabilities: Floats


def told_labels(matcher: Any, clips: Sequence[Path], k: int | tuple[int, int] | None, *, skip: bool) -> Told:
    """The best labels of each clip and the best clips of each label; ties to the lower index.

    Raises UnreadableInputError unless unreadable clips are to be skipped.
    """
    start = time.perf_counter()
    kept, rows, errors = readable(matcher.predict_proba, clips, skip)
    spent = time.perf_counter() - start
    probabilities: Floats = np.asarray(rows, np.float32)
    ways = check_k("--k", k, len(clips), probabilities.shape[1], ("clips", "labels"))
    place = {clip: i for i, clip in enumerate(clips)}
    start = time.perf_counter()
    best = _best(probabilities, ways[0]), _best(probabilities.T, min(ways[1], len(kept)))
    ranked = time.perf_counter() - start
    found = Found(
        *best,
        (np.array([place[clip] for clip in kept], np.int64), np.arange(probabilities.shape[1])),
        "probability",
        errors,
        {"encode and classify clips": spent, "score": ranked},
    )
    return Told(found, probabilities)


def confusion(names: Sequence[str], own: Sequence[int], probabilities: Floats) -> HeatMap:
    """For each true label, which share of its clips was told which label."""
    counts = np.zeros((len(names), len(names)))
    np.add.at(counts, (np.asarray(own), probabilities.argmax(1)), 1)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    title = "What is taken for what"
    figure = heat_map(title, shares, names, names, row_axis="true label", column_axis="told label", span=(0.0, 1.0))
    caption = "Each row is a label: the shares of its clips that were told each label."
    if len(names) <= _NAMED:
        caption += f" In order: {', '.join(names)}."
    return replace(figure, caption=caption)


def commonest(own: Sequence[int], names: Sequence[str]) -> str:
    """What the accuracy is to be compared with."""
    counts = np.bincount(own, minlength=len(names))
    label, share = names[int(counts.argmax())], counts.max() / len(own)
    return f"Always telling the commonest label, {label!r}, is right for {share:.1%}."


def _best(scores: Floats, k: int) -> Matches:
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return Matches(np.take_along_axis(scores, order, 1), order)
