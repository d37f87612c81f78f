"""Proves that `unet_fast.metrics.challenge` gives the numbers of the ISBI 2012 challenge.

On the challenge's own labels every digit must be the one that the challenge's own program prints. On small images,
where ties are common, scores are compared with others that are made from the definitions: Rand from all pairs of
pixels, information from a dense table of probabilities, warping from the specification. Then come the laws that a
measure has to keep whatever the image is, and the sentences with which it refuses what it cannot measure.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import accumulate, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from tests.proof.properties import given, settings, st
from unet_fast.metrics import (
    ChallengeCounts,
    adapted_rand_error,
    components,
    error_places,
    pixel_error,
    rand_error,
    v_info,
    v_rand,
    warping_error,
    warping_map,
)
from unet_kernels import _native
from unet_kernels.reference import topology

pytestmark = pytest.mark.filterwarnings("ignore:.*runs in plain Python:RuntimeWarning")

ROOT = Path(__file__).parents[2]
LABELS = Path(os.environ.get("UNET_FAST_DATA", ROOT / "../shared/data")) / "isbi2012" / "train-labels.tif"

ordinary = settings(derandomize=True, database=None, deadline=None, max_examples=60)
# for what is tried with every measure
repeated = settings(derandomize=True, database=None, deadline=None, max_examples=25)

# 0, 0.1 .. 1 as the challenge's program adds them up
ELEVEN = list(accumulate([0.0, *[0.1] * 10]))
SHAPE = (2, 4, 5)

FIVE: dict[str, Callable[..., Any]] = {
    "warping_error": warping_error,
    "rand_error": rand_error,
    "pixel_error": pixel_error,
    "v_rand": v_rand,
    "v_info": v_info,
}
OF_COMPONENTS = {
    "rand_error": rand_error,
    "v_rand of components": partial(v_rand, thinned=False),
    "v_info of components": partial(v_info, thinned=False),
}
SEVEN = FIVE | OF_COMPONENTS
PERFECT = dict.fromkeys(SEVEN, 1.0) | dict.fromkeys(("warping_error", "rand_error", "pixel_error"), 0.0)
SEGMENTING = {name: SEVEN[name] for name in SEVEN if name not in ("warping_error", "pixel_error")}


def each(measures: dict[str, Callable[..., Any]]) -> Any:
    return pytest.mark.parametrize("measure", measures.values(), ids=measures.keys())


def stacks(low: int, high: int) -> Any:
    """Stacks of SHAPE with whole numbers from low to high; half of them coarse, so that cells have areas."""
    d, h, w = SHAPE
    fine = st.lists(st.integers(low, high), min_size=d * h * w, max_size=d * h * w)
    coarse = st.lists(st.integers(low, high), min_size=d * w, max_size=d * w)
    return st.one_of(
        fine.map(lambda values: np.array(values, np.int32).reshape(SHAPE)),
        coarse.map(lambda values: np.repeat(np.array(values, np.int32).reshape(d, 1, w), h, axis=1)),
    )


def with_a_cell(truth: np.ndarray) -> np.ndarray:
    truth = truth.copy()
    truth[0, 0, 0] = 1
    return truth


truths = stacks(-1, 2).map(with_a_cell)

# on, just above and just below every threshold, in both precisions, and anything
EDGES = [float(x) for k in range(11) for c in (np.float64(k / 10), np.float32(k / 10)) for x in (c, np.nextafter(c, 2))]
EDGES = [x for x in EDGES if x <= 1]
probabilities = st.lists(
    st.one_of(st.sampled_from(EDGES), st.floats(0, 1)), min_size=math.prod(SHAPE), max_size=math.prod(SHAPE)
).map(lambda values: np.array(values).reshape(SHAPE))


@cache
def cells_and_a_guess(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(prediction, truth) of two slices of 28 x 28: blobs, a patch that is ignored, and a guess that errs often."""
    generator = np.random.default_rng(seed)

    def smooth(sigma: float) -> np.ndarray:
        field = ndimage.gaussian_filter(generator.standard_normal((2, 28, 28)), (0, sigma, sigma))
        return field / field.std()

    field = smooth(1.2)
    truth = (field > -0.4).astype(np.int32)
    truth[1, 5:9, 3:12] = -1
    prediction = np.clip(0.55 + 0.5 * (field + 0.4) + 0.45 * smooth(1.0), 0, 1).astype(np.float32)
    prediction.flags.writeable = truth.flags.writeable = False
    return prediction, truth


# ---------------------------------------------------------------------------------------------------- golden values

# what the challenge's own program prints for the first three slices
COLUMNS = ("warping_error", "plain_error", "rand_error", "pixel_error", "v_rand", "v_info", "adapted_rand_error")
GOLDEN = {
    "b": ("0.00000000", "0.00000000", "0.000000", "0.000000", "1.000000", "1.000000", "0.000000"),
    "shift1": ("0.00003560", "0.00003560", "0.070185", "0.027518", "0.946481", "0.986726", "0.080362"),
    "blur": ("0.00010681", "0.00012589", "0.015909", "0.004352", "0.998460", "0.998740", "0.017688"),
}
WRONG_PIXELS = {"b": 0, "shift1": 28, "blur": 84}


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    if not LABELS.is_file():
        pytest.skip(f"no {LABELS}: UNET_FAST_DATA names the folder with isbi2012/")
    if slow := _native.why_not(torch.device("cpu")):
        pytest.skip(f"three slices take minutes in plain Python: {slow}")
    return pytest.importorskip("tifffile").imread(LABELS, key=range(3))


