"""What do loss and gradient cost beside torch's own, from logits and from the last features?

A training tile's output of 388 x 388, two classes, a weight a pixel; the chain that a script would write (1x1
convolution, cross_entropy per pixel, times the weights, mean), eager and compiled, against `weighted_cross_entropy` and
`head_cross_entropy`, each with its gradients. The same within rounding is asserted before anything is timed.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import unet_kernels
from benchmarks.harness import gpu_clock, peak_bytes, relative_error
from benchmarks.sections.weighted_cross_entropy import Loss, step_of, steps

pytestmark = pytest.mark.benchmark(timer=gpu_clock, max_time=0.5, min_rounds=5)

SIDE = 388
PROVIDERS = ("torch", "torch.compile", "unet_kernels")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(autouse=True)
def can_run(provider: str, device: torch.device, no_compiler: str) -> None:
    if provider == "torch.compile" and device.type == "cpu" and no_compiler:
        pytest.skip(f"torch.compile needs a C++ compiler on a CPU: {no_compiler}")


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", ["logits", "features"])
def bench_weighted_cross_entropy(benchmark: Any, source: str, dtype: str, provider: str, device: torch.device) -> None:
    leaves, of_torch, of_ours = steps(SIDE, DTYPES[dtype], source, device)
    providers: dict[str, Callable[[], Loss]] = {
        "torch": lambda: of_torch,
        # not at import: collecting benchmarks would load a compiler
        "torch.compile": lambda: torch.compile(of_torch, dynamic=False),
        "unet_kernels": lambda: of_ours,
    }
    step, theirs = step_of(providers[provider](), leaves), step_of(of_torch, leaves)()
    for got, want in zip(step(), theirs, strict=True):
        assert relative_error(got, want) < 40 * torch.finfo(got.dtype).eps
    benchmark.group = f"loss and gradient from {source}, {dtype}, {SIDE} x {SIDE}"
    benchmark(step)
    benchmark.extra_info["peak_bytes"] = peak_bytes(step, device).allocated_bytes
    op = "head_cross_entropy" if source == "features" else "weighted_cross_entropy"
    benchmark.extra_info["lane"] = ": ".join(unet_kernels.lane(op, device))
