"""Streams of features in time: what each measures, ragged batches, alignment."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

pytest.importorskip("av")
pytest.importorskip("cv2")

from matcher_stubs import PixelEncoder, WordEncoder
from video_cases import levels, moving

from pycm.audio import log_mel
from pycm.encoders.store import Steps
from pycm.streams import (
    Appearance,
    ClipFeatures,
    DerivedStream,
    FeatureDifferences,
    Motion,
    PixelDifferences,
    Sequences,
    Sound,
    Speech,
    Stream,
    align,
    concatenate,
    encode_clips,
    get_stream,
    get_streams,
    known_streams,
    stream_name,
)
from pycm.streams.registry import needs_sound
from pycm.video import Clip


def random_sequences(lengths: list[int], dim: int = 3, rate: float = 10.0, seed: int = 0) -> Sequences:
    """Random steps at random times; a length of 0 is a stream that is not there."""
    rng = np.random.default_rng(seed)
    items = [Steps(rng.normal(size=(n, dim)).astype(np.float32), np.sort(rng.uniform(0, n / rate, n))) for n in lengths]
    return Sequences.of(items, dim)


def test_what_needs_sound_is_told_without_making_it() -> None:
    for spec in ("sound", "speech", "motion", "flow", "pixel-differences"):
        assert needs_sound(spec) == needs_sound(get_stream(spec)) == get_stream(spec).needs_sound
    assert needs_sound("voice")
    assert not needs_sound("appearance:clip:some/model")
    with pytest.raises(ValueError, match="unknown stream 'noise'"):
        needs_sound("noise")


# Sequences


def test_sequences_are_ragged_and_keep_what_is_missing() -> None:
    sequences = random_sequences([3, 0, 1, 5])
    assert len(sequences) == 4
    assert sequences.lengths.tolist() == [3, 1, 1, 5]  # a zero stands in for the missing one
    assert sequences.present.tolist() == [True, False, True, True]
    assert (sequences.values[3] == 0).all()
    again = Sequences.of(list(sequences), 3)
    for name in ("values", "cu_seqlens", "times", "present"):
        np.testing.assert_array_equal(getattr(again, name), getattr(sequences, name))


@pytest.mark.parametrize("rows", [[2, 0, 0, 3], [], [1], np.array([True, False, False, True])])
def test_take(rows: Any) -> None:
    sequences = random_sequences([3, 0, 1, 5])
    taken = sequences.take(rows)
    expected = [list(sequences)[i] for i in (np.flatnonzero(rows) if isinstance(rows, np.ndarray) else rows)]
    assert len(taken) == len(expected)
    for got, steps in zip(taken, expected, strict=True):
        np.testing.assert_array_equal(got.values, steps.values)
        np.testing.assert_array_equal(got.times, steps.times)


def test_means() -> None:
    sequences = random_sequences([3, 0, 1, 5])
    expected = [steps.values.astype(float).mean(axis=0) if len(steps.values) else np.zeros(3) for steps in sequences]
    np.testing.assert_allclose(sequences.means(), np.array(expected), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": np.array([0, 2])}, "cu_seqlens must go from 0 to the number of steps"),
        ({"cu_seqlens": np.array([0, 0, 3])}, "sequence 0 has no step"),
        ({"times": np.zeros(2)}, r"times and present must be \[3\] and \[2\]"),
        ({"present": np.ones(3, bool)}, r"got \[3\] and \[3\]"),
    ],
)
def test_sequences_that_do_not_fit_together(change: dict[str, Any], message: str) -> None:
    good = {"values": np.zeros((3, 2), np.float32), "cu_seqlens": np.array([0, 1, 3]), "times": np.zeros(3)}
    with pytest.raises(ValueError, match=message):
        Sequences(**(good | {"present": np.ones(2, bool)} | change))


# Alignment


def plain_align(steps: Steps, targets: np.ndarray) -> np.ndarray:
    """The definition, step by step."""
    rows = []
    for j, t in enumerate(targets):
        low = -np.inf if j == 0 else (targets[j - 1] + t) / 2
        high = np.inf if j == len(targets) - 1 else (t + targets[j + 1]) / 2
        inside = (steps.times >= low) & (steps.times < high)
        if inside.any():
            rows.append(steps.values[inside].astype(float).mean(axis=0))
        else:
            rows.append([np.interp(t, steps.times, column) for column in steps.values.T])
    return np.array(rows)


@pytest.mark.parametrize(("mine", "theirs"), [(40, 7), (3, 20), (1, 5), (9, 1), (12, 12)])
def test_align_is_its_definition(mine: int, theirs: int) -> None:
    fast = random_sequences([mine, mine + 1], rate=mine)
    slow = random_sequences([theirs, theirs], rate=theirs, seed=1)
    aligned = align(fast, slow)
    np.testing.assert_array_equal(aligned.times, slow.times)
    np.testing.assert_array_equal(aligned.cu_seqlens, slow.cu_seqlens)
    for got, steps, other in zip(aligned, fast, slow, strict=True):
        np.testing.assert_allclose(got.values, plain_align(steps, other.times), atol=1e-6)


def test_align_to_its_own_times_changes_nothing() -> None:
    sequences = random_sequences([4, 9, 1])
    np.testing.assert_allclose(align(sequences, sequences).values, sequences.values, atol=1e-6)


def test_what_is_missing_stays_missing() -> None:
    pictures, sound = random_sequences([3, 2]), random_sequences([50, 0], dim=2, seed=1)
    joined = concatenate([pictures, sound])
    assert joined.values.shape == (5, 5)
    np.testing.assert_array_equal(joined.values[:, :3], pictures.values)
    assert (joined.values[3:, 3:] == 0).all()
    assert align(sound, pictures).present.tolist() == [True, False]
    assert align(pictures, sound).lengths.tolist() == [50, 1]
    with pytest.raises(ValueError, match="times_of must have 2 sequences, got 1"):
        align(pictures, sound.take([0]))


# What the streams measure


def test_appearance_is_the_encoder_frame_by_frame() -> None:
    clips = [moving("right", 5), moving("grow", 3)]
    encoder = PixelEncoder()
    sequences = Appearance(encoder).extract(clips)
    frames = [frame for clip in clips for frame in clip.frames]
    np.testing.assert_array_equal(sequences.values, encoder.encode(frames))
    assert sequences.lengths.tolist() == [5, 3]
    np.testing.assert_array_equal(sequences.times[:5], clips[0].times)
    with pytest.raises(ValueError, match="must encode images, but 'words' encodes texts"):
        Appearance(WordEncoder())


def test_feature_differences_begin_anew_with_each_clip() -> None:
    clips = [moving("right", 5), moving("grow", 3)]
    stream = FeatureDifferences(PixelEncoder())
    assert isinstance(stream, DerivedStream)
    values = stream.extract(clips).values
    features = stream.source.extract(clips).values
    assert (values[[0, 5]] == 0).all()
    for t in (1, 2, 3, 4, 6, 7):
        np.testing.assert_array_equal(values[t], features[t] - features[t - 1])


def test_pixel_differences_are_signed_means_over_cells() -> None:
    frames = np.full((3, 32, 32, 3), 100, np.uint8)
    frames[1, :8, 8:16] += 51  # one cell of a 4 x 4 grid, by a fifth of the range
    values = PixelDifferences(4).extract([Clip.from_frames(frames)]).values
    expected = np.zeros((3, 16))
    expected[1, 1], expected[2, 1] = 0.2, -0.2
    np.testing.assert_allclose(values, expected, atol=1e-6)


# Columns of shift x, shift y, growth, turn.
COLUMNS = {"phase": [0, 1, 3, 4], "flow": [slice(0, 32, 2), slice(1, 32, 2), 33, 34]}
TRUE = {
    "right": [4 / 96, 0, 0, 0],
    "down": [0, 4 / 96, 0, 0],
    "grow": [0, 0, np.log(1.07), 0],
    "shrink": [0, 0, np.log(0.93), 0],
    "turn": [0, 0, 0, np.deg2rad(8)],
}


@pytest.mark.parametrize("method", ["phase", "flow"])
@pytest.mark.parametrize("kind", TRUE)
def test_motion_measures_displacement_growth_and_turn(kind: str, method: Any) -> None:
    """By sign and size: phase correlation to half of the truth or better; flow is a mean over all the picture."""
    values = Motion(method).extract([moving(kind)]).values
    assert (values[0] == 0).all()
    measured = np.array([values[1:, column].mean() for column in COLUMNS[method]])
    truth = np.array(TRUE[kind])
    scale = np.array([0.04, 0.04, 0.07, 0.14])
    if method == "phase":
        tolerance = np.array([0.15, 0.15, 0.5, 0.35])
        assert (np.abs(measured - truth) / scale < tolerance).all()
    which = int(np.argmax(np.abs(truth)))
    share = measured / scale
    assert np.sign(share[which]) == np.sign(truth[which])
    assert np.abs(share[which]) > 2 * np.abs(np.delete(share, which)).max()


@pytest.mark.parametrize("method", ["phase", "flow"])
def test_still_and_blank_clips_do_not_move(method: Any) -> None:
    still = Clip.from_frames(moving("right", 1).frames.repeat(4, axis=0))
    blank = Clip.from_frames(np.zeros((4, 20, 20, 3), np.uint8))
    single = moving("right", 1)
    values = Motion(method).extract([still, blank, single]).values
    assert len(values) == 9
    assert np.abs(values).max() == 0


def test_log_mel_is_that_of_transformers() -> None:
    audio = pytest.importorskip("transformers.audio_utils")
    sound = np.random.default_rng(0).normal(size=5000) / 4
    ours, times = log_mel(sound, bins=40, window=0.032, hop=0.01)
    filters = audio.mel_filter_bank(257, 40, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney")
    window = audio.window_function(512, "hann")
    theirs = audio.spectrogram(
        sound, window, 512, 160, fft_length=512, power=2.0, center=False, mel_filters=filters, log_mel="log10"
    ).T
    theirs = (np.maximum(theirs, theirs.max() - 8) + 4) / 4
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_allclose(times, 0.016 + 0.01 * np.arange(len(ours)))


def test_sound_follows_the_pitch_and_marks_silence() -> None:
    time = np.arange(16000) / 16000
    tone = np.where(time < 0.5, np.sin(2 * np.pi * 300 * time), np.sin(2 * np.pi * 3000 * time)).astype(np.float32)
    with_tone = Clip.from_frames(levels(25), sound=tone)
    silent = Clip.from_frames(levels(25), sound=np.zeros(16000, np.float32))
    sequences = Sound().extract([with_tone, levels_clip(None), silent, levels_clip(np.zeros(0, np.float32))])
    assert sequences.present.tolist() == [True, False, True, False]
    low, high = (sequences.values[:49][part].mean(axis=0).argmax() for part in (slice(2, 20), slice(28, 46)))
    assert low < 12 < 35 < high
    assert np.ptp(list(sequences)[2].values) == 0
    assert np.isfinite(sequences.values).all()


def test_speech_is_cepstra_without_silence_and_loudness() -> None:
    from scipy.fft import dct

    draw = np.random.default_rng(0)
    said = np.convolve(draw.normal(size=8000), np.ones(4) / 4, "same") * np.sin(np.arange(8000) / 300) ** 2
    sound = np.concatenate([np.zeros(4000), said, np.zeros(4000)]).astype(np.float32) / 4
    stream = Speech(silence=0.5)
    sequences = stream.extract([levels_clip(sound), levels_clip(sound / 2), levels_clip(None)])
    first, second, missing = sequences
    assert sequences.dim == stream.dim == 26
    assert len(missing.values) == 0
    np.testing.assert_allclose(first.values, second.values, atol=1e-3)  # half as loud
    assert 0.2 < first.times[0] < first.times[-1] < 0.8  # where something is heard
    assert np.diff(first.times).max() > 0.015  # nor the silence within
    bands, times = log_mel(sound, bins=40, window=0.025, hop=0.01)
    inside = np.isin(times, first.times)
    plain = dct(bands.astype(float), axis=1, norm="ortho")[:, :13]
    plain = (plain - plain[inside].mean(0)) / (plain[inside].std(0) + 0.02)
    np.testing.assert_allclose(first.values[:, :13], plain[inside], atol=1e-4)
    slopes = (plain[2:] - plain[:-2]) / 2
    np.testing.assert_allclose(first.values[:, 13:], slopes[np.flatnonzero(inside) - 1], atol=1e-4)


def test_a_warped_tone_is_a_higher_one() -> None:
    time = np.arange(16000) / 16000
    low, high = (np.sin(2 * np.pi * pitch * time) for pitch in (1000, 1250))
    options: dict[str, Any] = {"bins": 20, "band": (100, 3500)}
    warped, expected = log_mel(low, warp=1.25, **options)[0], log_mel(high, **options)[0]
    assert (warped.argmax(1) == expected.argmax(1)).all()
    assert (log_mel(low, **options)[0].argmax(1) != expected.argmax(1)).all()
    voices = Speech(warp=0.8, band=(100, 3500)), Speech(warp=1.2, band=(100, 3500)), Speech(band=(100, 3500)), Speech()
    assert len({stream.fingerprint for stream in voices}) == 4
    sound = np.random.default_rng(0).normal(size=8000).astype(np.float32) / 8
    first, second = (stream.extract([levels_clip(sound)]).values for stream in voices[:2])
    assert len(first) != len(second) or np.abs(first - second).max() > 0.1


def test_joined_clips_are_the_clips_of_all() -> None:
    clips = [levels_clip(np.random.default_rng(n).normal(size=1600 * n).astype(np.float32)) for n in (1, 2)]
    clips.append(levels_clip(None))
    parts = [encode_clips([Sound(), Motion()], clips), encode_clips([Sound(), Motion()], clips[:1])]
    joined = ClipFeatures.joined(parts)
    assert joined.names == parts[0].names + parts[1].names
    for rows, part in (([0, 1, 2], parts[0]), ([3], parts[1])):
        for name, expected in part.streams.items():
            found = joined.take(rows).streams[name]
            for attribute in ("values", "cu_seqlens", "times", "present"):
                np.testing.assert_array_equal(getattr(found, attribute), getattr(expected, attribute))
    with pytest.raises(ValueError, match=r"joined: streams must be alike, got .*'motion'.* and \{'sound': 64\}"):
        ClipFeatures.joined([parts[0], parts[1].select(["sound"])])
    with pytest.raises(ValueError, match="parts is empty"):
        ClipFeatures.joined([])


def levels_clip(sound: np.ndarray | None) -> Clip:
    return Clip.from_frames(levels(2), sound=sound)


# Names


def test_streams_by_name() -> None:
    streams = get_streams(["motion", "flow", "pixel-differences", "sound", Appearance(PixelEncoder(), name="mine")])
    assert [stream.name for stream in streams] == ["motion", "flow", "pixel-differences", "sound", "mine"]
    assert [stream.needs_sound for stream in streams] == [False, False, False, True, False]
    assert len({stream.fingerprint for stream in streams}) == 5
    assert all(isinstance(stream, Stream) for stream in streams)
    assert all(stream_name(spec) == spec for spec in known_streams())
    assert get_stream("flow").dim == 35


def test_settings_are_part_of_the_fingerprint() -> None:
    streams = [Motion(), Motion(size=32), Motion("flow"), Sound(), Sound(32), Sound(hop=0.01), PixelDifferences(8)]
    streams += [PixelDifferences(), Appearance(PixelEncoder()), Appearance(PixelEncoder("b"))]
    assert len({stream.fingerprint for stream in streams}) == len(streams)


@pytest.mark.parametrize("spec", ["shape", "motion:", "appearance:", "sound:minilm"])
def test_unknown_streams(spec: str) -> None:
    for call in (get_stream, stream_name):
        with pytest.raises(ValueError, match=r"unknown stream .*; known: appearance, "):
            call(spec)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: get_streams(["motion", "motion"]), "distinct names, got motion, motion"),
        (lambda: Motion("optical"), 'method must be "phase" or "flow"'),  # type: ignore[arg-type]
        (lambda: Motion(size=4), "size must be an int of at least 16"),
        (lambda: Sound(0), "bins must be a positive int"),
        (lambda: Sound(hop=0.1), "hop must be in"),
        (lambda: Speech(0), r"cepstra must be an int in \[1, 40\]"),
        (lambda: Speech(silence=0.0), "silence must be positive"),
        (lambda: PixelDifferences(0), "grid must be a positive int"),
        (lambda: log_mel(np.zeros((2, 5))), r"sound must be \[S\], got \[2, 5\]"),
        (lambda: log_mel(np.zeros(5), hop=0.0), "window and hop must be at least"),
        (lambda: log_mel(np.zeros(5), warp=0.0), "warp must be positive"),
        (lambda: log_mel(np.zeros(5), band=(100, 7000), warp=0.8), r"band must rise within \[0, 6400\] Hz, got"),
    ],
)
def test_wrong_settings(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_importing_loads_nothing_heavy() -> None:
    heavy = {"torch", "av", "cv2", "transformers"}
    code = f"import sys, pycm.streams, pycm.video, pycm.audio; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
