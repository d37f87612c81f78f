"""What labels mean: understood, or refused with the reason; instances, targets and class balance as counted by hand."""

import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from scipy import ndimage

from tests.proof.properties import given, settings, st
from unet_fast.data import (
    Example,
    Labelled,
    class_balance,
    instances_of,
    label_facts,
    read_labelled,
    split,
    target_of,
)
from unet_fast.errors import BadInput
from unet_fast.normalisation import Normalisation

Array = np.ndarray[Any, Any]


def _folders(folder: Path, labels: list[Array], images: list[Array] | None = None) -> tuple[Path, Path]:
    """images/ and labels/ with a file for each array."""
    if images is None:
        images = [
            np.random.default_rng(i).integers(0, 200, a.shape[-2:]).astype(np.uint8) for i, a in enumerate(labels)
        ]
    for name, arrays in (("images", images), ("labels", labels)):
        (folder / name).mkdir()
        for i, array in enumerate(arrays):
            tifffile.imwrite(folder / name / f"x{i}.tif", array, photometric="minisblack")
    return folder / "images", folder / "labels"


def _read(folder: Path, labels: list[Array], images: list[Array] | None = None, **options: Any) -> Labelled:
    return read_labelled(*_folders(folder, labels, images), **options)


def _cells(count: int, side: int = 24) -> Array:
    """`count` square cells that do not touch, ids from 1."""
    across = side // 4
    plane = np.zeros((side, side), np.uint16)
    for i in range(count):
        row, column = divmod(i, across)
        plane[4 * row : 4 * row + 3, 4 * column : 4 * column + 3] = i + 1
    return plane


# ---- what the values are understood to be


@pytest.mark.parametrize("value", [1, 7, 255])
def test_two_values_are_a_mask(value: int, tmp_path: Path) -> None:
    data = _read(tmp_path, [(_cells(3) > 0) * np.uint8(value)])
    assert (data.kind, data.classes, data.channels) == ("binary", 2, 1)
    assert data.examples[0].class_of.tolist() == [0, 1, 1, 1]


def test_many_ids_in_one_piece_each_are_instances(tmp_path: Path) -> None:
    data = _read(tmp_path, [_cells(9), _cells(2)])
    assert (data.kind, data.classes) == ("instance", 2)
    assert [int(e.instances.max()) for e in data.examples] == [9, 2]


def test_few_values_are_not_guessed(tmp_path: Path) -> None:
    images, labels = _folders(tmp_path, [_cells(2)])
    with pytest.raises(BadInput) as caught:
        read_labelled(images, labels)
    assert str(caught.value) == (
        f"{labels} has the values 0, 1, 2, which can be classes or cells; say --label-kind class or --label-kind "
        f"instance (or binary, if they are one mask)"
    )
    assert read_labelled(images, labels, kind="class").classes == 3
    assert read_labelled(images, labels, kind="instance").classes == 2
    with pytest.raises(BadInput, match="must hold 0 and one other value to be binary, got 0, 1, 2"):
        read_labelled(images, labels, kind="binary")


def test_many_values_in_pieces_are_not_guessed(tmp_path: Path) -> None:
    scattered = np.random.default_rng(0).integers(0, 9, (24, 24)).astype(np.uint8)
    with pytest.raises(BadInput, match=r"has the values 0, 1, 2, 3, 4, 5, 6, \.\.\., which can be classes or cells"):
        _read(tmp_path, [scattered])


