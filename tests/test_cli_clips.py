"""pycm train, evaluate, index, search and match on clips: from files to reports that play, and Ctrl-C."""

from __future__ import annotations

import base64
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

from pycm import matchers, reference  # noqa: E402
from pycm.cli.main import run  # noqa: E402
from pycm.video import read_clip, write_clip  # noqa: E402

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
    # pycm train kept the features
    assert "<dt>Decode</dt><dd>from the cache</dd>" in html
    assert "<dt>encode</dt><dd>from the cache</dd>" in html
    assert "decode from the cache" in " ".join(capsys.readouterr().out.split())
    assert 'class="film"' not in html  # nothing is heard
    assert call("evaluate", tmp_path / "m", pairs, "--no-cache", "--out", tmp_path / "n.html") == 0
    assert not re.search("<d[td]>from the cache", (tmp_path / "n.html").read_text())
    assert call("search", tmp_path / "g", "--text", "moves left", "--clip", tmp_path / "clips/3.mp4", "--k", "3",
                "--out", tmp_path / "s.jsonl") == 0  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [row["direction"] for row in rows] == ["text_to_video"] * 3 + ["video_to_video"] * 3
    assert rows[3]["match"] == "3.mp4"  # a clip is nearest to itself
    assert call("search", tmp_path / "g", "--text", "moves left", "--out", tmp_path / "s.html") == 0
    assert (tmp_path / "s.html").read_text().count("<video") == 5


def test_a_report_of_what_is_heard_keeps_the_sound(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    lines = ["clip,label"]
    for i in range(6):
        tone = np.sin(np.arange(8000) * (0.1 if i % 2 else 0.4)).astype(np.float32) / 2
        sound = None if i == 5 else tone
        write_clip(tmp_path / f"clips/{i}.mp4", np.full((5, 32, 32, 3), 20 * i, np.uint8), fps=10, sound=sound)
        lines.append(f"clips/{i}.mp4,{'low' if i % 2 else 'high'}")
    (tmp_path / "clips.csv").write_text("\n".join(lines))
    options = ["--head", "labels", "--streams", "sound", "--hidden", "8", "--dim", "8", "--epochs", "1"]
    given = "--out", tmp_path / "m", "--gallery", tmp_path / "g"
    assert call("train", tmp_path / "clips.csv", *options, *given) == 0
    query = "search", tmp_path / "g", "--clip", tmp_path / "clips/2.mp4"
    for command in (
        ["evaluate", tmp_path / "m", tmp_path / "clips.csv"],
        ["match", "--videos", tmp_path / "clips", "--space", tmp_path / "m", "--k", "2,6"],
        [*query, "--k", "6"],
    ):
        assert call(*command, "--out", tmp_path / "o.html") == 0
        html = (tmp_path / "o.html").read_text()
        table = json.loads(re.search(r'id="clips">(.*?)</script>', html)[1])  # type: ignore[index]
        heard = {}
        for film, key, more in re.findall(
            r'(<span class="film">)?\s*<video[^>]*? muted [^>]*data-clip="(.*?)"(.*)', html
        ):
            heard[key] = bool(film)
            assert more.endswith("</video>")
        assert sorted(heard.values()) == [False] + [True] * 5
        for key, uri in table.items():
            sound = read_clip(base64.b64decode(uri.partition(",")[2]), sound=True).sound
            assert (sound is not None and np.abs(sound).max() > 0.3) == heard[key]


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
        (["--images", tmp_path], "give two of --images, --videos and --texts"),
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
    assert "the matcher is for images and clips, not for texts" in error(capsys)


@pytest.mark.parametrize("trained", [False, True])
def test_match_takes_images_and_clips_that_nobody_paired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trained: bool
) -> None:
    monkeypatch.setattr("pycm.matchers.sides.get_encoder", lambda *_, **__: Pixels())
    monkeypatch.setattr("pycm.cli.train.check_spec", lambda *_: None)
    clips_with_texts(tmp_path, 6)
    (tmp_path / "stills").mkdir()
    (tmp_path / "pairs.csv").write_text("image,clip\n" + "".join(f"stills/{i}.png,clips/{i}.mp4\n" for i in range(4)))
    for i in range(4):
        Image.new("RGB", (8, 8), (60 * i, 9 * i, 99)).save(tmp_path / f"stills/{i}.png")
    stills, clips = (
        [tmp_path / f"{a}{i}.{b}" for i in range(n)] for a, b, n in (("stills/", "png", 4), ("clips/", "mp4", 6))
    )
    given = ["match", "--images", tmp_path / "stills", "--videos", tmp_path / "clips", "--k", "3,2"]
    if trained:
        arguments = [part for part in TRAIN if part not in ("--text-encoder", "words")]
        assert call("train", tmp_path / "pairs.csv", *arguments, "--out", tmp_path / "m") == 0
        given += ["--space", tmp_path / "m"]
        found = matchers.ImageVideoMatcher.load(tmp_path / "m").match(stills, clips, (3, 2))
        wanted = [found.image_to_video, found.video_to_image]
    else:
        encoder = Pixels()
        means = [encoder.encode(list(read_clip(clip, size=256).frames)).astype(float).mean(0) for clip in clips]
        rows = encoder.encode(stills), np.array(means, np.float32)
        wanted = [reference.topk(*rows, 3, "cosine"), reference.topk(*rows[::-1], 2, "cosine")]
    assert call(*given, "--out", tmp_path / "o.jsonl") == 0
    rows_out = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    for direction, want in zip(("image_to_video", "video_to_image"), wanted, strict=True):
        some = [row for row in rows_out if row["direction"] == direction]
        assert [row["match_index"] for row in some] == np.ravel(want.indices).tolist()
        np.testing.assert_allclose([row["score"] for row in some], np.ravel(want.scores), rtol=1e-6)
        assert "correct" not in some[0]
    assert [row["match"] for row in rows_out[:3]] == [f"{j}.mp4" for j in np.ravel(wanted[0].indices)[:3]]
    (tmp_path / "clips/bad.mp4").write_bytes(b"no clip")
    assert call(*given, "--skip-unreadable", "--out", tmp_path / "o.html") == 0
    html = (tmp_path / "o.html").read_text()
    assert html.count("<video") == 6 + 4 * 3
    assert html.count("<img") == 4 + 6 * 2
    assert "4 images of" in html
    for text in ("Images to clips", "Clips to images", "6 clips of", "Left out:"):
        assert text in html
    (tmp_path / "clips/bad.mp4").unlink()
    (tmp_path / "t.txt").write_text("x\n")
    capsys.readouterr()
    for more, told in (
        (["--texts", tmp_path / "t.txt"], "give two of --images, --videos and --texts"),
        (["--text-encoder", "minilm"], "--text-encoder: there are no texts"),
        (["--encoder", "nothing"], "not with --videos" if trained else "--encoder: unknown encoder 'nothing'"),
        (["--k", "9"], "k must be in [1, 4] for 4 images and 6 clips"),
    ):
        assert call(*given, *more) == 2
        assert told in error(capsys)


