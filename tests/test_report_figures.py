"""Figures and media of a report: what is drawn is what was measured, and it stays small."""

from __future__ import annotations

import base64
import io
import itertools
from pathlib import Path

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image")

from pycm.evaluate import Interval, bootstrap, retrieval_metrics  # noqa: E402
from pycm.report import (  # noqa: E402
    RANK_ENDS,
    contributions,
    embedding_map,
    encode_clip,
    heat_map,
    moving_picture,
    rank_histogram,
    recall,
    times,
)
from pycm.report.render import amount  # noqa: E402


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_rank_histogram_counts_every_query_once() -> None:
    rng = np.random.default_rng(0)
    ranks = {"a": rng.integers(0, 400, 1000).astype(float), "b": np.array([0.0, 0.5, 4.0, 9.0])}
    figure = rank_histogram("t", ranks)
    assert list(figure.bins) == ["1", "2", "3", "4–5", "6–10", "11–20", "21–50", "51–100", "101–200", "201–500"]
    for name, counts in figure.series:
        for label, count in zip(figure.bins, counts, strict=True):
            first, _, last = label.partition("–")
            places = np.floor(ranks[name]) + 1
            assert count == np.count_nonzero((places >= int(first)) & (places <= int(last or first)))
        assert sum(counts) == len(ranks[name])
    assert figure.highest == max(figure.series[0][1])
    assert rank_histogram("t", {"a": np.zeros(3)}).bins == ["1"]


def test_tied_ranks_count_as_the_recalls_do() -> None:
    """Every order of equal scores is tried: the counts are means over them."""
    rng = np.random.default_rng(3)
    scores = rng.integers(0, 3, (5, 4)).astype(float)
    own = rng.integers(0, 4, 5)
    metrics = retrieval_metrics(scores, own, RANK_ENDS)
    want = np.zeros(4)
    orders = list(itertools.permutations(range(4)))
    for row, true in zip(scores, own, strict=True):
        for order in orders:
            ranked = sorted(order, key=lambda j, row=row: -row[j])  # equal ones stay in this order
            want[ranked.index(true)] += 1 / len(orders)
    figure = rank_histogram("t", {"a": metrics})
    assert list(figure.bins) == ["1", "2", "3", "4–5"][: len(figure.bins)]
    counts = figure.series[0][1]
    np.testing.assert_allclose(counts, want[: len(counts)], atol=1e-12)
    assert counts[0] == pytest.approx(5 * metrics.recall_at_k[1])
    assert any(abs(count - round(count)) > 0.05 for count in counts)  # there were ties
    column = recall("t", metrics, 4, ks=(1, 3))
    assert list(column.shares) == ["R@1", "R@3", "MRR"]
    assert (amount(1234.0), amount(0.25), amount(2.9999999)) == ("1,234", "0.2", "3")
    far = rank_histogram("t", {"a": np.array([0.0, 4321.0])})
    assert (far.bins[-1], far.series[0][1][-1]) == ("1,001–4,322", 1)


@pytest.mark.parametrize("distance", [False, True])
def test_heat_map_shows_the_score_as_depth(distance: bool) -> None:
    scores = np.linspace(-1, 3, 60).reshape(6, 10)
    names = [f"n{i}" for i in range(10)]
    figure = heat_map("t", scores, names[:6], names, row_axis="r", column_axis="c", distance=distance)
    depth = pixels(figure.picture)[..., 3] / 255
    low, high = sorted((figure.low, figure.high))
    assert (figure.low > figure.high) == distance
    assert -1 <= low < -0.9
    assert 2.9 < high <= 3
    np.testing.assert_allclose(figure.low + (figure.high - figure.low) * depth, np.clip(scores, low, high), atol=0.01)
    assert (list(figure.rows), list(figure.columns)) == (names[:6], names)


