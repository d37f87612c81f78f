"""Every example runs, and does what it says."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

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


DATA = {"isbi2012": _membranes, "dsb2018": _nuclei}


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.stem)
def test_the_example_runs(example: Path, tmp_path: Path) -> None:
    arguments = []
    if example.stem in DATA:
        (tmp_path / "data").mkdir()
        DATA[example.stem](tmp_path / "data")
        arguments = ["data", "out", "--quick"]
    done = subprocess.run(
        [sys.executable, str(example), *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    if arguments:
        assert (tmp_path / "out" / f"{example.stem}.png").stat().st_size > 10_000
        assert json.loads((tmp_path / "out" / "scores.json").read_text())


@pytest.mark.slow
def test_the_ordinary_loop_learns(tmp_path: Path) -> None:
    [example] = [e for e in EXAMPLES if e.stem == "ordinary_loop"]
    done = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    found = re.search(r"IoU on new images (\d\.\d+)", done.stdout)
    assert found is not None
    assert float(found[1]) > 0.75
