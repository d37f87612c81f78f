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

# what the verbs of an example do is done in its own process: each in a new one imports for longer than it works
VERBS_HERE = """
import runpy, subprocess, sys

from typer.testing import CliRunner

from unet_fast.cli import app


def verb(command, *, check, stdout, text):
    assert command[:3] == [sys.executable, "-m", "unet_fast"] and check and stdout == subprocess.PIPE and text
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
        command = [sys.executable, "-c", VERBS_HERE, str(example), "data", "out", "--quick"]
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
