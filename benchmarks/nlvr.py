"""Sentences true or false of an image, on NLVR (Suhr et al. 2017): `RegionTextClassifier` beside the majority class.

    python benchmarks/nlvr.py --data $PYCM_DATA --out benchmarks/results/nlvr.json

An image is three boxes of coloured shapes. Regions are the given boxes of its objects and the three that hold them
("boxes"), or the 49 cells of the network's grid over the whole image ("grid"). A pair is a test pair when
``int(sha256(id).hexdigest(), 16) % 5 == 0``. Intervals are 95 % percentile bootstraps over the test pairs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from pycm._files import atomic_write
from pycm.encoders import EfficientNetLite0
from pycm.matchers import Boxes, RegionTextClassifier

SAMPLES = 10_000
WIDTH, GAP = 100, 150  # of one of the three boxes, and from one to the next


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder that holds nlvr/")
    parser.add_argument("--out", type=Path, help="a .json file for the results")
    parser.add_argument("--cache", type=Path, help="a folder where features are kept")
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    folder = options.data / "nlvr"
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    test = np.array([int(hashlib.sha256(pair["id"].encode()).hexdigest(), 16) % 5 == 0 for pair in pairs])
    truth = np.array([pair["label"] == "true" for pair in pairs])
    texts = np.array([pair["sentence"] for pair in pairs], object)
    majority = truth[~test].mean() > 0.5
    right = {"majority class": [truth[test] == majority]}
    began = time.perf_counter()
    for name in ("boxes", "grid"):
        images = np.empty(len(pairs), object)
        images[:] = [
            Boxes(folder / pair["image"], boxes(pair)) if name == "boxes" else folder / pair["image"] for pair in pairs
        ]
        right[name] = []
        for seed in range(options.seeds):
            encoder: Any = "efficientnet-lite0" if name == "boxes" else EfficientNetLite0(fit="squash")
            model = RegionTextClassifier(encoder, cache=options.cache, seed=seed)
            model.fit(images[~test], texts[~test], truth[~test], epochs=40, batch_size=32)
            right[name].append(model.predict(images[test], texts[test]) == truth[test])
    results = {
        "train": int((~test).sum()),
        "test": int(test.sum()),
        "seconds": round(time.perf_counter() - began, 1),
        "accuracy": {name: accuracy(np.array(runs), np.array(right["majority class"])) for name, runs in right.items()},
    }
    print(json.dumps(results, indent=1))
    if options.out is not None:
        with atomic_write(options.out) as file:
            file.write(json.dumps(results, indent=1) + "\n")


def boxes(pair: dict[str, Any]) -> list[list[int]]:
    """The three boxes, and every object's in them: left, top, right, bottom."""
    found = [[GAP * i, 0, GAP * i + WIDTH, WIDTH] for i in range(3)]
    for i, objects in enumerate(pair["objects"]):
        for one in objects:
            left, top, size = GAP * i + one["x_loc"], one["y_loc"], one["size"]
            found.append([left, top, left + size, top + size])
    return found


def accuracy(right: Any, majority: Any) -> dict[str, Any]:
    """The mean over the seeds of the share of right answers, and of its difference from the majority class."""
    rows = np.random.default_rng(0).integers(0, right.shape[1], (SAMPLES, right.shape[1]))
    share = right.mean(0)
    ahead = share - majority.mean(0)
    return {
        "value": share.mean(),
        "interval": np.percentile(share[rows].mean(1), [2.5, 97.5]).tolist(),
        "over majority": ahead.mean(),
        "over majority interval": np.percentile(ahead[rows].mean(1), [2.5, 97.5]).tolist(),
        "seeds": right.mean(1).tolist(),
    }


if __name__ == "__main__":
    main()
