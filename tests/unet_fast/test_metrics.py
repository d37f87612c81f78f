"""Proves that `unet_fast.metrics` counts what its definitions say: overlaps of foregrounds, and cells against cells.

Every number is compared with loops over pixels and cells that are written from the definitions, on maps small enough
for ties to be common; the adapted Rand error also with scikit-image's. Scores must not depend on how cells are
numbered, how images lie, or how a stack was cut into slices. The scores of the ISBI 2012 challenge have
test_challenge.py.
"""

import doctest
import json
import time
from collections.abc import Callable
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from tests.proof.properties import given, settings, st
from unet_fast import metrics
from unet_fast.metrics import (
    InstanceScores,
    adapted_rand_error,
    components,
    dice,
    instance_scores,
    iou,
    rand_error,
    seg,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*runs in plain Python:RuntimeWarning")

ordinary = settings(derandomize=True, database=None, deadline=None, max_examples=100)

APS = [Fraction(n, 20) for n in range(10, 19)]
SHAPE = (2, 3, 5)


def stacks(low: int, high: int) -> Any:
    """Stacks of SHAPE with whole numbers from low to high; half of them coarse, so that cells have areas."""
    d, h, w = SHAPE
    fine = st.lists(st.integers(low, high), min_size=d * h * w, max_size=d * h * w)
    coarse = st.lists(st.integers(low, high), min_size=d * w, max_size=d * w)
    return st.one_of(
        fine.map(lambda values: np.array(values, np.int32).reshape(SHAPE)),
        coarse.map(lambda values: np.repeat(np.array(values, np.int32).reshape(d, 1, w), h, axis=1)),
    )


# on, just above and just below a half, in both precisions, and anything
EDGES = [0.0, 0.5, *(float(np.nextafter(half(0.5), to)) for half in (np.float32, np.float64) for to in (0, 1)), 1.0]
probabilities = st.lists(
    st.one_of(st.sampled_from(EDGES), st.floats(0, 1)), min_size=int(np.prod(SHAPE)), max_size=int(np.prod(SHAPE))
).map(lambda values: np.array(values).reshape(SHAPE))


def kept(prediction: np.ndarray, truth: np.ndarray) -> list[tuple[Any, Any]]:
    """(predicted, true) of each pixel that is not ignored."""
    return [(p, t) for p, t in zip(prediction.ravel().tolist(), truth.ravel().tolist(), strict=True) if t >= 0]


def cells_of(image: np.ndarray, truth: np.ndarray) -> dict[int, set[tuple[int, int]]]:
    """The pixels of each cell of a slice, without those that the truth ignores."""
    cells: dict[int, set[tuple[int, int]]] = {}
    for y, x in np.ndindex(*image.shape):
        if truth[y, x] >= 0 and image[y, x] > 0:
            cells.setdefault(int(image[y, x]), set()).add((y, x))
    return cells


def most_pairs(choices: list[list[int]]) -> int:
    """Size of the greatest one-to-one matching, by trying everything."""
    if not choices:
        return 0
    rest = choices[1:]
    taking = [1 + most_pairs([[s for s in more if s != mine] for more in rest]) for mine in choices[0]]
    return max([most_pairs(rest), *taking])


def close(a: set[tuple[int, int]], b: set[tuple[int, int]]) -> bool:
    return any(max(abs(y - v), abs(x - u)) <= 1 for y, x in a for v, u in b)


def scores_by_hand(prediction: np.ndarray, truth: np.ndarray) -> InstanceScores:
    """One slice, cell by cell."""
    true, predicted = cells_of(truth, truth), cells_of(prediction, truth)
    ious = {r: {s: Fraction(len(R & S), len(R | S)) for s, S in predicted.items()} for r, R in true.items()}
    pairs = [(a, b) for a in true for b in true if a < b and close(true[a], true[b])]

    def home(r: int) -> int | None:
        return next(
            (s for s, S in predicted.items() if Fraction(len(true[r] & S), len(true[r])) > Fraction(1, 2)), None
        )

    def pieces(R: set[tuple[int, int]]) -> list[set[tuple[int, int]]]:
        return [S for S in predicted.values() if len(R & S) > len(S) / 2 and len(R & S) >= Fraction(len(R), 10)]

    return InstanceScores(
        true_cells=len(true),
        predicted_cells=len(predicted),
        iou_sum=float(sum(max(of.values(), default=Fraction(0)) for of in ious.values())),
        matched=tuple(most_pairs([[s for s, v in of.items() if v >= t] for of in ious.values()]) for t in APS),
        touching_pairs=len(pairs),
        merged_pairs=sum(home(a) is not None and home(a) == home(b) for a, b in pairs),
        split_cells=sum(len(pieces(R)) > 1 for R in true.values()),
    )


# ---------------------------------------------------------------------------------------------------- pixels


@given(probabilities, stacks(-1, 2))
@ordinary
def test_iou_and_dice_count_the_pixels_of_both_foregrounds(prediction, truth) -> None:
    pixels = kept(prediction, truth)
    counts = {
        "tp": sum(p > 0.5 and t > 0 for p, t in pixels),
        "fp": sum(p > 0.5 and t == 0 for p, t in pixels),
        "fn": sum(p <= 0.5 and t > 0 for p, t in pixels),
        "tn": sum(p <= 0.5 and t == 0 for p, t in pixels),
    }
    wrong = counts["fp"] + counts["fn"]
    of_iou = counts["tp"] / (counts["tp"] + wrong) if counts["tp"] + wrong else 1.0
    of_dice = 2 * counts["tp"] / (2 * counts["tp"] + wrong) if counts["tp"] + wrong else 1.0
    assert iou(prediction, truth, parts=True) == {"iou": of_iou, **counts}
    assert dice(prediction, truth, parts=True) == {"dice": of_dice, **counts}
    assert (iou(prediction, truth), dice(prediction, truth)) == (of_iou, of_dice)


@given(probabilities, stacks(-1, 2))
@ordinary
def test_counts_of_a_stack_are_the_sums_of_those_of_its_slices(prediction, truth) -> None:
    for measure in (iou, dice):
        whole = measure(prediction, truth, parts=True)
        slices = [measure(p, t, parts=True) for p, t in zip(prediction, truth, strict=True)]
        for name in ("tp", "fp", "fn", "tn"):
            assert whole[name] == sum(each[name] for each in slices)


def test_two_empty_foregrounds_agree() -> None:
    nothing = np.zeros((3, 4), int)
    assert (iou(nothing, nothing), dice(nothing, nothing)) == (1.0, 1.0)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int16, np.uint16, np.int64, np.uint64])
