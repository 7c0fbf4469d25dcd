"""Decoding by PyAV: the pictures of a video file that a sampling asks for, and its sound track."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ._optional import require

Pixels = npt.NDArray[np.uint8]
Times = npt.NDArray[np.float64]
Sound = npt.NDArray[np.float32]
#: Which pictures to keep, ascending, from the times [n] of all, in seconds.
Choose = Callable[[Times], npt.NDArray[np.int64]]


class _Packet(NamedTuple):
    """What is kept of a compressed packet: all of their data would be the whole file in memory."""

    pts: int | None
    is_keyframe: bool
    is_discard: bool
    is_corrupt: bool


class DecodeError(ValueError):
    """A file cannot be decoded; the text is the reason, without the file's name."""


@contextmanager
def opened(source: str | bytes) -> Iterator[Any]:
    """The libav container of a local file or of a file's bytes. libav's errors within come out as DecodeError."""
    av = require("av", "video", "decoding")
    try:
        if isinstance(source, str):
            with open(source, "rb") as file:  # for the system's own words where that fails
                empty = not file.read(1)
        else:
            empty = not source
        if empty:
            raise DecodeError("the file is empty")
        # "file:" and the whitelist: neither a name nor a playlist may make libav reach for the network.
        target = f"file:{source}" if isinstance(source, str) else io.BytesIO(source)
        with av.open(target, options={"protocol_whitelist": "file"}, metadata_errors="replace") as container:
            yield container
    except av.FFmpegError as error:
        raise DecodeError(f"libav: {error.strerror or error}") from error
    except OSError as error:
        raise DecodeError(error.strerror or str(error)) from error
    except (UnicodeError, ValueError) as error:  # a NUL in the name; PyAV's own checks
        raise error if isinstance(error, DecodeError) else DecodeError(str(error)) from error


def decode_frames(
    source: str | bytes, choose: Choose, size: int | None, max_bytes: int, threads: int
) -> tuple[Pixels, Times, float, float]:
    """(frames [T, H, W, 3], their times from the first picture, the duration, the first picture's time in the file).

    A first pass reads the packets alone: it tells when each picture is shown, so that only what is needed is decoded,
    from the nearest key frame on. Files whose packets do not tell (no time stamps, two packets a picture) are decoded
    whole, twice.
    """
    with opened(source) as container:
        stream = _video_stream(container)
        packets = [_Packet(p.pts, p.is_keyframe, p.is_discard, p.is_corrupt) for p in container.demux(stream) if p.size]
        if stream.frames > len(packets):  # only containers with a table of contents know `frames`
            raise DecodeError(f"it is cut off: {len(packets)} of {stream.frames} pictures are there")
        if packets and packets[-1].is_corrupt:
            raise DecodeError("it is cut off in its last picture")
        shown = [p for p in packets if not p.is_discard]
        stamps = sorted(p.pts for p in shown if p.pts is not None)
        keys = sorted(p.pts for p in shown if p.is_keyframe and p.pts is not None)
        base, rate = float(stream.time_base or 0), float(stream.average_rate or 25)
        distinct = len(set(stamps)) == len(shown) > 0
    if distinct:
        times = (np.array(stamps, dtype=np.float64) - stamps[0]) * base
        chosen = choose(times)
        for stops in (keys, []):  # in some formats a search for a time may end behind it: then without searching
            frames = _by_stamp(source, [stamps[i] for i in chosen], stops, size, max_bytes, threads)
            if frames is not None:
                return frames, times[chosen], _duration(times, rate), stamps[0] * base
    return _by_count(source, choose, rate, size, max_bytes, threads)


