"""pycm.compat.sklearn beside scikit-learn: the same calls on both."""

from __future__ import annotations

import importlib.util
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
from compat_peers import assert_close, assert_same_error, only_pycm, outcome, parameters

pytest.importorskip("sklearn")
sparse = pytest.importorskip("scipy.sparse")

from sklearn.base import clone  # noqa: E402
from sklearn.metrics import pairwise as theirs  # noqa: E402
from sklearn.neighbors import NearestNeighbors as Theirs  # noqa: E402

import pycm.compat.sklearn as ours  # noqa: E402

FUNCTIONS = ("cosine_similarity", "euclidean_distances", "pairwise_distances_argmin_min")
ORIGINALS = tuple(f"_{name}" for name in FUNCTIONS)
METRICS = ("euclidean", "l2", "sqeuclidean", "cosine", "minkowski")
DTYPES = ("float32", "float64", "float16", "int64")

rng = np.random.default_rng(0)
X, Y = 10 * rng.standard_normal((21, 18)), 10 * rng.standard_normal((230, 18))
NAN = np.where(np.arange(X.size).reshape(X.shape) == 40, np.nan, X)

MISFITS = {
    "features": (X[:, :3], Y),
    "nan": (NAN, Y),
    "one-dimensional": (X[0], Y),
    "empty": (X[:0], Y),
    "three-dimensional": (X[None], Y),
    "complex": (X + 1j, Y),
    "text": ([["a"] * 18], Y),
    "none": (None, Y),
}


def of_dtype(values: Any, dtype: str) -> Any:
    """Integers are large, so that no two of their distances agree."""
    return (values * 1000 if dtype == "int64" else values).astype(dtype)


def parents_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search handed to the original fails from now on."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("handed to the original")

    monkeypatch.setattr(Theirs, "kneighbors", refuse)
    monkeypatch.setattr(Theirs, "radius_neighbors", refuse)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signature(name: str) -> None:
    assert parameters(getattr(ours, name)) == parameters(getattr(theirs, name))


def test_signatures_of_nearest_neighbors() -> None:
    for name in ("__init__", "fit", "kneighbors", "radius_neighbors", "kneighbors_graph", "radius_neighbors_graph"):
        assert parameters(getattr(ours.NearestNeighbors, name)) == parameters(getattr(Theirs, name))


# ---- pairwise ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cosine_similarity", {}),
        ("cosine_similarity", {"dense_output": False}),
        ("euclidean_distances", {}),
        ("euclidean_distances", {"squared": True}),
    ],
)
def test_pairwise(dtype: str, name: str, options: dict[str, Any]) -> None:
    x, y = X.astype(dtype), Y.astype(dtype)
    function, original = getattr(ours, name), getattr(theirs, name)
    for a, b in [(x, y), (x.tolist(), y.tolist()), (x[::2, ::3], y[::-1, ::3]), (x, y.astype(np.float32))]:
        with only_pycm(ours, *ORIGINALS):
            mine = function(a, b, **options)
        assert_close(mine, original(a, b, **options))
    for self_ in [(x,), (x, None), (x, x)]:
        assert_close(function(*self_, **options), original(*self_, **options))


def test_pairwise_with_norms_given_is_the_originals() -> None:
    norms = (Y**2).sum(1) + 5  # wrong: whoever uses them gives other distances
    mine = ours.euclidean_distances(X, Y, Y_norm_squared=norms, squared=True)
    assert np.array_equal(mine, theirs.euclidean_distances(X, Y, Y_norm_squared=norms, squared=True))
    assert not np.allclose(mine, ours.euclidean_distances(X, Y, squared=True))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_pairwise_of_sparse_rows(name: str) -> None:
    s = sparse.csr_matrix(np.where(Y > 5, Y, 0))
    for args in [(s, s), (X, s), (s, X)]:
        mine, expected = getattr(ours, name)(*args), getattr(theirs, name)(*args)
        assert type(mine) is type(expected)
        for a, b in zip(mine, expected, strict=True):
            np.testing.assert_array_equal(a, b)
    lean = ours.cosine_similarity(s, dense_output=False)
    assert type(lean) is type(theirs.cosine_similarity(s, dense_output=False))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("misfit", MISFITS)
def test_pairwise_errors(name: str, misfit: str) -> None:
    assert_same_error(getattr(ours, name), getattr(theirs, name), *MISFITS[misfit])


