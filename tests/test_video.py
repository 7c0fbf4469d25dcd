"""Reading and writing clips: which frames, in which order, how upright; what cannot be read."""

from __future__ import annotations

import io
import pickle
import threading
import weakref
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

av = pytest.importorskip("av")

from video_cases import encoded, levels, numbers, with_sound  # noqa: E402

from pycm import _decode  # noqa: E402
from pycm.audio import read_sound  # noqa: E402
from pycm.video import Clip, ClipReadError, Sampling, read_clip, read_clips, stack_clips, write_clip  # noqa: E402

COUNT = 31
FILES = {
    "mp4": ("mp4", "libx264", {"b_frames": 3}),
    "mkv": ("matroska", "libx264", {"b_frames": 2}),
    "ts": ("mpegts", "libx264", {"b_frames": 2}),
    "avi": ("avi", "mpeg4", {"b_frames": 2}),  # packets without presentation times
    "h264": ("h264", "libx264", {}),  # no times at all
}
WANTED = {
    "all": list(range(COUNT)),
    "uniform:4": [0, 10, 20, 30],
    "uniform:1": [15],
    "uniform:100": list(range(COUNT)),
    "segments:3": [5, 15, 25],
    "segments:31": list(range(COUNT)),
    "fps:5": [0, 5, 10, 15, 20, 25, 30],
    "fps:2": [0, 12, 25],  # what is on the screen at 0.5 s began at 0.48 s
    "fps:1000": list(range(COUNT)),
}


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return {name: encoded(levels(COUNT), *how[:2], **how[2]) for name, how in FILES.items()}


@pytest.mark.parametrize("sampling", WANTED)
@pytest.mark.parametrize("name", FILES)
def test_the_frames_that_the_sampling_names(files: dict[str, bytes], name: str, sampling: str) -> None:
    clip = read_clip(files[name], sampling)
    assert numbers(clip.frames) == WANTED[sampling]
    np.testing.assert_allclose(clip.times, np.array(WANTED[sampling]) / 25, atol=1.1e-3)  # Matroska rounds to 1 ms
    assert clip.duration == pytest.approx(COUNT / 25, abs=2e-3)


