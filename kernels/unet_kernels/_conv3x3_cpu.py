"""What a CPU does faster than ATen, or in less memory, for a 3x3 convolution whose weight lies in channels_last.

Forward and backward, each with the sizes from which on it pays (docs/findings/0002 and 0010 have the measurements).
Elsewhere ATen's own is as good, and is what runs.
"""

import torch
from torch import Tensor

from . import _aten, _layout, reference

__all__ = ["conv3x3_relu", "derivatives", "has_a_better_derivative", "weight_gradient"]

# what ATen's weight gradient in channels_last is written for
WIDE_VECTORS = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
# values that the taps of a row may see at once
MOST_WINDOWS = 1 << 19


@_aten.through_float32
def conv3x3_relu(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    """The reference's result."""
    if _turning_costs_more(x, weight):
        return _as_product(x, weight, bias, relu)
    return reference.conv3x3_relu(x, weight, bias, relu)


def _turning_costs_more(x: Tensor, weight: Tensor) -> bool:
    """Whether a CPU spends more on turning the weight into ATen's own format, every time, than on the convolution.

    At the bottom of the paper's net, tile 188, ATen takes 46 ms, the product 8 (findings/0010).
    """
    pixels = x.shape[0] * (x.shape[2] - 2) * (x.shape[3] - 2)
    return pixels <= 200 and weight.numel() >= 1 << 22 and x.dtype == torch.float32


def _as_product(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    """The windows [pixels, 9 C_in] times the weight as it lies in channels_last."""
    N, _, H, W = x.shape
    C_out = weight.shape[0]
    # [N, H - 2, W - 2, C, 3, 3], a view
    windows = x.permute(0, 2, 3, 1).unfold(1, 3, 1).unfold(2, 3, 1)
    rows = windows.permute(0, 1, 2, 4, 5, 3).reshape(N * (H - 2) * (W - 2), -1)
    # made first and filled: what is a view autograd would not let the ReLU change in place
    y = _layout.empty_channels_last((N, C_out, H - 2, W - 2), x)
    torch.addmm(bias, rows, weight.permute(2, 3, 1, 0).reshape(-1, C_out), out=y.permute(0, 2, 3, 1).view(-1, C_out))
    return y.relu_() if relu else y


@_aten.through_float32
def derivatives(dy: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor | None, ...]:
    """(dx, dweight, dbias) of the convolution of x, each where it is needed."""
    if not (needs[1] and _weight_gradient_pays(x, weight)):
        return _aten.convolution_backward(dy, x, weight, needs)
    dx = _aten.convolution_backward(dy, x, weight, [True, False, False])[0] if needs[0] else None
    return dx, weight_gradient(dy, x, weight), dy.sum((0, 2, 3)) if needs[2] else None


def has_a_better_derivative(x: Tensor, weight: Tensor) -> bool:
    """Whether `derivatives` are better than ATen's autograd."""
    return _aten.is_narrow(x) or _weight_gradient_pays(x, weight)


def _weight_gradient_pays(x: Tensor, weight: Tensor) -> bool:
    """Whether `weight_gradient` is better than ATen's."""
    return _weight_is_large(x, weight) or _products_are_faster(x, weight)


def weight_gradient(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """dweight, in channels_last, of dy [N, C_out, H - 2, W - 2] and x [N, C_in, H, W]."""
    by_product = _products_are_faster(x, weight) or _few_pixels(x, weight)
    return _product(dy, x, weight) if by_product else _turned(dy, x, weight)


def _is_channels_last(weight: Tensor) -> bool:
    """Whether weight lies in channels_last, or is the channels of one map out of such a weight."""
    pitch = weight.stride(3)
    return weight.stride() == (9 * pitch, 1, 3 * pitch, pitch) and pitch >= weight.shape[1]


def _weight_is_large(x: Tensor, weight: Tensor) -> bool:
    """Whether the weight outweighs the maps: then the memory format of its gradient is what a CPU spends on.

    ATen makes the gradient contiguous inside its own call and turns it there, three copies alive at once.
    """
    # from what size on: ATen takes another way, without these copies, where all is small
    least = 1 << 16 if _few_pixels(x, weight) else 1 << 18
    return _is_channels_last(weight) and 0 < x.numel() < weight.numel() and weight.numel() >= least


def _few_pixels(x: Tensor, weight: Tensor) -> bool:
    """Whether a product costs less than ATen's weight gradient, where that is written for the processor's vectors.

    In time it wins on few pixels and loses little where the weight is small; in memory it wins up to about twice as
    many pixels as channels.
    """
    pixels = x.shape[0] * (x.shape[2] - 2) * (x.shape[3] - 2)
    return 2 * pixels <= 3 * weight.shape[0] and (pixels <= 64 or weight.numel() <= 1 << 20)


def _products_are_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether a product costs less because ATen's way through channels_last is written for AVX-512 only.

    Without it that way takes up to four times as long as the product does, from some work on.
    """
    work = x.shape[0] * (x.shape[2] - 2) * (x.shape[3] - 2) * weight.shape[0] * weight.shape[1]
    worth_it = work >= 12_000_000 and weight.shape[0] * weight.shape[1] >= 1024
    return not WIDE_VECTORS and worth_it and _is_channels_last(weight) and x.stride(1) == 1 and x.dtype == torch.float32


def _product(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """dweight written in channels_last at once: a row of taps is dY^T [C_out, pixels] times X [pixels, 3 C_in].

    Some lines of the map after the other, so that what the taps see of them fits a cache.
    """
    _, c_out, height, width = dy.shape
    c_in = x.shape[1]
    band = max(1, MOST_WINDOWS // (3 * c_in * width))
    dweight = dy.new_empty((c_out, 3, 3 * c_in))
    for top in range(0, height, band):
        lines = min(band, height - top)
        by_channel = dy[:, :, top : top + lines].permute(1, 0, 2, 3).reshape(c_out, -1)
        for r in range(3):
            seen = _windows(x[:, :, top + r : top + r + lines], width)
            # in place and not `out=`, which has no derivative
            dweight[:, r].addmm_(by_channel, seen, beta=0 if top == 0 else 1)
    return dweight.view(c_out, 3, 3, c_in).permute(0, 3, 1, 2)


def _windows(x: Tensor, width: int) -> Tensor:
    """[pixels, 3 C_in]: what the three taps of a row see of these lines."""
    seen = x.unfold(3, width, 1)  # [N, C_in, lines, 3, width]
    return seen.permute(0, 2, 4, 3, 1).reshape(x.shape[0] * x.shape[2] * width, -1)


def _turned(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """ATen's, turned into the weight's strides after ATen's own copies of it are gone."""
    # of the weight ATen needs the shape; as if it were contiguous, so that the gradient comes contiguous
    c_in = weight.shape[1]
    shape_only = weight.detach().as_strided(weight.shape, (9 * c_in, 9, 3, 1))
    dweight = _aten.convolution_backward(dy.contiguous(), x.contiguous(), shape_only, [False, True, False])[1]
    assert dweight is not None
    return dweight.contiguous(memory_format=torch.channels_last)
