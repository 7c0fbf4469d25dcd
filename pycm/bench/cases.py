"""What is measured. A case is one problem; every provider that knows its operation solves the same arrays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from ..functional import Metric

Op: TypeAlias = Literal["topk", "rank", "join", "pairs", "similarity", "maxsim", "temporal_pool", "loss", "call"]
Kind: TypeAlias = Literal["gaussian", "common-mean", "heavy-tailed", "near-duplicates", "real-texts", "real-images"]

OPS: dict[Op, str] = {
    "topk": "Exact top-k",
    "rank": "Ranks of known positives",
    "join": "Pairs above a threshold",
    "pairs": "The best pairs of one set",
    "similarity": "Score matrices",
    "maxsim": "Late interaction",
    "temporal_pool": "Temporal pooling",
    "loss": "Contrastive losses",
    "call": "One small call",
}
KINDS: dict[Kind, str] = {
    "gaussian": "normalised Gaussian rows",
    "common-mean": "normalised rows around a common mean (their mean cosine is 0.7), with a decaying spectrum",
    "heavy-tailed": "normalised rows with heavy-tailed entries and a few outlier dimensions",
    "near-duplicates": "normalised Gaussian rows, 1 of 20 queries with a near-duplicate in the gallery",
    "real-texts": "MiniLM features of the emoji set's names, repeated with noise",
    "real-images": "EfficientNet features of the emoji set's images, repeated with noise",
}
_SCORED: tuple[Metric, ...] = ("dot", "cosine", "pearson", "euclidean")
_SEARCHED: tuple[Metric, ...] = ("dot", "cosine", "euclidean")
# The width of the real features.
REAL_DIM: dict[Kind, int] = {"real-texts": 384, "real-images": 1280}


@dataclass(frozen=True)
class Case:
    """queries [queries, dim] against gallery [gallery, dim], fp32.

    `about` says in words what the case stands for. `k` belongs to topk and pairs, `positives` (per query) to rank,
    `threshold` to join, the vectors of each query and each item to maxsim; `signal` bounds the cosine of a query with
    its positives, beyond chance. For pairs the queries are the gallery.
    """

    name: str
    about: str
    op: Op
    queries: int
    gallery: int
    dim: int
    metric: Metric = "cosine"
    data: Kind = "gaussian"
    k: int = 0
    positives: int = 0
    threshold: float = 0.0
    signal: tuple[float, float] = (0.0, 0.3)
    query_vectors: int = 0
    item_vectors: int = 0

    @property
    def shape(self) -> str:
        """As people write it: 1000 × 100000 × 512, k=10, cosine."""
        if self.op == "maxsim":
            sizes = f"{self.queries}·{self.query_vectors} × {self.gallery}·{self.item_vectors} × {self.dim}"
            return f"{sizes}, {self.metric}"
        extra = {"k": self.k, "positives": self.positives, "threshold": self.threshold}
        parts = [f"{self.queries} × {self.gallery} × {self.dim}", *(f"{key}={v}" for key, v in extra.items() if v)]
        return ", ".join([*parts, self.metric])

    @property
    def query_rows(self) -> int:
        return self.queries * max(1, self.query_vectors)

    @property
    def gallery_rows(self) -> int:
        return self.gallery * max(1, self.item_vectors)

    @property
    def operations(self) -> float:
        """Multiplications and additions of every score computed once."""
        once = 2.0 * self.query_rows * self.gallery_rows * self.dim
        return once / 2 if self.op == "pairs" else once

    @property
    def unit_rows(self) -> bool:
        """Whether the rows have norm 1, as embeddings mostly do; a library of distances then finds the same matches."""
        return self.op not in ("similarity", "call")

    @property
    def entries(self) -> int:
        """What is read at least once."""
        return (self.query_rows + self.gallery_rows) * self.dim

    @property
    def precisions(self) -> tuple[str, ...]:
        """Those that a provider may compute in; score matrices are fp32-accurate."""
        return ("float32",) if self.op in ("similarity", "maxsim") else ("float32", "bfloat16", "int8")

    def describe(self) -> dict[str, Any]:
        return {**asdict(self), "shape": self.shape}


def all_cases(tiny: bool = False) -> list[Case]:
    """Every case, each taken from a real use; the `tiny` ones take seconds in all and measure nothing."""
    from .contrastive import loss_cases  # which build on this module
    from .sequences import sequence_cases

    return [*(_tiny() if tiny else _full()), *sequence_cases(tiny), *loss_cases(tiny)]


# Most cases are 1,000 queries against 100,000 rows of 512.


def _topk(name: str, about: str, dim: int = 512, *, queries: int = 1000, k: int = 10, **changes: Any) -> Case:
    return Case(name, about, "topk", queries, 100_000, dim, k=k, **changes)


def _rank(name: str, about: str, dim: int = 512, **changes: Any) -> Case:
    return Case(name, about, "rank", 1000, 100_000, dim, positives=1, **changes)


def _join(name: str, about: str, threshold: float, **changes: Any) -> Case:
    return Case(name, about, "join", 1000, 100_000, 512, threshold=threshold, **changes)


def _pairs(name: str, about: str, dim: int, data: Kind) -> Case:
    return Case(name, about, "pairs", 20_000, 20_000, dim, k=1000, data=data)


def _maxsim(name: str, about: str, queries: tuple[int, int], gallery: tuple[int, int], dim: int = 128) -> Case:
    return Case(
        name, about, "maxsim", queries[0], gallery[0], dim, "dot", query_vectors=queries[1], item_vectors=gallery[1]
    )


def _full() -> Iterator[Case]:
    texts, images = REAL_DIM["real-texts"], REAL_DIM["real-images"]
    yield _topk("topk-512", "a batch of queries in 100,000 embeddings of the width of CLIP or ResNet-18")
    yield _topk("topk-512-k100", "candidates for a re-ranker", k=100)
    yield _topk("topk-512-k1000", "pools of hard negatives, or the lists that trec_eval scores", k=1000)
    yield _topk("topk-64", "compressed or truncated (Matryoshka) embeddings", 64)
    yield _topk("topk-128", "token vectors of late interaction, SIFT descriptors", 128)
    yield _topk("topk-1024", "large sentence encoders, VSE++ image-text embeddings", 1024)
    yield _topk("topk-4096", "embeddings of large language models, fc7 features of a CNN", 4096)
    yield _topk("topk-1-query", "a person types a query and waits", queries=1)
    yield _topk("topk-4-queries", "a query and its paraphrases", queries=4)
    yield _topk("topk-16-queries", "a server that gathers a few requests", queries=16)
    yield _topk("topk-64-queries", "a server under load", queries=64)
    yield _topk("topk-256-queries", "a training step's batch in a memory bank", queries=256)
    yield _topk("topk-10000-queries", "a test set at once", queries=10_000)
    yield _topk("topk-dot", "maximum inner product of rows that are known to be normalised", metric="dot")
    yield _topk("topk-euclidean", "nearest neighbours of CNN features", metric="euclidean")
    yield _topk("topk-common-mean", "anisotropic embeddings: raw BERT, narrow cones", data="common-mean")
    yield _topk("topk-heavy-tailed", "language-model features with outlier dimensions", data="heavy-tailed")
    yield _topk("topk-real-texts", "search among sentences, real features", texts, data="real-texts")
    yield _topk("topk-real-images", "search among images, real features", images, data="real-images")
    yield _topk("topk-real-images-k100", "the same, candidates for a re-ranker", images, data="real-images", k=100)

    yield _rank("rank-512", "recall of 1,000 known pairs among 100,000, model trained", signal=(0.15, 0.45))
    yield _rank("rank-512-half", "the same of a half-trained model: ranks from 0 to 50,000")
    yield _rank("rank-common-mean", "the same of anisotropic embeddings", data="common-mean")
    yield _rank("rank-heavy-tailed", "the same of features with outlier dimensions", data="heavy-tailed")
    yield _rank("rank-real-texts", "the same of real features", texts, data="real-texts")
    yield Case("rank-captions", "COCO 5K: images against five captions each", "rank", 5000, 25_000, 1024, positives=5)
    yield Case("rank-videos", "MSR-VTT 1k-A: one caption a video", "rank", 1000, 1000, 512, positives=1)

    yield _join("join-duplicates", "which new items are there already", 0.9, data="near-duplicates")
    yield _join("join-mining", "every pair worth a look: tens of thousands pass", 0.15)

    yield _pairs("pairs-duplicates", "the most alike of 20,000 items", 512, "near-duplicates")
    yield _pairs("pairs-real-texts", "paraphrase mining, real features", texts, "real-texts")

    for metric in _SCORED:
        yield Case(f"similarity-4096-{metric}", "a contrastive batch", "similarity", 4096, 4096, 512, metric)
    for metric in _SCORED:
        yield Case(f"similarity-20000-{metric}", "a test set's whole matrix", "similarity", 1000, 20_000, 512, metric)

    yield _maxsim("maxsim-passages", "one query re-ranks 1,000 passages (ColBERT)", (1, 32), (1000, 180))
    yield _maxsim("maxsim-32-queries", "a batch of queries against 1,000 passages", (32, 32), (1000, 180))
    yield _maxsim("maxsim-pages", "a query against 100 page images of 1,030 patches (ColPali)", (1, 20), (100, 1030))
    yield _maxsim("maxsim-regions", "words against 36 regions of 500 images", (500, 12), (500, 36), 256)

    yield Case("call-similarity", "the cost of calling at all: scores", "call", 8, 8, 16, "dot")
    yield Case("call-topk", "the cost of calling at all: top-k", "call", 8, 8, 16, "dot", k=3)


def _tiny() -> Iterator[Case]:
    about = "nothing: it tests the command"
    for metric in _SEARCHED:
        yield Case(f"topk-{metric}", about, "topk", 20, 300, 24, metric, k=5)
    yield Case("topk-common-mean", about, "topk", 20, 300, 24, data="common-mean", k=5)
    yield Case("topk-heavy-tailed", about, "topk", 1, 300, 24, data="heavy-tailed", k=300)
    yield Case("rank-1", about, "rank", 20, 300, 24, positives=1)
    yield Case("rank-3", about, "rank", 20, 300, 24, positives=3)
    yield Case("join", about, "join", 40, 300, 24, data="near-duplicates", threshold=0.4)
    yield Case("pairs", about, "pairs", 60, 60, 24, data="near-duplicates", k=5)
    for metric in _SCORED:
        yield Case(f"similarity-{metric}", about, "similarity", 40, 70, 24, metric)
    yield _maxsim("maxsim", about, (4, 5), (20, 7), 24)
    yield Case("call-similarity", about, "call", 8, 8, 16, "dot")
    yield Case("call-topk", about, "call", 8, 8, 16, "dot", k=3)
