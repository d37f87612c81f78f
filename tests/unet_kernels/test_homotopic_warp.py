"""homotopic_warp: the C++ is the specification on hundreds of images, and the specification keeps the topology."""

import importlib
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from scipy import ndimage
from torch import Tensor

import unet_kernels as uk
from tests.proof.properties import given, st
from unet_fast import synthetic
from unet_kernels import _native
from unet_kernels.reference import topology

# the functions below the public one take their place in the package's namespace
warp = importlib.import_module("unet_kernels.homotopic_warp")

pytestmark = pytest.mark.filterwarnings("ignore:.*runs in plain Python:RuntimeWarning")

EIGHT = np.ones((3, 3))
CPU = torch.device("cpu")


@pytest.fixture
def built() -> None:
    if _native.why_not(CPU):
        pytest.skip(_native.why_not(CPU))


Images = tuple[np.ndarray, np.ndarray, np.ndarray]


def _images(seed: int, size: int = 24, slices: int = 3) -> Images:
    """(prediction float32, truth bool, counted bool) [D, H, W]: a prediction that is near the truth, more or less."""
    rng = np.random.default_rng(seed)
    d, h, w = rng.integers(1, slices + 1), rng.integers(1, size + 1), rng.integers(1, size + 1)
    if rng.random() < 0.15:
        h, w = (1, w) if rng.random() < 0.5 else (h, 1)
    blur = rng.choice([0.0, 0.6, 1.2, 2.5])

    def field() -> np.ndarray:
        noise = rng.standard_normal((d, h, w))
        smooth = ndimage.gaussian_filter(noise, (0, blur, blur)) if blur else noise
        return smooth / (smooth.std() + 1e-9)

    base = field()
    prediction = base + rng.choice([0.1, 0.5, 1.0, 3.0]) * field()
    # coarse steps: many pixels disagree by exactly as much, and many lie on a threshold
    steps = rng.choice([0, 1, 2, 4])
    if steps:
        prediction = np.round(prediction * steps) / steps
    counted = rng.random((d, h, w)) < rng.choice([0.5, 0.9, 1.0])
    return prediction.astype(np.float32), base > rng.choice([-0.5, 0.0, 0.5]), counted


def _tensors(images: Images) -> tuple[Tensor, Tensor, Tensor]:
    prediction, truth, counted = (torch.from_numpy(i) for i in images)
    return prediction, truth.to(torch.uint8), counted.to(torch.uint8)


