"""What is measured. A case is one problem; every provider that supports it solves the same arrays."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Op = Literal["similarity", "topk", "latency"]
OPS: tuple[Op, ...] = ("similarity", "topk", "latency")

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    """queries [rows, dim] against gallery [columns, dim], fp32."""

    op: Op
    rows: int
    columns: int
    dim: int
    metric: str
    k: int = 0

    @property
    def name(self) -> str:
        k = f" k={self.k}" if self.k else ""
        return f"{self.rows}×{self.columns}×{self.dim}{k} {self.metric}"

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.columns * self.dim

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}


class Data:
    """The arrays of a case, and what a peer may prepare ahead: rows of norm 1, squared norms."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.queries: Float32 = rng.standard_normal((case.rows, case.dim), dtype=np.float32)
        self.gallery: Float32 = rng.standard_normal((case.columns, case.dim), dtype=np.float32)
        if case.op == "topk":
            # As embeddings are; and a peer that knows distances alone then finds the same matches.
            self.queries, self.gallery = unit(self.queries), unit(self.gallery)

    @cached_property
    def unit_queries(self) -> Float32:
        return unit(self.queries)

    @cached_property
    def unit_gallery(self) -> Float32:
        return unit(self.gallery)

    @cached_property
    def standard_queries(self) -> Float32:
        return unit(self.queries - self.queries.mean(1, keepdims=True))

    @cached_property
    def standard_gallery(self) -> Float32:
        return unit(self.gallery - self.gallery.mean(1, keepdims=True))

    @cached_property
    def query_squares(self) -> Float32:
        return squares(self.queries)

    @cached_property
    def gallery_squares(self) -> Float32:
        return squares(self.gallery)

    def as_dot(self, metric: str) -> tuple[Float32, Float32]:
        """Arrays whose plain product is the metric."""
        if metric == "cosine":
            return self.unit_queries, self.unit_gallery
        if metric == "pearson":
            return self.standard_queries, self.standard_gallery
        return self.queries, self.gallery


def squares(rows: Float32) -> Float32:
    result: Float32 = np.einsum("nd,nd->n", rows, rows)
    return result


def unit(rows: Float32) -> Float32:
    scaled: Float32 = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return scaled


def all_cases(tiny: bool = False) -> list[Case]:
    if tiny:
        return _tiny()
    metrics = ("dot", "cosine", "pearson", "euclidean")
    cases = [Case("similarity", n, m, 512, metric) for n, m in ((4096, 4096), (1000, 20000)) for metric in metrics]
    cases += [Case("topk", 1000, 100_000, dim, "dot", 10) for dim in (64, 128, 512, 1024)]
    cases += [Case("topk", 1000, 100_000, 512, "dot", 100)]
    cases += [Case("topk", 1000, 100_000, 512, metric, 10) for metric in ("cosine", "euclidean")]
    cases += [Case("topk", n, 100_000, 512, "dot", 10) for n in (1, 4, 16, 64, 256, 10_000)]
    cases += [Case("latency", 8, 8, 16, "dot"), Case("latency", 8, 8, 16, "dot", 3)]
    return cases


def _tiny() -> list[Case]:
    """Seconds in all: the runner is tested, nothing is measured."""
    cases = [Case("similarity", 40, 70, 24, metric) for metric in ("dot", "cosine", "pearson", "euclidean")]
    cases += [Case("topk", n, 300, 24, metric, 5) for n in (1, 20) for metric in ("dot", "cosine", "euclidean")]
    cases += [Case("latency", 8, 8, 16, "dot"), Case("latency", 8, 8, 16, "dot", 3)]
    return cases
