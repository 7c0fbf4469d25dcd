"""pycm train, evaluate, index and search: figures and matches are those of an oracle, files whole or not there."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for _package in ("typer", "rich", "jinja2", "PIL.Image", "torch", "safetensors", "av", "cv2"):
    pytest.importorskip(_package)

from cli_stubs import Pixels, Words, cache_home_fixture, error  # noqa: E402, F401
from PIL import Image  # noqa: E402

from pycm import matchers, reference  # noqa: E402
from pycm.cli.main import run  # noqa: E402

pytestmark = pytest.mark.usefixtures("cache_home")

COUNT = 32
HUES = {"red": (230, 20, 30), "green": (10, 240, 20), "blue": (20, 30, 220), "black": (9, 8, 7)}


def call(*arguments: object) -> int:
    return run([str(argument) for argument in arguments])


# ---- images and texts ----


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images of four colours with a text each; two encoders without torch stand in for any two."""
    (tmp_path / "photos").mkdir()
    draw = np.random.default_rng(0)
    with open(tmp_path / "pairs.jsonl", "w") as file:
        for i in range(COUNT):
            name = list(HUES)[i % 4]
            colour = tuple(int(c) for c in np.clip(np.array(HUES[name]) + draw.integers(-9, 9, 3), 0, 255))
            Image.new("RGB", (8, 8), colour).save(tmp_path / f"photos/{i}.png")
            row = {"id": f"no {i}", "image": f"photos/{i}.png", "captions": {"en": f"{'very ' * (i // 4)}{name} it is"}}
            file.write(json.dumps(row) + "\n")
    monkeypatch.setattr("pycm.matchers.features.get_encoders", lambda *_, **__: (Pixels(), Words()))
    monkeypatch.setattr("pycm.cli.train.check_spec", lambda *_: None)
    return tmp_path


def records(folder: Path) -> tuple[list[Path], list[str]]:
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    return [folder / row["image"] for row in rows], [row["captions"]["en"] for row in rows]


def train_photos(folder: Path, *more: object) -> int:
    return call("train", folder / "pairs.jsonl", "--captions-field", "en", "--out", folder / "matcher", *more)


