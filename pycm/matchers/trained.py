"""`TrainedMatcher`: what the matchers with a network share, from inputs to fitted weights and scores."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .._temporal_layers import CELLS, POOLS, STATE_POOLS
from ..encoders.base import check_batch_size
from ..evaluate import RetrievalMetrics, retrieval_metrics
from ..functional import DISTANCES, METRICS, Matches, similarity, topk
from ..spaces import Ridge
from . import storage_trained
from .base import Head, Matcher
from .features import CacheOption, as_cache
from .heads import LOSSES, LabelClassifier, Ranking, make_criterion
from .inputs import Features, Inputs, Streams
from .linear_start import fit_start, groups_of, start_rows
from .networks import device_of, make_network
from .scoring import PairScorer, pair_matches, pair_matrix, ranked_matrices
from .sides import ClipSide, Encoded, Options
from .training import Record, Training, Validation, train

if TYPE_CHECKING:
    from typing_extensions import Self

_EMBED_ROWS = 512
Int64 = npt.NDArray[np.int64]


class Known(NamedTuple):
    """Inputs of both sides with what is known of them: pairs [P, 2] of rows, and each row's group."""

    first: Inputs
    second: Inputs
    pairs: Int64
    first_group: Int64
    second_group: Int64

    def take(self, rows: Int64) -> Known:
        """Those first rows with the second rows that belong to them."""
        chosen = np.isin(self.pairs[:, 0], rows)
        seconds = np.unique(self.pairs[chosen, 1])
        place = np.full(len(self.first_group), -1, np.int64)
        place[rows] = np.arange(len(rows))
        pairs = np.stack([place[self.pairs[chosen, 0]], np.searchsorted(seconds, self.pairs[chosen, 1])], 1)
        return Known(
            self.first.take(rows), self.second.take(seconds), pairs, self.first_group[rows], self.second_group[seconds]
        )


