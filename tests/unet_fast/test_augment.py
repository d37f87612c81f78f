"""Proves what the augmentation draws, that the draws are nobody else's, and that image and labels move together."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import unet_kernels as uk
from tests.proof.properties import given, settings, st
from unet_fast import ElasticWarp

ordinary = settings(derandomize=True, database=None, deadline=None, max_examples=60)

seeds = st.integers(0, 2**32 - 1)


def coordinates(height: int, width: int) -> tuple[Tensor, Tensor]:
    """(image [2, H, W] of rows and columns, labels [H, W] that number the pixels)."""
    image = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    return image.float(), torch.arange(height * width, dtype=torch.int32).view(height, width)


@given(seed=seeds, epoch=st.integers(0, 1000), index=st.integers(-1, 1000))
@ordinary
def test_a_generator_is_made_of_its_three_numbers_alone(seed: int, epoch: int, index: int) -> None:
    torch.manual_seed(epoch)
    a = torch.rand(4, generator=ElasticWarp.generator(seed, epoch, index))
    torch.manual_seed(index + 1)
    assert torch.equal(torch.rand(4, generator=ElasticWarp.generator(seed, epoch, index)), a)
    for other in ((seed + 1, epoch, index), (seed, epoch + 1, index), (seed, epoch, index + 1)):
        assert not torch.equal(torch.rand(4, generator=ElasticWarp.generator(*other)), a)


@pytest.mark.slow
def test_the_stream_is_the_same_in_another_process_and_next_year() -> None:
    program = (
        "from unet_fast import ElasticWarp; import torch;"
        "print(torch.randint(0, 10**9, (3,), generator=ElasticWarp.generator(1, 2, 3)).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    here = torch.randint(0, 10**9, (3,), generator=ElasticWarp.generator(1, 2, 3)).tolist()
    assert done.stdout.strip() == str(here)


def test_neighbouring_streams_are_not_alike() -> None:
    draws = [torch.randn(200, generator=ElasticWarp.generator(0, 0, i)) for i in range(50)]
    correlation = np.corrcoef(torch.stack(draws).numpy()) - np.eye(50)
    assert np.abs(correlation).max() < 0.35


def test_displacements_are_normal_of_ten_pixels() -> None:
    drawn = ElasticWarp().draw(3000, (300, 400), ElasticWarp.generator(0, 0, 0))
    assert drawn.shape == (3000, 2, 3, 3)
    assert drawn.mean().abs() < 0.15
    assert drawn.std().item() == pytest.approx(10, rel=0.02)
    assert (drawn.abs() > 20).float().mean().item() == pytest.approx(0.0455, abs=0.005)
    # every point and axis for itself
    flat = drawn.flatten(1).numpy()
    assert np.abs(np.corrcoef(flat.T) - np.eye(18)).max() < 0.1
    narrow = ElasticWarp(sigma_px=2.5).draw(3000, (300, 400), ElasticWarp.generator(0, 0, 0))
    torch.testing.assert_close(narrow * 4, drawn)


@pytest.mark.parametrize(
    ("size", "tile", "points"),
    [
        ((572, 572), 572, (3, 3)),
        ((572, 572), None, (3, 3)),
        # as far apart as over one tile, however large the image is
        ((1143, 572), 572, (5, 3)),
        ((2285, 1143), (572, 286), (9, 9)),
        # and never fewer than a bilinear patch needs
        ((100, 20), 572, (2, 2)),
        ((1, 1), 572, (2, 2)),
        ((10, 10), 1, (19, 19)),
    ],
    ids=str,
)
def test_the_grid_has_three_points_a_tile(
    size: tuple[int, int], tile: int | tuple[int, int] | None, points: tuple[int, int]
) -> None:
    assert ElasticWarp().draw(2, size, ElasticWarp.generator(0, 0, 0), tile=tile).shape == (2, 2, *points)


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("mirror", [True, False])
def test_affine_draws_are_rotations_and_mirrors(rotate: bool, mirror: bool) -> None:
    matrix = ElasticWarp(rotate=rotate, mirror=mirror).draw_affine(2000, ElasticWarp.generator(0, 0, 0)).double()
    assert matrix.shape == (2000, 2, 3)
    assert not matrix[:, :, 2].any()
    square = matrix[:, :, :2]
    torch.testing.assert_close(square @ square.mT, torch.eye(2).double().expand_as(square), atol=1e-6, rtol=0)
    mirrored = square.det() < 0
    assert mirrored.double().mean().item() == pytest.approx(0.5 if mirror else 0, abs=0.04)
    angle = torch.atan2(square[:, 1, 0], square[:, 0, 0])
    if rotate:
        # every sixth of the circle gets its share, mirrored or not
        for part in (angle[mirrored], angle[~mirrored]):
            share = torch.histc(part, 6, -math.pi, math.pi) / max(1, len(part))
            assert not len(part) or (share - 1 / 6).abs().max() < 0.05
    else:
        assert not angle.any()


@given(seed=seeds, grey=st.floats(0, 1))
@ordinary
def test_tables_are_monotone_and_bounded(seed: int, grey: float) -> None:
    table = ElasticWarp(grey=grey).draw_table(20, ElasticWarp.generator(seed, 0, 0))
    assert table.shape == (20, 256)
    steps = table.diff(dim=1)
    assert (steps > 0).all()
    assert (table[:, 0].abs() <= 0.2 * grey + 1e-6).all()
    assert ((table[:, -1] - 1).abs() <= 0.2 * grey + 1e-6).all()
    # no slope leaves (2/3 .. 3/2)^2 of the mean one, so that no grey values are lost
    slope = steps * 255 / (table[:, -1:] - table[:, :1])
    bound = 1.5 ** (2 * grey) + 1e-3
    assert slope.max() <= bound
    assert slope.min() >= 1 / bound


def test_a_strength_of_nothing_changes_nothing() -> None:
    table = ElasticWarp(grey=0).draw_table(3, ElasticWarp.generator(0, 0, 0))
    torch.testing.assert_close(table, torch.linspace(0, 1, 256).expand(3, 256))
    still = ElasticWarp(sigma_px=0, rotate=False, mirror=False, grey=0)
    image, labels = coordinates(20, 30)
    out, warped = still.draw_tile(image, labels, 20, 20, ElasticWarp.generator(0, 0, 0))
    # a window of the image, moved sideways only
    assert out.shape == (2, 20, 20)
    torch.testing.assert_close(out[0], image[0, :, :20])
    assert (warped.diff(dim=1) == 1).all()


@given(
    seed=seeds,
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    tile_in=st.integers(1, 50),
    halo=st.integers(0, 8),
    sigma=st.sampled_from([0.0, 3.0, 10.0]),
)
@ordinary
def test_image_and_labels_stay_together_and_nothing_is_invented(
    seed: int, size: tuple[int, int], tile_in: int, halo: int, sigma: float
) -> None:
    # linear interpolation reproduces an image of coordinates, a cubic of this kind does not quite
    warp = ElasticWarp(sigma_px=sigma, grey=0, order=1)
    image, labels = coordinates(*size)
    tile_out = max(1, tile_in - 2 * halo)
    out, warped = warp.draw_tile(image, labels, tile_in, tile_out, ElasticWarp.generator(seed, 0, 0))
    assert (out.shape, out.dtype) == ((2, tile_in, tile_in), torch.float32)
    assert (warped.shape, warped.dtype) == ((tile_in, tile_in), torch.int32)
    assert warped.min() >= 0
    assert warped.max() < size[0] * size[1]
    # where the image says it was read, rounded, is the pixel whose number the label is; ties may go either way
    row, column = warped // size[1], warped % size[1]
    assert (out[0] - row).abs().max() <= 0.5 + 1e-3
    assert (out[1] - column).abs().max() <= 0.5 + 1e-3
    again = warp.draw_tile(image, labels, tile_in, tile_out, ElasticWarp.generator(seed, 0, 0))
    assert torch.equal(again[0], out)
    assert torch.equal(again[1], warped)


def test_ids_with_gaps_and_negative_ones_come_through_unmixed() -> None:
    labels = torch.tensor([-5, 0, 7, 70000], dtype=torch.int32)[torch.randint(0, 4, (30, 30))]
    for index in range(5):
        _, warped = ElasticWarp().draw_tile(torch.rand(1, 30, 30), labels, 24, 20, ElasticWarp.generator(0, 0, index))
        assert set(warped.unique().tolist()) <= {-5, 0, 7, 70000}


def test_centres_are_uniform_among_those_that_keep_the_output_inside() -> None:
    warp = ElasticWarp(sigma_px=0, mirror=False, grey=0, order=1)
    image, labels = coordinates(100, 60)
    centres = []
    for index in range(400):
        out, _ = warp.draw_tile(image, labels, 21, 11, ElasticWarp.generator(1, 0, index))
        centres.append(out[:, 10, 10])
    rows, columns = torch.stack(centres).T
    for got, n in ((rows, 100), (columns, 60)):
        # half a pixel: an odd tile has no middle in an even image
        low, high = 5, n - 1 - 5
        assert got.min() >= low - 0.75
        assert got.max() <= high + 0.75
        share = torch.histc((got - low) / (high - low), 4, 0, 1) / 400
        assert (share - 0.25).abs().max() < 0.08


def test_the_elastic_map_moves_points_by_its_displacements() -> None:
    warp = ElasticWarp(order=1)
    image, _ = coordinates(41, 61)
    displacement = warp.draw(1, (41, 61), ElasticWarp.generator(3, 0, 0)) * 0.2
    out = warp.apply(image[None], displacement)
    assert isinstance(out, Tensor)
    # the grid's middle point sits on the image's middle pixel
    want = torch.tensor([20.0, 30.0]) + displacement[0, :, 1, 1]
    torch.testing.assert_close(out[0, :, 20, 30], want, atol=1e-3, rtol=0)


def test_grey_values_change_and_labels_do_not() -> None:
    image, labels = torch.rand(1, 30, 30), torch.randint(0, 5, (30, 30), dtype=torch.int32)
    plain = ElasticWarp(grey=0).draw_tile(image, labels, 24, 20, ElasticWarp.generator(0, 0, 0))
    bent = ElasticWarp(grey=1).draw_tile(image, labels, 24, 20, ElasticWarp.generator(0, 0, 0))
    assert torch.equal(plain[1], bent[1])
    assert not torch.allclose(plain[0], bent[0])
    # a monotone table keeps the order of grey values
    order = plain[0].flatten().argsort()
    assert (bent[0].flatten()[order].diff() >= -1e-6).all()


def test_zoom_enlarges_as_often_as_it_reduces() -> None:
    matrix = ElasticWarp(zoom=1.5).draw_affine(4000, ElasticWarp.generator(0, 0, 0))
    size = 1 / torch.linalg.det(matrix[:, :, :2]).abs().sqrt()
    assert 1 / 1.5 <= size.min() < 0.68
    assert 1.48 < size.max() <= 1.5
    assert abs(float((size > 1).float().mean()) - 0.5) < 0.03
    # twice as large: the neighbour is read half a pixel away
    image, _ = coordinates(41, 41)
    warp = ElasticWarp(sigma_px=0, rotate=False, mirror=False, zoom=2, order=1)
    still = torch.zeros(1, 2, 2, 2)
    matrix = warp.draw_affine(1, ElasticWarp.generator(0, 0, 1))
    out = warp.apply(image[None], still, matrix=matrix)
    assert isinstance(out, Tensor)
    torch.testing.assert_close(out[0, 1, 20, 21] - out[0, 1, 20, 20], matrix[0, 1, 1], atol=1e-4, rtol=0)


def test_noise_has_at_most_its_sd_and_leaves_labels_alone() -> None:
    image, labels = torch.full((1, 64, 64), 0.5), torch.ones(64, 64, dtype=torch.int32)
    spread = []
    for index in range(40):
        warp = ElasticWarp(grey=0, noise=0.1)
        out, warped = warp.draw_tile(image, labels, 60, 40, ElasticWarp.generator(0, 0, index))
        assert (warped == 1).all()
        spread.append(float(out.std()))
    assert max(spread) < 0.11
    assert min(spread) < 0.02
    assert 0.04 < sum(spread) / len(spread) < 0.06


@pytest.mark.parametrize(
    ("settings_", "sentence"),
    [
        ({"grid": 1}, "grid must have at least 2 points a side, got 1"),
        ({"sigma_px": -1}, "sigma_px must be 0 or more, got -1"),
        ({"sigma_px": math.nan}, "sigma_px must be 0 or more, got nan"),
        ({"sigma_px": math.inf}, "sigma_px must be 0 or more, got inf"),
        ({"grey": 1.5}, "grey must lie between 0 and 1, got 1.5"),
        ({"zoom": 0.5}, "zoom must lie between 1 and 4, got 0.5"),
        ({"noise": -0.1}, "noise must be 0 or more, got -0.1"),
        ({"grey": -0.1}, "grey must lie between 0 and 1, got -0.1"),
        ({"foreground": 1.5}, "foreground must lie between 0 and 1, got 1.5"),
        ({"foreground": math.nan}, "foreground must lie between 0 and 1, got nan"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings_: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ElasticWarp(**settings_)  # type: ignore[arg-type]


# ---- tiles that are no squares


@given(
    seed=seeds,
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    side=st.integers(3, 50),
    margin=st.integers(0, 2),
    noise=st.sampled_from([0.0, 0.1]),
    grid_tile=st.sampled_from([None, 20, (20, 20)]),
)
@ordinary
def test_a_square_tile_may_be_given_by_its_rows_and_columns(
    seed: int, size: tuple[int, int], side: int, margin: int, noise: float, grid_tile: int | tuple[int, int] | None
) -> None:
    image, labels = coordinates(*size)
    warp, out = ElasticWarp(noise=noise), side - margin
    want = warp.draw_tile(image / 50, labels, side, out, ElasticWarp.generator(seed, 0, 0), grid_tile=grid_tile)
    found = warp.draw_tile(
        image / 50, labels, (side, side), (out, out), ElasticWarp.generator(seed, 0, 0), grid_tile=grid_tile
    )
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@given(
    seed=seeds,
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    sides=st.tuples(st.integers(1, 50), st.integers(1, 50)),
)
@ordinary
def test_a_tile_has_the_rows_and_columns_that_were_asked_for(
    seed: int, size: tuple[int, int], sides: tuple[int, int]
) -> None:
    image, labels = coordinates(*size)
    found, ids = ElasticWarp(noise=0.1).draw_tile(image / 50, labels, sides, sides, ElasticWarp.generator(seed, 0, 0))
    assert found.shape == (2, *sides)
    assert ids.shape == sides
    assert ids.dtype == labels.dtype
    assert found.isfinite().all()
    assert 0 <= int(ids.min()) <= int(ids.max()) < labels.numel()


def test_the_centre_of_an_oblong_tile_keeps_its_outputs_inside() -> None:
    image, labels = coordinates(60, 40)
    plain = ElasticWarp(sigma_px=0, rotate=False, mirror=False, grey=0)
    rows, columns = [], []
    for index in range(300):
        generator = ElasticWarp.generator(0, 0, index)
        (row, column), _ = plain.draw_tile(image, labels, (21, 31), (11, 31), generator)
        rows.append(float(row[10, 15]))
        columns.append(float(column[10, 15]))
    # half of 11 - 1 from either end of 60 rows, half of 31 - 1 from either end of 40 columns
    # and half a pixel: an odd tile has no middle in an even image
    assert 4.25 < min(rows) < 6
    assert 52 < max(rows) < 54.75
    assert 14.25 < min(columns) < 15.5
    assert 22.5 < max(columns) < 24.75
    assert np.std(rows) == pytest.approx(49 / 12**0.5, rel=0.1)


def test_a_tile_that_answers_for_all_of_an_image_lies_in_its_middle() -> None:
    image, labels = coordinates(21, 33)
    plain = ElasticWarp(sigma_px=0, rotate=False, mirror=False, grey=0)
    for index in range(5):
        found, ids = plain.draw_tile(image, labels, (31, 41), (25, 35), ElasticWarp.generator(0, 0, index))
        assert torch.equal(ids[5:26, 4:37], labels)
        torch.testing.assert_close(found[:, 5:26, 4:37], image, atol=1e-3, rtol=0)


def test_the_elastic_grid_lies_as_over_the_tile_or_as_over_the_one_that_is_named() -> None:
    image, labels = coordinates(60, 40)
    warp = ElasticWarp()

    def tile(**more: int | tuple[int, int] | None) -> Tensor:
        return warp.draw_tile(image, labels, (20, 30), (12, 22), ElasticWarp.generator(0, 0, 0), **more)[0]

    assert torch.equal(tile(), tile(grid_tile=None))
    assert torch.equal(tile(), tile(grid_tile=(20, 30)))
    assert not torch.equal(tile(), tile(grid_tile=(60, 40)))
    # which has the points of a tile as large as the image
    points = warp.draw(1, (60, 40), ElasticWarp.generator(0, 0, 0), tile=(60, 40))
    assert points.shape == (1, 2, 3, 3)
    whole = warp.apply(image[None], points)
    assert isinstance(whole, Tensor)
    assert not torch.equal(whole[0], image)


# ---- tiles around cells


def _one_cell_in_a_corner(rows: int = 61, columns: int = 41) -> Tensor:
    labels = torch.zeros(rows, columns, dtype=torch.int32)
    labels[2:12, 30:39] = 7
    return labels


def _centres(labels: Tensor, foreground: float, *, out: int = 1, tries: int = 200) -> Tensor:
    """What the centres of tiles read, rows and columns [tries, 2]."""
    warp = ElasticWarp(sigma_px=0, rotate=False, mirror=False, grey=0, order=1, foreground=foreground)
    image, _ = coordinates(*labels.shape)
    draws = (warp.draw_tile(image, labels, 21, out, ElasticWarp.generator(5, 0, i)) for i in range(tries))
    return torch.stack([tile[:, 10, 10] for tile, _ in draws])


def test_a_tile_around_a_cell_has_a_pixel_of_it_in_its_middle_each_as_often_as_any_other() -> None:
    labels = _one_cell_in_a_corner()
    labels[40:60, 3:30] = 2  # of 540 pixels, the other has 90
    centres = _centres(labels, 1.0)
    at = centres.round().long()
    torch.testing.assert_close(centres, at.float(), rtol=0, atol=1e-3)
    ids = labels[at[:, 0], at[:, 1]]
    assert (ids > 0).all()
    assert float((ids == 7).float().mean()) == pytest.approx(1 / 7, abs=0.07)
    rows, columns = at[ids == 2].T
    for got, low, high in ((rows, 40, 59), (columns, 3, 29)):
        assert float(got.float().mean()) == pytest.approx((low + high) / 2, abs=2.5)


def test_a_share_of_the_tiles_lies_around_cells_and_the_rest_anywhere() -> None:
    labels = _one_cell_in_a_corner()
    at = _centres(labels, 0.5).round().long()
    # a place anywhere is in the cell in 90 of 2501 cases
    assert float((labels[at[:, 0], at[:, 1]] > 0).float().mean()) == pytest.approx(0.5 + 0.5 * 90 / 2501, abs=0.1)


def test_what_the_net_answers_for_stays_inside_the_image_around_a_cell_too() -> None:
    centres = _centres(_one_cell_in_a_corner(), 1.0, out=17)
    # half of 17 - 1 from each edge
    assert (centres[:, 0] >= 8 - 1e-3).all()
    assert (centres[:, 1] <= 40 - 8 + 1e-3).all()
    # as near to the cell as that allows: its rows end at 11
    assert (centres[:, 0] <= 11 + 1e-3).all()


def test_a_cell_of_one_pixel_is_found_and_without_one_a_tile_lies_anywhere() -> None:
    labels = torch.zeros(401, 401, dtype=torch.int64)
    assert len(_centres(labels, 1.0, tries=4).unique(dim=0)) == 4
    labels[123, 321] = 1
    labels[:, 0] = -1  # ignored is no cell
    torch.testing.assert_close(
        _centres(labels, 1.0, tries=4), torch.tensor([[123.0, 321.0]]).expand(4, 2), atol=1e-3, rtol=0
    )


def test_the_stream_is_as_it_was_where_no_tile_is_drawn_to_cells() -> None:
    image, labels = torch.rand(1, 61, 41), _one_cell_in_a_corner()
    tiles = [
        ElasticWarp(noise=0.1, **more).draw_tile(image, labels, 21, 11, ElasticWarp.generator(0, 0, 0))
        for more in ({}, {"foreground": 0.0})
    ]
    assert all(torch.equal(a, b) for a, b in zip(*tiles, strict=True))


# ---- folding


def _grids(seed: int, points: tuple[int, int], strength: float) -> Tensor:
    return torch.randn(3, 2, *points, generator=torch.Generator().manual_seed(seed)) * strength


shapes = st.tuples(st.integers(1, 50), st.integers(1, 50))
points = st.tuples(st.integers(2, 6), st.integers(2, 6))


@given(seed=seeds, size=shapes, points=points, window=shapes, strength=st.floats(0.1, 30))
@ordinary
def test_folded_is_the_share_of_pixels_without_a_positive_jacobian_and_unfolded_has_none(
    seed: int, size: tuple[int, int], points: tuple[int, int], window: tuple[int, int], strength: float
) -> None:
    drawn = _grids(seed, points, strength)

    def determinants(grids: Tensor) -> Tensor:
        return torch.linalg.det(uk.warp_jacobian(grids, size, out_size=window).permute(0, 3, 4, 1, 2))

    share = ElasticWarp.folded(drawn, size, out_size=window)
    # also where the quick look at the grid alone says that nothing can fold
    torch.testing.assert_close(share, (determinants(drawn) <= 0).double().mean((1, 2)))
    flat = ElasticWarp.unfolded(drawn, size, out_size=window)
    assert (determinants(flat) > 0).all()
    assert not ElasticWarp.folded(flat, size, out_size=window).any()
    # only what folds is changed, and in length only
    for before, after, folds in zip(drawn, flat, share > 0, strict=True):
        if folds:
            assert 0 < float(after.norm() / before.norm()) < 1
        torch.testing.assert_close(after * before.norm(), before * after.norm(), rtol=1e-4, atol=1e-3)


def test_where_nothing_folds_every_bit_stays() -> None:
    drawn = ElasticWarp().draw(200, (572, 572), ElasticWarp.generator(0, 0, 0))
    # the paper's: 3 x 3 points, 10 px, one tile
    assert not ElasticWarp.folded(drawn, (572, 572)).any()
    assert ElasticWarp.unfolded(drawn, (572, 572)) is drawn


def test_by_default_a_small_tile_is_not_folded_and_on_demand_it_is() -> None:
    # so large that nothing is read beyond its edges from its middle, where a tile lies that answers for all of it
    image, labels = coordinates(201, 201)
    turned = {False: 0, True: 0}
    for index in range(20):
        tiles = {}
        for fold in turned:
            warp = ElasticWarp(rotate=False, mirror=False, grey=0, order=1, fold=fold)
            tile, _ = warp.draw_tile(image, labels, 41, 201, ElasticWarp.generator(0, 0, index))
            # the area that a step down and a step across span, where they lead
            down, across = tile.diff(dim=1)[:, :, :-1], tile.diff(dim=2)[:, :-1]
            turned[fold] += int((down[0] * across[1] - down[1] * across[0] < -0.02).sum())
            tiles[fold] = tile
        drawn = ElasticWarp().draw(1, (201, 201), ElasticWarp.generator(0, 0, index), tile=41)
        if not ElasticWarp.folded(drawn, (201, 201), out_size=41):
            assert torch.equal(tiles[False], tiles[True])
    assert turned[False] == 0
    assert turned[True] > 100


# ---- raw images, and those who ask for tiles


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16], ids=str)
def test_raw_images_are_warped_as_they_are_in_units_of_their_range(dtype: torch.dtype) -> None:
    top = torch.iinfo(dtype).max
    raw, labels = (torch.rand(1, 60, 50) * 0.6 + 0.2).mul(top).to(dtype), torch.randint(0, 5, (60, 50))
    warp = ElasticWarp(noise=0.02)
    tile, ids = warp.draw_tile(raw, labels, 36, 20, ElasticWarp.generator(0, 0, 0))
    fine, fine_ids = warp.draw_tile(raw.float() / top, labels, 36, 20, ElasticWarp.generator(0, 0, 0))
    assert (tile.dtype, ids.dtype) == (dtype, labels.dtype)
    assert torch.equal(ids, fine_ids)
    # rounded twice, before the noise and after
    assert (tile.float() - (fine * top).clamp(0, top)).abs().max() <= 1.01


WORKERS = """
import torch
from torch.utils.data import DataLoader, Dataset

