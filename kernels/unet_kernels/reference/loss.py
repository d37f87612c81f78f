"""Weighted softmax cross-entropy, Eq. 1: docs/mathematics.md, section 4."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "at_least_float32",
    "chosen",
    "denominator",
    "head_cross_entropy",
    "over",
    "pixel_factors",
    "weighted_cross_entropy",
]


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
    logits, target = at_least_float32(logits), target.long()
    # summed by us: torch's own sum on a GPU adds in whatever order its blocks finish
    class_weight = None if weight is None else weight.to(logits.dtype)
    loss = F.cross_entropy(logits, target, class_weight, ignore_index=ignore_index, reduction="none")
    if pixel_weight is not None:
        # not by a product alone: the weight of an ignored pixel may be NaN
        loss = torch.where(target != ignore_index, loss * pixel_weight.detach().to(logits.dtype), 0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return over(loss.sum(), denominator(logits, target, pixel_weight, weight, ignore_index, reduction))


def denominator(
    logits: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """What a reduction divides by, a scalar in the loss's dtype: 1 for "none" and "sum", 0 without a valid pixel."""
    wide = at_least_float32(logits[:0])
    if reduction in ("none", "sum"):
        return wide.new_ones(())
    class_factor, factor = pixel_factors(wide, *chosen(target, ignore_index), pixel_weight, weight)
    return (class_factor if reduction == "mean" else factor).sum()


def chosen(target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(which pixels count [N, H, W], the class of each [N, 1, H, W], 0 where it does not count)."""
    # wide before it is compared: to a uint8 map, -100 is 156
    target = target.long()
    valid = target != ignore_index
    return valid, torch.where(valid, target, 0).unsqueeze(1)


def pixel_factors(
    logits: Tensor, valid: Tensor, index: Tensor, pixel_weight: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(class factor, class factor times pixel weight), both [N, H, W] and 0 where a pixel is ignored."""
    class_factor = valid.to(logits.dtype)
    if weight is not None:
        class_factor = torch.where(valid, weight.to(logits.dtype)[index.squeeze(1)], 0)
    if pixel_weight is None:
        return class_factor, class_factor
    return class_factor, torch.where(valid, class_factor * pixel_weight.detach().to(logits.dtype), 0)


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
