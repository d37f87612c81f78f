"""Bytes as people write and read them: 1 GB = 1e9 bytes, 1 GiB = 2^30."""

import re

__all__ = ["bytes_of", "gigabytes"]

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)}
_UNITS |= {f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", 1)}


def bytes_of(text: str | float) -> int:
    """A number of bytes as people write it: 6GB (6e9), 6GiB (6 x 2^30), 500 MB, 1e9.

    Raises:
        ValueError: it is none, or not above 0.

    >>> bytes_of("6GB"), bytes_of("1.5 GiB"), bytes_of(4e9)
    (6000000000, 1610612736, 4000000000)
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", str(text).lower())
    try:
        number = float(found[1]) * _UNITS[found[2].upper()] if found else 0.0
    except (KeyError, ValueError):
        number = 0.0
    if not 1 <= number < 2**63:
        raise ValueError(f"memory must be a size such as 6GB, 500MB or 4GiB, got {text}")
    return int(number)


def gigabytes(count: float) -> str:
    """
    >>> gigabytes(6e9)
    '6.00 GB'
    """
    return f"{count / 1e9:.2f} GB"
