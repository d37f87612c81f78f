"""Files against files: every way to store a prediction gives the same scores, and `overall` pools, not averages."""

import csv
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy import ndimage
from typer.testing import CliRunner

from unet_fast import figures, metrics, synthetic
from unet_fast.cli import app
from unet_fast.errors import BadInput
from unet_fast.evaluation import evaluate
from unet_kernels import NativeLibraryMissing, _native

pytestmark = pytest.mark.filterwarnings("ignore:.*runs in plain Python:RuntimeWarning")


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    """Three images of instances, of different sizes."""
    folder = tmp_path / "truth"
    folder.mkdir()
    for i, size in enumerate((64, 96, 80)):
        tifffile.imwrite(folder / f"{i}.tif", synthetic.cells(size, seed=i)[1].astype(np.uint16))
    return folder


def _instances(folder: Path) -> list[np.ndarray[Any, Any]]:
    return [tifffile.imread(p) for p in sorted(folder.iterdir())]


def _write(folder: Path, arrays: list[np.ndarray[Any, Any]]) -> Path:
    folder.mkdir()
    for i, array in enumerate(arrays):
        tifffile.imwrite(folder / f"{i}.tif", array, metadata={"axes": "CYX"[-array.ndim :]})
    return folder


def test_the_truth_itself_is_perfect(truth: Path) -> None:
    report = evaluate(truth, truth)
    for row in (*report.images, report.overall):
        assert (row["iou"], row["dice"], row["pixel_error"], row["cell_iou"], row["ap50"]) == (1, 1, 0, 1, 1)
        assert row["merged_pairs"] == row["split_cells"] == 0
    assert report.understood_as == "instance"


def test_overall_pools_pixels_and_cells(tmp_path: Path, truth: Path) -> None:
    found = [np.where(ids % 3 == 1, 0, ids) for ids in _instances(truth)]
    report = evaluate(_write(tmp_path / "found", found), truth, kind="instance")
    hit = sum(int((ids > 0).sum()) for ids in found)
    true = sum(int((ids > 0).sum()) for ids in _instances(truth))
    assert report.overall["iou"] == pytest.approx(hit / true)
    assert report.overall["dice"] == pytest.approx(2 * hit / (hit + true))
    pooled = sum(
        (metrics.instance_scores(a, b) for a, b in zip(found, _instances(truth), strict=True)), metrics.InstanceScores()
    )
    assert report.overall["cell_iou"] == pytest.approx(pooled.mean_iou)
    assert report.overall["true_cells"] == sum(row["true_cells"] for row in report.images)


def test_every_form_of_one_mask_scores_the_same(tmp_path: Path, truth: Path) -> None:
    masks = [ids > 0 for ids in _instances(truth)]
    forms = {
        "zero_one": [m.astype(np.uint8) for m in masks],
        "zero_255": [m.astype(np.uint8) * 255 for m in masks],
        "probability": [m.astype(np.float32) * 0.9 for m in masks],
        "both_classes": [np.stack([1 - m * 0.9, m * 0.9]).astype(np.float32) for m in masks],
    }
    reports = [evaluate(_write(tmp_path / name, arrays), truth, kind="instance") for name, arrays in forms.items()]
    assert all(report.overall == reports[0].overall for report in reports)
    # touching cells of a mask are one
    assert reports[0].overall["merged_pairs"] == reports[0].overall["touching_pairs"] > 0
    assert reports[0].overall["iou"] == 1


def test_probabilities_are_judged_at_every_threshold(tmp_path: Path, truth: Path) -> None:
    # right at 0.3, nothing at 0.5
    weak = [np.where(ids > 0, 0.4, 0.2).astype(np.float32) for ids in _instances(truth)]
    overall = evaluate(_write(tmp_path / "weak", weak), truth, kind="instance").overall
    assert overall["pixel_error"] == 0
    assert overall["iou"] == 0


