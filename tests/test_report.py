"""The HTML report: self-contained, escaped, accessible, and honest in its bars."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("jinja2")
Image = pytest.importorskip("PIL.Image")

from pycm.encoders import ImageReadError  # noqa: E402
from pycm.report import (  # noqa: E402
    Candidate,
    Entry,
    Facts,
    Group,
    Item,
    Report,
    Stat,
    picture,
    render_report,
    write_report,
)
from pycm.report.render import bar_widths  # noqa: E402

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks that tags are balanced; collects tags, ids, text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: dict[str | None, str] = {}
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            self.scripts[self.tags[-1][1].get("id")] = data
        else:
            self.text += data


def example(**changes: object) -> Report:
    pixels = np.zeros((300, 600, 3), np.uint8)
    pixels[:, :300] = 200
    image = Item("photo <1>.png", picture(pixels, 100))
    cards = Group(
        "Images to texts",
        [
            Entry(image, [Candidate(Item("right one"), 0.8, True), Candidate(Item("wrong one"), 0.4, False)]),
            Entry(image, [Candidate(Item("unknown"), -0.2, None)], "A remark."),
        ],
    )
    rows = Group("Texts to images", [Entry(Item("a 'text' & more"), [Candidate(image, 0.2, False)])], layout="rows")
    parts: dict[str, object] = {
        "title": "<script>alert(1)</script>",
        "lede": "Lede & more",
        "groups": [cards, rows],
        "stats": [Stat("1 of 2", "images are right")],
        "notes": ["One is wrong."],
        "facts": [Facts("Machine", [("CPU", "abc<def>")])],
    }
    return Report(**(parts | changes))  # type: ignore[arg-type]


def test_nothing_comes_from_outside() -> None:
    html = render_report(example())
    page = Page(html)
    assert not re.search(r"https?://|@import|url\(", html)
    assert not {"link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert all("src" not in attributes for tag, attributes in page.tags if tag == "script")
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv"))
    assert policy
    assert policy.startswith("default-src 'none';")
    assert "connect-src" not in policy
    shown = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(shown) == 3
    # One picture three times: it is in the page once, and the others name the element that has it.
    first, *others = shown
    assert (first["src"] or "").startswith("data:image/")
    assert [other.get("data-of") for other in others] == [first["id"]] * 2
    assert html.count(first["src"] or "") == 1


def test_a_clip_stands_in_the_page_once_and_cannot_end_the_script() -> None:
    clip = Item("a </script> name", "data:image/png;base64,AAAA", "data:video/mp4;base64,BBBB")
    group = Group("Clips", [Entry(clip, [Candidate(clip, 0.5, False)], truth=Candidate(clip, 0.1, True, 6))])
    html = render_report(example(groups=[group]))
    page = Page(html)
    videos = [attributes for tag, attributes in page.tags if tag == "video"]
    assert [v["data-clip"] for v in videos] == ["c0"] * 3
    assert [v.get("poster") for v in videos] == ["data:image/png;base64,AAAA", None, None]
    assert all("muted" in v and "loop" in v and v["aria-label"] == "a </script> name" for v in videos)
    assert json.loads(page.scripts["clips"]) == {"c0": clip.clip}
    assert html.count("BBBB") == 1
    assert "7th" in page.text  # where the true one came
    assert "</script> name" not in html


def test_every_text_is_escaped_and_there() -> None:
    page = Page(render_report(example()))
    for text in ("<script>alert(1)</script>", "photo <1>.png", "a 'text' & more", "abc<def>", "Lede & more"):
        assert text in page.text
    for text in ("right one", "wrong one", "0.800", "−0.200", "A remark.", "One is wrong.", "1 of 2"):
        assert text in page.text


def test_right_and_wrong_are_told_in_words_and_only_where_known() -> None:
    page = Page(render_report(example()))
    assert page.text.count("(right)") == 1
    assert page.text.count("(wrong)") == 2
    assert page.text.count("✓ right") == 1
    classes = [attributes.get("class") for tag, attributes in page.tags if tag == "li"]
    assert classes.count("right") == 1
    assert classes.count("wrong") == 2
    assert "" in classes


def test_pictures_have_a_text_and_ids_are_unique() -> None:
    page = Page(render_report(example()))
    assert all(attributes.get("alt") == "photo <1>.png" for tag, attributes in page.tags if tag == "img")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = {attributes["aria-labelledby"] for _, attributes in page.tags if "aria-labelledby" in attributes}
    assert named <= set(ids)
    html_tag = next(attributes for tag, attributes in page.tags if tag == "html")
    assert html_tag["lang"] == "en"
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


def test_bars_are_in_the_html_on_one_scale() -> None:
    widths = [float(w) for w in re.findall(r"--w: ([\d.]+)%", render_report(example()))]
    assert widths == [100.0, 60.0, 0.0, 40.0]  # from -0.2 to 0.8


@pytest.mark.parametrize(
    ("scores", "distance", "want"),
    [
        ([1.0, 0.5, 0.0], False, [100, 50, 0]),
        ([0.6, 0.3], False, [100, 50]),
        ([-1.0, 1.0, 0.0], False, [0, 100, 50]),
        ([1.0, 4.0, 0.0], True, [25, 100, 0]),
        ([0.0, 0.0], False, [0, 0]),
        ([-2.0, -1.0], False, [0, 100]),
        ([2.0, float("inf")], True, [100, 0]),
        ([], False, []),
    ],
)
def test_bar_widths(scores: list[float], distance: bool, want: list[float]) -> None:
    assert bar_widths(scores, distance) == want


def test_pictures_are_small_and_still_the_image(tmp_path: Path) -> None:
    y, x = np.mgrid[:600, :1200] / 600
    photo = np.stack([100 * x, 200 * y, 127 + 120 * np.sin(9 * x + 5 * y)], axis=-1).astype(np.uint8)
    photo += np.random.default_rng(0).integers(0, 8, photo.shape, np.uint8)
    uri = picture(photo, 240)
    kind, _, data = uri.partition(";base64,")
    assert kind == "data:image/jpeg"
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.size == (240, 120)
    want = np.asarray(Image.fromarray(photo).resize((240, 120)), np.float64)
    assert np.abs(np.asarray(image, np.float64) - want).mean() < 4
    flat = picture(np.full((500, 500, 3), 7, np.uint8), 400)
    assert flat.startswith("data:image/png")
    assert len(flat) < 5000
    (tmp_path / "no.png").write_text("words")
    with pytest.raises(ImageReadError):
        picture(tmp_path / "no.png", 10)


def test_a_failure_leaves_the_older_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    write_report(example(), path)
    before = path.read_text(encoding="utf-8")
    with pytest.raises(TypeError):
        write_report(example(groups=3), path)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(PermissionError(13, "no", "x")))
    with pytest.raises(PermissionError):
        write_report(example(title="other"), path)
    assert path.read_text(encoding="utf-8") == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (4e-6, "4 µs"),
        (0.001386, "1.4 ms"),
        (0.0501, "50 ms"),
        (1.04, "1.0 s"),
        (119.9, "119.9 s"),
        (463.4, "7 min 43 s"),
        (179.8, "3 min 0 s"),
    ],
)
def test_times_have_a_unit_that_suits_them(seconds: float, text: str) -> None:
    from pycm.report.render import duration

    assert duration(seconds) == text