def test_any_whole_number_makes_a_mask_and_255_is_a_cell(dtype) -> None:
    cell = 1 if dtype is bool else 255
    mask = np.array([[cell, 0, cell], [0, 0, cell]]).astype(dtype)
    for measure in (iou, dice):
        assert measure(mask, mask) == 1.0
        assert measure(mask > 0, mask.tolist()) == measure(torch.from_numpy(mask), mask) == 1.0


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_any_float_holds_probabilities(dtype) -> None:
    probability = np.array([[1, 0.25, 1], [0, 0, 0.75]]).astype(dtype)
    for measure in (iou, dice):
        assert measure(probability, probability > 0.5) == 1.0


# ---------------------------------------------------------------------------------------------------- objects


@given(stacks(0, 4), stacks(-1, 3))
@ordinary
def test_seg_is_the_mean_jaccard_index_of_true_objects_and_their_majority_match(prediction, truth) -> None:
    frames, ids, jaccard, matched, found, hit = [], [], [], 0, 0, set()
    for frame, (p, t) in enumerate(zip(prediction, truth, strict=True)):
        predicted = cells_of(p, t)
        for r, R in sorted(cells_of(t, t).items()):
            good = [S for S in predicted.values() if 2 * len(R & S) > len(R)]
            assert len(good) < 2
            frames.append(frame)
            ids.append(r)
            jaccard.append(len(R & good[0]) / len(R | good[0]) if good else 0.0)
            matched += len(good)
            hit |= {(frame, min(S)) for S in good}
        found += len(predicted)
    if not jaccard:
        with pytest.raises(ValueError, match=r"^truth must have a cell"):
            seg(prediction, truth)
        return
    parts = seg(prediction, truth, parts=True)
    mean = parts.pop("seg")
    counts = {"objects": len(ids), "matched": matched, "missed": len(ids) - matched}
    counts |= {"predicted": found, "unmatched": found - len(hit)}
    assert parts == {**counts, "frame": frames, "id": ids, "jaccard": jaccard}
    assert mean == pytest.approx(sum(jaccard) / len(jaccard))
    assert seg(prediction, truth) == mean


