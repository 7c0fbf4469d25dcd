"""`pycm train`: from a file of pairs to a saved matcher."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ..matchers.default import DEFAULT_SPECS
from ..report.render import duration
from .caching import check_cache_options
from .embedding import check_device, run_cache, tell_of_the_classifier, write_index
from .errors import CommandError, StoppedError
from .inputs import read_clips, read_images, read_texts
from .match import check_spec, default_text_spec
from .output import check_folder, shown
from .pairs import PairOptions, Pairs, read_pairs
from .recalls import measure, print_recalls, without
from .systems import CLIP, IMAGE, IMAGE_TEXT, IMAGE_VIDEO, TEXT, VIDEO_LABELS, VIDEO_TEXT, Kind, System
from .training_record import write_record

_FIT = {"epochs", "lr", "batch_size", "fine_tune", "encoder_lr", "patience", "validation", "log", "checkpoint"}
_FIT |= {"precision", "warmup", "weight_decay"}
_LESS = {"target", "unlabelled", "threshold"}
_CLIPS = _FIT | {"streams", "sampling", "cell", "pool", "hidden", "dim", "head", "seed", "target"}
_CLIPS |= {"bidirectional", "dropout", "input_dropout"}
_RANKED = {"loss", "space", "space_streams", "bits", "hubness", "metric", "candidates"}
_REGIONS = "image-text with --granularity region"
#: The options that each system has a use for.
_TAKES = {
    IMAGE_TEXT.name: _LESS | {"granularity", "encoder", "text_encoder", "space", "bits", "hubness", "metric"},
    _REGIONS: _FIT | {"granularity", "encoder", "text_encoder", "score", "dim", "loss", "seed"},
    VIDEO_TEXT.name: _CLIPS | _LESS | _RANKED | {"text_encoder"},
    VIDEO_LABELS.name: _CLIPS | {"label_smoothing"},
    IMAGE_VIDEO.name: _CLIPS | _LESS | _RANKED | {"encoder", "fusion"},
}


@dataclass(frozen=True)
class TrainOptions:
    """The options of `pycm train`.

    Attributes:
        pairs, reading: the file of pairs and how it is read.
        out: the folder of the matcher.
        given: those options of the matcher and its training that were given, by name; for the others the matcher's own
            defaults hold. The checkpoint is by default one in `out`, gone when the matcher is saved.
    """

    pairs: Path
    reading: PairOptions
    out: Path
    given: Mapping[str, Any]
    gallery: Path | None
    device: str | None
    cache: Path | None
    no_cache: bool
    skip_unreadable: bool


def run_train(options: TrainOptions) -> None:
    """Check what can be checked, train, save, and tell how well the held-out pairs are matched."""
    check_cache_options(options.cache, options.no_cache)
    check_device(options.device)
    for name, folder in (("--out", options.out), ("--gallery", options.gallery)):
        if folder is not None:
            check_folder(name, folder)
    given, reading = dict(options.given), options.reading
    for option in ("encoder", "text_encoder"):
        if option in given and given[option] != "words":
            check_spec(_flag(option), given[option])
    if "validation" in given:
        given["validation"] = _validation(given["validation"])
    if "candidates" in given:
        given["candidates"] = _candidates(given["candidates"])
    if given.get("head") == "labels":
        if reading.system not in (None, VIDEO_TEXT.name):
            raise CommandError(f"--head labels: not for the system {reading.system}")
        reading = replace(reading, system=VIDEO_LABELS.name)
    every = read_pairs(options.pairs, reading)
    held_out = None
    if reading.split == "train":
        held_out = read_pairs(options.pairs, replace(reading, split="all")).split("test")
    system = every.system
    _check_given(given, system, options.gallery)
    training = {name: given.pop(name) for name in (_FIT | {"label_smoothing"}) & given.keys()}
    learned = given.get("granularity") == "region" or system is not IMAGE_TEXT  # and not in closed form
    checkpoint = training.get("checkpoint", options.out / "checkpoint")
    if learned:
        training["checkpoint"] = checkpoint
    if training.get("fine_tune", "all") != "all":
        training["fine_tune"] = [name.strip() for name in training["fine_tune"].split(",")]
    training |= _less(given, system)
    console = Console(highlight=False)
    with ExitStack() as stack:
        cache = run_cache(stack, options.cache, options.no_cache)
        start = time.perf_counter()
        with Console(stderr=True).status("Loading the encoders"):
            matcher = _matcher(given, system, cache, options.device)
        skip = "skip" if options.skip_unreadable else "raise"
        try:
            matcher.fit(every.left, every.right, on_error=skip, **training)
        except KeyboardInterrupt:
            raise StoppedError(_how_to_go_on(learned, checkpoint, options)) from None
        matcher.save(options.out)
        write_record(options.out, options.pairs, reading.split)
        if learned and "checkpoint" not in options.given and checkpoint.is_dir():
            shutil.rmtree(checkpoint)
        spent = time.perf_counter() - start
        learned_from = len(without(every, matcher.errors_))
        trained = f"Trained on {learned_from:,} {system.left.many} in {duration(spent)}."
        console.print(Text(trained), soft_wrap=True)
        _tell_left_out(console, matcher.errors_)
        if "unlabelled" in training:
            found = f"Of those that nobody paired, {matcher.pseudo_pairs_:,} pairs were found and learned from."
            console.print(Text(found), soft_wrap=True)
        console.print(Text(f"Written: {options.out}"), soft_wrap=True)
        if options.gallery is not None:
            count, _ = write_index(
                options.gallery, matcher, options.out, system.left, every.left, options.skip_unreadable
            )
            console.print(Text(f"Gallery: {options.gallery}, {count:,} {system.left.many}"), soft_wrap=True)
            tell_of_the_classifier(console, matcher)
        _tell(console, options, every, held_out, matcher)


def _check_given(given: Mapping[str, Any], system: System, gallery: Path | None) -> None:
    """Refuse what the system has no use for, and what does not go together."""
    regions = given.get("granularity") == "region"
    name = _REGIONS if regions and system is IMAGE_TEXT else system.name
    if useless := [option for option in given if option not in _TAKES[name]]:
        why = "; its space is found in closed form" if name == IMAGE_TEXT.name and _FIT & {*useless} else ""
        raise CommandError(f"{', '.join(map(_flag, useless))}: not for the system {name}{why}")
    if system is VIDEO_LABELS and given.get("head", "labels") != "labels":
        raise CommandError(f"--head {given['head']}: the file has labels in place of texts")
    spaces = ("ridge", "rbf", *{IMAGE_TEXT: ["cca"], IMAGE_VIDEO: ["identity"]}.get(system, []))
    if given.get("space", "ridge") not in spaces:
        raise CommandError(f"--space must be one of {', '.join(spaces)} for {name}, got {given['space']!r}")
    pairs = given.get("head", "pairs" if system is IMAGE_VIDEO else "ranking") == "pairs"
    for option in ("fusion", "candidates"):
        if option in given and not pairs:
            raise CommandError(f"{_flag(option)}: nothing classifies pairs without --head pairs")
    if "bidirectional" in given and given.get("cell") == "none" and not (pairs and system is IMAGE_VIDEO):
        raise CommandError("--bidirectional: --cell none reads in no direction")
    if "space_streams" in given and "space" not in given:
        raise CommandError("--space-streams: no space reads them without --space")
    if "encoder_lr" in given and "fine_tune" not in given:
        raise CommandError("--encoder-lr: no encoder is trained without --fine-tune")
    if "bits" in given and "hubness" in given:
        raise CommandError("--bits and --hubness do not go together")
    for option in ("bits", "hubness"):
        if option in given and pairs:
            raise CommandError(f"{_flag(option)}: it is of embeddings that rank, by --head ranking")
    # A network learns by the metric that its codes are ranked by, the closed form by none.
    by_hamming = ("dot",) if system is IMAGE_TEXT else ("cosine", "dot")
    if "bits" in given and given.get("metric", "dot") not in by_hamming:
        raise CommandError(f"--bits: codes are ranked by Hamming distance, not by --metric {given['metric']}")
    if ("unlabelled" in given) != ("threshold" in given):
        raise CommandError("--unlabelled and --threshold go together")
    if regions and isinstance(given.get("validation"), int):
        raise CommandError(f"--validation {given['validation']}: regions take a share or none, not folds")
    if regions and gallery is not None:
        raise CommandError("--gallery: not with --granularity region, where an item is many vectors")


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def _validation(text: str) -> float | int | None:
    """A share, a number of folds, or none."""
    if text == "none":
        return None
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise CommandError(f"--validation must be a share as 0.1, folds as 5, or none, got {text!r}") from None


def _candidates(text: str) -> int | None:
    """A number, or all."""
    if text == "all":
        return None
    try:
        return int(text)
    except ValueError:
        raise CommandError(f"--candidates must be a number or all, got {text!r}") from None


def _less(given: dict[str, Any], system: System) -> dict[str, Any]:
    """What `fit` takes of the options for learning with less, out of `given`: the files that they name."""
    out: dict[str, Any] = {}
    if "target" in given:
        kind = IMAGE if system is IMAGE_TEXT else CLIP
        out[f"target_{kind.many}"] = _items(kind, given.pop("target"))
    if "unlabelled" in given:
        sides = zip((system.left, system.right), given.pop("unlabelled"), strict=True)
        out |= {"unlabelled": tuple(_items(kind, path) for kind, path in sides), "threshold": given.pop("threshold")}
    return out


def _items(kind: Kind, path: Path) -> list[Any]:
    if kind is TEXT:
        return [line.text for line in read_texts(path)]
    return list(read_images(path) if kind is IMAGE else read_clips(path))


def _matcher(given: Mapping[str, Any], system: System, cache: Any, device: str | None) -> Any:
    """An unfitted matcher with the options given, under the names that its constructor has for them."""
    from .. import matchers
    from ..spaces import CCA, ITQ, HubnessCorrection, Identity, Ridge

    own = dict(given)
    regions = own.pop("granularity", "image") == "region"
    if "encoder" in own:
        own["image_encoder"] = own.pop("encoder")
    spaces: dict[str, Callable[[], Any]] = {
        "ridge": Ridge,
        "rbf": lambda: Ridge(kernel="rbf"),
        "identity": lambda: Ridge(toward="identity"),
        "cca": CCA,
    }
    if regions:
        return matchers.RegionTextMatcher(cache=cache, device=device, **own)
    if system is IMAGE_TEXT:
        space = spaces[own.pop("space", "ridge")]()
        if "bits" in own:
            space, own["metric"] = ITQ(space, own.pop("bits")), "dot"
        if "hubness" in own:
            space = HubnessCorrection(space, own.pop("hubness"))
        spec = own.pop("image_encoder", DEFAULT_SPECS[0])
        text_spec = own.pop("text_encoder", default_text_spec(spec))
        return matchers.ImageTextMatcher(spec, text_spec, space, cache=cache, device=device, **own)
    if "space" in own:
        own["space"] = spaces[own["space"]]()
    for option in {"streams", "space_streams"} & own.keys():
        own[option] = tuple(name.strip() for name in own[option].split(","))
    if "bits" in own:
        own["embedding_space"] = ITQ(Identity(), own.pop("bits"))
    if "hubness" in own:
        own["embedding_space"] = HubnessCorrection(Identity(), own.pop("hubness"))
    if own.get("fusion") == "both":
        own["fusion"] = ("h0", "steps")
    if own.get("cell") == "none":
        own["cell"] = None
    if system is VIDEO_LABELS:
        own["head"] = "labels"
    kind = matchers.ImageVideoMatcher if system is IMAGE_VIDEO else matchers.VideoTextMatcher
    return kind(cache=cache, device=device, **own)


def _how_to_go_on(learned: bool, checkpoint: Path, options: TrainOptions) -> str:
    if learned and any(checkpoint.glob("**/training.pt")):
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
    print_recalls(console, f"{pairs.system.name}: {what}", measured)
    _tell_left_out(console, [error for error in measured.results.found.errors if error not in matcher.errors_])


def _tell_left_out(console: Console, errors: Sequence[tuple[str, str]]) -> None:
    for name, reason in errors:
        console.print(Text(f"left out: {shown(name)}: {reason}", style="yellow"), soft_wrap=True)
