"""The paper's training recipe: one loop, whose run directory holds all that came of it.

RUN/config.toml       every setting, resolved
RUN/run.json          what the data were understood to be, the split, versions
RUN/log.csv           step, loss, learning rate, validation: the contract
RUN/model.safetensors the best model by validation (the last, where nothing is held out)
RUN/checkpoints/      the last two states, for --resume
RUN/curves.png        log.csv as a picture
"""

import csv
import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

# an optimizer imports it when it is made: here, so that it is no memory of a run
import torch._dynamo
from torch import Tensor

import unet_kernels

from . import __version__, geometry
from .augment import ElasticWarp
from .checkpoints import State, checkpoints, keep, newest
from .config import TrainConfig, read_toml
from .data import Example, Labelled, class_balance, read_labelled, split
from .errors import BadInput
from .figures import draw_curves
from .files import replacing, writable_folder
from .loss import BorderWeightedCrossEntropy
from .measuring import Apart, Measured, Meter, capped, give_back, is_out_of_memory
from .memory import largest_tile
from .model import FastUNet
from .normalisation import Normalisation
from .planning import OFFERED, PRECISIONS, RECOMPUTE, Choice, Setting, choose, counted_bytes
from .progress import Progress
from .sampling import Sampler
from .storage import MODEL, load, pick_device, save
from .tiling import covering_tile, cut_tile, plan_tiles
from .units import bytes_of, readable
from .validation import Validation

__all__ = ["LOG_COLUMNS", "TrainResult", "read_log", "resumed_config", "train"]

LOG_COLUMNS = (
    "step",
    "epoch",
    "lr",
    "loss",
    "val_loss",
    "val_iou",
    "val_pixel_error",
    "val_threshold",
    "val_cell_iou",
    "val_ap50",
    "best",
    "seconds",
)

# a run may be continued with other values of these; all else must stay
_FREE_ON_RESUME = ("out", "device", "memory", "recompute", "log_every", "images", "labels")

# the heap of a CPU's process grows by up to a tenth over its first steps; a GPU's allocator is held to the budget
_HEADROOM = {"cpu": 0.9}
# what the same work takes more or less of a CPU, from time to time
_NOISE_BYTES = 500_000

# what a validation may take, of what is counted for a step
_OF_A_STEP = 0.6

# tiles of a whole image that a trial looks at
_TRIED = 4

# steps of a trial, where they are short: the fastest is what a step takes on a machine that does nothing else
_CALLS = 3

