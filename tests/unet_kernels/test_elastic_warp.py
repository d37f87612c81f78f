"""elastic_warp: laws that any warp keeps, and an independent numpy twin for the borders and the cubic.

Then the kernels, in C++ and in Triton: the reference's bits, and gradients as near as the reference's own.
"""

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import unet_kernels as uk
from tests.proof.memory import LAYOUTS, awkward, guarded_launch
from tests.proof.order import assert_order_does_not_matter
from tests.proof.properties import given, settings, st
from tests.proof.yardstick import assert_gradient, assert_same_bits
from unet_kernels import _native, reference
from unet_kernels.elastic_warp import (
    launch_elastic_warp_bwd,
    launch_elastic_warp_bwd_cpu,
    launch_elastic_warp_fwd,
    launch_elastic_warp_fwd_cpu,
)

pytestmark = pytest.mark.usefixtures("on_device")

ORDERS = (1, 3)


def _constant(rows: float, columns: float, n: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor([rows, columns], dtype=dtype).view(1, 2, 1, 1).expand(n, 2, 3, 3).clone()


def _keys(t: float, a: float = -0.75) -> float:
    t = abs(t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def _weights(position: float, order: int) -> list[tuple[int, float]]:
    low = int(np.floor(position))
    if order == 1:
        return [(low, low + 1 - position), (low + 1, position - low)]
    return [(low + i, _keys(position - low - i)) for i in (-1, 0, 1, 2)]


def _by_numpy(image: np.ndarray, grid: np.ndarray, order: int, size: tuple[int, int], matrix: np.ndarray) -> np.ndarray:
    """One channel, float64, pixel by pixel, numpy's own "reflect" for the border."""
    h, w = image.shape
    gh, gw = grid.shape[1:]
    pad = 4 * max(h, w) + 8
    padded = np.pad(image, pad, mode="reflect") if min(h, w) > 1 else np.pad(image, pad, mode="edge")
    out = np.zeros(size)
    for i in range(size[0]):
        for j in range(size[1]):
            p = np.array([i + (h - size[0]) // 2, j + (w - size[1]) // 2])
            clamped = np.clip(p, 0, [h - 1, w - 1])
            at = clamped * np.array([(gh - 1) / max(h - 1, 1), (gw - 1) / max(w - 1, 1)])
            u = np.zeros(2)
            for r, of_row in _weights(at[0], 3):
                for s, of_column in _weights(at[1], 3):
                    u += of_row * of_column * grid[:, np.clip(r, 0, gh - 1), np.clip(s, 0, gw - 1)]
            centre = np.array([(h - 1) / 2, (w - 1) / 2])
            q = matrix[:, :2] @ (p + u - centre) + matrix[:, 2] + centre
            for r, of_row in _weights(q[0], order):
                for s, of_column in _weights(q[1], order):
                    out[i, j] += of_row * of_column * padded[r + pad, s + pad]
    return out


@pytest.mark.parametrize("order", ORDERS)
@given(data=st.data())
def test_equals_an_independent_numpy_warp(order: int, data: st.DataObject) -> None:
    h, w = data.draw(st.integers(2, 7)), data.draw(st.integers(2, 7))
    size = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    image, grid = (
        rng.normal(size=(h, w)),
        rng.normal(size=(2, *data.draw(st.tuples(st.integers(2, 4), st.integers(2, 4))))) * 2,
    )
    matrix = np.hstack([np.eye(2) + rng.normal(size=(2, 2)) * 0.2, rng.normal(size=(2, 1))])
    got = uk.elastic_warp(
        torch.tensor(image)[None, None],
        torch.tensor(grid)[None],
        matrix=torch.tensor(matrix)[None],
        out_size=size,
        order=order,
    )
    np.testing.assert_allclose(
        got[0, 0].cpu().numpy(), _by_numpy(image, grid, order, size, matrix), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.uint16, torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_no_displacement_is_the_identity(dtype: torch.dtype, order: int) -> None:
    image = (torch.rand(2, 3, 9, 8) * 200).to(dtype)
    labels = torch.randint(0, 60000, (2, 9, 8)).to(torch.uint16)
    out, warped = uk.elastic_warp(image, _constant(0, 0, 2), labels=labels, order=order)
    assert torch.equal(out.double(), image.double())
    assert torch.equal(warped.int(), labels.int())
    assert (out.dtype, warped.dtype) == (dtype, torch.uint16)


@pytest.mark.parametrize("order", ORDERS)
def test_a_whole_shift_reads_where_the_displacement_points(order: int) -> None:
    image = torch.rand(1, 1, 8, 9, dtype=torch.float64)
    labels = (image[:, 0] * 100).int()
    out, warped = uk.elastic_warp(image, _constant(2, -1, dtype=torch.float64), labels=labels, order=order)
    padded = F.pad(image, (1, 1, 2, 2), mode="reflect")
    want = padded[:, :, 4 : 4 + 8, 0:9]
    torch.testing.assert_close(out, want, rtol=0, atol=1e-14)
    assert torch.equal(warped, (want[:, 0] * 100).int())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n", [7, 8])
def test_a_quarter_turn_and_a_mirror_are_exact(n: int, order: int) -> None:
    image = torch.rand(1, 2, n, n)
    turn = torch.tensor([[[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]]])
    mirror = torch.tensor([[[1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]])
    # out(r, c) = image(c, n - 1 - r)
    turned = uk.elastic_warp(image, _constant(0, 0), matrix=turn, order=order)
    assert torch.equal(turned, torch.rot90(image, 1, (2, 3)))
    assert torch.equal(uk.elastic_warp(image, _constant(0, 0), matrix=mirror, order=order), image.flip(3))


def test_agrees_with_interpolate_and_grid_sample_inside() -> None:
    image, grid = torch.rand(1, 1, 40, 50, dtype=torch.float64), torch.randn(1, 2, 3, 3, dtype=torch.float64)
    u = F.interpolate(grid, size=(40, 50), mode="bicubic", align_corners=True)
    y = torch.arange(40.0, dtype=torch.float64)[:, None] + u[:, 0]
    x = torch.arange(50.0, dtype=torch.float64) + u[:, 1]
    where = torch.stack([x / 49 * 2 - 1, y / 39 * 2 - 1], -1)
    want = F.grid_sample(image, where, mode="bilinear", padding_mode="reflection", align_corners=True)
    torch.testing.assert_close(uk.elastic_warp(image, grid), want, rtol=1e-10, atol=1e-10)


@given(seed=st.integers(0, 2**32 - 1), size=st.tuples(st.integers(1, 20), st.integers(1, 20)))
def test_a_window_is_the_middle_of_the_whole_and_invents_no_label(seed: int, size: tuple[int, int]) -> None:
    torch.manual_seed(seed)
    image, labels, grid = torch.rand(1, 1, 11, 12), torch.randint(0, 9, (1, 11, 12)) * 7, torch.randn(1, 2, 3, 3) * 4
    out, warped = uk.elastic_warp(image, grid, labels=labels, out_size=size)
    whole, whole_labels = uk.elastic_warp(image, grid, labels=labels, out_size=(31, 32))
    top, left = (11 - size[0]) // 2 + 10, (12 - size[1]) // 2 + 10
    inside = (slice(top, top + size[0]), slice(left, left + size[1]))
    assert torch.equal(out, whole[:, :, *inside])
    assert torch.equal(warped, whole_labels[:, *inside])
    assert set(warped.unique().tolist()) <= set(labels.unique().tolist())


@given(seed=st.integers(0, 2**32 - 1), size=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_a_label_image_warped_as_image_and_as_labels_agrees(seed: int, size: tuple[int, int]) -> None:
    torch.manual_seed(seed)
    labels = (torch.rand(2, 30, 25) < 0.5).to(torch.uint8)
    grid, matrix = torch.randn(2, 2, 3, 4) * 5, torch.eye(2, 3) + torch.randn(2, 2, 3) * 0.3
    out, warped = uk.elastic_warp(labels[:, None].float(), grid, labels=labels, matrix=matrix, out_size=size)
    # the nearest pixel has at least a quarter of the weight
    assert warped[out[:, 0] > 0.7501].all()
    assert not warped[out[:, 0] < 0.2499].any()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", [(9, 40), (26, 7), (41, 41)], ids=str)
def test_beyond_the_image_it_is_mirrored_again_and_again(size: tuple[int, int], order: int) -> None:
    image = torch.randint(0, 256, (1, 2, 7, 8), dtype=torch.uint8)
    labels = torch.randint(-9, 9, (1, 7, 8), dtype=torch.int16)
    out, warped = uk.elastic_warp(image, _constant(0, 0), labels=labels, out_size=size, order=order)
    # the window begins floor((H - h) / 2) pixels into the image
    margins = [(s - n + 1) // 2 if s > n else 0 for s, n in zip(size, (7, 8), strict=True)]
    pads = [(m, max(0, s - n - m)) for m, s, n in zip(margins, size, (7, 8), strict=True)]
    for got, plane in ((out[0, 1], image[0, 1]), (warped[0], labels[0])):
        want = np.pad(plane.cpu().numpy(), pads, mode="reflect")[: size[0], : size[1]]
        np.testing.assert_array_equal(got.cpu().numpy(), want)


def test_torch_func_takes_the_warp_apart() -> None:
    image, grid = torch.rand(1, 1, 5, 6, requires_grad=True), torch.randn(1, 2, 2, 2)
    [want] = torch.autograd.grad(uk.elastic_warp(image, grid, order=3).square().sum(), image)
    got = torch.func.grad(lambda i: uk.elastic_warp(i, grid, order=3).square().sum())(image.detach())
    torch.testing.assert_close(got, want)


def test_a_table_of_grey_values_is_applied_to_what_was_read() -> None:
    image = torch.tensor([[[[0, 10, 255, 128]]]], dtype=torch.uint8)
    inverted = 255 - torch.arange(256.0)
    assert uk.elastic_warp(image, _constant(0, 0), lut=inverted).tolist() == [[[[255, 245, 0, 127]]]]
    halves = torch.tensor([[0.0, 0.5, 1.0], [1.0, 0.5, 0.0]])
    twice = torch.tensor([0.0, 0.25, 1.0, 1.5]).view(1, 1, 1, 4).repeat(2, 1, 1, 1)
    got = uk.elastic_warp(twice, _constant(0, 0, 2), lut=halves)
    torch.testing.assert_close(got[:, 0, 0], torch.tensor([[0.0, 0.25, 1.0, 1.0], [1.0, 0.75, 0.0, 0.0]]))


def test_integers_are_rounded_and_clamped() -> None:
    image = torch.tensor([[[[0, 3, 1, 3, 255, 255]]]], dtype=torch.uint8)
    quarter, half = _constant(0, 0.25, dtype=torch.float64), _constant(0, 0.5, dtype=torch.float64)
    # 0.75, 2.5, 1.5, 66, 255, 255 (the edge mirrored): to the nearest, halves to even
    assert uk.elastic_warp(image, quarter).tolist() == [[[[1, 2, 2, 66, 255, 255]]]]
    assert uk.elastic_warp(image, half).tolist() == [[[[2, 2, 2, 129, 255, 255]]]]
    # the cubic overshoots beside an edge, on both sides
    edge = torch.tensor([[[[0, 0, 0, 255, 255, 255]]]], dtype=torch.uint8)
    exact = uk.elastic_warp(edge.double(), half, order=3)
    assert exact.max() > 255
    assert exact.min() < 0
    assert torch.equal(uk.elastic_warp(edge, half, order=3), exact.round().clamp(0, 255).to(torch.uint8))


def test_labels_at_a_half_go_upwards() -> None:
    image, labels = torch.zeros(1, 1, 1, 6), torch.arange(6, dtype=torch.int32).view(1, 1, 6)
    for columns, want in ((0.5, [1, 2, 3, 4, 5, 4]), (-0.5, [0, 1, 2, 3, 4, 5]), (0.49, [0, 1, 2, 3, 4, 5])):
        # a translation by the matrix is exact, one by an interpolated grid is so to rounding
        matrix = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, columns]]])
        _, warped = uk.elastic_warp(image, _constant(0, 0), labels=labels, matrix=matrix)
        assert warped[0, 0].tolist() == want


def test_a_table_spans_the_dtypes_values() -> None:
    image = torch.tensor([[[[0, 255, 32768, 65535]]]], dtype=torch.int64).to(torch.uint16)
    got = uk.elastic_warp(image, _constant(0, 0), lut=torch.tensor([65535.0, 0.0]))
    assert got.to(torch.int64).tolist() == [[[[65535, 65280, 32767, 0]]]]


def test_nan_passes_through_a_table() -> None:
    image = torch.tensor([[[[0.5, torch.nan, 0.25, 1.0]]]])
    got = uk.elastic_warp(image, _constant(0, 0), lut=torch.tensor([0.0, 2.0]))
    assert got[0, 0, 0, 1].isnan()
    assert got[0, 0, 0, 3] == 2


def test_it_is_a_matter_of_float32_under_autocast_too() -> None:
    image, grid = torch.rand(1, 1, 9, 9, requires_grad=True), (torch.randn(1, 2, 3, 3) * 2).requires_grad_()
    matrix = torch.tensor([[[0.9, 0.1, 0.3], [-0.1, 1.1, 0.2]]], requires_grad=True)

    def call() -> list[Tensor]:
        out = uk.elastic_warp(image, grid, matrix=matrix)
        return [out, *torch.autograd.grad(out.square().sum(), (image, grid, matrix))]

    plain = call()
    with torch.autocast(image.device.type, dtype=torch.bfloat16):
        under = call()
    assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_gradients_with_a_table_and_a_window(order: int) -> None:
    image = torch.rand(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    grid = (torch.rand(1, 2, 3, 2, dtype=torch.float64) * 0.3 + 0.2).requires_grad_()
    matrix = torch.tensor([[[0.9, 0.1, 0.1], [-0.1, 1.1, 0.2]]], dtype=torch.float64, requires_grad=True)
    lut = torch.tensor([0.0, 3.0], dtype=torch.float64)
    for size in ((4, 4), (7, 9)):
        torch.autograd.gradcheck(
            lambda i, g, m, size=size: uk.elastic_warp(i, g, matrix=m, lut=lut, out_size=size, order=order),
            (image, grid, matrix),
        )


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_second_derivatives(order: int) -> None:
    image = torch.rand(1, 1, 4, 5, dtype=torch.float64, requires_grad=True)
    grid = (torch.rand(1, 2, 2, 3, dtype=torch.float64) * 0.3 + 0.2).requires_grad_()
    matrix = torch.tensor([[[0.9, 0.1, 0.1], [-0.1, 1.1, 0.2]]], dtype=torch.float64, requires_grad=True)
    lut = torch.tensor([0.0, 2.0, 3.0], dtype=torch.float64)

    def warp(image: Tensor, grid: Tensor, matrix: Tensor | None = None, lut: Tensor | None = None) -> Tensor:
        out = uk.elastic_warp(image, grid, matrix=matrix, lut=lut, out_size=(3, 4), order=order)
        assert isinstance(out, Tensor)
        return out

    assert torch.autograd.gradgradcheck(warp, (image, grid))
    assert torch.autograd.gradgradcheck(lambda *of: warp(*of, lut=lut), (image, grid, matrix))


def test_at_whole_pixels_the_displacements_gradient_is_the_slope_to_the_right() -> None:
    image = torch.tensor([[[[0.0, 1.0, 4.0]]]])
    grid = torch.zeros(1, 2, 2, 2, requires_grad=True)
    out = uk.elastic_warp(image, grid)
    [slope] = torch.autograd.grad(out[0, 0, 0, 1], grid)
    assert slope[0, 1].sum().item() == pytest.approx(3.0)


def test_nan_in_the_image_stays_near() -> None:
    image = torch.rand(1, 1, 9, 9)
    image[0, 0, 4, 4] = torch.nan
    bad = uk.elastic_warp(image, _constant(0.5, 0.5)).isnan()
    assert bad.sum() == 4


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), grid=st.tuples(st.integers(2, 4), st.integers(2, 4)))
def test_the_jacobian_is_the_derivative_of_where_pixels_read(seed: int, grid: tuple[int, int]) -> None:
    displacement = torch.randn(2, 2, *grid, generator=torch.Generator().manual_seed(seed), device="cpu") * 100
    height, width = 401, 301
    image = torch.empty(2, 1, height, width, dtype=torch.float64, device="cpu")
    at = torch.stack(reference.displaced(image, displacement, None), 1)
    found = uk.warp_jacobian(displacement, (height, width))
    for axis in (0, 1):
        # between two pixels on either side; u is smooth, but has a bend where it passes a point of the grid
        steps = (at.roll(-1, 2 + axis) - at.roll(1, 2 + axis)) / 2
        middle = (slice(None), slice(None), slice(1, -1), slice(1, -1))
        assert (found[:, :, axis] - steps)[middle].abs().max() < 0.05


def test_beyond_the_image_nothing_is_stretched_and_a_window_is_the_middle_of_the_whole() -> None:
    displacement = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    whole = uk.warp_jacobian(displacement, (20, 15), out_size=(24, 21))
    torch.testing.assert_close(whole[:, :, :, 2:22, 3:18], uk.warp_jacobian(displacement, (20, 15)))
    outside = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert torch.equal(whole[0, :, 0, 0], outside[:, None].expand(2, 21))
    assert torch.equal(whole[0, :, 1, :, 0], outside.flip(0)[:, None].expand(2, 24))
    # an image of one row has no slope
    assert torch.equal(uk.warp_jacobian(displacement, (1, 1))[0, :, :, 0, 0], torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("displacement", "size", "error", "sentence"),
    [
        (torch.zeros(1, 2, 1, 3), 5, ValueError, "displacement must be a grid of at least 2x2, got 1x3"),
        (torch.zeros(1, 3, 2, 2), 5, ValueError, r"displacement must have shape \[any, 2, any, any\]"),
        (torch.zeros(1, 2, 2, 2).int(), 5, TypeError, "displacement must be floating"),
        (torch.zeros(1, 2, 2, 2), (0, 5), ValueError, r"size must be rows and columns of at least 1, got \(0, 5\)"),
    ],
)
def test_what_has_no_jacobian_is_refused(
    displacement: Tensor, size: Any, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        uk.warp_jacobian(displacement, size)


_IMAGE, _GRID = torch.zeros(1, 1, 5, 5), torch.zeros(1, 2, 3, 3)


@pytest.mark.parametrize(
    ("image", "grid", "settings", "error", "sentence"),
    [
        (_IMAGE.int(), _GRID, {}, TypeError, "image must be uint8, uint16 or floating, got int32"),
        (_IMAGE[0], _GRID, {}, ValueError, r"image must be 4-D \[N, C, H, W\], got 3-D"),
        (_IMAGE, _GRID[:, :, :1], {}, ValueError, "displacement must be a grid of at least 2x2, got 1x3"),
        (_IMAGE, _GRID.expand(2, 2, 3, 3), {}, ValueError, r"displacement must have shape \[1, 2, any, any\]"),
        (_IMAGE, _GRID + torch.nan, {}, ValueError, "displacement must be finite, got 18 NaN or infinite values"),
        (_IMAGE, _GRID, {"order": 2}, ValueError, "order must be 1 or 3, got 2"),
        (_IMAGE, _GRID, {"border": "zeros"}, ValueError, "border must be 'reflect', got 'zeros'"),
        (_IMAGE, _GRID, {"out_size": (0, 4)}, ValueError, r"out_size must be rows and columns of at least 1, got \(0"),
        (_IMAGE, _GRID, {"order": 1.0}, ValueError, "order must be 1 or 3, got 1.0"),
        (_IMAGE, _GRID, {"out_size": (2.5, 3)}, TypeError, "out_size must be a whole number, got 2.5"),
        (_IMAGE, _GRID, {"out_size": True}, TypeError, "out_size must be a whole number, got True"),
        (_IMAGE, _GRID, {"out_size": "ab"}, TypeError, "out_size must be a whole number, got 'ab'"),
        (_IMAGE, _GRID, {"out_size": (1, 2, 3)}, ValueError, r"out_size must be rows and columns, got \(1, 2, 3\)"),
        (_IMAGE, _GRID, {"labels": torch.zeros(1, 5, 5)}, TypeError, "labels must be an integer tensor, got float32"),
        (_IMAGE, _GRID, {"labels": torch.zeros(1, 4, 5).int()}, ValueError, r"labels must have shape \[1, 5, 5\]"),
        (_IMAGE, _GRID, {"matrix": torch.eye(3)[None]}, ValueError, r"matrix must have shape \[1, 2, 3\]"),
        (_IMAGE, _GRID, {"lut": torch.zeros(1)}, ValueError, "lut must have at least 2 entries, got 1"),
        (_IMAGE, _GRID, {"lut": torch.zeros(3, 4)}, ValueError, "lut must have one row per image of the batch, 1, got"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_a_sentence(
    image: Any, grid: Any, settings: Any, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        uk.elastic_warp(image, grid, **settings)


# ---- the kernels


def _module() -> ModuleType:
    # the kernels' place in the package is shadowed by the function of the same name
    return importlib.import_module("unet_kernels.elastic_warp")


# N, C, H, W, grid, out_size
WARPS: dict[str, tuple[tuple[int, int, int, int], tuple[int, int], tuple[int, int]]] = {
    "one pixel": ((1, 1, 1, 1), (2, 2), (1, 1)),
    "one column": ((1, 2, 9, 1), (3, 3), (9, 1)),
    "two rows": ((1, 1, 2, 9), (2, 3), (5, 4)),
    "as large": ((2, 1, 12, 17), (3, 3), (12, 17)),
    "a window": ((1, 3, 21, 20), (4, 2), (9, 12)),
    "larger than the image": ((1, 1, 5, 6), (3, 3), (13, 19)),
    "several programs": ((1, 1, 35, 33), (3, 3), (9, 33)),
    "a small batch": ((2, 1, 6, 7), (3, 3), (5, 6)),
}


def _operands(case: str, *, affine: bool, table: bool, device: torch.device, seed: int = 0) -> tuple[Any, ...]:
    """(image in [0, 1], displacement, labels, matrix, lut, out_size)."""
    (n, c, h, w), grid, out_size = WARPS[case]
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        # the generator is the CPU's, wherever tests make their tensors
        return torch.rand(*shape, generator=generator, device="cpu")

    image, displacement = drawn(n, c, h, w), 4 * (drawn(n, 2, *grid) - 0.5)
    labels = (drawn(n, h, w) * 7).int() - 1
    turn = torch.tensor([[0.8, -0.5, 1.3], [0.4, 0.9, -2.1]]).repeat(n, 1, 1)
    lut = drawn(n, 5).sort(1).values
    return (
        image.to(device),
        displacement.to(device),
        labels.to(device),
        turn.to(device) if affine else None,
        lut.to(device) if table else None,
        out_size,
    )


def _top(dtype: torch.dtype) -> float:
    return 1.0 if dtype.is_floating_point else float(torch.iinfo(dtype).max)


Gradients = list[Tensor | None]


def _needs(operands: tuple[Any, ...]) -> list[bool]:
    return [True, True, operands[3] is not None]


def _gradients(launch: Callable[..., Any], operands: tuple[Any, ...], order: int, dout: Tensor) -> Gradients:
    image, displacement, _, *rest = operands
    needs = _needs(operands)
    found = _module()._gradients(launch, dout, image, displacement, *rest, order, needs)
    return [f if needed else None for f, needed in zip(found, needs, strict=True)]


def _assert_gradients(launch: Callable[..., Any], operands: tuple[Any, ...], order: int) -> None:
    """Those of a launcher are as near to float64's as the reference's own."""
    image, displacement, _, *rest = operands
    dout = torch.rand(*image.shape[:2], *operands[5], device=image.device).to(image.dtype) - 0.5
    exact, torchs = (
        reference.elastic_warp_gradients(dout.to(d), image.to(d), displacement, *rest, order, _needs(operands))
        for d in (torch.float64, image.dtype)
    )
    ours = _gradients(launch, operands, order, dout)
    for of_exact, of_torch, of_ours in zip(exact, torchs, ours, strict=True):
        if of_torch is None or of_exact is None:
            assert of_torch is of_exact is of_ours is None
        else:
            assert of_ours is not None
            assert_gradient(of_torch, of_ours, of_exact.double())


# ---- in C++

PROCESSORS = ("baseline", "avx2", "avx512")


@contextmanager
def _on(processor: str) -> Iterator[None]:
    """With the instructions of a processor, where it has them."""
    if _native.why_not(torch.device("cpu")):
        pytest.skip(_native.why_not(torch.device("cpu")))
    with mock.patch.dict(os.environ, {"UNET_PROCESSOR": processor}):
        here = _native.native().unet_processor().decode()
        if here != processor:
            pytest.skip(f"this processor has no {processor}, but {here}")
        yield


def _any_operands(data: st.DataObject, dtypes: tuple[torch.dtype, ...]) -> tuple[Any, ...]:
    """Of any shape, dtype and strides, by a map that may shrink, grow, or lead far away."""
    sides = st.integers(1, 90)
    n, c = data.draw(st.tuples(st.integers(1, 2), st.sampled_from([1, 3])))
    h, w = data.draw(st.tuples(sides, sides))
    out_size, grid = data.draw(st.tuples(sides, sides)), data.draw(st.tuples(st.integers(2, 6), st.integers(2, 90)))
    dtype = data.draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    image = (torch.rand(n, c, h, w, generator=generator) * _top(dtype)).to(dtype)
    displacement = torch.randn(n, 2, *grid, generator=generator) * data.draw(st.sampled_from([0.0, 1.0, 10.0, 1e4]))
    kinds = [torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64]
    labels = torch.randint(0, 120, (n, h, w), generator=generator).to(data.draw(st.sampled_from(kinds)))
    matrix = torch.randn(n, 2, 3, generator=generator) * data.draw(st.sampled_from([0.3, 3.0, 30.0]))
    lut = torch.rand(data.draw(st.sampled_from([(2,), (n, 7), (n, 256)])), generator=generator) * _top(dtype)
    if data.draw(st.booleans()):
        image, labels = (t.transpose(-2, -1).contiguous().transpose(-2, -1) for t in (image, labels))
    return (
        image,
        displacement,
        labels if data.draw(st.booleans()) else None,
        matrix if data.draw(st.booleans()) else None,
        lut if data.draw(st.booleans()) else None,
        out_size,
    )


@pytest.mark.parametrize("processor", PROCESSORS)
@given(data=st.data(), order=st.sampled_from(ORDERS))
def test_the_cpp_kernel_has_the_bits_of_the_reference(processor: str, data: st.DataObject, order: int) -> None:
    with _on(processor), torch.device("cpu"):
        operands = _any_operands(
            data, (torch.uint8, torch.uint16, torch.float16, torch.bfloat16, torch.float32, torch.float32)
        )
        out, warped = launch_elastic_warp_fwd_cpu(*operands, order)
        want, cells = reference.elastic_warp(*operands, order)
        assert_same_bits(out, want)
        if cells is not None:
            assert_same_bits(warped, cells)


@pytest.mark.parametrize("processor", PROCESSORS)
@settings(max_examples=25)
@given(data=st.data(), order=st.sampled_from(ORDERS))
def test_the_cpp_gradients_are_as_near_as_the_references(processor: str, data: st.DataObject, order: int) -> None:
    with _on(processor), torch.device("cpu"):
        image, displacement, labels, matrix, lut, size = _any_operands(data, (torch.float32,))
        # far away and strongly stretched, all digits are the position's
        displacement = displacement.clamp(-30, 30)
        matrix = None if matrix is None else matrix.clamp(-2, 2)
        _assert_gradients(launch_elastic_warp_bwd_cpu, (image, displacement, labels, matrix, lut, size), order)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_cpp_gradients_of_narrow_images(dtype: torch.dtype) -> None:
    with _on("baseline"), torch.device("cpu"):
        image, *rest = _operands("a window", affine=True, table=True, device=torch.device("cpu"))
        _assert_gradients(launch_elastic_warp_bwd_cpu, (image.to(dtype), *rest), 3)


@pytest.mark.parametrize("order", ORDERS)
def test_nan_and_infinity_go_through_cpp_as_through_the_reference(order: int) -> None:
    with _on("baseline"), torch.device("cpu"):
        image, displacement, labels, matrix, lut, size = _operands(
            "as large", affine=True, table=True, device=torch.device("cpu")
        )
        image[0, 0, 5, 5], image[1, 0, 3, 4] = torch.nan, torch.inf
        for table in (None, lut):
            operands = (image, displacement, labels, matrix, table, size)
            got, _ = launch_elastic_warp_fwd_cpu(*operands, order)
            want, _ = reference.elastic_warp(*operands, order)
            assert torch.equal(got.isnan(), want.isnan())
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
            dout = torch.rand(2, 1, *size)
            dout[0, 0, 2, 3], dout[1, 0, 4, 4] = torch.nan, -torch.inf
            rest = (matrix, table, size)
            theirs = reference.elastic_warp_gradients(dout, image, displacement, *rest, order, _needs(operands))
            ours = _gradients(launch_elastic_warp_bwd_cpu, operands, order, dout)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("far", [3e9, 1e30, torch.inf, -torch.inf, torch.nan], ids=str)
def test_what_leads_nowhere_reads_nothing_it_should_not(far: float) -> None:
    # the door refuses what is not finite; an affine map may still overflow
    with _on("baseline"), torch.device("cpu"):
        image, displacement, labels, _, _, size = _operands(
            "a window", affine=False, table=False, device=torch.device("cpu")
        )
        displacement[0, 1, 2, 1] = far
        out, warped = launch_elastic_warp_fwd_cpu(image, displacement, labels, None, None, size, 3)
        assert set(warped.unique().tolist()) <= set(labels.unique().tolist())
        assert out.isnan().any() or out.isfinite().all()
        gradients = _gradients(launch_elastic_warp_bwd_cpu, (image, displacement, None, None, None, size), 3, out)
        assert gradients[0] is not None
        assert gradients[0].shape == image.shape


def test_threads_do_not_change_a_bit() -> None:
    with _on("baseline"), torch.device("cpu"):
        image, grid = torch.rand(2, 2, 150, 170), torch.randn(2, 2, 3, 3) * 10
        operands = (image, grid, None, torch.eye(2, 3).expand(2, 2, 3), None, (140, 180))
        found = []
        for threads in (1, 2, 5):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                assert _native.native().unet_thread_count() == threads
                out, _ = launch_elastic_warp_fwd_cpu(*operands, 3)
                found.append([out, *_gradients(launch_elastic_warp_bwd_cpu, operands, 3, out)])
            finally:
                torch.set_num_threads(before)
        for other in found[1:]:
            for a, b in zip(found[0], other, strict=True):
                assert a is not None
                assert b is not None
                assert_same_bits(a, b)


def test_without_the_library_the_op_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    with _on("baseline"), torch.device("cpu"):
        image, displacement, labels, matrix, lut, size = _operands(
            "a window", affine=True, table=True, device=torch.device("cpu")
        )

        def call() -> list[Tensor]:
            leaves = [t.clone().requires_grad_() for t in (image, displacement, matrix)]
            out, warped = uk.elastic_warp(
                leaves[0], leaves[1], labels=labels, matrix=leaves[2], lut=lut, out_size=size, order=3
            )
            return [out.detach(), warped, *torch.autograd.grad(out.square().sum(), leaves)]

        with_it = call()
        monkeypatch.setattr("unet_kernels._native.why_not", lambda *about: "no compiler")
        without = call()
    for a, b in zip(with_it[:2], without[:2], strict=True):
        assert_same_bits(a, b)
    torch.testing.assert_close(with_it[2:], without[2:], rtol=1e-4, atol=1e-5)


# ---- in Triton


@pytest.mark.interpreter
@pytest.mark.parametrize("table", [False, True], ids=["no table", "table"])
@pytest.mark.parametrize("affine", [False, True], ids=["elastic", "affine"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", [case for case in WARPS if case != "a small batch"])
def test_the_kernel_has_the_values_of_the_reference(
    case: str, order: int, affine: bool, table: bool, device: torch.device
) -> None:
    operands = _operands(case, affine=affine, table=table, device=device)
    got, warped = guarded_launch(launch_elastic_warp_fwd, *operands, order)
    want, labels = reference.elastic_warp(*operands, order)
    assert torch.equal(got, want)
    assert torch.equal(warped, labels)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float16], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_the_kernel_keeps_every_dtype(dtype: torch.dtype, order: int, device: torch.device) -> None:
    image, *rest = _operands("a window", affine=True, table=True, device=device)
    # beyond the ends too, by the cubic's overshoot
    narrow = ((image > 0.5) * _top(dtype)).to(dtype) if order == 3 else (image * _top(dtype)).to(dtype)
    rest[3] = None if order == 3 else rest[3] * _top(dtype)
    got, _ = guarded_launch(launch_elastic_warp_fwd, narrow, *rest, order)
    want, _ = reference.elastic_warp(narrow, *rest, order)
    assert_same_bits(got, want)


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_kernels_take_any_strides(layout: str, device: torch.device) -> None:
    image, displacement, labels, matrix, lut, size = _operands("a window", affine=True, table=True, device=device)
    want = guarded_launch(launch_elastic_warp_fwd, image, displacement, labels, matrix, lut, size, 3)
    odd = (
        awkward(image, layout),
        awkward(displacement, layout),
        labels.transpose(1, 2).contiguous().transpose(1, 2),
        matrix.contiguous().transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([lut, lut], 2)[..., 0],
    )
    for got, theirs in zip(guarded_launch(launch_elastic_warp_fwd, *odd, size, 3), want, strict=True):
        assert_same_bits(got, theirs)
    # one table for all
    one = launch_elastic_warp_fwd(image, displacement, labels, matrix, lut[0], size, 3)
    assert_same_bits(one[0], want[0])


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradients_kernels_take_any_strides(layout: str, device: torch.device) -> None:
    image, displacement, _, matrix, lut, size = _operands("a small batch", affine=True, table=True, device=device)
    dout = torch.rand(2, 1, *size, device=device)
    want = launch_elastic_warp_bwd(dout, image, displacement, matrix, lut, size, 1, [True] * 3)
    odd = [awkward(t, layout) for t in (dout, image, displacement)]
    for got, theirs in zip(
        guarded_launch(launch_elastic_warp_bwd, *odd, matrix, lut, size, 1, [True] * 3), want, strict=True
    ):
        assert_same_bits(got, theirs)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.int8, torch.int16, torch.int64, torch.uint16, torch.uint32, torch.uint64],
    ids=str,
)
def test_the_kernel_takes_labels_as_they_are(dtype: torch.dtype, device: torch.device) -> None:
    image, displacement, labels, *rest = _operands("as large", affine=False, table=False, device=device)
    want = launch_elastic_warp_fwd(image, displacement, labels.abs(), *rest, 1)[1]
    got = guarded_launch(launch_elastic_warp_fwd, image, displacement, labels.abs().to(dtype), *rest, 1)[1]
    assert got.dtype == dtype
    assert torch.equal(got, want.to(dtype))
    # and none at all
    assert launch_elastic_warp_fwd(image, displacement, None, *rest, 1)[1].numel() == 0


@pytest.mark.interpreter
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("case", "affine", "table"),
    [
        ("one pixel", True, False),
        ("one column", False, True),
        ("two rows", True, True),
        pytest.param("as large", True, False, marks=pytest.mark.slow),
        ("a window", True, True),
        ("larger than the image", False, False),
        ("several programs", False, True),
    ],
    ids=str,
)
def test_the_gradients_of_the_kernels_are_as_near_as_the_references(
    case: str, affine: bool, table: bool, order: int, device: torch.device
) -> None:
    def launch(*args: Any) -> Any:
        return guarded_launch(launch_elastic_warp_bwd, *args)

    _assert_gradients(launch, _operands(case, affine=affine, table=table, device=device), order)


@pytest.mark.interpreter
def test_the_kernels_give_only_the_gradient_that_is_wanted(device: torch.device) -> None:
    image, displacement, _, matrix, lut, size = _operands("two rows", affine=True, table=True, device=device)
    dout = torch.rand(1, 1, *size, device=device)
    for table in (None, lut):
        rest = (dout, image, displacement, matrix, table, size, 3)
        everything = launch_elastic_warp_bwd(*rest, [True] * 3)
        for i in range(3):
            alone = guarded_launch(launch_elastic_warp_bwd, *rest, [i == k for k in range(3)])
            assert_same_bits(alone[i], everything[i])
            assert [a.numel() for k, a in enumerate(alone) if k != i] == [0, 0]


@pytest.mark.interpreter
def test_the_gradients_of_narrow_images(device: torch.device) -> None:
    image, *rest = _operands("two rows", affine=True, table=True, device=device)
    _assert_gradients(launch_elastic_warp_bwd, (image.half(), *rest), 3)


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize(
    "table", [pytest.param(False, id="no table"), pytest.param(True, id="table", marks=pytest.mark.slow)]
)
def test_nan_and_infinity_go_through_the_kernels(table: bool, device: torch.device) -> None:
    operands = _operands("a small batch", affine=True, table=table, device=device)
    image, displacement, _, *rest = operands
    image[0, 0, 5, 5], image[1, 0, 3, 4] = torch.nan, torch.inf
    got, _ = launch_elastic_warp_fwd(*operands, 3)
    want, _ = reference.elastic_warp(*operands, 3)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert got.isnan().any()
    dout = torch.rand(2, 1, *operands[5], device=device)
    dout[0, 0, 2, 3], dout[1, 0, 4, 4] = torch.nan, -torch.inf
    theirs = reference.elastic_warp_gradients(dout, image, displacement, *rest, 3, _needs(operands))
    ours = _gradients(launch_elastic_warp_bwd, operands, 3, dout)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_displacement_that_is_no_number_makes_the_image_so(device: torch.device) -> None:
    # nobody waits for a GPU to refuse it
    image, displacement, labels, *rest = _operands("a small batch", affine=False, table=False, device=device)
    displacement[0, 1, 0, 0] = torch.nan
    got, warped = guarded_launch(launch_elastic_warp_fwd, image, displacement, labels, *rest, 3)
    assert got[0].isnan().any()
    assert got[1].isfinite().all()
    assert set(warped.unique().tolist()) <= set(labels.unique().tolist())
    dimage, _, _ = launch_elastic_warp_bwd(torch.ones_like(got), image, displacement, *rest, 3, [True, False, False])
    assert dimage[0].isnan().any()
    assert dimage[1].isfinite().all()


@pytest.mark.interpreter
def test_far_positions_are_mirrored_into_the_image(device: torch.device) -> None:
    image, displacement, labels, *rest = _operands("as large", affine=False, table=False, device=device)
    far = displacement.round() + torch.tensor([1000.0, -777.0], device=device).view(1, 2, 1, 1)
    far = far[..., :1, :1].repeat(1, 1, *displacement.shape[2:])
    got, warped = guarded_launch(launch_elastic_warp_fwd, image, far, labels, *rest, 1)
    want, cells = reference.elastic_warp(image.double(), far, labels, *rest, 1)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-3)
    assert torch.equal(warped, cells)


@pytest.mark.interpreter
def test_the_order_of_programs_does_not_matter(device: torch.device) -> None:
    operands = _operands("several programs", affine=True, table=True, device=device)
    assert_order_does_not_matter(lambda: launch_elastic_warp_fwd(*operands, 1)[0], seeds=2)
    image, displacement, _, *rest = operands
    dout = torch.rand(1, 1, *operands[5], device=device)
    assert_order_does_not_matter(
        lambda: torch.cat(
            [t.flatten() for t in launch_elastic_warp_bwd(dout, image, displacement, *rest, 1, [True] * 3)]
        ),
        seeds=1,
    )


@pytest.mark.interpreter
def test_on_cuda_the_ops_take_the_kernels_and_otherwise_say_why_not(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    operands = _operands("two rows", affine=True, table=True, device=device)
    image, displacement, _, *rest = operands
    want = reference.elastic_warp(*operands, 1)
    dout = torch.rand_like(want[0])
    gradients = reference.elastic_warp_gradients(dout, image, displacement, *rest, 1, [True] * 3)
    for refusal in ("", "too old"):
        monkeypatch.setattr("unet_kernels._triton.why_not", lambda *about, refusal=refusal: refusal)
        got = _module()._cuda(*operands, 1)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        found = list(_module()._backward_cuda(dout, image, displacement, *rest, 1, [True] * 3))
        torch.testing.assert_close(found, gradients, rtol=1e-4, atol=1e-5)


def test_what_the_kernels_cannot_take_is_left_to_torch() -> None:
    module = _module()
    image, grid = torch.empty(1, 1, 4, 4), torch.empty(1, 2, 3, 3)
    assert "bool" in module.why_not(image, grid, torch.empty(1, 4, 4, dtype=torch.bool), (4, 4))
    assert "float64" in module.why_not(image, grid.double(), None, (4, 4))
    assert "pixels" in module.why_not(image, grid, None, (2**16, 2**16))
    assert "cpu" in module.why_not(torch.empty(1, 1, 4, 4, device="cpu"), grid, None, (4, 4))
    assert "float64" in module.cpu_why_not(image, grid.double())
    assert "float64" in module.cpu_why_not(image.double(), grid)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


# no product and sum in one: what the bits hang on
SEPARATE = ("FFMA",)


@pytest.mark.parametrize(
    ("dtype", "order"),
    [
        (torch.uint8, 3),
        *(pytest.param(*rest, marks=pytest.mark.slow) for rest in ((torch.uint8, 1), (torch.bfloat16, 3))),
    ],
    ids=str,
)
def test_compiled_code_is_within_budget(dtype: torch.dtype, order: int) -> None:
    from tests.proof import aot

    rest = (_meta(1, 2, 3, 3), _meta(1, 700, 700, dtype=torch.int32), _meta(1, 2, 3), _meta(1, 256))
    [launch] = aot.recorded(
        _module(),
        "_fwd_kernel",
        lambda: launch_elastic_warp_fwd(_meta(1, 1, 700, 700, dtype=dtype), *rest, (572, 572), order),
    )
    for chip in aot.ELEMENTWISE_CHIPS:
        aot.Budget(registers=96, shared_bytes=0, must_not_have=SEPARATE).check(aot.compiled(launch, chip))
    # an image of one column, of which sizes are constants
    [launch] = aot.recorded(
        _module(), "_fwd_kernel",
        lambda: launch_elastic_warp_fwd(_meta(1, 1, 9, 1, dtype=dtype), rest[0], None, None, None, (9, 1), order),
    )  # fmt: skip
    aot.compiled(launch, 90)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "registers", "shared_bytes", "must_not_have"),
    [
        ("_bwd_position_kernel", 96, 2048, SEPARATE),
        ("_reach_kernel", 128, 0, SEPARATE),
        ("_bwd_image_kernel", 128, 16384, ()),
    ],
)
def test_compiled_code_of_the_derivative_is_within_budget(
    kernel: str, registers: int, shared_bytes: int, must_not_have: tuple[str, ...]
) -> None:
    from tests.proof import aot

    image, grid, matrix, lut = _meta(1, 1, 700, 700), _meta(1, 2, 3, 3), _meta(1, 2, 3), _meta(1, 256)
    [launch] = aot.recorded(
        _module(),
        kernel,
        lambda: launch_elastic_warp_bwd(_meta(1, 1, 572, 572), image, grid, matrix, lut, (572, 572), 3, [True] * 3),
    )
    for chip in aot.ELEMENTWISE_CHIPS:
        budget = aot.Budget(registers=registers, shared_bytes=shared_bytes, must_not_have=must_not_have)
        budget.check(aot.compiled(launch, chip))


@pytest.mark.slow
def test_the_derivative_is_a_well_formed_operator() -> None:
    image, displacement, _, matrix, lut, size = _operands(
        "two rows", affine=True, table=True, device=torch.get_default_device()
    )
    dout = torch.rand(1, 1, *size, dtype=torch.float64)
    wide = [t.double().requires_grad_() for t in (dout, image, displacement, matrix)]
    needs = [True, False, True]
    torch.library.opcheck(torch.ops.unet.elastic_warp_backward, (*wide, lut.double(), size, 3, needs))
