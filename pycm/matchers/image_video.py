"""`ImageVideoMatcher`: which clip shows what is in a picture, and which picture shows what is in a clip."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from .._temporal_layers import Cell, Pool
from ..encoders import Encoder
from ..encoders.base import Features, check_items
from ..functional import Metric
from ..spaces import Ridge
from ..spaces.base import BaseSpace
from .adaptation import aligned
from .encoded import Encoded
from .features import CacheOption, OnError, check_k, check_on_error
from .results import ImageVideoMatches, ImageVideoMetrics
from .sides import ClipSide, ImageSide
from .trained import TrainedMatcher, check_folder, check_unlabelled, check_validation
from .training import Training
from .tuning import FineTune

if TYPE_CHECKING:
    from torch import nn
    from typing_extensions import Self

    from ..streams import Stream

_IMAGES_CLIPS = ("images", "clips")
_FUSIONS = ("h0", "steps")


class ImageVideoMatcher(TrainedMatcher):
    """Matches images with clips, both ways.

    An image's features run through an LSTM, a clip's streams through a recurrent network each, and both come to lie in
    one space, where the metric ranks N images and M clips at the cost of N + M networks. What an image says about how a
    clip is to be read cannot be had that way: with head="pairs" a GRU, told of the image, reads the clip again for each
    pair that the embeddings propose, and a classifier re-ranks these.

    Args:
        image_encoder: an image encoder, or the spec of one.
        streams, cell, pool, hidden, dim, metric, loss, sampling, space, space_streams, embedding_space, bidirectional,
            dropout, input_dropout, cache, workers, batch_size, seed, device, progress: as in `VideoTextMatcher`. The
            linear start of `space` maps the image's features to the clip's mean step; where both are of one encoder,
            `Ridge(toward="identity")` is the one to take.
        fusion: how the classifier's GRU is told of the image: "h0", the image's state opens it; "steps", it is joined
            to each step; or both.
        head: "ranking": the embeddings alone; "pairs": with the fused classifier.
        candidates: how many embeddings each item proposes to the classifier; None: all pairs.

    Attributes:
        space_, embedding_space_, history_, pseudo_pairs_: as in `VideoTextMatcher`.
        errors_: (name, reason) of each image and clip that the last `fit` left out.

    An image is a path, a PIL image or an array; or a list of several images of the same thing, which the LSTM reads in
    their order. Wherever clips are taken, an encoded `ClipFeatures` is too.

    Cost of head="pairs": one run of the GRU a pair, O(T hidden²) for T steps: N M of them with candidates=None,
    (N + M) · candidates otherwise. `embed_images` and `embed_clips`, and so a `Gallery` of them, know nothing of the
    classifier: the best there may be another than that of `match`.

    Example:
        >>> matcher = ImageVideoMatcher(space=Ridge(toward="identity"))       # doctest: +SKIP
        >>> matcher.fit(stills, clips, checkpoint="run")                      # doctest: +SKIP
        >>> found = matcher.match(["dog.jpg"], ["a.mp4", "b.mp4"], k=1)       # doctest: +SKIP
        >>> found.clips[found.image_to_video.indices[0, 0]]                   # doctest: +SKIP
        'b.mp4'
    """

    def __init__(
        self,
        image_encoder: Encoder | str = "efficientnet-lite0",
        streams: Sequence[str | Stream] = ("appearance", "differences", "motion"),
        *,
        fusion: str | Sequence[str] = _FUSIONS,
        cell: Cell | None = "gru",
        pool: Pool = "mean",
        hidden: int = 256,
        dim: int = 256,
        head: Literal["ranking", "pairs"] = "pairs",
        metric: Metric = "cosine",
        loss: Literal["max_hinge", "info_nce", "sigmoid", "triplet"] | nn.Module = "max_hinge",
        sampling: Any = "uniform:16",
        space: Ridge | None = None,
        space_streams: Sequence[str] | None = None,
        embedding_space: BaseSpace | None = None,
        bidirectional: bool = False,
        dropout: float = 0.2,
        input_dropout: float = 0.0,
        candidates: int | None = 20,
        cache: CacheOption = None,
        workers: int | None = None,
        batch_size: int = 32,
        seed: int = 0,
        device: Any = None,
        progress: bool | None = None,
    ) -> None:
        name = type(self).__name__
        if head not in ("ranking", "pairs"):
            raise ValueError(f"{name}: head must be ranking or pairs, got {head!r}")
        self._set_options(
            cell=cell, pool=pool, hidden=hidden, dim=dim, bidirectional=bidirectional, dropout=dropout,
            input_dropout=input_dropout, head=head, metric=metric, loss=loss, space=space,
            embedding_space=embedding_space, candidates=candidates, cache=cache, workers=workers, batch_size=batch_size,
            seed=seed, device=device, progress=progress,
        )  # fmt: skip
        kinds = (fusion,) if isinstance(fusion, str) else tuple(fusion)
        if not kinds or any(kind not in _FUSIONS for kind in kinds):
            raise ValueError(f"{name}: fusion must be h0, steps or both, got {fusion!r}")
        self.image_encoder, self.streams, self.fusion = image_encoder, tuple(streams), fusion
        self.sampling, self.space_streams = sampling, space_streams
        self._images = ImageSide(name, image_encoder)
        self._clips = ClipSide(name, streams, sampling, space_streams)
        self._sides = self._images, self._clips

    def __repr__(self) -> str:
        image = self.image_encoder if isinstance(self.image_encoder, str) else self.image_encoder.name
        return (
            f"{type(self).__name__}({image!r}, {list(self._clips.names)}, fusion={self.fusion!r}, cell={self.cell!r}, "
            f"pool={self.pool!r}, head={self.head!r}, {self._spaces()}, metric={self.metric!r})"
        )

    @property
    def encoders(self) -> Mapping[str, Any]:
        """The image encoder as "image", and the streams by name; made where they were given as specs."""
        device = self._options().device
        made = dict(zip(self._clips.names, self._clips.made(device), strict=True))
        return {"image": self._images.encoder(device), **made}

    def _network_options(self) -> dict[str, Any]:
        kinds = (self.fusion,) if isinstance(self.fusion, str) else self.fusion
        return {**super()._network_options(), "fusion": [kind for kind in _FUSIONS if kind in kinds]}

    def fit(
        self,
        images: Sequence[Any],
        clips: Any,
        *,
        validation: float | int | tuple[Any, Any] | None = 0.1,
        fine_tune: FineTune = None,
        target_clips: Any = None,
        unlabelled: tuple[Sequence[Any], Any] | None = None,
        threshold: float | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        log: str | os.PathLike[str] | None = None,
        on_error: OnError = "raise",
        **training: Any,
    ) -> Self:
        """Learn from images and clips of the same things; an earlier fit is replaced.

        Args:
            images: N images, or lists of images, each once.
            clips: N clips, clip i of what image i shows.
            validation: a share of the pairs, a number of folds, (images, clips), or None; as in `VideoTextMatcher.fit`.
            fine_tune: as in `VideoTextMatcher.fit`, of "image" and the streams. The image encoder and that of the
                streams are two, unless one object is given for both.
            target_clips, unlabelled, threshold: as in `VideoTextMatcher.fit`; `unlabelled` is (images, clips).
            checkpoint, log, **training: as in `VideoTextMatcher.fit`.
            on_error: "skip" leaves a pair out where one of the two cannot be read.

        Errors as `VideoTextMatcher.fit`.
        """
        function = f"{type(self).__name__}.fit"
        options = Training.of(function, training)
        check_on_error(function, on_error)
        check_folder(function, checkpoint=checkpoint, log=log)
        check_unlabelled(function, unlabelled, threshold)
        check_validation(function, validation)
        with self._fitting(function, fine_tune, options, target_clips=target_clips):
            first, second = self._pairs(function, images, clips, on_error)
            self.errors_ = [*first.errors, *second.errors]
            held: Any = validation
            if isinstance(validation, tuple):
                theirs = self._pairs(function, validation[0], validation[1], on_error)
                held = (theirs[0].features, theirs[1].features, _aligned(len(theirs[0].names)))
            pairs = _aligned(len(first.names))
            features = second.features
            if target_clips is not None:
                target = self._clips.encode(function, target_clips, self._options(), on_error)
                features = aligned(features, target.features)
            files: dict[str, Any] = {"checkpoint": checkpoint, "log": log}
            frozen = unlabelled is not None
            self._learn(function, first.features, features, pairs, held, options, frozen=frozen, **files)
            if unlabelled is not None and threshold is not None:
                more = self._encode_both(function, unlabelled[0], unlabelled[1], on_error)
                known = first.features, features, pairs, held
                self._learn_again(function, known, (first.names, second.names), *more, threshold, options, files)
        return self

    def _pairs(self, function: str, images: Any, clips: Any, on_error: OnError) -> tuple[Encoded, Encoded]:
        """Both sides of the pairs that could be read, row by row."""
        check_items(function, images)
        check_items(function, clips)
        if len(images) != len(clips):
            raise ValueError(f"{function}: there must be a clip for each of {len(images)} images, got {len(clips)}")
        first, second = self._encode_both(function, images, clips, on_error)
        first.check_once(function, "images")
        second.check_once(function, "clips")
        both = np.intersect1d(first.kept, second.kept)
        if not len(both):
            raise ValueError(f"{function}: of no pair can both be read")
        return first.take(np.searchsorted(first.kept, both)), second.take(np.searchsorted(second.kept, both))

    def _encode_both(
        self, function: str, images: Any, clips: Any, on_error: OnError = "raise"
    ) -> tuple[Encoded, Encoded]:
        options = self._options()
        return self._images.encode(function, images, options, on_error), self._clips.encode(
            function, clips, options, on_error
        )

    def match(
        self, images: Sequence[Any], clips: Any, k: int | tuple[int, int] | None = None, *, on_error: OnError = "raise"
    ) -> ImageVideoMatches:
        """The best clips of each image and the best images of each clip, ties to the lower index.

        Args:
            images: N >= 1 images.
            clips: M >= 1 clips.
            k: how many, for both directions, or (clips per image, images per clip). None: five, or all where there are
                fewer.
            on_error: "skip" leaves unreadable items out and lists them in `.errors`.

        Errors as `VideoTextMatcher.match`; for the cost see the class.
        """
        function = f"{type(self).__name__}.match"
        self._check_fitted("match")
        check_on_error(function, on_error)
        per_image, per_clip = check_k(function, k, len(images), len(clips), _IMAGES_CLIPS)
        start = time.perf_counter()
        first = self._images.encode(function, images, self._options(), on_error)
        encoded = time.perf_counter()
        second = self._clips.encode(function, clips, self._options(), on_error)
        score = time.perf_counter()
        ks = min(per_image, len(second.names)), min(per_clip, len(first.names))
        there, back = self._ranked(function, first, second, ks)
        return ImageVideoMatches(
            there,
            back,
            images=first.names,
            clips=second.names,
            metric="logit" if self.head == "pairs" else self.metric,
            kept_images=first.kept,
            kept_clips=second.kept,
            errors=[*first.errors, *second.errors],
            seconds={"encode images": encoded - start, **second.seconds, "score": time.perf_counter() - score},
        )

    def scores(self, images: Sequence[Any], clips: Any) -> Features:
        """The full matrix [N, M] float32: scores, distances for distance metrics, logits with head="pairs"."""
        function = f"{type(self).__name__}.scores"
        self._check_fitted("scores")
        return self._score_matrix(*self._inputs_of(function, *self._encode_both(function, images, clips)))

    def evaluate(
        self, images: Sequence[Any], clips: Any, ks: Sequence[int] = (1, 5, 10), *, on_error: OnError = "raise"
    ) -> ImageVideoMetrics:
        """Recall at k and ranks both ways, where clip i shows what image i does. Errors as `fit` and `match`."""
        function = f"{type(self).__name__}.evaluate"
        self._check_fitted("evaluate")
        check_on_error(function, on_error)
        inputs = self._inputs_of(function, *self._pairs(function, images, clips, on_error))
        return ImageVideoMetrics(*self._recalls(*inputs, _aligned(len(inputs[0])), ks))

    def contributions(self, images: Sequence[Any], clips: Any, k: int = 1) -> dict[str, float]:
        """What each stream of the clips is worth; see `VideoTextMatcher.contributions`."""
        function = f"{type(self).__name__}.contributions"
        self._check_fitted("contributions")
        first, second = self._pairs(function, images, clips, "raise")
        return self._exchanged(function, first, second, _aligned(len(first.names)), k)

    def embed_images(self, images: Sequence[Any]) -> Features:
        """Rows [N, dim] of the common space, float32; of unit length for distances alone. Errors as `match`."""
        function = f"{type(self).__name__}.embed_images"
        self._check_fitted("embed_images")
        encoded = self._images.encode(function, images, self._options())
        return self._rows(0, self._inputs(function, 0, encoded))

    def embed_clips(self, clips: Any) -> Features:
        """Rows [M, dim] of the common space, float32; of unit length for distances alone. Errors as `match`."""
        function = f"{type(self).__name__}.embed_clips"
        self._check_fitted("embed_clips")
        encoded = self._clips.encode(function, clips, self._options())
        return self._rows(1, self._inputs(function, 1, encoded))

    def predict_proba(self, images: Sequence[Any], clips: Any) -> Features:
        """head="pairs": [N], that clip i shows what image i does."""
        function = f"{type(self).__name__}.predict_proba"
        self._check_fitted("predict_proba", "pairs")
        if len(images) != len(clips):
            raise ValueError(f"{function}: there must be a clip for each of {len(images)} images, got {len(clips)}")
        return self._pair_scores(function, *self._encode_both(function, images, clips))

    def predict(self, images: Sequence[Any], clips: Any) -> npt.NDArray[np.bool_]:
        """head="pairs": bool [N], whether clip i shows what image i does."""
        self._check_fitted("predict", "pairs")
        return self.predict_proba(images, clips) >= 0.5


def _aligned(count: int) -> npt.NDArray[np.int64]:
    """Pairs of equal rows."""
    return np.repeat(np.arange(count, dtype=np.int64)[:, None], 2, axis=1)
