"""How near temporal_pool and its gradients are to torch's own cells in fp32, and to fp64 where torch rounds as well."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import temporal_cases as cases
from test_temporal_pool_torch import close, frames, rnn_of, torch
from tolerances import TEMPORAL, TEMPORAL_GRADIENT, TEMPORAL_LOW_PRECISION_RATIO
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import pycm
from pycm.temporal import POOLS

LENGTHS = (17, 3, 0, 29, 1, 8, 29)
# What nn.LSTM or nn.GRU is asked for, and how its directions are joined.
SHAPES: dict[str, tuple[dict[str, Any], str]] = {
    "one": ({}, "concat"),
    "no-bias": ({"bias": False}, "concat"),
    "layers": ({"num_layers": 3}, "concat"),
    "projection": ({"proj_size": 24}, "concat"),
    "concat": ({"bidirectional": True, "num_layers": 2}, "concat"),
    "average": ({"bidirectional": True}, "average"),
    "sum": ({"bidirectional": True}, "sum"),
    "projections": ({"bidirectional": True, "num_layers": 2, "proj_size": 5}, "sum"),
}
PAIRS = [(c, s) for c in cases.CELLS for s in SHAPES if c == "lstm" or "projection" not in s]
POOL = pytest.mark.parametrize("pool", POOLS)
LOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


class Case(NamedTuple):
    """What can have a gradient, by name, and the rest."""

    tensors: dict[str, Tensor]
    lengths: Tensor
    rnn: Any
    pool: str
    combine: str

    @property
    def exists(self) -> Tensor:
        return torch.arange(self.tensors["x"].shape[1]) < self.lengths[:, None]

    def to(self, dtype: Any) -> Case:
        """The same numbers, each tensor a leaf of its own."""
        return self._replace(tensors={name: t.detach().to(dtype).requires_grad_() for name, t in self.tensors.items()})

    def part(self, *begins: str) -> dict[str, Tensor]:
        return {name: t for name, t in self.tensors.items() if name.startswith(begins)}


def case_of(
    cell: str, pool: str, shape: str, lengths: Sequence[int] = LENGTHS, inputs: int = 21, hidden: int = 33
) -> Case:
    kinds, combine = SHAPES[shape]
    rnn = rnn_of(cell, inputs, hidden, **kinds)
    draw = torch.Generator().manual_seed(6)
    tensors = {"x": frames(lengths, inputs), **dict(rnn.named_parameters())}
    directions, state = 1 + rnn.bidirectional, rnn.proj_size or hidden
    for name, size in {"h0": state, "c0": hidden}.items():
        if cell == "lstm" or name == "h0":
            tensors[name] = torch.randn(directions * rnn.num_layers, len(lengths), size, generator=draw) / 2
    if pool == "attention":
        tensors["attention"] = torch.randn(state * (directions if combine == "concat" else 1), generator=draw)
    if pool == "gpo":
        tensors.update({name: torch.from_numpy(w).float() for name, w in cases.gpo_weights().items()})
    return Case(tensors, torch.tensor(lengths), rnn, pool, combine)


def by_pycm(case: Case) -> tuple[Tensor, ...]:
    """Pooled, h_n and, of an LSTM, c_n."""
    tensors, cell = case.tensors, case.rnn.mode.lower()
    pooled, state = pycm.temporal_pool(
        tensors["x"], case.lengths, case.part("weight", "bias"), cell, case.pool, combine=case.combine,
        h0=tensors["h0"], c0=tensors.get("c0"), attention=tensors.get("attention"),
        gpo=case.part("gru", "linear") or None, return_state=True,
    )  # fmt: skip
    return (pooled, *(state if cell == "lstm" else (state,)))


def by_torch(case: Case) -> tuple[Tensor, ...]:
    """The same by nn.LSTM or nn.GRU of a packed sequence and torch's operators.

    torch refuses rows without steps: they are left out, and what is documented of them is put in.
    """
    rows = case.lengths.nonzero()[:, 0]
    lengths, valid = case.lengths[rows], case.exists[rows]
    hx = tuple(t[:, rows] for name, t in case.part("h0", "c0").items())
    packed = pack_padded_sequence(
        case.tensors["x"][rows].masked_fill(~valid[..., None], 0), lengths, batch_first=True, enforce_sorted=False
    )
    weights = case.part("weight", "bias")
    out, last = torch.func.functional_call(case.rnn, weights, (packed, hx if len(hx) == 2 else hx[0]))
    pooled = pool_of_torch(
        case, pad_packed_sequence(out, batch_first=True, total_length=valid.shape[1])[0], lengths, valid
    )
    pooled = pooled.new_zeros(len(case.lengths), *pooled.shape[1:]).index_copy(0, rows, pooled)
    last = last if isinstance(last, tuple) else (last,)
    return (
        pooled,
        *(t.index_copy(1, rows, found) for t, found in zip(case.part("h0", "c0").values(), last, strict=True)),
    )


def pool_of_torch(case: Case, states: Tensor, lengths: Tensor, valid: Tensor) -> Tensor:
    directions = states.chunk(1 + case.rnn.bidirectional, -1)

    def joined(parts: Any) -> Tensor:
        parts = list(parts)
        return (
            torch.cat(parts, -1) if case.combine == "concat" else sum(parts) / (2 if case.combine == "average" else 1)
        )

    def own(*steps: Any) -> Tensor:
        return joined(part[torch.arange(len(lengths)), at] for part, at in zip(directions, steps, strict=False))

    both = joined(directions)

    def gpo() -> Tensor:
        linear = case.tensors["linear.weight"]
        steps, dim = valid.shape[1], case.tensors["gru.weight_ih_l0"].shape[1]
        angles = torch.arange(steps)[:, None] * torch.exp(torch.arange(0, dim, 2) * -(math.log(10000) / dim))
        sines = torch.stack([angles.sin(), angles.cos()], -1).reshape(steps, dim).to(linear.dtype)
        gru = torch.nn.GRU(dim, linear.shape[1], batch_first=True, bidirectional=True)
        weights = {name.removeprefix("gru."): w for name, w in case.part("gru").items()}
        packed = pack_padded_sequence(
            sines.expand(len(lengths), -1, -1), lengths, batch_first=True, enforce_sorted=False
        )
        ranks = pad_packed_sequence(torch.func.functional_call(gru, weights, (packed,))[0], batch_first=True)[0]
        scores = (sum(ranks.chunk(2, -1)) / 2 @ linear[0] / 0.1).masked_fill(~valid, -torch.inf)
        ordered = both.masked_fill(~valid[..., None], -torch.inf).sort(1, descending=True).values
        return (ordered.masked_fill(~valid[..., None], 0) * scores.softmax(1)[..., None]).sum(1)

    pools: dict[str, Callable[[], Tensor]] = {
        "last": lambda: own(lengths - 1, 0),
        "first": lambda: own(0, lengths - 1),
        "mean": lambda: (both * valid[..., None]).sum(1) / lengths[:, None],
        "max": lambda: both.masked_fill(~valid[..., None], -torch.inf).max(1).values,
        "attention": lambda: (
            (both @ case.tensors["attention"]).masked_fill(~valid, -torch.inf).softmax(1)[..., None] * both
        ).sum(1),
        "gpo": gpo,
        "meanmax": lambda: torch.cat([pools["mean"](), pools["max"]()], 1),
        "lastmean": lambda: torch.cat([pools["last"](), pools["mean"]()], 1),
        "none": lambda: both,
    }
    return pools[case.pool]()


def with_gradients(
    function: Callable[[Case], tuple[Tensor, ...]], case: Case, ways: Sequence[Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Results, and the gradients of all tensors."""
    results = function(case)
    gradients = torch.autograd.grad(
        results, list(case.tensors.values()), [way.to(found.dtype) for way, found in zip(ways, results, strict=True)]
    )
    names = ("pooled", "h_n", "c_n")
    return {name: found.detach() for name, found in zip(names, results, strict=False)}, dict(
        zip(case.tensors, gradients, strict=True)
    )


