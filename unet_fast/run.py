"""One training run: the loop, and what it leaves on disk.

RUN/config.toml       every setting, resolved
RUN/run.json          what the data were understood to be, the split, machine, versions, the files' sha256
RUN/log.csv           step, loss, learning rate, validation: the contract
RUN/model.safetensors the best model by validation (the last, where nothing is held out)
RUN/scores.csv        of each validation image, by that model
RUN/overlays.npz      some of these images with what was found in them, for pictures
RUN/checkpoints/      states for --resume: the last two, and the best model's
RUN/report.html       all of it on one page, drawn from these files
"""

import csv
import json
import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cached_property
from itertools import product
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor

import unet_kernels

from . import geometry
from .augment import ElasticWarp
from .checkpoints import State, checkpoints, keep, read, set_aside, step_of
from .config import TrainConfig
from .distribution import Ranks
from .errors import BadInput
from .feeding import Feed
from .files import replacing, writable_folder
from .measuring import Busy, Meter, give_back, is_out_of_memory
from .memory import largest_tile
from .planning import Choice, Setting, counted_bytes
from .progress import Progress
from .records import about_data, about_machine
from .report import write_report
from .stepping import Stepper, mean_of_finite
from .storage import MODEL, read_tensors, save
from .task import Task
from .tiling import covering_tile, cut_tile
from .units import readable
from .validation import SCORES, Judgement

__all__ = ["LOG_COLUMNS", "Run", "say", "tiles_for", "understood", "with_setting"]

LOG_COLUMNS = (
    "step",
    "epoch",
    "lr",
    "loss",
    "skipped",
    "val_loss",
    "val_iou",
    "val_pixel_error",
    "val_threshold",
    "val_cell_iou",
    "val_ap50",
    "best",
    "scale",
    "busy",
    "seconds",
)

# what a validation may take, of what is counted for a step
_OF_A_STEP = 0.6
# a step that found no memory is tried again with a tile of at most this share of its bytes
_SMALLER = 0.85
# the page is drawn anew at a validation, if it is so old
_PAGE_SECONDS = 60.0
# somebody ends a run: a net that has just skipped more steps in a row than this may be lost, and its state is not kept
_DOUBTFUL = 2
# several processes ask one another after so many steps whether one has been told to end
_STEPS_TO_STOP = 8