def test_seg_asks_for_more_than_half_and_forgives_what_lies_elsewhere() -> None:
    truth = np.array([[1, 1, 1, 1, 0, 0, 0]])
    assert seg([[1, 1, 0, 0, 0, 0, 0]], truth) == 0.0
    assert seg([[1, 1, 1, 0, 0, 0, 0]], truth) == 0.75
    assert seg([[1, 1, 1, 1, 0, 2, 3]], truth) == 1.0
    assert seg([[1, 1, 1, 1, 1, 1, 1]], truth) == pytest.approx(4 / 7)


def test_seg_names_what_is_missed_and_what_has_no_truth_in_frames_that_are_annotated_in_part() -> None:
    truth = np.array(
        [
            [[1, 1, 0, 2, 2, 0, 3, 3]],  # all annotated: 1 is found, 2 and 3 are one cell
            [[0, 0, 0, 2, 2, 0, 0, 0]],  # one of three
            [[0, 0, 0, 0, 0, 0, 0, 0]],  # none
        ]
    )
    prediction = np.array(
        [
            [[5, 5, 0, 6, 6, 6, 6, 6]],
            [[1, 1, 0, 2, 0, 0, 3, 3]],  # half of it is not more than half
            [[1, 1, 0, 2, 2, 0, 0, 4]],
        ]
    )
    assert seg(prediction, truth, parts=True) == {
        "seg": 0.45,
        "objects": 4,
        "matched": 3,  # by two predicted objects
        "missed": 1,
        "predicted": 8,
        "unmatched": 6,
        "frame": [0, 0, 0, 1],
        "id": [1, 2, 3, 2],
        "jaccard": [1.0, 0.4, 0.4, 0.0],
    }
    # a frame without annotation may be left out, or ignored
    assert seg(prediction[:2], truth[:2]) == seg(prediction, truth)
    truth[2] = -1
    parts = seg(prediction, truth, parts=True)
    assert (parts["seg"], parts["predicted"], parts["unmatched"]) == (0.45, 5, 3)


def test_seg_takes_an_id_for_another_object_in_every_frame() -> None:
    truth = np.array([[[1, 1, 0]], [[1, 0, 0]]])
    prediction = np.array([[[2, 2, 0]], [[0, 2, 0]]])
    assert seg(prediction, truth) == 0.5
    assert seg(prediction, truth, parts=True)["jaccard"] == [1.0, 0.0]


@given(stacks(-1, 1), st.sampled_from([4, 8]))
@ordinary
def test_components_are_what_a_flood_fills(mask, connectivity: int) -> None:
    found = components(mask, connectivity)
    assert (found.dtype, found.shape) == (np.int32, mask.shape)
    np.testing.assert_array_equal(found < 0, mask < 0)
    for given_, labelled in zip(mask, found, strict=True):
        left = cells_of(given_, given_).get(1, set())
        floods = []
        while left:
            flood, edge = set(), [left.pop()]
            while edge:
                y, x = edge.pop()
                flood.add((y, x))
                around = [(v, u) for v, u in left if max(abs(v - y), abs(u - x)) <= 1]
                edge += [(v, u) for v, u in around if connectivity == 8 or v == y or u == x]
                left -= set(edge)
            floods.append(flood)
        cells = cells_of(labelled, given_)
        assert sorted(cells) == list(range(1, len(floods) + 1))
        assert sorted(map(sorted, cells.values())) == sorted(map(sorted, floods))
        np.testing.assert_array_equal(components(given_, connectivity), labelled)


# ---------------------------------------------------------------------------------------------------- pairs


def adapted_by_hand(prediction: np.ndarray, truth: np.ndarray) -> tuple[float, float, float]:
    """(error, precision, recall) of a slice, over its pairs of two pixels of cells."""
    both = of_truth = of_segments = 0
    for (p, t), (q, u) in combinations([(p, t) for p, t in kept(prediction, truth) if t > 0], 2):
        both += p == q and t == u
        of_truth += t == u
        of_segments += p == q
    error = 1 - 2 * both / (of_truth + of_segments) if of_truth + of_segments else 0.0
    return error, both / of_segments if of_segments else 1.0, both / of_truth if of_truth else 1.0


