"""The commands that train, evaluate and search, of whichever system. What one needs is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import (
    MATCHER_PANEL,
    PAIRS_PANEL,
    TRAINING_PANEL,
    Cache,
    CaptionsField,
    CellName,
    ClipField,
    Debug,
    Device,
    GalleryOut,
    HeadName,
    ImageField,
    MetricName,
    NoCache,
    PairsFile,
    Root,
    SavedMatcher,
    Skip,
    SplitName,
    SystemName,
    SystemOption,
)

if TYPE_CHECKING:
    from .pairs import PairOptions


def train(
    pairs: PairsFile,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder of the matcher.")],
    system: SystemOption = None,
    captions_field: CaptionsField = None,
    image_field: ImageField = None,
    clip_field: ClipField = None,
    root: Root = None,
    split: Annotated[
        SplitName,
        typer.Option(
            "--split",
            rich_help_panel=PAIRS_PANEL,
            help="train: hold out a fifth by the hash of the ids, and tell its recall.",
        ),
    ] = SplitName.all,
    encoder: Annotated[
        str | None,
        typer.Option(
            "--encoder",
            rich_help_panel=MATCHER_PANEL,
            metavar="SPEC",
            help="Image encoder. Default: efficientnet-lite0.",
        ),
    ] = None,
    text_encoder: Annotated[
        str | None,
        typer.Option(
            "--text-encoder",
            rich_help_panel=MATCHER_PANEL,
            metavar="SPEC",
            help="Text encoder, e.g. tfidf or words. Default: minilm.",
        ),
    ] = None,
    streams: Annotated[
        str | None,
        typer.Option(
            "--streams",
            rich_help_panel=MATCHER_PANEL,
            metavar="A,B",
            help="Of clips. Default: appearance,differences,motion.",
        ),
    ] = None,
    sampling: Annotated[
        str | None,
        typer.Option(
            "--sampling", rich_help_panel=MATCHER_PANEL, metavar="SPEC", help="Frames of a clip. Default: uniform:16."
        ),
    ] = None,
    cell: Annotated[
        CellName | None,
        typer.Option("--cell", rich_help_panel=MATCHER_PANEL, help="Recurrent cell; none ignores order."),
    ] = None,
    pool: Annotated[
        str | None,
        typer.Option("--pool", rich_help_panel=MATCHER_PANEL, metavar="NAME", help="Over time, e.g. mean, max, last."),
    ] = None,
    hidden: Annotated[
        int | None,
        typer.Option("--hidden", rich_help_panel=MATCHER_PANEL, min=1, metavar="N", help="Size of the states."),
    ] = None,
    dim: Annotated[
        int | None,
        typer.Option("--dim", rich_help_panel=MATCHER_PANEL, min=1, metavar="N", help="Of the common space."),
    ] = None,
    head: Annotated[
        HeadName | None,
        typer.Option("--head", rich_help_panel=MATCHER_PANEL, help="ranking, or a classifier of pair or no pair."),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            "--loss", rich_help_panel=MATCHER_PANEL, metavar="NAME", help="max_hinge, info_nce, sigmoid or triplet."
        ),
    ] = None,
    space: Annotated[
        str | None,
        typer.Option(
            "--space",
            rich_help_panel=MATCHER_PANEL,
            metavar="NAME",
            help="ridge, rbf or cca; for clips ridge or rbf, a start.",
        ),
    ] = None,
    metric: Annotated[
        MetricName | None, typer.Option("--metric", rich_help_panel=MATCHER_PANEL, help="Default: cosine.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", rich_help_panel=TRAINING_PANEL, min=0, metavar="N", help="At most.")
    ] = None,
    lr: Annotated[
        float | None, typer.Option("--lr", rich_help_panel=TRAINING_PANEL, metavar="X", help="Largest learning rate.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", rich_help_panel=TRAINING_PANEL, min=2, metavar="N", help="Pairs a step."),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            "--patience",
            rich_help_panel=TRAINING_PANEL,
            min=1,
            metavar="N",
            help="Epochs without progress before it stops.",
        ),
    ] = None,
    validation: Annotated[
        str | None,
        typer.Option(
            "--validation",
            rich_help_panel=TRAINING_PANEL,
            metavar="X",
            help="A share held out for early stopping, folds to choose the epochs by, or none. Default: 0.1.",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", rich_help_panel=TRAINING_PANEL, metavar="N", help="Of all that is random.")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint",
            rich_help_panel=TRAINING_PANEL,
            metavar="DIR",
            help="State of the training; the same command goes on from it.",
        ),
    ] = None,
    log: Annotated[
        Path | None,
        typer.Option(
            "--log", rich_help_panel=TRAINING_PANEL, metavar="PATH", help="A .csv file, or a folder for TensorBoard."
        ),
    ] = None,
    gallery: GalleryOut = None,
    device: Device = None,
    cache: Cache = None,
    no_cache: NoCache = False,
    skip_unreadable: Skip = False,
    debug: Debug = False,
) -> None:
    """Train a matcher on what belongs together: images or clips with texts, or images with clips.

    PAIRS is JSONL or CSV with columns image or clip and caption, or captions: a
    list, or texts by language. Which system is meant, the columns tell. A run cut
    off by Ctrl-C goes on when the command is given again.
    """
    from .train import TrainOptions, run_train

    network = {"cell": None if cell is None else cell.value, "pool": pool, "hidden": hidden, "dim": dim, "seed": seed,
               "head": None if head is None else head.value, "loss": loss, "sampling": sampling, "device": device,
               "streams": None if streams is None else tuple(streams.split(","))}  # fmt: skip
    training = {
        "epochs": epochs,
        "lr": lr,
        "batch_size": batch_size,
        "patience": patience,
        "validation": validation,
        "log": log,
    }
    run_train(
        TrainOptions(
            pairs=pairs,
            reading=reading_of(system, captions_field, image_field, clip_field, root, split, skip_unreadable),
            out=out,
            encoder=encoder,
            text_encoder=text_encoder,
            space=space,
            metric=None if metric is None else metric.value,
            network=network,
            training=training,
            checkpoint=checkpoint,
            gallery=gallery,
            cache=cache,
            no_cache=no_cache,
            skip_unreadable=skip_unreadable,
        )
    )


def evaluate(
    matcher: SavedMatcher,
    pairs: PairsFile,
    system: SystemOption = None,
    captions_field: CaptionsField = None,
    image_field: ImageField = None,
    clip_field: ClipField = None,
    root: Root = None,
    split: Annotated[
        SplitName,
        typer.Option(
            "--split",
            rich_help_panel=PAIRS_PANEL,
            help="Only this part; test is what `train --split train` leaves out.",
        ),
    ] = SplitName.all,
    ks: Annotated[str, typer.Option("--ks", metavar="K,K", help="Cutoffs of recall.")] = "1,5,10",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="A report, .html, or the figures, .json.")
    ] = None,
    gallery: GalleryOut = None,
    device: Device = None,
    cache: Cache = None,
    no_cache: NoCache = False,
    skip_unreadable: Skip = False,
    debug: Debug = False,
) -> None:
    """Tell how often a saved matcher finds what belongs together, with 95 % intervals."""
    from .evaluate import EvaluateOptions, run_evaluate

    run_evaluate(
        EvaluateOptions(
            matcher=matcher,
            pairs=pairs,
            reading=reading_of(system, captions_field, image_field, clip_field, root, split, skip_unreadable),
            ks=ks,
            out=out,
            gallery=gallery,
            device=device,
            cache=cache,
            no_cache=no_cache,
            skip_unreadable=skip_unreadable,
        )
    )


def index(
    matcher: SavedMatcher,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder of the gallery.")],
    images: Annotated[Path | None, typer.Option("--images", metavar="PATH", help="A folder, or a list.")] = None,
    videos: Annotated[Path | None, typer.Option("--videos", metavar="PATH", help="A folder, or a list.")] = None,
    texts: Annotated[Path | None, typer.Option("--texts", metavar="FILE", help=".txt, .jsonl or .csv.")] = None,
    device: Device = None,
    cache: Cache = None,
    no_cache: NoCache = False,
    skip_unreadable: Skip = False,
    debug: Debug = False,
) -> None:
    """Embed images, clips or texts by a saved matcher, once, for many searches."""
    from .index import IndexOptions, run_index

    run_index(IndexOptions(matcher, images, videos, texts, out, device, cache, no_cache, skip_unreadable))


def search(
    gallery: Annotated[Path, typer.Argument(metavar="GALLERY", help="A folder that pycm index wrote.")],
    text: Annotated[list[str] | None, typer.Option("--text", metavar="TEXT", help="A query; repeatable.")] = None,
    image: Annotated[list[Path] | None, typer.Option("--image", metavar="FILE", help="A query; repeatable.")] = None,
    clip: Annotated[list[Path] | None, typer.Option("--clip", metavar="FILE", help="A query; repeatable.")] = None,
    k: Annotated[
        int | None, typer.Option("--k", metavar="K", help="Matches of each query. Default: 5, or all of fewer items.")
    ] = None,
    matcher: Annotated[
        Path | None, typer.Option("--matcher", metavar="DIR", help="Where the gallery's matcher is now, if it moved.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the matches: .html, .csv or .jsonl.")
    ] = None,
    device: Device = None,
    cache: Cache = None,
    no_cache: NoCache = False,
    debug: Debug = False,
) -> None:
    """Find the best items of a gallery for texts, images or clips."""
    from .search import SearchOptions, run_search

    run_search(SearchOptions(gallery, text or (), image or (), clip or (), k, matcher, device, out, cache, no_cache))


def reading_of(
    system: SystemName | None,
    captions: str | None,
    image: str | None,
    clip: str | None,
    root: Path | None,
    split: SplitName,
    skip: bool,
) -> PairOptions:
    from .pairs import PairOptions

    named = () if captions is None else tuple(part.strip() for part in captions.split(","))
    return PairOptions(None if system is None else system.value, named, image, clip, root, split.value, skip)
