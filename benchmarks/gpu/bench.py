"""Measures the cases one after another, each into a file of its own: run it again and it goes on where it stopped.

    python benchmarks/gpu/bench.py --out FOLDER [--seconds 500] [--case 'topk-*'] [--tiny] [--device cpu]

`--tiny` on a CPU tests this program; such figures mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import time
import traceback
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import timing
import torch
from cases import Case, cases
from temporal_cases import temporal_cases

import pycm

ROUNDS = 7


def describe(device: torch.device) -> dict[str, Any]:
    root = Path(__file__).resolve().parents[2]
    commit = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "device": gpu.name if gpu else "CPU: these figures mean nothing",
        "multiprocessors": gpu.multi_processor_count if gpu else 0,
        "memory_bytes": gpu.total_memory if gpu else 0,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "pycm": pycm.__version__,
        "commit": commit.stdout.strip() or os.environ.get("PYCM_COMMIT"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def peak(call: timing.Call, device: torch.device) -> tuple[Any, int]:
    """What a call returns, and the most memory it has held beyond what was there before."""
    if device.type != "cuda":
        return call(), 0
    timing.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    timing.synchronize(device)
    return result, torch.cuda.max_memory_allocated(device) - before


def baseline(case: Case, floor: float, found: dict[str, Any]) -> Any:
    """The least of what was found of the case's baselines; None where none of them ran."""
    if case.baseline == "floor":
        return floor
    return min((found[name] for name in case.baseline.split(" or ") if name in found), default=None)


def measure(case: Case, device: torch.device, limits: dict[str, float], tiny: bool) -> dict[str, Any]:
    result: dict[str, Any] = {"name": case.name, "about": case.about, "baseline": case.baseline, "goal": case.goal}
    problem = case.make(device)
    inputs = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    answer, extra = peak(problem.pycm, device)
    problem.check(answer)
    del answer
    peaks = {"pycm": extra}
    calls, absent = {"pycm": problem.pycm, **problem.peers}, dict(problem.absent)
    for name, call in problem.peers.items():  # a peer that cannot run here is a line in the table, no end of the run
        try:
            call()
            peaks[name] = peak(call, device)[1]
        except Exception as error:
            del calls[name]
            absent[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    times = timing.in_turns(calls, device, 2 if tiny else ROUNDS, 20.0)
    median = {name: timing.median(values) for name, values in times.items()}
    floor = case.floor(limits)
    reference = baseline(case, floor, median)
    result |= {
        "seconds": times,
        "median": median,
        "floor": floor,
        "share": floor / median["pycm"],
        "ratio": {
            name: timing.median([theirs / ours for theirs, ours in zip(times[name], times["pycm"], strict=True)])
            for name in times
        },
        "absent": absent,
    }
    if device.type == "cuda":
        result |= {"input_bytes": inputs, "extra_bytes": extra, "peak_bytes": peaks}
        if case.memory:
            result["memory_reached"] = extra <= case.memory * inputs
        if case.peer_memory and (theirs := baseline(case, 0, peaks)):
            result |= {"memory_share": extra / theirs, "memory_goal": case.peer_memory}
            result["memory_reached"] = extra <= case.peer_memory * theirs
    result["score"] = None if reference is None else reference / median["pycm"]
    result["reached"] = None if reference is None else bool(result["score"] >= case.goal)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=500.0)
    parser.add_argument("--case", action="append", default=[])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    began = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    machine = options.out / "machine.json"
    if not machine.exists():
        found = {"limits": timing.limits(device, options.tiny), **describe(device)}
        machine.write_text(json.dumps(found, indent=1), encoding="utf-8")
    limits = json.loads(machine.read_text(encoding="utf-8"))["limits"]
    every = [*cases(options.tiny), *temporal_cases(options.tiny)]
    wanted = [c for c in every if not options.case or any(fnmatchcase(c.name, p) for p in options.case)]
    left = [case for case in wanted if not (options.out / f"case-{case.name}.json").exists()]
    failed = 0
    for done, case in enumerate(left):
        if time.perf_counter() - began > options.seconds:
            print(f"{len(left) - done} cases are left: run this again")
            return 3
        try:
            result = measure(case, device, limits, options.tiny)
        except Exception as error:
            failed += 1
            traceback.print_exc()
            result = {"name": case.name, "about": case.about, "failed": f"{type(error).__name__}: {error}"}
        (options.out / f"case-{case.name}.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
        print(
            case.name, result.get("failed") or f"{result['median']['pycm'] * 1e3:.3f} ms, {result['ratio']}", flush=True
        )
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