class Run:
    """One run of one process among `ranks`."""

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        ranks: Ranks | None = None,
        meter: Meter | None = None,
        choice: Choice | None = None,
    ) -> None:
        assert config.steps is not None
        self.config, self.task, self.meter, self.choice = config, task, meter, choice
        self.ranks = ranks = ranks or Ranks()
        self.share = ranks.share(config.batch)
        self.model = task.model(config)
        self.device, self.steps = task.device, config.steps
        self.loss, self.validation = task.loss, task.validation
        self.validate_every = config.validate_every or max(1, round(self.steps / 20))
        self.stepper = Stepper(
            self.model,
            ranks,
            precision=config.precision or "float32",
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            clip=config.clip,
        )
        self.warm = round(config.warmup * self.steps)
        self.step, self.best, self.best_step, self.seconds = 0, math.inf, 0, 0.0
        self.log: list[dict[str, Any]] = []
        # since the last row of the log, and what had been skipped then
        self.losses: list[Tensor] = []
        self.skipped = 0
        # in the middle of an update the weights belong to no step
        self.updating = False
        # the greatest peak above the budget, and whether coming down is still tried
        self.exceeded, self.watched = 0, True
        self.busy = Busy(self.device)
        self._kept = self._drawn = time.monotonic()
        self._board: Any = None
        self.record: dict[str, Any] = {}
        self._feed_from(config)

    def _feed_from(self, config: TrainConfig) -> None:
        self.sampler = self.task.feeding_sampler(config)
        self.feed = Feed(self.sampler, self.share, self.device, config.workers)

    @cached_property
    def folding(self) -> dict[str, float]:
        return self.task.sampler(self.config).folding()

    @property
    def lr(self) -> float:
        """Of the step to come."""
        return self.config.lr * _rate(self.step, self.warm, self.steps)

    # ---- what lies on disk

    def _sound(self, skipped: int = 0) -> bool:
        """Whether the weights are worth keeping: finite, and at most so many steps have just been skipped."""
        finite = all(bool(p.isfinite().all()) for p in self.model.parameters())
        return finite and int(self.stepper.in_a_row) <= skipped

    def begin(self) -> None:
        """The files of a run that has taken no step."""
        if not self.ranks.main:
            return
        out = self.config.out
        self._open_board()
        self._write_config()
        self._write_record(self._record())
        self._write_log()
        writable_folder(out / "checkpoints")

    def _write_config(self) -> None:
        with replacing(self.config.out / "config.toml") as path:
            path.write_text(self.config.to_toml(), encoding="utf-8")

    def _write_record(self, record: dict[str, Any]) -> None:
        self.record = record
        with replacing(self.config.out / "run.json") as path:
            path.write_text(json.dumps(record, indent=2) + "\n")

    def _record(self) -> dict[str, Any]:
        return {
            **about_machine(self.device),
            "processes": self.ranks.world,
            "labels_understood_as": self.task.data.kind,
            "classes": self.model.out_channels,
            "class_weights": self.task.weights,
            "training": [e.name for e in self.sampler.examples],
            "validation": [e.name for e in self.validation.examples],
            "data": about_data(path for pair in self.task.data.pairing.pairs for path in pair),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "net": self.model.settings,
            "seed": self.config.seed,
            "folding": self.folding,
            "memory": None if self.choice is None else asdict(self.choice),
            "kernels": unet_kernels.choices(self.device),
            "began": _now(),
        }

    def _write_log(self) -> None:
        if not self.ranks.main:
            return
        with replacing(self.config.out / "log.csv") as path:
            _write_csv(path, LOG_COLUMNS, self.log)

    def keep_state(self) -> None:
        """Write a checkpoint."""
        if not self.ranks.main:
            return
        about = {
            "step": self.step,
            "best": self.best if math.isfinite(self.best) else None,
            "best_step": self.best_step,
            "seconds": self.seconds,
            "config": self.config.as_dict(),
            "data": self.task.data_digest,
            "log": self.log,
            "losses": [v if math.isfinite(v) else None for v in map(float, self.losses)],
            "skipped": self.skipped,
            "stepper": self.stepper.state(),
            # every draw depends on these numbers alone: there is no other state of a generator
            "sampler": {"seed": self.config.seed, "next": self.step * self.config.batch},
            "kernels": unet_kernels.choices(self.device),
            "processes": self.ranks.world,
        }
        state = State(self.model.state_dict(), self.stepper.tensors(), about)
        keep(self.config.out, self.step, state, best_step=self.best_step)
        self._kept = time.monotonic()

    def restore(self, state: State, *, accept_changed_data: bool = False) -> None:
        """Go on from there.

        Raises:
            BadInput: it is of another net, or of other data and that is not accepted.
        """
        _refuse_another_net(state, self.model.state_dict())
        about = state.about
        changed = about["data"] != self.task.data_digest
        if changed and not accept_changed_data:
            raise BadInput(
                f"{self.config.images} and {self.config.labels} are not what the run in {self.config.out} began with; "
                f"their contents must stay, wherever they lie, unless --accept-changed-data says that they may differ"
            )
        # whatever a clock says today
        unet_kernels.adopt(about.get("kernels"), self.device)
        self.step, self.best_step, self.seconds = about["step"], about["best_step"], about["seconds"]
        self.best = math.inf if about["best"] is None else about["best"]
        losses = [math.nan if loss is None else loss for loss in about["losses"]]
        self.log, self.losses = about["log"], [torch.tensor(loss, device=self.device) for loss in losses]
        self.skipped = about["skipped"]
        if changed:
            # scores on other images cannot be compared
            self.best, self.best_step = math.inf, 0
        if self.ranks.main:
            self._mend_best()
        self.model.load_state_dict(state.weights)
        self.stepper.restore(state.optimizer, about["stepper"])
        if not self.ranks.main:
            return
        # what was left free may be another
        self._open_board()
        self._write_config()
        self._continue_record(changed)
        self._write_log()

    def _mend_best(self) -> None:
        """The best model as its state has it: one of steps that were lost with a later state may have replaced it."""
        states = [place for place in checkpoints(self.config.out) if step_of(place) == self.best_step]
        if not states:
            return
        try:
            weights = read(states[-1]).weights
        except BadInput as error:
            say(f"note: {error}")
            return
        try:
            there, _ = read_tensors(self.config.out / MODEL)
            if there.keys() == weights.keys() and all(torch.equal(there[k], weights[k]) for k in weights):
                return
        except BadInput:
            pass
        self.model.load_state_dict(weights)
        self._save_best(self.validation.judge(self.model, self._validation_tile))

    def _continue_record(self, changed: bool) -> None:
        now = self._record()
        try:
            record = json.loads((self.config.out / "run.json").read_text())
        except (OSError, ValueError):
            record = now
        if changed:
            record |= {name: now[name] for name in ("data", "training", "validation", "class_weights", "folding")}
        if self.choice is not None:
            record["memory"] = now["memory"]
        again = {"step": self.step, "when": _now(), "processes": self.ranks.world, "data_changed": changed}
        again |= {name: now[name] for name in ("command", "device", "git", "versions")}
        self._write_record({**record, "continued": [*record.get("continued", []), again]})

    # ---- the loop

    def loop(self, progress: bool) -> None:
        """Take all steps that are left.

        Raises:
            BadInput: too many steps in a row had no usable loss; a file cannot be written.
        """
        start, before = time.monotonic(), self.seconds
        if self.meter is not None:
            self.meter.restart()
        with Progress("train", self.steps, done=self.step, shown=progress and self.ranks.main) as bar:
            try:
                # an interrupted report is made up for
                self._report_if_due()
                while self.step < self.steps:
                    if self.step % _STEPS_TO_STOP == 0 and self.ranks.any_stopping():
                        raise KeyboardInterrupt
                    if not self._step_that_fits():
                        self._come_down("a step found no memory")
                        continue
                    self.seconds = before + time.monotonic() - start
                    if self.device.type == "cpu":
                        # a GPU is asked at reports only: asking waits for it
                        self._give_up_on_a_lost_net()
                    self._report_if_due()
                    self._keep_now_and_then()
                    bar.advance(self._message())
            except KeyboardInterrupt:
                self._keep_at_the_end()
                raise
            finally:
                self.feed.close()
                if self._board is not None:
                    self._board.close()
        if progress and self.choice is not None and (peak := self._peak()) is not None:
            say(f"memory: {readable(peak)} at most, of {readable(self.choice.budget_bytes)}")

    def _peak(self) -> int | None:
        return None if self.meter is None else self.meter.peak()

    def _report_if_due(self) -> None:
        last = self.step == self.steps
        check = last or self.step % self.validate_every == 0
        if self.losses and (check or self.step % self.config.log_every == 0):
            self._report(check)
            if not last:
                self._stay_inside()

    def _keep_at_the_end(self) -> None:
        """Of a run that somebody ends."""
        if self.updating or not self.ranks.main:
            return
        if not self._sound(_DOUBTFUL):
            say("note: the last steps had no usable gradient; the state before them is kept")
            return
        try:
            self.keep_state()
        except BadInput as error:
            say(f"note: {error}")

    def _keep_now_and_then(self) -> None:
        """Validations may lie further apart than what one would like to lose."""
        if not self.ranks.main or self.step == self.steps:
            return
        if time.monotonic() - self._kept >= 60 * self.config.keep_minutes and self._sound():
            self.keep_state()

    def _step_that_fits(self) -> bool:
        """Take a step; False where a run with a budget found no memory for it, and nothing has changed."""
        try:
            self.one_step()
        except (MemoryError, RuntimeError) as error:
            # other processes cannot know, and would wait for this one's gradients
            alone = self.ranks.world == 1
            if self.config.memory is None or self.updating or not alone or not is_out_of_memory(error):
                raise
            return False
        return True

    def _stay_inside(self) -> None:
        """A budget that was exceeded nevertheless is not exceeded again, if coming down can do that."""
        peak = self._peak() if self.watched and self.ranks.world == 1 else None
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
            say(f"note: {why}; less does not help")

    def _come_down(self, why: str) -> None:
        """Go on in less memory: recompute first, which changes no bit; then a smaller tile."""
        self.stepper.begin()
        config = self.config
        now = self._setting
        if now.recompute == "none":
            smaller = Setting(now.tile_in, now.precision, "level")
        else:
            limit = _SMALLER * counted_bytes(self.model, now, self._at_once, self.device)
            tiles = [n for n in tiles_for(self.task.learn, config) if n < now.tile_in]
            settings = [Setting(n, now.precision, "level") for n in reversed(tiles)]
            fits = (s for s in settings if counted_bytes(self.model, s, self._at_once, self.device) <= limit)
            found = next(fits, None)
            if found is None:
                raise MemoryError(f"{why}, and {now} is the smallest there is")
            smaller = found
        say(f"note: {why}; from step {self.step} on with {smaller}")
        self.config = with_setting(config, smaller)
        self.model.recompute = smaller.recompute
        self.feed.close()
        self._feed_from(self.config)
        self._write_config()
        self.keep_state()
        if self.meter is not None:
            self.meter.restart()

    @property
    def _setting(self) -> Setting:
        config = self.config
        return Setting(config.tile or 0, config.precision or "float32", config.recompute or "none")

    @property
    def _at_once(self) -> int:
        return 1 if self.config.accumulate == "image" else self.config.at_once or len(self.share)

    # ---- a step

    def one_step(self, tiles: int | None = None) -> None:
        """Draw, forward, backward, update; of whole images the first `tiles` only, if that is all one wants to see."""
        with self.busy if self.feed.by_device else nullcontext():
            drawn = self.feed.take(self.step, self.steps)
        with self.busy:
            loss = self.gradient(drawn, tiles)
            self.updating = True
            self.stepper.update(self.lr)
            self.step += 1
            self.losses.append(loss)
            self.updating = False

    def gradient(self, drawn: Sequence[tuple[Tensor, ...]], tiles: int | None = None) -> Tensor:
        """The loss of this step; its gradient stays in the parameters. `drawn`: what the feed gives for it."""
        pixels = self.sampler.pixels(self.step)
        self.stepper.begin()
        # dropout's draws belong to the tile, not to what was drawn before it; the caller's generators stay
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            if self.config.accumulate == "image":
                self._of_images(drawn, pixels, tiles)
            else:
                self._of_tiles(drawn, pixels)
        return self.stepper.gather(pixels)

    def _draw_dropout(self, number: int) -> None:
        """As it is for the tile of that number in the step, whatever went through the net before it."""
        if self.config.dropout:
            count = self.step * self.config.batch + self.share.start + number
            torch.manual_seed(ElasticWarp.generator(self.config.seed, -1, count).initial_seed())

    def _of_tiles(self, drawn: Sequence[tuple[Tensor, ...]], pixels: int) -> None:
        for first in range(0, len(drawn), self._at_once):
            image, instances, target = map(torch.stack, zip(*drawn[first : first + self._at_once], strict=True))
            last = first + self._at_once >= len(drawn)
            self._draw_dropout(first)
            logits = self.stepper.logits(image, last=last)
            # weights are made where the net is
            size = (logits.shape[2], logits.shape[3])
            target, weight = self.loss.pixels(instances, target, size, self.task.classes)
            self.stepper.add(logits, target, weight, pixels, last=last)

    def _of_images(self, drawn: Sequence[tuple[Tensor, ...]], pixels: int, tiles: int | None = None) -> None:
        """The same for whole images: the mean over all their pixels, added up tile by tile in the memory of one."""
        images = [self.pieces(image) for image in drawn]
        if tiles is not None:
            images = [images[0][:tiles]]
        for number, pieces in enumerate(images):
            self._draw_dropout(number)
            for piece, (window, target, weight) in enumerate(pieces):
                last = number == len(images) - 1 and piece == len(pieces) - 1
                logits = self.stepper.logits(window, last=last)[..., : target.shape[-2], : target.shape[-1]]
                self.stepper.add(logits, target, weight, pixels, last=last)

    def pieces(self, drawn: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(image, target, weight) of each tile of a whole image; each output pixel is in one of them."""
        depth, pieces = self.config.depth, []
        image, instances, target = drawn
        size = [geometry.output_size(n, depth) for n in image.shape[1:]]
        target, weight = self.loss.pixels(instances[None], target[None], (size[0], size[1]), self.task.classes)
        cuts = [cut_tile(n, self.sampler.tile, depth=depth, up_mode=self.config.up_mode) for n in image.shape[1:]]
        for (top, height, rows), (left, width, columns) in product(*cuts):
            read = image[None, :, top : top + height, left : left + width]
            here = (..., slice(top, top + rows), slice(left, left + columns))
            pieces.append((read, target[here], weight[here]))
        return pieces

    # ---- between steps

    def between_steps(self) -> None:
        """All that a report does."""
        writable_folder(self.config.out / "checkpoints")
        self._make_room()
        self._save_best(self.validation.judge(self.model, self._validation_tile))
        self.keep_state()

    def _make_room(self) -> None:
        """The gradients of the last step are done with, and so are the holes that its maps left in the heap."""
        self.stepper.optimizer.zero_grad()
        if self.config.memory is not None and self.device.type == "cpu":
            give_back()

    @property
    def _validation_tile(self) -> int | None:
        """Inside a budget: one that takes well below what a step takes."""
        config = self.config
        if config.memory is None or config.tile is None:
            return None
        try:
            counted = counted_bytes(self.model, self._setting, device=self.device)
            fits = largest_tile(_OF_A_STEP * counted, self.model, mode="predict")
        except ValueError:
            fits = 0
        return min(config.tile, fits)

    def _give_up_on_a_lost_net(self) -> None:
        longest = self.stepper.counts()["longest"]
        if longest >= self.config.most_skipped:
            raise self._diverged(f"{longest} steps in a row had a loss or a gradient that is no number")

    def _diverged(self, what: str) -> BadInput:
        if self.ranks.main:
            # from these weights nothing came any more; where there is another state, that one is gone on from
            lost = self.step - int(self.stepper.in_a_row)
            states = checkpoints(self.config.out)
            doubtful = [place for place in states if step_of(place) >= lost]
            if len(doubtful) < len(states):
                set_aside(doubtful, "doubtful")
        kept = f" ({self.config.out} keeps the last good state)" if checkpoints(self.config.out) else ""
        return BadInput(f"{what}, at step {self.step}; a run with a smaller lr than {self.config.lr:g} is needed{kept}")

    def _report(self, check: bool) -> None:
        self._give_up_on_a_lost_net()
        loss = mean_of_finite(self.losses)
        skipped = self.stepper.counts()["skipped"]
        row: dict[str, Any] = dict.fromkeys(LOG_COLUMNS, "")
        epoch = (self.step - 1) // self.sampler.per_epoch
        row |= {"step": self.step, "epoch": epoch, "lr": f"{self.lr:.6g}", "skipped": skipped - self.skipped}
        row |= {"loss": f"{loss:.6g}", "busy": f"{self.busy.share():.3f}"}
        if self.config.precision == "float16":
            row["scale"] = f"{float(self.stepper.scale):g}"
        sound = check and self._check(row, loss, trained=skipped < self.step) and self._sound()
        row["seconds"] = f"{self.seconds:.1f}"
        if skipped > self.skipped and self.ranks.main:
            more = f", {skipped} in all" if self.skipped else ""
            now = skipped - self.skipped
            steps = f"{now} step{'s' if now > 1 else ''} up to {self.step}"
            say(f"note: {steps} changed nothing: no usable gradient{more}")
        # an interrupted report may have left its row
        self.log = [*(old for old in self.log if old["step"] < self.step), row]
        self.losses, self.skipped = [], skipped
        self._write_log()
        self._show_on_board(row)
        if check:
            if self.step == self.steps and not self.best_step:
                raise self._diverged("no model was ever worth saving: what the net says is no number")
            if sound:
                self.keep_state()
            if time.monotonic() - self._drawn > _PAGE_SECONDS:
                self.draw_page()

    def _check(self, row: dict[str, Any], loss: float, *, trained: bool) -> bool:
        """Validate, and save what is the best so far; whether what the net says is a number.

        `trained`: there was a step that changed the weights.
        """
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            # the update of a gradient that was a number, times the rate, was none
            raise self._diverged("the weights became infinite or no number")
        self._make_room()
        judged = self.validation.judge(self.model, self._validation_tile, self.ranks)
        # IoU and average precision of a few images jump from one validation to the next; the loss does not
        val_loss = judged.scores.get("val_loss", loss if math.isfinite(loss) else math.nan)
        assert val_loss is not None
        last_is_best = not judged.images
        # the same step again, where its report was interrupted
        better = last_is_best or val_loss < self.best or self.step == self.best_step
        better = better and math.isfinite(val_loss) and trained
        if better:
            self._save_best(judged)
            self.best, self.best_step = math.inf if last_is_best else val_loss, self.step
        row |= {k: f"{v:.6g}" for k, v in judged.scores.items() if v is not None}
        row["best"] = int(better)
        if self.ranks.main and (chosen := unet_kernels.choices(self.device)) != self.record.get("kernels"):
            self._write_record({**self.record, "kernels": chosen})
        return math.isfinite(val_loss)

    def _save_best(self, judged: Judgement) -> None:
        if not self.ranks.main:
            return
        out = self.config.out
        save(self.model, out / MODEL)
        if not judged.images:
            return
        with replacing(out / "scores.csv") as path:
            rows = [{k: "" if v is None else v for k, v in each.scores().items()} for each in judged.images]
            _write_csv(path, SCORES, rows)
        with replacing(out / "overlays.npz") as path, path.open("wb") as file:
            np.savez_compressed(file, step=self.step, **self.validation.overlays(judged))

    def draw_page(self) -> None:
        """One that cannot be written ends no run."""
        if not self.ranks.main:
            return
        try:
            write_report(self.config.out)
        except Exception as error:
            say(f"note: the page was not drawn: {' '.join(str(error).split())[:300]}")
        self._drawn = time.monotonic()

    def _open_board(self) -> None:
        if self.config.tensorboard:
            # what a run that was killed had shown of later steps is shown again
            self._board = _board(self.config.out / "tensorboard", self.step + 1)

    def _show_on_board(self, row: dict[str, Any]) -> None:
        if self._board is None:
            return
        for name, value in row.items():
            if name != "step" and value != "":
                self._board.add_scalar(name.replace("val_", "validation/"), float(value), self.step)
        self._board.flush()

    def _message(self) -> str:
        if not self.log:
            return ""
        last = next((row for row in reversed(self.log) if row["val_iou"] != ""), None)
        shown = f"loss {float(self.log[-1]['loss']):.3f}"
        shown += f"  {self.skipped} skipped" if self.skipped else ""
        return shown if last is None else f"{shown}  validation IoU {float(last['val_iou']):.3f}"


def say(text: str) -> None:
    """On stderr."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def tiles_for(examples: Sequence[Any], config: TrainConfig) -> list[int]:
    """All tiles that may be chosen: from one that keeps a step of pixels to the one that covers the largest image."""
    step = (geometry.step_multiple(config.depth),) * 2
    shapes = [step, *(e.instances.shape for e in examples)]
    smallest, *covering = (max(covering_tile(s, depth=config.depth, up_mode=config.up_mode)) for s in shapes)
    largest = max(covering)
    return geometry.legal_sizes(min(smallest, largest), largest, config.depth)


def with_setting(config: TrainConfig, setting: Setting) -> TrainConfig:
    """The config that trains so."""
    return config.with_(tile=setting.tile_in, precision=setting.precision, recompute=setting.recompute)


def _rate(step: int, warm: int, steps: int) -> float:
    """Factor of the learning rate: a linear rise, then half a cosine to 0."""
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, steps - warm))))


