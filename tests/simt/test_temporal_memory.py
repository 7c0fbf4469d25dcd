"""What a training step of temporal pooling holds on CUDA, counted by torch's allocations on the way taken there.

Kernels and products are left out, so that a batch of its real size can be counted: what they allocate is their result
and, of kernels, the workspace that they ask for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import pycm
from pycm import _torch_cuda, _torch_temporal_cuda

MIB = 1 << 20
BATCH, STEPS, HIDDEN = 128, 256, 1024


def cudnn_bytes(copies: int) -> int:
    """Of torch's LSTM in 16 bits: four gates and c of each unit and step; the states, their gradient, and that of x,
    which is always computed. `copies`: of what is not [T, B, H].
    """
    array = BATCH * STEPS * HIDDEN * 2
    return (5 + 3 + copies) * array


def held(call: Callable[[], Any]) -> int:
    """The most bytes that torch held at a time, beyond what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    most = total = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


@pytest.fixture
def counted(dispatched: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(name: str, like: torch.Tensor, *arguments: Any) -> None:
        size = getattr(_torch_cuda._kernels, f"cuda_{name}_workspace_bytes")(*arguments)
        _torch_cuda._workspace(like, size)

    def product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(a.shape[0], b.shape[1])

    monkeypatch.setenv("PYCM_SIMT_MULTIPROCESSORS", "132")  # of an H100
    monkeypatch.setattr(_torch_temporal_cuda, "_call", call)
    monkeypatch.setattr(_torch_temporal_cuda, "_mm", product)


def step(pool: str, of_x: bool) -> int:
    module = pycm.nn.TemporalPool(HIDDEN, HIDDEN, "lstm", pool).half()
    x = torch.zeros(BATCH, STEPS, HIDDEN, dtype=torch.float16, requires_grad=of_x)
    wanted = [*module.parameters(), *([x] if of_x else [])]
    lengths = torch.full((BATCH,), STEPS)
    return held(lambda: torch.autograd.grad(module(x, lengths).sum(), wanted))


@pytest.mark.parametrize("arch", ["90"], indirect=True)
@pytest.mark.parametrize("pool", ["mean", "max", "meanmax", "attention", "gpo"])
def test_a_third_of_cudnn(counted: None, pool: str) -> None:
    """Without a gradient of x beside cuDNN's least, with one beside what it takes of [B, T, I]."""
    for of_x, copies in ((False, 0), (True, 2)):
        found = step(pool, of_x)
        assert 3 * found <= cudnn_bytes(copies), f"{found / MIB:.0f} of {cudnn_bytes(copies) / MIB:.0f} MiB"