from unet_fast import ElasticWarp


class Tiles(Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.image = torch.rand(1, 200, 180, generator=generator)
        self.labels = torch.randint(0, 9, (200, 180), generator=generator, dtype=torch.int32)
        self.warp = ElasticWarp(noise=0.05, foreground=0.5)

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return self.warp.draw_tile(self.image, self.labels, 150, 110, ElasticWarp.generator(3, 1, index))


if __name__ == "__main__":
    tiles = Tiles()
    alone = [tiles[i] for i in reversed(range(6))][::-1]
    for workers in (0, 1, 4):
        for here, there in zip(alone, DataLoader(tiles, batch_size=None, num_workers=workers), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(here, there)), workers
"""


@pytest.mark.slow
def test_the_stream_is_the_same_for_none_one_and_four_workers(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(WORKERS)
    # Python warns of threads and forks; two threads are at work in the parent before it forks
    command, environment = [sys.executable, "-W", "ignore", str(script)], os.environ | {"OMP_NUM_THREADS": "2"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True) as child:
        try:
            _, said = child.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            raise
    assert child.returncode == 0, said


# ---- draws are the same everywhere


_DRAWN = """
import hashlib, torch
from unet_fast import ElasticWarp
warp, generator = ElasticWarp(noise=0.1, zoom=1.2), ElasticWarp.generator(3, 1, 4)
drawn = [warp.draw(2, (300, 200), generator, tile=100), warp.draw_affine(3, generator), warp.draw_table(3, generator)]
image, instances = torch.arange(8000.0).view(1, 80, 100) / 8000, torch.arange(8000).view(80, 100)
drawn += warp.draw_tile(image, instances, 60, 20, generator)
print(hashlib.sha256(b"".join(t.numpy().tobytes() for t in drawn)).hexdigest())
"""


@pytest.mark.slow
def test_draws_and_tiles_have_the_same_bits_whatever_vectors_a_processor_has() -> None:
    said = {
        subprocess.run(
            [sys.executable, "-c", _DRAWN],
            env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for capability in ("default", "avx2")
    }
    assert len(said) == 1


def test_draws_follow_no_default_device_or_dtype() -> None:
    warp = ElasticWarp(noise=0.1)

    def drawn() -> list[Tensor]:
        generator = ElasticWarp.generator(3, 1, 4)
        return [warp.draw(2, (30, 20), generator), warp.draw_affine(3, generator), warp.draw_table(3, generator)]

    want = drawn()
    with torch.device("meta"):
        elsewhere = drawn()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        wide = drawn()
    finally:
        torch.set_default_dtype(before)
    for one, two, three in zip(want, elsewhere, wide, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
        assert one.dtype == two.dtype == three.dtype == torch.float32


def test_a_map_that_is_not_finite_folds() -> None:
    nowhere = torch.full((1, 2, 3, 3), torch.nan)
    assert float(ElasticWarp.folded(nowhere, (50, 50))) == 1.0
