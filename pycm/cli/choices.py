"""What options can be chosen from."""

from __future__ import annotations

from enum import Enum


class MetricName(str, Enum):
    """The metrics, as choices of an option."""

    cosine = "cosine"
    dot = "dot"
    pearson = "pearson"
    euclidean = "euclidean"
    sqeuclidean = "sqeuclidean"


class SystemName(str, Enum):
    """The systems, as choices of an option."""

    image_text = "image-text"
    video_text = "video-text"
    image_video = "image-video"


class SplitName(str, Enum):
    """Parts of a file of pairs."""

    all = "all"
    train = "train"
    test = "test"


class CellName(str, Enum):
    """Recurrent cells."""

    gru = "gru"
    lstm = "lstm"
    none = "none"


class HeadName(str, Enum):
    """What ranks, or tells labels."""

    ranking = "ranking"
    pairs = "pairs"
    labels = "labels"


class GranularityName(str, Enum):
    """What of an image is compared with what of a text."""

    image = "image"
    region = "region"


class FusionName(str, Enum):
    """How the classifier of images and clips is told of the image."""

    h0 = "h0"
    steps = "steps"
    both = "both"


class PrecisionName(str, Enum):
    """In what a network is trained."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class ScoreName(str, Enum):
    """How regions are compared with words."""

    maxsim = "maxsim"
    cross_attention = "cross-attention"
