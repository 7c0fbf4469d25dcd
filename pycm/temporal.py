"""An LSTM or GRU over sequences of different lengths, and the pooling of what it says."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from pycm._temporal_arguments import check_choices, check_pool
from pycm._temporal_layers import CELLS, COMBINES, POOLS, STATE_POOLS, Cell, Combine, Options, Pool

__all__ = ["CELLS", "COMBINES", "POOLS", "STATE_POOLS", "Cell", "Combine", "Pool", "pool_states", "temporal_pool"]


def temporal_pool(
    x: Any,
    lengths: Any,
    weights: Mapping[str, Any],
    cell: Cell = "lstm",
    pool: Pool = "mean",
    *,
    cu_seqlens: Any = None,
    combine: Combine = "concat",
    h0: Any = None,
    c0: Any = None,
    attention: Any = None,
    gpo: Mapping[str, Any] | None = None,
    residual: bool = False,
    normalize_states: bool = False,
    normalize: bool = False,
    dropout: float = 0.0,
    legacy_padding: bool = False,
    batch_first: bool = True,
    return_state: bool = False,
    embedding: Any = None,
    int8_weights: bool = False,
) -> Any:
    """Run an LSTM or GRU over sequences and pool its states, without packing and without keeping them.

    Args:
        x: float32, float16, bfloat16 or float64 sequences, padded ``[B, T, I]`` with `lengths` (``[T, B, I]`` with
            ``batch_first=False``); one after another ("ragged") ``[S, I]`` with `cu_seqlens` or `lengths`; a single one
            ``[T, I]`` with neither; a ``PackedSequence`` or a nested (jagged) tensor, which know their lengths. Torch
            or NumPy. What lies beyond a sequence's length is never read.
        lengths: integers ``[B]``, from 0 to T, on any device, or one integer for all rows. Required for padded x: a
            pool over padding is the commonest error of such code.
        weights: a mapping with torch's names and shapes, such as ``nn.LSTM(...).state_dict()``: ``weight_ih_l0``,
            ``weight_hh_l0``, ``bias_ih_l0``, ``bias_hh_l0`` (both biases or none), ``weight_hr_l0`` of a projection
            ``[P, H]``, the same with ``_reverse``, and with ``l1`` and so on; all of x's dtype.
        cell: ``lstm`` (gates i f g o) or ``gru`` (r z n; the reset gate after the product, as torch and cuDNN have it).
        pool: how a sequence's states become one vector of F features. ``mean``, ``max``; ``last``, the final state of
            each direction (torch's h_n), and ``first``, the state after each direction's own first step;
            ``attention``: each step by the softmax of its product with `attention`; ``gpo``: each feature's k-th
            largest value by the k-th coefficient of generalised pooling (Chen et al., CVPR 2021); ``meanmax`` and
            ``lastmean``: both, one after the other; ``none``: the states themselves.
        cu_seqlens: integers ``[B + 1]``, rising from 0 to S: where each ragged sequence begins and ends.
        combine: two directions as one: ``concat``, ``average`` or ``sum``, of the states, before they are pooled.
        h0: initial states ``[layers * directions, B, P]``, zeros without; ``[..., P]`` for a single sequence.
        c0: initial memory ``[layers * directions, B, H]``, LSTM only.
        attention: ``[F]``, for ``pool="attention"``.
        gpo: for ``pool="gpo"``, the parameters of `pycm.nn.GPO` by name: ``gru.weight_ih_l0`` ... ``linear.weight``.
        residual: add x to the states of the last layer (``F == I``) before they are pooled.
        normalize_states: divide each step's vector by its norm before pooling. With `residual` and `normalize` this is
            the sequential head of CLIP4Clip (Luo et al., 2021).
        normalize: divide the result by its norm; zero stays zero.
        dropout: probability with which the states between layers are dropped; torch only.
        legacy_padding: run over the padding too, as code does that neither packs nor sorts: every row has T steps, and
            the reverse direction begins in the padding. ``mean``, ``max``, ``attention`` and ``gpo`` still read
            `lengths` steps, as ``meanmax`` and the second half of ``lastmean`` do; ``last``, ``first`` and the first
            half of ``lastmean`` read the ends of the T, and ``none`` gives all T states. A row of length 0 runs too:
            of these it gives states, not zeros.
        batch_first: whether padded x is ``[B, T, I]``.
        return_state: also return the final states.
        embedding: ``[V, I]``, V > 0, the vectors of words; x then holds their ids, integers ``[B, T]``, ragged ``[S]``,
            a single ``[T]``, packed or nested, and the result is that of the vectors ``embedding[x]``, differentiable
            in `embedding`; the padding_idx of an ``nn.Embedding`` is not known here: that row gets a gradient where its
            id occurs. On CUDA and without a gradient the first layer multiplies the V vectors by its weights where
            they are fewer than the steps.
        int8_weights: round the rows of ``weight_hh`` and ``weight_hr`` and the states they are multiplied with to 8
            bits, each with a scale of its own (the largest value is 127), and add the products as integers: a quarter
            of the bytes that one sequence waits for at every step. The product with x and all else stay as they are.
            On the CPU and without a gradient. States are off by some 1e-3.

    Returns:
        ``[B, F]`` (``[F]`` for a single sequence), in x's dtype, kind and device; F is P for one direction or combined
        ones, 2 P for concatenated ones, and twice that for ``meanmax`` and ``lastmean``. For ``none`` the states in x's
        form: padded ``[B, T, F]`` with zeros beyond each length, ragged ``[S, F]``, packed or nested. A row of length 0
        gives zeros. With `return_state` a pair of it and ``(h_n, c_n)`` (``h_n`` for a GRU), each
        ``[layers * directions, B, ...]``; a row of length 0 leaves its initial state.

    Raises:
        TypeError: for integers in x without `embedding` or others with it, another dtype in the weights, float64 with
            `int8_weights`, or no array.
        ValueError: for shapes that do not fit, lengths outside x, ids outside `embedding`, an unknown name, a pool's
            parameter missing, or `int8_weights` where a gradient is wanted.
        NotImplementedError: for `int8_weights` on another device, a tensor with a forward-mode tangent or under
            ``torch.func.grad`` and its like, or neither on the CPU nor on a CUDA device.

    A row's result does not depend on the other rows, on the number of threads or on the padding, to the bit (on
    CUDA: but for the rounding of torch's product of the inputs). States and sums are fp32 (fp64 for float64). Torch
    tensors: differentiable in x, weights, h0, c0 and the pools' parameters; the backward pass needs states and
    gates, S·(P + 5·H) numbers a direction for an LSTM and S·5·H for a GRU (on CUDA the states, and computes the gates
    again). O(S·G·H·(I + P)) operations; without a gradient O(B·H) memory beside the product with x, and S·P where
    several layers, joined directions or a pool by rank need all states.

    On the CPU the weights are kept in the kernels' layout from call to call, until their tensors change. A write that
    torch does not count, through ``.data`` or a NumPy view, is seen where it reaches one of the about 500 values of a
    tensor that are compared; a single value written so may not be. In-place operations under ``torch.no_grad()`` always
    are.
    """
    options = Options(
        cell, pool, combine, h0, c0, attention, gpo, residual, normalize_states, normalize, dropout, legacy_padding,
        batch_first, return_state, embedding, int8_weights,
    )  # fmt: skip
    check_choices("temporal_pool", options)
    return _implementation(x).temporal_pool(x, lengths, cu_seqlens, weights, options)


def pool_states(
    x: Any, lengths: Any, pool: Pool, *, cu_seqlens: Any = None, attention: Any = None, gpo: Any = None
) -> Any:
    """The pools alone: vectors that are there already, such as the regions of an image, to one a row.

    Args:
        x: ``[B, T, F]`` with `lengths`, ragged ``[S, F]`` with `cu_seqlens` or `lengths`, a single ``[T, F]``, packed
            or nested; as in `temporal_pool`.
        lengths: integers ``[B]``, or one for all rows.
        pool: ``mean``, ``max``, ``attention``, ``gpo`` or ``meanmax``.
        cu_seqlens, attention, gpo: as in `temporal_pool`.

    Returns:
        ``[B, F]`` (``[B, 2 F]`` for ``meanmax``), in x's dtype, kind and device; a row of length 0 gives zeros.

    Raises:
        TypeError, ValueError, NotImplementedError: as in `temporal_pool`.

    Differentiable for torch tensors. O(S·F) operations, times log T for ``gpo``.
    """
    check_pool("pool_states", pool, attention, gpo, STATE_POOLS)
    return _implementation(x).pool_states(x, lengths, cu_seqlens, pool, attention, gpo)


def _implementation(x: Any) -> Any:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, (torch.Tensor, torch.nn.utils.rnn.PackedSequence)):
        import pycm._torch_sequences as torch_functions  # the cheapest form of import once it is loaded

        return torch_functions
    import pycm._numpy_temporal as numpy_functions

    return numpy_functions
