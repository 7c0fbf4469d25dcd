"""What the systems reach on real clips: retrieval both ways, and tasks that only time or only sound decides.

    PYCM_DATA=/path/to/data python benchmarks/clips.py --cache features        # everything
    python benchmarks/clips.py --part text --part image                        # some of it

Prints the figures, and writes benchmarks/results/clips.json and benchmarks/clips.md. Parts that are not run keep the
figures that the JSON file has.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from clip_answers import sound, time_tasks
from clip_experiments import image, streams, text
from clip_tuning import tuning

import pycm
from pycm._files import atomic_write

HERE = Path(__file__).parent
PARTS: dict[str, Callable[[Path, str], Any]] = {
    "text": text,
    "streams": streams,
    "image": image,
    "time": time_tasks,
    "sound": sound,
    "tuning": tuning,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("PYCM_DATA"), help="folder of the data; $PYCM_DATA")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="may be repeated; all without")
    parser.add_argument("--cache", help="folder where features are kept")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "clips.json")
    parser.add_argument("--readme", type=Path, default=HERE / "clips.md")
    options = parser.parse_args()
    if not options.data:
        parser.error("--data or PYCM_DATA must name the data's folder")
    torch.set_num_threads(max(1, torch.get_num_threads()))
    with tempfile.TemporaryDirectory() as scratch:
        for part in options.part or PARTS:
            start = time.process_time()
            figures = PARTS[part](Path(options.data), options.cache or scratch)
            entry = {"figures": figures, "cpu_seconds": round(time.process_time() - start, 1), "versions": versions()}
            # Read late and written at once: parts may run beside each other.
            results = json.loads(options.out.read_text()) if options.out.exists() else {}
            results = {name: (results | {part: entry})[name] for name in PARTS if name in results or name == part}
            with atomic_write(options.out) as file:
                json.dump(results, file, indent=1)
            with atomic_write(options.readme) as file:
                file.write(markdown(results))
            print(TABLES[part](figures), f"({entry['cpu_seconds']} s of CPU)\n", sep="\n", flush=True)


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "pycm-match": pycm.__version__, "torch": torch.__version__}


def table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def retrieval(figures: dict[str, Any]) -> str:
    ways, bases = figures["directions"], figures["baselines"]
    gains = [f"MRR over {base}" for base in bases]
    tables = []
    for gallery, title in (("unseen", "gallery: the held-out fold"), ("all", "gallery: all 187")):
        header = [title, *(f"{way}, {what}" for way in ways for what in ("R@1", "R@5", "MRR")), *gains]
        rows = []
        for name, row in figures["systems"].items():
            cells = [value for way in ways for value in recalls(row[way][gallery])]
            found = [interval(gain) for gain in row["gain"][gallery]]
            rows.append([name, *cells, *found, *[""] * (len(bases) - len(found))])
        tables.append(table(header, rows))
    return "\n\n".join(tables)


def recalls(figures: dict[str, float]) -> list[str]:
    return [percent(figures["recall@1"]), percent(figures["recall@5"]), f"{figures['mrr']:.3f}"]


def interval(gain: list[float]) -> str:
    return f"{gain[0]:+.3f} [{gain[1]:+.3f}, {gain[2]:+.3f}]"


def choices(figures: dict[str, Any]) -> list[str]:
    """What was chosen by inner folds, for each outer one, and the inner folds' figures where they are kept."""
    if "chosen" not in figures:
        return []
    inner = [f"{name} {percent(value)} %" for name, value in figures.get("inner", {}).items()]
    return [f"Chosen: {'; '.join(figures['chosen'])}." + (f" Inner folds: {', '.join(inner)}." if inner else "")]


def accuracies(figures: dict[str, Any]) -> str:
    return table(["task", "system", "right, %", "chance, %"], [
        [row["task"], row["system"], percent(row["accuracy"]), percent(row["chance"])] for row in figures["rows"]
    ])  # fmt: skip


