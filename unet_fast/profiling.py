"""What a tile costs: bytes counted and taken, time, useful pixels a second, share of what the machine can do.

Rows are legal tiles under each way of training and predicting. Counting costs nothing and is done for all; measuring
takes real steps, the small tiles first, as long as `seconds` last.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import geometry
from .errors import BadInput
from .figures import Curve, draw_profile
from .files import writable_folder
from .layers import Layers
from .measuring import CONTEXT_BYTES, Apart, Measured, Meter, is_out_of_memory, roof_tflops
from .memory import Estimate, estimate, largest_tile
from .model import FastUNet
from .planning import OFFERED, PRECISIONS, RECOMPUTE
from .storage import load, pick_device
from .units import bytes_of, readable

__all__ = ["LayerRow", "Profile", "Row", "Way", "count", "profile", "report"]

# a tile this many times the one before, up to the largest
_LADDER, _LARGEST = 1.35, 2600


@dataclass(frozen=True, slots=True)
class Way:
    """ "train" or "predict"; "float32" or "bfloat16" (in training: of the maps); "none" or "level" (training only)."""

    mode: str
    precision: str = "float32"
    recompute: str = "none"

    def __str__(self) -> str:
        return f"{self.mode} {self.precision}{', recompute' if self.recompute == 'level' else ''}"


@dataclass(frozen=True, slots=True)
class Row:
    """One tile, one way; None where it was not measured.

    Attributes:
        useful_mpixel: pixels that come out, all tiles of the batch.
        predicted_bytes: weights, optimizer, maps, on a GPU the context.
        measured_bytes: what it took: on a GPU what torch's allocator reserved and the context, on a CPU anonymous.
        gflop: arithmetic needed; what recomputation adds is not counted.
        roof_share: of `unet_fast.measuring.roof_tflops` in this precision.
    """

    way: Way
    tile_in: int
    tile_out: int
    useful_mpixel: float
    predicted_bytes: int
    measured_bytes: int | None
    ms: float | None
    useful_mpixel_per_s: float | None
    gflop: float
    roof_share: float | None


@dataclass(frozen=True, slots=True)
class LayerRow:
    """Where bytes and time of one tile go: bytes of the map, GFLOP and ms forward, ms backward; nothing recomputed."""

    name: str
    channels: int
    rows: int
    columns: int
    map_bytes: int
    gflop: float
    forward_ms: float | None
    backward_ms: float | None


@dataclass(frozen=True, slots=True)
class Profile:
    """All rows, with what they were measured on."""

    device: str
    net: dict[str, Any]
    parameters: int
    batch: int
    roof_tflops: dict[str, float]
    rows: tuple[Row, ...]
    # the largest tile of each way inside the budget, where one was given; None: not even the smallest
    budget_bytes: int | None = None
    largest: dict[str, int | None] = field(default_factory=dict)
    layers: tuple[LayerRow, ...] = ()
    phases: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def render(self) -> str:
        """For people."""
        roof = ", ".join(f"{rate:.3g} TFLOP/s in {name}" for name, rate in self.roof_tflops.items())
        lines = [f"{self.parameters:,} parameters, batch {self.batch}, on {self.device}"]
        lines += [f"roof (a large matrix product or convolution): {roof}"] if roof else []
        for way in dict.fromkeys(row.way for row in self.rows):
            lines += ["", str(way), _HEADER]
            lines += [_line(row, self.budget_bytes) for row in self.rows if row.way == way]
        if self.budget_bytes is not None:
            lines += ["", f"largest tile inside {readable(self.budget_bytes)}, as counted"]
            lines += [f"  {name:30s} {'none fits' if tile is None else tile}" for name, tile in self.largest.items()]
        if self.layers:
            lines += ["", *self._layers()]
        return "\n".join(lines)

    def _layers(self) -> list[str]:
        said = ", ".join(f"{name} {self.phases[name] / 1e6:.1f}" for name in _PHASES if name in self.phases)
        lines = [f"tile {self.phases['tile_in']}, {self.phases['way']}: MB at the peak (while making "]
        lines[-1] += f"{self.phases['peak_at']}): {said}"
        lines += ["layer              map                       MB    GFLOP  forward ms  TFLOP/s  backward ms"]
        for each in self.layers:
            shape = f"{each.channels} x {each.rows} x {each.columns}"
            rate = each.gflop / each.forward_ms if each.forward_ms else None
            lines.append(
                f"{each.name:18s} {shape:20s} {each.map_bytes / 1e6:7.1f} {_digits(each.gflop):>8s}  "
                f"{_or_dash(each.forward_ms):>10s}  {_or_dash(rate):>7s}  {_or_dash(each.backward_ms):>11s}"
            )
        return lines


# the parts of an estimate
_PHASES = ("weights", "optimizer", "input", "activations", "gradients", "workspace", "context")

_HEADER = "  tile    out  useful Mpixel  GB predicted  GB measured        ms  useful Mpixel/s    GFLOP  of the roof"


def _line(row: Row, budget: int | None) -> str:
    measured = None if row.measured_bytes is None else row.measured_bytes / 1e9
    share = "-" if row.roof_share is None else f"{row.roof_share:.0%}"
    over = "  over the budget" if budget is not None and row.predicted_bytes > budget else ""
    predicted = _digits(row.predicted_bytes / 1e9)
    return (
        f"{row.tile_in:6d} {row.tile_out:6d}  {_digits(row.useful_mpixel):>13s}  {predicted:>12s}  "
        f"{_or_dash(measured):>11s}  {_or_dash(row.ms):>8s}  {_or_dash(row.useful_mpixel_per_s):>15s}  "
        f"{_digits(row.gflop):>7s}  {share:>11s}{over}"
    )


def _digits(value: float) -> str:
    """Three of them, and no power of ten."""
    if value >= 999.5 or value <= 0:
        return f"{value:.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def _or_dash(value: float | None) -> str:
    return "-" if value is None else _digits(value)


def profile(
    net: FastUNet,
    *,
    ways: Sequence[Way],
    tiles: Sequence[int] | None = None,
    device: torch.device | None = None,
    batch: int = 1,
    budget_bytes: int | None = None,
    seconds: float = 60.0,
    layers_of: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Profile:
    """Count every row, and measure as many as fit into the time.

    Args:
        net: its sizes and settings; weights are made anew.
        ways: how to train and predict.
        tiles: legal sides; None takes a ladder from the smallest useful one to 2600, or to what the budget allows.
        device: None for the CPU.
        batch: tiles at a time.
        budget_bytes: larger rows are not measured, and the largest tile inside is told for each way.
        seconds: for measuring tiles, shared by the ways; the roof and the layers' times come on top. 0 counts only.
        layers_of: also say where bytes and time of this tile go, in the first of the ways.
        say: is told what is measured.

    Raises:
        ValueError: a tile that cannot be pooled; both legal neighbours are named.
    """
    device, net = device or torch.device("cpu"), _sizes_of(net)
    tiles = _ladder(net, ways, batch, budget_bytes, device) if tiles is None else sorted(set(tiles))
    counted = {way: [_count(net, way, tile, batch, device) for tile in tiles] for way in ways}
    roof: dict[str, float] = {}
    rows: dict[Way, list[Row]] = {way: [] for way in ways}
    limit = min(_capacity(device), math.inf if budget_bytes is None else budget_bytes)
    if seconds > 0:
        apart = Apart(device, __name__)
        roof = {name: roof_tflops(device, PRECISIONS[name]) for name in dict.fromkeys(way.precision for way in ways)}
        # its start is not measuring
        apart(int)
        deadline = time.monotonic() + seconds
        for way, share in zip(ways, _shares(ways), strict=True):
            until = time.monotonic() + share * max(0.0, deadline - time.monotonic())
            rows[way] = list(
                _measured(net, way, counted[way], roof[way.precision], apart, device, until, limit, batch, say)
            )
    else:
        rows = {way: [_row(net, way, each, batch) for each in counted[way]] for way in ways}
    found = Profile(
        device=_name(device),
        net=net.settings,
        parameters=sum(p.numel() for p in net.parameters()),
        batch=batch,
        roof_tflops=roof,
        rows=tuple(row for way in ways for row in rows[way]),
        budget_bytes=budget_bytes,
        largest={str(way): _largest(net, way, batch, budget_bytes, device) for way in ways if budget_bytes},
    )
    if layers_of is None:
        return found
    parts = _count(net, ways[0], layers_of, batch, device)
    phases = {name: getattr(parts, name) for name in _PHASES}
    phases |= {"peak_at": parts.peak_at, "tile_in": layers_of, "way": str(ways[0])}
    times: dict[str, tuple[float, float | None]] = {}
    if seconds > 0 and parts.total <= limit:
        say(f"timing the layers of tile {layers_of}")
        try:
            times = Apart(device, __name__)(_layer_times, net.settings, ways[0], layers_of, batch, device)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
    layers = tuple(_layer_rows(net, parts, layers_of, batch, times))
    return replace(found, layers=layers, phases=phases)


def _sizes_of(net: FastUNet) -> FastUNet:
    """The same net without weights; what it was saved in says nothing about how it is trained."""
    with torch.device("meta"):
        return FastUNet(**net.settings).float()


def report(
    *,
    model: Path | None,
    net: dict[str, Any],
    modes: Sequence[str],
    precisions: Sequence[str] | None,
    recompute: Sequence[str] | None,
    memory: str | None,
    tiles: Sequence[int] | None,
    batch: int,
    seconds: float,
    layers: bool,
    device: str,
    plot: Path | None,
    say: Callable[[str], None],
) -> Profile:
    """`unet-fast profile`: as `profile`, of a saved model or of a net of these settings, drawn to a file if asked.

    Raises:
        BadInput: a budget that is no size or below the smallest tile, a tile or width that cannot be, a place that
            cannot be written.
    """
    try:
        fast = load(model) if model is not None else FastUNet(**{k: v for k, v in net.items() if v is not None})
        fast = fast if fast.padding == "same" else _sizes_of(fast)
        budget = None if memory is None else bytes_of(memory)
        for tile in tiles or ():
            geometry.check_legal(tile, fast.depth, name="tiles")
    except ValueError as error:
        raise BadInput(str(error)) from error
    if fast.padding != "valid":
        raise BadInput(f"{model} has padding {fast.padding!r}; only the bytes of 'valid' nets are known")
    where = pick_device(device)
    ways = [
        Way(mode, precision, again)
        for mode in modes
        for precision in precisions or OFFERED
        for again in ((recompute or RECOMPUTE) if mode == "train" else ("none",))
    ]
    if budget is not None and all(_largest(fast, way, batch, budget, where) is None for way in ways):
        smallest = geometry.legal_sizes(1, 10**5, fast.depth)[0]
        way = min(ways, key=lambda way: count(fast, way, smallest, batch=batch, device=where))
        needed = readable(count(fast, way, smallest, batch=batch, device=where), up=True)
        raise BadInput(f"memory must be at least {needed}, for tiles of {smallest} ({way}), got {memory}")
    if plot is not None:
        if plot.suffix.lower() not in (".png", ".pdf", ".svg"):
            raise BadInput(f"plot must be a .png, .pdf or .svg, got {plot}")
        if plot.is_dir():
            raise BadInput(f"plot must be a file, got the folder {plot}")
        writable_folder(plot.parent)
    # the paper's tile, or the next that is legal
    usual = geometry.legal_sizes(572, 572 + 2 * geometry.halo(fast.depth), fast.depth)[0]
    layers_of = (tiles[0] if tiles else usual) if layers else None
    found = profile(
        fast,
        ways=ways,
        tiles=tiles,
        device=where,
        batch=batch,
        budget_bytes=budget,
        seconds=seconds,
        layers_of=layers_of,
        say=say,
    )
    if plot is not None:
        _draw(plot, fast, found, where)
    return found


def _draw(path: Path, net: FastUNet, found: Profile, device: torch.device) -> None:
    """The counted curves, dense, as far as the largest card; what was measured; and what that lets expect."""
    ways = list(dict.fromkeys(row.way for row in found.rows))
    first, last = found.rows[0].tile_in, max(4000, max(row.tile_in for row in found.rows))
    sides = geometry.legal_sizes(first, last, net.depth)[:: max(1, 64 // geometry.step_multiple(net.depth))]
    curves = []
    for way in ways:
        rows = [_row(net, way, _count(net, way, side, found.batch, device), found.batch) for side in sides]
        known = [row for row in found.rows if row.way == way and row.ms is not None]
        pace = known[-1].ms / 1e3 / known[-1].gflop if known and known[-1].ms is not None else None
        curves.append(
            Curve(
                name=str(way),
                tiles=sides,
                counted_bytes=[row.predicted_bytes for row in rows],
                expected=[] if pace is None else [row.useful_mpixel / (pace * row.gflop) for row in rows],
                measured=[
                    (row.tile_in, row.measured_bytes, row.useful_mpixel_per_s or 0.0)
                    for row in known
                    if row.measured_bytes is not None
                ],
            )
        )
    draw_profile(path, curves, f"{found.parameters:,} parameters, batch {found.batch}, {found.device}")


def count(net: FastUNet, way: Way, tile_in: int, *, batch: int = 1, device: torch.device | None = None) -> int:
    """Bytes that are predicted for a tile, on a GPU with the context."""
    return _count(_sizes_of(net), way, tile_in, batch, device or torch.device("cpu")).total


def _settings(way: Way, batch: int, device: torch.device) -> dict[str, Any]:
    return {
        "mode": way.mode,
        "dtype": PRECISIONS[way.precision],
        # a prediction is made in the model's own dtype, training keeps its weights in float32
        "autocast": way.mode == "train" and way.precision != "float32",
        "recompute": way.recompute,
        "batch": batch,
        "context": CONTEXT_BYTES if device.type == "cuda" else 0,
    }


def _count(net: FastUNet, way: Way, tile_in: int, batch: int, device: torch.device) -> Estimate:
    return estimate(net, tile_in, **_settings(way, batch, device))


def _largest(net: FastUNet, way: Way, batch: int, budget: int | None, device: torch.device) -> int | None:
    if budget is None:
        return None
    try:
        return largest_tile(budget, net, **_settings(way, batch, device))
    except ValueError:
        return None


def _ladder(net: FastUNet, ways: Sequence[Way], batch: int, budget: int | None, device: torch.device) -> list[int]:
    """Legal sides, each about _LADDER times the one before; the paper's 572 is one of them where it is legal."""
    step = geometry.step_multiple(net.depth)
    # the first that keeps one step of pixels
    first = geometry.legal_sizes(2 * geometry.halo(net.depth) + step, 10**5, net.depth)[0]
    last = max([_largest(net, way, batch, budget, device) or 0 for way in ways]) if budget else _LARGEST
    # where not even that fits, the smallest there is
    first = first if last >= first else geometry.legal_sizes(1, 10**5, net.depth)[0]
    sides = []
    side = float(first)
    while side <= min(last, _LARGEST):
        sides.append(geometry.legal_sizes(round(side), round(side) + step, net.depth)[0])
        side *= _LADDER
    extra = [n for n in (572, last) if budget or n == 572]
    return sorted({n for n in [*sides, *extra] if first <= n <= max(last, first) and not (n + 4) % step})


