# %% [markdown]
# # Membranes in electron micrographs
#
# The ISBI 2012 challenge's public training stack, cross-validated: its slices are cut into contiguous blocks (24 into
# four of six), each block is held out once, a net is trained on the others, and all that was held out is judged at
# once. Neighbouring slices show the same cells, so a block is contiguous, and never a random choice of slices. The
# challenge's own test labels are secret: these figures are not those of its table, and stand beside it for
# orientation only.
#
#     python examples/isbi2012.py DATA OUT [--quick] [--folds N] [--only K] [--steps N]
#
# DATA holds train-volume.tif and train-labels.tif; everything else happens by the verbs of the command line.
# `--only 3` holds out the last of four blocks, slices 18-23, and trains on 0-17: a quarter of the time.

# %%
import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import tifffile

from unet_fast import baselines, figures, metrics

parser = argparse.ArgumentParser(description="The ISBI 2012 challenge's training stack, cross-validated.")
parser.add_argument("data", type=Path, help="folder of train-volume.tif and train-labels.tif")
parser.add_argument("out", type=Path, help="folder for everything it makes")
parser.add_argument("--quick", action="store_true", help="a few steps only, to see that all of it runs")
parser.add_argument("--folds", type=int, help="blocks, default: one for every six slices")
parser.add_argument("--only", type=int, help="hold out this block alone, counted from 0")
parser.add_argument("--steps", type=int, help="training steps of each net, default 6000")
given = parser.parse_args()
data, out = given.data, given.out


