"""Results that `pycm bench` must accept, and results that it must not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import pycm
from pycm import reference
from pycm.bench.cases import Case
from pycm.bench.check import Checker
from pycm.bench.contrastive import LossCase
from pycm.bench.data import Data
from pycm.bench.providers import PROVIDERS

TOPK = Case("t", "a test", "topk", 12, 300, 32, k=6)
RANK = Case("r", "a test", "rank", 12, 300, 32, positives=2)
ONE = Case("o", "a test", "rank", 12, 300, 32, positives=1)
JOIN = Case("j", "a test", "join", 12, 300, 32, threshold=0.3)
PAIRS = Case("p", "a test", "pairs", 100, 100, 32, k=9)
SIMILARITY = Case("s", "a test", "similarity", 12, 300, 32, "euclidean")


def exact(case: Case, data: Data) -> Any:
    """The right result, from fp64 scores rounded to fp32."""
    scores = reference.similarity(data.queries, data.gallery, case.metric).astype(np.float32)
    if case.op == "topk":
        order = np.argsort(scores if case.metric == "euclidean" else -scores, axis=1, kind="stable")[:, : case.k]
        return np.take_along_axis(scores, order, 1), order
    if case.op == "rank":
        own = np.take_along_axis(scores, data.positives, 1)
        greater = (scores[:, None, :] > own[:, :, None]).sum(2)
        return greater, (scores[:, None, :] == own[:, :, None]).sum(2) - 1
    if case.op == "join":
        return np.nonzero(scores >= case.threshold)
    if case.op == "pairs":
        i, j = np.triu_indices(case.gallery, 1)
        best = np.argsort(-scores[i, j], kind="stable")[: case.k]
        return i[best], j[best], scores[i, j][best]
    return scores


def problems(case: Case, *results: tuple[str, Any], data: Data | None = None) -> dict[str, str]:
    checker = Checker(case, Data(case) if data is None else data)
    for name, result in results:
        checker.check(name, result)
    return checker.wrong


def changed(array: Any, place: Any, value: Any) -> Any:
    copy = array.copy()
    copy[place] = value
    return copy


@pytest.mark.parametrize("case", [TOPK, RANK, ONE, JOIN, PAIRS, SIMILARITY], ids=lambda case: str(case.op))
def test_right_results(case: Case) -> None:
    right = exact(case, Data(case))
    assert problems(case, ("pycm", right), ("pycm-gallery", right), ("peer", right)) == {}


def test_topk() -> None:
    data = Data(TOPK)
    scores, indices = right = exact(TOPK, data)
    every = np.argsort(-reference.similarity(data.queries, data.gallery), axis=1)
    eleventh = changed(indices, (5, -1), every[5, 10])
    assert "a match is worse by" in problems(TOPK, ("pycm", right), ("peer", (scores, eleventh)))["peer"]
    twice = changed(indices, (5, -1), indices[5, 0])
    assert problems(TOPK, ("pycm", right), ("peer", (scores, twice)))["peer"] == "a match twice"
    outside = changed(indices, (5, -1), 300)
    assert problems(TOPK, ("pycm", right), ("peer", (scores, outside)))["peer"] == "an index outside the gallery"
    assert "shape" in problems(TOPK, ("pycm", right), ("peer", (scores[:, :5], indices[:, :5])))["peer"]
    # A peer's order within the matches is its own affair; pycm's is not.
    swapped = indices[:, ::-1]
    assert problems(TOPK, ("pycm", right), ("peer", (scores[:, ::-1], swapped))) == {}
    assert "differ from pycm.reference" in problems(TOPK, ("pycm", (scores, swapped)))["pycm"]


def test_pycm_is_held_to_the_bit() -> None:
    scores, indices = right = exact(TOPK, Data(TOPK))
    nudged = changed(scores, (0, 2), np.nextafter(scores[0, 2], np.float32(2)))
    assert problems(TOPK, ("pycm", (nudged, indices))) == {"pycm": "scores of query 0 differ from pycm.reference"}
    # Its variants in every row, not in the sample alone.
    nudged = changed(scores, (5, 2), np.nextafter(scores[5, 2], np.float32(2)))
    assert problems(TOPK, ("pycm", right), ("pycm-gallery", (nudged, indices))) == {"pycm-gallery": "differs from pycm"}


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_a_peer_that_is_right_accuses_pycm(metric: Any) -> None:
    case = Case("t", "a test", "topk", 12, 300, 32, metric, k=6)
    data = Data(case)
    scores, indices = right = exact(case, data)
    sign = 1 if metric == "euclidean" else -1
    every = np.argsort(sign * reference.similarity(data.queries, data.gallery, metric), axis=1)
    # Query 5 is outside the sample: pycm takes its 7th match for its 6th.
    missed = changed(indices, (5, -1), every[5, 6])
    seventh = reference.similarity(data.queries[5:6], data.gallery[every[5, 6:7]], metric)[0, 0]
    found = problems(case, ("pycm", (changed(scores, (5, -1), seventh), missed)), ("peer", right), data=data)
    assert found == {"pycm": f"missed matches, such as row {indices[5, -1]} for query 5"}


def test_near_ties_may_be_decided_otherwise() -> None:
    data = Data(TOPK)
    scores, indices = exact(TOPK, data)
    last, other = indices[5, -1], int(np.setdiff1d(np.arange(300), indices)[0])
    data.gallery[other] = data.gallery[last]
    data.gallery[other, 0] += 1e-7  # fp32 sums cannot tell them apart
    right = exact(TOPK, data)
    peer = changed(right[1], (5, -1), other if last in right[1][5] else last)
    assert problems(TOPK, ("pycm", right), ("peer", (scores, peer)), data=data) == {}


def test_rank() -> None:
    right = exact(RANK, Data(RANK))
    greater, equal = right
    wrong = changed(greater, (5, 1), greater[5, 1] + 1)
    assert (
        f"is {greater[5, 1] + 1}, not {greater[5, 1]}"
        in problems(RANK, ("pycm", right), ("peer", (wrong, equal)))["peer"]
    )
    wrong = changed(greater, (0, 1), greater[0, 1] + 1)
    assert problems(RANK, ("pycm", (wrong, equal))) == {"pycm": "ranks of query 0 differ from pycm.reference"}
    wrong = changed(equal, (11, 0), 1)
    assert problems(RANK, ("pycm", (greater, wrong))) == {"pycm": "ties of query 11 differ from pycm.reference"}


def test_reciprocal_rank() -> None:
    right = exact(ONE, Data(ONE))
    mean = float(np.mean([1 / (1 + rank) for rank in right[0].ravel()]))
    assert problems(ONE, ("pycm", right), ("peer", mean)) == {}
    assert "mean reciprocal rank" in problems(ONE, ("pycm", right), ("peer", mean + 0.01))["peer"]


def test_join() -> None:
    rows, indices = right = exact(JOIN, Data(JOIN))
    assert len(rows) > 20
    less = (np.delete(rows, 9), np.delete(indices, 9))
    more = (np.append(rows, 3), np.append(indices, np.setdiff1d(np.arange(300), indices[rows == 3])[0]))
    assert "a pair missed" in problems(JOIN, ("pycm", right), ("peer", less))["peer"]
    assert "a pair too many" in problems(JOIN, ("pycm", right), ("peer", more))["peer"]
    first = int(np.flatnonzero(rows == 0)[0])
    less = (np.delete(rows, first), np.delete(indices, first))
    assert problems(JOIN, ("pycm", less)) == {"pycm": "pairs of query 0 differ from pycm.reference"}


def test_pairs() -> None:
    data = Data(PAIRS)
    i, j, scores = right = exact(PAIRS, data)
    wider = exact(Case("p", "a test", "pairs", 100, 100, 32, k=40), data)
    worse = tuple(changed(a, -1, b[-1]) for a, b in zip(right, wider, strict=True))
    assert "a pair is worse by" in problems(PAIRS, ("pycm", right), ("peer", worse), data=data)["peer"]
    assert problems(PAIRS, ("pycm", right), ("peer", (j, i, scores)), data=data)["peer"] == "not 9 pairs"
    nudged = changed(scores, 0, np.nextafter(scores[0], np.float32(2)))
    assert problems(PAIRS, ("pycm", (i, j, nudged)), data=data) == {"pycm": "scores differ from pycm.reference"}
    # Row 0 is in the sample: its best pair may not be missing.
    data.gallery[0] = data.gallery[50]
    right = exact(PAIRS, data)
    place = int(np.flatnonzero(right[0] == 0)[0])
    wider = exact(Case("p", "a test", "pairs", 100, 100, 32, k=40), data)
    missed = tuple(changed(a, place, b[20]) for a, b in zip(right, wider, strict=True))
    assert problems(PAIRS, ("pycm", missed), data=data) == {"pycm": "a better pair of row 0 is missing"}


def test_maxsim() -> None:
    case = Case("m", "a test", "maxsim", 3, 12, 16, "dot", query_vectors=4, item_vectors=5)
    data = Data(case)
    scores = pycm.maxsim(*data.sets)
    assert problems(case, ("pycm", scores)) == {}
    assert problems(case, ("peer", scores[:, :-1])) == {"peer": "shape (3, 11)"}
    wrong = scores.copy()
    wrong[2, 11] += 1e-3
    assert "off by" in problems(case, ("peer", wrong))["peer"]


def test_loss() -> None:
    case = LossCase("l", "a test", "loss", 30, 30, 16, loss="info_nce")
    data = Data(case)
    found = PROVIDERS["loss"][0].prepare(case, data)()
    assert problems(case, ("pycm", found), data=data) == {}
    halved = (found[0], found[1], found[2] / 2)
    assert problems(case, ("pycm", found), ("peer", halved), data=data) == {
        "peer": "the gradient is off by 5.0e-01 of the largest"
    }


def test_similarity() -> None:
    data = Data(SIMILARITY)
    scores = exact(SIMILARITY, data)
    assert "off by" in problems(SIMILARITY, ("pycm", changed(scores, (0, 0), scores[0, 0] + 0.01)))["pycm"]
    assert "shape" in problems(SIMILARITY, ("peer", scores[:, :-1]))["peer"]
    assert problems(SIMILARITY, ("peer", pycm.similarity(data.queries, data.gallery, "euclidean"))) == {}
