"""Encoding clips: one decoding for all streams, the cache, and what may go wrong on the way."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("av")
pytest.importorskip("cv2")

from matcher_stubs import PixelEncoder
from video_cases import levels, moving

import pycm.streams.encode as encode_module
from pycm.encoders import FeatureCache, UnreadableInputError
from pycm.encoders.store import Steps, StepStore
from pycm.streams import Appearance, ClipFeatures, FeatureDifferences, Motion, Sequences, Sound, encode_clips
from pycm.video import Clip, read_clip, write_clip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four clips, the last two with sound."""
    place = tmp_path / "clips"
    place.mkdir()
    tone = np.sin(np.arange(8000) / 5).astype(np.float32)
    for i, kind in enumerate(("right", "down", "grow", "turn")):
        write_clip(place / f"{i}.mp4", moving(kind, 6 + i).frames, sound=tone if i > 1 else None)
    return place


def paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.mp4"))


def same(a: ClipFeatures, b: ClipFeatures) -> None:
    assert a.streams.keys() == b.streams.keys()
    for name, sequences in a.streams.items():
        for field in ("values", "cu_seqlens", "times", "present"):
            np.testing.assert_array_equal(getattr(sequences, field), getattr(b.streams[name], field))


class Counting:
    """A stream that tells how many clips it was asked for: the mean grey level of each frame."""

    needs_sound, name, dim = False, "levels", 1

    def __init__(self, salt: str = "") -> None:
        self.seen = 0
        self.fingerprint = "levels" + salt

    def extract(self, clips: Sequence[Clip], *, batch_size: int = 32) -> Sequences:
        self.seen += len(clips)
        return Sequences.of([Steps(self.rows(clip), clip.times) for clip in clips], 1)

    def rows(self, clip: Clip) -> np.ndarray:
        return clip.frames.mean(axis=(1, 2, 3), dtype=np.float64)[:, None].astype(np.float32)


def test_each_stream_is_that_of_the_clips(folder: Path) -> None:
    encoder = PixelEncoder()
    streams = [Appearance(encoder), FeatureDifferences(encoder), Motion(), Sound()]
    features = encode_clips(streams, paths(folder), sampling="uniform:4", batch_size=3)
    clips = [read_clip(path, "uniform:4", size=256, sound=True) for path in paths(folder)]
    for stream in streams:
        expected = stream.extract(clips)
        np.testing.assert_array_equal(features.streams[stream.name].values, expected.values)
        np.testing.assert_array_equal(features.streams[stream.name].present, expected.present)
    assert features.streams["sound"].present.tolist() == [False, False, True, True]
    assert features.names == [str(path) for path in paths(folder)]
    assert features.kept.tolist() == [0, 1, 2, 3]
    assert set(features.seconds) == {"decode", "encode"}


def test_differences_share_the_features_of_appearance(folder: Path) -> None:
    encoder = PixelEncoder()
    both = encode_clips([Appearance(encoder), FeatureDifferences(encoder)], paths(folder))
    assert sum(encoder.calls) == 6 + 7 + 8 + 9  # each frame once
    alone = encode_clips([FeatureDifferences(PixelEncoder())], paths(folder))
    np.testing.assert_array_equal(alone.streams["differences"].values, both.streams["differences"].values)


def test_nothing_is_encoded_twice(folder: Path, tmp_path: Path) -> None:
    streams = ["motion", "sound", Counting()]
    first = encode_clips(streams, paths(folder), cache=tmp_path / "cache")
    again = Counting()
    for path in paths(folder):
        path.rename(path.with_name("renamed " + path.name))
    second = encode_clips(["motion", "sound", again], paths(folder), cache=FeatureCache(tmp_path / "cache"))
    same(first, second)
    same(first, encode_clips(streams, paths(folder)))
    assert again.seen == 0
    assert second.seconds == {"decode": 0.0, "encode": 0.0}