# a step that found no memory is tried again with a tile of at most this share of its bytes
_SMALLER = 0.85


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The best model, where its run lies, and the rows of its log."""

    model: FastUNet
    run: Path
    best_step: int
    log: list[dict[str, float | None]]


def train(config: TrainConfig, *, resume: bool = False, progress: bool = True) -> TrainResult:
    """Train a FastUNet as the paper did, and leave everything about it in `config.out`.

    Args:
        config: settings; see `TrainConfig`.
        resume: continue the run that lies in `config.out`, from its last checkpoint. On a CPU the weights are those
            of a run that was never interrupted, bit for bit.
        progress: show progress on stderr.

    Returns:
        the best model by validation, its step, the log.

    Raises:
        BadInput: data or settings that cannot be trained on; a run in the way; the loss is no number any more.
    """
    device = pick_device(config.device)
    meter = None if config.memory is None else Meter(device)
    state = newest(config.out) if resume else None
    if state is not None:
        config = _continued(config, state.about["config"])
    else:
        _refuse_other_run(config.out)
    config = config.with_(images=config.images.absolute(), labels=config.labels.absolute())
    choice = None
    with capped(device, None if config.memory is None else bytes_of(config.memory)):
        if config.memory is not None:
            config, choice = _inside_budget(config, device, _to_stderr if progress else _to_nobody)
        task = _prepare(config, device)
        tile = config.tile or _tile_for(task.learn, config)
        config = config.with_(classes=task.classes, tile=tile, precision=config.precision or "float32")
        sampler = task.sampler(config)
        steps = config.steps or (config.epochs * sampler.per_epoch if config.epochs else 10_000)
        config = config.with_(steps=steps, epochs=None)
        if state is not None:
            config = _continued(config, state.about["config"])
        writable_folder(config.out)
        run = _Run(config, task, meter, choice)
        if progress:
            _to_stderr(_summary(config, task, run))
        if state is not None:
            run.restore(state)
        else:
            run.begin()
        try:
            run.loop(progress)
        finally:
            draw_curves(config.out / "curves.png", {config.out.name: read_log(config.out / "log.csv")})
    return TrainResult(load(config.out), config.out, run.best_step, read_log(config.out / "log.csv"))


@dataclass(frozen=True, slots=True)
class _Task:
    """What is trained on, and where; the same for every way of training."""

    data: Labelled
    data_digest: str
    learn: list[Example]
    classes: int
    weights: tuple[float, ...]
    normalisation: Normalisation
    loss: BorderWeightedCrossEntropy
    validation: Validation
    device: torch.device

    def model(self, config: TrainConfig) -> FastUNet:
        """The net with its first weights: drawn on the CPU, so that they are the same on every device."""
        with torch.random.fork_rng([]):
            torch.manual_seed(config.seed)
            model = FastUNet(
                self.data.channels,
                self.classes,
                config.features,
                up_mode=config.up_mode,
                dropout=config.dropout,
                skips=config.skips,
                padding=config.padding,
            )
        model.to(self.device)
        model.recompute = config.recompute or "none"
        model.normalisation = self.normalisation
        return model

    def sampler(self, config: TrainConfig) -> Sampler:
        assert config.tile is not None
        return Sampler(self.learn, config, config.tile)


def _prepare(config: TrainConfig, device: torch.device) -> _Task:
    """Read the data, understand them, and refuse what cannot be trained on."""
    normalisation = _normalisation(config)
    data = read_labelled(
        config.images,
        config.labels,
        kind=config.label_kind,
        ignore=config.ignore,
        axes=config.axes,
        normalisation=normalisation,
    )
    classes = _classes(config, data)
    learn, held_out = split(data.examples, config.validation)
    if not any((e.instances > 0).any() for e in learn):
        raise BadInput(f"{config.labels} has no cell outside the validation block; use a smaller validation share")
    if held_out and not any((e.instances > 0).any() for e in held_out):
        block = f"the validation block, {held_out[0].name} to {held_out[-1].name},"
        share = f"another validation share than {config.validation:g}"
        raise BadInput(f"{block} has no cell to be judged by; use {share}, or 0 for none")
    weights = class_balance(learn) if config.balance else (1.0,) * classes
    if len(weights) < classes:
        raise BadInput(f"the training set has no pixel of class {classes - 1}; train with classes {len(weights)}")
    loss = BorderWeightedCrossEntropy(
        config.border_weight,
        config.border_sigma,
        class_weight=weights,
        region=config.border_region,
        gap=data.kind != "class",
    )
    return _Task(
        data=data,
        data_digest=_digest(data.examples),
        learn=list(learn),
        classes=classes,
        weights=tuple(weights),
        normalisation=normalisation,
        loss=loss,
        validation=Validation(held_out, loss),
        device=device,
    )


def _inside_budget(config: TrainConfig, device: torch.device, say: Callable[[str], None]) -> tuple[TrainConfig, Choice]:
    """The config with tile, precision and recomputation chosen, each tried by real steps, and with it what comes
    between steps."""
    assert config.memory is not None
    budget = bytes_of(config.memory)
    writable_folder(config.out)
    task = _prepare(config, device)
    config, net = config.with_(classes=task.classes), task.model(config)
    if config.tile is not None:
        # refused here, and not by a trial
        task.sampler(config)
    tiles = [config.tile] if config.tile else _tiles_for(task.learn, config)
    # on a CPU the trials are other processes, with the data once more
    del task
    apart, steps = Apart(device, __name__), {"steps": config.steps or 1, "epochs": None}
    choice = choose(
        net,
        budget,
        tiles,
        lambda setting: apart(_measure_steps, _with(config, setting).with_(**steps), device),
        headroom=_HEADROOM.get(device.type, 1.0),
        batch=1 if config.accumulate == "image" else config.batch,
        device=device,
        precisions=[config.precision] if config.precision else _precisions(device),
        recompute=[config.recompute] if config.recompute else RECOMPUTE,
        say=say,
    )
    say(choice.table())
    config = _with(config, choice.setting)
    with TemporaryDirectory(dir=config.out) as place:
        between = apart(_measure_between_steps, config.with_(out=Path(place), **steps), device).bytes
    needed = None if between is None else between / _HEADROOM.get(device.type, 1.0)
    if needed is not None and needed > budget:
        # it never takes quite the same
        needed += _NOISE_BYTES
        what = "validation and checkpoints take that, whatever the tile"
        raise BadInput(f"memory must be at least {readable(needed, up=True)}: {what}; got {config.memory}")
    return config, choice


def _measure_steps(config: TrainConfig, device: torch.device) -> Measured:
    """Of a batch of tiles; where a step sees whole images, a tile's share of it, by a few of their tiles."""
    run, meter = _trial(config, device)
    _settle(lambda: run.one_step(_TRIED), device)
    if config.accumulate == "tile":
        return meter.measure(run.one_step, calls=_CALLS, within_s=10.0)
    started = time.perf_counter()
    pieces = [target.numel() for _, target, _ in run.pieces()]
    drawing, tried = time.perf_counter() - started, min(_TRIED, len(pieces))
    found = meter.measure(lambda: run.one_step(tried), calls=_CALLS, within_s=10.0)
    # what else a machine does may have made drawing slow
    of_tiles = max(found.seconds - drawing, 0.1 * found.seconds)
    whole = drawing + of_tiles * len(pieces) / tried
    return replace(found, seconds=whole * run.sampler.tile_out**2 / sum(pieces))


