"""ConSE: an image is where its most probable classes' names are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .._rows import check_features
from .base import Arrays, BaseSpace, Features, is_count

if TYPE_CHECKING:
    from typing_extensions import Self


class ConSE(BaseSpace):
    """Convex combination of semantic embeddings (Norouzi et al. 2013); nothing is trained.

    The image features are a classifier's class probabilities. An image's position is the mean of the
    embeddings of its `top` most probable classes' names, weighted by their probabilities; texts stay what
    they are. Equal probabilities: the lower class first.

    Args:
        class_embeddings: floating point [C, d], row c the text encoder's embedding of class c's name.
        top: classes taken into the mean; more than C means all.

    Cost: transform_images O(N (C log C + top d)).
    """

    def __init__(self, class_embeddings: Any, top: int = 10) -> None:
        super().__init__()
        embeddings = check_features("ConSE", "class_embeddings", class_embeddings)
        if 0 in embeddings.shape:
            raise ValueError(f"ConSE: class_embeddings must not be empty, got {list(embeddings.shape)}")
        if not is_count(top):
            raise ValueError(f"ConSE: top must be a positive int, got {top!r}")
        self.class_embeddings = class_embeddings
        self.top = top
        self._arrays = {"class_embeddings": embeddings.astype(np.float32)}

    def fit(self, image_features: Any, text_features: Any, pairs: Any = None, *, weights: Any = None) -> Self:
        """Check the features' shapes and values; there is nothing to learn, and `pairs` are not looked at."""
        self.transform_images(image_features)
        self.transform_texts(text_features)
        return self

    def transform_images(self, image_features: Any) -> Features:
        """Class probabilities [N, C] -> float32 [N, d]. A row that sums to 0 gives 0.

        Raises ValueError for a negative probability, naming the row.
        """
        classes = len(self._arrays["class_embeddings"])
        p = self._input("transform_images", "image_features", image_features, classes)
        negative = (p < 0).any(axis=1)
        if negative.any():
            row = int(np.argmax(negative))
            raise ValueError(
                f"ConSE.transform_images: image_features row {row} has a negative probability; "
                "ConSE takes class probabilities, e.g. of EfficientNetLite0().classify"
            )
        best = np.argsort(-p, axis=1, kind="stable")[:, : self.top]
        weights = np.take_along_axis(p, best, axis=1).astype(np.float64)
        total = weights.sum(axis=1, keepdims=True)
        weights /= np.where(total > 0, total, 1.0)
        embeddings = self._arrays["class_embeddings"].astype(np.float64)
        out = np.zeros((len(p), embeddings.shape[1]))
        for rank in range(best.shape[1]):
            out += weights[:, rank, None] * embeddings[best[:, rank]]
        return out.astype(np.float32)

    def transform_texts(self, text_features: Any) -> Features:
        """The text features themselves, float32 [N, d]."""
        dim = self._arrays["class_embeddings"].shape[1]
        return self._input("transform_texts", "text_features", text_features, dim).astype(np.float32)

    def _state(self) -> tuple[dict[str, Any], Arrays]:
        return {"top": self.top}, self._arrays

    @classmethod
    def _from_state(cls, params: Mapping[str, Any], arrays: Arrays) -> Self:
        return cls(arrays["class_embeddings"], **params)
