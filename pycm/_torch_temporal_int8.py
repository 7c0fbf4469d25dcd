"""Temporal pooling with an 8-bit recurrence as a torch operator: one direction of one layer, CPU, no gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pycm._torch_temporal import _CELL, _CHOICES, _results, temporal_pool_cpu

# As pycm::temporal_pool, without the reserve.
torch.library.define(
    "pycm::temporal_pool_int8", f"({_CELL}{_CHOICES}, bool keep_states) -> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.impl("pycm::temporal_pool_int8", "CPU")
def temporal_pool_int8(*args: Any) -> tuple[Tensor, ...]:
    return temporal_pool_cpu(*args, False, int8=True)[:4]


@torch.library.register_fake("pycm::temporal_pool_int8")  # type: ignore[untyped-decorator]
def _fake(x: Tensor, cu_seqlens: Tensor, weight_ih: Tensor, weight_hh: Tensor, *others: Any) -> tuple[Tensor, ...]:
    *_, cell, pool, _reverse, keep_states = others
    return _results(x, cu_seqlens, weight_hh, cell, pool, keep_states, False)[:4]


def check(function: str, x: Tensor, trained: bool) -> None:
    if x.device.type != "cpu":
        raise NotImplementedError(f"{function}: int8_weights is for the CPU, got tensors on {x.device}")
    if trained:
        raise ValueError(
            f"{function}: int8_weights has no gradient; call it under torch.no_grad() or torch.inference_mode()"
        )