def test_more_classes_than_there_can_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"has class 300; classes go from 0 to 255, are these instances\?"):
        _read(tmp_path, [_cells(5) * np.uint16(60)], kind="class")


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="label kind must be one of auto, binary, class, instance, got 'semantic'"):
        _read(tmp_path, [_cells(5)], kind="semantic")


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64, np.float32, np.float64], ids=lambda d: d.__name__)
def test_values_below_zero_and_the_ignored_one_are_not_trained_on(dtype: Any, tmp_path: Path) -> None:
    plane = _cells(6).astype(dtype)
    plane[20:, 0], plane[20:, 5], plane[20:, 9] = -1, -7, 99
    if plane.dtype.kind == "f":
        plane[23, 5] = -3e38  # "nothing", as geographers write it
    data = _read(tmp_path, [plane], ignore=99)
    example = data.examples[0]
    ignored = np.isin(np.arange(24 * 24).reshape(24, 24), [r * 24 + c for r in range(20, 24) for c in (0, 5, 9)])
    np.testing.assert_array_equal(example.instances.numpy() < 0, ignored)
    np.testing.assert_array_equal(example.target().numpy() == -1, ignored)
    assert data.kind == "instance"
    assert data.facts["ignored_pixels"] == 12
    assert data.facts["values"] == [1, 2, 3, 4, 5, 6]


def test_whole_numbers_may_be_floats_and_halves_may_not(tmp_path: Path) -> None:
    images, labels = _folders(tmp_path, [_cells(6).astype(np.float32)])
    assert read_labelled(images, labels).kind == "instance"
    tifffile.imwrite(labels / "x0.tif", _cells(6).astype(np.float32) / 2)
    with pytest.raises(BadInput, match=r"x0\.tif must hold whole numbers as labels, got 0\.5"):
        read_labelled(images, labels)


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64, np.float64], ids=lambda d: d.__name__)
def test_ids_that_no_instance_map_holds_are_refused(dtype: Any, tmp_path: Path) -> None:
    plane = _cells(6).astype(dtype)
    plane[0, 0] = 2**31
    with pytest.raises(BadInput, match=r"x0\.tif has label 2147483648, which does not fit 32 bits"):
        _read(tmp_path, [plane])


def test_ids_with_gaps_and_beyond_16_bits_are_renumbered(tmp_path: Path) -> None:
    plane = _cells(6).astype(np.uint32)
    big = np.where(plane == 6, 3_000_000, plane * 70_000).astype(np.uint32)
    data = _read(tmp_path, [big])
    assert data.facts["highest"] == 3_000_000
    assert data.examples[0].class_of.tolist() == [0] + [1] * 6
    np.testing.assert_array_equal(data.examples[0].instances, plane.astype(np.int32))


def test_a_challenge_of_few_cells_is_instances_and_unlabelled_frames_are_normal(tmp_path: Path) -> None:
    images, labels = tmp_path / "01", tmp_path / "01_GT" / "SEG"
    images.mkdir()
    labels.mkdir(parents=True)
    for i in range(3):
        tifffile.imwrite(images / f"t{i:03}.tif", np.eye(24, dtype=np.uint8))
    tifffile.imwrite(labels / "man_seg001.tif", _cells(2))
    data = read_labelled(images, tmp_path / "01_GT")
    assert data.kind == "instance"
    assert [e.name for e in data.examples] == ["t001.tif"]


# ---- what training would trip over


def _cell_mask(*shape: int) -> Array:
    mask = np.zeros(shape, np.uint8)
    mask[..., 1:3, 1:3] = 1
    return mask


