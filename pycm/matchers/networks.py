"""Networks by plain values: what a saved matcher's configuration holds is enough to build them again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._optional import require
from .fusion import FusedClassifier
from .heads import LabelClassifier, PairClassifier, Ranking
from .towers import RowTower, SequenceTower, WordTower


def make_tower(about: Mapping[str, Any], dim: int, *, zero: bool, options: Mapping[str, Any]) -> nn.Module:
    """The tower of one side: its kind and sizes, and the options of all towers, over which its own go."""
    chosen = {**options, **about}
    hidden, dropout = chosen["hidden"], chosen["dropout"]
    if about["kind"] == "sequence":
        return SequenceTower(
            about["dims"], dim, hidden=hidden, cell=chosen["cell"], pool=chosen["pool"],
            bidirectional=chosen["bidirectional"], dropout=dropout, zero=zero,
            input_dropout=chosen["input_dropout"],
        )  # fmt: skip
    if about["kind"] == "words":
        return WordTower(about["words"], dim, hidden=hidden, dropout=dropout)
    return RowTower(about["inputs"], dim, hidden=hidden, dropout=dropout, zero=zero)


def make_network(about: Mapping[str, Any], criterion: nn.Module) -> nn.Module:
    """The network of a configuration: head, sides, dim, unit length, options, fusion, labels.

    With a linear start (`about["linear"]`) both towers begin at 0.
    """
    dim, options = about["dim"], about["options"]
    first = make_tower(about["first"], dim, zero=about["linear"], options=options)
    if about["head"] == "labels":
        return LabelClassifier(first, dim, about["labels"], options["dropout"])
    second = make_tower(about["second"], dim, zero=about["linear"], options=options)
    if about["head"] == "ranking":
        return Ranking(first, second, criterion, about["unit"])
    sizes = {name: options[name] for name in ("hidden", "dropout")}
    if options.get("fusion"):
        assert isinstance(first, SequenceTower)
        assert isinstance(second, SequenceTower)
        clip = {name: options[name] for name in ("pool", "bidirectional", "input_dropout")}
        clip["dims"] = about["second"]["dims"]
        return FusedClassifier(
            first, second, criterion, unit=about["unit"], dim=dim, fusion=options["fusion"], **clip, **sizes
        )
    return PairClassifier(first, second, criterion, unit=about["unit"], dim=dim, **sizes)


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """What is saved: all but the loss's own parameters."""
    return {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in network.state_dict().items()
        if not name.startswith("criterion.")
    }


def load_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """The reverse. ValueError where they do not fit."""
    try:
        missing, unexpected = network.load_state_dict(dict(weights), strict=False)
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit the configuration: {error}") from error
    missing = [name for name in missing if not name.startswith("criterion.")]
    if missing or unexpected:
        raise ValueError(f"the weights do not fit the configuration: missing {missing}, unexpected {list(unexpected)}")


def read_weights(function: str, path: Path) -> dict[str, Tensor]:
    """The tensors in a .safetensors file of a saved matcher.

    Raises:
        OSError: untouched.
        ValueError: damaged, or with NaN or infinity among the weights: such a matcher would match nothing.
    """
    safetensors = require("safetensors", "text", function)
    data = path.read_bytes()
    advice = "save the matcher again, or copy it anew from where it is whole"
    try:
        weights: dict[str, Tensor] = require("safetensors.torch", "text", function).load(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{function}: {path} is damaged or cut off ({error}): {advice}") from error
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{function}: {path} holds NaN or infinity in {name!r}: {advice}")
    return weights


def device_of(device: Any) -> torch.device:
    """None is the CPU."""
    return torch.device("cpu" if device is None else device)
