"""Reports: ranked matches as one self-contained HTML file."""

from .render import (
    Candidate,
    Entry,
    Facts,
    Group,
    Item,
    Report,
    Stat,
    picture,
    render_report,
    write_report,
)

__all__ = [
    "Candidate",
    "Entry",
    "Facts",
    "Group",
    "Item",
    "Report",
    "Stat",
    "picture",
    "render_report",
    "write_report",
]
