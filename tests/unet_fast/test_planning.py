"""The planner on machines that are made up, so that what would have been best is known.

A machine takes `beside` bytes and `slope` bytes for each one counted, works at one rate for each precision, and may
have no memory above a cap. What is tried, and what is chosen, is compared with every setting there is.
"""

import doctest
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import pytest
import torch

from tests.proof.properties import given, st
from unet_fast import FastUNet, geometry, planning
from unet_fast.errors import BadInput
from unet_fast.layers import Layers
from unet_fast.measuring import Measured
from unet_fast.planning import OFFERED, RECOMPUTE, Choice, Setting, Trial, choose, counted_bytes
from unet_fast.units import bytes_of, readable

MB = 10**6
WAYS = tuple(product(OFFERED, RECOMPUTE))


@pytest.fixture(autouse=True, scope="module")
def counted_once() -> Iterator[None]:
    """The same few tiles are counted for every machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "counted_bytes", functools.cache(counted_bytes))
        patch.setattr(planning, "Layers", layers_of)
        yield


layers_of = functools.cache(Layers)


@functools.cache
def net_of(features: tuple[int, ...], dropout: float = 0.0) -> FastUNet:
    with torch.device("meta"):
        return FastUNet(features=features, dropout=dropout)


def tiles_of(net: FastUNet, count: int) -> range:
    step = geometry.step_multiple(net.depth)
    smallest = geometry.legal_sizes(1, 20 * step, net.depth)[0]
    return range(smallest, smallest + count * step, step)


@dataclass
class Machine:
    """Takes steps, and remembers which and how many bytes they took."""

    net: FastUNet = field(repr=False)
    slope: float = 1.1
    beside: float = 0.0
    rates: dict[str, float] = field(default_factory=lambda: {"float32": 1e11, "bfloat16": 3e10})
    batch: int = 1
    cap: float | None = None
    refusal: Callable[[], BaseException] = MemoryError
    tells_bytes: bool = True
    # how many times slower, the larger the tile: at `full` bytes so much more time than at none
    drag: float = 0.0
    full: float = 1.0
    steps: list[tuple[Setting, float]] = field(default_factory=list)

    def bytes(self, setting: Setting) -> float:
        return self.beside + self.slope * planning.counted_bytes(self.net, setting, self.batch)

    def seconds(self, setting: Setting) -> float:
        layers = layers_of(self.net, setting.tile_in, setting.tile_in)
        work = self.batch * layers.flop("train", again=setting.recompute == "level")
        slower = 1 + self.drag * min(1.0, self.bytes(setting) / self.full)
        return work / self.rates[setting.precision] * slower

    def speed(self, setting: Setting) -> float:
        return self.batch * geometry.output_size(setting.tile_in, self.net.depth) ** 2 / 1e6 / self.seconds(setting)

    def __call__(self, setting: Setting) -> Measured:
        took = self.bytes(setting)
        self.steps.append((setting, took))
        if self.cap is not None and took > self.cap:
            raise self.refusal()
        return Measured(round(took) if self.tells_bytes else None, self.seconds(setting))

    def choose(self, budget: int, tiles: Sequence[int], **more: Any) -> Choice:
        return choose(self.net, budget, tiles, self, batch=self.batch, **more)


Situation = tuple[Machine, int, range]


@st.composite
def situations(draw: Any) -> Situation:
    """A machine, a budget and tiles; the budget lies anywhere from none fitting to all fitting."""
    features = draw(st.sampled_from([(4, 8, 16), (8, 16), (16, 32, 64, 128), (64, 128, 256, 512, 1024)]))
    net = net_of(features, draw(st.sampled_from([0.0, 0.5])))
    tiles = tiles_of(net, draw(st.integers(1, 70)))
    slow, fast = draw(st.floats(9, 12)), draw(st.floats(-1, 0.7))
    machine = Machine(
        net,
        slope=draw(st.floats(0.8, 1.4)),
        beside=draw(st.just(0.0) | st.floats(0, 300 * MB)),
        rates={"float32": 10**slow, "bfloat16": 10 ** (slow + fast)},
        batch=draw(st.sampled_from([1, 1, 3])),
    )
    low, high = 0.6 * machine.bytes(Setting(tiles[0])), 1.4 * machine.bytes(Setting(tiles[-1]))
    return machine, round(low * (high / low) ** draw(st.floats(0, 1))), tiles


def chosen_or_refused(machine: Machine, budget: int, tiles: Sequence[int], **more: Any) -> Choice | str:
    try:
        return machine.choose(budget, tiles, **more)
    except (BadInput, MemoryError) as error:
        return str(error)


def all_settings(tiles: Sequence[int]) -> list[Setting]:
    return [Setting(tile, *way) for tile, way in product(tiles, WAYS)]


def best_of(machine: Machine, settings: Sequence[Setting], bytes_allowed: float) -> Setting | None:
    fitting = [setting for setting in settings if machine.bytes(setting) <= bytes_allowed]
    return max(fitting, key=machine.speed, default=None)


def counted_to_fit(machine: Machine, budget: float, tiles: Sequence[int]) -> list[Setting]:
    """Those whose precision has a smallest tile that is counted to fit: of others nothing is tried."""
    smallest = {
        setting.precision
        for setting in all_settings(tiles[:1])
        if planning.counted_bytes(machine.net, setting, machine.batch) <= 0.95 * budget
    }
    return [setting for setting in all_settings(tiles) if setting.precision in smallest]


@given(situations())
def test_what_is_chosen_was_tried_and_fits(situation: Situation) -> None:
    machine, budget, tiles = situation
    found = chosen_or_refused(*situation)
    if isinstance(found, str):
        return
    assert found.chosen in found.trials
    assert found.chosen.fits
    assert found.chosen.setting.tile_in in tiles
    assert machine.bytes(found.setting) <= budget + 1
    assert found.budget_bytes == budget
    assert found.chosen.mpixel_per_s == pytest.approx(machine.speed(found.setting))


@given(situations())
def test_trials_are_the_steps_that_were_taken_and_none_is_taken_twice(
    situation: Situation,
) -> None:
    machine, budget, _ = situation
    found = chosen_or_refused(*situation)
    assert len({setting for setting, _ in machine.steps}) == len(machine.steps)
    if isinstance(found, str):
        return
    assert [trial.setting for trial in found.trials] == [setting for setting, _ in machine.steps]
    for trial, (_, took) in zip(found.trials, machine.steps, strict=True):
        assert trial.measured_bytes == round(took)
        assert trial.fits == (round(took) <= budget)


def beyond(machine: Machine, budget: int) -> dict[str, float]:
    """Steps that took more than the budget, and how many times it; not of the first.

    How much a machine takes beside the count nobody knows before that one.
    """
    return {str(setting): round(took / budget, 3) for setting, took in machine.steps[1:] if took > 1.005 * budget}


@given(situations())
def test_the_first_step_is_of_the_smallest_tile_and_no_later_one_takes_more_than_the_budget(
    situation: Situation,
) -> None:
    machine, budget, tiles = situation
    chosen_or_refused(*situation)
    assert all(setting.tile_in == tiles[0] for setting, _ in machine.steps[:1])
    assert beyond(machine, budget) == {}


@pytest.mark.parametrize("slope", [0.8, 1.0, 1.2, 1.3, 1.4])
@pytest.mark.parametrize("features", [(4, 8, 16), (8, 16), (16, 32, 64, 128)], ids=str)
def test_a_way_that_was_not_tried_yet_is_forecast_with_caution_too(features: tuple[int, ...], slope: float) -> None:
    # such a way knows what the first step took beside the count, and takes it for a constant: above a slope of 1 its
    # own first step, of a large tile at once, goes beyond the budget
    net = net_of(features)
    tiles = tiles_of(net, 60)
    found: dict[int, dict[str, float]] = {}
    for share in range(30):
        machine = Machine(net, slope=slope, batch=3)
        budget = round(1.08**share * 1.4 * machine.bytes(Setting(tiles[0])))
        machine.choose(budget, tiles)
        found[budget] = beyond(machine, budget)
    assert {budget: over for budget, over in found.items() if over} == {}


@given(situations(), st.floats(0, 0.5))
def test_what_is_chosen_is_nearly_as_fast_as_the_best_that_leaves_a_quarter_free(
    situation: Situation, drag: float
) -> None:
    machine, budget, tiles = situation
    machine.drag, machine.full = drag, budget
    found = chosen_or_refused(*situation)
    best = best_of(machine, counted_to_fit(machine, budget, tiles), 0.75 * budget)
    if best is not None:
        assert not isinstance(found, str)
        assert machine.speed(found.setting) >= 0.85 * machine.speed(best)


@given(situations())
def test_a_tile_of_twice_the_smallest_is_missed_by_little_if_it_leaves_a_seventh_free(
    situation: Situation,
) -> None:
    machine, budget, tiles = situation
    found = chosen_or_refused(*situation)
    best = best_of(machine, all_settings(tiles), 6 / 7 * budget)
    # next to the smallest a tile a step larger has many times its useful pixels
    if best is not None and best.tile_in >= 2 * tiles[0]:
        assert not isinstance(found, str)
        assert machine.speed(found.setting) >= 0.85 * machine.speed(best)


@given(situations())
def test_few_steps_are_tried(situation: Situation) -> None:
    machine = situation[0]
    chosen_or_refused(*situation)
    assert len(machine.steps) <= 10


# a budget that is counted not to fit is refused before any step could say what there is beside
MORE = ", and what the data and libraries take,"
MINIMUM = rf"memory must be at least ([0-9.]+ [MG]?B)(?:{MORE})? for tile (\d+), .*, got [0-9.]+ [MG]?B"


@given(situations())
def test_a_budget_that_a_refusal_names_is_enough_in_the_end(situation: Situation) -> None:
    machine, budget, tiles = situation
    for _ in range(4):
        found = chosen_or_refused(machine, budget, tiles)
        if not isinstance(found, str):
            return
        named = re.fullmatch(MINIMUM, found)
        assert named is not None
        assert int(named[2]) == tiles[0]
        budget = max(budget + 1, bytes_of(named[1]))
    pytest.fail("refused again and again")


@given(situations(), st.sampled_from(OFFERED), st.sampled_from(RECOMPUTE))
def test_only_what_is_allowed_is_tried(situation: Situation, precision: str, recompute: str) -> None:
    machine = situation[0]
    chosen_or_refused(*situation, precisions=[precision], recompute=[recompute])
    assert {(setting.precision, setting.recompute) for setting, _ in machine.steps} <= {(precision, recompute)}


@given(situations(), st.floats(0.5, 1.0))
def test_headroom_is_a_smaller_budget(situation: Situation, headroom: float) -> None:
    machine, budget, tiles = situation
    found = chosen_or_refused(machine, budget, tiles, headroom=headroom)
    smaller = chosen_or_refused(machine, round(headroom * budget), tiles)
    if isinstance(found, str) or isinstance(smaller, str):
        assert isinstance(found, str)
        assert isinstance(smaller, str)
    else:
        assert (found.chosen, found.trials, found.budget_bytes) == (smaller.chosen, smaller.trials, budget)


@given(situations())
def test_a_given_tile_is_kept(situation: Situation) -> None:
    machine, budget, tiles = situation
    found = chosen_or_refused(machine, budget, tiles[-1:])
    assert {setting.tile_in for setting, _ in machine.steps} <= {tiles[-1]}
    if not isinstance(found, str):
        assert (found.setting.tile_in, found.why) == (tiles[-1], "no other tile is allowed")


@given(situations(), st.floats(0.3, 1.2), st.booleans())
def test_where_memory_runs_out_earlier_than_was_said_something_that_runs_is_chosen(
    situation: Situation, share: float, on_gpu: bool
) -> None:
    machine, budget, _ = situation
    machine.cap = share * budget
    machine.refusal = (lambda: torch.OutOfMemoryError("CUDA out of memory")) if on_gpu else MemoryError
    found = chosen_or_refused(*situation)
    if isinstance(found, str):
        return
    assert machine.bytes(found.setting) <= machine.cap
    for trial in found.trials:
        ran = machine.bytes(trial.setting) <= machine.cap
        assert (trial.seconds is not None, trial.mpixel_per_s is not None, trial.measured_bytes is not None) == (
            ran,
        ) * 3
        assert ran or not trial.fits


@given(situations())
def test_where_bytes_cannot_be_measured_it_is_the_count_and_a_third_that_fits(
    situation: Situation,
) -> None:
    machine, budget, _ = situation
    machine.tells_bytes = False
    found = chosen_or_refused(*situation)
    if isinstance(found, str):
        return
    assert all(trial.measured_bytes is None for trial in found.trials)
    assert 1.3 * found.chosen.counted_bytes <= budget + 1
    assert "unknown" in found.table()


@given(situations(), st.floats(0, 3.0))
def test_where_large_tiles_are_slower_no_more_is_lost_than_they_are_slower(situation: Situation, drag: float) -> None:
    machine, budget, tiles = situation
    machine.drag, machine.full = drag, budget
    found = chosen_or_refused(*situation)
    best = best_of(machine, counted_to_fit(machine, budget, tiles), 0.75 * budget)
    if best is not None:
        assert not isinstance(found, str)
        assert machine.speed(found.setting) * (1 + drag) >= 0.85 * machine.speed(best)


@given(situations())
def test_the_table_has_a_line_for_each_trial_and_marks_the_chosen_one(
    situation: Situation,
) -> None:
    machine, budget, _ = situation
    machine.cap = 0.8 * budget
    found = chosen_or_refused(*situation)
    if isinstance(found, str):
        return
    first, _, *lines = found.table().splitlines()
    assert first == f"inside {readable(budget)}: {found.setting}; {found.why}"
    assert len(lines) == len(found.trials)
    for line, trial in zip(lines, found.trials, strict=True):
        named = line.removeprefix("->").split()[:3]
        assert named == [str(trial.setting.tile_in), trial.setting.precision, trial.setting.recompute]
        assert line.startswith("->") == (trial is found.chosen)
        assert ("no memory for it" in line) == (trial.seconds is None)


NET = net_of((16, 32, 64, 128))
TILES = tiles_of(NET, 60)


def test_a_refusal_names_the_leanest_way_what_it_takes_and_what_was_given() -> None:
    with pytest.raises(
        BadInput, match=rf"^memory must be at least 7\.2 MB{MORE} for tile 92, bfloat16, recompute level, got 4\.0 MB$"
    ):
        Machine(NET).choose(4 * MB, TILES)
    with pytest.raises(BadInput, match=r"^memory must be at least 2\.12 GB for tile 92, float32, got 1\.00 GB$"):
        Machine(NET, beside=2e9).choose(10**9, TILES, precisions=["float32"], recompute=["none"])


def test_a_refusal_with_headroom_names_the_whole_budget() -> None:
    with pytest.raises(BadInput, match=r"^memory must be at least 4\.23 GB for tile 92, float32, got 1\.00 GB$"):
        Machine(NET, beside=2e9).choose(10**9, TILES, headroom=0.5, precisions=["float32"], recompute=["none"])


def test_nothing_is_tried_that_is_counted_not_to_fit() -> None:
    machine = Machine(NET, slope=0.8)
    with pytest.raises(BadInput):
        machine.choose(4 * MB, TILES)
    assert machine.steps == []


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), ValueError("memory"), ZeroDivisionError(), KeyboardInterrupt()]
)
def test_other_errors_pass_through(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        Machine(NET, cap=0.0, refusal=lambda: error).choose(10**9, TILES)
    assert caught.value is error


# what a machine takes for the smallest tile in float32, in the two ways
PLAIN, LEAN = (counted_bytes(NET, Setting(TILES[0], "float32", again)) for again in RECOMPUTE)


def test_where_there_is_no_memory_for_the_first_step_a_leaner_way_is_tried() -> None:
    # the precision has no rate then, and a way without a rate is expected to give nothing
    machine = Machine(NET, slope=1.0, beside=500 * MB, cap=500 * MB + (PLAIN + LEAN) / 2)
    found = machine.choose(600 * MB, TILES[:1], precisions=["float32"])
    assert found.setting == Setting(TILES[0], "float32", "level")


def test_where_there_is_no_memory_at_all_that_is_said() -> None:
    sentence = r"^there is no memory for tile 92, bfloat16, recompute level, though 600 MB are allowed$"
    with pytest.raises(MemoryError, match=sentence):
        Machine(NET, cap=0.0).choose(600 * MB, TILES)


PLAINLY: dict[str, Any] = {"precisions": ["float32"], "recompute": ["none"]}


def speeds(*each: tuple[Setting, float]) -> Callable[[Setting], Measured]:
    """Steps of so many Mpixel a second, in next to no memory."""
    known = dict(each)
    return lambda setting: Measured(1, geometry.output_size(setting.tile_in, NET.depth) ** 2 / 1e6 / known[setting])


def test_why_says_what_decided() -> None:
    machine = Machine(NET)
    assert machine.choose(10**9, TILES[4:5]).why == "no other tile is allowed"
    assert machine.choose(10**12, TILES).why == "the tile covers the largest image"
    assert machine.choose(50 * MB, TILES).why == "the most useful pixels a second of what fits"
    small, large = Setting(TILES[0]), Setting(TILES[1])
    found = choose(NET, 10**9, TILES[:2], speeds((small, 2.0), (large, 1.0)), **PLAINLY)
    assert (found.setting, found.why) == (small, "larger tiles fit, but give fewer useful pixels a second here")


def test_of_two_that_are_nearly_as_fast_the_larger_tile_is_taken() -> None:
    for slower, taken in ((0.98, TILES[1]), (0.96, TILES[0])):
        each = (Setting(TILES[0]), 1.0), (Setting(TILES[1]), slower)
        assert choose(NET, 10**9, TILES[:2], speeds(*each), **PLAINLY).setting.tile_in == taken


@pytest.mark.parametrize("faster", OFFERED)
def test_the_faster_precision_is_chosen(faster: str) -> None:
    machine = Machine(NET, rates={name: 4e10 if name == faster else 1e10 for name in OFFERED})
    assert machine.choose(100 * MB, TILES).setting.precision == faster


def test_recomputation_is_chosen_where_the_larger_tile_is_worth_a_third_more_work() -> None:
    machine = Machine(NET, slope=1.0)
    smallest, largest = Setting(TILES[0]), Setting(TILES[-1])
    tight = machine.choose(round(1.3 * machine.bytes(smallest)), TILES, precisions=["float32"])
    ample = machine.choose(round(2.0 * machine.bytes(largest)), TILES, precisions=["float32"])
    assert (tight.setting.recompute, ample.setting.recompute) == ("level", "none")


def test_what_is_tried_is_said() -> None:
    said: list[str] = []
    found = Machine(NET).choose(100 * MB, TILES, say=said.append)
    assert said == [f"trying a step of {trial.setting}" for trial in found.trials]


def test_a_setting_is_written_as_people_say_it() -> None:
    assert str(Setting(572)) == "tile 572, float32"
    assert str(Setting(572, "bfloat16", "level")) == "tile 572, bfloat16, recompute level"


def test_the_table_looks_like_this() -> None:
    small = Trial(Setting(188), 10**9, 2 * 10**9, 0.5, 0.25, fits=True)
    large = Trial(Setting(572, "bfloat16", "level"), 3 * 10**9, None, None, None, fits=False)
    over = Trial(Setting(1084), 4 * 10**9, 5 * 10**9, 2.0, 0.125, fits=False)
    blind = Trial(Setting(204), 10**9, None, 1.0, 0.2, fits=True)
    first, header, *lines = Choice(small, (small, large, over, blind), 4 * 10**9, "it is so").table().splitlines()
    assert first == "inside 4.00 GB: tile 188, float32; it is so"
    assert header.split()[:5] == ["tile", "precision", "recompute", "counted", "measured"]
    assert lines == [
        "->  188  float32    none        1.00 GB    2.00 GB       0.5  0.25",
        "    572  bfloat16   level       3.00 GB          -         no memory for it",
        "   1084  float32    none        4.00 GB    5.00 GB         2  0.125  over",
        "    204  float32    none        1.00 GB    unknown         1  0.2",
    ]


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(planning).failed == 0


def test_a_precision_that_is_slow_at_the_smallest_tile_only_is_tried_at_a_larger_one() -> None:
    # drawing a tile costs both alike; bfloat16 a little more, and half as much for the arithmetic
    def probe(setting: Setting) -> Measured:
        flop = Layers(NET, setting.tile_in, setting.tile_in).flop("train", again=setting.recompute == "level")
        fixed, rate = {"float32": (15e-3, 2e11), "bfloat16": (16.5e-3, 4.5e11)}[setting.precision]
        return Measured(counted_bytes(NET, setting), fixed + flop / rate)

    for budget in (100 * MB, 300 * MB, 10**9):
        assert choose(NET, budget, TILES, probe).setting.precision == "bfloat16"
