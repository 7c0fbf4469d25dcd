"""What is measured on a GPU: each case is one call of pycm, its baseline and peers, and what it has to reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import peers
import torch
from torch import Tensor

import pycm

Limits = dict[str, float]


@dataclass
class Problem:
    """`pycm` and `peers` are timed in turns; `check` raises unless pycm's result is right."""

    pycm: Callable[[], Any]
    peers: dict[str, Callable[[], Any]]
    check: Callable[[Any], None] = lambda result: None
    absent: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """`goal` is the least (baseline's time / pycm's).

    The baseline "floor" is the least time the device needs; of "a or b" the faster one counts.
    """

    name: str
    about: str
    baseline: str
    goal: float
    make: Callable[[torch.device], Problem]
    floor: Callable[[Limits], float]
    memory: float = 0.0  # the most bytes beyond the inputs, as a share of them; 0 for no claim
    peer_memory: float = 0.0  # the same, as a share of what the baseline takes


def rows(device: torch.device, count: int, dim: int, dtype: torch.dtype, seed: int, unit: bool = True) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    made = torch.empty((count, dim), dtype=dtype, device=device)
    for part in made.split(1 << 20):  # no copy of all rows in fp32
        values = torch.randn(part.shape, generator=generator, device=device)
        part.copy_(torch.nn.functional.normalize(values, dim=1) if unit else values)
    return made


