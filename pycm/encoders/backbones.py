"""Image backbones of timm and torchvision, without their classifier heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._optional import require
from .base import loading
from .module import Batch, TorchEncoder, stack_images
from .preprocess import ImagePreprocess

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


class _Backbone(TorchEncoder):
    preprocess: Callable[[Any], torch.Tensor]

    def _prepare(self, items: list[Any]) -> Batch:
        return stack_images([self.preprocess(image) for image in items])

    def _config(self) -> Any:
        return {"preprocess": self.preprocess}


class TimmBackbone(_Backbone):
    """A timm model's pooled features, before its classifier.

    Args:
        model: a timm model name (its pretrained weights come from timm's cache or hub), or a built model.
        preprocess: RGB PIL image -> tensor [3, H, W]; None makes timm's evaluation transform for the
            model (size, crop, mean, std and interpolation from its `pretrained_cfg`).
        device: moves the model there; None leaves it.
        name: for people; None takes the model's.

    Raises:
        ImportError: timm is not installed.
        ValueError: the model has no `forward_features`/`forward_head`.
    """

    def __init__(
        self,
        model: str | torch.nn.Module,
        preprocess: Callable[[Any], torch.Tensor] | None = None,
        *,
        device: str | torch.device | None = None,
        name: str | None = None,
    ) -> None:
        if isinstance(model, str):
            timm = require("timm", None, "TimmBackbone")
            name = name or f"timm:{model}"
            with loading("TimmBackbone", model):
                built: Any = timm.create_model(model, pretrained=True)
        else:
            built = model
        if not (hasattr(built, "forward_features") and hasattr(built, "forward_head")):
            raise ValueError(f"TimmBackbone: {type(built).__name__} has no forward_features")
        super().__init__(built, name=name or f"timm:{type(built).__name__}", modality="image", device=device)
        self.preprocess = preprocess or self._own_preprocess(built)

    @staticmethod
    def _own_preprocess(model: Any) -> ImagePreprocess:
        config = require("timm.data", None, "TimmBackbone").resolve_model_data_config(model)
        modes = {"center": "crop", "border": "pad", "squash": "squash"}
        return ImagePreprocess(
            size=tuple(config["input_size"][1:]),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            crop=float(config["crop_pct"]),
            fit=modes[config.get("crop_mode") or "center"],  # type: ignore[arg-type]
            interpolation=config["interpolation"],
        )

    def _forward(self, batch: Any) -> Any:
        module: Any = self.module
        return module.forward_head(module.forward_features(batch), pre_logits=True)


# Where torchvision's classification models keep the layer that ends in class scores.
_TORCHVISION_HEADS = ("fc", "classifier", "heads", "head")


class TorchvisionBackbone(_Backbone):
    """A torchvision classifier's features: what its last linear layer is given.

    The model itself is left as it is; the features are caught on their way into the layer.

    Args:
        model: a torchvision model name (with its default weights, from torch's download cache), or a
            built model.
        preprocess: RGB PIL image -> tensor [3, H, W]; None takes the weights' own transform for a name, and
            the ImageNet convention (224, crop 0.875, ImageNet mean and std, bilinear) for a built model.
        device: moves the model there; None leaves it.
        name: for people; None takes the model's.

    Raises:
        ImportError: torchvision is not installed, or does not fit the installed torch.
        ValueError: no final linear layer was found (use `ModuleEncoder` for such a model).
    """

    def __init__(
        self,
        model: str | torch.nn.Module,
        preprocess: Callable[[Any], torch.Tensor] | None = None,
        *,
        device: str | torch.device | None = None,
        name: str | None = None,
    ) -> None:
        if isinstance(model, str):
            models = require("torchvision.models", None, "TorchvisionBackbone")
            name = name or f"torchvision:{model}"
            with loading("TorchvisionBackbone", model):
                weights = models.get_model_weights(model).DEFAULT
                built: Any = models.get_model(model, weights=weights)
            preprocess = preprocess or weights.transforms()
        else:
            built = model
        super().__init__(built, name=name or f"torchvision:{type(built).__name__}", modality="image", device=device)
        self.preprocess = preprocess or ImagePreprocess(interpolation="bilinear")
        self._last = self._last_linear()
        self._dim = self._last.in_features

    def _last_linear(self) -> torch.nn.Linear:
        import torch

        for attribute in _TORCHVISION_HEADS:
            head = getattr(self.module, attribute, None)
            if isinstance(head, torch.nn.Module):
                linear = [m for m in head.modules() if isinstance(m, torch.nn.Linear)]
                if linear:
                    return linear[-1]
        raise ValueError(
            f"TorchvisionBackbone: {type(self.module).__name__} has no final linear layer under any of "
            f"{', '.join(_TORCHVISION_HEADS)}; use ModuleEncoder with a postprocess function"
        )

    def _forward(self, batch: Any) -> Any:
        caught: list[torch.Tensor] = []
        hook = self._last.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
        try:
            self.module(batch)
        finally:
            hook.remove()
        return caught[-1].flatten(1)
