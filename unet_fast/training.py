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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import __version__
from .augment import ElasticWarp
from .checkpoints import State, checkpoints, keep, newest
from .config import TrainConfig, read_toml
from .data import Example, Labelled, class_balance, read_labelled, split
from .errors import BadInput
from .figures import draw_curves
from .files import replacing, writable_folder
from .loss import BorderWeightedCrossEntropy
from .model import FastUNet
from .normalisation import Normalisation
from .progress import Progress
from .sampling import Sampler
from .storage import MODEL, load, pick_device, save
from .tiling import plan_tiles
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
_FREE_ON_RESUME = ("out", "device", "recompute", "log_every", "images", "labels")


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
    state = newest(config.out) if resume else None
    if state is not None:
        config = _continued(config, state.about["config"])
    else:
        _refuse_other_run(config.out)
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
    tile = config.tile or _tile_for(learn, config)
    sampler = Sampler(learn, config, tile)
    steps = config.steps or (config.epochs * sampler.per_epoch if config.epochs else 10_000)
    # absolute, so that a run can be continued from anywhere
    places = {"images": config.images.absolute(), "labels": config.labels.absolute()}
    config = config.with_(tile=tile, classes=classes, steps=steps, epochs=None, **places)
    if state is not None:
        config = _continued(config, state.about["config"])
    weights = class_balance(learn) if config.balance else (1.0,) * classes
    if len(weights) < classes:
        raise BadInput(f"the training set has no pixel of class {classes - 1}; train with classes {len(weights)}")

    device = pick_device(config.device)
    # on the CPU, so that the first weights are the same on every device
    with torch.random.fork_rng([]):
        torch.manual_seed(config.seed)
        model = FastUNet(data.channels, classes, config.features, up_mode=config.up_mode, dropout=config.dropout)
    model.to(device)
    model.recompute = config.recompute
    model.normalisation = normalisation
    writable_folder(config.out)
    if progress:
        print(_summary(config, data, learn, held_out, model, device), file=sys.stderr)  # noqa: T201
    run = _Run(config, model, sampler, held_out, weights, data, device)
    if state is not None:
        run.restore(state)
    else:
        run.begin()
    try:
        run.loop(progress)
    finally:
        draw_curves(config.out / "curves.png", {config.out.name: read_log(config.out / "log.csv")})
    return TrainResult(load(config.out), config.out, run.best_step, read_log(config.out / "log.csv"))


def _summary(
    config: TrainConfig,
    data: Labelled,
    learn: Sequence[Example],
    held_out: Sequence[Example],
    model: FastUNet,
    device: torch.device,
) -> str:
    block = f"{held_out[0].name} to {held_out[-1].name}" if held_out else "none"
    return (
        f"labels understood as {data.kind}: {model.out_channels} classes; {data.channels} channel(s)\n"
        f"training on {len(learn)} images, validation on {len(held_out)} ({block})\n"
        f"{sum(p.numel() for p in model.parameters()):,} parameters, tile {config.tile}, "
        f"{config.steps} steps on {device}"
    )


def resumed_config(out: Path, **overrides: Any) -> TrainConfig:
    """The settings of the run in `out`, for continuing it."""
    settings = read_toml(out / "config.toml")
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


