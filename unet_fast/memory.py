"""How many bytes a training step or a prediction of FastUNet takes, before anything is made: by counting, not trying.

A step is played through in the order in which FastUNet's operations make and drop maps (docs/mathematics.md, section 2:
what a step keeps); the greatest sum met is the peak. Nothing is allocated, no tracker runs, and a tile costs well under
10 ms. What a library's convolution takes for itself, and what a CUDA context holds, is outside the count: `workspace`
and `context` are allowances. Symbols as in `FastUNet`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import geometry
from .model import FastUNet

__all__ = ["Estimate", "bytes_of", "estimate", "largest_tile"]

# 1 GB = 1e9 bytes, 1 GiB = 2^30
_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)}
_UNITS |= {f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", 1)}

# bytes a parameter that the optimizer keeps: one or two maps of the parameter's own dtype
_STATE = {"sgd": 0, "momentum": 1, "adam": 2}


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes at the moment of the greatest need, in parts that add up to `total`.

    Attributes:
        tile_in: rows and columns of the tile.
        mode: "train" or "predict".
        weights: parameters.
        optimizer: what the optimizer keeps for them.
        input: the tile, and in training its labels.
        activations: maps of the net that are alive at the peak.
        gradients: gradients of maps and of parameters that are alive at the peak.
        workspace: what single operations hold for themselves then: indices, copies.
        context: the allowance that was asked for.
        peak_at: what was being made: a layer, or in the backward dz, dx (a map's gradient), sum, "d " + layer.
        layers: bytes of each layer's map.
    """

    tile_in: tuple[int, int]
    mode: str
    weights: int
    optimizer: int
    input: int
    activations: int
    gradients: int
    workspace: int
    context: int
    peak_at: str
    layers: dict[str, int]

    @property
    def dynamic(self) -> int:
        """What depends on the tile: all but weights, optimizer and context."""
        return self.input + self.activations + self.gradients + self.workspace

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.dynamic + self.context


class _Ledger:
    """What is alive, by name; remembers the greatest sum."""

    def __init__(self) -> None:
        self.alive: dict[str, tuple[str, int]] = {}
        self.now = self.peak = 0
        self.at, self.then = "", {"input": 0, "activations": 0, "gradients": 0, "workspace": 0}

    def make(self, name: str, size: int, part: str) -> None:
        assert name not in self.alive, name
        self.alive[name] = (part, size)
        self.now += size
        if self.now > self.peak:
            self.peak, self.at = self.now, name
            self.then = dict.fromkeys(self.then, 0)
            for kind, each in self.alive.values():
                self.then[kind] += each

    def drop(self, *names: str) -> None:
        for name in names:
            if name in self.alive:
                self.now -= self.alive.pop(name)[1]


@dataclass(frozen=True, slots=True)
class _Shape:
    channels: int
    rows: int
    columns: int

    def bytes(self, each: int) -> int:
        return self.channels * self.rows * self.columns * each


