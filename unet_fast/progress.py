"""Progress on stderr: a bar where it is a terminal, a plain line now and then where it is not."""

import sys
import time
from types import TracebackType
from typing import Any, Self

__all__ = ["Progress"]

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A counter with a message and the time left; `shown=False` makes it silent.

    with Progress("train", 100) as bar: bar.advance("loss 0.3")
    """

    def __init__(self, title: str, total: int, *, done: int = 0, shown: bool = True) -> None:
        self.title, self.total, self.done, self.shown = title, total, done, shown
        self._first, self._start, self._spoke = done, time.monotonic(), time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if self.shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, TextColumn("{task.fields[message]}"), console=Console(stderr=True))
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.done, message="")
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.shown and kind is None:
            self._line("done")

    def restart(self, total: int, done: int = 0) -> None:
        """It is so many now, of which some are done."""
        self.total, self.done, self._first, self._start = total, done, done, time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, total=total, completed=done)

    def advance(self, message: str = "", by: int = 1) -> None:
        """One more, and what there is to say about it."""
        self.done += by
        if self._bar is not None:
            self._bar.update(self._task, total=self.total, completed=self.done, message=message)
        elif self.shown and time.monotonic() - self._spoke >= _SECONDS_BETWEEN_LINES:
            self._line(message)

    def _line(self, message: str) -> None:
        self._spoke = time.monotonic()
        spent = self._spoke - self._start
        left = spent / max(1, self.done - self._first) * (self.total - self.done)
        when = f"{spent:.0f} s" if self.done >= self.total else f"{spent:.0f} s, {left:.0f} s left"
        print(f"{self.title} {self.done}/{self.total}  {message}  {when}", file=sys.stderr, flush=True)  # noqa: T201
