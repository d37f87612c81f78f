"""Clocks, gates and ceilings: how a number is taken, and what must hold before it may be taken.

Device work is asynchronous and small kernels are shorter than their launch, so on CUDA a short function is captured in
a CUDA graph and its replays are timed between two events; a longer one is timed between events as it is.
"Cold" writes over the L2 cache before every call, as the rest of a net would. On a CPU it is a clock and a few repeats
within a time budget. Times are seconds (`_s`), sizes bytes (`_bytes`), rates GB/s with GB = 1e9 and TFLOP/s.
"""

import functools
import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Paired",
    "Peak",
    "Roof",
    "Stopwatch",
    "Timing",
    "Unequal",
    "channels_last",
    "expect_as_close",
    "expect_same",
    "gpu_clock",
    "measure",
    "paired",
    "peak_bytes",
    "poison",
    "relative_error",
    "replayable",
]

Work = Callable[[], Any]

# kernels under 100 us are what a launch hides; a first estimate contains the launches, hence the margin
GRAPH_BELOW_S = 1e-3
# a GPU that was idle takes this long to raise its clocks
WARM_UP_S = 0.02
# what lies between a pair of events is at least this long, so that the events' own cost does not count
BETWEEN_EVENTS_S = 2e-3


# clocks


def gpu_clock() -> float:
    """Seconds, after all that CUDA was given to do is done: a `timer=` for pytest-benchmark."""
    # initialised, not available: on a machine with an idle GPU a CPU benchmark must not wait for it
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds per call over `repeats` measurements of `calls` calls each; `how` they were taken."""

    median_s: float
    min_s: float
    max_s: float
    repeats: int
    calls: int
    how: str

    @property
    def median_us(self) -> float:
        return self.median_s * 1e6

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Paired:
    """`ratio` = time of a over time of b: above 1, b is faster; min and max over the rounds are its spread."""

    ratio: float
    ratio_min: float
    ratio_max: float
    rounds: int
    a: Timing
    b: Timing


class Stopwatch:
    """Called, it runs `fn` and returns seconds per call. Making one warms up and, on CUDA, may capture a graph.

    Args:
        fn: what to time; takes nothing, and its result is dropped.
        device: where its work is done.
        cold: write over the L2 cache before every call (CUDA only).
        graph: True replays a CUDA graph and fails where fn cannot be captured, False never does, None does for what
            is shorter than GRAPH_BELOW_S and can be captured.
    """

    def __init__(self, fn: Work, device: torch.device, *, cold: bool = False, graph: bool | None = None) -> None:
        self.calls, self.how, self._device = 1, "clock", device
        self._scratch: Tensor | None = None
        self._run = fn
        fn()
        if device.type == "cuda":
            self._prepare(fn, cold, graph)

    def __call__(self) -> float:
        if self._device.type != "cuda":
            started = time.perf_counter()
            self._run()
            return time.perf_counter() - started
        if self._scratch is not None:
            # it also keeps the GPU busy while the launch is on its way, so that no launch gap is timed
            self._scratch.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self._run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / self.calls

    def _prepare(self, fn: Work, cold: bool, graph: bool | None) -> None:
        started = time.perf_counter()
        once_s = min(self() for _ in range(3))
        while time.perf_counter() - started < WARM_UP_S:
            self()
        calls = 1 if cold else max(1, min(200, math.ceil(BETWEEN_EVENTS_S / once_s)))
        self._run, self.how = functools.partial(_repeatedly, fn, calls), "events"
        if graph or (graph is None and once_s < GRAPH_BELOW_S):
            try:
                self._run, self.how = replayable(fn, self._device, calls), "graph replay"
            except RuntimeError as error:
                if graph:
                    raise
                self.how = f"events (no graph: {str(error).splitlines()[0]})"
        self.calls = calls
        if cold:
            self._scratch = _larger_than_l2(self._device)
            self.how += ", cold"
        # a graph's first replay uploads it
        self()


def replayable(fn: Work, device: torch.device, calls: int = 1) -> Work:
    """`calls` calls of fn as one CUDA graph's replay; on a CPU, fn."""
    if device.type != "cuda":
        return fn
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        # libraries allocate their workspace at a stream's first use, which a capture would forbid
        fn()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        _repeatedly(fn, calls)
    return graph.replay


def _repeatedly(fn: Work, calls: int) -> None:
    # each result is dropped before the next call, so that the calls need the memory of one
    for _ in range(calls):
        fn()


@functools.cache
def _larger_than_l2(device: torch.device) -> Tensor:
    l2_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20
    return torch.empty(4 * l2_bytes, dtype=torch.uint8, device=device)


def measure(
    fn: Work,
    device: torch.device,
    *,
    repeats: int = 20,
    budget_s: float = 0.2,
    cold: bool = False,
    graph: bool | None = None,
) -> Timing:
    """Time fn: up to `repeats` measurements, and no more after the third once `budget_s` seconds are spent."""
    watch = Stopwatch(fn, device, cold=cold, graph=graph)
    seconds: list[float] = []
    started = time.perf_counter()
    while _more(len(seconds), repeats, started, budget_s):
        seconds.append(watch())
    return _timing(seconds, watch)


