"""Binary codes of another space: iterative quantization, ranked by Hamming distance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .._rows import Float64, normalize_rows
from .base import Arrays, BaseSpace, Features, check_pairs, is_count

if TYPE_CHECKING:
    from typing_extensions import Self


class ITQ(BaseSpace):
    """Another space's rows as codes of `bits` signs (Gong and Lazebnik 2011).

    The rows, of unit length and less their own side's mean, are projected on their `bits` principal components and
    rotated so that taking signs loses least. Rows of the codes are -1 and 1: their dot product is ``bits - 2 * Hamming
    distance``, so that with the metric "dot" a matcher, `topk` and a `Gallery` rank by Hamming distance, exactly, ties
    to the lower index. `pack_codes` keeps them in one bit each.

    Args:
        space: the space whose rows are coded; it is fitted by `fit` with the same arguments.
        bits: of a code, at most the space's dimensions.
        iterations: of the rotation; the paper takes 50.
        seed: of the first rotation.

    Raises:
        TypeError, ValueError: wrong arguments; by `fit` also fewer dimensions than bits.

    Cost: beyond the inner space's, O(N d^2 + iterations * (N bits^2 + bits^3)).
    """

    def __init__(self, space: BaseSpace, bits: int = 64, iterations: int = 50, seed: int = 0) -> None:
        super().__init__()
        if not isinstance(space, BaseSpace):
            raise TypeError(f"ITQ: space must be a space of pycm, got {type(space).__name__}")
        for name, value in (("bits", bits), ("iterations", iterations)):
            if not is_count(value):
                raise ValueError(f"ITQ: {name} must be a positive int, got {value!r}")
        self.space, self.bits, self.iterations, self.seed = space, bits, iterations, seed

    def fit(self, image_features: Any, text_features: Any, pairs: Any = None, *, weights: Any = None) -> Self:
        self.space.fit(image_features, text_features, pairs, weights=weights)
        sides = [self.space.transform_images(image_features), self.space.transform_texts(text_features)]
        index, _ = check_pairs("ITQ.fit", len(sides[0]), len(sides[1]), pairs, weights)
        rows = [normalize_rows(side[np.unique(index[:, i])], "l2") for i, side in enumerate(sides)]
        means = [side.mean(0) for side in rows]
        x = np.concatenate([side - mean for side, mean in zip(rows, means, strict=True)])
        if self.bits > x.shape[1]:
            raise ValueError(f"ITQ.fit: bits must be at most the space's {x.shape[1]} dimensions, got {self.bits}")
        _, vectors = np.linalg.eigh(x.T @ x)
        projection = vectors[:, ::-1][:, : self.bits]
        self._arrays = {
            "image_mean": means[0],
            "text_mean": means[1],
            "projection": projection @ _rotation(x @ projection, self.iterations, self.seed),
        }
        return self

    def transform_images(self, image_features: Any) -> Features:
        """The images' codes, float32 [N, bits] of -1 and 1."""
        self._check_fitted("transform_images")
        return self._codes(self.space.transform_images(image_features), "image_mean")

    def transform_texts(self, text_features: Any) -> Features:
        """The texts' codes, float32 [N, bits] of -1 and 1."""
        self._check_fitted("transform_texts")
        return self._codes(self.space.transform_texts(text_features), "text_mean")

    def _codes(self, rows: Features, mean: str) -> Features:
        x = (normalize_rows(rows, "l2") - self._arrays[mean]) @ self._arrays["projection"]
        return np.where(x >= 0, np.float32(1), np.float32(-1))

    def _state(self) -> tuple[dict[str, Any], Arrays]:
        params, arrays = self.space._state()
        own = {"bits": self.bits, "iterations": self.iterations, "seed": self.seed}
        prefixed = {f"space.{name}": array for name, array in arrays.items()}
        return {**own, "space": {"class": self.space._kind, "params": params}}, {**self._arrays, **prefixed}

    @classmethod
    def _from_state(cls, params: Mapping[str, Any], arrays: Arrays) -> Self:
        prefix = "space."
        inner = {name[len(prefix) :]: a for name, a in arrays.items() if name.startswith(prefix)}
        about = params["space"]
        space = BaseSpace._kinds[about["class"]]._from_state(about["params"], inner)
        own = {name: a for name, a in arrays.items() if not name.startswith(prefix)}
        return super()._from_state({**params, "space": space}, own)


def pack_codes(codes: Any) -> npt.NDArray[np.uint8]:
    """Codes of signs [N, bits] in one bit each: uint8 [N, ceil(bits / 8)], set where a sign is positive."""
    return np.packbits(np.asarray(codes) > 0, axis=1)


def unpack_codes(packed: npt.NDArray[np.uint8], bits: int) -> Features:
    """What `pack_codes` packed: float32 [N, bits] of -1 and 1."""
    return np.where(np.unpackbits(packed, axis=1, count=bits) == 1, np.float32(1), np.float32(-1))


def _rotation(v: Float64, iterations: int, seed: int) -> Float64:
    """The orthogonal R [bits, bits] that makes ``|sign(V R) - V R|`` least, as far as taking turns finds it."""
    random = np.random.default_rng(seed).standard_normal((v.shape[1], v.shape[1]))
    rotation: Float64 = np.linalg.qr(random)[0]
    for _ in range(iterations):
        codes = np.where(v @ rotation >= 0, 1.0, -1.0)
        left, _, right = np.linalg.svd(v.T @ codes)
        rotation = left @ right
    return rotation
