"""How much of the bare forward's speed is left from disk to disk, and what does MONAI's sliding window reach?

A 2048 x 2048 image of 16 bits, from one TIFF to another. "bare forward" is the net on the plan's own windows, which
lie in memory as tensors: what no prediction by these tiles can beat. MONAI's row is a net of the same widths that pads
(its output has its input's size), at MONAI's default overlap of 0.25 and windows of 512, read and written by tifffile;
its answers depend on the cut, ours do not. The speed is of the image's pixels: the halo's share is in it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from scipy import ndimage

from benchmarks.harness import gpu_clock, paired
from benchmarks.levels import PAPER_FEATURES
from unet_fast import FastUNet, Normalisation, plan_tiles, predict
from unet_fast.averaging import versions_of
from unet_fast.greys import Greys
from unet_fast.prediction import predict_files
from unet_fast.sources import ArraySource
from unet_fast.tiling import Cutter

pytestmark = pytest.mark.benchmark(timer=gpu_clock, max_time=1.0, min_rounds=2)

SIDE, ROI, OVERLAP = 2048, 512, 0.25
FEATURES = {"cuda": PAPER_FEATURES, "cpu": (16, 32, 64, 128)}
# of the bare forward's pixels a second
PROMISED = 0.9

Work = Callable[[], Any]


def net(device: torch.device, padding: str = "valid") -> FastUNet:
    torch.manual_seed(0)
    model = FastUNet(features=FEATURES[device.type], padding=padding).to(device).eval()
    # a range needs no pass over the image, which MONAI's row does not make either
    model.normalisation = Normalisation("range", low=0, high=60000)
    return model


@pytest.fixture(scope="session")
def side(untimed: bool) -> int:
    return SIDE // 4 if untimed else SIDE


@pytest.fixture(scope="session")
def image(side: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    blurred = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(side, side)), 3)
    grey = 60000 * (blurred - blurred.min()) / (blurred.max() - blurred.min())
    path = tmp_path_factory.mktemp("predict") / "image.tif"
    tifffile.imwrite(path, grey.astype(np.uint16), tile=(256, 256), compression="zlib")
    return path


def bare_forward(model: FastUNet, image: Path) -> Work:
    pixels = tifffile.imread(image)
    greys = Greys(ArraySource(pixels[None, None]), model.normalisation)
    plan, cutter = plan_tiles(pixels.shape, model=model), Cutter.of(model)
    [version] = versions_of("none", plan.shape)
    like = next(model.parameters())
    windows = [
        torch.from_numpy(version.window(greys, tile, cutter, plan.tile_in))[None].to(like.device)
        for tile in plan.tiles()
    ]

    @torch.no_grad()
    def work() -> None:
        for window in windows:
            model(window)

    return work


def disk_to_disk(model: FastUNet, image: Path, more: dict[str, Any]) -> Work:
    return lambda: predict_files(model, image, image.with_name("labels.tif"), **more)


def in_memory(model: FastUNet, image: Path) -> Work:
    pixels = tifffile.imread(image)
    return lambda: predict(model, pixels)


def by_monai(model: FastUNet, image: Path) -> Work:
    inferers = pytest.importorskip("monai.inferers", reason="MONAI is not installed (pip install -e '.[bench]')")
    like = next(model.parameters())

    @torch.no_grad()
    def work() -> None:
        pixels = tifffile.imread(image).astype(np.float32) / 60000
        inputs = torch.from_numpy(pixels)[None, None].to(like.device)
        logits = inferers.sliding_window_inference(inputs, (ROI, ROI), 1, model, overlap=OVERLAP)
        labels = logits.argmax(1)[0].to(torch.uint8).cpu().numpy()
        tifffile.imwrite(image.with_name("monai.tif"), labels, compression="zlib")

    return work


def work_of(provider: str, image: Path, device: torch.device) -> Work:
    if provider == "MONAI, a padded net":
        return by_monai(net(device, "same"), image)
    model = net(device)
    return {
        "bare forward": lambda: bare_forward(model, image),
        "predict_files": lambda: disk_to_disk(model, image, {}),
        "predict_files, d4": lambda: disk_to_disk(model, image, {"tta": "d4"}),
        "predict, in memory": lambda: in_memory(model, image),
    }[provider]()


PROVIDERS = ("bare forward", "predict_files", "predict, in memory", "MONAI, a padded net", "predict_files, d4")


@pytest.mark.parametrize("provider", PROVIDERS)
def bench_predict(benchmark: Any, provider: str, image: Path, side: int, device: torch.device) -> None:
    work = work_of(provider, image, device)
    benchmark.group = f"{side} x {side}, features {FEATURES[device.type]}"
    benchmark(work)
    if benchmark.stats:  # none under --benchmark-disable
        benchmark.extra_info["mpixel_per_s"] = side**2 / 1e6 / benchmark.stats.stats.median


@pytest.mark.parametrize("other", ["bare forward", "MONAI, a padded net"])
def bench_share(benchmark: Any, other: str, image: Path, device: torch.device) -> None:
    """Disk to disk against another in turns: what is promised is asserted."""
    theirs, ours = work_of(other, image, device), work_of("predict_files", image, device)
    if benchmark.disabled:
        pytest.skip("a comparison of times needs times")
    found = paired(theirs, ours, device, repeats=6, budget_s=60.0)
    benchmark.group = "disk to disk, times the other's speed"
    benchmark.extra_info["speed over the other's"] = {
        "median": round(found.ratio, 3), "min": round(found.ratio_min, 3), "max": round(found.ratio_max, 3),
    }  # fmt: skip
    benchmark.pedantic(ours, rounds=1)
    assert found.ratio >= (PROMISED if other == "bare forward" else 1.0), found
