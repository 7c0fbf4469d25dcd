"""`pycm match`: the user's images, clips and texts, two kinds at a time."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rich.console import Console
from rich.text import Text

from pycm import backend_info

from ..encoders import known_encoders
from ..functional import DISTANCES, Metric
from ..matchers.default import DEFAULT_SPECS
from ..matchers.features import check_k
from ..report import Report, write_report
from ..report.render import bar_widths, duration
from .caching import check_cache_options, open_cache
from .embedding import check_device, code_bits, load_matcher, saved_matcher, saved_system
from .errors import CommandError
from .inputs import CLIP_COLUMNS, IMAGE_COLUMNS, TextLine, common_folder, read_clips, read_images, read_texts
from .labels import told_labels
from .output import an, brief, check_output, print_table, shown, write_rows
from .present import SHOWN, Items, facts, groups, hears, score_name, stats
from .results import Results, groupby_query
from .systems import CLIP, IMAGE, IMAGE_TEXT, IMAGE_VIDEO, MATCHERS, VIDEO_LABELS, VIDEO_TEXT, Found, System

if TYPE_CHECKING:
    from ..encoders import FeatureCache

_ENDINGS = (".html", ".csv", ".jsonl")
_TERMINAL_QUERIES = 20
_TWO_SIDED = ("clip:", "siglip:", "open_clip:")


@dataclass(frozen=True)
class MatchOptions:
    """The options of `pycm match`, as given."""

    images: Path | None
    videos: Path | None
    texts: Path | None
    k: str | None
    metric: Metric | None
    encoder: str | None
    text_encoder: str | None
    space: Path | None
    device: str | None
    cache: Path | None
    no_cache: bool
    skip_unreadable: bool
    out: Path | None


def run_match(options: MatchOptions) -> None:
    """Check all that can be checked, then match, print, and write."""
    if options.out is not None:
        check_output(options.out, _ENDINGS)
    check_device(options.device)
    given, system = _given(options)
    plan = _plan(options) if system is IMAGE_TEXT else _clip_matcher(options, system)
    files = read_images(given) if system.left is IMAGE else read_clips(given)
    clips = read_clips(options.videos) if options.videos is not None and system is IMAGE_VIDEO else []
    lines = _lines(options, system)
    k = _parse_k(options.k)
    check_k("--k", k, len(files), len(clips or lines), (system.left.many, system.right.many))
    check_cache_options(options.cache, options.no_cache)
    cache = open_cache(options.cache, options.no_cache)

    start = time.perf_counter()
    with Console(stderr=True).status("Loading the encoders"):
        if isinstance(plan, Path):
            matcher = load_matcher("--space", plan, cache, device=options.device)
        else:
            matcher = _matcher(options, plan, cache) if plan else _untrained(options, cache)
    loading = time.perf_counter() - start
    texts = [line.text for line in lines]
    on_error = "skip" if options.skip_unreadable else "raise"
    if system is VIDEO_LABELS:
        found = told_labels(matcher, files, k, skip=options.skip_unreadable).found
    else:
        found = Found.of(system, matcher.match(files, clips or texts, k, on_error=on_error))

    paths = [files[i] for i in found.kept[0]]
    others = [clips[i] for i in found.kept[1]] if clips else None
    names = _names(paths, given)
    answers = texts if others is None else _names(others, options.videos)
    results = Results(system, found, names, answers, _owners(lines, paths, given))
    _print(results, loading)
    if options.out is None:
        return
    if options.out.suffix.lower() == ".html":
        write_report(_report(options, matcher, results, paths, others, loading), options.out)
    else:
        write_rows(options.out, [*results.rows(system.forward), *results.rows(system.backward)])
    Console(highlight=False).print(Text(f"Written: {options.out}"), soft_wrap=True)


def _given(options: MatchOptions) -> tuple[Path, System]:
    """Where the items of the first kind are, and the system for what is given."""
    if options.images is not None:
        if options.videos is None:
            return options.images, IMAGE_TEXT
        if options.texts is not None:
            raise CommandError("match: give two of --images, --videos and --texts")
        return options.images, IMAGE_VIDEO
    if options.videos is None:
        raise CommandError("match: give --images, --videos or both")
    labels = options.space is not None and saved_system("--space", options.space) is VIDEO_LABELS
    return options.videos, VIDEO_LABELS if labels else VIDEO_TEXT


def _names(files: Sequence[Path], given: Path | None) -> list[str]:
    base = given if given is not None and given.is_dir() else common_folder(files)
    return [shown(file, base) for file in files]


def _lines(options: MatchOptions, system: System) -> list[TextLine]:
    """The texts, or the labels of a matcher that tells them; none where clips are matched with images."""
    if system is IMAGE_VIDEO:
        return []
    if system is VIDEO_LABELS:
        if options.texts is not None:
            raise CommandError(f"--texts: the matcher in {options.space} tells labels of its own")
        assert options.space is not None
        return [TextLine(str(label)) for label in saved_matcher("--space", options.space)["labels"]]
    if options.texts is None:
        raise CommandError(f"match: give --texts or {'--images' if system.left is CLIP else '--videos'} as well")
    return read_texts(options.texts, CLIP_COLUMNS if system.left is CLIP else IMAGE_COLUMNS)


def _clip_matcher(options: MatchOptions, system: System) -> Path | None:
    """The folder of the matcher for clips; None for the untrained one of images and clips."""
    if options.text_encoder is not None and system is IMAGE_VIDEO:
        raise CommandError("--text-encoder: there are no texts")
    if options.space is None:
        if system is IMAGE_VIDEO:
            if options.encoder is not None:
                check_spec("--encoder", options.encoder)
            return None
        raise CommandError("--videos needs --space with a matcher that pycm train made: clips have no default one")
    if options.encoder is not None or options.text_encoder is not None:
        raise CommandError("--encoder and --text-encoder: not with --videos, whose matcher has its own")
    if saved_system("--space", options.space) is not system:
        other = saved_system("--space", options.space).name
        raise CommandError(f"--space {options.space}: holds a matcher of another kind, {other}")
    if options.metric is not None:
        raise CommandError("--metric: not with --videos, whose matcher has its own")
    return options.space


def _untrained(options: MatchOptions, cache: FeatureCache | Literal[False]) -> Any:
    """Images with clips where nothing was learned: features of the image against the mean of the frames'."""
    from ..matchers import MeanFrameMatcher

    spec = options.encoder or DEFAULT_SPECS[0]
    matcher = MeanFrameMatcher(spec, metric=options.metric or "cosine", cache=cache, device=options.device)
    _ = matcher.encoders  # loaded now
    return matcher