def _by_stamp(
    source: str | bytes, wanted: Sequence[int], keys: Sequence[int], size: int | None, max_bytes: int, threads: int
) -> Pixels | None:  # fmt: skip
    """The pictures with those time stamps, searched for at the key frames `keys`; None where the decoder has others."""
    canvas = _Canvas(len(wanted), size, max_bytes)
    todo = iter(wanted)
    target = next(todo)
    with opened(source) as container:
        stream = _video_stream(container, threads)
        pictures = container.decode(stream)
        position = keys[0] if keys else target
        while True:
            before = max((key for key in keys if position < key <= target), default=None)
            if before is not None:
                container.seek(before, stream=stream)
                pictures = container.decode(stream)
            for picture in pictures:
                if picture.pts is None or picture.pts > target:
                    return None
                position = picture.pts
                if position == target:
                    canvas.add(picture, _aspect(stream))
                    break
            else:
                return None
            if (following := next(todo, None)) is None:
                return canvas.frames
            target = following


def _by_count(
    source: str | bytes, choose: Choose, rate: float, size: int | None, max_bytes: int, threads: int
) -> tuple[Pixels, Times, float, float]:
    def pictures() -> Iterator[tuple[Any, float]]:
        with opened(source) as container:
            stream = _video_stream(container, threads)
            for picture in container.decode(stream):
                yield picture, _aspect(stream)

    stamps = [picture.time for picture, _ in pictures()]
    if not stamps:
        raise DecodeError("it has no picture: its picture track is empty")
    known = all(s is not None for s in stamps) and all(a < b for a, b in pairwise(stamps))
    start = float(stamps[0]) if known else 0.0
    times = np.array(stamps, dtype=np.float64) - start if known else np.arange(len(stamps)) / rate
    chosen = choose(times)
    canvas = _Canvas(len(chosen), size, max_bytes)
    keep = set(chosen.tolist())
    for i, (picture, aspect) in enumerate(pictures()):
        if i in keep:
            canvas.add(picture, aspect)
    return canvas.frames, times[chosen], _duration(times, rate), start


