"""The modules: parameters of torch, by torch's names, in both directions."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from tolerances import TEMPORAL
from torch_cases import raises

import pycm

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

RNNS = {"lstm": nn.LSTM, "gru": nn.GRU}
KINDS: list[dict[str, Any]] = [
    {},
    {"num_layers": 3, "bidirectional": True},
    {"bias": False, "bidirectional": True},
    {"num_layers": 2, "proj_size": 4},
]
SHAPES = pytest.mark.parametrize(
    ("cell", "kinds"), [(c, k) for c in RNNS for k in KINDS if c == "lstm" or "proj_size" not in k]
)
X = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([8, 3, 5])


@SHAPES
def test_state_dict_both_ways(cell: str, kinds: dict[str, Any]) -> None:
    torch.manual_seed(1)
    rnn = RNNS[cell](6, 10, batch_first=True, **kinds)
    torch.manual_seed(1)
    module = pycm.nn.TemporalPool(6, 10, cell, "mean", **kinds)
    assert list(module.state_dict()) == list(rnn.state_dict())
    for ours, theirs in zip(module.parameters(), rnn.parameters(), strict=True):  # the same seed, the same values
        assert torch.equal(ours, theirs)
    other = pycm.nn.TemporalPool(6, 10, cell, "mean", **kinds)
    other.load_state_dict(rnn.state_dict())
    back = RNNS[cell](6, 10, batch_first=True, **kinds)
    back.load_state_dict(other.state_dict())
    for ours, theirs in zip(back.parameters(), rnn.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(other(X, 8), rnn(X)[0].mean(1), rtol=0, atol=TEMPORAL["float32"])


@SHAPES
def test_from_torch_shares_its_parameters(cell: str, kinds: dict[str, Any]) -> None:
    rnn = RNNS[cell](6, 10, batch_first=True, **kinds).double()
    module = pycm.nn.TemporalPool.from_torch(rnn, "last")
    for name, parameter in rnn.named_parameters():
        assert getattr(module, name) is parameter
    assert module.output_size == module(X.double(), LENGTHS).shape[1]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    module(X.double(), LENGTHS).square().sum().backward()
    optimizer.step()
    h_n = rnn(X.double())[1]
    h_n = h_n[0] if cell == "lstm" else h_n
    directions = 2 if kinds.get("bidirectional") else 1
    want = torch.cat(list(h_n[-directions:]), 1)
    torch.testing.assert_close(module(X.double(), 8), want, rtol=0, atol=TEMPORAL["float64"])


@pytest.mark.parametrize("pool", ["attention", "gpo"])
def test_from_torch_makes_the_pools_parameters(pool: str) -> None:
    rnn = nn.LSTM(6, 10, bidirectional=True).double()
    module = pycm.nn.TemporalPool.from_torch(rnn, pool, combine="sum")
    extra = [parameter for name, parameter in module.named_parameters() if name.startswith(pool)]
    assert extra
    assert all(parameter.dtype == torch.float64 and parameter.device.type == "cpu" for parameter in extra)
    assert all(parameter.isfinite().all() and parameter.abs().sum() > 0 for parameter in extra)
    assert not module.batch_first
    module(X.double().transpose(0, 1), LENGTHS).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize("pool", pycm.temporal.POOLS)
def test_copies_and_pickles(pool: str) -> None:
    module = pycm.nn.TemporalPool(6, 4, "gru", pool, bidirectional=True)
    want = module(X, LENGTHS)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(X, LENGTHS), want)
        assert repr(other) == repr(module)
        with torch.no_grad():
            other.weight_ih_l0 += 1
        assert not torch.equal(other(X, LENGTHS), want)
    assert torch.equal(module(X, LENGTHS), want)


def test_initial_and_final_state() -> None:
    lstm = nn.LSTM(6, 5, 2, batch_first=True)
    module = pycm.nn.TemporalPool.from_torch(lstm, "none")
    hx = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    for ours, theirs in zip(module(X, 8, hx, return_state=True), lstm(X, hx), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TEMPORAL["float32"])
    gru = nn.GRU(6, 5, batch_first=True)
    module = pycm.nn.TemporalPool.from_torch(gru, "none")
    for ours, theirs in zip(module(X, 8, hx[0][:1], return_state=True), gru(X, hx[0][:1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TEMPORAL["float32"])


def test_dropout_is_between_layers_in_training_alone() -> None:
    module = pycm.nn.TemporalPool(6, 200, num_layers=2, dropout=0.5)
    torch.manual_seed(2)
    first, second = module(X, LENGTHS), module(X, LENGTHS)
    assert not torch.equal(first, second)
    torch.manual_seed(2)
    assert torch.equal(module(X, LENGTHS), first)
    module.eval()
    still = module(X, LENGTHS)
    assert torch.equal(still, module(X, LENGTHS))
    still.sum().backward()  # in eval mode too
    assert module.weight_ih_l0.grad.abs().sum() > 0
    # Of the right size on average: what is left is scaled by 1 / (1 - p).
    module.train()
    many = torch.stack([module(X, LENGTHS) for _ in range(200)]).mean(0)
    assert (many - still).abs().mean() < 0.15 * still.abs().mean()
    all_dropped = pycm.nn.TemporalPool(6, 4, num_layers=2, dropout=1.0)
    bias_only = all_dropped(torch.zeros_like(X), LENGTHS)
    assert torch.equal(all_dropped(X, LENGTHS), bias_only)


def test_meta_and_dtype_arguments() -> None:
    module = pycm.nn.TemporalPool(6, 4, "gru", "gpo", device="meta", dtype=torch.bfloat16)
    assert all(p.device.type == "meta" and p.dtype == torch.bfloat16 for p in module.parameters())
    found = module(X.to("meta", torch.bfloat16), LENGTHS.to("meta"))
    assert found.shape == (3, 4)
    assert found.dtype == torch.bfloat16
    half = pycm.nn.TemporalPool(6, 4, "gru", "attention", dtype=torch.bfloat16)
    assert half(X.bfloat16(), LENGTHS).dtype == torch.bfloat16


def test_repr_names_what_is_not_the_default() -> None:
    module = pycm.nn.TemporalPool(6, 5, "gru", "max", bidirectional=True, combine="sum", normalize=True)
    assert repr(module) == (
        "TemporalPool(6, 5, cell='gru', pool='max', bidirectional=True, combine='sum', normalize=True)"
    )


def test_learns() -> None:
    """Which half of a sequence holds the pulse: the mean of the inputs does not say it, the states do."""
    torch.manual_seed(3)
    module, head = pycm.nn.TemporalPool(2, 8, "gru", "meanmax"), nn.Linear(16, 2)
    optimizer = torch.optim.Adam([*module.parameters(), *head.parameters()], lr=0.03)
    lengths = torch.randint(4, 12, (64,))
    place = (torch.rand(64) * lengths).long()
    x = torch.zeros(64, 12, 2)
    x[torch.arange(64), place, 0] = 1
    x[..., 1] = 1
    labels = (place >= lengths // 2).long()
    for _ in range(150):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(head(module(x, lengths)), labels)
        loss.backward()
        optimizer.step()
    assert (head(module(x, lengths)).argmax(1) == labels).float().mean() > 0.9


def test_wrong_arguments_are_named() -> None:
    pool = pycm.nn.TemporalPool
    raises(ValueError, ["TemporalPool", "hidden_size", "0"], lambda: pool(6, 0))
    raises(ValueError, ["TemporalPool", "cell", "lstm, gru", "'rnn'"], lambda: pool(6, 5, "rnn"))
    raises(ValueError, ["TemporalPool", "pool", "'median'"], lambda: pool(6, 5, pool="median"))
    raises(ValueError, ["TemporalPool", "combine", "'max'"], lambda: pool(6, 5, combine="max"))
    raises(ValueError, ["TemporalPool", "proj_size", "gru"], lambda: pool(6, 5, "gru", proj_size=2))
    raises(ValueError, ["TemporalPool", "proj_size", "5"], lambda: pool(6, 5, proj_size=5))
    raises(ValueError, ["TemporalPool", "dropout", "1.5"], lambda: pool(6, 5, dropout=1.5))
    raises(ValueError, ["TemporalPool", "residual", "6", "10"], lambda: pool(6, 5, bidirectional=True, residual=True))
    raises(ValueError, ["residual", "'last'"], lambda: pool(6, 6, pool="last", residual=True))
    raises(ValueError, ["GPO", "d_pe", "5"], lambda: pycm.nn.GPO(5))
    raises(TypeError, ["from_torch", "RNN"], lambda: pool.from_torch(nn.RNN(3, 4), "mean"))
    raises(TypeError, ["hx", "(h0, c0)"], lambda: pool(6, 5)(X, LENGTHS, torch.zeros(1, 3, 5)))
    normed = nn.utils.parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    raises(TypeError, ["from_torch", "weight_hh_l0"], lambda: pool.from_torch(normed, "mean"))


def test_a_write_that_torch_does_not_count_is_seen() -> None:
    module = pycm.nn.TemporalPool(64, 64)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = module(x, 5)
        module.weight_hh_l0.data[:, 1:] = 0  # all columns but one, past the version counter
        after = module(x, 5)
        assert not torch.equal(before, after)
        assert torch.equal(after, copy.deepcopy(module)(x, 5))


@pytest.mark.parametrize("lengths", [5, torch.tensor(5), np.int64(5)], ids=["int", "tensor", "numpy"])
def test_one_length_for_all(lengths: Any) -> None:
    module = pycm.nn.TemporalPool(6, 4, pool="max")
    with torch.no_grad():
        assert torch.equal(module(X, lengths), module(X, torch.full((3,), 5)))


def test_vmap_runs_row_by_row() -> None:
    module = pycm.nn.TemporalPool(6, 4).requires_grad_(False)
    batches = torch.stack([X, 2 * X])
    lengths = torch.stack([LENGTHS, LENGTHS.flip(0)])
    mapped = torch.func.vmap(lambda x, counts: module(x, counts))(batches, lengths)
    assert torch.equal(mapped, torch.stack([module(x, counts) for x, counts in zip(batches, lengths, strict=True)]))


def test_habits_of_torch() -> None:
    module = pycm.nn.TemporalPool(6, 4, "lstm")
    module.flatten_parameters()
    raises(
        TypeError,
        ["TemporalPool: x must be a torch tensor or a PackedSequence, got ndarray"],
        lambda: module(X.numpy(), LENGTHS),
    )
    raises(
        ValueError,
        ["temporal_pool: x must have 6 features, as weight_ih_l0 has columns, got 5"],
        lambda: module(X[..., :5], LENGTHS),
    )
    state = [torch.randn(1, 3, 4), torch.randn(1, 3, 4)]
    assert torch.equal(module(X, LENGTHS, state), module(X, LENGTHS, tuple(state)))


@pytest.mark.parametrize("pool", ["max", "meanmax", "mean", "gpo"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_nan_at_any_step_stays(pool: str, at: int) -> None:
    x = torch.tensor([1.0, float("inf"), 2.0]).view(1, 3, 1).repeat(1, 1, 3)

    def pooled() -> torch.Tensor:
        with torch.no_grad():
            return (pycm.nn.GPO()(x, 3) if pool == "gpo" else pycm.pool_states(x, 3, pool)).view(-1, 3)

    assert not pooled().isnan().any()
    x[0, at, 1] = float("nan")
    assert pooled().isnan().tolist() == [[False, True, False]] * len(pooled())


def test_an_empty_batch_has_gradients() -> None:
    module = pycm.nn.TemporalPool(8, 6)
    x = torch.randn(0, 5, 8, requires_grad=True)
    module(x, torch.zeros(0, dtype=torch.long)).sum().backward()
    pycm.pool_states(x, torch.zeros(0, dtype=torch.long), "mean").sum().backward()
    pycm.maxsim(x, torch.randn(5, 6, 8)).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert not module.weight_hh_l0.grad.any()
