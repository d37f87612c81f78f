"""Cells against cells: SEG, average precision, merged and split cells, and the components that cells are made of."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

import unet_kernels

from ._inputs import array, expect_cells, expect_ids, instance_maps, ratio, stack

__all__ = ["InstanceScores", "adapted_rand_error", "components", "instance_scores", "seg"]

# IoU thresholds of the average precision, in twentieths: 0.5 to 0.9 by 0.05, compared without rounding
_TWENTIETHS = range(10, 19)


@overload
def seg(prediction: ArrayLike, truth: ArrayLike, *, parts: Literal[False] = False) -> float: ...
@overload
def seg(prediction: ArrayLike, truth: ArrayLike, *, parts: Literal[True]) -> dict[str, Any]: ...
def seg(prediction: ArrayLike, truth: ArrayLike, *, parts: bool = False) -> float | dict[str, Any]:
    """SEG of the Cell Tracking Challenge: the mean over true objects R of J(R), pooled over all frames.

    J(R) = |R n S| / |R u S| for the predicted object S with |R n S| > |R| / 2 (there is at most one), else 0. What is
    predicted where there is no true object costs nothing, so truth may be annotated in part, and frames without any
    annotation may be left in. 1 is perfect. Source: Maska et al., Bioinformatics 30:1609, 2014.

    Args:
        prediction: object ids, 0 = background.
        truth: object ids, 0 = background, negative is ignored; in a stack an id is another object in every frame.
        parts: return a dict instead: `seg`; the numbers `objects` (true), `matched` and `missed` of them, `predicted`,
            and `unmatched` of these, which are false only in a frame that is annotated completely; and lists with an
            entry per true object, in the order of frames and ids: `frame`, `id`, `jaccard`.

    Raises:
        TypeError: an argument holds no integers.
        ValueError: shapes differ, are no [H, W] or [D, H, W], or hold no pixel; a predicted id is negative; truth has
            no object.

    >>> seg([[7, 7, 7, 0, 9]], [[1, 1, 0, 2, 2]])  # 2 of 3 pixels; 1 of 2 is not more than half
    0.3333333333333333
    """
    prediction, truth = instance_maps(prediction, truth)
    expect_cells(truth)
    frames: list[int] = []
    ids: list[int] = []
    jaccard: list[float] = []
    matched = predicted = hit = 0
    for frame, (p, t) in enumerate(zip(prediction, truth, strict=True)):
        o = _overlap(p, t)
        good = 2 * o.shared > o.true_area[o.true]
        values = np.zeros(len(o.true_ids))
        values[o.true[good]] = o.shared[good] / o.union[good]
        frames += [frame] * len(values)
        ids += o.true_ids.tolist()
        jaccard += values.tolist()
        matched += int(good.sum())
        predicted += len(o.predicted_area)
        hit += len(np.unique(o.predicted[good]))
    value = math.fsum(jaccard) / len(jaccard)
    if not parts:
        return value
    numbers = {"objects": len(jaccard), "matched": matched, "missed": len(jaccard) - matched}
    numbers |= {"predicted": predicted, "unmatched": predicted - hit}
    return {"seg": value, **numbers, "frame": frames, "id": ids, "jaccard": jaccard}


@overload
def adapted_rand_error(prediction: ArrayLike, truth: ArrayLike, *, parts: Literal[False] = False) -> float: ...
@overload
def adapted_rand_error(prediction: ArrayLike, truth: ArrayLike, *, parts: Literal[True]) -> dict[str, Any]: ...
def adapted_rand_error(prediction: ArrayLike, truth: ArrayLike, *, parts: bool = False) -> float | dict[str, Any]:
    """Adapted Rand error as `skimage.metrics.adapted_rand_error` has it: 1 - F over pairs of pixels of true cells.

    With n_ij the true cells' pixels in cell i and predicted segment j, t_i and s_j their sums, n' = n (n - 1):

        precision = sum n_ij' / sum s_j',   recall = sum n_ij' / sum t_i',   F = 2 sum n_ij' / (sum t_i' + sum s_j').

    Of a stack, the mean over its slices with a cell. 0 is perfect. Not the challenge's number (`rand_error`): what is
    predicted as background is one ordinary segment here, so a border that is drawn too wide costs far more. What we
    call precision scikit-image calls recall, and the reverse.

    Args:
        prediction: segment ids.
        truth: cell ids, 0 = background, negative is ignored; in a stack an id is another cell in every slice.
        parts: return a dict instead: `error`, `precision` (falls with mergers), `recall` (falls with splits).

    Raises:
        TypeError: an argument holds no integers.
        ValueError: shapes differ, are no [H, W] or [D, H, W], or hold no pixel; a predicted id is negative; truth has
            no cell.

    >>> adapted_rand_error([[1, 1, 1, 1]], [[1, 1, 2, 2]])  # n_ij' 2 and 2; t' 2 and 2; s' 12
    0.5
    """
    prediction, truth = instance_maps(prediction, truth)
    expect_cells(truth)
    expect_ids(prediction[truth >= 0])
    slices = [_adapted_rand(p[t > 0], t[t > 0]) for p, t in zip(prediction, truth, strict=True) if (t > 0).any()]
    error, precision, recall = (math.fsum(values) / len(slices) for values in zip(*slices, strict=True))
    return {"error": error, "precision": precision, "recall": recall} if parts else error


def _adapted_rand(prediction: NDArray[Any], truth: NDArray[Any]) -> tuple[float, float, float]:
    """Of the pixels of true cells of one slice; without a pair, none is wrong."""
    cells, segments = (np.unique(ids, return_inverse=True)[1] for ids in (truth, prediction))
    of_truth, of_segments = _pairs(np.bincount(cells)), _pairs(np.bincount(segments))
    of_both = _pairs(np.unique(cells * cells.size + segments, return_counts=True)[1])
    f_score = 2 * of_both / (of_truth + of_segments) if of_truth + of_segments else 1.0
    return 1.0 - f_score, of_both / of_segments if of_segments else 1.0, of_both / of_truth if of_truth else 1.0


def _pairs(counts: NDArray[np.int64]) -> int:
    return int((counts * (counts - 1)).sum())


def components(mask: ArrayLike, connectivity: int = 4) -> NDArray[np.int32]:
    """Connected components of mask > 0 as instances: ids 1, 2 .. in each slice, int32, 0 = background.

    A [D, H, W] stack is labelled slice by slice, and ids begin at 1 again in each. Negative (ignored) pixels belong to
    no component and come out as -1.

    Args:
        mask: boolean or integer, [H, W] or [D, H, W].
        connectivity: 4 (pixels that share an edge; the challenges' rule for cells) or 8 (corners too).

    Raises:
        TypeError: mask is neither boolean nor integer.
        ValueError: mask is no [H, W] or [D, H, W] or holds no pixel, or connectivity is neither 4 nor 8.

    >>> components([[1, 0], [0, 1]]).tolist(), components([[1, 0], [0, 1]], connectivity=8).tolist()
    ([[1, 0], [0, 2]], [[1, 0], [0, 1]])
    """
    if connectivity not in (4, 8):
        raise ValueError(f"connectivity must be 4 or 8, got {connectivity!r}")
    given = array("mask", mask)
    if given.dtype.kind not in "biu":
        raise TypeError(f"mask must be boolean or integer, got {given.dtype}; compare with a threshold first")
    # -1, 0, 1: torch compares no unsigned integers wider than a byte
    signs = (stack(given) > 0).astype(np.int8) - (stack(given) < 0).astype(np.int8)
    return (
        unet_kernels.connected_components(torch.from_numpy(signs), connectivity=connectivity)
        .numpy()
        .reshape(given.shape)
    )


@dataclass(frozen=True)
class InstanceScores:
    """What `instance_scores` counted: sums as fields, so that `a + b` pools images, and ratios as properties.

    `InstanceScores()` has counted nothing: `sum(scores, InstanceScores())` pools any number of images. A ratio without
    a denominator is None.

    Attributes:
        true_cells: number of true cells.
        predicted_cells: number of predicted cells.
        iou_sum: sum over true cells of the greatest IoU with a predicted cell of the same slice, 0 if there is none.
        matched: true positives at IoU >= 0.5, 0.55 .. 0.9.
        touching_pairs: pairs of true cells with 8-neighbour pixels of one another.
        merged_pairs: touching pairs whose two cells each lie by more than half of their own area in one and the same
            predicted cell.
        split_cells: true cells R with two or more pieces, a piece being a predicted cell S with |R n S| > |S| / 2 and
            |R n S| >= |R| / 10.
    """

    true_cells: int = 0
    predicted_cells: int = 0
    iou_sum: float = 0.0
    matched: tuple[int, ...] = (0,) * len(_TWENTIETHS)
    touching_pairs: int = 0
    merged_pairs: int = 0
    split_cells: int = 0

    def __add__(self, other: "InstanceScores") -> "InstanceScores":
        if not isinstance(other, InstanceScores):
            return NotImplemented
        return InstanceScores(
            true_cells=self.true_cells + other.true_cells,
            predicted_cells=self.predicted_cells + other.predicted_cells,
            iou_sum=self.iou_sum + other.iou_sum,
            matched=tuple(a + b for a, b in zip(self.matched, other.matched, strict=True)),
            touching_pairs=self.touching_pairs + other.touching_pairs,
            merged_pairs=self.merged_pairs + other.merged_pairs,
            split_cells=self.split_cells + other.split_cells,
        )

    @property
    def mean_iou(self) -> float | None:
        """Mean over true cells of the greatest IoU with a predicted cell; None without a true cell. 1 is perfect."""
        return ratio(self.iou_sum, self.true_cells)

    @property
    def average_precision(self) -> dict[str, float | None]:
        """TP / (TP + FP + FN) at each IoU threshold, "0.50" to "0.90"; None without any cell. 1 is perfect."""
        cells = self.true_cells + self.predicted_cells
        return {f"{n / 20:.2f}": ratio(tp, cells - tp) for n, tp in zip(_TWENTIETHS, self.matched, strict=True)}

    @property
    def mean_average_precision(self) -> float | None:
        """Mean of `average_precision` over the nine thresholds; None without any cell. 1 is perfect."""
        values = [value for value in self.average_precision.values() if value is not None]
        return ratio(math.fsum(values), len(values))

    def as_dict(self) -> dict[str, Any]:
        """Every sum and every ratio, ready for JSON."""
        return {
            **asdict(self),
            "matched": list(self.matched),
            "mean_iou": self.mean_iou,
            "average_precision": self.average_precision,
            "mean_average_precision": self.mean_average_precision,
        }


def instance_scores(prediction: ArrayLike, truth: ArrayLike) -> InstanceScores:
    """Compare two instance maps cell by cell, slice by slice; see `InstanceScores` for what is counted.

    mean_iou is the mean over true cells R of max_S |R n S| / |R u S|. Average precision at t is TP / (TP + FP + FN)
    with TP the size of a maximum one-to-one matching of the pairs with IoU >= t (2018 Data Science Bowl, with >=). A
    cell is an id, connected or not. Ignored pixels are taken out of both maps first: areas, contacts and the numbers
    of cells are those of what remains. `components` makes instances of a mask.

    Args:
        prediction: cell ids, 0 = background.
        truth: cell ids, 0 = background, negative is ignored; in a stack an id is another cell in every slice.

    Raises:
        TypeError: an argument holds no integers.
        ValueError: shapes differ, are no [H, W] or [D, H, W], or hold no pixel; or a predicted id is negative.

    >>> merged = instance_scores([[5, 5, 5, 5, 0, 6]], [[1, 1, 2, 2, 0, 3]])  # two touching cells became one
    >>> merged.mean_iou, merged.average_precision["0.50"], merged.average_precision["0.55"]
    (0.6666666666666666, 0.6666666666666666, 0.25)
    >>> merged.touching_pairs, merged.merged_pairs, merged.split_cells
    (1, 1, 0)
    """
    prediction, truth = instance_maps(prediction, truth)
    return sum((_slice_scores(p, t) for p, t in zip(prediction, truth, strict=True)), InstanceScores())


def _slice_scores(prediction: NDArray[Any], truth: NDArray[Any]) -> InstanceScores:
    o = _overlap(prediction, truth)
    n_true = len(o.true_area)
    best = np.zeros(n_true)
    np.maximum.at(best, o.true, o.shared / o.union)

    matched = []
    for twentieths in _TWENTIETHS:
        good = 20 * o.shared >= twentieths * o.union
        # Pairs above 1/2 are disjoint. At exactly 1/2 two pairs share a cell only if that cell is cut into two halves
        # that are cells, so pairs form stars, of which a maximum matching takes one pair each: in a forest there are
        # vertices - edges of them.
        vertices = np.unique(o.true[good]).size + np.unique(o.predicted[good]).size
        matched.append(int(vertices - good.sum()))

    first, second = _touching(o.true_map, n_true)
    most = 2 * o.shared > o.true_area[o.true]
    home = np.full(n_true, -1)
    home[o.true[most]] = o.predicted[most]
    merged = (home[first] >= 0) & (home[first] == home[second])

    piece = (2 * o.shared > o.predicted_area[o.predicted]) & (10 * o.shared >= o.true_area[o.true])
    pieces = np.bincount(o.true[piece], minlength=n_true)
    return InstanceScores(
        true_cells=n_true,
        predicted_cells=len(o.predicted_area),
        iou_sum=math.fsum(best.tolist()),  # exact, so the order of ids is no matter
        matched=tuple(matched),
        touching_pairs=len(first),
        merged_pairs=int(merged.sum()),
        split_cells=int((pieces > 1).sum()),
    )


class _Overlap(NamedTuple):
    """The cells of a slice, numbered from 0, and every (true, predicted) pair that shares a pixel."""

    true_ids: NDArray[Any]
    true_map: NDArray[np.int64]  # number + 1 of the true cell, 0 = background
    true_area: NDArray[np.int64]
    predicted_area: NDArray[np.int64]
    true: NDArray[np.int64]
    predicted: NDArray[np.int64]
    shared: NDArray[np.int64]
    union: NDArray[np.int64]


def _overlap(prediction: NDArray[Any], truth: NDArray[Any]) -> _Overlap:
    ignored = truth < 0
    if ignored.any():
        # background in both: a pixel that belongs to no cell is counted nowhere
        prediction, truth = np.where(ignored, 0, prediction), np.where(ignored, 0, truth)
    expect_ids(prediction)
    true_ids, true_map = _numbered(truth)
    predicted_ids, predicted_map = _numbered(prediction)
    width = len(predicted_ids) + 1
    codes, shared = np.unique(true_map * width + predicted_map, return_counts=True)
    true, predicted = codes // width - 1, codes % width - 1
    both = (true >= 0) & (predicted >= 0)
    true, predicted, shared = true[both], predicted[both], shared[both]
    true_area = np.bincount(true_map.ravel(), minlength=1)[1:]
    predicted_area = np.bincount(predicted_map.ravel(), minlength=1)[1:]
    union = true_area[true] + predicted_area[predicted] - shared
    return _Overlap(true_ids, true_map, true_area, predicted_area, true, predicted, shared, union)


def _numbered(ids: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The distinct ids above 0 in order, and the map of their numbers, from 1."""
    distinct, numbers = np.unique(ids, return_inverse=True)
    cells = distinct[distinct > 0]
    return cells, numbers.reshape(ids.shape) + (cells.size - distinct.size + 1)


def _touching(cells: NDArray[np.int64], count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Every pair of cells with 8-neighbour pixels of one another, once, by numbers from 0."""
    codes = []
    for a, b in (
        (cells[:, :-1], cells[:, 1:]),
        (cells[:-1], cells[1:]),
        (cells[:-1, :-1], cells[1:, 1:]),
        (cells[:-1, 1:], cells[1:, :-1]),
    ):
        edge = (a != b) & (a > 0) & (b > 0)
        low, high = np.minimum(a[edge], b[edge]), np.maximum(a[edge], b[edge])
        codes.append((low - 1) * count + (high - 1))
    pairs = np.unique(np.concatenate(codes))
    return pairs // max(count, 1), pairs % max(count, 1)
