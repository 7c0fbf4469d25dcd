"""temporal_pool on tensors: the numbers of nn.LSTM and nn.GRU, every form of sequences, gradients, traces."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import temporal_cases as cases
from temporal_cases import CELLS
from tolerances import TEMPORAL, TEMPORAL_GRADIENT
from torch_cases import raises

import pycm

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

RNNS = {"lstm": nn.LSTM, "gru": nn.GRU}
LENGTHS = (5, 2, 7, 1)
CELL = pytest.mark.parametrize("cell", CELLS)


def rnn_of(cell: str, inputs: int = 6, hidden: int = 10, seed: int = 0, **kinds: Any) -> Any:
    torch.manual_seed(seed)
    return RNNS[cell](inputs, hidden, batch_first=True, **kinds)


def frames(lengths: Any = LENGTHS, inputs: int = 6, seed: int = 1, dtype: Any = torch.float32) -> torch.Tensor:
    """Padded with NaN."""
    parts = cases.sequences(lengths, inputs, seed)
    return torch.from_numpy(cases.pad(parts)).to(dtype)


def states_of(rnn: Any, x: torch.Tensor, lengths: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """torch's own states, [B, T, F], and which of them are valid; the padding is never shown to it."""
    lengths = torch.as_tensor(lengths)
    packed = pack_padded_sequence(torch.nan_to_num(x), lengths, batch_first=True, enforce_sorted=False)
    out, state = rnn(packed)
    valid = torch.arange(x.shape[1]) < lengths[:, None]
    return pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])[0], valid[..., None], state


def plain_pool(states: torch.Tensor, valid: torch.Tensor, state: Any, pool: str) -> torch.Tensor:
    if pool == "mean":
        return (states * valid).sum(1) / valid.sum(1)
    if pool == "max":
        return states.masked_fill(~valid, -torch.inf).amax(1)
    h_n = state[0] if isinstance(state, tuple) else state
    return torch.cat(list(h_n[-2:]), 1) if states.shape[2] > h_n.shape[2] else h_n[-1]


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    """Relative to the largest value."""
    error = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-3)
    assert error <= tolerance, error


# ---- against torch's own: at sizes; everything else is in test_temporal_pool_accuracy.py ----


@CELL
@pytest.mark.parametrize(
    ("batch", "steps", "hidden"), [(1, 128, 7), (7, 2, 65), (8, 1, 16), (9, 127, 12), (129, 3, 20)]
)
def test_gradients_at_sizes(cell: str, batch: int, steps: int, hidden: int) -> None:
    rnn = rnn_of(cell, 5, hidden)
    lengths = 1 + np.random.default_rng(3).integers(0, steps, batch)
    lengths[0] = steps
    x = frames(lengths.tolist(), 5).requires_grad_()
    inputs = [x, *rnn.parameters()]
    mine = pycm.temporal_pool(x, lengths, dict(rnn.named_parameters()), cell, "lastmean")
    states, valid, state = states_of(rnn, x, lengths)
    theirs = torch.cat([plain_pool(states, valid, state, pool) for pool in ("last", "mean")], 1)
    weight = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(4))
    for ours, want in zip(
        torch.autograd.grad(mine, inputs, weight), torch.autograd.grad(theirs, inputs, weight), strict=True
    ):
        close(ours, want, TEMPORAL_GRADIENT)


# ---- every form of sequences ----


