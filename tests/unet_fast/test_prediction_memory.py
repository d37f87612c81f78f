"""Proves that an image larger than memory is segmented inside a budget: watched in processes of their own."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

from tests.unet_fast import huge

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="anonymous memory is read from /proc")


def run(side: int, memory: str, kind: str, folder: Path) -> int:
    """Bytes at most above those held after the imports; the labels are checked."""
    command = [sys.executable, huge.__file__, str(side), memory, kind, str(folder)]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    labels = tifffile.imread(folder / f"{kind}-{side}-labels.tif")
    # some rows, by the mean of 5 x 5 pixels of the mirrored image
    for row in (0, side // 3, side - 1):
        index = [abs(r) if r < side else 2 * (side - 1) - r for r in range(row - 2, row + 3)]
        five = np.concatenate([huge.pixels(r, 1, side) for r in index]).astype(np.float64)
        five = np.pad(five, ((0, 0), (2, 2)), "reflect").sum(0)
        mean = np.convolve(five, np.ones(5), "valid") / 25
        near = np.abs(mean - 100) < 1e-3
        assert ((labels[row] == (mean > 100)) | near).all()
    return int(done.stdout.split()[1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tiled", "mapped"])
def test_64_megapixels_fit_into_120_megabytes(kind: str, tmp_path: Path) -> None:
    # the image alone is 67 MB, as float32 268, its logits 537
    assert run(8192, "120MB", kind, tmp_path) <= 120e6


@pytest.mark.slow
def test_the_measure_would_see_a_budget_that_is_exceeded(tmp_path: Path) -> None:
    taken = run(4096, "2GB", "mapped", tmp_path)
    assert 10e6 < taken < 2e9
