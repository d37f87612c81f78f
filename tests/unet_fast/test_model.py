"""Proves that FastUNet is the U-Net of the paper, and that it keeps what its page promises.

The net and every gradient equal an independently written plain U-Net in float64; its parameters are named, counted,
shaped, laid out and initialised as the design fixes; dropout sits where the release has it; NaN and shifts travel as
the architecture says; and what cannot be computed is refused in one sentence.
"""

import copy
import io
import math
import random as rng
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

from tests.unet_fast.plain_unet import PlainUNet
from unet_fast import FastUNet, geometry


@pytest.fixture(autouse=True)
def one_thread():
    """Nets this small lose time on threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch.set_default_dtype(torch.float32)


def bias_all(model: nn.Module) -> None:
    """Biases begin at 0; a forgotten or misplaced one shows only when they are not."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.1, 0.2)


def twins(*args: Any, **config: Any) -> tuple[FastUNet, PlainUNet]:
    """FastUNet and the plain net with the same parameters, in float64."""
    fast, plain = FastUNet(*args, **config).double(), PlainUNet(*args, **config).double()
    bias_all(fast)
    plain.load_state_dict(fast.state_dict(), strict=True)
    return fast, plain


def assert_equal_up_to_rounding(actual: Tensor, expected: Tensor, what: str) -> None:
    """rtol 1e-10; where a sum cancels, rounding is judged by the largest value beside it."""
    atol = 1e-12 * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=atol, msg=lambda m: f"{what}: {m}")


def assert_same_net(fast: FastUNet, plain: PlainUNet, x: Tensor, masks: dict[int, Tensor] | None = None) -> None:
    """Outputs, every parameter's gradient and the input's gradient agree, for a random cotangent."""
    x_plain = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    expected = plain(x_plain, masks)
    cotangent = torch.randn(expected.shape, dtype=x.dtype)
    expected.backward(cotangent)
    x_fast = x.detach().clone().requires_grad_()
    actual = fast(x_fast)
    assert_equal_up_to_rounding(actual, expected, "output")
    actual.backward(cotangent)
    assert_equal_up_to_rounding(x_fast.grad, x_plain.grad, "gradient of the input")
    wanted = dict(plain.named_parameters())
    for name, parameter in fast.named_parameters():
        assert_equal_up_to_rounding(parameter.grad, wanted[name].grad, f"gradient of {name}")


def input_for(model: FastUNet, *, batch: int = 1, tile: tuple[int, int] = (44, 44)) -> Tensor:
    dtype = next(model.parameters()).dtype
    return torch.randn(batch, model.in_channels, *tile, dtype=dtype)


# parity

CONFIGS = {
    "the paper's choices": ({"features": (4, 8, 16)}, (1, 1, 44, 60)),
    "the release's choices": (
        {"features": (4, 8, 16), "up_activation": True, "last_up_channels": 8},
        (1, 1, 60, 44),
    ),
    "resize": ({"features": (4, 8, 16), "up_mode": "resize"}, (2, 1, 44, 48)),
    "resize with everything on": (
        {
            "in_channels": 3,
            "out_channels": 5,
            "features": (4, 6, 8),
            "up_mode": "resize",
            "up_activation": True,
            "last_up_channels": 7,
        },
        (1, 3, 48, 44),
    ),
    "no skips": ({"features": (4, 8, 16), "skips": False}, (1, 1, 44, 44)),
    "no skips, resize, another last width": (
        {"features": (4, 8), "skips": False, "up_mode": "resize", "last_up_channels": 5},
        (2, 1, 20, 26),
    ),
    "depth 0": ({"in_channels": 3, "features": (5,)}, (2, 3, 5, 9)),
    "depth 3": ({"features": (2, 3, 4, 5), "out_channels": 5}, (1, 1, 92, 100)),
    "a single class": ({"features": (4, 8), "out_channels": 1}, (1, 1, 18, 24)),
    # these reach the weight gradient that is written for layers with more weights than pixels
    "a wide bottom": ({"features": (4, 8, 96)}, (1, 1, 44, 44)),
    "a wide bottom, two images": ({"features": (4, 8, 96)}, (2, 1, 44, 44)),
    "wide on the way up, where there is a skip": ({"features": (4, 96, 96)}, (1, 1, 44, 44)),
    "wide on the way up without a skip": ({"features": (4, 96, 96), "skips": False}, (1, 1, 44, 48)),
    "wide and channels falling": ({"features": (96, 90), "up_mode": "resize"}, (1, 1, 18, 18)),
    "same, even": ({"features": (4, 8, 16), "padding": "same"}, (1, 1, 16, 24)),
    "same, odd at every level": ({"features": (4, 8, 16), "padding": "same"}, (2, 1, 19, 23)),
    "same, odd, resize": (
        {"in_channels": 3, "features": (4, 8, 16), "padding": "same", "up_mode": "resize"},
        (1, 3, 17, 30),
    ),
    "same, the smallest there is": ({"features": (3, 4, 5, 6), "padding": "same"}, (1, 1, 8, 9)),
    "same without skips": (
        {"features": (4, 8), "padding": "same", "skips": False, "up_activation": True, "last_up_channels": 3},
        (1, 1, 7, 9),
    ),
    "same, depth 0": ({"features": (4,), "padding": "same"}, (1, 1, 1, 3)),
}


