"""Learning with less: another domain's look, and pairs that nobody labelled."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..encoders.base import Features as Array
from ..functional import DISTANCES, Metric
from ..mining import mutual_neighbours
from ..spaces import CORAL
from .encoded import Encoded
from .inputs import Features, Steps, Streams, joined

_PLACE = re.compile(r"(items|clips)\[\d+\]")


def aligned(source: Features, target: Features) -> Streams:
    """Clips with each stream's steps where those of the target are, in mean and covariance; see `CORAL`.

    ValueError, naming the stream, where one has fewer than two steps that are there.
    """
    assert isinstance(source, Streams)
    assert isinstance(target, Streams)
    parts = {}
    for name in source.parts:
        steps = source.steps(name)
        rows, of_target = (s.take(torch.nonzero(s.present)[:, 0]).values for s in (steps, target.steps(name)))
        try:
            moved = CORAL().fit(rows.cpu().numpy(), of_target.cpu().numpy()).transform(steps.values.cpu().numpy())
        except ValueError as error:
            raise ValueError(f"target_clips: stream {name!r}: {error}") from error
        parts[name] = Steps(torch.from_numpy(moved).to(steps.values.device), steps.cu_seqlens, steps.present)
    return Streams(parts)


def extended(
    known: Features, names: Sequence[str], encoded: Encoded, rows: npt.NDArray[np.int64]
) -> tuple[Features, npt.NDArray[np.int64]]:
    """The known items and, appended, the `rows` of `encoded` that are not among them; where each of `rows` is then.

    Items are told apart by `names`; one whose name is but its place in a list is always new.
    """
    place: dict[Any, int] = {name: row for row, name in enumerate(names) if not _PLACE.fullmatch(name)}
    keys = [int(row) if _PLACE.fullmatch(encoded.names[row]) else encoded.names[row] for row in rows]
    new: list[int] = []
    for row, key in zip(rows, keys, strict=True):
        if key not in place:
            place[key] = len(known) + len(new)
            new.append(int(row))
    where = np.array([place[key] for key in keys], np.int64)
    return (joined(known, encoded.take(np.array(new, np.int64)).features) if new else known), where


def pseudo_pairs(first: Array, second: Array, metric: Metric, threshold: float) -> npt.NDArray[np.int64]:
    """Rows [P, 2] of embeddings that are each other's nearest and score `threshold` or better (are as near)."""
    limit: dict[str, Any] = {"max_distance" if metric in DISTANCES else "min_score": threshold}
    found = mutual_neighbours(first, second, metric=metric, **limit)
    return np.stack([found.query_rows, found.indices], 1)
