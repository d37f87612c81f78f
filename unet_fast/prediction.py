"""From image files to label files: `predict` for any number of images of any size, disk to disk.

What is finished is on disk within seconds, so that an interruption costs no more than that; results appear whole, under
their own names, when they are.
"""

import errno
import hashlib
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from . import __version__
from .cells import Cells
from .errors import BadInput
from .files import writable_folder
from .fitting import Fit, fit, held_to, parameter_of
from .greys import NAN, Greys
from .inference import Answer, Inference, evaluating, grouped
from .journal import FOLDER, Journal, locked
from .measuring import Watch, is_out_of_memory
from .pairs import image_folder, without_labels
from .progress import Progress
from .results import FORMATS, Result, check_format, put_back, write_result
from .seams import Seams, verify_seams
from .sources import SOURCES, Source, fingerprint, is_zarr, list_sources, open_source
from .tiling import TTA, Cutter, Tile, TilePlan, plan_tiles
from .units import bytes_of

__all__ = ["FILE_OUTPUTS", "FileResult", "Summary", "predict_files"]

FILE_OUTPUTS = ("labels", "instances", "probabilities")

# of file systems that take no more
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# names are 255 bytes at most, and a journal's has a little more than its result's
_LONGEST_NAME = 200


@dataclass(frozen=True, slots=True)
class FileResult:
    """What became of one image.

    status: "done", "kept" (finished by an earlier run), or "failed", with the `error`. `pixels` is of the image (rows
    x columns x slices), `computed` of those that this run computed, in so many `seconds`.
    """

    image: Path
    out: Path
    status: str
    error: str | None = None
    pixels: int = 0
    computed: int = 0
    seconds: float = 0.0
    tile_in: tuple[int, int] | None = None
    tiles: int = 0
    batch: int = 1
    seams: Seams | None = None

    @property
    def mpixel_per_s(self) -> float | None:
        return self.computed / 1e6 / self.seconds if self.computed and self.seconds else None

    def as_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "image": str(self.image),
            "out": str(self.out),
            "seams": asdict(self.seams) if self.seams else None,
            "mpixel_per_s": self.mpixel_per_s,
        }


@dataclass(frozen=True, slots=True)
class Summary:
    """What became of all images, in their order."""

    files: tuple[FileResult, ...]
    output: str

    @property
    def written(self) -> list[Path]:
        """The results that are there."""
        return [file.out for file in self.files if file.status != "failed"]

    @property
    def failed(self) -> list[FileResult]:
        return [file for file in self.files if file.status == "failed"]

    @property
    def seamless(self) -> bool:
        """No seam was found where one was looked for."""
        return all(file.seams is None or file.seams.exact for file in self.files)

    @property
    def mpixel_per_s(self) -> float | None:
        seconds, computed = sum(file.seconds for file in self.files), sum(file.computed for file in self.files)
        return computed / 1e6 / seconds if computed and seconds else None

    def as_dict(self) -> dict[str, Any]:
        return {
            "output": self.output,
            "written": len(self.written),
            "failed": len(self.failed),
            "mpixel_per_s": self.mpixel_per_s,
            "files": [file.as_dict() for file in self.files],
        }


def predict_files(
    model: nn.Module,
    images: Path | Sequence[Path],
    out: Path,
    *,
    output: str = "labels",
    axes: str | None = None,
    tile_in: int | None = None,
    memory: str | float | None = None,
    batch: int | None = None,
    tta: str = "none",
    nan: str = "refuse",
    threshold: float | None = None,
    min_pixels: int = 1,
    suffix: str = ".tif",
    resume: bool = False,
    seams: bool = False,
    progress: bool = False,
) -> Summary:
    """Segment images of any size, one after the other; a bad one is reported and the rest is done.

    Args:
        model: a FastUNet (or any module with its geometry); its normalisation is applied.
        images: files (TIFF, PNG, JPEG, BMP, NumPy), Zarr folders, or folders of such.
        out: for one image a file (.tif, .png, .npy, .zarr), otherwise a folder, in which results have the images'
            names.
        output: "labels", the class of each pixel; "instances", cell ids (`unet_fast.cells.find_cells`);
            "probabilities", [K, H, W] or [Z, K, H, W] ([K, Z, H, W] in a Zarr, as OME-Zarr wants it): float32 in a
            TIFF, float16 in NumPy and Zarr.
        axes: of the images, where they do not say.
        tile_in, memory, batch, tta, nan: see `unet_fast.predict`. A budget covers, on a CPU, all of the process's
            memory above what it held after its imports, the model included.
        threshold: probability above which a pixel is a cell, for labels and instances of two classes.
        min_pixels: smaller cells are dropped; for instances only.
        suffix: format of results in a folder.
        resume: go on with what an interrupted run has finished, and keep results that it finished altogether.
        seams: compare tiles with such that lie across their seams, at a few places of each image.
        progress: show progress on stderr.

    Raises:
        BadInput: the only image cannot be read, has other channels than the model, NaN pixels; a tile that does not
            fit; a place that cannot be written, is the images' own, or is written to by another process; a full disk.
        MemoryError: not even the smallest tile of the only image has room.
    """
    _check(model, output, threshold, tta, nan, suffix)
    paths = [images] if isinstance(images, Path) else list(images)
    sources = _sources(paths)
    targets = _targets(paths, sources, out, output, suffix)
    settings = _Settings(
        model, output, axes, tile_in, memory, batch, tta, nan, threshold, min_pixels, resume, seams, progress,
        _digest(model),
    )  # fmt: skip
    settings.check_tile()
    folder, alone = targets[0].parent, len(sources) == 1
    new = not folder.exists()
    writable_folder(folder)
    try:
        return _all(settings, sources, targets, alone)
    finally:
        if new:
            # nothing was written
            with suppress(OSError):
                folder.rmdir()


