"""The states of a run, kept so that it can be continued: `RUN/checkpoints/00000500/`, the last two and the best.

Each is a folder: `weights.safetensors` (float32, the masters of whatever precision the maps have),
`optimizer.safetensors`, `state.json`, and `MANIFEST.json` with the size and sha256 of the others, sealed by a sha256 of
its own. It is written beside its place, synced, and renamed, so that whatever moment a process is killed at, what has
a state's name is whole; what bits have flipped since is refused.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import BadInput
from .files import plain_mode, sync_folder
from .units import readable

__all__ = ["State", "checkpoints", "keep", "newest", "read", "set_aside", "step_of", "sweep"]

FORMAT = 1
WEIGHTS, OPTIMIZER, STATE, MANIFEST = "weights.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"
_FILES = (WEIGHTS, OPTIMIZER, STATE)
# of one step there may be several: the state before its report and the one after
_NAME = re.compile(r"(\d{8,})(?:-(\d+))?")
# what is being written, and what is being removed
_WRITING, _REMOVING = ".writing-", ".removing-"
# beside the tensors: names, shapes, settings, the log
_OVERHEAD_BYTES = 100_000


@dataclass(frozen=True, slots=True)
class State:
    """Weights and the optimizer's tensors by the parameters' names, and what else a run must know to go on."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    about: dict[str, Any]
    place: Path | None = None


def checkpoints(out: Path) -> list[Path]:
    """Those of the run in `out`, oldest first."""
    found = (path for path in (out / "checkpoints").glob("*") if _NAME.fullmatch(path.name) and path.is_dir())
    return sorted(found, key=_order)


def step_of(place: Path) -> int:
    """After how many steps it was kept."""
    return _order(place)[0]


def _order(place: Path) -> tuple[int, int]:
    """Its step, and its number among the states of that step."""
    step, _, number = place.name.partition("-")
    return int(step), int(number or 0)


def newest(out: Path) -> State:
    """The newest state that is whole; one that is not is named on stderr, and the one before taken.

    Raises:
        BadInput: there is none.
    """
    found = checkpoints(out)
    if not found:
        raise BadInput(f"{out} has no checkpoint to resume from; begin again, without resume, in an empty folder")
    for number, path in enumerate(reversed(found), 1):
        try:
            return read(path)
        except BadInput as error:
            more = "; taking the one before" if number < len(found) else ""
            print(f"note: {error}{more}", file=sys.stderr, flush=True)  # noqa: T201
    raise BadInput(f"{out} has no checkpoint that is whole")


def read(place: Path) -> State:
    """The state in a folder.

    Raises:
        BadInput: it is damaged; says which file, and which check failed.
    """
    for name, (size, digest) in _manifest(place).items():
        path = place / name
        try:
            found = path.stat().st_size
            if found != size:
                raise BadInput(f"{path} is damaged: it has {found} bytes, its manifest says {size}")
            if _sha256(path) != digest:
                raise BadInput(f"{path} is damaged: its sha256 is not the one in its manifest")
        except OSError as error:
            raise BadInput(f"{path} is damaged: {error.strerror or error}") from error
    try:
        about = json.loads((place / STATE).read_bytes())
        return State(load_file(place / WEIGHTS), load_file(place / OPTIMIZER), about, place)
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInput(f"{place} is damaged: {error}") from error


def keep(out: Path, step: int, state: State, *, best_step: int | None = None) -> Path:
    """Write a state, and drop all but the last two and the best one's once it is there.

    Args:
        out: the run.
        step: after so many steps.
        state: what is kept.
        best_step: the step whose state stays however many come after it.

    Raises:
        BadInput: it cannot be written; what was there stays as it was.
    """
    folder = out / "checkpoints"
    # later than all there are, and than those that there were
    numbers = [number for of, number in map(_order, checkpoints(out)) if of == step]
    place = folder / (f"{step:08d}-{max(numbers) + 1}" if numbers else f"{step:08d}")
    writing = folder / f"{_WRITING}{place.name}"
    try:
        try:
            shutil.rmtree(writing, ignore_errors=True)
            writing.mkdir(parents=True)
            _write(writing, state)
            writing.rename(place)
            sync_folder(folder)
        except SafetensorError as error:
            raise OSError(str(error)) from error
    except OSError as error:
        shutil.rmtree(writing, ignore_errors=True)
        needed = readable(_bytes_of(state), up=True)
        why = error.strerror or f"{error}; is the disk full?"
        raise BadInput(f"{place} cannot be written: {why}; a state takes {needed}") from error
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    _drop(out, place, best_step)
    return place


