"""How well a matcher finds what belongs together: the figures that `train` and `evaluate` share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..evaluate import Interval, RetrievalMetrics, retrieval_metrics
from ..matchers.known import unique_texts
from ..report import RANK_ENDS, Recall, recall
from .errors import CommandError
from .inputs import common_folder
from .labels import commonest, told_labels
from .output import shown
from .pairs import Pairs
from .results import Results
from .systems import CLIP, VIDEO_LABELS, Found, Kind, system_of

_KEEP = 5
# Whose `evaluate` counts equal texts as one, of all items that have it.
_TEXTS_ONCE = ("VideoTextMatcher", "RegionTextMatcher")


@dataclass(frozen=True)
class Measured:
    """A matcher on pairs.

    Attributes:
        pairs: those that could be read.
        results: the best matches both ways, with the truth.
        metrics: forward and backward, with recalls at the ends of a rank histogram's bins too.
        recalls: the same with intervals; of a text's direction the texts of one item are drawn together.
        owner: for each right item the row of the (first) left one; None with labels.
        probabilities: [left, right] of a classifier of labels.
        note: what the figures are to be compared with.
    """

    pairs: Pairs
    results: Results
    metrics: tuple[RetrievalMetrics, RetrievalMetrics]
    recalls: tuple[Recall, Recall]
    owner: npt.NDArray[np.int64] | None
    probabilities: npt.NDArray[np.float32] | None = None
    note: str = ""

    @property
    def tied(self) -> bool:
        """Whether a recall hangs on the order of equal scores: then it is the mean over all orders."""
        shares = [v for m in self.metrics for name, v in m.per_query.items() if name.startswith("recall@")]
        return any(((v > 0) & (v < 1)).any() for v in shares)

    def columns(self, count: int) -> npt.NDArray[np.int64]:
        """The right items that the first `count` left ones are shown with: their own, or all labels."""
        return np.arange(len(self.results.right)) if self.owner is None else np.flatnonzero(self.owner < count)

    def own(self, count: int, columns: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether the first `count` left items belong to those right ones: [count, columns]."""
        if self.owner is None:
            assert self.results.own is not None
            of, among = np.array(self.results.own[:count]), columns
        else:
            of, among = np.arange(count), self.owner[columns]
        belong: npt.NDArray[np.bool_] = of[:, None] == among
        for left, right in self.results.also:
            belong[left : left + 1, columns == right] = True  # none beyond `count`
        return belong


def measure(matcher: Any, pairs: Pairs, *, ks: Sequence[int], skip: bool) -> Measured:
    """Match and evaluate; unreadable items raise, or are left out with what belongs to them."""
    system = system_of(matcher)
    if system is VIDEO_LABELS:
        return _measure_labels(matcher, pairs, ks, skip)
    once = type(matcher).__name__ in _TEXTS_ONCE
    given, belong = _right(pairs, once=once)
    keep = min(_KEEP, len(given)), min(_KEEP, len(pairs))
    found = Found.of(system, matcher.match(pairs.left, given, keep, on_error="skip" if skip else "raise"))
    if found.errors:  # both sides of a pair go
        pairs = without(pairs, found.errors)
        given, belong = _right(pairs, once=once)
        again = Found.of(system, matcher.match(pairs.left, given, (min(keep[0], len(given)), min(keep[1], len(pairs)))))
        found = Found(again.forward, again.backward, again.kept, again.metric, found.errors, found.seconds)
    _, first = np.unique(belong[:, 1], return_index=True)
    owner = belong[first, 0]
    also = frozenset((int(left), int(right)) for left, right in np.delete(belong, first, axis=0))
    evaluated = matcher.evaluate(pairs.left, pairs.right, _with_ends(ks))
    metrics = getattr(evaluated, system.forward), getattr(evaluated, system.backward)
    others = _shown(pairs.clips) if system.right is CLIP else [str(text) for text in given]
    results = Results(system, found, _shown(pairs.left), others, [int(row) for row in owner], also)
    alone = len(np.unique(owner)) == len(owner)  # each to be drawn by itself
    recalls = (
        recall(
            _title(system.left, system.right), metrics[0], len(owner), ks=ks, one_positive=len(belong) == len(pairs)
        ),
        recall(
            _title(system.right, system.left),
            metrics[1],
            len(pairs),
            ks=ks,
            groups=None if alone else owner,
            one_positive=not also,
        ),
    )
    return Measured(pairs, results, metrics, recalls, owner)


