"""The elastic warp and its derivative: docs/mathematics.md, section 6.

The order of every product and sum is part of the specification: what is rounded alike is alike, bit for bit.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = [
    "displaced",
    "elastic_warp",
    "elastic_warp_gradients",
    "grid_gradient",
    "highest_grey",
    "jacobian",
    "points_per_pixel",
    "transformed",
]


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
    out = _sample(image.to(y.dtype), y, x, order)
    if lut is not None:
        position, left, right = _segment(out, lut, image.dtype)
        out = left + (right - left) * position
    if image.is_floating_point():
        out = out.to(image.dtype)
    else:
        limits = torch.iinfo(image.dtype)
        out = out.round().clamp(limits.min, limits.max).to(image.dtype)
    if labels is None:
        return out, None
    row, column = (_mirror(t.floor() + (t - t.floor() >= 0.5), size) for t, size in ((y, height), (x, width)))
    return out, _gather(labels.long().unsqueeze(1), row * width + column).squeeze(1).to(labels.dtype)


def displaced(image: Tensor, displacement: Tensor, out_size: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """p + u(p) for every output pixel: rows and columns, two maps [N, h, w]."""
    height, width = image.shape[-2:]
    precise = torch.float64 in (image.dtype, displacement.dtype)
    dtype = torch.float64 if precise else torch.float32
    y, x = _window(out_size, height, width, image.device)
    u = displacement.to(dtype)
    for axis, pixel, pixels in ((2, y, height), (3, x, width)):
        parts = [
            u.index_select(axis, point) * (weight.view(-1, 1) if axis == 2 else weight)
            for point, weight in _points(pixel, pixels, u.shape[axis], dtype, _taps)
        ]
        u = _sum(parts)
    return y.to(dtype)[:, None] + u[:, 0], x.to(dtype) + u[:, 1]


def _window(out_size: Sequence[int] | None, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Image rows [h] and columns [w] of the output window, which may begin and end outside the image."""
    rows, columns = (height, width) if out_size is None else out_size
    y = torch.arange(rows, device=device) + (height - rows) // 2
    return y, torch.arange(columns, device=device) + (width - columns) // 2


Taps = Callable[[Tensor, int], list[tuple[int, Tensor]]]


def _points(pixel: Tensor, pixels: int, points: int, dtype: torch.dtype, of: Taps) -> list[tuple[Tensor, Tensor]]:
    """The four grid points around each pixel of an axis, and their weights; the edge's value is kept beyond it."""
    at = pixel.clamp(0, pixels - 1).to(dtype) * points_per_pixel(points, pixels)
    low = at.floor()
    return [((low + offset).long().clamp(0, points - 1), weight) for offset, weight in of(at - low, 3)]


def points_per_pixel(points: int, pixels: int) -> float:
    """Of a grid laid corner to corner."""
    return (points - 1) / (pixels - 1) if pixels > 1 else 0.0


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """From the first to the last."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


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


def _sample(image: Tensor, y: Tensor, x: Tensor, order: int) -> Tensor:
    """image [N, C, H, W] at the positions y, x [N, h, w] -> [N, C, h, w]: down each column, then across."""
    return _weighted(image, y, x, order, _taps, _taps)


def _weighted(image: Tensor, y: Tensor, x: Tensor, order: int, down: Taps, across: Taps) -> Tensor:
    height, width = image.shape[-2:]
    y0, x0 = y.floor(), x.floor()
    rows = [(_mirror(y0 + offset, height) * width, weight.unsqueeze(1)) for offset, weight in down(y - y0, order)]
    columns = []
    for offset, weight in across(x - x0, order):
        column = _mirror(x0 + offset, width)
        columns.append(_sum([_gather(image, row + column) * of for row, of in rows]) * weight.unsqueeze(1))
    return _sum(columns)


def _taps(f: Tensor, order: int, a: float = -0.75) -> list[tuple[int, Tensor]]:
    """(offset, weight) of the pixels that a position reads; f in [0, 1) is its distance from pixel 0."""
    if order == 1:
        return [(0, 1 - f), (1, f)]

    def inner(t: Tensor) -> Tensor:
        return ((a + 2) * t - (a + 3)) * t * t + 1

    # Keys' outer polynomial, a (t^3 - 5 t^2 + 8 t - 4) at t = 1 + f, in factors: a f (1 - f)^2
    g = 1 - f
    outer = a * (f * g)
    return [(-1, outer * g), (0, inner(f)), (1, inner(g)), (2, outer * f)]


def _slopes(f: Tensor, order: int, a: float = -0.75) -> list[tuple[int, Tensor]]:
    """The derivatives of `_taps` by f. At a whole pixel linear has two: this is the one to the right."""
    if order == 1:
        return [(0, -torch.ones_like(f)), (1, torch.ones_like(f))]

    def inner(t: Tensor) -> Tensor:
        return (3 * (a + 2) * t - 2 * (a + 3)) * t

    def outer(t: Tensor) -> Tensor:
        return (3 * a * t - 10 * a) * t + 8 * a

    return [(-1, outer(1 + f)), (0, inner(f)), (1, -inner(1 - f)), (2, -outer(2 - f))]


def _mirror(index: Tensor, size: int) -> Tensor:
    """Integer positions folded into 0 .. size - 1 without repeating the edge: 1234 -> 32123432."""
    if size == 1:
        return torch.zeros_like(index, dtype=torch.int64)
    period = 2 * (size - 1)
    folded = index.long() % period
    return torch.where(folded < size, folded, period - folded)


def _gather(image: Tensor, index: Tensor) -> Tensor:
    """image [N, C, H, W] at flat positions index [N, h, w] -> [N, C, h, w]."""
    n, c = image.shape[:2]
    flat = index.flatten(1).unsqueeze(1).expand(n, c, -1)
    return image.flatten(2).gather(2, flat).unflatten(2, index.shape[-2:])


def _segment(values: Tensor, lut: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(position between, left entry, right entry) of each value in lut [L] or [N, L].

    The entries span 0 .. the dtype's maximum (0 .. 1 for floats); beyond them the table is flat.
    """
    entries = lut.shape[-1]
    table = lut.to(values.dtype).expand(values.shape[0], entries)
    position = (values * _entries_per_grey(entries, dtype)).clamp(0, entries - 1)
    low = position.detach().floor().clamp(max=entries - 2)
    index = low.nan_to_num().long().flatten(1)
    left, right = (table.gather(1, index + i).view_as(values) for i in (0, 1))
    return position - low, left, right


