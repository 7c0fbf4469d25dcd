"""Temporal pooling out of its kernels: layers, directions and pools, the same for NumPy arrays and torch tensors.

Sequences lie one after another ("ragged"): row b has steps cu_seqlens[b] to cu_seqlens[b + 1]. Between the layers there
may be more rows than steps, so that shapes depend on shapes alone: what lies beyond cu_seqlens[B] is never used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, get_args

Cell: TypeAlias = Literal["lstm", "gru"]
Pool: TypeAlias = Literal["last", "first", "mean", "max", "attention", "gpo", "meanmax", "lastmean", "none"]
Combine: TypeAlias = Literal["concat", "average", "sum"]

GATES = {"lstm": 4, "gru": 3}
# Numbers of a unit and a step that the backward pass needs: i f g o c, n r z and the state's share of n.
RESERVE = {"lstm": 5, "gru": 4}
CELLS: tuple[Cell, ...] = get_args(Cell)
POOLS: tuple[Pool, ...] = get_args(Pool)
COMBINES: tuple[Combine, ...] = get_args(Combine)
# Of the pools, those that see one step of each direction: its own first or last.
OWN_STEP = ("last", "first", "lastmean")
# And those of vectors that no cell made.
STATE_POOLS = ("mean", "max", "attention", "gpo", "meanmax")

# Of the scores that generalised pooling gives to ranks, as its authors have it.
GPO_TEMPERATURE = 0.1
# What is below every score, and not infinite: exp(-inf + inf) is nan.
NO_SCORE = -1e30


def width(pool: str) -> int:
    """Results for each element of a state."""
    return 2 if pool in ("meanmax", "lastmean") else 1


class Weights(NamedTuple):
    """One direction of one layer, as torch has it."""

    weight_ih: Any
    weight_hh: Any
    bias_ih: Any = None
    bias_hh: Any = None
    weight_hr: Any = None


class Options(NamedTuple):
    """What is asked for, as `pycm.temporal_pool` takes it."""

    cell: str
    pool: str
    combine: str = "concat"
    h0: Any = None
    c0: Any = None
    attention: Any = None
    gpo: Mapping[str, Any] | None = None
    residual: bool = False
    normalize_states: bool = False
    normalize: bool = False
    dropout: float = 0.0
    legacy_padding: bool = False
    batch_first: bool = True
    return_state: bool = False
    embedding: Any = None
    int8_weights: bool = False


class Sequences(NamedTuple):
    """x as the kernels take it, and how to give ragged states its form again."""

    x: Any  # [S, I] or [B, T, I]
    cu_seqlens: Any
    steps: int  # of the longest sequence, or a bound of it; at least 1
    restore: Callable[[Any], Any]  # ragged states [≥ S, F]
    single: bool = False


class Problem(NamedTuple):
    """Sequences, weights and options, checked; the options' h0 and c0 in the working dtype."""

    x: Any
    cu_seqlens: Any
    steps: int
    layers: list[list[Weights]]
    options: Options
    run_seqlens: Any = None  # where the cell runs further than the pool reads


class Direction(NamedTuple):
    """One direction of one layer: what a kernel runs."""

    x: Any
    cu_seqlens: Any
    weights: Weights
    cell: str
    reverse: bool
    pool: str = "none"
    pool_weights: Any = None
    h0: Any = None
    c0: Any = None
    int8: bool = False


class Backend(Protocol):
    """The kernels and the few functions that NumPy and torch call differently. Results are in the working dtype."""

    xp: Any

    def cell(self, direction: Direction) -> tuple[Any, Any, Any, Any]:
        """Pooled [B, W·P], ragged states [≥ S, P] (for the pool "none"), h_n [B, P], c_n [B, H] (None for a GRU)."""

    def pool(self, x: Any, cu_seqlens: Any, pool: str, pool_weights: Any) -> Any:
        """Of ragged x in the working dtype."""

    def dropout(self, x: Any, p: float) -> Any: ...
    def work(self, array: Any) -> Any:
        """In the working dtype: float64 stays, all others become float32."""

    def cast(self, array: Any, like: Any) -> Any: ...
    def double(self, array: Any) -> Any: ...
    def arange(self, count: int, like: Any) -> Any: ...
    def rows_of(self, cu_seqlens: Any, count: int) -> Any:
        """Which sequence each of `count` ragged steps belongs to; the last one's for what lies beyond."""

    def distinct(self, lengths: Any, count: int) -> tuple[Any, Any, int]:
        """Lengths without repetition (0 may repeat), where each of `lengths` stands among them, and a bound of their
        sum: at most `count`, that of the sum of all, and 0 only if `count` is."""


