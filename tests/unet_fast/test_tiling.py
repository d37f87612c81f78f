"""Proves that an image's cut is its own affair: whatever the tiles, the answer is that of one endless mirrored image.

What tiles must equal is made without them: the mirrored image by walking to and fro over the pixels, one forward pass
over all of it, in float64. The checks themselves are shown able to fail.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tests.proof.properties import given, settings, st
from unet_fast import FastUNet, Normalisation, geometry, inference, plan_tiles, predict, seams, tiling
from unet_fast.greys import Greys
from unet_fast.memory import estimate, largest_tile
from unet_fast.sources import ArraySource
from unet_fast.units import bytes_of

some = settings(derandomize=True, database=None, deadline=None, max_examples=40)
many = settings(derandomize=True, database=None, deadline=None, max_examples=400)


def net(depth: int = 1, channels: int = 1, classes: int = 2, **more: Any) -> FastUNet:
    torch.manual_seed(depth)
    features = (2, 3, 4, 5)[: depth + 1]
    model = FastUNet(channels, classes, features, **more).double().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model


def picture(*shape: int, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=shape)


def to_and_fro(n: int, start: int, count: int) -> list[int]:
    """Indices met by a walk over n pixels that turns at both ends, from `start` < 0 on; pixel 0 at step -start."""
    place, direction, met = 0, -1, []
    for _ in range(-start):
        if n > 1 and not 0 <= place + direction < n:
            direction = -direction
        place += direction if n > 1 else 0
    # at `start` now; the way back is the same walk, turned round
    direction = -direction
    for _ in range(count):
        met.append(place)
        if n > 1 and not 0 <= place + direction < n:
            direction = -direction
        place += direction if n > 1 else 0
    return met


def test_the_walk_mirrors_as_the_conventions_say() -> None:
    assert [i + 1 for i in to_and_fro(4, -3, 8)] == [4, 3, 2, 1, 2, 3, 4, 3]
    assert [i + 1 for i in to_and_fro(4, -2, 8)] == [3, 2, 1, 2, 3, 4, 3, 2]
    assert to_and_fro(3, -5, 11) == [1, 0, 1, 2, 1, 0, 1, 2, 1, 0, 1]
    assert to_and_fro(1, -2, 4) == [0, 0, 0, 0]
    for n, margin in ((5, 4), (9, 3)):
        want = np.pad(np.arange(n), margin, mode="reflect")
        assert to_and_fro(n, -margin, n + 2 * margin) == want.tolist()


def in_one_piece(model: FastUNet, image: NDArray[Any]) -> NDArray[np.float64]:
    """Logits [K, H, W] of [C, H, W] by one forward pass over the mirrored image, made without the tiler."""
    depth, step = model.depth, geometry.step_multiple(model.depth)
    if model.padding == "same":
        # so wide a frame, in whole steps of the pooling grid, that no padded zero is felt inside it
        before, reach = 8 * step, 16 * step
        sides = [-(-(n + reach) // step) * step for n in image.shape[-2:]]
    else:
        before = geometry.halo(depth)
        # and enough to the right that what resize repeats at the far end is not looked at
        sides = [next(m for m in range(n + 2 * before + step, 10_000) if _legal(m, depth)) for n in image.shape[-2:]]
    rows, columns = (to_and_fro(n, -before, side) for n, side in zip(image.shape[-2:], sides, strict=True))
    mirrored = torch.from_numpy(image[:, rows][:, :, columns])[None].double()
    with torch.no_grad():
        logits = model(mirrored)[0].numpy()
    first = before if model.padding == "same" else 0
    height, width = image.shape[-2:]
    return logits[:, first : first + height, first : first + width]


def _legal(n: int, depth: int) -> bool:
    try:
        geometry.output_size(n, depth)
    except ValueError:
        return False
    return True


def tile_that_keeps(model: FastUNet, steps: int) -> int:
    """The smallest tile whose right part is `steps` steps of the pooling grid."""
    step = geometry.step_multiple(model.depth)
    endless = 10**6
    for side in range(1, 2000):
        try:
            plan = plan_tiles((endless, 1), tile_in=(side, None), model=model)
        except ValueError:
            continue
        if plan.keep[0] >= steps * step:
            return side
    raise AssertionError


@pytest.mark.slow
@given(
    height=st.integers(1, 150),
    width=st.integers(1, 150),
    depth=st.integers(0, 3),
    channels=st.integers(1, 2),
    up_mode=st.sampled_from(["deconv", "resize"]),
    padding=st.sampled_from(["valid", "same"]),
    cuts=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    batch=st.integers(1, 3),
)
@some
def test_tiles_join_to_what_one_forward_pass_says(
    height: int, width: int, depth: int, channels: int, up_mode: str, padding: str, cuts: tuple[int, int], batch: int
) -> None:
    model = net(depth, channels, up_mode=up_mode, padding=padding)
    image, step = picture(channels, height, width), geometry.step_multiple(depth)
    tiles = [tile_that_keeps(model, max(1, n // (cut * step))) for n, cut in zip((height, width), cuts, strict=True)]
    want = in_one_piece(model, image)
    got = predict(model, image, axes="CYX", tile_in=tiles, output="logits", batch=batch)
    assert (got.shape, got.dtype) == (want.shape, np.float64)
    assert np.abs(got - want).max() <= 1e-9 * want.std() + 1e-13


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("up_mode", ["deconv", "resize"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (2, 3), (5, 100)], ids=str)
def test_a_halo_longer_than_the_image_is_no_obstacle(shape: tuple[int, int], up_mode: str, padding: str) -> None:
    model = net(3, up_mode=up_mode, padding=padding)
    image = picture(*shape)
    want = in_one_piece(model, image[None])
    for tile in (None, tile_that_keeps(model, 1), tile_that_keeps(model, 2)):
        got = predict(model, image, tile_in=tile, output="logits")
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_tiles_of_the_papers_depth_join() -> None:
    torch.manual_seed(0)
    model = FastUNet(1, 2, (2, 2, 3, 3, 4)).double().eval()
    image = picture(130, 170)
    want = in_one_piece(model, image[None])
    for tile in (204, 236, 300):
        got = predict(model, image, tile_in=tile, output="logits")
        assert np.abs(got - want).max() <= 1e-9 * want.std()


def test_a_step_off_the_pooling_grid_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, image = net(2), picture(120, 120)
    plan = plan_tiles(image.shape, tile_in=60, model=model)
    greys = Greys(ArraySource(image[None, None]), None, wide=True)
    assert plan.step == (20, 20)
    sound = seams.verify_seams(model, greys, plan)
    assert sound.exact
    assert sound.largest_difference <= 1e-9 * sound.sd
    # the whole output of each tile, as the original did, wherever it begins: 18, which is no multiple of 4
    aligned = tiling.Cutter.of

    def anywhere(*arguments: Any) -> tiling.Cutter:
        cutter = aligned(*arguments)
        cutter.step, cutter.smallest = 1, aligned(*arguments).smallest  # type: ignore[method-assign]
        return cutter

    monkeypatch.setattr(tiling.Cutter, "of", anywhere)
    broken = seams.verify_seams(model, greys, replace(plan, keep=(18, 18), step=(18, 18), grid=(7, 7)))
    assert not broken.exact
    assert broken.largest_difference > 0.1 * broken.sd
    assert broken.labels_that_differ > 0


def test_the_seam_check_reports_what_it_compared() -> None:
    model = net(2).float()
    image = picture(3, 70, 90).astype(np.float32)
    found = seams.seam_check(model, image, axes="ZYX")
    assert found["tile_in"] == tile_that_keeps(model, 2)
    assert found["tiles"] == math.ceil(70 / 8) * math.ceil(90 / 8)
    assert found["difference"].shape == (70, 90)
    assert found["difference"].max() == found["largest_difference"] <= 1e-5 * found["logits_sd"]
    assert found["labels_that_differ"] == 0
    again = seams.seam_check(model, torch.from_numpy(image[0]), tile_in=48)
    assert (again["tile_in"], again["difference"].shape) == (48, (70, 90))


# ---- plans


@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    depth=st.integers(0, 5),
    up_mode=st.sampled_from(["deconv", "resize"]),
    padding=st.sampled_from(["valid", "same"]),
    steps=st.one_of(st.none(), st.integers(1, 12)),
)
@many
def test_a_plan_covers_the_image_once_on_the_pooling_grid(
    height: int, width: int, depth: int, up_mode: str, padding: str, steps: int | None
) -> None:
    step, halo = geometry.step_multiple(depth), geometry.halo(depth)
    tile = None
    if steps is not None:
        enough = (steps + 16) * step + 2 * halo + 4
        tile = geometry.legal_sizes(enough, enough + step, depth)[0] if padding == "valid" else enough // step * step
    plan = plan_tiles((height, width), tile_in=tile, depth=depth, up_mode=up_mode, padding=padding)
    assert plan.shape == (height, width)
    for n, side, keep, apart, count in zip(plan.shape, plan.tile_in, plan.keep, plan.step, plan.grid, strict=True):
        if padding == "valid":
            assert _legal(side, depth)
        else:
            assert side % step == 0
        assert tile is None or side == tile
        assert 1 <= keep == apart
        assert count == 1 or apart % step == 0
        # no tile in vain, none missing
        assert (count - 1) * apart < n <= count * apart
        # what is kept is right: valid convolutions take a halo, resize spoils the last 2^depth - 1 pixels
        assert keep + 2 * halo + (step - 1 if up_mode == "resize" else 0) <= side
    assert plan.halo >= halo
    assert len(plan) == plan.grid[0] * plan.grid[1] == len(list(plan))
    assert plan.overhead == pytest.approx(len(plan) * math.prod(plan.tile_in) / (height * width))


def test_the_places_of_tiles_are_steps_apart_row_by_row() -> None:
    plan = plan_tiles((100, 50), tile_in=60, depth=2)
    assert (plan.keep, plan.step, plan.grid, plan.halo) == ((20, 20), (20, 20), (5, 3), 20)
    assert list(plan) == [(20 * i, 20 * j) for i in range(5) for j in range(3)]
    assert plan.overhead == 15 * 60 * 60 / 5000


@given(n=st.integers(1, 20_000))
@many
def test_the_usual_tile_is_no_larger_than_the_papers_and_wastes_little(n: int) -> None:
    plan = plan_tiles((n, 1))
    side, count = plan.tile_in[0], plan.grid[0]
    assert side <= 572
    # never a tile more than 572 would take, and never two steps more read than this many tiles must read
    assert count == max(1, -(-n // 384)) if n > 388 else count == 1
    least = -(-n // count) + 184
    assert side - least < 2 * 16


HAND = {
    # (image, tile_in): tile, keep, grid. halo 92: a tile of s is right on s - 184, in steps of 16
    "the paper's tile on its challenge's image": ((512, 572), (572, 384, 2)),
    "one tile over the image": ((512, 700), (700, 512, 1)),
    "the smallest that covers it": ((512, 696 + 4), (700, 512, 1)),
    "one step less does not": ((512, 684), (684, 496, 2)),
    "left open, two tiles of 256": ((512, None), (444, 256, 2)),
    "388 just fits the paper's": ((388, None), (572, 388, 1)),
    "389 does not": ((389, None), (396, 208, 2)),
    "the smallest tile, where it covers": ((4, 188), (188, 4, 1)),
    "the smallest that can be repeated": ((512, 204), (204, 16, 32)),
}


@pytest.mark.parametrize("case", HAND)
def test_plans_at_the_papers_depth_are_those_found_by_hand(case: str) -> None:
    (n, tile), (side, keep, count) = HAND[case]
    plan = plan_tiles((n, n), tile_in=tile)
    assert (plan.tile_in, plan.keep, plan.grid) == ((side, side), (keep, keep), (count, count))
    assert plan.halo == 92
    assert plan.overhead == pytest.approx((side * count / n) ** 2)


def test_resize_keeps_sixteen_less_of_the_papers_tile() -> None:
    plan = plan_tiles((1000, 1000), tile_in=572, up_mode="resize")
    assert (plan.keep, plan.step) == ((368, 368), (368, 368))


def test_a_plan_takes_the_nets_own_geometry() -> None:
    model = net(2, up_mode="resize", padding="same")
    assert plan_tiles((200, 90), model=model) == plan_tiles((200, 90), depth=2, up_mode="resize", padding="same")
    assert plan_tiles((3, 200, 90), model=model).shape == (200, 90)


@pytest.mark.parametrize("tile", [60, np.int64(60), (60, 60), [60, None], np.array([60, 60])], ids=repr)
def test_a_tile_is_a_side_or_a_pair(tile: Any) -> None:
    plan = plan_tiles((100, 60), tile_in=tile, depth=2)
    assert plan.tile_in[0] == 60
    assert all(type(side) is int for side in plan.tile_in)


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no step kept": (
        (512, 512),
        {"tile_in": 188},
        "tile_in 188 keeps 4 right pixels of each tile, fewer than the 16 that one step needs; "
        "the smallest for an image of 512 is 204",
    ),
    "no step kept by resize": (
        (512, 512),
        {"tile_in": 204, "up_mode": "resize"},
        "tile_in 204 keeps 5 right pixels of each tile, fewer than the 16 that one step needs; "
        "the smallest for an image of 512 is 220",
    ),
    "nothing kept, of a small image": (
        (4, 7),
        {"tile_in": 188},
        "tile_in 188 keeps 4 right pixels of each tile, fewer than the 16 that one step needs; "
        "the smallest for an image of 7 is 204",
    ),
    "between two": ((512, 512), {"tile_in": 570}, "tile_in 570 cannot be pooled 4 times; nearest are 556 and 572"),
    "too small": ((512, 512), {"tile_in": 100}, "tile_in 100 is too small to be pooled 4 times; the smallest is 188"),
    "off the grid of a padded net": (
        (512, 512),
        {"tile_in": 570, "padding": "same"},
        "tile_in 570 must be a multiple of 16 for padding 'same'; nearest are 560 and 576",
    ),
    "no rows": ((0, 5), {}, "an image must have at least one row and one column, got [0, 5]"),
    "one axis": ((5,), {}, "an image must have at least one row and one column, got [5]"),
    "three sides": (
        (5, 5),
        {"tile_in": (1, 2, 3)},
        "tile_in must be one side or rows and columns, in whole pixels, got (1, 2, 3)",
    ),
    "half a pixel": (
        (5, 5),
        {"tile_in": 188.5},
        "tile_in must be one side or rows and columns, in whole pixels, got 188.5",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_tile_that_does_not_fit_is_refused_with_the_nearest_that_does(case: str) -> None:
    shape, given_, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=r".") as caught:
        plan_tiles(shape, **given_)
    assert str(caught.value) == sentence
    # what it names does fit
    named = [int(word) for word in sentence.replace(",", "").split(" is ")[-1].split() if word.isdecimal()]
    if "the smallest" in sentence:
        plan_tiles(shape, **{**given_, "tile_in": named[0] if named[0] > 188 else 204})


# ---- plans inside a budget


@pytest.mark.parametrize("memory", ["150MB", "200 MB", 3e8, "0.5GiB", "2GB"])
@pytest.mark.parametrize("shape", [(1, 1), (300, 200), (2000, 700), (5000, 5000)])
def test_a_plan_keeps_to_its_budget_with_the_fewest_tiles(shape: tuple[int, int], memory: str | float) -> None:
    with torch.device("meta"):
        model = FastUNet(features=(32, 64, 128, 256, 512))
    plan = plan_tiles(shape, memory=memory, model=model)
    budget = bytes_of(memory)
    assert plan.predicted_bytes == estimate(model, plan.tile_in, mode="predict").total <= budget
    # tiles of the largest side that fits are no fewer
    largest = largest_tile(budget, model, mode="predict")
    assert len(plan) <= len(plan_tiles(shape, tile_in=largest, model=model))


def test_a_plan_is_a_table_for_people() -> None:
    assert str(plan_tiles((40000, 30000), tile_in=572)).splitlines() == [
        "image     40000 x 30000",
        "tile      572 x 572, of which 384 x 384 are kept (halo 92)",
        "tiles     105 x 79 = 8295, 384 x 384 apart",
        "overhead  2.26 pixels read per pixel kept",
        "memory    unknown counted",
    ]
    assert "memory    38 MB counted" in str(plan_tiles((300, 300), model=FastUNet(features=(16, 32, 64)), tile_in=356))


@pytest.mark.parametrize(
    ("given_", "sentence"),
    [
        ({"memory": "6 apples"}, r"^memory must be a size such as 6GB, 500MB or 4GiB, got 6 apples$"),
        ({"memory": 0}, r"^memory must be a size such as 6GB, 500MB or 4GiB, got 0$"),
        ({"memory": "1kB"}, r"^a budget must be at least \d+ bytes, for the smallest tile, 44 x 44, got 1000$"),
        ({"memory": "1GB", "tile_in": 76}, r"^memory needs a model with padding 'valid', and no tile_in beside it$"),
        ({"memory": "1GB", "model": None}, r"^memory needs a model with padding 'valid', and no tile_in beside it$"),
    ],
    ids=str,
)
def test_a_budget_that_cannot_be_kept_is_refused(given_: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        plan_tiles((99, 99), **{"model": FastUNet(features=(4, 8, 8)), **given_})


# ---- predict


AXES_OF = {
    # axes, the model's channels: shape, the shape of labels
    ("YX", 1): ((9, 11), (9, 11)),
    ("CYX", 1): ((1, 9, 11), (9, 11)),
    ("CYX", 2): ((2, 9, 11), (9, 11)),
    ("YXC", 2): ((9, 11, 2), (9, 11)),
    ("ZYX", 1): ((3, 9, 11), (3, 9, 11)),
    ("ZCYX", 2): ((3, 2, 9, 11), (3, 9, 11)),
    ("ZCYX", 1): ((1, 1, 9, 11), (1, 9, 11)),
    (None, 1): ((9, 11), (9, 11)),
    (None, 2): ((2, 9, 11), (9, 11)),
}


@pytest.mark.parametrize(("axes", "channels"), AXES_OF, ids=str)
@pytest.mark.parametrize("output", inference.OUTPUTS)
def test_every_order_of_axes_says_what_its_planes_say(axes: str | None, channels: int, output: str) -> None:
    shape, labels = AXES_OF[axes, channels]
    model, image = net(1, channels, classes=3), picture(*shape)
    got = predict(model, image, axes=axes, output=output)
    stack = np.moveaxis(image, -1, 0) if axes == "YXC" else image
    stack = stack.reshape(-1, channels, 9, 11)
    want = np.stack([in_one_piece(model, plane) for plane in stack])
    if output == "labels":
        want = want.argmax(1)
    elif output == "probabilities":
        want = np.exp(want) / np.exp(want).sum(1, keepdims=True)
    inner = labels if output == "labels" else (*labels[:-2], 3, *labels[-2:])
    assert got.shape == inner
    np.testing.assert_allclose(got, want.reshape(inner), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("classes", "output", "dtype", "expected"),
    [
        (2, "labels", torch.float32, np.uint8),
        (256, "labels", torch.float32, np.uint8),
        (257, "labels", torch.float32, np.uint16),
        (2, "probabilities", torch.float32, np.float32),
        (2, "logits", torch.float64, np.float64),
        (2, "logits", torch.bfloat16, np.float32),
    ],
    ids=str,
)
def test_results_have_the_dtype_that_holds_them(classes: int, output: str, dtype: torch.dtype, expected: Any) -> None:
    model = net(0, classes=classes).to(dtype)
    assert predict(model, picture(4, 4), output=output).dtype == expected
    tensor = predict(model, torch.zeros(4, 4), output=output)
    assert isinstance(tensor, Tensor)
    assert tensor.numpy().dtype == expected


def test_the_257th_class_is_named() -> None:
    model = net(0, classes=300)
    nn.init.zeros_(model.head.weight)
    with torch.no_grad():
        model.head.bias.copy_(torch.arange(300.0))
    assert (predict(model, np.zeros((3, 3))) == 299).all()


@pytest.mark.parametrize("kind", ["u1", "u2", "<i4", "i8", "f2", "f4", ">u2", ">f4", ">f8", "?"])
def test_any_dtype_of_image_is_taken_at_its_values(kind: str) -> None:
    values = np.random.default_rng(0).integers(0, 2 if kind == "?" else 200, (8, 9))
    model = net(1)
    want = predict(model, values.astype(np.float64), output="logits")
    assert np.array_equal(predict(model, values.astype(kind), output="logits"), want)
    # a percentile of a mask too
    model.normalisation = Normalisation()
    want = predict(model, values.astype(np.float64), output="logits")
    np.testing.assert_allclose(predict(model, values.astype(kind), output="logits"), want, atol=1e-5)


def test_large_whole_numbers_are_exact_in_a_float64_net() -> None:
    image = np.random.default_rng(0).integers(0, 2**31 - 1, (5, 5))
    model = net(1)
    want = in_one_piece(model, image[None])
    np.testing.assert_allclose(predict(model, image, output="logits"), want, rtol=1e-13)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_tensors_of_any_dtype_and_strides_are_taken(dtype: torch.dtype) -> None:
    values = torch.from_numpy(np.random.default_rng(0).integers(0, 200, (9, 8))).to(dtype).t()
    got = predict(net(1), values, output="logits")
    want = predict(net(1), values.double().numpy(), output="logits")
    assert isinstance(got, Tensor)
    assert torch.equal(got, torch.from_numpy(want))
    backwards = values.double().numpy()[::-1, ::-1]
    assert np.array_equal(predict(net(1), backwards), predict(net(1), backwards.copy()))


def test_nothing_that_comes_in_is_changed() -> None:
    image, model = picture(20, 20), net(1)
    kept, parameters = image.copy(), {k: v.clone() for k, v in model.state_dict().items()}
    model.normalisation = Normalisation("range", low=-1, high=1)
    predict(model, image)
    assert np.array_equal(image, kept)
    assert all(torch.equal(v, parameters[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


class Disk:
    """What only has a shape and can be written by index, as a file on disk is."""

    def __init__(self, *shape: int) -> None:
        self.shape, self.values = shape, np.full(shape, -1.0)

    def __setitem__(self, where: Any, what: Any) -> None:
        assert isinstance(what, np.ndarray)
        self.values[where] = what


@pytest.mark.parametrize("output", inference.OUTPUTS)
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("kind", ["numpy", "torch", "disk", "a view"])
def test_what_is_given_to_write_into_is_written_into_and_returned(kind: str, as_tensor: bool, output: str) -> None:
    model, image = net(1), picture(2, 30, 25)
    want = predict(model, image, axes="ZYX", tile_in=28, output=output)
    out: Any = {
        "numpy": np.full(want.shape, -1.0),
        "torch": torch.full(want.shape, -1.0, dtype=torch.float64),
        "disk": Disk(*want.shape),
        "a view": np.full(want.shape[::-1], -1.0).T,
    }[kind]
    got = predict(
        model, torch.from_numpy(image) if as_tensor else image, axes="ZYX", tile_in=28, output=output, out=out
    )
    assert got is out
    assert np.array_equal(np.asarray(out.values if kind == "disk" else out), want)


def test_every_modules_mode_is_what_it_was() -> None:
    model = net(2, dropout=0.5)
    model.train()
    model.down[1].eval()
    before = [module.training for module in model.modules()]
    image = picture(20, 20)
    assert np.array_equal(predict(model, image, output="logits"), predict(model, image, output="logits"))
    assert [module.training for module in model.modules()] == before
    with pytest.raises(RuntimeError, match="in the middle"):
        predict(model, image, out=Broken(20, 20))
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


class Broken(Disk):
    def __setitem__(self, where: Any, what: Any) -> None:
        raise RuntimeError("in the middle")


def test_the_models_normalisation_comes_first_and_over_the_whole_image() -> None:
    model = net(1)
    image = np.random.default_rng(0).integers(0, 60000, (40, 50)).astype(np.uint16)
    image[:, 25:] //= 10
    normalisation = Normalisation("percentile", low=5, high=95)
    want = predict(model, normalisation(image[None])[0], tile_in=28, output="logits")
    model.normalisation = normalisation
    assert np.array_equal(predict(model, image, tile_in=28, output="logits"), want)
    np.testing.assert_allclose(predict(model, image, output="logits"), want, atol=1e-12)


def test_other_modules_with_a_unets_geometry_are_served() -> None:
    class Mean(nn.Module):
        depth, in_channels, out_channels = 0, 1, 2

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2, 1, 5, 5) / 25)

        def forward(self, x: Tensor) -> Tensor:
            # 2 pixels from each side, as a U-Net without poolings
            return nn.functional.conv2d(x, self.scale)

    got = predict(Mean(), np.ones((7, 9), np.float32), tile_in=8, output="logits")
    np.testing.assert_allclose(got, np.ones((2, 7, 9)), atol=1e-6)


SENTENCES: dict[str, tuple[Sequence[int], dict[str, Any], str]] = {
    "3-D without axes": (
        (4, 9, 9),
        {},
        "image of shape [4, 9, 9] needs axes: say axes, one of YX, CYX, YXC, ZYX, ZCYX",
    ),
    "one channel first, without axes": (
        (1, 9, 9),
        {},
        "image of shape [1, 9, 9] needs axes: say axes, one of YX, CYX, YXC, ZYX, ZCYX",
    ),
    "axes of another number": (
        (9, 9),
        {"axes": "ZYX"},
        "axes must be one of YX, CYX, YXC, ZYX, ZCYX and fit 2 axes, got 'ZYX'",
    ),
    "axes that do not exist": (
        (9, 9),
        {"axes": "XY"},
        "axes must be one of YX, CYX, YXC, ZYX, ZCYX and fit 2 axes, got 'XY'",
    ),
    "other channels": ((3, 9, 9), {"axes": "CYX"}, "image must have 1 channel(s) like the model, got 3"),
    "no columns": ((9, 0), {}, "an image must have at least one row and one column, got [1, 1, 9, 0]"),
    "no slices": ((0, 9, 9), {"axes": "ZYX"}, "an image must have at least one row and one column, got [0, 1, 9, 9]"),
    "another output": ((9, 9), {"output": "mask"}, "output must be one of labels, probabilities, logits, got 'mask'"),
    "out of another shape": ((9, 9), {"out": np.zeros((9, 8))}, "out must have shape [9, 9], got [9, 8]"),
    "no tiles at a time": ((9, 9), {"batch": 0}, "batch must be 1 or more, got 0"),
    "less than none": ((9, 9), {"batch": -1}, "batch must be 1 or more, got -1"),
    "a tile between two": ((9, 9), {"tile_in": 21}, "tile_in 21 cannot be pooled 1 times; nearest are 20 and 22"),
}


@pytest.mark.parametrize("case", SENTENCES)
def test_what_cannot_be_segmented_is_refused_in_a_sentence(case: str) -> None:
    shape, given_, sentence = SENTENCES[case]
    with pytest.raises(ValueError, match=r".") as caught:
        predict(net(1), np.zeros(shape), **given_)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_no_number_are_counted_and_refused(bad: float) -> None:
    image = picture(9, 9)
    image[3, 4] = image[0, 0] = bad
    out = np.full((9, 9), 7, np.uint8)
    with pytest.raises(
        ValueError, match="image has 2 NaN or infinite pixels, the first at image row 0 column 0; replace them first"
    ):
        predict(net(1), image, out=out)
    assert (out == 7).all()


@pytest.mark.parametrize("kind", [complex, "U1", object])
def test_what_is_no_grey_value_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match="image must be integer or floating, got"):
        predict(net(1), np.zeros((9, 9)).astype(kind))


def test_a_diverged_net_looks_diverged() -> None:
    model = net(1)
    with torch.no_grad():
        model.down[0].conv1.weight[0] = torch.nan
    assert np.isnan(predict(model, picture(9, 9), output="probabilities")).all()


# ---- one large tile, and what it is cut into


@given(
    depth=st.integers(1, 4),
    up_mode=st.sampled_from(["deconv", "resize"]),
    shape=st.lists(st.integers(1, 900), min_size=2, max_size=4),
)
@many
def test_a_covering_tile_is_the_smallest_that_answers_for_all(depth: int, up_mode: str, shape: list[int]) -> None:
    spoiled = 2**depth - 1 if up_mode == "resize" else 0
    sides = tiling.covering_tile(shape, depth=depth, up_mode=up_mode)
    assert len(sides) == 2
    for n, side in zip(shape[-2:], sides, strict=True):
        assert geometry.output_size(side, depth) - spoiled >= n
        below = side - 2**depth
        assert not _legal(below, depth) or geometry.output_size(below, depth) - spoiled < n
    assert len(plan_tiles(shape, tile_in=sides, depth=depth, up_mode=up_mode)) == 1


@given(
    depth=st.integers(1, 4),
    up_mode=st.sampled_from(["deconv", "resize"]),
    n=st.integers(1, 900),
    more=st.integers(0, 60),
)
@many
def test_the_pieces_of_a_large_tile_answer_for_each_of_its_outputs_once(
    depth: int, up_mode: str, n: int, more: int
) -> None:
    step, spoiled = 2**depth, 2**depth - 1 if up_mode == "resize" else 0
    whole, _ = tiling.covering_tile((n, n), depth=depth, up_mode=up_mode)
    smallest, _ = tiling.covering_tile((step, step), depth=depth, up_mode=up_mode)
    tile_in = smallest + step * more
    answered = 0
    for start, side, count in tiling.cut_tile(whole, tile_in, depth=depth, up_mode=up_mode):
        # its outputs begin where those of the piece before end
        assert start == answered
        assert start % step == 0
        assert side <= tile_in
        assert start + side <= whole
        assert 1 <= count <= geometry.output_size(side, depth) - spoiled
        answered += count
    assert answered == geometry.output_size(whole, depth) - spoiled


@given(depth=st.integers(1, 3), up_mode=st.sampled_from(["deconv", "resize"]), n=st.integers(1, 40))
@some
def test_the_pieces_say_what_the_large_tile_says(depth: int, up_mode: str, n: int) -> None:
    model = net(depth, up_mode=up_mode)
    whole, rows = tiling.covering_tile((n, 1), depth=depth, up_mode=up_mode)
    step = 2**depth
    tile_in = tiling.covering_tile((step, step), depth=depth, up_mode=up_mode)[0]
    image = torch.from_numpy(picture(1, 1, rows, whole))
    large = model(image)
    for start, side, count in tiling.cut_tile(whole, tile_in, depth=depth, up_mode=up_mode):
        piece = model(image[..., start : start + side])[..., :count]
        torch.testing.assert_close(piece, large[..., start : start + count], rtol=1e-10, atol=1e-12)


def test_large_tiles_at_the_papers_depth_are_cut_as_found_by_hand() -> None:
    assert tiling.cut_tile(572, 572) == [(0, 572, 388)]
    # no larger than need be
    assert tiling.cut_tile(572, 700) == [(0, 572, 388)]
    assert tiling.cut_tile(1004, 572) == [(0, 572, 384), (384, 572, 384), (768, 236, 52)]
    # "resize" spoils the last 15
    assert tiling.cut_tile(700, 572, up_mode="resize") == [(0, 572, 368), (368, 332, 133)]
    assert tiling.covering_tile((1, 388, 389)) == (572, 588)
    assert tiling.covering_tile((388, 373), up_mode="resize") == (588, 572)


CANNOT_BE_CUT: dict[str, tuple[tuple[int, int], dict[str, Any], str]] = {
    "a tile that cannot be pooled": ((700, 571), {}, "tile_in 571 cannot be pooled 4 times; nearest are 556 and 572"),
    "a tile that keeps too little": (
        (700, 188), {}, "tile_in 188 keeps 4 right pixels of each tile, fewer than the 16 that one step needs",
    ),
    "a tile that resize spoils": (
        (700, 204), {"up_mode": "resize"}, "tile_in 204 keeps 5 right pixels of each tile, fewer than the 16",
    ),
    "a whole that cannot be pooled": ((701, 572), {}, "701 cannot be pooled 4 times; nearest are 700 and 716"),
    "a whole of which nothing is right": ((188, 572), {"up_mode": "resize"}, "188"),
}  # fmt: skip


@pytest.mark.parametrize("case", CANNOT_BE_CUT)
def test_a_tile_that_cannot_be_cut_is_refused_in_a_sentence(case: str) -> None:
    sides, more, sentence = CANNOT_BE_CUT[case]
    with pytest.raises(ValueError, match=sentence) as refused:
        tiling.cut_tile(*sides, **more)
    assert "\n" not in str(refused.value)
