"""`RegionTextClassifier`: whether a text is true of an image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..encoders import Encoder
from ..encoders.base import check_items, check_texts
from .features import CacheOption
from .inputs import Inputs, Steps
from .learning import split
from .networks import device_of
from .region_base import RegionModel
from .region_networks import RegionPairClassifier
from .regions import distinct, distinct_regions
from .trained import check_folder
from .training import Training, Validation
from .tuning import FineTune

if TYPE_CHECKING:
    from typing_extensions import Self

_PAIRS = 256  # at a time


class RegionTextClassifier(RegionModel):
    """Tells whether a text is true of an image: each word attends to the regions, and what it finds is pooled.

    Args:
        image_encoder, text_encoder, cache, batch_size, seed, device, progress: as for `RegionTextMatcher`.
        dim: of the network.
        heads: of the attention; they divide `dim`.
        dropout: between its layers.

    Raises:
        ValueError, TypeError: an option outside its range, or an encoder of the other modality.
    """

    def __init__(
        self,
        image_encoder: Encoder | str = "efficientnet-lite0",
        text_encoder: Encoder | str = "minilm",
        *,
        dim: int = 64,
        heads: int = 4,
        dropout: float = 0.3,
        cache: CacheOption = None,
        batch_size: int = 32,
        seed: int = 0,
        device: Any = None,
        progress: bool | None = None,
    ) -> None:
        if heads < 1 or dim % heads:
            raise ValueError(f"RegionTextClassifier: heads must divide dim {dim}, got {heads}")
        self.heads = heads
        self._set_options(
            image_encoder, text_encoder, dim=dim, dropout=dropout, cache=cache, batch_size=batch_size, seed=seed,
            device=device, progress=progress,
        )  # fmt: skip

    def _make_network(self, regions: int, words: int) -> nn.Module:
        return RegionPairClassifier(regions, words, self.dim, self.heads, self.dropout)

    def fit(
        self,
        images: Sequence[Any],
        texts: Sequence[str],
        labels: Any,
        *,
        validation: float | None = 0.1,
        fine_tune: FineTune = None,
        checkpoint: str | os.PathLike[str] | None = None,
        log: str | os.PathLike[str] | None = None,
        **training: Any,
    ) -> Self:
        """Learn from N images (or `Boxes`), N texts and N booleans: whether text i is true of image i.

        An image or a text that is in several pairs is encoded once, also in the batches of `fine_tune`. Images are told
        apart by path or by pixels, and by their boxes. Memory: the regions and words of the different items.

        Args:
            validation: the share of the pairs that is held out for early stopping, or None.
            fine_tune, checkpoint, log, **training: as for `RegionTextMatcher.fit`.

        Raises:
            ValueError: lengths that differ, labels that are all one, features that are NaN.
            TypeError: labels that are no booleans.
        """
        function = "RegionTextClassifier.fit"
        options = Training.of(function, training)
        check_folder(function, checkpoint=checkpoint, log=log)
        truth = np.asarray(labels)
        if truth.dtype != np.bool_:
            raise TypeError(f"{function}: labels must be booleans, got {truth.dtype}")
        with self._fitting(function, fine_tune, options):
            self._fit(function, images, texts, truth, validation, options, checkpoint=checkpoint, log=log)
        return self

    def _fit(
        self, function: str, images: Sequence[Any], texts: Sequence[str], truth: npt.NDArray[np.bool_],
        validation: float | None, options: Training, **files: Any,
    ) -> None:  # fmt: skip
        pairs = self._pairs(function, images, texts)
        if truth.shape != (len(pairs.rows),) or truth.all() or not truth.any():
            raise ValueError(
                f"{function}: labels must be {len(pairs.rows)} booleans, some true and some false, got shape "
                f"{list(truth.shape)} with {int(truth.sum())} true"
            )
        mine, theirs = np.arange(len(pairs.rows)), None
        if validation is not None:
            mine, theirs = split(function, len(pairs.rows), validation, self.seed)
        answers = torch.from_numpy(truth.astype(np.float32)).to(device_of(self.device))

        def taken(rows: Any) -> tuple[Any, ...]:
            return pairs.take(mine[rows])

        def loss(network: Any, rows: Any, done: float) -> torch.Tensor:
            logits = network(*taken(rows))
            return nn.functional.binary_cross_entropy_with_logits(logits, answers[mine[rows]])

        def validate(network: Any, encode: Any) -> Validation:
            logits = _logits(network, *map(encode, pairs.take(theirs)))
            wanted = answers[theirs]
            cost = float(nn.functional.binary_cross_entropy_with_logits(logits, wanted))
            right = float(((logits > 0) == (wanted > 0)).double().mean())
            return Validation((-cost,), {"validation loss": cost, "accuracy": right})

        learned = pairs.regions, pairs.words, torch.from_numpy(pairs.rows[mine]).to(answers.device)
        self._train(
            pairs.regions, pairs.words, taken, loss, None if theirs is None else validate, len(mine), options, learned,
            [truth, mine, pairs.rows], **files,
        )  # fmt: skip

    def predict_proba(self, images: Sequence[Any], texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """The probability [N] that text i is true of image i. RuntimeError before `fit`."""
        network = self._check_fitted("predict_proba")
        pairs = self._pairs("RegionTextClassifier.predict_proba", images, texts)
        rows = torch.from_numpy(pairs.rows).to(device_of(self.device))
        found: npt.NDArray[np.float32] = torch.sigmoid(_logits(network, pairs.regions, pairs.words, rows)).cpu().numpy()
        return found

    def predict(self, images: Sequence[Any], texts: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Whether text i is true of image i, bool [N]."""
        return self.predict_proba(images, texts) > 0.5

    def score(self, images: Sequence[Any], texts: Sequence[str], labels: Any) -> float:
        """The share of right answers."""
        return float((self.predict(images, texts) == np.asarray(labels, bool)).mean())

    def _pairs(self, function: str, images: Sequence[Any], texts: Sequence[str]) -> _Pairs:
        check_items(function, images)
        check_texts(function, texts)
        if len(images) != len(texts):
            raise ValueError(f"{function}: there must be a text for each of {len(images)} images, got {len(texts)}")
        (first, i), (other, j) = distinct_regions(function, images), distinct(texts)
        regions = self._regions(function, [images[n] for n in first], numbers=first.tolist())
        words = self._words(function, [texts[n] for n in other])
        return _Pairs(regions.features, words.features, np.stack([i, j], 1))


class _Pairs(NamedTuple):
    """Different images and texts, each encoded once, and the rows [P, 2] of what is asked together."""

    regions: Any
    words: Any
    rows: npt.NDArray[np.int64]

    def take(self, pairs: Any) -> tuple[Any, Any, torch.Tensor]:
        """The different regions and words of some pairs, and these pairs as rows of them."""
        a, i = np.unique(self.rows[pairs, 0], return_inverse=True)
        b, j = np.unique(self.rows[pairs, 1], return_inverse=True)
        regions, words = Inputs(self.regions), Inputs(self.words)
        rows = torch.from_numpy(np.stack([i, j], 1)).to(regions.device)
        return regions.take(a).features, words.take(b).features, rows


def _logits(network: Any, regions: Steps, words: Steps, rows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([network(regions, words, some) for some in torch.split(rows, _PAIRS)])
