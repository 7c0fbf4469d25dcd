"""`pycm search`: the best items of a saved gallery for texts, images or clips."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from pycm import backend_info

from ..encoders import UnreadableInputError
from ..functional import DISTANCES
from ..report import Candidate, Entry, Facts, Group, Report, write_report
from ..report.render import bar_widths, duration
from .caching import check_cache_options
from .embedding import Index, check_device, code_bits, embed, load_matcher, read_index, run_cache
from .errors import CommandError
from .output import Ranked, brief, check_output, print_table, shown, write_rows
from .present import Items, hears, machine_pairs, score_name
from .systems import CLIP, IMAGE, TEXT, Kind

_ENDINGS = (".html", ".csv", ".jsonl")
_K = 5


@dataclass(frozen=True)
class SearchOptions:
    """The options of `pycm search`, as given; without k five matches, or as many as there are."""

    gallery: Path
    texts: Sequence[str]
    images: Sequence[Path]
    clips: Sequence[Path]
    k: int | None
    matcher: Path | None
    device: str | None
    out: Path | None
    cache: Path | None
    no_cache: bool
    skip_unreadable: bool


def run_search(options: SearchOptions) -> None:
    """Embed the queries, search, print, and write."""
    if options.out is not None:
        check_output(options.out, _ENDINGS)
    check_cache_options(options.cache, options.no_cache)
    asked: list[tuple[Kind, Sequence[Any]]] = [(TEXT, options.texts), (IMAGE, options.images), (CLIP, options.clips)]
    asked = [(kind, queries) for kind, queries in asked if queries]
    if not asked:
        raise CommandError("search: give a query: --text, --image or --clip")
    if any(not text.strip() for text in options.texts):
        raise CommandError("--text: must not be empty")
    for path in (*options.images, *options.clips):
        if not path.is_file():
            raise CommandError(f"{path}: no such file")
    check_device(options.device)
    index = read_index(options.gallery, options.matcher)
    console = Console(highlight=False)
    entries: list[tuple[Kind, list[Entry]]] = []
    rows: list[Ranked] = []
    unreadable: list[tuple[str, str]] = []
    with ExitStack() as stack:
        gallery = stack.enter_context(index.gallery())
        k = min(_K, len(gallery)) if options.k is None else options.k
        if not 1 <= k <= len(gallery):
            raise CommandError(f"--k must be in [1, {len(gallery)}] for this gallery, got {k}")
        cache = run_cache(stack, options.cache, options.no_cache)
        start = time.perf_counter()
        with Console(stderr=True).status("Loading the matcher"):
            matcher = load_matcher("--matcher", index.matcher, cache, device=options.device)
        seconds = {"load the matcher": time.perf_counter() - start, "encode": 0.0, "score": 0.0}
        for kind, queries in asked:
            start = time.perf_counter()
            try:
                queries, embedded, errors = embed(matcher, kind, queries, options.skip_unreadable)
            except UnreadableInputError as error:  # of none of this kind can be read: others may be
                unreadable += error.errors
                if options.skip_unreadable and len(asked) > 1:
                    continue
                raise
            unreadable += errors
            encoded = time.perf_counter()
            found = gallery.topk(embedded, k)
            seconds["score"] += time.perf_counter() - encoded
            seconds["encode"] += encoded - start
            rows += (some := _rows(kind, queries, index.kind, found))
            heads = kind.one, index.kind.one
            distance = gallery.metric in DISTANCES
            title = f"{kind.many.capitalize()} to {index.kind.many}"
            print_table(console, title, *heads, some, bar_widths([row.score for row in some], distance))
            entries.append((kind, _entries(kind, queries, index, some, hears(matcher))))
        if not entries:
            raise UnreadableInputError(unreadable, len(unreadable), "queries")
        scores = score_name(gallery.metric, code_bits(matcher))
        count, distance = len(gallery), gallery.metric in DISTANCES
    for name, reason in unreadable:
        console.print(Text(f"left out: {shown(name)}: {reason}", style="yellow"), soft_wrap=True)
    times = ", ".join(f"{name} {duration(spent)}" for name, spent in seconds.items())
    console.print(f"{count:,} {index.kind.many}: {times}.")
    if options.out is None:
        return
    if options.out.suffix.lower() == ".html":
        notes = [f"Left out: {shown(name)} ({reason})." for name, reason in unreadable]
        write_report(_report(options, index, entries, k, scores, distance, count, seconds, notes), options.out)
    else:
        write_rows(options.out, rows)
    console.print(Text(f"Written: {options.out}"), soft_wrap=True)


def _rows(kind: Kind, queries: Sequence[Any], of: Kind, found: Any) -> list[Ranked]:
    direction = f"{kind.field}_to_{of.field}"
    return [
        Ranked(direction, i, shown(queries[i]), rank, int(row), shown(name), float(f"{score:.9g}"), None)
        for i, (scores, ids, indices) in enumerate(zip(*(np.asarray(part) for part in found), strict=True))
        for rank, (score, name, row) in enumerate(zip(scores, ids, indices, strict=True))
        if row >= 0
    ]


def _entries(kind: Kind, queries: Sequence[Any], index: Index, rows: Sequence[Ranked], sound: bool) -> list[Entry]:
    shown_as = queries if kind is TEXT else [brief(query) for query in queries]
    asked = Items(kind, shown_as, None if kind is TEXT else queries, sound=sound)
    names = list(dict.fromkeys(row.match for row in rows))
    items = Items(index.kind, names, None if index.kind is TEXT else [index.base / name for name in names], sound=sound)
    return [
        Entry(asked[i], [Candidate(items[names.index(row.match)], row.score) for row in rows if row.query_index == i])
        for i in range(len(queries))
    ]


def _report(
    options: SearchOptions,
    index: Index,
    entries: Sequence[tuple[Kind, list[Entry]]],
    k: int,
    scores: str,
    distance: bool,
    count: int,
    seconds: Any,
    notes: Sequence[str],
) -> Report:
    many = index.kind.many
    return Report(
        title=f"Found among {count:,} {many}",
        lede=f"The best {k} {many} of {brief(options.gallery)} for each query, by the matcher in "
        f"{brief(index.matcher)}.",
        groups=[
            Group(
                f"{kind.many.capitalize()} to {many}",
                made,
                layout="cards" if index.kind is TEXT else "rows",
            )
            for kind, made in entries
        ],
        notes=notes,
        facts=[
            Facts("Time", [(name.capitalize(), duration(spent)) for name, spent in seconds.items()]),
            Facts("Machine", machine_pairs(backend_info())),
        ],
        score_name=scores,
        distance=distance,
    )
