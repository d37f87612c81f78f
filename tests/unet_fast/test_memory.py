"""The planner's bytes are those that torch's MemTracker counts for the very step, under fake tensors."""

import doctest
import time
from itertools import pairwise, product
from typing import Any

import pytest
import torch

from benchmarks.counted import dynamic_peak
from unet_fast import FastUNet, memory
from unet_fast.memory import estimate, largest_tile

WIDTHS = {"paper": (64, 128, 256, 512, 1024), "half": (32, 64, 128, 256, 512)}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)

# left to the slow lane
LARGE = (236, 380, 476, 1084, 2588)


def meta(**settings: Any) -> FastUNet:
    with torch.device("meta"):
        return FastUNet(**settings)


def _steps() -> list[Any]:
    """Tile, width, recomputation and dtype: each pair of any two, the dtype in turns, which is half of all."""
    steps = []
    for i, j, k in product(range(2 + len(LARGE)), range(2), range(2)):
        tile_in, width, recompute = (188, 572, *LARGE)[i], list(WIDTHS)[j], ("none", "level")[k]
        dtype = (torch.float32, torch.bfloat16)[(i + j + k) % 2]
        marks = pytest.mark.slow if tile_in in LARGE else ()
        name = f"{tile_in}-{width}-{recompute}-{dtype}"
        steps.append(pytest.param(tile_in, width, recompute, dtype, marks=marks, id=name))
    return steps


@pytest.mark.slow
@pytest.mark.parametrize(("tile_in", "width", "recompute", "dtype"), _steps())
def test_a_training_step_takes_what_was_predicted(tile_in: int, width: str, recompute: str, dtype: torch.dtype) -> None:
    settings = {"features": WIDTHS[width], "recompute": recompute}
    real = dynamic_peak(lambda: FastUNet(**settings), tile_in, dtype)
    assert estimate(meta(**settings), tile_in, dtype=dtype).dynamic == pytest.approx(real, rel=0.005)


@DTYPES
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tile_in", [188, 572, 2588])
def test_a_prediction_takes_what_was_predicted(tile_in: int, width: str, dtype: torch.dtype) -> None:
    real = dynamic_peak(lambda: FastUNet(features=WIDTHS[width]), tile_in, dtype, training=False)
    predicted = estimate(meta(features=WIDTHS[width]), tile_in, dtype=dtype, mode="predict")
    # fake tensors do not make the concatenation that real ones make for the length of a convolution
    assert predicted.dynamic - predicted.workspace <= real * 1.005
    assert predicted.dynamic >= real * 0.995


