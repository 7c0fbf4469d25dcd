"""What is learned on top of the two sides: a ranking embedding, a classifier of pairs, a classifier of labels."""

from __future__ import annotations

import copy
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..functional import Metric
from ..losses import InfoNCE, MaxHinge, SigmoidLoss, Triplet
from .inputs import Features, Inputs
from .towers import Embedding, mlp

#: The losses of the ranking embedding, by name.
LOSSES: dict[str, type[nn.Module]] = {
    "max_hinge": MaxHinge,
    "info_nce": InfoNCE,
    "sigmoid": SigmoidLoss,
    "triplet": Triplet,
}

_NEGATIVES = 4  # of each pair, for the pair classifier
_SUM_HINGE = 0.3  # the share of the training in which max-hinge counts all negatives


def make_criterion(loss: str | nn.Module, metric: Metric) -> nn.Module:
    """The loss of a name for a metric, or a copy of a module: its learned figures begin anew with each fit."""
    if isinstance(loss, nn.Module):
        return copy.deepcopy(loss)
    # Embeddings that distances rank have unit length, where the orders of distance and cosine are one.
    return LOSSES[loss](metric=metric if metric in ("dot", "pearson") else "cosine")


def set_negatives(criterion: nn.Module, done: float) -> None:
    """Max-hinge counts all negatives at first: the hardest alone collapse an untrained embedding to a point (Faghri et
    al. 2018). `done`: the share of the training that is behind."""
    if hasattr(criterion, "hardest"):
        criterion.hardest = done >= _SUM_HINGE  # type: ignore[assignment]


class Ranking(nn.Module):
    """Both sides in one space, where the metric ranks them."""

    def __init__(self, first: nn.Module, second: nn.Module, criterion: nn.Module, unit: bool) -> None:
        super().__init__()
        self.first, self.second = Embedding(first, unit), Embedding(second, unit)
        self.criterion = criterion

    def fit_scales(self, first: Features, second: Features) -> None:
        """Standardise by the features of the training items."""
        self.first.tower.fit_scales(first)  # type: ignore[operator]
        self.second.tower.fit_scales(second)  # type: ignore[operator]

    def forward(self, first: Inputs, second: Inputs, pairs: Tensor, ignored: Tensor, done: float) -> Tensor:
        """The loss of pairs [P, 2] of rows of both inputs.

        Args:
            ignored: int64 [E, 2], as in `pycm.losses`: which of the pairs' scores are no negatives.
            done: the share of the training that is behind, in [0, 1).
        """
        return self._ranking_loss(self.first(first).float(), self.second(second).float(), pairs, ignored, done)

    def _ranking_loss(self, a: Tensor, b: Tensor, pairs: Tensor, ignored: Tensor, done: float) -> Tensor:
        set_negatives(self.criterion, done)
        return self.criterion(a[pairs[:, 0]], b[pairs[:, 1]], ignored=ignored)  # type: ignore[no-any-return]


#: What a pair classifier keeps of one side's items, so that N + M of them serve N x M pairs.
States: TypeAlias = Any


