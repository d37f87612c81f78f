"""Grey values of an image that is read in windows: the range that is normalised, and what to do with NaN.

A percentile is a matter of the whole plane. It is found exactly, in a fixed amount of memory, by counting: the values'
bits, put in an order that is that of the values, are counted sixteen at a time, from the highest down.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from .errors import BadInput
from .normalisation import Normalisation
from .sources import Source

__all__ = ["NAN", "Greys", "order_statistics"]

Array = np.ndarray[Any, Any]

# what to do with pixels that are NaN or infinite
NAN = ("refuse", "fill")

# pixels that are looked at together: counting takes some forty bytes of each
_BAND = 2**19
# planes up to this many pixels are sorted in memory instead
_SORTED = 2**19


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
        if self.normalisation is not None:
            # before a window is kept: looking for them drops it
            self.limits(z, 0)
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
            for number, limits in enumerate(self._percentiles(z, self.normalisation)):
                self._limits[z, number] = limits
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
        # of a plane of one grey value, an infinity is neither end; it is filled as NaN is
        with np.errstate(invalid="ignore"):
            return self.normalisation.scaled(plane, low, high)

    def _bands(self, z: int) -> Iterator[tuple[int, Array]]:
        """(first row, [C, rows, columns]) of a slice."""
        height, width = self.shape[2:]
        rows = max(1, _BAND // (width * self.shape[1]))
        # a row of chunks, so that each is decoded once; what windows need is kept again afterwards
        before = self.source.reserve(0)
        try:
            for row in range(0, height, rows):
                pixels = self.source.read(z, slice(row, min(height, row + rows)), slice(0, width))
                yield row, pixels.view(np.uint8) if pixels.dtype == bool else pixels
        finally:
            self.source.reserve(before)

    def _finite(self, z: int) -> Iterator[list[Array]]:
        """The same, as the finite values of each channel."""
        for _, pixels in self._bands(z):
            flat = pixels.reshape(len(pixels), -1)
            yield [values[np.isfinite(values)] if values.dtype.kind == "f" else values for values in flat]

    def _percentiles(self, z: int, normalisation: Normalisation) -> list[tuple[float, float]]:
        """Limits of each channel of a slice."""
        if self.shape[2] * self.shape[3] <= _SORTED:
            planes = [np.concatenate(parts) for parts in zip(*self._finite(z), strict=True)]
            return [normalisation.limits(plane) if len(plane) else (0.0, 0.0) for plane in planes]
        counts = self._counts(z)
        searches = [_Ranks(normalisation.ranks(count) if count else []) for count in counts]
        while any(search.going for search in searches):
            for parts in self._finite(z):
                for search, values in zip(searches, parts, strict=True):
                    search.count(values)
            for search in searches:
                search.step()
        limits = []
        for channel, (count, search) in enumerate(zip(counts, searches, strict=True)):
            low, high = normalisation.between(count, search.values()) if count else (0.0, 0.0)
            # a few bright pixels on a black ground lie beyond the percentiles: the range is all there is
            limits.append((low, high) if low < high or not count else self._range(z, channel))
        return limits

    def _counts(self, z: int) -> list[int]:
        """How many finite values each channel has."""
        if self.source.dtype.kind != "f" or self.nan == "refuse":
            return [self.shape[2] * self.shape[3]] * self.shape[1]
        sizes = [[len(part) for part in parts] for parts in self._finite(z)]
        return [sum(column) for column in zip(*sizes, strict=True)]

    def _range(self, z: int, channel: int) -> tuple[float, float]:
        ends = [(part[channel].min(), part[channel].max()) for part in self._finite(z) if len(part[channel])]
        return float(min(low for low, _ in ends)), float(max(high for _, high in ends))

    def _refuse(self) -> None:
        bad, first = 0, ""
        for z in range(self.shape[0]):
            for row, pixels in self._bands(z):
                wrong = ~np.isfinite(pixels)
                count = int(wrong.sum())
                if count and not bad:
                    _, y, x = np.argwhere(wrong)[0]
                    place = f"[{z}]" if self.source.is_stack else ""
                    first = f"{self.source.name}{place} row {row + y} column {x}"
                bad += count
        if bad:
            raise BadInput(
                f"{self.source.name} has {bad} NaN or infinite pixels, the first at {first}; replace them first, or "
                f"have them filled (--nan fill)"
            )


def order_statistics(bands: Callable[[], Iterable[Array]], ranks: Sequence[int]) -> Array:
    """The values at `ranks` of all values in ascending order, without sorting or holding them.

    Args:
        bands: gives, each time it is called, the values in parts: flat arrays of one real dtype.
        ranks: places in ascending order, from 0; equal ones may repeat.

    Raises:
        ValueError: a rank is not below the number of values.

    >>> order_statistics(lambda: iter([np.array([3.0, -1.0]), np.array([2.0])]), [0, 1, 2])
    array([-1.,  2.,  3.])
    """
    search = _Ranks(ranks)
    while search.going:
        for values in bands():
            search.count(values)
        search.step()
    return search.values()


class _Ranks:
    """The values at some ranks; each pass over all values tells sixteen bits more of them, from the highest down."""

    def __init__(self, ranks: Sequence[int]) -> None:
        # (the bits that are known, how many of the values that begin with them come before it)
        self.known = [(0, rank) for rank in ranks]
        self.bits = self.done = 0
        self.dtype = np.dtype(np.uint8)
        self.counts: dict[int, Array] = {}

    @property
    def going(self) -> bool:
        return bool(self.known) and (not self.bits or self.done < self.bits)

    @property
    def digit(self) -> int:
        """Bits that this pass tells."""
        return min(16, self.bits - self.done)

    def count(self, values: Array) -> None:
        self.dtype = values.dtype.newbyteorder("=")
        self.bits = 8 * self.dtype.itemsize
        keys = _ordered(values.astype(self.dtype, copy=False))
        for prefix in {prefix for prefix, _ in self.known}:
            here = keys if not self.done else keys[(keys >> np.uint64(self.bits - self.done)) == prefix]
            digits = (here >> np.uint64(self.bits - self.done - self.digit)) & np.uint64(2**self.digit - 1)
            found = np.bincount(digits.astype(np.int64), minlength=2**self.digit)
            self.counts[prefix] = self.counts.get(prefix, 0) + found

    def step(self) -> None:
        if self.known and not self.counts:
            raise ValueError(f"there must be more than {self.known[-1][1]} values, got none")
        if self.going:
            self.known = [_step(prefix, rank, self.counts[prefix], self.digit) for prefix, rank in self.known]
            self.done += self.digit
            self.counts = {}

    def values(self) -> Array:
        return _values(np.array([prefix for prefix, _ in self.known], np.uint64), self.dtype)


def _step(prefix: int, rank: int, counts: Array, digit: int) -> tuple[int, int]:
    """Sixteen bits more of the value at a rank."""
    below = np.cumsum(counts)
    if rank >= below[-1]:
        raise ValueError(f"ranks must lie below the number of values, {below[-1]}, got {rank}")
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
