"""The CUDA operators, on the host executor and on the chip.

On the executor pycm._torch_cuda's own functions get CPU tensors, and `_simt` in the place of `_C`. On the chip the same
functions get the same tensors on the device.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from pycm import _device, _torch_cuda, _torch_cuda_sets, _torch_temporal_cuda, _torch_temporal_words  # noqa: E402

ARCHITECTURES = os.environ.get("PYCM_SIMT_ARCH", "80 90 chip").split()


def find_module() -> Path | None:
    """The file PYCM_SIMT_MODULE, or `_simt` in the folder of that name, or where README.md builds it."""
    path = Path(os.environ.get("PYCM_SIMT_MODULE") or Path(__file__).parents[2] / "build" / "simt")
    return path if path.is_file() else next(iter(sorted(path.rglob("_simt.*.so"))), None)


@pytest.fixture(scope="session")
def module() -> ModuleType:
    path = find_module()
    if path is None:
        missing = "no module _simt in $PYCM_SIMT_MODULE or build/simt: see tests/simt/README.md"
        if os.environ.get("PYCM_REQUIRE_SIMT") == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    spec = importlib.util.spec_from_file_location("_simt", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


class Chip:
    """The functions of a module, with every tensor taken to the device and every result brought back."""

    def __init__(self, functions: ModuleType, device: torch.device) -> None:
        self.functions, self.device = functions, device

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.functions, name)

        def call(*arguments: Any) -> Any:
            there = (part.to(self.device) if isinstance(part, torch.Tensor) else part for part in arguments)
            results = function(*there)
            return results.cpu() if isinstance(results, torch.Tensor) else tuple(part.cpu() for part in results)

        return call


@pytest.fixture(params=ARCHITECTURES)
def arch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The executor as compute capability 8.0 and 9.0, each with its own kernels; and the chip, where there is one."""
    if request.param == "chip":
        request.getfixturevalue("gpu")
    else:
        monkeypatch.setenv("PYCM_SIMT_ARCH", request.param)
    return str(request.param)


@pytest.fixture
def functions(arch: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module's functions for this architecture. New tensors are filled with NaN or 255: what is not written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    if arch == "chip":
        gpu = request.getfixturevalue("gpu")
        yield lambda module: Chip(module, gpu)
    else:
        monkeypatch.setattr(_torch_cuda, "_kernels", request.getfixturevalue("module"))
        monkeypatch.setattr(_torch_cuda, "_on", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(_torch_cuda, "_stream", lambda: 0)
        yield lambda module: module
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def cuda(functions: Any) -> Any:
    """`cuda.similarity`, `cuda.topk`, `cuda.rank`: what torch calls for CUDA tensors."""
    return functions(_torch_cuda)


@pytest.fixture
def cuda_sets(functions: Any) -> Any:
    """`cuda_sets.maxsim`, `maxsim_backward`, `maxsim_topk` and `xattn_score`, likewise."""
    return functions(_torch_cuda_sets)


@pytest.fixture
def temporal(functions: Any) -> Any:
    """`temporal.temporal_pool`, `pool_states` and their `_backward`: the operators for CUDA."""
    return functions(_torch_temporal_cuda)


@pytest.fixture
def dispatched(arch: str, temporal: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The operators of CPU tensors are those of CUDA tensors, on the executor; tests/test_cuda_temporal.py has the chip's."""
    library = torch.library.Library("pycm", "IMPL", "CPU")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch tells of every kernel that is overridden
        for name in ("temporal_pool", "temporal_pool_backward", "pool_states", "pool_states_backward"):
            library.impl(name, getattr(_torch_temporal_cuda, name), "CPU", allow_override=True)
        library.impl("temporal_pool_words", _torch_temporal_words.temporal_pool_words_cuda, "CPU")
    monkeypatch.setattr(_torch_temporal_words, "_DEVICES", ["cpu"])
    yield
    library._destroy()


@pytest.fixture
def place(
    arch: str, functions: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Any], torch.Tensor]:
    """Takes an array to the device; on the executor the CPU's tensors are on one."""
    if arch == "chip":
        gpu = request.getfixturevalue("gpu")
        return lambda array: torch.from_numpy(array).to(gpu)
    monkeypatch.setattr(_device, "_DEVICES", ("cuda", "cpu"))
    return torch.from_numpy
