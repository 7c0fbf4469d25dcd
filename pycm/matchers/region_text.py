"""`RegionTextMatcher`: images with texts, regions against words."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..encoders import Encoder
from ..encoders.base import Features
from ..evaluate import retrieval_metrics
from ..functional import Matches
from ..late_interaction import maxsim_topk
from .base import Matcher
from .encoded import Encoded
from .features import CacheOption, OnError, Texts, check_k, check_on_error, flatten_texts, keep_pairs
from .heads import LOSSES
from .inputs import Inputs
from .known import KnownPairs, belonging, unique_texts
from .learning import split
from .networks import device_of
from .region_base import RegionModel, check_share
from .region_networks import RegionRanking, Score
from .regions import Boxes
from .results import ImageTextMatches, ImageTextMetrics
from .trained import check_folder
from .training import Training, Validation
from .tuning import FineTune

if TYPE_CHECKING:
    from typing_extensions import Self

Int64 = npt.NDArray[np.int64]
_IMAGES = 256  # scored at a time


class RegionTextMatcher(RegionModel, Matcher):
    """Matches images with texts by their parts: regions of the image against words of the text, both ways.

    Also made by ``ImageTextMatcher(granularity="region")``. Regions and words are mapped into one space by one linear
    map each, learned from pairs; the score of a pair is MaxSim or cross attention there.

    Args:
        image_encoder: an encoder, or the spec of one. For plain images it has `encode_grid` (EfficientNetLite0: 49
            cells); images given as `Boxes` are cut out and encoded box by box by any encoder.
        text_encoder: one with `encode_tokens` (MiniLM), or its spec.
        score: "maxsim": the mean over the words of each one's best cosine with a region (Yao et al. 2021, FILIP);
            "cross-attention": the mean cosine of each word with what it attends to (Lee et al. 2018, SCAN).
        dim: of the space.
        loss: of `pycm.losses`: "info_nce", "max_hinge", "sigmoid" or "triplet", over the scores of a batch.
        cache: a folder or a `FeatureCache` for the images' features; words are encoded anew.
        batch_size: images, boxes or texts per forward pass of an encoder.
        seed: of weights, order and splits.
        device: of the network; None is the CPU.
        progress: None shows bars on a terminal only, True always, False never.

    Attributes:
        history_: after `fit`, one record an epoch: "epoch", "loss", "lr", and the validation's figures.

    Raises:
        ValueError, TypeError: an option outside its range, or an encoder of the other modality.
    """

    def __init__(
        self,
        image_encoder: Encoder | str = "efficientnet-lite0",
        text_encoder: Encoder | str = "minilm",
        *,
        score: Score = "maxsim",
        dim: int = 128,
        loss: Literal["info_nce", "max_hinge", "sigmoid", "triplet"] = "info_nce",
        cache: CacheOption = None,
        batch_size: int = 32,
        seed: int = 0,
        device: Any = None,
        progress: bool | None = None,
    ) -> None:
        for name, value, known in (("score", score, ("maxsim", "cross-attention")), ("loss", loss, tuple(LOSSES))):
            if value not in known:
                raise ValueError(f"RegionTextMatcher: {name} must be one of {', '.join(known)}, got {value!r}")
        self.score, self.loss, self.metric, self.space = score, loss, "cosine", None
        self._set_options(
            image_encoder, text_encoder, dim=dim, dropout=0.0, cache=cache, batch_size=batch_size, seed=seed,
            device=device, progress=progress,
        )  # fmt: skip

    def __repr__(self) -> str:
        return (
            f"RegionTextMatcher({self.image_encoder.name!r}, {self.text_encoder.name!r}, score={self.score!r}, "
            f"dim={self.dim})"
        )

    def _make_network(self, regions: int, words: int) -> nn.Module:
        return RegionRanking(regions, words, self.dim, self.score, LOSSES[self.loss](metric="dot"))

    def fit(
        self,
        images: Sequence[Any],
        texts: Texts,
        *,
        validation: float | None = 0.1,
        fine_tune: FineTune = None,
        checkpoint: str | os.PathLike[str] | None = None,
        log: str | os.PathLike[str] | None = None,
        on_error: OnError = "raise",
        **training: Any,
    ) -> Self:
        """Learn the space from images and their texts; an earlier fit is replaced.

        Args:
            images: N images, or N `Boxes`.
            texts: N entries: the text of image i, or a list of its texts. A text that several images have, word for
                word, is right of each of them, and a negative of the others.
            validation: the share of the images that is held out for early stopping (a text that training images have
                as well is learned from with those), or None.
            fine_tune: "image", "text" or "all": the encoder is trained as well; see `VideoTextMatcher.fit`.
            checkpoint: a folder for the state of the training; the same call goes on from it.
            log: a .csv file, or a folder for TensorBoard.
            on_error: "skip" leaves unreadable images out together with their texts.
            **training: the fields of `Training` by name.

        Raises:
            ValueError, TypeError, UnreadableInputError: as `ImageTextMatcher.fit`; a loss that is not finite.
        """
        function = "RegionTextMatcher.fit"
        options = Training.of(function, training)
        check_on_error(function, on_error)
        check_folder(function, checkpoint=checkpoint, log=log)
        check_share(function, validation)
        with self._fitting(function, fine_tune, options):
            self._fit(function, images, texts, validation, on_error, options, checkpoint=checkpoint, log=log)
        return self

    def _fit(
        self, function: str, images: Sequence[Any], texts: Texts, validation: float | None, on_error: OnError,
        options: Training, **files: Any,
    ) -> None:  # fmt: skip
        flat, owner = flatten_texts(function, [_image_of(item) for item in images], texts)
        found = self._regions(function, images, on_error)
        self.errors_ = found.errors
        _check_once(function, images, found)
        used, owner = keep_pairs(owner, found.kept)
        flat = [flat[i] for i in used]
        different, pairs = unique_texts(flat, owner)
        regions, words = found.features, self._words(function, different).features
        device = device_of(self.device)
        held: Any = None
        learned = pairs
        if validation is not None:
            mine, theirs = split(function, len(regions), validation, self.seed)
            learned = pairs[np.isin(pairs[:, 0], mine)]
            rows = pairs[np.isin(pairs[:, 0], theirs)]
            texts_held = np.unique(rows[:, 1])
            own = np.stack([np.searchsorted(theirs, rows[:, 0]), np.searchsorted(texts_held, rows[:, 1])], 1)
            held = (
                _take(regions, theirs), _take(words, texts_held),
                belonging(own, len(theirs), 0), belonging(own, len(texts_held), 1),
            )  # fmt: skip
        known = KnownPairs(learned)

        def taken(rows: Int64) -> tuple[Any, Any]:
            a, b = (np.unique(learned[rows, side]) for side in (0, 1))
            return _take(regions, a), _take(words, b)

        def loss(network: Any, rows: Int64, done: float) -> torch.Tensor:
            batch = learned[rows]
            i, j = (np.unique(batch[:, side], return_inverse=True)[1] for side in (0, 1))
            places = np.stack([i, j], 1), known.within(batch[:, 0], batch[:, 1])
            index, ignored = (torch.from_numpy(part).to(device) for part in places)
            return network(*taken(rows), index, ignored, done)  # type: ignore[no-any-return]

        def validate(network: Any, encode: Any) -> Validation:
            scores = _matrix(network, encode(held[0]), encode(held[1]))
            there = retrieval_metrics(scores, held[2], (1, 5))
            back = retrieval_metrics(np.ascontiguousarray(scores.T), held[3], (1, 5))
            figures = {f"recall@{k}": (there.recall_at_k[k] + back.recall_at_k[k]) / 2 for k in (1, 5)}
            figures["mrr"] = (there.mrr + back.mrr) / 2
            return Validation((figures["mrr"],), figures)

        scale_by = _take(regions, np.unique(learned[:, 0])), _take(words, np.unique(learned[:, 1]))
        check = None if held is None else validate
        self._train(regions, words, taken, loss, check, len(learned), options, scale_by, [learned], **files)

    def match(
        self, images: Sequence[Any], texts: Sequence[str], k: int | tuple[int, int] | None = None, *,
        on_error: OnError = "raise",
    ) -> ImageTextMatches:  # fmt: skip
        """The best texts of each image and the best images of each text, ties to the lower index.

        Arguments and errors as `ImageTextMatcher.match`; RuntimeError before `fit`. With MaxSim exact in both
        directions, without the matrix; cross attention computes it.
        """
        function = "RegionTextMatcher.match"
        network = self._check_fitted("match")
        check_on_error(function, on_error)
        per_image, per_text = check_k(function, k, len(images), len(texts))
        clock = time.perf_counter
        start = clock()
        found = self._regions(function, images, on_error)
        encoded_images = clock()
        words: Any = self._words(function, texts).features
        encoded_texts = clock()
        regions: Any = found.features
        per_text = min(per_text, len(regions))
        if self.score == "maxsim":
            with torch.no_grad():
                rows = network.regions(regions), regions.cu_seqlens
                said = network.words(words), words.cu_seqlens
            options: Any = {"metric": "cosine", "reduce": "mean"}
            there = maxsim_topk(rows, said, per_image, direction="i2t", **options)
            back = maxsim_topk(said, rows, per_text, direction="t2i", **options)
            there, back = (Matches(*(part.cpu().numpy() for part in way)) for way in (there, back))
        else:
            scores = _matrix(network, regions, words)
            there, back = _best(scores, per_image), _best(scores.T, per_text)
        return ImageTextMatches(
            there,
            back,
            images=found.names,
            texts=list(texts),
            metric=self.metric,
            kept=found.kept,
            errors=found.errors,
            seconds={
                "encode images": encoded_images - start,
                "encode texts": encoded_texts - encoded_images,
                "score": clock() - encoded_texts,
            },
        )

    def scores(self, images: Sequence[Any], texts: Sequence[str]) -> Features:
        """The full matrix [N, M] float32. Errors as `match`."""
        function = "RegionTextMatcher.scores"
        network = self._check_fitted("scores")
        return _matrix(network, self._regions(function, images).features, self._words(function, texts).features)

    def evaluate(
        self, images: Sequence[Any], texts: Texts, ks: Sequence[int] = (1, 5, 10), *, on_error: OnError = "raise"
    ) -> ImageTextMetrics:
        """Recall at k and ranks in both directions, where the matches are known.

        As `ImageTextMatcher.evaluate`, but each different text is one candidate of every image and one query, and
        belongs to all the images that have it, as in training.
        """
        function = "RegionTextMatcher.evaluate"
        network = self._check_fitted("evaluate")
        check_on_error(function, on_error)
        flat, owner = flatten_texts(function, [_image_of(item) for item in images], texts)
        found = self._regions(function, images, on_error)
        used, owner = keep_pairs(owner, found.kept)
        different, pairs = unique_texts([flat[i] for i in used], owner)
        scores = _matrix(network, found.features, self._words(function, different).features)
        return ImageTextMetrics(
            retrieval_metrics(scores, belonging(pairs, len(found.names), 0), ks),
            retrieval_metrics(np.ascontiguousarray(scores.T), belonging(pairs, len(different), 1), ks),
        )


def _image_of(item: Any) -> Any:
    return item.image if isinstance(item, Boxes) else item


def _check_once(function: str, images: Sequence[Any], found: Encoded) -> None:
    """As `Encoded.check_once`; an image may come again with other boxes."""
    boxes = [np.asarray(images[i].boxes).tolist() if isinstance(images[i], Boxes) else "" for i in found.kept]
    found._replace(names=[f"{name} {own}".rstrip() for name, own in zip(found.names, boxes, strict=True)]).check_once(
        function, "images"
    )


def _take(features: Any, rows: Any) -> Any:
    return Inputs(features).take(rows).features


def _matrix(network: Any, regions: Any, words: Any) -> npt.NDArray[np.float32]:
    """Scores [N, M], some images at a time."""
    blocks = []
    with torch.no_grad():
        for start in range(0, len(regions), _IMAGES):
            rows = _take(regions, np.arange(start, min(start + _IMAGES, len(regions))))
            blocks.append(network.scores(rows, words).cpu().numpy())
    return np.concatenate(blocks)


def _best(scores: npt.NDArray[np.float32], k: int) -> Matches:
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return Matches(np.take_along_axis(scores, order, 1), order)
