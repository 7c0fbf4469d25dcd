"""What the tests of Gallery share: what a search must find, and a process that changes a gallery until it is killed."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import oracles

from pycm.gallery import Gallery

Array = npt.NDArray[Any]
DIM = 6


def expected_topk(
    rows: Mapping[Any, Array], queries: Array, k: int, metric: str, allowed: Array | None = None
) -> tuple[Array, Array]:
    """Scores and ids, by the specification: over the rows by rising id, where the lowest wins a tie.

    `allowed` is [M] or [N, M] over the rows in the order of `rows`.
    """
    names = sorted(rows)
    order = [list(rows).index(name) for name in names]
    gallery = np.stack([rows[name] for name in names])
    scores, found = oracles.topk(queries, gallery, k, metric, None if allowed is None else allowed[..., order])
    ids = np.full(found.shape, None if isinstance(names[0], str) else -1, object if isinstance(names[0], str) else int)
    ids[found >= 0] = np.array(names, ids.dtype)[found[found >= 0]]
    return scores, ids


def assert_holds(gallery: Any, rows: Mapping[Any, Array], tags: Mapping[Any, str | None] | None = None) -> None:
    """That the gallery has just these rows, to the bit, in this order, with these metadata."""
    got = dict(gallery)
    assert list(got) == list(rows)
    assert len(gallery) == len(rows)
    for name, row in rows.items():
        assert got[name].tobytes() == row.tobytes(), name
    if tags is not None:
        table = gallery.metadata
        column = table["tag"].to_pylist() if table is not None and "tag" in table.column_names else [None] * len(rows)
        assert column == [tags[name] for name in rows]


# ---- files ----


def make(path: Path, *, strings: bool = False, metadata: bool = False, dtype: Any = np.float32) -> dict[Any, Any]:
    """A file of a few rows, whose ids do not rise; returns them."""
    rows = np.random.default_rng(1).standard_normal((20, 5)).astype(dtype)
    names: list[Any] = [f"n{i * 7 % 20}é" if strings else i * 7 % 20 for i in range(20)]
    Gallery(rows, ids=names, metadata={"tag": [f"t{i}" for i in range(20)]} if metadata else None).save(path)
    return dict(zip(names, rows, strict=True))


def journaled(path: Path) -> tuple[dict[Any, Any], list[int]]:
    """A file with a journal of four operations; returns the rows, and where each operation ends in the journal."""
    held = make(path)
    ends = []
    with Gallery.open(path, "r+") as gallery:
        for step in range(4):
            if step % 2:
                gallery.remove([step])
                del held[step]
            else:
                row = np.full((1, 5), step, np.float32)
                gallery.add(row, [100 + step])
                held[100 + step] = row[0]
            ends.append(os.path.getsize(f"{path}.journal"))
    return held, ends


# ---- the process that is killed ----


def rows_of(names: Sequence[int]) -> Array:
    """The rows of some ids: what is read back can be checked without being told."""
    return ((np.array(names)[:, None] * 7919 + np.arange(DIM) * 104729) % 65521).astype(np.float32)


Operation = tuple[str, Sequence[int]]


def plan(rng: np.random.Generator, present: Sequence[int], fresh: int) -> Operation:
    """The next operation on a gallery of ids `present`, where `fresh` and all above it were never used."""
    kind = rng.choice(["add", "add", "add", "remove", "remove", "compact"])
    if kind == "add" or not present:
        count = int(rng.choice([1, 2, 30, 3000])) if len(present) < 4000 else 1
        return "add", range(fresh, fresh + count)
    if kind == "remove":
        count = int(rng.integers(1, len(present) + 1)) if rng.random() < 0.3 else 1
        return "remove", rng.choice(np.array(present), count, replace=False).tolist()
    return "compact", ()


def apply(operation: Operation, present: list[int]) -> list[int]:
    kind, names = operation
    gone = set(names) if kind == "remove" else set()
    return [name for name in present if name not in gone] + (list(names) if kind == "add" else [])


def _work(path: str, seed: int, fresh: int) -> None:
    """Change the gallery for ever, telling of each operation when it is acknowledged."""
    rng = np.random.default_rng(seed)
    with Gallery.open(path, "r+") as gallery:
        present = gallery.ids.tolist()
        os.write(1, b"open\n")
        while True:
            kind, names = operation = plan(rng, present, fresh)
            if kind == "add":
                gallery.add(rows_of(names), list(names))
                fresh += len(names)
            elif kind == "remove":
                gallery.remove(names)
            else:
                gallery.compact()
            present = apply(operation, present)
            os.write(1, b"done\n")


def main() -> None:
    """For each line "path seed fresh" that comes: fork a child at work, tell its number, and tell when it is dead."""
    for line in sys.stdin:
        path, seed, fresh = line.rsplit(maxsplit=2)
        child = os.fork()
        if not child:
            try:
                _work(path, int(seed), int(fresh))
            finally:
                os._exit(1)
        os.write(1, f"child {child}\n".encode())
        _, status = os.waitpid(child, 0)
        os.write(1, f"dead {status}\n".encode())


if __name__ == "__main__":
    main()
