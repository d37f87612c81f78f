"""2x2 max-pool with stride 2 that keeps its input and no indices; with the window of that input, or without.

    y[n, c, h, w] = max over a, b in {0, 1} of x[n, c, 2h + a, 2w + b]

torch keeps, besides x, which its neighbours need anyway, an int64 index for every output: 75 MB in the paper's net.
Here the backward finds the places again; ties and NaN go where torch sends them, because it is torch that looks.
On CUDA torch writes those indices even where nobody wants a gradient; `_fwd_kernel` does not. A program takes the
maxima of BLOCK_C channels of BLOCK_P pixels.

A level of a U-Net hands on two things of its last map: the centre to the expanding path, the maxima to the next level.
`window_and_pool` makes both of one x, and in its derivative one pass adds up both gradients where they belong and
applies the mask of the ReLU that made x:

    dx[n, c, h, w] = [not (x <= 0)] (dwindow[n, c, h - top, w - left] + [x is the first of its four maxima] dpooled)

`_dx_kernel` does it: a program takes BLOCK_C channels of BLOCK_P windows of 2x2, every value of dx is written once.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from . import _aten, _checks, _choosing, _layout, _triton, reference
from ._choosing import Question, Way
from ._triton import jit, tl

__all__ = [
    "launch_max_pool2x2_dx",
    "launch_max_pool2x2_fwd",
    "max_pool2x2",
    "question",
    "question_dx",
    "window_and_pool",
]


@jit
def _fwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr,
    H_out, W_out, pixels, C,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_yn, stride_yc, stride_yh, stride_yw,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)  # [BLOCK_C]
    n, h, w = (p // W_out // H_out).to(tl.int64), (p // W_out % H_out).to(tl.int64), (p % W_out).to(tl.int64)
    inside = (p < pixels)[:, None] & (c < C)[None, :]
    x_at = x_ptr + (n * stride_xn + 2 * h * stride_xh + 2 * w * stride_xw)[:, None] + (c * stride_xc)[None, :]
    largest = tl.load(x_at, mask=inside, other=0.0)
    for k in tl.static_range(1, 4):
        other = tl.load(x_at + k // 2 * stride_xh + k % 2 * stride_xw, mask=inside, other=0.0)
        # not a maximum: that loses NaN on a GPU; the first of equal values stays
        largest = tl.where((other > largest) | (other != other), other, largest)
    y_at = y_ptr + (n * stride_yn + h * stride_yh + w * stride_yw)[:, None] + (c * stride_yc)[None, :]
    tl.store(y_at, largest, mask=inside)


@jit
def _dx_kernel(  # type: ignore[no-untyped-def]
    dpooled_ptr, x_ptr, dwindow_ptr, dx_ptr,
    H, W, down, across, quads, C, top, left, H_w, W_w,
    stride_pn, stride_pc, stride_ph, stride_pw,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_wn, stride_wc, stride_wh, stride_ww,
    stride_dn, stride_dc, stride_dh, stride_dw,
    MASK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # down x across windows of 2x2, those that an odd last line (column) leaves incomplete with them
    q = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)  # [BLOCK_C]
    n, h, w = (q // across // down).to(tl.int64), (q // across % down).to(tl.int64), (q % across).to(tl.int64)
    there = (q < quads)[:, None] & (c < C)[None, :]
    x_at = x_ptr + (n * stride_xn + 2 * h * stride_xh + 2 * w * stride_xw)[:, None] + (c * stride_xc)[None, :]
    pooled = there & ((2 * h + 1 < H) & (2 * w + 1 < W))[:, None]
    # where the forward found the maximum
    largest = tl.load(x_at, mask=pooled, other=0.0)
    place = tl.zeros([BLOCK_P, BLOCK_C], tl.int32)
    for k in tl.static_range(1, 4):
        other = tl.load(x_at + k // 2 * stride_xh + k % 2 * stride_xw, mask=pooled, other=0.0)
        larger = (other > largest) | (other != other)
        largest, place = tl.where(larger, other, largest), tl.where(larger, k, place)
    p_at = dpooled_ptr + (n * stride_pn + h * stride_ph + w * stride_pw)[:, None] + (c * stride_pc)[None, :]
    dpooled = tl.load(p_at, mask=pooled, other=0.0).to(tl.float32)
    for k in tl.static_range(4):
        y, z = 2 * h + k // 2, 2 * w + k % 2
        inside = there & ((y < H) & (z < W))[:, None]
        dx = tl.where(pooled & (place == k), dpooled, 0.0)
        if dwindow_ptr is not None:
            seen = inside & ((y >= top) & (y < top + H_w) & (z >= left) & (z < left + W_w))[:, None]
            w_at = dwindow_ptr + (n * stride_wn + (y - top) * stride_wh + (z - left) * stride_ww)[:, None]
            dx += tl.load(w_at + (c * stride_wc)[None, :], mask=seen, other=0.0).to(tl.float32)
        if MASK:
            # not `x > 0`: a NaN lets its gradient through
            x = tl.load(x_at + k // 2 * stride_xh + k % 2 * stride_xw, mask=inside, other=0.0)
            dx = tl.where(x <= 0, 0.0, dx)
        dx_at = dx_ptr + (n * stride_dn + y * stride_dh + z * stride_dw)[:, None] + (c * stride_dc)[None, :]
        tl.store(dx_at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def launch_max_pool2x2_dx(dpooled: Tensor, x: Tensor, dwindow: Tensor | None, mask: bool, values: int = 2048) -> Tensor:
    """dx in x's layout; dwindow is added to its centre; with `mask` zero where x, then a ReLU's result, is."""
    N, C, H, W = x.shape
    dx = _layout.empty_as(x, x.dtype)
    if dx.numel() == 0:
        return dx
    BLOCK_C = min(128, max(8, 1 << (C - 1).bit_length())) if _layout.suggests_channels_last(x) else 1
    BLOCK_P = values // BLOCK_C
    down, across = (H + 1) // 2, (W + 1) // 2
    rows, columns = (0, 0) if dwindow is None else dwindow.shape[2:]
    # one program per block of 2x2 windows, of channels
    with _triton.on_device(x):
        _dx_kernel[(-(-N * down * across // BLOCK_P), -(-C // BLOCK_C))](
            dpooled, x, dwindow, dx,
            H, W, down, across, N * down * across, C, (H - rows) // 2, (W - columns) // 2, rows, columns,
            *dpooled.stride(), *x.stride(), *((0, 0, 0, 0) if dwindow is None else dwindow.stride()), *dx.stride(),
            MASK=mask, BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C, num_warps=4,
        )  # fmt: skip
    return dx


def launch_max_pool2x2_fwd(x: Tensor, values: int = 4096) -> Tensor:
    """`values` results a program."""
    N, C, H, W = x.shape
    y = _empty_pooled(x)
    if y.numel() == 0:
        return y
    BLOCK_C = min(128, max(8, 1 << (C - 1).bit_length())) if _layout.suggests_channels_last(x) else 1
    BLOCK_P = values // BLOCK_C
    pixels = N * (H // 2) * (W // 2)
    # one program per block of pixels, of channels
    with _triton.on_device(x):
        _fwd_kernel[(-(-pixels // BLOCK_P), -(-C // BLOCK_C))](
            x, y, H // 2, W // 2, pixels, C, *x.stride(), *y.stride(), BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C, num_warps=4
        )
    return y


def _empty_pooled(x: Tensor) -> Tensor:
    N, C, H, W = x.shape
    layout = torch.channels_last if _layout.suggests_channels_last(x) else torch.contiguous_format
    return torch.empty((N, C, H // 2, W // 2), dtype=x.dtype, device=x.device, memory_format=layout)


def question(x: Tensor) -> Question:
    def ways() -> list[Way]:
        ours = (Way(f"{v} values", functools.partial(launch_max_pool2x2_fwd, values=v), True) for v in (4096, 2048))
        return [Way("ATen", reference.max_pool2x2, False), *ours]

    def cut(arguments: tuple[Any, ...], lines: int) -> tuple[Any, ...]:
        return (arguments[0][:, :, :lines],)

    pixels = _choosing.octave(x.shape[0] * x.shape[2] * x.shape[3])
    laid_out = "channels_last" if _layout.suggests_channels_last(x) else "contiguous"
    case = f"{x.shape[1]} channels, {pixels}, {_choosing.arithmetic(x.dtype)}, {laid_out}"
    return Question("max_pool2x2", case, ways, reference.max_pool2x2, cut)


@torch.library.custom_op("unet::max_pool2x2", mutates_args=())
def _op(x: Tensor) -> Tensor:
    return _choosing.computed(question, reference.max_pool2x2, (x,), _triton.why_not)


_op.register_fake(reference.max_pool2x2)


def _setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


@_checks.outside_autocast
def _backward(ctx: Any, dy: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return _derivative(dy, x, None, False)


def _derivative(dpooled: Tensor, x: Tensor, dwindow: Tensor | None, mask: bool) -> Tensor:
    if not _choosing.derives(dpooled, x):
        return _dx_by_aten(dpooled, x, dwindow, mask)
    return _checks.untraced(_dx_op, _dx, dpooled, x, dwindow, mask)


_op.register_autograd(_backward, setup_context=_setup)


# of the gradient, which way


def _dx_by_aten(dpooled: Tensor, x: Tensor, dwindow: Tensor | None, mask: bool) -> Tensor:
    _, places = torch.ops.aten.max_pool2d_with_indices(x, [2, 2], [2, 2])
    dx = torch.ops.aten.max_pool2d_with_indices_backward(dpooled, x, [2, 2], [2, 2], [0, 0], [1, 1], False, places)
    if dwindow is not None:
        reference.crop_to(dx, *dwindow.shape[2:]).add_(dwindow)
    return _aten.masked(dx, x) if mask else dx


def question_dx(dpooled: Tensor, x: Tensor, dwindow: Tensor | None, mask: bool) -> Question:
    def ways() -> list[Way]:
        ours = (Way(f"{v} values", functools.partial(launch_max_pool2x2_dx, values=v), True) for v in (2048, 1024))
        return [Way("ATen", _dx_by_aten, False), *ours]

    def cut(arguments: tuple[Any, ...], lines: int) -> tuple[Any, ...]:
        dpooled, x, dwindow, mask = arguments
        x = x[:, :, : 2 * lines]
        window = dwindow if dwindow is None else dwindow[:, :, : x.shape[2]]
        return dpooled[:, :, :lines], x, window, mask

    said = [
        f"{x.shape[1]} channels",
        _choosing.octave(x.shape[0] * x.shape[2] * x.shape[3]),
        _choosing.arithmetic(x.dtype),
        *(["channels_last"] if all(map(_layout.suggests_channels_last, (x, dpooled))) else ["other strides"]),
        *([] if dwindow is None else ["and a window"]),
        *(["masked"] if mask else []),
    ]
    return Question("max_pool2x2_dx", ", ".join(said), ways, _dx_by_aten, cut, any_strides=True)


def _dx(dpooled: Tensor, x: Tensor, dwindow: Tensor | None, mask: bool) -> Tensor:
    found = _choosing.computed(question_dx, _dx_by_aten, (dpooled, x, dwindow, mask), _triton.why_not)
    return found.contiguous(memory_format=_layout.of(x))


@torch.library.custom_op("unet::max_pool2x2_dx", mutates_args=())
def _dx_op(dpooled: Tensor, x: Tensor, dwindow: Tensor | None, mask: bool) -> Tensor:
    return _dx(dpooled, x, dwindow, mask)


@_dx_op.register_fake
def _(dpooled: Tensor, x: Tensor, dwindow: Tensor | None, mask: bool) -> Tensor:
    return _layout.empty_as(x, x.dtype)


def _maxima(x: Tensor) -> Tensor:
    """Without the indices, which cost a CPU more than the maxima do."""
    rows, columns = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    first, *others = (x[:, :, i:rows:2, j:columns:2] for i in (0, 1) for j in (0, 1))
    y = _empty_pooled(x)
    # torch's maximum is NaN where one of the two is
    torch.maximum(first, others[0], out=y)
    for other in others[1:]:
        torch.maximum(y, other, out=y)
    return y


class _OnCPU(torch.autograd.Function):
    """The op's derivative without the op's dispatch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        # three calls cost more than the indices of a small map
        y = _maxima(x) if x.numel() > 1 << 17 else reference.max_pool2x2(x)
        _setup(ctx, (x,), y)
        return y

    backward = staticmethod(_backward)


