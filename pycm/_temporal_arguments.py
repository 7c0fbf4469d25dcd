"""What temporal pooling takes and returns: checks that need no values, the same for NumPy arrays and torch tensors."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pycm._temporal_layers import (
    CELLS,
    COMBINES,
    GATES,
    OWN_STEP,
    POOLS,
    Backend,
    Options,
    Problem,
    Sequences,
    Weights,
    pool_only,
    run,
)

FLOATS = ("float32", "float16", "bfloat16", "float64")


def require(condition: Any, message: Callable[[], str]) -> None:
    if not condition:
        raise ValueError(message())


def dtype_name(array: Any) -> str:
    return str(array.dtype).removeprefix("torch.")


def evaluate(function: str, backend: Backend, sequences: Sequences, weights: Any, options: Options) -> Any:
    """What `pycm.temporal_pool` returns; the options' words are checked (`check_choices`), all else here."""
    x, starts, steps, restore, single = sequences
    layers = layers_of(function, weights, options.cell, x, "x" if options.embedding is None else "embedding")
    if options.int8_weights and dtype_name(x) == "float64":
        raise TypeError(f"{function}: int8_weights needs float32, float16 or bfloat16, got float64")
    h0, c0 = options.h0, options.c0
    if single:
        h0, c0 = (state if state is None else state[..., None, :] for state in (h0, c0))
    options = options._replace(h0=h0, c0=c0)
    features = check_extras(function, layers, options, x, starts.shape[0] - 1)
    check_pool_parameters(function, x, features, options.attention, options.gpo)
    h0, c0 = (None if state is None else backend.work(state) for state in (h0, c0))
    every = x.shape[1] * backend.arange(x.shape[0] + 1, x) if options.legacy_padding else None
    pooled, hidden, memory = run(backend, Problem(x, starts, steps, layers, options._replace(h0=h0, c0=c0), every))
    pooled = backend.cast(pooled, x)
    if options.pool == "none":
        pooled = restore(pooled)
    elif single:
        pooled = pooled[0]
    if not options.return_state:
        return pooled
    states = [backend.xp.stack(state) for state in ((hidden,) if options.cell == "gru" else (hidden, memory))]
    final = [backend.cast(state[:, 0] if single else state, x) for state in states]
    return pooled, final[0] if len(final) == 1 else tuple(final)


def evaluate_pool(function: str, backend: Backend, sequences: Sequences, pool: str, attention: Any, gpo: Any) -> Any:
    """What `pycm.pool_states` returns; the pool's name is checked."""
    check_pool_parameters(function, sequences.x, sequences.x.shape[-1], attention, gpo)
    pooled = backend.cast(pool_only(backend, sequences, pool, attention, gpo), sequences.x)
    return pooled[0] if sequences.single else pooled


