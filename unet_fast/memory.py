"""How many bytes a training step or a prediction of FastUNet takes, before anything is made: by counting, not trying.

A step is played through in the order in which FastUNet's operations make and drop maps (docs/mathematics.md, section 2:
what a step keeps); the greatest sum met is the peak. Nothing is allocated, no tracker runs, and a tile costs well under
10 ms. What a library's convolution takes for itself, and what a CUDA context holds, is outside the count: `workspace`
and `context` are allowances. Symbols as in `FastUNet`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import geometry
from .layers import Layers
from .model import FastUNet

__all__ = ["Estimate", "estimate", "largest_tile"]

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


class _Sizes:
    """Bytes of the maps and weights of a batch of tiles."""

    def __init__(self, net: FastUNet, tile: tuple[int, int], batch: int, value: int, autocast: bool) -> None:
        settings = net.settings
        self.layers = Layers(net, *tile)
        self.depth, self.batch, self.value, self.autocast = net.depth, batch, value, autocast
        self.activation, self.skips, self.dropout = settings["up_activation"], settings["skips"], settings["dropout"]

    def map(self, name: str, value: int | None = None) -> int:
        if name.startswith("dropped."):
            name = f"down.{name.removeprefix('dropped.')}.conv2"
        return self.layers.maps[name].values * self.batch * (self.value if value is None else value)

    def weight(self, name: str, value: int | None = None) -> int:
        return self.layers.convolutions[name].weight * (self.value if value is None else value)


class _Step:
    """Plays one training step, or one prediction, in a ledger."""

    def __init__(self, sizes: _Sizes, recompute: bool) -> None:
        self.sizes, self.recompute, self.ledger = sizes, recompute, _Ledger()
        self.dropout, self.keeps = sizes.dropout, True

    # ---- forward

    def convolve(self, name: str) -> None:
        if self.sizes.autocast:
            # the weight as the convolution wants it; the backward wants it once more
            self.ledger.make(f"cast {name}", self.sizes.weight(name), "activations")
        self.ledger.make(name, self.sizes.map(name), "activations")
        if not self.keeps:
            self.ledger.drop(f"cast {name}")

    def down(self, level: int, again: bool = False) -> None:
        make, map_ = self.ledger.make, self.sizes.map
        if level:
            make(f"pool.{level}", map_(f"pool.{level}"), "activations")
        for part in ("conv1", "conv2"):
            self.convolve(f"down.{level}.{part}")
        if self.dropped(level):
            # noise, and the map times noise, which is what goes on; made again, nobody needs that
            make(f"noise.{level}", map_(f"down.{level}.conv2"), "activations")
        if self.dropped(level) and not again:
            make(f"dropped.{level}", map_(f"down.{level}.conv2"), "activations")

    def up(self, level: int) -> None:
        make, drop, map_ = self.ledger.make, self.ledger.drop, self.sizes.map
        self.convolve(f"up.{level}.up")
        if self.sizes.activation:
            make(f"relu.{level}", map_(f"up.{level}.up"), "activations")
            drop(f"up.{level}.up")
        if self.sizes.skips:
            make("concatenation", map_(f"up.{level}.up") + map_(f"skip.{level}"), "workspace")
        self.convolve(f"up.{level}.conv1")
        drop("concatenation")
        self.convolve(f"up.{level}.conv2")

    def inner(self, kind: str, level: int) -> list[str]:
        """The maps of a step that are not handed on."""
        casts = [f"cast {kind}.{level}.{part}" for part in ("up", "conv1", "conv2")]
        if kind == "up":
            return [f"up.{level}.up", f"relu.{level}", f"up.{level}.conv1", *casts]
        inside = [f"pool.{level}", f"down.{level}.conv1", *casts]
        return [*inside, f"noise.{level}", f"down.{level}.conv2"] if self.dropped(level) else inside

    def handed_on(self, level: int) -> str:
        return f"dropped.{level}" if self.dropped(level) else f"down.{level}.conv2"

    def dropped(self, level: int) -> bool:
        return self.dropout > 0 and level >= self.sizes.depth - 1

    def read(self) -> None:
        if self.sizes.autocast:
            self.ledger.make("cast input", self.sizes.map("input"), "activations")

    def predict(self) -> None:
        depth, drop = self.sizes.depth, self.ledger.drop
        self.dropout, self.keeps = 0.0, False
        self.read()
        for level in range(depth + 1):
            self.down(level)
            drop(*self.inner("down", level))
        below = self.handed_on(depth)
        for level in reversed(range(depth)):
            self.up(level)
            drop(*self.inner("up", level), below, self.handed_on(level))
            below = f"up.{level}.conv2"
        self.convolve("head")

    # ---- a training step

    def train(self) -> None:
        sizes, make, drop = self.sizes, self.ledger.make, self.ledger.drop
        depth = sizes.depth
        self.read()
        for level in range(depth + 1):
            self.down(level)
            if self.recompute:
                drop(*self.inner("down", level))
        for level in reversed(range(depth)):
            self.up(level)
            if self.recompute:
                drop(*self.inner("up", level))
        self.loss()
        make("dx", sizes.map("up.0.conv2" if depth else "down.0.conv2"), "gradients")
        drop("dlogits")
        for level in range(depth):
            self.up_backward(level)
        for level in reversed(range(depth + 1)):
            self.down_backward(level)

    def loss(self) -> None:
        """Softmax cross-entropy, in float32 from the logits on; leaves the logits' gradient."""
        sizes, make, drop = self.sizes, self.ledger.make, self.ledger.drop
        wide = sizes.map("head", max(4, sizes.value))
        self.convolve("head")
        if sizes.value < 4:
            make("wide logits", wide, "activations")
            drop("head")
        make("logarithms", wide, "activations")
        # the backward of the logarithm needs its result alone
        drop("wide logits", "head")
        make("dlogarithms", wide, "gradients")
        make("dlogits", wide, "gradients")
        drop("dlogarithms", "logarithms")
        if sizes.value < 4:
            drop("dlogits")
            make("dlogits", sizes.map("head"), "gradients")

    def convolution_backward(self, name: str, made: Sequence[tuple[str, int]], relu: bool, *done: str) -> None:
        """dx becomes the gradients `made`; `done` are the convolution's inputs, if nothing else needs them."""
        make, drop = self.ledger.make, self.ledger.drop
        if relu:
            make("dz", self.sizes.map(name), "gradients")
            drop("dx", name)
        else:
            self.rename("dx", "dz")
        for gradient, size in made:
            make(gradient, size, "gradients")
        weight = self.sizes.weight(name)
        make(f"d {name}", weight, "gradients")
        # in the parameter's own strides, or out of two halves
        make("copy of a weight gradient", weight, "workspace")
        drop("copy of a weight gradient", "dz", *done, f"cast {name}")
        if self.sizes.autocast:
            # back in the parameter's dtype
            drop(f"d {name}")
            make(f"wide d {name}", self.sizes.weight(name, 4), "gradients")

    def rename(self, old: str, new: str) -> None:
        if old in self.ledger.alive:
            self.ledger.alive[new] = self.ledger.alive.pop(old)

    def up_backward(self, level: int) -> None:
        sizes, drop = self.sizes, self.ledger.drop
        below = f"up.{level + 1}.conv2" if level + 1 < sizes.depth else self.handed_on(sizes.depth)
        if self.recompute:
            drop(f"up.{level}.conv2")
            self.up(level)
        self.convolution_backward(f"up.{level}.conv2", [("dx", sizes.map(f"up.{level}.conv1"))], True)
        arrived = f"relu.{level}" if sizes.activation else f"up.{level}.up"
        made = [("dx", sizes.map(f"up.{level}.up"))]
        if sizes.skips:
            made.append((f"window.{level}", sizes.map(f"skip.{level}")))
        self.convolution_backward(f"up.{level}.conv1", made, True)
        if sizes.activation:
            self.ledger.make("dz", sizes.map(f"up.{level}.up"), "gradients")
            drop("dx", arrived)
            self.rename("dz", "dx")
        else:
            drop(arrived)
        self.convolution_backward(f"up.{level}.up", [("dx below", sizes.map(below))], False)
        self.rename("dx below", "dx")

    def down_backward(self, level: int) -> None:
        sizes, make, drop = self.sizes, self.ledger.make, self.ledger.drop
        whole = f"down.{level}.conv2"
        if level < sizes.depth and sizes.skips:
            make("padded window", sizes.map(whole), "gradients")
            drop(f"window.{level}")
            make("sum", sizes.map(whole), "gradients")
            drop("padded window", "dx")
            self.rename("sum", "dx")
        if self.recompute:
            drop(self.handed_on(level))
            self.down(level, again=True)
        if self.dropped(level):
            make("dz", sizes.map(whole), "gradients")
            drop("dx", f"noise.{level}", f"dropped.{level}")
            self.rename("dz", "dx")
        self.convolution_backward(whole, [("dx", sizes.map(f"down.{level}.conv1"))], True)
        made = [("dx", sizes.map(f"pool.{level}"))] if level else []
        self.convolution_backward(f"down.{level}.conv1", made, True, f"pool.{level}")
        if level:
            self.rename("dx", "dpool")
            make("places of maxima", sizes.map(f"pool.{level}", 8 + sizes.value), "workspace")
            make("dx", sizes.map(f"down.{level - 1}.conv2"), "gradients")
            drop("places of maxima", "dpool")


