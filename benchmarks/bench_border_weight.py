"""What does the weight map of Eq. 2 cost beside the usual way, one distance transform per cell?

Rows: a training tile, 512 x 512 with few and with many cells, larger areas. The usual way is scipy's
exact distance transform of every cell in turn, keeping the two smallest; `reference` is the specification. Values
are asserted equal before anything is timed.
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
from benchmarks.harness import expect_same, gpu_clock
from benchmarks.sections.border_weight import instances
from unet_kernels import reference

pytestmark = pytest.mark.benchmark(timer=gpu_clock, max_time=0.5, min_rounds=3)

W0, SIGMA_PX = 10.0, 5.0
# side, cells
SIZES = {
    "tile188_20": (188, 20),
    **{f"512_{cells}": (512, cells) for cells in (0, 1, 2, 20, 200, 2000)},
    "1024_200": (1024, 200),
    "2048_200": (2048, 200),
}
# more transforms than that take minutes
MOST_TRANSFORMS = 200


def one_transform_per_cell(ids: Tensor) -> Tensor:
    plane = ids[0].numpy()
    near = np.full((2, *plane.shape), np.inf)
    for cell in np.unique(plane[plane > 0]):
        distance = ndimage.distance_transform_edt(plane != cell)
        near = np.sort(np.stack([*near, distance]), axis=0)[:2]
    background = unet_kernels.cut_gap(ids)[0].numpy() == 0
    term = W0 * np.exp(-((near[0] + near[1]) ** 2) / (2 * SIGMA_PX**2))
    return torch.from_numpy(1 + np.where(background, term, 0))[None].float()


PROVIDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "scipy, one transform per cell": one_transform_per_cell,
    "reference": reference.border_weight,
    "unet_kernels": unet_kernels.border_weight,
}


@functools.cache
def specified(side: int, cells: int) -> Tensor:
    return reference.border_weight(instances(side, cells))


@pytest.fixture(autouse=True)
def can_run(provider: str, size: str) -> None:
    side, cells = SIZES[size]
    if provider.startswith("scipy") and (cells > MOST_TRANSFORMS or cells == 0 or side > 512):
        pytest.skip("one transform per cell would take minutes, or there is none")
    if provider == "reference" and side > 512:
        pytest.skip("the specification is slow, and was timed at 512 x 512")


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("size", SIZES)
def bench_border_weight(benchmark: Any, size: str, provider: str, device: torch.device) -> None:
    fn, ids = PROVIDERS[provider], instances(*SIZES[size])
    on_cpu = provider.startswith("scipy")
    ids = ids if on_cpu else ids.to(device)
    found = fn(ids)
    if SIZES[size][0] <= 512:
        torch.testing.assert_close(found.cpu(), specified(*SIZES[size]), rtol=1e-5, atol=1e-5)
    if not on_cpu:
        expect_same(fn(ids), found, f"{provider}, twice")
    side, cells = SIZES[size]
    benchmark.group = f"{side} x {side}, {cells} cells"
    benchmark(lambda: fn(ids))
    benchmark.extra_info["lane"] = ": ".join(unet_kernels.lane("border_weight", device))
    benchmark.extra_info["cells"] = cells