def _shares(ways: Sequence[Way]) -> list[float]:
    """Of the time that is left, for each way in turn."""
    return [1 / (len(ways) - i) for i in range(len(ways))]


def _row(
    net: FastUNet,
    way: Way,
    counted: Estimate,
    batch: int,
    taken: tuple[int | None, float] | None = None,
    roof: float | None = None,
) -> Row:
    side = counted.tile_in[0]
    out = geometry.output_size(side, net.depth)
    useful, gflop = batch * out**2 / 1e6, batch * Layers(net, side, side).flop(way.mode) / 1e9
    seconds = None if taken is None else taken[1]
    return Row(
        way=way,
        tile_in=side,
        tile_out=out,
        useful_mpixel=useful,
        predicted_bytes=counted.total,
        measured_bytes=None if taken is None else taken[0],
        ms=None if seconds is None else seconds * 1e3,
        useful_mpixel_per_s=None if seconds is None else useful / seconds,
        gflop=gflop,
        roof_share=None if seconds is None or roof is None else gflop / seconds / 1e3 / roof,
    )


def _measured(
    net: FastUNet,
    way: Way,
    counted: Sequence[Estimate],
    roof: float,
    apart: Apart,
    device: torch.device,
    until: float,
    limit: float,
    batch: int,
    say: Callable[[str], None],
) -> Iterator[Row]:
    # seconds of a GFLOP, by the tile before
    pace = 0.0
    for each in counted:
        gflop = batch * Layers(net, *each.tile_in).flop(way.mode) / 1e9
        left = until - time.monotonic()
        # twice: no step is the first of its process for nothing
        if each.total > limit or 2 * max(pace, 1e-3 / max(roof, 1e-9)) * gflop > left:
            yield _row(net, way, each, batch)
            continue
        say(f"measuring {way}, tile {each.tile_in[0]}")
        try:
            found = apart(_measure, net.settings, way, each.tile_in[0], batch, device, min(5.0, left / 4))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            limit = each.total - 1
            yield _row(net, way, each, batch)
            continue
        pace = found.seconds / gflop
        yield _row(net, way, each, batch, (found.bytes, found.seconds), roof)


