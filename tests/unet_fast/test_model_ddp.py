"""Proves that DistributedDataParallel takes FastUNet as it is.

Two gloo processes train on the halves of a batch. After three steps their weights are the same bits, and close to those
of one process that saw the whole batch. In the workers every warning is an error: DDP warns, once and only there, when
a gradient does not come in the strides that its bucket was laid out for, and then copies it at every step.
"""

import itertools
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from unet_fast import FastUNet, geometry

RANKS, STEPS, SIDE = 2, 3, 44

# launching two processes takes seconds
pytestmark = pytest.mark.slow

# settings of the net, settings of DDP
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "deconv": ({"in_channels": 1}, {}),
    "resize, colour": ({"in_channels": 3, "up_mode": "resize"}, {}),
    "more weights than pixels": ({"features": (4, 96, 96)}, {}),
    "release": ({"up_activation": True, "last_up_channels": 8}, {"gradient_as_bucket_view": True}),
    "same": ({"padding": "same"}, {"static_graph": True}),
    "one class, no skips": ({"out_channels": 1, "skips": False}, {"bucket_cap_mb": 0.001}),
}


def build(config: dict[str, Any]) -> FastUNet:
    torch.manual_seed(11)
    return FastUNet(**{"features": (4, 8, 16), **config})


def batch_for(config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(12)
    x = torch.randn(2 * RANKS, config.get("in_channels", 1), SIDE, SIDE, generator=generator)
    side = SIDE if config.get("padding") == "same" else geometry.output_size(SIDE, 2)
    return x, torch.randn(2 * RANKS, config.get("out_channels", 2), side, side, generator=generator)


def train(model: nn.Module, x: Tensor, target: Tensor) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class Reversing(torch.autograd.Function):
    """A 1x1 convolution's weight as it is, its gradient in other strides: what DDP warns about."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return torch.empty_strided(dy.shape, (dy.shape[1], 1, 1, 1)).copy_(dy)


class Strange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty_strided((4, 3, 1, 1), (3, 1, 3, 3)).normal_())
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, Reversing.apply(self.weight), self.bias)


def work(rank: int, folder: str) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    results: dict[str, Any] = {}
    for name, (config, wrapping) in CASES.items():
        model = build(config)
        x, target = batch_for(config)
        mine = slice(2 * rank, 2 * rank + 2)
        losses = train(DistributedDataParallel(model, **wrapping), x[mine], target[mine])
        state = {key: value.numpy(force=True).copy() for key, value in model.state_dict().items()}
        strides = {key: (p.stride(), p.grad.stride()) for key, p in model.named_parameters()}
        results[name] = {"state": state, "losses": losses, "strides": strides}
    # the last one, because it warns only once a process
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(DistributedDataParallel(Strange()), torch.randn(1, 3, 5, 5), torch.zeros(1, 4, 5, 5))
    results["warned"] = [str(w.message).splitlines()[0] for w in caught]
    dist.destroy_process_group()
    Path(folder, f"rank{rank}.pickle").write_bytes(pickle.dumps(results))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank ended with; all cases in one launch, because a launch takes seconds."""
    folder = tmp_path_factory.mktemp("ddp")
    mp.spawn(work, args=(str(folder),), nprocs=RANKS)
    return [pickle.loads((folder / f"rank{rank}.pickle").read_bytes()) for rank in range(RANKS)]


each_case = pytest.mark.parametrize("name", CASES)


@each_case
def test_after_three_steps_all_ranks_have_the_same_bits(name: str, ranks: list[dict[str, Any]]) -> None:
    first, second = (rank[name]["state"] for rank in ranks)
    assert first.keys() == second.keys()
    assert [key for key in first if first[key].tobytes() != second[key].tobytes()] == []


@each_case
def test_after_three_steps_the_ranks_are_where_one_process_with_the_whole_batch_is(
    name: str, ranks: list[dict[str, Any]]
) -> None:
    config, _ = CASES[name]
    alone, before = build(config), build(config)
    losses = train(alone, *batch_for(config))
    shared = [sum(pair) / RANKS for pair in zip(*(rank[name]["losses"] for rank in ranks), strict=True)]
    assert shared == pytest.approx(losses, rel=1e-4)
    for key, value in alone.state_dict().items():
        moved = (value - before.state_dict()[key]).abs().max().item()
        off = (torch.from_numpy(ranks[0][name]["state"][key]) - value).abs().max().item()
        assert off <= 1e-3 * moved + 1e-7, key


@each_case
def test_the_ranks_saw_different_images_and_learnt(name: str, ranks: list[dict[str, Any]]) -> None:
    losses = [rank[name]["losses"] for rank in ranks]
    assert losses[0] != losses[1]
    assert sum(rank[-1] for rank in losses) < sum(rank[0] for rank in losses)


@each_case
def test_gradients_under_ddp_have_the_strides_of_their_parameters(name: str, ranks: list[dict[str, Any]]) -> None:
    for key, (own, grad) in itertools.chain.from_iterable(rank[name]["strides"].items() for rank in ranks):
        assert grad == own, key


def test_the_workers_would_have_seen_a_warning_about_strides(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert any("Grad strides do not match bucket view strides" in message for message in rank["warned"])
