"""What a call allocates on a CPU, as torch's profiler saw it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Allocated", "allocated"]


@dataclass(frozen=True)
class Allocated:
    """Bytes, above what lived before the call."""

    peak: int
    total: int
    largest: int


def allocated(call: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> Allocated:
    """Call once to warm up, once under the profiler.

    Args:
        before: called before each, to free what the last call left; what lived before is not counted when it dies.
    """
    before()
    call()
    before()
    # acc_events: without it torch 2.11 warns that one cycle's events are dropped at the next
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = total = largest = 0
    # they are listed by thread: backward() allocates in one of its own
    for event in sorted(events, key=lambda e: e.start_ns()):
        size = event.nbytes()
        now += size
        peak, total, largest = max(peak, now), total + max(size, 0), max(largest, size)
    return Allocated(peak, total, largest)