def _measure_labels(matcher: Any, pairs: Pairs, ks: Sequence[int], skip: bool) -> Measured:
    labels = [str(label) for label in matcher.labels_]
    if unknown := sorted({*pairs.labels} - {*labels}):
        raise CommandError(f"label {unknown[0]!r} is none of the matcher's: {', '.join(labels)}")
    ks = [k for k in ks if k < len(labels)] or [1]  # beyond, every label is found
    keep = min(_KEEP, len(labels)), min(_KEEP, len(pairs))
    found, probabilities = told_labels(matcher, pairs.left, keep, skip=skip)
    pairs = pairs.take([int(row) for row in found.kept[0]])
    own = [labels.index(label) for label in pairs.labels]
    of = [np.flatnonzero(np.array(own) == j) for j in range(len(labels))]
    there = [j for j, rows in enumerate(of) if len(rows)]  # a label of no clip here is no query
    metrics = (
        retrieval_metrics(probabilities, own, _with_ends(ks)),
        retrieval_metrics(np.ascontiguousarray(probabilities.T[there]), [of[j] for j in there], _with_ends(ks)),
    )
    system = VIDEO_LABELS
    recalls = (
        recall(_title(system.left, system.right), metrics[0], len(labels), ks=ks),
        recall(_title(system.right, system.left), metrics[1], len(pairs), ks=ks, one_positive=False),
    )
    results = Results(system, found, _shown(pairs.left), labels, own=own)
    return Measured(pairs, results, metrics, recalls, None, probabilities, commonest(own, labels))


def _with_ends(ks: Sequence[int]) -> list[int]:
    """Cutoffs at which recalls are wanted, and those that a rank histogram is made of."""
    return sorted({*ks, *RANK_ENDS})


def _title(queries: Kind, gallery: Kind) -> str:
    return f"{queries.many.capitalize()} to {gallery.many}"


def _right(pairs: Pairs, *, once: bool) -> tuple[list[Any], npt.NDArray[np.int64]]:
    """The items of the second kind, one after the other, equal texts `once`; and the pairs of rows, ascending."""
    rows = np.arange(len(pairs))
    if pairs.system.right is CLIP:
        return pairs.clips, np.stack([rows, rows], 1)
    texts, owner = [t for group in pairs.texts for t in group], np.repeat(rows, [len(group) for group in pairs.texts])
    return unique_texts(texts, owner) if once else (texts, np.stack([owner, np.arange(len(texts))], 1))


def without(pairs: Pairs, errors: Sequence[tuple[str, str]]) -> Pairs:
    """The pairs of which nothing was left out."""
    gone = {name for name, _ in errors}
    return pairs.take([i for i in range(len(pairs)) if not _names(pairs, i) & gone])


def _shown(files: Sequence[Path]) -> list[str]:
    base = common_folder(files)
    return [shown(file, base) for file in files]


def _names(pairs: Pairs, row: int) -> set[str]:
    return {str(pairs.left[row]), *([str(pairs.clips[row])] if pairs.clips else [])}


def print_recalls(console: Console, title: str, measured: Measured) -> None:
    """A table of figures with their intervals, one column a direction."""
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    recalls = measured.recalls
    for column in recalls:
        table.add_column(f"{column.title}\n{column.queries:,} among {column.gallery:,}")
    for name in dict.fromkeys(name for column in recalls for name in column.shares):
        table.add_row(name, *(_cell(column.shares.get(name), 100) for column in recalls))
    for name in recalls[0].ranks:
        table.add_row(name, *(_cell(column.ranks[name], 1) for column in recalls))
    console.print(table)
    console.print("Behind each figure its 95 % bootstrap interval over the queries.", style="dim")
    if measured.note:
        console.print(Text(measured.note))


def _cell(interval: Interval | None, unit: float) -> Text:
    if interval is None:
        return Text("")
    value, low, high = (unit * part for part in interval)
    return Text.assemble((f"{value:6.1f}", "bold"), (f"  {low:.1f} – {high:.1f}", "dim"))
