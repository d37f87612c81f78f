"""What a score may be given: stacks of one shape; probabilities, truth, ids. One sentence for anything else."""

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

__all__ = ["array", "expect_cells", "expect_ids", "instance_maps", "probabilities_and_truth", "ratio", "stack"]


def probabilities_and_truth(prediction: ArrayLike, truth: ArrayLike) -> tuple[NDArray[Any], NDArray[np.int8]]:
    """Both as stacks: probabilities of cell (floating, 0 on ignored pixels); 1 cell, 0 background, -1 ignored."""
    p, t = _same_shape(prediction, truth)
    if t.dtype.kind not in "biu":
        raise TypeError(f"truth must hold whole numbers, got {t.dtype}; (truth > 0) makes a mask of it")
    if p.dtype.kind not in "biuf":
        raise TypeError(f"prediction must be boolean, integer or float, got {p.dtype}")
    labels = (t > 0).astype(np.int8)
    if t.dtype.kind == "i":
        labels[t < 0] = -1
        p = np.where(labels < 0, p.dtype.type(0), p)
    if p.dtype.kind == "f" and np.isnan(p).any():
        raise ValueError(f"prediction must not be NaN, got {np.isnan(p).sum()} of {p.size} pixels that are")
    low, high = p.min(), p.max()
    if p.dtype.kind in "iu" and low >= 0 and not ((p != 0) & (p != high)).any():
        p = p > 0  # a mask, whatever number stands for cell
    elif low < 0 or high > 1:
        what = f"the probability of cell, 0 to 1, got {low:g} to {high:g}"
        raise ValueError(f"prediction must be {what}{_hint(p.dtype.kind, low, high)}")
    return p if p.dtype.kind == "f" else p.astype(np.float32), labels


def _hint(kind: str, low: float, high: float) -> str:
    if kind != "f":
        return "; (prediction > 0) makes a mask of ids, prediction / 255 probabilities of grey values"
    if np.isposinf(high):
        return ""
    if low < 0 or high <= 2:
        return "; a softmax or sigmoid makes probabilities of logits"
    return "; divide by 255 if these are grey values" if high <= 255 else "; divide by the greatest that can be"


def expect_cells(truth: NDArray[Any]) -> None:
    if not (truth > 0).any():
        raise ValueError(f"truth must have a cell to be found, got none (no value above 0) in {truth.size} pixels")


def expect_ids(prediction: NDArray[Any]) -> None:
    if (prediction < 0).any():
        raise ValueError(f"prediction must hold ids of 0 (background) or more, got {prediction.min()}")


def instance_maps(prediction: ArrayLike, truth: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    """Both as stacks, of ids."""
    p, t = _same_shape(prediction, truth)
    for name, ids in (("prediction", p), ("truth", t)):
        # a mask would be one cell, which is never what is meant
        if ids.dtype.kind not in "iu":
            hint = ", .astype(int) integers of whole numbers" if ids.dtype.kind == "f" else ""
            raise TypeError(
                f"{name} must hold integer ids, got {ids.dtype}; components(mask) makes them of a mask{hint}"
            )
    return p, t


def _same_shape(prediction: ArrayLike, truth: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    p, t = array("prediction", prediction), array("truth", truth)
    if p.shape != t.shape:
        raise ValueError(f"prediction and truth must have one shape, got {p.shape} and {t.shape}")
    return stack(p), stack(t)


def array(name: str, given: ArrayLike) -> NDArray[Any]:
    if isinstance(given, torch.Tensor):
        given = given.detach().cpu()
        given = given.float() if given.dtype == torch.bfloat16 else given
    try:
        values = np.asarray(given)
    except ValueError:
        raise ValueError(f"{name} must be [H, W] or [D, H, W], got rows of different lengths") from None
    if values.ndim not in (2, 3) or values.size == 0:
        raise ValueError(f"{name} must be [H, W] or [D, H, W] with at least one pixel, got shape {values.shape}")
    return values


def stack(values: NDArray[Any]) -> NDArray[Any]:
    return values if values.ndim == 3 else values[None]


def ratio(numerator: float, denominator: int) -> float | None:
    return numerator / denominator if denominator else None
