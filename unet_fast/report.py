"""The page of a run: what a training did, for whoever has to decide whether to use its net.

Everything on it is from the files of the run directory, so that it can be drawn again whenever. One file, which asks
for nothing: pictures are inside, there is no script, and no browser may fetch anything for it. Names of files, settings
and labels are text that anybody may have written: the template escapes all of it.
"""

import base64
import json
import math
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray

from .charts import HEIGHT, WIDTH, Chart, chart, shown
from .config import TrainConfig
from .figures import FOUND, TRUTH, draw_curves, outlined_png, ridge_png, weight_png
from .files import replacing
from .runs import Overlay, RunFiles, number, read_run

__all__ = ["PAGE", "write_report"]

PAGE, CURVES = "report.html", "curves.png"
_TEMPLATE = Path(__file__).with_name("report.html.jinja")

# nothing is fetched and nothing runs, whatever got into the page
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

# how a run is judged
_IDLE = 0.5
_FALLING = 0.05
_RISING = 0.1
_HIT = 0.5
_LOW = 2**32 - 1

# what a page of a size that can be mailed has room for
_MOST_OVERLAYS = 8
_MOST_ROWS, _MOST_ENTRIES, _MOST_LETTERS = 1000, 1000, 4000
_DEEPEST = 5
# what a setting is, in the order of the table
_KINDS = ("given", "different", "open", "unknown", "default")
_USUAL = "default"
# lists up to this are shown as they are
_FEW = 6

_SCORES = (
    ("loss", "loss", False),
    ("iou", "IoU", True),
    ("pixel_error", "pixel error", True),
    ("cell_iou", "cell IoU", True),
    ("ap50", "AP at 0.5", True),
)
_VALIDATIONS = (
    ("step", "step"),
    ("loss", "training loss"),
    ("val_loss", "validation loss"),
    ("val_iou", "IoU"),
    ("val_pixel_error", "pixel error"),
    ("val_threshold", "threshold"),
    ("val_cell_iou", "cell IoU"),
    ("val_ap50", "AP at 0.5"),
)
_RECORD = {
    "labels_understood_as": "labels understood as",
    "classes": "classes, background included",
    "class_weights": "weight of each class",
    "training": "images trained on",
    "validation": "images held out for validation",
    "parameters": "parameters of the net",
    "net": "the net",
    "device": "device",
    "processes": "processes",
    "kernels": "implementation of each operation",
    "folding": "elastic maps that folded",
    "memory": "memory budget",
    "command": "command",
    "git": "commit of the code",
    "versions": "versions",
    "packages": "installed packages",
    "data": "files of the data, sha256",
}

_PICTURES = "".join(map(chr, range(0x2400, 0x2420)))
# control characters are shown as their pictures: some are not allowed in a page, and none can be read
_CONTROLS = {code: _PICTURES[code] for code in range(32) if chr(code) not in "\n\t"} | {127: "␡"}


def write_report(run: Path) -> Path:
    """Write `report.html` into a run's directory, and `curves.png`, from the other files there.

    Args:
        run: the directory. What is absent or empty is not there yet; what is damaged is named on the page.

    Returns:
        where the page lies. The same files give the same bytes.

    Raises:
        BadInput: no directory of a run; it cannot be written.
    """
    files = read_run(run)
    rows = [row for row in map(_numbers, files.log) if "step" in row]
    if rows:
        draw_curves(run / CURVES, {run.absolute().name: rows})
    page = _page(run.absolute(), files)
    place = run / PAGE
    with replacing(place) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")
    return place


@dataclass(frozen=True, slots=True)
class _Number:
    """What a file says, and how it is shown; `bar` is the share of a bar's width, where it has one."""

    raw: str
    text: str
    bar: float | None = None


@dataclass(frozen=True, slots=True)
class _Picture:
    title: str
    said: str
    source: str
    small: bool = False


@dataclass(frozen=True, slots=True)
class _Slice:
    name: str
    pictures: tuple[_Picture, ...]
    has_weight: bool


@dataclass(frozen=True, slots=True)
class _Setting:
    name: str
    value: str
    default: str
    kind: str