def unet_fast(*words: str | Path) -> str:
    """One verb of the command line, shown and run."""
    print("unet-fast", *words, flush=True)
    return subprocess.run(
        [sys.executable, "-m", "unet_fast", *map(str, words)], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


# %% [markdown]
# ## The blocks
# The slices on both sides of a block are trained on. Nothing joins them: the net and its warps see one slice at a time.

# %%
out.mkdir(parents=True, exist_ok=True)
volume, labels = tifffile.imread(data / "train-volume.tif"), tifffile.imread(data / "train-labels.tif")
slices = np.arange(len(volume))
folds = given.folds or max(2, len(volume) // 6)
if not 2 <= folds <= len(volume) // 2:
    parser.error(f"--folds must be 2 to {len(volume) // 2}, got {folds}")
if given.only is not None and not 0 <= given.only < folds:
    parser.error(f"--only must be 0 to {folds - 1}, got {given.only}")
blocks = np.array_split(slices, folds)
chosen = range(folds) if given.only is None else [given.only]
held_out = np.concatenate([blocks[k] for k in chosen])

# %% [markdown]
# ## Train, predict, evaluate
# A narrow net, so that two CPU cores do a block in minutes. The last tenth of what it is trained on chooses the model.

# %%
recipe = ["--preset", "small"]
recipe += ["--features", "4,8,16", "--tile", "108"] if given.quick else ["--tile", "284"]
recipe += ["--steps", str(given.steps or (4 if given.quick else 6000))]
CHALLENGE = ("warping_error", "rand_error", "pixel_error", "v_rand", "v_info")


def judged(found: Path, truth: Path, *words: str | Path) -> dict[str, float]:
    """The scores of probabilities, pooled over their slices."""
    overall: dict[str, float] = json.loads(unet_fast("evaluate", "--pred", found, "--truth", truth, "--json", *words))[
        "overall"
    ]
    return overall


seconds, of_fold, found = {}, {}, []
for k in chosen:
    fold = out / f"block{k}"
    fold.mkdir(exist_ok=True)
    for name, part in {"train": np.setdiff1d(slices, blocks[k]), "test": blocks[k]}.items():
        tifffile.imwrite(fold / f"{name}-volume.tif", volume[part], metadata={"axes": "ZYX"})
        tifffile.imwrite(fold / f"{name}-labels.tif", labels[part], metadata={"axes": "ZYX"})
    start = time.perf_counter()
    train = ("-i", fold / "train-volume.tif", "--labels", fold / "train-labels.tif", "-o", fold / "run")
    unet_fast("train", *train, *recipe)
    seconds[k] = time.perf_counter() - start
    probabilities = fold / "probabilities.tif"
    unet_fast(
        *("predict", "-m", fold / "run", "-i", fold / "test-volume.tif", "-o", probabilities),
        *("--output", "probabilities"),
    )
    of_fold[k] = judged(probabilities, fold / "test-labels.tif")
    found.append(tifffile.imread(probabilities))

# %% [markdown]
# ## All that was held out, judged at once
# Pooled, and not a mean over blocks: each score has one threshold for all slices, as the challenge's has.

# %%
pooled = np.concatenate(found)
test_volume, test_labels = volume[held_out], labels[held_out]
tifffile.imwrite(out / "probabilities.tif", pooled, metadata={"axes": "ZCYX"})
tifffile.imwrite(out / "held-out-volume.tif", test_volume, metadata={"axes": "ZYX"})
tifffile.imwrite(out / "held-out-labels.tif", test_labels, metadata={"axes": "ZYX"})
ours = judged(
    *(out / "probabilities.tif", out / "held-out-labels.tif"),
    *("--figure", out / "errors.png", "--images", out / "held-out-volume.tif"),
)

# %% [markdown]
# ## Beside what needs no net
# The challenge's five scores. "All cell" splits nothing, and its mergers are few pixels: no score is enough alone.

# %%
others = {
    "thresholded blur": baselines.blurred(test_volume, 1.0),
    "all cell": np.ones(test_labels.shape, np.float32),
}
scores = {"U-Net": {name: ours[name] for name in CHALLENGE}}
for other, probability in others.items():
    scores[other] = {name: getattr(metrics, name)(probability, test_labels) for name in CHALLENGE}
where = f"slices {held_out[0]}-{held_out[-1]}" if given.only is not None else f"all {len(held_out)} slices, held out"
print(f"\nthe challenge's scores on {where}, after {sum(seconds.values()):.0f} s of training")
print(" " * 26, *(f"{name:>14}" for name in CHALLENGE))
for name, row in scores.items():
    print(f"  {name:24}", *(f"{row[each]:14.6f}" for each in CHALLENGE))
    if name == "U-Net" and len(of_fold) > 1:
        for k, fold_row in of_fold.items():
            each_block = f"  slices {blocks[k][0]}-{blocks[k][-1]}"
            print(f"  {each_block:24}", *(f"{fold_row[each]:14.6f}" for each in CHALLENGE))

# %% [markdown]
# ## Beside Table 1 of the paper
# Of 6 March 2015, sorted by warping error. Its rows were computed on 30 test slices whose labels nobody has.

# %%
TABLE_1 = {
    "human values": (0.000005, 0.0021, 0.0010),
    "u-net": (0.000353, 0.0382, 0.0611),
    "DIVE-SCI": (0.000355, 0.0305, 0.0584),
    "IDSIA": (0.000420, 0.0504, 0.0613),
    "DIVE": (0.000430, 0.0545, 0.0582),
    "IDSIA-SCI": (0.000653, 0.0189, 0.1027),
}
print(
    "\nTable 1 of Ronneberger et al. (2015), another test: the challenge's hidden labels, and all 30 slices to train on"
)
for name, values in TABLE_1.items():
    print(f"  {name:24}", *(f"{value:14.6f}" for value in values))

# %%
side = min(256, *test_volume.shape[1:])
rows, columns = (slice((n - side) // 2, (n - side) // 2 + side) for n in test_volume.shape[1:])
crop = (0, rows, columns)
figures.draw_prediction(
    out / "isbi2012.png",
    test_volume[crop],
    metrics.components(test_labels[crop] > 0),
    metrics.components(pooled[:, 1][crop] > 0.5),
    title=f"a part of slice {held_out[0]}, not seen in training; pixel error over {where}: {ours['pixel_error']:.3f}",
)
(out / "scores.json").write_text(
    json.dumps(
        {
            "seconds": sum(seconds.values()),
            "scores": scores,
            "unet": ours,
            "blocks": {
                k: {"slices": blocks[k].tolist(), "seconds": seconds[k], "unet": row} for k, row in of_fold.items()
            },
            "table_1": TABLE_1,
        },
        indent=2,
    )
    + "\n"
)