def offered(**makers: Callable[[], Any]) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """The peers that this machine has, and why it lacks the others."""
    found, absent = {}, {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except (ImportError, NotImplementedError) as reason:
            absent[name] = f"{type(reason).__name__}: {reason}"
    return found, absent


# ---- top-k ----


def topk_case(n: int, m: int, d: int, k: int, precision: str, goal: float) -> Case:
    fast = precision == "fast"
    low = torch.bfloat16 if fast else torch.float16

    def make(device: torch.device) -> Problem:
        dtype = torch.bfloat16 if fast else torch.float32
        q, g = rows(device, n, d, dtype, 0), rows(device, m, d, dtype, 1)
        half_q, half_g = (q, g) if fast else (q.to(low), g.to(low))
        makers = {"product alone": lambda: peers.product_alone(half_q, half_g)}
        if k in (10, 100):  # torch sorts for seconds otherwise
            makers["torch"] = lambda: peers.torch_topk(q, g, k)
            makers["torch.compile"] = lambda: peers.torch_topk(q, g, k, compiled=True)
            makers["triton"] = lambda: peers.triton_topk(half_q, half_g, k)
            makers["faiss-gpu"] = lambda: peers.faiss_topk(q, g, k)
            makers["cuvs"] = lambda: peers.cuvs_topk(q.float(), g.float(), k)
        found, absent = offered(**makers)

        def check(result: pycm.Matches) -> None:
            some = slice(0, min(n, 16))
            wide = (
                q[some].double() @ g.double().T
                if m * d <= 1 << 28
                else torch.cat([q[some].double() @ part.double().T for part in g.split(1 << 18)], 1)
            )
            if fast:  # every match is as good as the k-th best, within bf16's bound
                least = wide.topk(k, dim=1).values[:, -1:] - 2.0**-7
                assert (wide.gather(1, result.indices[some]) >= least).all()
                return
            norms = q[some].double().norm(dim=1, keepdim=True) * torch.cat(
                [part.double().norm(dim=1) for part in g.split(1 << 18)]
            )
            best = (wide / norms).float().topk(k, dim=1)
            # Ties aside, which torch orders as it likes, indices are those of fp64.
            differ = best.indices != result.indices[some]
            assert torch.allclose(best.values, result.scores[some], rtol=2.0**-22, atol=0)
            assert differ.float().mean() < 0.01

        metric = "dot" if fast else "cosine"
        return Problem(lambda: pycm.topk(q, g, k, metric, precision=precision), found, check, absent)

    def floor(limits: Limits) -> float:
        item = 2 if fast else 4
        return max(2.0 * n * m * d / limits["bfloat16" if fast else "float16"], item * (n + m) * d / limits["copy"])

    name = f"topk-{precision}-{n}x{m}x{d}-k{k}"
    about = f"{'fast bf16' if fast else 'exact fp32'} top-{k} of {n} × {m} × {d}"
    memory = 0.05 if (n, m) == (100_000, 1_000_000) else 0.0
    return Case(name, about, "product alone", goal, make, floor, memory)


def few_queries_case(n: int, m: int, d: int, precision: str) -> Case:
    """The floor is that of the codes, 2 bytes an element; the rows are fp32, which exact results are verified by."""

    def make(device: torch.device) -> Problem:
        q, g = rows(device, n, d, torch.float32, 2), rows(device, m, d, torch.float32, 3)
        gallery = pycm.Gallery(g, metric="dot")
        half = q.half(), g.half()
        found, absent = offered(torch=lambda: peers.torch_topk(*half, 10))

        def check(result: pycm.GalleryMatches) -> None:
            best = torch.cat([q.double() @ part.double().T for part in g.split(1 << 18)], 1).float().topk(10, dim=1)
            relative, absolute = (2.0**-22, 0.0) if precision == "exact" else (0.0, 2.0**-9)
            assert torch.allclose(torch.as_tensor(result.scores), best.values, rtol=relative, atol=absolute)

        return Problem(lambda: gallery.topk(q, 10, precision=precision), found, check, absent)

    def floor(limits: Limits) -> float:
        return 2.0 * m * d / limits["copy"]

    about = f"{n} queries, {precision}, prepared {m} × {d}"
    return Case(f"prepared-{precision}-{n}x{m}x{d}", about, "floor", 0.85, make, floor)


def rank_case(n: int, m: int, d: int) -> Case:
    def make(device: torch.device) -> Problem:
        q, g = rows(device, n, d, torch.float32, 4), rows(device, m, d, torch.float32, 5)
        positives = torch.arange(n, device=device) % m
        half = q.half(), g.half()
        return Problem(lambda: pycm.rank(q, g, positives), {"product alone": peers.product_alone(*half)})

    def floor(limits: Limits) -> float:
        return 2.0 * n * m * d / limits["float16"]

    return Case(
        f"rank-{n}x{m}x{d}", f"ranks of one positive each, {n} × {m} × {d}", "product alone", 1 / 1.5, make, floor
    )


# ---- score matrices ----


def similarity_case(n: int, d: int, dtype: torch.dtype) -> Case:
    exact = dtype == torch.float32

    def make(device: torch.device) -> Problem:
        x, y = rows(device, n, d, dtype, 6, unit=False), rows(device, n, d, dtype, 7, unit=False)
        out = torch.empty((n, n), device=device)
        metric = "dot" if exact else "cosine"

        def check(result: Tensor) -> None:
            some = slice(0, 256)
            wide = x[some].double() @ y.double().T
            if not exact:
                wide = wide / (x[some].double().norm(dim=1, keepdim=True) * y.double().norm(dim=1))
            theirs = (x[some].float() @ y.float().T).double() if exact else wide
            error, allowed = ((part - wide).abs().max().item() for part in (result[some].double(), theirs))
            scale = wide.abs().max().item() if exact else 1.0
            assert error <= max(allowed, 2.0**-22 * scale), (error, allowed)

        theirs = {"torch": lambda: torch.mm(x, y.T, out=out)} if exact else {"product alone": lambda: x @ y.T}
        return Problem(lambda: pycm.similarity(x, y, metric), theirs, check)

    def floor(limits: Limits) -> float:
        # A copy reads and writes: writing alone goes at half its bytes.
        return max(2.0 * n * n * d / limits["float32" if exact else "bfloat16"], 2 * 4.0 * n * n / limits["copy"])

    name = f"similarity-{'fp32' if exact else 'bf16'}-{n}x{d}"
    if exact:
        return Case(name, f"dot of fp32, {n} × {n} × {d}, against torch with TF32 off", "torch", 2.0, make, floor)
    return Case(name, f"cosine of bf16, fp32 out, {n} × {n} × {d}", "floor", 0.95, make, floor)


def regions_case(batch: int) -> Case:
    def make(device: torch.device) -> Problem:
        regions = rows(device, batch * 36, 1024, torch.float32, 8, unit=False).view(batch, 36, 1024)
        words = rows(device, batch * 32, 1024, torch.float32, 9, unit=False).view(batch, 32, 1024)
        return Problem(
            lambda: pycm.similarity(regions, words, "cosine").amax(1).mean(1),
            {"torch": peers.torch_regions(regions, words)},
        )

    def floor(limits: Limits) -> float:
        return 4.0 * batch * (36 + 32) * 1024 / limits["copy"]

    return Case(f"regions-{batch}", f"{batch} pairs of 36 × 32 × 1024, cosine, max and mean", "torch", 3.0, make, floor)


def maxsim_case(n: int, words: int, m: int, patches: int) -> Case:
    def make(device: torch.device) -> Problem:
        if not hasattr(pycm, "maxsim"):
            raise NotImplementedError("this version has no maxsim")
        q = rows(device, n * words, 128, torch.bfloat16, 10).view(n, words, 128)
        g = rows(device, m * patches, 128, torch.bfloat16, 11).view(m, patches, 128)
        found, absent = offered(torch=lambda: peers.torch_maxsim(q, g))
        return Problem(lambda: pycm.maxsim(q, g), found, absent=absent)

    def floor(limits: Limits) -> float:
        return 2.0 * n * words * m * patches * 128 / limits["bfloat16"]

    about = f"MaxSim of {n} × {words} × 128 against {m} × {patches} × 128, bf16"
    return Case(f"maxsim-{n}x{words}-{m}x{patches}", about, "floor", 0.65, make, floor)


def cases(tiny: bool = False) -> Iterator[Case]:
    if tiny:
        yield topk_case(40, 3000, 64, 10, "fast", 0.0)
        yield topk_case(40, 3000, 64, 10, "exact", 0.0)
        yield few_queries_case(4, 3000, 64, "exact")
        yield rank_case(40, 3000, 64)
        yield similarity_case(200, 64, torch.float32)
        yield similarity_case(200, 64, torch.bfloat16)
        yield regions_case(3)
        yield maxsim_case(4, 8, 30, 12)
        return
    # The ones that say most come first: a run may end early.
    main = [(10_000, 1_000_000, 512, 10), (100_000, 1_000_000, 512, 10)]
    every = [(n, m, d, k) for d in (512, 256, 1024) for m in (100_000, 1_000_000) for n in (1000, 10_000, 100_000)
             for k in (10, 1, 100, 1000)]  # fmt: skip
    for size in main:
        yield topk_case(*size, "fast", 1 / 1.33)
        yield topk_case(*size, "exact", 1 / 1.5)
    for count in (1, 16, 64):
        for precision in ("exact", "fast"):
            yield few_queries_case(count, 1_000_000, 512, precision)
    yield rank_case(10_000, 1_000_000, 512)
    yield similarity_case(16_384, 512, torch.float32)
    yield similarity_case(16_384, 512, torch.bfloat16)
    yield regions_case(10_000)
    yield maxsim_case(32, 32, 10_000, 180)
    yield maxsim_case(1024, 32, 1000, 1024)
    yield topk_case(10_000, 1_000_000, 128, 10, "fast", 1 / 1.8)
    for size in every:
        if size not in main:
            yield topk_case(*size, "fast", 1 / 1.33)
            yield topk_case(*size, "exact", 1 / 1.5)
