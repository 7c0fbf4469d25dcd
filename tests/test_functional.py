"""What the two functions accept and what they refuse, in NumPy and DLPack."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from oracles import METRICS, assert_exact, assert_same

import pycm

N, M, D = 5, 40, 6


def data(dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((N, D)).astype(dtype), rng.standard_normal((M, D)).astype(dtype)


Q, G = data()


class OnlyDLPack:
    """An array of some other library, as DLPack shows it."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.shape = array.shape

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


class OnGPU(OnlyDLPack):
    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)


class NoNumPy(OnlyDLPack):
    """As a producer of bfloat16 looks to NumPy."""

    dtype = "bfloat16"

    def __dlpack__(self, **options: Any) -> Any:
        raise RuntimeError("Unsupported dtype in DLTensor.")


class CompressedRows:
    """A SciPy matrix as far as it is looked at."""

    def __init__(self, shape: tuple[int, int], layout: str = "csr") -> None:
        self.shape, self.format = shape, layout
        self.indptr, self.indices = np.arange(shape[0] + 1), np.arange(shape[0])


# What is called, the error, and the words that must be in its message: function, argument, expected, got.
ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    "k of zero": (lambda: pycm.topk(Q, G, 0), ValueError, ["topk: k must be in [1, 40]", "got 0"]),
    "k negative": (lambda: pycm.topk(Q, G, -3), ValueError, ["topk: k must be in [1, 40]", "got -3"]),
    "k above M": (lambda: pycm.topk(Q, G, 41), ValueError, ["topk: k must be in [1, 40]", "got 41"]),
    "k enormous": (lambda: pycm.topk(Q, G, 10**30), ValueError, ["topk", "k must be in [1, 40]", "1000000"]),
    "k a float": (lambda: pycm.topk(Q, G, 2.0), TypeError, ["topk", "k must be", "float"]),
    "k a string": (lambda: pycm.topk(Q, G, "2"), TypeError, ["topk", "k must be", "str"]),
    "k none": (lambda: pycm.topk(Q, G, None), TypeError, ["topk", "k must be", "None"]),
    "metric unknown": (
        lambda: pycm.topk(Q, G, 1, "l2"),
        ValueError,
        ["topk", "metric", "sqeuclidean", "'l2'"],
    ),
    "metric of similarity": (
        lambda: pycm.similarity(Q, G, "COSINE"),
        ValueError,
        ["similarity", "metric", "COSINE"],
    ),
    "metric none": (lambda: pycm.topk(Q, G, 1, None), (TypeError, ValueError), ["topk", "metric", "None"]),
    "metric number": (lambda: pycm.similarity(Q, G, 3), (TypeError, ValueError), ["similarity", "metric"]),
    "precision": (lambda: pycm.topk(Q, G, 1, precision="int8"), ValueError, ["topk", "precision", "'int8'"]),
    "integers": (lambda: pycm.topk(Q.astype(int), G.astype(int), 1), TypeError, ["topk", "queries", "int64"]),
    "integers in y": (
        lambda: pycm.similarity(Q, G.astype(np.uint8)),
        TypeError,
        ["similarity", "y", "uint8"],
    ),
    "booleans": (lambda: pycm.topk(Q > 0, G > 0, 1), TypeError, ["topk", "queries", "bool"]),
    "complex": (lambda: pycm.similarity(Q * 1j, G * 1j), TypeError, ["similarity", "x", "complex64"]),
    "objects": (lambda: pycm.topk(Q.astype(object), G, 1), TypeError, ["topk", "queries", "object"]),
    "strings": (lambda: pycm.topk(Q.astype(str), G, 1), TypeError, ["topk", "queries", "U"]),
    "long double": (
        lambda: pycm.topk(Q.astype("g"), G.astype("g"), 1),
        TypeError,
        ["topk", "queries", "float128"],
    ),
    "records": (lambda: pycm.topk(np.zeros((2, 6), "f4,f4"), G, 1), TypeError, ["topk", "queries"]),
    "dtypes differ": (lambda: pycm.topk(Q, G.astype("f8"), 1), TypeError, ["gallery", "float32", "float64"]),
    "dtypes of similarity": (
        lambda: pycm.similarity(Q.astype("f2"), G),
        TypeError,
        ["y", "float16", "float32"],
    ),
    "list": (lambda: pycm.topk(Q.tolist(), G, 1), TypeError, ["topk", "queries", "__dlpack__", "list"]),
    "list for y": (lambda: pycm.similarity(Q, G.tolist()), TypeError, ["similarity", "y", "list"]),
    "none": (lambda: pycm.topk(None, G, 1), TypeError, ["topk", "queries", "NoneType"]),
    "none gallery": (lambda: pycm.topk(Q, None, 1), TypeError, ["topk", "gallery", "NoneType"]),
    "a NumPy scalar": (lambda: pycm.topk(np.float32(1), G, 1), (TypeError, ValueError), ["topk", "queries"]),
    "a zero-dimensional array": (
        lambda: pycm.topk(np.array(1.0), G, 1),
        ValueError,
        ["topk", "queries", "[N, D]"],
    ),
    "one query as a vector": (
        lambda: pycm.topk(Q[0], G, 1),
        ValueError,
        ["topk", "queries", "[N, D]", "[6]"],
    ),
    "gallery a batch": (
        lambda: pycm.topk(Q, G[None], 1),
        ValueError,
        ["topk", "gallery", "[M, D]", "[1, 40, 6]"],
    ),
    "y a vector": (lambda: pycm.similarity(Q, G[0]), ValueError, ["similarity", "y", "[..., M, D]", "[6]"]),
    "features differ": (lambda: pycm.topk(Q, G[:, :5], 1), ValueError, ["topk", "gallery", "6", "[40, 5]"]),
    "features of y": (lambda: pycm.similarity(Q, G[:, :5]), ValueError, ["similarity", "y", "6", "[40, 5]"]),
    "no features": (lambda: pycm.topk(Q[:, :0], G[:, :0], 1), ValueError, ["topk", "feature", "[5, 0]"]),
    "empty gallery": (
        lambda: pycm.topk(Q, G[:0], 1),
        ValueError,
        ["topk", "gallery", "at least one row", "[0, 6]"],
    ),
    "empty both": (lambda: pycm.topk(Q[:0], G[:0], 1), ValueError, ["topk", "gallery", "[0, 6]"]),
    "batches differ": (
        lambda: pycm.similarity(np.zeros((2, 3, 4)), np.zeros((3, 3, 4))),
        ValueError,
        ["similarity", "[2, 3, 4]", "[3, 3, 4]", "broadcast"],
    ),
    "mask too short": (
        lambda: pycm.topk(Q, G, 1, mask=np.ones(39, bool)),
        ValueError,
        ["mask", "[40]", "[39]"],
    ),
    "mask of queries": (
        lambda: pycm.topk(Q, G, 1, mask=np.ones((N, 1), bool)),
        ValueError,
        ["mask", "[5, 40]", "[5, 1]"],
    ),
    "mask 3-d": (
        lambda: pycm.topk(Q, G, 1, mask=np.ones((1, N, M), bool)),
        ValueError,
        ["mask", "[1, 5, 40]"],
    ),
    "mask of integers": (
        lambda: pycm.topk(Q, G, 1, mask=np.ones(M, int)),
        TypeError,
        ["mask", "bool", "int64"],
    ),
    "mask of floats": (lambda: pycm.topk(Q, G, 1, mask=np.ones(M)), TypeError, ["mask", "bool", "float64"]),
    "exclude too short": (
        lambda: pycm.topk(Q, G, 1, exclude=np.arange(4)),
        ValueError,
        ["exclude", "[5]", "[4]"],
    ),
    "exclude 2-d": (
        lambda: pycm.topk(Q, G, 1, exclude=np.zeros((5, 2), int)),
        ValueError,
        ["exclude", "[5]", "[5, 2]"],
    ),
    "exclude floats": (
        lambda: pycm.topk(Q, G, 1, exclude=np.zeros(5)),
        TypeError,
        ["exclude", "integers", "float64"],
    ),
    "exclude booleans": (
        lambda: pycm.topk(Q, G, 1, exclude=np.zeros(5, bool)),
        TypeError,
        ["exclude", "bool"],
    ),
    "exclude beyond M": (lambda: pycm.topk(Q, G, 1, exclude=[0, 1, 2, 3, 40]), ValueError, ["exclude", "40"]),
    "exclude -2": (lambda: pycm.topk(Q, G, 1, exclude=[0, 1, -2, 3, 4]), ValueError, ["exclude", "-2"]),
    "exclude beyond int64": (
        lambda: pycm.topk(Q, G, 1, exclude=np.array([2**64 - 1] * 5, np.uint64)),
        ValueError,
        ["exclude", str(2**64 - 1)],
    ),
    "exclude of a wider matrix": (
        lambda: pycm.topk(Q, G, 1, exclude=CompressedRows((N, M + 1))),
        ValueError,
        ["exclude", "[5, 40]", "[5, 41]"],
    ),
    "exclude by columns": (
        lambda: pycm.topk(Q, G, 1, exclude=CompressedRows((N, M), "csc")),
        TypeError,
        ["exclude", "CSR", "csc"],
    ),
    "exclude of a zero-dimensional array": (
        lambda: pycm.topk(np.array(1.0), G, 1, exclude=[0]),
        ValueError,
        ["queries", "[N, D]", "[]"],
    ),
    "mask of numbers in a list": (lambda: pycm.topk(Q, G, 1, mask=[1] * M), TypeError, ["mask", "bool", "int64"]),
    "mask of uneven lists": (
        lambda: pycm.topk(Q, G, 1, mask=[[True], [True, False]]),
        ValueError,
        ["topk", "mask", "list"],
    ),
    "on a GPU": (lambda: pycm.topk(Q, OnGPU(G), 1), NotImplementedError, ["topk", "gallery", "device type 2", "CPU"]),
    "y on a GPU": (lambda: pycm.similarity(OnGPU(Q), G), NotImplementedError, ["similarity", "x", "device type 2"]),
    "bfloat16 through DLPack": (
        lambda: pycm.topk(Q, NoNumPy(G), 1),
        TypeError,
        ["topk", "gallery", "bfloat16", "float32", "torch"],
    ),
    "exclude triple": (
        lambda: pycm.topk(Q, G, 1, exclude=([0], [1], [2])),
        ValueError,
        ["exclude", "pair", "3"],
    ),
    "offsets too short": (
        lambda: pycm.topk(Q, G, 1, exclude=(np.zeros(5, int), np.zeros(0, int))),
        ValueError,
        ["exclude", "offsets", "[6]", "[5]"],
    ),
    "offsets decrease": (
        lambda: pycm.topk(Q, G, 1, exclude=(np.array([0, 2, 1, 2, 2, 2]), np.array([1, 2]))),
        ValueError,
        ["exclude", "offsets", "row 1"],
    ),
    "offsets beyond the entries": (
        lambda: pycm.topk(Q, G, 1, exclude=(np.array([0, 1, 1, 1, 1, 9]), np.array([1, 2]))),
        ValueError,
        ["exclude", "offsets", "2"],
    ),
    "offsets start late": (
        lambda: pycm.topk(Q, G, 1, exclude=(np.array([1, 1, 1, 1, 1, 2]), np.array([1, 2]))),
        ValueError,
        ["exclude", "offsets"],
    ),
    "offsets far out": (
        lambda: pycm.topk(Q, G, 1, exclude=(np.array([0, 2**40, 2, 2, 2, 2]), np.array([1, 2]))),
        ValueError,
        ["exclude", "offsets"],
    ),
    "17 axes": (
        lambda: pycm.similarity(np.zeros((1,) * 17), np.zeros((1, 1))),
        ValueError,
        ["similarity", "x", "17"],
    ),
    "threads": (lambda: pycm.set_num_threads(-1), ValueError, ["set_num_threads", "-1"]),
    "too many threads": (lambda: pycm.set_num_threads(10**6), ValueError, ["set_num_threads", "1000000"]),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_what_was_wrong(name: str) -> None:
    call, error, words = ERRORS[name]
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert "\n" not in message, "one line"
    assert len(message) < 250
    assert not re.search(r"basic_string|nanobind|incompatible function|0x[0-9a-f]{6}", message)


