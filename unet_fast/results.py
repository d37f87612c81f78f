"""Results on disk, written band by band: TIFF, OME-Zarr, NumPy; PNG, which is made as a whole.

A file takes its place when it is whole, and not before; the same pixels give the same bytes.
"""

import os
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from .errors import BadInput
from .files import TIFF, replacing, sync_folder, write_picture

__all__ = ["FORMATS", "Result", "check_format", "put_back", "write_result"]

Array = np.ndarray[Any, Any]

FORMATS = (".tif", ".tiff", ".png", ".npy", ".zarr")

# above this a TIFF has 8-byte offsets (BigTIFF), in tiles; below, ImageJ's own kind, in strips
_BIG = 2**31
_TIFF_TILE = 512
_STRIP_BYTES = 2**18
_ZARR_CHUNK = 512
# the smallest level of a Zarr pyramid has sides of at most this
_SMALLEST_LEVEL = 1024
# where a Zarr that is replaced lies meanwhile
_OLD = "old.zarr"


@dataclass(frozen=True, slots=True)
class Result:
    """What is written, and where its pixels come from.

    shape [D, P, H, W], P planes a slice; `rows(z, plane, first, stop)` gives [stop - first, W]; `is_stack` says whether
    the file has the axis D, `has_planes` whether it has P; `top` is the brightest grey value of a display.
    """

    shape: tuple[int, int, int, int]
    dtype: np.dtype[Any]
    rows: Callable[[int, int, int, int], Array]
    is_stack: bool
    has_planes: bool
    top: float

    @property
    def axes(self) -> str:
        return ("Z" if self.is_stack else "") + ("C" if self.has_planes else "") + "YX"

    @property
    def outer(self) -> tuple[int, ...]:
        """The file's own shape."""
        sides = dict(zip("ZCYX", self.shape, strict=True))
        return tuple(sides[axis] for axis in self.axes)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize

    def bands(self, high: int) -> Iterator[Array]:
        """All rows in the order of the file, so many at a time; fewer at the end of each plane."""
        depth, planes, height, _ = self.shape
        for z in range(depth):
            for plane in range(planes):
                for first in range(0, height, high):
                    yield self.rows(z, plane, first, min(height, first + high))


def check_format(path: Path, output: str, is_stack: bool | None = None) -> None:
    """Raise BadInput where a file of that name cannot hold the output; `is_stack` None: not yet known."""
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise BadInput(f"{path} must end in {', '.join(FORMATS)}: {suffix or 'no suffix'} changes the values it stores")
    if suffix == ".png" and output == "probabilities":
        raise BadInput(f"{path} cannot hold probabilities; use .tif")
    if suffix == ".png" and is_stack:
        raise BadInput(f"{path} cannot hold a stack; use .tif")
    if suffix == ".zarr":
        try:
            import zarr  # noqa: F401
        except ImportError as error:
            raise BadInput(f"{path} needs another library; pip install 'zarr>=3' writes it") from error


def write_result(path: Path, result: Result, within: Path) -> None:
    """Write a file, or a Zarr folder, in the format of its name.

    Args:
        path: its place, which it takes when it is whole; what was there is replaced.
        result: its pixels.
        within: a folder on the same disk, for what is not yet whole.

    Raises:
        BadInput: the place cannot be written, the disk is full; an id does not fit.
    """
    suffix = path.suffix.lower()
    if suffix == ".zarr":
        _write_zarr(path, result, within)
        return
    with replacing(path, within) as temporary:
        if suffix in TIFF:
            _write_tiff(temporary, result, path.name)
        elif suffix == ".npy":
            _write_numpy(temporary, result)
        else:
            try:
                write_picture(temporary, result.rows(0, 0, 0, result.shape[2]))
            except BadInput as error:
                # it names the file it was given
                raise BadInput(str(error).replace(str(temporary), str(path))) from error


