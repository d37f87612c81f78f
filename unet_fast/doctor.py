"""What this machine has, which lane each op takes on it and why, and what each layer of a net will run."""

import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import unet_kernels

from . import __version__, geometry
from .errors import BadInput
from .layers import Layers, Shape
from .model import FastUNet
from .storage import load, pick_device

__all__ = ["CHIPS", "examine", "examine_layers", "render", "render_layers"]

# compute capabilities of the chips that can be asked about without having one
CHIPS = {"sm_80": 80, "sm_86": 86, "sm_89": 89, "sm_90": 90}

LIBRARIES = ("torch", "triton", "numpy")


def examine() -> dict[str, Any]:
    """Everything `unet-fast doctor` shows, as JSON-able data."""
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    return {
        "unet_fast": __version__,
        "python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        "libraries": {name: _version(name) for name in LIBRARIES},
        "devices": {str(device): _describe(device) for device in devices},
        "no_cuda": _why_no_cuda(),
        "native": unet_kernels.native_libraries(),
        "ops": {op: {str(device): _lane(op, device) for device in devices} for op in unet_kernels.OPS},
    }


def render(found: dict[str, Any]) -> str:
    """The same for a reader."""
    lines = [f"unet-fast {found['unet_fast']}", f"  python    {found['python']}"]
    lines += [f"  {name:<9} {value}" for name, value in found["libraries"].items()]
    lines += ["", "devices"]
    lines += [f"  {name:<9} {value}" for name, value in found["devices"].items()]
    if found["no_cuda"]:
        lines.append(f"  {'cuda':<9} none: {found['no_cuda']}")
    lines += ["", "native libraries"]
    lines += [f"  {name:<12} {value}" for name, value in found["native"].items()]
    for device in found["devices"]:
        lines += ["", f"what each op runs on {device}"]
        for op, lanes in found["ops"].items():
            lane, reason = lanes[device]
            lines.append(f"  {op:<23} {lane:<7} {reason}")
    return "\n".join(lines)


def examine_layers(
    *,
    model: Path | None = None,
    features: tuple[int, ...] | None = None,
    tile: int = 572,
    precision: str = "bfloat16",
    device: str = "auto",
    chip: str | None = None,
    measure: bool = False,
) -> dict[str, Any]:
    """Which way each layer of a net takes in a forward of one tile, and why, as JSON-able data.

    Args:
        model: a training run or model file; None: a net of these features, the paper's by default.
        tile: side of the tile.
        precision: "float32", "float16" or "bfloat16".
        device: "auto", "cpu", "cuda", ...
        chip: a key of `CHIPS`, to ask about a GPU that is not here.
        measure: run the net first, so that what was never measured is.

    Raises:
        BadInput: a tile that cannot be, an unknown chip, nothing to measure on.
    """
    try:
        net = load(model) if model is not None else FastUNet(features=features or (64, 128, 256, 512, 1024))
        geometry.check_legal(tile, net.depth, name="tile")
    except ValueError as error:
        raise BadInput(str(error)) from error
    if net.padding != "valid":
        raise BadInput(f"{model} has padding {net.padding!r}; it runs on ATen, layer by layer")
    if chip is not None and chip not in CHIPS:
        raise BadInput(f"chip must be one of {', '.join(CHIPS)}, got {chip!r}")
    where = torch.device("cuda") if chip else pick_device(device)
    dtype = getattr(torch, precision)
    if measure:
        if chip or where.type != "cuda":
            raise BadInput(f"measure needs the GPU it is about, got {chip or where}; on a CPU there is no choice")
        _measure(net, tile, dtype, where)
    rows: list[dict[str, Any]] = []
    in_one_pass: set[int] = set()
    for layer, op, made in _questions(net, tile, _Arguments(dtype, where), in_one_pass):
        found = unet_kernels.explain(op, where, made, CHIPS[chip] if chip else 0)
        if op == "conv3x3_relu_pool" and found.called not in ("ATen", "apart"):
            in_one_pass.add(int(layer.split(".")[1]))
        rows.append(
            {
                "layer": layer,
                "op": op,
                "case": found.case,
                "called": found.called,
                "captured": found.captured,
                "why": found.why,
                "ways": list(found.ways),
                "ours": list(found.ours),
                "called_us": found.called_us,
                "device_us": found.device_us,
                "refused": found.refused,
            }
        )
    return {
        "net": {"features": list(net.features), "up_mode": net.up_mode},
        "tile": tile,
        "precision": precision,
        "device": chip or str(where),
        "layers": rows,
    }


def render_layers(found: dict[str, Any]) -> str:
    """The same for a reader."""
    rows = [("layer", "called", "in a CUDA graph", "why"), *map(_row, found["layers"])]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    title = f"features {','.join(map(str, found['net']['features']))}, tile {found['tile']}, {found['precision']}"
    lines = [f"what each layer of a forward runs on {found['device']} ({title})"]
    lines += [
        "  " + "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows
    ]
    return "\n".join(lines)


