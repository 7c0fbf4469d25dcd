"""The usual preparation of an image for a CNN or a vision transformer: resize, crop, scale, normalise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from .._optional import require

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImagePreprocess:
    """RGB image -> float32 tensor [3, height, width], (pixel / 255 - mean) / std.

    Attributes:
        size: (height, width) of the result, in pixels.
        mean, std: per channel, for pixels in [0, 1].
        crop: the share of the image's shorter side (after scaling to the wanted shape) that is kept.
            0.875 is the ImageNet convention (resize to 256, take the middle 224); 1.0 keeps it whole.
        fit: "crop" cuts the middle out of an image of another shape; "pad" keeps all of it, on white, and
            "squash" keeps all of it, distorted. `crop` is applied by "crop" only.
        interpolation: "bicubic", "bilinear", "lanczos" or "nearest"; all but the last low-pass filter when
            they shrink.
    """

    size: tuple[int, int] = (224, 224)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    crop: float = 0.875
    fit: Literal["crop", "pad", "squash"] = "crop"
    interpolation: Literal["bicubic", "bilinear", "lanczos", "nearest"] = "bicubic"

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise ValueError(f"ImagePreprocess: crop must be in (0, 1], got {self.crop}")
        if self.fit not in ("crop", "pad", "squash"):
            raise ValueError(f'ImagePreprocess: fit must be "crop", "pad" or "squash", got {self.fit!r}')
        if self.interpolation not in ("bicubic", "bilinear", "lanczos", "nearest"):
            raise ValueError(f"ImagePreprocess: unknown interpolation {self.interpolation!r}")

    def __call__(self, image: Image) -> torch.Tensor:
        require("torch", "torch", "ImagePreprocess")
        import torch

        pixels = np.asarray(self.resized(image), dtype=np.float32) / np.float32(255)
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        normalised = np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))
        return torch.from_numpy(normalised)

    def resized(self, image: Image) -> Image:
        """The uint8 picture, [size], that the network sees."""
        from PIL import Image as PILImage

        height, width = self.size
        resample = PILImage.Resampling[self.interpolation.upper()]
        w, h = image.size
        if self.fit == "squash":
            return image.resize((width, height), resample)
        if self.fit == "pad":
            scale = min(width / w, height / h)
            inner = (max(1, round(w * scale)), max(1, round(h * scale)))
            page = PILImage.new("RGB", (width, height), (255, 255, 255))
            page.paste(image.resize(inner, resample), ((width - inner[0]) // 2, (height - inner[1]) // 2))
            return page
        # Cut and resize in one step, from exact coordinates: no rounding to whole source pixels.
        scale = self.crop * min(w / width, h / height)
        cut_w, cut_h = scale * width, scale * height
        left, top = (w - cut_w) / 2, (h - cut_h) / 2
        return image.resize((width, height), resample, box=(left, top, left + cut_w, top + cut_h))
