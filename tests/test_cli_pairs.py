"""Files of pairs: which system they are for, what belongs together, and what is wrong in which line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

for _package in ("typer", "rich"):
    pytest.importorskip(_package)

from pycm.cli.errors import CommandError  # noqa: E402
from pycm.cli.pairs import PairOptions, Pairs, read_pairs  # noqa: E402


def read(folder: Path, *records: dict[str, Any], **options: Any) -> Pairs:
    for record in records:
        for name in ("image", "clip", "video", "still", "picture"):
            if isinstance(record.get(name), str) and "gone" not in record[name]:
                (folder / record[name]).parent.mkdir(parents=True, exist_ok=True)
                (folder / record[name]).touch()
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return read_pairs(path, PairOptions(**options))


@pytest.mark.parametrize(
    ("record", "system"),
    [
        ({"image": "a.png", "caption": "x"}, "image-text"),
        ({"clip": "a.mp4", "captions": ["x", "y"]}, "video-text"),
        ({"video": "a.mp4", "captions": {"en": "x"}}, "video-text"),
        ({"clip": "a.mp4", "still": "a.png", "text": "x"}, "video-text"),
        ({"clip": "a.mp4", "still": "a.png"}, "image-video"),
        ({"clip": "a.mp4", "image": "a.png"}, "image-video"),
    ],
)
def test_the_columns_tell_the_system(tmp_path: Path, record: dict[str, Any], system: str) -> None:
    pairs = read(tmp_path, record)
    assert pairs.system.name == system
    assert len(pairs) == 1
    assert [bool(pairs.texts), bool(pairs.clips)] == [system != "image-video", system == "image-video"]


def test_lines_of_one_file_belong_together(tmp_path: Path) -> None:
    lines = [("a.png", ["one", "two"]), ("b.png", ["three"]), ("./a.png", ["four\n  lines"])]
    pairs = read(tmp_path, *({"image": name, "captions": texts} for name, texts in lines))
    assert pairs.left == [tmp_path / "a.png", tmp_path / "b.png"]
    assert pairs.texts == [["one", "two", "four lines"], ["three"]]
    assert pairs.ids == ["a.png", "b.png"]


def test_captions_by_language_and_columns_of_other_names(tmp_path: Path) -> None:
    record = {"picture": "a.png", "captions": {"en": "dog", "de": "Hund", "fr": "chien"}, "alt": "a dog"}
    for field, want in (
        (("de",), ["Hund"]),
        (("fr", "alt", "en"), ["chien", "a dog", "dog"]),
        ((), ["dog", "Hund", "chien"]),
    ):
        pairs = read(tmp_path, record, captions=field, image="picture")
        assert (pairs.system.name, pairs.texts) == ("image-text", [want])


def test_names_are_relative_to_the_file_or_to_the_root(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "a.png").touch()
    path = tmp_path / "data/pairs.csv"
    path.write_text("clip,still\nc.mp4,a.png\n")
    (tmp_path / "data/c.mp4").touch()
    pairs = read_pairs(path, PairOptions(root=tmp_path))
    assert (pairs.left, pairs.clips) == ([tmp_path / "a.png"], [tmp_path / "data/c.mp4"])
    with pytest.raises(CommandError, match=r"1 of 2 files do not exist, the first .*data/a\.png \(line 2\)"):
        read_pairs(path, PairOptions())


def test_the_split_is_by_the_hash_of_the_id(tmp_path: Path) -> None:
    records = [{"id": f"item {i}", "image": f"{i}.png", "caption": f"text {i}"} for i in range(100)]
    every = read(tmp_path, *records)
    train, test = (read(tmp_path, *records, split=part) for part in ("train", "test"))
    want = [i for i in range(100) if int(hashlib.sha256(f"item {i}".encode()).hexdigest(), 16) % 5 == 0]
    assert test.texts == [[f"text {i}"] for i in want]
    assert sorted(train.ids + test.ids) == sorted(every.ids)
    with pytest.raises(CommandError, match="none of the 1 records is in the part 'test'"):
        read(tmp_path, next(r for i, r in enumerate(records) if i not in want), split="test")


@pytest.mark.parametrize(
    ("records", "told"),
    [
        ([{"clip": "a.mp4", "caption": "x"}, {"caption": "y"}], "line 2: expected a clip's name under clip"),
        ([{"clip": "a.mp4", "caption": "x"}, {"clip": "", "caption": "y"}], "line 2: expected a clip's name"),
        ([{"clip": "a.mp4", "caption": "x"}, {"clip": "b.mp4"}], "line 2: expected a text under"),
        ([{"clip": "a.mp4", "caption": "x"}, {"clip": "b.mp4", "captions": []}], "line 2: expected a text under"),
        ([{"clip": "a.mp4", "caption": "x"}, {"clip": "b.mp4", "caption": " "}], "line 2: expected a text under"),
        (
            [{"id": 7, "image": "a.png", "text": "x"}, {"id": 7, "image": "b.png", "text": "y"}],
            "line 2: id '7' is that of line 1",
        ),
        (
            [{"image": "a.png", "text": "x"}, {"image": "a.png", "text": "x"}],
            "line 2: image a.png is that of line 1 already",
        ),
        (
            [{"id": "p", "clip": "a.mp4", "text": "x"}, {"id": "q", "clip": "./a.mp4", "text": "y"}],
            r"line 2: clip ./a.mp4 is that of line 1, whose id is 'p', and here 'q': give it one id",
        ),
        (
            [{"image": "a.png", "clip": "a.mp4"}, {"image": "b.png", "clip": "a.mp4"}],
            "line 2: clip a.mp4 is that of line 1",
        ),
        (
            [{"image": "a.png", "clip": "a.mp4"}, {"image": "a.png", "clip": "b.mp4"}],
            "line 2: image a.png is that of line 1",
        ),
        (
            [{"image": "a.png", "clip": "a.mp4", "text": "x"}],
            "line 1 has an image, a clip and a text: choose by --system",
        ),
        (
            [{"image": "a.png"}],
            "line 1: expected an image or a clip with its text, an image with a clip, or a clip with a label",
        ),
        (
            [{"clip": "a.mp4", "text": "x"}, {"clip": "gone.mp4", "text": "y"}],
            r"1 of 2 files do not exist, the first .*gone.mp4 \(line 2\)",
        ),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, records: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(CommandError, match=told):
        read(tmp_path, *records)


def test_missing_files_are_left_to_the_reader_if_asked(tmp_path: Path) -> None:
    assert len(read(tmp_path, {"clip": "gone.mp4", "text": "y"}, missing=True)) == 1
