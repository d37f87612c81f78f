"""Triton, or its absence said once.

Triton exists for Linux only, and a lab's Windows laptop must still import the package: without it `jit` returns the
plain function, which nobody launches, and `MISSING` says why.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

__all__ = [
    "INTERPRETED",
    "MISSING",
    "chip",
    "descriptor",
    "jit",
    "on_device",
    "precision",
    "pretending",
    "processors",
    "tl",
    "triton",
    "why_no_dot",
    "why_not",
]

# read when this is imported, as Triton does when a kernel is decorated
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    jit: Any = triton.jit
    MISSING = ""
except ImportError as error:

    class _Absent:
        constexpr = int

    triton = TensorDescriptor = None
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
    if device.type == "cpu" and INTERPRETED:
        return "float64 is left to torch" if dtype == torch.float64 else ""
    if device.type != "cuda":
        return f"Triton kernels run on CUDA, this is {device.type}"
    if 0 < chip(device) < 75:
        return "the device is older than sm_75"
    if dtype == torch.float64:
        return "float64 is left to torch"
    return ""


def why_no_dot(device: torch.device, dtype: torch.dtype | None = None) -> str:
    """Likewise for a kernel that multiplies matrices."""
    refusal = why_not(device, dtype)
    return refusal or ("the device is older than sm_80" if 0 < chip(device) < 80 else "")


# a chip that is spoken of but not here: what `pretending` says
_pretended = 0


@contextmanager
def pretending(chip: int) -> Iterator[None]:
    """Inside the block, CUDA devices are taken for chips of this compute capability, H100s in number of processors.

    For questions about chips that are not here; nothing can be launched on them.
    """
    global _pretended
    before, _pretended = _pretended, chip
    try:
        yield
    finally:
        _pretended = before


def chip(device: torch.device) -> int:
    """Compute capability as two digits, 0 for another maker's; the interpreter can do all that an sm_90 can."""
    if _pretended or device.type != "cuda":
        return _pretended or 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor if torch.version.hip is None else 0


def processors(device: torch.device) -> int:
    """How many multiprocessors a launch should keep busy."""
    if _pretended or device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_device(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Launches go to the tensor's own GPU; under the interpreter there is none."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def descriptor(base: torch.Tensor, shape: list[int], strides: list[int], block: list[int]) -> Any:
    """What the copy engine of sm_90 reads boxes of `block` values of a matrix by; beyond `shape` it reads zeros."""
    return TensorDescriptor(base, shape, strides, block)


def precision(dtype: torch.dtype, of_products: bool = False) -> str:
    """How exact torch's convolutions (or its matrix products) of float32 are: "tf32" (ten bits), or "ieee"."""
    if dtype != torch.float32:
        return "ieee"
    # "none" where it was asked for by the older name, allow_tf32 = False
    convolutions = getattr(torch.backends.cudnn, "conv")  # noqa: B009 (mypy does not know it)
    told: str = (torch.backends.cuda.matmul if of_products else convolutions).fp32_precision
    return "tf32" if told == "tf32" else "ieee"
