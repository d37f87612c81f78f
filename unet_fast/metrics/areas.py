"""Overlap of the foregrounds of a prediction and a truth."""

from typing import Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike

from ._inputs import probabilities_and_truth

__all__ = ["dice", "iou"]


@overload
def iou(prediction: ArrayLike, truth: ArrayLike, *, parts: Literal[False] = False) -> float: ...
@overload
def iou(prediction: ArrayLike, truth: ArrayLike, *, parts: Literal[True]) -> dict[str, Any]: ...
def iou(prediction: ArrayLike, truth: ArrayLike, *, parts: bool = False) -> float | dict[str, Any]:
    """Intersection over union of the foregrounds prediction > 0.5 and truth > 0: TP / (TP + FP + FN).

    Jaccard's index of the whole stack, each pixel counted once. 1 is perfect, and is the value where both foregrounds
    are empty. `parts=True` gives a dict with `iou`, `tp`, `fp`, `fn`, `tn`.

    Raises:
        TypeError: prediction is neither boolean, integer nor float, or truth holds no whole numbers.
        ValueError: shapes differ, are no [H, W] or [D, H, W], or hold no pixel; a prediction is NaN or not in [0, 1].

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
        TypeError: prediction is neither boolean, integer nor float, or truth holds no whole numbers.
        ValueError: shapes differ, are no [H, W] or [D, H, W], or hold no pixel; a prediction is NaN or not in [0, 1].

    >>> dice([[0.9, 0.8, 0.5, 0.6]], [[1, 1, 1, 0]], parts=True)
    {'dice': 0.6666666666666666, 'tp': 2, 'fp': 1, 'fn': 1, 'tn': 0}
    """
    counts = _foreground_counts(prediction, truth)
    areas = 2 * counts["tp"] + counts["fp"] + counts["fn"]
    value = 2 * counts["tp"] / areas if areas else 1.0
    return {"dice": value, **counts} if parts else value


def _foreground_counts(prediction: ArrayLike, truth: ArrayLike) -> dict[str, int]:
    prediction, truth = probabilities_and_truth(prediction, truth)
    counts = np.zeros(4, np.int64)
    for p, t in zip(prediction, truth, strict=True):
        kept = t >= 0
        counts += np.bincount(2 * (p[kept] > 0.5) + (t[kept] > 0), minlength=4)
    tn, fn, fp, tp = counts.tolist()
    return {"tp": tp, "fp": fp, "fn": fn, "tn": tn}
