"""Results as text, and as the tables of benchmarks/README.md.

`python -m benchmarks.report results/FILE.json [--write]`
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.providers import PROVIDERS

README = Path(__file__).with_name("README.md")
TITLES = {"similarity": "Similarity matrices", "topk": "Exact top-k", "latency": "One call on 8×16 inputs"}
MISSING = "not yet measured"


def heading(results: dict[str, Any]) -> str:
    place, limits = results["machine"], results["limits"]
    commit = (place["commit"] or "unknown")[:12] + (" with uncommitted changes" if place["modified"] else "")
    versions = ", ".join(f"{name} {version}" for name, version in place["versions"].items() if version)
    tiny = "TINY CASES: these figures measure nothing. " if results["tiny"] else ""
    return (
        f"{tiny}{place['processor']}, {results['threads']} of {place['processors']} processors, level "
        f"{place['cpu_level']}, {place['compiler']}; commit {commit}; {results['date'][:10]}; Python "
        f"{place['python']}, {versions}. Measured in the same run: {limits['fp32_gflops']:.0f} "
        f"GFLOP/s in a plain fp32 product, {limits['copy_gbytes_per_s']:.1f} GB/s copying."
    )


def line(result: dict[str, Any]) -> str:
    parts = [f"{name} {duration(result['median'][name])} ({result['ratio'][name]:.2f})" for name in result["median"]]
    return f"{result['case']['op']} {result['case']['name']}: " + ", ".join(parts)


def duration(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.2f} µs"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table(results: dict[str, Any], op: str) -> str:
    """pycm's time, its share of the machine's arithmetic, and every peer's time with its ratio to pycm's."""
    rows = [result for result in results["results"] if result["case"]["op"] == op]
    if not rows:
        return MISSING
    names = [name for name in PROVIDERS[op] if any(name in row["median"] for row in rows)]
    ours, peers = names[0], names[1:]
    share = op != "latency"
    head = ["case", ours, *(["GFLOP/s", "of a plain product"] if share else []), *peers]
    lines = [_row(head), _row(["---"] * len(head))]
    for row in rows:
        case, median = row["case"], row["median"]
        cells = [case["name"].replace("×", " × "), duration(median[ours])]
        if share:
            rate = 2.0 * case["rows"] * case["columns"] * case["dim"] / median[ours] / 1e9
            cells += [f"{rate:.0f}", f"{100 * rate / results['limits']['fp32_gflops']:.0f} %"]
        for name in peers:
            if name in median:
                note = " **wrong**" if name in row["wrong"] else ""
                cells.append(f"{duration(median[name])} ({row['ratio'][name]:.2f}×){note}")
            else:
                cells.append("–")
        lines.append(_row(cells))
    return "\n".join(lines)


def tables(results: dict[str, Any]) -> str:
    blocks = [heading(results)]
    for op, title in TITLES.items():
        blocks += [f"### {title}", table(results, op)]
    return "\n\n".join(blocks)


def fill(text: str, results: dict[str, Any]) -> str:
    """`text` with everything between the table markers replaced."""
    begin, end = "<!-- begin table -->", "<!-- end table -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{README.name}: expected one '{begin}' and one '{end}'")
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{tables(results)}\n\n{end}{rest.split(end)[1]}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--write", action="store_true", help=f"put the tables into {README.name}")
    options = parser.parse_args(arguments)
    results = json.loads(options.results.read_text())
    if not options.write:
        print(tables(results))
        return 0
    if results["tiny"]:
        print("python -m benchmarks.report: tiny cases measure nothing; not written", file=sys.stderr)
        return 2
    README.write_text(fill(README.read_text(), results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