def trained(figures: dict[str, Any]) -> str:
    bases = [f"MRR over {name}" for name in figures["baselines"]]
    rows = []
    for name, row in figures["systems"].items():
        found = [f"{percent(a)} [{percent(b)}, {percent(c)}]" for a, b, c in row["intervals"].values()]
        gains = [interval(gain) for gain in row["gain"]]
        rows.append([name, *found, f"{row['mrr']:.3f}", *gains, *[""] * (len(bases) - len(gains))])
    return table(["trained", "R@1", "R@5", "R@10", "MRR", *bases], rows)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "text": retrieval,
    "streams": retrieval,
    "image": retrieval,
    "time": accuracies,
    "sound": accuracies,
    "tuning": trained,
}

HEADINGS = {
    "text": """## Text and clips

187 clips, five folds by SHA-256 of the id. Each clip and each English caption is a query once, in the fold that was
held out: neither the clip, nor its still picture, nor its caption was seen before: names of other clips and pictures
that equal a held-out caption ("cow" of a cow's face) are left out. The gallery is that of the held-out fold (29 to 44
items) in the first table, all 187 in the second, where the others are those that the system was fitted to. Ridge learns
one caption a clip, the matcher and its start all its names. Gains are of the mean reciprocal rank, both ways together,
with a paired 95 % bootstrap interval over items. The linear start (ridge or kernel ridge), then loss, learning rate and
epochs of the matcher are chosen anew for each fold, by three folds of what is learned from. Most of the matcher's gain
is its linear start's: what the networks add is less than 187 clips can tell from nothing. "Less hubs" is the same
network with `embedding_space=HubnessCorrection(Identity())`, whose one setting is its default.""",
    "streams": """## What each part is worth

The network alone, without a linear start and without pictures beside the clips, at one setting for all rows, with all
names of the clips: seven held-out captions are also names of other clips. Folds and gains as above.""",
    "image": """## Pictures and clips of two drawing styles

The still picture of the same thing in another style finds the clip, and the reverse; folds and tables as above.
`ImageVideoMatcher` begins with ridge, toward nothing or toward the identity (`Ridge(toward="identity")`: both styles
standardised, what one lacks of the other predicted: always preferred), and its network adds to that, again less than
can be told from nothing; chosen as above. Among clips that it was fitted to, its gain over cosine, which is fitted to
nothing, is not above 0: what was fitted draws the queries to itself. Less hubs, it is.""",
    "time": """## Where only time tells

Each clip is there forwards and backwards: the same frames, so that without their order half the guesses are right.
The emoji clips are the same in training and test, by other samples of their frames (a quarter are in both): what is
told is the direction of a known clip. A digit's caption is compared with its opposite, then with those of all ways.""",
    "sound": """## Where only sound tells

A speaker who was not heard in training says a digit, three recordings a quarter of a second apart, while a card hides
the picture: MP4 files, written and read by PyAV; 250 clips of one recording each, of the five others, are learned
from. `motion` sees the card alone, `sound` and `speech` hear mel bands. The chosen stream is that, among `speech` and
the three layers of the pretrained LSTM of `voice`, which did best where each of the other five was held out in turn.
All are the mean of five matchers by other seeds. What they share (sizes, dropout, epochs) was settled with these six
speakers in view: the figures are optimistic by what that is worth. `speech` is normalised over a clip, and single
recordings are short for that: learned from clips of three recordings at three speeds it told 86.7 % in an earlier run,
of clips without pauses. `voice` read those in one piece, and told 88.3 %.""",
    "tuning": """## Training the encoders as well

Still pictures of `emoji/` and their English names: 300 to learn from, the 289 of the split rule held out and the
gallery of each other; both ways together, over three seeds. `VideoTextMatcher` on clips of one frame; EfficientNet at
72 × 72 pixels, the pictures' own size, and MiniLM. The epoch of best validation (15 % of the 300) counts. The heads'
learning rate and batch size were chosen among four by what the heads alone reach on the held out, with one seed: if
that favours a row, then theirs. 95 % bootstrap intervals over pictures; gains are paired.""",
}


def markdown(results: dict[str, Any]) -> str:
    parts = [
        "\n\n".join([HEADINGS[name], TABLES[name](results[name]["figures"]), *choices(results[name]["figures"])])
        for name in PARTS
        if name in results
    ]
    about = next(iter(results.values()))["versions"]
    note = ", ".join(f"{name} {version}" for name, version in about.items())
    return "# Clips\n\nBy `python benchmarks/clips.py`. " + note + ".\n\n" + "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
