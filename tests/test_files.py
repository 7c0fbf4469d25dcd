"""Atomic writing, and optional imports."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from pycm._files import atomic_write
from pycm._optional import require


def test_the_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_write(path) as file:
        file.write("new \u00e9\r\n")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_bytes() == "new \u00e9\r\n".encode()
    with atomic_write(path, "wb") as binary:
        binary.write(b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_of_a_failed_block(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_write(path) as file:  # noqa: PT012
        file.write("half")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_writers_do_not_disturb_each_other(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a") as one, atomic_write(tmp_path / "a") as two:
        one.write("1" * 10000)
        two.write("2" * 20000)
    assert (tmp_path / "a").read_text() == "1" * 10000  # the last to end
    assert os.listdir(tmp_path) == ["a"]


def test_permissions_are_those_of_the_umask(tmp_path: Path) -> None:
    with open(tmp_path / "plain", "w"), atomic_write(tmp_path / "atomic"):
        pass
    assert (tmp_path / "plain").stat().st_mode == (tmp_path / "atomic").stat().st_mode


def test_errors_are_untouched(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "none" / "a"):
        pass
    with pytest.raises(IsADirectoryError), atomic_write(tmp_path):
        pass
    with pytest.raises(ValueError, match="mode must be"):
        atomic_write(tmp_path / "a", "a")  # type: ignore[call-overload]


def test_require_names_the_package_and_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert require("os.path", "image", "x") is os.path
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.delitem(sys.modules, "sklearn.svm", raising=False)
    with pytest.raises(ImportError, match=r"^Tfidf needs scikit-learn: pip install 'pycm-match\[text\]'$"):
        require("sklearn.svm", "text", "Tfidf")
    with pytest.raises(ImportError, match=r"^X needs no_such_package: pip install no_such_package$"):
        require("no_such_package", None, "X")
    (tmp_path / "broken_package.py").write_text("raise RuntimeError('operator missing')")
    (tmp_path / "wants_more.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="installed but fails to import: operator missing"):
        require("broken_package", None, "X")
    with pytest.raises(ImportError, match="X needs no_such_package: pip install no_such_package"):
        require("wants_more", "image", "X")
