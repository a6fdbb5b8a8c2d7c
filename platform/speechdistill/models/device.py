"""The device that networks compute on, and copies to it."""

import numpy as np
import torch
from torch import Tensor

from speechdistill.io.errors import UserError


def torch_device(name: str | None) -> torch.device:
    """Return the named device, by default CUDA if available; raise `UserError` for a device that does not exist."""
    available = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if available else "cpu"))
    except RuntimeError as error:
        raise UserError(f"device {name!r} is unknown to torch", "choose cpu, cuda or cuda:<index>") from error
    if device.type == "cuda" and not available:
        raise UserError(f"device {name!r}: torch finds no CUDA device", "choose cpu")
    return device


def on_device(batch: np.ndarray, device: torch.device) -> Tensor:
    """Copy a batch to a device; to a GPU from pinned memory, so that the caller does not wait for the copy."""
    tensor = torch.from_numpy(batch)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
