"""Features from several depths of a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .._rows import RowNorm, check_row_norm
from .module import Batch, TorchEncoder


class LayersEncoder(TorchEncoder):
    """An encoder's features together with what inner layers of its network saw.

    The last layers of a classifier know objects; earlier ones keep shape, texture and colour, which help to
    tell apart what the classes do not. Each layer's output [B, C, ...] is averaged over all positions, each
    block is normalised, and the blocks stand side by side: the named layers in the order given, then the
    encoder's own features.

    Args:
        encoder: any `TorchEncoder`: `EfficientNetLite0`, `TimmBackbone`, `ModuleEncoder`, ...
        layers: names of submodules as in `encoder.module.named_modules()`, whose output is one tensor. Of a
            layer called several times in one pass the last call counts.
        include_output: whether the encoder's own features come last.
        normalize: what is done to each row of each block: "none", "l2" or "power" (signed square root, then
            unit length), computed in float32.
        name: for people.

    It costs one forward pass. While it runs, hooks lie on the network: not for use from two threads at once.
    """

    def __init__(
        self,
        encoder: TorchEncoder,
        layers: Sequence[str],
        *,
        include_output: bool = True,
        normalize: RowNorm = "power",
        name: str | None = None,
    ) -> None:
        if not isinstance(encoder, TorchEncoder):
            raise TypeError(f"LayersEncoder: encoder must be a TorchEncoder, got {type(encoder).__name__}")
        if isinstance(layers, str) or not layers:
            raise ValueError(f"LayersEncoder: layers must be a non-empty list of names, got {layers!r}")
        modules = dict(encoder.module.named_modules())
        for layer in layers:
            if layer not in modules:
                raise ValueError(f"LayersEncoder: layers: the network of {encoder.name} has no {layer!r}")
        check_row_norm("LayersEncoder", "normalize", normalize)
        super().__init__(
            encoder.module, name=name or f"{encoder.name}[{len(layers)} layers]", modality=encoder.modality
        )
        self.encoder = encoder
        self._pass_size = encoder._pass_size
        self.layers = list(layers)
        self.include_output = include_output
        self.normalize: RowNorm = normalize

    def _prepare(self, items: list[Any]) -> Batch:
        return self.encoder._prepare(items)

    def _forward(self, batch: Any) -> Any:
        import torch

        modules = dict(self.module.named_modules())
        seen: dict[str, Any] = {}
        handles = []
        try:
            for layer in self.layers:
                handles.append(modules[layer].register_forward_hook(_keep(seen, layer)))
            output = self.encoder._forward(batch)
        finally:
            for handle in handles:
                handle.remove()
        blocks = []
        for layer in self.layers:
            value = seen.get(layer)
            if not isinstance(value, torch.Tensor) or value.ndim < 2:
                got = "no call" if layer not in seen else type(value).__name__
                raise TypeError(f"LayersEncoder: layer {layer!r} must give a tensor [B, C, ...], got {got}")
            blocks.append(value.float().flatten(2).mean(2) if value.ndim > 2 else value.float())
        if self.include_output:
            blocks.append(output.float())
        return torch.cat([self._normalized(block) for block in blocks], dim=1)

    def _normalized(self, block: Any) -> Any:
        import torch

        if self.normalize == "none":
            return block
        if self.normalize == "power":
            block = block.sign() * block.abs().sqrt()
        return torch.nn.functional.normalize(block, dim=1)

    def _module_digest(self) -> str:
        return ""  # it is in the encoder's fingerprint

    def _config(self) -> Any:
        return {
            "encoder": self.encoder.fingerprint,
            "layers": self.layers,
            "include_output": self.include_output,
            "normalize": self.normalize,
        }


def _keep(seen: dict[str, Any], layer: str) -> Any:
    def hook(module: Any, inputs: Any, output: Any) -> None:
        seen[layer] = output

    return hook
