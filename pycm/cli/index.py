"""`pycm index`: embed images, clips or texts by a saved matcher, for `pycm search`."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ..report.render import duration
from .caching import check_cache_options
from .embedding import (
    check_device,
    check_embeds,
    load_matcher,
    run_cache,
    saved_matcher,
    tell_of_the_classifier,
    write_index,
)
from .errors import CommandError
from .inputs import read_clips, read_images, read_texts
from .output import check_folder, shown
from .systems import CLIP, IMAGE, TEXT, Kind


@dataclass(frozen=True)
class IndexOptions:
    """The options of `pycm index`, as given; one of images, videos and texts is not None."""

    matcher: Path
    images: Path | None
    videos: Path | None
    texts: Path | None
    out: Path
    device: str | None
    cache: Path | None
    no_cache: bool
    skip_unreadable: bool


def run_index(options: IndexOptions) -> None:
    """Embed and save."""
    check_folder("--out", options.out)
    check_cache_options(options.cache, options.no_cache)
    kind, items = _items(options)
    check_device(options.device)
    saved_matcher("MATCHER", options.matcher)
    console = Console(highlight=False)
    with ExitStack() as stack:
        cache = run_cache(stack, options.cache, options.no_cache)
        matcher = load_matcher("MATCHER", options.matcher, cache, device=options.device)
        check_embeds(matcher, kind)
        start = time.perf_counter()
        count, errors = write_index(options.out, matcher, options.matcher, kind, items, options.skip_unreadable)
    for name, reason in errors:
        console.print(Text(f"left out: {shown(name)}: {reason}", style="yellow"), soft_wrap=True)
    console.print(f"{count:,} {kind.many} embedded in {duration(time.perf_counter() - start)}.")
    console.print(Text(f"Written: {options.out}"), soft_wrap=True)
    tell_of_the_classifier(console, matcher)


def _items(options: IndexOptions) -> tuple[Kind, list[Any]]:
    given = [kind for kind, path in ((IMAGE, options.images), (CLIP, options.videos), (TEXT, options.texts)) if path]
    if len(given) != 1:
        raise CommandError("index: give one of --images, --videos and --texts")
    if options.images is not None:
        return IMAGE, read_images(options.images)
    if options.videos is not None:
        return CLIP, read_clips(options.videos)
    assert options.texts is not None
    return TEXT, [line.text for line in read_texts(options.texts)]
