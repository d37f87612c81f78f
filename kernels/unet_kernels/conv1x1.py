"""1x1 convolution: at the end of the net, the logits of every pixel from its features.

    y[n, co, h, w] = bias[co] + sum_ci x[n, ci, h, w] weight[co, ci]

x [N, Ci, H, W], weight [Co, Ci, 1, 1] and y [N, Co, H, W] in any strides; channels_last is the fast one.
Bound by what is read: 2 FLOP a byte. In training the logits are better never made (`head_cross_entropy`).
One program makes BLOCK_N channels of BLOCK_P pixels, all sums in float32.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _aten, _checks, _choosing, _dweight, _layout, _triton, reference
from ._choosing import Question, Way
from ._triton import jit, tl

__all__ = ["conv1x1", "launch_conv1x1_dx", "launch_conv1x1_fwd", "question", "question_dx"]


@jit
def _fwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, bias_ptr, y_ptr,
    H, W, pixels, C_in, C_out,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_wo, stride_wi,
    stride_yn, stride_yc, stride_yh, stride_yw,
    PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    p = tl.minimum(i, pixels - 1)
    n, h, w = (p // W // H).to(tl.int64), (p // W % H).to(tl.int64), (p % W).to(tl.int64)
    co = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)  # [BLOCK_N]
    x_rows = x_ptr + (n * stride_xn + h * stride_xh + w * stride_xw)[:, None]
    w_rows = weight_ptr + (tl.minimum(co, C_out - 1) * stride_wo)[:, None]
    acc = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for k in range(tl.cdiv(C_in, BLOCK_K)):
        c = (k * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)  # [BLOCK_K]
        known = (c < C_in)[None, :]
        x = tl.load(x_rows + (c * stride_xc)[None, :], mask=known, other=0.0)
        weight = tl.load(w_rows + (c * stride_wi)[None, :], mask=known, other=0.0)
        acc = tl.dot(x, tl.trans(weight), acc, input_precision=PRECISION)
    acc += tl.load(bias_ptr + co, mask=co < C_out, other=0.0).to(tl.float32)[None, :]
    y_at = y_ptr + (n * stride_yn + h * stride_yh + w * stride_yw)[:, None] + (co * stride_yc)[None, :]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=(i < pixels)[:, None] & (co < C_out)[None, :])


def launch_conv1x1_fwd(x: Tensor, weight: Tensor, bias: Tensor, BLOCK_P: int = 128) -> Tensor:
    N, C_in, H, W = x.shape
    C_out = weight.shape[0]
    y = _layout.empty_convolved((N, C_out, H, W), weight, x)
    pixels = N * H * W
    if y.numel() == 0:
        return y
    BLOCK_N, BLOCK_K = (min(64, max(16, 1 << (c - 1).bit_length())) for c in (C_out, C_in))
    # one program per block of pixels, of channels
    with _triton.on_device(x):
        _fwd_kernel[(-(-pixels // BLOCK_P), -(-C_out // BLOCK_N))](
            x, weight, bias, y, H, W, pixels, C_in, C_out, *x.stride(), *weight.stride()[:2], *y.stride(),
            PRECISION=_triton.precision(x.dtype), BLOCK_P=BLOCK_P, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=4,
        )  # fmt: skip
    return y


@jit
def _dx_kernel(  # type: ignore[no-untyped-def]
    dy_ptr, weight_ptr, x_ptr, dx_ptr,
    H, W, pixels, C_in, C_out,
    stride_yn, stride_yc, stride_yh, stride_yw,
    stride_wo, stride_wi,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_dn, stride_dc, stride_dh, stride_dw,
    MASK: tl.constexpr, PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    p = tl.minimum(i, pixels - 1)
    n, h, w = (p // W // H).to(tl.int64), (p // W % H).to(tl.int64), (p % W).to(tl.int64)
    ci = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)  # [BLOCK_N]
    wanted = (ci < C_in)[None, :]
    y_rows = dy_ptr + (n * stride_yn + h * stride_yh + w * stride_yw)[:, None]
    w_columns = weight_ptr + (ci * stride_wi)[None, :]
    acc = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for k in range(tl.cdiv(C_out, BLOCK_K)):
        c = (k * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)  # [BLOCK_K]
        dy = tl.load(y_rows + (c * stride_yc)[None, :], mask=(c < C_out)[None, :], other=0.0)
        weight = tl.load(w_columns + (c * stride_wo)[:, None], mask=(c < C_out)[:, None] & wanted, other=0.0)
        acc = tl.dot(dy, weight, acc, input_precision=PRECISION)
    stored = (i < pixels)[:, None] & wanted
    if MASK:
        x_at = x_ptr + (n * stride_xn + h * stride_xh + w * stride_xw)[:, None] + (ci * stride_xc)[None, :]
        # not `x > 0`: a NaN lets its gradient through
        acc = tl.where(tl.load(x_at, mask=stored, other=0.0) <= 0, 0.0, acc)
    dx_at = dx_ptr + (n * stride_dn + h * stride_dh + w * stride_dw)[:, None] + (ci * stride_dc)[None, :]
    tl.store(dx_at, acc.to(dx_ptr.dtype.element_ty), mask=stored)


def launch_conv1x1_dx(dy: Tensor, weight: Tensor, x: Tensor, mask: bool, BLOCK_P: int = 128) -> Tensor:
    """dx in x's layout; with `mask` zero where x, then a ReLU's result, is."""
    N, C_in, H, W = x.shape
    C_out = dy.shape[1]
    dx = _layout.empty_as(x, dy.dtype)
    pixels = N * H * W
    if dx.numel() == 0:
        return dx
    BLOCK_N, BLOCK_K = (min(64, max(16, 1 << (c - 1).bit_length())) for c in (C_in, C_out))
    # one program per block of pixels, of channels
    with _triton.on_device(x):
        _dx_kernel[(-(-pixels // BLOCK_P), -(-C_in // BLOCK_N))](
            dy, weight, x, dx, H, W, pixels, C_in, C_out,
            *dy.stride(), *weight.stride()[:2], *x.stride(), *dx.stride(),
            MASK=mask, PRECISION=_triton.precision(x.dtype),
            BLOCK_P=BLOCK_P, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=4,
        )  # fmt: skip
    return dx


def question(x: Tensor, weight: Tensor, bias: Tensor) -> Question:
    def ways() -> list[Way]:
        found = [Way("ATen", reference.conv1x1, False)]
        if x.is_cuda and _layout.suggests_channels_last(x):
            found.append(Way("ATen, as a product", _product, False))
        for BLOCK_P in (128, 64):
            name = f"pointers, {BLOCK_P} pixels"
            found.append(Way(name, functools.partial(launch_conv1x1_fwd, BLOCK_P=BLOCK_P), True))
        return found

    def cut(arguments: tuple[Any, ...], lines: int) -> tuple[Any, ...]:
        return (arguments[0][:, :, :lines], *arguments[1:])

    pixels = _choosing.octave(x.shape[0] * x.shape[2] * x.shape[3])
    # a product follows a switch of its own
    of_products = ", products as tf32" if _triton.precision(x.dtype, of_products=True) == "tf32" else ""
    arithmetic = f"{_choosing.arithmetic(x.dtype)}{of_products}"
    case = f"{x.shape[1]} -> {weight.shape[0]}, {pixels}, {arithmetic}, {_layout.words(x)}"
    return Question("conv1x1", case, ways, reference.conv1x1, cut)


def _product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


@torch.library.custom_op("unet::conv1x1", mutates_args=())
@_checks.outside_autocast
def _op(x: Tensor, weight: Tensor, bias: Tensor, mask_dx: bool = False) -> Tensor:
    given = x, weight.to(x.dtype), bias.to(x.dtype)
    return _choosing.computed(question, _aten.through_float32(reference.conv1x1), given)


@_op.register_fake
@_checks.outside_autocast
def _(x: Tensor, weight: Tensor, bias: Tensor, mask_dx: bool = False) -> Tensor:
    # a fake whose body is the ATen composite gets the strides right
    return reference.conv1x1(x, weight.to(x.dtype), bias.to(x.dtype))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.mask = inputs
    ctx.save_for_backward(x, weight)


@_checks.outside_autocast
def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
    if not _choosing.derives(dy, x, weight):
        x = _aten.made_by_relu(x) if ctx.mask else x
        dx, *others = _aten.convolution_backward(dy, x, weight.to(dy.dtype), [for_x, for_weight, for_bias])
        dx = _aten.masked(dx, x) if dx is not None and ctx.mask else dx
        return dx, *(t if t is None else t.to(weight.dtype) for t in others), None
    dx = _checks.untraced(_dx_op, _dx, dy, weight, x, ctx.mask) if for_x else None
    return dx, *_dweight.of_parameters(dy, weight, x, None, for_weight, for_bias), None


def _dx_by_aten(dy: Tensor, weight: Tensor, x: Tensor, mask: bool) -> Tensor:
    dx = _aten.convolution_backward(dy, x, weight, [True, False, False])[0]
    assert dx is not None
    return _aten.masked(dx, x) if mask else dx


def question_dx(dy: Tensor, weight: Tensor, x: Tensor, mask: bool) -> Question:
    def ways() -> list[Way]:
        found = [Way("ATen", _dx_by_aten, False)]
        for BLOCK_P in (128, 64):
            name = f"pointers, {BLOCK_P} pixels"
            found.append(Way(name, functools.partial(launch_conv1x1_dx, BLOCK_P=BLOCK_P), True))
        return found

    def cut(arguments: tuple[Any, ...], lines: int) -> tuple[Any, ...]:
        dy, weight, x, mask = arguments
        return dy[:, :, :lines], weight, x[:, :, :lines], mask

    pixels = _choosing.octave(x.shape[0] * x.shape[2] * x.shape[3])
    said = f"{dy.shape[1]} -> {x.shape[1]}, {pixels}, {_choosing.arithmetic(dy.dtype)}, {_layout.words(dy, x)}"
    return Question("conv1x1_dx", said + (", masked" if mask else ""), ways, _dx_by_aten, cut, any_strides=True)


def _dx(dy: Tensor, weight: Tensor, x: Tensor, mask: bool) -> Tensor:
    dx = _choosing.computed(question_dx, _dx_by_aten, (dy, weight.to(dy.dtype), x, mask))
    return dx.contiguous(memory_format=_layout.of(x))


@torch.library.custom_op("unet::conv1x1_dx", mutates_args=())
def _dx_op(dy: Tensor, weight: Tensor, x: Tensor, mask: bool) -> Tensor:
    return _dx(dy, weight, x, mask)


@_dx_op.register_fake
def _(dy: Tensor, weight: Tensor, x: Tensor, mask: bool) -> Tensor:
    return _layout.empty_as(x, dy.dtype)


_op.register_autograd(_backward, setup_context=_setup)


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor, *, mask_dx: bool = False) -> Tensor:
    """1x1 convolution with bias.

    Equals `torch.nn.functional.conv2d(x, weight, bias)`, strides of the result included. Under autocast the arguments
    are cast to its dtype.

    Args:
        x: [N, C_in, H, W]; float32, float16, bfloat16 or float64.
        weight: [C_out, C_in, 1, 1], dtype and device of x.
        bias: [C_out], likewise.
        mask_dx: as of `conv3x3_relu`: a ReLU made x, and its mask is applied to x's gradient.

    Returns:
        [N, C_out, H, W], dtype of x. Differentiable in x, weight and bias.

    Raises:
        TypeError: an argument is no tensor, or its dtype is not floating or differs from x's.
        ValueError: a shape or device does not fit.

    >>> conv1x1(torch.zeros(1, 64, 388, 388), torch.zeros(2, 64, 1, 1), torch.zeros(2)).shape
    torch.Size([1, 2, 388, 388])
    """
    _checks.expect_float("x", x, "N, C_in, H, W")
    _checks.expect_float("weight", weight, "C_out, C_in, 1, 1")
    _checks.expect_size("weight", weight, (-1, x.shape[1], 1, 1), "(C_in is the channels of x)")
    if weight.numel() < 1:
        raise ValueError(f"weight must have at least one channel in and out, got {list(weight.shape)}")
    _checks.expect_float("bias", bias, "C_out")
    _checks.expect_size("bias", bias, (weight.shape[0],), "(one per output channel of weight)")
    (x,) = _checks.autocast(x)
    weight, bias = _choosing.parameters(x, weight, bias)
    if mask_dx and not _checks.transformed():
        return _op(x, weight, bias, mask_dx)
    if _checks.transformed() or (_choosing.ordinary_on_cpu(x) and not _aten.is_narrow(x)):
        return reference.conv1x1(x, weight, bias)
    return _op(x, weight, bias)
