"""Images read in windows: the pixels of the whole file, whatever its layout; each chunk is decoded once; what is
damaged, missing or announces more than it holds is refused with a sentence, and takes no memory.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from tests.proof.properties import given, settings, st
from unet_fast import sources
from unet_fast.errors import BadInput
from unet_fast.files import read_stack
from unet_fast.sources import ArraySource, fingerprint, is_zarr, list_sources, of_axes, open_source

Array = np.ndarray[Any, Any]

few = settings(derandomize=True, database=None, deadline=None, max_examples=8)
ordinary = settings(derandomize=True, database=None, deadline=None, max_examples=60)

# chunks of these sides divide neither
H, W = 45, 61


@dataclass(frozen=True, slots=True)
class Written:
    """An image file, and what must be read from it."""

    path: Path
    # [D, C, H, W]
    pixels: Array
    is_stack: bool
    axes: str | None = None


def _pixels(*shape: int, dtype: Any = "u2", seed: int = 0) -> Array:
    """Numbers that all differ as far as the dtype goes, in no order."""
    values = np.random.default_rng(seed).permutation(int(np.prod(shape))).reshape(shape)
    if np.dtype(dtype).kind == "b":
        return values % 2 == 1
    return (values - (1000 if np.dtype(dtype).kind in "if" else 0)).astype(dtype)


# [D, C, H, W] of the shape that belongs to axes
AS_SLICES: dict[str, Callable[[Array], Array]] = {
    "YX": lambda a: a[None, None],
    "XY": lambda a: a.T[None, None],
    "CYX": lambda a: a[None],
    "YXC": lambda a: a.transpose(2, 0, 1)[None],
    "ZYX": lambda a: a[:, None],
    "ZCYX": lambda a: a,
    "CZYX": lambda a: a.transpose(1, 0, 2, 3),
    "ZYXC": lambda a: a.transpose(0, 3, 1, 2),
    "XCYZ": lambda a: a.transpose(3, 1, 2, 0),
    "TCZYX": lambda a: a[:, :, 0] if a.shape[0] > 1 else a[0].transpose(1, 0, 2, 3),
}
SIZES = {"T": 1, "Z": 3, "C": 2, "Y": H, "X": W}


def _of_axes(axes: str, dtype: Any = "u2", **sizes: int) -> Array:
    return _pixels(*[{**SIZES, **sizes}[axis] for axis in axes], dtype=dtype)


# ---- TIFF


def _write_tiff(
    path: Path, height: int, width: int, parts: Sequence[bytes], *, places: int | None = None, backwards: bool = False,
    compression: int = 1, bits: int = 8, samples: int = 1, rows: int | None = None, tile: int | None = None,
    counts: Sequence[int] | None = None,
) -> Path:  # fmt: skip
    """A TIFF of one page, by hand: what no library would write. `places`: so many strips or tiles, all of them the
    first part."""
    offsets = list(np.cumsum([8, *map(len, parts)])[:-1])
    offsets, sizes = (offsets[::-1], [*map(len, parts)][::-1]) if backwards else (offsets, [*map(len, parts)])
    if places is not None:
        offsets, sizes = [8] * places, [len(parts[0])] * places
    sizes = sizes if counts is None else list(counts)
    body = b"".join(parts) + bytes(sum(map(len, parts)) % 2)
    entries = {256: width, 257: height, 258: bits, 259: compression, 262: 1, 277: samples}
    entries |= {322: tile, 323: tile} if tile else {278: rows or height}
    for tag, values in ((324 if tile else 273, offsets), (325 if tile else 279, sizes)):
        entries[tag] = values[0] if len(values) == 1 else 8 + len(body)
        body += b"" if len(values) == 1 else struct.pack(f"<{len(values)}I", *values)
    count = {tag: len(offsets) if tag in (273, 324) else len(sizes) if tag in (279, 325) else 1 for tag in entries}
    page = b"".join(struct.pack("<HHII", tag, 4, count[tag], entries[tag]) for tag in sorted(entries))
    head = b"II*\0" + struct.pack("<I", 8 + len(body))
    path.write_bytes(head + body + struct.pack("<H", len(entries)) + page + bytes(4))
    return path


def _tiff(axes: str, dtype: Any = "u2", *, said: str | None = None, **options: Any) -> Callable[[Path], Written]:
    """As tifffile writes it; `said`: axes that are given when it is opened."""

    def write(folder: Path) -> Written:
        array = _of_axes(axes, dtype)
        tifffile.imwrite(folder / "x.tif", array, **{"photometric": "minisblack", **options})
        return Written(folder / "x.tif", AS_SLICES[axes](array), "Z" in axes, said)

    return write


def _colours(order: str, dtype: Any = "u1", **options: Any) -> Callable[[Path], Written]:
    """Pages of three samples: "YXS" together, "SYX" apart; with a Z in front several of them."""

    def write(folder: Path) -> Written:
        array = _pixels(*[{"Z": 2, "S": 3, "Y": H, "X": W}[axis] for axis in order], dtype=dtype)
        planar = "contig" if order.endswith("S") else "separate"
        tifffile.imwrite(folder / "x.tif", array, photometric="rgb", planarconfig=planar, **options)
        return Written(folder / "x.tif", AS_SLICES[order.replace("S", "C")](array), "Z" in order)

    return write


def _page_by_page(
    dtype: Any = "u2", words: Sequence[str] = ("", "", ""), *, big_endian: bool = False, **options: Any
) -> Callable[[Path], Written]:
    """Pages that do not follow each other in the file; with texts between them, not even at even bytes."""

    def write(folder: Path) -> Written:
        array = _of_axes("ZYX", dtype)
        with tifffile.TiffWriter(folder / "x.tif", byteorder=">" if big_endian else "<") as tiff:
            for page, text in zip(array, words, strict=True):
                more = {"description": text} if text else {}
                tiff.write(page, photometric="minisblack", metadata=None, contiguous=False, **more, **options)
        return Written(folder / "x.tif", array[:, None], True)

    return write


def _scattered(folder: Path) -> Written:
    """Strips of raw pixels that lie in the file from the last to the first."""
    array = _of_axes("YX")
    strips = [array[i : i + 7].tobytes() for i in range(0, H, 7)]
    _write_tiff(folder / "x.tif", H, W, strips[::-1], backwards=True, bits=16, rows=7)
    return Written(folder / "x.tif", array[None, None], False)


def _swapped(folder: Path) -> Written:
    """Raw pages in strips that follow each other, but for the first two of the second page."""
    array, path = _of_axes("ZYX"), folder / "x.ome.tif"
    tifffile.imwrite(path, array, photometric="minisblack", rowsperstrip=8, ome=True, metadata={"axes": "ZYX"})
    with tifffile.TiffFile(path) as tiff:
        offsets = tiff.pages[1].tags[273]
        assert offsets.dtype == 4
    content = bytearray(path.read_bytes())
    first, second, end = (offsets.valueoffset + 4 * n for n in range(3))
    content[first:second], content[second:end] = content[second:end], content[first:second]
    path.write_bytes(content)
    array[1, :16] = np.roll(array[1, :16], 8, axis=0)
    return Written(path, array[:, None], True)


def _two_files(folder: Path, dtype: Any = "u1", **options: Any) -> Written:
    """An OME-TIFF whose second slice is in another file, after a page of something else: in its place it would follow
    the first slice without a gap."""
    array = _of_axes("ZYX", dtype)[:2]
    names = ("x.ome.tif", "other.ome.tif")
    ids = [f"urn:uuid:0000000{i}-0000-0000-0000-000000000000" for i in (1, 2)]
    data = "".join(
        f'<TiffData IFD="{z}" FirstZ="{z}" FirstC="0" FirstT="0" PlaneCount="1"><UUID FileName="{name}">{uuid}</UUID>'
        "</TiffData>"
        for z, (name, uuid) in enumerate(zip(names, ids, strict=True))
    )
    for z, (name, uuid) in enumerate(zip(names, ids, strict=True)):
        text = (
            f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="{uuid}"><Image ID="Image:0">'
            f'<Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="{array.dtype}" SizeX="{W}" SizeY="{H}" SizeZ="2" '
            f'SizeC="1" SizeT="1"><Channel ID="Channel:0:0" SamplesPerPixel="1"/>{data}</Pixels></Image></OME>'
        )
        pages = array[:1] if z == 0 else np.stack([np.full_like(array[0], 7), array[1]])
        tifffile.imwrite(folder / name, pages, description=text, metadata=None, photometric="minisblack", **options)
    return Written(folder / names[0], array[:, None], True)


def _pyramid(folder: Path) -> Written:
    array = _of_axes("YX")
    with tifffile.TiffWriter(folder / "x.ome.tif", ome=True) as tiff:
        more: dict[str, Any] = {"tile": (16, 16), "compression": "zlib", "photometric": "minisblack"}
        tiff.write(array, subifds=1, metadata={"axes": "YX"}, **more)
        tiff.write(array[::2, ::2], subfiletype=1, **more)
    return Written(folder / "x.ome.tif", array[None, None], False)


def _lossy(shape: tuple[int, ...], **options: Any) -> Callable[[Path], Written]:
    def write(folder: Path) -> Written:
        array = np.random.default_rng(0).integers(0, 256, shape).astype("u1")
        tifffile.imwrite(folder / "x.tif", array, compression="jpeg", **options)
        return Written(folder / "x.tif", read_stack(folder / "x.tif").pixels, False)

    return write


TIFFS: dict[str, Callable[[Path], Written]] = {
    # mapped
    "contiguous": _tiff("ZYX"),
    "one page": _tiff("YX", "u1"),
    "strips in order": _tiff("ZYX", rowsperstrip=5, metadata=None),
    "big-endian": _tiff("ZYX", byteorder=">"),
    "big-endian, no metadata": _tiff("ZYX", "f4", byteorder=">", metadata=None),
    "int16": _tiff("ZYX", "i2"),
    "uint32": _tiff("ZYX", "u4"),
    "int32": _tiff("YX", "i4"),
    "float32": _tiff("ZYX", "f4"),
    "float64": _tiff("YX", "f8"),
    "BigTIFF": _tiff("ZYX", bigtiff=True, metadata=None),
    "ImageJ": _tiff("ZYX", imagej=True, metadata={"axes": "ZYX"}),
    "ImageJ, channels": _tiff("CYX", imagej=True, metadata={"axes": "CYX"}),
    "ImageJ, channels of slices": _tiff("ZCYX", imagej=True, metadata={"axes": "ZCYX"}),
    "OME": _tiff("ZYX", ome=True, metadata={"axes": "ZYX"}),
    "OME, channels": _tiff("CYX", "u1", ome=True, metadata={"axes": "CYX"}),
    "OME, slices of channels": _tiff("CZYX", ome=True, metadata={"axes": "CZYX"}),
    "OME, channels of slices": _tiff("ZCYX", ome=True, metadata={"axes": "ZCYX"}),
    "axes are said": _tiff("CYX", metadata=None, said="CYX"),
    "axes are said, channels last": _tiff("YXC", metadata={"axes": "QYX"}, said="YXC"),
    "axes are said, channels of slices": _tiff("ZCYX", metadata={"axes": "QZYX"}, said="ZCYX"),
    "page by page": _page_by_page(),
    "page by page, big-endian": _page_by_page("f4", big_endian=True),
    "page by page, in strips": _page_by_page(rowsperstrip=8),
    "page by page, at odd bytes": _page_by_page(words=("a", "bcd", "")),
    "colours": _colours("YXS"),
    "colours, uint16": _colours("YXS", "u2"),
    "colours apart": _colours("SYX"),
    "slices of colours": _colours("ZYXS"),
    "slices of colours apart": _colours("ZSYX"),
    # chunks
    "strips backwards": _scattered,
    "strips of the second page swapped": _swapped,
    "tiles": _tiff("ZYX", tile=(16, 32)),
    "tiles, big-endian": _tiff("ZYX", "f4", tile=(16, 32), byteorder=">"),
    "a tile larger than the image": _tiff("YX", tile=(96, 128), compression="zlib"),
    "zlib": _tiff("ZYX", compression="zlib", rowsperstrip=7),
    "zlib, one strip": _tiff("YX", "u1", compression="zlib"),
    "zlib, uint8": _tiff("ZYX", "u1", compression="zlib", rowsperstrip=7, metadata=None),
    "zlib, int16": _tiff("ZYX", "i2", compression="zlib", rowsperstrip=44),
    "zlib, uint32": _tiff("YX", "u4", compression="zlib", rowsperstrip=7),
    "zlib, float32": _tiff("ZYX", "f4", compression="zlib", rowsperstrip=7),
    "zlib, float64": _tiff("YX", "f8", compression="zlib", tile=(16, 16)),
    "zlib, big-endian": _tiff("ZYX", compression="zlib", byteorder=">", rowsperstrip=7),
    "zlib, BigTIFF": _tiff("ZYX", compression="zlib", bigtiff=True, rowsperstrip=7),
    "zlib, tiles": _tiff("ZYX", compression="zlib", tile=(32, 16)),
    "zlib, page by page": _page_by_page(compression="zlib", rowsperstrip=7),
    "predictor": _tiff("ZYX", compression="zlib", predictor=True, rowsperstrip=7),
    "predictor, tiles": _tiff("ZYX", compression="zlib", predictor=True, tile=(16, 16)),
    "predictor, big-endian": _tiff("ZYX", compression="zlib", predictor=True, byteorder=">"),
    "packbits": _tiff("ZYX", "u1", compression="packbits", rowsperstrip=7),
    "LZW": _tiff("ZYX", compression="lzw", rowsperstrip=7),
    "LZW, predictor": _tiff("YX", compression="lzw", predictor=True, tile=(16, 16)),
    "Zstandard": _tiff("ZYX", "f4", compression="zstd", rowsperstrip=7),
    "bits": _tiff("ZYX", bool, rowsperstrip=7),
    "bits, zlib": _tiff("YX", bool, compression="zlib", rowsperstrip=7),
    "ImageJ, zlib": _tiff("ZYX", imagej=True, compression="zlib", metadata={"axes": "ZYX"}),
    "ImageJ, zlib, channels": _tiff("ZCYX", imagej=True, compression="zlib", metadata={"axes": "ZCYX"}),
    "OME, zlib, tiles": _tiff("CZYX", ome=True, compression="zlib", tile=(16, 16), metadata={"axes": "CZYX"}),
    "axes are said, zlib": _tiff("CYX", metadata=None, said="CYX", compression="zlib", rowsperstrip=7),
    "axes are said, zlib, channels last": _tiff("YXC", metadata={"axes": "QYX"}, said="YXC", compression="zlib"),
    "colours, zlib": _colours("YXS", compression="zlib", rowsperstrip=7),
    "colours, tiles, predictor": _colours("YXS", "u2", compression="zlib", tile=(16, 32), predictor=True),
    "colours apart, zlib": _colours("SYX", compression="zlib", rowsperstrip=7),
    "colours apart, tiles": _colours("SYX", "u2", tile=(16, 32)),
    "slices of colours, zlib": _colours("ZYXS", compression="zlib", rowsperstrip=7),
    "slices of colours apart, zlib": _colours("ZSYX", compression="zlib", tile=(16, 16)),
    "JPEG": _lossy((H, W), tile=(16, 32), photometric="minisblack"),
    "JPEG, colours": _lossy((48, 64, 3), rowsperstrip=16, photometric="rgb"),
    "a pyramid": _pyramid,
    "an OME in two files": _two_files,
    "an OME in two files, zlib": lambda folder: _two_files(folder, "u2", compression="zlib", rowsperstrip=7),
}
# tifffile alone cannot write these, or read them
ENCODED = ("LZW", "JPEG", "Zstandard", "bits", "predictor", "packbits")


_ONE_SIZE = "read_stack compares places in the second file with the size of the first"
NOT_AS_A_STACK = {
    "an OME in two files": _ONE_SIZE,
    "an OME in two files, zlib": _ONE_SIZE,
    "strips of the second page swapped": "tifffile takes a page's strips to lie as the first page's do",
}


# ---- pictures, NumPy, Zarr


def _picture(name: str, make: Callable[[], tuple[Image.Image, Array]], **options: Any) -> Callable[[Path], Written]:
    def write(folder: Path) -> Written:
        picture, pixels = make()
        picture.save(folder / name, **options)
        return Written(folder / name, pixels, False)

    return write


def _plain_picture(array: Array) -> Callable[[], tuple[Image.Image, Array]]:
    pixels = AS_SLICES["YX" if array.ndim == 2 else "YXC"](array)
    return lambda: (Image.fromarray(array), pixels[:, :3] if pixels.shape[1] == 4 else pixels)


def _palette() -> tuple[Image.Image, Array]:
    ids, colours = _pixels(H, W, dtype="u1") % 7, np.random.default_rng(1).integers(0, 256, (256, 3)).astype("u1")
    picture = Image.fromarray(ids)
    picture.putpalette(colours.tobytes())
    return picture, colours[ids].transpose(2, 0, 1)[None]


def _opaque() -> Array:
    array = _pixels(H, W, 4, dtype="u1")
    array[..., 3] = 255
    return array


def _numpy(axes: str, dtype: Any = "u2", *, fortran: bool = False, **sizes: int) -> Callable[[Path], Written]:
    def write(folder: Path) -> Written:
        array = _of_axes(axes, dtype, **sizes)
        np.save(folder / "x.npy", np.asfortranarray(array) if fortran else array)
        return Written(folder / "x.npy", AS_SLICES[axes](array), "Z" in axes, None if axes == "YX" else axes)

    return write


def _zarr(
    axes: str, dtype: Any = "u2", *, said: str | None = None, named: bool = False, sizes: Any = (), **options: Any
) -> Callable[[Path], Written]:
    """A Zarr array; `said`: axes that are given when it is opened, `named`: they are in the file."""

    def write(folder: Path) -> Written:
        zarr = pytest.importorskip("zarr")
        array = _of_axes(axes, dtype, **dict(sizes))
        names = {"dimension_names": list(axes.lower())} if named else {}
        made = zarr.create_array(folder / "x.zarr", shape=array.shape, dtype=array.dtype, **names, **options)
        made[...] = array
        return Written(folder / "x.zarr", AS_SLICES[axes](array), "Z" in axes, said)

    return write


def _ome_zarr(version: str, axes: str, chunks: tuple[int, ...], **sizes: int) -> Callable[[Path], Written]:
    def write(folder: Path) -> Written:
        zarr = pytest.importorskip("zarr")
        array = _of_axes(axes, **sizes)
        group = zarr.open_group(folder / "x.zarr", mode="w", zarr_format=2 if version == "0.4" else 3)
        for level in range(2):
            pixels = array[..., :: 2**level, :: 2**level]
            group.create_array(f"s{level}", shape=pixels.shape, dtype=array.dtype, chunks=chunks)[...] = pixels
        kinds = {"T": "time", "C": "channel"}
        scales = [
            {
                "version": version,
                "axes": [{"name": axis.lower(), "type": kinds.get(axis, "space")} for axis in axes],
                "datasets": [{"path": f"s{level}"} for level in range(2)],
            }
        ]
        if version == "0.4":
            group.attrs["multiscales"] = scales
        else:
            group.attrs["ome"] = {"version": version, "multiscales": scales}
        pixels = AS_SLICES[axes](array)
        return Written(folder / "x.zarr", pixels, len(pixels) > 1)

    return write


OTHERS: dict[str, Callable[[Path], Written]] = {
    "PNG": _picture("x.png", _plain_picture(_pixels(H, W, dtype="u1"))),
    "PNG, 16 bits": _picture("x.png", _plain_picture(_pixels(H, W))),
    "PNG, bits": _picture("x.png", _plain_picture(_pixels(H, W, dtype=bool))),
    "PNG, colours": _picture("x.PNG", _plain_picture(_pixels(H, W, 3, dtype="u1"))),
    "PNG, opaque colours": _picture("x.png", _plain_picture(_opaque())),
    "PNG, palette": _picture("x.png", _palette),
    "BMP": _picture("x.bmp", _plain_picture(_pixels(H, W, 3, dtype="u1"))),
    "NumPy": _numpy("YX"),
    "NumPy, Fortran": _numpy("YX", fortran=True),
    "NumPy, big-endian": _numpy("YX", ">u2"),
    "NumPy, bool": _numpy("YX", bool),
    "NumPy, stack": _numpy("ZYX", "f4"),
    "NumPy, stack, Fortran": _numpy("ZYX", "f8", fortran=True),
    "NumPy, channels": _numpy("CYX", "i2"),
    "NumPy, channels last": _numpy("YXC", "u1"),
    "NumPy, channels last, Fortran": _numpy("YXC", "u1", fortran=True),
    "NumPy, channels of slices": _numpy("ZCYX", "i8"),
    "NumPy, channels last of slices": _numpy("ZYXC"),
    "NumPy, one slice": _numpy("ZYX", Z=1),
    "NumPy, one channel": _numpy("CYX", C=1),
    "Zarr 2": _zarr("YX", zarr_format=2, chunks=(16, 25)),
    "Zarr 2, big-endian": _zarr("YX", ">u2", zarr_format=2, chunks=(16, 25)),
    "Zarr 2, columns first": _zarr("YX", zarr_format=2, chunks=(16, 25), order="F"),
    "Zarr 2, slices": _zarr("ZYX", said="ZYX", zarr_format=2, chunks=(2, 16, 25)),
    "Zarr 3": _zarr("YX", "f4", chunks=(16, 25)),
    "Zarr 3, bool": _zarr("YX", bool, chunks=(16, 25)),
    "Zarr 3, one chunk": _zarr("YX", chunks=(H, W)),
    "Zarr 3, not compressed": _zarr("YX", "i4", chunks=(16, 25), compressors=None),
    "Zarr 3, named axes": _zarr("ZCYX", named=True, chunks=(1, 1, 16, 25)),
    "Zarr 3, channels first": _zarr("CZYX", named=True, chunks=(1, 1, 16, 25)),
    "Zarr 3, channels last": _zarr("YXC", said="YXC", chunks=(16, 25, 2)),
    "Zarr 3, channels in pairs": _zarr("YXC", named=True, chunks=(16, 25, 2), sizes={"C": 5}),
    "Zarr 3, transposed": _zarr("XY", said="XY", chunks=(16, 25)),
    "Zarr 3, in odd order": _zarr("XCYZ", named=True, chunks=(16, 2, 25, 2)),
    "Zarr 3, singletons": _zarr("TCZYX", named=True, chunks=(1, 1, 1, 16, 25), sizes={"C": 1}),
    "Zarr 3, chunks of many slices": _zarr("ZCYX", named=True, chunks=(3, 2, 16, 25)),
    "Zarr 3, sharded": _zarr("ZYX", named=True, chunks=(1, 8, 10), shards=(2, 24, 20)),
    "OME-Zarr 0.4": _ome_zarr("0.4", "ZYX", (1, 16, 25)),
    "OME-Zarr 0.4, five axes": _ome_zarr("0.4", "TCZYX", (1, 1, 1, 16, 25)),
    "OME-Zarr 0.4, one plane": _ome_zarr("0.4", "TCZYX", (1, 1, 1, 16, 25), C=1, Z=1),
    "OME-Zarr 0.5": _ome_zarr("0.5", "CYX", (1, 16, 25)),
    "OME-Zarr 0.5, five axes": _ome_zarr("0.5", "TCZYX", (1, 1, 1, 16, 25), T=2, Z=1),
}
LAYOUTS = {**TIFFS, **OTHERS}
# the rest is mapped, or comes as a whole
FIRST = list(TIFFS).index("strips backwards")
PIECES = {*list(TIFFS)[FIRST:], *(name for name in OTHERS if "Zarr" in name)} - {"axes are said, zlib, channels last"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Written]:
    """Each layout once."""
    made: dict[str, Written] = {}

    def get(layout: str) -> Written:
        if layout.startswith(ENCODED):
            pytest.importorskip("imagecodecs")
        if layout not in made:
            made[layout] = LAYOUTS[layout](tmp_path_factory.mktemp("layout"))
        return made[layout]

    return get


def _all(source: Any) -> Array:
    depth, _, height, width = source.shape
    return np.stack([source.read(z, slice(0, height), slice(0, width)) for z in range(depth)])


def _spans(numbers: tuple[int, int], size: int) -> slice:
    first, last = sorted(n % size for n in numbers)
    return slice(first, last + 1)


# ---- what is written is read


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_as_it_was_written(layout: str, written: Callable[[str], Written]) -> None:
    image = written(layout)
    with closing(open_source(image.path, axes=image.axes)) as source:
        found = _all(source)
        assert source.shape == image.pixels.shape
        assert (source.dtype.kind, source.dtype.itemsize) == (image.pixels.dtype.kind, image.pixels.dtype.itemsize)
        assert source.is_stack == image.is_stack
        assert source.name == image.path.name
        np.testing.assert_array_equal(found, image.pixels)
        assert (found.dtype.kind, found.dtype.itemsize) == (image.pixels.dtype.kind, image.pixels.dtype.itemsize)
        # only what can be read piece by piece is
        assert isinstance(source, ArraySource) == (layout not in PIECES)


@pytest.mark.parametrize("layout", [*TIFFS, *(name for name in OTHERS if name.startswith(("PNG", "BMP")))])
def test_every_layout_is_read_as_read_stack_does(layout: str, written: Callable[[str], Written]) -> None:
    image = written(layout)
    if layout in NOT_AS_A_STACK:
        pytest.skip(NOT_AS_A_STACK[layout])
    whole = read_stack(image.path, axes=image.axes)
    with closing(open_source(image.path, axes=image.axes)) as source:
        np.testing.assert_array_equal(_all(source), whole.pixels)
        assert source.is_stack == whole.is_stack


@pytest.mark.parametrize("layout", LAYOUTS)
@given(
    windows=st.lists(st.tuples(*[st.integers(0, 10**6)] * 5), min_size=3, max_size=3),
    keep=st.sampled_from([0, 3000, 2**25]),
)
@few
def test_any_window_is_that_part_of_the_whole(
    layout: str, windows: list[tuple[int, ...]], keep: int, written: Callable[[str], Written]
) -> None:
    image = written(layout)
    depth, _, height, width = image.pixels.shape
    with pytest.MonkeyPatch.context() as patch:
        # whatever is forgotten between two windows
        patch.setattr(sources, "_ALWAYS_KEPT", keep)
        with closing(open_source(image.path, axes=image.axes)) as source:
            for place, *numbers in windows:
                z, rows, columns = place % depth, _spans(numbers[:2], height), _spans(numbers[2:], width)
                found = source.read(z, rows, columns)
                np.testing.assert_array_equal(found, image.pixels[z, :, rows, columns])


@given(
    axes=st.sampled_from(["YX", "CYX", "YXC", "ZYX", "ZCYX"]),
    sizes=st.tuples(*[st.integers(1, 4)] * 4),
    numbers=st.tuples(*[st.integers(0, 99)] * 5),
    lazy=st.booleans(),
)
@ordinary
def test_axes_of_an_array_lose_none_of_one_pixel(
    axes: str, sizes: tuple[int, ...], numbers: tuple[int, ...], lazy: bool
) -> None:
    array = _of_axes(axes, **dict(zip("ZCYX", sizes, strict=True)))
    wanted = AS_SLICES[axes](array)
    source = ArraySource(of_axes(_OnlySlices(array) if lazy else array, axes))
    assert (source.shape, source.dtype) == (wanted.shape, wanted.dtype)
    z, rows, columns = numbers[0] % len(wanted), _spans(numbers[1:3], sizes[2]), _spans(numbers[3:], sizes[3])
    np.testing.assert_array_equal(source.read(z, rows, columns), wanted[z, :, rows, columns])


class _OnlySlices:
    """As much of an array as a file format's class may have."""

    def __init__(self, array: Array) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __getitem__(self, where: tuple[Any, ...]) -> Array:
        assert len(where) == len(self.shape)
        return self.array[where]


