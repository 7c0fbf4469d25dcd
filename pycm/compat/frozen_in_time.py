"""``t2v_metrics`` and ``v2t_metrics`` of Frozen in Time (``model/metric.py``): Bain et al., "Frozen in Time: A Joint
Video and Image Encoder for End-to-End Retrieval", ICCV 2021. From text to video every tie is won.
"""

from __future__ import annotations

from typing import Any

from pycm.compat import _t2v


def t2v_metrics(sims: Any, query_masks: Any = None) -> dict[str, Any]:
    """Videos for texts: the rank of each text's video, the first place of a tie.

    As published, a constant matrix gives R1 = 100. `pycm.compat.mmt.t2v_metrics` averages ties.

    Args:
        sims: ``[N, M]`` scores, N a multiple of M: texts i·N/M to (i + 1)·N/M - 1 belong to video i.
        query_masks: N entries of any shape, 0 for a text that does not exist; it is left out.

    Returns:
        "R1", "R5", "R10", "R50" in per cent, "MedR", "MeanR" counted from 1, "geometric_mean_R1-R5-R10".

    Raises:
        AssertionError: sims is no matrix, or query_masks has another size.
        ValueError: a NaN, an infinite score of a text with its own video, or N is no multiple of M.
    """
    counts, exists = _t2v.text_to_video(sims, query_masks)
    return _t2v.summary(counts.greater[exists])


def v2t_metrics(sims: Any, query_masks: Any = None) -> dict[str, Any]:
    """Texts for videos: the rank of each video's best text, the mean of the places of a tie.

    Args:
        sims: ``[N, M]`` scores of texts and videos, as in `t2v_metrics`.
        query_masks: N entries of any shape, 0 for a text that does not exist; it gets the score -1e8.

    Returns:
        As `t2v_metrics`; a video without texts has an infinite rank.

    Raises:
        AssertionError: sims is no matrix, or query_masks has another size.
        ValueError: a NaN.
    """
    return _t2v.summary(_t2v.video_to_text(sims, query_masks))