def test_a_large_heat_map_is_averaged_and_says_so() -> None:
    scores = np.zeros((1000, 500))
    scores[::2] = 1.0
    scores[:500] += 4
    figure = heat_map("t", scores, [""] * 1000, [""] * 500, row_axis="r", column_axis="c", limit=100)
    depth = pixels(figure.picture)[..., 3]
    assert depth.shape == (100, 100)
    assert (depth[:50] == 255).all()  # means of 4.5, not of the alternating rows
    assert (depth[50:] == 0).all()
    assert "10 × 5 of the 1,000 × 500 pairs" in figure.caption
    assert list(figure.rows) == []
    flat = heat_map("t", np.ones((2, 2)), ["a", "b"], ["c", "d"], row_axis="r", column_axis="c")
    assert (pixels(flat.picture)[..., 3] == 0).all()


def test_embedding_map_is_a_pca_of_both() -> None:
    decomposition = pytest.importorskip("sklearn.decomposition")
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((30, 8)) * 3 + 1, rng.standard_normal((45, 8))
    owner = [int(i) for i in rng.integers(0, 30, 44)] + [-1]
    names = {"clips": [f"c{i}" for i in range(30)], "texts": [f"t{i}" for i in range(45)]}
    figure = embedding_map("t", {"clips": x, "texts": y}, names, owner)
    every = np.concatenate([x, y[:44]])  # the one that belongs to none is not drawn
    every /= np.linalg.norm(every, axis=1, keepdims=True)
    model = decomposition.PCA(2, svd_solver="full").fit(every)
    want = model.transform(every)
    own = {name: i for i, name in enumerate(names["clips"] + names["texts"][:44])}
    order = [own[p.name] for p in figure.points]
    got = np.array([(p.x, p.y) for p in figure.points])
    assert ((got >= 0) & (got <= 1)).all()
    for axis in (0, 1):  # the same up to scale, place and sign
        assert abs(np.corrcoef(got[:, axis], want[order, axis])[0, 1]) > 1 - 1e-9
    spans = np.ptp(got, axis=0) / np.ptp(want[order], axis=0)
    assert spans[0] == pytest.approx(spans[1])
    assert f"{model.explained_variance_ratio_.sum():.0%} of the variance" in figure.caption
    mates = {p.name: None if p.mate is None else figure.points[p.mate].name for p in figure.points if p.series == 1}
    assert (
        mates == {f"t{j}": f"c{i}" if i >= 0 else None for j, i in enumerate(owner)} | {"t44": None} or len(mates) == 44
    )


def test_a_large_embedding_map_draws_some_and_says_so() -> None:
    x = np.random.default_rng(2).standard_normal((500, 4))
    names = {"a": [str(i) for i in range(500)], "b": [str(i) for i in range(500)]}
    figure = embedding_map("t", {"a": x, "b": x}, names, list(range(500)), limit=50)
    assert len(figure.points) == 100
    assert "50 of 500 and 50 of 500 are drawn" in figure.caption
    assert all(p.name == figure.points[p.mate].name for p in figure.points if p.mate is not None)
    one = embedding_map("t", {"a": x[:1, :1], "b": x[:1, :1]}, {"a": ["p"], "b": ["q"]})
    assert [(p.x, p.y) for p in one.points] == [(0.5, 0.5)] * 2


def test_recall_has_the_intervals_of_the_bootstrap() -> None:
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((40, 6))
    metrics = retrieval_metrics((rows, rows + rng.standard_normal((40, 6)), "cosine"), np.arange(40))
    column = recall("t", metrics, 40)
    want = bootstrap(metrics)
    assert column.shares["R@5"] == want["recall@5"]
    assert column.ranks["median rank"] == want["median_rank"]
    assert column.chance == {"R@1": 1 / 40, "R@5": 5 / 40, "R@10": 10 / 40}
    assert "mAP" not in column.shares
    several = recall("t", metrics, 40, one_positive=False)
    assert several.shares["mAP"] == want["map"]
    assert several.chance == {}


def test_contributions_and_times() -> None:
    figure = contributions("t", {"small": -0.01, "large": Interval(0.2, 0.1, 0.3)})
    assert [(bar.label, bar.text) for bar in figure.bars] == [("large", "+20.0 (+10.0 to +30.0)"), ("small", "−1.0")]
    assert figure.span == (pytest.approx(-1), pytest.approx(30))
    assert times("t", {"a": 1.0, "b": 0.0}).parts == [("a", 1.0), ("b", 0.0)]