# ---- memory and work


CHUNKED: dict[str, Callable[[Path, Array, tuple[int, int]], Path]] = {}


def _chunked(make: Callable[[Path, Array, tuple[int, int]], Path]) -> Callable[[Path, Array, tuple[int, int]], Path]:
    CHUNKED[make.__name__.strip("_").replace("_", " ")] = make
    return make


@_chunked
def _strips(path: Path, array: Array, chunk: tuple[int, int]) -> Path:
    more: dict[str, Any] = {"metadata": {"axes": "CYX"}, "compression": "zlib", "photometric": "minisblack"}
    tifffile.imwrite(path.with_suffix(".tif"), array, rowsperstrip=chunk[0], **more)
    return path.with_suffix(".tif")


@_chunked
def _tiles(path: Path, array: Array, chunk: tuple[int, int]) -> Path:
    more: dict[str, Any] = {"metadata": {"axes": "CYX"}, "compression": "zlib", "photometric": "minisblack"}
    tifffile.imwrite(path.with_suffix(".tif"), array, tile=(16 * chunk[0], 16 * chunk[1]), **more)
    return path.with_suffix(".tif")


@_chunked
def _samples(path: Path, array: Array, chunk: tuple[int, int]) -> Path:
    tifffile.imwrite(
        path.with_suffix(".tif"), np.moveaxis(array, 0, -1).copy(), photometric="minisblack", planarconfig="contig",
        compression="zlib", tile=(16 * chunk[0], 16 * chunk[1]), metadata={"axes": "YXS"},
    )  # fmt: skip
    return path.with_suffix(".tif")


