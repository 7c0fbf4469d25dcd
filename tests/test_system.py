"""What surrounds a call: levels, signals, memory, a machine without torch."""

from __future__ import annotations

import os
import signal
import sys
import textwrap

import numpy as np
import pytest
from conftest import LEVELS, use_level
from interpreter import output_of, run_python
from interrupting import interrupt
from oracles import METRICS, assert_exact, assert_same

import pycm


def data(n: int, m: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)).astype(np.float32), rng.standard_normal((m, d)).astype(np.float32)


# ---- levels ----


def test_levels_of_this_machine() -> None:
    info = pycm.backend_info()
    assert LEVELS[0] == "scalar"
    assert set(LEVELS) <= set(info["build"]["cpu_levels"])
    flags = set()
    if sys.platform == "linux" and os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            flags = {flag for line in lines if line.startswith("flags") for flag in line.split(":")[1].split()}
    if flags:
        assert ("avx2" in LEVELS) == {"avx2", "fma", "f16c"}.issubset(flags)
        assert ("avx512" in LEVELS) == {"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx2"}.issubset(flags)


@pytest.mark.parametrize("name", LEVELS)
def test_level_from_the_environment(name: str) -> None:
    code = 'import pycm; print(pycm.backend_info()["cpu"]["level"])'
    assert output_of(code, PYCM_SIMD_LEVEL=name) == name


def test_best_level_is_the_default() -> None:
    code = 'import pycm; print(pycm.backend_info()["cpu"]["level"])'
    assert output_of(code, PYCM_SIMD_LEVEL="") == LEVELS[-1]


