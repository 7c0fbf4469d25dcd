"""Saved matchers and galleries: loading, embedding the items of one kind, and what lies in an index."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from .._files import atomic_write
from .._optional import require
from ..encoders import UnreadableInputError
from .caching import open_cache
from .errors import CommandError
from .systems import CLIP, IMAGE, MATCHERS, TEXT, Kind, System, system_named, system_of

if TYPE_CHECKING:
    from ..encoders import FeatureCache
    from ..gallery import Gallery
    from ..matchers.features import CacheOption

_CONFIG, _INDEX, _ROWS = "config.json", "index.json", "items.safetensors"
_FORMAT = 1
KINDS = {kind.one: kind for kind in (IMAGE, TEXT, CLIP)}


def run_cache(stack: ExitStack, cache: Path | None, no_cache: bool) -> FeatureCache:
    """The cache of a run that uses features more than once: with --no-cache one that ends with the run."""
    from ..encoders import FeatureCache

    kept = open_cache(cache, no_cache)
    return kept or FeatureCache(stack.enter_context(TemporaryDirectory(prefix="pycm-")))


def check_device(device: str | None) -> None:
    """Refuse a --device that torch does not know or find."""
    if device is None:
        return
    torch = require("torch", "torch", "--device")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise CommandError(f"--device must be cpu, cuda or cuda:N, got {device!r}") from error
    count = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= count:
        raise CommandError(f"--device {device}: torch finds {count or 'no'} CUDA device{'s' if count > 1 else ''}")


def saved_matcher(option: str, folder: Path) -> dict[str, Any]:
    """The config.json of the matcher saved in `folder`. CommandError where there is none."""
    path = folder / _CONFIG
    if not path.is_file():
        raise CommandError(f"{option} {folder}: no saved matcher there ({_CONFIG} is missing)")
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        name = document.get("class")
    except (ValueError, AttributeError) as error:
        raise CommandError(f"{option} {folder}: {_CONFIG} is not that of a matcher: {error}") from error
    if name not in MATCHERS:
        raise CommandError(f"{option} {folder}: holds a {name}, expected a matcher")
    return document


def saved_system(option: str, folder: Path) -> System:
    """The system of the matcher saved in `folder`. CommandError where there is none."""
    document = saved_matcher(option, folder)
    return system_named(document["class"], document.get("params", {}).get("head", "ranking"))


def load_matcher(option: str, folder: Path, cache: CacheOption, **options: Any) -> Any:
    """The matcher saved in `folder`; `options` that are not None as its `load` takes them."""
    from .. import matchers

    saved_matcher(option, folder)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a saved matcher's encoders were there when it was made
    given = {name: value for name, value in options.items() if value is not None}
    return matchers.load(folder, cache=cache, **given)


def embed(matcher: Any, kind: Kind, items: Sequence[Any], skip: bool) -> tuple[list[Any], Any, list[tuple[str, str]]]:
    """(the items that could be read, their rows [N, D], (name, reason) of the others).

    Raises UnreadableInputError with all that cannot be read unless they are to be skipped, or where none can.
    """
    check_embeds(matcher, kind)
    kept, rows, errors = readable(getattr(matcher, kind.embed), items, skip)
    # Codes of -1 and 1 are the same in half the bytes.
    return kept, rows.astype(np.float16) if code_bits(matcher) else rows, errors


def check_embeds(matcher: Any, kind: Kind) -> None:
    """Refuse a kind of items for which the matcher has no embeddings."""
    one, other = kinds_of(matcher)
    if kind not in (one, other):
        raise CommandError(f"the matcher is for {one.many} and {other.many}, not for {kind.many}")
    if not hasattr(matcher, kind.embed):
        raise CommandError(f"{type(matcher).__name__} compares parts: {kind.many} have no embedding each to search by")


def readable(
    method: Callable[[list[Any]], Any], items: Sequence[Any], skip: bool
) -> tuple[list[Any], Any, list[tuple[str, str]]]:
    """(the items that could be read, what `method` gives for them, (name, reason) of the others); errors as `embed`."""
    try:
        return list(items), method(list(items)), []
    except UnreadableInputError as error:
        bad = {name for name, _ in error.errors}
        kept = [item for item in items if os.fspath(item) not in bad]
        if not skip or not kept:
            raise
        return kept, method(kept), error.errors


@dataclass(frozen=True)
class Index:
    """A saved gallery of items with what it takes to search it.

    Attributes:
        folder: holds the embeddings and index.json.
        kind: of the items.
        matcher: the folder of the matcher that embedded them.
        fingerprint: of that matcher, so that another one saved there since is noticed.
        base: the folder that the ids of images and clips are relative to.
    """

    folder: Path
    kind: Kind
    matcher: Path
    fingerprint: str
    base: Path

    def gallery(self) -> Gallery:
        """The embeddings, mapped. ValueError, naming the file, where they are damaged."""
        from ..gallery import Gallery

        return Gallery.open(self.folder / _ROWS)


def fingerprint(folder: Path) -> str:
    """SHA-256 of a saved matcher's config.json, which every save writes anew."""
    return hashlib.sha256((folder / _CONFIG).read_bytes()).hexdigest()