@pytest.mark.parametrize(("config", "shape"), CONFIGS.values(), ids=CONFIGS.keys())
def test_the_net_and_all_its_gradients_equal_the_plain_one(config: dict[str, Any], shape: tuple[int, ...]) -> None:
    fast, plain = twins(**config)
    assert_same_net(fast, plain, torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("up_mode", ["deconv", "resize"])
def test_the_layout_of_the_input_changes_nothing(up_mode: str, layout: torch.memory_format) -> None:
    fast, plain = twins(3, 2, (4, 8, 16), up_mode=up_mode)
    assert_same_net(fast, plain, torch.randn(2, 3, 44, 48, dtype=torch.float64).contiguous(memory_format=layout))


def test_an_input_that_is_a_window_of_a_larger_image_gives_what_its_copy_gives() -> None:
    fast, plain = twins(3, 2, (4, 8, 16))
    window = torch.randn(2, 3, 60, 70, dtype=torch.float64)[:, :, 7:51, 9:57]
    assert not window.is_contiguous()
    assert_equal_up_to_rounding(fast(window), plain(window.contiguous()), "output")


def drawn_case(seed: int) -> tuple[dict[str, Any], tuple[int, ...]]:
    """A configuration and an input shape, any combination of what may be set."""
    draw = rng.Random(seed)
    depth = draw.randint(0, 3)
    config = {
        "in_channels": draw.choice([1, 3]),
        "out_channels": draw.choice([1, 2, 5]),
        "features": tuple(draw.randint(2, 6) for _ in range(depth + 1)),
        "padding": draw.choice(["valid", "same"]),
        "up_mode": draw.choice(["deconv", "resize"]),
        "up_activation": draw.choice([False, True]),
        "last_up_channels": draw.choice([None, 1, 3, 9]),
        "skips": draw.choice([False, True]),
    }
    smallest = geometry.legal_sizes(0, 200, depth)[0]
    legal = geometry.legal_sizes(smallest, smallest + 16, depth)
    sides = legal if config["padding"] == "valid" else range(2**depth, 2**depth + 14)
    return config, (draw.randint(1, 2), config["in_channels"], draw.choice(sides), draw.choice(sides))


# hypothesis is not on the machine with the GPU, so the draws are our own
@pytest.mark.parametrize("seed", range(60), ids="draw {}".format)
def test_any_configuration_equals_the_plain_net(seed: int) -> None:
    config, shape = drawn_case(seed)
    fast, plain = twins(**config)
    assert_same_net(fast, plain, torch.randn(shape, dtype=torch.float64))


def test_the_draws_reach_every_value_of_every_setting() -> None:
    drawn = [drawn_case(seed) for seed in range(60)]
    for name, values in {
        "in_channels": {1, 3},
        "out_channels": {1, 2, 5},
        "padding": {"valid", "same"},
        "up_mode": {"deconv", "resize"},
        "up_activation": {False, True},
        "last_up_channels": {None, 1, 3, 9},
        "skips": {False, True},
    }.items():
        assert {config[name] for config, _ in drawn} == values
    assert {len(config["features"]) for config, _ in drawn} == {1, 2, 3, 4}
    assert {shape[0] for _, shape in drawn} == {1, 2}
    assert sum(rows != columns for _, (_, _, rows, columns) in drawn) > 20
    assert sum(rows % 2 for _, (_, _, rows, _) in drawn) > 10


@pytest.mark.parametrize("up_mode", ["deconv", "resize"])
def test_in_float32_the_output_is_as_close_to_the_truth_as_the_plain_nets(up_mode: str) -> None:
    fast, plain = twins(1, 2, (8, 16, 32), up_mode=up_mode)
    x = torch.randn(1, 1, 60, 60, dtype=torch.float64)
    truth = plain(x)
    off_plain = (plain.float()(x.float()) - truth).abs().max().item()
    off_fast = (fast.float()(x.float()) - truth).abs().max().item()
    assert off_fast <= max(4 * off_plain, 1e-5)


@pytest.mark.parametrize("up_mode", ["deconv", "resize"])
def test_the_second_derivative_is_that_of_the_plain_net(up_mode: str) -> None:
    fast, plain = twins(1, 2, (4, 96, 96), up_mode=up_mode)
    x = torch.randn(1, 1, 44, 44, dtype=torch.float64)
    for model in (fast, plain):
        seen = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(seen).pow(2).sum(), seen, create_graph=True)
        slope.pow(2).sum().backward()
    wanted = dict(plain.named_parameters())
    # the head's bias only shifts what is squared
    for name, parameter in fast.named_parameters():
        assert_equal_up_to_rounding(parameter.grad, wanted[name].grad, f"gradient of {name}")


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_an_empty_batch_gives_an_empty_batch(padding: str) -> None:
    out = FastUNet(1, 3, (4, 8, 16), padding=padding)(torch.zeros(0, 1, 44, 48))
    assert out.shape == {"valid": (0, 3, 4, 8), "same": (0, 3, 44, 48)}[padding]


# what it consists of


def published_names(depth: int) -> list[str]:
    layers = [f"down.{level}.conv{k}" for level in range(depth + 1) for k in (1, 2)]
    layers += [f"up.{level}.{part}" for level in range(depth) for part in ("up", "conv1", "conv2")]
    return sorted(f"{layer}.{kind}" for layer in [*layers, "head"] for kind in ("weight", "bias"))


def test_the_paper_net_has_31030658_parameters_and_the_release_31100354() -> None:
    with torch.device("meta"):
        paper, release = FastUNet.paper(), FastUNet.release()
    assert sum(p.numel() for p in paper.parameters()) == 31_030_658
    assert sum(p.numel() for p in release.parameters()) == 31_100_354
    assert {p.device.type for p in paper.parameters()} == {"meta"}