def test_a_stack_is_its_slices(tmp_path: Path) -> None:
    _, labels = synthetic.membranes((3, 64, 64), seed=0)
    tifffile.imwrite(tmp_path / "truth.tif", labels, photometric="minisblack")
    tifffile.imwrite(tmp_path / "found.tif", np.where(labels > 0, 1, 0).astype(np.uint8), photometric="minisblack")
    report = evaluate(tmp_path / "found.tif", tmp_path / "truth.tif")
    assert [row["name"] for row in report.images] == [f"found.tif[{z}]" for z in range(3)]
    assert report.overall["iou"] == 1
    assert report.understood_as == "binary"


def test_classes_are_averaged(tmp_path: Path) -> None:
    true = np.array([[1, 1, 2, 2], [0, 0, 2, 2]], np.uint8)
    found = np.array([[1, 0, 2, 2], [0, 0, 2, 1]], np.uint8)
    tifffile.imwrite(tmp_path / "t.tif", true)
    tifffile.imwrite(tmp_path / "f.tif", found)
    report = evaluate(tmp_path / "f.tif", tmp_path / "t.tif", kind="class")
    assert report.overall["iou"] == pytest.approx((1 / 3 + 3 / 4) / 2)
    assert "cell_iou" not in report.overall


def test_cell_ids_are_no_classes(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "t.tif", np.array([[1, 1, 2, 2], [0, 0, 2, 2]], np.uint8))
    tifffile.imwrite(tmp_path / "f.tif", np.array([[1, 1, 2, 2], [0, 0, 3, 7]], np.uint8))
    with pytest.raises(BadInput, match=r"has label 7, the truth has classes 0 to 2; are these cell ids\?"):
        evaluate(tmp_path / "f.tif", tmp_path / "t.tif", kind="class")


def test_ignored_pixels_do_not_count(tmp_path: Path) -> None:
    true = np.array([[1, 1, 9, 9, 0, 0]], np.uint8)
    tifffile.imwrite(tmp_path / "t.tif", true)
    tifffile.imwrite(tmp_path / "f.tif", np.array([[1, 1, 1, 0, 0, 0]], np.uint8))
    report = evaluate(tmp_path / "f.tif", tmp_path / "t.tif", kind="instance", ignore=9)
    assert (report.overall["iou"], report.overall["pixel_error"], report.overall["cell_iou"]) == (1, 0, 1)


def test_files_without_partner_are_named(tmp_path: Path, truth: Path) -> None:
    found = _write(tmp_path / "found", _instances(truth)[:2])
    (found / "stray.tif").write_bytes((found / "0.tif").read_bytes())
    report = evaluate(found, truth)
    assert report.without_prediction == ["2.tif"]
    assert report.without_truth == ["stray.tif"]
    assert len(report.images) == 2


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.zeros((10, 10), np.uint8), "10x10"),
        (np.full((64, 64), 1.5, np.float32), "between 0 and 1"),
        (np.zeros((2, 64, 64), np.uint8), "channels of whole numbers"),
        (np.full((64, 64), -1, np.int16), "labels of 0 and above, got -1"),
    ],
    ids=["size", "range", "channels", "negative"],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, truth: Path, array: Any, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        evaluate(_write(tmp_path / "found", [array]), truth, kind="instance")


def test_unknown_metrics_are_named(truth: Path) -> None:
    with pytest.raises(BadInput, match="got 'rand'"):
        evaluate(truth, truth, wanted=("iou", "rand"))


def test_the_verb_prints_a_table_or_data(tmp_path: Path, truth: Path) -> None:
    found = _write(tmp_path / "found", _instances(truth)[:2])
    words = ["evaluate", "--pred", str(found), "--truth", str(truth), "--metrics", "iou,cells"]
    table = CliRunner().invoke(app, words)
    assert table.exit_code == 0
    lines = table.stdout.splitlines()
    assert lines[0].split()[:3] == ["IoU", "cell", "IoU"]
    assert lines[0].split()[-3:] == ["touching", "merged", "split"]
    assert lines[-1].startswith("overall")
    assert "1 truth without a prediction (2.tif)" in table.stderr
    data = CliRunner().invoke(app, [*words, "--json"])
    assert json.loads(data.stdout)["overall"]["iou"] == 1