def ways_of(results: Sequence[Tensor]) -> list[Tensor]:
    """Into which a gradient is taken: 16 bits hold them."""
    draw = torch.Generator().manual_seed(7)
    return [torch.randn(found.shape, generator=draw).bfloat16().to(torch.float16) for found in results]


@POOL
@pytest.mark.parametrize(("cell", "shape"), PAIRS)
def test_values_and_gradients_of_torch(cell: str, shape: str, pool: str) -> None:
    case = case_of(cell, pool, shape).to(torch.float32)
    ways = ways_of(by_torch(case))
    (ours, our_grads), (theirs, their_grads) = (with_gradients(way, case, ways) for way in (by_pycm, by_torch))
    for name, want in theirs.items():
        torch.testing.assert_close(ours[name], want, rtol=0, atol=TEMPORAL["float32"])
    for name, want in their_grads.items():
        close(our_grads[name], want, TEMPORAL_GRADIENT)


def clear_maxima(case: Case) -> Tensor:
    """[B, F], where a feature's greatest value is no matter of rounding: a tie broken otherwise is no error."""
    states = by_torch(case._replace(pool="none"))[0].masked_fill(~case.exists[..., None], -1e3)
    greatest = states.topk(2, 1).values
    return greatest[:, 0] - greatest[:, 1] > 2**-5


def as_good_as_torch(case: Case) -> None:
    """Results and gradients of what the dtype holds, against fp64; torch's own error is the measure."""
    wide = case.to(torch.float64)
    ways = ways_of(by_torch(wide))
    if case.pool in ("max", "meanmax"):
        clear = clear_maxima(wide)
        ways[0] = ways[0] * torch.cat([torch.ones_like(clear)] * (case.pool == "meanmax") + [clear], 1)
    found, others, truth = (
        with_gradients(way, given, ways) for way, given in ((by_pycm, case), (by_torch, case), (by_torch, wide))
    )
    for ours, theirs, want in zip(found, others, truth, strict=True):
        for name in want:
            assert ours[name].dtype == case.tensors["x"].dtype
            error, allowed = ((got[name].double() - want[name]).norm() for got in (ours, theirs))
            assert error <= TEMPORAL_LOW_PRECISION_RATIO * allowed, (name, error / allowed)


@LOW
@POOL
@pytest.mark.parametrize(
    ("cell", "shape"), [pair for pair in PAIRS if pair[1] in ("one", "projection", "concat", "sum")]
)
def test_low_precision_is_as_good_as_torch(cell: str, shape: str, pool: str, dtype: Any) -> None:
    as_good_as_torch(case_of(cell, pool, shape).to(dtype))


@LOW
@pytest.mark.parametrize(("cell", "shape"), [("lstm", "projection"), ("gru", "one")])
def test_low_precision_at_every_level(cell: str, shape: str, dtype: Any, level: str) -> None:
    as_good_as_torch(case_of(cell, "mean", shape).to(dtype))
