"""What a net must beat: Otsu's threshold for cells, a blur for membranes.

N. Otsu, "A threshold selection method from gray-level histograms", IEEE Transactions on Systems, Man, and Cybernetics
9(1), 62-66, 1979: of all thresholds k, the one with the greatest variance between the two classes,

    (mean w0(k) - m(k))^2 / (w0(k) (1 - w0(k)))

w0 the share and m the first moment of what is at most k.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["blurred", "otsu_cells", "otsu_threshold"]

_BINS = 256


def otsu_threshold(image: NDArray[Any]) -> float:
    """The threshold of Otsu (1979): the classes are `image <= threshold` and `image > threshold`.

    Exact for uint8; uint16 and floats are counted in 256 bins of equal width from the least value to the greatest. The
    answer is itself a value of the image, the greatest of the lower class; where several thresholds are best, the
    lowest; where all values are one, that value.

    Args:
        image: any shape, uint8, uint16 or floating.

    Raises:
        TypeError: image is no array of such a dtype.
        ValueError: image is empty, or holds a NaN or an infinity.
    """
    _check(image)
    values = image.ravel()
    bins = values if image.dtype == np.uint8 else _binned(values)
    count = np.bincount(bins, minlength=_BINS)
    moment = np.cumsum(count * np.arange(_BINS))
    below = np.cumsum(count)
    total = below[-1]
    w0 = below / total
    mean = moment[-1] / total
    inside = (below > 0) & (below < total)
    if not inside.any():
        return float(values[0])
    between = np.full(_BINS, -1.0)
    between[inside] = (mean * w0 - moment / total)[inside] ** 2 / (w0 * (1 - w0))[inside]
    return float(values[bins <= np.argmax(between)].max())


def otsu_cells(image: NDArray[Any], *, bright: bool = True) -> NDArray[np.int32]:
    """The 4-connected components of what is above `otsu_threshold`, ids 1 to n, 0 = background.

    Args:
        image: `[H, W]`, uint8, uint16 or floating.
        bright: cells are strictly above the threshold; False: at most the threshold.

    Returns:
        instances `[H, W]`.

    Raises:
        TypeError: image is no array of such a dtype.
        ValueError: image has not two axes, is empty, or holds a NaN or an infinity.
    """
    _check(image)
    if image.ndim != 2:
        raise ValueError(f"image must be [H, W], got shape {image.shape}")
    above = image > otsu_threshold(image)
    instances, _ = ndimage.label(above if bright else ~above, output=np.int32)
    return instances


def blurred(image: NDArray[Any], sigma_px: float = 2.0) -> NDArray[np.float32]:
    """A probability of cell, where cells are bright: blurred by a Gaussian, then stretched from 0 to 1.

    The edge is mirrored, not repeated. The slices of a stack are blurred and stretched each by itself; a slice of one
    value answers 0.5.

    Args:
        image: `[H, W]` or `[D, H, W]`, uint8, uint16 or floating.
        sigma_px: the Gaussian's standard deviation; 0 leaves the image as it is.

    Raises:
        TypeError: image is no array of such a dtype.
        ValueError: image has another number of axes, is empty, or holds a NaN or an infinity, or sigma_px is negative
            or not finite.
    """
    _check(image)
    if image.ndim not in (2, 3):
        raise ValueError(f"image must be [H, W] or [D, H, W], got shape {image.shape}")
    if not (math.isfinite(sigma_px) and sigma_px >= 0):
        raise ValueError(f"sigma_px must be finite and 0 or more, got {sigma_px}")
    sigmas = (0.0,) * (image.ndim - 2) + (sigma_px, sigma_px)
    blur = ndimage.gaussian_filter(image.astype(np.float64), sigmas, mode="mirror")
    low = blur.min(axis=(-2, -1), keepdims=True)
    span = blur.max(axis=(-2, -1), keepdims=True) - low
    # a blur of one value keeps it but for rounding
    flat = image.max(axis=(-2, -1), keepdims=True) == image.min(axis=(-2, -1), keepdims=True)
    flat |= span == 0
    probability = np.where(flat, 0.5, (blur - low) / np.where(flat, 1.0, span))
    return probability.astype(np.float32)


def _binned(values: NDArray[Any]) -> NDArray[np.int64]:
    low, high = float(values.min()), float(values.max())
    if low == high:
        return np.zeros(values.shape, np.int64)
    # the halves: high - low of two finite floats may be infinite
    share = (values.astype(np.float64) / 2 - low / 2) / (high / 2 - low / 2)
    return np.clip(np.ceil(share * _BINS).astype(np.int64) - 1, 0, _BINS - 1)


def _check(image: NDArray[Any]) -> None:
    if not isinstance(image, np.ndarray):
        raise TypeError(f"image must be a numpy array, got {type(image).__name__}")
    if image.dtype not in (np.uint8, np.uint16) and not np.issubdtype(image.dtype, np.floating):
        raise TypeError(f"image must be uint8, uint16 or floating, got {image.dtype}")
    if image.size == 0:
        raise ValueError(f"image must have pixels, got shape {image.shape}")
    if not np.isfinite(image).all():
        raise ValueError("image must be finite, got a NaN or an infinity")