# ---------------------------------------------------------------------------------------- the challenge's scores

CHALLENGE = ("pixel_error", "warping_error", "rand_error", "v_rand", "v_info")


@pytest.fixture
def stack(tmp_path: Path) -> tuple[Path, Path]:
    """(prediction, truth): three slices of membranes, and the truth blurred and noisy."""
    _, labels = synthetic.membranes((3, 96, 96), seed=0)
    noise = np.random.default_rng(0).normal(0, 0.8, labels.shape)
    found = [ndimage.gaussian_filter((t > 0) + n, 1.5) for t, n in zip(labels, noise, strict=True)]
    tifffile.imwrite(tmp_path / "truth.tif", labels, photometric="minisblack")
    tifffile.imwrite(tmp_path / "found.tif", np.clip(found, 0, 1).astype(np.float32), photometric="minisblack")
    return tmp_path / "found.tif", tmp_path / "truth.tif"


def test_a_mask_is_scored_as_the_challenge_did(stack: tuple[Path, Path]) -> None:
    found, truth = (tifffile.imread(path) for path in stack)
    report = evaluate(*stack)
    for name in CHALLENGE:
        measure = getattr(metrics, name)
        parts = measure(found, truth, parts=True)
        value = measure(found, truth)
        assert (report.overall[name], report.overall[f"{name}_threshold"]) == (value, parts["threshold"])
        assert [row[name] for row in report.images] == [measure(p, t) for p, t in zip(found, truth, strict=True)]
        if name != "warping_error":
            halves = (report.overall[f"{name}_precision"], report.overall[f"{name}_recall"])
            assert halves == (parts["precision"], parts["recall"])
    parts = metrics.warping_error(found, truth, parts=True)
    assert (report.overall["split_pixels"], report.overall["merge_pixels"]) == (parts["split"], parts["merge"])


def test_images_of_different_sizes_are_pooled_with_one_threshold(tmp_path: Path, truth: Path) -> None:
    masks = [(ids > 0).astype(np.uint8) for ids in _instances(truth)]
    rng = np.random.default_rng(0)
    found = [np.clip(ndimage.gaussian_filter(m + rng.normal(0, 0.5, m.shape), 1), 0, 1) for m in masks]
    folder = _write(tmp_path / "masks", masks)
    report = evaluate(_write(tmp_path / "found", [f.astype(np.float32) for f in found]), folder)
    # padded to one size with pixels that do not count, the images are a stack
    frame = [[(0, 96 - n)] * 2 for n in (64, 96, 80)]
    truths = np.stack([np.pad(m.astype(int), f, constant_values=-1) for m, f in zip(masks, frame, strict=True)])
    padded = np.stack([np.pad(f.astype(np.float32), w) for f, w in zip(found, frame, strict=True)])
    for name in ("pixel_error", "warping_error", "rand_error"):
        parts = getattr(metrics, name)(padded, truths, parts=True)
        assert (report.overall[name], report.overall[f"{name}_threshold"]) == (parts["error"], parts["threshold"])


def test_touching_cells_are_apart_for_the_challenge_too(tmp_path: Path, truth: Path) -> None:
    report = evaluate(truth, truth, wanted=("all",))
    assert report.understood_as == "instance"
    for row in (*report.images, report.overall):
        assert [row[name] for name in CHALLENGE] == [0, 0, 0, 1, 1]
        assert (row["seg"], row["adapted_rand_error"]) == (1, 0)
    # the same cells without their numbers are merged where they touch
    masks = _write(tmp_path / "masks", [(ids > 0).astype(np.uint8) for ids in _instances(truth)])
    merged = evaluate(masks, truth, kind="instance", wanted=("warping_error", "rand_error")).overall
    assert merged["warping_error"] > 0
    assert merged["merge_pixels"] > merged["split_pixels"] == 0
    assert merged["rand_error_precision"] < merged["rand_error_recall"]


