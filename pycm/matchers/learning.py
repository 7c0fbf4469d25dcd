"""From data to a trained network: what is held out, what a batch's loss is, and how many epochs are best."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from ..encoders.module import TorchEncoder
from ..functional import Metric
from .heads import make_criterion
from .inputs import Inputs
from .known import Int64, KnownPairs, belonging
from .logs import open_log
from .networks import make_network
from .scoring import both_ways, embedded
from .towers import RowTower, SequenceTower
from .training import Record, Training, Validation, train
from .tuning import FineTuned, Tuning, before, read_ahead

if TYPE_CHECKING:
    from typing_extensions import Self

Files: TypeAlias = Mapping[str, Any]  # the checkpoint's folder and the log, or None


class Problem(Protocol):
    """Data to learn from or to validate on."""

    @property
    def items(self) -> int:
        """What can be held out: the items of the first side."""
        ...

    @property
    def count(self) -> int:
        """Rows of an epoch."""
        ...

    def take(self, items: Int64) -> Self:
        """To validate on."""
        ...

    def learned(self, items: Int64) -> Self:
        """To learn from, with what is never held out."""
        ...

    def encoded(self, encode: Callable[[Inputs], Inputs]) -> Self:
        """With other inputs."""
        ...

    def read_ahead(self, rows: Int64) -> None:
        """Begin to read what the loss of `rows` needs."""
        ...

    def fit_scales(self, network: Any) -> None: ...
    def loss(self, network: Any, rows: Int64, done: float) -> Tensor: ...
    def validate(self, network: Any, recipe: Recipe) -> Validation: ...
    def digest(self) -> bytes: ...


@dataclass(frozen=True)
class Recipe:
    """What a network is made and judged by, beside its configuration."""

    loss: str | nn.Module
    metric: Metric
    candidates: int | None
    seed: int
    device: torch.device
    progress: bool | None
    tuning: Tuning | None = None


@dataclass(frozen=True)
class Pairs:
    """Inputs of both sides, and pairs [P, 2] of rows that belong together."""

    first: Inputs
    second: Inputs
    pairs: Int64
    #: The last so many first rows are never held out: nobody has said what belongs to them.
    extra: int = 0

    @cached_property
    def known(self) -> KnownPairs:
        return KnownPairs(self.pairs)

    @property
    def items(self) -> int:
        return len(self.first) - self.extra

    @property
    def count(self) -> int:
        return len(self.pairs)

    def take(self, items: Int64) -> Pairs:
        """Those first rows with the second rows that belong to them.

        A second row that belongs to first rows here and there, a text that two clips share, is in both parts: learned
        from with the one clip, and to be found for the other.
        """
        chosen = np.isin(self.pairs[:, 0], items)
        seconds = np.unique(self.pairs[chosen, 1])
        place = np.full(len(self.first), -1, np.int64)
        place[items] = np.arange(len(items))
        pairs = np.stack([place[self.pairs[chosen, 0]], np.searchsorted(seconds, self.pairs[chosen, 1])], 1)
        return Pairs(self.first.take(items), self.second.take(seconds), pairs)

    def learned(self, items: Int64) -> Pairs:
        return self.take(np.concatenate([items, np.arange(self.items, len(self.first))]))

    def encoded(self, encode: Callable[[Inputs], Inputs]) -> Pairs:
        return replace(self, first=encode(self.first), second=encode(self.second))

    def read_ahead(self, rows: Int64) -> None:
        a, b = (np.unique(self.pairs[rows, side]) for side in (0, 1))
        read_ahead(self.first.take(a), self.second.take(b))

    def fit_scales(self, network: Any) -> None:
        network.fit_scales(self.first.features, self.second.features)

    def loss(self, network: Any, rows: Int64, done: float) -> Tensor:
        """An item that comes several times in a batch goes through its tower once."""
        batch = self.pairs[rows]
        a, i = np.unique(batch[:, 0], return_inverse=True)
        b, j = np.unique(batch[:, 1], return_inverse=True)
        places = np.stack([i, j], 1), self.known.within(batch[:, 0], batch[:, 1])
        index, ignored = (torch.from_numpy(part).to(self.first.device) for part in places)
        return network(self.first.take(a), self.second.take(b), index, ignored, done)  # type: ignore[no-any-return]

    def validate(self, network: Any, recipe: Recipe) -> Validation:
        """Mean reciprocal rank, both ways, is what is compared: recall of a few items hardly moves."""
        of_first, of_second = belonging(self.pairs, len(self.first), 0), belonging(self.pairs, len(self.second), 1)
        there, back = both_ways(
            network, self.first, self.second, *embedded(network, self.first, self.second), of_first, of_second,
            (1, 5), recipe.metric, recipe.candidates,
        )  # fmt: skip
        figures = {f"recall@{k}": (there.recall_at_k[k] + back.recall_at_k[k]) / 2 for k in (1, 5)}
        figures["mrr"] = (there.mrr + back.mrr) / 2
        return Validation((figures["mrr"],), figures)

    def digest(self) -> bytes:
        return b"".join([self.first.digest(), self.second.digest(), self.pairs.tobytes()])


@dataclass(frozen=True)
class Labels:
    """Inputs and the label [N] of each, a row of the list of labels."""

    inputs: Inputs
    labels: Int64
    smoothing: float = 0.0

    @property
    def items(self) -> int:
        return len(self.inputs)

    count = items

    def take(self, items: Int64) -> Labels:
        return Labels(self.inputs.take(items), self.labels[items], self.smoothing)

    learned = take

    def encoded(self, encode: Callable[[Inputs], Inputs]) -> Labels:
        return replace(self, inputs=encode(self.inputs))

    def read_ahead(self, rows: Int64) -> None:
        read_ahead(self.inputs.take(np.unique(rows)))

    def fit_scales(self, network: Any) -> None:
        network.fit_scales(self.inputs.features)

    def loss(self, network: Any, rows: Int64, done: float) -> Tensor:
        truth = torch.from_numpy(self.labels[rows]).to(self.inputs.device)
        return network(self.inputs.take(rows), truth, self.smoothing)  # type: ignore[no-any-return]

    def validate(self, network: Any, recipe: Recipe) -> Validation:
        """Accuracy; where it is the same, the loss."""
        truth = torch.from_numpy(self.labels).to(self.inputs.device)
        scores = network.logits(self.inputs)
        right = float((scores.argmax(1) == truth).double().mean())
        loss = float(nn.functional.cross_entropy(scores, truth))
        return Validation((right, -loss), {"validation loss": loss, "accuracy": right})

    def digest(self) -> bytes:
        return self.inputs.digest() + self.labels.tobytes()


class Learned(NamedTuple):
    """A trained network, its history, the trained copies of encoders by the ids of these, and what encodes by them."""

    network: nn.Module
    history: list[Record]
    tuned: dict[int, TorchEncoder]
    encode: Callable[[Inputs], Inputs]


def learn(
    function: str,
    recipe: Recipe,
    about: Mapping[str, Any],
    problem: Problem,
    validation: float | int | Problem | None,
    training: Training,
    files: Files,
) -> Learned:
    """Train the network of the configuration `about`, and the encoders of `recipe.tuning`.

    Args:
        validation: a share of the items to hold out; a number of folds; other data; None.

    Raises ValueError for a validation that leaves too little, and as `train`.
    """
    if validation is None:
        return _train(recipe, about, problem, None, training, files)
    if isinstance(validation, float):
        mine, theirs = split(function, problem.items, validation, recipe.seed)
        return _train(recipe, about, problem.learned(mine), problem.take(theirs), training, files)
    if isinstance(validation, (int, np.integer)):
        most = problem.items // 2
        if not 2 <= validation <= most:
            raise ValueError(
                f"{function}: validation must be in [2, {most}] folds for {problem.items} items, got {validation}"
            )
        return _by_folds(recipe, about, problem, int(validation), training, files)
    return _train(recipe, about, problem, validation, training, files)


def _train(
    recipe: Recipe,
    about: Mapping[str, Any],
    problem: Problem,
    held: Problem | None,
    training: Training,
    files: Files,
    stop: int | None = None,
) -> Learned:
    """One training, with early stopping on `held`."""
    with torch.random.fork_rng([]):  # weights are drawn from the seed alone, on the CPU
        torch.default_generator.manual_seed(recipe.seed)
        network: Any = make_network(about, make_criterion(recipe.loss, recipe.metric))
    network.to(recipe.device)
    problem.encoded(before).fit_scales(network)
    tuned: FineTuned | None = None
    if recipe.tuning is not None:
        _loosen(network, recipe.tuning.names)
        tuned = FineTuned(network, recipe.tuning)
    training = training.on(linear=about["linear"])
    encode = before if tuned is None else tuned.encoded
    whole: Any = tuned or network
    # Only a checkpoint needs it, and it may read all items' files.
    identity = "" if files["checkpoint"] is None else _identity(recipe, about, training, stop, (problem, held))
    history = train(
        whole, lambda rows, done: problem.loss(whole, rows, done),
        None if held is None else lambda: held.encoded(encode).validate(network, recipe), problem.count, training,
        seed=recipe.seed, identity=identity, checkpoint=files["checkpoint"], log=files["log"],
        progress=recipe.progress, stop=stop, encoders=None if tuned is None else tuned.encoders,
        ahead=None if tuned is None else problem.read_ahead,
    )  # fmt: skip
    return Learned(network, history, {} if tuned is None else tuned.finished(), encode)


def _identity(
    recipe: Recipe, about: Mapping[str, Any], training: Training, stop: int | None, data: Sequence[Problem | None]
) -> str:
    """A digest of all that the outcome depends on."""
    plain = {
        "about": about, "training": training.plain(tuned=recipe.tuning is not None), "seed": recipe.seed,
        "metric": recipe.metric, "stop": stop, "loss": repr(recipe.loss),
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for one in data:
        digest.update(b"" if one is None else one.digest())
    return digest.hexdigest()


def _loosen(network: nn.Module, names: Collection[str]) -> None:
    """The scales of features that trained encoders make."""
    for module in network.modules():
        if isinstance(module, SequenceTower):
            for name, stream in zip(module.names, module.streams, strict=True):
                if name in names:
                    stream.standardize.loosen()  # type: ignore[union-attr, operator]
        elif isinstance(module, RowTower) and "text" in names:
            module.standardize.loosen()


def _by_folds(
    recipe: Recipe, about: Mapping[str, Any], problem: Problem, folds: int, training: Training, files: Files
) -> Learned:
    """As many epochs as are best on average over `folds` held out in turn, on all of the data.

    The history is the folds' mean. The log has each fold's records as they come, then the means, without "fold".
    Cost: folds + 1 trainings, the folds' without early stopping.
    """
    with open_log(files["log"], ()) as write:  # what is wrong with it is told before any training
        fold_of = np.random.default_rng([recipe.seed, 1]).permutation(problem.items) % folds
        folder, whole = files["checkpoint"], replace(training, patience=None)
        found = []
        for fold in range(folds):
            mine = problem.learned(np.flatnonzero(fold_of != fold))
            theirs = problem.take(np.flatnonzero(fold_of == fold))

            def write_fold(record: Mapping[str, float], fold: int = fold) -> None:
                write({"fold": fold, **record})

            own: dict[str, Any] = {"checkpoint": None if folder is None else Path(folder, f"fold-{fold}")}
            found.append(_train(recipe, about, mine, theirs, whole, {**own, "log": write_fold}).history)
        mean = [
            {name: float(np.mean([record[name] for record in records])) for name in records[0]}
            for records in zip(*found, strict=True)
        ]
        best = int(np.argmax([record["mrr" if "mrr" in record else "accuracy"] for record in mean]))
        for record in mean:
            write(record)
        learned = _train(recipe, about, problem, None, whole, {**files, "log": None}, stop=best)
        return learned._replace(history=mean)


def split(function: str, count: int, share: float, seed: int) -> tuple[Int64, Int64]:
    """Rows to learn from and rows to validate on, both ascending; ValueError where `share` leaves too few."""
    held = max(2, round(share * count))
    if count - held < 2:
        raise ValueError(f"{function}: validation={share} of {count} items leaves fewer than 2 to learn from")
    order = np.random.default_rng([seed, 1]).permutation(count)
    return np.sort(order[held:]), np.sort(order[:held])