def _refuse_another_net(state: State, here: dict[str, Tensor]) -> None:
    """Raise BadInput unless a state is of this net; lists what differs."""
    there = state.weights
    differ = [f"{name} is missing" for name in here if name not in there]
    differ += [f"{name} is one too many" for name in there if name not in here]
    differ += [
        f"{name} is {list(there[name].shape)} and must be {list(here[name].shape)}"
        for name in here
        if name in there and there[name].shape != here[name].shape
    ]
    if differ:
        more = f", and {len(differ) - 4} more differ" if len(differ) > 4 else ""
        raise BadInput(f"{state.place} is of another net: {'; '.join(differ[:4])}{more}")


def understood(state: State) -> State:
    """The state, if it says all that a run needs.

    Raises:
        BadInput: it does not; says what is missing.
    """
    about: Any = state.about
    kinds: dict[str, Any] = {
        "step": int, "best_step": int, "seconds": (int, float), "best": (int, float, NoneType), "losses": list,
        "log": list, "skipped": int, "data": str, "config": dict, "stepper": dict,
    }  # fmt: skip
    about = about if isinstance(about, dict) else {}
    wrong = [name for name, kind in kinds.items() if name not in about or not isinstance(about[name], kind)]
    if not wrong and about["stepper"].keys() < {"scale", "steady", "skipped", "in_a_row"}:
        wrong = ["stepper"]
    if wrong:
        raise BadInput(f"{state.place} is of no run of this version: it has no usable {', '.join(wrong)}")
    return state


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    # a file's name need not be text
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def _board(place: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise BadInput(
            "tensorboard must be false without the package of that name; pip install 'unet-fast[tb]'"
        ) from error
    return SummaryWriter(str(place), purge_step=step)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