def guess(name: str, labels: np.ndarray) -> np.ndarray:
    b = (labels > 0).astype(np.float32)
    if name == "shift1":
        return np.roll(b, 1, axis=2)
    return np.stack([ndimage.gaussian_filter(each, 1.5) for each in b]) if name == "blur" else b


@pytest.mark.parametrize("name", GOLDEN)
def test_every_digit_is_the_one_that_the_program_of_the_challenge_prints(name: str, labels: np.ndarray) -> None:
    prediction = guess(name, labels)
    scores = {measure.__name__: measure(prediction, labels, parts=True) for measure in FIVE.values()}
    warping = scores["warping_error"]
    found = {
        "warping_error": f"{warping['error']:.8f}",
        "plain_error": f"{warping['thresholds'][5]['plain_error']:.8f}",
        "rand_error": f"{scores['rand_error']['error']:.6f}",
        "pixel_error": f"{scores['pixel_error']['error']:.6f}",
        "v_rand": f"{scores['v_rand']['v_rand']:.6f}",
        "v_info": f"{scores['v_info']['v_info']:.6f}",
        # scikit-image's number, at 0.5
        "adapted_rand_error": f"{adapted_rand_error(components(prediction > 0.5), components(labels)):.6f}",
    }
    assert found == dict(zip(COLUMNS, GOLDEN[name], strict=True))
    assert warping["split"] + warping["merge"] == WRONG_PIXELS[name]
    assert warping["pixels"] == labels.size


# ---------------------------------------------------------------------------------------------------- definitions


def kept(prediction: np.ndarray, truth: np.ndarray) -> list[tuple[Any, Any]]:
    """(predicted, true) of each pixel that is not ignored."""
    return [(p, t) for p, t in zip(prediction.ravel().tolist(), truth.ravel().tolist(), strict=True) if t >= 0]


@given(probabilities, stacks(-1, 2), st.sampled_from([np.float32, np.float64]))
@ordinary
def test_pixel_error_is_one_less_the_greatest_f1_of_eleven_thresholds(prediction, truth, dtype) -> None:
    prediction = prediction.astype(dtype)
    pixels, expected = kept(prediction.astype(np.float32), truth), []
    for threshold in ELEVEN:
        tp = sum(p > threshold and t > 0 for p, t in pixels)
        fp = sum(p > threshold and t == 0 for p, t in pixels)
        fn = sum(p <= threshold and t > 0 for p, t in pixels)
        precision, recall = tp / (tp + fp) if tp + fp else None, tp / (tp + fn) if tp + fn else None
        f_score = 2 * tp / (2 * tp + fp + fn) if tp else 0.0
        row = {"threshold": threshold, "tp": tp, "fp": fp, "fn": fn}
        expected.append({**row, "precision": precision, "recall": recall, "f_score": f_score})
    if not (truth > 0).any():
        with pytest.raises(ValueError, match=r"^truth must have a cell"):
            pixel_error(prediction, truth)
        return
    parts = pixel_error(prediction, truth, parts=True)
    assert parts["thresholds"] == expected
    best = next(row for row in expected if row["f_score"] == max(row["f_score"] for row in expected))
    assert [parts[k] for k in ("threshold", "precision", "recall", "f_score")] == [
        best[k] for k in ("threshold", "precision", "recall", "f_score")
    ]
    assert pixel_error(prediction, truth) == parts["error"] == 1 - best["f_score"]


def test_pixel_error_adds_its_thresholds_up_in_double() -> None:
    thresholds = [row["threshold"] for row in pixel_error([[1.0]], [[1]], parts=True)["thresholds"]]
    assert len(thresholds) == 11
    assert thresholds[3] == 0.30000000000000004
    assert thresholds[-1] == 0.9999999999999999
    # so a probability of 1 is above all eleven, and float32(0.3) is above the fourth though the double 0.3 is not
    counted = pixel_error([[1.0, 0.3]], [[1, 1]], parts=True)["thresholds"]
    assert [row["tp"] for row in counted] == [2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1]


def test_a_probability_lies_above_the_same_thresholds_for_every_score() -> None:
    # two cells and a gap of probability p: joined at the thresholds below float32(p), apart at the others
    truth = np.array([[1, 1, 0, 1, 1]] * 3)
    for p in EDGES:
        prediction = np.where(truth, 1.0, p)
        joined = [float(np.float32(p)) > threshold for threshold in ELEVEN]
        for name, measure in SEVEN.items():
            rows = measure(prediction, truth, parts=True)["thresholds"]
            wrong = {
                "warping_error": lambda row: row["merge"] > 0,
                "pixel_error": lambda row: row["fp"] > 0,
            }.get(name, lambda row: row["precision"] < 1)
            assert [wrong(row) for row in rows] == joined[: len(rows)], (name, p)


