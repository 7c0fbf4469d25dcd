"""What the matchers over regions and words share: encoders, the training of their network, storage."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from .._files import atomic_write
from .._optional import require
from ..encoders.base import check_batch_size
from ..encoders.module import TorchEncoder
from .encoded import Encoded, Options
from .features import CacheOption, OnError, as_cache, make_encoders
from .inputs import Inputs, width
from .networks import device_of, load_weights, weights_of
from .regions import encode_regions, encode_words
from .storage import CONFIG, check_options, is_parts, write_folder
from .storage_tuned import pack, unpack
from .training import Record, Training, train
from .tuning import FineTune, FineTuned, Tuning, before, chosen, read_ahead, tuning

if TYPE_CHECKING:
    from typing_extensions import Self

_FORMAT = 1
_NETWORK = "network.safetensors"
# What depends on the machine is not saved.
_MACHINE = {"cache", "batch_size", "device", "progress", "image_encoder", "text_encoder"}


class RegionModel:
    """Base of the classes that read images as regions and texts as words."""

    def _set_options(
        self, image_encoder: Any, text_encoder: Any, *, dim: int, dropout: float, cache: CacheOption, batch_size: int,
        seed: int, device: Any, progress: bool | None,
    ) -> None:  # fmt: skip
        name = type(self).__name__
        check_batch_size(name, batch_size)
        if isinstance(dim, bool) or not isinstance(dim, (int, np.integer)) or dim < 1:
            raise ValueError(f"{name}: dim must be a positive int, got {dim!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"{name}: dropout must be in [0, 1), got {dropout!r}")
        self.dim, self.dropout, self.cache, self.batch_size = int(dim), float(dropout), cache, batch_size
        self.seed, self.device, self.progress = seed, device, progress
        self._cache = as_cache(cache)
        self._specs = [given if isinstance(given, str) else None for given in (image_encoder, text_encoder)]
        self.image_encoder, self.text_encoder = make_encoders(image_encoder, text_encoder, device_of(device))
        self.history_: list[Record] = []
        self.errors_: list[tuple[str, str]] = []
        self._network: nn.Module | None = None
        self._sizes: tuple[int, int] = (0, 0)
        self._tuning: Tuning | None = None  # while `fit` trains encoders
        self._tuned: dict[str, TorchEncoder] = {}  # trained copies, by the kind of item

    @property
    def encoders(self) -> Mapping[str, Any]:
        """The encoders by the kind of item; of fine-tuned ones the trained copies."""
        return {**self._given(), **self._tuned}

    def _given(self) -> dict[str, Any]:
        return {"image": self.image_encoder, "text": self.text_encoder}

    @property
    def fitted(self) -> bool:
        """Whether `fit` has ended, or it was loaded."""
        return self._network is not None

    def _options(self) -> Options:
        device = device_of(self.device)
        return Options(self._cache, None, self.batch_size, self.progress, device, self._tuning)

    @contextmanager
    def _fitting(self, function: str, fine_tune: FineTune, training: Training) -> Iterator[None]:
        """A fit, in which the encoders are trained that `fine_tune` names."""
        names = chosen(function, fine_tune, ("image", "text"), self._given())
        self._network, self._tuned = None, {}
        with tuning(self, names, training.kept_bytes, None):
            yield

    def _make_network(self, regions: int, words: int) -> nn.Module:
        raise NotImplementedError

    def _check_fitted(self, method: str) -> Any:
        if self._network is None:
            raise RuntimeError(f"{type(self).__name__}.{method}: not fitted, call fit first")
        return self._network

    def _regions(
        self, function: str, images: Sequence[Any], on_error: OnError = "raise", numbers: Sequence[int] | None = None
    ) -> Encoded:
        found = encode_regions(function, self.encoders["image"], images, self._options(), on_error, numbers)
        return self._fits(function, "image", 0, found)

    def _words(self, function: str, texts: Sequence[str]) -> Encoded:
        return self._fits(function, "text", 1, encode_words(function, self.encoders["text"], texts, self._options()))

    def _fits(self, function: str, kind: str, which: int, found: Encoded) -> Encoded:
        size = width(found.features)  # type: ignore[arg-type]
        if self.fitted and size != self._sizes[which]:
            raise ValueError(f"{function}: {kind}s must have the fitted {self._sizes[which]} features, got {size}")
        return found

    def _train(
        self, regions: Any, words: Any, taken: Any, loss: Any, validate: Any, count: int, training: Training,
        learned: Sequence[Any], arrays: Sequence[npt.NDArray[Any]], **files: Any,
    ) -> None:  # fmt: skip
        """Train a fresh network: taken(rows) are a batch's regions and words; loss(network, rows, done);
        validate(network, encode), where `encode` makes features of what trained encoders read; `learned` is what
        `fit_scales` takes."""
        sizes = width(regions), width(words)
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed)
            network = self._make_network(*sizes).to(device_of(self.device))
        network.fit_scales(*map(before, learned))  # type: ignore[operator]
        tuned: FineTuned | None = None
        if self._tuning is not None:
            for kind, projection in (("image", network.regions), ("text", network.words)):
                if kind in self._tuning.names:
                    projection.standardize.loosen()  # type: ignore[union-attr, operator]
            tuned = FineTuned(network, self._tuning)
        whole: Any = tuned or network
        digest = hashlib.sha256()
        if files["checkpoint"] is not None:  # it may read all items' files
            plain = sorted(self._params().items()), sizes, training.plain(tuned=tuned is not None)
            digest.update(repr(plain).encode())
            for part in (Inputs(regions).digest(), Inputs(words).digest(), *(array.tobytes() for array in arrays)):
                digest.update(part)
        self.history_ = train(
            whole, lambda rows, done: loss(whole, rows, done),
            None if validate is None else lambda: validate(network, before if tuned is None else tuned.encoded),
            count, training, seed=self.seed, identity=digest.hexdigest(), progress=self.progress,
            encoders=None if tuned is None else tuned.encoders,
            ahead=None if tuned is None else lambda rows: read_ahead(*taken(rows)), **files,
        )  # fmt: skip
        self._use({} if tuned is None else tuned.finished())
        self._network, self._sizes = network, sizes

    def _use(self, tuned: Mapping[int, TorchEncoder]) -> None:
        """Encode with trained copies in the place of encoders, by the ids of these."""
        self._tuned = {kind: tuned[id(encoder)] for kind, encoder in self._given().items() if id(encoder) in tuned}

    # -- storage --

    def _params(self) -> dict[str, Any]:
        names = inspect.signature(type(self).__init__).parameters
        return {name: getattr(self, name) for name in names if name != "self" and name not in _MACHINE}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write to `folder`, made if missing: config.json, and parts-*/network.safetensors.

        Encoders made from a spec are saved by it; others are named only, and `load` asks for them. Of fine-tuned ones
        the weights that training changed are saved. What the folder held before stays whole until the new files are.

        Raises:
            OSError: untouched.
            RuntimeError: not fitted.
        """
        network = self._check_fitted("save")
        dump = require("safetensors.torch", "text", f"{type(self).__name__}.save").save
        fine_tuned, files = pack(self._given(), self.encoders)
        document = {
            "class": type(self).__name__,
            "format": _FORMAT,
            "params": self._params(),
            "sizes": self._sizes,
            "encoders": {
                side: {"name": encoder.name, "spec": spec, "fingerprint": encoder.fingerprint}
                for (side, encoder), spec in zip(self._given().items(), self._specs, strict=True)
            },
            "fine_tuned": fine_tuned,
        }
        files[_NETWORK] = dump(weights_of(network))

        def write(parts: Path) -> None:
            for name, data in files.items():
                with atomic_write(parts / name, "wb") as file:
                    file.write(data)

        write_folder(Path(folder), document, write)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, strict: bool = True, **options: Any) -> Self:
        """What `save` wrote.

        Args:
            folder: given to `save`.
            strict: refuse encoders whose fingerprints are not those of the saved ones.
            **options: of the constructor, in place of the saved ones: `image_encoder` and `text_encoder` where these
                were objects; `cache`, `batch_size`, `device`, `progress`.

        Raises:
            OSError: a file is missing.
            ValueError: not saved by this class, an encoder that has to be passed, or one that differs.
            TypeError: an option that is none of these.
        """
        function = f"{cls.__name__}.load"
        read = require("safetensors.torch", "text", function).load
        check_options(function, cls, options)
        path = Path(folder) / CONFIG
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            kind, version, parts = document["class"], document["format"], document["parts"]
            params, sizes, encoders = document["params"], document["sizes"], document["encoders"]
            fine_tuned = document.get("fine_tuned", [])
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{function}: {path} is not a saved matcher: {error!r}") from error
        if kind != cls.__name__ or not is_parts(parts):
            raise ValueError(f"{function}: {path} is not a saved {cls.__name__}, but {kind!r}")
        if version != _FORMAT:
            raise ValueError(f"{function}: {path} has format {version!r}, this version reads {_FORMAT}")
        for side, about in encoders.items():
            name = f"{side}_encoder"
            if name not in options and about["spec"] is None:
                raise ValueError(
                    f"{function}: {name} {about['name']!r} in {path} was not made from a spec and is not saved; "
                    f"make it again and pass it: load(folder, {name}=...)"
                )
            params.setdefault(name, about["spec"])
        model = cls(**{**params, **options})
        for side, encoder in model.encoders.items():
            if strict and encoder.fingerprint != encoders[side]["fingerprint"]:
                raise ValueError(
                    f"{function}: {side}_encoder {encoder.name!r} is not the one that {path} was saved with (its "
                    "fingerprint differs); strict=False uses it nevertheless"
                )
        network = model._make_network(*sizes)
        load_weights(network, read((path.parent / parts / _NETWORK).read_bytes()))
        model._network, model._sizes = network.to(device_of(model.device)).eval(), tuple(sizes)
        model._use(unpack(function, path.parent / parts, fine_tuned, model._given()))
        return model
