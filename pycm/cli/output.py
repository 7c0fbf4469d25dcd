"""Where results go: the check before the long work, tables on the terminal, CSV and JSONL files."""

from __future__ import annotations

import csv
import json
import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .._files import atomic_write
from .errors import CommandError


class Ranked(NamedTuple):
    """One match: rank counts from 0; `correct` is None where the truth is not known."""

    direction: str
    query_index: int
    query: str
    rank: int
    match_index: int
    match: str
    score: float
    correct: bool | None


def check_folder(option: str, folder: Path) -> None:
    """Raise unless `folder` is one that can be written to, or can be made; nothing stays behind."""
    above = folder
    while not above.exists() and above != above.parent:
        above = above.parent
    if not above.is_dir():
        raise CommandError(f"{option} {folder}: {above} is not a folder")
    _probe(f"{option} {folder}", above)


def check_output(path: Path, endings: Sequence[str]) -> None:
    """Raise unless `path` has one of `endings` and can be written; nothing stays behind.

    Asked before the long work. A file is really made: permission bits say little to root, and nothing about a
    read-only file system.
    """
    if path.suffix.lower() not in endings:
        known = f"{', '.join(endings[:-1])} or {endings[-1]}" if len(endings) > 1 else endings[0]
        raise CommandError(f"--out {path}: must end in {known}")
    if path.is_dir():
        raise CommandError(f"--out {path}: is a folder")
    folder = path.parent
    if not folder.is_dir():
        reason = "is not a folder" if folder.exists() else "no such folder"
        raise CommandError(f"--out {path}: {folder}: {reason}")
    _probe(f"--out {path}", folder)


def _probe(what: str, folder: Path) -> None:
    probe = folder / f".pycm-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        try:
            probe.touch(exist_ok=False)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise CommandError(f"{what}: cannot write to {folder}: {error.strerror or error}") from error


def an(word: str) -> str:
    """The word with its article."""
    return f"{'an' if word[0].lower() in 'aeiou' else 'a'} {word}"


def shown(path: str | os.PathLike[str], base: Path | None = None) -> str:
    """A path for people: relative to `base` where it lies in it, and without undecodable bytes."""
    text = os.fspath(path)
    if base is not None:
        relative = os.path.relpath(text, base)
        text = text if relative.startswith("..") else relative
    return os.fsencode(text).decode("utf-8", "replace")


def brief(path: str | os.PathLike[str]) -> str:
    """A path for a report, which is passed on: as it was given, or the last two parts of an absolute one."""
    given = Path(path)
    return shown(Path(*given.parts[-2:]) if given.is_absolute() else given)


def write_rows(path: Path, rows: Iterable[Ranked]) -> None:
    """Write CSV or JSONL after the ending of `path`; it appears complete or not at all."""
    with atomic_write(path) as file:
        if path.suffix.lower() == ".csv":
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(Ranked._fields)
            writer.writerows([_plain(value) for value in row] for row in rows)
        else:
            for row in rows:
                record = {key: value for key, value in row._asdict().items() if value is not None}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else value


def print_table(
    console: Console,
    title: str,
    query_title: str,
    match_title: str,
    rows: Sequence[Ranked],
    bars: Sequence[float],
) -> None:
    """Print ranked matches, one line each; `bars` are their lengths in percent."""
    several = any(row.rank for row in rows)
    marked = any(row.correct is not None for row in rows)
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(query_title, overflow="fold", max_width=44)
    table.add_column("", justify="right", style="dim", width=2)
    table.add_column("score", justify="right", width=7)
    table.add_column("", width=10, no_wrap=True)
    if marked:
        table.add_column("", width=1)
    table.add_column(match_title, overflow="fold", min_width=20)
    for i, (row, bar) in enumerate(zip(rows, bars, strict=True)):
        first = row.rank == 0
        style = {True: "green", False: "red", None: "cyan"}[row.correct]
        cells: list[str | Text] = [
            Text(row.query if first else "", style="bold"),
            str(row.rank + 1),
            f"{row.score:.3f}",
            Text("━" * max(0, round(bar / 10)), style=style if first or row.correct else "dim"),
        ]
        if marked:
            cells.append(
                Text({True: "✓", False: "✗", None: ""}[row.correct], style=style if first or row.correct else "dim")
            )
        cells.append(Text(row.match, style="" if first or row.correct else "dim"))
        last = i + 1 == len(rows) or rows[i + 1].rank == 0
        table.add_row(*cells, end_section=last and several)
    console.print(table)
