"""Proves that the loss is Eq. 1 with Eq. 2's weights, put together from the ops by hand, whatever is cropped."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import unet_kernels as uk
from tests.proof.properties import given, st
from unet_fast import BorderWeightedCrossEntropy
from unet_fast.loss import VARIANTS


def cells(seed: int, size: tuple[int, int, int], *, ignored: bool = True) -> Tensor:
    rng = np.random.default_rng(seed)
    _, height, width = size
    y, x = np.indices((height, width))
    instances = np.zeros(size, np.int32)
    for image in instances:
        for cell in range(1, 7):
            radius = rng.integers(2, 7)
            image[(y - rng.integers(height)) ** 2 + (x - rng.integers(width)) ** 2 < radius**2] = cell
        if ignored:
            image[(y - rng.integers(height)) ** 2 + (x - rng.integers(width)) ** 2 < 9] = -3
    return torch.from_numpy(instances)


def by_hand(
    logits: Tensor,
    instances: Tensor,
    target: Tensor | None = None,
    *,
    w0: float = 10.0,
    sigma_px: float = 5.0,
    class_weight: tuple[float, ...] | None = None,
    region: str = "background",
    reduction: str = "mean",
) -> Tensor:
    """Equations 1 and 2 pixel by pixel, in float64."""
    n, _, h, w = logits.shape
    top, left = (instances.shape[1] - h) // 2, (instances.shape[2] - w) // 2
    here = slice(None), slice(top, top + h), slice(left, left + w)
    cut = uk.cut_gap(instances)
    d1, d2 = (d.double() for d in uk.two_nearest_cells(instances))
    ridge = w0 * torch.exp(-((d1 + d2) ** 2) / (2 * sigma_px**2))
    if region == "background":
        ridge = torch.where(cut == 0, ridge, 0.0)
    if target is None:
        target = (cut > 0).long()
    if target.shape[1:] != (h, w):
        target = target[here]
    valid = (instances[here] >= 0) & (target >= 0)
    log_p = logits.double().log_softmax(1)
    total, count = torch.zeros(n, h, w, dtype=torch.float64), int(valid.sum())
    for image, row, column in valid.nonzero().tolist():
        c = int(target[image, row, column])
        balance = 1.0 if class_weight is None else class_weight[c]
        weight = balance + ridge[here][image, row, column]
        total[image, row, column] = -weight * log_p[image, c, row, column]
    if reduction == "none":
        return total
    return total.sum() if reduction == "sum" else total.sum() / max(1, count)


@given(
    seed=st.integers(0, 2**16),
    size=st.tuples(st.integers(1, 2), st.integers(1, 24), st.integers(1, 24)),
    margins=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    w0=st.sampled_from([0.0, 3.0, 10.0]),
    sigma_px=st.sampled_from([1.0, 5.0]),
    class_weight=st.sampled_from([None, (0.4, 2.5), (0.0, 1.0)]),
    region=st.sampled_from(["background", "all"]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
)
def test_equals_the_equations_pixel_by_pixel(
    seed: int, size: tuple[int, int, int], margins: tuple[int, int], **settings: Any
) -> None:
    n, h, w = size
    instances = cells(seed, (n, h + margins[0], w + margins[1]))
    logits = torch.from_numpy(np.random.default_rng(seed).normal(size=(n, 2, h, w)) * 3)
    got = BorderWeightedCrossEntropy(**settings)(logits, instances)
    torch.testing.assert_close(got.double(), by_hand(logits, instances, **settings), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("cropped", [False, True], ids=["as large as the instances", "as large as the logits"])
def test_three_classes_with_a_target_of_their_own(cropped: bool) -> None:
    instances = cells(3, (2, 30, 34))
    target = uk.cut_gap(instances).long().remainder(3)
    target[:, :3] = -1
    logits = torch.randn(2, 3, 20, 25, dtype=torch.float64)
    balance = (0.5, 1.5, 4.0)
    loss = BorderWeightedCrossEntropy(class_weight=balance)
    given_target = target[:, 5:25, 4:29] if cropped else target
    want = by_hand(logits, instances, target, class_weight=balance)
    torch.testing.assert_close(loss(logits, instances, given_target).double(), want, rtol=1e-6, atol=0)


def test_it_is_the_composition_of_the_ops() -> None:
    instances, logits = cells(5, (1, 40, 40)), torch.randn(1, 2, 24, 24)
    weight = uk.border_weight(instances, class_weight=(0.5, 2.0))[:, 8:32, 8:32]
    cut = uk.cut_gap(instances)[:, 8:32, 8:32]
    target = (cut > 0).long().masked_fill(cut < 0, -100)
    want = uk.weighted_cross_entropy(logits, target, weight)
    got = BorderWeightedCrossEntropy(class_weight=(0.5, 2.0))(logits, instances)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_a_cell_outside_the_output_still_casts_its_weight_into_it() -> None:
    instances = torch.zeros(1, 20, 20, dtype=torch.int32)
    instances[:, :, 5:9], instances[:, :, :3] = 1, 2
    logits = torch.zeros(1, 2, 12, 12)
    loss = BorderWeightedCrossEntropy()
    whole, cropped = loss(logits, instances), loss(logits, instances[:, 4:16, 4:16])
    # cropped first, cell 2 is gone and cell 1 alone has no border
    assert cropped == pytest.approx(np.log(2))
    assert whole > 1.2 * cropped


def test_tiles_cut_from_one_image_add_up_to_it() -> None:
    instances = cells(11, (1, 40, 60))
    logits = torch.randn(1, 2, 20, 40, dtype=torch.float64)
    loss = BorderWeightedCrossEntropy(reduction="sum")
    # cells move no weight further than the margin of 10 px here
    near = BorderWeightedCrossEntropy(sigma_px=0.9, reduction="sum")
    parts = [near(logits[..., left : left + 20], instances[..., left : left + 40]) for left in (0, 20)]
    torch.testing.assert_close(sum(parts), near(logits, instances), rtol=1e-6, atol=0)
    assert loss(logits, instances) > near(logits, instances)


@pytest.mark.parametrize("where", ["instances", "target"])
def test_ignored_pixels_count_for_nothing(where: str) -> None:
    instances = cells(2, (1, 30, 30), ignored=False)
    target = (uk.cut_gap(instances) > 0).long()
    logits = torch.randn(1, 2, 30, 30, dtype=torch.float64, requires_grad=True)
    hidden = torch.zeros(1, 30, 30, dtype=torch.bool)
    hidden[:, 10:14, 3:9] = True
    if where == "instances":
        instances = instances.masked_fill(hidden, -1)
    else:
        target = target.masked_fill(hidden, -1)
    loss = BorderWeightedCrossEntropy(class_weight=(0.5, 2.0))
    value = loss(logits, instances, target)
    value.backward()
    assert logits.grad is not None
    assert (logits.grad.abs().sum(1) == 0).equal(hidden)
    changed = torch.where(hidden[:, None], 1e3, logits.detach())
    assert loss(changed, instances, target).item() == value.item()


def test_nothing_but_ignored_pixels_gives_zero() -> None:
    logits = torch.randn(1, 2, 4, 4, requires_grad=True)
    value = BorderWeightedCrossEntropy()(logits, torch.full((1, 6, 6), -1))
    value.backward()
    assert value.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_without_the_ridge_it_is_torchs_cross_entropy() -> None:
    instances, logits = cells(7, (2, 16, 16)), torch.randn(2, 2, 16, 16)
    cut = uk.cut_gap(instances)
    target = (cut > 0).long().masked_fill(cut < 0, -100)
    want = torch.nn.functional.cross_entropy(logits, target)
    torch.testing.assert_close(BorderWeightedCrossEntropy(w0=0)(logits, instances), want)


def test_the_gradient_is_the_losss() -> None:
    instances = cells(4, (1, 9, 9))
    logits = torch.randn(1, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    target = uk.cut_gap(instances).long().remainder(3)
    loss = BorderWeightedCrossEntropy(class_weight=(1, 2, 3))
    assert torch.autograd.gradcheck(lambda x: loss(x, instances, target), (logits,))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64], ids=str)
def test_ids_and_classes_of_any_integer_dtype(dtype: torch.dtype) -> None:
    instances, logits = cells(9, (1, 20, 20), ignored=False), torch.randn(1, 2, 12, 12)
    loss = BorderWeightedCrossEntropy(class_weight=(0.5, 2.0))
    want = loss(logits, instances)
    assert torch.equal(loss(logits, instances.to(dtype)), want)
    target = (uk.cut_gap(instances) > 0).to(dtype)
    assert torch.equal(loss(logits, instances, target), want)


def test_nothing_that_comes_in_is_changed() -> None:
    instances, logits = cells(9, (1, 20, 20)), torch.randn(1, 2, 20, 20)
    target = (uk.cut_gap(instances) > 0).long()
    kept = [t.clone() for t in (logits, instances, target)]
    BorderWeightedCrossEntropy(class_weight=(1, 2))(logits, instances, target)
    assert all(torch.equal(a, b) for a, b in zip(kept, (logits, instances, target), strict=True))


def test_nan_passes_through() -> None:
    logits = torch.zeros(1, 2, 4, 4)
    logits[0, 0, 1, 1] = torch.nan
    assert BorderWeightedCrossEntropy()(logits, torch.zeros(1, 4, 4, dtype=torch.int32)).isnan()


_L, _I = torch.zeros(1, 2, 4, 4), torch.zeros(1, 6, 6, dtype=torch.int32)


@pytest.mark.parametrize(
    ("settings", "arguments", "error", "sentence"),
    [
        ({}, (_L, _I[:, :3]), ValueError, r"instances must be \[N, H, W\] with at least 4x4, got \[1, 3, 6\]"),
        ({}, (_L, _I[0]), ValueError, r"instances must be \[N, H, W\] with at least 4x4, got \[6, 6\]"),
        ({}, (_L, _I.float()), TypeError, "instances must be an integer tensor, got float32"),
        ({}, (_L, _I, torch.zeros(1, 4, 4)), TypeError, "target"),
        ({}, (_L, _I, _I + 2), ValueError, "target"),
        ({}, (_L, _I.expand(2, 6, 6)), ValueError, "target"),
        ({"class_weight": (1, 2, 3)}, (_L, _I), ValueError, "class_weight must have 2 numbers, one per class, got 3"),
        ({"region": "cells"}, (_L, _I), ValueError, "region must be 'background' or 'all', got 'cells'"),
        ({"w0": -1}, (_L, _I), ValueError, "w0 must be at least 0 and finite, got -1"),
        ({"reduction": "median"}, (_L, _I), ValueError, "reduction"),
    ],
)
def test_what_does_not_fit_is_refused(
    settings: dict[str, Any], arguments: tuple[Tensor, ...], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        BorderWeightedCrossEntropy(**settings)(*arguments)


def test_it_is_a_module_without_state_that_says_its_settings() -> None:
    loss = BorderWeightedCrossEntropy(w0=3, class_weight=[1, 2])
    assert not loss.state_dict()
    assert not list(loss.parameters())
    assert repr(loss) == ("BorderWeightedCrossEntropy(w0=3, sigma_px=5.0, class_weight=(1.0, 2.0), reduction='mean')")


# ---- what the loss is made of, before there are logits


@given(
    seed=st.integers(0, 2**16),
    size=st.tuples(st.integers(1, 2), st.integers(1, 24), st.integers(1, 24)),
    margins=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    w0=st.sampled_from([0.0, 10.0]),
    class_weight=st.sampled_from([None, (0.4, 2.5)]),
    region=st.sampled_from(["background", "all"]),
    own=st.sampled_from(["none", "all of it", "the middle"]),
)
def test_pixels_are_what_the_loss_weighs(
    seed: int, size: tuple[int, int, int], margins: tuple[int, int], own: str, **settings: Any
) -> None:
    n, h, w = size
    instances = cells(seed, (n, h + margins[0], w + margins[1]))
    before = instances.clone()
    top, left = margins[0] // 2, margins[1] // 2
    middle = (..., slice(top, top + h), slice(left, left + w))
    target = None if own == "none" else (instances > 2).long().masked_fill_(instances == 5, -1)
    if own == "the middle" and target is not None:
        target = target[middle]
    loss = BorderWeightedCrossEntropy(**settings)
    classes, weight = loss.pixels(instances, target, (h, w), 2)
    assert classes.shape == weight.shape == size
    assert classes.dtype == torch.int64
    assert torch.equal(instances, before)
    ignored = instances[middle] < 0
    if target is not None:
        ignored = ignored | (target if own == "the middle" else target[middle]).lt(0)
    assert torch.equal(classes == -100, ignored)
    assert bool(((classes == -100) | (classes == 0) | (classes == 1)).all())
    logits = torch.randn(n, 2, h, w)
    found = uk.weighted_cross_entropy(logits, classes, weight)
    assert torch.equal(found, loss(logits, instances, target))
    # pieces of them belong to pieces of the logits
    cut = h // 2
    parts = [
        uk.weighted_cross_entropy(logits[:, :, rows], classes[:, rows], weight[:, rows], reduction="sum")
        for rows in (slice(0, cut), slice(cut, h))
        if rows.stop > rows.start
    ]
    total = uk.weighted_cross_entropy(logits, classes, weight, reduction="sum")
    torch.testing.assert_close(torch.stack(parts).sum(), total, rtol=1e-5, atol=1e-5)


def test_pixels_without_their_neighbourhood_weigh_less() -> None:
    # a cell outside the piece casts its weight into it: weights of a piece are cut from those of the image
    instances = torch.zeros(1, 9, 16, dtype=torch.int32)
    instances[:, :, :4], instances[:, :, 9:] = 1, 2
    loss = BorderWeightedCrossEntropy()
    _, whole = loss.pixels(instances, None, (9, 16), 2)
    _, alone = loss.pixels(instances[:, :, :8].contiguous(), None, (9, 8), 2)
    assert (whole[:, :, 5:8] > 1.1 * alone[:, :, 5:8]).all()


@pytest.mark.parametrize(
    ("instances", "size", "classes", "sentence"),
    [
        (torch.zeros(1, 8, 9), (9, 9), 2, r"instances must be \[N, H, W\] with at least 9x9, got \[1, 8, 9\]"),
        (torch.zeros(8, 9), (8, 8), 2, r"instances must be \[N, H, W\] with at least 8x8, got \[8, 9\]"),
        (torch.zeros(1, 8, 9), (8, 9), 3, "class_weight must have 3 numbers, one per class, got 2"),
    ],
    ids=["too small", "too flat", "too few weights"],
)
def test_pixels_that_do_not_fit_are_refused(
    instances: Tensor, size: tuple[int, int], classes: int, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        BorderWeightedCrossEntropy(class_weight=(1.0, 2.0)).pixels(instances.int(), None, size, classes)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tile", [16, 23])
def test_tiles_with_their_context_sum_to_the_whole(variant: str, tile: int) -> None:
    # as far as Eq. 2 reaches with these sigmas, and a fade's six
    margin = 24
    instances = cells(3, (2, 46 + 2 * margin, 61 + 2 * margin))
    loss = BorderWeightedCrossEntropy.variant(
        variant, sigma_px=3.0, reduction="sum", **({"fade": (0.1, 4.0)} if "fade" in VARIANTS[variant] else {})
    )
    logits = torch.randn(2, 2, 46, 61, dtype=torch.float64, requires_grad=True)
    whole = loss(logits, instances)
    want = torch.autograd.grad(whole, logits)[0]
    total, gradient = torch.zeros((), dtype=torch.float64), torch.zeros_like(want)
    for top in range(0, 46, tile):
        for left in range(0, 61, tile):
            part = logits[..., top : top + tile, left : left + tile]
            rows, columns = part.shape[-2:]
            context = instances[:, top : top + rows + 2 * margin, left : left + columns + 2 * margin]
            found = loss(part, context)
            total = total + found.detach()
            gradient += torch.autograd.grad(found, logits)[0]
    torch.testing.assert_close(total, whole.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, want, rtol=1e-12, atol=1e-14)


def test_the_background_fades_with_the_distance_to_cells() -> None:
    instances = torch.zeros(1, 3, 40, dtype=torch.int32)
    instances[..., :4] = 1
    loss = BorderWeightedCrossEntropy.variant("freiburg-2019", class_weight=(2.0, 3.0))
    weight = loss.weight(instances, (instances > 0).long())[0, 1]
    assert weight[:4].tolist() == [3.0] * 4
    for column in (4, 10, 30):
        distance = column - 3
        assert weight[column].item() == pytest.approx(2 * (0.1 + 0.9 * np.exp(-(distance**2) / 200)), rel=1e-6)
    # and a ridge between two of them is w0 high, as ever
    instances[..., 6:] = 2
    weight = loss.weight(instances, (instances > 0).long())[0, 1]
    assert weight[4].item() == pytest.approx(2 * (0.1 + 0.9 * np.exp(-1 / 200)) + 50 * np.exp(-9 / 72), rel=1e-5)


def test_an_unknown_variant_and_a_wrong_fade_are_refused() -> None:
    with pytest.raises(ValueError, match="name must be one of paper, freiburg-2019, all-pixels, got 'freiburg'"):
        BorderWeightedCrossEntropy.variant("freiburg")
    for fade in ((1.5, 3.0), (0.1, 0.0), (-0.1, 3.0)):
        with pytest.raises(ValueError, match="fade must be a share from 0 to 1 and a number of pixels above 0"):
            BorderWeightedCrossEntropy(fade=fade)
