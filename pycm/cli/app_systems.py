"""The commands that train, evaluate and search, of whichever system. What one needs is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as opt
from .choices import SplitName, SystemName

if TYPE_CHECKING:
    from .pairs import PairOptions


def train(
    pairs: opt.PairsFile,
    out: opt.MatcherOut,
    system: opt.SystemOption = None,
    captions_field: opt.CaptionsField = None,
    image_field: opt.ImageField = None,
    clip_field: opt.ClipField = None,
    label_field: opt.LabelField = None,
    root: opt.Root = None,
    split: opt.Split = SplitName.all,
    encoder: opt.Encoder = None,
    text_encoder: opt.TextEncoder = None,
    granularity: opt.Granularity = None,
    score: opt.Score = None,
    streams: opt.Streams = None,
    sampling: opt.Sampling = None,
    cell: opt.Cell = None,
    pool: opt.Pool = None,
    hidden: opt.Hidden = None,
    dim: opt.Dim = None,
    head: opt.Head = None,
    loss: opt.Loss = None,
    space: opt.Space = None,
    bits: opt.Bits = None,
    hubness: opt.Hubness = None,
    metric: opt.Metric = None,
    seed: opt.Seed = None,
    epochs: opt.Epochs = None,
    lr: opt.LearningRate = None,
    batch_size: opt.BatchSize = None,
    fine_tune: opt.FineTune = None,
    encoder_lr: opt.EncoderRate = None,
    patience: opt.Patience = None,
    validation: opt.HeldOut = None,
    checkpoint: opt.Checkpoint = None,
    log: opt.Log = None,
    target: opt.Target = None,
    unlabelled: opt.Unlabelled = None,
    threshold: opt.Threshold = None,
    fusion: opt.Fusion = None,
    candidates: opt.Candidates = None,
    space_streams: opt.SpaceStreams = None,
    bidirectional: opt.Bidirectional = False,
    dropout: opt.Dropout = None,
    input_dropout: opt.InputDropout = None,
    label_smoothing: opt.LabelSmoothing = None,
    precision: opt.Precision = None,
    warmup: opt.WarmUp = None,
    weight_decay: opt.WeightDecay = None,
    gallery: opt.GalleryOut = None,
    device: opt.Device = None,
    cache: opt.Cache = None,
    no_cache: opt.NoCache = False,
    skip_unreadable: opt.Skip = False,
    debug: opt.Debug = False,
) -> None:
    """Train a matcher on what belongs together: images or clips with texts, images with clips, clips with labels.

    PAIRS is JSONL or CSV with columns image or clip and caption, or captions: a
    list, or texts by language. Which system is meant, the columns tell. A run cut
    off by Ctrl-C goes on when the command is given again.
    """
    from .train import TrainOptions, run_train

    own = {"encoder": encoder, "text_encoder": text_encoder, "granularity": _value(granularity), "score": _value(score),
           "streams": streams, "sampling": sampling, "cell": _value(cell), "pool": pool, "hidden": hidden, "dim": dim,
           "head": _value(head), "loss": loss, "space": space, "bits": bits, "hubness": hubness,
           "metric": _value(metric), "seed": seed,
           "epochs": epochs, "lr": lr, "batch_size": batch_size, "fine_tune": fine_tune, "encoder_lr": encoder_lr,
           "patience": patience, "validation": validation, "checkpoint": checkpoint, "log": log, "target": target,
           "unlabelled": unlabelled, "threshold": threshold, "fusion": _value(fusion), "candidates": candidates,
           "space_streams": space_streams, "bidirectional": bidirectional or None, "dropout": dropout,
           "input_dropout": input_dropout, "label_smoothing": label_smoothing, "precision": _value(precision),
           "warmup": warmup, "weight_decay": weight_decay}  # fmt: skip
    reading = _reading(system, captions_field, image_field, clip_field, label_field, root, split, skip_unreadable)
    given = {name: value for name, value in own.items() if value is not None}
    run_train(TrainOptions(pairs, reading, out, given, gallery, device, cache, no_cache, skip_unreadable))


def evaluate(
    matcher: opt.SavedMatcher,
    pairs: opt.PairsFile,
    system: opt.SystemOption = None,
    captions_field: opt.CaptionsField = None,
    image_field: opt.ImageField = None,
    clip_field: opt.ClipField = None,
    label_field: opt.LabelField = None,
    root: opt.Root = None,
    split: opt.Split = SplitName.all,
    ks: opt.Cutoffs = "1,5,10",
    out: opt.ReportOut = None,
    gallery: opt.GalleryOut = None,
    device: opt.Device = None,
    cache: opt.Cache = None,
    no_cache: opt.NoCache = False,
    skip_unreadable: opt.Skip = False,
    debug: opt.Debug = False,
) -> None:
    """Tell how often a saved matcher finds what belongs together, with 95 % intervals."""
    from .evaluate import EvaluateOptions, run_evaluate

    reading = _reading(system, captions_field, image_field, clip_field, label_field, root, split, skip_unreadable)
    run_evaluate(EvaluateOptions(matcher, pairs, reading, ks, out, gallery, device, cache, no_cache, skip_unreadable))


def index(
    matcher: opt.SavedMatcher,
    out: opt.GalleryFolder,
    images: opt.Images = None,
    videos: opt.Videos = None,
    texts: opt.Texts = None,
    device: opt.Device = None,
    cache: opt.Cache = None,
    no_cache: opt.NoCache = False,
    skip_unreadable: opt.Skip = False,
    debug: opt.Debug = False,
) -> None:
    """Embed images, clips or texts by a saved matcher, once, for many searches."""
    from .index import IndexOptions, run_index

    run_index(IndexOptions(matcher, images, videos, texts, out, device, cache, no_cache, skip_unreadable))


def search(
    gallery: opt.SavedGallery,
    text: opt.TextQueries = None,
    image: opt.ImageQueries = None,
    clip: opt.ClipQueries = None,
    k: Annotated[
        int | None, typer.Option("--k", metavar="K", help="Matches of each query. Default: 5, or all of fewer items.")
    ] = None,
    matcher: Annotated[
        Path | None, typer.Option("--matcher", metavar="DIR", help="Where the gallery's matcher is now, if it moved.")
    ] = None,
    out: opt.MatchesOut = None,
    device: opt.Device = None,
    cache: opt.Cache = None,
    no_cache: opt.NoCache = False,
    skip_unreadable: opt.Skip = False,
    debug: opt.Debug = False,
) -> None:
    """Find the best items of a gallery for texts, images or clips."""
    from .search import SearchOptions, run_search

    queries = text or (), image or (), clip or ()
    run_search(SearchOptions(gallery, *queries, k, matcher, device, out, cache, no_cache, skip_unreadable))


def _value(choice: Any) -> str | None:
    return None if choice is None else str(choice.value)


def _reading(
    system: SystemName | None,
    captions: str | None,
    image: str | None,
    clip: str | None,
    label: str | None,
    root: Path | None,
    split: SplitName,
    skip: bool,
) -> PairOptions:
    from .pairs import PairOptions

    named = () if captions is None else tuple(part.strip() for part in captions.split(","))
    return PairOptions(_value(system), named, image, clip, label, root, split.value, skip)
