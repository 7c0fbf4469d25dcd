"""The two sides' networks: each turns its items into vectors of one size.

`SequenceTower`: per stream standardised steps -> projection -> LSTM or GRU with its pool -> concatenation -> MLP.
`WordTower`: word vectors -> bidirectional GRU -> MLP. `RowTower`: one vector -> MLP.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._temporal_layers import Cell, Pool
from ..nn import GPO, AttentionPool, TemporalPool
from ..temporal import pool_states
from .inputs import Inputs, Rows, Steps, Streams

_STEPS = 1 << 14  # projected at a time


class Standardize(nn.Module):
    """(x - mean) / std by the training data's figures; a feature that never varies there becomes 0."""

    mean: Tensor
    scale: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    def fit(self, x: Tensor) -> None:
        """Take the figures of rows [N, D]."""
        x = x.double()
        mean, std = x.mean(0), x.std(0, correction=0)
        still = std <= 1e-6 * x.abs().amax(0)  # rounding around a constant
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(still, 0.0, 1 / torch.where(still, 1.0, std)))

    def loosen(self) -> None:
        """For features of an encoder that is trained: what hardly varies now may vary then, so that no feature counts
        as nothing, and none is enlarged to more than ten times what all have in the mean."""
        std = torch.where(self.scale > 0, 1 / self.scale, 0.0)
        floor = 0.1 * std.square().mean().sqrt()
        self.scale.copy_(1 / torch.where(floor > 0, torch.maximum(std, floor), 1.0))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) * self.scale


def mlp(inputs: int, hidden: int, outputs: int, dropout: float, *, zero: bool = False) -> nn.Sequential:
    """Two layers. With `zero` the last one starts at 0: the network begins by saying nothing."""
    last = nn.Linear(hidden, outputs)
    if zero:
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return nn.Sequential(
        nn.Dropout(dropout), nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Dropout(dropout), last
    )


class StatePool(nn.Module):
    """The pools without a cell: steps in any order to one vector."""

    def __init__(self, features: int, pool: Pool) -> None:
        super().__init__()
        self.pool = pool
        self.weighted: AttentionPool | GPO | None = None
        if pool == "attention":
            self.weighted = AttentionPool(features)
        elif pool == "gpo":
            self.weighted = GPO()
        self.output_size = features * (2 if pool == "meanmax" else 1)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        if self.weighted is not None:
            return self.weighted(x, cu_seqlens=cu_seqlens)  # type: ignore[no-any-return]
        return pool_states(x, None, self.pool, cu_seqlens=cu_seqlens)  # type: ignore[no-any-return]


