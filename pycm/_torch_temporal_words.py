"""Words as the steps of temporal pooling: ids and the vectors they name.

A step of the first layer takes its word's row of a table, the product of all vectors with W_ih, where these are fewer
than the steps, on CUDA and without a gradient (`torch.ops.pycm.temporal_pool_words`); else the vectors are looked up.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pycm import _torch_cuda, _torch_temporal
from pycm._torch_arguments import _score_dtype
from pycm._torch_temporal_cuda import forward, temporal_pool
from pycm._torch_temporal_runs import most_steps

torch.library.define(
    "pycm::temporal_pool_words",
    f"(Tensor ids, Tensor embedding, {_torch_temporal._CELL.removeprefix('Tensor x, ')}{_torch_temporal._CHOICES}, "
    "bool keep_states) -> (Tensor, Tensor, Tensor, Tensor)",
)
# Those with a kernel for it; the host executor of tests/simt adds its own.
_DEVICES = ["cuda"]


class Words(NamedTuple):
    """Ids [S] or [B, T], in the place of the vectors [S, I] or [B, T, I]."""

    ids: Tensor
    embedding: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.ids.shape, self.embedding.shape[1])

    @property
    def ndim(self) -> int:
        return self.ids.ndim + 1

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.ids.device

    def transpose(self, first: int, second: int) -> Words:
        return self._replace(ids=self.ids.transpose(first, second))

    def known(self, cu_seqlens: Tensor | None) -> Words:
        """Zeros for the ids beyond each sequence, which may be anything; without cu_seqlens all are read."""
        if cu_seqlens is None:
            return self
        place = torch.arange(self.ids.shape[-1], device=self.device)
        valid = place < (cu_seqlens[-1] if self.ids.ndim == 1 else cu_seqlens.diff()[:, None])
        return self._replace(ids=torch.where(valid, self.ids, 0))

    def vectors(self) -> Tensor:
        return torch.nn.functional.embedding(self.ids, self.embedding)


def has_kernel(words: Words) -> bool:
    return words.device.type in _DEVICES


def temporal_pool_words(words: Words, *arguments: Any) -> Any:
    return torch.ops.pycm.temporal_pool_words(*words, *arguments)


def temporal_pool_words_cuda(
    ids: Tensor, embedding: Tensor, cu_seqlens: Tensor, weight_ih: Tensor, weight_hh: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    """From a table where it is smaller than the product of the steps, and takes no more than one run's products."""
    choices = (*others, False)  # nothing is kept for a backward pass
    words, bytes_a_step = embedding.shape[0], weight_hh.shape[0] * _score_dtype(weight_hh.dtype).itemsize
    with _torch_cuda._on(ids.device):
        inside = ((ids >= 0) & (ids < words)).all()
        torch._assert_async(inside, f"temporal_pool: x must hold ids in [0, {words}), the rows of embedding")
        if words < ids.numel() and words <= most_steps(cu_seqlens.shape[0] - 1, bytes_a_step):
            return forward(ids[..., None], embedding, cu_seqlens, weight_ih, weight_hh, *choices)[:4]
        x = torch.nn.functional.embedding(ids, embedding)
    return temporal_pool(x, cu_seqlens, weight_ih, weight_hh, *choices)[:4]


torch.library.impl("pycm::temporal_pool_words", "CUDA", temporal_pool_words_cuda)


@torch.library.register_fake("pycm::temporal_pool_words")  # type: ignore[untyped-decorator]
def _fake(ids: Tensor, embedding: Tensor, *others: Any) -> tuple[Tensor, ...]:
    x = embedding.new_empty((*ids.shape, embedding.shape[1]))
    results: tuple[Tensor, ...] = _torch_temporal._temporal_pool_fake(x, *others, False)
    return results[:4]