def test_what_is_shown_depends_on_the_truth(tmp_path: Path, truth: Path, stack: tuple[Path, Path]) -> None:
    cells = evaluate(truth, truth).overall
    assert {"iou", "pixel_error", "seg", "cell_iou"} <= set(cells)
    assert not {"warping_error", "v_rand", "adapted_rand_error"} & set(cells)
    assert {*CHALLENGE, "cell_iou"} <= set(evaluate(*stack).overall)
    one = evaluate(*stack, wanted=("v_info",)).overall
    assert set(one) == {"name", "v_info", "v_info_threshold", "v_info_precision", "v_info_recall"}


@pytest.mark.parametrize("name", ["warping_error", "seg", "cells", "v_rand"])
def test_classes_have_no_cells(tmp_path: Path, name: str) -> None:
    for file in ("t.tif", "f.tif"):
        tifffile.imwrite(tmp_path / file, np.array([[1, 1, 2, 2], [0, 0, 2, 2]], np.uint8))
    sentence = f"^{name} needs cells and background, the truth was understood as 3 classes$"
    with pytest.raises(BadInput, match=sentence):
        evaluate(tmp_path / "f.tif", tmp_path / "t.tif", kind="class", wanted=("iou", name))
    with pytest.raises(BadInput, match=r"^a figure needs cells and background"):
        evaluate(tmp_path / "f.tif", tmp_path / "t.tif", kind="class", figure=tmp_path / "e.png")
    assert evaluate(tmp_path / "f.tif", tmp_path / "t.tif", kind="class", wanted=("all",)).overall["iou"] == 1


def test_a_slice_without_a_cell_has_no_score_of_cells_and_joins_the_pool(stack: tuple[Path, Path]) -> None:
    prediction, truth = stack
    labels = tifffile.imread(truth)
    labels[1] = 0
    tifffile.imwrite(truth, labels, photometric="minisblack")
    report = evaluate(prediction, truth)
    assert not {*CHALLENGE, "seg"} & set(report.images[1])
    assert report.overall["warping_error"] == metrics.warping_error(tifffile.imread(prediction), labels)
    assert report.overall["v_rand"] == metrics.v_rand(tifffile.imread(prediction), labels)
    row = next(line for line in report.table().splitlines() if line.startswith("found.tif[1]"))
    assert row.split()[3:] == ["-"] * 5


def test_a_tracking_challenge_is_scored_by_its_annotated_cells(tmp_path: Path) -> None:
    for folder in ("01_RES", "01_GT/SEG"):
        (tmp_path / folder).mkdir(parents=True)
    cells = np.zeros((8, 12), np.uint16)
    cells[1:4, 1:5], cells[5:7, 6:10] = 3, 8
    annotated = np.where(cells == 3, 3, 0).astype(np.uint16)
    for frame in (0, 1, 2):
        tifffile.imwrite(tmp_path / f"01_RES/mask{frame:03}.tif", cells)
    tifffile.imwrite(tmp_path / "01_GT/SEG/man_seg000.tif", cells)
    tifffile.imwrite(tmp_path / "01_GT/SEG/man_seg002.tif", annotated)
    report = evaluate(tmp_path / "01_RES", tmp_path / "01_GT")
    assert (report.understood_as, report.without_truth) == ("instance", ["mask001.tif"])
    assert report.overall["seg"] == 1
    assert (report.overall["detected"], report.overall["missed"], report.overall["false"]) == (3, 0, 1)


def test_overall_seg_is_the_mean_over_cells_not_over_images(tmp_path: Path) -> None:
    truths = [np.array([[1, 1, 0, 2, 2, 0, 3, 3]], np.uint8), np.array([[1, 1, 0, 0, 0, 0, 0, 0]], np.uint8)]
    found = [truths[0], np.zeros_like(truths[1])]
    report = evaluate(_write(tmp_path / "f", found), _write(tmp_path / "t", truths), kind="instance")
    assert [row["seg"] for row in report.images] == [1, 0]
    assert report.overall["seg"] == 3 / 4


