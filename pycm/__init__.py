"""pycm: cross-modal matching with exact, fast scores.

`similarity` and `topk` score embeddings of NumPy, torch and DLPack arrays; `ImageTextMatcher` matches photographs with
sentences. `import pycm` needs NumPy only; what needs more is imported on first use and names the extra to install.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    from pycm import _C  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        f"pycm: no compiled module in {Path(__file__).parent}: this is the source folder; install it with "
        "`pip install .` and import it from elsewhere, or with `pip install -e .`"
    ) from error

from pycm._info import __version__, backend_info
from pycm.functional import (
    DISTANCES,
    METRICS,
    Matches,
    Metric,
    Precision,
    set_num_threads,
    similarity,
    topk,
    workspace_bytes,
)

if TYPE_CHECKING:
    from pycm import encoders, evaluate, matchers, reference, spaces, text
    from pycm.matchers import ImageTextMatcher

__all__ = [
    "DISTANCES",
    "METRICS",
    "ImageTextMatcher",
    "Matches",
    "Metric",
    "Precision",
    "__version__",
    "backend_info",
    "encoders",
    "evaluate",
    "matchers",
    "reference",
    "set_num_threads",
    "similarity",
    "spaces",
    "text",
    "topk",
    "workspace_bytes",
]

_MODULES = {"encoders", "evaluate", "matchers", "reference", "spaces", "text"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"pycm.{name}")
    if name == "ImageTextMatcher":
        return importlib.import_module("pycm.matchers").ImageTextMatcher
    raise AttributeError(f"module 'pycm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
