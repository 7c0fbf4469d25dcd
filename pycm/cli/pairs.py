"""Reading what belongs together: images or clips with texts, images with clips, clips with labels, one a line."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import CommandError
from .inputs import TEXT_COLUMNS, columns_of, first_of, one_of, read_records, texts_of
from .output import an
from .systems import CLIP, IMAGE, IMAGE_TEXT, IMAGE_VIDEO, LABEL, SYSTEMS, TEXT, VIDEO_LABELS, VIDEO_TEXT, Kind, System

SPLITS = ("all", "train", "test")
_STILL, _LABEL = "still", "label"
_COLUMNS = {IMAGE: ("image", "image_path", _STILL), CLIP: ("clip", "video", "clip_path", "video_path")}


@dataclass(frozen=True)
class PairOptions:
    """How a file of pairs is read.

    Attributes:
        system: a name of `SYSTEMS`; None: the columns tell.
        captions: columns of the texts, or languages of a column that has texts by language; () for the usual ones.
        image, clip: the column of the file names; None for the usual ones.
        label: the column of the labels; None for the usual one.
        root: a folder that names may also be relative to, besides that of the file.
        split: "test" is every record whose id's SHA-256 is a multiple of five, "train" the others.
        missing: whether files that do not exist are left for the reader to report or skip.
    """

    system: str | None = None
    captions: tuple[str, ...] = ()
    image: str | None = None
    clip: str | None = None
    label: str | None = None
    root: Path | None = None
    split: str = "all"
    missing: bool = False


@dataclass
class Pairs:
    """Records of a file: item i of the first kind, and what belongs to it.

    Attributes:
        system: which kinds they are.
        ids: one for each; the file's name where there is no column id.
        left: paths.
        texts: for each item its texts, where they are the second kind.
        clips: for each item its clip, where they are.
        labels: for each item its label, where they are.
    """

    system: System
    ids: list[str] = field(default_factory=list)
    left: list[Path] = field(default_factory=list)
    texts: list[list[str]] = field(default_factory=list)
    clips: list[Path] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def right(self) -> list[Any]:
        """What `fit` and `evaluate` take beside `left`."""
        sides: dict[Kind, list[Any]] = {CLIP: self.clips, LABEL: self.labels, TEXT: self.texts}
        return sides[self.system.right]

    def take(self, rows: Sequence[int]) -> Pairs:
        """Those items."""
        made = Pairs(self.system)
        for name in ("ids", "left", "texts", "clips", "labels"):
            values = getattr(self, name)
            setattr(made, name, [values[row] for row in rows] if values else [])
        return made

    def split(self, part: str) -> Pairs:
        """The "train" or "test" items by the hash of their ids, or "all"."""
        return self.take([i for i, name in enumerate(self.ids) if part == "all" or is_test(name) == (part == "test")])


def is_test(name: str) -> bool:
    """Whether the item of this id is one of the fifth that is held out: the same on every machine, in any order."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 5 == 0


def read_pairs(path: Path, options: PairOptions) -> Pairs:
    """The pairs of a .jsonl or .csv file.

    Lines that name the same file belong together: one clip with several captions may be several lines.

    Raises:
        CommandError: a line without a file, or without a text or a label, an id given twice, an image or a clip that
            belongs to two of the other kind, or files that do not exist; names the line.
    """
    if path.is_dir():
        raise CommandError(f"{path}: a folder, expected a .jsonl or .csv file of pairs")
    if not path.exists():
        raise CommandError(f"{path}: no such file")
    records = list(read_records(path, "PAIRS", (".jsonl", ".csv")))
    columns = dict(_COLUMNS)
    columns |= {kind: (name,) for kind, name in ((IMAGE, options.image), (CLIP, options.clip)) if name}
    system = SYSTEMS[options.system] if options.system else _told(path, *records[0], columns, options)
    pairs = Pairs(system)
    reader = _Reader(path, options, columns, pairs)
    for number, record in records:
        reader.add(number, record)
    if not options.missing:
        reader.check_files()
    chosen = pairs.split(options.split)
    if not len(chosen):
        raise CommandError(f"{path}: none of the {len(pairs)} records is in the part {options.split!r}")
    return chosen


