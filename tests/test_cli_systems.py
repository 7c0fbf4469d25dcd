"""pycm train, evaluate, index and search: figures and matches are those of an oracle, files whole or not there."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interrupting import interrupt

for _package in ("typer", "rich", "jinja2", "PIL.Image", "torch", "safetensors", "av", "cv2"):
    pytest.importorskip(_package)

from cli_stubs import Pixels, Words, cache_home_fixture, error  # noqa: E402, F401
from PIL import Image  # noqa: E402

from pycm import matchers, reference  # noqa: E402
from pycm.cli.main import run  # noqa: E402
from pycm.video import write_clip  # noqa: E402

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
    monkeypatch.setattr("pycm.matchers.features.get_encoders", lambda *_: (Pixels(), Words()))
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
        (["train", "pairs.jsonl", "--out", "m", "--checkpoint", "c"], "--checkpoint: not for the system image-text"),
        (["train", "pairs.jsonl", "--out", "m", "--space", "pca"], "--space must be one of ridge, rbf, cca, got 'pca'"),
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
        (["--clip", photos / "photos/1.png"], "matches images with texts; a clip is no query"),
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


# ---- clips ----


def clips_with_texts(folder: Path, count: int = 10) -> Path:
    """Squares that move in one of two ways, told by their texts."""
    (folder / "clips").mkdir(exist_ok=True)
    with open(folder / "clips.jsonl", "w") as file:
        for i in range(count):
            frames = np.full((10, 32, 32, 3), 255, np.uint8)
            for t, frame in enumerate(frames):
                at = 2 * (t if i % 2 else 9 - t)
                frame[8 + i % 5 : 18 + i % 5, at : at + 10] = 20 * i
            write_clip(folder / f"clips/{i}.mp4", frames, fps=10)
            row = {"clip": f"clips/{i}.mp4", "caption": f"no {i} moves {'right' if i % 2 else 'left'}"}
            file.write(json.dumps(row) + "\n")
    return folder / "clips.jsonl"


TRAIN = ["--streams", "pixel-differences,motion", "--text-encoder", "words", "--sampling", "uniform:6", "--hidden", "8",
         "--dim", "8", "--epochs", "2", "--batch-size", "4"]  # fmt: skip


def test_clips_from_files_to_a_report_that_plays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = clips_with_texts(tmp_path)
    assert (
        call(
            "train", pairs, *TRAIN, "--out", tmp_path / "m", "--gallery", tmp_path / "g", "--log", tmp_path / "log.csv"
        )
        == 0
    )
    assert "video-text: the pairs it was trained on" in " ".join(capsys.readouterr().out.split())
    assert len((tmp_path / "log.csv").read_text().splitlines()) >= 3
    assert not (tmp_path / "m/checkpoint").exists()
    assert call("evaluate", tmp_path / "m", pairs, "--out", tmp_path / "o.html") == 0
    html = (tmp_path / "o.html").read_text()
    table = json.loads(re.search(r'id="clips">(.*?)</script>', html)[1])  # type: ignore[index]
    assert len(table) == 10
    assert all(uri.startswith("data:video/mp4;base64,") for uri in table.values())
    assert html.count("<video") >= 10 + 5 * 10
    for text in ("What each stream contributes", "pixel-differences", "Clips to texts", "decode"):
        assert text in html
    assert call("search", tmp_path / "g", "--text", "moves left", "--clip", tmp_path / "clips/3.mp4", "--k", "3",
                "--out", tmp_path / "s.jsonl") == 0  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [row["direction"] for row in rows] == ["text_to_video"] * 3 + ["video_to_video"] * 3
    assert rows[3]["match"] == "3.mp4"  # a clip is nearest to itself
    assert call("search", tmp_path / "g", "--text", "moves left", "--out", tmp_path / "s.html") == 0
    assert (tmp_path / "s.html").read_text().count("<video") == 5


def test_unreadable_clips_are_named_then_left_out_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = clips_with_texts(tmp_path)
    (tmp_path / "clips/4.mp4").write_bytes(b"no clip")
    assert call("train", pairs, *TRAIN, "--out", tmp_path / "m") == 2
    line = error(capsys)
    assert "4.mp4" in line
    assert "--skip-unreadable" in line
    assert call("train", pairs, *TRAIN, "--out", tmp_path / "m", "--skip-unreadable") == 0
    assert capsys.readouterr().out.count("left out:") == 1
    assert call("evaluate", tmp_path / "m", pairs, "--skip-unreadable", "--out", tmp_path / "o.json") == 0
    document = json.loads((tmp_path / "o.json").read_text())
    assert document["directions"]["text_to_video"]["gallery"] == 9
    assert [Path(left["name"]).name for left in document["left_out"]] == ["4.mp4"]


def test_what_cannot_be_evaluated_is_trained_and_indexed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pycm.cli.pairs import is_test

    pairs = clips_with_texts(tmp_path)
    left_out = [i for i in range(10) if is_test(f"clips/{i}.mp4")]
    assert left_out
    (tmp_path / f"clips/{left_out[0]}.mp4").write_bytes(b"no clip")
    assert call("train", pairs, *TRAIN, "--split", "train", "--out", tmp_path / "m", "--gallery", tmp_path / "g") == 2
    captured = capsys.readouterr()
    assert f"{left_out[0]}.mp4" in captured.err
    assert f"{tmp_path / 'm'}" in captured.out
    assert call("search", tmp_path / "g", "--text", "moves left") == 0


def test_match_takes_clips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = clips_with_texts(tmp_path)
    assert call("train", pairs, *TRAIN, "--out", tmp_path / "m") == 0
    given = "match", "--videos", tmp_path / "clips", "--texts", pairs
    assert call(*given, "--space", tmp_path / "m", "--k", "3", "--out", tmp_path / "o.jsonl") == 0
    texts = [json.loads(line)["caption"] for line in pairs.read_text().splitlines()]
    found = matchers.VideoTextMatcher.load(tmp_path / "m").match(
        [tmp_path / f"clips/{i}.mp4" for i in range(10)], texts, 3
    )
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    for direction, matches in (("video_to_text", found.video_to_text), ("text_to_video", found.text_to_video)):
        some = [row for row in rows if row["direction"] == direction]
        assert [row["match_index"] for row in some] == matches.indices.ravel().tolist()
        assert [row["correct"] for row in some] == [row["match_index"] == row["query_index"] for row in some]
    assert rows[0]["query"] == "0.mp4"
    assert "clips whose best text is right" in capsys.readouterr().out
    for more, told in (
        ([], "--videos needs --space with a matcher that pycm train made"),
        (["--space", tmp_path / "m", "--encoder", "efficientnet-lite0"], "not with --videos"),
        (["--space", tmp_path / "clips"], "no saved matcher there"),
        (["--images", tmp_path], "give one of --images and --videos"),
    ):
        assert call(*given, *more) == 2
        assert told in error(capsys)


def test_images_and_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("pycm.matchers.sides.get_encoder", lambda *_, **__: Pixels())
    monkeypatch.setattr("pycm.cli.train.check_spec", lambda *_: None)
    clips_with_texts(tmp_path)
    with open(tmp_path / "pairs.jsonl", "w") as file:
        for i in range(10):
            Image.new("RGB", (8, 8), (20 * i, 9 * i, 99)).save(tmp_path / f"{i}.png")
            file.write(json.dumps({"id": i, "still": f"{i}.png", "clip": f"clips/{i}.mp4", "caption": "x"}) + "\n")
    arguments = [part for part in TRAIN if part not in ("--text-encoder", "words")]
    assert call("train", tmp_path / "pairs.jsonl", "--system", "image-video", *arguments, "--out", tmp_path / "m") == 0
    assert call("evaluate", tmp_path / "m", tmp_path / "pairs.jsonl", "--out", tmp_path / "o.html") == 0
    html = (tmp_path / "o.html").read_text()
    assert html.count('<article class="row"') == 20
    for text in ("Images to clips", "Clips to images", "Where time went"):
        assert text in html
    assert call("index", tmp_path / "m", "--videos", tmp_path / "clips", "--out", tmp_path / "g") == 0
    assert call("search", tmp_path / "g", "--image", tmp_path / "3.png", "--k", "2", "--out", tmp_path / "s.csv") == 0
    found = list(csv.DictReader((tmp_path / "s.csv").read_text().splitlines()))
    matcher = matchers.ImageVideoMatcher.load(tmp_path / "m")
    clips = [tmp_path / f"clips/{i}.mp4" for i in range(10)]
    want = matcher.match([tmp_path / "3.png"], clips, (2, 1)).image_to_video.indices[0]
    assert [row["match"] for row in found] == [f"{j}.mp4" for j in want]
    capsys.readouterr()
    assert call("search", tmp_path / "g", "--text", "x") == 2
    assert "matches images with clips; a text is no query" in error(capsys)


INTERRUPTED = """
import sys
from pycm.matchers import training
from pycm.cli.main import main

