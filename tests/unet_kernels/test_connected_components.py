"""connected_components: both kernels against the reference and scipy, on masks made to be hard for union-find."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

import unet_kernels as uk
from tests.proof.properties import given, st
from unet_kernels import _native, reference
from unet_kernels.connected_components import launch_cpu, launch_cuda

pytestmark = pytest.mark.usefixtures("on_device")

CPU = torch.device("cpu")
both_connectivities = pytest.mark.parametrize("connectivity", [4, 8])


def _here(values: np.ndarray) -> Tensor:
    """Where the test makes its tensors."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(torch.empty(0).device)


def _by_scipy(mask: np.ndarray, connectivity: int) -> np.ndarray:
    """Each slice by scipy, renumbered by first pixels, which scipy does not promise."""
    ids = np.zeros(mask.shape, np.int32)
    for z in range(len(mask)):
        found, count = ndimage.label(mask[z], np.ones((3, 3)) if connectivity == 8 else None)
        present, first = np.unique(found, return_index=True)
        rank = np.zeros(count + 1, np.int32)
        rank[present[present > 0][np.argsort(first[present > 0])]] = np.arange(1, count + 1)
        ids[z] = rank[found]
    return ids


def _noise(h: int, w: int, rng: np.random.Generator) -> np.ndarray:
    return rng.random((h, w)) < rng.choice([0.0, 0.1, 0.4, 0.5, 0.6, 0.9, 1.0])


def _snake(h: int, w: int, rng: np.random.Generator) -> np.ndarray:
    mask = np.zeros((h, w), np.bool_)
    mask[::2] = True
    mask[1::4, -1:], mask[3::4, :1] = True, True
    return mask


def _spiral(h: int, w: int, rng: np.random.Generator) -> np.ndarray:
    """One arm, from the outside in: its first pixel is far from most of it."""
    mask = np.zeros((h, w), np.bool_)
    y, x, dy, dx = 0, 0, 0, 1
    mask[:1, :1] = True

    def free(v: int, u: int) -> bool:
        # the arm keeps one pixel off itself
        return 0 <= v < h and 0 <= u < w and not (0 <= v + dy < h and 0 <= u + dx < w and mask[v + dy, u + dx])

    turns = 0
    while turns < 2 and h and w:
        if free(y + dy, x + dx) and not mask[y + dy, x + dx]:
            y, x, turns = y + dy, x + dx, 0
            mask[y, x] = True
        else:
            dy, dx, turns = dx, -dy, turns + 1
    return mask


def _checkerboard(h: int, w: int, rng: np.random.Generator) -> np.ndarray:
    return np.indices((h, w)).sum(0) % 2 == 0


def _staircase_comb(h: int, w: int, rng: np.random.Generator) -> np.ndarray:
    """Teeth that begin the higher the further right, joined in the last row: each join moves the root of all before."""
    mask = np.zeros((h, w), np.bool_)
    for x in range(0, w, 2):
        mask[max(0, h - 2 - x) :, x] = True
    mask[-1:] = True
    return mask


def _blobs(h: int, w: int, rng: np.random.Generator) -> np.ndarray:
    return ndimage.gaussian_filter(rng.standard_normal((h, w)), 1.5) > 0 if h and w else np.zeros((h, w), np.bool_)


SHAPES: dict[str, Callable[[int, int, np.random.Generator], np.ndarray]] = {
    "noise": _noise,
    "snake": _snake,
    "spiral": _spiral,
    "checkerboard": _checkerboard,
    "staircase comb": _staircase_comb,
    "blobs": _blobs,
}


