"""What `profile` says: counts that are the planner's, measurements that agree with each other, words a person can use.

How fast this machine is, is nobody's claim: where times matter, a clock and a bench of our own stand in for it.
"""

import json
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import unet_fast
from unet_fast import FastUNet, geometry, measuring, memory, profiling
from unet_fast.cli import app
from unet_fast.layers import Layers
from unet_fast.measuring import Measured
from unet_fast.profiling import LayerRow, Profile, Row, Way, count, profile

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
TINY = (4, 8)
ROOF = 0.25
WAYS = [
    Way("train", "float32", "none"),
    Way("train", "float32", "level"),
    Way("train", "bfloat16", "none"),
    Way("train", "bfloat16", "level"),
    Way("predict", "float32"),
    Way("predict", "bfloat16"),
]
NAMES = [
    "train float32",
    "train float32, recompute",
    "train bfloat16",
    "train bfloat16, recompute",
    "predict float32",
    "predict bfloat16",
]
_NO_PROC = not Path("/proc/self/clear_refs").exists()
LINUX = pytest.mark.skipif(_NO_PROC, reason="only Linux has a high-water mark that can be set back")
_NO_FORKS = "forkserver" not in multiprocessing.get_all_start_methods()
FORKS = pytest.mark.skipif(_NO_FORKS, reason="no fork server on this system")


