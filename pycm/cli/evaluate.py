"""`pycm evaluate`: how well a saved matcher finds what belongs together."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from pycm import backend_info

from .._files import atomic_write
from ..functional import DISTANCES
from ..report import (
    Figure,
    Report,
    contributions,
    embedding_map,
    heat_map,
    rank_histogram,
    times,
    write_report,
)
from ..report.render import duration
from .caching import check_cache_options
from .embedding import (
    check_device,
    code_bits,
    load_matcher,
    run_cache,
    saved_system,
    tell_of_the_classifier,
    write_index,
)
from .errors import CommandError
from .labels import confusion
from .output import brief, check_folder, check_output, shown
from .pairs import PairOptions, Pairs, read_pairs
from .present import SHOWN, Items, Truth, device_of, facts, from_cache, groups, hears, score_name, stats
from .recalls import Measured, measure, print_recalls
from .systems import VIDEO_LABELS, VIDEO_TEXT, System
from .training_record import TrainingRecord, read_record

_FIGURES = SHOWN  # items of the first kind in the heat map and in the embedding map
_TIED = "Some scores are equal: figures and counts are means over all their orders; lists have one of these. "
_SEEN = "The matcher was trained on items that are among these: on new ones it may do worse."


@dataclass(frozen=True)
class EvaluateOptions:
    """The options of `pycm evaluate`, as given."""

    matcher: Path
    pairs: Path
    reading: PairOptions
    ks: str
    out: Path | None
    gallery: Path | None
    device: str | None
    cache: Path | None
    no_cache: bool
    skip_unreadable: bool


def run_evaluate(options: EvaluateOptions) -> None:
    """Evaluate, print the recall table, and write the report or the figures."""
    if options.out is not None:
        check_output(options.out, (".html", ".json"))
    if options.gallery is not None:
        check_folder("--gallery", options.gallery)
    check_cache_options(options.cache, options.no_cache)
    ks = _parse_ks(options.ks)
    check_device(options.device)
    system = saved_system("MATCHER", options.matcher)
    if options.reading.system not in (None, VIDEO_TEXT.name if system is VIDEO_LABELS else system.name):
        raise CommandError(f"--system {options.reading.system}: the matcher in {options.matcher} is for {system.name}")
    pairs = read_pairs(options.pairs, _of_system(options.reading, system))
    record = read_record(options.matcher)
    seen = record is not None and record.has_seen(options.pairs, options.reading.split)
    console = Console(highlight=False)
    with ExitStack() as stack:
        cache = run_cache(stack, options.cache, options.no_cache)
        start = time.perf_counter()
        with Console(stderr=True).status("Loading the matcher"):
            matcher = load_matcher("MATCHER", options.matcher, cache, device=options.device)
        loading = time.perf_counter() - start
        measured = measure(matcher, pairs, ks=ks, skip=options.skip_unreadable)
        found = measured.results.found
        results = measured.results
        title = f"{system.name}: {len(results.left):,} {system.left.many}, {len(results.right):,} {system.right.many}"
        print_recalls(console, title, measured)
        for item, reason in found.errors:
            console.print(Text(f"left out: {shown(item)}: {reason}", style="yellow"), soft_wrap=True)
        if seen:
            console.print(_SEEN, style="yellow")
        kept = from_cache(found.seconds)
        spent = ", ".join(
            f"{part} {'from the cache' if part in kept else duration(seconds)}"
            for part, seconds in found.seconds.items()
        )
        console.print(f"Loading {duration(loading)}, {spent}.")
        if options.gallery is not None:
            count, _ = write_index(options.gallery, matcher, options.matcher, system.left, measured.pairs.left, False)
            console.print(Text(f"Gallery: {options.gallery}, {count:,} {system.left.many}"), soft_wrap=True)
            tell_of_the_classifier(console, matcher)
        if options.out is None:
            return
        streams = _contributions(matcher, measured)
        if options.out.suffix.lower() == ".html":
            write_report(_report(options, matcher, measured, streams, loading, record, seen), options.out)
        else:
            _write_json(options, measured, streams, seen)
    console.print(Text(f"Written: {options.out}"), soft_wrap=True)


def _parse_ks(text: str) -> list[int]:
    try:
        ks = sorted({int(part) for part in text.split(",")})
    except ValueError:
        ks = []
    if not ks or ks[0] < 1:
        raise CommandError(f"--ks must be positive numbers as 1,5,10, got {text!r}")
    return ks


def _of_system(reading: PairOptions, system: System) -> PairOptions:
    return replace(reading, system=system.name)


def _contributions(matcher: Any, measured: Measured) -> dict[str, float]:
    """Recall at 1 that is lost when a stream's rows change clips; nothing for a matcher without several streams."""
    if len(matcher.streams) < 2 or matcher.head == "labels":
        return {}
    return dict(matcher.contributions(measured.pairs.left, measured.pairs.right))


def _write_json(options: EvaluateOptions, measured: Measured, streams: Mapping[str, float], seen: bool) -> None:
    """Figures and intervals, shares in [0, 1] and ranks from 1."""
    results = measured.results
    directions = {}
    for name, column in zip((results.system.forward, results.system.backward), measured.recalls, strict=True):
        figures = {**column.shares, **column.ranks}
        directions[name] = {
            "queries": column.queries,
            "gallery": column.gallery,
            "figures": {key: interval._asdict() for key, interval in figures.items()},
        }
    info = backend_info()
    document = {
        "version": info["version"],
        "system": results.system.name,
        "matcher": shown(options.matcher),
        "pairs": shown(options.pairs),
        "split": options.reading.split,
        "trained_on_these": seen,
        "metric": results.found.metric,
        "directions": directions,
        "contributions": dict(streams),
        "seconds": dict(results.found.seconds),
        "left_out": [{"name": shown(name), "reason": reason} for name, reason in results.found.errors],
        "cpu": info["cpu"],
    }
    assert options.out is not None
    with atomic_write(options.out) as file:
        json.dump(document, file, indent=2, ensure_ascii=False, default=str)
        file.write("\n")


