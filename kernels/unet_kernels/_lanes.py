"""Which implementation an op takes on a device, and why: what `unet-fast doctor` prints."""

from collections.abc import Callable

import torch

from . import _native, _triton

__all__ = ["OPS", "lane"]

OPS = (
    "conv3x3_relu",
    "conv3x3_relu_cat",
    "up_conv",
    "max_pool2x2",
    "crop_concat",
    "weighted_cross_entropy",
    "head_cross_entropy",
    "two_nearest_cells",
    "cut_gap",
    "border_weight",
    "elastic_warp",
    "connected_components",
)


def _labels(device: torch.device, dtype: torch.dtype | None) -> str:
    # ids are 32 bits wide, whatever dtype the maps have
    return _triton.why_not(device)


# the ops that have a kernel of ours, each with the question its CUDA implementation asks before it takes that kernel;
# beyond a size that its module names, an op goes to ATen all the same
_KERNELS: dict[str, Callable[[torch.device, torch.dtype | None], str]] = {
    "crop_concat": _triton.why_not,
    "weighted_cross_entropy": _triton.why_not,
    "head_cross_entropy": _triton.why_no_dot,
    "two_nearest_cells": _labels,
    "cut_gap": _labels,
    "border_weight": _labels,
    "elastic_warp": _triton.why_not,
}
_CUDA: dict[str, Callable[[torch.device], str]] = {"connected_components": _native.why_not_cuda}


def _single(device: torch.device, dtype: torch.dtype | None) -> str:
    return "float64 is left to torch" if dtype == torch.float64 else _native.why_not(device)


# likewise on a CPU
_NATIVE: dict[str, Callable[[torch.device, torch.dtype | None], str]] = {
    "two_nearest_cells": _native.why_not,
    "border_weight": _native.why_not,
    "elastic_warp": _single,
    "connected_components": _native.why_not,
}


def lane(op: str, device: torch.device | str, dtype: torch.dtype | None = None) -> tuple[str, str]:
    """("triton", "native" or "torch", the reason in a few words) for an op of `OPS`.

    Raises:
        ValueError: there is no such op.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    device = torch.device(device)
    if device.type == "cpu" and op in _NATIVE:
        refusal = _NATIVE[op](device, dtype)
        return ("torch", refusal) if refusal else ("native", "our C++ kernel")
    if device.type != "cuda":
        return "torch", f"ATen, the reference; {device.type} has no kernel of ours yet"
    if op in _CUDA:
        refusal = _CUDA[op](device)
        return ("torch", refusal) if refusal else ("native", "our CUDA kernel")
    if op not in _KERNELS:
        return "torch", "ATen, the reference; no kernel of ours yet"
    refusal = _KERNELS[op](device, dtype)
    return ("torch", refusal) if refusal else ("triton", "our kernel")
