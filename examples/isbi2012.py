# %% [markdown]
# # Membranes in electron micrographs
#
# The ISBI 2012 challenge's public training stack (24 slices are needed, in order): a net is trained on slices 0-17 and
# judged on slices 18-23, which it has not seen. Neighbouring slices show the same cells, so the block is contiguous.
# The challenge's own test labels are secret: these figures are not those of its table.
#
#     python examples/isbi2012.py DATA OUT [--quick]
#
# DATA holds train-volume.tif and train-labels.tif; everything else happens by the verbs of the command line.

# %%
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import tifffile

from unet_fast import baselines, figures, metrics

arguments = [a for a in sys.argv[1:] if not a.startswith("--")]
if len(arguments) != 2:
    sys.exit("usage: python examples/isbi2012.py DATA OUT [--quick]")
data, out = map(Path, arguments)
quick = "--quick" in sys.argv


def unet_fast(*words: str | Path) -> str:
    """One verb of the command line, shown and run."""
    print("unet-fast", *words, flush=True)
    return subprocess.run(
        [sys.executable, "-m", "unet_fast", *map(str, words)], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


# %% [markdown]
# ## The two blocks

# %%
out.mkdir(parents=True, exist_ok=True)
volume, labels = tifffile.imread(data / "train-volume.tif"), tifffile.imread(data / "train-labels.tif")
blocks = {"train": slice(0, 18), "test": slice(18, 24)}
for name, block in blocks.items():
    tifffile.imwrite(out / f"{name}-volume.tif", volume[block], metadata={"axes": "ZYX"})
    tifffile.imwrite(out / f"{name}-labels.tif", labels[block], metadata={"axes": "ZYX"})

# %% [markdown]
# ## Train, predict, evaluate
# A narrow net, so that two CPU cores do it in minutes.

# %%
recipe = ["--preset", "small"]
recipe += ["--features", "4,8,16", "--tile", "108", "--steps", "4"] if quick else ["--tile", "284", "--steps", "6000"]
start = time.perf_counter()
unet_fast("train", "-i", out / "train-volume.tif", "--labels", out / "train-labels.tif", "-o", out / "run", *recipe)
seconds = time.perf_counter() - start
found = out / "probabilities.tif"
unet_fast("predict", "-m", out / "run", "-i", out / "test-volume.tif", "-o", found, "--output", "probabilities")
ours = json.loads(
    unet_fast(
        *("evaluate", "--pred", found, "--truth", out / "test-labels.tif", "--json"),
        *("--figure", out / "errors.png", "--images", out / "test-volume.tif"),
    )
)["overall"]

# %% [markdown]
# ## Beside what needs no net
# The challenge's five scores. "All cell" splits nothing, and its mergers are few pixels: no score is enough alone.

# %%
test_volume, test_labels = volume[blocks["test"]], labels[blocks["test"]]
CHALLENGE = ("warping_error", "rand_error", "pixel_error", "v_rand", "v_info")
others = {
    "thresholded blur": baselines.blurred(test_volume, 1.0),
    "all cell": np.ones(test_labels.shape, np.float32),
}
scores = {"U-Net": {name: ours[name] for name in CHALLENGE}}
for other, probability in others.items():
    scores[other] = {name: getattr(metrics, name)(probability, test_labels) for name in CHALLENGE}
print(f"\nthe challenge's scores on slices 18-23, after {seconds:.0f} s of training")
print(" " * 20, *(f"{name:>14}" for name in CHALLENGE))
for name, row in scores.items():
    print(f"  {name:18}", *(f"{row[each]:14.6f}" for each in CHALLENGE))

start = max(0, (test_volume.shape[1] - 256) // 2)
part = (0, slice(start, start + 256), slice(start, start + 256))
figures.draw_prediction(
    out / "isbi2012.png",
    test_volume[part],
    metrics.components(test_labels[part] > 0),
    metrics.components(tifffile.imread(found)[:, 1][part] > 0.5),
    title=f"a part of slice 18, not seen in training; pixel error over slices 18-23: {ours['pixel_error']:.3f}",
)
(out / "scores.json").write_text(json.dumps({"seconds": seconds, "scores": scores, "unet": ours}, indent=2) + "\n")