def test_errors_leave_the_library_usable() -> None:
    for call, error, _ in ERRORS.values():
        with pytest.raises(error):
            call()
    assert_exact(pycm.topk(Q, G, 3), Q, G, 3, "cosine")


def test_result_types() -> None:
    for dtype, wide in ((np.float16, np.float32), (np.float32, np.float32), (np.float64, np.float64)):
        q, g = data(dtype)
        found = pycm.topk(q, g, 3)
        assert type(found) is pycm.Matches
        assert found._fields == ("scores", "indices")
        assert type(found.scores) is type(found.indices) is np.ndarray
        assert (found.scores.dtype, found.indices.dtype) == (wide, np.int64)
        assert found.scores.flags.c_contiguous
        assert found.scores.flags.writeable
        assert found.scores.flags.owndata
        assert pycm.similarity(q, g).dtype == wide


def test_defaults() -> None:
    assert_same(pycm.topk(Q, G, 4), pycm.topk(Q, G, 4, "cosine", mask=None, exclude=None, precision="exact"))
    np.testing.assert_array_equal(pycm.similarity(Q, G), pycm.similarity(Q, G, "cosine"))
    assert set(pycm.METRICS) == set(METRICS) >= set(pycm.DISTANCES)


@pytest.mark.parametrize("k", [np.int64(3), np.uint8(3), np.array(3), True])
def test_any_integer_is_a_k(k: Any) -> None:
    assert_exact(pycm.topk(Q, G, k), Q, G, int(k), "cosine")


