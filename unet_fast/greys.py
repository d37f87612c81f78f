"""Grey values of an image that is read in windows: the range that is normalised, and what to do with NaN.

A percentile is a matter of the whole plane. It is found exactly, in a fixed amount of memory, by counting: the values'
bits, put in an order that is that of the values, are counted sixteen at a time, from the highest down.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .errors import BadInput
from .normalisation import Normalisation
from .sources import Source

__all__ = ["NAN", "Greys", "order_statistics"]

Array = np.ndarray[Any, Any]

# what to do with pixels that are NaN or infinite
NAN = ("refuse", "fill")

# pixels that are looked at together
_BAND = 2**22
# planes up to this many pixels are sorted in memory instead
_SORTED = 2**22


class Greys:
    """A source whose windows come normalised, as float32 (float64 where there is no normalisation and `wide`).

    Args:
        source: the image.
        normalisation: of the model; None: grey values as they are.
        nan: "refuse" NaN and infinite pixels, or "fill" them: NaN becomes the dark end of the range (0), infinities its
            ends, and none of them counts towards percentiles.
        wide: keep float64 and large integers exact.

    Raises:
        BadInput: NaN or infinite pixels, which are refused; they are counted, and the first is named.
    """

    def __init__(
        self, source: Source, normalisation: Normalisation | None, *, nan: str = "refuse", wide: bool = False
    ) -> None:
        if nan not in NAN:
            raise BadInput(f"nan must be one of {', '.join(NAN)}, got {nan!r}")
        self.source, self.normalisation, self.nan = source, normalisation, nan
        self.shape, self.dtype = source.shape, np.dtype(np.float64 if wide and normalisation is None else np.float32)
        self._limits: dict[tuple[int, int], tuple[float, float]] = {}
        self._tables: dict[tuple[int, int], Array] = {}
        if source.dtype.kind == "f" and nan == "refuse":
            self._refuse()

    def read(self, z: int, rows: slice, columns: slice) -> Array:
        """[C, rows, columns], as it goes into the net."""
        pixels = self.source.read(z, rows, columns)
        if pixels.dtype == bool:
            # a mask is no number to a percentile
            pixels = pixels.view(np.uint8)
        if self.normalisation is None:
            out = pixels.astype(self.dtype)
        else:
            out = np.stack([self._scaled(z, channel, plane) for channel, plane in enumerate(pixels)])
        if self.nan == "fill" and pixels.dtype.kind == "f":
            # infinities are at the ends already, where there are ends
            np.nan_to_num(out, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
        return out

    def limits(self, z: int, channel: int) -> tuple[float, float]:
        """The grey values of a plane that become 0 and 1."""
        assert self.normalisation is not None
        if self.normalisation.kind != "percentile":
            return self.normalisation.low, self.normalisation.high
        if (z, channel) not in self._limits:
            self._limits[z, channel] = self._percentiles(z, channel)
        return self._limits[z, channel]

    def _scaled(self, z: int, channel: int, plane: Array) -> Array:
        assert self.normalisation is not None
        low, high = self.limits(z, channel)
        if plane.dtype.kind == "u" and plane.dtype.itemsize <= 2:
            # few values: each is computed once
            table = self._tables.get((z, channel))
            if table is None:
                self._tables = {k: v for k, v in self._tables.items() if k[0] == z}
                values = np.arange(2 ** (8 * plane.dtype.itemsize))
                table = self._tables[z, channel] = self.normalisation.scaled(values, low, high)
            return table[plane]
        return self.normalisation.scaled(plane, low, high)

    def _bands(self, z: int, channel: int) -> Iterator[Array]:
        """The plane's finite values, flat, some rows at a time."""
        height, width = self.shape[2:]
        rows = max(1, _BAND // width)
        for row in range(0, height, rows):
            plane = self.source.read(z, slice(row, min(height, row + rows)), slice(0, width))[channel].reshape(-1)
            if plane.dtype == bool:
                plane = plane.view(np.uint8)
            yield plane[np.isfinite(plane)] if plane.dtype.kind == "f" else plane

    def _percentiles(self, z: int, channel: int) -> tuple[float, float]:
        assert self.normalisation is not None
        count, least, greatest = 0, None, None
        for values in self._bands(z, channel):
            if len(values):
                count += len(values)
                least = values.min() if least is None else min(least, values.min())
                greatest = values.max() if greatest is None else max(greatest, values.max())
        if not count:
            return 0.0, 0.0
        ranks = self.normalisation.ranks(count)
        if count <= _SORTED:
            found = np.partition(np.concatenate(list(self._bands(z, channel))), ranks)[ranks]
        else:
            found = order_statistics(lambda: self._bands(z, channel), ranks)
        return self.normalisation.between(count, found, least, greatest)

    def _refuse(self) -> None:
        bad, first = 0, ""
        height, width = self.shape[2:]
        rows = max(1, _BAND // width)
        for z in range(self.shape[0]):
            for row in range(0, height, rows):
                pixels = self.source.read(z, slice(row, min(height, row + rows)), slice(0, width))
                wrong = ~np.isfinite(pixels)
                count = int(wrong.sum())
                if count and not bad:
                    _, y, x = np.argwhere(wrong)[0]
                    place = f"[{z}]" if self.source.is_stack else ""
                    first = f"{self.source.name}{place} row {row + y} column {x}"
                bad += count
        if bad:
            raise BadInput(
                f"{self.source.name} has {bad} NaN or infinite pixels, the first at {first}; replace them first"
            )


def order_statistics(bands: Any, ranks: Sequence[int]) -> Array:
    """The values at `ranks` of all values in ascending order, without sorting or holding them.

    Args:
        bands: gives, each time it is called, an iterator over parts of the values: flat arrays of one real dtype.
        ranks: places in ascending order, from 0; equal ones may repeat.

    >>> order_statistics(lambda: iter([np.array([3.0, -1.0]), np.array([2.0])]), [0, 1, 2])
    array([-1.,  2.,  3.])
    """
    # (the highest bits that are known, how many values with these bits come before it)
    known = [(0, rank) for rank in ranks]
    dtype: Any = None
    bits = done = 0
    while not bits or done < bits:
        counts: dict[int, Array] = {}
        for values in bands():
            dtype = values.dtype.newbyteorder("=")
            bits = 8 * dtype.itemsize
            digit = min(16, bits - done)
            keys = _ordered(values.astype(dtype, copy=False))
            for prefix in {prefix for prefix, _ in known}:
                here = keys if not done else keys[(keys >> np.uint64(bits - done)) == prefix]
                digits = (here >> np.uint64(bits - done - digit)) & np.uint64(2**digit - 1)
                found = np.bincount(digits.astype(np.int64), minlength=2**digit)
                counts[prefix] = counts.get(prefix, 0) + found
        known = [_step(prefix, rank, counts[prefix], digit) for prefix, rank in known]
        done += digit
    return _values(np.array([prefix for prefix, _ in known], np.uint64), dtype)


def _step(prefix: int, rank: int, counts: Array, digit: int) -> tuple[int, int]:
    """Sixteen bits more of the value at a rank."""
    below = np.cumsum(counts)
    next_digit = int(np.searchsorted(below, rank, side="right"))
    return prefix << digit | next_digit, rank - (int(below[next_digit - 1]) if next_digit else 0)


def _ordered(values: Array) -> Array:
    """Whole numbers whose order is that of the values."""
    width = 8 * values.dtype.itemsize
    keys = values.view(f"u{values.dtype.itemsize}").astype(np.uint64)
    sign = np.uint64(1 << (width - 1))
    if values.dtype.kind == "i":
        return keys ^ sign
    if values.dtype.kind == "f":
        # negative ones count backwards
        flipped = ~keys & np.uint64(2**width - 1)
        return np.where(keys & sign, flipped, keys | sign)
    return keys


def _values(keys: Array, dtype: Any) -> Array:
    width = 8 * dtype.itemsize
    sign = np.uint64(1 << (width - 1))
    if dtype.kind == "i":
        keys = keys ^ sign
    if dtype.kind == "f":
        keys = np.where(keys & sign, keys ^ sign, ~keys & np.uint64(2**width - 1))
    return keys.astype(f"u{dtype.itemsize}").view(dtype)