@st.composite
def masks(draw: Any) -> np.ndarray:
    """[N, H, W] bool, mirrored and transposed at will: what is hard from one corner is easy from another."""
    make = SHAPES[draw(st.sampled_from(sorted(SHAPES)))]
    n, h, w = draw(st.integers(0, 3)), draw(st.integers(0, 24)), draw(st.integers(0, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    slices = [make(h, w, rng)[:: rng.choice([-1, 1]), :: rng.choice([-1, 1])] for _ in range(n)]
    stack = np.stack(slices) if slices else np.zeros((0, h, w), np.bool_)
    return stack.transpose(0, 2, 1) if draw(st.booleans()) else stack


@both_connectivities
@given(mask=masks())
def test_components_are_those_of_scipy_in_the_order_of_first_pixels(mask: np.ndarray, connectivity: int) -> None:
    want = _by_scipy(mask, connectivity)
    got = uk.connected_components(_here(mask), connectivity=connectivity)
    assert got.dtype == torch.int32
    assert got.is_contiguous()
    assert np.array_equal(got.cpu().numpy(), want)
    assert np.array_equal(reference.connected_components(_here(mask), connectivity).cpu().numpy(), want)


@both_connectivities
@given(mask=masks())
def test_the_cpp_kernel_equals_the_reference(mask: np.ndarray, connectivity: int) -> None:
    if _native.why_not(CPU):
        pytest.skip(_native.why_not(CPU))
    with CPU:
        inside = torch.from_numpy(np.ascontiguousarray(mask))
        ours = launch_cpu(inside.to(torch.uint8), connectivity)
        assert torch.equal(ours, reference.connected_components(inside, connectivity))


@pytest.mark.gpu
@both_connectivities
@given(mask=masks())
def test_the_cuda_kernel_equals_the_reference(mask: np.ndarray, connectivity: int) -> None:
    on = torch.empty(0).device
    if _native.why_not_cuda(on):
        pytest.skip(_native.why_not_cuda(on))
    inside = _here(mask)
    assert torch.equal(
        launch_cuda(inside.to(torch.uint8), connectivity).cpu(),
        reference.connected_components(inside.cpu(), connectivity),
    )


@pytest.mark.gpu
@both_connectivities
@pytest.mark.parametrize("shape", SHAPES)
def test_the_cuda_kernel_at_full_size(shape: str, connectivity: int) -> None:
    # more blocks than run at once, and pixels whose root lies blocks away: what small masks cannot order wrongly
    on = torch.empty(0).device
    if _native.why_not_cuda(on):
        pytest.skip(_native.why_not_cuda(on))
    mask = np.stack([SHAPES[shape](701, 523, np.random.default_rng(seed)) for seed in range(4)])
    want = _by_scipy(mask, connectivity)
    for _ in range(3):
        assert np.array_equal(launch_cuda(_here(mask).to(torch.uint8), connectivity).cpu().numpy(), want)


@both_connectivities
@pytest.mark.parametrize("shape", SHAPES)
def test_hard_masks_of_a_real_size_are_right_too(shape: str, connectivity: int) -> None:
    mask = SHAPES[shape](301, 257, np.random.default_rng(0))[None]
    assert np.array_equal(
        uk.connected_components(_here(mask), connectivity=connectivity).cpu().numpy(), _by_scipy(mask, connectivity)
    )


def test_the_hard_masks_are_what_they_are_called() -> None:
    rng = np.random.default_rng(0)
    for name in ("snake", "spiral", "staircase comb"):
        assert ndimage.label(SHAPES[name](31, 33, rng))[1] == 1, name
    # long: a winding path fills about half of the image and has no pixel with three neighbours but where it ends
    for name in ("snake", "spiral"):
        mask = SHAPES[name](31, 33, rng)
        neighbours = ndimage.convolve(mask.astype(int), np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]]), mode="constant")
        assert (neighbours[mask] <= 2).all(), name
        assert mask.mean() > 0.45, name
    assert ndimage.label(SHAPES["checkerboard"](31, 33, rng))[1] == (31 * 33 + 1) // 2


@both_connectivities
@given(mask=masks(), ignored=st.integers(0, 2**32 - 1))
def test_what_is_negative_is_ignored_and_joins_nothing(mask: np.ndarray, ignored: int, connectivity: int) -> None:
    where = np.random.default_rng(ignored).random(mask.shape) < 0.2
    values = np.where(where, -3, np.where(mask, 7, 0))
    want = np.where(where, -1, _by_scipy(mask & ~where, connectivity))
    got = uk.connected_components(_here(values), connectivity=connectivity)
    assert np.array_equal(got.cpu().numpy(), want)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
        torch.uint16, torch.uint32, torch.uint64,
    ],
    ids=str,
)  # fmt: skip
@both_connectivities
def test_any_integer_dtype(dtype: torch.dtype, connectivity: int) -> None:
    mask = _blobs(9, 14, np.random.default_rng(3))[None]
    # of the wide ones a value that is negative if it is read as signed
    top = {torch.uint16: 2**16 - 1, torch.uint32: 2**32 - 1, torch.uint64: 2**64 - 1}.get(dtype, 1)
    values = mask * np.array(top, str(dtype).removeprefix("torch."))
    got = uk.connected_components(_here(values), connectivity=connectivity)
    assert np.array_equal(got.cpu().numpy(), _by_scipy(mask, connectivity))