@pytest.mark.parametrize("pool", ["mean", "attention", "gpo", "none"])
@CELL
def test_forms(cell: str, pool: str) -> None:
    rnn = rnn_of(cell, bidirectional=True, num_layers=2)
    weights = rnn.state_dict()
    generator = torch.Generator().manual_seed(5)
    options: dict[str, Any] = {
        "attention": torch.randn(20, generator=generator) if pool == "attention" else None,
        "gpo": {k: torch.from_numpy(w).float() for k, w in cases.gpo_weights().items()} if pool == "gpo" else None,
        "h0": torch.randn(4, 4, 10, generator=generator),
        "return_state": True,
    }
    x = frames()
    ragged = torch.cat([row[:length] for row, length in zip(x, LENGTHS, strict=True)])
    starts = torch.tensor(cases.offsets([range(length) for length in LENGTHS]))
    want, state = pycm.temporal_pool(ragged, None, weights, cell, pool, cu_seqlens=starts, **options)
    h_n = state[0] if cell == "lstm" else state

    def check(found: Any, values: Any) -> None:
        pooled, state = found
        assert torch.equal(values(pooled) if pool == "none" else pooled, want)
        assert torch.equal(state[0] if cell == "lstm" else state, h_n)

    def unpad(states: torch.Tensor) -> torch.Tensor:
        assert not any(row[length:].any() for row, length in zip(states, LENGTHS, strict=True))
        return torch.cat([row[:length] for row, length in zip(states, LENGTHS, strict=True)])

    call = pycm.temporal_pool
    check(call(x, torch.tensor(LENGTHS, dtype=torch.int32), weights, cell, pool, **options), unpad)
    check(call(x, list(LENGTHS), weights, cell, pool, **options), unpad)
    turned = x.transpose(0, 1).contiguous()
    check(
        call(turned, LENGTHS, weights, cell, pool, batch_first=False, **options), lambda s: unpad(s.transpose(0, 1))
    )  # fmt: skip
    check(call(ragged, LENGTHS, weights, cell, pool, **options), lambda s: s)
    for enforce_sorted in (False, True):
        order = torch.argsort(torch.tensor(LENGTHS), descending=True) if enforce_sorted else torch.arange(4)
        packed = pack_padded_sequence(
            x[order], torch.tensor(LENGTHS)[order], batch_first=True, enforce_sorted=enforce_sorted
        )  # fmt: skip
        back = torch.argsort(order)
        pooled, state = call(packed, None, weights, cell, pool, **{**options, "h0": options["h0"][:, order]})
        assert torch.equal((state[0] if cell == "lstm" else state)[:, back], h_n)
        if pool == "none":
            states, lengths = pad_packed_sequence(pooled, batch_first=True)
            assert lengths[back].tolist() == list(LENGTHS)
            assert torch.equal(unpad(states[back]), want)
        else:
            assert torch.equal(pooled[back], want)
    rows = [row[:length] for row, length in zip(x, LENGTHS, strict=True)]
    for layout in (torch.jagged, torch.strided):
        nested = torch.nested.as_nested_tensor(rows, layout=layout)
        check(call(nested, None, weights, cell, pool, **options), lambda s: torch.cat(s.unbind()))


@CELL
def test_a_single_sequence_and_full_rows(cell: str) -> None:
    rnn = rnn_of(cell)
    x = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(6))
    weights = rnn.state_dict()
    full = pycm.temporal_pool(x, 7, weights, cell, "mean")
    torch.testing.assert_close(full, rnn(x)[0].mean(1), rtol=0, atol=TEMPORAL["float32"])
    h0 = torch.randn(1, 10)
    pooled, state = pycm.temporal_pool(x[0], None, weights, cell, "last", h0=h0, return_state=True)
    c0 = torch.zeros(1, 10)
    out, want = rnn(x[0], (h0, c0) if cell == "lstm" else h0)
    torch.testing.assert_close(pooled, out[-1], rtol=0, atol=TEMPORAL["float32"])
    torch.testing.assert_close(state, want, rtol=0, atol=TEMPORAL["float32"])


# ---- traces, transforms, casts ----


@pytest.mark.parametrize("pool", ["none", "gpo"])
def test_compile_without_a_break(pool: str) -> None:
    torch._dynamo.reset()
    module = pycm.nn.TemporalPool(6, 8, "gru", pool, num_layers=2 if pool == "none" else 1, bidirectional=True)
    x, lengths = torch.nan_to_num(frames()), torch.tensor(LENGTHS)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (slice(0, 4), slice(1, 4)):
        found, want = compiled(x[rows], lengths[rows]), module(x[rows], lengths[rows])
        torch.testing.assert_close(found, want, rtol=0, atol=TEMPORAL["float32"])
        parameters = list(module.parameters())
        for ours, theirs in zip(
            torch.autograd.grad(found.square().sum(), parameters), torch.autograd.grad(want.square().sum(), parameters),
            strict=True,
        ):  # fmt: skip
            close(ours, theirs, TEMPORAL_GRADIENT)


def test_export() -> None:
    module = pycm.nn.TemporalPool(6, 8, "lstm", "mean").eval()
    batch, steps = torch.export.Dim("batch"), torch.export.Dim("steps")
    x, lengths = torch.nan_to_num(frames()), torch.tensor(LENGTHS)
    program = torch.export.export(module, (x, lengths), dynamic_shapes=({0: batch, 1: steps}, {0: batch}))
    longer = torch.randn(6, 9, 6)
    lengths = torch.tensor([9, 0, 1, 2, 3, 4])
    assert torch.equal(program.module()(longer, lengths), module(longer, lengths))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    module = pycm.nn.TemporalPool(6, 8, "lstm", "gpo", bidirectional=True)
    x = frames()
    with torch.autocast("cpu", dtype=dtype):
        found = module(x, LENGTHS)
    assert found.dtype == dtype
    lower = pycm.temporal_pool(
        x.to(dtype), LENGTHS, {k: w.to(dtype) for k, w in module.weights().items()}, "lstm", "gpo",
        gpo=module.gpo.weights(),
    )  # fmt: skip
    assert torch.equal(found, lower)
    found.float().sum().backward()
    assert module.weight_ih_l0.grad.dtype == torch.float32
    double = pycm.nn.TemporalPool(6, 8, dtype=torch.float64)
    with torch.autocast("cpu", dtype=dtype):
        assert double(x.double(), LENGTHS).dtype == torch.float64


