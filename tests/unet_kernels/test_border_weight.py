"""two_nearest_cells, cut_gap, border_weight: exact against one scipy transform per cell; the bugs others published."""

import importlib
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

import unet_kernels as uk
from tests.proof.allocations import allocated
from tests.proof.memory import guarded_launch
from tests.proof.order import assert_order_does_not_matter
from tests.proof.properties import given, settings, st
from tests.proof.yardstick import assert_same_bits
from unet_kernels import _native, reference
from unet_kernels.border_weight import (
    LARGEST,
    launch_border_sum_cpu,
    launch_border_weight_fwd,
    launch_cut_gap_fwd,
    launch_two_nearest_cells_cpu,
    launch_two_nearest_cells_fwd,
)

pytestmark = pytest.mark.usefixtures("on_device")


def _labels(instances: np.ndarray) -> Tensor:
    """[1, H, W], where the test makes its tensors."""
    return torch.from_numpy(instances)[None].to(torch.empty(0).device)


def _by_scipy(instances: np.ndarray) -> np.ndarray:
    """Squared distances [2, H, W] to the nearest and second-nearest cell, integer-exact; a huge number for none."""
    ids = np.unique(instances[instances > 0])
    maps = [np.full(instances.shape, 10**9)] * 2
    for cell in ids:
        _, (y, x) = distance_transform_edt(instances != cell, return_indices=True)
        rows, columns = np.indices(instances.shape)
        maps.append((rows - y) ** 2 + (columns - x) ** 2)
    return np.sort(np.stack(maps), axis=0)[:2]


@st.composite
def label_maps(draw: Any) -> np.ndarray:
    h, w = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if draw(st.booleans()):
        # noise: many ids, cells in pieces, gaps in the numbering, ignored pixels
        return rng.choice([0, 0, 0, -1, 3, 4, 70000, 2**31 - 1][: draw(st.integers(1, 8))], size=(h, w))
    instances = np.zeros((h, w), np.int64)
    for cell in range(draw(st.integers(0, 12))):
        y, x, r = rng.integers(h), rng.integers(w), rng.integers(1, 6)
        rows, columns = np.indices((h, w))
        instances[(rows - y) ** 2 + (columns - x) ** 2 < r * r] = cell + 1
    return instances


@settings(max_examples=300)
@given(instances=label_maps())
def test_distances_are_integer_exact(instances: np.ndarray) -> None:
    want = _by_scipy(instances)
    got = np.stack([d[0].double().cpu().numpy() for d in uk.two_nearest_cells(_labels(instances))])
    absent = want >= 10**9
    assert np.array_equal(np.isinf(got), absent)
    assert np.array_equal(np.rint(got[~absent] ** 2).astype(np.int64), want[~absent])
    assert np.array_equal(got[~absent].astype(np.float32), np.sqrt(want[~absent]).astype(np.float32))


@given(instances=label_maps(), radius=st.floats(0, 12))
def test_a_radius_only_hides_what_is_further(instances: np.ndarray, radius: float) -> None:
    labels = _labels(instances)
    for free, bounded in zip(
        uk.two_nearest_cells(labels), uk.two_nearest_cells(labels, max_radius=radius), strict=True
    ):
        assert torch.equal(bounded, torch.where(free.double() ** 2 <= radius**2 + 1e-9, free, torch.inf))


@given(instances=label_maps())
def test_images_of_a_batch_do_not_meet(instances: np.ndarray) -> None:
    one = _labels(instances)
    both = torch.cat([one, one.flip(2)])
    for alone, together in zip(uk.two_nearest_cells(one), uk.two_nearest_cells(both), strict=True):
        assert torch.equal(together[:1], alone)
        assert torch.equal(together[1:].flip(2), alone)


@given(instances=label_maps(), radius=st.sampled_from([None, 0.0, 1.0, 2**0.5, 3.0, 31.0]), copies=st.integers(1, 3))
def test_the_cpp_kernel_has_the_bits_of_the_reference(instances: np.ndarray, radius: float | None, copies: int) -> None:
    if _native.why_not(torch.device("cpu")):
        pytest.skip(_native.why_not(torch.device("cpu")))
    ids = torch.from_numpy(instances.astype(np.int32))[None].repeat(copies, 1, 1)
    ids[1:] = ids[1:].flip(2)
    with torch.device("cpu"):
        got, want = launch_two_nearest_cells_cpu(ids, radius), reference.two_nearest_cells(ids, radius)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, want, strict=True))


