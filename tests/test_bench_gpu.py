"""The program of benchmarks/gpu, on the CPU and stubs: what it counts, what it checks, and the table."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks" / "gpu"
LIMITS = {"float32": 1e12, "float16": 1e12, "bfloat16": 1e12, "copy": 1e12}
CPU = torch.device("cpu")


class Program(NamedTuple):
    bench: ModuleType
    cases: ModuleType
    temporal_cases: ModuleType
    report: ModuleType


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Iterator[Program]:
    """Its modules by their own names, some of which those of the tests have too."""
    names = ["timing", "peers", *Program._fields]
    before = {name: sys.modules.pop(name, None) for name in names}
    monkeypatch.syspath_prepend(str(FOLDER))
    yield Program(*(__import__(name) for name in Program._fields))
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


def case(program: Program, **problem: Any) -> Any:
    made = program.cases.Problem(**problem)
    return program.cases.Case("one", "a test", "a or b", 1.0, lambda device: made, lambda limits: 1e-3)


def test_memory_is_that_of_a_warm_call(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    made = dict.fromkeys(("pycm", "a"), 0)
    at_peak = []

    def call(name: str) -> Callable[[], str]:
        def run() -> str:
            made[name] += 1
            return name

        return run

    def peak(call: Callable[[], str], device: Any) -> tuple[str, int]:
        name = call()
        at_peak.append((name, made[name]))
        return name, 0

    monkeypatch.setattr(program.bench, "peak", peak)
    program.bench.measure(case(program, pycm=call("pycm"), peers={"a": call("a")}), CPU, LIMITS, True)
    assert at_peak == [("pycm", 2), ("a", 2)]


def test_a_wrong_peer_has_no_time(program: Program) -> None:
    def check(result: int) -> None:
        assert result == 1, f"it is {result}"

    peers = {"a": lambda: 2, "b": lambda: 1, "other function": lambda: 3, "broken": lambda: 1 // 0}
    found = program.bench.measure(
        case(program, pycm=lambda: 1, peers=peers, check=check, peer_checks=dict.fromkeys(("a", "b", "broken"), check)),
        CPU, LIMITS, True,
    )  # fmt: skip
    assert set(found["seconds"]) == set(found["ratio"]) == {"pycm", "b", "other function"}
    assert found["wrong"] == {"a": found["wrong"]["a"]}
    assert found["wrong"]["a"].startswith("AssertionError: it is 2")
    assert set(found["absent"]) == {"broken"}
    assert found["score"] == found["median"]["b"] / found["median"]["pycm"]  # a is no baseline
    assert "a WRONG: AssertionError: it is 2" in program.report.line(json.loads(json.dumps(found)))
    with pytest.raises(AssertionError):
        program.bench.measure(case(program, pycm=lambda: 2, peers={}, check=check), CPU, LIMITS, True)


@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_matches_of_peers_are_checked(program: Program, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    def offered(**makers: Callable[[], Any]) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
        return {name: makers[name]() for name in ("torch", "product alone")}, {}

    monkeypatch.setattr(program.cases, "offered", offered)  # the others take seconds to import
    problem = program.cases.topk_case(8, 300, 64, 10, precision, 0.0).make(CPU)
    assert set(problem.peer_checks) == {"torch"}
    scores, indices = problem.peers["torch"]()
    check = problem.peer_checks["torch"]
    check((scores, indices))
    for wrong, reason in ((indices.roll(1, 0), "below the k-th best"), (indices[:, :1].expand(-1, 10), "different")):
        with pytest.raises(AssertionError, match=reason):
            check((scores, wrong))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("ragged", "bidirectional"), [(True, False), (False, True), (True, True)])
def test_temporal_peers_are_the_same_function(
    program: Program, backward: bool, ragged: bool, bidirectional: bool
) -> None:
    """Padded, a ragged batch's reverse direction begins in the padding."""
    options = {"backward": backward, "ragged": ragged, "bidirectional": bidirectional}
    made = program.temporal_cases.temporal_case("gru", torch.float32, 3, 9, 16, 0.0, **options)
    problem = made.make(CPU)
    same = not (ragged and bidirectional)
    assert set(problem.peers) == set(problem.peer_checks) == {"cudnn packed", *(["cudnn padded"] if same else [])}
    assert set(made.baseline.split(" or ")) == set(problem.peers)
    assert ("begins in the padding" in problem.absent.get("cudnn padded", "")) != same
    problem.check(problem.pycm())
    for name, check in problem.peer_checks.items():
        result = problem.peers[name]()
        check(result)
        with pytest.raises(AssertionError, match="off by"):
            check([1.2 * part for part in result])


def test_the_table(program: Program) -> None:
    """A reason stays in its cell, and those of absence are told once."""
    reasons = {"absent": {"a": "not here"}, "wrong": {"b": "int | None\nexpected"}}
    measured = {"about": "a test", "median": {"pycm": 1.0}, "share": 0.5, "ratio": {"pycm": 1.0}, "score": None,
                "goal": 1.0, "reached": None}  # fmt: skip
    cases = [{**measured, **reasons}, {"about": "a test", "failed": "TypeError: int | None\nexpected"}]
    for found in cases:
        written = program.report.line(found)
        assert "\n" not in written
        assert "int \\| None expected" in written
        assert written.replace("\\|", "").count("|") == 7
    assert program.report.line(cases[0]).endswith("| no baseline; no a |")
    assert program.report.absences([*cases, *cases]) == ["- no a: not here"]