def test_figures_are_those_of_the_reference(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_photos(photos) == 0
    assert call("evaluate", photos / "matcher", photos / "pairs.jsonl", "--captions-field", "en", "--ks", "1,3",
                "--out", photos / "figures.json") == 0  # fmt: skip
    printed = capsys.readouterr().out
    images, texts = records(photos)
    matcher = matchers.ImageTextMatcher.load(photos / "matcher")
    rows, others = matcher.embed_images(images), matcher.embed_texts(texts)
    document = json.loads((photos / "figures.json").read_text())
    assert document["system"] == "image-text"
    for direction, a, b in (("image_to_text", rows, others), ("text_to_image", others, rows)):
        own = np.diag(scores := np.asarray(reference.similarity(a, b, "cosine")))
        rank = (scores > own[:, None]).sum(1)
        assert ((scores == own[:, None]).sum(1) == 1).all()  # no ties in this test
        figures = document["directions"][direction]["figures"]
        for k in (1, 3):
            assert figures[f"R@{k}"]["value"] == pytest.approx((rank < k).mean())
            assert figures[f"R@{k}"]["low"] <= figures[f"R@{k}"]["value"] <= figures[f"R@{k}"]["high"]
            assert f"{100 * (rank < k).mean():.1f}" in printed
        assert figures["median rank"]["value"] == pytest.approx(np.median(rank) + 1)
        assert document["directions"][direction]["queries"] == COUNT
    assert 0.2 < document["directions"]["text_to_image"]["figures"]["R@3"]["value"] < 1  # neither chance nor trivial


def test_the_report_has_every_part(photos: Path) -> None:
    assert train_photos(photos) == 0
    assert call("evaluate", photos / "matcher", photos / "pairs.jsonl", "--captions-field", "en",
                "--out", photos / "o.html") == 0  # fmt: skip
    html = (photos / "o.html").read_text()
    assert html.count("<article") == 2 * COUNT
    for text in ("How often it is found", "Rank of the true one", "Every pair", "The common space", "Where time went",
                 "Images to texts", "Texts to images", "very very red it is"):  # fmt: skip
        assert text in html
    verdicts = re.findall(r'<article class="card" data-verdict="(\w+)"', html)
    assert html.count("✓ right") == verdicts.count("right") > 0
    assert html.count("✗ wrong") == verdicts.count("wrong") > 0
    images, texts = records(photos)
    matcher = matchers.ImageTextMatcher.load(photos / "matcher")
    scores = np.asarray(matcher.scores(images, texts))
    assert verdicts == ["right" if row.argmax() == i else "wrong" for i, row in enumerate(scores)]
    places = [int((scores[i] > scores[i, i]).sum()) + 1 for i in range(COUNT)]
    late = [place for place in places if place > 5]
    assert late
    # the true one is shown with its rank where it is not among the five best
    assert re.findall(r'class="place">(\d+)\w\w</span>', html.split('id="group-2"')[0]) == [
        str(place) for place in late
    ]


def test_figures_of_some_items_say_so(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pycm.cli.evaluate._FIGURES", 20)
    assert train_photos(photos) == 0
    assert call("evaluate", photos / "matcher", photos / "pairs.jsonl", "--captions-field", "en",
                "--out", photos / "o.html") == 0  # fmt: skip
    html = (photos / "o.html").read_text()
    for title in ("Every pair", "The common space"):
        assert f"{title}: the first 20 of {COUNT} images" in html


def test_what_is_held_out_is_not_trained_on(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_photos(photos, "--split", "train") == 0
    out = " ".join(capsys.readouterr().out.split())
    images, texts = records(photos)
    from pycm.cli.pairs import is_test

    chosen = [i for i in range(COUNT) if not is_test(f"no {i}")]
    assert f"{COUNT - len(chosen)} images held out" in out
    assert f"Trained on {len(chosen)} images" in out
    again = matchers.ImageTextMatcher(
        "efficientnet-lite0", "minilm", matchers.ImageTextMatcher.load(photos / "matcher").space
    )
    again.space = type(again.space)()
    again.fit([images[i] for i in chosen], [texts[i] for i in chosen])
    saved = matchers.ImageTextMatcher.load(photos / "matcher")
    np.testing.assert_array_equal(again.embed_texts(texts), saved.embed_texts(texts))


def test_search_finds_what_a_scan_finds(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_photos(photos, "--gallery", photos / "first") == 0
    assert call("index", photos / "matcher", "--images", photos / "photos", "--out", photos / "gallery") == 0
    assert call("index", photos / "matcher", "--texts", photos / "pairs.jsonl", "--out", photos / "texts") == 0
    images, texts = records(photos)
    matcher: Any = matchers.ImageTextMatcher.load(photos / "matcher")
    asked = {"text": ["green it is", "very black it is"], "image": [images[7]]}
    options = [part for kind, queries in asked.items() for query in queries for part in (f"--{kind}", query)]
    embedded = {"text": matcher.embed_texts(asked["text"]), "image": matcher.embed_images(asked["image"])}
    for gallery, rows, names in (
        ("first", matcher.embed_images(images), [f"{i}.png" for i in range(COUNT)]),
        ("gallery", matcher.embed_images(images), [f"{i}.png" for i in range(COUNT)]),
        ("texts", matcher.embed_texts(texts), texts),
    ):
        out = photos / f"{gallery}.csv"
        assert call("search", photos / gallery, *options, "--k", "4", "--out", out) == 0
        found = list(csv.DictReader(out.read_text().splitlines()))
        position = 0
        for kind in ("text", "image"):
            want = reference.topk(embedded[kind], rows, 4, "cosine")
            for query, scores, indices in zip(asked[kind], want.scores, want.indices, strict=True):
                some = found[position : position + 4]
                position += 4
                assert {row["query"] for row in some} == {str(query)}
                assert [row["match"] for row in some] == [names[j] for j in indices]
                np.testing.assert_array_equal(np.array([row["score"] for row in some], np.float32), np.float32(scores))
        assert position == len(found)
    assert call("search", photos / "gallery", *options, "--out", photos / "s.html") == 0
    html = (photos / "s.html").read_text()
    assert html.count("<article") == 3
    assert html.count("<img") == 3 * 5 + 1
    assert "✗" not in html
    assert f"{COUNT} images" in capsys.readouterr().out


def test_only_what_was_left_out_is_called_held_out(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(split: str) -> tuple[str, bool]:
        capsys.readouterr()
        for name in ("o.html", "o.json"):
            assert call("evaluate", photos / "matcher", photos / "pairs.jsonl", "--captions-field", "en",
                        "--split", split, "--out", photos / name) == 0  # fmt: skip
        html, seen = (photos / "o.html").read_text(), json.loads((photos / "o.json").read_text())["trained_on_these"]
        assert ("was trained on items" in html) == seen == ("was trained on items" in capsys.readouterr().out)
        return re.search(r"\d+ ([\w-]+ )?images of", html)[1] or "", seen  # type: ignore[index]

    assert train_photos(photos, "--split", "train") == 0
    assert [told(split) for split in ("test", "train", "all")] == [
        ("held-out ", False),
        ("training ", True),
        ("", True),
    ]
    assert train_photos(photos) == 0
    assert told("test") == ("test ", True)
    saved = matchers.ImageTextMatcher.load(photos / "matcher")
    saved.space = type(saved.space)()
    saved.fit(*records(photos)).save(photos / "matcher")  # by whom, and on what, train.json does not tell
    assert told("test") == ("test ", False)


def test_nothing_is_held_out_of_few_items(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pycm.cli.pairs import is_test

    rows = [json.loads(line) for line in (photos / "pairs.jsonl").read_text().splitlines()]
    kept = [row for row in rows if not is_test(row["id"])]
    (photos / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    assert train_photos(photos, "--split", "train", "--gallery", photos / "gallery") == 0
    assert "the split leaves nothing out to tell the recall of" in " ".join(capsys.readouterr().out.split())
    assert call("search", photos / "gallery", "--text", "red") == 0


def test_a_gallery_of_fewer_items_than_the_usual_matches(photos: Path) -> None:
    assert train_photos(photos) == 0
    (photos / "few.txt").write_text("red\ngreen\nblue\n")
    assert call("index", photos / "matcher", "--texts", photos / "few.txt", "--out", photos / "few") == 0
    assert call("search", photos / "few", "--text", "red", "--out", photos / "s.csv") == 0
    assert len((photos / "s.csv").read_text().splitlines()) == 1 + 3


def test_a_gallery_of_another_matcher_is_refused_and_a_moved_one_found(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_photos(photos, "--gallery", photos / "gallery") == 0
    shutil.move(photos / "matcher", photos / "elsewhere")
    query = "search", photos / "gallery", "--text", "red"
    capsys.readouterr()
    assert call(*query) == 2
    assert "no saved matcher there" in error(capsys)
    assert call(*query, "--matcher", photos / "elsewhere") == 0
    assert train_photos(photos, "--space", "cca") == 0
    capsys.readouterr()
    assert call(*query) == 2
    assert "made with another matcher" in error(capsys)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train", "nowhere.jsonl", "--out", "m"], "nowhere.jsonl: no such file"),
        (["train", "photos", "--out", "m"], "photos: a folder, expected a .jsonl or .csv file of pairs"),
        (["train", "pairs.jsonl", "--out", "pairs.jsonl/m"], "pairs.jsonl is not a folder"),
        (["train", "pairs.jsonl", "--out", "m", "--epochs", "3"], "--epochs: not for the system image-text; its space"),
        (
            ["train", "pairs.jsonl", "--out", "m", "--validation", "x"],
            "--validation must be a share as 0.1, folds as 5, or",
        ),
        (
            ["train", "pairs.jsonl", "--out", "m", "--granularity", "region", "--validation", "5"],
            "--validation 5: regions take a share or none, not folds",
        ),
        (["train", "pairs.jsonl", "--out", "m", "--checkpoint", "c"], "--checkpoint: not for the system image-text"),
        (
            ["train", "pairs.jsonl", "--out", "m", "--space", "pca"],
            "--space must be one of ridge, rbf, cca for image-text, got 'pca'",
        ),
        (["train", "pairs.jsonl", "--out", "m", "--captions-field", "xx"], "line 1: expected a text under xx"),
        (["train", "pairs.jsonl", "--out", "m", "--cache", "c", "--no-cache"], "exclude each other"),
        (["evaluate", "m", "pairs.jsonl"], "MATCHER m: no saved matcher there"),
        (["evaluate", "m", "pairs.jsonl", "--ks", "1,x"], "--ks must be positive numbers as 1,5,10, got '1,x'"),
        (["evaluate", "m", "pairs.jsonl", "--out", "o.pdf"], "o.pdf: must end in .html or .json"),
        (["index", "m", "--out", "g"], "give one of --images, --videos and --texts"),
        (["index", "m", "--images", "photos", "--texts", "pairs.jsonl", "--out", "g"], "give one of"),
        (["index", "m", "--images", "photos", "--out", "g"], "no saved matcher there"),
        (["search", "g", "--text", "x"], "g: no gallery there (index.json is missing); pycm index makes one"),
        (["search", "g"], "give a query: --text, --image or --clip"),
        (["search", "g", "--text", " "], "--text: must not be empty"),
        (["search", "g", "--image", "gone.png"], "gone.png: no such file"),
    ],
)
def test_arguments(
    photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], told: str
) -> None:
    monkeypatch.chdir(photos)
    before = sorted(photos.rglob("*"))
    assert call(*arguments) == 2
    assert told in error(capsys)
    assert sorted(photos.rglob("*")) == before


def test_search_refuses_what_the_gallery_cannot_answer(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_photos(photos, "--gallery", photos / "gallery") == 0
    for options, told in (
        (["--text", "x", "--k", "33"], "--k must be in [1, 32] for this gallery, got 33"),
        (["--clip", photos / "photos/1.png"], "the matcher is for images and texts, not for clips"),
    ):
        capsys.readouterr()
        assert call("search", photos / "gallery", *options) == 2
        assert told in error(capsys)
    (photos / "gallery/items.safetensors").write_bytes(b"x" * 100)
    assert call("search", photos / "gallery", "--text", "x") == 2
    assert "items.safetensors" in error(capsys)


def test_the_disk_is_full(photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert train_photos(photos) == 0
    before = sorted(photos.rglob("*"))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    pairs = photos / "pairs.jsonl", "--captions-field", "en"
    for command in (
        ["train", *pairs, "--out", photos / "matcher"],
        ["evaluate", photos / "matcher", *pairs, "--out", photos / "o.html"],
        ["evaluate", photos / "matcher", *pairs, "--out", photos / "o.json"],
        ["index", photos / "matcher", "--images", photos / "photos", "--out", photos / "gallery"],
    ):
        capsys.readouterr()
        assert call(*command) == 2
        assert "No space left on device" in error(capsys)
    (photos / "gallery").rmdir()  # made, and empty
    assert sorted(photos.rglob("*")) == before  # the older matcher is whole
    assert matchers.ImageTextMatcher.load(photos / "matcher")
