"""Fingerprints: one digest over everything that determines what an encoder returns.

`digest_of` walks plain values, arrays, tensors, torch modules, functions and simple objects, and feeds a
tagged, length-prefixed stream into SHA-256, so that no two different structures give one stream. It depends
on neither memory addresses nor hash seeds. A part it cannot look into raises, since leaving it out would let
a changed encoder read an older one's features.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import inspect
import os
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

# Attributes of configurations and modules that name where a model came from, or its state of training.
_NOT_CONTENT = frozenset({"name_or_path", "transformers_version", "training", "filename"})


def digest_of(*parts: Any) -> str:
    """SHA-256 hex digest of `parts`. Raises TypeError naming a part whose content cannot be seen."""
    stream = _Stream()
    for part in parts:
        stream.add(part)
    return stream.hash.hexdigest()


class _Stream:
    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self._open: dict[int, int] = {}  # objects being walked, to end cycles; id -> depth

    def _write(self, tag: str, *chunks: bytes | memoryview) -> None:
        self.hash.update(f"{tag}:{len(chunks)};".encode())
        for chunk in chunks:
            self.hash.update(f"{len(chunk)};".encode())
            self.hash.update(chunk)

    def add(self, value: Any) -> None:
        if value is None or isinstance(value, (bool, int, float, complex)):
            self._write(type(value).__name__, repr(value).encode())
        elif isinstance(value, str):
            self._write("str", value.encode("utf-8", "surrogatepass"))
        elif isinstance(value, (bytes, bytearray, memoryview)):
            self._write("bytes", bytes(value))
        elif isinstance(value, enum.Enum):
            self._write("enum", type(value).__qualname__.encode(), value.name.encode())
        elif isinstance(value, np.generic):
            self.add(value.item())
        elif isinstance(value, np.ndarray):
            self._add_array(value)
        elif isinstance(value, os.PathLike):
            self.add(os.fspath(value))
        elif id(value) in self._open:
            self._write("cycle", str(len(self._open) - self._open[id(value)]).encode())
        else:
            self._open[id(value)] = len(self._open)
            try:
                self._add_composite(value)
            finally:
                del self._open[id(value)]

    def _add_composite(self, value: Any) -> None:
        if isinstance(value, Mapping):
            self._write("map", str(len(value)).encode())
            for key in sorted(value, key=lambda key: (type(key).__name__, str(key))):
                self.add(key)
                self.add(value[key])
        elif isinstance(value, (list, tuple)):
            self._write("list", str(len(value)).encode())
            for item in value:
                self.add(item)
        elif isinstance(value, (set, frozenset)):
            self._write("set", *(digest.encode() for digest in sorted(digest_of(item) for item in value)))
        elif isinstance(value, type):
            self._write("type", f"{value.__module__}.{value.__qualname__}".encode())
        elif isinstance(value, types.CodeType):
            self._add_code(value)
        elif isinstance(value, types.FunctionType):
            self._add_function(value)
        elif isinstance(value, types.MethodType):
            self.add(value.__func__)
            self.add(value.__self__)
        elif isinstance(value, functools.partial):
            self._write("partial")
            self.add([value.func, value.args, value.keywords])
        elif isinstance(value, (types.BuiltinFunctionType, types.ModuleType, np.ufunc)):
            self._write("builtin", f"{getattr(value, '__module__', None)}.{value.__name__}".encode())
        else:
            self._add_object(value)

    def _add_array(self, array: np.ndarray[Any, Any]) -> None:
        if array.dtype.hasobject:
            self.add(["object array", array.tolist()])
            return
        data = np.ascontiguousarray(array)
        self._write("array", str(data.dtype).encode(), repr(array.shape).encode(), data.tobytes())

    def _add_code(self, code: types.CodeType) -> None:
        self._write("code", code.co_name.encode(), code.co_code)
        self.add([code.co_consts, code.co_names, code.co_varnames])

    def _add_function(self, function: types.FunctionType) -> None:
        """Code, defaults, captured variables, and the module-level values that the code names."""
        self._write("function", f"{function.__module__}.{function.__qualname__}".encode())
        cells = [_cell(cell) for cell in function.__closure__ or ()]
        self.add([function.__code__, function.__defaults__, function.__kwdefaults__, cells])
        for name in sorted(_names(function.__code__)):
            if name in function.__globals__:
                value = function.__globals__[name]
                self.add(name)
                if isinstance(value, types.FunctionType) and value.__module__ != function.__module__:
                    self._write("import", f"{value.__module__}.{value.__qualname__}".encode())
                else:
                    self.add(value)

    def _add_object(self, value: Any) -> None:
        kind = type(value)
        name = f"{kind.__module__}.{kind.__qualname__}"
        if name in ("torch.dtype", "torch.device"):
            self._write("torch", str(value).encode())
        elif kind.__name__ == "Pattern" and hasattr(value, "pattern") and hasattr(value, "flags"):
            self._write("pattern", name.encode())  # of re, or of the package regex
            self.add([value.pattern, int(value.flags)])
        elif _is_torch(value, "Tensor"):
            self._add_tensor(value)
        elif _is_torch(value, "Module"):
            self._add_module(value)
        elif isinstance(getattr(value, "fingerprint", None), str):
            self._write("fingerprint", name.encode(), value.fingerprint.encode())
        elif dataclasses.is_dataclass(value):
            self._write("dataclass", name.encode())
            self.add({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
        elif hasattr(value, "__dict__"):
            self._write("object", name.encode())
            # An object used as a function does what its class says, so the class's code counts too.
            if isinstance(kind.__dict__.get("__call__"), types.FunctionType):
                self.add(kind.__call__.__code__)
            self.add(_content(vars(value)))
        else:
            raise TypeError(
                f"fingerprint: cannot see into a {name}, so a change of it would go unnoticed; "
                "give it a `fingerprint` attribute (a str that changes whenever its results do)"
            )

    def _add_tensor(self, tensor: Any) -> None:
        import torch

        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._write("tensor", str(tensor.dtype).encode(), repr(tuple(tensor.shape)).encode(), memoryview(data))

    def _add_module(self, module: Any) -> None:
        """Structure, code and settings of every submodule, then the weights and persistent buffers."""
        self._write("module")
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "to_dict"):
            self.add(_configuration(config.to_dict()))
        code: set[str] = set()
        for name, child in module.named_modules():
            self.add([name, type(child), child.extra_repr(), _settings(child)])
            # The same weights under an edited forward() are another encoder.
            if not type(child).__module__.startswith("torch."):
                forward = inspect.unwrap(type(child).forward)
                if isinstance(forward, types.FunctionType):
                    code.add(digest_of(forward.__code__))
        self.add(code)
        for key, value in sorted(module.state_dict().items()):
            self.add(key)
            self.add(value)


def _content(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value for key, value in values.items() if not (isinstance(key, str) and key.lstrip("_") in _NOT_CONTENT)
    }


def _configuration(value: Any) -> Any:
    """A Hugging Face configuration without what saving and loading add to it."""
    if not isinstance(value, dict):
        return value
    added = ("architectures", "dtype", "torch_dtype")  # the class and the weights' own types count anyway
    return {key: _configuration(item) for key, item in _content(value).items() if key not in added}


def _settings(module: Any) -> dict[str, Any]:
    """Numbers, flags and names kept as attributes, e.g. a scale that forward() multiplies by."""
    simple = (bool, int, float, str, type(None))
    return {
        key: value
        for key, value in _content(vars(module)).items()
        if not key.startswith("_") and (isinstance(value, simple) or _is_simple_tuple(value))
    }


def _is_simple_tuple(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(isinstance(v, (bool, int, float, str)) for v in value)


def _cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return "empty cell"


def _names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names


def _is_torch(value: Any, name: str) -> bool:
    """isinstance() without importing torch: an object of a torch class implies torch is loaded."""
    home = {"Tensor": ("torch", "Tensor"), "Module": ("torch.nn.modules.module", "Module")}[name]
    return any((base.__module__, base.__qualname__) == home for base in type(value).__mro__)


def file_digest(path: str | os.PathLike[str], chunk: int = 1 << 20) -> str:
    """SHA-256 hex digest of a file's bytes. Raises OSError untouched."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        read: Callable[[], bytes] = functools.partial(file.read, chunk)
        for block in iter(read, b""):
            digest.update(block)
    return digest.hexdigest()
