"""The cases of contrastive losses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from .cases import Case

Loss: TypeAlias = Literal["max_hinge", "sum_hinge", "info_nce", "sigmoid", "semi_hard"]


@dataclass(frozen=True)
class LossCase(Case):
    """A loss of N pairs and its gradients: N = `queries` = `gallery`, raw rows of width `dim`, cosine."""

    loss: Loss = "info_nce"

    @property
    def shape(self) -> str:
        return f"{self.loss}, N={self.queries}, D={self.dim}, {self.metric}, forward and backward"

    @property
    def operations(self) -> float:
        """Of the scores, and of the two products with their gradient, which single negatives do not need."""
        return 2.0 * self.queries * self.gallery * self.dim * (1 if self.loss in ("max_hinge", "semi_hard") else 3)

    @property
    def unit_rows(self) -> bool:
        return False

    @property
    def precisions(self) -> tuple[str, ...]:
        return ("float32",)


def loss_cases(tiny: bool) -> Iterator[LossCase]:
    about = "nothing: it tests the command" if tiny else "a training step's batch"
    count, dim = (40, 24) if tiny else (1024, 512)
    every: tuple[Loss, ...] = ("max_hinge", "sum_hinge", "info_nce", "sigmoid", "semi_hard")
    for loss in every:
        yield LossCase(f"loss-{loss}", about, "loss", count, count, dim, loss=loss)
    if not tiny:
        large: tuple[Loss, ...] = ("max_hinge", "info_nce")
        for loss in large:
            yield LossCase(f"loss-{loss}-8192", "a large batch", "loss", 8192, 8192, 512, loss=loss)
