"""Where the command line keeps features: the user's cache folder unless told otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

for _package in ("typer", "rich", "jinja2", "PIL.Image"):
    pytest.importorskip(_package)

from cli_stubs import Pixels, Words, cache_home_fixture, error, folder_fixture, match, stub_fixture  # noqa: E402, F401

from pycm.cli.main import run  # noqa: E402
from pycm.matchers.default import user_cache_folder, writable_cache  # noqa: E402

pytestmark = pytest.mark.usefixtures("cache_home", "stub")


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each call of an encoder that has something to encode."""
    calls: list[str] = []
    for kind in (Pixels, Words):
        plain = kind.encode

        def counted(self: Any, items: Any, *, _plain: Any = plain, **options: Any) -> np.ndarray:
            calls.extend([self.name] * bool(len(items)))
            return _plain(self, items, **options)

        monkeypatch.setattr(kind, "encode", counted)
    return calls


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_second_run_encodes_nothing(folder: Path, cache_home: Path, encoded: list[str]) -> None:
    assert match(folder, "--out", folder / "a.csv") == 0
    assert sorted(set(encoded)) == ["pixels", "words"]
    assert files(cache_home)
    encoded.clear()
    assert match(folder, "--out", folder / "b.csv") == 0
    assert encoded == []
    assert (folder / "a.csv").read_text() == (folder / "b.csv").read_text()


def test_no_cache_neither_reads_nor_writes(folder: Path, cache_home: Path, encoded: list[str]) -> None:
    assert match(folder, "--no-cache") == 0
    assert not cache_home.exists()
    assert match(folder) == 0
    before = {path: path.stat().st_mtime_ns for path in files(cache_home)}
    encoded.clear()
    assert match(folder, "--no-cache") == 0
    assert sorted(set(encoded)) == ["pixels", "words"]
    assert {path: path.stat().st_mtime_ns for path in files(cache_home)} == before


def test_a_folder_of_ones_own_is_used_alone(folder: Path, cache_home: Path) -> None:
    assert match(folder, "--cache", folder / "mine") == 0
    assert files(folder / "mine")
    assert not cache_home.exists()


@pytest.mark.parametrize("command", ["demo", "match"])
def test_both_options_at_once_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    options = ["--cache", str(folder / "mine"), "--no-cache"]
    monkeypatch.chdir(folder)
    code = run(["demo", *options]) if command == "demo" else match(folder, *options)
    assert code == 2
    assert "--cache and --no-cache exclude each other" in error(capsys)
    assert not (folder / "mine").exists()


def test_an_unwritable_user_folder_is_told_in_one_line_and_does_without(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "file"))
    assert match(folder, "--out", folder / "o.csv") == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"note: features are not kept: cannot write to {folder / 'file/pycm'}: ")
    assert (folder / "o.csv").exists()


def test_an_unwritable_folder_that_was_asked_for_is_an_error(
    folder: Path, capsys: pytest.CaptureFixture[str], encoded: list[str]
) -> None:
    (folder / "file").write_text("in the way")
    assert match(folder, "--cache", folder / "file/cache") == 2
    assert f"--cache {folder / 'file/cache'}: cannot write to" in error(capsys)
    assert encoded == []


def test_a_full_disk_shows_in_the_trial_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        with open(self, "wb") as file:  # what fits
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=f"cannot write to {tmp_path / 'c'}: No space left on device"):
        writable_cache(tmp_path / "c")
    assert list((tmp_path / "c").iterdir()) == []


@pytest.mark.parametrize("given", ["", "relative/folder"])
def test_without_an_absolute_xdg_folder_it_is_in_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache_folder() == tmp_path / ".cache/pycm"


def test_a_report_does_not_tell_the_user_s_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cached"))
    assert match(folder, "--out", folder / "o.html") == 0
    assert "~/cached/pycm" in (folder / "o.html").read_text(encoding="utf-8")
