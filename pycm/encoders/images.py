"""Reading images: one upright 8-bit RGB picture, or a reason why not.

Whatever a file holds becomes RGB as a viewer would show it on a white page: the EXIF orientation is applied,
palettes are resolved, transparency is composited on white, grey is repeated over the channels, 16-bit samples
are scaled to 8 bit, and of an animation the first frame is taken.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .._optional import require
from .base import ImageItem

if TYPE_CHECKING:
    from PIL import Image as PILImage

#: Part of every cache key of an image: raise it when the same bytes give other pixels than before.
PIXELS_VERSION = 1


class UnreadableInputError(ValueError):
    """Some inputs cannot be read.

    Attributes:
        errors: one (name, reason) for every unreadable input, in the order of the inputs.
        total: how many inputs there were.
        kind: what they are: "images" or "clips".
    """

    def __init__(self, errors: Iterable[tuple[str, str]], total: int, kind: str = "images") -> None:
        self.errors = list(errors)
        self.total = total
        self.kind = kind
        listed = "; ".join(f"{name} ({reason})" for name, reason in self.errors)
        super().__init__(f"{len(self.errors)} of {total} {kind} cannot be read: {listed}")

    def __reduce__(self) -> tuple[Any, ...]:  # the message alone would not rebuild it in another process
        return type(self), (self.errors, self.total, self.kind)


class ImageReadError(ValueError):
    """One image cannot be read; the text is the reason, without the image's name."""


def is_path(item: object) -> bool:
    """Whether an image item is a path."""
    return isinstance(item, (str, os.PathLike))


def item_name(item: ImageItem, index: int) -> str:
    """What to call an image in a message: its path, or its place in the list."""
    if isinstance(item, (str, os.PathLike)):
        return str(os.fspath(item))
    filename = getattr(item, "filename", "")
    return str(filename) if filename else f"items[{index}]"


def check_image(function: str, item: object, index: int, what: str = "items") -> None:
    """Raise TypeError for what is no image item at all, which is a mistake in the caller's code."""
    if is_path(item):
        return
    if isinstance(item, np.ndarray):
        if item.dtype == np.uint8 and (item.ndim == 2 or (item.ndim == 3 and item.shape[2] in (1, 3, 4))):
            return
        got = f"{item.dtype} of shape {item.shape}"
    elif hasattr(item, "getexif") and hasattr(item, "convert"):
        return
    else:
        got = type(item).__name__
    raise TypeError(
        f"{function}: {what}[{index}] must be a path, a PIL image or uint8 pixels "
        f"[H, W], [H, W, 1], [H, W, 3] or [H, W, 4], got {got}"
    )


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """A file's bytes. Raises ImageReadError for a missing, unreadable or empty file."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise ImageReadError(error.strerror or str(error)) from error
    except ValueError as error:  # a NUL in the name
        raise ImageReadError(str(error)) from error
    if not data:
        raise ImageReadError("the file is empty")
    return data


def load_image(item: ImageItem | bytes) -> PILImage.Image:
    """One image as an upright PIL image of mode RGB.

    Args:
        item: a path, a file's bytes, a PIL image (not changed), or uint8 pixels [H, W], [H, W, 1] (grey),
            [H, W, 3] (RGB), [H, W, 4] (RGBA).

    Raises:
        ImageReadError: missing, empty, not an image, truncated, broken, without pixels, or of 32-bit samples
            whose range nobody can know.
        TypeError: not an image item.
    """
    Image = require("PIL.Image", "image", "load_image")
    check_image("load_image", "" if isinstance(item, bytes) else item, 0)
    if isinstance(item, np.ndarray):
        if 0 in item.shape:
            raise ImageReadError(f"it has no pixels: shape {item.shape}")
        pixels = item[:, :, 0] if item.ndim == 3 and item.shape[2] == 1 else item
        return _to_rgb(Image.fromarray(np.ascontiguousarray(pixels)))
    if isinstance(item, (str, os.PathLike)):
        item = read_bytes(item)
    if not isinstance(item, bytes):
        return _decoded(item)
    try:
        with Image.open(io.BytesIO(item)) as image:
            return _decoded(image)
    except Image.UnidentifiedImageError as error:
        raise ImageReadError(f"not an image of a known format: it begins with {item[:12]!r}") from error
    except (MemoryError, ImageReadError):
        raise
    except Exception as error:  # broken files make decoders raise anything: SyntaxError, struct.error, ...
        raise ImageReadError(_reason(error)) from error


def _decoded(image: PILImage.Image) -> PILImage.Image:
    from PIL import ImageOps

    try:
        image.load()
        if image.getexif().get(0x0112, 1) != 1:  # Orientation
            image = ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception as error:  # as above: the decoders run here
        raise ImageReadError(_reason(error)) from error
    if 0 in image.size:
        raise ImageReadError(f"it has no pixels: {image.size[0]} x {image.size[1]}")
    return _to_rgb(image)


def _reason(error: Exception) -> str:
    return str(error).strip() or type(error).__name__


def _to_rgb(image: PILImage.Image) -> PILImage.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return _grey16(image)
    if image.mode == "F":
        raise ImageReadError("32-bit floating point samples: scale them to 8 bit first")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return _on_white(image.convert("RGBA"))
    return image.convert("RGB")


def _on_white(image: PILImage.Image) -> PILImage.Image:
    from PIL import Image

    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _grey16(image: PILImage.Image) -> PILImage.Image:
    from PIL import Image

    # Pillow gives 16-bit grey as "I;16*" or, in older releases and for PGM, as "I" holding 0..65535.
    samples = np.asarray(image).astype(np.int64)
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise ImageReadError("32-bit integer samples: scale them to 8 bit first")
    grey = ((samples * 255 + 32767) // 65535).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[samples == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def load_images(
    function: str, items: Sequence[Any], first: int = 0
) -> tuple[list[PILImage.Image], list[int], list[tuple[str, str]]]:
    """Read every image of `items`.

    Returns (images, kept, errors): the images that could be read, their indices, counted from `first`, and
    (name, reason) for each other one. Raises TypeError for what is no image item.
    """
    images, kept, errors = [], [], []
    for i, item in enumerate(items, start=first):
        check_image(function, item, i)
        try:
            images.append(load_image(item))
            kept.append(i)
        except ImageReadError as error:
            errors.append((item_name(item, i), str(error)))
    return images, kept, errors