def _measure_between_steps(config: TrainConfig, device: torch.device) -> Measured:
    run, meter = _trial(config, device)
    _settle(run.between_steps, device)
    return meter.measure(run.between_steps)


def _settle(work: Callable[[], Any], device: torch.device) -> None:
    """On a GPU the first time of all is spent on compiling kernels and on choosing among them, in memory of its own."""
    if device.type == "cuda":
        work()


def _trial(config: TrainConfig, device: torch.device) -> "tuple[_Run, Meter]":
    meter = Meter(device)
    run = _Run(config, _prepare(config, device), meter)
    run.fill_momentum()
    return run, meter


def _with(config: TrainConfig, setting: Setting) -> TrainConfig:
    return config.with_(tile=setting.tile_in, precision=setting.precision, recompute=setting.recompute)


def _precisions(device: torch.device) -> list[str]:
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return ["float32"]
    # what a device computes in float32 anyway is neither faster nor smaller
    return [name for name in OFFERED if unet_kernels.multiplies_in(device, PRECISIONS[name]) == PRECISIONS[name]]


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def _to_nobody(_: str) -> None:
    pass


def _summary(config: TrainConfig, task: _Task, run: "_Run") -> str:
    held_out = task.validation.examples
    block = f"{held_out[0].name} to {held_out[-1].name}" if held_out else "none"
    each = "whole images in tiles of" if config.accumulate == "image" else "tile"
    return (
        f"labels understood as {task.data.kind}: {task.classes} classes; {task.data.channels} channel(s)\n"
        f"training on {len(task.learn)} images, validation on {len(held_out)} ({block})\n"
        f"{sum(p.numel() for p in run.model.parameters()):,} parameters, {each} {config.tile}, "
        f"{config.steps} steps on {task.device}"
        + (
            f"\nnote: elastic maps of {config.elastic:g} px fold: {run.folding['maps']:.0%} of them, at "
            f"{run.folding['pixels']:.2%} of all pixels; those are made smaller until they do not"
            if run.folding["maps"]
            else ""
        )
    )


def resumed_config(out: Path, **overrides: Any) -> TrainConfig:
    """The settings of the run in `out`, for continuing it."""
    settings = read_toml(out / "config.toml")
    if overrides.get("memory") is not None:
        # what another budget needs is found out again
        settings.pop("recompute", None)
    if "memory" in settings:
        # the last state knows what the run came down to, if it had to
        settings.pop("tile", None)
    if overrides.get("epochs") is not None:
        del settings["steps"]  # the same run, its length said as it was at first
    return TrainConfig.from_dict({**settings, "out": str(out)}, **overrides)


