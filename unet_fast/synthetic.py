"""Microscopy that nobody has to download: cells that touch, and membranes in a stack, each with its truth.

Drawn, not simulated: what makes the real images hard is there (touching cells, uneven light, texture, organelles that
look like membranes), the optics are not. The same arguments give the same bytes.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["cells", "membranes"]

_Floats = NDArray[np.float64]

_SMALLEST = 32
_AREA_PER_CELL_PX = 256 * 256 / 36
_POCKET_PX = 24
_SPACING_PX = 36.0


def cells(
    size: int = 256,
    *,
    seed: int,
    cells: int | None = None,
    radius_px: tuple[float, float] = (11.0, 17.0),
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Fluorescent cells in colonies: they touch, and only a thin dark seam parts them; the light is uneven.

    The background at the bright end is as bright as cells at the dark end, so that no one threshold finds them.

    Args:
        size: rows and columns.
        seed: of the random generator.
        cells: how many are tried for, fewer where they do not fit; None: 36 for each 256 x 256 pixels, and a seventh
            more or less.
        radius_px: the least and the greatest mean radius.

    Returns:
        image `[size, size]`, and instances `[size, size]`: 0 = background, ids 1 to n, each one 4-connected component
        of at least a third of the smallest cell's disc.

    Raises:
        TypeError: size, seed or cells is no whole number.
        ValueError: size is below 32, seed negative, cells below 1, or radius_px not two numbers with 4 <= low <=
            high <= size / 2 (18 where size is below 36).
    """
    size, seed = _whole("size", size, _SMALLEST), _whole("seed", seed, 0)
    if len(radius_px) != 2:
        raise ValueError(f"radius_px must be (low, high), got {radius_px}")
    low, high = radius_px
    largest = max(size / 2, 18.0)
    if not 4 <= low <= high <= largest:
        raise ValueError(f"radius_px must be 4 <= low <= high <= {largest:g}, got {radius_px}")
    rng = np.random.default_rng(seed)
    if cells is None:
        wanted = max(1, round(size * size / _AREA_PER_CELL_PX * rng.uniform(6 / 7, 8 / 7)))
    else:
        wanted = _whole("cells", cells, 1)
    centres, radii = _colonies(rng, size, wanted, low, high)
    ids, dome, body = _outlines(rng, size, centres, radii)
    instances = _tidy(ids, math.pi * low * low / 3)
    return _fluorescence(rng, instances, dome, body), instances


