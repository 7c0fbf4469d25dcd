"""Swap functions of a library for pycm's, and back."""

from __future__ import annotations

import importlib
import inspect
import sys
import threading
from collections.abc import Iterable
from types import ModuleType, TracebackType
from typing import Any

# torch is not among them: torch.cdist is also known to torch.jit and to tracing by its identity.
PATCHABLE = ("sentence_transformers", "sklearn")

_lock = threading.RLock()
_active: dict[str, list[Patch]] = {}


class Patch:
    """One `patch` in force. As a context manager it restores on exit; `restore` may be called more than once."""

    def __init__(self, package: str) -> None:
        self.package = package

    def restore(self) -> None:
        """Undo this patch. The library gets its own functions back with the last of its patches."""
        with _lock:
            active = _active.get(self.package, [])
            if self in active:
                active.remove(self)
                if not active:
                    unpatch(self.package)

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def patch(package: str) -> Patch:
    """Put pycm's functions in place of a library's own, in every module of the library that holds them by name.

    Args:
        package: ``"sentence_transformers"`` or ``"sklearn"``.

    Returns:
        A `Patch`: keep it to ``restore()``, or use it as ``with patch("sklearn"): ...``. Patches may be nested; the
        library's own functions come back when the last one is restored, or at once with `unpatch`.

    Raises:
        ValueError: a package that cannot be patched.
        ImportError: the package is missing, or its version has functions of other parameters.

    Names that were imported into modules outside the library (``from sentence_transformers.util import cos_sim``)
    before the patch keep the original, and those imported during it keep pycm's.
    """
    _check(package)
    with _lock:
        pairs = _pairs(package)
        for original, replacement in pairs:
            _check_parameters(package, original, replacement)
        handle = Patch(package)
        _active.setdefault(package, []).append(handle)
        _swap(package, pairs)
    return handle


def unpatch(package: str | None = None) -> None:
    """Give a library, or every patched one, its own functions back, whatever number of patches is in force."""
    if package is not None:
        _check(package)
    with _lock:
        for name in tuple(_active) if package is None else (package,):
            if _active.pop(name, None) is not None:
                _swap(name, [(replacement, original) for original, replacement in _pairs(name)])


def _check(package: str) -> None:
    if package not in PATCHABLE:
        raise ValueError(f"patch: package must be one of {', '.join(PATCHABLE)}, got {package!r}")


def _pairs(package: str) -> list[tuple[Any, Any]]:
    """(original, replacement) of each function."""
    return list(importlib.import_module(f"pycm.compat.{package}").REPLACEMENTS)


def _check_parameters(package: str, original: Any, replacement: Any) -> None:
    theirs, ours = (
        [(p.name, p.kind) for p in inspect.signature(f).parameters.values()] for f in (original, replacement)
    )
    if theirs != ours:
        raise ImportError(
            f"patch: {package}'s {original.__name__} must have parameters {', '.join(name for name, _ in ours)}, "
            f"got {', '.join(name for name, _ in theirs)}: another version of {package} than pycm's was written for"
        )


def _swap(package: str, pairs: Iterable[tuple[Any, Any]]) -> None:
    # By identity and over all modules, so that modules imported between patch and restore are found too.
    swaps = {id(old): new for old, new in pairs}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == package and isinstance(module, ModuleType):
            for attribute, value in list(vars(module).items()):
                if id(value) in swaps:
                    setattr(module, attribute, swaps[id(value)])
