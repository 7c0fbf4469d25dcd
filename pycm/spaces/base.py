"""What the spaces share: the protocol, parameters in the manner of scikit-learn, saving and loading."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from .._files import atomic_write
from .._optional import require
from .._rows import check_features

if TYPE_CHECKING:
    from typing_extensions import Self

Arrays = dict[str, npt.NDArray[Any]]
Features = npt.NDArray[np.float32]

_FORMAT = 1
_CONFIG, _WEIGHTS = "config.json", "weights.safetensors"


@runtime_checkable
class Space(Protocol):
    """What a matcher needs: anything with these methods is a space."""

    def fit(self, image_features: Any, text_features: Any, pairs: Any = None, *, weights: Any = None) -> Any: ...
    def transform_images(self, image_features: Any) -> Features: ...
    def transform_texts(self, text_features: Any) -> Features: ...
    def save(self, folder: str | os.PathLike[str]) -> None: ...


class BaseSpace(ABC):
    """Base class of the spaces of this package.

    A subclass keeps its constructor's arguments under their names and what it learned in `_arrays`. Every
    result is computed from `_arrays` and the arguments alone, so that a loaded space gives the same bits.
    """

    _kinds: ClassVar[dict[str, type[BaseSpace]]] = {}

    _kind: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # The bare name is for this package's own: a user's `Ridge` is not to be loaded in place of ours.
        own = cls.__module__.startswith("pycm.spaces.")
        cls._kind = cls.__name__ if own else f"{cls.__module__}.{cls.__qualname__}"
        BaseSpace._kinds[cls._kind] = cls

    def __init__(self) -> None:
        self._arrays: Arrays = {}

    @abstractmethod
    def fit(self, image_features: Any, text_features: Any, pairs: Any = None, *, weights: Any = None) -> Self:
        """Learn the space from image rows that belong to text rows; replaces an earlier fit.

        Args:
            image_features: floating point [N, Di].
            text_features: floating point [M, Dt].
            pairs: integers [P, 2] of (image row, text row): one image may have many texts and the reverse.
                None pairs row i with row i, and then N = M.
            weights: [P] positive weights of the pairs; None weighs all equally.

        Raises:
            TypeError, ValueError: wrong types, shapes or indices, NaN (the row is named), no pairs.
        """

    @abstractmethod
    def transform_images(self, image_features: Any) -> Features:
        """Image features [N, Di] -> float32 [N, d]. RuntimeError before `fit`, ValueError as `fit`."""

    @abstractmethod
    def transform_texts(self, text_features: Any) -> Features:
        """Text features [N, Dt] -> float32 [N, d]. RuntimeError before `fit`, ValueError as `fit`."""

    @property
    def fitted(self) -> bool:
        """Whether the transforms can be called."""
        return bool(self._arrays)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments, by name and as they were given.

        deep: also those of an inner space, as "space__alpha".
        """
        params = {name: getattr(self, name) for name in self._parameter_names()}
        inner = {name: value for name, value in params.items() if deep and isinstance(value, BaseSpace)}
        for name, space in inner.items():
            params |= {f"{name}__{key}": value for key, value in space.get_params().items()}
        return params

    def set_params(self, **params: Any) -> Self:
        """Change constructor arguments, also "space__alpha", and forget what was fitted.

        Raises ValueError for unknown names and wrong values.
        """
        unknown = sorted(set(params) - set(self.get_params()))
        if unknown:
            known = ", ".join(self.get_params())
            raise ValueError(f"{type(self).__name__}.set_params: unknown {unknown[0]!r}; there are: {known}")
        arguments = self.get_params(deep=False)
        arguments |= {name: value for name, value in params.items() if "__" not in name}
        for name, value in params.items():
            outer, nested, key = name.partition("__")
            if nested:
                arguments[outer].set_params(**{key: value})
        fresh = type(self)(**arguments)
        vars(self).clear()
        vars(self).update(vars(fresh))
        return self

    @classmethod
    def _parameter_names(cls) -> list[str]:
        return [name for name in inspect.signature(cls.__init__).parameters if name != "self"]

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={_short(value)}" for name, value in self.get_params(deep=False).items())
        return f"{type(self).__name__}({values})"

    # Saving. Subclasses whose arguments are not all JSON values override these two.
    def _state(self) -> tuple[dict[str, Any], Arrays]:
        return self.get_params(deep=False), self._arrays

    @classmethod
    def _from_state(cls, params: Mapping[str, Any], arrays: Arrays) -> Self:
        space = cls(**params)
        space._arrays = arrays
        return space

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json and weights.safetensors to `folder` (made if missing).

        Both are written under a temporary name and renamed; config.json comes last and holds the digest of
        the weights, so that `load` notices a save that was cut off between the two.

        Raises:
            RuntimeError: before `fit`.
            OSError: untouched.
        """
        self._check_fitted("save")
        dump = require("safetensors.numpy", "text", f"{type(self).__name__}.save").save
        params, arrays = self._state()
        data: bytes = dump({name: np.ascontiguousarray(array) for name, array in arrays.items()})
        document = {
            "format": _FORMAT,
            "class": self._kind,
            "params": params,
            "weights_sha256": hashlib.sha256(data).hexdigest(),
        }
        text = json.dumps(document, ensure_ascii=False, indent=1, default=_plain)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / _WEIGHTS, "wb") as binary:
            binary.write(data)
        with atomic_write(folder / _CONFIG) as file:
            file.write(text)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """What `save` wrote; errors as `load_space`, and ValueError where it is of another class."""
        space = load_space(folder)
        if not isinstance(space, cls):
            raise ValueError(f"{cls.__name__}.load: {folder} holds a {type(space).__name__}")
        return space

    def _check_fitted(self, method: str) -> None:
        if not self.fitted:
            raise RuntimeError(
                f"{type(self).__name__}.{method}: not fitted, call fit(image_features, text_features) first"
            )

    def _input(self, method: str, argument: str, x: Any, dim: int) -> npt.NDArray[Any]:
        self._check_fitted(method)
        return check_features(f"{type(self).__name__}.{method}", argument, x, dim)


def load_space(folder: str | os.PathLike[str]) -> BaseSpace:
    """The space in a folder that `save` wrote, of whichever class.

    Raises:
        OSError: a file is missing or unreadable.
        ValueError: not a saved space, of a newer format, or weights that are not those of the configuration.
    """
    path = Path(folder) / _CONFIG
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        version, name = document["format"], document["class"]
        params, digest = document["params"], document["weights_sha256"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"load_space: {path} is not the configuration of a space: {error!r}") from error
    if version != _FORMAT:
        raise ValueError(f"load_space: {path} has format {version!r}, this version reads {_FORMAT}")
    if name not in BaseSpace._kinds:
        raise ValueError(f"load_space: {path} names an unknown space {name!r}")
    weights = path.with_name(_WEIGHTS)
    data = weights.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(f"load_space: {weights} does not hold the bytes that {path} was saved with")
    arrays: Arrays = require("safetensors.numpy", "text", "load_space").load(data)
    return BaseSpace._kinds[name]._from_state(params, arrays)


def check_pairs(
    function: str, n_images: int, n_texts: int, pairs: Any, weights: Any
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Checked (pairs int64 [P, 2], weights float64 [P]), with `pairs=None` spelled out."""
    if pairs is None:
        if n_images != n_texts:
            raise ValueError(
                f"{function}: without pairs, image_features and text_features must have as many rows, "
                f"got {n_images} and {n_texts}"
            )
        index = np.repeat(np.arange(n_images, dtype=np.int64)[:, None], 2, axis=1)
    else:
        given = np.asarray(pairs)
        if given.ndim != 2 or given.shape[1] != 2:
            raise ValueError(f"{function}: pairs must have shape [P, 2], got {list(given.shape)}")
        if given.size and given.dtype.kind not in "iu":
            raise TypeError(f"{function}: pairs must be integers, got {given.dtype}")
        index = given.astype(np.int64)
        for column, (name, rows) in enumerate((("image", n_images), ("text", n_texts))):
            bad = (index[:, column] < 0) | (index[:, column] >= rows)
            if bad.any():
                row = int(np.argmax(bad))
                raise ValueError(
                    f"{function}: pairs row {row}: {name} row must be in [0, {rows - 1}], got {index[row, column]}"
                )
    if len(index) < 2:
        raise ValueError(f"{function}: at least 2 pairs are needed, got {len(index)}")
    if weights is None:
        return index, np.ones(len(index))
    given_weights = np.asarray(weights, dtype=np.float64)
    if given_weights.shape != (len(index),):
        raise ValueError(f"{function}: weights must have shape [{len(index)}], got {list(given_weights.shape)}")
    bad = ~(np.isfinite(given_weights) & (given_weights > 0))
    if bad.any():
        row = int(np.argmax(bad))
        raise ValueError(f"{function}: weights must be positive and finite, got {given_weights[row]} at {row}")
    return index, given_weights


def is_count(value: Any) -> bool:
    """Whether `value` is a positive integer, Python's or NumPy's."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= 1)


def is_positive(value: Any) -> bool:
    """Whether `value` is a positive finite number, Python's or NumPy's."""
    return isinstance(value, (int, float, np.integer, np.floating)) and bool(0 < value < float("inf"))


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a parameter of type {type(value).__name__} cannot be saved")


def _short(value: Any) -> str:
    return f"array{list(value.shape)}" if isinstance(value, np.ndarray) else repr(value)
