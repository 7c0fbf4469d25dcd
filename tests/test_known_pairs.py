"""What is known of pairs, against the same over the whole matrix."""

from __future__ import annotations

import numpy as np

from pycm.matchers.known import KnownPairs, belonging, unique_texts


def test_within_a_batch_and_by_rows() -> None:
    draw = np.random.default_rng(0)
    for n, m, count in ((1, 1, 1), (5, 3, 9), (30, 20, 80), (40, 41, 300)):
        pairs = np.stack([draw.integers(0, n, count), draw.integers(0, m, count)], 1)  # some twice
        known = np.zeros((n, m), bool)
        known[pairs[:, 0], pairs[:, 1]] = True
        for size in (1, 2, 17, count):
            a, b = pairs[draw.permutation(count)[:size]].T
            wanted = known[a][:, b] & ~np.eye(len(a), dtype=bool)
            found = np.zeros_like(wanted)
            found[tuple(KnownPairs(pairs).within(a, b).T)] = True
            np.testing.assert_array_equal(found, wanted)
        once = np.unique(pairs, axis=0)
        for side, matrix in ((0, known), (1, known.T)):
            rows = belonging(once, len(matrix), side)
            assert [row.tolist() for row in rows] == [np.flatnonzero(row).tolist() for row in matrix]


def test_unique_texts() -> None:
    texts, pairs = unique_texts(["b", "a", "b", "b", "c"], np.array([0, 0, 1, 1, 2]))
    assert texts == ["b", "a", "c"]
    assert pairs.tolist() == [[0, 0], [0, 1], [1, 0], [2, 2]]
