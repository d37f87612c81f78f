# %% [markdown]
# # Cells in time-lapse microscopy
#
# A folder of the Cell Tracking Challenge, such as PhC-C2DH-U373 or DIC-C2DH-HeLa: a net is trained on sequence 01 and
# judged on 02, and, where both have gold truth, the other way round. The challenge's own test sequences have no public
# labels: what comes out is no row of the paper's Table 2, and stands beside it for orientation only.
#
#     python examples/tracking.py DATA OUT [--quick] [--steps N]
#
# DATA holds 01/t000.tif, 01_GT/SEG/man_seg000.tif and, as far as there are any, 01_GT/TRA/man_track000.tif and
# 01_ST/SEG/man_seg000.tif; 02 likewise. Frames are two-dimensional.
#
# Gold frames are annotated in part: a cell without annotation must not be taught as background. `partial_labels` says
# which pixels are ignored. Without silver truth and without markers nothing is known of such cells, and all pixels
# without annotation count as background.

# %%
import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from unet_fast import figures, metrics
from unet_fast.files import read_stack, write_tiff

IGNORED = -1
# of the largest annotated cell's equivalent radius
_REACH = 1.5


def largest_radius_px(gold: Iterable[NDArray[Any]]) -> float:
    """The radius of the disc that has as many pixels as the largest annotated cell of any frame; 0 without a cell."""
    most = max((int(np.bincount(frame[frame > 0]).max(initial=0)) for frame in gold), default=0)
    return math.sqrt(most / math.pi)


def partial_labels(
    gold: NDArray[Any],
    silver: NDArray[Any] | None = None,
    markers: NDArray[Any] | None = None,
    *,
    radius_px: float = 0.0,
) -> NDArray[np.int32]:
    """Gold labels [H, W] of one frame with `IGNORED` where a cell lies that nobody annotated.

    A silver cell is annotated if it and some gold cell share more than half of the pixels of either; the pixels of
    every other silver cell are ignored. A marker is annotated if more than half of it lies in a gold cell, and told of
    by the silver truth if more than half of it lies in a silver one; of every other marker the disc of 1.5 `radius_px`
    around its centre is ignored, and the marker. Pixels of annotated cells never are.
    """
    unknown = np.zeros(gold.shape, bool)
    in_gold = gold > 0
    if silver is not None:
        for cell in _ids(silver):
            mask = silver == cell
            shared, counts = np.unique(gold[mask & in_gold], return_counts=True)
            halves = (min(mask.sum(), (gold == each).sum()) / 2 for each in shared)
            if not any(count > half for count, half in zip(counts, halves, strict=True)):
                unknown |= mask
    if markers is not None:
        told = in_gold if silver is None else in_gold | (silver > 0)
        rows, columns = np.indices(gold.shape)
        for marker in _ids(markers):
            mask = markers == marker
            if told[mask].mean() > 0.5:
                continue
            row, column = (place.mean() for place in np.nonzero(mask))
            unknown |= mask | (np.hypot(rows - row, columns - column) <= _REACH * radius_px)
    return np.where(unknown & ~in_gold, IGNORED, gold).astype(np.int32)


def _ids(labels: NDArray[Any]) -> NDArray[Any]:
    ids = np.unique(labels)
    return ids[ids > 0]


def frames(data: Path, sequence: str) -> list[str]:
    """The numbers of the frames with gold truth, as they are written in the names: "000", "007"."""
    return sorted(path.stem.removeprefix("man_seg") for path in (data / f"{sequence}_GT" / "SEG").glob("man_seg*.tif"))


def plane(path: Path) -> NDArray[Any] | None:
    """A label image [H, W]; None where there is no such file."""
    return read_stack(path, labels=True).pixels[0, 0].astype(np.int64) if path.exists() else None


def prepare(data: Path, sequence: str, out: Path) -> dict[str, float]:
    """Write what is trained on of a sequence, `partial_labels` of each gold frame; what share of pixels is ignored."""
    out.mkdir(parents=True, exist_ok=True)
    gold = {n: plane(data / f"{sequence}_GT" / "SEG" / f"man_seg{n}.tif") for n in frames(data, sequence)}
    radius_px = largest_radius_px(each for each in gold.values() if each is not None)
    ignored = []
    for number, cells in gold.items():
        assert cells is not None
        labels = partial_labels(
            cells,
            plane(data / f"{sequence}_ST" / "SEG" / f"man_seg{number}.tif"),
            plane(data / f"{sequence}_GT" / "TRA" / f"man_track{number}.tif"),
            radius_px=radius_px,
        )
        write_tiff(out / f"man_seg{number}.tif", labels, "YX")
        ignored.append(float((labels == IGNORED).mean()))
    return {"frames": len(ignored), "ignored": float(np.mean(ignored))}