@pytest.mark.parametrize("layout", ["transposed", "strided", "mirrored by a window", "expanded"])
@both_connectivities
def test_any_strides(layout: str, connectivity: int) -> None:
    mask = torch.rand(2, 7, 9) < 0.6
    odd = {
        "transposed": mask.transpose(1, 2),
        "strided": torch.rand(4, 15, 17)[::2, 1::2, ::3] < 0.6,
        "mirrored by a window": torch.nn.functional.pad(mask.int(), (2, 3, 1, 1))[:, 1:-1, 2:-3],
        "expanded": mask[:1, :1].expand(2, 7, 9),
    }[layout]
    got = uk.connected_components(odd, connectivity=connectivity)
    assert got.is_contiguous()
    assert np.array_equal(got.cpu().numpy(), _by_scipy(odd.cpu().numpy() > 0, connectivity))
    torch.library.opcheck(torch.ops.unet.connected_components.default, (odd, connectivity))


@given(mask=masks())
def test_slices_do_not_meet(mask: np.ndarray) -> None:
    together = uk.connected_components(_here(mask))
    for z in range(len(mask)):
        assert torch.equal(together[z : z + 1], uk.connected_components(_here(mask[z : z + 1])))


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 5, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64], ids=str)
def test_nothing_has_no_components(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    got = uk.connected_components(torch.zeros(shape, dtype=dtype))
    assert got.shape == shape
    assert got.dtype == torch.int32


@both_connectivities
def test_without_the_library_the_answer_is_the_same(connectivity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = _here(np.random.default_rng(1).integers(-1, 2, (3, 17, 23)))
    with_it = uk.connected_components(values, connectivity=connectivity)

    def missing() -> None:
        raise uk.NativeLibraryMissing("libunet_native was not built")

    monkeypatch.setattr(_native, "native", missing)
    monkeypatch.setattr(_native, "cuda", missing)
    for door in (_native.why_not, _native.why_not_cuda):
        door.cache_clear()
    try:
        lane, reason = uk.lane("connected_components", values.device)
        assert (lane, "the native library is missing" in reason) == ("torch", True)
        assert torch.equal(uk.connected_components(values, connectivity=connectivity), with_it)
    finally:
        for door in (_native.why_not, _native.why_not_cuda):
            door.cache_clear()


_M = torch.zeros(1, 4, 4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("mask", "settings", "error", "sentence"),
    [
        ([[1]], {}, TypeError, r"mask must be a torch.Tensor \[N, H, W\], got list"),
        (_M.float(), {}, TypeError, "mask must be boolean or an integer tensor, got float32"),
        (_M[0], {}, ValueError, r"mask must be 3-D \[N, H, W\], got 2-D \[4, 4\]"),
        (_M, {"connectivity": 6}, ValueError, "connectivity must be 4 or 8, got 6"),
        (_M, {"connectivity": 8.0}, ValueError, "connectivity must be 4 or 8, got 8.0"),
        (_M, {"connectivity": True}, ValueError, "connectivity must be 4 or 8, got True"),
        # 2^31 pixels, and no memory for one
        (
            torch.zeros(1, 1, 1, dtype=torch.bool).expand(1, 2**16, 2**15),
            {},
            ValueError,
            r"mask must have less than 2\^31 pixels a slice, got \[1, 65536, 32768\]",
        ),
    ],
)
def test_bad_input_is_refused_in_a_sentence(mask: Any, settings: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence) as refusal:
        uk.connected_components(mask, **settings)
    assert "\n" not in str(refusal.value)