# ------------------------------------------------------------------------------------------------ files


def test_csv_has_every_number_that_json_has(tmp_path: Path, stack: tuple[Path, Path]) -> None:
    words = ["evaluate", "-p", str(stack[0]), "--truth", str(stack[1]), "--json", "--csv", str(tmp_path / "o.csv")]
    data = json.loads(CliRunner().invoke(app, words).stdout)
    with (tmp_path / "o.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["found.tif[0]", "found.tif[1]", "found.tif[2]", "overall"]
    for row, wanted in zip(rows, [*data["images"], data["overall"]], strict=True):
        assert {k: float(v) for k, v in row.items() if k != "name"} == {k: v for k, v in wanted.items() if k != "name"}


def test_the_thresholds_chosen_are_shown(stack: tuple[Path, Path]) -> None:
    shown = CliRunner().invoke(app, ["evaluate", "-p", str(stack[0]), "--truth", str(stack[1])]).stdout
    overall = evaluate(*stack).overall
    chosen = ", ".join(f"{name} {overall[f'{name}_threshold']:.1f}" for name in CHALLENGE)
    assert shown.splitlines()[-1] == f"threshold chosen overall: {chosen}"
    assert max(map(len, shown.splitlines()[:-1])) <= 110


@pytest.mark.parametrize("on_images", [False, True])
def test_a_tiff_of_errors_marks_what_is_split_and_merged(
    tmp_path: Path, stack: tuple[Path, Path], on_images: bool
) -> None:
    found, truth = (tifffile.imread(path) for path in stack)
    grey = np.random.default_rng(0).integers(0, 255, truth.shape, np.uint8)
    tifffile.imwrite(tmp_path / "grey.tif", grey, photometric="minisblack")
    drawn = tmp_path / "errors.tif"
    report = evaluate(*stack, wanted=("iou",), figure=drawn, images=tmp_path / "grey.tif" if on_images else None)
    threshold = report.overall["warping_error_threshold"]
    pages = tifffile.imread(drawn)
    kinds = metrics.warping_map(found, truth, threshold)
    assert (kinds == 1).any()
    assert pages.shape == (*truth.shape, 3)
    np.testing.assert_array_equal((pages == figures.SPLIT).all(-1), kinds == 1)
    np.testing.assert_array_equal((pages == figures.MERGED).all(-1), kinds == 2)
    background = (grey if on_images else found)[0]
    low, high = np.percentile(background, (0.5, 99.5))
    plain = (np.clip((background - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    np.testing.assert_array_equal(pages[0][kinds[0] == 0], np.repeat(plain[kinds[0] == 0][:, None], 3, axis=1))


@pytest.mark.parametrize("count", [1, 3])
def test_folders_are_drawn_on_folders(tmp_path: Path, truth: Path, count: int) -> None:
    for path in sorted(truth.iterdir())[count:]:
        path.unlink()
    masks = _write(tmp_path / "found", [(ids > 0).astype(np.uint8) for ids in _instances(truth)])
    images = _write(tmp_path / "images", [ids.astype(np.float32) for ids in _instances(truth)])
    evaluate(masks, truth, kind="instance", figure=tmp_path / "e.tif", images=images)
    with tifffile.TiffFile(tmp_path / "e.tif") as file:
        assert [page.shape for page in file.pages] == [(*ids.shape, 3) for ids in _instances(truth)]
        assert "0.tif: 0 splits, " in file.pages[0].description


def test_without_the_native_library_a_note_says_that_it_is_slow(
    stack: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["evaluate", "-p", str(stack[0]), "--truth", str(stack[1]), "--metrics", "warping_error", "--json"]
    usual = CliRunner().invoke(app, words)

    def missing() -> None:
        raise NativeLibraryMissing("it was not built")

    monkeypatch.setattr(_native, "native", missing)
    caches = (_native.why_not, _native.missing)
    for cache in caches:
        cache.cache_clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")  # as a person has it
            slow = CliRunner().invoke(app, words)
    finally:
        for cache in caches:
            cache.cache_clear()
    assert slow.stdout == usual.stdout
    note = "note: homotopic_warp runs in plain Python, which is slow: the native library is missing: it was not built\n"
    assert slow.stderr == note


def test_a_sheet_of_errors_is_drawn(tmp_path: Path, stack: tuple[Path, Path]) -> None:
    words = ["evaluate", "-p", str(stack[0]), "--truth", str(stack[1]), "--figure", str(tmp_path / "e.png")]
    assert CliRunner().invoke(app, words).exit_code == 0
    pixels = np.asarray(Image.open(tmp_path / "e.png").convert("RGB")).astype(int)
    assert (abs(pixels - figures.SPLIT).sum(-1) < 30).any()


@pytest.mark.parametrize(
    ("figure", "images", "sentence"),
    [
        ("e.gif", None, r"^figure must end in \.png, \.pdf, \.svg, \.tif, \.tiff, got e\.gif$"),
        (None, "found.tif", r"^images are for the figure to be drawn on; name a figure$"),
        ("e.png", "small.tif", r"found\.tif is 3 slices of 96x96, small\.tif is 3 slices of 8x8$"),
        ("e.png", "nowhere.tif", r"nowhere\.tif does not exist$"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    tmp_path: Path, stack: tuple[Path, Path], figure: str | None, images: str | None, sentence: str
) -> None:
    tifffile.imwrite(tmp_path / "small.tif", np.zeros((3, 8, 8), np.uint8), photometric="minisblack")
    with pytest.raises(BadInput, match=sentence):
        evaluate(*stack, figure=figure and tmp_path / figure, images=images and tmp_path / images)
    assert not (tmp_path / "e.png").exists()


def test_a_truth_without_a_cell_is_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "t.tif", np.zeros((4, 4), np.uint8))
    tifffile.imwrite(tmp_path / "f.tif", np.ones((4, 4), np.uint8))
    for kind in ("auto", "binary", "instance"):
        with pytest.raises(BadInput, match=r"t\.tif must have a cell to be found, got none in any image$"):
            evaluate(tmp_path / "f.tif", tmp_path / "t.tif", kind=kind, wanted=("iou",))


def test_what_a_border_leaves_nothing_of_has_no_such_score(tmp_path: Path) -> None:
    # cells one pixel wide, each touching the next: cutting a border between them takes them all
    columns = np.repeat(np.arange(1, 9, dtype=np.uint8)[None], 6, axis=0)
    tifffile.imwrite(tmp_path / "t.tif", columns)
    sentence = r"t\.tif must have a cell for warping_error, got none once a border is cut between those that touch$"
    for more in ({"wanted": ("warping_error",)}, {"figure": tmp_path / "e.png"}):
        with pytest.raises(BadInput, match=sentence):
            evaluate(tmp_path / "t.tif", tmp_path / "t.tif", kind="instance", **more)
    assert evaluate(tmp_path / "t.tif", tmp_path / "t.tif", kind="instance", wanted=("all",)).overall["seg"] == 1


# ---------------------------------------------------------------------------------- what predictions are taken for


def test_a_single_cell_in_two_pieces_is_one_cell(tmp_path: Path) -> None:
    one = np.zeros((12, 12), np.uint16)
    one[2:6, 2:6] = one[6:10, 6:10] = 5
    two = np.where(np.arange(12) < 6, 3, 9).astype(np.uint16)[None].repeat(12, 0)
    for name, frames in (("01_RES/mask00{}.tif", (one, two)), ("01_GT/SEG/man_seg00{}.tif", (one, two))):
        (tmp_path / name).parent.mkdir(parents=True)
        for i, frame in enumerate(frames):
            tifffile.imwrite(tmp_path / name.format(i), frame)
    report = evaluate(tmp_path / "01_RES", tmp_path / "01_GT")
    assert [row["seg"] for row in (*report.images, report.overall)] == [1, 1, 1]
    # likewise of other layouts, as long as some image shows that values are ids
    found = _write(tmp_path / "found", [one, two])
    report = evaluate(found, _write(tmp_path / "truth", [one, two]), kind="instance")
    assert [row["predicted_cells"] for row in report.images] == [1, 2]


@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_grey_values_are_no_cells(tmp_path: Path, stack: tuple[Path, Path], suffix: str) -> None:
    grey = (tifffile.imread(stack[0]) * 255).astype(np.uint8)[0]
    (tmp_path / "grey").mkdir()
    Image.fromarray(grey).save(tmp_path / f"grey.{suffix}")
    tifffile.imwrite(tmp_path / "one.tif", tifffile.imread(stack[1])[0])
    sentence = r"grey\.\w+ holds neither masks nor cell ids: \d+% of its values lie in several pieces; probabilities in"
    with pytest.raises(BadInput, match=sentence):
        evaluate(tmp_path / f"grey.{suffix}", tmp_path / "one.tif")


def test_jpeg_holds_no_labels(tmp_path: Path) -> None:
    mask = np.kron(np.eye(4, dtype=np.uint8) * 255, np.ones((8, 8), np.uint8))
    Image.fromarray(mask).save(tmp_path / "f.jpg")
    tifffile.imwrite(tmp_path / "t.tif", mask)
    with pytest.raises(BadInput, match=r"f\.jpg holds labels as JPEG, which changes ids"):
        evaluate(tmp_path / "f.jpg", tmp_path / "t.tif")


@pytest.mark.parametrize(("dtype", "high"), [(np.uint32, 4_000_000_000), (np.uint64, 2**62)])
def test_ids_may_be_as_large_as_they_like(tmp_path: Path, dtype: type, high: int) -> None:
    truth = np.array([[1, 1, 2, 2, 0, 3]] * 3, np.uint8)
    tifffile.imwrite(tmp_path / "t.tif", truth)
    tifffile.imwrite(tmp_path / "f.tif", np.where(truth > 0, high - truth.astype(dtype), 0).astype(dtype))
    overall = evaluate(tmp_path / "f.tif", tmp_path / "t.tif", kind="instance", wanted=("all",)).overall
    assert (overall["seg"], overall["adapted_rand_error"], overall["cell_iou"]) == (1, 0, 1)


def test_ids_beyond_63_bits_are_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "t.tif", np.array([[1, 0]] * 2, np.uint8))
    tifffile.imwrite(tmp_path / "f.tif", np.array([[2**63, 0]] * 2, np.uint64))
    with pytest.raises(BadInput, match=r"^f\.tif has label 9223372036854775808, which does not fit 63 bits"):
        evaluate(tmp_path / "f.tif", tmp_path / "t.tif")


def test_images_have_the_slices_of_what_is_drawn(tmp_path: Path, stack: tuple[Path, Path]) -> None:
    tifffile.imwrite(tmp_path / "short.tif", np.zeros((2, 96, 96), np.uint8), photometric="minisblack")
    with pytest.raises(BadInput, match=r"found\.tif is 3 slices of 96x96, short\.tif is 2 slices of 96x96$"):
        evaluate(*stack, figure=tmp_path / "e.png", images=tmp_path / "short.tif")


@pytest.mark.parametrize("option", ["--csv", "--figure"])
def test_a_place_that_cannot_be_written_is_known_before_the_work(
    tmp_path: Path, stack: tuple[Path, Path], option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_text("")
    monkeypatch.setattr("unet_fast.evaluation.read_stack", lambda *_, **__: pytest.fail("work began"))
    words = ["evaluate", "-p", str(stack[0]), "--truth", str(stack[1]), option, str(tmp_path / "taken/o.png")]
    done = CliRunner().invoke(app, words)
    assert (done.exit_code, done.stdout) == (3, "")
    assert "taken" in done.stderr
