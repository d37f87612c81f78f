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
        if self.kind == "range":
            # whole numbers would wrap around in an unsigned image
            low, high = np.float64(self.low), np.float64(self.high)
        else:
            flat = image.reshape(*image.shape[:-2], -1)
            low, high = np.percentile(flat, (self.low, self.high), axis=-1)[..., None, None]
            # a few bright pixels on a black ground lie beyond the percentiles: the range is all there is
            flat_plane = ~(low < high)
            low = np.where(flat_plane, flat.min(-1)[..., None, None], low)
            high = np.where(flat_plane, flat.max(-1)[..., None, None], high)
        # in float64: a uint16 range of 1 in 60000 must not vanish; a plane of one grey value becomes 0
        span = np.where(np.asarray(high) > low, np.asarray(high, np.float64) - low, np.inf)
        return np.clip((image - low) / span, 0, 1).astype(np.float32)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