@given(stacks(0, 3), stacks(-1, 2))
@ordinary
def test_adapted_rand_error_counts_pairs_and_is_the_mean_of_slices_with_a_cell(prediction, truth) -> None:
    slices = [adapted_by_hand(p, t) for p, t in zip(prediction, truth, strict=True) if (t > 0).any()]
    if not slices:
        with pytest.raises(ValueError, match=r"^truth must have a cell"):
            adapted_rand_error(prediction, truth)
        return
    parts = adapted_rand_error(prediction, truth, parts=True)
    error, precision, recall = np.mean(slices, axis=0)
    assert parts == pytest.approx({"error": error, "precision": precision, "recall": recall}, abs=1e-12)
    assert adapted_rand_error(prediction, truth) == parts["error"]


@given(stacks(0, 3), stacks(-1, 2))
@ordinary
def test_adapted_rand_error_is_that_of_scikit_image_whose_precision_is_our_recall(prediction, truth) -> None:
    theirs = pytest.importorskip("skimage.metrics").adapted_rand_error
    for p, t in zip(prediction, truth, strict=True):
        t[0, :2] = 1
        p[0, :2] = 1  # a pair of pixels in one cell and in one segment: or theirs divides by 0
        error, precision, recall = theirs(np.maximum(t, 0), p)
        parts = adapted_rand_error(p, t, parts=True)
        assert parts == pytest.approx({"error": error, "precision": recall, "recall": precision}, abs=1e-12)


def test_adapted_rand_error_takes_predicted_background_for_one_segment_and_rand_error_does_not() -> None:
    truth = np.ones((1, 8), int)
    prediction = np.array([[1, 1, 1, 1, 0, 0, 0, 0]])
    # 12 of 56 ordered pairs in either half, all of them in the cell
    assert adapted_rand_error(prediction, truth, parts=True) == {"error": 0.4, "precision": 1.0, "recall": 24 / 56}
    # 16 and four single ones of 64
    assert rand_error(prediction, truth) == pytest.approx(1 - 2 * 20 / (64 + 20))


def test_adapted_rand_error_sees_mergers_in_precision_and_splits_in_recall() -> None:
    truth = np.array([[1, 1, 1, 0, 2, 2]])
    merged = adapted_rand_error([[1, 1, 1, 1, 1, 1]], truth, parts=True)
    split = adapted_rand_error([[1, 3, 3, 0, 2, 2]], truth, parts=True)
    assert (merged["precision"], merged["recall"]) == (0.4, 1.0)
    assert (split["precision"], split["recall"]) == (1.0, 0.5)


# ---------------------------------------------------------------------------------------------------- cells


@given(stacks(0, 4), stacks(-1, 4))
@ordinary
def test_instance_scores_are_those_of_loops_over_cells(prediction, truth) -> None:
    for p, t in zip(prediction, truth, strict=True):
        scores, expected = instance_scores(p, t), scores_by_hand(p, t)
        assert scores.iou_sum == pytest.approx(expected.iou_sum, abs=1e-12)
        sums = {"iou_sum": 0.0}
        assert InstanceScores(**{**vars(scores), **sums}) == InstanceScores(**{**vars(expected), **sums})


@given(stacks(0, 4), stacks(-1, 4))
@ordinary
def test_scores_of_a_stack_are_the_sum_of_the_scores_of_its_slices(prediction, truth) -> None:
    slices = [instance_scores(p, t) for p, t in zip(prediction, truth, strict=True)]
    assert instance_scores(prediction, truth) == slices[0] + slices[1] == slices[1] + slices[0]
    assert sum(slices, InstanceScores()) == slices[0] + slices[1]


