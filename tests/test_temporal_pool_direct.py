"""The shortest way to temporal pooling's kernel gives what the whole way gives, and is left where that differs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from torch_cases import raises

import pycm

torch = pytest.importorskip("torch")
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from pycm import _torch_sequences, _torch_temporal_direct  # noqa: E402

BATCH, STEPS, DIM, HIDDEN = 5, 7, 6, 9


class Watched(TorchDispatchMode):
    """Sees every operator, so that the whole way is gone."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def weights_of(cell: str, dtype: Any, biases: bool = True) -> dict[str, Any]:
    rnn = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[cell](DIM, HIDDEN, bias=biases)
    return dict(rnn.to(dtype).named_parameters())


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call, whether it went straight."""
    taken: list[bool] = []

    def watch(*arguments: Any) -> Any:
        pooled = _torch_temporal_direct.direct(*arguments)
        taken.append(pooled is not None)
        return pooled

    monkeypatch.setattr(_torch_sequences, "direct", watch)
    return taken


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("pool", ["mean", "max", "last", "first", "meanmax", "lastmean"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_both_ways_give_the_same_bits(cell: Any, pool: Any, dtype: str, ways: list[bool]) -> None:
    weights = weights_of(cell, getattr(torch, dtype))
    plain = torch.randn(BATCH, STEPS, DIM).to(getattr(torch, dtype))
    lengths = torch.tensor([7, 0, 3, 1, 7])
    views = (plain, plain.transpose(0, 1).contiguous().transpose(0, 1), torch.cat([plain, plain], 2)[..., ::2])
    for x in (*views, torch._neg_view(plain)):
        for counts in (lengths, lengths.int(), 6):
            with torch.no_grad(), Watched():
                want = pycm.temporal_pool(x, counts, weights, cell, pool)
            with torch.no_grad():
                got = pycm.temporal_pool(x, counts, weights, cell, pool)
            assert got.dtype == want.dtype
            assert torch.equal(got, want)
    assert ways == [False, True] * 12


def test_what_else_is_asked_for_goes_the_whole_way(ways: list[bool]) -> None:
    weights, bare = weights_of("lstm", torch.float32), weights_of("lstm", torch.float32, biases=False)
    x, lengths = torch.randn(BATCH, STEPS, DIM), torch.tensor([7, 2, 3, 1, 7])
    state = torch.zeros(1, BATCH, HIDDEN)
    with torch.no_grad():
        for w in (weights, bare):
            pycm.temporal_pool(x, lengths, w, "lstm")
        straight = pycm.temporal_pool(x, lengths, weights, "lstm")
        assert ways == [False, False, True]
        calls: list[Callable[[], Any]] = [
            lambda: pycm.temporal_pool(x, np.int64(7), weights, "lstm"),
            lambda: pycm.temporal_pool(x, lengths, bare, "lstm"),
            lambda: pycm.temporal_pool(x, lengths, weights, "lstm", "none"),
            lambda: pycm.temporal_pool(x, lengths, weights, "lstm", h0=state),
            lambda: pycm.temporal_pool(x, lengths, weights, "lstm", normalize=True),
            lambda: pycm.temporal_pool(x, lengths, weights, "lstm", return_state=True),
            lambda: pycm.temporal_pool(x.transpose(0, 1), lengths, weights, "lstm", batch_first=False),
            lambda: pycm.temporal_pool(x, lengths, weights, "lstm", legacy_padding=True),
        ]
        for call in calls:
            call()
        with torch.autocast("cpu", torch.bfloat16):
            assert pycm.temporal_pool(x, lengths, weights, "lstm").dtype == torch.bfloat16
    assert pycm.temporal_pool(x, lengths, weights, "lstm").requires_grad
    assert not any(ways[3:])
    with torch.no_grad():
        weights["weight_hh_l0"].mul_(2)
        assert not torch.equal(pycm.temporal_pool(x, lengths, weights, "lstm"), straight)


def test_the_default_device_is_not_asked(ways: list[bool]) -> None:
    weights = weights_of("gru", torch.float32)
    x, lengths = torch.randn(BATCH, STEPS, DIM), torch.full((BATCH,), STEPS)
    with torch.no_grad():
        want = pycm.temporal_pool(x, lengths, weights, "gru")
        with torch.device("meta"):
            got = pycm.temporal_pool(x, lengths, weights, "gru")
    assert ways == [False, True]
    assert torch.equal(got, want)


def test_errors_are_the_same_once_the_weights_are_known() -> None:
    weights = weights_of("gru", torch.float32)
    x, lengths = torch.randn(BATCH, STEPS, DIM), torch.full((BATCH,), STEPS)
    with torch.no_grad():
        pycm.temporal_pool(x, lengths, weights, "gru")

    def call(x: Any = x, lengths: Any = lengths, weights: Any = weights, cell: Any = "gru") -> Callable[[], Any]:
        return lambda: pycm.temporal_pool(x, lengths, weights, cell)

    with torch.no_grad():
        raises(ValueError, ["lengths", "[0, 7]", "8", "row 4"], call(lengths=lengths + torch.tensor([0, 0, 0, 0, 1])))
        raises(ValueError, ["lengths", "[0, 7]", "8"], call(lengths=8))
        raises(TypeError, ["lengths", "bool"], call(lengths=True))
        raises(ValueError, ["lengths", "-1"], call(lengths=lengths - 8))
        raises(ValueError, ["lengths", "[5]"], call(lengths=lengths[:3]))
        raises(TypeError, ["lengths", "integers"], call(lengths=lengths.float()))
        raises(TypeError, ["dense"], call(lengths=lengths.to_sparse()))
        raises(ValueError, ["6 features", "5"], call(x=x[..., :5]))
        raises(TypeError, ["dtype"], call(x=x.double()))
        raises(ValueError, ["weight"], call(cell="lstm"))
        raises(ValueError, ["more"], call(weights={**weights, "weight_ih_l2": x}))