def _page(run: Path, files: RunFiles) -> str:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_readable, trim_blocks=True, lstrip_blocks=True
    )
    settings = _settings(files.config)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    worst, ordered_by = _worst_first(files.scores)
    drawn = files.overlays[:_MOST_OVERLAYS]
    validations = [row for row in files.log if _finite(row, "val_loss") is not None or row.get("best")]
    known = [(key, name) for key, name in _VALIDATIONS if any(row.get(key) for row in validations)]
    return template.render(
        policy=_POLICY,
        title=run.name or str(run),
        summary=_summary(files),
        warnings=[*files.damaged, *_warnings(files)],
        charts=_charts(files.log),
        width=WIDTH,
        height=HEIGHT,
        validation_heads=[name for _, name in known],
        validations=[([_cell(row, key) for key, _ in known], row.get("best") == "1") for row in validations][
            -_MOST_ROWS:
        ],
        slices=[_slice(overlay) for overlay in drawn],
        slices_left_out=len(files.overlays) - len(drawn),
        overlay_step=files.overlay_step,
        truth_colour="#{:02x}{:02x}{:02x}".format(*TRUTH),
        found_colour="#{:02x}{:02x}{:02x}".format(*FOUND),
        score_heads=[name for key, name, _ in _SCORES if any(row.get(key) for row in worst)],
        scores=[
            (row.get("image", ""), [_cell(row, key, b) for key, _, b in _SCORES if any(r.get(key) for r in worst)])
            for row in worst[:_MOST_ROWS]
        ],
        scores_left_out=max(0, len(worst) - _MOST_ROWS),
        ordered_by=ordered_by,
        settings=[each for each in settings if each.kind != _USUAL],
        usual=[each for each in settings if each.kind == _USUAL],
        record=_record(files.record),
        commands=_commands(run, files),
    )


def _readable(value: Any) -> Any:
    """Any text as UTF-8 can hold it: a file's name may be no text at all."""
    # what a macro made is text already escaped, of another type
    if type(value) is str:
        return value.encode("utf-8", "replace").decode("utf-8").translate(_CONTROLS)
    return value


# ---- numbers


def _numbers(row: Mapping[str, str]) -> dict[str, float | None]:
    found = {key: _finite(row, key) for key in row}
    return {key: value for key, value in found.items() if value is not None}


def _finite(row: Mapping[str, str], key: str) -> float | None:
    value = number(row, key)
    return value if value is not None and math.isfinite(value) and abs(value) < 1e30 else None


def _points(log: Iterable[Mapping[str, str]], key: str) -> list[tuple[float, float]]:
    """(step, value) of the rows that have both."""
    pairs = ((_finite(row, "step"), _finite(row, key)) for row in log)
    return [(step, value) for step, value in pairs if step is not None and value is not None]


def _cell(row: Mapping[str, str], key: str, bar: bool = False) -> _Number:
    """A cell as it is shown; nothing where it holds no number, and that it holds none where it says so."""
    raw, value = (row.get(key) or "").strip(), number(row, key)
    if value is None:
        return _Number("", "-")
    if not math.isfinite(value):
        return _Number(raw, "no number")
    # decimals below each other, where there are any
    text = f"{value:.4f}" if 1e-3 <= abs(value) < 1e3 and key != "step" else shown(value)
    return _Number(raw, text, min(max(value, 0.0), 1.0) if bar else None)


def _best(log: Sequence[Mapping[str, str]]) -> Mapping[str, str] | None:
    """The row whose net was kept."""
    return next((row for row in reversed(log) if number(row, "best") == 1 and _finite(row, "step") is not None), None)


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _steps(files: RunFiles) -> tuple[int, int | None]:
    """How many are done, as far as the log says, and how many there shall be."""
    done = max((int(step) for step, _ in _points(files.log, "step")), default=0)
    return done, _whole(files.config.get("steps"))


def _duration(seconds: float) -> str:
    """
    >>> _duration(4.24), _duration(200), _duration(7300), _duration(90000)
    ('4.2 s', '3 min 20 s', '2 h 1 min', '1 d 1 h')
    """
    if seconds < 10:
        return f"{max(seconds, 0):.1f} s"
    parts, left = [], round(seconds)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        count, left = divmod(left, size)
        parts.append((count, unit))
    first = next(i for i, (count, _) in enumerate(parts) if count)
    return " ".join(f"{count} {unit}" for count, unit in parts[first : first + 2] if count)


# ---- what is said


@dataclass(frozen=True, slots=True)
class _Summary:
    best: _Number | None
    scores: tuple[tuple[str, _Number], ...]
    length: str
    ending: str


