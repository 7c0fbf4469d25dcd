"""A row's results and gradients do not depend on the rows beside it, to the bit: in every dtype, and in training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from test_temporal_pool_accuracy import PAIRS, POOL, Case, by_pycm, case_of, torch, ways_of
from torch import Tensor

# Three threads own rows of all of these, and share the units where there are fewer; the steps are more than a chunk's.
LENGTHS = [14, *np.random.default_rng(9).integers(0, 14, 38).tolist()]
ROW = 5
PICKS = ([ROW], [38, ROW], [*range(1, 39, 2)], np.random.default_rng(10).permutation(39).tolist())


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def rows_of(batch: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
    """Of x or what is pooled, [B, ...], and of states, [layers, B, ...]."""
    return [batch[0][rows], *(states[:, rows] for states in batch[1:])]


def inputs(case: Case) -> list[Tensor]:
    return list(case.part("x", "h0", "c0").values())


def picked(case: Case, rows: Sequence[int]) -> Case:
    values = dict(zip(case.part("x", "h0", "c0"), rows_of(inputs(case), rows), strict=True))
    return case._replace(tensors={**case.tensors, **values}, lengths=case.lengths[rows]).to(values["x"].dtype)


def trained(case: Case, ways: Sequence[Tensor]) -> list[list[Tensor]]:
    """Results, and gradients of the inputs."""
    results = by_pycm(case)
    return [list(results), list(torch.autograd.grad(results, inputs(case), ways))]


def same_bits(found: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float32], ids=["bf16", "fp64", "fp32"])
@POOL
@pytest.mark.parametrize(("cell", "shape"), [pair for pair in PAIRS if pair[1] in ("one", "projection", "concat")])
def test_rows_beside_a_row_change_no_bit(cell: str, shape: str, pool: str, dtype: Any) -> None:
    case = case_of(cell, pool, shape, LENGTHS, hidden=136).to(dtype)
    ways = [way.to(dtype) for way in ways_of(by_pycm(case))]
    whole = trained(case, ways)
    for rows in PICKS:
        found = trained(picked(case, rows), rows_of(ways, rows))
        for ours, want in zip(found, whole, strict=True):
            same_bits(ours, rows_of(want, rows))
        with torch.no_grad():
            same_bits(by_pycm(picked(case, rows)), rows_of(whole[0], rows))

    others = [row for row in range(len(LENGTHS)) if row != ROW]
    only = [way.index_fill(min(i, 1), torch.tensor(others), 0) for i, way in enumerate(ways)]
    _, gradients = trained(case, only)
    same_bits(rows_of(gradients, [ROW]), rows_of(whole[1], [ROW]))
    assert not any(part.any() for part in rows_of(gradients, others))
