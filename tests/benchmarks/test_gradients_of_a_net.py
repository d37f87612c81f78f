"""A small whole net, forward and backward on our kernels only: gradients as near to the exact ones as plain torch's."""

import pytest
import torch
from torch import Tensor, nn

import unet_kernels
from benchmarks.harness import channels_last, expect_as_close
from benchmarks.plain_unet import PlainUNet
from unet_fast import FastUNet

FEATURES = (16, 16, 32)
# what a step asks of ours: a derivative for each op of the net, and one for the window and the maxima of each level
DERIVATIVES = {"conv3x3_dx", "conv3x3_dweight", "up_conv_dx", "up_conv_dweight", "conv1x1_dx", "conv1x1_dweight"}
DERIVATIVES |= {"max_pool2x2_dx"}


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, *(pytest.param(each, marks=pytest.mark.gpu) for each in (torch.float16, torch.bfloat16))],
    ids=str,
)
def test_gradients_by_our_kernels_only_are_as_near_as_torchs(dtype: torch.dtype, device: torch.device) -> None:
    fast, plain, image = _nets(dtype, device)
    target = torch.randint(0, 2, (1, 4, 12), device=device)
    with unet_kernels.using("ours"), unet_kernels.recorded() as record:
        ours = _gradients(fast, image, target)
    assert {op for op, _, _ in record} >= DERIVATIVES
    assert not [each for each in record if "ATen" in each[2]]
    theirs, exact = _gradients(plain, image, target), _gradients(plain.double(), image.double(), target)
    for (name, parameter), *three in zip(fast.named_parameters(), ours, theirs, exact, strict=True):
        assert three[0].stride() == parameter.stride(), name
        # a ReLU that one net lets through and the other does not is in few parameters' gradients, and large there
        expect_as_close(*three, name, slack=4.0)
    expect_as_close(*(torch.cat([g.double().flatten() for g in each]) for each in (ours, theirs, exact)), "all")


@pytest.mark.gpu
def test_gradients_under_autocast_are_as_near_as_torchs_and_the_same_bits_again(device: torch.device) -> None:
    fast, plain, image = _nets(torch.float32, device)
    target = torch.randint(0, 2, (1, 4, 12), device=device)
    exact = _gradients(_like(plain).double(), image.double(), target)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        theirs = _gradients(plain, image, target)
        with unet_kernels.using("ours"):
            ours, again = (_gradients(fast, image, target) for _ in range(2))
    assert all(map(torch.equal, ours, again))
    expect_as_close(*(torch.cat([g.double().flatten() for g in each]) for each in (ours, theirs, exact)), "all")


def _nets(dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, nn.Module, Tensor]:
    fast = FastUNet(1, 2, FEATURES)
    with torch.no_grad():
        for name, parameter in fast.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(-0.1, 0.1)
    fast = fast.to(device, dtype)
    return fast, _like(fast), channels_last(torch.randn(1, 1, 44, 52).to(device, dtype))


def _like(net: nn.Module) -> nn.Module:
    like = PlainUNet(FEATURES).to(next(net.parameters()))
    like.load_state_dict(net.state_dict())
    return like


def _gradients(net: nn.Module, image: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    loss = unet_kernels.weighted_cross_entropy(net(image), target)
    return torch.autograd.grad(loss, list(net.parameters()))