def _all(settings: "_Settings", sources: Sequence[Path], targets: Sequence[Path], alone: bool) -> Summary:
    files: list[FileResult] = []
    with (
        locked(targets[0].parent / FOLDER / "lock", shared=alone),
        held_to(settings.memory, parameter_of(settings.model).device, beside=settings.weights) as (watch, budget),
        evaluating(settings.model),
        Progress("predict", 1 if alone else len(sources), shown=settings.progress) as bar,
    ):
        for number, (source, target) in enumerate(zip(sources, targets, strict=True)):
            shown = _Shown(bar, source.name, alone, number)
            if watch is not None:
                watch.restart()
            try:
                files.append(_File(settings, source, target, shown, watch, budget).result())
            except (BadInput, MemoryError, RuntimeError) as error:
                if alone or not (isinstance(error, BadInput) or is_out_of_memory(error)):
                    raise
                said = " ".join(str(error).split()) or "out of memory"
                _to_stderr(f"error: {said}")
                files.append(FileResult(source, target, "failed", said))
            except OSError as error:
                if alone or error.errno in _FULL:
                    raise
                _to_stderr(f"error: {error}")
                files.append(FileResult(source, target, "failed", str(error)))
            shown.done()
        summary = Summary(tuple(files), settings.output)
        if not summary.failed:
            for target in targets:
                shutil.rmtree(_place(target), ignore_errors=True)
    return summary


def _check(model: nn.Module, output: str, threshold: float | None, tta: str, nan: str, suffix: str) -> None:
    for name, given, choices in (
        ("output", output, FILE_OUTPUTS),
        ("tta", tta, TTA),
        ("nan", nan, NAN),
        ("suffix", suffix, FORMATS),
    ):
        if given not in choices:
            raise BadInput(f"{name} must be one of {', '.join(choices)}, got {given!r}")
    two = int(getattr(model, "out_channels", 2)) == 2
    if threshold is not None and not (0 <= threshold <= 1 and output != "probabilities" and two):
        raise BadInput(f"threshold must lie between 0 and 1, for cells of two classes, got {threshold:g} for {output}")


def _sources(paths: Sequence[Path]) -> list[Path]:
    """The images of files and folders, each once; in a folder without the labels that lie beside their images."""
    found: dict[Path, Path] = {}
    for path in paths:
        inside = list_sources([image_folder(path)])
        for each in without_labels(inside) if path.is_dir() else inside:
            found.setdefault(each.resolve(), each)
    return list(found.values())


