"""Are the logits faster by our op than by ATen's 1x1 convolution? Their gradients?

Backward: dx, masked by the ReLU that made x, and dweight with the bias's. On CUDA a graph's replay is timed, by
the way that takes the device the least time.
"""

from typing import Any

import pytest
import torch

from benchmarks.cases import DTYPES, PROVIDERS, SIZES, cases, timed
from benchmarks.derivatives import PROVIDERS as BACKWARD_PROVIDERS
from benchmarks.derivatives import timed_derivative
from benchmarks.harness import Roof, gpu_clock

pytestmark = pytest.mark.benchmark(timer=gpu_clock, max_time=0.3, min_rounds=3)


@pytest.fixture(autouse=True)
def can_run(provider: str, device: torch.device) -> None:
    # before the benchmark fixture, which complains of a test that skips after asking for it
    if provider == "torch.compile" and device.type == "cpu":
        pytest.skip("compiled or not, a convolution on a CPU is oneDNN's: seconds of compiling would show nothing")


@pytest.mark.parametrize("provider", PROVIDERS)
def bench_conv1x1(benchmark: Any, provider: str, device: torch.device, roof: Roof) -> None:
    *_, case = cases(*SIZES[device.type])
    timed(benchmark, case, provider, DTYPES[device.type][0], device, roof)


@pytest.mark.parametrize("of", ["dx", "dweight"])
@pytest.mark.parametrize("provider", BACKWARD_PROVIDERS)
def bench_conv1x1_backward(benchmark: Any, of: str, provider: str, device: torch.device, roof: Roof) -> None:
    timed_derivative(benchmark, f"{of} of level0.expanding.head", provider, device, roof)
