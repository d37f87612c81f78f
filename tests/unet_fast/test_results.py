"""Results on disk: what is read back is what was given, band by band, in every format; the same bytes each time; a
result takes its place when it is whole, and what was there stays until then.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from tests.proof.properties import given, settings, st
from unet_fast import results
from unet_fast.errors import BadInput
from unet_fast.files import read_stack
from unet_fast.results import FORMATS, Result, check_format, put_back, write_result
from unet_fast.sources import open_source

Array = np.ndarray[Any, Any]

# [D, P, H, W], whether the file has the first, whether it has the second
AXES = {
    "YX": ((1, 1), False, False),
    "ZYX": ((3, 1), True, False),
    "CYX": ((1, 2), False, True),
    "ZCYX": ((3, 2), True, True),
}
DTYPES = ["uint8", "uint16", "uint32", "float16", "float32"]
SIZES = [(1, 1), (1, 7), (9, 1), (2, 2), (33, 47)]
# what is written where; a picture holds one plane of whole numbers
STACKED = [".tif", ".npy", ".zarr"]


@dataclass(slots=True)
class _Asked:
    """Pixels that are given in bands of rows, and what was asked for."""

    pixels: Array
    asked: list[tuple[int, int, int, int]] = field(default_factory=list)
    # after so many bands, this is raised
    ends: int | None = None
    error: BaseException = field(default_factory=lambda: RuntimeError("no more"))

    def __call__(self, z: int, plane: int, first: int, stop: int) -> Array:
        if self.ends is not None and len(self.asked) >= self.ends:
            raise self.error
        self.asked.append((z, plane, first, stop))
        return self.pixels[z, plane, first:stop]

    @property
    def highest(self) -> int:
        return max(stop - first for *_, first, stop in self.asked)


def _pixels(axes: str, dtype: str, size: tuple[int, int]) -> Array:
    shape = (*AXES[axes][0], *size)
    values = np.random.default_rng(0).permutation(int(np.prod(shape))).reshape(shape)
    return (values / values.size).astype(dtype) if dtype.startswith("f") else (values % 60_000).astype(dtype)


def _result(pixels: Array, axes: str = "YX", *, top: float = 1.0, ends: int | None = None, **more: Any) -> Result:
    _, is_stack, has_planes = AXES[axes]
    rows = _Asked(pixels, ends=ends, **more)
    return Result(pixels.shape, pixels.dtype, rows, is_stack, has_planes, top)


def _asked(result: Result) -> _Asked:
    assert isinstance(result.rows, _Asked)
    return result.rows


def _of_file(pixels: Array, axes: str) -> Array:
    """[D, P, H, W] with the axes that a file has."""
    return pixels.reshape([n for n, axis in zip(pixels.shape, "ZCYX", strict=True) if axis in axes])


def _bytes(path: Path) -> dict[str, bytes]:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {str(file.relative_to(path)): file.read_bytes() for file in files if file.is_file()}


def _needs(suffix: str) -> None:
    if suffix == ".zarr":
        pytest.importorskip("zarr")


@pytest.fixture
def within(tmp_path: Path) -> Path:
    (tmp_path / "within").mkdir()
    return tmp_path / "within"


# ---- what is given is read back


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_tiff_holds_what_was_given(
    axes: str, dtype: str, size: tuple[int, int], tmp_path: Path, within: Path
) -> None:
    pixels = _pixels(axes, dtype, size)
    result = _result(pixels, axes, top=7.0)
    assert (result.axes, result.outer) == (axes, _of_file(pixels, axes).shape)
    assert result.nbytes == pixels.nbytes
    write_result(tmp_path / "x.tif", result, within)
    with tifffile.TiffFile(tmp_path / "x.tif") as tiff:
        assert len(tiff.series) == 1
        series = tiff.series[0]
        found = series.asarray()
        assert (found.dtype, found.size) == (pixels.dtype, pixels.size)
        np.testing.assert_array_equal(found.reshape(pixels.shape), pixels)
        assert not tiff.is_bigtiff
        # where none is 1, axes are as promised
        if 1 not in size:
            assert (series.axes, series.shape) == (axes, _of_file(pixels, axes).shape)
        if dtype in ("uint8", "uint16", "float32") and size[1] > 1:
            assert tiff.imagej_metadata is not None
            assert (tiff.imagej_metadata["min"], tiff.imagej_metadata["max"]) == (0, 7)
        compressed = {page.compression for page in tiff.pages} == {tifffile.COMPRESSION.ADOBE_DEFLATE}
        assert compressed == (dtype.startswith("u") and size[1] > 1)
    if dtype != "float16":
        stack = read_stack(tmp_path / "x.tif")
        np.testing.assert_array_equal(stack.pixels.reshape(pixels.shape), pixels)
        if 1 not in size:
            assert stack.is_stack == ("Z" in axes)
            assert stack.pixels.shape == pixels.shape
    assert sorted(p.name for p in tmp_path.iterdir()) == ["within", "x.tif"]
    assert not list(within.iterdir())


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_numpy_file_holds_what_was_given(
    axes: str, dtype: str, size: tuple[int, int], tmp_path: Path, within: Path
) -> None:
    pixels = _pixels(axes, dtype, size)
    write_result(tmp_path / "x.npy", _result(pixels, axes), within)
    found = np.load(tmp_path / "x.npy")
    assert found.dtype == pixels.dtype
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, _of_file(pixels, axes), strict=True)
    assert not list(within.iterdir())


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_zarr_holds_what_was_given(
    axes: str, dtype: str, size: tuple[int, int], tmp_path: Path, within: Path
) -> None:
    zarr = pytest.importorskip("zarr")
    pixels = _pixels(axes, dtype, size)
    path = tmp_path / "x.zarr"
    write_result(path, _result(pixels, axes), within)
    _assert_ome_zarr(path)
    found = zarr.open_array(path / "0", mode="r")
    # the format wants channels before what lies in space
    order = axes.replace("ZC", "CZ")
    assert found.metadata.dimension_names == tuple(order.lower())
    wanted = _of_file(pixels, axes)
    wanted = wanted.swapaxes(0, 1) if order != axes else wanted
    assert found.dtype == pixels.dtype
    np.testing.assert_array_equal(found[...], wanted, strict=True)
    with closing(open_source(path)) as source:
        assert source.shape == pixels.shape
        for z in range(len(pixels)):
            np.testing.assert_array_equal(source.read(z, slice(0, size[0]), slice(0, size[1])), pixels[z])
    assert not list(within.iterdir())


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
@pytest.mark.parametrize("top", [1, 255, 256, 65_535])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_picture_holds_what_was_given(
    dtype: str, top: int, size: tuple[int, int], tmp_path: Path, within: Path
) -> None:
    pixels = (_pixels("YX", "uint32", size) % top).astype(dtype)
    pixels.flat[-1] = min(top, np.iinfo(dtype).max)
    write_result(tmp_path / "x.png", _result(pixels, top=top), within)
    np.testing.assert_array_equal(read_stack(tmp_path / "x.png", labels=True).pixels, pixels)
    with Image.open(tmp_path / "x.png") as picture:
        # ids up to 255 are in colours
        assert (picture.mode == "P") == (pixels.max() <= 255)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["within", "x.png"]
    assert not list(within.iterdir())


@given(
    axes=st.sampled_from(sorted(AXES)),
    dtype=st.sampled_from(DTYPES),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    suffix=st.sampled_from([".tif", ".npy"]),
    big=st.booleans(),
    unit=st.integers(1, 4),
    strip=st.integers(1, 400),
)
@settings(derandomize=True, database=None, deadline=None, max_examples=80)
def test_any_size_cut_anyhow_is_read_back(
    axes: str, dtype: str, size: tuple[int, int], suffix: str, big: bool, unit: int, strip: int
) -> None:
    pixels = _pixels(axes, dtype, size)
    result = _result(pixels, axes)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "_TIFF_TILE", 16 * unit)
        patch.setattr(results, "_STRIP_BYTES", strip)
        if big:
            patch.setattr(results, "_BIG", 0)
        path = Path(folder) / f"x{suffix}"
        write_result(path, result, Path(folder))
        found = np.load(path) if suffix == ".npy" else tifffile.imread(path)
        assert found.dtype == pixels.dtype
        np.testing.assert_array_equal(found.reshape(pixels.shape), pixels)
        assert [p.name for p in Path(folder).iterdir()] == [path.name]
    # every row once, in the order of the file
    rows = [(z, plane, y) for z, plane, first, stop in _asked(result).asked for y in range(first, stop)]
    assert rows == [(*place[:2], place[2]) for place in np.ndindex(*pixels.shape[:3])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axes", AXES)
def test_above_the_limit_a_tiff_is_big_and_in_tiles(
    axes: str, dtype: str, tmp_path: Path, within: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in ((515, 530), (7, 3), (1, 1)) if axes == "ZYX" else ((7, 3), (1, 1)):
        pixels = _pixels(axes, dtype, size)
        monkeypatch.setattr(results, "_BIG", pixels.nbytes)
        write_result(tmp_path / "x.tif", _result(pixels, axes), within)
        with tifffile.TiffFile(tmp_path / "x.tif") as tiff:
            assert tiff.is_bigtiff
            assert len(tiff.series) == 1
            series = tiff.series[0]
            if 1 not in size:
                assert (series.axes, series.shape) == (axes, _of_file(pixels, axes).shape)
            np.testing.assert_array_equal(series.asarray().reshape(pixels.shape), pixels)
            assert series.dtype == pixels.dtype
            # what is not compressed can be mapped
            compressed = dtype.startswith("u") and size[1] > 1
            assert tiff.pages[0].is_tiled == compressed
            assert (series.dataoffset is None) == compressed
        monkeypatch.setattr(results, "_BIG", pixels.nbytes + 1)
        write_result(tmp_path / "x.tif", _result(pixels, axes), within)
        with tifffile.TiffFile(tmp_path / "x.tif") as tiff:
            assert not tiff.is_bigtiff


@pytest.mark.parametrize(("top", "shown"), [(0, 1), (1, 1), (3, 3), (40_000, 40_000)])
def test_a_display_shows_the_least_class_and_the_most_cells(
    top: float, shown: float, tmp_path: Path, within: Path
) -> None:
    for dtype in ("uint8", "uint16", "float32"):
        write_result(tmp_path / "x.tif", _result(_pixels("YX", dtype, (5, 6)), top=top), within)
        with tifffile.TiffFile(tmp_path / "x.tif") as tiff:
            assert tiff.imagej_metadata is not None
            assert (tiff.imagej_metadata["min"], tiff.imagej_metadata["max"]) == (0, shown)


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_same_pixels_give_the_same_bytes(suffix: str, tmp_path: Path, within: Path) -> None:
    _needs(suffix)
    axes = "YX" if suffix == ".png" else "ZCYX"
    for dtype in ("uint16",) if suffix == ".png" else DTYPES:
        pixels = _pixels(axes, dtype, (40, 50))
        (tmp_path / "other").mkdir(exist_ok=True)
        paths = [tmp_path / f"x{suffix}", tmp_path / "other" / f"x{suffix}", tmp_path / f"x{suffix}"]
        found = []
        for path in paths:
            write_result(path, _result(pixels, axes), within)
            found.append(_bytes(path))
        assert found[0] == found[1] == found[2]
        assert all(found[0].values())


# ---- in bands


@pytest.mark.parametrize("suffix", STACKED)
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_rows_are_asked_for_in_bands_and_once(suffix: str, dtype: str, tmp_path: Path, within: Path) -> None:
    _needs(suffix)
    # a Zarr has a file for each chunk
    wide = (9, 2000) if suffix == ".zarr" else (3, 270_000)
    for size in ((1100, 300), wide):
        pixels = _pixels("ZYX", dtype, size)
        result = _result(pixels, "ZYX")
        write_result(tmp_path / f"x{suffix}", result, within)
        asked = _asked(result)
        if suffix == ".tif" and dtype == "uint8":
            # a strip, or a row where that is more
            assert asked.highest * size[1] <= max(2**18, size[1])
        else:
            assert asked.highest <= 512
        rows = [(z, y) for z, _, first, stop in asked.asked for y in range(first, stop)]
        assert rows == [(z, y) for z in range(3) for y in range(size[0])]


def test_a_big_tiff_asks_for_a_row_of_tiles(tmp_path: Path, within: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "_BIG", 0)
    result = _result(_pixels("ZCYX", "uint8", (1100, 20)), "ZCYX")
    write_result(tmp_path / "x.tif", result, within)
    assert [place[2:] for place in _asked(result).asked] == [(0, 512), (512, 1024), (1024, 1100)] * 6


# ---- OME-Zarr


def _assert_ome_zarr(path: Path) -> dict[str, Any]:
    """What version 0.5 demands of a multiscale image; its description."""
    about = json.loads((path / "zarr.json").read_text())
    assert about["zarr_format"] == 3
    assert about["node_type"] == "group"
    ome = about["attributes"]["ome"]
    assert ome["version"] == "0.5"
    (scales,) = ome["multiscales"]
    axes = scales["axes"]
    assert 2 <= len(axes) <= 5
    assert len({axis["name"] for axis in axes}) == len(axes)
    kinds = [axis["type"] for axis in axes]
    assert 2 <= kinds.count("space") <= 3
    assert kinds.count("time") <= 1
    assert kinds.count("channel") <= 1
    # time, then channels, then space
    assert kinds == sorted(kinds, key=["time", "channel", "space"].index)
    assert [axis["name"] for axis in axes if axis["type"] == "space"] == ["z", "y", "x"][-kinds.count("space") :]
    assert scales["datasets"]
    before: list[float] = []
    for dataset in scales["datasets"]:
        level = json.loads((path / dataset["path"] / "zarr.json").read_text())
        assert level["zarr_format"] == 3
        assert level["node_type"] == "array"
        assert len(level["shape"]) == len(axes)
        assert level["dimension_names"] == [axis["name"] for axis in axes]
        (scaled,) = dataset["coordinateTransformations"]
        assert scaled["type"] == "scale"
        assert len(scaled["scale"]) == len(axes)
        assert all(isinstance(factor, float) and factor > 0 for factor in scaled["scale"])
        # from the finest on
        assert scaled["scale"] > before
        before = scaled["scale"]
    return scales


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("size", [(70, 45), (64, 17), (16, 65), (1, 33), (129, 1)], ids=str)
def test_levels_of_a_pyramid_are_every_other_pixel(
    axes: str, size: tuple[int, int], tmp_path: Path, within: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zarr = pytest.importorskip("zarr")
    monkeypatch.setattr(results, "_ZARR_CHUNK", 16)
    monkeypatch.setattr(results, "_SMALLEST_LEVEL", 16)
    pixels = _pixels(axes, "uint16", size)
    path = tmp_path / "cells of Tuesday.zarr"
    result = _result(pixels, axes)
    write_result(path, result, within)
    scales = _assert_ome_zarr(path)
    assert scales["name"] == "cells of Tuesday"
    whole = zarr.open_array(path / "0", mode="r")[...]
    levels = 1
    while max(-(-n // 2 ** (levels - 1)) for n in size) > 16:
        levels += 1
    assert [dataset["path"] for dataset in scales["datasets"]] == [str(level) for level in range(levels)]
    assert sorted(p.name for p in path.iterdir()) == [*map(str, range(levels)), "zarr.json"]
    for level, dataset in enumerate(scales["datasets"]):
        found = zarr.open_array(path / dataset["path"], mode="r")
        np.testing.assert_array_equal(found[...], whole[..., :: 2**level, :: 2**level], strict=True)
        assert found.chunks == (1,) * (found.ndim - 2) + tuple(min(16, n) for n in found.shape[-2:])
        factors = [1.0] * (found.ndim - 2) + [2.0**level] * 2
        assert dataset["coordinateTransformations"] == [{"type": "scale", "scale": factors}]
    # the finest alone is asked for, and each of its rows once
    assert _asked(result).highest <= 16
    rows = [(*place[:2], y) for place in _asked(result).asked for y in range(*place[2:])]
    assert sorted(rows) == [(*place[:2], place[2]) for place in np.ndindex(*pixels.shape[:3])]


def test_a_small_zarr_has_one_level(tmp_path: Path, within: Path) -> None:
    pytest.importorskip("zarr")
    write_result(tmp_path / "x.zarr", _result(_pixels("YX", "uint8", (1024, 20))), within)
    assert len(_assert_ome_zarr(tmp_path / "x.zarr")["datasets"]) == 1
    write_result(tmp_path / "x.zarr", _result(_pixels("YX", "uint8", (1025, 20))), within)
    assert len(_assert_ome_zarr(tmp_path / "x.zarr")["datasets"]) == 2


# ---- its place


@pytest.mark.parametrize("suffix", FORMATS)
def test_what_was_there_is_replaced_when_the_new_is_whole_and_kept_when_it_fails(
    suffix: str, tmp_path: Path, within: Path
) -> None:
    _needs(suffix)
    path, axes = tmp_path / f"x{suffix}", "YX" if suffix == ".png" else "ZCYX"
    old, new = _pixels(axes, "uint8", (30, 40)), _pixels(axes, "uint16", (1200, 20))
    write_result(path, _result(new, axes), within)
    wanted = _bytes(path)
    write_result(path, _result(old, axes), within)
    before = _bytes(path)
    assert before != wanted
    for ends in (0,) if suffix == ".png" else (0, 1, 5):
        for error in (RuntimeError("no more"), BadInput("damaged"), MemoryError(), KeyboardInterrupt()):
            result = _result(new, axes, ends=ends, error=error)
            with pytest.raises(type(error)):
                write_result(path, result, within)
            assert len(_asked(result).asked) == ends
            assert _bytes(path) == before
            assert sorted(p.name for p in tmp_path.iterdir()) == ["within", path.name]
            assert not list(within.iterdir())
    write_result(path, _result(new, axes), within)
    assert _bytes(path) == wanted
    assert not list(within.iterdir())
    # and where nothing was, nothing is
    with pytest.raises(RuntimeError, match="no more"):
        write_result(tmp_path / f"y{suffix}", _result(new, axes, ends=0), within)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["within", path.name]
    assert not list(within.iterdir())


def test_a_zarr_takes_the_place_of_a_file_and_of_any_folder(tmp_path: Path, within: Path) -> None:
    pytest.importorskip("zarr")
    pixels, path = _pixels("YX", "uint8", (30, 40)), tmp_path / "x.zarr"
    write_result(path, _result(pixels), within)
    wanted = _bytes(path)
    shutil.rmtree(path)
    path.write_text("the cells of Tuesday")
    write_result(path, _result(pixels), within)
    assert _bytes(path) == wanted
    shutil.rmtree(path)
    (path / "more").mkdir(parents=True)
    write_result(path, _result(pixels), within)
    assert _bytes(path) == wanted
    assert not list(within.iterdir())


def test_what_another_run_left_is_no_obstacle(tmp_path: Path, within: Path) -> None:
    pytest.importorskip("zarr")
    pixels, path = _pixels("YX", "uint8", (30, 40)), tmp_path / "x.zarr"
    write_result(path, _result(pixels), within)
    wanted = _bytes(path)
    (within / "whole.zarr" / "0").mkdir(parents=True)
    (within / "whole.zarr" / "0" / "zarr.json").write_text("{")
    (within / "old.zarr").mkdir()
    write_result(path, _result(pixels), within)
    assert _bytes(path) == wanted
    assert not list(within.iterdir())


def test_a_zarr_whose_place_was_empty_when_a_run_was_killed_is_put_back(tmp_path: Path, within: Path) -> None:
    pytest.importorskip("zarr")
    path, old = tmp_path / "x.zarr", _pixels("YX", "uint8", (30, 40))
    write_result(path, _result(old), within)
    before = _bytes(path)
    # killed between two renames
    path.rename(within / "old.zarr")
    with pytest.raises(RuntimeError, match="no more"):
        write_result(path, _result(_pixels("YX", "uint16", (30, 40)), ends=0), within)
    assert _bytes(path) == before
    path.rename(within / "old.zarr")
    put_back(path, within)
    assert _bytes(path) == before
    # after the second rename, the new one stays
    (within / "old.zarr").mkdir()
    put_back(path, within)
    assert _bytes(path) == before
    shutil.rmtree(path)
    shutil.rmtree(within / "old.zarr")
    put_back(path, within)
    assert not path.exists()


def test_a_place_that_cannot_be_taken_is_named(tmp_path: Path, within: Path) -> None:
    (tmp_path / "file").touch()
    for suffix in FORMATS:
        _needs(suffix)
        for path in (tmp_path / "file" / f"x{suffix}", tmp_path / "missing" / f"x{suffix}"):
            with pytest.raises(BadInput) as caught:
                write_result(path, _result(_pixels("YX", "uint8", (5, 6))), within)
            assert str(caught.value).startswith(f"{path} cannot be written: ")
        if suffix != ".zarr":
            folder = tmp_path / f"folder{suffix}"
            folder.mkdir()
            with pytest.raises(BadInput) as caught:
                write_result(folder, _result(_pixels("YX", "uint8", (5, 6))), within)
            assert str(caught.value) == f"{folder} cannot be written: Is a directory"
        assert not list(within.iterdir())


def test_an_id_that_no_picture_holds_is_refused(tmp_path: Path, within: Path) -> None:
    path = tmp_path / "x.png"
    with pytest.raises(BadInput) as caught:
        write_result(path, _result(np.full((1, 1, 3, 4), 65_536, np.uint32)), within)
    assert str(caught.value) == f"{path} cannot hold id 65536; PNG ends at 65535, use .tif"
    assert [p.name for p in tmp_path.iterdir()] == ["within"]
    assert not list(within.iterdir())


# a process of its own: files may grow to so many bytes and no further, as on a disk that is full
_FULL_DISK = """
import json, resource, signal, sys
from pathlib import Path
import numpy as np
from unet_fast.errors import BadInput
from unet_fast.results import Result, write_result
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
rng = np.random.default_rng(0)
said = {}
try:
    import zarr, zarr.codecs
    zarr.create_array(folder / "first.zarr", shape=(3, 3), dtype="u1")[...] = 1
