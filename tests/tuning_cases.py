"""What the tests of fine-tuning share: encoders that cannot see what matters until they are trained, and clips."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from pycm import VideoTextMatcher
from pycm.encoders import ModuleEncoder
from pycm.encoders.module import TorchEncoder
from pycm.streams import Appearance
from pycm.video import Clip

WORDS = ["a red scene", "a green scene", "a blue scene", "a dull scene"]
HUES = ["red", "green", "blue", "dull"]
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


class CellEncoder(TorchEncoder):
    """2 x 2 cells of an image [32, 32] as `GreyNet` sees colours, and their mean."""

    def __init__(self) -> None:
        super().__init__(GreyNet().eval(), name="cells", modality="image", dim=8)

    def _prepare(self, items: list[Any]) -> torch.Tensor:
        return torch.stack([as_tensor(item) for item in items])

    def _forward(self, batch: Any) -> Any:
        return self._cells(batch).mean(1)

    def _cells(self, batch: Any) -> Any:
        return nn.functional.avg_pool2d(torch.tanh(self.module.conv(batch)), 2).flatten(2).transpose(1, 2)

    def encode_grid(self, items: Any, *, batch_size: int = 32, progress: bool | None = None) -> Any:
        return self._run("encode_grid", items, lambda batch: self._cells(batch).flatten(1), batch_size, width=32)

    def _steps(self, method: str, batch: Any) -> Any:
        cells = self._cells(batch)
        return (
            (cells.flatten(0, 1), torch.full((len(cells),), 4))
            if method == "encode_grid"
            else super()._steps(method, batch)
        )

    def _config(self) -> Any:
        return None


class WordNet(TorchEncoder):
    """One vector a word, by its first letter."""

    def __init__(self) -> None:
        module = nn.Embedding(256, 5)
        with torch.no_grad():
            module.weight.copy_(torch.randn(256, 5, generator=torch.Generator().manual_seed(1)))
        super().__init__(module, name="words", modality="text", dim=5)

    def _prepare(self, items: list[str]) -> dict[str, torch.Tensor]:
        words = [[ord(word[0]) for word in text.split()] for text in items]
        return {"ids": torch.tensor([i for row in words for i in row]), "counts": torch.tensor([len(w) for w in words])}

    def _forward(self, batch: Any) -> Any:
        return torch.stack([rows.mean(0) for rows in self.module(batch["ids"]).split(batch["counts"].tolist())])

    def encode_tokens(self, items: Any, *, batch_size: int = 32, progress: bool | None = None) -> list[np.ndarray]:
        with self._inference():
            rows, counts = self._steps("encode_tokens", self._prepare(list(items)))
        return [part.numpy().copy() for part in rows.split(counts.tolist())]

    def _steps(self, method: str, batch: Any) -> Any:
        if method != "encode_tokens":
            return super()._steps(method, batch)
        return self.module(batch["ids"]), batch["counts"]

    def _config(self) -> Any:
        return None


def quarters(count: int, seed: int) -> tuple[list[np.ndarray], list[list[int]], list[str]]:
    """Images of two hues, each in two of four cells; their hues; and sentences that name both."""
    draw = np.random.default_rng(seed)
    kinds = [sorted(draw.choice(4, 2, replace=False).tolist()) for _ in range(count)]
    images = []
    for pair in kinds:
        cells = [picture(kind, draw)[:16, :16] for kind in draw.permutation(pair * 2)]
        images.append(np.vstack([np.hstack(cells[:2]), np.hstack(cells[2:])]))
    return images, kinds, [" ".join(HUES[kind] for kind in pair) for pair in kinds]


CLIPS, KINDS = scenes(80, 0)
TEXTS = [WORDS[kind] for kind in KINDS]
TEST, TRUTH = scenes(40, 1)
FIT: dict[str, Any] = {"epochs": 10, "lr": 1e-2, "encoder_lr": 3e-2, "batch_size": 8, "validation": 0.2}
SHORT: dict[str, Any] = FIT | {"epochs": 2}


def make(*streams: Any, **options: Any) -> VideoTextMatcher:
    given = {"text_encoder": "words", "hidden": 16, "dim": 16, "dropout": 0.0, "loss": "info_nce", "progress": False}
    return VideoTextMatcher(streams or [appearance()], **(given | options))