def _measure(
    net: dict[str, Any], way: Way, tile_in: int, batch: int, device: torch.device, within_s: float
) -> Measured:
    # what a first step builds once and for all is nobody's row: threads, handles
    small, tiny = {**net, "features": (4, 4)}, geometry.legal_sizes(1, 99, 1)[0]
    _Work(small, Way("train", way.precision, "level"), 1, device).on(tiny)()
    meter = Meter(device)
    return meter.measure(_Work(net, way, batch, device).on(tile_in), calls=3, within_s=within_s)


class _Work:
    """A net with its optimizer, and steps of it on any tile."""

    def __init__(self, net: dict[str, Any], way: Way, batch: int, device: torch.device) -> None:
        self.way, self.batch, self.device = way, batch, device
        self.dtype = PRECISIONS[way.precision]
        own = self.dtype if way.mode == "predict" else torch.float32
        with torch.random.fork_rng([]):
            self.net = FastUNet(**net, recompute=way.recompute).to(device, own)
        # a rate of 0 costs as much as any other
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.0, momentum=0.99)
        if way.mode == "train":
            for p in self.net.parameters():
                self.optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        self.net.train(way.mode == "train")

    def on(self, tile: int, after_backward: Callable[[], None] = lambda: None) -> Callable[[], None]:
        out = geometry.output_size(tile, self.net.depth)
        own = next(self.net.parameters()).dtype
        image = torch.rand(self.batch, self.net.in_channels, tile, tile, device=self.device, dtype=own)
        target = torch.zeros(self.batch, out, out, dtype=torch.long, device=self.device)
        if self.way.mode == "predict":
            return lambda: self.predict(image)
        return lambda: self.step(image, target, after_backward)

    def step(self, image: Tensor, target: Tensor, after_backward: Callable[[], None]) -> None:
        F.cross_entropy(self._logits(image).float(), target).backward()
        after_backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _logits(self, image: Tensor) -> Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.way.precision != "float32"):
            logits: Tensor = self.net(image)
        return logits

    @torch.no_grad()
    def predict(self, image: Tensor) -> None:
        self.net(image)