def test_the_untrained_matcher_checks_its_options(tmp_path: Path) -> None:
    for options, told in (
        ({"metric": "taxi"}, "metric must be one of"),
        ({"sampling": "some"}, 'sampling must be "uni'),
    ):
        with pytest.raises(ValueError, match=told):
            matchers.MeanFrameMatcher(Pixels(), **options)
    with pytest.raises(ValueError, match="images is empty"):
        matchers.MeanFrameMatcher(Pixels()).match([], [tmp_path])
    clip = clips_with_texts(tmp_path, 1).parent / "clips/0.mp4"
    two = [np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 200, np.uint8)]
    matcher = matchers.MeanFrameMatcher(Pixels(), metric="euclidean", cache=tmp_path / "cache")
    want = np.linalg.norm(Pixels().encode(two).mean(0) - matcher.embed_clips([clip])[0])
    assert matcher.scores([two], [clip])[0, 0] == pytest.approx(want)  # several images of one thing: their mean


def given_to_fit(
    monkeypatch: pytest.MonkeyPatch, kind: type, arguments: list[object]
) -> tuple[dict[str, object], dict[str, object]]:
    """What a matcher was made with, and what its `fit` was called with."""
    seen: list[dict[str, object]] = []

    def fit(self: object, *_: object, **options: object) -> None:
        seen.extend((self.get_params(), options))  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(kind, "fit", fit)
        assert call("train", *arguments) == 130
    return seen[0], seen[1]


