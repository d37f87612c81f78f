"""Elastic warp of an image and its labels by one coarse grid of displacements.

    out[n, c, p] = image[n, c, A(p + u(p))]        A(q) = M[:, :2] (q - centre) + M[:, 2] + centre

A backward map, in pixels, rows first: u is the bicubic interpolation (Keys, a = -0.75) of displacement [N, 2, gh, gw],
whose corners sit on the image's corner pixels; outside the image u keeps its edge value and the image is mirrored
without repeating its edge. Coordinates are float32 (float64 if an operand is). Labels take the nearest pixel.
Backward keeps what came in and walks the map again. Derivation: docs/mathematics.md, section 6.

On CUDA `_fwd_kernel` makes u, A, the mirrored addresses, every channel, the table and the labels of BLOCK_P pixels in
one pass; nothing is stored but what is returned. The backward is ATen's operations.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks, _triton, reference
from ._triton import jit, tl

__all__ = ["elastic_warp", "launch_elastic_warp_fwd"]

IMAGES = (torch.uint8, torch.uint16, *_checks.FLOATS)
# labels that a kernel writes as they are
LABELS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

# adding and taking away 1.5 x 2^23 rounds what is smaller to the nearest whole number, halves to even
_ROUND = tl.constexpr(12582912.0)


@jit
def _tap(f, OFFSET: tl.constexpr, ORDER: tl.constexpr):  # type: ignore[no-untyped-def]
    """Weight of the pixel OFFSET away, for a position f in [0, 1) behind pixel 0: linear, or Keys' cubic, a = -0.75."""
    if ORDER == 1:
        weight = f if OFFSET == 1 else 1.0 - f
    elif OFFSET == -1:
        t = 1.0 + f
        weight = ((-0.75 * t + 3.75) * t - 6.0) * t + 3.0
    elif OFFSET == 0:
        weight = (1.25 * f - 2.25) * f * f + 1.0
    elif OFFSET == 1:
        t = 1.0 - f
        weight = (1.25 * t - 2.25) * t * t + 1.0
    else:
        t = 2.0 - f
        weight = ((-0.75 * t + 3.75) * t - 6.0) * t + 3.0
    return weight


@jit
def _mirror(index, size):  # type: ignore[no-untyped-def]
    """1234 -> 32123432, wherever the index lies."""
    period = tl.maximum(2 * size - 2, 1)
    folded = (index % period + period) % period
    return tl.where(folded < size, folded, period - folded)