def _summary(files: RunFiles) -> _Summary:
    best, (done, wanted) = _best(files.log), _steps(files)
    scores: list[tuple[str, _Number]] = []
    if best is not None:
        names = (("val_loss", "validation loss"), ("val_iou", "IoU"), ("val_pixel_error", "pixel error"))
        scores = [(name, _cell(best, key)) for key, name in names if _finite(best, key) is not None]
    seconds = max((value for _, value in _points(files.log, "seconds")), default=None)
    device = files.record.get("device")
    length = f"{done:,} of {wanted:,} steps" if wanted else f"{done:,} steps"
    length += f" in {_duration(seconds)}" if seconds is not None else ""
    length += f" on {device}" if isinstance(device, str) and device else ""
    if wanted is None:
        ending = "how many steps it shall have is not known"
    elif done >= wanted:
        ending = "finished"
    else:
        ending = "not finished: it is going on, or was interrupted"
    return _Summary(None if best is None else _cell(best, "step"), tuple(scores), length, ending)


def _warnings(files: RunFiles) -> list[str]:
    """What somebody who knows the recipe would remark, with what it is judged by."""
    log, said = files.log, []
    skipped = sum(value for _, value in _points(log, "skipped"))
    done, wanted = _steps(files)
    if skipped > 0:
        said.append(
            f"{skipped:,.0f} of {done:,} steps changed nothing: their loss or gradient was no number. A few are "
            "harmless, above all with float16; many mean that --lr is too high or that an image is damaged."
        )
    odd = sum(1 for row in log if (value := number(row, "loss")) is not None and not math.isfinite(value))
    if odd:
        said.append(f"{odd} of {len(log)} rows of log.csv have a loss that is no number; they are left out here.")
    busy = [value for _, value in _points(log, "busy")]
    if busy and statistics.median(busy) < _IDLE:
        said.append(
            f"The device was at work {statistics.median(busy):.0%} of the time (the median of log.csv's rows; "
            f"{_IDLE:.0%} or more is expected): it waits for tiles. More "
            f"--workers, or --images-on device, feed it faster."
        )
    if files.record.get("validation") == [] or files.config.get("validation") == 0:
        said.append(
            "No image was held out for validation: the net kept is the last one, and nothing here says how well it "
            "does on images it has not seen."
        )
    finished = wanted is not None and done >= wanted
    overfits = _overfits(log)
    if overfits:
        said.append(overfits)
    elif finished and (falling := _still_falling(log)):
        said.append(falling)
    return said


def _still_falling(log: Sequence[Mapping[str, str]]) -> str | None:
    validated = len(_points(log, "val_loss")) >= 8
    losses = [value for _, value in _points(log, "val_loss" if validated else "loss")]
    quarter = len(losses) // 4
    if quarter < 2:
        return None
    before, last = statistics.fmean(losses[-2 * quarter : -quarter]), statistics.fmean(losses[-quarter:])
    if not last < (1 - _FALLING) * before:
        return None
    return (
        f"The {'validation' if validated else 'training'} loss was still falling at the end: {shown(last)} on average "
        f"in the last quarter of the run, {shown(before)} in the one before, {1 - last / before:.0%} less (more than "
        f"{_FALLING:.0%} counts as falling). A new run with more --steps may do better."
    )


