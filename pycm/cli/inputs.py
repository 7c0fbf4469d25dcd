"""Reading what the user points at: folders of images, and images or texts listed in files."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CommandError
from .output import an

IMAGE_SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})
CLIP_SUFFIXES = frozenset({".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm", ".webp"})
IMAGE_COLUMNS = ("image", "image_path", "path", "file")
CLIP_COLUMNS = ("clip", "video", "clip_path", "video_path", "path", "file")
TEXT_COLUMNS = ("text", "caption", "sentence", "captions", "texts", "sentences")


@dataclass(frozen=True)
class TextLine:
    """A text, and the image that its file says it belongs to: beside the file, and as it is named there."""

    text: str
    image: Path | None = None
    name: str | None = None


def read_images(path: Path) -> list[Path]:
    """The images of a folder and its subfolders, sorted, or those that a .jsonl or .csv file lists.

    Hidden files are left out. In a list, names are relative to the list's folder, each image comes once, and
    a name need not exist: it is reported when it is read.
    """
    return _read_files(path, "--images", "image", IMAGE_SUFFIXES, IMAGE_COLUMNS)


def read_clips(path: Path) -> list[Path]:
    """The clips of a folder and its subfolders, or of a list, as `read_images`."""
    return _read_files(path, "--videos", "clip", CLIP_SUFFIXES, CLIP_COLUMNS)


def _read_files(path: Path, option: str, what: str, suffixes: frozenset[str], columns: tuple[str, ...]) -> list[Path]:
    if path.is_dir():
        found = sorted(_walk(path, suffixes))
        if not found:
            raise CommandError(f"{path}: no {what}s in this folder (looked for {', '.join(sorted(suffixes))})")
        return found
    if not path.exists():
        raise CommandError(f"{path}: no such folder or file")
    listed: dict[Path, None] = {}
    for number, record in read_records(path, option, (".jsonl", ".csv")):
        name = first_of(record, columns)
        if not isinstance(name, str) or not name:
            raise CommandError(
                f"{path}: line {number}: expected {an(what)}'s name under {one_of(columns)}; {columns_of(record)}"
            )
        listed[path.parent / name] = None
    return list(listed)


def read_texts(path: Path, columns: tuple[str, ...] = IMAGE_COLUMNS) -> list[TextLine]:
    """The texts of a .txt (one a line; blank lines are skipped), .jsonl or .csv file.

    `columns` may name the image, or the clip, that a text belongs to.
    """
    if path.is_dir():
        raise CommandError(f"{path}: a folder, expected a .txt, .jsonl or .csv file")
    if not path.exists():
        raise CommandError(f"{path}: no such file")
    if path.suffix.lower() == ".txt":
        lines = [TextLine(line.strip()) for _, line in _lines(path) if line.strip()]
        if not lines:
            raise CommandError(f"{path}: the file has no text")
        return lines
    found: list[TextLine] = []
    for number, record in read_records(path, "--texts", (".txt", ".jsonl", ".csv")):
        image = first_of(record, columns)
        name = image if isinstance(image, str) and image else None
        owner = None if name is None else path.parent / name
        found += [TextLine(text, owner, name) for text in texts_of(path, number, record)]
    return found


def common_folder(files: Sequence[Path]) -> Path | None:
    """The folder that files are named relative to; None where they share none but the root."""
    # Absolute first: a list may mix both kinds.
    folder = Path(os.path.commonpath([os.path.abspath(path.parent) for path in files]))
    return None if folder == Path(folder.anchor) else folder


def texts_of(path: Path, number: int, record: dict[str, Any], fields: tuple[str, ...] = ()) -> list[str]:
    """The texts of a record: under its text column, or under `fields`, columns or languages of that column.

    A text, a list of them, or texts by language; CommandError where there is none.
    """
    value = first_of(record, TEXT_COLUMNS)
    given = []
    for field in fields:
        named = record.get(field)
        given.append(value.get(field) if named is None and isinstance(value, dict) else named)
    texts: list[Any] = []
    for part in given if fields else [value]:
        part = list(part.values()) if isinstance(part, dict) else part  # by language
        texts += part if isinstance(part, list) else [part]
    if not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise CommandError(
            f"{path}: line {number}: expected a text under {one_of(fields or TEXT_COLUMNS[:4])}; {columns_of(record)}"
        )
    return [" ".join(text.split()) for text in texts]


def _walk(folder: Path, suffixes: frozenset[str]) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes:
                yield Path(parent, name)


def read_records(path: Path, option: str, suffixes: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, columns) of each record; an error names the line."""
    suffix = path.suffix.lower()
    if suffix not in suffixes:
        raise CommandError(f"{path}: {option} takes {one_of(suffixes)}, got {suffix or 'no ending'!r}")
    records = _jsonl(path) if suffix == ".jsonl" else _csv(path)
    empty = True
    for record in records:
        empty = False
        yield record
    if empty:
        raise CommandError(f"{path}: the file {'is empty' if path.stat().st_size == 0 else 'has no rows'}")


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line.strip())
        except json.JSONDecodeError as error:
            raise CommandError(f"{path}: line {number}: not JSON: {error.msg} (column {error.colno})") from error
        except RecursionError as error:
            raise CommandError(f"{path}: line {number}: not JSON: nested too deeply") from error
        if not isinstance(record, dict):
            raise CommandError(f"{path}: line {number}: expected a JSON object, got {type(record).__name__}")
        yield number, record


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    text = "".join(line for _, line in _lines(path))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        columns = [name.strip().lower() for name in header]
        for row in reader:
            if not row:
                continue
            if len(row) != len(columns):
                raise CommandError(
                    f"{path}: line {reader.line_num}: expected {len(columns)} columns as in the header, got {len(row)}"
                )
            yield reader.line_num, dict(zip(columns, row, strict=True))
    except csv.Error as error:
        raise CommandError(f"{path}: line {reader.line_num}: not CSV: {error}") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of a UTF-8 file, with or without a byte order mark."""
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(True), start=1):
        try:
            yield number, line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CommandError(f"{path}: line {number}: not UTF-8: {error.reason}") from error


def first_of(record: dict[str, Any], names: tuple[str, ...]) -> Any:
    """The value of the first of these columns that has one, or None."""
    return next((record[name] for name in names if record.get(name) is not None), None)


def columns_of(record: dict[str, Any]) -> str:
    """What an error says of a record that lacks something."""
    return f"there are {', '.join(map(repr, record))}" if record else "there is nothing"


def one_of(names: tuple[str, ...]) -> str:
    """ "a, b or c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
