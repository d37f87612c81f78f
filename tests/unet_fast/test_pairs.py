"""Which labels belong to which image: every layout that the module names, and what has no partner is listed."""

import random
import re
import tempfile
from pathlib import Path

import pytest

from tests.proof.properties import given, settings, st
from unet_fast.errors import BadInput
from unet_fast.pairs import Pairing, images_in, labels_in, pair

SUFFIXES = ["_mask", "-masks", ".label", " labels", "_cp_masks", "_seg", "_gt", "_Mask", "_instances", "_manual"]
PREFIXES = ["mask_", "masks-", "label ", "gt_", "seg_", "LABELS_"]


def _touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def _names(pairing: Pairing) -> list[tuple[str, str]]:
    return [(image.name, label.name) for image, label in pairing.pairs]


def _complete(pairing: Pairing) -> bool:
    return not pairing.lone_images and not pairing.lone_labels and not pairing.tracking


def test_two_files_are_a_pair_whatever_they_are_called(tmp_path: Path) -> None:
    _touch(tmp_path, "a.tif", "b.png")
    assert _names(pair(tmp_path / "a.tif", tmp_path / "b.png")) == [("a.tif", "b.png")]


def test_equal_names_in_two_folders(tmp_path: Path) -> None:
    images = _touch(tmp_path / "images", "t10.png", "t2.png", "t1.tif")
    labels = _touch(tmp_path / "labels", "t1.png", "t2.tif", "t10.png")
    pairing = pair(images, labels)
    assert _names(pairing) == [("t1.tif", "t1.png"), ("t2.png", "t2.tif"), ("t10.png", "t10.png")]
    assert _complete(pairing)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("together", [False, True], ids=["two folders", "one folder"])
def test_labels_with_a_suffix(suffix: str, together: bool, tmp_path: Path) -> None:
    images = _touch(tmp_path / "a", "x1.png", "x2.png", "x10.png")
    labels = _touch(tmp_path / ("a" if together else "b"), *(f"x{i}{suffix}.tif" for i in (1, 2, 10)))
    pairing = pair(images, labels)
    assert _names(pairing) == [(f"x{i}.png", f"x{i}{suffix}.tif") for i in (1, 2, 10)]
    assert _complete(pairing)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("together", [False, True], ids=["two folders", "one folder"])
def test_labels_with_a_prefix(prefix: str, together: bool, tmp_path: Path) -> None:
    images = _touch(tmp_path / "a", "x1.png", "x2.png")
    labels = _touch(tmp_path / ("a" if together else "b"), f"{prefix}x1.png", f"{prefix}x2.png")
    assert _names(pair(images, labels)) == [(f"x{i}.png", f"{prefix}x{i}.png") for i in (1, 2)]


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("x_image", "x_mask"),
        ("x_img", "x"),
        ("img_x", "mask_x"),
        ("raw-x", "x_gt"),
        ("x", "x_cp_masks"),
        ("x_raw", "x"),
    ],
)
def test_images_may_say_that_they_are_images(image: str, label: str, tmp_path: Path) -> None:
    images, labels = _touch(tmp_path / "a", f"{image}.png"), _touch(tmp_path / "b", f"{label}.png")
    assert _names(pair(images, labels)) == [(f"{image}.png", f"{label}.png")]


@pytest.mark.parametrize("of_images", ["images", "image", "raw"])
@pytest.mark.parametrize("of_labels", ["masks", "labels", "mask", "label"])
def test_two_folders_in_one(of_images: str, of_labels: str, tmp_path: Path) -> None:
    _touch(tmp_path / of_images, "x.png", "y.png")
    _touch(tmp_path / of_labels, "x.png", "y.png")
    pairing = pair(tmp_path, tmp_path)
    assert [(i.parent.name, m.parent.name) for i, m in pairing.pairs] == [(of_images, of_labels)] * 2
    # the same folder by another name is the same folder
    assert pair(tmp_path, tmp_path / of_images / "..") == pairing


def test_a_word_inside_a_name_is_part_of_it(tmp_path: Path) -> None:
    images = _touch(tmp_path / "a", "mask1.png", "unmasked.png", "image1.png")
    labels = _touch(tmp_path / "b", "mask1_mask.png", "unmasked_mask.png", "image1_mask.png")
    assert _complete(pair(images, labels))


def test_what_has_no_partner_is_listed(tmp_path: Path) -> None:
    images, labels = _touch(tmp_path / "a", "1.png", "2.png", "10.png"), _touch(tmp_path / "b", "2.png", "3.png")
    pairing = pair(images, labels)
    assert _names(pairing) == [("2.png", "2.png")]
    assert [p.name for p in pairing.lone_images] == ["1.png", "10.png"]
    assert [p.name for p in pairing.lone_labels] == ["3.png"]


