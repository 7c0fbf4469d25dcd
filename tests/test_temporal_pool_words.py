"""Temporal pooling of words: the same as pooling the vectors that their ids name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from temporal_cases import CELLS, rnn_weights
from torch.nn.utils.rnn import pack_sequence

import pycm

LENGTHS = torch.tensor([4, 0, 7, 1])
BEYOND = 1 << 40  # no id


@pytest.fixture
def ids() -> torch.Tensor:
    found = torch.randint(0, 11, (4, 7), generator=torch.Generator().manual_seed(0))
    found[torch.arange(7) >= LENGTHS[:, None]] = BEYOND
    return found


@pytest.fixture
def embedding() -> torch.Tensor:
    return torch.randn(11, 5, generator=torch.Generator().manual_seed(1))


def ragged(ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([row[:length] for row, length in zip(ids, LENGTHS, strict=True)])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("numpy", [False, True], ids=["torch", "numpy"])
def test_words_are_their_vectors(ids: torch.Tensor, embedding: torch.Tensor, cell: Any, numpy: bool) -> None:
    def of(value: Any) -> Any:
        return value.numpy() if numpy else value

    arrays = rnn_weights(cell, 5, 6, layers=2, bidirectional=True)
    weights = {name: of(torch.from_numpy(array).float()) for name, array in arrays.items()}
    every, steps = ragged(ids), {"lengths": LENGTHS.tolist()}
    for x, vectors, options in (
        (ids, embedding[ids.clamp(max=10)], steps),
        (ids.T, embedding[ids.T.clamp(max=10)], steps | {"batch_first": False}),
        (every, embedding[every], steps),
        (every[:4].int(), embedding[every[:4]], {"lengths": None}),
    ):
        for pool in ("meanmax", "none"):
            given = {"weights": weights, "cell": cell, "pool": pool, **options}
            found = pycm.temporal_pool(of(x), embedding=of(embedding), **given)
            assert np.array_equal(found, pycm.temporal_pool(of(vectors), **given))


def test_packed_words(ids: torch.Tensor, embedding: torch.Tensor) -> None:
    module = pycm.nn.TemporalPool(5, 6, pool="last")
    parts = [row[:length] for row, length in zip(ids, LENGTHS, strict=True) if length]
    found = module(pack_sequence(parts, enforce_sorted=False), embedding=embedding)
    want = module(pack_sequence([embedding[part] for part in parts], enforce_sorted=False))
    assert torch.equal(found, want)


def test_gradients(ids: torch.Tensor, embedding: torch.Tensor) -> None:
    module = pycm.nn.TemporalPool(5, 6, "gru", bidirectional=True)
    embedding.requires_grad_()
    parameters = [embedding, *module.parameters()]
    found = torch.autograd.grad(module(ids, LENGTHS, embedding=embedding).square().sum(), parameters)
    want = torch.autograd.grad(module(embedding[ids.clamp(max=10)], LENGTHS).square().sum(), parameters)
    assert found[0].any()
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b)


def test_legacy_padding_reads_the_padding(ids: torch.Tensor, embedding: torch.Tensor) -> None:
    module = pycm.nn.TemporalPool(5, 6, pool="last", bidirectional=True, legacy_padding=True)
    inside = ids.clamp(max=10)
    assert torch.equal(module(inside, LENGTHS, embedding=embedding), module(embedding[inside], LENGTHS))
    with pytest.raises(ValueError, match=r"temporal_pool: x must hold ids in \[0, 11\)"):
        module(ids, LENGTHS, embedding=embedding)


def test_autocast(ids: torch.Tensor, embedding: torch.Tensor) -> None:
    module = pycm.nn.TemporalPool(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        found, want = module(ids, LENGTHS, embedding=embedding), module(embedding[ids.clamp(max=10)], LENGTHS)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, want)


def test_compiled(ids: torch.Tensor, embedding: torch.Tensor) -> None:
    module = pycm.nn.TemporalPool(5, 6)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(ids, LENGTHS, embedding=embedding), module(ids, LENGTHS, embedding=embedding))


@pytest.mark.parametrize("numpy", [False, True], ids=["torch", "numpy"])
def test_bad_words(ids: torch.Tensor, embedding: torch.Tensor, numpy: bool) -> None:
    weights = {name: torch.from_numpy(array).float() for name, array in rnn_weights("gru", 5, 6).items()}

    def run(x: Any, matrix: Any) -> Any:
        if numpy:
            return pycm.temporal_pool(x.numpy(), [4, 0, 7, 1], {k: w.numpy() for k, w in weights.items()}, "gru",
                                      embedding=matrix.numpy())  # fmt: skip
        return pycm.temporal_pool(x, LENGTHS, weights, "gru", embedding=matrix)

    for wrong in (-1, 11):
        changed = ids.clone()
        changed[2, 6] = wrong
        with pytest.raises(ValueError, match=rf"temporal_pool: x must hold ids in \[0, 11\).*, got {wrong}"):
            run(changed, embedding)
    with pytest.raises(ValueError, match="temporal_pool: embedding must"):
        run(ids, embedding[0])
    with pytest.raises(TypeError, match="temporal_pool: x must"):
        run(ids.float(), embedding)
    with pytest.raises(ValueError, match="weight_ih_l0"):
        run(ids, embedding[:, :4])