class _Plan:
    """The sizes of all maps of a net for a tile, and of its parameters; bytes of one value."""

    def __init__(self, net: FastUNet, tile: tuple[int, int], batch: int, value: int) -> None:
        settings = net.settings
        self.depth, self.batch, self.value = net.depth, batch, value
        self.activation, self.skips, self.dropout = settings["up_activation"], settings["skips"], settings["dropout"]
        features, last = net.features, settings["last_up_channels"]
        self.maps: dict[str, _Shape] = {"input": _Shape(net.in_channels, *tile)}
        self.conv: dict[str, int] = {}
        before, size = net.in_channels, tile
        for level, width in enumerate(features):
            if level:
                size = (size[0] // 2, size[1] // 2)
                self.maps[f"pool.{level}"] = _Shape(before, *size)
            for part in ("conv1", "conv2"):
                size = (size[0] - 2, size[1] - 2)
                self._convolution(f"down.{level}.{part}", before, width, size, 9)
                before = width
            self.maps[f"dropped.{level}"] = self.maps[f"down.{level}.conv2"]
        for level in reversed(range(net.depth)):
            width = features[level]
            arriving = last if level == 0 and last is not None else width
            size = (2 * size[0], 2 * size[1])
            self._convolution(f"up.{level}.up", before, arriving, size, 4)
            self.maps[f"skip.{level}"] = _Shape(width, *size)
            before = arriving + width if self.skips else arriving
            for part in ("conv1", "conv2"):
                size = (size[0] - 2, size[1] - 2)
                self._convolution(f"up.{level}.{part}", before, width, size, 9)
                before = width
        self._convolution("head", before, net.out_channels, size, 1)

    def _convolution(self, name: str, before: int, after: int, size: tuple[int, int], taps: int) -> None:
        self.maps[name] = _Shape(after, *size)
        self.conv[name] = before * after * taps

    def map(self, name: str) -> int:
        return self.maps[name].bytes(self.batch * self.value)

    def weight(self, name: str) -> int:
        return self.conv[name] * self.value


class _Step:
    """Plays one training step, or one prediction, in a ledger."""

    def __init__(self, plan: _Plan, recompute: bool) -> None:
        self.plan, self.recompute, self.ledger = plan, recompute, _Ledger()
        self.dropout = plan.dropout

    # ---- forward

    def down(self, level: int) -> None:
        make, map_ = self.ledger.make, self.plan.map
        if level:
            make(f"pool.{level}", map_(f"pool.{level}"), "activations")
        for part in ("conv1", "conv2"):
            make(f"down.{level}.{part}", map_(f"down.{level}.{part}"), "activations")
        if self.dropped(level):
            # noise, and the map times noise, which is what goes on
            make(f"noise.{level}", map_(f"down.{level}.conv2"), "activations")
            make(f"dropped.{level}", map_(f"down.{level}.conv2"), "activations")

    def up(self, level: int) -> None:
        make, drop, map_ = self.ledger.make, self.ledger.drop, self.plan.map
        make(f"up.{level}.up", map_(f"up.{level}.up"), "activations")
        if self.plan.activation:
            make(f"relu.{level}", map_(f"up.{level}.up"), "activations")
            drop(f"up.{level}.up")
        if self.plan.skips:
            make("concatenation", map_(f"up.{level}.up") + map_(f"skip.{level}"), "workspace")
        make(f"up.{level}.conv1", map_(f"up.{level}.conv1"), "activations")
        drop("concatenation")
        make(f"up.{level}.conv2", map_(f"up.{level}.conv2"), "activations")

    def inner(self, kind: str, level: int) -> list[str]:
        """The maps of a step that are not handed on."""
        if kind == "up":
            return [f"up.{level}.up", f"relu.{level}", f"up.{level}.conv1"]
        inside = [f"pool.{level}", f"down.{level}.conv1"]
        return [*inside, f"noise.{level}", f"down.{level}.conv2"] if self.dropped(level) else inside

    def handed_on(self, level: int) -> str:
        return f"dropped.{level}" if self.dropped(level) else f"down.{level}.conv2"

    def dropped(self, level: int) -> bool:
        return self.dropout > 0 and level >= self.plan.depth - 1

    def predict(self) -> None:
        depth, drop = self.plan.depth, self.ledger.drop
        self.dropout = 0.0
        for level in range(depth + 1):
            self.down(level)
            drop(*self.inner("down", level))
        below = self.handed_on(depth)
        for level in reversed(range(depth)):
            self.up(level)
            drop(*self.inner("up", level), below, self.handed_on(level))
            below = f"up.{level}.conv2"
        self.ledger.make("head", self.plan.map("head"), "activations")

    # ---- a training step

    def train(self) -> None:
        plan, make, drop = self.plan, self.ledger.make, self.ledger.drop
        depth = plan.depth
        for level in range(depth + 1):
            self.down(level)
            if self.recompute:
                drop(*self.inner("down", level))
        for level in reversed(range(depth)):
            self.up(level)
            if self.recompute:
                drop(*self.inner("up", level))
        self.loss()
        make("dx", plan.map("up.0.conv2" if depth else "down.0.conv2"), "gradients")
        drop("dlogits")
        for level in range(depth):
            self.up_backward(level)
        for level in reversed(range(depth + 1)):
            self.down_backward(level)

    def loss(self) -> None:
        """Softmax cross-entropy, in float32 from the logits on; leaves the logits' gradient."""
        plan, make, drop = self.plan, self.ledger.make, self.ledger.drop
        wide = plan.maps["head"].bytes(plan.batch * max(4, plan.value))
        make("head", plan.map("head"), "activations")
        if plan.value < 4:
            make("wide logits", wide, "activations")
        make("logarithms", wide, "activations")
        make("dlogarithms", wide, "gradients")
        make("dlogits", wide, "gradients")
        drop("dlogarithms", "logarithms", "wide logits", "head")
        if plan.value < 4:
            drop("dlogits")
            make("dlogits", plan.map("head"), "gradients")

    def convolution_backward(self, name: str, made: Sequence[tuple[str, int]], relu: bool, *done: str) -> None:
        """dx becomes the gradients `made`; `done` are the convolution's inputs, if nothing else needs them."""
        make, drop = self.ledger.make, self.ledger.drop
        if relu:
            make("dz", self.plan.map(name), "gradients")
            drop("dx", name)
        else:
            self.rename("dx", "dz")
        for gradient, size in made:
            make(gradient, size, "gradients")
        weight = self.plan.weight(name)
        make(f"d {name}", weight, "gradients")
        # in the parameter's own strides, or out of two halves
        make("copy of a weight gradient", weight, "workspace")
        drop("copy of a weight gradient", "dz", *done)

    def rename(self, old: str, new: str) -> None:
        if old in self.ledger.alive:
            self.ledger.alive[new] = self.ledger.alive.pop(old)

    def up_backward(self, level: int) -> None:
        plan, drop = self.plan, self.ledger.drop
        below = f"up.{level + 1}.conv2" if level + 1 < plan.depth else self.handed_on(plan.depth)
        if self.recompute:
            drop(f"up.{level}.conv2")
            self.up(level)
        self.convolution_backward(f"up.{level}.conv2", [("dx", plan.map(f"up.{level}.conv1"))], True)
        arrived = f"relu.{level}" if plan.activation else f"up.{level}.up"
        made = [("dx", plan.map(f"up.{level}.up"))]
        if plan.skips:
            made.append((f"window.{level}", plan.map(f"skip.{level}")))
        self.convolution_backward(f"up.{level}.conv1", made, True)
        if plan.activation:
            self.ledger.make("dz", plan.map(f"up.{level}.up"), "gradients")
            drop("dx", arrived)
            self.rename("dz", "dx")
        else:
            drop(arrived)
        self.convolution_backward(f"up.{level}.up", [("dx below", plan.map(below))], False)
        self.rename("dx below", "dx")

    def down_backward(self, level: int) -> None:
        plan, make, drop = self.plan, self.ledger.make, self.ledger.drop
        whole = f"down.{level}.conv2"
        if level < plan.depth and plan.skips:
            make("padded window", plan.map(whole), "gradients")
            drop(f"window.{level}")
            make("sum", plan.map(whole), "gradients")
            drop("padded window", "dx")
            self.rename("sum", "dx")
        if self.recompute:
            drop(self.handed_on(level))
            self.down(level)
        if self.dropped(level):
            make("dz", plan.map(whole), "gradients")
            drop("dx", f"noise.{level}", f"dropped.{level}")
            self.rename("dz", "dx")
        self.convolution_backward(whole, [("dx", plan.map(f"down.{level}.conv1"))], True)
        made = [("dx", plan.map(f"pool.{level}"))] if level else []
        self.convolution_backward(f"down.{level}.conv1", made, True, f"pool.{level}")
        if level:
            self.rename("dx", "dpool")
            pooled = plan.maps[f"pool.{level}"].bytes(plan.batch)
            make("places of maxima", pooled * (8 + plan.value), "workspace")
            make("dx", plan.map(f"down.{level - 1}.conv2"), "gradients")
            drop("places of maxima", "dpool")


def estimate(
    model: FastUNet,
    tile_in: int | tuple[int, int],
    *,
    mode: str = "train",
    dtype: torch.dtype | None = None,
    batch: int = 1,
    optimizer: str = "momentum",
    recompute: str | None = None,
    workspace: int = 0,
    context: int = 0,
) -> Estimate:
    """Bytes of a training step, or of a prediction, at the moment of greatest need.

    Agrees within 1 % with what torch's MemTracker counts for the same step under fake tensors, which is the path of a
    GPU; the loss is softmax cross-entropy against class ids.

    Args:
        model: the net; may lie on the meta device.
        tile_in: rows and columns of the tile, or both.
        mode: "train" (forward, backward, all gradients) or "predict" (forward alone).
        dtype: of weights and maps; None for that of the model's parameters.
        batch: tiles at a time.
        optimizer: "sgd", "momentum" (one map a parameter) or "adam" (two).
        recompute: "none" or "level"; None for the model's own.
        workspace, context: bytes to allow for what convolutions of a library, and a CUDA context, take for themselves.

    Raises:
        ValueError: a tile that cannot be pooled (both legal neighbours are named), a setting out of range, or a net
            with padding "same".

    >>> paper = estimate(FastUNet.paper(), 572)
    >>> round(paper.dynamic / 1e6), round(paper.total / 1e6)
    (653, 902)
    """
    if model.padding != "valid":
        raise ValueError(f"model must have padding 'valid' for its bytes to be known, got {model.padding!r}")
    rows, columns = (tile_in, tile_in) if isinstance(tile_in, int) else tile_in
    for name, n in (("rows of tile_in", rows), ("columns of tile_in", columns)):
        geometry.check_legal(n, model.depth, name=name)
    recompute = model.recompute if recompute is None else recompute
    for name, given, choices in (
        ("mode", mode, ("train", "predict")),
        ("optimizer", optimizer, tuple(_STATE)),
        ("recompute", recompute, ("none", "level")),
    ):
        if given not in choices:
            raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {given!r}")
    for name, number, least in (("batch", batch, 1), ("workspace", workspace, 0), ("context", context, 0)):
        if number < least:
            raise ValueError(f"{name} must be {least} or more, got {number}")
    value = (next(model.parameters()).dtype if dtype is None else dtype).itemsize
    plan = _Plan(model, (rows, columns), batch, value)
    step = _Step(plan, recompute == "level")
    step.ledger.make("input", plan.map("input"), "input")
    if mode == "train":
        out = plan.maps["head"]
        # class ids, int64
        step.ledger.make("labels", out.rows * out.columns * batch * 8, "input")
        step.train()
    else:
        step.predict()
    weights = sum(p.numel() for p in model.parameters()) * value
    then = step.ledger.then
    return Estimate(
        tile_in=(rows, columns),
        mode=mode,
        weights=weights,
        optimizer=weights * _STATE[optimizer] if mode == "train" else 0,
        input=then["input"],
        activations=then["activations"],
        gradients=then["gradients"],
        workspace=then["workspace"] + workspace,
        context=context,
        peak_at=step.ledger.at,
        layers={name: plan.map(name) for name in plan.conv},
    )


def bytes_of(text: str | float) -> int:
    """A number of bytes as people write it: 6GB (6e9), 6GiB (6 x 2^30), 500 MB, 1e9.

    Raises:
        ValueError: it is none, or not above 0.

    >>> bytes_of("6GB"), bytes_of("1.5 GiB"), bytes_of(4e9)
    (6000000000, 1610612736, 4000000000)
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", str(text).lower())
    try:
        number = float(found[1]) * _UNITS[found[2].upper()] if found else 0.0
    except (KeyError, ValueError):
        number = 0.0
    if not 1 <= number < 2**63:
        raise ValueError(f"memory must be a size such as 6GB, 500MB or 4GiB, got {text}")
    return int(number)


def largest_tile(budget_bytes: float, model: FastUNet, **settings: Any) -> int:
    """Rows, and columns, of the largest square tile whose `estimate` a budget allows.

    Args:
        budget_bytes: for everything: weights, optimizer, maps, allowances.
        model: the net.
        settings: as for `estimate`.

    Raises:
        ValueError: not even the smallest tile fits; says what that would take.

    >>> largest_tile(6e9, FastUNet.paper())
    1468
    """
    step = geometry.step_multiple(model.depth)
    # legal sizes are a step apart
    smallest = geometry.legal_sizes(1, 100 * step, model.depth)[0]

    def total(steps: int) -> int:
        return estimate(model, smallest + steps * step, **settings).total

    if total(0) > budget_bytes:
        place = f"the smallest tile, {smallest} x {smallest}"
        raise ValueError(f"a budget must be at least {total(0)} bytes, for {place}, got {budget_bytes:.0f}")
    fits, too_large = 0, 1
    while total(too_large) <= budget_bytes:
        fits, too_large = too_large, 2 * too_large
    while too_large - fits > 1:
        middle = (fits + too_large) // 2
        fits, too_large = (middle, too_large) if total(middle) <= budget_bytes else (fits, middle)
    return smallest + fits * step