@_chunked
def _samples_apart(path: Path, array: Array, chunk: tuple[int, int]) -> Path:
    tifffile.imwrite(
        path.with_suffix(".tif"), array, photometric="rgb" if len(array) == 3 else "minisblack",
        planarconfig="separate", compression="zlib", rowsperstrip=chunk[0], metadata={"axes": "SYX"},
    )  # fmt: skip
    return path.with_suffix(".tif")


@_chunked
def _zarr_of_planes(path: Path, array: Array, chunk: tuple[int, int]) -> Path:
    return _make_zarr(path, array, (1, *chunk))


@_chunked
def _zarr_of_channels(path: Path, array: Array, chunk: tuple[int, int]) -> Path:
    return _make_zarr(path, array, (2, *chunk))


def _make_zarr(path: Path, array: Array, chunks: tuple[int, ...]) -> Path:
    zarr = pytest.importorskip("zarr")
    made = zarr.create_array(
        path.with_suffix(".zarr"), shape=array.shape, dtype=array.dtype, chunks=chunks, dimension_names=list("cyx")
    )
    made[...] = array
    return path.with_suffix(".zarr")


def _chunks(path: Path) -> int:
    """How many compressed pieces there are in a file."""
    if path.is_dir():
        return sum(p.is_file() and p.name != "zarr.json" for p in path.rglob("*"))
    with tifffile.TiffFile(path) as tiff:
        return sum(len(page.dataoffsets) for page in tiff.pages)


