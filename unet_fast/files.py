"""Image files in and out: TIFF, OME-TIFF, ImageJ stacks, PNG, JPEG; one array layout whatever the file's.

Readers return truncated stacks in silence, so a TIFF's pages and byte counts are checked against the file first.
Files are written beside their place and renamed, so that none is ever half there.
"""

import logging
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tifffile
from PIL import Image

from .errors import BadInput

__all__ = [
    "AXES",
    "SUFFIXES",
    "TIFF",
    "Stack",
    "as_slices",
    "check_bytes",
    "check_pages",
    "list_images",
    "natural",
    "one_line",
    "plain_mode",
    "read_picture",
    "read_stack",
    "replacing",
    "sizes",
    "sync_folder",
    "writable_folder",
    "write_picture",
    "write_tiff",
]

TIFF = (".tif", ".tiff")
SUFFIXES = (*TIFF, ".png", ".jpg", ".jpeg", ".bmp")
AXES = ("YX", "CYX", "YXC", "ZYX", "ZCYX", "ZYXC")

# what tifffile has to say of a damaged file is in the error; without a handler it would stand on stderr too
logging.getLogger("tifffile").addHandler(logging.NullHandler())


@dataclass(frozen=True, slots=True)
class Stack:
    """The pixels of one file, as slices.

    pixels [D, C, H, W], the file's dtype; `is_stack` says whether the file itself had the axis D.
    """

    path: Path
    pixels: np.ndarray[Any, Any]
    is_stack: bool
    axes: str

    @property
    def names(self) -> list[str]:
        """One name a slice: the file's, with the slice's number where there are several."""
        if not self.is_stack:
            return [self.path.name]
        return [f"{self.path.name}[{z}]" for z in range(len(self.pixels))]


def list_images(path: Path) -> list[Path]:
    """The image files of a folder in natural order (t2 before t10), or the file itself.

    Raises:
        BadInput: there is nothing there, or nothing that can be read.
    """
    if not path.exists():
        raise BadInput(f"{path} does not exist")
    if not path.is_dir():
        if not path.is_file():
            raise BadInput(f"{path} is neither a file nor a folder")
        if path.suffix.lower() not in SUFFIXES:
            raise BadInput(f"{path} must be one of {', '.join(SUFFIXES)}, got {path.suffix or 'no suffix'}")
        return [path]
    found = [p for p in path.iterdir() if p.is_file() and p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]
    if not found:
        raise BadInput(f"{path} has no image in it; expected files ending in {', '.join(SUFFIXES)}")
    # x1 and x01 are one number: the name decides, not the file system
    return sorted(found, key=lambda p: (natural(p), p.name))


def natural(path: Path) -> list[tuple[int, int, str]]:
    parts: list[tuple[int, int, str]] = []
    text = ""
    for character in path.name + "\0":
        if text and character.isdecimal() != text[-1].isdecimal():
            parts.append((0, int(text), "") if text.isdecimal() else (1, 0, text))
            text = ""
        text += character
    return parts


def read_stack(path: Path, *, axes: str | None = None, labels: bool = False) -> Stack:
    """Read one file as slices [D, C, H, W].

    Args:
        path: a TIFF, PNG, JPEG or BMP file.
        axes: one of `AXES`, for a file that does not say, or says it wrongly.
        labels: the file holds ids: a palette's indices are kept, three equal channels are one, JPEG is refused.

    Raises:
        BadInput: the file is missing, damaged, truncated, of a kind that cannot be read, or its axes are unclear.
    """
    if not path.is_file():
        raise BadInput(f"{path} does not exist" if not path.exists() else f"{path} is no file")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise BadInput(f"{path} must be one of {', '.join(SUFFIXES)}, got {path.suffix or 'no suffix'}")
    if labels and suffix in (".jpg", ".jpeg"):
        raise BadInput(f"{path} holds labels as JPEG, which changes ids; save them as PNG or TIFF")
    array, found = _read_tiff(path) if suffix in TIFF else read_picture(path, labels)
    if axes is not None:
        if len(axes) != array.ndim:
            raise BadInput(f"{path} has {array.ndim} axes of {sizes(array.shape)}, axes said {axes}")
        found = axes
    if 0 in array.shape:
        raise BadInput(f"{path} is empty: {sizes(array.shape)}")
    if array.dtype == bool:
        array = array.astype(np.uint8)
    if array.dtype.kind not in "uif" or array.dtype == np.float16:
        raise BadInput(f"{path} must be integer, float32 or float64, got {array.dtype}")
    pixels = as_slices(path, array, found)
    if labels and pixels.shape[1] > 1:
        if not (pixels == pixels[:, :1]).all():
            raise BadInput(
                f"{path} holds labels in {pixels.shape[1]} channels that differ; expected one channel of ids"
            )
        pixels = pixels[:, :1]
    return Stack(path, pixels, any(a not in "CSYX" for a in found), found)