@pytest.fixture(autouse=True)
def roof(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's roof takes seconds to find and is tested where it is made."""
    monkeypatch.setattr(profiling, "roof_tflops", lambda *_: ROOF)


@cache
def net(*features: int, **settings: Any) -> FastUNet:
    with torch.device("meta"):
        return FastUNet(features=features or TINY, **settings)


def counted(fast: FastUNet, way: Way, tile: int, batch: int = 1) -> memory.Estimate:
    """Written anew: a prediction is made in the way's dtype, training keeps its weights in float32."""
    settings: dict[str, Any] = {"mode": way.mode, "recompute": way.recompute, "batch": batch}
    if way.precision == "bfloat16":
        settings |= {"dtype": torch.bfloat16, "autocast": way.mode == "train"}
    return memory.estimate(fast, tile, **settings)


def cli(text: str, *more: str) -> Any:
    return CliRunner().invoke(app, ["profile", *text.split(), *more])


# ---- counted


@pytest.mark.parametrize("features", [(4, 8), (2, 4, 8), (4, 4, 8, 8), (2, 4, 4, 8, 8)], ids=len)
@pytest.mark.parametrize("batch", [1, 3])
def test_counted_rows_hold_the_planners_bytes_and_the_nets_arithmetic(features: tuple[int, ...], batch: int) -> None:
    fast = net(*features)
    tiles = geometry.legal_sizes(200, 400, fast.depth)[:: 64 >> fast.depth]
    found = profile(fast, ways=WAYS, tiles=tiles, batch=batch, seconds=0)
    assert [(row.way, row.tile_in) for row in found.rows] == [(way, tile) for way in WAYS for tile in tiles]
    for row in found.rows:
        out = row.tile_in - 2 * (6 * 2**fast.depth - 4)
        assert row.tile_out == out
        assert row.useful_mpixel == batch * out**2 / 1e6
        assert row.predicted_bytes == counted(fast, row.way, row.tile_in, batch).total
        assert row.predicted_bytes == count(fast, row.way, row.tile_in, batch=batch)
        assert row.gflop == batch * Layers(fast, row.tile_in, row.tile_in).flop(row.way.mode) / 1e9
        assert (row.measured_bytes, row.ms, row.useful_mpixel_per_s, row.roof_share) == (None,) * 4
    assert found.parameters == sum(p.numel() for p in fast.parameters())
    assert (found.batch, found.budget_bytes, found.largest, found.layers, found.phases) == (batch, None, {}, (), {})


def test_half_precision_halves_maps_in_training_and_everything_in_prediction() -> None:
    fast = net(16, 32, 64)
    training, again, prediction = (
        {way.precision: counted(fast, way, 204) for way in WAYS if (way.mode, way.recompute) == kind}
        for kind in (("train", "none"), ("train", "level"), ("predict", "none"))
    )
    for each in (training, again):
        assert each["bfloat16"].weights == each["float32"].weights == 4 * sum(p.numel() for p in fast.parameters())
        assert each["bfloat16"].total < each["float32"].total
    assert 2 * count(fast, WAYS[5], 204) == 2 * prediction["bfloat16"].total == count(fast, WAYS[4], 204)
    assert count(fast, WAYS[2], 204) == training["bfloat16"].total


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_bytes_do_not_depend_on_the_dtype_that_a_net_was_saved_in(dtype: torch.dtype) -> None:
    # profile makes the weights anew, in training always in float32
    with torch.device("meta"):
        other = FastUNet(features=(8, 16)).to(dtype)
    for way in WAYS:
        assert (str(way), count(other, way, 76)) == (str(way), count(net(8, 16), way, 76))


def test_counting_takes_no_step_and_looks_for_no_roof(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("measured")

    for name in ("roof_tflops", "Apart", "_measure", "_layer_times"):
        monkeypatch.setattr(profiling, name, never)
    found = profile(net(), ways=WAYS, tiles=[36], seconds=0, layers_of=36, say=never)
    assert found.roof_tflops == {}
    assert all(layer.forward_ms is layer.backward_ms is None for layer in found.layers)


def _draws(number: int) -> list[tuple[FastUNet, list[Way], int]]:
    draw = random.Random(0)
    return [
        (
            net(*(draw.choice((1, 2, 4)) for _ in range(draw.randint(2, 5))), out_channels=draw.randint(1, 3)),
            draw.sample(WAYS, draw.randint(1, 6)),
            draw.randint(1, 3),
        )
        for _ in range(number)
    ]


def test_the_ladder_is_legal_ascending_and_begins_where_a_step_of_pixels_is_kept() -> None:
    for fast, ways, batch in _draws(12):
        rows = profile(fast, ways=ways, batch=batch, seconds=0).rows
        sides, step = [row.tile_in for row in rows if row.way == ways[0]], 2**fast.depth
        assert [row.tile_in for row in rows] == sides * len(ways)
        assert all(a < b <= 1.35 * a + 2 * step for a, b in pairwise(sides))
        # raises where one is not legal
        outputs = [geometry.output_size(side, fast.depth) for side in sides]
        assert step <= outputs[0] < 2 * step
        assert 2600 / 1.36 - step < sides[-1] <= 2600
        assert 572 in sides


def test_the_papers_tile_is_a_rung_for_a_net_as_deep() -> None:
    assert 572 in [row.tile_in for row in profile(net(2, 2, 2, 2, 2), ways=WAYS[:1], seconds=0).rows]


def test_the_ladder_ends_at_the_largest_tile_that_a_budget_allows() -> None:
    for number, (fast, ways, batch) in enumerate(_draws(12)):
        smallest = geometry.legal_sizes(1, 10**4, fast.depth)[0]
        budget = min(counted(fast, way, smallest, batch).total for way in ways) * 4 ** (number % 6 + 2)
        largest = []
        found = profile(fast, ways=ways, batch=batch, budget_bytes=budget, seconds=0)
        for way in ways:
            tile = found.largest[str(way)]
            if tile is None:
                assert counted(fast, way, smallest, batch).total > budget
                continue
            largest.append(tile)
            assert counted(fast, way, tile, batch).total <= budget
            assert counted(fast, way, tile + 2**fast.depth, batch).total > budget
        sides = [row.tile_in for row in found.rows if row.way == ways[0]]
        assert all(a < b for a, b in pairwise(sides))
        assert sides[-1] == max(largest)
        assert (572 in sides) == (max(largest) >= 572)


@pytest.mark.parametrize("tile", [188, 204])
def test_a_budget_that_allows_a_tile_at_all_has_a_row(tile: int) -> None:
    fast, way = net(4, 8, 8, 8, 8), Way("predict", "bfloat16")
    budget = count(fast, way, tile)
    assert memory.largest_tile(budget, fast, mode="predict", dtype=torch.bfloat16) == tile
    assert tile in [row.tile_in for row in profile(fast, ways=[way], budget_bytes=budget, seconds=0).rows]


def test_an_illegal_tile_names_both_neighbours() -> None:
    with pytest.raises(ValueError, match="573 cannot be pooled 4 times; nearest are 572 and 588"):
        profile(net(2, 2, 2, 2, 2), ways=WAYS, tiles=[573], seconds=0)


# ---- measured


def _agree(row: Row, roof: float) -> None:
    assert row.ms is not None
    assert row.useful_mpixel_per_s == pytest.approx(row.useful_mpixel / (row.ms / 1e3))
    assert row.roof_share == pytest.approx(row.gflop / row.ms / roof)


def test_what_was_measured_agrees_with_itself() -> None:
    said: list[str] = []
    found = profile(net(), ways=[WAYS[0], WAYS[5]], tiles=[76, 380], seconds=60, say=said.append)
    assert said == [f"measuring {way}, tile {tile}" for way in (WAYS[0], WAYS[5]) for tile in (76, 380)]
    assert found.roof_tflops == {"float32": ROOF, "bfloat16": ROOF}
    assert found.device == f"CPU, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    for row in found.rows:
        _agree(row, ROOF)
        assert row.ms is not None
        assert row.ms > 0
        assert (row.measured_bytes is None) == _NO_PROC
        if row.measured_bytes is not None and row.tile_in == 380:
            # a convolution's library takes its share beside what is counted
            assert 0.8 * row.predicted_bytes < row.measured_bytes < 5 * row.predicted_bytes
    small, large = (row.measured_bytes for row in found.rows[:2])
    assert _NO_PROC or (small is not None and large is not None and small < large)


@LINUX
def test_a_rows_bytes_do_not_depend_on_the_rows_before() -> None:
    way = Way("predict")
    alone, among = (
        profile(net(), ways=[way], tiles=tiles, seconds=60).rows[-1].measured_bytes for tiles in ([380], [60, 268, 380])
    )
    assert alone is not None
    assert among == pytest.approx(alone, rel=0.15)


# what stands in for a step in a process of its own: found there by name, so none is a lambda


def _tell(net: Any, way: Way, tile: int, *_: Any) -> Measured:
    """Where it ran, in place of bytes, and with how many threads."""
    return Measured(os.getpid(), torch.get_num_threads())


def _killed(net: Any, way: Way, tile: int, *_: Any) -> Measured:
    if tile >= 60:
        os.kill(os.getpid(), signal.SIGKILL)
    return _tell(net, way, tile)


def _gone(net: Any, way: Way, tile: int, *_: Any) -> Measured:
    if tile >= 60:
        os._exit(0)
    return _tell(net, way, tile)


def _full(net: Any, way: Way, tile: int, *_: Any) -> Measured:
    if tile >= 60:
        raise MemoryError
    return _tell(net, way, tile)


def _torch_full(net: Any, way: Way, tile: int, *_: Any) -> Measured:
    if tile >= 60:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    return _tell(net, way, tile)


def _broken(*_: Any) -> Measured:
    raise RuntimeError("shapes do not fit")


@FORKS
def test_each_row_has_a_process_of_its_own_with_as_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "_measure", _tell)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        rows = profile(net(), ways=WAYS[:2], tiles=[18, 24], seconds=60).rows
    finally:
        torch.set_num_threads(before)
    assert len({os.getpid(), *(row.measured_bytes for row in rows)}) == 5
    assert {row.ms for row in rows} == {1e3 * (before + 1)}


@FORKS
@pytest.mark.parametrize(
    ("step", "ways"),
    [(_killed, WAYS[3:5]), (_gone, WAYS[4:5]), (_full, WAYS[4:5]), (_torch_full, WAYS[4:5])],
    ids=["killed", "gone", "Python says so", "torch says so"],
)
def test_a_step_without_memory_ends_its_way_and_not_the_profile(
    step: Any, ways: list[Way], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiling, "_measure", step)
    said: list[str] = []
    rows = profile(net(), ways=ways, tiles=[24, 60, 82], seconds=1e6, say=said.append).rows
    # the third is larger than what failed
    assert said == [f"measuring {way}, tile {tile}" for way in ways for tile in (24, 60)]
    assert [row.ms is not None for row in rows] == [True, False, False] * len(ways)


@FORKS
def test_another_error_of_a_step_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "_measure", _broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        profile(net(), ways=WAYS[:1], tiles=[60], seconds=60)


def test_where_neither_processes_nor_bytes_can_be_had_times_are_measured_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    monkeypatch.setattr(measuring.Meter, "peak", lambda _: None)
    for row in profile(net(), ways=[WAYS[1], WAYS[4]], tiles=[36], seconds=30).rows:
        assert row.measured_bytes is None
        _agree(row, ROOF)
    monkeypatch.setattr(profiling, "_measure", _tell)
    (row,) = profile(net(), ways=WAYS[:1], tiles=[36], seconds=30).rows
    assert row.measured_bytes == os.getpid()


class Machine:
    """A clock, and a machine on it that takes `pace` seconds for a GFLOP and has bytes of `room`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pace: float, room: float = math.inf) -> None:
        self.now, self.pace, self.room = 0.0, pace, room
        self.taken: list[tuple[Way, int, float]] = []
        clock = SimpleNamespace(monotonic=lambda: self.now, perf_counter=time.perf_counter)
        monkeypatch.setattr(profiling, "time", clock)
        monkeypatch.setattr(profiling, "Apart", lambda *_: self.apart)

    def apart(self, function: Any, *given: Any) -> Any:
        return self.step(*given) if function is profiling._measure else function(*given)

    def step(
        self, settings: dict[str, Any], way: Way, tile: int, batch: int, device: torch.device, within_s: float
    ) -> Measured:
        fast = net(*settings["features"])
        step = self.pace * batch * Layers(fast, tile, tile).flop(way.mode) / 1e9
        seconds = step * max(1, min(3, int(within_s / step)))
        self.now += seconds
        self.taken.append((way, tile, seconds))
        size = count(fast, way, tile, batch=batch)
        if size > self.room:
            raise MemoryError
        return Measured(size, step)


def test_a_row_that_would_not_fit_into_the_time_is_left_unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    draw, tiles = random.Random(0), [36, 60, 100, 156, 268]
    partly = 0
    for _ in range(40):
        pace, seconds = 10 ** draw.uniform(-3, 3), 10 ** draw.uniform(-1, 2)
        ways, batch = draw.sample(WAYS, draw.randint(1, 6)), draw.randint(1, 2)
        machine = Machine(monkeypatch, pace)
        rows = profile(net(), ways=ways, tiles=tiles, batch=batch, seconds=seconds).rows
        left = seconds
        for number, way in enumerate(ways):
            taken = [each for done, _, each in machine.taken if done == way]
            # the first of a way tells its pace; no way takes the others' share
            assert sum(taken) <= max(sum(taken[:1]), left / (len(ways) - number)) + 1e-9
            left = max(0.0, left - sum(taken))
            known = [row.ms is not None for row in rows if row.way == way]
            assert known == sorted(known, reverse=True)
            partly += 0 < sum(known) < len(known)
    assert partly > 6


def test_with_time_enough_every_row_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, pace=1e-6)
    rows = profile(net(), ways=WAYS, tiles=[36, 60, 100], seconds=1).rows
    assert [(way, tile) for way, tile, _ in machine.taken] == [(row.way, row.tile_in) for row in rows]
    for row in rows:
        _agree(row, ROOF)


def test_small_tiles_are_measured_first_in_whichever_order_they_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, pace=1e-6)
    profile(net(), ways=WAYS[:1], tiles=[100, 36, 60], seconds=1)
    assert [tile for _, tile, _ in machine.taken] == [36, 60, 100]


def test_a_first_tile_that_even_the_roof_could_not_finish_in_time_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, pace=1e-3 / ROOF)
    fast = net()
    least = Layers(fast, 1204, 1204).flop("train") / 1e12 / ROOF
    profile(fast, ways=WAYS[:1], tiles=[1204], seconds=least / 10)
    assert machine.taken == []


def test_nothing_above_the_budget_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, pace=1e-6)
    budget = count(net(), WAYS[0], 100)
    found = profile(net(), ways=WAYS, tiles=[36, 100, 156], budget_bytes=budget, seconds=1)
    for row in found.rows:
        assert (row.ms is not None) == (row.predicted_bytes <= budget)
    assert {tile for way, tile, _ in machine.taken if way == WAYS[0]} == {36, 100}


def test_after_a_tile_without_memory_a_way_tries_none_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    room = count(net(), WAYS[0], 60)
    machine = Machine(monkeypatch, pace=1e-6, room=room)
    found = profile(net(), ways=WAYS, tiles=[36, 60, 82, 100, 156], seconds=1)
    for way in WAYS:
        tried = [tile for each, tile, _ in machine.taken if each == way]
        assert sum(count(net(), way, tile) > room for tile in tried) <= 1
        assert [row.tile_in for row in found.rows if row.way == way and row.ms is not None] == [
            tile for tile in (36, 60, 82, 100, 156) if count(net(), way, tile) <= room
        ]


# ---- layer by layer

NETS: dict[str, dict[str, Any]] = {
    "plain": {"features": TINY},
    "resize": {"features": (2, 4, 8), "up_mode": "resize", "in_channels": 3, "out_channels": 4},
    "release": {"features": TINY, "up_activation": True, "last_up_channels": 6, "dropout": 0.5},
    "no skips": {"features": TINY, "skips": False},
}


def _forward_order(fast: FastUNet, tile: int) -> list[str]:
    called: list[str] = []
    for name, module in fast.named_modules():
        if hasattr(module, "weight"):
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    with torch.no_grad():
        fast(torch.zeros(1, fast.in_channels, tile, tile))
    return called


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_layers_are_the_nets_and_took_time(kind: str, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, pace=1e-6)
    fast = FastUNet(**NETS[kind])
    found = profile(fast, ways=[way], tiles=[60], batch=2, seconds=1, layers_of=60)
    assert [layer.name for layer in found.layers] == _forward_order(fast, 60)
    for layer in found.layers:
        assert layer.forward_ms is not None
        assert layer.forward_ms > 0
        assert (layer.backward_ms is None) == (way.mode == "predict")
        assert layer.backward_ms is None or layer.backward_ms > 0
        size = 2 if way.precision == "bfloat16" else 4
        assert layer.map_bytes == 2 * size * layer.channels * layer.rows * layer.columns
    forward = 2 * Layers(fast, 60, 60).flop("predict") / 1e9
    assert sum(layer.gflop for layer in found.layers) == pytest.approx(forward)
    head = found.layers[-1]
    assert (head.channels, head.rows) == (fast.out_channels, geometry.output_size(60, fast.depth))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_phases_add_up_to_the_planners_total(way: Way) -> None:
    phases = profile(net(), ways=[way], tiles=[36], batch=3, seconds=0, layers_of=100).phases
    parts = ("weights", "optimizer", "input", "activations", "gradients", "workspace", "context")
    assert sum(phases[name] for name in parts) == counted(net(), way, 100, batch=3).total
    assert phases["peak_at"] == counted(net(), way, 100, batch=3).peak_at
    assert (str(phases["tile_in"]), phases["way"]) == ("100", str(way))


def test_layers_above_the_budget_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, pace=1e-6)
    budget = count(net(), WAYS[0], 36)
    found = profile(net(), ways=WAYS[:1], tiles=[36, 100], budget_bytes=budget, seconds=1, layers_of=100)
    assert {layer.forward_ms for layer in found.layers} == {None}


def test_layers_without_memory_do_not_take_the_rows_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise MemoryError

    Machine(monkeypatch, pace=1e-6)
    monkeypatch.setattr(profiling, "_layer_times", full)
    found = profile(net(), ways=WAYS[:1], tiles=[36], seconds=1, layers_of=100)
    assert found.rows[0].ms is not None
    assert {layer.forward_ms for layer in found.layers} == {None}


@pytest.mark.parametrize("levels", [1, 2, 5, 7], ids=lambda n: f"depth {n - 1}")
def test_layers_of_a_net_of_any_depth_can_be_asked_for(levels: int) -> None:
    done = cli("--layers --seconds 0 --mode predict --json --features", ",".join(["1"] * levels))
    assert done.exit_code == 0, done.exception
    found = json.loads(done.stdout)
    assert len(found["layers"]) == 2 * levels + 3 * (levels - 1) + 1
    if levels < 7:
        assert str(found["phases"]["tile_in"]) == "572"


def test_layers_are_those_of_the_first_tile_named() -> None:
    done = cli("--layers --seconds 0 --features 4,8 --tiles 100,36 --json")
    assert json.loads(done.stdout)["layers"][0]["rows"] == 98


# ---- as data, as words

ROW_KEYS = {
    "way",
    "tile_in",
    "tile_out",
    "useful_mpixel",
    "predicted_bytes",
    "measured_bytes",
    "ms",
    "useful_mpixel_per_s",
    "gflop",
    "roof_share",
}


def _strict(text: str) -> Any:
    def never(name: str) -> Any:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=never)


def _keys_hold(found: dict[str, Any]) -> None:
    assert set(found) == {
        *("device", "net", "parameters", "batch", "roof_tflops", "rows"),
        *("budget_bytes", "largest", "layers", "phases"),
    }
    for row in found["rows"]:
        assert set(row) == ROW_KEYS
        assert set(row["way"]) == {"mode", "precision", "recompute"}
    for layer in found["layers"]:
        assert set(layer) == {
            *("name", "channels", "rows", "columns", "map_bytes"),
            *("gflop", "forward_ms", "backward_ms"),
        }


def test_a_profile_is_data(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, pace=1e-6)
    for seconds, budget in ((0, None), (1, 10**6)):
        found = profile(net(), ways=WAYS, tiles=[36, 572], budget_bytes=budget, seconds=seconds, layers_of=36)
        again = _strict(json.dumps(found.as_dict(), allow_nan=False))
        _keys_hold(again)
        assert again["net"]["features"] == [4, 8]
        assert [row["predicted_bytes"] for row in again["rows"]] == [row.predicted_bytes for row in found.rows]
        assert set(again["largest"]) == (set(NAMES) if budget else set())
        # what the data say of a net builds it
        assert FastUNet(**again["net"]).settings == net().settings


def _tables(text: str) -> dict[str, list[list[str]]]:
    """Lines below the head of each way's table, by the way's name, in words."""
    blocks = [block.splitlines() for block in text.split("\n\n")]
    return {lines[0]: [line.split() for line in lines[2:]] for lines in blocks if lines[0] in NAMES}


def test_people_read_a_head_and_a_line_per_row(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, pace=1e-6)
    budget = count(net(), WAYS[0], 100)
    found = profile(net(), ways=WAYS, tiles=[36, 100, 156], budget_bytes=budget, seconds=1)
    first, second, *_ = found.render().splitlines()
    assert first == f"1,650 parameters, batch 1, on {found.device}"
    assert second.startswith("roof (")
    tables = _tables(found.render())
    assert list(tables) == NAMES
    for way in WAYS:
        rows = [row for row in found.rows if row.way == way]
        for row, words in zip(rows, tables[str(way)], strict=True):
            assert words[:2] == [str(row.tile_in), str(row.tile_out)]
            assert float(words[3]) == pytest.approx(row.predicted_bytes / 1e9, rel=0.01)
            if row.predicted_bytes <= budget:
                assert len(words) == 9
                assert float(words[5]) == pytest.approx(row.ms, rel=0.01)
                assert words[8] == f"{row.roof_share:.0%}"
            else:
                assert words[4:7] == ["-", "-", "-"]
                assert " ".join(words[8:]) == "- over the budget"


def test_what_was_not_measured_is_a_dash() -> None:
    found = profile(net(), ways=WAYS[:1], tiles=[36], seconds=0)
    ((*_, predicted, measured, ms, speed, gflop, share),) = _tables(found.render())["train float32"]
    assert (measured, ms, speed, share) == ("-", "-", "-", "-")
    assert float(predicted) > 0
    assert float(gflop) > 0
    assert "roof (" not in found.render()
    assert "budget" not in found.render()


def test_a_budget_says_the_largest_tile_of_each_way_or_that_none_fits() -> None:
    fast = net(4, 8, 8, 8, 8)
    budget = count(fast, WAYS[5], 572)
    found = profile(fast, ways=WAYS, tiles=[572], budget_bytes=budget, seconds=0)
    tail = found.render().split("\n\n")[-1].splitlines()
    assert tail[0].startswith("largest tile inside")
    assert [line.split("  ")[1] for line in tail[1:]] == NAMES
    assert tail[6].endswith(" 572")
    below = replace(found, largest=dict.fromkeys(NAMES))
    assert below.render().count("none fits") == 6


def _row(ms: float, gflop: float, speed: float, gb: float) -> Row:
    return Row(WAYS[0], 1244, 1060, 1.12, round(gb * 1e9), round(gb * 1e9), ms, speed, gflop, 0.5)


def _profile_of(rows: Sequence[Row], layers: Sequence[LayerRow] = ()) -> Profile:
    phases = {"weights": 10**6, "peak_at": "head", "tile_in": "572", "way": "train float32"} if layers else {}
    return Profile("CPU", {}, 10, 1, {"float32": 0.2}, tuple(rows), None, {}, tuple(layers), phases)


def test_numbers_are_written_without_powers_of_ten() -> None:
    draw = random.Random(0)
    rows, layers = [], []
    for ms in (999.7, 1000.0, 10_200.0, *(10 ** draw.uniform(-1, 6) for _ in range(50))):
        gflop, speed = max(1e-3, ms * 10 ** draw.uniform(-2, 1)), 10 ** draw.uniform(-3, 3.5)
        rows.append(_row(ms, gflop, speed, 10 ** draw.uniform(-3, 2.9)))
        layers.append(LayerRow("head", 2, 388, 388, 10**6, gflop, ms, ms))
    odd = [line for line in _profile_of(rows, layers).render().splitlines() if re.search(r"\de[+-]\d", line)]
    assert odd == []


def test_columns_stand_under_their_heads() -> None:
    found = profile(net(), ways=WAYS[:1], tiles=[36, 572], seconds=0, layers_of=572)
    blocks = [block.splitlines() for block in found.render().split("\n\n")]
    for lines in blocks[1:3]:
        assert len({len(line) for line in lines[1:]}) == 1, "\n".join(lines[1:3])


# ---- the command


def test_memory_tells_the_largest_tile_of_each_way() -> None:
    done = cli("--memory 6GB --seconds 0 --tiles 572 --json --quiet")
    assert done.exit_code == 0, done.exception
    paper = net(64, 128, 256, 512, 1024)
    half: dict[str, Any] = {"dtype": torch.bfloat16}
    settings: list[dict[str, Any]] = [
        {"recompute": "none"},
        {"recompute": "level"},
        {"recompute": "none", "autocast": True, **half},
        {"recompute": "level", "autocast": True, **half},
        {"mode": "predict"},
        {"mode": "predict", **half},
    ]
    expected = [memory.largest_tile(6e9, paper, **each) for each in settings]
    found = _strict(done.stdout)
    assert found["largest"] == dict(zip(NAMES, expected, strict=True))
    assert found["largest"]["train float32"] == 1468
    assert (found["budget_bytes"], found["parameters"]) == (6 * 10**9, 31_030_658)


def test_a_way_in_which_none_fits_is_said_beside_those_that_do() -> None:
    fast = net(4, 8, 8, 8, 8)
    budget = count(fast, WAYS[5], 220)
    done = cli(f"--features 4,8,8,8,8 --memory {budget} --seconds 0 --tiles 220")
    assert done.exit_code == 0, done.exception
    assert done.stdout.count("none fits") == 5
    assert re.search(r"predict bfloat16 +220\n", done.stdout)
    as_data = _strict(cli(f"--features 4,8,8,8,8 --memory {budget} --seconds 0 --tiles 220 --json").stdout)
    assert as_data["largest"] == {**dict.fromkeys(NAMES), "predict bfloat16": 220}


@pytest.mark.parametrize("features", ["4,8", "32,64,128,256,512"])
def test_a_budget_below_the_smallest_tile_names_one_that_is_enough(features: str) -> None:
    done = cli(f"--features {features} --memory 1kB --seconds 0")
    assert done.exit_code == 3
    assert done.stdout == ""
    said = re.fullmatch(r"error: memory must be at least (.+), for tiles of (\d+) \((.+)\), got 1kB\n", done.stderr)
    assert said, done.stderr
    assert said[3] == "predict bfloat16"
    again = cli(f"--features {features} --seconds 0 --tiles {said[2]} --json --memory", said[1])
    assert again.exit_code == 0, again.stderr
    assert _strict(again.stdout)["largest"]["predict bfloat16"] >= int(said[2])


def test_one_mode_precision_and_recomputation_can_be_asked_for() -> None:
    for more, names in (
        ("", NAMES),
        ("--mode train", NAMES[:4]),
        ("--mode predict --precision float32", NAMES[4:5]),
        ("--mode train --precision bfloat16 --recompute level", NAMES[3:4]),
        ("--recompute none", [NAMES[0], NAMES[2], *NAMES[4:]]),
    ):
        done = cli(f"--features 4,8 --tiles 36 --seconds 0 {more}")
        assert list(_tables(done.stdout)) == names


def test_a_model_is_profiled_as_it_was_saved(tmp_path: Path) -> None:
    fast = FastUNet(3, 5, (2, 4, 8), up_mode="resize", dropout=0.5)
    unet_fast.save(fast, tmp_path)
    found = _strict(cli("--tiles 60 --seconds 0 --json --batch 2 --model", str(tmp_path)).stdout)
    assert FastUNet(**found["net"]).settings == fast.settings
    assert found["rows"][0]["predicted_bytes"] == counted(fast, WAYS[0], 60, batch=2).total


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("--features 4,x", "must be whole numbers with commas between"),
        ("--tiles 1e3", "must be whole numbers with commas between"),
        ("--features 4,8 --model model.safetensors", "a model has its own"),
        ("--classes 3 --model model.safetensors", "a model has its own"),
        ("--channels 1 --model model.safetensors", "a model has its own"),
        ("--up-mode resize --model model.safetensors", "a model has its own"),
        ("--mode predict --recompute level", "only training recomputes"),
    ],
)
def test_what_cannot_be_meant_is_a_usage_error(text: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # typer draws a frame as wide as the screen around what it says
    monkeypatch.setenv("COLUMNS", "200")
    done = cli(text)
    assert (done.exit_code, done.stdout) == (2, "")
    assert said in done.stderr


def test_progress_is_said_unless_it_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, pace=1e-6)
    text = "--features 4,8 --tiles 36,100 --seconds 1 --mode predict --precision float32"
    loud, quiet = cli(text), cli(f"{text} --quiet")
    assert loud.stderr == "measuring predict float32, tile 36\nmeasuring predict float32, tile 100\n"
    assert quiet.stderr == ""
    assert quiet.stdout == loud.stdout


def test_in_a_process_of_its_own_data_are_all_there_is_on_stdout() -> None:
    one = "--mode train --precision float32 --recompute none"
    command = f"unet_fast profile --features 4,8 --tiles 36 --seconds 8 {one} --layers --json"
    done = subprocess.run([sys.executable, "-m", *command.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = _strict(done.stdout)
    _keys_hold(found)
    assert done.stderr == "measuring train float32, tile 36\ntiming the layers of tile 36\n"
    roof = found["roof_tflops"]["float32"]
    # slower than the slowest phone, faster than the fastest server
    assert 1e-4 < roof < 1e3
    for values in found["rows"]:
        row = Row(**{**values, "way": Way(**values["way"])})
        _agree(row, roof)
        assert _NO_PROC or row.measured_bytes is not None
    assert all(layer["forward_ms"] > 0 and layer["backward_ms"] > 0 for layer in found["layers"])


# ---- the picture


def _curves(monkeypatch: pytest.MonkeyPatch, place: Path, text: str) -> Any:
    drawn: list[tuple[Any, ...]] = []
    monkeypatch.setattr(profiling, "draw_profile", lambda *arguments: drawn.append(arguments))
    done = cli(f"{text} --quiet --plot", str(place / "plot.png"))
    assert done.exit_code == 0, done.exception
    ((path, curves, title),) = drawn
    assert path == place / "plot.png"
    return curves, title


@pytest.mark.parametrize("features", ["4,8", "64,128,256,512,1024"])
def test_drawn_curves_cross_a_cards_memory_at_its_largest_tile(
    features: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves, title = _curves(monkeypatch, tmp_path, f"--features {features} --seconds 0 --tiles 572")
    fast = net(*map(int, features.split(",")))
    assert "batch 1" in title
    assert [curve.name for curve in curves] == NAMES
    crossed = 0
    for curve, way in zip(curves, WAYS, strict=True):
        assert len(curve.tiles) == len(curve.counted_bytes) > 20
        assert all(0 < b - a <= 64 for a, b in pairwise(curve.tiles))
        assert (curve.expected, curve.measured) == ([], [])
        for card in (4e9, 6e9, 8e9, 12e9, 24e9):
            inside = [tile for tile, size in zip(curve.tiles, curve.counted_bytes, strict=True) if size <= card]
            if len(inside) == len(curve.tiles):
                continue
            settings = {} if way.precision == "float32" else {"dtype": torch.bfloat16, "autocast": way.mode == "train"}
            largest = memory.largest_tile(card, fast, mode=way.mode, recompute=way.recompute, **settings)
            assert inside[-1] <= largest < inside[-1] + 64
            crossed += 1
    assert crossed >= (20 if fast.depth == 4 else 0)


@pytest.mark.parametrize("tiles", ["36,100,156", "156,100,36"])
def test_curves_expect_the_rate_of_the_largest_tile_measured(
    tiles: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(tile: int, pace_of: int) -> float:
        return 2 * Layers(net(), tile, tile).flop("predict") / 1e9 / pace_of

    def useful(tile: int) -> float:
        return 2 * (tile - 16) ** 2 / 1e6

    # faster with each tile
    class Larger(Machine):
        def step(self, settings: Any, way: Way, tile: int, *_: Any) -> Measured:
            return Measured(7, seconds(tile, tile))

    Larger(monkeypatch, pace=0)
    (curve, _), _ = _curves(
        monkeypatch, tmp_path, f"--features 4,8 --seconds 5 --mode predict --batch 2 --tiles {tiles}"
    )
    assert curve.tiles[0] == 36
    assert sorted(curve.measured) == [
        (tile, 7, pytest.approx(useful(tile) / seconds(tile, tile))) for tile in (36, 100, 156)
    ]
    assert curve.expected == pytest.approx([useful(tile) / seconds(tile, 156) for tile in curve.tiles])


def test_what_has_no_bytes_is_expected_but_not_a_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(Machine):
        def step(self, *_: Any) -> Measured:
            return Measured(None, 0.01)

    Silent(monkeypatch, pace=0)
    curves, _ = _curves(monkeypatch, tmp_path, "--features 4,8 --seconds 5 --mode predict --tiles 36")
    assert all(curve.measured == [] and len(curve.expected) == len(curve.tiles) for curve in curves)


@pytest.mark.parametrize("name", ["plot.png", "new/plot.PNG", "plot.svg", "plot.pdf"])
def test_a_plot_is_a_picture(name: str, tmp_path: Path) -> None:
    place = tmp_path / name
    done = cli("--features 4,8 --seconds 0 --tiles 36 --quiet --plot", str(place))
    assert done.exit_code == 0, done.exception
    assert [p.name for p in place.parent.iterdir()] == [place.name]
    start = place.read_bytes()[:8]
    if place.suffix in (".svg", ".pdf"):
        assert start.startswith(b"<?xml" if place.suffix == ".svg" else b"%PDF")
        return
    assert start == b"\x89PNG\r\n\x1a\n"
    with Image.open(place) as picture:
        assert picture.size == (1625, 676)
        assert np.asarray(picture.convert("L")).std() > 5


def test_a_budget_for_the_smallest_tile_alone_can_be_drawn(tmp_path: Path) -> None:
    budget = count(net(4, 8, 8, 8, 8), WAYS[5], 188)
    done = cli(f"--features 4,8,8,8,8 --memory {budget} --seconds 0 --plot", str(tmp_path / "plot.png"))
    assert done.exit_code == 0, done.exception
    assert (tmp_path / "plot.png").exists()
