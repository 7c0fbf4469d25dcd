"""`Sequences`: a ragged batch of sequences in time, and `align`, which brings one stream to the times of another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..encoders.base import Features
from ..encoders.store import Steps

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False)
class Sequences:
    """Sequences of one stream, one after the other, never padded.

    Attributes:
        values: float32 [S, dim]: the steps of all sequences.
        cu_seqlens: int64 [B + 1]: sequence b is values[cu_seqlens[b] : cu_seqlens[b + 1]], of at least one step.
        times: float64 [S]: when each step is, in seconds, ascending within a sequence.
        present: bool [B]: False where the clip has no such stream (no sound track); one step of zeros stands in.

    Raises:
        ValueError: arrays that do not fit together.
    """

    values: Features
    cu_seqlens: npt.NDArray[np.int64]
    times: npt.NDArray[np.float64]
    present: npt.NDArray[np.bool_]

    def __post_init__(self) -> None:
        ends = self.cu_seqlens
        if self.values.ndim != 2 or ends.ndim != 1 or not len(ends) or ends[0] != 0 or ends[-1] != len(self.values):
            raise ValueError(
                f"Sequences: cu_seqlens must go from 0 to the number of steps of values [S, dim], "
                f"got {ends!r} for {list(self.values.shape)}"
            )
        if (np.diff(ends) < 1).any():
            raise ValueError(f"Sequences: sequence {int(np.argmax(np.diff(ends) < 1))} has no step")
        if self.times.shape != (len(self.values),) or self.present.shape != (len(ends) - 1,):
            raise ValueError(
                f"Sequences: times and present must be [{len(self.values)}] and [{len(ends) - 1}], "
                f"got {list(self.times.shape)} and {list(self.present.shape)}"
            )

    @classmethod
    def of(cls, items: Iterable[Steps], dim: int) -> Self:
        """From one `Steps` for each clip; one of no step is marked as not present."""
        given = list(items)
        present = np.array([len(steps.values) > 0 for steps in given], dtype=np.bool_)
        nothing = Steps(np.zeros((1, dim), dtype=np.float32), np.zeros(1))
        filled = [steps if there else nothing for steps, there in zip(given, present, strict=True)]
        return cls(
            np.concatenate([np.empty((0, dim), np.float32), *(steps.values for steps in filled)]),
            np.cumsum([0, *(len(steps.values) for steps in filled)], dtype=np.int64),
            np.concatenate([np.empty(0), *(steps.times for steps in filled)]),
            present,
        )

    @classmethod
    def joined(cls, parts: Sequence[Sequences]) -> Self:
        """The sequences of several batches of one dim, one batch after another."""
        lengths = np.concatenate([part.lengths for part in parts])
        return cls(
            np.concatenate([part.values for part in parts]),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            np.concatenate([part.times for part in parts]),
            np.concatenate([part.present for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    def __iter__(self) -> Iterator[Steps]:
        """Each sequence; of no step where it is not present."""
        for start, end, there in zip(self.cu_seqlens[:-1], self.cu_seqlens[1:], self.present, strict=True):
            end = end if there else start
            yield Steps(self.values[start:end], self.times[start:end])

    @property
    def dim(self) -> int:
        """Features of a step."""
        return int(self.values.shape[1])

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """int64 [B]: steps of each sequence."""
        return np.diff(self.cu_seqlens)

    def take(self, rows: Any) -> Sequences:
        """The sequences `rows` (integers [N], or a mask [B]), in that order."""
        chosen = np.arange(len(self))[np.asarray(rows, dtype=None if len(rows) else np.int64)]
        lengths = self.lengths[chosen]
        ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        steps = np.arange(ends[-1]) + np.repeat(self.cu_seqlens[chosen] - ends[:-1], lengths)
        return Sequences(self.values[steps], ends, self.times[steps], self.present[chosen])

    def means(self) -> Features:
        """float32 [B, dim]: the mean step of each sequence, summed in float64."""
        sums: npt.NDArray[np.float64] = np.add.reduceat(self.values, self.cu_seqlens[:-1], axis=0, dtype=np.float64)
        means: Features = np.asarray(sums / self.lengths[:, None], dtype=np.float32)
        return means


def align(sequences: Sequences, times_of: Sequences) -> Sequences:
    """`sequences` at the times of `times_of`, so that both can be joined step by step.

    A target step stands for the time from half way to the step before it to half way to the one after it. It gets the
    mean of the steps in that time; where there is none, since `sequences` is the slower of the two, it is interpolated
    linearly between the steps around it, and held at the ends. Sequences that are not present become zeros.

    Raises:
        ValueError: different numbers of sequences.

    Cost: O((S + S') dim).
    """
    if len(sequences) != len(times_of):
        raise ValueError(f"align: times_of must have {len(sequences)} sequences, got {len(times_of)}")
    ends = times_of.cu_seqlens
    values = np.zeros((len(times_of.values), sequences.dim), dtype=np.float32)
    for b, steps in enumerate(sequences):
        if len(steps.values):
            at = slice(ends[b], ends[b + 1])
            values[at] = _at(steps, times_of.times[at])
    return Sequences(values, ends.copy(), times_of.times.copy(), sequences.present.copy())


def _at(steps: Steps, targets: npt.NDArray[np.float64]) -> Features:
    edges = (targets[1:] + targets[:-1]) / 2
    cuts = np.concatenate([[0], np.searchsorted(steps.times, edges), [len(steps.times)]])
    sums = np.concatenate([np.zeros((1, steps.values.shape[1])), np.cumsum(steps.values, axis=0, dtype=np.float64)])
    count = np.diff(cuts)
    out = (sums[cuts[1:]] - sums[cuts[:-1]]) / np.maximum(count, 1)[:, None]
    empty = np.flatnonzero(count == 0)
    if len(empty):
        place = np.interp(targets[empty], steps.times, np.arange(len(steps.times)))
        below = place.astype(np.int64)
        above = np.minimum(below + 1, len(steps.times) - 1)
        share = (place - below)[:, None]
        out[empty] = (1 - share) * steps.values[below] + share * steps.values[above]
    aligned: Features = out.astype(np.float32)
    return aligned


def concatenate(streams: Sequence[Sequences]) -> Sequences:
    """Streams side by side, step by step, at the times of the first; each is aligned to it.

    Returns [S, sum of dims]; a clip is present where one of its streams is.
    """
    if not streams:
        raise ValueError("concatenate: streams is empty")
    first = streams[0]
    aligned = [first, *(align(stream, first) for stream in streams[1:])]
    return Sequences(
        np.concatenate([stream.values for stream in aligned], axis=1),
        first.cu_seqlens,
        first.times,
        np.logical_or.reduce([stream.present for stream in streams]),
    )
