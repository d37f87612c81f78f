"""Bytes are read as people write them, and what is no size is refused in one sentence."""

import doctest
from typing import Any

import pytest

from tests.proof.properties import given, settings, st
from unet_fast import units
from unet_fast.units import bytes_of, readable

POWERS = {
    "": 1,
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
UNITS = st.sampled_from(sorted(POWERS))
SPACES = st.sampled_from(["", " ", "  ", "\t"])


def test_short_units_and_signed_exponents_are_understood() -> None:
    assert [bytes_of(text) for text in ("6G", "1.5 m", "1e+9", "2e3k")] == [6 * 10**9, 1_500_000, 10**9, 2 * 10**6]


@given(st.integers(1, 10**6), UNITS, SPACES, SPACES)
def test_a_whole_number_of_any_unit_is_exact(number: int, unit: str, between: str, around: str) -> None:
    assert bytes_of(f"{around}{number}{between}{unit}{around}") == number * POWERS[unit]


@given(st.integers(1, 10**6), UNITS)
def test_upper_and_lower_case_are_the_same(number: int, unit: str) -> None:
    text = f"{number}{unit}"
    assert bytes_of(text.upper()) == bytes_of(text.lower()) == bytes_of(text)


@given(st.integers(1, 999_999), st.sampled_from(["GB", "GiB", "TB", "TiB"]))
def test_a_fraction_is_rounded_down_to_a_byte(thousandths: int, unit: str) -> None:
    found, exact = bytes_of(f"{thousandths / 1000}{unit}"), thousandths * POWERS[unit] / 1000
    assert abs(found - exact) <= 1


@given(st.integers(1, 2**53))
def test_numbers_and_their_texts_are_bytes(number: int) -> None:
    assert bytes_of(number) == bytes_of(str(number)) == bytes_of(float(number)) == number


@given(st.integers(1, 9), st.integers(0, 5), UNITS)
def test_powers_of_ten_may_be_written_with_an_e(digit: int, power: int, unit: str) -> None:
    assert bytes_of(f"{digit}e{power}{unit}") == digit * 10**power * POWERS[unit]


@given(st.integers(10**7, 10**13))
def test_what_is_written_in_readable_is_read_again_to_half_a_hundredth(count: int) -> None:
    assert abs(bytes_of(readable(count)) - count) <= 5e6 + 1


@given(st.text(max_size=12))
@settings(max_examples=30)
def test_any_text_is_a_size_or_refused_with_itself_in_the_sentence(text: str) -> None:
    try:
        said = None if 1 <= bytes_of(text) < 2**63 else "a size out of range"
    except ValueError as error:
        said = str(error)
    assert said in (None, f"memory must be a size such as 6GB, 500MB or 4GiB, got {text.strip() or 'nothing'}")


NO_SIZES = ["", "GB", "6 GBit", "6XB", "-6GB", "+6GB", "0", "0GB", "0.4", "1.2.3GB", ".", "1e400", "9e30", "8388608TiB"]
NO_SIZES += ["6 GB 3", "6,5GB", "0x10", "1e-3GB", "nan", "inf", "half of it", "6_000"]


@pytest.mark.parametrize("wrong", [*NO_SIZES, 0, -1, 0.5, float("nan"), float("inf"), True, None, [6]], ids=repr)
def test_what_is_no_size_is_refused_in_a_sentence(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"^memory must be a size such as 6GB, 500MB or 4GiB, got "):
        bytes_of(wrong)


def test_the_examples_in_the_docstrings_hold() -> None:
    result = doctest.testmod(units)
    assert (result.failed, result.attempted > 1) == (0, True)
