"""Fingerprints: one digest over everything that determines what an encoder returns.

`digest_of` walks values, arrays, tensors, torch modules, functions, classes and objects, and feeds a tagged,
length-prefixed stream into SHA-256, so that no two different structures give one stream. It depends on
neither memory addresses nor hash seeds.

* The user's code is followed: a function's code, defaults, captured variables and the globals that it names, in
  whatever module of the user's they are; of a class all methods and class attributes, base classes included.
* The code of installed packages counts by name, the package's version and the bytes of the defining file; that
  of Python, torch and NumPy by name, since their releases differ by rounding.
* A torch module is its class, attributes (private ones too), parameters, buffers, submodules and forward hooks.

A part that cannot be looked into raises, since leaving it out would let a changed encoder read an older one's
features. When in doubt too much is hashed: then features are computed once more than needed.
"""

from __future__ import annotations

import collections
import copyreg
import enum
import functools
import hashlib
import logging
import os
import types
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from .code import class_members, file_digest, imported, is_library, names_in, provenance

# What Hugging Face's configurations and modules add on saving and loading: places, versions, classes.
_HF_LOADING = frozenset({"name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"})
_HF_LOADED = frozenset({"name_or_path", "_is_hf_initialized", "model_card_data", "input_formatter"})
_HF = ("transformers", "sentence_transformers")

# State of torch modules that a forward pass in evaluation mode does not read. Forward hooks are not among it.
_TORCH_IDLE = frozenset(
    {
        "training",
        "_non_persistent_buffers_set",
        "_backward_pre_hooks",
        "_backward_hooks",
        "_is_full_backward_hook",
        "_forward_hooks_always_called",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
        "_compiled_call_impl",
        "_flat_weights",  # a recurrent layer's parameters once more
        "_flat_weight_refs",
    }
)
_TORCH_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
_TORCH_NAMED = ("torch.dtype", "torch.device", "torch.layout", "torch.memory_format")

_Builtin = (types.BuiltinFunctionType, types.MethodWrapperType)
_Descriptor = (types.MethodDescriptorType, types.WrapperDescriptorType, types.ClassMethodDescriptorType)


def digest_of(*parts: Any) -> str:
    """SHA-256 hex digest of `parts`. Raises TypeError naming a part whose content cannot be seen."""
    stream = _Stream()
    try:
        for part in parts:
            stream.add(part)
    except RecursionError:
        raise TypeError(f"fingerprint: nested too deeply to look into; {_REMEDY}") from None
    return stream.hash.hexdigest()


_REMEDY = (
    "pass fingerprint= to ModuleEncoder, or give the part or the encoder a `fingerprint` attribute "
    "(a str to be changed whenever the results change)"
)


def _opaque(what: str) -> TypeError:
    return TypeError(f"fingerprint: cannot see into {what}, so a change of it would go unnoticed; {_REMEDY}")