def read_log(path: Path) -> list[dict[str, float | None]]:
    """Rows of a log.csv; an empty cell is None."""
    with path.open(newline="") as file:
        return [{k: float(v) if v else None for k, v in row.items()} for row in csv.DictReader(file)]


def _normalisation(config: TrainConfig) -> Normalisation:
    given = {name: v for name, v in (("low", config.low), ("high", config.high)) if v is not None}
    if config.normalisation == "range" and len(given) < 2:
        raise BadInput("normalisation range needs low and high, the grey values that become 0 and 1")
    return Normalisation(config.normalisation, **given)


def _classes(config: TrainConfig, data: Labelled) -> int:
    if config.classes is None:
        return data.classes
    if config.classes < data.classes:
        raise BadInput(f"classes is {config.classes}, but the labels go up to class {data.classes - 1}")
    return config.classes


def _tile_for(examples: Sequence[Example], config: TrainConfig) -> int:
    """The tile that covers the largest image, or the usual one where that would be larger."""
    sides = [max(plan_tiles(e.instances.shape, depth=config.depth, up_mode=config.up_mode).tile_in) for e in examples]
    return max(sides)


def _tiles_for(examples: Sequence[Example], config: TrainConfig) -> list[int]:
    """All tiles that may be chosen: from one that keeps a step of pixels to the one that covers the largest image."""
    step = (geometry.step_multiple(config.depth),) * 2
    shapes = [step, *(e.instances.shape for e in examples)]
    smallest, *covering = (max(covering_tile(s, depth=config.depth, up_mode=config.up_mode)) for s in shapes)
    largest = max(covering)
    return geometry.legal_sizes(min(smallest, largest), largest, config.depth)