def cells_and_segments(
    prediction: np.ndarray, truth: np.ndarray, threshold: float, thinned: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """In each slice with a cell, the cell of each of the cells' pixels, and its segment: one by itself without one."""
    for p, t in zip(prediction, truth, strict=True):
        above = (p.astype(np.float32).astype(np.float64) > threshold) & (t >= 0)
        cells = ndimage.label(t > 0)[0]
        segments = topology.watershed_cells(above) if thinned else ndimage.label(above)[0]
        inside = cells > 0
        if inside.any():
            segment = segments[inside].astype(int)
            yield cells[inside], np.where(segment > 0, segment, -1 - np.arange(segment.size))


def pairs_of(cell: np.ndarray, segment: np.ndarray) -> np.ndarray:
    """Of all pairs of pixels, a pixel with itself too: in one cell and one segment, in one segment, in one cell."""
    same_cell, same_segment = cell[:, None] == cell, segment[:, None] == segment
    return np.array([(same_cell & same_segment).sum(), same_segment.sum(), same_cell.sum()])


def of_pairs(both: int, same_segment: int, same_cell: int) -> list[float]:
    """Precision, recall, F-score."""
    precision, recall = both / same_segment, both / same_cell
    return [precision, recall, 2 * precision * recall / (precision + recall)]


def of_probabilities(cell: np.ndarray, segment: np.ndarray) -> list[float]:
    """I / H(T), I / H(S) and their harmonic mean, from the table of probabilities of (cell, segment)."""
    rows, columns = (np.unique(ids, return_inverse=True)[1] for ids in (cell, segment))
    table = np.zeros((rows.max() + 1, columns.max() + 1))
    np.add.at(table, (rows, columns), 1 / cell.size)
    of_cell, of_segment = table.sum(1), table.sum(0)
    filled = table > 0
    information = (table[filled] * np.log(table[filled] / np.outer(of_cell, of_segment)[filled])).sum()
    entropies = [-(of * np.log(of)).sum() if of.size > 1 else 0.0 for of in (of_cell, of_segment)]
    return [
        part / whole if whole else 1.0
        for part, whole in ((information, entropies[0]), (information, entropies[1]), (2 * information, sum(entropies)))
    ]


def expect_rows(parts: dict[str, Any], expected: list[list[float]]) -> None:
    assert [row["threshold"] for row in parts["thresholds"]] == ELEVEN
    found = [[row[name] for name in ("precision", "recall", "f_score")] for row in parts["thresholds"]]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)
    assert parts["f_score"] == pytest.approx(max(f_score for *_, f_score in expected), abs=1e-9)


@given(probabilities, truths)
@ordinary
def test_rand_error_counts_the_pairs_of_pixels_of_all_slices(prediction, truth) -> None:
    expected = []
    for threshold in ELEVEN:
        slices = [pairs_of(*both) for both in cells_and_segments(prediction, truth, threshold, thinned=False)]
        expected.append(of_pairs(*sum(slices).tolist()))
    parts = rand_error(prediction, truth, parts=True)
    expect_rows(parts, expected)
    assert rand_error(prediction, truth) == parts["error"] == 1 - parts["f_score"]


@pytest.mark.parametrize("thinned", [False, True], ids=["components", "thinned"])
@given(prediction=probabilities, truth=truths)
@ordinary
def test_v_rand_is_the_mean_over_slices_of_what_pairs_of_pixels_say(prediction, truth, thinned: bool) -> None:
    expected = []
    for threshold in ELEVEN:
        slices = cells_and_segments(prediction, truth, threshold, thinned)
        expected.append(np.mean([of_pairs(*pairs_of(*both)) for both in slices], axis=0))
    parts = v_rand(prediction, truth, thinned=thinned, parts=True)
    expect_rows(parts, expected)
    assert v_rand(prediction, truth, thinned=thinned) == parts["v_rand"] == parts["f_score"]


@pytest.mark.parametrize("thinned", [False, True], ids=["components", "thinned"])
@given(prediction=probabilities, truth=truths)
@ordinary
def test_v_info_is_the_mean_over_slices_of_shares_of_entropy(prediction, truth, thinned: bool) -> None:
    expected = []
    for threshold in ELEVEN:
        slices = cells_and_segments(prediction, truth, threshold, thinned)
        expected.append(np.mean([of_probabilities(*both) for both in slices], axis=0))
    parts = v_info(prediction, truth, thinned=thinned, parts=True)
    expect_rows(parts, expected)
    assert v_info(prediction, truth, thinned=thinned) == parts["v_info"] == parts["f_score"]


def expect_warping(prediction: np.ndarray, truth: np.ndarray, mask: np.ndarray | None, radius: int) -> dict[str, Any]:
    """Compare with the specification, slice by slice; returns the parts."""
    counted = truth >= 0 if mask is None else (truth >= 0) & (mask > 0)
    values, pixels, rows, drawn = prediction.astype(np.float32).astype(np.float64), int((truth >= 0).sum()), [], []
    for threshold in ELEVEN[:10]:
        maps = []
        for p, t, c in zip(values, truth, counted, strict=True):
            warped = topology.homotopic_warp(p, t > 0, threshold, c)
            maps.append(topology.mismatch_kinds(warped, p > threshold, c, radius))
        drawn.append(np.stack(maps))
        counts = {kind: int((drawn[-1] == i).sum()) for i, kind in enumerate(topology.KINDS) if i}
        error, plain = (counts["split"] + counts["merge"]) / pixels, sum(counts.values()) / pixels
        rows.append({"threshold": threshold, **counts, "error": error, "plain_error": plain})
    parts = warping_error(prediction, truth, mask=mask, radius=radius, parts=True)
    assert parts["thresholds"] == rows
    best = [row["error"] for row in rows].index(min(row["error"] for row in rows))
    expected = {kind: np.argwhere(drawn[best] == i).tolist() for i, kind in enumerate(topology.KINDS) if i}
    assert parts["errors"] == expected
    assert [parts[name] for name in ("threshold", "error", "split", "merge", "pixels")] == [
        *(rows[best][name] for name in ("threshold", "error", "split", "merge")),
        pixels,
    ]
    assert warping_error(prediction, truth, mask=mask, radius=radius) == parts["error"]
    np.testing.assert_array_equal(warping_map(prediction, truth, 0.4, mask=mask, radius=radius), drawn[4])
    return parts


