"""Image files: what is written is read, whatever the layout; what is damaged is refused, never misread.

A file cut at any byte gives the exact pixels or a sentence, and a write that fails leaves the old file as it was.
"""

import io
import os
import resource
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image, PngImagePlugin

from tests.proof.properties import given, settings, st
from unet_fast.errors import BadInput
from unet_fast.files import list_images, read_stack, replacing, writable_folder, write_picture, write_tiff

Array = np.ndarray[Any, Any]
# ways to write one stack: options of tifffile.imwrite
LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no metadata": {"metadata": None},
    "strips": {"rowsperstrip": 5, "metadata": None},
    "tiled": {"tile": (16, 16)},
    "deflate": {"compression": "zlib"},
    "deflate, tiled": {"compression": "zlib", "tile": (16, 16), "metadata": None},
    "predictor": {"compression": "zlib", "predictor": True},
    "bigtiff": {"bigtiff": True, "metadata": None},
    "big-endian": {"byteorder": ">"},
    "OME": {"ome": True, "metadata": {"axes": "ZYX"}},
    "OME, tiled": {"ome": True, "metadata": {"axes": "ZYX"}, "tile": (16, 16), "compression": "zlib"},
    "ImageJ": {"imagej": True, "metadata": {"axes": "ZYX"}},
    "ImageJ, deflate": {"imagej": True, "metadata": {"axes": "ZYX"}, "compression": "zlib"},
}
# [D, C, H, W] of sizes that belong to axes
AS_SLICES: dict[str, Callable[[Array], Array]] = {
    "YX": lambda a: a[None, None],
    "CYX": lambda a: a[None],
    "YXC": lambda a: a.transpose(2, 0, 1)[None],
    "ZYX": lambda a: a[:, None],
    "ZCYX": lambda a: a,
    "ZYXC": lambda a: a.transpose(0, 3, 1, 2),
}


def _pixels(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> Array:
    values = np.random.default_rng(seed).integers(0, 250, shape)
    return values % 2 == 1 if np.dtype(dtype).kind == "b" else values.astype(dtype)


def _write(path: Path, array: Array, **options: Any) -> Path:
    tifffile.imwrite(path, array, photometric="minisblack", **options)
    return path


# ---- what is written is read


# tifffile alone writes no bits in tiles, and no predictor of floats
def _writable(layout: str, dtype: str) -> bool:
    odd = {"bool": {"imagej", "predictor", "tile"}, "float32": {"predictor"}}.get(dtype, set())
    return not odd & set(LAYOUTS[layout])


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [(way, d) for way in LAYOUTS for d in ("uint8", "uint16", "float32", "bool") if _writable(way, d)],
)
def test_every_way_to_write_a_stack_is_read(layout: str, dtype: str, tmp_path: Path) -> None:
    stack = _pixels((4, 20, 24), dtype)
    read = read_stack(_write(tmp_path / "x.tif", stack, **LAYOUTS[layout]))
    np.testing.assert_array_equal(read.pixels, stack[:, None])
    assert read.pixels.dtype == ("uint8" if dtype == "bool" else dtype)
    assert read.pixels.dtype.isnative
    assert read.is_stack
    assert read.names == [f"x.tif[{z}]" for z in range(4)]


sizes = st.integers(1, 6)


