"""Convolutions: docs/mathematics.md, sections 2 and 3."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "conv1x1",
    "conv3x3_relu",
    "conv3x3_relu_cat",
    "conv3x3_relu_pool",
    "crop_concat",
    "crop_to",
    "max_pool2x2",
    "uncrop",
    "up_conv",
]


def conv3x3_relu(x: Tensor, weight: Tensor, bias: Tensor, relu: bool = True) -> Tensor:
    """x [N, Ci, H, W], weight [Co, Ci, 3, 3], bias [Co] -> [N, Co, H - 2, W - 2]."""
    y = F.conv2d(x, weight, bias)
    # in place: a convolution's backward never reads its own output, and torch's ReLU lets NaN through
    return y.relu_() if relu else y


def crop_to(skip: Tensor, rows: int, columns: int) -> Tensor:
    """The centred [rows, columns] window of skip [N, C, H, W], as a view."""
    top, left = (skip.shape[-2] - rows) // 2, (skip.shape[-1] - columns) // 2
    return skip[..., top : top + rows, left : left + columns]


def uncrop(window: Tensor, size: Sequence[int]) -> Tensor:
    """The transpose of `crop_to`: window laid back into zeros, size[-2] rows and size[-1] columns of them."""
    rows, columns = size[-2] - window.shape[-2], size[-1] - window.shape[-1]
    top, left = rows // 2, columns // 2
    # where the window is all of skip there is nothing to lay it into, and no copy
    return window if rows == 0 and columns == 0 else F.pad(window, (left, columns - left, top, rows - top))


def crop_concat(up: Tensor, skip: Tensor) -> Tensor:
    """up [N, Cu, H, W], skip [N, Cs, >= H, >= W] -> [N, Cu + Cs, H, W], channels in the order [up, skip]."""
    return torch.cat([up, crop_to(skip, up.shape[-2], up.shape[-1])], dim=1)


def conv3x3_relu_cat(up: Tensor, skip: Tensor, weight: Tensor, bias: Tensor, relu: bool = True) -> Tensor:
    """conv3x3_relu of crop_concat(up, skip)."""
    return conv3x3_relu(crop_concat(up, skip), weight, bias, relu)


def conv3x3_relu_pool(
    x: Tensor, weight: Tensor, bias: Tensor, relu: bool, rows: int, columns: int
) -> tuple[Tensor, Tensor]:
    """The centred [rows, columns] window of conv3x3_relu, and the 2x2 maxima of all of it."""
    y = conv3x3_relu(x, weight, bias, relu)
    return crop_to(y, rows, columns), max_pool2x2(y)


def max_pool2x2(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C, H // 2, W // 2]."""
    return F.max_pool2d(x, 2)


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [N, Ci, H, W], weight [Co, Ci, 1, 1], bias [Co] -> [N, Co, H, W]."""
    return F.conv2d(x, weight, bias)


def up_conv(x: Tensor, weight: Tensor, bias: Tensor, mode: str) -> Tensor:
    """[N, Ci, H, W] -> [N, Co, 2H, 2W]; weight [Ci, Co, 2, 2] ("deconv") or [Co, Ci, 2, 2] ("resize")."""
    if mode == "deconv":
        return F.conv_transpose2d(x, weight, bias, stride=2)
    doubled = F.interpolate(x, scale_factor=2, mode="nearest")
    return F.conv2d(F.pad(doubled, (0, 1, 0, 1), mode="replicate"), weight, bias)
