"""Proves that the check for seams says "exact" where tiles join, and finds a seam where they do not."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tests.proof.properties import given, settings, st
from tests.unet_fast.one_piece import picture, tiny
from unet_fast import FastUNet, Normalisation, plan_tiles, seams
from unet_fast.greys import Greys
from unet_fast.seams import Seams, verify_seams
from unet_fast.sources import ArraySource
from unet_fast.tiling import Cutter, Tile

few = settings(derandomize=True, database=None, deadline=None, max_examples=25)


def greys_of(image: NDArray[Any], normalisation: Normalisation | None = None) -> Greys:
    """[H, W], or a stack [Z, H, W]."""
    stack = image if image.ndim == 3 else image[None]
    return Greys(ArraySource(stack[:, None]), normalisation, wide=image.dtype == np.float64)


def checked(model: Any, image: NDArray[Any], *, tile_in: Any, tta: str = "none", **more: Any) -> Seams:
    plan = plan_tiles(image.shape, tile_in=tile_in, model=model, tta=tta)
    return verify_seams(model, greys_of(image), plan, tta=tta, **more)


@given(
    shape=st.tuples(st.integers(1, 80), st.integers(1, 80)),
    depth=st.integers(0, 3),
    up_mode=st.sampled_from(["deconv", "resize"]),
    padding=st.sampled_from(["valid", "same"]),
    tta=st.sampled_from(["none", "d4", "rot7"]),
    steps=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    places=st.integers(1, 5),
    seed=st.integers(0, 9),
)
@few
def test_tiles_that_join_are_exact(
    shape: tuple[int, int], depth: int, up_mode: str, padding: str, tta: str, steps: tuple[int, int], places: int,
    seed: int,
) -> None:  # fmt: skip
    model = tiny(depth, up_mode=up_mode, padding=padding)
    cutter = Cutter.of(model, tta)
    tiles = [cutter.smallest(each * cutter.step) for each in steps]
    found = checked(model, picture(*shape), tile_in=tiles, tta=tta, places=places, seed=seed)
    plan = plan_tiles(shape, tile_in=tiles, model=model, tta=tta)
    down, right = plan.grid
    assert found.of == (0 if len(plan) == 1 else max(1, down - 1) * max(1, right - 1))
    assert found.places == min(places, found.of)
    assert found.exact
    assert found.labels_that_differ == 0
    assert found.largest_difference <= 1e-9 * found.sd + 1e-13
    assert (found.pixels > 0) == (found.of > 0)
    assert str(found).startswith("no seam: " if found.of else "one tile, no seam")


@pytest.mark.slow
@pytest.mark.parametrize("tta", ["none", "d4", "rot7"])
@pytest.mark.parametrize(
    "shape", [(9, 200), (200, 9), (1, 60), (60, 1), (3, 40, 60)], ids=["one row", "one column", "1 x n", "n x 1", "Z"]
)
def test_one_row_one_column_and_stacks_are_looked_at(shape: tuple[int, ...], tta: str) -> None:
    model, image = tiny(1), picture(*shape)
    found = checked(model, image, tile_in=Cutter.of(model, tta).smallest(20), tta=tta, places=3)
    assert found.exact
    assert found.places == min(3, found.of) > 0
    # and a seam there is seen
    assert not checked(Loud(model), image, tile_in=Cutter.of(model, tta).smallest(20), tta=tta, places=3).exact


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tta", ["none", *(pytest.param(many, marks=pytest.mark.slow) for many in ("d4", "rot7"))])
def test_rounding_is_no_seam_and_a_seam_is_more_than_rounding(tta: str, dtype: torch.dtype) -> None:
    model = tiny(2, width=6).to(dtype)
    image = (picture(60, 70) + np.linspace(0, 6, 70)).astype(np.float64 if dtype == torch.float64 else np.float32)
    tile = Cutter.of(model, tta).smallest(12)
    sound = checked(model, image, tile_in=tile, tta=tta, places=6)
    assert sound.exact
    assert "no seam: 6 of " in str(sound)
    broken = checked(Normalised(model), image, tile_in=tile, tta=tta, places=6)
    assert not broken.exact
    assert broken.labels_that_differ > 0
    assert str(broken).startswith("a SEAM: 6 of ")


class Around(nn.Module):
    """A FastUNet with something before it; its geometry is said to be the net's own."""

    in_channels, out_channels = 1, 2

    def __init__(self, model: FastUNet, **said: Any) -> None:
        super().__init__()
        self.model = model
        self.depth, self.up_mode, self.padding = model.depth, model.up_mode, model.padding
        for name, value in said.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.before(x))

    def before(self, x: Tensor) -> Tensor:
        return x


