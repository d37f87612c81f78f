"""Bad input on the command line: one sentence on stderr, exit code 3 (2 for usage), and nothing left behind."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from typer.testing import CliRunner

import unet_fast
from unet_fast.cli import app

Array = np.ndarray[Any, Any]


def _cells(value: int = 1) -> Array:
    return (np.kron(np.eye(4, dtype=int), np.pad(np.ones((6, 6), int), 1)) * value).astype(np.uint8)


def _image(*shape: int, dtype: Any = np.uint8) -> Array:
    return np.random.default_rng(0).integers(0, 200, shape or (32, 32)).astype(dtype)


def _nan() -> Array:
    image = _image(dtype=np.float32)
    image[3, 4] = np.nan
    return image


def _write(path: Path, array: Array, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, array, photometric="minisblack", **options)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    unet_fast.save(unet_fast.FastUNet(1, 2, (2, 4)), path)
    return path


@pytest.fixture
def place(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with images/, labels/ and results/ of two pairs, and a model."""
    for name in ("a", "b"):
        _write(tmp_path / "images" / f"{name}.tif", _image())
        _write(tmp_path / "labels" / f"{name}.tif", _cells())
        _write(tmp_path / "results" / f"{name}.tif", _cells())
    (tmp_path / "model.safetensors").write_bytes(model.read_bytes())
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UNET_FAST_DEBUG", raising=False)
    return tmp_path


VERBS = {
    "train": "train -i images --labels labels --out run --features 2,4 --steps 2 --quiet",
    "predict": "predict -m model.safetensors -i images --out found --quiet",
    "one": "predict -m model.safetensors -i images/a.tif --out found --quiet",
    "stack": "predict -m model.safetensors -i stack.tif --out found --quiet",
    "evaluate": "evaluate -p results --truth labels",
    "check-data": "check-data -i images --labels labels",
    "profile": "profile -m model.safetensors --tiles 36 --seconds 0 --quiet",
    "profile without a model": "profile --features 2,4 --tiles 36 --seconds 0 --quiet",
}


def _run(verb: str, more: str = "") -> Any:
    # an option that is given twice counts as given last
    return CliRunner().invoke(app, [*VERBS[verb].split(), *more.split()])


