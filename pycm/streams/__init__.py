"""Streams: clips as sequences of features in time, several beside each other, and the cache that keeps them.

Importing this package imports NumPy only; OpenCV, PyAV, torch and the rest are imported by the stream that needs them,
when it is made, or when a file is read.
"""

from .appearance import Appearance
from .base import DerivedStream, Stream
from .differences import FeatureDifferences, PixelDifferences
from .encode import ClipFeatures, encode_clips
from .motion import Motion
from .registry import get_stream, get_streams, known_streams, stream_name
from .sequences import Sequences, align, concatenate
from .sound import Sound
from .speech import Speech
from .voice import Voice

__all__ = [
    "Appearance",
    "ClipFeatures",
    "DerivedStream",
    "FeatureDifferences",
    "Motion",
    "PixelDifferences",
    "Sequences",
    "Sound",
    "Speech",
    "Stream",
    "Voice",
    "align",
    "concatenate",
    "encode_clips",
    "get_stream",
    "get_streams",
    "known_streams",
    "stream_name",
]
