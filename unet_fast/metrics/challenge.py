"""The scores of the ISBI 2012 EM segmentation challenge, as its leaderboard computed them.

They are not the textbook ones of the same names: the "warping error" counts only splits and mergers, the "Rand error"
is restricted to true cells, the "pixel error" is one less an F-score, and each takes the threshold that is best for
the prediction. Cell is 4-connected, background (membrane) 8-connected. Definitions: docs/mathematics.md, section 7;
sources: Jain et al., CVPR 2010; Arganda-Carreras et al., Frontiers in Neuroanatomy 9:142, 2015.
"""

import math
from numbers import Real
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

import unet_kernels

from ._inputs import array, expect_cells, probabilities_and_truth, stack
from .counts import ChallengeCounts, segments_named, warped

__all__ = [
    "error_places",
    "pixel_error",
    "rand_error",
    "v_info",
    "v_rand",
    "warping_error",
    "warping_map",
]

_KINDS = unet_kernels.ERROR_KINDS


def _given(prediction: ArrayLike, truth: ArrayLike) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    p, t = probabilities_and_truth(prediction, truth)
    expect_cells(t)
    return p.astype(np.float32), t


def _counted(labels: NDArray[np.int8], truth: ArrayLike, mask: ArrayLike | None) -> NDArray[np.bool_]:
    if mask is None:
        return labels >= 0
    allowed = array("mask", mask)
    if allowed.dtype.kind not in "biu":
        raise TypeError(f"mask must be boolean or integer, got {allowed.dtype}; compare with a threshold first")
    if allowed.shape != np.shape(truth):
        raise ValueError(f"mask must have the shape of truth, {np.shape(truth)}, got {allowed.shape}")
    return (labels >= 0) & (stack(allowed) > 0)


@overload
def warping_error(
    prediction: ArrayLike,
    truth: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    radius: int = 20,
    parts: Literal[False] = False,
) -> float: ...
@overload
def warping_error(
    prediction: ArrayLike, truth: ArrayLike, *, mask: ArrayLike | None = None, radius: int = 20, parts: Literal[True]
) -> dict[str, Any]: ...
def warping_error(
    prediction: ArrayLike,
    truth: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    radius: int = 20,
    parts: bool = False,
) -> float | dict[str, Any]:
    """Warping error of the ISBI 2012 challenge: min over t of (split + merge pixels at t) / pixels.

    In each slice, and for t = 0, 0.1 .. 0.9, the truth is warped towards float32(prediction) > t by flips of simple
    points, which change no topology: the strongest disagreement |prediction - t| first, in passes, until none is left
    to flip. What still differs is an error, and is classified by the components that meet there; only splits (a cell is
    parted) and mergers (cells are joined) count, each pixel of them. 0 is perfect; the published results are
    about 0.0004. A cell that is cut through counts as few pixels, because the truth recedes along the cut from its
    ends; a gap that is closed counts with every pixel. Cells that are missed or made up cost nothing: a prediction
    that is all background at one of the thresholds has error 0, so look at `rand_error` too.

    Args:
        prediction: probability of cell, in [0, 1].
        truth: > 0 is cell, negative is ignored: not flipped, not an error, not in the number of pixels.
        mask: boolean or integer; only where it is above 0 may pixels be flipped or be errors. The number of pixels is
            that of the whole image all the same. Jain's own measure takes the pixels within 5 of a border,
            `scipy.ndimage.distance_transform_edt(slice > 0) <= 5` in each slice; the challenge takes all.
        radius: a cell pixel is a split if, within this many rows and columns, the cell falls apart without it.
        parts: return a dict instead: `error`; `threshold`, the lowest of the best; at that threshold `split` and
            `merge` (pixels), `split_places` and `merge_places` (the connected groups of such pixels: how often a
            reader would say that it happens), `errors`: for each kind of error a list of [slice, row, column]; and
            `pixels`, their number; `thresholds`: a list of dicts with `threshold`, the pixels of each kind (`split`,
            `merge`, `hole_addition`, `hole_deletion`, `object_addition`, `object_deletion`), `error`, and
            `plain_error`, which counts all six.

    Raises:
        TypeError: prediction is neither boolean, integer nor float; truth or mask holds no whole numbers.
        ValueError: shapes differ, are no [H, W] or [D, H, W], or hold no pixel; a prediction is NaN or not in [0, 1];
            truth has no cell; radius is below 1.

    >>> truth = [[1, 1, 0, 1, 1]] * 3
    >>> warping_error([[1, 1, 1, 1, 1]] * 3, truth)  # the gap is closed: three pixels of fifteen join two cells
    0.2
    >>> warping_error([[1, 0, 0, 1, 1]] * 3, truth)  # the gap is wider, but it is there
    0.0
    >>> parts = warping_error([[1, 1, 1, 1, 1]] * 3, truth, parts=True)
    >>> parts["merge"], parts["merge_places"], parts["errors"]["merge"]
    (3, 1, [[0, 0, 2], [0, 1, 2], [0, 2, 2]])
    """
    given = _given(prediction, truth)
    counted = _counted(given[1], truth, mask)
    counts = ChallengeCounts.of(*given, ["warping"], counted=counted, radius=radius)
    scores = counts.warping_error()
    if not parts:
        return scores["error"]
    kinds = warped(*given, [scores["threshold"]], counted, radius, kinds=True)[1][0]
    errors = {kind: np.argwhere(kinds == i).tolist() for i, kind in enumerate(_KINDS) if i}
    places = {f"{kind}_places": count for kind, count in error_places(kinds).items()}
    return {**scores, **places, "errors": errors, "pixels": counts.pixels}


