"""Whose code is it, and what does it name: for fingerprints."""

from __future__ import annotations

import dis
import enum
import functools
import hashlib
import importlib
import importlib.util
import os
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

#: To be raised when this library's own preprocessing or pooling gives other features than before.
FEATURES_VERSION = 1

_OWN = str(Path(__file__).resolve().parents[1])
_INSTALLED = frozenset({"site-packages", "dist-packages"})
# Their releases differ by rounding, and their many operations are far apart from where they are defined.
_BY_NAME = sys.stdlib_module_names | {"torch", "numpy"}
# Of a class's namespace: what Python and dataclasses derive from the rest.
_DERIVED = frozenset(
    {
        "__dict__",
        "__weakref__",
        "__doc__",
        "__module__",
        "__qualname__",
        "__annotations__",
        "__annotate__",
        "__annotate_func__",
        "__annotations_cache__",
        "__firstlineno__",
        "__static_attributes__",
        "__abstractmethods__",
        "__parameters__",
        "__orig_bases__",
        "__match_args__",
        "__dataclass_fields__",
        "__dataclass_params__",
        "__slotnames__",
        "_abc_impl",
    }
)


@functools.lru_cache(maxsize=4096)
def is_library(path: str | None, module: str = "") -> bool:
    """Whether a file, or else a module without one, belongs to Python, an installed package or this library."""
    if path is None:
        return module.partition(".")[0] in sys.stdlib_module_names
    if path.startswith("<frozen "):
        return True
    parts = Path(path).parts
    standard = tuple(os.path.join(sysconfig.get_paths()[key], "") for key in ("stdlib", "platstdlib"))
    return not _INSTALLED.isdisjoint(parts) or path.startswith((*standard, os.path.join(_OWN, "")))


def provenance(path: str | None, module: str) -> list[str]:
    """What tells the releases of library code apart: the package's version, and the digest of the file."""
    top = module.partition(".")[0]
    if top in _BY_NAME or path is None:
        return []
    if path.startswith(os.path.join(_OWN, "")):
        return [f"pycm {FEATURES_VERSION}"]
    digest = _digest_once(path) if path.endswith(".py") and os.path.exists(path) else ""
    return [str(getattr(sys.modules.get(top), "__version__", "")), digest]


def class_members(kind: type) -> tuple[str | None, dict[str, Any] | None]:
    """The file of a class, and its methods and class attributes; None in their place for a library's class."""
    module = sys.modules.get(kind.__module__)
    path = getattr(module, "__file__", None)
    if is_library(path, kind.__module__):
        return path, None
    namespace = {key: vars(kind)[key] for key in sorted(vars(kind)) if key not in _DERIVED}
    if issubclass(kind, enum.Enum):
        code = (types.FunctionType, staticmethod, classmethod, property)
        methods = {key: item for key, item in namespace.items() if isinstance(item, code)}
        return path, methods | {"members": {key: item.value for key, item in kind.__members__.items()}}
    slots = (types.MemberDescriptorType, types.GetSetDescriptorType)
    return path, {key: item for key, item in namespace.items() if not isinstance(item, slots)}


def names_in(code: types.CodeType) -> set[str]:
    """Globals and attributes that code names, functions inside it included."""
    return {name for part in _with_inner(code) for name in part.co_names}


def imported(code: types.CodeType, space: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Modules that code imports when it runs: (name, the module; its name or None for libraries and missing ones)."""
    found = set()
    for part in _with_inner(code):
        instructions = list(dis.get_instructions(part))
        for i, instruction in enumerate(instructions):
            if instruction.opname == "IMPORT_NAME":
                level = instructions[i - 2].argval
                found.add((int(level) if isinstance(level, int) else 0, str(instruction.argval)))
    for level, name in sorted(found):
        try:
            full = importlib.util.resolve_name("." * level + name, str(space.get("__package__") or ""))
            top = sys.modules.get(full.partition(".")[0]) or importlib.util.find_spec(full.partition(".")[0])
        except (ImportError, ValueError):
            yield name, None
            continue
        path = getattr(top, "origin", None) or getattr(top, "__file__", None)
        if full not in sys.modules and is_library(path, full):
            yield full, full  # not imported for its name's sake
            continue
        try:
            importlib.import_module(full)
        except ImportError:
            yield full, None
            continue
        yield full, sys.modules[full]
        if "." in full:  # `import a.b` binds a
            yield full.partition(".")[0], sys.modules[full.partition(".")[0]]


def _with_inner(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _with_inner(constant)


@functools.lru_cache(maxsize=1024)
def _digest_once(path: str) -> str:
    return file_digest(path)


def file_digest(path: str | os.PathLike[str], chunk: int = 1 << 20) -> str:
    """SHA-256 hex digest of a file's bytes. Raises OSError untouched."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        read: Callable[[], bytes] = functools.partial(file.read, chunk)
        for block in iter(read, b""):
            digest.update(block)
    return digest.hexdigest()
