"""2x2 max-pool with stride 2 that keeps its input and no indices.

    y[n, c, h, w] = max over a, b in {0, 1} of x[n, c, 2h + a, 2w + b]

torch keeps, besides x, which its neighbours need anyway, an int64 index for every output: 75 MB in the paper's net.
Here the backward finds the places again; ties and NaN go where torch sends them, because it is torch that looks.
"""

from typing import Any

import torch
from torch import Tensor

from . import _checks, reference

__all__ = ["max_pool2x2"]


@torch.library.custom_op("unet::max_pool2x2", mutates_args=())
def _op(x: Tensor) -> Tensor:
    return reference.max_pool2x2(x)


_op.register_fake(reference.max_pool2x2)


def _setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


@_checks.outside_autocast
def _backward(ctx: Any, dy: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    _, places = torch.ops.aten.max_pool2d_with_indices(x, [2, 2], [2, 2])
    return torch.ops.aten.max_pool2d_with_indices_backward(dy, x, [2, 2], [2, 2], [0, 0], [1, 1], False, places)


_op.register_autograd(_backward, setup_context=_setup)


class _OnCPU(torch.autograd.Function):
    """The op's derivative without the op's dispatch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = reference.max_pool2x2(x)
        _setup(ctx, (x,), y)
        return y

    backward = staticmethod(_backward)


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
    _checks.expect_float("x", x, "N, C, H, W")
    if x.shape[2] < 2 or x.shape[3] < 2:
        raise ValueError(f"x must have at least two rows and two columns, got {x.shape[2]}x{x.shape[3]}")
    if _checks.transformed():
        return reference.max_pool2x2(x)
    return (_OnCPU.apply if _checks.ordinary_on_cpu(x) else _op)(x)