def test_unknown_level() -> None:
    done = run_python(
        "import pycm, numpy as np; pycm.topk(np.ones((2, 2)), np.ones((2, 2)), 1)", PYCM_SIMD_LEVEL="sse9"
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    for word in (
        "ValueError",
        "PYCM_SIMD_LEVEL",
        "scalar, avx2, avx2_vnni, avx512, avx512_vnni or avx512_bf16",
        "'sse9'",
    ):
        assert word in last
    before = pycm.backend_info()["cpu"]["level"]
    with pytest.raises(ValueError, match="sse9"):
        pycm._C.set_simd_level("sse9")
    assert pycm.backend_info()["cpu"]["level"] == before


@pytest.mark.parametrize("metric", METRICS)
def test_bits_do_not_depend_on_level_or_threads(metric: str, every_level: list[str], threads: None) -> None:
    """Both ways of sharing work: few queries (the gallery is split) and many (the queries are)."""
    for n, m, d, k in ((20, 9000, 40, 10), (900, 300, 40, 7), (1, 9000, 100, 50), (300, 4000, 33, 33)):
        q, g = data(n, m, d)
        results = []
        for name in every_level:
            use_level(name)
            for count in (1, 2, 3, 4):
                pycm.set_num_threads(count)
                results.append(pycm.topk(q, g, k, metric))
        for other in results[1:]:
            assert_same(other, results[0], f"{n} x {m}")
        sample = slice(0, n, max(1, n // 10))
        assert_exact(pycm.topk(q[sample], g, k, metric), q[sample], g, k, metric)
        assert_same((results[0].scores[sample], results[0].indices[sample]), pycm.topk(q[sample], g, k, metric))


# ---- the floating-point environment ----


@pytest.mark.parametrize("metric", METRICS)
def test_flushed_denormals_change_nothing(metric: str) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    q = (rng.standard_normal((30, 16)) * 1e-20).astype(np.float32)
    g = (rng.standard_normal((500, 16)) * 1e-39).astype(np.float32)
    want, scores = pycm.topk(q, g, 5, metric), pycm.similarity(q, g, metric)
    assert_exact(want, q, g, 5, metric)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        assert_same(pycm.topk(q, g, 5, metric), want)
        again = pycm.similarity(q, g, metric)
        assert np.float32(1e-30) * np.float32(1e-12) == 0, "the caller's own mode is not restored"
    finally:
        torch.set_flush_denormal(False)
    assert again.tobytes() == scores.tobytes()


# ---- signals ----


def test_control_c_ends_a_long_call() -> None:
    code = """
        import numpy as np, pycm, time
        rng = np.random.default_rng(0)
        q, g = rng.standard_normal((60000, 64)), rng.standard_normal((100000, 64))
        q[:100], g[:100] = g[:100], q[:100]
        pycm.topk(q[:100].copy(), g[:1000].copy(), 1)
        print("ready", flush=True)
        try:
            pycm.topk(q, g, 10)
            print("finished")
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        # The library works on after it.
        print(pycm.topk(g[:50].copy(), g[:50].copy(), 1).indices[:, 0].tolist() == list(range(50)))
    """
    ended = interrupt([sys.executable, "-c", textwrap.dedent(code)], ready="ready", after=0.5)
    assert ended.out == "interrupted\nTrue\n", ended.err
    assert ended.seconds < 5
    assert ended.returncode == 0


def test_uncaught_control_c() -> None:
    code = """
        import numpy as np, pycm
        q = np.random.default_rng(0).standard_normal((50000, 64))
        print("ready", flush=True)
        pycm.similarity(q, q[:30000]) if {similarity} else pycm.topk(q, q, 10)
    """
    for similarity in (False, True):
        command = [sys.executable, "-c", textwrap.dedent(code.format(similarity=similarity))]
        ended = interrupt(command, ready="ready", after=0.3)
        assert ended.err.strip().endswith("KeyboardInterrupt"), ended.err
        assert ended.returncode == -signal.SIGINT


# ---- without torch ----


def test_numpy_users_need_no_torch() -> None:
    code = """
        import sys
        sys.modules["torch"] = None  # as if it were not installed
        import numpy as np, pycm
        from pycm import reference
        q, g = np.eye(3, 8, dtype=np.float32), np.eye(20, 8, dtype=np.float32)
        found = pycm.topk(q, g, 4, mask=np.ones(20, bool), exclude=[0, 1, 2])
        assert type(found.scores) is np.ndarray
        want = reference.topk(q, g, 4, exclude=np.arange(3))
        print((found.indices == want.indices).all(), pycm.similarity(q, g).shape, sorted(pycm.backend_info()))
    """
    assert output_of(code) == "True (3, 20) ['build', 'cpu', 'cuda', 'missing', 'packages', 'version']"


def test_import_brings_in_nothing_heavy() -> None:
    code = """
        import sys, pycm, numpy as np
        pycm.topk(np.ones((2, 2)), np.ones((2, 2)), 1, exclude=[0, 1])
        pycm.similarity(np.ones((2, 2)), np.ones((2, 2)))
        heavy = {"torch", "scipy", "sklearn", "PIL", "transformers", "sentence_transformers", "skimage", "tqdm", "rich"}
        print(sorted(heavy & set(sys.modules)))
    """
    assert output_of(code) == "[]"


def test_torch_imported_after_pycm() -> None:
    pytest.importorskip("torch")
    code = """
        import numpy as np, pycm
        a = pycm.topk(np.eye(3), np.eye(3), 1).indices
        import torch
        b = pycm.topk(torch.eye(3), torch.eye(3), 1).indices
        print(type(b) is torch.Tensor and b.tolist() == a.tolist())
    """
    assert output_of(code) == "True"


# ---- memory ----

MEMORY = """
    import resource, numpy as np, pycm
    pycm.set_num_threads(2)
    rng = np.random.default_rng(0)
    q, g = rng.standard_normal(({n}, {d}), np.float32), rng.standard_normal(({m}, {d}), np.float32)
    {change}
    pycm.topk(q[:5], g[:50], 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pycm.topk(q, g, {k}, "{metric}")
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print((after - before) * 1024, pycm.workspace_bytes({n}, {m}, {d}, {k}))
"""


@pytest.mark.parametrize(
    ("n", "m", "d", "k", "change"),
    [
        (2000, 200_000, 8, 10, ""),
        (1000, 100_000, 8, 10, "g[:] = g[0]"),
        (500, 100_000, 64, 100, ""),
        (3000, 50_000, 8, 100, "g[:] = g[np.arange(50_000) % 5]"),
        (20_000, 2_000, 32, 20, ""),
        (1, 300_000, 16, 1000, ""),
        (100, 20_000, 16, 10_000, ""),
    ],
)
def test_memory_is_linear_and_announced(n: int, m: int, d: int, k: int, change: str) -> None:
    """Never N x M; and workspace_bytes is what a call takes at most, beside its inputs and results."""
    for metric in ("cosine", "euclidean"):
        code = MEMORY.format(n=n, m=m, d=d, k=k, change=change, metric=metric)
        used, announced = map(int, output_of(code, PYCM_NUM_THREADS="2").split())
        results = n * k * 12
        slack = 6e6  # the allocator's and the threads' own
        assert used <= announced + results + slack, f"{metric}: {used} bytes used, {announced} announced"
        assert used < max(n * m * 4 / 8, 2e7 + results)


def test_no_memory_is_leaked() -> None:
    code = """
        import gc, resource, numpy as np, pycm
        q, g = np.ones((50, 64), np.float32), np.random.default_rng(0).random((3000, 64), np.float32)
        def rounds(count):
            for i in range(count):
                pycm.topk(q, g, 20, "euclidean", mask=np.ones(3000, bool), exclude=np.zeros(50, int))
                pycm.similarity(q, g)
                for bad in (0, 5000):
                    try:
                        pycm.topk(q, g, bad)
                    except ValueError:
                        pass
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        first = rounds(30)
        print((rounds(200) - first) * 1024)
    """
    assert int(output_of(code)) < 4e6
