"""How far is each convolution of the net from its floor: ATen's alone, with bias and ReLU, and our op?

Forward, channels_last, cold. The floor is the longer of arithmetic at the measured matrix rate and the fewest bytes at
the measured copy rate. The last layer (1x1) is left out: it belongs to the loss.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import unet_kernels
from benchmarks.harness import channels_last, expect_as_close, measure, paired
from benchmarks.levels import Layer, layers
from benchmarks.sections import Context, affordable, short

TITLE = "Every convolution of the net, against its floor"
ORDER = 50
SECONDS = 90.0


def run(context: Context) -> dict[str, Any]:
    table = [layer for layer in layers(context.tile_in, context.features) if layer.kind != "head"]
    cases = list(itertools.product(context.dtypes, table))
    rows = [_row(context, *case) for case in affordable(context, cases)]
    totals = [_total(rows, short(dtype)) for dtype in context.dtypes]
    said = "; ".join(
        f"{t['dtype']}: ours {t['ours_us']:.0f} us, torch {t['torch_us']:.0f}, bare convolutions {t['conv_us']:.0f}, "
        f"floor {t['floor_us']:.0f}"
        for t in totals
    )
    return {"headline": said, "cases": f"{len(rows)} of {len(cases)}", "totals": totals, "layers": rows}


def _total(rows: list[dict[str, Any]], dtype: str) -> dict[str, Any]:
    of_dtype = [row for row in rows if row["dtype"] == dtype]
    columns = ("floor_us", "conv_us", "torch_us", "ours_us")
    return {"dtype": dtype, "layers": len(of_dtype), **{c: sum(row[c] for row in of_dtype) for c in columns}}


def _row(context: Context, dtype: torch.dtype, layer: Layer) -> dict[str, Any]:
    device = context.device
    x = channels_last(torch.randn(1, layer.c_in, layer.size_in, layer.size_in, device=device).to(dtype))
    weight, bias = _parameters(layer, dtype, device)
    alone, by_torch, by_us = _providers(layer, x, weight, bias)
    exact = _providers(layer, x.double().contiguous(), weight.double().contiguous(), bias.double())[1]()
    errors = expect_as_close(by_us(), by_torch(), exact, f"{layer.name} {dtype}")
    del exact
    bare = measure(alone, device, cold=True, **context.effort)
    found = paired(by_torch, by_us, device, cold=True, **context.effort)
    floor_us = context.roof.floor_s(layer.flops, layer.min_bytes(dtype.itemsize), dtype) * 1e6
    return {
        "layer": layer.name,
        "dtype": short(dtype),
        "gflop": layer.flops / 1e9,
        "floor_us": floor_us,
        "conv_us": bare.median_us,
        "torch_us": found.a.median_us,
        "ours_us": found.b.median_us,
        "torch/ours": found.ratio,
        "spread": f"{found.ratio_min:.2f}..{found.ratio_max:.2f}",
        "ours_tflops": layer.flops / found.b.median_s / 1e12,
        "floor/conv": floor_us / bare.median_us,
        "floor/ours": floor_us / found.b.median_us,
        **errors,
        "how": found.b.how,
    }


def _parameters(layer: Layer, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """He-scaled random weights, so that 16-bit outputs are of ordinary size."""
    shape, taps = (layer.c_out, layer.c_in, 3, 3), 9
    if layer.kind == "up":
        shape, taps = (layer.c_in, layer.c_out, 2, 2), 1
    weight = (2 / (taps * layer.c_in)) ** 0.5 * torch.randn(shape, device=device)
    return channels_last(weight.to(dtype)), torch.randn(layer.c_out, device=device).to(dtype)


def _providers(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Callable[[], Tensor], ...]:
    """(the convolution alone, with all that belongs to the layer, our op)."""
    if layer.kind == "up":
        return (
            lambda: F.conv_transpose2d(x, weight, stride=2),
            lambda: F.conv_transpose2d(x, weight, bias, stride=2),
            lambda: unet_kernels.up_conv(x, weight, bias, mode="deconv"),
        )
    return (
        lambda: F.conv2d(x, weight),
        lambda: F.conv2d(x, weight, bias).relu_(),
        lambda: unet_kernels.conv3x3_relu(x, weight, bias),
    )
