"""Unpadded 3x3 convolution, bias and ReLU; and the same over a concatenation that is never stored.

    y[n, co, h, w] = relu(bias[co] + sum_{ci, r, s} x[n, ci, h + r, w + s] weight[co, ci, r, s])

x [N, Ci, H, W], weight [Co, Ci, 3, 3] and y [N, Co, H - 2, W - 2] in any strides; channels_last is the fast one.
Backward keeps x, weight and y: relu'(z) = [not (y <= 0)], and y is the next layer's input anyway, so the ReLU costs no
memory. `not (y <= 0)` rather than `y > 0`, so that a NaN in y lets its gradient through as torch does.
For the concatenation it keeps up and skip, and derives by each of them alone.
Derivation: docs/mathematics.md, section 2.

On CUDA forward, dx (`_conv3x3_dx`) and dweight (`_dweight`) are each the fastest of our kernels and ATen's ways, as
measured there (`_choosing`).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _aten, _checks, _choosing, _conv3x3_cpu, _conv3x3_dx, _dweight, reference
from ._choosing import Question, Way
from ._conv3x3_fwd import Blocks, case_of, launch_conv3x3_fwd, ours
from .bias_relu import launch_bias_relu_

__all__ = ["conv3x3_relu", "conv3x3_relu_cat", "expect_convolvable", "question", "question_cat"]


# the ways there are


def question(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Question:
    def ways() -> list[Way]:
        found = [Way("ATen", reference.conv3x3_relu, False)]
        if x.is_cuda:
            found.append(Way("ATen, bias and ReLU in one pass", _aten_in_two, False))
        if x.is_cuda and relu:
            found.append(Way("cuDNN, fused", _cudnn_fused, False))
        for blocks in ours(x, weight):
            found.append(Way(str(blocks), functools.partial(launch_conv3x3_fwd, blocks=blocks), True))
        return found

    def cut(arguments: tuple[Any, ...], lines: int) -> tuple[Any, ...]:
        return (arguments[0][:, :, :lines], *arguments[1:])

    return Question("conv3x3_relu", case_of([x], weight, relu), ways, reference.conv3x3_relu, cut)


def _aten_in_two(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    return launch_bias_relu_(torch.nn.functional.conv2d(x, weight), bias, relu)


def _cudnn_fused(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    return torch.cudnn_convolution_relu(x, weight, bias, [1, 1], [0, 0], [1, 1], 1)


def question_cat(up: Tensor, skip: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Question:
    # a window is left as it is: a fake tensor on a device that is not here cannot be cut
    window = skip if skip.shape[2:] == up.shape[2:] else reference.crop_to(skip, up.shape[2], up.shape[3])

    def ways() -> list[Way]:
        found = [Way("ATen", reference.conv3x3_relu_cat, False)]
        for blocks in ours(up, weight, window):
            found.append(Way(str(blocks), functools.partial(_launch_cat, blocks=blocks), True))
        return found

    def cut(arguments: tuple[Any, ...], lines: int) -> tuple[Any, ...]:
        up, skip, *rest = arguments
        return (up[:, :, :lines], reference.crop_to(skip, up.shape[2], up.shape[3])[:, :, :lines], *rest)

    return Question("conv3x3_relu_cat", case_of([up, window], weight, relu), ways, reference.conv3x3_relu_cat, cut)


def _launch_cat(up: Tensor, skip: Tensor, weight: Tensor, bias: Tensor, relu: bool, blocks: Blocks) -> Tensor:
    return launch_conv3x3_fwd(up, weight, bias, relu, blocks, reference.crop_to(skip, up.shape[2], up.shape[3]))


_plain = _aten.through_float32(reference.conv3x3_relu)


def _plain_cat(up: Tensor, skip: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    return _plain(reference.crop_concat(up, skip), weight, bias, relu)


# the operators


def _as_wide_as(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Both in x's dtype: under autocast they come in their own, so that their gradients are not rounded to x's."""
    return weight.to(x.dtype), bias.to(x.dtype)


