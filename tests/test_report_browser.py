"""The report in headless Chromium: no errors, nothing fetched, clips that play, filters that filter, phones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("jinja2")
pytest.importorskip("av")
pytest.importorskip("PIL.Image")

from browser import CHROMIUM, Browser, browser

from pycm.evaluate import retrieval_metrics
from pycm.report import (
    Candidate,
    Entry,
    Facts,
    Group,
    Item,
    Report,
    Stat,
    contributions,
    embedding_map,
    encode_clip,
    heat_map,
    picture,
    rank_histogram,
    recall,
    times,
    write_report,
)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

NAMES = ["red square", "green square", "blue square", "Café crème"]
COLOURS = [(220, 30, 30), (20, 200, 40), (30, 40, 220), (120, 70, 20)]


def moving(colour: tuple[int, int, int]) -> np.ndarray:
    """A square that crosses the frame in two seconds."""
    frames = np.full((24, 48, 64, 3), 245, np.uint8)
    for t, frame in enumerate(frames):
        frame[16:32, 2 * t : 2 * t + 16] = colour
    return frames


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    frames = [moving(colour) for colour in COLOURS]
    items = [Item(f"{i}.mp4", picture(f[0], 64), encode_clip(f, 12)) for i, f in enumerate(frames)]
    still = Item("a still picture", picture(frames[0][0], 64))
    texts = [Item(name) for name in NAMES]
    rows = np.eye(4, 6) + 0.1
    scores = rows @ rows.T
    cards = Group(
        "Clips to texts",
        [
            Entry(items[i], [Candidate(texts[j], 0.9, i == j), Candidate(texts[3], 0.2, False)])
            for i, j in enumerate((0, 1, 1, 3))
        ],
        total=9,
    )
    strips = Group(
        "Texts to clips",
        [
            Entry(
                text,
                [Candidate(items[0], 0.5, i == 0), *[Candidate(still, 0.2, False)] * (9 if i == 2 else 1)],
                truth=Candidate(items[i], 0.1, True, 7),
            )
            for i, text in enumerate(texts)
        ],
        layout="rows",
    )
    metrics = retrieval_metrics((rows, rows, "cosine"), np.arange(4))
    report = Report(
        "Clips and texts",
        "A lede of /a/very/long/path/that/has/no/place/where/a/line/could/be/broken/captions.jsonl and others.",
        [cards, strips],
        stats=[Stat("3 of 4", "clips")],
        notes=["A note."],
        recalls=[recall("Clips to texts", metrics, 4)],
        figures=[
            rank_histogram("Ranks", {"clips": metrics.ranks, "texts": metrics.ranks}),
            heat_map("Every pair", scores, NAMES, NAMES, row_axis="clips", column_axis="texts"),
            embedding_map("Space", {"clips": rows, "texts": rows}, {"clips": NAMES, "texts": NAMES}, [0, 1, 2, 3]),
            contributions("Streams", {"appearance": 0.3, "motion": -0.1}),
            times("Time", {"decode": 1.0, "score": 0.001}, "CPU"),
        ],
        facts=[Facts("Machine", [("CPU", "x86_64")])],
    )
    out: Path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(report, out)
    return out


@pytest.fixture(scope="module")
def shared() -> Iterator[Browser]:
    with browser() as page:
        yield page


@pytest.fixture
def page(shared: Browser, path: Path) -> Iterator[Browser]:
    """The report, opened anew. No test may leave an error in the console or have asked for a file but it."""
    shared.errors.clear()
    shared.requests.clear()
    shared.view(1280, 900)
    shared.open(path)
    yield shared
    assert shared.errors == []
    assert set(shared.requests) == {path.resolve().as_uri()}


def test_the_helper_sees_errors_and_requests(shared: Browser, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text("<img src='nowhere.png'><script>console.error('told'); undefined_function()</script>")
    shared.open(bad)
    shared.until("document.images[0].complete")
    told = " ".join(shared.errors)
    assert "told" in told
    assert "undefined_function" in told
    assert "nowhere.png" in " ".join(shared.requests)
    shared.errors.clear()
    shared.requests.clear()


def test_the_policy_forbids_what_a_report_does_not_need(shared: Browser, path: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.html"
    changed.write_text(path.read_text().replace("<header>", "<header><img src='beside.png'>", 1))
    shared.open(changed)
    shared.until("document.images[0].complete")
    assert "Content Security Policy" in " ".join(shared.errors)
    shared.errors.clear()


def test_pictures_are_there_where_they_are_shown_again(page: Browser) -> None:
    assert page.ask("document.querySelectorAll('img[data-of]').length") == 12
    page.ask("document.querySelectorAll('img').forEach((i) => { i.loading = 'eager'; })")
    page.until("[...document.images].every((i) => i.complete && i.naturalWidth > 0)")
    posters = page.ask(
        "[...document.querySelectorAll('video')].filter((v) => !v.poster.startsWith('data:image/')).length"
    )
    assert posters == 0


def test_clips_play_in_view_and_let_go_of_their_player_out_of_it(page: Browser) -> None:
    assert page.ask("document.querySelectorAll('video').length") == 12
    page.ask("document.querySelector('.card').scrollIntoView()")
    first = "document.querySelector('.card video')"
    page.until(f"{first}.readyState >= 2 && {first}.videoWidth === 64 && !{first}.paused")
    page.ask(
        "window.centre = () => { const c = document.createElement('canvas'); c.width = 64; c.height = 48;"
        f" const g = c.getContext('2d'); g.drawImage({first}, 0, 0);"
        " const p = g.getImageData(0, 24, 64, 1).data; let sum = 0, n = 0;"
        " for (let x = 0; x < 64; x++) if (p[4 * x + 1] < 150) { sum += x; n++; } return n ? sum / n : -1; }; 0"
    )
    before = page.ask("centre()")
    assert before >= 0  # the red square has been drawn
    page.until(f"Math.abs(centre() - {before}) > 3")  # and has moved
    page.ask("window.scrollTo(0, 0)")
    page.until("[...document.querySelectorAll('video')].every((v) => !v.hasAttribute('src') && v.readyState === 0)")


def test_clips_pause_by_the_button_and_by_preference(page: Browser, path: Path) -> None:
    first = "document.querySelector('.card video')"
    page.ask("document.querySelector('.card').scrollIntoView()")
    page.until(f"!{first}.paused")
    page.ask("document.querySelector('.tools button').click()")
    page.until(f"{first}.paused")
    assert page.ask("document.querySelector('.tools button').textContent") == "Play clips"
    page.view(1280, 900, calm=True)
    page.open(path)
    page.ask("document.querySelector('.card').scrollIntoView()")
    page.ask("new Promise((done) => setTimeout(done, 400))")
    assert page.ask(f"{first}.paused && !{first}.hasAttribute('src')")
    page.ask("document.querySelector('.tools button').click()")
    page.until(f"!{first}.paused && {first}.readyState >= 2")


def test_one_clip_is_heard_at_a_time_and_none_at_first(shared: Browser, tmp_path: Path) -> None:
    tone = (np.sin(np.arange(32000) / 6) / 2).astype(np.float32)
    frames = [moving(colour) for colour in COLOURS[:2]]
    items = [Item(f"{i}.mp4", picture(f[0], 64), encode_clip(f, 12, sound=tone), True) for i, f in enumerate(frames)]
    silent = Item("2.mp4", picture(frames[0][0], 64), encode_clip(frames[0], 12))
    group = Group("Clips", [Entry(items[0], [Candidate(items[1], 0.5), Candidate(silent, 0.2)])], layout="rows")
    write_report(Report("t", "l", [group]), tmp_path / "o.html")
    shared.view(400, 800)
    shared.open(tmp_path / "o.html")
    shared.until("[...document.querySelectorAll('video')].every((v) => v.readyState >= 2 && !v.paused)")
    state = "JSON.stringify([...document.querySelectorAll('video')].map((v) => +v.muted))"
    pressed = "JSON.stringify([...document.querySelectorAll('.film > button')].map((b) => b.ariaPressed))"
    assert shared.ask(state) == "[1,1,1]"
    assert shared.ask("[...document.querySelectorAll('.film > button')].map((b) => b.ariaLabel).join()") == (
        "Sound of 0.mp4,Sound of 1.mp4"
    )
    for button, muted, on in (
        (0, "[0,1,1]", "true false"),
        (1, "[1,0,1]", "false true"),
        (1, "[1,1,1]", "false false"),
    ):
        shared.ask(f"document.querySelectorAll('.film > button')[{button}].click()")
        assert shared.ask(state) == muted
        assert json.loads(shared.ask(pressed)) == on.split()
    shared.until("[...document.querySelectorAll('.film > video')].every((v) => v.webkitAudioDecodedByteCount > 0)")
    shared.ask("document.querySelector('.tools button') && document.querySelector('.tools button').click()")
    shared.ask("document.querySelector('.film > button').click()")
    shared.until("!document.querySelector('.film > video').paused")  # who asks to hear a clip sees it play
    inside = (
        "(() => { const [b, v] = [...document.querySelector('.film').children].map((e) => e.getBoundingClientRect());"
    )
    assert shared.ask(inside + " return v.right <= b.right && v.bottom <= b.bottom && v.left >= b.left; })()")
    assert shared.errors == []
    shared.requests.clear()


SEEN = (
    "JSON.stringify([...document.querySelectorAll('#matches > section')].map((s) =>"
    " [...s.querySelectorAll('article')].filter((a) => a.getClientRects().length).length))"
)


def test_filters(page: Browser) -> None:
    def type_(text: str) -> None:
        page.ask(
            f"(() => {{ const s = document.querySelector('input[type=search]'); s.value = {text!r};"
            " s.dispatchEvent(new Event('input', {bubbles: true})); })()"
        )

    count = "document.querySelector('.tools output').textContent"
    assert page.ask(SEEN) == "[4,4]"
    assert page.ask(count) == "8 of 8"
    page.ask("document.querySelector('[value=wrong]').click()")
    page.until(f"{SEEN} === '[1,3]'")
    assert page.ask(count) == "4 of 8"
    page.ask("document.querySelector('[value=right]').click()")
    page.until(f"{SEEN} === '[3,1]'")
    page.ask("document.querySelector('[value=all]').click()")
    type_("CAFE creme")  # accents and capitals do not matter
    page.until(f"{SEEN} === '[4,1]'")  # every card has it as a candidate
    type_("square green")
    page.until(f"{count} === '3 of 8'")
    type_("nothing has this")
    page.until(f"{count} === '0 of 8'")
    assert page.ask("[...document.querySelectorAll('.none')].every((p) => p.getClientRects().length)")
    assert page.ask("document.querySelectorAll('.points .dim').length") == 8


def test_by_keyboard(page: Browser) -> None:
    def focus() -> str:
        return page.ask("(document.activeElement.value || document.activeElement.textContent || '').trim()")

    page.press("Tab")
    assert focus() == "Skip to the matches"
    page.press("Tab")
    assert page.ask("document.activeElement.type") == "search"
    for letter in "blue":
        page.press(letter, letter)
    page.until("document.querySelector('.tools output').textContent === '1 of 8'")
    page.press("Tab")
    assert focus() == "all"
    page.press("ArrowRight")
    assert focus() == "right"
    page.until("document.querySelector('.tools output').textContent === '0 of 8'")
    page.press("Tab")
    assert focus() == "Pause clips"


def test_names_under_the_pointer(page: Browser) -> None:
    def point(selector: str, across: float, down: float) -> str:
        page.ask(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
        box = page.ask(f"document.querySelector({selector!r}).getBoundingClientRect().toJSON()")
        x, y = box["x"] + across * box["width"], box["y"] + down * box["height"]
        page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        return page.ask("document.getElementById('tip').hidden ? '' : document.getElementById('tip').textContent")

    assert point("[data-heat]", 0.3, 0.8) == "Café crème × green square: about 0.26"  # 2 * 0.1 * 1.1 + 4 * 0.01
    assert point(".points circle", 0.5, 0.5) in NAMES
    assert point("h1", 0.5, 0.5) == ""


@pytest.mark.parametrize("width", [360, 390, 768, 1280])
def test_nothing_is_wider_than_the_screen(page: Browser, path: Path, width: int) -> None:
    page.view(width, 800)
    page.open(path)
    assert page.ask("document.documentElement.scrollWidth") <= width
    outside = page.ask(
        f"[...document.querySelectorAll('main *')].filter((e) => e.getBoundingClientRect().right > {width + 1})"
        ".filter((e) => !e.closest('.sr')).map((e) => e.outerHTML.slice(0, 80))"
    )
    assert outside == []


@pytest.mark.parametrize("dark", [False, True])
def test_texts_stand_out_from_what_is_behind_them(page: Browser, path: Path, dark: bool) -> None:
    """Contrast of WCAG 2 level AA: 4.5."""
    page.view(1280, 900, dark=dark)
    page.open(path)

    def luminance(name: str) -> float:
        colour = page.ask(f"getComputedStyle(document.documentElement).getPropertyValue('--{name}').trim()")
        parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        return float(
            np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]
        )

    assert page.ask("getComputedStyle(document.body).backgroundColor") == (
        "rgb(20, 20, 22)" if dark else "rgb(250, 249, 247)"
    )
    for behind in ("page", "sheet"):
        for name in ("ink", "soft", "right", "wrong"):
            a, b = sorted((luminance(name), luminance(behind)))
            assert (b + 0.05) / (a + 0.05) >= 4.5, (name, behind)


def test_everything_has_a_name_for_a_screen_reader(page: Browser) -> None:
    page.call("Accessibility.enable")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    page.call("Accessibility.disable")
    named: dict[str, list[str]] = {}
    for node in nodes:
        if not node.get("ignored"):
            named.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    for role in ("image", "button", "searchbox", "radio", "heading", "Video"):
        assert named.get(role), role
        assert all(named[role]), (role, named[role])
    assert named["button"] == ["Pause clips"]
    assert set(named["radio"]) == {"All", "Right", "Wrong"}
