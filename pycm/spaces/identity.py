"""The space of encoders, or of a network, whose rows can be compared as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .._rows import check_features
from .base import BaseSpace, Features, check_pairs

if TYPE_CHECKING:
    from typing_extensions import Self


class Identity(BaseSpace):
    """Both sides' rows as they are: for `HubnessCorrection` and `ITQ` of embeddings that already share a space.

    `fit` checks what other spaces check, and that both sides are of one size.
    """

    def fit(self, image_features: Any, text_features: Any, pairs: Any = None, *, weights: Any = None) -> Self:
        images = check_features("Identity.fit", "image_features", image_features)
        texts = check_features("Identity.fit", "text_features", text_features)
        check_pairs("Identity.fit", len(images), len(texts), pairs, weights)
        if images.shape[1] != texts.shape[1]:
            raise ValueError(
                "Identity.fit: image_features and text_features must be of one size, "
                f"got {images.shape[1]} and {texts.shape[1]}"
            )
        self._arrays = {"dim": np.array([images.shape[1]], dtype=np.int64)}
        return self

    def transform_images(self, image_features: Any) -> Features:
        """The rows as they are, float32 [N, d]."""
        return self._rows("transform_images", "image_features", image_features)

    def transform_texts(self, text_features: Any) -> Features:
        """The rows as they are, float32 [N, d]."""
        return self._rows("transform_texts", "text_features", text_features)

    def _rows(self, method: str, argument: str, rows: Any) -> Features:
        self._check_fitted(method)
        return self._input(method, argument, rows, int(self._arrays["dim"][0])).astype(np.float32)
