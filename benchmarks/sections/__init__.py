"""The questions of the GPU report, one module each.

A module of this package that defines `TITLE: str`, `ORDER: int`, `SECONDS: float` (expected on a GPU) and
`run(context) -> dict` is a section; nothing is registered anywhere. What `run` returns is saved as JSON and shown as
markdown: "headline" is a sentence, a list of dicts a table, a list of strings a block of text, the rest are facts.
"""

import importlib
import math
import pkgutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch

from benchmarks.harness import Roof
from benchmarks.levels import PAPER_FEATURES

__all__ = ["Context", "Failed", "Section", "Skipped", "affordable", "discover", "short"]

# where arithmetic is tiny every section is through in less
SMOKE_SECONDS = 15.0
# the dearest single case
CASE_SECONDS = 5.0

Case = TypeVar("Case")


class Skipped(Exception):
    """A section has nothing to do here; the message says why."""


class Failed(Exception):
    """A section found something wrong, and has results to show nevertheless."""

    def __init__(self, message: str, result: dict[str, Any]) -> None:
        super().__init__(message)
        self.result = result


@dataclass(frozen=True, slots=True)
class Context:
    """What a section is given. `deadline` is in seconds of time.monotonic()."""

    device: torch.device
    smoke: bool
    out: Path
    deadline: float
    dtypes: tuple[torch.dtype, ...]
    roof: Roof

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def tile_in(self) -> int:
        return 188 if self.smoke else 572

    @property
    def features(self) -> tuple[int, ...]:
        """The paper's channels; in a smoke run the same depth with next to none."""
        return (4, 8, 8, 16, 16) if self.smoke else PAPER_FEATURES

    @property
    def effort(self) -> dict[str, Any]:
        """Keyword arguments for `harness.measure` and `harness.paired`."""
        return {"repeats": 3, "budget_s": 0.01} if self.smoke else {"repeats": 20, "budget_s": 0.2}


@dataclass(frozen=True, slots=True)
class Section:
    """A discovered section. One whose import fails is a section too, so that the report shows it."""

    name: str
    title: str
    order: float
    seconds: float
    run: Callable[[Context], dict[str, Any]]

    def expected_s(self, smoke: bool) -> float:
        return min(self.seconds, SMOKE_SECONDS) if smoke else self.seconds


def discover(package: ModuleType | None = None) -> list[Section]:
    """The sections of a package (this one), in their order."""
    package = package or importlib.import_module(__name__)
    names = (module.name for module in pkgutil.iter_modules(package.__path__))
    found = (_section(package.__name__, name) for name in names if not name.startswith("_"))
    return sorted((s for s in found if s is not None), key=lambda s: (s.order, s.name))


def _section(package: str, name: str) -> Section | None:
    try:
        module = importlib.import_module(f"{package}.{name}")
    except Exception as error:
        return Section(name, f"{name} (cannot be imported)", math.inf, 0.0, _raising(error))
    if not all(hasattr(module, part) for part in ("TITLE", "ORDER", "SECONDS", "run")):
        return None
    return Section(name, module.TITLE, module.ORDER, module.SECONDS, module.run)


def _raising(error: Exception) -> Callable[[Context], dict[str, Any]]:
    def run(_: Context) -> dict[str, Any]:
        raise error

    return run


def affordable(context: Context, cases: Iterable[Case]) -> Iterator[Case]:
    """The cases, as long as there is time to measure one more and to save the report."""
    for case in cases:
        if context.left_s < CASE_SECONDS:
            return
        yield case


def short(dtype: torch.dtype) -> str:
    """float32, bfloat16, float16."""
    return str(dtype).removeprefix("torch.")