def _targets(paths: Sequence[Path], sources: Sequence[Path], out: Path, output: str, suffix: str) -> list[Path]:
    one_file = len(paths) == 1 and (paths[0].is_file() or is_zarr(paths[0]))
    # results.v2 is a folder
    named = out.suffix.lower() in (*FORMATS, *SOURCES) and not (out.is_dir() and not is_zarr(out))
    if one_file and named:
        check_format(out, output)
        targets = [out]
    else:
        if named:
            raise BadInput(f"{out} must be a folder, for the {len(sources)} images of {paths[0]}")
        if out.exists() and any(out.samefile(source.parent) for source in sources):
            raise BadInput(f"{out} is the folder of the images; choose another place for the results")
        targets = [out / f"{_stem(source)}{suffix}" for source in sources]
        check_format(targets[0], output)
    by_target: dict[Path, Path] = {}
    for source, target in zip(sources, targets, strict=True):
        if target.suffix.lower() != ".zarr" and target.is_dir():
            raise BadInput(f"{target} must be a file, a folder is in its place")
        if target.suffix.lower() == ".zarr" and target.exists() and not is_zarr(target):
            raise BadInput(f"{target} exists and is no Zarr; choose another place for the results")
        if target in by_target:
            raise BadInput(f"{by_target[target].name} and {source.name} would both be written to {target}")
        if target.exists() and any(target.samefile(s) for s in sources):
            raise BadInput(f"{target} is one of the images; choose another place for the results")
        by_target[target] = source
    return targets


def _stem(path: Path) -> str:
    """A name without its suffix, and without the .ome that goes before one: a result is no OME file."""
    return path.stem[:-4] if path.stem.lower().endswith(".ome") and len(path.stem) > 4 else path.stem


def _place(target: Path) -> Path:
    """The folder of a result's journal."""
    name = target.name
    if len(name.encode()) > _LONGEST_NAME:
        name = f"{name[:40]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return target.parent / FOLDER / name