@given(probabilities, truths, st.one_of(st.none(), stacks(-1, 3)), st.sampled_from([1, 2, 20]))
@ordinary
def test_warping_error_is_that_of_the_specification(prediction, truth, mask, radius) -> None:
    expect_warping(prediction, truth, mask, radius)


@pytest.mark.parametrize("seed", range(3))
def test_warping_error_is_that_of_the_specification_where_cells_are_many(seed: int) -> None:
    parts = expect_warping(*cells_and_a_guess(seed), None, 20)
    # or there would be nothing to classify
    for kind in ("split", "merge", "hole_addition", "hole_deletion"):
        assert any(row[kind] for row in parts["thresholds"])


# ---------------------------------------------------------------------------------------------------- by eye


def drawn(picture: str) -> np.ndarray:
    return np.array([[character == "#" for character in line] for line in picture.split()]).astype(int)


TWO_CELLS = drawn("###.### ###.### ###.### ###.###")


@pytest.mark.parametrize(
    ("truth", "prediction", "kind", "pixels"),
    [
        (TWO_CELLS, np.ones((4, 7), int), "merge", 4),
        # from both ends the truth recedes along the gap, until one pixel joins the cells
        (np.ones((4, 7), int), TWO_CELLS, "split", 1),
        (drawn("##### ##### ##### #####"), drawn("##### ##.## ##### #####"), "hole_addition", 1),
        (drawn("##### ##.## ##### #####"), drawn("##### ##### ##### #####"), "hole_deletion", 1),
        (drawn("##... ##... ....."), drawn("##... ##..# ....."), "object_addition", 1),
        (drawn("##..# ##..# ....."), drawn("##... ##... ....."), "object_deletion", 1),
    ],
    ids=["merge", "split", "hole_addition", "hole_deletion", "object_addition", "object_deletion"],
)
def test_a_drawn_error_is_of_the_kind_that_a_reader_sees(truth, prediction, kind: str, pixels: int) -> None:
    parts = warping_error(prediction, truth, parts=True)
    found = {name: len(where) for name, where in parts["errors"].items()}
    assert found == {**dict.fromkeys(topology.KINDS[1:], 0), kind: pixels}
    costs = kind in ("split", "merge")
    assert parts["error"] == (pixels / truth.size if costs else 0)
    assert parts["thresholds"][0]["plain_error"] == pixels / truth.size
    assert (parts["split_places"], parts["merge_places"]) == (int(kind == "split"), int(kind == "merge"))


def test_borders_that_move_without_parting_or_joining_cells_are_no_warping_errors() -> None:
    thick, thin = drawn("#...### ##..### ##...## #....##"), TWO_CELLS
    for prediction, truth in ((thick, thin), (thin, thick)):
        rows = warping_error(prediction, truth, parts=True)["thresholds"]
        assert {row["plain_error"] for row in rows} == {0.0}
        assert rand_error(prediction, truth) > 0 or truth is thick


def test_a_ring_that_is_cut_is_a_split_only_within_a_radius_that_does_not_see_its_other_way_round() -> None:
    ring = np.pad(np.pad(np.zeros((5, 5), int), 1, constant_values=1), 1)
    cut = ring.copy()
    cut[1, 4] = 0
    kinds = {radius: warping_map(cut, ring, 0.5, radius=radius)[1, 4] for radius in (1, 2, 5, 6, 20)}
    split, hole = topology.KINDS.index("split"), topology.KINDS.index("hole_deletion")
    assert kinds == {1: split, 2: split, 5: split, 6: hole, 20: hole}
    parts = warping_error(cut, ring, radius=5, parts=True)
    assert (parts["error"], parts["errors"]["split"]) == (1 / ring.size, [[0, 1, 4]])
    assert warping_error(cut, ring) == 0.0


def test_places_are_counted_by_sides_for_splits_by_corners_for_mergers_and_apart_in_each_slice() -> None:
    split, merge = topology.KINDS.index("split"), topology.KINDS.index("merge")
    corners = np.eye(3, dtype=np.uint8)
    assert error_places(split * corners) == {"split": 3, "merge": 0}
    assert error_places(merge * corners) == {"split": 0, "merge": 1}
    bar = np.array([[1, 1, 1, 0, 1]], np.uint8)
    assert error_places(np.stack([split * bar, split * bar])) == {"split": 4, "merge": 0}
    assert error_places(np.stack([merge * bar, split * bar, 3 * bar])) == {"split": 2, "merge": 2}


def test_the_width_of_a_border_is_nothing_to_the_thinned_scores() -> None:
    def grid(width: int) -> np.ndarray:
        """Three by three cells every 12 pixels, with a border of so many pixels between them."""
        line = np.abs((np.arange(36) - 12 + 6) % 12 - 6) > width // 2
        line[:6] = line[-6:] = True
        return np.outer(line, line).astype(int)

    truth = grid(1)
    assert components(truth).max() == 9
    for width in (1, 3, 5, 7):
        prediction = grid(width)
        for measure in (v_rand, v_info):
            assert measure(prediction, truth) == pytest.approx(1.0, abs=1e-12)
            assert (measure(prediction, truth, thinned=False) < 1) == (width > 1)
        assert (rand_error(prediction, truth) > 0) == (width > 1)
        assert warping_error(prediction, truth) == 0


def test_a_thinned_cut_lowers_recall_and_a_thinned_gap_precision() -> None:
    cut = drawn("#..#.### #..#.### #..#.### #..#.###")
    gap = drawn("######## ####.### ####.### ####.###")
    truth = drawn("####.### ####.### ####.### ####.###")
    for measure in (v_rand, v_info):
        split, merged = measure(cut, truth, parts=True), measure(gap, truth, parts=True)
        assert (split["precision"], merged["recall"]) == pytest.approx((1, 1), abs=1e-12)
        assert split["recall"] < 0.9
        assert merged["precision"] < 0.9