def _parse_k(text: str | None) -> int | tuple[int, int] | None:
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise CommandError(f"--k must be a number or two as 5,1, got {text!r}")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


class _Plan(NamedTuple):
    """What to load: a saved matcher, or encoders by their specs."""

    saved: bool
    image_spec: str
    text_spec: str


def _plan(options: MatchOptions) -> _Plan:
    """Find every mistake in the options that can be told without loading anything."""
    for option, spec in (("--encoder", options.encoder), ("--text-encoder", options.text_encoder)):
        if spec is not None:
            check_spec(option, spec)
    image_spec = options.encoder or DEFAULT_SPECS[0]
    two_sided = image_spec.startswith(_TWO_SIDED)
    text_spec = options.text_encoder or default_text_spec(image_spec)
    saved = options.space is not None and _is_matcher(options.space)
    if options.space is None and not two_sided and (image_spec, text_spec) != DEFAULT_SPECS:
        raise CommandError(
            f"--encoder {image_spec} and --text-encoder {text_spec} do not share a space: "
            "pass --space with a saved space or matcher"
        )
    return _Plan(saved, image_spec, text_spec)


def _matcher(options: MatchOptions, plan: _Plan, cache: FeatureCache | Literal[False]) -> Any:
    from ..matchers import ImageTextMatcher
    from ..spaces import load_space

    folder = options.space
    if folder is not None and plan.saved:
        return load_matcher(
            "--space",
            folder,
            cache,
            image_encoder=options.encoder,
            text_encoder=options.text_encoder,
            metric=options.metric,
            device=options.device,
        )
    metric = options.metric or "cosine"
    if (plan.image_spec, plan.text_spec) == DEFAULT_SPECS:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # both are on the disk
        if folder is None:
            return ImageTextMatcher.default(cache, metric=metric, device=options.device)
    space = None if folder is None else load_space(folder)
    return ImageTextMatcher(plan.image_spec, plan.text_spec, space, metric, cache=cache, device=options.device)


def default_text_spec(image_spec: str) -> str:
    """The other side of an image encoder that has two, or the default text encoder."""
    return image_spec if image_spec.startswith(_TWO_SIDED) else DEFAULT_SPECS[1]


def check_spec(option: str, spec: str) -> None:
    """Refuse a spec that no encoder has, before one is loaded."""
    known = known_encoders()
    if spec not in known and spec.partition(":")[0] not in {name.partition(":")[0] for name in known if ":" in name}:
        raise CommandError(f"{option}: unknown encoder {spec!r}; known: {', '.join(known)}")


