"""Pictures and clips as data URIs, small enough to be passed on by the hundred."""

from __future__ import annotations

import base64
import io
import os
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .._decode import DecodeError, Times, at_rate, decode_frames
from .._optional import require
from ..encoders import ImageItem, load_image
from ..video import MAX_BYTES, ClipReadError, clip_name

_CODECS = (("libx264", "mp4"), ("libvpx-vp9", "webm"))  # what every browser plays first


class MovingPicture(NamedTuple):
    """Data URIs: the clip, silent, and its first frame."""

    clip: str
    still: str


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
    source: str | os.PathLike[str] | bytes, size: int, *, seconds: float = 6.0, fps: float = 12.5
) -> MovingPicture:
    """The first `seconds` of a clip, its shorter side at most `size` pixels, with at most `fps` frames a second.

    H.264 in MP4, or VP9 in WebM where PyAV was built without x264. What comes after is not decoded.

    Raises:
        ClipReadError: it cannot be read; names the file and the reason.
        ImportError: without PyAV.
    """
    data = source if isinstance(source, bytes) else os.fspath(source)

    def choose(times: Times) -> npt.NDArray[np.int64]:
        return at_rate(times[times - times[0] < seconds], fps)

    try:
        frames, times, _, _ = decode_frames(data, choose, size, MAX_BYTES, 1)
    except DecodeError as error:
        raise ClipReadError(clip_name(source), str(error)) from error
    rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else fps
    return MovingPicture(encode_clip(frames, rate), picture(frames[0], max(frames.shape[1:3])))


def encode_clip(frames: npt.NDArray[np.uint8], fps: float) -> str:
    """Frames uint8 ``[T, H, W, 3]`` as a data URI of a silent clip. Sides are made even, as 4:2:0 wants them."""
    av = require("av", "video", "a clip in a report")
    codec, container = next(((c, k) for c, k in _CODECS if c in av.codecs_available), (None, None))
    if codec is None:
        raise RuntimeError(f"encode_clip: this PyAV has neither {' nor '.join(c for c, _ in _CODECS)}")
    pad = [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)]
    frames = np.pad(frames, pad, mode="edge")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.options = {"crf": "27" if container == "mp4" else "38", "threads": "1"}
        if container == "mp4":
            stream.options |= {"preset": "medium", "profile": "main"}
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")))
        output.mux(stream.encode())
    return data_uri(f"video/{container}", buffer.getvalue())


def data_uri(kind: str, data: bytes) -> str:
    """`data` of media type `kind`, in base64."""
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
