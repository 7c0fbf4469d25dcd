"""The libraries measured, each in its best configuration.

A provider prepares whatever it may keep between calls (normalised rows, an index, output buffers) outside the timing
and returns the function that is timed. pycm takes the raw rows; "pycm-gallery" a gallery encoded ahead, as an index is.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from ..._optional import require
from ..cases import OPS, Op
from ..machine import version
from . import call, join, loss, maxsim, pairs, rank, similarity, temporal_pool, topk
from .base import Provider

PROVIDERS: dict[Op, tuple[Provider, ...]] = {
    "topk": topk.PROVIDERS,
    "rank": rank.PROVIDERS,
    "join": join.PROVIDERS,
    "pairs": pairs.PROVIDERS,
    "similarity": similarity.PROVIDERS,
    "maxsim": maxsim.PROVIDERS,
    "temporal_pool": temporal_pool.PROVIDERS,
    "loss": loss.PROVIDERS,
    "call": call.PROVIDERS,
}


def chosen(op: Op, patterns: Sequence[str]) -> list[Provider]:
    """Those whose names match one of `patterns` ("faiss-*"); without patterns all but those that must be asked for.

    Raises:
        ValueError: a pattern that no provider of any operation matches.
    """
    names = {provider.name for name in OPS for provider in PROVIDERS[name]}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"--provider {pattern}: expected one of {', '.join(sorted(names))}")
    if not patterns:
        return [provider for provider in PROVIDERS[op] if not provider.asked]
    return [p for p in PROVIDERS[op] if any(fnmatchcase(p.name, pattern) for pattern in patterns)]


def missing(provider: Provider) -> str | None:
    """Why it cannot run here, or None."""
    absent = [package for package in provider.packages if version(package) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def set_threads(threads: int) -> None:
    """The same number of threads for every library that is installed."""
    import pycm

    pycm.set_num_threads(threads)
    if version("torch") is not None:
        require("torch", "bench", "pycm bench").set_num_threads(threads)
    if version("faiss-cpu") is not None:
        require("faiss", "bench", "pycm bench").omp_set_num_threads(threads)
    if version("scikit-learn") is not None:
        require("sklearn.metrics", "bench", "pycm bench")  # loads its OpenMP before the limit is set
    if version("threadpoolctl") is not None:
        require("threadpoolctl", "bench", "pycm bench").threadpool_limits(limits=threads)
