"""Encoders that run a torch module, and `ModuleEncoder` for any module of the user's own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from .._optional import require
from .base import (
    Features,
    Modality,
    check_batch_size,
    check_device,
    check_items,
    check_texts,
    progress_bar,
)
from .fingerprint import digest_of
from .images import UnreadableInputError, load_images

if TYPE_CHECKING:
    import torch

Batch: TypeAlias = "torch.Tensor | Mapping[str, torch.Tensor]"


class TorchEncoder(ABC):
    """Batches, device, evaluation mode, precision and fingerprint of an encoder around a torch module.

    A subclass says how a list of items becomes a batch (`_prepare`), how a batch becomes rows (`_forward`)
    and what beside the module's weights determines them (`_config`).

    While it encodes, the module is in evaluation mode, without autograd and autocast, cuDNN is asked for
    deterministic algorithms, and all of this is put back afterwards. Results are float32 whatever the
    module's own type. One encoder must not be used by two threads at once if its module was left in
    training mode; otherwise it may.
    """

    #: On the CPU, how many items of a tensor pass the module at once; None is all of the batch.
    _pass_size: int | None = None

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        name: str,
        modality: Modality,
        dim: int | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        kind = type(self).__name__
        torch = require("torch", "torch", kind)
        if not isinstance(module, torch.nn.Module):
            raise TypeError(f"{kind}: module must be a torch.nn.Module, got {type(module).__name__}")
        if modality not in ("image", "text"):
            raise ValueError(f'{kind}: modality must be "image" or "text", got {modality!r}')
        if modality == "image":
            require("PIL.Image", "image", kind)
        check_device(type(self).__name__, device)
        self.module = module if device is None else module.to(device)
        self.name = name
        self.modality: Modality = modality
        self._dim = dim

    @abstractmethod
    def _prepare(self, items: list[Any]) -> Batch:
        """RGB PIL images, or texts, as the tensor or the keyword arguments of one forward pass."""

    @abstractmethod
    def _forward(self, batch: Any) -> Any:
        """Rows [B, dim] of a batch on the module's device."""

    @abstractmethod
    def _config(self) -> Any:
        """What determines the features beside the class and the module: preprocessing, pooling, ..."""

    @property
    def device(self) -> torch.device:
        """Where the module's parameters (or buffers) are; the CPU for a module that has none."""
        import torch

        tensors: list[torch.Tensor] = [*self.module.parameters(), *self.module.buffers()]
        return tensors[0].device if tensors else torch.device("cpu")

    @property
    def dim(self) -> int:
        """Features per row; found by encoding one blank item where it was not given."""
        if self._dim is None:
            blank: Any = "a" if self.modality == "text" else np.full((64, 64, 3), 255, dtype=np.uint8)
            self._dim = int(self._run("dim", [blank], self._forward).shape[1])
        return self._dim

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 over class, configuration, weights and preprocessing.

        Computed on first use and kept: train the module further, and make a new encoder for it. It can be
        assigned, for models that cannot be looked into; TypeError names such a part.
        """
        return digest_of(type(self), self._config(), self._module_digest())

    def _module_digest(self) -> str:
        return digest_of(self.module)

    def _steps(self, method: str, batch: Any) -> tuple[Any, Any]:
        """What `method` gives of a batch, with gradients: (rows [S, dim], how many each item has: int64 [B])."""
        if method != "encode":
            raise TypeError(f"{type(self).__name__}.{method} has no gradients")
        rows = self._forward(batch)
        return rows, rows.new_ones(len(rows), dtype=int)

    def encode(self, items: Sequence[Any], *, batch_size: int = 32, progress: bool | None = None) -> Features:
        """Encode items to float32 [N, dim]; see `Encoder.encode`."""
        return self._run("encode", items, self._forward, batch_size, progress)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r}, modality={self.modality!r}, device={self.device})"

    def _run(
        self,
        method: str,
        items: Sequence[Any],
        forward: Callable[[Any], Any],
        batch_size: int = 32,
        progress: bool | None = False,
        width: int | None = None,
    ) -> Features:
        function = f"{type(self).__name__}.{method}"
        check_batch_size(function, batch_size)
        (check_items if self.modality == "image" else check_texts)(function, items)
        if len(items) == 0:
            return np.empty((0, self.dim if width is None else width), dtype=np.float32)
        rows: list[Features] = []
        errors: list[tuple[str, str]] = []
        starts = range(0, len(items), batch_size)
        for start in progress_bar(starts, progress=progress, desc=self.name):
            batch = list(items[start : start + batch_size])
            if self.modality == "image":
                batch, _, failed = load_images(function, batch, first=start)
                errors += failed
            if not errors:  # after the first failure the rest is only read, to report every bad image
                rows.append(self._rows(function, forward, batch))
        if errors:
            raise UnreadableInputError(errors, len(items))
        return np.concatenate(rows)

    def _rows(self, function: str, forward: Callable[[Any], Any], items: list[Any]) -> Features:
        import torch

        with self._inference():
            batch = self._to_device(self._prepare(items))
            if self._pass_size is not None and batch.device.type == "cpu":
                out = torch.cat([forward(part) for part in batch.split(self._pass_size)])
            else:
                out = forward(batch)
        if not isinstance(out, torch.Tensor):
            raise TypeError(
                f"{function}: the module must return a tensor [B, dim], got {type(out).__name__}; "
                "pass postprocess= to pick one"
            )
        if out.ndim != 2 or out.shape[0] != len(items):
            raise ValueError(
                f"{function}: the module must return [{len(items)}, dim] for {len(items)} items, "
                f"got {list(out.shape)}; pass postprocess= to pool or flatten"
            )
        features: Features = out.float().cpu().numpy()
        if self._dim is not None and forward == self._forward and features.shape[1] != self._dim:
            raise ValueError(f"{function}: dim is {self._dim}, but the module gives {features.shape[1]}")
        return features

    def _to_device(self, batch: Any) -> Any:
        import torch

        if isinstance(batch, Mapping):
            return {key: self._to_device(value) for key, value in batch.items()}
        if not isinstance(batch, torch.Tensor):
            return batch
        dtype = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), None)
        if batch.is_floating_point() and dtype is not None:
            return batch.to(self.device, dtype)
        return batch.to(self.device)

    @contextmanager
    def _inference(self) -> Iterator[None]:
        import torch

        training = [m for m in self.module.modules() if m.training]
        cudnn = torch.backends.cudnn
        kept = cudnn.benchmark, cudnn.deterministic
        on_cuda = self.device.type == "cuda"
        try:
            if training:
                self.module.eval()
            if on_cuda:
                cudnn.benchmark, cudnn.deterministic = False, True
            with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
                yield
        finally:
            # Module by module: parts that the user froze in evaluation mode stay so.
            for module in training:
                module.training = True
            if on_cuda:
                cudnn.benchmark, cudnn.deterministic = kept


class ModuleEncoder(TorchEncoder):
    """Any `torch.nn.Module` with a preprocessing function, as an encoder.

    Args:
        module: called with the batch; its parameters' type and device are kept.
        preprocess: for images, one RGB `PIL.Image` -> a tensor [C, H, W], the same for each (they are
            stacked). For texts, a list of str -> a tensor [B, ...] or a mapping of tensors, which is passed
            on as keyword arguments (what a Hugging Face tokenizer returns).
        name: for people.
        dim: features per row; None finds out by encoding one blank item.
        device: moves `module` there (in place, as `module.to` does); None leaves it.
        postprocess: what `module` returns -> a tensor [B, dim]; needed where it is not one already. Fine-tuning trains
            `module` alone and refuses a postprocess with weights that require gradients.
        modality: "image" or "text".
        fingerprint: a str of your own that stands for module, preprocess and postprocess, to be changed
            whenever their results do. None works it out.

    The fingerprint covers the module (weights, buffers, attributes, hooks, code), and the code, defaults,
    captured variables and attributes of `preprocess` and `postprocess`, with all of your code that they call.
    What cannot be looked into, such as a scripted module, raises TypeError when it is asked for; pass your own.

    Example:
        >>> encoder = ModuleEncoder(net, ImagePreprocess(size=(64, 64)), name="mine")   # doctest: +SKIP
        >>> encoder.encode(["a.png", "b.png"]).shape                                    # doctest: +SKIP
        (2, 256)
    """

    def __init__(
        self,
        module: torch.nn.Module,
        preprocess: Callable[[Any], Any],
        *,
        name: str,
        dim: int | None = None,
        device: str | torch.device | None = None,
        postprocess: Callable[[Any], torch.Tensor] | None = None,
        modality: Modality = "image",
        fingerprint: str | None = None,
    ) -> None:
        super().__init__(module, name=name, modality=modality, dim=dim, device=device)
        if fingerprint is not None:
            if not isinstance(fingerprint, str) or not fingerprint:
                raise TypeError(f"ModuleEncoder: fingerprint must be a non-empty str, got {fingerprint!r}")
            self.fingerprint = digest_of("given", modality, fingerprint)
        for argument, value in (("preprocess", preprocess), ("postprocess", postprocess)):
            if not callable(value) and not (argument == "postprocess" and value is None):
                raise TypeError(f"ModuleEncoder: {argument} must be callable, got {type(value).__name__}")
        self.preprocess = preprocess
        self.postprocess = postprocess

    def _prepare(self, items: list[Any]) -> Batch:
        if self.modality == "text":
            batch: Batch = self.preprocess(items)
            return batch
        return stack_images([self.preprocess(image) for image in items])

    def _forward(self, batch: Any) -> Any:
        out = self.module(**batch) if isinstance(batch, Mapping) else self.module(batch)
        return out if self.postprocess is None else self.postprocess(out)

    def _config(self) -> Any:
        return {"preprocess": self.preprocess, "postprocess": self.postprocess, "modality": self.modality}


def stack_images(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Stack [C, H, W] tensors, or raise ValueError telling the two shapes that differ."""
    import torch

    for tensor in tensors:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"preprocess must return a tensor [C, H, W], got {type(tensor).__name__}")
        if tensor.shape != tensors[0].shape:
            raise ValueError(
                f"preprocess must give every image one shape, got {list(tensors[0].shape)} and {list(tensor.shape)}"
            )
    return torch.stack(tensors)
