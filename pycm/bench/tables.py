"""Results as a table on the terminal, and as the Markdown tables of benchmarks/README.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from .cases import KINDS, OPS, Case, Op
from .providers import PROVIDERS, missing
from .run import SCHEMA, ratio

BEGIN, END = "<!-- begin tables -->", "<!-- end tables -->"
GALLERY = "pycm-gallery"
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "int8": "int8"}

Results = dict[str, Any]  # of a run, or of one case


def read(path: Path) -> Results:
    """The results in a file.

    Raises:
        ValueError: no JSON, or results of another schema.
    """
    try:
        results: Results = json.loads(path.read_text(encoding="utf-8"))
        schema = results.get("schema")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not the results of pycm bench: {error}") from error
    if schema != SCHEMA:
        raise ValueError(f"{path}: schema must be {SCHEMA}, got {schema}")
    return results


def duration(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.2f} µs"
    return (
        f"{seconds * 1e3:.3g} ms"
        if seconds < 0.1
        else f"{seconds * 1e3:.0f} ms"
        if seconds < 10
        else f"{seconds:.1f} s"
    )


def heading(results: Results) -> str:
    """Machine, commit, date, versions and limits in a few sentences."""
    place = results["machine"]
    commit = f"commit {place['commit'][:12]}" if place["commit"] else f"pycm {place['versions']['pycm-match']}"
    changed = " with uncommitted changes" if place["modified"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in place["versions"].items() if version)
    tiny = "TINY CASES: these figures measure nothing. " if results["tiny"] else ""
    limits = "; ".join(
        f"{threads} thread{'s' * (threads != '1')} {rates(one)}" for threads, one in results["limits"].items()
    )
    return (
        f"{tiny}{place['processor']}, {results['threads']} of {place['processors']} processors, level "
        f"{place['cpu_level']}, {place['compiler']}; {commit}{changed}; {results['date'][:10]}; Python "
        f"{place['python']}, {versions}. The machine's own limits, measured in the same run: {limits}."
    )


def rates(limits: dict[str, float]) -> str:
    parts = [f"{limits[key] / 1e9:.0f} GOP/s in {name}" for key, name in _SHORT.items() if limits[key]]
    return ", ".join([*parts, f"{limits['read'] / 1e9:.0f} GB/s read"])


def line(result: Results) -> str:
    """One case on one line, for the log of a run."""
    median, ratios = result["median"], result["ratio"]
    parts = [
        f"{name} {duration(median[name])}" + (f" ({ratios[name]:.2f})" if name in ratios else "") for name in median
    ]
    return f"{result['case']['name']}: {', '.join(parts) or 'skipped'}"


def share(result: Results, name: str, precision: str) -> float | None:
    """The least time that the machine allows in a precision / the provider's time; above 1 it is beyond that limit."""
    bound = result["bounds"].get(precision)
    return None if bound is None else float(bound / result["median"][name])


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def of_op(results: Results, op: Op) -> list[Results]:
    return [result for result in results["results"] if result["case"]["op"] == op]


def names_of(op: Op, rows: Sequence[Results]) -> list[str]:
    """The providers that any of the cases has a time of, pycm's first."""
    return [provider.name for provider in PROVIDERS[op] if any(provider.name in row["median"] for row in rows)]


def fastest_peer(result: Results) -> str | None:
    peers = [name for name in result["median"] if not name.startswith("pycm") and name not in result["wrong"]]
    return min(peers, key=lambda name: float(result["median"][name]), default=None)


# ---- the terminal ----