class _Stream:
    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self._open: dict[int, int] = {}  # objects being walked, to end cycles; id -> depth
        # Functions and classes that were walked, each to be walked once; holding them keeps the ids theirs.
        self._seen: dict[int, tuple[int, Any]] = {}

    def _write(self, tag: str, *chunks: bytes | memoryview) -> None:
        self.hash.update(f"{tag}:{len(chunks)};".encode())
        for chunk in chunks:
            self.hash.update(f"{len(chunk)};".encode())
            self.hash.update(chunk)

    def add(self, value: Any) -> None:
        kind = type(value)
        if value is None or value is ... or value is NotImplemented or kind in (bool, int, float, complex):
            self._write(kind.__name__, repr(value).encode())
        elif kind is str:
            self._write("str", value.encode("utf-8", "surrogatepass"))
        elif isinstance(value, (bytes, bytearray, memoryview)):
            self._write("bytes", bytes(value))
        elif isinstance(value, np.generic):
            self._add_array(np.asarray(value))
        elif isinstance(value, os.PathLike) and not hasattr(value, "fingerprint"):
            self.add(os.fspath(value))
        elif isinstance(value, (type, types.FunctionType)):
            if id(value) in self._seen:
                self._write("again", str(self._seen[id(value)][0]).encode())
                return
            self._seen[id(value)] = (len(self._seen), value)
            if isinstance(value, type):
                self._add_class(value)
            else:
                self._add_function(value)
        elif id(value) in self._open:
            self._write("cycle", str(len(self._open) - self._open[id(value)]).encode())
        else:
            self._open[id(value)] = len(self._open)
            try:
                self._add_composite(value)
            finally:
                del self._open[id(value)]

    def _add_composite(self, value: Any) -> None:
        if isinstance(value, enum.Enum):
            self._write("enum", str(value.name).encode())
            self.add([type(value), value.value])
        elif isinstance(value, (str, int, float, complex)):
            base = next(base for base in (str, int, float, complex) if isinstance(value, base))
            self._add_items(base.__name__, value, [base.__repr__(value)])
        elif isinstance(value, np.ndarray):
            self._add_array(value)
        elif type(value) is types.MappingProxyType or isinstance(value, Mapping):
            # In order: what loops over it may depend on that.
            self._add_items("map", value, [part for item in value.items() for part in item])
        elif isinstance(value, (list, tuple, collections.deque)):
            self._add_items("list", value, list(value))
        elif isinstance(value, (set, frozenset)):
            self._add_items("set", value, sorted(digest_of(item) for item in value))
        elif isinstance(value, (types.CodeType, types.ModuleType)):
            self._add_code(value) if isinstance(value, types.CodeType) else self._add_python_module(value, None)
        elif isinstance(value, types.MethodType):
            self._write("method")
            self.add([value.__func__, value.__self__])
        elif isinstance(value, functools.partial):
            self._write("partial")
            self.add([type(value), value.func, value.args, value.keywords, vars(value)])
        elif isinstance(value, (staticmethod, classmethod)):
            self._write(type(value).__name__)
            self.add(value.__func__)
        elif isinstance(value, property):
            self._write("property")
            self.add([value.fget, value.fset, value.fdel])
        elif isinstance(value, functools.cached_property):
            self._write("cached property")
            self.add(value.func)
        elif isinstance(value, functools._lru_cache_wrapper):
            self._write("cached")
            self.add(value.__wrapped__)
        elif isinstance(value, _Builtin):
            self._write("builtin", f"{getattr(value, '__module__', None)}.{value.__qualname__}".encode())
            owner = getattr(value, "__self__", None)
            self.add(owner if not isinstance(owner, types.ModuleType) else f"in {owner.__name__}")
        elif isinstance(value, _Descriptor):
            self._write("descriptor", value.__name__.encode())
            self.add(value.__objclass__)
        elif isinstance(value, np.ufunc) and id(value) == id(getattr(np, value.__name__, None)):
            self._write("ufunc", value.__name__.encode())
        else:
            self._add_object(value)

    def _add_items(self, tag: str, value: Any, items: list[Any]) -> None:
        """A container's items, and what a subclass of the container adds."""
        self._write(tag, str(len(items)).encode())
        for item in items:
            self.add(item)
        if type(value) not in (dict, list, tuple, set, frozenset, types.MappingProxyType):
            self.add(type(value))
            self.add([getattr(value, "default_factory", None), _sorted(_state(value))])

    def _add_array(self, array: np.ndarray[Any, Any]) -> None:
        if array.dtype.hasobject:
            self.add(["object array", array.shape, array.tolist()])
            return
        data = np.ascontiguousarray(array)
        self._write("array", str(data.dtype.descr).encode(), repr(array.shape).encode(), data.tobytes())

    def _add_code(self, code: types.CodeType) -> None:
        self._write("code", code.co_name.encode(), code.co_code)
        self.add([code.co_consts, code.co_names, code.co_varnames, code.co_freevars])

    def _add_function(self, function: types.FunctionType) -> None:
        code, space = function.__code__, function.__globals__
        self._write("function", f"{space.get('__name__')}.{function.__qualname__}".encode())
        cells = [_cell(cell) for cell in function.__closure__ or ()]
        self.add([code, function.__defaults__, function.__kwdefaults__, cells])
        # Attributes of functions: what functools.wraps keeps is reached through the captured variables.
        self.add(_sorted({key: item for key, item in vars(function).items() if key != "__wrapped__"}))
        if is_library(code.co_filename):
            self.add(provenance(code.co_filename, str(space.get("__name__"))))
            return
        names = names_in(code)
        for name in sorted(names & space.keys()):
            self._write("global", name.encode())
            self._add_named(space[name], names)
        for name, module in imported(code, space):
            self._write("import", name.encode())
            self._add_named(module, names)

    def _add_named(self, value: Any, names: set[str]) -> None:
        if isinstance(value, types.ModuleType):
            self._add_python_module(value, names)
        else:
            self.add(value)

    def _add_python_module(self, module: types.ModuleType, names: set[str] | None) -> None:
        """A module that code names: of the user's own, what the code takes from it (None: the whole file)."""
        path = getattr(module, "__file__", None)
        self._write("python module", module.__name__.encode())
        if is_library(path, module.__name__):
            self.add(provenance(path, module.__name__))
        elif names is None:
            if path is None:
                raise _opaque(f"the module {module.__name__}")
            self.add(file_digest(path))
        elif id(module) not in self._open:
            self._open[id(module)] = len(self._open)
            try:
                for name in sorted(names & vars(module).keys()):
                    self._write("member", name.encode())
                    self._add_named(vars(module)[name], names)
            finally:
                del self._open[id(module)]

    def _add_class(self, kind: type) -> None:
        self._write("type", f"{kind.__module__}.{kind.__qualname__}".encode())
        for base in kind.__mro__:
            path, members = class_members(base)
            if members is None:
                self.add([base.__qualname__, provenance(path, base.__module__)])
                continue
            self._write("class", base.__qualname__.encode(), str(len(members)).encode())
            for name, member in members.items():
                self._write("member", name.encode())
                self.add(member)

    def _add_object(self, value: Any) -> None:
        kind = type(value)
        name = f"{kind.__module__}.{kind.__qualname__}"
        if name in _TORCH_NAMED or kind.__module__ in ("typing", "torch._ops"):
            self._write("named", name.encode(), str(value).encode())
        elif kind.__name__ == "Pattern" and hasattr(value, "pattern") and hasattr(value, "flags"):
            self._write("pattern", name.encode())  # of re, or of the package regex
            self.add([value.pattern, int(value.flags)])
        elif isinstance(value, logging.Logger) or kind.__module__ == "_thread":  # locks
            self._write("idle", name.encode())
        elif _is_torch(value, "Tensor"):
            self._add_tensor(value, name)
        elif _is_torch(value, "Module"):
            self._add_module(value)
        elif isinstance(getattr(value, "fingerprint", None), str):
            self._write("fingerprint", name.encode(), value.fingerprint.encode())
        elif kind.__module__.startswith(_HF) and hasattr(value, "get_vocab"):
            from .dual import describe_tokenizer

            self.add(describe_tokenizer(value))
        elif kind.__module__.startswith(_HF) and hasattr(value, "to_dict"):
            self.add([kind, plain_settings(value.to_dict())])
        else:
            self._write("object")
            self.add(kind)
            self.add(_sorted(_state(value)))
            self.add(_own_reduction(value))

    def _add_tensor(self, tensor: Any, name: str) -> None:
        import torch

        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
            raise _opaque(f"a {tensor.layout} tensor on {tensor.device}, quantised: {tensor.is_quantized}")
        plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        data = plain.reshape(-1).view(torch.uint8).numpy()
        self._write("tensor", str(tensor.dtype).encode(), repr(tuple(tensor.shape)).encode(), memoryview(data))
        if name not in ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"):
            self.add([type(tensor), _sorted(vars(tensor))])

    def _add_module(self, module: Any) -> None:
        """Class, attributes, forward hooks, parameters, all buffers and submodules."""
        kind = type(module)
        if f"{kind.__module__}.{kind.__qualname__}" == "torch._dynamo.eval_frame.OptimizedModule":
            self._add_module(module._orig_mod)  # what torch.compile was given
            return
        self._write("module")
        self.add(kind)
        hidden = _TORCH_IDLE | _HF_LOADED if kind.__module__.startswith(_HF) else _TORCH_IDLE | {"_is_hf_initialized"}
        own = {key: item for key, item in vars(module).items() if key not in hidden}
        hooks = [list(own.pop(key, {}).values()) for key in _TORCH_HOOKS]
        parts = [own.pop(key) for key in ("_parameters", "_buffers", "_modules")]
        if kind.__module__.startswith(_HF):  # their private attributes are plans for loading, and memories
            own = {key: item for key, item in own.items() if not key.startswith("_")}
        self.add([_sorted(own), hooks, *parts])


