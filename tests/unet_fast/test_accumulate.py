"""Proves that a step over whole images, tile by tile, is the step over them in one piece, whatever the tile.

The gradient in one piece is made here without tiles, in float64: one forward pass over each image as it was drawn, one
loss, one backward. What then is left to a run is shown on its log and on its bits.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from unet_fast import (
    BorderWeightedCrossEntropy,
    FastUNet,
    TrainConfig,
    checkpoints,
    geometry,
    synthetic,
    tiling,
    train,
    training,
)
from unet_fast import run as running
from unet_fast.data import read_labelled
from unet_fast.errors import BadInput
from unet_fast.files import write_tiff
from unet_fast.measuring import Meter
from unet_fast.run import Run
from unet_fast.sampling import Sampler
from unet_fast.storage import MODEL
from unet_fast.task import prepare

CPU = torch.device("cpu")

# rows and columns: all different, oblong both ways, none of them a tile's size
SHAPES = ((40, 40), (29, 58), (55, 26), (37, 45))


def write_cells(place: Path, shapes: tuple[tuple[int, int], ...]) -> Path:
    for kind in ("images", "labels"):
        (place / kind).mkdir(parents=True)
    for seed, (rows, columns) in enumerate(shapes):
        image, instances = synthetic.cells(64, seed=seed, cells=9, radius_px=(5.0, 7.0))
        middle = slice((64 - rows) // 2, (64 + rows) // 2), slice((64 - columns) // 2, (64 + columns) // 2)
        write_tiff(place / "images" / f"{seed}.tif", np.ascontiguousarray(image[middle]), "YX")
        write_tiff(place / "labels" / f"{seed}.tif", instances[middle].astype(np.uint16), "YX")
    return place


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images of touching cells, of one size, with instances."""
    return write_cells(tmp_path_factory.mktemp("drawn"), ((64, 64),) * 4)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images of different sizes."""
    return write_cells(tmp_path_factory.mktemp("mixed"), SHAPES)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's picture and the processes of its trials take longer than these runs."""
    monkeypatch.setattr(running, "write_report", lambda place: None)
    monkeypatch.setattr(training, "Apart", lambda *_: lambda function, *arguments: function(*arguments))


def config(place: Path, out: Path, **more: Any) -> TrainConfig:
    usual: dict[str, Any] = {
        "label_kind": "instance", "features": (2, 3), "steps": 7, "validate_every": 3, "log_every": 2,
        "validation": 0.25, "device": "cpu", "accumulate": "image", "dropout": 0.0, "clip": 0.0,
    }  # fmt: skip
    return TrainConfig(images=place / "images", labels=place / "labels", out=out, **{**usual, **more})


