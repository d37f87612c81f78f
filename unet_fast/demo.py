"""The whole job on synthetic touching cells, by the same functions that the verbs call: nothing but the package."""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import unet_kernels

from . import baselines, figures, geometry, metrics, synthetic
from .augment import ElasticWarp
from .config import TrainConfig
from .data import read_labelled
from .errors import BadInput
from .evaluation import evaluate
from .files import read_stack, replacing, writable_folder, write_tiff
from .prediction import predict_files
from .scores import Report, table
from .seams import seam_check
from .storage import load
from .tiling import plan_tiles
from .training import train

__all__ = ["run"]

_TRAINING, _HELD_OUT, _SIZE = 24, 8, 256
_MARK = ".unet_fast_demo"


@dataclass(frozen=True, slots=True)
class _Step:
    """Prints what happens next, and when."""

    started: float

    def __call__(self, heading: str) -> None:
        print(f"\n[{time.monotonic() - self.started:4.0f} s] {heading}", flush=True)  # noqa: T201


def run(out: Path, *, seed: int = 0, quick: bool = False) -> dict[str, Any]:
    """Make cells, train with and without the border weight, predict, evaluate, draw.

    Args:
        out: a folder that does not exist yet, is empty, or holds an earlier demo, which is replaced.
        seed: of the cells and of the training.
        quick: a few steps and images only: shows that all of it runs, not how well.

    Returns:
        the scores, which also lie in `out`/scores.json.

    Raises:
        BadInput: out holds something else, or cannot be written.
    """
    step = _Step(time.monotonic())
    _clear(out)
    count = (3, 1) if quick else (_TRAINING, _HELD_OUT)
    step(f"make {count[0]} images of touching cells to train on and {count[1]} to be judged by, in {out}/")
    _make(out / "train", count[0], 1000 * (seed + 1))
    _make(out / "held_out", count[1], 1000 * (seed + 1) + 500)

    reports: dict[str, Report] = {}
    logs = {}
    for name, weight in (("with_border_weight", 10.0), ("without", 0.0)):
        config = _config(out, name, weight, seed, quick)
        step(f"train {name.replace('_', ' ')}: {config.steps} steps")
        logs[name.replace("_", " ")] = train(config).log
        predict_files(load(out / name), out / "held_out" / "images", out / name / "cells", output="instances")
        reports[name] = evaluate(out / name / "cells", out / "held_out" / "labels", wanted=("iou", "cells"))

    step("compare on the held-out images")
    reports["otsu"] = _otsu(out)
    scores = {name: report.overall for name, report in reports.items()}
    print(_compared(reports))  # noqa: T201

    step("check that tiles join without seams")
    seams = _seams(out)
    print(  # noqa: T201
        f"{seams['tiles']} tiles against one piece: logits differ by {seams['largest_difference']:.1e} at most "
        f"(their sd is {seams['logits_sd']:.1f}), {seams['labels_that_differ']} labels differ"
    )
    step("draw")
    _draw(out)
    figures.draw_curves(out / "curves.png", logs)
    scores["seams"] = {k: v for k, v in seams.items() if k != "difference"}
    with replacing(out / "scores.json") as path:
        path.write_text(json.dumps(scores, indent=2) + "\n")
    pictures = ("prediction", "weight_map", "elastic", "seams", "curves")
    step("done; look at " + ", ".join(f"{out}/{p}.png" for p in pictures))
    print(f"segment your own images like these: unet-fast predict -m {out}/with_border_weight -i IMAGES -o RESULTS")  # noqa: T201
    return scores


def _clear(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()):
        if not (out / _MARK).is_file():
            raise BadInput(f"{out} holds other files; choose another --out for the demo")
        shutil.rmtree(out)
    writable_folder(out)
    (out / _MARK).write_text("made by unet-fast demo; the next demo here replaces it\n")