class Loud(Around):
    """What it says of a pixel depends on the whole window."""

    def before(self, x: Tensor) -> Tensor:
        return x + x.mean((2, 3), keepdim=True)


class Normalised(Around):
    def __init__(self, model: FastUNet) -> None:
        super().__init__(model)
        self.norm = nn.InstanceNorm2d(1)

    def before(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Squeezed(Around):
    """Attention over all of the window, in one number."""

    def before(self, x: Tensor) -> Tensor:
        return x * x.amax((2, 3), keepdim=True)


class Padded(Around):
    """A convolution more, which pads with zeros: its output is as large as before."""

    def before(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, 3, 1, 1)


def test_a_module_that_is_a_unet_inside_is_exact() -> None:
    assert checked(Around(tiny(2)), picture(70, 80), tile_in=60).exact


@pytest.mark.parametrize("kind", [Loud, Normalised, Squeezed, Padded])
@pytest.mark.parametrize("tta", ["none", "d4", "rot7"])
def test_a_net_that_sees_more_than_it_says_has_seams(kind: Any, tta: str) -> None:
    model = kind(tiny(1)).double()
    image = picture(60, 70)
    found = checked(model, image, tile_in=Cutter.of(model, tta).smallest(10), tta=tta)
    assert not found.exact
    # zeros beside an average of nine are felt little
    assert found.largest_difference > (1e-5 if kind is Padded else 1e-3) * found.sd
    assert str(found).startswith("a SEAM: 4 of ")


def test_a_net_that_lies_about_its_depth_has_seams() -> None:
    # as deep as three poolings, padded, and said to be one: its tiles begin off its grid, its halo is too short
    deep = tiny(3, padding="same")
    image = picture(90, 100)
    assert checked(deep, image, tile_in=144).exact
    found = checked(Around(deep, depth=1), image, tile_in=48)
    assert not found.exact
    assert found.largest_difference > 1e-3 * found.sd
    # going up by repetition, and not saying so: what is kept is spoiled
    resize = tiny(2, up_mode="resize")
    assert checked(resize, image, tile_in=60).exact
    found = checked(Around(resize, up_mode="deconv"), image, tile_in=60)
    assert not found.exact
    # the halo of padded convolutions is longer
    padded = tiny(2, padding="same")
    assert checked(padded, image, tile_in=64).exact
    assert not checked(Around(padded, padding="deconv", depth=1), image, tile_in=44).exact


def test_a_plan_off_the_pooling_grid_is_put_on_it_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, image = tiny(2), picture(120, 120)
    plan = plan_tiles(image.shape, tile_in=60, model=model)
    assert (plan.step, Cutter.of(model).right(60)) == ((20, 20), 20)
    off = replace(plan, keep=(18, 18), step=(18, 18), grid=(7, 7))
    # each window begins where its pooling cell does, whatever the plan: 18 that begin at most 2 later are 20
    assert verify_seams(model, greys_of(image), off, places=36).exact
    with pytest.raises(RuntimeError, match="exceeds"):
        verify_seams(model, greys_of(image), replace(plan, keep=(19, 19), step=(19, 19), grid=(7, 7)), places=36)
    # without that
    aligned = Cutter.of

    def anywhere(*arguments: Any) -> Cutter:
        cutter = aligned(*arguments)
        cutter.step, cutter.smallest = 1, aligned(*arguments).smallest  # type: ignore[method-assign]
        return cutter

    monkeypatch.setattr(Cutter, "of", anywhere)
    found = verify_seams(model, greys_of(image), off, places=36)
    assert not found.exact
    assert found.largest_difference > 0.01 * found.sd


def test_a_plan_that_keeps_what_is_wrong_has_seams() -> None:
    model, image = tiny(2, up_mode="resize"), picture(120, 120)
    plan = plan_tiles(image.shape, tile_in=72, model=model)
    # 32 come out, the last 3 are spoiled
    assert plan.keep == (28, 28)
    found = verify_seams(model, greys_of(image), replace(plan, keep=(32, 32), step=(32, 32), grid=(4, 4)), places=9)
    assert not found.exact
    assert found.labels_that_differ >= 0
    assert verify_seams(model, greys_of(image), plan, places=9).exact


def test_one_tile_has_no_seam() -> None:
    found = checked(tiny(1), picture(20, 30), tile_in=None)
    assert found == Seams(0, 0, 0.0, 0.0, 0, 0, True)
    assert str(found) == "one tile, no seam"
    # not even in a net that has
    assert checked(Loud(tiny(1)), picture(20, 30), tile_in=None).exact


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tta", ["none", "d4", "rot7"])
def test_a_diverged_net_is_not_exact(tta: str, bad: float) -> None:
    model = tiny(1)
    with torch.no_grad():
        model.head.bias[0] = bad
    found = checked(model, picture(60, 60), tile_in=Cutter.of(model, tta).smallest(10), tta=tta)
    if tta != "none" and np.isneginf(bad):
        # a class that is impossible, everywhere and exactly
        assert found.exact
        return
    assert not found.exact
    assert str(found).startswith("a SEAM: 4 of ")


class Fragile(Around):
    """Diverges on windows of one size."""

    side = 0

    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x)
        return found * torch.nan if max(x.shape[2:]) == self.side else found


