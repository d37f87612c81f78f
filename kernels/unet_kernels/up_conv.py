"""Up-convolution: twice the rows and columns, usually half the channels. Two readings of the paper's one sentence.

"deconv" (what the authors' release does): ConvTranspose2d(2, stride 2), one tap reaches each output,

    y[n, co, 2h + a, 2w + b] = bias[co] + sum_ci x[n, ci, h, w] weight[ci, co, a, b]

"resize" (what the paper's text says): a 2x2 convolution of the map doubled by repetition, its bottom and right edge
repeated once more so that nothing is invented and 2H x 2W comes out. The doubled map is never stored: output phase
(a, b) only ever sees source pixels (h .. h + a, w .. w + b), so it is a (1 + a) x (1 + b) convolution of x itself with
the taps that fall on one source pixel summed beforehand. That is 9 taps a source pixel instead of 16. (On a plain CPU
tensor smaller than its weight the expression itself is cheaper, and is what runs.)
Derivation: docs/mathematics.md, section 3.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks, reference

__all__ = ["up_conv"]

# the one with all four taps first: it alone sees the weight as it is, and so chooses ATen's memory format
PHASES = ((1, 1), (1, 0), (0, 1), (0, 0))


@torch.library.custom_op("unet::up_conv", mutates_args=())
@_checks.outside_autocast
def _op(x: Tensor, weight: Tensor, bias: Tensor, mode: str) -> Tensor:
    if mode == "deconv":
        return reference.up_conv(x, weight, bias, mode)
    padded = F.pad(x, (0, 1, 0, 1), mode="replicate")
    height, width = x.shape[-2:]
    phases = [F.conv2d(_seen(padded, a, b, height, width), _summed(weight, a, b), bias) for a, b in PHASES]
    y = _doubled(phases[0])
    for (a, b), phase in zip(PHASES, phases, strict=True):
        y[:, :, a::2, b::2] = phase
    return y


def _doubled(phase: Tensor) -> Tensor:
    """An empty map of twice the rows and columns, in the memory format of phase, which a convolution chose."""
    n, c, height, width = phase.shape
    # not `is_contiguous`: with one channel or one pixel both formats are contiguous, and strides say which is meant
    channels_last = phase.stride(1) == 1 and phase.stride(3) == c
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((n, c, 2 * height, 2 * width), dtype=phase.dtype, device=phase.device, memory_format=layout)


def _seen(padded: Tensor, a: int, b: int, height: int, width: int) -> Tensor:
    return padded[:, :, : height + a, : width + b]


def _summed(weight: Tensor, a: int, b: int) -> Tensor:
    """The taps of phase (a, b): those that read one source pixel are summed (in float32 for 16-bit weights)."""
    axes = [axis for axis, phase in ((2, a), (3, b)) if phase == 0]
    if not axes:
        return weight
    wide = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
    return wide.sum(axes, keepdim=True).to(weight.dtype)


# a fake whose body is the ATen composite gets the strides right
_op.register_fake(_checks.outside_autocast(reference.up_conv))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, mode = inputs
    ctx.save_for_backward(x, weight)
    ctx.mode = mode


@_checks.outside_autocast
def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    if ctx.mode == "deconv":
        gradients = torch.ops.aten.convolution_backward(
            dy, x, weight, [weight.shape[1]], [2, 2], [0, 0], [1, 1], True, [0, 0], 1, needs
        )
        return (*gradients, None)
    dx, dweight = _resize_backward(dy, x, weight, needs)
    return dx, dweight, dy.sum((0, 2, 3)) if needs[2] else None, None


def _resize_backward(dy: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor | None, Tensor | None]:
    height, width = x.shape[-2:]
    padded = F.pad(x, (0, 1, 0, 1), mode="replicate")
    dpadded, dweight = torch.zeros_like(padded), torch.zeros_like(weight)
    for a, b in PHASES:
        taps, seen = _summed(weight, a, b), _seen(padded, a, b, height, width)
        dseen, dtaps, _ = torch.ops.aten.convolution_backward(
            dy[:, :, a::2, b::2], seen, taps, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [*needs[:2], False]
        )
        if needs[0]:
            _seen(dpadded, a, b, height, width).add_(dseen)
        if needs[1]:
            # a summed tap hands its gradient to every tap in the sum
            dweight.add_(dtaps)
    if not needs[0]:
        return None, dweight if needs[1] else None
    # the repeated edge gives back to the row (column) it repeats
    dpadded[:, :, height - 1].add_(dpadded[:, :, height])
    dpadded[:, :, :, width - 1].add_(dpadded[:, :, :, width])
    return dpadded[:, :, :height, :width], dweight if needs[1] else None


_op.register_autograd(_backward, setup_context=_setup)


def up_conv(x: Tensor, weight: Tensor, bias: Tensor, *, mode: str) -> Tensor:
    """2x2 up-convolution.

    Args:
        x: [N, C_in, H, W], H and W at least 1; float32, float16, bfloat16 or float64.
        weight: "deconv": [C_in, C_out, 2, 2], as nn.ConvTranspose2d keeps it. "resize": [C_out, C_in, 2, 2], as
            nn.Conv2d keeps it. Dtype and device of x.
        bias: [C_out], likewise.
        mode: "deconv" equals `conv_transpose2d(x, weight, bias, stride=2)`; "resize" equals
            `conv2d(pad(interpolate(x, scale_factor=2), (0, 1, 0, 1), "replicate"), weight, bias)`.

    Returns:
        [N, C_out, 2 H, 2 W], dtype of x, in the strides of those expressions. Differentiable in x, weight and bias.
        Under autocast the arguments are cast to its dtype.

    Raises:
        TypeError: an argument is no tensor, or its dtype is not floating or differs from x's.
        ValueError: a shape or device does not fit, or mode is neither of the two.

    >>> up_conv(torch.zeros(1, 1024, 28, 28), torch.zeros(1024, 512, 2, 2), torch.zeros(512), mode="deconv").shape
    torch.Size([1, 512, 56, 56])
    """
    _checks.expect_choice("mode", mode, ("deconv", "resize"))
    _checks.expect_float("x", x, "N, C_in, H, W")
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"x must have at least one row and one column, got {x.shape[2]}x{x.shape[3]}")
    channels, outputs = x.shape[1], 1 if mode == "deconv" else 0
    _checks.expect_float("weight", weight, "C_in, C_out, 2, 2" if mode == "deconv" else "C_out, C_in, 2, 2")
    wanted = (channels, -1, 2, 2) if mode == "deconv" else (-1, channels, 2, 2)
    _checks.expect_size("weight", weight, wanted, f'for mode "{mode}" (C_in is the channels of x)')
    _checks.expect_float("bias", bias, "C_out")
    _checks.expect_size("bias", bias, (weight.shape[outputs],), "(one per output channel of weight)")
    if weight.numel() < 1:
        raise ValueError(f"weight must have at least one channel in and out, got {list(weight.shape)}")
    x, weight, bias = _checks.autocast(x, weight, bias)
    _checks.expect_like("weight", weight, "x", x)
    _checks.expect_like("bias", bias, "x", x)
    if _checks.transformed():
        return reference.up_conv(x, weight, bias, mode)
    # four products with sums of a weight that is larger than the map cost more than doubling the map
    if _checks.ordinary_on_cpu(x) and (mode == "deconv" or x.numel() < weight.numel()):
        return reference.up_conv(x, weight, bias, mode)
    return _op(x, weight, bias, mode)
