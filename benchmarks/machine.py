"""Where a measurement was taken: the machine, its limits, the versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("pycm-match", "torch", "numpy", "faiss-cpu", "scikit-learn")


def _best_seconds(call: Callable[[], object], repeats: int = 5) -> float:
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def measure_limits(tiny: bool = False) -> dict[str, float]:
    """What the machine can do at the current thread count, as far as a program can show it.

    ``fp32_gflops``: the best of torch's and pycm's square product, nearly all of it fused multiply-adds.
    ``copy_gbytes_per_s``: bytes read and written by copying an array far larger than the caches.
    """
    import torch

    import pycm

    size, copied = (128, 1 << 20) if tiny else (3072, 1 << 28)
    x = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
    tensor, out = torch.from_numpy(x), torch.empty(size, size)
    flops = 2.0 * size**3
    product = min(
        _best_seconds(lambda: torch.mm(tensor, tensor.T, out=out)),
        _best_seconds(lambda: pycm.similarity(x, x, "dot")),
    )
    source, target = torch.ones(copied // 4), torch.empty(copied // 4)
    copy = _best_seconds(lambda: target.copy_(source))
    return {"fp32_gflops": flops / product / 1e9, "copy_gbytes_per_s": 2 * copied / copy / 1e9}


def describe() -> dict[str, Any]:
    import pycm

    info = pycm.backend_info()
    return {
        "processor": _processor(),
        "processors": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpu_level": info["cpu"]["level"],
        "compiler": info["build"]["compiler"],
        "commit": _git("rev-parse", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _git(*arguments: str) -> str | None:
    """None outside a clone."""
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
