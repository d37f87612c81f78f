"""Grey values to the range the net was trained on; kept with the model, so that prediction does the same."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .errors import BadInput

__all__ = ["KINDS", "Normalisation"]

KINDS = ("percentile", "range", "none")


@dataclass(frozen=True, slots=True)
class Normalisation:
    """How grey values become numbers near 0 to 1.

    kind "percentile": each channel of each slice by itself, its `low`-th percentile to 0, its `high`-th to 1, clipped:
    exposure and contrast of the microscope no longer matter. Where both percentiles are equal, its least and greatest
    value. "range": `low` to 0 and `high` to 1, clipped, the same for every image: for data whose grey values mean
    something. "none": as they are, as float32.
    """

    kind: str = "percentile"
    low: float = 1.0
    high: float = 99.8

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise BadInput(f"normalisation must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            raise BadInput(f"normalisation must have finite low and high, got low {self.low} and high {self.high}")
        if self.kind != "none" and not self.low < self.high:
            raise BadInput(f"normalisation must have low below high, got low {self.low} and high {self.high}")
        if self.kind == "percentile" and not (self.low >= 0 and self.high <= 100):
            raise BadInput(f"percentiles must lie between 0 and 100, got {self.low} and {self.high}")

    def __call__(self, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Normalise [..., H, W] of any real dtype to float32; NaN stays NaN in that plane only."""
        if self.kind == "none":
            return image.astype(np.float32)
        low, span = self.ends(image)
        return _scaled(image, low, span)

    def ends(self, image: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Of [..., H, W], the grey value that becomes 0 and how far above it that of 1 is: float64 [..., 1, 1], NaN
        where grey values stay as they are."""
        if self.kind == "none":
            nothing = np.full((*image.shape[:-2], 1, 1), np.nan)
            return nothing, nothing
        planes = image.reshape(-1, image.shape[-2] * image.shape[-1])
        limits = np.array([self.limits(plane) for plane in planes], np.float64).reshape(*image.shape[:-2], 2)
        low, high = limits[..., :1, None], limits[..., 1:, None]
        return low, _span(low, high)

    def limits(self, plane: np.ndarray[Any, Any]) -> tuple[float, float]:
        """The grey values of a plane, flat, that become 0 and 1."""
        if self.kind != "percentile":
            return self.low, self.high
        if plane.dtype.kind == "f" and np.isnan(plane).any():
            return math.nan, math.nan
        ranks = self.ranks(len(plane))
        low, high = self.between(len(plane), np.partition(plane, ranks)[ranks])
        # a few bright pixels on a black ground lie beyond the percentiles: the range is all there is
        return (low, high) if low < high else (float(plane.min()), float(plane.max()))

    def ranks(self, count: int) -> list[int]:
        """Places, in ascending order of so many grey values, of the two on either side of each percentile."""
        places = (math.floor(percentile / 100 * (count - 1)) for percentile in (self.low, self.high))
        return [min(place + more, count - 1) for place in places for more in (0, 1)]

    def between(self, count: int, found: Any) -> tuple[float, float]:
        """Both percentiles of so many grey values, by those at `ranks`."""
        ends = []
        for percentile, below, above in zip((self.low, self.high), found[::2], found[1::2], strict=True):
            place = percentile / 100 * (count - 1)
            ends.append(float(below) + (float(above) - float(below)) * (place - math.floor(place)))
        return ends[0], ends[1]

    def scaled(self, image: np.ndarray[Any, Any], low: Any, high: Any) -> np.ndarray[Any, Any]:
        """`low` to 0, `high` to 1, clipped; float32."""
        if self.kind == "none":
            return image.astype(np.float32)
        low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
        return _scaled(image, low, _span(low, high))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _span(low: np.ndarray[Any, Any], high: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    # a plane of one grey value becomes 0
    return np.where(high > low, high - low, np.where(np.isnan(low), np.nan, np.inf))


def _scaled(image: np.ndarray[Any, Any], low: np.ndarray[Any, Any], span: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    # in float64: a uint16 range of 1 in 60000 must not vanish, and whole numbers would wrap around
    return np.clip((image - low) / span, 0, 1).astype(np.float32)
