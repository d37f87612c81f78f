"""max_pool2x2: torch's own, ties and NaN included, but for what it keeps."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import unet_kernels as uk
from tests.proof.memory import LAYOUTS, awkward, guarded_launch
from tests.proof.order import assert_order_does_not_matter
from tests.proof.properties import given, st
from tests.proof.yardstick import assert_same_bits
from unet_kernels import _checks, _layout, _triton, reference
from unet_kernels.max_pool2x2 import launch_max_pool2x2_dx, launch_max_pool2x2_fwd

pytestmark = pytest.mark.usefixtures("on_device")

DOORS = pytest.mark.parametrize("through_the_op", [False, True], ids=["door", "op"])


@pytest.fixture
def door(through_the_op: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if through_the_op:
        monkeypatch.setattr(_checks, "ordinary_on_cpu", lambda tensor: False)


def _with_gradient(pool: Any, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = pool(x)
    return y, torch.autograd.grad(y, x, dy)[0]


def _assert_is_torchs(x: Tensor) -> None:
    dy = torch.randn(x.shape[0], x.shape[1], x.shape[2] // 2, x.shape[3] // 2).to(x.device, x.dtype)
    ours, wanted = _with_gradient(uk.max_pool2x2, x, dy), _with_gradient(lambda x: F.max_pool2d(x, 2), x, dy)
    for mine, theirs in zip(ours, wanted, strict=True):
        assert mine.stride() == theirs.stride()
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


# 0 and 1 are ties, 2 stands for NaN, 3 for infinity
@DOORS
@given(values=st.lists(st.integers(0, 3), min_size=30, max_size=30), rows=st.sampled_from([2, 3, 5, 6]))
@pytest.mark.usefixtures("door")
def test_ties_and_what_is_no_number_go_where_torch_sends_them(through_the_op: bool, values, rows: int) -> None:
    special = torch.tensor([0.0, 1.0, float("nan"), float("inf")])
    _assert_is_torchs(special[torch.tensor(values)].reshape(1, 1, -1, rows)[:, :, : 30 // rows])


@DOORS
@pytest.mark.usefixtures("door")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_and_dtypes(layout: str, dtype: torch.dtype, through_the_op: bool, device: torch.device) -> None:
    for shape in ((2, 3, 8, 6), (1, 1, 2, 2), (1, 5, 7, 9)):
        _assert_is_torchs(awkward(torch.randn(shape).to(device, dtype), layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_large_map_is_pooled_without_indices_and_the_same(layout: str) -> None:
    x = torch.randn(2, 5, 121, 120)
    x[0, 0, 0, :3], x[1, 4, 60:63, 7] = torch.tensor([1.0, 1.0, torch.nan]), torch.tensor([torch.inf, -torch.inf, 0.0])
    assert x.numel() > 1 << 17
    _assert_is_torchs(awkward(x, layout))
    with mock.patch.object(reference, "max_pool2x2", side_effect=AssertionError):
        uk.max_pool2x2(x)


@DOORS
@pytest.mark.usefixtures("door")
def test_only_the_input_is_kept(through_the_op: bool) -> None:
    kept: list[Tensor] = []
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        uk.max_pool2x2(x)
    assert [(t.data_ptr(), t.dtype) for t in kept] == [(x.data_ptr(), x.dtype)]


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_kernel_is_torchs_bit_for_bit(layout: str, dtype: torch.dtype, device: torch.device) -> None:
    if _triton.INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter compares bfloat16 as whole numbers")
    for shape in ((2, 3, 8, 6), (1, 1, 2, 2), (1, 130, 7, 9), (1, 8, 3, 40)):
        x = awkward(torch.randn(shape).to(device, dtype), layout)
        # equal, and no numbers
        x[0, 0, 0, :2] = 1.0
        x[-1, -1, :2, 1] = torch.tensor([torch.nan, torch.inf], dtype=dtype)
        got = guarded_launch(launch_max_pool2x2_fwd, x)
        assert_same_bits(got, F.max_pool2d(x, 2))
        assert got.stride() == F.max_pool2d(x, 2).stride()


@pytest.mark.interpreter
def test_the_order_of_programs_does_not_matter(device: torch.device) -> None:
    x = awkward(torch.randn(1, 16, 20, 12, device=device), "channels_last")
    assert_order_does_not_matter(lambda: guarded_launch(launch_max_pool2x2_fwd, x, values=256))


@pytest.mark.interpreter
@pytest.mark.parametrize("axis", range(4), ids="NCHW")
def test_addresses_beyond_two_to_the_31(axis: int, device: torch.device) -> None:
    shape, stride = [1, 1, 2, 2], [1, 1, 2, 1]
    shape[axis], stride[axis] = 2, 2**31 + 64
    stride[3 if axis != 3 else 2] = 1
    x = torch.empty(2**31 + 256, dtype=torch.float16, device=device).as_strided(shape, stride)
    x.copy_(torch.randn(shape, device=device))
    assert_same_bits(launch_max_pool2x2_fwd(x), F.max_pool2d(x, 2))


@pytest.mark.slow
@pytest.mark.parametrize("channels", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_compiled_code_is_within_budget(channels: int) -> None:
    from importlib import import_module

    from tests.proof import aot

    x = torch.empty(1, channels, 568, 568, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
    module = import_module("unet_kernels.max_pool2x2")
    for values in (4096, 2048):
        [launch] = aot.recorded(module, "_fwd_kernel", lambda v=values: launch_max_pool2x2_fwd(x, v))
        for chip in aot.ELEMENTWISE_CHIPS:
            aot.Budget(registers=128, shared_bytes=0, must_have=(r"LDG\.E\.128", r"STG\.E\.128")).check(
                aot.compiled(launch, chip)
            )


@pytest.mark.parametrize(
    ("x", "error", "sentence"),
    [
        (torch.zeros(1, 1, 1, 4), ValueError, r"^x must have at least two rows and two columns, got 1x4$"),
        (torch.zeros(1, 4, 4), ValueError, r"^x must be 4-D \[N, C, H, W\], got 3-D \[1, 4, 4\]$"),
        (torch.zeros(1, 1, 4, 4, dtype=torch.int32), TypeError, r"^x must be floating"),
        ([[1.0]], TypeError, r"^x must be a torch.Tensor \[N, C, H, W\], got list$"),
    ],
    ids=["small", "rank", "integers", "list"],
)
def test_bad_input_is_refused_in_a_sentence(x: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        uk.max_pool2x2(x)


# the window and the maxima of one map


def _both(x: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    return reference.crop_to(x, rows, columns), F.max_pool2d(x, 2)


def _dx(call: Any, x: Tensor, gradients: tuple[Tensor, Tensor]) -> Tensor:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    (dx,) = torch.autograd.grad(call(x), x, gradients)
    return dx


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("size", "mask", "dtype"),
    [
        ((2, 9, 11), True, torch.float32),
        ((1, 8, 6), False, torch.float32),
        ((2, 9, 11), False, torch.float16),
        ((1, 2, 3), True, torch.float16),
    ],
    ids=str,
)
def test_one_pass_adds_up_what_window_and_maxima_hand_back(
    dtype: torch.dtype, size: tuple[int, int, int], mask: bool, layout: str
) -> None:
    # whole numbers: half of all windows hold a tie
    x = awkward(torch.randint(-2, 3, (size[0], 13, *size[1:])).relu().to(dtype), layout)
    rows, columns = max(1, size[1] - 3), max(1, size[2] - 4)
    gradients = tuple(awkward(torch.randn(t.shape).to(dtype), layout) for t in _both(x, rows, columns))
    want = _dx(lambda t: _both(t, rows, columns), x, gradients)
    want = torch.where(x <= 0, 0, want) if mask else want
    dwindow, dpooled = gradients
    got = guarded_launch(lambda a, b, c: launch_max_pool2x2_dx(a, b, c, mask), dpooled, x, dwindow)
    torch.testing.assert_close(got, want, rtol=0, atol=torch.finfo(dtype).eps * 4)
    alone = guarded_launch(lambda a, b: launch_max_pool2x2_dx(a, b, None, mask), dpooled, x)
    want = _dx(lambda t: F.max_pool2d(t, 2), x, (dpooled,))
    assert_same_bits(alone, torch.where(x <= 0, 0, want).contiguous(memory_format=_layout.of(x)) if mask else want)


@pytest.mark.interpreter
def test_the_gradient_of_a_maximum_goes_where_torchs_goes_with_nan_too() -> None:
    x = torch.randint(0, 3, (1, 16, 12, 12)).float().contiguous(memory_format=torch.channels_last)
    x[torch.rand(x.shape) < 0.1] = torch.nan
    dpooled = torch.randn(1, 16, 6, 6)
    got = launch_max_pool2x2_dx(dpooled, x, None, True)
    want = _dx(lambda t: F.max_pool2d(t, 2), x, (dpooled,))
    assert_same_bits(got, torch.where(x <= 0, 0, want).contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_window_and_pool_are_the_two_by_themselves(layout: str, mask: bool) -> None:
    x = awkward(torch.randint(-2, 3, (2, 5, 9, 10)).relu().double(), layout)
    want, got = _both(x, 5, 4), uk.window_and_pool(x, rows=5, columns=4)
    for a, b in zip(want, got, strict=True):
        assert_same_bits(a, b)
    assert got[0].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    gradients = tuple(torch.randn_like(t) for t in want)
    expected = _dx(lambda t: _both(t, 5, 4), x, gradients)
    expected = torch.where(x <= 0, 0, expected) if mask else expected
    call = lambda t: uk.window_and_pool(t, rows=5, columns=4, mask_dx=mask)  # noqa: E731
    torch.testing.assert_close(_dx(call, x, gradients), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("read", [0, 1], ids=["window", "maxima"])
def test_what_nobody_reads_has_no_gradient(read: int) -> None:
    x = torch.randn(1, 3, 6, 7, dtype=torch.float64)
    pair = [f(x.clone().requires_grad_()) for f in (lambda t: t, lambda t: t)]
    results = _both(pair[0], 3, 3), uk.window_and_pool(pair[1], rows=3, columns=3)
    grads = [torch.autograd.grad(r[read].square().sum(), t)[0] for r, t in zip(results, pair, strict=True)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("rows", "columns", "sentence"),
    [(0, 2, "rows must be between 1 and those of x, 6, got 0"), (2, 8, "columns must be between 1 .* 7, got 8")],
)
def test_a_window_larger_than_the_map_is_refused(rows: int, columns: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        uk.window_and_pool(torch.zeros(1, 1, 6, 7), rows=rows, columns=columns)
