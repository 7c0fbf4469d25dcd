"""Pictures and clips as data URIs, small enough to be passed on by the hundred."""

from __future__ import annotations

import base64
import io
import os
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .._decode import DecodeError, Sound, Times, at_rate, decode_frames, decode_sound
from .._optional import require
from ..encoders import ImageItem, load_image
from ..video import MAX_BYTES, ClipReadError, clip_name

# What every browser plays first: of pictures and of sound, and the container.
_CODECS = (("libx264", "aac", "mp4"), ("libvpx-vp9", "libopus", "webm"))
_SAMPLE_RATE = 16000


class MovingPicture(NamedTuple):
    """Data URIs: the clip and its first frame. `sound`: whether the clip has any."""

    clip: str
    still: str
    sound: bool = False


def picture(item: ImageItem, size: int) -> str:
    """An image as a data URI, at most `size` pixels wide and high; JPEG, or PNG where that is smaller.

    Raises:
        ImageReadError: it cannot be read.
    """
    image = load_image(item)
    image.thumbnail((size, size))
    encoded = {}
    for kind, options in (("jpeg", {"quality": 82, "optimize": True}), ("png", {"optimize": True})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        encoded[kind] = buffer.getvalue()
    kind, data = min(encoded.items(), key=lambda pair: len(pair[1]))
    return data_uri(f"image/{kind}", data)


def moving_picture(
    source: str | os.PathLike[str] | bytes, size: int, *, seconds: float = 6.0, fps: float = 12.5, sound: bool = False
) -> MovingPicture:
    """The first `seconds` of a clip, its shorter side at most `size` pixels, with at most `fps` frames a second; with
    its sound, mono at 16 kHz, if asked for.

    H.264 and AAC in MP4, or VP9 and Opus in WebM where PyAV was built without x264. What comes after is not decoded.

    Raises:
        ClipReadError: it cannot be read; names the file and the reason.
        ImportError: without PyAV.
    """
    data = source if isinstance(source, bytes) else os.fspath(source)

    def choose(times: Times) -> npt.NDArray[np.int64]:
        return at_rate(times[times - times[0] < seconds], fps)

    try:
        frames, times, _, start = decode_frames(data, choose, size, MAX_BYTES, 1)
        track = decode_sound(data, _SAMPLE_RATE, MAX_BYTES, start, seconds) if sound else None
    except DecodeError as error:
        raise ClipReadError(clip_name(source), str(error)) from error
    rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else fps
    if track is not None:
        track = track[: round(len(frames) / rate * _SAMPLE_RATE)]  # it ends with the pictures: a clip is played again
    heard = track is not None and len(track) > 0
    clip = encode_clip(frames, rate, sound=track if heard else None)
    return MovingPicture(clip, picture(frames[0], max(frames.shape[1:3])), heard)


def encode_clip(frames: npt.NDArray[np.uint8], fps: float, *, sound: Sound | None = None) -> str:
    """Frames uint8 ``[T, H, W, 3]`` as a data URI of a clip; with sound float32 ``[S]``, mono at 16 kHz, if given.

    Sides are made even, as 4:2:0 wants them.
    """
    av = require("av", "video", "a clip in a report")
    known = [codecs for codecs in _CODECS if codecs[0] in av.codecs_available]
    if not known:
        raise RuntimeError(f"encode_clip: this PyAV has neither {' nor '.join(codecs[0] for codecs in _CODECS)}")
    codec, voice, container = known[0]
    pad = [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)]
    frames = np.pad(frames, pad, mode="edge")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.options = {"crf": "27" if container == "mp4" else "38", "threads": "1"}
        if container == "mp4":
            stream.options |= {"preset": "medium", "profile": "main"}
        track = None if sound is None else output.add_stream(voice, rate=_SAMPLE_RATE, layout="mono")
        if track is not None:
            track.bit_rate = 32000
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")))
        output.mux(stream.encode())
        if track is not None:
            samples = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound)[None], format="flt", layout="mono")
            samples.sample_rate, samples.pts = _SAMPLE_RATE, 0
            output.mux(track.encode(samples))
            output.mux(track.encode())
    return data_uri(f"video/{container}", buffer.getvalue())


def data_uri(kind: str, data: bytes) -> str:
    """`data` of media type `kind`, in base64."""
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
