"""The parts of `ImageTextMatcher.default`, and the user's cache folder, where it keeps the class names."""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..encoders import Encoder, FeatureCache
from ..encoders.base import Features
from ..spaces import ConSE
from .features import CacheOption, as_cache, encode_items

DEFAULT_SPECS = ("efficientnet-lite0", "minilm")

_PROBE_BYTES = 1 << 16  # what a full disk or a spent quota still takes is not told by an empty file


def user_cache_folder() -> Path:
    """$XDG_CACHE_HOME/pycm, or ~/.cache/pycm. Raises OSError where there is no home folder either."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the XDG specification has relative ones ignored
        return Path(base, "pycm")
    try:
        return Path.home() / ".cache/pycm"
    except RuntimeError as error:
        raise OSError(f"no folder for the cache: {error}") from error


def writable_cache(folder: str | os.PathLike[str]) -> FeatureCache:
    """The cache in `folder`, made if missing, after a trial write. Raises OSError naming the folder."""
    cache = FeatureCache(folder)
    probe = cache.folder / f".pycm-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        try:
            probe.write_bytes(bytes(_PROBE_BYTES))
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno or 0, f"FeatureCache: cannot write to {cache.folder}: {reason}") from error
    return cache


def class_name_space(
    text_encoder: Encoder,
    class_names: Sequence[str],
    *,
    cache: CacheOption = None,
    batch_size: int = 32,
    progress: bool | None = None,
) -> ConSE:
    """`ConSE` over "a photo of a NAME." of each class; a class has the first of its names.

    The embeddings are kept in `cache`, or in the user's cache folder where that is None; False keeps nothing.
    """
    function = "ImageTextMatcher.default"
    keep = as_cache(cache)
    if cache is None:
        try:
            keep = writable_cache(user_cache_folder())
        except OSError as error:
            warnings.warn(
                f"{function}: {_reason(error)}; without it the class names are encoded in every run "
                "(cache=False does so without this warning)",
                stacklevel=3,
            )
    sentences = [f"a photo of a {name.partition(',')[0]}." for name in class_names]
    result = encode_items(function, text_encoder, sentences, cache=keep, batch_size=batch_size, progress=progress)
    embeddings: Features = result.features
    return ConSE(embeddings, top=10)


def _reason(error: OSError) -> Any:
    return error.strerror or error
