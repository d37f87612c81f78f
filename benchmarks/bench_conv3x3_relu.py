"""Is a 3x3 convolution with bias and ReLU faster by our op than in plain torch, where the net has it? Its gradients?

channels_last, forward: plain, over up and a window of the skip (which torch joins first), and with a window and the
maxima handed on; backward: dx, masked where a ReLU made x, and dweight with the bias's. On CUDA a graph's replay is
timed, by the way that takes the device the least time.
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


# of each op a shallow, a middle and a deep layer
LAYERS = (
    *("level0.contracting.conv1", "level1.contracting.conv1", "level2.expanding.conv2", "level4.contracting.conv2"),
    *("level0.contracting.conv2", "level2.contracting.conv2"),
    *("level0.expanding.conv1", "level3.expanding.conv1"),
)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("layer", LAYERS)
def bench_conv3x3_relu(benchmark: Any, layer: str, provider: str, device: torch.device, roof: Roof) -> None:
    [case] = [case for case in cases(*SIZES[device.type]) if case.layer.name == layer]
    timed(benchmark, case, provider, DTYPES[device.type][0], device, roof)


# the image has no gradient
GRADIENTS = [f"{of} of {layer}" for layer in LAYERS for of in ("dx", "dweight") if (of, layer) != ("dx", LAYERS[0])]


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("provider", BACKWARD_PROVIDERS)
def bench_conv3x3_relu_backward(benchmark: Any, gradient: str, provider: str, device: torch.device, roof: Roof) -> None:
    timed_derivative(benchmark, gradient, provider, device, roof)
