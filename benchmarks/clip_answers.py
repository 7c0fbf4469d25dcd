"""The experiments of clips.py that have a right answer: what only time, or only sound, tells."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from clip_experiments import QUIET, Scores, json_lines

from pycm.bench.clip_tasks import OPPOSITES, Thumbnail, backwards, moving_digits, spoken_clips
from pycm.matchers import VideoTextMatcher
from pycm.streams import Appearance, ClipFeatures, Motion, Speech, encode_clips
from pycm.video import read_clip


def right_way(scores: Scores, captions: list[str], texts: list[str], opposite: dict[str, str]) -> float:
    """How often a clip's caption is above that of the reversed clip; a tie is half a right answer."""
    rows = np.arange(len(captions))
    own = scores[rows, [texts.index(caption) for caption in captions]]
    other = scores[rows, [texts.index(opposite[caption]) for caption in captions]]
    return float(np.mean((own > other) + 0.5 * np.isclose(own, other, rtol=0, atol=1e-5)))


def time_tasks(data: Path, cache: str) -> Any:
    rows = []
    small = {"hidden": 64, "dim": 64, "dropout": 0.1, "loss": "info_nce", "progress": False}
    for task, learn, test, opposite, epochs in (digit_directions(), clip_directions(data)):
        texts = sorted(set(test[1]))
        for system, options in (
            ("order-blind mean", {"cell": None, "pool": "mean"}),
            ("GRU", {"cell": "gru", "pool": "last"}),
        ):
            matcher = VideoTextMatcher(("appearance",), "words", **small, **options)
            matcher.fit(*learn, validation=None, epochs=epochs, lr=3e-3, batch_size=64)
            accuracy = right_way(matcher.scores(test[0], texts), test[1], texts, opposite)
            rows.append({"task": task, "system": system, "accuracy": round(accuracy, 4), "chance": 0.5})
            print(rows[-1], flush=True)
    return {"rows": rows}


def digit_directions() -> Any:
    stream = Appearance(Thumbnail())
    sets = []
    for seed, count in ((0, 240), (1, 60)):
        clips, captions = moving_digits(count, seed)
        sets.append((encode_clips([stream], clips), captions))
    opposite = {f"a digit {one}": f"a digit {other}" for one, other in OPPOSITES.items()}
    return "new digits that move, grow or shrink", *sets, opposite, 30


def clip_directions(data: Path) -> Any:
    """The same clips in training and test, by other frames of them: whether a known clip runs backwards."""
    items = json_lines(data / "emoji_clips" / "captions.jsonl")
    ways = ("it runs forwards", "it runs backwards")
    sets = []
    for sampling in ("uniform:16", "segments:16"):
        clips = [read_clip(data / "emoji_clips" / item["clip"], sampling) for item in items]
        pairs = [one for clip in clips for one in (clip, backwards(clip))]
        sets.append((encode_clips([Appearance(Thumbnail())], pairs), [*ways] * len(items)))
    return (
        "emoji clips forwards or backwards, other frames of them",
        *sets,
        dict(zip(ways, ways[::-1], strict=True)),
        60,
    )


#: Ways to learn: factors by which voices are moved in frequency, and epochs.
VOICES = {
    "as recorded": ((1.0,), 25),
    "in seven voices": ((0.8, 0.87, 0.94, 1.0, 1.07, 1.14, 1.21), 4),
}
SEEDS = 3  # matchers of the sound whose probabilities are averaged