# ---- clips ----


def write_clip(path: Path, frames: np.ndarray, rate: int) -> Path:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv444p"
        stream.options = {"crf": "1"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())
    return path


def read_back(uri: str) -> tuple[np.ndarray, float]:
    av = pytest.importorskip("av")
    with av.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as container:
        rate = float(container.streams.video[0].average_rate)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]), rate


def grey(values: np.ndarray, high: int, wide: int) -> np.ndarray:
    return np.repeat(np.asarray(values, np.uint8), high * wide * 3).reshape(-1, high, wide, 3)


def test_a_clip_is_what_was_filmed(tmp_path: Path) -> None:
    levels = np.linspace(20, 230, 40)
    path = write_clip(tmp_path / "a.mp4", grey(levels, 90, 160), 10)
    moving = moving_picture(path, 36, seconds=3)
    frames, rate = read_back(moving.clip)
    assert frames.shape == (29, 36, 64, 3)  # 3 of 4 seconds; the last tick of 12.5 Hz is before the 30th
    assert rate == pytest.approx(10, rel=0.01)
    np.testing.assert_allclose(frames.mean(axis=(1, 2, 3)), levels[:29], atol=4)
    assert pixels(moving.still).shape == (36, 64, 3)
    again, _ = read_back(moving_picture(path.read_bytes(), 36, seconds=3).clip)
    np.testing.assert_allclose(again.mean(axis=(1, 2, 3)), levels[:29], atol=4)


def test_a_fast_clip_loses_frames_and_no_time(tmp_path: Path) -> None:
    levels = np.linspace(20, 230, 60)
    path = write_clip(tmp_path / "a.mp4", grey(levels, 32, 32), 60)
    frames, rate = read_back(moving_picture(path, 64, fps=12).clip)
    assert len(frames) == 12
    assert rate == pytest.approx(12, rel=0.01)
    np.testing.assert_allclose(frames.mean(axis=(1, 2, 3)), levels[::5], atol=4)


def test_odd_sides_and_one_frame() -> None:
    pytest.importorskip("av")
    frames, _ = read_back(encode_clip(grey(np.array([120]), 33, 17), 5))
    assert frames.shape == (1, 34, 18, 3)
    assert len(encode_clip(grey(np.full(72, 200), 128, 128), 12)) < 6000


@pytest.mark.parametrize("content", [b"", b"not a clip at all" * 9])
def test_a_clip_that_cannot_be_read_is_named(tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("av")
    (tmp_path / "bad.mp4").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.mp4: \w"):
        moving_picture(tmp_path / "bad.mp4", 64)


def test_a_clip_keeps_its_sound_where_it_is_asked_for(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    video = pytest.importorskip("pycm.video")
    seconds = np.arange(4 * 16000) / 16000
    tone = np.where(seconds < 1, 0, 0.5 * np.sin(2 * np.pi * 440 * seconds)).astype(np.float32)  # from the 1st second
    path = tmp_path / "a.mp4"
    video.write_clip(path, grey(np.linspace(20, 230, 40), 32, 32), fps=10, sound=tone)
    assert not moving_picture(path, 32).sound
    moving = moving_picture(path, 32, seconds=3, sound=True)
    assert moving.sound
    data = base64.b64decode(moving.clip.partition(",")[2])
    again = video.read_clip(data, sound=True)
    assert len(again.sound) == pytest.approx(2.9 * 16000, abs=2100)  # AAC pads to its frames of 1024
    loud = np.abs(again.sound[:46000]).reshape(-1, 1000).max(axis=1)
    at = np.arange(len(loud)) / 16
    assert loud[at < 0.8].max() < 0.1
    assert loud[(at > 1.2) & (at < 2.7)].min() > 0.3
    with av.open(io.BytesIO(data)) as container:
        assert len(container.streams.audio) == 1
    silent = tmp_path / "b.mp4"
    video.write_clip(silent, grey(np.array([9, 9]), 32, 32), fps=10)
    assert not moving_picture(silent, 32, sound=True).sound
