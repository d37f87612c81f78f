"""Distances to the two nearest cells and the weights of Eq. 2: docs/mathematics.md, section 5."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["border_limit", "border_sum", "border_weight", "cut_gap", "two_nearest_cells"]


# no squared distance reaches this, and adding two of them does not overflow an int64
_FAR = 1 << 60


def two_nearest_cells(instances: Tensor, max_radius: float | None = None) -> tuple[Tensor, Tensor]:
    """Exact distances to the nearest and second-nearest distinct cell; [N, H, W] -> two float32 [N, H, W].

    Separable: each column keeps, for every row, the two nearest distinct ids (keeping two is enough for the two
    nearest of the image, docs/mathematics.md section 5); then a search along the row, outward, until no column further
    out can improve any pixel. Memory is a fixed number of maps, whatever the number of cells.
    """
    reach = math.inf if max_radius is None else max_radius * max_radius
    columns = _two_nearest_in_column(instances.long())
    best = [t.clone() for t in columns]
    width = instances.shape[-1]
    for dx in range(1, width):
        # every candidate at this distance costs at least dx^2
        if dx * dx > min(reach, int(best[3].max()) if best[3].numel() else -1):
            break
        for near, far in ((slice(dx, width), slice(0, width - dx)), (slice(0, width - dx), slice(dx, width))):
            window = [t[..., near] for t in best]
            for i in (0, 2):
                improved = _insert(window, columns[i][..., far], columns[i + 1][..., far] + dx * dx)
                for t, new in zip(window, improved, strict=True):
                    t.copy_(new)
                window = [t[..., near] for t in best]
    return tuple(_distance(squared, reach) for squared in (best[1], best[3]))  # type: ignore[return-value]


def _two_nearest_in_column(instances: Tensor) -> list[Tensor]:
    """[id1, squared distance 1, id2, squared distance 2] of the two nearest distinct cells of each pixel's column."""
    result = [torch.zeros_like(instances), torch.full_like(instances, _FAR)] * 2
    result = [t.clone() for t in result]
    height = instances.shape[-2]
    for rows in (range(height), range(height - 1, -1, -1)):
        # the last two distinct ids met on the way, each with the row where it was met last
        shape = (instances.shape[0], instances.shape[-1])
        id1, id2 = instances.new_zeros(shape), instances.new_zeros(shape)
        row1, row2 = torch.zeros_like(id1), torch.zeros_like(id2)
        for row in rows:
            here = instances[:, row]
            cell, other = here > 0, (here > 0) & (here != id1)
            id2, row2 = torch.where(other, id1, id2), torch.where(other, row1, row2)
            id1, row1 = torch.where(cell, here, id1), torch.where(cell, row, row1)
            state = [t[:, row] for t in result]
            for ids, met in ((id1, row1), (id2, row2)):
                state = _insert(state, ids, torch.where(ids > 0, (met - row) ** 2, _FAR))
            for t, new in zip(result, state, strict=True):
                t[:, row] = new
    return result


def _insert(state: list[Tensor], ids: Tensor, squared: Tensor) -> list[Tensor]:
    """The two nearest distinct ids after one more candidate; an id of 0 is no cell and comes with _FAR."""
    id1, best1, id2, best2 = state
    squared = torch.where(ids > 0, squared, _FAR)
    same, first = ids == id1, squared < best1
    second = ~same & ~first & (squared < best2)
    push = ~same & first
    return [
        torch.where(first, ids, id1),
        torch.where(first, squared, best1),
        torch.where(push, id1, torch.where(second, ids, id2)),
        torch.where(push, best1, torch.where(second, squared, best2)),
    ]


def _distance(squared: Tensor, reach: float) -> Tensor:
    none = (squared >= _FAR) | (squared > reach)
    return torch.where(none, math.inf, squared.double().sqrt()).float()


def cut_gap(instances: Tensor) -> Tensor:
    """instances with every cell pixel that has a 4-neighbour of another cell set to 0."""
    touching = torch.zeros_like(instances, dtype=torch.bool)
    for axis in (-2, -1):
        size = instances.shape[axis]
        if size < 2:
            continue
        a, b = instances.narrow(axis, 0, size - 1), instances.narrow(axis, 1, size - 1)
        differ = (a > 0) & (b > 0) & (a != b)
        touching.narrow(axis, 0, size - 1).logical_or_(differ)
        touching.narrow(axis, 1, size - 1).logical_or_(differ)
    return torch.where(touching, 0, instances)


def border_weight(
    instances: Tensor,
    w0: float = 10.0,
    sigma_px: float = 5.0,
    class_weight: Sequence[float] | None = None,
    region: str = "background",
    gap: bool = True,
    sums: Callable[[Tensor, float, bool, bool], Tensor] | None = None,
) -> Tensor:
    """Eq. 2, w_c + w0 exp(-(d1 + d2)^2 / (2 sigma^2)), float32 [N, H, W]; 0 where instances are negative (ignored).

    `sums` is where d1 + d2 comes from: the specification, or a kernel that equals it.
    """
    together = (sums or border_sum)(instances, border_limit(w0, sigma_px), region == "all", gap)
    # where there is no sum it is infinite; so may be sigma squared
    term = torch.where(together.isinf(), 0, w0 * torch.exp(-(together**2) / (2 * sigma_px * sigma_px)))
    of_background, of_cell = (1.0, 1.0) if class_weight is None else class_weight
    balance = torch.where(_background(instances, gap), of_background, of_cell)
    return torch.where(instances < 0, 0, balance + term).float()


def border_sum(instances: Tensor, limit: float, everywhere: bool, gap: bool) -> Tensor:
    """d1 + d2, float32 [N, H, W], where Eq. 2's term applies: the background (with `everywhere` all that is not
    ignored) as far as the sum is at most `limit`; infinite elsewhere."""
    d1, d2 = two_nearest_cells(instances, limit)
    there = (instances >= 0) & (everywhere | _background(instances, gap))
    return torch.where(there & (d1 + d2 <= limit), d1 + d2, math.inf)


def _background(instances: Tensor, gap: bool) -> Tensor:
    return (cut_gap(instances) if gap else instances) == 0


def border_limit(w0: float, sigma_px: float) -> float:
    """d1 + d2, in whole pixels, above which Eq. 2's term is below 1e-12 and left out: nobody need look further."""
    return float(math.ceil(min(1e9, sigma_px * math.sqrt(2 * math.log(max(w0, 1e-12) / 1e-12)))))
