"""`pycm demo`: photographs and sentences, matched both ways without a network."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.text import Text

from pycm import backend_info

from ..matchers.features import encode_items
from ..report import HeatMap, Report, Stat, heat_map, times, write_report
from ..report.render import bar_widths, duration, ordinal
from .caching import check_cache_options, open_cache
from .demo_data import photograph_paths, photographs
from .embedding import check_device
from .output import check_output, print_table
from .present import Items, facts, groups, score_name
from .results import Results
from .systems import IMAGE, IMAGE_TEXT, TEXT, Found, Kind

if TYPE_CHECKING:
    from ..matchers import ImageTextMatcher

_KEEP = 3
_SENTENCE = Kind("sentence", "sentences", TEXT.field, TEXT.embed)


def run_demo(out: Path, *, every: bool, device: str | None, cache: Path | None, no_cache: bool) -> None:
    """Match, print the ranked tables and write the report."""
    check_output(out, (".html", ".htm"))
    check_cache_options(cache, no_cache)
    check_device(device)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is on the disk
    from ..matchers import ImageTextMatcher

    console = Console(highlight=False)
    chosen = photographs(every=every)
    paths = photograph_paths(chosen)
    sentences = [sentence for photograph in chosen for sentence in photograph.sentences]
    owner: list[int | None] = [i for i, photograph in enumerate(chosen) for _ in photograph.sentences]

    kept = open_cache(cache, no_cache)
    start = time.perf_counter()
    with Console(stderr=True).status("Loading the encoders"):
        matcher = ImageTextMatcher.default(kept, device=device)
    loading = time.perf_counter() - start
    found = Found.of(IMAGE_TEXT, matcher.match(paths, sentences, k=(len(sentences), len(paths))))
    seen = _seen(matcher, paths)

    results = Results(IMAGE_TEXT, found, [photograph.title for photograph in chosen], sentences, owner)
    directions = [
        ("Images to sentences", "image_to_text", ("image", "sentence")),
        ("Sentences to images", "text_to_image", ("sentence", "image")),
    ]
    for title, direction, heads in directions:
        rows = results.rows(direction, _KEEP if direction == "image_to_text" else 1)
        print_table(console, title, *heads, rows, bar_widths([row.score for row in rows]))

    stats, notes = _summary(results, every=every)
    for stat in stats:
        console.print(Text.assemble((f"{stat.value:>8} ", "bold"), stat.label))
    for note in notes:
        console.print(Text(note))
    seconds = found.seconds
    console.print(
        f"Loading {duration(loading)}, "
        f"encoding {duration(seconds['encode images'] + seconds['encode texts'])}, "
        f"scoring {len(paths)} x {len(sentences)} both ways {duration(seconds['score'])}."
    )
    write_report(
        Report(
            title="Photographs and sentences, matched",
            lede=(
                f"{len(paths)} photographs that come with scikit-image and {len(sentences)} sentences "
                "written for them. The image encoder knows the 1,000 classes of ImageNet; ConSE places an "
                "image where the names of its most probable classes are among the sentences. Nothing was "
                "trained for this."
            ),
            groups=groups(
                results,
                Items(IMAGE, results.left, paths),
                Items(TEXT, sentences),
                keep=_KEEP,
                units=(IMAGE, _SENTENCE),
                remarks=seen,
            ),
            stats=stats,
            notes=notes,
            figures=[_every_pair(results), times("Where time went", {"load the encoders": loading, **seconds})],
            facts=facts(matcher, IMAGE_TEXT, (len(paths), len(sentences)), seconds, loading, backend_info()),
            score_name=score_name(found.metric),
        ),
        out,
    )
    console.print(Text(f"Report: {out}"), soft_wrap=True)


def _every_pair(results: Results) -> HeatMap:
    """All scores; `found` has them, since every candidate of an image was asked for."""
    scores = np.empty((len(results.left), len(results.right)), np.float32)
    np.put_along_axis(scores, results.found.forward.indices, results.found.forward.scores, axis=1)
    return heat_map("Every pair", scores, results.left, results.right, row_axis="photographs", column_axis="sentences")


def _seen(matcher: ImageTextMatcher, paths: Sequence[Path]) -> list[str]:
    """For each image the two most probable classes: they tell why it went where it went."""
    encoder: Any = matcher.image_encoder
    names = [name.partition(",")[0] for name in encoder.class_names]
    remarks = []
    classes = encode_items("pycm demo", encoder, paths, method="classify", cache=matcher.cache, progress=False)
    for row in classes.features:
        first, second = row.argsort()[::-1][:2]
        remarks.append(f"The classifier saw: {names[first]} ({row[first]:.0%}), {names[second]} ({row[second]:.0%}).")
    return remarks


def _summary(results: Results, *, every: bool) -> tuple[list[Stat], list[str]]:
    right_images, images = results.right_of("image_to_text")
    right_texts, texts = results.right_of("text_to_image")
    stats = [
        Stat(f"{right_images} of {images}", "images whose best sentence is right"),
        Stat(f"{right_texts} of {texts}", "sentences whose best image is right"),
    ]
    places = results.places("image_to_text")
    wrong = [f"{results.left[i]} {ordinal(place)}" for i, place in places.items() if place is not None and place > 0]
    notes = []
    if wrong:
        notes.append(f"Wrong images, and where their first own sentence came: {', '.join(wrong)}.")
    if not every:
        more = len(photographs(every=True)) - images
        notes.append(
            f"pycm demo --all adds {more} photographs, such as textures, tissue and the deep sky. "
            "ImageNet has no classes for most of them, and most come out wrong."
        )
    return stats, notes
