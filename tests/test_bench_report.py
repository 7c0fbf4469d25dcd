"""What `pycm bench` prints, writes and draws."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

for _package in ("typer", "rich", "tqdm"):
    pytest.importorskip(_package)

from rich.console import Console  # noqa: E402

import pycm  # noqa: E402
from pycm.bench import run, tables  # noqa: E402
from pycm.cli import bench  # noqa: E402
from pycm.cli.main import run as pycm_command  # noqa: E402

README = f"before\n\n{tables.BEGIN}\nold\n{tables.END}\n\nafter\n"


def case(name: str, seconds: dict[str, list[float]], **changes: Any) -> dict[str, Any]:
    median = {provider: sorted(times)[len(times) // 2] for provider, times in seconds.items()}
    described = {"name": name, "about": f"about {name}", "op": "topk", "shape": "1 × 2 × 3", "data": "gaussian"}
    return {
        "case": described,
        "seconds": seconds,
        "median": median,
        "ratio": {},
        "prepare": {},
        "bounds": {"float32": 0.5, "int8": 0.125},
        "skipped": {},
        "wrong": {},
        **changes,
    }


@pytest.fixture(name="results")
def results_fixture() -> dict[str, Any]:
    won = case("won", {"pycm": [1.0, 1.0, 1.0], "pycm-gallery": [0.25, 0.25, 0.25], "torch": [3.0, 2.0, 4.0]})
    lost = case(
        "lost",
        {"pycm": [0.1], "pycm-gallery": [0.01], "torch": [0.05], "faiss-knn": [0.04]},
        skipped={"usearch": "not installed: usearch"},
        wrong={"faiss-knn": "a match twice", "numkong": "ValueError: no"},
    )
    bare = case("bare", {}, skipped={"pycm": "PYCM_DATA is not set", "torch": "PYCM_DATA is not set"})
    return {
        "schema": run.SCHEMA,
        "date": "2026-01-02T03:04:05+00:00",
        "tiny": False,
        "threads": 2,
        "machine": {
            "processor": "Some CPU",
            "processors": 4,
            "cpu_level": "avx2",
            "compiler": "GNU 12",
            "commit": "0123456789abcdef",
            "modified": True,
            "python": "3.11.7",
            "versions": {"pycm-match": "0.1.0", "torch": "2.13.0", "usearch": None},
        },
        "limits": {
            "1": {"float32": 1e11, "bfloat16": 0, "int8": 4e11, "read": 2e10},
            "2": {"float32": 2e11, "bfloat16": 0, "int8": 8e11, "read": 3e10},
        },
        "results": [won, lost, bare],
    }


def test_heading(results: dict[str, Any]) -> None:
    text = tables.heading(results)
    assert "Some CPU, 2 of 4 processors, level avx2, GNU 12; commit 0123456789ab with uncommitted changes" in text
    assert "pycm-match 0.1.0, torch 2.13.0." in text
    assert "1 thread 100 GOP/s in fp32, 400 GOP/s in int8, 20 GB/s read; 2 threads 200 GOP/s in fp32" in text
    assert "bf16" not in text  # this processor has none
    results["machine"].update(commit=None, modified=None)
    assert "GNU 12; pycm 0.1.0; 2026-01-02" in tables.heading(results)
    assert "TINY" in tables.heading({**results, "tiny": True})


def test_markdown(results: dict[str, Any]) -> None:
    text = tables.markdown(results, "topk")
    lines = text.splitlines()
    assert lines[0] == "- `won`: about won (1 × 2 × 3; normalised Gaussian rows)"
    assert "| case | fp32 limit | pycm | pycm-gallery | faiss-knn | torch |" in lines
    assert "| `won` | 500 ms | **1000 ms** (50 %) | **250 ms** (200 %) | – | 3000 ms (3.00×, 12.00×) |" in lines
    ours, theirs = "**100 ms** (500 %) | **10 ms** (5000 %)", "40 ms (0.40×, 4.00×) **wrong** | 50 ms (0.50×, 5.00×)"
    assert f"| `lost` | 500 ms | {ours} | {theirs} |" in lines
    assert "`pycm` is slower than the fastest peer in: `lost` (torch, 0.50×)." in text  # a wrong result wins nothing
    assert "`pycm-gallery` is slower than the fastest peer in: none." in text
    assert lines[-1] == "Not run: PYCM_DATA is not set."


def test_terminal(results: dict[str, Any]) -> None:
    console = Console(width=140, file=io.StringIO())
    console.print(tables.terminal(results, "topk"))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    lines = [re.split(r"  +", line.strip()) for line in text.splitlines()]
    assert ["case", "provider", "median", "÷ pycm", "÷ pycm-gallery", "of fp32 limit", "of int8 limit"] in lines
    assert ["won", "pycm-gallery", "250 ms", "0.25", "1.00", "200 %", "50 %"] in lines
    assert ["about won", "torch", "3000 ms", "3.00", "12.00", "17 %", "4 %"] in lines
    for words in ("WRONG: a match twice", "FAILED: ValueError: no", "not installed: usearch", "PYCM_DATA is not set"):
        assert words in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.5e-6, "1.50 µs"), (0.0123, "12.3 ms"), (0.1234, "123 ms"), (6.5, "6500 ms"), (12.34, "12.3 s")],
)
def test_duration(seconds: float, text: str) -> None:
    assert tables.duration(seconds) == text


def test_plot(results: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from pycm.bench import plot

    figure = plot.draw(results)
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["won", "lost"]
    points = {group.get_label(): group.get_offsets().tolist() for group in left.collections}
    assert points["pycm"] == [[1.0, 0.0], [0.1, 1.0]]
    assert points["faiss-knn"] == [[0.04, 1.0]]
    limits = {tuple(line.get_xdata()) for line in left.lines if line.get_label() == "fp32 limit"}
    assert limits == {(0.5, 0.5)}
    limits = {tuple(line.get_xdata()) for line in right.lines if line.get_label() == "int8 limit"}
    assert limits == {(0.125, 0.125), (1.25, 1.25)}
    assert [3.0, 0.0] in [point for group in right.collections for point in group.get_offsets().tolist()]
    assert {text.get_text() for text in figure.legends[0].get_texts()} >= {"pycm", "torch", "fp32 limit"}
    for ending, magic in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")):
        path = tmp_path / f"out{ending}"
        plot.write_plot(results, path)
        assert path.read_bytes().startswith(magic)
    with pytest.raises(ValueError, match="--plot: no case was measured"):
        plot.draw({**results, "results": results["results"][2:]})


# ---- the command ----


def test_show_and_readme(results: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    del results["results"][1]["wrong"]["numkong"], results["results"][1]["wrong"]["faiss-knn"]
    file, readme = tmp_path / "a.json", tmp_path / "README.md"
    file.write_text(json.dumps(results))
    readme.write_text(README)
    assert pycm_command(["bench", str(file), "--readme", str(readme)]) == 0
    assert "commit 0123456789ab" in capsys.readouterr().out
    text = readme.read_text()
    assert text.startswith(f"before\n\n{tables.BEGIN}\n\nSome CPU")
    assert text.endswith(f"{tables.END}\n\nafter\n")
    assert "old" not in text
    assert tables.markdown(results, "topk") in text
    assert pycm_command(["bench", str(file), str(file), "--readme", str(readme)]) == 0
    assert readme.read_text().count("Some CPU") == 2  # a run each; and the old tables are gone


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "sort"], "--op sort: expected one of topk, rank, join, pairs, "),
        (["--case", "no-such"], "--case no-such: matches no case; --list shows them"),
        (["--provider", "fais"], "--provider fais: expected one of "),
        (["--op", "call", "--provider", "faiss-*"], "no case is left of --op, --case and --provider"),
        (["--out", "x.txt"], "--out x.txt: must end in .json"),
        (["--plot", "x.txt"], "--plot x.txt: must end in .png, .svg or .pdf"),
        (["--readme", "absent.md"], "absent.md: No such file"),
        (["absent.json"], "absent.json: No such file"),
        (["old.json"], "old.json: schema must be 2, got None"),
        (["list.json"], "list.json: not the results of pycm bench"),
        (["new.json", "--out", "y.json"], "--out: there is nothing to measure when results are given"),
        (["new.json", "new.json", "--plot", "y.svg"], "--plot: draws one file of results"),
        (["new.json", "--readme", "bare.md"], f"bare.md: expected one '{tables.BEGIN}'"),
        (["tiny.json", "--readme", "good.md"], "--readme: tiny cases measure nothing; not written"),
        (["new.json"], "wrong results: lost: faiss-knn: a match twice; lost: numkong: ValueError: no"),
    ],
)
def test_errors(
    results: dict[str, Any],
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    files = {
        "old.json": "{}",
        "list.json": "[]",
        "new.json": json.dumps(results),
        "tiny.json": json.dumps({**results, "tiny": True}),
        "bare.md": "nothing",
        "good.md": README,
    }
    for name, text in files.items():
        Path(name).write_text(text)
    assert pycm_command(["bench", "--tiny", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert Path("good.md").read_text() == README
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)


def test_list(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert pycm_command(["bench", "--list", "--case", "topk-4096"]) == 0
    out = capsys.readouterr().out
    assert "1000 × 100000 × 4096, k=10, cosine" in out
    assert "topk-64" not in out
    for word in ("faiss-index", "heavy-tailed", "when asked for by --provider"):
        assert word in out


def test_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("PYCM_NUM_THREADS", raising=False)
    monkeypatch.setattr(bench, "set_threads", pycm.set_num_threads)  # the rest of the process keeps its threads
    out = tmp_path / "out.json"
    arguments = [
        "--tiny",
        "--threads",
        "1",
        "--repeats",
        "2",
        "--case",
        "*-cosine",
        "--provider",
        "pycm*",
        "--out",
        str(out),
    ]
    assert pycm_command(["bench", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "TINY CASES" in printed
    results = tables.read(out)
    assert results["tiny"] is True
    assert results["threads"] == 1
    assert list(results["limits"]) == ["1"]
    assert [row["case"]["name"] for row in results["results"]] == ["topk-cosine", "similarity-cosine"]
    for row in results["results"]:
        assert row["case"]["name"] in printed
        assert set(row["median"]) >= {"pycm"}
        assert all(len(times) == 2 and min(times) > 0 for times in row["seconds"].values())
        assert row["wrong"] == {}
    pycm.set_num_threads(0)
    # Shown again from the file, the tables are the same.
    assert pycm_command(["bench", str(out)]) == 0
    assert capsys.readouterr().out == printed


def test_threads_of_the_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "set_threads", lambda threads: None)
    monkeypatch.setattr(bench._C, "build_info", lambda: {"threads": 3})
    assert pycm_command(["bench", "--tiny", "--threads", "1"]) == 2
    assert "--threads 1: PYCM_NUM_THREADS is 3" in capsys.readouterr().err