class StreamPool(nn.Module):
    """One stream's steps to one vector of `output_size`; 0 where the clip lacks the stream."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        cell: Cell | None,
        pool: Pool,
        dropout: float,
        *,
        bidirectional: bool,
        input_dropout: float = 0.0,
        extra: int = 0,
    ) -> None:
        super().__init__()
        self.standardize = Standardize(dim)
        self.dropout = nn.Dropout(input_dropout)
        self.project = nn.Sequential(nn.Linear(dim, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Dropout(dropout))
        self.pool: TemporalPool | StatePool
        if cell is None:
            self.pool = StatePool(hidden, pool)
        else:
            self.pool = TemporalPool(hidden + extra, hidden, cell, pool, bidirectional=bidirectional)
        self.output_size = self.pool.output_size

    def projected(self, steps: Steps) -> Steps:
        """What the cell reads of each step, [S, hidden]."""
        values = [self.project(self.dropout(self.standardize(block))) for block in torch.split(steps.values, _STEPS)]
        return Steps(torch.cat(values), steps.cu_seqlens, steps.present)

    def forward(self, steps: Steps) -> Tensor:
        """[N, output_size]."""
        return self.pooled(self.projected(steps))

    def pooled(self, steps: Steps, *, h0: Tensor | None = None, joined: Tensor | None = None) -> Tensor:
        """Of projected steps; h0 [N, hidden] opens the cell, `joined` [N, extra] is appended to each step."""
        x = steps.values
        if joined is not None:
            x = torch.cat([x, torch.repeat_interleave(joined, steps.cu_seqlens.diff(), 0).to(x.dtype)], 1)
        if isinstance(self.pool, StatePool):
            pooled = self.pool(x, steps.cu_seqlens)
        else:
            directions = 2 if self.pool.bidirectional else 1
            hx = None if h0 is None else h0.to(x.dtype)[None].expand(directions, -1, -1).contiguous()
            pooled = self.pool(x, hx=hx, cu_seqlens=steps.cu_seqlens)
        return pooled * steps.present[:, None]  # type: ignore[no-any-return]


class SequenceTower(nn.Module):
    """Streams of clips -> vectors [N, dim]."""

    def __init__(
        self,
        dims: Mapping[str, int],
        dim: int,
        *,
        hidden: int,
        cell: Cell | None,
        pool: Pool,
        bidirectional: bool,
        dropout: float,
        zero: bool,
        input_dropout: float = 0.0,
        extra: int = 0,
    ) -> None:
        super().__init__()
        self.names = list(dims)
        options: dict[str, Any] = {"bidirectional": bidirectional, "input_dropout": input_dropout, "extra": extra}
        self.streams = nn.ModuleList(StreamPool(d, hidden, cell, pool, dropout, **options) for d in dims.values())
        self.width: int = sum(stream.output_size for stream in self.streams)  # type: ignore[misc]
        self.mlp = mlp(self.width, hidden, dim, dropout, zero=zero)

    def fit_scales(self, features: Streams) -> None:
        """Standardise by the steps that are there."""
        for name, stream in zip(self.names, self.streams, strict=True):
            steps = features.steps(name)
            if not bool(steps.present.any()):
                raise ValueError(
                    f"stream {name!r} is in none of the {len(steps)} training clips; leave it out of streams"
                )
            stream.standardize.fit(steps.take(torch.nonzero(steps.present)[:, 0]).values)  # type: ignore[union-attr, operator]

    def projected(self, features: Streams) -> Streams:
        """What the cells read of each stream's steps: once an item, however often `read` reads it."""
        streams = zip(self.names, self.streams, strict=True)
        return Streams({name: stream.projected(features.steps(name)) for name, stream in streams})  # type: ignore[operator]

    def read(self, projected: Streams, **state: Tensor | None) -> Tensor:
        """[N, dim]; `state` as `StreamPool.pooled` takes it."""
        streams = zip(self.names, self.streams, strict=True)
        pooled = [stream.pooled(projected.steps(name), **state) for name, stream in streams]  # type: ignore[operator]
        return self.mlp(torch.cat(pooled, 1))  # type: ignore[no-any-return]

    def pooled(self, features: Streams) -> Tensor:
        """The pooled streams side by side, [N, width]."""
        return torch.cat(
            [stream(features.steps(name)) for name, stream in zip(self.names, self.streams, strict=True)], 1
        )

    def forward(self, features: Streams) -> Tensor:
        return self.mlp(self.pooled(features))  # type: ignore[no-any-return]


class WordTower(nn.Module):
    """Word ids -> vectors [N, dim], through a bidirectional GRU."""

    def __init__(self, words: int, dim: int, *, hidden: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, hidden)
        nn.init.normal_(self.embed.weight, std=0.1)
        self.dropout = nn.Dropout(dropout)
        self.pool = TemporalPool(hidden, hidden, "gru", "mean", bidirectional=True)
        self.mlp = mlp(self.pool.output_size, hidden, dim, dropout)

    def fit_scales(self, features: Steps) -> None:
        """Word vectors are learned: nothing to standardise."""

    def forward(self, features: Steps) -> Tensor:
        if self.training:
            pooled = self.pool(self.dropout(self.embed(features.values)), cu_seqlens=features.cu_seqlens)
        else:
            pooled = self.pool(features.values, cu_seqlens=features.cu_seqlens, embedding=self.embed.weight)
        return self.mlp(pooled)  # type: ignore[no-any-return]


class RowTower(nn.Module):
    """Rows -> vectors [N, dim]."""

    def __init__(self, inputs: int, dim: int, *, hidden: int, dropout: float, zero: bool) -> None:
        super().__init__()
        self.standardize = Standardize(inputs)
        self.mlp = mlp(inputs, hidden, dim, dropout, zero=zero)

    def fit_scales(self, features: Rows) -> None:
        """Standardise by these rows."""
        self.standardize.fit(features.values)

    def forward(self, features: Rows) -> Tensor:
        return self.mlp(self.standardize(features.values))  # type: ignore[no-any-return]


class Embedding(nn.Module):
    """A tower, added to the linear start where there is one; of unit length if `unit`."""

    def __init__(self, tower: nn.Module, unit: bool) -> None:
        super().__init__()
        self.tower, self.unit = tower, unit

    def forward(self, inputs: Inputs) -> Tensor:
        out: Tensor = self.tower(inputs.features)
        out = out if inputs.start is None else inputs.start + out
        return nn.functional.normalize(out) if self.unit else out