class TrainedMatcher(Matcher):
    """Base of the matchers that learn a network; a subclass names its sides and its public methods."""

    head: Head
    space: Ridge | None
    _sides: tuple[Any, Any]

    def _set_options(
        self, *, cell: Any, pool: Any, hidden: int, dim: int, bidirectional: bool, dropout: float, head: Any,
        metric: Any, loss: Any, space: Any, candidates: int | None, cache: CacheOption, workers: int | None,
        batch_size: int, seed: int, device: Any, progress: bool | None,
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
        if not 0 <= dropout < 1:
            raise ValueError(f"{name}: dropout must be in [0, 1), got {dropout!r}")
        if space is not None and not isinstance(space, Ridge):
            raise TypeError(f"{name}: space must be a Ridge or None, got {type(space).__name__}")
        if space is not None and head == "labels":
            raise ValueError(f"{name}: space must be None for head='labels', got {space!r}")
        check_batch_size(name, batch_size)
        self.cell, self.pool, self.hidden, self.dim = cell, pool, int(hidden), int(dim)
        self.bidirectional, self.dropout, self.head = bool(bidirectional), float(dropout), head
        self.metric, self.loss, self.space, self.candidates = metric, loss, space, candidates
        self.cache, self.workers, self.batch_size = cache, workers, batch_size
        self._cache = as_cache(cache)
        self.seed, self.device, self.progress = seed, device, progress
        self._network: nn.Module | None = None
        self._about: dict[str, Any] = {}
        self.labels_: list[Any] = []
        self.history_: list[Record] = []

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments by name, as scikit-learn's `clone` takes them."""
        return {
            name: getattr(self, name) for name in inspect.signature(type(self).__init__).parameters if name != "self"
        }

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

    def _options(self) -> Options:
        return Options(self._cache, self.workers, self.batch_size, self.progress, device_of(self.device))

    def _check_fitted(self, method: str, *heads: Head) -> None:
        name = f"{type(self).__name__}.{method}"
        if heads and self.head not in heads:
            raise ValueError(f"{name}: needs head={' or '.join(map(repr, heads))}, this matcher has {self.head!r}")
        if self._network is None:
            raise RuntimeError(f"{name}: not fitted, call fit first")

    # -- learning --

    def _learn(
        self,
        function: str,
        first: Features,
        second: Features,
        pairs: Int64,
        validation: float | tuple[Features, Features, Int64] | None,
        training: Training,
        **files: Any,
    ) -> None:
        """Fit the linear start and the network to pairs [P, 2] of rows of both sides."""
        sides = self._sides
        starts: tuple[Tensor | None, Tensor | None] = (None, None)
        device = device_of(self.device)
        dim = self.dim
        if self.space is not None:
            rows = sides[0].start_rows(first), sides[1].start_rows(second)
            outside = fit_start(self.space, *rows, pairs, self.seed)
            inside = self.space.transform_texts(rows[1])
            dim = inside.shape[1]
            left, right = (torch.from_numpy(start_rows(x, self.metric)).to(device) for x in (outside, inside))
            starts = left, right
        groups = groups_of(pairs, len(first), len(second))
        known = Known(Inputs(first, starts[0]), Inputs(second, starts[1]), pairs, *np.split(groups, [len(first)]))
        held: Known | None = None
        if isinstance(validation, tuple):
            a, b, between = validation
            groups = groups_of(between, len(a), len(b))
            begin = self._start(a, b)
            held = Known(Inputs(a, begin[0]), Inputs(b, begin[1]), between, *np.split(groups, [len(a)]))
        elif validation:
            mine, theirs = split(function, len(first), validation, self.seed)
            known, held = known.take(mine), known.take(theirs)
        about = {
            "head": self.head,
            "dim": dim,
            "first": sides[0].tower(first),
            "second": sides[1].tower(second),
            "linear": self.space is not None,
            "unit": self.metric in DISTANCES,
            "options": self._network_options(),
        }
        network = self._new_network(about, training)
        network.fit_scales(known.first.features, known.second.features)

        def loss(rows: Int64, done: float) -> Tensor:
            batch = known.pairs[rows]
            a, i = np.unique(batch[:, 0], return_inverse=True)
            b, j = np.unique(batch[:, 1], return_inverse=True)
            groups = torch.from_numpy(known.first_group[batch[:, 0]]).to(device)
            index = torch.from_numpy(np.stack([i, j], 1)).to(device)
            return network(known.first.take(a), known.second.take(b), index, groups, done)  # type: ignore[no-any-return]

        check = None if held is None else lambda: self._validate_ranking(network, held)
        data = [known.first, known.second, *([] if held is None else [held.first, held.second])]
        arrays = [known.pairs, known.first_group, *([] if held is None else [held.pairs])]
        identity = self._identity(about, training, data, arrays)
        self.history_ = train(
            network, loss, check, len(known.pairs), training, seed=self.seed, identity=identity,
            progress=self.progress, **files,
        )  # fmt: skip
        self._network, self._about = network, about

    def _learn_labels(
        self, function: str, features: Features, labels: Int64, validation: Any, training: Training, **files: Any
    ) -> None:
        """Fit the classifier of labels [N] of the first side's items, indices into `labels_`."""
        side = self._sides[0]
        device = device_of(self.device)
        inputs = Inputs(features)
        held: tuple[Inputs, Tensor] | None = None
        if isinstance(validation, tuple):
            held = Inputs(validation[0]), torch.from_numpy(validation[1]).to(device)
        elif validation:
            mine, theirs = split(function, len(inputs), validation, self.seed)
            held = inputs.take(theirs), torch.from_numpy(labels[theirs]).to(device)
            inputs, labels = inputs.take(mine), labels[mine]
        truth = torch.from_numpy(labels).to(device)
        about = {
            "head": "labels", "dim": self.dim, "first": side.tower(features), "labels": len(self.labels_),
            "linear": False, "unit": False, "options": self._network_options(),
        }  # fmt: skip
        network = self._new_network(about, training)
        network.fit_scales(inputs.features)

        def check() -> Validation:
            assert held is not None
            scores = network.logits(held[0])
            right = float((scores.argmax(1) == held[1]).double().mean())
            loss = float(nn.functional.cross_entropy(scores, held[1]))
            return Validation((right, -loss), {"validation loss": loss, "accuracy": right})

        data, arrays = [inputs, *([] if held is None else held[:1])], [labels]
        self.history_ = train(
            network, lambda rows, done: network(inputs.take(rows), truth[torch.from_numpy(rows).to(device)]),
            None if held is None else check, len(inputs), training, seed=self.seed,
            identity=self._identity(about, training, data, arrays), progress=self.progress, **files,
        )  # fmt: skip
        self._network, self._about = network, about

    def _network_options(self) -> dict[str, Any]:
        names = ("cell", "pool", "hidden", "bidirectional", "dropout")
        return {name: getattr(self, name) for name in names}

    def _new_network(self, about: Mapping[str, Any], training: Training) -> Any:
        """A network with fresh weights, drawn from `seed` alone."""
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed)
            network = make_network(about, make_criterion(self.loss, self.metric))
        return network.to(device_of(self.device))

    def _identity(
        self, about: Mapping[str, Any], training: Training, data: Sequence[Inputs], arrays: Sequence[Any]
    ) -> str:
        """A digest of all that the outcome of a training depends on."""
        digest = hashlib.sha256()
        plain = {"about": about, "training": asdict(training), "seed": self.seed, "metric": self.metric}
        digest.update(json.dumps({**plain, "loss": repr(self.loss)}, sort_keys=True, default=str).encode())
        for inputs in data:
            digest.update(inputs.digest())
        for array in arrays:
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def _validate_ranking(self, network: Ranking, held: Known) -> Validation:
        """Mean reciprocal rank, both ways, is what is compared: recall of a few items hardly moves."""
        there, again = self._metrics(
            network, held.first, held.second, members(held.first_group, held.second_group),
            members(held.second_group, held.first_group), (1, 5),
        )  # fmt: skip
        figures = {
            f"recall@{k}": (there.recall_at_k[k] + again.recall_at_k[k]) / 2 for k in (1, 5)
        } | {"mrr": (there.mrr + again.mrr) / 2}  # fmt: skip
        return Validation((figures["mrr"],), figures)

    # -- using what was learned --

    def _start(self, first: Features | None, second: Features | None) -> list[Tensor | None]:
        """The linear start of each side's items; None where there is no space."""
        out: list[Tensor | None] = [None, None]
        if self.space is not None:
            maps = self.space.transform_images, self.space.transform_texts
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
        """The embeddings [N, dim]."""
        network: Any = self._network
        return embed((network.first, network.second)[which], inputs)

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
        self, first: Inputs, second: Inputs, owner: Int64, ks: Sequence[int]
    ) -> tuple[RetrievalMetrics, RetrievalMetrics]:
        """Metrics both ways, where second row j belongs to first row owner[j]."""
        of = [np.flatnonzero(owner == row) for row in range(len(first))]
        return self._metrics(self._network, first, second, of, owner, ks)

    def _metrics(
        self, network: Any, first: Inputs, second: Inputs, of_first: Any, of_second: Any, ks: Sequence[int]
    ) -> tuple[RetrievalMetrics, RetrievalMetrics]:
        """Both ways, of the ranking that `match` gives."""
        a, b = embed(network.first, first), embed(network.second, second)
        there: Any = (a, b, self.metric)
        back: Any = (b, a, self.metric)
        if self.head == "pairs":
            there, back = ranked_matrices(network, first, second, a, b, self.metric, self.candidates)
        return retrieval_metrics(there, of_first, ks), retrieval_metrics(back, of_second, ks)

    def _exchanged(self, function: str, first: Encoded, second: Encoded, owner: Int64, k: int) -> dict[str, float]:
        """How much recall at k falls when a stream's rows change clips, for each stream."""
        inputs = list(self._inputs_of(function, first, second))
        which = next(i for i, side in enumerate(self._sides) if isinstance(side, ClipSide))
        features = inputs[which].features
        assert isinstance(features, Streams)

        def recall() -> float:
            there, back = self._recalls(inputs[0], inputs[1], owner, (k,))
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
        """Write the matcher to `folder`, made if missing: config.json, and parts-*/ with network.safetensors, space/
        and text_encoder/.

        Streams and encoders given as specs are saved by them, fitted text encoders as they are; others are named only,
        and `load` asks for them. What the folder held before stays whole until the new matcher is.

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
            **options: of the constructor, in place of the saved ones: `streams` and `text_encoder` where these
                were objects; `cache`, `workers`, `batch_size`, `device`, `progress`.

        Raises:
            OSError: a file is missing.
            ValueError: not a saved matcher, an encoder that has to be passed, or one that differs.
            TypeError: an option that does not exist.
        """
        return storage_trained.load(cls, folder, options, strict=strict)  # type: ignore[return-value]