def _overlapping(size: int, side: int, halo: int) -> Iterator[slice]:
    """Windows with a halo on either side, as tiles read them, inside an image."""
    for first in range(0, size, side):
        yield slice(max(0, first - halo), min(size, first + side + halo))


@pytest.mark.parametrize("layout", CHUNKED)
@given(
    size=st.tuples(st.integers(2, 130), st.integers(2, 130)),
    channels=st.integers(1, 4),
    chunk=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    side=st.tuples(st.integers(1, 40), st.integers(4, 40)),
    halo=st.integers(0, 20),
)
@settings(derandomize=True, database=None, deadline=None, max_examples=10)
def test_no_chunk_is_decoded_twice_where_windows_come_row_by_row(
    layout: str, size: tuple[int, int], channels: int, chunk: tuple[int, int], side: tuple[int, int], halo: int
) -> None:
    chunk = (8 * chunk[0] + 1, 8 * chunk[1] + 1) if layout.startswith("zarr") else chunk
    channels = max(channels, 2 if layout.startswith("samples") else 1)
    # Zarr writes no chunk of nothing but 0
    array = _pixels(channels, *size) + 1
    side = max(side[0], size[0] // 8), max(side[1], size[1] // 8)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_ALWAYS_KEPT", 0)
        path = CHUNKED[layout](Path(folder) / "x", array, chunk)
        with closing(open_source(path)) as source:
            assert not isinstance(source, ArraySource)
            rows = side[0] + 2 * halo
            source.reserve(rows)
            most = source.held_bytes(rows)
            for down in _overlapping(size[0], side[0], halo):
                for across in _overlapping(size[1], side[1], halo):
                    found = source.read(0, down, across)
                    np.testing.assert_array_equal(found, array[:, down, across])
                    assert sum(_owned(kept) for kept in source._kept.values()) <= most
            assert source.decoded == _chunks(path)


class _InMemory(sources._Chunked):
    """Chunks of an array; so many channels of one together."""

    def __init__(self, array: Array, chunk: tuple[int, int], together: int) -> None:
        self.array, self.together = array, together
        super().__init__("x", array.shape, array.dtype, chunk, chunk[0] * chunk[1] * together, False)

    def _key(self, z: int, channel: int, i: int, j: int) -> tuple[int, ...]:
        return z, channel // self.together, i, j, channel % self.together

    def _decode(self, place: tuple[int, ...]) -> Array:
        z, group, i, j = place
        (high, wide), n = self.chunk, self.together
        part = self.array[z, group * n : group * n + n, i * high : i * high + high, j * wide : j * wide + wide]
        return np.moveaxis(part, 0, -1).copy()


@given(
    size=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    channels=st.integers(1, 6),
    together=st.integers(1, 6),
    chunk=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    side=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    halo=st.integers(0, 60),
)
@settings(derandomize=True, database=None, deadline=None, max_examples=100)
def test_chunks_are_kept_as_long_as_windows_can_need_them_and_no_more(
    size: tuple[int, int],
    channels: int,
    together: int,
    chunk: tuple[int, int],
    side: tuple[int, int],
    halo: int,
) -> None:
    chunk = max(chunk[0], size[0] // 20), max(chunk[1], size[1] // 20)
    side = max(side[0], size[0] // 8), max(side[1], size[1] // 8)
    _assert_once(size, channels, together, chunk, side, halo)


# windows that share most of their columns, in many channels: it matters in which order a window asks for its chunks
@pytest.mark.parametrize(
    ("size", "channels", "together", "chunk", "side", "halo"),
    [
        ((114, 108), 6, 1, (7, 12), (16, 40), 28),
        ((93, 139), 5, 2, (6, 10), (24, 43), 13),
        ((146, 56), 4, 1, (9, 5), (18, 26), 46),
    ],
)
def test_windows_that_share_most_of_their_columns_decode_nothing_twice(
    size: tuple[int, int], channels: int, together: int, chunk: tuple[int, int], side: tuple[int, int], halo: int
) -> None:
    _assert_once(size, channels, together, chunk, side, halo)


def _assert_once(
    size: tuple[int, int], channels: int, together: int, chunk: tuple[int, int], side: tuple[int, int], halo: int
) -> None:
    array = _pixels(2, channels, *size, dtype="u4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_ALWAYS_KEPT", 0)
        source = _InMemory(array, chunk, together)
        rows = side[0] + 2 * halo
        source.reserve(rows)
        most = source.held_bytes(rows)
        # windows begin and end inside a chunk
        assert most <= (rows + 2 * chunk[0]) * (size[1] + chunk[1] - 1) * channels * 4
        for z in range(2):
            for down in _overlapping(size[0], side[0], halo):
                for across in _overlapping(size[1], side[1], halo):
                    np.testing.assert_array_equal(source.read(z, down, across), array[z, :, down, across])
                    assert sum(kept.nbytes for kept in source._kept.values()) == source._bytes <= most
        places = [-(-n // k) for n, k in zip((channels, *size), (together, *chunk), strict=True)]
        assert source.decoded == 2 * int(np.prod(places))


def _owned(array: Array) -> int:
    """Bytes that an array keeps alive."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array.nbytes


# ---- what is damaged is refused


CUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "strips": (".tif", {"rowsperstrip": 5, "metadata": None}),
    "strips, zlib": (".tif", {"rowsperstrip": 5, "compression": "zlib"}),
    "tiles": (".tif", {"tile": (16, 16)}),
    "tiles, zlib": (".tif", {"tile": (16, 16), "compression": "zlib", "metadata": None}),
    "BigTIFF": (".tif", {"bigtiff": True, "metadata": None}),
    "BigTIFF, zlib": (".tif", {"bigtiff": True, "compression": "zlib", "rowsperstrip": 5}),
    "OME": (".ome.tif", {"ome": True, "metadata": {"axes": "ZYX"}}),
    "OME, zlib": (".ome.tif", {"ome": True, "metadata": {"axes": "ZYX"}, "compression": "zlib"}),
    "ImageJ": (".tif", {"imagej": True, "metadata": {"axes": "ZYX"}}),
    "ImageJ, zlib": (".tif", {"imagej": True, "metadata": {"axes": "ZYX"}, "compression": "zlib"}),
    "page by page": (".tif", {"contiguous": False, "metadata": None}),
    "NumPy": (".npy", {}),
    "PNG": (".png", {}),
}


def _write_cut(path: Path, array: Array, options: dict[str, Any]) -> None:
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".png":
        Image.fromarray(array[0]).save(path)
    elif "contiguous" in options:
        with tifffile.TiffWriter(path) as tiff:
            for page in array:
                tiff.write(page, photometric="minisblack", **options)
    else:
        tifffile.imwrite(path, array, photometric="minisblack", **options)


def _refused(path: Path, axes: str | None = None) -> str | Array:
    """All pixels of a file, or the sentence that refuses it."""
    try:
        with closing(open_source(path, axes=axes)) as source:
            return _all(source)
    except BadInput as error:
        said = str(error)
        assert said.startswith(f"{path} "), said
        assert "\n" not in said.removeprefix(str(path))
        return said


@pytest.mark.parametrize("layout", CUTS)
def test_a_file_cut_anywhere_is_exact_or_refused(layout: str, tmp_path: Path) -> None:
    suffix, options = CUTS[layout]
    stack, path = _pixels(4, 33, 37), tmp_path / f"x{suffix}"
    _write_cut(path, stack, options)
    whole = path.read_bytes()
    wanted = stack[:1, None] if suffix == ".png" else stack[:, None]
    cuts = {0, 1, 2, 4, 8, 15, 16, len(whole) // 2, *(len(whole) - n for n in (1, 2, 4, 8, 9, 20))}
    rng = np.random.default_rng(2)
    while len(cuts) < 50:
        cuts.add(int(rng.integers(len(whole))))
    refused = 0
    for cut in sorted(cuts):
        path.write_bytes(whole[:cut])
        found = _refused(path, "ZYX" if suffix == ".npy" else None)
        if isinstance(found, str):
            refused += 1
        else:
            np.testing.assert_array_equal(found, wanted, f"cut at {cut} of {len(whole)}")
    # the last bytes of a file may say nothing about pixels
    assert refused > 40


@pytest.mark.parametrize("sharded", [False, True])
def test_a_chunk_of_zarr_that_is_cut_or_changed_is_refused(sharded: bool, tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    from zarr.codecs import ZstdCodec

    array, more = _pixels(40, 50), {"shards": (24, 24)} if sharded else {}
    made = zarr.create_array(
        tmp_path / "x.zarr", shape=array.shape, dtype=array.dtype, chunks=(12, 12),
        compressors=ZstdCodec(checksum=True), **more,
    )  # fmt: skip
    made[...] = array
    chunk = tmp_path / "x.zarr" / "c" / "1" / "1"
    whole = chunk.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(25):
        chunk.write_bytes(whole[: int(rng.integers(0, len(whole)))])
        assert isinstance(_refused(tmp_path / "x.zarr"), str)
        changed = bytearray(whole)
        changed[int(rng.integers(0, len(whole)))] ^= 255
        chunk.write_bytes(changed)
        found = _refused(tmp_path / "x.zarr")
        assert isinstance(found, str) or np.array_equal(found[0, 0], array)


@pytest.mark.parametrize(
    "options", [{"tile": (16, 16)}, {"tile": (16, 16), "compression": "zlib"}, {"rowsperstrip": 5}]
)
def test_a_missing_part_is_named(options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, _pixels(H, W), photometric="minisblack", metadata=None, **options)
    with tifffile.TiffFile(path) as tiff:
        counts = tiff.pages[0].tags[325 if "tile" in options else 279]
        second = counts.valueoffset + (2 if counts.dtype == 3 else 4)
    content = bytearray(path.read_bytes())
    content[second : second + 2] = b"\0\0"
    path.write_bytes(content)
    assert "a part of page 0 is missing" in str(_refused(path))


def test_pages_that_lie_about_the_next_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, _pixels(3, 9, 11), photometric="minisblack", metadata=None)
    with tifffile.TiffFile(path) as tiff:
        places = [page.offset for page in tiff.pages]
        tags = [len(page.tags) for page in tiff.pages]
    whole = path.read_bytes()
    link = places[-1] + 2 + 12 * tags[-1]
    assert whole[link : link + 4] == bytes(4)
    for following in (*places, len(whole), 2**32 - 1):
        path.write_bytes(whole[:link] + struct.pack("<I", following) + whole[link + 4 :])
        assert f"page 3 should begin at byte {following}" in str(_refused(path))


def test_pixels_beyond_the_end_of_the_file_are_refused_though_their_size_says_otherwise(tmp_path: Path) -> None:
    array = _pixels(2, 40, 50)
    path = tmp_path / "x.tif"
    with tifffile.TiffWriter(path) as tiff:
        for page in array:
            tiff.write(page, photometric="minisblack", metadata=None, contiguous=False)
    whole = path.read_bytes()
    with tifffile.TiffFile(path) as tiff:
        last = tiff.pages[1]
        assert last.dataoffsets[0] + last.nbytes == len(whole)
        size = last.tags[279]
        first = last.offset
    assert first < last.dataoffsets[0]
    content = bytearray(whole[:-1000])
    content[size.valueoffset : size.valueoffset + 2] = struct.pack("<H", 2000)
    path.write_bytes(content)
    found = _refused(path)
    assert isinstance(found, str)
    assert "truncated" in found


def test_a_chunk_that_holds_too_little_is_refused(tmp_path: Path) -> None:
    array = _pixels(40, 32, dtype="u1")
    rows = [zlib.compress(array[i : i + 10].tobytes()) for i in range(0, 40, 10)]
    _write_tiff(tmp_path / "x.tif", 40, 32, rows, compression=8, rows=10)
    assert np.array_equal(_refused(tmp_path / "x.tif"), array[None, None])
    rows[2] = zlib.compress(array[20:29].tobytes())
    _write_tiff(tmp_path / "x.tif", 40, 32, rows, compression=8, rows=10)
    assert "cannot be read as TIFF: part 2 of page 0" in str(_refused(tmp_path / "x.tif"))
    # and one that is damaged; the others are read
    rows[2] = b"no pixels"
    _write_tiff(tmp_path / "x.tif", 40, 32, rows, compression=8, rows=10)
    with closing(open_source(tmp_path / "x.tif")) as source:
        np.testing.assert_array_equal(source.read(0, slice(0, 20), slice(0, 32))[0], array[:20])
        with pytest.raises(BadInput, match=r"x\.tif cannot be read as TIFF: part 2 of page 0"):
            source.read(0, slice(19, 21), slice(0, 32))
        np.testing.assert_array_equal(source.read(0, slice(30, 40), slice(0, 32))[0], array[30:])


def test_offsets_and_sizes_that_do_not_agree_are_refused(tmp_path: Path) -> None:
    part = zlib.compress(bytes(16 * 16))
    path = _write_tiff(tmp_path / "x.tif", 64, 64, [part], places=16, tile=16, compression=8, counts=[len(part)] * 15)
    assert isinstance(_refused(path), str)
    path = _write_tiff(tmp_path / "x.tif", 64, 64, [part], places=3, tile=16, compression=8)
    assert isinstance(_refused(path), str)


def _png(path: Path, side: int, bits: int, colours: int) -> Path:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", side, side, bits, colours, 0, 0, 0)
    parts = (b"IHDR", head), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))
    return path


def _bomb_zarr(path: Path, side: int) -> Path:
    path.mkdir()
    about = {
        "zarr_format": 3, "node_type": "array", "shape": [side, side], "data_type": "uint8", "fill_value": 1,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [side, side]}}, "attributes": {},
        "chunk_key_encoding": {"name": "default"}, "codecs": [{"name": "bytes"}],
    }  # fmt: skip
    (path / "zarr.json").write_text(json.dumps(about))
    return path


def _bombs(folder: Path) -> list[Path]:
    """Small files that announce large images."""
    bombs = []
    for side, tile in ((60_000, 256), (200_000, 2048)):
        places = (-(-side // tile)) ** 2
        for number, (compression, part) in enumerate(((1, bytes(tile**2)), (8, zlib.compress(bytes(tile**2))))):
            path = folder / f"tiles {side} {number}.tif"
            bombs.append(_write_tiff(path, side, side, [part], places=places, tile=tile, compression=compression))
        short, long = zlib.compress(bytes(1000)), zlib.compress(bytes(4 * 10**7))
        strips = {"raw": (1, bytes(1000)), "short": (8, short), "long": (8, long), "packed": (32773, b"\x81\0" * 1000)}
        for name, (compression, part) in strips.items():
            path = folder / f"{name} strip {side}.tif"
            bombs.append(_write_tiff(path, side, side, [part], compression=compression))
        bombs.append(_write_tiff(folder / f"deep {side}.tif", side, side, [short], compression=8, samples=255))
        for bits, colours in ((8, 0), (16, 0), (8, 2), (1, 0), (8, 3)):
            bombs.append(_png(folder / f"{bits} {colours} {side}.png", side, bits, colours))
        with (folder / f"{side}.npy").open("wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (side, side)}
            np.lib.format.write_array_header_1_0(file, header)
            bombs.append(folder / f"{side}.npy")
    bombs.append(_write_tiff(folder / "tile.tif", 100, 100, [short], compression=8, tile=200_000 // 16 * 16))
    bombs.append(_bomb_zarr(folder / "x.zarr", 200_000))
    return bombs


# opens and reads one window of each file; says what came of it, and the most memory the process ever held
_ONE_WINDOW = """
import sys
from pathlib import Path
from unet_fast.errors import BadInput
from unet_fast.sources import open_source
def held():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) // 1000
if any(name.endswith(".zarr") for name in sys.argv):
    import zarr
before = held()
for name in sys.argv[1:]:
    try:
        source = open_source(Path(name), memory=20 * 10**9)
        rows = slice(min(1000, source.shape[2] - 100), min(1572, source.shape[2]))
        said = f"read {int(source.read(0, rows, rows).sum())}"
        source.close()
    except BadInput as error:
        said = str(error)
    print(held() - before, said)
"""


def test_a_header_that_announces_gigabytes_takes_none(tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read from /proc")
    bombs = _bombs(tmp_path)
    assert sum(bomb.stat().st_size for bomb in bombs) < 10**7
    command = [sys.executable, "-c", _ONE_WINDOW, *map(str, bombs)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(bombs)
    for bomb, line in zip(bombs, lines, strict=True):
        megabytes, said = line.split(" ", 1)
        assert int(megabytes) < 300, (bomb.name, line)
        # tiles that are there can be read; of the rest most is missing
        assert said == "read 0" if bomb.name.startswith("tiles") else said.startswith(f"{bomb} "), (bomb.name, line)


def test_what_comes_in_one_piece_may_take_the_memory_that_is_said(tmp_path: Path) -> None:
    array = _pixels(300, 400, dtype="u1")
    Image.fromarray(array).save(tmp_path / "x.png")
    tifffile.imwrite(tmp_path / "x.tif", array, photometric="minisblack", compression="zlib")
    said = {
        "x.png": "is 300 x 400 and takes 0.2 MB to decode, which only goes in one piece",
        "x.tif": "is compressed in pieces of 0.1 MB, which is more than the",
    }
    for name, wanted in said.items():
        with pytest.raises(BadInput, match=wanted.replace(".", r"\.")):
            open_source(tmp_path / name, memory=100_000)
        with closing(open_source(tmp_path / name, memory=300_000)) as source:
            np.testing.assert_array_equal(_all(source)[0, 0], array)


def test_a_piece_of_many_samples_counts_with_all_of_them(tmp_path: Path) -> None:
    array = _pixels(100, 100, 4, dtype="u1")
    more: dict[str, Any] = {"photometric": "rgb", "extrasamples": ["unassalpha"], "compression": "zlib"}
    tifffile.imwrite(tmp_path / "x.tif", array, **more)
    with pytest.raises(BadInput, match="is compressed in pieces of"):
        open_source(tmp_path / "x.tif", memory=30_000)
    with closing(open_source(tmp_path / "x.tif", memory=40_000)) as source:
        np.testing.assert_array_equal(_all(source), AS_SLICES["YXC"](array))


# ---- what is no image


def _npy(shape: str, descr: str = "'<u2'", order: str = "False") -> bytes:
    head = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    head += b" " * (63 - (10 + len(head)) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head + bytes(100)


def _npz() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "x.npz", a=np.ones((3, 4)))
        return (Path(folder) / "x.npz").read_bytes()


NO_IMAGES: dict[str, bytes] = {
    "empty": b"",
    "text": b"the cells of Tuesday\n" * 9,
    "zeros": bytes(500),
    "random bytes": np.random.default_rng(0).bytes(500),
    "the head of a TIFF": b"II*\0\x08\0\0\0",
    "the head of a PNG": b"\x89PNG\r\n\x1a\n",
    "the head of an array": b"\x93NUMPY\1\0",
    "a pickle": b"\x80\4K\1.",
    "a zip": b"PK\3\4",
    "several arrays": _npz(),
    "an array of objects": _npy("(4, 5)", "'O'"),
    "an array of texts": _npy("(4, 5)", "'U1'"),
    "an array of complex numbers": _npy("(2, 3)", "'<c8'"),
    "an array of nothing": _npy("(0, 5)"),
    "an array of one number": _npy("()"),
    "an array in a line": _npy("(5,)"),
    "an array that is too short": _npy("(50, 50)"),
    "an array beyond all numbers": _npy("(4294967296, 4294967296)"),
    "an array beyond all integers": _npy("(5, 99999999999999999999999)"),
    "an array of negative size": _npy("(-1, 5)"),
    "an array of truths": _npy("(True, 5)"),
    "an array of a strange order": _npy("(4, 5)", order="7"),
}


@pytest.mark.parametrize("suffix", [".tif", ".tiff", ".png", ".jpg", ".bmp", ".npy", ".txt", "", ".zarr"])
@pytest.mark.parametrize("kind", NO_IMAGES)
def test_what_is_no_image_is_refused_in_a_sentence(kind: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(NO_IMAGES[kind])
    assert isinstance(_refused(path), str)


def test_a_folder_and_nothing_at_all_are_named(tmp_path: Path) -> None:
    for name in ("folder", "folder.tif", "folder.zarr"):
        (tmp_path / name).mkdir()
        with pytest.raises(BadInput, match=f"{name} is no image"):
            open_source(tmp_path / name)
    for name in ("x.tif", "x.zarr", "missing/x.npy"):
        with pytest.raises(BadInput, match=f"{name} does not exist"):
            open_source(tmp_path / name)
    (tmp_path / "x.czi").touch()
    with pytest.raises(BadInput, match=r"x\.czi must be one of .*\.npy, \.zarr, got \.czi"):
        open_source(tmp_path / "x.czi")


def _edited(path: Path, **values: Any) -> None:
    about = json.loads((path / "zarr.json").read_text())
    (path / "zarr.json").write_text(json.dumps({**about, **values}))


def _small_zarr(path: Path, **options: Any) -> Path:
    import zarr

    made = zarr.create_array(path, shape=(20, 24), dtype="u2", chunks=(7, 9), **options)
    made[...] = _pixels(20, 24)
    return path


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "no json": lambda path: (path / "zarr.json").write_text("{"),
    "an empty description": lambda path: (path / "zarr.json").write_text(""),
    "a list": lambda path: (path / "zarr.json").write_text("[]"),
    "bytes": lambda path: (path / "zarr.json").write_bytes(bytes(range(256))),
    "a codec nobody knows": lambda path: _edited(path, codecs=[{"name": "nope"}]),
    "a dtype nobody knows": lambda path: _edited(path, data_type="nope"),
    "a negative shape": lambda path: _edited(path, shape=[-3, 4]),
    "a shape of texts": lambda path: _edited(path, shape="x"),
    "a shape of nothing": lambda path: _edited(path, shape=[0, 24]),
    "chunks of nothing": lambda path: _edited(
        path, chunk_grid={"name": "regular", "configuration": {"chunk_shape": [0, 0]}}
    ),
    "chunks of one axis": lambda path: _edited(
        path, chunk_grid={"name": "regular", "configuration": {"chunk_shape": [5]}}
    ),
    "a version nobody knows": lambda path: _edited(path, zarr_format=9),
    "an empty chunk": lambda path: (path / "c/1/1").write_bytes(b""),
    "a chunk of other bytes": lambda path: (path / "c/1/1").write_bytes(bytes(range(100))),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_zarr_is_refused_in_a_sentence(damage: str, tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    path = _small_zarr(tmp_path / "x.zarr")
    assert np.array_equal(_refused(path), _pixels(20, 24)[None, None])
    DAMAGES[damage](path)
    assert isinstance(_refused(path), str)


_YX = [{"name": "y", "type": "space"}, {"name": "x", "type": "space"}]
ATTRIBUTES: dict[str, tuple[dict[str, Any], bool]] = {
    "right": ({"multiscales": [{"axes": _YX, "datasets": [{"path": "0"}]}]}, True),
    "axes of version 0.3": ({"multiscales": [{"axes": ["y", "x"], "datasets": [{"path": "0"}]}]}, False),
    "no axes": ({"multiscales": [{"datasets": [{"path": "0"}]}]}, False),
    "an array that is missing": ({"multiscales": [{"axes": _YX, "datasets": [{"path": "7"}]}]}, False),
    "an array that is a group": ({"multiscales": [{"axes": _YX, "datasets": [{"path": "group"}]}]}, False),
    "an array elsewhere": ({"multiscales": [{"axes": _YX, "datasets": [{"path": "../x.zarr/0"}]}]}, False),
    "no datasets": ({"multiscales": [{"axes": _YX, "datasets": []}]}, False),
    "a text": ({"multiscales": "abc"}, False),
    "a number": ({"multiscales": 5}, False),
    "axes without names": ({"multiscales": [{"axes": [{}, {}], "datasets": [{"path": "0"}]}]}, False),
    "axes of no letters": (
        {"multiscales": [{"axes": [{"name": None}, {"name": 3}], "datasets": [{"path": "0"}]}]},
        False,
    ),
    "too many axes": ({"multiscales": [{"axes": [*_YX, {"name": "z"}], "datasets": [{"path": "0"}]}]}, False),
    "too few axes": ({"multiscales": [{"axes": _YX[:1], "datasets": [{"path": "0"}]}]}, False),
    "other axes": ({"multiscales": [{"axes": [{"name": "u"}, {"name": "v"}], "datasets": [{"path": "0"}]}]}, False),
    "an ome that is a text": ({"ome": "abc"}, False),
    "an ome that is nothing": ({"ome": None}, False),
    # with no word of which: there is but one
    "a plate": ({"ome": {"version": "0.5", "plate": {}}}, True),
}


@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_a_group_says_which_array_is_the_image_or_is_refused(kind: str, tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    attributes, fine = ATTRIBUTES[kind]
    group = zarr.open_group(tmp_path / "x.zarr", mode="w")
    _small_zarr(tmp_path / "x.zarr" / "0")
    group.create_group("group")
    group.attrs.update(attributes)
    found = _refused(tmp_path / "x.zarr")
    if fine:
        np.testing.assert_array_equal(found, _pixels(20, 24)[None, None])
    else:
        assert isinstance(found, str)


def test_several_arrays_in_a_group_are_named(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    zarr.open_group(tmp_path / "x.zarr", mode="w")
    assert "holds 0 arrays and does not say which is the image; name one of them: there is none" in str(
        _refused(tmp_path / "x.zarr")
    )
    for name in "ab":
        _small_zarr(tmp_path / "x.zarr" / name)
    said = str(_refused(tmp_path / "x.zarr"))
    assert "holds 2 arrays and does not say which is the image" in said
    assert all(f"x.zarr/{name}" in said for name in "ab")
    assert is_zarr(tmp_path / "x.zarr" / "a")
    np.testing.assert_array_equal(_refused(tmp_path / "x.zarr" / "a"), _pixels(20, 24)[None, None])


def test_axes_that_nobody_says_are_asked_for(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", _pixels(3, 9, 11))
    with pytest.raises(BadInput, match=r"x\.npy has 3 axes of 3x9x11 and does not say which; say axes, one of YX, CYX"):
        open_source(tmp_path / "x.npy")
    with pytest.raises(BadInput, match=r"x\.npy has 3 axes of 3x9x11, axes said YX"):
        open_source(tmp_path / "x.npy", axes="YX")
    for wrong in ("ABC", "ZZX", "zyx"):
        with pytest.raises(BadInput, match=f"x.npy has axes {wrong} of 3x9x11; expected one stack axis"):
            open_source(tmp_path / "x.npy", axes=wrong)
    tifffile.imwrite(tmp_path / "x.tif", _pixels(2, 3, 9, 11), photometric="minisblack", metadata={"axes": "TZYX"})
    with pytest.raises(BadInput, match=r"x\.tif has axes TZYX of 2x3x9x11; expected one stack axis and one channel"):
        open_source(tmp_path / "x.tif")


# ---- names and places


NAMES = [
    "two words", "two\nlines", "Zürich_细胞_🔬", "<script>alert(1)<script>", "a;b&c|d'e\"f", "-rf", "--out", "%d%s",
    "x.tif.tif", "~", "#1?b=2", "x" * 250,
]  # fmt: skip


@pytest.mark.parametrize("stem", NAMES, ids=lambda stem: ascii(stem[:20]))
@pytest.mark.parametrize("suffix", [".tif", ".tiff", ".TIF", ".png", ".npy", ".zarr"])
def test_an_image_may_be_called_anything(stem: str, suffix: str, tmp_path: Path) -> None:
    array = _pixels(9, 11, dtype="u1")
    path = tmp_path / f"{stem}{suffix}"
    if suffix == ".png":
        Image.fromarray(array).save(path)
    elif suffix == ".npy":
        np.save(path, array)
    elif suffix == ".zarr":
        pytest.importorskip("zarr").create_array(path, shape=array.shape, dtype=array.dtype)[...] = array
    else:
        with path.open("wb") as file:
            tifffile.imwrite(file, array, photometric="minisblack", compression="zlib")
    assert list_sources([tmp_path]) == [path]
    assert list_sources([path]) == [path]
    with closing(open_source(path)) as source:
        assert source.name == path.name
        np.testing.assert_array_equal(_all(source)[0, 0], array)
    assert fingerprint(path) == fingerprint(path)
    if path.is_file():
        path.write_bytes(path.read_bytes()[:30])
        assert isinstance(_refused(path), str)


def test_a_folder_is_in_natural_order_and_its_zarr_folders_are_images(tmp_path: Path) -> None:
    wanted = ["2.PNG", "10.npy", "a2b10.tif", "a10b2.zarr", "t01.tiff", "t1.bmp", "t2.jpg", "t2_x.JPEG", "t10.zarr"]
    for name in reversed(wanted):
        if name.endswith(".zarr"):
            (tmp_path / name).mkdir()
            (tmp_path / name / ("zarr.json" if name == "t10.zarr" else ".zarray")).touch()
        else:
            (tmp_path / name).touch()
    for name in (".hidden.tif", "._t1.tif", "notes.txt", "Thumbs.db", "model.npz", "no.zarr.txt"):
        (tmp_path / name).touch()
    # a folder of such a name is no image, hidden or not Zarr
    for name in ("folder.tif", "no.zarr", ".hidden.zarr", "inside"):
        (tmp_path / name).mkdir()
    (tmp_path / ".hidden.zarr" / "zarr.json").touch()
    (tmp_path / "inside" / "x.tif").touch()
    assert [p.name for p in list_sources([tmp_path])] == wanted
    # several, in the order in which they are said; a file or a Zarr folder is itself
    chosen = [tmp_path / "t10.zarr", tmp_path / "inside", tmp_path / "notes.txt", tmp_path / "2.PNG"]
    assert list_sources(chosen) == [chosen[0], tmp_path / "inside" / "x.tif", *chosen[2:]]


def test_nothing_to_list_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="missing does not exist"):
        list_sources([tmp_path / "missing"])
    with pytest.raises(BadInput, match=r"has no image in it; expected files ending in \.tif, .*\.npy, \.zarr"):
        list_sources([tmp_path])
    (tmp_path / "x.tif").touch()
    with pytest.raises(BadInput, match="missing does not exist"):
        list_sources([tmp_path / "x.tif", tmp_path / "missing"])
    with pytest.raises(BadInput, match="is neither a file nor a folder"):
        list_sources([Path(os.devnull)])
    os.mkfifo(tmp_path / "pipe.tif")
    with pytest.raises(BadInput, match="is neither a file nor a folder"):
        list_sources([tmp_path / "pipe.tif"])
    # not opened, for nobody writes into it
    assert list_sources([tmp_path]) == [tmp_path / "x.tif"]
    with pytest.raises(BadInput, match="is no image"):
        open_source(tmp_path / "pipe.tif")
    assert list_sources([]) == []


def test_a_file_is_let_go_of(tmp_path: Path) -> None:
    """Warnings are errors here, so that a file left open by what was refused fails some other test."""
    tifffile.imwrite(tmp_path / "x.tif", _pixels(H, W), photometric="minisblack", compression="zlib", tile=(16, 16))
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    for _ in range(3):
        source = open_source(tmp_path / "x.tif")
        source.read(0, slice(0, 20), slice(0, 20))
        source.close()
        source.close()
        with pytest.raises(BadInput):
            open_source(tmp_path / "x.tif", axes="ABC")
    after = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    assert after == before


# ---- fingerprints


def test_a_small_file_is_told_by_each_of_its_bytes_and_nothing_else(tmp_path: Path) -> None:
    path, content = tmp_path / "x.tif", np.random.default_rng(0).bytes(300)
    path.write_bytes(content)
    first = fingerprint(path)
    assert json.loads(json.dumps(first)) == first
    os.utime(path, (1, 1))
    (tmp_path / "copy.png").write_bytes(content)
    assert fingerprint(path) == fingerprint(tmp_path / "copy.png") == first
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        assert fingerprint(path) != first
    for other in (content[:-1], content + b"\0", b""):
        path.write_bytes(other)
        assert fingerprint(path) != first


def test_a_large_file_is_told_by_its_ends_its_size_and_its_time(tmp_path: Path) -> None:
    path, end = tmp_path / "x.npy", 32 * 2**20

    def made(size: int, changed: int | None = None, when: int = 10**18) -> dict[str, Any]:
        with path.open("wb") as file:
            # a file of holes takes no room
            file.truncate(size)
            if changed is not None:
                file.seek(changed)
                file.write(b"\1")
        os.utime(path, ns=(when, when))
        return fingerprint(path)

    size = 2 * end + 2
    first = made(size)
    assert made(size) == first
    for place in (0, end - 1, end + 2, size - 1):
        assert made(size, place) != first, place
    assert made(size + 1) != first
    assert made(size, when=10**18 + 1) != first
    # up to the limit every byte counts, and the time does not
    whole = made(2 * end)
    assert made(2 * end, when=1) == whole
    for place in (end - 1, end, 2 * end - 1):
        assert made(2 * end, place) != whole, place


def test_a_zarr_folder_is_told_by_its_descriptions_and_chunks(tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    path = _small_zarr(tmp_path / "x.zarr")
    first = fingerprint(path)
    assert json.loads(json.dumps(first)) == first
    assert fingerprint(path) == first
    shutil.copytree(path, tmp_path / "copy.zarr", copy_function=shutil.copy2)
    assert fingerprint(tmp_path / "copy.zarr") == first
    chunk, about = path / "c" / "1" / "1", path / "zarr.json"
    for changed in (chunk, about):
        before, times = changed.read_bytes(), changed.stat()
        changed.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        assert fingerprint(path) != first
        changed.write_bytes(before)
        os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert fingerprint(path) == first
    chunk.rename(path / "c" / "1" / "9")
    assert fingerprint(path) != first
