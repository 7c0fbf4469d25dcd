"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

import pycm

LEVELS: list[str] = pycm.backend_info()["cpu"]["available_levels"]


def use_level(name: str) -> None:
    """Switch the kernels, and hold the library to what it says of itself."""
    pycm._C.set_simd_level(name)
    assert pycm.backend_info()["cpu"]["level"] == name


@pytest.hookimpl(tryfirst=True)  # before -m is asked
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {"level", "every_level"}.intersection(getattr(item, "fixturenames", ())):
            item.add_marker("levels")


@pytest.fixture(scope="session", autouse=True)
def away_from_the_sources() -> Iterator[None]:
    """Child processes look for modules where they start: pycm/ beside tests/ has no compiled part."""
    before = Path.cwd()
    os.chdir(Path(__file__).parent)
    yield
    os.chdir(before)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine in turn."""
    before = pycm.backend_info()["cpu"]["level"]
    use_level(request.param)
    yield request.param
    use_level(before)


@pytest.fixture
def every_level() -> Iterator[list[str]]:
    """The names, for a test that switches by itself; the level is restored afterwards."""
    before = pycm.backend_info()["cpu"]["level"]
    yield LEVELS
    use_level(before)


@pytest.fixture(scope="session")
def gpu() -> Any:
    """The current CUDA device. A test without one is skipped, and fails under PYCM_REQUIRE_GPU=1."""
    torch = pytest.importorskip("torch")
    missing = "pycm was built without CUDA" if not pycm._C.cuda_compiled() else "torch finds no CUDA device"
    if pycm._C.cuda_compiled() and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if os.environ.get("PYCM_REQUIRE_GPU") == "1":
        pytest.fail(missing)
    pytest.skip(missing)


@pytest.fixture
def threads() -> Iterator[None]:
    """For a test that calls set_num_threads."""
    if os.environ.get("PYCM_NUM_THREADS"):
        pytest.skip("PYCM_NUM_THREADS wins over set_num_threads")
    yield
    pycm.set_num_threads(0)


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cell of each packing of weights."""
    made: list[str] = []
    real = pycm._C.TemporalCell

    def cell(*arguments: Any, **options: Any) -> Any:
        made.append(arguments[0])
        return real(*arguments, **options)

    monkeypatch.setattr(pycm._C, "TemporalCell", cell)
    return made
