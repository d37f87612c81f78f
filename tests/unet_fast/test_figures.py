"""Pictures show what they say: lines where ids change, files that open, nothing half-written."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unet_fast import figures, synthetic
from unet_fast.errors import BadInput

IMAGE, IDS = synthetic.cells(64, seed=0)


def test_outlines_lie_on_the_inside_of_every_edge() -> None:
    ids = np.array([[1, 1, 2, 2], [1, 1, 2, 2], [0, 0, 0, 0]])
    picture = figures.outlined(np.zeros((3, 4)), ids, figures.TRUTH, zoom=3)
    drawn = (picture == figures.TRUTH).all(-1)
    assert picture.shape == (9, 12, 3)
    # touching cells show two lines, one on each side; background none
    assert drawn[1, 5]
    assert drawn[1, 6]
    assert not drawn[6:].any()
    assert not drawn[1, 1]


@pytest.mark.parametrize(
    "draw",
    [
        lambda p: figures.draw_prediction(p, IMAGE, IDS, IDS),
        lambda p: figures.draw_weight(p, IMAGE, IDS, np.linspace(1, 11, IDS.size).reshape(IDS.shape)),
        lambda p: figures.draw_elastic(p, (IMAGE, IDS), (IMAGE, IDS), (IDS > 0, IDS == 0)),
        lambda p: figures.draw_seams(p, IMAGE, np.full(IMAGE.shape, 1e-7), 16, 1.0),
        lambda p: figures.draw_curves(p, {"a": [{"step": 1, "loss": 2.0, "val_iou": 0.5, "best": 1}], "b": []}),
    ],
    ids=["prediction", "weight", "elastic", "seams", "curves"],
)
def test_every_figure_is_a_picture(tmp_path: Path, draw: "object") -> None:
    place = tmp_path / "figure.png"
    draw(place)  # type: ignore[operator]
    with Image.open(place) as picture:
        picture.load()
        assert min(picture.size) > 200
        assert np.asarray(picture.convert("L")).std() > 5
    assert [p.name for p in tmp_path.iterdir()] == ["figure.png"]


def test_a_flat_image_and_an_empty_one_can_be_drawn(tmp_path: Path) -> None:
    flat = np.full((20, 30), 7)
    figures.draw_prediction(tmp_path / "flat.png", flat, np.zeros((20, 30), int), np.zeros((20, 30), int))
    figures.draw_weight(tmp_path / "weight.png", flat, np.zeros((20, 30), int), np.ones((20, 30)))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be written"):
        figures.draw_prediction(tmp_path / "missing" / "figure.png", IMAGE, IDS, IDS)
