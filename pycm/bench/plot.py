"""The plot of a run: time and ratio of every case and provider, with the machine's limits as lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._files import atomic_write
from .._optional import require
from .cases import OPS
from .run import ratio
from .tables import Results, names_of, of_op

ENDINGS = (".png", ".svg", ".pdf")

# pycm's variants in strong colours, the peers in quieter ones, each its own wherever it appears.
_OURS = ("#0b6e4f", "#21b57c", "#8fd14f", "#d4a017", "#c2571a")
_PEERS = (
    *("#3b5b92", "#e07b39", "#8e63b0", "#b5504f", "#5aa5c8", "#7f7f7f", "#c78cc0", "#a5895b"),
    *("#4a4a4a", "#d1a39a", "#1f3d3d", "#e3c04b", "#6a2c4f", "#9aa8d8", "#2f7f93", "#b0b87a"),
)
_LIMITS = {
    "float32": ("#111111", "-", "fp32 limit"),
    "bfloat16": ("#777777", "--", "bf16 limit"),
    "int8": ("#aaaaaa", ":", "int8 limit"),
}
_ROW_INCHES = 0.34


def colours(results: Results) -> dict[str, str]:
    """Provider to colour."""
    names = list(dict.fromkeys(name for op in OPS for name in names_of(op, of_op(results, op))))
    ours = [name for name in names if name.startswith("pycm")]
    peers = [name for name in names if not name.startswith("pycm")]
    return {
        **{name: _OURS[i % len(_OURS)] for i, name in enumerate(ours)},
        **{name: _PEERS[i % len(_PEERS)] for i, name in enumerate(peers)},
    }


def write_plot(results: Results, path: Path) -> None:
    """Draw `results` into a PNG, SVG or PDF file."""
    figure = draw(results)
    ending = path.suffix[1:].lower()
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format=ending, dpi=130, metadata={"Date": None} if ending == "svg" else None)


def draw(results: Results) -> Any:
    """A matplotlib figure. Left: seconds on a logarithmic axis. Right: the same, divided by pycm's.

    Both have the least time that the machine allows, a line a row and precision. ValueError where nothing was measured.
    """
    matplotlib, figure_module = _matplotlib("matplotlib"), _matplotlib("matplotlib.figure")
    rows = [row for op in OPS for row in of_op(results, op) if row["median"]]
    if not rows:
        raise ValueError("--plot: no case was measured")
    style = {"font.size": 9, "svg.hashsalt": "pycm", "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure = figure_module.Figure(figsize=(13, 1.9 + _ROW_INCHES * len(rows)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
        _times(left, rows, colours(results))
        _ratios(right, rows, colours(results))
        _rows(left, right, rows)
        handles, labels = left.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=7, frameon=False)
        place = results["machine"]
        tiny = "TINY CASES, these figures measure nothing. " if results["tiny"] else ""
        commit = (place["commit"] or place["versions"]["pycm-match"] or "")[:12]
        figure.suptitle(
            f"{tiny}pycm against its peers: {place['processor']}, {results['threads']} threads, {commit}, "
            f"{results['date'][:10]}",
            fontsize=11,
        )
    return figure


def _matplotlib(module: str) -> Any:
    return require(module, "bench", "pycm bench --plot")


def _marker(name: str) -> dict[str, Any]:
    ours = name.startswith("pycm")
    return {"marker": "D" if ours else "o", "s": 42 if ours else 26, "zorder": 4 if ours else 3, "linewidths": 0}


def _limits(axes: Any, rows: Sequence[Results], base: str | None) -> None:
    """The least time that the machine allows in each precision, as a line a row; divided by the base's where given."""
    for precision, (colour, style, label) in _LIMITS.items():
        for y, row in enumerate(rows):
            if precision in row["bounds"] and (base is None or base in row["median"]):
                x = row["bounds"][precision] / (1 if base is None else row["median"][base])
                axes.plot([x, x], [y - 0.45, y + 0.45], color=colour, linestyle=style, lw=1.6, label=label, zorder=2)


def _times(axes: Any, rows: Sequence[Results], colour: dict[str, str]) -> None:
    _limits(axes, rows, None)
    for name, shade in colour.items():
        points = [(row["median"][name], y) for y, row in enumerate(rows) if name in row["median"]]
        axes.scatter(*zip(*points, strict=True), color=shade, label=name, **_marker(name))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(_matplotlib("matplotlib.ticker").EngFormatter("s"))
    axes.set_xlabel("time of a call, median, and the least that the machine allows")


def _ratios(axes: Any, rows: Sequence[Results], colour: dict[str, str]) -> None:
    axes.axvline(1, color=_OURS[0], lw=1.6, zorder=2)
    _limits(axes, rows, "pycm")
    for name, shade in colour.items():
        points = [
            (ratio(row, name, "pycm"), y)
            for y, row in enumerate(rows)
            if name in row["median"] and "pycm" in row["median"] and name != "pycm"
        ]
        if points:
            axes.scatter(*zip(*points, strict=True), color=shade, **_marker(name))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.set_xlabel("the same, divided by pycm's time: right of the line pycm is faster")


def _rows(left: Any, right: Any, rows: Sequence[Results]) -> None:
    left.set_yticks(range(len(rows)), [row["case"]["name"] for row in rows])
    left.set_ylim(len(rows) - 0.4, -0.6)
    ops = [row["case"]["op"] for row in rows]
    for axes in (left, right):
        axes.grid(axis="x", which="major", color="#dddddd", lw=0.7, zorder=0)
        axes.tick_params(axis="y", length=0)
        for y in range(1, len(rows)):
            new = ops[y] != ops[y - 1]
            axes.axhline(y - 0.5, color="#999999" if new else "#eeeeee", lw=1.0 if new else 0.7, zorder=1)


def check_plot(path: Path) -> None:
    """Raise before the long work what would stop it at the end: another ending, or no matplotlib."""
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"--plot {path}: must end in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}")
    _matplotlib("matplotlib")
