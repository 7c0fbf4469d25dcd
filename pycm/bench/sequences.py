"""The cases of temporal pooling, and their frames."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from .cases import Case

Cell: TypeAlias = Literal["lstm", "gru"]

GATES = {"lstm": 4, "gru": 3}


@dataclass(frozen=True)
class SequenceCase(Case):
    """B = `queries` sequences of up to T = `gallery` steps through a cell with I = H = `dim`, mean of the states.

    Lengths are uniform from T/8 to T, or all T (`ragged` false). `dtype` is that of frames and weights; `train`
    adds the backward pass.
    """

    cell: Cell = "lstm"
    dtype: str = "float32"
    ragged: bool = True
    train: bool = False

    @property
    def shape(self) -> str:
        lengths = f"{max(1, self.gallery // 8)}…{self.gallery}" if self.ragged else str(self.gallery)
        passes = ", forward and backward" if self.train else ""
        return f"{self.cell}, B={self.queries}, T={lengths}, I=H={self.dim}, {self.dtype}{passes}"

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        if not self.ragged:
            return np.full(self.queries, self.gallery, np.int64)
        rng = np.random.default_rng(1)
        lengths = rng.integers(max(1, self.gallery // 8), self.gallery, self.queries, endpoint=True)
        lengths[0] = self.gallery
        return lengths

    @property
    def operations(self) -> float:
        """Of the steps that exist; a backward pass is twice the forward."""
        return float(self.lengths.sum()) * 4 * GATES[self.cell] * self.dim**2 * (3 if self.train else 1)

    @property
    def entries(self) -> int:
        return int(self.lengths.sum()) * self.dim + 2 * GATES[self.cell] * self.dim**2

    @property
    def precisions(self) -> tuple[str, ...]:
        return (self.dtype,)


class Frames:
    """x [B, T, I] with zeros beyond each length, and the weights by torch's names, both fp32."""

    def __init__(self, case: SequenceCase) -> None:
        rng = np.random.default_rng(0)
        self.lengths = case.lengths
        self.x = rng.standard_normal((case.queries, case.gallery, case.dim), np.float32)
        self.x[np.arange(case.gallery) >= self.lengths[:, None]] = 0
        rows = GATES[case.cell] * case.dim
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih_l0": (rows, case.dim),
            "weight_hh_l0": (rows, case.dim),
            "bias_ih_l0": (rows,),
            "bias_hh_l0": (rows,),
        }
        bound = case.dim**-0.5
        self.weights: dict[str, Any] = {
            name: rng.uniform(-bound, bound, shape).astype(np.float32) for name, shape in shapes.items()
        }


def sequence_cases(tiny: bool) -> Iterator[SequenceCase]:
    def case(name: str, about: str, batch: int, steps: int, dim: int, **changes: Any) -> SequenceCase:
        return SequenceCase(name, about, "temporal_pool", batch, steps, dim, **changes)

    cells: tuple[Cell, ...] = ("lstm", "gru")
    if tiny:
        for cell in cells:
            yield case(f"{cell}-ragged", "nothing: it tests the command", 5, 6, 8, cell=cell)
            yield case(f"{cell}-train", "nothing: it tests the command", 5, 6, 8, cell=cell, train=True, ragged=False)
        return
    for cell in cells:
        yield case(f"{cell}-64", "a batch of captions or clips", 64, 32, 512, cell=cell)
        yield case(f"{cell}-64-bf16", "the same in bfloat16", 64, 32, 512, cell=cell, dtype="bfloat16")
        yield case(f"{cell}-64-equal", "clips cut to one length", 64, 32, 512, cell=cell, ragged=False)
        yield case(f"{cell}-256", "a large batch", 256, 32, 512, cell=cell)
        yield case(f"{cell}-1", "one clip while a person waits", 1, 32, 512, cell=cell, ragged=False)
        yield case(f"{cell}-64-train", "a training step", 64, 32, 512, cell=cell, train=True)
        yield case(
            f"{cell}-64-train-bf16", "the same in bfloat16", 64, 32, 512, cell=cell, dtype="bfloat16", train=True
        )
        yield case(f"{cell}-16-long", "long videos", 16, 256, 512, cell=cell)
    yield case("lstm-128-12-equal", "CLIP4Clip's twelve frames", 128, 12, 512, ragged=False)
