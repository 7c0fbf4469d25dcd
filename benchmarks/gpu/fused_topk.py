"""A peer for the comparison: top-k fused into the product in Triton, as far as a list in registers goes (k <= 64).

Each program holds a tile of queries, goes over its share of the gallery, and keeps the best k of each row as sorted
64-bit keys (score, then index); a tile whose scores reach no threshold is not sorted. The shares are merged by torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LARGEST_K = 64
_BLOCK_N = 128
_BLOCK_D = 64


@triton.jit
def _kernel(
    q,
    g,
    out,
    n,
    m,
    share,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    begin = tl.program_id(1) * share
    lowest = -(1 << 62)
    best = tl.full([BLOCK_M, K], lowest, tl.int64)
    for start in range(begin, tl.minimum(begin + share, m), BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in range(0, D, BLOCK_D):
            dims = first + tl.arange(0, BLOCK_D)
            a = tl.load(q + rows[:, None].to(tl.int64) * D + dims[None, :], mask=rows[:, None] < n, other=0.0)
            b = tl.load(g + columns[None, :].to(tl.int64) * D + dims[:, None], mask=columns[None, :] < m, other=0.0)
            scores = tl.dot(a, b, scores)
        bits = scores.to(tl.int32, bitcast=True)
        ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
        keys = ordered * 4294967296 + (4294967295 - columns[None, :].to(tl.int64))
        keys = tl.where(columns[None, :] < m, keys, lowest)
        if tl.max((tl.max(keys, 1) > tl.min(best, 1)).to(tl.int32), 0) > 0:
            new = tl.topk(keys, K)
            best = tl.topk(tl.reshape(tl.join(best, new), [BLOCK_M, 2 * K]), K)
    place = tl.program_id(1).to(tl.int64) * n * K + rows[:, None].to(tl.int64) * K + tl.arange(0, K)[None, :]
    tl.store(out + place, best, mask=rows[:, None] < n)


def topk(queries: torch.Tensor, gallery: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest products of contiguous half-precision rows, D a multiple of 64."""
    (n, d), m = queries.shape, gallery.shape[0]
    width = max(16, triton.next_power_of_2(k))
    block_m = 64 if width <= 16 else 32
    tiles = triton.cdiv(n, block_m)
    shares = max(1, min(32, 528 // tiles))  # enough programs for every multiprocessor
    share = triton.cdiv(triton.cdiv(m, shares), _BLOCK_N) * _BLOCK_N
    keys = torch.empty((shares, n, width), dtype=torch.int64, device=queries.device)
    _kernel[(tiles, shares)](
        queries,
        gallery,
        keys,
        n,
        m,
        share,
        D=d,
        K=width,
        BLOCK_M=block_m,
        BLOCK_N=_BLOCK_N,
        BLOCK_D=_BLOCK_D,
        num_warps=4,
        num_stages=3,
    )
    best = keys.permute(1, 0, 2).reshape(n, shares * width).topk(k, dim=1).values
    ordered = (best >> 32).to(torch.int32)
    scores = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).view(torch.float32)
    return scores, 4294967295 - (best & 4294967295)
