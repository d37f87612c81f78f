"""Proves that a run inside a budget of bytes chooses, keeps, records and stays inside what fits, and can go on.

Nets of a few channels on drawn cells of 64 pixels, which fit anything: what is too large is said by the tests, except
where a run of its own process is watched from outside.
"""

import gc
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from unet_fast import TrainConfig, load, synthetic, train, training
from unet_fast import run as running
from unet_fast.checkpoints import newest
from unet_fast.cli import app
from unet_fast.errors import BadInput
from unet_fast.files import write_tiff
from unet_fast.measuring import Meter
from unet_fast.planning import Setting, counted_bytes
from unet_fast.run import Run
from unet_fast.storage import MODEL, read_tensors
from unet_fast.task import prepare
from unet_fast.units import bytes_of

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")

measurable = pytest.mark.skipif(
    Meter(CPU).peak() is None, reason="nobody can say here what a process holds: needs Linux's /proc and clear_refs"
)


def write_cells(place: Path, size: int, count: int) -> Path:
    for kind in ("images", "labels"):
        (place / kind).mkdir(parents=True)
    for seed in range(count):
        image, instances = synthetic.cells(size, seed=seed, radius_px=(7.0, 9.0))
        write_tiff(place / "images" / f"{seed}.tif", image, "YX")
        write_tiff(place / "labels" / f"{seed}.tif", instances.astype(np.uint16), "YX")
    return place


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images of touching cells, with instances."""
    return write_cells(tmp_path_factory.mktemp("drawn"), 64, 4)


@pytest.fixture(autouse=True, scope="module")
def quick_collection() -> Iterator[None]:
    """A meter collects garbage first, and all that pytest has imported is walked over each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's picture takes longer than these runs."""
    monkeypatch.setattr(running, "write_report", lambda place: None)


class Here:
    """Trials in this process, where a test can reach them, and without the seconds that another one takes to begin."""

    def __init__(self, device: torch.device, *imports: str) -> None:
        pass

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


@pytest.fixture(autouse=True)
def trials_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "elsewhere" not in request.fixturenames:
        monkeypatch.setattr(training, "Apart", Here)


@pytest.fixture
def elsewhere() -> None:
    """Trials where a user has them."""


def config(drawn: Path, out: Path, **more: Any) -> TrainConfig:
    usual: dict[str, Any] = {
        "label_kind": "instance", "features": (2, 3), "steps": 7, "validate_every": 3, "log_every": 2,
        "validation": 0.25, "device": "cpu",
    }  # fmt: skip
    return TrainConfig(images=drawn / "images", labels=drawn / "labels", out=out, **{**usual, **more})


def settings_of(run: Path) -> TrainConfig:
    return TrainConfig.read(run / "config.toml")


def way_of(run: Path) -> tuple[int | None, str | None, str | None]:
    """Tile, precision and recomputation, as they stand in config.toml."""
    settings = settings_of(run)
    return settings.tile, settings.precision, settings.recompute


def weights_of(run: Path) -> dict[str, Tensor]:
    """The last weights and momenta of a run."""
    state = newest(run)
    return {**state.weights, **{f"momentum.{name}": tensor for name, tensor in state.optimizer.items()}}


def log_of(run: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "busy")} for row in training.read_log(run / "log.csv")
    ]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)


def same_runs(a: Path, b: Path) -> bool:
    return same(weights_of(a), weights_of(b)) and log_of(a) == log_of(b) and same(*(best(run) for run in (a, b)))


def best(run: Path) -> dict[str, Tensor]:
    return read_tensors(run / MODEL)[0]


def files(run: Path) -> list[str]:
    return sorted(str(p.relative_to(run)) for p in run.rglob("*"))


class Killed(BaseException):
    """What SIGKILL is to a process: nobody handles it."""


def strike(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException) -> None:
    """`error` where a run is to take its step number `step`; not in the steps that are tried before it."""
    whole = Run.one_step

    def struck(run: Run, *arguments: Any) -> None:
        if run.step == step and (run.config.out / "config.toml").exists():
            raise error
        whole(run, *arguments)

    monkeypatch.setattr(Run, "one_step", struck)


# ---- precision


