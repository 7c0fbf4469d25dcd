"""`pycm train`: from a file of pairs to a saved matcher."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ..functional import Metric
from ..report.render import duration
from .caching import check_cache_options
from .embedding import run_cache, write_index
from .errors import CommandError, StoppedError
from .match import check_spec
from .output import check_folder, shown
from .pairs import PairOptions, Pairs, read_pairs
from .recalls import measure, print_recalls
from .systems import IMAGE_TEXT, IMAGE_VIDEO, System
from .training_record import write_record

SPACES = ("ridge", "rbf", "cca")


@dataclass(frozen=True)
class TrainOptions:
    """The options of `pycm train`, as given; None is the matcher's own default.

    Attributes:
        pairs, reading: the file of pairs and how it is read.
        out: the folder of the matcher.
        network: arguments of the constructor: streams, cell, pool, hidden, dim, head, loss, sampling, seed, device.
        training: arguments of `fit`: epochs, lr, batch_size, patience, validation, log.
        checkpoint: the folder of the training's state; by default one in `out`, gone when the matcher is saved.
    """

    pairs: Path
    reading: PairOptions
    out: Path
    encoder: str | None
    text_encoder: str | None
    space: str | None
    metric: Metric | None
    network: Mapping[str, Any]
    training: Mapping[str, Any]
    checkpoint: Path | None
    gallery: Path | None
    cache: Path | None
    no_cache: bool
    skip_unreadable: bool


def run_train(options: TrainOptions) -> None:
    """Check what can be checked, train, save, and tell how well the held-out pairs are matched."""
    check_cache_options(options.cache, options.no_cache)
    for name, folder in (("--out", options.out), ("--gallery", options.gallery)):
        if folder is not None:
            check_folder(name, folder)
    for option, spec in (("--encoder", options.encoder), ("--text-encoder", options.text_encoder)):
        if spec is not None and spec != "words":
            check_spec(option, spec)
    every = read_pairs(options.pairs, options.reading)
    held_out = None
    if options.reading.split == "train":
        held_out = read_pairs(options.pairs, replace(options.reading, split="all")).split("test")
    network, training = _applicable(options, every.system)
    checkpoint = options.checkpoint or options.out / "checkpoint"
    console = Console(highlight=False)
    with ExitStack() as stack:
        cache = run_cache(stack, options.cache, options.no_cache)
        start = time.perf_counter()
        with Console(stderr=True).status("Loading the encoders"):
            matcher = _matcher(options, every.system, network, cache)
        skip = "skip" if options.skip_unreadable else "raise"
        if every.system is not IMAGE_TEXT:
            training = {**training, "checkpoint": checkpoint}
        try:
            matcher.fit(every.left, every.right, on_error=skip, **training)
        except KeyboardInterrupt:
            raise StoppedError(_how_to_go_on(every.system, checkpoint, options)) from None
        matcher.save(options.out)
        write_record(options.out, options.pairs, options.reading.split)
        if options.checkpoint is None and checkpoint.is_dir():
            shutil.rmtree(checkpoint)
        spent = time.perf_counter() - start
        trained = f"Trained on {len(every):,} {every.system.left.many} in {duration(spent)}."
        console.print(Text(trained), soft_wrap=True)
        console.print(Text(f"Written: {options.out}"), soft_wrap=True)
        if options.gallery is not None:
            count, _ = write_index(
                options.gallery, matcher, options.out, every.system.left, every.left, options.skip_unreadable
            )
            console.print(Text(f"Gallery: {options.gallery}, {count:,} {every.system.left.many}"), soft_wrap=True)
        _tell(console, options, every, held_out, matcher)


def _applicable(options: TrainOptions, system: System) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options that were given, refused where the system has no use for them."""
    network = {name: value for name, value in options.network.items() if value is not None}
    if options.space not in (None, *SPACES):
        raise CommandError(f"--space must be one of {', '.join(SPACES)}, got {options.space!r}")
    training = {name: value for name, value in options.training.items() if value is not None}
    if "validation" in training:
        training["validation"] = _validation(training["validation"])
    if system is IMAGE_TEXT:
        useless = [*network, *training, *(["checkpoint"] if options.checkpoint else [])]
    else:
        useless = [
            *(["space"] if options.space == "cca" else []),
            *(["text-encoder"] if options.text_encoder and system is IMAGE_VIDEO else []),
            *(["encoder"] if options.encoder and system is not IMAGE_VIDEO else []),
        ]
    if useless:
        why = "; its space is found in closed form" if system is IMAGE_TEXT else ""
        given = ", ".join(f"--{name.replace('_', '-')}" for name in useless)
        raise CommandError(f"{given}: not for the system {system.name}{why}")
    return network, training


def _validation(text: str) -> float | int | None:
    """A share, a number of folds, or none."""
    if text == "none":
        return None
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise CommandError(f"--validation must be a share as 0.1, folds as 5, or none, got {text!r}") from None


def _matcher(options: TrainOptions, system: System, network: Mapping[str, Any], cache: Any) -> Any:
    from .. import matchers
    from ..spaces import CCA, Ridge

    metric = options.metric or "cosine"
    spaces: dict[str, Callable[[], Any]] = {"ridge": Ridge, "rbf": partial(Ridge, kernel="rbf"), "cca": CCA}
    if system is IMAGE_TEXT:
        space = spaces[options.space or "ridge"]()
        specs = options.encoder or "efficientnet-lite0", options.text_encoder or "minilm"
        return matchers.ImageTextMatcher(*specs, space, metric, cache=cache)
    space = None if options.space is None else spaces[options.space]()
    encoders: dict[str, Any] = {"image_encoder": options.encoder, "text_encoder": options.text_encoder}
    given = {name: spec for name, spec in encoders.items() if spec is not None}
    if network.get("cell") == "none":
        network = {**network, "cell": None}
    return getattr(matchers, system.matcher)(metric=metric, space=space, cache=cache, **given, **network)


def _how_to_go_on(system: System, checkpoint: Path, options: TrainOptions) -> str:
    if system is not IMAGE_TEXT and any(checkpoint.glob("**/training.pt")):
        return f"the same command goes on from {checkpoint}"
    if options.no_cache:
        return "nothing was kept (--no-cache)"
    return "what was encoded is kept: the same command goes on"


def _tell(console: Console, options: TrainOptions, trained: Pairs, held_out: Pairs | None, matcher: Any) -> None:
    """The recall table: of the pairs that the split left out, or else, with None, of those it was trained on."""
    if held_out is not None and not len(held_out):
        console.print(Text(f"{options.pairs}: the split leaves nothing out to tell the recall of"), soft_wrap=True)
        return
    pairs = trained if held_out is None else held_out
    measured = measure(matcher, pairs, ks=(1, 5, 10), skip=options.skip_unreadable)
    what = f"{len(pairs):,} {pairs.system.left.many} held out" if held_out else "the pairs it was trained on"
    print_recalls(console, f"{pairs.system.name}: {what}", measured.recalls)
    for name, reason in measured.results.found.errors:
        console.print(Text(f"left out: {shown(name)}: {reason}", style="yellow"), soft_wrap=True)