def _both(images: Images, thresholds: list[float], radius: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(counts, kinds) of the C++ kernel and of the specification."""
    levels = torch.tensor(thresholds, dtype=torch.float64)
    answers = []
    for work in (warp.launch_cpu, warp.specified):
        kinds = torch.full((len(levels), *images[0].shape), 99, dtype=torch.uint8)
        answers.append((work(*_tensors(images), levels, radius, kinds), kinds))
    return answers[0], answers[1]


def _assert_both_agree(images: Images, thresholds: list[float], radius: int) -> Tensor:
    (counts, kinds), (want_counts, want_kinds) = _both(images, thresholds, radius)
    assert torch.equal(counts, want_counts)
    assert torch.equal(kinds, want_kinds)
    return counts


# ---- C++ against specification


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_the_cpp_kernel_is_the_specification_on_200_random_cases(first: int, built: None) -> None:
    met = torch.zeros(7, dtype=torch.int64)
    for seed in range(first, first + 50):
        rng = np.random.default_rng([seed, 1])
        thresholds = rng.choice([-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0], rng.integers(1, 4)).tolist()
        met += _assert_both_agree(_images(seed), thresholds, int(rng.integers(1, 26))).sum((0, 1))
    # agreement about nothing would prove nothing
    assert (met[1:] > 0).all(), met


@pytest.mark.parametrize("seed", range(4))
def test_many_mismatches_are_visited_in_the_same_order(seed: int, built: None) -> None:
    # more than a thousand are sorted in another way
    rng = np.random.default_rng([seed, 2])
    values = np.array([0.0, 0.3, 0.6, 0.9]) if seed % 2 else np.linspace(0, 1, 500)
    prediction = rng.choice(values, (1, 61, 67)).astype(np.float32)
    truth = ndimage.gaussian_filter(rng.standard_normal((1, 61, 67)), (0, 2, 2)) > 0
    assert ((prediction > 0.5) != truth).sum() > 1024
    _assert_both_agree((prediction, truth, np.ones(truth.shape, bool)), [0.5, 0.25], 20)


def test_without_kinds_the_counts_are_the_same(built: None) -> None:
    levels = torch.tensor([-0.25, 0.5], dtype=torch.float64)
    for seed in range(20):
        tensors = _tensors(_images(seed))
        kinds = torch.empty((2, *tensors[0].shape), dtype=torch.uint8)
        for work in (warp.launch_cpu, warp.specified):
            assert torch.equal(work(*tensors, levels, 5, None), work(*tensors, levels, 5, kinds))


@pytest.mark.parametrize("step", [10, 255])
def test_a_prediction_on_the_threshold_is_compared_alike(step: int, built: None) -> None:
    # 0.2 in float32 is above 0.2 in float64, 0.7 below: whoever compares in another type sees other cells
    thresholds = [i / 10 for i in range(11)]
    for seed in range(20):
        rng = np.random.default_rng(seed)
        prediction = (rng.integers(0, step + 1, (1, 12, 12)) / step).astype(np.float32)
        prediction[:, ::2] = rng.choice(np.array(thresholds, np.float32), prediction[:, ::2].shape)
        images = prediction, rng.random(prediction.shape) < 0.5, np.ones(prediction.shape, np.bool_)
        _assert_both_agree(images, thresholds, 4)


def test_what_is_no_number_is_ordered_alike(built: None) -> None:
    for seed in range(30):
        prediction, truth, counted = _images(seed, size=8)
        rng = np.random.default_rng(seed)
        odd = rng.random(prediction.shape) < 0.2
        prediction[odd] = rng.choice(np.array([np.nan, np.inf, -np.inf], np.float32), odd.sum())
        _assert_both_agree((prediction, truth, counted), [0.0, 0.5], 3)


@pytest.mark.parametrize("radius", [1, 2, 10**6, 2**31, 2**62, 2**63 - 1])
def test_any_radius_that_the_door_lets_in(radius: int, built: None) -> None:
    for seed in range(10):
        _assert_both_agree(_images(seed, size=12), [0.0], radius)


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 5, 0)], ids=str)
@pytest.mark.parametrize("thresholds", [[], [0.5]], ids=["no threshold", "a threshold"])
def test_nothing_has_no_errors(shape: tuple[int, int, int], thresholds: list[float]) -> None:
    counts, kinds = uk.homotopic_warp(torch.ones(shape), torch.zeros(shape, dtype=torch.int32), thresholds, kinds=True)
    assert counts.shape == (len(thresholds), shape[0], 7)
    assert counts.eq(0).all()
    assert kinds is not None
    assert kinds.shape == (len(thresholds), *shape)


# ---- simple points


def _topology(square: np.ndarray) -> tuple[int, int]:
    """Parts of cell (4-connected) and of background (8-connected) of an image with background all round."""
    padded = np.pad(square, 1)
    return ndimage.label(padded)[1], ndimage.label(~padded, EIGHT)[1]


def test_116_of_256_rings_are_simple() -> None:
    assert sum(topology.SIMPLE_RINGS) == 116


def _crossing_number(ring: int) -> int:
    """Yokoi's (1973) for 4-connected cell: its parts beside a pixel, less the one closed round it, by arithmetic."""
    around = [ring >> i & 1 for i in range(8)]  # odd places share an edge
    return sum(around[i] - around[i] * around[(i + 1) % 8] * around[(i + 2) % 8] for i in (1, 3, 5, 7))


def test_simple_rings_are_those_with_yokois_number_one() -> None:
    assert tuple(_crossing_number(ring) == 1 for ring in range(256)) == topology.SIMPLE_RINGS


def _image_of(ring: int) -> np.ndarray:
    image = np.zeros((3, 3), np.bool_)
    for i, place in enumerate(((0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0))):
        image[place] = ring >> i & 1
    return image


def test_a_flip_of_a_simple_point_and_of_no_other_keeps_the_parts_of_an_image() -> None:
    for ring in range(256):
        # alone in the plane no part of the ring is joined to another outside it; in the midst of cell some are
        for surroundings in (False, True):
            around = np.pad(_image_of(ring), 2, constant_values=surroundings)
            flipped = around.copy()
            flipped[3, 3] = not flipped[3, 3]
            kept = _topology(around) == _topology(flipped)
            assert kept or not topology.SIMPLE_RINGS[ring], ring
            assert not kept or topology.SIMPLE_RINGS[ring] or surroundings, ring


@st.composite
def images(draw: Any) -> Images:
    return _images(draw(st.integers(0, 2**32 - 1)), size=14, slices=1)


@given(case=images(), threshold=st.sampled_from([-0.5, 0.0, 0.5]))
def test_warping_keeps_the_number_of_cells_and_holes(case: Images, threshold: float) -> None:
    prediction, truth, counted = (i[0] for i in case)
    warped = topology.homotopic_warp(prediction, truth, threshold, counted)
    assert _topology(warped) == _topology(truth)
    # only towards the prediction, and only where it counts
    changed = warped != truth
    assert not (changed & ~counted).any()
    assert (warped == (prediction > threshold))[changed].all()


@given(case=images(), threshold=st.sampled_from([-0.5, 0.0, 0.5]))
def test_what_is_left_is_not_simple(case: Images, threshold: float) -> None:
    prediction, truth, counted = (i[0] for i in case)
    warped = topology.homotopic_warp(prediction, truth, threshold, counted)
    for y, x in np.argwhere((warped != (prediction > threshold)) & counted):
        assert not topology.SIMPLE_RINGS[topology.ring_of(np.pad(warped, 1), y + 1, x + 1)]


# ---- laws of the answer


@given(case=images())
def test_warping_towards_itself_leaves_nothing(case: Images) -> None:
    prediction, _, counted = (torch.from_numpy(i) for i in case)
    counts, kinds = uk.homotopic_warp(prediction, prediction > 0.25, [0.25], counted=counted, kinds=True)
    assert counts.eq(0).all()
    assert kinds is not None
    assert kinds.eq(0).all()


@given(case=images(), radius=st.integers(1, 25))
def test_counts_are_those_of_the_kinds_and_nothing_uncounted_is_wrong(case: Images, radius: int) -> None:
    prediction, truth, counted = (torch.from_numpy(i) for i in case)
    thresholds = [-0.5, 0.0, 0.5]
    counts, kinds = uk.homotopic_warp(prediction, truth, thresholds, counted=counted, radius=radius, kinds=True)
    assert counts.dtype == torch.int64
    assert kinds is not None
    assert kinds.dtype == torch.uint8
    assert not kinds[:, ~counted].any()
    for i in range(len(thresholds)):
        for z in range(len(prediction)):
            want = torch.bincount(kinds[i, z].flatten(), minlength=7)
            want[0] = 0
            assert torch.equal(counts[i, z], want)


@given(case=images())
def test_slices_and_thresholds_do_not_meet(case: Images) -> None:
    prediction, truth, counted = (torch.from_numpy(np.concatenate([i, i[:, ::-1]])) for i in case)
    thresholds = [0.5, -0.5, 0.5]
    together, _ = uk.homotopic_warp(prediction, truth, thresholds, counted=counted)
    for i, threshold in enumerate(thresholds):
        for z in range(2):
            one = slice(z, z + 1)
            alone, _ = uk.homotopic_warp(prediction[one], truth[one], [threshold], counted=counted[one])
            assert torch.equal(together[i, one], alone[0])


ELSEWHERE = """
import pytest
import torch

import unet_kernels as uk

prediction, truth = torch.ones(1, 3, 5), torch.tensor([[[1, 1, 0, 1, 1]] * 3])
want = uk.homotopic_warp(prediction, truth, [0.5], kinds=True)
with torch.device("meta"):
    got = uk.homotopic_warp(prediction, truth, [0.5], kinds=True)
assert all(torch.equal(a, b) for a, b in zip(got, want))
with pytest.raises(ValueError, match="truth must be on cpu like prediction, got meta"):
    uk.homotopic_warp(prediction, truth.to("meta"), [0.5])
with pytest.raises(ValueError, match="counted must be on cpu like prediction, got meta"):
    uk.homotopic_warp(prediction, truth, [0.5], counted=truth.to("meta") > 0)
"""


@pytest.mark.slow
def test_a_tensor_elsewhere_is_refused_and_a_default_device_elsewhere_is_no_matter() -> None:
    # in a process of its own: what is got wrong here is the address that the C++ reads
    command = [sys.executable, "-W", "ignore", "-c", ELSEWHERE]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.returncode} {done.stderr}"