class _Run:
    """One run: the loop and what it writes."""

    def __init__(
        self, config: TrainConfig, task: _Task, meter: Meter | None = None, choice: Choice | None = None
    ) -> None:
        assert config.steps is not None
        self.config, self.task, self.meter, self.choice = config, task, meter, choice
        self.model, self.sampler = task.model(config), task.sampler(config)
        self.device, self.steps = task.device, config.steps
        self.loss, self.validation = task.loss, task.validation
        self.validate_every = config.validate_every or max(1, round(self.steps / 20))
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        warm = round(config.warmup * self.steps)
        self.rate = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: _rate(step, warm, self.steps))
        self.step, self.best, self.best_step, self.seconds = 0, math.inf, 0, 0.0
        self.log: list[dict[str, Any]] = []
        # since the last row of the log
        self.losses: list[Tensor] = []
        # in the middle of an update the weights belong to no step
        self.updating = False
        # the greatest peak above the budget, and whether coming down is still tried
        self.exceeded, self.watched = 0, True

    @cached_property
    def folding(self) -> dict[str, float]:
        return self.sampler.folding()

    # ---- what lies on disk

    def begin(self) -> None:
        out = self.config.out
        self._write_config()
        with replacing(out / "run.json") as path:
            path.write_text(json.dumps(self._record(), indent=2) + "\n")
        self._write_log()
        writable_folder(out / "checkpoints")

    def _write_config(self) -> None:
        with replacing(self.config.out / "config.toml") as path:
            path.write_text(self.config.to_toml(), encoding="utf-8")

    def _record(self) -> dict[str, Any]:
        return {
            "command": sys.argv,
            "labels_understood_as": self.task.data.kind,
            "classes": self.model.out_channels,
            "class_weights": self.task.weights,
            "training": [e.name for e in self.sampler.examples],
            "validation": [e.name for e in self.validation.examples],
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "net": self.model.settings,
            "folding": self.folding,
            "memory": None if self.choice is None else asdict(self.choice),
            "device": str(self.device),
            "versions": {
                "unet_fast": __version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        }

    def _write_log(self) -> None:
        with replacing(self.config.out / "log.csv") as path, path.open("w", newline="") as file:
            writer = csv.DictWriter(file, LOG_COLUMNS)
            writer.writeheader()
            writer.writerows(self.log)

    def keep_state(self) -> None:
        """Write a checkpoint and drop all but the last two."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        momentum = {
            f"momentum.{names[id(p)]}": state["momentum_buffer"]
            for p, state in self.optimizer.state.items()
            if state.get("momentum_buffer") is not None
        }
        tensors = {**{f"net.{k}": v for k, v in self.model.state_dict().items()}, **momentum}
        about = {
            "step": self.step,
            "best": self.best if math.isfinite(self.best) else None,
            "best_step": self.best_step,
            "seconds": self.seconds,
            "config": self.config.as_dict(),
            "data": self.task.data_digest,
            "log": self.log,
            "losses": [float(loss) for loss in self.losses],
            "kernels": unet_kernels.choices(self.device),
        }
        keep(self.config.out, self.step, tensors, about)

    def restore(self, state: State) -> None:
        self.model.load_state_dict({k[4:]: v for k, v in state.tensors.items() if k.startswith("net.")})
        for name, p in self.model.named_parameters():
            kept = state.tensors.get(f"momentum.{name}")
            if kept is not None:
                # in the parameter's own strides, as SGD made it
                self.optimizer.state[p]["momentum_buffer"] = torch.empty_like(p).copy_(kept)
        about = state.about
        # whatever a clock says today
        unet_kernels.adopt(about.get("kernels"), self.device)
        if about["data"] != self.task.data_digest:
            raise BadInput(
                f"{self.config.images} and {self.config.labels} are not what the run in {self.config.out} began with; "
                f"their contents must stay, wherever they lie"
            )
        self.step, self.best_step, self.seconds = about["step"], about["best_step"], about["seconds"]
        self.best = math.inf if about["best"] is None else about["best"]
        self.log, self.losses = about["log"], [torch.tensor(loss, device=self.device) for loss in about["losses"]]
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * _rate(self.step, round(self.config.warmup * self.steps), self.steps)
        self.rate.last_epoch = self.step
        # what was left free may be another
        self._write_config()
        if self.choice is not None:
            place = self.config.out / "run.json"
            record = {**json.loads(place.read_text()), "memory": asdict(self.choice)}
            with replacing(place) as path:
                path.write_text(json.dumps(record, indent=2) + "\n")
        self._write_log()

    # ---- the loop

    def loop(self, progress: bool) -> None:
        start, before = time.monotonic(), self.seconds
        if self.meter is not None:
            self.meter.restart()
        with Progress("train", self.steps, done=self.step, shown=progress) as bar:
            try:
                # an interrupted report is made up for
                self._report_if_due()
                while self.step < self.steps:
                    if not self._step_that_fits():
                        self._come_down("a step found no memory")
                        continue
                    self.seconds = before + time.monotonic() - start
                    self._report_if_due()
                    bar.advance(self._message())
            except KeyboardInterrupt:
                if not self.updating:
                    self.keep_state()
                raise
        if progress and self.choice is not None and (peak := self._peak()) is not None:
            _to_stderr(f"memory: {readable(peak)} at most, of {readable(self.choice.budget_bytes)}")

    def _peak(self) -> int | None:
        return None if self.meter is None else self.meter.peak()

    def _report_if_due(self) -> None:
        last = self.step == self.steps
        check = last or self.step % self.validate_every == 0
        if self.losses and (check or self.step % self.config.log_every == 0):
            self._report(check)
            if not last:
                self._stay_inside()

    def _step_that_fits(self) -> bool:
        """Take a step; False where a run with a budget found no memory for it, and nothing has changed."""
        try:
            self.one_step()
        except (MemoryError, RuntimeError) as error:
            if self.config.memory is None or self.updating or not is_out_of_memory(error):
                raise
            return False
        return True

    def _stay_inside(self) -> None:
        """A budget that was exceeded nevertheless is not exceeded again, if coming down can do that."""
        peak = self._peak() if self.watched else None
        if peak is None or self.choice is None or peak <= self.choice.budget_bytes:
            return
        why = f"{readable(peak)} were taken of {readable(self.choice.budget_bytes)}"
        self.watched = not 0 < self.exceeded <= peak
        self.exceeded = peak
        try:
            if self.watched:
                self._come_down(why)
        except MemoryError:
            self.watched = False
        if not self.watched:
            _to_stderr(f"note: {why}; less does not help")

    def _come_down(self, why: str) -> None:
        """Go on in less memory: recompute first, which changes no bit; then a smaller tile."""
        self.optimizer.zero_grad()
        config = self.config
        now = Setting(config.tile or 0, config.precision or "float32", config.recompute or "none")
        if now.recompute == "none":
            smaller = Setting(now.tile_in, now.precision, "level")
        else:
            batch = 1 if config.accumulate == "image" else config.batch
            limit = _SMALLER * counted_bytes(self.model, now, batch, self.device)
            tiles = [n for n in _tiles_for(self.task.learn, config) if n < now.tile_in]
            settings = [Setting(n, now.precision, "level") for n in reversed(tiles)]
            fits = (each for each in settings if counted_bytes(self.model, each, batch, self.device) <= limit)
            found = next(fits, None)
            if found is None:
                raise MemoryError(f"{why}, and {now} is the smallest there is")
            smaller = found
        _to_stderr(f"note: {why}; from step {self.step} on with {smaller}")
        self.config = _with(config, smaller)
        self.model.recompute = smaller.recompute
        self.sampler = self.task.sampler(self.config)
        self._write_config()
        self.keep_state()
        if self.meter is not None:
            self.meter.restart()

    def one_step(self, tiles: int | None = None) -> None:
        """Draw, forward, backward, update; of whole images the first `tiles` only, if that is all one wants to see."""
        self.model.train()
        self.optimizer.zero_grad()
        # dropout's draws belong to the step, not to what was drawn before it; the caller's generators stay as they were
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(ElasticWarp.generator(self.config.seed, -1, self.step).initial_seed())
            loss = self._of_images(tiles) if self.config.accumulate == "image" else self._of_tiles()
        if self.config.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.updating = True
        self.optimizer.step()
        self.rate.step()
        self.step += 1
        self.losses.append(loss)
        self.updating = False

    def _logits(self, image: Tensor) -> Tensor:
        precision = self.config.precision or "float32"
        with torch.autocast(self.device.type, PRECISIONS[precision], enabled=precision != "float32"):
            logits: Tensor = self.model(image.to(self.device))
        return logits

    def _of_tiles(self) -> Tensor:
        """The loss of a batch of tiles; its gradient stays in the parameters."""
        image, instances, target = self.sampler.batch(self.step)
        # weights are made where the net is
        loss: Tensor = self.loss(self._logits(image), instances.to(self.device), target.to(self.device))
        loss.backward()
        return loss.detach()

    def _of_images(self, tiles: int | None = None) -> Tensor:
        """The same for whole images: the mean over all their pixels, added up tile by tile in the memory of one."""
        pieces, total = self.pieces(), torch.zeros((), device=self.device)
        valid = max(1, sum(int((target >= 0).sum()) for _, target, _ in pieces))
        for read, target, weight in pieces[:tiles]:
            logits = self._logits(read)[..., : target.shape[-2], : target.shape[-1]]
            loss = unet_kernels.weighted_cross_entropy(
                logits, target.to(self.device), weight.to(self.device), reduction="sum"
            )
            loss = loss / valid
            loss.backward()
            total += loss.detach()
        return total

    def pieces(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(image, target, weight) of each tile of this step's whole images; each output pixel is in one of them."""
        depth, pieces = self.config.depth, []
        for image, instances, target in self.sampler.drawn(self.step):
            size = [geometry.output_size(n, depth) for n in image.shape[1:]]
            target, weight = self.loss.pixels(instances[None], target[None], (size[0], size[1]), self.task.classes)
            cuts = [cut_tile(n, self.sampler.tile, depth=depth, up_mode=self.config.up_mode) for n in image.shape[1:]]
            for (top, height, rows), (left, width, columns) in product(*cuts):
                read = image[None, :, top : top + height, left : left + width]
                here = (..., slice(top, top + rows), slice(left, left + columns))
                pieces.append((read, target[here], weight[here]))
        return pieces

    def fill_momentum(self) -> None:
        """As after a first step, for one that is to take what all others will."""
        for p in self.model.parameters():
            self.optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)

    def between_steps(self) -> None:
        """All that a report does."""
        writable_folder(self.config.out / "checkpoints")
        self._make_room()
        self.validation.scores(self.model, self._validation_tile)
        save(self.model, self.config.out / MODEL)
        self.keep_state()

    def _make_room(self) -> None:
        """The gradients of the last step are done with, and so are the holes that its maps left in the heap."""
        self.optimizer.zero_grad()
        if self.config.memory is not None and self.device.type == "cpu":
            give_back()

    @property
    def _validation_tile(self) -> int | None:
        """Inside a budget: one that takes well below what a step takes."""
        config = self.config
        if config.memory is None or config.tile is None:
            return None
        now = Setting(config.tile, config.precision or "float32", config.recompute or "none")
        try:
            fits = largest_tile(
                _OF_A_STEP * counted_bytes(self.model, now, device=self.device), self.model, mode="predict"
            )
        except ValueError:
            fits = 0
        return min(config.tile, fits)

    def _diverged(self, loss: float) -> BadInput:
        kept = f" ({self.config.out} keeps the last good state)" if checkpoints(self.config.out) else ""
        needed = f"a smaller lr than {self.config.lr:g} is needed"
        return BadInput(f"the loss became {loss} at step {self.step}; {needed}{kept}")

    def _report(self, check: bool) -> None:
        loss = float(torch.stack(self.losses).mean())
        # the last update may have thrown away what the losses before it show as good
        if check and math.isfinite(loss) and not all(p.isfinite().all() for p in self.model.parameters()):
            loss = math.nan
        if not math.isfinite(loss):
            raise self._diverged(loss)
        row: dict[str, Any] = dict.fromkeys(LOG_COLUMNS, "")
        lr = self.optimizer.param_groups[0]["lr"]
        epoch = (self.step - 1) // self.sampler.per_epoch
        row |= {"step": self.step, "epoch": epoch, "lr": f"{lr:.6g}", "loss": f"{loss:.6g}"}
        if check:
            self._make_room()
            try:
                scores = self.validation.scores(self.model, self._validation_tile)
            except FloatingPointError as error:
                # weights that are numbers yet, so large that nothing made of them is
                raise self._diverged(math.nan) from error
            # IoU and average precision of a few images jump from one validation to the next; the loss does not
            val_loss = scores.get("val_loss")
            # the same step again, where its report was interrupted
            better = val_loss is None or val_loss < self.best or self.step == self.best_step
            if better:
                save(self.model, self.config.out / MODEL)
                self.best, self.best_step = math.inf if val_loss is None else val_loss, self.step
            row |= {k: f"{v:.6g}" for k, v in scores.items() if v is not None}
            row["best"] = int(better)
        row["seconds"] = f"{self.seconds:.1f}"
        self.log.append(row)
        self.losses = []
        self._write_log()
        if check:
            self.keep_state()

    def _message(self) -> str:
        if not self.log:
            return ""
        last = next((row for row in reversed(self.log) if row["val_iou"] != ""), None)
        shown = f"loss {float(self.log[-1]['loss']):.3f}"
        return shown if last is None else f"{shown}  validation IoU {float(last['val_iou']):.3f}"


