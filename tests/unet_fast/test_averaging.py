"""Proves that averages over versions of an image are averages, wherever the image is cut.

What they must equal turns the image with numpy or with complex numbers, predicts each version in one piece, turns the
probabilities back and takes their mean: nothing of the package's own versions is in it (`one_piece`).
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.proof.properties import given, settings, st
from tests.unet_fast.one_piece import averaged, d4, one_piece, picture, rot7, softmax, tiny
from unet_fast import FastUNet, averaging, geometry, inference, plan_tiles, predict
from unet_fast.errors import BadInput
from unet_fast.greys import Greys
from unet_fast.sources import ArraySource
from unet_fast.tiling import Cutter, Tile

few = settings(derandomize=True, database=None, deadline=None, max_examples=20)
some = settings(derandomize=True, database=None, deadline=None, max_examples=50)


def in_tiles(model: FastUNet, n: int, steps: int, tta: str, most: int) -> int:
    """The side of a tile that keeps so many steps of the pooling grid, or more where these were too many tiles."""
    return in_tiles_of(Cutter.of(model, tta), n, steps, most)


def in_tiles_of(cutter: Cutter, n: int, steps: int, most: int) -> int:
    return cutter.smallest(max(steps, -(-n // (most * cutter.step))) * cutter.step)


CASES: dict[str, Any] = {
    "shape": st.tuples(st.integers(1, 60), st.integers(1, 60)),
    "depth": st.integers(0, 3),
    "channels": st.integers(1, 2),
    "classes": st.integers(2, 3),
    "up_mode": st.sampled_from(["deconv", "resize"]),
    "padding": st.sampled_from(["valid", "same"]),
    "steps": st.tuples(st.integers(1, 9), st.integers(1, 9)),
    "batch": st.integers(1, 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("tta", ["d4", "rot7"])
@given(**CASES)
@few
def test_an_average_is_the_mean_over_all_versions_whatever_the_tiles(tta: str, **case: Any) -> None:
    is_the_mean(tta, **case)


@pytest.mark.slow
@pytest.mark.parametrize("tta", ["d4", "rot7"])
@given(**{**CASES, "shape": st.tuples(st.integers(1, 110), st.integers(1, 110))})
@some
def test_averages_of_larger_images_are_means_too(tta: str, **case: Any) -> None:
    is_the_mean(tta, **case)


def is_the_mean(
    tta: str, shape: tuple[int, int], depth: int, channels: int, classes: int, up_mode: str, padding: str,
    steps: tuple[int, int], batch: int,
) -> None:  # fmt: skip
    model = tiny(depth, channels, classes, up_mode=up_mode, padding=padding)
    image = picture(channels, *shape)
    most = 4 if tta == "d4" else 3
    tiles = [in_tiles(model, n, each, tta, most) for n, each in zip(shape, steps, strict=True)]
    if tta == "rot7":
        tiles = [max(tiles)] * 2
    got = predict(model, image, axes="CYX", tta=tta, tile_in=tiles, batch=batch, output="probabilities")
    want = averaged(tta, model, image)
    assert (got.shape, got.dtype) == (want.shape, np.float64)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-9 * want.std() + 1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("tta", ["d4", "rot7"])
@pytest.mark.parametrize("up_mode", ["deconv", "resize"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (1, 37), (37, 1), (2, 23), (9, 9), (8, 9)], ids=str)
def test_the_smallest_and_narrowest_images_are_averaged(shape: tuple[int, int], up_mode: str, tta: str) -> None:
    model, image = tiny(2, up_mode=up_mode), picture(1, *shape)
    want = averaged(tta, model, image)
    for tile in (None, in_tiles(model, max(shape), 1, tta, 10)):
        got = predict(model, image[0], tta=tta, tile_in=tile, output="probabilities")
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_a_reference_that_forgot_something_would_be_seen() -> None:
    model, image = tiny(2), picture(1, 33, 38)
    for tta in ("d4", "rot7"):
        got = predict(model, image[0], tta=tta, output="probabilities")
        alone = softmax(one_piece(model, image))
        # versions differ, and differ from one another
        assert np.abs(got - alone).max() > 0.1 * alone.std()
    degrees = [360 * k / 7 for k in range(7)]
    want = rot7(model, image)
    for wrong in (degrees[:6], [-each for each in degrees[:4]] + degrees[4:], [*degrees[:6], degrees[6] + 1e-5]):
        assert np.abs(rot7(model, image, wrong) - want).max() > 1e-9


def test_a_rotation_by_nothing_is_the_image_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model, image = tiny(2), picture(1, 30, 41)
    want = softmax(one_piece(model, image))
    np.testing.assert_allclose(rot7(model, image, [0.0]), want, rtol=0, atol=1e-13)
    versions = averaging.versions_of("rot7", (30, 41))
    assert versions[0] == averaging.Rotated((30, 41), 0)
    monkeypatch.setattr(inference, "versions_of", lambda *_: versions[:1])
    for tile in (in_tiles(model, 41, 2, "rot7", 9), None):
        got = predict(model, image[0], tta="rot7", tile_in=tile, output="probabilities")
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)
    # one degree is not nothing; twice, because what is no average is asked for its logits
    versions[:1] = [averaging.Rotated((30, 41), 1)] * 2
    monkeypatch.setattr(inference, "versions_of", lambda *_: versions[:2])
    got = predict(model, image[0], tta="rot7", output="probabilities")
    assert np.abs(got - want).max() > 0.1 * want.std()
    np.testing.assert_allclose(got, rot7(model, image, [1.0]), rtol=0, atol=1e-12)


def test_rotations_are_counter_clockwise_as_seen() -> None:
    model, image = tiny(0), picture(1, 21, 21)
    greys, cutter = Greys(ArraySource(image[None]), None, wide=True), Cutter.of(model, "rot7")
    tile, side = Tile(0, 0, 0, 21, 21), cutter.smallest(21)
    for quarter in range(1, 4):
        version = averaging.Rotated((21, 21), 90 * quarter)
        window = version.window(greys, tile, cutter, (side, side))
        # its box begins a pixel earlier where rounding could ask for it
        first = cutter.halo - version._box(tile, cutter)[0][0], cutter.halo - version._box(tile, cutter)[1][0]
        seen = window[:, first[0] : first[0] + 21, first[1] : first[1] + 21]
        np.testing.assert_allclose(seen, np.rot90(image, quarter, (1, 2)), rtol=0, atol=1e-12)
    seven = averaging.versions_of("rot7", (21, 21))
    assert [each.degrees for each in seven] == pytest.approx(
        [0, 51.43, 102.86, 154.29, 205.71, 257.14, 308.57], abs=0.01
    )


def test_the_eight_versions_are_the_eight_symmetries() -> None:
    image = picture(1, 5, 7)
    greys = Greys(ArraySource(image[None]), None, wide=True)
    model = tiny(0)
    cutter = Cutter.of(model, "d4")
    found = []
    for version in averaging.versions_of("d4", (5, 7)):
        window = version.window(greys, Tile(0, 0, 0, 5, 7), cutter, (9, 11))
        assert window.shape == ((1, 11, 9) if version.swapped else (1, 9, 11))
        found.append(window[:, 2:-2, 2:-2].tobytes() + bytes(window.shape))
    want = []
    for turn in range(4):
        for each in (image, image[:, :, ::-1]):
            turned = np.ascontiguousarray(np.rot90(each, turn, (1, 2)))
            want.append(turned.tobytes() + bytes((1, turned.shape[1] + 4, turned.shape[2] + 4)))
    assert len(set(found)) == 8
    assert set(found) == set(want)
    assert [len(averaging.versions_of(tta, (5, 7))) for tta in ("none", "d4", "rot7")] == [1, 8, 7]


@pytest.mark.slow
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    depth=st.integers(0, 3),
    up_mode=st.sampled_from(["deconv", "resize"]),
    steps=st.integers(1, 5),
)
@few
def test_what_is_said_of_a_turned_image_is_the_turned_answer(
    shape: tuple[int, int], depth: int, up_mode: str, steps: int
) -> None:
    model, image = tiny(depth, up_mode=up_mode), picture(*shape)
    tile = in_tiles(model, max(shape), steps, "d4", 4)
    want = predict(model, image, tta="d4", tile_in=tile, output="probabilities")
    for name, turn in {"rows": np.flipud, "columns": np.fliplr, "both": np.rot90, "axes": np.transpose}.items():
        got = predict(model, turn(image), tta="d4", tile_in=tile, output="probabilities")
        np.testing.assert_allclose(got, np.stack([turn(each) for each in want]), rtol=0, atol=1e-14, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("tta", ["d4", "rot7"])
def test_labels_and_thresholds_are_those_of_the_averaged_probabilities(tta: str, padding: str) -> None:
    model, image = tiny(1, padding=padding), picture(2, 30, 25)
    want = np.stack([averaged(tta, model, each[None]) for each in image])
    for tile in (in_tiles(model, 30, 6, tta, 10), None):
        labels = predict(model, image, axes="ZYX", tta=tta, tile_in=tile)
        assert labels.dtype == np.uint8
        assert np.array_equal(labels, want.argmax(1))
        for threshold in (0.0, 0.3, 0.5, 0.77, 1.0):
            assert (np.abs(want[:, 1] - threshold) > 1e-9).all()
            got = predict(model, image, axes="ZYX", tta=tta, tile_in=tile, threshold=threshold)
            assert np.array_equal(got, want[:, 1] > threshold)
    # the mean of labels, or of logits, is something else
    alone = np.stack([one_piece(model, each[None]) for each in image])
    assert (labels != alone.argmax(1)).any()
    three = tiny(1, 1, 3, padding=padding)
    want = averaged(tta, three, image[:1])
    assert np.array_equal(predict(three, image[0], tta=tta), want.argmax(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tta", ["d4", "rot7"])
def test_narrow_nets_are_averaged_in_float32(tta: str, dtype: torch.dtype) -> None:
    model = tiny(1, width=4).to(dtype)
    image = torch.from_numpy(picture(30, 35)).to(dtype).double().numpy()
    exact = FastUNet(**model.settings).to(dtype).eval()
    exact.load_state_dict(model.state_dict())
    want = averaged(tta, exact.double(), image[None])
    got = predict(model, image.astype(np.float32), tta=tta, output="probabilities")
    assert got.dtype == np.float32
    alone = predict(model, image.astype(np.float32), output="probabilities")
    honest = np.abs(alone - softmax(one_piece(exact, image[None]))).max()
    # rotated pixels are rounded once more on their way into a narrow net
    rounded = 0.0 if tta == "d4" or dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    assert np.abs(got - want).max() <= 2 * honest + rounded + 1e-6
    np.testing.assert_allclose(got.sum(0), 1, atol=1e-6)
    # the mean of seven or eight has more than a narrow dtype's digits
    assert len(np.unique(got)) > 0.9 * got.size or dtype == torch.float32


def test_tensors_stacks_and_channels_are_averaged() -> None:
    model, image = tiny(1, 2), picture(3, 2, 20, 26)
    want = np.stack([d4(model, each) for each in image])
    got = predict(model, torch.from_numpy(image), axes="ZCYX", tta="d4", output="probabilities", tile_in=30, batch=4)
    assert isinstance(got, torch.Tensor)
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-13)
    last = predict(model, np.moveaxis(image[0], 0, -1), axes="YXC", tta="d4", output="probabilities")
    np.testing.assert_allclose(last, want[0], rtol=0, atol=1e-13)


def test_a_net_of_one_opinion_keeps_it() -> None:
    model = tiny(2)
    nn.init.zeros_(model.head.weight)
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([0.25, -0.5]))
    said = softmax(np.array([0.25, -0.5]))
    for tta in ("d4", "rot7"):
        got = predict(model, picture(23, 31), tta=tta, tile_in=in_tiles(model, 31, 2, tta, 9), output="probabilities")
        np.testing.assert_allclose(got, np.broadcast_to(said[:, None, None], got.shape), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("settings_", "sentence"),
    [
        ({"tta": "d8"}, "tta must be one of none, d4, rot7, got 'd8'"),
        ({"tta": ""}, "tta must be one of none, d4, rot7, got ''"),
        ({"tta": None}, "tta must be one of none, d4, rot7, got None"),
        ({"tta": "d8", "memory": "1GB"}, "tta must be one of none, d4, rot7, got 'd8'"),
        (
            {"tta": "d4", "output": "logits"},
            "tta d4 averages probabilities; output must be labels or probabilities, got 'logits'",
        ),
        (
            {"tta": "rot7", "output": "logits"},
            "tta rot7 averages probabilities; output must be labels or probabilities, got 'logits'",
        ),
        (
            {"tta": "d4", "tile_in": 18},
            "tile_in 18 keeps 2 right pixels of each tile, fewer than the 3 that one step needs; the smallest for an "
            "image of 9 is 20",
        ),
    ],
    ids=str,
)
def test_an_average_that_cannot_be_taken_is_refused(settings_: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput) as caught:
        predict(tiny(1), picture(9, 9), **settings_)
    assert str(caught.value) == sentence


# ---- what is not looked at


def open_net(depth: int, up_mode: str, padding: str) -> FastUNet:
    """All that it sees is felt: no weight is negative, no unit shut."""
    torch.manual_seed(0)
    model = FastUNet(1, 1, (1,) * (depth + 1), up_mode=up_mode, padding=padding).double().eval()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, 0.2, 0.4)
    return model


def poisoned(model: FastUNet, cutter: Cutter, first: int, count: int, beyond: int, axis: int) -> bool:
    """Whether kept pixels change where all that lies further than `beyond` after them is garbage."""
    # more room than a tile needs
    side = cutter.smallest(first + count) + -(-beyond // cutter.step) * cutter.step
    skip = cutter.halo if cutter.same else 0
    clean = torch.from_numpy(abs(picture(1, 1, side, cutter.step if cutter.same else cutter.smallest(1))))
    last = cutter.halo + first + count - 1 + beyond
    assert last + 1 < side
    bad = clean.clone()
    bad[..., last + 1 :, :] = 1e7
    with torch.no_grad():
        said, other = (model(each.transpose(2, axis)).transpose(2, axis) for each in (clean, bad))
    kept = (said - other)[..., skip + first : skip + first + count, 0].abs().max()
    return bool(kept > 1e-9 * said.std())


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("up_mode", ["deconv", "resize"])
@pytest.mark.parametrize("depth", [0, 1, 2, 3, *(pytest.param(deep, marks=pytest.mark.slow) for deep in (4, 5))])
def test_garbage_beyond_what_is_looked_at_changes_nothing(depth: int, up_mode: str, padding: str) -> None:
    model = open_net(depth, up_mode, padding)
    cutter = Cutter.of(model)
    step, halo = cutter.step, geometry.halo(depth)
    # where the kept pixels begin in their pooling cell
    starts = range(step) if step <= 8 else (0, 1, 2, 3, 4, 5, 6, step - 1)
    for axis in (2, 3) if depth < 4 else (2,):
        for count in (1, 2, step + 3):
            assert not any(poisoned(model, cutter, first, count, cutter.beyond, axis) for first in starts)
        # a net looks a halo beyond the end of a pooling cell, and resize at each level at the next pixel too
        further = step - 1 if up_mode == "resize" else 0
        needed = halo + step - 1 + further
        assert not any(poisoned(model, cutter, first, 1, needed, axis) for first in starts)
        assert any(poisoned(model, cutter, first, 1, needed - 1, axis) for first in starts)


# ---- plans


@given(
    shape=st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    depth=st.integers(0, 5),
    up_mode=st.sampled_from(["deconv", "resize"]),
    padding=st.sampled_from(["valid", "same"]),
    tta=st.sampled_from(["d4", "rot7"]),
    steps=st.one_of(st.none(), st.integers(1, 12)),
)
@settings(derandomize=True, database=None, deadline=None, max_examples=300)
def test_each_version_lies_inside_what_its_tile_answers_for(
    shape: tuple[int, int], depth: int, up_mode: str, padding: str, tta: str, steps: int | None
) -> None:
    cutter = Cutter(depth, up_mode, padding, tta)
    # some dozens of tiles at most
    tile_in = None if steps is None else in_tiles_of(cutter, max(shape), steps, 30)
    plan = plan_tiles(shape, depth=depth, up_mode=up_mode, padding=padding, tta=tta, tile_in=tile_in)
    if tta == "rot7":
        assert plan.tile_in[0] == plan.tile_in[1]
    tiles = list(plan.tiles())
    # corners, and some between them
    for tile in {tiles[0], tiles[-1], tiles[plan.grid[1] - 1], tiles[len(tiles) // 2], tiles[len(tiles) // 3]}:
        for version in averaging.versions_of(tta, shape):
            if isinstance(version, averaging.Rotated):
                box = version._box(tile, cutter)
                rows, columns = np.meshgrid(
                    [tile.row, tile.row + tile.rows - 1], [tile.column, tile.column + tile.columns - 1]
                )
                for (start, count), places in zip(box, version._turn(rows, columns, -1), strict=True):
                    assert start <= places.min() + 1e-6
                    # the pixel before and the one after
                    assert places.max() <= start + count - 1 + 1e-6
            else:
                # what is kept begins on the version's own grid, up to a step before the tile
                box = [(start - start % cutter.step, start % cutter.step + n) for start, n in version._spans(tile)]
            for (start, count), side in zip(box, plan.tile_in, strict=True):
                assert start % cutter.step == 0
                assert count <= cutter.right(side)
