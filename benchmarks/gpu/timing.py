"""Times on a device: events around queued calls, providers in turns, a median; and what the device can do at best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], Any]

WARM_UP = 2
# A turn of a provider is as many calls as take about this long: launches queue up behind one another.
TURN_SECONDS = 0.05


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Call, device: torch.device, loops: int = 1) -> float:
    """Of one call, by the device's own clock."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(loops):
            call()
        return (time.perf_counter() - began) / loops
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(loops):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / loops


def in_turns(calls: dict[str, Call], device: torch.device, rounds: int, budget: float) -> dict[str, list[float]]:
    """Seconds of each provider in each round; after two rounds they stop when the budget, in seconds, is spent."""
    loops = {}
    for name, call in calls.items():
        for _ in range(WARM_UP):
            call()
        synchronize(device)
        loops[name] = max(1, int(TURN_SECONDS / max(seconds(call, device), 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    names, began = list(calls), time.perf_counter()
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(seconds(calls[name], device, loops[name]))
        if turn >= 1 and time.perf_counter() - began > budget:
            break
    return times


def median(times: list[float]) -> float:
    return statistics.median(times)


def limits(device: torch.device, tiny: bool = False) -> dict[str, float]:
    """Bytes per second of a copy (read and written), operations per second of torch's products of random matrices."""
    size, count = (128, 1 << 16) if tiny else (8192, 1 << 30)
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = {"copy": 2 * count / _best(lambda: target.copy_(source), device)}
    for name, dtype in (("float32", torch.float32), ("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        found[name] = 2 * size**3 / _best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device)  # type: ignore[misc]
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        a, b = (torch.randn(size, size, device=device) for _ in range(2))
        found["tf32"] = 2 * size**3 / _best(lambda: a @ b, device)
        torch.backends.cuda.matmul.allow_tf32 = False
    c, d = (torch.randint(-127, 127, (size, size), dtype=torch.int8, device=device) for _ in range(2))
    found["int8"] = 2 * size**3 / _best(lambda: torch._int_mm(c, d.T), device)
    return found


def _best(call: Call, device: torch.device, repeats: int = 20) -> float:
    for _ in range(3):
        call()
    synchronize(device)
    return min(seconds(call, device) for _ in range(repeats))
