"""Clips: video files, with their sound, as arrays of frames.

`read_clip` decodes one file, `read_clips` many, ahead of whoever uses them, in a bounded pool of threads (libav works
outside Python's lock). What is read is what a viewer shows: upright, with square pixels, transparency on white.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from ._decode import DecodeError, Times, at_rate, available_cpus, decode_frames, decode_sound, evenly
from ._files import atomic_write
from ._optional import require
from .encoders.base import check_items

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "CLIPS_VERSION",
    "MAX_BYTES",
    "Clip",
    "ClipItem",
    "ClipReadError",
    "ClipReader",
    "Sampling",
    "clip_name",
    "read_clip",
    "read_clips",
    "stack_clips",
    "write_clip",
]

#: Part of every cache key of a clip: raise it when the same bytes give other frames than before.
CLIPS_VERSION = 1
#: The most bytes that the frames of one clip may take, and its sound, unless told otherwise.
MAX_BYTES = 1 << 30


class ClipReadError(ValueError):
    """A clip cannot be read.

    Attributes:
        name: of the clip: its path, or its place in the list.
        reason: why.
    """

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason
        super().__init__(f"{name}: {reason}")

    def __reduce__(self) -> tuple[Any, ...]:  # the message alone would not rebuild it in another process
        return type(self), (self.name, self.reason)


@dataclass(frozen=True, eq=False)
class Clip:
    """A decoded and sampled clip.

    Attributes:
        frames: uint8 [T, H, W, 3], RGB, T >= 1.
        times: float64 [T], seconds from the first frame of the file, ascending.
        sound: float32 [S], mono in [-1, 1] from time 0 on; None where there is no sound track, or it was not read.
        sample_rate: of `sound`, in Hz.
        duration: seconds.
        name: the path, or what else to call it.

    Raises:
        ValueError, TypeError: arrays of another shape or type, times that do not ascend.
    """

    frames: npt.NDArray[np.uint8]
    times: npt.NDArray[np.float64]
    sound: npt.NDArray[np.float32] | None
    sample_rate: int
    duration: float
    name: str

    def __post_init__(self) -> None:
        frames, times, sound = self.frames, self.times, self.sound
        if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8:
            got = frames.dtype if isinstance(frames, np.ndarray) else type(frames).__name__
            raise TypeError(f"Clip: frames must be a uint8 array, got {got}")
        if frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
            raise ValueError(f"Clip: frames must be [T, H, W, 3] with at least one pixel, got {list(frames.shape)}")
        if times.shape != (len(frames),) or not np.isfinite(times).all() or (np.diff(times) <= 0).any():
            raise ValueError(f"Clip: times must be {len(frames)} ascending numbers, got {times!r}")
        if sound is not None and (sound.ndim != 1 or sound.dtype != np.float32):
            raise ValueError(f"Clip: sound must be float32 [S], got {sound.dtype} {list(sound.shape)}")
        if self.sample_rate <= 0:
            raise ValueError(f"Clip: sample_rate must be positive, got {self.sample_rate}")

    @classmethod
    def from_frames(
        cls,
        frames: npt.NDArray[np.uint8],
        *,
        fps: float = 25.0,
        sound: npt.NDArray[np.float32] | None = None,
        sample_rate: int = 16000,
        name: str = "",
    ) -> Self:
        """A clip of frames [T, H, W, 3] that follow each other at `fps`."""
        if not fps > 0:
            raise ValueError(f"Clip.from_frames: fps must be positive, got {fps}")
        return cls(frames, np.arange(len(frames)) / fps, sound, sample_rate, len(frames) / fps, name)


#: A path, a file's bytes, or a decoded clip, which is taken as it is.
ClipItem: TypeAlias = "str | os.PathLike[str] | bytes | Clip"


@dataclass(frozen=True)
class Sampling:
    """Which frames of a clip are kept.

    Attributes:
        kind: "uniform": `amount` frames evenly spaced, the first and the last among them; "segments": the middle
            frames of `amount` parts of equal length (Wang et al., *Temporal Segment Networks*, ECCV 2016); "fps":
            what is on the screen `amount` times a second; "all".
        amount: a count, or a rate in Hz. A clip of fewer frames gives all of its frames, and none twice.
    """

    kind: Literal["uniform", "segments", "fps", "all"]
    amount: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("uniform", "segments", "fps", "all"):
            raise ValueError(f"Sampling: kind must be uniform, segments, fps or all, got {self.kind!r}")
        if self.kind in ("uniform", "segments") and (self.amount < 1 or self.amount != int(self.amount)):
            raise ValueError(f"Sampling: {self.kind} needs a positive whole number of frames, got {self.amount:g}")
        if self.kind == "fps" and not 0 < self.amount < float("inf"):
            raise ValueError(f"Sampling: fps needs a positive rate, got {self.amount:g}")

    @classmethod
    def parse(cls, spec: str | Sampling) -> Sampling:
        """ "uniform:16", "segments:8", "fps:4" or "all". Raises ValueError for anything else."""
        if isinstance(spec, Sampling):
            return spec
        kind, colon, amount = str(spec).partition(":")
        try:
            if kind == "all" and not colon:
                return cls("all")
            if kind in ("uniform", "segments", "fps"):
                return cls(kind, float(amount))  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"sampling {spec!r}: {error}") from error
        raise ValueError(f'sampling must be "uniform:N", "segments:N", "fps:R" or "all", got {spec!r}')

    def __str__(self) -> str:
        return self.kind if self.kind == "all" else f"{self.kind}:{self.amount:g}"

    def choose(self, times: Times) -> npt.NDArray[np.int64]:
        """The frames to keep, ascending and distinct, of frames shown at `times` [n], n >= 1."""
        if self.kind == "all":
            return np.arange(len(times))
        if self.kind == "fps":
            return at_rate(times, self.amount)
        return evenly(len(times), int(self.amount), ends=self.kind == "uniform")


def clip_name(item: ClipItem, index: int | None = None) -> str:
    """What to call a clip in a message: its path or name, or its place in the list."""
    if isinstance(item, (str, os.PathLike)):
        return str(os.fspath(item))
    if isinstance(item, Clip) and item.name:
        return item.name
    return "clip" if index is None else f"clips[{index}]"


def read_clip(
    source: ClipItem,
    sampling: str | Sampling = "uniform:16",
    *,
    size: int | None = None,
    sound: bool = False,
    sample_rate: int = 16000,
    max_bytes: int = MAX_BYTES,
) -> Clip:
    """Decode one clip.

    Args:
        source: a path or a file's bytes, in any format of libav. A `Clip` is returned as it is.
        sampling: "uniform:N", "segments:N", "fps:R" or "all"; see `Sampling`.
        size: the shorter side has at most this many pixels; None keeps the file's.
        sound: whether to decode the sound track.
        sample_rate: to which the sound is resampled.
        max_bytes: limit of the frames, and of the sound.

    Raises:
        ClipReadError: missing, empty, damaged, cut off, of an unknown format, without pictures, or too large.
        ValueError, TypeError: wrong arguments.
        ImportError: PyAV is missing; names the extra.

    Cost: the packets are read twice; from the key frame before each kept frame to that frame all are decoded.
    """
    options = _Options("read_clip", sampling, size, sound, sample_rate, max_bytes)
    return _read(source, None, options)


class _Options:
    """How clips are read: checked arguments of `read_clip`."""

    def __init__(
        self, function: str, sampling: str | Sampling, size: int | None, sound: bool, sample_rate: int, max_bytes: int
    ) -> None:
        numbers = {"size": 1 if size is None else size, "sample_rate": sample_rate, "max_bytes": max_bytes}
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{function}: {name} must be a positive int, got {value!r}")
        try:
            self.sampling = Sampling.parse(sampling)
        except ValueError as error:
            raise ValueError(f"{function}: {error}") from error
        self.size, self.sound, self.sample_rate, self.max_bytes = size, sound, sample_rate, max_bytes
        self.threads = 0  # of the decoder; 0: as many as it likes


def _read(source: Any, index: int | None, options: _Options) -> Clip:
    if isinstance(source, Clip):
        return source
    if not isinstance(source, (str, os.PathLike, bytes)):
        where = "source" if index is None else f"sources[{index}]"
        raise TypeError(f"read_clip: {where} must be a path, bytes or a Clip, got {type(source).__name__}")
    name = clip_name(source, index)
    data = source if isinstance(source, bytes) else str(os.fspath(source))
    rate, limit = options.sample_rate, options.max_bytes
    try:
        frames, times, duration, start = decode_frames(
            data, options.sampling.choose, options.size, limit, options.threads
        )
        track = decode_sound(data, rate, limit, start) if options.sound else None
    except DecodeError as error:
        raise ClipReadError(name, str(error)) from error
    return Clip(frames, times, track, rate, duration, name)


class ClipReader(Iterator[tuple[int, Clip]]):
    """What `read_clips` returns: an iterator of (index of the source, clip), in the order of the sources.

    Attributes:
        errors: (index, error) of the clips left out so far; empty unless on_error="skip".
    """

    def __init__(self, clips: Iterator[tuple[int, Clip | ClipReadError]], skip: bool) -> None:
        self._clips = clips
        self._skip = skip
        self.errors: list[tuple[int, ClipReadError]] = []

    def __next__(self) -> tuple[int, Clip]:
        for i, clip in self._clips:
            if isinstance(clip, Clip):
                return i, clip
            if not self._skip:
                self.close()
                raise clip
            self.errors.append((i, clip))
        raise StopIteration

    def close(self) -> None:
        """Stop decoding ahead."""
        close: Any = getattr(self._clips, "close", None)
        if close is not None:
            close()


def read_clips(
    sources: Sequence[ClipItem],
    sampling: str | Sampling = "uniform:16",
    *,
    size: int | None = None,
    sound: bool = False,
    sample_rate: int = 16000,
    max_bytes: int = MAX_BYTES,
    workers: int | None = None,
    on_error: Literal["raise", "skip"] = "raise",
) -> ClipReader:
    """Decode clips ahead of their use.

    Args:
        sources, sampling, size, sound, sample_rate, max_bytes: as `read_clip`.
        workers: threads that decode; None: one for each processor, at most 8; 0: decode when asked for. At most
            2 * workers clips are held beside the one in use.
        on_error: "raise" the error of an unreadable clip when its turn comes, or "skip" it and list it in `.errors`.

    Returns:
        An iterator of (index, clip) in the order of `sources`.

    Raises:
        ClipReadError: from the iterator; as `read_clip`.
        ValueError, TypeError: wrong arguments, at once.
    """
    function = "read_clips"
    options = _Options(function, sampling, size, sound, sample_rate, max_bytes)
    check_items(function, sources)
    if on_error not in ("raise", "skip"):
        raise ValueError(f'{function}: on_error must be "raise" or "skip", got {on_error!r}')
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 0):
        raise ValueError(f"{function}: workers must be None or an int of at least 0, got {workers!r}")
    count = min(8, available_cpus()) if workers is None else workers
    options.threads = 1 if count else 0  # the pool is what uses the other processors

    def read(i: int) -> Clip | ClipReadError:
        try:
            return _read(sources[i], i, options)
        except ClipReadError as error:
            return error

    return ClipReader(_ahead(read, len(sources), count), on_error == "skip")


def _ahead(read: Any, n: int, workers: int) -> Iterator[tuple[int, Clip | ClipReadError]]:
    if not workers:
        yield from ((i, read(i)) for i in range(n))
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="pycm-decode")
    try:
        waiting: deque[Future[Clip | ClipReadError]] = deque()
        begun = 0
        for i in range(n):
            while begun < min(n, i + 2 * workers):
                waiting.append(pool.submit(read, begun))
                begun += 1
            yield i, waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def stack_clips(clips: Iterable[Clip]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """(frames uint8 [S, H, W, 3] of all clips, one after another; cu_seqlens int64 [B + 1]: clip b has the frames
    cu_seqlens[b] to cu_seqlens[b + 1]).

    Raises:
        ValueError: no clip, or clips of different sizes.
    """
    held = list(clips)
    if not held:
        raise ValueError("stack_clips: clips is empty")
    for i, clip in enumerate(held):
        if clip.frames.shape[1:] != held[0].frames.shape[1:]:
            (h, w), (h0, w0) = clip.frames.shape[1:3], held[0].frames.shape[1:3]
            name = clip_name(clip, i)
            raise ValueError(f"stack_clips: clips must be of one size, {name} has {w} x {h}, the first {w0} x {h0}")
    lengths = [len(clip.frames) for clip in held]
    return np.concatenate([clip.frames for clip in held]), np.cumsum([0, *lengths], dtype=np.int64)


def write_clip(
    path: str | os.PathLike[str],
    frames: npt.NDArray[np.uint8],
    *,
    fps: float = 25.0,
    sound: npt.NDArray[np.float32] | None = None,
    sample_rate: int = 16000,
    crf: int = 18,
) -> None:
    """Write frames [T, H, W, 3], and sound [S] if any, to an MP4 file (H.264, AAC) that browsers play.

    Args:
        path: written under a temporary name and renamed.
        fps: frames a second.
        sound: float32, mono in [-1, 1].
        sample_rate: of `sound`; AAC takes 8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100 Hz and above.
        crf: quality of x264, from 0 (lossless) to 51.

    Raises:
        ValueError, TypeError: wrong arguments.
        OSError: untouched.
    """
    av = require("av", "video", "write_clip")
    clip = Clip.from_frames(frames, fps=fps, sound=sound, sample_rate=sample_rate)
    height, width = clip.frames.shape[1:3]
    with atomic_write(Path(path), "wb") as file, av.open(file, "w", format="mp4") as container:
        picture = container.add_stream(
            "libx264", rate=Fraction(fps).limit_denominator(10000), options={"crf": str(crf)}
        )
        picture.width, picture.height = width, height
        # Colour at half the resolution needs even sides.
        picture.pix_fmt = "yuv444p" if width % 2 or height % 2 else "yuv420p"
        picture.codec_context.thread_count = 1
        track = None if sound is None else container.add_stream("aac", rate=sample_rate, layout="mono")
        for pixels in clip.frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(picture.encode(frame))
        container.mux(picture.encode(None))
        if track is not None and sound is not None:
            samples = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound)[None], format="flt", layout="mono")
            samples.sample_rate, samples.pts = sample_rate, 0
            container.mux(track.encode(samples))
            container.mux(track.encode(None))