def in_float64(settings: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run that has not begun, whose net and images are float64: sums in another order then differ by nothing."""
    task = prepare(settings, CPU)
    run = Run(settings.with_(classes=task.classes), task, meter=Meter(CPU))
    run.model.double()
    drawn = run.sampler.drawn
    monkeypatch.setattr(
        run.sampler, "drawn", lambda step, _=None: [(i.double(), cells, t) for i, cells, t in drawn(step)]
    )
    return run


def gradients(model: FastUNet) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert len(found) == len(list(model.parameters()))
    return found


def in_one_piece(run: Run, step: int) -> tuple[float, list[Tensor]]:
    """Loss and gradient of the images of a step, each by one forward pass.

    Up-convolution by "resize" spoils the last 2^depth - 1 rows and columns that come out: they are left out.
    """
    spoiled = 2**run.config.depth - 1 if run.config.up_mode == "resize" else 0
    loss = BorderWeightedCrossEntropy(
        run.config.border_weight, run.config.border_sigma, class_weight=run.task.weights,
        region=run.config.border_region, gap=run.loss.gap, reduction="none",
    )  # fmt: skip
    run.model.zero_grad()
    total, pixels = torch.zeros((), dtype=torch.float64), 0
    for image, instances, target in run.sampler.drawn(step):
        logits = run.model(image[None])
        rows, columns = (n - spoiled for n in logits.shape[-2:])
        each = loss(logits, instances[None], target[None])[:, :rows, :columns]
        top, left = ((a - b) // 2 for a, b in zip(target.shape, logits.shape[-2:], strict=True))
        inside = slice(top, top + rows), slice(left, left + columns)
        total = total + each.double().sum()
        pixels += int(((target[inside] >= 0) & (instances[inside].long() >= 0)).sum())
    (total / max(1, pixels)).backward()
    return float(total.detach()) / max(1, pixels), gradients(run.model)


def apart(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).norm() / y.norm()) for x, y in zip(a, b, strict=True))


# from a few pixels at a time to one tile for any of these images, or more
TILES = {1: (30, 46, 120), 2: (52, 68, 100), 3: (116, 156)}


@pytest.mark.parametrize("batch", [2, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("up_mode", ["deconv", "resize"])
@pytest.mark.parametrize("depth", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_gradient_of_a_step_is_that_of_the_images_in_one_piece(
    depth: int, up_mode: str, batch: int, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(mixed, tmp_path, features=(2, 3, 3, 4)[: depth + 1], up_mode=up_mode, batch=batch, ignore=2)
    shapes: set[tuple[int, ...]] = set()
    for tile in TILES[depth]:
        run = in_float64(settings.with_(tile=tile), monkeypatch)
        # the classes do not weigh the same, and some pixels count for nothing
        assert run.task.weights[0] != run.task.weights[1]
        assert any((cells < 0).any() for step in range(3) for _, cells, _ in run.sampler.drawn(step))
        for run.step in range(3 if batch == 1 else 1):
            shapes |= {image.shape[1:] for image, _, _ in run.sampler.drawn(run.step)}
            loss, want = in_one_piece(run, run.step)
            run.model.zero_grad()
            assert float(run.gradient(run.feed.take(run.step, run.steps))) == pytest.approx(loss, rel=1e-5)
            assert apart(gradients(run.model), want) <= 1e-10
    assert len(shapes) >= 2
    assert any(rows != columns for rows, columns in shapes)


@pytest.mark.parametrize("recompute", ["none", "level"])
def test_the_gradient_in_float32_is_that_of_float64_to_rounding(
    recompute: str, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(mixed, tmp_path, features=(2, 3, 3), tile=60, batch=2, recompute=recompute)
    exact = in_float64(settings, monkeypatch)
    loss, want = in_one_piece(exact, 0)
    run = Run(exact.config, exact.task, meter=Meter(CPU))
    assert float(run.gradient(run.feed.take(run.step, run.steps))) == pytest.approx(loss, rel=1e-5)
    assert apart([gradient.double() for gradient in gradients(run.model)], want) < 1e-4


def test_a_pixel_that_is_counted_twice_would_be_seen(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = in_float64(config(mixed, tmp_path, features=(2, 3, 3), tile=60), monkeypatch)
    _, want = in_one_piece(run, 0)
    cut = tiling.cut_tile

    def one_row_less(*arguments: Any, **named: Any) -> list[tuple[int, int, int]]:
        (start, side, count), *others = cut(*arguments, **named)
        return [(start, side, count - 1), *others]

    monkeypatch.setattr(running, "cut_tile", one_row_less)
    run.model.zero_grad()
    run.gradient(run.feed.take(run.step, run.steps))
    assert apart(gradients(run.model), want) > 1e-3


def test_an_image_of_ignored_pixels_changes_nothing(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = in_float64(config(mixed, tmp_path, tile=30, batch=2), monkeypatch)
    first, second = run.sampler.drawn(0)
    hidden = torch.full_like(second[1], -1), torch.full_like(second[2], -1)
    monkeypatch.setattr(run.sampler, "drawn", lambda step, _=None: [first])
    loss = float(run.gradient(run.feed.take(run.step, run.steps)))
    alone = gradients(run.model)
    monkeypatch.setattr(run.sampler, "drawn", lambda step, _=None: [first, (second[0], *hidden)])
    run.model.zero_grad()
    # the mean is over pixels that count, wherever they are
    assert float(run.gradient(run.feed.take(run.step, run.steps))) == loss
    assert apart(gradients(run.model), alone) == 0
    monkeypatch.setattr(run.sampler, "drawn", lambda step, _=None: [(second[0], *hidden)])
    run.model.zero_grad()
    assert float(run.gradient(run.feed.take(run.step, run.steps))) == 0
    assert not any(gradient.any() for gradient in gradients(run.model))


# ---- what is drawn


def sampler(place: Path, tile: int, **more: Any) -> Sampler:
    examples = read_labelled(place / "images", place / "labels", kind="instance").examples
    return Sampler(examples, config(place, Path("run"), **more), tile)


def test_what_is_drawn_does_not_depend_on_the_tile(mixed: Path) -> None:
    # noise and grey values come after the grid from the same generator
    ways = [sampler(mixed, tile, features=(2, 3, 3), noise=0.1) for tile in (48, 60, 128, 300)]
    for step in (0, 3, 9):
        [want, *others] = [way.drawn(step)[0] for way in ways]
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(want, other, strict=True))
    tiles = [sampler(mixed, tile, features=(2, 3, 3), noise=0.1, accumulate="tile") for tile in (48, 60)]
    a, b = (way.drawn(0)[0][0] for way in tiles)
    assert not torch.equal(a[:, :48, :48], b[:, :48, :48])


def test_the_elastic_grid_is_that_of_the_papers_tile(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    way, asked = sampler(mixed, 48, features=(2, 3, 3)), []
    draw = way.warp.draw

    def noted(n: int, size: tuple[int, int], generator: torch.Generator, *, tile: Any = None) -> Tensor:
        asked.append(tile)
        return draw(n, size, generator, tile=tile)

    monkeypatch.setattr(way.warp, "draw", noted)
    for step in range(4):
        way.drawn(step)
    assert asked == [572] * 4


def test_an_epoch_shows_every_image_once_however_large(mixed: Path, tmp_path: Path) -> None:
    for tile in (20, 60, 100):
        way = sampler(mixed, tile)
        assert way.per_epoch == 4
        for epoch in range(3):
            seen = [way.drawn(4 * epoch + i)[0][0].shape[1:] for i in range(4)]
            # a net of one pooling takes 8 from each side, and an even number goes in
            want = [tuple(n + n % 2 + 16 for n in shape) for shape in SHAPES]
            assert sorted(map(tuple, seen)) == sorted(want)
    assert [sampler(mixed, 20, batch=batch).per_epoch for batch in (1, 2, 3, 4, 5)] == [4, 2, 2, 1, 1]
    # where tiles are drawn, small ones make long epochs
    assert sampler(mixed, 20, accumulate="tile").per_epoch > 100
    result = train(config(mixed, tmp_path / "run", steps=None, epochs=2, tile=60, log_every=1), progress=False)
    assert [row["epoch"] for row in result.log] == [0, 0, 0, 1, 1, 1]


def test_all_of_an_image_is_answered_for_and_no_warp_leaves_it(mixed: Path) -> None:
    plain: dict[str, Any] = {"elastic": 0.0, "rotate": False, "mirror": False, "grey": 0.0}
    way = sampler(mixed, 20, **plain)
    for step in range(4):
        image, instances, target = way.drawn(step)[0]
        [example] = [e for e in way.examples if all(0 <= d - n - 16 < 2 for d, n in
                     zip(instances.shape, e.instances.shape, strict=True))]  # fmt: skip
        rows, columns = example.instances.shape
        # half a pixel at most where the sizes differ by an odd number: the map reads between pixels then
        if (instances.shape[0] - rows) % 2 == (instances.shape[1] - columns) % 2 == 0:
            top, left = (instances.shape[0] - rows) // 2, (instances.shape[1] - columns) // 2
            assert torch.equal(instances[top : top + rows, left : left + columns], example.instances)
            assert torch.allclose(image[:, top : top + rows, left : left + columns], example.image, atol=1e-5)
        counted = [geometry.output_size(n, 1) for n in target.shape]
        assert counted[0] >= rows
        assert counted[1] >= columns


# ---- runs


def numbers(log: list[dict[str, float | None]], *names: str) -> list[float]:
    return [row[name] or 0.0 for row in log for name in names if row[name] is not None]


@pytest.mark.slow
def test_two_tiles_make_the_same_run(mixed: Path, tmp_path: Path) -> None:
    logs = []
    for tile, memory in ((40, None), (50, "1GB"), (None, None)):
        settings = config(mixed, tmp_path / f"run{tile}", tile=tile, memory=memory, precision="float32", lr=0.02)
        logs.append(train(settings, progress=False).log)
    losses = [numbers(log, "loss", "val_loss", "val_iou") for log in logs]
    assert len(losses[0]) == 5 + 3 + 3
    assert losses[0][0] != losses[0][-1]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-4, abs=1e-6)
    # another seed is farther away than that
    other_log = train(config(mixed, tmp_path / "other", tile=46, lr=0.02, seed=1), progress=False).log
    assert numbers(other_log, "loss") != pytest.approx(numbers(logs[0], "loss"), rel=1e-2)


def tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_run_that_was_interrupted_between_or_in_its_tiles_ends_with_the_same_bits(
    dropout: float, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(mixed, tmp_path / "whole", tile=40, batch=2, steps=5, validate_every=2, dropout=dropout)
    train(settings, progress=False)
    count = 0
    forward = FastUNet.forward
    run = tmp_path / "run"

    def struck(net: FastUNet, image: Tensor) -> Any:
        nonlocal count
        count += net.training
        if count == 25:
            raise KeyboardInterrupt
        return forward(net, image)

    with monkeypatch.context() as patch:
        patch.setattr(FastUNet, "forward", struck)
        with pytest.raises(KeyboardInterrupt):
            train(settings.with_(out=run), progress=False)
    kept = checkpoints.checkpoints(run)
    assert kept
    assert kept[-1].name < "00000005"
    train(training.resumed_config(run), resume=True, progress=False)
    for name in (MODEL, *(f"checkpoints/00000005/{part}.safetensors" for part in ("weights", "optimizer"))):
        found, want = tensors(run / name), tensors(settings.out / name)
        assert found.keys() == want.keys()
        assert all(torch.equal(found[key], want[key]) for key in want)
    logs = [training.read_log(place / "log.csv") for place in (run, settings.out)]
    clocks = {"seconds": 0, "busy": 0}
    assert [row | clocks for row in logs[0]] == [row | clocks for row in logs[1]]


def test_a_run_does_not_change_between_tiles_and_images(mixed: Path, tmp_path: Path) -> None:
    for begun, now in (("image", "tile"), ("tile", "image")):
        run = tmp_path / begun
        train(config(mixed, run, steps=1, tile=60, accumulate=begun), progress=False)
        with pytest.raises(BadInput, match=f"accumulate was '{begun}' when the run began and is '{now}' now"):
            train(config(mixed, run, steps=1, tile=60, accumulate=now), resume=True, progress=False)
    with pytest.raises(BadInput, match="accumulate must be one of tile, image, got 'pixel'"):
        config(mixed, tmp_path, accumulate="pixel")


def test_a_tile_too_small_to_be_one_of_many_is_refused_before_anything_is_written(mixed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # legal for the net, but fewer than 2^depth of its outputs count
    with pytest.raises(BadInput, match="tile_in 92 keeps 4 right pixels of each tile, fewer than the 8"):
        train(config(mixed, run, features=(2, 3, 3, 4), tile=92), progress=False)
    assert not [p for p in run.rglob("*") if p.is_file()]


@pytest.mark.slow
def test_the_speed_of_a_trial_is_that_of_whole_images(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without this, tiles and precisions that took different numbers of tiles could not be compared."""
    now = 0.0
    forward = FastUNet.forward

    def clocked(net: FastUNet, image: Tensor) -> Any:
        nonlocal now
        now += image.shape[-1] * image.shape[-2] * 1e-6
        return forward(net, image)

    monkeypatch.setattr(FastUNet, "forward", clocked)
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    for tile in (36, 80, 200):
        settings = config(drawn, tmp_path, memory="1GB", tile=tile, steps=1, precision="float32", recompute="none")
        run, _ = training._trial(settings.with_(classes=2), CPU)
        [drawn_image] = run.feed.take(0, 1)
        pieces = run.pieces(drawn_image)
        want = sum(target.numel() for _, target, _ in pieces) / sum(read.numel() for read, _, _ in pieces)
        found = training._measure_steps(settings.with_(classes=2), CPU)
        # the last tiles of a row are smaller than those that are tried
        assert 0.75 * want < (tile - 16) ** 2 / found.seconds / 1e6 < 1.05 * want


def test_trying_a_tile_takes_a_few_of_its_tiles(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0
    forward = FastUNet.forward

    def counted(net: FastUNet, image: Tensor) -> Any:
        nonlocal count
        count += 1
        return forward(net, image)

    monkeypatch.setattr(FastUNet, "forward", counted)
    settings = config(drawn, tmp_path, memory="1GB", tile=20, steps=1, precision="float32", recompute="none")
    training._measure_steps(settings.with_(classes=2), CPU)
    # a step has 256 of them
    assert 1 <= count <= 20