# ---------------------------------------------------------------------------------------------------- laws


@given(truths)
@ordinary
def test_a_truth_is_perfect_for_itself(truth) -> None:
    found = {name: measure(truth > 0, truth) for name, measure in SEVEN.items()}
    assert found == pytest.approx(PERFECT, abs=1e-12)


@given(probabilities, truths)
@ordinary
def test_every_score_lies_between_none_and_all(prediction, truth) -> None:
    for measure in SEVEN.values():
        parts = measure(prediction, truth, parts=True)
        value = measure(prediction, truth)
        assert 0 <= value <= 1
        for row in (parts, *parts["thresholds"]):
            ratios = [row[name] for name in ("error", "plain_error", "precision", "recall", "f_score") if name in row]
            assert all(0 <= ratio <= 1 for ratio in ratios if ratio is not None)


@each(SEVEN)
@given(prediction=probabilities, truth=truths)
@repeated
def test_the_threshold_is_the_lowest_of_the_best(prediction, truth, measure) -> None:
    parts = measure(prediction, truth, parts=True)
    rows = parts["thresholds"]
    if measure is warping_error:
        best = min(range(10), key=lambda i: (rows[i]["split"] + rows[i]["merge"], i))
        names = ["error", "threshold", "split", "merge"]
    else:
        best = max(range(11), key=lambda i: (rows[i]["f_score"], -i))
        names = ["threshold", "precision", "recall", "f_score"]
    assert [row["threshold"] for row in rows] == ELEVEN[: len(rows)]
    assert len(rows) == (10 if measure is warping_error else 11)
    assert {name: parts[name] for name in names} == {name: rows[best][name] for name in names}


def count_groups(places: list[list[int]], corners: bool) -> int:
    left, groups = {tuple(place) for place in places}, 0
    while left:
        groups += 1
        edge = [left.pop()]
        while edge:
            z, y, x = edge.pop()
            steps = [(dy, dx) for dy, dx in product((-1, 0, 1), repeat=2) if corners or 0 in (dy, dx)]
            near = {(z, y + dy, x + dx) for dy, dx in steps} & left
            left -= near
            edge += near
    return groups


@pytest.mark.parametrize("seed", range(6))
def test_errors_lie_where_they_are_counted(seed: int) -> None:
    prediction, truth = cells_and_a_guess(seed)
    parts = warping_error(prediction, truth, parts=True)
    row = next(row for row in parts["thresholds"] if row["threshold"] == parts["threshold"])
    assert {kind: len(where) for kind, where in parts["errors"].items()} == {k: row[k] for k in topology.KINDS[1:]}
    everywhere = [tuple(place) for where in parts["errors"].values() for place in where]
    assert len(everywhere) == len(set(everywhere)) > 0
    for place in everywhere:
        assert all(0 <= i < n for i, n in zip(place, truth.shape, strict=True))
        assert truth[place] >= 0
    assert parts["split_places"] == count_groups(parts["errors"]["split"], corners=False)
    assert parts["merge_places"] == count_groups(parts["errors"]["merge"], corners=True)
    assert parts["split"] + parts["merge"] > 0
    kinds = warping_map(prediction, truth, parts["threshold"])
    assert (kinds.shape, kinds.dtype) == (truth.shape, np.uint8)
    assert error_places(kinds) == {"split": parts["split_places"], "merge": parts["merge_places"]}
    for kind, where in parts["errors"].items():
        assert np.argwhere(kinds == topology.KINDS.index(kind)).tolist() == where
    np.testing.assert_array_equal(warping_map(prediction[0], truth[0], parts["threshold"]), kinds[0])


@each(SEVEN)
@given(prediction=probabilities, truth=truths, order=st.permutations([0, 1, 2, 3]))
@repeated
def test_slices_have_no_order_and_may_come_twice(prediction, truth, order, measure) -> None:
    twice = measure(prediction[[0, 1, 0, 1]][order], truth[[0, 1, 0, 1]][order], parts=True)
    once = measure(prediction, truth, parts=True)
    names = {"error", "threshold", "precision", "recall", "f_score", "v_rand", "v_info"} & set(once)
    assert {name: twice[name] for name in names} == {name: once[name] for name in names}
    assert measure(prediction[::-1], truth[::-1]) == measure(prediction, truth)


@each(SEVEN)
@given(
    prediction=probabilities,
    truth=truths,
    noise=st.lists(st.floats(-3, 9), min_size=math.prod(SHAPE), max_size=math.prod(SHAPE)),
)
@repeated
def test_what_is_predicted_on_ignored_pixels_changes_nothing(prediction, truth, noise, measure) -> None:
    expected = measure(prediction, truth, parts=True)
    spoilt = np.where(truth < 0, np.reshape(noise, SHAPE), prediction)
    assert measure(spoilt, truth, parts=True) == expected
    # and it is no matter which negative number says so
    assert measure(prediction, np.where(truth < 0, -7, truth), parts=True) == expected


@each(OF_COMPONENTS | {"pixel_error": pixel_error})
@given(prediction=probabilities, truth=truths)
@repeated
def test_a_margin_that_is_ignored_changes_nothing(prediction, truth, measure) -> None:
    margin = ((0, 1), (2, 1), (0, 3))
    wider = np.pad(prediction, margin, constant_values=1), np.pad(truth, margin, constant_values=-1)
    assert measure(*wider, parts=True) == measure(prediction, truth, parts=True)