@torch.library.custom_op("unet::conv3x3_relu", mutates_args=())
@_checks.outside_autocast
def _op(x: Tensor, weight: Tensor, bias: Tensor, relu: bool, dy_masked: bool = False, mask_dx: bool = False) -> Tensor:
    return _choosing.computed(question, _plain, (x, *_as_wide_as(x, weight, bias), relu))


@_op.register_fake
@_checks.outside_autocast
def _(x: Tensor, weight: Tensor, bias: Tensor, relu: bool, dy_masked: bool = False, mask_dx: bool = False) -> Tensor:
    # a fake whose body is the ATen composite gets the strides right
    return reference.conv3x3_relu(x, *_as_wide_as(x, weight, bias), relu)


@torch.library.custom_op("unet::conv3x3_relu_cat", mutates_args=())
@_checks.outside_autocast
def _cat_op(up: Tensor, skip: Tensor, weight: Tensor, bias: Tensor, relu: bool, dy_masked: bool = False) -> Tensor:
    return _choosing.computed(question_cat, _plain_cat, (up, skip, *_as_wide_as(up, weight, bias), relu))


@_cat_op.register_fake
@_checks.outside_autocast
def _(up: Tensor, skip: Tensor, weight: Tensor, bias: Tensor, relu: bool, dy_masked: bool = False) -> Tensor:
    return reference.conv3x3_relu_cat(up, skip, *_as_wide_as(up, weight, bias), relu)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *given, ctx.mask = inputs
    _cat_setup(ctx, tuple(given), output)


def _cat_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *maps, weight, _, relu, dy_masked = inputs
    # whoever has masked dy has seen y
    ctx.relu = relu and not dy_masked
    ctx.save_for_backward(*maps, weight, *([output] if ctx.relu else []))


def _dz(ctx: Any, dy: Tensor, y: list[Tensor]) -> Tensor:
    """dy back through the ReLU."""
    return _aten.masked(dy, y[0]) if ctx.relu else dy


def _derivatives(dz: Tensor, x: Tensor, weight: Tensor, needs: list[bool], mask: bool) -> Any:
    """(dx, dweight, dbias) of the convolution of x, by ATen or what a CPU does better."""
    of_device = _conv3x3_cpu.derivatives if x.device.type == "cpu" else _aten.convolution_backward
    x = _aten.made_by_relu(x) if mask else x
    dx, *others = of_device(dz, x, weight.to(x.dtype), needs)
    dx = _aten.masked(dx, x) if mask and needs[0] else dx
    return dx, *(t if t is None else t.to(weight.dtype) for t in others)


@_checks.outside_autocast
def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, *y = ctx.saved_tensors
    for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
    dz, nothing = _dz(ctx, dy, y), (None, None, None)
    if not _choosing.derives(dz, x, weight):
        return *_derivatives(dz, x, weight, [for_x, for_weight, for_bias], ctx.mask), *nothing
    dx = _conv3x3_dx.dx(dz, weight, x, mask=ctx.mask) if for_x else None
    return dx, *_dweight.of_parameters(dz, weight, x, None, for_weight, for_bias), *nothing


@_checks.outside_autocast
def _cat_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    up, skip, weight, *y = ctx.saved_tensors
    for_up, for_skip, for_weight, for_bias = ctx.needs_input_grad[:4]
    dz, channels, nothing = _dz(ctx, dy, y), up.shape[1], (None, None)
    # one map after the other: neither the concatenation nor its gradient is ever made
    window = reference.crop_to(skip, up.shape[2], up.shape[3])
    if _choosing.derives(dz, up, skip, weight):
        dup = _conv3x3_dx.dx(dz, weight, up) if for_up else None
        dwindow = _conv3x3_dx.dx(dz, weight, window, first=channels) if for_skip else None
        dweight, dbias = _dweight.of_parameters(dz, weight, up, window, for_weight, for_bias)
    else:
        dup, dweight, dbias = _derivatives(dz, up, weight[:, :channels], [for_up, for_weight, for_bias], False)
        dwindow, of_skip, _ = _derivatives(dz, window, weight[:, channels:], [for_skip, for_weight, False], False)
        dweight = torch.cat([dweight, of_skip], 1) if for_weight else None
    dskip = reference.uncrop(dwindow, skip.shape) if dwindow is not None else None
    return dup, dskip, dweight, dbias, *nothing