@jit
def _fwd_kernel(  # type: ignore[no-untyped-def]
    image_ptr, grid_ptr, labels_ptr, matrix_ptr, lut_ptr, out_ptr, warped_ptr,
    C, H, W, GH, GW, h, w, top, left, L, scale_y, scale_x, highest,
    stride_in, stride_ic, stride_ih, stride_iw,
    stride_ln, stride_lh, stride_lw, stride_tn,
    ORDER: tl.constexpr, WHOLE: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P] pixels of one output
    n = tl.program_id(1).to(tl.int64)
    inside = p < h * w
    row, column = p // w + top, p % w + left

    # u: bicubic between the points of the grid, its edge value outside the image
    at_y = tl.minimum(tl.maximum(row, 0), H - 1).to(tl.float32) * scale_y
    at_x = tl.minimum(tl.maximum(column, 0), W - 1).to(tl.float32) * scale_x
    low_y, low_x = tl.floor(at_y), tl.floor(at_x)
    f_y, f_x = at_y - low_y, at_x - low_x
    u_y = tl.zeros([BLOCK_P], tl.float32)
    u_x = tl.zeros([BLOCK_P], tl.float32)
    for i in tl.static_range(4):
        g_y = tl.minimum(tl.maximum(low_y.to(tl.int32) + (i - 1), 0), GH - 1)
        of_y = tl.zeros([BLOCK_P], tl.float32)
        of_x = tl.zeros([BLOCK_P], tl.float32)
        for j in tl.static_range(4):
            g_x = tl.minimum(tl.maximum(low_x.to(tl.int32) + (j - 1), 0), GW - 1)
            point = grid_ptr + n * 2 * GH * GW + g_y * GW + g_x
            weight = _tap(f_x, j - 1, 3)
            of_y += weight * tl.load(point, mask=inside, other=0.0)
            of_x += weight * tl.load(point + GH * GW, mask=inside, other=0.0)
        weight = _tap(f_y, i - 1, 3)
        u_y += weight * of_y
        u_x += weight * of_x
    y, x = row.to(tl.float32) + u_y, column.to(tl.float32) + u_x

    if matrix_ptr is not None:
        centre_y, centre_x = (H - 1) * 0.5, (W - 1) * 0.5
        q_y, q_x = y - centre_y, x - centre_x
        m = matrix_ptr + n * 6
        y = tl.load(m) * q_y + tl.load(m + 1) * q_x + tl.load(m + 2) + centre_y
        x = tl.load(m + 3) * q_y + tl.load(m + 4) * q_x + tl.load(m + 5) + centre_x

    if labels_ptr is not None:
        nearest_y = _mirror(tl.floor(y + 0.5).to(tl.int32), H).to(tl.int64)
        nearest_x = _mirror(tl.floor(x + 0.5).to(tl.int32), W).to(tl.int64)
        nearest = labels_ptr + n * stride_ln + nearest_y * stride_lh + nearest_x * stride_lw
        tl.store(warped_ptr + n * h * w + p, tl.load(nearest, mask=inside, other=0), mask=inside)

    y0, x0 = tl.floor(y), tl.floor(x)
    f_y, f_x = y - y0, x - x0
    START: tl.constexpr = 0 if ORDER == 1 else -1
    plane = image_ptr + n * stride_in
    out = out_ptr + n * C * h * w + p
    c = 0
    while c < C:
        value = tl.zeros([BLOCK_P], tl.float32)
        for i in tl.static_range(ORDER + 1):
            r = _mirror(y0.to(tl.int32) + (START + i), H).to(tl.int64) * stride_ih
            of_row = _tap(f_y, START + i, ORDER)
            for j in tl.static_range(ORDER + 1):
                s = _mirror(x0.to(tl.int32) + (START + j), W).to(tl.int64) * stride_iw
                pixel = tl.load(plane + r + s, mask=inside, other=0).to(tl.float32)
                value += pixel * (of_row * _tap(f_x, START + j, ORDER))
        if lut_ptr is not None:
            # what is no number has no place in the table, and stays what it is
            known = tl.where(value == value, value, 0.0)
            position = tl.minimum(tl.maximum(known / highest * (L - 1), 0.0), L - 1.0)
            entry = tl.minimum(tl.floor(position), L - 2.0)
            table = lut_ptr + n * stride_tn + entry.to(tl.int32)
            first = tl.load(table, mask=inside, other=0.0)
            second = tl.load(table + 1, mask=inside, other=0.0)
            value = tl.where(value == value, first + (second - first) * (position - entry), value)
        if WHOLE:
            value = tl.minimum(tl.maximum(value, 0.0), highest)
            value = ((value + _ROUND) - _ROUND).to(tl.int32)
        tl.store(out, value.to(out_ptr.dtype.element_ty), mask=inside)
        plane += stride_ic
        out += h * w
        c += 1


