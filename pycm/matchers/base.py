"""The one shape of all matchers, and where each part of it is for each system.

items -> encoders -> streams -> space -> head -> metric -> matches

system             encoders        streams               space               head       metric
ImageTextMatcher   image, text     one row an item       Ridge, CCA, ConSE   ranking    any of pycm.METRICS
VideoTextMatcher   frames, text    of time, each pooled  learned, + Ridge    ranking,   the same
                                   by LSTM or GRU                            pairs,
ImageVideoMatcher  image, frames   image: LSTM,          learned, + Ridge    labels     the same
                                   clip: GRU, fused
"""

from __future__ import annotations

import inspect
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ..functional import Metric

if TYPE_CHECKING:
    from typing_extensions import Self

Head: TypeAlias = Literal["ranking", "pairs", "labels"]


class Parameters:
    """The constructor's arguments as scikit-learn's `clone` takes them."""

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments by name, as they were given; `deep` adds nothing."""
        names = inspect.signature(type(self).__init__).parameters
        return {name: self._given_as(name) for name in names if name != "self"}

    def _given_as(self, name: str) -> Any:
        return getattr(self, name)

    def set_params(self, **params: Any) -> Self:
        """Change constructor arguments, and forget what was fitted.

        Raises ValueError for unknown names, and as the constructor.
        """
        given = self.get_params()
        unknown = sorted(params.keys() - given.keys())
        if unknown:
            raise ValueError(f"{type(self).__name__}.set_params: unknown {unknown[0]!r}; there are: {', '.join(given)}")
        fresh = type(self)(**{**given, **params})
        vars(self).clear()
        vars(self).update(vars(fresh))
        return self


class Matcher(Parameters, ABC):
    """What every matcher has.

    Attributes:
        encoders: by the kind of item.
        streams: what is read of a clip over time, as it was given: specs or streams; () where there is no clip.
        space: the closed-form part of the common space, None without.
        head: "ranking", "pairs" or "labels".
        metric: by which embeddings are ranked.

    `fit(items, others)` learns and returns self, `match` ranks both ways, `evaluate` tells recall and ranks where the
    matches are known, `save(folder)` writes what `load(folder)` reads on a machine without the training data.
    """

    space: Any
    metric: Metric
    streams: Any = ()
    head: Head = "ranking"

    @property
    @abstractmethod
    def encoders(self) -> Mapping[str, Any]: ...

    @abstractmethod
    def fit(self, *items: Any, **options: Any) -> Self: ...

    @abstractmethod
    def match(self, *items: Any, **options: Any) -> Any: ...

    @abstractmethod
    def evaluate(self, *items: Any, **options: Any) -> Any: ...

    @abstractmethod
    def save(self, folder: str | os.PathLike[str]) -> None: ...

    @classmethod
    @abstractmethod
    def load(cls, *folder: Any, **options: Any) -> Self: ...


def load(folder: str | os.PathLike[str], **options: Any) -> Any:
    """The matcher, or `RegionTextClassifier`, in a folder that `save` wrote; `options` as its class's `load` has them.

    Raises:
        OSError: a file is missing.
        ValueError: not a saved matcher.
    """
    path = Path(folder) / "config.json"
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["class"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"matchers.load: {path} is not a saved matcher: {error!r}") from error
    import pycm.matchers as matchers

    kind = getattr(matchers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and hasattr(kind, "load")):
        raise ValueError(f"matchers.load: {path} names an unknown matcher {name!r}")
    return kind.load(folder, **options)
