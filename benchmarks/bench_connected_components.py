"""What do connected components cost beside scipy's, on membranes and on noise?

Rows: a slice of 512 x 512 and a stack of 24. Noise at one half is the worst case of a union-find: long, thin, branching
components. Values are asserted equal before anything is timed.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

import unet_kernels
from benchmarks.harness import gpu_clock
from unet_fast import synthetic
from unet_kernels import reference

pytestmark = pytest.mark.benchmark(timer=gpu_clock, max_time=0.5, min_rounds=3)


@functools.cache
def mask(kind: str, slices: int) -> Tensor:
    """[slices, 512, 512] uint8."""
    if kind == "noise":
        return (torch.rand(slices, 512, 512, generator=torch.Generator().manual_seed(0)) < 0.6).to(torch.uint8)
    return torch.from_numpy((synthetic.membranes((slices, 512, 512), seed=0)[1] > 0).astype(np.uint8))


def by_scipy(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.stack([ndimage.label(slice_)[0] for slice_ in mask.numpy()]).astype(np.int32))


PROVIDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "scipy, slice by slice": by_scipy,
    "reference": lambda mask: reference.connected_components(mask > 0),
    "unet_kernels": unet_kernels.connected_components,
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("slices", [1, 24])
@pytest.mark.parametrize("kind", ["membranes", "noise"])
def bench_connected_components(
    benchmark: Any, kind: str, slices: int, provider: str, device: torch.device, untimed: bool
) -> None:
    slices = min(slices, 3) if untimed else slices
    fn, stack = PROVIDERS[provider], mask(kind, slices)
    stack = stack if provider.startswith("scipy") else stack.to(device)
    torch.testing.assert_close(fn(stack).cpu(), by_scipy(stack.cpu()), rtol=0, atol=0)
    benchmark.group = f"{slices} x 512 x 512, {kind}"
    benchmark(lambda: fn(stack))
    benchmark.extra_info["lane"] = ": ".join(unet_kernels.lane("connected_components", stack.device))
