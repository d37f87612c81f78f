"""The elastic warp: docs/mathematics.md, section 6."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["displaced", "elastic_warp", "gather", "lut_segment", "mirror", "sample", "taps", "transformed", "window"]


def elastic_warp(
    image: Tensor,
    displacement: Tensor,
    labels: Tensor | None = None,
    matrix: Tensor | None = None,
    lut: Tensor | None = None,
    out_size: Sequence[int] | None = None,
    order: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """out(p) = image(A(p + u(p))): image [N, C, H, W], displacement [N, 2, gh, gw], labels [N, H, W] or None.

    Order 1 is linear; order 3 is Keys' cubic with a = -0.75 (the one F.interpolate uses), without a prefilter; labels
    take the nearest pixel, halves upwards. Coordinates are float32, or float64 if image or displacement is.
    """
    height, width = image.shape[-2:]
    y, x = transformed(*displaced(image, displacement, out_size), matrix, height, width)
    out = sample(image.to(y.dtype), y, x, order)
    if lut is not None:
        position, left, right = lut_segment(out, lut, image.dtype)
        out = left + (right - left) * position
    if image.is_floating_point():
        out = out.to(image.dtype)
    else:
        limits = torch.iinfo(image.dtype)
        out = out.round().clamp(limits.min, limits.max).to(image.dtype)
    if labels is None:
        return out, None
    row, column = mirror((y + 0.5).floor(), height), mirror((x + 0.5).floor(), width)
    return out, gather(labels.long().unsqueeze(1), row * width + column).squeeze(1).to(labels.dtype)


def displaced(image: Tensor, displacement: Tensor, out_size: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """p + u(p) for every output pixel: rows and columns, two maps [N, h, w]."""
    height, width = image.shape[-2:]
    precise = torch.float64 in (image.dtype, displacement.dtype)
    dtype = torch.float64 if precise else torch.float32
    y, x = window(out_size, height, width, image.device)
    u = F.interpolate(displacement.to(dtype), size=(height, width), mode="bicubic", align_corners=True)
    # outside the image the displacement keeps its edge value
    u = u[:, :, y.clamp(0, height - 1)][:, :, :, x.clamp(0, width - 1)]
    return y.to(dtype)[:, None] + u[:, 0], x.to(dtype) + u[:, 1]


def window(out_size: Sequence[int] | None, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Image rows [h] and columns [w] of the output window, which may begin and end outside the image."""
    rows, columns = (height, width) if out_size is None else out_size
    y = torch.arange(rows, device=device) + (height - rows) // 2
    return y, torch.arange(columns, device=device) + (width - columns) // 2


def transformed(y: Tensor, x: Tensor, matrix: Tensor | None, height: int, width: int) -> tuple[Tensor, Tensor]:
    """A(q): the affine map about the image's centre."""
    if matrix is None:
        return y, x
    m = matrix.to(y.dtype)[:, :, :, None, None]
    centre_y, centre_x = (height - 1) / 2, (width - 1) / 2
    y, x = y - centre_y, x - centre_x
    return (
        m[:, 0, 0] * y + m[:, 0, 1] * x + m[:, 0, 2] + centre_y,
        m[:, 1, 0] * y + m[:, 1, 1] * x + m[:, 1, 2] + centre_x,
    )


def sample(image: Tensor, y: Tensor, x: Tensor, order: int) -> Tensor:
    """image [N, C, H, W] at the positions y, x [N, h, w] -> [N, C, h, w]."""
    height, width = image.shape[-2:]
    y0, x0 = y.floor(), x.floor()
    out = torch.zeros((), dtype=image.dtype, device=image.device)
    for dy, of_row in taps(y - y0, order):
        row = mirror(y0 + dy, height) * width
        for dx, of_column in taps(x - x0, order):
            out = out + gather(image, row + mirror(x0 + dx, width)) * (of_row * of_column).unsqueeze(1)
    return out


def taps(f: Tensor, order: int, a: float = -0.75) -> list[tuple[int, Tensor]]:
    """(offset, weight) of the pixels that a position reads; f in [0, 1) is its distance from pixel 0."""
    if order == 1:
        return [(0, 1 - f), (1, f)]

    def inner(t: Tensor) -> Tensor:
        return ((a + 2) * t - (a + 3)) * t * t + 1

    def outer(t: Tensor) -> Tensor:
        return ((a * t - 5 * a) * t + 8 * a) * t - 4 * a

    return [(-1, outer(1 + f)), (0, inner(f)), (1, inner(1 - f)), (2, outer(2 - f))]


def mirror(index: Tensor, size: int) -> Tensor:
    """Integer positions folded into 0 .. size - 1 without repeating the edge: 1234 -> 32123432."""
    if size == 1:
        return torch.zeros_like(index, dtype=torch.int64)
    period = 2 * (size - 1)
    folded = index.long() % period
    return torch.where(folded < size, folded, period - folded)


def gather(image: Tensor, index: Tensor) -> Tensor:
    """image [N, C, H, W] at flat positions index [N, h, w] -> [N, C, h, w]."""
    n, c = image.shape[:2]
    flat = index.flatten(1).unsqueeze(1).expand(n, c, -1)
    return image.flatten(2).gather(2, flat).unflatten(2, index.shape[-2:])


def lut_segment(values: Tensor, lut: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(position between, left entry, right entry) of each value in lut [L] or [N, L].

    The entries span 0 .. the dtype's maximum (0 .. 1 for floats); beyond them the table is flat.
    """
    top = 1.0 if dtype.is_floating_point else float(torch.iinfo(dtype).max)
    entries = lut.shape[-1]
    table = lut.to(values.dtype).expand(values.shape[0], entries)
    position = (values / top * (entries - 1)).clamp(0, entries - 1)
    low = position.detach().floor().clamp(max=entries - 2)
    index = low.nan_to_num().long().flatten(1)
    left, right = (table.gather(1, index + i).view_as(values) for i in (0, 1))
    return position - low, left, right