@given(instances=label_maps(), limit=st.sampled_from([0.0, 1.0, 2.0, 5.0, 12.0, 39.0, 1e9]), copies=st.integers(1, 3))
def test_the_cpp_sums_have_the_bits_of_the_reference(instances: np.ndarray, limit: float, copies: int) -> None:
    if _native.why_not(torch.device("cpu")):
        pytest.skip(_native.why_not(torch.device("cpu")))
    ids = torch.from_numpy(instances.astype(np.int32))[None].repeat(copies, 1, 1)
    ids[1:] = ids[1:].flip(2)
    with torch.device("cpu"):
        for everywhere in (False, True):
            for gap in (False, True):
                got = launch_border_sum_cpu(ids, limit, everywhere, gap)
                assert torch.equal(got, reference.border_sum(ids, limit, everywhere, gap))


def test_memory_does_not_grow_with_the_number_of_cells() -> None:
    def peak(cells: int) -> int:
        instances = torch.arange(64 * 64).view(1, 64, 64) % (cells + 1)
        return allocated(lambda: uk.two_nearest_cells(instances)).peak

    assert peak(2000) <= 1.1 * peak(20)


def _gap_by_hand(instances: np.ndarray) -> np.ndarray:
    out = instances.copy()
    h, w = instances.shape
    for y in range(h):
        for x in range(w):
            for ny, nx in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                inside = 0 <= ny < h and 0 <= nx < w
                if inside and instances[y, x] > 0 and 0 < instances[ny, nx] != instances[y, x]:
                    out[y, x] = 0
    return out


@given(instances=label_maps())
def test_the_gap_is_where_two_cells_touch(instances: np.ndarray) -> None:
    got = uk.cut_gap(_labels(instances))
    assert got.dtype == torch.int64
    assert np.array_equal(got[0].cpu().numpy(), _gap_by_hand(instances))


@given(instances=label_maps())
def test_the_gap_commutes_with_mirrors(instances: np.ndarray) -> None:
    labels = _labels(instances)
    for axes in ((1,), (2,), (1, 2)):
        assert torch.equal(uk.cut_gap(labels.flip(axes)), uk.cut_gap(labels).flip(axes))


@pytest.mark.parametrize("gap", [True, False])
@pytest.mark.parametrize("region", ["background", "all"])
@given(instances=label_maps())
def test_equals_equation_two(instances: np.ndarray, region: str, gap: bool) -> None:
    w0, sigma, of_background, of_cell = 7.0, 3.0, 0.6, 1.7
    cut = _gap_by_hand(instances) if gap else instances
    d1, d2 = np.sqrt(_by_scipy(instances).astype(np.float64))
    term = np.where(_by_scipy(instances)[1] >= 10**9, 0, w0 * np.exp(-((d1 + d2) ** 2) / (2 * sigma**2)))
    term = np.where((cut == 0) | (region == "all"), term, 0)
    want = np.where(instances < 0, 0, np.where(cut == 0, of_background, of_cell) + term)
    got = uk.border_weight(
        _labels(instances),
        w0=w0, sigma_px=sigma, class_weight=(of_background, of_cell), region=region, gap=gap,
    )  # fmt: skip
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got[0].cpu().numpy(), want, rtol=1e-6, atol=1e-6)


def _two_squares(distance: int) -> Tensor:
    instances = torch.zeros(1, 12, 16 + distance, dtype=torch.int32)
    instances[:, 2:10, :8] = 1
    instances[:, 2:10, 8 + distance :] = 2
    return instances


def test_a_lone_cell_gets_no_halo() -> None:
    instances = torch.zeros(1, 20, 20, dtype=torch.int32)
    instances[:, 8:12, 8:12] = 5
    assert torch.equal(uk.border_weight(instances), torch.ones(1, 20, 20))


def test_no_cell_gives_the_background_weight() -> None:
    weight = uk.border_weight(torch.zeros(1, 5, 5, dtype=torch.int32), class_weight=(0.25, 3.0))
    assert torch.equal(weight, torch.full((1, 5, 5), 0.25))


def test_the_last_cell_counts() -> None:
    assert uk.border_weight(_two_squares(2))[0, 5, 8] > 5


def test_touching_cells_are_not_merged_and_the_gap_is_background() -> None:
    instances = _two_squares(0)
    weight, cut = uk.border_weight(instances, class_weight=(0.5, 2.0)), uk.cut_gap(instances)
    # the gap: d1 = 0 (the uncut cell), d2 = 1
    assert (cut[0, 5, 6:10] > 0).tolist() == [True, False, False, True]
    assert weight[0, 5, 7].item() == pytest.approx(0.5 + 10 * np.exp(-1 / 50))
    assert weight[0, 5, 6].item() == pytest.approx(2.0)