def embed(side: nn.Module, inputs: Inputs) -> npt.NDArray[np.float32]:
    """What a side gives for all items, float32 [N, dim]."""
    return by_blocks(side, inputs)


def by_blocks(function: Any, inputs: Inputs) -> npt.NDArray[np.float32]:
    """`function` over blocks of items, without gradients."""
    out = []
    with torch.no_grad():
        for start in range(0, len(inputs), _EMBED_ROWS):
            rows = np.arange(start, min(start + _EMBED_ROWS, len(inputs)))
            out.append(function(inputs.take(rows)).float().cpu().numpy())
    return np.concatenate(out)


def members(queries: Int64, gallery: Int64) -> list[Int64]:
    """For each query's group, the gallery rows that are in it."""
    order = np.argsort(gallery, kind="stable")
    low, high = (np.searchsorted(gallery[order], queries, side=side) for side in ("left", "right"))
    return [order[a:b] for a, b in zip(low, high, strict=True)]


def split(function: str, count: int, share: float, seed: int) -> tuple[Int64, Int64]:
    """Rows to learn from and rows to validate on, both ascending."""
    if isinstance(share, bool) or not isinstance(share, float) or not 0 < share < 1:
        raise ValueError(f"{function}: validation must be a share in (0, 1), (items, others) or None, got {share!r}")
    held = max(2, round(share * count))
    if count - held < 2:
        raise ValueError(f"{function}: validation={share} of {count} items leaves fewer than 2 to learn from")
    order = np.random.default_rng([seed, 1]).permutation(count)
    return np.sort(order[held:]), np.sort(order[:held])


def check_folder(function: str, **paths: str | os.PathLike[str] | None) -> None:
    """Raise TypeError for a path that is none, before any long work."""
    for name, path in paths.items():
        if path is not None and not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"{function}: {name} must be a path or None, got {type(path).__name__}")


def check_once(function: str, what: str, items: Encoded) -> None:
    """Raise ValueError for an item that is given twice: its second row would be a wrong answer to its own match."""
    seen: dict[str, int] = {}
    for row, name in zip(items.kept, items.names, strict=True):
        if name in seen:
            advice = ", with a list of its texts" if what == "clips" else ""
            raise ValueError(
                f"{function}: {what}[{seen[name]}] and {what}[{row}] are both {name!r}; give each once{advice}"
            )
        seen[name] = int(row)
