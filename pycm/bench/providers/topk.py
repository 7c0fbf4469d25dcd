"""Exact top-k: (scores or distances [N, k], indices [N, k]), best first."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..cases import Case
from ..data import Data
from ..features import UnavailableError
from .base import Call, Prepare, Provider, chunk_buffer, chunks, encoded, only, use

# Its exact search compares pair by pair: one query x 100,000 x 512 took 73 ms on one core.
_MOST_USEARCH = 2.1e11


def pycm_topk(case: Case, data: Data) -> Call:
    """one call of pycm.topk on raw rows"""
    import pycm

    return lambda: pycm.topk(data.queries, data.gallery, case.k, case.metric)


def pycm_gallery(case: Case, data: Data) -> Call:
    """pycm, the gallery encoded ahead"""
    gallery = encoded(case, data)
    return lambda: gallery.topk(data.queries, case.k, None, None, None)


def pycm_screen(screen: str) -> Prepare:
    def prepare(case: Case, data: Data) -> Call:
        gallery = encoded(case, data, screen)
        return lambda: gallery.topk(data.queries, case.k, None, None, None)

    prepare.__doc__ = f"pycm, the gallery encoded ahead, screened in {screen}"
    return prepare


def _faiss_metric(faiss: Any, case: Case) -> int:
    only(case, "dot", "cosine", "euclidean")
    return int(faiss.METRIC_L2 if case.metric == "euclidean" else faiss.METRIC_INNER_PRODUCT)


def faiss_knn(case: Case, data: Data) -> Call:
    """faiss.knn, without an index"""
    faiss = use("faiss")
    metric = _faiss_metric(faiss, case)
    x, y = data.as_dot
    return lambda: faiss.knn(x, y, case.k, metric=metric)


def faiss_index(case: Case, data: Data) -> Call:
    """faiss.IndexFlatIP or IndexFlatL2, built ahead, into buffers kept from call to call"""
    faiss = use("faiss")
    index = faiss.IndexFlat(case.dim, _faiss_metric(faiss, case))
    x, y = data.as_dot
    index.add(y)
    scores, indices = np.empty((case.queries, case.k), np.float32), np.empty((case.queries, case.k), np.int64)
    return lambda: index.search(x, case.k, D=scores, I=indices)


def torch_topk(case: Case, data: Data) -> Call:
    """torch.mm and torch.topk, into buffers kept from call to call"""
    # torch.compile was measured and is no faster: it calls the same two kernels.
    torch = use("torch")
    only(case, "dot", "cosine", "euclidean")
    x, y = (torch.from_numpy(rows) for rows in data.as_dot)
    distance = case.metric == "euclidean"
    buffer = torch.from_numpy(chunk_buffer(case))
    scores, indices = torch.empty(case.queries, case.k), torch.empty(case.queries, case.k, dtype=torch.int64)
    # |q - g|^2 less |q|^2, which orders no pair otherwise: one pass fewer than torch.cdist.
    bias = torch.from_numpy(data.gallery_squares) if distance else None

    def run() -> Any:
        for rows in chunks(case):
            part = x[rows]
            out = buffer[: len(part)]
            if bias is None:
                torch.mm(part, y.T, out=out)
            else:
                torch.addmm(bias, part, y.T, alpha=-2, out=out)
            torch.topk(out, case.k, largest=not distance, out=(scores[rows], indices[rows]))
        return scores, indices

    return run


def numpy_topk(case: Case, data: Data) -> Call:
    """NumPy's product, argpartition and a sort of the k"""
    x, y = data.as_dot
    buffer, bias = chunk_buffer(case), _bias(case, data)

    def run() -> Any:
        found = []
        for rows in chunks(case):
            part = x[rows]
            found.append(_best(np.matmul(part, y.T, out=buffer[: len(part)]), bias, case.k))
        return tuple(np.concatenate(parts) for parts in zip(*found, strict=True))

    return run


def _bias(case: Case, data: Data) -> Any:
    """What makes a product order pairs as their distances do, the larger the nearer."""
    only(case, "dot", "cosine", "euclidean")
    return -data.gallery_squares / 2 if case.metric == "euclidean" else None


