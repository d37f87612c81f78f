"""Softmax cross-entropy with a weight per pixel (Eq. 1 with its minus sign), from logits or from the last features.

    l[n, h, w] = pixel_weight[n, h, w] weight[t] (logsumexp_k z[n, k, h, w] - z[n, t, h, w]),   t = target[n, h, w]

z [N, K, H, W], target and pixel_weight [N, H, W]; all arithmetic in float32 (float64 for float64 logits).
Backward keeps what came in: dz = (softmax(z) - onehot(t)) x the pixel's share of the loss. `head_cross_entropy` also
makes z, by a 1x1 convolution, and makes it again in the backward instead of keeping it.
Derivation: docs/mathematics.md, section 4.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks, reference

__all__ = ["REDUCTIONS", "head_cross_entropy", "weighted_cross_entropy"]

REDUCTIONS = ("none", "sum", "mean", "weighted_mean")


@torch.library.custom_op("unet::weighted_cross_entropy", mutates_args=())
@_checks.outside_autocast
def _op(
    logits: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    _expect_classes(target, logits.shape[1], ignore_index)
    return reference.weighted_cross_entropy(logits, target, pixel_weight, weight, ignore_index, reduction)


_op.register_fake(_checks.outside_autocast(reference.weighted_cross_entropy))


@torch.library.custom_op("unet::head_cross_entropy", mutates_args=())
@_checks.outside_autocast
def _head_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    _expect_classes(target, weight.shape[0], ignore_index)
    return reference.head_cross_entropy(x, weight, bias, target, pixel_weight, class_weight, ignore_index, reduction)


_head_op.register_fake(_checks.outside_autocast(reference.head_cross_entropy))


def _expect_classes(target: Tensor, classes: int, ignore_index: int) -> None:
    # on a GPU this would wait for it; there the gather's own device assertion speaks
    if target.device.type != "cpu" or target.numel() == 0:
        return
    low, high = target.long().aminmax()
    if low >= 0 and high < classes:
        return
    # some pixel is no class: ignored, or wrong
    low, high = reference.chosen(target, ignore_index)[1].aminmax()
    if low < 0 or high >= classes:
        wrong = int(low if low < 0 else high)
        raise ValueError(
            f"target must hold class ids 0 to {classes - 1} (one per channel of logits) or ignore_index "
            f"{ignore_index}, got {wrong}"
        )


def _logits_gradient(ctx: Any, dloss: Tensor, logits: Tensor, of_loss: Sequence[Any]) -> Tensor:
    target, pixel_weight, weight = of_loss
    ignore_index, reduction = ctx.ignore_index, ctx.reduction
    wide = reference.at_least_float32(logits)
    valid, index = reference.chosen(target, ignore_index)
    class_factor, share = reference.pixel_factors(wide, valid, index, pixel_weight, weight)
    if reduction in ("mean", "weighted_mean"):
        share = reference.over(share, (class_factor if reduction == "mean" else share).sum())
    share = (share * dloss).unsqueeze(1)
    dlogits = (F.softmax(wide, dim=1) * share).scatter_add_(1, index, -share)
    return dlogits.to(logits.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.ignore_index, ctx.reduction = inputs
    ctx.save_for_backward(*tensors)


@_checks.outside_autocast
def _backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
    dlogits = None
    if ctx.needs_input_grad[0]:
        logits, *of_loss = ctx.saved_tensors
        dlogits = _logits_gradient(ctx, dloss, logits, of_loss)
    return dlogits, None, None, None, None, None


@_checks.outside_autocast
def _head_backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, *of_loss = ctx.saved_tensors
    logits = F.conv2d(x, weight, bias)
    dlogits = _logits_gradient(ctx, dloss, logits, of_loss)
    needs = list(ctx.needs_input_grad[:3])
    gradients = torch.ops.aten.convolution_backward(
        dlogits, x, weight, [weight.shape[0]], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, needs
    )
    return (*gradients, None, None, None, None, None)


_op.register_autograd(_backward, setup_context=_setup)
_head_op.register_autograd(_head_backward, setup_context=_setup)


def weighted_cross_entropy(
    logits: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Softmax cross-entropy, each pixel weighted: Eq. 1 of Ronneberger et al. 2015, with its minus sign.

    Args:
        logits: [N, K, H, W]; float32, float16, bfloat16 or float64.
        target: [N, H, W], any integer dtype or bool: class ids 0 to K - 1, or ignore_index.
        pixel_weight: [N, H, W], floating, or None for 1 everywhere. It gets no gradient.
        weight: [K], floating, one factor per class as in torch's cross_entropy, or None.
        ignore_index: pixels with this target weigh nothing.
        reduction: "none": [N, H, W], 0 where ignored. "sum": the paper's. "mean": torch's, the sum over the sum of
            weight[target] over valid pixels (their number when weight is None), pixel_weight never in the
            denominator. "weighted_mean": the sum over the sum of pixel_weight * weight[target].

    Returns:
        The loss in float32 (float64 for float64 logits); 0 where there is no valid pixel. Differentiable in logits.
        On a CPU a class id out of range is a ValueError; on a GPU it is CUDA's device assertion, as in torch.

    Raises:
        TypeError: an argument is no tensor, or has the wrong kind of dtype.
        ValueError: a shape, a device, a class id or the reduction does not fit.

    >>> logits = torch.tensor([0.0, 0.0]).view(1, 2, 1, 1)
    >>> round(weighted_cross_entropy(logits, torch.zeros(1, 1, 1, dtype=torch.int64)).item(), 4)
    0.6931
    """
    _checks.expect_float("logits", logits, "N, K, H, W")
    ignore_index = _checks.expect_whole("ignore_index", ignore_index)
    _expect_loss_arguments(target, pixel_weight, "weight", weight, reduction, "logits", logits)
    if weight is not None:
        _checks.expect_size("weight", weight, (logits.shape[1],), "(one per class, K channels of logits)")
    logits = _checks.autocast_to_float32(logits)
    if _checks.transformed():
        return reference.weighted_cross_entropy(logits, target, pixel_weight, weight, ignore_index, reduction)
    if _checks.ordinary_on_cpu(logits):
        # ATen's own derivative, which keeps the softmax's logarithm and so needs no second one
        _expect_classes(target, logits.shape[1], ignore_index)
        return reference.weighted_cross_entropy(logits, target, pixel_weight, weight, ignore_index, reduction)
    return _op(logits, target, pixel_weight, weight, ignore_index, reduction)


