"""Bias and ReLU in one pass over a convolution's output, in place.

    y[n, c, h, w] <- relu(y[n, c, h, w] + bias[c])

y [N, C, H, W] dense, contiguous or channels_last; the sum is fp32 whatever the operands. torch takes two passes for
it after a cuDNN convolution (the bias is a kernel of its own, then the ReLU), this takes one: 2 x bytes of y instead
of 4 x. It is a candidate for the end of `conv3x3_relu` on CUDA, and no public op yet: no GPU has timed it.
One program adds to BLOCK values that lie one behind the other.
"""

import torch
from torch import Tensor

from . import _triton
from ._triton import jit, tl

__all__ = ["launch_bias_relu_"]


@jit
def _fwd_kernel(  # type: ignore[no-untyped-def]
    y_ptr, bias_ptr,
    size, C, pixels,
    RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = i < size
    c = i % C if CHANNELS_LAST else (i // pixels) % C
    z = tl.load(y_ptr + i, mask=inside, other=0).to(tl.float32)
    z += tl.load(bias_ptr + c, mask=inside, other=0).to(tl.float32)
    if RELU:
        # not a maximum: that turns NaN into 0 on a GPU, and a diverged net would look healthy
        z = tl.where(z < 0, 0.0, z)
    tl.store(y_ptr + i, z.to(y_ptr.dtype.element_ty), mask=inside)


def launch_bias_relu_(y: Tensor, bias: Tensor, relu: bool = True) -> Tensor:
    channels_last = not y.is_contiguous()
    if channels_last and not y.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"y must be dense, contiguous or channels_last, got strides {y.stride()}")
    if y.numel() == 0:
        return y
    BLOCK = 1024
    # one program per BLOCK values
    with _triton.on_device(y):
        _fwd_kernel[(-(-y.numel() // BLOCK),)](
            y, bias.contiguous(),
            y.numel(), y.shape[1], y.shape[2] * y.shape[3],
            RELU=relu, CHANNELS_LAST=channels_last, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return y
