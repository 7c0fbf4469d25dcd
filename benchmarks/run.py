"""Runs the cases: providers take turns in one process, so that other work on the machine hits all."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks import machine, report
from benchmarks.cases import OPS, Case, Data, all_cases
from benchmarks.check import disagreement
from benchmarks.providers import PROVIDERS, available, set_threads

# Before a turn: lets the previous library's waiting threads stop spinning. OpenBLAS's go on for more than 0.05 s,
# and take a quarter of the next one's speed.
REST_SECONDS = 0.3
LATENCY_CALLS = 2000


def seconds_of(call: Callable[[], Any], calls: int) -> float:
    """Per call."""
    began = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - began) / calls


def run_case(case: Case, repeats: int, budget: float, tiny: bool) -> dict[str, Any]:
    """Medians, and the ratio to pycm as the median over rounds, each round's calls being neighbours in time.

    Stops before `repeats` rounds, but not before three, when `budget` seconds are spent.
    """
    data = Data(case)
    calls: dict[str, Callable[[], Any]] = {}
    skipped: dict[str, str] = {}
    wrong: dict[str, str] = {}
    for name, (package, prepare) in PROVIDERS[case.op].items():
        if not available(package):
            skipped[name] = f"{package} is not installed"
            continue
        call = prepare(case, data)
        if call is None:
            continue
        problem = disagreement(case, data, name, call())  # the first call, untimed
        if problem is not None:
            wrong[name] = problem
        calls[name] = call

    loops = (20 if tiny else LATENCY_CALLS) if case.op == "latency" else 1
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    began = time.perf_counter()
    for turn in range(repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            time.sleep(REST_SECONDS)
            times[name].append(seconds_of(calls[name], loops))
        if turn >= 2 and time.perf_counter() - began > budget:
            break
    ours = times[names[0]]
    return {
        "case": case.describe(),
        "seconds": times,
        "median": {name: statistics.median(values) for name, values in times.items()},
        "ratio": {
            name: statistics.median(theirs / mine for theirs, mine in zip(values, ours, strict=True))
            for name, values in times.items()
        },
        "skipped": skipped,
        "wrong": wrong,
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--op", action="append", choices=OPS, help="only this operation; may be repeated")
    parser.add_argument("--match", default="", help="only cases whose name contains this, such as 'x100000x512'")
    parser.add_argument("--repeats", type=int, default=5, help="rounds per case (default: 5)")
    parser.add_argument("--budget", type=float, default=120, help="seconds per case after which rounds stop")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of every library")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown at the end")
    parser.add_argument("--tiny", action="store_true", help="tiny cases that test the runner and measure nothing")
    options = parser.parse_args(arguments)
    if options.repeats < 1 or options.threads < 1:
        parser.error("--repeats and --threads must be at least 1")
    return options


def write(path: Path, results: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(results, indent=1) + "\n")
        partial.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    pattern = options.match.replace("x", "×")
    cases = [
        case
        for case in all_cases(options.tiny)
        if case.op in (options.op or OPS) and pattern in case.name.replace("x", "×")
    ]
    if not cases:
        print(f"python -m benchmarks: no case matches {options.match!r}", file=sys.stderr)
        return 2
    set_threads(options.threads)
    results: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "tiny": options.tiny,
        "threads": options.threads,
        "machine": machine.describe(),
        "limits": machine.measure_limits(options.tiny),
        "results": [],
    }
    print(report.heading(results), flush=True)
    for case in cases:
        result = run_case(case, options.repeats, options.budget, options.tiny)
        results["results"].append(result)
        print(report.line(result), flush=True)
        if options.out is not None:
            write(options.out, results)
        gc.collect()
    if options.markdown:
        print(report.tables(results))
    wrong = {r["case"]["name"]: r["wrong"] for r in results["results"] if r["wrong"]}
    for name, problems in wrong.items():
        print(f"WRONG RESULT in {name}: {problems}", file=sys.stderr)
    return 1 if wrong else 0