# ---- kinds of arrays ----


@pytest.mark.parametrize("metric", METRICS)
def test_dlpack(metric: str) -> None:
    for dtype in (np.float32, np.float16, np.float64):
        q, g = data(dtype)
        want = pycm.topk(q, g, 3, metric)
        assert_same(pycm.topk(OnlyDLPack(q), OnlyDLPack(g), 3, metric), want)
        assert_same(pycm.topk(q, OnlyDLPack(g[:]), 3, metric), want)
        strided = OnlyDLPack(np.repeat(g, 2, axis=0)[::2])
        assert_same(pycm.topk(OnlyDLPack(q), strided, 3, metric), want)
        np.testing.assert_array_equal(
            pycm.similarity(OnlyDLPack(q), OnlyDLPack(g), metric), pycm.similarity(q, g, metric)
        )
        mask = np.arange(M) % 2 == 0
        assert_same(pycm.topk(q, g, 3, metric, mask=OnlyDLPack(mask)), pycm.topk(q, g, 3, metric, mask=mask))


def test_torch_masks_and_exclusions_of_numpy_arrays() -> None:
    torch = pytest.importorskip("torch")
    mask, exclude = np.arange(M) % 3 > 0, np.arange(N)
    want = pycm.topk(Q, G, 3, mask=mask, exclude=exclude)
    assert_same(pycm.topk(Q, G, 3, mask=torch.from_numpy(mask), exclude=torch.from_numpy(exclude)), want)
    tensors = torch.from_numpy(Q), torch.from_numpy(G)
    assert_same(pycm.topk(*tensors, 3, mask=mask, exclude=exclude), want)
    assert_same(pycm.topk(*tensors, 3, mask=mask.tolist(), exclude=exclude.tolist()), want)
    assert_same(pycm.topk(*tensors, 3, mask=OnlyDLPack(mask), exclude=exclude), want)
    assert_same(pycm.topk(*tensors, 3, mask=np.flip(np.flip(mask).copy()), exclude=exclude), want)
    with pytest.raises(TypeError, match="mask must be a boolean array"):
        pycm.topk(*tensors, 3, mask=[1] * M)