def warping_map(
    prediction: ArrayLike, truth: ArrayLike, threshold: float, *, mask: ArrayLike | None = None, radius: int = 20
) -> NDArray[np.uint8]:
    """What `warping_error` finds wrong where, at one threshold: uint8 of the shape of truth.

    0 nothing, 1 split, 2 merge, 3 hole addition, 4 hole deletion, 5 object addition, 6 object deletion: indices into
    `unet_kernels.ERROR_KINDS`. A truth without a cell is no error here. Arguments and errors else as for
    `warping_error`.

    >>> warping_map([[1, 1, 1, 1, 1]] * 3, [[1, 1, 0, 1, 1]] * 3, 0.5).tolist()[0]
    [0, 0, 2, 0, 0]
    """
    p, t = probabilities_and_truth(prediction, truth)
    if not isinstance(threshold, Real) or math.isnan(threshold):
        raise ValueError(f"threshold must be a number, got {threshold!r}")
    kinds = warped(p.astype(np.float32), t, [float(threshold)], _counted(t, truth, mask), radius, kinds=True)[1]
    return kinds[0].reshape(np.shape(truth))


def error_places(kinds: NDArray[np.uint8]) -> dict[str, int]:
    """How often cells are split and merged in a `warping_map`: connected groups of such pixels, slice by slice."""
    kinds = stack(array("kinds", kinds))
    count = {}
    # splits are pixels of cells, 4-connected; mergers of background, 8-connected; slices are apart
    for kind, reach in (("split", 1), ("merge", 2)):
        structure = np.zeros((3, 3, 3), bool)
        structure[1] = ndimage.generate_binary_structure(2, reach)
        count[kind] = int(ndimage.label(kinds == _KINDS.index(kind), structure)[1])
    return count


