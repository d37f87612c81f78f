"""FastUNet: the U-Net of Ronneberger, Fischer and Brox (MICCAI 2015) on the ops of `unet_kernels`.

Level 0 is full resolution, level `depth` the bottom; `down[level]` is the contracting path, `up[level]` the expanding
one. The layers are nn.Conv2d and nn.ConvTranspose2d with another forward, so that hooks, initialisers and
state_dicts that know those know these.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

import unet_kernels

from . import geometry
from .normalisation import Normalisation

__all__ = ["FastUNet"]


def _restart(weight: Tensor, bias: Tensor | None, incoming: int) -> None:
    """He's initialisation, std sqrt(2 / incoming), in channels_last memory; biases 0.

    Through `.data`: `.to(memory_format=)` fails under fake tensors. Through explicit strides: with one input channel
    a tensor is contiguous in both formats, and only its strides tell a convolution which one is meant.
    """
    _, c, h, w = weight.shape
    weight.data = torch.empty_strided(weight.shape, (c * h * w, 1, w * c, c), dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        weight.normal_(0.0, math.sqrt(2 / incoming))
        if bias is not None:
            bias.zero_()


class Conv3x3(nn.Conv2d):
    """3x3 convolution and ReLU; with a second map, of the concatenation [x, skip]."""

    bias: nn.Parameter

    def __init__(self, in_channels: int, out_channels: int, padding: str) -> None:
        super().__init__(in_channels, out_channels, 3, padding=0 if padding == "valid" else 1)

    def reset_parameters(self) -> None:
        _restart(self.weight, self.bias, 9 * self.in_channels)

    def forward(self, x: Tensor, skip: Tensor | None = None, *, masks: bool = False, masked: bool = False) -> Tensor:
        """With `masks` it masks the gradient of x, where there is no skip; `masked`, its own comes masked."""
        if self.padding != (0, 0):
            return F.relu(super().forward(x if skip is None else torch.cat([x, skip], 1)))
        given = self.weight, self.bias
        if skip is None:
            return unet_kernels.conv3x3_relu(x, *given, mask_dx=masks, dy_masked=masked)
        return unet_kernels.conv3x3_relu_cat(x, skip, *given, dy_masked=masked)

    def pooled(self, x: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor] | None:
        """(the centred [rows, columns] window of forward(x), its 2x2 maxima) in one pass; None where two are faster."""
        given = x, self.weight, self.bias
        if not unet_kernels.one_pass_pays(*given, rows=rows, columns=columns):
            return None
        return unet_kernels.conv3x3_relu_pool(*given, rows=rows, columns=columns)


class Deconv(nn.ConvTranspose2d):
    """2x2 up-convolution, one tap reaching each output."""

    bias: nn.Parameter

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 2, stride=2)

    def reset_parameters(self) -> None:
        _restart(self.weight, self.bias, self.in_channels)

    def forward(self, x: Tensor, output_size: Any = None, *, masks: bool = False) -> Tensor:  # noqa: ARG002 (nn.ConvTranspose2d has it)
        return unet_kernels.up_conv(x, self.weight, self.bias, mode="deconv", mask_dx=masks)


class Resize(nn.Conv2d):
    """Doubling by repetition and a 2x2 convolution."""

    bias: nn.Parameter

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 2)

    def reset_parameters(self) -> None:
        _restart(self.weight, self.bias, 4 * self.in_channels)

    def forward(self, x: Tensor, *, masks: bool = False) -> Tensor:
        return unet_kernels.up_conv(x, self.weight, self.bias, mode="resize", mask_dx=masks)


class Head(nn.Conv2d):
    """1x1 convolution to one map per class."""

    bias: nn.Parameter

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def reset_parameters(self) -> None:
        _restart(self.weight, self.bias, self.in_channels)

    def forward(self, x: Tensor, *, masks: bool = False) -> Tensor:
        return unet_kernels.conv1x1(x, self.weight, self.bias, mask_dx=masks)


class Down(nn.Module):
    """Two convolutions of the contracting path."""

    def __init__(self, in_channels: int, out_channels: int, padding: str, dropout: float) -> None:
        super().__init__()
        self.conv1 = Conv3x3(in_channels, out_channels, padding)
        self.conv2 = Conv3x3(out_channels, out_channels, padding)
        self.dropout = dropout

    def forward(self, x: Tensor, *, inner: bool = False, masked: bool = False) -> Tensor:
        """`inner`: gradients inside are masked by who reads; `masked`: so is the one that comes, if nothing drops."""
        x = self.conv1(x, **_promised(masked=inner))
        x = self.conv2(x, **_promised(masks=inner, masked=masked and not self.drops))
        # both the pool and the skip get the dropped map, as in the release
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    @property
    def drops(self) -> bool:
        return self.dropout > 0 and self.training

    @property
    def hands_on(self) -> bool:
        """Whether a window and the maxima are all that is wanted of the result: no dropout, no hook on it."""
        watched = any(m._forward_hooks or m._forward_pre_hooks for m in (self, self.conv2))
        return self.conv2.padding == (0, 0) and not watched and not self.drops

    def handed_on(self, x: Tensor, below: int) -> tuple[Tensor, Tensor]:
        """(the window that the way up will see of forward(x), `below` levels being under it; its 2x2 maxima)."""
        x = self.conv1(x)
        rows, columns = (geometry.arriving_size(n - 2, below) for n in x.shape[2:])
        if (both := self.conv2.pooled(x, rows, columns)) is not None:
            return both
        x = self.conv2(x)
        return _centre(x, rows, columns), unet_kernels.max_pool2x2(x)


class Up(nn.Module):
    """An up-convolution, the skip beside it, two convolutions."""

    def __init__(self, up: nn.Module, channels: Sequence[int], padding: str, activation: bool, skips: bool) -> None:
        super().__init__()
        in_channels, out_channels = channels
        self.up = up
        self.conv1 = Conv3x3(in_channels, out_channels, padding)
        self.conv2 = Conv3x3(out_channels, out_channels, padding)
        self.activation, self.skips = activation, skips

    def forward(
        self,
        x: Tensor,
        skip: Tensor,
        *,
        inner: bool = False,
        masks: bool = False,
        masked: bool = False,
    ) -> Tensor:
        """`inner`, `masked`: as of `Down`; with `masks` the gradient of x is handed back masked."""
        x = self.up(x, **_promised(masks=masks))
        if self.activation:
            x = F.relu(x)
        if self.conv1.padding == (0, 0):
            # FastUNet hands over the window; of a whole skip it is taken here
            skip = _centre(skip, x.shape[2], x.shape[3])
        elif x.shape[2:] != skip.shape[2:]:
            # an odd level lost its last row (column) to the pool: repeat the edge, invent no zeros
            x = F.pad(x, (0, skip.shape[3] - x.shape[3], 0, skip.shape[2] - x.shape[2]), mode="replicate")
        x = self.conv1(*((x, skip) if self.skips else (x,)), **_promised(masked=inner))
        return self.conv2(x, **_promised(masks=inner, masked=masked))


def _promised(**promises: bool) -> dict[str, bool]:
    """Those that are made: a part that somebody put in is called as ever."""
    return {name: True for name, made in promises.items() if made}


def _is(part: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a part of the net, and all in it, computes as it was built: another's forward knows nothing of masks."""
    if not isinstance(part, kind) or type(part).forward is not kind.forward or "forward" in vars(part):
        return False
    if not isinstance(part, Down | Up):
        return True
    up = not isinstance(part, Up) or _is(part.up, Deconv) or _is(part.up, Resize)
    return up and _is(part.conv1, Conv3x3) and _is(part.conv2, Conv3x3)