def test_pairwise_errors_of_options() -> None:
    assert_same_error(ours.cosine_similarity, theirs.cosine_similarity, X, Y, "yes")
    assert_same_error(ours.euclidean_distances, theirs.euclidean_distances, X, Y, squared="yes")
    assert_same_error(ours.euclidean_distances, theirs.euclidean_distances, X, Y, X_norm_squared=X[0])
    for options in ({"axis": 2}, {"metric": "none"}, {"metric": 3}, {"metric_kwargs": 5}):
        assert_same_error(ours.pairwise_distances_argmin_min, theirs.pairwise_distances_argmin_min, X, Y, **options)
    assert_same_error(ours.pairwise_distances_argmin_min, theirs.pairwise_distances_argmin_min, X, None)


def test_close_rows_keep_their_distance() -> None:
    """|x|² − 2xy + |y|² loses it, in float64 too."""
    x = np.full((1, 16), 1e6)
    y = np.repeat(x, 3, axis=0)
    y[1, 0] += 1e-3
    exact = [[0, y[1, 0] - 1e6, 0]]
    assert ours.euclidean_distances(x, y).tolist() == exact
    assert not np.allclose(theirs.euclidean_distances(x, y), exact, rtol=1e-3)


def test_tiny_rows_have_a_direction() -> None:
    """The original does not normalise rows shorter than 10 eps."""
    tiny, unit = np.float32([[3e-8, 4e-8]]), np.float32([[1, 0]])
    assert ours.cosine_similarity(tiny, unit) == pytest.approx(0.6)
    assert theirs.cosine_similarity(tiny, unit) < 0.01
    assert ours.cosine_similarity(0 * tiny, unit) == theirs.cosine_similarity(0 * tiny, unit) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS[:-1])
@pytest.mark.parametrize("axis", [0, 1])
def test_argmin_min(dtype: str, metric: str, axis: int) -> None:
    x, y = of_dtype(X, dtype), of_dtype(Y, dtype)
    with only_pycm(ours, *ORIGINALS):
        mine = ours.pairwise_distances_argmin_min(x, y, axis=axis, metric=metric)
    expected = theirs.pairwise_distances_argmin_min(x, y, axis=axis, metric=metric)
    assert mine[0].dtype == expected[0].dtype
    assert np.array_equal(mine[0], expected[0])
    assert_close(mine[1], expected[1])


def test_argmin_min_of_other_metrics() -> None:
    for options in (
        {"metric": "manhattan"},
        {"metric": "minkowski", "metric_kwargs": {"p": 3}},
        {"metric": lambda a, b: abs(a - b).max()},
        {"metric_kwargs": {"squared": False}},
        {"metric_kwargs": {"squared": True}},
    ):
        mine, expected = (m.pairwise_distances_argmin_min(X[:5], Y, **options) for m in (ours, theirs))
        assert np.array_equal(mine[0], expected[0])
        assert_close(mine[1], expected[1])
    assert ours.pairwise_distances_argmin_min([[0.0]], [[1.0], [-1.0], [1.0]])[0].tolist() == [0]


# ---- NearestNeighbors ----


