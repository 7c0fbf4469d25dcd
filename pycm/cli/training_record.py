"""What a saved matcher was trained on, so that "held out" is said only of what was."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from .._files import atomic_write
from .embedding import fingerprint
from .errors import CommandError

_NAME = "train.json"


@dataclass(frozen=True)
class TrainingRecord:
    """The part, as of `pairs.SPLITS`, of a file of pairs, and the SHA-256 of that file."""

    split: str
    pairs: str

    def has_seen(self, pairs: Path, split: str) -> bool:
        """Whether items of that part of the file `pairs` were trained on."""
        return _digest(pairs) == self.pairs and ("all" in (self.split, split) or self.split == split)


def write_record(matcher: Path, pairs: Path, split: str) -> None:
    """Keep beside a saved matcher what it was trained on."""
    document = {"matcher": fingerprint(matcher), "split": split, "pairs": _digest(pairs)}
    with atomic_write(matcher / _NAME) as file:
        json.dump(document, file, indent=2)


def read_record(matcher: Path) -> TrainingRecord | None:
    """What the matcher saved there was trained on; None where that is not told, or of a matcher saved there before."""
    path = matcher / _NAME
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        record = TrainingRecord(str(document["split"]), str(document["pairs"]))
        return record if document["matcher"] == fingerprint(matcher) else None
    except (ValueError, KeyError, TypeError) as error:
        raise CommandError(f"{path}: not what pycm train writes: {error!r}") from error


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