@given(
    axes=st.sampled_from(sorted(AS_SLICES)),
    n=st.tuples(sizes, sizes, sizes, sizes),
    dtype=st.sampled_from(["u1", "u2", "u4", "i4", "f4", "f8"]),
)
def test_axes_that_are_said_are_taken(axes: str, n: tuple[int, ...], dtype: str) -> None:
    array = _pixels(n[: len(axes)], dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = _write(Path(folder) / "x.tif", array, metadata=None)
        # tifffile drops axes of size 1 where nobody named them
        if tifffile.imread(path).ndim == array.ndim:
            np.testing.assert_array_equal(read_stack(path, axes=axes).pixels, AS_SLICES[axes](array))


@given(
    axes=st.sampled_from(["YX", "CYX", "ZYX", "ZCYX"]),
    n=st.tuples(sizes, sizes, sizes, sizes),
    dtype=st.sampled_from(["u1", "u2", "u4", "u8", "i4", "f4", "f8"]),
)
def test_write_tiff_and_read_stack_are_inverse(axes: str, n: tuple[int, ...], dtype: str) -> None:
    array = _pixels(n[: len(axes)], dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.tif"
        write_tiff(path, array, axes)
        read = read_stack(path)
        assert [p.name for p in Path(folder).iterdir()] == ["x.tif"]
    np.testing.assert_array_equal(read.pixels, AS_SLICES[axes](array))
    assert read.pixels.dtype == array.dtype


@pytest.mark.parametrize("axes", ["YX", "CYX", "ZYX", "ZCYX", "TYX", "YXS"])
@pytest.mark.parametrize("kind", ["ome", "imagej"])
def test_axes_in_the_file_are_believed(axes: str, kind: str, tmp_path: Path) -> None:
    array = _pixels({"YXS": (9, 11, 3)}.get(axes, (3, 4, 9, 11)[-len(axes) :]), np.uint8)
    photometric = "rgb" if "S" in axes else "minisblack"
    path = tmp_path / "x.ome.tif"
    tifffile.imwrite(path, array, photometric=photometric, metadata={"axes": axes}, **{kind: True})
    read = read_stack(path)
    same = axes.replace("T", "Z").replace("S", "C")
    np.testing.assert_array_equal(read.pixels, AS_SLICES[same](array))
    assert read.is_stack == ("Z" in same)


@pytest.mark.parametrize("axis", ["I", "Q", "A", "H", "P", "R"])
def test_an_axis_that_is_neither_channel_nor_place_is_a_pile_of_slices(axis: str, tmp_path: Path) -> None:
    read = read_stack(_write(tmp_path / "x.tif", _pixels((3, 5, 6), np.uint8), metadata={"axes": axis + "YX"}))
    assert read.is_stack
    assert len(read.names) == len(read.pixels) == 3


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_colours_in_a_tiff_are_channels(planar: str, tmp_path: Path) -> None:
    array = _pixels((9, 11, 3) if planar == "contig" else (3, 9, 11), np.uint8)
    tifffile.imwrite(tmp_path / "x.tif", array, photometric="rgb", planarconfig=planar)
    read = read_stack(tmp_path / "x.tif")
    np.testing.assert_array_equal(read.pixels, AS_SLICES["YXC" if planar == "contig" else "CYX"](array))
    assert not read.is_stack


def test_a_palette_is_colours_of_an_image_and_ids_of_labels(tmp_path: Path) -> None:
    ids = _pixels((7, 9), np.uint8) % 5
    colours = np.random.default_rng(1).integers(0, 256, (256, 3)).astype(np.uint8)
    picture = Image.fromarray(ids)
    picture.putpalette(colours.tobytes())
    for name, more in (("plain.png", {}), ("transparent.png", {"transparency": bytes(range(200))})):
        picture.save(tmp_path / name, **more)
        np.testing.assert_array_equal(read_stack(tmp_path / name, labels=True).pixels[0, 0], ids)
        np.testing.assert_array_equal(read_stack(tmp_path / name).pixels[0], colours[ids].transpose(2, 0, 1))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, bool], ids=lambda d: np.dtype(d).name)
def test_a_grey_png_keeps_its_values(dtype: Any, tmp_path: Path) -> None:
    values = _pixels((7, 9), dtype)
    if dtype == np.uint16:
        values *= 257
    Image.fromarray(values).save(tmp_path / "x.png")
    for labels in (False, True):
        np.testing.assert_array_equal(read_stack(tmp_path / "x.png", labels=labels).pixels[0, 0], values)


