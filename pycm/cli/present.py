"""Results as a report and as words: what the commands share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ..evaluate import RetrievalMetrics
from ..functional import DISTANCES
from ..report import Candidate, Entry, Facts, Group, Item, Stat, moving_picture, picture
from ..report.media import MovingPicture
from ..report.render import amount, duration, ordinal
from ..spaces.base import BaseSpace
from ..streams.registry import needs_sound
from .caching import short_path
from .embedding import code_bits
from .output import Ranked
from .results import Results, groupby_query
from .systems import CLIP, IMAGE_TEXT, TEXT, VIDEO_LABELS, Kind, System

PICTURE_PIXELS, CLIP_PIXELS = 360, 160
SHOWN, SHOWN_BYTES = 200, 24 << 20


class Items:
    """The items of one kind as a report shows them: a text, a picture or a playing clip.

    Args:
        kind, names, paths: of the items; texts have no paths.
        sound: clips keep their sound: it is part of what was matched.

    Attributes:
        bytes: what the pictures and clips made so far take in the page.
    """

    def __init__(
        self, kind: Kind, names: Sequence[str], paths: Sequence[Path] | None = None, *, sound: bool = False
    ) -> None:
        self.kind, self.names, self.paths, self.sound = kind, names, paths, sound
        self.bytes = 0
        self._made: dict[int, Item] = {}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> Item:
        if row not in self._made:
            self._made[row] = item = self._make(row)
            self.bytes += len(item.picture or "") + len(item.clip or "")
        return self._made[row]

    def _make(self, row: int) -> Item:
        if self.paths is None:
            return Item(self.names[row])
        if self.kind is CLIP:
            clip, still, heard = _playing(self.paths[row].resolve(), self.sound)
            return Item(self.names[row], still, clip, heard)
        return Item(self.names[row], picture(self.paths[row], PICTURE_PIXELS))


@lru_cache(maxsize=256)
def _playing(path: Path, sound: bool) -> MovingPicture:
    """A clip is encoded once, also where it is a query and a match: the page then holds it once."""
    return moving_picture(path, CLIP_PIXELS, sound=sound)


class Truth(NamedTuple):
    """The best true candidate of a query: its row, its score and its rank, from 0."""

    row: int
    score: float
    rank: int


def hears(matcher: Any) -> bool:
    """Whether a matcher has a stream of sound."""
    return any(needs_sound(stream) for stream in matcher.streams)


def groups(
    results: Results,
    left: Items,
    right: Items,
    *,
    keep: int,
    units: tuple[Kind, Kind] | None = None,
    remarks: Sequence[str] = (),
    truths: Mapping[str, Mapping[int, Truth]] | None = None,
) -> list[Group]:
    """Both directions for a report: `keep` candidates a query, and so many queries as the page has room for.

    Args:
        results: what was found.
        left, right: the items.
        keep: candidates that are shown of each query.
        units: what the items are called, if not as the system calls them.
        remarks: if given, one for each item of the first kind.
        truths: direction -> query -> its best true candidate, where that is known: it is shown if it is not among the
            best.
    """
    one, other = units or (results.system.left, results.system.right)
    sides = [(results.system.forward, one, other, left, right), (results.system.backward, other, one, right, left)]
    made = []
    for direction, asked, answer, queries, gallery in sides:
        by_query = groupby_query(results.rows(direction, keep))
        places = results.places(direction)
        known = (truths or {}).get(direction, {})
        entries: list[Entry] = []
        for i, rows in by_query.items():
            if len(entries) == SHOWN or left.bytes + right.bytes > SHOWN_BYTES:
                break
            truth = None if any(row.correct for row in rows) else known.get(i)
            said = (
                ""
                if truth
                else _remark(
                    rows, places[i], f"Its {'first ' if answer is other and right.kind is TEXT else ''}own {answer.one}"
                )
            )
            entries.append(
                Entry(
                    queries[i],
                    [Candidate(gallery[row.match_index], row.score, row.correct) for row in rows],
                    " ".join([said, *(remarks[i : i + 1] if asked is one else ())]).strip(),
                    None if truth is None else Candidate(gallery[truth.row], truth.score, True, truth.rank),
                )
            )
        made.append(
            Group(
                f"{asked.many.capitalize()} to {answer.many}",
                entries,
                f"Each {asked.one} with its best {answer.many} of {len(gallery):,}.",
                "cards" if answer is other and right.kind is TEXT else "rows",
                len(by_query),
            )
        )
    return made


def _remark(rows: Sequence[Ranked], place: int | None, what: str) -> str:
    if rows[0].correct is None or place == 0:
        return ""
    return f"{what} is not among those found." if place is None else f"{what} came {ordinal(place)}."


def stats(results: Results, metrics: Sequence[RetrievalMetrics] | None = None) -> list[Stat]:
    """How many of each kind came out right; nothing where the truth is not known.

    By `metrics`, forward and backward, where there are any: over all orders of equal scores, as in the recall table;
    otherwise as `results` are listed.
    """
    if results.owner is None and results.own is None:
        return []
    system = results.system
    made = []
    for i, (direction, asked, answer) in enumerate(
        ((system.forward, system.left, system.right), (system.backward, system.right, system.left))
    ):
        right: float
        if metrics is None:
            right, total = results.right_of(direction)
        else:
            first = metrics[i].per_query["recall@1"]
            right, total = float(first.sum()), len(first)
        made.append(Stat(f"{amount(right)} of {total:,}", f"{asked.many} whose best {answer.one} is right"))
    return made


def score_name(metric: str, bits: int | None = None) -> str:
    """What a reader calls the scores of a metric, between codes of so many bits."""
    if bits is not None:
        return f"{bits} − 2 × Hamming distance" if metric == "dot" else f"1 − 2 × Hamming distance / {bits}"
    names = {
        "pearson": "Pearson correlations",
        "dot": "dot products",
        "cosine": "cosines",
        "euclidean": "Euclidean distances",
        "sqeuclidean": "squared Euclidean distances",
        "logit": "log-odds",
        "probability": "probabilities",
    }
    return names[metric]


def facts(
    matcher: Any,
    system: System,
    counts: tuple[int, int],
    seconds: Mapping[str, float],
    loading: float,
    info: Mapping[str, Any],
) -> list[Facts]:
    """What ran, on what, and how fast."""
    n, m = counts

    kept = from_cache(seconds)

    def rate(name: str) -> str:
        if name in kept:
            return "from the cache"
        count, unit = next(((c, k.many) for c, k in ((n, system.left), (m, system.right)) if k.many in name), (0, ""))
        speed = f" ({count / seconds[name]:,.0f} {unit}/s)" if count and 0 < seconds[name] < math.inf else ""
        return duration(seconds[name]) + speed

    machine = machine_pairs(info)
    machine.append(("Encoders ran on", device_of(matcher)))
    cache = "none" if matcher.cache is None else short_path(matcher.cache.folder)
    timed = [(name.capitalize(), rate(name)) for name in seconds if name != "score"]
    return [
        Facts("Matcher", _parts(matcher, system)),
        Facts(
            "Time",
            [
                ("Load the encoders", duration(loading)),
                *timed,
                ("Score and rank", f"{duration(seconds['score'])} for {n * m:,} pairs, both ways"),
                ("Feature cache", cache),
            ],
        ),
        Facts("Machine", machine),
    ]


def from_cache(seconds: Mapping[str, float]) -> list[str]:
    """The parts of `encode_clips` that took no time at all: every feature had been kept."""
    return [name for name in ("decode", "encode") if seconds.get(name) == 0]


def machine_pairs(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What `backend_info` says of this build and machine, in a few lines."""
    cpu = info.get("cpu", {})
    packages = info.get("packages", {})
    machine = [("pycm", str(info.get("version", "")))]
    machine += [(name, str(packages[name])) for name in ("torch",) if packages.get(name)]
    machine += [
        (label, str(cpu[key]))
        for label, key in (("CPU", "machine"), ("CPU level in use", "level"), ("Threads", "threads"))
        if cpu.get(key) is not None
    ]
    return machine


