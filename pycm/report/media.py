"""Pictures and clips as data URIs, small enough to be passed on by the hundred."""

from __future__ import annotations

import base64
import io
import os
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .._optional import require
from ..encoders import ImageItem, load_image

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
    """The first `seconds` of a clip, at most `size` pixels wide and high and `fps` frames a second.

    H.264 in MP4, or VP9 in WebM where PyAV was built without x264. What comes after is not decoded.

    Raises:
        ValueError: it cannot be read; names the file and the reason.
        ImportError: without PyAV.
    """
    frames, rate = _first_frames(source, size, seconds, fps)
    return MovingPicture(encode_clip(frames, rate), picture(frames[0], size))


def encode_clip(frames: npt.NDArray[np.uint8], fps: float) -> str:
    """Frames uint8 ``[T, H, W, 3]`` as a data URI of a silent clip. Sides are made even, as 4:2:0 wants them."""
    av = _av()
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


def _first_frames(
    source: str | os.PathLike[str] | bytes, size: int, seconds: float, fps: float
) -> tuple[npt.NDArray[np.uint8], float]:
    """(frames, frames a second): those of the file, or fewer where it has more than `fps`."""
    av = _av()
    name = "clip" if isinstance(source, bytes) else os.fspath(source)
    opened: Any = io.BytesIO(source) if isinstance(source, bytes) else str(Path(source))
    kept: list[npt.NDArray[np.uint8]] = []
    try:
        with av.open(opened) as container:
            if not container.streams.video:
                raise ValueError("no video stream")
            stream = container.streams.video[0]
            rate = min(float(stream.average_rate or fps), fps)
            start = None
            for frame in container.decode(stream):
                at = len(kept) / rate if frame.time is None else frame.time
                start = at if start is None else start
                if at - start >= seconds:
                    break
                if (at - start) * rate >= len(kept) - 1e-6:
                    scale = min(1.0, size / max(frame.width, frame.height))
                    wide, high = (max(2, round(side * scale)) for side in (frame.width, frame.height))
                    kept.append(frame.reformat(wide, high, "rgb24").to_ndarray())
    except (av.error.FFmpegError, ValueError) as error:
        raise ValueError(f"moving_picture: cannot read {name}: {getattr(error, 'strerror', None) or error}") from error
    if not kept:
        raise ValueError(f"moving_picture: cannot read {name}: it has no frames")
    return np.stack(kept), rate


def _av() -> Any:
    return require("av", "video", "a clip in a report")
