"""``get_clip_metrics`` of open_clip (``open_clip_train/metrics.py``, and its older form in ``training/train.py``):
Ilharco et al., OpenCLIP, 2021. Ranks without the N×N matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pycm._optional import require
from pycm.compat._retrieval import count_embeddings

if TYPE_CHECKING:
    import torch


def get_clip_metrics(
    image_features: torch.Tensor | Sequence[torch.Tensor],
    text_features: torch.Tensor | Sequence[torch.Tensor],
    logit_scale: Any,
    image_key: str = "image",
    text_key: str = "text",
    retrieval_chunk_size: int | None = 4096,
    retrieval_device: Any = None,
    retrieval_dtype: Any = "fp32",
) -> dict[str, float]:
    """Retrieval metrics of pairs: row i of one belongs to row i of the other.

    Args:
        image_features: ``[N, D]``, or a sequence of tensors ``[n, D]`` to be put one after the other.
        text_features: the same, of the same shape.
        logit_scale: a number; only its sign matters for ranks.
        image_key, text_key: names in the keys of the result.
        retrieval_chunk_size, retrieval_device: not read; features are brought to the CPU and need no chunks.
        retrieval_dtype: what features are cast to: "fp32" or None or "model" for their own dtype, or a torch dtype.
            Scores are exact in any case, while the original rounds them to this dtype.

    Returns:
        ``{image_key}_to_{text_key}_mean_rank``, ``..._median_rank`` (rounded down), ranks counted from 1, ``..._R@1``,
        ``..._R@5``, ``..._R@10`` as fractions; then the other direction. Of equal scores the smaller index comes first.

    Raises:
        ValueError: shapes that do not fit, an unknown dtype, a NaN.

    O(N²·D) time, O(N·D) memory.
    """
    images = _features("image_features", image_features, retrieval_dtype)
    texts = _features("text_features", text_features, retrieval_dtype)
    if images.shape != texts.shape:
        raise ValueError(
            "get_clip_metrics: image_features and text_features must have one shape, got "
            f"{list(images.shape)} and {list(texts.shape)}"
        )
    sign = np.sign(float(logit_scale))
    if np.isnan(sign):
        raise ValueError("get_clip_metrics: logit_scale must be a number, got NaN")
    metrics: dict[str, float] = {}
    own = np.arange(len(images))[:, None]
    for name, queries, gallery in (
        (f"{image_key}_to_{text_key}", images * sign, texts),
        (f"{text_key}_to_{image_key}", texts * sign, images),
    ):
        ranks = count_embeddings("get_clip_metrics", queries, gallery, own).stable_rank
        metrics[f"{name}_mean_rank"] = float(ranks.mean()) + 1
        metrics[f"{name}_median_rank"] = float(np.floor(np.median(ranks))) + 1
        for k in (1, 5, 10):
            metrics[f"{name}_R@{k}"] = float(np.mean(ranks < k))
    return metrics


def _features(name: str, features: Any, dtype: Any) -> torch.Tensor:
    torch = require("torch", "torch", "get_clip_metrics")
    parts = [features] if isinstance(features, torch.Tensor) else list(features)
    if not parts:
        raise ValueError(f"get_clip_metrics: {name} must hold at least one tensor, got none")
    for part in parts:
        if part.ndim != 2 or part.shape[1] != parts[0].shape[1]:
            raise ValueError(
                f"get_clip_metrics: {name} must have shape [n, {parts[0].shape[-1]}], got {list(part.shape)}"
            )
    if dtype == "fp32":
        dtype = torch.float32
    elif dtype in (None, "model"):
        dtype = parts[0].dtype
    elif not isinstance(dtype, torch.dtype):
        raise ValueError(f"get_clip_metrics: retrieval_dtype must be 'fp32', 'model' or a torch dtype, got {dtype!r}")
    return torch.cat([part.detach().to("cpu", dtype) for part in parts])  # type: ignore[no-any-return]
