"""What does the challenge's warping error cost, and how much less than its specification?

Rows: one slice, and a whole stack of 24 slices of 512 x 512 as after an epoch, each at the ten thresholds; membranes
drawn by `unet_fast.synthetic`, or the challenge's own labels where UNET_FAST_DATA has them; the prediction is the truth
with noise, blurred. The specification, in plain Python, sees one quarter of one slice. Values are asserted equal first.
"""

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from scipy import ndimage
from torch import Tensor

from benchmarks.harness import gpu_clock
from unet_fast import synthetic
from unet_kernels import _native
from unet_kernels.homotopic_warp import launch_cpu, specified

# `device` sets the number of threads
pytestmark = [pytest.mark.benchmark(timer=gpu_clock, max_time=2.0, min_rounds=3), pytest.mark.usefixtures("device")]

THRESHOLDS = torch.tensor(np.cumsum([0.0, *[0.1] * 9]))
# slices, side
SIZES = {"quarter": (1, 256), "slice": (1, 512), "stack": (24, 512)}
LABELS = Path(os.environ.get("UNET_FAST_DATA", Path(__file__).parents[2] / "shared/data")) / "isbi2012/train-labels.tif"


@functools.cache
def images() -> tuple[str, Tensor, Tensor]:
    """(what they are, prediction, truth), [24, 512, 512]."""
    rng = np.random.default_rng(0)
    if LABELS.is_file():
        name, cell = "ISBI 2012", tifffile.imread(LABELS)[:24] > 0
    else:
        name, cell = "drawn membranes", synthetic.membranes((24, 512, 512), seed=0)[1] > 0
    noise = rng.normal(0, 0.8, cell.shape).astype(np.float32)
    blurred = np.stack([ndimage.gaussian_filter(slice_ + n, 1.5) for slice_, n in zip(cell, noise, strict=True)])
    return name, torch.from_numpy(blurred.clip(0, 1).astype(np.float32)), torch.from_numpy(cell.astype(np.uint8))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("provider", ["specification", "C++"])
def bench_homotopic_warp(benchmark: Any, size: str, provider: str) -> None:
    if provider == "specification" and size != "quarter":
        pytest.skip("minutes in plain Python")
    if provider == "C++" and _native.why_not(torch.device("cpu")):
        pytest.skip(_native.why_not(torch.device("cpu")))
    slices, side = SIZES[size]
    name, prediction, truth = images()
    prediction, truth = (each[:slices, :side, :side].contiguous() for each in (prediction, truth))
    arguments = (prediction, truth, torch.ones_like(truth), THRESHOLDS, 20, None)
    work = specified if provider == "specification" else launch_cpu
    if size == "quarter" and not _native.why_not(torch.device("cpu")):
        torch.testing.assert_close(launch_cpu(*arguments), specified(*arguments), rtol=0, atol=0)
    benchmark.group = f"{slices} x {side} x {side}, ten thresholds, {name}"
    if provider == "specification":
        counts = benchmark.pedantic(lambda: work(*arguments), rounds=2)
    else:
        counts = benchmark(lambda: work(*arguments))
    benchmark.extra_info["least splits and mergers"] = int(counts.sum(1)[:, 1:3].sum(1).min())
    benchmark.extra_info["threads"] = torch.get_num_threads()
