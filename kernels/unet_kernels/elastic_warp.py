"""Elastic warp of an image and its labels by one coarse grid of displacements.

    out[n, c, p] = image[n, c, A(p + u(p))]        A(q) = M[:, :2] (q - centre) + M[:, 2] + centre

A backward map, in pixels, rows first: u is the bicubic interpolation (Keys, a = -0.75) of displacement [N, 2, gh, gw],
whose corners sit on the image's corner pixels; outside the image u keeps its edge value and the image is mirrored
without repeating its edge. Coordinates are float32 (float64 if an operand is). Labels take the nearest pixel.
Backward keeps what came in and walks the map again. Derivation: docs/mathematics.md, section 6.

On CUDA `_fwd_kernel` makes u, A, the mirrored addresses, every channel, the table and the labels of BLOCK_P pixels in
one pass; nothing is stored but what is returned. Backward, `_bwd_position_kernel` writes the gradient of u and, for the
matrix, six sums a program; the grid's gradient is two products of matrices from there. The image's gradient is a
gather: `_reach_kernel` says which rows and columns of the image each block of the output reads, and in
`_bwd_image_kernel` each tile of the image adds up, block by block, a product of two matrices: the block's taps down
[R, P], and its taps across times dout [S, P]. Nothing is added atomically, so that the same input gives the same bits.
Products and sums are rounded one by one (no fma) and in the order of the reference, so that image and labels have its
bits. On a CPU a C++ kernel (kernels/native/src/elastic_warp.cpp) does the same; float64 is the reference's own.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks, _native, _triton, reference
from ._triton import jit, tl

__all__ = [
    "elastic_warp",
    "launch_elastic_warp_bwd",
    "launch_elastic_warp_bwd_cpu",
    "launch_elastic_warp_fwd",
    "launch_elastic_warp_fwd_cpu",
    "warp_jacobian",
]

IMAGES = (torch.uint8, torch.uint16, *_checks.FLOATS)
# labels that a Triton kernel writes as they are, and those whose bits it does: labels are copied, never computed with
LABELS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_AS_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
# side of a block of the output whose gradient is handed back at once, and of a tile of the image that takes it
BLOCK, TILE = 8, 32

# adding and taking away 1.5 x 2^23 rounds what is smaller to the nearest whole number, halves to even
_ROUND = tl.constexpr(12582912.0)


@jit
def _tap(f, OFFSET: tl.constexpr, ORDER: tl.constexpr):  # type: ignore[no-untyped-def]
    """Weight of the pixel OFFSET away, for a position f in [0, 1) behind pixel 0: linear, or Keys' cubic, a = -0.75."""
    g = 1.0 - f
    if ORDER == 1:
        weight = f if OFFSET == 1 else g
    elif OFFSET == -1:
        weight = -0.75 * (f * g) * g
    elif OFFSET == 0:
        weight = (1.25 * f - 2.25) * f * f + 1.0
    elif OFFSET == 1:
        weight = (1.25 * g - 2.25) * g * g + 1.0
    else:
        weight = -0.75 * (f * g) * f
    return weight


@jit
def _slope(f, OFFSET: tl.constexpr, ORDER: tl.constexpr):  # type: ignore[no-untyped-def]
    """The derivative of `_tap` by f; of linear, at a whole pixel, the one to the right."""
    if ORDER == 1:
        slope = tl.zeros_like(f) + (1.0 if OFFSET == 1 else -1.0)
    elif OFFSET == -1:
        t = 1.0 + f
        slope = (-2.25 * t + 7.5) * t - 6.0
    elif OFFSET == 0:
        slope = (3.75 * f - 4.5) * f
    elif OFFSET == 1:
        t = 1.0 - f
        slope = (4.5 - 3.75 * t) * t
    else:
        t = 2.0 - f
        slope = (2.25 * t - 7.5) * t + 6.0
    return slope


@jit
def _wrapped(index, size):  # type: ignore[no-untyped-def]
    """A whole position within the period with which the mirrored image repeats."""
    period = tl.maximum(2 * size - 2, 1)
    index = index % period
    return tl.where(index < 0, index + period, index)


@jit
def _mirrored(wrapped, size):  # type: ignore[no-untyped-def]
    """1234 -> 32123432, of a wrapped position, or one less, or up to two more."""
    back = 2 * size - 2 - wrapped
    return tl.minimum(tl.minimum(tl.abs(wrapped), tl.abs(back)), size - 1)


@jit
def _displaced(grid_ptr, row, column, H, W, GH, GW, scale_y, scale_x, inside):  # type: ignore[no-untyped-def]
    """p + u(p): u is bicubic between the points of the grid, first down, then across; its edge value outside."""
    at_y = tl.minimum(tl.maximum(row, 0), H - 1).to(tl.float32) * scale_y
    at_x = tl.minimum(tl.maximum(column, 0), W - 1).to(tl.float32) * scale_x
    low_y, low_x = tl.floor(at_y), tl.floor(at_x)
    f_y, f_x = at_y - low_y, at_x - low_x
    u_y, u_x = tl.zeros_like(at_y), tl.zeros_like(at_x)
    for j in tl.static_range(4):
        g_x = tl.minimum(tl.maximum(low_x.to(tl.int32) + (j - 1), 0), GW - 1)
        down_y, down_x = tl.zeros_like(at_y), tl.zeros_like(at_x)
        for i in tl.static_range(4):
            g_y = tl.minimum(tl.maximum(low_y.to(tl.int32) + (i - 1), 0), GH - 1)
            point = grid_ptr + g_y * GW + g_x
            weight = _tap(f_y, i - 1, 3)
            down_y += weight * tl.load(point, mask=inside, other=0.0)
            down_x += weight * tl.load(point + GH * GW, mask=inside, other=0.0)
        weight = _tap(f_x, j - 1, 3)
        u_y += weight * down_y
        u_x += weight * down_x
    return row.to(tl.float32) + u_y, column.to(tl.float32) + u_x


