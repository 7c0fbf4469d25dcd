"""The options of the commands, each declared once. Nothing heavy is imported: `pycm --help` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .choices import (
    CellName,
    FusionName,
    GranularityName,
    HeadName,
    MetricName,
    PrecisionName,
    ScoreName,
    SplitName,
    SystemName,
)

PAIRS_PANEL, MATCHER_PANEL, TRAINING_PANEL, LESS_PANEL = "Pairs", "Matcher", "Training", "With less"
FINE_PANEL = "Seldom changed"


# ---- of every command ----

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Cache = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        metavar="DIR",
        help="Keep features here, so that nothing is encoded twice. Default: $XDG_CACHE_HOME/pycm or ~/.cache/pycm.",
    ),
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Keep no features, and read none.")]
Device = Annotated[str | None, typer.Option("--device", metavar="NAME", help="cpu, cuda or cuda:1. Default: cpu.")]
Skip = Annotated[bool, typer.Option("--skip-unreadable", help="Leave out files that cannot be read, and list them.")]

# ---- what goes in ----

PairsFile = Annotated[Path, typer.Argument(metavar="PAIRS", help="JSONL or CSV of what belongs together.")]
SavedMatcher = Annotated[Path, typer.Argument(metavar="MATCHER", help="A folder that pycm train wrote.")]
SavedGallery = Annotated[Path, typer.Argument(metavar="GALLERY", help="A folder that pycm index wrote.")]
Images = Annotated[
    Path | None,
    typer.Option(
        "--images", metavar="PATH", help="A folder, searched with its subfolders, or JSONL or CSV with an image column."
    ),
]
Videos = Annotated[Path | None, typer.Option("--videos", metavar="PATH", help="The same with clips.")]
Texts = Annotated[
    Path | None, typer.Option("--texts", metavar="FILE", help="Texts: .txt (one a line), .jsonl or .csv.")
]
TextQueries = Annotated[list[str] | None, typer.Option("--text", metavar="TEXT", help="A query; repeatable.")]
ImageQueries = Annotated[list[Path] | None, typer.Option("--image", metavar="FILE", help="A query; repeatable.")]
ClipQueries = Annotated[list[Path] | None, typer.Option("--clip", metavar="FILE", help="A query; repeatable.")]

# ---- how pairs are read ----

SystemOption = Annotated[
    SystemName | None,
    typer.Option(
        "--system", rich_help_panel=PAIRS_PANEL, help="Where a file has images, clips and texts. Default: its columns."
    ),
]
CaptionsField = Annotated[
    str | None,
    typer.Option(
        "--captions-field",
        rich_help_panel=PAIRS_PANEL,
        metavar="A,B",
        help="Columns of the texts, or languages of captions, e.g. en.",
    ),
]
ImageField = Annotated[
    str | None, typer.Option("--image-field", rich_help_panel=PAIRS_PANEL, metavar="NAME", help="Column of the images.")
]
ClipField = Annotated[
    str | None, typer.Option("--clip-field", rich_help_panel=PAIRS_PANEL, metavar="NAME", help="Column of the clips.")
]
LabelField = Annotated[
    str | None,
    typer.Option(
        "--label-field",
        rich_help_panel=PAIRS_PANEL,
        metavar="NAME",
        help="Column of the labels that clips are told apart by. Default: label.",
    ),
]
Root = Annotated[
    Path | None,
    typer.Option(
        "--root", rich_help_panel=PAIRS_PANEL, metavar="DIR", help="File names may also be relative to this folder."
    ),
]
Split = Annotated[
    SplitName,
    typer.Option(
        "--split",
        rich_help_panel=PAIRS_PANEL,
        help="By the hash of the ids; test is a fifth. pycm train --split train holds it out, and tells its recall.",
    ),
]

# ---- what a matcher is made of ----

Encoder = Annotated[
    str | None,
    typer.Option(
        "--encoder",
        rich_help_panel=MATCHER_PANEL,
        metavar="SPEC",
        help="Image encoder, e.g. clip:NAME. Default: efficientnet-lite0.",
    ),
]
TextEncoder = Annotated[
    str | None,
    typer.Option(
        "--text-encoder",
        rich_help_panel=MATCHER_PANEL,
        metavar="SPEC",
        help="Text encoder, e.g. tfidf or words. Default: the other side of --encoder, or minilm.",
    ),
]
Metric = Annotated[
    MetricName | None,
    typer.Option(
        "--metric", rich_help_panel=MATCHER_PANEL, help="How items are compared. Default: cosine, or a matcher's own."
    ),
]
Granularity = Annotated[
    GranularityName | None,
    typer.Option(
        "--granularity", rich_help_panel=MATCHER_PANEL, help="region: an image's regions against a text's words."
    ),
]
Score = Annotated[
    ScoreName | None,
    typer.Option("--score", rich_help_panel=MATCHER_PANEL, help="Of regions and words. Default: maxsim."),
]
Streams = Annotated[
    str | None,
    typer.Option(
        "--streams",
        rich_help_panel=MATCHER_PANEL,
        metavar="A,B",
        help="Of clips. Default: appearance,differences,motion.",
    ),
]
Sampling = Annotated[
    str | None,
    typer.Option(
        "--sampling", rich_help_panel=MATCHER_PANEL, metavar="SPEC", help="Frames of a clip. Default: uniform:16."
    ),
]
Cell = Annotated[
    CellName | None,
    typer.Option("--cell", rich_help_panel=MATCHER_PANEL, help="Recurrent cell; none ignores order."),
]
Pool = Annotated[
    str | None,
    typer.Option("--pool", rich_help_panel=MATCHER_PANEL, metavar="NAME", help="Over time, e.g. mean, max, last."),
]
Hidden = Annotated[
    int | None,
    typer.Option("--hidden", rich_help_panel=MATCHER_PANEL, min=1, metavar="N", help="Size of the states."),
]
Dim = Annotated[
    int | None,
    typer.Option("--dim", rich_help_panel=MATCHER_PANEL, min=1, metavar="N", help="Of the common space."),
]
Head = Annotated[
    HeadName | None,
    typer.Option(
        "--head",
        rich_help_panel=MATCHER_PANEL,
        help="ranking, or a classifier of pair or no pair, or of clips by the column label.",
    ),
]
Loss = Annotated[
    str | None,
    typer.Option(
        "--loss", rich_help_panel=MATCHER_PANEL, metavar="NAME", help="max_hinge, info_nce, sigmoid or triplet."
    ),
]
Space = Annotated[
    str | None,
    typer.Option(
        "--space",
        rich_help_panel=MATCHER_PANEL,
        metavar="NAME",
        help="ridge, rbf or cca; for clips ridge or rbf, a start; for images with clips also identity (ridge to it).",
    ),
]
Bits = Annotated[
    int | None,
    typer.Option(
        "--bits",
        rich_help_panel=MATCHER_PANEL,
        min=1,
        metavar="N",
        help="Codes of so many bits (ITQ), ranked by Hamming distance.",
    ),
]
Hubness = Annotated[
    int | None,
    typer.Option(
        "--hubness",
        rich_help_panel=MATCHER_PANEL,
        min=1,
        metavar="K",
        help="Less how near an item is to the K nearest that are learned from: for hubs, which are near to all.",
    ),
]
Seed = Annotated[
    int | None, typer.Option("--seed", rich_help_panel=MATCHER_PANEL, metavar="N", help="Of all that is random.")
]

# ---- how it learns ----

Epochs = Annotated[
    int | None, typer.Option("--epochs", rich_help_panel=TRAINING_PANEL, min=0, metavar="N", help="At most.")
]
LearningRate = Annotated[
    float | None, typer.Option("--lr", rich_help_panel=TRAINING_PANEL, metavar="X", help="Largest learning rate.")
]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", rich_help_panel=TRAINING_PANEL, min=2, metavar="N", help="Pairs a step.")
]
FineTune = Annotated[
    str | None,
    typer.Option(
        "--fine-tune",
        rich_help_panel=TRAINING_PANEL,
        metavar="NAMES",
        help="Train these encoders as well: a stream's name, image or text, with commas between, or all.",
    ),
]
EncoderRate = Annotated[
    float | None,
    typer.Option(
        "--encoder-lr",
        rich_help_panel=TRAINING_PANEL,
        metavar="X",
        help="Largest learning rate of encoders that are trained. Default: 1e-5.",
    ),
]
Patience = Annotated[
    int | None,
    typer.Option(
        "--patience", rich_help_panel=TRAINING_PANEL, min=1, metavar="N", help="Epochs without progress till it stops."
    ),
]
HeldOut = Annotated[
    str | None,
    typer.Option(
        "--validation",
        rich_help_panel=TRAINING_PANEL,
        metavar="X",
        help="A share held out for early stopping, folds (not for regions) to choose epochs by, or none. Default: 0.1.",
    ),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        rich_help_panel=TRAINING_PANEL,
        metavar="DIR",
        help="State of the training; the same command goes on from it.",
    ),
]
Log = Annotated[
    Path | None,
    typer.Option(
        "--log", rich_help_panel=TRAINING_PANEL, metavar="PATH", help="A .csv file, or a folder for TensorBoard."
    ),
]
Target = Annotated[
    Path | None,
    typer.Option(
        "--target",
        rich_help_panel=LESS_PANEL,
        metavar="PATH",
        help="Images, or clips, of the kind to be matched: training features get their mean and covariance (CORAL).",
    ),
]
Unlabelled = Annotated[
    tuple[Path, Path] | None,
    typer.Option(
        "--unlabelled",
        rich_help_panel=LESS_PANEL,
        metavar="PATH PATH",
        help="Items and texts, or images and clips, that nobody paired: with --threshold it pairs them itself.",
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        "--threshold",
        rich_help_panel=LESS_PANEL,
        metavar="X",
        help="The score from which mutual nearest neighbours of --unlabelled are a pair.",
    ),
]

# ---- what is seldom changed ----

Fusion = Annotated[
    FusionName | None,
    typer.Option(
        "--fusion",
        rich_help_panel=FINE_PANEL,
        help="Of image and clip, with --head pairs: the image's state opens the GRU, joins each step, or both.",
    ),
]
Candidates = Annotated[
    str | None,
    typer.Option(
        "--candidates",
        rich_help_panel=FINE_PANEL,
        metavar="N",
        help="With --head pairs: embeddings that each item proposes to the classifier, or all.",
    ),
]
SpaceStreams = Annotated[
    str | None,
    typer.Option(
        "--space-streams",
        rich_help_panel=FINE_PANEL,
        metavar="A,B",
        help="Those that --space reads. Default: the first.",
    ),
]
Bidirectional = Annotated[
    bool,
    typer.Option("--bidirectional", rich_help_panel=FINE_PANEL, help="Clips are read backwards as well."),
]
Dropout = Annotated[
    float | None,
    typer.Option(
        "--dropout", rich_help_panel=FINE_PANEL, metavar="X", help="Of the projections and the MLPs. Default: 0.2."
    ),
]
InputDropout = Annotated[
    float | None,
    typer.Option(
        "--input-dropout",
        rich_help_panel=FINE_PANEL,
        metavar="X",
        help="Of the streams' features. Default: 0.",
    ),
]
LabelSmoothing = Annotated[
    float | None,
    typer.Option(
        "--label-smoothing",
        rich_help_panel=FINE_PANEL,
        metavar="X",
        help="With --head labels: share of a truth that is spread over all labels. Default: 0.",
    ),
]
Precision = Annotated[
    PrecisionName | None,
    typer.Option("--precision", rich_help_panel=FINE_PANEL, help="Of training; bfloat16 under autocast."),
]
WarmUp = Annotated[
    float | None,
    typer.Option(
        "--warmup", rich_help_panel=FINE_PANEL, metavar="X", help="Share of steps with a rising rate. Default: 0.1."
    ),
]
WeightDecay = Annotated[
    float | None,
    typer.Option("--weight-decay", rich_help_panel=FINE_PANEL, metavar="X", help="AdamW's. Default: 0.05."),
]

# ---- what comes out ----

MatcherOut = Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder of the matcher.")]
GalleryFolder = Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder of the gallery.")]
ReportOut = Annotated[
    Path | None, typer.Option("--out", metavar="FILE", help="A report, .html, or the figures, .json.")
]
MatchesOut = Annotated[
    Path | None,
    typer.Option("--out", metavar="FILE", help="Write the matches: .html, .csv or .jsonl (ranks count from 0)."),
]
GalleryOut = Annotated[
    Path | None, typer.Option("--gallery", metavar="DIR", help="Also keep the images or clips, for pycm search.")
]
Cutoffs = Annotated[str, typer.Option("--ks", metavar="K,K", help="Cutoffs of recall.")]