def unet_fast(*words: str | Path) -> str:
    """One verb of the command line, shown and run."""
    print("unet-fast", *words, flush=True)
    return subprocess.run(
        [sys.executable, "-m", "unet_fast", *map(str, words)], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


# of the challenge in 2015: (PhC-U373, DIC-HeLa)
TABLE_2 = {
    "IMCB-SG (2014)": (0.2669, 0.2935),
    "KTH-SE (2014)": (0.7953, 0.4607),
    "HOUS-US (2014)": (0.5323, None),
    "second-best 2015": (0.83, 0.46),
    "u-net (2015)": (0.9203, 0.7756),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Cell Tracking Challenge: train on one sequence, find in the other.")
    parser.add_argument("data", type=Path, help="folder of 01, 01_GT, 02, 02_GT")
    parser.add_argument("out", type=Path, help="folder for everything it makes")
    parser.add_argument("--quick", action="store_true", help="a few steps only, to see that all of it runs")
    parser.add_argument("--steps", type=int, help="training steps of each net, default 4000")
    given = parser.parse_args()
    data, out = given.data, given.out
    sequences = [each for each in ("01", "02") if (data / each).is_dir() and frames(data, each)]
    if len(sequences) < 2:
        parser.error(f"{data} must hold 01 and 02, and man_seg files in 01_GT/SEG and 02_GT/SEG")

    # %% [markdown]
    # ## Train on one sequence, find cells in the other
    # Cells of these data are large: a level more than for membranes, so that a pixel's answer sees a whole cell.
    recipe = ["--preset", "small", "--label-kind", "instance", "--zoom", "1.25"]
    recipe += ["--features", "4,8,16", "--tile", "108"] if given.quick else ["--features", "16,32,64,128,256"]
    recipe += ["--steps", str(given.steps or (4 if given.quick else 4000))]
    rows: dict[str, dict[str, Any]] = {}
    jaccard: list[float] = []
    for learn, test in (sequences, sequences[::-1]):
        prepared = prepare(data, learn, out / f"{learn}_labels")
        share = f"{prepared['ignored']:.1%} of their pixels ignored"
        print(f"sequence {learn}: {prepared['frames']} frames with gold truth, {share}")
        start = time.perf_counter()
        run = out / f"run{learn}"
        unet_fast("train", "-i", data / learn, "--labels", out / f"{learn}_labels", "-o", run, *recipe)
        seconds = time.perf_counter() - start
        found, images = out / f"{test}_cells", [data / test / f"t{number}.tif" for number in frames(data, test)]
        # a folder also where there is one image
        found.mkdir(exist_ok=True)
        each = [word for image in images for word in ("-i", image)]
        unet_fast("predict", "-m", run, *each, "-o", found, "--output", "instances")

        # %% [markdown]
        # SEG is a mean over reference cells, whatever their frame or sequence; cells without annotation cost nothing.
        parts = []
        for image in images:
            truth = plane(data / f"{test}_GT" / "SEG" / f"man_seg{image.stem.removeprefix('t')}.tif")
            if truth is None or not truth.any():
                continue
            parts += metrics.seg(tifffile.imread(found / image.name), truth, parts=True)["jaccard"]
        rows[f"trained on {learn}, judged on {test}"] = {
            "seg": float(np.mean(parts)),
            "objects": len(parts),
            "seconds": seconds,
            **prepared,
        }
        jaccard += parts

    # %% [markdown]
    # ## Beside Table 2 of the paper
    # Its rows were computed on the challenge's hidden sequences, ours on a public one.
    rows["both"] = {"seg": float(np.mean(jaccard)), "objects": len(jaccard)}
    print(f"\n{'SEG':36} {'cells':>6}")
    for name, row in rows.items():
        print(f"  {name:28} {row['seg']:6.4f} {row['objects']:6d}")
    print(f"\n{'Table 2 of Ronneberger et al. (2015),':38} {'PhC-U373':>9} {'DIC-HeLa':>9}")
    print("another test: the hidden sequences")
    for name, values in TABLE_2.items():
        print(f"  {name:36}", *(f"{'-' if value is None else format(value, '.4f'):>9}" for value in values))

    image = data / "02" / f"t{frames(data, '02')[0]}.tif"
    shown = slice(0, 300), slice(0, 300)
    truth = plane(data / "02_GT" / "SEG" / f"man_seg{frames(data, '02')[0]}.tif")
    assert truth is not None
    figures.draw_prediction(
        out / "tracking.png",
        read_stack(image).pixels[0, 0][shown],
        truth[shown],
        tifffile.imread(out / "02_cells" / image.name)[shown],
        title="a frame of the sequence that was not trained on; truth is partial",
    )
    (out / "scores.json").write_text(json.dumps({"scores": rows, "table_2": TABLE_2}, indent=2) + "\n")


if __name__ == "__main__":
    main()
