"""Images on disk, read window by window: what is larger than memory is never read at once.

A source has `shape` [D, C, H, W], a dtype, and `read(z, rows, columns)`, which gives [C, rows, columns]. Uncompressed
TIFF and NumPy files are mapped; of compressed TIFF (strips or tiles) and Zarr (2 and 3, OME-Zarr 0.4 and 0.5) each
chunk is decoded once (once a slice, where a Zarr's span several), and kept as long as windows, which come row by row,
can need it; PNG, JPEG and BMP can only be decoded as a whole.
"""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import tifffile
from PIL import Image

from .errors import BadInput
from .files import (
    AXES,
    SUFFIXES,
    TIFF,
    as_slices,
    check_bytes,
    check_pages,
    natural,
    one_line,
    read_picture,
    sizes,
)
from .units import readable

__all__ = ["SOURCES", "ArraySource", "Source", "fingerprint", "is_zarr", "list_sources", "of_axes", "open_source"]

Array = np.ndarray[Any, Any]

# what a window can be read from: files, and folders that are Zarr
SOURCES = (*SUFFIXES, ".npy", ".zarr")

# chunks are kept up to this many bytes in any case: small images are decoded once, whatever reads them how often
_ALWAYS_KEPT = 32 * 2**20

_ZARR_MARKS = ("zarr.json", ".zarray", ".zgroup")


class Source(Protocol):
    """What windows are read from."""

    name: str
    shape: tuple[int, int, int, int]
    dtype: np.dtype[Any]
    is_stack: bool

    def read(self, z: int, rows: slice, columns: slice) -> Array:
        """[C, rows, columns]; the slices have a start and a stop, inside the image."""

    def reserve(self, rows: int) -> int:
        """Keep what windows of so many rows share with those that come next; returns how many rows it was for."""

    def held_bytes(self, rows: int) -> int:
        """Bytes of memory that this takes while windows of so many rows are read."""

    def close(self) -> None:
        """Let go of the file."""


class ArraySource:
    """An array that lies in memory or is mapped into it, or any array-like that is read by slices.

    Args:
        array: anything with shape, dtype and `[z, c, rows, columns]`.
        held: bytes of memory that are this array's alone.
    """

    def __init__(self, array: Any, *, name: str = "image", is_stack: bool = False, held: int = 0) -> None:
        self.array, self.name, self.is_stack, self.held = array, name, is_stack, held
        self.shape: tuple[int, int, int, int] = tuple(array.shape)
        self.dtype = np.dtype(array.dtype)

    def read(self, z: int, rows: slice, columns: slice) -> Array:
        return np.asarray(self.array[z, :, rows, columns])

    def reserve(self, rows: int) -> int:
        return rows

    def held_bytes(self, rows: int) -> int:  # noqa: ARG002 (as of every source)
        return self.held

    def close(self) -> None:
        pass