_op.register_autograd(_backward, setup_context=_setup)
_cat_op.register_autograd(_cat_backward, setup_context=_cat_setup)


class _OnCPU(torch.autograd.Function):
    """The op's derivative without the op's dispatch."""

    @staticmethod
    @_checks.outside_autocast
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y = _conv3x3_cpu.conv3x3_relu(*inputs[:4])
        # called here: autograd's own hook for it binds signatures, which costs more than a small convolution
        _setup(ctx, inputs, y)
        return y

    backward = staticmethod(_backward)


def _by_aten(x: Tensor, weight: Tensor, bias: Tensor, relu: bool, *_: bool) -> Tensor:
    return reference.conv3x3_relu(x, weight, bias, relu)


class _CatOnCPU(torch.autograd.Function):
    """Likewise."""

    @staticmethod
    @_checks.outside_autocast
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y = _plain_cat(*inputs[:5])
        _cat_setup(ctx, inputs, y)
        return y

    backward = staticmethod(_cat_backward)


def conv3x3_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    relu: bool = True,
    mask_dx: bool = False,
    dy_masked: bool = False,
) -> Tensor:
    """Valid 3x3 convolution with bias and ReLU, in one operation.

    Equals `torch.relu(torch.nn.functional.conv2d(x, weight, bias))`, strides of the result included. NaN passes
    through, forward and backward. Under autocast the arguments are cast to its dtype.

    Args:
        x: [N, C_in, H, W], H and W at least 3; float32, float16, bfloat16 or float64.
        weight: [C_out, C_in, 3, 3], dtype and device of x.
        bias: [C_out], likewise.
        relu: False leaves the ReLU out.
        mask_dx: a ReLU made x, and x's gradient is handed back with that ReLU's mask applied: zero where x is not
            above zero. No pass of its own is needed for it.
        dy_masked: all that read the result promise `mask_dx`. The ReLU's derivative is then theirs, and the result is
            not kept for it. With one reader that does not, gradients are wrong.

    Returns:
        [N, C_out, H - 2, W - 2], dtype of x. Differentiable in x, weight and bias.

    Raises:
        TypeError: an argument is no tensor, or its dtype is not floating or differs from x's.
        ValueError: a shape or device does not fit.

    >>> y = conv3x3_relu(torch.zeros(1, 1, 572, 572), torch.zeros(64, 1, 3, 3), torch.zeros(64))
    >>> y.shape
    torch.Size([1, 64, 570, 570])
    """
    x, weight, bias = expect_convolvable(x, weight, bias, may_be_wide=True)
    if _checks.transformed():
        return reference.conv3x3_relu(x, weight, bias, relu)
    call: Callable[..., Tensor] = _op
    if _choosing.ordinary_on_cpu(x) and not (mask_dx or dy_masked):
        # ATen's own autograd keeps the same three tensors; ours is for the layers where its weight gradient is slow
        call = _OnCPU.apply if _conv3x3_cpu.has_a_better_derivative(x, weight) else _by_aten
    return _with_relu(call, (x, weight, bias), bool(relu), dy_masked, mask_dx)


