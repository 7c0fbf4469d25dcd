"""What a report consists of. Nothing here knows of one modality or another.

A report is groups of entries; an entry is a query with its ranked candidates; either side is an `Item`, a text
with or without a picture or a playing clip. Figures stand before them, facts of the run after them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeAlias

from ..evaluate import Interval


@dataclass(frozen=True)
class Item:
    """A query or a candidate.

    Attributes:
        text: the sentence, or the name of the picture or clip; also what a screen reader says of it.
        picture: a data URI from `picture`, the still of a clip where there is one, or None.
        clip: a data URI from `moving_picture`, which plays in place of the picture, or None.
        sound: the clip has sound: it plays muted until a reader turns it on.
    """

    text: str
    picture: str | None = None
    clip: str | None = None
    sound: bool = False


@dataclass(frozen=True)
class Candidate:
    """A candidate at its `rank`, from 0. `correct` is None where the truth is not known."""

    item: Item
    score: float
    correct: bool | None = None
    rank: int | None = None


@dataclass(frozen=True)
class Entry:
    """A query with its candidates, best first.

    Attributes:
        query, candidates: what was asked, and the best of what was found.
        remark: stands below them.
        truth: the best true candidate where it is known and not among `candidates`; its `rank` is shown.
    """

    query: Item
    candidates: Sequence[Candidate]
    remark: str = ""
    truth: Candidate | None = None

    @property
    def verdict(self) -> bool | None:
        """Whether the best candidate is right; None where the truth is not known."""
        return self.candidates[0].correct if self.candidates else None


@dataclass(frozen=True)
class Group:
    """Entries under a heading.

    Attributes:
        title, intro: the heading, and a sentence below it.
        layout: "cards" for queries with a picture and candidates of text, "rows" for candidates with pictures.
        total: how many entries there are where fewer are shown; a reader is told.
    """

    title: str
    entries: Sequence[Entry]
    intro: str = ""
    layout: Literal["cards", "rows"] = "cards"
    total: int | None = None


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
class Recall:
    """Retrieval in one direction, a column of the recall table.

    Attributes:
        title: the direction.
        queries, gallery: how many there were.
        shares: name -> interval, in [0, 1], larger is better ("R@1"); drawn on one scale.
        ranks: name -> interval, from 1, smaller is better ("median rank").
        chance: name -> what guessing gives, for those of `shares` where that is known.
    """

    title: str
    queries: int
    gallery: int
    shares: Mapping[str, Interval]
    ranks: Mapping[str, Interval] = field(default_factory=dict)
    chance: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Histogram:
    """Counts, or expected ones, in common bins for one or two series, as `rank_histogram` makes it."""

    kind: ClassVar[str] = "histogram"
    title: str
    bins: Sequence[str]
    series: Sequence[tuple[str, Sequence[float]]]
    caption: str = ""

    @property
    def highest(self) -> float:
        """The largest count, at least 1."""
        return max(1, *(count for _, counts in self.series for count in counts))


@dataclass(frozen=True)
class HeatMap:
    """Scores as a picture, as `heat_map` makes it.

    Attributes:
        picture: a data URI; a cell's opacity is its place between `low` and `high`.
        rows, columns: names, where a pixel is one pair; empty where pixels are means over blocks.
        shape: pixels (rows, columns).
    """

    kind: ClassVar[str] = "heat"
    title: str
    picture: str
    shape: tuple[int, int]
    low: float
    high: float
    rows: Sequence[str] = ()
    columns: Sequence[str] = ()
    row_axis: str = ""
    column_axis: str = ""
    caption: str = ""


@dataclass(frozen=True)
class Point:
    """A place in [0, 1]² with a name; `mate` is the index of the point that it belongs to."""

    x: float
    y: float
    name: str
    series: int
    mate: int | None = None


@dataclass(frozen=True)
class PointMap:
    """Points of named series, as `embedding_map` makes it."""

    kind: ClassVar[str] = "points"
    title: str
    series: Sequence[str]
    points: Sequence[Point]
    caption: str = ""


@dataclass(frozen=True)
class Bar:
    """A value with a label; `low` and `high` are the bounds of its interval."""

    label: str
    value: float
    text: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Bars:
    """Horizontal bars on one scale around 0: what each stream contributes."""

    kind: ClassVar[str] = "bars"
    title: str
    bars: Sequence[Bar]
    caption: str = ""

    @property
    def span(self) -> tuple[float, float]:
        """The scale: it holds 0 and every bar with its interval."""
        ends = [0.0, *(v for b in self.bars for v in (b.value, b.low, b.high) if v is not None)]
        return min(ends), max(max(ends), min(ends) + 1e-12)


@dataclass(frozen=True)
class Times:
    """Parts of the time of a run: (name, seconds), and where they ran; of those in `kept` the results were there."""

    kind: ClassVar[str] = "times"
    title: str
    parts: Sequence[tuple[str, float]]
    caption: str = ""
    kept: Collection[str] = ()


Figure: TypeAlias = Histogram | HeatMap | PointMap | Bars | Times


@dataclass(frozen=True)
class Report:
    """A whole report.

    Attributes:
        title, lede: the heading and one or two sentences below it.
        groups: the matches.
        stats: the figures of the summary.
        notes: what a reader must know first: what is wrong, what was left out.
        recalls: the columns of the recall table, and `recall_note` what its intervals are.
        figures: charts.
        facts: what ran where.
        score_name: what the numbers are, in the plural, e.g. "cosines".
        distance: smaller is better, and a longer bar is farther away.
    """

    title: str
    lede: str
    groups: Sequence[Group]
    stats: Sequence[Stat] = ()
    notes: Sequence[str] = ()
    recalls: Sequence[Recall] = ()
    recall_note: str = ""
    figures: Sequence[Figure] = ()
    facts: Sequence[Facts] = ()
    score_name: str = "scores"
    distance: bool = False
    language: str = "en"
    footer: str = "Made by pycm. This file needs nothing but itself."
