"""Files against files: every way to store a prediction gives the same scores, and `overall` pools, not averages."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from typer.testing import CliRunner

from unet_fast import metrics, synthetic
from unet_fast.cli import app
from unet_fast.errors import BadInput
from unet_fast.evaluation import evaluate


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