@given(stacks(0, 4), stacks(-1, 4), st.permutations([3, 900, 901, 70_000, 2**31 - 1]))
@ordinary
def test_how_cells_are_numbered_and_images_lie_changes_nothing(prediction, truth, names) -> None:
    names = np.array([0, *names, -1])
    truth[0, 0, 0] = 1
    scores, value = instance_scores(prediction, truth), seg(prediction, truth)
    pairs = adapted_rand_error(prediction, truth, parts=True)
    renamed = names[prediction], names[truth]
    assert instance_scores(*renamed) == scores
    assert seg(*renamed) == value
    assert adapted_rand_error(*renamed, parts=True) == pairs
    for turn in (lambda a: a[:, ::-1], lambda a: a[:, :, ::-1], lambda a: a.swapaxes(1, 2)):
        assert instance_scores(turn(prediction), turn(truth)) == scores
        assert seg(turn(prediction), turn(truth)) == value
        assert adapted_rand_error(turn(prediction), turn(truth), parts=True) == pairs
    assert instance_scores(renamed[0].astype(np.uint64), renamed[1].astype(np.int64)) == scores


@given(stacks(0, 4), stacks(-1, 4), stacks(-3, 9))
@ordinary
def test_what_is_predicted_on_ignored_pixels_changes_nothing(prediction, truth, noise) -> None:
    truth[0, 0, 0] = 1
    spoilt = np.where(truth < 0, noise, prediction)
    assert instance_scores(spoilt, truth) == instance_scores(prediction, truth)
    for measure in (seg, adapted_rand_error):
        assert measure(spoilt, truth, parts=True) == measure(prediction, truth, parts=True)
    for measure in (iou, dice):
        for masks in ((spoilt % 2, prediction % 2), (spoilt / 7.0, np.where(truth < 0, 0, prediction) / 7.0)):
            assert measure(masks[0], truth, parts=True) == measure(masks[1], truth, parts=True)


@given(stacks(-1, 4))
@ordinary
def test_a_truth_is_perfect_for_itself(truth) -> None:
    scores = instance_scores(truth, truth)
    if scores.true_cells:
        assert (scores.mean_iou, scores.mean_average_precision, seg(truth, truth)) == (1.0, 1.0, 1.0)
        assert adapted_rand_error(truth, truth, parts=True) == {"error": 0.0, "precision": 1.0, "recall": 1.0}
    assert (scores.merged_pairs, scores.split_cells) == (0, 0)


@pytest.mark.parametrize("twentieths", range(9, 21))
def test_an_iou_of_exactly_a_threshold_is_a_match(twentieths: int) -> None:
    truth = np.ones((4, 5), int)
    prediction = (np.arange(20) < twentieths).reshape(4, 5).astype(int)
    scores = instance_scores(prediction, truth)
    assert scores.matched == tuple(int(twentieths >= n) for n in range(10, 19))
    assert list(scores.average_precision.values()) == [float(m) for m in scores.matched]


def test_two_halves_of_a_cell_are_one_match_at_an_iou_of_a_half() -> None:
    halves, whole = np.array([[1, 2]]), np.array([[1, 1]])
    for prediction, truth in ((halves, whole), (whole, halves)):
        scores = instance_scores(prediction, truth)
        assert scores.matched == (1, 0, 0, 0, 0, 0, 0, 0, 0)
        assert scores.average_precision["0.50"] == 0.5


@pytest.mark.parametrize(
    ("truth", "pairs"),
    [
        ([[1, 2]], 1),
        ([[1], [2]], 1),
        ([[1, 0], [0, 2]], 1),
        ([[0, 1], [2, 0]], 1),
        ([[1, 0, 2]], 0),
        ([[1, -1, 2]], 0),
        ([[1, 2, 1, 2]], 1),
        ([[1, 2], [3, 4]], 6),
    ],
    ids=str,
)
def test_cells_touch_by_sides_and_corners_and_each_pair_counts_once(truth: list[list[int]], pairs: int) -> None:
    scores = instance_scores(np.ones_like(truth), truth)
    assert (scores.touching_pairs, scores.merged_pairs) == (pairs, pairs)


