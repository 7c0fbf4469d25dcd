"""Real features: the emoji set under the encoders of `pycm demo`, kept in the user's feature cache."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .cases import Kind


class UnavailableError(Exception):
    """Something that this machine lacks; the message says what."""


def emoji(kind: Kind) -> npt.NDArray[np.float32]:
    """[rows, REAL_DIM[kind]]: the images of the emoji set, or its English names and aliases.

    Encoding takes a minute or two the first time; then the features come from the cache.

    Raises:
        UnavailableError: PYCM_DATA is not set, or an encoder is not installed.
    """
    root = os.environ.get("PYCM_DATA")
    if not root:
        raise UnavailableError("PYCM_DATA is not set: it names the folder of the real data")
    folder = Path(root) / "emoji"
    if not folder.is_dir():
        raise UnavailableError(f"PYCM_DATA is {root}, but there is no {folder}")
    lines = (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    items = [json.loads(line) for line in lines]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is on the disk
    try:
        from ..encoders import get_encoder
        from ..matchers.default import user_cache_folder, writable_cache
        from ..matchers.features import encode_items

        cache = writable_cache(user_cache_folder())
        if kind == "real-images":
            encoder = get_encoder("efficientnet-lite0", "image")
            images = [folder / item["image"] for item in items]
            found = encode_items("pycm bench", encoder, images, cache=cache).features
        else:
            encoder = get_encoder("minilm", "text")
            texts = [text for item in items for text in (item["captions"]["en"], *item["aliases"])]
            found = encode_items("pycm bench", encoder, texts, cache=cache, batch_size=256).features
    except ImportError as error:
        raise UnavailableError(str(error)) from error
    return np.array(found, np.float32)  # a copy: the rows are changed
