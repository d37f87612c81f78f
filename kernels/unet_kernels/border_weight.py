"""Distances to the two nearest cells, the gap between touching cells, and the weight map that they make (Eq. 2).

    w[n, y, x] = w_c + w0 exp(-(d1 + d2)^2 / (2 sigma^2))

instances [N, H, W]: cell ids, 0 = background, negative = ignore. d1, d2: exact Euclidean distances in pixels, centre
to centre, to the nearest and second-nearest distinct cell of the uncut map. Integers until the last square root.
No gradient: labels have none. Derivation and proof: docs/mathematics.md, section 5.

On CUDA, three kernels. `_segments_kernel`: of each column of each segment of SEGMENT rows, the two distinct cells
nearest to its upper and to its lower edge. `_columns_kernel`: with those of the segments around, for each pixel the
two nearest distinct cells of its column. `_rows_kernel`: each pixel looks along its row, outward, until no column
further out can improve any pixel of its block; then it writes distances, or Eq. 2's weight at once. The second and
the third take a band of rows at a time, so that what lies between them does not grow with the image.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _checks, _native, _triton, reference
from ._triton import jit, tl

__all__ = [
    "border_weight",
    "cut_gap",
    "launch_border_weight_fwd",
    "launch_cut_gap_fwd",
    "launch_two_nearest_cells_fwd",
    "two_nearest_cells",
]

REGIONS = ("background", "all")

# no squared distance of an image of at most LARGEST rows and columns reaches this
FAR = 2**31 - 1
LARGEST = 2**15 - 1
# programs along the third axis of a launch
MOST = 2**16 - 1
# of what the column kernel tells the row kernel: 16 bytes a pixel of a band
BAND_BYTES = 2**28

_FAR = tl.constexpr(FAR)


@jit
def _offer(id1, best1, id2, best2, new, squared):  # type: ignore[no-untyped-def]
    """The two nearest distinct cells after one more candidate; an id of 0 is no cell."""
    squared = tl.where(new > 0, squared, _FAR)
    first = squared < best1
    push = first & (new != id1)
    second = (new != id1) & (squared >= best1) & (squared < best2)
    best2 = tl.where(push, best1, tl.where(second, squared, best2))
    id2 = tl.where(push, id1, tl.where(second, new, id2))
    return tl.where(first, new, id1), tl.where(first, squared, best1), id2, best2


@jit
def _meet(id1, row1, id2, row2, here, row):  # type: ignore[no-untyped-def]
    """The last two distinct cells met on the way along a column, each with the row where it was met last."""
    other = (here > 0) & (here != id1)
    id2, row2 = tl.where(other, id1, id2), tl.where(other, row1, row2)
    return tl.where(here > 0, here, id1), tl.where(here > 0, row, row1), id2, row2


@jit
def _and_further(id1, row1, id2, row2, far1, far_row1, far2, far_row2):  # type: ignore[no-untyped-def]
    """The nearest two of what is known, and of two that lie further away than all of it."""
    # the nearest of the further ones that is not known yet
    taken = far1 == id1
    next_id, next_row = tl.where(taken, far2, far1), tl.where(taken, far_row2, far_row1)
    lone = (id1 > 0) & (id2 == 0)
    id2, row2 = tl.where(lone, next_id, id2), tl.where(lone, next_row, row2)
    none = id1 == 0
    id2, row2 = tl.where(none, far2, id2), tl.where(none, far_row2, row2)
    return tl.where(none, far1, id1), tl.where(none, far_row1, row1), id2, row2


@jit
def _segments_kernel(  # type: ignore[no-untyped-def]
    instances_ptr, segments_ptr,
    H, W, segments,
    SEGMENT: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    x = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)  # [BLOCK_W]
    segment, n = tl.program_id(1), tl.program_id(2).to(tl.int64)
    top = segment * SEGMENT
    here_ptr = instances_ptr + (n * H + top) * W + x
    none = tl.zeros([BLOCK_W], tl.int32)
    # seen from above: the first two that were met; seen from below: the last two
    first1, first_row1, first2, first_row2 = none, none, none, none
    last1, last_row1, last2, last_row2 = none, none, none, none
    for step in tl.range(0, SEGMENT, loop_unroll_factor=4):
        row = top + step
        here = tl.load(here_ptr + step * W, mask=(x < W) & (row < H), other=0)
        second = (here > 0) & (first1 > 0) & (first2 == 0) & (here != first1)
        first2, first_row2 = tl.where(second, here, first2), tl.where(second, row, first_row2)
        first = (here > 0) & (first1 == 0)
        first1, first_row1 = tl.where(first, here, first1), tl.where(first, row, first_row1)
        last1, last_row1, last2, last_row2 = _meet(last1, last_row1, last2, last_row2, here, row)
    # [N, segments, 8, W]
    out = segments_ptr + (n * segments + segment) * 8 * W + x
    tl.store(out, first1, mask=x < W)
    tl.store(out + W, first_row1, mask=x < W)
    tl.store(out + 2 * W, first2, mask=x < W)
    tl.store(out + 3 * W, first_row2, mask=x < W)
    tl.store(out + 4 * W, last1, mask=x < W)
    tl.store(out + 5 * W, last_row1, mask=x < W)
    tl.store(out + 6 * W, last2, mask=x < W)
    tl.store(out + 7 * W, last_row2, mask=x < W)


@jit
def _columns_kernel(  # type: ignore[no-untyped-def]
    instances_ptr, segments_ptr, columns_ptr,
    H, W, segments, band_top, band, stride_plane, reach,
    SEGMENT: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    x = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)  # [BLOCK_W]
    n = tl.program_id(2).to(tl.int64)
    segment = band_top // SEGMENT + tl.program_id(1)
    top = segment * SEGMENT
    bottom = top + SEGMENT - 1
    here_ptr = instances_ptr + (n * H + top) * W + x
    around = segments_ptr + n * segments * 8 * W + x
    # planes of the nearer id, its squared distance, the other id, its squared distance
    out = columns_ptr + (n * band + (top - band_top)) * W + x
    out_best = out + stride_plane
    out2 = out_best + stride_plane
    out2_best = out2 + stride_plane
    # lanes beyond the row want for nothing
    outside = tl.where(x < W, 0, 1)

    # downward: of the segments above, from the nearest up, until there are two or no more within reach
    id1, row1, id2, row2 = outside, outside, outside, outside
    k = segment - 1
    while (k >= 0) & (tl.min(id2, axis=0) == 0) & ((top - k * SEGMENT - SEGMENT + 1) <= reach):
        of_k = around + (k.to(tl.int64) * 8 + 4) * W
        far1 = tl.load(of_k, mask=x < W, other=0)
        far_row1 = tl.load(of_k + W, mask=x < W, other=0)
        far2 = tl.load(of_k + 2 * W, mask=x < W, other=0)
        far_row2 = tl.load(of_k + 3 * W, mask=x < W, other=0)
        id1, row1, id2, row2 = _and_further(id1, row1, id2, row2, far1, far_row1, far2, far_row2)
        k -= 1
    for step in tl.range(0, SEGMENT, loop_unroll_factor=4):
        row = top + step
        inside = (x < W) & (row < H)
        here = tl.load(here_ptr + step * W, mask=inside, other=0)
        id1, row1, id2, row2 = _meet(id1, row1, id2, row2, here, row)
        tl.store(out + step * W, id1, mask=inside)
        tl.store(out_best + step * W, tl.where(id1 > 0, (row - row1) * (row - row1), _FAR), mask=inside)
        tl.store(out2 + step * W, id2, mask=inside)
        tl.store(out2_best + step * W, tl.where(id2 > 0, (row - row2) * (row - row2), _FAR), mask=inside)

    # upward likewise, joined to what came from above
    id1, row1, id2, row2 = outside, outside, outside, outside
    k = segment + 1
    while (k < segments) & (tl.min(id2, axis=0) == 0) & ((k * SEGMENT - bottom) <= reach):
        of_k = around + k.to(tl.int64) * 8 * W
        far1 = tl.load(of_k, mask=x < W, other=0)
        far_row1 = tl.load(of_k + W, mask=x < W, other=0)
        far2 = tl.load(of_k + 2 * W, mask=x < W, other=0)
        far_row2 = tl.load(of_k + 3 * W, mask=x < W, other=0)
        id1, row1, id2, row2 = _and_further(id1, row1, id2, row2, far1, far_row1, far2, far_row2)
        k += 1
    for back in tl.range(0, SEGMENT, loop_unroll_factor=4):
        step = SEGMENT - 1 - back
        row = top + step
        inside = (x < W) & (row < H)
        here = tl.load(here_ptr + step * W, mask=inside, other=0)
        id1, row1, id2, row2 = _meet(id1, row1, id2, row2, here, row)
        # each lane reads what it wrote itself
        a = tl.load(out + step * W, mask=inside, other=0)
        best_a = tl.load(out_best + step * W, mask=inside, other=_FAR)
        b = tl.load(out2 + step * W, mask=inside, other=0)
        best_b = tl.load(out2_best + step * W, mask=inside, other=_FAR)
        a, best_a, b, best_b = _offer(a, best_a, b, best_b, id1, (row - row1) * (row - row1))
        a, best_a, b, best_b = _offer(a, best_a, b, best_b, id2, (row - row2) * (row - row2))
        tl.store(out + step * W, a, mask=inside)
        tl.store(out_best + step * W, best_a, mask=inside)
        tl.store(out2 + step * W, b, mask=inside)
        tl.store(out2_best + step * W, best_b, mask=inside)


@jit
def _touches(instances_ptr, at, here, y, x, H, W, inside):  # type: ignore[no-untyped-def]
    """Whether a 4-neighbour of a cell's pixel belongs to another cell."""
    above = tl.load(instances_ptr + at - W, mask=inside & (y > 0), other=0)
    below = tl.load(instances_ptr + at + W, mask=inside & (y + 1 < H), other=0)
    left = tl.load(instances_ptr + at - 1, mask=inside & (x > 0), other=0)
    right = tl.load(instances_ptr + at + 1, mask=inside & (x + 1 < W), other=0)
    other = ((above > 0) & (above != here)) | ((below > 0) & (below != here))
    other = other | ((left > 0) & (left != here)) | ((right > 0) & (right != here))
    return (here > 0) & other