def test_any_strides_and_dtypes() -> None:
    prediction, truth, counted = (torch.from_numpy(i[:, :20, :20]) for i in _images(3))
    want, want_kinds = uk.homotopic_warp(prediction, truth, [0.0], counted=counted, kinds=True)
    assert want.sum() > 0
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (prediction, truth, counted)]
    for p, t, c in (
        turned,
        (prediction.double(), truth.long() * 7, counted),
        (prediction, truth.to(torch.uint16), counted),
    ):
        got, kinds = uk.homotopic_warp(p, t, [0.0], counted=c, kinds=True)
        assert torch.equal(got, want)
        assert torch.equal(kinds, want_kinds)


# ---- the six kinds, drawn: # is cell

HAND_MADE = {
    # a bar that has lost its middle: no warp cuts it
    "split": ("....... ####### .......", "....... ###.### ......."),
    # a gap that is closed
    "merge": ("....... ###.### .......", "....... ####### ......."),
    "hole_addition": ("##### ##### ##### ##### #####", "##### ##### ##.## ##### #####"),
    "hole_deletion": ("##### ##### ##.## ##### #####", "##### ##### ##### ##### #####"),
    "object_addition": ("..... ..... ..... ..... .....", "..... ..... ..#.. ..... ....."),
    "object_deletion": ("..... ..... ..#.. ..... .....", "..... ..... ..... ..... ....."),
}


