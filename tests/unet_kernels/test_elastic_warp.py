"""elastic_warp: laws that any warp keeps, and an independent numpy twin for the borders and the cubic."""

import importlib
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import unet_kernels as uk
from tests.proof.memory import LAYOUTS, awkward, guarded_launch
from tests.proof.order import assert_order_does_not_matter
from tests.proof.properties import given, st
from tests.proof.yardstick import assert_same_bits
from unet_kernels import reference
from unet_kernels.elastic_warp import launch_elastic_warp_fwd

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


def test_image_and_labels_stay_aligned() -> None:
    labels = torch.zeros(1, 40, 40, dtype=torch.int32)
    labels[:, 10:30, 12:25] = 1
    out, warped = uk.elastic_warp(labels[:, None].float(), torch.randn(1, 2, 3, 3) * 3, labels=labels)
    # they may differ where the interpolated edge passes one half between two pixels
    assert ((warped[:, None] == 1) != (out > 0.5)).float().mean() < 0.01


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


# ---- the Triton kernel


def _module() -> ModuleType:
    # the kernel's place in the package is shadowed by the function of the same name
    return importlib.import_module("unet_kernels.elastic_warp")


# N, C, H, W, grid, out_size
WARPS: dict[str, tuple[tuple[int, int, int, int], tuple[int, int], tuple[int, int]]] = {
    "one pixel": ((1, 1, 1, 1), (2, 2), (1, 1)),
    "one column": ((1, 2, 9, 1), (3, 3), (9, 1)),
    "as large": ((2, 1, 12, 17), (3, 3), (12, 17)),
    "a window": ((1, 3, 21, 20), (4, 2), (9, 12)),
    "larger than the image": ((1, 1, 5, 6), (3, 3), (13, 19)),
    "several programs": ((1, 1, 30, 33), (3, 3), (30, 33)),
}


def _operands(case: str, *, affine: bool, table: bool, device: torch.device, seed: int = 0) -> tuple[Any, ...]:
    """(image in [0, 1], displacement, labels, matrix, lut, out_size)."""
    (n, c, h, w), grid, out_size = WARPS[case]
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

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


def _near_a_half(operands: tuple[Any, ...]) -> Tensor:
    """Where rounding decides which pixel is the nearest."""
    image, displacement, _, matrix, _, out_size = operands
    y, x = reference.transformed(
        *reference.displaced(image.double(), displacement, out_size), matrix, *image.shape[-2:]
    )
    return torch.stack([((t + 0.5) - (t + 0.5).round()).abs() < 1e-3 for t in (y, x)]).any(0)


