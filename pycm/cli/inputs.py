"""Reading what the user points at: folders of images, and images or texts listed in files."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CommandError

IMAGE_SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})
_IMAGE_COLUMNS = ("image", "image_path", "path", "file")
_TEXT_COLUMNS = ("text", "caption", "sentence", "captions", "texts", "sentences")


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
    if path.is_dir():
        found = sorted(_walk(path))
        if not found:
            raise CommandError(f"{path}: no images in this folder (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
        return found
    if not path.exists():
        raise CommandError(f"{path}: no such folder or file")
    listed: dict[Path, None] = {}
    for number, record in _records(path, "--images", (".jsonl", ".csv")):
        name = _first(record, _IMAGE_COLUMNS)
        if not isinstance(name, str) or not name:
            raise CommandError(
                f"{path}: line {number}: expected an image's name under {_or(_IMAGE_COLUMNS)}; {_found(record)}"
            )
        listed[path.parent / name] = None
    return list(listed)


def read_texts(path: Path) -> list[TextLine]:
    """The texts of a .txt (one a line; blank lines are skipped), .jsonl or .csv file."""
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
    for number, record in _records(path, "--texts", (".txt", ".jsonl", ".csv")):
        image = _first(record, _IMAGE_COLUMNS)
        name = image if isinstance(image, str) and image else None
        owner = None if name is None else path.parent / name
        found += [TextLine(text, owner, name) for text in _texts(path, number, record)]
    return found


def _texts(path: Path, number: int, record: dict[str, Any]) -> list[str]:
    value = _first(record, _TEXT_COLUMNS)
    if isinstance(value, dict):  # by language
        value = list(value.values())
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise CommandError(f"{path}: line {number}: expected a text under {_or(_TEXT_COLUMNS[:4])}; {_found(record)}")
    return [" ".join(text.split()) for text in texts]


def _walk(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                yield Path(parent, name)


def _records(path: Path, option: str, suffixes: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, columns) of each record; an error names the line."""
    suffix = path.suffix.lower()
    if suffix not in suffixes:
        raise CommandError(f"{path}: {option} takes {_or(suffixes)}, got {suffix or 'no ending'!r}")
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


def _first(record: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


def _found(record: dict[str, Any]) -> str:
    return f"there are {', '.join(map(repr, record))}" if record else "there is nothing"


def _or(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
