"""A model over the tiles of an image, without seams: read, computed and taken away at the same time.

One thread reads and normalises the windows that come next, the calling one runs the net, a third takes away what is
finished; two or three groups of tiles are in flight, never the image. Where memory runs out the tiles become smaller
and the work goes on.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from .averaging import versions_of
from .errors import BadInput
from .fitting import fit, held_to, parameter_of
from .greys import Greys
from .measuring import Watch, give_back, is_out_of_memory
from .progress import Progress
from .replay import Replayed
from .sources import ArraySource, Source, of_axes
from .tiling import Cutter, Tile
from .units import readable

__all__ = ["OUTPUTS", "Answer", "Inference", "evaluating", "grouped", "predict"]

Array = np.ndarray[Any, Any]

OUTPUTS = ("labels", "probabilities", "logits")
AXES = ("YX", "CYX", "YXC", "ZYX", "ZCYX")

# after a tile for which there was no memory: the share of its side that is tried next
_SMALLER = 0.7


@dataclass(frozen=True, slots=True)
class Answer:
    """What is wanted of each pixel: "labels", "probabilities" or "logits"; labels of two classes perhaps by a threshold
    of the probability; in this dtype."""

    output: str
    dtype: np.dtype[Any]
    threshold: float | None = None

    @classmethod
    def of(cls, model: nn.Module, output: str, threshold: float | None, tta: str = "none") -> Self:
        """In the dtype that holds it: uint8, uint16 above 256 classes; float32, float64 of a float64 net.

        Raises:
            BadInput: another output; a threshold without two classes, or outside of 0 to 1; an average of logits.
        """
        if output not in OUTPUTS:
            raise BadInput(f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")
        classes = int(getattr(model, "out_channels", 2))
        if threshold is not None and not (output == "labels" and classes == 2 and 0 <= threshold <= 1):
            raise BadInput(f"threshold must lie between 0 and 1, for labels of two classes, got {threshold:g}")
        if output == "logits" and tta != "none":
            raise BadInput(f"tta {tta} averages probabilities; output must be labels or probabilities, got 'logits'")
        if output == "labels":
            return cls(output, np.dtype(np.uint8 if classes <= 256 else np.uint16), threshold)
        wide = parameter_of(model).dtype == torch.float64
        return cls(output, np.dtype(np.float64 if wide else np.float32), threshold)

    def shape(self, classes: int, rows: int, columns: int) -> tuple[int, ...]:
        """Of one slice."""
        return (rows, columns) if self.output == "labels" else (classes, rows, columns)

    def of_logits(self, logits: Tensor) -> Tensor:
        """[K, rows, columns] to what is wanted, on the same device."""
        if self.output == "logits":
            return self._typed(logits)
        if self.output == "labels" and self.threshold is None:
            return self._typed(logits.argmax(0))
        return self.of_probabilities(probabilities(logits))

    def of_probabilities(self, found: Tensor) -> Tensor:
        if self.output == "probabilities":
            return self._typed(found)
        return self._typed(found.argmax(0) if self.threshold is None else found[1] > self.threshold)

    def _typed(self, found: Tensor) -> Tensor:
        return found.to(getattr(torch, self.dtype.name))


def probabilities(logits: Tensor) -> Tensor:
    """Softmax over the first axis, in float32 at least."""
    return (logits if logits.dtype == torch.float64 else logits.float()).softmax(0)


@dataclass(slots=True)
class Inference:
    """A model, an image, and the tiles that are still to do.

    Args:
        model: in eval mode (see `evaluating`).
        greys: the image.
        answer: what is wanted.
        tta: versions of the image that are averaged.
        watch: of this process's memory, and `budget` what it may take; tiles become smaller where it was exceeded.
        say: is told, once, that tiles became smaller.
        changed: is told the new tile_in and batch, after all that was finished before has been taken.
    """

    model: nn.Module
    greys: Greys
    answer: Answer
    tta: str = "none"
    watch: Watch | None = None
    budget: int = 0
    say: Callable[[str], None] = lambda _: None
    changed: Callable[[tuple[int, int], int], None] = lambda *_: None
    cutter: Cutter = field(init=False)
    net: Replayed = field(init=False)

    def __post_init__(self) -> None:
        self.cutter = Cutter.of(self.model, self.tta)
        self.net = Replayed(self.model)

    def run(
        self,
        groups: Sequence[Sequence[Tile]],
        tile_in: tuple[int, int],
        take: Callable[[Sequence[Tile], list[Array]], None],
    ) -> None:
        """Compute groups of tiles in their order; `take` gets each with its results, in another thread."""
        told = False
        while groups:
            done = _Counter()
            try:
                self._pass(groups, tile_in, take, done)
                return
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                why = str(error).splitlines()[0] if str(error) else "memory ran out"
            # a graph keeps its memory as long as it lives
            self.net = Replayed(self.model)
            give_back()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            groups = groups[done.count :]
            if not groups:
                # it was the last one that took too much
                return
            batch = max(map(len, groups))
            left = [tile for group in groups for tile in group]
            if batch > 1:
                batch //= 2
            else:
                rows, columns = (min(side, self.cutter.legal(_SMALLER * side)) for side in tile_in)
                if (rows, columns) == tile_in:
                    raise MemoryError(f"{why}; tiles of {tile_in[0]} x {tile_in[1]} are the smallest there are")
                tile_in = rows, columns
                left = [part for tile in left for part in self.cutter.split(tile, tile_in)]
            if not told:
                now = f"tiles of {tile_in[0]} x {tile_in[1]}" + (f", {batch} at a time" if batch > 1 else "")
                self.say(f"{why}; goes on with {now}")
                told = True
            groups = grouped(left, batch)
            self.changed(tile_in, batch)

    def _pass(
        self,
        groups: Sequence[Sequence[Tile]],
        tile_in: tuple[int, int],
        take: Callable[[Sequence[Tile], list[Array]], None],
        done: "_Counter",
    ) -> None:
        self.greys.source.reserve(tile_in[0])
        with _Ahead(self._windows(groups, tile_in)) as ahead, _Behind(take, done) as behind:
            sums: list[Tensor] = []
            for group, number, of, windows in ahead:
                sums = self._compute(group, number, of, windows, sums)
                del windows
                if number == of - 1:
                    behind.put(group, self._fetched(sums))
                    sums = []
                    self._stay_inside()

    def _windows(
        self, groups: Sequence[Sequence[Tile]], tile_in: tuple[int, int]
    ) -> Iterator[tuple[Sequence[Tile], int, int, Tensor]]:
        """(tiles, which version of how many, [tiles, C, rows, columns])."""
        versions = versions_of(self.tta, self.greys.shape[2:])
        on_gpu = parameter_of(self.model).device.type == "cuda"
        for group in groups:
            for number, version in enumerate(versions):
                pixels = np.stack([version.window(self.greys, tile, self.cutter, tile_in) for tile in group])
                windows = torch.from_numpy(pixels)
                yield group, number, len(versions), windows.pin_memory() if on_gpu else windows

    def _compute(
        self, group: Sequence[Tile], number: int, of: int, windows: Tensor, sums: list[Tensor]
    ) -> list[Tensor]:
        """What is wanted of each tile, or the sum of its probabilities so far."""
        like = parameter_of(self.model)
        version = versions_of(self.tta, self.greys.shape[2:])[number]
        with torch.no_grad():
            logits = self.net(windows.to(like.device, like.dtype, non_blocking=True))
            if of == 1:
                return [
                    self.answer.of_logits(version.back(each, tile, self.cutter))
                    for tile, each in zip(group, logits, strict=True)
                ]
            found = [
                version.back(probabilities(each), tile, self.cutter) for tile, each in zip(group, logits, strict=True)
            ]
            sums = [before + now for before, now in zip(sums, found, strict=True)] if sums else found
            return [self.answer.of_probabilities(each / of) for each in sums] if number == of - 1 else sums

    @staticmethod
    def _fetched(results: list[Tensor]) -> Callable[[], list[Array]]:
        """Results on their way to memory that numpy reads; calling it waits for them."""
        if results[0].device.type != "cuda":
            return lambda: [each.cpu().numpy() for each in results]
        arrived = torch.cuda.Event()
        hosts = [torch.empty(each.shape, dtype=each.dtype, pin_memory=True) for each in results]
        for host, each in zip(hosts, results, strict=True):
            host.copy_(each, non_blocking=True)
        arrived.record(torch.cuda.current_stream(results[0].device))

        def wait() -> list[Array]:
            arrived.synchronize()
            return [host.numpy() for host in hosts]

        return wait

    def _stay_inside(self) -> None:
        if self.watch is not None and self.watch.above > self.budget:
            taken = readable(self.watch.above)
            self.watch.restart()
            raise MemoryError(f"{taken} were taken, of {readable(self.budget)}")


class _Counter:
    """Groups that were taken."""

    def __init__(self) -> None:
        self.count = 0


# Both of the following take C's queues, with tokens for the room there is: a Ctrl-C between two lines of Python's own
# queue leaves a waiter behind that takes another's notice, and a thread that is never woken.


class _Ahead:
    """An iterator that is one item ahead, in a thread of its own."""

    def __init__(self, items: Iterator[Any]) -> None:
        self.items, self.stopped = items, False
        self.ready, self.room = queue.SimpleQueue[Any](), _tokens(1)
        self.thread = threading.Thread(target=self._work, name="reader", daemon=True)

    def __enter__(self) -> Iterator[Any]:
        self.thread.start()
        return self._all()

    def __exit__(self, *error: object) -> None:
        self.stopped = True
        # a reader that waits for room finds it
        self.room.put(None)
        self.thread.join()

    def _work(self) -> None:
        last: Any = StopIteration()
        try:
            for item in self.items:
                if not self._put(item):
                    return
        except BaseException as error:
            last = error
        self._put(last)

    def _put(self, item: Any) -> bool:
        self.room.get()
        if self.stopped:
            return False
        self.ready.put(item)
        return True

    def _all(self) -> Iterator[Any]:
        while True:
            item = self.ready.get()
            self.room.put(None)
            if isinstance(item, StopIteration):
                return
            if isinstance(item, BaseException):
                raise item
            yield item


def _tokens(count: int) -> "queue.SimpleQueue[None]":
    room = queue.SimpleQueue[None]()
    for _ in range(count):
        room.put(None)
    return room


class _Behind:
    """Takes results away in a thread of its own; waits for the last, and raises what went wrong with one."""

    def __init__(self, take: Callable[[Sequence[Tile], list[Array]], None], done: _Counter) -> None:
        self.take, self.done = take, done
        self.waiting, self.room = queue.SimpleQueue[Any](), _tokens(2)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._work, name="writer", daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def put(self, group: Sequence[Tile], results: Callable[[], list[Array]]) -> None:
        self._raise()
        self.room.get()
        self.waiting.put((group, results))

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.waiting.put(None)
        self.thread.join()
        if kind is None or issubclass(kind, MemoryError | RuntimeError):
            self._raise()

    def _work(self) -> None:
        while (item := self.waiting.get()) is not None:
            self.room.put(None)
            if self.error is None:
                try:
                    group, results = item
                    self.take(group, results())
                    self.done.count += 1
                except BaseException as error:
                    self.error = error

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error


def grouped(tiles: Iterable[Tile], batch: int) -> list[list[Tile]]:
    """Tiles that go through the net together: which ones decides their last bits, so it is the plan that says."""
    tiles = list(tiles)
    return [tiles[first : first + batch] for first in range(0, len(tiles), batch)]


class evaluating:  # noqa: N801 (used as a function)
    """Eval mode; the mode of every module is restored."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.before = [(module, module.training) for module in self.model.modules()]
        self.model.eval()

    def __exit__(self, *error: Any) -> None:
        for module, training in self.before:
            module.training = training


