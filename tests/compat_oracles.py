"""The definitions that retrieval codebases publish, restated: each function sorts whole rows, as they do."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def places(row: np.ndarray, positive: int, ties: str) -> list[int]:
    """The places, from 0, that `positive` takes when `row` is sorted by falling score.

    ``ties``: "stable" is its place in a stable sort, "reversed" that in a stable sort by rising score, read from its
    end; "all" is every place of its tie.
    """
    if ties == "reversed":
        return [int(np.flatnonzero(np.argsort(row, kind="stable")[::-1] == positive)[0])]
    if ties == "stable":
        return [int(np.flatnonzero(np.argsort(-row, kind="stable") == positive)[0])]
    assert ties == "all"
    return [int(place) for place in np.flatnonzero(np.sort(row)[::-1] == row[positive])]


def per_cent_below(ranks: Any, k: float) -> float:
    return 100.0 * sum(rank < k for rank in ranks) / len(ranks)


def five_numbers(ranks: list[int]) -> tuple[float, ...]:
    """R@1, R@5, R@10, floored median and mean, as VSE++ prints them."""
    return (
        *(per_cent_below(ranks, k) for k in (1, 5, 10)),
        math.floor(float(np.median(ranks))) + 1,
        sum(ranks) / len(ranks) + 1,
    )


def image_to_text(scores: np.ndarray, captions: int = 5) -> tuple[list[int], list[int]]:
    """Ranks and first places: row i's positives are columns captions·i and on, the best counts."""
    ranks, tops = [], []
    for image, row in enumerate(scores):
        own = range(captions * image, captions * (image + 1))
        ranks.append(min(places(row, column, "reversed")[0] for column in own))
        tops.append(int(np.argsort(row, kind="stable")[-1]))
    return ranks, tops


def text_to_image(scores: np.ndarray, captions: int = 5) -> tuple[list[int], list[int]]:
    """Ranks and first places of `scores` [captions·n, images]."""
    ranks = [places(row, text // captions, "reversed")[0] for text, row in enumerate(scores)]
    return ranks, [int(np.argsort(row, kind="stable")[-1]) for row in scores]


def collaborative_experts(ranks: Any, texts: int) -> dict[str, float]:
    """The dictionary of MMT and Frozen in Time."""
    found: dict[str, float] = {"R1": 100 * float(np.count_nonzero(np.asarray(ranks) == 0)) / texts}
    for k in (5, 10, 50):
        found[f"R{k}"] = 100 * sum(rank < k for rank in ranks) / texts
    found["MedR"], found["MeanR"] = float(np.median(ranks)) + 1, float(np.mean(ranks)) + 1
    product = found["R1"] * found["R5"] * found["R10"]
    found["geometric_mean_R1-R5-R10"] = product ** (1 / 3)
    return found


def text_to_video_ranks(scores: np.ndarray, masks: np.ndarray | None, ties: str) -> list[float]:
    """One rank per text that exists; "mean" or "first" of the places of its tie."""
    per_video = scores.shape[0] // scores.shape[1]
    ranks = []
    for text, row in enumerate(scores):
        if masks is None or masks.reshape(-1)[text]:
            found = places(row, text // per_video, "all")
            ranks.append(found[0] if ties == "first" else sum(found) / len(found))
    return ranks


def video_to_text_ranks(scores: np.ndarray, masks: np.ndarray | None) -> list[float]:
    """One rank per video: the least over its texts of the mean of the places of the text's tie."""
    texts, videos = scores.shape
    ranks = []
    for video in range(videos):
        row = scores[:, video].copy()
        if masks is not None:
            row[masks.reshape(-1) == 0] = -1e8
        own = range(video * (texts // videos), (video + 1) * (texts // videos))
        ranks.append(
            min((float(np.mean(places(row, text, "all"))) for text in own if row[text] != -1e8), default=math.inf)
        )
    return ranks
