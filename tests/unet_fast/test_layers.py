"""Layers says what a net makes of a tile: its maps are those that hooks see, its FLOP those that torch counts."""

import doctest
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.proof.properties import given, settings, st
from tests.unet_fast.plain_unet import PlainUNet
from unet_fast import FastUNet, geometry, layers
from unet_fast.layers import Layers, Shape

NETS = st.fixed_dictionaries(
    {
        "features": st.lists(st.integers(1, 9), min_size=1, max_size=4),
        "in_channels": st.integers(1, 4),
        "out_channels": st.integers(1, 5),
        "up_mode": st.sampled_from(["deconv", "resize"]),
        "up_activation": st.booleans(),
        "last_up_channels": st.none() | st.integers(1, 9),
        "skips": st.booleans(),
        "dropout": st.sampled_from([0.0, 0.5]),
    }
)
few = settings(max_examples=20)
STEPS = st.tuples(st.integers(0, 4), st.integers(0, 4))


def meta(**settings: Any) -> FastUNet:
    with torch.device("meta"):
        return FastUNet(**settings)


def oblong(net: FastUNet, steps: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns, so many steps above the smallest legal size."""
    step = geometry.step_multiple(net.depth)
    smallest = geometry.legal_sizes(1, 20 * step, net.depth)[0]
    return smallest + steps[0] * step, smallest + steps[1] * step


class Convolutions(TorchDispatchMode):
    """Counts those that run forward, whoever called them: hooks miss what a checkpoint stops early."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += op in (torch.ops.aten.convolution.default, torch.ops.unet.up_conv.default)
        return op(*args, **(kwargs or {}))


def seen_by_hooks(net: FastUNet, x: Tensor) -> dict[str, Shape]:
    """Under the names of Layers: every convolution's map, what is pooled, and each skip as the way up gets it."""
    seen = {"input": Shape(*x.shape[1:])}

    def watch(name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda _module, _arguments, out: seen.update({name: Shape(*out.shape[1:])}))

    def watch_argument(name: str, module: nn.Module, place: int) -> None:
        module.register_forward_pre_hook(
            lambda _module, arguments: seen.update({name: Shape(*arguments[place].shape[1:])})
        )

    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            watch(name, module)
    for level in range(1, net.depth + 1):
        watch_argument(f"pool.{level}", net.down[level], 0)
    for level in range(net.depth):
        watch_argument(f"skip.{level}", net.up[level], 1)
    net(x)
    return seen


@given(NETS, STEPS, st.integers(1, 3))
@few
def test_maps_are_those_that_hooks_see(chosen: dict[str, Any], steps: tuple[int, int], batch: int) -> None:
    net = meta(**chosen)
    rows, columns = oblong(net, steps)
    found = Layers(net, rows, columns)
    assert found.maps == seen_by_hooks(net, torch.empty(batch, net.in_channels, rows, columns, device="meta"))
    assert all(shape.values == shape.channels * shape.rows * shape.columns for shape in found.maps.values())


@given(NETS, STEPS)
@few
def test_convolutions_are_those_of_the_net_and_have_its_weights(chosen: dict[str, Any], steps: tuple[int, int]) -> None:
    net = meta(**chosen)
    found = Layers(net, *oblong(net, steps)).convolutions
    weights = {name.removesuffix(".weight"): p.numel() for name, p in net.named_parameters() if name.endswith("weight")}
    assert {name: convolution.weight for name, convolution in found.items()} == weights


@given(NETS)
@few
def test_convolutions_come_in_the_order_of_the_forward(chosen: dict[str, Any]) -> None:
    net = meta(**chosen)
    rows, columns = oblong(net, (1, 0))
    seen = seen_by_hooks(net, torch.empty(1, net.in_channels, rows, columns, device="meta"))
    convolutions = Layers(net, rows, columns).convolutions
    assert list(convolutions) == [name for name in seen if name in convolutions]


@given(NETS, STEPS)
@few
def test_flop_with_deconv_are_those_that_torch_counts_for_plain_layers(
    chosen: dict[str, Any], steps: tuple[int, int]
) -> None:
    chosen = {**chosen, "up_mode": "deconv"}
    net = meta(**chosen)
    rows, columns = oblong(net, steps)
    found = Layers(net, rows, columns)
    with torch.device("meta"):
        plain, x = PlainUNet(**chosen), torch.empty(1, net.in_channels, rows, columns)
    with FlopCounterMode(display=False) as forward:
        logits = plain(x)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    assert found.flop("predict") == forward.get_total_flops()
    assert found.flop("train") == forward.get_total_flops() + backward.get_total_flops()


@given(NETS, STEPS)
@few
def test_flop_do_not_depend_on_which_side_is_rows(chosen: dict[str, Any], steps: tuple[int, int]) -> None:
    net = meta(**chosen)
    rows, columns = oblong(net, steps)
    assert Layers(net, rows, columns).flop() == Layers(net, columns, rows).flop()


@given(NETS, STEPS)
@few
def test_resize_by_phase_takes_nine_products_where_deconv_takes_four(
    chosen: dict[str, Any], steps: tuple[int, int]
) -> None:
    deconv, resize = (meta(**{**chosen, "up_mode": mode}) for mode in ("deconv", "resize"))
    tile = oblong(deconv, steps)
    one, other = Layers(deconv, *tile), Layers(resize, *tile)
    assert one.maps == other.maps
    for name, convolution in one.convolutions.items():
        ratio = 9 if name.endswith(".up") else 4
        assert 4 * other.convolutions[name].flop == ratio * convolution.flop


@given(NETS, STEPS)
@few
def test_again_adds_a_forward_of_all_but_the_head(chosen: dict[str, Any], steps: tuple[int, int]) -> None:
    net = meta(**chosen)
    found = Layers(net, *oblong(net, steps))
    added = found.flop("train", again=True) - found.flop("train")
    assert added == found.flop("predict") - found.convolutions["head"].flop
    assert found.flop("predict", again=True) == found.flop("predict")


@given(NETS)
@few
def test_recompute_level_makes_all_but_the_head_a_second_time(chosen: dict[str, Any]) -> None:
    net = FastUNet(**{**chosen, "recompute": "level"})
    rows, columns = oblong(net, (0, 0))
    with Convolutions() as counted:
        net(torch.zeros(1, net.in_channels, rows, columns)).sum().backward()
    assert counted.calls == 2 * len(Layers(net, rows, columns).convolutions) - 1


@pytest.mark.parametrize(("up_mode", "forward", "step"), [("deconv", 300.9, 902.2), ("resize", 314.9, 944.4)])
def test_the_papers_tile_takes_300_9_gflop_forward_and_902_2_a_step(up_mode: str, forward: float, step: float) -> None:
    found = Layers(meta(up_mode=up_mode), 572, 572)
    assert found.flop("predict") / 1e9 == pytest.approx(forward, abs=0.05)
    assert found.flop("train") / 1e9 == pytest.approx(step, abs=0.05)


def test_the_papers_maps_are_those_of_figure_1() -> None:
    maps = Layers(meta(), 572, 572).maps
    sides = [maps[f"down.{level}.conv2"].rows for level in range(5)]
    assert sides == [568, 280, 136, 64, 28]
    assert [maps[f"up.{level}.conv2"].columns for level in range(4)] == [388, 196, 100, 52]
    assert maps["skip.0"] == Shape(64, 392, 392)
    assert maps["head"] == Shape(2, 388, 388)


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(layers).failed == 0
