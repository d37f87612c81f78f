"""Tiles for the net: drawn on the device from images that lie there, or ahead of it by threads on the host.

Either way the tiles are the same, bit for bit: they depend on (seed, step) alone (`unet_fast.sampling`).
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .data import Example, Grey
from .sampling import Sampler
from .sending import sent

__all__ = ["Feed", "Resident", "resident", "resident_bytes"]

# steps that are drawn ahead, for each thread
_AHEAD = 2
# what images may take of the memory that is free on a device, and of a budget
_OF_FREE, _OF_BUDGET = 0.25, 0.1
# rows of an image that are normalised together, in pixels: float64 takes eight bytes of each
_CHUNK = 1 << 22


class Resident:
    """An example on a device, its grey values in the file's 8 or 16 bits; normalised when it is looked at.

    `image`, `instances`, `class_of` and `one_kind` are those of the `Example`, to the last bit.
    """

    def __init__(self, example: Example, device: torch.device) -> None:
        self.name, self.one_kind = example.name, example.one_kind
        grey = example.grey
        self._image = None if grey is not None else example.image.to(device)
        self._grey = None if grey is None else Grey(*(t.to(device) for t in (grey.values, grey.low, grey.span)))
        # ids of two bytes where they fit
        small = int(example.instances.max()) < 2**15
        self._instances = example.instances.to(device, torch.int16 if small else torch.int32)
        self.class_of = example.class_of.to(device)

    @property
    def image(self) -> Tensor:
        """[C, H, W] float32, normalised."""
        if self._grey is None:
            assert self._image is not None
            return self._image
        grey = self._grey
        channels, _, columns = grey.values.shape
        out = torch.empty(grey.values.shape, device=grey.values.device)
        rows = max(1, _CHUNK // (channels * columns))
        for first in range(0, out.shape[1], rows):
            here = (slice(None), slice(first, first + rows))
            out[here] = grey.normalised(here)
        return out

    @property
    def instances(self) -> Tensor:
        """[H, W] int32."""
        return self._instances.int()

    @property
    def nbytes(self) -> int:
        """What it holds all the time."""
        held = [self._instances, self.class_of, self._grey.values if self._grey is not None else self._image]
        return sum(t.numel() * t.element_size() for t in held if t is not None)


def resident_bytes(examples: Sequence[Example]) -> int:
    """What `Resident` takes of all of them, and the largest of them as it is looked at."""
    held = sum(
        e.instances.numel() * 2 + e.image.numel() * (4 if e.grey is None else e.grey.values.element_size())
        for e in examples
    )
    return held + max((e.image.numel() * 4 + e.instances.numel() * 4 for e in examples), default=0) + 16 * _CHUNK


def resident(
    examples: Sequence[Example], device: torch.device, where: str = "auto", budget_bytes: int | None = None
) -> Sequence[Example | Resident]:
    """The examples on the device: where "device" asks for it, or, with "auto", on a GPU that has room for them.

    Args:
        examples: on the host.
        device: of the net.
        where: "auto", "device" or "host".
        budget_bytes: for all that training takes; None: what the device has.
    """
    if where == "auto" and device.type == "cuda":
        room = _OF_FREE * torch.cuda.mem_get_info(device)[0] if budget_bytes is None else _OF_BUDGET * budget_bytes
        where = "device" if resident_bytes(examples) <= room else "host"
    return [Resident(e, device) for e in examples] if where == "device" else examples


class Feed:
    """The tiles of step after step, on the device.

    Args:
        sampler: what draws them.
        share: which of a step's tiles.
        device: where they go.
        workers: threads that draw ahead; 0: they are drawn when they are asked for. Tiles of resident examples are
            drawn by the device itself, and need none. None: 2 where a GPU would wait for them.
    """

    def __init__(self, sampler: Sampler, share: range, device: torch.device, workers: int | None = None) -> None:
        self.sampler, self.share, self.device = sampler, share, device
        # then the device draws
        self.by_device = any(isinstance(example, Resident) for example in sampler.examples)
        if self.by_device:
            workers = 0
        elif workers is None:
            workers = 2 if device.type == "cuda" else 0
        self._threads = ThreadPoolExecutor(workers, "tiles") if workers else None
        self._ahead, self._waiting = workers * _AHEAD, dict[int, Future[Any]]()

    def take(self, step: int, last: int) -> list[tuple[Tensor, ...]]:
        """(image [C, H, W], instances [H, W], target [H, W]) of each tile; none is drawn ahead from step `last` on."""
        if self._threads is None:
            drawn = self._draw(step)
        else:
            for later in range(step, max(step + 1, min(last, step + self._ahead))):
                if later not in self._waiting:
                    self._waiting[later] = self._threads.submit(self._draw, later)
            drawn = self._waiting.pop(step).result()
        return [tuple(sent(part, self.device) for part in tile) for tile in drawn]

    def _draw(self, step: int) -> list[tuple[Tensor, ...]]:
        return list(self.sampler.drawn(step, self.share))

    def close(self) -> None:
        """Nothing is drawn any more."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
