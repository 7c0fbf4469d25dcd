"""One JSON and one table of everything that the parts of benchmarks/gpu.sh have left behind.

python benchmarks/gpu/report.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def line(case: dict[str, Any]) -> str:
    if "failed" in case:
        return f"| {case['about']} | FAILED: {case['failed']} | | | | |"
    theirs = ", ".join(f"{name} {ratio:.2f}" for name, ratio in case["ratio"].items() if name != "pycm")
    score = "—" if case["score"] is None else f"{case['score']:.2f} (goal {case['goal']:.2f})"
    why = "; ".join(f"{name}: {reason}" for name, reason in case["absent"].items())
    verdict = {True: "reached", False: "missed", None: f"no baseline: {why}"}
    if "memory_share" in case:
        score += f"; memory {case['memory_share']:.2f} of it (goal {case['memory_goal']:.2f})"
        if not case["memory_reached"]:
            verdict[True] = verdict[False] = "missed"
    return (
        f"| {case['about']} | {milliseconds(case['median']['pycm'])} | {100 * case['share']:.0f} % | {theirs or '—'} | "
        f"{score} | {verdict[case['reached']]} |"
    )


def main() -> int:
    folder = Path(sys.argv[1])
    parts = {path.stem: path.read_text(encoding="utf-8").strip() for path in sorted(folder.glob("part-*.status"))}
    machine = folder / "bench" / "machine.json"
    report: dict[str, Any] = {
        "parts": parts,
        "machine": json.loads(machine.read_text(encoding="utf-8")) if machine.exists() else None,
        "cases": [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("bench/case-*.json"))],
    }
    table = [
        "| part | result |",
        "| --- | --- |",
        *(f"| {name[5:]} | {status} |" for name, status in parts.items()),
        "",
    ]
    if report["machine"]:
        limits = report["machine"]["limits"]
        rates = ", ".join(f"{name} {rate / 1e12:.4g} TOP/s" for name, rate in limits.items() if name != "copy")
        place = f"{report['machine']['device']}, torch {report['machine']['torch']}"
        table.append(f"{place}; copy {limits['copy'] / 1e12:.3g} TB/s, {rates}")
        table.append("")
    table += [
        "| case | pycm | of the floor | peer's time / pycm's | against the goal's baseline | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    table += [line(case) for case in report["cases"]]
    (folder / "gpu.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    (folder / "gpu.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    print("\n".join(table))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
