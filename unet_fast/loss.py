"""The paper's loss as a module: Eq. 1 weighted by Eq. 2, which is made on the fly from the cells' ids."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import unet_kernels

from .sending import sent

__all__ = ["VARIANTS", "BorderWeightedCrossEntropy"]

# weight maps that were published: the paper's; the constants of Freiburg's later code (2019), whose background fades to
# a tenth away from cells; Eq. 2 read to the letter, with its term inside cells too
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "freiburg-2019": {"w0": 50.0, "sigma_px": 6.0, "fade": (0.1, 10.0)},
    "all-pixels": {"region": "all"},
}


class BorderWeightedCrossEntropy(nn.Module):
    """Softmax cross-entropy whose weight is w_c + w0 exp(-(d1 + d2)^2 / (2 sigma^2)) (Ronneberger et al. 2015).

    Args:
        w0: height of the border term; 0 leaves it out.
        sigma_px: its width in pixels.
        class_weight: w_c, one number per class, background first (`unet_fast.class_balance`); None is 1 for all.
        region: where the border term applies, "background" or "all" (`unet_kernels.border_weight`).
        gap: the background is that of `cut_gap(instances)`; False where a given target has no gap between cells.
        fade: (v, sigma in pixels): the background's w_c is multiplied by v + (1 - v) exp(-d1^2 / (2 sigma^2)), which
            is 1 at a cell and v far from all; None leaves it.
        reduction: as in `unet_kernels.weighted_cross_entropy`: "mean" divides by the number of pixels, never by the
            weights; "sum" is the paper's.

    >>> ids = torch.tensor([[[1, 1, 0, 2, 2]]])
    >>> round(BorderWeightedCrossEntropy()(torch.zeros(1, 2, 1, 5), ids).item(), 3)  # ln 2 (4 + 10.23) / 5
    1.973
    """

    def __init__(
        self,
        w0: float = 10.0,
        sigma_px: float = 5.0,
        *,
        class_weight: Sequence[float] | None = None,
        region: str = "background",
        gap: bool = True,
        fade: tuple[float, float] | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        if fade is not None and not (len(fade) == 2 and 0 <= fade[0] <= 1 and 0 < fade[1] < math.inf):
            raise ValueError(f"fade must be a share from 0 to 1 and a number of pixels above 0, got {fade}")
        self.w0, self.sigma_px, self.region, self.reduction = w0, sigma_px, region, reduction
        self.gap, self.fade = gap, fade
        self.class_weight = None if class_weight is None else tuple(map(float, class_weight))

    @classmethod
    def variant(cls, name: str, **settings: Any) -> "BorderWeightedCrossEntropy":
        """The loss with a published weight map's settings, those of `VARIANTS`, and others that are given.

        >>> BorderWeightedCrossEntropy.variant("freiburg-2019").w0
        50.0
        """
        if name not in VARIANTS:
            raise ValueError(f"name must be one of {', '.join(VARIANTS)}, got {name!r}")
        return cls(**{**VARIANTS[name], **settings})

    def forward(self, logits: Tensor, instances: Tensor, target: Tensor | None = None) -> Tensor:
        """The loss of logits [N, K, h, w] against cells.

        Args:
            logits: what the net says.
            instances: [N, H, W], H >= h and W >= w: ids around the same centre. The weight is made of all of it, then
                cropped: a cell outside the output still casts its weight into it. Negative ids are ignored. They, and
                target, may lie on a CPU while logits do not: the weight is made where they are, and moved.
            target: [N, H, W] or [N, h, w] class ids, negative where ignored; None is `cut_gap(instances) > 0`.

        Raises:
            TypeError: as `unet_kernels.border_weight` and `unet_kernels.weighted_cross_entropy`.
            ValueError: likewise; the logits are larger than the instances; too few class weights.
        """
        classes, *size = logits.shape[1:]
        target, weight = self.pixels(instances, target, (size[0], size[1]), classes)
        return unet_kernels.weighted_cross_entropy(
            logits, target.to(logits.device), weight.to(logits.device), reduction=self.reduction
        )

    def pixels(
        self, instances: Tensor, target: Tensor | None, size: tuple[int, int], classes: int
    ) -> tuple[Tensor, Tensor]:
        """What `unet_kernels.weighted_cross_entropy` needs beside logits of `size`: class ids, -100 where ignored, and
        weights; arguments as in `forward`."""
        rows, columns = size
        if instances.dim() != 3 or instances.shape[-2] < rows or instances.shape[-1] < columns:
            raise ValueError(f"instances must be [N, H, W] with at least {rows}x{columns}, got {list(instances.shape)}")
        if target is None:
            cut = unet_kernels.cut_gap(instances).long()
            target = (cut > 0).long().masked_fill_(cut < 0, -1)
        if tuple(target.shape[-2:]) != (rows, columns):
            target = _centre(target, rows, columns)
        # long: torch compares no uint16, and a uint8 target has no room for -100
        ignored = _centre(instances, rows, columns).long() < 0
        target = target if target.is_floating_point() else target.long()
        if self.class_weight is not None and len(self.class_weight) != classes:
            count = f"{classes} numbers, one per class"
            raise ValueError(f"class_weight must have {count}, got {len(self.class_weight)}")
        weight = self.weight(instances, target)
        return target.masked_fill(ignored | (target < 0), -100), weight

    def weight(self, instances: Tensor, target: Tensor) -> Tensor:
        """Eq. 2 for target [N, h, w], class ids around the centre of instances [N, H, W]: float32 [N, h, w]."""
        if self.class_weight is None:
            balance = torch.ones(target.shape, device=target.device)
        else:
            table = sent(torch.tensor(self.class_weight, device="cpu"), target.device)
            balance = table[target.clamp(0, len(table) - 1).long()]
        if self.fade is not None:
            far, sigma_px = self.fade
            # six sigmas from a cell, e^-18 is left
            near, _ = unet_kernels.two_nearest_cells(instances, max_radius=6 * sigma_px)
            near = _centre(near, *target.shape[-2:])
            faded = far + (1 - far) * torch.exp(-(near**2) / (2 * sigma_px * sigma_px))
            balance = torch.where(target == 0, balance * faded, balance)
        if not self.w0:
            return balance
        border = unet_kernels.border_weight(
            instances,
            w0=self.w0,
            sigma_px=self.sigma_px,
            class_weight=(0.0, 0.0),
            region=self.region,
            gap=self.gap,
        )
        return balance + _centre(border, *target.shape[-2:])

    def extra_repr(self) -> str:
        return f"w0={self.w0}, sigma_px={self.sigma_px}, class_weight={self.class_weight}, reduction={self.reduction!r}"


def _centre(x: Tensor, rows: int, columns: int) -> Tensor:
    top, left = (x.shape[-2] - rows) // 2, (x.shape[-1] - columns) // 2
    return x[..., top : top + rows, left : left + columns]
