"""Temporal pooling beside cuDNN, padded and packed, torch.compile, and a Triton kernel: forward, and with backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from cases import Case, Limits, Problem, offered
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import pycm

RNNS = {"lstm": nn.LSTM, "gru": nn.GRU}
GATES = {"lstm": 4, "gru": 3}
CUDNN = "cudnn padded or cudnn packed"  # which of its algorithms runs differs by shape: the faster one is the baseline


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


def triton_pool(rnn: Any, x: Tensor, lengths: Tensor) -> Callable[[], Tensor]:
    import block_recurrence

    if x.device.type != "cuda" or x.element_size() != 2 or rnn.hidden_size % 64 or rnn.bidirectional:
        raise NotImplementedError("one direction, half precision, H a multiple of 64")
    where = lengths.to(x.device)
    return lambda: block_recurrence.mean_pool(rnn, x, where)


def torch_clip_head(rnn: nn.Module, x: Tensor, lengths: Tensor) -> Callable[[], Tensor]:
    """CLIP4Clip's sequential head, by its equations: states and x, each step to norm 1, their mean to norm 1."""
    device = lengths.to(x.device)
    mask = (torch.arange(x.shape[1], device=x.device) < device[:, None])[..., None]

    def head() -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out = pad_packed_sequence(rnn(packed)[0], batch_first=True, total_length=x.shape[1])[0]
        steps = normalize(out + x, dim=-1) * mask
        return normalize(steps.sum(1) / device[:, None], dim=-1)

    return head


def close(result: Any, theirs: Any) -> None:
    for a, b in zip(result, theirs, strict=True):
        assert (a.float() - b.float()).norm() <= 0.05 * b.float().norm()


def temporal_case(
    cell: str, dtype: torch.dtype, batch: int, steps: int, hidden: int, goal: float, *, backward: bool = False,
    ragged: bool = False, bidirectional: bool = False, every_peer: bool = False, peer_memory: float = 0.0,
) -> Case:  # fmt: skip
    """`every_peer`: with those that take seconds to compile."""

    def make(device: torch.device) -> Problem:
        x, lengths, rnn = problem(cell, dtype, batch, steps, hidden, ragged, bidirectional, device)
        mine, where = pycm.nn.TemporalPool.from_torch(rnn, "mean"), lengths.to(device)

        def trained(call: Callable[[], Tensor]) -> Callable[[], Any]:
            if not backward:
                return torch.no_grad()(call)
            return lambda: torch.autograd.grad(call().sum(), list(rnn.parameters()))

        names = {"cudnn padded": False, "cudnn packed": True}
        found = {name: trained(torch_pool(rnn, x, lengths, packed)) for name, packed in names.items()}
        absent = {}
        if every_peer:
            found["torch.compile"] = trained(torch.compile(torch_pool(rnn, x, lengths, packed=False)))
        if every_peer and not backward:
            more, absent = offered(triton=lambda: torch.no_grad()(triton_pool(rnn, x, lengths)))
            found |= more
        packed = found["cudnn packed"]
        return Problem(trained(lambda: mine(x, where)), found, lambda result: close(result, packed()), absent)

    kinds = [word for word, wanted in (("bi", bidirectional), ("ragged", ragged), ("train", backward)) if wanted]
    name = "-".join(["temporal", cell, str(dtype).removeprefix("torch."), f"{batch}x{steps}x{hidden}", *kinds])
    about = f"{cell.upper()} and its mean, B {batch}, T {steps}, H {hidden}, {', '.join([str(dtype)[6:], *kinds])}"
    passes = (2 if bidirectional else 1) * (3 if backward else 1)
    floor = products(cell, dtype, batch * steps * passes, hidden)
    return Case(name, about, CUDNN, goal, make, floor, peer_memory=peer_memory)


def clip_head_case(batch: int, steps: int, hidden: int, goal: float) -> Case:
    def make(device: torch.device) -> Problem:
        x, lengths, rnn = problem("lstm", torch.float16, batch, steps, hidden, True, False, device)
        options = {"residual": True, "normalize_states": True, "normalize": True}
        mine, where = pycm.nn.TemporalPool.from_torch(rnn, "mean", **options), lengths.to(device)
        head = torch.no_grad()(torch_clip_head(rnn, x, lengths))
        found = {"cudnn packed": head, "torch.compile": torch.compile(head)}
        return Problem(torch.no_grad()(lambda: mine(x, where)), found, lambda result: close(result, head()))

    about = f"CLIP4Clip's sequential head, B {batch}, T {steps}, H {hidden}, float16"
    floor = products("lstm", torch.float16, batch * steps, hidden)
    return Case(f"temporal-clip-head-{batch}x{steps}x{hidden}", about, "cudnn packed", goal, make, floor)


def problem(
    cell: str, dtype: torch.dtype, batch: int, steps: int, hidden: int, ragged: bool, bidirectional: bool,
    device: torch.device,
) -> tuple[Tensor, Tensor, Any]:  # fmt: skip
    """Frames, their lengths on the host, and the network."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, steps, hidden, generator=generator).to(device, dtype)
    lengths = torch.full((batch,), steps)
    if ragged:
        lengths = torch.randint(max(1, steps // 8), steps + 1, (batch,), generator=generator)
    return x, lengths, RNNS[cell](hidden, hidden, batch_first=True, bidirectional=bidirectional).to(device, dtype)


def products(cell: str, dtype: torch.dtype, steps: int, hidden: int) -> Callable[[Limits], float]:
    kind = {torch.float16: "float16", torch.bfloat16: "bfloat16"}.get(dtype, "float32")
    return lambda limits: 2.0 * 2 * steps * hidden * hidden * GATES[cell] / limits[kind]


def temporal_cases(tiny: bool = False) -> Iterator[Case]:
    """Each row of the goals, those that say most first."""
    half, brain = torch.float16, torch.bfloat16
    if tiny:
        yield temporal_case("lstm", torch.float32, 3, 5, 16, 0.0, every_peer=True)
        yield temporal_case("gru", torch.float32, 3, 5, 16, 0.0, backward=True, ragged=True, bidirectional=True)
        yield clip_head_case(3, 5, 16, 0.0)
        return
    # Where cuDNN is persistent, and the shape that is published for it.
    for batch, steps, hidden in ((128, 64, 512), (16, 1024, 768), (16, 64, 512)):
        yield temporal_case("lstm", half, batch, steps, hidden, 1.3, every_peer=batch == 128)
        yield temporal_case("lstm", half, batch, steps, hidden, 1.2, backward=True)
    # Where it is not.
    yield clip_head_case(128, 12, 512, 5.0)
    for cell in RNNS:
        main = (128, 64, 512)
        for size in (main, (64, 512, 256), (256, 12, 512), (128, 64, 1024)):
            for goal, backward in ((4.0, False), (2.5, True)):
                yield temporal_case(cell, brain, *size, goal, backward=backward, ragged=True, every_peer=size == main)
        for goal, backward in ((4.0, False), (2.5, True)):
            yield temporal_case(cell, brain, *main, goal, backward=backward, bidirectional=True, ragged=True)
            yield temporal_case(cell, half if cell == "gru" else brain, *main, goal, backward=backward)
        yield temporal_case(cell, half, 1, 64, 512, 2.0, every_peer=True)
        yield temporal_case(cell, half, 512, 32, 512, 1.5)
        yield temporal_case(cell, brain, 1024, 32, 768, 1.5, ragged=True)
    yield temporal_case("lstm", half, 128, 256, 1024, 1.2, backward=True, peer_memory=1 / 3)
    yield temporal_case("lstm", torch.float32, 128, 64, 256, 1.0)