def check_choices(function: str, options: Options) -> None:
    """The words."""
    cell, pool, combine = options[:3]
    for name, value, known in (("cell", cell, CELLS), ("pool", pool, POOLS), ("combine", combine, COMBINES)):
        _check_word(function, name, value, known)
    check_pool(function, pool, options.attention, options.gpo)
    if (options.residual or options.normalize_states) and pool in OWN_STEP:
        raise ValueError(
            f"{function}: residual and normalize_states need a pool over the steps, such as mean, got pool={pool!r}"
        )
    dropout: Any = options.dropout
    if not isinstance(dropout, (int, float, np.floating)):
        raise TypeError(f"{function}: dropout must be a number, got {type(dropout).__name__}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"{function}: dropout must be in [0, 1], got {dropout}")


def _check_word(function: str, name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{function}: {name} must be one of {', '.join(known)}, got {value!r}")


def check_pool(function: str, pool: str, attention: Any, gpo: Any, known: tuple[str, ...] = POOLS) -> None:
    """The pool and its parameters belong together."""
    _check_word(function, "pool", pool, known)
    for name, value in (("attention", attention), ("gpo", gpo)):
        if (value is not None) != (pool == name):
            given = "None" if value is None else type(value).__name__
            expected = "given with" if pool == name else "None without"
            raise ValueError(f"{function}: {name} must be {expected} pool={name!r}, got {given} with pool={pool!r}")


def check_sequences(function: str, x: Any, lengths: Any, cu_seqlens: Any, legacy_padding: bool) -> None:
    """x is [B, T, I] with lengths, [S, I] with either of both, or [T, I] with none."""
    if dtype_name(x) not in FLOATS:
        raise TypeError(f"{function}: x must be float32, float16, bfloat16 or float64, got {dtype_name(x)}")
    if x.ndim not in (2, 3):
        raise ValueError(f"{function}: x must have shape [B, T, I], [S, I] or [T, I], got {list(x.shape)}")
    if lengths is not None and cu_seqlens is not None:
        raise ValueError(f"{function}: lengths and cu_seqlens must not both be given")
    if x.ndim == 3 and cu_seqlens is not None:
        raise ValueError(f"{function}: cu_seqlens must come with ragged x [S, I], got shape {list(x.shape)}")
    if x.ndim == 3 and lengths is None:
        raise ValueError(
            f"{function}: lengths must be given with padded x {list(x.shape)}; "
            f"lengths={x.shape[1]} says that every row is full"
        )
    if x.ndim == 2 and is_scalar(lengths):
        raise ValueError(f"{function}: lengths must be given row by row with ragged x [S, I], got {lengths}")
    if legacy_padding and x.ndim != 3:
        raise ValueError(f"{function}: legacy_padding needs padded x [B, T, I], got shape {list(x.shape)}")


def is_scalar(lengths: Any) -> bool:
    """Whether it is one number for all rows, be it of Python or an array without dimensions."""
    return isinstance(lengths, numbers.Number) or getattr(lengths, "ndim", None) == 0


def check_lengths(function: str, lengths: npt.NDArray[np.int64], most: int) -> None:
    if lengths.size and (lengths.min() < 0 or lengths.max() > most):
        row = int(np.argmax((lengths < 0) | (lengths > most)))
        raise ValueError(f"{function}: lengths must be in [0, {most}], got {lengths[row]} in row {row}")


def check_embedding(function: str, embedding: Any) -> None:
    if dtype_name(embedding) not in FLOATS:
        raise TypeError(
            f"{function}: embedding must be float32, float16, bfloat16 or float64, got {dtype_name(embedding)}"
        )
    if embedding.ndim != 2 or not embedding.shape[0]:
        raise ValueError(f"{function}: embedding must have shape [V, I], V > 0, got {list(embedding.shape)}")


def check_ids(function: str, ids: npt.NDArray[np.int64], words: int) -> None:
    if ids.size and (ids.min() < 0 or ids.max() >= words):
        wrong = ids[(ids < 0) | (ids >= words)][0]
        raise ValueError(f"{function}: x must hold ids in [0, {words}), the rows of embedding, got {wrong}")


def starts_of(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """cu_seqlens [B + 1]."""
    starts = np.zeros(len(lengths) + 1, np.int64)
    lengths.cumsum(out=starts[1:])
    return starts


def layers_of(function: str, weights: Any, cell: str, x: Any, source: str) -> list[list[Weights]]:
    """`weights` by layer and direction; names, shapes and dtypes checked. `source` is the argument that x came from."""
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"{function}: weights must be a mapping with torch's names (weight_ih_l0, ...), such as an RNN's "
            f"state_dict(), got {type(weights).__name__}"
        )
    ends = ("", "_reverse") if "weight_ih_l0_reverse" in weights else ("",)
    kinds = [kind for kind in Weights._fields if f"{kind}_l0" in weights or kind in ("weight_ih", "weight_hh")]
    depth = 1
    while f"weight_ih_l{depth}" in weights:
        depth += 1
    expected = [f"{kind}_l{layer}{end}" for layer in range(depth) for end in ends for kind in kinds]
    for name in expected:
        if name not in weights:
            raise ValueError(f"{function}: weights must have {', '.join(expected)}; {name} is missing")
    for name in weights:
        if name not in expected:
            raise ValueError(f"{function}: weights must have {', '.join(expected)}, and no more; got {name!r}")
    for name in expected:
        if weights[name].dtype != x.dtype and dtype_name(weights[name]) != dtype_name(x):  # byte order does not matter
            wanted, got = dtype_name(x), dtype_name(weights[name])
            raise TypeError(f"{function}: {name} must have {source}'s dtype {wanted}, got {got}")
    if ("bias_ih" in kinds) != ("bias_hh" in kinds):
        raise ValueError(f"{function}: weights must have both biases or none")
    if "weight_hr" in kinds and cell != "lstm":
        raise ValueError(f"{function}: weight_hr_l0 (a projection) needs cell='lstm', got {cell!r}")
    layers = [
        [Weights(**{kind: weights[f"{kind}_l{layer}{end}"] for kind in kinds}) for end in ends]
        for layer in range(depth)
    ]
    _check_shapes(function, layers, cell, x.shape[-1], source)
    return layers


def _check_shapes(function: str, layers: list[list[Weights]], cell: str, input_size: Any, source: str) -> None:
    first = layers[0][0]
    for name in ("weight_ih", "weight_hh"):
        if getattr(first, name).ndim != 2:
            raise ValueError(f"{function}: {name}_l0 must be a matrix, got shape {list(getattr(first, name).shape)}")
    wanted_size = first.weight_ih.shape[-1]
    require(
        input_size == wanted_size,
        lambda: f"{function}: {source} must have {wanted_size} features, as weight_ih_l0 has columns, got {input_size}",
    )
    gates = GATES[cell]
    rows, state = first.weight_hh.shape
    hidden = state if first.weight_hr is None else first.weight_hr.shape[-1]
    require(hidden > 0 and state > 0, lambda: f"{function}: weight_hh_l0 must not be empty, got {[rows, state]}")
    for depth, directions in enumerate(layers):
        inputs = state * len(directions) if depth else input_size
        for reverse, w in enumerate(directions):
            wanted = {
                "weight_ih": (gates * hidden, inputs),
                "weight_hh": (gates * hidden, state),
                "bias_ih": (gates * hidden,),
                "bias_hh": (gates * hidden,),
                "weight_hr": (state, hidden),
            }
            for kind, shape in wanted.items():
                array = getattr(w, kind)
                name = f"{kind}_l{depth}{'_reverse' if reverse else ''}"
                if array is not None:
                    check_shape(function, name, array, shape)


def check_shape(function: str, name: str, array: Any, shape: tuple[Any, ...]) -> None:
    require(
        array.ndim == len(shape) and all(size == wanted for size, wanted in zip(array.shape, shape, strict=True)),
        lambda: f"{function}: {name} must have shape {list(shape)}, got {list(array.shape)}",
    )


def check_extras(function: str, layers: list[list[Weights]], options: Options, x: Any, batch: Any) -> Any:
    """Initial states, and what a residual needs. Returns F."""
    cell, _, combine, h0, c0 = options[:5]
    directions, w = len(layers[0]), layers[0][0]
    state, hidden = w.weight_hh.shape[1], w.weight_hh.shape[0] // GATES[cell]
    features = state * (directions if combine == "concat" else 1)
    if c0 is not None and cell != "lstm":
        raise ValueError(f"{function}: c0 must be None for cell={cell!r}")
    for name, array, size in (("h0", h0, state), ("c0", c0, hidden)):
        if array is not None:
            check_dtype(function, name, array, x)
            check_shape(function, name, array, (len(layers) * directions, batch, size))
    if options.residual:
        require(
            x.shape[-1] == features,
            lambda: f"{function}: residual needs states of x's {x.shape[-1]} features, got {features}",
        )
    return features


def check_dtype(function: str, name: str, array: Any, x: Any) -> None:
    """What is not a weight of the cell may have another precision than x: it is computed with in fp32, or in fp64."""
    expected = ("float64",) if dtype_name(x) == "float64" else FLOATS[:3]
    if array.dtype.name not in expected if isinstance(array, np.ndarray) else dtype_name(array) not in expected:
        raise TypeError(
            f"{function}: {name} must be {' or '.join(expected)} with {dtype_name(x)} x, got {dtype_name(array)}"
        )


def check_pool_parameters(function: str, x: Any, features: Any, attention: Any, gpo: Any) -> None:
    if attention is not None:
        check_dtype(function, "attention", attention, x)
        require(
            attention.shape in ((features,), (1, features)),
            lambda: f"{function}: attention must have shape {[features]}, got {list(attention.shape)}",
        )
    if gpo is not None:
        check_gpo(function, gpo, x)


def check_gpo(function: str, gpo: Any, x: Any) -> None:
    """The parameters of generalised pooling: a two-directional GRU and a linear map to one score."""
    kinds = Weights._fields[:4]
    names = [f"gru.{kind}_l0{end}" for end in ("", "_reverse") for kind in kinds] + ["linear.weight"]
    if not isinstance(gpo, Mapping) or set(gpo) != set(names):
        got = ", ".join(gpo) if isinstance(gpo, Mapping) else type(gpo).__name__
        raise ValueError(f"{function}: gpo must be a mapping with {', '.join(names)}, got {got}")
    for name, array in gpo.items():
        check_dtype(function, f"gpo's {name}", array, x)
    if any(gpo[f"gru.{kind}_l0"].ndim != 2 for kind in ("weight_ih", "weight_hh")):
        raise ValueError(f"{function}: gpo's gru.weight_ih_l0 and gru.weight_hh_l0 must be matrices")
    sines, width = gpo["gru.weight_ih_l0"].shape[1], gpo["gru.weight_hh_l0"].shape[1]
    require(
        sines % 2 == 0, lambda: f"{function}: gpo's gru.weight_ih_l0 must have an even number of columns, got {sines}"
    )
    shapes = ((3 * width, sines), (3 * width, width), (3 * width,), (3 * width,))
    for end in ("", "_reverse"):
        for kind, shape in zip(kinds, shapes, strict=True):
            check_shape(function, f"gpo's gru.{kind}_l0{end}", gpo[f"gru.{kind}_l0{end}"], shape)
    check_shape(function, "gpo's linear.weight", gpo["linear.weight"], (1, width))
