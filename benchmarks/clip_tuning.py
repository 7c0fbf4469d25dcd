"""Whether training the encoders helps retrieval: still pictures and their names, encoders as they come and trained.

The matcher is `VideoTextMatcher` on clips of one frame. EfficientNet-Lite0 reads the pictures at their own 72 x 72
pixels, a tenth of the work of 224 x 224: this has to run on one processor in minutes.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from clip_experiments import figures, gain, json_lines

from pycm.encoders import EfficientNetLite0, FeatureCache, MiniLM
from pycm.encoders.images import load_image
from pycm.encoders.preprocess import ImagePreprocess
from pycm.evaluate import RetrievalMetrics, bootstrap, retrieval_metrics
from pycm.matchers import VideoTextMatcher
from pycm.streams import Appearance
from pycm.video import Clip

LEARNED, SEEDS = 300, 3
EPOCHS, LONG = 8, 40
SYSTEMS: dict[str, dict[str, Any]] = {
    f"heads alone, {EPOCHS} epochs": {},
    f"heads alone, {LONG} epochs": {"epochs": LONG},
    f"heads and image encoder, lr 1e-5, {EPOCHS} epochs": {"fine_tune": "appearance", "encoder_lr": 1e-5},
    f"heads and image encoder, lr 1e-4, {EPOCHS} epochs": {"fine_tune": "appearance", "encoder_lr": 1e-4},
    f"heads and text encoder, lr 1e-5, {EPOCHS} epochs": {"fine_tune": "text", "encoder_lr": 1e-5},
    f"heads and text encoder, lr 1e-4, {EPOCHS} epochs": {"fine_tune": "text", "encoder_lr": 1e-4},
}


def tuning(data: Path, cache: str) -> Any:
    items = json_lines(data / "emoji" / "captions.jsonl")
    digests = [int(hashlib.sha256(item["id"].encode()).hexdigest(), 16) for item in items]
    held = [item for item, digest in zip(items, digests, strict=True) if digest % 5 == 0]
    others = sorted((digest, i) for i, digest in enumerate(digests) if digest % 5)
    learned = [items[i] for _, i in others[:LEARNED]]
    clips, names = pictures(data, learned)
    test_clips, test_names = pictures(data, held)
    own = np.tile(np.arange(len(held)), 2 * SEEDS)
    found: dict[str, Any] = {}
    bases: list[RetrievalMetrics] = []  # the heads alone
    for name, options in SYSTEMS.items():
        runs, epochs = [], []
        for seed in range(SEEDS):
            matcher = VideoTextMatcher(
                [Appearance(small_efficientnet())], MiniLM(), cell=None, hidden=256, dim=256, loss="info_nce",
                sampling="all", cache=FeatureCache(cache), batch_size=64, seed=seed, progress=False,
            )  # fmt: skip
            fit = {"epochs": EPOCHS, "validation": 0.15, "batch_size": 16, "patience": None} | options
            matcher.fit(clips, names, **fit)
            scores = matcher.scores(test_clips, test_names)
            runs += [scores, scores.T]
            epochs.append(int(np.argmax([record["mrr"] for record in matcher.history_])))
        metrics = retrieval_metrics(np.concatenate(runs), own)
        drawn = bootstrap(metrics, samples=10_000, groups=own)
        found[name] = figures(metrics) | {
            "intervals": {
                key: [round(float(x), 4) for x in drawn[key]] for key in ("recall@1", "recall@5", "recall@10")
            },
            "gain": [gain(metrics, base, own) for base in bases],
            "best epochs": epochs,
        }
        if len(bases) < 2:
            bases.append(metrics)
        print(name, found[name], flush=True)
    return {"learned": LEARNED, "held out": len(held), "seeds": SEEDS, "baselines": list(SYSTEMS)[:2], "systems": found}


def small_efficientnet() -> EfficientNetLite0:
    encoder = EfficientNetLite0()
    scale: dict[str, Any] = {"mean": encoder.preprocess.mean, "std": encoder.preprocess.std}
    encoder.preprocess = ImagePreprocess(size=(72, 72), crop=1.0, **scale)
    return encoder


def pictures(data: Path, items: list[dict[str, Any]]) -> tuple[list[Clip], list[str]]:
    """Pictures as clips of one frame, and their English names."""
    clips = []
    for item in items:
        frame = np.asarray(load_image(data / "emoji" / item["image"]))
        clips.append(Clip.from_frames(frame[None], name=item["id"]))
    return clips, [item["captions"]["en"] for item in items]
