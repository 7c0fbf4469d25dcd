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
    """B = `queries` sequences of up to T = `gallery` steps through `layers` of H = `dim` units, mean of the states.

    Frames are of size I = `inputs`, H where that is 0. Lengths are uniform from `shortest`, T/8 where that is 0, to T,
    or all T (`ragged` false). `dtype` is that of frames and weights; int8 is fp32 frames and weights
    that the library may round to 8 bits. `train` adds the backward pass.
    """

    cell: Cell = "lstm"
    dtype: str = "float32"
    ragged: bool = True
    train: bool = False
    layers: int = 1
    inputs: int = 0
    shortest: int = 0

    @property
    def shape(self) -> str:
        cell = self.cell if self.layers == 1 else f"{self.layers} layers of {self.cell}"
        lengths = f"{self.least_steps}…{self.gallery}" if self.ragged else str(self.gallery)
        sizes = f"I={self.inputs}, H={self.dim}" if self.inputs else f"I=H={self.dim}"
        passes = ", forward and backward" if self.train else ""
        return f"{cell}, B={self.queries}, T={lengths}, {sizes}, {self.dtype}{passes}"

    @property
    def frame_size(self) -> int:
        return self.inputs or self.dim

    @property
    def least_steps(self) -> int:
        return self.shortest or max(1, self.gallery // 8)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        if not self.ragged:
            return np.full(self.queries, self.gallery, np.int64)
        rng = np.random.default_rng(1)
        lengths = rng.integers(self.least_steps, self.gallery, self.queries, endpoint=True)
        lengths[0] = self.gallery
        return lengths

    @property
    def operations(self) -> float:
        """Of the steps that exist; a backward pass is twice the forward."""
        return float(self.lengths.sum()) * 2 * self._matrices * (3 if self.train else 1)

    @property
    def entries(self) -> int:
        return int(self.lengths.sum()) * self.frame_size + self._matrices

    @property
    def _matrices(self) -> int:
        """Entries of the weights that multiply."""
        return GATES[self.cell] * self.dim * (self.frame_size + (2 * self.layers - 1) * self.dim)

    @property
    def precisions(self) -> tuple[str, ...]:
        return (self.dtype,)


class Frames:
    """x [B, T, I] with zeros beyond each length, and the weights by torch's names, both fp32."""

    def __init__(self, case: SequenceCase) -> None:
        rng = np.random.default_rng(0)
        self.lengths = case.lengths
        self.x = rng.standard_normal((case.queries, case.gallery, case.frame_size), np.float32)
        self.x[np.arange(case.gallery) >= self.lengths[:, None]] = 0
        rows = GATES[case.cell] * case.dim
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(case.layers):
            shapes[f"weight_ih_l{layer}"] = (rows, case.dim if layer else case.frame_size)
            shapes[f"weight_hh_l{layer}"] = (rows, case.dim)
            shapes[f"bias_ih_l{layer}"] = shapes[f"bias_hh_l{layer}"] = (rows,)
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
            yield case(
                f"{cell}-layers", "nothing: it tests the command", 5, 6, 8, cell=cell, layers=3, inputs=4, shortest=2
            )
            yield case(f"{cell}-int8", "nothing: it tests the command", 5, 6, 8, cell=cell, dtype="int8")
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
        yield case(
            f"{cell}-1-int8", "one clip, the weights in 8 bits", 1, 32, 512, cell=cell, ragged=False, dtype="int8"
        )
    yield case("lstm-128-12-equal", "CLIP4Clip's twelve frames", 128, 12, 512, ragged=False)
    yield case(
        "lstm-64-speaker",
        "resemblyzer's network over 0.4 to 1.6 s of sound",
        64,
        160,
        256,
        layers=3,
        inputs=40,
        shortest=40,
    )
