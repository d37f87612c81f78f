"""Every example runs, and does what it says."""

import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch

from unet_fast import synthetic

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


def _membranes(folder: Path) -> None:
    """Drawn data in the layout of the ISBI 2012 challenge."""
    stack, labels = synthetic.membranes((24, 64, 64), seed=0)
    tifffile.imwrite(folder / "train-volume.tif", stack)
    tifffile.imwrite(folder / "train-labels.tif", labels)


def _nuclei(folder: Path) -> None:
    """Drawn data in the layout of the Data Science Bowl."""
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    for i in range(6):
        image, instances = synthetic.cells(96, seed=i)
        tifffile.imwrite(folder / "images" / f"{i}.tif", image)
        tifffile.imwrite(folder / "labels" / f"{i}.tif", instances.astype(np.uint16))


def _tracked(folder: Path) -> None:
    """Drawn data in the layout of the Cell Tracking Challenge: every third cell has a marker only, or silver truth."""
    for sequence in ("01", "02"):
        for frame in range(2):
            image, cells = synthetic.cells(96, seed=2 * int(sequence) + frame)
            ids = np.arange(1, cells.max() + 1)
            markers = np.zeros_like(cells)
            for cell in ids:
                row, column = (int(np.median(place)) for place in np.nonzero(cells == cell))
                markers[row - 1 : row + 2, column - 1 : column + 2] = cell
            gold = np.where(np.isin(cells, ids[::3]), 0, cells)
            truths = {f"{sequence}_GT/SEG/man_seg": gold, f"{sequence}_GT/TRA/man_track": markers}
            if sequence == "02":
                truths["02_ST/SEG/man_seg"] = cells
            for name, truth in truths.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                tifffile.imwrite(folder / f"{name}{frame:03}.tif", truth.astype(np.uint16))
            (folder / sequence).mkdir(exist_ok=True)
            tifffile.imwrite(folder / sequence / f"t{frame:03}.tif", image)


DATA = {"ablations": _membranes, "isbi2012": _membranes, "dsb2018": _nuclei, "tracking": _tracked}

# two blocks are two blocks, and a net without a part is built like the next
MORE = {"isbi2012": ("--folds", "2"), "ablations": ("--only", "full,resize,same-padding,patches")}

# what the verbs of an example do is done in its own process: each in a new one imports for longer than it works
VERBS_HERE = """
import runpy, subprocess, sys

from typer.testing import CliRunner

from unet_fast.cli import app


run = subprocess.run


def verb(command, **how):
    if list(command[:3]) != [sys.executable, "-m", "unet_fast"]:
        return run(command, **how)
    assert how == {"check": True, "stdout": subprocess.PIPE, "text": True}
    done = CliRunner().invoke(app, command[3:])
    assert done.exit_code == 0, done.output
    return subprocess.CompletedProcess(command, 0, done.stdout, done.stderr)


subprocess.run = verb
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.stem)
def test_the_example_runs(example: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(example)]
    if example.stem in DATA:
        (tmp_path / "data").mkdir()
        DATA[example.stem](tmp_path / "data")
        command = [
            sys.executable,
            "-c",
            VERBS_HERE,
            str(example),
            "data",
            "out",
            "--quick",
            *MORE.get(example.stem, ()),
        ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    if example.stem in DATA:
        assert (tmp_path / "out" / f"{example.stem}.png").stat().st_size > 10_000
        assert json.loads((tmp_path / "out" / "scores.json").read_text())
    if example.stem == "ordinary_loop":
        # it learns
        found = re.search(r"IoU on new images (\d\.\d+)", done.stdout)
        assert found is not None
        assert float(found[1]) > 0.75


def _functions(name: str) -> dict[str, Any]:
    """What an example defines; it is not run."""
    return runpy.run_path(str(Path(__file__).parents[1] / "examples" / f"{name}.py"))


@pytest.fixture(scope="module")
def partial_labels() -> Callable[..., np.ndarray[Any, Any]]:
    return _functions("tracking")["partial_labels"]


def _two_squares() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(gold, silver) of a frame: cell 1 is in both, cell 2 in silver only and a pixel over cell 1's edge."""
    gold, silver = np.zeros((2, 40, 60), np.int64)
    gold[5:15, 5:15] = 1
    silver[4:15, 6:16] = 8
    silver[5:15, 14:30] = 9
    return gold, silver