def predict(
    model: nn.Module,
    image: Any,
    *,
    axes: str | None = None,
    tile_in: int | Sequence[int] | None = None,
    memory: str | float | None = None,
    output: str = "labels",
    threshold: float | None = None,
    out: Any = None,
    batch: int | None = None,
    tta: str = "none",
    nan: str = "refuse",
    progress: bool = False,
) -> Any:
    """Segment an image or a stack of any size from 1 x 1, tile by tile, without seams.

    Args:
        model: a FastUNet (or any module with its geometry: `depth`, `in_channels`, `out_channels`); used in eval mode,
            in its own dtype and on its own device; its mode is restored. A normalisation saved with it is applied.
        image: array or tensor; numpy in, numpy out, a tensor likewise. Only windows of it are read: it may be a
            `np.memmap`, a Zarr array, or anything else with shape, dtype and slices.
        axes: "YX", "CYX", "YXC", "ZYX" or "ZCYX". None allows 2-D, and 3-D whose first axis is in_channels > 1.
        tile_in: side (or rows, columns) of a tile; None: fits the image, 572 at most.
        memory: instead of tile_in: a budget, "6GB" or bytes, that tile and tile batch are chosen for: on a GPU all
            that the process takes there, on a CPU what this call takes beside the model, the image and the result.
        output: "labels" (the likeliest class: uint8, uint16 above 256 classes), "probabilities" (softmax, float32) or
            "logits" (the model's dtype, float32 at least).
        threshold: for labels of two classes: the probability above which a pixel is a cell; None takes the likelier.
        out: anything that can be written by index, of the result's shape, such as a `np.memmap` or a Zarr array; it is
            returned then.
        batch: tiles that go through the net together; None: 1, or what `memory` has room for.
        tta: "d4" averages the probabilities of 8 mirrored and turned versions of the image, "rot7" of 7 rotated by
            0, 51.4, 102.9, 154.3, 205.7, 257.1 and 308.6 degrees (linear interpolation); they too join without seams.
        nan: "refuse" NaN and infinite pixels, or "fill" them with the dark end of the normalised range.
        progress: show progress on stderr.

    Returns:
        labels [Z,] H, W; otherwise [Z,] K, H, W: the image's own rows and columns.

    Raises:
        ValueError: the axes are unclear, the number of channels is another, NaN or infinite pixels, a tile that does
            not fit, a budget that is too small, an `out` of another shape, a batch of none.
        MemoryError: there is no memory for the smallest tile.
    """
    if batch is not None and batch < 1:
        raise BadInput(f"batch must be 1 or more, got {batch}")
    answer = Answer.of(model, output, threshold, tta)
    source, piled = _source(image, axes, int(getattr(model, "in_channels", 1)))
    wide = parameter_of(model).dtype == torch.float64
    greys = Greys(source, getattr(model, "normalisation", None), nan=nan, wide=wide)
    depth, classes = source.shape[0], int(getattr(model, "out_channels", 2))
    inner = answer.shape(classes, *source.shape[2:])
    shape = (depth, *inner) if piled else inner
    made_here = out is None
    if made_here:
        out = np.empty(shape, answer.dtype)
    elif tuple(out.shape) != shape:
        raise BadInput(f"out must have shape {list(shape)}, got {list(out.shape)}")
    elif output != "labels" and _whole_numbers(out):
        raise BadInput(f"out must be floating to hold {output}, got {out.dtype}")
    with evaluating(model):
        bytes_out = answer.dtype.itemsize * (1 if output == "labels" else classes)
        chosen = fit(model, source, tile_in=tile_in, memory=memory, batch=batch, tta=tta, bytes_out=bytes_out)
        plan = chosen.plan
        groups = grouped(plan.tiles(depth), chosen.batch)
        with (
            Progress("predict", depth * len(plan), shown=progress) as bar,
            held_to(memory, parameter_of(model).device) as (watch, budget),
        ):

            def take(group: Sequence[Tile], results: list[Array]) -> None:
                for tile, result in zip(group, results, strict=True):
                    rows, columns = (
                        slice(tile.row, tile.row + tile.rows),
                        slice(tile.column, tile.column + tile.columns),
                    )
                    where = (tile.z, ..., rows, columns) if piled else (..., rows, columns)
                    out[where] = (
                        torch.from_numpy(result).to(out.device, out.dtype) if isinstance(out, Tensor) else result
                    )
                    bar.advance(f"slice {tile.z + 1} of {depth}" if piled else "")

            work = Inference(model, greys, answer, tta, watch=watch, budget=budget)
            work.run(groups, plan.tile_in, take)
    return torch.from_numpy(out).to(image.device) if made_here and isinstance(image, Tensor) else out


