"""A prediction of a large image by a trivial net, in a process of its own: `python huge.py SIDE MEMORY KIND FOLDER`.

Prints the anonymous bytes that the process held after its imports, and the most it held after them.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tifffile
import torch
from torch import Tensor, nn

import unet_fast.prediction
from unet_fast.measuring import Watch


class Trivial(nn.Module):
    """Dark or bright: the mean of 5 x 5 pixels. Its geometry is that of a U-Net without poolings."""

    depth, in_channels, out_channels = 0, 1, 2

    def __init__(self) -> None:
        super().__init__()
        weight = torch.stack([torch.zeros(1, 5, 5), torch.ones(1, 5, 5) / 25])
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(torch.tensor([100.0, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight, self.bias)


def write(path: Path, side: int, kind: str) -> None:
    """Blobs and stripes of grey values, written a band at a time."""
    if path.exists():
        return
    if kind == "mapped":
        array = tifffile.memmap(path, shape=(side, side), dtype=np.uint8, bigtiff=True, photometric="minisblack")
        for row in range(0, side, 1024):
            array[row : row + 1024] = pixels(row, min(1024, side - row), side)
        array.flush()
        return

    def tiles() -> Iterator[np.ndarray]:
        for row in range(0, side, 512):
            band = np.zeros((512, -(-side // 512) * 512), np.uint8)
            found = pixels(row, min(512, side - row), side)
            band[: len(found), :side] = found
            for column in range(0, side, 512):
                yield np.ascontiguousarray(band[:, column : column + 512])

    tifffile.imwrite(
        path, tiles(), shape=(side, side), dtype=np.uint8, tile=(512, 512), compression="zlib", bigtiff=True,
        photometric="minisblack",
    )  # fmt: skip


def pixels(row: int, rows: int, side: int) -> np.ndarray:
    y, x = np.arange(row, row + rows)[:, None], np.arange(side)[None]
    return ((y // 7 * 31 + x // 5 * 17 + (y * x) // 4096) % 200).astype(np.uint8)


def main(side: int, memory: str, kind: str, folder: Path) -> None:
    image = folder / f"{kind}-{side}.tif"
    write(image, side, kind)
    model = Trivial()
    with Watch() as watch:
        started = time.monotonic()
        summary = unet_fast.prediction.predict_files(
            model, image, folder / f"{kind}-{side}-labels.tif", memory=memory, progress=True
        )
        seconds, tile_in = time.monotonic() - started, summary.files[0].tile_in
        sys.stdout.write(f"{watch.before} {watch.above} {seconds:.1f} {tile_in}\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]))
