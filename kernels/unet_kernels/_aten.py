"""ATen's convolutions as the ops call them; 16-bit maps on a processor without arithmetic for them go through float32.

ATen has loops of its own for those: they unfold the map into columns of nine times its bytes and multiply one number
at a time, which takes ten to twenty times as long as the same convolution in float32 (docs/findings/0012).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _checks

__all__ = ["convolution_backward", "is_narrow", "made_by_relu", "masked", "multiplies_in", "through_float32"]

# how oneDNN is asked
_ASKED = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


@functools.cache
def _has_arithmetic(dtype: torch.dtype) -> bool:
    """Whether ATen hands a CPU's convolutions in this dtype to oneDNN."""
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, _ASKED[dtype])())


def multiplies_in(device: torch.device | str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that convolutions of maps of `dtype` compute in on a device: float32 where it cannot multiply 16 bits.

    There an op makes float32 copies of its maps while it runs.
    """
    lacking = torch.device(device).type == "cpu" and dtype in _ASKED and not _has_arithmetic(dtype)
    return torch.float32 if lacking else dtype


def is_narrow(x: Tensor) -> bool:
    """Whether x, which is no fake tensor, lies on a CPU in 16 bits, which that CPU cannot multiply."""
    return x.dtype in _ASKED and _checks.is_real(x) and multiplies_in(x.device, x.dtype) != x.dtype


def through_float32(computation: Callable[..., Any]) -> Callable[..., Any]:
    """`computation` whose tensors, where the first of them is narrow, are float32 inside and the first's dtype outside.

    For what autograd does not see: what it kept would be twice as large.
    """

    @functools.wraps(computation)
    def widened(*args: Any, **settings: Any) -> Any:
        first = next(a for a in args if isinstance(a, Tensor))
        if not is_narrow(first):
            return computation(*args, **settings)
        found = computation(*(a.float() if isinstance(a, Tensor) else a for a in args), **settings)
        if isinstance(found, Tensor):
            return found.to(first.dtype)
        return tuple(None if each is None else each.to(first.dtype) for each in found)

    return widened


@through_float32
def convolution_backward(
    dy: Tensor, x: Tensor, weight: Tensor, needs: list[bool], stride: int = 1, transposed: bool = False
) -> tuple[Tensor | None, ...]:
    """(dx, dweight, dbias) of an unpadded convolution, each where it is needed."""
    outputs = weight.shape[1 if transposed else 0]
    gradients: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
        dy, x, weight, [outputs], [stride, stride], [0, 0], [1, 1], transposed, [0, 0], 1, needs
    )
    return gradients


def made_by_relu(x: Tensor) -> Tensor:
    """x, a ReLU's result, for a derivative that may be derived again: what x then gets, too, passes its mask."""
    return torch.relu(x) if torch.is_grad_enabled() else x


def masked(dx: Tensor, x: Tensor) -> Tensor:
    """dx back through the ReLU that made x: zero where x <= 0, which no NaN satisfies."""
    through: Tensor = torch.ops.aten.threshold_backward(dx, x, 0)
    return through
