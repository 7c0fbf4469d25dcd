"""A report rendered to one HTML file without outside resources.

A picture stands in the page once, where it is first shown; a clip once, in a table at its end. Whatever shows them
again refers to them, and the page's script fills it in. Without scripts the page has every text and every first
picture.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .._files import atomic_write
from .._optional import require
from .parts import Report

if TYPE_CHECKING:
    import jinja2


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


def ordinal(rank: int) -> str:
    """The rank 0 is "1st"."""
    place = rank + 1
    suffix = "th" if 10 <= place % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
    return f"{place:,}{suffix}"


def amount(count: float) -> str:
    """A count; an expected one to a tenth."""
    return f"{count:,.0f}" if abs(count - round(count)) < 0.05 else f"{count:,.1f}"


def duration(seconds: float) -> str:
    """Seconds with a unit that suits their size."""
    if seconds == 0:
        return "0 s"
    if seconds >= 120:
        return "{:,} min {} s".format(*divmod(round(seconds), 60))
    if seconds >= 1:
        return f"{seconds:.1f} s"
    if seconds >= 0.01:
        return f"{seconds * 1e3:.0f} ms"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"


class _Media:
    """The pictures and clips of a page, by content: each is written once."""

    def __init__(self) -> None:
        self._pictures: dict[str, str] = {}
        self.clips: dict[str, str] = {}

    def picture(self, uri: str) -> tuple[str, bool]:
        """(its id, whether this is the first time)."""
        first = uri not in self._pictures
        return self._pictures.setdefault(uri, f"p{len(self._pictures)}"), first

    def clip(self, uri: str) -> str:
        """Its key in the table of clips."""
        return self.clips.setdefault(uri, f"c{len(self.clips)}")

    @property
    def table(self) -> str:
        """Key -> data URI as JSON that may stand in a script element."""
        return script_json({key: uri for uri, key in self.clips.items()})


def script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


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
    environment.filters |= {"amount": amount, "ordinal": ordinal, "duration": duration, "script_json": script_json}
    template: jinja2.Template = environment.get_template("template.html.j2")
    return template


def render_report(report: Report) -> str:
    """The report as one HTML document; every text is escaped. Raises ImportError without Jinja2."""
    entries = [entry for group in report.groups for entry in group.entries]
    candidates = [c for entry in entries for c in (*entry.candidates, *filter(None, [entry.truth]))]
    widths = bar_widths([c.score for c in candidates], report.distance)
    width_of = {id(c): width for c, width in zip(candidates, widths, strict=True)}
    return _template().render(
        report=report,
        media=_Media(),
        width=lambda candidate: width_of[id(candidate)],
        names_of=lambda columns: dict.fromkeys(name for column in columns for name in column.shares),
        judged=any(entry.verdict is not None for entry in entries),
        moving=any(c.item.clip for c in candidates) or any(entry.query.clip for entry in entries),
    )


def write_report(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the report; the file appears complete or not at all. Raises OSError untouched."""
    html = render_report(report)
    with atomic_write(path) as file:
        file.write(html)
