"""Every kernel once, on shapes small enough for the sanitizer: `python benchmarks/gpu/exercise.py [--large]`.

`--large` is one call of exact top-k large enough to be worth profiling.
"""

from __future__ import annotations

import sys

import torch

import pycm

DEVICE = torch.device("cuda")


def rows(count: int, dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(count * dim)).to(dtype).to(DEVICE)


def large() -> None:
    q, g = rows(10_000, 512), rows(200_000, 512)
    pycm.topk(q, g, 10)
    pycm.Gallery(g).topk(q[:16], 10)


def small() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        for n, m, d in ((3, 300, 40), (70, 2100, 96)):
            q, g = rows(n, d, dtype), rows(m, d, dtype)
            mask = torch.arange(m, device=DEVICE) % 3 > 0
            for metric in pycm.METRICS:
                pycm.similarity(q, g[:130], metric)
                pycm.topk(q, g, 7, metric, mask=mask, exclude=torch.arange(n, device=DEVICE))
                pycm.rank(q, g, torch.arange(n, device=DEVICE), metric)
                gallery = pycm.Gallery(g, metric=metric)
                gallery.topk(q, 7, mask=mask)
                gallery.rank(q, range(n))
            pycm.topk(q, g, 100, "dot", precision="fast")
            pycm.topk(q, g[:1].repeat(m, 1), 5, "dot")  # by the direct path where m is beyond a query's room
        pycm.similarity(rows(6 * 36, 64, dtype).view(6, 36, 64), rows(6 * 32, 64, dtype).view(6, 32, 64))
        for cell in ("lstm", "gru"):
            for hidden in (40, 200):  # one block, and a team
                frames = rows(3 * 7, 24, dtype).view(3, 7, 24)
                module = pycm.nn.TemporalPool(24, hidden, cell, pool="meanmax", bidirectional=True).to(DEVICE, dtype)
                module(frames, torch.tensor([7, 0, 4], device=DEVICE)).sum().backward()
        for pool in ("attention", "gpo"):
            module = pycm.nn.TemporalPool(24, 20, "lstm", pool=pool, proj_size=9).to(DEVICE, dtype)
            module(frames, torch.tensor([7, 0, 4], device=DEVICE)).sum().backward()
        if hasattr(pycm, "maxsim"):
            words, patches = rows(4 * 9, 64, dtype).view(4, 9, 64), rows(5 * 70, 64, dtype).view(5, 70, 64)
            words.requires_grad_()
            pycm.maxsim(words, patches, direction="both").sum().backward()
            pycm.maxsim_topk(words.detach(), patches, 3)
            pycm.xattn_score(patches, words.detach())


if __name__ == "__main__":
    large() if sys.argv[1:] == ["--large"] else small()
    torch.cuda.synchronize()
    print("done")