@jit
def _transformed(m, y, x):  # type: ignore[no-untyped-def]
    """M[:, :2] q + M[:, 2], q = (y, x) from the centre; m points to M."""
    to_y = tl.load(m) * y + tl.load(m + 1) * x + tl.load(m + 2)
    return to_y, tl.load(m + 3) * y + tl.load(m + 4) * x + tl.load(m + 5)


@jit
def _position(  # type: ignore[no-untyped-def]
    grid_ptr, matrix_ptr, n, row, column, H, W, GH, GW, scale_y, scale_x, inside
):
    """Where an output pixel reads, and, before the affine map, where that is from the centre."""
    y, x = _displaced(grid_ptr + n * 2 * GH * GW, row, column, H, W, GH, GW, scale_y, scale_x, inside)
    centre_y, centre_x = (H - 1) * 0.5, (W - 1) * 0.5
    q_y, q_x = y - centre_y, x - centre_x
    if matrix_ptr is not None:
        y, x = _transformed(matrix_ptr + n * 6, q_y, q_x)
        y, x = y + centre_y, x + centre_x
    return y, x, q_y, q_x


@jit
def _table(table, value, factor, L, inside):  # type: ignore[no-untyped-def]
    """(position in the table, its entry before it, that entry's value, the next one's); of no number, those of 0."""
    known = tl.where(value == value, value, 0.0)
    position = tl.minimum(tl.maximum(known * factor, 0.0), L - 1.0)
    entry = tl.minimum(tl.floor(position), L - 2.0)
    first = tl.load(table + entry.to(tl.int32), mask=inside, other=0.0)
    return position, entry, first, tl.load(table + entry.to(tl.int32) + 1, mask=inside, other=0.0)


@jit
def _fwd_kernel(  # type: ignore[no-untyped-def]
    image_ptr, grid_ptr, labels_ptr, matrix_ptr, lut_ptr, out_ptr, warped_ptr,
    C, H, W, GH, GW, h, w, top, left, scale_y, scale_x, L, factor, highest,
    stride_in, stride_ic, stride_ih, stride_iw,
    stride_ln, stride_lh, stride_lw, stride_tn,
    ORDER: tl.constexpr, WHOLE: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P] pixels of one output
    n = tl.program_id(1).to(tl.int64)
    inside = p < h * w
    row, column = p // w + top, p % w + left
    y, x, _q_y, _q_x = _position(grid_ptr, matrix_ptr, n, row, column, H, W, GH, GW, scale_y, scale_x, inside)

    y0, x0 = tl.floor(y), tl.floor(x)
    f_y, f_x = y - y0, x - x0
    from_y, from_x = _wrapped(y0.to(tl.int32), H), _wrapped(x0.to(tl.int32), W)

    if labels_ptr is not None:
        nearest_y = _mirrored(from_y + (f_y >= 0.5).to(tl.int32), H).to(tl.int64)
        nearest_x = _mirrored(from_x + (f_x >= 0.5).to(tl.int32), W).to(tl.int64)
        nearest = labels_ptr + n * stride_ln + nearest_y * stride_lh + nearest_x * stride_lw
        tl.store(warped_ptr + n * h * w + p, tl.load(nearest, mask=inside, other=0), mask=inside)

    START: tl.constexpr = 0 if ORDER == 1 else -1
    plane = image_ptr + n * stride_in
    out = out_ptr + n * C * h * w + p
    c = 0
    while c < C:
        value = tl.zeros([BLOCK_P], tl.float32)
        for j in tl.static_range(ORDER + 1):
            s = _mirrored(from_x + (START + j), W).to(tl.int64) * stride_iw
            down = tl.zeros([BLOCK_P], tl.float32)
            for i in tl.static_range(ORDER + 1):
                r = _mirrored(from_y + (START + i), H).to(tl.int64) * stride_ih
                pixel = tl.load(plane + r + s, mask=inside, other=0).to(tl.float32)
                down += pixel * _tap(f_y, START + i, ORDER)
            value += down * _tap(f_x, START + j, ORDER)
        if lut_ptr is not None:
            position, entry, first, second = _table(lut_ptr + n * stride_tn, value, factor, L, inside)
            # what is no number has no place in the table, and stays what it is
            value = tl.where(value == value, first + (second - first) * (position - entry), value)
        if WHOLE:
            value = tl.minimum(tl.maximum(value, 0.0), highest)
            value = ((value + _ROUND) - _ROUND).to(tl.int32)
        tl.store(out, value.to(out_ptr.dtype.element_ty), mask=inside)
        plane += stride_ic
        out += h * w
        c += 1