def test_in_bfloat16_maps_are_short_and_weights_gradients_and_loss_are_not(drawn: Path, tmp_path: Path) -> None:
    settings = config(drawn, tmp_path, precision="bfloat16", tile=44, classes=2)
    run = Run(settings, prepare(settings, CPU), meter=Meter(CPU))
    image, _, _ = run.sampler.batch(0)
    assert image.dtype == torch.float32
    assert run.stepper.logits(image).dtype == torch.bfloat16
    run.one_step()
    for p in run.model.parameters():
        assert p.dtype == torch.float32
        assert p.grad is not None
        assert p.grad.dtype == torch.float32
        assert run.stepper.optimizer.state[p]["momentum_buffer"].dtype == torch.float32
    assert run.losses[0].dtype == torch.float32
    plain = Run(settings.with_(precision="float32"), run.task, meter=run.meter)
    assert plain.stepper.logits(image).dtype == torch.float32
    assert plain.stepper.logits(image).requires_grad
    # and nothing of it stays switched on
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("accumulate", ["tile", "image"])
def test_a_run_in_bfloat16_learns_what_one_in_float32_does(accumulate: str, drawn: Path, tmp_path: Path) -> None:
    losses = {}
    for precision in ("float32", "bfloat16"):
        settings = config(
            drawn, tmp_path / precision, precision=precision, features=(4, 6), steps=24, log_every=1, lr=0.02,
            momentum=0.9, dropout=0.0, validate_every=24, accumulate=accumulate,
        )  # fmt: skip
        log = train(settings, progress=False).log
        losses[precision] = np.array([row["loss"] for row in log])
        assert way_of(settings.out) == (80, precision, None)
    a, b = losses["float32"], losses["bfloat16"]
    assert not np.array_equal(a, b)
    assert b == pytest.approx(a, rel=0.03)


def test_the_precision_of_a_run_cannot_change(drawn: Path, tmp_path: Path) -> None:
    for begun, now in (("bfloat16", "float32"), (None, "bfloat16")):
        run = tmp_path / str(begun)
        train(config(drawn, run, precision=begun, steps=1), progress=False)
        before = files(run), weights_of(run)
        for more in ({}, {"memory": "1GB"}):
            sentence = f"precision was '{begun or 'float32'}' when the run began and is '{now}' now; it cannot change"
            with pytest.raises(BadInput, match=sentence):
                train(config(drawn, run, precision=now, steps=1, **more), resume=True, progress=False)
        assert files(run) == before[0]
        assert same(weights_of(run), before[1])


@pytest.mark.parametrize(
    ("name", "value", "choices"),
    [
        ("precision", "int8", "float32, bfloat16, float16"),
        ("recompute", "all", "none, level"),
        ("accumulate", "epoch", "tile, image"),
    ],
)
def test_what_is_no_choice_is_refused_with_the_choices(name: str, value: str, choices: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=f"{name} must be one of {choices}, got '{value}'"):
        config(tmp_path, tmp_path, **{name: value})


# ---- what is chosen