def test_what_cannot_be_trained_on_is_one_sentence(tmp_path: Path) -> None:
    good, noise = _cell_mask(8, 9), np.ones((8, 9), np.float32)
    nan = noise.copy()
    nan[4, 5], nan[7, 8] = np.nan, np.inf
    for number, (images, labels, said) in enumerate(
        [
            ([noise], [_cell_mask(9, 8)], "x0.tif is 9x8, x0.tif is 8x9"),
            ([np.ones((3, 8, 9))], [_cell_mask(2, 8, 9)], "is 2 slices of 8x9, x0.tif is 3 slices of 8x9"),
            ([nan], [good], "x0.tif has 2 NaN or infinite pixels, the first at x0.tif row 4 column 5; replace them"),
            ([noise], [nan], "x0.tif has 2 NaN or infinite pixels"),
            ([noise], [good * 0], "has no cell in any of 1 label images; there is nothing to learn"),
            ([noise, noise], [good], "has 1 file (x1.tif) without labels in"),
            ([noise], [good] * 6, "has 5 files (x1.tif, x2.tif, x3.tif and 2 more) without an image in"),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(BadInput, match=re.escape(said)):
            _read(folder, labels, images)


def test_images_of_other_channels_are_named(tmp_path: Path) -> None:
    images, labels = _folders(tmp_path, [_cell_mask(8, 9)] * 2)
    Image.fromarray(np.ones((8, 9, 3), np.uint8)).save(images / "x1.png")
    (images / "x1.tif").unlink()
    with pytest.raises(BadInput, match=r"x1\.png has 3 channels and x0\.tif has 1 channel; all images must have the"):
        read_labelled(images, labels)


def test_names_that_never_meet_are_refused(tmp_path: Path) -> None:
    images, labels = _folders(tmp_path, [_cell_mask(8, 9)])
    (labels / "x0.tif").rename(labels / "y0.tif")
    with pytest.raises(BadInput, match=r"labels has 1 file \(y0\.tif\) without an image in"):
        read_labelled(images, labels)


def test_a_stack_is_its_slices_each_normalised_by_itself(tmp_path: Path) -> None:
    stack = np.random.default_rng(0).integers(0, 1000, (3, 8, 9)).astype(np.uint16) * np.uint16([[[1]], [[5]], [[9]]])
    data = _read(tmp_path, [_cell_mask(3, 8, 9)], [stack])
    assert [e.name for e in data.examples] == ["x0.tif[0]", "x0.tif[1]", "x0.tif[2]"]
    for example, plane in zip(data.examples, stack, strict=True):
        np.testing.assert_array_equal(example.image, Normalisation()(plane)[None])
        assert example.image.dtype == torch.float32


def test_the_order_of_files_is_natural(tmp_path: Path) -> None:
    data = _read(tmp_path, [_cell_mask(8, 9)] * 12)
    assert [e.name for e in data.examples] == [f"x{i}.tif" for i in range(12)]


# ---- instances and targets

planes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6), st.integers(1, 6)).map(
    lambda t: np.random.default_rng(t[2]).integers(-1, t[3] + 1, t[:2])
)


@given(plane=planes, kind=st.sampled_from(["binary", "class", "instance"]))
def test_instances_are_what_scipy_labels(plane: Array, kind: str) -> None:
    values = np.minimum(plane, 1) if kind == "binary" else plane
    instances, class_of = instances_of(values, kind)
    ids = instances.numpy()
    assert (instances.dtype, class_of.dtype) == (torch.int32, torch.int64)
    np.testing.assert_array_equal(ids < 0, values < 0)
    # ids 1 .. n without gaps, and a class for each
    assert np.unique(ids[ids > 0]).tolist() == list(range(1, len(class_of)))
    expected = (values > 0) if kind == "instance" else np.maximum(values, 0)
    np.testing.assert_array_equal(class_of.numpy()[np.maximum(ids, 0)], expected)
    # the same parts: a one-to-one relation between our ids and the expected ones
    for value in np.unique(values[values > 0]):
        here = values == value
        parts = here.astype(int) if kind == "instance" else ndimage.label(here)[0]
        both = np.unique(np.stack([parts[here], ids[here]]), axis=1)
        assert len(set(both[0])) == len(set(both[1])) == both.shape[1]


def test_no_cells_and_nothing_but_cells_are_fine() -> None:
    for value, cells in ((0, 0), (-1, 0), (5, 1)):
        instances, class_of = instances_of(np.full((3, 4), value), "instance")
        assert class_of.tolist() == [0] + [1] * cells
        assert set(instances.flatten().tolist()) == {{0: 0, -1: -1, 5: 1}[value]}


