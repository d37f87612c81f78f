"""A meter sees what a piece of work allocates, also for a moment, and nothing of what was there before."""

import doctest
import functools
import math
import mmap
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from unet_fast import measuring
from unet_fast.measuring import Apart, Measured, Meter, is_out_of_memory, roof_tflops

CPU = torch.device("cpu")
MB = 10**6
# pages of the interpreter, counters that the kernel keeps by core
HAIR = 3 * MB

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process's peak")


_ALONE: dict[str, Callable[..., None]] = {}


def alone(test: Callable[..., None]) -> Callable[..., None]:
    """In a process of its own: in the heap of one that has run other tests there are holes for what is to be seen."""
    _ALONE[test.__name__] = test

    @functools.wraps(test)
    def run(**given: Any) -> None:
        Apart(CPU, __name__)(call_alone, test.__name__, given)

    return run


def call_alone(name: str, given: dict[str, Any]) -> None:
    # pages of libraries that are touched for the first time would count
    Meter(CPU).measure(lambda: int(held(MB)[0]))
    _ALONE[name](**given)


def held(count: int) -> torch.Tensor:
    """So many bytes, each of them written: a page nobody wrote is none."""
    return torch.ones(count, dtype=torch.uint8)


@pytest.mark.slow
@linux
@pytest.mark.parametrize("size", [40 * MB, 160 * MB])
@alone
def test_an_allocation_that_stays_is_seen(size: int) -> None:
    meter, kept = Meter(CPU), []
    found = meter.measure(lambda: kept.append(held(size)))
    assert found.bytes == pytest.approx(size, rel=0.03, abs=HAIR)


@pytest.mark.slow
@linux
@pytest.mark.parametrize("size", [40 * MB, 160 * MB])
@alone
def test_an_allocation_that_is_freed_inside_the_work_is_seen(size: int) -> None:
    found = Meter(CPU).measure(lambda: int(held(size)[0]))
    assert found.bytes == pytest.approx(size, rel=0.03, abs=HAIR)


@linux
@alone
def test_the_peak_of_several_calls_is_that_of_the_greatest_and_not_their_sum() -> None:
    # of smaller ones glibc may keep what is freed
    sizes = iter([40 * MB, 96 * MB, 48 * MB])
    found = Meter(CPU).measure(lambda: int(held(next(sizes))[0]), calls=3)
    assert found.bytes == pytest.approx(96 * MB, rel=0.03, abs=HAIR)


@linux
@alone
def test_what_was_held_before_is_not_counted() -> None:
    before = held(100 * MB)
    found = Meter(CPU).measure(lambda: int(held(32 * MB)[0]))
    assert found.bytes == pytest.approx(32 * MB, rel=0.03, abs=HAIR)
    assert before[0] == 1


@linux
@alone
def test_what_is_held_since_the_meter_was_made_is_counted_in_all_later_work() -> None:
    meter = Meter(CPU)
    kept = held(64 * MB)
    found = meter.measure(lambda: int(held(32 * MB)[0]))
    assert found.bytes == pytest.approx(96 * MB, rel=0.03, abs=HAIR)
    assert kept[0] == 1


@linux
@alone
def test_restart_forgets_the_peak_and_gives_back_what_nobody_holds() -> None:
    meter = Meter(CPU)
    # small pieces: glibc keeps them when they are freed; some of them lie in holes that the heap had before
    found = meter.measure(lambda: len([held(100_000) for _ in range(640)]))
    assert found.bytes == pytest.approx(64 * MB, rel=0.1, abs=HAIR)
    meter.restart()
    assert meter.peak() == pytest.approx(0, abs=HAIR)


@linux
@alone
def test_a_file_that_is_mapped_before_the_work_is_not_counted(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(64 * MB))
    meter = Meter(CPU)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[:: mmap.PAGESIZE]) == 0
        found = meter.measure(lambda: int(held(32 * MB)[0]))
    assert found.bytes == pytest.approx(32 * MB, rel=0.03, abs=HAIR)