def _sorted(values: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes, whose order is no content."""
    return {key: values[key] for key in sorted(values, key=str)}


def _state(value: Any) -> dict[str, Any]:
    """An object's attributes, those in slots included."""
    slots: Iterable[str] = copyreg._slotnames(type(value))  # type: ignore[attr-defined]
    filled = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return filled | dict(getattr(value, "__dict__", {}))


def _own_reduction(value: Any) -> Any:
    """What a class with its own pickling (or none) keeps outside its attributes. Raises TypeError if that is hidden."""
    kind = type(value)
    what = f"a {kind.__module__}.{kind.__qualname__}"
    if hasattr(kind, "__next__"):
        raise _opaque(f"{what}, an iterator")
    try:
        reduced = object.__reduce_ex__(value, 2)  # refuses what has fields in C and no pickling
    except Exception as error:
        raise _opaque(what) from error
    own = (getattr(kind, key, None) is not getattr(object, key, None) for key in ("__reduce__", "__getstate__"))
    return reduced if any(own) else None


def plain_settings(value: Any) -> Any:
    """A Hugging Face configuration, sorted, without what saving and loading add to it."""
    if isinstance(value, (list, tuple)):
        return [plain_settings(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    return {
        key: plain_settings(value[key]) for key in sorted(value, key=str) if str(key).lstrip("_") not in _HF_LOADING
    }


def _cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return "empty cell"


def _is_torch(value: Any, name: str) -> bool:
    """isinstance() without importing torch: an object of a torch class implies torch is loaded."""
    home = {"Tensor": ("torch", "Tensor"), "Module": ("torch.nn.modules.module", "Module")}[name]
    return any((base.__module__, base.__qualname__) == home for base in type(value).__mro__)
