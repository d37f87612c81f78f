"""crop_concat: the Triton kernel is the reference bit for bit, in ATen's strides, and compiles to wide copies."""

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import unet_kernels as uk
from tests.proof.memory import LAYOUTS, awkward, guarded_launch
from tests.proof.order import assert_order_does_not_matter
from tests.proof.properties import given, st
from tests.proof.yardstick import assert_same_bits
from unet_kernels import _layout, reference
from unet_kernels.crop_concat import launch_crop_concat_fwd

# N, C_up, C_skip, H, W, H_skip, W_skip
CASES = {
    "one pixel": (1, 1, 1, 1, 1, 1, 1),
    "no margin": (2, 3, 5, 4, 6, 4, 6),
    "odd margins": (1, 5, 3, 4, 3, 7, 8),
    "prime channels, two blocks": (1, 131, 7, 2, 5, 4, 5),
    "a real level, narrow": (1, 64, 64, 6, 40, 14, 48),
    "no channels in skip": (1, 4, 0, 2, 3, 2, 3),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _maps(case: str, dtype: torch.dtype, device: Any = "cpu") -> tuple[Tensor, Tensor]:
    n, c_up, c_skip, h, w, h_skip, w_skip = CASES[case]
    up, skip = torch.randn(n, c_up, h, w), torch.randn(n, c_skip, h_skip, w_skip)
    return up.to(device, dtype), skip.to(device, dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_is_the_reference_bit_for_bit(
    case: str, layout: str, dtype: torch.dtype, device: torch.device
) -> None:
    up, skip = (awkward(t, layout) for t in _maps(case, dtype, device))
    want = reference.crop_concat(up, skip)
    got = guarded_launch(launch_crop_concat_fwd, up, skip)
    assert_same_bits(got, want)
    assert got.stride() == want.stride()


@pytest.mark.interpreter
def test_maps_in_different_formats_are_joined_as_torch_joins_them(device: torch.device) -> None:
    up, skip = _maps("odd margins", torch.float32, device)
    for a, b in (("contiguous", "channels_last"), ("channels_last", "contiguous")):
        first, second = awkward(up, a), awkward(skip, b)
        got = guarded_launch(launch_crop_concat_fwd, first, second)
        assert_same_bits(got, reference.crop_concat(first, second))


@pytest.mark.interpreter
def test_nan_and_infinity_arrive(device: torch.device) -> None:
    up, skip = _maps("odd margins", torch.float32, device)
    up[0, 0, 0, 0], up[0, 1, 1, 1], skip[0, 0, 3, 3] = torch.nan, torch.inf, -torch.inf
    assert_same_bits(guarded_launch(launch_crop_concat_fwd, up, skip), reference.crop_concat(up, skip))


@pytest.mark.interpreter
def test_an_empty_batch_launches_nothing(device: torch.device) -> None:
    y = launch_crop_concat_fwd(torch.empty(0, 2, 3, 3, device=device), torch.empty(0, 4, 5, 5, device=device))
    assert y.shape == (0, 6, 3, 3)


@pytest.mark.interpreter
def test_the_order_of_programs_does_not_matter(device: torch.device) -> None:
    up, skip = _maps("prime channels, two blocks", torch.float32, device)
    assert_order_does_not_matter(lambda: guarded_launch(launch_crop_concat_fwd, up, skip))


@pytest.mark.interpreter
@pytest.mark.parametrize("axis", range(4), ids="NCHW")
def test_addresses_beyond_two_to_the_31(axis: int, device: torch.device) -> None:
    # two values more than 2^31 elements apart; the pages in between are never touched
    stride = [1, 1, 1, 1]
    stride[axis] = 2**31 + 64
    shape = [1, 1, 1, 1]
    shape[axis] = 2
    skip = torch.empty(2**31 + 128, dtype=torch.float16, device=device).as_strided(shape, stride)
    skip.copy_(torch.tensor([1.5, -2.5], dtype=torch.float16, device=device).view(shape))
    up = torch.zeros([2 if a == axis and a != 1 else 1 for a in range(4)], dtype=torch.float16, device=device)
    assert_same_bits(launch_crop_concat_fwd(up, skip), reference.crop_concat(up, skip))


# the kernel's place in the package is shadowed by the function of the same name
def _module() -> ModuleType:
    import importlib

    return importlib.import_module("unet_kernels.crop_concat")


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_compiled_code_is_within_budget(level: int, dtype: torch.dtype, channels_last: bool) -> None:
    from tests.proof import aot

    # from level 1 down the same code runs: sizes are arguments, and 128 channels fill a block
    c, side, skip_side = ((64, 392, 568), (128, 200, 280))[level]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    up = torch.empty(1, c, side, side, dtype=dtype, device="meta").contiguous(memory_format=layout)
    skip = torch.empty(1, c, skip_side, skip_side, dtype=dtype, device="meta").contiguous(memory_format=layout)
    [launch] = aot.recorded(_module(), "_fwd_kernel", lambda: launch_crop_concat_fwd(up, skip))
    # all that moves is moved 16 bytes at a time where the channels lie side by side and start on 16 bytes
    wide = (r"LDG\.E\.128", r"STG\.E\.128") if channels_last else ()
    for chip in aot.ELEMENTWISE_CHIPS:
        aot.Budget(registers=96, shared_bytes=0, must_have=wide).check(aot.compiled(launch, chip))


sides = st.integers(1, 6)


@given(
    n=st.integers(0, 2),
    c_up=st.integers(1, 4),
    c_skip=st.integers(1, 4),
    h=sides,
    w=sides,
    more=st.tuples(sides, sides),
)
def test_values_are_up_and_the_centre_of_skip(
    n: int, c_up: int, c_skip: int, h: int, w: int, more: tuple[int, int]
) -> None:
    up, skip = torch.rand(n, c_up, h, w), torch.rand(n, c_skip, h + more[0], w + more[1])
    y = uk.crop_concat(up, skip)
    assert torch.equal(y[:, :c_up], up)
    top, left = more[0] // 2, more[1] // 2
    assert torch.equal(y[:, c_up:], skip[:, :, top : top + h, left : left + w])


def test_skips_gradient_is_zero_outside_the_window() -> None:
    up, skip = torch.rand(1, 2, 3, 3), torch.rand(1, 2, 6, 5, requires_grad=True)
    uk.crop_concat(up, skip).sum().backward()
    want = torch.zeros(1, 2, 6, 5)
    want[:, :, 1:4, 1:4] = 1
    assert torch.equal(skip.grad, want)


@pytest.mark.parametrize("layouts", [(a, b) for a in LAYOUTS for b in LAYOUTS], ids=" and ".join)
def test_the_launcher_foresees_torchs_strides(layouts: tuple[str, str]) -> None:
    for shape in ((2, 3, 4, 5), (1, 1, 4, 5), (2, 3, 1, 1), (1, 4, 1, 5)):
        up, skip = (awkward(torch.rand(shape), layout) for layout in layouts)
        both = _layout.suggests_channels_last(up) and _layout.suggests_channels_last(skip)
        want = torch.empty(
            (shape[0], 2 * shape[1], *shape[2:]), memory_format=torch.channels_last if both else torch.contiguous_format
        )
        assert torch.cat([up, skip], 1).stride() == want.stride()


def test_under_autocast_the_wider_dtype_wins_as_in_torch_cat() -> None:
    up, skip = torch.rand(1, 2, 3, 3).bfloat16(), torch.rand(1, 2, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want, got = torch.cat([up, skip], 1), uk.crop_concat(up, skip)
    assert_same_bits(got, want)


_UP = torch.zeros(1, 2, 5, 5)


@pytest.mark.parametrize(
    ("up", "skip", "error", "sentence"),
    [
        (_UP, torch.zeros(1, 2, 4, 6), ValueError, "skip must cover up: up is 5x5, got skip 4x6"),
        (_UP, torch.zeros(2, 2, 5, 5), ValueError, "skip must have the batch size of up, 1, got 2"),
        (_UP[0], _UP, ValueError, r"up must be 4-D \[N, C_up, H, W\], got 3-D \[2, 5, 5\]"),
        ([1.0], _UP, TypeError, r"up must be a torch.Tensor \[N, C_up, H, W\], got list"),
        (_UP.int(), _UP, TypeError, r"up must be floating .*, got int32; \.float\(\) makes it so"),
        (_UP, _UP.half(), TypeError, "skip must be float32 like up, got float16"),
        (_UP, _UP.to("meta"), ValueError, "skip must be on cpu like up, got meta"),
    ],
    ids=["smaller skip", "batch", "rank", "no tensor", "integers", "dtype", "device"],
)
def test_bad_input_is_refused_in_a_sentence(up: Any, skip: Tensor, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        uk.crop_concat(up, skip)


@pytest.mark.interpreter
def test_on_cuda_the_op_takes_the_kernel_and_otherwise_says_why_not(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, launched = _module(), []
    monkeypatch.setattr(
        module, "launch_crop_concat_fwd", lambda *maps: launched.append(maps) or launch_crop_concat_fwd(*maps)
    )
    up, skip = _maps("odd margins", torch.float32, device)
    monkeypatch.setattr("unet_kernels._triton.why_not", lambda device, dtype: "")
    assert_same_bits(module._cuda(up, skip), reference.crop_concat(up, skip))
    assert len(launched) == 1
    monkeypatch.setattr("unet_kernels._triton.why_not", lambda device, dtype: "too old")
    assert_same_bits(module._cuda(up, skip), reference.crop_concat(up, skip))
    assert len(launched) == 1