class PairClassifier(Ranking):
    """The ranking embedding, and a classifier of pairs.

    The log-odds of a pair are ``scale · cosine + bias``, to which an MLP on [a, b, a * b, |a - b|] adds. The MLP begins
    with nothing: the classifier starts from the order that the embeddings give.

    Args:
        unit: embeddings of unit length.
        dim, hidden, dropout: of the embeddings and the MLP.
        extra: features of a pair beside those of its embeddings; see `ImageVideoMatcher`.
    """

    def __init__(
        self,
        first: nn.Module,
        second: nn.Module,
        criterion: nn.Module,
        *,
        unit: bool,
        dim: int,
        hidden: int,
        dropout: float,
        extra: int = 0,
    ) -> None:
        super().__init__(first, second, criterion, unit)
        self.scale, self.bias = nn.Parameter(torch.tensor(10.0)), nn.Parameter(torch.tensor(-5.0))
        self.head = mlp(4 * dim + extra, hidden, 1, dropout, zero=True)

    def states(self, first: Inputs, second: Inputs, a: Tensor, b: Tensor) -> tuple[States, States]:
        """What `logits` reads, from both sides' inputs and embeddings."""
        return nn.functional.normalize(a), nn.functional.normalize(b)

    def floats(self, second: States) -> int:
        """How many numbers, about, `logits` holds for a pair."""
        return 4 * second.shape[1]  # type: ignore[no-any-return]

    def logits(self, first: States, second: States, i: Tensor, j: Tensor) -> Tensor:
        """[P] for the pairs (i[p], j[p])."""
        return self._logits(first[i], second[j])

    def _logits(self, x: Tensor, y: Tensor, *extra: Tensor) -> Tensor:
        found: Tensor = self.head(torch.cat([x, y, x * y, (x - y).abs(), *extra], 1))[:, 0].float()
        return self.scale * (x * y).sum(1).float() + self.bias + found

    def forward(self, first: Inputs, second: Inputs, pairs: Tensor, ignored: Tensor, done: float) -> Tensor:
        a, b = self.first(first), self.second(second)
        ranking = self._ranking_loss(a.float(), b.float(), pairs, ignored, done)
        left, right = self.states(first, second, a, b)
        x, y = nn.functional.normalize(a.detach().float()), nn.functional.normalize(b.detach().float())
        negatives = _negatives(x[pairs[:, 0]] @ y[pairs[:, 1]].T, ignored)
        chosen = torch.cat([torch.arange(len(pairs), device=pairs.device).repeat(2, 1).T, negatives])
        logits = self.logits(left, right, pairs[chosen[:, 0], 0], pairs[chosen[:, 1], 1])
        truth = torch.zeros_like(logits)
        truth[: len(pairs)] = 1
        weight = logits.new_tensor(max(len(negatives), 1) / len(pairs))  # both answers count alike
        return ranking + nn.functional.binary_cross_entropy_with_logits(logits, truth, pos_weight=weight)


def _negatives(scores: Tensor, ignored: Tensor) -> Tensor:
    """Places [K, 2] of non-pairs among the scores [P, P] of a batch: half the hardest, half as the batch has them."""
    n = len(scores)
    allowed = ~torch.eye(n, dtype=torch.bool, device=scores.device)
    allowed[ignored[:, 0], ignored[:, 1]] = False
    count = min(_NEGATIVES // 2, n - 1)
    hardest = torch.where(allowed, scores, -torch.inf).topk(count, dim=1).indices
    rows = torch.arange(n, device=scores.device)[:, None]
    shifted = (rows + 1 + torch.arange(count, device=scores.device)) % n
    found = torch.stack([rows.expand(-1, 2 * count), torch.cat([hardest, shifted], 1)], 2).reshape(-1, 2)
    return found[allowed[found[:, 0], found[:, 1]]]


class LabelClassifier(nn.Module):
    """One side's tower and a linear layer: which label an item has."""

    def __init__(self, tower: nn.Module, dim: int, labels: int, dropout: float) -> None:
        super().__init__()
        self.first = Embedding(tower, unit=False)
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(dim, labels))

    def fit_scales(self, features: Features) -> None:
        """Standardise by the features of the training items."""
        self.first.tower.fit_scales(features)  # type: ignore[operator]

    def logits(self, inputs: Inputs) -> Tensor:
        """[N, labels]."""
        return self.head(self.first(inputs)).float()  # type: ignore[no-any-return]

    def forward(self, inputs: Inputs, labels: Tensor, smoothing: float) -> Tensor:
        """The cross entropy of labels int64 [N], of whose certainty `smoothing` is spread over all labels."""
        return nn.functional.cross_entropy(self.logits(inputs), labels, label_smoothing=smoothing)