except ImportError:
    pass
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for name, dtype in json.loads(sys.argv[3]):
    pixels = rng.integers(0, 250, (1, 1, 900, 70)).astype(dtype)
    result = Result(pixels.shape, pixels.dtype, lambda z, p, a, b: pixels[z, p, a:b], False, False, 1.0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        write_result(folder / name, result, folder / "within")
        said[name + dtype] = "written"
    except BadInput as error:
        said[name + dtype] = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
print(json.dumps(said))
"""


@pytest.mark.parametrize("limit", [0, 300, 20_000])
def test_a_full_disk_is_a_sentence_and_leaves_what_was_there(limit: int, tmp_path: Path, within: Path) -> None:
    pytest.importorskip("resource")
    todo = [
        ("x.tif", "uint8"), ("x.tif", "uint32"), ("x.tif", "float32"), ("x.tif", "float16"), ("x.npy", "float16"),
        ("x.png", "uint8"), ("x.png", "uint16"),
    ]  # fmt: skip
    try:
        import zarr  # noqa: F401

        todo += [("x.zarr", "uint8"), ("x.zarr", "float32")]
    except ImportError:
        pass
    names = {name for name, _ in todo}
    for name in names:
        write_result(tmp_path / name, _result(_pixels("YX", "uint8", (5, 6))), within)
    before = {name: _bytes(tmp_path / name) for name in names}
    command = [sys.executable, "-c", _FULL_DISK, str(tmp_path), str(limit), json.dumps(todo)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    said = json.loads(done.stdout)
    assert len(said) == len(todo)
    for name, dtype in todo:
        sentence = said[name + dtype]
        assert sentence.startswith(f"{tmp_path / name} cannot be written: "), (name, dtype, sentence)
        assert "\n" not in sentence
        assert "File too large" in sentence or "is the disk full?" in sentence
    assert {name: _bytes(tmp_path / name) for name in names} == before
    assert not list(within.iterdir())
    assert {p.name for p in tmp_path.iterdir()} - {"first.zarr"} == names | {"within"}


def test_what_others_write_meanwhile_goes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, late = tmp_path / "whole.zarr", [0, 1, 2]
    (folder / "0").mkdir(parents=True)
    monkeypatch.setattr(time, "sleep", lambda _: late and (folder / str(late.pop())).mkdir(parents=True))
    results._remove(folder)
    assert not late
    assert not folder.exists()


def test_room_for_what_is_mapped_is_taken_before_it_is_written(
    tmp_path: Path, within: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page of a mapped file that the disk has no room for would end the process."""
    if not hasattr(os, "posix_fallocate"):
        pytest.skip("this system takes no room beforehand")

    def full(file: int, first: int, size: int) -> None:
        assert (first, size) == (0, os.fstat(file).st_size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "x.tif"
    write_result(path, _result(_pixels("YX", "uint8", (5, 6))), within)
    before = _bytes(path)
    monkeypatch.setattr(os, "posix_fallocate", full)
    for dtype in ("float16", "float32"):
        result = _result(_pixels("ZCYX", dtype, (30, 40)), "ZCYX")
        with pytest.raises(BadInput, match=r"x\.tif cannot be written: No space left on device"):
            write_result(path, result, within)
        assert not _asked(result).asked
        assert _bytes(path) == before
        assert not list(within.iterdir())


def test_a_zarr_that_cannot_take_its_place_leaves_what_was_there(
    tmp_path: Path, within: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("zarr")
    path = tmp_path / "x.zarr"
    write_result(path, _result(_pixels("YX", "uint8", (5, 6))), within)
    before, rename = _bytes(path), Path.rename

    def failing(old: Path, new: Path) -> Path:
        if old.name == "whole.zarr":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(old, new)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(BadInput, match=r"x\.zarr cannot be written: No space left on device"):
        write_result(path, _result(_pixels("YX", "uint16", (7, 8))), within)
    assert _bytes(path) == before
    assert not list(within.iterdir())


# ---- formats


def test_a_name_that_cannot_hold_the_output_is_refused(tmp_path: Path) -> None:
    for suffix in (*FORMATS, *(s.upper() for s in FORMATS)):
        _needs(suffix.lower())
        check_format(tmp_path / f"x{suffix}", "labels")
        check_format(tmp_path / f"x{suffix}", "labels", False)
        if suffix.lower() != ".png":
            check_format(tmp_path / f"x{suffix}", "probabilities", True)
    for name, output, is_stack, said in (
        ("x.jpg", "labels", None, "must end in .tif, .tiff, .png, .npy, .zarr: .jpg changes the values it stores"),
        ("x", "labels", None, "must end in .tif, .tiff, .png, .npy, .zarr: no suffix changes"),
        ("x.png", "probabilities", None, "cannot hold probabilities; use .tif"),
        ("x.png", "labels", True, "cannot hold a stack; use .tif"),
        ("x.PNG", "instances", True, "cannot hold a stack; use .tif"),
    ):
        with pytest.raises(BadInput) as caught:
            check_format(tmp_path / name, output, is_stack)
        assert str(caught.value).startswith(f"{tmp_path / name} {said}")


def test_zarr_without_its_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(BadInput, match=r"x\.zarr needs another library; pip install 'zarr>=3' writes it"):
        check_format(tmp_path / "x.zarr", "labels")


@pytest.mark.parametrize("suffix", [".TIF", ".Tiff", ".NPY", ".PNG"])
def test_a_suffix_may_be_in_capitals(suffix: str, tmp_path: Path, within: Path) -> None:
    pixels = _pixels("YX", "uint8", (9, 11))
    write_result(tmp_path / f"x{suffix}", _result(pixels), within)
    if suffix == ".NPY":
        np.testing.assert_array_equal(np.load(tmp_path / "x.NPY"), pixels[0, 0])
    else:
        np.testing.assert_array_equal(read_stack(tmp_path / f"x{suffix}", labels=True).pixels, pixels)


NAMES = ["two words", "two\nlines", "Zürich_细胞_🔬", "<script>", "-rf", "%d", "x" * 250]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("stem", NAMES, ids=lambda stem: ascii(stem[:20]))
def test_a_result_may_be_called_anything(stem: str, suffix: str, tmp_path: Path, within: Path) -> None:
    _needs(suffix)
    pixels, path = _pixels("YX", "uint8", (9, 11)), tmp_path / f"{stem}{suffix}"
    write_result(path, _result(pixels), within)
    if suffix == ".png":
        np.testing.assert_array_equal(read_stack(path, labels=True).pixels, pixels)
    else:
        with closing(open_source(path)) as source:
            np.testing.assert_array_equal(source.read(0, slice(0, 9), slice(0, 11)), pixels[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["within", path.name])
    assert not list(within.iterdir())


@pytest.mark.parametrize("size", [(1, 7), (9, 1), (33, 47)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("axes", AXES)
def test_an_ome_name_holds_an_ome_tiff(axes: str, dtype: str, size: tuple[int, int], tmp_path: Path) -> None:
    pixels, written = _pixels(axes, dtype, size), []
    for name in ("a", "b"):
        path = tmp_path / name / "labels.ome.tif"
        path.parent.mkdir()
        write_result(path, _result(pixels, axes), path.parent)
        written.append(path.read_bytes())
        with tifffile.TiffFile(path) as tiff:
            assert tiff.is_ome
            assert not tiff.is_imagej
            assert tiff.series[0].axes == axes
            assert len(tiff.series) == 1
            np.testing.assert_array_equal(tiff.asarray().reshape(pixels.shape), pixels)
        found = read_stack(path).pixels
        np.testing.assert_array_equal(found.reshape(pixels.shape), pixels)
    assert written[0] == written[1]
