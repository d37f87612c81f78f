"""Which tile, precision and recomputation train fastest inside a budget of bytes: counted first, then tried.

The halo costs (tile_in / tile_out)^2 of the work, so a larger tile answers for more pixels a second, as long as it
fits; recomputing maps makes room for a larger one at a third more work; bfloat16 halves the maps, and is fast on some
machines and slow on others. Each way is counted (`unet_fast.memory`); one step of the smallest tile tells the
machine's rate and what it takes beside the count; then the way that promises most is climbed by real steps of growing
tiles, so that the budget is approached from below, and another only where it promises more than was found.
At last a precision that was not is tried at a like tile, and smaller tiles as long as they are faster.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch

import unet_kernels

from . import geometry
from .errors import BadInput
from .layers import Layers
from .measuring import Measured, is_out_of_memory
from .memory import estimate
from .model import FastUNet
from .units import readable

__all__ = ["OFFERED", "PRECISIONS", "RECOMPUTE", "Choice", "Setting", "Trial", "choose", "counted_bytes"]

# of the maps; weights, their gradients and the loss are float32
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# what is chosen from by itself: float16 has too few exponents for some gradients, and is only for who asks for it
OFFERED = ("float32", "bfloat16")
RECOMPUTE = ("none", "level")

# where a way was measured at one tile only, a larger one takes at most so much for each byte counted more
_CAUTION = 1.5
# a tile takes at least this for every byte counted more
_LEAST = 0.5
# and from the smallest tile on, most of what is counted
_STEADY = 0.85
# what a slope between two measurements may be wrong by
_SLACK = 1.03
# what is tried is forecast to take at most this share of the budget: trying must not exceed it either
_MARGIN = 0.95
# a larger tile is tried if it has this many times the useful pixels of the largest that fits
_GAIN = 1.1
# a smaller tile that may be faster is looked for at this share of the side
_DESCENT = 0.65
# after a tile for which there was no memory at all, one of at most this share of its bytes
_RETREAT = 0.85
# bytes per byte counted where none can be measured
_UNMEASURED = 1.3
# two speeds are the same within this; then the larger tile is taken
_NOISE = 0.97


@dataclass(frozen=True, slots=True)
class Setting:
    """A way to train: side of the tile that goes in, one of PRECISIONS, "none" or "level"."""

    tile_in: int
    precision: str = "float32"
    recompute: str = "none"

    def __str__(self) -> str:
        again = ", recompute level" if self.recompute == "level" else ""
        return f"tile {self.tile_in}, {self.precision}{again}"


@dataclass(frozen=True, slots=True)
class Trial:
    """One real step: bytes counted and taken, seconds, useful output Mpixel a second; None where it did not run."""

    setting: Setting
    counted_bytes: int
    measured_bytes: int | None
    seconds: float | None
    mpixel_per_s: float | None
    fits: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """The trial that was chosen, all that were made, and why it was this one."""

    chosen: Trial
    trials: tuple[Trial, ...]
    budget_bytes: int
    why: str

    @property
    def setting(self) -> Setting:
        return self.chosen.setting

    def table(self) -> str:
        """For people: what was chosen and why, and a line for each step that was tried."""
        lines = [f"inside {readable(self.budget_bytes)}: {self.setting}; {self.why}"]
        lines += ["   tile  precision  recompute   counted   measured   seconds  useful Mpixel/s"]
        for trial in self.trials:
            setting = trial.setting
            ran = trial.seconds is not None
            took = readable(trial.measured_bytes) if trial.measured_bytes is not None else "unknown" if ran else "-"
            numbers = f"{trial.seconds:8.3g}  {trial.mpixel_per_s:.3g}" if ran else "       no memory for it"
            lines.append(
                f"{'->' if trial is self.chosen else '  '} {setting.tile_in:4d}  {setting.precision:9s}  "
                f"{setting.recompute:9s}  {readable(trial.counted_bytes):>8s}  {took:>9s}  {numbers}"
                f"{'' if trial.fits or not ran else '  over'}"
            )
        return "\n".join(lines)


def choose(
    net: FastUNet,
    budget_bytes: int,
    tiles: Sequence[int],
    probe: Callable[[Setting], Measured],
    *,
    headroom: float = 1.0,
    batch: int = 1,
    device: torch.device | str = "cuda",
    precisions: Sequence[str] = OFFERED,
    recompute: Sequence[str] = RECOMPUTE,
    say: Callable[[str], None] = lambda _: None,
) -> Choice:
    """The setting with the most useful output pixels a second whose real step stays inside a budget.

    Args:
        net: what is trained; only its sizes matter.
        budget_bytes: for all that `probe` measures.
        tiles: legal sides that may be chosen, ascending; the last one covers the images.
        probe: takes one real training step and tells its bytes and seconds; may run out of memory.
        headroom: the share of the budget that a trial may take; the rest is for what comes in later steps.
        batch: tiles a step.
        device: where the steps are taken.
        precisions, recompute: what may be chosen.
        say: is told what is tried.

    Raises:
        BadInput: nothing fits; says what the smallest tile takes.
    """
    planner = _Planner(net, round(headroom * budget_bytes), batch, torch.device(device), probe, say)
    ways = [_Way(planner, *each) for each in product(precisions, recompute)]
    for precision in precisions:
        # nothing is tried that is counted not to fit
        fitting = [way for way in ways if way.precision == precision and way.largest(tiles[:1])]
        for way in fitting:
            if planner.attempt(way, tiles[0]).seconds is not None:
                break
    while True:
        best = max((way for way in ways if not way.climbed), key=lambda way: way.expected(tiles), default=None)
        if best is not None and best.expected(tiles) > planner.fastest():
            best.climb(tiles)
        elif not planner.try_rival(ways, tiles):
            break
    planner.descend(ways, tiles)
    trials = tuple(planner.trials.values())
    fits = [trial for trial in trials if trial.fits]
    if trials and all(trial.seconds is None for trial in trials):
        raise MemoryError(f"there is no memory for {trials[-1].setting}, though {readable(budget_bytes)} are allowed")
    if not fits:
        way = min(ways, key=lambda way: way.forecast(tiles[0]))
        needed = readable(way.forecast(tiles[0]) / _MARGIN / headroom, up=True)
        more = "" if trials else ", and what the data and libraries take,"
        given = readable(budget_bytes)
        raise BadInput(f"memory must be at least {needed}{more} for {way.setting(tiles[0])}, got {given}")
    good = [trial for trial in fits if (trial.mpixel_per_s or 0.0) >= _NOISE * planner.fastest()]
    chosen = max(good, key=lambda trial: trial.setting.tile_in)
    return Choice(chosen, trials, budget_bytes, _why(chosen, fits, tiles))


def _why(chosen: Trial, fits: Sequence[Trial], tiles: Sequence[int]) -> str:
    if len(tiles) == 1:
        return "no other tile is allowed"
    if chosen.setting.tile_in == tiles[-1]:
        return "the tile covers the largest image"
    if chosen.setting.tile_in < max(trial.setting.tile_in for trial in fits):
        return "larger tiles fit, but give fewer useful pixels a second here"
    return "the most useful pixels a second of what fits"


def counted_bytes(net: FastUNet, setting: Setting, batch: int = 1, device: torch.device | str = "cuda") -> int:
    """`unet_fast.memory.estimate` of a training step with momentum, weights included.

    Where a device cannot multiply bfloat16, the maps are counted as the float32 that its convolutions work on.
    """
    dtype = unet_kernels.multiplies_in(device, PRECISIONS[setting.precision])
    return estimate(
        net,
        setting.tile_in,
        dtype=dtype,
        autocast=dtype != torch.float32,
        batch=batch,
        recompute=setting.recompute,
    ).total


class _Planner:
    """The steps tried so far, and what they tell about those that were not."""

    def __init__(
        self,
        net: FastUNet,
        budget: int,
        batch: int,
        device: torch.device,
        probe: Callable[[Setting], Measured],
        say: Callable[[str], None],
    ) -> None:
        self.net, self.budget, self.batch, self.device, self.probe, self.say = net, budget, batch, device, probe, say
        self.trials: dict[Setting, Trial] = {}
        # FLOP a second, by precision, of the last tile tried
        self.rates: dict[str, float] = {}
        # (bytes counted, bytes taken) of the first step that ran, by precision
        self.first: dict[str, tuple[int, int]] = {}

    def useful(self, tile: int) -> float:
        """Mpixel that a step answers for."""
        return self.batch * geometry.output_size(tile, self.net.depth) ** 2 / 1e6

    def counted(self, setting: Setting) -> int:
        return counted_bytes(self.net, setting, self.batch, self.device)

    def work(self, setting: Setting) -> float:
        layers = Layers(self.net, setting.tile_in, setting.tile_in)
        return self.batch * layers.flop("train", again=setting.recompute == "level")

    def fastest(self) -> float:
        return max((trial.mpixel_per_s or 0.0 for trial in self.trials.values() if trial.fits), default=0.0)

    def try_rival(self, ways: Sequence["_Way"], tiles: Sequence[int]) -> bool:
        """Try a precision that was seen at the smallest tile only at one like the fastest's; whether there was one.

        Where a step is mostly drawing the smallest tile tells nothing about arithmetic.
        """
        best = max((t for t in self.trials.values() if t.fits), key=lambda t: t.mpixel_per_s or 0.0, default=None)
        seen = {setting.precision for setting in self.trials if setting.tile_in > tiles[0]}
        for way in ways:
            tile = way.largest([tile for tile in tiles if best is not None and tile <= best.setting.tile_in])
            if way.precision not in seen and tile is not None and tile > tiles[0]:
                self.attempt(way, tile)
                return True
        return False

    def descend(self, ways: Sequence["_Way"], tiles: Sequence[int]) -> None:
        """Try smaller tiles than the fastest, as long as they are faster: maps that fit a cache may make them so."""
        while True:
            fits = [trial for trial in self.trials.values() if trial.fits]
            best = max(fits, key=lambda trial: trial.mpixel_per_s or 0.0, default=None)
            if best is None:
                return
            way = next(each for each in ways if each.setting(best.setting.tile_in) == best.setting)
            smaller = [tile for tile in tiles if tile <= _DESCENT * best.setting.tile_in]
            if not smaller or way.setting(smaller[-1]) in self.trials:
                return
            self.attempt(way, smaller[-1])

    def attempt(self, way: "_Way", tile: int) -> Trial:
        setting = way.setting(tile)
        counted = self.counted(setting)
        self.say(f"trying a step of {setting}")
        try:
            found = self.probe(setting)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            trial = Trial(setting, counted, None, None, None, fits=False)
        else:
            took = round(counted * _UNMEASURED) if found.bytes is None else found.bytes
            self.first.setdefault(way.precision, (counted, took))
            way.points.append((counted, took))
            self.rates[way.precision] = self.work(setting) / found.seconds
            speed = self.useful(tile) / found.seconds
            trial = Trial(setting, counted, found.bytes, found.seconds, speed, fits=took <= self.budget)
        self.trials[setting] = trial
        return trial


class _Way:
    """One precision and recomputation."""

    def __init__(self, planner: _Planner, precision: str, recompute: str) -> None:
        self.planner, self.precision, self.recompute = planner, precision, recompute
        # (bytes counted, bytes taken)
        self.points: list[tuple[int, int]] = []
        self.climbed = False

    def setting(self, tile: int) -> Setting:
        return Setting(tile, self.precision, self.recompute)

    def forecast(self, tile: int) -> float:
        """Bytes of a tile, by those that were tried."""
        counted = self.planner.counted(self.setting(tile))
        points = sorted(self.points)
        if not points:
            # another way's smallest tile says what there is beside the maps
            known = self.planner.first
            first, took = known.get(self.precision) or next(iter(known.values()), (counted, counted))
            return took + (_CAUTION if counted > first else _LEAST) * (counted - first)
        below = [point for point in points if point[0] <= counted]
        above = [point for point in points if point[0] > counted]
        if below and above:
            (c0, took0), (c1, took1) = below[-1], above[0]
            return took0 + (took1 - took0) * (counted - c0) / (c1 - c0)
        if above:
            return above[0][1] - _LEAST * (above[0][0] - counted)
        (c1, took1), slope = below[-1], _CAUTION
        if len(below) > 1:
            c0, took0 = below[-2]
            slope = _SLACK * max(_LEAST, (took1 - took0) / (c1 - c0))
        # on a busy machine a step may seem to take less than it does: larger ones are not tried on that alone
        (c0, took0) = below[0]
        return max(took1 + slope * (counted - c1), took0 + _STEADY * (counted - c0))

    def largest(self, tiles: Sequence[int]) -> int | None:
        """The largest of `tiles` whose forecast fits."""
        limit = _MARGIN * self.planner.budget
        return next((tile for tile in reversed(tiles) if self.forecast(tile) <= limit), None)

    def expected(self, tiles: Sequence[int]) -> float:
        """Useful Mpixel a second of the largest tile whose forecast fits, at the rate that was measured last."""
        tile = self.largest(tiles)
        if tile is None:
            return 0.0
        rate = self.planner.rates.get(self.precision, 0.0)
        return self.planner.useful(tile) * rate / self.planner.work(self.setting(tile))

    def climb(self, tiles: Sequence[int]) -> None:
        """Try larger and larger tiles, until the next has little more to give."""
        self.climbed = True
        planner = self.planner
        while True:
            tile = self.largest(tiles)
            mine = [s.tile_in for s, t in planner.trials.items() if t.fits and s == self.setting(s.tile_in)]
            reached = max(map(planner.useful, mine), default=0.0)
            if tile is None or self.setting(tile) in planner.trials or planner.useful(tile) < _GAIN * reached:
                return
            trial = planner.attempt(self, tile)
            if trial.seconds is None:
                least = _RETREAT * trial.counted_bytes
                tiles = [t for t in tiles if planner.counted(self.setting(t)) <= least]
            elif not trial.fits:
                tiles = [t for t in tiles if t < tile]