def test_what_is_seldom_changed_reaches_the_matcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pycm.cli.train.check_spec", lambda *_: None)
    pairs, out = clips_with_texts(tmp_path), ["--out", tmp_path / "m"]
    (tmp_path / "labels.csv").write_text("clip,label\nclips/0.mp4,a\nclips/1.mp4,b\n")
    (tmp_path / "stills.csv").write_text("image,clip\n0.png,clips/0.mp4\n1.png,clips/1.mp4\n")
    for i in range(2):
        Image.new("RGB", (8, 8), (20 * i, 9 * i, 99)).save(tmp_path / f"{i}.png")
    both = ["--bidirectional", "--dropout", "0.3", "--input-dropout", "0.1"]
    learn = ["--precision", "bfloat16", "--warmup", "0.25", "--weight-decay", "0.5"]
    made, fitted = given_to_fit(
        monkeypatch, matchers.ImageVideoMatcher,
        [tmp_path / "stills.csv", *out, *both, *learn, "--fusion", "steps", "--candidates", "7", "--streams",
         "motion,flow", "--space", "identity", "--space-streams", "flow, motion"],
    )  # fmt: skip
    want = {"bidirectional": True, "dropout": 0.3, "input_dropout": 0.1, "fusion": "steps", "candidates": 7}
    assert want.items() <= made.items()
    assert made["space_streams"] == ("flow", "motion")
    assert made["space"].toward == "identity"  # type: ignore[attr-defined]
    assert {"precision": "bfloat16", "warmup": 0.25, "weight_decay": 0.5}.items() <= fitted.items()
    made, _ = given_to_fit(
        monkeypatch, matchers.ImageVideoMatcher,
        [tmp_path / "stills.csv", *out, "--fusion", "both", "--candidates", "all"],
    )  # fmt: skip
    assert (made["fusion"], made["candidates"], made["bidirectional"]) == (("h0", "steps"), None, False)
    made, fitted = given_to_fit(
        monkeypatch, matchers.VideoTextMatcher, [tmp_path / "labels.csv", *out, *both, "--label-smoothing", "0.1"]
    )
    assert made["head"] == "labels"
    assert fitted["label_smoothing"] == 0.1
    capsys.readouterr()
    for more, told in (
        (["--label-smoothing", "0.1"], "--label-smoothing: not for the system video-text"),
        (["--fusion", "h0"], "--fusion: not for the system video-text"),
        (["--candidates", "3"], "--candidates: nothing classifies pairs without --head pairs"),
        (["--head", "pairs", "--candidates", "few"], "--candidates must be a number or all, got 'few'"),
        (["--space-streams", "motion"], "--space-streams: no space reads them without --space"),
        (["--cell", "none", "--bidirectional"], "--bidirectional: --cell none reads in no direction"),
        (["--space", "identity"], "--space must be one of ridge, rbf for video-text, got 'identity'"),
        (["--warmup", "2"], "warmup must be in [0.0, 1.0], got 2.0"),
    ):
        assert call("train", pairs, *out, *more, "--text-encoder", "words", "--streams", "motion") == 2
        assert told in error(capsys)


def test_search_leaves_out_queries_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = clips_with_texts(tmp_path)
    assert call("train", pairs, *TRAIN, "--out", tmp_path / "m", "--gallery", tmp_path / "g") == 0
    bad = tmp_path / "cut.mp4"
    bad.write_bytes((tmp_path / "clips/1.mp4").read_bytes()[:200])
    query = ["search", tmp_path / "g", "--clip", bad]
    capsys.readouterr()
    assert call(*query) == 2
    assert "--skip-unreadable leaves them out" in error(capsys)
    assert call(*query, "--skip-unreadable") == 2  # nothing is left to ask
    line = error(capsys)
    assert "cut.mp4" in line
    assert "--skip-unreadable" not in line
    for more, asked in (
        (["--clip", tmp_path / "clips/3.mp4"], ["clips/3.mp4"]),
        (["--text", "moves left"], ["moves left"]),
    ):
        assert call(*query, *more, "--skip-unreadable", "--k", "1", "--out", tmp_path / "s.jsonl") == 0
        rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
        assert [row["query"].removeprefix(f"{tmp_path}/") for row in rows] == asked
        assert "left out:" in capsys.readouterr().out
    assert rows[0]["query"] == "moves left"
    assert call(*query, "--text", "moves left", "--skip-unreadable", "--out", tmp_path / "s.html") == 0
    assert "Left out:" in (tmp_path / "s.html").read_text()


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
