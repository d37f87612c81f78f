"""Bytes as people write and read them: 1 GB = 1e9 bytes, 1 GiB = 2^30."""

import math
import re

__all__ = ["bytes_of", "readable"]

_UNITS = {"": 1, "B": 1}
_UNITS |= {letter: 1000**power for power, letter in enumerate("KMGT", 1)}
_UNITS |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)}
_UNITS |= {f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", 1)}


def bytes_of(text: str | float) -> int:
    """A number of bytes as people write it: 6GB (6e9), 6GiB (6 x 2^30), 500 MB, 1e9.

    Raises:
        ValueError: it is none, or not above 0.

    >>> bytes_of("6GB"), bytes_of("1.5 GiB"), bytes_of(4e9)
    (6000000000, 1610612736, 4000000000)
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:e[+]?[0-9]+)?)\s*([a-z]*)\s*", str(text).lower())
    try:
        number = float(found[1]) * _UNITS[found[2].upper()] if found else 0.0
    except (KeyError, ValueError):
        number = 0.0
    if not 1 <= number < 2**63:
        raise ValueError(f"memory must be a size such as 6GB, 500MB or 4GiB, got {str(text).strip() or 'nothing'}")
    return int(number)


def readable(count: float, *, up: bool = False) -> str:
    """Bytes for people, in a form that `bytes_of` takes; `up`: never less than they are.

    >>> readable(6e9), readable(350e6), readable(2.51e6), readable(71_605_028, up=True)
    ('6.00 GB', '350 MB', '2.5 MB', '72 MB')
    """
    if count < 99_999:
        return f"{math.ceil(count):.0f} B"
    unit, name, digits = (1e9, "GB", 2) if count >= 0.9995e9 else (1e6, "MB", 0 if count >= 9.95e6 else 1)
    step = 10.0**-digits
    number = math.ceil(count / unit / step - 1e-9) * step if up else count / unit
    return f"{number:.{digits}f} {name}"