def conv3x3_relu_cat(
    up: Tensor,
    skip: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    relu: bool = True,
    dy_masked: bool = False,
) -> Tensor:
    """`conv3x3_relu(crop_concat(up, skip), weight, bias)`, the concatenation never kept.

    Args:
        up: [N, C_up, H, W], H and W at least 3: the map from below.
        skip: [N, C_skip, at least H, at least W]: its centred window is read where it lies. Pass the window itself
            (a view) where the rest of the map is not needed, and the rest is not kept alive.
        weight: [C_out, C_up + C_skip, 3, 3]; the first C_up input channels belong to up.
        bias: [C_out].
        relu: False leaves the ReLU out.
        dy_masked: as of `conv3x3_relu`.

    Returns:
        [N, C_out, H - 2, W - 2]. Differentiable in up, skip, weight and bias; skip's gradient is zero outside the
        window.

    Raises:
        TypeError: an argument is no tensor, or its dtype is not floating or differs from up's.
        ValueError: a shape or device does not fit.
    """
    _checks.expect_cover(up, skip)
    if up.shape[1] < 1:
        raise ValueError(f"up must have at least one channel, got {list(up.shape)}")
    _expect_parameters(weight, bias, up.shape[1] + skip.shape[1], "the channels of up and skip together")
    _expect_room("up", up)
    up, skip = _checks.autocast(up, skip)
    weight, bias = _choosing.parameters(up, weight, bias, "up")
    _checks.expect_like("skip", skip, "up", up)
    if _checks.transformed():
        return reference.conv3x3_relu_cat(up, skip, weight, bias, relu)
    ordinary = _choosing.ordinary_on_cpu(up) and not dy_masked
    call = _CatOnCPU.apply if ordinary else _cat_op
    return _with_relu(call, (up, skip, weight, bias), bool(relu), dy_masked)


def _with_relu(
    call: Callable[..., Tensor], tensors: tuple[Tensor, ...], relu: bool, dy_masked: bool, *how: bool
) -> Tensor:
    """call(*tensors, relu, dy_masked, *how); where a ReLU's derivative will be wanted, as two steps of autograd.

    A step holds its incoming gradient and all that it has saved until it returns. As a step of its own the ReLU lets
    go of y and of the unmasked gradient before the convolution makes the next ones: 42 MB at the peak of the paper's
    net, whose largest maps are these.
    """
    if relu and not dy_masked and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return call(*tensors, False, False, *how).relu_()
    return call(*tensors, relu, dy_masked, *how)


def expect_convolvable(x: Tensor, weight: Tensor, bias: Tensor, may_be_wide: bool = False) -> tuple[Tensor, ...]:
    """The three that fit each other, as autocast would have them; the parameters, if they may be, of their own width.

    Raises:
        TypeError, ValueError: as for `conv3x3_relu`.
    """
    _checks.expect_float("x", x, "N, C_in, H, W")
    _expect_parameters(weight, bias, x.shape[1], "the channels of x")
    _expect_room("x", x)
    if may_be_wide:
        (x,) = _checks.autocast(x)
        return x, *_choosing.parameters(x, weight, bias)
    x, weight, bias = _checks.autocast(x, weight, bias)
    _checks.expect_like("weight", weight, "x", x)
    _checks.expect_like("bias", bias, "x", x)
    return x, weight, bias


def _expect_parameters(weight: Tensor, bias: Tensor, channels: int, whose: str) -> None:
    _checks.expect_float("weight", weight, "C_out, C_in, 3, 3")
    _checks.expect_size("weight", weight, (-1, channels, 3, 3), f"(C_in is {whose})")
    if weight.shape[0] < 1 or channels < 1:
        raise ValueError(f"weight must have at least one channel in and out, got {list(weight.shape)}")
    _checks.expect_float("bias", bias, "C_out")
    _checks.expect_size("bias", bias, (weight.shape[0],), "(one per output channel of weight)")


def _expect_room(name: str, x: Tensor) -> None:
    if x.shape[2] < 3 or x.shape[3] < 3:
        raise ValueError(f"{name} must be at least 3x3 for a valid 3x3 convolution, got {x.shape[2]}x{x.shape[3]}")
