"""The command line. Each verb imports what it needs when it is called, so that `--help` answers at once."""

import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from .errors import BadInput

__all__ = ["app", "main"]

BAD_INPUT, OUT_OF_MEMORY, PARTIAL, INTERRUPTED = 3, 4, 5, 130

app = typer.Typer(
    name="unet-fast",
    help="U-Net for microscopy: train on your images, segment new ones, measure how well.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


class LabelKind(StrEnum):
    AUTO = "auto"
    BINARY = "binary"
    CLASS = "class"
    INSTANCE = "instance"


class Output(StrEnum):
    LABELS = "labels"
    INSTANCES = "instances"
    PROBABILITIES = "probabilities"


class Scaling(StrEnum):
    PERCENTILE = "percentile"
    RANGE = "range"
    NONE = "none"


class BorderRegion(StrEnum):
    BACKGROUND = "background"
    ALL = "all"


class Preset(StrEnum):
    PAPER = "paper"
    SMALL = "small"


class Mode(StrEnum):
    BOTH = "both"
    TRAIN = "train"
    PREDICT = "predict"


class Recompute(StrEnum):
    NONE = "none"
    LEVEL = "level"


class Padding(StrEnum):
    VALID = "valid"
    SAME = "same"


class Place(StrEnum):
    AUTO = "auto"
    DEVICE = "device"
    HOST = "host"


class Offered(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Arithmetic(StrEnum):
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class Accumulate(StrEnum):
    TILE = "tile"
    IMAGE = "image"


class Averaged(StrEnum):
    NONE = "none"
    D4 = "d4"
    ROT7 = "rot7"


class Nan(StrEnum):
    REFUSE = "refuse"
    FILL = "fill"


class Format(StrEnum):
    TIF = "tif"
    PNG = "png"
    NPY = "npy"
    ZARR = "zarr"


class UpMode(StrEnum):
    DECONV = "deconv"
    RESIZE = "resize"


_IMAGES = "Image file or folder (TIFF, OME-TIFF, PNG; stacks too)."
_LABELS = "Label file or folder: names equal the images', or x_mask for x; or a folder with images/ and masks/ in it."
_JSON = "Print data on stdout and nothing else."
_AXES = "Axes of the image files, where they do not say: YX, CYX, YXC, ZYX, ZCYX."
_KIND = "What label values are: a mask (binary), classes, or one value per cell (instance)."
_IGNORE = "Label value that does not count."

Images = Annotated[Path, typer.Option("--images", "-i", help=_IMAGES)]
Labels = Annotated[Path, typer.Option("--labels", help=_LABELS)]
Axes = Annotated[str | None, typer.Option(help=_AXES)]
Kind = Annotated[LabelKind, typer.Option("--label-kind", help=_KIND)]
Ignore = Annotated[int | None, typer.Option(help=_IGNORE)]
AsJson = Annotated[bool, typer.Option("--json", help=_JSON)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]


@contextmanager
def _sentences() -> Iterator[None]:
    """Errors that are the user's to mend are one sentence and an exit code; UNET_FAST_DEBUG=1 shows where.

    Warnings are notes, without the line of the program that gave them.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _note  # type: ignore[assignment]
            yield
    except (BadInput, OSError) as error:
        _stop(str(error), BAD_INPUT)
    except (MemoryError, RuntimeError) as error:
        from .measuring import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        details = str(error).splitlines() or ["nothing more is known"]
        _stop(
            f"out of memory; smaller images or tiles (--tile) need less, a larger --memory allows more ({details[0]})",
            OUT_OF_MEMORY,
        )
    except KeyboardInterrupt:
        _stop("interrupted", INTERRUPTED)


def _note(message: Warning | str, *_: Any) -> None:
    typer.echo(f"note: {' '.join(str(message).split())}", err=True)


def _stop(sentence: str, code: int) -> None:
    if os.environ.get("UNET_FAST_DEBUG"):
        raise
    # of several processes each says which it is; a file's name may hold a line break
    who = "" if os.environ.get("RANK", "0") == "0" else f" (process {os.environ['RANK']})"
    typer.echo(f"error{who}: {' '.join(sentence.split())}", err=True)
    raise typer.Exit(code) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"unet-fast {__version__}")
        raise typer.Exit


@app.callback()
def _frame(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for everything it makes.")] = Path("unet_fast_demo"),
    seed: Annotated[int, typer.Option(min=0, max=10**6, help="Another seed, other cells.")] = 0,
    quick: Annotated[bool, typer.Option(help="A few steps only, to see that all of it runs.")] = False,
) -> None:
    """Show the whole job on synthetic touching cells: train, predict, evaluate, pictures. Needs nothing else."""
    with _sentences():
        from .demo import run

        run(out, seed=seed, quick=quick)


# of `train`: what is said of this call, and not of the run
_NO_SETTINGS = ("config", "resume", "accept_changed_data", "quiet", "features", "preset")


@app.command()
def train(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the run.")] = None,
    images: Annotated[Path | None, typer.Option("--images", "-i", help=_IMAGES)] = None,
    labels: Annotated[Path | None, typer.Option("--labels", help=_LABELS)] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with any of these settings; flags win.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out from its last checkpoint.")
    ] = False,
    accept_changed_data: Annotated[
        bool, typer.Option("--accept-changed-data", help="Go on with --resume though images or labels have changed.")
    ] = False,
    label_kind: Annotated[LabelKind | None, typer.Option(help=_KIND + " Default: auto.")] = None,
    ignore: Ignore = None,
    axes: Axes = None,
    normalisation: Annotated[
        Scaling | None,
        typer.Option(
            "--normalisation", "--normalise", help="Grey values: percentile of each image (default), range, none."
        ),
    ] = None,
    low: Annotated[float | None, typer.Option(help="Percentile (1) or grey value that becomes 0.")] = None,
    high: Annotated[float | None, typer.Option(help="Percentile (99.8) or grey value that becomes 1.")] = None,
    preset: Annotated[
        Preset | None,
        typer.Option(help="paper: the paper's numbers, for a GPU. small: a narrow net and fewer steps, for a CPU."),
    ] = None,
    features: Annotated[
        str | None, typer.Option(help="Channels per level, such as 16,32,64,128. Default: the paper's 64,...,1024.")
    ] = None,
    classes: Annotated[int | None, typer.Option("--classes", "-c", help="Classes, background included.")] = None,
    up_mode: Annotated[UpMode | None, typer.Option(help="Up-convolution: deconv (default) or resize.")] = None,
    dropout: Annotated[float | None, typer.Option(help="Dropout at the bottom of the net, default 0.5.")] = None,
    skips: Annotated[bool | None, typer.Option(help="Connections across the net (default), or none.")] = None,
    padding: Annotated[
        Padding | None, typer.Option(help="valid (default), or same: zeros around each map, whose size then stays.")
    ] = None,
    recompute: Annotated[
        Recompute | None, typer.Option(help="level: make maps again instead of keeping them; less memory, more time.")
    ] = None,
    tile: Annotated[
        int | None, typer.Option(help="Side of a training tile; default: fits the images, 572 at most.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Budget such as 6GB: tile, precision and recomputation that train fastest inside it."),
    ] = None,
    precision: Annotated[
        Arithmetic | None,
        typer.Option(
            help="Of the maps. Default: bfloat16 on a GPU that has it, else float32; with --memory what is faster."
        ),
    ] = None,
    deterministic: Annotated[
        bool | None, typer.Option(help="The same bits every time on a GPU too; some kernels are slower.")
    ] = None,
    accumulate: Annotated[
        Accumulate | None,
        typer.Option(help="image: a step sees whole images, tile by tile; the gradient does not depend on the tile."),
    ] = None,
    batch: Annotated[int | None, typer.Option("--batch", "-b", help="Tiles a step, default 1.")] = None,
    at_once: Annotated[
        int | None, typer.Option(help="Of those, how many go through the net together, default all of a process.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps, default 10000.")] = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", "-e", help="Instead of steps: passes over the images.")
    ] = None,
    lr: Annotated[float | None, typer.Option("--lr", "-l", help="Learning rate, default 0.002.")] = None,
    momentum: Annotated[float | None, typer.Option(help="Momentum, default 0.99; with 0.9 try --lr 0.02.")] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of steps in which the rate rises, default 0.05.")] = None,
    clip: Annotated[float | None, typer.Option(help="Longest gradient, default 1; 0: any.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay, default 0.")] = None,
    most_skipped: Annotated[
        int | None, typer.Option(help="Steps in a row without a usable loss after which the run ends, default 25.")
    ] = None,
    border_weight: Annotated[
        float | None, typer.Option(help="Weight of the border between touching cells, default 10; 0: none.")
    ] = None,
    border_sigma: Annotated[float | None, typer.Option(help="Its width in pixels, default 5.")] = None,
    border_region: Annotated[
        BorderRegion | None, typer.Option(help="Where it applies: background (default), or cells' rims too (all).")
    ] = None,
    balance: Annotated[bool | None, typer.Option(help="Weigh classes by their rarity (default).")] = None,
    elastic: Annotated[float | None, typer.Option(help="Elastic deformation, sd in pixels, default 10.")] = None,
    grid: Annotated[int | None, typer.Option(help="Points of the elastic grid per side of a tile, default 3.")] = None,
    rotate: Annotated[bool | None, typer.Option(help="Rotate at random.")] = None,
    mirror: Annotated[bool | None, typer.Option(help="Mirror at random.")] = None,
    grey: Annotated[float | None, typer.Option(help="Strength of grey-value changes, 0 to 1, default 0.5.")] = None,
    zoom: Annotated[float | None, typer.Option(help="Enlarge or reduce by up to this factor, default 1: not.")] = None,
    foreground: Annotated[
        float | None, typer.Option(help="Share of tiles around a pixel of a cell, default 0: they lie anywhere.")
    ] = None,
    noise: Annotated[float | None, typer.Option(help="Greatest sd of noise added, in the image's range.")] = None,
    validation: Annotated[float | None, typer.Option(help="Share of images kept for validation, default 0.1.")] = None,
    validate_every: Annotated[int | None, typer.Option(help="Steps between validations.")] = None,
    log_every: Annotated[int | None, typer.Option(help="Steps between lines of log.csv, default 20.")] = None,
    keep_minutes: Annotated[
        float | None, typer.Option(help="Minutes between two states kept for --resume, default 5.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Threads that draw tiles ahead; default 2 where a GPU waits for them, else 0.")
    ] = None,
    images_on: Annotated[
        Place | None, typer.Option(help="Where the images lie: device, host, or auto: on a GPU with room for them.")
    ] = None,
    tensorboard: Annotated[
        bool | None, typer.Option(help="Curves for TensorBoard in RUN/tensorboard (pip install 'unet-fast[tb]').")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same run.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = None,
    quiet: Quiet = False,
) -> None:
    """Train a U-Net on images and labels, as the paper did; everything about the run lies in --out."""
    given = {k: v for k, v in locals().items() if k not in _NO_SETTINGS}
    given = {k: v.value if isinstance(v, StrEnum) else v for k, v in given.items() if v is not None}
    if features is not None:
        given["features"] = _numbers("--features", features)
    if resume and preset is not None:
        raise typer.BadParameter("a run goes on with the settings it began with", param_hint="--preset")
    with _sentences():
        from .config import PRESETS, TrainConfig, read_toml
        from .distribution import Ranks
        from .training import resumed_config, train

        if config is not None:
            settings_of_file = read_toml(config)
            for one, other in (("steps", "epochs"), ("epochs", "steps")):
                if one in given:
                    settings_of_file.pop(other, None)
            given = {**settings_of_file, **given}
        if resume and "out" not in given:
            raise typer.BadParameter("say which run to continue", param_hint="--out")
        if not resume:
            chosen = dict(PRESETS[(preset or Preset.PAPER).value])
            if "epochs" in given:
                chosen.pop("steps", None)
            given = {**chosen, **given}
        for needed in () if resume else ("images", "labels", "out"):
            if needed not in given:
                raise typer.BadParameter("must be given, here or in --config", param_hint=f"--{needed}")
        settings = resumed_config(**{**given, "out": Path(given["out"])}) if resume else TrainConfig.from_dict(given)
        result = train(settings, resume=resume, progress=not quiet, accept_changed_data=accept_changed_data)
        if Ranks.of_environment().main:
            # of several processes one speaks
            typer.echo(f"best model (step {result.best_step}): {result.run / 'model.safetensors'}", err=True)


def _numbers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(" ", "").split(",")]
    except ValueError:
        said = f"must be whole numbers with commas between, such as 16,32,64, got {text!r}"
        raise typer.BadParameter(said, param_hint=name) from None


@app.command()
def predict(
    model: Annotated[Path, typer.Option("--model", "-m", help="Training run, or a model.safetensors.")],
    images: Annotated[
        list[Path],
        typer.Option(
            "--images", "-i", help="Image file (TIFF, PNG, NumPy), Zarr or folder of such; may be given several times."
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder; or for a single image a .tif, .png, .npy or .zarr.")
    ],
    output: Annotated[Output, typer.Option(help="Classes, numbered cells, or the probability of each class.")] = (
        Output.LABELS
    ),
    tile: Annotated[int | None, typer.Option(help="Side of a tile; default: fits the image, 572 at most.")] = None,
    memory: Annotated[str | None, typer.Option(help="Instead of --tile: a budget such as 6GB, which is kept.")] = None,
    batch: Annotated[
        int | None,
        typer.Option("--batch", "-b", min=1, help="Tiles at a time; default: 1, or what --memory has room for."),
    ] = None,
    tta: Annotated[
        Averaged,
        typer.Option(
            help="Average over 8 mirrored and turned versions (d4), or 7 rotated by multiples of 360/7 (rot7)."
        ),
    ] = Averaged.NONE,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what an interrupted run has finished.")] = False,
    verify_seams: Annotated[
        bool, typer.Option("--verify-seams", help="Compare with tiles that lie across the seams, at a few places.")
    ] = False,
    nan: Annotated[
        Nan, typer.Option(help="NaN and infinite pixels: refuse the image, or fill them with its dark end.")
    ] = Nan.REFUSE,
    axes: Axes = None,
    threshold: Annotated[
        float | None, typer.Option(help="Probability above which a pixel is a cell; default: the likelier class.")
    ] = None,
    min_pixels: Annotated[int, typer.Option(help="Drop smaller cells (instances only).", min=1)] = 1,
    format: Annotated[  # noqa: A002 (the option's name)
        Format, typer.Option(help="Of results in a folder; float16 where npy or zarr hold probabilities.")
    ] = Format.TIF,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Segment images of any size, disk to disk; results have the images' size and names.

    An interrupted run goes on with --resume. A bad image among several is reported and the rest is done (exit code 5).
    """
    with _sentences():
        from .prediction import predict_files
        from .storage import load, pick_device

        net = load(model).to(pick_device(device))
        summary = predict_files(
            net,
            images,
            out,
            output=output.value,
            axes=axes,
            tile_in=tile,
            memory=memory,
            batch=batch,
            tta=tta.value,
            nan=nan.value,
            threshold=threshold,
            min_pixels=min_pixels,
            suffix=f".{format.value}",
            resume=resume,
            seams=verify_seams,
            progress=not quiet,
        )
        for file in summary.files:
            if file.seams is not None:
                typer.echo(f"seams: {file.image.name}: {file.seams}", err=True)
        if as_json:
            typer.echo(json.dumps(summary.as_dict(), indent=2))
        written = summary.written
        if written:
            what = written[0] if len(summary.files) == 1 else f"{len(written)} files in {written[0].parent}"
            rate = f" ({summary.mpixel_per_s:.3g} Mpixel/s)" if summary.mpixel_per_s else ""
            typer.echo(f"{output.value}: {what}{rate}", err=True)
        if summary.failed:
            rest = f"{len(summary.failed)} of {len(summary.files)} images could not be segmented"
            _stop(f"{rest}; mend them and go on with --resume", PARTIAL if written else BAD_INPUT)
        if not summary.seamless:
            _stop("tiles do not join without seams; the results are written", PARTIAL)


@app.command()
def evaluate(
    pred: Annotated[Path, typer.Option("--pred", "-p", help="Predicted labels, cells or probabilities.")],
    truth: Annotated[Path, typer.Option("--truth", help="True labels.")],
    label_kind: Kind = LabelKind.AUTO,
    ignore: Ignore = None,
    axes: Axes = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Of iou, dice, pixel_error, warping_error, rand_error, v_rand, v_info, seg, adapted_rand_error, "
            "cells, with commas between; or all. Default: what fits the truth."
        ),
    ] = None,
    as_json: AsJson = False,
    csv: Annotated[Path | None, typer.Option(help="Write every number here, a row per image.")] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Draw splits red and mergers blue: a .png of the worst, a .tif of all.")
    ] = None,
    images: Annotated[Path | None, typer.Option("--images", "-i", help="What the figure is drawn on.")] = None,
) -> None:
    """Compare predictions with the truth: a row per image, and overall."""
    with _sentences():
        from .evaluation import evaluate
        from .files import writable_folder

        wanted = None if metrics is None else tuple(metrics.replace(" ", "").split(","))
        if csv is not None:
            writable_folder(csv.parent)
        report = evaluate(
            pred,
            truth,
            kind=label_kind.value,
            ignore=ignore,
            axes=axes,
            wanted=wanted,
            figure=figure,
            images=images,
        )
        if csv is not None:
            report.write_csv(csv)
        for names, what in (
            (report.without_prediction, "truth without a prediction"),
            (report.without_truth, "predictions without truth"),
        ):
            if names:
                more = ", ..." if len(names) > 3 else ""
                typer.echo(f"note: {len(names)} {what} ({', '.join(names[:3])}{more}): not scored", err=True)
        typer.echo(_data(report.as_dict()) if as_json else report.table())


