"""Fine-tuned encoders among a saved matcher's parts: encoder-*.safetensors, with the weights that training changed.

What it did not change is the encoder's own, which is made again from its spec, or given to `load`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._optional import require
from ..encoders.module import TorchEncoder
from .networks import read_weights
from .tuning import copies, encoder_of, stamp


def pack(given: Mapping[str, Any], used: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """What config.json says of them, and the files' content by name.

    Args:
        given: streams and encoders as they were given, by name.
        used: the same, with trained copies where there are any.
    """
    dump = require("safetensors.torch", "text", "save").save
    entries: dict[int, dict[str, Any]] = {}
    files: dict[str, bytes] = {}
    for name, part in given.items():
        encoder, tuned = encoder_of(part), encoder_of(used[name])
        if tuned is encoder:
            continue
        if id(tuned.module) not in entries:  # two sides of one model share it
            file = f"encoder-{len(entries)}.safetensors"
            entries[id(tuned.module)] = {"names": [], "file": file}
            files[file] = dump(_changed(encoder.module, tuned.module))
        entries[id(tuned.module)]["names"].append(name)
    return list(entries.values()), files


def names_in(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of all that was fine-tuned."""
    return [str(name) for entry in entries for name in entry["names"]]


def unpack(
    function: str, folder: Path, entries: Sequence[Mapping[str, Any]], parts: Mapping[str, Any]
) -> dict[int, TorchEncoder]:
    """The trained copies, by the ids of the encoders in `parts`. Raises OSError; ValueError for weights that do not
    fit."""
    given = {id(encoder_of(parts[name])): encoder_of(parts[name]) for name in names_in(entries)}
    tuned = dict(zip(given, copies(list(given.values())), strict=True))
    for entry in entries:
        weights = read_weights(function, folder / Path(entry["file"]).name)
        for name in entry["names"]:
            module = getattr(tuned[id(encoder_of(parts[name]))], "module", torch.nn.Module())
            try:
                unknown = module.load_state_dict(weights, strict=False).unexpected_keys
            except RuntimeError as error:
                raise ValueError(f"{function}: saved weights do not fit the encoder of {name!r}: {error}") from error
            if unknown:
                raise ValueError(f"{function}: the encoder of {name!r} has no {unknown[0]!r}, which was saved")
    for key, encoder in given.items():
        stamp(tuned[key], encoder)
    return tuned


def _changed(given: torch.nn.Module, tuned: torch.nn.Module) -> dict[str, Tensor]:
    before = given.state_dict()
    return {
        name: weight.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, weight in tuned.state_dict().items()
        if not torch.equal(weight, before[name])
    }
