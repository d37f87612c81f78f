"""Elastic warp of an image and its labels by one coarse grid of displacements.

    out[n, c, p] = image[n, c, A(p + u(p))]        A(q) = M[:, :2] (q - centre) + M[:, 2] + centre

A backward map, in pixels, rows first: u is the bicubic interpolation (Keys, a = -0.75) of displacement [N, 2, gh, gw],
whose corners sit on the image's corner pixels; outside the image u keeps its edge value and the image is mirrored
without repeating its edge. Coordinates are float32 (float64 if an operand is). Labels take the nearest pixel.
Backward keeps what came in and walks the map again. Derivation: docs/mathematics.md, section 6.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks, reference

__all__ = ["elastic_warp"]

IMAGES = (torch.uint8, torch.uint16, *_checks.FLOATS)


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