@pytest.mark.interpreter
@pytest.mark.parametrize("table", [False, True], ids=["no table", "table"])
@pytest.mark.parametrize("affine", [False, True], ids=["elastic", "affine"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", WARPS)
def test_the_kernel_warps_as_the_reference_does(
    case: str, order: int, affine: bool, table: bool, device: torch.device
) -> None:
    operands = _operands(case, affine=affine, table=table, device=device)
    got, warped = guarded_launch(launch_elastic_warp_fwd, *operands, order)
    image, *rest = operands
    exact, _ = reference.elastic_warp(image.double(), *rest, order)
    torchs, labels = reference.elastic_warp(*operands, order)
    # positions are rounded to float32: by as much as torch's, and the slope of noise
    honest = float((torchs.double() - exact).abs().max())
    assert float((got.double() - exact).abs().max()) <= 4 * honest + 1e-4
    unsure = _near_a_half(operands)
    assert torch.equal(warped[~unsure], labels[~unsure])
    assert set(warped.unique().tolist()) <= set(operands[2].unique().tolist())


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float16], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_the_kernel_keeps_every_dtype(dtype: torch.dtype, order: int, device: torch.device) -> None:
    image, *rest = _operands("a window", affine=True, table=True, device=device)
    top = 1.0 if dtype.is_floating_point else float(torch.iinfo(dtype).max)
    # beyond the ends too, by the cubic's overshoot
    narrow = ((image > 0.5) * top).to(dtype) if order == 3 else (image * top).to(dtype)
    rest[3] = None if order == 3 else rest[3] * top
    got, _ = guarded_launch(launch_elastic_warp_fwd, narrow, *rest, order)
    want, _ = reference.elastic_warp(narrow, *rest, order)
    assert got.dtype == dtype
    allowed = 2e-3 if dtype.is_floating_point else 1 + top / 2**16
    assert float((got.double() - want.double()).abs().max()) <= allowed


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_kernel_takes_any_strides(layout: str, device: torch.device) -> None:
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
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int64], ids=str)
def test_the_kernel_takes_labels_as_they_are(dtype: torch.dtype, device: torch.device) -> None:
    image, displacement, labels, *rest = _operands("as large", affine=False, table=False, device=device)
    want = launch_elastic_warp_fwd(image, displacement, labels.abs(), *rest, 1)[1]
    got = guarded_launch(launch_elastic_warp_fwd, image, displacement, labels.abs().to(dtype), *rest, 1)[1]
    assert got.dtype == dtype
    assert torch.equal(got, want.to(dtype))
    # and none at all
    assert launch_elastic_warp_fwd(image, displacement, None, *rest, 1)[1].numel() == 0


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nan_goes_through_the_kernel(device: torch.device) -> None:
    image, displacement, labels, matrix, lut, size = _operands("as large", affine=True, table=True, device=device)
    image[0, 0, 5, 5] = torch.nan
    got, _ = launch_elastic_warp_fwd(image, displacement, labels, matrix, lut, size, 3)
    want, _ = reference.elastic_warp(image, displacement, labels, matrix, lut, size, 3)
    assert torch.equal(got.isnan(), want.isnan())
    assert got.isnan().any()


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


@pytest.mark.interpreter
def test_on_cuda_the_op_takes_the_kernel_and_otherwise_says_why_not(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    operands = _operands("a window", affine=True, table=True, device=device)
    want = reference.elastic_warp(*operands, 1)
    for refusal in ("", "too old"):
        monkeypatch.setattr("unet_kernels._triton.why_not", lambda *about, refusal=refusal: refusal)
        got = _module()._cuda(*operands, 1)
        torch.testing.assert_close(got[0], want[0], rtol=0, atol=1e-4)
        assert got[1].shape == want[1].shape


def test_what_the_kernel_cannot_take_is_left_to_torch() -> None:
    why_not = _module().why_not
    image, grid = torch.empty(1, 1, 4, 4), torch.empty(1, 2, 3, 3)
    assert "uint16" in why_not(image, grid, torch.empty(1, 4, 4, dtype=torch.uint16), (4, 4))
    assert "float64" in why_not(image, grid.double(), None, (4, 4))
    assert "pixels" in why_not(image, grid, None, (2**16, 2**16))
    assert "cpu" in why_not(image, grid, None, (4, 4))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.uint8, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_compiled_code_is_within_budget(dtype: torch.dtype, order: int) -> None:
    from tests.proof import aot

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    rest = (meta(1, 2, 3, 3), meta(1, 700, 700, dtype=torch.int32), meta(1, 2, 3), meta(1, 256))
    [launch] = aot.recorded(
        _module(),
        "_fwd_kernel",
        lambda: launch_elastic_warp_fwd(meta(1, 1, 700, 700, dtype=dtype), *rest, (572, 572), order),
    )
    for chip in aot.ELEMENTWISE_CHIPS:
        aot.Budget(registers=128, shared_bytes=0).check(aot.compiled(launch, chip))
    # an image of one column, of which sizes are constants
    [launch] = aot.recorded(
        _module(), "_fwd_kernel",
        lambda: launch_elastic_warp_fwd(meta(1, 1, 9, 1, dtype=dtype), rest[0], None, None, None, (9, 1), order),
    )  # fmt: skip
    aot.compiled(launch, 90)