def test_bfloat16_of_torch_through_dlpack() -> None:
    torch = pytest.importorskip("torch")

    class Producer(OnlyDLPack):
        def __init__(self) -> None:
            self.array = torch.from_numpy(G).bfloat16()  # type: ignore[assignment]

    with pytest.raises(TypeError, match=r"topk: gallery must be .* through DLPack"):
        pycm.topk(Q, Producer(), 3)  # type: ignore[type-var]


def test_lists_as_masks() -> None:
    mask = np.arange(M) % 3 > 0
    want = pycm.topk(Q, G, 3, mask=mask)
    assert_same(pycm.topk(Q, G, 3, mask=mask.tolist()), want)
    assert_same(pycm.topk(Q, G, 3, mask=[tuple(mask)] * N), want)


class Subclass(np.ndarray):
    pass


def test_odd_numpy_arrays(tmp_path: Any) -> None:
    """Byte-swapped, unaligned, packed in records, mapped from a file: the values count."""
    want = pycm.topk(Q, G, 3)
    memory = np.zeros(G.nbytes + 1, np.uint8)
    unaligned = memory[1:].view(np.float32).reshape(G.shape)
    unaligned[:] = G
    assert not unaligned.flags.aligned
    records = np.zeros(M, [("flag", "u1"), ("row", "f4", (D,))])
    records["row"] = G
    assert records["row"].strides[0] % 4 != 0
    G.tofile(tmp_path / "gallery.bin")
    mapped = np.memmap(tmp_path / "gallery.bin", np.float32, "r", shape=G.shape)
    odd = [G.astype(">f4"), unaligned, records["row"], mapped, G.view(Subclass), np.asmatrix(G)]
    for g in odd:
        found = pycm.topk(Q, g, 3)
        assert_same(found, want)
        assert_same(pycm.topk(g[:N], G, 3), pycm.topk(G[:N], G, 3))
        np.testing.assert_array_equal(np.asarray(pycm.similarity(Q, g)), pycm.similarity(Q, G))
    mask = np.zeros(M, [("pad", "f4"), ("keep", "?"), ("more", "u1")])
    mask["keep"][::2] = True
    assert_same(pycm.topk(Q, G, 3, mask=mask["keep"]), pycm.topk(Q, G, 3, mask=mask["keep"].copy()))


def test_bfloat16_of_numpy() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    q, g = Q.astype(ml_dtypes.bfloat16), G.astype(ml_dtypes.bfloat16)
    assert_exact(pycm.topk(q, g, 3), q.astype(np.float32), g.astype(np.float32), 3, "cosine")


def test_workspace_grows_with_its_sizes_and_stays_linear() -> None:
    small = pycm.workspace_bytes(100, 10_000, 64, 10)
    assert 0 < small < 100e6
    assert pycm.workspace_bytes(100, 10_000_000, 64, 10) < 16 * 10_000_000 * 2 + small
    assert pycm.workspace_bytes(10_000_000, 10_000, 64, 10) < 2e9
    assert pycm.workspace_bytes(100, 10_000, 64, 1000) > small
