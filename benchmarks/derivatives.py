"""The gradients of the net's layers as its backward asks for them: what each is given, in plain torch and by our ops.

"dx"       of a layer's input, masked where a ReLU made it; of a concatenation that of both maps
"dweight"  of weight and bias
"pool"     of a map of which a window and the 2x2 maxima were handed on, masked

What arrives (dz) is masked already, by whoever read the layer. A skip's gradient is masked where it meets that of the
maxima, and not before. Plain torch is given what its autograd keeps: the concatenation, the indices of the maxima.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import unet_kernels  # noqa: F401 (registers the ops)
from benchmarks.cases import DTYPES, Call, Case, cases, group, inputs, rates, timed_beside
from benchmarks.harness import Roof, channels_last
from benchmarks.levels import PAPER_FEATURES, conv_bytes

__all__ = ["OF", "PROVIDERS", "SIZES", "Derivative", "derivatives", "derived", "given", "timed_derivative"]

OF = ("dx", "dweight", "pool")
PROVIDERS = ("torch", "unet_kernels")
# as of the forward; on a CPU a smaller tile, because each gradient is checked in float64 first
SIZES = {"cuda": (572, PAPER_FEATURES), "cpu": (188, (16, 32, 64, 128, 256))}
_OPS = {"conv3x3": "conv3x3", "up": "up_conv", "head": "conv1x1"}


@dataclass(frozen=True, slots=True)
class Derivative:
    """A gradient of a layer: `of` is one of `OF`."""

    case: Case
    of: str

    @property
    def name(self) -> str:
        return f"{self.of} of {self.case.layer.name}"

    @property
    def op(self) -> str:
        """Our op, as the table of choices knows it."""
        if self.of == "pool":
            return "max_pool2x2_dx"
        return f"{_OPS[self.case.layer.kind]}_{self.of}"

    @property
    def masked(self) -> bool:
        """Whether what is derived by is a ReLU's result: neither the maxima nor an up-convolution's are."""
        layer = self.case.layer
        return self.of == "pool" or (self.of == "dx" and (layer.kind != "conv3x3" or layer.name.endswith("conv2")))

    @property
    def flops(self) -> int:
        """As many as the layer's own: each product of the forward has one here."""
        return 0 if self.of == "pool" else self.case.layer.flops

    def min_bytes(self, itemsize: int) -> int:
        """All that is given read once, all that comes out written once."""
        layer = self.case.layer
        values_in, values_out = layer.c_in * layer.size_in**2, layer.c_out * layer.size_out**2
        if self.of == "pool":
            arriving = layer.c_out * (self.case.window**2 + (layer.size_out // 2) ** 2)
            return (2 * values_out + arriving) * itemsize
        return conv_bytes(values_in, layer.parameters, values_out, itemsize) + self.masked * values_in * itemsize


def derivatives(tile_in: int, features: Sequence[int]) -> Iterator[Derivative]:
    """Every gradient of the net's backward, layer by layer in the order of the forward."""
    for index, case in enumerate(cases(tile_in, features)):
        # the image has none
        if index:
            yield Derivative(case, "dx")
        yield Derivative(case, "dweight")
        if case.window:
            yield Derivative(case, "pool")


def given(derivative: Derivative, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """dz, weight, and the maps that the layer read; of "pool" dpooled, dwindow, and the map that both are of."""
    case = derivative.case
    layer, side = case.layer, case.layer.size_out
    if derivative.of == "pool":
        return [_random(layer.c_out, size, dtype, device) for size in (side // 2, case.window, side)]
    maps, weight, _ = inputs(case, dtype, device)
    return [_random(layer.c_out, side, dtype, device), weight, *maps]


def _random(channels: int, side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return channels_last(torch.randn(1, channels, side, side, device=device).to(dtype))


def derived(derivative: Derivative, tensors: list[Tensor]) -> tuple[Call, Call]:
    """(the gradient in plain torch, by our op)."""
    if derivative.of == "pool":
        return _of_window_and_maxima(*tensors)
    dz, weight, *maps = tensors
    transposed = derivative.case.layer.kind == "up"
    joined = torch.cat(maps, 1) if len(maps) > 1 else maps[0]
    stride, outputs = [2, 2] if transposed else [1, 1], [dz.shape[1]]
    rest = (outputs, stride, [0, 0], [1, 1], transposed, [0, 0], 1)
    if derivative.of == "dweight":
        skip = maps[1] if len(maps) > 1 else None
        return (
            lambda: torch.ops.aten.convolution_backward(dz, joined, weight, *rest, [False, True, True])[1:],
            lambda: torch.ops.unet.dweight(dz, weight, True, maps[0], skip, transposed),
        )
    mask, first = derivative.masked, maps[0].shape[1]

    def by_torch() -> tuple[Tensor, ...]:
        dx = torch.ops.aten.convolution_backward(dz, joined, weight, *rest, [True, False, False])[0]
        if mask:
            dx = torch.ops.aten.threshold_backward(dx, joined, 0)
        return (dx[:, :first], dx[:, first:]) if len(maps) > 1 else (dx,)

    ours: dict[str, Call] = {
        "up_conv_dx": lambda: torch.ops.unet.up_conv_dx(dz, weight, *maps, mask, "deconv"),
        "conv1x1_dx": lambda: torch.ops.unet.conv1x1_dx(dz, weight, *maps, mask),
        "conv3x3_dx": lambda: tuple(
            torch.ops.unet.conv3x3_dx(dz, weight, x, mask, begin) for x, begin in zip(maps, (0, first), strict=False)
        ),
    }
    return by_torch, ours[derivative.op]


def _of_window_and_maxima(dpooled: Tensor, dwindow: Tensor, x: Tensor) -> tuple[Call, Call]:
    _, places = torch.ops.aten.max_pool2d_with_indices(x, [2, 2], [2, 2])
    start, side = (x.shape[2] - dwindow.shape[2]) // 2, dwindow.shape[2]
    window = slice(start, start + side)

    def by_torch() -> Tensor:
        how = [2, 2], [2, 2], [0, 0], [1, 1], False
        dx = torch.ops.aten.max_pool2d_with_indices_backward(dpooled, x, *how, places)
        dx[:, :, window, window].add_(dwindow)
        return torch.ops.aten.threshold_backward(dx, x, 0)

    return by_torch, lambda: torch.ops.unet.max_pool2x2_dx(dpooled, x, dwindow, True)


def timed_derivative(benchmark: Any, name: str, provider: str, device: torch.device, roof: Roof) -> None:
    """A gradient by one provider under pytest-benchmark, after it was found as near to the exact one as torch's is."""
    [derivative] = [each for each in derivatives(*SIZES[device.type]) if each.name == name]
    dtype = DTYPES[device.type][0]
    tensors = given(derivative, dtype, device)
    by_torch, by_us = derived(derivative, tensors)
    exact = derived(derivative, [t.double() for t in tensors])[0]
    benchmark.group = group(derivative.name, derivative.case.layer, dtype)
    work = {"torch": by_torch, "unet_kernels": by_us}[provider]
    timed_beside(benchmark, work, by_torch, exact, f"{provider}, {benchmark.group}", device)
    rates(benchmark, derivative.flops, derivative.min_bytes(dtype.itemsize), dtype, roof)
