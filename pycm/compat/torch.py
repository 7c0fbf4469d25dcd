"""torch's `cdist`, and `topk` of a matrix product, with pycm's kernels.

What pycm has no kernel for runs on torch itself: other devices and dtypes, other norms, sparse tensors, autocast,
forward-mode derivatives, and whatever torch would raise an error for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

import pycm

__all__ = ["cdist", "matmul_topk"]

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_COMPUTE_MODES = (
    "use_mm_for_euclid_dist_if_necessary",
    "use_mm_for_euclid_dist",
    "donot_use_mm_for_euclid_dist",
)


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str = "use_mm_for_euclid_dist_if_necessary") -> Tensor:
    """`torch.cdist`: distances ``[..., P, R]`` of the rows of x1 ``[..., P, M]`` and x2 ``[..., R, M]``.

    For p = 2, float32 and float64 on the CPU, computed by `pycm.similarity`: distances that cancel are evaluated from
    differences in every ``compute_mode``, so close rows keep their distance and equal rows are exactly 0 apart.
    Differentiable. Anything else, and every error, is torch's.
    """
    if (
        p == 2
        and compute_mode in _COMPUTE_MODES
        and takes(x1, x2)
        and x1.dtype in (torch.float32, torch.float64)
        # equal batch axes, or none on one side
        and len({x1.shape[:-2], x2.shape[:-2], torch.Size()}) <= 2
    ):
        return pycm.similarity(x1, x2, "euclidean")
    return torch.cdist(x1, x2, p, compute_mode)


def matmul_topk(
    input: Tensor, other: Tensor, k: int, dim: int | None = None, largest: bool = True, sorted: bool = True
) -> Any:
    """``torch.topk(input @ other, k, dim, largest, sorted)`` without the product.

    Args:
        input: ``[N, D]``.
        other: ``[D, M]``; a transposed gallery is read where it lies: ``matmul_topk(queries, gallery.T, k)``.
        k, dim, largest, sorted: as of `torch.topk`; always sorted.

    Returns:
        ``torch.return_types.topk(values, indices)``, of `input`'s dtype and int64. Values are exact, rounded once;
        equal ones come lowest index first. A NaN product is never among the k (torch puts it first): where fewer
        than k others are left, the index is -1 and the value the worst infinity.

    O((N + M)·D + N·k) memory. Differentiable in the values. Batched products, other devices and dtypes, and every error
    are torch's.
    """
    rows = other.T if isinstance(other, Tensor) and other.ndim == 2 else other
    if takes(input, rows) and input.ndim == 2 and rows.ndim == 2 and dim in (None, 0, 1, -1, -2):
        queries, gallery = (rows, input) if dim in (0, -2) else (input, rows)
        if isinstance(k, int) and 1 <= k <= len(gallery):
            values, indices = pycm.topk(queries if largest else -queries, gallery, k, "dot")
            values = (values if largest else -values).to(input.dtype)
            if dim in (0, -2):
                values, indices = values.T, indices.T
            return torch.return_types.topk((values, indices))
    return torch.topk(torch.matmul(input, other), k, -1 if dim is None else dim, largest, sorted)


def takes(*tensors: Any) -> bool:
    """Whether pycm's kernels take these matrices of rows, and would give what the original gives."""
    first = tensors[0]
    return (
        all(
            isinstance(x, Tensor)
            and x.layout is torch.strided
            and x.is_cpu
            and x.dtype in _FLOATS
            and x.ndim >= 2
            and x.numel() > 0
            and x.dtype == first.dtype
            and x.shape[-1] == first.shape[-1]
            for x in tensors
        )
        and not torch.is_autocast_enabled("cpu")
        and (torch.compiler.is_compiling() or not any(_has_tangent(x) for x in tensors))
    )


def _has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]