def _overfits(log: Sequence[Mapping[str, str]]) -> str | None:
    validations, losses = _points(log, "val_loss"), _points(log, "loss")
    if len(validations) < 8 or len(losses) < 8:
        return None
    best_step, lowest = min(validations, key=lambda point: point[1])
    last = validations[-(len(validations) // 4) :]
    if last[0][0] <= best_step:
        return None
    now = statistics.fmean(value for _, value in last)
    around = [value for step, value in losses if step <= best_step][-max(1, len(losses) // 4) :]
    late = [value for step, value in losses if step >= last[0][0]]
    if not around or not late or not lowest > 0:
        return None
    then, after = statistics.fmean(around), statistics.fmean(late)
    if not (now > (1 + _RISING) * lowest and after < then):
        return None
    return (
        f"The net learns its training images by heart: since step {best_step:,.0f} the validation loss has risen from "
        f"{shown(lowest)} to {shown(now)} (the mean of the last {len(last)}; more than {_RISING:.0%} counts) while the "
        f"training loss fell from {shown(then)} to {shown(after)}. The net kept is the best one, not the last. More "
        "images, or stronger changes of them (--elastic, --grey, --noise, --zoom), help."
    )


# ---- curves


def _charts(log: Sequence[Mapping[str, str]]) -> list[Chart]:
    best = _best(log)

    def mark(key: str) -> tuple[float, float] | None:
        found = [] if best is None else _points([best], key)
        return found[0] if found else None

    share = (0.0, 1.0)
    made = [
        chart(
            "loss",
            [("training", _points(log, "loss")), ("validation", _points(log, "val_loss"))],
            best=mark("val_loss"),
            logarithmic=True,
        ),
        chart("IoU of the cells' area", [("validation", _points(log, "val_iou"))], best=mark("val_iou")),
        chart("mean IoU of each cell", [("validation", _points(log, "val_cell_iou"))], best=mark("val_cell_iou")),
        chart("pixel error", [("validation", _points(log, "val_pixel_error"))], best=mark("val_pixel_error")),
        chart("learning rate", [("learning rate", _points(log, "lr"))]),
        chart("share of the time the device works", [("device", _points(log, "busy"))], whole=share),
        chart("skipped steps", [("skipped", _points(log, "skipped"))]) if _any(log, "skipped") else None,
        chart("scale of the loss", [("scale", _points(log, "scale"))], logarithmic=True)
        if _any(log, "scale")
        else None,
    ]
    return [each for each in made if each is not None]


def _any(log: Iterable[Mapping[str, str]], key: str) -> bool:
    return any(value for _, value in _points(log, key))


# ---- pictures


def _slice(overlay: Overlay) -> _Slice:
    name, image, truth, found, weight = overlay.name, overlay.image, overlay.truth, overlay.found, overlay.weight
    pictures = []
    if truth is not None:
        said = f"{name} with the outlines of the {_cells(truth)} that are there"
        pictures.append(_Picture(f"truth: {_cells(truth)}", said, _inside(outlined_png(image, (truth, TRUTH)))))
    if found is not None:
        title, said = f"found: {_cells(found)}", f"{name} with the outlines of the {_cells(found)} that were found"
        outlines = [(found, FOUND)]
        if truth is not None:
            missed = _missed(truth, found)
            title += f"; missed: {_cells(missed)}"
            said += f" and of the {_cells(missed)} that were missed"
            outlines.append((missed, TRUTH))
        pictures.append(_Picture(title, said, _inside(outlined_png(image, *outlines))))
    if not pictures:
        pictures.append(_Picture("image", f"{name} as it is", _inside(outlined_png(image))))
    if weight is not None:
        greatest = shown(float(weight.max()))
        said = f"weight of each pixel of {name}, from 0 to {greatest}"
        pictures.append(_Picture(f"weight, 0 to {greatest}", said, _inside(weight_png(weight)), small=True))
        ids = np.zeros(image.shape, np.int32) if truth is None else truth
        said = f"the weight map of {name} enlarged where it is greatest, with the outlines of the cells"
        pictures.append(_Picture("the ridge, enlarged", said, _inside(ridge_png(weight, ids)), small=True))
    return _Slice(name, tuple(pictures), weight is not None)


def _missed(truth: NDArray[np.int32], found: NDArray[np.int32]) -> NDArray[np.int32]:
    """The true cells that no found one shares more than half of what either covers with (IoU 0.5, as in AP at 0.5)."""
    here = truth >= 0
    true, other = truth[here].astype(np.int64), np.maximum(found[here], 0).astype(np.int64)
    areas = [
        dict(zip(*(each.tolist() for each in np.unique(ids, return_counts=True)), strict=True)) for ids in (true, other)
    ]
    # a pair of ids as one number: many times faster to sort
    pairs, shared = np.unique(true << 32 | other, return_counts=True)
    hit = {
        pair >> 32
        for pair, n in zip(pairs.tolist(), shared.tolist(), strict=True)
        if pair >> 32 and pair & _LOW and n > _HIT * (areas[0][pair >> 32] + areas[1][pair & _LOW] - n)
    }
    return np.where(np.isin(truth, list(hit)), 0, np.maximum(truth, 0)).astype(np.int32)


def _cells(ids: NDArray[np.int32]) -> str:
    count = len(np.unique(ids[ids > 0]))
    return f"{count} cell" if count == 1 else f"{count} cells"


def _inside(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


# ---- tables


def _worst_first(scores: Sequence[Mapping[str, str]]) -> tuple[list[Mapping[str, str]], str]:
    """Rows in order, and the score that it is: the first that any image has; images without it are last."""
    for key, name, sign in (("iou", "IoU", 1), ("loss", "loss", -1), ("cell_iou", "cell IoU", 1)):
        if any(_finite(row, key) is not None for row in scores):

            def worse(row: Mapping[str, str], key: str = key, sign: int = sign) -> tuple[bool, float]:
                value = _finite(row, key)
                return value is None, 0.0 if value is None else sign * value

            return sorted(scores, key=worse), name
    return list(scores), ""


def _settings(config: Mapping[str, Any]) -> list[_Setting]:
    """Those that were given or differ from the defaults first; each kind in the order of TrainConfig."""
    defaults = {f.name: f.default for f in fields(TrainConfig)}
    # a setting of another version has no default here
    names = [name for name in defaults if name in config] + sorted(set(config) - set(defaults))
    found = []
    for name in names:
        default = defaults.get(name, MISSING)
        plain = list(default) if isinstance(default, tuple) else default
        if name not in defaults:
            kind, said = "unknown", "not known to this version"
        elif default is MISSING:
            kind, said = "given", "none"
        elif default is None:
            kind, said = "open", "open"
        else:
            kind, said = _USUAL if plain == config[name] else "different", _written(plain)
        found.append(_Setting(name, _written(config[name]), said, kind))
    return sorted(found, key=lambda setting: _KINDS.index(setting.kind))


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(_written, value))
    return _short("none" if value is None else str(value))


def _short(text: str) -> str:
    return text if len(text) <= _MOST_LETTERS else f"{text[:_MOST_LETTERS]} ..."


@dataclass(frozen=True, slots=True)
class _Entry:
    """A value of run.json: text, or `rows`, with names or without; `left_out` more are not shown."""

    name: str
    text: str = ""
    rows: tuple["_Entry", ...] = ()
    folded: bool = False
    named: bool = False
    left_out: int = 0


def _record(record: Mapping[str, Any]) -> list[_Entry]:
    """What has a friendly name first, all else as it is called."""
    names = [*(key for key in _RECORD if key in record), *(key for key in record if key not in _RECORD)]
    return [_entry(_RECORD.get(key, key.replace("_", " ")), record[key], key=key) for key in names]


def _entry(name: str, value: Any, depth: int = 0, key: str = "") -> _Entry:
    name = _short(name)
    if key == "command" and isinstance(value, list) and all(isinstance(word, str) for word in value):
        return _Entry(name, _short(shlex.join(value)))
    if not isinstance(value, list | dict) or not value:
        return _Entry(name, "none" if value in ([], {}) else f"{value:,}" if type(value) is int else _written(value))
    if depth >= _DEEPEST:
        return _Entry(name, _short(json.dumps(value, ensure_ascii=False)))
    plain = isinstance(value, list) and not any(isinstance(each, list | dict) for each in value)
    if plain and len(value) <= _FEW and sum(len(str(each)) for each in value) < 200:
        return _Entry(name, _written(value))
    named = isinstance(value, dict)
    pairs = list(value.items()) if isinstance(value, dict) else [("", each) for each in value]
    rows = tuple(_entry(str(each), inner, depth + 1) for each, inner in pairs[:_MOST_ENTRIES])
    return _Entry(name, rows=rows, folded=len(pairs) > _FEW, named=named, left_out=max(0, len(pairs) - _MOST_ENTRIES))


# ---- how to go on


def _commands(run: Path, files: RunFiles) -> list[tuple[str, str]]:
    place = shlex.quote(str(run))
    done, wanted = _steps(files)
    commands = []
    if files.has_state and (wanted is None or done < wanted):
        commands.append(("Go on with this run, where it was interrupted:", f"unet-fast train --out {place} --resume"))
    if files.has_model:
        cells = files.record.get("labels_understood_as") in ("binary", "instance")
        said = "Segment other images with the best net"
        best = _best(files.log)
        threshold = None if best is None else _finite(best, "val_threshold")
        if threshold is not None:
            said += f" (validation was best with --threshold {shown(threshold)})"
        output = " --output instances" if cells else ""
        commands.append((f"{said}:", f"unet-fast predict -m {place} --images IMAGES --out RESULTS{output}"))
        commands.append(("Compare the results with the truth:", "unet-fast evaluate --pred RESULTS --truth LABELS"))
    commands.append(("Draw this page again:", f"unet-fast report --run {place}"))
    return commands
