"""Image and clip fused by a GRU: the classifier of `ImageVideoMatcher`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from .._temporal_layers import Pool
from .heads import PairClassifier, States
from .inputs import Features, Inputs, Streams
from .towers import SequenceTower

_ITEMS = 512  # images read at a time


class FusedClassifier(PairClassifier):
    """A GRU reads the clip knowing the image; what it says joins the embeddings in the pair's MLP.

    Args:
        first: the tower of images, an LSTM: its state is what the clip's GRU is told.
        dims: of the clip's streams.
        fusion: "h0": the image's state, through a linear layer and tanh, opens the GRU; "steps": it is joined to each
            step; or both.
        pool, bidirectional, input_dropout, dim, hidden, dropout: of the GRU and the MLP.

    Steps are projected once a clip. The GRU runs once a pair: O(T·hidden²) operations for each, T the clip's steps,
    where the embeddings cost O(dim).
    """

    def __init__(
        self,
        first: SequenceTower,
        second: SequenceTower,
        criterion: nn.Module,
        *,
        unit: bool,
        dims: Mapping[str, int],
        fusion: Sequence[str],
        pool: Pool,
        bidirectional: bool,
        input_dropout: float,
        dim: int,
        hidden: int,
        dropout: float,
    ) -> None:
        super().__init__(first, second, criterion, unit=unit, dim=dim, hidden=hidden, dropout=dropout, extra=hidden)
        told = first.width
        self.h0 = nn.Linear(told, hidden) if "h0" in fusion else None
        self.joined = "steps" in fusion
        self.fused = SequenceTower(
            dims, hidden, hidden=hidden, cell="gru", pool=pool, bidirectional=bidirectional, dropout=dropout,
            input_dropout=input_dropout, zero=False, extra=told if self.joined else 0,
        )  # fmt: skip

    def fit_scales(self, first: Features, second: Features) -> None:
        super().fit_scales(first, second)
        self.fused.fit_scales(cast(Streams, second))

    def states(self, first: Inputs, second: Inputs, a: Tensor, b: Tensor) -> tuple[States, States]:
        x, y = super().states(first, second, a, b)
        tower, images = cast(SequenceTower, self.first.tower), cast(Streams, first.features)
        blocks = torch.split(torch.arange(len(images), device=x.device), _ITEMS)
        image = torch.cat([tower.pooled(images.take(rows)) for rows in blocks])
        return (x, image), (y, self.fused.projected(cast(Streams, second.features)))

    def floats(self, second: States) -> int:
        y, clips = second
        streams = cast(Streams, clips)
        parts = [streams.steps(name) for name in streams.parts]
        longest = (int(s.cu_seqlens.diff().max()) * (s.values.shape[1] + self.fused.width) for s in parts)
        return super().floats(y) + sum(longest)

    def logits(self, first: States, second: States, i: Tensor, j: Tensor) -> Tensor:
        (x, image), (y, clips) = first, second
        told = image[i]
        h0 = None if self.h0 is None else torch.tanh(self.h0(told))
        fused = self.fused.read(clips.take(j), h0=h0, joined=told if self.joined else None)
        return self._logits(x[i], y[j], fused)
