"""up_conv: both readings equal their expressions; the doubled map of "resize" is never made."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import unet_kernels as uk
from tests.proof.allocations import allocated
from tests.proof.memory import LAYOUTS, awkward, guarded_launch
from tests.proof.order import assert_order_does_not_matter
from tests.proof.yardstick import assert_as_close_as, assert_gradient
from unet_kernels import _triton
from unet_kernels.up_conv import Blocks, blocks_for, launch_up_conv_dx, launch_up_conv_fwd

MODES = ("deconv", "resize")
SHAPES = {"one pixel": (1, 2, 1, 1, 3), "odd": (2, 3, 5, 4, 4), "one row": (1, 5, 1, 6, 1), "prime": (1, 7, 3, 3, 11)}


def _torchs(x: Tensor, weight: Tensor, bias: Tensor, mode: str) -> Tensor:
    if mode == "deconv":
        return F.conv_transpose2d(x, weight, bias, stride=2)
    doubled = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    doubled = torch.cat([doubled, doubled[:, :, -1:]], 2)
    doubled = torch.cat([doubled, doubled[:, :, :, -1:]], 3)
    return F.conv2d(doubled, weight, bias)


def _made(shape: str, mode: str, dtype: torch.dtype, layout: str, device: Any) -> list[Tensor]:
    n, c_in, h, w, c_out = SHAPES[shape]
    channels = (c_in, c_out) if mode == "deconv" else (c_out, c_in)
    x, weight, bias = torch.randn(n, c_in, h, w), torch.randn(*channels, 2, 2) / (2 * c_in**0.5), torch.randn(c_out)
    return [awkward(x.to(device, dtype), layout), awkward(weight.to(device, dtype), layout), bias.to(device, dtype)]


def _gradients(call: Any, tensors: list[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    return list(torch.autograd.grad(call(*leaves), leaves, dy.to(leaves[0].dtype)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_as_near_as_torch(mode: str, shape: str, layout: str, dtype: torch.dtype, device: torch.device) -> None:
    tensors = _made(shape, mode, dtype, layout, device)
    exact = _torchs(*(t.double() for t in tensors), mode)
    assert_as_close_as(_torchs(*tensors, mode), uk.up_conv(*tensors, mode=mode), exact)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "window of channels_last"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_as_near_as_torchs(mode: str, shape: str, layout: str, device: torch.device) -> None:
    tensors = _made(shape, mode, torch.float32, layout, device)
    dy = torch.randn_like(_torchs(*tensors, mode))
    exact = _gradients(lambda *t: _torchs(*t, mode), [t.double() for t in tensors], dy)
    torchs = _gradients(lambda *t: _torchs(*t, mode), tensors, dy)
    ours = _gradients(lambda *t: uk.up_conv(*t, mode=mode), tensors, dy)
    for a, b, c in zip(torchs, ours, exact, strict=True):
        assert_gradient(a, b, c)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", MODES)
def test_strides_are_those_of_the_expression(mode: str, shape: str, layout: str) -> None:
    from unet_kernels import reference

    tensors = _made(shape, mode, torch.float32, layout, "cpu")
    assert uk.up_conv(*tensors, mode=mode).stride() == reference.up_conv(*tensors, mode).stride()


def test_a_constant_map_stays_constant_at_the_edge() -> None:
    # zeros invented beyond the edge would show in the last row and column
    y = uk.up_conv(torch.ones(1, 1, 3, 3), torch.full((1, 1, 2, 2), 0.25), torch.zeros(1), mode="resize")
    assert torch.equal(y, torch.ones(1, 1, 6, 6))


def test_the_doubled_map_is_never_stored() -> None:
    # large enough that ATen convolves without unfolding the map, which would be as large as doubling it
    x, weight = torch.zeros(1, 16, 96, 96), torch.zeros(2, 16, 2, 2)
    seen = allocated(lambda: uk.up_conv(x, weight, torch.zeros(2), mode="resize"))
    assert seen.largest < 2 * x.numel() * 4


def test_sums_of_sixteen_bit_taps_are_rounded_once() -> None:
    from importlib import import_module

    module = import_module("unet_kernels.up_conv")
    weight = torch.tensor([256.0, 1.0, 1.0, 1.0]).view(1, 1, 2, 2).bfloat16()
    # added one by one in bfloat16, each 1 would be lost
    assert module._summed(weight, 0, 0).item() == torch.tensor(259.0).bfloat16().item() == 260


def test_a_map_smaller_than_its_weight_is_doubled_on_a_cpu_and_equal() -> None:
    x, weight, bias = torch.randn(1, 32, 2, 3), torch.randn(16, 32, 2, 2), torch.randn(16)
    through_the_op = torch.ops.unet.up_conv(x, weight, bias, "resize")
    torch.testing.assert_close(uk.up_conv(x, weight, bias, mode="resize"), through_the_op, rtol=1e-4, atol=1e-4)


def test_nan_reaches_what_reads_it_and_nothing_else() -> None:
    x, weight, bias = _made("odd", "resize", torch.float32, "contiguous", "cpu")
    x[0, 0, 2, 2] = torch.nan
    assert torch.equal(uk.up_conv(x, weight, bias, mode="resize").isnan(), _torchs(x, weight, bias, "resize").isnan())


# the kernel

SMALL = Blocks(32, 16, 16, 4, 3)


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_kernel_is_as_near_as_torch(
    mode: str, shape: str, layout: str, dtype: torch.dtype, device: torch.device
) -> None:
    if _triton.INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter's bfloat16 arithmetic is wrong")
    tensors = _made(shape, mode, dtype, layout, device)
    got = guarded_launch(lambda *t: launch_up_conv_fwd(*t, mode, SMALL), *tensors)
    want = _torchs(*tensors, mode)
    assert_as_close_as(want, got, _torchs(*(t.double() for t in tensors), mode))
    # ATen's resize pads, and its padding decides the strides of a map of one row
    if mode == "deconv" or min(tensors[0].shape) > 1:
        assert got.stride() == uk.up_conv(*tensors, mode=mode).stride()


@pytest.mark.interpreter
@pytest.mark.parametrize("mode", MODES)
def test_the_kernel_takes_several_blocks_in_any_order(mode: str, device: torch.device) -> None:
    x, weight, bias = torch.randn(2, 40, 5, 7), torch.randn(40, 40, 2, 2) / 9, torch.randn(40)
    tensors = [awkward(t.to(device), "channels_last") for t in (x, weight)] + [bias.to(device)]
    assert_order_does_not_matter(
        lambda: guarded_launch(lambda *t: launch_up_conv_fwd(*t, mode, SMALL), *tensors), seeds=2
    )
    got = launch_up_conv_fwd(*tensors, mode, SMALL)
    assert_as_close_as(_torchs(*tensors, mode), got, _torchs(*(t.double() for t in tensors), mode))


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("mode", MODES)
def test_nan_and_infinity_go_where_torchs_go_through_the_kernel(mode: str, device: torch.device) -> None:
    x, weight, bias = _made("odd", mode, torch.float32, "channels_last", device)
    x[0, 0, 2, 2], x[1, 1, 4, 3], x[1, 2, 4, 3] = torch.nan, torch.inf, -torch.inf
    got = guarded_launch(lambda *t: launch_up_conv_fwd(*t, mode, SMALL), x, weight, bias)
    want = _torchs(x, weight, bias, mode)
    if mode == "resize":
        # taps that are summed beforehand meet an infinity once, and not twice with two signs: infinite where it is NaN
        assert torch.equal(got.isfinite(), want.isfinite())
        assert not (got.isnan() & ~want.isnan()).any()
        got = torch.where(want.isfinite(), got, want)
    assert_as_close_as(want, got, _torchs(x.double(), weight.double(), bias.double(), mode))


@pytest.mark.interpreter
@pytest.mark.parametrize("axis", range(4), ids="NCHW")
@pytest.mark.parametrize("mode", MODES)
def test_addresses_beyond_two_to_the_31(mode: str, axis: int, device: torch.device) -> None:
    shape, stride = [1, 1, 1, 1], [1, 1, 1, 1]
    shape[axis], stride[axis] = 2, 2**31 + 64
    x = torch.empty(2**31 + 128, dtype=torch.float16, device=device).as_strided(shape, stride)
    x.copy_(torch.tensor([1.5, -2.5], device=device).view(shape))
    channels = (shape[1], 3) if mode == "deconv" else (3, shape[1])
    weight, bias = torch.randn(*channels, 2, 2).half().to(device), torch.zeros(3).half().to(device)
    got = launch_up_conv_fwd(x, weight, bias, mode, SMALL)
    assert_as_close_as(_torchs(x, weight, bias, mode), got, _torchs(x.double(), weight.double(), bias.double(), mode))


# its gradients


def _masked_gradients(tensors: list[Tensor], dy: Tensor, mode: str, mask: bool) -> list[Tensor]:
    dx, *others = _gradients(lambda *t: _torchs(*t, mode), tensors, dy)
    return [torch.where(tensors[0] <= 0, 0, dx) if mask else dx, *others]


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "window of channels_last"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_gradients_by_our_kernels_are_as_near_as_torchs(
    mode: str, shape: str, layout: str, dtype: torch.dtype, device: torch.device
) -> None:
    if _triton.INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter's bfloat16 arithmetic is wrong")
    tensors = _made(shape, mode, dtype, layout, device)
    tensors[0].relu_()
    dy = awkward(torch.randn(_torchs(*tensors, mode).shape, device=device).to(dtype), layout)
    exact = _masked_gradients([t.double() for t in tensors], dy, mode, True)
    wanted = _masked_gradients(tensors, dy, mode, True)
    if mode == "deconv":
        # what folds the edge back does it in place, in what torch made: there is nothing to guard
        got = guarded_launch(
            lambda dy, w, x: launch_up_conv_dx(dy, w, x, True, mode, SMALL), dy, tensors[1], tensors[0]
        )
        assert_gradient(wanted[0], got, exact[0])
    with uk.using("ours"), uk.recorded() as record:
        gradients = _gradients(lambda *t: uk.up_conv(*t, mode=mode, mask_dx=True), tensors, dy)
    assert [op for op, _, _ in record] == ["up_conv", "up_conv_dx", "up_conv_dweight"]
    for a, b, c in zip(wanted, gradients, exact, strict=True):
        # of a few numbers a mean is no statistic
        (assert_gradient if a.numel() > 4 else assert_as_close_as)(a, b, c)


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("mode", MODES)
def test_nan_goes_where_torchs_goes_through_the_gradient(mode: str, device: torch.device) -> None:
    tensors = _made("odd", mode, torch.float32, "channels_last", device)
    tensors[0].relu_()
    dy = torch.randn_like(_torchs(*tensors, mode))
    # in the last line and column, which "resize" repeats; and a NaN in x lets its gradient through
    dy[0, 1, 3, 5], dy[1, 0, 9, 7], tensors[0][0, 1, 0, 0] = torch.nan, torch.nan, torch.nan
    wanted = _masked_gradients(tensors, dy, mode, True)
    with uk.using("ours"):
        got = _gradients(lambda *t: uk.up_conv(*t, mode=mode, mask_dx=True), tensors, dy)
    for a, b in zip(wanted, got, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.interpreter
@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_a_map_of_several_blocks(mode: str, device: torch.device) -> None:
    x, weight, bias = torch.randn(2, 40, 6, 7), torch.randn(40, 40, 2, 2) / 9, torch.randn(40)
    tensors = [awkward(t.to(device), "channels_last") for t in (x, weight)] + [bias.to(device)]
    dy = awkward(torch.randn(2, 40, 12, 14, device=device), "channels_last")
    got = launch_up_conv_dx(dy, tensors[1], tensors[0], False, mode, SMALL)
    exact = _masked_gradients([t.double() for t in tensors], dy, mode, False)
    assert_gradient(_masked_gradients(tensors, dy, mode, False)[0], got, exact[0])


@pytest.mark.parametrize("chip", [90, *(pytest.param(chip, marks=pytest.mark.slow) for chip in (80, 86, 89))])
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.bfloat16, "ieee"),
        *(pytest.param(torch.float32, p, marks=pytest.mark.slow) for p in ("tf32", "ieee")),
    ],
    ids=["16 bits", "tf32", "ieee"],
)
def test_compiled_code_is_within_budget(
    dtype: torch.dtype, precision: str, chip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib import import_module

    from tests.proof import aot

    monkeypatch.setattr(_triton, "precision", lambda dtype: precision)
    layout = torch.channels_last
    x = torch.empty(1, 128, 196, 196, dtype=dtype, device="meta", memory_format=layout)
    bias = torch.empty(64, dtype=dtype, device="meta")
    product = "FFMA" if (dtype, precision) == (torch.float32, "ieee") else "HGMMA" if chip == 90 else "HMMA"
    for mode, blocks in [(m, b) for m in MODES for b in blocks_for(dtype, precision, 128, 64)]:
        channels = (128, 64) if mode == "deconv" else (64, 128)
        weight = torch.empty(*channels, 2, 2, dtype=dtype, device="meta", memory_format=layout)

        def call(mode: str = mode, blocks: Blocks = blocks, weight: Tensor = weight) -> Tensor:
            return launch_up_conv_fwd(x, weight, bias, mode, blocks)

        [launch] = aot.recorded(import_module("unet_kernels.up_conv"), "_fwd_kernel", call)
        aot.Budget(registers=255, must_have=(r"STG\.E\.128",), main_loop=product, loop_must_have=("LDGSTS",)).check(
            aot.compiled(launch, chip)
        )


_X, _W, _B = torch.zeros(1, 2, 5, 5), torch.zeros(2, 3, 2, 2), torch.zeros(3)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "mode", "error", "sentence"),
    [
        (_X, _W, _B, "bilinear", ValueError, "mode must be 'deconv' or 'resize', got 'bilinear'"),
        (_X[0], _W, _B, "deconv", ValueError, r"x must be 4-D \[N, C_in, H, W\], got 3-D"),
        (_X[:, :, :0], _W, _B, "resize", ValueError, "x must have at least one row and one column, got 0x5"),
        (_X, _W[:1], _B, "deconv", ValueError, r'weight must have shape \[2, any, 2, 2\] for mode "deconv"'),
        (_X, _W, _B, "resize", ValueError, r'weight must have shape \[any, 2, 2, 2\] for mode "resize"'),
        (_X, _W, _B[:1], "deconv", ValueError, r"bias must have shape \[3\]"),
        (_X, _W.double(), _B, "deconv", TypeError, "weight must be float32 like x, got float64"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(
    x: Any, weight: Any, bias: Any, mode: Any, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        uk.up_conv(x, weight, bias, mode=mode)
