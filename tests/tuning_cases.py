"""What the tests of fine-tuning share: encoders that cannot see what matters until they are trained, and clips."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from pycm.encoders import ModuleEncoder
from pycm.streams import Appearance
from pycm.video import Clip

WORDS = ["a red scene", "a green scene", "a blue scene", "a dull scene"]
_HUES = np.array([[1.8, 0.6, 0.6], [0.6, 1.8, 0.6], [0.6, 0.6, 1.8], [1, 1, 1]])  # of one brightness


class GreyNet(nn.Module):
    """A network that begins with equal weights for all colours: its features know brightness alone."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 8, stride=8)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(dropout)
        self.out = nn.Linear(8, 6)
        with torch.no_grad():
            self.conv.weight.copy_(torch.randn(8, 1, 1, 1, generator=draw).expand(8, 3, 8, 8) / 60)
            self.conv.bias.copy_(torch.randn(8, generator=draw) / 10)
            self.out.weight.copy_(torch.randn(6, 8, generator=draw) / 3)
            self.out.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.drop(torch.tanh(self.norm(self.conv(x))).mean((2, 3))))


def as_tensor(image: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image, np.float32).transpose(2, 0, 1) / 128 - 1)


def grey(**options: Any) -> ModuleEncoder:
    return ModuleEncoder(GreyNet(**options).eval(), as_tensor, name="grey", dim=6)


class LengthNet(nn.Module):
    """Letters to vectors that begin as one vector: a text's row knows nothing of its words."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.EmbeddingBag(256, 12, mode="mean")
        with torch.no_grad():
            self.embed.weight.copy_(torch.linspace(-1, 1, 12).expand(256, 12))

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return self.embed(ids, offsets)


def letters(texts: list[str]) -> dict[str, torch.Tensor]:
    data = [list(text.encode()) for text in texts]
    offsets = np.cumsum([0, *map(len, data)])[:-1]
    return {"ids": torch.tensor([i for row in data for i in row]), "offsets": torch.from_numpy(offsets)}


def lengths() -> ModuleEncoder:
    return ModuleEncoder(LengthNet(), letters, name="lengths", dim=12, modality="text")


def picture(kind: int, draw: np.random.Generator) -> np.ndarray:
    """uint8 [32, 32, 3] of one of four hues, whose brightness says nothing."""
    values = draw.uniform(40, 120) * _HUES[kind] + draw.normal(0, 6, (32, 32, 3))
    return values.clip(0, 255).astype(np.uint8)


def scenes(count: int, seed: int) -> tuple[list[Clip], np.ndarray]:
    """Clips of two to four frames, and the row of WORDS that each is."""
    draw = np.random.default_rng(seed)
    kinds = draw.permutation(np.arange(count) % 4)
    clips = [
        Clip.from_frames(np.stack([picture(kind, draw) for _ in range(draw.integers(2, 5))]), name=f"{seed}-{i}")
        for i, kind in enumerate(kinds)
    ]
    return clips, kinds


def appearance(**options: Any) -> Appearance:
    return Appearance(grey(**options))
