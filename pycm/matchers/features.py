"""What matchers share: items to finite feature rows, through the cache where there is one."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from ..encoders import Encoder, EncodeResult, FeatureCache, UnreadableInputError, get_encoder, get_encoders
from ..encoders.base import Features, Modality, check_items, progress_bar
from ..encoders.images import item_name, load_images
from ..spaces import ConSE, HubnessCorrection, Space

OnError: TypeAlias = Literal["raise", "skip"]
#: texts[i] is the text of image i, or a list of its texts.
Texts: TypeAlias = Sequence[str] | Sequence[Sequence[str]]
#: A folder or a cache; None or False: features are not kept.
CacheOption: TypeAlias = str | os.PathLike[str] | FeatureCache | Literal[False] | None

_DEFAULT_K = 5


def check_on_error(function: str, on_error: str) -> None:
    """Raise ValueError for anything but "raise" and "skip"."""
    if on_error not in ("raise", "skip"):
        raise ValueError(f'{function}: on_error must be "raise" or "skip", got {on_error!r}')


def as_cache(cache: CacheOption) -> FeatureCache | None:
    """A folder's name as the cache in it. Raises OSError where the folder can be neither found nor made."""
    if cache is None or cache is False:
        return None
    return cache if isinstance(cache, FeatureCache) else FeatureCache(cache)


def make_encoders(image: Encoder | str, text: Encoder | str, device: Any = None) -> tuple[Encoder, Encoder]:
    """Both sides, each an encoder or the spec of one to run on `device`; a model that has both sides is loaded once.

    Raises:
        TypeError: something else.
        ValueError: an unknown spec, or an encoder of the other modality.
    """
    if isinstance(image, str) and isinstance(text, str):
        return get_encoders(image, text, device=device)
    made: list[Encoder] = []
    sides: list[tuple[Modality, Encoder | str]] = [("image", image), ("text", text)]
    for modality, given in sides:
        encoder = get_encoder(given, modality, device=device) if isinstance(given, str) else given
        argument = f"{modality}_encoder"
        # Not isinstance(encoder, Encoder): it would compute the dimension and the fingerprint.
        if not callable(getattr(encoder, "encode", None)) or not hasattr(encoder, "modality"):
            raise TypeError(
                f"ImageTextMatcher: {argument} must be an encoder or the spec of one, got {type(encoder).__name__}"
            )
        if encoder.modality != modality:
            raise ValueError(
                f"ImageTextMatcher: {argument} must encode {modality}s, "
                f"but {encoder.name!r} encodes {encoder.modality}s"
            )
        made.append(encoder)
    return made[0], made[1]


def image_method(space: Space | None) -> str:
    """The image encoder's method that gives what `space` takes."""
    while isinstance(space, HubnessCorrection):
        space = space.space
    return "classify" if isinstance(space, ConSE) else "encode"


def encode_items(
    function: str,
    encoder: Encoder,
    items: Sequence[Any],
    *,
    method: str = "encode",
    cache: FeatureCache | None = None,
    batch_size: int = 32,
    progress: bool | None = None,
    on_error: OnError = "raise",
) -> EncodeResult:
    """Features of `items`; all the images are tried before an unreadable one raises.

    Raises:
        UnreadableInputError: unreadable images under on_error="raise", or no readable one under "skip".
    """
    if cache is not None:
        result = cache.encode(
            encoder, items, method=method, batch_size=batch_size, progress=progress, on_error=on_error
        )
    elif on_error == "skip" and encoder.modality == "image":
        result = _encode_readable(function, encoder, items, method, batch_size, progress)
    else:
        features = getattr(encoder, method)(items, batch_size=batch_size, progress=progress)
        result = EncodeResult(np.asarray(features, np.float32), np.arange(len(items)), [])
    if len(items) and not len(result.kept):
        raise UnreadableInputError(result.errors, len(items))
    if len(result.features) != len(result.kept):
        raise ValueError(f"{function}: {encoder.name} gave {len(result.features)} rows for {len(result.kept)} items")
    return result