def _drawn(rows: str) -> Tensor:
    return torch.tensor([[[c == "#" for c in row] for row in rows.split()]])


@pytest.mark.parametrize("lane", ["launch_cpu", "specified"])
@pytest.mark.parametrize("kind", HAND_MADE)
def test_each_kind_is_called_by_its_name(kind: str, lane: str) -> None:
    if lane == "launch_cpu" and _native.why_not(CPU):
        pytest.skip(_native.why_not(CPU))
    truth, predicted = (_drawn(rows) for rows in HAND_MADE[kind])
    levels = torch.tensor([0.5], dtype=torch.float64)
    kinds = torch.empty((1, *truth.shape), dtype=torch.uint8)
    counted = torch.ones(truth.shape, dtype=torch.uint8)
    counts = getattr(warp, lane)(predicted.float(), truth.to(torch.uint8), counted, levels, 20, kinds)
    want = [0] * 7
    want[uk.ERROR_KINDS.index(kind)] = 1
    assert counts[0, 0].tolist() == want
    assert torch.equal(kinds[0] > 0, truth != predicted)


def test_a_ring_is_parted_only_as_far_as_is_looked(built: None) -> None:
    # one pixel of a ring: without it, the ring is still one part, but not within a window that does not see the way
    # round; a background that reaches in from the outside is a hole that has gone
    truth = torch.zeros(1, 13, 13, dtype=torch.bool)
    truth[:, 1:12, 1:12] = True
    truth[:, 2:11, 2:11] = False
    predicted = truth.clone()
    predicted[:, 1, 6] = False
    for radius, kind in ((2, "split"), (9, "split"), (10, "hole_deletion"), (20, "hole_deletion")):
        counts, _ = uk.homotopic_warp(predicted.float(), truth, [0.5], radius=radius)
        assert counts[0, 0].argmax() == uk.ERROR_KINDS.index(kind), radius
        assert counts.sum() == 1


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


