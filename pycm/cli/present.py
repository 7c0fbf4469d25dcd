"""Matches as ranked rows, as a report, and as words: what `demo` and `match` share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args

from ..functional import DISTANCES, Metric
from ..matchers import ImageTextMatcher, ImageTextMatches
from ..report import Candidate, Entry, Facts, Group, Item, picture
from ..report.render import duration, ordinal
from .caching import short_path
from .output import Ranked

Direction = Literal["image_to_text", "text_to_image"]
CARD_PIXELS, ROW_PIXELS = 480, 200


@dataclass(frozen=True)
class Results:
    """Matches with names for people, and the truth where it is known.

    Attributes:
        found: the matches.
        names: of the images in `found`.
        owner: for each text the image that it belongs to, -1 if that is not in `found`, None if it is not known;
            or None where no truth is known.
    """

    found: ImageTextMatches
    names: Sequence[str]
    owner: list[int | None] | None = None

    def rows(self, direction: Direction, keep: int | None = None) -> list[Ranked]:
        """The ranked rows of one direction, at most `keep` a query."""
        matches = self.found.image_to_text if direction == "image_to_text" else self.found.text_to_image
        queries: Sequence[str] = self.names
        gallery: Sequence[str] = self.found.texts
        if direction == "text_to_image":
            queries, gallery = gallery, self.names
        rows = []
        for i, (scores, indices) in enumerate(zip(matches.scores, matches.indices, strict=True)):
            for rank, (score, j) in enumerate(zip(scores[:keep], indices[:keep], strict=True)):
                if j < 0:  # no further candidate
                    break
                value = float(f"{score:.9g}")  # the shortest text that gives the float32 back
                rows.append(
                    Ranked(
                        direction,
                        i,
                        queries[i],
                        rank,
                        int(j),
                        gallery[j],
                        value,
                        self._correct(direction, i, j),
                    )
                )
        return rows

    def _correct(self, direction: Direction, query: int, match: Any) -> bool | None:
        if self.owner is None:
            return None
        image, text = (query, int(match)) if direction == "image_to_text" else (int(match), query)
        owner = self.owner[text]
        return None if owner is None else owner == image

    def right(self, direction: Direction) -> tuple[int, int]:
        """(queries whose best match is right, queries that have a right match)."""
        best = self.rows(direction, keep=1)
        if self.owner is not None:
            texts = {i for i, owner in enumerate(self.owner) if owner is not None and owner >= 0}
            have = texts if direction == "text_to_image" else {self.owner[i] for i in texts}
            best = [row for row in best if row.query_index in have]
        return sum(row.correct is True for row in best), len(best)

    def places(self, direction: Direction) -> dict[int, int | None]:
        """Query -> the rank of its first right match, None where it is not among those found."""
        return {
            query: next((row.rank for row in rows if row.correct), None)
            for query, rows in groupby_query(self.rows(direction)).items()
        }


def groupby_query(rows: Sequence[Ranked]) -> dict[int, list[Ranked]]:
    """Rows by query, in their order."""
    return {query: list(group) for query, group in groupby(rows, key=lambda row: row.query_index)}


def groups(
    results: Results,
    paths: Sequence[Path],
    *,
    keep: int,
    limit: int | None = None,
    unit: str = "text",
    remarks: Sequence[str] = (),
) -> list[Group]:
    """Both directions for a report: `keep` candidates a query, the first `limit` queries.

    `remarks`, if given, has one for each image.
    """
    cards: dict[int, str] = {}
    thumbs: dict[int, str] = {}

    def image_item(i: int, cache: dict[int, str], size: int) -> Item:
        if i not in cache:
            cache[i] = picture(paths[i], size)
        return Item(results.names[i], cache[i])

    forward = list(groupby_query(results.rows("image_to_text", keep)).items())[:limit]
    backward = list(groupby_query(results.rows("text_to_image", keep)).items())[:limit]
    places = {side: results.places(side) for side in get_args(Direction)}
    return [
        Group(
            f"Images to {unit}s",
            [
                Entry(
                    image_item(i, cards, CARD_PIXELS),
                    [Candidate(Item(row.match), row.score, row.correct) for row in rows],
                    " ".join(
                        [
                            _remark(rows, places["image_to_text"][i], f"Its first own {unit}"),
                            *remarks[i : i + 1],
                        ]
                    ).strip(),
                )
                for i, rows in forward
            ],
            f"Each image with its best {unit}s of {len(results.found.texts):,}.",
        ),
        Group(
            f"{unit.capitalize()}s to images",
            [
                Entry(
                    Item(rows[0].query),
                    [
                        Candidate(image_item(row.match_index, thumbs, ROW_PIXELS), row.score, row.correct)
                        for row in rows
                    ],
                    _remark(rows, places["text_to_image"][i], "Its own image"),
                )
                for i, rows in backward
            ],
            f"Each {unit} with its best images of {len(results.names):,}.",
            layout="rows",
        ),
    ]


def _remark(rows: Sequence[Ranked], place: int | None, what: str) -> str:
    if rows[0].correct is None or place == 0:
        return ""
    return f"{what} is not among those found." if place is None else f"{what} came {ordinal(place)}."


def score_name(metric: Metric) -> str:
    """What a reader calls the scores of a metric."""
    names = {"pearson": "Pearson correlations", "dot": "dot products", "cosine": "cosines"}
    return names.get(metric, "Euclidean distances" if metric == "euclidean" else "squared Euclidean distances")


def facts(matcher: ImageTextMatcher, found: ImageTextMatches, loading: float, info: Mapping[str, Any]) -> list[Facts]:
    """What ran, on what, and how fast."""
    n, m = len(found.images), len(found.texts)

    def rate(name: str, count: int, unit: str) -> str:
        seconds = found.seconds[name]
        speed = f" ({count / seconds:,.0f} {unit}/s)" if seconds > 0 and math.isfinite(seconds) else ""
        return duration(seconds) + speed

    cpu = info.get("cpu", {})
    packages = info.get("packages", {})
    machine = [("pycm", str(info.get("version", "")))]
    machine += [(name, str(packages[name])) for name in ("torch",) if packages.get(name)]
    machine += [
        (label, str(cpu[key]))
        for label, key in (("CPU", "machine"), ("CPU level in use", "level"), ("Threads", "threads"))
        if cpu.get(key) is not None
    ]
    device = getattr(matcher.image_encoder, "device", None)
    if device is not None:
        machine.append(("Encoders ran on", str(device)))
    cache = "none" if matcher.cache is None else short_path(matcher.cache.folder)
    return [
        Facts(
            "Matcher",
            [
                ("Image encoder", matcher.image_encoder.name),
                ("Text encoder", matcher.text_encoder.name),
                (
                    "Space",
                    "shared by the encoders" if matcher.space is None else type(matcher.space).__name__,
                ),
                ("Metric", matcher.metric + (" (smaller is better)" if matcher.metric in DISTANCES else "")),
            ],
        ),
        Facts(
            "Time",
            [
                ("Load the encoders", duration(loading)),
                (f"Encode {n:,} images", rate("encode images", n, "images")),
                (f"Encode {m:,} texts", rate("encode texts", m, "texts")),
                ("Score and rank", f"{duration(found.seconds['score'])} for {n * m:,} pairs, both ways"),
                ("Feature cache", cache),
            ],
        ),
        Facts("Machine", machine),
    ]