def _everything(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def _is_refused(verb: str, more: str, said: str, place: Path) -> None:
    before = _everything(place)
    done = _run(verb, more)
    assert done.exit_code == 3, (done.stderr, done.exception)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert done.stdout == ""
    assert _everything(place) == before


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


Spoil = Callable[[Path], Any]
# what is done to the folder, which verbs it stops, what they say; {pixels} is the folder of images or of results
SPOILT: dict[str, tuple[Spoil, str, str]] = {
    "no images": (lambda p: (p / "images").rename(p / "moved"), "train predict check-data", "images does not exist"),
    "no labels": (lambda p: (p / "labels").rename(p / "moved"), "train evaluate check-data", "labels does not exist"),
    "no results": (lambda p: (p / "results").rename(p / "moved"), "evaluate", "results does not exist"),
    "no model": (lambda p: (p / "model.safetensors").unlink(), "predict profile", "model.safetensors does not exist"),
    "images empty": (lambda p: _empty(p / "images"), "train predict check-data", "images has no image in it"),
    "labels empty": (lambda p: _empty(p / "labels"), "train evaluate check-data", "labels has no image in it"),
    "results empty": (lambda p: _empty(p / "results"), "evaluate", "results has no image in it"),
    "image without labels": (lambda p: (p / "labels" / "b.tif").unlink(), "train", "1 file (b.tif) without labels"),
    "labels without image": (lambda p: (p / "images" / "b.tif").unlink(), "train", "1 file (b.tif) without an image"),
    "nothing in common": (
        lambda p: [_empty(p / "results"), _write(p / "results" / "c.tif", _cells())],
        "evaluate",
        "have no name in common",
    ),
    "two of one name": (
        lambda p: _write(p / "images" / "a.tiff", _image()),
        "train predict check-data",
        "a.tiff",
    ),
    "truncated image": (lambda p: _truncate(p / "images" / "b.tif"), "train predict", "images/b.tif is truncated"),
    "truncated labels": (lambda p: _truncate(p / "labels" / "b.tif"), "train evaluate", "labels/b.tif is truncated"),
    "image of text": (lambda p: (p / "images" / "b.tif").write_text("cells"), "train predict", "b.tif is no TIFF"),
    "labels of text": (lambda p: (p / "labels" / "b.tif").write_text("cells"), "train evaluate", "b.tif is no TIFF"),
    "sizes differ": (
        lambda p: _write(p / "labels" / "b.tif", _cells()[:30]),
        "train evaluate",
        "b.tif is 30x32, b.tif is 32x32",
    ),
    "NaN in an image": (lambda p: _write(p / "images" / "b.tif", _nan()), "train predict", "b.tif row 3 column 4"),
    "NaN in a result": (lambda p: _write(p / "results" / "b.tif", _nan()), "evaluate", "b.tif row 3 column 4"),
    "NaN in labels": (lambda p: _write(p / "labels" / "b.tif", _nan()), "train evaluate", "b.tif row 3 column 4"),
    "three values": (
        lambda p: _write(p / "labels" / "b.tif", _cells(2)),
        "train evaluate",
        "has the values 0, 1, 2, which can be classes or cells",
    ),
    "half a value": (
        lambda p: _write(p / "labels" / "b.tif", _cells().astype(np.float32) / 2),
        "train evaluate",
        "b.tif must hold whole numbers as labels, got 0.5",
    ),
    "no cells": (
        lambda p: [_write(p / "labels" / f"{n}.tif", _cells(0)) for n in "ab"],
        "train",
        "has no cell in any of 2 label images; there is nothing to learn",
    ),
    "no background": (
        lambda p: [_write(p / "labels" / f"{n}.tif", _cells(0) + np.uint8(1)) for n in "ab"],
        "train",
        "has no pixel of background",
    ),
    "channels differ": (
        lambda p: tifffile.imwrite(p / "images" / "b.tif", _image(32, 32, 3), photometric="rgb"),
        "train",
        "b.tif has 3 channels and a.tif has 1 channel",
    ),
    "other channels than the model's": (
        lambda p: tifffile.imwrite(p / "images" / "b.tif", _image(32, 32, 3), photometric="rgb"),
        "predict",
        "3 channel",
    ),
    "unclear axes": (
        lambda p: _write(p / "images" / "b.tif", _image(2, 3, 4, 32, 32), metadata={"axes": "TZCYX"}),
        "train predict",
        "b.tif has axes TZCYX of 2x3x4x32x32",
    ),
    "a damaged model": (
        lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-9]),
        "predict profile",
        "model.safetensors is damaged",
    ),
    "no probabilities": (
        lambda p: _write(p / "results" / "b.tif", _image(dtype=np.float32)),
        "evaluate",
        "b.tif must hold probabilities between 0 and 1",
    ),
    "a run already": (lambda p: _write(p / "run" / "model.safetensors", _cells()), "train", "run holds a run already"),
}


# of these only b.tif is spoilt, and predict does the rest
_ONE_IMAGE = (
    "truncated image", "image of text", "NaN in an image", "other channels than the model's", "unclear axes",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "verb"), [(name, verb) for name, (_, verbs, _) in SPOILT.items() for verb in verbs.split()]
)
def test_data_that_cannot_be_used_are_refused(name: str, verb: str, place: Path) -> None:
    spoil, _, said = SPOILT[name]
    spoil(place)
    if verb == "predict" and name in _ONE_IMAGE:
        (place / "images" / "a.tif").unlink()
    _is_refused(verb, "", said, place)


@pytest.mark.parametrize("name", _ONE_IMAGE)
def test_a_bad_image_among_several_is_left_out(name: str, place: Path) -> None:
    spoil, _, said = SPOILT[name]
    spoil(place)
    done = _run("predict", "--json")
    assert done.exit_code == 5, (done.stderr, done.exception)
    first, result, last = done.stderr.splitlines()
    assert first.startswith("error: ")
    assert said in first
    assert result.startswith("labels: 1 files in found")
    assert last == "error: 1 of 2 images could not be segmented; mend them and go on with --resume"
    found = json.loads(done.stdout)
    assert [(file["image"], file["status"]) for file in found["files"]] == [
        ("images/a.tif", "done"), ("images/b.tif", "failed"),
    ]  # fmt: skip
    assert (place / "found" / "a.tif").is_file()
    assert not (place / "found" / "b.tif").exists()


