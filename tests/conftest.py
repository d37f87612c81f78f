"""What every test has: a device, a seed, poisoned memory where kernels run, and a reason beside every skip."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the tests run")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    on_gpu = config.getoption("--device") == "cuda"
    for item in items:
        if "gpu" in item.keywords and not on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU: run with --device cuda"))
        if "interpreter" in item.keywords and not on_gpu and not INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="runs a Triton kernel: needs TRITON_INTERPRET=1 or --device cuda"))
        if "interpreter" not in item.keywords and INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="belongs to the lane without TRITON_INTERPRET"))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20150518)


@pytest.fixture
def random(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(20150518)