def _write_tiff(path: Path, result: Result, name: str) -> None:
    """`name`: what it will be called; .ome.tif promises an OME-TIFF."""
    width = result.shape[3]
    # of planes one pixel wide, tifffile makes pages of another shape, and ImageJ files that lose their axes
    narrow = width == 1
    compression = "zlib" if result.dtype.kind == "u" and not narrow else None
    common: dict[str, Any] = {"shape": result.outer, "dtype": result.dtype, "photometric": "minisblack"}
    common |= {"compression": compression, "maxworkers": 1}
    imagej = result.dtype in (np.uint8, np.uint16, np.float32) and result.nbytes < _BIG
    if Path(name).stem.lower().endswith(".ome"):
        # an identifier of its own, but not at random: the same pixels give the same bytes
        identifier = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{name} {result.shape} {result.dtype}"))
        common |= {"ome": True, "bigtiff": result.nbytes >= _BIG}
        common |= {"metadata": {"axes": result.axes, "UUID": identifier}}
    elif imagej and not narrow:
        metadata = {"axes": result.axes, "min": 0.0, "max": float(max(1.0, result.top))}
        common |= {"imagej": True, "metadata": metadata}
    else:
        common |= {"bigtiff": result.nbytes >= _BIG, "metadata": {"axes": result.axes}}
    if compression is None:
        pixels = tifffile.memmap(path, **{k: v for k, v in common.items() if k not in ("compression", "maxworkers")})
        # a full disk says so here; later, it would end the process
        with path.open("r+b") as file:
            _allocate(file.fileno(), path.stat().st_size)
        flat, row = pixels.reshape(-1, width), 0
        for band in result.bands(_TIFF_TILE):
            flat[row : row + len(band)] = band
            row += len(band)
        pixels.flush()
    elif result.nbytes >= _BIG:
        tifffile.imwrite(path, map(_deflated, _squares(result)), tile=(_TIFF_TILE, _TIFF_TILE), **common)
    else:
        high = max(1, min(result.shape[2], _STRIP_BYTES // (width * result.dtype.itemsize)))
        tifffile.imwrite(path, map(_deflated, result.bands(high)), rowsperstrip=high, **common)


def _deflated(pixels: Array) -> bytes:
    return zlib.compress(np.ascontiguousarray(pixels).tobytes())


def _allocate(file: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)


def _squares(result: Result) -> Iterator[Array]:
    """Tiles of a TIFF, from bands of rows."""
    width = result.shape[3]
    for band in result.bands(_TIFF_TILE):
        for column in range(0, width, _TIFF_TILE):
            square = band[:, column : column + _TIFF_TILE]
            if square.shape != (_TIFF_TILE, _TIFF_TILE):
                missing = [(0, _TIFF_TILE - n) for n in square.shape]
                square = np.pad(square, missing)
            yield square


def _write_numpy(path: Path, result: Result) -> None:
    with path.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(result.dtype), "fortran_order": False, "shape": result.outer}
        np.lib.format.write_array_header_1_0(file, header)
        for band in result.bands(_TIFF_TILE):
            file.write(np.ascontiguousarray(band).data)


def _write_zarr(path: Path, result: Result, within: Path) -> None:
    import zarr
    from zarr.codecs import ZstdCodec

    put_back(path, within)
    temporary, old = within / "whole.zarr", within / _OLD
    for leftover in (temporary, old):
        _remove(leftover)
    try:
        # channels come before what lies in space
        axes = result.axes.replace("ZC", "CZ")
        levels = _levels(result, axes)
        group = zarr.open_group(temporary, mode="w", zarr_format=3)
        previous: Any = None
        for number, shape in enumerate(levels):
            chunks = (1,) * (len(shape) - 2) + tuple(min(_ZARR_CHUNK, n) for n in shape[-2:])
            level = group.create_array(
                str(number), shape=shape, dtype=result.dtype, chunks=chunks, dimension_names=list(axes.lower()),
                compressors=ZstdCodec(level=3, checksum=True),
            )  # fmt: skip
            _fill(level, axes, result, previous)
            previous = level
        group.attrs["ome"] = _multiscales(path.stem, axes, len(levels))
        _sync_all(temporary)
        with _replaced(path, old):
            temporary.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror or f'{error}; is the disk full?'}") from error
    finally:
        _remove(temporary)
        _remove(old)


def _remove(folder: Path) -> None:
    """Remove a folder; where one of zarr's writers has failed, others may still be writing into it."""
    for pause in (0.02, 0.05, 0.1, 0.2, 0.5):
        if not folder.exists():
            return
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(pause)


def put_back(path: Path, within: Path) -> None:
    """A run that was killed while one Zarr took another's place may have left none: the old one goes back."""
    if (within / _OLD).exists() and not path.exists():
        (within / _OLD).rename(path)
        sync_folder(path.parent)


def _sync_all(folder: Path) -> None:
    """Be sure that all files of a folder outlive a power cut."""
    for place, _, names in os.walk(folder):
        for name in names:
            with (Path(place) / name).open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(place))


@contextmanager
def _replaced(path: Path, old: Path) -> Iterator[None]:
    """A folder cannot be renamed onto another: what was there goes out of the way first, and back if that fails."""
    was = path.exists()
    if was:
        path.rename(old)
    try:
        yield
    except BaseException:
        if was:
            old.rename(path)
        raise
    if old.is_file():
        old.unlink()


def _levels(result: Result, axes: str) -> list[tuple[int, ...]]:
    """Sizes of a pyramid, each with half the rows and columns of the one before: viewers need it for large images."""
    sides = dict(zip("ZCYX", result.shape, strict=True))
    shapes = [tuple(sides[axis] for axis in axes)]
    while max(shapes[-1][-2:]) > _SMALLEST_LEVEL:
        shapes.append((*shapes[-1][:-2], *(-(-n // 2) for n in shapes[-1][-2:])))
    return shapes


def _fill(level: Any, axes: str, result: Result, previous: Any) -> None:
    """Every chunk of a level; of a smaller one every other row and column of the level before: labels do not mix."""
    height = level.shape[-2]
    for z, plane in np.ndindex(result.shape[:2]):
        outer = tuple({"Z": z, "C": plane}[axis] for axis in axes[:-2])
        for first in range(0, height, _ZARR_CHUNK):
            stop = min(height, first + _ZARR_CHUNK)
            if previous is None:
                level[(*outer, slice(first, stop))] = result.rows(z, plane, first, stop)
            else:
                level[(*outer, slice(first, stop))] = previous[(*outer, slice(2 * first, 2 * stop))][::2, ::2]


def _multiscales(name: str, axes: str, levels: int) -> dict[str, Any]:
    """Metadata of OME-Zarr 0.5."""
    kinds = {"Z": "space", "C": "channel", "Y": "space", "X": "space"}
    datasets = []
    for level in range(levels):
        scale = [2.0**level if axis in "YX" else 1.0 for axis in axes]
        datasets.append({"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
    named = [{"name": axis.lower(), "type": kinds[axis]} for axis in axes]
    return {"version": "0.5", "multiscales": [{"name": name, "axes": named, "datasets": datasets}]}
