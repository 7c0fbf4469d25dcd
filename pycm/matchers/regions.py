"""Images as sets of regions and texts as sets of words: what the region matchers read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..encoders.base import ImageItem, check_items, check_texts
from ..encoders.cache import image_key, text_key
from ..encoders.images import ImageReadError, UnreadableInputError, check_image, is_path, item_name
from .encoded import Encoded, Options
from .features import OnError, check_finite, encode_items
from .inputs import Live, Steps
from .tuning import as_steps, check_pass, pixels

Int64: TypeAlias = npt.NDArray[np.int64]
GEOMETRY = 5


@dataclass(frozen=True)
class Boxes:
    """An image with the boxes of its regions.

    Attributes:
        image: a path, a PIL image or uint8 pixels.
        boxes: [R, 4], R >= 1: left, top, right, bottom in pixels; what lies outside the image is cut off.
    """

    image: ImageItem
    boxes: Any


def distinct_regions(function: str, items: Sequence[Any]) -> tuple[Int64, Int64]:
    """(the first place of each different item, for each item which of these it is): images by path or else by their
    pixels, with their boxes.

    Raises:
        TypeError: what is no image.
    """
    try:
        return distinct([_key(function, item, i) for i, item in enumerate(items)])
    except ImageReadError:  # whoever encodes them all names them by their places
        return np.arange(len(items)), np.arange(len(items))


def distinct(keys: Sequence[Any]) -> tuple[Int64, Int64]:
    """(the first place of each different key, ascending; for each key which of these it is)."""
    rows: dict[Any, int] = {}
    of = np.array([rows.setdefault(key, len(rows)) for key in keys], np.int64)
    return np.unique(of, return_index=True)[1], of


def _key(function: str, item: Any, index: int) -> Any:
    if isinstance(item, Boxes):
        boxes = np.asarray(item.boxes, np.float64)
        return _key(function, item.image, index), boxes.shape, boxes.tobytes()
    return os.fspath(item) if is_path(item) else image_key(function, item, index)


def encode_regions(
    function: str, encoder: Any, items: Sequence[Any], options: Options, on_error: OnError = "raise",
    numbers: Sequence[int] | None = None,
) -> Encoded:  # fmt: skip
    """Regions of images: of `Boxes` each box cut out and encoded, of a plain image the cells of the encoder's grid.

    After a region's features stand its place and size: left, top, right, bottom and area as shares of the image's.
    `numbers`: the places of the items in what the user gave, for messages.

    Raises:
        TypeError: a plain image and an encoder without `encode_grid`.
        ValueError: no images, boxes of another shape or without area, some images with boxes and some without, NaN.
        UnreadableInputError: images that cannot be read.
    """
    check_items(function, items)
    if not len(items):
        raise ValueError(f"{function}: images is empty")
    numbers = range(len(items)) if numbers is None else numbers
    boxed = [isinstance(item, Boxes) for item in items]
    if any(boxed):
        if not all(boxed):
            raise ValueError(f"{function}: images[{numbers[boxed.index(False)]}] has no boxes, others have")
        return _encode_boxes(function, encoder, items, options, on_error, numbers)
    if not hasattr(encoder, "encode_grid"):
        raise TypeError(
            f"{function}: image_encoder {encoder.name!r} has no encode_grid(); give images as Boxes(image, boxes)"
        )
    if options.trains("image"):
        check_pass(function, encoder, "encode_grid")
    result = encode_items(
        function, encoder, items, method="encode_grid", cache=options.cache, batch_size=options.batch_size,
        progress=options.progress, on_error=on_error,
    )  # fmt: skip
    names = [item_name(items[i], numbers[i]) for i in result.kept]
    check_finite(function, "image", result.features, names)
    cells = result.features.reshape(len(names), -1, encoder.dim)
    side = int(cells.shape[1] ** 0.5)
    y, x = np.divmod(np.arange(cells.shape[1]), side)
    places = np.stack([x, y, x + 1, y + 1, np.full(len(x), 1 / side)], 1) / side
    places = np.broadcast_to(places, (len(cells), *places.shape))
    values = np.concatenate([cells, places], 2).reshape(-1, encoder.dim + GEOMETRY)
    steps = _steps(values, [cells.shape[1]] * len(cells), options)
    features: Steps | Live = steps
    if options.trains("image"):
        given = [items[i] for i in result.kept]
        features = options.live(
            encoder, "encode_grid", lambda i: [pixels(given[i])], lambda i: image_key(function, given[i], i), steps,
            _with_places(steps),
        )  # fmt: skip
    return Encoded(features, names, result.kept, result.errors, {})


def _encode_boxes(
    function: str,
    encoder: Any,
    items: Sequence[Boxes],
    options: Options,
    on_error: OnError,
    numbers: Sequence[int],
) -> Encoded:
    crops: list[npt.NDArray[np.uint8]] = []
    places: list[npt.NDArray[np.float64]] = []
    counts: list[int] = []
    kept: list[int] = []
    errors: list[tuple[str, str]] = []
    for i, item in enumerate(items):
        check_image(function, item.image, numbers[i])
        name = item_name(item.image, numbers[i])
        try:
            image = pixels(item.image)
        except ImageReadError as error:
            errors.append((name, str(error)))
            continue
        height, width = image.shape[:2]
        boxes = np.asarray(item.boxes, np.float64)
        if boxes.ndim != 2 or boxes.shape[1] != 4 or not len(boxes):
            raise ValueError(f"{function}: boxes of image {name!r} must have shape [R, 4], got {list(boxes.shape)}")
        cut = _cut(image, boxes)
        empty = next((i for i, crop in enumerate(cut) if not crop.size), None)
        if empty is not None:
            raise ValueError(f"{function}: box {empty} of image {name!r} has no area inside it: {item.boxes[empty]}")
        crops += cut
        limits = np.array([width, height, width, height])
        shares = np.clip(boxes, 0, limits) / limits
        area = (shares[:, 2] - shares[:, 0]) * (shares[:, 3] - shares[:, 1])
        places.append(np.concatenate([shares, area[:, None]], 1))
        counts.append(len(boxes))
        kept.append(i)
    if errors and (on_error == "raise" or not kept):
        raise UnreadableInputError(errors, len(items))
    result = encode_items(
        function, encoder, crops, cache=options.cache, batch_size=options.batch_size, progress=options.progress
    )
    names = [item_name(items[i].image, numbers[i]) for i in kept]
    of = np.repeat(np.arange(len(kept)), counts)
    check_finite(function, "image", result.features, [names[i] for i in of])
    values = np.concatenate([result.features, np.concatenate(places)], 1)
    steps = _steps(values, counts, options)
    features: Steps | Live = steps
    if options.trains("image"):
        given = [items[i] for i in kept]
        features = options.live(
            encoder, "encode", lambda i: _cut(pixels(given[i].image), np.asarray(given[i].boxes, np.float64)),
            lambda i: image_key(function, given[i].image, i) + np.asarray(given[i].boxes, np.float64).tobytes(), steps,
            _with_places(steps),
        )  # fmt: skip
    return Encoded(features, names, np.array(kept, np.int64), errors, {})


def _cut(image: npt.NDArray[np.uint8], boxes: npt.NDArray[np.float64]) -> list[npt.NDArray[np.uint8]]:
    """The pixels of each box, [height, width, 3]; of none where it has no area inside the image."""
    height, width = image.shape[:2]
    inside = np.clip(boxes, 0, [width, height, width, height])
    corners = np.concatenate([np.floor(inside[:, :2]), np.ceil(inside[:, 2:])], 1).astype(int)
    return [image[t:b, a:z].copy() for a, t, z, b in corners]


def _with_places(before: Steps) -> Any:
    """Encoded regions, with the places that these have."""

    def finish(values: Tensor, counts: Tensor, ids: Tensor) -> Steps:
        return as_steps(torch.cat([values, before.take(ids).values[:, -GEOMETRY:]], 1), counts, ids)

    return finish


def encode_words(function: str, encoder: Any, texts: Sequence[str], options: Options) -> Encoded:
    """Texts as their word pieces' vectors, by the encoder's `encode_tokens`."""
    check_texts(function, texts)
    if not len(texts):
        raise ValueError(f"{function}: texts is empty")
    if not hasattr(encoder, "encode_tokens"):
        raise TypeError(f"{function}: text_encoder {encoder.name!r} has no encode_tokens(); MiniLM has")
    if options.trains("text"):
        check_pass(function, encoder, "encode_tokens")
    vectors = encoder.encode_tokens(texts, batch_size=options.batch_size, progress=options.progress)
    values = np.concatenate(vectors)
    check_finite(function, "text", values, [text for text, rows in zip(texts, vectors, strict=True) for _ in rows])
    steps = _steps(values, [len(rows) for rows in vectors], options)
    features: Steps | Live = steps
    if options.trains("text"):
        features = options.live(
            encoder, "encode_tokens", lambda i: [texts[i]], lambda i: text_key(texts[i]), steps, as_steps
        )
    return Encoded(features, list(texts), np.arange(len(texts), dtype=np.int64), [], {})


def _steps(values: npt.NDArray[Any], counts: Sequence[int], options: Options) -> Steps:
    cu_seqlens = torch.tensor([0, *counts]).cumsum(0)
    return Steps(
        torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(options.device),
        cu_seqlens.to(options.device),
        torch.ones(len(counts), dtype=torch.bool, device=options.device),
    )