def estimate(
    model: FastUNet,
    tile_in: int | tuple[int, int],
    *,
    mode: str = "train",
    dtype: torch.dtype | None = None,
    autocast: bool = False,
    batch: int = 1,
    optimizer: str = "momentum",
    recompute: str | None = None,
    workspace: int = 0,
    context: int = 0,
) -> Estimate:
    """Bytes of a training step, or of a prediction, at the moment of greatest need.

    Agrees within 1 % with what torch's MemTracker counts for the same step under fake tensors, which is the path of a
    GPU; the loss is softmax cross-entropy against class ids. A prediction's concatenation, which real tensors make for
    the length of a convolution and fake ones do not, is counted (`workspace`).

    Args:
        model: the net; may lie on the meta device.
        tile_in: rows and columns of the tile, or both.
        mode: "train" (forward, backward, all gradients) or "predict" (forward alone).
        dtype: of weights and maps; None for that of the model's parameters.
        autocast: weights and their gradients stay in the parameters' dtype, and `dtype` is that of the maps, as under
            torch.autocast.
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
    own = next(model.parameters()).dtype.itemsize
    value = own if dtype is None else dtype.itemsize
    # under autocast the weights, and the tile that comes, stay as they are
    static = own if autocast else value
    sizes = _Sizes(model, (rows, columns), batch, value, autocast)
    step = _Step(sizes, recompute == "level")
    step.ledger.make("input", sizes.map("input", static), "input")
    if mode == "train":
        out = sizes.layers.maps["head"]
        # class ids, int64
        step.ledger.make("labels", out.rows * out.columns * batch * 8, "input")
        step.train()
    else:
        step.predict()
    weights = sum(p.numel() for p in model.parameters()) * static
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
        layers={name: sizes.map(name) for name in sizes.layers.convolutions},
    )


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
