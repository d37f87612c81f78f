"""What do the challenge's Rand and information scores cost, with and without thinned borders?

Rows as in `bench_homotopic_warp`, at the eleven thresholds. Values are asserted equal to the specification first.
"""

from typing import Any

import numpy as np
import pytest
import torch

import unet_kernels
from benchmarks.bench_homotopic_warp import SIZES, images
from benchmarks.harness import gpu_clock
from unet_kernels import _native
from unet_kernels.rand_sums import launch_cpu, specified

# `device` sets the number of threads
pytestmark = [pytest.mark.benchmark(timer=gpu_clock, max_time=2.0, min_rounds=3), pytest.mark.usefixtures("device")]

THRESHOLDS = torch.tensor(np.cumsum([0.0, *[0.1] * 10]))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("thinned", [False, True], ids=["components", "thinned"])
@pytest.mark.parametrize("provider", ["specification", "C++"])
def bench_rand_sums(benchmark: Any, size: str, thinned: bool, provider: str) -> None:
    if provider == "specification" and size != "quarter":
        pytest.skip("minutes in plain Python")
    if provider == "C++" and _native.why_not(torch.device("cpu")):
        pytest.skip(_native.why_not(torch.device("cpu")))
    slices, side = SIZES[size]
    name, prediction, truth = images()
    prediction, truth = (each[:slices, :side, :side].contiguous() for each in (prediction, truth))
    arguments = (prediction, unet_kernels.connected_components(truth), THRESHOLDS, thinned)
    work = specified if provider == "specification" else launch_cpu
    if size == "quarter" and not _native.why_not(torch.device("cpu")):
        for ours, wanted in zip(launch_cpu(*arguments), specified(*arguments), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-9)
    benchmark.group = f"{slices} x {side} x {side}, eleven thresholds, {name}, {'thinned' if thinned else 'components'}"
    if provider == "specification":
        benchmark.pedantic(lambda: work(*arguments), rounds=2)
    else:
        benchmark(lambda: work(*arguments))
    benchmark.extra_info["threads"] = torch.get_num_threads()
