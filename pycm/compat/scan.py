"""``i2t`` and ``t2i`` of SCAN (``evaluation.py``): Lee et al., "Stacked Cross Attention for Image-Text Matching", ECCV
2018. Five captions per image, from a matrix of scores.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pycm.compat._retrieval import (
    Ranked,
    Summary,
    caption_summary,
    captions_of_images,
    count_matrix,
    images_of_captions,
)


def i2t(
    images: Any, captions: Any, caplens: Any, sims: Any, npts: int | None = None, return_ranks: bool = False
) -> Summary | Ranked:
    """Captions for images: the rank of the best of each image's five captions among all captions.

    Args:
        images: ``[N, ...]``; only N is read.
        captions, caplens, npts: not read, as in the original.
        sims: ``[N, 5N]`` scores; the captions of image i are columns 5i to 5i + 4.
        return_ranks: return ``(summary, (ranks [N], top1 [N]))``, float64, counted from 0.

    Returns:
        ``(R@1, R@5, R@10, median rank rounded down, mean rank)``: recalls in per cent, ranks counted from 1.

    Raises:
        ValueError: a score is NaN.
    """
    count = images.shape[0]
    counts = count_matrix("i2t", np.asarray(sims)[:count], captions_of_images(count))
    return caption_summary(counts, return_ranks)


def t2i(
    images: Any, captions: Any, caplens: Any, sims: Any, npts: int | None = None, return_ranks: bool = False
) -> Summary | Ranked:
    """Images for captions: the rank of each caption's image among all images.

    Arguments, result and errors as `i2t`; ranks and top1 are ``[5N]``.
    """
    count = images.shape[0]
    counts = count_matrix("t2i", np.asarray(sims).T[: 5 * count], images_of_captions(count))
    return caption_summary(counts, return_ranks)