def terminal(results: Results, op: Op) -> Table:
    """A line per case and provider: median, ratios to pycm's variants, shares of the machine's limits."""
    rows = of_op(results, op)
    bases = [name for name in ("pycm", GALLERY) if any(name in row["median"] for row in rows)]
    precisions = [p for p in ("float32", "int8") if any(p in row["bounds"] for row in rows)]
    table = Table(title=OPS[op], title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("case", overflow="fold", max_width=38)
    table.add_column("provider", no_wrap=True)
    for name in ("median", *(f"÷ {base}" for base in bases), *(f"of {_SHORT[p]} limit" for p in precisions)):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for row in rows:
        first: list[Text] = [Text(row["case"]["name"], "bold"), Text(row["case"]["shape"], "dim")]
        first += [Text(row["case"]["about"], "dim italic")]
        best = fastest_peer(row)
        for name in sorted(row["median"], key=lambda name: float(row["median"][name])):
            ratios = [ratio(row, name, base) if base in row["median"] else None for base in bases]
            style = "bold green" if name.startswith("pycm") else "yellow" if name == best else ""
            table.add_row(
                first.pop(0) if first else "",
                Text(name, style=style),
                duration(row["median"][name]),
                *("" if value is None else f"{value:.2f}" for value in ratios),
                *(_percent(share(row, name, precision)) for precision in precisions),
                Text(f"WRONG: {row['wrong'][name]}" if name in row["wrong"] else "", style="bold red"),
            )
        for name, reason in [*row["skipped"].items(), *_failed(row)]:
            filler = [""] * (1 + len(bases) + len(precisions))
            table.add_row(first.pop(0) if first else "", Text(name, style="dim"), *filler, Text(reason, style="dim"))
        for rest in first:
            table.add_row(rest)
        table.add_section()
    return table


def _failed(row: Results) -> list[tuple[str, str]]:
    return [(name, f"FAILED: {reason}") for name, reason in row["wrong"].items() if name not in row["median"]]


def listing(cases: Sequence[Case]) -> list[Table]:
    """What there is to measure, and with what."""
    table = Table(title="Cases", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("op", "case", "shape", "stands for", "data"):
        table.add_column(name, overflow="fold")
    for case in cases:
        table.add_row(case.op, Text(case.name, "bold"), case.shape, case.about, case.data)
    kinds = Table(title="Data", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    kinds.add_column("name")
    kinds.add_column("what")
    for kind, about in KINDS.items():
        kinds.add_row(Text(kind, "bold"), about)
    peers = Table(title="Providers", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("op", "provider", "what", "here"):
        peers.add_column(name, overflow="fold")
    for op in OPS:
        for provider in PROVIDERS[op]:
            state = missing(provider) or ("when asked for by --provider" if provider.asked else "yes")
            peers.add_row(op, Text(provider.name, "bold"), provider.about, state)
    return [table, kinds, peers]


# ---- Markdown ----


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def markdown(results: Results, op: Op) -> str:
    """The table of an operation: a case a row, a provider a column, losses named below."""
    rows = [row for row in of_op(results, op) if row["median"]]
    names = names_of(op, rows)
    bounded = any("float32" in row["bounds"] for row in rows)
    table = [_row(["case", *(["fp32 limit"] if bounded else []), *names])]
    table.append(_row(["---"] * (1 + bounded + len(names))))
    for row in rows:
        cells = [f"`{row['case']['name']}`"]
        if bounded:
            cells.append(duration(row["bounds"]["float32"]) if "float32" in row["bounds"] else "–")
        table.append(_row([*cells, *(_cell(row, name) for name in names)]))
    words = [f"- `{row['case']['name']}`: {_words(row['case'])}" for row in of_op(results, op)]
    skipped = {reason for row in of_op(results, op) if not row["median"] for reason in row["skipped"].values()}
    notes = [losses(rows), *(f"Not run: {reason}." for reason in sorted(skipped))]
    return "\n".join([*words, "", *table, "", *(note for note in notes if note)]).rstrip()


def _words(case: dict[str, Any]) -> str:
    data = "" if case["op"] in ("similarity", "call", "temporal_pool", "loss") else f"; {KINDS[case['data']]}"
    return f"{case['about']} ({case['shape']}{data})"


def _cell(row: Results, name: str) -> str:
    if name not in row["median"]:
        return "failed" if name in row["wrong"] else "–"
    text = duration(row["median"][name])
    if not name.startswith("pycm"):
        against = [f"{ratio(row, name, base):.2f}×" for base in ("pycm", GALLERY) if base in row["median"]]
        text += f" ({', '.join(against)})" if against else ""
    elif (of := share(row, name, "float32")) is not None:
        text = f"**{text}** ({_percent(of)})"
    return text + (" **wrong**" if name in row["wrong"] else "")


def losses(rows: Sequence[Results]) -> str:
    """The cases in which a peer is faster than pycm, for one-shot calls and for prepared galleries."""
    sentences = []
    for base in ("pycm", GALLERY):
        lost = []
        for row in rows:
            best = fastest_peer(row)
            if base in row["median"] and best is not None and (r := ratio(row, best, base)) < 1:
                lost.append(f"`{row['case']['name']}` ({best}, {r:.2f}×)")
        if any(base in row["median"] for row in rows):
            sentences.append(f"`{base}` is slower than the fastest peer in: {', '.join(lost) or 'none'}.")
    return " ".join(sentences)


def tables(results: Results) -> str:
    """Everything of one run as Markdown."""
    blocks = [heading(results)]
    for op, title in OPS.items():
        if of_op(results, op):
            blocks += [f"### {title}", markdown(results, op)]
    return "\n\n".join(blocks)


def fill(path: Path, runs: Sequence[Results]) -> str:
    """The text of a Markdown file with everything between the table markers replaced.

    Raises:
        ValueError: the markers are missing, or there are tiny results, which measure nothing.
    """
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{path}: expected one '{BEGIN}' and one '{END}' after it")
    if any(results["tiny"] for results in runs):
        raise ValueError("--readme: tiny cases measure nothing; not written")
    before, _, rest = text.partition(BEGIN)
    body = "\n\n".join(tables(results) for results in runs)
    return f"{before}{BEGIN}\n\n{body}\n\n{END}{rest.partition(END)[2]}"
