"""Sets of vectors for the tests of late interaction: as the operators take them, and as lists for the oracles."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

Float64 = npt.NDArray[np.float64]


@dataclass
class Sets:
    values: torch.Tensor
    lengths: torch.Tensor | None = None
    offsets: torch.Tensor | None = None

    @property
    def arguments(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        return self.values, self.lengths, self.offsets

    def parts(self, values: torch.Tensor) -> list[torch.Tensor]:
        """The items of a tensor of this shape."""
        if self.offsets is not None:
            return [values[start:stop] for start, stop in pairwise(self.offsets.tolist())]
        counts = [self.values.shape[1]] * len(self.values) if self.lengths is None else self.lengths.tolist()
        return [part[:count] for part, count in zip(values, counts, strict=True)]

    @property
    def items(self) -> list[Float64]:
        return [part.double().numpy() for part in self.parts(self.values)]


def random_values(
    generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, integers: bool
) -> torch.Tensor:
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return ((2 * values).round() if integers else values).to(dtype)


def ragged(seed: int, counts: list[int], dim: int, dtype: torch.dtype, integers: bool = False) -> Sets:
    generator = torch.Generator().manual_seed(seed)
    return Sets(
        random_values(generator, (sum(counts), dim), dtype, integers),
        offsets=torch.tensor([0, *np.cumsum(counts)], dtype=torch.int64),
    )


def padded(seed: int, counts: list[int], dim: int, dtype: torch.dtype, integers: bool = False) -> Sets:
    """NaN where there are no vectors: reading it would show."""
    generator = torch.Generator().manual_seed(seed)
    values = random_values(generator, (len(counts), max(counts), dim), dtype, integers)
    for item, count in zip(values, counts, strict=True):
        item[count:] = torch.nan
    return Sets(values, lengths=torch.tensor(counts, dtype=torch.int64))