def _digest(examples: Sequence[Example]) -> str:
    """sha256 of all images, as they are trained on, and of their labels."""
    digest = hashlib.sha256()
    for example in examples:
        for part in (example.image, example.instances, example.class_of):
            digest.update(part.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _rate(step: int, warm: int, steps: int) -> float:
    """Factor of the learning rate: a linear rise, then half a cosine to 0."""
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, steps - warm))))


def _refuse_other_run(out: Path) -> None:
    if checkpoints(out) or (out / MODEL).exists():
        raise BadInput(f"{out} holds a run already; --resume continues it, or choose another --out")


def _continued(config: TrainConfig, before: dict[str, Any]) -> TrainConfig:
    """The settings of a run that goes on: what is left open now is as it was, what differs is refused by name."""
    now = config.as_dict()
    # a run of before there was a choice
    before = {"precision": "float32", "accumulate": "tile", "foreground": 0.0, **before}
    # epochs become steps when the data are known
    for key in sorted(set(now) - {*_FREE_ON_RESUME, "epochs"}):
        if now[key] != before.get(key):
            raise BadInput(
                f"{key} was {before.get(key)!r} when the run began and is {now[key]!r} now; it cannot change"
            )
    left_open = set(before) - {*now, *_FREE_ON_RESUME, *(("steps",) if config.epochs else ())}
    return config.with_(**{key: before[key] for key in left_open})
