"""The specification of temporal pooling: LSTM, GRU and the pools in NumPy, fp64, one sequence at a time.

Names: x [T, I] one sequence; h, c the state; W, b the weights; the gates are stacked in torch's order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Weights = Mapping[str, npt.NDArray[Any]]

GATES = {"lstm": 4, "gru": 3}


class Direction(NamedTuple):
    """The weights of one direction of one layer; G is 4 for an LSTM and 3 for a GRU, P is H without a projection."""

    weight_ih: Float64  # [G·H, I]
    weight_hh: Float64  # [G·H, P]
    bias_ih: Float64  # [G·H]
    bias_hh: Float64  # [G·H]
    weight_hr: Float64 | None = None  # [P, H], LSTM only


class TemporalPool(NamedTuple):
    pooled: Any  # [B, F]; for the pool "none" the states [T, F] of each sequence
    h_n: Float64  # [layers · directions, B, P]
    c_n: Float64  # [layers · directions, B, H]; a GRU leaves it as it came


def sigmoid(x: Float64) -> Float64:
    return np.exp(-np.logaddexp(0.0, -x))


def softmax(x: Float64) -> Float64:
    e = np.exp(x - x.max(axis=0))
    return np.asarray(e / e.sum(axis=0))


# One function a cell: the next state.


def lstm(x: Float64, h: Float64, c: Float64, w: Direction) -> tuple[Float64, Float64]:
    i, f, g, o = np.split(w.weight_ih @ x + w.bias_ih + w.weight_hh @ h + w.bias_hh, 4)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    h = sigmoid(o) * np.tanh(c)
    return h if w.weight_hr is None else w.weight_hr @ h, c


def gru(x: Float64, h: Float64, c: Float64, w: Direction) -> tuple[Float64, Float64]:
    r_x, z_x, n_x = np.split(w.weight_ih @ x + w.bias_ih, 3)
    r_h, z_h, n_h = np.split(w.weight_hh @ h + w.bias_hh, 3)
    r, z = sigmoid(r_x + r_h), sigmoid(z_x + z_h)
    n = np.tanh(n_x + r * n_h)  # r after the product and its bias: torch's and cuDNN's GRU
    return (1 - z) * n + z * h, c


CELLS = {"lstm": lstm, "gru": gru}


def run(x: Float64, h: Float64, c: Float64, w: Direction, cell: str, reverse: bool) -> tuple[Float64, Float64, Float64]:
    """The states [T, P], by position, and the final h and c. The reverse direction starts at the sequence's own end."""
    states = np.zeros((len(x), len(h)))
    for t in reversed(range(len(x))) if reverse else range(len(x)):
        h, c = CELLS[cell](x[t], h, c, w)
        states[t] = h
    return states, h, c


def join(parts: Sequence[Float64], combine: str) -> Float64:
    """Two directions as one, over the last axis."""
    if len(parts) == 1:
        return parts[0]
    if combine == "concat":
        return np.concatenate(parts, axis=-1)
    return (parts[0] + parts[1]) / {"average": 2, "sum": 1}[combine]


# One line a pool: the vectors [T, F] of one sequence, T >= 1, to the one that represents it.


def mean(states: Float64) -> Float64:
    return np.asarray(states.mean(axis=0))


def maximum(states: Float64) -> Float64:
    return np.asarray(states.max(axis=0))


def attention(states: Float64, weight: npt.ArrayLike) -> Float64:
    """Each step by the softmax of its product with `weight` [F]."""
    return softmax(states @ np.asarray(weight, np.float64).reshape(-1)) @ states


def gpo(states: Float64, weights: Weights) -> Float64:
    """Each feature's k-th largest value by the k-th coefficient (generalised pooling, Chen et al., CVPR 2021)."""
    return gpo_coefficients(len(states), weights) @ -np.sort(-states, axis=0)


def gpo_coefficients(length: int, weights: Weights) -> Float64:
    """A small GRU over sines of the ranks, both directions averaged, one score a rank, softmax at temperature 0.1."""
    w = {name.removeprefix("gru."): value for name, value in weights.items()}
    dim, width = w["weight_ih_l0"].shape[1], w["weight_hh_l0"].shape[1]
    angles = np.arange(length)[:, None] * 10000.0 ** (-np.arange(0, dim, 2) / dim)
    ranks = np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(length, dim)
    zero = np.zeros(width)
    both = [run(ranks, zero, zero, direction(w, f"{{}}_l0{end}"), "gru", bool(end))[0] for end in ("", "_reverse")]
    return softmax(join(both, "average") @ np.asarray(w["linear.weight"], np.float64)[0] / 0.1)


