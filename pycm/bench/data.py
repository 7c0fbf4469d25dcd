"""The arrays of a case, and what a peer may prepare ahead of the timing: rows of norm 1, squared norms."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import numpy.typing as npt

from . import features
from .cases import REAL_DIM, Case, Kind
from .sequences import Frames, SequenceCase

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

_CHUNK = 4096  # rows changed at a time: a gallery of 1.6 GB is made without a second one beside it
_MEAN_COSINE = 0.7
_OUTLIERS = 1 / 64  # of the dimensions, and how much longer they are
_OUTLIER_SCALE = 8.0
_NOISE = 0.3  # of repeated real features, relative to their norm
_DUPLICATES = 20  # one query of so many has a near-duplicate, this far from it
_DUPLICATE_NOISE = 0.3


class Data:
    """queries [N, D] and gallery [M, D] of a case; for rank also positives [N, P], rows of the gallery. Temporal
    pooling has frames instead.

    For maxsim the rows are the vectors of one item after another.

    Raises:
        UnavailableError: the case needs real features that are not to be had here.
    """

    def __init__(self, case: Case, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.case = case
        if isinstance(case, SequenceCase):
            self.frames = Frames(case)
            return
        self.queries, self.gallery = rows_of(case, rng)
        if case.op == "pairs":
            self.queries = self.gallery
        self.positives: Int64 = np.empty((case.queries, 0), np.int64)
        if case.op == "rank":
            self._place_positives(rng)
        elif case.data == "near-duplicates":
            self._place_duplicates(rng)

    def _place_positives(self, rng: np.random.Generator) -> None:
        """Distinct gallery rows, moved towards their query as far as the case's model would."""
        shape = (self.case.queries, self.case.positives)
        self.positives = rng.permutation(self.case.gallery)[: shape[0] * shape[1]].reshape(shape)
        for column in self.positives.T:
            share = rng.uniform(*self.case.signal, (self.case.queries, 1)).astype(np.float32)
            self.gallery[column] = unit(self.gallery[column] + share * self.queries)

    def _place_duplicates(self, rng: np.random.Generator) -> None:
        chosen = self.queries[::_DUPLICATES]
        noise = unit(rng.standard_normal(chosen.shape, dtype=np.float32))
        rows = rng.permutation(self.case.gallery)[: len(chosen)]
        self.gallery[rows] = unit(chosen + np.float32(_DUPLICATE_NOISE) * noise)

    @property
    def sets(self) -> tuple[Float32, Float32]:
        """[N, query_vectors, D] and [M, item_vectors, D]."""
        case = self.case
        return (
            self.queries.reshape(case.queries, case.query_vectors, case.dim),
            self.gallery.reshape(case.gallery, case.item_vectors, case.dim),
        )

    @cached_property
    def query_squares(self) -> Float32:
        return squares(self.queries)

    @cached_property
    def gallery_squares(self) -> Float32:
        return squares(self.gallery)

    @cached_property
    def as_dot(self) -> tuple[Float32, Float32]:
        """Queries and gallery whose plain product is the metric; for a distance, the rows as they are."""
        if self.case.metric == "pearson":
            x, y = (rows - rows.mean(1, keepdims=True) for rows in (self.queries, self.gallery))
            return unit(x), unit(y)
        if self.case.metric == "cosine" and not self.case.unit_rows:
            return unit(self.queries.copy()), unit(self.gallery.copy())
        return self.queries, self.gallery


def squares(rows: Float32) -> Float32:
    result: Float32 = np.einsum("nd,nd->n", rows, rows)
    return result


def chunks(rows: Float32) -> Iterator[Float32]:
    """Views of a few thousand rows each."""
    return (rows[begin : begin + _CHUNK] for begin in range(0, len(rows), _CHUNK))


def unit(rows: Float32) -> Float32:
    """`rows`, scaled in place to norm 1."""
    for chunk in chunks(rows):
        chunk /= np.linalg.norm(chunk, axis=1, keepdims=True)
    return rows


def gaussian(rng: np.random.Generator, count: int, dim: int) -> Float32:
    rows = np.empty((count, dim), np.float32)
    rng.standard_normal(out=rows, dtype=np.float32)
    return rows


def rows_of(case: Case, rng: np.random.Generator) -> tuple[Float32, Float32]:
    """Queries and gallery, drawn from one distribution."""
    if case.data in REAL_DIM:
        known = unit(features.emoji(case.data))
        queries, gallery = (_repeated(known, count, rng) for count in (case.query_rows, case.gallery_rows))
    else:
        queries, gallery = (gaussian(rng, count, case.dim) for count in (case.query_rows, case.gallery_rows))
        _shape(case.data, (queries, gallery), rng)
    return (unit(queries), unit(gallery)) if case.unit_rows else (queries, gallery)


def _shape(kind: Kind, arrays: tuple[Float32, Float32], rng: np.random.Generator) -> None:
    """Turn Gaussian rows into those of `kind`, in place."""
    dim = arrays[0].shape[1]
    if kind == "common-mean":
        spectrum = np.arange(1, dim + 1, dtype=np.float32) ** np.float32(-0.5)
        mean = unit(gaussian(rng, 1, dim)) * np.sqrt(np.sum(spectrum**2) * _MEAN_COSINE / (1 - _MEAN_COSINE))
        for chunk in (chunk for rows in arrays for chunk in chunks(rows)):
            chunk *= spectrum
            chunk += mean
    elif kind == "heavy-tailed":
        scale = np.ones(dim, np.float32)
        scale[rng.permutation(dim)[: max(1, round(dim * _OUTLIERS))]] = _OUTLIER_SCALE
        for chunk in (chunk for rows in arrays for chunk in chunks(rows)):
            chunk *= np.abs(chunk)  # kurtosis 11.7, where a Gaussian has 3
            chunk *= scale


def _repeated(known: Float32, count: int, rng: np.random.Generator) -> Float32:
    """`count` rows: those of `known` (norm 1) over and over in random order, each with noise of its own."""
    dim = known.shape[1]
    rows = gaussian(rng, count, dim)
    source = rng.integers(len(known), size=count)
    for begin in range(0, count, _CHUNK):
        chunk = rows[begin : begin + _CHUNK]
        chunk *= np.float32(_NOISE / np.sqrt(dim))
        chunk += known[source[begin : begin + _CHUNK]]
    return rows