@pytest.mark.parametrize("suffix", ["png", "bmp"])
def test_colours_of_a_picture_are_channels(suffix: str, tmp_path: Path) -> None:
    values = _pixels((7, 9, 3), np.uint8)
    Image.fromarray(values).save(tmp_path / f"x.{suffix}")
    np.testing.assert_array_equal(read_stack(tmp_path / f"x.{suffix}").pixels[0], values.transpose(2, 0, 1))


@pytest.mark.parametrize("channels", [1, 3])
def test_an_opacity_that_is_the_same_everywhere_is_no_channel(channels: int, tmp_path: Path) -> None:
    values = _pixels((7, 9, channels + 1), np.uint8)
    values[..., -1] = 255
    Image.fromarray(values).save(tmp_path / "same.png")
    assert read_stack(tmp_path / "same.png").pixels.shape == (1, channels, 7, 9)
    values[0, 0, -1] = 7
    Image.fromarray(values).save(tmp_path / "differs.png")
    assert read_stack(tmp_path / "differs.png").pixels.shape == (1, channels + 1, 7, 9)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_jpeg_is_an_image_and_never_labels(mode: str, tmp_path: Path) -> None:
    grey = np.tile(np.arange(64, dtype=np.uint8) * 3, (64, 1))
    Image.fromarray(np.stack([grey] * 3, -1)).convert(mode).save(tmp_path / "x.jpg", quality=95)
    pixels = read_stack(tmp_path / "x.jpg").pixels
    assert pixels.shape == (1, 1 if mode == "L" else 3, 64, 64)
    assert np.abs(pixels[0].astype(int) - grey).max() < 12
    with pytest.raises(BadInput, match=r"x\.jpg holds labels as JPEG, which changes ids; save them as PNG or TIFF"):
        read_stack(tmp_path / "x.jpg", labels=True)


