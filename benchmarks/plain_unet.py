"""The baseline: the same net as anybody would write it from nn.Conv2d, with FastUNet's parameter names.

Its ReLUs are in place and its maps channels_last, so that it is a baseline at its best and not a straw man.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.levels import PAPER_FEATURES

__all__ = ["PlainUNet"]


class _Twice(nn.Module):
    """Two valid 3x3 convolutions, each with a ReLU; on the expanding path an up-convolution and the skip before."""

    def __init__(self, c_in: int, c_out: int, c_below: int | None = None) -> None:
        super().__init__()
        self.up = None if c_below is None else nn.ConvTranspose2d(c_below, c_out, 2, stride=2)
        self.conv1, self.conv2 = nn.Conv2d(c_in, c_out, 3), nn.Conv2d(c_out, c_out, 3)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.up is not None and skip is not None:
            x = self.up(x)
            top, left = (skip.shape[2] - x.shape[2]) // 2, (skip.shape[3] - x.shape[3]) // 2
            x = torch.cat([x, skip[:, :, top : top + x.shape[2], left : left + x.shape[3]]], 1)
        return F.relu_(self.conv2(F.relu_(self.conv1(x))))


class PlainUNet(nn.Module):
    """[N, in_channels, H, W] -> logits [N, out_channels, H - 184, W - 184] at depth 4."""

    def __init__(self, features: Sequence[int] = PAPER_FEATURES, in_channels: int = 1, out_channels: int = 2) -> None:
        super().__init__()
        widths = (in_channels, *features)
        self.down = nn.ModuleList(_Twice(widths[i], widths[i + 1]) for i in range(len(features)))
        self.up = nn.ModuleList(_Twice(2 * features[i], features[i], features[i + 1]) for i in range(len(features) - 1))
        self.head = nn.Conv2d(features[0], out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for level, down in enumerate(self.down):
            x = down(F.max_pool2d(x, 2) if level else x)
            skips.append(x)
        for up, skip in zip(reversed(self.up), reversed(skips[:-1]), strict=True):
            x = up(x, skip)
        return self.head(x)