class _Canvas:
    """Room for the kept pictures, as RGB, upright, with square pixels, the shorter side at most `size`."""

    def __init__(self, count: int, size: int | None, max_bytes: int) -> None:
        self.count, self.size, self.max_bytes = count, size, max_bytes
        self.frames: Pixels = np.empty((0, 0, 0, 3), dtype=np.uint8)
        self.filled = 0
        # One for all: preparing a conversion takes longer than converting a small picture.
        self.reformatter = require("av", "video", "decoding").video.reformatter.VideoReformatter()

    def add(self, picture: Any, aspect: float) -> None:
        """Keep a picture whose pixels are `aspect` times as wide as they are high."""
        if picture.is_corrupt:
            raise DecodeError(f"the picture at {float(picture.time or 0):.2f} s is damaged")
        pixels = self._rgb(picture, aspect)
        if not self.filled:
            self.frames = np.empty((self.count, *pixels.shape), dtype=np.uint8)
        if pixels.shape != self.frames.shape[1:]:
            raise DecodeError(f"its pictures change size, from {_size(self.frames[0])} to {_size(pixels)}")
        self.frames[self.filled] = pixels
        self.filled += 1

    def _rgb(self, picture: Any, aspect: float) -> Pixels:
        width, height = max(1, round(picture.width * aspect)), picture.height
        if self.size is not None and min(width, height) > self.size:
            scale = self.size / min(width, height)
            width, height = max(1, round(width * scale)), max(1, round(height * scale))
        needed = self.count * height * width * 3
        if needed > self.max_bytes:
            raise DecodeError(
                f"{self.count} frames of {width} x {height} take {needed / 2**20:.3g} MiB, more than max_bytes = "
                f"{self.max_bytes / 2**20:.3g} MiB: sample fewer of them, or give a smaller size"
            )
        transparent = any(component.is_alpha for component in picture.format.components)
        shrinks = width < picture.width or height < picture.height
        pixels = self.reformatter.reformat(
            picture,
            width,
            height,
            "rgba" if transparent else "rgb24",
            interpolation="AREA" if shrinks else "BILINEAR",
        ).to_ndarray()
        if transparent:  # on white, as images are
            alpha = pixels[..., 3:].astype(np.uint16)
            pixels = ((pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
        # libav's angle is counter-clockwise, as NumPy's.
        return np.rot90(pixels, round(picture.rotation / 90)) if picture.rotation else pixels


def _aspect(stream: Any) -> float:
    """Width of a pixel over its height; 1 where the stream does not tell, or tells nonsense."""
    aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio
    return float(aspect) if aspect and 0.1 < aspect < 10 else 1.0


def _video_stream(container: Any, threads: int = 1) -> Any:
    import av

    cover = av.stream.Disposition.attached_pic
    for stream in container.streams.video:
        if not stream.disposition & cover:  # the cover of a song
            if stream.codec_context is None:
                raise DecodeError("this build of PyAV has no decoder for its pictures")
            stream.codec_context.thread_count = threads
            stream.codec_context.thread_type = "AUTO"
            return stream
    if container.streams.audio:
        raise DecodeError("it has no picture track, only sound")
    raise DecodeError("it has no picture track")


def _duration(times: Times, rate: float) -> float:
    """From the first picture to the end of the last one, which is shown as long as the others on average."""
    return float(times[-1]) * len(times) / (len(times) - 1) if len(times) > 1 else 1 / rate


def _size(pixels: Pixels) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[0]}"


def decode_sound(
    source: str | bytes, sample_rate: int, max_bytes: int, start: float | None = None, seconds: float = math.inf
) -> Sound | None:
    """The first sound track as mono float32 [S] from the time `start` of the file on (None: from its own beginning),
    at most so many seconds of it.

    None where there is no sound track.
    """
    with opened(source) as container:
        if not container.streams.audio:
            return None
        import av

        stream = container.streams.audio[0]
        if stream.codec_context is None:
            raise DecodeError("this build of PyAV has no decoder for its sound")
        resampler = av.AudioResampler(format="flt", layout="mono", rate=sample_rate)
        parts: list[Sound] = []
        shift = 0
        total = 0
        for frame in _and_end(container.decode(stream)):
            if frame is not None and not parts and start is not None and frame.time is not None:
                shift = round((float(frame.time) - start) * sample_rate)
            for resampled in resampler.resample(frame):
                parts.append(resampled.to_ndarray().reshape(-1).astype(np.float32, copy=False))
                total += parts[-1].nbytes
            if total + 4 * max(shift, 0) > max_bytes:
                raise DecodeError(f"its sound takes more than max_bytes = {max_bytes / 2**20:.3g} MiB")
            if total / 4 + shift >= seconds * sample_rate:
                break
    sound = np.concatenate([np.zeros(max(shift, 0), dtype=np.float32), *parts])
    sound = sound[max(-shift, 0) :]
    if seconds < math.inf:
        sound = sound[: round(seconds * sample_rate)]
    if not np.isfinite(sound).all():
        raise DecodeError("its sound holds NaN or infinity")
    return sound


def _and_end(frames: Iterator[Any]) -> Iterator[Any]:
    yield from frames
    yield None  # what the resampler still holds


def available_cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def evenly(n: int, count: int, ends: bool) -> npt.NDArray[np.int64]:
    """At most `count` distinct indices below n: with both ends, or the middles of `count` equal parts."""
    count = min(n, count)
    if ends and count > 1:
        return np.array([i * (n - 1) // (count - 1) for i in range(count)], dtype=np.int64)
    return np.array([(2 * i + 1) * n // (2 * count) for i in range(count)], dtype=np.int64)


def at_rate(times: Times, rate: float) -> npt.NDArray[np.int64]:
    """What is on the screen at 0, 1/rate, 2/rate, ...: each picture at most once."""
    ticks = np.arange(math.floor(times[-1] * rate + 1e-9) + 1) / rate
    shown: npt.NDArray[np.int64] = np.unique(np.searchsorted(times, ticks + 1e-9, side="right") - 1)
    return shown