def _whole_numbers(out: Any) -> bool:
    dtype = getattr(out, "dtype", None)
    if isinstance(dtype, torch.dtype):
        return not dtype.is_floating_point
    return dtype is not None and np.dtype(dtype).kind != "f"


def _source(image: Any, axes: str | None, channels: int) -> tuple[Source, bool]:
    """(the image, whether it is a stack)."""
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        # numpy has no bfloat16
        image = np.asarray(image.float() if image.dtype == torch.bfloat16 else image)
    elif not all(hasattr(image, name) for name in ("shape", "dtype", "__getitem__")):
        image = np.asarray(image)
    dtype, shape = np.dtype(image.dtype), tuple(image.shape)
    if dtype.kind not in "uifb":
        raise BadInput(f"image must be integer or floating, got {dtype}")
    if axes is None:
        if len(shape) == 2:
            axes = "YX"
        elif len(shape) == 3 and channels > 1 and shape[0] == channels:
            axes = "CYX"
        else:
            raise BadInput(f"image of shape {list(shape)} needs axes: say axes, one of {', '.join(AXES)}")
    if axes not in AXES or len(axes) != len(shape):
        raise BadInput(f"axes must be one of {', '.join(AXES)} and fit {len(shape)} axes, got {axes!r}")
    source = ArraySource(of_axes(image, axes))
    if source.shape[1] != channels:
        raise BadInput(f"image must have {channels} channel(s) like the model, got {source.shape[1]}")
    if 0 in source.shape:
        raise BadInput(f"an image must have at least one row and one column, got {list(source.shape)}")
    return source, "Z" in axes
