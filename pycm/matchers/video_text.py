"""`VideoTextMatcher`: which sentence belongs to which clip."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from .._temporal_layers import Cell, Pool
from ..encoders import Encoder
from ..encoders.base import Features
from ..functional import Metric
from ..spaces import Ridge
from ..spaces.base import BaseSpace
from ..streams import ClipFeatures
from ..video import clip_name
from .adaptation import aligned
from .base import Head
from .encoded import Encoded
from .features import CacheOption, OnError, Texts, check_k, check_on_error, flatten_texts, keep_pairs
from .known import unique_texts
from .results import VideoTextMatches, VideoTextMetrics
from .sides import WORDS, ClipSide, RowSide, WordSide
from .trained import TrainedMatcher, check_folder, check_unlabelled, check_validation
from .training import Training
from .tuning import FineTune

if TYPE_CHECKING:
    from torch import nn
    from typing_extensions import Self

    from ..streams import Stream

_CLIPS_TEXTS = ("clips", "texts")


class VideoTextMatcher(TrainedMatcher):
    """Matches clips with texts, both ways.

    Each stream of a clip (its frames' features, their differences, motion, sound) runs through an LSTM or GRU and is
    pooled; the pooled streams are joined and mapped by an MLP into a space where the texts are too.

    Args:
        streams: specs for `pycm.streams.get_stream`, or streams. Names of other streams are for `ClipFeatures` that
            have them: clips themselves are then refused.
        text_encoder: an encoder, the spec of one, or "words": sequences of the training texts' own words, through a
            bidirectional GRU. One that has to be fitted (TF-IDF) is fitted to the training texts.
        cell: "lstm" or "gru"; None pools steps in any order, as a baseline that does not know time.
        pool: as in `pycm.temporal_pool`, but "none".
        hidden: size of the recurrent state and of the MLPs.
        dim: of the common space. With `space` it is that of the text encoder.
        head: "ranking": embeddings, ranked by the metric; "pairs": on top of them a classifier of pair or no pair,
            which ranks what they propose; "labels": a classifier of clips, with labels in place of texts.
        metric: "cosine", "dot", "pearson", "euclidean" or "sqeuclidean".
        loss: "max_hinge", "info_nce", "sigmoid" or "triplet" with the defaults of `pycm.losses`, or a module of it.
        sampling: of the frames, as in `pycm.video.read_clip`.
        space: a `Ridge` makes a linear start: the closed-form map from the mean step to the text's features, to which
            the networks add, beginning with nothing. Early stopping then keeps only what helps on the validation
            clips. For small data.
        space_streams: the streams that the linear start reads; None is the first.
        embedding_space: a space of `pycm.spaces` that is fitted to the training items' embeddings when the network is;
            its rows are then what is ranked and what `embed_clips` and `embed_texts` give.
            `HubnessCorrection(Identity())` takes back what makes some items near to everything, above all in a gallery
            of clips that were trained on; `ITQ(Identity(), bits=64)` makes codes. With head="ranking".
        bidirectional: clips are read backwards as well.
        dropout: of the projections and the MLPs.
        input_dropout: of the streams' features. Worth trying where people, places or styles in training are few.
        candidates: with head="pairs", how many embeddings each item proposes to the classifier; None: all pairs.
        cache: a folder (made if missing) or a `FeatureCache`. None and False: features are not kept.
        workers: threads that decode; None is the number of processors, at most 8.
        batch_size: frames, or texts, per forward pass of an encoder.
        seed: of weights, order, dropout and splits: the same seed gives the same bits on the same machine.
        device: of encoders and networks; None is the CPU.
        progress: None shows bars on a terminal only, True always, False never.

    Attributes:
        space_, embedding_space_: after `fit`, the fitted spaces; those that were given stay as they were.
        history_: after `fit`, one record an epoch: "epoch", "loss", "lr", and the validation's figures.
        pseudo_pairs_: how many pairs the last `fit` found among what nobody paired.
        errors_: (name, reason) of each clip that it left out.
        labels_: with head="labels", the labels in the order of `predict_proba`'s columns.

    Wherever clips are taken, an already encoded `ClipFeatures` is too, so that nothing is decoded twice; texts then go
    with its rows.

    Raises:
        ValueError, TypeError: an option outside its range, or an encoder of the other modality.
        ImportError: a package that is needed and not installed; the message names it.

    Example:
        >>> matcher = VideoTextMatcher(space=Ridge())                         # doctest: +SKIP
        >>> matcher.fit(clips, captions, checkpoint="run")                    # doctest: +SKIP
        >>> found = matcher.match(["new.mp4"], ["a dog jumps", "rain falls"]) # doctest: +SKIP
        >>> found.texts[found.video_to_text.indices[0, 0]]                    # doctest: +SKIP
        'a dog jumps'
    """

    def __init__(
        self,
        streams: Sequence[str | Stream] = ("appearance", "differences", "motion"),
        text_encoder: Encoder | str = "minilm",
        *,
        cell: Cell | None = "gru",
        pool: Pool = "mean",
        hidden: int = 256,
        dim: int = 256,
        head: Head = "ranking",
        metric: Metric = "cosine",
        loss: Literal["max_hinge", "info_nce", "sigmoid", "triplet"] | nn.Module = "max_hinge",
        sampling: Any = "uniform:16",
        space: Ridge | None = None,
        space_streams: Sequence[str] | None = None,
        embedding_space: BaseSpace | None = None,
        bidirectional: bool = False,
        dropout: float = 0.2,
        input_dropout: float = 0.0,
        candidates: int | None = None,
        cache: CacheOption = None,
        workers: int | None = None,
        batch_size: int = 32,
        seed: int = 0,
        device: Any = None,
        progress: bool | None = None,
    ) -> None:
        name = type(self).__name__
        self._set_options(
            cell=cell, pool=pool, hidden=hidden, dim=dim, bidirectional=bidirectional, dropout=dropout,
            input_dropout=input_dropout, head=head, metric=metric, loss=loss, space=space,
            embedding_space=embedding_space, candidates=candidates, cache=cache, workers=workers, batch_size=batch_size,
            seed=seed, device=device, progress=progress,
        )  # fmt: skip
        self.streams, self.text_encoder = tuple(streams), text_encoder
        self.sampling, self.space_streams = sampling, space_streams
        self._clips = ClipSide(name, streams, sampling, space_streams)
        self._texts = WordSide() if text_encoder == WORDS else RowSide(name, "text", text_encoder)
        self._sides = self._clips, self._texts
        if space is not None and text_encoder == WORDS:
            raise ValueError(f'{name}: space must be None for text_encoder="words", got {space!r}')

    def __repr__(self) -> str:
        text = self.text_encoder if isinstance(self.text_encoder, str) else self.text_encoder.name
        return (
            f"{type(self).__name__}({list(self._clips.names)}, {text!r}, cell={self.cell!r}, pool={self.pool!r}, "
            f"head={self.head!r}, {self._spaces()}, metric={self.metric!r})"
        )

    @property
    def encoders(self) -> Mapping[str, Any]:
        """The streams by name, and the text encoder as "text"; made where they were given as specs."""
        device = self._options().device
        made = dict(zip(self._clips.names, self._clips.made(device), strict=True))
        text = self._texts.encoder(device) if isinstance(self._texts, RowSide) else None
        return made if text is None or self.head == "labels" else {**made, "text": text}

    def fit(
        self,
        clips: Any,
        texts: Texts | Sequence[Any],
        *,
        validation: float | int | tuple[Any, Any] | None = 0.1,
        fine_tune: FineTune = None,
        target_clips: Any = None,
        unlabelled: tuple[Any, Sequence[str]] | None = None,
        threshold: float | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        log: str | os.PathLike[str] | None = None,
        on_error: OnError = "raise",
        **training: Any,
    ) -> Self:
        """Learn from clips and their texts; an earlier fit is replaced.

        Args:
            clips: N clips, each once.
            texts: N entries: the text of clip i, or a list of its texts. A text that several clips have, word for
                word, is right of each of them, and a negative of the others. With head="labels" the N labels.
            validation: the share of the clips that is held out for early stopping (a text that training clips have as
                well is learned from with those); or (clips, texts) for that; or an
                int: so many folds are held out in turn to find the best number of epochs, for which all clips are then
                learned from: on few clips one share says little; or None: the last weights are kept.
            fine_tune: whose encoders are trained as well, by the names of `encoders`: streams of an image encoder
                ("appearance", "differences"), "text"; one, several, or "all" that can be. Streams of one encoder share
                it. Copies are trained: the encoders given stay as they are, and `encoders` has the copies. Clips are
                then decoded as they are needed. Not with `space` or `target_clips`: their features would change.
            target_clips: clips of the kind that will be matched, where it is another than the training's: the training
                clips' features get their mean and covariance (`pycm.spaces.CORAL`), stream by stream.
            unlabelled: (clips, texts) that nobody paired: once fitted, the matcher is fitted again, to its pairs and to
                the mutual nearest neighbours among these whose embeddings score `threshold` or better (are as near,
                for a distance). Those are never validated on. Of `fine_tune` the first fit knows nothing: encoders are
                trained in the second. Not with head="labels".
            checkpoint: a folder for the state of the training, written every half minute and on Ctrl-C. The same call
                then goes on from it, to the bits of a run that was never cut off.
            log: a .csv file, or a folder for TensorBoard; with folds their records, by "fold", then the means.
            on_error: "skip" leaves unreadable clips out together with their texts.
            **training: the fields of `Training` by name: epochs, lr, weight_decay, warmup, batch_size, patience,
                max_norm, label_smoothing, precision, encoder_lr, kept_bytes.

        Raises:
            ValueError: lengths that differ, a clip without a text or given twice, NaN in the features, a loss that is
                not finite, a checkpoint of another training.
            TypeError: an argument that does not exist, an encoder that cannot be trained.
            pycm.video.ClipReadError: a clip that cannot be read; UnreadableInputError with all of them.

        Memory: the features of all training clips on the device.
        """
        function = f"{type(self).__name__}.fit"
        options = Training.of(function, training, labels=self.head == "labels")
        check_on_error(function, on_error)
        check_folder(function, checkpoint=checkpoint, log=log)
        check_unlabelled(function, unlabelled, threshold)
        check_validation(function, validation)
        if unlabelled is not None and self.head == "labels":
            raise ValueError(f"{function}: unlabelled must be None with head='labels'")
        files: dict[str, Any] = {"checkpoint": checkpoint, "log": log}
        with self._fitting(function, fine_tune, options, target_clips=target_clips):
            target = None
            if target_clips is not None:
                target = self._clips.encode(function, target_clips, self._options(), on_error).features
            if self.head == "labels":
                self._fit_labels(function, clips, texts, target, validation, on_error, options, files)
                return self
            frozen = unlabelled is not None
            known, names = self._fit_pairs(function, clips, texts, target, validation, on_error, options, files, frozen)
            if unlabelled is not None and threshold is not None:
                first = self._clips.encode(function, unlabelled[0], self._options(), on_error)
                second = self._texts.encode(function, unlabelled[1], self._options())
                self._learn_again(function, known, names, first, second, threshold, options, files)
        return self

    def _fit_pairs(
        self, function: str, clips: Any, texts: Any, target: Any, validation: Any, on_error: OnError,
        options: Training, files: Any, frozen: bool,
    ) -> Any:  # fmt: skip
        """Returns what it learned from: both sides' features, pairs, and what was held out; and both sides' names."""
        first, flat, owner = self._labelled(function, clips, texts, on_error)
        self.errors_ = first.errors
        self._texts.fit(list(dict.fromkeys(flat)), self._options())
        second, pairs = self._encoded_texts(function, flat, owner)
        held: Any = validation
        if isinstance(validation, tuple):
            there, others, owner_there = self._labelled(function, validation[0], validation[1], on_error)
            texts_there, pairs_there = self._encoded_texts(function, others, owner_there)
            held = there.features, texts_there.features, pairs_there
        features = first.features if target is None else aligned(first.features, target)
        self._learn(function, features, second.features, pairs, held, options, frozen=frozen, **files)
        return (features, second.features, pairs, held), (first.names, list(dict.fromkeys(flat)))

    def _encoded_texts(
        self, function: str, flat: Sequence[str], owner: npt.NDArray[np.int64]
    ) -> tuple[Encoded, npt.NDArray[np.int64]]:
        """Each different text once, and the pairs of (clip, text) rows."""
        texts, pairs = unique_texts(flat, owner)
        return self._texts.encode(function, texts, self._options()), pairs

    def _labelled(
        self, function: str, clips: Any, texts: Any, on_error: OnError
    ) -> tuple[Encoded, list[str], npt.NDArray[np.int64]]:
        """Encoded clips, all the texts of those that were kept, and the row of each text's clip."""
        named = clips.names if isinstance(clips, ClipFeatures) else clips
        flat, owner = flatten_texts(function, named, texts, "clip", clip_name)
        first = self._clips.encode(function, clips, self._options(), on_error)
        first.check_once(function, "clips")
        used, row = keep_pairs(owner, first.kept)
        return first, [flat[i] for i in used], row

    def _fit_labels(
        self, function: str, clips: Any, labels: Any, target: Any, validation: Any, on_error: OnError,
        options: Training, files: Any,
    ) -> None:  # fmt: skip
        first, own = self._with_labels(function, clips, labels, on_error)
        self.errors_ = first.errors
        self.labels_ = sorted(set(own))
        held: Any = validation
        if isinstance(validation, tuple):
            there, theirs = self._with_labels(function, validation[0], validation[1], on_error)
            held = there.features, self._label_rows(function, theirs)
        if len(self.labels_) < 2:
            raise ValueError(f"{function}: at least 2 different labels are needed, got {self.labels_}")
        rows = self._label_rows(function, own)
        features = first.features if target is None else aligned(first.features, target)
        self._learn_labels(function, features, rows, held, options, **files)

    def _with_labels(self, function: str, clips: Any, labels: Any, on_error: OnError) -> tuple[Encoded, list[Any]]:
        if len(clips) != len(labels):
            raise ValueError(f"{function}: there must be a label for each of {len(clips)} clips, got {len(labels)}")
        first = self._clips.encode(function, clips, self._options(), on_error)
        first.check_once(function, "clips")
        plain = [label.item() if isinstance(label, np.generic) else label for label in labels]
        kind = str if plain and isinstance(plain[0], str) else int
        for i, label in enumerate(plain):
            if not isinstance(label, kind):
                raise TypeError(f"{function}: labels must be all str or all int, labels[{i}] is {label!r}")
        return first, [plain[i] for i in first.kept]

    def _label_rows(self, function: str, labels: Sequence[Any]) -> npt.NDArray[np.int64]:
        place = {label: i for i, label in enumerate(self.labels_)}
        unknown = [label for label in labels if label not in place]
        if unknown:
            raise ValueError(f"{function}: label {unknown[0]!r} is not among the training labels")
        return np.array([place[label] for label in labels], np.int64)

    def match(
        self, clips: Any, texts: Sequence[str], k: int | tuple[int, int] | None = None, *, on_error: OnError = "raise"
    ) -> VideoTextMatches:
        """The best texts of each clip and the best clips of each text, ties to the lower index.

        Args:
            clips: N >= 1 clips.
            texts: M >= 1 texts.
            k: how many, for both directions, or (texts per clip, clips per text). None: five, or all where there are
                fewer.
            on_error: "skip" leaves unreadable clips out and lists them in `.errors`.

        Raises:
            ValueError: no clips or texts, k out of range, NaN features, features of other sizes than the fitted ones.
            RuntimeError: not fitted.

        Cost: encoding; O(N + M) towers; then O(N M dim), exact, without the N x M matrix. With head="pairs" the
        classifier, an MLP on two embeddings, runs for N M pairs, or for (N + M) `candidates`.
        """
        function = f"{type(self).__name__}.match"
        self._check_fitted("match", "ranking", "pairs")
        check_on_error(function, on_error)
        per_clip, per_text = check_k(function, k, len(clips), len(texts), _CLIPS_TEXTS)
        first = self._clips.encode(function, clips, self._options(), on_error)
        start = time.perf_counter()
        second = self._texts.encode(function, texts, self._options())
        encoded = time.perf_counter()
        there, back = self._ranked(function, first, second, (per_clip, min(per_text, len(first.names))))
        seconds = {**first.seconds, "encode texts": encoded - start, "score": time.perf_counter() - encoded}
        return VideoTextMatches(
            there, back, clips=first.names, texts=list(texts), metric="logit" if self.head == "pairs" else self.metric,
            kept=first.kept, errors=first.errors, seconds=seconds,
        )  # fmt: skip

    def scores(self, clips: Any, texts: Sequence[str]) -> Features:
        """The full matrix [N, M] float32: scores, distances for distance metrics, logits with head="pairs"."""
        function = f"{type(self).__name__}.scores"
        self._check_fitted("scores", "ranking", "pairs")
        first = self._clips.encode(function, clips, self._options())
        second = self._texts.encode(function, texts, self._options())
        return self._score_matrix(*self._inputs_of(function, first, second))

    def evaluate(
        self, clips: Any, texts: Texts, ks: Sequence[int] = (1, 5, 10), *, on_error: OnError = "raise"
    ) -> VideoTextMetrics:
        """Recall at k and ranks both ways, where the matches are known.

        Args:
            clips: N clips, each once and a candidate of every text.
            texts: texts[i] is the text of clip i, or a list of its texts. Each different text is one candidate of
                every clip and one query, and belongs to all the clips that have it, as in training.
            ks: the cutoffs of recall.
            on_error: "skip" leaves unreadable clips out together with their texts.

        Errors as `match`; ties count as `retrieval_metrics` says. With head="pairs" all N M pairs, or
        those of `candidates`, are scored.
        """
        function = f"{type(self).__name__}.evaluate"
        self._check_fitted("evaluate", "ranking", "pairs")
        check_on_error(function, on_error)
        first, flat, owner = self._labelled(function, clips, texts, on_error)
        second, pairs = self._encoded_texts(function, flat, owner)
        return VideoTextMetrics(*self._recalls(*self._inputs_of(function, first, second), pairs, ks))

    def contributions(self, clips: Any, texts: Texts, k: int = 1) -> dict[str, float]:
        """What each stream is worth: how much recall at k, both ways' mean, falls when its rows change clips.

        Permutation importance (Breiman 2001): the stream of each clip is replaced by that of another, all else stays.
        Near 0, or below, the stream does not matter to this matcher, which is not to say that it could not.
        """
        function = f"{type(self).__name__}.contributions"
        self._check_fitted("contributions", "ranking", "pairs")
        first, flat, owner = self._labelled(function, clips, texts, "raise")
        second, pairs = self._encoded_texts(function, flat, owner)
        return self._exchanged(function, first, second, pairs, k)

    def embed_clips(self, clips: Any) -> Features:
        """Rows [N, dim] of the common space, float32; of unit length for distances alone. Errors as `match`."""
        function = f"{type(self).__name__}.embed_clips"
        self._check_fitted("embed_clips")
        encoded = self._clips.encode(function, clips, self._options())
        return self._rows(0, self._inputs(function, 0, encoded))

    def embed_texts(self, texts: Sequence[str]) -> Features:
        """Rows [M, dim] of the common space, float32; of unit length for distances alone. Errors as `match`."""
        function = f"{type(self).__name__}.embed_texts"
        self._check_fitted("embed_texts", "ranking", "pairs")
        encoded = self._texts.encode(function, texts, self._options())
        return self._rows(1, self._inputs(function, 1, encoded))

    def predict_proba(self, clips: Any, texts: Sequence[str] | None = None) -> Features:
        """head="labels": probabilities [N, labels]; head="pairs": [N], that text i belongs to clip i."""
        function = f"{type(self).__name__}.predict_proba"
        self._check_fitted("predict_proba", "labels", "pairs")
        first = self._clips.encode(function, clips, self._options())
        if self.head == "labels":
            return self._label_scores(self._inputs(function, 0, first))
        if texts is None or len(texts) != len(clips):
            raise ValueError(f"{function}: texts must have one text for each of {len(clips)} clips, got {texts!r}")
        return self._pair_scores(function, first, self._texts.encode(function, texts, self._options()))

    def predict(self, clips: Any, texts: Sequence[str] | None = None) -> npt.NDArray[Any]:
        """head="labels": the label of each clip; head="pairs": bool [N], whether text i belongs to clip i."""
        self._check_fitted("predict", "labels", "pairs")
        found = self.predict_proba(clips, texts)
        return np.array(self.labels_)[found.argmax(1)] if self.head == "labels" else found >= 0.5

    def score(self, clips: Any, labels: Sequence[Any]) -> float:
        """head="labels": the share of clips whose label is predicted."""
        self._check_fitted("score", "labels")
        if len(clips) != len(labels):
            raise ValueError(f"{type(self).__name__}.score: expected {len(clips)} labels, got {len(labels)}")
        return float(np.mean(self.predict(clips) == np.asarray(labels)))
