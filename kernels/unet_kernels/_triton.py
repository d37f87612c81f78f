"""Triton, or its absence said once.

Triton exists for Linux only, and a lab's Windows laptop must still import the package: without it `jit` returns the
plain function, which nobody launches, and `MISSING` says why.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

__all__ = ["INTERPRETED", "MISSING", "jit", "on_device", "tl", "triton", "why_no_dot", "why_not"]

# read when this is imported, as Triton does when a kernel is decorated
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

try:
    import triton
    import triton.language as tl

    jit: Any = triton.jit
    MISSING = ""
except ImportError as error:

    class _Absent:
        constexpr = int

    triton = None
    tl = _Absent()

    def jit(fn: Any) -> Any:
        return fn

    MISSING = f"triton cannot be imported ({error})"


def why_not(device: torch.device, dtype: torch.dtype | None = None) -> str:
    """Why an elementwise or gather kernel cannot run on this device, or "" if it can.

    Tensor-core kernels ask for more (sm_80); these need sm_75, and 16-bit or 32-bit numbers.
    """
    if MISSING:
        return MISSING
    if device.type != "cuda":
        return f"Triton kernels run on CUDA, this is {device.type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 5):
        return "the device is older than sm_75"
    if dtype == torch.float64:
        return "float64 is left to torch"
    return ""


def why_no_dot(device: torch.device, dtype: torch.dtype | None = None) -> str:
    """Likewise for a kernel that multiplies matrices."""
    refusal = why_not(device, dtype)
    if refusal or torch.version.hip is not None:
        return refusal
    return "" if torch.cuda.get_device_capability(device) >= (8, 0) else "the device is older than sm_80"


def on_device(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Launches go to the tensor's own GPU; under the interpreter there is none."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
