# %% [markdown]
# # FastUNet in an ordinary training loop
#
# Nothing here knows that the net is fast: torch.optim, a loss, a loop. Touching discs of different brightness are to
# be told from the background, and from each other: the weight map of Eq. 2 makes the gap between them count.

# %%
import time

import torch

from unet_fast import FastUNet, geometry
from unet_kernels import border_weight, cut_gap, weighted_cross_entropy

torch.manual_seed(0)

# %% [markdown]
# ## Images
# A tile goes in larger than it comes out: `halo` pixels per side are context.

# %%
DEPTH = 2
TILE_IN = geometry.legal_sizes(100, 116, DEPTH)[0]
TILE_OUT = geometry.output_size(TILE_IN, DEPTH)
HALO = geometry.halo(DEPTH)


def discs(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(image [n, 1, H, W] float32, instances [n, H, W] int32)"""
    y, x = torch.meshgrid(torch.arange(TILE_IN), torch.arange(TILE_IN), indexing="ij")
    instances = torch.zeros(n, TILE_IN, TILE_IN, dtype=torch.int32)
    image = torch.rand(n, 1, TILE_IN, TILE_IN) * 0.3
    for i in range(n):
        for cell in range(1, 15):
            row, column, radius = torch.randint(TILE_IN, ()), torch.randint(TILE_IN, ()), torch.randint(6, 11, ())
            inside = ((y - row) ** 2 + (x - column) ** 2 < radius**2) & (instances[i] == 0)
            instances[i, inside] = cell
            image[i, 0, inside] += 0.3 + 0.4 * torch.rand(())
    return image, instances


# %% [markdown]
# ## Training
# The loss's target is `cut_gap(instances) > 0`: where two cells touch, a gap of background is put between them.

# %%
net = FastUNet(features=(8, 16, 32))
optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
start = time.perf_counter()
for step in range(100):
    image, instances = discs(2)
    # weigh on the whole tile, then crop: a cell outside the output still casts its weight into it
    weight = border_weight(instances)[:, HALO:-HALO, HALO:-HALO]
    target = (cut_gap(instances) > 0)[:, HALO:-HALO, HALO:-HALO].to(torch.uint8)
    loss = weighted_cross_entropy(net(image), target, weight, reduction="weighted_mean")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 19:
        print(f"step {step + 1:3d}   loss {loss.item():.3f}   {time.perf_counter() - start:5.1f} s")

# %% [markdown]
# ## What it learned

# %%
net.eval()
with torch.no_grad():
    image, instances = discs(4)
    found = net(image).argmax(1).bool()
truth = (cut_gap(instances) > 0)[:, HALO:-HALO, HALO:-HALO]
iou = ((found & truth).sum() / (found | truth).sum()).item()
print(f"{TILE_IN} pixels in, {TILE_OUT} out; IoU on new images {iou:.3f}")
