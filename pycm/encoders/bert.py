"""BERT's encoder in plain torch, for weights that are at hand: transformers takes seconds to import."""

from __future__ import annotations

import torch
from torch.nn import functional


class BertEncoder(torch.nn.Module):
    """Hidden states of BERT (Devlin et al. 2019) with GELU and absolute positions, in evaluation mode.

    Args:
        weights: tensors under the names that Hugging Face gives them ("embeddings.word_embeddings.weight", ...).
        layers, heads: their number.
        eps: of the layer norms.
    """

    def __init__(self, weights: dict[str, torch.Tensor], *, layers: int, heads: int, eps: float) -> None:
        super().__init__()
        self.layers, self.heads, self.eps = layers, heads, eps
        for name, weight in weights.items():
            self.register_parameter(name.replace(".", "/"), torch.nn.Parameter(weight, weight.is_floating_point()))

    def _weight(self, name: str) -> torch.Tensor:
        return self.get_parameter(name.replace(".", "/"))

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, self._weight(f"{name}.weight"), self._weight(f"{name}.bias"))

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = self._weight(f"{name}.weight"), self._weight(f"{name}.bias")
        return functional.layer_norm(x, weight.shape, weight, bias, self.eps)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Ids int64 [B, T] and mask bool [B, T] (True for a token) to [B, T, D]; O(B (T D^2 + T^2 D)) a layer."""
        word, position, segment = (
            self._weight(f"embeddings.{kind}_embeddings.weight") for kind in ("word", "position", "token_type")
        )
        x = self._norm(word[ids] + position[: ids.shape[1]] + segment[0], "embeddings.LayerNorm")
        for i in range(self.layers):
            layer = f"encoder.layer.{i}"
            query, key, value = (
                self._linear(x, f"{layer}.attention.self.{part}").view(*x.shape[:2], self.heads, -1).transpose(1, 2)
                for part in ("query", "key", "value")
            )
            seen = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
            seen = self._linear(seen.transpose(1, 2).flatten(2), f"{layer}.attention.output.dense")
            x = self._norm(x + seen, f"{layer}.attention.output.LayerNorm")
            inner = functional.gelu(self._linear(x, f"{layer}.intermediate.dense"))
            x = self._norm(x + self._linear(inner, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
        return x