@pytest.mark.parametrize(
    ("prediction", "merged"),
    [
        ([[7, 7, 7, 7, 7, 7]], 1),
        ([[7, 7, 0, 0, 7, 7]], 1),
        ([[7, 7, 0, 7, 0, 0]], 0),  # a third of the second cell is not most of it
        ([[7, 7, 7, 8, 8, 8]], 0),
        ([[0, 0, 0, 0, 0, 0]], 0),
    ],
    ids=str,
)
def test_a_pair_is_merged_when_most_of_both_lies_in_one_cell(prediction: list[list[int]], merged: int) -> None:
    assert instance_scores(prediction, [[1, 1, 1, 2, 2, 2]]).merged_pairs == merged
    assert instance_scores([[*prediction[0][:3], 7, *prediction[0][3:]]], [[1, 1, 1, 0, 2, 2, 2]]).merged_pairs == 0


@pytest.mark.parametrize(
    ("pieces", "split"),
    [((18, 2), 1), ((19, 1), 0), ((10, 10), 1), ((2, 2), 1), ((20,), 0), ((1,) * 20, 0), ((5, 5, 5, 5), 1)],
    ids=str,
)
def test_a_cell_is_split_by_two_pieces_of_a_tenth_of_it(pieces: tuple[int, ...], split: int) -> None:
    prediction = np.zeros((2, 20), int)
    prediction[0, : sum(pieces)] = np.repeat(np.arange(len(pieces)) + 1, pieces)
    truth = np.array([[1] * 20, [0] * 20])
    assert instance_scores(prediction, truth).split_cells == split
    # a predicted cell with only half of its area inside is no piece
    prediction[1] = np.where(prediction[0] == 1, 1, 0)
    assert instance_scores(prediction, truth).split_cells == (1 if len(pieces) > 2 and split else 0)


def test_scores_are_json_and_a_ratio_without_a_denominator_is_null() -> None:
    nothing = np.zeros((2, 2), int)
    for prediction, truth in ((nothing, nothing), (nothing + 1, nothing), (nothing, nothing + 1)):
        scores = instance_scores(prediction, truth).as_dict()
        for value in (
            scores,
            *(measure(prediction, truth, parts=True) for measure in (iou, dice)),
            *(measure(prediction, truth, parts=True) for measure in (seg, adapted_rand_error) if truth.any()),
        ):
            assert json.loads(json.dumps(value, allow_nan=False)) == value
    empty = InstanceScores()
    assert instance_scores(nothing, nothing) == empty
    assert (empty.mean_iou, empty.mean_average_precision, empty.average_precision["0.90"]) == (None, None, None)
    missed = instance_scores(nothing, nothing + 1)
    assert (missed.mean_iou, missed.mean_average_precision) == (0.0, 0.0)
    with pytest.raises(TypeError):
        empty + 1


def test_two_thousand_cells_are_not_counted_one_by_one() -> None:
    generator = np.random.default_rng(0)
    truth = np.kron(np.arange(1, 2026).reshape(45, 45), np.ones((12, 12), int))[:512, :512]
    prediction = np.where(generator.random(truth.shape) < 0.1, 0, np.roll(truth, 2, axis=1))

    def seconds() -> float:
        start = time.perf_counter()
        instance_scores(prediction, truth)
        return time.perf_counter() - start

    # 0.03 s; to compare the whole image with each id takes 0.2 s, and a cell needs several such passes
    assert min(seconds() for _ in range(5)) < 0.2


# ---------------------------------------------------------------------------------------------------- refusals

OF_PIXELS: dict[str, Callable[..., Any]] = {"iou": iou, "dice": dice}
OF_IDS: dict[str, Callable[..., Any]] = {
    "seg": seg,
    "adapted_rand_error": adapted_rand_error,
    "instance_scores": instance_scores,
}
EVERY = OF_PIXELS | OF_IDS


