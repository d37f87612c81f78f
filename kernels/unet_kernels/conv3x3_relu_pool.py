"""3x3 convolution, bias and ReLU whose result is wanted twice: a window of it, and its 2x2 maxima.

    y = conv3x3_relu(x, weight, bias)        window = the centre of y        pooled = max_pool2x2(y)

Where no gradient is wanted nothing else of y is needed, and one pass can make both: y is written only in the window
and never read again. Which is faster, one pass or two, is measured (`_choosing`): one takes its pixels in another
order, each by its address, and two have the fastest convolution there is.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from . import _checks, _choosing, _layout, _triton, reference
from ._choosing import Question, Way
from ._conv3x3_fwd import case_of, launch_conv3x3_pool_fwd, makes_maxima, ours
from .conv3x3_relu import conv3x3_relu, expect_convolvable
from .max_pool2x2 import max_pool2x2

__all__ = ["conv3x3_relu_pool", "one_pass_pays", "question"]


def question(x: Tensor, weight: Tensor, bias: Tensor, relu: bool, rows: int, columns: int) -> Question:
    def ways() -> list[Way]:
        found = [Way("apart", _apart, False)]
        for blocks in ours(x, weight):
            if makes_maxima(blocks, x.dtype):
                found.append(Way(str(blocks), functools.partial(launch_conv3x3_pool_fwd, blocks=blocks), True))
        return found

    def cut(arguments: tuple[Any, ...], lines: int) -> tuple[Any, ...]:
        x, weight, bias, relu, rows, columns = arguments
        return x[:, :, :lines], weight, bias, relu, min(rows, lines - 2), columns

    case = f"{case_of([x], weight, relu)}, window {rows * columns / ((x.shape[2] - 2) * (x.shape[3] - 2)):.1f}"
    # the op gives both in one layout, whoever made them
    return Question("conv3x3_relu_pool", case, ways, reference.conv3x3_relu_pool, cut, any_strides=True)


@torch.library.custom_op("unet::conv3x3_relu_pool", mutates_args=())
@_checks.outside_autocast
def _op(x: Tensor, weight: Tensor, bias: Tensor, relu: bool, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    y, pooled = _choosing.computed(question, reference.conv3x3_relu_pool, (x, weight, bias, relu, rows, columns))
    # one layout, whoever made it; nothing is copied that has it
    return tuple(t.contiguous(memory_format=torch.channels_last) for t in (y, pooled))


@_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, relu: bool, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    N, _, H, W = x.shape
    C_out = weight.shape[0]
    y = _layout.empty_channels_last((N, C_out, rows, columns), x)
    return y, _layout.empty_channels_last((N, C_out, (H - 2) // 2, (W - 2) // 2), x)


def conv3x3_relu_pool(
    x: Tensor, weight: Tensor, bias: Tensor, *, rows: int, columns: int, relu: bool = True
) -> tuple[Tensor, Tensor]:
    """`y = conv3x3_relu(x, weight, bias)`: the centred window of y, and the 2x2 maxima of all of y.

    What a contracting level hands on: the window to the expanding path, the maxima to the next level. Where it is the
    faster way (on CUDA, no gradient wanted) both come out of one pass and y itself is never stored; elsewhere they are
    a view of y and `max_pool2x2(y)`.

    Args:
        x, weight, bias, relu: as for `conv3x3_relu`.
        rows, columns: of the window, at most those of y.

    Returns:
        ([N, C_out, rows, columns], [N, C_out, (H - 2) // 2, (W - 2) // 2]). Differentiable in x, weight and bias.

    Raises:
        TypeError: as for `conv3x3_relu`.
        ValueError: as for `conv3x3_relu`; the window is larger than y, or y smaller than 2x2.
    """
    x, weight, bias = expect_convolvable(x, weight, bias)
    if x.shape[2] < 4 or x.shape[3] < 4:
        raise ValueError(f"x must be at least 4x4, so that y has two rows and columns, got {x.shape[2]}x{x.shape[3]}")
    for name, size, most in (("rows", rows, x.shape[2] - 2), ("columns", columns, x.shape[3] - 2)):
        if not 1 <= size <= most:
            raise ValueError(f"{name} must be between 1 and those of y, {most}, got {size}")
    if one_pass_pays(x, weight, bias, rows=rows, columns=columns, relu=relu):
        return _op(x, weight, bias, relu, rows, columns)
    return _apart(x, weight, bias, relu, rows, columns)


def _apart(x: Tensor, weight: Tensor, bias: Tensor, relu: bool, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    y = conv3x3_relu(x, weight, bias, relu=relu)
    return reference.crop_to(y, rows, columns), max_pool2x2(y)


def one_pass_pays(x: Tensor, weight: Tensor, bias: Tensor, *, rows: int, columns: int, relu: bool = True) -> bool:
    """Whether `conv3x3_relu_pool` of these would take one pass.

    Whoever takes two by himself can let go of x between them, which a function cannot do for its caller.
    """
    tensors = (x, weight, bias)
    wants_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if wants_gradient or _checks.transformed() or torch.compiler.is_compiling() or type(x) is not Tensor:
        return False
    # as `conv3x3_relu_pool` will have them
    x, weight, bias = _checks.autocast(x, weight, bias)
    if not _choosing.asked(x.device) or _triton.why_no_dot(x.device, x.dtype) or x.shape[0] == 0:
        return False
    return not _choosing.why_too_large(x) and _decided(x, weight, bias, relu, rows, columns)


@_checks.outside_autocast
def _decided(*arguments: Any) -> bool:
    return _choosing.decide(question(*arguments), arguments[0].device, arguments).ours
