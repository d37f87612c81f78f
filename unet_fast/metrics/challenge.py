"""The scores of the ISBI 2012 EM segmentation challenge, as its leaderboard computed them.

They are not the textbook ones of the same names: the "warping error" counts only splits and mergers, the "Rand error"
is restricted to true cells, the "pixel error" is one less an F-score, and each takes the threshold that is best for
the prediction. Cell is 4-connected, background (membrane) 8-connected. Definitions: docs/mathematics.md, section 8;
sources: Jain et al., CVPR 2010; Arganda-Carreras et al., Frontiers in Neuroanatomy 9:142, 2015.
"""

import math
from typing import Any, Literal, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from unet_kernels import ERROR_KINDS, connected_components, homotopic_warp, rand_sums

from ._inputs import array, expect_cells, probabilities_and_truth, ratio, stack

__all__ = ["pixel_error", "rand_error", "v_info", "v_rand", "warping_error"]


def _thresholds(last: float) -> list[float]:
    # t += 0.1 in double: 0 to 0.9 are ten, 0 to 1 eleven of which the last is 0.9999999999999999, so that a
    # probability of 1 lies above all of them
    thresholds, t = [], 0.0
    while t <= last:
        thresholds.append(t)
        t += 0.1
    return thresholds


def _given(prediction: ArrayLike, truth: ArrayLike) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    p, t = probabilities_and_truth(prediction, truth)
    expect_cells(t)
    return p.astype(np.float32), t


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
    about 0.0004. Cells that are missed or made up cost nothing: a prediction that is all background at one of the
    thresholds has error 0, so look at `rand_error` too.

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
    p, t = _given(prediction, truth)
    counted = t >= 0
    if mask is not None:
        allowed = array("mask", mask)
        if allowed.dtype.kind not in "biu":
            raise TypeError(f"mask must be boolean or integer, got {allowed.dtype}; compare with a threshold first")
        if stack(allowed).shape != t.shape:
            raise ValueError(f"mask must have the shape of truth, {np.shape(truth)}, got {allowed.shape}")
        counted &= stack(allowed) > 0
    thresholds, pixels = _thresholds(0.9), int((t >= 0).sum())
    images = (torch.from_numpy(p), torch.from_numpy(t))
    which = torch.from_numpy(counted)
    counts, _ = homotopic_warp(*images, thresholds, counted=which, radius=radius)
    rows = []
    for threshold, found in zip(thresholds, counts.sum(1).tolist(), strict=True):
        kinds = dict(zip(ERROR_KINDS[1:], found[1:], strict=True))
        wrong, error = sum(found[1:]), (kinds["split"] + kinds["merge"]) / pixels
        rows.append({"threshold": threshold, **kinds, "error": error, "plain_error": wrong / pixels})
    best = min(rows, key=lambda row: row["error"])  # the first of equals
    if not parts:
        return best["error"]
    _, drawn = homotopic_warp(*images, [best["threshold"]], counted=which, radius=radius, kinds=True)
    assert drawn is not None
    kinds_of = drawn[0].numpy()
    errors = {kind: np.argwhere(kinds_of == i) for i, kind in enumerate(ERROR_KINDS) if i}
    return {
        **{name: best[name] for name in ("error", "threshold", "split", "merge")},
        "split_places": _places(kinds_of == ERROR_KINDS.index("split"), 1),
        "merge_places": _places(kinds_of == ERROR_KINDS.index("merge"), 2),
        "errors": {kind: where.tolist() for kind, where in errors.items()},
        "pixels": pixels,
        "thresholds": rows,
    }


def _places(wrong: NDArray[np.bool_], reach: int) -> int:
    # splits are pixels of cells, 4-connected; mergers of background, 8-connected; slices are apart
    structure = np.zeros((3, 3, 3), bool)
    structure[1] = ndimage.generate_binary_structure(2, reach)
    return int(ndimage.label(wrong, structure)[1])


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
    best, rows = _best(prediction, truth, _rand, thinned=False, pooled=True)
    error = 1.0 - best["f_score"]
    return {"error": error, **best, "thresholds": rows} if parts else error


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
    best, rows = _best(prediction, truth, _rand, thinned=thinned, pooled=False)
    return {"v_rand": best["f_score"], **best, "thresholds": rows} if parts else best["f_score"]


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
    best, rows = _best(prediction, truth, _information, thinned=thinned, pooled=False)
    return {"v_info": best["f_score"], **best, "thresholds": rows} if parts else best["f_score"]


def _best(
    prediction: ArrayLike, truth: ArrayLike, measure: Any, *, thinned: bool, pooled: bool
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """The scores at the best threshold, and at each."""
    p, t = _given(prediction, truth)
    thresholds = _thresholds(1.0)
    cells = connected_components(torch.from_numpy(t))
    squares, logs = rand_sums(torch.from_numpy(p), cells, thresholds, thinned=thinned)
    with_cells = squares[0, :, 0] > 0
    squares, logs = squares[:, with_cells], logs[:, with_cells]
    if pooled:
        squares, logs = squares.sum(1, keepdim=True), logs.sum(1, keepdim=True)
    names = ("precision", "recall", "f_score")
    rows = []
    for threshold, whole, logarithms in zip(thresholds, squares.tolist(), logs.tolist(), strict=True):
        slices = [measure(*sums) for sums in zip(whole, logarithms, strict=True)]
        means = [math.fsum(values) / len(slices) for values in zip(*slices, strict=True)]
        rows.append({"threshold": threshold, **dict(zip(names, means, strict=True))})
    return max(rows, key=lambda row: row["f_score"]), rows


def _rand(squares: list[int], _logs: list[float]) -> tuple[float, float, float]:
    _, of_truth, of_segments, of_both = squares
    return of_both / of_segments, of_both / of_truth, 2 * of_both / (of_truth + of_segments)


def _information(squares: list[int], logs: list[float]) -> tuple[float, float, float]:
    # entropies in units of log n, the most there can be: 1 - sum k log k / (n log n)
    most = squares[0] * math.log(squares[0]) or 1.0
    truth, segments, joint = (max(0.0, 1.0 - of / most) if squares[0] > 1 else 0.0 for of in logs)
    shared = truth + segments - joint
    return _share(shared, truth), _share(shared, segments), _share(2 * shared, truth + segments)


def _share(part: float, whole: float) -> float:
    # what rounding leaves of a difference counts as none
    return 1.0 if whole < 1e-12 else min(1.0, max(0.0, part / whole))


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
    p, t = _given(prediction, truth)
    thresholds = _thresholds(1.0)
    # [thresholds that the pixel lies above, is it cell]
    kept = t >= 0
    above = np.searchsorted(thresholds, p[kept], side="left")
    bins = 2 * (len(thresholds) + 1)
    counts = np.bincount(2 * above + (t[kept] > 0), minlength=bins).reshape(-1, 2)
    fp_at, tp_at = counts[::-1].cumsum(axis=0)[::-1].T.tolist()
    cells = tp_at[0]
    rows = [
        {"threshold": t, "tp": tp, "fp": fp, "fn": cells - tp}
        | {"precision": ratio(tp, tp + fp), "recall": ratio(tp, cells)}
        | {"f_score": 2 * tp / (tp + fp + cells) if tp else 0.0}
        for t, tp, fp in zip(thresholds, tp_at[1:], fp_at[1:], strict=True)
    ]
    best = max(rows, key=lambda row: row["f_score"])  # the first of equals
    error = 1.0 - best["f_score"]
    if not parts:
        return error
    chosen = {name: best[name] for name in ("threshold", "precision", "recall", "f_score")}
    return {"error": error, **chosen, "thresholds": rows}