def _report(
    options: EvaluateOptions,
    matcher: Any,
    measured: Measured,
    streams: Mapping[str, float],
    loading: float,
    record: TrainingRecord | None,
    seen: bool,
) -> Report:
    pairs, results = measured.pairs, measured.results
    system, found = results.system, results.found
    counts = len(results.left), len(results.right)
    sound = hears(matcher)
    left = Items(system.left, results.left, pairs.left, sound=sound)
    right = Items(system.right, results.right, pairs.clips or None, sound=sound)
    few = min(_FIGURES, len(pairs))
    columns = measured.columns(few)
    if measured.probabilities is not None:
        scores = measured.probabilities[:few, columns]
    else:
        scores = matcher.scores(pairs.left[:few], _given(pairs, results.right, columns))
    left_out = record is not None and record.split == "train"
    part = {"train": "training ", "test": "held-out " if left_out else "test "}.get(options.reading.split, "")
    many = f"{system.left.many.capitalize()} and {system.right.many}"
    return Report(
        title=f"{many}, evaluated",
        lede=f"{counts[0]:,} {part}{system.left.many} of {brief(options.pairs)} and their {counts[1]:,} "
        f"{system.right.many}, ranked by the {system.name} matcher in {brief(options.matcher)}.",
        groups=groups(results, left, right, keep=5, truths=_truths(measured, scores, columns)),
        stats=stats(results, measured.metrics),
        notes=[*([_SEEN] if seen else []), *(f"Left out: {shown(name)} ({reason})." for name, reason in found.errors)],
        recalls=measured.recalls,
        recall_note="Behind each figure is its 95 % bootstrap interval over the queries; the tick in a bar is chance. "
        + (_TIED if measured.tied else "")
        + measured.note,
        figures=_figures(matcher, measured, scores, columns, streams),
        facts=facts(matcher, system, counts, found.seconds, loading, backend_info()),
        score_name=score_name(found.metric, code_bits(matcher)),
        distance=found.metric in DISTANCES,
    )


def _given(pairs: Pairs, right: Sequence[str], columns: Any) -> list[Any]:
    return [pairs.clips[j] if pairs.clips else right[j] for j in columns]


def _truths(measured: Measured, scores: Any, columns: Any) -> dict[str, dict[int, Truth]]:
    """direction -> query -> its best true candidate, for the queries that `scores` covers."""
    system = measured.results.system
    forward, backward = measured.metrics
    own = measured.own(len(scores), columns)
    good = np.where(own, -scores if measured.results.found.metric in DISTANCES else scores, -np.inf)
    ahead = {
        i: Truth(int(columns[at]), float(scores[i, at]), int(forward.ranks[i])) for i, at in enumerate(good.argmax(1))
    }
    if system is VIDEO_LABELS:  # whose own clips may be beyond those scored here
        return {system.forward: ahead}
    beyond = {right for left, right in measured.results.also if left >= len(scores)}  # maybe better there
    back = {
        int(columns[at]): Truth(int(i), float(scores[i, at]), int(backward.ranks[columns[at]]))
        for at, i in enumerate(good.argmax(0))
        if columns[at] not in beyond
    }
    return {system.forward: ahead, system.backward: back}


def _figures(matcher: Any, measured: Measured, scores: Any, columns: Any, streams: Mapping[str, float]) -> list[Figure]:
    results, pairs = measured.results, measured.pairs
    system = results.system
    left, right = system.left, system.right
    names = {left.many: results.left[: len(scores)], right.many: [results.right[j] for j in columns]}
    some = f": the first {len(scores):,} of {len(pairs):,} {left.many}" if len(scores) < len(pairs) else ""
    directions = [f"{a.many} to {b.many}" for a, b in ((left, right), (right, left))]
    ranks = dict(zip(directions, measured.metrics, strict=True))
    made: list[Figure] = [
        rank_histogram("Rank of the true one", ranks, "How many queries have their best true match at that place."),
        heat_map(
            f"Every pair{some}",
            scores,
            names[left.many],
            names[right.many],
            row_axis=left.many,
            column_axis=right.many,
            distance=results.found.metric in DISTANCES,
        ),
    ]
    if system is VIDEO_LABELS:
        assert results.own is not None
        assert measured.probabilities is not None
        made.append(confusion(results.right, results.own, measured.probabilities))
    elif hasattr(matcher, left.embed):
        rows = {
            left.many: getattr(matcher, left.embed)(pairs.left[: len(scores)]),
            right.many: getattr(matcher, right.embed)(_given(pairs, results.right, columns)),
        }
        owner = [int(i) for i in measured.own(len(scores), columns).argmax(0)]
        made.append(embedding_map(f"The common space{some}", rows, names, owner))
    if streams:
        note = "Points of R@1, the mean of both ways, that are lost when a stream's rows change clips."
        made.append(contributions("What each stream contributes", streams, note))
    where = (
        f"Encoders and networks ran on {device_of(matcher)}. What comes from the cache was encoded in an earlier run."
    )
    seconds = results.found.seconds
    made.append(times("Where time went", seconds, where, kept=from_cache(seconds)))
    return made