class _Chunked:
    """What lies on disk in compressed chunks; those used last are kept.

    `chunk` is the rows and columns of one, as it is kept; `piece` the pixels that are decoded for it.
    """

    def __init__(
        self, name: str, shape: Sequence[int], dtype: Any, chunk: tuple[int, int], piece: int, is_stack: bool
    ) -> None:
        self.name, self.is_stack, self.chunk = name, is_stack, chunk
        self.shape: tuple[int, int, int, int] = (shape[0], shape[1], shape[2], shape[3])
        self.dtype = np.dtype(dtype)
        self.piece = piece * self.dtype.itemsize
        self._kept: OrderedDict[tuple[int, ...], Array] = OrderedDict()
        self._bytes, self._capacity, self._rows = 0, _ALWAYS_KEPT, 0
        # a chunk is never decoded twice, as long as windows come row by row
        self.decoded = 0

    def reserve(self, rows: int) -> int:
        before, self._rows = self._rows, rows
        self._capacity = self.held_bytes(rows)
        return before

    def held_bytes(self, rows: int) -> int:
        depth, channels, *sides = self.shape
        height, width = (-(-n // chunk) * chunk for n, chunk in zip(sides, self.chunk, strict=True))
        row = width * channels * self.dtype.itemsize
        # windows begin and end inside a chunk
        band = min(height, rows + 2 * self.chunk[0]) * row
        return min(max(_ALWAYS_KEPT, band), depth * height * row)

    def close(self) -> None:
        self._kept.clear()
        self._bytes = 0

    def read(self, z: int, rows: slice, columns: slice) -> Array:
        out = np.empty((self.shape[1], rows.stop - rows.start, columns.stop - columns.start), self.dtype)
        high, wide = self.chunk
        # channels last: what the next windows need is then always what was used last
        for i, j, channel in product(
            range(rows.start // high, -(-rows.stop // high)),
            range(columns.start // wide, -(-columns.stop // wide)),
            range(self.shape[1]),
        ):
            pixels = self._chunk(z, channel, i, j)
            # first and last row and column that are wanted, in the image
            top, left = max(rows.start, i * high), max(columns.start, j * wide)
            bottom, right = min(rows.stop, (i + 1) * high), min(columns.stop, (j + 1) * wide)
            out[channel, top - rows.start : bottom - rows.start, left - columns.start : right - columns.start] = pixels[
                top - i * high : bottom - i * high, left - j * wide : right - j * wide
            ]
        return out

    def _chunk(self, z: int, channel: int, i: int, j: int) -> Array:
        """[rows, columns] of a chunk."""
        *key, sample = self._key(z, channel, i, j)
        place = tuple(key)
        if place not in self._kept:
            pixels = self._decode(place)
            self.decoded += 1
            self._kept[place] = pixels
            self._bytes += pixels.nbytes
            while self._bytes > self._capacity and len(self._kept) > 1:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes
        self._kept.move_to_end(place)
        pixels = self._kept[place]
        return pixels[..., sample] if pixels.ndim == 3 else pixels

    def _key(self, z: int, channel: int, i: int, j: int) -> tuple[int, ...]:
        """What is decoded together, and which of its samples is this channel."""
        return z, channel, i, j, 0

    def _decode(self, place: tuple[int, ...]) -> Array:
        raise NotImplementedError


class _TiffChunks(_Chunked):
    """Pages of a TIFF, in strips or tiles; `planes` [D, C] says which page, and which of its samples."""

    def __init__(
        self, path: Path, tiff: tifffile.TiffFile, planes: Array, samples: int, shape: Sequence[int], is_stack: bool
    ) -> None:
        self.path, self.tiff, self.planes, self.samples = path, tiff, planes, samples
        series: Any = tiff.series[0]
        self.pages = series.pages
        page = self.pages[0].keyframe
        # planar: each sample has segments of its own
        self.planar = samples > 1 and page.axes.startswith("S")
        rows, columns = page.rowsperstrip, page.imagewidth
        if page.is_tiled:
            rows, columns = page.tilelength, page.tilewidth
        chunk = min(rows, page.imagelength) if not page.is_tiled else rows, columns
        self.grid = -(-page.imagelength // chunk[0]), -(-page.imagewidth // chunk[1])
        piece = chunk[0] * chunk[1] * (1 if self.planar else samples)
        super().__init__(path.name, shape, page.dtype, chunk, piece, is_stack)

    def close(self) -> None:
        super().close()
        self.tiff.close()

    def _key(self, z: int, channel: int, i: int, j: int) -> tuple[int, ...]:
        page, sample = divmod(int(self.planes[z, channel]), self.samples)
        number = i * self.grid[1] + j
        if self.planar:
            return page, number + sample * self.grid[0] * self.grid[1], 0
        return page, number, sample

    def _decode(self, place: tuple[int, ...]) -> Array:
        number, segment = place
        page = self.pages[number]
        keyframe, file = page.keyframe, page.parent.filehandle
        more = {"jpegtables": page.jpegtables, "jpegheader": keyframe.jpegheader} if _is_jpeg(keyframe) else {}
        try:
            if file.closed:
                # of a file beside this one
                file.open()
            file.seek(page.dataoffsets[segment])
            encoded = file.read(page.databytecounts[segment])
            if len(encoded) != page.databytecounts[segment]:
                raise BadInput(f"{self.path} ended while it was read, at a part of page {number}")
            pixels, _, _ = keyframe.decode(encoded, segment, _fullsize=keyframe.is_tiled, **more)
        except (BadInput, MemoryError):
            raise
        except Exception as error:  # damage takes a decoder anywhere
            raise _unreadable(self.path, error, f"part {segment} of page {number} ") from error
        if pixels is None:
            raise BadInput(f"{self.path} has no part {segment} of page {number}")
        # depth, rows, columns, samples
        return pixels[0] if pixels.shape[-1] > 1 else pixels[0, ..., 0]


class _MappedPlanes:
    """Uncompressed pages of a TIFF, wherever they lie in the file."""

    def __init__(self, path: Path, tiff: tifffile.TiffFile, planes: Array, shape: Sequence[int]) -> None:
        self.path, self.planes, self.shape = path, planes, tuple(shape)
        self.dtype = np.dtype(tiff.series[0].dtype).newbyteorder(tiff.byteorder)
        pages: Any = tiff.series[0].pages
        self.offsets = [page.dataoffsets[0] for page in pages]
        size = path.stat().st_size
        for number, page in enumerate(pages):
            if (end := page.dataoffsets[0] + page.nbytes) > size:
                raise BadInput(f"{path} is truncated: page {number} ends at byte {end}, the file has {size} bytes")

    def __getitem__(self, where: tuple[int, slice, slice, slice]) -> Array:
        z, _, rows, columns = where
        return np.stack([self._plane(int(plane))[rows, columns] for plane in self.planes[z]])

    def _plane(self, plane: int) -> Array:
        return np.memmap(self.path, self.dtype, "r", self.offsets[plane], self.shape[2:])


class _ZarrChunks(_Chunked):
    """An array of a Zarr store, whose axes are in any order."""

    def __init__(self, path: Path, array: Any, axes: str) -> None:
        self.path, self.array = path, array
        # which axis of the array each of D, C, Y, X is
        view: Any = as_slices(path, _Shape(array.shape), axes)  # type: ignore[arg-type]
        self.order: tuple[int | None, ...] = view.order
        is_stack = view.order[0] is not None
        # channels that lie in one chunk are decoded together
        self.together, *chunk = (1 if k is None else min(array.chunks[k], array.shape[k]) for k in view.order[1:])
        piece = int(np.prod(array.chunks, dtype=object))
        super().__init__(path.name, view.shape, array.dtype, (chunk[0], chunk[1]), piece, is_stack)

    def _key(self, z: int, channel: int, i: int, j: int) -> tuple[int, ...]:
        return z, channel // self.together, i, j, channel % self.together

    def _decode(self, place: tuple[int, ...]) -> Array:
        z, group, i, j = place
        where: list[Any] = [0] * self.array.ndim
        starts = zip((group, i, j), (self.together, *self.chunk), strict=True)
        for axis, index in zip(self.order, (z, *(slice(k * n, (k + 1) * n) for k, n in starts)), strict=True):
            if axis is not None:
                where[axis] = index
        try:
            pixels = np.asarray(self.array[tuple(where)])
        except Exception as error:  # a checksum, a codec, a chunk that is no file
            raise _unreadable(self.path, error, f"chunk {i}, {j} ") from error
        # rows, columns, channels
        channels, rows, columns = self.order[1:]
        sliced = sorted(axis for axis in self.order[1:] if axis is not None)
        return pixels.transpose([sliced.index(axis) for axis in (rows, columns, channels) if axis is not None])


class _Shape:
    """What `as_slices` does to an array's axes, without one: for arrays that cannot be transposed where they lie."""

    def __init__(self, shape: Sequence[int], order: Sequence[int | None] | None = None) -> None:
        self.shape, self.ndim = tuple(shape), len(shape)
        self.order: tuple[int | None, ...] = tuple(range(self.ndim) if order is None else order)

    def transpose(self, *order: int) -> "_Shape":
        return _Shape([self.shape[i] for i in order], order)

    def reshape(self, shape: Sequence[int]) -> "_Shape":
        # axes of one pixel lie in front, and fall off
        return _Shape(shape, self.order[self.ndim - len(shape) :])

    def __getitem__(self, where: Any) -> "_Shape":
        if where is None:
            return _Shape((1, *self.shape), (None, *self.order))
        # [..., None, :, :]
        return _Shape((*self.shape[:-2], 1, *self.shape[-2:]), (*self.order[:-2], None, *self.order[-2:]))


def list_sources(paths: Sequence[Path]) -> list[Path]:
    """The images of files and folders, folders in natural order (t2 before t10); a Zarr folder is an image.

    Raises:
        BadInput: there is nothing there, or nothing that can be read.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise BadInput(f"{path} does not exist")
        if not path.is_dir() or is_zarr(path):
            if not path.is_dir() and not path.is_file():
                raise BadInput(f"{path} is neither a file nor a folder")
            found.append(path)
            continue
        inside = [p for p in path.iterdir() if p.suffix.lower() in SOURCES and not p.name.startswith(".")]
        inside = [p for p in inside if (is_zarr(p) if p.is_dir() else p.is_file())]
        if not inside:
            raise BadInput(f"{path} has no image in it; expected files ending in {', '.join(SOURCES)}")
        found += sorted(inside, key=lambda p: (natural(p), p.name))
    return found


def is_zarr(path: Path) -> bool:
    """Whether a folder is a Zarr array or group."""
    return path.is_dir() and any((path / mark).is_file() for mark in _ZARR_MARKS)


def open_source(path: Path, *, axes: str | None = None, memory: int | None = None) -> "ArraySource | _Chunked":
    """Open an image to be read in windows; its structure is checked, its pixels are not yet read.

    Args:
        path: a TIFF, PNG, JPEG, BMP or NumPy (.npy) file, or a folder that is Zarr.
        axes: one of `unet_fast.files.AXES`, for an image that does not say, or says it wrongly.
        memory: bytes that may be taken to decode what comes in one piece; None: four fifths of what the machine has.

    Raises:
        BadInput: there is none, it is damaged, truncated or of a kind that cannot be read, its axes are unclear, or it
            comes in one piece that is too large.
    """
    limit = int(0.8 * _machines_bytes()) if memory is None else memory
    suffix = path.suffix.lower()
    if is_zarr(path):
        source: ArraySource | _Chunked = _open_zarr(path, axes)
    elif not path.is_file():
        raise BadInput(f"{path} does not exist" if not path.exists() else f"{path} is no image")
    elif suffix in TIFF:
        source = _open_tiff(path, axes, limit)
    elif suffix == ".npy":
        source = _open_numpy(path, axes)
    elif suffix in SUFFIXES:
        source = _open_picture(path, axes, limit)
    else:
        raise BadInput(f"{path} must be one of {', '.join(SOURCES)}, got {path.suffix or 'no suffix'}")
    try:
        _check(path, source, limit)
    except BadInput:
        source.close()
        raise
    return source


def _check(path: Path, source: ArraySource | _Chunked, limit: int) -> None:
    if 0 in source.shape:
        raise BadInput(f"{path} is empty: {sizes(source.shape)}")
    if source.dtype.kind not in "uifb":
        raise BadInput(f"{path} must be integer or floating, got {source.dtype}")
    if isinstance(source, _Chunked) and source.piece > limit:
        raise BadInput(
            f"{path} is compressed in pieces of {readable(source.piece)}, which is more than the {readable(limit)} "
            f"there are; save it in tiles"
        )


def fingerprint(path: Path) -> dict[str, Any]:
    """What tells whether a file is still the same: size, and a checksum of all of it up to 64 MB, of both ends and the
    time of its last change beyond that."""
    if path.is_dir():
        # a Zarr folder: its description, and how many chunks it has
        files = sorted(p for p in path.rglob("*") if p.is_file())
        digest = hashlib.sha256("".join(f"{p.relative_to(path)} {p.stat().st_size}\n" for p in files).encode())
        for each in files:
            if each.name in (*_ZARR_MARKS, ".zattrs"):
                digest.update(each.read_bytes())
        changed = max((p.stat().st_mtime_ns for p in files), default=0)
        return {"files": len(files), "changed": changed, "sha256": digest.hexdigest()}
    size, end = path.stat().st_size, 32 * 2**20
    digest = hashlib.sha256()
    with path.open("rb") as file:
        _update(digest, file, end)
        if size > 2 * end:
            file.seek(-end, os.SEEK_END)
        _update(digest, file, end)
    found = {"bytes": size, "sha256": digest.hexdigest()}
    return {**found, "changed": path.stat().st_mtime_ns} if size > 2 * end else found


def _update(digest: Any, file: BinaryIO, count: int) -> None:
    """Take so many bytes into account, a little at a time."""
    while count > 0 and (part := file.read(min(count, 2**20))):
        digest.update(part)
        count -= len(part)


def of_axes(array: Any, axes: str) -> Any:
    """An array, or an array-like that is only read by slices, as [D, C, H, W]; no axis of one pixel is dropped."""
    if not isinstance(array, np.ndarray):
        return _Lazy(array, axes)
    array = np.moveaxis(array, -1, 0) if axes == "YXC" else array
    if "C" not in axes:
        array = array[..., None, :, :]
    return array if "Z" in axes else array[None]


class _Lazy:
    """What only has a shape, a dtype and slices."""

    def __init__(self, array: Any, axes: str) -> None:
        self.array, self.axes, self.dtype = array, axes, np.dtype(array.dtype)
        sizes_of = dict(zip(axes, array.shape, strict=True))
        self.shape = tuple(int(sizes_of.get(axis, 1)) for axis in "ZCYX")

    def __getitem__(self, where: tuple[int, slice, slice, slice]) -> Array:
        wanted = dict(zip("ZCYX", where, strict=True))
        pixels = np.asarray(self.array[tuple(wanted[axis] for axis in self.axes)])
        pixels = np.moveaxis(pixels, -1, 0) if self.axes == "YXC" else pixels
        return pixels if "C" in self.axes else pixels[None]


def _with_slices(path: Path, array: Any, axes: str, *, held: int = 0) -> ArraySource:
    """An array with axes of its own as a source."""
    pixels = as_slices(path, array, axes)
    piles = [n for n, axis in zip(array.shape, axes, strict=True) if axis not in "CSYX" and n > 1]
    named = any(axis not in "CSYX" for axis in axes)
    return ArraySource(pixels, name=path.name, is_stack=bool(piles) or named, held=held)


def _machines_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 8 * 10**9


def _letters(path: Path, shape: Sequence[int], axes: str | None, own: str | None) -> str:
    """The axes' letters: those said, those the file says, rows and columns where there are two."""
    has = f"{path} has {len(shape)} axes of {sizes(tuple(shape))}"
    if axes is not None:
        if len(axes) != len(shape):
            raise BadInput(f"{has}, axes said {axes}")
        return axes
    if own is not None:
        if len(own) != len(shape):
            raise BadInput(f"{has}, and says that they are {own}; say axes, one of {', '.join(AXES)}")
        return own
    if len(shape) == 2:
        return "YX"
    raise BadInput(f"{has} and does not say which; say axes, one of {', '.join(AXES)}")


def _open_numpy(path: Path, axes: str | None) -> ArraySource:
    try:
        # a size beyond all numbers would be another one
        with np.errstate(over="raise"):
            array = np.lib.format.open_memmap(path, mode="r")
    except MemoryError:
        raise
    except Exception as error:  # damage takes a reader anywhere
        raise BadInput(f"{path} cannot be read as a NumPy array: {one_line(error)}") from error
    if 0 in array.shape:
        raise BadInput(f"{path} is empty: {sizes(array.shape)}")
    return _with_slices(path, array, _letters(path, array.shape, axes, None))


def _open_picture(path: Path, axes: str | None, limit: int) -> ArraySource:
    pillows, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            depth = len(picture.getbands()) * (4 if picture.mode in ("I", "F") else 2 if ";16" in picture.mode else 1)
    except MemoryError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from error
    finally:
        Image.MAX_IMAGE_PIXELS = pillows
    # Pillow's own copy, and the array
    needed = 2 * width * height * depth
    if needed > limit:
        raise BadInput(
            f"{path} is {height} x {width} and takes {readable(needed)} to decode, which only goes in one piece, of "
            f"{readable(limit)} there are; save it as TIFF"
        )
    array, own = read_picture(path, labels=False)
    own = _letters(path, array.shape, axes, own)
    return _with_slices(path, array, own, held=array.nbytes)


def _open_tiff(path: Path, axes: str | None, limit: int) -> ArraySource | _Chunked:
    tiff = source = None
    try:
        check_pages(path)
        tiff = tifffile.TiffFile(path)
        source = _windows_of(path, tiff, axes, limit)
        return source
    except (BadInput, MemoryError):
        raise
    except Exception as error:  # damage takes a reader anywhere
        raise _unreadable(path, error) from error
    finally:
        if tiff is not None and not isinstance(source, _TiffChunks):
            tiff.close()


def _windows_of(path: Path, tiff: tifffile.TiffFile, axes: str | None, limit: int) -> ArraySource | _Chunked:
    if len(tiff.series) != 1:
        raise BadInput(f"{path} holds {len(tiff.series)} images of different kinds; expected one image or stack")
    series: Any = tiff.series[0]
    size = path.stat().st_size
    for number, page in enumerate(series.pages):
        # of an OME-TIFF, some may lie in files beside this one
        check_bytes(path, number, page, size if page is None else page.parent.filehandle.size)
    letters = _letters(path, series.shape, axes, series.axes)
    page = series.pages[0].keyframe
    if page.dtype is None:
        raise BadInput(f"{path} has pixels of a kind that is unknown here")
    if series.dataoffset is not None and not series.is_multifile:
        needed = series.dataoffset + int(np.prod(series.shape, dtype=object)) * series.dtype.itemsize
        if needed > size:
            raise BadInput(f"{path} is truncated: its pixels end at byte {needed}, the file has {size} bytes")
        dtype = np.dtype(series.dtype).newbyteorder(tiff.byteorder)
        mapped = np.memmap(path, dtype, "r", series.dataoffset, series.shape)
        return _with_slices(path, mapped, letters)
    leading = series.ndim - len(page.axes)
    plain = set(page.axes) <= set("SYX") and page.shape == series.shape[leading:]
    whole_pages = len(series.pages) == int(np.prod(series.shape[:leading], dtype=np.int64))
    same_place = all(letters[leading + i] == axis for i, axis in enumerate(page.axes) if axis in "YX")
    if plain and whole_pages and same_place and all(p.keyframe.chunks == page.chunks for p in series.pages):
        # where the planes of the image lie in the file: a page, and a sample of it
        places = np.arange(int(np.prod([n for n, a in zip(series.shape, series.axes, strict=True) if a not in "YX"])))
        one = [1 if axis in "YX" else n for n, axis in zip(series.shape, series.axes, strict=True)]
        samples = page.shape[page.axes.index("S")] if "S" in page.axes else 1
        planes = as_slices(path, places.reshape(one), letters)
        shape = (*planes.shape[:2], *(series.shape[letters.index(axis)] for axis in "YX"))
        is_stack = any(axis not in "CSYX" for axis in letters)
        if all(_is_mapped(p) for p in series.pages) and not series.is_multifile:
            planes_in_file = _MappedPlanes(path, tiff, planes[:, :, 0, 0], shape)
            return ArraySource(planes_in_file, name=path.name, is_stack=is_stack)
        return _TiffChunks(path, tiff, planes[:, :, 0, 0], samples, shape, is_stack)
    if series.nbytes > limit:
        raise BadInput(
            f"{path} takes {readable(series.nbytes)} to decode, which goes only in one piece here, of "
            f"{readable(limit)} there are"
        )
    array = series.asarray()
    if array.shape != series.shape:
        raise BadInput(f"{path} announces {sizes(series.shape)} but holds {sizes(array.shape)}")
    return _with_slices(path, array, letters, held=array.nbytes)


def _is_mapped(page: Any) -> bool:
    """Whether a page's pixels lie in the file as they are, in one piece."""
    starts, counts = page.dataoffsets, page.databytecounts
    follows = all(a + n == b for a, n, b in zip(starts, counts, starts[1:], strict=False))
    return bool(
        page.keyframe.is_memmappable and not page.keyframe.is_tiled and follows and "S" not in page.keyframe.axes
    )


def _is_jpeg(page: Any) -> bool:
    # JPEG in its three spellings
    return page.compression in (6, 7, 34892, 33007)


def _unreadable(path: Path, error: Exception, where: str = "") -> BadInput:
    if "imagecodecs" in str(error):
        return BadInput(f"{path} is compressed in a way that needs another library; pip install imagecodecs reads it")
    if path.suffix.lower() in TIFF:
        return BadInput(f"{path} cannot be read as TIFF: {where}{one_line(error)}")
    return BadInput(f"{path} cannot be read: {where}{one_line(error)}")


def _open_zarr(path: Path, axes: str | None) -> _Chunked:
    try:
        import zarr
    except ImportError as error:
        raise BadInput(f"{path} is Zarr, which needs another library; pip install 'zarr>=3' reads it") from error
    try:
        found = zarr.open(path, mode="r")
        own = None
        if isinstance(found, zarr.Group):
            about = dict(found.attrs)
            scales = about.get("ome", about).get("multiscales")
            if scales:
                own = "".join(axis["name"][0] for axis in scales[0]["axes"]).upper()
                found = found[scales[0]["datasets"][0]["path"]]
            else:
                arrays = [name for name, _ in found.arrays()]
                if len(arrays) != 1:
                    raise BadInput(
                        f"{path} holds {len(arrays)} arrays and does not say which is the image; name one of them: "
                        f"{', '.join(f'{path.name}/{name}' for name in arrays[:5]) or 'there is none'}"
                    )
                found = found[arrays[0]]
        names = getattr(found.metadata, "dimension_names", None)
        if own is None and names and all(names):
            own = "".join(name[0] for name in names).upper()
        if 0 in found.shape or 0 in found.chunks:
            raise BadInput(f"{path} is empty: {sizes(found.shape)} in chunks of {sizes(found.chunks)}")
        return _ZarrChunks(path, found, _letters(path, found.shape, axes, own))
    except (BadInput, MemoryError):
        raise
    except Exception as error:  # damage takes a reader anywhere
        raise _unreadable(path, error) from error
