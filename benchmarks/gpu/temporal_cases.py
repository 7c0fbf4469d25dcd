"""Temporal pooling beside cuDNN, padded and packed, and torch.compile: forward, and forward with backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from cases import Case, Limits, Problem
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import pycm

RNNS = {"lstm": nn.LSTM, "gru": nn.GRU}
GATES = {"lstm": 4, "gru": 3}


def torch_pool(rnn: nn.Module, x: Tensor, lengths: Tensor, packed: bool) -> Callable[[], Tensor]:
    """The mean over the steps; packing wants the lengths on the host, where they are already."""
    host, device = lengths, lengths.to(x.device)
    mask = (torch.arange(x.shape[1], device=x.device) < device[:, None])[..., None]

    def padded() -> Tensor:
        return (rnn(x)[0] * mask).sum(1) / device[:, None]

    def pack() -> Tensor:
        out = rnn(pack_padded_sequence(x, host, batch_first=True, enforce_sorted=False))[0]
        return pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])[0].sum(1) / device[:, None]

    return pack if packed else padded


def temporal_case(
    cell: str, dtype: torch.dtype, batch: int, steps: int, hidden: int, goal: float, *, backward: bool = False,
    ragged: bool = False, bidirectional: bool = False, memory: float = 0.0,
) -> Case:  # fmt: skip
    def make(device: torch.device) -> Problem:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(batch, steps, hidden, generator=generator).to(device, dtype)
        lengths = torch.full((batch,), steps)
        if ragged:
            lengths = torch.randint(max(1, steps // 8), steps + 1, (batch,), generator=generator)
        rnn = RNNS[cell](hidden, hidden, batch_first=True, bidirectional=bidirectional).to(device, dtype)
        mine, where = pycm.nn.TemporalPool.from_torch(rnn, "mean"), lengths.to(device)

        def trained(call: Callable[[], Tensor]) -> Callable[[], Any]:
            if not backward:
                return torch.no_grad()(call)
            return lambda: torch.autograd.grad(call().sum(), list(rnn.parameters()))

        names = {"cudnn padded": False, "cudnn packed": True}
        found = {name: trained(torch_pool(rnn, x, lengths, packed)) for name, packed in names.items()}
        found["torch.compile"] = trained(torch.compile(torch_pool(rnn, x, lengths, packed=False)))

        def check(result: Any) -> None:
            theirs = found["cudnn packed"]()
            for a, b in zip(result, theirs, strict=True):
                assert (a.float() - b.float()).norm() <= 0.05 * b.float().norm()

        return Problem(trained(lambda: mine(x, where)), found, check)

    def floor(limits: Limits) -> float:
        directions = 2 if bidirectional else 1
        work = 2.0 * 2 * batch * steps * hidden * hidden * GATES[cell] * directions * (3 if backward else 1)
        kind = {torch.float16: "float16", torch.bfloat16: "bfloat16"}.get(dtype, "float32")
        return work / limits[kind]

    kinds = [word for word, wanted in (("bi", bidirectional), ("ragged", ragged), ("train", backward)) if wanted]
    name = "-".join(["temporal", cell, str(dtype).removeprefix("torch."), f"{batch}x{steps}x{hidden}", *kinds])
    about = f"{cell.upper()} and its mean, B {batch}, T {steps}, H {hidden}, {', '.join([str(dtype)[6:], *kinds])}"
    return Case(name, about, "cudnn packed" if ragged else "cudnn padded", goal, make, floor, memory)


def temporal_cases(tiny: bool = False) -> Iterator[Case]:
    half, brain = torch.float16, torch.bfloat16
    if tiny:
        yield temporal_case("lstm", torch.float32, 3, 5, 16, 0.0)
        yield temporal_case("gru", torch.float32, 3, 5, 16, 0.0, backward=True, ragged=True, bidirectional=True)
        return
    # Where cuDNN is persistent, and the shape that is published for it.
    for batch, steps, hidden in ((64, 64, 512), (128, 64, 512), (16, 1024, 768)):
        yield temporal_case("lstm", half, batch, steps, hidden, 1.3)
        yield temporal_case("lstm", half, batch, steps, hidden, 1.2, backward=True)
    for cell in RNNS:
        for batch, steps, hidden in ((128, 64, 512), (64, 512, 256), (256, 12, 512), (128, 64, 1024)):
            for goal, backward in ((4.0, False), (2.5, True)):
                yield temporal_case(cell, brain, batch, steps, hidden, goal, backward=backward, ragged=True)
        yield temporal_case(cell, brain, 128, 64, 512, 4.0, bidirectional=True, ragged=True)
        yield temporal_case(cell, half, 1, 64, 512, 2.0)
        yield temporal_case(cell, half, 512, 32, 512, 1.5)
        yield temporal_case(cell, torch.float32, 128, 64, 256, 1.0)
    yield temporal_case("lstm", brain, 128, 12, 512, 5.0, ragged=True)
    yield temporal_case("lstm", half, 128, 256, 1024, 1.2, backward=True)
