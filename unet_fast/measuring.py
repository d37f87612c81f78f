"""What a piece of work really takes: seconds, and bytes of the device.

A GPU's bytes are what torch's allocator reserves, and CONTEXT_BYTES for what CUDA holds beside it. A CPU's are the
process's anonymous memory (what it allocates; not files and libraries mapped into it) above what it held when the
meter was made; Linux keeps a high-water mark that can be set back, so that short peaks count.
"""

import ctypes
import gc
import math
import mmap
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, Self, TypeVar

import torch

from .errors import BadInput
from .units import readable

__all__ = [
    "CONTEXT_BYTES",
    "Apart",
    "Busy",
    "Measured",
    "Meter",
    "Watch",
    "capped",
    "give_back",
    "is_out_of_memory",
    "roof_tflops",
]

T = TypeVar("T")

# CUDA's context and the libraries' handles: 0.3 to 0.6 GB, less on small cards
CONTEXT_BYTES = 500_000_000

# what allocators say; "illegal memory access" and "memory format" are other troubles
_REFUSALS = ("out of memory", "not enough memory", "allocate memory", "bad_alloc")

_STATUS, _CLEAR, _PAGES = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/self/statm")
# to the latter: set the high-water mark to what is held now
_RESET = "5"


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes at most (None where they cannot be known, as on a CPU without /proc) and seconds of one piece of work."""

    bytes: int | None
    seconds: float


class Meter:
    """Bytes of a device: on a CPU those above what is held now, on a GPU all of this process's, context included."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        give_back()
        self._before = _anonymous()
        self._mapped = 0

    def restart(self) -> None:
        """Forget the peak so far, and give back what nobody needs."""
        give_back()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self._before is not None:
            status = _status()
            self._mapped = status["RssFile"] + status["RssShmem"]
            _CLEAR.write_text(_RESET)

    def peak(self) -> int | None:
        """The most bytes held since `restart`; None where nobody can say."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device) + CONTEXT_BYTES
        if self._before is None:
            return None
        # the mark holds mapped pages too; one that was first touched since counts: too much rather than too little
        return max(0, _status()["VmHWM"] - self._mapped - self._before)

    def measure(self, work: Callable[[], Any], *, calls: int = 1, within_s: float = math.inf) -> Measured:
        """Bytes over up to `calls` calls of `work`, and the seconds of the fastest: the first may build what stays.

        No further call is begun that would not end within `within_s` seconds.
        """
        self.restart()
        seconds: list[float] = []
        with Watch(self._before is not None and self.device.type != "cuda") as watch:
            while len(seconds) < calls and sum(seconds) + min(seconds, default=0.0) <= within_s:
                self._wait()
                started = time.perf_counter()
                work()
                self._wait()
                seconds.append(time.perf_counter() - started)
        peak = self.peak()
        return Measured(None if peak is None else max(peak, watch.greatest - (self._before or 0)), min(seconds))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Apart:
    """Calls functions where their memory is theirs alone: on a CPU each in a new process, on a GPU in this one.

    A process that has done other work holds a heap in pieces and libraries' caches, up to half as much again
    (docs/findings/0008-a-heap-in-pieces.md). Functions and arguments must be picklable, and `imports` are the modules
    that hold them; where no process can be made (no fork server on this system) all is called here.
    """

    def __init__(self, device: torch.device, *imports: str) -> None:
        self.context = None
        if device.type == "cpu" and "forkserver" in multiprocessing.get_all_start_methods():
            self.context = multiprocessing.get_context("forkserver")
            # imported once, before the forks; an optimizer would import the compiler
            self.context.set_forkserver_preload([*imports, "torch._dynamo"])

    def __call__(self, function: Callable[..., T], *arguments: Any) -> T:
        """What `function` returns.

        Raises:
            MemoryError: its process was ended, as systems do that have no memory left.
            Exception: whatever it raises.
        """
        if self.context is None:
            return function(*arguments)
        try:
            with _nameless_main(), ProcessPoolExecutor(1, mp_context=self.context) as child:
                return child.submit(_with_threads, torch.get_num_threads(), function, arguments).result()
        except BrokenProcessPool as error:
            raise MemoryError("a process was ended from outside, as systems do when memory runs out") from error


@contextmanager
def _nameless_main() -> Iterator[None]:
    """A new process runs the lines of a script that started it, unless it knows of none."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _with_threads(threads: int, function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
    torch.set_num_threads(threads)
    return function(*arguments)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator said so: Python's, torch's on a GPU, or torch's on a CPU (a plain RuntimeError)."""
    said = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in said for words in _REFUSALS)
    )