after = training._Loop._one_step
def step(self, rows):
    if self.epoch == 1 and self.step == 1:
        print("training", flush=True)
        import time
        time.sleep(2)
    return after(self, rows)

training._Loop._one_step = step
main()
"""


@pytest.mark.parametrize(("validation", "state"), [("0.1", "training.pt"), ("2", "fold-0/training.pt")])
def test_ctrl_c_in_training_and_the_same_command_again(tmp_path: Path, validation: str, state: str) -> None:
    pairs = clips_with_texts(tmp_path)
    arguments = ["train", pairs, *TRAIN, "--epochs", "4", "--batch-size", "2", "--validation", validation,
                 "--out", tmp_path / "m", "--cache", tmp_path / "cache"]  # fmt: skip
    command = [sys.executable, "-c", textwrap.dedent(INTERRUPTED), *map(str, arguments)]
    ended = interrupt(command, ready="training", after=0.3)
    assert ended.returncode == 130
    assert ended.err.splitlines()[-1] == (
        f"error: interrupted: the same command goes on from {tmp_path / 'm/checkpoint'}"
    )
    assert "Traceback" not in ended.err
    assert [path for path in (tmp_path / "m").rglob("*") if path.is_file()] == [tmp_path / "m/checkpoint" / state]
    assert call(*arguments) == 0
    arguments[arguments.index(tmp_path / "m")] = tmp_path / "whole"
    assert call(*arguments) == 0
    texts = ["no 1 moves right", "no 2 moves left"]
    one, other = (matchers.VideoTextMatcher.load(tmp_path / name) for name in ("m", "whole"))
    np.testing.assert_array_equal(one.embed_texts(texts), other.embed_texts(texts))
