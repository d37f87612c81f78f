"""Every op in plain PyTorch: the specification, and the CPU implementation.

Written to be read beside docs/mathematics.md, differentiable by autograd wherever a derivative exists, right for any
floating dtype (float64 included), any strides and any device. No function here checks its arguments: the public doors
do. Symbols: N batch, C channels, K classes, H rows, W columns; rows always come first.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "border_weight",
    "conv3x3_relu",
    "conv3x3_relu_cat",
    "crop_concat",
    "crop_to",
    "cut_gap",
    "elastic_warp",
    "head_cross_entropy",
    "two_nearest_cells",
    "uncrop",
    "up_conv",
    "weighted_cross_entropy",
]


# convolutions


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


def up_conv(x: Tensor, weight: Tensor, bias: Tensor, mode: str) -> Tensor:
    """[N, Ci, H, W] -> [N, Co, 2H, 2W]; weight [Ci, Co, 2, 2] ("deconv") or [Co, Ci, 2, 2] ("resize")."""
    if mode == "deconv":
        return F.conv_transpose2d(x, weight, bias, stride=2)
    doubled = F.interpolate(x, scale_factor=2, mode="nearest")
    return F.conv2d(F.pad(doubled, (0, 1, 0, 1), mode="replicate"), weight, bias)


# loss


def weighted_cross_entropy(
    logits: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Eq. 1 with its minus sign, in float32 (float64 for float64 logits).

    logits [N, K, H, W], target [N, H, W], pixel_weight [N, H, W], weight [K] -> a scalar, or [N, H, W] for "none".
    """
    logits = at_least_float32(logits)
    valid, index = chosen(target, ignore_index)
    loss = -F.log_softmax(logits, dim=1).gather(1, index).squeeze(1)
    class_factor, factor = pixel_factors(logits, index, valid, pixel_weight, weight)
    loss = torch.where(valid, loss * factor, 0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return over(loss.sum(), (class_factor if reduction == "mean" else factor).sum())


def chosen(target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(which pixels count [N, H, W], the class of each [N, 1, H, W], 0 where it does not count)."""
    # wide before it is compared: to a uint8 map, -100 is 156
    target = target.long()
    valid = target != ignore_index
    return valid, torch.where(valid, target, 0).unsqueeze(1)


def pixel_factors(
    logits: Tensor, index: Tensor, valid: Tensor, pixel_weight: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(class factor, class factor times pixel weight), both [N, H, W] and 0 where a pixel is ignored."""
    class_factor = valid.to(logits.dtype)
    if weight is not None:
        class_factor = torch.where(valid, weight.to(logits.dtype)[index.squeeze(1)], 0)
    if pixel_weight is None:
        return class_factor, class_factor
    return class_factor, torch.where(valid, class_factor * pixel_weight.to(logits.dtype), 0)


def over(total: Tensor, denominator: Tensor) -> Tensor:
    """total / denominator, and 0 where there was nothing to average."""
    empty = denominator == 0
    return torch.where(empty, 0, total / torch.where(empty, 1, denominator))


def head_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """weighted_cross_entropy of the 1x1 convolution of x [N, C, H, W] with weight [K, C, 1, 1] and bias [K]."""
    logits = F.conv2d(x, weight, bias)
    return weighted_cross_entropy(logits, target, pixel_weight, class_weight, ignore_index, reduction)


def at_least_float32(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


# border weights, Eq. 2

# no squared distance reaches this, and adding two of them does not overflow an int64
_FAR = 1 << 60


def two_nearest_cells(instances: Tensor, max_radius: float | None = None) -> tuple[Tensor, Tensor]:
    """Exact distances to the nearest and second-nearest distinct cell; [N, H, W] -> two float32 [N, H, W].

    Separable: each column keeps, for every row, the two nearest distinct ids (keeping two is enough for the two
    nearest of the image, docs/mathematics.md section 5); then a search along the row, outward, until no column further
    out can improve any pixel. Memory is a fixed number of maps, whatever the number of cells.
    """
    reach = math.inf if max_radius is None else float(max_radius) ** 2
    columns = _two_nearest_in_column(instances.long())
    best = [t.clone() for t in columns]
    width = instances.shape[-1]
    for dx in range(1, width):
        # every candidate at this distance costs at least dx^2
        if dx * dx > min(reach, int(best[3].max()) if best[3].numel() else -1):
            break
        for near, far in ((slice(dx, width), slice(0, width - dx)), (slice(0, width - dx), slice(dx, width))):
            window = [t[..., near] for t in best]
            for i in (0, 2):
                improved = _insert(window, columns[i][..., far], columns[i + 1][..., far] + dx * dx)
                for t, new in zip(window, improved, strict=True):
                    t.copy_(new)
                window = [t[..., near] for t in best]
    return tuple(_distance(squared, reach) for squared in (best[1], best[3]))  # type: ignore[return-value]


def _two_nearest_in_column(instances: Tensor) -> list[Tensor]:
    """[id1, squared distance 1, id2, squared distance 2] of the two nearest distinct cells of each pixel's column."""
    result = [torch.zeros_like(instances), torch.full_like(instances, _FAR)] * 2
    result = [t.clone() for t in result]
    height = instances.shape[-2]
    for rows in (range(height), range(height - 1, -1, -1)):
        # the last two distinct ids met on the way, each with the row where it was met last
        shape = (instances.shape[0], instances.shape[-1])
        id1, id2 = instances.new_zeros(shape), instances.new_zeros(shape)
        row1, row2 = torch.zeros_like(id1), torch.zeros_like(id2)
        for row in rows:
            here = instances[:, row]
            cell, other = here > 0, (here > 0) & (here != id1)
            id2, row2 = torch.where(other, id1, id2), torch.where(other, row1, row2)
            id1, row1 = torch.where(cell, here, id1), torch.where(cell, row, row1)
            state = [t[:, row] for t in result]
            for ids, met in ((id1, row1), (id2, row2)):
                state = _insert(state, ids, torch.where(ids > 0, (met - row) ** 2, _FAR))
            for t, new in zip(result, state, strict=True):
                t[:, row] = new
    return result


def _insert(state: list[Tensor], ids: Tensor, squared: Tensor) -> list[Tensor]:
    """The two nearest distinct ids after one more candidate; an id of 0 is no cell and comes with _FAR."""
    id1, best1, id2, best2 = state
    squared = torch.where(ids > 0, squared, _FAR)
    same, first = ids == id1, squared < best1
    second = ~same & ~first & (squared < best2)
    push = ~same & first
    return [
        torch.where(first, ids, id1),
        torch.where(first, squared, best1),
        torch.where(push, id1, torch.where(second, ids, id2)),
        torch.where(push, best1, torch.where(second, squared, best2)),
    ]


def _distance(squared: Tensor, reach: float) -> Tensor:
    none = (squared >= _FAR) | (squared > reach)
    return torch.where(none, math.inf, squared.double().sqrt()).float()


def cut_gap(instances: Tensor) -> Tensor:
    """instances with every cell pixel that has a 4-neighbour of another cell set to 0."""
    touching = torch.zeros_like(instances, dtype=torch.bool)
    for axis in (-2, -1):
        size = instances.shape[axis]
        if size < 2:
            continue
        a, b = instances.narrow(axis, 0, size - 1), instances.narrow(axis, 1, size - 1)
        differ = (a > 0) & (b > 0) & (a != b)
        touching.narrow(axis, 0, size - 1).logical_or_(differ)
        touching.narrow(axis, 1, size - 1).logical_or_(differ)
    return torch.where(touching, 0, instances)


def border_weight(
    instances: Tensor,
    w0: float = 10.0,
    sigma_px: float = 5.0,
    class_weight: Sequence[float] | None = None,
    region: str = "background",
    gap: bool = True,
) -> Tensor:
    """Eq. 2, w_c + w0 exp(-(d1 + d2)^2 / (2 sigma^2)), float32 [N, H, W]; 0 where instances are negative (ignored)."""
    kept = cut_gap(instances) if gap else instances
    background = kept == 0
    d1, d2 = two_nearest_cells(instances, border_radius(w0, sigma_px))
    # a missing second cell leaves d2 infinite, and exp(-inf) is the promised 0
    term = w0 * torch.exp(-((d1 + d2) ** 2) / (2 * sigma_px**2))
    if region == "background":
        term = torch.where(background, term, 0)
    of_background, of_cell = (1.0, 1.0) if class_weight is None else class_weight
    balance = torch.where(background, of_background, of_cell)
    return torch.where(instances < 0, 0, balance + term).float()


def border_radius(w0: float, sigma_px: float) -> float:
    """Distance in pixels beyond which Eq. 2's term is below 1e-12, so that no cell further off needs to be found."""
    return math.ceil(sigma_px * math.sqrt(2 * math.log(max(w0, 1e-12) / 1e-12))) + 1.0


# elastic warp


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