def as_slices(path: Path, array: np.ndarray[Any, Any], axes: str) -> np.ndarray[Any, Any]:
    """[D, C, H, W] of an array whose axes have letters; C and S are channels, whatever piles images up is D.

    A view of the array.

    Raises:
        BadInput: several axes pile up, or there are no rows and columns.
    """
    kept = [i for i, n in enumerate(array.shape) if n > 1 or axes[i] in "YX"]
    piles = [i for i in kept if axes[i] not in "CSYX"]
    channels = [i for i in kept if axes[i] in "CS"]
    if axes.count("Y") != 1 or axes.count("X") != 1 or len(piles) > 1 or len(channels) > 1:
        raise BadInput(
            f"{path} has axes {axes} of {sizes(array.shape)}; expected one stack axis and one channel axis at most, "
            f"axes can be one of {', '.join(AXES)}"
        )
    order = [*piles, *channels, axes.index("Y"), axes.index("X")]
    rest = [i for i in range(array.ndim) if i not in order]
    array = array.transpose(*rest, *order).reshape([array.shape[i] for i in order])
    if not channels:
        array = array[..., None, :, :]
    return array if piles else array[None]


def sizes(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def read_picture(path: Path, labels: bool) -> tuple[np.ndarray[Any, Any], str]:
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None  # microscopes make large images
    try:
        _refuse_deep_colours(path)
        with Image.open(path) as picture:
            array = np.array(picture if picture.mode != "CMYK" and (labels or picture.mode != "P") else _rgb(picture))
    except (BadInput, MemoryError):
        raise
    except Exception as error:  # damage takes a reader anywhere: SyntaxError, OverflowError, struct.error, ...
        raise BadInput(f"{path} cannot be read as an image: {one_line(error)}") from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    if array.ndim == 3 and array.shape[2] in (2, 4) and (array[..., -1] == array[..., -1].flat[0]).all():
        array = array[..., :-1]  # an opacity that is the same everywhere says nothing
        array = array[..., 0] if array.shape[2] == 1 else array
    return array, "YX" if array.ndim == 2 else "YXC"


def _rgb(picture: Image.Image) -> Image.Image:
    # by RGBA: a palette may hold opacities, which RGB has no place for
    return picture.convert("RGBA").convert("RGB") if picture.mode == "P" else picture.convert("RGB")


def _refuse_deep_colours(path: Path) -> None:
    """Pillow keeps 8 of the 16 bits of a PNG in colours, in silence."""
    with path.open("rb") as file:
        head = file.read(26)
    if len(head) == 26 and head[1:4] == b"PNG" and head[24] == 16 and head[25] != 0:
        raise BadInput(f"{path} is a PNG of several channels of 16 bits, of which 8 would be lost; save it as TIFF")


def _read_tiff(path: Path) -> tuple[np.ndarray[Any, Any], str]:
    try:
        check_pages(path)
        with tifffile.TiffFile(path) as tiff:
            if len(tiff.series) != 1:
                raise BadInput(
                    f"{path} holds {len(tiff.series)} images of different kinds; expected one image or stack"
                )
            series = tiff.series[0]
            for number, page in enumerate(series.pages):
                check_bytes(path, number, page, path.stat().st_size)
            array = series.asarray()
            if array.shape != series.shape:
                raise BadInput(f"{path} announces {sizes(series.shape)} but holds {sizes(array.shape)}")
            return array, series.axes
    except (BadInput, MemoryError):
        raise
    except Exception as error:  # damage takes a reader anywhere: zlib.error, TypeError, ZeroDivisionError, ...
        if "imagecodecs" in str(error):
            hint = "pip install imagecodecs reads it"
            raise BadInput(f"{path} is compressed in a way that needs another library; {hint}") from error
        raise BadInput(f"{path} cannot be read as TIFF: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def check_pages(path: Path) -> None:
    """Follow a TIFF's chain of pages to its end: readers stop at a broken link and call it the last page.

    Raises:
        BadInput: it is no TIFF, or the chain leaves the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(16)
        order = {b"II": "<", b"MM": ">"}.get(head[:2])
        if order is None or len(head) < 8:
            raise BadInput(f"{path} is no TIFF: it begins with {head[:4]!r}")
        version = struct.unpack(order + "H", head[2:4])[0]
        if version == 42:
            count, entry, link, offset = "H", 12, "I", struct.unpack(order + "I", head[4:8])[0]
        elif version == 43 and len(head) == 16:
            count, entry, link, offset = "Q", 20, "Q", struct.unpack(order + "Q", head[8:16])[0]
        else:
            raise BadInput(f"{path} is no TIFF: version {version}")
        seen: set[int] = set()
        while offset:
            if offset in seen or offset >= size:
                where = f"page {len(seen)} should begin at byte {offset}"
                raise BadInput(f"{path} is damaged or truncated: {where}, the file has {size}")
            seen.add(offset)
            offset = _next_page(path, file, offset, order, count, entry, link, len(seen) - 1)
        if not seen:
            raise BadInput(f"{path} is a TIFF without a page")


def _next_page(
    path: Path, file: BinaryIO, offset: int, order: str, count: str, entry: int, link: str, page: int
) -> int:
    file.seek(offset)
    try:
        (tags,) = struct.unpack(order + count, file.read(struct.calcsize(count)))
        file.seek(tags * entry, os.SEEK_CUR)
        (following,) = struct.unpack(order + link, file.read(struct.calcsize(link)))
    except struct.error as error:
        raise BadInput(f"{path} is truncated inside the header of page {page}, at byte {offset}") from error
    return int(following)


def check_bytes(path: Path, number: int, page: Any, size: int) -> None:
    """Raise BadInput unless all parts of a TIFF's page lie in a file of `size` bytes."""
    if page is None:
        raise BadInput(f"{path} has no page {number}")
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        if offset + count > size or count == 0:
            what = "is missing" if count == 0 else f"ends at byte {offset + count}"
            raise BadInput(f"{path} is truncated: a part of page {number} {what}, the file has {size} bytes")


@contextmanager
def replacing(path: Path, within: Path | None = None) -> Iterator[Path]:
    """A path to write to, beside `path` or in a folder of the same disk; it takes `path`'s place when the block ends,
    and is removed if that fails."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.stem[:40]}-", suffix=path.suffix, dir=within or path.parent)
        os.close(handle)
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror or error}") from error
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner reads; lab mates are readers too
        temporary.chmod(plain_mode())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror or f'{error}; is the disk full?'}") from error
    finally:
        temporary.unlink(missing_ok=True)


def plain_mode() -> int:
    """The permissions that a new file has."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def sync_folder(path: Path) -> None:
    """Be sure that a new name in a folder outlives a power cut, where the system can do that."""
    try:
        folder = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(folder)
    except OSError:
        pass
    finally:
        os.close(folder)


def writable_folder(path: Path) -> Path:
    """Make the folder, with those above it, and be sure that a file can be made in it.

    Raises:
        BadInput: it cannot be made or written to, or a file is in its place.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except FileExistsError as error:
        raise BadInput(f"{path} must be a folder, a file is in its place") from error
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def write_tiff(path: Path, array: np.ndarray[Any, Any], axes: str) -> None:
    """Write an image or stack with its axes; integers compressed (deflate, which every reader knows).

    An ImageJ file where ImageJ knows the dtype, its display range set so that ids 0 and 1 do not both look black.

    Raises:
        BadInput: the place cannot be written.
    """
    integers = array.dtype.kind == "u"
    compression = "zlib" if integers else None
    with replacing(path) as temporary:
        # of an image one pixel wide, tifffile's ImageJ files lose their axes
        if array.dtype in (np.uint8, np.uint16, np.float32) and array.nbytes < 2**31 and array.shape[-1] > 1:
            top = int(array.max()) if integers else 1
            metadata = {"axes": axes, "min": 0.0, "max": float(max(1, top))}
            tifffile.imwrite(
                temporary, array, imagej=True, metadata=metadata, photometric="minisblack", compression=compression
            )
        else:
            tifffile.imwrite(
                temporary,
                array,
                bigtiff=array.nbytes >= 2**31,
                photometric="minisblack",
                metadata={"axes": axes},
                compression=compression,
            )


def write_picture(path: Path, array: np.ndarray[Any, Any]) -> None:
    """Write a PNG: labels [H, W] up to 255 with a palette (0 black, ids in colours, readable as the same ids), ids
    above that as 16 bits; colours [H, W, 3] uint8 as they are.

    Raises:
        BadInput: the place cannot be written, or an id does not fit 16 bits.
    """
    if array.ndim == 2 and array.max(initial=0) > 65535:
        raise BadInput(f"{path} cannot hold id {array.max()}; PNG ends at 65535, use .tif")
    with replacing(path) as temporary:
        if array.ndim == 3:
            picture = Image.fromarray(array)
        elif array.max(initial=0) > 255:
            picture = Image.fromarray(array.astype(np.uint16))
        else:
            picture = Image.fromarray(array.astype(np.uint8))
            picture.putpalette(_palette().tobytes())
        picture.save(temporary)


def _palette() -> np.ndarray[Any, Any]:
    """256 colours: black, white for the first class, then hues that neighbours in number do not share."""
    turn = (np.arange(256)[:, None] * 0.618034 + np.array([0, 1 / 3, 2 / 3])) % 1
    colours = (110 + 145 * np.abs(2 * turn - 1)).astype(np.uint8)
    colours[0], colours[1] = 0, 255
    return colours