def _entries_per_grey(entries: int, dtype: torch.dtype) -> float:
    return (entries - 1) / highest_grey(dtype)


def highest_grey(dtype: torch.dtype) -> float:
    """What a table's last entry stands for."""
    return 1.0 if dtype.is_floating_point else float(torch.iinfo(dtype).max)


# ---- the derivative


def elastic_warp_gradients(
    dout: Tensor,
    image: Tensor,
    displacement: Tensor,
    matrix: Tensor | None,
    lut: Tensor | None,
    out_size: Sequence[int],
    order: int,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of image, displacement and matrix, those that are needed."""
    height, width = image.shape[-2:]
    q_y, q_x = displaced(image, displacement, out_size)
    y, x = transformed(q_y, q_x, matrix, height, width)
    values, dout = image.to(y.dtype), dout.to(y.dtype)
    if lut is not None:
        read = _sample(values, y, x, order)
        _, left, right = _segment(read, lut, image.dtype)
        slope = (right - left) * _entries_per_grey(lut.shape[-1], image.dtype)
        # the table is flat beyond its ends
        position = read * _entries_per_grey(lut.shape[-1], image.dtype)
        dout = torch.where((position >= 0) & (position <= lut.shape[-1] - 1), dout * slope, 0)
    gradients: list[Tensor | None] = [None, None, None]
    if needs[0]:
        gradients[0] = _handed_back(dout, values, y, x, order).to(image.dtype)
    if needs[1] or needs[2]:
        dy = (dout * _weighted(values, y, x, order, _slopes, _taps)).sum(1)
        dx = (dout * _weighted(values, y, x, order, _taps, _slopes)).sum(1)
        if matrix is not None:
            factors = (q_y - (height - 1) / 2, q_x - (width - 1) / 2, torch.ones_like(q_y))
            sums = [torch.stack([(d * q).sum((1, 2)) for q in factors], 1) for d in (dy, dx)]
            gradients[2] = torch.stack(sums, 1).to(matrix.dtype) if needs[2] else None
            m = matrix.to(y.dtype)[:, :, :, None, None]
            dy, dx = m[:, 0, 0] * dy + m[:, 1, 0] * dx, m[:, 0, 1] * dy + m[:, 1, 1] * dx
        if needs[1]:
            gradients[1] = grid_gradient(torch.stack([dy, dx], 1), displacement, height, width)
    return gradients


def _handed_back(dout: Tensor, image: Tensor, y: Tensor, x: Tensor, order: int) -> Tensor:
    """The transpose of `_sample`: every output value handed back to the pixels that it was read from."""
    n, c, height, width = image.shape
    y0, x0 = y.floor(), x.floor()
    dimage = torch.zeros_like(image).flatten(2)
    for dy, of_row in _taps(y - y0, order):
        row = _mirror(y0 + dy, height) * width
        for dx, of_column in _taps(x - x0, order):
            index = (row + _mirror(x0 + dx, width)).flatten(1).unsqueeze(1).expand(n, c, -1)
            share = dout * (of_row * of_column).unsqueeze(1)
            dimage = dimage.scatter_add(2, index, share.flatten(2))
    return dimage.unflatten(2, (height, width))


def grid_gradient(du: Tensor, displacement: Tensor, height: int, width: int) -> Tensor:
    """From the gradient of u at every output pixel [N, 2, h, w] to that of the grid, summed in float64."""
    y, x = _window(du.shape[2:], height, width, du.device)
    down, across = (_shares(y, height, displacement.shape[2], _taps), _shares(x, width, displacement.shape[3], _taps))
    return (down.T @ du.double() @ across).to(displacement.dtype)


def _shares(pixel: Tensor, pixels: int, points: int, of: Taps) -> Tensor:
    """How much each pixel [n] of an axis takes from each grid point: [n, points], float64; or, of slopes, per point."""
    grid = torch.arange(points, device=pixel.device)
    around = _points(pixel, pixels, points, torch.float64, of)
    return _sum([torch.where(point[:, None] == grid, weight[:, None], 0) for point, weight in around])


def jacobian(displacement: Tensor, height: int, width: int, out_size: Sequence[int] | None) -> Tensor:
    """d (p + u(p)) / dp at every output pixel: [N, 2, 2, h, w], float64, rows of it the component that changes."""
    u = displacement.double()
    shares, slopes = [], []
    places = _window(out_size, height, width, u.device)
    for pixel, pixels, points in zip(places, (height, width), u.shape[2:], strict=True):
        shares.append(_shares(pixel, pixels, points, _taps))
        # beyond the edge its value is kept
        inside = ((pixel >= 0) & (pixel < pixels))[:, None]
        slope = _shares(pixel, pixels, points, _slopes) * points_per_pixel(points, pixels)
        slopes.append(torch.where(inside, slope, 0))
    found = torch.stack([slopes[0] @ u @ shares[1].T, shares[0] @ u @ slopes[1].T], 2)
    return found + torch.eye(2, dtype=torch.float64, device=u.device)[:, :, None, None]
