# %% [markdown]
# # What each part of the U-Net is for
#
# The ISBI 2012 challenge's public training stack, slices 0-17 to train on and 18-23 to be judged by, as in
# `isbi2012.py`. One recipe, and the same recipe with one part taken away each time; then what the paper replaced: a
# net that answers one pixel of one patch at a time.
#
#     python examples/ablations.py DATA OUT [--quick] [--steps N] [--patch-seconds N] [--only NAME,...]
#
# DATA holds train-volume.tif and train-labels.tif. NAME is full, full-again (another seed), no-skips, no-weight-map,
# no-elastic, resize, same-padding or patches; what is there already in OUT is not trained again, so that an
# interrupted run goes on.

# %%
import argparse
import csv
import json
import math
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from unet_fast import FastUNet, Normalisation, figures, geometry, load, metrics, predict
from unet_fast.layers import Layers

VARIANTS: dict[str, tuple[str, ...]] = {
    "full": (),
    # nothing but another seed: differences of this size are no effect of a part
    "full-again": ("--seed", "1"),
    "no-skips": ("--no-skips",),
    "no-weight-map": ("--border-weight", "0"),
    "no-elastic": ("--elastic", "0"),
    "resize": ("--up-mode", "resize"),
    # a padded net answers all of its tile: nearly as many pixels a step as the 196 x 196 of the others
    "same-padding": ("--padding", "same", "--tile", "204"),
}
CHALLENGE = ("warping_error", "rand_error", "pixel_error", "v_rand", "v_info")
PATCHES = (17, 33, 65)
# a classifier is judged on every 4th pixel of each axis: a sixteenth of a slice, and of its time
EVERY = 4
# a net that pools three times has no grid of these
PERIODS, CONTROLS = (2, 4, 8), (3, 5, 7)


def checkerboard(logits: NDArray[Any], period: int, sd_px: float = 8.0) -> float:
    """The share of the fine variance of logits [D, H, W] that a pixel's position modulo `period` explains.

    r = z - G z, G the Gaussian mean of `sd_px` within a slice (the edge mirrored); with r_ab the mean of r over all
    pixels of all slices whose row is a and whose column is b modulo `period`, and n_ab their number,

        share = sum_ab n_ab (r_ab - r_mean)^2 / sum (r - r_mean)^2.

    1: nothing but a grid. Of n values without a grid and without neighbours that resemble each other, about
    period^2 / n; what resemblance adds to it, periods that the net does not have show. 0 where r is 0.
    """
    r = logits.astype(np.float64)
    r = r - ndimage.gaussian_filter(r, (0, sd_px, sd_px), mode="mirror")
    r -= r.mean()
    whole = float((r**2).sum())
    parts = [r[:, a::period, b::period] for a in range(period) for b in range(period)]
    return sum(part.size * float(part.mean()) ** 2 for part in parts if part.size) / whole if whole else 0.0


class PatchClassifier(nn.Sequential):
    """Two logits for the pixel in the middle of a patch: the contracting path of a narrow U-Net, and a dense layer.

    The window that slides, of Ciresan et al. (2012), with the layers of the net it is compared with. A level is two
    unpadded 3x3 convolutions; there are as many as the patch has room for, at most `features`.
    """

    def __init__(self, patch: int, features: Sequence[int]) -> None:
        layers: list[nn.Module] = []
        before, size, self.multiply_adds = 1, patch, 0
        for width in features:
            if size // (2 if layers else 1) < 5:
                break
            if layers:
                layers.append(nn.MaxPool2d(2))
                size //= 2
            for channels in (before, width):
                size -= 2
                layers += [nn.Conv2d(channels, width, 3), nn.ReLU()]
                self.multiply_adds += 9 * channels * width * size * size
            before = width
        super().__init__(*layers, nn.Flatten(), nn.Linear(before * size * size, 2))
        self.multiply_adds += 2 * before * size * size
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)


def patches_around(images: Tensor, places: Tensor, patch: int) -> Tensor:
    """[n, 1, patch, patch] of images [D, H + patch - 1, W + patch - 1] that are padded; places [n, 3]: slice, y, x."""
    along = torch.arange(patch)
    z, y, x = places.T
    return images[z[:, None, None], (y[:, None] + along)[:, :, None], (x[:, None] + along)[:, None, :]][:, None]