def test_transforms() -> None:
    weights = rnn_of("gru").state_dict()
    x = torch.randn(3, 5, 6)

    def call(row: torch.Tensor) -> Any:
        return pycm.temporal_pool(row, None, weights, "gru", "mean")

    assert torch.equal(torch.func.vmap(call)(x), pycm.temporal_pool(x, 5, weights, "gru", "mean"))
    raises(NotImplementedError, ["x", "forward-mode"], lambda: torch.func.jvp(call, (x[0],), (x[0],)))


def test_no_gradient_is_kept_where_none_is_asked() -> None:
    """Inference keeps neither states nor gates: the kernel is asked for none, and inference tensors work."""
    rnn, x = rnn_of("lstm"), frames()
    kept: list[tuple[bool, ...]] = []
    real = pycm._C.temporal_pool

    def watch(*arguments: Any) -> Any:
        states, reserve = arguments[9], arguments[12]
        kept.append((states is not None, reserve is not None))
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pycm._C, "temporal_pool", watch)
        with torch.no_grad():
            want = pycm.temporal_pool(x, LENGTHS, dict(rnn.named_parameters()), "lstm", "mean")
        pycm.temporal_pool(x, LENGTHS, dict(rnn.named_parameters()), "lstm", "mean")
    assert kept == [(False, False), (True, True)]
    with torch.inference_mode():
        weights = {name: w.clone() for name, w in rnn.named_parameters()}
        assert torch.equal(pycm.temporal_pool(x, LENGTHS, weights, "lstm", "mean"), want)
    assert not want.requires_grad


def test_the_operator_is_left_out_only_where_nobody_sees_it() -> None:
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    rnn, x = rnn_of("lstm"), frames()
    with torch.no_grad():
        want = pycm.temporal_pool(x, LENGTHS, dict(rnn.named_parameters()), "lstm", "mean")
        with Seen():
            got = pycm.temporal_pool(x, LENGTHS, dict(rnn.named_parameters()), "lstm", "mean")
    assert "pycm.temporal_pool.default" in names
    assert torch.equal(got, want)


# ---- packed weights are kept, and never old ----


def test_packed_weights_follow_the_parameters() -> None:
    rnn, x = rnn_of("lstm"), frames()
    weights = dict(rnn.named_parameters())

    def check() -> None:
        fresh = {name: w.detach().clone() for name, w in weights.items()}
        assert torch.equal(
            pycm.temporal_pool(x, LENGTHS, weights, "lstm", "mean"),
            pycm.temporal_pool(x, LENGTHS, fresh, "lstm", "mean"),
        )

    check()
    with torch.no_grad():
        rnn.weight_hh_l0[0, 1] += 1  # seen by the version alone: the sample has other values
        check()
        rnn.weight_ih_l0.data.mul_(0.5)  # the version does not see it
        check()
        rnn.bias_hh_l0.numpy()[:] += 1
        check()
        rnn.weight_hh_l0.data = rnn.weight_hh_l0 + 1
        check()
    optimizer = torch.optim.SGD(rnn.parameters(), lr=1.0)
    pycm.temporal_pool(x, LENGTHS, weights, "lstm", "mean").sum().backward()
    optimizer.step()
    check()


def test_packed_weights_are_kept(packed: list[str]) -> None:
    weights = rnn_of("gru", bidirectional=True).state_dict()
    for _ in range(3):
        pycm.temporal_pool(frames(), LENGTHS, weights, "gru", "mean")
    assert len(packed) == 2


def test_an_array_without_elements_may_have_any_strides() -> None:
    x = torch.from_numpy(np.concatenate([np.empty((0, 4), np.float32)]))
    assert x.stride() == (0, 0)
    weights = dict(nn.LSTM(4, 3).named_parameters())
    assert pycm.temporal_pool(x, [0, 0], weights, "lstm", "none").shape == (0, 3)
    assert torch.equal(pycm.temporal_pool(x, [0, 0], weights, "lstm"), torch.zeros(2, 3))