@overload
def rand_error(prediction: ArrayLike, truth: ArrayLike, *, parts: Literal[False] = False) -> float: ...
@overload
def rand_error(prediction: ArrayLike, truth: ArrayLike, *, parts: Literal[True]) -> dict[str, Any]: ...
def rand_error(prediction: ArrayLike, truth: ArrayLike, *, parts: bool = False) -> float | dict[str, Any]:
    """Foreground-restricted Rand error of the ISBI 2012 challenge: 1 - max over t of F(t), t = 0, 0.1 .. 1.

    Cells and segments are the 4-connected components of truth > 0 and of float32(prediction) > t in each slice. Over
    the pixels of true cells, n_ij of them in cell i and segment j, and each pixel that lies in no segment a segment by
    itself:

        precision = sum n_ij^2 / sum s_j^2 (falls with mergers),   recall = sum n_ij^2 / sum t_i^2 (falls with splits),
        F = 2 sum n_ij^2 / (sum t_i^2 + sum s_j^2),   with t_i = sum_j n_ij, s_j = sum_i n_ij, all summed over slices.

    0 is perfect.

    Args:
        prediction: probability of cell, in [0, 1].
        truth: > 0 is cell, negative is ignored (and no cell of the prediction).
        parts: return a dict instead: `error`; `threshold` (the lowest with the greatest F) and `precision`, `recall`,
            `f_score` there; `thresholds`, a list of dicts with `threshold` and the same three.

    Raises:
        TypeError: prediction is neither boolean, integer nor float; truth holds no whole numbers.
        ValueError: shapes differ, are no [H, W] or [D, H, W], or hold no pixel; a prediction is NaN or not in [0, 1];
            truth has no cell.

    >>> rand_error([[0.9, 0.9, 0.9, 0.9, 0.9]], [[1, 1, 0, 1, 1]])  # n_ij 2 and 2; t 2 and 2; s 4: 1 - 2 8 / (8 + 16)
    0.33333333333333337
    >>> rand_error([[0.9, 0.9, 0.2, 0.9, 0.9]], [[1, 1, 0, 1, 1]])
    0.0
    """
    scores = ChallengeCounts.of(*_given(prediction, truth), ["segments"]).rand_error()
    return scores if parts else scores["error"]


@overload
def pixel_error(prediction: ArrayLike, truth: ArrayLike, *, parts: Literal[False] = False) -> float: ...
@overload
def pixel_error(prediction: ArrayLike, truth: ArrayLike, *, parts: Literal[True]) -> dict[str, Any]: ...
def pixel_error(prediction: ArrayLike, truth: ArrayLike, *, parts: bool = False) -> float | dict[str, Any]:
    """Pixel error of the ISBI 2012 challenge: 1 - max over t of F1(t), F1 = 2 TP / (2 TP + FP + FN).

    Predicted cell: float32(prediction) > t for t = 0, 0.1 .. 1, added up in double. Cell is the positive class; TP, FP,
    FN are sums over the whole stack. F1 is 0 where TP is 0. 0 is perfect.

    Args:
        prediction: probability of cell, in [0, 1].
        truth: > 0 is cell, negative is ignored.
        parts: return a dict instead: `error`; `threshold` (the lowest with the greatest F1) and `precision`, `recall`,
            `f_score` there; `thresholds`, a list of dicts with `threshold`, `tp`, `fp`, `fn` and the same three ratios.

    Raises:
        TypeError: prediction is neither boolean, integer nor float; truth holds no whole numbers.
        ValueError: shapes differ, are no [H, W] or [D, H, W], or hold no pixel; a prediction is NaN or not in [0, 1];
            truth has no cell.

    >>> truth = [[1, 1, 1, 0]]
    >>> pixel_error([[0.9, 0.8, 0.3, 0.4]], truth)  # best at 0, 0.1, 0.2: TP 3, FP 1, FN 0
    0.1428571428571429
    >>> pixel_error([[0.9, 0.8, 0.3, 0.4]], truth, parts=True)["threshold"]
    0.0
    """
    scores = ChallengeCounts.of(*_given(prediction, truth), ["areas"]).pixel_error()
    return scores if parts else scores["error"]