def test_what_changes_the_features_changes_the_key(folder: Path, tmp_path: Path) -> None:
    def seen(clips: Any = None, salt: str = "", **options: Any) -> int:
        stream = Counting(salt)
        encode_clips([stream], paths(folder) if clips is None else clips, cache=tmp_path / "cache", **options)
        return stream.seen

    assert seen() == 4
    assert seen() == 0
    assert seen(salt="b") == 4
    assert seen(sampling="uniform:3") == 4
    assert seen(size=32) == 4
    assert seen([path.read_bytes() for path in paths(folder)]) == 0  # the same bytes
    assert seen([read_clip(path) for path in paths(folder)]) == 4  # frames, sampled by somebody
    assert seen([read_clip(path) for path in paths(folder)], sampling="uniform:16") == 0
    data = paths(folder)[0].read_bytes()
    assert seen([data + b"\0"]) == 1
    assert seen() == 0


def test_sound_alone_needs_no_pictures(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []
    own = encode_module.read_clips
    monkeypatch.setattr(
        encode_module, "read_clips", lambda c, plan, **o: (plans.append(str(plan)), own(c, plan, **o))[1]
    )
    encode_clips(["motion"], paths(folder), cache=tmp_path / "cache")
    added = encode_clips(["motion", "sound"], paths(folder), cache=tmp_path / "cache")
    assert plans == ["uniform:16", "uniform:1"]
    same(added, encode_clips(["motion", "sound"], paths(folder)))


def test_equal_clips_are_encoded_once(folder: Path, tmp_path: Path) -> None:
    twice = [*paths(folder), *paths(folder)[:2]]
    stream = Counting()
    features = encode_clips([stream], twice, cache=tmp_path / "cache")
    assert stream.seen == 4
    assert len(features) == 6
    same(features, encode_clips([Counting()], twice))


def test_take_and_select(folder: Path) -> None:
    features = encode_clips(["motion", Counting()], paths(folder))
    some = features.take([3, 1])
    same(some, encode_clips(["motion", Counting()], [paths(folder)[i] for i in (3, 1)]))
    assert some.names == [features.names[3], features.names[1]]
    assert some.kept.tolist() == [3, 1]
    assert list(features.select(["levels"]).streams) == ["levels"]


# What may go wrong


def spoiled(folder: Path) -> list[Path]:
    (folder / "5.mp4").write_bytes(b"")
    (folder / "6.mp4").write_bytes(b"words")
    return [*paths(folder), folder / "7.mp4"]


@pytest.mark.parametrize("cached", [False, True])
def test_unreadable_clips_are_all_named_and_the_others_kept(folder: Path, tmp_path: Path, cached: bool) -> None:
    cache = tmp_path / "cache" if cached else None
    with pytest.raises(UnreadableInputError, match="3 of 7 clips cannot be read") as info:
        encode_clips([Counting()], spoiled(folder), cache=cache)
    assert [(Path(name).name, reason.split(":")[0]) for name, reason in info.value.errors] == [
        ("5.mp4", "the file is empty"),
        ("6.mp4", "libav"),
        ("7.mp4", "No such file or directory"),
    ]
    stream = Counting()
    features = encode_clips([stream], spoiled(folder), cache=cache, on_error="skip")
    assert features.kept.tolist() == [0, 1, 2, 3]
    assert features.errors == info.value.errors
    assert stream.seen == (0 if cached else 4)
    with pytest.raises(UnreadableInputError, match="3 of 3 clips"):
        encode_clips([Counting()], spoiled(folder)[4:], cache=cache, on_error="skip")


def test_a_full_disk_loses_nothing_that_was_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, written = StepStore.write, []

    def filling(self: StepStore, keys: Any, values: Any) -> None:
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.extend(keys)
        own(self, keys, values)

    with monkeypatch.context() as patch:
        patch.setattr(StepStore, "write", filling)
        with pytest.raises(OSError, match=r"cannot write to .*cache: No space left on device") as info:
            encode_clips([Counting()], paths(folder), cache=tmp_path / "cache", batch_size=3)
    assert info.value.errno == errno.ENOSPC
    stream = Counting()
    features = encode_clips([stream], paths(folder), cache=tmp_path / "cache", batch_size=3)
    assert stream.seen == 4 - len(written) < 4
    same(features, encode_clips([Counting()], paths(folder)))


def test_an_interrupted_run_goes_on(folder: Path, tmp_path: Path) -> None:
    class Interrupted(Counting):
        def extract(self, clips: Sequence[Clip], *, batch_size: int = 32) -> Sequences:
            if self.seen:
                raise KeyboardInterrupt
            return super().extract(clips, batch_size=batch_size)

    with pytest.raises(KeyboardInterrupt):
        encode_clips([Interrupted()], paths(folder), cache=tmp_path / "cache", batch_size=1)
    stream = Counting()
    encode_clips([stream], paths(folder), cache=tmp_path / "cache")
    assert stream.seen == 3


def test_a_damaged_cache_is_told_and_encoded_again(folder: Path, tmp_path: Path) -> None:
    first = encode_clips([Counting()], paths(folder), cache=tmp_path / "cache")
    [shard] = (tmp_path / "cache").glob("*/*.npz")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    stream = Counting()
    with pytest.warns(RuntimeWarning, match=f"{shard.name} is damaged"):
        second = encode_clips([stream], paths(folder), cache=tmp_path / "cache")
    assert stream.seen == 4
    same(first, second)


def test_a_file_that_changes_meanwhile_is_refused(folder: Path, tmp_path: Path) -> None:
    class Changing(Counting):
        def extract(self, clips: Sequence[Clip], *, batch_size: int = 32) -> Sequences:
            if not self.seen:
                (folder / "new").write_bytes((folder / "0.mp4").read_bytes())
                (folder / "new").replace(folder / "3.mp4")
            return super().extract(clips, batch_size=batch_size)

    with pytest.raises(UnreadableInputError, match=r"3\.mp4 \(it changed while it was being read\)"):
        encode_clips([Changing()], paths(folder), cache=tmp_path / "cache", batch_size=1, workers=1)
    stream = Counting()
    encode_clips([stream], paths(folder), cache=tmp_path / "cache")
    assert stream.seen == 0  # what lies there now has the bytes of the first clip


def test_features_that_are_not_finite_are_named_and_not_kept(folder: Path, tmp_path: Path) -> None:
    class Failing(Counting):
        def rows(self, clip: Clip) -> np.ndarray:
            return super().rows(clip) * (np.nan if clip.name.endswith("2.mp4") else 1)

    with pytest.raises(ValueError, match=r"stream 'levels' gives NaN or infinity for 1 of 4 clips .*2\.mp4"):
        encode_clips([Failing()], paths(folder), cache=tmp_path / "cache")
    stream = Counting()
    encode_clips([stream], paths(folder), cache=tmp_path / "cache")
    assert stream.seen == 1


def test_a_stream_must_give_one_sequence_a_clip(folder: Path) -> None:
    class Short(Counting):
        def extract(self, clips: Sequence[Clip], *, batch_size: int = 32) -> Sequences:
            return super().extract(clips[1:], batch_size=batch_size)

    with pytest.raises(ValueError, match="stream 'levels' must give 4 sequences of 1 features, got 3 of 1"):
        encode_clips([Short()], paths(folder))


def test_one_frame_and_no_clips(tmp_path: Path) -> None:
    features = encode_clips(["motion", "sound", Counting()], [Clip.from_frames(levels(1))])
    assert all(sequences.lengths.tolist() == [1] for sequences in features.streams.values())
    nothing = encode_clips(["motion", Counting()], [], cache=tmp_path / "cache")
    assert len(nothing) == 0
    assert nothing.streams["motion"].values.shape == (0, 8)


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [
        (ValueError, lambda: encode_clips([], []), "encode_clips: streams is empty"),
        (ValueError, lambda: encode_clips(["motion"], [], on_error="hide"), 'on_error must be "raise" or "skip"'),
        (ValueError, lambda: encode_clips(["motion"], [], sampling="some"), "sampling must be"),
        (ValueError, lambda: encode_clips(["motion"], [], batch_size=0), "batch_size must be a positive int"),
        (TypeError, lambda: encode_clips("motion", []), "must be a sequence of streams and specs"),
        (TypeError, lambda: encode_clips(["motion"], "a.mp4"), "a single str"),
        (TypeError, lambda: encode_clips(["motion"], [3]), "must be a path, bytes or a Clip, got int"),
        (TypeError, lambda: encode_clips([3], []), "must hold streams and specs, got int"),
    ],
)
def test_wrong_arguments(error: type[Exception], call: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
