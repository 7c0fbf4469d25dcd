"""How well a matcher finds what belongs together: the figures that `train` and `evaluate` share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..evaluate import Interval, RetrievalMetrics
from ..report import Recall, recall
from .inputs import common_folder
from .output import shown
from .pairs import Pairs
from .results import Results
from .systems import IMAGE_VIDEO, Found, System, system_of

_KEEP = 5


@dataclass(frozen=True)
class Measured:
    """A matcher on pairs.

    Attributes:
        pairs: those that could be read.
        results: the best matches both ways, with the truth.
        metrics: forward and backward.
        recalls: the same with intervals; of a text's direction the texts of one item are drawn together.
        owner: for each right item the row of the left one.
    """

    pairs: Pairs
    results: Results
    metrics: tuple[RetrievalMetrics, RetrievalMetrics]
    recalls: tuple[Recall, Recall]
    owner: np.ndarray[Any, np.dtype[np.int64]]


def measure(matcher: Any, pairs: Pairs, *, ks: Sequence[int], skip: bool) -> Measured:
    """Match and evaluate; unreadable items raise, or are left out with what belongs to them."""
    system = system_of(matcher)
    given = pairs.clips if system is IMAGE_VIDEO else [text for group in pairs.texts for text in group]
    keep = min(_KEEP, len(given)), min(_KEEP, len(pairs))
    found = Found.of(system, matcher.match(pairs.left, given, keep, on_error="skip" if skip else "raise"))
    if found.errors:  # both sides of a pair go
        gone = {name for name, _ in found.errors}
        kept = [i for i in range(len(pairs)) if not _names(pairs, i) & gone]
        pairs = pairs.take(kept)
        given = pairs.clips if system is IMAGE_VIDEO else [text for group in pairs.texts for text in group]
        again = Found.of(system, matcher.match(pairs.left, given, (min(keep[0], len(given)), min(keep[1], len(pairs)))))
        found = Found(again.forward, again.backward, again.kept, again.metric, found.errors, found.seconds)
    owner = np.arange(len(pairs))
    if system is not IMAGE_VIDEO:
        owner = np.repeat(owner, [len(group) for group in pairs.texts])
    evaluated = matcher.evaluate(pairs.left, pairs.right, ks)
    metrics = getattr(evaluated, system.forward), getattr(evaluated, system.backward)
    names = _shown(pairs.left)
    others = _shown(pairs.clips) if system is IMAGE_VIDEO else [str(text) for text in given]
    return Measured(
        pairs,
        Results(system, found, names, others, [int(row) for row in owner]),
        metrics,
        _recalls(system, metrics, len(pairs), owner),
        owner,
    )


def _shown(files: Sequence[Path]) -> list[str]:
    base = common_folder(files)
    return [shown(file, base) for file in files]


def _names(pairs: Pairs, row: int) -> set[str]:
    return {str(pairs.left[row]), *([str(pairs.clips[row])] if pairs.clips else [])}


def _recalls(
    system: System, metrics: tuple[RetrievalMetrics, RetrievalMetrics], count: int, owner: Any
) -> tuple[Recall, Recall]:
    single = len(owner) == count
    titles = [
        f"{a.many.capitalize()} to {b.many}" for a, b in ((system.left, system.right), (system.right, system.left))
    ]
    return (
        recall(titles[0], metrics[0], len(owner), one_positive=single),
        recall(titles[1], metrics[1], count, groups=None if single else owner),
    )


def print_recalls(console: Console, title: str, recalls: Sequence[Recall]) -> None:
    """A table of figures with their intervals, one column a direction."""
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for column in recalls:
        table.add_column(f"{column.title}\n{column.queries:,} among {column.gallery:,}")
    for name in dict.fromkeys(name for column in recalls for name in column.shares):
        table.add_row(name, *(_cell(column.shares.get(name), 100) for column in recalls))
    for name in recalls[0].ranks:
        table.add_row(name, *(_cell(column.ranks[name], 1) for column in recalls))
    console.print(table)
    console.print("Behind each figure its 95 % bootstrap interval over the queries.", style="dim")


def _cell(interval: Interval | None, unit: float) -> Text:
    if interval is None:
        return Text("")
    value, low, high = (unit * part for part in interval)
    return Text.assemble((f"{value:6.1f}", "bold"), (f"  {low:.1f} – {high:.1f}", "dim"))
