"""The CUDA kernels of the torch operators.

Results and scratch come from the caching allocator and kernels are queued on the current stream of the inputs' device.
Nothing waits for them, and shapes alone decide what is launched, so a call can be captured into a CUDA graph.

What the CPU finds in the values of its arguments is therefore found on the device. An index outside the gallery, or
offsets that are not compressed rows, fail a device-side assertion, as in torch's own indexing: the error comes with the
next synchronisation. A positive whose score is NaN keeps that score, and its counts are 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pycm import _C
from pycm._torch_arguments import _check_devices, _check_tangents, _plain, _score_dtype

# The host executor of tests/simt takes the place of these three.
_kernels: Any = _C
_on: Any = torch.cuda.device


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def _allows_tf32() -> bool:
    """Whether the caller let torch's own products of float32 have TF32's 11 bits; 24 are the default."""
    matmul = torch.backends.cuda.matmul
    # Asked for the old name, newer versions of torch raise where the new one was set.
    return bool(matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32)


def _workspace(like: Tensor, size: int) -> Tensor:
    return like.new_empty(size, dtype=torch.uint8)


def similarity(x: Tensor, y: Tensor, metric: str) -> Tensor:
    _check_devices("similarity", x=x, y=y)
    _check_tangents("similarity", x=x, y=y)
    arguments = (_plain(x), _plain(y), metric)
    with _on(x.device):
        workspace = _workspace(x, _kernels.cuda_similarity_workspace_bytes(*arguments))
        batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])  # type: ignore[no-untyped-call]
        out = x.new_empty((*batch, x.shape[-2], y.shape[-2]), dtype=_score_dtype(x.dtype))
        if out.numel():
            _kernels.cuda_similarity(*arguments, out, workspace, _stream(), _allows_tf32())
    return out


def topk(
    queries: Tensor,
    gallery: Tensor,
    k: int,
    metric: str,
    mask: Tensor | None,
    exclude: Tensor | None,
    exclude_offsets: Tensor | None,
    precision: str,
    screen: str = "auto",
    encoded: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`encoded`: what `encode` made of these gallery rows and this metric."""
    filters = {"mask": mask, "exclude": exclude, "exclude_offsets": exclude_offsets}
    _check_devices("topk", queries=queries, gallery=gallery, encoded=encoded, **filters)
    _check_tangents("topk", queries=queries, gallery=gallery)
    exclude, exclude_offsets = _contiguous(exclude), _contiguous(exclude_offsets)
    rows = _plain(queries), _plain(gallery)
    arguments = (*rows, k, metric, precision, mask, exclude, exclude_offsets, screen, encoded)
    with _on(queries.device):
        workspace = _workspace(queries, _kernels.cuda_topk_workspace_bytes(*arguments))
        _assert_compressed("topk: exclude", exclude, exclude_offsets, -1, gallery.shape[0])
        scores = queries.new_empty((queries.shape[0], k), dtype=_score_dtype(queries.dtype))
        indices = queries.new_empty((queries.shape[0], k), dtype=torch.int64)
        if queries.shape[0]:
            _kernels.cuda_topk(*arguments, scores, indices, workspace, _stream())
    return scores, indices


def rank(
    queries: Tensor,
    gallery: Tensor,
    positives: Tensor,
    offsets: Tensor,
    metric: str,
    mask: Tensor | None,
    exclude: Tensor | None,
    exclude_offsets: Tensor | None,
    screen: str = "auto",
    encoded: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`encoded`: as in `topk`."""
    filters = {"mask": mask, "exclude": exclude, "exclude_offsets": exclude_offsets}
    _check_devices("rank", queries=queries, gallery=gallery, positives=positives, offsets=offsets, **filters)
    _check_devices("rank", queries=queries, encoded=encoded)
    _check_tangents("rank", queries=queries, gallery=gallery)
    positives, offsets = positives.contiguous(), offsets.contiguous()
    exclude, exclude_offsets = _contiguous(exclude), _contiguous(exclude_offsets)
    rows = _plain(queries), _plain(gallery), positives, offsets
    arguments = (*rows, metric, mask, exclude, exclude_offsets, screen, encoded)
    with _on(queries.device):
        workspace = _workspace(queries, _kernels.cuda_rank_workspace_bytes(*arguments))
        _assert_compressed("rank: positives", positives, offsets, 0, gallery.shape[0])
        _assert_compressed("rank: exclude", exclude, exclude_offsets, -1, gallery.shape[0])
        greater, equal = (torch.empty_like(positives) for _ in range(2))
        scores = queries.new_empty(positives.shape, dtype=_score_dtype(queries.dtype))
        if positives.shape[0]:
            _kernels.cuda_rank(*arguments, greater, equal, scores, workspace, _stream())
    return greater, equal, scores


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _assert_compressed(what: str, indices: Tensor | None, offsets: Tensor | None, lowest: int, rows: int) -> None:
    """Rising offsets from 0 to the number of indices, all in [lowest, rows); the device checks, and nobody waits."""
    if indices is None or offsets is None:
        return
    inside = ((indices >= lowest) & (indices < rows)).all()
    rising = (offsets[1:] >= offsets[:-1]).all() & (offsets[0] == 0) & (offsets[-1] == indices.shape[0])
    torch._assert_async(inside & rising, f"{what} must be compressed rows of indices in [0, {rows})")


def encode(gallery: Tensor, metric: str) -> Tensor:
    """Codes and bounds of gallery rows [M, D], which `topk` and `rank` otherwise compute in every call; uint8."""
    _check_devices("encode", gallery=gallery)
    with _on(gallery.device):
        encoded = _workspace(gallery, _kernels.cuda_encoded_bytes(*gallery.shape))
        _kernels.cuda_encode(_plain(gallery), metric, encoded, _stream())
    return encoded


def workspace_bytes(queries: int, gallery: int, dim: int, k: int, device: torch.device, encoded: bool = False) -> int:
    """Bytes of scratch that `topk` takes on the device for dense rows of these sizes, whatever metric and dtype.

    `encoded`: for a gallery that was encoded before the call.
    """
    with _on(device):
        return int(_kernels.cuda_topk_bytes_of_sizes(queries, gallery, dim, k, encoded))


def wait_for(tensor: Tensor) -> None:
    """Until all that was queued on the current stream of the tensor's device is done."""
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()
