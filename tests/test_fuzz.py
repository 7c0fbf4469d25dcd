"""Data made to break the screens: whatever comes in, topk, rank and join give the bits of the specification, by every
screen, one-shot and of a gallery encoded beforehand.

`PYCM_FUZZ_PAIRS=1e7 pytest tests/test_fuzz.py -m slow -s` goes on until that many pairs were compared by every screen.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass

import numpy as np
import pytest
from conftest import LEVELS, use_level
from fuzz_makers import MAKERS, Array, Generator, variants
from oracles import DISTANCES, METRICS, assert_same, best_of
from pair_oracles import counts, table

import pycm
from pycm import _C

SCREENS = ("float32", "bfloat16", "int8", "auto")


@dataclass
class Questions:
    """What is asked of one pair of queries and gallery, and the answers by definition."""

    q: Array
    g: Array
    metric: str
    k: int
    mask: Array | None
    matches: tuple[Array, Array]
    positives: Array
    offsets: Array
    ranks: tuple[Array, Array, Array]
    threshold: float
    after: int
    pairs: tuple[Array, Array, Array]


def questions(rng: Generator, q: Array, g: Array, metric: str, k: int) -> Questions:
    scores = table(q, g, metric)
    n, m = scores.shape
    mask = None if rng.random() < 0.7 else rng.random((n, m) if rng.random() < 0.5 else m) < 0.8
    masked = scores if mask is None else np.where(mask, scores, np.nan)
    # Of each query a row among the best, and any; of some none.
    matches = best_of(masked, k, metric)
    found = np.where(matches[1] < 0, 0, matches[1])
    two = np.stack([found[np.arange(n), rng.integers(0, k, n)], rng.integers(0, m, n)], 1)
    asked = rng.integers(0, 3, n)
    positives = two[np.arange(2) < asked[:, None]].astype(np.int64)
    rows = np.repeat(np.arange(n), asked)
    # A score of some pair, so that it is decided by its last bit whether that pair is in.
    values = np.sort(np.where(np.isnan(scores), -np.inf, scores), axis=None)
    at = int(rng.integers(0, min(len(values), 1 + n * m // 20)))
    if metric in DISTANCES:
        values = np.sort(scores[~np.isnan(scores)])
        threshold = float(values[min(at, len(values) - 1)]) if len(values) else 1.0
    else:
        threshold = float(values[-1 - at])
    after = -1 if rng.random() < 0.5 else int(rng.integers(0, max(1, m // 2)))
    inside = scores <= threshold if metric in DISTANCES else scores >= threshold
    if after >= 0:
        inside &= np.arange(m) > after + np.arange(n)[:, None]
    i, j = np.nonzero(inside)
    ranks = counts(scores, rows, positives, metric, mask)
    offsets = np.cumsum([0, *asked]).astype(np.int64)
    return Questions(q, g, metric, k, mask, matches, positives, offsets, ranks, threshold, after, (i, j, scores[i, j]))


def encode(rng: Generator, g: Array, metric: str, screen: str) -> _C.EncodedGallery:
    """In several extensions; now and then through read-only copies of its state."""
    gallery = _C.EncodedGallery(metric, screen)
    for end in sorted({*rng.integers(1, len(g) + 1, 2).tolist(), len(g)}):
        gallery.extend(g[:end], int(rng.integers(1, 4)))
        if rng.random() < 0.3:
            state = {name: np.array(part, order="C") for name, part in gallery.state().items()}
            for part in state.values():
                part.flags.writeable = False
            gallery = _C.EncodedGallery(metric, screen)
            gallery.restore(g[:end], state)
    return gallery


def ask(asked: Questions, screen: str, threads: int, gallery: _C.EncodedGallery | None) -> None:
    q, g, metric = asked.q, asked.g, asked.metric
    limit = len(q) * len(g)
    if gallery is None:
        matches = _C.topk(q, g, asked.k, metric, "exact", asked.mask, None, None, screen, threads)
        ranks = _C.rank(q, g, asked.positives, asked.offsets, metric, asked.mask, None, None, screen, threads)
        pairs = _C.join(q, g, asked.threshold, metric, asked.after, limit, screen, threads)
    else:
        matches = gallery.topk(q, asked.k, asked.mask, num_threads=threads)
        ranks = gallery.rank(q, asked.positives, asked.offsets, asked.mask, num_threads=threads)
        pairs = gallery.join(q, asked.threshold, asked.after, limit, threads)
    assert_same(matches, asked.matches, "topk")
    for name, got, want in zip(("greater", "equal", "scores"), ranks, asked.ranks, strict=True):
        np.testing.assert_array_equal(got, want, f"rank: {name}")
    for name, got, want in zip(("rows", "indices", "scores"), pairs, asked.pairs, strict=True):
        np.testing.assert_array_equal(got, want, f"join: {name}")


def compare(rng: Generator, q: Array, g: Array, metric: str, k: int, levels: list[str], both: bool = False) -> None:
    """By every screen, at a level drawn for each; one-shot, encoded, or both."""
    asked = questions(rng, q, g, metric, k)
    for screen in SCREENS:
        for encoded in (False, True) if both else (bool(rng.integers(0, 2)),):
            level, threads = str(rng.choice(levels)), int(rng.choice([1, 2, 3, 9]))
            use_level(level)
            try:
                ask(asked, screen, threads, encode(rng, g, metric, screen) if encoded else None)
            except AssertionError as error:
                what = f"{screen}{' encoded' if encoded else ''} {level} {q.shape} {g.shape} {q.dtype} k={k}"
                raise AssertionError(f"{what} {metric}: {error}") from error


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", MAKERS)
def test_adversarial(name: str, metric: str, every_level: list[str]) -> None:
    rng = np.random.default_rng(zlib.crc32(f"{name} {metric}".encode()))
    with np.errstate(all="ignore"):
        q, g = MAKERS[name](rng, 25, 700, 24)
    compare(rng, q, g, metric, int(rng.choice([1, 10, 60])), every_level)


@pytest.mark.parametrize("name", MAKERS)
def test_many_blocks(name: str, every_level: list[str]) -> None:
    """So many threads that a gallery of some rows is searched in some dozens of blocks."""
    rng = np.random.default_rng(zlib.crc32(f"blocks {name}".encode()))
    with np.errstate(all="ignore"):
        q, g = MAKERS[name](rng, 60, 1200, 40)
    metric = str(rng.choice(METRICS))
    scores = table(q, g, metric)
    for screen in SCREENS:
        use_level(str(rng.choice(every_level)))
        for k in (8, 60):
            got = _C.topk(q, g, k, metric, "exact", None, None, None, screen, 9)
            assert_same(got, best_of(scores, k, metric), f"{screen} {metric} k={k}")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", MAKERS)
def test_random_variants(name: str, metric: str, every_level: list[str]) -> None:
    rng = np.random.default_rng(zlib.crc32(f"variant {name} {metric}".encode()))
    random_round(rng, name, metric, every_level, pairs=5_000)


DIMS = (1, 2, 3, 4, 5, 8, 16, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 1023, 1024, 1025)


def random_round(rng: Generator, name: str, metric: str, levels: list[str], pairs: int, both: bool = False) -> int:
    d = int(rng.choice(DIMS))
    pairs = min(pairs, 40_000_000 // d)
    m = int(rng.integers(16, max(17, pairs // 3)))
    n = max(3, min(pairs // m, 400))
    k = int(min(m, rng.choice([1, 2, 3, 10, 33, max(1, m // 4), m])))
    q, g = variants(name, rng, n, m, d)
    try:
        compare(rng, q, g, metric, k, levels, both)
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from error
    return n * m


@pytest.mark.slow
@pytest.mark.skipif("PYCM_FUZZ_PAIRS" not in os.environ, reason="PYCM_FUZZ_PAIRS says how many pairs to try")
def test_many_pairs() -> None:
    budget = float(os.environ["PYCM_FUZZ_PAIRS"])
    seed = int(os.environ.get("PYCM_FUZZ_SEED", np.random.SeedSequence().entropy))
    print(f"PYCM_FUZZ_SEED={seed}")
    rng = np.random.default_rng(seed)
    before = pycm.backend_info()["cpu"]["level"]
    done, rounds, names = 0, 0, list(MAKERS)
    try:
        while done < budget:
            name, metric = str(rng.choice(names)), str(rng.choice(METRICS))
            done += random_round(rng, name, metric, LEVELS, int(10 ** rng.uniform(3.5, 6)), both=True)
            rounds += 1
    finally:
        use_level(before)
        print(f"{done} pairs in {rounds} rounds, each by {len(SCREENS)} screens one-shot and encoded")