def expect(error: type[Exception], sentence: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == sentence


@pytest.mark.parametrize("measure", EVERY.values(), ids=EVERY.keys())
def test_shapes_are_checked_by_name(measure) -> None:
    here = np.ones((3, 4), int)
    refused = {
        "prediction and truth must have one shape, got (3, 4) and (3, 5)": (here, np.ones((3, 5), int)),
        "prediction and truth must have one shape, got (3, 4) and (1, 3, 4)": (here, here[None]),
        "prediction must be [H, W] or [D, H, W] with at least one pixel, got shape (4,)": (here[0], here),
        "truth must be [H, W] or [D, H, W] with at least one pixel, got shape (0, 4)": (here, here[:0]),
        "truth must be [H, W] or [D, H, W] with at least one pixel, got shape (1, 1, 3, 4)": (here, here[None, None]),
    }
    for sentence, arguments in refused.items():
        expect(ValueError, sentence, lambda arguments=arguments: measure(*arguments))


@pytest.mark.parametrize("measure", OF_PIXELS.values(), ids=OF_PIXELS.keys())
def test_nan_and_what_is_no_number_are_refused(measure) -> None:
    here, spoilt = np.ones((2, 2), int), np.array([[1, np.nan], [0, 1]])
    expect(ValueError, "prediction must not be NaN, got 1 of 4 pixels that are", lambda: measure(spoilt, here))
    sentence = "truth must hold whole numbers, got float64; (truth > 0) makes a mask of it"
    expect(TypeError, sentence, lambda: measure(here, spoilt))
    sentence = "prediction must be boolean, integer or float, got complex128"
    expect(TypeError, sentence, lambda: measure(here + 0j, here))


@pytest.mark.parametrize("measure", OF_PIXELS.values(), ids=OF_PIXELS.keys())
def test_probabilities_lie_between_0_and_1(measure) -> None:
    here, grey = np.ones((2, 2), int), np.array([[0, 3], [200, 255]], np.uint8)
    for values, got in (
        ([[0, 1.5], [1, 1]], "0 to 1.5; a softmax or sigmoid makes probabilities of logits"),
        ([[0, np.inf], [1, 1]], "0 to inf"),
        ([[0, -2.5], [1, 1]], "-2.5 to 1; a softmax or sigmoid makes probabilities of logits"),
        (grey.astype(float), "0 to 255; divide by 255 if these are grey values"),
    ):
        sentence = f"prediction must be the probability of cell, 0 to 1, got {got}"
        expect(ValueError, sentence, lambda values=values: measure(values, here))


@pytest.mark.parametrize("measure", OF_IDS.values(), ids=OF_IDS.keys())
@pytest.mark.parametrize("dtype", [np.float32, bool])
def test_instance_maps_are_integers(measure, dtype) -> None:
    here = np.ones((2, 2), int)
    for name, arguments in (("prediction", (here.astype(dtype), here)), ("truth", (here, here.astype(dtype)))):
        sentence = f"{name} must hold integer ids, got {np.dtype(dtype)}; components(mask) makes them of a mask"
        sentence += ", .astype(int) integers of whole numbers" if dtype is np.float32 else ""
        expect(TypeError, sentence, lambda arguments=arguments: measure(*arguments))


@pytest.mark.parametrize("measure", [seg, adapted_rand_error])
@pytest.mark.parametrize("truth", [0, -1])
def test_a_mean_over_cells_needs_a_cell(measure, truth: int) -> None:
    sentence = "truth must have a cell to be found, got none (no value above 0) in 4 pixels"
    expect(ValueError, sentence, lambda: measure(np.ones((2, 2), int), np.full((2, 2), truth)))


@pytest.mark.parametrize("measure", OF_IDS.values(), ids=OF_IDS.keys())
def test_a_predicted_id_is_not_negative(measure) -> None:
    sentence = "prediction must hold ids of 0 (background) or more, got -3"
    expect(ValueError, sentence, lambda: measure([[1, -3]], [[1, 0]]))


def test_components_refuse_probabilities_and_other_neighbourhoods() -> None:
    sentence = "mask must be boolean or integer, got float64; compare with a threshold first"
    expect(TypeError, sentence, lambda: components([[0.5]]))
    expect(ValueError, "connectivity must be 4 or 8, got 6", lambda: components([[1]], connectivity=6))
    for mask, shape in (([1], "(1,)"), (np.ones((2, 0), int), "(2, 0)"), (np.ones((1, 1, 1, 1), int), "(1, 1, 1, 1)")):
        sentence = f"mask must be [H, W] or [D, H, W] with at least one pixel, got shape {shape}"
        expect(ValueError, sentence, lambda mask=mask: components(mask))


# ---------------------------------------------------------------------------------------------------- the module


def test_the_examples_in_the_docstrings_hold() -> None:
    for module in (metrics.areas, metrics.challenge, metrics.instances):
        result = doctest.testmod(module)
        assert (result.failed, result.attempted > 1) == (0, True)