def sound(data: Path, cache: str) -> Any:
    spoken = Spoken(data, cache)
    inner = {way: spoken.inner(*settings) for way, settings in VOICES.items()}
    print({way: np.round(accuracy, 2).tolist() for way, accuracy in inner.items()}, flush=True)
    rows, chosen = [], []
    for system in ("speech", "motion"):
        accuracies = []
        for n, speaker in enumerate(spoken.everyone):
            way, seeds = "as recorded", 1
            if system == "speech":
                way, seeds = max(VOICES, key=lambda name: np.nanmean(inner[name][n])), SEEDS
                chosen.append(f"{speaker} {way}")
            matchers = [spoken.fitted(system, (speaker,), *VOICES[way], seed=seed) for seed in range(seeds)]
            accuracies.append(spoken.accuracy(system, matchers, speaker, VOICES[way][0]))
            row = {"task": f"speaker {speaker}", "system": system, "accuracy": accuracies[-1], "chance": 0.1}
            print(row, way, flush=True)
            rows.append(row)
        mean = round(float(np.mean(accuracies)), 4)
        rows.append({"task": "mean of six speakers", "system": system, "accuracy": mean, "chance": 0.1})
    found = {way: round(float(np.nanmean(accuracy)), 4) for way, accuracy in inner.items()}
    return {"rows": rows, "chosen": chosen, "inner": found}


class Spoken:
    """Clips of called digits, each at three speeds and in all voices, and their speakers."""

    def __init__(self, data: Path, cache: str) -> None:
        recordings = sorted((data / "spoken_digits").glob("*.wav"))
        warps = sorted({warp for known, _ in VOICES.values() for warp in known})
        streams = [Speech(hop=0.02, bins=26, band=(100, 3500), warp=warp, name=f"{warp:g}") for warp in warps]
        with tempfile.TemporaryDirectory() as folder:
            files, self.captions, speakers = spoken_clips(recordings, Path(folder), speeds=(0.9, 1.0, 1.1), limit=3)
            every = encode_clips([*streams, Motion()], files, cache=cache)
        self.heard = {
            warp: ClipFeatures({"speech": every.streams[f"{warp:g}"]}, every.names, every.kept) for warp in warps
        }
        self.seen = every.select(["motion"])
        self.speakers = np.array(speakers)
        self.everyone = sorted(set(speakers))
        self.plain = np.array(["_1_" in path.stem for path in files])  # at the speed that was recorded

    def fitted(
        self, system: str, left_out: Sequence[str], warps: Sequence[float], epochs: int, seed: int = 0
    ) -> VideoTextMatcher:
        """A matcher that learned from all speakers but those left out."""
        learn = np.flatnonzero(~np.isin(self.speakers, left_out))
        parts = [self.heard[warp] if system == "speech" else self.seen for warp in warps]
        matcher = VideoTextMatcher(
            (system,), head="labels", hidden=64, dim=64, dropout=0.3, bidirectional=True, seed=seed, **QUIET
        )
        names = [self.captions[i] for i in learn] * len(warps)
        every = ClipFeatures.joined([part.take(learn) for part in parts])
        return matcher.fit(every, names, validation=None, epochs=epochs, lr=4e-3, batch_size=32)

    def accuracy(
        self, system: str, matchers: Sequence[VideoTextMatcher], speaker: str, warps: Sequence[float]
    ) -> float:
        """The share of a speaker's clips that is told right, by the mean probabilities of matchers and voices."""
        test = np.flatnonzero((self.speakers == speaker) & self.plain)
        parts = [(self.heard[warp] if system == "speech" else self.seen).take(test) for warp in warps]
        said = sum(matcher.predict_proba(part) for matcher in matchers for part in parts).argmax(axis=1)
        return float(np.mean([matchers[0].labels_[k] == self.captions[i] for k, i in zip(said, test, strict=True)]))

    def inner(self, warps: Sequence[float], epochs: int) -> Scores:
        """[6, 6]: how well speaker j's clips are told where neither i nor j was learned from; NaN for i = j.

        Row i is what may be known of a way to learn before speaker i is heard.
        """
        out = np.full((len(self.everyone),) * 2, np.nan, np.float32)
        for i, j in combinations(range(len(self.everyone)), 2):
            matcher = self.fitted("speech", (self.everyone[i], self.everyone[j]), warps, epochs)
            for own, other in ((i, j), (j, i)):
                out[own, other] = self.accuracy("speech", [matcher], self.everyone[other], warps)
        return out
