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
from pycm.streams import Appearance, Motion, Sound, Speech, Voice, encode_clips
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
            scores = matcher.scores(test[0], texts)
            accuracy = right_way(scores, test[1], texts, opposite)
            rows.append({"task": task, "system": system, "accuracy": round(accuracy, 4), "chance": 0.5})
            if len(texts) > 2:
                best = float(np.mean([texts[i] == text for i, text in zip(scores.argmax(1), test[1], strict=True)]))
                of_all = {"task": f"the same, of all {len(texts)} captions", "chance": round(1 / len(texts), 4)}
                rows.append({**of_all, "system": system, "accuracy": round(best, 4)})
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


#: What is heard of a sound track: one of these streams is chosen for each speaker, before that speaker is heard.
LISTENERS = ("speech", "voice, layer 1", "voice, layer 2", "voice, layer 3")
SEEDS = 5  # matchers whose probabilities are averaged


def sound(data: Path, cache: str) -> Any:
    spoken = Spoken(data, cache)
    inner = {name: spoken.inner(name) for name in LISTENERS}
    print({name: np.round(accuracy, 2).tolist() for name, accuracy in inner.items()}, flush=True)
    rows, chosen = [], []
    for system in ("the chosen stream", "speech", "sound", "motion"):
        accuracies = []
        for n, speaker in enumerate(spoken.everyone):
            stream = system
            if system == "the chosen stream":
                stream = max(LISTENERS, key=lambda name: np.nanmean(inner[name][n]))
                chosen.append(f"{speaker}: {stream}")
            accuracies.append(
                spoken.accuracy([spoken.fitted(stream, (speaker,), seed) for seed in range(SEEDS)], speaker)
            )
            row = {"task": f"speaker {speaker}", "system": system, "accuracy": accuracies[-1], "chance": 0.1}
            print(row, stream, flush=True)
            rows.append(row)
        mean = round(float(np.mean(accuracies)), 4)
        rows.append({"task": "mean of six speakers", "system": system, "accuracy": mean, "chance": 0.1})
    found = {name: round(float(np.nanmean(accuracy)), 4) for name, accuracy in inner.items()}
    return {"rows": rows, "chosen": chosen, "inner": found}


class Spoken:
    """Clips of called digits and their speakers: one call each to learn from, three different ones in a row to tell."""

    def __init__(self, data: Path, cache: str) -> None:
        recordings = sorted((data / "spoken_digits").glob("*.wav"))
        voices = [Voice(layer, name=f"voice, layer {layer}") for layer in (1, 2, 3)]
        streams = [Speech(hop=0.02, bins=26, band=(100, 3500)), *voices, Sound(), Motion()]
        sets = []
        for calls in (1, 3):
            with tempfile.TemporaryDirectory() as folder:
                files, captions, speakers = spoken_clips(recordings, Path(folder), calls=calls)
                sets.append((encode_clips(streams, files, cache=cache), captions, np.array(speakers)))
        self.known, self.asked = sets
        self.everyone = sorted(set(self.known[2]))

    def fitted(self, stream: str, left_out: Sequence[str], seed: int = 0) -> VideoTextMatcher:
        """A matcher that learned from all speakers but those left out."""
        clips, captions, speakers = self.known
        learn = np.flatnonzero(~np.isin(speakers, left_out))
        matcher = VideoTextMatcher(
            (stream,), head="labels", hidden=128, dim=64, dropout=0.5, input_dropout=0.5, bidirectional=True, seed=seed,
            **QUIET,
        )  # fmt: skip
        return matcher.fit(
            clips.select([stream]).take(learn), [captions[i] for i in learn], validation=None, epochs=40, lr=3e-3,
            batch_size=64, label_smoothing=0.1,
        )  # fmt: skip

    def accuracy(self, matchers: Sequence[VideoTextMatcher], speaker: str) -> float:
        """The share of a speaker's clips that is told right, by the mean probabilities of the matchers."""
        clips, captions, speakers = self.asked
        test = np.flatnonzero(speakers == speaker)
        heard = clips.select(matchers[0].streams).take(test)
        said = sum(matcher.predict_proba(heard) for matcher in matchers).argmax(axis=1)
        return float(np.mean([matchers[0].labels_[k] == captions[i] for k, i in zip(said, test, strict=True)]))

    def inner(self, stream: str) -> Scores:
        """[6, 6]: how well speaker j's clips are told where neither i nor j was learned from; NaN for i = j.

        Row i is what may be known of a stream before speaker i is heard.
        """
        out = np.full((len(self.everyone),) * 2, np.nan, np.float32)
        for i, j in combinations(range(len(self.everyone)), 2):
            matcher = self.fitted(stream, (self.everyone[i], self.everyone[j]))
            for own, other in ((i, j), (j, i)):
                out[own, other] = self.accuracy([matcher], self.everyone[other])
        return out