def test_where_all_fits_the_tile_covers_the_largest_image_and_the_trials_are_on_record(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(config(drawn, run, memory="2GB"), progress=True)
    tile, precision, recompute = way_of(run)
    assert tile == 80
    assert precision in ("float32", "bfloat16")
    assert recompute in ("none", "level")
    assert settings_of(run).memory == "2GB"
    record = json.loads((run / "run.json").read_text())["memory"]
    assert set(record) == {"chosen", "trials", "budget_bytes", "why"}
    assert record["budget_bytes"] == 2_000_000_000
    assert record["why"] == "the tile covers the largest image"
    assert record["chosen"] in record["trials"]
    assert record["chosen"]["setting"] == {"tile_in": tile, "precision": precision, "recompute": recompute}
    net = load(run)
    for trial in record["trials"]:
        setting = Setting(**trial["setting"])
        assert trial["counted_bytes"] == counted_bytes(net, setting, device="cpu")
        assert trial["fits"]
        assert trial["seconds"] > 0
        useful = (setting.tile_in - 16) ** 2 / 1e6
        assert trial["mpixel_per_s"] == pytest.approx(useful / trial["seconds"])
    fastest = max(trial["mpixel_per_s"] for trial in record["trials"])
    assert record["chosen"]["mpixel_per_s"] >= 0.97 * fastest
    said = capsys.readouterr().err
    assert re.search(r"^inside 2(\.00)? GB: tile 80, ", said, re.MULTILINE)
    assert "the tile covers the largest image" in said
    assert said.count("trying a step of") == len(record["trials"])
    # nothing of the trials stays, neither files nor the picture of a model
    assert [name for name in files(run) if "checkpoints" not in name] == [
        "config.toml",
        "log.csv",
        MODEL,
        "overlays.npz",
        "run.json",
        "scores.csv",
    ]


@pytest.mark.parametrize(
    "kept",
    [
        {"tile": 44},
        {"precision": "bfloat16"},
        {"recompute": "level"},
        {"tile": 36, "precision": "float32", "recompute": "none"},
        {"tile": 100, "precision": "bfloat16", "recompute": "level", "accumulate": "image"},
    ],
    ids=str,
)
def test_what_was_given_beside_a_budget_is_kept(kept: dict[str, Any], drawn: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config(drawn, run, memory="2GB", steps=1, **kept), progress=False)
    settings = settings_of(run)
    record = json.loads((run / "run.json").read_text())["memory"]
    names = {"tile": "tile_in", "precision": "precision", "recompute": "recompute"}
    for name, value in kept.items():
        assert getattr(settings, name) == value
        if name in names:
            assert {trial["setting"][names[name]] for trial in record["trials"]} == {value}
    if "tile" in kept:
        # of one tile there is no largest
        assert "tile" in record["why"]
        assert "covers" not in record["why"]
    else:
        assert settings.tile == 80
    if len(kept) >= 3:
        assert len(record["trials"]) == 1


def test_trials_elsewhere_choose_as_those_here_and_leave_no_process(
    elsewhere: None, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    given = {"memory": "2GB", "precision": "float32", "recompute": "none"}
    train(config(drawn, there, **given), progress=False)
    assert not multiprocessing.active_children()
    monkeypatch.setattr(training, "Apart", Here)
    train(config(drawn, here, **given), progress=False)
    assert way_of(there) == way_of(here) == (80, "float32", "none")
    assert same_runs(there, here)
    assert files(there) == files(here)


def test_a_budget_changes_no_bit_of_the_run_that_it_leads_to(drawn: Path, tmp_path: Path) -> None:
    train(config(drawn, tmp_path / "budget", memory="2GB"), progress=False)
    tile, precision, _ = way_of(tmp_path / "budget")
    train(config(drawn, tmp_path / "plain", tile=tile, precision=precision), progress=False)
    assert same_runs(tmp_path / "budget", tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "run.json").read_text())["memory"] is None


def test_choosing_leaves_the_callers_generator_alone(drawn: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(config(drawn, tmp_path / "run", memory="2GB", steps=2), progress=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_where_there_is_no_memory_for_a_given_tile_recomputation_is_tried(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a card, where the allocator refuses what was counted to fit, before anything was measured."""
    whole = Run.one_step

    def starved(run: Run, *arguments: Any) -> None:
        if run.config.recompute == "none":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        whole(run, *arguments)

    monkeypatch.setattr(Run, "one_step", starved)
    settings = config(drawn, tmp_path / "run", memory="2GB", tile=80, precision="float32")
    train(settings, progress=False)
    assert way_of(settings.out) == (80, "float32", "level")


# ---- going on


@pytest.mark.parametrize(
    ("begun", "now"),
    [
        ({"memory": "2GB"}, {"memory": "1GB"}),
        ({"memory": "2GB"}, {}),
        ({"tile": 44}, {"memory": "1GB"}),
        ({"tile": 44, "precision": "bfloat16", "recompute": "level"}, {"memory": "1GB", "recompute": "none"}),
        ({"memory": "2GB", "tile": 44, "recompute": "none"}, {"memory": "1GB", "recompute": "level"}),
        ({"memory": "2GB", "tile": 36, "accumulate": "image"}, {"accumulate": "image", "recompute": "level"}),
    ],
    ids=str,
)
def test_a_run_goes_on_in_another_budget_with_its_tile_and_precision(
    begun: dict[str, Any], now: dict[str, Any], drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        strike(patch, 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train(config(drawn, run, **begun), progress=False)
    tile, precision, _ = way_of(run)
    train(config(drawn, run, **now), resume=True, progress=False)
    assert way_of(run)[:2] == (tile, precision)
    assert load(run).settings == load(run).settings
    about = newest(run).about["config"]
    assert (about["tile"], about["precision"]) == (tile, precision)
    assert about.get("memory") == now.get("memory")
    if "memory" in now:
        record = json.loads((run / "run.json").read_text())["memory"]
        assert record["budget_bytes"] == bytes_of(now["memory"])
    if "recompute" in now:
        assert about["recompute"] == now["recompute"]
    whole = tmp_path / "whole"
    accumulate = begun.get("accumulate", "tile")
    train(config(drawn, whole, tile=tile, precision=precision, accumulate=accumulate), progress=False)
    assert same(weights_of(run), weights_of(whole))
    assert same(best(run), best(whole))
    assert [row["loss"] for row in log_of(run)] == [row["loss"] for row in log_of(whole)]


def test_the_words_that_continue_a_run_may_name_another_budget(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    begun = {"tile": 44, "precision": "float32"}
    train(config(drawn, whole, **begun), progress=False)
    with monkeypatch.context() as patch:
        strike(patch, 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train(config(drawn, run, memory="2GB", **begun), progress=False)
    words = ["train", "--resume", "--out", str(run), "--memory", "1GB", "--recompute", "level", "--quiet"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert same_runs(run, whole)


def test_a_budget_too_small_for_the_tile_of_a_run_leaves_the_run_as_it_was(drawn: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config(drawn, run, steps=3), progress=False)
    before = files(run), {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}
    with pytest.raises(BadInput, match=r"memory must be at least .* for tile 80, float32, recompute level"):
        train(config(drawn, run, steps=3, memory="9kB"), resume=True, progress=False)
    assert (files(run), {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}) == before


# ---- running out of memory in the middle

Enough = Callable[[Setting], bool]

OUT_OF_MEMORY: dict[str, Callable[[], BaseException]] = {
    "a card": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "Python": MemoryError,
    "torch on a CPU": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"
    ),
}

# what a run is given: all of it, so that no clock chooses
GIVEN: dict[str, Any] = {"memory": "2GB", "tile": 80, "precision": "float32", "recompute": "none"}


def starve(
    monkeypatch: pytest.MonkeyPatch,
    enough: Enough,
    *,
    step: int = 4,
    error: Callable[[], BaseException] = MemoryError,
    where: str = "before",
) -> list[tuple[int, int, str]]:
    """From a step on there is memory only for what is `enough`; lists (step, tile, recompute) of all steps taken."""
    taken: list[tuple[int, int, str]] = []
    whole = Run.one_step

    def starved(run: Run, *arguments: Any) -> None:
        began = (run.config.out / "config.toml").exists()
        # what is really done, whatever the settings say
        here = Setting(run.sampler.tile, str(run.config.precision), run.model.recompute)
        if began and run.step >= step and not enough(here):
            if where == "backward":
                run.gradient(run.feed.take(run.step, run.steps))
            raise error()
        if began:
            taken.append((run.step, here.tile_in, here.recompute))
        whole(run, *arguments)

    monkeypatch.setattr(Run, "one_step", starved)
    return taken


def again(setting: Setting) -> bool:
    return setting.recompute == "level"


def small(setting: Setting) -> bool:
    return setting.tile_in <= 60


@pytest.mark.parametrize("where", ["before", "backward"])
@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_a_step_without_memory_is_taken_again_by_recomputation_with_the_same_bits(
    kind: str, where: str, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(config(drawn, whole, tile=80, precision="float32"), progress=False)
    taken = starve(monkeypatch, again, error=OUT_OF_MEMORY[kind], where=where)
    train(config(drawn, run, **GIVEN), progress=False)
    assert taken == [(step, 80, "none" if step < 4 else "level") for step in range(7)]
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "note: a step found no memory; from step 4 on with tile 80, float32, recompute level",
    ]
    assert way_of(run) == (80, "float32", "level")
    assert same_runs(run, whole)
    # the record says what was chosen at first
    chosen = json.loads((run / "run.json").read_text())["memory"]["chosen"]["setting"]
    assert chosen == {"tile_in": 80, "precision": "float32", "recompute": "none"}


@pytest.mark.parametrize("accumulate", ["tile", "image"])
def test_then_tiles_become_smaller_by_a_share_until_there_is_memory(
    accumulate: str, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    taken = starve(monkeypatch, small)
    result = train(config(drawn, run, accumulate=accumulate, dropout=0.0, **GIVEN), progress=False)
    assert [step for step, _, _ in taken] == list(range(7))
    assert [row["step"] for row in result.log] == [2, 3, 4, 6, 7]
    notes = capsys.readouterr().err.splitlines()
    found = [re.fullmatch(r"note: a step found no memory; from step 4 on with tile (\d+), float32, recompute level", n)
             for n in notes]  # fmt: skip
    tiles = [int(match[1]) for match in found if match]
    assert len(tiles) == len(notes) >= 3
    assert tiles[0] == 80
    assert 20 <= tiles[-1] <= 60 < tiles[-2]
    bytes_taken = [counted_bytes(result.model, Setting(n, "float32", "level")) for n in tiles]
    for before, after, tile in zip(bytes_taken, bytes_taken[1:], tiles[1:], strict=False):
        # and no smaller than asked for
        assert after <= 0.85 * before < counted_bytes(result.model, Setting(tile + 2, "float32", "level"))
    assert way_of(run) == (tiles[-1], "float32", "level")
    assert taken[-1] == (6, tiles[-1], "level")
    if accumulate == "image":
        # the tile is no part of what is learned
        whole = tmp_path / "whole"
        monkeypatch.undo()
        train(config(drawn, whole, accumulate=accumulate, dropout=0.0, tile=80), progress=False)
        assert [row["loss"] for row in log_of(run)] == pytest.approx([row["loss"] for row in log_of(whole)], rel=1e-4)


def test_a_precision_that_was_chosen_stays_when_a_run_comes_down(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starve(monkeypatch, small)
    train(config(drawn, tmp_path / "run", **{**GIVEN, "precision": "bfloat16"}), progress=False)
    tile, precision, recompute = way_of(tmp_path / "run")
    assert (precision, recompute) == ("bfloat16", "level")
    assert tile is not None
    assert tile <= 60


@pytest.fixture(scope="module")
def came_down(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that came down to a smaller tile and that nobody disturbed; not to be changed."""
    run = tmp_path_factory.mktemp("came_down") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "write_report", lambda place: None)
        patch.setattr(training, "Apart", Here)
        starve(patch, small)
        train(config(drawn, run, **GIVEN), progress=False)
    return run


def test_interrupted_right_after_coming_down_a_run_ends_the_same(
    drawn: Path, came_down: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        starve(patch, lambda setting: small(setting) and _interrupt())
        with pytest.raises(KeyboardInterrupt):
            train(config(drawn, run, **GIVEN), progress=False)
    assert way_of(run) == way_of(came_down)
    assert newest(run).about["step"] == 4
    # whatever there is memory for now: it goes on as it was
    train(training.resumed_config(run), resume=True, progress=False)
    assert way_of(run) == way_of(came_down)
    assert same_runs(run, came_down)


def _interrupt() -> bool:
    raise KeyboardInterrupt


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("written", ["config.toml", "nothing"])
def test_killed_while_coming_down_a_run_ends_the_same(
    written: str, count: int, drawn: Path, came_down: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    name = {"config.toml": "keep_state", "nothing": "_write_config"}[written]
    with monkeypatch.context() as patch:
        starve(patch, small)
        whole, calls = getattr(Run, name), []

        def killed(it: Run) -> None:
            coming_down = it.step == 4 and (it.config.out / "config.toml").exists()
            if coming_down:
                calls.append(it.step)
            if coming_down and len(calls) == count:
                raise Killed
            whole(it)

        patch.setattr(Run, name, killed)
        with pytest.raises(Killed):
            train(config(drawn, run, **GIVEN), progress=False)
    state = newest(run).about
    assert (settings_of(run).tile == state["config"]["tile"]) == (written == "nothing" or count == 1)
    starve(monkeypatch, small)
    train(training.resumed_config(run), resume=True, progress=False)
    assert way_of(run) == way_of(came_down)
    assert same_runs(run, came_down)


def test_another_error_is_raised_as_it_is(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = RuntimeError("the net is upset")
    for name, given, error in [
        ("another", GIVEN, other),
        ("value", GIVEN, ValueError("out of memory, says nobody")),
        *((kind, {"tile": 80}, make()) for kind, make in OUT_OF_MEMORY.items()),
    ]:
        run = tmp_path / name
        with monkeypatch.context() as patch:
            starve(patch, small, error=lambda error=error: error)  # type: ignore[misc]
            with pytest.raises(type(error)) as raised:
                train(config(drawn, run, **given), progress=False)
        assert raised.value is error
        assert way_of(run)[0] == 80


def test_in_the_middle_of_an_update_no_memory_is_an_error(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update, run = torch.optim.SGD.step, tmp_path / "run"

    def half(optimizer: Any, *arguments: Any) -> Any:
        if (run / "checkpoints" / "00000003").exists():
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0].add_(1)
            raise MemoryError
        return update(optimizer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", half)
        with pytest.raises(MemoryError):
            train(config(drawn, run, **GIVEN), progress=False)
    # the state of before lies there still
    train(training.resumed_config(run), resume=True, progress=False)
    train(config(drawn, tmp_path / "whole", tile=80), progress=False)
    assert same_runs(run, tmp_path / "whole")


def test_where_nothing_smaller_is_left_the_run_ends_with_exit_code_4_and_can_go_on(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.delenv("UNET_FAST_DEBUG", raising=False)
    words = [
        "train", "-i", str(drawn / "images"), "--labels", str(drawn / "labels"), "-o", str(run), "--label-kind",
        "instance", "--features", "2,3", "--steps", "7", "--validation", "0.25", "--device", "cpu", "--memory", "2GB",
        "--precision", "float32", "--quiet",
    ]  # fmt: skip
    with monkeypatch.context() as patch:
        starve(patch, lambda _: False)
        done = CliRunner().invoke(app, words)
    assert done.exit_code == 4, done.output
    *notes, last = done.stderr.splitlines()
    assert all(note.startswith("note: a step found no memory; from step 4 on with tile ") for note in notes)
    assert last.startswith("error: out of memory; ")
    assert re.search(r"a step found no memory, and tile (18|20), float32, recompute level is the smallest", last)
    # when there is memory again
    result = train(training.resumed_config(run), resume=True, progress=False)
    assert result.log[-1]["step"] == 7


@measurable
def test_a_run_that_took_more_than_its_budget_takes_less_from_then_on(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, peak = tmp_path / "run", Meter.peak

    def over(meter: Meter) -> int | None:
        # a step at the first tile is too much, but not before the run began
        if (run / "log.csv").exists() and settings_of(run).recompute == "none":
            return 3_000_000_000
        return peak(meter)

    monkeypatch.setattr(Meter, "peak", over)
    taken = starve(monkeypatch, lambda _: True)
    train(config(drawn, run, **GIVEN), progress=False)
    said = capsys.readouterr().err.splitlines()
    [note] = said
    assert re.fullmatch(
        r"note: 3\S* GB were taken of 2\S* GB; from step 2 on with tile 80, float32, recompute level", note
    )
    assert [way for _, *way in taken] == [[80, "none"]] * 2 + [[80, "level"]] * 5
    train(config(drawn, tmp_path / "whole", tile=80), progress=False)
    assert same_runs(run, tmp_path / "whole")


# ---- budgets that cannot be

NONSENSE = ["6 bananas", "0GB", "-1", "", "GB", "nan", "1e400GB", "0.1B"]


def train_words(drawn: Path, out: Path, *more: str) -> list[str]:
    return [
        "train", "-i", str(drawn / "images"), "--labels", str(drawn / "labels"), "-o", str(out), "--label-kind",
        "instance", "--features", "2,3", "--steps", "2", "--device", "cpu", "--quiet", *more,
    ]  # fmt: skip


def nothing_in(out: Path) -> bool:
    return not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize("memory", NONSENSE)
def test_a_budget_that_is_no_size_is_refused_with_what_it_should_be(
    memory: str, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UNET_FAST_DEBUG", raising=False)
    sentence = f"memory must be a size such as 6GB, 500MB or 4GiB, got {memory or 'nothing'}"
    with pytest.raises(BadInput, match=re.escape(sentence)):
        config(drawn, tmp_path / "run", memory=memory)
    done = CliRunner().invoke(app, train_words(drawn, tmp_path / "run", f"--memory={memory}"))
    assert (done.exit_code, done.stderr, done.stdout) == (3, f"error: {sentence}\n", "")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("features", "memory"), [("2,3", "9kB"), ("32,64,128", "1MB")])
def test_a_budget_too_small_is_refused_with_what_would_do(
    features: str, memory: str, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is named does, or names the next: in few rounds one gets there."""
    monkeypatch.delenv("UNET_FAST_DEBUG", raising=False)
    run = tmp_path / "run"
    for _ in range(8):
        words = train_words(drawn, run, "--features", features, "--steps", "1", f"--memory={memory}")
        done = CliRunner().invoke(app, words)
        if done.exit_code == 0:
            break
        assert done.exit_code == 3, done.output
        [said] = done.stderr.splitlines()
        found = re.fullmatch(
            r"error: memory must be at least ([0-9.]+ [kMG]?B)"
            r"(?:(?:, and what the data and libraries take,)? for tile \d\d, \w+(?:, recompute level)?, |:"
            r" validation and checkpoints take that, whatever the tile; )got .*",
            said,
        )
        assert found, said
        assert bytes_of(found[1]) > bytes_of(memory), said
        assert nothing_in(run)
        memory = found[1].replace(" ", "")
    assert done.exit_code == 0, done.stderr


@measurable
def test_what_lies_between_steps_must_fit_too(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    between = Run.between_steps

    def greedy(run: Run) -> None:
        between(run)
        torch.ones(100_000_000)

    monkeypatch.setattr(Run, "between_steps", greedy)
    run = tmp_path / "run"
    sentence = r"memory must be at least (\S+ [MG]B): validation and checkpoints take that, whatever the tile; got"
    with pytest.raises(BadInput, match=sentence) as refused:
        train(config(drawn, run, memory="300MB"), progress=False)
    found = re.search(sentence, str(refused.value))
    assert found
    assert 390e6 < bytes_of(found[1]) < 500e6
    assert nothing_in(run)
    # a folder that was refused is no run in the way
    train(config(drawn, run, memory="1GB", steps=2), progress=False)
    assert (run / MODEL).exists()


# ---- processes watched from outside


def held(pid: int | str) -> int:
    """Anonymous bytes of a process, 0 where it has gone or nobody says."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def family(pid: int) -> list[int]:
    """A process and all that it began, in turn."""
    try:
        lists = [each.read_text().split() for each in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return []
    return [pid, *(each for listed in lists for child in listed for each in family(int(child)))]


WATCHED: dict[str, list[str]] = {
    "tiles": ["--precision", "float32"],
    "tiles in bfloat16": ["--precision", "bfloat16"],
    "whole images": ["--precision", "float32", "--accumulate", "image"],
}


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def held_idle() -> int:
    """Anonymous bytes of a process that has imported what a run needs, and does nothing."""
    program = "import unet_fast.training; print(flush=True); input()"
    piped: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], env=ONE_THREAD, **piped) as idle:
        assert idle.stdout is not None
        idle.stdout.readline()
        before = held(idle.pid)
        idle.communicate(b"\n")
    return before


@pytest.fixture(scope="module")
def large_cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cells(tmp_path_factory.mktemp("large") / "data", 512, 3)


@pytest.mark.skipif(not held("self"), reason="needs /proc with RssAnon, which Linux has")
@pytest.mark.parametrize("case", WATCHED)
def test_no_process_of_a_run_takes_more_than_its_budget(
    case: str, held_idle: int, large_cells: Path, tmp_path: Path
) -> None:
    memory, before = "150MB", held_idle
    place, run = large_cells, tmp_path / "run"
    words = [
        "train", "-i", str(place / "images"), "--labels", str(place / "labels"), "-o", str(run), "--label-kind",
        "instance", "--features", "8,16,32", "--steps", "6", "--validation", "0.3", "--device", "cpu", "--memory",
        memory, *WATCHED[case],
    ]  # fmt: skip
    peaks: dict[int, int] = {}
    with (tmp_path / "said").open("wb") as said:
        child = subprocess.Popen([sys.executable, "-m", "unet_fast", *words], stderr=said, env=ONE_THREAD)
        while child.poll() is None:
            for pid in family(child.pid):
                peaks[pid] = max(peaks.get(pid, 0), held(pid))
            time.sleep(0.004)
    text = (tmp_path / "said").read_text()
    assert child.returncode == 0, text
    # it used what it was given
    assert peaks[child.pid] - before > 60_000_000
    assert max(peaks.values()) - before <= bytes_of(memory), f"{before} {peaks} {text}"
    tile, *_ = way_of(run)
    # not the smallest, nor one that covers 512 pixels; which of those between was fastest, the clock says
    assert tile is not None
    assert 44 < tile < 552
    assert training.read_log(run / "log.csv")[-1]["step"] == 6
