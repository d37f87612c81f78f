"""A U-Net in ordinary torch layers, written from the paper and the design page and not from `unet_fast.model`.

It proves nothing alone: it is what the parity tests compare FastUNet with. Every operation is the textbook one
(nn.Conv2d, nn.ConvTranspose2d, F.interpolate, F.max_pool2d, F.relu, torch.cat, contiguous weights), and the parameters
carry the names that the design fixes, so that one state_dict fits both.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PlainUNet"]


class PlainUNet(nn.Module):
    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 2,
        features: Sequence[int] = (64, 128, 256, 512, 1024),
        *,
        padding: str = "valid",
        up_mode: str = "deconv",
        up_activation: bool = False,
        last_up_channels: int | None = None,
        skips: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.padding, self.up_mode, self.up_activation = padding, up_mode, up_activation
        self.skips, self.rate = skips, dropout
        border = {"valid": 0, "same": 1}[padding]
        self.down = nn.ModuleList()
        arriving = in_channels
        for width in features:
            self.down.append(_pair_of_convolutions(arriving, width, border))
            arriving = width
        self.up = nn.ModuleList()
        for level, (width, below) in enumerate(pairwise(features)):
            risen = width if level > 0 or last_up_channels is None else last_up_channels
            step = _pair_of_convolutions(risen + width if skips else risen, width, border)
            step["up"] = nn.ConvTranspose2d(below, risen, 2, 2) if up_mode == "deconv" else nn.Conv2d(below, risen, 2)
            self.up.append(step)
        self.head = nn.Conv2d(features[0], out_channels, 1)

    def forward(self, x: Tensor, masks: Mapping[int, Tensor] | None = None) -> Tensor:
        """Logits. `masks`: by level, the factors that stand in for a random dropout, so that two nets can share one."""
        bottom = len(self.up)
        kept = []
        for level, step in enumerate(self.down):
            if level > 0:
                x = F.max_pool2d(x, kernel_size=2, stride=2)
            x = F.relu(step["conv2"](F.relu(step["conv1"](x))))
            if masks is not None and level in masks:
                x = x * masks[level]
            elif level in (bottom - 1, bottom):
                # dropped here, so that what is pooled and what is skipped are the same map
                x = F.dropout(x, self.rate, self.training)
            kept.append(x)
        for level in range(bottom - 1, -1, -1):
            step, skip = self.up[level], kept[level]
            x = self._double(x, step["up"])
            if self.up_activation:
                x = F.relu(x)
            if self.padding == "same":
                missing_rows, missing_columns = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
                x = F.pad(x, (0, missing_columns, 0, missing_rows), mode="replicate")
            if self.skips:
                x = torch.cat([x, _centre(skip, x)], dim=1)
            x = F.relu(step["conv2"](F.relu(step["conv1"](x))))
        return self.head(x)

    def _double(self, x: Tensor, layer: nn.Module) -> Tensor:
        if self.up_mode == "deconv":
            return layer(x)
        doubled = F.interpolate(x, scale_factor=2, mode="nearest")
        return F.conv2d(F.pad(doubled, (0, 1, 0, 1), mode="replicate"), layer.weight, layer.bias)


def _pair_of_convolutions(arriving: int, width: int, border: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "conv1": nn.Conv2d(arriving, width, 3, padding=border),
            "conv2": nn.Conv2d(width, width, 3, padding=border),
        }
    )


def _centre(skip: Tensor, like: Tensor) -> Tensor:
    rows, columns = like.shape[2:]
    margin_top = (skip.shape[2] - rows) // 2
    margin_left = (skip.shape[3] - columns) // 2
    return skip.narrow(2, margin_top, rows).narrow(3, margin_left, columns)
