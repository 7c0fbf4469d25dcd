"""Takes the times: providers take turns in one process, so that other work on the machine hits all of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from . import machine
from .cases import Case
from .check import Checker
from .data import Data
from .features import UnavailableError
from .providers import PROVIDERS, chosen, missing
from .providers.base import Call, Provider

#: Of the JSON files: raised when a reader of the old ones would misunderstand.
SCHEMA = 2
# Before a turn: lets the previous library's waiting threads stop spinning. OpenBLAS's go on for more than 0.05 s,
# and take a quarter of the next one's speed.
REST_SECONDS = 0.3
CALL_LOOPS = 2000
# Rounds that are taken even when the budget is spent, and the share of it above which a peer is timed once only.
LEAST_ROUNDS = 3
SLOW_SHARE = 0.25


@dataclass(frozen=True)
class Options:
    """Of a run: rounds a case at most, seconds a case after which they stop, threads of every library."""

    repeats: int = 5
    budget: float = 120.0
    threads: int = 1
    tiny: bool = False
    providers: tuple[str, ...] = ()


def begin(options: Options) -> dict[str, Any]:
    """The head of the results: when, where, with what limits."""
    return {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "tiny": options.tiny,
        "threads": options.threads,
        "repeats": options.repeats,
        "machine": machine.describe(),
        "limits": machine.measure_limits(options.threads, options.tiny),
        "results": [],
    }


def run_cases(cases: Sequence[Case], options: Options, limits: machine.Limits) -> Iterator[dict[str, Any]]:
    """The result of each case, as `run_case` returns it."""
    for case in cases:
        yield run_case(case, options, limits)
        gc.collect()


def run_case(case: Case, options: Options, limits: machine.Limits) -> dict[str, Any]:
    """Times of every provider.

    Returns:
        ``case``; ``seconds``: provider to its time in each round; ``median``; ``ratio``: median over the rounds, whose
        calls are neighbours in time, of (its time / pycm's); ``prepare``: seconds spent before its first call;
        ``bounds``: see `machine.bounds`; ``skipped`` and ``wrong``: provider to reason.
    """
    providers = chosen(case.op, options.providers)
    result: dict[str, Any] = {
        "case": case.describe(),
        "seconds": {},
        "median": {},
        "ratio": {},
        "prepare": {},
        "bounds": machine.bounds(case, limits),
        "skipped": {},
        "wrong": {},
    }
    try:
        data = Data(case)
    except UnavailableError as reason:
        result["skipped"] = {provider.name: str(reason) for provider in providers}
        return result
    calls, first = _prepare(case, data, providers, result)
    times = _rounds(calls, first, case, options)
    result["seconds"] = times
    result["median"] = {name: statistics.median(values) for name, values in times.items()}
    if base := next((name for name in times if name.startswith("pycm")), None):
        result["ratio"] = {name: ratio(result, name, base) for name in times}
    return result


def ratio(result: dict[str, Any], name: str, base: str) -> float:
    """Median over the rounds both took part in of (the provider's time / the base's): above 1 the base is faster."""
    times = result["seconds"]
    return float(statistics.median(a / b for a, b in zip(times[name], times[base], strict=False)))


def _prepare(
    case: Case, data: Data, providers: Sequence[Provider], result: dict[str, Any]
) -> tuple[dict[str, Call], dict[str, float]]:
    """The calls to be timed and the seconds of the first of each, which is checked and not counted."""
    checker = Checker(case, data)
    calls: dict[str, Call] = {}
    first: dict[str, float] = {}
    if not any(provider.name.startswith("pycm") for provider in providers):
        checker.check("pycm", PROVIDERS[case.op][0].prepare(case, data)())  # what the peers are held against
    for provider in providers:
        name = provider.name
        if reason := missing(provider):
            result["skipped"][name] = reason
            continue
        began = time.perf_counter()
        try:
            call = provider.prepare(case, data)
            prepared = time.perf_counter()
            found = call()
        except (UnavailableError, ImportError) as error:
            result["skipped"][name] = str(error)
            continue
        except Exception as error:
            if name.startswith("pycm"):
                raise
            checker.wrong[name] = f"{type(error).__name__}: {error}"  # reported at the end, and the run fails
            continue
        first[name] = time.perf_counter() - prepared
        result["prepare"][name] = prepared - began
        calls[name] = call
        checker.check(name, found)
    result["wrong"] = checker.wrong
    return calls, first


def _rounds(calls: dict[str, Call], first: dict[str, float], case: Case, options: Options) -> dict[str, list[float]]:
    loops = 1 if case.op != "call" else 20 if options.tiny else CALL_LOOPS
    limit = SLOW_SHARE * options.budget
    slow = {name for name, seconds in first.items() if seconds > limit and not name.startswith("pycm")}
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    began = time.perf_counter()
    for turn in range(options.repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)] if names else []:
            if turn and name in slow:
                continue
            if not options.tiny:
                time.sleep(REST_SECONDS)
            times[name].append(_seconds(calls[name], loops))
        if turn + 1 >= LEAST_ROUNDS and time.perf_counter() - began > options.budget:
            break
    return times


def _seconds(call: Callable[[], Any], loops: int) -> float:
    began = time.perf_counter()
    for _ in range(loops):
        call()
    return (time.perf_counter() - began) / loops
