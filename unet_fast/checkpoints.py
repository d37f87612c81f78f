"""The states of a run, kept so that it can be continued: `RUN/checkpoints/00000500.safetensors`, the last two."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import BadInput
from .storage import read_tensors, write_tensors

__all__ = ["State", "checkpoints", "keep", "newest"]


@dataclass(frozen=True, slots=True)
class State:
    """Tensors by name (`net.*`, `momentum.*`), and what else a run must know to go on."""

    tensors: dict[str, Tensor]
    about: dict[str, Any]


def checkpoints(out: Path) -> list[Path]:
    """Those of the run in `out`, oldest first."""
    return sorted((out / "checkpoints").glob("[0-9]*.safetensors"))


def newest(out: Path) -> State:
    """The newest checkpoint that is whole."""
    found = checkpoints(out)
    if not found:
        raise BadInput(f"{out} has no checkpoint to resume from; begin again, without resume, in an empty folder")
    for path in reversed(found):
        try:
            return State(*read_tensors(path))
        except BadInput as error:
            print(f"{error}; taking the one before", file=sys.stderr)  # noqa: T201
    raise BadInput(f"{out} has no checkpoint that is whole")


def keep(out: Path, step: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a checkpoint, and drop all but the last two once it is there."""
    write_tensors(out / "checkpoints" / f"{step:08d}.safetensors", tensors, about)
    for old in checkpoints(out)[:-2]:
        old.unlink()