def padded(volume: NDArray[Any], patch: int) -> Tensor:
    """Normalised as for the U-Net, and mirrored by half a patch on every side."""
    grey = Normalisation()(volume[:, None])[:, 0]
    return torch.from_numpy(np.pad(grey, ((0, 0), *((patch // 2, patch // 2),) * 2), mode="reflect"))


def learn_patches(net: PatchClassifier, volume: NDArray[Any], cells: NDArray[Any], patch: int, seconds: float) -> int:
    """Train on pixels drawn anywhere, mirrored and turned by quarters, for so long; the number of steps it took."""
    images, target = padded(volume, patch), torch.from_numpy((cells > 0).astype(np.int64))
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    start, step = time.perf_counter(), 0
    while (spent := (time.perf_counter() - start) / seconds) < 1:
        # up in a twentieth of the time, down to 0 by a cosine: the U-Net's schedule, by the clock
        rate = min(spent / 0.05, 0.5 + 0.5 * math.cos(math.pi * spent))
        optimizer.param_groups[0]["lr"] = 0.02 * max(rate, 1e-3)
        places = torch.stack([torch.randint(n, (64,), generator=generator) for n in target.shape], 1)
        seen = patches_around(images, places, patch)
        turns, mirrored = torch.randint(4, (), generator=generator), torch.randint(2, (), generator=generator)
        seen = torch.rot90(seen.flip(3) if mirrored else seen, int(turns), (2, 3))
        loss = nn.functional.cross_entropy(net(seen), target[tuple(places.T)])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        step += 1
    return step


@torch.no_grad()
def classified(net: PatchClassifier, images: Tensor, patch: int, rows: range, columns: range) -> NDArray[np.float32]:
    """The probability of cell [D, rows, columns] of padded images, a row of patches at a time."""
    out = np.empty((len(images), len(rows), len(columns)), np.float32)
    for z in range(len(images)):
        for i, row in enumerate(rows):
            places = torch.tensor([(z, row, column) for column in columns])
            out[z, i] = net(patches_around(images, places, patch)).softmax(1)[:, 1].numpy()
    return out


def unet_fast(*words: str | Path) -> str:
    """One verb of the command line, shown and run."""
    print("unet-fast", *words, flush=True)
    return subprocess.run(
        [sys.executable, "-m", "unet_fast", *map(str, words)], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def seconds_of(work: Callable[[], Any], calls: int = 3) -> float:
    """The fastest of a few: what it takes on a machine that does nothing else."""
    times = []
    for _ in range(calls + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def trained(out: Path, name: str, recipe: Sequence[str], steps: int) -> dict[str, Any]:
    """Train a variant in OUT/NAME unless that was finished before, predict and evaluate; what is known of it."""
    run, log = out / name, out / name / "log.csv"
    settings = run / "config.toml"
    if settings.exists() and (there := tomllib.loads(settings.read_text())["steps"]) != steps:
        sys.exit(f"{run} is a run of {there} steps, not {steps}; say --steps {there}, or another OUT")
    rows = list(csv.DictReader(log.open())) if log.exists() else []
    if not rows or int(rows[-1]["step"]) < steps:
        words: list[str | Path] = ["-o", run, "--resume"]
        if not any((run / "checkpoints").glob("*")):
            words = ["-i", out / "train-volume.tif", "--labels", out / "train-labels.tif", "-o", run]
            words += [*recipe, *VARIANTS[name]]
        unet_fast("train", *words)
        rows = list(csv.DictReader(log.open()))
    found = out / f"{name}.tif"
    unet_fast("predict", "-m", run, "-i", out / "test-volume.tif", "-o", found, "--output", "probabilities")
    scores = unet_fast("evaluate", "--pred", found, "--truth", out / "test-labels.tif", "--json")
    best = [int(row["step"]) for row in rows if row["best"] == "1"]
    return {
        "flags": " ".join(VARIANTS[name]),
        "parameters": sum(p.numel() for p in load(run).parameters()),
        "steps": int(rows[-1]["step"]),
        "best_step": best[-1] if best else None,
        "seconds": float(rows[-1]["seconds"]),
        **json.loads(scores)["overall"],
    }


def grids(out: Path, volume: NDArray[Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """`checkerboard` of both ways up, trained and not (five seeds): its share of the fine variance on slices.

    "constant": the standard deviation of the logits of an image that is 0.5 everywhere, in that of the logits of the
    slices. Every pixel sees the same there, so that all of it is grid.
    """
    found: dict[str, Any] = {}
    crops: dict[str, NDArray[Any]] = {}
    for way, run in (("deconv", "full"), ("resize", "resize")):
        nets = {"trained": [load(out / run)]}
        nets["untrained"] = []
        for seed in range(5):
            torch.manual_seed(seed)
            net = FastUNet(features=recipe["features"], up_mode=way)
            net.normalisation = Normalisation()
            nets["untrained"].append(net)
        for state, several in nets.items():
            rows = []
            for net in several:
                z = predict(net.eval(), volume, axes="ZYX", output="logits")
                z = z[:, 1] - z[:, 0]
                with torch.no_grad():
                    flat = net(torch.full((1, 1, recipe["tile"], recipe["tile"]), 0.5))[0].double()
                flat = (flat[1] - flat[0]).numpy()
                rows.append(
                    {
                        # of a constant image the logits are one value, but for a grid
                        "constant": float(flat.std() / z.std()),
                        **{str(period): checkerboard(z, period) for period in PERIODS + CONTROLS},
                    }
                )
                middle = [slice(n // 2 - 24, n // 2 + 24) for n in z.shape[1:]]
                crops.setdefault(f"{way}, {state}: a slice", z[0][*middle])
                crops.setdefault(f"{way}, {state}: a constant image", flat[:48, :48])
            found[f"{way} {state}"] = rows
    draw_grids(out / "ablations-checkerboard.png", crops)
    return found


def slid(
    out: Path, volumes: Sequence[NDArray[Any]], labels: Sequence[NDArray[Any]], recipe: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """Patch classifiers beside the U-Net `full`: arithmetic and time of a pixel, and how good on every 4th of an axis.

    A classifier that answers a pixel at a time computes what neighbouring patches share again for each of them.
    """
    (learn, test), (learn_cells, test_cells) = volumes, labels
    rows, columns = (range(0, n, EVERY) for n in test.shape[1:])
    truth = test_cells[:, ::EVERY, ::EVERY]
    unet = load(out / "full").eval() if (out / "full" / "model.safetensors").exists() else None
    narrow = FastUNet(features=recipe["features"]).eval() if unet is None else unet
    tile, tile_out = recipe["tile"], geometry.output_size(recipe["tile"], narrow.depth)
    x = torch.zeros(1, 1, tile, tile)
    with torch.no_grad():
        pixel_s = seconds_of(lambda: narrow(x)) / tile_out**2
    of_unet = {
        "multiply_adds": Layers(narrow, tile, tile).flop("predict") / 2 / tile_out**2,
        "us_per_pixel": 1e6 * pixel_s,
        "parameters": sum(p.numel() for p in narrow.parameters()),
    }
    if unet is not None:
        start = time.perf_counter()
        probability = predict(unet, test, axes="ZYX", output="probabilities")[:, 1]
        of_unet["seconds_per_slice"] = (time.perf_counter() - start) / len(test)
        of_unet["pixel_error"] = metrics.pixel_error(np.ascontiguousarray(probability[:, ::EVERY, ::EVERY]), truth)
    found: dict[str, Any] = {"U-Net": of_unet}
    side = recipe["area"]
    area = (range(side), range(side))
    for patch in PATCHES:
        print(f"a window of {patch} x {patch}, trained for {seconds:.0f} s", flush=True)
        torch.manual_seed(0)
        net = PatchClassifier(patch, recipe["features"])
        steps = learn_patches(net, learn, learn_cells, patch, seconds)
        net.eval()
        images = padded(test, patch)
        pixel_s = seconds_of(partial(classified, net, images[:1], patch, *area)) / side**2
        start = time.perf_counter()
        probability = classified(net, images, patch, rows, columns)
        spent = time.perf_counter() - start
        found[f"patch {patch}"] = {
            "parameters": sum(p.numel() for p in net.parameters()),
            "steps": steps,
            "multiply_adds": net.multiply_adds,
            "us_per_pixel": 1e6 * pixel_s,
            # extrapolated: a sixteenth of the pixels was answered
            "seconds_per_slice": spent / len(test) * test[0].size / truth[0].size,
            "pixel_error": metrics.pixel_error(probability, truth),
        }
        tifffile.imwrite(out / f"patch-{patch}.tif", probability)
    return found


def draw_scores(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    """A bar for each variant and score; shorter is better."""
    shown = (("pixel_error", "pixel error"), ("rand_error", "Rand error"), ("warping_error", "warping error"))
    figure = Figure(figsize=(11, 1.2 + 0.38 * len(rows)), layout="constrained")
    axes = figure.subplots(1, len(shown), sharey=True)
    figure.suptitle(
        f"one part of the recipe changed, {next(iter(rows.values()))['steps']} steps each; shorter is better"
    )
    for axis, (key, label) in zip(axes, shown, strict=True):
        values = [row[key] for row in rows.values()]
        colours = ["#0072B2" if name.startswith("full") else "#56B4E9" for name in rows]
        bars = axis.barh(list(rows), values, color=colours)
        axis.bar_label(bars, [f"{value:.4f}" if value >= 0.01 else f"{value:.6f}" for value in values], padding=3)
        axis.set_xlim(0, 1.3 * max([*values, 1e-9]))
        axis.set_title(label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=130)


def draw_crops(
    path: Path, out: Path, rows: dict[str, dict[str, Any]], volume: NDArray[Any], cells: NDArray[Any]
) -> None:
    """What each variant found in one crop of the first held-out slice, at its own best threshold of pixel error."""
    side = min(192, *volume.shape[1:])
    rows_shown, columns_shown = (slice((n - side) // 2, (n - side) // 2 + side) for n in volume.shape[1:])
    crop = (0, rows_shown, columns_shown)
    image = volume[crop]
    panels = [("truth", figures.outlined(image, metrics.components(cells[crop] > 0), figures.TRUTH))]
    for name, row in rows.items():
        found = tifffile.imread(out / f"{name}.tif")[:, 1][crop] > row["pixel_error_threshold"]
        panels.append((name, figures.outlined(image, metrics.components(found), figures.FOUND)))
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.4 * lines + 0.3), layout="constrained")
    axes = np.atleast_1d(figure.subplots(lines, columns)).ravel()
    figure.suptitle("a part of a slice that was not trained on; each at the threshold of its pixel error")
    for axis in axes:
        axis.set_axis_off()
    for axis, (name, panel) in zip(axes, panels, strict=False):
        axis.imshow(panel, interpolation="nearest")
        axis.set_title(name, fontsize=10)
    figure.savefig(path, dpi=110)


def draw_grids(path: Path, crops: dict[str, NDArray[Any]]) -> None:
    """48 x 48 logits of each net, grey from the crop's least to its greatest; less than 0.02 is one grey."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    figure.suptitle("logits of cell, 48 x 48 pixels, each grey from its least to its greatest, at least 0.02 apart")
    for axis, (name, crop) in zip(figure.subplots(2, 4).ravel(), crops.items(), strict=True):
        # the last bits of equal logits are no grid
        middle, reach = (crop.max() + crop.min()) / 2, max(float(np.ptp(crop)), 0.02) / 2
        axis.imshow(crop, cmap="gray", vmin=middle - reach, vmax=middle + reach, interpolation="nearest")
        axis.set_title(f"{name}\n{crop.min():.3g} to {crop.max():.3g}", fontsize=9)
        axis.set_axis_off()
    figure.savefig(path, dpi=110)


def main() -> None:
    names = (*VARIANTS, "patches")
    parser = argparse.ArgumentParser(description="What each part of the U-Net is for.")
    parser.add_argument("data", type=Path, help="folder of train-volume.tif and train-labels.tif")
    parser.add_argument("out", type=Path, help="folder for everything it makes")
    parser.add_argument("--quick", action="store_true", help="a few steps only, to see that all of it runs")
    parser.add_argument("--steps", type=int, help="training steps of each variant, default 1200")
    parser.add_argument("--patch-seconds", type=float, help="training time of each window, default 120")
    parser.add_argument("--only", help=f"of {', '.join(names)}, with commas between")
    given = parser.parse_args()
    only = given.only.split(",") if given.only else names
    if unknown := [name for name in only if name not in names]:
        parser.error(f"--only must be of {', '.join(names)}, got {', '.join(unknown)}")
    out: Path = given.out
    recipe: dict[str, Any] = {"features": (16, 32, 64, 128), "tile": 284, "steps": 1200, "area": 32}
    if given.quick:
        recipe = {"features": (4, 8, 16), "tile": 108, "steps": 2, "area": 8}
    recipe["steps"] = given.steps or recipe["steps"]
    seconds = given.patch_seconds or (0.1 if given.quick else 120.0)

    # %% [markdown]
    # ## The two blocks
    out.mkdir(parents=True, exist_ok=True)
    blocks = (slice(0, 18), slice(18, 24))
    volumes, labels = (
        [tifffile.imread(given.data / f"train-{what}.tif")[block] for block in blocks] for what in ("volume", "labels")
    )
    for name, volume, cells in zip(("train", "test"), volumes, labels, strict=True):
        tifffile.imwrite(out / f"{name}-volume.tif", volume, metadata={"axes": "ZYX"})
        tifffile.imwrite(out / f"{name}-labels.tif", cells, metadata={"axes": "ZYX"})

    # %% [markdown]
    # ## The same recipe, a part of it changed
    words = ["--preset", "small", "--tile", str(recipe["tile"]), "--steps", str(recipe["steps"])]
    words += ["--features", ",".join(map(str, recipe["features"]))]
    rows = {name: trained(out, name, words, recipe["steps"]) for name in VARIANTS if name in only}
    # what an earlier call with another --only has found stays
    written = out / "scores.json"
    scores: dict[str, Any] = json.loads(written.read_text()) if written.exists() else {"variants": {}}
    scores["variants"] |= rows
    if rows:
        print(f"\n{'slices 18-23':16} {'steps':>6} {'seconds':>8}", *(f"{name:>14}" for name in CHALLENGE))
        for name, row in rows.items():
            print(f"{name:16} {row['steps']:6d} {row['seconds']:8.0f}", *(f"{row[each]:14.6f}" for each in CHALLENGE))
        draw_scores(out / "ablations.png", rows)
        draw_crops(out / "ablations-crops.png", out, rows, volumes[1], labels[1])

    # %% [markdown]
    # ## The checkerboard
    # A deconv's four taps each write pixels of one parity; a resize writes all of them with the same weights.
    if {"full", "resize"} <= set(rows):
        scores["checkerboard"] = grids(out, volumes[1], recipe)
        print(f"\n{'grid':18} {'constant':>9}", *(f"{'mod ' + str(period):>9}" for period in PERIODS + CONTROLS))
        for name, several in scores["checkerboard"].items():
            # of several nets the mean
            means = {key: np.mean([each[key] for each in several]) for key in several[0]}
            print(f"{name:18}", *(f"{value:9.6f}" for value in means.values()))

    # %% [markdown]
    # ## A window that slides
    if "patches" in only:
        scores["patches"] = slid(out, volumes, labels, recipe, seconds)
        of_unet = scores["patches"]["U-Net"]
        print(
            f"\n{'every 4th pixel':16} {'parameters':>10} {'mult-adds':>12} {'ratio':>7} {'us':>8} {'ratio':>7}", end=""
        )
        print(f" {'pixel error':>12} {'s a slice':>10}")
        for name, row in scores["patches"].items():
            ratios = [row[key] / of_unet[key] for key in ("multiply_adds", "us_per_pixel")]
            print(
                f"{name:16} {row['parameters']:10d} {row['multiply_adds']:12.0f} {ratios[0]:7.1f} "
                f"{row['us_per_pixel']:8.2f} {ratios[1]:7.1f} {row.get('pixel_error', math.nan):12.4f} "
                f"{row.get('seconds_per_slice', math.nan):10.2f}"
            )
    written.write_text(json.dumps(scores, indent=2) + "\n")


if __name__ == "__main__":
    main()