def _centre(skip: Tensor, rows: int, columns: int) -> Tensor:
    top, left = (skip.shape[2] - rows) // 2, (skip.shape[3] - columns) // 2
    return skip[:, :, top : top + rows, left : left + columns]


class FastUNet(nn.Module):
    """U-Net of unpadded convolutions: [N, in_channels, H, W] -> logits [N, out_channels, H - 184, W - 184] at depth 4.

    A drop-in nn.Module: torch.optim, autocast, torch.compile, DDP and copy.deepcopy take it as it is. H and W may
    differ; both must be legal (`unet_fast.geometry.legal_sizes`; 188 + 16 j at depth 4). Weights lie in channels_last
    memory; their shapes and names are those of nn.Conv2d and nn.ConvTranspose2d, so a state_dict is portable.

    Args:
        in_channels: channels of the image.
        out_channels: classes.
        features: channels of each level, from full resolution to the bottom; depth is one less than their number.
        padding: "valid" (the paper), or "same": zero-padded convolutions, the output has the input's size, any size of
            at least 2^depth pixels, for training scripts whose criterion expects it. "same" runs on ATen, and its
            tiles join without seams only where what a padded zero touched is cut off, as `unet_fast.predict` does.
        up_mode: "deconv" (the authors' release) or "resize" (the paper's wording), see `unet_kernels.up_conv`.
        up_activation: a ReLU after each up-convolution, as in the release.
        last_up_channels: channels of the up-convolution to full resolution; None for features[0]. The release has 128.
        skips: False leaves the skip connections out, the paper's ablation.
        dropout: probability, on the two deepest levels of the contracting path, before pool and skip.
        recompute: "none", or "level": training keeps what passes from level to level only and makes the rest again,
            for less memory and a third more time; the same bits. May be set at any time; no part of `settings`.

    `normalisation`, None or a `Normalisation`, is what `unet_fast.predict` applies to images first; `unet_fast.save`
    keeps it with the weights.

    Raises:
        TypeError: a setting has the wrong type.
        ValueError: a setting is out of range; in `forward`, an input of the wrong shape, or of a size that cannot be
            pooled (the nearest that can are named).

    >>> FastUNet(features=(4, 8))(torch.zeros(1, 1, 36, 44)).shape
    torch.Size([1, 2, 20, 28])
    """

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
        recompute: str = "none",
    ) -> None:
        super().__init__()
        features = _expect_features(features)
        in_channels = _expect_positive("in_channels", in_channels)
        out_channels = _expect_positive("out_channels", out_channels)
        if last_up_channels is not None:
            last_up_channels = _expect_positive("last_up_channels", last_up_channels)
        _expect_choice("padding", padding, ("valid", "same"))
        _expect_choice("up_mode", up_mode, ("deconv", "resize"))
        for name, value in (("up_activation", up_activation), ("skips", skips)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be True or False, got {value!r}")
        if isinstance(dropout, bool) or not isinstance(dropout, int | float):
            raise TypeError(f"dropout must be a number, got {dropout!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be a probability, at least 0 and below 1, got {dropout!r}")
        _expect_choice("recompute", recompute, ("none", "level"))
        self.features, self.padding, self.up_mode = features, padding, up_mode
        self.recompute = recompute
        self._in_channels, self._out_channels = in_channels, out_channels
        self._settings = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "features": list(features),
            "padding": padding,
            "up_mode": up_mode,
            "up_activation": up_activation,
            "last_up_channels": last_up_channels,
            "skips": skips,
            "dropout": float(dropout),
        }
        self.normalisation: Normalisation | None = None

        depth = len(features) - 1
        widths = (in_channels, *features)
        self.down = nn.ModuleList(
            Down(widths[level], widths[level + 1], padding, dropout if level >= depth - 1 else 0.0)
            for level in range(depth + 1)
        )
        self.up = nn.ModuleList()
        for level in range(depth):
            arriving = last_up_channels if level == 0 and last_up_channels is not None else features[level]
            up = (Deconv if up_mode == "deconv" else Resize)(features[level + 1], arriving)
            joined = arriving + features[level] if skips else arriving
            self.up.append(Up(up, (joined, features[level]), padding, up_activation, skips))
        self.head = Head(features[0], out_channels)

    @classmethod
    def paper(cls, in_channels: int = 1, out_channels: int = 2, *, dropout: float = 0.0) -> Self:
        """The net of the paper's figure 1: 31,030,658 parameters. The paper names dropout, but no rate."""
        return cls(in_channels, out_channels, dropout=dropout)

    @classmethod
    def release(cls, in_channels: int = 1, out_channels: int = 2, *, dropout: float = 0.5) -> Self:
        """The net that the authors published (phseg_v5): 31,100,354 parameters.

        It differs from the figure: ReLU after each up-convolution, 128 channels out of the last one, dropout 0.5.
        """
        return cls(in_channels, out_channels, up_activation=True, last_up_channels=128, dropout=dropout)

    @property
    def depth(self) -> int:
        """Number of poolings."""
        return len(self.up)

    @property
    def settings(self) -> dict[str, Any]:
        """What it was built with: `FastUNet(**net.settings)` has the same shapes."""
        return dict(self._settings)

    @property
    def in_channels(self) -> int:
        return self._in_channels

    @property
    def out_channels(self) -> int:
        return self._out_channels

    @property
    def n_channels(self) -> int:
        """`in_channels`, under the name other U-Nets give it."""
        return self._in_channels

    @property
    def n_classes(self) -> int:
        """`out_channels`, under the name other U-Nets give it."""
        return self._out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Logits of x [N, in_channels, H, W], before any softmax."""
        self._check(x)
        masks = self._masks(x)
        # a level that is made again hands on as it is: what lies between levels is kept then, and nothing beside it
        outer = masks and self.recompute == "none"
        x, skips = self._contracted(x, masks, outer)
        for level in reversed(range(self.depth)):
            # a view of its own: backward hooks of this level are called when the level is done, not the window
            skip = skips.pop()
            if not masks:
                x = self._step(self.up[level], x, skip[:])
                continue
            # what the bottom hands on may have been dropped, and is no ReLU's result then
            of_x = outer and not (level + 1 == self.depth and self._drops(level + 1))
            x = self._step(self.up[level], x, skip, inner=True, masks=of_x, masked=outer)
        return self.head(x, masks=True) if outer and (self.depth or not self._drops(0)) else self.head(x)

    def _masks(self, x: Tensor) -> bool:
        """Whether gradients inside are handed back with the masks of the ReLUs below, for which no pass is needed.

        Nobody may look at them then: a hook would see zeros that are not there without the masks.
        """
        if self.padding != "valid" or not unet_kernels.chooses_derivatives(x) or _has_any_global_hook():
            return False
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        if any(getattr(m, kind) for m in self.modules() for kind in hooks):
            return False
        return _is(self.head, Head) and all(_is(m, Down) for m in self.down) and all(_is(m, Up) for m in self.up)

    def _contracted(self, x: Tensor, masks: bool, outer: bool) -> tuple[Tensor, list[Tensor]]:
        """(the bottom's map, of each level above it what the way up will see)."""
        skips: list[Tensor] = []
        if not torch.is_grad_enabled() and all(isinstance(d, Down) and d.hands_on for d in self.down[:-1]):
            for level, down in enumerate(self.down[:-1]):
                assert isinstance(down, Down)
                skip, x = down.handed_on(x, self.depth - level)
                skips.append(skip)
            return self.down[self.depth](x), skips
        if outer:
            for level, down in enumerate(self.down[:-1]):
                x = down(x, inner=True, masked=True)
                rows, columns = self._arriving(x, level)
                skip, x = unet_kernels.window_and_pool(x, rows=rows, columns=columns, mask_dx=not self._drops(level))
                skips.append(skip)
            return self.down[self.depth](x, inner=True, masked=True), skips
        for level in range(self.depth + 1):
            x = self._step(self._down, x, level, masks)
            if level < self.depth:
                skips.append(self._window(x, level))
        return x, skips

    def _down(self, x: Tensor, level: int, masks: bool) -> Tensor:
        x = unet_kernels.max_pool2x2(x) if level else x
        return self.down[level](x, inner=True) if masks else self.down[level](x)

    def _drops(self, level: int) -> bool:
        down = self.down[level]
        return isinstance(down, Down) and down.drops

    def _arriving(self, skip: Tensor, level: int) -> tuple[int, int]:
        """Rows and columns of the window that the way up will see of a skip."""
        rows, columns = (geometry.arriving_size(n, self.depth - level) for n in skip.shape[2:])
        return rows, columns

    def _window(self, skip: Tensor, level: int) -> Tensor:
        """What the way up will see of a skip.

        The view is taken here, on the way down: autograd goes backward in the order of making, and so lays the
        window's gradient into zeros of the whole map's size only when this level's turn has come.
        """
        return skip if self.padding == "same" else _centre(skip, *self._arriving(skip, level))

    def _step(self, step: Callable[..., Tensor], *arguments: Any, **how: Any) -> Tensor:
        """A level of the U; its inner maps are made again in the backward if `recompute` says so."""
        if self.recompute == "none" or not torch.is_grad_enabled():
            return step(*arguments, **how)
        return checkpoint(step, *arguments, use_reentrant=False, **how)

    def _check(self, x: Any) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch.Tensor [N, {self.in_channels}, H, W], got {type(x).__name__}")
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must have shape [N, {self.in_channels}, H, W], got {list(x.shape)}")
        if not x.is_floating_point():
            plain = str(x.dtype).removeprefix("torch.")
            raise TypeError(f"x must be floating, got {plain}; .float() / 255 puts a uint8 image between 0 and 1")
        self._check_against_parameters(x)
        for name, size in (("rows of x", x.shape[2]), ("columns of x", x.shape[3])):
            if self.padding == "valid":
                geometry.check_legal(size, self.depth, name=name)
            elif size < geometry.step_multiple(self.depth):
                smallest = geometry.step_multiple(self.depth)
                raise ValueError(
                    f"{name} {size} cannot be pooled {self.depth} times; the smallest for padding 'same' is {smallest}"
                )

    def _check_against_parameters(self, x: Tensor) -> None:
        first = next(self.parameters(), None)
        if first is None:
            return
        if x.device != first.device:
            raise ValueError(f"x must be on {first.device} like the net's parameters, got {x.device}")
        kind = x.device.type
        if x.dtype != first.dtype and (kind == "meta" or not torch.is_autocast_enabled(kind)):
            want, came = (str(dtype).removeprefix("torch.") for dtype in (first.dtype, x.dtype))
            raise TypeError(f"x must be {want} like the net's parameters, got {came}; net.to(x.dtype) changes the net")

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, features={self.features}, padding={self.padding!r}"


def _expect_features(features: Any) -> tuple[int, ...]:
    try:
        features = tuple(features)
    except TypeError:
        raise TypeError(f"features must be a sequence of channels, one per level, got {features!r}") from None
    if not features:
        raise ValueError("features must name the channels of at least one level, got none")
    return tuple(_expect_positive(f"features[{level}]", channels) for level, channels in enumerate(features))


def _expect_positive(name: str, value: Any) -> int:
    """A whole number of at least 1, Python's or numpy's, as an int."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)


def _expect_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")
