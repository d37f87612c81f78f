"""What a training step of FastUNet keeps, beside plain eager PyTorch: counted under fake tensors, byte for byte.

Dynamic peak: what a step holds at most above parameters and optimizer state, by torch's own MemTracker. Fake tensors
take the registered path of every op, which is CUDA's.
"""

import pytest
import torch

from benchmarks.counted import dynamic_peak
from tests.unet_fast.plain_unet import PlainUNet
from unet_fast import FastUNet


@pytest.fixture(scope="module")
def plain() -> dict[torch.dtype, int]:
    return {dtype: dynamic_peak(PlainUNet, 572, dtype) for dtype in (torch.float32, torch.bfloat16)}


def test_plain_pytorch_takes_what_it_was_said_to(plain: dict[torch.dtype, int]) -> None:
    # 806 MB, and 441 MB in bfloat16: without this the shares below would mean nothing
    assert {dtype: round(peak / 1e6) for dtype, peak in plain.items()} == {torch.float32: 806, torch.bfloat16: 441}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recompute", "dtype", "share"),
    [
        ("none", torch.float32, 0.83),
        ("none", torch.bfloat16, 0.76),
        ("level", torch.float32, 0.70),
        ("level", torch.bfloat16, 0.65),
    ],
    ids=str,
)
def test_a_step_of_the_papers_net_takes_less_than_plain_pytorch(
    recompute: str, dtype: torch.dtype, share: float, plain: dict[torch.dtype, int]
) -> None:
    assert dynamic_peak(lambda: FastUNet(recompute=recompute), 572, dtype) <= share * plain[dtype]


@pytest.mark.parametrize("settings", [{"dropout": 0.3}, {"up_mode": "resize"}, {"padding": "same"}], ids=str)
def test_what_is_made_again_has_the_same_bits(settings: dict[str, object]) -> None:
    torch.manual_seed(0)
    net, x = FastUNet(1, 2, (4, 8, 16), **settings), torch.randn(1, 1, 76, 60)
    gradients = []
    for net.recompute in ("none", "level"):
        torch.manual_seed(1)
        net.zero_grad()
        y = net(x)
        y.square().sum().backward()
        gradients.append([y.detach(), *(p.grad for p in net.parameters())])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_recompute_is_a_choice_of_two_and_no_setting() -> None:
    with pytest.raises(ValueError, match=r"^recompute must be 'none' or 'level', got 'all'$"):
        FastUNet(features=(4, 8), recompute="all")
    assert "recompute" not in FastUNet(features=(4, 8), recompute="level").settings


def test_pools_keep_no_indices() -> None:
    kept: list[torch.Tensor] = []
    net = FastUNet(1, 2, (4, 8, 16))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        net(torch.randn(1, 1, 60, 60))
    assert not [t.shape for t in kept if not t.is_floating_point()]
