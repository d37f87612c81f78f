"""What every benchmark has: a device, a clock that waits for it, measured ceilings, a 6 GB card, the machine's name."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.harness import Roof, gpu_clock
from benchmarks.machine import machine

# what a CUDA context takes of the card before the first tensor
CONTEXT_BYTES = 0.5e9


# optional: the hook exists only where pytest-benchmark is installed
@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["unet_fast"] = machine()


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    kind = request.config.getoption("--device")
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.exit("--device cuda: torch sees no CUDA device", returncode=2)
    if kind == "cpu":
        # a core shared with others stalls every thread that waits for it; one thread repeats to within some percent
        torch.set_num_threads(1)
    return torch.device(kind)


def nothing_is_timed(config: pytest.Config) -> bool:
    """Whether it is only seen that benchmarks run, on a CPU: there small sizes say as much as large ones."""
    return config.getoption("--benchmark-disable", False) and config.getoption("--device") == "cpu"


@pytest.fixture(scope="session")
def untimed(request: pytest.FixtureRequest) -> bool:
    return nothing_is_timed(request.config)


@pytest.fixture(scope="session")
def clock() -> Callable[[], float]:
    return gpu_clock


@pytest.fixture(scope="session")
def roof(device: torch.device) -> Roof:
    return Roof(device)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20150518)


@pytest.fixture(autouse=True)
def named_machine(benchmark: Any, device: torch.device) -> None:
    benchmark.extra_info["machine"] = machine() | {"device_used": device.type, "threads": torch.get_num_threads()}


@pytest.fixture
def six_gigabytes(device: torch.device, benchmark: Any) -> Iterator[None]:
    """The memory of a 6 GB card (GB = 1e9 bytes), less its context; given back afterwards."""
    if device.type != "cuda":
        benchmark.extra_info["memory_cap"] = "none: a CPU has no allocator to cap"
        yield
        return
    _, total_bytes = torch.cuda.mem_get_info(device)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (6e9 - CONTEXT_BYTES) / total_bytes), device)
    benchmark.extra_info["memory_cap"] = "6 GB less 0.5 GB of context"
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, device)