def device_of(matcher: Any) -> str:
    """Where the matcher's encoders and networks run."""
    encoder = getattr(matcher, "image_encoder", None)
    return str(getattr(matcher, "device", None) or getattr(encoder, "device", None) or "cpu")


def _space(matcher: Any) -> str:
    score = getattr(matcher, "score", None)
    if isinstance(score, str):
        return f"learned, of regions and words: {score}"
    if (bits := code_bits(matcher)) is not None:
        return f"{type(matcher.space.space).__name__}, as codes of {bits} bits"
    if isinstance(getattr(matcher.space, "space", None), BaseSpace):
        return f"{type(matcher.space.space).__name__}, {type(matcher.space).__name__}"
    return "shared by the encoders" if matcher.space is None else type(matcher.space).__name__


def _embeddings(matcher: Any) -> str:
    """What is done to the embeddings of a network."""
    if (bits := code_bits(matcher)) is not None:
        return f"codes of {bits} bits"
    return str(type(matcher.embedding_space).__name__)


def _parts(matcher: Any, system: System) -> list[tuple[str, str]]:
    """What the matcher is made of."""
    if system is IMAGE_TEXT:
        made = [("Image encoder", matcher.image_encoder.name), ("Text encoder", matcher.text_encoder.name)]
        made.append(("Space", _space(matcher)))
    else:
        options = matcher.get_params()
        sides = [f"{kind.field}_encoder" for kind in (system.left, system.right)]
        named = {name: getattr(options[name], "name", options[name]) for name in sides if name in options}
        made = [(name.replace("_", " ").capitalize(), str(value)) for name, value in named.items()]
        made.append(("Streams", ", ".join(str(getattr(stream, "name", stream)) for stream in matcher.streams)))
        shown = ("cell", "pool", "head", "sampling")
        made += [(name.capitalize(), str(options[name])) for name in shown if name in options]
        if options.get("embedding_space") is not None:
            made.append(("Embeddings", _embeddings(matcher)))
    if system is VIDEO_LABELS:
        return made
    return [*made, ("Metric", matcher.metric + (" (smaller is better)" if matcher.metric in DISTANCES else ""))]
