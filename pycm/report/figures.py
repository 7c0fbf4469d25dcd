"""From scores, ranks and embeddings to what a report draws, at a bounded size."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .._optional import require
from ..evaluate import Interval, RetrievalMetrics, bootstrap
from .media import data_uri
from .parts import Bar, Bars, HeatMap, Histogram, Point, PointMap, Recall, Times

Floats = npt.NDArray[np.floating[Any]]

_INK = (58, 112, 178)  # seen on white and on black; the opacity of a cell is its score
#: The places, from 1, at which the bins of a rank histogram end; the last bin is all beyond.
RANK_ENDS = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)


def recall(
    title: str, metrics: RetrievalMetrics, gallery: int, *, ks: Sequence[int] | None = None, groups: Any = None,
    one_positive: bool = True, seed: int = 0,
) -> Recall:  # fmt: skip
    """A column of the recall table, with 95 % bootstrap intervals (`pycm.evaluate.bootstrap`).

    Args:
        title: the direction.
        metrics: from `retrieval_metrics`.
        gallery: the number of candidates.
        ks: the cutoffs that are shown, of those that `metrics` has; None: all.
        groups: as in `bootstrap`: queries that are drawn together.
        one_positive: every query has one true candidate, so that chance is k / gallery.
        seed: of the drawing.
    """
    ks = sorted(metrics.recall_at_k if ks is None else ks)
    per_query = {name: v for name, v in metrics.per_query.items() if "@" not in name or int(name.split("@")[1]) in ks}
    tables = ("recall_at_k", "ndcg_at_k", "positives_recall_at_k")
    shown: dict[str, Any] = {name: {k: v for k, v in getattr(metrics, name).items() if k in ks} for name in tables}
    metrics = replace(metrics, per_query=per_query, **shown)
    intervals = bootstrap(metrics, groups=groups, seed=seed)
    return Recall(
        title,
        len(metrics.ranks),
        gallery,
        {
            **{f"R@{k}": intervals[f"recall@{k}"] for k in ks},
            "MRR": intervals["mrr"],
            **({} if one_positive else {"mAP": intervals["map"]}),  # with one positive they are the same
        },
        {"median rank": intervals["median_rank"], "mean rank": intervals["mean_rank"]},
        {f"R@{k}": min(1.0, k / gallery) for k in ks} if one_positive else {},
    )


def rank_histogram(title: str, ranks: Mapping[str, Floats | RetrievalMetrics], caption: str = "") -> Histogram:
    """Where the true candidate came, in bins that widen.

    Args:
        title, caption: of the figure.
        ranks: series -> ranks from 0; or metrics with recall at each of `RANK_ENDS`: where scores tie the counts are
            then expected ones, over the orders of equal scores, as the recalls are, and may be fractions.

    Raises:
        KeyError: metrics without one of these recalls.
    """

    def up_to(given: Floats | RetrievalMetrics, place: int) -> float:
        if isinstance(given, RetrievalMetrics):
            return float(given.per_query[f"recall@{place}"].sum())
        return float(np.count_nonzero(np.floor(np.asarray(given, float)) < place))

    every = {name: r.ranks if isinstance(r, RetrievalMetrics) else np.asarray(r, float) for name, r in ranks.items()}
    ends: list[int] = []
    for end in RANK_ENDS:
        ends.append(end)
        if all(up_to(given, end) >= len(every[name]) - 1e-9 for name, given in ranks.items()):
            break
    else:
        ends.append(max(RANK_ENDS[-1] + 1, *(int(np.floor(r.max())) + 1 for r in every.values() if len(r))))
    starts = [1, *(end + 1 for end in ends[:-1])]
    bins = [f"{a:,}" if a == b else f"{a:,}–{b:,}" for a, b in zip(starts, ends, strict=True)]
    series = []
    for name, given in ranks.items():
        sums = [up_to(given, end) for end in ends if end <= RANK_ENDS[-1]]
        sums += [float(len(every[name]))] * (len(ends) - len(sums))
        series.append((name, [float(c) for c in np.diff([0.0, *sums])]))
    return Histogram(title, bins, series, caption)


def heat_map(
    title: str,
    scores: Floats,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    row_axis: str,
    column_axis: str,
    distance: bool = False,
    span: tuple[float, float] | None = None,
    limit: int = 256,
) -> HeatMap:
    """Scores ``[N, M]`` as a picture of at most `limit` by `limit` cells; larger ones are averaged over blocks.

    The strongest cells are the best pairs, be they the highest scores or the smallest distances. The scale ends at
    `span`, or at the 0.5th and 99.5th percentile, so that one outlier leaves the rest its contrast.
    """
    n, m = scores.shape
    cells = _block_means(_block_means(np.asarray(scores, np.float64), limit).T, limit).T
    low, high = span or (float(v) for v in np.percentile(cells, [0.5, 99.5]))
    depth = np.clip((cells - low) / (high - low or 1.0), 0, 1)
    pixels = np.empty((*cells.shape, 4), np.uint8)
    pixels[..., :3] = _INK
    pixels[..., 3] = np.round(255 * (1 - depth if distance else depth))
    caption = "The stronger the colour, the better the match."
    whole = cells.shape == scores.shape
    if not whole:
        caption += (
            f" Each cell is the mean over about {n / cells.shape[0]:.3g} × {m / cells.shape[1]:.3g} of the "
            f"{n:,} × {m:,} pairs."
        )
    image = require("PIL.Image", "image", "a heat map").fromarray(pixels, "RGBA")
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=True)
    return HeatMap(
        title,
        data_uri("image/png", buffer.getvalue()),
        (cells.shape[0], cells.shape[1]),
        *((high, low) if distance else (low, high)),
        list(rows) if whole else (),
        list(columns) if whole else (),
        row_axis,
        column_axis,
        caption,
    )


def embedding_map(
    title: str,
    embeddings: Mapping[str, Floats],
    names: Mapping[str, Sequence[str]],
    owner: Sequence[int | None] | None = None,
    *,
    limit: int = 400,
) -> PointMap:
    """Two series of embeddings on their first two principal components, rows of length 1.

    Args:
        title: of the figure.
        embeddings: series -> ``[N, D]``, two series in one space.
        names: series -> N names.
        owner: for each row of the second series the row of the first that it belongs to; None or -1: not known.
        limit: rows of each series that are drawn, evenly spaced, and that the components are of; the caption tells.
    """
    (first, x), (second, y) = embeddings.items()
    mates = [None] * len(y) if owner is None else list(owner)
    drawn = _spaced(len(x), limit)
    position: dict[int | None, int] = {row: i for i, row in enumerate(drawn)}
    own = [j for j, row in enumerate(mates) if row in position]  # what belongs to the drawn ones goes first
    drawn_second = own[:limit] or _spaced(len(y), limit)
    every = _normalised(np.concatenate([np.asarray(x)[drawn], np.asarray(y)[drawn_second]]))
    every -= every.mean(axis=0)
    _, values, axes = np.linalg.svd(every, full_matrices=False)
    axes = axes[:2] * np.where(axes[:2].sum(axis=1, keepdims=True) < 0, -1.0, 1.0)  # a sign that two runs share
    places = np.zeros((len(every), 2))
    places[:, : len(axes)] = every @ axes.T
    places = (places - places.min(axis=0)) / (np.ptp(places, axis=0).max() or 1.0)
    places += (1 - places.max(axis=0)) / 2
    rows: list[tuple[str, int, int | None]] = [(names[first][i], 0, None) for i in drawn]
    rows += [(names[second][j], 1, position.get(mates[j])) for j in drawn_second]
    points = [Point(float(across), float(up), *row) for (across, up), row in zip(places, rows, strict=True)]
    share = (values[:2] ** 2).sum() / ((values**2).sum() or 1.0)
    caption = f"Two principal components, which hold {share:.0%} of the variance."
    if len(points) < len(x) + len(y):
        caption += f" {len(drawn):,} of {len(x):,} and {len(drawn_second):,} of {len(y):,} are drawn."
    if any(point.mate is not None for point in points):
        caption += " Lines join what belongs together."
    return PointMap(title, [first, second], points, caption)


def contributions(title: str, values: Mapping[str, float | Interval], caption: str = "") -> Bars:
    """What each part contributes, in points of recall (shares are multiplied by 100), the largest first."""
    bars = []
    for name, value in values.items():
        if isinstance(value, Interval):
            middle, low, high = (100 * part for part in value)
            bars.append(Bar(name, middle, _signed("{:+.1f} ({:+.1f} to {:+.1f})", middle, low, high), low, high))
        else:
            bars.append(Bar(name, 100 * value, _signed("{:+.1f}", 100 * value)))
    return Bars(title, sorted(bars, key=lambda bar: -bar.value), caption)


def times(title: str, seconds: Mapping[str, float], device: str = "", *, kept: Collection[str] = ()) -> Times:
    """Where time went, in the order given; of the parts in `kept` the results came from a cache, and it says so."""
    return Times(title, list(seconds.items()), device, kept)


def _spaced(count: int, limit: int) -> list[int]:
    """At most `limit` of `count` rows, evenly spaced."""
    return [int(row) for row in np.unique(np.linspace(0, count - 1, min(limit, count)).astype(int))]


def _signed(form: str, *values: float) -> str:
    return form.format(*values).replace("-", "−")


def _block_means(rows: Floats, limit: int) -> Floats:
    """At most `limit` rows, each the mean over a run of the given ones."""
    if len(rows) <= limit:
        return rows
    starts = np.linspace(0, len(rows), limit + 1).astype(int)
    sums: Floats = np.add.reduceat(rows, starts[:-1], axis=0) / np.diff(starts)[:, None]
    return sums


def _normalised(rows: Floats) -> Floats:
    rows = np.asarray(rows, np.float64)
    lengths: Floats = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: Floats = rows / np.where(lengths > 0, lengths, 1.0)
    return unit