@pytest.mark.parametrize("which", ["the tiles", "what lies across"])
def test_what_is_nan_in_one_of_two_is_not_exact(which: str) -> None:
    model, image = Fragile(tiny(1)), picture(60, 60)
    plan = plan_tiles(image.shape, tile_in=26, model=model)
    assert verify_seams(model, greys_of(image), plan).exact
    # 10 are kept of each; 8 on either side of a corner are looked at
    model.side = 26 if which == "the tiles" else Cutter.of(model).smallest(8)
    assert plan.tile_in == (26, 26) != (model.side,) * 2 or which == "the tiles"
    assert not verify_seams(model, greys_of(image), plan).exact


@pytest.mark.slow
@pytest.mark.parametrize("classes", [1, 2])
def test_an_empty_image_has_no_seams(classes: int) -> None:
    for value in (0.0, 0.7):
        model = tiny(2, 1, classes, width=6).float()
        for tta in ("none", "d4", "rot7"):
            image = np.full((80, 90), value, np.float32)
            assert checked(model, image, tile_in=Cutter.of(model, tta).smallest(12), tta=tta, places=9).exact


def test_the_same_places_are_looked_at_again_and_others_with_another_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, image, seen = tiny(1), picture(60, 60), []
    usual = seams._across
    monkeypatch.setattr(seams, "_across", lambda *a: seen.append(usual(*a)) or seen[-1])
    for seed in (0, 0, 1):
        checked(model, image, tile_in=28, places=3, seed=seed)
    assert seen[:3] == seen[3:6] != seen[6:]
    assert len(set(seen[:3])) == 3
    # each lies across a corner, and ends inside the tiles that meet there
    for tile in seen:
        assert isinstance(tile, Tile)
        assert tile.row % 12 == tile.column % 12 == 6
        assert (tile.rows, tile.columns) == (12, 12)


def test_modes_are_restored() -> None:
    model = tiny(1, dropout=0.5).train()
    assert checked(model, picture(50, 50), tile_in=28).exact
    assert all(module.training for module in model.modules())


def test_the_check_in_one_piece_finds_seams_too() -> None:
    image = picture(2, 50, 60)
    for model in (tiny(1), tiny(1, up_mode="resize"), tiny(1, padding="same")):
        found = seams.seam_check(model, image, axes="ZYX")
        assert found["largest_difference"] <= 1e-9 * found["logits_sd"]
        assert found["labels_that_differ"] == 0
    found = seams.seam_check(Loud(tiny(1)), image, axes="ZYX")
    assert found["largest_difference"] > 1e-3 * found["logits_sd"]
    assert found["labels_that_differ"] > 0
    assert found["difference"].shape == (50, 60)