def _is_matcher(folder: Path) -> bool:
    path = folder / "config.json"
    if not path.is_file():
        raise CommandError(f"--space {folder}: no saved space or matcher there (config.json is missing)")
    try:
        return bool(MATCHERS.get(json.loads(path.read_text(encoding="utf-8")).get("class")) is IMAGE_TEXT)
    except (ValueError, AttributeError) as error:
        raise CommandError(f"--space {folder}: config.json is not that of a space or matcher: {error}") from error


def _owners(lines: Sequence[TextLine], paths: Sequence[Path], given: Path) -> list[int | None] | None:
    """For each text its image's row, -1 where that is not among `paths`, None where the text names none.

    None in place of the list where no text names an image. Names are relative to the list of texts, or to the
    folder of images or clips.
    """
    if all(line.image is None for line in lines):
        return None
    row_of = {os.path.realpath(path): i for i, path in enumerate(paths)}
    owners: list[int | None] = []
    for line in lines:
        places = [] if line.image is None else [line.image]
        if line.name is not None and given.is_dir():
            places.append(given / line.name)
        rows = [row for place in places if (row := row_of.get(os.path.realpath(place))) is not None]
        owners.append(None if not places else rows[0] if rows else -1)
    return owners


def _unknown(results: Results) -> list[str]:
    """What is to be said of the texts whose image or clip is not known."""
    if results.owner is None:
        return []
    total, one = len(results.owner), results.system.left.one
    lost, silent = results.owner.count(-1), results.owner.count(None)
    lines = [f"{lost:,} of {total:,} texts name {an(one)} that is not among those matched."] if lost else []
    return lines + ([f"{silent:,} of {total:,} texts name no {one}."] if silent else [])


def _print(results: Results, loading: float) -> None:
    console = Console(highlight=False)
    found, system = results.found, results.system
    distance = found.metric in DISTANCES
    for asked, answer, direction in (
        (system.left, system.right, system.forward),
        (system.right, system.left, system.backward),
    ):
        by_query = groupby_query(results.rows(direction))
        rows = [row for query in list(by_query)[:_TERMINAL_QUERIES] for row in by_query[query]]
        title = f"{asked.many.capitalize()} to {answer.many}"
        print_table(console, title, asked.one, answer.one, rows, bar_widths([row.score for row in rows], distance))
        if len(by_query) > _TERMINAL_QUERIES:
            console.print(f"... and {len(by_query) - _TERMINAL_QUERIES:,} more; --out keeps all\n", style="dim")
    for stat in stats(results):
        console.print(Text.assemble((f"{stat.value} ", "bold"), stat.label))
    for line in _unknown(results):
        console.print(Text(line, style="yellow"), soft_wrap=True)
    for name, reason in found.errors:
        console.print(Text(f"left out: {shown(name)}: {reason}", style="yellow"), soft_wrap=True)
    encoding = sum(seconds for name, seconds in found.seconds.items() if name != "score")
    console.print(
        f"{len(results.left):,} {system.left.many}, {len(results.right):,} {system.right.many}: "
        f"loading {duration(loading)}, encoding {duration(encoding)}, scoring {duration(found.seconds['score'])}."
    )


def _report(
    options: MatchOptions,
    matcher: Any,
    results: Results,
    paths: Sequence[Path],
    others: Sequence[Path] | None,
    loading: float,
) -> Report:
    found, system = results.found, results.system
    notes = [*_unknown(results), *(f"Left out: {shown(name)} ({reason})." for name, reason in found.errors)]
    counts = len(results.left), len(results.right)
    if max(counts) > SHOWN:
        notes.append("CSV and JSONL output has the matches that are not shown here.")
    many = system.left.many
    left = Items(system.left, results.left, paths, sound=hears(matcher))
    right = Items(system.right, results.right, others, sound=hears(matcher))
    return Report(
        title=f"{many.capitalize()} and {system.right.many}, matched",
        lede=f"{counts[0]:,} {many} of {brief(_given(options)[0])} and {counts[1]:,} {system.right.many} of "
        f"{brief((options.videos if others else options.texts) or options.space or '')}, compared by {found.metric}"
        + (" (a distance: smaller is better)." if found.metric in DISTANCES else "."),
        groups=groups(results, left, right, keep=5),
        stats=stats(results),
        notes=notes,
        facts=facts(matcher, system, counts, found.seconds, loading, backend_info()),
        score_name=score_name(found.metric, code_bits(matcher)),
        distance=found.metric in DISTANCES,
    )