def run(backend: Backend, problem: Problem) -> tuple[Any, list[Any], list[Any]]:
    """Pooled [B, F], or ragged states [≥ S, F] for the pool "none"; h_n and c_n (None for a GRU) of each direction."""
    p, o, xp = problem, problem.options, backend.xp
    run_seqlens = p.cu_seqlens if p.run_seqlens is None else p.run_seqlens
    pool_weights = _pool_weights(backend, p.x, p.cu_seqlens, p.steps, o.pool, o.attention, o.gpo)
    fused = _fused(p)
    out, hidden, memory = p.x, [], []
    for depth, directions in enumerate(p.layers):
        last = depth + 1 == len(p.layers)
        pool = o.pool if last and fused else "none"
        if depth and o.dropout:
            out = backend.dropout(out, o.dropout)
        parts = []
        for reverse, w in enumerate(directions):
            index = depth * len(directions) + reverse
            h0, c0 = (None if state is None else state[index] for state in (o.h0, o.c0))
            own_weights = pool_weights if pool == o.pool else None
            pooled, states, h_n, c_n = backend.cell(
                Direction(out, run_seqlens, w, o.cell, bool(reverse), pool, own_weights, h0, c0, o.int8_weights)
            )
            parts.append(states if pool == "none" else pooled)
            hidden.append(h_n)
            memory.append(c_n)
        out = _join(xp, parts, o.combine, pool) if last else _join(xp, parts, "concat", "none")
    if not fused:
        final = _join(xp, hidden[-len(p.layers[0]) :], o.combine, "last")
        out = _pool_states(backend, p, out, final, run_seqlens, pool_weights)
    if o.normalize:
        out = unit(xp, out)
    return out, hidden, memory


def _fused(problem: Problem) -> bool:
    """Whether each direction's kernel can pool by itself, as it goes."""
    o = problem.options
    if o.residual or o.normalize_states:
        return False
    if problem.run_seqlens is not None:
        return o.pool in ("last", "first", "none")
    if len(problem.layers[0]) == 1 or o.pool == "none":
        return True
    # Two directions share the softmax, and are joined before what is not linear.
    return o.pool != "attention" if o.combine == "concat" else o.pool in ("last", "first", "mean", "lastmean")


def pool_only(backend: Backend, sequences: Sequences, pool: str, attention: Any, gpo: Any) -> Any:
    """Ragged or padded vectors to [B, F], without a cell."""
    x, cu_seqlens, steps = sequences[:3]
    weights = _pool_weights(backend, x, cu_seqlens, steps, pool, attention, gpo)
    count = x.shape[0] if x.ndim == 2 else x.shape[0] * x.shape[1]
    return backend.pool(backend.work(_ragged(backend, x, cu_seqlens, count)), cu_seqlens, pool, weights)


def _pool_weights(backend: Backend, x: Any, cu_seqlens: Any, steps: int, pool: str, attention: Any, gpo: Any) -> Any:
    """Of the steps, or of their features, as the kernels have them."""
    if pool == "attention":
        return backend.work(attention).reshape(-1)
    if pool == "gpo":
        count = x.shape[0] if x.ndim == 2 else x.shape[0] * x.shape[1]
        return gpo_coefficients(backend, gpo, cu_seqlens, count, steps)
    return None


def _join(xp: Any, parts: Sequence[Any], combine: str, pool: str) -> Any:
    """Two directions as one. Those of a pool that has two results, [B, 2P], are joined result by result."""
    if len(parts) == 1:
        return parts[0]
    if pool in ("meanmax", "lastmean"):
        half = parts[0].shape[-1] // 2
        return xp.concatenate(
            [_join(xp, [part[:, cut] for part in parts], combine, "mean") for cut in (slice(half), slice(half, None))],
            -1,
        )
    if combine == "concat":
        return xp.concatenate(parts, -1)
    total = parts[0] + parts[1]
    return total / 2 if combine == "average" else total


