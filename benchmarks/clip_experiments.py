"""The experiments of clips.py; each returns its figures as plain values."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pycm.bench.clip_tasks import OPPOSITES, Thumbnail, backwards, moving_digits, spoken_clips
from pycm.encoders import FeatureCache, MiniLM
from pycm.evaluate import RetrievalMetrics, bootstrap_difference, retrieval_metrics
from pycm.matchers import ImageVideoMatcher, VideoTextMatcher
from pycm.spaces import Ridge
from pycm.streams import Appearance, ClipFeatures, Motion, Speech, encode_clips
from pycm.video import read_clip

Scores = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
FOLDS = 5
STREAMS = ("appearance", "differences", "motion")
#: What is chosen from, beside the number of epochs, by folds of the clips that are learned from.
LOSSES, RATES = ("info_nce", "max_hinge"), (1e-4, 3e-4)
QUIET: dict[str, Any] = {"progress": False}
INNER: dict[str, Any] = {"validation": 3, "epochs": 20}


class Emoji:
    """The clips, and the still pictures, with their captions."""

    def __init__(self, data: Path, cache: str) -> None:
        self.cache = FeatureCache(cache)
        clips = _lines(data / "emoji_clips" / "captions.jsonl")
        images = _lines(data / "emoji" / "captions.jsonl")
        self.fold = np.array([int(hashlib.sha256(item["id"].encode()).hexdigest(), 16) % FOLDS for item in clips])
        self.paths = [data / "emoji_clips" / item["clip"] for item in clips]
        self.pictures = [data / "emoji" / item["image"] for item in images]
        self.captions = [item["captions"]["en"] for item in clips]
        self.names = [_names(item) for item in clips]
        self.picture_names = [_names(item) for item in images]
        place = {str(path): i for i, path in enumerate(self.pictures)}
        self.still = np.array([place[str(data / item["still"])] for item in clips])
        taken = set(self.still.tolist())
        self.others = np.array([i for i in range(len(images)) if i not in taken])
        self.chosen: list[str] = []

    def __len__(self) -> int:
        return len(self.paths)

    def folds(self) -> Iterator[tuple[Rows, Rows]]:
        """(rows to learn from, rows held out)."""
        for fold in range(FOLDS):
            yield np.flatnonzero(self.fold != fold), np.flatnonzero(self.fold == fold)

    def names_without(self, held: Rows) -> tuple[list[list[str]], list[list[str]]]:
        """Names of clips and of pictures, less the captions of what is held out."""
        unseen = {self.captions[i] for i in held}
        clips, pictures = (
            [[name for name in own if name not in unseen] for own in names]
            for names in (self.names, self.picture_names)
        )
        return clips, pictures

    def best(self, make: Callable[[str, Ridge], Any], starts: Sequence[Ridge], items: Any, others: Any) -> Any:
        """A fitted matcher: of best mean reciprocal rank by inner folds is first the linear start, then, from there,
        the loss, learning rate and number of epochs."""
        begun = [make(LOSSES[0], start).fit(items, others, **{**INNER, "epochs": 0}) for start in starts]
        start = max(begun, key=lambda matcher: matcher.history_[0]["mrr"]).space
        found = []
        for loss, rate in product(LOSSES, RATES):
            matcher = make(loss, start).fit(items, others, lr=rate, **INNER)
            ranks = [record["mrr"] for record in matcher.history_]
            epochs = int(np.argmax(ranks))
            found.append((ranks[epochs], f"{loss} {rate:g} {epochs} epochs", matcher))
        _, choice, matcher = max(found, key=lambda one: one[0])
        self.chosen.append(choice)
        return matcher

    def clips(self, streams: Any = STREAMS) -> ClipFeatures:
        return encode_clips(streams, self.paths, cache=self.cache)

    def clips_and_pictures(self) -> ClipFeatures:
        """Pictures as clips of one frame, after the clips."""
        return encode_clips(STREAMS, [*self.paths, *self.pictures], cache=self.cache)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _names(item: dict[str, Any]) -> list[str]:
    names = [item["captions"]["en"], *(alias.replace("_", " ") for alias in item["aliases"])]
    return list(dict.fromkeys(names))


# Retrieval

Both = tuple[Scores, Scores]


def crossed(emoji: Emoji, scores_of: Callable[[Rows, Rows], Scores]) -> Both:
    """Scores [187, 187] of each query in the fold that held it out: others as queries, clips as queries.

    `scores_of(learn, held)` gives the scores of all clips with all others.
    """
    there, back = (np.zeros((len(emoji), len(emoji)), np.float32) for _ in range(2))
    for learn, held in emoji.folds():
        scores = scores_of(learn, held)
        there[held], back[held] = scores.T[held], scores[held]
    return there, back


def compare(
    emoji: Emoji, directions: tuple[str, str], systems: dict[str, Callable[[Rows, Rows], Scores]], baselines: int = 1
) -> Any:
    """The figures of all systems, and what each gains over the first `baselines` of them."""
    hidden = np.where(emoji.fold[:, None] == emoji.fold, 0, -np.inf).astype(np.float32)
    galleries = {"unseen": hidden, "all": np.zeros_like(hidden)}
    own = np.arange(len(emoji))
    found: dict[str, Any] = {}
    bases: list[tuple[str, dict[str, RetrievalMetrics]]] = []
    for name, system in systems.items():
        scores = crossed(emoji, system)
        row: dict[str, Any] = {way: {} for way in directions}
        both: dict[str, RetrievalMetrics] = {}
        for gallery, mask in galleries.items():
            for way, matrix in zip(directions, scores, strict=True):
                row[way][gallery] = figures(retrieval_metrics(matrix + mask, own))
            stacked = np.concatenate([matrix + mask for matrix in scores])
            both[gallery] = retrieval_metrics(stacked, np.tile(own, 2))
        row["gain"] = {
            gallery: [gain(both[gallery], base[gallery], np.tile(own, 2)) for _, base in bases] for gallery in galleries
        }
        if len(bases) < baselines:
            bases.append((name, both))
        found[name] = row
        print(name, {way: row[way]["unseen"] for way in directions}, row["gain"], flush=True)
    return {"directions": list(directions), "baselines": [name for name, _ in bases], "systems": found}


def gain(system: RetrievalMetrics, base: RetrievalMetrics, groups: Rows) -> list[float]:
    """Of the mean reciprocal rank, with its 95 % interval."""
    difference = bootstrap_difference(system, base, samples=10_000, groups=groups)
    return [round(float(x), 4) for x in difference["mrr"]]


def figures(metrics: RetrievalMetrics) -> dict[str, float]:
    recalls = {f"recall@{k}": float(value) for k, value in metrics.recall_at_k.items()}
    return {name: round(value, 4) for name, value in {**recalls, "mrr": metrics.mrr}.items()}


def cosines(a: Any, b: Any) -> Scores:
    a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (a, b))
    return (a @ b.T).astype(np.float32)


def text(data: Path, cache: str) -> Any:
    emoji = Emoji(data, cache)
    every = emoji.clips_and_pictures()
    means = every.streams["appearance"].means()
    own = np.arange(len(emoji))
    encoder = MiniLM()
    captions = emoji.cache.encode(encoder, emoji.captions, progress=False).features

    def ridge(kernel: Any, pictures: bool = False) -> Callable[[Rows, Rows], Scores]:
        def scores(learn: Rows, held: Rows) -> Scores:
            rows, names = learn, [[emoji.captions[i]] for i in learn]
            if pictures:  # with all their names, and all but those of the held-out things
                more = np.concatenate([emoji.others, emoji.still[learn]])
                names_of, picture_names = emoji.names_without(held)
                more = more[[bool(picture_names[i]) for i in more]]
                rows = np.concatenate([learn, len(emoji) + more])
                names = [names_of[i] for i in learn] + [picture_names[i] for i in more]
            flat = [name for own_names in names for name in own_names]
            owner = np.repeat(np.arange(len(rows)), [len(own_names) for own_names in names])
            features = emoji.cache.encode(encoder, flat, progress=False).features
            pairs = np.stack([owner, np.arange(len(flat))], axis=1)
            space = Ridge(kernel=kernel).fit(means[rows], features, pairs)
            return cosines(space.transform_images(means[own]), space.transform_texts(captions))

        return scores

    def network(learn: Rows, held: Rows) -> Scores:
        names = emoji.names_without(held)[0]

        def make(loss: str, space: Ridge) -> VideoTextMatcher:
            return VideoTextMatcher(STREAMS, encoder, space=space, loss=loss, hidden=128, cache=emoji.cache, **QUIET)

        matcher = emoji.best(make, (Ridge(), Ridge(kernel="rbf")), every.take(learn), [names[i] for i in learn])
        return np.asarray(matcher.scores(every.take(own), emoji.captions))

    kept = {name: Kept(emoji, system) for name, system in (("network", network), ("pictures", ridge("rbf", True)))}
    found = compare(
        emoji,
        ("text to clip", "clip to text"),
        {
            "mean of frames + ridge": ridge("linear"),
            "mean of frames + kernel ridge": ridge("rbf"),
            "VideoTextMatcher": kept["network"],
            "kernel ridge, the other pictures as well": kept["pictures"],
            "VideoTextMatcher + that ridge": lambda learn, held: (
                kept["network"](learn, held) + kept["pictures"](learn, held)
            ),
        },
    )
    return {**found, "chosen": emoji.chosen}


class Kept:
    """A system whose scores are computed once for each fold."""

    def __init__(self, emoji: Emoji, system: Callable[[Rows, Rows], Scores]) -> None:
        self.emoji, self.system = emoji, system
        self.scores: dict[int, Scores] = {}

    def __call__(self, learn: Rows, held: Rows) -> Scores:
        fold = int(self.emoji.fold[held[0]])
        if fold not in self.scores:
            self.scores[fold] = self.system(learn, held)
        return self.scores[fold]


def streams(data: Path, cache: str) -> Any:
    emoji = Emoji(data, cache)
    every = emoji.clips((*STREAMS, "pixel-differences"))
    encoder = MiniLM()

    def network(**options: Any) -> Callable[[Rows, Rows], Scores]:
        arguments = {"streams": STREAMS, "hidden": 64, "dim": 64, "cell": "gru", "pool": "mean"} | options

        def scores(learn: Rows, held: Rows) -> Scores:
            matcher = VideoTextMatcher(text_encoder=encoder, loss="info_nce", cache=emoji.cache, **QUIET, **arguments)
            names = emoji.names_without(held)[0]
            matcher.fit(
                every.take(learn), [names[i] for i in learn], validation=None, epochs=25, lr=2e-3, batch_size=64
            )
            return matcher.scores(every, emoji.captions)

        return scores

    systems = {"appearance + differences + motion, GRU, mean": network()}
    systems |= {name: network(streams=(name,)) for name in (*STREAMS, "pixel-differences")}
    for left_out in STREAMS:
        systems[f"without {left_out}"] = network(streams=[name for name in STREAMS if name != left_out])
    systems |= {f"pool {pool}": network(pool=pool) for pool in ("max", "last", "meanmax", "attention", "gpo")}
    systems |= {"cell lstm": network(cell="lstm"), "no cell: steps in any order": network(cell=None)}
    return compare(emoji, ("text to clip", "clip to text"), systems)


def image(data: Path, cache: str) -> Any:
    emoji = Emoji(data, cache)
    every = emoji.clips_and_pictures()
    means = every.streams["appearance"].means()
    clips, pictures = means[: len(emoji)], means[len(emoji) :]
    stills = pictures[emoji.still]
    paths = [emoji.pictures[i] for i in emoji.still]
    features = every.take(np.arange(len(emoji)))

    def plain(learn: Rows, held: Rows) -> Scores:
        return cosines(clips, stills)

    def ridge(toward: Any) -> Callable[[Rows, Rows], Scores]:
        def scores(learn: Rows, held: Rows) -> Scores:
            space = Ridge(toward=toward).fit(stills[learn], clips[learn])
            return cosines(space.transform_texts(clips), space.transform_images(stills))

        return scores

    def aligned(learn: Rows, held: Rows) -> Scores:
        """Each style relative to its own mean and deviation, which need no pairs."""
        seen = pictures[np.concatenate([emoji.others, emoji.still[learn]])]
        return cosines(
            (clips - clips[learn].mean(0)) / (clips[learn].std(0) + 0.02),
            (stills - seen.mean(0)) / (seen.std(0) + 0.02),
        )

    def network(learn: Rows, held: Rows) -> Scores:
        def make(loss: str, space: Ridge) -> ImageVideoMatcher:
            options: dict[str, Any] = {"head": "ranking", "space": space, "hidden": 128}
            return ImageVideoMatcher(streams=STREAMS, loss=loss, cache=emoji.cache, **options, **QUIET)  # type: ignore[arg-type]

        matcher = emoji.best(make, (Ridge(), Ridge(toward="identity")), [paths[i] for i in learn], features.take(learn))
        return np.asarray(matcher.scores(paths, features)).T

    linear = ridge("zero")
    found = compare(
        emoji,
        ("image to clip", "clip to image"),
        {
            "mean of frames + cosine": plain,
            "mean of frames + ridge": linear,
            "styles aligned, cosine": aligned,
            "ridge + aligned cosine": lambda learn, held: linear(learn, held) + aligned(learn, held),
            "mean of frames + ridge toward the identity": ridge("identity"),
            "ImageVideoMatcher": network,
        },
        baselines=2,
    )
    return {**found, "chosen": emoji.chosen}


# Tasks with a right answer


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
    items = _lines(data / "emoji_clips" / "captions.jsonl")
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
SEEDS = 3  # matchers whose probabilities are averaged


def sound(data: Path, cache: str) -> Any:
    spoken = Spoken(data, cache)
    inner = {way: spoken.inner(*settings) for way, settings in VOICES.items()}
    rows, chosen = [], []
    for system in ("speech", "motion"):
        accuracies = []
        for n, speaker in enumerate(spoken.everyone):
            way = max(VOICES, key=lambda name: np.nanmean(inner[name][n])) if system == "speech" else "as recorded"
            if system == "speech":
                chosen.append(f"{speaker} {way}")
            matchers = [spoken.fitted(system, (speaker,), *VOICES[way], seed=seed) for seed in range(SEEDS)]
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


PARTS: dict[str, Callable[[Path, str], Any]] = {
    "text": text,
    "streams": streams,
    "image": image,
    "time": time_tasks,
    "sound": sound,
}
