# %% [markdown]
# # Nuclei, told apart
#
# Fluorescence images of the 2018 Data Science Bowl: every fifth is held out, two nets are trained on the others,
# one with the weight map of Eq. 2 and one without, and both are compared with Otsu's threshold and components.
#
#     python examples/dsb2018.py DATA OUT [--quick]
#
# DATA holds images/*.png and labels/*.tif (instance ids) of equal names.

# %%
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from unet_fast import baselines, figures
from unet_fast.files import list_images, read_stack, write_tiff

arguments = [a for a in sys.argv[1:] if not a.startswith("--")]
if len(arguments) != 2:
    sys.exit("usage: python examples/dsb2018.py DATA OUT [--quick]")
data, out = map(Path, arguments)
quick = "--quick" in sys.argv


def unet_fast(*words: str | Path) -> str:
    """One verb of the command line, shown and run."""
    print("unet-fast", *words, flush=True)
    return subprocess.run(
        [sys.executable, "-m", "unet_fast", *map(str, words)], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


# %% [markdown]
# ## A fifth held out

# %%
images = sorted(list_images(data / "images"), key=lambda path: path.name)
for number, image in enumerate(images):
    block = out / ("test" if number % 5 == 0 else "train")
    for source in (image, data / "labels" / f"{image.stem}.tif"):
        (block / source.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(source, block / source.parent.name)
test = out / "test"

# %% [markdown]
# ## Train, predict, evaluate, with and without the weight map

# %%
# nuclei come in many sizes and some images are noisy; with the rims of cells weighed like the gaps between them, and
# without a balance of classes, outlines are neither too wide nor too narrow
recipe = ["--preset", "small", "--border-region", "all", "--no-balance", "--noise", "0.08", "--zoom", "1.25"]
recipe += ["--features", "4,8,16", "--tile", "108", "--steps", "4"] if quick else ["--tile", "268", "--steps", "4000"]
scores, seconds = {}, {}
for name, border_weight in (("eq2", "10"), ("no_border_weight", "0")):
    start = time.perf_counter()
    train = ("-i", out / "train" / "images", "--labels", out / "train" / "labels", "-o", out / name)
    unet_fast("train", *train, "--border-weight", border_weight, *recipe)
    seconds[name] = time.perf_counter() - start
    cells = out / f"{name}_cells"
    unet_fast("predict", "-m", out / name, "-i", test / "images", "-o", cells, "--output", "instances")
    found = unet_fast("evaluate", "--pred", cells, "--truth", test / "labels", "--label-kind", "instance", "--json")
    scores[name] = json.loads(found)["overall"]

# %% [markdown]
# ## Beside what needs no net

# %%
(out / "otsu_cells").mkdir(exist_ok=True)
for image in list_images(test / "images"):
    cells = baselines.otsu_cells(read_stack(image).pixels[0, 0])
    write_tiff(out / "otsu_cells" / f"{image.stem}.tif", cells.astype(np.uint16), "YX")
found = unet_fast(
    "evaluate", "--pred", out / "otsu_cells", "--truth", test / "labels", "--label-kind", "instance", "--json"
)
scores["otsu"] = json.loads(found)["overall"]

print(f"\n{'held-out fifth':18} {'IoU':>6} {'AP 0.5':>7} {'cell IoU':>9} {'touching':>9} {'merged':>7}")
for name, row in scores.items():
    print(
        f"{name:18} {row['iou']:6.3f} {row['ap50']:7.3f} {row['cell_iou']:9.3f} "
        f"{row['touching_pairs']:9d} {row['merged_pairs']:7d}"
    )
crowded = max(
    list_images(test / "images"), key=lambda p: int(read_stack(test / "labels" / f"{p.stem}.tif").pixels.max())
)
places = (crowded, test / "labels" / f"{crowded.stem}.tif", out / "eq2_cells" / f"{crowded.stem}.tif")
image, truth, cells = (read_stack(place).pixels[0, 0, :300, :300] for place in places)
figures.draw_prediction(out / "dsb2018.png", image, truth, cells, title="nuclei the net has not seen")
(out / "scores.json").write_text(json.dumps({"seconds": seconds, "scores": scores}, indent=2) + "\n")