def _row(layer: dict[str, Any]) -> tuple[str, str, str, str]:
    if layer["ours"] and not layer["called_us"]:
        why = f"{len(layer['ways'])} ways, of ours first {layer['ours'][0]}"
        return layer["layer"], "measured at the first call", "likewise", why
    captured = layer["captured"] if layer["captured"] != layer["called"] else "the same"
    return layer["layer"], layer["called"], captured, layer["why"]


def _measure(net: FastUNet, tile: int, dtype: torch.dtype, device: torch.device) -> None:
    net = net.to(device, dtype).eval()
    with torch.no_grad():
        net(torch.zeros(1, net.in_channels, tile, tile, dtype=dtype, device=device))


Made = Callable[[], tuple[Any, ...]]


@dataclass(frozen=True)
class _Arguments:
    """Makes the arguments of ops as a net makes them: maps and weights in channels_last."""

    dtype: torch.dtype
    device: torch.device

    def map(self, shape: Shape, line: int = 0) -> Tensor:
        """Of this shape; a window of lines of `line` pixels, if given."""
        return self._empty(1, shape.channels, shape.rows, shape.columns, line)

    def parameters(self, sizes: tuple[int, int], kernel: int, out: int) -> tuple[Tensor, Tensor]:
        return self._empty(*sizes, kernel, kernel), torch.empty(out, dtype=self.dtype, device=self.device)

    def conv(self, before: Shape, after: Shape, *rest: Any, kernel: int = 3) -> Made:
        sizes = (after.channels, before.channels)
        return lambda: (self.map(before), *self.parameters(sizes, kernel, after.channels), *rest)

    def pool(self, before: Shape) -> Made:
        return lambda: (self.map(before),)

    def cat(self, up: Shape, skip: Shape, after: Shape, line: int) -> Made:
        sizes = (after.channels, up.channels + skip.channels)
        return lambda: (self.map(up), self.map(skip, line), *self.parameters(sizes, 3, after.channels), True)

    def up(self, before: Shape, after: Shape, mode: str) -> Made:
        # a deconvolution keeps its weight the other way round
        sizes = (before.channels, after.channels) if mode == "deconv" else (after.channels, before.channels)
        return lambda: (self.map(before), *self.parameters(sizes, 2, after.channels), mode)

    def _empty(self, n: int, channels: int, rows: int, columns: int, line: int = 0) -> Tensor:
        # by explicit strides: with one channel a tensor is contiguous in both formats
        line = line or columns
        strides = (channels * rows * line, 1, line * channels, channels)
        return torch.empty_strided((n, channels, rows, columns), strides, dtype=self.dtype, device=self.device)


def _questions(net: FastUNet, tile: int, make: _Arguments, in_one_pass: set[int]) -> Iterator[tuple[str, str, Made]]:
    """(layer, op, what makes the op's arguments) of a forward without gradients.

    A skip is a window of the map it is cut out of, unless its level, by then among `in_one_pass`, made it so.
    """
    maps = Layers(net, tile, tile).maps
    before = maps["input"]
    for level in range(net.depth + 1):
        middle, after = maps[f"down.{level}.conv1"], maps[f"down.{level}.conv2"]
        yield f"down.{level}.conv1", "conv3x3_relu", make.conv(before, middle, True)
        yield f"down.{level}.conv2", "conv3x3_relu", make.conv(middle, after, True)
        before = after
        if level < net.depth:
            window = maps[f"skip.{level}"]
            yield f"down.{level}.pool", "max_pool2x2", make.pool(after)
            both = make.conv(middle, after, True, window.rows, window.columns)
            yield f"down.{level}.conv2 with pool", "conv3x3_relu_pool", both
            before = maps[f"pool.{level + 1}"]
    for level in reversed(range(net.depth)):
        up, skip = maps[f"up.{level}.up"], maps[f"skip.{level}"]
        middle, after = maps[f"up.{level}.conv1"], maps[f"up.{level}.conv2"]
        yield f"up.{level}.up", "up_conv", make.up(before, up, net.up_mode)
        if net.settings["skips"]:
            line = 0 if level in in_one_pass else maps[f"down.{level}.conv2"].columns
            yield f"up.{level}.conv1", "conv3x3_relu_cat", make.cat(up, skip, middle, line)
        else:
            yield f"up.{level}.conv1", "conv3x3_relu", make.conv(up, middle, True)
        yield f"up.{level}.conv2", "conv3x3_relu", make.conv(middle, after, True)
        before = after
    yield "head", "conv1x1", make.conv(before, maps["head"], kernel=1)


def _lane(op: str, device: torch.device) -> list[str]:
    return list(unet_kernels.lane(op, device, torch.float32))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{_processor()}, {torch.get_num_threads()} threads"
    about = torch.cuda.get_device_properties(device)
    return f"{about.name}, sm_{about.major}{about.minor}, {about.total_memory / 1e9:.1f} GB"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            names = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _why_no_cuda() -> str:
    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) was built without CUDA"
    return f"torch was built for CUDA {torch.version.cuda}, but finds no device (driver missing or too old?)"
