"""Which tile, and how many at a time, a prediction takes inside a budget of bytes.

On a GPU the largest tile that is counted to fit (`unet_fast.memory`): the halo's share shrinks, and the allocator is
held to the budget. On a CPU a larger tile than the usual one gains nothing (docs/findings/0009), so that a budget makes
tiles smaller, never larger; what a library takes beside the count is allowed for, and what is really taken is watched.
A model that `unet_fast.memory` cannot count is measured on two small tiles.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

import unet_kernels

from .errors import BadInput
from .measuring import CONTEXT_BYTES, Meter, Watch, capped
from .memory import estimate
from .model import FastUNet
from .tiling import Cutter, TilePlan, plan_tiles
from .units import bytes_of, readable

__all__ = ["Fit", "fit", "held_to", "parameter_of"]

# bytes that a CPU's convolutions take for each byte counted: measured 1.4 to 2.5, and what they take in any case
_CPU_FACTOR, _CPU_BESIDE = 2.5, 30_000_000
# what is forecast may take this share of a budget
_MARGIN = 0.95
# bytes of the next larger tile, per byte of a line through two measurements
_SLACK = 1.1
# tiles that go through the net together at most: more gain nothing
_MOST = 32
# tiles that lie in memory at a time, while others are read, computed and written
_IN_FLIGHT = 3
# bytes of one grey value on its way from a file to a window: as read, normalised in float64, and as float32
_READING = 24
# of what is remembered of each tile, and of where its result lies; a few thousand tiles are nothing
_PER_TILE, _FEW = 1000, 10_000
# sides that are looked at when the smallest does not fit
_FIRST = 40
_SECONDS_BETWEEN_LOOKS = 5e-3


@dataclass(frozen=True, slots=True)
class Fit:
    """A plan, and how many tiles go through the net together."""

    plan: TilePlan
    batch: int


@contextmanager
def held_to(memory: str | float | None, device: torch.device, *, beside: int = 0) -> Iterator[tuple[Watch | None, int]]:
    """A budget (the watch that sees to it, its bytes): a GPU's allocator is capped, a CPU's memory is watched.

    Args:
        memory: the budget; None: whatever it takes.
        device: where the net is.
        beside: bytes that the process holds already and that count.
    """
    try:
        budget = 0 if memory is None else bytes_of(memory)
    except ValueError as error:
        raise BadInput(str(error)) from error
    if not budget or device.type == "cuda":
        with capped(device, budget or None):
            yield None, budget
        return
    with Watch(every_s=_SECONDS_BETWEEN_LOOKS) as watch:
        watch.before -= beside
        yield watch, budget


def parameter_of(model: nn.Module) -> Tensor:
    """The first parameter or buffer, which says device and dtype; of a model without any, a CPU's float32."""
    return next(chain(model.parameters(), model.buffers()), torch.empty(0))


def fit(
    model: nn.Module,
    source: Any,
    *,
    tile_in: int | Sequence[int] | None = None,
    memory: str | float | None = None,
    batch: int | None = None,
    tta: str = "none",
    bytes_out: int = 1,
    beside: int = 0,
) -> Fit:
    """Tiles for an image, by their side or by a budget.

    Args:
        model: the net, in eval mode.
        source: the image (`unet_fast.sources.Source`).
        tile_in: side, or rows and columns, of a tile.
        memory: or a budget for all that the prediction takes.
        batch: tiles at a time; None: 1, or what the budget has room for.
        tta: versions of the image that are averaged.
        bytes_out: of what is kept of each pixel.
        beside: bytes that a CPU's budget has to cover too.

    Raises:
        BadInput: a tile that does not fit, a budget that is too small, both.
    """
    device, shape = parameter_of(model).device, source.shape
    if memory is None:
        plan = plan_tiles(shape, tile_in=tile_in, model=model, batch=batch or 1, tta=tta)
        return Fit(plan, batch or 1)
    if tile_in is not None:
        raise BadInput("memory chooses the tile; give one of memory and tile_in")
    try:
        budget = bytes_of(memory)
    except ValueError as error:
        raise BadInput(str(error)) from error
    cutter = Cutter.of(model, tta)
    forecast = _Need(model, source, bytes_out, beside)

    def need(tile: int, batch: int) -> float:
        return forecast(tile, batch) + _PER_TILE * max(0, _tiles(cutter, tile, shape) - _FEW)

    covering = max(cutter.smallest(n) for n in shape[2:])
    limit = covering if device.type == "cuda" else min(covering, max(cutter.usual(n) for n in shape[2:]))
    # tiles are as high as wide in a forecast: the longer side says which is the smallest
    least = cutter.smallest(min(cutter.step, max(shape[2:])))
    fixed = batch or 1
    side = _largest(cutter, least, limit, lambda tile: need(tile, fixed) <= _MARGIN * budget)
    if side is None:
        first = range(least, min(limit, least + _FIRST * cutter.step) + 1, cutter.step)
        cheapest = min(first, key=lambda tile: need(tile, fixed))
        needed = readable(need(cheapest, fixed) / _MARGIN, up=True)
        raise BadInput(
            f"memory must be at least {needed}, for tiles of {cheapest} x {cheapest}, got {readable(budget)}"
        )
    # no larger than the image needs, along each axis
    cutter.largest = side
    sides = [cutter.usual(n) for n in shape[2:]]
    plan = plan_tiles(shape, tile_in=[max(sides)] * 2 if tta == "rot7" else sides, model=model, tta=tta)
    tiles = shape[0] * len(plan)
    if batch is None:
        # small tiles leave a GPU idle; a CPU is busy with one
        batch = 1
        while device.type == "cuda" and batch < min(tiles, _MOST) and need(max(sides), batch + 1) <= _MARGIN * budget:
            batch += 1
    return Fit(plan, batch)