def pair(metric: str, fitted: Any, **options: Any) -> tuple[Any, Any]:
    return tuple(
        cls(algorithm="brute", metric=metric, **options).fit(fitted) for cls in (ours.NearestNeighbors, Theirs)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
def test_kneighbors(dtype: str, metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = of_dtype(X, dtype), of_dtype(Y, dtype)
    mine, original = pair(metric, y)
    calls: list[dict[str, Any]] = [{"X": x}, {"X": x, "n_neighbors": 1}, {}, {"n_neighbors": 12}, {"X": x.tolist()}]
    expected = [original.kneighbors(**call) for call in calls]
    graphs = [original.kneighbors_graph(x, mode=mode) for mode in ("connectivity", "distance")]
    parents_refuse(monkeypatch)
    for call, (distances, indices) in zip(calls, expected, strict=True):
        found = mine.kneighbors(**call)
        assert found[1].dtype == indices.dtype
        assert np.array_equal(found[1], indices)
        assert_close(found[0], distances)
        assert np.array_equal(mine.kneighbors(**call, return_distance=False), indices)
    for mode, graph in zip(("connectivity", "distance"), graphs, strict=True):
        found = mine.kneighbors_graph(x, mode=mode)
        assert type(found) is type(graph)
        assert np.array_equal(found.indices, graph.indices)
        assert np.array_equal(found.indptr, graph.indptr)
        assert_close(found.data, graph.data)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("metric", "radius"),
    [("euclidean", 45.0), ("l2", 60), ("sqeuclidean", 2000.0), ("cosine", 0.6), ("cosine", 3.0), ("minkowski", 1e-9)],
)
def test_radius_neighbors(dtype: str, metric: str, radius: float, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = X.astype(dtype), Y.astype(dtype)
    if dtype == "int64":
        radius *= {"sqeuclidean": 10**6, "cosine": 1}.get(metric, 1000)
    mine, original = pair(metric, y, radius=radius)
    queries = (x, None)
    expected = [original.radius_neighbors(q) for q in queries]
    graphs = [original.radius_neighbors_graph(q, mode="distance") for q in queries]
    parents_refuse(monkeypatch)
    for q, (distances, indices), graph in zip(queries, expected, graphs, strict=True):
        found = mine.radius_neighbors(q)
        assert [a.dtype for a in found] == [object, object]
        ascending = mine.radius_neighbors(q, sort_results=True)
        for i in range(len(indices)):
            order = np.argsort(indices[i])
            assert np.array_equal(found[1][i], indices[i][order])
            assert found[1][i].dtype == indices[i].dtype
            assert_close(found[0][i], distances[i][order])
            by_distance = np.lexsort((found[1][i], found[0][i]))
            assert np.array_equal(ascending[1][i], found[1][i][by_distance])
            assert np.array_equal(ascending[0][i], found[0][i][by_distance])
        assert [row.tolist() for row in mine.radius_neighbors(q, radius, False)] == [row.tolist() for row in found[1]]
        assert_close(mine.radius_neighbors_graph(q, mode="distance").toarray(), graph.toarray())


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
def test_points_on_the_boundary_are_within(dtype: str) -> None:
    """The original compares squares, and loses those of the root of 3, whose square is below 3."""
    grid = np.stack(np.meshgrid(*[np.arange(5)] * 3), -1).reshape(-1, 3)
    apart = ((grid[:, None] - grid) ** 2).sum(2)
    for squared in range(13):
        mine = ours.NearestNeighbors(algorithm="brute", radius=float(np.sqrt(squared))).fit(grid.astype(dtype))
        found = mine.radius_neighbors(return_distance=False)
        assert [len(row) + 1 for row in found] == (apart <= squared).sum(1).tolist()


def test_own_row_is_left_out_among_duplicates() -> None:
    y = np.zeros((9, 20))
    distances, indices = ours.NearestNeighbors(algorithm="brute", n_neighbors=3).fit(y).kneighbors()
    assert indices.tolist() == [[j for j in range(9) if j != i][:3] for i in range(9)]
    assert not distances.any()


def test_other_metrics_trees_and_sparse_rows_are_the_originals() -> None:
    s = sparse.csr_matrix(np.where(Y > 5, Y, 0))
    for options, fitted, queries in [
        ({"metric": "manhattan", "algorithm": "brute"}, Y, X),
        ({"p": 3, "algorithm": "brute"}, Y, X),
        ({"metric": "minkowski", "metric_params": {"w": np.arange(18.0)}, "algorithm": "brute"}, Y, X),
        ({"metric": lambda a, b: abs(a - b).max(), "algorithm": "brute"}, Y[:30], X),
        ({"algorithm": "kd_tree"}, Y, X),
        ({"algorithm": "auto"}, Y[:, :4], X[:, :4]),
        ({"algorithm": "brute"}, s, s),
        ({"algorithm": "brute"}, Y, sparse.csr_matrix(X)),
        ({"metric": "precomputed", "algorithm": "brute"}, theirs.euclidean_distances(Y), None),
    ]:
        mine, original = (cls(**options).fit(fitted) for cls in (ours.NearestNeighbors, Theirs))
        for method in ("kneighbors", "radius_neighbors"):
            for a, b in zip(getattr(mine, method)(queries), getattr(original, method)(queries), strict=True):
                for row, expected in zip(a, b, strict=True):
                    np.testing.assert_array_equal(row, expected)


@pytest.mark.parametrize("misfit", [name for name in MISFITS if name != "none"])
def test_errors_of_queries(misfit: str) -> None:
    mine, original = pair("euclidean", Y)
    bad = MISFITS[misfit][0]
    assert_same_error(mine.kneighbors, original.kneighbors, bad)
    assert_same_error(mine.radius_neighbors, original.radius_neighbors, bad)
    assert_same_error(ours.NearestNeighbors().kneighbors, Theirs().kneighbors, bad)
    assert_same_error(ours.NearestNeighbors().radius_neighbors, Theirs().radius_neighbors, bad)


def test_errors_of_options() -> None:
    mine, original = pair("euclidean", Y)
    for k in (0, -2, 2.5, "3", 231):
        assert_same_error(mine.kneighbors, original.kneighbors, X, k)
    assert_same_error(mine.kneighbors, original.kneighbors, None, 230)
    assert_same_error(mine.kneighbors_graph, original.kneighbors_graph, X, mode="none")
    assert_same_error(mine.radius_neighbors, original.radius_neighbors, X, "far")
    assert_same_error(mine.radius_neighbors, original.radius_neighbors, X, return_distance=False, sort_results=True)
    for options in ({"n_neighbors": 0}, {"metric": "none"}, {"radius": -1.0}, {"algorithm": "magic"}):
        new = [cls(**options) for cls in (ours.NearestNeighbors, Theirs)]
        assert_same_error(new[0].fit, new[1].fit, Y)
    assert mine.kneighbors(n_neighbors=229)[1].shape == (230, 229)


def test_options_of_the_metric_are_the_originals() -> None:
    mine, original = pair("cosine", Y, metric_params={"squared": True})
    assert_same_error(mine.kneighbors, original.kneighbors, X)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_cosine_distances_stay_within_0_and_2(dtype: str) -> None:
    y = Y.astype(dtype)
    distances = (
        ours.NearestNeighbors(algorithm="brute", metric="cosine", n_neighbors=2).fit(np.r_[y, -y]).kneighbors(y)[0]
    )
    assert (distances[:, 0] >= 0).all()  # 1 - score alone is -2e-16 for some
    assert np.allclose(distances[:, 0], 0, atol=1e-15)
    far = ours.pairwise_distances_argmin_min(y[:1], -y[:1], metric="cosine")[1]
    assert 2 - 1e-15 <= far[0] <= 2


@pytest.mark.parametrize("radius", [-1.0, np.inf, np.nan, 1e300])
def test_unusual_radii_are_the_originals(radius: float) -> None:
    mine, original = pair("euclidean", Y.astype(np.float32))
    a, b = (outcome(m.radius_neighbors, X, radius, return_distance=False) for m in (mine, original))
    assert [sorted(row) for row in a] == [sorted(row) for row in b]


def test_an_estimator_like_any_other() -> None:
    mine, original = pair("cosine", Y, n_neighbors=4, n_jobs=2)
    assert mine.get_params() == original.get_params()
    assert repr(mine) == repr(original)
    assert isinstance(mine, Theirs)
    copy = clone(mine).set_params(n_neighbors=6, metric="euclidean")
    assert (copy.n_neighbors, copy.metric, mine.n_neighbors) == (6, "euclidean", 4)
    assert_same_error(copy.kneighbors, clone(original).kneighbors, X)
    again = pickle.loads(pickle.dumps(mine))
    assert np.array_equal(again.kneighbors(X)[1], mine.kneighbors(X)[1])
    assert np.array_equal(
        copy.fit(Y).kneighbors(X)[1], Theirs(n_neighbors=6, algorithm="brute").fit(Y).kneighbors(X)[1]
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_fitted_rows_are_encoded_once_and_are_those_of_fit(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = []
    encode = ours.encode

    def counting(rows: Any, metric: str) -> Any:
        encoded.append(len(rows))
        return encode(rows, metric)

    monkeypatch.setattr(ours, "encode", counting)
    y, x = Y.astype(dtype), X.astype(dtype)
    mine, original = pair("euclidean", y.copy(), n_neighbors=4, radius=50.0)
    assert encoded == [230]
    mine.fit(y)
    expected = original.kneighbors(x)
    y[:] = 0
    for again in (mine, pickle.loads(pickle.dumps(mine))):
        assert_close(again.kneighbors(x)[0], expected[0])
        assert np.array_equal(again.kneighbors(x)[1], expected[1])
        assert [sorted(row) for row in again.radius_neighbors(x)[1]] == [
            sorted(row) for row in original.radius_neighbors(x)[1]
        ]
    assert encoded == [230, 230, 230]


def test_warning_of_feature_names() -> None:
    class Frame:  # what scikit-learn asks of a table
        columns = np.array([f"c{i}" for i in range(18)], dtype=object)

        def __init__(self, values: Any) -> None:
            self.values, self.shape = values, values.shape

        def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
            return np.asarray(self.values, dtype)

        def __len__(self) -> int:
            return len(self.values)

    texts = []
    for model in pair("euclidean", Y):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            named = clone(model).fit(Y)
            named.feature_names_in_ = Frame.columns
            named.kneighbors(X)
        texts.append([str(w.message) for w in caught])
    assert texts[0] == texts[1]
    assert texts[0]


def test_an_older_scikit_learn_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("sklearn.utils.validation.validate_data")
    spec = importlib.util.spec_from_file_location("another_import", ours.__file__)
    with pytest.raises(ImportError, match=r"needs scikit-learn 1\.6 or newer"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
