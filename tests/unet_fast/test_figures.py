"""Pictures show what they say: lines where ids change, files that open, nothing half-written."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from PIL import Image

from unet_fast import figures, synthetic
from unet_fast.errors import BadInput
from unet_fast.figures import Curve

IMAGE, IDS = synthetic.cells(64, seed=0)
TILES = range(188, 4001, 64)


def curve(name: str, share: float = 1.0, *, measured: bool = True) -> Curve:
    """As that of the paper's net: 2.3 kB a pixel."""
    sizes = [round(share * (2.5e8 + 2300 * n**2)) for n in TILES]
    points = [(n, round(1.2 * size), 0.02 * (n - 184) / n) for n, size in zip(TILES, sizes, strict=True)]
    expected = [0.02 * (1 - 184 / n) ** 2 for n in TILES]
    return Curve(name, TILES, sizes, expected if measured else [], points[:6] if measured else [])


def drawn(monkeypatch: pytest.MonkeyPatch, *curves: Curve) -> Figure:
    kept: list[Figure] = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: kept.append(figure))
    figures.draw_profile(Path("unused.png"), curves, "31 million parameters")
    kept[0].canvas.draw()
    return kept[0]


def plotted(line: Line2D) -> tuple[list[float], list[float]]:
    return np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()


def said(figure: Figure) -> list[Text]:
    """Notes in the two panels, and their titles."""
    return [
        text for axis in figure.axes for text in (*axis.texts, axis.title) if text.get_visible() and text.get_text()
    ]


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
        lambda p: figures.draw_profile(p, [curve("train float32")], "one"),
        lambda p: figures.draw_profile(p, [curve(f"predict {n}", 1 / n) for n in range(1, 10)], "many"),
        lambda p: figures.draw_profile(p, [curve("train float32", measured=False)], "counted"),
    ],
    ids=["prediction", "weight", "elastic", "seams", "curves", "profile", "many profiles", "profile of counts"],
)
def test_every_figure_is_a_picture(tmp_path: Path, draw: "object") -> None:
    place = tmp_path / "figure.png"
    draw(place)  # type: ignore[operator]
    with Image.open(place) as picture:
        picture.load()
        assert min(picture.size) > 200
        assert np.asarray(picture.convert("L")).std() > 5
    assert [p.name for p in tmp_path.iterdir()] == ["figure.png"]


def opened(png: bytes) -> "np.ndarray":
    with Image.open(BytesIO(png)) as picture:
        return np.asarray(picture.convert("RGB"))


