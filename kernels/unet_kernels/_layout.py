"""How maps lie in memory: what ATen reads out of strides, and when a map or a weight is a matrix as it lies.

A map [N, C, H, W] in channels_last is a matrix with a row of C values per pixel; `pitch` rows make a line of the image,
W of them where it is dense, more where it is a window of something wider.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import _triton

__all__ = [
    "empty_as",
    "empty_channels_last",
    "empty_convolved",
    "is_matrix",
    "matrix_of_pixels",
    "matrix_of_weight",
    "of",
    "pitch",
    "rows",
    "suggests_channels_last",
    "words",
]


def suggests_channels_last(t: Tensor) -> bool:
    """Whether ATen reads t's strides as channels_last; a view that is not dense counts, an ambiguous one does not."""
    smallest = 0
    shape: Sequence[int] = t.shape
    strides = t.stride()
    if strides[1] == 0:
        return False
    for axis in (1, 3, 2, 0):
        if shape[axis] == 0 or strides[axis] < smallest:
            return False
        if axis == 0 and smallest == strides[1]:
            return False
        smallest = strides[axis] * max(shape[axis], 1)
    return True


def of(t: Tensor) -> torch.memory_format:
    """The dense memory format nearest to t's strides."""
    return torch.channels_last if suggests_channels_last(t) else torch.contiguous_format


def empty_as(t: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty map of t's shape, dense in `of(t)`: what its gradient is written into."""
    return torch.empty(t.shape, dtype=dtype, device=t.device, memory_format=of(t))


def empty_channels_last(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def empty_convolved(shape: Sequence[int], weight: Tensor, *maps: Tensor) -> Tensor:
    """An empty result in the strides ATen gives a convolution of the concatenated maps."""
    channels_last = suggests_channels_last(weight) or all(map(suggests_channels_last, maps))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=weight.dtype, device=weight.device, memory_format=layout)


def pitch(t: Tensor) -> int:
    """Pixels from one line of t to the next, where t is a matrix of pixels that a descriptor can name; else 0."""
    stride_n, stride_c, stride_h, stride_w = t.stride()
    per_pixel = stride_w if t.shape[3] > 1 else max(t.shape[1], 1)
    if t.numel() == 0 or (stride_c != 1 and t.shape[1] > 1) or per_pixel < t.shape[1]:
        return 0
    if per_pixel * t.element_size() % 16 or not _starts_evenly(t):
        return 0
    a_line = stride_h if t.shape[2] > 1 else per_pixel * t.shape[3]
    if a_line % per_pixel or a_line < per_pixel * t.shape[3]:
        return 0
    if t.shape[0] > 1 and (stride_n % per_pixel or stride_n < a_line * (t.shape[2] - 1) + per_pixel * t.shape[3]):
        return 0
    return a_line // per_pixel


def words(*maps: Tensor, weight: Tensor | None = None) -> str:
    """How maps, and a weight, lie, as far as it decides which way is the fastest, and what strides come out."""
    if all(map(pitch, maps)) and (weight is None or is_matrix(weight)):
        return "channels_last"
    of_weight = weight is not None and suggests_channels_last(weight)
    # one channel lies in both orders at once, and beside such a weight it does not matter which is meant
    in_order = all(suggests_channels_last(t) or (of_weight and t.shape[1] == 1) for t in maps)
    kinds = ["channels_last" if in_order else "other strides"]
    if weight is not None and not is_matrix(weight):
        kinds.append("weight in channels_last" if of_weight else "weight in other strides")
    return f"{', '.join(kinds)}, unaligned" if kinds[0] == "channels_last" else ", ".join(kinds)


def rows(t: Tensor) -> int:
    """Pixels from one image of t to the next, t a matrix of pixels."""
    lines = (t.shape[2] - 1) * pitch(t) + t.shape[3]
    return t.stride(0) // _per_pixel(t) if t.shape[0] > 1 else lines


def _per_pixel(t: Tensor) -> int:
    return t.stride(3) if t.shape[3] > 1 else t.shape[1]


def _starts_evenly(t: Tensor) -> bool:
    """Whether t begins at a multiple of 16 bytes, as the steps of a descriptor must."""
    # a fake tensor has no address; an allocation begins on more than 16 bytes
    at = t.storage_offset() * t.element_size() if isinstance(t, FakeTensor) else t.data_ptr()
    return at % 16 == 0


def is_matrix(weight: Tensor) -> bool:
    """Whether weight [C_out, C_in, R, S] lies as [C_out, R S C_in], and a descriptor can name it."""
    _, c, r, s = weight.shape
    aligned = c * weight.element_size() % 16 == 0 and _starts_evenly(weight)
    return aligned and weight.stride() == (r * s * c, 1, s * c, c)


def matrix_of_pixels(t: Tensor, block_rows: int, block_columns: int) -> Any:
    """A descriptor of t [N, C, H, W] as [pixels, C], a box of which is fetched at once."""
    last = (t.shape[0] - 1) * rows(t) + (t.shape[2] - 1) * pitch(t) + t.shape[3]
    return _triton.descriptor(t, [last, t.shape[1]], [_per_pixel(t), 1], [block_rows, block_columns])


def matrix_of_weight(weight: Tensor, block_rows: int, block_columns: int) -> Any:
    """A descriptor of weight as [C_out, R S C_in]."""
    width = weight.stride(0)
    return _triton.descriptor(weight, [weight.shape[0], width], [width, 1], [block_rows, block_columns])