def paired(
    a: Work,
    b: Work,
    device: torch.device,
    *,
    repeats: int = 20,
    budget_s: float = 0.4,
    cold: bool = False,
    graph: bool | None = None,
) -> Paired:
    """Time a against b in rounds of A B B A, in which a drift of the clock weighs on both alike."""
    watch_a, watch_b = (Stopwatch(fn, device, cold=cold, graph=graph) for fn in (a, b))
    of_a: list[float] = []
    of_b: list[float] = []
    ratios: list[float] = []
    started = time.perf_counter()
    while _more(len(ratios), max(1, repeats // 2), started, budget_s):
        first, second, third, fourth = watch_a(), watch_b(), watch_b(), watch_a()
        of_a += [first, fourth]
        of_b += [second, third]
        ratios.append((first + fourth) / (second + third))
    ratio = statistics.median(ratios)
    return Paired(ratio, min(ratios), max(ratios), len(ratios), _timing(of_a, watch_a), _timing(of_b, watch_b))


def _more(done: int, repeats: int, started: float, budget_s: float) -> bool:
    return done < repeats and (done < 3 or time.perf_counter() - started < budget_s)


def _timing(seconds: list[float], watch: Stopwatch) -> Timing:
    return Timing(statistics.median(seconds), min(seconds), max(seconds), len(seconds), watch.calls, watch.how)


# memory


@dataclass(frozen=True, slots=True)
class Peak:
    """Bytes above what was held before the call; `reserved_bytes` (the allocator's, CUDA only) is what a card feels."""

    allocated_bytes: int
    reserved_bytes: int | None


def peak_bytes(fn: Work, device: torch.device) -> Peak:
    """The most memory fn holds at once. What it builds on its first call (plans, workspaces) is not counted."""
    fn()
    if device.type != "cuda":
        return Peak(_cpu_peak_bytes(fn), None)
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    # the empty reference: what is held without fn
    torch.cuda.reset_peak_memory_stats(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    fn()
    torch.cuda.synchronize(device)
    return Peak(torch.cuda.max_memory_allocated(device) - allocated, torch.cuda.max_memory_reserved(device) - reserved)


def _cpu_peak_bytes(fn: Work) -> int:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        fn()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def poison(size_bytes: int, device: torch.device) -> None:
    """Leave NaN where the allocator will probably put the next tensor of this size: an unwritten value then shows."""
    # 0xFF in every byte is a NaN in every floating dtype
    torch.full((size_bytes,), 0xFF, dtype=torch.uint8, device=device)


def channels_last(x: Tensor) -> Tensor:
    """x [N, C, H, W] in channels_last memory, by strides that say so even where C is 1 (`.to` leaves those alone)."""
    n, c, h, w = x.shape
    return torch.empty_strided((n, c, h, w), (c * h * w, 1, w * c, c), dtype=x.dtype, device=x.device).copy_(x)


# gates


class Unequal(AssertionError):
    """Two implementations disagree, so their times mean nothing."""


def expect_same(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Equal to the bit, strides included: for what only moves values."""
    if ours.shape != theirs.shape or not torch.equal(ours, theirs):
        raise Unequal(f"{what}: the values differ")
    if ours.stride() != theirs.stride():
        raise Unequal(f"{what}: the strides differ, {ours.stride()} and {theirs.stride()}")


def expect_as_close(ours: Tensor, theirs: Tensor, exact: Tensor, what: str, slack: float = 2.0) -> dict[str, float]:
    """Ours is as near to the float64 answer as theirs is, up to `slack`; returns both relative errors."""
    of_ours, of_theirs = relative_error(ours, exact), relative_error(theirs, exact)
    # 5e-7: a few roundings of float32, where theirs happens to be exact. Written so that NaN fails
    if not of_ours <= slack * of_theirs + 5e-7:
        raise Unequal(f"{what}: relative error {of_ours:.2e}, torch's is {of_theirs:.2e}")
    return {"error": of_ours, "error_of_torch": of_theirs}


def relative_error(y: Tensor, exact: Tensor) -> float:
    """|| y - exact || / || exact ||, in float64."""
    exact = exact.double()
    return float((y.double() - exact).norm() / exact.norm().clamp_min(torch.finfo(torch.float64).tiny))


# ceilings


@dataclass(frozen=True, slots=True)
class Roof:
    """The two rates nothing here can beat, measured on this device with random data, once a process each."""

    device: torch.device
    small: bool = field(default=False)

    def copy_gbps(self) -> float:
        """GB/s of a large copy on the device, bytes read plus bytes written."""
        return _copy_gbps(self.device, self.small)

    def matmul_tflops(self, dtype: torch.dtype, *, tf32: bool = False) -> float:
        """TFLOP/s of a large matrix product; `tf32` lets float32 operands onto the tensor cores."""
        return _matmul_tflops(self.device, dtype, tf32, self.small)

    def convolution_tflops(self, dtype: torch.dtype) -> float:
        """The rate that a convolution in `dtype` is held against: torch lets float32 ones use tf32 unless told not."""
        tf32 = self.device.type == "cuda" and dtype == torch.float32 and torch.backends.cudnn.allow_tf32
        return self.matmul_tflops(dtype, tf32=tf32)

    def floor_s(self, flops: float, moved_bytes: float, dtype: torch.dtype) -> float:
        """Seconds below which no implementation gets: arithmetic or memory, whichever takes longer."""
        return max(flops / self.convolution_tflops(dtype) / 1e12, moved_bytes / self.copy_gbps() / 1e9)


@functools.cache
def _copy_gbps(device: torch.device, small: bool) -> float:
    size_bytes = 2 << 30 if device.type == "cuda" else 256 << 20
    size_bytes = 32 << 20 if small else size_bytes
    source = torch.randint(0, 256, (size_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size_bytes / measure(lambda: target.copy_(source), device).median_s / 1e9


@functools.cache
def _matmul_tflops(device: torch.device, dtype: torch.dtype, tf32: bool, small: bool) -> float:
    n = 256 if small else 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        seconds = measure(lambda: a @ b, device).median_s
    finally:
        torch.set_float32_matmul_precision(before)
    return 2 * n**3 / seconds / 1e12
