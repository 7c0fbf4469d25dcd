"""The host executor itself: it finds planted bugs at their line, and its primitives follow the PTX ISA."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

# Planted bug -> what the message has to say (any of them: which one shows first depends on the schedule).
BUGS = {
    "barrier": "uninitialised: read|race",
    "loop_barrier": "race",
    "bounds": "out of bounds: read of 4 bytes, byte 4000 of an array of 4000 bytes",
    "shared_bounds": "out of bounds: write of 4 bytes, shared memory",
    "uninitialised": "uninitialised: read of 4 bytes, shared memory",
    "deadlock": "deadlock",
    "misaligned": "misaligned: read of 16 bytes, byte 4 of",
    "vector": "misaligned: an access that needs an address of a multiple of 16, byte 4 of",
    "index": "out of bounds: index 2 of an array of fixed size",
    "append_raced": "race",
    "visible": "race: read of 4 bytes.*another block",
    "workspace": "uninitialised: atomic of 4 bytes, byte 4 of an array of 8 bytes",
    "syncwarp": "uninitialised: read|race",
    "lane": "__shfl_xor_sync: (reads lane|the calling lane)",
    "divergent": "other lanes of the warp came to",
    "no_wait": "in flight: read of 16 bytes",
    "no_barrier": "uninitialised: read|race|in flight",
    "overwrite": "in flight|race",
    "phase": "deadlock",
    "no_full": "uninitialised: read|in flight|race",
    "no_empty": "more arrivals than the count|race|in flight",
    "bytes": "deadlock",
    "descriptor": "wgmma: the tile is not 1024-byte aligned",
    "registers": "exits with a wgmma under way",
    "no_proxy_fence": "no fence_proxy_async between",
    "stage": "in flight|race|uninitialised",
    "exit": "its block exits, not ordered after|has exited",
    "no_cluster_sync": "race|uninitialised|not initialised",
    "arrivals": "deadlock|more arrivals",
    "grid_fence": "race: read of 4 bytes",
    "stale_fence": "race: read of 4 bytes",
    "grid_acquire": "race: read of 4 bytes",
}
CORRECT = ["sum", "append", "transpose", "copy", "product", "exchange", "turns"]


def program(name: str) -> Path:
    folder = os.environ.get("PYCM_SIMT_MODULE") or ROOT / "build" / "simt"
    found = next(iter(sorted(Path(folder).rglob(name))), None)
    if found is None:
        missing = f"no program {name} in $PYCM_SIMT_MODULE or build/simt: see tests/simt/README.md"
        if os.environ.get("PYCM_REQUIRE_SIMT") == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    return found


def run(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(program(name)), *arguments]
    known = {key: value for key, value in os.environ.items() if key != "PYCM_SIMT_ARCH"}  # there a list, here one
    return subprocess.run(
        command, env={**known, **environment}, capture_output=True, text=True, timeout=120, check=False
    )


def lines_marked(bug: str) -> set[str]:
    """The places `bugs.cu:N` whose line ends in a comment that names the bug."""
    source = (HERE / "bugs.cu").read_text().splitlines()
    marks = [(number, re.search(r"// ([a-z_, ]+)$", line)) for number, line in enumerate(source, 1)]
    return {f"bugs.cu:{number}" for number, mark in marks if mark and bug in mark[1].split(", ")}


def run_case(name: str, seeds: range) -> list[str]:
    """What `simt_bugs` says under each seed."""
    result = run("simt_bugs", name, *map(str, seeds))
    assert result.returncode == 0, result.stderr
    return result.stdout.split("\n\n")[:-1]


@pytest.mark.parametrize("bug", BUGS)
def test_bug_is_found(bug: str) -> None:
    places = lines_marked(bug)
    assert places, f"no line of bugs.cu is marked {bug}"
    for message in run_case(bug, range(3)):
        assert re.match(r"simt: (sum|append|transpose|copy|product|filled|exchange|turns): ", message)
        assert re.search(BUGS[bug], message)
        assert re.search(r"block \(\d+,\d+,\d+\) thread \(\d+,\d+,\d+\)", message)
        assert any(re.search(re.escape(place) + r"\b", message) for place in places), (places, message)


@pytest.mark.parametrize("case", CORRECT)
def test_correct_kernel_passes_under_many_schedules(case: str) -> None:
    seeds = range(5 if case == "product" else 50)
    assert run_case(case, seeds) == ["ok"] * len(seeds)


def test_wrong_swizzle_gives_a_wrong_product() -> None:
    """In bounds, initialised and ordered: only the result can tell."""
    assert run_case("swizzle", range(2)) == ["wrong result"] * 2


def test_schedules_differ_by_seed_and_repeat() -> None:
    first, again = (run_case("barrier", range(4)) for _ in range(2))
    assert first == again
    assert len(set(first)) > 2


def test_primitives_follow_the_isa() -> None:
    result = run("conformance_simt")
    assert result.returncode == 0, result.stdout
    assert result.stdout.count(" ok (") == len(result.stdout.splitlines()) > 40


def test_primitives_of_sm80_only() -> None:
    result = run("conformance_simt", PYCM_SIMT_ARCH="80")
    assert result.returncode == 0, result.stdout
    assert "mma f16" in result.stdout
    assert "wgmma" not in result.stdout


def test_a_wrong_formula_is_not_let_through() -> None:
    result = run("conformance_simt", "--wrong")
    assert result.returncode == 1
    assert " ok (" not in result.stdout


def test_pessimistic_rounding_is_worse_and_within_the_bound() -> None:
    def worst(**environment: str) -> list[float]:
        result = run("conformance_simt", **environment)
        assert result.returncode == 0, result.stdout
        return [float(error) for error in re.findall(r"rounding.*worst error is (\S+) of the bound", result.stdout)]

    nearest, truncated = worst(), worst(PYCM_SIMT_MMA="truncate")
    assert len(nearest) == len(truncated) == 6
    assert all(cut > best for cut, best in zip(truncated, nearest, strict=True)), (truncated, nearest)


def test_primitives_on_the_chip(tmp_path: Path) -> None:
    """The same program compiled by nvcc: the wrappers of arch.cuh against the same formulas."""
    torch = pytest.importorskip("torch")
    nvcc = shutil.which("nvcc")
    if not torch.cuda.is_available() or nvcc is None:
        missing = "needs nvcc and a GPU"
        if os.environ.get("PYCM_REQUIRE_GPU") == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    architectures = ["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_80,code=compute_80"]
    flags = [flag for architecture in architectures for flag in ("-gencode", architecture)]
    sources = [str(HERE / "conformance.cu"), str(ROOT / "csrc/cuda/launch.cu")]
    binary = tmp_path / "conformance"
    compile_it = [nvcc, "-std=c++17", "-O2", *flags, "-I", str(ROOT / "csrc"), *sources, "-o", str(binary)]
    subprocess.run(compile_it, check=True)
    result = subprocess.run([str(binary)], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
