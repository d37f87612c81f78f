"""Is crop_concat faster than torch.cat of a cropped view, and how near is it to a plain copy, at each level of the U?

The four concatenations of the paper's net in channels_last: tile 572 on CUDA, 316 on a CPU. Nothing but bytes moves:
float16 is bfloat16 here, and the ceiling is the rate of a copy. On CUDA a CUDA graph's replay is timed, because a
launch takes longer than the small levels do; replays find their input in the L2 cache where it fits, so a share above
1 is the cache's (`benchmarks.gpu_report` times the same with the cache overwritten).
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import unet_kernels
from benchmarks.harness import Roof, channels_last, expect_same, gpu_clock, peak_bytes, poison, replayable
from benchmarks.levels import Concat, concats

pytestmark = pytest.mark.benchmark(timer=gpu_clock, max_time=0.5, min_rounds=5)

TILE_IN = {"cuda": 572, "cpu": 316}
DTYPES = (torch.float32, torch.bfloat16)


def cat_of_view(up: Tensor, skip: Tensor) -> Tensor:
    rows, columns = up.shape[2:]
    top, left = (skip.shape[2] - rows) // 2, (skip.shape[3] - columns) // 2
    return torch.cat([up, skip[:, :, top : top + rows, left : left + columns]], 1)


@functools.cache
def compiled() -> Callable[[Tensor, Tensor], Tensor]:
    # not at import: collecting benchmarks would load a compiler
    return torch.compile(cat_of_view, dynamic=False)


PROVIDERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "torch.cat": cat_of_view,
    "torch.compile": lambda up, skip: compiled()(up, skip),
    "unet_kernels": unet_kernels.crop_concat,
}


@pytest.fixture(autouse=True)
def can_run(provider: str, device: torch.device, no_compiler: str) -> None:
    # before the benchmark fixture, which complains of a test that skips after asking for it
    if provider == "torch.compile" and device.type == "cpu" and no_compiler:
        pytest.skip(f"torch.compile needs a C++ compiler on a CPU: {no_compiler}")


def inputs(level: Concat, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    up = torch.randn(1, level.c_up, level.size, level.size, device=device, dtype=dtype)
    skip = torch.randn(1, level.c_skip, level.skip_size, level.skip_size, device=device, dtype=dtype)
    return channels_last(up), channels_last(skip)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("level", range(4), ids=lambda level: f"level{level}")
@pytest.mark.usefixtures("six_gigabytes")
def bench_crop_concat(
    benchmark: Any, level: int, dtype: torch.dtype, provider: str, device: torch.device, roof: Roof
) -> None:
    shape, fn = concats(TILE_IN[device.type])[level], PROVIDERS[provider]
    up, skip = inputs(shape, dtype, device)
    moved_bytes = shape.min_bytes(dtype.itemsize)

    poison(moved_bytes // 2, device)
    expect_same(fn(up, skip), cat_of_view(up, skip), provider)
    name = str(dtype).removeprefix("torch.")
    benchmark.group = f"{shape.name} {name}, {shape.c_up}+{shape.c_skip} channels of {shape.size}x{shape.size}"
    benchmark(replayable(lambda: fn(up, skip), device))

    info = benchmark.extra_info
    info["peak_allocated_bytes"] = peak_bytes(lambda: fn(up, skip), device).allocated_bytes
    info["lane"] = ": ".join(unet_kernels.lane("crop_concat", device, dtype))
    info["moved_bytes"] = moved_bytes
    if benchmark.stats:  # none under --benchmark-disable
        info["gbps"] = moved_bytes / benchmark.stats.stats.median / 1e9
        info["share_of_copy_roof"] = info["gbps"] / roof.copy_gbps()