@pytest.mark.parametrize("up_mode", ["deconv", "resize"])
def test_the_state_dict_of_the_paper_net_has_the_fixed_names_and_shapes_and_nothing_else(up_mode: str) -> None:
    with torch.device("meta"):
        state = FastUNet(up_mode=up_mode).state_dict()
    widths = [64, 128, 256, 512, 1024]
    shapes: dict[str, tuple[int, ...]] = {"head.weight": (2, 64, 1, 1), "head.bias": (2,)}
    for level, width in enumerate(widths):
        shapes[f"down.{level}.conv1.weight"] = (width, [1, *widths][level], 3, 3)
        shapes[f"down.{level}.conv2.weight"] = (width, width, 3, 3)
        shapes[f"down.{level}.conv1.bias"] = shapes[f"down.{level}.conv2.bias"] = (width,)
    for level, width in enumerate(widths[:-1]):
        shapes[f"up.{level}.up.weight"] = {
            "deconv": (2 * width, width, 2, 2),
            "resize": (width, 2 * width, 2, 2),
        }[up_mode]
        shapes[f"up.{level}.conv1.weight"] = (width, 2 * width, 3, 3)
        shapes[f"up.{level}.conv2.weight"] = (width, width, 3, 3)
        for part in ("up", "conv1", "conv2"):
            shapes[f"up.{level}.{part}.bias"] = (width,)
    assert {name: tuple(value.shape) for name, value in state.items()} == shapes
    assert sorted(state) == published_names(4)
    assert {value.dtype for value in state.values()} == {torch.float32}


def test_the_last_up_convolution_of_the_release_has_128_channels() -> None:
    with torch.device("meta"):
        state = FastUNet.release().state_dict()
    assert state["up.0.up.weight"].shape == (128, 128, 2, 2)
    assert state["up.0.conv1.weight"].shape == (64, 192, 3, 3)
    assert state["up.1.up.weight"].shape == (256, 128, 2, 2)


def test_without_skips_only_the_convolutions_after_the_skip_are_narrower() -> None:
    with torch.device("meta"):
        whole, ablated = FastUNet.paper().state_dict(), FastUNet(skips=False).state_dict()
    assert list(whole) == list(ablated)
    changed = {name for name in whole if whole[name].shape != ablated[name].shape}
    assert changed == {f"up.{level}.conv1.weight" for level in range(4)}
    assert ablated["up.0.conv1.weight"].shape == (64, 64, 3, 3)


def test_there_are_parameters_and_no_buffers_and_every_layer_is_an_ordinary_torch_layer() -> None:
    model = FastUNet(features=(4, 8, 16))
    assert list(model.buffers()) == []
    assert sorted(model.state_dict()) == sorted(name for name, _ in model.named_parameters()) == published_names(2)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    assert sum(p.numel() for m in layers for p in m.parameters()) == sum(p.numel() for p in model.parameters())


def test_the_paper_net_has_23_convolutional_layers() -> None:
    with torch.device("meta"):
        model = FastUNet.paper()
    assert sum(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in model.modules()) == 23


def test_the_settings_can_be_read_back_under_both_names() -> None:
    model = FastUNet(3, 5, (4, 8, 16, 32))
    assert (model.in_channels, model.out_channels) == (3, 5)
    assert (model.n_channels, model.n_classes) == (3, 5)
    assert model.depth == 3
    assert model.features == (4, 8, 16, 32)


def test_paper_and_release_take_channels_and_classes() -> None:
    with torch.device("meta"):
        for model in (FastUNet.paper(3, 5), FastUNet.release(3, 5)):
            assert (model.in_channels, model.out_channels, model.depth) == (3, 5, 4)
            assert model.head.weight.shape[0] == 5


def test_features_may_be_any_iterable() -> None:
    wanted = {name: value.shape for name, value in FastUNet(features=(4, 8)).state_dict().items()}
    for features in ([4, 8], iter([4, 8]), range(4, 9, 4)):
        assert {name: value.shape for name, value in FastUNet(features=features).state_dict().items()} == wanted


# fake and meta tensors