def own_step(states: Sequence[Float64], step: int, combine: str) -> Float64:
    """What each direction says at its own first (0) or last (-1) step."""
    return join([part[::-1][step] if d else part[step] for d, part in enumerate(states)], combine)


def unit(x: Float64) -> Float64:
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    return np.where(norm == 0, 0.0, x / np.where(norm == 0, 1.0, norm))


def direction(weights: Weights, name: str) -> Direction:
    """By torch's names; `name` is like "{}_l0_reverse". A layer without biases has zeros."""
    kinds = [kind for kind in Direction._fields if name.format(kind) in weights]
    w = {kind: np.asarray(weights[name.format(kind)], np.float64) for kind in kinds}
    zeros = np.zeros(len(w["weight_hh"]))
    return Direction(**{"bias_ih": zeros, "bias_hh": zeros, **w})


def temporal_pool(
    sequences: Sequence[npt.ArrayLike],
    weights: Weights,
    cell: str,
    pool: str,
    combine: str = "concat",
    h0: npt.ArrayLike | None = None,
    c0: npt.ArrayLike | None = None,
    attention_weight: npt.ArrayLike | None = None,
    gpo_weights: Weights | None = None,
    residual: bool = False,
    normalize_states: bool = False,
    normalize: bool = False,
) -> TemporalPool:
    """Run the cell over sequences [T, I], each on its own, and pool what it says at each step.

    `weights` has torch's names, which tell layers and directions. `residual` adds the input to the states, then
    `normalize_states` makes their norm 1, then they are pooled, and `normalize` makes that norm 1. A sequence without
    steps is represented by zeros, and leaves h0 and c0 as they are.
    """
    ends = ("", "_reverse") if "weight_ih_l0_reverse" in weights else ("",)
    layers = [[direction(weights, f"{{}}_l{layer}{end}") for end in ends] for layer in range(len(weights))
              if f"weight_ih_l{layer}" in weights]  # fmt: skip
    count, w = len(layers) * len(ends), layers[0][0]
    h = np.zeros((count, len(sequences), w.weight_hh.shape[1])) if h0 is None else np.array(h0, np.float64)
    c = np.zeros((count, len(sequences), len(w.weight_hh) // GATES[cell])) if c0 is None else np.array(c0, np.float64)
    pools: dict[str, Callable[[Sequence[Float64], Float64], Float64]] = {
        "last": lambda states, _: own_step(states, -1, combine),
        "first": lambda states, _: own_step(states, 0, combine),
        "mean": lambda _, joined: mean(joined),
        "max": lambda _, joined: maximum(joined),
        "attention": lambda _, joined: attention(joined, attention_weight),  # type: ignore[arg-type]
        "gpo": lambda _, joined: gpo(joined, gpo_weights),  # type: ignore[arg-type]
        "meanmax": lambda _, joined: np.concatenate([mean(joined), maximum(joined)]),
        "lastmean": lambda states, joined: np.concatenate([own_step(states, -1, combine), mean(joined)]),
        "none": lambda _, joined: joined,
    }
    pooled = []
    for b, sequence in enumerate(sequences):
        x = np.asarray(sequence, np.float64)
        out, states = x, [x]
        for layer, directions in enumerate(layers):
            states = []
            for d, w in enumerate(directions):
                index = layer * len(ends) + d
                by_step, h[index, b], c[index, b] = run(out, h[index, b], c[index, b], w, cell, bool(d))
                states.append(by_step)
            out = join(states, "concat")
        if not len(x) and pool != "none":
            states, x = [np.zeros((1, part.shape[1])) for part in states], np.zeros((1, 1))
        joined = join(states, combine)
        joined = joined + x if residual else joined
        joined = unit(joined) if normalize_states else joined
        found = pools[pool](states, joined)
        pooled.append(unit(found) if normalize else found)
    return TemporalPool(pooled if pool == "none" else np.stack(pooled), h, c)
