"""What a report consists of, and its rendering to one HTML file without outside resources.

A report is groups of entries; an entry is a query with its ranked candidates; either side is an `Item`, a
text with or without a picture. Nothing here knows of images and sentences in particular.
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from .._files import atomic_write
from .._optional import require
from ..encoders import ImageItem, load_image

if TYPE_CHECKING:
    import jinja2


@dataclass(frozen=True)
class Item:
    """A query or a candidate.

    Attributes:
        text: the sentence, or the picture's name; also what a screen reader says of the picture.
        picture: a data URI from `picture`, or None.
    """

    text: str
    picture: str | None = None


@dataclass(frozen=True)
class Candidate:
    """A ranked candidate. `correct` is None where the truth is not known."""

    item: Item
    score: float
    correct: bool | None = None


@dataclass(frozen=True)
class Entry:
    """A query with its candidates, best first, and a remark that stands below them."""

    query: Item
    candidates: Sequence[Candidate]
    remark: str = ""

    @property
    def verdict(self) -> bool | None:
        """Whether the best candidate is right; None where the truth is not known."""
        return self.candidates[0].correct if self.candidates else None


@dataclass(frozen=True)
class Group:
    """Entries under a heading: "cards" for queries with a picture, "rows" for texts."""

    title: str
    entries: Sequence[Entry]
    intro: str = ""
    layout: Literal["cards", "rows"] = "cards"


@dataclass(frozen=True)
class Stat:
    """A figure of the summary: "8 of 10" over "images whose best sentence is right"."""

    value: str
    label: str


@dataclass(frozen=True)
class Facts:
    """Name and value pairs under a heading: what ran where, and how fast."""

    title: str
    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Report:
    """A whole report.

    Attributes:
        title, lede: the heading and one or two sentences below it.
        groups: the matches.
        stats: the figures of the summary.
        notes: what a reader must know first: what is wrong, what was left out.
        facts: what ran where.
        score_name: what the numbers are, in the plural, e.g. "cosines".
        distance: smaller is better, and a longer bar is farther away.
    """

    title: str
    lede: str
    groups: Sequence[Group]
    stats: Sequence[Stat] = ()
    notes: Sequence[str] = ()
    facts: Sequence[Facts] = ()
    score_name: str = "scores"
    distance: bool = False
    language: str = "en"
    footer: str = field(default="Made by pycm. This file needs nothing but itself.")


def picture(item: ImageItem, size: int) -> str:
    """An image as a data URI, at most `size` pixels wide and high; JPEG, or PNG where that is smaller.

    Raises:
        ImageReadError: it cannot be read.
    """
    image = load_image(item)
    image.thumbnail((size, size))
    encoded = {}
    for kind, options in (("jpeg", {"quality": 82, "optimize": True}), ("png", {"optimize": True})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        encoded[kind] = buffer.getvalue()
    kind, data = min(encoded.items(), key=lambda pair: len(pair[1]))
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def bar_widths(scores: Sequence[float], distance: bool = False) -> list[float]:
    """Bar lengths in percent on one scale that begins at 0, or at the lowest score if that is negative."""
    finite = [score for score in scores if math.isfinite(score)]
    low = min(0.0, *finite) if finite and not distance else 0.0
    high = max(finite, default=0.0)
    span = high - low
    if span <= 0:
        return [0.0] * len(scores)
    return [
        round(100 * min(max((score - low) / span, 0.0), 1.0), 1) if math.isfinite(score) else 0.0 for score in scores
    ]


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    jinja = require("jinja2", "cli", "a report")
    environment: Any = jinja.Environment(
        loader=jinja.PackageLoader("pycm.report", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja.StrictUndefined,
    )
    template: jinja2.Template = environment.get_template("template.html.j2")
    return template


def render_report(report: Report) -> str:
    """The report as one HTML document; every text is escaped. Raises ImportError without Jinja2."""
    candidates = [c for group in report.groups for entry in group.entries for c in entry.candidates]
    widths = bar_widths([c.score for c in candidates], report.distance)
    width_of = {id(c): width for c, width in zip(candidates, widths, strict=True)}
    return _template().render(report=report, width=lambda candidate: width_of[id(candidate)])


def write_report(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the report; the file appears complete or not at all. Raises OSError untouched."""
    html = render_report(report)
    with atomic_write(path) as file:
        file.write(html)
