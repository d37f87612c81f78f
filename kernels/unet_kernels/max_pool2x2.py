"""2x2 max-pool with stride 2 that keeps its input and no indices.

    y[n, c, h, w] = max over a, b in {0, 1} of x[n, c, 2h + a, 2w + b]

torch keeps, besides x, which its neighbours need anyway, an int64 index for every output: 75 MB in the paper's net.
Here the backward finds the places again; ties and NaN go where torch sends them, because it is torch that looks.
On CUDA torch writes those indices even where nobody wants a gradient; `_fwd_kernel` does not. A program takes the
maxima of BLOCK_C channels of BLOCK_P pixels.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from . import _checks, _choosing, _layout, _triton, reference
from ._choosing import Question, Way
from ._triton import jit, tl

__all__ = ["launch_max_pool2x2_fwd", "max_pool2x2", "question"]


@jit
def _fwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr,
    H_out, W_out, pixels, C,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_yn, stride_yc, stride_yh, stride_yw,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)  # [BLOCK_C]
    n, h, w = (p // W_out // H_out).to(tl.int64), (p // W_out % H_out).to(tl.int64), (p % W_out).to(tl.int64)
    inside = (p < pixels)[:, None] & (c < C)[None, :]
    x_at = x_ptr + (n * stride_xn + 2 * h * stride_xh + 2 * w * stride_xw)[:, None] + (c * stride_xc)[None, :]
    largest = tl.load(x_at, mask=inside, other=0.0)
    for k in tl.static_range(1, 4):
        other = tl.load(x_at + k // 2 * stride_xh + k % 2 * stride_xw, mask=inside, other=0.0)
        # not a maximum: that loses NaN on a GPU; the first of equal values stays
        largest = tl.where((other > largest) | (other != other), other, largest)
    y_at = y_ptr + (n * stride_yn + h * stride_yh + w * stride_yw)[:, None] + (c * stride_yc)[None, :]
    tl.store(y_at, largest, mask=inside)


def launch_max_pool2x2_fwd(x: Tensor, values: int = 4096) -> Tensor:
    """`values` results a program."""
    N, C, H, W = x.shape
    y = _empty_pooled(x)
    if y.numel() == 0:
        return y
    BLOCK_C = min(128, max(8, 1 << (C - 1).bit_length())) if _layout.suggests_channels_last(x) else 1
    BLOCK_P = values // BLOCK_C
    pixels = N * (H // 2) * (W // 2)
    # one program per block of pixels, of channels
    with _triton.on_device(x):
        _fwd_kernel[(-(-pixels // BLOCK_P), -(-C // BLOCK_C))](
            x, y, H // 2, W // 2, pixels, C, *x.stride(), *y.stride(), BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C, num_warps=4
        )
    return y


def _empty_pooled(x: Tensor) -> Tensor:
    N, C, H, W = x.shape
    layout = torch.channels_last if _layout.suggests_channels_last(x) else torch.contiguous_format
    return torch.empty((N, C, H // 2, W // 2), dtype=x.dtype, device=x.device, memory_format=layout)


def question(x: Tensor) -> Question:
    def ways() -> list[Way]:
        ours = (Way(f"{v} values", functools.partial(launch_max_pool2x2_fwd, values=v), True) for v in (4096, 2048))
        return [Way("ATen", reference.max_pool2x2, False), *ours]

    def cut(arguments: tuple[Any, ...], lines: int) -> tuple[Any, ...]:
        return (arguments[0][:, :, :lines],)

    pixels = _choosing.octave(x.shape[0] * x.shape[2] * x.shape[3])
    laid_out = "channels_last" if _layout.suggests_channels_last(x) else "contiguous"
    case = f"{x.shape[1]} channels, {pixels}, {_choosing.arithmetic(x.dtype)}, {laid_out}"
    return Question("max_pool2x2", case, ways, reference.max_pool2x2, cut)


@torch.library.custom_op("unet::max_pool2x2", mutates_args=())
def _op(x: Tensor) -> Tensor:
    return _choosing.computed(question, reference.max_pool2x2, (x,), _triton.why_not)


_op.register_fake(reference.max_pool2x2)


def _setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


@_checks.outside_autocast
def _backward(ctx: Any, dy: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    _, places = torch.ops.aten.max_pool2d_with_indices(x, [2, 2], [2, 2])
    return torch.ops.aten.max_pool2d_with_indices_backward(dy, x, [2, 2], [2, 2], [0, 0], [1, 1], False, places)


_op.register_autograd(_backward, setup_context=_setup)


def _maxima(x: Tensor) -> Tensor:
    """Without the indices, which cost a CPU more than the maxima do."""
    rows, columns = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    first, *others = (x[:, :, i:rows:2, j:columns:2] for i in (0, 1) for j in (0, 1))
    y = _empty_pooled(x)
    # torch's maximum is NaN where one of the two is
    torch.maximum(first, others[0], out=y)
    for other in others[1:]:
        torch.maximum(y, other, out=y)
    return y


class _OnCPU(torch.autograd.Function):
    """The op's derivative without the op's dispatch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        # three calls cost more than the indices of a small map
        y = _maxima(x) if x.numel() > 1 << 17 else reference.max_pool2x2(x)
        _setup(ctx, (x,), y)
        return y

    backward = staticmethod(_backward)


def max_pool2x2(x: Tensor) -> Tensor:
    """Maximum of each 2x2 block.

    Equals `torch.nn.functional.max_pool2d(x, 2)`, strides included: an odd last row or column is left out, NaN passes
    through, and the gradient goes to the first of equal values.

    Args:
        x: [N, C, H, W], H and W at least 2; float32, float16, bfloat16 or float64.

    Returns:
        [N, C, H // 2, W // 2], dtype of x. Differentiable.

    Raises:
        TypeError: x is no tensor, or not floating.
        ValueError: x is not 4-D, or smaller than 2x2.

    >>> max_pool2x2(torch.tensor([[[[1.0, 2.0], [3.0, 0.0]]]]))
    tensor([[[[3.]]]])
    """
    _checks.expect_float("x", x, "N, C, H, W")
    if x.shape[2] < 2 or x.shape[3] < 2:
        raise ValueError(f"x must have at least two rows and two columns, got {x.shape[2]}x{x.shape[3]}")
    if _checks.transformed():
        return reference.max_pool2x2(x)
    return (_OnCPU.apply if _choosing.ordinary_on_cpu(x) else _op)(x)