@overload
def v_rand(
    prediction: ArrayLike, truth: ArrayLike, *, thinned: bool = True, parts: Literal[False] = False
) -> float: ...
@overload
def v_rand(
    prediction: ArrayLike, truth: ArrayLike, *, thinned: bool = True, parts: Literal[True]
) -> dict[str, Any]: ...
def v_rand(
    prediction: ArrayLike, truth: ArrayLike, *, thinned: bool = True, parts: bool = False
) -> float | dict[str, Any]:
    """V_Rand of the ISBI 2012 challenge: max over t of the mean over slices of the Rand F-score, borders thinned.

    F, precision and recall of a slice as in `rand_error`, but segments are grown from the components of
    float32(prediction) > t by a watershed until borders are one pixel wide, so that the width of a border does not
    count. Slices without a true cell are left out of the mean. 1 is perfect.

    Args:
        prediction: probability of cell, in [0, 1].
        truth: > 0 is cell, negative is ignored (and no cell of the prediction, though a watershed may flood it).
        thinned: False takes the components themselves as segments.
        parts: return a dict instead: `v_rand`; `threshold` (the lowest with the greatest F) and `precision` (falls with
            mergers), `recall` (falls with splits), `f_score` there; `thresholds`, a list of dicts with the same.

    Raises:
        TypeError: prediction is neither boolean, integer nor float; truth holds no whole numbers.
        ValueError: shapes differ, are no [H, W] or [D, H, W], or hold no pixel; a prediction is NaN or not in [0, 1];
            truth has no cell.

    >>> v_rand([[0.9, 0.9, 0.9, 0.9, 0.9]], [[1, 1, 0, 1, 1]])
    0.6666666666666666
    >>> v_rand([[0.9, 0.0, 0.0, 0.0, 0.9]], [[1, 1, 0, 1, 1]])  # a wide border is as good as a narrow one
    1.0
    """
    scores = ChallengeCounts.of(*_given(prediction, truth), [segments_named(thinned)]).v_rand(thinned=thinned)
    return scores if parts else scores["v_rand"]


@overload
def v_info(
    prediction: ArrayLike, truth: ArrayLike, *, thinned: bool = True, parts: Literal[False] = False
) -> float: ...
@overload
def v_info(
    prediction: ArrayLike, truth: ArrayLike, *, thinned: bool = True, parts: Literal[True]
) -> dict[str, Any]: ...
def v_info(
    prediction: ArrayLike, truth: ArrayLike, *, thinned: bool = True, parts: bool = False
) -> float | dict[str, Any]:
    """V_Info of the ISBI 2012 challenge: max over t of the mean over slices of an information F-score, borders thinned.

    With cells T and segments S as in `v_rand`, H the entropy of a pixel's cell or segment and I their mutual
    information, over the pixels of true cells:

        precision = I / H(T) (falls with mergers),   recall = I / H(S) (falls with splits),   F = 2 I / (H(T) + H(S)).

    1 is perfect, and is the value of a ratio of two zeros: one cell that is found whole.

    Args:
        prediction: probability of cell, in [0, 1].
        truth: > 0 is cell, negative is ignored (and no cell of the prediction, though a watershed may flood it).
        thinned: False takes the components themselves as segments.
        parts: return a dict instead: `v_info`; `threshold` (the lowest with the greatest F) and `precision`, `recall`,
            `f_score` there; `thresholds`, a list of dicts with the same.

    Raises:
        TypeError: prediction is neither boolean, integer nor float; truth holds no whole numbers.
        ValueError: shapes differ, are no [H, W] or [D, H, W], or hold no pixel; a prediction is NaN or not in [0, 1];
            truth has no cell.

    >>> v_info([[0.9, 0.9, 0.9, 0.9, 0.9]], [[1, 1, 0, 1, 1]])  # one segment tells nothing about the cell
    0.0
    >>> v_info([[0.9, 0.0, 0.0, 0.0, 0.9]], [[1, 1, 0, 1, 1]])
    1.0
    """
    scores = ChallengeCounts.of(*_given(prediction, truth), [segments_named(thinned)]).v_info(thinned=thinned)
    return scores if parts else scores["v_info"]
