"""What every test has: a device, a seed, and a reason beside every skip."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# what a test starts finds the package as the test did, installed or not
ROOT = Path(__file__).parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    on_gpu = config.getoption("--device") == "cuda"
    for item in items:
        if "gpu" in item.keywords and not on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU: run with --device cuda"))
        if "interpreter" in item.keywords and not on_gpu and not INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="runs a Triton kernel: needs TRITON_INTERPRET=1 or --device cuda"))
        if "interpreter" not in item.keywords and INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="belongs to the lane without TRITON_INTERPRET"))


def pytest_collection_finish() -> None:
    # five thousand tests are millions of objects that stay to the end: no collection need look at them again
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def float32_means_float32() -> None:
    # cuDNN's default, tf32, keeps ten bits of it
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def on_device(device: torch.device) -> Iterator[None]:
    """What the test makes is made on the device; tensors made when the file was read stay on the CPU."""
    if device.type == "cpu":
        yield
        return
    with device:
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20150518)


@pytest.fixture
def blank_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page of a run takes longer to draw than the small runs of tests; `test_report` looks at it."""
    from unet_fast import run

    def draw(place: Path) -> None:
        for name in ("curves.png", "report.html"):
            (place / name).write_bytes(b"a page")

    monkeypatch.setattr(run, "write_report", draw)
