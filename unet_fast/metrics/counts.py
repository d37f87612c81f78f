"""What the challenge's scores are made of, counted image by image and pooled: docs/mathematics.md, section 7."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import unet_kernels

from ._inputs import ratio

__all__ = ["ChallengeCounts", "segments_named", "warped"]

_KINDS = unet_kernels.ERROR_KINDS
_RATIOS = ("precision", "recall", "f_score")


def _thresholds(last: float) -> list[float]:
    # t += 0.1 in double: 0 to 0.9 are ten, 0 to 1 eleven of which the last is 0.9999999999999999, so that a
    # probability of 1 lies above all of them
    thresholds, t = [], 0.0
    while t <= last:
        thresholds.append(t)
        t += 0.1
    return thresholds


_TEN, _ELEVEN = _thresholds(0.9), _thresholds(1.0)


@dataclass(frozen=True, eq=False)
class ChallengeCounts:
    """What the challenge's scores are made of, so that images of any sizes can be pooled before they are scored.

    Each score chooses one threshold for the whole pool. What was not asked for is None.

    Attributes:
        pixels: number of pixels that are not ignored.
        cell_pixels: number of those that are cell.
        areas: int64 [11 thresholds, 2], true and false positives.
        warping: int64 [10 thresholds, 7], pixels of each of `unet_kernels.ERROR_KINDS`.
        segments: (squares, logs) of `unet_kernels.rand_sums` at 11 thresholds.
        thinned: likewise, of segments by watershed.
    """

    pixels: int
    cell_pixels: int
    areas: NDArray[np.int64] | None = None
    warping: NDArray[np.int64] | None = None
    segments: tuple[NDArray[np.int64], NDArray[np.float64]] | None = None
    thinned: tuple[NDArray[np.int64], NDArray[np.float64]] | None = None

    @classmethod
    def of(
        cls,
        prediction: NDArray[np.float32],
        truth: NDArray[np.int8],
        wanted: Collection[str] = ("areas", "warping", "segments", "thinned"),
        *,
        counted: NDArray[np.bool_] | None = None,
        radius: int = 20,
    ) -> "ChallengeCounts":
        """Count a stack.

        Args:
            prediction: [D, H, W] float32, probability of cell.
            truth: [D, H, W] int8, 1 cell, 0 background, -1 ignored.
            wanted: which of the attributes to count.
            counted: [D, H, W], the pixels that warping may flip and that may be errors; None: all that are not ignored.
            radius: see `warping_error`.
        """
        kept = truth >= 0
        areas = warping = None
        if "areas" in wanted:
            # [thresholds that the pixel lies above, is it cell], then from each threshold upward
            bins = 2 * (len(_ELEVEN) + 1)
            above = np.searchsorted(_ELEVEN, prediction[kept], side="left")
            binned = np.bincount(2 * above + (truth[kept] > 0), minlength=bins).reshape(-1, 2)
            areas = binned[::-1].cumsum(axis=0)[::-1][1:, ::-1].astype(np.int64)
        if "warping" in wanted:
            warping = warped(prediction, truth, _TEN, kept if counted is None else counted, radius)[0]
        sums: dict[str, Any] = {}
        if "segments" in wanted or "thinned" in wanted:
            cells = unet_kernels.connected_components(torch.from_numpy(truth))
            for name in ("segments", "thinned"):
                if name in wanted:
                    found = unet_kernels.rand_sums(
                        torch.from_numpy(prediction), cells, _ELEVEN, thinned=name == "thinned"
                    )
                    sums[name] = tuple(each.numpy() for each in found)
        return cls(int(kept.sum()), int((truth > 0).sum()), areas, warping, **sums)

    @classmethod
    def pooled(cls, counts: Sequence["ChallengeCounts"]) -> "ChallengeCounts":
        """All of them (one at least) as one, in their order; they were asked for the same."""

        def added(name: str) -> Any:
            parts = [getattr(each, name) for each in counts]
            return None if any(part is None for part in parts) else sum(parts[1:], start=parts[0])

        def joined(name: str) -> Any:
            parts = [getattr(each, name) for each in counts]
            if any(part is None for part in parts):
                return None
            return tuple(np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))

        sums = {name: added(name) for name in ("pixels", "cell_pixels", "areas", "warping")}
        return cls(**sums, segments=joined("segments"), thinned=joined("thinned"))

    def pixel_error(self) -> dict[str, Any]:
        """The parts of `pixel_error`."""
        assert self.areas is not None
        cells, rows = self.cell_pixels, []
        for threshold, (tp, fp) in zip(_ELEVEN, self.areas.tolist(), strict=True):
            ratios = (ratio(tp, tp + fp), ratio(tp, cells), 2 * tp / (tp + fp + cells) if tp else 0.0)
            counts = {"threshold": threshold, "tp": tp, "fp": fp, "fn": cells - tp}
            rows.append({**counts, **dict(zip(_RATIOS, ratios, strict=True))})
        best = _best(rows)
        return {"error": 1.0 - best["f_score"], **best, "thresholds": rows}

    def warping_error(self) -> dict[str, Any]:
        """The parts of `warping_error`, but for where the errors are."""
        assert self.warping is not None
        rows = []
        for threshold, found in zip(_TEN, self.warping.tolist(), strict=True):
            kinds = dict(zip(_KINDS[1:], found[1:], strict=True))
            error, plain = (kinds["split"] + kinds["merge"]) / self.pixels, sum(found[1:]) / self.pixels
            rows.append({"threshold": threshold, **kinds, "error": error, "plain_error": plain})
        best = min(rows, key=lambda row: row["error"])  # the first of equals
        return {**{name: best[name] for name in ("error", "threshold", "split", "merge")}, "thresholds": rows}

    def rand_error(self) -> dict[str, Any]:
        """The parts of `rand_error`."""
        assert self.segments is not None
        squares, logs = self.segments
        rows = _rows((squares.sum(1, keepdims=True), logs.sum(1, keepdims=True)), _rand)
        best = _best(rows)
        return {"error": 1.0 - best["f_score"], **best, "thresholds": rows}

    def v_rand(self, *, thinned: bool = True) -> dict[str, Any]:
        """The parts of `v_rand`."""
        rows = _rows(getattr(self, segments_named(thinned)), _rand)
        best = _best(rows)
        return {"v_rand": best["f_score"], **best, "thresholds": rows}

    def v_info(self, *, thinned: bool = True) -> dict[str, Any]:
        """The parts of `v_info`."""
        rows = _rows(getattr(self, segments_named(thinned)), _information)
        best = _best(rows)
        return {"v_info": best["f_score"], **best, "thresholds": rows}


def segments_named(thinned: bool) -> str:
    return "thinned" if thinned else "segments"


def _best(rows: list[dict[str, Any]]) -> dict[str, Any]:
    best = max(rows, key=lambda row: row["f_score"])  # the first of equals
    return {name: best[name] for name in ("threshold", *_RATIOS)}


def _rows(
    sums: tuple[NDArray[np.int64], NDArray[np.float64]], measure: Callable[..., tuple[float, ...]]
) -> list[dict[str, Any]]:
    """The mean over slices with a true cell (one at least) of what `measure` says of their sums, at each threshold."""
    squares, logs = (each[:, sums[0][0, :, 0] > 0].tolist() for each in sums)
    rows = []
    for threshold, whole, logarithms in zip(_ELEVEN, squares, logs, strict=True):
        slices = [measure(*both) for both in zip(whole, logarithms, strict=True)]
        means = [math.fsum(values) / len(slices) for values in zip(*slices, strict=True)]
        rows.append({"threshold": threshold, **dict(zip(_RATIOS, means, strict=True))})
    return rows


def _rand(squares: list[int], _logs: list[float]) -> tuple[float, ...]:
    _, of_truth, of_segments, of_both = squares
    return of_both / of_segments, of_both / of_truth, 2 * of_both / (of_truth + of_segments)


def _information(squares: list[int], logs: list[float]) -> tuple[float, ...]:
    # entropies in units of log n, the most there can be: 1 - sum k log k / (n log n)
    most = squares[0] * math.log(squares[0]) or 1.0
    truth, segments, joint = (max(0.0, 1.0 - of / most) if squares[0] > 1 else 0.0 for of in logs)
    shared = truth + segments - joint
    return _share(shared, truth), _share(shared, segments), _share(2 * shared, truth + segments)


def _share(part: float, whole: float) -> float:
    # what rounding leaves of a difference counts as none
    return 1.0 if whole < 1e-12 else min(1.0, max(0.0, part / whole))


def warped(
    prediction: NDArray[np.float32],
    truth: NDArray[np.int8],
    thresholds: Sequence[float],
    counted: NDArray[np.bool_],
    radius: int,
    kinds: bool = False,
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Pixels of each kind at each threshold [T, 7], and, if asked for, the kind of each pixel [T, D, H, W]."""
    images = (torch.from_numpy(prediction), torch.from_numpy(truth))
    counts, drawn = unet_kernels.homotopic_warp(
        *images, thresholds, counted=torch.from_numpy(counted), radius=radius, kinds=kinds
    )
    return counts.sum(1).numpy(), np.empty(0, np.uint8) if drawn is None else drawn.numpy()
