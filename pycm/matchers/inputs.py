"""What the networks take, on a device: rows, ragged steps, and the streams of clips. None is ever padded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from .._optional import require

require("torch", "torch", "pycm.matchers")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

if TYPE_CHECKING:
    from .tuning import Source


@dataclass(frozen=True)
class Rows:
    """One vector an item: [N, D]."""

    values: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def take(self, rows: Tensor) -> Rows:
        return Rows(self.values[rows])


@dataclass(frozen=True)
class Steps:
    """Sequences one after another: steps [S, D] (or word ids [S]), cu_seqlens int64 [N + 1], present bool [N]."""

    values: Tensor
    cu_seqlens: Tensor
    present: Tensor

    def __len__(self) -> int:
        return len(self.present)

    def take(self, rows: Tensor) -> Steps:
        starts, lengths = self.cu_seqlens[rows], self.cu_seqlens[rows + 1] - self.cu_seqlens[rows]
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        steps = torch.arange(int(cu_seqlens[-1]), device=rows.device)
        steps = steps + torch.repeat_interleave(starts - cu_seqlens[:-1], lengths)
        return Steps(self.values[steps], cu_seqlens, self.present[rows])

    def means(self) -> Tensor:
        """The mean step of each sequence, [N, D], summed in fp64."""
        lengths = self.cu_seqlens.diff()
        of = torch.repeat_interleave(torch.arange(len(self), device=self.values.device), lengths)
        sums = torch.zeros(len(self), self.values.shape[1], dtype=torch.float64, device=self.values.device)
        sums.index_add_(0, of, self.values.double())
        return sums / lengths.clamp(min=1)[:, None]


@dataclass(frozen=True)
class Live:
    """Items by number, int64 [N], whose features an encoder makes that is trained with the network.

    Attributes:
        source: of the encoder's inputs; see `tuning.Source`.
        before: the features of all items of the source, by the encoder as it was given.
        finish: (encoded rows [S, dim], int64 [N] how many each item has, ids) -> features.
    """

    ids: Tensor
    source: Source
    before: Rows | Steps
    finish: Callable[[Tensor, Tensor, Tensor], Rows | Steps]

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Tensor) -> Live:
        return replace(self, ids=self.ids[rows])


@dataclass(frozen=True)
class Streams:
    """The streams of clips, by name."""

    parts: Mapping[str, Steps | Live]

    def steps(self, name: str) -> Steps:
        """A part that is encoded."""
        steps = self.parts[name]
        assert isinstance(steps, Steps)
        return steps

    def __len__(self) -> int:
        return len(next(iter(self.parts.values())))

    def take(self, rows: Tensor) -> Streams:
        return Streams({name: steps.take(rows) for name, steps in self.parts.items()})

    def exchanged(self, name: str, rows: Tensor) -> Streams:
        """The same clips, with `name` of item i taken from item rows[i]."""
        return Streams({**self.parts, name: self.parts[name].take(rows)})


Features: TypeAlias = Rows | Steps | Live | Streams


@dataclass(frozen=True)
class Inputs:
    """Features, and where there is a linear start, its embedding [N, dim] of each item."""

    features: Features
    start: Tensor | None = None

    def __len__(self) -> int:
        return len(self.features)

    def take(self, rows: Any) -> Inputs:
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.device)
        return Inputs(self.features.take(index), None if self.start is None else self.start[index])

    @property
    def device(self) -> torch.device:
        device: torch.device = next(_tensors(self.features)).device
        return device

    def digest(self) -> bytes:
        """SHA-256 of all the numbers, and of what a trained encoder reads and how it began."""
        stream = hashlib.sha256()
        for live in lives(self.features):
            stream.update(live.source.digest)
        for tensor in [*_tensors(self.features), *([] if self.start is None else [self.start])]:
            stream.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
            stream.update(np.ascontiguousarray(tensor.cpu().numpy()).data)
        return stream.digest()


def joined(first: Features, second: Features) -> Features:
    """The items of both, of one kind and the same streams."""
    if isinstance(first, Rows) and isinstance(second, Rows):
        return Rows(torch.cat([first.values, second.values]))
    if isinstance(first, Steps) and isinstance(second, Steps):
        ends = torch.cat([first.cu_seqlens, second.cu_seqlens[1:] + first.cu_seqlens[-1]])
        return Steps(torch.cat([first.values, second.values]), ends, torch.cat([first.present, second.present]))
    if isinstance(first, Live) and isinstance(second, Live):
        ids = torch.cat([first.ids, second.ids + len(first.before)])
        before: Any = joined(first.before, second.before)
        return Live(ids, first.source.joined(second.source), before, first.finish)
    assert isinstance(first, Streams)
    assert isinstance(second, Streams)
    parts = {name: joined(steps, second.parts[name]) for name, steps in first.parts.items()}
    return Streams(parts)  # type: ignore[arg-type]


def lives(features: Features) -> Iterator[Live]:
    """The parts that a trained encoder makes."""
    parts = features.parts.values() if isinstance(features, Streams) else (features,)
    yield from (part for part in parts if isinstance(part, Live))


def width(features: Rows | Steps | Live) -> int:
    """Features of a row or step."""
    rows = features.before if isinstance(features, Live) else features
    return rows.values.shape[1]


def _tensors(features: Features) -> Any:
    if isinstance(features, Rows):
        yield features.values
    elif isinstance(features, Live):
        yield features.ids
        yield from _tensors(features.before.take(features.ids))
    elif isinstance(features, Steps):
        yield from (features.values, features.cu_seqlens, features.present)
    else:
        for name in sorted(features.parts):
            yield from _tensors(features.parts[name])
