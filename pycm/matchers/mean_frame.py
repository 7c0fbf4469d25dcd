"""`MeanFrameMatcher`: images with clips without training, by what an image encoder sees in both."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..encoders import Encoder
from ..encoders.base import Features, check_batch_size
from ..functional import METRICS, Metric, similarity, topk
from ..streams import Appearance
from ..video import Sampling
from .encoded import Encoded, Options
from .features import CacheOption, OnError, as_cache, check_k, check_on_error
from .networks import device_of
from .results import ImageVideoMatches
from .sides import ClipSide, ImageSide


class MeanFrameMatcher:
    """Matches images with clips, both ways, without training: an image's features against the mean of a clip's frames'.

    The baseline of `ImageVideoMatcher`, and what to take where nothing is known to belong together. It sees what the
    encoder sees, in any order of the frames.

    Args:
        image_encoder: an image encoder, or the spec of one; it sees images and frames.
        metric: "cosine", "dot", "pearson", "euclidean" or "sqeuclidean".
        sampling, cache, workers, batch_size, device, progress: as in `VideoTextMatcher`.

    An image is a path, a PIL image or an array; or a list of several of the same thing, whose mean counts.

    Raises:
        ValueError, TypeError: an option outside its range, or an encoder of texts.
        ImportError: a package that is needed and not installed; the message names it.

    Example:
        >>> matcher = MeanFrameMatcher()                                      # doctest: +SKIP
        >>> found = matcher.match(["dog.jpg"], ["a.mp4", "b.mp4"], k=1)       # doctest: +SKIP
        >>> found.clips[found.image_to_video.indices[0, 0]]                   # doctest: +SKIP
        'b.mp4'
    """

    streams = ("appearance",)  # of which the mean is taken
    space = None

    def __init__(
        self,
        image_encoder: Encoder | str = "efficientnet-lite0",
        *,
        metric: Metric = "cosine",
        sampling: Any = "uniform:16",
        cache: CacheOption = None,
        workers: int | None = None,
        batch_size: int = 32,
        device: Any = None,
        progress: bool | None = None,
    ) -> None:
        name = type(self).__name__
        if metric not in METRICS:
            raise ValueError(f"{name}: metric must be one of {', '.join(METRICS)}, got {metric!r}")
        check_batch_size(name, batch_size)
        self.image_encoder, self.metric, self.sampling = image_encoder, metric, sampling
        self.cache, self.workers, self.batch_size, self.device = as_cache(cache), workers, batch_size, device
        self.progress = progress
        self._images = ImageSide(name, image_encoder)
        Sampling.parse(sampling)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments by name."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def __repr__(self) -> str:
        image = self.image_encoder if isinstance(self.image_encoder, str) else self.image_encoder.name
        return f"{type(self).__name__}({image!r}, metric={self.metric!r}, sampling={self.sampling!r})"

    @property
    def encoders(self) -> Mapping[str, Any]:
        """The image encoder as "image"; made where it was given as a spec."""
        return {"image": self._images.encoder(device_of(self.device))}

    def match(
        self, images: Sequence[Any], clips: Any, k: int | tuple[int, int] | None = None, *, on_error: OnError = "raise"
    ) -> ImageVideoMatches:
        """The best clips of each image and the best images of each clip, ties to the lower index.

        Arguments and errors as `ImageVideoMatcher.match`. Cost: encoding, then O(N M D) for D features, exact, without
        the N x M matrix.
        """
        function = f"{type(self).__name__}.match"
        check_on_error(function, on_error)
        per_image, per_clip = check_k(function, k, len(images), len(clips), ("images", "clips"))
        options = self._options()
        start = time.perf_counter()
        first = self._images.encode(function, images, options, on_error)
        encoded = time.perf_counter()
        second = self._clips.encode(function, clips, options, on_error)
        score = time.perf_counter()
        a, b = _rows(self._images, first), _rows(self._clips, second)
        return ImageVideoMatches(
            topk(a, b, min(per_image, len(b)), self.metric),
            topk(b, a, min(per_clip, len(a)), self.metric),
            images=first.names,
            clips=second.names,
            metric=self.metric,
            kept_images=first.kept,
            kept_clips=second.kept,
            errors=[*first.errors, *second.errors],
            seconds={"encode images": encoded - start, **second.seconds, "score": time.perf_counter() - score},
        )

    def scores(self, images: Sequence[Any], clips: Any) -> Features:
        """The full matrix [N, M] float32: scores, distances for distance metrics. Errors as `match`."""
        return similarity(self.embed_images(images), self.embed_clips(clips), self.metric)

    def embed_images(self, images: Sequence[Any]) -> Features:
        """The encoder's rows [N, D], float32. Errors as `match`."""
        return self._embed("embed_images", self._images, images)

    def embed_clips(self, clips: Any) -> Features:
        """The means [M, D] of the frames' rows, float32. Errors as `match`."""
        return self._embed("embed_clips", self._clips, clips)

    @property
    def _clips(self) -> ClipSide:
        return ClipSide(type(self).__name__, [Appearance(self.encoders["image"])], self.sampling, None)

    def _options(self) -> Options:
        return Options(self.cache, self.workers, self.batch_size, self.progress, device_of(self.device))

    def _embed(self, method: str, side: ImageSide | ClipSide, items: Any) -> Features:
        return _rows(side, side.encode(f"{type(self).__name__}.{method}", items, self._options()))


def _rows(side: ImageSide | ClipSide, encoded: Encoded) -> Features:
    return np.asarray(side.start_rows(encoded.features), np.float32)
