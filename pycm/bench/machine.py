"""Where a measurement was taken: the machine, its own limits, the versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any, TypeAlias

from pycm import _C, backend_info

from .cases import Case

PACKAGES = (
    "pycm-match",
    "numpy",
    "torch",
    "faiss-cpu",
    "scikit-learn",
    "sentence-transformers",
    "usearch",
    "numkong",
    "torchmetrics",
    "ranx",
    "maxsim-cpu",
    "onnxruntime",
)
# Bytes of one entry of a row in each precision that a screen may use.
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}

#: Operations per second of "float32", "bfloat16", "int8" (a multiplication and an addition are two; 0 without such an
#: instruction), and "read", bytes per second from memory.
Limits: TypeAlias = dict[str, float]


def measure_limits(threads: int, tiny: bool = False) -> dict[str, Limits]:
    """What the processor can do with one thread and with `threads`, by kernels of pycm's own that use registers alone.

    No library's product is taken for the limit: pycm and its peers are all measured against the same thing.
    """
    seconds, size = (0.01, 1 << 22) if tiny else (0.3, 1 << 29)
    return {str(count): _C.measure_limits(count, seconds, size) for count in sorted({1, threads})}


def bounds(case: Case, limits: Limits) -> dict[str, float]:
    """For each precision the seconds that computing every score once takes at least: arithmetic or reading the rows.

    An fp32 scan cannot be faster than "float32"; a screen in a lower precision whose rows are already encoded can, but
    not faster than its own. Empty for calls too small to be bound by either.
    """
    if case.op == "call":
        return {}
    written = 4 * case.queries * case.gallery if case.op in ("similarity", "maxsim") else 0
    return {
        name: max(case.operations / limits[name], (case.entries * BYTES[name] + written) / limits["read"])
        for name in case.precisions
        if limits[name] > 0
    }


def describe() -> dict[str, Any]:
    info = backend_info()
    return {
        "processor": _processor(),
        "processors": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpu_level": info["cpu"]["level"],
        "compiler": info["build"]["compiler"],
        **_checkout(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def version(package: str) -> str | None:
    """None when it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _checkout() -> dict[str, Any]:
    """The commit, and whether files differ from it; None for a package that is no part of a checkout of pycm."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists() or not (folder / "csrc").is_dir():
        return {"commit": None, "modified": None}
    return {
        "commit": _git(folder, "rev-parse", "HEAD"),
        "modified": bool(_git(folder, "status", "--porcelain", "--untracked-files=no")),
    }


def _git(folder: Path, *arguments: str) -> str | None:
    """None without git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
