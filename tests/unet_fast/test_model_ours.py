"""With ours only, a whole FastUNet runs on our kernels: every layer once, no convolution of ATen's, the same logits."""

from typing import Any

import pytest
import torch
from torch import Tensor

import unet_kernels
from tests.proof.yardstick import assert_as_close_as
from unet_fast import FastUNet
from unet_kernels import _triton

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


@pytest.mark.interpreter
@pytest.mark.skipif(not _triton.INTERPRETED, reason="on a GPU test_model_on_device runs the net")
def test_gradients_follow_from_our_forward() -> None:
    # the derivative is ATen's still: what it keeps is what ours gave
    net, x = _net(torch.float32)
    with unet_kernels.using("ours"), unet_kernels.recorded() as record:
        net(x).sum().backward()
    ours = [p.grad.clone() for p in net.parameters()]
    assert len(record) > len(LAYERS) - 2
    net.zero_grad()
    net(x).sum().backward()
    for got, p in zip(ours, net.parameters(), strict=True):
        torch.testing.assert_close(got, p.grad, rtol=1e-3, atol=1e-3)


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
