"""The typer app. What a command needs is imported when it runs, so that `pycm --help` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from ..bench.cases import Op
from . import options as opt
from .app_systems import evaluate, index, search, train

app = typer.Typer(
    name="pycm",
    help="Match images, videos and texts, exactly and fast.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: opt.Debug = False,
) -> None:
    """Match images, videos and texts, exactly and fast."""
    if version:
        from pycm import __version__

        typer.echo(f"pycm {__version__}")
        raise typer.Exit()


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The report.")] = Path("pycm-demo.html"),
    every: Annotated[
        bool,
        typer.Option("--all", help="Also the photographs of which ImageNet, and so the encoder, knows nothing."),
    ] = False,
    device: opt.Device = None,
    cache: opt.Cache = None,
    no_cache: opt.NoCache = False,
    debug: opt.Debug = False,
) -> None:
    """Match photographs with sentences, both ways, and write an HTML report. Needs no network."""
    from .demo import run_demo

    run_demo(out, every=every, device=device, cache=cache, no_cache=no_cache)


@app.command()
def match(
    texts: opt.Texts = None,
    images: opt.Images = None,
    videos: opt.Videos = None,
    k: Annotated[
        str | None,
        typer.Option(
            "--k",
            metavar="K[,K]",
            help="Matches of each item, or of each of both kinds: TEXTS,IMAGES. Default: 5, or all.",
        ),
    ] = None,
    metric: opt.Metric = None,
    encoder: opt.Encoder = None,
    text_encoder: opt.TextEncoder = None,
    space: Annotated[
        Path | None,
        typer.Option("--space", metavar="DIR", help="A saved space, or a saved matcher with its encoders."),
    ] = None,
    device: opt.Device = None,
    cache: opt.Cache = None,
    no_cache: opt.NoCache = False,
    skip_unreadable: opt.Skip = False,
    out: opt.MatchesOut = None,
    debug: opt.Debug = False,
) -> None:
    """Match two kinds of your files, both ways: images, or clips, with texts; images with clips.

    Where the texts' file names the image or clip of each text (columns image and
    text, or clip and text), right and wrong are told apart. Clips and texts need
    --space with a trained matcher; one that tells labels needs no texts. Images
    with clips need none: without one, an image is compared with the clip's frames.
    """
    from .match import MatchOptions, run_match

    run_match(
        MatchOptions(
            images=images,
            videos=videos,
            texts=texts,
            k=k,
            metric=None if metric is None else metric.value,
            encoder=encoder,
            text_encoder=text_encoder,
            space=space,
            device=device,
            cache=cache,
            no_cache=no_cache,
            skip_unreadable=skip_unreadable,
            out=out,
        )
    )


for command in (train, evaluate, index, search):
    app.command()(command)


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False, debug: opt.Debug = False) -> None:
    """Show what is in this build and on this machine, and what is missing and why."""
    from .info import run_info

    run_info(as_json=as_json)


@app.command()
def bench(
    results: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RESULTS]...", help="Show these results of --out instead of measuring."),
    ] = None,
    op: Annotated[
        list[str] | None,
        typer.Option("--op", metavar="OP", help=f"Only {', '.join(get_args(Op))}; repeatable."),
    ] = None,
    case: Annotated[
        list[str] | None, typer.Option("--case", metavar="NAME", help="Only this case, or 'topk-*'; repeatable.")
    ] = None,
    provider: Annotated[
        list[str] | None,
        typer.Option("--provider", metavar="NAME", help="Only this library, or 'faiss-*'; repeatable."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write the results here, as JSON.")] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw times, ratios and limits: .png, .svg or .pdf.")
    ] = None,
    readme: Annotated[
        Path | None,
        typer.Option("--readme", metavar="FILE", help="Put the tables between the markers of this Markdown file."),
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, metavar="N", help="Rounds of a case.")] = 5,
    budget: Annotated[
        float,
        typer.Option("--budget", min=0, metavar="SECONDS", help="Of a case, after which rounds stop (but 3 are made)."),
    ] = 120.0,
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, metavar="N", help="Of every library. Default: the processors it may use."),
    ] = None,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Tiny cases: they test the command and measure nothing.")
    ] = False,
    list_: Annotated[bool, typer.Option("--list", help="List cases, data and libraries, and stop.")] = False,
    debug: opt.Debug = False,
) -> None:
    """Measure pycm and its peers, taking turns, against each other and against the machine's limits.

    Every result is checked. Libraries that are not installed are left out by name. Run it on an idle machine.
    """
    from .bench import BenchOptions, run_bench

    run_bench(
        BenchOptions(
            results=results or (),
            ops=op or (),
            cases=case or (),
            providers=provider or (),
            out=out,
            plot=plot,
            readme=readme,
            repeats=repeats,
            budget=budget,
            threads=threads,
            tiny=tiny,
            list=list_,
        )
    )