@app.command()
def report(
    run: Annotated[Path, typer.Option("--run", help="Folder of a training run.")],
) -> None:
    """Draw the page of a training run again, report.html, from the files of the run alone."""
    with _sentences():
        from .report import write_report

        typer.echo(write_report(run))


@app.command("check-data")
def check_data(
    images: Images,
    labels: Labels,
    label_kind: Kind = LabelKind.AUTO,
    ignore: Ignore = None,
    axes: Axes = None,
    as_json: AsJson = False,
) -> None:
    """Look at images and labels, and list everything that training would trip over."""
    with _sentences():
        from .checking import check_data

        found = check_data(images, labels, kind=label_kind.value, ignore=ignore, axes=axes)
        typer.echo(_data(found.as_dict()) if as_json else found.render())
        if found.problems:
            raise typer.Exit(BAD_INPUT)


@app.command()
def profile(
    mode: Annotated[Mode, typer.Option(help="train, predict, or both.")] = Mode.BOTH,
    memory: Annotated[
        str | None, typer.Option(help="Budget such as 6GB: tell the largest tile of each way, measure none above.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="Training run or model.safetensors; default: the paper's net.")
    ] = None,
    features: Annotated[
        str | None, typer.Option(help="Instead of a model: channels per level, such as 16,32,64,128.")
    ] = None,
    channels: Annotated[int | None, typer.Option(help="Channels of the image, default 1.", min=1)] = None,
    classes: Annotated[
        int | None, typer.Option("--classes", "-c", help="Classes, background included, default 2.", min=1)
    ] = None,
    up_mode: Annotated[UpMode | None, typer.Option(help="Up-convolution: deconv (default) or resize.")] = None,
    tiles: Annotated[str | None, typer.Option(help="Sides to look at, such as 188,572; default: a ladder.")] = None,
    precision: Annotated[Offered | None, typer.Option(help="One only; default: both.")] = None,
    recompute: Annotated[Recompute | None, typer.Option(help="One only; default: both, in training.")] = None,
    batch: Annotated[int, typer.Option("--batch", "-b", help="Tiles at a time.", min=1)] = 1,
    seconds: Annotated[float, typer.Option(help="For measuring tiles; 0: count only.", min=0.0)] = 60.0,
    layers: Annotated[
        bool, typer.Option("--layers", help="Where bytes and time go, layer by layer; of --tiles' first, or of 572.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    as_json: AsJson = False,
    plot: Annotated[Path | None, typer.Option(help="Draw memory against tile, and speed against memory: a .png.")] = (
        None
    ),
    quiet: Quiet = False,
) -> None:
    """Show what a tile costs, before training: memory, time, useful pixels a second; by counting and by real steps."""
    own = {"--features": features, "--channels": channels, "--classes": classes, "--up-mode": up_mode}
    for option, given in own.items():
        if model is not None and given is not None:
            raise typer.BadParameter("a model has its own", param_hint=option)
    if mode is Mode.PREDICT and recompute is Recompute.LEVEL:
        raise typer.BadParameter("only training recomputes", param_hint="--recompute")
    widths = None if features is None else _numbers("--features", features)
    sides = None if tiles is None else _numbers("--tiles", tiles)
    with _sentences():
        from .profiling import report

        found = report(
            model=model,
            net={"in_channels": channels, "out_channels": classes, "features": widths, "up_mode": up_mode},
            modes=("train", "predict") if mode is Mode.BOTH else (mode.value,),
            precisions=None if precision is None else (precision.value,),
            recompute=None if recompute is None else (recompute.value,),
            memory=memory,
            tiles=sides,
            batch=batch,
            seconds=seconds,
            layers=layers,
            device=device,
            plot=plot,
            say=(lambda _: None) if quiet else lambda text: typer.echo(text, err=True),
        )
        typer.echo(_data(found.as_dict()) if as_json else found.render())


@app.command()
def doctor(
    layers: Annotated[bool, typer.Option("--layers", help="What each layer of a net runs here, and why.")] = False,
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="Of this run or model.safetensors; default: the paper's net.")
    ] = None,
    features: Annotated[
        str | None, typer.Option(help="Instead of a model: channels per level, such as 16,32,64,128.")
    ] = None,
    tile: Annotated[int, typer.Option(help="Side of the tile.", min=1)] = 572,
    precision: Annotated[Arithmetic, typer.Option(help="Of the net.")] = Arithmetic.BFLOAT16,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    chip: Annotated[str | None, typer.Option(help="Ask about a GPU that is not here: sm_80, sm_86, sm_89, sm_90.")] = (
        None
    ),
    measure: Annotated[
        bool, typer.Option("--measure", help="Run the net first, so that every layer's ways are measured.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show versions, devices, native libraries, and which implementation each operation takes here and why."""
    if model is not None and features is not None:
        raise typer.BadParameter("a model has its own", param_hint="--features")
    widths = None if features is None else tuple(_numbers("--features", features))
    from . import doctor

    if not layers:
        found = doctor.examine()
        typer.echo(_data(found) if as_json else doctor.render(found))
        return
    with _sentences():
        found = doctor.examine_layers(
            model=model,
            features=widths,
            tile=tile,
            precision=precision.value,
            device=device,
            chip=chip,
            measure=measure,
        )
        typer.echo(_data(found) if as_json else doctor.render_layers(found))


def _data(value: Any) -> str:
    return json.dumps(value, indent=2)


def main() -> None:
    """Entry point of the `unet-fast` command.

    Exit codes: 0 ok, 2 usage, 3 bad input, 4 out of memory, 5 partial (some images failed), 130 interrupted.
    """
    # a cluster ends a job so: the same as Ctrl-C, a checkpoint first
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except KeyboardInterrupt:  # before a verb began
        sys.exit(INTERRUPTED)