def why_not(image: Tensor, displacement: Tensor, labels: Tensor | None, out_size: Sequence[int]) -> str:
    """Why the Triton kernel cannot take these, or "" if it can."""
    if labels is not None and labels.dtype not in LABELS:
        return f"labels of {str(labels.dtype).removeprefix('torch.')} are left to torch"
    if displacement.dtype == torch.float64:
        return "float64 is left to torch"
    if image.shape[0] >= 2**16 or out_size[0] * out_size[1] >= 2**31 - 512:
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
    out = torch.empty((N, C, h, w), dtype=image.dtype, device=image.device)
    warped = torch.empty(0 if labels is None else (N, h, w), dtype=labels.dtype if labels is not None else None,
                         device=image.device)  # fmt: skip
    if not N * h * w:
        return out, warped
    GH, GW = displacement.shape[2:]
    whole = not image.is_floating_point()
    BLOCK_P = 256
    with _triton.on_device(image):
        _fwd_kernel[(-(-h * w // BLOCK_P), N)](
            image, displacement.float().contiguous(), labels,
            None if matrix is None else matrix.float().contiguous(), None if lut is None else lut.float().contiguous(),
            out, warped,
            C, H, W, GH, GW, h, w, (H - h) // 2, (W - w) // 2, 0 if lut is None else lut.shape[-1],
            _scale(GH, H), _scale(GW, W), float(torch.iinfo(image.dtype).max) if whole else 1.0,
            *image.stride(), *((0, 0, 0) if labels is None else labels.stride()),
            lut.shape[-1] if lut is not None and lut.dim() == 2 else 0,
            ORDER=order, WHOLE=whole, BLOCK_P=BLOCK_P, num_warps=4,
        )  # fmt: skip
    return out, warped


def _scale(points: int, pixels: int) -> float:
    """Grid points a pixel: corners on corners."""
    return (points - 1) / (pixels - 1) if pixels > 1 else 0.0


@torch.library.custom_op("unet::elastic_warp", mutates_args=())
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
    # the map is a matter of float32 whatever the caller's autocast says
    with torch.autocast(image.device.type, enabled=False):
        out, warped = reference.elastic_warp(image, displacement, labels, matrix, lut, out_size, order)
    # an op returns tensors always: no labels, no elements
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
    if not why_not(image, displacement, labels, out_size):
        return launch_elastic_warp_fwd(*arguments)
    out, warped = reference.elastic_warp(*arguments)
    return out.contiguous(), torch.empty(0, device=image.device) if warped is None else warped.contiguous()


@_op.register_fake
def _(
    image: Tensor,
    displacement: Tensor,
    labels: Tensor | None,
    matrix: Tensor | None,
    lut: Tensor | None,
    out_size: Sequence[int],
    order: int,
) -> tuple[Tensor, Tensor]:
    n, c = image.shape[:2]
    out = torch.empty((n, c, *out_size), dtype=image.dtype, device=image.device)
    if labels is None:
        return out, torch.empty(0, device=image.device)
    return out, torch.empty((n, *out_size), dtype=labels.dtype, device=image.device)


def _expect_finite(name: str, value: Tensor) -> None:
    # on a GPU this would wait for it; there NaN goes through to the image
    if value.device.type == "cpu" and not value.isfinite().all():
        raise ValueError(f"{name} must be finite, got {int((~value.isfinite()).sum())} NaN or infinite values")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    image, displacement, _, matrix, lut, ctx.out_size, ctx.order = inputs
    ctx.save_for_backward(image, displacement, matrix, lut)
    ctx.mark_non_differentiable(output[1])


@_checks.outside_autocast
def _backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    image, displacement, matrix, lut = ctx.saved_tensors
    for_image, for_displacement, _labels, for_matrix, *_rest = ctx.needs_input_grad
    height, width = image.shape[-2:]
    q_y, q_x = reference.displaced(image, displacement, ctx.out_size)
    y, x = reference.transformed(q_y, q_x, matrix, height, width)
    values = image.to(y.dtype)
    dout = dout.to(y.dtype)
    if lut is not None:
        dout = dout * _lut_slope(reference.sample(values, y, x, ctx.order), lut, image.dtype)
    dimage = _scattered(dout, values, y, x, ctx.order).to(image.dtype) if for_image else None
    ddisplacement = dmatrix = None
    if for_displacement or for_matrix:
        dy, dx = _position_gradient(dout, values, y, x, ctx.order)
        if for_matrix:
            dmatrix = _matrix_gradient(dy, dx, q_y - (height - 1) / 2, q_x - (width - 1) / 2).to(matrix.dtype)
        if for_displacement:
            ddisplacement = _grid_gradient(dy, dx, displacement, matrix, ctx.out_size, height, width)
    return dimage, ddisplacement, None, dmatrix, None, None, None


def _lut_slope(values: Tensor, lut: Tensor, dtype: torch.dtype) -> Tensor:
    """d lut(v) / dv; 0 where the table is flat because v is beyond it."""
    _, left, right = reference.lut_segment(values, lut, dtype)
    inside = (values >= 0) & (values <= 1)
    return torch.where(inside, (right - left) * (lut.shape[-1] - 1), 0)


def _scattered(dout: Tensor, image: Tensor, y: Tensor, x: Tensor, order: int) -> Tensor:
    """The transpose of `reference.sample`: every output value handed back to the pixels that it was read from."""
    n, c, height, width = image.shape
    y0, x0 = y.floor(), x.floor()
    dimage = torch.zeros_like(image).flatten(2)
    for dy, of_row in reference.taps(y - y0, order):
        row = reference.mirror(y0 + dy, height) * width
        for dx, of_column in reference.taps(x - x0, order):
            index = (row + reference.mirror(x0 + dx, width)).flatten(1).unsqueeze(1).expand(n, c, -1)
            share = dout * (of_row * of_column).unsqueeze(1)
            dimage = dimage.scatter_add(2, index, share.flatten(2))
    return dimage.unflatten(2, (height, width))


def _position_gradient(dout: Tensor, image: Tensor, y: Tensor, x: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """The loss's derivative by the row and the column that each output pixel reads."""
    height, width = image.shape[-2:]
    y0, x0 = y.floor(), x.floor()
    dy, dx = torch.zeros_like(y), torch.zeros_like(x)
    rows = zip(reference.taps(y - y0, order), _slopes(y - y0, order), strict=True)
    columns = list(zip(reference.taps(x - x0, order), _slopes(x - x0, order), strict=True))
    for (i, of_row), row_slope in rows:
        row = reference.mirror(y0 + i, height) * width
        for (j, of_column), column_slope in columns:
            value = (dout * reference.gather(image, row + reference.mirror(x0 + j, width))).sum(1)
            dy, dx = dy + value * row_slope * of_column, dx + value * of_row * column_slope
    return dy, dx


def _slopes(f: Tensor, order: int, a: float = -0.75) -> list[Tensor]:
    """The derivatives of `reference.taps` by f. At a whole pixel linear has two: this is the one to the right."""
    if order == 1:
        return [-torch.ones_like(f), torch.ones_like(f)]

    def inner(t: Tensor) -> Tensor:
        return (3 * (a + 2) * t - 2 * (a + 3)) * t

    def outer(t: Tensor) -> Tensor:
        return (3 * a * t - 10 * a) * t + 8 * a

    return [outer(1 + f), inner(f), -inner(1 - f), -outer(2 - f)]


def _matrix_gradient(dy: Tensor, dx: Tensor, q_y: Tensor, q_x: Tensor) -> Tensor:
    """[N, 2, 3], of A(q) = M [q_y, q_x, 1]."""
    factors = (q_y, q_x, torch.ones_like(q_y))
    return torch.stack([torch.stack([(d * q).sum((1, 2)) for q in factors], 1) for d in (dy, dx)], 1)


def _grid_gradient(
    dy: Tensor,
    dx: Tensor,
    displacement: Tensor,
    matrix: Tensor | None,
    out_size: Sequence[int],
    height: int,
    width: int,
) -> Tensor:
    """Back through the affine map, the window and the bicubic interpolation, to the grid."""
    if matrix is not None:
        m = matrix.to(dy.dtype)[:, :, :, None, None]
        dy, dx = m[:, 0, 0] * dy + m[:, 1, 0] * dx, m[:, 0, 1] * dy + m[:, 1, 1] * dx
    rows, columns = reference.window(out_size, height, width, dy.device)
    du = torch.stack([dy, dx], 1)
    du = du.new_zeros((*du.shape[:2], height, du.shape[3])).index_add(2, rows.clamp(0, height - 1), du)
    du = du.new_zeros((*du.shape[:3], width)).index_add(3, columns.clamp(0, width - 1), du)
    # in float64, which autocast leaves alone; ATen's own transpose has no shape function for symbolic sizes
    of_row, of_column = (
        _bicubic(size, entries, du.device)
        for size, entries in ((height, displacement.shape[2]), (width, displacement.shape[3]))
    )
    return (of_row.T @ du.double() @ of_column).to(displacement.dtype)


def _bicubic(size: int, entries: int, device: torch.device) -> Tensor:
    """[size, entries]: how much each of `size` pixels takes from each of `entries` points laid corner to corner."""
    position = torch.arange(size, device=device, dtype=torch.float64) * ((entries - 1) / max(size - 1, 1))
    low = position.floor()
    share = position.new_zeros((size, entries))
    for offset, weight in reference.taps(position - low, order=3):
        point = (low + offset).long().clamp(0, entries - 1).unsqueeze(1)
        share = share.scatter_add(1, point, weight.unsqueeze(1))
    return share


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
    size = _expect_out_size(out_size, height, width)
    _checks.expect_float("displacement", displacement, "N, 2, gh, gw")
    _checks.expect_size("displacement", displacement, (n, 2, -1, -1), "(the batch of image; rows, columns)")
    if displacement.shape[2] < 2 or displacement.shape[3] < 2:
        raise ValueError(
            f"displacement must be a grid of at least 2x2, got {displacement.shape[2]}x{displacement.shape[3]}"
        )
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
    out, warped = _op(image, displacement, labels, matrix, lut, size, order)
    return out if labels is None else (out, warped)


def _expect_out_size(out_size: int | Sequence[int] | None, height: int, width: int) -> list[int]:
    if out_size is None:
        return [height, width]
    pair = out_size if isinstance(out_size, Sequence) and not isinstance(out_size, str) else (out_size, out_size)
    if len(pair) != 2:
        raise ValueError(f"out_size must be rows and columns, got {out_size!r}")
    size = [_checks.expect_whole("out_size", s) for s in pair]
    if min(size) < 1:
        raise ValueError(f"out_size must be rows and columns of at least 1, got {out_size!r}")
    return size


def _expect_lut(lut: Tensor, image: Tensor) -> None:
    axes = "N, L" if isinstance(lut, Tensor) and lut.dim() == 2 else "L"
    _checks.expect_float("lut", lut, axes)
    _checks.expect_device("lut", lut, "image", image)
    if lut.shape[-1] < 2:
        raise ValueError(f"lut must have at least 2 entries, got {lut.shape[-1]}")
    if lut.dim() == 2 and lut.shape[0] != image.shape[0]:
        raise ValueError(f"lut must have one row per image of the batch, {image.shape[0]}, got {lut.shape[0]}")