@given(plane=planes)
def test_of_several_classes_the_map_itself_is_the_target(plane: Array) -> None:
    # a rim of one pixel between two other classes stays
    target = target_of(*(t[None] if i == 0 else t for i, t in enumerate(instances_of(np.minimum(plane, 2), "class"))))
    if plane.max() > 1:
        assert np.array_equal(target[0].numpy(), np.maximum(np.minimum(plane, 2), -1))


@given(plane=planes)
def test_the_target_is_the_class_but_between_cells_that_touch(plane: Array) -> None:
    instances, class_of = instances_of(plane, "instance")
    target = target_of(instances[None], class_of)[0].numpy()
    ids = instances.numpy()
    for (row, column), cell in np.ndenumerate(ids):
        around = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
        inside = [ids[r, c] for r, c in around if 0 <= r < ids.shape[0] and 0 <= c < ids.shape[1]]
        touches = cell > 0 and any(other > 0 and other != cell for other in inside)
        wanted = -1 if cell < 0 else 0 if touches else int(class_of[cell])
        assert target[row, column] == wanted


# ---- balance


def _example(plane: Array, kind: str = "binary") -> Example:
    return Example("x", torch.zeros(1, *plane.shape), *instances_of(plane, kind))


@given(blocks=st.lists(st.integers(-1, 2), min_size=12, max_size=12))
def test_class_balance_is_one_over_the_count(blocks: list[int]) -> None:
    # parts of 5 x 5, so that those that touch keep an inside
    plane = np.kron(np.reshape([0, 1, 2, -1, *blocks], (4, 4)), np.ones((5, 5), int))
    example = _example(plane, "class")
    target = example.target().numpy()
    counts = [int((target == c).sum()) for c in range(3)]
    wanted = [sum(counts) / (3 * n) for n in counts]
    assert class_balance([example]) == pytest.approx(wanted, rel=1e-12)
    # of the whole set, so that repetition does not matter
    assert class_balance([example, example]) == pytest.approx(wanted, rel=1e-12)


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), rows=st.lists(st.integers(1, 23), max_size=4), cut=st.integers(1, 23))
def test_class_balance_does_not_know_how_images_were_cut(seed: int, rows: list[int], cut: int) -> None:
    # cells that do not touch: no gap, and none that a cut could hide
    plane = _cells(36) * np.repeat(np.random.default_rng(seed).integers(0, 2, (6, 6)), 4, 0).repeat(4, 1)
    plane[0, 0] = 1
    tiles = [tile for band in np.split(plane, sorted(set(rows))) for tile in np.split(band, [cut], axis=1)]
    whole = class_balance([_example(plane, "instance")])
    assert class_balance([_example(tile, "instance") for tile in tiles]) == pytest.approx(whole, rel=1e-12)
    assert whole == pytest.approx((0.5 / (plane == 0).mean(), 0.5 / (plane > 0).mean()), rel=1e-12)


def test_class_balance_takes_bare_instances() -> None:
    plane = _cells(6).astype(np.int32)
    wanted = class_balance([_example(plane, "instance")])
    assert class_balance([plane]) == class_balance([torch.from_numpy(plane)]) == wanted
    # what is ignored does not count
    ignored = plane.copy()
    ignored[20:] = -1
    share = (plane[:20] > 0).mean()
    assert class_balance([ignored]) == pytest.approx((0.5 / (1 - share), 0.5 / share))


@pytest.mark.parametrize(
    ("plane", "kind", "missing"),
    [
        (np.zeros((4, 4), int), "binary", "class 1"),
        (np.ones((4, 4), int), "binary", "background"),
        (np.array([[0, 2], [0, 2]]), "class", "class 1"),
        # cells of one pixel that touch are all gap
        (np.array([[1, 2, 3, 4]]), "instance", "class 1"),
    ],
)
def test_a_class_without_a_pixel_cannot_be_balanced(plane: Array, kind: str, missing: str) -> None:
    with pytest.raises(BadInput, match=f"the training set has no pixel of {missing}; it cannot be told from the rest"):
        class_balance([_example(plane, kind)])


