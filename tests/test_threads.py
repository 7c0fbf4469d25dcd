"""How many threads a call has, which processors they keep to, other threads and forks beside it."""

from __future__ import annotations

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from interpreter import output_of, run_python
from oracles import METRICS, assert_same

import pycm


def data(n: int, m: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)).astype(np.float32), rng.standard_normal((m, d)).astype(np.float32)


def test_number_of_threads(threads: None) -> None:
    available = len(os.sched_getaffinity(0))
    pycm.set_num_threads(0)
    assert pycm.backend_info()["cpu"]["threads"] == available
    pycm.set_num_threads(3)
    assert pycm.backend_info()["cpu"]["threads"] == 3
    for bad in (-1, 1025):
        with pytest.raises(ValueError, match=f"got {bad}"):
            pycm.set_num_threads(bad)
    assert pycm.backend_info()["cpu"]["threads"] == 3


THREADS_USED = """
    import os, numpy as np, pycm
    q, g = np.ones((200, 64), np.float32), np.random.default_rng(0).random((20000, 64), np.float32)
    {prepare}
    pycm.topk({q}, {g}, 5)
    print(len(os.listdir("/proc/self/task")) - {before})
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_environment_decides_the_threads() -> None:
    plain = THREADS_USED.format(prepare="before = len(os.listdir('/proc/self/task'))", q="q", g="g", before="before")
    assert output_of(plain, PYCM_NUM_THREADS="1") == "0"
    assert output_of(plain, PYCM_NUM_THREADS="3") == "2"
    ignored = plain.replace("pycm.topk", "pycm.set_num_threads(4); pycm.topk")
    assert output_of(ignored, PYCM_NUM_THREADS="2") == "1"
    assert output_of(ignored, PYCM_NUM_THREADS="") == "3"


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_torch_tensors_use_torchs_number_of_threads() -> None:
    pytest.importorskip("torch")
    prepare = "import torch; torch.set_num_threads(3); before = len(os.listdir('/proc/self/task'))"
    code = THREADS_USED.format(prepare=prepare, q="torch.from_numpy(q)", g="torch.from_numpy(g)", before="before")
    assert output_of(code, PYCM_NUM_THREADS="", OMP_NUM_THREADS="1") == "2"


@pytest.mark.parametrize("value", ["0", "-2", "two", "2.5", "100000"])
def test_bad_number_of_threads_in_the_environment(value: str) -> None:
    done = run_python(
        "import pycm, numpy as np; pycm.topk(np.ones((2, 2)), np.ones((2, 2)), 1)", PYCM_NUM_THREADS=value
    )
    assert done.returncode == 1
    assert f"ValueError: PYCM_NUM_THREADS: expected 1 to 1024, got '{value}'" in done.stderr


def test_many_python_threads_at_once(threads: None) -> None:
    """The pool serves one call at a time; the others run on their own threads, with the same bits."""
    pycm.set_num_threads(2)
    jobs = [(*data(60, 2000, 24, seed), METRICS[seed % 5]) for seed in range(12)]
    want = [(pycm.topk(q, g, 9, metric), pycm.similarity(q, g, metric)) for q, g, metric in jobs]

    def work(turn: int) -> None:
        q, g, metric = jobs[turn % 12]
        found, scores = want[turn % 12]
        assert_same(pycm.topk(q, g, 9, metric), found)
        np.testing.assert_array_equal(pycm.similarity(q, g, metric), scores)

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work, turn) for turn in range(96)]:
            future.result()


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="lists threads by /proc")
@pytest.mark.parametrize("limit", ["", "os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])"])
def test_the_pool_keeps_to_the_processors_it_was_given(limit: str) -> None:
    """Its threads leave the processor of the caller who wakes them, for others they may use."""
    code = """
        import os, time
        {limit}
        import numpy as np, pycm
        pycm.set_num_threads(2)
        g = np.random.default_rng(0).standard_normal((500, 64))
        for _ in range(60):
            time.sleep(0.002)  # until they sleep
            pycm.topk(g, g, 3)
        print(all(os.sched_getaffinity(int(t)) == os.sched_getaffinity(0) for t in os.listdir("/proc/self/task")))
    """
    assert output_of(code.format(limit=limit)) == "True"


def test_the_interpreter_runs_on_during_a_call() -> None:
    """The GIL is released: another Python thread makes progress."""
    q, g = data(800, 60_000, 64)
    ticks, done = [], threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.002)

    thread = threading.Thread(target=tick)
    thread.start()
    time.sleep(0.02)
    begin = time.monotonic()
    pycm.topk(q, g, 10)
    end = time.monotonic()
    done.set()
    thread.join()
    inside = [t for t in ticks if begin < t < end]
    assert end - begin < 0.05 or len(inside) >= 3, (end - begin, len(inside))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_fork_after_the_pool_was_used() -> None:
    code = """
        import os, numpy as np, pycm
        pycm.set_num_threads(3)
        rng = np.random.default_rng(0)
        q, g = rng.standard_normal((200, 32)), rng.standard_normal((5000, 32))
        want = pycm.topk(q, g, 5)
        children = []
        for _ in range(4):
            child = os.fork()
            if child == 0:
                same = all((a == b).all() for _ in range(3) for a, b in zip(pycm.topk(q, g, 5), want))
                os._exit(0 if same else 3)
            children.append(child)
        print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
        print(all((a == b).all() for a, b in zip(pycm.topk(q, g, 5), want)))
    """
    done = run_python(code, timeout=60)
    assert done.stdout.split("\n")[:2] == ["[0, 0, 0, 0]", "True"], done.stderr


def test_multiprocessing_pool_by_fork() -> None:
    code = """
        import multiprocessing, numpy as np, pycm
        g = np.random.default_rng(0).standard_normal((3000, 32))
        def job(i):
            return pycm.topk(g[i * 50:(i + 1) * 50], g, 1).indices[:, 0].tolist()
        pycm.topk(g[:500], g, 3)
        with multiprocessing.get_context("fork").Pool(3) as pool:
            print(sum(pool.map(job, range(12)), []) == list(range(600)))
    """
    assert output_of(code) == "True"