def write_index(
    folder: Path, matcher: Any, saved: Path, kind: Kind, items: Sequence[Any], skip: bool
) -> tuple[int, list[tuple[str, str]]]:
    """Embed items and keep them in `folder`; (how many, what was left out). index.json is written last."""
    from ..gallery import Gallery

    items = list(dict.fromkeys(items))
    kept, rows, errors = embed(matcher, kind, items, skip)
    paths = kind is not TEXT
    base = Path(os.path.commonpath([os.path.abspath(item.parent) for item in kept])) if paths else Path.cwd()
    ids = [os.path.relpath(item, base) for item in kept] if paths else kept
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _INDEX).unlink(missing_ok=True)  # not of the rows that come
    Gallery(rows, metric=matcher.metric, ids=ids).save(folder / _ROWS)
    document = {
        "format": _FORMAT,
        "kind": kind.one,
        "matcher": os.path.relpath(saved, folder),
        "fingerprint": fingerprint(saved),
        "base": os.path.relpath(base, folder),
    }
    with atomic_write(folder / _INDEX) as file:
        json.dump(document, file, indent=2, ensure_ascii=False)
    return len(kept), errors


def read_index(folder: Path, matcher: Path | None) -> Index:
    """The index in `folder`; with `matcher` in place of the folder that it names. CommandError where it is none."""
    path = folder / _INDEX
    if not path.is_file():
        raise CommandError(f"{folder}: no gallery there ({_INDEX} is missing); pycm index makes one")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        version, kind = document["format"], KINDS[document["kind"]]
        saved, expected, base = (str(document[name]) for name in ("matcher", "fingerprint", "base"))
    except (ValueError, KeyError, TypeError) as error:
        raise CommandError(f"{path}: not the index of a gallery: {error!r}") from error
    if version != _FORMAT:
        raise CommandError(f"{path}: has format {version!r}, this version reads {_FORMAT}")
    index = Index(folder, kind, matcher or Path(os.path.normpath(folder / saved)), expected, folder / base)
    saved_matcher("--matcher", index.matcher)
    if fingerprint(index.matcher) != index.fingerprint:
        raise CommandError(
            f"{folder}: was made with another matcher than the one in {index.matcher}: make it again with pycm index"
        )
    return index


def code_bits(matcher: Any) -> int | None:
    """How many bits the codes have that a matcher makes of its items; None where it makes none."""
    from ..spaces import ITQ

    space = getattr(matcher, "embedding_space", None) or matcher.space
    return space.bits if isinstance(space, ITQ) else None


def tell_of_the_classifier(console: Any, matcher: Any) -> None:
    """Print that a gallery does not rank as `match` does, where that is so."""
    if getattr(matcher, "head", "") == "pairs":
        console.print(
            "A gallery ranks by embeddings alone: the classifier of pairs re-ranks in pycm match and pycm evaluate.",
            soft_wrap=True,
        )


def kinds_of(matcher: Any) -> tuple[Kind, Kind]:
    """The two kinds of items that a matcher embeds."""
    system = system_of(matcher)
    return system.left, system.right