def encode_named(
    function: str, encoder: Encoder, items: Sequence[Any], **options: Any
) -> tuple[EncodeResult, list[str]]:
    """`encode_items`, and what each item that has a row is called in messages.

    Raises:
        ValueError: no items, or NaN or infinity in a row; names the item.
    """
    check_items(function, items)
    if not len(items):
        raise ValueError(f"{function}: {encoder.modality}s is empty")
    result = encode_items(function, encoder, items, **options)
    if encoder.modality == "text":
        names = [str(items[i]) for i in result.kept]
    else:
        names = [item_name(items[i], int(i)) for i in result.kept]
    check_finite(function, encoder.modality, result.features, names)
    return result, names


def _encode_readable(
    function: str,
    encoder: Encoder,
    items: Sequence[Any],
    method: str,
    batch_size: int,
    progress: bool | None,
) -> EncodeResult:
    check_items(function, items)
    rows: list[Features] = []
    kept: list[int] = []
    errors: list[tuple[str, str]] = []
    starts = range(0, len(items), batch_size)
    for start in progress_bar(starts, progress=progress, desc=f"{encoder.name} {method}"):
        images, readable, failed = load_images(function, items[start : start + batch_size], first=start)
        errors += failed
        kept += readable
        if images:
            rows.append(getattr(encoder, method)(images, batch_size=batch_size, progress=False))
    features = np.concatenate(rows) if rows else np.empty((0, 0), np.float32)
    return EncodeResult(np.asarray(features, np.float32), np.array(kept, np.int64), errors)


def check_finite(function: str, kind: str, features: Features, names: Sequence[str]) -> None:
    """Raise ValueError naming the first item whose row holds NaN or infinity, and how many there are."""
    bad = ~np.isfinite(features).all(axis=1)
    if bad.any():
        first = int(np.argmax(bad))
        raise ValueError(
            f"{function}: the features of {kind} {names[first]!r} hold NaN or infinity "
            f"({int(bad.sum())} of {len(features)} {kind}s)"
        )


def check_k(
    function: str, k: int | tuple[int, int] | None, n: int, m: int, kinds: tuple[str, str] = ("images", "texts")
) -> tuple[int, int]:
    """(texts per image, images per text) for n images and m texts, or whatever `kinds` they are."""
    if n == 0 or m == 0:
        raise ValueError(f"{function}: {kinds[0] if n == 0 else kinds[1]} is empty")
    if k is None:
        return min(_DEFAULT_K, m), min(_DEFAULT_K, n)
    if isinstance(k, tuple) and len(k) == 2:
        limits = [(k[0], m, f" for {m} {kinds[1]}"), (k[1], n, f" for {n} {kinds[0]}")]
    else:
        limits = [(k, min(n, m), f" for {n} {kinds[0]} and {m} {kinds[1]}; a pair sets each direction")]
    for value, limit, what in limits:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"{function}: k must be an int or a pair of them, got {k!r}")
        if not 1 <= value <= limit:
            raise ValueError(f"{function}: k must be in [1, {limit}]{what}, got {value}")
    return int(limits[0][0]), int(limits[-1][0])


def flatten_texts(
    function: str, items: Sequence[Any], texts: Texts, kind: str = "image", name: Callable[[Any, int], str] = item_name
) -> tuple[list[str], npt.NDArray[np.int64]]:
    """(all texts, the item that each belongs to)."""
    check_items(function, items)
    check_items(function, texts)
    if len(items) != len(texts):
        raise ValueError(f"{function}: texts must have one entry for each of {len(items)} {kind}s, got {len(texts)}")
    flat: list[str] = []
    owner: list[int] = []
    for i, entry in enumerate(texts):
        group = [entry] if isinstance(entry, str) else list(entry)
        if not group:
            raise ValueError(f"{function}: texts[{i}] is empty: {kind} {name(items[i], i)!r} has no text")
        for text in group:
            if not isinstance(text, str):
                raise TypeError(f"{function}: texts[{i}] must be a str or hold str, got {type(text).__name__}")
        flat += group
        owner += [i] * len(group)
    return flat, np.array(owner, np.int64)


def keep_pairs(
    owner: npt.NDArray[np.int64], kept: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The texts whose image was kept, and the row of that image among the kept ones.

    `owner` is the image of each text; `kept`, ascending, are the images that have a row.
    """
    used = np.flatnonzero(np.isin(owner, kept))
    return used, np.searchsorted(kept, owner[used])
