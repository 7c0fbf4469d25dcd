"""Clips that several test files use."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

av = pytest.importorskip("av")

from pycm.video import Clip  # noqa: E402


def levels(count: int, height: int = 16, width: int = 24) -> np.ndarray:
    """Frames that tell their number: grey level 40 + 5 t."""
    return np.stack([np.full((height, width, 3), 40 + 5 * t, np.uint8) for t in range(count)])


def numbers(frames: np.ndarray) -> list[int]:
    """The numbers of frames that `levels` made, through a codec."""
    return np.rint((frames[:, 4:-4, 4:-4].mean(axis=(1, 2, 3)) - 40) / 5).astype(int).tolist()


def encoded(
    frames: np.ndarray,
    container: str,
    codec: str,
    *,
    b_frames: int = 0,
    gop: int = 6,
    rotation: int = 0,
    aspect: Any = None,
) -> bytes:
    """A file of `frames` at 25 fps."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.gop_size = gop
        stream.codec_context.max_b_frames = b_frames
        stream.codec_context.options = {"qmin": "1", "qmax": "1"} if codec == "mpeg4" else {"crf": "10"}
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(rotation)
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode(None))
    return file.getvalue()


def with_sound(path: Path, frames: np.ndarray, sound: np.ndarray, *, rate: int, delay: float) -> None:
    """Frames at 25 fps in a Matroska file whose PCM sound track begins `delay` seconds after them."""
    with av.open(str(path), "w", format="matroska") as out:
        picture = out.add_stream("libx264", rate=25)
        picture.width, picture.height, picture.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        track = out.add_stream("pcm_s16le", rate=rate, layout="stereo")
        for frame in frames:
            out.mux(picture.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(picture.encode(None))
        pcm = np.repeat(np.rint(sound * 32767).astype(np.int16), 2)[None]
        samples = av.AudioFrame.from_ndarray(pcm, format="s16", layout="stereo")
        samples.sample_rate, samples.pts = rate, round(delay * rate)
        out.mux(track.encode(samples))
        out.mux(track.encode(None))


def shape(x: float, y: float, scale: float, angle: float, side: int = 96) -> np.ndarray:
    """A dark lopsided shape on white about (x, y), turned clockwise by `angle` degrees."""
    cv2 = pytest.importorskip("cv2")
    drawn = np.zeros((64, 64), np.float32)
    drawn[8:56, 20:44], drawn[8:24, 30:60] = 1, 0.6
    matrix = cv2.getRotationMatrix2D((32, 32), -angle, scale)
    matrix[:, 2] += np.array([x - 32, y - 32])
    moved = cv2.warpAffine(drawn, matrix, (side, side), flags=cv2.INTER_LINEAR)
    return np.repeat((255 - 200 * moved).astype(np.uint8)[..., None], 3, axis=2)


def moving(kind: str, steps: int = 10) -> Clip:
    """The shape going right by 4, down by 4, growing or shrinking by 7 %, or turning by 8 degrees a frame."""
    places = {
        "right": lambda t: (24 + 4 * t, 48, 0.6, 0),
        "down": lambda t: (48, 24 + 4 * t, 0.6, 0),
        "grow": lambda t: (48, 48, 0.4 * 1.07**t, 0),
        "shrink": lambda t: (48, 48, 0.8 * 0.93**t, 0),
        "turn": lambda t: (48, 48, 0.7, 8 * t),
    }
    return Clip.from_frames(np.stack([shape(*places[kind](t)) for t in range(steps)]), name=kind)