class _Run:
    """One run: the loop and what it writes."""

    def __init__(
        self,
        config: TrainConfig,
        model: FastUNet,
        sampler: Sampler,
        held_out: Sequence[Example],
        weights: Sequence[float],
        data: Labelled,
        device: torch.device,
    ) -> None:
        assert config.steps is not None
        self.config, self.model, self.sampler, self.device, self.steps = config, model, sampler, device, config.steps
        self.weights, self.data, self.data_digest = tuple(weights), data, _digest(data.examples)
        self.loss = BorderWeightedCrossEntropy(
            config.border_weight,
            config.border_sigma,
            class_weight=weights,
            region=config.border_region,
            gap=data.kind != "class",
        )
        self.validation = Validation(held_out, self.loss)
        self.validate_every = config.validate_every or max(1, round(self.steps / 20))
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        warm = round(config.warmup * self.steps)
        self.rate = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: _rate(step, warm, self.steps))
        self.step, self.best, self.best_step, self.seconds = 0, math.inf, 0, 0.0
        self.log: list[dict[str, Any]] = []
        # since the last row of the log
        self.losses: list[Tensor] = []
        # in the middle of an update the weights belong to no step
        self.updating = False

    # ---- what lies on disk

    def begin(self) -> None:
        out = self.config.out
        with replacing(out / "config.toml") as path:
            path.write_text(self.config.to_toml(), encoding="utf-8")
        with replacing(out / "run.json") as path:
            path.write_text(json.dumps(self._record(), indent=2) + "\n")
        self._write_log()
        writable_folder(out / "checkpoints")

    def _record(self) -> dict[str, Any]:
        return {
            "command": sys.argv,
            "labels_understood_as": self.data.kind,
            "classes": self.model.out_channels,
            "class_weights": self.weights,
            "training": [e.name for e in self.sampler.examples],
            "validation": [e.name for e in self.validation.examples],
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "net": self.model.settings,
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
            "data": self.data_digest,
            "log": self.log,
            "losses": [float(loss) for loss in self.losses],
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
        if about["data"] != self.data_digest:
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
        self._write_log()

    # ---- the loop

    def loop(self, progress: bool) -> None:
        start, before = time.monotonic(), self.seconds
        with Progress("train", self.steps, done=self.step, shown=progress) as bar:
            try:
                # an interrupted report is made up for
                self._report_if_due()
                while self.step < self.steps:
                    self._one_step()
                    self.seconds = before + time.monotonic() - start
                    self._report_if_due()
                    bar.advance(self._message())
            except KeyboardInterrupt:
                if not self.updating:
                    self.keep_state()
                raise

    def _report_if_due(self) -> None:
        last = self.step == self.steps
        check = last or self.step % self.validate_every == 0
        if self.losses and (check or self.step % self.config.log_every == 0):
            self._report(check)

    def _one_step(self) -> None:
        # instances and target may stay: the loss moves what it makes of them
        image, instances, target = self.sampler.batch(self.step)
        self.model.train()
        # dropout's draws belong to the step, not to what was drawn before it; the caller's generators stay as they were
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(ElasticWarp.generator(self.config.seed, -1, self.step).initial_seed())
            loss: Tensor = self.loss(self.model(image.to(self.device)), instances, target)
        self.optimizer.zero_grad()
        loss.backward()
        if self.config.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.updating = True
        self.optimizer.step()
        self.rate.step()
        self.step += 1
        self.losses.append(loss.detach())
        self.updating = False

    def _report(self, check: bool) -> None:
        loss = float(torch.stack(self.losses).mean())
        # the last update may have thrown away what the losses before it show as good
        if check and math.isfinite(loss) and not all(p.isfinite().all() for p in self.model.parameters()):
            loss = math.nan
        if not math.isfinite(loss):
            kept = f" ({self.config.out} keeps the last good state)" if checkpoints(self.config.out) else ""
            needed = f"a smaller lr than {self.config.lr:g} is needed"
            raise BadInput(f"the loss became {loss} at step {self.step}; {needed}{kept}")
        row: dict[str, Any] = dict.fromkeys(LOG_COLUMNS, "")
        lr = self.optimizer.param_groups[0]["lr"]
        epoch = (self.step - 1) // self.sampler.per_epoch
        row |= {"step": self.step, "epoch": epoch, "lr": f"{lr:.6g}", "loss": f"{loss:.6g}"}
        if check:
            scores = self.validation.scores(self.model)
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
    # epochs become steps when the data are known
    for key in sorted(set(now) - {*_FREE_ON_RESUME, "epochs"}):
        if now[key] != before.get(key):
            raise BadInput(
                f"{key} was {before.get(key)!r} when the run began and is {now[key]!r} now; it cannot change"
            )
    left_open = set(before) - {*now, *_FREE_ON_RESUME, *(("steps",) if config.epochs else ())}
    return config.with_(**{key: before[key] for key in left_open})
