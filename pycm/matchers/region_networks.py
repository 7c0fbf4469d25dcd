"""Networks over regions and words: a common space for fine-grained scores, and a classifier of pairs."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ..late_interaction import maxsim, xattn_score
from .heads import set_negatives
from .inputs import Steps
from .towers import Standardize, mlp

Score: TypeAlias = Literal["maxsim", "cross-attention"]
_COLUMNS = 64  # standardised at a time


class Projection(nn.Module):
    """Vectors, standardised, by one linear map."""

    def __init__(self, inputs: int, dim: int) -> None:
        super().__init__()
        self.standardize = Standardize(inputs)
        self.linear = nn.Linear(inputs, dim)

    def forward(self, steps: Steps) -> Tensor:
        return self.linear(self.standardize(steps.values))  # type: ignore[no-any-return]


class RegionRanking(nn.Module):
    """Regions and words in one space, where an image's score with a text is MaxSim or cross attention.

    MaxSim: the mean over the words of each one's best cosine with a region. Cross attention: SCAN's, words to regions.
    """

    def __init__(self, regions: int, words: int, dim: int, score: Score, criterion: nn.Module) -> None:
        super().__init__()
        self.regions, self.words = Projection(regions, dim), Projection(words, dim)
        self.score, self.criterion = score, criterion

    def fit_scales(self, regions: Steps, words: Steps) -> None:
        """Standardise by the training data."""
        self.regions.standardize.fit(regions.values)
        self.words.standardize.fit(words.values)

    def scores(self, regions: Steps, words: Steps) -> Tensor:
        """[images, texts]."""
        images = self.regions(regions).float(), regions.cu_seqlens
        texts = self.words(words).float(), words.cu_seqlens
        if self.score == "maxsim":
            return maxsim(texts, images, metric="cosine", reduce="mean").T  # type: ignore[no-any-return]
        unit = [(nn.functional.normalize(values), borders) for values, borders in (images, texts)]
        return xattn_score(*unit, aggregation="Mean")  # type: ignore[no-any-return]

    def forward(self, regions: Steps, words: Steps, pairs: Tensor, ignored: Tensor, done: float) -> Tensor:
        """The loss of pairs [P, 2] of rows; ignored and done as in `Ranking.forward`."""
        set_negatives(self.criterion, done)
        scores = self.scores(regions, words)[pairs[:, 0]][:, pairs[:, 1]]
        # Rows of scores against unit vectors: their dot products are the scores.
        return self.criterion(scores, torch.eye(len(pairs)).to(scores), ignored=ignored)  # type: ignore[no-any-return]


class RegionPairClassifier(nn.Module):
    """Whether a text is true of an image: each word attends to the regions, and what they find is pooled.

    Attention is a mean, and a mean cannot count: each word also sums the regions that pass its gate.
    """

    def __init__(self, regions: int, words: int, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.regions, self.words = Projection(regions, dim), Projection(words, dim)
        self.drop = nn.Dropout(dropout)
        self.attention = nn.MultiheadAttention(dim, heads, dropout, batch_first=True)
        self.ask = nn.Linear(dim, dim)
        self.found = mlp(4 * dim, dim, dim, dropout)
        self.head = mlp(2 * dim, dim, 1, dropout)

    def fit_scales(self, regions: Steps, words: Steps, pairs: Tensor) -> None:
        """Standardise by the training pairs [P, 2] of rows: an item counts as often as it is in them."""
        _fit_to_pairs(self.regions.standardize, regions, pairs[:, 0])
        _fit_to_pairs(self.words.standardize, words, pairs[:, 1])

    def forward(self, regions: Steps, words: Steps, pairs: Tensor) -> Tensor:
        """Logits [P] of pairs [P, 2] of rows."""
        regions, words = regions.take(pairs[:, 0]), words.take(pairs[:, 1])
        x, there = _padded(self.drop(self.regions(regions)), regions.cu_seqlens)
        y, said = _padded(self.drop(self.words(words)), words.cu_seqlens)
        seen, _ = self.attention(y, x, x, key_padding_mask=~there, need_weights=False)
        gates = torch.sigmoid(self.ask(y) @ x.mT / math.sqrt(x.shape[2])) * there[:, None]
        found = self.found(torch.cat([y, seen, y * seen, gates @ x], 2))
        mean = (found * said[..., None]).sum(1) / said.sum(1, keepdim=True)
        largest = found.masked_fill(~said[..., None], -math.inf).amax(1)
        return self.head(torch.cat([mean, largest], 1))[:, 0].float()  # type: ignore[no-any-return]


def _fit_to_pairs(standardize: Standardize, steps: Steps, rows: Tensor) -> None:
    """Some features at a time: what is held of the steps of all `rows` is a fraction of those of the items."""
    for columns in torch.split(torch.arange(steps.values.shape[1], device=rows.device), _COLUMNS):
        part = Standardize(len(columns)).to(rows.device)
        part.fit(Steps(steps.values[:, columns], steps.cu_seqlens, steps.present).take(rows).values)
        standardize.mean[columns], standardize.scale[columns] = part.mean, part.scale


def _padded(values: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """[N, T, D] with zeros beyond each item, and where there is something, bool [N, T]."""
    counts = cu_seqlens.diff()
    there: Any = torch.arange(int(counts.max()), device=values.device) < counts[:, None]
    padded = values.new_zeros((*there.shape, values.shape[1]))
    padded[there] = values
    return padded, there
