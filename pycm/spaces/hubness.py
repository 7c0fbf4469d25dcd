"""A correction for hubs, the items that come out near to everything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .._rows import Float64, normalize_rows
from ..evaluate.hubness import mean_of_best
from .base import Arrays, BaseSpace, Features, check_pairs, is_count

if TYPE_CHECKING:
    from typing_extensions import Self

_CHUNK_BYTES = 64 << 20
_EXTRA = 4


class HubnessCorrection(BaseSpace):
    """Another space, less how near each item is to its nearest training items of the other side.

    In spaces learned by regression some items are among the nearest of nearly every query (Radovanovic et al.
    2010). Cross-domain similarity local scaling (Conneau et al. 2018) scores a pair by

        cos(image, text) - (r(image) + r(text)) / 2,

    r(image) the mean cosine of the image and its `k` nearest texts, r(text) likewise. Here the texts and
    images that r looks at are the *training* items: the score of a pair depends on no other query or gallery
    item, so queries may come one by one.

    The score is a dot product of the rows that the transforms give, in d + 4 dimensions, and all rows of a
    side have one length, so that `dot`, `cosine`, `euclidean` and `sqeuclidean` all give the order of the
    scores above (the reduction of Bachrach et al. 2014). `pearson` does not.

    Args:
        space: the space to correct; it is fitted by `fit` with the same arguments.
        k: training items looked at.

    Cost: beyond the inner space's, O(N B d) for a bank of B training items, kept in float32.
    """

    def __init__(self, space: BaseSpace, k: int = 10) -> None:
        super().__init__()
        if not isinstance(space, BaseSpace):
            raise TypeError(f"HubnessCorrection: space must be a space of pycm, got {type(space).__name__}")
        if not is_count(k):
            raise ValueError(f"HubnessCorrection: k must be a positive int, got {k!r}")
        self.space = space
        self.k = k

    def fit(self, image_features: Any, text_features: Any, pairs: Any = None, *, weights: Any = None) -> Self:
        self.space.fit(image_features, text_features, pairs, weights=weights)
        images = self.space.transform_images(image_features)
        texts = self.space.transform_texts(text_features)
        index, _ = check_pairs("HubnessCorrection.fit", len(images), len(texts), pairs, weights)
        used = [np.unique(index[:, side]) for side in (0, 1)]
        smaller = min(len(side) for side in used)
        if self.k > smaller:
            raise ValueError(f"HubnessCorrection.fit: k must be in [1, {smaller}], got {self.k}")
        self._arrays = {
            "images": normalize_rows(images[used[0]], "l2").astype(np.float32),
            "texts": normalize_rows(texts[used[1]], "l2").astype(np.float32),
        }
        return self

    def transform_images(self, image_features: Any) -> Features:
        """The corrected image rows, float32 [N, d + 4]."""
        self._check_fitted("transform_images")
        x = normalize_rows(self.space.transform_images(image_features), "l2")
        nearness = _nearness(x, self._arrays["texts"], self.k)
        return _augmented(x, -nearness / 2, np.ones(len(x)), slack=2)

    def transform_texts(self, text_features: Any) -> Features:
        """The corrected text rows, float32 [N, d + 4]."""
        self._check_fitted("transform_texts")
        y = normalize_rows(self.space.transform_texts(text_features), "l2")
        nearness = _nearness(y, self._arrays["images"], self.k)
        return _augmented(y, np.ones(len(y)), -nearness / 2, slack=3)

    def _state(self) -> tuple[dict[str, Any], Arrays]:
        params, arrays = self.space._state()
        inner = {"class": self.space._kind, "params": params}
        prefixed = {f"space.{name}": array for name, array in arrays.items()}
        return {"k": self.k, "space": inner}, {**self._arrays, **prefixed}

    @classmethod
    def _from_state(cls, params: Mapping[str, Any], arrays: Arrays) -> Self:
        prefix = "space."
        inner = {name[len(prefix) :]: a for name, a in arrays.items() if name.startswith(prefix)}
        own = {name: a for name, a in arrays.items() if not name.startswith(prefix)}
        about = params["space"]
        space = BaseSpace._kinds[about["class"]]._from_state(about["params"], inner)
        return super()._from_state({**params, "space": space}, own)


def _nearness(x: Float64, bank: npt.NDArray[np.float32], k: int) -> Float64:
    """The mean of each row's `k` largest cosines with the rows of `bank`."""
    out = np.empty(len(x))
    other = bank.astype(np.float64)
    step = max(1, _CHUNK_BYTES // (8 * len(other)))
    for start in range(0, len(x), step):
        out[start : start + step] = mean_of_best(x[start : start + step] @ other.T, k)
    return out


def _augmented(x: Float64, first: Float64, second: Float64, slack: int) -> Features:
    """[x, first, second, ...] with column d + `slack` filled so that every row has the same length.

    Both numbers lie in [-1, 1], so the length sqrt(3) suffices. The other side has 0 in that column.
    """
    n, d = x.shape
    out = np.zeros((n, d + _EXTRA))
    out[:, :d] = x
    out[:, d], out[:, d + 1] = first, second
    out[:, d + slack] = np.sqrt(np.maximum(3.0 - (out * out).sum(axis=1), 0.0))
    return out.astype(np.float32)