def test_labels_in_three_equal_channels_are_one_channel(tmp_path: Path) -> None:
    ids = _pixels((7, 9), np.uint8)
    Image.fromarray(np.stack([ids] * 3, -1)).save(tmp_path / "x.png")
    np.testing.assert_array_equal(read_stack(tmp_path / "x.png", labels=True).pixels, ids[None, None])
    Image.fromarray(np.stack([ids, ids, ids // 2], -1)).save(tmp_path / "x.png")
    with pytest.raises(BadInput, match="labels in 3 channels that differ"):
        read_stack(tmp_path / "x.png", labels=True)


def test_a_png_whose_colours_would_lose_half_their_bits_is_refused(tmp_path: Path) -> None:
    import zlib

    rows = b"".join(b"\0" + bytes(2 * 3 * 4) for _ in range(4))
    file = io.BytesIO(b"\x89PNG\r\n\x1a\n")
    file.seek(0, io.SEEK_END)
    for name, data in (
        (b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ):
        PngImagePlugin.putchunk(file, name, data)
    (tmp_path / "x.png").write_bytes(file.getvalue())
    with pytest.raises(BadInput, match=r"several channels of 16 bits, of which 8 would be lost; save it as TIFF"):
        read_stack(tmp_path / "x.png")


# ---- what is damaged is refused


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_cut_anywhere_is_exact_or_refused(layout: str, tmp_path: Path) -> None:
    stack = _pixels((4, 33, 37), np.uint16)
    path = _write(tmp_path / "x.tif", stack, **LAYOUTS[layout])
    whole = path.read_bytes()
    spread = np.random.default_rng(2).integers(0, len(whole), 24).tolist()
    refused = []
    for cut in [*spread, 0, 1, 4, 8, 15, len(whole) // 2, len(whole) - 4, len(whole) - 1]:
        path.write_bytes(whole[:cut])
        try:
            read = read_stack(path)
        except BadInput as error:
            refused.append(str(error))
        else:
            np.testing.assert_array_equal(read.pixels, stack[:, None], f"cut at {cut} of {len(whole)}")
            assert read.is_stack
    assert len(refused) > 20
    assert all(said.startswith(f"{path} ") and "\n" not in said for said in refused)


@pytest.mark.parametrize(
    "options", [{}, {"rowsperstrip": 5}, {"tile": (16, 16)}, {"compression": "zlib"}, {"bigtiff": True}], ids=str
)
def test_what_is_missing_is_named_with_its_page_and_byte(options: dict[str, Any], tmp_path: Path) -> None:
    path = _write(tmp_path / "x.tif", _pixels((33, 37), np.uint8), metadata=None, **options)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    said = rf"x\.tif is truncated: a part of page 0 ends at byte {len(whole)}, the file has {len(whole) - 5} bytes"
    with pytest.raises(BadInput, match=said):
        read_stack(path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_damage_is_a_sentence_or_is_read_but_never_another_error(layout: str, tmp_path: Path) -> None:
    path = _write(tmp_path / "x.tif", _pixels((3, 20, 24), np.uint8), **LAYOUTS[layout])
    whole = path.read_bytes()
    rng = np.random.default_rng(3)
    refused = []
    for _ in range(25):
        damaged = bytearray(whole)
        # the low bits only: a header that announces gigabytes is another test's business
        damaged[int(rng.integers(0, len(whole)))] ^= int(rng.integers(1, 8))
        path.write_bytes(damaged)
        try:
            read_stack(path)
        except BadInput as error:
            refused.append(str(error))
    assert not any("\n" in said for said in refused)


def test_a_changed_byte_in_a_deflated_tiff_is_seen(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.tif", _pixels((64, 64), np.uint8), compression="zlib", metadata=None)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 255
    path.write_bytes(damaged)
    with pytest.raises(BadInput, match=r"x\.tif cannot be read as TIFF: .*(decompressing|BAD_DATA)"):
        read_stack(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp"])
def test_a_picture_cut_anywhere_is_exact_or_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(_pixels((40, 37, 3), np.uint8)).save(path)
    whole, pixels = path.read_bytes(), read_stack(path).pixels
    for cut in [*np.random.default_rng(4).integers(0, len(whole), 30).tolist(), 0, 8, len(whole) - 1]:
        path.write_bytes(whole[:cut])
        try:
            read = read_stack(path)
        except BadInput:
            continue
        np.testing.assert_array_equal(read.pixels, pixels, f"cut at {cut} of {len(whole)}")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is no TIFF: it begins with b''"),
        (b"the cells of Tuesday", "is no TIFF: it begins with b'the '"),
        (b"XX\x2a\0\x08\0\0\0", "is no TIFF: it begins with b'XX"),
        (b"II\x2b\0\x08\0\0\0", "is no TIFF: version 43"),
        (b"II\x07\0\x08\0\0\0", "is no TIFF: version 7"),
        (b"II\x2a\0\0\0\0\0", "is a TIFF without a page"),
        (b"II\x2a\0\x08\0\0\0\0\0\x08\0\0\0", "damaged or truncated: page 1 should begin at byte 8"),
        (b"II\x2a\0\xff\xff\0\0", "page 0 should begin at byte 65535, the file has 8"),
        (b"II\x2a\0\x08\0\0\0\x05\0", "truncated inside the header of page 0, at byte 8"),
    ],
)
def test_what_is_no_tiff_is_named(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.tif").write_bytes(content)
    with pytest.raises(BadInput) as caught:
        read_stack(tmp_path / "x.tif")
    assert said in str(caught.value)


def test_text_called_png_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("the cells of Tuesday")
    with pytest.raises(BadInput, match=r"x\.png cannot be read as an image"):
        read_stack(tmp_path / "x.png")


def test_unclear_axes_are_named_with_what_was_found(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.tif", _pixels((2, 3, 5, 6), np.uint8), metadata={"axes": "TZYX"})
    with pytest.raises(BadInput) as caught:
        read_stack(path)
    assert f"{path} has axes TZYX of 2x3x5x6; expected one stack axis" in str(caught.value)
    assert "YX, CYX, YXC, ZYX, ZCYX" in str(caught.value)
    with pytest.raises(BadInput, match=r"has 4 axes of 2x3x5x6, axes said ZYX"):
        read_stack(path, axes="ZYX")
    for wrong in ("ZZYX", "ABCD", "zcyx"):
        with pytest.raises(BadInput, match=f"has axes {wrong} of"):
            read_stack(path, axes=wrong)


@pytest.mark.parametrize("dtype", [np.complex64, np.float16], ids=lambda d: np.dtype(d).name)
def test_numbers_that_are_no_grey_values_are_refused(dtype: Any, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=f"must be integer, float32 or float64, got {np.dtype(dtype).name}"):
        read_stack(_write(tmp_path / "x.tif", np.ones((5, 6), dtype)))


def test_images_of_different_kinds_in_one_file_are_refused(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "x.tif") as tiff:
        tiff.write(np.zeros((5, 6), np.uint8), photometric="minisblack")
        tiff.write(np.zeros((7, 8), np.uint8), photometric="minisblack")
    with pytest.raises(BadInput, match="holds 2 images of different kinds; expected one image or stack"):
        read_stack(tmp_path / "x.tif")


# ---- names and places


@pytest.mark.parametrize(
    "stem",
    [
        "two words",
        "Zürich_细胞_🔬",
        "<script>alert(1)<script>",
        "a;b&c|d'e\"f",
        "-rf",
        "%d",
        "x" * 251,
    ],
)
@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_a_file_may_be_called_anything(stem: str, suffix: str, tmp_path: Path) -> None:
    array = _pixels((5, 6), np.uint8)
    path = tmp_path / (stem + suffix)
    if suffix == ".tif":
        write_tiff(path, array, "YX")
    else:
        write_picture(path, array)
    assert list_images(tmp_path) == [path]
    read = read_stack(path, labels=True)
    np.testing.assert_array_equal(read.pixels[0, 0], array)
    assert read.names == [path.name]


def test_a_folder_is_in_natural_order_whatever_the_file_system_says(tmp_path: Path) -> None:
    wanted = ["2.PNG", "10.png", "a2b10.png", "a10b2.png", "t01.png", "t1.png", "t2.png", "t2_x.png", "t10.png"]
    for name in reversed(wanted):
        (tmp_path / name).touch()
    for name in (".hidden.png", "notes.txt", "Thumbs.db"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [p.name for p in list_images(tmp_path)] == wanted


@pytest.mark.parametrize("backwards", [False, True])
def test_names_of_one_number_are_in_one_order(backwards: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / name for name in ("x001.png", "x01.png", "x1.png")]
    for file in files:
        file.touch()
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter(files[::-1] if backwards else files))
    assert list_images(tmp_path) == files


@settings(max_examples=30)
@given(numbers=st.lists(st.integers(0, 10**6), unique=True, min_size=1, max_size=8))
def test_numbers_in_names_are_ordered_as_numbers(numbers: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for n in numbers:
            (Path(folder) / f"cell {n} of many.tif").touch()
        assert [int(p.stem.split()[1]) for p in list_images(Path(folder))] == sorted(numbers)


def test_nothing_to_list_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="missing does not exist"):
        list_images(tmp_path / "missing")
    with pytest.raises(BadInput, match="has no image in it; expected files ending in"):
        list_images(tmp_path)
    (tmp_path / "x.czi").touch()
    with pytest.raises(BadInput, match=r"must be one of .*, got \.czi"):
        list_images(tmp_path / "x.czi")
    with pytest.raises(BadInput, match=r"must be one of .*, got \.czi"):
        read_stack(tmp_path / "x.czi")
    with pytest.raises(BadInput, match="is no file"):
        read_stack(tmp_path)
    with pytest.raises(BadInput, match=r"x\.tif does not exist"):
        read_stack(tmp_path / "x.tif")
    with pytest.raises(BadInput, match="is neither a file nor a folder"):
        list_images(Path(os.devnull))


# ---- writing


def test_a_block_that_raises_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")
    for error in (RuntimeError, KeyboardInterrupt, MemoryError):
        with pytest.raises(error), replacing(path) as temporary:
            raise error(temporary.write_text("half"))
    with pytest.raises(BadInput, match=r"x\.txt cannot be written"), replacing(path):
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    write_tiff(path, np.ones((8, 8), np.uint8), "YX")
    old = path.read_bytes()
    array = np.random.default_rng(0).integers(0, 255, (64, 64))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for limit in (0, 100, 1000, 2000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            for write in (
                lambda: write_tiff(path, array.astype(np.uint8), "YX"),
                lambda: write_tiff(path, array.astype(np.float64), "YX"),
                lambda: write_picture(path.with_suffix(".png"), array),
            ):
                with pytest.raises(
                    BadInput, match=r"x\.(tif|png) cannot be written: .*(File too large|is the disk full)"
                ):
                    write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_a_result_has_the_permissions_of_any_new_file(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        write_tiff(tmp_path / "x.tif", np.ones((4, 4), np.uint8), "YX")
        (tmp_path / "plain").touch()
    finally:
        assert os.umask(before) == mask
    assert (tmp_path / "x.tif").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for path in (file / "x.tif", tmp_path / "missing" / "x.tif", Path("/proc/x.tif")):
        with pytest.raises(BadInput, match=f"{path} cannot be written"):
            write_tiff(path, np.ones((4, 4), np.uint8), "YX")
    (tmp_path / "folder.tif").mkdir()
    with pytest.raises(BadInput, match=r"folder\.tif cannot be written: Is a directory"):
        write_tiff(tmp_path / "folder.tif", np.ones((4, 4), np.uint8), "YX")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.tif"]


def test_a_folder_is_made_or_refused(tmp_path: Path) -> None:
    made = writable_folder(tmp_path / "a" / "b")
    assert made.is_dir()
    assert list(made.iterdir()) == []
    assert writable_folder(made) == made
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="file must be a folder, a file is in its place"):
        writable_folder(tmp_path / "file")
    for path in (tmp_path / "file" / "inside", Path("/proc/inside")):
        with pytest.raises(BadInput, match=f"{path} cannot be written"):
            writable_folder(path)


@settings(max_examples=25)
@given(top=st.sampled_from([0, 1, 7, 255, 256, 65535]), shape=st.tuples(sizes, sizes))
def test_labels_in_a_picture_are_read_as_they_were(top: int, shape: tuple[int, int]) -> None:
    ids = np.random.default_rng(top).integers(0, top + 1, shape)
    ids[0, 0] = top
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.png"
        write_picture(path, ids)
        np.testing.assert_array_equal(read_stack(path, labels=True).pixels[0, 0], ids)
        if top <= 255:
            with Image.open(path) as picture:
                colours = np.array(picture.convert("RGB"))
            # background is black, and no cell is
            np.testing.assert_array_equal(colours.any(-1), ids > 0)


def test_colours_in_a_picture_are_read_as_they_were(tmp_path: Path) -> None:
    colours = _pixels((5, 6, 3), np.uint8)
    write_picture(tmp_path / "x.png", colours)
    np.testing.assert_array_equal(read_stack(tmp_path / "x.png").pixels[0], colours.transpose(2, 0, 1))


def test_an_id_that_no_picture_holds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"x\.png cannot hold id 65536; PNG ends at 65535, use \.tif"):
        write_picture(tmp_path / "x.png", np.array([[0, 65536]]))
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_says_one_thing_and_says_it_in_the_error(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.tif", _pixels((4, 20, 24), np.uint8), compression="zlib")
    path.write_bytes(path.read_bytes()[:300])
    program = (
        "import sys, pathlib; from unet_fast.errors import BadInput; from unet_fast.files import read_stack\n"
        "try: read_stack(pathlib.Path(sys.argv[1]))\n"
        "except BadInput as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