def _pool_states(backend: Backend, p: Problem, states: Any, final: Any, run_seqlens: Any, pool_weights: Any) -> Any:
    """What the kernels of the directions cannot pool by themselves."""
    o, xp, count = p.options, backend.xp, states.shape[0]
    if o.residual:
        states = states + backend.work(_ragged(backend, p.x, run_seqlens, count))
    states = _known(backend, states, run_seqlens)
    if o.normalize_states:
        states = unit(xp, states)
    if o.pool == "none":
        return states
    if p.run_seqlens is not None:
        states = _ragged(backend, states.reshape(*p.x.shape[:2], -1), p.cu_seqlens, count)
    if o.pool == "lastmean":
        return xp.concatenate([final, backend.pool(states, p.cu_seqlens, "mean", None)], -1)
    return backend.pool(states, p.cu_seqlens, o.pool, pool_weights)


def _known(backend: Backend, states: Any, cu_seqlens: Any) -> Any:
    """Zeros beyond the last step: what lies there may be anything, and 0 · nan is nan, in a gradient too."""
    return backend.xp.where((backend.arange(states.shape[0], cu_seqlens) < cu_seqlens[-1])[:, None], states, 0.0)


def _ragged(backend: Backend, x: Any, cu_seqlens: Any, count: int) -> Any:
    """Padded [B, T, I] as ragged [count, I]."""
    if x.ndim == 2:
        return x
    row = backend.rows_of(cu_seqlens, count)
    return x[row, (backend.arange(count, x) - cu_seqlens[row]).clip(0, x.shape[1] - 1)]


def padded(backend: Backend, states: Any, cu_seqlens: Any, steps: int) -> Any:
    """Ragged states as [B, T, F], zeros beyond each length."""
    step = backend.arange(steps, cu_seqlens)
    valid = step < (cu_seqlens[1:] - cu_seqlens[:-1])[:, None]
    place = backend.xp.where(valid, cu_seqlens[:-1, None] + step, 0)
    return backend.xp.where(valid[..., None], states[place], 0.0)


def unit(xp: Any, x: Any) -> Any:
    """Rows of norm 1; zero stays zero."""
    square = (x * x).sum(-1)[..., None]
    zero = square == 0
    return x * xp.where(zero, 0.0, 1.0 / xp.sqrt(xp.where(zero, 1.0, square)))


def gpo_coefficients(backend: Backend, gpo: Mapping[str, Any], cu_seqlens: Any, count: int, steps: int) -> Any:
    """For each of `count` ragged steps the coefficient of its rank: the softmax of a GRU over sines of the ranks.

    They depend on the sequence's length alone, and are computed once for each length, as ragged sequences of their own.
    """
    xp = backend.xp
    w = {name.removeprefix("gru."): backend.work(value) for name, value in gpo.items()}
    lengths, which, total = backend.distinct(cu_seqlens[1:] - cu_seqlens[:-1], count)
    starts = xp.concatenate([backend.arange(1, cu_seqlens), lengths.cumsum(0)])
    row = backend.rows_of(starts, total)
    rank, dim = backend.arange(steps, cu_seqlens), w["weight_ih_l0"].shape[1]
    angles = backend.double(rank)[:, None] * 10000.0 ** (-2.0 / dim * backend.double(backend.arange(dim // 2, rank)))
    sines = xp.stack([xp.sin(angles), xp.cos(angles)], -1).reshape(steps, dim)
    x = backend.cast(sines, w["linear.weight"])[(backend.arange(total, starts) - starts[row]).clip(0, steps - 1)]
    states: Any = 0
    for end in ("", "_reverse"):
        direction = Weights(*(w[f"{kind}_l0{end}"] for kind in Weights._fields[:4]))
        states = states + backend.cell(Direction(x, starts, direction, "gru", end != ""))[1]
    states = _known(backend, states, starts)
    # Added up in turn: a sum or a product would round by the number of rows and by the longest of them.
    scores = (states * w["linear.weight"][0]).cumsum(-1)[:, -1:] / (2 * GPO_TEMPERATURE)
    scores = _known(backend, scores - backend.pool(scores, starts, "max", None)[row], starts)
    weights = xp.exp(scores)
    sums = backend.pool(weights, starts, "mean", None) * backend.work(lengths)[:, None]
    weights = weights / xp.where(lengths == 0, 1.0, sums[:, 0])[row, None]
    row = backend.rows_of(cu_seqlens, count)
    place = backend.arange(count, cu_seqlens) - cu_seqlens[row] + starts[:-1][which[row]]
    return weights[place.clip(0, total - 1), 0]
