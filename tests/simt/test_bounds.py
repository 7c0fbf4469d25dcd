"""The screen's error bound, met nearly exactly: matches that a bound a fifth smaller loses, which .ci/run proves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pycm import reference
from simt.searches import compressed

PAIRS = 127  # of dimensions


def adversary() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A query, its best match, and a row whose code scores as much better as the bounds of both rows allow for.

    The query has its code's length, 2^13, so that its elements are rounded as they are: half of them to 512, half to
    512.5, all from 512.25. Elements of the rows are rounded from 1 + 2^-11 likewise, to opposite sides. All that is
    lost adds up.
    """
    low, high = np.float32(512.25), np.float32(1 + 2.0**-11)
    odd, even = slice(1, 2 * PAIRS, 2), slice(0, 2 * PAIRS, 2)
    query, best = np.zeros(2 * PAIRS + 2, np.float32), np.zeros(2 * PAIRS + 2, np.float32)
    query[even], query[odd] = np.nextafter(low, np.float32(0)), np.nextafter(low, np.float32(np.inf))
    best[even], best[odd] = np.nextafter(high, np.float32(0)), -np.nextafter(high, np.float32(np.inf))
    query[2 * PAIRS :] = np.sqrt((2.0**26 - np.square(query, dtype=np.float64).sum()) / 2)
    other = -best
    best[-1] = 2.0**-12
    exact = reference.similarity(query[None], np.stack([best, other]), "dot")[0]
    coded = query.astype(np.float16).astype(float) @ np.stack([best, other]).astype(np.float16).astype(float).T
    assert exact[0] > exact[1]
    assert coded[1] - coded[0] > 250
    return torch.from_numpy(query), torch.from_numpy(best), torch.from_numpy(other)


def gallery_with(rows: dict[int, torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """Rows that score far less, and these."""
    gallery = -like / 2**13 - torch.rand(700, len(like), generator=torch.Generator().manual_seed(1))
    for index, row in rows.items():
        gallery[index] = row
    return gallery


@pytest.mark.parametrize("place", [0, 350, 699])
def test_topk_keeps_a_match_at_the_edge_of_its_bound(cuda: Any, place: int) -> None:
    query, best, other = adversary()
    rows = {place: best} | {index: other for index in range(1, 699, 50) if index != place}
    gallery = gallery_with(rows, query)
    scores, indices = cuda.topk(query[None], gallery, 1, "dot", None, None, None, "exact", "auto")
    want = reference.topk(query.numpy()[None], gallery.numpy(), 1, "dot")
    assert indices.tolist() == [[place]]
    assert scores.numpy().tobytes() == want.scores.tobytes()


def test_rank_counts_no_pair_within_its_bound(cuda: Any) -> None:
    query, best, other = adversary()
    gallery = gallery_with({5: best, 600: other}, query)
    greater, _, _ = cuda.rank(query[None], gallery, *compressed([[5]]), "dot", None, None, None, "auto")
    assert greater.tolist() == [0]
    greater, _, _ = cuda.rank(query[None], gallery, *compressed([[600]]), "dot", None, None, None, "auto")
    assert greater.tolist() == [1]