def _largest(cutter: Cutter, least: int, most: int, fits: Any) -> int | None:
    """The largest side from `least` to `most`, in steps of the pooling grid, that fits; None if none does."""
    low, high = 0, max(0, (most - least) // cutter.step)
    # where the smallest does not fit, because of how many there would be, one of the next may
    while not fits(least + low * cutter.step):
        low += 1
        if low > min(high, _FIRST):
            return None
    while low < high:
        middle = (low + high + 1) // 2
        if fits(least + middle * cutter.step):
            low = middle
        else:
            high = middle - 1
    return least + low * cutter.step


def _tiles(cutter: Cutter, side: int, shape: Sequence[int]) -> int:
    covers, keep = cutter.right(side), max(1, cutter.keep(side))
    rows, columns = (1 if covers >= cutter.reach(n) else -(-n // keep) for n in shape[2:])
    return int(shape[0] * rows * columns)


class _Need:
    """Forecast of the bytes that a prediction takes with square tiles of a side, so many at a time."""

    def __init__(self, model: nn.Module, source: Any, bytes_out: int, beside: int) -> None:
        self.model, self.source, self.bytes_out, self.beside = model, source, bytes_out, beside
        self.like = parameter_of(model)
        # those whose convolutions are a library's, which takes little beside the maps
        known = self.like.dtype in (torch.float32, torch.bfloat16, torch.float16) or self.like.device.type == "cuda"
        self.counted = model if isinstance(model, FastUNet) and model.padding == "valid" and known else None
        self.measured: dict[int, float] = {}

    def __call__(self, side: int, batch: int) -> float:
        net = self._counted(side, batch) if self.counted is not None else self._measured(side) * batch
        if self.like.device.type == "cuda":
            return net + CONTEXT_BYTES
        channels = self.source.shape[1]
        windows = _IN_FLIGHT * batch * side * side * (4 * channels + self.bytes_out) + side * side * channels * _READING
        return net + windows + self.beside + float(self.source.held_bytes(side))

    def _counted(self, side: int, batch: int) -> float:
        assert self.counted is not None
        found = estimate(self.counted, side, mode="predict", batch=batch)
        if self.like.device.type == "cuda":
            return found.total
        dynamic = found.dynamic
        if unet_kernels.multiplies_in(self.like.device, self.like.dtype) != self.like.dtype:
            # beside the maps lie those that a layer works on, in float32
            dynamic += estimate(self.counted, side, mode="predict", dtype=torch.float32, batch=batch).dynamic
        # the weights are there already; a library makes copies of them as it likes them
        return _CPU_FACTOR * dynamic + found.weights + _CPU_BESIDE

    def _measured(self, side: int) -> float:
        """By a line through what two small tiles take, in bytes per area."""
        cutter = Cutter.of(self.model)
        small = cutter.smallest(cutter.step)
        sides = (small, cutter.legal(max(2 * small, 128)))
        for each in sides:
            if each not in self.measured:
                self.measured[each] = self._try(each)
        (a, b), (first, second) = ((float(n) ** 2 for n in sides), (self.measured[n] for n in sides))
        slope = max(0.0, (second - first) / (b - a))
        return max(first, second if side >= sides[1] else 0.0, first + _SLACK * slope * (side**2 - a))

    def _try(self, side: int) -> float:
        meter = Meter(self.like.device)
        shape = (1, self.source.shape[1], side, side)
        tile = torch.zeros(shape, device=self.like.device, dtype=self.like.dtype)
        with torch.no_grad():
            taken = meter.measure(lambda: self.model(tile), calls=2).bytes
        if taken is None:
            raise BadInput("memory cannot be measured on this system for such a model; give tile_in")
        return math.ceil(max(0, taken - (CONTEXT_BYTES if self.like.device.type == "cuda" else 0)))