@given(probabilities, truths)
@ordinary
def test_how_an_image_lies_changes_neither_pixels_nor_pairs(prediction, truth) -> None:
    for turn in (lambda a: a[:, ::-1], lambda a: a[:, :, ::-1], lambda a: a.swapaxes(1, 2)):
        turned = turn(prediction), turn(truth)
        for measure in (pixel_error, rand_error, partial(v_rand, thinned=False)):
            assert measure(*turned, parts=True) == measure(prediction, truth, parts=True)
        assert v_info(*turned, thinned=False) == pytest.approx(v_info(prediction, truth, thinned=False), abs=1e-12)


@each(SEGMENTING)
@given(truth=truths, more=stacks(0, 1))
@repeated
def test_cells_that_are_merged_cost_precision_and_no_recall(truth, more, measure) -> None:
    mask = (truth > 0) | ((truth == 0) & (more > 0))
    merged = False
    for wide, cells in zip(mask, truth > 0, strict=True):
        segments = ndimage.label(wide)[0]
        merged |= len(np.unique(segments[cells])) < ndimage.label(cells)[1]
    parts = measure(mask, truth, parts=True)
    assert parts["recall"] == pytest.approx(1, abs=1e-12)
    assert (parts["precision"] < 1 - 1e-6) == merged


@each(OF_COMPONENTS)
@given(truth=truths, less=stacks(0, 1))
@repeated
def test_cells_that_are_split_or_missed_cost_recall_and_no_precision(truth, less, measure) -> None:
    mask = (truth > 0) & (less == 0)
    lost = False
    for narrow, wide in zip(mask, truth > 0, strict=True):
        cells = ndimage.label(wide)[0]
        area = np.bincount(cells.ravel())
        # a cell of one pixel is a segment by itself whether it is found or not
        lost |= bool((area[cells[wide & ~narrow]] > 1).any())
    parts = measure(mask, truth, parts=True)
    assert parts["precision"] == pytest.approx(1, abs=1e-12)
    assert (parts["recall"] < 1 - 1e-6) == lost


@pytest.mark.slow
@each(SEVEN)
@given(prediction=probabilities, truth=truths)
@repeated
def test_neither_numbers_nor_types_nor_containers_are_a_matter(prediction, truth, measure) -> None:
    expected = measure(prediction, truth, parts=True)
    single = prediction.astype(np.float32)
    for given_ in (single, single.astype(np.float64), torch.from_numpy(prediction), prediction.tolist()):
        assert measure(given_, truth, parts=True) == expected
    for dtype in (np.int8, np.int64):
        assert measure(prediction, truth.astype(dtype), parts=True) == expected
    assert measure(prediction, torch.from_numpy(truth), parts=True) == expected

    cells = truth > 0
    expected = measure(prediction, cells, parts=True)
    for same in (cells * np.uint8(255), cells * np.uint16(40000), cells * np.uint64(3), torch.from_numpy(cells)):
        assert measure(prediction, same, parts=True) == expected

    mask = prediction > 0.45
    expected = measure(mask, truth, parts=True)
    for same in (mask * np.uint8(255), mask * np.int64(1), mask * np.uint64(9), mask * np.float16(1), mask.tolist()):
        assert measure(same, truth, parts=True) == expected


@each(SEVEN)
@given(prediction=probabilities, truth=truths)
@repeated
def test_an_image_is_a_stack_of_one(prediction, truth, measure) -> None:
    assert measure(prediction[0], truth[0], parts=True) == measure(prediction[:1], truth[:1], parts=True)
    assert measure(prediction[0], truth[0]) == measure(prediction[:1], truth[:1])


def test_slices_without_a_cell_are_left_out_of_the_means() -> None:
    prediction, truth = cells_and_a_guess(0)
    empty = np.zeros_like(truth)
    for measure in (v_rand, v_info):
        for thinned in (False, True):
            more = np.concatenate([prediction, prediction]), np.concatenate([truth, empty])
            assert measure(*more, thinned=thinned) == measure(prediction, truth, thinned=thinned) < 1


@given(probabilities, truths, stacks(-1, 2))
@ordinary
def test_warping_errors_lie_inside_the_mask_and_are_a_share_of_the_whole_image(prediction, truth, mask) -> None:
    free = warping_error(prediction, truth, parts=True)
    for every in (np.ones(SHAPE, bool), np.full(SHAPE, 255, np.uint8), torch.ones(SHAPE, dtype=torch.int16)):
        assert warping_error(prediction, truth, mask=every, parts=True) == free
    parts = warping_error(prediction, truth, mask=mask, parts=True)
    assert parts["pixels"] == free["pixels"] == (truth >= 0).sum()
    for where in parts["errors"].values():
        assert all(mask[tuple(place)] > 0 and truth[tuple(place)] >= 0 for place in where)
    assert warping_error(prediction, truth, mask=mask > 0, parts=True) == parts
    assert warping_error(prediction, truth, mask=mask * 0) == 0
    assert warping_error(prediction[0], truth[0], mask=mask[0]) == warping_error(
        prediction[:1], truth[:1], mask=mask[:1]
    )


def test_a_gap_outside_the_mask_is_not_seen() -> None:
    closed, mask = np.ones_like(TWO_CELLS), np.ones_like(TWO_CELLS)
    assert warping_error(closed, TWO_CELLS) == 4 / 28
    mask[2:] = 0
    assert warping_error(closed, TWO_CELLS, mask=mask) == 2 / 28
    ignored = np.where(mask, TWO_CELLS, -1)
    assert warping_error(closed, ignored) == 2 / 14


