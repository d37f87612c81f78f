"""From the host to a device, without either waiting for the other."""

import torch
from torch import Tensor

__all__ = ["sent"]


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor.to(device)`; to a GPU from pinned memory, because a copy from any other waits for all work before it."""
    if device.type == "cuda" and tensor.device.type == "cpu" and type(tensor) is Tensor and torch.cuda.is_available():
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