@pytest.mark.parametrize(
    ("verb", "more", "said"),
    [
        ("train", "--tile 41", "tile 41 cannot be pooled 1 times; nearest are 40 and 42"),
        ("train", "--tile 4", "tile 4 is too small to be pooled 1 times"),
        ("train", "--seed 18446744073709551616", "seed must be 0 or more and fit 64 bits"),
        ("train", "--steps 0", "steps must be 1 or more, got 0"),
        ("train", "--lr 0", "lr must be above 0, got 0.0"),
        ("train", "--features 2,0", "features must be one positive number per level, got 2,0"),
        ("train", "--epochs 2", "steps and epochs cannot both be given"),
        ("train", "--normalise range", "normalisation range needs low and high"),
        ("train", "--normalise range --low 3 --high 2", "must have low below high"),
        ("train", "--classes 4", "the training set has no pixel of class 3"),
        ("train", "--label-kind class --classes 1", "classes must be 2 to 256"),
        ("train", "--axes ZYX", "has 2 axes of 32x32, axes said ZYX"),
        ("train", "--config missing.toml", "missing.toml does not exist; expected a TOML file of settings"),
        ("train", "--resume", "does not exist"),
        ("train", "--out file", "file"),
        ("train", "--out file/run", "cannot be written"),
        ("train", "--out /proc/run", "cannot be written"),
        ("train", "--device cuda:99", "device cuda:99 cannot be used here"),
        ("predict", "--tile 41", "tile_in 41 cannot be pooled 1 times; nearest are 40 and 42"),
        ("predict", "--out file", "file"),
        ("predict", "--out file/found", "cannot be written"),
        ("predict", "--out /proc/found", "cannot be written"),
        ("predict", "--out images", "is the folder of the images; choose another place"),
        ("predict", "--device cuda:99", "device cuda:99 cannot be used here"),
        ("one", "--axes ZYX", "has 2 axes of 32x32, axes said ZYX"),
        ("one", "--out found.jpg", "must end in .tif"),
        ("one", "--out found.png --output probabilities", "cannot hold probabilities; use .tif"),
        ("one", "--out missing/folder.tif/file/a.tif --tile 41", "cannot be pooled"),
        ("one", "--tile 40 --memory 1GB", "memory chooses the tile; give one of memory and tile_in"),
        ("one", "--memory 1MB", "memory must be at least"),
        ("one", "--memory 6apples", "memory must be a size such as 6GB"),
        ("predict", "--out found.jpg", "found.jpg must be a folder, for the 2 images of images"),
        ("predict", "-m images", "images/model.safetensors does not exist"),
        ("predict", "-m images/a.tif", "a.tif is damaged or no safetensors file"),
        ("evaluate", "--metrics iou,accuracy", "adapted_rand_error, cells, or all, got 'accuracy'"),
        ("evaluate", "-p results/a.tif", "must be two files or two folders"),
        ("check-data", "-i images/a.tif", "must be two files or two folders"),
        ("profile", "--tiles 37", "tiles 37 cannot be pooled 1 times; nearest are 36 and 38"),
        ("profile", "--tiles 36,4", "tiles 4 is too small to be pooled 1 times; the smallest is 18"),
        ("profile", "--memory 6XB", "memory must be a size such as 6GB, 500MB or 4GiB, got 6XB"),
        ("profile", "--memory 0", "memory must be a size such as 6GB, 500MB or 4GiB, got 0"),
        ("profile", "--memory -6GB", "memory must be a size such as 6GB, 500MB or 4GiB, got -6GB"),
        ("profile", "--memory 1kB", "for tiles of 18 (predict bfloat16), got 1kB"),
        ("profile", "--device cuda:99", "device cuda:99 cannot be used here"),
        ("profile", "-m missing.safetensors", "missing.safetensors does not exist; expected a model"),
        ("profile", "-m images", "images/model.safetensors does not exist"),
        ("profile", "-m images/a.tif", "a.tif is damaged or no safetensors file"),
        ("profile", "--plot found.jpg", "plot must be a .png, .pdf or .svg, got found.jpg"),
        ("profile", "--plot found", "plot must be a .png, .pdf or .svg, got found"),
        ("profile", "--plot file/found.png", "file must be a folder, a file is in its place"),
        ("profile", "--plot /proc/found.png", "cannot be written"),
        ("profile without a model", "--features 2,0", "features[1] must be at least 1, got 0"),
        ("profile without a model", "--features -2,4", "features[0] must be at least 1, got -2"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(
    verb: str, more: str, said: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the minutes that measuring takes come after every refusal
    monkeypatch.setattr("unet_fast.profiling.profile", None)
    _is_refused(verb, more, said, place)


def test_a_folder_where_a_plot_belongs_is_seen_before_anything_is_measured(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "found.png").mkdir()
    monkeypatch.setattr("unet_fast.profiling.profile", None)
    _is_refused("profile", "--plot found.png", "found.png", place)


def test_a_net_with_padding_has_no_known_bytes(place: Path) -> None:
    unet_fast.save(unet_fast.FastUNet(1, 2, (2, 4), padding="same"), place / "model.safetensors")
    _is_refused("profile", "", "model.safetensors has padding 'same'; only the bytes of 'valid' nets are known", place)


def test_a_stack_does_not_fit_a_picture(place: Path) -> None:
    _write(place / "stack.tif", _image(3, 32, 32))
    _is_refused("stack", "--out new/found.png", "cannot hold a stack; use .tif", place)


def test_a_folder_where_a_result_belongs_is_seen_before_any_is_written(place: Path) -> None:
    (place / "found" / "b.tif").mkdir(parents=True)
    _is_refused("predict", "", "b.tif", place)


def test_a_file_called_in_two_lines_is_named_in_one(place: Path) -> None:
    before = _everything(place)
    done = CliRunner().invoke(app, ["evaluate", "-p", "results", "--truth", "two\nlines"])
    assert done.exit_code == 3
    assert done.stderr.count("\n") == 1
    assert _everything(place) == before


def test_classes_of_nothing_are_compared(place: Path) -> None:
    for name in "ab":
        _write(place / "labels" / f"{name}.tif", _cells(0))
    done = _run("evaluate", "--label-kind class --json")
    assert done.exit_code == 0, done.exception
    assert json.loads(done.stdout)["labels_understood_as"] == "class"


def test_memory_that_is_out_without_a_word_is_a_sentence(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*arguments: Any, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("unet_fast.checking.check_data", out_of_memory)
    done = _run("check-data")
    assert done.exit_code == 4
    assert done.stderr.startswith("error: out of memory")
    assert done.stderr.count("\n") == 1


def test_a_config_with_a_wrong_key_names_the_right_one(place: Path) -> None:
    (place / "c.toml").write_text("stpes = 5\n")
    _is_refused("train", "--config c.toml", "unknown key 'stpes'; did you mean 'steps'?", place)


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_check_data_lists_every_problem_and_stops_with_3(as_json: bool, place: Path) -> None:
    _write(place / "images" / "c.tif", _nan())
    _write(place / "labels" / "c.tif", _cells()[:30])
    _truncate(place / "images" / "b.tif")
    (place / "labels" / "a.tif").unlink()
    before = _everything(place)
    done = _run("check-data", "--json" if as_json else "")
    assert done.exit_code == 3
    assert done.stderr == ""
    assert _everything(place) == before
    problems = json.loads(done.stdout)["problems"] if as_json else done.stdout.splitlines()
    for said in ("1 images have no labels", "images/b.tif is truncated", "1 NaN or infinite", "labels/c.tif is 30x32"):
        assert sum(said in problem for problem in problems) == 1, said


@pytest.mark.parametrize("verb", ["evaluate", "check-data"])
def test_json_is_all_there_is_on_stdout(verb: str, place: Path) -> None:
    before = _everything(place)
    done = _run(verb, "--json")
    assert done.exit_code == 0
    assert isinstance(json.loads(done.stdout), dict)
    assert done.stderr == ""
    assert _everything(place) == before


@pytest.mark.parametrize(
    ("verb", "more"),
    [
        ("train", "--stepz 3"),
        ("train", "--steps three"),
        ("train", "--features 2,x"),
        ("train", "--up-mode bilinear"),
        ("predict", "--output masks"),
        ("predict", "--min-pixels 0"),
        ("evaluate", "--label-kind semantic"),
        ("check-data", "--ignore none"),
        ("check-data", "surplus"),
        ("profile", "--features 2,4"),
        ("profile", "--tiles 36,x"),
        ("profile", "--tiles 36;38"),
        ("profile", "--batch 0"),
        ("profile", "--seconds -1"),
        ("profile", "--mode test"),
        ("profile", "--precision float16"),
        ("profile without a model", "--features 2,x"),
        ("profile without a model", "--features ,"),
    ],
)
def test_a_wrong_option_is_a_usage_error(verb: str, more: str, place: Path) -> None:
    before = _everything(place)
    done = _run(verb, more)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "Usage" in done.stderr
    assert _everything(place) == before


@pytest.mark.parametrize("verb", ["predict", "evaluate", "check-data"])
def test_what_must_be_given_is_usage_too(verb: str) -> None:
    assert CliRunner().invoke(app, [verb]).exit_code == 2


@pytest.mark.slow
def test_it_is_so_in_a_process_of_its_own(place: Path) -> None:
    (place / "images" / "a.tif").unlink()
    _truncate(place / "images" / "b.tif")
    before = _everything(place)
    done = subprocess.run(
        [sys.executable, "-m", "unet_fast", *VERBS["predict"].split()], capture_output=True, text=True, cwd=place
    )
    assert done.returncode == 3
    assert done.stderr.startswith("error: images/b.tif is truncated")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert _everything(place) == before
