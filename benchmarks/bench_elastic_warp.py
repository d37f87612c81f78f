"""What does the warp of a training tile, image and labels, cost beside what others compose?

The paper's 3 x 3 grid of 10 px over 572 x 572 pixels, cubic, with labels: by scipy (a spline of the field and
map_coordinates twice), by F.interpolate and grid_sample twice, by kornia's elastic transform (another map, the same
work), by the specification, by us. What others compute from the same field is asserted near before anything is timed;
scipy's splines are another cubic, and only its labels can be compared.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

import unet_kernels
from benchmarks.harness import gpu_clock, paired
from benchmarks.sections.elastic_warp import Pair, expect_near, grid_sample_pipeline, kornia_pipeline, operands
from unet_kernels import reference

pytestmark = pytest.mark.benchmark(timer=gpu_clock, max_time=0.5, min_rounds=3)

SIDE, ORDER = 572, 3
# time of the peer over ours, on a CPU
PROMISED = {"scipy": 15.0, "F.interpolate + grid_sample": 1.5}
PEERS = ("scipy", "F.interpolate + grid_sample", "kornia, another map", "reference")
# image, whether there is an affine map too
CASES = {
    "elastic": (torch.float32, False),
    "elastic and turned": (torch.float32, True),
    "elastic, uint8": (torch.uint8, False),
}


def scipy_pipeline(image: torch.Tensor, displacement: torch.Tensor, labels: torch.Tensor) -> Callable[[], Pair]:
    plane, ids, grid = image[0, 0].numpy(), labels[0].numpy(), displacement[0].numpy()
    rows = np.arange(SIDE, dtype=np.float32)

    def warp() -> Pair:
        field = [ndimage.zoom(component, SIDE / grid.shape[1], order=3, mode="nearest") for component in grid]
        where = np.stack([rows[:, None] + field[0], rows + field[1]])
        out = ndimage.map_coordinates(plane, where, order=3, mode="mirror")
        return torch.from_numpy(out), torch.from_numpy(ndimage.map_coordinates(ids, where, order=0, mode="mirror"))

    return warp


def work_of(provider: str, case: str, device: torch.device) -> Callable[[], Any]:
    dtype, affine = CASES[case]
    image, displacement, labels, matrix = operands(SIDE, dtype, device, affine=affine)
    if provider == "scipy":
        if device.type != "cpu" or affine:
            pytest.skip("scipy works on a CPU; its pipeline is timed without an affine map")
        return scipy_pipeline(image, displacement, labels)
    if provider.startswith("kornia"):
        if importlib.util.find_spec("kornia") is None:
            pytest.skip("kornia is not installed (pip install -e '.[bench]')")
        found = kornia_pipeline(image, labels)
        if isinstance(found, str):
            pytest.skip(found)
        return found
    if provider == "reference":
        return lambda: reference.elastic_warp(image, displacement, labels, matrix, order=ORDER)

    def ours() -> Pair:
        return unet_kernels.elastic_warp(image, displacement, labels=labels, matrix=matrix, order=ORDER)

    want = reference.elastic_warp(image, displacement, labels, matrix, order=ORDER)
    by_grid_sample = grid_sample_pipeline(image, displacement, labels, matrix, ORDER)
    assert all(torch.equal(a, b) for a, b in zip(ours(), want, strict=True))
    expect_near(ours(), by_grid_sample())
    return by_grid_sample if provider.startswith("F.") else ours


@pytest.mark.parametrize("provider", [*PEERS, "unet_kernels"])
@pytest.mark.parametrize("case", CASES)
def bench_elastic_warp(benchmark: Any, case: str, provider: str, device: torch.device) -> None:
    work = work_of(provider, case, device)
    benchmark.group = f"{case}, {SIDE} x {SIDE}, order {ORDER}, image and labels"
    benchmark(work)
    benchmark.extra_info["lane"] = ": ".join(unet_kernels.lane("elastic_warp", device))
    benchmark.extra_info["native"] = unet_kernels.native_libraries()["native"]


@pytest.mark.parametrize("processor", ["", "baseline"], ids=["this processor", "any processor"])
@pytest.mark.parametrize("peer", PEERS)
def bench_times(
    benchmark: Any, peer: str, processor: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer's time over ours, in turns: what is promised is asserted."""
    if processor:
        monkeypatch.setenv("UNET_PROCESSOR", processor)
    theirs, ours = work_of(peer, "elastic", device), work_of("unet_kernels", "elastic", device)
    if benchmark.disabled:
        pytest.skip("a comparison of times needs times")
    found = paired(theirs, ours, device, repeats=20, budget_s=10.0)
    benchmark.group = f"a peer's time over ours: elastic, {SIDE} x {SIDE}, order {ORDER}, image and labels"
    benchmark.extra_info["peer's time over ours"] = {
        "median": round(found.ratio, 2), "min": round(found.ratio_min, 2), "max": round(found.ratio_max, 2),
        "shortest": round(found.a.min_s / found.b.min_s, 2),
        "shortest, peer and ours, ms": [round(1e3 * t.min_s, 3) for t in (found.a, found.b)],
    }  # fmt: skip
    benchmark.pedantic(ours, rounds=1)
    if unet_kernels.lane("elastic_warp", device)[0] == "native":
        assert found.ratio >= PROMISED.get(peer, 0.0), found


def bench_scipy_takes_the_same_pixels(benchmark: Any, device: torch.device) -> None:
    """Not a time: that the pipeline which is timed is the warp it is said to be."""
    if device.type != "cpu":
        pytest.skip("scipy works on a CPU")
    image, _, labels, _ = operands(SIDE, torch.float32, device, affine=False)
    # a field that both cubics reproduce
    shift = torch.tensor([3.3, -2.2]).view(1, 2, 1, 1).expand(1, 2, 3, 3).contiguous()
    _, ids = benchmark.pedantic(scipy_pipeline(image, shift, labels), rounds=1)
    _, want = unet_kernels.elastic_warp(image, shift, labels=labels, order=ORDER)
    assert torch.equal(ids, want[0])
