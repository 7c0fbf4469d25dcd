"""What the sides of a matcher encode with, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..encoders import FeatureCache
from .features import check_once, warn_of_copies
from .inputs import Features, Inputs, Live, Rows, Steps, Streams
from .tuning import Source, Tuning


class Encoded(NamedTuple):
    """Items as inputs. `kept`: which of the items given; `errors`: (name, reason) of the others."""

    features: Features
    names: list[str]
    kept: npt.NDArray[np.int64]
    errors: list[tuple[str, str]]
    seconds: Mapping[str, float]

    def check_once(self, function: str, what: str) -> None:
        """Raise ValueError for an item that is given twice, warn of one that is there under two names."""
        check_once(function, what, self.names, self.kept)
        warn_of_copies(function, what, self.names, self._rows())

    def _rows(self) -> Iterator[npt.NDArray[Any]]:
        """All that is known of each item, before any training."""
        parts = self.features.parts.values() if isinstance(self.features, Streams) else [self.features]
        split = []
        for part in parts:
            found = part.before if isinstance(part, Live) else part
            values = found.values.cpu().numpy()
            ends = np.arange(len(found)) + 1 if isinstance(found, Rows) else found.cu_seqlens[1:].cpu().numpy()
            split.append(np.split(values, ends[:-1]))
        yield from (np.concatenate([rows.ravel() for rows in item]) for item in zip(*split, strict=True))

    def take(self, rows: npt.NDArray[np.int64]) -> Encoded:
        """The items of these rows."""
        index = torch.from_numpy(rows).to(Inputs(self.features).device)
        names = [self.names[i] for i in rows]
        return self._replace(features=self.features.take(index), names=names, kept=self.kept[rows])


class Options(NamedTuple):
    """What all sides encode with; `tuning` while a fit trains encoders: their features are `Live` then."""

    cache: FeatureCache | None
    workers: int | None
    batch_size: int
    progress: bool | None
    device: torch.device
    tuning: Tuning | None = None

    def trains(self, name: str) -> bool:
        return self.tuning is not None and name in self.tuning.names

    def live(
        self, encoder: Any, method: str, read: Callable[[int], list[Any]], key: Callable[[int], bytes],
        before: Rows | Steps, finish: Callable[[Tensor, Tensor, Tensor], Rows | Steps],
    ) -> Live:  # fmt: skip
        """The items whose features are `before`, to be encoded in training."""
        assert self.tuning is not None
        source = Source(self.tuning, encoder, method, read, key, len(before))
        return Live(torch.arange(len(before), device=self.device), source, before, finish)