@pytest.mark.parametrize(
    ("shape", "size"), [((20, 30), (80, 120)), ((500, 768), (500, 768)), ((2000, 900), (667, 300))]
)
def test_pictures_for_a_page_are_neither_tiny_nor_huge(shape: tuple[int, int], size: tuple[int, int]) -> None:
    image, ids = np.random.default_rng(0).random(shape), np.zeros(shape, np.int32)
    ids[: shape[0] // 2] = 1
    picture = opened(figures.outlined_png(image, (ids, figures.FOUND)))
    assert picture.shape == (*size, 3)
    line = (picture == figures.FOUND).all(-1)
    rows = np.flatnonzero(line.all(1))
    assert abs(rows - size[0] // 2).max() <= 2
    assert line.sum() == len(rows) * size[1]
    assert opened(figures.weight_png(image)).shape == (*size, 3)
    plain = opened(figures.outlined_png(image))
    assert (plain[..., :1] == plain).all()


def test_pictures_for_a_page_are_those_of_a_figure() -> None:
    page = opened(figures.outlined_png(IMAGE, (IDS, figures.TRUTH), side=3 * 64))
    figure = figures.outlined(IMAGE, IDS, figures.TRUTH, zoom=3)
    assert np.abs(page.astype(int) - figure).max() <= 2


def test_outlines_of_a_picture_for_a_page_lie_one_over_the_other() -> None:
    under, over = np.zeros((2, 40, 60), np.int32)
    under[10:30, 10:50], over[10:30, 10:30] = 1, 1
    picture = opened(figures.outlined_png(np.zeros((40, 60)), (under, figures.FOUND), (over, figures.TRUTH)))
    zoom = picture.shape[0] // 40
    assert tuple(picture[10 * zoom, 12 * zoom]) == figures.TRUTH
    assert tuple(picture[10 * zoom, 40 * zoom]) == figures.FOUND


def test_a_smaller_image_has_the_means_of_the_pixels() -> None:
    image = np.arange(35.0).reshape(5, 7)
    smaller = figures._smaller(image, 3)
    assert smaller.shape == (2, 3)
    assert smaller[0, 0] == image[:3, :3].mean()
    assert smaller[1, 2] == image[3:, 6:].mean()


def test_the_ridge_is_where_the_weight_is_greatest() -> None:
    weight, ids = np.ones((200, 300)), np.zeros((200, 300), np.int32)
    weight[150:156, 250:256] = 11
    ids[100:, 253:] = 1
    picture = opened(figures.ridge_png(weight, ids))
    assert picture.shape == (384, 384, 3)
    lightest = opened(figures.weight_png(weight)).reshape(-1, 3).max(0)
    assert (np.abs(picture.astype(int) - lightest).max(-1) < 3).sum() > 6 * 5 * 64
    assert (picture == 255).all(-1).any()
    assert opened(figures.ridge_png(np.ones((5, 70)), np.zeros((5, 70), np.int32))).shape == (40, 384, 3)


def test_a_flat_image_and_an_empty_one_can_be_drawn(tmp_path: Path) -> None:
    flat = np.full((20, 30), 7)
    figures.draw_prediction(tmp_path / "flat.png", flat, np.zeros((20, 30), int), np.zeros((20, 30), int))
    figures.draw_weight(tmp_path / "weight.png", flat, np.zeros((20, 30), int), np.ones((20, 30)))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be written"):
        figures.draw_prediction(tmp_path / "missing" / "figure.png", IMAGE, IDS, IDS)


def test_a_profile_has_a_line_for_each_card_and_one_for_each_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    curves = [curve("train float32"), curve("predict float32", 0.2), curve("predict bfloat16", 0.1, measured=False)]
    memory, speed = drawn(monkeypatch, *curves).axes
    assert memory.get_legend_handles_labels()[1] == [each.name for each in curves]
    assert speed.get_legend_handles_labels()[1] == ["train float32", "predict float32"]
    low, high = memory.get_ylim()
    for card in (4, 6, 8, 12, 24):
        assert low < card < high
        assert sum(plotted(line)[1] == [card, card] for line in memory.lines) == 1
        assert sum(plotted(line)[0] == [card, card] for line in speed.lines) == 1
        assert f"{card} GB" in [text.get_text() for text in memory.texts]
    for each in curves:
        (line,) = (line for line in memory.lines if line.get_label() == each.name)
        assert plotted(line) == (list(TILES), [size / 1e9 for size in each.counted_bytes])
    left, right = ([plotted(line) for line in axis.lines if line.get_marker() == "o"] for axis in (memory, speed))
    for each, (tiles, sizes), (again, speeds) in zip(curves[:2], left, right, strict=True):
        assert sizes == again
        assert tiles == [tile for tile, _, _ in each.measured]
        assert sizes == [size / 1e9 for _, size, _ in each.measured]
        assert speeds == [speed for _, _, speed in each.measured]


def test_a_profile_of_counts_says_that_nothing_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, measured = (drawn(monkeypatch, curve("train float32", measured=known)) for known in (False, True))
    assert [text.get_text() for text in counts.axes[1].texts] == ["nothing was measured"]
    assert "nothing was measured" not in [text.get_text() for text in measured.axes[1].texts]


def test_lines_of_training_and_of_prediction_differ_in_more_than_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, _ = drawn(monkeypatch, curve("train float32"), curve("predict float32", 0.2)).axes
    styles = {str(line.get_label()): line.get_linestyle() for line in memory.lines}
    assert styles["train float32"] != styles["predict float32"]


@pytest.mark.parametrize("share", [1.0, 0.03])
def test_no_word_of_a_profile_is_written_over_another(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn(monkeypatch, curve("train float32", share), curve("predict float32", share / 5))
    boxes = [(text.get_text(), text.get_window_extent()) for text in said(figure)]
    over = [(a, b) for i, (a, one) in enumerate(boxes) for b, other in boxes[:i] if one.overlaps(other)]
    assert over == []
