"""rand_sums, watershed_cells: the C++ is the specification, and both are what a dense table of overlaps says."""

import importlib
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

import unet_kernels as uk
from tests.proof.properties import given, st
from unet_kernels import _native
from unet_kernels.reference import topology

# the functions below the public one take their place in the package's namespace
sums = importlib.import_module("unet_kernels.rand_sums")

pytestmark = pytest.mark.filterwarnings("ignore:.*runs in plain Python:RuntimeWarning")

CPU = torch.device("cpu")


@pytest.fixture
def built() -> None:
    if _native.why_not(CPU):
        pytest.skip(_native.why_not(CPU))


def _images(seed: int, size: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """(prediction float32, truth int32) [D, H, W]: ids far apart, pixels to ignore, segments that half fit them."""
    rng = np.random.default_rng(seed)
    d, h, w = rng.integers(1, 4), rng.integers(1, size + 1), rng.integers(1, size + 1)
    if rng.random() < 0.15:
        h, w = (1, w) if rng.random() < 0.5 else (h, 1)
    blur = rng.choice([0.0, 0.7, 1.5])
    noise = rng.standard_normal((d, h, w))
    base = ndimage.gaussian_filter(noise, (0, blur, blur)) if blur else noise
    base = base / (base.std() + 1e-9)
    # an id may be that of several parts, and of parts in several slices
    ids = rng.choice(np.array([1, 2, 3, 70000, 2**31 - 1]), 1 + ndimage.label(base > 0)[1])
    truth = np.where(base > 0, ids[ndimage.label(base > 0)[0]], 0)
    truth[rng.random(truth.shape) < rng.choice([0.0, 0.1, 0.3])] = rng.choice([-1, -7])
    prediction = base + rng.choice([0.1, 0.5, 2.0]) * rng.standard_normal(base.shape)
    steps = rng.choice([0, 2, 4])
    if steps:
        prediction = np.round(prediction * steps) / steps
    return prediction.astype(np.float32), truth.astype(np.int32)


def _both(seed: int, thinned: bool) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(squares, logs) of the C++ kernel and of the specification."""
    prediction, truth = (torch.from_numpy(i) for i in _images(seed))
    rng = np.random.default_rng([seed, 1])
    levels = torch.from_numpy(rng.choice([-1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 9.0], rng.integers(1, 4)))
    return sums.launch_cpu(prediction, truth, levels, thinned), sums.specified(prediction, truth, levels, thinned)


# ---- C++ against specification


@pytest.mark.parametrize("thinned", [False, True])
def test_the_cpp_kernel_is_the_specification_on_200_random_cases(thinned: bool, built: None) -> None:
    for seed in range(200):
        (squares, logs), (want_squares, want_logs) = _both(seed, thinned)
        assert torch.equal(squares, want_squares), seed
        torch.testing.assert_close(logs, want_logs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("thinned", [False, True])
@pytest.mark.parametrize("step", [10, 255])
def test_a_prediction_on_the_threshold_is_compared_alike(step: int, thinned: bool, built: None) -> None:
    # 0.2 in float32 is above 0.2 in float64, 0.7 below: whoever compares in another type sees other segments
    levels = torch.tensor([i / 10 for i in range(11)], dtype=torch.float64)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        prediction = (rng.integers(0, step + 1, (1, 12, 12)) / step).astype(np.float32)
        prediction[:, ::2] = rng.choice(levels.numpy().astype(np.float32), prediction[:, ::2].shape)
        tensors = torch.from_numpy(prediction), torch.from_numpy(rng.integers(-1, 4, (1, 12, 12)).astype(np.int32))
        ours, want = (work(*tensors, levels, thinned)[0] for work in (sums.launch_cpu, sums.specified))
        assert torch.equal(ours, want)


@st.composite
def cells(draw: Any) -> np.ndarray:
    h, w = draw(st.integers(1, 30)), draw(st.integers(1, 30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    noise = rng.standard_normal((h, w))
    blurred = ndimage.gaussian_filter(noise, 1.2) if draw(st.booleans()) else noise
    return blurred > np.quantile(blurred, draw(st.sampled_from([0.3, 0.6, 0.8, 0.95, 0.99, 1.0])))


def _basins(mask: np.ndarray) -> np.ndarray:
    return uk.watershed_cells(torch.from_numpy(mask)[None])[0].numpy()


@given(mask=cells())
def test_basins_by_cpp_are_those_of_the_specification(mask: np.ndarray) -> None:
    if _native.why_not(CPU):
        pytest.skip(_native.why_not(CPU))
    assert np.array_equal(_basins(mask), topology.watershed_cells(mask))


# ---- laws of the basins


@given(mask=cells())
def test_basins_are_the_cells_grown_and_stay_apart(mask: np.ndarray) -> None:
    basins, (ids, count) = _basins(mask), ndimage.label(mask)
    if not count:
        assert (basins == 1).all()
        return
    assert np.array_equal(basins[mask], ids[mask])
    assert set(np.unique(basins)) - {0} == set(range(1, count + 1))
    for basin in range(1, count + 1):
        assert ndimage.label(basins == basin)[1] == 1
    for a, b in ((basins[1:], basins[:-1]), (basins[:, 1:], basins[:, :-1])):
        assert not ((a != b) & (a > 0) & (b > 0)).any()


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 5, 0)], ids=str)
def test_nothing_has_no_basins_and_no_sums(shape: tuple[int, int, int]) -> None:
    truth = torch.zeros(shape, dtype=torch.int32)
    assert uk.watershed_cells(truth).shape == shape
    for thinned in (False, True):
        squares, logs = uk.rand_sums(torch.ones(shape), truth, [0.5], thinned=thinned)
        assert squares.shape == (1, shape[0], 4)
        assert logs.shape == (1, shape[0], 3)
        assert squares.eq(0).all()
        assert logs.eq(0).all()


# ---- what the sums are


def _by_a_dense_table(truth: np.ndarray, segments: np.ndarray) -> tuple[list[int], list[float]]:
    """Every cell in a row, every segment in a column, and a column more for each pixel that is in no segment."""
    inside = truth > 0
    columns = np.where(
        segments == 0, segments.max(initial=0) + 1 + np.arange(segments.size).reshape(segments.shape), segments
    )
    _, row = np.unique(truth[inside], return_inverse=True)
    _, column = np.unique(columns[inside], return_inverse=True)
    table = np.zeros((row.max(initial=-1) + 1, column.max(initial=-1) + 1), np.int64)
    np.add.at(table, (row, column), 1)
    counts = table.sum(1), table.sum(0), table.ravel()
    logs = [float(sum(n * np.log(n) for n in c[c > 0].tolist())) for c in counts]
    return [int(table.sum()), *(int((c**2).sum()) for c in counts)], logs


@pytest.mark.parametrize("thinned", [False, True])
@given(seed=st.integers(0, 2**32 - 1), threshold=st.sampled_from([-0.5, 0.0, 0.5]))
def test_sums_are_those_of_the_table_of_overlaps(seed: int, threshold: float, thinned: bool) -> None:
    prediction, truth = _images(seed)
    squares, logs = uk.rand_sums(torch.from_numpy(prediction), torch.from_numpy(truth), [threshold], thinned=thinned)
    assert (squares.dtype, logs.dtype) == (torch.int64, torch.float64)
    for z in range(len(truth)):
        inside = (prediction[z] > threshold) & (truth[z] >= 0)
        segments = _basins(inside) if thinned else ndimage.label(inside)[0]
        want_squares, want_logs = _by_a_dense_table(truth[z], segments)
        assert squares[0, z].tolist() == want_squares
        np.testing.assert_allclose(logs[0, z].numpy(), want_logs, rtol=1e-10, atol=1e-10)


@given(seed=st.integers(0, 2**32 - 1))
def test_the_truth_against_itself_has_one_sum_of_squares(seed: int) -> None:
    # the cells of the truth are the segments if each is one part and none touch: n = t = s = n_ij
    mask = _images(seed)[1] > 0
    truth = uk.connected_components(torch.from_numpy(mask))
    squares, logs = uk.rand_sums(truth.float(), truth, [0.5])
    assert squares[0, :, 0].tolist() == mask.sum((1, 2)).tolist()
    assert torch.equal(squares[0, :, 1], squares[0, :, 2])
    assert torch.equal(squares[0, :, 1], squares[0, :, 3])
    torch.testing.assert_close(logs[0, :, :1].expand(-1, 3), logs[0], rtol=1e-12, atol=0)


@given(seed=st.integers(0, 2**32 - 1))
def test_names_of_cells_do_not_matter_and_ignored_pixels_are_no_segment(seed: int) -> None:
    prediction, truth = (torch.from_numpy(i) for i in _images(seed))
    renamed = torch.where(truth > 0, 2**31 - truth.long(), truth.long())
    hidden = torch.where(truth < 0, -torch.inf, prediction)
    for thinned in (False, True):
        squares, logs = uk.rand_sums(prediction, truth, [0.0], thinned=thinned)
        for p, t in ((prediction, renamed), (hidden, truth.clamp(min=-1).short() if truth.max() < 2**15 else truth)):
            got_squares, got_logs = uk.rand_sums(p, t, [0.0], thinned=thinned)
            assert torch.equal(got_squares, squares)
            torch.testing.assert_close(got_logs, logs, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64],
    ids=str,
)
def test_any_integer_dtype(dtype: torch.dtype) -> None:
    prediction, _ = (torch.from_numpy(i) for i in _images(4))
    truth = torch.randint(0, 5, prediction.shape, generator=torch.Generator().manual_seed(0))
    want = uk.rand_sums(prediction, truth, [0.0])[0]
    # numpy fills what torch has no arithmetic for
    odd = torch.from_numpy(truth.numpy().astype(str(dtype).removeprefix("torch.")))
    assert torch.equal(uk.rand_sums(prediction, odd, [0.0])[0], want)
    assert torch.equal(uk.watershed_cells(odd), uk.watershed_cells(truth))


def test_sums_of_large_cells_do_not_overflow() -> None:
    whole = torch.ones(1, 300, 300)
    pixels = 300 * 300
    assert uk.rand_sums(whole, whole.int(), [0.5])[0].tolist() == [[[pixels, pixels**2, pixels**2, pixels**2]]]


def test_ids_that_differ_in_their_highest_bits_are_different_cells() -> None:
    truth = torch.tensor([[[1, 1, 1 + 2**24, 1 + 2**24, 1 + 2**30, 1 + 2**30]]], dtype=torch.int32)
    assert uk.rand_sums(torch.ones(1, 1, 6), truth, [0.5])[0].tolist() == [[[6, 12, 36, 12]]]


def test_any_strides() -> None:
    prediction, truth = (torch.from_numpy(i) for i in _images(4))
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (prediction, truth)]
    for a, b in zip(uk.rand_sums(*turned, [0.0, 0.5]), uk.rand_sums(prediction, truth, [0.0, 0.5]), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(uk.watershed_cells(turned[1]), uk.watershed_cells(truth))


ELSEWHERE = """
import pytest
import torch

import unet_kernels as uk

prediction, truth = torch.ones(1, 1, 5), torch.tensor([[[1, 1, 0, 2, 2]]], dtype=torch.int32)
want = *uk.rand_sums(prediction, truth, [0.5]), uk.watershed_cells(truth)
with torch.device("meta"):
    got = *uk.rand_sums(prediction, truth, [0.5]), uk.watershed_cells(truth)
assert all(torch.equal(a, b) for a, b in zip(got, want))
with pytest.raises(ValueError, match="truth must be on cpu like prediction, got meta"):
    uk.rand_sums(prediction, truth.to("meta"), [0.5])
with pytest.raises(ValueError, match="mask must be on the CPU, got meta"):
    uk.watershed_cells(truth.to("meta"))
"""


@pytest.mark.slow
def test_a_tensor_elsewhere_is_refused_and_a_default_device_elsewhere_is_no_matter() -> None:
    # in a process of its own: what is got wrong here is the address that the C++ reads
    command = [sys.executable, "-W", "ignore", "-c", ELSEWHERE]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.returncode} {done.stderr}"


# ---- without the library


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def missing() -> None:
        raise uk.NativeLibraryMissing("libunet_native was not built")

    monkeypatch.setattr(_native, "native", missing)
    for door in (_native.why_not, _native.missing):
        door.cache_clear()
    yield
    for door in (_native.why_not, _native.missing):
        door.cache_clear()


def _rand_sums(thinned: bool) -> tuple[Tensor, ...]:
    prediction, truth = (torch.from_numpy(i) for i in _images(5))
    return uk.rand_sums(prediction, truth, [0.0, 0.5], thinned=thinned)


CALLS = {
    "rand_sums": lambda: _rand_sums(False) + _rand_sums(True),
    "watershed_cells": lambda: (uk.watershed_cells(torch.from_numpy(_images(5)[1])), uk.watershed_cells(_T[:0])),
}


@pytest.mark.parametrize("name", CALLS)
def test_without_the_library_the_answer_is_the_same_and_one_warning_says_why_it_is_slow(
    name: str, request: pytest.FixtureRequest
) -> None:
    with_it = CALLS[name]()
    request.getfixturevalue("no_library")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        answers = [CALLS[name]() for _ in range(3)]
    for answer in answers:
        for a, b in zip(answer, with_it, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    assert [w.category for w in said] == [RuntimeWarning]
    assert str(said[0].message).startswith(f"{name} runs in plain Python, which is slow: the native library is missing")


# ---- what is refused

_P, _T = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("prediction", "truth", "error", "sentence"),
    [
        (_T, _T, TypeError, r"prediction must be floating .*, got int32; .float\(\) makes it so"),
        (_P[0], _T, ValueError, r"prediction must be 3-D \[D, H, W\], got 2-D \[4, 4\]"),
        (_P, _P, TypeError, "truth must be .* integer tensor, got float32"),
        (_P, _T > 0, TypeError, "truth must be an integer tensor, got bool; label its components first"),
        (_P, _T[:, :3], ValueError, r"truth must have shape \[1, 4, 4\] like prediction, got \[1, 3, 4\]"),
        (_P, _T.long() + 2**31, ValueError, "truth must hold ids that fit 32 bits, got 2147483648; renumber them"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(
    prediction: Tensor, truth: Tensor, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence) as refusal:
        uk.rand_sums(prediction, truth, [0.5])
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("mask", "error", "sentence"),
    [
        (_P, TypeError, "mask must be boolean or an integer tensor, got float32"),
        (_T[0], ValueError, r"mask must be 3-D \[N, H, W\], got 2-D \[4, 4\]"),
    ],
)
def test_a_bad_mask_is_refused_in_a_sentence(mask: Tensor, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        uk.watershed_cells(mask)