@each(SEVEN)
def test_parts_are_json(measure) -> None:
    nothing = np.zeros((28, 28))
    for prediction, truth in (cells_and_a_guess(1), (nothing, cells_and_a_guess(1)[1][0])):
        parts = measure(prediction, truth, parts=True)
        assert json.loads(json.dumps(parts, allow_nan=False)) == parts


def test_a_prediction_of_nothing_is_blamed_by_all_but_the_warping_error() -> None:
    truth = TWO_CELLS
    found = {name: measure(np.zeros(truth.shape), truth) for name, measure in SEVEN.items()}
    assert (found["warping_error"], found["pixel_error"]) == (0, 1)
    # each of the 24 pixels by itself: 24 pairs against 288; I = H(T) = log 2 of H(S) = log 24
    assert found["rand_error"] == pytest.approx(1 - 2 * 24 / (288 + 24))
    assert found["v_info of components"] == pytest.approx(2 * math.log(2) / (math.log(2) + math.log(24)))
    # without a component all is one basin
    assert found["v_rand"] == pytest.approx(2 * 288 / (288 + 576))
    assert found["v_info"] == 0


# ---------------------------------------------------------------------------------------------------- counts


MIXED = cells_and_a_guess(2)


def counts_of(prediction: np.ndarray, truth: np.ndarray, *wanted: str) -> ChallengeCounts:
    arrays = prediction.astype(np.float32), np.sign(truth).astype(np.int8)
    return ChallengeCounts.of(*arrays, wanted) if wanted else ChallengeCounts.of(*arrays)


def scores_of(counts: ChallengeCounts) -> dict[str, Any]:
    return {
        **{name: getattr(counts, name)() for name in FIVE},
        "v_rand of components": counts.v_rand(thinned=False),
        "v_info of components": counts.v_info(thinned=False),
    }


@given(probabilities, truths)
@ordinary
def test_counts_of_slices_pool_to_the_scores_of_the_stack(prediction, truth) -> None:
    slices = [counts_of(prediction[i : i + 1], truth[i : i + 1]) for i in range(len(truth))]
    scores = scores_of(ChallengeCounts.pooled(slices))
    assert scores == scores_of(counts_of(prediction, truth))
    for name, measure in SEVEN.items():
        parts = measure(prediction, truth, parts=True)
        assert {key: parts[key] for key in scores[name]} == scores[name]


def test_counts_pool_images_of_any_sizes() -> None:
    images = [tuple(array[z : z + 1, :height] for array in MIXED) for z, height in ((0, 28), (1, 17))]
    pooled = ChallengeCounts.pooled([counts_of(*image) for image in images])
    # what is missing of the lesser one, ignored
    prediction, truth = (
        np.concatenate([a, np.pad(b, ((0, 0), (0, 11), (0, 0)))]) for a, b in zip(*images, strict=True)
    )
    truth[1, 17:] = -1
    expected = {name: measure(prediction, truth, parts=True) for name, measure in OF_COMPONENTS.items()}
    scores = scores_of(pooled)
    assert {name: scores[name] for name in expected} == expected
    assert scores["pixel_error"] == pixel_error(prediction, truth, parts=True)
    # each image by itself: pixels of both kinds, of both images
    alone = [warping_error(*image, parts=True)["thresholds"] for image in images]
    for row, *rows in zip(scores["warping_error"]["thresholds"], *alone, strict=True):
        assert {kind: row[kind] for kind in topology.KINDS[1:]} == {
            kind: sum(each[kind] for each in rows) for kind in topology.KINDS[1:]
        }
    assert pooled.pixels == sum(int((t >= 0).sum()) for _, t in images)


@pytest.mark.parametrize("wanted", ["areas", "warping", "segments", "thinned"])
def test_what_was_not_asked_for_is_not_counted(wanted: str) -> None:
    counts = counts_of(*MIXED, wanted)
    for each in (counts, ChallengeCounts.pooled([counts, counts])):
        found = {name for name in ("areas", "warping", "segments", "thinned") if getattr(each, name) is not None}
        assert found == {wanted}
    assert counts.cell_pixels == (MIXED[1] > 0).sum()


# ---------------------------------------------------------------------------------------------------- refusals

HERE = np.array([[1, 0, 1], [1, 0, 1]])
FIVE_AND_A_MAP: dict[str, Callable[..., Any]] = FIVE | {"warping_map": lambda p, t: warping_map(p, t, 0.5)}


