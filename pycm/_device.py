"""Arrays between the host's memory and a CUDA device's. torch is imported when a tensor is there, or wanted."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pycm._optional import require

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[Any]
Int64 = npt.NDArray[np.int64]

_DEVICES: tuple[str, ...] = ("cuda",)  # for tests/simt the CPU's tensors are on a device too


def is_tensor(array: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def device_of(array: Any) -> Any:
    """The CUDA device that an array is on; None for the host's memory, and for what is no tensor."""
    return array.device if is_tensor(array) and array.device.type in _DEVICES else None


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def to_device(array: Array, device: Any) -> Tensor:
    """A host array, copied to the device."""
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(np.array(array)).to(device)


def to_host(tensor: Tensor) -> Array:
    """A tensor of any device as a host array."""
    import torch

    if tensor.dtype == torch.bfloat16:
        bfloat16 = require("ml_dtypes", "gallery", "bfloat16 in NumPy").bfloat16
        return np.asarray(tensor.cpu().view(torch.int16).numpy().view(bfloat16))
    return np.asarray(tensor.cpu().numpy())


def on_host(lists: Any) -> Any:
    """Indices or ids, or a pair (offsets, those), without tensors of a device."""
    if isinstance(lists, tuple):
        return tuple(map(on_host, lists))
    return lists.cpu() if device_of(lists) is not None else lists


def moved(rows: Any, device: Any) -> Any:
    """Rows of the host or of a device on another; None is the host."""
    if device is None:
        return to_host(rows) if is_tensor(rows) else rows
    return rows.to(device) if is_tensor(rows) else to_device(rows, device)


def compressed(rows: Int64 | None, offsets: Int64 | None, device: Any) -> tuple[Any, Any]:
    """Compressed rows on the device, or twice None."""
    return (None, None) if rows is None or offsets is None else (to_device(rows, device), to_device(offsets, device))