@pytest.mark.slow
def test_a_silver_cell_without_gold_is_ignored_and_an_annotated_cell_never(partial_labels: Any) -> None:
    gold, silver = _two_squares()
    labels = partial_labels(gold, silver)
    # silver's rims around an annotated cell are background, as gold says
    expected = gold.copy()
    expected[5:15, 15:30] = -1
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, expected)


@pytest.mark.slow
def test_around_a_marker_without_a_cell_a_disc_is_ignored(partial_labels: Any) -> None:
    gold, _ = _two_squares()
    markers = np.zeros_like(gold)
    markers[9:12, 9:12], markers[10, 20], markers[38, 55] = 1, 2, 3
    radius_px = _functions("tracking")["largest_radius_px"]([gold, np.zeros_like(gold)])
    assert radius_px == pytest.approx((100 / np.pi) ** 0.5)
    labels = partial_labels(gold, None, markers, radius_px=radius_px)
    rows, columns = np.indices(gold.shape)
    near = np.minimum(np.hypot(rows - 10, columns - 20), np.hypot(rows - 38, columns - 55)) <= 1.5 * radius_px
    np.testing.assert_array_equal(labels, np.where(near & (gold == 0), -1, gold))
    assert (labels == 1).sum() == 100


@pytest.mark.slow
def test_a_marker_that_silver_tells_of_ignores_no_disc_and_without_either_all_is_background(
    partial_labels: Any,
) -> None:
    gold, silver = _two_squares()
    markers = np.where(silver == 9, 4, 0)
    np.testing.assert_array_equal(partial_labels(gold, silver, markers, radius_px=5.0), partial_labels(gold, silver))
    np.testing.assert_array_equal(partial_labels(gold), gold)


@pytest.mark.slow
def test_the_checkerboards_share_is_what_a_grid_has_of_the_variance() -> None:
    checkerboard = _functions("ablations")["checkerboard"]
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2, 128, 128))
    grid = np.tile(np.array([[1.0, -1.0], [-1.0, 1.0]]), (64, 64))[None]
    slope = 10 * np.cos(np.linspace(0, np.pi, 128))[:, None]
    # what is smooth is no grid, and hides none
    assert checkerboard(noise + grid + slope, 2) == pytest.approx(0.5, abs=0.02)
    assert checkerboard(noise + grid + slope, 4) == pytest.approx(0.5, abs=0.02)
    assert checkerboard(noise + grid + slope, 3) < 0.01
    assert checkerboard(noise + slope, 8) < 0.01
    assert checkerboard(np.zeros((1, 32, 32)), 2) == 0


@pytest.mark.slow
def test_the_window_answers_the_pixel_in_its_middle_and_counts_its_arithmetic() -> None:
    functions = _functions("ablations")
    volume = np.arange(3 * 20 * 24, dtype=np.float32).reshape(3, 20, 24)
    images = functions["padded"](volume, 17)
    places = torch.tensor([(0, 0, 0), (1, 7, 9), (2, 19, 23)])
    seen = functions["patches_around"](images, places, 17)
    assert seen.shape == (3, 1, 17, 17)
    for (z, y, x), patch in zip(places.tolist(), seen, strict=True):
        assert patch[0, 8, 8] == images[z, 8 + y, 8 + x]
    net = functions["PatchClassifier"](17, (4, 8, 16))
    assert net(seen).shape == (3, 2)
    counted = 9 * (4 * 15**2 + 16 * 13**2 + 32 * 4**2 + 64 * 2**2) + 2 * 8 * 2**2
    assert net.multiply_adds == counted
