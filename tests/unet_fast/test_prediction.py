"""Proves that files come out of files: each with its image's size and name, whole, or none at all with a reason."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from unet_fast import FastUNet, Normalisation, predict, prediction
from unet_fast.cells import find_cells
from unet_fast.errors import BadInput
from unet_fast.files import read_stack, write_tiff
from unet_fast.prediction import predict_files


@pytest.fixture
def model() -> FastUNet:
    torch.manual_seed(0)
    net = FastUNet(features=(4, 6)).eval()
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.constant_(parameter, 0.3)
    net.normalisation = Normalisation()
    logits = predict(net, grey(30, 41, seed=1), output="logits")
    with torch.no_grad():
        # a third of the pixels is cell
        net.head.bias[0] += float(np.quantile(logits[1] - logits[0], 0.67))
    return net


def grey(*shape: int, seed: int = 0) -> NDArray[np.uint16]:
    return np.random.default_rng(seed).integers(0, 4000, shape).astype(np.uint16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "images"
    place.mkdir()
    write_tiff(place / "t10.tif", grey(30, 41, seed=1), "YX")
    write_tiff(place / "t2.tif", grey(3, 20, 25, seed=2), "ZYX")
    Image.fromarray((grey(1, 1, seed=3) // 20).astype(np.uint8)).save(place / "one.png")
    return place


def test_a_folder_gives_a_tiff_for_each_image_in_natural_order(model: FastUNet, folder: Path, tmp_path: Path) -> None:
    written = predict_files(model, folder, tmp_path / "new" / "out").written
    assert [p.name for p in written] == ["one.tif", "t2.tif", "t10.tif"]
    assert sorted((tmp_path / "new" / "out").iterdir()) == sorted(written)
    shapes = [read_stack(p).pixels.shape for p in written]
    assert shapes == [(1, 1, 1, 1), (3, 1, 20, 25), (1, 1, 30, 41)]
    want = predict(model, grey(30, 41, seed=1))
    assert 0 < want.mean() < 1
    assert np.array_equal(read_stack(written[2]).pixels[0, 0], want)
    assert np.array_equal(read_stack(written[1]).pixels[:, 0], predict(model, grey(3, 20, 25, seed=2), axes="ZYX"))


@pytest.mark.slow
def test_a_budget_cuts_tiles_and_changes_nothing(model: FastUNet, folder: Path, tmp_path: Path) -> None:
    whole = predict_files(model, folder, tmp_path / "whole", output="probabilities").written
    inside = predict_files(model, folder, tmp_path / "inside", output="probabilities", tile_in=20).written
    for one, other in zip(whole, inside, strict=True):
        np.testing.assert_allclose(read_stack(one).pixels, read_stack(other).pixels, rtol=0, atol=1e-5)
    budgeted = predict_files(model, folder, tmp_path / "budget", output="probabilities", memory="150MB").written
    for one, other in zip(whole, budgeted, strict=True):
        np.testing.assert_allclose(read_stack(one).pixels, read_stack(other).pixels, rtol=0, atol=1e-5)
    for memory, sentence in (("6 apples", "memory must be a size such as 6GB"), ("1MB", "memory must be at least")):
        with pytest.raises(BadInput, match=sentence):
            predict_files(model, folder / "t10.tif", tmp_path / "none", memory=memory)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("suffix", [".tif", ".tiff", ".png", ".TIF"])
def test_one_image_gives_the_file_that_was_named(suffix: str, model: FastUNet, folder: Path, tmp_path: Path) -> None:
    target = tmp_path / f"result{suffix}"
    assert predict_files(model, folder / "t10.tif", target).written == [target]
    assert np.array_equal(read_stack(target, labels=True).pixels[0, 0], predict(model, grey(30, 41, seed=1)))


def test_tiles_change_nothing(model: FastUNet, folder: Path, tmp_path: Path) -> None:
    for tile in (None, 20, 36):
        [written] = predict_files(model, folder / "t10.tif", tmp_path / f"{tile}", tile_in=tile).written
        assert np.array_equal(read_stack(written).pixels[0, 0], predict(model, grey(30, 41, seed=1)))


def test_instances_are_the_cells_of_the_labels(model: FastUNet, folder: Path, tmp_path: Path) -> None:
    [written] = predict_files(model, folder / "t10.tif", tmp_path, output="instances", min_pixels=4).written
    found = read_stack(written).pixels
    assert found.dtype == np.uint16
    want = find_cells(predict(model, grey(30, 41, seed=1)), min_pixels=4)
    assert want.max() > 1
    assert np.array_equal(found[0, 0], want)


@pytest.mark.parametrize(("name", "shape"), [("t10", (1, 2, 30, 41)), ("t2", (3, 2, 20, 25))])
def test_probabilities_add_up_to_one(
    name: str, shape: tuple[int, ...], model: FastUNet, folder: Path, tmp_path: Path
) -> None:
    [written] = predict_files(model, folder / f"{name}.tif", tmp_path, output="probabilities").written
    found = read_stack(written).pixels
    assert (found.shape, found.dtype) == (shape, np.float32)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)


def _nan(folder: Path) -> None:
    bad = grey(9, 9).astype(np.float32)
    bad[2, 3] = np.nan
    write_tiff(folder / "z.tif", bad, "YX")


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "NaN": (_nan, {}, r"z\.tif has 1 NaN or infinite pixels, the first at z\.tif row 2 column 3"),
    "damaged": (lambda f: (f / "z.tif").write_bytes(b"II*\0oh"), {}, r"z\.tif"),
    "of several channels": (
        lambda f: write_tiff(f / "z.tif", grey(2, 9, 9), "CYX"),
        {},
        r"z\.tif has 2 channel\(s\), the model was trained on 1",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_image_among_several_is_reported_and_the_rest_is_done(
    case: str, model: FastUNet, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, settings, sentence = BAD[case]
    spoil(folder)
    summary = predict_files(model, folder, tmp_path / "out", **settings)
    assert [p.name for p in summary.written] == ["one.tif", "t2.tif", "t10.tif"]
    [failed] = summary.failed
    assert failed.image.name == "z.tif"
    assert re.search(sentence, failed.error or "")
    assert re.search(sentence, capsys.readouterr().err)
    # mended, the rest is not done again
    write_tiff(folder / "z.tif", grey(9, 9), "YX")
    before = {p: p.stat().st_mtime_ns for p in summary.written}
    again = predict_files(model, folder, tmp_path / "out", resume=True)
    assert {file.image.name: file.status for file in again.files} == {
        "one.png": "kept", "t2.tif": "kept", "t10.tif": "kept", "z.tif": "done",
    }  # fmt: skip
    assert {p: p.stat().st_mtime_ns for p in summary.written} == before
    assert sorted((tmp_path / "out").iterdir()) == sorted(again.written)


def test_seams_of_results_that_are_kept_are_looked_at_too(
    model: FastUNet, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _nan(folder)
    predict_files(model, folder, tmp_path / "out", tile_in=36)
    again = predict_files(model, folder, tmp_path / "out", tile_in=36, resume=True, seams=True)
    assert {file.status for file in again.files} == {"kept", "failed"}
    looked = {file.image.name: file.seams for file in again.files if file.status == "kept"}
    assert all(seams is not None and seams.exact for seams in looked.values())
    assert any(seams.places for seams in looked.values() if seams)


@pytest.mark.parametrize("case", BAD)
def test_the_only_image_is_refused_and_nothing_written(
    case: str, model: FastUNet, folder: Path, tmp_path: Path
) -> None:
    spoil, settings, sentence = BAD[case]
    spoil(folder)
    with pytest.raises(BadInput, match=sentence):
        predict_files(model, folder / "z.tif", tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "one place for two": (
        lambda f: Image.new("L", (5, 5)).save(f / "t10.png"),
        {},
        r"t10\.png and t10\.tif would both be written to|t10\.tif and t10\.png would both be written to",
    ),
    "a tile that cannot be pooled": (lambda f: None, {"tile_in": 21}, "tile_in 21 cannot be pooled 1 times"),
    "another output": (lambda f: None, {"output": "mask"}, "output must be one of labels, instances, probabilities"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_nothing_is_written_where_no_image_can_be_segmented(
    case: str, model: FastUNet, folder: Path, tmp_path: Path
) -> None:
    spoil, settings, sentence = REFUSED[case]
    spoil(folder)
    with pytest.raises(BadInput, match=sentence):
        predict_files(model, folder, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_images_are_never_overwritten(model: FastUNet, folder: Path, tmp_path: Path) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(BadInput, match="is the folder of the images; choose another place for the results"):
        predict_files(model, folder, folder)
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(BadInput, match="is the folder of the images"):
        predict_files(model, folder, tmp_path / "link")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("source", "name", "output", "sentence"),
    [
        ("t10.tif", "a.jpg", "labels", r"a\.jpg must end in \.tif, .*: \.jpg changes the values it stores"),
        ("t10.tif", "a.png", "probabilities", r"a\.png cannot hold probabilities; use \.tif"),
        ("t2.tif", "new/a.png", "labels", r"a\.png cannot hold a stack; use \.tif"),
        ("t10.tif", "file/a.tif", "labels", "must be a folder, a file is in its place|cannot be written"),
    ],
)
def test_a_place_that_cannot_hold_it_is_refused_before_the_work(
    source: str, name: str, output: str, sentence: str, model: FastUNet, folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(prediction, "Inference", None)
    with pytest.raises(BadInput, match=sentence):
        predict_files(model, folder / source, tmp_path / name, output=output)
    assert not (tmp_path / "new").exists()


def test_a_threshold_moves_the_cut(model: FastUNet, folder: Path, tmp_path: Path) -> None:
    source = folder / "t10.tif"
    predict_files(model, source, tmp_path / "p.tif", output="probabilities")
    probability = read_stack(tmp_path / "p.tif").pixels[0, 1]
    middle = float(np.median(probability))
    predict_files(model, source, tmp_path / "l.tif", threshold=middle)
    assert np.array_equal(read_stack(tmp_path / "l.tif").pixels[0, 0], probability > np.float32(middle))
    with pytest.raises(BadInput, match="threshold must lie between 0 and 1"):
        predict_files(model, source, tmp_path / "x.tif", threshold=1.5)
    with pytest.raises(BadInput, match="for probabilities"):
        predict_files(model, source, tmp_path / "x.tif", output="probabilities", threshold=0.5)