def strides_by_layer(model: FastUNet, x: Tensor) -> dict[str, tuple[Any, ...]]:
    """(shape, strides, dtype) of what each layer hands on."""
    seen: dict[str, tuple[Any, ...]] = {}
    handles = [
        module.register_forward_hook(
            lambda _module, _args, y, name=name: seen.update({name: (tuple(y.shape), y.stride(), y.dtype)})
        )
        for name, module in model.named_modules()
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return seen


def test_the_paper_net_runs_on_fake_tensors_from_572_to_388() -> None:
    with FakeTensorMode():
        model = FastUNet.paper()
        out = model(torch.zeros(1, 1, 572, 572))
    assert out.shape == (1, 2, 388, 388)
    assert out.dtype == torch.float32
    # channels_last, as real tensors give it (the next test)
    assert out.stride() == (2 * 388 * 388, 1, 2 * 388, 2)
    assert model.down[0].conv1.weight.stride() == (9, 1, 3, 1)
    assert model.down[1].conv2.weight.stride() == (9 * 128, 1, 3 * 128, 128)


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("up_mode", ["deconv", "resize"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_layer_has_the_same_strides_and_dtype_on_fake_tensors_as_on_real_ones(
    up_mode: str, padding: str, dtype: torch.dtype
) -> None:
    def build() -> FastUNet:
        # under fake tensors torch itself refuses model.to(dtype)
        torch.set_default_dtype(dtype)
        model = FastUNet(1, 2, (8, 16, 32), up_mode=up_mode, padding=padding, last_up_channels=12)
        torch.set_default_dtype(torch.float32)
        return model

    real = strides_by_layer(build(), torch.zeros(2, 1, 44, 48, dtype=dtype))
    with FakeTensorMode():
        fake = strides_by_layer(build(), torch.zeros(2, 1, 44, 48, dtype=dtype))
    assert fake == real


@pytest.mark.parametrize("up_mode", ["deconv", "resize"])
def test_training_on_fake_tensors_gives_gradients_of_the_parameters_shape_and_dtype(up_mode: str) -> None:
    with FakeTensorMode():
        model = FastUNet(1, 2, (8, 96, 96), up_mode=up_mode)
        model(torch.zeros(1, 1, 44, 44)).sum().backward()
        for parameter in model.parameters():
            assert parameter.grad.shape == parameter.shape
            assert parameter.grad.dtype == parameter.dtype


def test_the_smallest_tile_of_the_paper_net_has_real_strides_equal_to_the_fake_ones() -> None:
    torch.set_num_threads(2)
    with torch.no_grad():
        real = strides_by_layer(FastUNet.paper().eval(), torch.zeros(1, 1, 188, 188))
        with FakeTensorMode():
            fake = strides_by_layer(FastUNet.paper().eval(), torch.zeros(1, 1, 188, 188))
    assert real[""][0] == (1, 2, 4, 4)
    assert fake == real


# initialisation


def spread(weight: Tensor) -> tuple[float, float, float]:
    """(mean over std, std, kurtosis)."""
    values = weight.detach().double().flatten()
    std = values.std().item()
    return values.mean().item() / std, std, ((values - values.mean()) / std).pow(4).mean().item()


def wide_net(up_mode: str, last_up_channels: int | None = None) -> FastUNet:
    return FastUNet(3, 64, (192, 128), up_mode=up_mode, last_up_channels=last_up_channels)


# name of a weight -> incoming values of one output, from the design page
INCOMING = {
    "3x3 of the image": ("deconv", "down.0.conv1.weight", 9 * 3),
    "3x3": ("deconv", "down.0.conv2.weight", 9 * 192),
    "3x3 to the bottom": ("deconv", "down.1.conv1.weight", 9 * 192),
    "3x3 of the concatenation": ("deconv", "up.0.conv1.weight", 9 * 384),
    "deconv": ("deconv", "up.0.up.weight", 128),
    "resize": ("resize", "up.0.up.weight", 4 * 128),
    "head": ("deconv", "head.weight", 192),
}


@pytest.mark.parametrize(("up_mode", "name", "incoming"), INCOMING.values(), ids=INCOMING.keys())
def test_weights_begin_normal_with_mean_0_and_std_root_of_two_over_the_incoming_values(
    up_mode: str, name: str, incoming: int
) -> None:
    weight = wide_net(up_mode).state_dict()[name]
    mean, std, kurtosis = spread(weight)
    error = 4 / math.sqrt(weight.numel())
    assert abs(mean) < error
    assert std == pytest.approx(math.sqrt(2 / incoming), rel=error)
    # 3 for a normal distribution, 1.8 for a uniform one
    assert kurtosis == pytest.approx(3, abs=24 / math.sqrt(weight.numel()) * 5)


def test_the_first_layer_of_a_grey_image_counts_nine_incoming_values() -> None:
    weight = FastUNet(1, 2, (512,)).down[0].conv1.weight
    assert spread(weight)[1] == pytest.approx(math.sqrt(2 / 9), rel=0.04)


def test_the_two_modes_of_up_convolution_differ_in_scale_by_two() -> None:
    deconv, resize = (spread(wide_net(mode).up[0].up.weight)[1] for mode in ("deconv", "resize"))
    assert deconv / resize == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("up_mode", ["deconv", "resize"])
def test_every_bias_begins_at_exactly_zero(up_mode: str) -> None:
    biases = [p for name, p in FastUNet(3, 5, (4, 8, 16), up_mode=up_mode).named_parameters() if name.endswith("bias")]
    assert len(biases) == 6 + 6 + 1
    assert all(torch.equal(bias, torch.zeros_like(bias)) for bias in biases)


def test_one_seed_gives_one_net_and_another_seed_another() -> None:
    nets = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        nets.append(torch.cat([p.detach().flatten() for p in FastUNet(features=(4, 8)).parameters()]))
    assert torch.equal(nets[0], nets[1])
    assert not torch.equal(nets[0], nets[2])


def test_reset_parameters_draws_again_in_the_same_layout() -> None:
    model = FastUNet(features=(4, 8))
    before = copy.deepcopy(model.state_dict())
    for module in model.modules():
        getattr(module, "reset_parameters", lambda: None)()
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters() if not name.endswith("bias"))
    assert_channels_last(model)


# memory layout


def nhwc_strides(shape: torch.Size) -> tuple[int, ...]:
    _, c, h, w = shape
    return c * h * w, 1, w * c, c


def assert_channels_last(model: nn.Module) -> None:
    """Exactly the strides of channels_last, also where sizes of 1 would let others pass as such."""
    weights = {name: p for name, p in model.named_parameters() if p.dim() == 4}
    assert weights
    assert {name: p.stride() for name, p in weights.items()} == {
        name: nhwc_strides(p.shape) for name, p in weights.items()
    }


def train_step(model: FastUNet, x: Tensor | None = None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    model(input_for(model) if x is None else x).pow(2).mean().backward()
    optimizer.step()


LAYOUTS = {
    "deconv, grey": {"in_channels": 1},
    "deconv, colour": {"in_channels": 3},
    "resize, grey": {"in_channels": 1, "up_mode": "resize"},
    "one class": {"out_channels": 1},
    "one feature": {"features": (1, 1, 1), "last_up_channels": 1},
    "same": {"padding": "same"},
    "wide": {"features": (4, 96, 96)},
}


@pytest.mark.parametrize("config", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_weights_lie_in_channels_last_memory_and_stay_there(config: dict[str, Any]) -> None:
    model = FastUNet(**{"features": (4, 8, 16), **config})
    assert_channels_last(model)
    assert_channels_last(copy.deepcopy(model))
    train_step(model)
    assert_channels_last(model)
    other = FastUNet(**{"features": (4, 8, 16), **config})
    other.load_state_dict(model.state_dict())
    assert_channels_last(other)
    for convert in (model.double, model.half, model.bfloat16, model.float):
        assert_channels_last(convert())
    assert_channels_last(model.to(memory_format=torch.channels_last))


def test_the_first_weight_of_a_grey_net_has_strides_9_1_3_1() -> None:
    assert FastUNet(1, 2, (4, 8)).down[0].conv1.weight.stride() == (9, 1, 3, 1)
    with torch.device("meta"):
        assert FastUNet.paper().down[0].conv1.weight.stride() == (9, 1, 3, 1)


@pytest.mark.parametrize("config", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("batch", [1, 2], ids="batch {}".format)
def test_gradients_come_in_the_strides_of_their_parameters(config: dict[str, Any], batch: int) -> None:
    model = FastUNet(**{"features": (4, 8, 16), **config})
    for _ in range(2):  # the second time they are added to what is there
        model(input_for(model, batch=batch, tile=(44, 48))).pow(2).mean().backward()
        strides = {name: (p.stride(), p.grad.stride()) for name, p in model.named_parameters()}
        assert [name for name, (own, grad) in strides.items() if own != grad] == []


def test_a_state_dict_of_contiguous_tensors_loads_and_gives_the_same_net() -> None:
    model, other = FastUNet(3, 2, (4, 8, 16)), FastUNet(3, 2, (4, 8, 16))
    contiguous = {name: value.contiguous() for name, value in model.state_dict().items()}
    assert all(value.is_contiguous() for value in contiguous.values())
    assert other.load_state_dict(contiguous).missing_keys == []
    assert_channels_last(other)
    x = input_for(model)
    assert torch.equal(other(x), model(x))


def test_contiguous_tensors_put_in_place_of_the_weights_still_compute_the_same() -> None:
    model, other = FastUNet(3, 2, (4, 8, 16)), FastUNet(3, 2, (4, 8, 16))
    contiguous = {name: value.contiguous() for name, value in model.state_dict().items()}
    other.load_state_dict(contiguous, assign=True)
    x = input_for(model)
    torch.testing.assert_close(other(x), model(x))
    train_step(other, x)


def test_weights_survive_a_file() -> None:
    model, other = FastUNet(1, 2, (4, 8, 16)), FastUNet(1, 2, (4, 8, 16))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_channels_last(other)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_a_deep_copy_shares_no_memory() -> None:
    model = FastUNet(1, 2, (4, 8, 16))
    twin = copy.deepcopy(model)
    x = input_for(model)
    before = twin(x)
    train_step(model, x)
    assert torch.equal(twin(x), before)
    assert not torch.equal(model(x), before)


# dropout


class Record(TorchFunctionMode):
    """Every call of F.dropout: (channels of the map, rate) where it drops, nothing where it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, float]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            settings = dict(zip(("input", "p", "training", "inplace"), args, strict=False)) | kwargs
            if settings.get("training", True):
                self.calls.append((settings["input"].shape[1], settings.get("p", 0.5)))
        return func(*args, **kwargs)


def test_the_release_drops_half_of_the_two_deepest_levels_in_training_and_nothing_in_eval() -> None:
    with torch.device("meta"):
        model, x = FastUNet.release(), torch.zeros(1, 1, 188, 188)
        with Record() as training:
            model(x)
        with Record() as evaluating:
            model.eval()(x)
        with Record() as paper:
            FastUNet.paper()(x)
    assert training.calls == [(512, 0.5), (1024, 0.5)]
    assert evaluating.calls == []
    assert paper.calls == []


def watched(model: FastUNet, x: Tensor) -> dict[str, Tensor]:
    """By name: what each level's convolutions make, what it hands on, what the next pools and what the skip carries."""
    seen: dict[str, Tensor] = {}
    handles = []
    for level, down in enumerate(model.down):
        handles += [
            down.conv2.register_forward_hook(lambda _m, _a, y, level=level: seen.update({f"made {level}": y})),
            down.register_forward_hook(lambda _m, _a, y, level=level: seen.update({f"handed on {level}": y})),
            down.register_forward_pre_hook(lambda _m, a, level=level: seen.update({f"pooled into {level}": a[0]})),
        ]
    for level, up in enumerate(model.up):
        handles.append(up.register_forward_pre_hook(lambda _m, a, level=level: seen.update({f"skip {level}": a[1]})))
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_the_dropped_map_reaches_both_the_pool_and_the_skip(padding: str) -> None:
    model = FastUNet(1, 2, (8, 16, 32, 32), dropout=0.5, padding=padding).train()
    seen = watched(model, torch.rand(1, 1, 124, 116))
    for level in (2, 3):
        made, handed = seen[f"made {level}"], seen[f"handed on {level}"]
        assert not torch.equal(made, handed)
        kept = handed != 0
        torch.testing.assert_close(handed[kept], 2 * made[kept])
    for level in (0, 1):
        assert torch.equal(seen[f"made {level}"], seen[f"handed on {level}"])
    for level in (1, 2, 3):
        assert torch.equal(seen[f"pooled into {level}"], F.max_pool2d(seen[f"handed on {level - 1}"], 2))
    for level in (0, 1, 2):
        skip, handed = seen[f"skip {level}"], seen[f"handed on {level}"]
        top, left = ((whole - part) // 2 for whole, part in zip(handed.shape[2:], skip.shape[2:], strict=True))
        assert torch.equal(skip, handed[:, :, top : top + skip.shape[2], left : left + skip.shape[3]])


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8], ids="rate {}".format)
def test_dropout_drops_at_its_rate_and_scales_what_it_keeps(rate: float) -> None:
    model = FastUNet(1, 2, (32, 32), dropout=rate).train()
    seen = watched(model, torch.rand(2, 1, 64, 64))
    for level in (0, 1):
        alive = seen[f"made {level}"] > 0
        made, handed = seen[f"made {level}"][alive], seen[f"handed on {level}"][alive]
        dropped = (handed == 0).double().mean().item()
        assert dropped == pytest.approx(rate, abs=4 * math.sqrt(rate * (1 - rate) / made.numel()))
        torch.testing.assert_close(handed[handed != 0], made[handed != 0] / (1 - rate))


def test_dropout_changes_nothing_in_eval_and_something_in_train() -> None:
    with_dropout, without = FastUNet(1, 2, (4, 8, 16), dropout=0.5), FastUNet(1, 2, (4, 8, 16))
    without.load_state_dict(with_dropout.state_dict())
    x = input_for(without)
    assert torch.equal(with_dropout.eval()(x), without(x))
    with_dropout.train()
    assert not torch.equal(with_dropout(x), with_dropout(x))
    torch.manual_seed(3)
    first = with_dropout(x)
    torch.manual_seed(3)
    assert torch.equal(with_dropout(x), first)


@pytest.mark.parametrize("config", [{}, {"up_mode": "resize"}, {"padding": "same"}], ids=["deconv", "resize", "same"])
def test_with_the_same_dropout_mask_outputs_and_gradients_equal_the_plain_net(config: dict[str, Any]) -> None:
    fast, plain = twins(1, 2, (4, 8, 16), dropout=0.4, **config)
    fast.train()
    x = torch.randn(2, 1, 44, 48, dtype=torch.float64)
    torch.manual_seed(5)
    seen = watched(fast, x)
    masks = {level: (seen[f"handed on {level}"] != 0).double() / (1 - 0.4) for level in (1, 2)}
    # assert_same_net draws a cotangent first: what matters is that the forward sees the same generator again
    x_fast, x_plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.manual_seed(5)
    actual, expected = fast(x_fast), plain(x_plain, masks)
    assert_equal_up_to_rounding(actual, expected, "output")
    actual.pow(2).sum().backward()
    expected.pow(2).sum().backward()
    assert_equal_up_to_rounding(x_fast.grad, x_plain.grad, "gradient of the input")
    wanted = dict(plain.named_parameters())
    for name, parameter in fast.named_parameters():
        assert_equal_up_to_rounding(parameter.grad, wanted[name].grad, f"gradient of {name}")


# how values travel


def footprint(touched: Tensor, model: FastUNet, up_mode: str) -> Tensor:
    """Which outputs depend on the touched pixels [1, 1, H, W], followed as booleans through the layers."""

    def convolved(mask: Tensor) -> Tensor:
        return F.max_pool2d(F.max_pool2d(mask, 3, stride=1), 3, stride=1)

    def doubled(mask: Tensor) -> Tensor:
        mask = mask.repeat_interleave(2, 2).repeat_interleave(2, 3)
        padded = F.pad(mask, (0, 1, 0, 1), mode="replicate")
        return mask if up_mode == "deconv" else F.max_pool2d(padded, 2, stride=1)

    kept, mask = [], touched
    for level in range(model.depth + 1):
        mask = convolved(F.max_pool2d(mask, 2) if level else mask)
        kept.append(mask)
    for level in reversed(range(model.depth)):
        mask = doubled(mask)
        margin = [(have - want) // 2 for have, want in zip(kept[level].shape[2:], mask.shape[2:], strict=True)]
        skip = kept[level][:, :, margin[0] : margin[0] + mask.shape[2], margin[1] : margin[1] + mask.shape[3]]
        mask = convolved(torch.maximum(mask, skip))
    return mask.bool()


@pytest.mark.parametrize("up_mode", ["deconv", "resize"])
@pytest.mark.parametrize(
    "pixel",
    [(0, 0), (30, 30), (31, 45), (50, 63), (67, 75)],
    ids=["corner", "even", "odd", "off centre", "last corner"],
)
def test_a_nan_pixel_spoils_exactly_the_outputs_that_see_it(pixel: tuple[int, int], up_mode: str) -> None:
    model = FastUNet(1, 2, (4, 8, 16), up_mode=up_mode)
    x = torch.rand(1, 1, 68, 76)
    clean = model(x)
    touched = torch.zeros_like(x)
    x[(0, 0, *pixel)], touched[(0, 0, *pixel)] = math.nan, 1.0
    spoiled = footprint(touched, model, up_mode)
    assert 0 < spoiled.sum() < spoiled.numel()
    out = model(x)
    assert torch.equal(out.isnan(), spoiled.expand_as(out))
    assert torch.equal(out[~out.isnan()], clean[~out.isnan()])


@pytest.mark.parametrize(
    "config", [{}, {"features": (4, 96, 96)}, {"up_mode": "resize"}], ids=["deconv", "wide", "resize"]
)
@pytest.mark.parametrize("power", [1, 2], ids=["a loss that is linear", "a loss that squares"])
def test_a_nan_in_a_bias_is_seen_in_every_output_and_in_the_gradients_where_torch_has_it(
    power: int, config: dict[str, Any]
) -> None:
    fast, plain = twins(**{"features": (4, 8, 16), **config})
    x = input_for(fast)
    for model in (fast, plain):
        with torch.no_grad():
            model.get_parameter("down.2.conv2.bias").fill_(math.nan)
        out = model(x)
        assert out.isnan().all()
        out.pow(power).sum().backward()
    assert fast.head.weight.grad.isnan().all()
    wanted = dict(plain.named_parameters())
    for name, parameter in fast.named_parameters():
        assert torch.equal(parameter.grad.isnan(), wanted[name].grad.isnan()), name


def test_the_images_of_a_batch_know_nothing_of_each_other() -> None:
    model = FastUNet(1, 2, (4, 8, 16)).double()
    x = input_for(model, batch=3)
    x[1] = math.nan
    out = model(x)
    assert torch.equal(out.isnan().flatten(1).any(1), torch.tensor([False, True, False]))
    for n in (0, 2):
        assert_equal_up_to_rounding(out[n : n + 1], model(x[n : n + 1]), f"image {n}")


@pytest.mark.parametrize("shift", [(4, 0), (0, 8), (12, 4)], ids=str)
@pytest.mark.parametrize("up_mode", ["deconv", "resize"])
def test_shifting_the_image_by_a_multiple_of_the_pooling_grid_shifts_the_output(
    up_mode: str, shift: tuple[int, int]
) -> None:
    model = FastUNet(1, 2, (4, 8, 16), up_mode=up_mode).double()
    bias_all(model)
    image = torch.randn(1, 1, 88, 88, dtype=torch.float64)
    here = model(image[:, :, :68, :68])
    there = model(image[:, :, shift[0] : shift[0] + 68, shift[1] : shift[1] + 68])
    # the repeated edge of "resize" spoils 2^depth - 1 rows and columns at the bottom and right
    last = here.shape[2] - (0 if up_mode == "deconv" else 2**model.depth - 1)
    moved = here[:, :, shift[0] : last, shift[1] : last]
    assert_equal_up_to_rounding(there[:, :, : last - shift[0], : last - shift[1]], moved, "overlap")


@pytest.mark.parametrize("shift", [1, 2, 3], ids=str)
def test_shifting_by_less_than_the_pooling_grid_changes_the_output(shift: int) -> None:
    model = FastUNet(1, 2, (4, 8, 16)).double()
    image = torch.randn(1, 1, 88, 88, dtype=torch.float64)
    here, there = model(image[:, :, :68, :68]), model(image[:, :, shift : shift + 68, :68])
    assert not torch.allclose(here[:, :, shift:], there[:, :, :-shift], rtol=1e-3, atol=1e-3)


def test_resize_spoils_no_more_rows_than_the_design_says_and_not_fewer() -> None:
    model = FastUNet(1, 2, (4, 8, 16), up_mode="resize").double()
    bias_all(model)
    image = torch.randn(1, 1, 88, 68, dtype=torch.float64)
    tile, taller = model(image[:, :, :68]), model(image)
    differs = (tile - taller[:, :, : tile.shape[2]]).abs().amax(dim=(0, 1, 3)) > 1e-9
    assert differs.nonzero().flatten().tolist() == list(range(tile.shape[2] - 3, tile.shape[2]))


@pytest.mark.parametrize(("rows", "columns"), [(188, 204), (572, 188), (572, 588)])
def test_the_output_is_184_smaller_at_depth_4(rows: int, columns: int) -> None:
    with torch.device("meta"):
        out = FastUNet.paper()(torch.zeros(1, 1, rows, columns))
    assert out.shape == (1, 2, rows - 184, columns - 184)
    assert out.shape[2:] == (geometry.output_size(rows), geometry.output_size(columns))


@pytest.mark.slow
@pytest.mark.parametrize("depth", range(5), ids="depth {}".format)
def test_same_returns_the_size_of_the_input_whatever_it_is(depth: int) -> None:
    with torch.device("meta"):
        model = FastUNet(1, 3, (2,) * (depth + 1), padding="same")
        for extra in range(40):
            size = (2**depth + extra, 2**depth + 7 * extra % 40)
            assert model(torch.zeros(1, 1, *size)).shape == (1, 3, *size)


# what is refused

BAD_INPUTS: dict[str, tuple[dict[str, Any], Any, type[Exception], str]] = {
    "a numpy array": (
        {},
        np.zeros((1, 1, 44, 44), np.float32),
        TypeError,
        "x must be a torch.Tensor [N, 1, H, W], got ndarray",
    ),
    "None": ({}, None, TypeError, "x must be a torch.Tensor [N, 1, H, W], got NoneType"),
    "no batch axis": ({}, torch.zeros(1, 44, 44), ValueError, "x must have shape [N, 1, H, W], got [1, 44, 44]"),
    "a volume": (
        {},
        torch.zeros(1, 1, 44, 44, 44),
        ValueError,
        "x must have shape [N, 1, H, W], got [1, 1, 44, 44, 44]",
    ),
    "colour for a grey net": (
        {},
        torch.zeros(1, 3, 44, 44),
        ValueError,
        "x must have shape [N, 1, H, W], got [1, 3, 44, 44]",
    ),
    "grey for a colour net": (
        {"in_channels": 3},
        torch.zeros(2, 1, 44, 44),
        ValueError,
        "x must have shape [N, 3, H, W], got [2, 1, 44, 44]",
    ),
    "channels last as numpy has them": (
        {"in_channels": 3},
        torch.zeros(1, 44, 44, 3),
        ValueError,
        "x must have shape [N, 3, H, W], got [1, 44, 44, 3]",
    ),
    "an integer image": (
        {},
        torch.zeros(1, 1, 44, 44, dtype=torch.uint8),
        TypeError,
        "x must be floating, got uint8; .float() / 255 puts a uint8 image between 0 and 1",
    ),
    "rows between two legal sizes": (
        {},
        torch.zeros(1, 1, 46, 44),
        ValueError,
        "rows of x 46 cannot be pooled 2 times; nearest are 44 and 48",
    ),
    "columns between two legal sizes": (
        {},
        torch.zeros(1, 1, 44, 47),
        ValueError,
        "columns of x 47 cannot be pooled 2 times; nearest are 44 and 48",
    ),
    "too few rows": (
        {},
        torch.zeros(1, 1, 40, 44),
        ValueError,
        "rows of x 40 is too small to be pooled 2 times; the smallest is 44",
    ),
    "too few columns": (
        {},
        torch.zeros(1, 1, 44, 3),
        ValueError,
        "columns of x 3 is too small to be pooled 2 times; the smallest is 44",
    ),
    "no rows": (
        {},
        torch.zeros(1, 1, 0, 44),
        ValueError,
        "rows of x 0 is too small to be pooled 2 times; the smallest is 44",
    ),
    "too few rows for same": (
        {"padding": "same"},
        torch.zeros(1, 1, 3, 44),
        ValueError,
        "rows of x 3 cannot be pooled 2 times; the smallest for padding 'same' is 4",
    ),
    "too few columns for same": (
        {"padding": "same"},
        torch.zeros(1, 1, 44, 3),
        ValueError,
        "columns of x 3 cannot be pooled 2 times; the smallest for padding 'same' is 4",
    ),
}


@pytest.mark.parametrize(("config", "x", "error", "sentence"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_an_input_that_cannot_be_taken_is_refused_in_this_sentence(
    config: dict[str, Any], x: Any, error: type[Exception], sentence: str
) -> None:
    model = FastUNet(**{"features": (4, 8, 16), **config})
    with pytest.raises(error) as caught:
        model(x)
    assert str(caught.value) == sentence


def test_the_sizes_that_are_refused_for_512_are_508_and_524_at_depth_4() -> None:
    with torch.device("meta"):
        model = FastUNet.paper()
        with pytest.raises(ValueError, match=r"^rows of x 512 cannot be pooled 4 times; nearest are 508 and 524$"):
            model(torch.zeros(1, 1, 512, 512))


def test_an_image_of_another_dtype_is_refused_by_name_and_not_converted() -> None:
    with pytest.raises(TypeError, match="float64"):
        FastUNet(features=(4, 8))(torch.zeros(1, 1, 20, 20, dtype=torch.float64))


BAD_SETTINGS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no channels": ({"in_channels": 0}, ValueError, "in_channels must be at least 1, got 0"),
    "negative classes": ({"out_channels": -2}, ValueError, "out_channels must be at least 1, got -2"),
    "fractional channels": ({"in_channels": 1.0}, TypeError, "in_channels must be a whole number, got 1.0"),
    "channels True": ({"in_channels": True}, TypeError, "in_channels must be a whole number, got True"),
    "classes in words": ({"out_channels": "2"}, TypeError, "out_channels must be a whole number, got '2'"),
    "one number for features": (
        {"features": 64},
        TypeError,
        "features must be a sequence of channels, one per level, got 64",
    ),
    "no features": ({"features": ()}, ValueError, "features must name the channels of at least one level, got none"),
    "a zero feature": ({"features": (4, 0, 16)}, ValueError, "features[1] must be at least 1, got 0"),
    "a fractional feature": ({"features": (4, 8.0)}, TypeError, "features[1] must be a whole number, got 8.0"),
    "no last up channels": ({"last_up_channels": 0}, ValueError, "last_up_channels must be at least 1, got 0"),
    "fractional last up channels": (
        {"last_up_channels": 1.5},
        TypeError,
        "last_up_channels must be a whole number, got 1.5",
    ),
    "unknown padding": ({"padding": "reflect"}, ValueError, "padding must be 'valid' or 'same', got 'reflect'"),
    "padding as a number": ({"padding": 1}, ValueError, "padding must be 'valid' or 'same', got 1"),
    "unknown up_mode": ({"up_mode": "bilinear"}, ValueError, "up_mode must be 'deconv' or 'resize', got 'bilinear'"),
    "all dropped": (
        {"dropout": 1.0},
        ValueError,
        "dropout must be a probability, at least 0 and below 1, got 1.0",
    ),
    "negative dropout": (
        {"dropout": -0.1},
        ValueError,
        "dropout must be a probability, at least 0 and below 1, got -0.1",
    ),
    "dropout NaN": (
        {"dropout": math.nan},
        ValueError,
        "dropout must be a probability, at least 0 and below 1, got nan",
    ),
}


@pytest.mark.parametrize(("config", "error", "sentence"), BAD_SETTINGS.values(), ids=BAD_SETTINGS.keys())
def test_a_setting_that_makes_no_sense_is_refused_in_this_sentence(
    config: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error) as caught:
        FastUNet(**{"features": (4, 8), **config})
    assert str(caught.value) == sentence


# the page says: "TypeError: a setting has the wrong type"
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dropout", "0.5"),
        ("dropout", None),
        ("dropout", True),
        ("skips", "no"),
        ("up_activation", "no"),
        ("skips", None),
    ],
    ids="{}".format,
)
def test_a_setting_of_the_wrong_type_is_a_type_error(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=re.escape(name)):
        FastUNet(features=(4, 8), **{name: value})


def test_settings_after_the_features_must_be_named() -> None:
    with pytest.raises(TypeError, match="positional"):
        FastUNet(1, 2, (4, 8), "same")


def test_the_repr_says_what_it_is() -> None:
    shown = repr(FastUNet(3, 5, (4, 8), padding="same"))
    assert shown.startswith("FastUNet(\n  3, 5, features=(4, 8), padding='same'")


def test_backward_hooks_of_a_level_are_called_when_it_is_done() -> None:
    net, called = FastUNet(features=(4, 8, 16)), []
    for kind in ("up", "down"):
        for level, module in enumerate(getattr(net, kind)):
            module.register_full_backward_hook(lambda *_, name=f"{kind}.{level}": called.append(name))
    net(torch.randn(1, 1, 60, 60, requires_grad=True)).sum().backward()
    assert called == ["up.0", "up.1", "down.2", "down.1", "down.0"]