def _told(path: Path, number: int, record: dict[str, Any], columns: Any, options: PairOptions) -> System:
    """The system, from the columns of the first record."""
    image, clip = (first_of(record, columns[kind]) is not None for kind in (IMAGE, CLIP))
    still = not any(record.get(name) for name in columns[IMAGE] if name != _STILL)
    text = first_of(record, (*options.captions, *TEXT_COLUMNS)) is not None
    if text and clip and still:  # of the clip: it is there for those who ask for it
        return VIDEO_TEXT
    if text and image and clip:
        raise CommandError(f"{path}: line {number} has an image, a clip and a text: choose by --system")
    if text and (image or clip):
        return IMAGE_TEXT if image else VIDEO_TEXT
    if image and clip:
        return IMAGE_VIDEO
    if clip and record.get(options.label or _LABEL) is not None:
        return VIDEO_LABELS
    kinds = "an image or a clip with its text, an image with a clip, or a clip with a label"
    raise CommandError(f"{path}: line {number}: expected {kinds}; {columns_of(record)}")


class _Reader:
    """Adds records to pairs, and remembers the lines for its errors."""

    def __init__(self, path: Path, options: PairOptions, columns: dict[Kind, tuple[str, ...]], pairs: Pairs) -> None:
        self.path, self.options, self.columns, self.pairs = path, options, columns, pairs
        self.lines: list[int] = []
        self.row_of: dict[Path, int] = {}
        self.row_of_id: dict[str, int] = {}
        self.line_of_clip: dict[Path, int] = {}

    def add(self, number: int, record: dict[str, Any]) -> None:
        system, pairs = self.pairs.system, self.pairs
        left, name = self._file(system.left, number, record)
        given = record.get("id")
        key = name if given in (None, "") else str(given)
        row = self.row_of.get(left)
        same = self.row_of_id.get(key)
        if same is not None and same != row:
            raise self._error(number, f"id {key!r} is that of line {self.lines[same]} already, with another file")
        if row is not None and given not in (None, "") and key != pairs.ids[row]:
            was = f"line {self.lines[row]}, whose id is {pairs.ids[row]!r}"
            raise self._error(number, f"{system.left.one} {name} is that of {was}, and here {key!r}: give it one id")
        texts = texts_of(self.path, number, record, self.options.captions) if system.right is TEXT else []
        if row is None:
            self.row_of[left] = self.row_of_id[key] = len(pairs)
            self.lines.append(number)
            pairs.ids.append(key)
            pairs.left.append(left)
            if system.right is TEXT:
                pairs.texts.append(texts)
        elif system.right is not TEXT or set(texts) <= set(pairs.texts[row]):
            raise self._error(number, f"{system.left.one} {name} is that of line {self.lines[row]} already")
        else:
            pairs.texts[row] += texts
        if system.right is LABEL:
            pairs.labels.append(self._label(number, record))
        if system.right is CLIP:
            clip, called = self._file(CLIP, number, record)
            if clip in self.line_of_clip:
                raise self._error(number, f"clip {called} is that of line {self.line_of_clip[clip]} already")
            self.line_of_clip[clip] = number
            pairs.clips.append(clip)

    def check_files(self) -> None:
        """Raise for files that do not exist, before the long work."""
        files = [*zip(self.lines, self.pairs.left, strict=True), *((n, clip) for clip, n in self.line_of_clip.items())]
        gone = [(number, file) for number, file in files if not file.exists()]
        if gone:
            number, file = gone[0]
            raise CommandError(
                f"{self.path}: {len(gone)} of {len(files)} files do not exist, the first {file} (line {number}); "
                "--skip-unreadable leaves them out"
            )

    def _file(self, kind: Kind, number: int, record: dict[str, Any]) -> tuple[Path, str]:
        """(where it is, what the file calls it)."""
        name = first_of(record, self.columns[kind])
        if not isinstance(name, str) or not name:
            columns = one_of(self.columns[kind])
            raise self._error(number, f"expected {an(kind.one)}'s name under {columns}; {columns_of(record)}")
        here = Path(os.path.normpath(self.path.parent / name))
        root = self.options.root
        return (Path(os.path.normpath(root / name)) if root is not None and not here.exists() else here), name

    def _label(self, number: int, record: dict[str, Any]) -> str:
        """The label as text: CSV has no numbers."""
        column = self.options.label or _LABEL
        label = record.get(column)
        if isinstance(label, bool) or not isinstance(label, (str, int)) or not str(label).strip():
            raise self._error(number, f"expected a label, text or whole number, under {column}; {columns_of(record)}")
        return str(label).strip()

    def _error(self, number: int, text: str) -> CommandError:
        return CommandError(f"{self.path}: line {number}: {text}")