def head_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """`weighted_cross_entropy(conv2d(x, weight, bias), target, pixel_weight, weight=class_weight, ...)`.

    The logits are not kept for the backward. Under autocast x, weight and bias are cast to its dtype; the loss is
    computed in float32 all the same.

    Args:
        x: [N, C, H, W], the last features; float32, float16, bfloat16 or float64.
        weight: [K, C, 1, 1], dtype and device of x.
        bias: [K], likewise.
        target: [N, H, W], any integer dtype or bool: class ids 0 to K - 1, or ignore_index.
        pixel_weight: [N, H, W], floating, or None.
        class_weight: [K], floating, or None.
        ignore_index: pixels with this target weigh nothing.
        reduction: as in `weighted_cross_entropy`.

    Returns:
        The loss in float32 (float64 for float64 features). Differentiable in x, weight and bias.

    Raises:
        TypeError: an argument is no tensor, or has the wrong kind of dtype.
        ValueError: a shape, a device, a class id or the reduction does not fit.
    """
    _checks.expect_float("x", x, "N, C, H, W")
    _checks.expect_float("weight", weight, "K, C, 1, 1")
    _checks.expect_size("weight", weight, (-1, x.shape[1], 1, 1), "(C is the channels of x)")
    _checks.expect_float("bias", bias, "K")
    _checks.expect_size("bias", bias, (weight.shape[0],), "(one per class, K rows of weight)")
    ignore_index = _checks.expect_whole("ignore_index", ignore_index)
    _expect_loss_arguments(target, pixel_weight, "class_weight", class_weight, reduction, "x", x)
    if class_weight is not None:
        _checks.expect_size("class_weight", class_weight, (weight.shape[0],), "(one per class, K rows of weight)")
    x, weight, bias = _checks.autocast(x, weight, bias)
    _checks.expect_like("weight", weight, "x", x)
    _checks.expect_like("bias", bias, "x", x)
    arguments = (x, weight, bias, target, pixel_weight, class_weight, ignore_index, reduction)
    return reference.head_cross_entropy(*arguments) if _checks.transformed() else _head_op(*arguments)


def _expect_loss_arguments(
    target: Tensor,
    pixel_weight: Tensor | None,
    class_weight_name: str,
    class_weight: Tensor | None,
    reduction: str,
    maps_name: str,
    maps: Tensor,
) -> None:
    _checks.expect_choice("reduction", reduction, REDUCTIONS)
    size = (maps.shape[0], *maps.shape[2:])
    # a bool too: `cut_gap(instances) > 0` is a target
    _checks.expect_tensor("target", target, "N, H, W", (*_checks.INTEGERS, torch.bool), "an integer tensor")
    _checks.expect_size("target", target, size, f"(N, H, W of {maps_name})")
    _checks.expect_device("target", target, maps_name, maps)
    if pixel_weight is not None:
        _checks.expect_float("pixel_weight", pixel_weight, "N, H, W")
        _checks.expect_size("pixel_weight", pixel_weight, size, f"(N, H, W of {maps_name})")
        _checks.expect_device("pixel_weight", pixel_weight, maps_name, maps)
    if class_weight is not None:
        _checks.expect_float(class_weight_name, class_weight, "K")
        _checks.expect_device(class_weight_name, class_weight, maps_name, maps)
