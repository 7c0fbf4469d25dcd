"""``t2v_metrics`` and ``v2t_metrics`` of MMT (``model/metric.py``): Gabeur et al., "Multi-modal Transformer for Video
Retrieval", ECCV 2020. Tied ranks are averaged in both directions.
"""

from __future__ import annotations

from typing import Any

from pycm.compat import _t2v


def t2v_metrics(sims: Any, query_masks: Any = None) -> dict[str, Any]:
    """Videos for texts: the rank of each text's video, the mean of the places of a tie.

    Args:
        sims: ``[N, M]`` scores, N a multiple of M: texts i·N/M to (i + 1)·N/M - 1 belong to video i.
        query_masks: N entries of any shape, 0 for a text that does not exist; it is left out.

    Returns:
        "R1", "R5", "R10", "R50" in per cent, "MedR", "MeanR" counted from 1, "geometric_mean_R1-R5-R10", and "cols",
        the ranks counted from 0 and rounded down.

    Raises:
        AssertionError: sims is no matrix, or query_masks has another size.
        ValueError: a NaN, an infinite score of a text with its own video, or N is no multiple of M.
    """
    counts, exists = _t2v.text_to_video(sims, query_masks)
    return _with_cols(counts.mean_rank[exists])


def v2t_metrics(sims: Any, query_masks: Any = None) -> dict[str, Any]:
    """Texts for videos: the rank of each video's best text, the mean of the places of a tie.

    Args:
        sims: ``[N, M]`` scores of texts and videos, as in `t2v_metrics`.
        query_masks: N entries of any shape, 0 for a text that does not exist; it gets the score -1e8.

    Returns:
        As `t2v_metrics`.

    Raises:
        AssertionError: sims is no matrix, or query_masks has another size.
        ValueError: a NaN.
        OverflowError: a video without texts: its rank is infinite.
    """
    return _with_cols(_t2v.video_to_text(sims, query_masks))


def _with_cols(ranks: Any) -> dict[str, Any]:
    return {**_t2v.summary(ranks), "cols": [int(rank) for rank in ranks]}