def _make(folder: Path, count: int, seed: int) -> None:
    images, labels = writable_folder(folder / "images"), writable_folder(folder / "labels")
    for i in range(count):
        image, instances = synthetic.cells(_SIZE, seed=seed + i)
        write_tiff(images / f"cells{i:02d}.tif", image, "YX")
        write_tiff(labels / f"cells{i:02d}.tif", instances.astype(np.uint16), "YX")


def _config(out: Path, name: str, border_weight: float, seed: int, quick: bool) -> TrainConfig:
    return TrainConfig(
        images=out / "train" / "images",
        labels=out / "train" / "labels",
        out=out / name,
        features=(4, 8, 16) if quick else (16, 32, 64),
        tile=108 if quick else 188,
        steps=6 if quick else 1500,
        border_weight=border_weight,
        # so few steps need a quicker answer than momentum 0.99 gives, and no dropout
        lr=0.02,
        momentum=0.9,
        dropout=0.0,
        validate_every=None if quick else 300,
        validation=0.34 if quick else 0.1,
        seed=seed,
    )


def _pairs(out: Path) -> list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
    """(image, truth, found) of each held-out image."""
    names = sorted(p.name for p in (out / "held_out" / "images").iterdir())
    folders = (out / "held_out" / "images", out / "held_out" / "labels", out / "with_border_weight" / "cells")
    return [tuple(read_stack(f / name).pixels[0, 0] for f in folders) for name in names]


def _otsu(out: Path) -> Report:
    folder = writable_folder(out / "otsu")
    for path in sorted((out / "held_out" / "images").iterdir()):
        write_tiff(folder / path.name, baselines.otsu_cells(read_stack(path).pixels[0, 0]).astype(np.uint16), "YX")
    return evaluate(folder, out / "held_out" / "labels", wanted=("iou", "cells"))


def _compared(reports: dict[str, Report]) -> str:
    names = {
        "with_border_weight": "U-Net, Eq. 2 weights",
        "without": "U-Net, no border weight",
        "otsu": "Otsu + components",
    }
    return table([{**reports[key].overall, "name": name} for key, name in names.items()])


def _seams(out: Path) -> dict[str, Any]:
    model = load(out / "with_border_weight")
    image, _, _ = _pairs(out)[0]
    smallest = next(t for t in geometry.legal_sizes(4, 10_000, model.depth) if t - 2 * geometry.halo(model.depth) >= 64)
    found = seam_check(model, image, tile_in=smallest)
    plan = plan_tiles(image.shape, tile_in=found["tile_in"], model=model)
    figures.draw_seams(out / "seams.png", image, found["difference"], plan.step[0], found["logits_sd"])
    return found


def _draw(out: Path) -> None:
    trios = _pairs(out)
    image, truth, found = max(trios, key=lambda t: metrics.instance_scores(t[2], t[1]).touching_pairs)
    figures.draw_prediction(out / "prediction.png", image, truth, found, title="an image the net has not seen")
    ids = torch.from_numpy(truth.astype(np.int32))
    weight = unet_kernels.border_weight(ids[None])[0].numpy()
    figures.draw_weight(out / "weight_map.png", image, truth, weight)

    example = read_labelled(out / "train" / "images", out / "train" / "labels").examples[0]
    warp, generator = ElasticWarp(grey=0.0), ElasticWarp.generator(0, 0, 0)
    displacement = warp.draw(1, (_SIZE, _SIZE), generator)
    line = (torch.arange(_SIZE) % 32 - 16).abs() <= 1
    grid = (line[:, None] | line).to(torch.int32)
    moved, ids_moved = warp.apply(example.image[None], displacement, labels=example.instances[None])
    _, grid_moved = warp.apply(example.image[None], displacement, labels=grid[None])
    figures.draw_elastic(
        out / "elastic.png",
        (example.image[0].numpy(), example.instances.numpy()),
        (moved[0, 0].numpy(), ids_moved[0].numpy()),
        (grid.bool().numpy(), grid_moved[0].bool().numpy()),
    )
