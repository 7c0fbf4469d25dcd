"""``i2t`` and ``t2i`` of VSE∞ (``lib/evaluation.py``): Chen et al., "Learning the Best Pooling Strategy for Visual
Semantic Embedding", CVPR 2021. From a matrix of scores.
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


def i2t(npts: int, sims: Any, return_ranks: bool = False, mode: str = "coco") -> Summary | Ranked:
    """Captions for images.

    Args:
        npts: number of images.
        sims: ``[N, 5N]`` scores; the captions of image i are columns 5i to 5i + 4, and the best of them counts. With
            another mode ``[N, N]``, caption i for image i.
        return_ranks: return ``(summary, (ranks [N], top1 [N]))``, float64, counted from 0.
        mode: "coco" for five captions per image, anything else for one.

    Returns:
        ``(R@1, R@5, R@10, median rank rounded down, mean rank)``: recalls in per cent, ranks counted from 1.

    Raises:
        ValueError: a score is NaN.
    """
    positives = captions_of_images(npts) if mode == "coco" else np.arange(npts, dtype=np.int64)[:, None]
    return caption_summary(count_matrix("i2t", np.asarray(sims)[:npts], positives), return_ranks)


def t2i(npts: int, sims: Any, return_ranks: bool = False, mode: str = "coco") -> Summary | Ranked:
    """Images for captions: the rank of each caption's image among all images.

    Arguments, result and errors as `i2t`; with "coco" ranks and top1 are ``[5N]``.
    """
    positives = images_of_captions(npts) if mode == "coco" else np.arange(npts, dtype=np.int64)[:, None]
    return caption_summary(count_matrix("t2i", np.asarray(sims).T[: len(positives)], positives), return_ranks)
