"""Is the 2x2 maximum faster by our op than by torch's pool, level by level? The gradient of a level?

torch's keeps an int64 index for every maximum, whoever wants it. Nothing but bytes moves: the ceiling is a copy's rate.
Backward: what the maxima and the window beside them hand back, added and masked; by torch three passes.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import unet_kernels
from benchmarks.cases import DTYPES, SIZES, cases
from benchmarks.derivatives import PROVIDERS as BACKWARD_PROVIDERS
from benchmarks.derivatives import timed_derivative
from benchmarks.harness import Roof, channels_last, expect_same, gpu_clock, peak_bytes, replayable

pytestmark = pytest.mark.benchmark(timer=gpu_clock, max_time=0.3, min_rounds=3)

PROVIDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch": lambda x: F.max_pool2d(x, 2),
    "unet_kernels": unet_kernels.max_pool2x2,
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("level", range(4))
@pytest.mark.usefixtures("six_gigabytes")
def bench_max_pool2x2(benchmark: Any, level: int, provider: str, device: torch.device, roof: Roof) -> None:
    [case] = [c for c in cases(*SIZES[device.type]) if c.layer.name == f"level{level}.contracting.conv2"]
    layer, dtype = case.layer, DTYPES[device.type][0]
    x = channels_last(torch.randn(1, layer.c_out, layer.size_out, layer.size_out, device=device).to(dtype))
    pool = PROVIDERS[provider]
    with torch.no_grad(), unet_kernels.by_device_time():
        expect_same(pool(x), F.max_pool2d(x, 2), provider)
        benchmark.group = f"level{level}, {layer.c_out} channels of {layer.size_out}x{layer.size_out}"
        benchmark(replayable(lambda: pool(x), device))
        benchmark.extra_info["peak_allocated_bytes"] = peak_bytes(lambda: pool(x), device).allocated_bytes
    if benchmark.stats:  # none under --benchmark-disable
        moved_bytes = 5 * x.numel() // 4 * dtype.itemsize
        benchmark.extra_info["share_of_copy_roof"] = moved_bytes / benchmark.stats.stats.median / 1e9 / roof.copy_gbps()


@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize("provider", BACKWARD_PROVIDERS)
def bench_max_pool2x2_backward(benchmark: Any, level: int, provider: str, device: torch.device, roof: Roof) -> None:
    timed_derivative(benchmark, f"pool of level{level}.contracting.conv2", provider, device, roof)
