"""Options that several commands share. Nothing heavy is imported: `pycm --help` is quick."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

PAIRS_PANEL, MATCHER_PANEL, TRAINING_PANEL = "Pairs", "Matcher", "Training"

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


class MetricName(str, Enum):
    """The metrics, as choices of an option."""

    cosine = "cosine"
    dot = "dot"
    pearson = "pearson"
    euclidean = "euclidean"
    sqeuclidean = "sqeuclidean"


class SystemName(str, Enum):
    """The systems, as choices of an option."""

    image_text = "image-text"
    video_text = "video-text"
    image_video = "image-video"


class SplitName(str, Enum):
    """Parts of a file of pairs."""

    all = "all"
    train = "train"
    test = "test"


class CellName(str, Enum):
    """Recurrent cells."""

    gru = "gru"
    lstm = "lstm"
    none = "none"


class HeadName(str, Enum):
    """What ranks."""

    ranking = "ranking"
    pairs = "pairs"


PairsFile = Annotated[Path, typer.Argument(metavar="PAIRS", help="JSONL or CSV of what belongs together.")]
SavedMatcher = Annotated[Path, typer.Argument(metavar="MATCHER", help="A folder that pycm train wrote.")]
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
Root = Annotated[
    Path | None,
    typer.Option(
        "--root", rich_help_panel=PAIRS_PANEL, metavar="DIR", help="File names may also be relative to this folder."
    ),
]
GalleryOut = Annotated[
    Path | None, typer.Option("--gallery", metavar="DIR", help="Also keep the images or clips, for pycm search.")
]
Device = Annotated[str | None, typer.Option("--device", metavar="NAME", help="cpu, cuda or cuda:1. Default: cpu.")]
Skip = Annotated[bool, typer.Option("--skip-unreadable", help="Leave out files that cannot be read, and list them.")]
