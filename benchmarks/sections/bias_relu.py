"""Does one pass for bias and ReLU after a bias-less convolution beat torch's two, at each level of the U?

predict: saves 2 x the bytes of the output per layer, 1.1 to 1.6 times the speed of conv + bias + ReLU; the same bits'
worth of error, because both round the convolution once before the sum.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import channels_last, expect_as_close, measure, paired
from benchmarks.levels import Layer, bias_relu_bytes, layers
from benchmarks.sections import Context, Skipped, affordable, short
from unet_kernels import _triton
from unet_kernels.bias_relu import launch_bias_relu_

TITLE = "One pass for bias and ReLU behind a convolution"
ORDER = 40
SECONDS = 40.0


def run(context: Context) -> dict[str, Any]:
    interpreted = context.device.type == "cpu" and _triton.INTERPRETED
    refusal = "" if interpreted else _triton.why_not(context.device)
    if refusal:
        raise Skipped(f"{refusal}; TRITON_INTERPRET=1 would run it, slowly")
    # the second convolution of each level, on both paths: first ones have the same outputs up to two pixels
    shapes = [layer for layer in layers(context.tile_in, context.features) if layer.name.endswith("conv2")]
    # under the interpreter one dtype and the deep levels are proof enough
    cases = list(itertools.product(context.dtypes[:1] if interpreted else context.dtypes, shapes))
    cases = [case for case in cases if case[1].size_out < 40] if interpreted else cases
    rows = [_row(context, *case) for case in affordable(context, cases)]
    slowest = min((row["torch/ours"] for row in rows), default=0.0)
    best = max((row["torch/ours"] for row in rows), default=0.0)
    return {
        "headline": f"torch takes {slowest:.2f} to {best:.2f} times as long",
        "cases": f"{len(rows)} of {len(cases)}",
        "layers": rows,
    }


def _row(context: Context, dtype: torch.dtype, layer: Layer) -> dict[str, Any]:
    device = context.device
    x = channels_last(torch.randn(1, layer.c_in, layer.size_in, layer.size_in, device=device).to(dtype))
    scale = (2 / (9 * layer.c_in)) ** 0.5
    weight = channels_last((scale * torch.randn(layer.c_out, layer.c_in, 3, 3, device=device)).to(dtype))
    bias = torch.randn(layer.c_out, device=device).to(dtype)

    def by_torch() -> Tensor:
        return F.conv2d(x, weight, bias).relu_()

    def by_us() -> Tensor:
        return launch_bias_relu_(F.conv2d(x, weight), bias)

    exact = F.conv2d(x.double().contiguous(), weight.double().contiguous(), bias.double()).relu_()
    errors = expect_as_close(by_us(), by_torch(), exact, f"{layer.name} {dtype}")
    del exact
    alone = measure(lambda: F.conv2d(x, weight), device, cold=True, **context.effort)
    found = paired(by_torch, by_us, device, cold=True, **context.effort)
    pass_s = bias_relu_bytes(layer.c_out, layer.size_out, dtype.itemsize) / context.roof.copy_gbps() / 1e9
    return {
        "layer": layer.name,
        "dtype": short(dtype),
        "conv_us": alone.median_us,
        "torch_us": found.a.median_us,
        "ours_us": found.b.median_us,
        "torch/ours": found.ratio,
        "spread": f"{found.ratio_min:.2f}..{found.ratio_max:.2f}",
        "our pass_us": found.b.median_us - alone.median_us,
        "a copy's_us": pass_s * 1e6,
        **errors,
        "how": found.b.how,
    }
