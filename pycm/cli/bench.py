"""`pycm bench`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from .. import _C
from .._files import atomic_write
from .._optional import require
from ..bench import plot, run, tables
from ..bench.cases import OPS, Case, all_cases
from ..bench.providers import chosen, set_threads
from .errors import CommandError
from .output import check_output


@dataclass(frozen=True)
class BenchOptions:
    """The options of the command; None or empty where not given."""

    results: Sequence[Path] = ()
    ops: Sequence[str] = ()
    cases: Sequence[str] = ()
    providers: Sequence[str] = ()
    out: Path | None = None
    plot: Path | None = None
    readme: Path | None = None
    repeats: int = 5
    budget: float = 120.0
    threads: int | None = None
    tiny: bool = False
    list: bool = False


def run_bench(options: BenchOptions) -> None:
    """Measure, or show what was measured.

    Raises:
        CommandError: options that do not fit together, or a provider whose result is wrong.
    """
    console = Console(highlight=False)
    if options.list:
        for table in tables.listing(_cases(options)):
            console.print(table)
        return
    _check(options)
    runs = [tables.read(path) for path in options.results] or [_measure(options, console)]
    for results in runs:
        console.print(Text(tables.heading(results)), soft_wrap=True)
        console.print()
        for op in OPS:
            if tables.of_op(results, op):
                console.print(tables.terminal(results, op))
    if options.plot is not None:
        plot.write_plot(runs[0], options.plot)
    if options.readme is not None:
        text = tables.fill(options.readme, runs)
        with atomic_write(options.readme) as file:
            file.write(text)
    wrong = [
        f"{row['case']['name']}: {name}: {reason}"
        for results in runs
        for row in results["results"]
        for name, reason in row["wrong"].items()
    ]
    if wrong:
        raise CommandError(f"wrong results: {'; '.join(wrong)}")


def _check(options: BenchOptions) -> None:
    """What would stop the command at the end is said at the beginning."""
    if options.results and options.out is not None:
        raise CommandError("--out: there is nothing to measure when results are given")
    if options.plot is not None:
        plot.check_plot(options.plot)
        check_output(options.plot, plot.ENDINGS)
        if len(options.results) > 1:
            raise CommandError("--plot: draws one file of results")
    if options.out is not None:
        check_output(options.out, (".json",))
    if options.readme is not None:
        tables.fill(options.readme, [])


def _cases(options: BenchOptions) -> list[Case]:
    for op in options.ops:
        if op not in OPS:
            raise CommandError(f"--op {op}: expected one of {', '.join(OPS)}")
    known = all_cases(options.tiny)
    for pattern in options.cases:
        if not any(fnmatchcase(case.name, pattern) for case in known):
            raise CommandError(f"--case {pattern}: matches no case; --list shows them")
    return [
        case
        for case in known
        if (not options.ops or case.op in options.ops)
        and (not options.cases or any(fnmatchcase(case.name, pattern) for pattern in options.cases))
    ]


def _measure(options: BenchOptions, console: Console) -> dict[str, Any]:
    cases = [case for case in _cases(options) if chosen(case.op, options.providers)]
    if not cases:
        raise CommandError("no case is left of --op, --case and --provider; --list shows them")
    settings = run.Options(
        repeats=options.repeats,
        budget=options.budget,
        threads=options.threads or _C.build_info()["threads"],
        tiny=options.tiny,
        providers=tuple(options.providers),
    )
    set_threads(settings.threads)
    if (threads := _C.build_info()["threads"]) != settings.threads:
        raise CommandError(f"--threads {settings.threads}: PYCM_NUM_THREADS is {threads}")
    results = run.begin(settings)
    limits = results["limits"][str(settings.threads)]
    tqdm = require("tqdm", "cli", "pycm bench").tqdm
    with tqdm(total=len(cases), unit="case", disable=None) as bar:
        for case, result in zip(cases, run.run_cases(cases, settings, limits), strict=True):
            results["results"].append(result)
            bar.update()
            bar.set_postfix_str(case.name)
            if options.out is not None:
                with atomic_write(options.out) as file:
                    file.write(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    return results
