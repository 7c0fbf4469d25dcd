"""`TrainedMatcher`: what the matchers with a network share, from inputs to fitted weights and scores."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .._temporal_layers import CELLS, POOLS, STATE_POOLS
from ..encoders.base import check_batch_size, check_device, check_seed
from ..encoders.module import TorchEncoder
from ..evaluate import RetrievalMetrics
from ..functional import DISTANCES, METRICS, Matches, similarity, topk
from ..spaces import Ridge
from ..spaces.base import BaseSpace
from ..video import check_workers
from . import storage_trained
from .adaptation import extended, pseudo_pairs
from .base import Head, Matcher
from .encoded import Encoded, Options
from .features import CacheOption, as_cache
from .heads import LOSSES, LabelClassifier
from .inputs import Features, Inputs, Streams
from .known import belonging
from .learning import Labels, Learned, Pairs, Recipe, learn
from .linear_start import fit_start, start_rows
from .networks import device_of
from .scoring import PairScorer, both_ways, by_blocks, embedded, pair_matches, pair_matrix
from .sides import ClipSide
from .training import Record, Training
from .tuning import FineTune, Tuning, before, chosen, names_of, tuning

if TYPE_CHECKING:
    from typing_extensions import Self


class TrainedMatcher(Matcher):
    """Base of the matchers that learn a network; a subclass names its sides and its public methods."""

    head: Head
    space: Ridge | None
    embedding_space: BaseSpace | None
    _sides: tuple[Any, Any]

    def _set_options(
        self, *, cell: Any, pool: Any, hidden: int, dim: int, bidirectional: bool, dropout: float,
        input_dropout: float, head: Any, metric: Any, loss: Any, space: Any, embedding_space: Any,
        candidates: int | None, cache: CacheOption, workers: int | None, batch_size: int, seed: int, device: Any,
        progress: bool | None,
    ) -> None:  # fmt: skip
        """Check and keep the options that all have."""
        name = type(self).__name__
        pools = POOLS if cell is not None else STATE_POOLS
        for argument, value, known in (
            ("cell", cell, (*CELLS, None)), ("pool", pool, [p for p in pools if p != "none"]),
            ("head", head, ("ranking", "pairs", "labels")), ("metric", metric, METRICS),
            *([] if isinstance(loss, nn.Module) else [("loss", loss, LOSSES)]),
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"{name}: {argument} must be one of {', '.join(map(str, known))}, got {value!r}")
        for argument, value in (("hidden", hidden), ("dim", dim), ("candidates", candidates)):
            if argument == "candidates" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{name}: {argument} must be a positive int, got {value!r}")
        for argument, share in (("dropout", dropout), ("input_dropout", input_dropout)):
            if not 0 <= share < 1:
                raise ValueError(f"{name}: {argument} must be in [0, 1), got {share!r}")
        if space is not None and not isinstance(space, Ridge):
            raise TypeError(f"{name}: space must be a Ridge or None, got {type(space).__name__}")
        if space is not None and head == "labels":
            raise ValueError(f"{name}: space must be None for head='labels', got {space!r}")
        if embedding_space is not None and not isinstance(embedding_space, BaseSpace):
            kind = type(embedding_space).__name__
            raise TypeError(f"{name}: embedding_space must be a space of pycm.spaces or None, got {kind}")
        if embedding_space is not None and head != "ranking":
            raise ValueError(f"{name}: embedding_space must be None for head={head!r}, got {embedding_space!r}")
        if embedding_space is not None and metric == "pearson":
            raise ValueError(f"{name}: metric 'pearson' does not keep the order of an embedding_space")
        check_batch_size(name, batch_size)
        check_seed(name, seed)
        check_workers(name, workers)
        check_device(name, device)
        self.cell, self.pool, self.hidden, self.dim = cell, pool, int(hidden), int(dim)
        self.bidirectional, self.dropout, self.input_dropout = bool(bidirectional), float(dropout), float(input_dropout)
        self.head, self.metric, self.loss, self.space, self.candidates = head, metric, loss, space, candidates
        self.embedding_space = embedding_space
        self.cache, self.workers, self.batch_size = cache, workers, batch_size
        self._cache = as_cache(cache)
        self.seed, self.device, self.progress = seed, device, progress
        self._network: nn.Module | None = None
        self._about: dict[str, Any] = {}
        self._tuning: Tuning | None = None  # while `fit` trains encoders
        self.space_: Ridge | None = None
        self.embedding_space_: BaseSpace | None = None
        self.labels_: list[Any] = []
        self.history_: list[Record] = []
        self.pseudo_pairs_ = 0
        self.errors_: list[tuple[str, str]] = []

    @property
    def fitted(self) -> bool:
        """Whether `fit` has ended, or the matcher was loaded."""
        return self._network is not None

    @property
    def network(self) -> nn.Module:
        """The fitted network, in evaluation mode. RuntimeError before `fit`."""
        self._check_fitted("network")
        assert self._network is not None
        return self._network

    def _spaces(self) -> str:
        """For `repr`: both spaces, the second only where there is one."""
        after = "" if self.embedding_space is None else f", embedding_space={self.embedding_space!r}"
        return f"space={self.space!r}{after}"

    def _options(self) -> Options:
        device = device_of(self.device)
        return Options(self._cache, self.workers, self.batch_size, self.progress, device, self._tuning)

    def _check_fitted(self, method: str, *heads: Head) -> None:
        name = f"{type(self).__name__}.{method}"
        if heads and self.head not in heads:
            raise ValueError(f"{name}: needs head={' or '.join(map(repr, heads))}, this matcher has {self.head!r}")
        if self._network is None:
            raise RuntimeError(f"{name}: not fitted, call fit first")

    # -- learning --

    @contextmanager
    def _fitting(self, function: str, fine_tune: FineTune, training: Training, **excluded: Any) -> Iterator[None]:
        """A fit: what was fitted before is gone, and encoders are trained on the way that `fine_tune` names.

        excluded: options that do not go with it, as what they compute is of the encoders' features before training.
        """
        asked = None if fine_tune == "all" else names_of(fine_tune)
        sides = self._sides[:1] if self.head == "labels" else self._sides
        parts: dict[str, Any] = {}
        for side in sides if asked != [] else ():
            parts |= side.parts(device_of(self.device), asked)
        names = chosen(function, fine_tune, [name for side in sides for name in side.names], parts)
        for name, value in {"space": self.space, **excluded}.items():
            if names and value is not None:
                raise ValueError(
                    f"{function}: fine_tune and {name} do not go together: {name} is fitted to features that would "
                    "change under it as the encoders are trained"
                )
        self._network = None
        self._use({})
        with tuning(self, names, training.kept_bytes, self.workers):
            yield

    def _learn(
        self, function: str, first: Features, second: Features, pairs: npt.NDArray[np.int64], validation: Any,
        training: Training, *, extra: int = 0, frozen: bool = False, **files: Any,
    ) -> None:  # fmt: skip
        """Fit the linear start and the network to pairs [P, 2] of rows of both sides.

        extra: the last so many first rows are never held out.
        frozen: train no encoder, whatever the fit trains.
        """
        recipe = self._recipe()
        if frozen:
            recipe, first, second = replace(recipe, tuning=None), before(first), before(second)
            if isinstance(validation, tuple):
                validation = before(validation[0]), before(validation[1]), validation[2]
        self.pseudo_pairs_ = 0
        sides, device = self._sides, device_of(self.device)
        start: tuple[Tensor | None, Tensor | None] = (None, None)
        dim = self.dim
        self.space_ = None if self.space is None else Ridge(**self.space.get_params())
        if self.space_ is not None:
            rows = sides[0].start_rows(first), sides[1].start_rows(second)
            outside = fit_start(self.space_, *rows, pairs, self.seed)
            inside = self.space_.transform_texts(rows[1])
            dim = inside.shape[1]
            left, right = (torch.from_numpy(start_rows(x, self.metric)).to(device) for x in (outside, inside))
            start = left, right
        if isinstance(validation, tuple):
            a, b, between = validation
            begin = self._start(a, b)
            validation = Pairs(Inputs(a, begin[0]), Inputs(b, begin[1]), between)
        problem = Pairs(Inputs(first, start[0]), Inputs(second, start[1]), pairs, extra)
        self._ranked_by(*trial_rows(len(first), len(second), dim), pairs)  # what it refuses, before any long work
        about = {
            "head": self.head,
            "dim": dim,
            "first": sides[0].tower(first),
            "second": sides[1].tower(second),
            "linear": self.space is not None,
            "unit": self.metric in DISTANCES,
            "options": self._network_options(),
        }
        learned = learn(function, recipe, about, problem, validation, training, files)
        self._keep(about, learned)
        if self.embedding_space is not None:
            # The linear start's rows are here of maps that were not fitted to them: new items' will be like that.
            a, b = (
                by_blocks(lambda part, embed=embed: embed(learned.encode(part)), inputs)
                for embed, inputs in (
                    (learned.network.first, problem.first), (learned.network.second, problem.second)
                )
            )  # fmt: skip
            self.embedding_space_ = self._ranked_by(a, b, pairs)

    def _ranked_by(self, first: Any, second: Any, pairs: npt.NDArray[np.int64]) -> BaseSpace | None:
        """A copy of `embedding_space`, fitted to embeddings of both sides; ValueError as its `fit`."""
        return None if self.embedding_space is None else copy.deepcopy(self.embedding_space).fit(first, second, pairs)

    def _learn_again(
        self, function: str, known: tuple[Features, Features, npt.NDArray[np.int64], Any],
        names: tuple[Sequence[str], Sequence[str]], first: Encoded, second: Encoded,
        threshold: float, training: Training, files: dict[str, Any],
    ) -> None:  # fmt: skip
        """Learn from what is known (both sides' features, pairs, validation; names) and from the pairs that the matcher
        finds itself among items that nobody paired. A known first item keeps to the pairs that it was given. Where
        encoders are trained, this is the learning in which they are."""
        a, b, pairs, validation = known
        inputs = self._inputs_of(function, *(one._replace(features=before(one.features)) for one in (first, second)))
        found = pseudo_pairs(*embedded(self._network, *inputs), self.metric, threshold)
        left, i = extended(a, names[0], first, found[:, 0])
        found, i = found[i >= len(a)], i[i >= len(a)]
        if not len(found) and self._tuning is None:
            return
        right, j = extended(b, names[1], second, found[:, 1])
        pairs = np.concatenate([pairs, np.stack([i, j], 1)])
        if files["checkpoint"] is not None:
            files = {**files, "checkpoint": Path(files["checkpoint"], "again")}
        self._learn(function, left, right, pairs, validation, training, extra=len(left) - len(a), **files)
        self.pseudo_pairs_ = len(found)

    def _learn_labels(
        self, function: str, features: Features, labels: npt.NDArray[np.int64], validation: Any, training: Training,
        **files: Any,
    ) -> None:  # fmt: skip
        """Fit the classifier of labels [N] of the first side's items, rows of `labels_`."""
        if isinstance(validation, tuple):
            validation = Labels(Inputs(validation[0]), validation[1])
        about = {
            "head": "labels",
            "dim": self.dim,
            "first": self._sides[0].tower(features),
            "labels": len(self.labels_),
            "linear": False,
            "options": self._network_options(),
        }
        problem = Labels(Inputs(features), labels, training.label_smoothing)
        self._keep(about, learn(function, self._recipe(), about, problem, validation, training, files))

    def _keep(self, about: dict[str, Any], learned: Learned) -> None:
        self._use(learned.tuned)
        self._network, self.history_, self._about = learned.network, learned.history, about

    def _use(self, tuned: Mapping[int, TorchEncoder]) -> None:
        """Encode with trained copies in the place of encoders, by the ids of these; {}: as they were given."""
        for side in self._sides:
            side.use(tuned)

    def _recipe(self) -> Recipe:
        device = device_of(self.device)
        return Recipe(self.loss, self.metric, self.candidates, self.seed, device, self.progress, self._tuning)

    def _network_options(self) -> dict[str, Any]:
        names = ("cell", "pool", "hidden", "bidirectional", "dropout", "input_dropout")
        return {name: getattr(self, name) for name in names}

    # -- using what was learned --

    def _start(self, first: Features | None, second: Features | None) -> list[Tensor | None]:
        """The linear start of each side's items; None where there is no space."""
        out: list[Tensor | None] = [None, None]
        if self.space_ is not None:
            maps = self.space_.transform_images, self.space_.transform_texts
            for i, (side, features) in enumerate(zip(self._sides, (first, second), strict=True)):
                if features is not None:
                    rows = start_rows(maps[i](side.start_rows(features)), self.metric)
                    out[i] = torch.from_numpy(rows).to(device_of(self.device))
        return out

    def _inputs(self, function: str, which: int, encoded: Encoded) -> Inputs:
        """Inputs of the fitted network. ValueError for features of other sizes than the fitted ones."""
        side, features = self._sides[which], encoded.features
        found, expected = side.tower(features), self._about[("first", "second")[which]]
        if found != expected:
            raise ValueError(f"{function}: fitted to {side.kind} features {expected}, got {found}")
        return Inputs(features, self._start(*((features, None) if which == 0 else (None, features)))[which])

    def _inputs_of(self, function: str, first: Encoded, second: Encoded) -> tuple[Inputs, Inputs]:
        return self._inputs(function, 0, first), self._inputs(function, 1, second)

    def _rows(self, which: int, inputs: Inputs) -> npt.NDArray[np.float32]:
        """The rows that are ranked: the embeddings [N, dim], or what `embedding_space` makes of them."""
        network: Any = self._network
        rows = by_blocks(getattr(network, ("first", "second")[which]), inputs)
        if (space := self.embedding_space_) is None:
            return rows
        return space.transform_images(rows) if which == 0 else space.transform_texts(rows)

    def _ranked(self, function: str, first: Encoded, second: Encoded, ks: tuple[int, int]) -> tuple[Matches, Matches]:
        """The best of both ways."""
        inputs = self._inputs_of(function, first, second)
        a, b = self._rows(0, inputs[0]), self._rows(1, inputs[1])
        if self.head == "pairs":
            return pair_matches(self._network, *inputs, a, b, ks, self.metric, self.candidates)
        return topk(a, b, ks[0], self.metric), topk(b, a, ks[1], self.metric)

    def _score_matrix(self, first: Inputs, second: Inputs) -> npt.NDArray[np.float32]:
        a, b = self._rows(0, first), self._rows(1, second)
        if self.head == "pairs":
            return pair_matrix(self._network, first, second, a, b)
        return similarity(a, b, self.metric)

    def _pair_scores(self, function: str, first: Encoded, second: Encoded) -> npt.NDArray[np.float32]:
        """The classifier's probability [N] of pair (i, i)."""
        inputs = self._inputs_of(function, first, second)
        score = PairScorer(self._network, *inputs, self._rows(0, inputs[0]), self._rows(1, inputs[1]))
        rows = np.arange(len(inputs[0]))
        return torch.sigmoid(torch.from_numpy(score(rows, rows))).numpy()

    def _recalls(
        self, first: Inputs, second: Inputs, pairs: npt.NDArray[np.int64], ks: Sequence[int]
    ) -> tuple[RetrievalMetrics, RetrievalMetrics]:
        """Metrics both ways, where pairs [P, 2] of rows belong together."""
        own = belonging(pairs, len(first), 0), belonging(pairs, len(second), 1)
        rows = self._rows(0, first), self._rows(1, second)
        return both_ways(self._network, first, second, *rows, *own, ks, self.metric, self.candidates)

    def _exchanged(
        self, function: str, first: Encoded, second: Encoded, pairs: npt.NDArray[np.int64], k: int
    ) -> dict[str, float]:
        """How much recall at k falls when a stream's rows change clips, for each stream."""
        inputs = list(self._inputs_of(function, first, second))
        which = next(i for i, side in enumerate(self._sides) if isinstance(side, ClipSide))
        features = inputs[which].features
        assert isinstance(features, Streams)

        def recall() -> float:
            there, back = self._recalls(inputs[0], inputs[1], pairs, (k,))
            return (there.recall_at_k[k] + back.recall_at_k[k]) / 2

        whole, out = recall(), {}
        order = np.random.default_rng(self.seed).permutation(len(features))
        other = np.empty_like(order)
        other[order] = np.roll(order, 1)  # one cycle: no clip keeps its own
        for name in features.parts:
            changed = features.exchanged(name, torch.from_numpy(other).to(inputs[which].device))
            given = (changed, None) if which == 0 else (None, changed)
            inputs[which] = Inputs(changed, self._start(*given)[which])
            out[name] = whole - recall()
        return out

    def _label_scores(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        """Probabilities [N, labels]."""
        network = self._network
        assert isinstance(network, LabelClassifier)
        return by_blocks(lambda part: torch.softmax(network.logits(part), 1), inputs)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the matcher to `folder`, made if missing: config.json, and parts-*/ with network.safetensors, space/,
        embedding_space/, text_encoder/, and encoder-*.safetensors with the weights of fine-tuned encoders that training
        changed.

        Streams and encoders given as specs are saved by them, fitted text encoders as they are; others are named only,
        and `load` asks for them, as they were before any fine-tuning. What the folder held before stays whole until the
        new matcher is.

        Raises:
            OSError: untouched.
            RuntimeError: not fitted.
        """
        self._check_fitted("save")
        storage_trained.save(self, folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, strict: bool = True, **options: Any) -> Self:
        """The matcher that `save` wrote.

        Args:
            folder: given to `save`.
            strict: refuse streams and encoders whose fingerprints are not those of the saved ones.
            **options: of the constructor, in place of the saved ones: `streams`, `text_encoder` and `image_encoder`
                where these were objects; `cache`, `workers`, `batch_size`, `device`, `progress`.

        Raises:
            OSError: a file is missing.
            ValueError: not a saved matcher, an encoder that has to be passed, or one that differs.
            TypeError: an option that is none of these.
        """
        return storage_trained.load(cls, folder, options, strict=strict)  # type: ignore[return-value]


def trial_rows(first: int, second: int, dim: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Rows [first, dim] and [second, dim] of noise."""
    random = np.random.default_rng(0)
    return tuple(random.standard_normal((count, dim), dtype=np.float32) for count in (first, second))  # type: ignore[return-value]


def check_folder(function: str, **paths: str | os.PathLike[str] | None) -> None:
    """Raise TypeError for a path that is none, before any long work."""
    for name, path in paths.items():
        if path is not None and not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"{function}: {name} must be a path or None, got {type(path).__name__}")


def check_validation(function: str, validation: Any) -> None:
    """Raise ValueError for what is no form of a validation, before any long work; the folds are counted later."""
    pair = isinstance(validation, tuple) and len(validation) == 2
    share = isinstance(validation, float) and 0 < validation < 1
    folds = isinstance(validation, (int, np.integer)) and not isinstance(validation, bool)
    if validation is not None and not (pair or share or folds):
        got = repr(validation) if isinstance(validation, (int, float, str)) else f"a {type(validation).__name__}"
        got += f" of {len(validation)}" if isinstance(validation, tuple) else ""
        raise ValueError(
            f"{function}: validation must be a share in (0, 1), a number of folds, (items, others) or None, got {got}"
        )


def check_unlabelled(function: str, unlabelled: Any, threshold: float | None) -> None:
    """Raise ValueError where one of the two is given without the other."""
    if (unlabelled is None) != (threshold is None):
        raise ValueError(f"{function}: unlabelled and threshold go together")
