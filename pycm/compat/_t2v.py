"""The retrieval metrics of Collaborative Experts, which MMT and Frozen in Time carry on with one tie rule changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pycm.compat._retrieval import Counts, Float64, count_matrix, recall

_MISSING = -1e8  # the score that stands for a missing caption


def text_to_video(sims: Any, query_masks: Any) -> tuple[Counts, npt.NDArray[np.bool_]]:
    """Counts of every text, and which texts exist."""
    scores = _matrix("t2v_metrics", sims)
    texts, videos = scores.shape
    per_video = texts // videos
    if per_video * videos != texts:
        raise ValueError(f"t2v_metrics: sims must have a multiple of {videos} rows, one per column, got {texts}")
    counts = count_matrix("t2v_metrics", scores, np.repeat(np.arange(videos), per_video)[:, None])
    _check_finite("t2v_metrics", "text", counts)
    return counts, _exists("t2v_metrics", query_masks, texts)


def video_to_text(sims: Any, query_masks: Any) -> Float64:
    """The rank of each video's best caption, averaged over ties; inf for a video without captions."""
    scores = _matrix("v2t_metrics", sims).T
    videos, texts = scores.shape
    scores = np.where(_exists("v2t_metrics", query_masks, texts), scores, scores.dtype.type(_MISSING))
    captions = np.arange(texts // videos * videos).reshape(videos, -1)
    counts = count_matrix("v2t_metrics", scores, captions)
    _check_finite("v2t_metrics", "video", counts)
    return np.where(counts.scores == _MISSING, np.inf, counts.mean_rank)


def summary(ranks: npt.NDArray[Any]) -> dict[str, Any]:
    """Recalls in per cent, their geometric mean, median and mean rank, counted from 1."""
    metrics: dict[str, Any] = {"R1": recall(ranks, 0.5)}  # the mean place of a tie for the first is no hit
    metrics |= {f"R{k}": recall(ranks, k) for k in (5, 10, 50)}
    metrics["MedR"] = np.median(ranks) + 1
    metrics["MeanR"] = ranks.mean() + 1
    recalls = [metrics["R1"], metrics["R5"], metrics["R10"]]
    metrics["geometric_mean_R1-R5-R10"] = np.exp(np.mean(np.log(recalls))) if min(recalls) > 0 else np.float64(0)
    return metrics


def _matrix(function: str, sims: Any) -> npt.NDArray[Any]:
    scores = np.asarray(sims)
    if scores.ndim != 2:
        raise AssertionError(f"{function}: sims must be a matrix, got shape {list(scores.shape)}")
    return scores if scores.dtype.kind == "f" else scores.astype(np.float64)


def _check_finite(function: str, kind: str, counts: Counts) -> None:
    infinite = np.isinf(counts.scores)
    if infinite.any():
        row = infinite.argmax()
        raise ValueError(f"{function}: scores of pairs must be finite, got {counts.scores[row]} for {kind} {row}")


def _exists(function: str, query_masks: Any, texts: int) -> npt.NDArray[np.bool_]:
    if query_masks is None:
        return np.ones(texts, np.bool_)
    masks = np.asarray(query_masks)
    if masks.size != texts:
        raise AssertionError(f"{function}: query_masks must have {texts} entries, got {masks.size}")
    return masks.reshape(-1).astype(np.bool_)
