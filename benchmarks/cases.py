"""The layers of the net as the net calls them: what each is given, in plain torch and by our op.

The expanding path's first convolutions read up and a window of the skip; the contracting path's second ones hand on a
window and the maxima.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import unet_kernels
from benchmarks.harness import Roof, channels_last, expect_as_close, peak_bytes, replayable
from benchmarks.levels import PAPER_FEATURES, Concat, Layer, concats, layers
from unet_fast import geometry

__all__ = [
    "DTYPES",
    "PROVIDERS",
    "SIZES",
    "Call",
    "Case",
    "calls",
    "cases",
    "group",
    "inputs",
    "rates",
    "results",
    "timed",
    "timed_beside",
]

# tile and features of the pytest benchmarks: on a CPU what a laptop bears
SIZES = {"cuda": (572, PAPER_FEATURES), "cpu": (316, (16, 32, 64, 128, 256))}
DTYPES = {"cuda": (torch.bfloat16, torch.float32), "cpu": (torch.float32,)}
PROVIDERS = ("torch", "torch.compile", "unet_kernels")

Call = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Case:
    """A layer, and what its op is given."""

    layer: Layer
    op: str
    concat: Concat | None = None
    window: int = 0


def cases(tile_in: int, features: Sequence[int]) -> Iterator[Case]:
    """Every convolution of the net, in the order of the forward."""
    joined = {f"{c.name}.expanding.conv1": c for c in concats(tile_in, features)}
    depth = len(features) - 1
    for layer in layers(tile_in, features):
        level = int(layer.name[5])
        if layer.kind != "conv3x3":
            yield Case(layer, {"up": "up_conv", "head": "conv1x1"}[layer.kind])
        elif layer.name in joined:
            yield Case(layer, "conv3x3_relu_cat", joined[layer.name])
        elif layer.name.endswith("contracting.conv2") and level < depth:
            yield Case(layer, "conv3x3_relu_pool", window=geometry.arriving_size(layer.size_out, depth - level))
        else:
            yield Case(layer, "conv3x3_relu")


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], Tensor, Tensor]:
    """(the maps that the layer reads, its weight, its bias)."""
    return _maps(case, dtype, device), *_parameters(case.layer, dtype, device)


def results(result: Any) -> tuple[Tensor, ...]:
    """Of an op that returns one tensor or two."""
    return result if isinstance(result, tuple) else (result,)


def _maps(case: Case, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    layer, concat = case.layer, case.concat
    if concat is None:
        return [channels_last(torch.randn(1, layer.c_in, layer.size_in, layer.size_in, device=device).to(dtype))]
    up = torch.randn(1, concat.c_up, concat.size, concat.size, device=device)
    skip = torch.randn(1, concat.c_skip, concat.skip_size, concat.skip_size, device=device)
    start, stop = (concat.skip_size - concat.size) // 2, (concat.skip_size + concat.size) // 2
    return [channels_last(up.to(dtype)), channels_last(skip.to(dtype))[:, :, start:stop, start:stop]]


def _parameters(layer: Layer, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """He-scaled random weights, so that 16-bit outputs are of ordinary size."""
    kernel = {"conv3x3": 3, "up": 2, "head": 1}[layer.kind]
    channels = (layer.c_in, layer.c_out) if layer.kind == "up" else (layer.c_out, layer.c_in)
    shape, taps = (*channels, kernel, kernel), 1 if layer.kind == "up" else kernel**2
    weight = (2 / (taps * layer.c_in)) ** 0.5 * torch.randn(shape, device=device)
    return channels_last(weight.to(dtype)), torch.randn(layer.c_out, device=device).to(dtype)


def calls(case: Case, maps: list[Tensor], weight: Tensor, bias: Tensor) -> tuple[Call, Call, Call]:
    """(the convolution alone, the layer in plain torch, our op)."""
    if case.op == "conv1x1":
        return (
            lambda: F.conv2d(*maps, weight),
            lambda: F.conv2d(*maps, weight, bias),
            lambda: unet_kernels.conv1x1(*maps, weight, bias),
        )
    if case.op == "up_conv":
        return (
            lambda: F.conv_transpose2d(*maps, weight, stride=2),
            lambda: F.conv_transpose2d(*maps, weight, bias, stride=2),
            lambda: unet_kernels.up_conv(*maps, weight, bias, mode="deconv"),
        )
    if case.op == "conv3x3_relu_cat":
        joined = torch.cat(maps, 1)
        return (
            lambda: F.conv2d(joined, weight),
            lambda: F.conv2d(torch.cat(maps, 1), weight, bias).relu_(),
            lambda: unet_kernels.conv3x3_relu_cat(*maps, weight, bias),
        )
    if case.op == "conv3x3_relu_pool":
        start, side = (case.layer.size_out - case.window) // 2, case.window

        def in_two_passes() -> tuple[Tensor, Tensor]:
            y = F.conv2d(*maps, weight, bias).relu_()
            return y[:, :, start : start + side, start : start + side], F.max_pool2d(y, 2)

        return (
            lambda: F.conv2d(*maps, weight),
            in_two_passes,
            lambda: unet_kernels.conv3x3_relu_pool(*maps, weight, bias, rows=side, columns=side),
        )
    return (
        lambda: F.conv2d(*maps, weight),
        lambda: F.conv2d(*maps, weight, bias).relu_(),
        lambda: unet_kernels.conv3x3_relu(*maps, weight, bias),
    )


def timed(benchmark: Any, case: Case, provider: str, dtype: torch.dtype, device: torch.device, roof: Roof) -> None:
    """A layer by one provider under pytest-benchmark, after it was found as near to the exact result as torch is."""
    maps, weight, bias = inputs(case, dtype, device)
    _, by_torch, by_us = calls(case, maps, weight, bias)
    made: dict[str, Callable[[], Call]] = {
        "torch": lambda: by_torch,
        # not before it is asked for: a compiler takes seconds to load
        "torch.compile": lambda: torch.compile(by_torch, dynamic=False),
        "unet_kernels": lambda: by_us,
    }
    exact = calls(case, [m.double() for m in maps], weight.double(), bias.double())[1]
    layer = case.layer
    benchmark.group = group(layer.name, layer, dtype)
    timed_beside(benchmark, made[provider](), by_torch, exact, f"{provider}, {benchmark.group}", device)
    benchmark.extra_info["lane"] = ": ".join(unet_kernels.lane(case.op, device, dtype))
    rates(benchmark, layer.flops, layer.min_bytes(dtype.itemsize), dtype, roof)


def group(name: str, layer: Layer, dtype: torch.dtype) -> str:
    """What is timed side by side."""
    channels, pixels = f"{layer.c_in} -> {layer.c_out} channels", f"{layer.size_in} -> {layer.size_out}"
    return f"{name} {str(dtype).removeprefix('torch.')}, {channels}, {pixels}"


@torch.no_grad()
def timed_beside(benchmark: Any, work: Call, by_torch: Call, exact: Call, what: str, device: torch.device) -> None:
    """`work` under pytest-benchmark, on CUDA as a graph's replay, after the gate; and the most memory it holds."""
    with unet_kernels.by_device_time():
        for ours, theirs, true in zip(results(work()), results(by_torch()), results(exact()), strict=True):
            expect_as_close(ours, theirs, true, what)
        benchmark(replayable(work, device))
        benchmark.extra_info["peak_allocated_bytes"] = peak_bytes(work, device).allocated_bytes


def rates(benchmark: Any, flops: int, moved_bytes: int, dtype: torch.dtype, roof: Roof) -> None:
    if benchmark.stats:  # none under --benchmark-disable
        seconds = benchmark.stats.stats.median
        benchmark.extra_info["tflops"] = flops / seconds / 1e12
        benchmark.extra_info["share_of_floor"] = roof.floor_s(flops, moved_bytes, dtype) / seconds
