"""Retrieval evaluation: metrics with a tie policy, named protocols, bootstrap intervals, corrections for hubs."""

from __future__ import annotations

from .hubness import csls, dual_softmax, inverted_softmax, qb_norm
from .intervals import Interval, bootstrap, bootstrap_difference
from .metrics import RetrievalMetrics, metrics_of_ranks, retrieval_metrics
from .protocols import CrossModalMetrics, coco_1k, coco_5k, five_captions, multi_caption_video, one_to_one

__all__ = [
    "CrossModalMetrics",
    "Interval",
    "RetrievalMetrics",
    "bootstrap",
    "bootstrap_difference",
    "coco_1k",
    "coco_5k",
    "csls",
    "dual_softmax",
    "five_captions",
    "inverted_softmax",
    "metrics_of_ranks",
    "multi_caption_video",
    "one_to_one",
    "qb_norm",
    "retrieval_metrics",
]
