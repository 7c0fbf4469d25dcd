"""Wrong arguments of temporal_pool are named, for NumPy arrays and for tensors alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import temporal_cases as cases
from torch_cases import raises

import pycm

torch = pytest.importorskip("torch")
from torch.nn.utils.rnn import pack_padded_sequence  # noqa: E402

KIND = pytest.mark.parametrize("kind", ["numpy", "torch"])
X = np.random.default_rng(0).standard_normal((3, 5, 4))
WEIGHTS = cases.rnn_weights("lstm", 4, 6, layers=2, bidirectional=True)
GPO = cases.gpo_weights()


def convert(value: Any, kind: str) -> Any:
    if isinstance(value, dict):
        return {name: convert(part, kind) for name, part in value.items()}
    return torch.from_numpy(value) if kind == "torch" and isinstance(value, np.ndarray) else value


def wrong(kind: str, error: type[Exception], words: list[str], **changes: Any) -> None:
    """A call that is right but for the changes; `weights` changes single ones."""
    arguments: dict[str, Any] = {"x": X, "lengths": (5, 0, 3), "cell": "lstm", "pool": "mean", **changes}
    arguments["weights"] = {**WEIGHTS, **changes.get("weights", {})} if "only" not in changes else changes["only"]
    arguments.pop("only", None)
    arguments = {name: convert(value, kind) for name, value in arguments.items()}
    raises(error, ["temporal_pool: ", *words], lambda: pycm.temporal_pool(**arguments))


def test_the_call_that_is_changed_is_right() -> None:
    for kind in ("numpy", "torch"):
        assert pycm.temporal_pool(convert(X, kind), (5, 0, 3), convert(WEIGHTS, kind)).shape == (3, 12)


@KIND
def test_lengths(kind: str) -> None:
    wrong(kind, ValueError, ["lengths must be in [0, 5], got 6 in row 1"], lengths=(5, 6, 3))
    wrong(kind, ValueError, ["lengths must be in [0, 5], got -1 in row 2"], lengths=np.array([5, 0, -1]))
    wrong(kind, ValueError, ["lengths", "[3]", "[2]"], lengths=(5, 3))
    wrong(kind, TypeError, ["lengths", "integers", "float"], lengths=np.array([5.0, 0, 3]))
    wrong(kind, TypeError, ["lengths", "integers", "bool"], lengths=np.array([True, False, True]))
    wrong(kind, ValueError, ["lengths must be given", "[3, 5, 4]", "lengths=5"], lengths=None)
    wrong(kind, ValueError, ["cu_seqlens", "ragged", "[3, 5, 4]"], lengths=None, cu_seqlens=np.array([0, 5, 5, 8]))
    wrong(kind, ValueError, ["lengths and cu_seqlens"], cu_seqlens=np.array([0, 5, 5, 8]))
    wrong(kind, ValueError, ["lengths", "row by row", "4"], x=X[0], lengths=4)
    wrong(kind, ValueError, ["lengths must sum to the 5 steps", "6"], x=X[0], lengths=(3, 3))


@KIND
def test_cu_seqlens(kind: str) -> None:
    ragged = X.reshape(15, 4)
    for words, starts in (
        (["cu_seqlens must end at the 15 steps", "14"], [0, 5, 14]),
        (["cu_seqlens must start with 0", "1"], [1, 5, 15]),
        (["cu_seqlens", "fall"], [0, 6, 5, 15]),
        (["cu_seqlens"], 15),
        (["cu_seqlens", "[B + 1]", "[0]"], np.zeros(0, int)),
    ):
        wrong(kind, ValueError, words, x=ragged, lengths=None, cu_seqlens=np.array(starts))
    wrong(kind, TypeError, ["cu_seqlens", "integers"], x=ragged, lengths=None, cu_seqlens=np.array([0.0, 15.0]))


@KIND
def test_x(kind: str) -> None:
    wrong(kind, TypeError, ["x must be float32", "int64"], x=np.ones((3, 5, 4), int))
    wrong(kind, ValueError, ["x must have shape", "[3, 5, 4, 1]"], x=X[..., None])
    wrong(kind, ValueError, ["x must have 4 features", "weight_ih_l0", "got 3"], x=X[..., :3])
    wrong(kind, TypeError, ["weight_ih_l0", "x's dtype float32", "float64"], x=X.astype(np.float32))
    other: Any = torch.from_numpy(X) if kind == "numpy" else X
    arguments = (other, (5, 0, 3), convert(WEIGHTS, kind))
    if kind == "numpy":
        raises(
            TypeError,
            ["temporal_pool: weight_ih_l0", "torch tensor", "ndarray"],
            lambda: pycm.temporal_pool(*arguments),
        )
    else:
        with pytest.raises(TypeError, match="temporal_pool"):
            pycm.temporal_pool([[1.0]], None, WEIGHTS)


@KIND
def test_weights(kind: str) -> None:
    wrong(
        kind,
        ValueError,
        ["weight_hh_l1_reverse", "[24, 6]", "[24, 5]"],
        weights={"weight_hh_l1_reverse": np.ones((24, 5))},
    )
    wrong(kind, ValueError, ["bias_hh_l0", "[24]", "[23]"], weights={"bias_hh_l0": np.ones(23)})
    wrong(kind, ValueError, ["weight_ih_l1", "[24, 12]", "[24, 6]"], weights={"weight_ih_l1": np.ones((24, 6))})
    wrong(kind, TypeError, ["bias_ih_l1", "float64", "float32"], weights={"bias_ih_l1": np.ones(24, np.float32)})
    wrong(kind, ValueError, ["weight_extra"], weights={"weight_extra": np.ones(3)})
    missing = {name: w for name, w in WEIGHTS.items() if name != "bias_hh_l1_reverse"}
    wrong(kind, ValueError, ["bias_hh_l1_reverse is missing"], only=missing)
    half = {name: w for name, w in WEIGHTS.items() if not name.startswith("bias_hh")}
    wrong(kind, ValueError, ["both biases"], only=half)
    wrong(kind, ValueError, ["weight_hh_l0", "matrix", "[24]"], weights={"weight_hh_l0": np.ones(24)})
    wrong(kind, TypeError, ["weights must be a mapping", "list"], only=list(WEIGHTS.values()))
    projected = cases.rnn_weights("lstm", 4, 6, proj=2)
    wrong(kind, ValueError, ["weight_hr_l0", "cell='lstm'", "'gru'"], only=projected, cell="gru")


@KIND
def test_words_and_parameters(kind: str) -> None:
    wrong(kind, ValueError, ["cell must be one of lstm, gru, got 'rnn'"], cell="rnn")
    wrong(kind, ValueError, ["pool must be one of last, first, mean", "'sum'"], pool="sum")
    wrong(kind, ValueError, ["combine must be one of concat, average, sum, got 'add'"], combine="add")
    wrong(kind, ValueError, ["attention", "pool='attention'", "None"], pool="attention")
    wrong(kind, ValueError, ["attention must be None", "pool='mean'"], attention=np.ones(12))
    wrong(kind, ValueError, ["attention", "[12]", "[6]"], pool="attention", attention=np.ones(6))
    wrong(kind, ValueError, ["gpo", "pool='gpo'", "None"], pool="gpo")
    wrong(
        kind, ValueError, ["gpo must be a mapping", "linear.weight"], pool="gpo", gpo={"gru.weight_ih_l0": np.ones(3)}
    )
    wide = {**GPO, "linear.weight": np.ones((1, 9))}
    wrong(kind, ValueError, ["linear.weight", "[1, 5]", "[1, 9]"], pool="gpo", gpo=wide)
    odd = {name: w[:, :5] if "weight_ih" in name else w for name, w in GPO.items()}
    wrong(kind, ValueError, ["gru.weight_ih_l0", "even", "5"], pool="gpo", gpo=odd)
    wrong(kind, ValueError, ["h0", "[4, 3, 6]", "[4, 2, 6]"], h0=np.zeros((4, 2, 6)))
    wrong(kind, ValueError, ["c0", "[4, 3, 6]", "[2, 3, 6]"], c0=np.zeros((2, 3, 6)))
    gru = cases.rnn_weights("gru", 4, 6)
    wrong(kind, ValueError, ["c0 must be None", "'gru'"], only=gru, cell="gru", c0=np.zeros((1, 3, 6)))
    wrong(kind, ValueError, ["residual", "4", "12"], residual=True)
    wrong(kind, ValueError, ["normalize_states", "'last'"], normalize_states=True, pool="last")
    wrong(kind, ValueError, ["dropout", "2"], dropout=2)
    wrong(kind, ValueError, ["legacy_padding", "padded"], x=X[0], lengths=None, legacy_padding=True)


def test_numpy_has_no_dropout() -> None:
    wrong("numpy", NotImplementedError, ["dropout must be 0", "0.5"], dropout=0.5)


def test_mixed_devices() -> None:
    meta = torch.zeros(4, 3, 6, dtype=torch.float64, device="meta")
    wrong("torch", ValueError, ["h0", "cpu", "meta"], h0=meta)
    wrong("torch", ValueError, ["bias_ih_l0", "cpu", "meta"], weights={"bias_ih_l0": torch.zeros(24, device="meta")})


def test_sequences_that_know_their_lengths() -> None:
    packed = pack_padded_sequence(torch.from_numpy(X), torch.tensor([5, 4, 3]), batch_first=True)
    weights = convert(WEIGHTS, "torch")
    raises(
        ValueError, ["lengths must be None", "PackedSequence"], lambda: pycm.temporal_pool(packed, (5, 4, 3), weights)
    )
    raises(
        ValueError,
        ["legacy_padding", "PackedSequence"],
        lambda: pycm.temporal_pool(packed, None, weights, legacy_padding=True),
    )
    nested = torch.nested.nested_tensor([torch.zeros(2, 3, 4), torch.zeros(1, 3, 4)], layout=torch.jagged)
    raises(ValueError, ["nested", "4 dim"], lambda: pycm.temporal_pool(nested, None, weights))


@KIND
def test_pools_alone(kind: str) -> None:
    x = convert(X, kind)
    raises(ValueError, ["pool_states: pool must be one of mean", "'last'"], lambda: pycm.pool_states(x, 5, "last"))
    raises(ValueError, ["pool_states: lengths", "[0, 5]", "9"], lambda: pycm.pool_states(x, (1, 9, 0), "mean"))
    raises(ValueError, ["pool_states: attention"], lambda: pycm.pool_states(x, 5, "attention"))
    weight = convert(np.ones(3), kind)
    raises(ValueError, ["attention", "[4]", "[3]"], lambda: pycm.pool_states(x, 5, "attention", attention=weight))


def test_operators_that_keep_nothing_refuse_a_gradient() -> None:
    weights = [torch.from_numpy(WEIGHTS[f"{kind}_l0"]).requires_grad_() for kind in ("weight_ih", "weight_hh")]
    x, starts = torch.from_numpy(X[0]), torch.tensor([0, 5])
    raises(
        ValueError,
        ["temporal_pool", "keep_reserve"],
        lambda: torch.ops.pycm.temporal_pool(
            x, starts, *weights, None, None, None, None, None, None, "lstm", "mean", False, True, False
        ),
    )


@KIND
def test_what_no_array_can_be_made_of(kind: str) -> None:
    for lengths in ("abc", [None, 3, 2], [[5], [3, 1], [2]]):
        with pytest.raises((TypeError, ValueError), match="temporal_pool: lengths must"):
            pycm.temporal_pool(convert(X, kind), lengths, convert(WEIGHTS, kind))
    for scalar in (np.int64(5), np.array(5)):
        assert pycm.temporal_pool(convert(X, kind), scalar, convert(WEIGHTS, kind)).shape == (3, 12)
        wrong(kind, ValueError, ["lengths must be given row by row", "got 5"], x=X[0], lengths=scalar)
    wrong(kind, TypeError, ["dropout must be a number, got str"], dropout="a")


@KIND
def test_dtypes_of_states_and_pool_parameters(kind: str) -> None:
    for dtype in (np.int64, bool, np.complex128, np.float32):
        name = np.dtype(dtype).name
        wrong(kind, TypeError, ["h0 must be float64", name], h0=np.zeros((4, 3, 6), dtype))
        wrong(kind, TypeError, ["c0 must be float64", name], c0=np.zeros((4, 3, 6), dtype))
        wrong(kind, TypeError, ["attention must be", name], pool="attention", attention=np.zeros(12, dtype))
        changed = {**GPO, "linear.weight": GPO["linear.weight"].astype(dtype)}
        wrong(kind, TypeError, ["gpo's linear.weight must be", name], pool="gpo", gpo=changed)
    x, w = convert(X.astype(np.float32), kind), convert(cases.cast(WEIGHTS, np.float32), kind)
    half = convert(np.zeros((4, 3, 6), np.float16), kind)
    assert pycm.temporal_pool(x, 5, w, h0=half).shape == (3, 12)
    words = ["temporal_pool: h0 must be float32 or float16 or bfloat16 with float32 x, got float64"]
    raises(TypeError, words, lambda: pycm.temporal_pool(x, 5, w, h0=convert(np.zeros((4, 3, 6)), kind)))


def test_sparse_tensors_and_states_of_a_module() -> None:
    sparse = torch.from_numpy(X[0]).to_sparse()
    raises(TypeError, ["x must be dense"], lambda: pycm.temporal_pool(sparse, None, convert(WEIGHTS, "torch")))
    x, state = torch.randn(3, 5, 4), torch.zeros(1, 3, 6)
    for count in (1, 2, 3):
        gru = pycm.nn.TemporalPool(4, 6, "gru")
        words = ["TemporalPool: hx must be the tensor h0 for a GRU", f"tuple of {count}"]
        raises(TypeError, words, lambda gru=gru, count=count: gru(x, 5, (state,) * count))
    lstm = pycm.nn.TemporalPool(4, 6)
    raises(TypeError, ["hx must be a pair", "tuple of 3"], lambda: lstm(x, 5, (state,) * 3))
    raises(TypeError, ["TemporalPool: hidden_size must be an int, got float"], lambda: pycm.nn.TemporalPool(4, 6.0))
