"""Settings of a training run: one frozen dataclass, read from TOML and written back, a reason beside each default."""

import difflib
import json
import math
import re
import tomllib
import types
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self, get_args, get_origin, get_type_hints

from . import geometry
from .errors import BadInput
from .units import bytes_of

__all__ = ["PRESETS", "TrainConfig"]


# settings under one name; "small" is for a CPU: a narrow net, and a momentum that a few thousand steps can use
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "small": {
        "features": (16, 32, 64, 128),
        "momentum": 0.9,
        "lr": 0.02,
        "dropout": 0.0,
        "noise": 0.05,
        "steps": 4000,
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """What `unet_fast.train` and `unet-fast train` need to know; every field is a key of the TOML file.

    Defaults are the paper's where it gives a number. Where it is silent (learning rate, schedule, ranges of rotation
    and grey values) they are ours, and `docs/training.md` says why.

    Raises:
        BadInput: a value out of range, in one sentence that names it.
    """

    images: Path
    labels: Path
    out: Path
    # what the labels are: see `unet_fast.data.read_labelled`
    label_kind: str = "auto"
    ignore: int | None = None
    axes: str | None = None
    # percentile: exposure no longer matters; range: `low` and `high` are the grey values of 0 and 1
    normalisation: str = "percentile"
    low: float | None = None
    high: float | None = None
    # the net; classes None: as many as the labels have
    features: tuple[int, ...] = (64, 128, 256, 512, 1024)
    classes: int | None = None
    up_mode: str = "deconv"
    dropout: float = 0.5
    # ablations: without the connections across the net; with zeros around each map, so that none shrinks
    skips: bool = True
    padding: str = "valid"
    # None: tiles that fit the images, 572 at most
    tile: int | None = None
    # "6GB": instead of a tile, the fastest way to train that fits; a GPU's memory, or what a CPU's process allocates
    memory: str | None = None
    # "level": less memory, a third more time, the same bits. None: "none", or what fits `memory`
    recompute: str | None = None
    # of the maps; weights and losses are float32 always. None: bfloat16 on a GPU that has it, float32 elsewhere, or
    # what is faster inside `memory`. float16 comes with a scaled loss
    precision: str | None = None
    # the same bits every time on a GPU too, where that costs speed
    deterministic: bool = False
    # "tile": a step sees `batch` tiles; "image": `batch` whole images, tile by tile, however large they are
    accumulate: str = "tile"
    # the paper: one tile a step, momentum 0.99 so that many tiles decide an update. With several processes, of all
    batch: int = 1
    # of those, how many go through the net together; the gradients of the others are added up. None: all of a process
    at_once: int | None = None
    momentum: float = 0.99
    steps: int | None = None
    epochs: int | None = None
    # with momentum 0.99 the effective rate is 100 times this one
    lr: float = 0.002
    # the share of steps in which the rate rises from 0; it falls to 0 by a cosine afterwards
    warmup: float = 0.05
    # gradients longer than this are scaled down to it; one bad tile then cannot throw the net away. 0: never
    clip: float = 1.0
    weight_decay: float = 0.0
    # a step whose loss or gradient is no number changes nothing; after so many in a row the run ends
    most_skipped: int = 25
    # Eq. 2 of the paper; border_weight 0 leaves the ridge out
    border_weight: float = 10.0
    border_sigma: float = 5.0
    # "background", as in Freiburg's code; "all", the letter of Eq. 2: the rims of the cells count as much as the gap
    border_region: str = "background"
    balance: bool = True
    # a 3 x 3 grid over each tile, displacements of 10 px standard deviation
    elastic: float = 10.0
    grid: int = 3
    rotate: bool = True
    mirror: bool = True
    grey: float = 0.5
    # cells come in one size where the microscope's magnification does not change
    zoom: float = 1.0
    # the share of tiles that lie around a pixel of a cell, for images that are mostly empty; the others lie anywhere
    foreground: float = 0.0
    # the warp blurs: without new noise the net never sees images as noisy as those it will be asked about
    noise: float = 0.0
    # the share of images (the last ones: a contiguous block) that is not trained on; 0 for none
    validation: float = 0.1
    validate_every: int | None = None
    log_every: int = 20
    # a state is kept at each validation, and where those are far apart, after so many minutes
    keep_minutes: float = 5.0
    # threads that draw tiles ahead of the net; the tiles are the same. None: 2 where a GPU waits for them, else 0
    workers: int | None = None
    # where the images lie: "device", "host", or, "auto", on a GPU that has room for them
    images_on: str = "auto"
    # curves for TensorBoard too, beside log.csv
    tensorboard: bool = False
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("images", "labels", "out"):
            object.__setattr__(self, name, Path(getattr(self, name)))
            try:
                str(getattr(self, name)).encode()
            except UnicodeEncodeError as error:
                raise BadInput(f"{name} must be a path that is text in UTF-8, got {getattr(self, name)!r}") from error
        object.__setattr__(self, "features", tuple(self.features))
        depth = len(self.features) - 1
        if depth < 0 or min(self.features) < 1:
            raise BadInput(f"features must be one positive number per level, got {_shown(self.features)}")
        if self.tile is not None:
            try:
                geometry.check_legal(self.tile, depth, name="tile")
            except ValueError as error:
                raise BadInput(str(error)) from error
        if self.memory is not None:
            try:
                bytes_of(self.memory)
            except ValueError as error:
                raise BadInput(str(error)) from error
        if self.steps is not None and self.epochs is not None:
            raise BadInput(f"steps and epochs cannot both be given, got {self.steps} and {self.epochs}")
        for name in ("steps", "epochs", "batch", "at_once", "log_every", "validate_every", "most_skipped"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInput(f"{name} must be 1 or more, got {value}")
        if not 0 < self.lr < math.inf:
            raise BadInput(f"lr must be above 0, got {self.lr}")
        for name in ("momentum", "dropout", "validation", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise BadInput(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        for name in ("border_weight", "elastic", "clip", "weight_decay", "noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise BadInput(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("border_sigma", "keep_minutes"):
            if not 0 < getattr(self, name) < math.inf:
                raise BadInput(f"{name} must be above 0, got {getattr(self, name)}")
        if self.workers is not None and not 0 <= self.workers <= 64:
            raise BadInput(f"workers must be 0 to 64, got {self.workers}")
        for name in ("grey", "foreground"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadInput(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        if self.foreground and self.accumulate == "image":
            raise BadInput(f"foreground must be 0 where whole images are drawn, got {self.foreground}")
        if self.padding == "same" and (self.memory is not None or self.accumulate == "image"):
            what = "memory" if self.memory is not None else "accumulate image"
            raise BadInput(f"padding must be valid with {what}: tiles of a padded net do not join exactly, got 'same'")
        if self.at_once is not None and self.accumulate == "image":
            raise BadInput(f"at_once must be left out where whole images are drawn, got {self.at_once}")
        if not 1 <= self.zoom <= 4:
            raise BadInput(f"zoom must lie between 1 and 4, got {self.zoom}")
        if self.grid < 2:
            raise BadInput(f"grid must be 2 or more, got {self.grid}")
        if self.classes is not None and not 2 <= self.classes <= 256:
            raise BadInput(f"classes must be 2 to 256, background included, got {self.classes}")
        if not 0 <= self.seed < 2**63:
            raise BadInput(f"seed must be 0 or more and fit 64 bits, got {self.seed}")
        for name in ("low", "high"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise BadInput(f"{name} must be finite, got {value}")
        for name, choices in (
            ("label_kind", ("auto", "binary", "class", "instance")),
            ("up_mode", ("deconv", "resize")),
            ("recompute", (None, "none", "level")),
            ("precision", (None, "float32", "bfloat16", "float16")),
            ("padding", ("valid", "same")),
            ("images_on", ("auto", "device", "host")),
            ("accumulate", ("tile", "image")),
            ("border_region", ("background", "all")),
        ):
            if getattr(self, name) not in choices:
                named = ", ".join(filter(None, choices))
                raise BadInput(f"{name} must be one of {named}, got {getattr(self, name)!r}")

    @property
    def depth(self) -> int:
        return len(self.features) - 1

    @classmethod
    def read(cls, path: Path, **overrides: Any) -> Self:
        """From a TOML file; `overrides` that are not None win. Paths in the file are relative to where one works."""
        return cls.from_dict(read_toml(path), **overrides)

    @classmethod
    def from_dict(cls, settings: dict[str, Any], **overrides: Any) -> Self:
        """From keys and values; unknown keys and wrong types are refused, with the nearest known key."""
        settings = {**settings, **{k: v for k, v in overrides.items() if v is not None}}
        types_of = get_type_hints(cls)
        for key, value in settings.items():
            if key not in types_of:
                near = difflib.get_close_matches(key.lower(), types_of, 1)
                raise BadInput(f"config has the unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
            settings[key] = _as_type(key, value, types_of[key])
        missing = [f.name for f in fields(cls) if f.name in ("images", "labels", "out") and f.name not in settings]
        if missing:
            raise BadInput(f"{' and '.join(missing)} must be given, on the command line or in the config file")
        return cls(**settings)

    def with_(self, **changes: Any) -> Self:
        """A copy with other values."""
        return replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in TOML and JSON; None is left out."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: _plain(v) for k, v in plain.items() if v is not None}

    def to_toml(self) -> str:
        # a JSON string, number, array or boolean is TOML too, but for how it escapes what is not ASCII
        lines = (f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in self.as_dict().items())
        return "".join(re.sub("[^ -~]", lambda c: f"\\U{ord(c[0]):08x}", line) + "\n" for line in lines)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _shown(values: tuple[int, ...]) -> str:
    return ",".join(map(str, values)) or "none"


def read_toml(path: Path) -> dict[str, Any]:
    """The keys of a TOML file, or BadInput with the line that is wrong."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInput(f"{path} does not exist; expected a TOML file of settings") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadInput(f"{path} cannot be read as TOML: {error}") from error


def _as_type(key: str, value: Any, kind: Any) -> Any:
    """`value` as the field's type; int for float is fine, bool for int is not."""
    kinds = get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for each in kinds:
        if each is type(None) and value is None:
            return None
        if get_origin(each) is tuple and isinstance(value, list | tuple):
            if all(isinstance(v, int) and not isinstance(v, bool) for v in value):
                return tuple(value)
        elif each is Path and isinstance(value, str | Path):
            return Path(value)
        elif each is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        elif each in (int, str, bool) and type(value) is each:
            return value
    names = " or ".join(
        "a list of whole numbers" if get_origin(k) is tuple else _NAMES.get(k, "nothing") for k in kinds
    )
    raise BadInput(f"config key {key} must be {names}, got {value!r}")


_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path"}
