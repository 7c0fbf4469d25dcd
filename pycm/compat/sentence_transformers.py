"""sentence-transformers' `util`: semantic search, paraphrase mining, communities and score matrices.

Signatures and results are those of sentence-transformers 6. What pycm has no kernel for is handed to the original:
other score functions, sparse tensors, GPUs, integers, mixed dtypes, autocast, and whatever the original raises an error
for. Differences in the last bits, in ties and for NaN are listed in docs/compat.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

import pycm
from pycm._optional import require
from pycm.compat.torch import takes
from pycm.mining import all_pairs_topk, threshold_join

if TYPE_CHECKING:
    from torch import Tensor

    Embeddings: TypeAlias = list[Any] | npt.NDArray[Any] | Tensor
    ScoreFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]

__all__ = [
    "community_detection",
    "cos_sim",
    "dot_score",
    "euclidean_sim",
    "paraphrase_mining",
    "paraphrase_mining_embeddings",
    "semantic_search",
]

# The originals, bound now: `pycm.compat.patch` changes the module's attributes.
_util = require("sentence_transformers.util", "encoders", "pycm.compat.sentence_transformers")
_cos_sim, _dot_score, _euclidean_sim = _util.cos_sim, _util.dot_score, _util.euclidean_sim
_semantic_search, _community_detection = _util.semantic_search, _util.community_detection
_paraphrase_mining, _paraphrase_mining_embeddings = _util.paraphrase_mining, _util.paraphrase_mining_embeddings
_to_tensor = _util._convert_to_tensor  # lists, arrays and tensors, with the original's errors


def cos_sim(a: Embeddings, b: Embeddings) -> Tensor:
    """Cosine similarity of every row of a ``[N, D]`` with every row of b ``[M, D]``: ``[N, M]``. Differentiable."""
    rows = _rows(a, b)
    return _cos_sim(a, b) if rows is None else pycm.similarity(*rows, "cosine")


def dot_score(a: Embeddings, b: Embeddings) -> Tensor:
    """Dot product of every row of a ``[N, D]`` with every row of b ``[M, D]``: ``[N, M]``. Differentiable."""
    rows = _rows(a, b)
    return _dot_score(a, b) if rows is None else pycm.similarity(*rows, "dot")


def euclidean_sim(a: Embeddings, b: Embeddings) -> Tensor:
    """Negative distance of every row of a ``[N, D]`` to every row of b ``[M, D]``: ``[N, M]``. Differentiable."""
    rows = _rows(a, b)
    return _euclidean_sim(a, b) if rows is None else -pycm.similarity(*rows, "euclidean")


# The score functions that are metrics of pycm, and the sign that makes larger better.
_METRICS: dict[Any, tuple[pycm.Metric, int]] = {
    cos_sim: ("cosine", 1),
    _cos_sim: ("cosine", 1),
    _util.pytorch_cos_sim: ("cosine", 1),
    dot_score: ("dot", 1),
    _dot_score: ("dot", 1),
    euclidean_sim: ("euclidean", -1),
    _euclidean_sim: ("euclidean", -1),
}


def semantic_search(
    query_embeddings: Embeddings,
    corpus_embeddings: Embeddings,
    query_chunk_size: int = 100,
    corpus_chunk_size: int = 500000,
    top_k: int = 10,
    score_function: ScoreFunction = cos_sim,
) -> list[list[dict[str, int | float]]]:
    """The best ``top_k`` rows of the corpus for each query, by `pycm.topk`.

    Args:
        query_embeddings: ``[N, D]`` or ``[D]``.
        corpus_embeddings: ``[M, D]``.
        query_chunk_size, corpus_chunk_size: not needed, since no score matrix is made.
        top_k: at most M are returned.
        score_function: `cos_sim`, `dot_score` or `euclidean_sim`, of this module or of sentence-transformers; any
            other runs on the original.

    Returns:
        For each query a list of ``{"corpus_id": int, "score": float}``, best first, equal scores lowest id first. A row
        whose score is NaN is no match, and makes a list shorter when fewer than ``top_k`` others are left.
    """
    metric, sign = _metric(score_function)
    rows = _rows(query_embeddings, corpus_embeddings)
    if metric is None or rows is None or not _positive(top_k, query_chunk_size, corpus_chunk_size):
        return _semantic_search(  # type: ignore[no-any-return]
            query_embeddings, corpus_embeddings, query_chunk_size, corpus_chunk_size, top_k, score_function
        )
    queries, corpus = rows
    scores, indices = pycm.topk(queries.detach(), corpus.detach(), min(top_k, len(corpus)), metric)
    results = [
        [{"corpus_id": index, "score": score} for index, score in zip(*row, strict=True)]
        for row in zip(indices.tolist(), (scores if sign > 0 else -scores).tolist(), strict=True)
    ]
    if bool((indices[:, -1] < 0).any()):  # NaN scores, which come last
        results = [[match for match in row if match["corpus_id"] >= 0] for row in results]
    return results


def paraphrase_mining(
    model: Any,
    sentences: list[str],
    show_progress_bar: bool = False,
    batch_size: int = 32,
    query_chunk_size: int = 5000,
    corpus_chunk_size: int = 100000,
    max_pairs: int = 500000,
    top_k: int = 100,
    score_function: ScoreFunction = cos_sim,
    truncate_dim: int | None = None,
    prompt_name: str | None = None,
    prompt: str | None = None,
) -> list[list[float | int]]:
    """`paraphrase_mining_embeddings` of what ``model.encode`` makes of the sentences."""
    embeddings = model.encode(
        sentences,
        show_progress_bar=show_progress_bar,
        batch_size=batch_size,
        convert_to_tensor=True,
        truncate_dim=truncate_dim,
        prompt_name=prompt_name,
        prompt=prompt,
    )
    return paraphrase_mining_embeddings(
        embeddings, query_chunk_size, corpus_chunk_size, max_pairs, top_k, score_function
    )


def paraphrase_mining_embeddings(
    embeddings: Embeddings,
    query_chunk_size: int = 5000,
    corpus_chunk_size: int = 100000,
    max_pairs: int = 500000,
    top_k: int = 100,
    score_function: ScoreFunction = cos_sim,
) -> list[list[float | int]]:
    """The best pairs of a row and one of its best ``top_k`` others, best first, by `pycm.mining.all_pairs_topk`.

    Args:
        embeddings: ``[N, D]``.
        query_chunk_size, corpus_chunk_size: not needed, since no score matrix is made.
        max_pairs: how many pairs are returned at most.
        top_k: other rows considered for each row.
        score_function: `cos_sim`, `dot_score` or `euclidean_sim`; any other runs on the original.

    Returns:
        Triplets ``[score, i, j]``, i < j, each pair once, equal scores in the order of i and j.
    """
    metric, sign = _metric(score_function)
    rows = _rows(embeddings, embeddings)
    plain = _is_integer(max_pairs) and _positive(top_k, query_chunk_size, corpus_chunk_size)
    if metric is None or rows is None or len(rows[0]) < 2 or not plain:
        return _paraphrase_mining_embeddings(  # type: ignore[no-any-return]
            embeddings, query_chunk_size, corpus_chunk_size, max_pairs, top_k, score_function
        )
    if max_pairs < 1:
        return []
    best = all_pairs_topk(rows[0].detach(), max_pairs, metric, per_row=top_k, progress=False)
    columns = ((best.scores * sign).tolist(), best.query_rows.tolist(), best.indices.tolist())
    return list(map(list, zip(*columns, strict=True)))


def community_detection(
    embeddings: Embeddings,
    threshold: float = 0.75,
    min_community_size: int = 10,
    batch_size: int = 1024,
    show_progress_bar: bool = False,
) -> list[list[int]]:
    """Groups of rows around a row whose cosine similarity to each of them reaches the threshold.

    Args:
        embeddings: ``[N, D]``.
        threshold: smallest similarity to the central row; rounded to float32, as by the original.
        min_community_size: smaller groups are left out.
        batch_size: not needed, since no score matrix is made.
        show_progress_bar: show one, of pycm's own.

    Returns:
        Lists of row numbers, largest first: the central row, then the others by falling similarity. No row is in two:
        larger groups take their rows first.
    """
    rows = _rows(embeddings, embeddings) if len(embeddings) else None
    plain = isinstance(threshold, (int, float, np.number)) and _positive(min_community_size, batch_size)
    if rows is None or not plain:
        return _community_detection(  # type: ignore[no-any-return]
            embeddings, threshold, min_community_size, batch_size, show_progress_bar
        )
    gallery = rows[0].detach()
    if len(gallery) < min_community_size:
        return []
    found = _communities(gallery, float(np.float32(threshold)), min_community_size, bool(show_progress_bar))
    used = np.zeros(len(gallery), dtype=bool)
    result = []
    for centre, members in sorted(found, key=lambda pair: len(pair[1]), reverse=True):
        free = members[~used[members]]
        if not used[centre] and len(free) >= min_community_size:
            community = [centre, *free[free != centre].tolist()]
            used[community] = True
            result.append(community)
    return sorted(result, key=len, reverse=True)


def _communities(
    gallery: Tensor, threshold: float, smallest: int, progress: bool
) -> Iterator[tuple[int, npt.NDArray[np.uint32]]]:
    """(row, rows near it by falling similarity) of each row with enough of them."""
    for block in threshold_join(gallery, gallery, threshold, "cosine", progress=progress):
        queries, indices, scores = (np.asarray(part) for part in block)
        members = indices[np.lexsort((indices, -scores, queries))].astype(np.uint32)
        for row, start, size in zip(*np.unique(queries, return_index=True, return_counts=True), strict=True):
            if size >= smallest:
                yield int(row), members[start : start + size].copy()


# (original, replacement): what `pycm.compat.patch` swaps.
REPLACEMENTS = (
    (_semantic_search, semantic_search),
    (_cos_sim, cos_sim),
    (_dot_score, dot_score),
    (_euclidean_sim, euclidean_sim),
    (_paraphrase_mining, paraphrase_mining),
    (_paraphrase_mining_embeddings, paraphrase_mining_embeddings),
    (_community_detection, community_detection),
)


def _metric(score_function: Any) -> tuple[pycm.Metric | None, int]:
    try:
        return _METRICS.get(score_function, (None, 1))
    except TypeError:  # a callable that cannot be hashed
        return None, 1


def _rows(a: Embeddings, b: Embeddings) -> tuple[Tensor, Tensor] | None:
    """Both as matrices, or None where the original has to be asked."""
    x = _to_tensor(a)
    y = x if b is a else _to_tensor(b)
    x, y = (t.unsqueeze(0) if t.ndim == 1 else t for t in (x, y))
    return (x, y) if x.ndim == 2 and y.ndim == 2 and takes(x, y) else None


def _positive(*values: Any) -> bool:
    return all(_is_integer(value) and value >= 1 for value in values)


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
