"""With ours only, a whole FastUNet runs on our kernels: every layer once, no convolution of ATen's, the same logits."""

import functools
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

import unet_kernels
from tests.proof.yardstick import assert_as_close_as, assert_same_bits
from unet_fast import FastUNet, synthetic
from unet_fast.model import Head
from unet_kernels import _conv3x3_fwd, _dweight, _triton
from unet_kernels._conv3x3_fwd import Blocks

_up_conv = importlib.import_module("unet_kernels.up_conv")

pytestmark = pytest.mark.usefixtures("on_device")


def _net(dtype: torch.dtype, **settings: Any) -> tuple[FastUNet, Tensor]:
    torch.manual_seed(7)
    net = FastUNet(2, 3, (16, 16, 32), **settings).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(-0.1, 0.1)
    return net, torch.rand(1, 2, 44, 52).to(dtype)


def _logits(net: FastUNet, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x)


LAYERS = [
    *("conv3x3_relu", "conv3x3_relu_pool", "conv3x3_relu", "conv3x3_relu_pool", "conv3x3_relu", "conv3x3_relu"),
    *("up_conv", "conv3x3_relu_cat", "conv3x3_relu", "up_conv", "conv3x3_relu_cat", "conv3x3_relu", "conv1x1"),
]


@pytest.mark.interpreter
@pytest.mark.skipif(not _triton.INTERPRETED, reason="on a GPU test_model_on_device runs the net")
@pytest.mark.parametrize(
    ("dtype", "chip", "up_mode"),
    [
        (torch.float16, 90, "deconv"),
        pytest.param(torch.float16, 80, "deconv", marks=pytest.mark.slow),
        pytest.param(torch.float32, 90, "resize", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_whole_forward_runs_on_our_kernels(
    dtype: torch.dtype, chip: int, up_mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.interpreter import GridExecutor

    net, x = _net(dtype, up_mode=up_mode)
    launched = []
    launch = GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        launched.append(self.fn.__name__)
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    ours = unet_kernels.using("ours")
    with ours, _triton.pretending(chip), unet_kernels.recorded() as record, torch.profiler.profile() as profile:
        got = _logits(net, x)
    # each layer once, by one launch (by two where its steps are shared out), and none by ATen
    assert [op for op, _, _ in record] == LAYERS
    finishing = launched.count("_finish_kernel")
    assert len(launched) - finishing == len(LAYERS)
    assert finishing == sum("splits" in way for _, _, way in record)
    convolutions = {
        event.key for event in profile.key_averages() if "conv" in event.key and event.key.startswith("aten")
    }
    assert not convolutions
    assert any("descriptors" in way for _, _, way in record) == (chip == 90 and dtype == torch.float16)
    assert_as_close_as(_logits(net, x), got, _logits(net.double(), x.double()))


FORWARD = [
    *("conv3x3_relu", "conv3x3_relu", "max_pool2x2") * 2,
    *("conv3x3_relu", "conv3x3_relu"),
    *("up_conv", "conv3x3_relu_cat", "conv3x3_relu") * 2,
    "conv1x1",
]
# the way up: of two maps two gradients; the way down: the image needs none
BACKWARD = [
    *("conv1x1_dx", "conv1x1_dweight"),
    *("conv3x3_dx", "conv3x3_dweight", "conv3x3_dx", "conv3x3_dx", "conv3x3_dweight", "up_conv_dx", "up_conv_dweight")
    * 2,
    *("conv3x3_dx", "conv3x3_dweight", "conv3x3_dx", "conv3x3_dweight", "max_pool2x2_dx") * 2,
    *("conv3x3_dx", "conv3x3_dweight", "conv3x3_dweight"),
]


def _gradients(net: FastUNet, x: Tensor, kernels: str) -> list[Tensor]:
    net.zero_grad()
    torch.manual_seed(3)
    with unet_kernels.using(kernels):
        logits = net(x)
        (
            logits * torch.linspace(-1, 1, logits.numel(), device=x.device).view(logits.shape).to(x.dtype)
        ).sum().backward()
    return [p.grad.clone() for p in net.parameters()]


@pytest.mark.interpreter
@pytest.mark.skipif(not _triton.INTERPRETED, reason="on a GPU test_model_on_device runs the net")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"dropout": 0.5}, marks=pytest.mark.slow),
        pytest.param({"up_mode": "resize", "up_activation": True}, marks=pytest.mark.slow),
        pytest.param({"recompute": "level", "dropout": 0.3}, marks=pytest.mark.slow),
        pytest.param({"skips": False}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_whole_step_runs_on_our_kernels(settings: dict[str, Any]) -> None:
    net, x = _net(torch.float32, **settings)
    net.train()
    with unet_kernels.recorded() as record, torch.profiler.profile() as profile:
        ours = _gradients(net, x, "ours")
    if not settings:
        assert [op for op, _, _ in record] == FORWARD + BACKWARD
    convolutions = {e.key for e in profile.key_averages() if "conv" in e.key and e.key.startswith("aten")}
    assert not convolutions
    pooling = {e.key for e in profile.key_averages() if "max_pool" in e.key and e.key.startswith("aten")}
    assert not pooling
    for got, want, p in zip(ours, _gradients(net, x, "automatic"), net.parameters(), strict=True):
        assert float((got - want).norm()) <= 1e-5 * float(want.norm())
        assert got.stride() == p.stride()


@pytest.mark.interpreter
@pytest.mark.slow
@pytest.mark.skipif(not _triton.INTERPRETED, reason="on a GPU test_model_on_device runs the net")
def test_a_step_repeats_bit_for_bit() -> None:
    net, x = _net(torch.float16)
    for a, b in zip(_gradients(net, x, "ours"), _gradients(net, x, "ours"), strict=True):
        assert_same_bits(a, b)


@pytest.mark.interpreter
@pytest.mark.slow
@pytest.mark.skipif(not _triton.INTERPRETED, reason="on a GPU test_model_on_device runs the net")
def test_of_a_frozen_layer_nothing_is_computed() -> None:
    net, x = _net(torch.float32)
    everything = dict(zip(dict(net.named_parameters()), _gradients(net, x, "ours"), strict=True))
    net.down.requires_grad_(False)
    net.up[1].conv1.weight.requires_grad_(False)
    net.zero_grad()
    with unet_kernels.recorded() as record, unet_kernels.using("ours"):
        logits = net(x)
        (logits * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).sum().backward()
    gradients = [op for op, _, _ in record if op.endswith(("_dx", "_dweight"))]
    # four convolutions on the way up, one of them with a filter that stays; no skip leads to a parameter
    assert gradients.count("conv3x3_dweight") == 3
    assert gradients.count("conv3x3_dx") == 4
    assert (gradients.count("up_conv_dx"), gradients.count("up_conv_dweight")) == (1, 2)
    assert "max_pool2x2_dx" not in gradients
    for name, p in net.named_parameters():
        assert (p.grad is None) == (not p.requires_grad)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, everything[name], rtol=1e-5, atol=1e-5)


@pytest.mark.interpreter
@pytest.mark.slow
@pytest.mark.skipif(not _triton.INTERPRETED, reason="on a GPU test_model_on_device runs the net")
def test_who_looks_at_a_gradient_sees_it_unmasked() -> None:
    net, x = _net(torch.float32)
    seen: list[Tensor] = []

    def look(kernels: str) -> list[Tensor]:
        handle = net.down[0].conv2.register_full_backward_hook(lambda module, dx, dy: seen.append(dy[0].clone()))
        gradients = _gradients(net, x, kernels)
        handle.remove()
        return gradients

    for got, want in zip(look("ours"), look("automatic"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-4)
    # where the ReLU let nothing through, a gradient arrives all the same
    y = net.down[0](x)
    assert (seen[0][y == 0] != 0).any()


@pytest.mark.interpreter
@pytest.mark.slow
@pytest.mark.skipif(not _triton.INTERPRETED, reason="on a GPU test_model_on_device runs the net")
def test_under_autocast_gradients_are_never_rounded_to_sixteen_bits() -> None:
    net, x = _net(torch.float32)

    def step(kernels: str) -> list[Tensor]:
        net.zero_grad()
        with unet_kernels.using(kernels):
            with torch.autocast("cpu", dtype=torch.float16):
                logits = net(x)
            logits.float().square().mean().backward()
        return [p.grad.clone() for p in net.parameters() if p.dim() == 4]

    def halves(gradients: list[Tensor]) -> float:
        values = torch.cat([g[g != 0] for g in gradients])
        return float((values == values.half().float()).float().mean())

    assert halves(step("ours")) < 0.1
    assert halves(step("automatic")) == 1.0
    # the same gradients: where a ReLU's 16-bit result rounds to zero, both lose it
    for got, want in zip(step("ours"), step("automatic"), strict=True):
        assert float((got - want).norm()) <= 0.1 * float(want.norm())


@pytest.mark.interpreter
@pytest.mark.slow
@pytest.mark.skipif(not _triton.INTERPRETED, reason="on a GPU test_model_on_device runs the net")
def test_sixty_steps_on_our_kernels_go_as_the_references_do(monkeypatch: pytest.MonkeyPatch) -> None:
    # large blocks cost the interpreter the least
    large = functools.partial(Blocks, "pointers", 1024, 16, 16, 4, 2)
    monkeypatch.setattr(_conv3x3_fwd, "blocks_for", lambda *_: [large()])
    monkeypatch.setattr(_dweight, "blocks_for", lambda *a: [large(taps=9 if a[3] == _dweight.CONV3X3 else 1)])
    monkeypatch.setattr(_up_conv, "blocks_for", lambda *_: [_up_conv.Blocks(1024, 16, 16, 4, 2)])
    images = [synthetic.cells(32, seed=step, radius_px=(4, 7)) for step in range(60)]

    def trained(kernels: str) -> list[float]:
        torch.manual_seed(7)
        net = FastUNet(1, 2, (8, 16))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
        losses = []
        with unet_kernels.using(kernels):
            for pixels, instances in images:
                image = torch.from_numpy(pixels)[None, None, 4:-4, 4:-4].float() / 255
                target = torch.from_numpy(instances > 0)[None, 12:-12, 12:-12].long()
                loss = unet_kernels.weighted_cross_entropy(net(image), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        return losses

    ours, reference = trained("ours"), trained("automatic")
    assert sum(ours[-10:]) < 0.7 * sum(ours[:10]), "it learns nothing"
    for got, want in zip(ours, reference, strict=True):
        assert got == pytest.approx(want, rel=2e-3)


class _PlainHead(Head):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("how", ["hook", "pre-hook", "backward hook", "subclass", "patched", "none"])
def test_masks_are_promised_where_nobody_looks_only(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = _net(torch.float32)
    monkeypatch.setattr(unet_kernels, "chooses_derivatives", lambda x: True)
    head = net.head
    if how == "hook":
        head.register_forward_hook(lambda *_: None)
    elif how == "pre-hook":
        head.register_forward_pre_hook(lambda *_: None)
    elif how == "backward hook":
        head.register_full_backward_hook(lambda *_: None)
    elif how == "subclass":
        net.head = _PlainHead(16, 3)
    elif how == "patched":
        net.up[0].conv1.forward = lambda x, skip: net.up[0].conv1.weight.sum() + x[:, :, 1:-1, 1:-1]
    assert net._masks(x) == (how == "none")
    # and then the promises are kept: the gradients are those of a net without
    if how == "none":
        promised = _gradients(net, x, "automatic")
        monkeypatch.undo()
        for a, b in zip(promised, _gradients(net, x, "automatic"), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    else:
        assert net(x).shape == (1, 3, 4, 12)


def test_a_hook_sees_its_layer_whatever_else_would_be_faster() -> None:
    net, x = _net(torch.float32)
    seen: list[Tensor] = []
    handle = net.down[0].conv2.register_forward_hook(lambda module, args, y: seen.append(y))
    want = _logits(net, x)
    handle.remove()
    [y] = seen
    assert y.shape == (1, 16, 40, 48)
    assert torch.equal(_logits(net, x), want)


def test_dropout_still_drops_without_gradients() -> None:
    net, x = _net(torch.float32, dropout=0.5)
    want = _logits(net, x)
    assert not torch.equal(_logits(net.train(), x), want)
    assert torch.equal(_logits(net.eval(), x), want)


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("up_mode", ["deconv", "resize"])
def test_with_and_without_gradients_the_logits_are_the_same(up_mode: str, skips: bool) -> None:
    net, x = _net(torch.float64, up_mode=up_mode, skips=skips)
    torch.testing.assert_close(_logits(net, x), net(x).detach(), rtol=1e-12, atol=1e-12)
