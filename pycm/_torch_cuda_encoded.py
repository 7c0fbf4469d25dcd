"""Rows on a CUDA device, encoded once for many searches."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pycm import _torch_cuda
from pycm._device import compressed, to_host
from pycm.functional import DISTANCES

Array = npt.NDArray[Any]
Int64 = npt.NDArray[np.int64]

_FIRST = 64  # matches of a query that a join looks at first
_WIDENED = 1 << 22  # matches held at once


class EncodedGallery:
    """Rows on a device, encoded once for many searches: `_C.EncodedGallery` for CUDA tensors.

    What changes it waits for the device once, so that searches on any stream find it done; searches wait for nothing.
    """

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self._rows: Tensor | None = None
        self._encoded: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self._rows is None else len(self._rows)

    def extend(self, rows: Tensor) -> None:
        """Takes the place of the rows before: all are encoded again, at about the rate of a copy."""
        self._encoded = _torch_cuda.encode(rows, self.metric)
        self._rows = rows
        _torch_cuda.wait_for(rows)

    def topk(
        self,
        queries: Tensor,
        k: int,
        mask: Tensor | None = None,
        exclude: Tensor | None = None,
        exclude_offsets: Tensor | None = None,
        precision: str = "exact",
    ) -> tuple[Tensor, Tensor]:
        rows, encoded = self._kept()
        return _torch_cuda.topk(
            queries, rows, k, self.metric, mask, exclude, exclude_offsets, precision, "auto", encoded
        )

    def rank(
        self,
        queries: Tensor,
        positives: Tensor,
        offsets: Tensor,
        mask: Tensor | None = None,
        exclude: Tensor | None = None,
        exclude_offsets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, encoded = self._kept()
        return _torch_cuda.rank(
            queries, rows, positives, offsets, self.metric, mask, exclude, exclude_offsets, "auto", encoded
        )

    def _kept(self) -> tuple[Tensor, Tensor]:
        """The memory of a search, which outlives it on its stream though rows be added meanwhile."""
        assert self._rows is not None
        assert self._encoded is not None
        for tensor in (self._rows, self._encoded):
            if tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return self._rows, self._encoded


class HostResults:
    """An encoded gallery on a device whose results, and compressed rows, are arrays of the host.

    It has the methods of `_C.EncodedGallery`; queries and masks are tensors of the device.
    """

    def __init__(self, encoded: EncodedGallery) -> None:
        self._encoded = encoded

    def topk(
        self,
        queries: Tensor,
        k: int,
        mask: Tensor | None,
        excluded: Int64 | None,
        offsets: Int64 | None,
        *,
        precision: str = "exact",
        num_threads: int = 0,
    ) -> tuple[Array, Int64]:
        exclude = compressed(excluded, offsets, queries.device)
        scores, rows = self._encoded.topk(queries, k, mask, *exclude, precision)
        return to_host(scores), to_host(rows)

    def rank(
        self,
        queries: Tensor,
        positives: Int64,
        offsets: Int64,
        mask: Tensor | None,
        excluded: Int64 | None,
        excluded_offsets: Int64 | None,
        *,
        num_threads: int = 0,
    ) -> tuple[Array, ...]:
        some = compressed(positives, offsets, queries.device)
        exclude = compressed(excluded, excluded_offsets, queries.device)
        return tuple(to_host(part) for part in self._encoded.rank(queries, *some, mask, *exclude))

    def join(
        self, queries: Tensor, threshold: float, after: int, limit: int, num_threads: int = 0
    ) -> tuple[Int64, Int64, Array]:
        """Query rows, indices and scores of all pairs that reach the threshold, ordered by query, then by index.

        `after`: query i only meets rows above after + i, for joins of rows with themselves; -1 for all.

        Each query's best matches, four times as many as long as the last of them reaches the threshold.
        """
        rows = len(self._encoded)
        distance = self._encoded.metric in DISTANCES
        found: list[tuple[Int64, Int64, Array]] = []
        pending, width, held = np.arange(len(queries)), min(_FIRST, rows), 0
        while len(pending):
            unsettled = []
            for chosen in np.split(pending, range(step := max(1, _WIDENED // width), len(pending), step)):
                scores, indices = self.topk(queries[chosen], width, None, None, None)
                wide = scores.astype(np.float64)
                reach = (indices >= 0) & (wide <= threshold if distance else wide >= threshold)
                more = reach[:, -1].copy() if width < rows else np.zeros(len(chosen), bool)
                if after >= 0:
                    reach &= indices > after + chosen[:, None]
                reach[more] = False
                query, place = np.nonzero(reach)
                held += len(query)
                if held > limit:
                    raise ValueError(f"join: more than {limit} pairs")
                found.append((chosen[query], indices[query, place], scores[query, place]))
                unsettled.append(chosen[more])
            pending, width = np.concatenate(unsettled), min(4 * width, rows)
        query_rows, indices, scores = (np.concatenate(parts) for parts in zip(*found, strict=True))
        order = np.lexsort((indices, query_rows))
        return query_rows[order], indices[order], scores[order]
