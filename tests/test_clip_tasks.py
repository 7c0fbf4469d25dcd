"""Tasks that only time, or only sound, can decide: small versions of those in benchmarks/clips.py."""

from __future__ import annotations

import os
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("av")
pytest.importorskip("cv2")
pytest.importorskip("sklearn")

from pycm.audio import read_sound
from pycm.bench.clip_tasks import OPPOSITES, Thumbnail, backwards, moving_digits, spoken_clips
from pycm.matchers import VideoTextMatcher
from pycm.streams import Appearance, ClipFeatures, Motion, Speech, encode_clips
from pycm.video import read_clip


def data(folder: str) -> Path:
    place = Path(os.environ.get("PYCM_DATA", "")) / folder
    if "PYCM_DATA" not in os.environ or not place.is_dir():
        pytest.skip(f"PYCM_DATA names no folder with {folder}")
    return place


def fitted(features: ClipFeatures, captions: list[str], **options: Any) -> VideoTextMatcher:
    matcher = VideoTextMatcher(
        tuple(features.streams), "words", hidden=48, dim=48, dropout=0.1, loss="info_nce", progress=False, **options
    )
    return matcher.fit(features, captions, validation=None, epochs=8, lr=4e-3, batch_size=24)


def right_way(
    matcher: VideoTextMatcher, features: ClipFeatures, captions: list[str], opposite: dict[str, str]
) -> float:
    """How often a clip's own caption is above that of the reversed clip; a tie is half of it."""
    texts = sorted(set(captions))
    scores = matcher.scores(features, texts)
    rows = np.arange(len(captions))
    own = scores[rows, [texts.index(caption) for caption in captions]]
    other = scores[rows, [texts.index(opposite[caption]) for caption in captions]]
    return float(np.mean((own > other) + 0.5 * np.isclose(own, other, atol=1e-5, rtol=0)))


def test_which_way_digits_move() -> None:
    stream = Appearance(Thumbnail(12))
    sets = []
    for seed, count in ((0, 120), (1, 30)):
        clips, captions = moving_digits(count, seed, steps=8)
        sets.append((encode_clips([stream], clips), captions))
    learn, test = sets
    opposite = {f"a digit {one}": f"a digit {other}" for one, other in OPPOSITES.items()}
    blind = fitted(*learn, cell=None, pool="mean")
    assert right_way(blind, *test, opposite) == pytest.approx(0.5, abs=0.02)
    recurrent = fitted(*learn, cell="gru", pool="last")
    assert right_way(recurrent, *test, opposite) >= 0.9


def test_whether_clips_run_backwards() -> None:
    files = sorted((data("emoji_clips") / "clips").glob("*.mp4"))[::4]
    sets = []
    for sampling in ("uniform:16", "segments:16"):  # other frames of the same clips
        clips = [read_clip(file, sampling) for file in files]
        pairs = [one for clip in clips for one in (clip, backwards(clip))]
        sets.append((encode_clips([Appearance(Thumbnail())], pairs), ["forwards", "backwards"] * len(files)))
    learn, test = sets
    right = []
    for cell, pool in ((None, "mean"), ("gru", "last")):
        matcher = VideoTextMatcher(
            ("appearance",), head="labels", cell=cell, pool=pool, hidden=64, dim=64, dropout=0.1, progress=False
        )
        matcher.fit(*learn, validation=None, epochs=60, lr=3e-3, batch_size=48)
        right.append(matcher.score(*test))
    assert right[0] == pytest.approx(0.5, abs=0.02)
    assert right[1] >= 0.9


def test_calls_are_parted_by_pauses(tmp_path: Path) -> None:
    for n in range(3):
        with wave.open(str(tmp_path / f"7_ann_{n}.wav"), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes((8000 * np.sin(0.2 * (n + 1) * np.arange(4800))).astype(np.int16).tobytes())
    files, captions, speakers = spoken_clips(sorted(tmp_path.glob("*.wav")), tmp_path, calls=2, pause=0.25)
    assert (len(files), set(captions), set(speakers)) == (3, {"the digit seven"}, {"ann"})
    for file in files:
        sound = read_sound(file)
        assert sound is not None
        assert abs(len(sound) - 13600) <= 2048  # whole frames of the codec
        loud = [np.abs(sound[begin : begin + 3000]).max() > 0.1 for begin in (1000, 5300, 9400)]
        assert loud == [True, False, True]


def test_which_digit_is_said_behind_a_card(tmp_path: Path) -> None:
    recordings = sorted(data("spoken_digits").glob("*.wav"))
    held_out = "theo"
    features, captions = [], []
    for own, speeds, limit in ((False, (1.0, 1.1), 2), (True, (1.0,), 3)):
        chosen = [path for path in recordings if (path.stem.split("_")[1] == held_out) == own]
        folder = tmp_path / str(own)
        folder.mkdir()
        files, names, speakers = spoken_clips(chosen, folder, speeds=speeds, limit=limit)
        assert (held_out in speakers) == own
        features.append(encode_clips([Speech(hop=0.02), Motion()], files))
        captions.append(names)
    right = {}
    for stream in ("speech", "motion"):
        learn, test = (part.select([stream]) for part in features)
        matcher = VideoTextMatcher((stream,), head="labels", hidden=48, dim=48, bidirectional=True, progress=False)
        matcher.fit(learn, captions[0], validation=None, epochs=20, lr=4e-3, batch_size=32)
        right[stream] = matcher.score(test, captions[1])
    assert right["speech"] >= 0.9
    assert right["motion"] <= 0.3  # a card is seen, and a tenth is chance