def test_cells_of_one_pixel_are_cells() -> None:
    plane = np.zeros((9, 9), int)
    plane[::2, ::2] = np.arange(25).reshape(5, 5) + 1
    example = _example(plane, "instance")
    np.testing.assert_array_equal(example.target(), (plane > 0).astype(int))
    assert class_balance([example]) == pytest.approx((0.5 / (56 / 81), 0.5 / (25 / 81)))


# ---- the split


@given(count=st.integers(2, 40), share=st.floats(0, 1, exclude_max=True))
def test_the_split_is_one_block_with_something_on_both_sides(count: int, share: float) -> None:
    examples = [_example(np.full((1, 1), i % 2)) for i in range(count)]
    learn, held_out = split(examples, share)
    assert [*map(id, learn), *map(id, held_out)] == [*map(id, examples)]
    assert learn
    assert (len(held_out) == 0) == (share == 0)
    if share:
        assert abs(len(held_out) - share * count) <= 1


@given(rows=st.integers(1, 50), share=st.floats(0, 1, exclude_max=True))
def test_a_single_image_is_split_by_rows(rows: int, share: float) -> None:
    plane = np.arange(rows * 3).reshape(rows, 3) % 2
    only = Example("x.tif", torch.arange(rows * 6.0).reshape(2, rows, 3), *instances_of(plane, "binary"))
    learn, held_out = split([only], share)
    assert len(learn) == 1
    assert len(held_out) == (share > 0 and rows > 1)
    parts = [*learn, *held_out]
    torch.testing.assert_close(torch.cat([e.image for e in parts], 1), only.image)
    assert torch.equal(torch.cat([e.instances for e in parts]), only.instances)
    assert all(e.image.shape[1] > 0 for e in parts)
    if held_out:
        cut = learn[0].image.shape[1]
        assert [e.name for e in parts] == [f"x.tif rows 0-{cut - 1}", f"x.tif rows {cut}-{rows - 1}"]


# ---- facts


@given(maps=st.lists(planes, min_size=1, max_size=3))
def test_facts_are_what_a_count_gives(maps: list[Array]) -> None:
    facts = label_facts([plane[None] for plane in maps])
    values = sorted({int(v) for plane in maps for v in plane.flat if v > 0})
    assert facts["values"] == values
    assert facts["highest"] == max(values, default=0)
    assert facts["most_in_one_image"] == max(len({v for v in plane.flat if v > 0}) for plane in maps)
    assert facts["ignored_pixels"] == sum(int((plane < 0).sum()) for plane in maps)
    pieces = [
        ndimage.label(plane == v, np.ones((3, 3)))[1]
        for plane in maps
        if len({v for v in plane.flat if v > 0}) >= 5
        for v in {v for v in plane.flat if v > 0}
    ]
    assert facts["in_one_piece"] == (sum(n == 1 for n in pieces) / len(pieces) if pieces else None)


def test_cells_without_background_are_instances_too() -> None:
    plane = np.kron(np.arange(1, 10).reshape(3, 3), np.ones((4, 4), int))
    assert label_facts([plane[None]])["in_one_piece"] == 1
    torn = plane.copy()
    torn[11, 11] = 1
    assert label_facts([torn[None]])["in_one_piece"] == pytest.approx(8 / 9)


@settings(max_examples=10)
@given(count=st.integers(0, 30), seed=st.integers(0, 100))
def test_instances_survive_the_way_through_a_file(count: int, seed: int) -> None:
    plane = _cells(max(count, 5))
    shuffled = np.append(0, np.random.default_rng(seed).permutation(60_000)[: plane.max()] + 1).astype(np.uint16)[plane]
    with tempfile.TemporaryDirectory() as folder:
        data = _read(Path(folder), [shuffled])
    ids = data.examples[0].instances.numpy()
    both = np.unique(np.stack([shuffled.ravel(), ids.ravel()]), axis=1)
    assert both.shape[1] == plane.max() + 1
    assert data.kind == "instance"