@linux
@pytest.mark.parametrize("missing", ["_CLEAR", "_STATUS"])
def test_where_the_system_does_not_say_the_bytes_are_none_and_seconds_are_measured(
    missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(measuring, missing, tmp_path / "none" / "such")
    meter, calls = Meter(CPU), []
    found = meter.measure(lambda: calls.append(1), calls=2)
    assert (meter.peak(), found.bytes, len(calls)) == (None, None, 2)
    assert found.seconds >= 0


@linux
def test_where_the_system_says_less_than_needed_the_bytes_are_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # as other kernels have it
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmHWM:\t  100 kB\nThreads:\t1\n")
    monkeypatch.setattr(measuring, "_STATUS", status)
    assert Meter(CPU).measure(lambda: None).bytes is None


class Clock:
    """Stands for `time`; each piece of work takes as long as it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def work(self, seconds: Iterator[float]) -> Callable[[], None]:
        def work() -> None:
            self.now += next(seconds)

        return work


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(measuring, "time", clock)
    return clock


def test_seconds_are_those_of_the_fastest_call(clock: Clock) -> None:
    assert Meter(CPU).measure(clock.work(iter([8.0, 2.0, 3.0])), calls=3).seconds == 2.0


@pytest.mark.parametrize(
    ("seconds", "within", "made"),
    [
        ((1.0,) * 9, math.inf, 5),
        ((1.0,) * 9, 3.0, 3),
        ((1.0,) * 9, 2.9, 2),
        ((1.0,) * 9, 0.0, 1),
        ((60.0,), 10.0, 1),
        # the first call is slow, since it builds; the next are forecast by the fastest
        ((6.0, 1.0, 1.0, 1.0, 1.0), 10.0, 1),
        ((4.0, 1.0, 1.0, 1.0, 1.0), 10.0, 5),
    ],
)
def test_no_call_is_begun_that_would_not_end_in_time_and_one_is_made_always(
    clock: Clock, seconds: tuple[float, ...], within: float, made: int
) -> None:
    left = iter(seconds)
    Meter(CPU).measure(clock.work(left), calls=5, within_s=within)
    assert len(seconds) - len(list(left)) == made
    assert made == 1 or clock.now <= within


def test_one_call_is_made_if_nothing_else_is_said() -> None:
    calls: list[int] = []
    Meter(CPU).measure(lambda: calls.append(1))
    assert len(calls) == 1


def test_an_error_in_the_work_passes_through() -> None:
    with pytest.raises(ZeroDivisionError):
        Meter(CPU).measure(lambda: 1 // 0, calls=3)


def caught(work: Callable[[], Any]) -> BaseException:
    try:
        work()
    except (RuntimeError, MemoryError) as error:
        return error
    raise AssertionError("there was memory for it")


# more than any processor can address
TOO_MUCH = 2**60


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("no"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.OutOfMemoryError("HIP"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: out of memory"),
        caught(lambda: torch.empty(TOO_MUCH, dtype=torch.uint8)),
        caught(lambda: bytearray(TOO_MUCH)),
    ],
    ids=lambda error: f"{type(error).__name__} {error}"[:60],
)
def test_an_allocators_refusal_is_known(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("Unsupported memory format. Supports only ChannelsLast, Contiguous"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)"),
        RuntimeError(""),
        ValueError("out of memory"),
        KeyError("memory"),
        KeyboardInterrupt(),
        caught(lambda: torch.zeros(2, 3) @ torch.zeros(2, 3)),
    ],
    ids=lambda error: f"{type(error).__name__} {error}"[:60],
)
def test_another_error_is_not_taken_for_it(error: BaseException) -> None:
    assert not is_out_of_memory(error)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("by_hand", [False, True])
def test_the_roof_is_the_faster_of_product_and_convolution(
    by_hand: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "_has_no_unit_for", lambda dtype: by_hand)
    n, channels, side = (512, 64, 32) if by_hand else (2048, 256, 64)
    product, convolution = 2 * n**3, 2 * 9 * channels**2 * side**2
    for seconds, best in (((1.0, 1.0), product), ((10.0, 1.0), convolution)):
        each = iter(seconds)
        monkeypatch.setattr(Meter, "measure", lambda *_, each=each, **__: Measured(None, next(each)))
        assert roof_tflops(CPU, dtype) == pytest.approx(best / 1e12)


def test_float32_has_a_unit_everywhere_and_what_is_slow_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not measuring._has_no_unit_for(torch.float32)
    clock = iter(range(100))
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: next(clock))
    assert measuring._has_no_unit_for(torch.float32)


def test_the_roofs_works_run_and_leave_the_precision_of_products_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_self: Meter, work: Callable[[], Any], **_limits: Any) -> Measured:
        work()
        raise KeyError

    monkeypatch.setattr(Meter, "measure", fail)
    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError):
        roof_tflops(CPU, torch.float32)
    assert torch.get_float32_matmul_precision() == before


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(measuring).failed == 0
