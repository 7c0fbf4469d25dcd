"""pycm under the names of other libraries: the same functions, arguments, return types and errors.

One module per library, imported on first use: ``from pycm.compat.sentence_transformers import semantic_search``.
`patch` swaps the functions inside a library that is already in use, and back. docs/compat.md lists what differs.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from types import ModuleType

from pycm.compat._patch import Patch, patch, unpatch

__all__ = ["Patch", "patch", "unpatch"]


def __getattr__(name: str) -> ModuleType:
    if name.startswith("_") or importlib.util.find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(module.name for module in pkgutil.iter_modules(__path__) if module.name[0] != "_")})