@dataclass(frozen=True, slots=True)
class _Settings:
    """What is the same for all images."""

    model: nn.Module
    output: str
    axes: str | None
    tile_in: int | None
    memory: str | float | None
    batch: int | None
    tta: str
    nan: str
    threshold: float | None
    min_pixels: int
    resume: bool
    seams: bool
    progress: bool
    digest: str

    @property
    def weights(self) -> int:
        """Bytes of a CPU's model, which a budget covers."""
        return sum(p.nbytes for p in self.model.parameters() if p.device.type == "cpu")

    @property
    def budget(self) -> int | None:
        return None if self.memory is None else bytes_of(self.memory)

    def check_tile(self) -> None:
        """Raise BadInput for a tile or a budget that suits no image at all, before anything is written."""
        Cutter.of(self.model, self.tta)
        if self.tile_in is not None:
            Cutter.of(self.model, self.tta).check(self.tile_in)
        if self.tile_in is not None and self.memory is not None:
            raise BadInput("memory chooses the tile; give one of memory and tile_in")
        with held_to(self.memory, parameter_of(self.model).device):
            pass

    def about(self, source: Path) -> dict[str, Any]:
        """What decides each bit of a result, but for the tiles: those are in the journal's plans."""
        return {
            "image": fingerprint(source),
            "model": self.digest,
            "version": f"unet_fast {__version__}, torch {torch.__version__}",
            "device": parameter_of(self.model).device.type,
            "output": "probabilities" if self.output == "probabilities" else "labels",
            "axes": self.axes,
            "tta": self.tta,
            "nan": self.nan,
            "threshold": self.threshold,
        }


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256(repr(getattr(model, "settings", type(model).__name__)).encode())
    digest.update(repr(getattr(model, "normalisation", None)).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _Shown:
    """Progress of one image among others: tiles where it is the only one, otherwise images."""

    def __init__(self, bar: Progress, name: str, alone: bool, number: int) -> None:
        self.bar, self.name, self.alone, self.number = bar, name, alone, number
        self.pixels, self.tiles, self.of, self.began = 0, 0, 0, time.monotonic()

    def begin(self, tiles: int, finished: int) -> None:
        self.of, self.tiles, self.began = tiles, finished, time.monotonic()
        if self.alone:
            self.bar.restart(tiles, finished)

    def advance(self, group: Sequence[Tile], now: int) -> None:
        """`now`: how many tiles there are in all, where they became smaller."""
        self.tiles, self.of = self.tiles + len(group), now
        self.pixels += sum(tile.rows * tile.columns for tile in group)
        rate = self.pixels / 1e6 / max(1e-9, time.monotonic() - self.began)
        message = f"{rate:.3g} Mpixel/s"
        if self.alone:
            self.bar.total = now
            self.bar.advance(message, by=len(group))
        else:
            self.bar.advance(f"{self.name} {self.tiles}/{self.of} tiles, {message}", by=0)

    def done(self) -> None:
        if not self.alone:
            self.bar.advance(self.name)


@dataclass(slots=True)
class _File:
    """One image and its result."""

    settings: _Settings
    source: Path
    target: Path
    shown: _Shown
    watch: Watch | None
    budget: int

    def result(self) -> FileResult:
        settings, place = self.settings, _place(self.target)
        # another run may write another result of the same folder, but not this one
        with (
            locked(place.with_name(f"{place.name}.lock")),
            closing(open_source(self.source, axes=settings.axes, memory=settings.budget)) as image,
        ):
            channels = int(getattr(settings.model, "in_channels", 1))
            if image.shape[1] != channels:
                raise BadInput(f"{self.source} has {image.shape[1]} channel(s), the model was trained on {channels}")
            check_format(self.target, settings.output, image.is_stack)
            put_back(self.target, place)
            with self._full_disk(place):
                return self._journalled(place, image)

    @contextmanager
    def _full_disk(self, place: Path) -> Iterator[None]:
        """One sentence where a disk takes no more."""
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL:
                raise
            kept = (
                "what is finished is kept; free some and go on with --resume" if place.exists() else "free some first"
            )
            raise BadInput(f"{self.target} cannot be written: {error.strerror}; {kept}") from error

    def _journalled(self, place: Path, image: Source) -> FileResult:
        settings = self.settings
        classes = int(getattr(settings.model, "out_channels", 2))
        answer = _answer(settings, self.target)
        shape = answer.shape(classes, *image.shape[2:])
        if not settings.resume and (place / "journal").exists():
            _to_stderr(
                f"note: {self.target.name} was begun before; begun anew (--resume goes on with what is finished)"
            )
        journal = Journal(place, settings.about(self.source), shape, answer.dtype, resume=settings.resume)
        try:
            pixels = image.shape[0] * image.shape[2] * image.shape[3]
            kept = self._is_kept(journal)
            if kept and not settings.seams:
                return FileResult(self.source, self.target, "kept", pixels=pixels)
            started = time.monotonic()
            greys = Greys(image, getattr(settings.model, "normalisation", None), nan=settings.nan)
            if kept:
                seams = self._seams(greys, self._fit(image, answer))
                return FileResult(self.source, self.target, "kept", pixels=pixels, seams=seams)
            chosen, computed = self._compute(journal, image, greys, answer)
            self._write(journal, image, classes, answer)
            seconds = time.monotonic() - started
            found = self._seams(greys, chosen) if settings.seams else None
            journal.finish(result=fingerprint(self.target), output=settings.output, min_pixels=settings.min_pixels)
        except KeyboardInterrupt:
            self._kept(journal)
            raise
        finally:
            journal.close()
            if not journal.done:
                shutil.rmtree(place, ignore_errors=True)
        plan = chosen.plan
        return FileResult(
            self.source, self.target, "done", None, pixels, computed, seconds,
            plan.tile_in, image.shape[0] * len(plan), chosen.batch, found,
        )  # fmt: skip

    def _fit(self, image: Source, answer: Answer) -> Fit:
        """The tiles that an image is cut into where nothing is finished yet."""
        settings = self.settings
        channels_out = answer.shape(int(getattr(settings.model, "out_channels", 2)), 1, 1)
        return fit(
            settings.model,
            image,
            tile_in=settings.tile_in,
            memory=settings.memory,
            batch=settings.batch,
            tta=settings.tta,
            bytes_out=answer.dtype.itemsize * int(np.prod(channels_out)),
            beside=settings.weights,
        )

    def _seams(self, greys: Greys, chosen: Fit) -> Seams:
        return verify_seams(self.settings.model, greys, chosen.plan, tta=self.settings.tta)

    def _is_kept(self, journal: Journal) -> bool:
        """Whether an earlier run has finished this result, and it is still there as it was."""
        finished = journal.finished
        if finished is None:
            return False
        same = finished["output"] == self.settings.output and finished["min_pixels"] == self.settings.min_pixels
        if same and self.target.exists() and fingerprint(self.target) == finished["result"]:
            return True
        # its tiles are gone
        journal.restart()
        return False

    def _kept(self, journal: Journal) -> None:
        journal.sync()
        if journal.done:
            _to_stderr(f"{len(journal.done)} finished tiles of {self.target.name} are kept; --resume goes on with them")

    def _compute(self, journal: Journal, image: Source, greys: Greys, answer: Answer) -> tuple[Fit, int]:
        """All tiles that are not finished yet; what they were cut by, and how many pixels were computed."""
        settings = self.settings
        self._agree(journal, self._fit(image, answer))
        chosen, groups, tiles = self._left(journal, image)
        # of a group of which a tile was damaged, all are done again
        journal.forget(tile for group in groups for tile in group)
        left = sum(map(len, groups))
        total = {"tiles": tiles}
        self.shown.begin(tiles, tiles - left)
        computed = sum(tile.rows * tile.columns for group in groups for tile in group)

        def take(group: Sequence[Tile], results: list[np.ndarray[Any, Any]]) -> None:
            journal.add(group, results)
            self.shown.advance(group, total["tiles"])

        def changed(tile_in: tuple[int, int], batch: int) -> None:
            journal.plan(tile_in=tile_in, batch=batch)
            total["tiles"] = self._left(journal, image)[2]

        if self.watch is not None:
            # what reading took before is not the tiles'
            self.watch.restart()
        work = Inference(
            settings.model, greys, answer, settings.tta, self.watch, self.budget, say=_note, changed=changed
        )
        try:
            work.run(groups, chosen.plan.tile_in, take)
        except BaseException:
            # what is finished is kept, if the disk takes it
            with suppress(OSError):
                journal.sync()
            raise
        journal.sync()
        return self._left(journal, image)[0], computed

    def _left(self, journal: Journal, image: Source) -> tuple[Fit, list[list[Tile]], int]:
        """(the plan that holds now, groups that are not finished, tiles in all) by the plans of the journal."""
        settings = self.settings
        cutter, shape = Cutter.of(settings.model, settings.tta), image.shape
        first, _ = journal.plans[0]
        todo = list(self._plan(first, shape).tiles(shape[0]))
        # tiles that an earlier plan has finished; of these, the damaged ones
        before, again, now = 0, [], first
        for now, finished in journal.plans[1:]:
            again += [tile for tile in todo if tile in finished and tile in journal.lost]
            before += sum(tile in finished for tile in todo)
            todo = [p for tile in todo if tile not in finished for p in cutter.split(tile, tuple(now["tile_in"]))]
        todo += [part for tile in again for part in cutter.split(tile, tuple(now["tile_in"]))]
        left = [g for g in grouped(todo, now["batch"]) if not all(tile in journal.done for tile in g)]
        return Fit(self._plan(now, shape), now["batch"]), left, before - len(again) + len(todo)

    def _plan(self, plan: dict[str, Any], shape: Sequence[int]) -> TilePlan:
        return plan_tiles(shape, tile_in=plan["tile_in"], model=self.settings.model, tta=self.settings.tta)

    def _agree(self, journal: Journal, chosen: Fit) -> None:
        """The plan of the journal holds, but where less is asked for now."""
        side, batch = chosen.plan.tile_in, chosen.batch
        if journal.plans:
            last = journal.plans[-1][0]
            if self.settings.tile_in is None and self.settings.memory is None:
                return
            side, batch = tuple(map(min, side, last["tile_in"])), min(batch, last["batch"])
            if (side, batch) == (tuple(last["tile_in"]), last["batch"]):
                return
        journal.plan(tile_in=side, batch=batch)

    def _write(self, journal: Journal, image: Source, classes: int, answer: Answer) -> None:
        """The result, from its tiles."""
        settings = self.settings
        depth, _, height, width = image.shape
        labels = answer.output == "labels"

        def rows(z: int, plane: int, first: int, stop: int) -> np.ndarray[Any, Any]:
            return journal.rows(z, plane, first, stop, width)

        shape = (depth, 1 if labels else classes, height, width)
        result = Result(shape, answer.dtype, rows, image.is_stack, not labels, float(classes - 1 if labels else 1))
        if settings.output == "instances":
            cells = [_cells(result, z, settings.min_pixels) for z in range(depth)]
            most = max(each.count for each in cells)
            dtype = np.dtype(np.uint16 if most < 2**16 else np.uint32)

            def ids(z: int, plane: int, first: int, stop: int) -> np.ndarray[Any, Any]:  # noqa: ARG001 (one plane)
                return cells[z].rows(first, stop).astype(dtype)

            result = replace(result, dtype=dtype, rows=ids, top=float(most))
        write_result(self.target, result, journal.place)


def _cells(result: Result, z: int, min_pixels: int) -> Cells:
    _, _, height, width = result.shape
    return Cells(lambda first, stop: result.rows(z, 0, first, stop), height, width, min_pixels=min_pixels)


def _answer(settings: _Settings, target: Path) -> Answer:
    output = "probabilities" if settings.output == "probabilities" else "labels"
    answer = Answer.of(settings.model, output, settings.threshold, settings.tta)
    if output == "labels":
        return answer
    # not every reader of TIFFs knows numbers of 16 bits
    small = target.suffix.lower() in (".npy", ".zarr")
    return replace(answer, dtype=np.dtype(np.float16 if small else np.float32))


def _note(sentence: str) -> None:
    _to_stderr(f"note: {sentence}")


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201
