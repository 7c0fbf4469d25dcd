"""``i2t`` and ``t2i`` of VSE++ (``evaluation.py``): Faghri et al., "VSE++: Improving Visual-Semantic Embeddings with
Hard Negatives", BMVC 2018. Five captions per image, ranks without the matrix of scores. docs/compat-evaluation.md says
where the original's numbers are arbitrary and what stands here instead.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pycm.compat._retrieval import (
    Counts,
    Int64,
    Ranked,
    Summary,
    caption_summary,
    captions_of_images,
    count_blocks,
    count_embeddings,
    images_of_captions,
)


def i2t(
    images: Any, captions: Any, npts: int | None = None, measure: str = "cosine", return_ranks: bool = False
) -> Summary | Ranked:
    """Captions for images: the rank of the best of each image's five captions among all captions.

    Args:
        images: ``[5N, D]``, each image five times in a row; the first of the five is the query.
        captions: ``[5N, D]``; those of image i are rows 5i to 5i + 4.
        npts: evaluate the first npts images only, against all captions; by default all N.
        measure: "order" for the order violation -‖max(0, caption - image)‖ in fp32; anything else, "cosine" too, is
            the dot product of the rows as they are.
        return_ranks: return ``(summary, (ranks [N], top1 [N]))``, float64, counted from 0.

    Returns:
        ``(R@1, R@5, R@10, median rank rounded down, mean rank)``: recalls in per cent, ranks counted from 1.

    Raises:
        ValueError: an embedding is NaN.

    O(N·5N·D) time, without the N×5N matrix.
    """
    images, captions = _floats(images, captions)
    count = len(images) // 5 if npts is None else npts
    queries, positives = images[: 5 * count : 5], captions_of_images(count)
    if measure == "order":
        counts = _order_counts("i2t", queries, captions, positives, sign=1)
    else:
        counts = count_embeddings("i2t", queries, captions, positives, last_best=return_ranks)
    return caption_summary(counts, return_ranks)


def t2i(
    images: Any, captions: Any, npts: int | None = None, measure: str = "cosine", return_ranks: bool = False
) -> Summary | Ranked:
    """Images for captions: the rank of each caption's image among all images.

    Args:
        images: ``[5N, D]``, each image five times in a row; the first of the five is in the gallery.
        captions: ``[5N, D]``; those of image i are rows 5i to 5i + 4.
        npts: evaluate the captions of the first npts images only, against all images; by default all N.
        measure: as in `i2t`.
        return_ranks: return ``(summary, (ranks [5N], top1 [5N]))``, float64, counted from 0.

    Returns:
        As `i2t`.

    Raises:
        ValueError: an embedding is NaN.
    """
    images, captions = _floats(images, captions)
    count = len(images) // 5 if npts is None else npts
    queries, gallery, positives = captions[: 5 * count], images[::5], images_of_captions(count)
    if measure == "order":
        counts = _order_counts("t2i", queries, gallery, positives, sign=-1)
    else:
        counts = count_embeddings("t2i", queries, gallery, positives, last_best=return_ranks)
    return caption_summary(counts, return_ranks)


def _floats(images: Any, captions: Any) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    images, captions = np.asarray(images), np.asarray(captions)
    dtype = np.result_type(images, captions, np.float32)
    return images.astype(dtype, copy=False), captions.astype(dtype, copy=False)


def _order_counts(
    function: str, queries: npt.NDArray[Any], gallery: npt.NDArray[Any], positives: Int64, sign: int
) -> Counts:
    """Counts by -‖max(0, sign · (gallery - query))‖, differences of one query at a time."""
    queries, gallery = queries.astype(np.float32), gallery.astype(np.float32)

    def block(start: int, stop: int) -> npt.NDArray[Any]:
        return np.stack([-np.linalg.norm(np.maximum(sign * (gallery - row), 0), axis=1) for row in queries[start:stop]])

    return count_blocks(function, block, positives, len(gallery))
