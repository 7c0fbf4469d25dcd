"""The command line: one line for everything that goes wrong, and nothing left behind."""

from __future__ import annotations

import os
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interrupting import interrupt

for _package in ("typer", "rich", "jinja2", "PIL.Image"):
    pytest.importorskip(_package)

from cli_stubs import Pixels, Words, cache_home_fixture, error, folder_fixture, match, stub_fixture, write  # noqa: E402, F401

from pycm import ImageTextMatcher  # noqa: E402
from pycm.cli import output  # noqa: E402
from pycm.cli.errors import CommandError, one_line  # noqa: E402
from pycm.cli.main import run  # noqa: E402

pytestmark = pytest.mark.usefixtures("cache_home")


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if the long work begins."""

    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("the encoders were loaded before the input was checked")

    monkeypatch.setattr(ImageTextMatcher, "default", started)
    monkeypatch.setattr("pycm.matchers.features.get_encoder", started)
    monkeypatch.setattr("pycm.matchers.features.get_encoders", started)


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
            ("t.csv", "text\n", "t.csv: the file has no rows"),
            (
                "t.csv",
                "image;text\na;b\n",
                "t.csv: line 2: expected a text under text, caption, sentence or captions; there are 'image;text'",
            ),
            (
                "t.jsonl",
                SIX + '{"text": "a" "b"}\r\n',
                "t.jsonl: line 7: not JSON: Expecting ',' delimiter (column 14)",
            ),
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

    @pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc, which root cannot write to either")
    def test_a_folder_that_even_root_cannot_write_to(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["demo", "--out", "/proc/o.html"]) == 2
        assert "/proc/o.html: cannot write to /proc" in error(capsys)

    def test_the_demo_writes_html_only(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["demo", "--out", str(tmp_path / "o.csv")]) == 2
        assert "o.csv: must end in .html" in error(capsys)


@pytest.mark.usefixtures("stub")
def test_nan_features(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pixels, "encode", lambda self, items, **_: np.full((len(items), 4), np.nan, np.float32))
    assert match(folder, "--out", folder / "o.csv") == 2
    assert re.search(r"NaN.*blue\.png", error(capsys))
    assert match(folder, "--out", folder / "o.csv", "--no-cache") == 2
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


def test_a_missing_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
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

def default(cls, cache=None, metric="cosine", device=None):
    return cls(Slow("image"), Slow("text"), cache=cache)

ImageTextMatcher.default = classmethod(default)
main()
"""


def test_ctrl_c(folder: Path) -> None:
    before = sorted(path for path in folder.rglob("*"))
    command = [sys.executable, "-c", textwrap.dedent(SLOW), "match", "--images", str(folder / "photos")]
    command += ["--texts", str(folder / "texts.txt"), "--out", str(folder / "o.html")]
    ended = interrupt(command, ready="encoding", after=0.2)
    assert ended.returncode == 130
    assert ended.err.split("\n")[-2:] == ["error: interrupted", ""]
    assert "Traceback" not in ended.err
    assert sorted(path for path in folder.rglob("*")) == before