def _best(scores: Any, bias: Any, k: int) -> tuple[Any, Any]:
    if bias is not None:
        scores += bias
    columns = scores.shape[1]
    best = np.argpartition(scores, columns - k, axis=1)[:, columns - k :]
    values = np.take_along_axis(scores, best, axis=1)
    order = np.argsort(-values, axis=1)
    return np.take_along_axis(values, order, axis=1), np.take_along_axis(best, order, axis=1)


def sklearn_topk(case: Case, data: Data) -> Call:
    """scikit-learn's NearestNeighbors(algorithm="brute")"""
    # It ranks by distance, which orders rows of norm 1 as their products do.
    only(case, "dot", "cosine", "euclidean")
    neighbors = use("sklearn.neighbors")
    fitted = neighbors.NearestNeighbors(n_neighbors=case.k, algorithm="brute", metric="euclidean").fit(data.gallery)
    return lambda: fitted.kneighbors(data.queries)


def sentence_transformers_topk(case: Case, data: Data) -> Call:
    """sentence_transformers.util.semantic_search"""
    only(case, "dot", "cosine")
    util, torch = use("sentence_transformers.util"), use("torch")
    x, y = (torch.from_numpy(rows) for rows in data.as_dot)

    def run() -> Any:
        hits = util.semantic_search(x, y, top_k=case.k, score_function=util.dot_score)
        indices = np.array([[hit["corpus_id"] for hit in row] for row in hits])
        return np.array([[hit["score"] for hit in row] for row in hits], np.float32), indices

    return run


def usearch_topk(case: Case, data: Data) -> Call:
    """usearch.index.search(exact=True)"""
    only(case, "dot", "cosine", "euclidean")
    if case.operations > _MOST_USEARCH:
        raise UnavailableError("would take minutes")
    index, threads = use("usearch.index"), _threads()
    metric = "l2sq" if case.metric == "euclidean" else "ip"
    x, y = data.as_dot

    def run() -> Any:
        found = index.search(y, x, case.k, metric, exact=True, threads=threads)
        shape = (case.queries, case.k)
        return found.distances.reshape(shape), found.keys.reshape(shape).astype(np.int64)

    return run


def numkong_topk(case: Case, data: Data) -> Call:
    """numkong's product of fp32 rows packed ahead, NumPy's argpartition"""
    product = numkong_product(case, data)
    bias = _bias(case, data)
    parts = list(chunks(case))

    def run() -> Any:
        found = [_best(product(rows), bias, case.k) for rows in parts]
        return tuple(np.concatenate(columns) for columns in zip(*found, strict=True))

    return run


def numkong_product(case: Case, data: Data) -> Any:
    """Scores of a slice of the queries. One call of numkong uses one thread: the rows are divided among threads."""
    from concurrent.futures import ThreadPoolExecutor

    numkong, threads = use("numkong"), _threads()
    x, y = data.as_dot
    packed = numkong.dots_pack(y, dtype="float32")
    pool = ThreadPoolExecutor(threads)

    def product(rows: slice) -> Any:
        part = x[rows]
        pieces = np.array_split(part, min(threads, len(part)))
        return np.concatenate([np.asarray(s) for s in pool.map(lambda p: numkong.dots_packed(p, packed), pieces)])

    return product


def _threads() -> int:
    from pycm import _C

    return int(_C.build_info()["threads"])


PROVIDERS = (
    Provider("pycm", pycm_topk),
    Provider("pycm-gallery", pycm_gallery),
    *(Provider(f"pycm-{screen}", pycm_screen(screen), asked=True) for screen in ("float32", "bfloat16", "int8")),
    Provider("faiss-knn", faiss_knn, ("faiss-cpu",)),
    Provider("faiss-index", faiss_index, ("faiss-cpu",)),
    Provider("torch", torch_topk, ("torch",)),
    Provider("numpy", numpy_topk, ("threadpoolctl",)),
    Provider("scikit-learn", sklearn_topk, ("scikit-learn",)),
    Provider("sentence-transformers", sentence_transformers_topk, ("sentence-transformers", "torch")),
    Provider("usearch", usearch_topk, ("usearch",)),
    Provider("numkong", numkong_topk, ("numkong",)),
)
