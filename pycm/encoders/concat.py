"""Several encoders side by side."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from .._rows import RowNorm, check_row_norm, normalize_rows
from .base import Encoder, Features, Modality
from .fingerprint import digest_of


class ConcatEncoder:
    """The rows of several encoders of one modality, normalised, weighted and put side by side.

    Args:
        encoders: at least one, all for images or all for texts.
        weights: a factor for each encoder's (normalised) rows; None is 1 for each. The squared weights share
            out the squared distances.
        normalize: what is done to each encoder's rows first: "none", "l2" (unit length) or "power" (signed
            square root, then unit length).
        name: for people; None joins the encoders' names.
    """

    def __init__(
        self,
        encoders: Sequence[Encoder],
        *,
        weights: Sequence[float] | None = None,
        normalize: RowNorm = "l2",
        name: str | None = None,
    ) -> None:
        if not encoders:
            raise ValueError("ConcatEncoder: encoders must not be empty")
        modalities = [encoder.modality for encoder in encoders]
        if len(set(modalities)) != 1:
            raise ValueError(f"ConcatEncoder: encoders must be of one modality, got {', '.join(modalities)}")
        factors = [1.0] * len(encoders) if weights is None else [float(weight) for weight in weights]
        if len(factors) != len(encoders):
            raise ValueError(
                f"ConcatEncoder: weights must have {len(encoders)} entries, one for each encoder, got {len(factors)}"
            )
        if not all(0 < factor < float("inf") for factor in factors):
            raise ValueError(f"ConcatEncoder: weights must be positive and finite, got {factors}")
        check_row_norm("ConcatEncoder", "normalize", normalize)
        self.encoders = list(encoders)
        self.weights = factors
        self.normalize: RowNorm = normalize
        self.name = name or "+".join(encoder.name for encoder in encoders)
        self.modality: Modality = modalities[0]

    @property
    def dim(self) -> int:
        """Features per row: the sum of the encoders' dims."""
        return sum(encoder.dim for encoder in self.encoders)

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 over the encoders' fingerprints, the weights and the normalisation."""
        parts = [encoder.fingerprint for encoder in self.encoders]
        return digest_of(type(self), parts, self.weights, self.normalize)

    def encode(self, items: Sequence[Any], *, batch_size: int = 32, progress: bool | None = None) -> Features:
        """Encode items to float32 [N, dim]; see `Encoder.encode`. Each encoder reads the items anew."""
        blocks = []
        for encoder, weight in zip(self.encoders, self.weights, strict=True):
            rows = encoder.encode(items, batch_size=batch_size, progress=progress)
            blocks.append((weight * normalize_rows(rows, self.normalize)).astype(np.float32))
        return np.concatenate(blocks, axis=1)

    def __repr__(self) -> str:
        return f"ConcatEncoder({self.encoders}, weights={self.weights}, normalize={self.normalize!r})"