@pytest.mark.slow
@pytest.mark.parametrize("tile_in", [188, pytest.param(572, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "settings",
    [
        {"up_mode": "resize"},
        {"dropout": 0.5},
        {"dropout": 0.5, "recompute": "level"},
        {"up_activation": True, "last_up_channels": 128},
        {"out_channels": 12},
        {"features": (16, 32, 64)},
    ],
    ids=str,
)
def test_other_nets_take_what_was_predicted(tile_in: int, settings: dict[str, Any]) -> None:
    real = dynamic_peak(lambda: FastUNet(**settings), tile_in, torch.float32)
    assert estimate(meta(**settings), tile_in).dynamic == pytest.approx(real, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tile_in", "batch", "settings"),
    [
        (188, 1, {}),
        (572, 1, {"recompute": "level"}),
        ((204, 572), 2, {"features": WIDTHS["half"], "dropout": 0.5}),
        (188, 1, {"features": WIDTHS["half"], "up_mode": "resize", "up_activation": True, "last_up_channels": 128}),
        (92, 1, {"features": (16, 32, 64, 128)}),
    ],
    ids=str,
)
def test_a_training_step_under_autocast_takes_what_was_predicted(
    tile_in: int | tuple[int, int], batch: int, settings: dict[str, Any]
) -> None:
    real = dynamic_peak(lambda: FastUNet(**settings), tile_in, torch.bfloat16, batch=batch, autocast=True)
    predicted = estimate(meta(**settings), tile_in, dtype=torch.bfloat16, autocast=True, batch=batch)
    assert predicted.dynamic == pytest.approx(real, rel=0.005)


def test_a_prediction_under_autocast_takes_what_was_predicted() -> None:
    real = dynamic_peak(FastUNet, 572, torch.bfloat16, training=False, autocast=True)
    predicted = estimate(meta(), 572, dtype=torch.bfloat16, autocast=True, mode="predict")
    assert predicted.dynamic - predicted.workspace <= real * 1.005
    assert predicted.dynamic >= real * 0.995


def test_the_loss_of_many_classes_in_half_precision_takes_what_was_predicted() -> None:
    # log_softmax keeps its result alone: neither the logits nor their float32 copy are there in its backward
    settings: dict[str, Any] = {"features": WIDTHS["half"], "out_channels": 12}
    real = dynamic_peak(lambda: FastUNet(**settings), 572, torch.bfloat16, autocast=True)
    predicted = estimate(meta(**settings), 572, dtype=torch.bfloat16, autocast=True)
    assert predicted.dynamic == pytest.approx(real, rel=0.01)


def test_under_autocast_weights_and_what_the_optimizer_keeps_stay_in_the_parameters_dtype() -> None:
    mixed = estimate(meta(), 572, dtype=torch.bfloat16, autocast=True)
    single, half = (estimate(meta(), 572, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert (mixed.weights, mixed.optimizer) == (single.weights, single.optimizer)
    assert half.dynamic < mixed.dynamic < single.dynamic


def test_a_shallow_net_that_drops_and_recomputes_is_within_two_percent() -> None:
    # the dropped map of the bottom is not made again: counted so, or it would be 17 %
    settings = {"features": (16, 32), "dropout": 0.5, "recompute": "level"}
    for tile_in in (188, 412):
        real = dynamic_peak(lambda: FastUNet(**settings), tile_in, torch.float32)
        assert estimate(meta(**settings), tile_in).dynamic == pytest.approx(real, rel=0.02)


def test_batches_and_oblong_tiles() -> None:
    for tile_in, batch in (((204, 572), 1), ((236, 188), 3)):
        real = dynamic_peak(FastUNet, tile_in, torch.float32, batch=batch)
        assert estimate(meta(), tile_in, batch=batch).dynamic == pytest.approx(real, rel=0.005)


def test_the_ablation_without_skips_is_within_some_percent() -> None:
    real = dynamic_peak(lambda: FastUNet(skips=False), 188, torch.float32)
    assert estimate(meta(skips=False), 188).dynamic == pytest.approx(real, rel=0.03)


def test_a_prediction_drops_nothing_out() -> None:
    with_dropout, without = (estimate(meta(dropout=p), 188, mode="predict") for p in (0.5, 0.0))
    assert with_dropout == without


def test_parts_add_up() -> None:
    for mode in ("train", "predict"):
        found = estimate(meta(), 572, mode=mode, workspace=7, context=11)
        parts = (found.weights, found.optimizer, found.input, found.activations, found.gradients, found.workspace)
        assert found.total == sum(parts) + 11 == found.weights + found.optimizer + found.dynamic + found.context
    assert found.optimizer == found.gradients == 0
    one, two = (estimate(meta(), 572, optimizer=name).optimizer for name in ("momentum", "adam"))
    assert (one, two) == (4 * 31_030_658, 8 * 31_030_658)
    assert estimate(meta(), 572, optimizer="sgd").optimizer == 0


def test_layers_have_the_sizes_of_the_papers_figure() -> None:
    layers = estimate(meta(), 572).layers
    assert layers["down.0.conv1"] == 4 * 64 * 570**2
    assert layers["up.3.up"] == 4 * 512 * 56**2
    assert layers["head"] == 4 * 2 * 388**2


def test_a_tile_costs_next_to_no_time() -> None:
    net = meta()
    start = time.perf_counter()
    for tile_in in range(188, 988, 16):
        estimate(net, tile_in)
    assert (time.perf_counter() - start) / 50 < 0.01


@pytest.mark.parametrize("mode", ["train", "predict"])
def test_the_largest_tile_fits_and_the_next_does_not(mode: str) -> None:
    net = meta()
    for budget in (10**9, 4 * 10**9, 6 * 10**9, 24 * 10**9):
        tile_in = largest_tile(budget, net, mode=mode)
        assert estimate(net, tile_in, mode=mode).total <= budget < estimate(net, tile_in + 16, mode=mode).total


@pytest.mark.slow
def test_larger_tiles_need_more() -> None:
    for recompute in ("none", "level"):
        totals = [estimate(meta(), n, recompute=recompute).total for n in range(188, 1500, 16)]
        assert all(a < b for a, b in pairwise(totals))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: estimate(meta(), 573), r"^rows of tile_in 573 cannot be pooled"),
        (lambda: estimate(meta(), (572, 600)), r"^columns of tile_in 600 cannot be pooled"),
        (lambda: estimate(meta(padding="same"), 572), r"^model must have padding 'valid' for .*, got 'same'$"),
        (lambda: estimate(meta(), 572, mode="test"), r"^mode must be 'train' or 'predict', got 'test'$"),
        (lambda: estimate(meta(), 572, optimizer="lion"), r"^optimizer must be 'sgd' or 'momentum' or 'adam', got"),
        (lambda: estimate(meta(), 572, recompute="all"), r"^recompute must be 'none' or 'level', got 'all'$"),
        (lambda: estimate(meta(), 572, batch=0), r"^batch must be 1 or more, got 0$"),
        (lambda: estimate(meta(), 572, context=-1), r"^context must be 0 or more, got -1$"),
        (
            lambda: largest_tile(10**8, meta()),
            r"^a budget must be at least \d+ bytes, for the smallest tile, \d+ x \d+, got 100000000$",
        ),
    ],
)
def test_bad_input_is_refused_in_a_sentence(call: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()


def test_the_examples_in_the_docstrings_hold() -> None:
    result = doctest.testmod(memory)
    assert (result.failed, result.attempted > 2) == (0, True)