def _capacity(device: torch.device) -> float:
    """Bytes above which nothing is tried."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as file:
            free = next(line for line in file if line.startswith("MemAvailable"))
        # a CPU's step may take more than twice of what is counted
        return int(free.split()[1]) * 1024 / 3
    except (OSError, StopIteration):
        return 4e9


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def _layer_rows(
    net: FastUNet, counted: Estimate, tile: int, batch: int, times: dict[str, tuple[float, float | None]]
) -> Iterator[LayerRow]:
    layers = Layers(net, tile, tile)
    for name, convolution in layers.convolutions.items():
        shape = layers.maps[name]
        forward, backward = times.get(name, (None, None))
        yield LayerRow(
            name=name,
            channels=shape.channels,
            rows=shape.rows,
            columns=shape.columns,
            map_bytes=counted.layers[name],
            gflop=batch * convolution.flop / 1e9,
            forward_ms=forward,
            backward_ms=backward,
        )


def _layer_times(
    net: dict[str, Any], way: Way, tile: int, batch: int, device: torch.device
) -> dict[str, tuple[float, float | None]]:
    """ms forward and backward of each layer, of the faster of two steps, by hooks around the modules."""
    work = _Work(net, Way(way.mode, way.precision), batch, device)
    modules = {n: m for n, m in work.net.named_modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)}
    first, *_ = modules
    clocks = {name: _Clock(module, device) for name, module in modules.items()}
    if way.mode == "train":
        for name, module in modules.items():
            clocks[name].watch_backward(module, ends=name != first)
    step = work.on(tile, clocks[first].stop_backward if way.mode == "train" else lambda: None)
    for _ in range(2):
        step()
    return {
        name: (min(clock.forward) * 1e3, min(clock.backward) * 1e3 if clock.backward else None)
        for name, clock in clocks.items()
    }


class _Clock:
    """Seconds of one module, forward and backward; waits for the device around it."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.device, self.started = device, 0.0
        self.forward: list[float] = []
        self.backward: list[float] = []
        module.register_forward_pre_hook(lambda *_: self.start())
        module.register_forward_hook(lambda *_: self.stop(self.forward))

    def watch_backward(self, module: nn.Module, ends: bool) -> None:
        """`ends`: the module tells when it is done; the first layer, whose input has no gradient, does not."""
        if ends:
            module.register_full_backward_pre_hook(lambda *_: self.start())
            module.register_full_backward_hook(lambda *_: self.stop_backward())
        else:
            module.register_forward_hook(lambda _, __, y: self._from_gradient_of(y))

    def _from_gradient_of(self, y: Tensor) -> None:
        y.register_hook(lambda _: self.start())

    def stop_backward(self) -> None:
        self.stop(self.backward)

    def start(self) -> None:
        self._wait()
        self.started = time.perf_counter()

    def stop(self, seconds: list[float]) -> None:
        self._wait()
        seconds.append(time.perf_counter() - self.started)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
