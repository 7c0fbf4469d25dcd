"""``metrics.py`` of CLIP4Clip: Luo et al., "CLIP4Clip: An Empirical Study of CLIP for End to End Video Clip Retrieval",
Neurocomputing 2022. Needs torch where the original takes tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pycm._optional import require
from pycm.compat._retrieval import count_matrix, recall

if TYPE_CHECKING:
    import torch


def compute_metrics(x: Any) -> dict[str, Any]:
    """Metrics of scores whose positives are on the diagonal.

    As published, a row whose positive ties with t others adds t + 1 ranks, one for each place in the tie, and all are
    averaged: a constant 100×100 matrix has 10,000 ranks and R@1 = 1. A row whose positive is infinite adds none.

    Args:
        x: ``[N, M]`` scores, M >= N; NumPy, or a tensor on the CPU.

    Returns:
        "R1", "R5", "R10" in per cent, "MR" and "MedianR" (median rank), "MeanR", ranks counted from 1, and "cols", the
        ranks, counted from 0.

    Raises:
        ValueError: a score is NaN, or M < N.
    """
    scores = np.asarray(x)
    rows, columns = scores.shape
    if columns < rows:
        raise ValueError(f"compute_metrics: x must be [N, M] with M >= N, got {list(scores.shape)}")
    counts = count_matrix("compute_metrics", scores, np.arange(rows)[:, None])
    places = np.where(np.isfinite(counts.scores), counts.before + counts.after + 1, 0)
    within = np.arange(places.sum()) - np.repeat(np.cumsum(places) - places, places)
    ranks = np.repeat(counts.greater, places) + within
    metrics: dict[str, Any] = {f"R{k}": recall(ranks, k) for k in (1, 5, 10)}
    metrics["MR"] = metrics["MedianR"] = np.median(ranks) + 1
    metrics["MeanR"] = ranks.mean() + 1
    metrics["cols"] = ranks.tolist()
    return metrics


def print_computed_metrics(metrics: dict[str, Any]) -> None:
    """Print the recalls and the median rank of `compute_metrics` on one line."""
    recalls = " - ".join(f"R@{k}: {metrics[f'R{k}']:.4f}" for k in (1, 5, 10))
    print(f"{recalls} - Median R: {metrics['MR']}")


def tensor_text_to_video_metrics(sim_tensor: Any, top_k: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Metrics of texts against videos, several captions per video.

    Args:
        sim_tensor: ``[V, C, V]``, tensor or array: the score of caption c of video v with every video. Captions whose
            score with their own video is infinite or NaN are padding and do not count. A NaN with another video ranks
            above every number, as in torch's sort.
        top_k: the k of the recalls.

    Returns:
        "R<k>" in per cent, "MedianR" and "MR" (lower median), "MeanR", "Std_Rank"; ranks counted from 1. Of equal
        scores the video with the smaller index comes first.
    """
    torch = require("torch", "torch", "tensor_text_to_video_metrics")
    scores = torch.as_tensor(sim_tensor)
    videos = torch.arange(scores.shape[0])
    own = torch.diagonal(scores, dim1=0, dim2=2).T  # [V, C]
    ranks = torch.empty(own.shape, dtype=torch.int64)
    for video in range(len(videos)):  # [C, V] at a time
        rows, target = scores[video], own[video][:, None]
        ranks[video] = (~(rows <= target)).sum(1) + ((rows == target) & (videos < video)).sum(1)
    valid = ranks[torch.isfinite(own)]
    results = {f"R{k}": float((valid < k).sum() * 100 / len(valid)) for k in top_k}
    results["MedianR"] = float(torch.median(valid + 1))
    results["MeanR"] = float(np.mean(valid.numpy() + 1))
    results["Std_Rank"] = float(np.std(valid.numpy() + 1))
    results["MR"] = results["MedianR"]
    return results


def tensor_video_to_text_sim(sim_tensor: Any) -> torch.Tensor:
    """Scores of videos with each other's best caption, for `compute_metrics`.

    Args:
        sim_tensor: ``[V, C, V]``, tensor or array, as in `tensor_text_to_video_metrics`; a NaN counts as -inf. Unlike
            the original, this leaves it as it is.

    Returns:
        ``[V, V]``: entry (v, w) is the best score of video v with a caption of w.
    """
    torch = require("torch", "torch", "tensor_video_to_text_sim")
    scores = torch.as_tensor(sim_tensor)
    best = scores.masked_fill(scores.isnan(), -torch.inf).amax(1)
    return best.squeeze().T  # type: ignore[no-any-return]
