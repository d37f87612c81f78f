"""`check_data` lists all that is wrong, not the first of it; what it passes, training takes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from unet_fast.checking import Findings, check_data
from unet_fast.data import read_labelled
from unet_fast.errors import BadInput

Array = np.ndarray[Any, Any]


def _image(shape: tuple[int, ...] = (32, 32), dtype: Any = np.uint8, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 200, shape).astype(dtype)


def _cells(value: int | None = 1, side: int = 32) -> Array:
    """16 squares of 16 pixels; ids 1 to 16, or all of one value."""
    grid = np.arange(1, 17).reshape(4, 4)
    squares = np.kron(grid, np.pad(np.ones((4, 4), int), 2))
    return (squares if value is None else (squares > 0) * value).astype(np.uint8)[:side, :side]


def _write(folder: Path, **files: Array) -> Path:
    folder.mkdir(exist_ok=True)
    for name, array in files.items():
        tifffile.imwrite(folder / f"{name}.tif", array, photometric="minisblack")
    return folder


def _as_json(found: Findings) -> Any:
    return json.loads(json.dumps(found.as_dict(), allow_nan=False))


def test_all_that_is_wrong_is_found_at_once(tmp_path: Path) -> None:
    nan = _image(dtype=np.float32)
    nan[3, 4] = np.nan
    images = _write(
        tmp_path / "images",
        good=_image(),
        larger=_image((40, 32)),
        nan=nan,
        colours=_image((2, 32, 32)),
        lone=_image(),
        both=nan,
        all_nan=np.full((32, 32), np.nan, np.float32),
    )
    labels = _write(
        tmp_path / "labels",
        good=_cells(),
        larger=_cells(),
        nan=_cells(),
        colours=_cells(),
        widow=_cells(),
        both=_cells()[:30],
        all_nan=_cells() / 2,
        broken=_cells(),
    )
    (images / "broken.tif").write_bytes((images / "good.tif").read_bytes()[:200])
    _write(images, unread=_image())
    (labels / "unread.tif").write_text("the cells of Tuesday")
    (images / "twice broken.tif").write_text("")
    (labels / "twice broken.tif").write_text("")

    found = check_data(images, labels, axes=None)
    everything = "\n".join(found.problems)
    for said in (
        "1 label files have no image",
        "1 images have no labels",
        "larger.tif is 32x32, larger.tif is 40x32",
        "images/nan.tif has 1 NaN or infinite pixels, the first at nan.tif row 3 column 4",
        "images/both.tif has 1 NaN",
        "labels/both.tif is 30x32, both.tif is 32x32",
        "images/all_nan.tif has 1024 NaN",
        "labels/all_nan.tif must hold whole numbers as labels, got 0.5",
        "images/broken.tif is truncated",
        "labels/unread.tif is no TIFF",
        "images/twice broken.tif is no TIFF",
        "labels/twice broken.tif is no TIFF",
    ):
        assert everything.count(said) == 1, said
    assert found.unmatched_images == ["lone.tif"]
    assert found.unmatched_labels == ["widow.tif"]
    assert found.understood_as == "binary"
    text = found.render()
    assert all(f"problem: {problem}" in text for problem in found.problems)
    assert text.endswith(f"{len(found.problems)} to mend first")
    assert _as_json(found)["problems"] == found.problems


def test_channels_that_differ_are_counted(tmp_path: Path) -> None:
    axes = {"photometric": "minisblack", "metadata": {"axes": "CYX"}}
    images = _write(tmp_path / "images", a=_image(), b=_image())
    tifffile.imwrite(images / "c.tif", _image((3, 32, 32)), **axes)
    labels = _write(tmp_path / "labels", a=_cells(), b=_cells(), c=_cells())
    assert check_data(images, labels).problems == [
        "images have different numbers of channels: 1 in 2 files, 3 in 1 files"
    ]


def test_good_data_are_described(tmp_path: Path) -> None:
    images = _write(tmp_path / "images", a=_image((2, 32, 32), np.uint16), b=_image((32, 32)), c=np.full((32, 32), 7.0))
    labels = _write(tmp_path / "labels", a=np.stack([_cells(None)] * 2), b=_cells(None), c=_cells(None) * 0)
    found = check_data(images, labels)
    assert found.problems == []
    assert (found.pairs, found.slices, found.understood_as) == (3, 4, "instance")
    assert found.shapes == {"2 slices of 32 x 32 uint16": 1, "32 x 32 uint8": 1, "32 x 32 float64": 1}
    # that one is the last tenth of four
    assert found.remarks == [
        "c.tif has one grey value everywhere, 7.0",
        "the last tenth, the usual validation block, has no cell: train with another --validation",
        "1 of 4 slices have no cell",
    ]
    assert {k: found.labels[k] for k in ("cells", "smallest", "median", "largest")} == {
        "cells": 48,
        "smallest": 16,
        "median": 16.0,
        "largest": 16,
    }
    assert found.labels["share"] == pytest.approx(3 * 16 * 16 / (4 * 32 * 32))
    text = found.render()
    for line in (
        "pairs of files   3, 4 slices in all",
        "       1 x       32 x 32 uint8",
        "grey values      0 to 199",
        "label values     0, 1, 2, 3, 4, 5, 6, 7, 8, ... 16 (16 beside 0)",
        "labelled pixels  18.8%",
        "cells            48, 16 to 16 pixels, median 16",
        "understood as    instances: every value is a cell",
        "note: c.tif has one grey value everywhere, 7.0",
        "nothing stands in the way of training",
    ):
        assert line in text.splitlines()
    assert _as_json(found) == found.as_dict()


@pytest.mark.parametrize(
    ("label", "kind", "said"),
    [
        (_cells(0), "auto", "has no cell in any of 1 label images; there is nothing to learn"),
        ((_cells(None) + 1) // 8, "auto", "has the values 0, 1, 2, which can be classes or cells"),
        (_cells(None), "binary", "must hold 0 and one other value to be binary, got 0, 1, 2, 3, 4, 5, 6, ..."),
        (_cells(2), "class", "the training set has no pixel of class 1"),
        (np.ones((32, 32), np.uint8), "binary", "the training set has no pixel of background"),
        (_cells(None).astype(np.uint16) * 100, "class", "has class 1600; classes go from 0 to 255"),
    ],
)
def test_labels_that_training_would_trip_over(label: Array, kind: str, said: str, tmp_path: Path) -> None:
    found = check_data(_write(tmp_path / "a", x=_image()), _write(tmp_path / "b", x=label), kind=kind)
    assert len(found.problems) == 1
    assert said in found.problems[0]
    assert "1 to mend first" in found.render()
    _as_json(found)


@pytest.mark.parametrize("kind", ["auto", "instance", "class", "binary"])
def test_what_passes_is_read_for_training_and_what_does_not_is_refused(kind: str, tmp_path: Path) -> None:
    for number, label in enumerate([_cells(), _cells(None), _cells(0), (_cells(None) + 1) // 8]):
        images = _write(tmp_path / f"a{number}", x=_image())
        labels = _write(tmp_path / f"b{number}", x=label)
        found = check_data(images, labels, kind=kind)
        if found.problems:
            with pytest.raises(BadInput):
                read_labelled(images, labels, kind=kind)
        else:
            data = read_labelled(images, labels, kind=kind)
            assert data.kind == found.understood_as
            assert sum(int(e.instances.max()) for e in data.examples) == found.labels["cells"]


def test_unlabelled_frames_of_the_challenge_are_no_problem(tmp_path: Path) -> None:
    images = _write(tmp_path / "01", t000=_image(), t001=_image(), t002=_image())
    (tmp_path / "01_GT").mkdir()
    _write(tmp_path / "01_GT" / "SEG", man_seg001=(_cells(None) <= 2) * _cells(None))
    found = check_data(images, tmp_path / "01_GT")
    assert found.problems == []
    assert found.understood_as == "instance"
    assert "2 images have no labels" in found.remarks


def test_small_cells_and_ignored_pixels_are_remarked(tmp_path: Path) -> None:
    label = _cells().astype(np.int16)
    label[0, 0], label[31, :] = 1, -1
    found = check_data(_write(tmp_path / "a", x=_image()), _write(tmp_path / "b", x=label))
    assert found.problems == []
    assert found.remarks == ["1 of 17 cells are smaller than 10 pixels"]
    assert found.labels["ignored_pixels"] == 32


def test_nothing_to_look_at_is_an_error(tmp_path: Path) -> None:
    labels = _write(tmp_path / "b", x=_cells())
    (tmp_path / "empty").mkdir()
    for images in (tmp_path / "missing", tmp_path / "empty"):
        with pytest.raises(BadInput):
            check_data(images, labels)
    with pytest.raises(BadInput, match="label kind must be one of"):
        check_data(_write(tmp_path / "a", x=_image()), labels, kind="semantic")
    found = check_data(_write(tmp_path / "c", y=_image()), labels)
    assert any("have no name in common" in problem for problem in found.problems)
    assert found.render()
    _as_json(found)
