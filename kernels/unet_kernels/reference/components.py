"""Connected components of masks, on any device: docs/mathematics.md, section 7."""

import torch
from torch import Tensor

__all__ = ["connected_components", "number_roots"]

# neighbours that come before a pixel in raster order, as (rows, columns) to it
_BEFORE = {4: ((1, 0), (0, 1)), 8: ((1, 0), (0, 1), (1, 1), (1, -1))}


def connected_components(mask: Tensor, connectivity: int = 4) -> Tensor:
    """Components of each slice of mask [N, H, W] bool, int32: 1, 2 .. in the order of their first pixels, 0 outside.

    Every pixel names a parent in its component, itself to begin with. Two neighbours whose parents differ hang the
    later parent below the earlier one; then every pixel takes its parent's parent until nothing moves. Repeated until
    no neighbours differ, which takes a number of rounds that grows with the logarithm of a component's size.
    """
    n, height, width = mask.shape
    if mask.numel() == 0:
        return mask.int()
    place = torch.arange(mask.numel(), device=mask.device).reshape(mask.shape)
    parent = place.flatten()
    pairs = []
    for dy, dx in _BEFORE[connectivity]:
        left, right = max(dx, 0), width + min(dx, 0)
        here, there = (slice(dy, height), slice(left, right)), (slice(0, height - dy), slice(left - dx, right - dx))
        both = mask[:, here[0], here[1]] & mask[:, there[0], there[1]]
        pairs.append(torch.stack([place[:, here[0], here[1]][both], place[:, there[0], there[1]][both]]))
    a, b = torch.cat(pairs, dim=1)
    while True:
        root_a, root_b = parent[a], parent[b]
        differ = root_a != root_b
        if not bool(differ.any()):
            break
        low, high = torch.minimum(root_a, root_b)[differ], torch.maximum(root_a, root_b)[differ]
        parent = parent.scatter_reduce(0, high, low, "amin")
        while not torch.equal(shorter := parent[parent], parent):
            parent = shorter
    first = torch.arange(n, device=mask.device)[:, None, None] * (height * width)
    return number_roots(torch.where(mask, parent.reshape(mask.shape) - first, -1))


def number_roots(roots: Tensor) -> Tensor:
    """Ids 1, 2 .. of each slice, int32, from the place in its slice of every pixel's first one; -1 becomes 0."""
    n, height, width = roots.shape
    flat = roots.reshape(n, -1).long()
    is_root = flat == torch.arange(height * width, device=roots.device)
    number = is_root.cumsum(1)
    return torch.where(flat < 0, 0, number.gather(1, flat.clamp(min=0))).int().reshape(roots.shape)