def membranes(shape: tuple[int, int, int] = (8, 256, 256), *, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A stack of electron micrographs: bright cytoplasm, dark membranes, and organelles as dark as these.

    Cells are those of a power diagram whose centres drift from slice to slice, bent by a smooth displacement.

    Args:
        shape: slices, rows, columns.
        seed: of the random generator.

    Returns:
        stack `shape`, and labels `shape`: 255 = cell, 0 = membrane, a fifth of all pixels.

    Raises:
        TypeError: a size or seed is no whole number.
        ValueError: shape is not three sizes, has no slice, or fewer than 32 rows or columns, or seed is negative.
    """
    if len(shape) != 3:
        raise ValueError(f"shape must be (slices, rows, columns), got {shape}")
    D = _whole("shape[0]", shape[0], 1)
    H, W = (_whole(f"shape[{axis}]", shape[axis], _SMALLEST) for axis in (1, 2))
    rng = np.random.default_rng(_whole("seed", seed, 0))
    distance = _power_diagram(rng, (D, H, W))
    thickness = np.exp(0.22 * _waves(rng, (D, H, W), (4, 45, 45)))
    relative = distance / thickness
    # as thick as makes the membranes a fifth of all
    edge = float(np.quantile(relative, rng.uniform(0.185, 0.215)))
    depth_px = (relative - edge) * thickness
    labels = np.where(relative > edge, 255, 0).astype(np.uint8)
    return _micrographs(rng, depth_px), labels


def _colonies(rng: np.random.Generator, size: int, wanted: int, low: float, high: float) -> tuple[_Floats, _Floats]:
    """Centres `[n, 2]` and radii `[n]`: most are put next to one that is there, so that the two overlap a little."""
    centres, radii = np.empty((wanted, 2)), np.empty(wanted)
    n = 0
    for _ in range(60 * wanted):
        radius = rng.uniform(low, high)
        if n == 0 or rng.random() < 0.15:
            centre = rng.uniform(0, size - 1, 2)
        else:
            beside, angle = int(rng.integers(n)), rng.uniform(0, 2 * math.pi)
            reach = (radii[beside] + radius) * rng.uniform(0.82, 0.92)
            centre = centres[beside] + reach * np.array([math.sin(angle), math.cos(angle)])
        margin = min(0.35 * radius, size / 4)
        if (centre < margin).any() or (centre > size - 1 - margin).any():
            continue
        apart = np.hypot(*(centres[:n] - centre).T)
        if (apart < 0.8 * (radii[:n] + radius)).any():
            continue
        centres[n], radii[n] = centre, radius
        n += 1
        if n == wanted:
            break
    return centres[:n], radii[:n]


def _outlines(
    rng: np.random.Generator, size: int, centres: _Floats, radii: _Floats
) -> tuple[NDArray[np.int32], _Floats, _Floats]:
    """Who owns each pixel, how far it is from its centre (1 at the outline), and what the inside looks like."""
    ids = np.zeros((size, size), np.int32)
    nearest = np.ones((size, size))
    body = np.zeros((size, size))
    for cell, ((cy, cx), radius) in enumerate(zip(centres, radii, strict=True), start=1):
        reach = math.ceil(1.7 * radius)
        rows = slice(max(0, int(cy) - reach), min(size, int(cy) + reach + 2))
        columns = slice(max(0, int(cx) - reach), min(size, int(cx) + reach + 2))
        y, x = np.mgrid[rows, columns].astype(np.float64)
        y, x = y - cy, x - cx
        angle = np.arctan2(y, x)
        # an ellipse of the same area, its outline bent by a few low harmonics
        turn, stretch = rng.uniform(0, math.pi), rng.uniform(1.0, 1.22)
        along = x * math.cos(turn) + y * math.sin(turn)
        across = y * math.cos(turn) - x * math.sin(turn)
        distance = np.hypot(along / stretch, across * stretch) / radius
        wobble = np.ones_like(distance)
        for k, depth in ((2, 0.05), (3, 0.09), (4, 0.06), (5, 0.04), (7, 0.02)):
            wobble += rng.uniform(0, depth) * np.cos(k * angle + rng.uniform(0, 2 * math.pi))
        distance /= wobble
        mine = distance < nearest[rows, columns]
        inside = rng.uniform(0.8, 1.2) * (1.0 + 0.15 * (1 - np.minimum(distance, 1) ** 2))
        # a nucleus: mostly darker than its cell, its edge soft
        off = rng.uniform(-0.15, 0.15, 2) * radius
        nucleus = np.hypot(y - off[0], (x - off[1]) * rng.uniform(0.8, 1.25)) / (rng.uniform(0.36, 0.48) * radius)
        shade = rng.uniform(-0.42, -0.22) if rng.random() < 0.75 else rng.uniform(0.15, 0.3)
        inside *= 1 + shade / (1 + np.exp(np.clip(9 * (nucleus - 1), -30, 30)))
        nearest[rows, columns][mine] = distance[mine]
        ids[rows, columns][mine] = cell
        body[rows, columns][mine] = inside[mine]
    return ids, nearest, body


def _tidy(ids: NDArray[np.int32], least_px: float) -> NDArray[np.int32]:
    """Pockets between cells closed, loose bits and slivers dropped, ids 1 to n."""
    holes, n = ndimage.label(ids == 0)
    area = np.bincount(holes.ravel(), minlength=n + 1)
    small = (area < _POCKET_PX)[holes] & (ids == 0)
    nearest = ndimage.distance_transform_edt(ids == 0, return_distances=False, return_indices=True)
    ids = np.where(small, ids[tuple(nearest)], ids)
    tidy = np.zeros_like(ids)
    kept = 0
    for cell, box in enumerate(ndimage.find_objects(ids), start=1):
        if box is None:
            continue
        parts, _ = ndimage.label(ids[box] == cell)
        area = np.bincount(parts.ravel())
        area[0] = 0
        largest = int(np.argmax(area))
        if area[largest] >= least_px:
            kept += 1
            tidy[box][parts == largest] = kept
    return tidy


def _fluorescence(
    rng: np.random.Generator, instances: NDArray[np.int32], dome: _Floats, body: _Floats
) -> NDArray[np.uint8]:
    shape = instances.shape
    size = shape[0]
    inside = instances > 0
    granules = ndimage.gaussian_filter(rng.standard_normal(shape), 1.1)
    granules /= granules.std()
    patches = _waves(rng, shape, (7, 7))
    stain = body * (1 + 0.13 * np.maximum(granules, -1.5) + 0.06 * patches)
    # the membrane's own stain: a thin brighter ring within free outlines
    stain *= 1 + 0.12 * np.exp(-(((dome - 0.86) / 0.08) ** 2))
    seam = np.exp(-((_to_seam(instances) / 1.7) ** 2))
    depth = np.clip(0.68 + 0.07 * _waves(rng, shape, (20, 20)), 0.58, 0.80)
    stain *= 1 - depth * seam
    stain = np.where(inside, stain, 0.0)
    background = 0.42 + 0.03 * _waves(rng, shape, (30, 30))
    scene = ndimage.gaussian_filter(background + 0.62 * stain, 0.9) + _debris(rng, size)
    # from one side to the other four times as bright
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[:size, :size] / (size - 1) - 0.5
    ramp = (y * math.sin(angle) + x * math.cos(angle)) / (abs(math.sin(angle)) + abs(math.cos(angle)))
    light = np.exp(1.5 * ramp + 0.06 * _waves(rng, shape, (size / 3, size / 3)))
    photons = 220.0
    signal = rng.poisson(np.maximum(scene * light, 0) * photons) / photons
    signal = signal + 0.012 * rng.standard_normal(shape)
    return _to_bytes(signal, 12.0, 88.0)


def _to_seam(instances: NDArray[np.int32]) -> _Floats:
    """Pixels to the nearest that has a neighbour in another cell; infinitely many where none has."""
    seam = np.zeros(instances.shape, bool)
    for a, b in (
        ((slice(1, None), slice(None)), (slice(None, -1), slice(None))),
        ((slice(None), slice(1, None)), (slice(None), slice(None, -1))),
    ):
        both = (instances[a] != instances[b]) & (instances[a] > 0) & (instances[b] > 0)
        seam[a] |= both
        seam[b] |= both
    if not seam.any():
        return np.full(instances.shape, np.inf)
    return np.asarray(ndimage.distance_transform_edt(~seam), np.float64)


def _debris(rng: np.random.Generator, size: int) -> _Floats:
    """Specks above and below the focus."""
    specks = np.zeros((size, size))
    for sigma_px, share, brightness in ((5.0, 6.0, 0.16), (2.2, 8.0, 0.14)):
        layer = np.zeros((size, size))
        n = int(rng.poisson(share * size * size / 65536))
        layer[rng.integers(size, size=n), rng.integers(size, size=n)] = rng.uniform(0.4, 1.0, n)
        specks += brightness * 2 * math.pi * sigma_px**2 * ndimage.gaussian_filter(layer, sigma_px, mode="constant")
    return specks


def _power_diagram(rng: np.random.Generator, shape: tuple[int, int, int]) -> _Floats:
    """Pixels to the next border of a power diagram `[D, H, W]`: centres on a shaken grid, drifting over the slices."""
    D, H, W = shape
    pad = 3
    rows, columns = math.ceil(H / _SPACING_PX) + 2 * pad, math.ceil(W / _SPACING_PX) + 2 * pad
    grid = np.mgrid[:rows, :columns].reshape(2, -1).T - (pad - 0.5)
    n = len(grid)
    home = (grid + rng.uniform(-0.42, 0.42, (n, 2))) * _SPACING_PX
    drift = np.stack([_waves(rng, (D, n), (5, 1)) for _ in range(2)], axis=-1) * 4.0
    weight = (_waves(rng, (D, n), (6, 1)) * 0.16 + rng.uniform(-0.22, 0.22, n)) * _SPACING_PX**2
    bend_y, bend_x = (6.0 * _waves(rng, shape, (7, 52, 52)) + 1.6 * _waves(rng, shape, (4, 12, 12)) for _ in range(2))
    reach = math.ceil(3 * _SPACING_PX)
    distance = np.empty(shape)
    y, x = np.mgrid[:H, :W].astype(np.float64)
    for z in range(D):
        py, px = y + bend_y[z], x + bend_x[z]
        centres = home + drift[z]
        # the two nearest of all, by |p - c|^2 - w
        first, second = np.full((2, H, W), np.inf)
        first_id, second_id = np.zeros((2, H, W), np.int64)
        for i, (cy, cx) in enumerate(centres):
            box = (
                slice(max(0, int(cy) - reach), max(0, int(cy) + reach)),
                slice(max(0, int(cx) - reach), max(0, int(cx) + reach)),
            )
            power = (py[box] - cy) ** 2 + (px[box] - cx) ** 2 - weight[z, i]
            if power.size == 0:
                continue
            nearer, near = power < first[box], power < second[box]
            second[box] = np.where(nearer, first[box], np.where(near, power, second[box]))
            second_id[box] = np.where(nearer, first_id[box], np.where(near, i, second_id[box]))
            first[box] = np.where(nearer, power, first[box])
            first_id[box] = np.where(nearer, i, first_id[box])
        between = np.hypot(*(centres[first_id] - centres[second_id]).transpose(2, 0, 1))
        # the bending stretches some places and presses others: pixels there are not pixels here
        yy, yx = np.gradient(py)
        xy, xx = np.gradient(px)
        stretch = np.clip(np.sqrt(np.abs(yy * xx - yx * xy)), 0.5, 2.0)
        distance[z] = (second - first) / (2 * np.maximum(between, 1.0) * stretch)
    return distance


def _micrographs(rng: np.random.Generator, depth_px: _Floats) -> NDArray[np.uint8]:
    """Paint a stack, given how far each pixel lies within its cell (negative: within the membrane)."""
    shape = depth_px.shape
    D = shape[0]
    ground = 0.70 + 0.05 * _waves(rng, shape, (3, 22, 22))
    # cytoplasm: fine grains, the same in no two slices
    grains = ndimage.gaussian_filter(rng.standard_normal(shape), (0, 1.0, 1.0))
    ground += 0.055 * grains / grains.std() + 0.03 * _waves(rng, shape, (1, 5, 5))
    ground = _organelles(rng, ground, depth_px)
    # a membrane fades where it is cut at a slant: softer and paler, never gone
    slant = 1 / (1 + np.exp(-2.2 * _waves(rng, shape, (2, 26, 26)) + 0.6))
    dark = (0.60 - 0.16 * slant) / (1 + np.exp(np.clip((depth_px - 0.2) / (0.4 + 0.5 * slant), -30, 30)))
    scene = ground * (1 - dark) - 0.06 * dark
    scene = ndimage.gaussian_filter(scene, (0, 0.7, 0.7))
    # staining and the beam: uneven within a slice, and from slice to slice
    scene *= 1 + 0.07 * _waves(rng, shape, (2, 90, 90))
    scene *= rng.uniform(0.92, 1.06, (D, 1, 1))
    scene += rng.uniform(-0.03, 0.03, (D, 1, 1))
    noise = ndimage.gaussian_filter(rng.standard_normal(shape), (0, 0.5, 0.5))
    scene += 0.05 * noise / noise.std()
    return _to_bytes(scene, 0.0, 255.0)


def _organelles(rng: np.random.Generator, ground: _Floats, depth_px: _Floats) -> _Floats:
    """Mitochondria, vesicles and dark bodies, all clear of the membranes, over some slices each."""
    D, H, W = ground.shape
    painted = ground.copy()
    volume = D * H * W / 65536
    for kind, share, room_px in (("mitochondrion", 14.0, 6.0), ("vesicle", 40.0, 4.0), ("body", 12.0, 4.0)):
        for _ in range(int(rng.poisson(share * volume / (2.0 if kind != "vesicle" else 1.2)))):
            z, cy, cx = (int(rng.integers(n)) for n in (D, H, W))
            turn, squash, size_px = rng.uniform(0, math.pi), rng.uniform(1.0, 1.9), rng.uniform(0.75, 1.25)
            phase, tall = rng.uniform(0, 2 * math.pi), rng.uniform(1.0, 2.4)
            shade = rng.uniform(0.8, 1.2)
            if depth_px[z, cy, cx] < room_px:
                continue
            radius = size_px * {"mitochondrion": 6.0, "vesicle": 2.6, "body": 2.8}[kind]
            if kind != "mitochondrion":
                squash, tall = min(squash, 1.25), tall * 0.6
            reach = math.ceil(radius * squash) + 3
            rows = slice(max(0, cy - reach), min(H, cy + reach + 1))
            columns = slice(max(0, cx - reach), min(W, cx + reach + 1))
            y, x = np.mgrid[rows, columns].astype(np.float64)
            along = (x - cx) * math.cos(turn) + (y - cy) * math.sin(turn)
            across = (y - cy) * math.cos(turn) - (x - cx) * math.sin(turn)
            for slice_ in range(max(0, math.ceil(z - tall)), min(D, math.floor(z + tall) + 1)):
                scale = math.sqrt(1 - ((slice_ - z) / (tall + 0.3)) ** 2)
                # pixels from the outline, positive inside
                within = radius * scale - np.hypot(along / squash, across)
                clear = np.clip((depth_px[slice_, rows, columns] - 1.2) / 1.5, 0, 1)
                cover = clear / (1 + np.exp(np.clip(-2.5 * within, -30, 30)))
                if kind == "mitochondrion":
                    cristae = 0.5 + 0.5 * np.cos(1.7 * along + 0.25 * across + phase)
                    rim = np.exp(-(((within - 0.9) / 0.9) ** 2))
                    tone = 0.52 - 0.14 * shade * cristae - 0.22 * shade * rim
                elif kind == "vesicle":
                    rim = np.exp(-(((within - 0.8) / 0.8) ** 2))
                    tone = 0.80 - 0.52 * shade * rim
                else:
                    tone = np.full_like(within, 0.30 * shade)
                there = painted[slice_, rows, columns]
                painted[slice_, rows, columns] = there * (1 - cover) + tone * cover
    return painted


def _waves(rng: np.random.Generator, shape: Sequence[int], scale: Sequence[float]) -> _Floats:
    """Smooth noise of about unit variance: one normal number every `scale` pixels, cubic splines between them."""
    step = [max(1.0, s) for s in scale]
    coarse = rng.standard_normal([math.ceil(n / s) + 4 for n, s in zip(shape, step, strict=True)])
    fine = coarse
    for axis, (n, s) in enumerate(zip(shape, step, strict=True)):
        at = (np.arange(n) + 0.5) / s + 1
        left = np.floor(at).astype(np.int64)
        t = (at - left).reshape([-1 if a == axis else 1 for a in range(len(shape))])
        # uniform cubic B-spline
        taps = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
        fine = sum((np.take(fine, left - 1 + k, axis) * tap for k, tap in enumerate(taps)), np.zeros(1)) / 6
        if s > 1:
            fine = fine * 1.45
    return fine


def _to_bytes(values: _Floats, zero: float, gain: float) -> NDArray[np.uint8]:
    return np.clip(np.rint(zero + gain * values), 0, 255).astype(np.uint8)


def _whole(name: str, n: Any, least: int) -> int:
    if isinstance(n, bool) or not hasattr(n, "__index__"):
        raise TypeError(f"{name} must be a whole number, got {n!r}")
    if n.__index__() < least:
        raise ValueError(f"{name} must be {least} or more, got {n}")
    return int(n.__index__())
