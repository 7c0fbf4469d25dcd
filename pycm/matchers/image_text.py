"""`ImageTextMatcher`: which sentence belongs to which image."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from ..encoders import Encoder, EncodeResult
from ..encoders.base import Features, ImageItem, Modality, check_batch_size
from ..encoders.descriptor import TextDescriptor
from ..encoders.images import item_name
from ..evaluate import retrieval_metrics
from ..functional import METRICS, Metric, similarity, topk
from ..spaces import CORAL, HubnessCorrection, Space
from . import storage
from .base import Matcher
from .default import DEFAULT_SPECS, class_name_space
from .features import (
    CacheOption,
    OnError,
    Texts,
    as_cache,
    check_k,
    check_on_error,
    encode_named,
    flatten_texts,
    image_method,
    keep_pairs,
    make_encoders,
)
from .pseudo_pairs import fit_pseudo_pairs
from .results import ImageTextMatches, ImageTextMetrics


class ImageTextMatcher(Matcher):
    """Matches images with texts, both ways.

    Args:
        image_encoder, text_encoder: encoders, or specs for `get_encoder` such as "clip:NAME".
        space: maps the features of both into one space; None where the encoders share one already. With
            `ConSE` the image encoder must be a classifier.
        metric: "cosine", "dot", "pearson", "euclidean" or "sqeuclidean".
        cache: a folder (made if missing) or a `FeatureCache`: features are kept by content, so that a second
            run does not encode again and one that was interrupted goes on. None and False: they are not.
        batch_size: items per forward pass.
        device: of encoders given as specs; None is the CPU.
        progress: None shows bars on a terminal only, True always, False never.
        granularity: "region" makes a `RegionTextMatcher` of the encoders and its own options: regions against words.

    Attributes:
        pseudo_pairs_: how many pairs the last `fit` found among what nobody paired.
        errors_: (name, reason) of each image that it left out.

    Raises:
        ValueError, TypeError: an unknown spec or metric, or an encoder of the other modality.
        ImportError: a package that an encoder needs is not installed; the message names it.
        OSError: the cache folder cannot be made.

    Images are paths, PIL images or uint8 arrays. Where some cannot be read, all are tried and then
    `UnreadableInputError` names every one; with on_error="skip" they are left out and listed.

    Example:
        >>> matcher = ImageTextMatcher.default()                                  # doctest: +SKIP
        >>> found = matcher.match(["cat.jpg"], ["a sleeping cat", "a red car"])   # doctest: +SKIP
        >>> found.texts[found.image_to_text.indices[0, 0]]                        # doctest: +SKIP
        'a sleeping cat'
    """

    def __new__(cls, *encoders: Any, granularity: str = "image", **options: Any) -> Any:
        if granularity not in ("image", "region"):
            raise ValueError(f'ImageTextMatcher: granularity must be "image" or "region", got {granularity!r}')
        if granularity == "image":
            return super().__new__(cls)
        from .region_text import RegionTextMatcher

        return RegionTextMatcher(*encoders, **options)

    def __init__(
        self,
        image_encoder: Encoder | str,
        text_encoder: Encoder | str,
        space: Space | None = None,
        metric: Metric = "cosine",
        *,
        cache: CacheOption = None,
        batch_size: int = 32,
        device: Any = None,
        progress: bool | None = None,
        granularity: Literal["image", "region"] = "image",
    ) -> None:
        if metric not in METRICS:
            raise ValueError(f"ImageTextMatcher: metric must be one of {', '.join(METRICS)}, got {metric!r}")
        if space is not None and not isinstance(space, Space):
            raise TypeError(f"ImageTextMatcher: space must be a space or None, got {type(space).__name__}")
        if metric == "pearson" and isinstance(space, HubnessCorrection):
            raise ValueError(
                "ImageTextMatcher: metric 'pearson' does not keep the order of HubnessCorrection, use 'dot'"
            )
        check_batch_size("ImageTextMatcher", batch_size)
        self.cache = as_cache(cache)
        self.image_encoder, self.text_encoder = make_encoders(image_encoder, text_encoder, device)
        self.image_spec = image_encoder if isinstance(image_encoder, str) else None
        self.text_spec = text_encoder if isinstance(text_encoder, str) else None
        self.space = space
        self.metric: Metric = metric
        # One that was fitted before it came here is not this matcher's to fit.
        self._fits_text = isinstance(self.text_encoder, TextDescriptor) and (
            self.text_spec is not None or not self.text_encoder.fitted
        )
        self.pseudo_pairs_ = 0
        self.errors_: list[tuple[str, str]] = []
        self.batch_size = batch_size
        self.progress = progress
        if image_method(space) == "classify" and not hasattr(self.image_encoder, "classify"):
            raise TypeError(
                "ImageTextMatcher: ConSE takes class probabilities, but image_encoder "
                f"{self.image_encoder.name!r} has no classify(); EfficientNetLite0 has"
            )

    @classmethod
    def default(
        cls,
        cache: CacheOption = None,
        *,
        metric: Metric = "cosine",
        batch_size: int = 32,
        device: Any = None,
        progress: bool | None = None,
    ) -> ImageTextMatcher:
        """A matcher that needs no training and no network: EfficientNet-Lite0 and MiniLM joined by `ConSE`.

        An image is where the names of its ten most probable ImageNet classes are, as sentences ("a photo of a
        tabby."): what ImageNet has no class for, it does not see. The weights come inside packages of the
        extra "demo".

        Args:
            cache: as for the constructor. None keeps only the embeddings of the 1000 names, 1.5 MB in
                $XDG_CACHE_HOME/pycm (or ~/.cache/pycm), with a warning where that cannot be written to: to
                encode them takes seconds. False keeps nothing.
            metric, batch_size, device, progress: as for the constructor.
        """
        image_encoder, text_encoder = make_encoders(*DEFAULT_SPECS, device)
        names: list[str] = image_encoder.class_names  # type: ignore[attr-defined]
        options: dict[str, Any] = {"cache": cache, "batch_size": batch_size, "progress": progress}
        space = class_name_space(text_encoder, names, **options)
        matcher = cls(image_encoder, text_encoder, space, metric, **options)
        matcher.image_spec, matcher.text_spec = DEFAULT_SPECS
        return matcher

    def __repr__(self) -> str:
        return (
            f"ImageTextMatcher({self.image_encoder.name!r}, {self.text_encoder.name!r}, "
            f"space={self.space!r}, metric={self.metric!r})"
        )

    @property
    def encoders(self) -> dict[str, Encoder]:
        """The encoders, as "image" and "text"."""
        return {"image": self.image_encoder, "text": self.text_encoder}

    def fit(
        self,
        images: Sequence[ImageItem],
        texts: Texts,
        *,
        target_images: Sequence[ImageItem] | None = None,
        unlabelled: tuple[Sequence[ImageItem], Sequence[str]] | None = None,
        threshold: float | None = None,
        on_error: OnError = "raise",
    ) -> ImageTextMatcher:
        """Learn the space, and first a text encoder that has to be fitted (TF-IDF, bag of words).

        A text encoder that was fitted already when it was given to the matcher stays as it is.

        Args:
            images: N images.
            texts: N entries; texts[i] is the text of image i, or a list of its texts.
            target_images: images of the kind that will be matched, where it is another than the training's: the
                training features get their mean and covariance (`CORAL`).
            unlabelled: (images, texts) that nobody paired: once fitted, the space is fitted again to its pairs and to
                the mutual nearest neighbours among these that score `threshold` or better.
            on_error: "skip" leaves unreadable images out together with their texts.

        Returns:
            self.

        Raises:
            UnreadableInputError: some images cannot be read.
            ValueError: there is no space to fit, lengths that differ, an image without a text, NaN features.
        """
        function = "ImageTextMatcher.fit"
        check_on_error(function, on_error)
        if self.space is None:
            raise ValueError(f"{function}: there is nothing to fit, space is None; pass e.g. space=Ridge()")
        if (unlabelled is None) != (threshold is None):
            raise ValueError(f"{function}: unlabelled and threshold go together")
        flat, owner = flatten_texts(function, images, texts)
        image_result = self._features(function, "image", images, on_error)
        self.errors_ = image_result.errors
        used, image_of = keep_pairs(owner, image_result.kept)
        flat = [flat[i] for i in used]
        if self._fits_text and isinstance(self.text_encoder, TextDescriptor):
            self.text_encoder.fit(flat)
        text_features = self._features(function, "text", flat).features
        pairs = np.stack([image_of, np.arange(len(flat))], axis=1)
        features = image_result.features
        if target_images is not None:
            target = self._features(function, "image", target_images, on_error).features
            features = CORAL().fit_transform(features, target)
        self.space.fit(features, text_features, pairs)
        self.pseudo_pairs_ = 0
        if unlabelled is not None and threshold is not None:
            more = self._features(function, "image", unlabelled[0], on_error).features
            others = self._features(function, "text", unlabelled[1]).features
            found = fit_pseudo_pairs(
                self.space, (features, text_features), pairs, (more, others), threshold, self.metric
            )
            self.pseudo_pairs_ = len(found.indices)
        return self

    def match(
        self,
        images: Sequence[ImageItem],
        texts: Sequence[str],
        k: int | tuple[int, int] | None = None,
        *,
        on_error: OnError = "raise",
    ) -> ImageTextMatches:
        """The best texts of each image and the best images of each text, exact, ties to the lower index.

        Args:
            images: N >= 1 images.
            texts: M >= 1 texts.
            k: how many, for both directions, or (texts per image, images per text); each from 1 to the number
                there is. None: five, or all where there are fewer.
            on_error: "skip" leaves unreadable images out and lists them in `.errors`; where fewer are left
                than k, all of them are ranked.

        Raises:
            UnreadableInputError: some images cannot be read, or none can.
            ValueError: no images or texts, k out of range, NaN features, features that do not fit.
            RuntimeError: a space or a text encoder that needs `fit` first.

        Cost: the encoders', then O(N M D); memory O((N + M) D).
        """
        function = "ImageTextMatcher.match"
        check_on_error(function, on_error)
        per_image, per_text = check_k(function, k, len(images), len(texts))  # before the long work
        clock = time.perf_counter
        start = clock()
        image_rows, result = self._embed(function, "image", images, on_error)
        encoded_images = clock()
        text_rows = self._embed(function, "text", texts)[0]
        encoded_texts = clock()
        per_text = min(per_text, len(image_rows))  # fewer, if some were skipped
        self._check_fit(function, image_rows, text_rows)
        image_to_text = topk(image_rows, text_rows, per_image, self.metric)
        text_to_image = topk(text_rows, image_rows, per_text, self.metric)
        scored = clock()
        return ImageTextMatches(
            image_to_text,
            text_to_image,
            images=[item_name(images[i], int(i)) for i in result.kept],
            texts=list(texts),
            metric=self.metric,
            kept=result.kept,
            errors=result.errors,
            seconds={
                "encode images": encoded_images - start,
                "encode texts": encoded_texts - encoded_images,
                "score": scored - encoded_texts,
            },
        )

    def scores(self, images: Sequence[ImageItem], texts: Sequence[str]) -> Features:
        """The full matrix [N, M] float32: scores, or distances for distance metrics. Errors as `match`."""
        function = "ImageTextMatcher.scores"
        image_rows, _ = self._embed(function, "image", images)
        text_rows = self._embed(function, "text", texts)[0]
        self._check_fit(function, image_rows, text_rows)
        return similarity(image_rows, text_rows, self.metric)

    def embed_images(self, images: Sequence[ImageItem]) -> Features:
        """Rows [N, d] of the common space, float32, not normalised. Errors as `match`."""
        return self._embed("ImageTextMatcher.embed_images", "image", images)[0]

    def embed_texts(self, texts: Sequence[str]) -> Features:
        """Rows [M, d] of the common space, float32, not normalised. Errors as `match`."""
        return self._embed("ImageTextMatcher.embed_texts", "text", texts)[0]

    def evaluate(
        self,
        images: Sequence[ImageItem],
        texts: Texts,
        ks: Sequence[int] = (1, 5, 10),
        *,
        on_error: OnError = "raise",
    ) -> ImageTextMetrics:
        """Recall at k and ranks in both directions, where the matches are known.

        Args:
            images: N images, each a candidate of every text.
            texts: texts[i] is the text of image i, or a list of its texts; all are candidates of every image.
            ks: the cutoffs of recall.
            on_error: "skip" leaves unreadable images out together with their texts.

        Errors as `match`; ties count as `retrieval_metrics` says.
        """
        function = "ImageTextMatcher.evaluate"
        check_on_error(function, on_error)
        flat, owner = flatten_texts(function, images, texts)
        image_rows, result = self._embed(function, "image", images, on_error)
        used, image_of = keep_pairs(owner, result.kept)
        text_rows = self._embed(function, "text", [flat[i] for i in used])[0]
        self._check_fit(function, image_rows, text_rows)
        texts_of = [np.flatnonzero(image_of == row) for row in range(len(image_rows))]
        return ImageTextMetrics(
            retrieval_metrics((image_rows, text_rows, self.metric), texts_of, ks),
            retrieval_metrics((text_rows, image_rows, self.metric), image_of, ks),
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the matcher to `folder`, made if missing: config.json, and parts-*/ with space/ and text_encoder/.

        Encoders made from a spec are saved by it, fitted text encoders as they are; others are named only,
        and `load` asks for them. Features in the cache are not part of it.

        A matcher that the folder holds already stays what it is until the new one is complete: its parts are
        written beside the old ones, then config.json is replaced, in one step, and the old parts are removed.

        Raises:
            OSError: untouched.
            RuntimeError: the space or the text encoder is not fitted.
        """
        storage.save(self, folder)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        image_encoder: Encoder | str | None = None,
        text_encoder: Encoder | str | None = None,
        space: Space | None = None,
        metric: Metric | None = None,
        cache: CacheOption = None,
        device: Any = None,
        strict: bool = True,
    ) -> ImageTextMatcher:
        """The matcher that `save` wrote.

        Args:
            folder: given to `save`.
            image_encoder, text_encoder: in place of the saved spec; required where the encoder had none.
            space: in place of the saved one; required where that was a class of your own, not derived from
                this package's.
            metric: in place of the saved one.
            cache, device: as for the constructor.
            strict: refuse an encoder whose fingerprint is not that of the saved one, since the space was
                fitted to other features. False allows it.

        Raises:
            OSError: a file is missing.
            ValueError: not a saved matcher, an encoder or a space that has to be passed, or an encoder that differs.
        """
        parts = storage.load(folder, image_encoder, text_encoder, space, device, strict=strict)
        matcher = cls(parts.image_encoder, parts.text_encoder, parts.space, metric or parts.metric, cache=cache)
        matcher.image_spec, matcher.text_spec = parts.image_spec, parts.text_spec
        if text_encoder is None:
            matcher._fits_text = parts.fits_text
        return matcher

    # -- steps shared by the methods above --

    def _features(
        self, function: str, side: Modality, items: Sequence[Any], on_error: OnError = "raise"
    ) -> EncodeResult:
        return encode_named(
            function, self.encoders[side], items, method=image_method(self.space) if side == "image" else "encode",
            cache=self.cache, batch_size=self.batch_size, progress=self.progress, on_error=on_error,
        )[0]  # fmt: skip

    def _embed(
        self, function: str, side: Modality, items: Sequence[Any], on_error: OnError = "raise"
    ) -> tuple[Features, EncodeResult]:
        result = self._features(function, side, items, on_error)
        if self.space is None:
            return result.features, result
        transform = self.space.transform_images if side == "image" else self.space.transform_texts
        return transform(result.features), result

    def _check_fit(self, function: str, image_rows: Features, text_rows: Features) -> None:
        if image_rows.shape[1] != text_rows.shape[1]:
            raise ValueError(
                f"{function}: images have {image_rows.shape[1]} dimensions ({self.image_encoder.name}) "
                f"and texts {text_rows.shape[1]} ({self.text_encoder.name}): pass a space, e.g. Ridge(), "
                "and fit it"
            )
