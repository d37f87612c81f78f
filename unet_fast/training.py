"""The paper's training recipe from settings to a run: what is decided before the first step, and where it goes on.

What a run leaves in its directory is told in `unet_fast.run`.
"""

import csv
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import torch

# an optimizer imports it when it is made: here, so that it is no memory of a run
import torch._dynamo

import unet_kernels

from .checkpoints import State, checkpoints, newest, read, set_aside, sweep
from .config import TrainConfig, read_toml
from .data import Example
from .distribution import Ranks
from .errors import BadInput
from .files import writable_folder
from .journal import FOLDER, locked
from .measuring import Apart, Measured, Meter, capped
from .model import FastUNet
from .planning import OFFERED, PRECISIONS, RECOMPUTE, Choice, choose
from .run import LOG_COLUMNS, Run, say, tiles_for, understood, with_setting
from .storage import MODEL, load, pick_device
from .task import Task, prepare
from .tiling import plan_tiles
from .units import bytes_of, readable

__all__ = ["LOG_COLUMNS", "TrainResult", "read_log", "resumed_config", "train"]

# a run may be continued with other values of these; all else must stay
_FREE_ON_RESUME = (
    "out", "device", "memory", "recompute", "log_every", "images", "labels", "keep_minutes", "workers", "images_on",
    "tensorboard", "most_skipped",
)  # fmt: skip

# the heap of a CPU's process grows by up to a tenth over its first steps; a GPU's allocator is held to the budget
_HEADROOM = {"cpu": 0.9}
# what the same work takes more or less of a CPU, from time to time
_NOISE_BYTES = 500_000

# tiles of a whole image that a trial looks at
_TRIED = 4

# folders of trials in a run's
_TRIAL = ".trial-"