def expect(error: type[Exception], sentence: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == sentence
    assert "\n" not in sentence


@each(FIVE_AND_A_MAP)
def test_shapes_are_checked_by_name(measure) -> None:
    image = "must be [H, W] or [D, H, W] with at least one pixel, got shape"
    refused = {
        "prediction and truth must have one shape, got (2, 3) and (2, 2)": (HERE, HERE[:, :2]),
        "prediction and truth must have one shape, got (2, 3) and (1, 2, 3)": (HERE, HERE[None]),
        f"prediction {image} (3,)": (HERE[0], HERE),
        f"prediction {image} ()": (1, HERE),
        f"prediction {image} (2, 0)": (HERE[:, :0], HERE),
        f"truth {image} (3,)": (HERE, HERE[0]),
        f"truth {image} (0, 2, 3)": (HERE, HERE[None][:0]),
        f"truth {image} (1, 1, 2, 3)": (HERE, HERE[None, None]),
    }
    for sentence, arguments in refused.items():
        expect(ValueError, sentence, lambda arguments=arguments: measure(*arguments))


@each(FIVE_AND_A_MAP)
@pytest.mark.parametrize(
    ("value", "got"),
    [
        (1.25, "0 to 1.25; a softmax or sigmoid makes probabilities of logits"),
        (255.0, "0 to 255; divide by 255 if these are grey values"),
        (np.inf, "0 to inf"),
        (-0.5, "-0.5 to 1; a softmax or sigmoid makes probabilities of logits"),
        (-np.inf, "-inf to 1; a softmax or sigmoid makes probabilities of logits"),
        (1e6, "0 to 1e+06; divide by the greatest that can be"),
    ],
    ids=str,
)
def test_probabilities_lie_between_0_and_1(value: float, got: str, measure) -> None:
    prediction = HERE.astype(float)
    prediction[1, 2] = value
    expect(
        ValueError, f"prediction must be the probability of cell, 0 to 1, got {got}", lambda: measure(prediction, HERE)
    )


@each(FIVE_AND_A_MAP)
def test_grey_values_are_no_mask(measure) -> None:
    grey = np.array([[250, 0, 3], [1, 0, 200]], np.uint8)
    sentence = (
        "prediction must be the probability of cell, 0 to 1, got 0 to 250; (prediction > 0) makes a mask of ids, "
        "prediction / 255 probabilities of grey values"
    )
    expect(ValueError, sentence, lambda: measure(grey, HERE))


@each(FIVE_AND_A_MAP)
def test_nan_and_what_is_no_number_are_refused(measure) -> None:
    spoilt = HERE.astype(float)
    spoilt[0, 1] = np.nan
    expect(ValueError, "prediction must not be NaN, got 1 of 6 pixels that are", lambda: measure(spoilt, HERE))
    for labels in (spoilt, HERE.astype(np.float64)):
        expect(
            TypeError,
            "truth must hold whole numbers, got float64; (truth > 0) makes a mask of it",
            lambda labels=labels: measure(HERE, labels),
        )
    sentence = "prediction must be boolean, integer or float, got complex128"
    expect(TypeError, sentence, lambda: measure(HERE + 0j, HERE))


@each(FIVE)
@pytest.mark.parametrize("truth", [HERE * 0, -HERE], ids=["background", "ignored"])
def test_a_truth_without_a_cell_is_refused(measure, truth: np.ndarray) -> None:
    expect(
        ValueError,
        "truth must have a cell to be found, got none (no value above 0) in 6 pixels",
        lambda: measure(HERE, truth),
    )


def test_a_map_of_errors_needs_no_cell() -> None:
    addition = topology.KINDS.index("object_addition")
    assert warping_map([[1, 0, 0]], [[0, 0, 0]], 0.5).tolist() == [[addition, 0, 0]]


WARPING: dict[str, Callable[..., Any]] = {
    "warping_error": lambda **more: warping_error(HERE, HERE, **more),
    "warping_map": lambda **more: warping_map(HERE, HERE, 0.5, **more),
}


@each(WARPING)
def test_a_mask_has_the_shape_of_truth_and_no_fractions(measure) -> None:
    image = "mask must be [H, W] or [D, H, W] with at least one pixel, got shape"
    for sentence, mask in {
        "mask must have the shape of truth, (2, 3), got (2, 2)": HERE[:, :2],
        "mask must have the shape of truth, (2, 3), got (1, 2, 3)": HERE[None],
        f"{image} (3,)": HERE[0],
        f"{image} (0, 3)": HERE[:0],
    }.items():
        expect(ValueError, sentence, lambda mask=mask: measure(mask=mask))
    sentence = "mask must be boolean or integer, got float64; compare with a threshold first"
    expect(TypeError, sentence, lambda: measure(mask=HERE / 2))


@each(WARPING)
def test_a_radius_is_a_whole_number_of_pixels(measure) -> None:
    for radius in (0, -20):
        expect(ValueError, f"radius must be at least 1, got {radius}", lambda radius=radius: measure(radius=radius))
    for radius in (2.0, True, None, "20"):
        sentence = f"radius must be a whole number, got {radius!r}"
        expect(TypeError, sentence, lambda radius=radius: measure(radius=radius))
    assert not np.any(measure(radius=np.int64(1)))


@each(FIVE_AND_A_MAP)
def test_what_is_no_number_on_an_ignored_pixel_is_nothing(measure) -> None:
    truth, prediction = np.where(HERE == 0, -1, HERE), np.where(HERE == 0, np.nan, 1.0)
    np.testing.assert_array_equal(measure(prediction, truth), measure(np.ones(HERE.shape), truth))


@each(FIVE_AND_A_MAP)
def test_tensors_of_a_training_are_taken_as_they_are(measure) -> None:
    probability = torch.full(HERE.shape, 0.75, requires_grad=True)
    expected = measure(np.full(HERE.shape, 0.75), HERE)
    for tensor in (probability, probability.bfloat16()):
        np.testing.assert_array_equal(measure(tensor, torch.from_numpy(np.array(HERE))), expected)


@each(FIVE_AND_A_MAP)
def test_rows_have_one_length(measure) -> None:
    sentence = "prediction must be [H, W] or [D, H, W], got rows of different lengths"
    expect(ValueError, sentence, lambda: measure([[1.0, 0.0], [1.0]], HERE))


@pytest.mark.parametrize("threshold", [math.nan, "x", None])
def test_a_map_is_drawn_at_a_number(threshold) -> None:
    sentence = f"threshold must be a number, got {threshold!r}"
    expect(ValueError, sentence, lambda: warping_map(HERE, HERE, threshold))
