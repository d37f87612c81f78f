"""What is a larger tile worth, and how large a tile does 6 GB hold: FastUNet against plain PyTorch?

A training step with momentum at growing tiles: useful output Mpixel a second (the halo is work for nothing), and the
bytes it holds. On a CPU a narrow net and tiles that a laptop can bear, on CUDA the paper's net under the memory of a
6 GB card. The largest tile of each net in 6 GB is counted for the paper's net everywhere: plain PyTorch's by torch's
MemTracker under fake tensors, ours by `unet_fast.memory`, which agrees with it.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.conftest import CONTEXT_BYTES, nothing_is_timed
from benchmarks.counted import dynamic_peak
from benchmarks.harness import Roof, channels_last, expect_as_close, gpu_clock, peak_bytes
from benchmarks.levels import PAPER_FEATURES
from benchmarks.plain_unet import PlainUNet
from unet_fast import FastUNet, geometry
from unet_fast.layers import Layers
from unet_fast.memory import largest_tile
from unet_kernels import multiplies_in

pytestmark = pytest.mark.benchmark(timer=gpu_clock, max_time=1.0, min_rounds=3)

FEATURES = {"cuda": PAPER_FEATURES, "cpu": (16, 32, 64, 128)}
TILES = {"cuda": (188, 380, 572, 828, 1084, 1404, 1724), "cpu": (92, 188, 284, 428, 572)}
PRECISIONS = ("float32", "bfloat16 autocast")
PROVIDERS = ("plain", "FastUNet", "FastUNet, recompute")

CARD_BYTES = 6e9 - CONTEXT_BYTES


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "tile_in" in metafunc.fixturenames:
        tiles = TILES[metafunc.config.getoption("--device")]
        metafunc.parametrize("tile_in", tiles[:2] if nothing_is_timed(metafunc.config) else tiles)


def net(provider: str, features: tuple[int, ...]) -> nn.Module:
    if provider == "plain":
        return PlainUNet(features)
    return FastUNet(features=features, recompute="level" if "recompute" in provider else "none")


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if "autocast" in precision else nullcontext()


def gradient(model: nn.Module, image: Tensor, precision: str) -> Tensor:
    with autocast(precision, image.device):
        logits = model(image)
    target = (torch.arange(logits.shape[2] * logits.shape[3], device=image.device) % 2).view(1, *logits.shape[2:])
    loss = F.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, target)
    return torch.cat([g.double().flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def step(model: nn.Module, image: Tensor, target: Tensor, precision: str) -> Callable[[], None]:
    # a rate of 0 costs as much as any other, and leaves the net as it is
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.99)

    def work() -> None:
        with autocast(precision, image.device):
            logits = model(image)
        F.cross_entropy(logits.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return work


@functools.cache
def expect_gradients(provider: str, precision: str, device: torch.device) -> None:
    """As near to float64's as plain PyTorch's are, at the smallest tile."""
    features, side = FEATURES[device.type], TILES[device.type][0]
    model, plain, exact = (net(name, features).to(device) for name in (provider, "plain", "plain"))
    plain.load_state_dict(model.state_dict())
    exact.load_state_dict(model.state_dict())
    image = channels_last(torch.randn(1, 1, side, side, device=device))
    expect_as_close(
        gradient(model, image, precision),
        gradient(plain, image, precision),
        gradient(exact.double(), image.double().contiguous(), "float64"),
        f"{provider}, {precision}",
    )


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.usefixtures("six_gigabytes")
def bench_tile_size(
    benchmark: Any, tile_in: int, precision: str, provider: str, device: torch.device, roof: Roof
) -> None:
    features = FEATURES[device.type]
    expect_gradients(provider, precision, device)
    model = net(provider, features).to(device)
    if provider == "plain":
        for p in model.parameters():
            p.data = channels_last(p.data) if p.dim() == 4 else p.data
    tile_out = geometry.output_size(tile_in, len(features) - 1)
    by_hand = "autocast" in precision and multiplies_in(device, torch.bfloat16) != torch.bfloat16
    if provider == "plain" and by_hand and tile_in > 188:
        pytest.skip("plain PyTorch's bfloat16 takes minutes on this processor (docs/findings/0012)")
    image = channels_last(torch.randn(1, 1, tile_in, tile_in, device=device))
    target = torch.zeros(1, tile_out, tile_out, dtype=torch.long, device=device)
    work = step(model, image, target, precision)
    benchmark.group = f"training step, tile {tile_in} (useful {tile_out} x {tile_out}), {precision}"
    info = benchmark.extra_info
    try:
        work()
    except torch.OutOfMemoryError:
        info["fits"] = False
        pytest.skip(f"{provider} has no room for tile {tile_in} in 6 GB")
    benchmark(work)
    info["fits"] = True
    info["useful_mpixel"] = tile_out**2 / 1e6
    info["peak_allocated_bytes"] = peak_bytes(work, device).allocated_bytes
    info["gflop"] = Layers(FastUNet(features=features), tile_in, tile_in).flop("train") / 1e9
    if benchmark.stats:  # none under --benchmark-disable
        seconds = benchmark.stats.stats.median
        info["useful_mpixel_per_s"] = info["useful_mpixel"] / seconds
        info["tflops"] = info["gflop"] / seconds / 1e3
        rate = torch.bfloat16 if "autocast" in precision else torch.float32
        info["share_of_matmul_roof"] = info["tflops"] / roof.convolution_tflops(rate)


@functools.cache
def counted(provider: str, precision: str) -> int:
    """The largest tile of the paper's net that a training step with momentum has room for in 6 GB."""
    dtype = torch.bfloat16 if "autocast" in precision else torch.float32
    if provider != "plain":
        with torch.device("meta"):
            ours = FastUNet(recompute="level" if "recompute" in provider else "none")
        return largest_tile(CARD_BYTES, ours, dtype=dtype, autocast="autocast" in precision)
    static = 2 * 4 * 31_030_658

    def fits(tile_in: int) -> bool:
        peak = dynamic_peak(PlainUNet, tile_in, dtype, autocast="autocast" in precision)
        return static + peak <= CARD_BYTES

    sizes = geometry.legal_sizes(188, 3000)
    low, high = 0, len(sizes)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(sizes[middle]) else (low, middle)
    return sizes[low]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("provider", PROVIDERS[1:])
def bench_area_in_6_gigabytes(benchmark: Any, provider: str, precision: str) -> None:
    """The time is the planner's; the answer is in extra_info."""
    ours, plain = counted(provider, precision), counted("plain", precision)
    assert ours > plain
    benchmark.group = f"largest tile of the paper's net in 6 GB, {precision}"
    info = benchmark.extra_info
    info["tile_in"], info["plain_tile_in"] = ours, plain
    outs = [geometry.output_size(n) for n in (ours, plain)]
    info["useful area over plain's"] = round((outs[0] / outs[1]) ** 2, 3)
    with torch.device("meta"):
        paper = FastUNet(recompute="level" if "recompute" in provider else "none")
    benchmark(lambda: largest_tile(CARD_BYTES, paper))
