"""Modules: `TemporalPool`, an LSTM or GRU with its pooling, and the pools that have parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pycm._optional import require
from pycm._temporal_arguments import check_choices
from pycm._temporal_layers import GATES, Cell, Combine, Options, Pool
from pycm.temporal import pool_states, temporal_pool

require("torch", "torch", "pycm.nn")

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.utils.rnn import PackedSequence  # noqa: E402

from pycm._torch_temporal import forget  # noqa: E402

__all__ = ["GPO", "AttentionPool", "TemporalPool"]


class AttentionPool(nn.Module):
    """Each step by the softmax of its product with a learned vector: ``sum_t softmax_t(w · h_t) h_t``.

    Args:
        features: F, the size of a step's vector.
    """

    def __init__(self, features: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Any, lengths: Any = None, *, cu_seqlens: Any = None) -> Tensor:
        """Steps ``[B, T, F]`` with `lengths`, or ragged ``[S, F]``, to ``[B, F]``; see `pycm.pool_states`."""
        return pool_states(x, lengths, "attention", cu_seqlens=cu_seqlens, attention=self.weight)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}"


class GPO(nn.Module):
    """Generalised pooling operator (Chen et al., *Learning the Best Pooling Strategy for Visual Semantic Embedding*,
    CVPR 2021): each feature's k-th largest value by a learned coefficient of the rank k and the length.

    The coefficients are the softmax at temperature 0.1 of a two-directional GRU over sines of the ranks; they depend on
    the length alone and are computed once for each. Parameters are named and shaped as VSE∞'s, whose checkpoints load.

    Args:
        d_pe: size of the sines, even.
        d_hidden: size of the GRU's state.
    """

    def __init__(self, d_pe: int = 32, d_hidden: int = 32, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        if d_pe < 2 or d_pe % 2:
            raise ValueError(f"GPO: d_pe must be even and positive, got {d_pe}")
        # Not nn.GRU, which torch.compile does not take.
        self.gru = TemporalPool(d_pe, d_hidden, "gru", "none", bidirectional=True, device=device, dtype=dtype)
        self.linear = nn.Linear(d_hidden, 1, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        self.gru.reset_parameters()
        self.linear.reset_parameters()

    def weights(self) -> dict[str, Tensor]:
        """The parameters by name, as `pycm.temporal_pool` takes them."""
        return {f"gru.{name}": w for name, w in self.gru.weights().items()} | {"linear.weight": self.linear.weight}

    def forward(self, x: Any, lengths: Any = None, *, cu_seqlens: Any = None) -> Tensor:
        """Steps (or regions: order does not matter) ``[B, T, F]`` with `lengths`, or ragged ``[S, F]``, to ``[B, F]``;
        see `pycm.pool_states`."""
        return pool_states(x, lengths, "gpo", cu_seqlens=cu_seqlens, gpo=self.weights())  # type: ignore[no-any-return]


class TemporalPool(nn.Module):
    """``nn.LSTM`` or ``nn.GRU`` and the pooling of its states, without padding waste, packing or the states in memory.

    Args:
        input_size: I.
        hidden_size: H.
        cell: ``lstm`` or ``gru``.
        pool: ``last``, ``first``, ``mean``, ``max``, ``attention``, ``gpo``, ``meanmax``, ``lastmean`` or ``none``;
            `pycm.temporal_pool` says what each is. ``attention`` and ``gpo`` add their parameters as the submodules
            `attention` (`AttentionPool`) and `gpo` (`GPO`).
        num_layers, bias, batch_first, dropout, bidirectional, proj_size: as in torch.
        combine: two directions as one: ``concat``, ``average`` or ``sum``.
        residual, normalize_states, normalize, legacy_padding: as in `pycm.temporal_pool`.
        int8_weights: as there; for inference, be it of a module that was trained without: the attribute may be set.

    Attributes:
        weight_ih_l0, ...: the parameters, with torch's names, shapes and initialisation: the state_dict of an
            ``nn.LSTM`` loads, and this one's loads into an ``nn.LSTM`` (without those of ``attention`` or ``gpo``).
        output_size: F.

    Raises:
        ValueError: for an unknown name, a size below 1, a projection of a GRU, or dropout outside [0, 1].

    >>> encoder = pycm.nn.TemporalPool(512, 512, cell="gru", pool="mean", bidirectional=True)
    >>> videos = encoder(frames, lengths)  # [B, T, 512], [B] -> [B, 1024]
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        cell: Cell = "lstm",
        pool: Pool = "mean",
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        combine: Combine = "concat",
        residual: bool = False,
        normalize_states: bool = False,
        normalize: bool = False,
        legacy_padding: bool = False,
        int8_weights: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        absent: Any = object()
        attention, gpo = (absent if pool == name else None for name in ("attention", "gpo"))
        check_choices(
            "TemporalPool",
            Options(
                cell, pool, combine, attention=attention, gpo=gpo, residual=residual,
                normalize_states=normalize_states, dropout=dropout,
            ),
        )  # fmt: skip
        for name, value, least in (
            ("input_size", input_size, 1), ("hidden_size", hidden_size, 1), ("num_layers", num_layers, 1),
            ("proj_size", proj_size, 0),
        ):  # fmt: skip
            if not isinstance(value, int):
                raise TypeError(f"TemporalPool: {name} must be an int, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"TemporalPool: {name} must be at least {least}, got {value}")
        if proj_size and cell != "lstm":
            raise ValueError(f"TemporalPool: proj_size must be 0 for cell={cell!r}, got {proj_size}")
        if proj_size >= hidden_size:
            raise ValueError(f"TemporalPool: proj_size must be below hidden_size {hidden_size}, got {proj_size}")
        self.input_size, self.hidden_size, self.proj_size = input_size, hidden_size, proj_size
        self.cell, self.pool, self.combine = cell, pool, combine
        self.num_layers, self.bias, self.bidirectional = num_layers, bias, bidirectional
        self.batch_first, self.dropout = batch_first, float(dropout)
        self.residual, self.normalize_states, self.normalize = residual, normalize_states, normalize
        self.legacy_padding, self.int8_weights = legacy_padding, int8_weights
        state, directions = proj_size or hidden_size, 2 if bidirectional else 1
        features = state * (directions if combine == "concat" else 1)
        if residual and features != input_size:
            raise ValueError(f"TemporalPool: residual needs states of input_size {input_size}, got {features}")
        self.output_size = features * (2 if pool in ("meanmax", "lastmean") else 1)
        self._names: list[str] = []
        for layer in range(num_layers):
            for end in ("", "_reverse")[:directions]:
                rows = GATES[cell] * hidden_size
                shapes: dict[str, tuple[int, ...]] = {
                    "weight_ih": (rows, state * directions if layer else input_size),
                    "weight_hh": (rows, state),
                    **({"bias_ih": (rows,), "bias_hh": (rows,)} if bias else {}),
                    **({"weight_hr": (proj_size, hidden_size)} if proj_size else {}),
                }
                for kind, shape in shapes.items():
                    name = f"{kind}_l{layer}{end}"
                    self._names.append(name)
                    self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.attention = AttentionPool(features, device=device, dtype=dtype) if pool == "attention" else None
        self.gpo = GPO(device=device, dtype=dtype) if pool == "gpo" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within 1/√H, drawn in torch's order: the same seed gives the values of ``nn.LSTM``."""
        bound = 1 / math.sqrt(self.hidden_size)
        for name in self._names:
            nn.init.uniform_(getattr(self, name), -bound, bound)

    @classmethod
    def from_torch(cls, rnn: nn.LSTM | nn.GRU, pool: Pool, **options: Any) -> TemporalPool:
        """The pooled form of `rnn`, which goes on sharing its parameters: training one trains the other.

        Args:
            rnn: an ``nn.LSTM`` or ``nn.GRU``.
            pool: as in the constructor.
            **options: `combine`, `residual`, `normalize_states`, `normalize`, `legacy_padding`, `int8_weights`.

        Raises:
            TypeError: for another module, or an RNN whose weights are not plain parameters.
        """
        cell: Cell
        if isinstance(rnn, nn.LSTM):
            cell = "lstm"
        elif isinstance(rnn, nn.GRU):
            cell = "gru"
        else:
            raise TypeError(f"TemporalPool.from_torch: rnn must be nn.LSTM or nn.GRU, got {type(rnn).__name__}")
        first: Any = rnn.weight_ih_l0
        module = cls(
            rnn.input_size, rnn.hidden_size, cell, pool, rnn.num_layers, rnn.bias, rnn.batch_first, rnn.dropout,
            rnn.bidirectional, rnn.proj_size, device="meta", dtype=first.dtype, **options,
        )  # fmt: skip
        for name in module._names:
            parameter = getattr(rnn, name)
            if not isinstance(parameter, nn.Parameter):
                raise TypeError(
                    f"TemporalPool.from_torch: {name} must be a parameter, got {type(parameter).__name__}; "
                    "remove the parametrization first"
                )
            setattr(module, name, parameter)
        for extra in (module.attention, module.gpo):
            if extra is not None:
                extra.to_empty(device=first.device)
                extra.reset_parameters()
        return module.train(rnn.training)

    def weights(self) -> Mapping[str, Tensor]:
        """The recurrent parameters by torch's names, as `pycm.temporal_pool` takes them."""
        return {name: getattr(self, name) for name in self._names}

    def forward(
        self,
        x: Any,
        lengths: Any = None,
        hx: Any = None,
        *,
        cu_seqlens: Any = None,
        return_state: bool = False,
        embedding: Tensor | None = None,
    ) -> Any:
        """Pool sequences.

        Args:
            x: padded ``[B, T, I]`` (``[T, B, I]`` without `batch_first`) with `lengths`, ragged ``[S, I]`` with
                `cu_seqlens` or `lengths`, a single ``[T, I]``, a ``PackedSequence`` or a nested tensor.
            lengths: integers ``[B]``, on any device, or one for all rows.
            hx: as in torch: ``(h0, c0)`` of an LSTM, ``h0`` of a GRU; zeros without.
            cu_seqlens: integers ``[B + 1]``.
            return_state: also return ``(h_n, c_n)``, or ``h_n`` of a GRU.
            embedding: the vectors ``[V, input_size]`` of words; x then holds their ids, ``[B, T]``, ragged ``[S]``,
                ``[T]``, packed or nested. The padding_idx of an ``nn.Embedding`` is not known here.

        Returns:
            ``[B, F]``, as `pycm.temporal_pool` has it.
        """
        if not isinstance(x, torch.Tensor | PackedSequence):
            raise TypeError(f"TemporalPool: x must be a torch tensor or a PackedSequence, got {type(x).__name__}")
        several = isinstance(hx, tuple | list)
        if hx is not None and (not several or len(hx) != 2 if self.cell == "lstm" else several):
            expected = "a pair (h0, c0) for an LSTM" if self.cell == "lstm" else "the tensor h0 for a GRU"
            got = f"{type(hx).__name__}{f' of {len(hx)}' if several else ''}"
            raise TypeError(f"TemporalPool: hx must be {expected}, got {got}")
        h0, c0 = hx if several else (hx, None)
        return temporal_pool(
            x,
            lengths,
            self.weights(),
            self.cell,
            self.pool,
            cu_seqlens=cu_seqlens,
            combine=self.combine,
            h0=h0,
            c0=c0,
            attention=None if self.attention is None else self.attention.weight,
            gpo=None if self.gpo is None else self.gpo.weights(),
            residual=self.residual,
            normalize_states=self.normalize_states,
            normalize=self.normalize,
            dropout=self.dropout if self.training else 0.0,
            legacy_padding=self.legacy_padding,
            batch_first=self.batch_first,
            return_state=return_state,
            embedding=embedding,
            int8_weights=self.int8_weights,
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        forget(self.parameters(recurse=False))  # which torch may be about to swap
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *arguments: Any) -> None:
        forget(self.parameters(recurse=False))
        super()._load_from_state_dict(*arguments)

    def flatten_parameters(self) -> None:
        """Does nothing: for code that calls it, as ``nn.LSTM`` and ``nn.GRU`` have it."""

    def extra_repr(self) -> str:
        given = [f"{self.input_size}, {self.hidden_size}, cell={self.cell!r}, pool={self.pool!r}"]
        for name, plain in (
            ("num_layers", 1), ("bias", True), ("batch_first", True), ("dropout", 0.0), ("bidirectional", False),
            ("proj_size", 0), ("combine", "concat"), ("residual", False), ("normalize_states", False),
            ("normalize", False), ("legacy_padding", False), ("int8_weights", False),
        ):  # fmt: skip
            if (value := getattr(self, name)) != plain:
                given.append(f"{name}={value!r}")
        return ", ".join(given)
