"""Weights and sequences for the tests of temporal pooling, and the specification's answer to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pycm import _reference_temporal as specification

GATES = {"lstm": 4, "gru": 3}
CELLS = ("lstm", "gru")
Array = npt.NDArray[Any]


def rnn_weights(
    cell: str, inputs: int, hidden: int, layers: int = 1, bidirectional: bool = False, bias: bool = True, proj: int = 0,
    seed: int = 0,
) -> dict[str, Array]:  # fmt: skip
    """As torch names and scales them, in fp64."""
    rng = np.random.default_rng(seed)
    rows, state = GATES[cell] * hidden, proj or hidden
    ends = ("", "_reverse") if bidirectional else ("",)
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        for end in ends:
            shapes[f"weight_ih_l{layer}{end}"] = (rows, state * len(ends) if layer else inputs)
            shapes[f"weight_hh_l{layer}{end}"] = (rows, state)
            if bias:
                shapes[f"bias_ih_l{layer}{end}"] = shapes[f"bias_hh_l{layer}{end}"] = (rows,)
            if proj:
                shapes[f"weight_hr_l{layer}{end}"] = (proj, hidden)
    return {name: rng.uniform(-1, 1, shape) / np.sqrt(hidden) for name, shape in shapes.items()}


def gpo_weights(sines: int = 6, width: int = 5, seed: int = 1) -> dict[str, Array]:
    weights = rnn_weights("gru", sines, width, bidirectional=True, seed=seed)
    rng = np.random.default_rng(seed + 1)
    return {f"gru.{name}": w for name, w in weights.items()} | {"linear.weight": rng.standard_normal((1, width))}


def sequences(lengths: Sequence[int], inputs: int, seed: int = 2) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((length, inputs)) for length in lengths]


def pad(parts: Sequence[Array], steps: int | None = None, fill: float = np.nan) -> Array:
    """[B, T, I]; what is beyond a sequence must never be read, and is NaN."""
    steps = max((len(part) for part in parts), default=0) if steps is None else steps
    x = np.full((len(parts), steps, parts[0].shape[1]), fill)
    for row, part in zip(x, parts, strict=True):
        row[: len(part)] = part
    return x


def offsets(parts: Sequence[Array]) -> Array:
    return np.cumsum([0, *map(len, parts)])


def cast(value: Any, dtype: Any) -> Any:
    """Arrays, also in dictionaries and lists, in another dtype; None stays."""
    if isinstance(value, dict):
        return {name: cast(part, dtype) for name, part in value.items()}
    if isinstance(value, list):
        return [cast(part, dtype) for part in value]
    return value.astype(dtype) if isinstance(value, np.ndarray) else value


def expected(parts: Sequence[Array], weights: dict[str, Array], cell: str, pool: str, **options: Any) -> Any:
    """(pooled, h_n, c_n) of the specification; the states of all sequences together for the pool "none"."""
    options["attention_weight"], options["gpo_weights"] = options.pop("attention", None), options.pop("gpo", None)
    pooled, h_n, c_n = specification.temporal_pool(parts, weights, cell, pool, **options)
    return np.concatenate(pooled) if pool == "none" else pooled, h_n, c_n
