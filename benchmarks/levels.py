"""What the net must compute and move, layer by layer: the arithmetic that a measured time is held against.

1 multiply-add = 2 FLOP; bias and ReLU are not counted. Bytes are the fewest a layer can move: every input and weight
read once, every output written once, nothing found in a cache. Batch 1, square tiles, the valid net of the paper.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from unet_fast import geometry

__all__ = [
    "PAPER_FEATURES",
    "Concat",
    "Layer",
    "bias_relu_bytes",
    "concats",
    "conv_bytes",
    "conv_flops",
    "crop_concat_bytes",
    "layers",
]

PAPER_FEATURES = (64, 128, 256, 512, 1024)


def conv_flops(c_in: int, c_out: int, taps: int, pixels: int) -> int:
    """FLOP of a convolution in which `taps` weights per channel pair reach each of `pixels` output pixels."""
    return 2 * taps * c_in * c_out * pixels


def conv_bytes(values_in: int, parameters: int, values_out: int, itemsize: int) -> int:
    """Fewest bytes of a convolution with its bias and ReLU in one pass."""
    return (values_in + parameters + values_out) * itemsize


def crop_concat_bytes(channels: int, size: int, itemsize: int) -> int:
    """Fewest bytes of a concatenation with `channels` channels of size x size: each value read and written."""
    return 2 * channels * size**2 * itemsize


def bias_relu_bytes(channels: int, size: int, itemsize: int) -> int:
    """Fewest bytes of bias and ReLU in place, in one pass."""
    return 2 * channels * size**2 * itemsize


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution of the net: `kind` is "conv3x3", "up" (2x2 deconvolution) or "head" (1x1); sizes in pixels."""

    name: str
    kind: str
    c_in: int
    c_out: int
    size_in: int
    size_out: int

    @property
    def parameters(self) -> int:
        return self._kernel**2 * self.c_in * self.c_out + self.c_out

    @property
    def flops(self) -> int:
        # each output pixel of the deconvolution is reached by one of its four taps
        taps = 1 if self.kind == "up" else self._kernel**2
        return conv_flops(self.c_in, self.c_out, taps, self.size_out**2)

    def min_bytes(self, itemsize: int) -> int:
        values_in, values_out = self.c_in * self.size_in**2, self.c_out * self.size_out**2
        return conv_bytes(values_in, self.parameters, values_out, itemsize)

    @property
    def _kernel(self) -> int:
        return {"conv3x3": 3, "up": 2, "head": 1}[self.kind]


@dataclass(frozen=True, slots=True)
class Concat:
    """Where a skip meets the map from below: both [1, C, size, size] in what comes out; sizes in pixels."""

    name: str
    c_up: int
    c_skip: int
    size: int
    skip_size: int

    def min_bytes(self, itemsize: int) -> int:
        return crop_concat_bytes(self.c_up + self.c_skip, self.size, itemsize)


def layers(
    tile_in: int = 572, features: Sequence[int] = PAPER_FEATURES, in_channels: int = 1, out_channels: int = 2
) -> list[Layer]:
    """Every convolution in the order of the forward pass: level0 is full resolution, the last level the bottom."""
    depth = len(features) - 1
    tile_out = geometry.output_size(tile_in, depth)
    found: list[Layer] = []
    size, channels = tile_in, in_channels

    def add(name: str, kind: str, c_out: int, size_out: int) -> None:
        nonlocal size, channels
        found.append(Layer(name, kind, channels, c_out, size, size_out))
        size, channels = size_out, c_out

    for level in range(depth + 1):
        size = size // 2 if level else size
        add(f"level{level}.contracting.conv1", "conv3x3", features[level], size - 2)
        add(f"level{level}.contracting.conv2", "conv3x3", features[level], size - 2)
    for level in reversed(range(depth)):
        add(f"level{level}.expanding.up", "up", features[level], 2 * size)
        channels += features[level]  # the skip
        add(f"level{level}.expanding.conv1", "conv3x3", features[level], size - 2)
        add(f"level{level}.expanding.conv2", "conv3x3", features[level], size - 2)
    add("level0.expanding.head", "head", out_channels, size)
    assert size == tile_out, (size, tile_out)
    return found


def concats(tile_in: int = 572, features: Sequence[int] = PAPER_FEATURES) -> list[Concat]:
    """The concatenations of the net, level0 first."""
    by_name = {layer.name: layer for layer in layers(tile_in, features)}
    found = []
    for level, c_skip in enumerate(features[:-1]):
        up, skip = by_name[f"level{level}.expanding.up"], by_name[f"level{level}.contracting.conv2"]
        found.append(Concat(f"level{level}", up.c_out, c_skip, up.size_out, skip.size_out))
    return found
