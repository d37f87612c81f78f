"""The demo does the whole job, and takes nobody's folder. How well it does it, `.ci/run` asks of the full one."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from unet_fast import demo
from unet_fast.cli import app
from unet_fast.errors import BadInput


@pytest.mark.slow
def test_the_demo_leaves_scores_pictures_and_a_model(tmp_path: Path) -> None:
    out = tmp_path / "shown"
    # another demo in the same place begins anew
    stale = [out / demo._MARK, out / "old.png", out / "with_border_weight" / "config.toml", out / "otsu" / "old.tif"]
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("of an earlier demo")
    done = CliRunner().invoke(app, ["demo", "--out", str(out), "--quick"])
    assert done.exit_code == 0, done.output
    scores = json.loads((out / "scores.json").read_text())
    assert set(scores) == {"with_border_weight", "without", "otsu", "seams"}
    assert scores["otsu"]["cell_iou"] < 0.6
    assert scores["otsu"]["touching_pairs"] == scores["without"]["touching_pairs"] > 0
    assert scores["seams"]["largest_difference"] < 1e-4 * scores["seams"]["logits_sd"]
    assert scores["seams"]["tiles"] > 1
    pictures = {p.name for p in out.glob("*.png")}
    assert pictures == {"prediction.png", "weight_map.png", "elastic.png", "seams.png", "curves.png"}
    assert all(name in done.stdout for name in pictures)
    assert not any(path.exists() and path.read_text() == "of an earlier demo" for path in stale)


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(BadInput, match="holds other files"):
        demo.run(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