class Watch:
    """Looks at this process's anonymous memory again and again, in a thread of its own; tells the most it saw.

    The high-water mark is exact, but of anonymous and mapped pages together: where the system takes mapped ones back
    meanwhile, new anonymous ones hide below it, and where files are read by mapping them, those count.

    Args:
        wanted: False, or a system that does not tell, and nothing is seen.
        every_s: seconds between two looks.
    """

    def __init__(self, wanted: bool = True, every_s: float = 1e-3) -> None:
        give_back()
        self.before = _held()
        self.greatest, self.every_s, self._done = 0, every_s, threading.Event()
        self.wanted = wanted and self.before > 0
        self._thread = threading.Thread(target=self._look, daemon=True)

    @property
    def above(self) -> int:
        """The most bytes seen, above those held when this was made."""
        return max(0, self.greatest - self.before)

    def restart(self) -> None:
        """Forget the most so far, and give back what nobody needs."""
        give_back()
        self.greatest = 0

    def __enter__(self) -> Self:
        if self.wanted:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        if self.wanted:
            self._thread.join()

    def _look(self) -> None:
        with _PAGES.open("rb", buffering=0) as file:
            while not self._done.wait(self.every_s):
                self.greatest = max(self.greatest, _held(file))


class Busy:
    """The share of time in which a device was at work, between its first and its last kernel of each piece of work.

    with busy: ...
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds, self._events = 0.0, list[tuple[Any, Any]]()
        self._since = time.perf_counter()

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            self._events.append((self._event(), torch.cuda.Event(enable_timing=True)))
        else:
            self._began = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            self._events[-1][1].record(torch.cuda.current_stream(self.device))
        else:
            self._seconds += time.perf_counter() - self._began

    def share(self) -> float:
        """Since it was last asked; waits for the device."""
        if self._events:
            torch.cuda.synchronize(self.device)
            self._seconds = sum(first.elapsed_time(last) for first, last in self._events) / 1e3
        now = time.perf_counter()
        found = self._seconds / max(now - self._since, 1e-9)
        self._seconds, self._since = 0.0, now
        self._events.clear()
        return min(1.0, found)

    def _event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


def _held(file: BinaryIO | None = None) -> int:
    """Bytes of anonymous memory now; 0 where the system does not tell."""
    try:
        if file is None:
            with _PAGES.open("rb", buffering=0) as opened:
                return _held(opened)
        file.seek(0)
        _, resident, mapped, *_ = file.read().split()
        return (int(resident) - int(mapped)) * mmap.PAGESIZE
    except (OSError, ValueError):
        return 0


@contextmanager
def capped(device: torch.device, budget_bytes: int | None) -> Iterator[None]:
    """On a GPU torch's allocator is held to a budget, CUDA's own part taken off, so that it cannot be exceeded.

    Raises:
        BadInput: the budget is less than what CUDA takes.
    """
    if budget_bytes is None or device.type != "cuda":
        yield
        return
    allowed = budget_bytes - CONTEXT_BYTES
    if allowed <= 0:
        given = readable(budget_bytes)
        raise BadInput(f"memory must be above {readable(CONTEXT_BYTES)}, which CUDA itself takes, got {given}")
    card = torch.cuda.get_device_properties(device).total_memory
    # what is kept for later counts
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / card), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _status() -> dict[str, int]:
    """Bytes, as Linux has them for this process."""
    pairs = (line.split() for line in _STATUS.read_text().splitlines())
    return {words[0][:-1]: int(words[1]) * 1024 for words in pairs if len(words) == 3 and words[2] == "kB"}


def _anonymous() -> int | None:
    try:
        _CLEAR.write_text(_RESET)
        return _status()["RssAnon"]
    except (OSError, KeyError):
        # another system, or one that forbids it
        return None


def give_back() -> None:
    """Hand free memory back to the system: glibc keeps it otherwise."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _has_no_unit_for(dtype: torch.dtype) -> bool:
    """Whether this processor computes in `dtype` by hand: a hundred times as slowly."""
    a = torch.randn(256, 256).to(dtype)
    seconds = math.inf
    for _ in range(3):
        started = time.perf_counter()
        a @ a
        seconds = min(seconds, time.perf_counter() - started)
    return 2 * 256**3 / seconds < 10e9


def roof_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s that nothing here beats by much: the faster of a large matrix product and a wide convolution.

    Both, because a processor's library for the one may be slower than that for the other. In float32 on a GPU by
    tensor cores (tf32) where torch lets convolutions use them.
    """
    n, channels, side = (8192, 512, 256) if device.type == "cuda" else (2048, 256, 66)
    if device.type != "cuda" and _has_no_unit_for(dtype):
        # a minute's work there, and no nearer to the truth
        n, channels, side = 512, 64, 34
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    x, weight = (
        torch.randn(1, channels, side, side, device=device),
        torch.randn(channels, channels, 3, 3, device=device),
    )
    x, weight = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, weight))
    works: list[tuple[float, Callable[[], Any]]] = [
        (2.0 * n**3, lambda: a @ b),
        (2.0 * 9 * channels**2 * (side - 2) ** 2, lambda: torch.nn.functional.conv2d(x, weight)),
    ]
    meter, before = Meter(device), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if torch.backends.cudnn.allow_tf32 else "highest")
    try:
        return max(flop / meter.measure(work, calls=20, within_s=0.7).seconds for flop, work in works) / 1e12
    finally:
        torch.set_float32_matmul_precision(before)