@jit
def _rows_kernel(  # type: ignore[no-untyped-def]
    instances_ptr, columns_ptr, cells_ptr, first_ptr, second_ptr,
    H, W, band_top, band, stride_plane, furthest, reach_squared,
    w0, exponent, limit, of_background, of_cell,
    WEIGHT: tl.constexpr, EVERYWHERE: tl.constexpr, GAP: tl.constexpr, STEPS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    x = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    y, n = band_top + tl.program_id(1), tl.program_id(2).to(tl.int64)
    inside = x < W
    at = (n * H + y) * W + x
    row = columns_ptr + (n * band + (y - band_top)) * W
    row_best = row + stride_plane
    row2 = row_best + stride_plane
    row2_best = row2 + stride_plane
    id1 = tl.load(row + x, mask=inside, other=0)
    best1 = tl.load(row_best + x, mask=inside, other=_FAR)
    id2 = tl.load(row2 + x, mask=inside, other=0)
    best2 = tl.load(row2_best + x, mask=inside, other=_FAR)
    wanted = inside
    if WEIGHT:
        here = tl.load(instances_ptr + at, mask=inside, other=-1)
        background = here == 0
        if GAP:
            background = background | _touches(instances_ptr, at, here, y, x, H, W, inside)
        # whose distances nobody asks for need not be found
        wanted = here >= 0
        if not EVERYWHERE:
            wanted = background

    # 0, 1, or 2 for more: nobody looks for a cell that is not there
    cells = 2
    if cells_ptr is not None:
        cells = tl.load(cells_ptr + n)
    dx = 1
    going = (cells > 0) & (tl.max(tl.where(wanted, tl.where(cells > 1, best2, best1), 0), axis=0) > 1)
    while (dx <= furthest) & going:
        # several steps a look: what a step too many finds is no nearer, and changes nothing
        for _ in tl.static_range(STEPS):
            left, right = x - dx, x + dx
            there = inside & (left >= 0)
            near = tl.load(row + left, mask=there, other=0)
            squared = tl.load(row_best + left, mask=there & (near > 0), other=0)
            id1, best1, id2, best2 = _offer(id1, best1, id2, best2, near, squared + dx * dx)
            near = tl.load(row2 + left, mask=there, other=0)
            squared = tl.load(row2_best + left, mask=there & (near > 0), other=0)
            id1, best1, id2, best2 = _offer(id1, best1, id2, best2, near, squared + dx * dx)
            there = inside & (right < W)
            near = tl.load(row + right, mask=there, other=0)
            squared = tl.load(row_best + right, mask=there & (near > 0), other=0)
            id1, best1, id2, best2 = _offer(id1, best1, id2, best2, near, squared + dx * dx)
            near = tl.load(row2 + right, mask=there, other=0)
            squared = tl.load(row2_best + right, mask=there & (near > 0), other=0)
            id1, best1, id2, best2 = _offer(id1, best1, id2, best2, near, squared + dx * dx)
            dx += 1
        better = wanted & (tl.where(cells > 1, best2, best1) > dx * dx)
        if WEIGHT:
            # what is still to be found lies dx away at least
            step = dx * 1.0
            better = better & (tl.minimum(tl.sqrt_rn(best1.to(tl.float32)), step) + step <= limit)
        going = tl.max(better.to(tl.int32), axis=0) > 0

    absent1, absent2 = best1 > reach_squared, best2 > reach_squared
    if WEIGHT:
        d = tl.sqrt_rn(best1.to(tl.float32)) + tl.sqrt_rn(best2.to(tl.float32))
        term = tl.where(absent2 | (d > limit) | (wanted == 0), 0.0, w0 * tl.exp(d * d * exponent))
        weight = tl.where(here < 0, 0.0, tl.where(background, of_background, of_cell) + term)
        tl.store(first_ptr + at, weight, mask=inside)
    else:
        # in float64: a float32 does not hold every squared distance
        d1, d2 = tl.sqrt(best1.to(tl.float64)).to(tl.float32), tl.sqrt(best2.to(tl.float64)).to(tl.float32)
        tl.store(first_ptr + at, tl.where(absent1, float("inf"), d1), mask=inside)
        tl.store(second_ptr + at, tl.where(absent2, float("inf"), d2), mask=inside)


@jit
def _cut_gap_kernel(instances_ptr, out_ptr, H, W, BLOCK_P: tl.constexpr):  # type: ignore[no-untyped-def]
    x = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    y, n = tl.program_id(1), tl.program_id(2).to(tl.int64)
    inside = x < W
    at = (n * H + y) * W + x
    here = tl.load(instances_ptr + at, mask=inside, other=0)
    touches = _touches(instances_ptr, at, here, y, x, H, W, inside)
    tl.store(out_ptr + at, tl.where(touches, 0, here), mask=inside)


def why_not(instances: Tensor) -> str:
    """Why the Triton kernels cannot take instances [N, H, W], or "" if they can."""
    N, H, W = instances.shape
    if max(H, W) > LARGEST or N > MOST:
        return f"squared distances of more than {LARGEST} rows or columns do not fit 32 bits"
    return _triton.why_not(instances.device)


def launch_two_nearest_cells_fwd(instances: Tensor, max_radius: float | None) -> tuple[Tensor, Tensor]:
    """instances [N, H, W] int32, at most LARGEST rows and columns."""
    d1 = torch.empty(instances.shape, dtype=torch.float32, device=instances.device)
    d2 = torch.empty_like(d1)
    _launch(instances, max_radius, d1, d2)
    return d1, d2


def launch_border_weight_fwd(
    instances: Tensor, w0: float, sigma_px: float, class_weight: Sequence[float] | None, region: str, gap: bool
) -> Tensor:
    """instances [N, H, W] int32, at most LARGEST rows and columns."""
    weight = torch.empty(instances.shape, dtype=torch.float32, device=instances.device)
    limit = reference.border_limit(w0, sigma_px)
    _launch(instances, limit, weight, weight, weigh=(w0, sigma_px, class_weight or (1.0, 1.0), region == "all", gap))
    return weight


def launch_cut_gap_fwd(instances: Tensor) -> Tensor:
    """instances [N, H, W] int32."""
    instances = instances.contiguous()
    out = torch.empty(instances.shape, dtype=torch.int32, device=instances.device)
    N, H, W = instances.shape
    if out.numel():
        with _triton.on_device(instances):
            _cut_gap_kernel[(-(-W // 256), H, N)](instances, out, H, W, BLOCK_P=256, num_warps=4)
    return out


def _launch(
    instances: Tensor,
    max_radius: float | None,
    first: Tensor,
    second: Tensor,
    *,
    weigh: tuple[float, float, Sequence[float], bool, bool] | None = None,
) -> None:
    """Distances into first and second; or Eq. 2 into first, by (w0, sigma_px, (background, cell), everywhere, gap)."""
    instances = instances.contiguous()
    N, H, W = instances.shape
    if not instances.numel():
        return
    furthest = max(H, W) if max_radius is None else math.floor(min(max_radius, max(H, W)))
    reach_squared = FAR - 1 if max_radius is None else math.floor(min(max_radius * max_radius, FAR - 1))
    SEGMENT, BLOCK_W, BLOCK_P = segment_rows(H), 128, 64
    segments = -(-H // SEGMENT)
    # one row of segments at least; all of a training tile
    band = min(H, SEGMENT * max(1, BAND_BYTES // (16 * N * W * SEGMENT)))
    summary = torch.empty((N, segments, 8, W), dtype=torch.int32, device=instances.device)
    columns = torch.empty((4, N, band, W), dtype=torch.int32, device=instances.device)
    limit = float(max_radius or 0.0)
    # a bounded search ends by itself
    cells = _how_many(instances) if max_radius is None else None
    w0, sigma_px, (of_background, of_cell), everywhere, gap = weigh or (0.0, 1.0, (0.0, 0.0), False, False)
    wide, narrow = -(-W // BLOCK_W), -(-W // BLOCK_P)
    with _triton.on_device(instances):
        _segments_kernel[(wide, segments, N)](
            instances, summary, H, W, segments, SEGMENT=SEGMENT, BLOCK_W=BLOCK_W, num_warps=4
        )
        for band_top in range(0, H, band):
            rows = min(band, H - band_top)
            _columns_kernel[(wide, -(-rows // SEGMENT), N)](
                instances, summary, columns,
                H, W, segments, band_top, band, columns.stride(0), furthest,
                SEGMENT=SEGMENT, BLOCK_W=BLOCK_W, num_warps=4,
            )  # fmt: skip
            # a warp a block: the look at whether to go on is a shuffle
            _rows_kernel[(narrow, rows, N)](
                instances, columns, cells, first, second,
                H, W, band_top, band, columns.stride(0), min(furthest, W - 1), reach_squared,
                float(w0), -0.5 / sigma_px / sigma_px, limit, float(of_background), float(of_cell),
                WEIGHT=weigh is not None, EVERYWHERE=everywhere, GAP=gap, STEPS=2, BLOCK_P=BLOCK_P, num_warps=1,
            )  # fmt: skip


def _how_many(instances: Tensor) -> Tensor:
    """Distinct cells of each map, int32 [N]: 0, 1, or 2 for more."""
    highest = instances.amax((1, 2))
    lowest = torch.where(instances > 0, instances, FAR).amin((1, 2))
    return (highest > 0).to(torch.int32) + ((highest > 0) & (lowest < highest)).to(torch.int32)


def segment_rows(H: int) -> int:
    """SEGMENT: rows that one program walks along; the fewer, the more programs, and the more segments to look at."""
    return 16 if H <= 2048 else 64


def launch_two_nearest_cells_cpu(instances: Tensor, max_radius: float | None) -> tuple[Tensor, Tensor]:
    """The C++ kernel: instances [N, H, W] int32 on a CPU."""
    instances = instances.contiguous()
    d1 = torch.empty(instances.shape, dtype=torch.float32)
    d2 = torch.empty_like(d1)
    reach = math.inf if max_radius is None else max_radius
    status = _native.native().unet_two_nearest_cells_cpu(
        instances.data_ptr(), *instances.shape, reach, d1.data_ptr(), d2.data_ptr()
    )
    if status:
        raise MemoryError(f"two_nearest_cells needs 24 bytes a pixel of {list(instances.shape[1:])}")
    return d1, d2


def launch_border_sum_cpu(instances: Tensor, limit: float, everywhere: bool, gap: bool) -> Tensor:
    """The C++ kernel: `reference.border_sum` of instances [N, H, W] int32 on a CPU."""
    instances = instances.contiguous()
    found = torch.empty(instances.shape, dtype=torch.float32)
    status = _native.native().unet_border_sum_cpu(
        instances.data_ptr(), *instances.shape, limit, everywhere, gap, found.data_ptr()
    )
    if status:
        raise MemoryError(f"border_weight needs 24 bytes a pixel of {list(instances.shape[1:])}")
    return found


def _two_nearest(instances: Tensor, max_radius: float | None) -> tuple[Tensor, Tensor]:
    if _native.why_not(instances.device):
        d1, d2 = reference.two_nearest_cells(instances, max_radius)
        return d1.contiguous(), d2.contiguous()
    return launch_two_nearest_cells_cpu(instances, max_radius)


@torch.library.custom_op("unet::two_nearest_cells", mutates_args=())
def _two_nearest_op(instances: Tensor, max_radius: float | None) -> tuple[Tensor, Tensor]:
    return _two_nearest(instances, max_radius)


@_two_nearest_op.register_kernel("cuda")
def _two_nearest_cuda(instances: Tensor, max_radius: float | None) -> tuple[Tensor, Tensor]:
    if why_not(instances):
        return _two_nearest(instances, max_radius)
    return launch_two_nearest_cells_fwd(instances, max_radius)


@_two_nearest_op.register_fake
def _(instances: Tensor, max_radius: float | None) -> tuple[Tensor, Tensor]:
    d1 = torch.empty(instances.shape, dtype=torch.float32, device=instances.device)
    return d1, torch.empty_like(d1)


@torch.library.custom_op("unet::cut_gap", mutates_args=())
def _cut_gap_op(instances: Tensor) -> Tensor:
    return reference.cut_gap(instances).contiguous()


@_cut_gap_op.register_kernel("cuda")
def _cut_gap_cuda(instances: Tensor) -> Tensor:
    return reference.cut_gap(instances).contiguous() if why_not(instances) else launch_cut_gap_fwd(instances)


@_cut_gap_op.register_fake
def _(instances: Tensor) -> Tensor:
    return torch.empty(instances.shape, dtype=instances.dtype, device=instances.device)


@torch.library.custom_op("unet::border_weight", mutates_args=())
def _border_weight_op(
    instances: Tensor, w0: float, sigma_px: float, class_weight: Sequence[float] | None, region: str, gap: bool
) -> Tensor:
    sums = None if _native.why_not(instances.device) else launch_border_sum_cpu
    return reference.border_weight(instances, w0, sigma_px, class_weight, region, gap, sums).contiguous()


@_border_weight_op.register_kernel("cuda")
def _border_weight_cuda(
    instances: Tensor, w0: float, sigma_px: float, class_weight: Sequence[float] | None, region: str, gap: bool
) -> Tensor:
    arguments = (instances, w0, sigma_px, class_weight, region, gap)
    return (
        reference.border_weight(*arguments).contiguous() if why_not(instances) else launch_border_weight_fwd(*arguments)
    )


@_border_weight_op.register_fake
def _(
    instances: Tensor, w0: float, sigma_px: float, class_weight: Sequence[float] | None, region: str, gap: bool
) -> Tensor:
    return torch.empty(instances.shape, dtype=torch.float32, device=instances.device)


def two_nearest_cells(instances: Tensor, *, max_radius: float | None = None) -> tuple[Tensor, Tensor]:
    """Distances to the nearest and the second-nearest distinct cell.

    Args:
        instances: [N, H, W], any integer dtype: cell ids (connected or not), 0 = background, negative = ignore.
        max_radius: pixels; a cell further away counts as absent. None searches the whole image.

    Returns:
        (d1, d2), float32 [N, H, W]: exact Euclidean distances in pixels, centre to centre. d1 is 0 inside a cell;
        a missing cell is `inf`.

    Raises:
        TypeError: instances is no integer tensor, or max_radius no number.
        ValueError: instances is not 3-D, an id does not fit 32 bits, or max_radius is negative.

    >>> d1, d2 = two_nearest_cells(torch.tensor([[[1, 0, 0, 7]]]))
    >>> d1.tolist(), d2.tolist()
    ([[[0.0, 1.0, 1.0, 0.0]]], [[[3.0, 2.0, 2.0, 3.0]]])
    """
    if max_radius is not None:
        max_radius = _checks.expect_number("max_radius", max_radius, low=0)
    d1, d2 = _two_nearest_op(_ids(instances), max_radius)
    return d1, d2


def cut_gap(instances: Tensor) -> Tensor:
    """instances with a background gap between cells that touch.

    A cell pixel with a 4-neighbour of another cell becomes 0, on both sides alike: the gap is two pixels wide, and
    the result of a mirrored map is the mirrored result. This is the separation border that the paper introduces; the
    loss's target is `cut_gap(instances) > 0`.

    Args:
        instances: [N, H, W], any integer dtype: cell ids, 0 = background, negative = ignore (kept, and no cell).

    Returns:
        [N, H, W], dtype of instances.

    Raises:
        TypeError: instances is no integer tensor.
        ValueError: instances is not 3-D, or an id does not fit 32 bits.

    >>> cut_gap(torch.tensor([[[1, 1, 2, 2, 0, 3]]])).tolist()
    [[[1, 0, 0, 2, 0, 3]]]
    """
    return _cut_gap_op(_ids(instances)).to(instances.dtype)


def border_weight(
    instances: Tensor,
    *,
    w0: float = 10.0,
    sigma_px: float = 5.0,
    class_weight: Sequence[float] | None = None,
    region: str = "background",
    gap: bool = True,
) -> Tensor:
    """The weight map of Eq. 2 of Ronneberger et al. 2015: w_c + w0 exp(-(d1 + d2)^2 / (2 sigma^2)).

    Args:
        instances: [N, H, W], any integer dtype: cell ids, 0 = background, negative = ignore.
        w0: height of the border term.
        sigma_px: its width in pixels.
        class_weight: (background, cell), the w_c of Eq. 2, applied everywhere; None is 1 for both.
        region: where the border term applies: "background" (the paper's purpose, and Freiburg's own code) or "all"
            (Eq. 2 to the letter).
        gap: background means that of `cut_gap(instances)`; d1 and d2 are those of the uncut cells all the same.

    Returns:
        float32 [N, H, W]. A pixel without a second cell has no border term; ignored pixels weigh 0.

    Raises:
        TypeError: instances is no integer tensor, or a setting no number.
        ValueError: instances is not 3-D, an id does not fit 32 bits, or a setting is out of range.

    >>> border_weight(torch.tensor([[[1, 0, 2]]]))[0, 0].tolist()  # 1 + 10 exp(-(1 + 1)^2 / 50) in the middle
    [1.0, 10.231163024902344, 1.0]
    """
    w0 = _checks.expect_number("w0", w0, low=0)
    sigma_px = _checks.expect_number("sigma_px", sigma_px, low=0, strictly=True)
    _checks.expect_choice("region", region, REGIONS)
    balance = None
    if class_weight is not None:
        if not isinstance(class_weight, Sequence) or isinstance(class_weight, str) or len(class_weight) != 2:
            raise ValueError(f"class_weight must be a pair (background, cell), got {class_weight!r}")
        parts = zip(("background", "cell"), class_weight, strict=True)
        balance = [_checks.expect_number(f"class_weight of {part}", c, low=0) for part, c in parts]
    return _border_weight_op(_ids(instances), w0, sigma_px, balance, region, bool(gap))


@torch.library.custom_op("unet::instance_ids", mutates_args=())
def _ids_op(instances: Tensor) -> Tensor:
    # a captured graph cannot wait for an answer; what it replays was checked when it was warmed up
    capturing = instances.is_cuda and torch.cuda.is_current_stream_capturing()
    if instances.numel() and not capturing:
        limits = torch.iinfo(torch.int32)
        low, high = (int(extreme) for extreme in instances.long().aminmax())
        if instances.dtype == torch.uint64 and low < 0:
            # beyond int64: torch has no larger integers to look with
            high = int(instances.cpu().numpy().max())
        if low < limits.min or high > limits.max:
            wrong = high if high > limits.max else low
            raise ValueError(f"instances must hold ids that fit 32 bits, got {wrong}; renumber them from 1")
    return instances.to(torch.int32, copy=True)


@_ids_op.register_fake
def _(instances: Tensor) -> Tensor:
    return instances.to(torch.int32, copy=True)


def _ids(instances: Tensor) -> Tensor:
    """instances as int32, checked."""
    _checks.expect_integer("instances", instances, "N, H, W")
    narrow = instances.dtype in (torch.int32, torch.int16, torch.uint16, torch.int8, torch.uint8)
    # what always fits needs no look at the values
    return instances.to(torch.int32) if narrow else _ids_op(instances)
