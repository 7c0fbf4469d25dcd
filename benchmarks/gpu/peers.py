"""What pycm is measured against: torch, eager and compiled, a Triton kernel, FAISS-GPU and cuVS where installed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Bytes of scores that torch holds at a time.
CHUNK_BYTES = 4 << 30


def chunks(queries: Tensor, gallery: Tensor, item: int) -> Iterator[Tensor]:
    return iter(queries.split(max(1, CHUNK_BYTES // (gallery.shape[0] * item))))


def product_alone(queries: Tensor, gallery: Tensor) -> Any:
    """The product by itself, in the inputs' dtype, into memory that is kept: what a fused kernel is held against."""
    parts = list(chunks(queries, gallery, queries.element_size()))
    out = torch.empty((parts[0].shape[0], gallery.shape[0]), dtype=queries.dtype, device=queries.device)

    def call() -> None:
        for part in parts:
            torch.mm(part, gallery.T, out=out[: part.shape[0]])

    return call


def torch_topk(queries: Tensor, gallery: Tensor, k: int, compiled: bool = False) -> Any:
    """Rows are normalised already, so the product is the cosine."""

    def one(part: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.topk(part @ rows.T, k, dim=1)
        return found.values, found.indices

    function = torch.compile(one) if compiled else one
    parts = list(chunks(queries, gallery, 2 * queries.element_size()))

    def call() -> tuple[Tensor, ...]:
        found = [function(part, gallery) for part in parts]
        return tuple(torch.cat(part) for part in zip(*found, strict=True))

    return call


def triton_topk(queries: Tensor, gallery: Tensor, k: int) -> Any:
    import fused_topk

    if k > fused_topk.LARGEST_K or queries.shape[1] % 64 or queries.element_size() != 2:
        raise NotImplementedError(f"k <= {fused_topk.LARGEST_K}, half precision, D a multiple of 64")
    return lambda: fused_topk.topk(queries, gallery, k)


def faiss_topk(queries: Tensor, gallery: Tensor, k: int) -> Any:
    import faiss
    import faiss.contrib.torch_utils

    if not hasattr(faiss, "StandardGpuResources"):
        raise NotImplementedError("the installed FAISS has no GPU")
    index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), gallery.shape[1])
    index.add(gallery)
    return lambda: index.search(queries, k)


def cuvs_topk(queries: Tensor, gallery: Tensor, k: int) -> Any:
    from cuvs.neighbors import brute_force

    index = brute_force.build(gallery, metric="inner_product")
    return lambda: brute_force.search(index, queries, k)


def torch_maxsim(queries: Tensor, gallery: Tensor) -> Any:
    """[N, Tq, D] against [M, Tg, D], chunks of the gallery at a time."""
    step = max(1, CHUNK_BYTES // (4 * queries.shape[0] * queries.shape[1] * gallery.shape[1]))

    def call() -> Tensor:
        parts = [torch.einsum("ntd,msd->nmts", queries, part).amax(-1).sum(-1) for part in gallery.split(step)]
        return torch.cat(parts, 1)

    return call


def torch_regions(regions: Tensor, words: Tensor) -> Any:
    """Mean over the words of the best region's cosine, for pairs of the batch."""

    def call() -> Tensor:
        a, b = (torch.nn.functional.normalize(part, dim=-1) for part in (regions, words))
        return torch.bmm(a, b.mT).amax(1).mean(1)

    return call