@pytest.mark.parametrize(
    ("images", "labels", "claimed"),
    [
        (["x.png", "x.tif"], ["x.png"], "x"),
        (["x.png"], ["x.png", "x.tif"], "x"),
        (["x.png"], ["x_mask.png", "x_label.png"], "x"),
        (["x_img.png", "x_raw.png"], ["x_mask.png"], "x"),
        (["t007.tif", "t7.tif"], ["man_seg007.tif"], "7"),
    ],
)
def test_two_files_that_claim_one_partner_are_both_named(
    images: list[str], labels: list[str], claimed: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=f"are both called {claimed}; keep one of them") as caught:
        pair(_touch(tmp_path / "a", *images), _touch(tmp_path / "b", *labels))
    twice = images if len(images) > 1 else labels
    assert all(name in str(caught.value) for name in twice)


@pytest.mark.parametrize("folder", ["SEG", "TRA", ""])
def test_the_cell_tracking_challenge(folder: str, tmp_path: Path) -> None:
    images = _touch(tmp_path / "01", *(f"t{i:03}.tif" for i in range(12)))
    word = "track" if folder == "TRA" else "seg"
    labels = _touch(tmp_path / "01_GT" / folder, *(f"man_{word}{i:03}.tif" for i in (2, 7, 11)), "man_track.txt")
    pairing = pair(images, tmp_path / "01_GT")
    assert labels.is_dir()
    assert pairing.tracking
    assert [i.name for i, _ in pairing.pairs] == ["t002.tif", "t007.tif", "t011.tif"]
    assert [m.name for _, m in pairing.pairs] == [f"man_{word}{i:03}.tif" for i in (2, 7, 11)]
    assert len(pairing.lone_images) == 9
    assert not pairing.lone_labels


def test_results_of_the_challenge_are_paired_with_its_truth(tmp_path: Path) -> None:
    found = _touch(tmp_path / "01_RES", "mask000.tif", "mask001.tif")
    _touch(tmp_path / "01_GT" / "SEG", "man_seg001.tif")
    assert _names(pair(found, tmp_path / "01_GT")) == [("mask001.tif", "man_seg001.tif")]


def test_what_is_no_pairing_is_said(tmp_path: Path) -> None:
    full = _touch(tmp_path / "full", "x.png")
    empty = _touch(tmp_path / "empty")
    for images, labels, said in (
        (tmp_path / "missing", full, "missing does not exist"),
        (full, tmp_path / "missing", "missing does not exist"),
        (empty, full, "has no image in it"),
        (full, empty, "has no image in it"),
        (full / "x.png", full, "must be two files or two folders"),
        (full, full, "must hold images and their labels, such as x.png and x_mask.png, or images/ and masks/"),
    ):
        with pytest.raises(BadInput, match=re.escape(said)):
            pair(images, labels)


stems = st.text("abcXYZ0123456789._- ", min_size=1, max_size=8).filter(lambda s: s.strip(". ") == s)


@settings(max_examples=40)
@given(names=st.lists(stems, unique_by=str.lower, min_size=1, max_size=6), seed=st.integers(0, 9), data=st.data())
def test_every_file_is_in_one_pair_or_on_one_list(names: list[str], seed: int, data: st.DataObject) -> None:
    have_labels = [name for name in names if data.draw(st.booleans())] or names[:1]
    with tempfile.TemporaryDirectory() as folder:
        shuffled = random.Random(seed).sample(names, len(names))
        images = _touch(Path(folder) / "a", *(f"{n}.png" for n in shuffled))
        labels = _touch(Path(folder) / "b", *(f"{n}.tif" for n in have_labels), "zz without.tif")
        pairing = pair(images, labels)
    assert all(image.stem == label.stem for image, label in pairing.pairs)
    assert sorted(i.stem for i, _ in pairing.pairs) == sorted(have_labels)
    assert sorted(p.stem for p in pairing.lone_images) == sorted(set(names) - set(have_labels))
    assert [p.stem for p in pairing.lone_labels] == ["zz without"]


def test_images_and_labels_of_one_folder_are_told_apart(tmp_path: Path) -> None:
    _touch(tmp_path, "a.png", "a_masks.png", "b.png", "b_masks.png")
    assert [p.name for p in images_in(tmp_path)] == ["a.png", "b.png"]
    assert [p.name for p in labels_in(tmp_path)] == ["a_masks.png", "b_masks.png"]
    # a folder of labels only, or of images whose names say mask, is taken as it is
    alone = _touch(tmp_path / "alone", "a_masks.png", "b_masks.png")
    assert [p.name for p in images_in(alone)] == [p.name for p in labels_in(alone)] == ["a_masks.png", "b_masks.png"]


def test_images_and_labels_are_found_in_their_subfolders(tmp_path: Path) -> None:
    _touch(tmp_path / "images", "a.png")
    _touch(tmp_path / "masks", "a.png")
    assert [p.parent.name for p in images_in(tmp_path)] == ["images"]
    assert [p.parent.name for p in labels_in(tmp_path)] == ["masks"]
