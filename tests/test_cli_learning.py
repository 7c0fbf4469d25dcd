"""pycm train with labels, regions, codes, other domains and what nobody paired: as the matchers do it from Python."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for _package in ("typer", "rich", "jinja2", "PIL.Image", "torch", "safetensors", "av", "cv2"):
    pytest.importorskip(_package)

from cli_stubs import Pixels, Words, cache_home_fixture, error  # noqa: E402, F401
from PIL import Image  # noqa: E402

from pycm import matchers  # noqa: E402
from pycm.cli.main import run  # noqa: E402
from pycm.encoders import load_image  # noqa: E402
from pycm.spaces import CORAL, ITQ, HubnessCorrection, Identity, Ridge  # noqa: E402
from pycm.video import write_clip  # noqa: E402

pytestmark = pytest.mark.usefixtures("cache_home")

COUNT = 24
HUES = {"red": (230, 20, 30), "green": (10, 240, 20), "blue": (20, 30, 220), "black": (9, 8, 7)}


class Cells(Pixels):
    """The mean colours of the four quarters of an image, too."""

    def encode_grid(self, items: Any, **_: Any) -> np.ndarray:
        pictures = [np.asarray(load_image(item), float) for item in items]
        cells = [x.reshape(2, 4, 2, 4, 3).mean((1, 3)).reshape(4, 3) / 255 for x in pictures]
        return np.array([np.hstack([cell, 1 - cell.mean(1, keepdims=True)]).ravel() for cell in cells], np.float32)


class Tokens(Words):
    """The colours that a text names, one row each, too."""

    def encode_tokens(self, items: Any, **_: Any) -> list[np.ndarray]:
        return [np.eye(4, dtype=np.float32)[[list(HUES).index(w) for w in t.split() if w in HUES]] for t in items]


def call(*arguments: object) -> int:
    return run([str(argument) for argument in arguments])


def write_images(folder: Path, seed: int, shift: int = 0) -> list[Path]:
    folder.mkdir()
    draw = np.random.default_rng(seed)
    for i in range(COUNT):
        colour = np.array(list(HUES.values())[i % 4]) + draw.integers(-9, 9, 3) + shift
        Image.fromarray(np.broadcast_to(colour.clip(0, 255).astype(np.uint8), (8, 8, 3)).copy()).save(
            folder / f"{i:02}.png"
        )
    return sorted(folder.iterdir())


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images of four colours with a text each; two encoders without torch stand in for any two."""
    files = write_images(tmp_path / "photos", 0)
    texts = [f"{list(HUES)[i % 4]} it is {'so ' * i}" for i in range(COUNT)]
    rows = [{"image": f"photos/{file.name}", "caption": text} for file, text in zip(files, texts, strict=True)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("pycm.matchers.features.get_encoders", lambda *_, **__: (Cells(), Tokens()))
    monkeypatch.setattr("pycm.cli.train.check_spec", lambda *_: None)
    return tmp_path


def pairs_of(folder: Path) -> tuple[list[Path], list[str]]:
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    return [folder / row["image"] for row in rows], [" ".join(row["caption"].split()) for row in rows]


def train(folder: Path, *more: object) -> int:
    return call("train", folder / "pairs.jsonl", "--out", folder / "m", *more)


def in_python(space: Any, **options: Any) -> matchers.ImageTextMatcher:
    return matchers.ImageTextMatcher("efficientnet-lite0", "minilm", space, **options)


def test_codes_are_searched_by_hamming_distance(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(photos, "--bits", 3, "--gallery", photos / "g") == 0
    images, texts = pairs_of(photos)
    matcher = in_python(ITQ(Ridge(), 3), metric="dot").fit(images, texts)
    codes, query = matcher.embed_images(images), matcher.embed_texts(["black it is"])[0]
    assert call("search", photos / "g", "--text", "black it is", "--k", COUNT, "--out", photos / "s.csv") == 0
    found = list(csv.DictReader((photos / "s.csv").read_text().splitlines()))
    apart = (codes != query).sum(1)  # Hamming distances
    assert len(np.unique(apart)) > 1
    want = sorted(range(COUNT), key=lambda i: (apart[i], images[i].name))
    assert [row["match"] for row in found] == [images[i].name for i in want]
    assert [float(row["score"]) for row in found] == [3 - 2 * apart[i] for i in want]
    assert call("evaluate", photos / "m", photos / "pairs.jsonl", "--out", photos / "o.html") == 0
    html = (photos / "o.html").read_text()
    assert "3 − 2 × Hamming distance" in html
    assert "Ridge, as codes of 3 bits" in html
    for more, told in (
        (["--bits", "3", "--metric", "cosine"], "--bits: codes are ranked by Hamming distance, not by --metric cosine"),
        (["--bits", "9"], "bits must be at most the space's 4 dimensions, got 9"),
    ):
        capsys.readouterr()
        assert train(photos, *more) == 2
        assert told in error(capsys)


def test_a_target_domain_moves_the_training_features(photos: Path) -> None:
    drawings = write_images(photos / "drawings", 1, shift=40)
    images, texts = pairs_of(photos)
    assert train(photos, "--target", photos / "drawings") == 0
    saved: Any = matchers.ImageTextMatcher.load(photos / "m")
    features = CORAL().fit_transform(Pixels().encode(images), Pixels().encode(drawings))
    space = Ridge().fit(features, Words().encode(texts))
    np.testing.assert_allclose(saved.embed_texts(texts), space.transform_texts(Words().encode(texts)), rtol=1e-5)
    np.testing.assert_allclose(
        saved.embed_images(images), space.transform_images(Pixels().encode(images)), rtol=1e-4, atol=1e-5
    )


def test_what_nobody_paired_is_paired_and_counted(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = write_images(photos / "more", 2)
    others = [f"{list(HUES)[i % 4]} again {'and ' * i}".strip() for i in range(COUNT)]
    (photos / "more.txt").write_text("\n".join(others))
    unlabelled = "--unlabelled", photos / "more", photos / "more.txt"
    assert train(photos, *unlabelled, "--threshold", "0.5") == 0
    images, texts = pairs_of(photos)
    matcher = in_python(Ridge()).fit(images, texts, unlabelled=(more, others), threshold=0.5)
    assert 0 < matcher.pseudo_pairs_ < COUNT
    assert f"{matcher.pseudo_pairs_} pairs were found" in capsys.readouterr().out
    saved = matchers.ImageTextMatcher.load(photos / "m")
    np.testing.assert_array_equal(saved.embed_images(images), matcher.embed_images(images))
    assert train(photos, *unlabelled) == 2
    assert "--unlabelled and --threshold go together" in error(capsys)


def test_regions_are_ranked_and_not_indexed(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = "--granularity", "region", "--score", "cross-attention", "--dim", 8, "--epochs", 3, "--validation", "none"
    assert train(photos, *given) == 0
    assert not (photos / "m/checkpoint").exists()
    images, texts = pairs_of(photos)
    matcher = matchers.RegionTextMatcher(Cells(), Tokens(), score="cross-attention", dim=8)
    matcher.fit(images, texts, epochs=3, validation=None)
    assert call("evaluate", photos / "m", photos / "pairs.jsonl", "--out", photos / "o.json") == 0
    figures = json.loads((photos / "o.json").read_text())["directions"]["text_to_image"]["figures"]
    recall = matcher.evaluate(images, texts).text_to_image.recall_at_k
    assert figures["R@5"]["value"] == pytest.approx(recall[5])
    assert call("evaluate", photos / "m", photos / "pairs.jsonl", "--out", photos / "o.html") == 0
    assert "regions and words: cross-attention" in (photos / "o.html").read_text()
    out = photos / "o.csv"
    texts_file = photos / "texts.txt"
    texts_file.write_text("red it is\nblue it is\n")
    assert call("match", "--images", photos / "photos", "--texts", texts_file, "--space", photos / "m", "--k", "2",
                "--out", out) == 0  # fmt: skip
    found = list(csv.DictReader(out.read_text().splitlines()))
    best = matcher.match(images, ["red it is", "blue it is"], 2).text_to_image.indices.ravel()
    assert [int(row["match_index"]) for row in found if row["direction"] == "text_to_image"] == best.tolist()
    for command, told in (
        (["index", photos / "m", "--images", photos / "photos", "--out", photos / "g"], "no embedding each"),
        (["train", photos / "pairs.jsonl", "--out", photos / "n", *given, "--gallery", photos / "g"], "many vectors"),
        (["train", photos / "pairs.jsonl", "--out", photos / "n", *given, "--bits", "8"], "--bits: not for the system"),
        (["train", photos / "pairs.jsonl", "--out", photos / "n", "--score", "maxsim"], "--score: not for the system"),
    ):
        capsys.readouterr()
        assert call(*command) == 2
        assert told in error(capsys)


def clips_with_labels(folder: Path, count: int = 16) -> Path:
    """Squares that move in one of two ways, told by their labels."""
    (folder / "clips").mkdir()
    with open(folder / "clips.csv", "w") as file:
        file.write("clip,label\n")
        for i in range(count):
            frames = np.full((8, 32, 32, 3), 255, np.uint8)
            for t, frame in enumerate(frames):
                at = 3 * (t if i % 2 else 7 - t)
                frame[6 + i : 16 + i, at : at + 10] = 10 * i
            write_clip(folder / f"clips/{i:02}.mp4", frames, fps=10)
            file.write(f"clips/{i:02}.mp4,{'right' if i % 2 else 'left'}\n")
    return folder / "clips.csv"


def test_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = clips_with_labels(tmp_path)
    clips = sorted((tmp_path / "clips").iterdir())
    labels = ["right" if i % 2 else "left" for i in range(16)]
    options = ["--streams", "motion", "--sampling", "uniform:8", "--hidden", "8", "--dim", "8", "--batch-size", "8",
               "--validation", "none", "--epochs", "30", "--lr", "0.01"]  # fmt: skip
    assert call("train", pairs, "--head", "labels", *options, "--out", tmp_path / "m", "--gallery", tmp_path / "g") == 0
    matcher = matchers.VideoTextMatcher(
        ("motion",), head="labels", sampling="uniform:8", hidden=8, dim=8, seed=0
    )  # fmt: skip
    matcher.fit(clips, labels, validation=None, epochs=30, lr=0.01, batch_size=8)
    probabilities = matcher.predict_proba(clips)
    (clips[3].parent / "bad.mp4").write_bytes(b"no clip")
    with pairs.open("a") as file:
        file.write("clips/bad.mp4,left\n")
    assert call("evaluate", tmp_path / "m", pairs, "--out", tmp_path / "o.json") == 2
    given = "evaluate", tmp_path / "m", pairs, "--skip-unreadable"
    assert call(*given, "--out", tmp_path / "o.json", "--ks", "1") == 0
    document = json.loads((tmp_path / "o.json").read_text())
    share = np.mean([matcher.labels_[j] == own for j, own in zip(probabilities.argmax(1), labels, strict=True)])
    assert share > 0.8  # it learned something
    assert document["directions"]["video_to_label"]["figures"]["R@1"]["value"] == pytest.approx(share)
    best = [labels[i] == label for i, label in zip(probabilities.argmax(0), matcher.labels_, strict=True)]
    assert document["directions"]["label_to_video"]["figures"]["R@1"]["value"] == pytest.approx(np.mean(best))
    assert [Path(left["name"]).name for left in document["left_out"]] == ["bad.mp4"]
    assert call(*given, "--out", tmp_path / "o.html") == 0
    html = (tmp_path / "o.html").read_text()
    for text in ("What is taken for what", "In order: left, right.", "is right for 50.0%", "Clips to labels",
                 "Labels to clips", "probabilities"):  # fmt: skip
        assert text in html
    verdicts = re.findall(r'<article class="\w+" data-verdict="(\w+)"', html)
    assert verdicts.count("right") == round(16 * share) + sum(best)
    (tmp_path / "clips/bad.mp4").unlink()
    assert call("match", "--videos", tmp_path / "clips", "--space", tmp_path / "m", "--k", "1,3", "--out",
                tmp_path / "o.jsonl") == 0  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [row["match_index"] for row in rows[:16]] == probabilities.argmax(1).tolist()
    order = np.argsort(-probabilities[:, 1], kind="stable")[:3]
    assert [row["match_index"] for row in rows[-3:]] == order.tolist()
    assert call("search", tmp_path / "g", "--clip", clips[5], "--k", "1", "--out", tmp_path / "s.jsonl") == 0
    assert json.loads((tmp_path / "s.jsonl").read_text())["match"] == "05.mp4"
    (tmp_path / "texts.txt").write_text("x\n")
    (tmp_path / "other.csv").write_text("clip,label\nclips/00.mp4,up\n")
    (tmp_path / "none.csv").write_text("clip,label\nclips/00.mp4,\n")
    for command, told in (
        (["match", "--videos", tmp_path / "clips", "--space", tmp_path / "m", "--texts", tmp_path / "texts.txt"],
         "tells labels of its own"),
        (["evaluate", tmp_path / "m", tmp_path / "other.csv"], "label 'up' is none of the matcher's: left, right"),
        (["evaluate", tmp_path / "m", tmp_path / "none.csv"], "line 2: expected a label, text or whole number, under"),
        (["train", pairs, "--loss", "triplet", "--out", tmp_path / "n"], "--loss: not for the system video-labels"),
        (["search", tmp_path / "g", "--text", "left"], "for clips and labels, not for texts"),
    ):  # fmt: skip
        if not (tmp_path / "clips/bad.mp4").exists():
            (tmp_path / "clips/bad.mp4").write_bytes(b"no clip")
        capsys.readouterr()
        assert call(*command) == 2
        assert told in error(capsys)


def test_codes_of_clips_and_the_correction_of_hubs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips_with_labels(tmp_path)
    clips = sorted((tmp_path / "clips").iterdir())
    texts = [f"it goes {'right' if i % 2 else 'left'} as number{i}" for i in range(16)]
    rows = [f"clips/{clip.name},{text}" for clip, text in zip(clips, texts, strict=True)]
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("\n".join(["clip,caption", *rows]) + "\n")
    options = ["--streams", "motion", "--text-encoder", "words", "--sampling", "uniform:8", "--hidden", "8",
               "--dim", "8", "--validation", "none", "--epochs", "3"]  # fmt: skip
    for given, space, told, scores in (
        (["--bits", "6"], ITQ(Identity(), 6), "codes of 6 bits", "1 − 2 × Hamming distance / 6"),
        (["--hubness", "4"], HubnessCorrection(Identity(), 4), "HubnessCorrection", "cosines"),
    ):
        made = tmp_path / given[1]
        assert call("train", pairs, *options, *given, "--out", made, "--gallery", made / "g") == 0
        matcher = matchers.VideoTextMatcher(
            ("motion",), "words", sampling="uniform:8", hidden=8, dim=8, embedding_space=space, progress=False
        )
        matcher.fit(clips, texts, validation=None, epochs=3)
        want = matcher.match(clips, texts[:1], k=(1, 16)).text_to_video
        assert call("search", made / "g", "--text", texts[0], "--k", 16, "--out", made / "s.csv") == 0
        found = list(csv.DictReader((made / "s.csv").read_text().splitlines()))
        assert [row["match"] for row in found] == [clips[i].name for i in want.indices[0]]
        np.testing.assert_allclose([float(row["score"]) for row in found], want.scores[0], rtol=1e-5)
        assert call("evaluate", made, pairs, "--out", made / "o.html") == 0
        html = (made / "o.html").read_text()
        assert told in html
        assert scores in html
    for given, told in (
        (["--bits", "6", "--metric", "euclidean"], "ranked by Hamming distance, not by --metric euclidean"),
        (["--bits", "6", "--hubness", "3"], "--bits and --hubness do not go together"),
        (["--hubness", "3", "--head", "pairs"], "--hubness: it is of embeddings that rank, by --head ranking"),
        (["--bits", "9"], "bits must be at most the space's 8 dimensions, got 9"),
    ):
        capsys.readouterr()
        assert call("train", pairs, *options, *given, "--out", tmp_path / "n") == 2
        assert told in error(capsys)


def test_the_correction_of_hubs_of_images_is_that_of_python(photos: Path) -> None:
    assert train(photos, "--hubness", 5) == 0
    images, texts = pairs_of(photos)
    matcher = in_python(HubnessCorrection(Ridge(), 5)).fit(images, texts)
    saved = matchers.ImageTextMatcher.load(photos / "m")
    np.testing.assert_array_equal(saved.embed_images(images), matcher.embed_images(images))
    assert call("evaluate", photos / "m", photos / "pairs.jsonl", "--out", photos / "o.html") == 0
    assert "Ridge, HubnessCorrection" in (photos / "o.html").read_text()


def test_figures_of_equal_scores_follow_one_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = clips_with_labels(tmp_path, 6)
    for i in range(1, 6):
        (tmp_path / f"clips/{i:02}.mp4").write_bytes((tmp_path / "clips/00.mp4").read_bytes())  # all are the same
    options = ["--head", "labels", "--streams", "motion", "--hidden", "4", "--dim", "4", "--epochs", "0"]
    assert call("train", pairs, *options, "--out", tmp_path / "m") == 0
    assert call("evaluate", tmp_path / "m", pairs, "--ks", "1", "--out", tmp_path / "o.html") == 0
    html = " ".join((tmp_path / "o.html").read_text().split())
    stats = re.findall(r"<dt>(\w+) whose best \w+ is right</dt><dd>(.*?)</dd>", html)
    assert stats == [("clips", "3 of 6"), ("labels", "1 of 2")]
    values = re.findall(r'<span class="value">(.*?)</span>', html)[:2]  # R@1, both ways
    assert values == ["50.0", "50.0"]
    first = re.findall(r"</i>([\d.]+)<span", re.search(r"<dt>1</dt><dd>(.*?)</dd>", html)[1])  # type: ignore[index]
    assert first == ["3", "1"]
    assert "means over all their orders" in html


def test_a_device_is_that_of_the_encoders(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []

    def made(*_: Any, device: Any = None) -> Any:
        seen.append(device)
        return Cells(), Tokens()

    monkeypatch.setattr("pycm.matchers.features.get_encoders", made)
    given = "--device", "cpu"
    pairs, matcher = photos / "pairs.jsonl", photos / "m"
    for command in (
        ["train", pairs, "--out", matcher, "--gallery", photos / "g"],
        ["evaluate", matcher, pairs],
        ["index", matcher, "--images", photos / "photos", "--out", photos / "g"],
        ["search", photos / "g", "--text", "red"],
        ["match", "--images", photos / "photos", "--texts", pairs, "--space", matcher],
    ):
        seen.clear()
        assert call(*command, *given) == 0
        assert [str(device) for device in seen] == ["cpu"]
        capsys.readouterr()
        assert call(*command, "--device", "abacus") == 2
        assert "--device must be cpu, cuda or cuda:N, got 'abacus'" in error(capsys)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert call("search", photos / "g", "--text", "red", "--device", "cuda:1") == 2
    assert "--device cuda:1: torch finds no CUDA device" in error(capsys)


def test_a_model_with_two_sides_encodes_both(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def made(*specs: Any, device: Any = None) -> Any:
        seen.append(specs)
        return Cells(), Tokens()

    monkeypatch.setattr("pycm.matchers.features.get_encoders", made)
    assert train(photos, "--encoder", "clip:one") == 0
    assert train(photos, "--encoder", "clip:one", "--text-encoder", "minilm") == 0
    assert seen == [("clip:one", "clip:one"), ("clip:one", "minilm")]


def test_encoders_to_be_trained_are_named(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = "--granularity", "region", "--epochs", 1
    assert train(photos, *given, "--fine-tune", "image") == 2
    assert re.search(r"fine_tune.*image.*Cells", error(capsys))
    assert train(photos, *given, "--encoder-lr", 1e-4) == 2
    assert "--fine-tune" in error(capsys)
    asked: list[dict[str, Any]] = []
    fit = matchers.RegionTextMatcher.fit

    def watch(self: Any, *arguments: Any, fine_tune: Any, encoder_lr: Any, **options: Any) -> Any:
        asked.append({"fine_tune": fine_tune, "encoder_lr": encoder_lr})
        return fit(self, *arguments, **options)

    monkeypatch.setattr(matchers.RegionTextMatcher, "fit", watch)
    for names in ("image, text", "all"):
        assert train(photos, *given, "--fine-tune", names, "--encoder-lr", 1e-4) == 0
    assert asked == [{"fine_tune": names, "encoder_lr": 1e-4} for names in (["image", "text"], "all")]
