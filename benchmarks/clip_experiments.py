"""The experiments of clips.py in retrieval; each returns its figures as plain values."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pycm.encoders import FeatureCache, MiniLM
from pycm.evaluate import RetrievalMetrics, bootstrap_difference, retrieval_metrics
from pycm.matchers import ImageVideoMatcher, VideoTextMatcher
from pycm.spaces import HubnessCorrection, Identity, Ridge
from pycm.streams import ClipFeatures, encode_clips

Scores = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
FOLDS = 5
STREAMS = ("appearance", "differences", "motion")
#: What is chosen from, beside the number of epochs, by folds of the clips that are learned from.
LOSSES, RATES = ("info_nce", "max_hinge"), (1e-4, 3e-4)
QUIET: dict[str, Any] = {"progress": False}
CORRECTED: dict[str, Any] = {"embedding_space": HubnessCorrection(Identity())}
POOLS = ("max", "last", "first", "lastmean", "meanmax", "attention", "gpo")  # beside the mean
INNER: dict[str, Any] = {"validation": 3, "epochs": 20}


class Emoji:
    """The clips, and the still pictures, with their captions."""

    def __init__(self, data: Path, cache: str) -> None:
        self.cache = FeatureCache(cache)
        clips = json_lines(data / "emoji_clips" / "captions.jsonl")
        images = json_lines(data / "emoji" / "captions.jsonl")
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

    def best(
        self, make: Callable[[str, Ridge], Any], starts: Sequence[Ridge], items: Any, others: Any
    ) -> tuple[Any, Any]:
        """A linear start alone, and a fitted matcher: of best mean reciprocal rank by inner folds is first that start,
        then, from there, the loss, learning rate and number of epochs."""
        begun = [make(LOSSES[0], start).fit(items, others, **{**INNER, "epochs": 0}) for start in starts]
        start = max(begun, key=lambda matcher: matcher.history_[0]["mrr"])
        found = []
        for loss, rate in product(LOSSES, RATES):
            matcher = make(loss, start.space).fit(items, others, lr=rate, **INNER)
            ranks = [record["mrr"] for record in matcher.history_]
            epochs = int(np.argmax(ranks))
            found.append((ranks[epochs], f"{loss} {rate:g} {epochs} epochs", matcher))
        _, choice, matcher = max(found, key=lambda one: one[0])
        self.chosen.append(choice)
        return start, matcher

    def clips(self, streams: Any = STREAMS) -> ClipFeatures:
        return encode_clips(streams, self.paths, cache=self.cache)

    def clips_and_pictures(self) -> ClipFeatures:
        """Pictures as clips of one frame, after the clips."""
        return encode_clips(STREAMS, [*self.paths, *self.pictures], cache=self.cache)


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _names(item: dict[str, Any]) -> list[str]:
    names = [item["captions"]["en"], *(alias.replace("_", " ") for alias in item["aliases"])]
    return list(dict.fromkeys(names))


# Retrieval

Both = tuple[Scores, Scores]
START = "the linear start of the next row"
HUBS = ", less hubs"


def crossed(emoji: Emoji, scores_of: Callable[[Rows, Rows], Scores]) -> Both:
    """Scores [187, 187] of each query in the fold that held it out: others as queries, clips as queries.

    `scores_of(learn, held)` gives the scores of all clips with all others.
    """
    there, back = (np.zeros((len(emoji), len(emoji)), np.float32) for _ in range(2))
    for learn, held in emoji.folds():
        scores = scores_of(learn, held)
        there[held], back[held] = scores.T[held], scores[held]
    return there, back


def per_fold(emoji: Emoji) -> Callable[[Callable[[Rows, Rows], Any]], Callable[[Rows, Rows], Any]]:
    """Of a system: its answer is computed once for each fold."""

    def decorate(system: Callable[[Rows, Rows], Any]) -> Callable[[Rows, Rows], Any]:
        found: dict[int, Any] = {}

        def kept(learn: Rows, held: Rows) -> Any:
            fold = int(emoji.fold[held[0]])
            if fold not in found:
                found[fold] = system(learn, held)
            return found[fold]

        return kept

    return decorate


def compare(
    emoji: Emoji,
    directions: tuple[str, str],
    systems: dict[str, Callable[[Rows, Rows], Scores]],
    baselines: Sequence[str],
) -> Any:
    """The figures of all systems, and what each gains over the baselines before it."""
    hidden = np.where(emoji.fold[:, None] == emoji.fold, 0, -np.inf).astype(np.float32)
    galleries = {"unseen": hidden, "all": np.zeros_like(hidden)}
    own = np.arange(len(emoji))
    found: dict[str, Any] = {}
    bases: list[dict[str, RetrievalMetrics]] = []
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
            gallery: [gain(both[gallery], base[gallery], np.tile(own, 2)) for base in bases] for gallery in galleries
        }
        if name in baselines:
            bases.append(both)
        found[name] = row
        print(name, {way: row[way]["unseen"] for way in directions}, row["gain"], flush=True)
    return {"directions": list(directions), "baselines": list(baselines), "systems": found}


def gain(system: RetrievalMetrics, base: RetrievalMetrics, groups: Rows) -> list[float]:
    """Of the mean reciprocal rank, with its 95 % interval."""
    difference = bootstrap_difference(system, base, samples=10_000, groups=groups)
    return [round(float(x), 4) for x in difference["mrr"]]


def figures(metrics: RetrievalMetrics) -> dict[str, float]:
    recalls = {f"recall@{k}": float(value) for k, value in metrics.recall_at_k.items()}
    return {name: round(value, 4) for name, value in {**recalls, "mrr": metrics.mrr}.items()}


def without_correction(matcher: Any) -> Any:
    """The same matcher, ranking by its embeddings alone: it was trained as without the correction."""
    plain = copy.copy(matcher)
    plain.embedding_space_ = None
    return plain


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

    @per_fold(emoji)
    def network(learn: Rows, held: Rows) -> tuple[Scores, Scores, Scores]:
        names = emoji.names_without(held)[0]

        def make(loss: str, space: Ridge) -> VideoTextMatcher:
            options: dict[str, Any] = {"space": space, "loss": loss, "hidden": 128, "cache": emoji.cache}
            return VideoTextMatcher(STREAMS, encoder, **options, **CORRECTED, **QUIET)

        start, matcher = emoji.best(make, (Ridge(), Ridge(kernel="rbf")), every.take(learn), [names[i] for i in learn])
        clips = every.take(own)
        found = without_correction(start), without_correction(matcher), matcher
        return tuple(one.scores(clips, emoji.captions) for one in found)  # type: ignore[return-value]

    pictures = per_fold(emoji)(ridge("rbf", pictures=True))
    found = compare(
        emoji,
        ("text to clip", "clip to text"),
        {
            "mean of frames + ridge": ridge("linear"),
            "mean of frames + kernel ridge": ridge("rbf"),
            START: lambda learn, held: network(learn, held)[0],
            "VideoTextMatcher": lambda learn, held: network(learn, held)[1],
            "VideoTextMatcher" + HUBS: lambda learn, held: network(learn, held)[2],
            "kernel ridge, the other pictures as well": pictures,
            "VideoTextMatcher + that ridge": lambda learn, held: network(learn, held)[1] + pictures(learn, held),
        },
        ("mean of frames + ridge", START),
    )
    return {**found, "chosen": emoji.chosen}


def streams(data: Path, cache: str) -> Any:
    emoji = Emoji(data, cache)
    every = emoji.clips((*STREAMS, "pixel-differences", "flow"))
    encoder = MiniLM()

    def network(**options: Any) -> Callable[[Rows, Rows], Scores]:
        arguments = {"streams": STREAMS, "hidden": 64, "dim": 64, "cell": "gru", "pool": "mean"} | options

        def scores(learn: Rows, held: Rows) -> Scores:
            matcher = VideoTextMatcher(text_encoder=encoder, loss="info_nce", cache=emoji.cache, **QUIET, **arguments)
            names = [emoji.names[i] for i in learn]
            matcher.fit(every.take(learn), names, validation=None, epochs=25, lr=2e-3, batch_size=64)
            return matcher.scores(every, emoji.captions)

        return scores

    whole = "appearance + differences + motion, GRU, mean"
    systems = {whole: network()}
    systems |= {name: network(streams=(name,)) for name in (*STREAMS, "pixel-differences", "flow")}
    for left_out in STREAMS:
        systems[f"without {left_out}"] = network(streams=[name for name in STREAMS if name != left_out])
    systems |= {f"pool {pool}": network(pool=pool) for pool in POOLS}
    systems |= {
        "cell lstm": network(cell="lstm"),
        "both directions": network(bidirectional=True),
        "no cell: steps in any order": network(cell=None),
    }
    return compare(emoji, ("text to clip", "clip to text"), systems, (whole,))


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

    @per_fold(emoji)
    def network(learn: Rows, held: Rows) -> tuple[Scores, Scores, Scores]:
        def make(loss: str, space: Ridge) -> ImageVideoMatcher:
            options: dict[str, Any] = {"head": "ranking", "space": space, "hidden": 128, "cache": emoji.cache}
            return ImageVideoMatcher(streams=STREAMS, loss=loss, **options, **CORRECTED, **QUIET)  # type: ignore[arg-type]

        starts = Ridge(), Ridge(toward="identity")
        start, matcher = emoji.best(make, starts, [paths[i] for i in learn], features.take(learn))
        found = without_correction(start), without_correction(matcher), matcher
        return tuple(one.scores(paths, features).T for one in found)  # type: ignore[return-value]

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
            START: lambda learn, held: network(learn, held)[0],
            "ImageVideoMatcher": lambda learn, held: network(learn, held)[1],
            "ImageVideoMatcher" + HUBS: lambda learn, held: network(learn, held)[2],
        },
        ("mean of frames + cosine", "mean of frames + ridge", START),
    )
    return {**found, "chosen": emoji.chosen}