# steps of a trial, where they are short: the fastest is what a step takes on a machine that does nothing else
_CALLS = 3


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The best model, where its run lies, and the rows of its log."""

    model: FastUNet
    run: Path
    best_step: int
    log: list[dict[str, float | None]]


def train(
    config: TrainConfig, *, resume: bool = False, progress: bool = True, accept_changed_data: bool = False
) -> TrainResult:
    """Train a FastUNet as the paper did, and leave everything about it in `config.out`.

    Started by torchrun, each process takes its share of a step's tiles, on a GPU of its own where there are such.

    Args:
        config: settings; see `TrainConfig`.
        resume: continue the run that lies in `config.out`, from its last checkpoint. On a CPU, and on a GPU with
            `deterministic`, the weights are those of a run that was never interrupted, bit for bit.
        progress: show progress on stderr.
        accept_changed_data: go on with `resume` although images or labels are not what they were.

    Returns:
        the best model by validation, its step, the log.

    Raises:
        BadInput: data or settings that cannot be trained on; a run in the way; the loss is no number any more.
        KeyboardInterrupt: from the keyboard, or by SIGTERM; the state has been kept.
    """
    ranks = Ranks.of_environment()
    device = pick_device(ranks.device(config.device))
    ranks.share(config.batch)
    tell = say if progress and ranks.main else _to_nobody
    meter = None if config.memory is None else Meter(device)
    with ExitStack() as stack:
        stack.enter_context(_told_to_end(ranks))
        stack.enter_context(_deterministic(config.deterministic))
        if ranks.world > 1 and ranks.main and device.type == "cuda" and not resume and config.memory is None:
            _time_kernels(config, device, ranks)
        stack.enter_context(ranks.joined(device))
        if resume and ranks.main and checkpoints(config.out):
            # before it is read: nobody else goes on from it
            stack.enter_context(locked(config.out / FOLDER / "lock"))
        state = _state(config.out, ranks) if resume else None
        if state is not None:
            config = _continued(config, state.about["config"])
        else:
            _refuse_other_run(config.out)
        config = config.with_(images=config.images.absolute(), labels=config.labels.absolute())
        choice = None
        stack.enter_context(capped(device, None if config.memory is None else bytes_of(config.memory)))
        if config.memory is not None:
            given = config
            config, choice = ranks.from_main(lambda: _inside_budget(given, device, tell))
        task = prepare(config, device)
        tile = config.tile or _tile_for(task.learn, config)
        config = config.with_(classes=task.classes, tile=tile, precision=config.precision or _precision(device))
        sampler = task.sampler(config)
        steps = config.steps or (config.epochs * sampler.per_epoch if config.epochs else 10_000)
        config = config.with_(steps=steps, epochs=None)
        if state is not None:
            config = _continued(config, state.about["config"])
        if ranks.main:
            writable_folder(config.out)
            if state is None:
                stack.enter_context(locked(config.out / FOLDER / "lock"))
                # another may have begun and ended meanwhile
                _refuse_other_run(config.out)
            _sweep(config.out)
        return _carried_out(config, task, ranks, meter, choice, state, tell, accept_changed_data)


def _carried_out(
    config: TrainConfig,
    task: Task,
    ranks: Ranks,
    meter: Meter | None,
    choice: Choice | None,
    state: State | None,
    tell: Callable[[str], None],
    accept_changed_data: bool,
) -> TrainResult:
    run = Run(config, task, ranks, meter, choice)
    if ranks.main:
        tell(_summary(config, task, run))
    if state is not None:
        run.restore(state, accept_changed_data=accept_changed_data)
        if ranks.main and state.place is not None:
            # those above it are damaged, and would stand in the way of what comes
            found = checkpoints(config.out)
            set_aside(found[found.index(state.place) + 1 :], "damaged")
    else:
        run.begin()
        if ranks.world > 1:
            # several processes time nothing by themselves: what was timed on the first one's device holds for all
            unet_kernels.adopt(ranks.from_main(lambda: unet_kernels.choices(task.device)), task.device)
    try:
        run.loop(tell is say)
    finally:
        run.draw_page()
    # what the main process has written is there for all
    ranks.wait()
    return TrainResult(load(config.out), config.out, run.best_step, read_log(config.out / "log.csv"))


def _state(out: Path, ranks: Ranks) -> State:
    """The newest state that is whole, the same in all processes."""
    place = ranks.from_main(lambda: newest(out).place)
    assert place is not None
    return understood(read(place))


def _time_kernels(config: TrainConfig, device: torch.device, ranks: Ranks) -> None:
    """One step by itself: what computes fastest is found out now or not at all, for among others nothing is timed."""
    task = prepare(config, device)
    tile = config.tile or _tile_for(task.learn, config)
    precision = config.precision or _precision(device)
    batch = config.batch // ranks.world
    Run(config.with_(tile=tile, precision=precision, batch=batch, steps=1, epochs=None), task).one_step()


def _sweep(out: Path) -> None:
    """Remove what a run that was killed had begun to write."""
    sweep(out)
    for name in (
        MODEL,
        "config.toml",
        "run.json",
        "log.csv",
        "scores.csv",
        "overlays.npz",
        "curves.png",
        "report.html",
    ):
        stem, _, suffix = name.partition(".")
        for left in out.glob(f".{stem}-*.{suffix}"):
            left.unlink(missing_ok=True)
    for left in out.glob(f"{_TRIAL}*"):
        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _told_to_end(ranks: Ranks) -> Iterator[None]:
    """Who ends a job by SIGTERM, as schedulers do, gets what Ctrl-C gets: the state is kept.

    Several processes must end after the same step: a signal is a wish, of which they tell one another; a second one is
    obeyed at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def wish(_number: int, _frame: FrameType | None) -> None:
        if ranks.stopping:
            raise KeyboardInterrupt
        ranks.stopping = True

    handler = signal.default_int_handler if ranks.world == 1 else wish
    numbers = (signal.SIGTERM,) if ranks.world == 1 else (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, handler) for number in numbers]
    try:
        yield
    finally:
        for number, earlier in zip(numbers, before, strict=True):
            signal.signal(number, earlier)


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """torch's own switches; what it has in one way only warns. Ours add nothing up in a random order."""
    if not wanted:
        yield
        return
    # read when cuBLAS begins
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    # it would fill all that is about to be written
    memory: Any = torch.utils.deterministic
    filled, memory.fill_uninitialized_memory = memory.fill_uninitialized_memory, False
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark
        memory.fill_uninitialized_memory = filled