class _WindowAndPool(torch.autograd.Function):
    """Both of one map; no op, because an op's result may not be a view."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int, columns: int, mask: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        ctx.mask, ctx.size = mask, (rows, columns)
        # no gradient of zeros is made for what nobody read
        ctx.set_materialize_grads(False)
        return reference.crop_to(x, rows, columns), torch.ops.unet.max_pool2x2(x)

    @staticmethod
    def backward(ctx: Any, dwindow: Tensor | None, dpooled: Tensor | None) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if dpooled is None:
            dx = None if dwindow is None else reference.uncrop(dwindow, x.shape)
            dx = _aten.masked(dx, x) if dx is not None and ctx.mask else dx
        else:
            dx = _derivative(dpooled, x, dwindow, ctx.mask)
        return dx, None, None, None


def window_and_pool(x: Tensor, *, rows: int, columns: int, mask_dx: bool = False) -> tuple[Tensor, Tensor]:
    """The centred window of x, as a view, and `max_pool2x2(x)`: what a level of a U-Net hands on.

    Equals the two by themselves; the gradients of both are added up in one pass.

    Args:
        x: as for `max_pool2x2`.
        rows, columns: of the window, at most those of x.
        mask_dx: as of `conv3x3_relu`: a ReLU made x, and its mask is applied to x's gradient.

    Returns:
        ([N, C, rows, columns], [N, C, H // 2, W // 2]). Differentiable.

    Raises:
        TypeError, ValueError: as for `max_pool2x2`; the window is larger than x.
    """
    _expect_poolable(x)
    for name, size, most in (("rows", rows, x.shape[2]), ("columns", columns, x.shape[3])):
        if not 1 <= size <= most:
            raise ValueError(f"{name} must be between 1 and those of x, {most}, got {size}")
    if _checks.transformed() or torch.compiler.is_compiling():
        # a ReLU of a ReLU's result is itself, and masks in the derivative
        x = torch.relu(x) if mask_dx else x
        return reference.crop_to(x, rows, columns), max_pool2x2(x)
    return _WindowAndPool.apply(x, rows, columns, mask_dx)


def max_pool2x2(x: Tensor) -> Tensor:
    """Maximum of each 2x2 block.

    Equals `torch.nn.functional.max_pool2d(x, 2)`, strides included: an odd last row or column is left out, NaN passes
    through, and the gradient goes to the first of equal values.

    Args:
        x: [N, C, H, W], H and W at least 2; float32, float16, bfloat16 or float64.

    Returns:
        [N, C, H // 2, W // 2], dtype of x. Differentiable.

    Raises:
        TypeError: x is no tensor, or not floating.
        ValueError: x is not 4-D, or smaller than 2x2.

    >>> max_pool2x2(torch.tensor([[[[1.0, 2.0], [3.0, 0.0]]]]))
    tensor([[[[3.]]]])
    """
    _expect_poolable(x)
    if _checks.transformed():
        return reference.max_pool2x2(x)
    return (_OnCPU.apply if _choosing.ordinary_on_cpu(x) else _op)(x)


def _expect_poolable(x: Tensor) -> None:
    _checks.expect_float("x", x, "N, C, H, W")
    if x.shape[2] < 2 or x.shape[3] < 2:
        raise ValueError(f"x must have at least two rows and two columns, got {x.shape[2]}x{x.shape[3]}")