def test_ignored_pixels_weigh_nothing_and_are_no_cell() -> None:
    instances = _two_squares(4)
    instances[:, :, 9] = -7
    weight = uk.border_weight(instances)
    assert (weight[:, :, 9] == 0).all()
    assert torch.equal(uk.two_nearest_cells(instances)[0], uk.two_nearest_cells(_two_squares(4))[0])


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int16, torch.uint16, torch.int64, torch.uint32, torch.uint64], ids=str
)
def test_any_integer_dtype(dtype: torch.dtype) -> None:
    instances = _two_squares(1)
    assert torch.equal(uk.border_weight(instances.to(dtype)), uk.border_weight(instances))
    assert uk.cut_gap(instances.to(dtype)).dtype == dtype


_I = torch.zeros(1, 4, 4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("instances", "settings", "error", "sentence"),
    [
        (_I.float(), {}, TypeError, "instances must be an integer tensor, got float32; ids are whole numbers"),
        (_I > 0, {}, TypeError, "instances must be an integer tensor, got bool"),
        (_I[0], {}, ValueError, r"instances must be 3-D \[N, H, W\], got 2-D \[4, 4\]"),
        (_I.long() + 2**31, {}, ValueError, "instances must hold ids that fit 32 bits, got 2147483648; renumber"),
        (_I.long() - 2**31 - 1, {}, ValueError, "instances must hold ids that fit 32 bits, got -2147483649; renumber"),
        (
            (_I.long() + 2**31).to(torch.uint32),
            {},
            ValueError,
            "instances must hold ids that fit 32 bits, got 2147483648",
        ),
        (
            torch.from_numpy(np.full((1, 2, 2), 2**64 - 1, np.uint64)),
            {},
            ValueError,
            "instances must hold ids that fit 32 bits, got 18446744073709551615",
        ),
        (_I, {"w0": 10**400}, ValueError, "w0 must be at least 0 and finite, got 1000"),
        (_I, {"w0": -1.0}, ValueError, "w0 must be at least 0 and finite, got -1.0"),
        (_I, {"sigma_px": 0.0}, ValueError, "sigma_px must be above 0 and finite, got 0.0"),
        (_I, {"sigma_px": float("nan")}, ValueError, "sigma_px must be above 0 and finite, got nan"),
        (_I, {"region": "cells"}, ValueError, "region must be 'background' or 'all', got 'cells'"),
        (_I, {"class_weight": (1.0,)}, ValueError, r"class_weight must be a pair \(background, cell\), got \(1.0,\)"),
        (_I, {"class_weight": 2.0}, ValueError, r"class_weight must be a pair \(background, cell\), got 2.0"),
        (_I, {"class_weight": (1.0, -2.0)}, ValueError, "class_weight of cell must be at least 0 and finite, got -2.0"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(
    instances: Tensor, settings: Any, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        uk.border_weight(instances, **settings)


def test_extreme_settings_are_numbers_like_others() -> None:
    instances = _two_squares(2)
    assert torch.equal(uk.border_weight(instances, sigma_px=1e200), uk.border_weight(instances, sigma_px=1e30))
    far = uk.two_nearest_cells(instances, max_radius=1e200)
    assert all(torch.equal(a, b) for a, b in zip(far, uk.two_nearest_cells(instances), strict=True))
    assert torch.equal(uk.border_weight(instances, w0=np.float32(10)), uk.border_weight(instances))


@pytest.mark.parametrize("layout", ["transposed", "window", "expanded"])
def test_any_strides(layout: str) -> None:
    instances = torch.randint(0, 4, (2, 7, 9), dtype=torch.int32)
    odd = {
        "transposed": instances.transpose(1, 2).contiguous().transpose(1, 2),
        "window": torch.nn.functional.pad(instances, (2, 3, 1, 1))[:, 1:-1, 2:-3],
        "expanded": instances[:1].expand(2, 7, 9),
    }[layout]
    for call in (uk.two_nearest_cells, uk.cut_gap, uk.border_weight):
        got, want = call(odd), call(odd.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for op, rest in ((torch.ops.unet.two_nearest_cells, (None,)), (torch.ops.unet.cut_gap, ())):
        torch.library.opcheck(op.default, (odd, *rest))
    torch.library.opcheck(torch.ops.unet.instance_ids.default, (odd.long(),))
    torch.library.opcheck(torch.ops.unet.instance_ids.default, (odd,))


def test_a_negative_radius_is_refused() -> None:
    with pytest.raises(ValueError, match="max_radius must be at least 0 and finite, got -1"):
        uk.two_nearest_cells(_I, max_radius=-1)


# ---- the Triton kernels: the bits of the specification


def _module() -> ModuleType:
    # the kernels' place in the package is shadowed by the function of the same name
    return importlib.import_module("unet_kernels.border_weight")


def _discs(n: int, h: int, w: int, cells: int, seed: int = 0) -> Tensor:
    """Overlapping discs, ids with gaps, some pixels ignored: int32 [N, H, W]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:h, :w]
    maps = np.zeros((n, h, w), np.int32)
    for ids in maps:
        for cell in rng.permutation(3 * cells)[:cells] + 1:
            row, column, radius = rng.uniform(0, h), rng.uniform(0, w), rng.uniform(1, 0.2 * max(h, w) + 1)
            ids[(y - row) ** 2 + (x - column) ** 2 < radius**2] = cell
        ids[rng.random((h, w)) < 0.02] = -1
    return torch.from_numpy(maps)


# N, H, W, cells: of one segment and of several, of one block and of several; rows and columns that end anywhere
MAPS = {
    "one pixel": (1, 1, 1, 1),
    "one row": (1, 1, 70, 3),
    "one column": (1, 37, 1, 4),
    "three segments": (1, 34, 10, 5),
    "three blocks": (1, 3, 150, 4),
    "a whole segment": (1, 16, 64, 6),
    "no cell": (1, 18, 9, 0),
    "a lone cell": (1, 19, 9, 1),
    "two cells": (1, 19, 9, 2),
    "a batch": (3, 5, 7, 4),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("radius", [None, 6.5])
@pytest.mark.parametrize("case", MAPS)
def test_the_triton_kernels_have_the_bits_of_the_reference(
    case: str, radius: float | None, device: torch.device
) -> None:
    instances = _discs(*MAPS[case]).to(device)
    got = guarded_launch(launch_two_nearest_cells_fwd, instances, radius)
    for ours, theirs in zip(got, reference.two_nearest_cells(instances, radius), strict=True):
        assert_same_bits(ours, theirs)
    assert_same_bits(guarded_launch(launch_cut_gap_fwd, instances), reference.cut_gap(instances))


@pytest.mark.slow
@pytest.mark.interpreter
@settings(derandomize=True, database=None, deadline=None, max_examples=12)
@given(instances=label_maps(), radius=st.sampled_from([None, 0.0, 1.0, 2**0.5, 3.0, 31.0]))
def test_random_maps_too(instances: np.ndarray, radius: float | None) -> None:
    ids = _labels(instances).to(torch.int32)
    got = launch_two_nearest_cells_fwd(ids, radius)
    for ours, theirs in zip(got, reference.two_nearest_cells(ids, radius), strict=True):
        assert_same_bits(ours, theirs)
    assert_same_bits(launch_cut_gap_fwd(ids), reference.cut_gap(ids))


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.parametrize("gap", [True, False])
@pytest.mark.parametrize("region", ["background", "all"])
@pytest.mark.parametrize("case", ["two cells", "a batch", "three blocks"])
def test_the_weight_is_made_in_the_same_pass(case: str, region: str, gap: bool, device: torch.device) -> None:
    instances = _discs(*MAPS[case], seed=1).to(device)
    for w0, sigma, pair in ((10.0, 5.0, None), (0.0, 5.0, (0.5, 2.0)), (7.0, 1.5, (0.25, 0.0))):
        rest = (w0, sigma, pair, region, gap)
        got = guarded_launch(launch_border_weight_fwd, instances, *rest)
        torch.testing.assert_close(got, reference.border_weight(instances, *rest), rtol=2e-6, atol=2e-6)


@pytest.mark.slow
@pytest.mark.interpreter
def test_bands_of_rows_join_to_the_whole(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    instances = _discs(2, 35, 6, 7).to(device)
    want = reference.two_nearest_cells(instances)
    # bands of one segment and of two
    for most in (1, 16 * 2 * 6 * 33):
        monkeypatch.setattr(_module(), "BAND_BYTES", most)
        for ours, theirs in zip(guarded_launch(launch_two_nearest_cells_fwd, instances, None), want, strict=True):
            assert_same_bits(ours, theirs)


@pytest.mark.slow
@pytest.mark.interpreter
def test_longer_segments_find_the_same(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    instances = _discs(1, 66, 4, 5).to(device)
    want = reference.two_nearest_cells(instances)
    monkeypatch.setattr(_module(), "segment_rows", lambda H: 64)
    for ours, theirs in zip(guarded_launch(launch_two_nearest_cells_fwd, instances, None), want, strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.slow
@pytest.mark.interpreter
def test_the_order_of_programs_does_not_matter(device: torch.device) -> None:
    instances = _discs(1, 18, 66, 5).to(device)
    assert_order_does_not_matter(lambda: torch.stack(launch_two_nearest_cells_fwd(instances, 5.0)), seeds=1)


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", ["transposed", "window", "expanded"])
def test_the_kernels_take_any_strides(layout: str, device: torch.device) -> None:
    instances = _discs(2, 9, 11, 3).to(device)
    odd = {
        "transposed": instances.transpose(1, 2).contiguous().transpose(1, 2),
        "window": torch.nn.functional.pad(instances, (2, 3, 1, 1))[:, 1:-1, 2:-3],
        "expanded": instances[:1].expand(2, 9, 11),
    }[layout]
    for ours, theirs in zip(launch_two_nearest_cells_fwd(odd, None), reference.two_nearest_cells(odd), strict=True):
        assert_same_bits(ours, theirs)
    assert_same_bits(launch_cut_gap_fwd(odd), reference.cut_gap(odd.contiguous()))


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", [(0, 5, 5), (1, 0, 5), (1, 5, 0)])
def test_an_empty_map_launches_nothing(shape: tuple[int, ...], device: torch.device) -> None:
    instances = torch.empty(shape, dtype=torch.int32, device=device)
    assert [d.shape for d in launch_two_nearest_cells_fwd(instances, None)] == [shape, shape]
    assert launch_border_weight_fwd(instances, 10.0, 5.0, None, "all", True).shape == shape
    assert launch_cut_gap_fwd(instances).shape == shape


def test_what_the_kernels_cannot_take_is_left_to_the_reference() -> None:
    module = _module()
    assert "do not fit 32 bits" in module.why_not(torch.empty(1, LARGEST + 1, 2, device="meta"))
    assert "do not fit 32 bits" in module.why_not(torch.empty(1, 2, LARGEST + 1, device="meta"))
    # the largest squared distance, and the first that is none
    assert 2 * (LARGEST - 1) ** 2 < module.FAR < 2 * (LARGEST + 1) ** 2


KERNELS: dict[str, tuple[str, int]] = {
    "two_nearest_cells": ("_segments_kernel _columns_kernel _rows_kernel", 96),
    "border_weight": ("_segments_kernel _columns_kernel _rows_kernel", 96),
    "cut_gap": ("_cut_gap_kernel", 40),
}


@pytest.mark.parametrize("side", [572, pytest.param(16384, marks=pytest.mark.slow)])
@pytest.mark.parametrize("op", KERNELS)
def test_compiled_code_is_within_budget(op: str, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.proof import aot

    module = _module()
    names, registers = KERNELS[op]
    instances = torch.empty(1, side, side, dtype=torch.int32, device="meta")
    call = {
        "two_nearest_cells": lambda: launch_two_nearest_cells_fwd(instances, None),
        "border_weight": lambda: launch_border_weight_fwd(instances, 10.0, 5.0, None, "background", True),
        "cut_gap": lambda: launch_cut_gap_fwd(instances),
    }[op]
    launches = []
    for name in names.split():
        with monkeypatch.context() as patch:
            for other in {"_segments_kernel", "_columns_kernel", "_rows_kernel", "_cut_gap_kernel"} - {name}:
                patch.setattr(module, other, _Unlaunched())
            launches.append(aot.recorded(module, name, call)[0])
    for launch in launches:
        for chip in aot.ELEMENTWISE_CHIPS:
            aot.Budget(registers=registers, shared_bytes=2048).check(aot.compiled(launch, chip))


class _Unlaunched:
    """A kernel that does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: None


@pytest.mark.interpreter
def test_on_cuda_the_ops_take_the_kernels_and_otherwise_say_why_not(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = _module()
    instances = _discs(1, 12, 14, 3).to(device)
    for refusal in ("", "too old"):
        monkeypatch.setattr("unet_kernels._triton.why_not", lambda device, dtype=None, refusal=refusal: refusal)
        for ours, theirs in zip(
            module._two_nearest_cuda(instances, None), reference.two_nearest_cells(instances), strict=True
        ):
            assert_same_bits(ours, theirs)
        assert_same_bits(module._cut_gap_cuda(instances), reference.cut_gap(instances))
        rest = (10.0, 5.0, None, "background", True)
        torch.testing.assert_close(
            module._border_weight_cuda(instances, *rest), reference.border_weight(instances, *rest)
        )
