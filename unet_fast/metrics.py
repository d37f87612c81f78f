"""How good a segmentation is: of pixels, of objects, and of cells that touch.

    pixel_error       1 - max F1 over eleven thresholds     0 is perfect   ISBI 2012 (EM segmentation challenge)
    iou, dice         overlap of foregrounds                1 is perfect   Jaccard 1912; Dice 1945
    seg               mean Jaccard index of true objects    1 is perfect   Cell Tracking Challenge, SEG
    instance_scores   mean IoU, average precision, and what became of touching cells

Every function takes (prediction, truth), both [H, W] or both [D, H, W]; a stack is D slices (frames) that share counts
and no objects. truth > 0 (255 too) is cell, 0 background; the pixels of negative truth are ignored: in both images they
count as nothing at all. Polarity: a prediction is the probability of *cell*, in [0, 1]; where instances are compared
it holds ids, 0 = background. Values are counted in whole numbers and divided last. A ratio without a denominator is
None, so that what is returned can be written as JSON.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

__all__ = ["InstanceScores", "components", "dice", "instance_scores", "iou", "pixel_error", "seg"]

# IoU thresholds of the average precision, in twentieths: 0.5 to 0.9 by 0.05, compared without rounding
_TWENTIETHS = range(10, 19)


def _challenge_thresholds() -> list[float]:
    # t += 0.1 in double: the last is 0.9999999999999999, so a probability of 1 lies above all eleven
    thresholds, t = [], 0.0
    while t <= 1.0:
        thresholds.append(t)
        t += 0.1
    return thresholds


@overload
def pixel_error(prediction: ArrayLike, truth: ArrayLike, *, parts: Literal[False] = False) -> float: ...
@overload
def pixel_error(prediction: ArrayLike, truth: ArrayLike, *, parts: Literal[True]) -> dict[str, Any]: ...
def pixel_error(prediction: ArrayLike, truth: ArrayLike, *, parts: bool = False) -> float | dict[str, Any]:
    """Pixel error of the ISBI 2012 challenge: 1 - max over t of F1(t), F1 = 2 TP / (2 TP + FP + FN).

    Predicted cell: float32(prediction) > t for t = 0, 0.1 .. 1, added up in double. Cell is the positive class; TP, FP,
    FN are sums over the whole stack. F1 is 0 where TP is 0, so a truth without a cell has error 1 whatever is
    predicted. 0 is perfect.

    Args:
        prediction: probability of cell; a value outside [0, 1] is compared as it is.
        truth: > 0 is cell, negative is ignored.
        parts: return a dict instead: `error`; `threshold` (the lowest with the greatest F1) and `precision`, `recall`,
            `f_score` there; `thresholds`, a list of dicts with `threshold`, `tp`, `fp`, `fn` and the same three ratios.

    Raises:
        TypeError: an argument is neither boolean, integer nor float.
        ValueError: shapes differ, are no [H, W] or [D, H, W], or hold no pixel; or a value is NaN.

    >>> truth = [[1, 1, 1, 0]]
    >>> pixel_error([[0.9, 0.8, 0.3, 0.4]], truth)  # best at 0, 0.1, 0.2: TP 3, FP 1, FN 0
    0.1428571428571429
    >>> pixel_error([[0.9, 0.8, 0.3, 0.4]], truth, parts=True)["threshold"]
    0.0
    """
    prediction, truth = _images(prediction, truth)
    thresholds = _challenge_thresholds()
    # [thresholds that the pixel lies above, is it cell]
    counts = np.zeros((len(thresholds) + 1, 2), np.int64)
    for p, t in zip(prediction, truth, strict=True):
        with np.errstate(over="ignore"):
            p = p.astype(np.float32)
        kept = t >= 0
        above = np.searchsorted(thresholds, p[kept], side="left")
        counts += np.bincount(2 * above + (t[kept] > 0), minlength=counts.size).reshape(counts.shape)
    fp_at, tp_at = counts[::-1].cumsum(axis=0)[::-1].T.tolist()
    cells = tp_at[0]
    rows = [
        {"threshold": t, "tp": tp, "fp": fp, "fn": cells - tp}
        | {"precision": _ratio(tp, tp + fp), "recall": _ratio(tp, cells)}
        | {"f_score": 2 * tp / (tp + fp + cells) if tp else 0.0}
        for t, tp, fp in zip(thresholds, tp_at[1:], fp_at[1:], strict=True)
    ]
    best = max(rows, key=lambda row: row["f_score"])  # the first of equals
    error = 1.0 - best["f_score"]
    if not parts:
        return error
    chosen = {name: best[name] for name in ("threshold", "precision", "recall", "f_score")}
    return {"error": error, **chosen, "thresholds": rows}


@overload
def iou(prediction: ArrayLike, truth: ArrayLike, *, parts: Literal[False] = False) -> float: ...
@overload
def iou(prediction: ArrayLike, truth: ArrayLike, *, parts: Literal[True]) -> dict[str, Any]: ...
def iou(prediction: ArrayLike, truth: ArrayLike, *, parts: bool = False) -> float | dict[str, Any]:
    """Intersection over union of the foregrounds prediction > 0.5 and truth > 0: TP / (TP + FP + FN).

    Jaccard's index of the whole stack, each pixel counted once. 1 is perfect, and is the value where both foregrounds
    are empty. `parts=True` gives a dict with `iou`, `tp`, `fp`, `fn`, `tn`.

    Raises:
        TypeError: an argument is neither boolean, integer nor float.
        ValueError: shapes differ, are no [H, W] or [D, H, W], or hold no pixel; or a value is NaN.

    >>> iou([[0.9, 0.8, 0.5, 0.6]], [[1, 1, 1, 0]])  # 0.5 is not above 0.5
    0.5
    """
    counts = _foreground_counts(prediction, truth)
    covered = counts["tp"] + counts["fp"] + counts["fn"]
    value = counts["tp"] / covered if covered else 1.0
    return {"iou": value, **counts} if parts else value


@overload
def dice(prediction: ArrayLike, truth: ArrayLike, *, parts: Literal[False] = False) -> float: ...
@overload
def dice(prediction: ArrayLike, truth: ArrayLike, *, parts: Literal[True]) -> dict[str, Any]: ...
def dice(prediction: ArrayLike, truth: ArrayLike, *, parts: bool = False) -> float | dict[str, Any]:
    """Dice's coefficient of the foregrounds prediction > 0.5 and truth > 0: 2 TP / (2 TP + FP + FN).

    Of the whole stack, each pixel counted once; equals 2 iou / (1 + iou). 1 is perfect, and is the value where both
    foregrounds are empty. `parts=True` gives a dict with `dice`, `tp`, `fp`, `fn`, `tn`.

    Raises:
        TypeError: an argument is neither boolean, integer nor float.
        ValueError: shapes differ, are no [H, W] or [D, H, W], or hold no pixel; or a value is NaN.

    >>> dice([[0.9, 0.8, 0.5, 0.6]], [[1, 1, 1, 0]], parts=True)
    {'dice': 0.6666666666666666, 'tp': 2, 'fp': 1, 'fn': 1, 'tn': 0}
    """
    counts = _foreground_counts(prediction, truth)
    areas = 2 * counts["tp"] + counts["fp"] + counts["fn"]
    value = 2 * counts["tp"] / areas if areas else 1.0
    return {"dice": value, **counts} if parts else value


@overload
def seg(prediction: ArrayLike, truth: ArrayLike, *, parts: Literal[False] = False) -> float | None: ...
@overload
def seg(prediction: ArrayLike, truth: ArrayLike, *, parts: Literal[True]) -> dict[str, Any]: ...
def seg(prediction: ArrayLike, truth: ArrayLike, *, parts: bool = False) -> float | dict[str, Any] | None:
    """SEG of the Cell Tracking Challenge: the mean over true objects R of J(R), pooled over all frames.

    J(R) = |R n S| / |R u S| for the predicted object S with |R n S| > |R| / 2 (there is at most one), else 0. What is
    predicted where there is no true object costs nothing. 1 is perfect; None where no frame has a true object.

    Args:
        prediction: object ids, 0 = background.
        truth: object ids, 0 = background, negative is ignored; in a stack an id is another object in every frame.
        parts: return a dict instead: `seg`; the numbers `objects` and `matched`; and lists with an entry per true
            object, in the order of frames and ids: `frame`, `id`, `jaccard`.

    Raises:
        TypeError: an argument holds no integers.
        ValueError: shapes differ, are no [H, W] or [D, H, W], or hold no pixel; or a predicted id is negative.

    >>> seg([[7, 7, 7, 0, 9]], [[1, 1, 0, 2, 2]])  # 2 of 3 pixels; 1 of 2 is not more than half
    0.3333333333333333
    """
    prediction, truth = _instance_maps(prediction, truth)
    frames: list[int] = []
    ids: list[int] = []
    jaccard: list[float] = []
    matched = 0
    for frame, (p, t) in enumerate(zip(prediction, truth, strict=True)):
        o = _overlap(p, t)
        good = 2 * o.shared > o.true_area[o.true]
        values = np.zeros(len(o.true_ids))
        values[o.true[good]] = o.shared[good] / o.union[good]
        frames += [frame] * len(values)
        ids += o.true_ids.tolist()
        jaccard += values.tolist()
        matched += int(good.sum())
    value = _ratio(math.fsum(jaccard), len(jaccard))
    if not parts:
        return value
    numbers = {"seg": value, "objects": len(jaccard), "matched": matched}
    return {**numbers, "frame": frames, "id": ids, "jaccard": jaccard}


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
    given = _array("mask", mask)
    if given.dtype.kind not in "biu":
        raise TypeError(f"mask must be boolean or integer, got {given.dtype}; compare with a threshold first")
    structure = ndimage.generate_binary_structure(2, 1 if connectivity == 4 else 2)
    instances = np.zeros(given.shape, np.int32)
    for here, out in zip(_stack(given), _stack(instances), strict=True):
        ndimage.label(here > 0, structure, output=out)
        out[here < 0] = -1
    return instances


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
        return _ratio(self.iou_sum, self.true_cells)

    @property
    def average_precision(self) -> dict[str, float | None]:
        """TP / (TP + FP + FN) at each IoU threshold, "0.50" to "0.90"; None without any cell. 1 is perfect."""
        cells = self.true_cells + self.predicted_cells
        return {f"{n / 20:.2f}": _ratio(tp, cells - tp) for n, tp in zip(_TWENTIETHS, self.matched, strict=True)}

    @property
    def mean_average_precision(self) -> float | None:
        """Mean of `average_precision` over the nine thresholds; None without any cell. 1 is perfect."""
        values = [value for value in self.average_precision.values() if value is not None]
        return _ratio(math.fsum(values), len(values))

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
    prediction, truth = _instance_maps(prediction, truth)
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
    if (prediction < 0).any():
        raise ValueError(f"prediction must hold ids of 0 (background) or more, got {prediction.min()}")
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


def _foreground_counts(prediction: ArrayLike, truth: ArrayLike) -> dict[str, int]:
    prediction, truth = _images(prediction, truth)
    counts = np.zeros(4, np.int64)
    for p, t in zip(prediction, truth, strict=True):
        kept = t >= 0
        counts += np.bincount(2 * (p[kept] > 0.5) + (t[kept] > 0), minlength=4)
    tn, fn, fp, tp = counts.tolist()
    return {"tp": tp, "fp": fp, "fn": fn, "tn": tn}


def _images(prediction: ArrayLike, truth: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    """Both as stacks, of numbers that can be compared."""
    p, t = _same_shape(prediction, truth)
    for name, values in (("prediction", p), ("truth", t)):
        if values.dtype.kind not in "biuf":
            raise TypeError(f"{name} must be boolean, integer or float, got {values.dtype}")
        if values.dtype.kind == "f" and np.isnan(values).any():
            raise ValueError(f"{name} must not be NaN, got {np.isnan(values).sum()} of {values.size} pixels that are")
    return p, t


def _instance_maps(prediction: ArrayLike, truth: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    """Both as stacks, of ids."""
    p, t = _same_shape(prediction, truth)
    for name, ids in (("prediction", p), ("truth", t)):
        # a mask would be one cell, which is never what is meant
        if ids.dtype.kind not in "iu":
            raise TypeError(f"{name} must hold integer ids, got {ids.dtype}; components(mask) makes them of a mask")
    return p, t


def _same_shape(prediction: ArrayLike, truth: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    p, t = _array("prediction", prediction), _array("truth", truth)
    if p.shape != t.shape:
        raise ValueError(f"prediction and truth must have one shape, got {p.shape} and {t.shape}")
    return _stack(p), _stack(t)


def _array(name: str, given: ArrayLike) -> NDArray[Any]:
    values = np.asarray(given)
    if values.ndim not in (2, 3) or values.size == 0:
        raise ValueError(f"{name} must be [H, W] or [D, H, W] with at least one pixel, got shape {values.shape}")
    return values


def _stack(values: NDArray[Any]) -> NDArray[Any]:
    return values if values.ndim == 3 else values[None]


def _ratio(numerator: float, denominator: int) -> float | None:
    return numerator / denominator if denominator else None