def _answer(case: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    counts, kinds = uk.homotopic_warp(case[0], case[1], [0.0, 0.5], counted=case[2], kinds=True)
    assert kinds is not None
    return counts, kinds


def test_without_the_library_the_answer_is_the_same_and_one_warning_says_why_it_is_slow(
    request: pytest.FixtureRequest,
) -> None:
    case = tuple(torch.from_numpy(i) for i in _images(5))
    with_it = _answer(case)
    request.getfixturevalue("no_library")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        answers = [_answer(case) for _ in range(3)]
    for counts, kinds in answers:
        assert torch.equal(counts, with_it[0])
        assert torch.equal(kinds, with_it[1])
    assert [w.category for w in said] == [RuntimeWarning]
    assert str(said[0].message).startswith(
        "homotopic_warp runs in plain Python, which is slow: the native library is m"
    )


# ---- what is refused

_P, _T = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("prediction", "truth", "settings", "error", "sentence"),
    [
        (_T, _T, {}, TypeError, "prediction must be floating .*, got int32; .float\\(\\) makes it so"),
        (_P[0], _T, {}, ValueError, r"prediction must be 3-D \[D, H, W\], got 2-D \[4, 4\]"),
        (_P, _P, {}, TypeError, "truth must be boolean or an integer tensor, got float32"),
        (_P, _T[:, :3], {}, ValueError, r"truth must have shape \[1, 4, 4\] like prediction, got \[1, 3, 4\]"),
        (
            _P,
            _T,
            {"counted": _T[:, 1:] > 0},
            ValueError,
            r"counted must have shape \[1, 4, 4\] like prediction, got \[1",
        ),
        (_P, _T, {"counted": [[1]]}, TypeError, "counted must be .*, got list"),
        (_P, _T, {"radius": 0}, ValueError, "radius must be at least 1, got 0"),
        (_P, _T, {"radius": 1.5}, TypeError, "radius must be a whole number, got 1.5"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(
    prediction: Tensor, truth: Tensor, settings: Any, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence) as refusal:
        uk.homotopic_warp(prediction, truth, [0.5], **settings)
    assert "\n" not in str(refusal.value)


# ---------------------------------------------------------------------------------------------------- what it costs


def _seconds(work: Any, arguments: tuple[Any, ...], times: int) -> float:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work(*arguments)
        taken.append(time.perf_counter() - start)
    return min(taken)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.0, 0.8])
def test_a_stack_after_an_epoch_takes_no_two_seconds_and_a_twentieth_of_the_specification(
    noise: float, built: None
) -> None:
    labels = _labels()
    rng = np.random.default_rng(0)
    noisy = (labels + noise * rng.standard_normal(labels.shape)).astype(np.float32)
    prediction = torch.from_numpy(np.stack([ndimage.gaussian_filter(slice_, 1.5).clip(0, 1) for slice_ in noisy]))
    truth, thresholds = torch.from_numpy(labels.astype(np.uint8)), torch.arange(10, dtype=torch.float64) / 10
    whole = (prediction, truth, torch.ones_like(truth), thresholds, 20, None)
    assert _seconds(warp.launch_cpu, whole, 3) < 2
    # one thread beside one thread
    part = (*(each[:1].contiguous() for each in whole[:3]), *whole[3:])
    assert 20 * _seconds(warp.launch_cpu, part, 5) < _seconds(warp.specified, part, 2)


def _labels() -> np.ndarray:
    """The challenge's 24 slices where they are, else drawn ones; bool [24, 512, 512]."""
    data = Path(os.environ.get("UNET_FAST_DATA", Path(__file__).parents[3] / "shared/data"))
    real = data / "isbi2012/train-labels.tif"
    labels = tifffile.imread(real) if real.is_file() else synthetic.membranes((24, 512, 512), seed=0)[1]
    return labels > 0
