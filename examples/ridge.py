"""The weight map of Eq. 2 on cells that touch, drawn: writes ridge.png, and the weights of one line across a gap.

    python examples/ridge.py

The cells and their ids are drawn by `unet_fast.synthetic`; the maps are `unet_kernels.border_weight`'s, with the three
published variants of `unet_fast.BorderWeightedCrossEntropy` side by side.
"""

import matplotlib as mpl

mpl.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import torch

import unet_kernels
from unet_fast import BorderWeightedCrossEntropy, synthetic
from unet_fast.loss import VARIANTS

image, ids = synthetic.cells(128, seed=2)
instances = torch.from_numpy(ids.astype(np.int32))[None]
target = (unet_kernels.cut_gap(instances) > 0).long()

figure, axes = plt.subplots(1, 2 + len(VARIANTS), figsize=(4 * (2 + len(VARIANTS)), 4.4), layout="constrained")
axes[0].imshow(image, cmap="gray")
axes[0].set_title("image")
axes[1].imshow(target[0], cmap="gray")
axes[1].set_title("target: cells, with the gap that is cut")
for axis, name in zip(axes[2:], VARIANTS, strict=True):
    weight = BorderWeightedCrossEntropy.variant(name).weight(instances, target)[0]
    shown = axis.imshow(weight, cmap="magma", vmin=0)
    axis.set_title(f"weight: {name}, {weight.min():.1f} to {weight.max():.1f}")
    figure.colorbar(shown, ax=axis, shrink=0.8)
for axis in axes:
    axis.set_axis_off()
figure.savefig("ridge.png", dpi=70)

two = torch.zeros(1, 3, 14, dtype=torch.int32)
two[..., :5], two[..., 5:9], two[..., 12:] = 1, 2, 3
line = unet_kernels.border_weight(two)[0, 1]
print("ids    ", *(f"{int(i):5d}" for i in two[0, 1]))
print("target ", *(f"{int(i > 0):5d}" for i in unet_kernels.cut_gap(two)[0, 1]))
print("weight ", *(f"{float(w):5.2f}" for w in line))