def test_files_that_tell_their_times_are_not_decoded_whole(
    files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    own = _decode._Canvas.add
    monkeypatch.setattr(_decode, "_by_count", None)
    monkeypatch.setattr(
        _decode._Canvas, "add", lambda self, picture, aspect: (decoded.append(picture.pts), own(self, picture, aspect))
    )
    for name in ("mp4", "mkv"):
        assert numbers(read_clip(files[name], "uniform:3").frames) == [0, 15, 30]
    assert len(decoded) == 6
    assert numbers(read_clip(files["ts"], "uniform:3").frames) == [0, 15, 30]  # where a search may end too late


class Proxy:
    """Has everything that `inner` has."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def wrap_containers(monkeypatch: pytest.MonkeyPatch, kind: type[Proxy]) -> None:
    own = _decode.opened

    @contextmanager
    def opened(source: Any) -> Any:
        with own(source) as container:
            yield kind(container)

    monkeypatch.setattr(_decode, "opened", opened)


def test_key_frames_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 31 frames with a key frame every 6, the last one needs the 24th to the 30th at most."""
    seen = []

    class Counting(Proxy):
        def decode(self, stream: Any) -> Any:
            for picture in self.inner.decode(stream):
                seen.append(picture.pts)
                yield picture

    wrap_containers(monkeypatch, Counting)
    clip = read_clip(encoded(levels(31), "mp4", "libx264", gop=6), "uniform:2")
    assert numbers(clip.frames) == [0, 30]
    assert 2 <= len(seen) <= 8


def test_the_first_pass_keeps_no_packet(monkeypatch: pytest.MonkeyPatch) -> None:
    """All packets together are the file, however large: at most the one being read and the next are alive."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    class Watched(Proxy):
        def demux(self, stream: Any) -> Any:
            nonlocal most
            for packet in self.inner.demux(stream):
                alive.add(made := Proxy(packet))
                most = max(most, len(alive))
                yield made

    wrap_containers(monkeypatch, Watched)
    assert numbers(read_clip(encoded(levels(31), "mp4", "libx264"), "uniform:2").frames) == [0, 30]
    assert 1 <= most <= 2


@pytest.mark.parametrize("sides", [(16, 24), (17, 24), (17, 23)])
def test_written_clips_are_read_again(tmp_path: Path, sides: tuple[int, int]) -> None:
    frames = levels(9, *sides)
    write_clip(tmp_path / "a.mp4", frames, fps=12.5, crf=1)
    clip = read_clip(tmp_path / "a.mp4", "all", sound=True)
    assert clip.frames.shape == frames.shape
    assert np.abs(clip.frames.astype(int) - frames).max() <= 3
    np.testing.assert_allclose(clip.times, np.arange(9) / 12.5, atol=1e-9)
    assert clip.sound is None
    assert clip.name == str(tmp_path / "a.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_pictures_are_upright_and_their_pixels_square() -> None:
    frames = np.zeros((2, 32, 48, 3), np.uint8)
    frames[:, :8] = 255  # a white bar at the top
    turned = read_clip(encoded(frames, "mp4", "libx264", rotation=90)).frames  # to be shown turned counter-clockwise
    assert turned.shape == (2, 48, 32, 3)
    assert turned[0, :, :6].mean() > 240
    assert turned[0, :, 10:].mean() < 15
    wide = read_clip(encoded(frames, "mp4", "libx264", aspect=Fraction(2))).frames
    assert wide.shape == (2, 32, 96, 3)


def test_transparent_pixels_are_white() -> None:
    from PIL import Image

    pictures = [Image.new("RGBA", (20, 10), (255, 0, 0, 0)) for _ in range(3)]
    for i, picture in enumerate(pictures):
        picture.paste((0, 0, 0, 255), (0, 0, 5 * (i + 1), 10))
    file = io.BytesIO()
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=100, disposal=2)
    clip = read_clip(file.getvalue(), "all")
    assert [(frame[:, :, 0] < 128).sum() for frame in clip.frames] == [50, 100, 150]
    assert (clip.frames[0, :, 10:] == 255).all()
    np.testing.assert_allclose(clip.times, [0, 0.1, 0.2])


def test_size_bounds_the_shorter_side(files: dict[str, bytes]) -> None:
    assert read_clip(files["mp4"], size=8).frames.shape[1:] == (8, 12, 3)
    assert read_clip(files["mp4"], size=100).frames.shape[1:] == (16, 24, 3)


# Sound


@pytest.mark.parametrize("delay", [0.0, 0.5])
@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_sound_begins_with_the_picture(tmp_path: Path, rate: int, delay: float) -> None:
    sound = np.zeros(rate)
    sound[rate // 4 : rate // 4 + rate // 100] = 0.5  # 10 ms
    with_sound(tmp_path / "a.mkv", levels(1).repeat(50, axis=0), sound, rate=rate, delay=delay)
    heard = read_clip(tmp_path / "a.mkv", sound=True).sound
    assert heard is not None
    assert heard.dtype == np.float32
    loud = np.flatnonzero(np.abs(heard) > 0.25)
    assert loud[0] / 16000 == pytest.approx(delay + 0.25, abs=1.5e-3)
    assert loud[-1] / 16000 == pytest.approx(delay + 0.26, abs=1.5e-3)
    assert len(heard) / 16000 == pytest.approx(delay + 1, abs=2e-3)
    alone = read_sound(tmp_path / "a.mkv")
    assert alone is not None
    assert len(alone) / 16000 == pytest.approx(1, abs=2e-3)


def test_sound_written_and_read(tmp_path: Path) -> None:
    noise = np.convolve(np.random.default_rng(0).normal(size=16000), np.ones(8) / 8, "same").astype(np.float32) / 4
    write_clip(tmp_path / "a.mp4", levels(25), sound=noise)
    heard = read_clip(tmp_path / "a.mp4", sound=True).sound
    assert heard is not None
    assert np.corrcoef(heard[:16000], noise)[0, 1] > 0.95  # AAC, and no shift


# What cannot be read


def broken(folder: Path) -> dict[str, str]:
    """Files by name, with the reason why each cannot be read."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    good = encoded(noise, "mp4", "libx264")
    fast = str(folder / "fast.mp4")  # a file whose table of contents comes first
    with av.open(io.BytesIO(good)) as source, av.open(fast, "w", options={"movflags": "faststart"}) as out:
        stream = source.streams.video[0]
        copy = out.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.size:
                packet.stream = copy
                out.mux(packet)
    song = io.BytesIO()
    with av.open(song, "w", format="mp4") as out:
        track = out.add_stream("aac", rate=16000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="flt", layout="mono")
        samples.sample_rate, samples.pts = 16000, 0
        out.mux(track.encode(samples))
        out.mux(track.encode(None))
    nothing = io.BytesIO()
    with av.open(nothing, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        out.start_encoding()
    files = {
        "empty.mp4": (b"", "the file is empty"),
        "text.mp4": (b"no clip at all, but words", "libav: Invalid data"),
        "half.mp4": (good[: len(good) // 2], "libav: Invalid data"),
        "cut.mp4": (Path(fast).read_bytes()[:100_000], r"it is cut off: \d+ of 40 pictures are there"),
        "end.mp4": (Path(fast).read_bytes()[:-3000], "it is cut off in its last picture"),
        "song.mp4": (song.getvalue(), "it has no picture track, only sound"),
        "nothing.mp4": (nothing.getvalue(), "it has no picture track"),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    (folder / "folder.mp4").mkdir()
    reasons = {name: reason for name, (_, reason) in files.items()}
    return reasons | {"missing.mp4": "No such file", "folder.mp4": "Is a directory", "nul\0.mp4": "null"}


def test_unreadable_clips_are_named_with_the_reason(tmp_path: Path) -> None:
    for name, reason in broken(tmp_path).items():
        with pytest.raises(ClipReadError, match=reason) as info:
            read_clip(tmp_path / name)
        assert info.value.name == str(tmp_path / name)
        assert str(info.value).startswith(str(tmp_path / name))
        again = pickle.loads(pickle.dumps(info.value))
        assert (again.name, again.reason) == (info.value.name, info.value.reason)
    with pytest.raises(ClipReadError, match=r"^clip: the file is empty"):
        read_clip(b"")


def test_damage_within_is_noticed_or_harmless() -> None:
    """Whatever byte is changed: an error that says so, or pictures; never anything else."""
    good = encoded(levels(6, 16, 16), "mp4", "libx264")
    rng = np.random.default_rng(0)
    failed = 0
    for place in rng.integers(0, len(good), 80):
        data = bytearray(good)
        data[place] ^= int(rng.integers(1, 256))
        try:
            assert len(read_clip(bytes(data), "all", sound=True).frames) >= 1
        except ClipReadError:
            failed += 1
    assert 5 < failed < 75


def test_one_frame_is_a_clip() -> None:
    clip = read_clip(encoded(levels(1), "mp4", "libx264"))
    assert clip.frames.shape == (1, 16, 24, 3)
    assert clip.times.tolist() == [0.0]
    assert clip.duration == pytest.approx(0.04)


def test_huge_clips_are_refused_before_they_fill_the_memory(files: dict[str, bytes], tmp_path: Path) -> None:
    with pytest.raises(ClipReadError, match=r"31 frames of 24 x 16 take .* more than max_bytes .*: sample fewer"):
        read_clip(files["mp4"], "all", max_bytes=31 * 24 * 16 * 3 - 1)
    assert len(read_clip(files["mp4"], "all", max_bytes=31 * 24 * 16 * 3).frames) == 31
    write_clip(tmp_path / "a.mp4", levels(25), sound=np.zeros(16000, np.float32))
    with pytest.raises(ClipReadError, match="its sound takes more than max_bytes"):
        read_clip(tmp_path / "a.mp4", "uniform:1", sound=True, max_bytes=40000)


# Many


def test_many_are_read_in_order_whatever_the_workers(files: dict[str, bytes]) -> None:
    sources = [files["mp4"], files["avi"], files["mkv"], levels_clip()] * 3
    plain = list(read_clips(sources, workers=0))
    for workers in (1, 3, None):
        got = list(read_clips(sources, workers=workers))
        assert [i for i, _ in got] == list(range(12))
        for (_, clip), (_, expected) in zip(got, plain, strict=True):
            np.testing.assert_array_equal(clip.frames, expected.frames)


def levels_clip() -> Clip:
    return Clip.from_frames(levels(5), name="made")


def test_reading_ahead_is_bounded_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    import pycm.video

    begun: list[int] = []
    own = pycm.video._read
    monkeypatch.setattr(pycm.video, "_read", lambda s, i, o: (begun.append(i), own(s, i, o))[1])
    reader = read_clips([levels_clip()] * 50, workers=2)
    for i, _ in reader:
        assert len(begun) <= i + 2 * 2
        if i == 5:
            break
    reader.close()
    assert len(begun) < 12
    assert not [t for t in threading.enumerate() if t.name.startswith("pycm-decode")]


def test_errors_are_raised_at_their_turn_or_listed(tmp_path: Path, files: dict[str, bytes]) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    sources = [files["mp4"], tmp_path / "bad.mp4", files["mkv"], b""]
    reader = read_clips(sources, workers=2)
    assert next(reader)[0] == 0
    with pytest.raises(ClipReadError, match=r"bad\.mp4"):
        next(reader)
    reader = read_clips(sources, workers=2, on_error="skip")
    assert [i for i, _ in reader] == [0, 2]
    assert [(i, error.name) for i, error in reader.errors] == [(1, str(tmp_path / "bad.mp4")), (3, "clips[3]")]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: read_clip(b"x", "uniform:0"), "read_clip: sampling 'uniform:0': .* positive whole number"),
        (lambda: read_clip(b"x", "every:3"), 'read_clip: sampling must be "uniform:N"'),
        (lambda: read_clip(b"x", "fps:-1"), "positive rate"),
        (lambda: read_clip(b"x", "segments:2.5"), "whole number"),
        (lambda: read_clip(b"x", "all:3"), 'sampling must be "uniform:N"'),
        (lambda: read_clip(b"x", size=0), "read_clip: size must be a positive int, got 0"),
        (lambda: read_clips([b"x"], workers=-1), "read_clips: workers must be None or an int of at least 0, got -1"),
        (lambda: read_clips([b"x"], on_error="hide"), 'read_clips: on_error must be "raise" or "skip"'),
        (lambda: Clip.from_frames(np.zeros((0, 4, 4, 3), np.uint8)), r"at least one pixel, got \[0, 4, 4, 3\]"),
        (lambda: Clip(levels(2), np.array([1.0, 1.0]), None, 16000, 1.0, ""), "2 ascending numbers"),
    ],
)
def test_wrong_arguments(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_wrong_types() -> None:
    with pytest.raises(TypeError, match="source must be a path, bytes or a Clip, got int"):
        read_clip(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="frames must be a uint8 array, got float64"):
        Clip.from_frames(np.zeros((1, 4, 4, 3)))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a single str"):
        read_clips("a.mp4")


def test_samplings_read_as_they_are_written() -> None:
    for spec in ("uniform:16", "segments:8", "fps:2.5", "all"):
        assert str(Sampling.parse(spec)) == spec
        assert Sampling.parse(Sampling.parse(spec)) == Sampling.parse(spec)


def test_frames_of_several_clips_are_one_ragged_array() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 256, (n, 4, 6, 3), dtype=np.uint8) for n in (3, 1, 5)]
    frames, cu_seqlens = stack_clips(Clip.from_frames(part) for part in parts)
    assert (frames.dtype, frames.shape, cu_seqlens.dtype) == (np.uint8, (9, 4, 6, 3), np.int64)
    for part, start, end in zip(parts, cu_seqlens[:-1], cu_seqlens[1:], strict=True):
        np.testing.assert_array_equal(frames[start:end], part)
    other = Clip.from_frames(np.zeros((2, 4, 8, 3), np.uint8), name="wide.mp4")
    with pytest.raises(ValueError, match=r"one size, wide\.mp4 has 8 x 4, the first 6 x 4"):
        stack_clips([Clip.from_frames(parts[0]), other])
    with pytest.raises(ValueError, match="clips is empty"):
        stack_clips([])