def _inside_budget(
    config: TrainConfig, device: torch.device, tell: Callable[[str], None]
) -> tuple[TrainConfig, Choice]:
    """The config with tile, precision and recomputation chosen, each tried by real steps, and with it what comes
    between steps."""
    assert config.memory is not None
    budget = bytes_of(config.memory)
    writable_folder(config.out)
    task = prepare(config, device)
    config, net = config.with_(classes=task.classes), task.model(config)
    if config.tile is not None:
        # refused here, and not by a trial
        task.sampler(config)
    tiles = [config.tile] if config.tile else tiles_for(task.learn, config)
    # on a CPU the trials are other processes, with the data once more
    del task
    apart, steps = Apart(device, __name__), {"steps": config.steps or 1, "epochs": None}
    choice = choose(
        net,
        budget,
        tiles,
        lambda setting: apart(_measure_steps, with_setting(config, setting).with_(**steps), device),
        headroom=_HEADROOM.get(device.type, 1.0),
        batch=1 if config.accumulate == "image" else config.at_once or config.batch,
        device=device,
        precisions=[config.precision] if config.precision else _precisions(device),
        recompute=[config.recompute] if config.recompute else RECOMPUTE,
        say=tell,
    )
    tell(choice.table())
    config = with_setting(config, choice.setting)
    with TemporaryDirectory(prefix=_TRIAL, dir=config.out) as place:
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
    pieces = [target.numel() for image in run.feed.take(run.step, run.steps) for _, target, _ in run.pieces(image)]
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


def _trial(config: TrainConfig, device: torch.device) -> tuple[Run, Meter]:
    meter = Meter(device)
    return Run(config, prepare(config, device), meter=meter), meter


def _precision(device: torch.device) -> str:
    """What is usual: a GPU that multiplies bfloat16 does it in half the memory, and as surely as float32."""
    return "bfloat16" if device.type == "cuda" and "bfloat16" in _precisions(device) else "float32"


def _precisions(device: torch.device) -> list[str]:
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return ["float32"]
    # what a device computes in float32 anyway is neither faster nor smaller
    return [name for name in OFFERED if unet_kernels.multiplies_in(device, PRECISIONS[name]) == PRECISIONS[name]]


def _to_nobody(_: str) -> None:
    pass


def _summary(config: TrainConfig, task: Task, run: Run) -> str:
    held_out = task.validation.examples
    block = f"{held_out[0].name} to {held_out[-1].name}" if held_out else "none"
    each = "whole images in tiles of" if config.accumulate == "image" else "tile"
    among = f", {run.ranks.world} processes" if run.ranks.world > 1 else ""
    return (
        f"labels understood as {task.data.kind}: {task.classes} classes; {task.data.channels} channel(s)\n"
        f"training on {len(task.learn)} images, validation on {len(held_out)} ({block})\n"
        f"{sum(p.numel() for p in run.model.parameters()):,} parameters, {each} {config.tile}, "
        f"{config.steps} steps in {config.precision} on {task.device}{among}"
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
        settings.pop("steps", None)  # the same run, its length said as it was at first
    return TrainConfig.from_dict({**settings, "out": str(out)}, **overrides)


def read_log(path: Path) -> list[dict[str, float | None]]:
    """Rows of a log.csv; an empty cell is None."""
    with path.open(newline="") as file:
        return [{k: float(v) if v else None for k, v in row.items()} for row in csv.DictReader(file)]


def _tile_for(examples: Sequence[Example], config: TrainConfig) -> int:
    """The tile that covers the largest image, or the usual one where that would be larger."""
    sides = [max(plan_tiles(e.instances.shape, depth=config.depth, up_mode=config.up_mode).tile_in) for e in examples]
    return max(sides)


def _refuse_other_run(out: Path) -> None:
    if checkpoints(out) or (out / MODEL).exists():
        raise BadInput(f"{out} holds a run already; --resume continues it, or choose another --out")


def _continued(config: TrainConfig, before: dict[str, Any]) -> TrainConfig:
    """The settings of a run that goes on: what is left open now is as it was, what differs is refused by name."""
    now = config.as_dict()
    free = set(_FREE_ON_RESUME)
    if "memory" in before:
        # a run in a budget may have come down from the tile it was given
        config, free = config.with_(tile=before["tile"]), {*free, "tile"}
    # epochs become steps when the data are known
    for key in sorted(set(now) - {*free, "epochs"}):
        if now[key] != before.get(key):
            raise BadInput(
                f"{key} was {before.get(key)!r} when the run began and is {now[key]!r} now; it cannot change"
            )
    left_open = set(before) - {*now, *free, *(("steps",) if config.epochs else ())}
    return config.with_(**{key: before[key] for key in left_open})