@jit
def _bwd_position_kernel(  # type: ignore[no-untyped-def]
    dout_ptr, image_ptr, grid_ptr, matrix_ptr, lut_ptr, du_ptr, sums_ptr, dvalue_ptr,
    C, H, W, GH, GW, h, w, top, left, scale_y, scale_x, L, factor,
    stride_in, stride_ic, stride_ih, stride_iw, stride_tn,
    ORDER: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P] pixels of one output
    n = tl.program_id(1).to(tl.int64)
    inside = p < h * w
    row, column = p // w + top, p % w + left
    y, x, q_y, q_x = _position(grid_ptr, matrix_ptr, n, row, column, H, W, GH, GW, scale_y, scale_x, inside)
    y0, x0 = tl.floor(y), tl.floor(x)
    f_y, f_x = y - y0, x - x0
    from_y, from_x = _wrapped(y0.to(tl.int32), H), _wrapped(x0.to(tl.int32), W)
    START: tl.constexpr = 0 if ORDER == 1 else -1
    dy = tl.zeros([BLOCK_P], tl.float32)
    dx = tl.zeros([BLOCK_P], tl.float32)
    plane = image_ptr + n * stride_in
    at = n * C * h * w + p
    c = 0
    while c < C:
        value = tl.zeros([BLOCK_P], tl.float32)
        by_y = tl.zeros([BLOCK_P], tl.float32)
        by_x = tl.zeros([BLOCK_P], tl.float32)
        for j in tl.static_range(ORDER + 1):
            s = _mirrored(from_x + (START + j), W).to(tl.int64) * stride_iw
            down = tl.zeros([BLOCK_P], tl.float32)
            steep = tl.zeros([BLOCK_P], tl.float32)
            for i in tl.static_range(ORDER + 1):
                r = _mirrored(from_y + (START + i), H).to(tl.int64) * stride_ih
                pixel = tl.load(plane + r + s, mask=inside, other=0).to(tl.float32)
                down += pixel * _tap(f_y, START + i, ORDER)
                steep += pixel * _slope(f_y, START + i, ORDER)
            value += down * _tap(f_x, START + j, ORDER)
            by_y += steep * _tap(f_x, START + j, ORDER)
            by_x += down * _slope(f_x, START + j, ORDER)
        d = tl.load(dout_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if lut_ptr is not None:
            position, _entry, first, second = _table(lut_ptr + n * stride_tn, value, factor, L, inside)
            # flat beyond the ends, and where there is no number
            d = tl.where(value * factor == position, d * ((second - first) * factor), 0.0)
            if dvalue_ptr is not None:
                tl.store(dvalue_ptr + at, d, mask=inside)
        dy += d * by_y
        dx += d * by_x
        plane += stride_ic
        at += h * w
        c += 1
    if matrix_ptr is not None:
        if sums_ptr is not None:
            # [N, programs, 6]; lanes outside have no d, and q of their own
            sums = sums_ptr + (n * tl.num_programs(0) + tl.program_id(0)) * 6
            tl.store(sums, tl.sum(dy * q_y, axis=0))
            tl.store(sums + 1, tl.sum(dy * q_x, axis=0))
            tl.store(sums + 2, tl.sum(dy, axis=0))
            tl.store(sums + 3, tl.sum(dx * q_y, axis=0))
            tl.store(sums + 4, tl.sum(dx * q_x, axis=0))
            tl.store(sums + 5, tl.sum(dx, axis=0))
        m = matrix_ptr + n * 6
        du_y, du_x = tl.load(m) * dy + tl.load(m + 3) * dx, tl.load(m + 1) * dy + tl.load(m + 4) * dx
    else:
        du_y, du_x = dy, dx
    if du_ptr is not None:
        du = du_ptr + n * 2 * h * w + p
        tl.store(du, du_y, mask=inside)
        tl.store(du + h * w, du_x, mask=inside)


@jit
def _reach_kernel(  # type: ignore[no-untyped-def]
    grid_ptr, matrix_ptr, positions_ptr, reach_ptr,
    H, W, GH, GW, h, w, top, left, scale_y, scale_x,
    ORDER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, column, inside = _pixels(block, h, w, BLOCK)
    y, x, _q_y, _q_x = _position(
        grid_ptr, matrix_ptr, n, row + top, column + left, H, W, GH, GW, scale_y, scale_x, inside
    )
    positions = positions_ptr + n * 2 * h * w + row * w + column
    tl.store(positions, y, mask=inside)
    tl.store(positions + h * w, x, mask=inside)
    from_y = _wrapped(tl.floor(y).to(tl.int32), H)
    from_x = _wrapped(tl.floor(x).to(tl.int32), W)
    START: tl.constexpr = 0 if ORDER == 1 else -1
    low_y, high_y, low_x, high_x = H, -1, W, -1
    for k in tl.static_range(ORDER + 1):
        r, s = _mirrored(from_y + (START + k), H), _mirrored(from_x + (START + k), W)
        low_y = tl.minimum(low_y, tl.min(tl.where(inside, r, H), axis=0))
        high_y = tl.maximum(high_y, tl.max(tl.where(inside, r, -1), axis=0))
        low_x = tl.minimum(low_x, tl.min(tl.where(inside, s, W), axis=0))
        high_x = tl.maximum(high_x, tl.max(tl.where(inside, s, -1), axis=0))
    # [N, blocks, 4]: the first and the last row, the first and the last column
    reach = reach_ptr + (n * tl.num_programs(0) + block) * 4
    tl.store(reach, low_y)
    tl.store(reach + 1, high_y)
    tl.store(reach + 2, low_x)
    tl.store(reach + 3, high_x)


@jit
def _pixels(block, h, w, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows and columns of the BLOCK x BLOCK output pixels of a block, and which of them are there."""
    i = tl.arange(0, BLOCK * BLOCK)
    across = tl.cdiv(w, BLOCK)
    row, column = (block // across) * BLOCK + i // BLOCK, (block % across) * BLOCK + i % BLOCK
    return row, column, (row < h) & (column < w)


@jit
def _bwd_image_kernel(  # type: ignore[no-untyped-def]
    dvalue_ptr, positions_ptr, reach_ptr, dimage_ptr,
    C, H, W, h, w, blocks,
    ORDER: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tiles_across = tl.cdiv(W, TILE)
    first_row = (tl.program_id(0) // tiles_across) * TILE
    first_column = (tl.program_id(0) % tiles_across) * TILE
    rows, columns = first_row + tl.arange(0, TILE), first_column + tl.arange(0, TILE)  # [TILE] of the image
    plane = tl.program_id(1).to(tl.int64)
    n = plane // C
    START: tl.constexpr = 0 if ORDER == 1 else -1
    acc = tl.zeros([TILE, TILE], tl.float32)
    block = 0
    while block < blocks:
        reach = reach_ptr + (n * blocks + block) * 4
        meets = (tl.load(reach) < first_row + TILE) & (tl.load(reach + 1) >= first_row)
        meets = meets & (tl.load(reach + 2) < first_column + TILE) & (tl.load(reach + 3) >= first_column)
        if meets:
            row, column, inside = _pixels(block, h, w, BLOCK)
            d = tl.load(dvalue_ptr + plane * h * w + row * w + column, mask=inside, other=0.0).to(tl.float32)
            positions = positions_ptr + n * 2 * h * w + row * w + column
            y, x = tl.load(positions, mask=inside, other=0.0), tl.load(positions + h * w, mask=inside, other=0.0)
            y0, x0 = tl.floor(y), tl.floor(x)
            f_y, f_x = y - y0, x - x0
            # NaN and infinities are not 0
            odd = (d - d) + (f_y - f_y) + (f_x - f_x)
            if tl.max((odd != 0.0).to(tl.int32), axis=0) == 0:
                from_y, from_x = _wrapped(y0.to(tl.int32), H), _wrapped(x0.to(tl.int32), W)
                down = tl.zeros([TILE, BLOCK * BLOCK], tl.float32)
                across = tl.zeros([TILE, BLOCK * BLOCK], tl.float32)
                for k in tl.static_range(ORDER + 1):
                    here = rows[:, None] == _mirrored(from_y + (START + k), H)[None, :]
                    down += tl.where(here, _tap(f_y, START + k, ORDER)[None, :], 0.0)
                    here = columns[:, None] == _mirrored(from_x + (START + k), W)[None, :]
                    across += tl.where(here, (d * _tap(f_x, START + k, ORDER))[None, :], 0.0)
                acc += tl.dot(down, tl.trans(across), input_precision="ieee")
            else:
                # in a product of matrices they would reach the whole tile: pixel by pixel, where each was read from
                one = 0
                while one < BLOCK * BLOCK:
                    a_row = (block // tl.cdiv(w, BLOCK)) * BLOCK + one // BLOCK
                    a_column = (block % tl.cdiv(w, BLOCK)) * BLOCK + one % BLOCK
                    if (a_row < h) & (a_column < w):
                        at = a_row * w + a_column
                        value = tl.load(dvalue_ptr + plane * h * w + at).to(tl.float32)
                        a_y = tl.load(positions_ptr + n * 2 * h * w + at)
                        a_x = tl.load(positions_ptr + (n * 2 + 1) * h * w + at)
                        for i in tl.static_range(ORDER + 1):
                            on_row = rows == _mirrored(_wrapped(tl.floor(a_y).to(tl.int32), H) + (START + i), H)
                            of_row = _tap(a_y - tl.floor(a_y), START + i, ORDER)
                            for j in tl.static_range(ORDER + 1):
                                on_column = columns == _mirrored(
                                    _wrapped(tl.floor(a_x).to(tl.int32), W) + (START + j), W
                                )
                                of_column = _tap(a_x - tl.floor(a_x), START + j, ORDER)
                                there = on_row[:, None] & on_column[None, :]
                                acc += tl.where(there, value * (of_row * of_column), 0.0)
                    one += 1
        block += 1
    out = dimage_ptr + plane * H * W + rows.to(tl.int64)[:, None] * W + columns[None, :]
    tl.store(out, acc.to(dimage_ptr.dtype.element_ty), mask=(rows < H)[:, None] & (columns < W)[None, :])


def why_not(image: Tensor, displacement: Tensor, labels: Tensor | None, out_size: Sequence[int]) -> str:
    """Why the Triton kernels cannot take these, or "" if they can."""
    if labels is not None and labels.dtype not in (*LABELS, *_AS_SIGNED):
        return f"labels of {str(labels.dtype).removeprefix('torch.')} are left to torch"
    if displacement.dtype == torch.float64:
        return "float64 is left to torch"
    if image.shape[0] * image.shape[1] >= 2**16 or out_size[0] * out_size[1] >= 2**31 - 512:
        return "so many pixels are left to torch"
    return _triton.why_not(image.device, image.dtype)


def launch_elastic_warp_fwd(
    image: Tensor,
    displacement: Tensor,
    labels: Tensor | None,
    matrix: Tensor | None,
    lut: Tensor | None,
    out_size: Sequence[int],
    order: int,
) -> tuple[Tensor, Tensor]:
    N, C, H, W = image.shape
    h, w = out_size
    out, warped = _made(image, labels, out_size)
    if not N * h * w:
        return out, warped
    BLOCK_P = 256
    with _triton.on_device(image):
        _fwd_kernel[(-(-h * w // BLOCK_P), N)](
            image, _read(displacement), _bits(labels), _read(matrix), _read(lut), out, _bits(warped),
            C, H, W, *_sizes(image, displacement, out_size), *_table_of(lut, image.dtype),
            reference.highest_grey(image.dtype),
            *image.stride(), *((0, 0, 0) if labels is None else labels.stride()), _row_of(lut),
            ORDER=order, WHOLE=not image.is_floating_point(), BLOCK_P=BLOCK_P, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out, warped


def _bits(labels: Tensor | None) -> Tensor | None:
    """Labels as a kernel knows them."""
    return labels.view(_AS_SIGNED[labels.dtype]) if labels is not None and labels.dtype in _AS_SIGNED else labels


def launch_elastic_warp_bwd(
    dout: Tensor,
    image: Tensor,
    displacement: Tensor,
    matrix: Tensor | None,
    lut: Tensor | None,
    out_size: Sequence[int],
    order: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of image, that of u at every output pixel [N, 2, h, w], and parts [N, parts, 6] of the matrix's.

    Of these what is needed for the gradients of image, displacement and matrix; the others are empty.
    """
    N, C, H, W = image.shape
    h, w = out_size
    BLOCK_P = 256
    programs, blocks = -(-h * w // BLOCK_P), -(-h // BLOCK) * -(-w // BLOCK)
    for_image, for_displacement, for_matrix = needs
    dimage = torch.empty(image.shape if for_image else 0, dtype=image.dtype, device=image.device)

    def room(*shape: int, needed: bool) -> Tensor:
        return torch.empty(shape if needed else 0, dtype=torch.float32, device=image.device)

    du, sums = room(N, 2, h, w, needed=for_displacement), room(N, programs, 6, needed=for_matrix)
    # the gradient of what was read, before the table
    dvalue = room(N, C, h, w, needed=True) if for_image and lut is not None else None
    dout, grid, affine, table = dout.contiguous(), _read(displacement), _read(matrix), _read(lut)
    sizes = _sizes(image, displacement, out_size)
    with _triton.on_device(image):
        if N and (for_displacement or for_matrix or dvalue is not None):
            _bwd_position_kernel[(programs, N)](
                dout, image, grid, affine, table,
                du if for_displacement else None, sums if for_matrix else None, dvalue,
                C, H, W, *sizes, *_table_of(lut, image.dtype), *image.stride(), _row_of(lut),
                ORDER=order, BLOCK_P=BLOCK_P, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
        if dimage.numel():
            reach = torch.empty((N, blocks, 4), dtype=torch.int32, device=image.device)
            positions = room(N, 2, h, w, needed=True)
            _reach_kernel[(blocks, N)](
                grid, affine, positions, reach, H, W, *sizes,
                ORDER=order, BLOCK=BLOCK, num_warps=1, enable_fp_fusion=False,
            )  # fmt: skip
            _bwd_image_kernel[(-(-H // TILE) * -(-W // TILE), N * C)](
                dout if dvalue is None else dvalue, positions, reach, dimage, C, H, W, h, w, blocks,
                ORDER=order, BLOCK=BLOCK, TILE=TILE, num_warps=8,
            )  # fmt: skip
    return dimage, du, sums


def _made(image: Tensor, labels: Tensor | None, out_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Room for the output: an op returns tensors, and labels that nobody has are empty."""
    n, c = image.shape[:2]
    out = torch.empty((n, c, *out_size), dtype=image.dtype, device=image.device)
    if labels is None:
        return out, torch.empty(0, device=image.device)
    return out, torch.empty((n, *out_size), dtype=labels.dtype, device=image.device)


def _read(small: Tensor | None) -> Tensor | None:
    """A grid, a matrix or a table as the kernels read it."""
    return None if small is None else small.float().contiguous()


def _sizes(image: Tensor, displacement: Tensor, out_size: Sequence[int]) -> tuple[Any, ...]:
    """GH, GW, h, w, top, left, scale_y, scale_x."""
    (H, W), (GH, GW), (h, w) = image.shape[2:], displacement.shape[2:], out_size
    scales = reference.points_per_pixel(GH, H), reference.points_per_pixel(GW, W)
    return GH, GW, h, w, (H - h) // 2, (W - w) // 2, *scales


def _table_of(lut: Tensor | None, dtype: torch.dtype) -> tuple[int, float]:
    """Entries, and how many of them a unit of grey value is."""
    entries = 0 if lut is None else lut.shape[-1]
    return entries, (entries - 1) / reference.highest_grey(dtype)


def _row_of(lut: Tensor | None) -> int:
    """From one image's table to the next."""
    return lut.shape[-1] if lut is not None and lut.dim() == 2 else 0


class _Warp(ctypes.Structure):
    """unet_warp of kernels/native/include/unet_native.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("image", "labels", "displacement", "matrix", "table")),
        *((name, ctypes.c_int64) for name in ("count", "channels", "height", "width", "grid_height", "grid_width")),
        *((name, ctypes.c_int64) for name in ("out_height", "out_width")),
        ("image_stride", ctypes.c_int64 * 4),
        ("label_stride", ctypes.c_int64 * 3),
        *((name, ctypes.c_int64) for name in ("table_stride", "entries")),
        *((name, ctypes.c_int32) for name in ("pixel", "label_bytes", "order")),
    )


# UNET_UINT8, UNET_UINT16, UNET_FLOAT32
_PIXELS = {torch.uint8: 0, torch.uint16: 1, torch.float32: 2}


def cpu_why_not(image: Tensor, displacement: Tensor) -> str:
    """Why the C++ kernel cannot take these, or "" if it can."""
    if torch.float64 in (image.dtype, displacement.dtype):
        return "float64 is left to torch"
    return _native.why_not(image.device)


def launch_elastic_warp_fwd_cpu(
    image: Tensor,
    displacement: Tensor,
    labels: Tensor | None,
    matrix: Tensor | None,
    lut: Tensor | None,
    out_size: Sequence[int],
    order: int,
) -> tuple[Tensor, Tensor]:
    """The C++ kernel."""
    wide = _as_read_on_cpu(image)
    out, warped = _made(wide, labels, out_size)
    warp, _keep = _native_warp(wide, displacement, labels, matrix, lut, out_size, order)
    status = _native.native().unet_elastic_warp_cpu(ctypes.byref(warp), out.data_ptr(), warped.data_ptr())
    _expect_memory(status)
    return out.to(image.dtype), warped


def launch_elastic_warp_bwd_cpu(
    dout: Tensor,
    image: Tensor,
    displacement: Tensor,
    matrix: Tensor | None,
    lut: Tensor | None,
    out_size: Sequence[int],
    order: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The C++ kernel, as `launch_elastic_warp_bwd`; one float64 part."""
    wide, (h, w), n = _as_read_on_cpu(image), out_size, len(image)
    dimage = torch.empty(image.shape if needs[0] else 0, dtype=wide.dtype)
    du = torch.empty((n, 2, h, w) if needs[1] else 0, dtype=torch.float32)
    sums = torch.empty((n, 1, 6) if needs[2] else 0, dtype=torch.float64)
    dout = dout.float().contiguous()
    warp, _keep = _native_warp(wide, displacement, None, matrix, lut, out_size, order)
    wanted = (t.data_ptr() if needed else None for t, needed in zip((dimage, du, sums), needs, strict=True))
    status = _native.native().unet_elastic_warp_backward_cpu(ctypes.byref(warp), dout.data_ptr(), *wanted)
    _expect_memory(status)
    return dimage.to(image.dtype), du, sums


def _as_read_on_cpu(image: Tensor) -> Tensor:
    # 16-bit floats go through float32, as in the reference
    return image if image.dtype in _PIXELS else image.float()


def _native_warp(
    image: Tensor,
    displacement: Tensor,
    labels: Tensor | None,
    matrix: Tensor | None,
    lut: Tensor | None,
    out_size: Sequence[int],
    order: int,
) -> tuple[_Warp, Any]:
    """(what the C++ kernels are given, what must live as long)."""
    tensors = image, labels, *map(_read, (displacement, matrix, lut))
    warp = _Warp(
        *(None if t is None else t.data_ptr() for t in tensors),
        *image.shape, *displacement.shape[2:], *out_size,
        tuple(image.stride()), (0, 0, 0) if labels is None else tuple(labels.stride()),
        _row_of(lut), _table_of(lut, image.dtype)[0],
        _PIXELS[image.dtype], 0 if labels is None else labels.element_size(), order,
    )  # fmt: skip
    return warp, tensors


def _expect_memory(status: int) -> None:
    if status:
        raise MemoryError("elastic_warp needs about 1 MB a thread and found none")


@torch.library.custom_op("unet::elastic_warp", mutates_args=())
@_checks.outside_autocast
def _op(
    image: Tensor,
    displacement: Tensor,
    labels: Tensor | None,
    matrix: Tensor | None,
    lut: Tensor | None,
    out_size: Sequence[int],
    order: int,
) -> tuple[Tensor, Tensor]:
    _expect_finite("displacement", displacement)
    if matrix is not None:
        _expect_finite("matrix", matrix)
    arguments = (image, displacement, labels, matrix, lut, out_size, order)
    return _by_torch(*arguments) if cpu_why_not(image, displacement) else launch_elastic_warp_fwd_cpu(*arguments)


def _by_torch(image: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out, warped = reference.elastic_warp(image, *rest)
    return out.contiguous(), torch.empty(0, device=image.device) if warped is None else warped.contiguous()


@_op.register_kernel("cuda")
@_checks.outside_autocast
def _cuda(
    image: Tensor,
    displacement: Tensor,
    labels: Tensor | None,
    matrix: Tensor | None,
    lut: Tensor | None,
    out_size: Sequence[int],
    order: int,
) -> tuple[Tensor, Tensor]:
    arguments = (image, displacement, labels, matrix, lut, out_size, order)
    refusal = why_not(image, displacement, labels, out_size)
    return _by_torch(*arguments) if refusal else launch_elastic_warp_fwd(*arguments)


@_op.register_fake
def _(
    image: Tensor, displacement: Tensor, labels: Tensor | None, matrix: Any, lut: Any, out_size: Any, order: int
) -> tuple[Tensor, Tensor]:
    return _made(image, labels, out_size)


def _expect_finite(name: str, value: Tensor) -> None:
    # on a GPU this would wait for it; there NaN goes through to the image
    if value.device.type == "cpu" and not value.isfinite().all():
        raise ValueError(f"{name} must be finite, got {int((~value.isfinite()).sum())} NaN or infinite values")


@torch.library.custom_op("unet::elastic_warp_backward", mutates_args=())
@_checks.outside_autocast
def _backward_op(
    dout: Tensor,
    image: Tensor,
    displacement: Tensor,
    matrix: Tensor | None,
    lut: Tensor | None,
    out_size: Sequence[int],
    order: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    launch = None if cpu_why_not(image, displacement) else launch_elastic_warp_bwd_cpu
    return _gradients(launch, dout, image, displacement, matrix, lut, out_size, order, needs)


def _gradients(
    launch: Callable[..., tuple[Tensor, Tensor, Tensor]] | None,
    dout: Tensor,
    image: Tensor,
    displacement: Tensor,
    matrix: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of image, displacement and matrix, those that are needed, by a launcher or by the reference."""
    made = _made_gradients(image, displacement, matrix, rest[-1])
    if launch is None:
        found = reference.elastic_warp_gradients(dout, image, displacement, matrix, *rest)
    else:
        dimage, du, sums = launch(dout, image, displacement, matrix, *rest)
        # parts are added in one order, and in float64
        found = [
            dimage,
            reference.grid_gradient(du, displacement, *image.shape[2:]) if du.dim() == 4 else None,
            sums.sum(1, dtype=torch.float64).view(-1, 2, 3) if sums.dim() == 3 else None,
        ]
    of_image, of_grid, of_matrix = (
        m.copy_(f) if f is not None and m.numel() else m for m, f in zip(made, found, strict=True)
    )
    return of_image, of_grid, of_matrix


def _made_gradients(
    image: Tensor, displacement: Tensor, matrix: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients: an op returns tensors, and one that nobody needs is empty."""
    return (
        torch.empty(image.shape if needs[0] else 0, dtype=image.dtype, device=image.device),
        torch.empty(displacement.shape if needs[1] else 0, dtype=displacement.dtype, device=image.device),
        torch.empty(0, device=image.device)
        if matrix is None or not needs[2]
        else torch.empty(matrix.shape, dtype=matrix.dtype, device=image.device),
    )


@_backward_op.register_kernel("cuda")
@_checks.outside_autocast
def _backward_cuda(
    dout: Tensor,
    image: Tensor,
    displacement: Tensor,
    matrix: Tensor | None,
    lut: Tensor | None,
    out_size: Sequence[int],
    order: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    launch = None if why_not(image, displacement, None, out_size) else launch_elastic_warp_bwd
    return _gradients(launch, dout, image, displacement, matrix, lut, out_size, order, needs)


@_backward_op.register_fake
def _(
    dout: Tensor, image: Tensor, displacement: Tensor, matrix: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _made_gradients(image, displacement, matrix, rest[-1])


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.out_size, ctx.order, ctx.needs = inputs
    ctx.save_for_backward(*tensors)


@_checks.outside_autocast
def _second(ctx: Any, *second: Tensor) -> tuple[Tensor | None, ...]:
    """Of the derivative's own formula, by ATen: rarely wanted, and then right rather than fast."""
    *saved, lut = ctx.saved_tensors
    with torch.enable_grad():
        leaves: list[Any] = [None if t is None else t.detach().requires_grad_() for t in saved]
        arguments = (*leaves, lut, ctx.out_size, ctx.order, ctx.needs)
        found = reference.elastic_warp_gradients(*arguments)
        made, by = zip(*((f, d) for f, d in zip(found, second, strict=True) if f is not None), strict=True)
        wanted = [leaf for leaf in leaves if leaf is not None]
        gradients = list(torch.autograd.grad(made, wanted, by, allow_unused=True))
        # of a matrix only where there is one; none of a table
        return *gradients, *(None,) * (8 - len(gradients))


_backward_op.register_autograd(_second, setup_context=_setup_backward)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    image, displacement, _, matrix, lut, ctx.out_size, ctx.order = inputs
    ctx.save_for_backward(image, displacement, matrix, lut)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dout: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    for_image, for_displacement, _labels, for_matrix, *_rest = ctx.needs_input_grad
    needs = [for_image, for_displacement, for_matrix]
    if not any(needs):
        return (None,) * 7
    found = _backward_op(dout, *ctx.saved_tensors, ctx.out_size, ctx.order, needs)
    dimage, ddisplacement, dmatrix = (d if needed else None for d, needed in zip(found, needs, strict=True))
    return dimage, ddisplacement, None, dmatrix, None, None, None


_op.register_autograd(_backward, setup_context=_setup)


def elastic_warp(
    image: Tensor,
    displacement: Tensor,
    *,
    labels: Tensor | None = None,
    matrix: Tensor | None = None,
    lut: Tensor | None = None,
    out_size: int | Sequence[int] | None = None,
    order: int = 1,
    border: str = "reflect",
) -> Tensor | tuple[Tensor, Tensor]:
    """Warp an image, and its labels with it: out(p) = image(A(p + u(p))).

    Args:
        image: [N, C, H, W]; uint8, uint16, float16, bfloat16, float32 or float64.
        displacement: [N, 2, gh, gw], gh and gw at least 2, pixels, rows first: where to read, relative to where one
            is. The grid spans the image corner to corner; between its points u is bicubic
            (`interpolate(..., "bicubic", align_corners=True)`), outside the image it keeps its edge value.
        labels: [N, H, W], any integer dtype; taken from the nearest pixel, so no label is invented.
        matrix: [N, 2, 3], rows first: A(q) = M[:, :2] (q - c) + M[:, 2] + c about c = ((H - 1) / 2, (W - 1) / 2).
        lut: [L] or [N, L], floating, L at least 2: a grey-value table in the image's own units, applied to what was
            read. Its entries span 0 to the dtype's maximum (0 to 1 for floats), linear in between, flat beyond.
        out_size: rows and columns that come out, of both; the window lies at offset floor((H - h) / 2) and may exceed
            the image. Default: the image's.
        order: 1 (linear) or 3 (Keys' cubic, a = -0.75, no prefilter).
        border: "reflect": 1234 -> 32123432.

    Returns:
        The image [N, C, h, w] in its dtype (integers rounded to the nearest, halves to even, and clamped), or
        (image, labels). Differentiable in a floating image, displacement and matrix.

    Raises:
        TypeError: an argument is no tensor, or has the wrong kind of dtype.
        ValueError: a shape, a device, order or border does not fit; on a CPU also NaN or infinity in displacement.

    >>> image = torch.arange(4.0).view(1, 1, 1, 4)
    >>> one_to_the_right = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    >>> elastic_warp(image, one_to_the_right)
    tensor([[[[1., 2., 3., 2.]]]])
    """
    _checks.expect_tensor("image", image, "N, C, H, W", IMAGES, "uint8, uint16 or floating")
    n, _, height, width = image.shape
    if height < 1 or width < 1:
        raise ValueError(f"image must have at least one row and one column, got {height}x{width}")
    _checks.expect_choice("order", order, (1, 3))
    _checks.expect_choice("border", border, ("reflect",))
    size = [height, width] if out_size is None else _expect_pair("out_size", out_size)
    _expect_grid(displacement, n, "(the batch of image; rows, columns)")
    _checks.expect_device("displacement", displacement, "image", image)
    if labels is not None:
        _checks.expect_integer("labels", labels, "N, H, W")
        _checks.expect_size("labels", labels, (n, height, width), "(N, H, W of image)")
        _checks.expect_device("labels", labels, "image", image)
    if matrix is not None:
        _checks.expect_float("matrix", matrix, "N, 2, 3")
        _checks.expect_size("matrix", matrix, (n, 2, 3), "(the batch of image)")
        _checks.expect_device("matrix", matrix, "image", image)
    if lut is not None:
        _expect_lut(lut, image)
    arguments = (image, displacement, labels, matrix, lut, size, order)
    out, warped = reference.elastic_warp(*arguments) if _checks.transformed() else _op(*arguments)
    if labels is None:
        return out
    assert warped is not None
    return out, warped


def warp_jacobian(
    displacement: Tensor, size: int | Sequence[int], *, out_size: int | Sequence[int] | None = None
) -> Tensor:
    """How the elastic map p + u(p) stretches the plane: its derivative at every output pixel.

    Where its determinant is not positive the map folds: what it shows is mirrored, and shown more than once. An affine
    map on top multiplies all determinants by its own.

    Args:
        displacement: [N, 2, gh, gw], as of `elastic_warp`.
        size: rows and columns of the image that the grid spans.
        out_size: rows and columns of the window in its middle. Default: the image's.

    Returns:
        [N, 2, 2, h, w], float64: entry (i, j) is the derivative of component i by coordinate j, rows first. Beyond the
        image, where u keeps its edge value, it is that of the identity across the edge.

    Raises:
        TypeError: displacement is no floating tensor.
        ValueError: a shape or a size does not fit.

    >>> warp_jacobian(torch.zeros(1, 2, 3, 3), 4)[0, :, :, 0, 0].tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    _expect_grid(displacement)
    height, width = _expect_pair("size", size)
    out = [height, width] if out_size is None else _expect_pair("out_size", out_size)
    return reference.jacobian(displacement, height, width, out)


def _expect_grid(displacement: Tensor, n: int = -1, reason: str = "(rows, columns)") -> None:
    _checks.expect_float("displacement", displacement, "N, 2, gh, gw")
    _checks.expect_size("displacement", displacement, (n, 2, -1, -1), reason)
    if displacement.shape[2] < 2 or displacement.shape[3] < 2:
        raise ValueError(
            f"displacement must be a grid of at least 2x2, got {displacement.shape[2]}x{displacement.shape[3]}"
        )


def _expect_pair(name: str, value: int | Sequence[int]) -> list[int]:
    pair = value if isinstance(value, Sequence) and not isinstance(value, str) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be rows and columns, got {value!r}")
    size = [_checks.expect_whole(name, s) for s in pair]
    if min(size) < 1:
        raise ValueError(f"{name} must be rows and columns of at least 1, got {value!r}")
    return size


def _expect_lut(lut: Tensor, image: Tensor) -> None:
    axes = "N, L" if isinstance(lut, Tensor) and lut.dim() == 2 else "L"
    _checks.expect_float("lut", lut, axes)
    _checks.expect_device("lut", lut, "image", image)
    if lut.shape[-1] < 2:
        raise ValueError(f"lut must have at least 2 entries, got {lut.shape[-1]}")
    if lut.dim() == 2 and lut.shape[0] != image.shape[0]:
        raise ValueError(f"lut must have one row per image of the batch, {image.shape[0]}, got {lut.shape[0]}")
