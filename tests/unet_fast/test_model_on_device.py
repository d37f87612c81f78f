"""FastUNet where the tests run (`--device cuda` on a GPU): the plain net's numbers, no waiting, one graph."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import unet_kernels as uk
from tests.proof.yardstick import assert_as_close_as
from tests.unet_fast.plain_unet import PlainUNet
from unet_fast import ElasticWarp, FastUNet, Replayed, TrainConfig, geometry, predict, synthetic, train
from unet_fast.files import write_tiff

FEATURES = (8, 16, 32)
TILE = geometry.legal_sizes(90, 110, 2)[0]


def _pair(device: torch.device, dtype: torch.dtype, up_mode: str) -> tuple[nn.Module, nn.Module, Tensor]:
    fast = FastUNet(3, 2, FEATURES, up_mode=up_mode).to(device, dtype)
    plain = PlainUNet(3, 2, FEATURES, up_mode=up_mode).to(device, dtype)
    plain.load_state_dict(fast.state_dict())
    return fast, plain, torch.rand(2, 3, TILE, TILE, dtype=dtype, device=device)


@pytest.mark.parametrize("up_mode", ["deconv", "resize"])
def test_logits_and_gradients_are_the_plain_nets(up_mode: str, device: torch.device) -> None:
    fast, plain, x = _pair(device, torch.float64, up_mode)
    results = []
    for net in (plain, fast):
        leaf = x.clone().requires_grad_()
        logits = net(leaf)
        results.append([logits, *torch.autograd.grad(logits.square().sum(), [leaf, *net.parameters()])])
    names = ["logits", "x", *dict(fast.named_parameters())]
    theirs = dict(zip(["logits", "x", *dict(plain.named_parameters())], results[0], strict=True))
    for name, ours in zip(names, results[1], strict=True):
        torch.testing.assert_close(ours, theirs[name], rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_trains(dtype: torch.dtype, device: torch.device) -> None:
    fast, _, x = _pair(device, torch.float32, "deconv")
    out = geometry.output_size(TILE, 2)
    target = torch.randint(0, 2, (2, out, out), device=device)
    with torch.autocast(device.type, dtype=dtype):
        logits = fast(x)
        loss = uk.weighted_cross_entropy(logits, target)
    loss.backward()
    assert (logits.dtype, loss.dtype) == (dtype, torch.float32)
    for parameter in fast.parameters():
        assert parameter.grad.isfinite().all()
        assert parameter.grad.stride() == parameter.stride()


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["automatic", "ours"])
@pytest.mark.parametrize("up_mode", ["deconv", "resize"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_forward_is_as_near_as_the_plain_nets(
    dtype: torch.dtype, up_mode: str, kernels: str, device: torch.device
) -> None:
    fast, plain, x = _pair(device, dtype, up_mode)
    with torch.no_grad(), uk.using(kernels), uk.recorded() as record:
        got = fast(x)
    with torch.no_grad():
        want, exact = plain(x), plain.double()(x.double())
    assert_as_close_as(want, got, exact)
    if kernels == "ours":
        assert not any("ATen" in way or way == "apart" for _, _, way in record)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_replayed_as_a_graph_it_gives_the_same_bits(dtype: torch.dtype, device: torch.device) -> None:
    fast, _, x = _pair(device, dtype, "deconv")
    replayed = Replayed(fast.eval(), after=2)
    with torch.no_grad(), uk.by_device_time():
        for _ in range(20):
            other = torch.rand_like(x)
            assert torch.equal(replayed(other), fast(other))
    assert not replayed.refused
    assert replayed._graph is not None


@pytest.mark.gpu
def test_a_training_step_never_waits_for_the_gpu(device: torch.device) -> None:
    fast, _, x = _pair(device, torch.float32, "deconv")
    out = geometry.output_size(TILE, 2)
    target = torch.randint(0, 2, (2, out, out), device=device)
    uk.weighted_cross_entropy(fast(x), target).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        uk.weighted_cross_entropy(fast(x), target).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_inference_is_captured_in_a_graph_and_replayed(device: torch.device) -> None:
    fast, _, x = _pair(device, torch.float32, "deconv")
    with torch.no_grad():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            fast(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            captured = fast(x)
        other = torch.rand_like(x)
        want = fast(other)
        x.copy_(other)
        graph.replay()
    torch.testing.assert_close(captured, want, rtol=1e-4, atol=1e-4)


def test_a_small_training_and_a_prediction_run_there(device: torch.device, tmp_path: Path) -> None:
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    for seed in range(3):
        image, instances = synthetic.cells(64, seed=seed, radius_px=(7.0, 9.0))
        write_tiff(tmp_path / "images" / f"{seed}.tif", image, "YX")
        write_tiff(tmp_path / "labels" / f"{seed}.tif", instances.astype(np.uint16), "YX")
    settings = {"features": (4, 8), "steps": 4, "validate_every": 2, "label_kind": "instance", "validation": 0.34}
    places = {name: tmp_path / name for name in ("images", "labels")}
    config = TrainConfig(**places, out=tmp_path / "run", device=device.type, **settings)
    result = train(config, progress=False)
    assert len(result.log) >= 2
    image, _ = synthetic.cells(90, seed=9)
    here = predict(result.model.to(device), image, tile_in=48, output="logits")
    there = predict(result.model.to("cpu"), image, tile_in=84, output="logits")
    np.testing.assert_allclose(here, there, atol=1e-3 * there.std())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32], ids=str)
def test_a_tile_drawn_where_the_image_lies_is_the_one_drawn_on_the_cpu(
    dtype: torch.dtype, device: torch.device
) -> None:
    grey, ids = synthetic.cells(128, seed=0)
    top = 1 if dtype.is_floating_point else torch.iinfo(dtype).max
    image = (torch.from_numpy(grey.astype(np.float32))[None] / float(grey.max()) * top).to(dtype)
    labels, warp = torch.from_numpy(ids.astype(np.int32)), ElasticWarp(foreground=0.5)
    for index in range(4):
        tiles = [
            warp.draw_tile(image.to(place), labels.to(place), 100, 60, ElasticWarp.generator(0, 0, index))
            for place in ("cpu", device)
        ]
        for here, there in zip(*tiles, strict=True):
            assert there.device.type == device.type
            assert torch.equal(here, there.cpu())
