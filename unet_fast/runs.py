"""The files of a run directory, read by somebody who wants to know what came of it.

A run may be going on, have been ended anywhere, or be another version's: what is absent or empty is not there yet, what
is damaged is said in a sentence, and no file is ever a reason to fail.
"""

import csv
import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .errors import BadInput

__all__ = ["CONFIG", "LOG", "MODEL", "OVERLAYS", "RECORD", "SCORES", "Overlay", "RunFiles", "number", "read_run"]

CONFIG, RECORD, LOG, SCORES = "config.toml", "run.json", "log.csv", "scores.csv"
OVERLAYS, MODEL = "overlays.npz", "model.safetensors"

_Found = TypeVar("_Found")
# a slice with more pixels is no picture for a page
_MOST_PIXELS = 2**26


@dataclass(frozen=True, slots=True)
class Overlay:
    """One slice of the validation block: image [H, W]; truth and found int [H, W], ids of instances, 0 the background,
    negative ignored; weight [H, W], that of each pixel. What the file lacks is None."""

    name: str
    image: NDArray[Any]
    truth: NDArray[np.int32] | None
    found: NDArray[np.int32] | None
    weight: NDArray[np.float32] | None


@dataclass(frozen=True, slots=True)
class RunFiles:
    """All that the files of a run say. Cells of the tables are text as it stands in the file; see `number`."""

    config: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, str]] = field(default_factory=list)
    scores: list[dict[str, str]] = field(default_factory=list)
    overlays: list[Overlay] = field(default_factory=list)
    overlay_step: int | None = None
    has_model: bool = False
    has_state: bool = False
    # one sentence for each file that is there and cannot be read
    damaged: tuple[str, ...] = ()


def read_run(run: Path) -> RunFiles:
    """Read all there is.

    Raises:
        BadInput: `run` is no folder, or one that no training has written to.
    """
    if not run.is_dir():
        what = "is a file" if run.exists() else "does not exist"
        raise BadInput(f"{run} {what}; expected the folder of a training run, the --out of unet-fast train")
    places = [run / name for name in (CONFIG, RECORD, LOG, SCORES, OVERLAYS, MODEL)]
    if not any(place.exists() for place in places):
        raise BadInput(f"{run} has none of {', '.join(p.name for p in places)}; expected the folder of a training run")
    damaged: list[str] = []

    def read(name: str, reader: Callable[[Path], _Found], nothing: _Found) -> _Found:
        try:
            return reader(run / name) if (run / name).stat().st_size else nothing
        except FileNotFoundError:
            return nothing
        except Exception as error:
            # a zip with a byte changed can fail in a dozen ways, and the rest of the page is worth having
            why = " ".join(str(error).split())[:300] or type(error).__name__
            damaged.append(f"{name} cannot be read and is left out: {why}")
            return nothing

    no_overlays: tuple[list[Overlay], int | None] = ([], None)
    overlays, step = read(OVERLAYS, _overlays, no_overlays)
    return RunFiles(
        config=read(CONFIG, _toml, {}),
        record=read(RECORD, _json, {}),
        log=read(LOG, _table, []),
        scores=read(SCORES, _table, []),
        overlays=overlays,
        overlay_step=step,
        has_model=(run / MODEL).exists(),
        has_state=any((run / "checkpoints").glob("*")),
        damaged=tuple(damaged),
    )


def number(row: Mapping[str, str], key: str) -> float | None:
    """A cell as a number; None where it is empty, missing, or says something else. It may be NaN or infinite."""
    try:
        return float(row.get(key) or "")
    except ValueError:
        return None


def _toml(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def _json(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"expected an object, got {type(found).__name__}")
    return found


def _table(path: Path) -> list[dict[str, str]]:
    # names of files need be no text at all
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = csv.reader(file)
        head = [name.strip() for name in next(rows, [])]
        # a row that is cut short is one that was never finished
        return [dict(zip(head, row, strict=True)) for row in rows if len(row) == len(head)]


def _overlays(path: Path) -> tuple[list[Overlay], int | None]:
    # opened here, so that it is closed however reading ends
    with path.open("rb") as opened:
        file = np.load(opened, allow_pickle=False)
        if not isinstance(file, Mapping):
            raise ValueError("expected an .npz of several arrays, got a single one")
        names = [str(name) for name in np.atleast_1d(file["names"])] if "names" in file else []
        step = int(file["step"]) if "step" in file else None
        overlays: list[Overlay] = []
        while f"image_{len(overlays)}" in file:
            overlays.append(_overlay(file, len(overlays), names))
    return overlays, step


def _overlay(file: Mapping[str, NDArray[Any]], index: int, names: list[str]) -> Overlay:
    image = _plane(file, f"image_{index}")
    if image is None or not image.size:
        raise ValueError(f"image_{index} has no pixels")
    truth, found, weight = (_plane(file, f"{kind}_{index}", image.shape) for kind in ("truth", "found", "weight"))
    return Overlay(
        name=names[index] if index < len(names) else f"slice {index}",
        image=np.nan_to_num(image.astype(np.float32), posinf=0.0, neginf=0.0),
        truth=None if truth is None else truth.astype(np.int32),
        found=None if found is None else found.astype(np.int32),
        weight=None if weight is None else np.nan_to_num(weight.astype(np.float32), posinf=0.0, neginf=0.0),
    )


def _plane(file: Mapping[str, NDArray[Any]], key: str, shape: tuple[int, ...] | None = None) -> NDArray[Any] | None:
    if key not in file:
        return None
    array = file[key]
    if array.ndim != 2 or array.size > _MOST_PIXELS or (shape is not None and array.shape != shape):
        raise ValueError(f"{key} must be [H, W]{'' if shape is None else f' of {shape}'}, got {array.shape}")
    return array