def sweep(out: Path) -> None:
    """Remove what runs that were killed had begun to write, or to remove. No other may run in `out` meanwhile."""
    for prefix in (_WRITING, _REMOVING):
        for left in (out / "checkpoints").glob(f"{prefix}*"):
            shutil.rmtree(left, ignore_errors=True)


def set_aside(places: Iterable[Path], why: str) -> None:
    """Take states out of the order, so that nothing goes on from them; `damaged-00000025` is what is left of one."""
    for place in places:
        name, count = f"{why}-{place.name}", 1
        while place.with_name(name).exists():
            count += 1
            name = f"{why}-{place.name}-{count}"
        # where that cannot be, it is passed over once more
        with suppress(OSError):
            place.rename(place.with_name(name))


def _write(place: Path, state: State) -> None:
    save_file(_plain(state.weights), place / WEIGHTS)
    save_file(_plain(state.optimizer), place / OPTIMIZER)
    (place / STATE).write_text(json.dumps(state.about, allow_nan=False) + "\n")
    for name in _FILES:
        _settle(place / name)
    files = {name: [(place / name).stat().st_size, _sha256(place / name)] for name in _FILES}
    (place / MANIFEST).write_text(_sealed({"format": FORMAT, "files": files}))
    _settle(place / MANIFEST)
    sync_folder(place)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _settle(path: Path) -> None:
    """On the disk for good, and readable for whom new files are: safetensors' are their owner's alone."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    path.chmod(plain_mode())


def _drop(out: Path, written: Path, best_step: int | None) -> None:
    found = checkpoints(out)
    of_best = [path for path in found if _order(path)[0] == best_step]
    for old in found[:-2]:
        if old != written and old not in of_best[-1:]:
            # half a state must not have a state's name
            gone = old.with_name(f"{_REMOVING}{old.name}")
            try:
                old.rename(gone)
            except OSError:
                # it takes room and does no harm
                continue
            shutil.rmtree(gone, ignore_errors=True)


def _bytes_of(state: State) -> int:
    tensors = (*state.weights.values(), *state.optimizer.values())
    return sum(t.numel() * t.element_size() for t in tensors) + _OVERHEAD_BYTES


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sealed(contents: dict[str, Any]) -> str:
    text = json.dumps(contents, sort_keys=True)
    return json.dumps({**contents, "sha256": hashlib.sha256(text.encode()).hexdigest()}, sort_keys=True) + "\n"


def _manifest(place: Path) -> dict[str, tuple[int, str]]:
    """(bytes, sha256) by file, of a manifest that is as it was written, byte for byte."""
    path = place / MANIFEST
    try:
        text = path.read_text(encoding="ascii")
        contents = json.loads(text)
        contents.pop("sha256")
        # nothing but what would be written again
        whole = text == _sealed(contents)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise BadInput(f"{path} is damaged: {_reason(error)}") from error
    if not whole:
        raise BadInput(f"{path} is damaged: its seal does not fit its contents")
    if contents.get("format") != FORMAT:
        raise BadInput(f"{path} has format {contents.get('format')}; this version reads {FORMAT}")
    files = contents.get("files")
    if not isinstance(files, dict) or set(files) != set(_FILES):
        raise BadInput(f"{path} must name {', '.join(_FILES)}")
    return {name: (int(size), str(digest)) for name, (size, digest) in files.items()}


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or f"it is no manifest ({type(error).__name__})"
