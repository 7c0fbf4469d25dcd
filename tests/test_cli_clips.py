"""pycm train, evaluate, index, search and match on clips: from files to reports that play, and Ctrl-C."""

from __future__ import annotations

import csv
import json
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from interrupting import interrupt

for _package in ("typer", "rich", "jinja2", "PIL.Image", "torch", "safetensors", "av", "cv2"):
    pytest.importorskip(_package)

from cli_stubs import Pixels, cache_home_fixture, error  # noqa: E402, F401
from PIL import Image  # noqa: E402

from pycm import matchers  # noqa: E402
from pycm.cli.main import run  # noqa: E402
from pycm.video import write_clip  # noqa: E402

pytestmark = pytest.mark.usefixtures("cache_home")


def call(*arguments: object) -> int:
    return run([str(argument) for argument in arguments])


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
    printed = capsys.readouterr().out
    assert printed.count("left out:") == 1
    assert "Trained on 9 clips" in printed
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
    capsys.readouterr()
    for command in (
        ("index", tmp_path / "m", "--videos", tmp_path / "clips", "--out", tmp_path / "g"),
        ("search", tmp_path / "g", "--image", tmp_path / "3.png", "--k", "2", "--out", tmp_path / "s.csv"),
        ("evaluate", tmp_path / "m", tmp_path / "pairs.jsonl", "--gallery", tmp_path / "g2"),
    ):
        assert call(*command) == 0
        assert "A gallery ranks by embeddings alone" in capsys.readouterr().out
    found = list(csv.DictReader((tmp_path / "s.csv").read_text().splitlines()))
    matcher = matchers.ImageVideoMatcher.load(tmp_path / "m")
    clips = [tmp_path / f"clips/{i}.mp4" for i in range(10)]
    want = matcher.match([tmp_path / "3.png"], clips, (2, 1)).image_to_video.indices[0]
    assert [row["match"] for row in found] == [f"{j}.mp4" for j in want]
    capsys.readouterr()
    assert call("search", tmp_path / "g", "--text", "x") == 2
    assert "the matcher is for images and clips, not for texts" in error(capsys)


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
