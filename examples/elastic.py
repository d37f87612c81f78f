"""The paper's augmentation, drawn: an image, its cells and a grid of lines through one map. Writes elastic.png.

    python examples/elastic.py

Everything is `unet_fast.ElasticWarp`'s, as in training: displacements of a 3 x 3 grid, then rotation, mirror and grey
values on top; and, over a smaller tile, a map that folds as it is drawn, and what is made of it.
"""

import matplotlib as mpl

mpl.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import torch

from unet_fast import ElasticWarp, synthetic

SIDE, SMALL = 256, 64
grey, cells = synthetic.cells(SIDE, seed=1)
image = torch.from_numpy(grey.astype(np.float32) / grey.max())[None, None]
ids = torch.from_numpy(cells.astype(np.int32))[None]
line = torch.arange(SIDE) % 32 < 2
lines = (line[:, None] | line)[None].to(torch.int32)

warp, generator = ElasticWarp(), ElasticWarp.generator(0, 0, 3)
size = (SIDE, SIDE)
none = torch.zeros(1, 2, 2, 2)
one_tile = warp.draw(1, size, generator)
affine, table = warp.draw_affine(1, generator), warp.draw_table(1, generator)
many_tiles = warp.draw(1, size, generator, tile=SMALL)
folded = float(warp.folded(many_tiles, size))

maps = {
    "as it is": (none, None, None),
    "3 x 3 points, sd 10 px": (one_tile, None, None),
    "and turned, mirrored, greys bent": (one_tile, affine, table),
    f"3 x 3 points each {SMALL} px: {folded:.1%} folds": (many_tiles, None, None),
    "scaled down until nothing folds": (warp.unfolded(many_tiles, size), None, None),
}

figure, axes = plt.subplots(2, len(maps), figsize=(4 * len(maps), 8.4), layout="constrained")
# neighbouring ids in colours that differ
hues = np.random.default_rng(0).permutation(int(ids.max())) / int(ids.max())
colours = np.vstack([[0, 0, 0], plt.get_cmap("hsv")(hues)[:, :3]])
for (above, below), (name, (displacement, matrix, lut)) in zip(axes.T, maps.items(), strict=True):
    shown, there = warp.apply(image, displacement, labels=ids, matrix=matrix, lut=lut)
    _, gone = warp.apply(image, displacement, labels=lines, matrix=matrix)
    on_line = gone[0].bool().numpy()[..., None]
    picture = np.repeat(shown[0, 0].clamp(0, 1).numpy()[..., None], 3, 2)
    above.imshow(np.where(on_line, 0.45 * picture + 0.55 * np.array([1, 0.8, 0.3]), picture))
    picture = colours[there[0].numpy()]
    below.imshow(np.where(on_line, 0.45 * picture + 0.55, picture))
    above.set_title(name)
    print(f"{name:45s} share of pixels that fold {float(warp.folded(displacement, size)):.3f}")
for axis in axes.flat:
    axis.set_axis_off()
figure.savefig("elastic.png", dpi=45)
