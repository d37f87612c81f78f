"""conv1x1: equal to torch's expression, strides included; the kernel to the reference; compiled without spills."""

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import unet_kernels as uk
from tests.proof.memory import LAYOUTS, awkward, guarded_launch
from tests.proof.order import assert_order_does_not_matter
from tests.proof.yardstick import assert_as_close_as, assert_gradient
from unet_kernels import _triton
from unet_kernels.conv1x1 import launch_conv1x1_dx, launch_conv1x1_fwd

pytestmark = pytest.mark.usefixtures("on_device")

# N, C_in, H, W, C_out
CASES = {
    "one pixel": (1, 4, 1, 1, 2),
    "two classes": (2, 64, 5, 7, 2),
    "prime channels": (1, 71, 3, 9, 5),
    "many classes": (1, 16, 4, 4, 70),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _made(case: str, dtype: torch.dtype, layout: str) -> list[Tensor]:
    n, c_in, h, w, c_out = CASES[case]
    x, weight = torch.randn(n, c_in, h, w).to(dtype), (torch.randn(c_out, c_in, 1, 1) / c_in**0.5).to(dtype)
    return [awkward(x, layout), awkward(weight, layout), torch.randn(c_out).to(dtype)]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "window of channels_last"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_torch(case: str, layout: str, dtype: torch.dtype) -> None:
    tensors = _made(case, dtype, layout)
    got, want = uk.conv1x1(*tensors), F.conv2d(*tensors)
    assert_as_close_as(want, got, F.conv2d(*(t.double() for t in tensors)))
    assert got.stride() == want.stride()


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("layout", "mask"), [("contiguous", False), ("channels_last", True), ("window of channels_last", True)]
)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradients_by_our_kernels_are_as_near_as_torchs(
    case: str, layout: str, mask: bool, dtype: torch.dtype
) -> None:
    if _triton.INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter's bfloat16 arithmetic is wrong")
    x, weight, bias = _made(case, dtype, layout)
    x = x.relu_()
    dy = awkward(torch.randn(F.conv2d(x, weight).shape).to(dtype), layout)
    got = guarded_launch(lambda *t: launch_conv1x1_dx(*t, mask), dy, weight, x)

    def torchs(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
        dx, *others = torch.autograd.grad(F.conv2d(*leaves), leaves, dy.to(dtype))
        return [torch.where(leaves[0] <= 0, 0, dx) if mask else dx, *others]

    wanted, exact = torchs(dtype), torchs(torch.float64)
    assert_gradient(wanted[0], got, exact[0])
    with uk.using("ours"), uk.recorded() as record:
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        gradients = torch.autograd.grad(uk.conv1x1(*leaves, mask_dx=mask), leaves, dy)
    assert [op for op, _, _ in record] == ["conv1x1", "conv1x1_dx", "conv1x1_dweight"]
    for a, b, c in zip(wanted, gradients, exact, strict=True):
        assert_gradient(a, b, c)


@pytest.mark.parametrize("through_the_op", [False, True], ids=["door", "op"])
def test_gradients_are_as_near_as_torchs(through_the_op: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if through_the_op:
        monkeypatch.setattr("unet_kernels._checks.ordinary_on_cpu", lambda tensor: False)
    tensors = _made("prime channels", torch.float32, "channels_last")
    dy = torch.randn_like(F.conv2d(*tensors))

    def gradients(call: Any, dtype: torch.dtype) -> Any:
        leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
        return torch.autograd.grad(call(*leaves), leaves, dy.to(dtype))

    exact = gradients(F.conv2d, torch.float64)
    for a, b, c in zip(gradients(F.conv2d, torch.float32), gradients(uk.conv1x1, torch.float32), exact, strict=True):
        assert_gradient(a, b, c)


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_is_as_near_as_torch(case: str, layout: str, dtype: torch.dtype) -> None:
    if _triton.INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter's bfloat16 arithmetic is wrong")
    tensors = _made(case, dtype, layout)
    got, want = guarded_launch(launch_conv1x1_fwd, *tensors), F.conv2d(*tensors)
    assert_as_close_as(want, got, F.conv2d(*(t.double() for t in tensors)))
    assert got.stride() == want.stride()


@pytest.mark.interpreter
def test_nan_infinity_and_the_order_of_programs() -> None:
    x, weight, bias = _made("two classes", torch.float32, "channels_last")
    x[0, 3, 2, 2], x[1, 5, 4, 6], x[1, 5, 0, 0] = torch.nan, torch.inf, -torch.inf
    got, want = guarded_launch(launch_conv1x1_fwd, x, weight, bias), F.conv2d(x, weight, bias)
    assert_as_close_as(want, got, F.conv2d(x.double(), weight.double(), bias.double()))
    assert_order_does_not_matter(lambda: launch_conv1x1_fwd(x, weight, bias, BLOCK_P=16), seeds=2)


@pytest.mark.interpreter
@pytest.mark.parametrize("axis", range(4), ids="NCHW")
def test_addresses_beyond_two_to_the_31(axis: int) -> None:
    shape, stride = [1, 1, 1, 1], [1, 1, 1, 1]
    shape[axis], stride[axis] = 2, 2**31 + 64
    x = torch.empty(2**31 + 128, dtype=torch.float16).as_strided(shape, stride)
    x.copy_(torch.tensor([1.5, -2.5]).view(shape))
    weight, bias = torch.randn(3, shape[1], 1, 1).half(), torch.zeros(3).half()
    got = launch_conv1x1_fwd(x, weight, bias)
    assert_as_close_as(F.conv2d(x, weight, bias), got, F.conv2d(x.double(), weight.double(), bias.double()))


def _module() -> ModuleType:
    return importlib.import_module("unet_kernels.conv1x1")


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
def test_compiled_code_is_within_budget(dtype: torch.dtype) -> None:
    from tests.proof import aot

    x = torch.empty(1, 64, 388, 388, dtype=dtype, device="meta", memory_format=torch.channels_last)
    weight, bias = (torch.empty(*shape, dtype=dtype, device="meta") for shape in ((2, 64, 1, 1), (2,)))
    for BLOCK_P in (128, 64):
        [launch] = aot.recorded(_module(), "_fwd_kernel", lambda p=BLOCK_P: launch_conv1x1_fwd(x, weight, bias, p))
        for chip in aot.CHIPS:
            aot.Budget(registers=255, must_have=(r"(LDG|LDGSTS)\.E.*\.128",)).check(aot.compiled(launch, chip))


_X, _W, _B = torch.zeros(1, 2, 5, 5), torch.zeros(3, 2, 1, 1), torch.zeros(3)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "error", "sentence"),
    [
        (None, _W, _B, TypeError, r"x must be a torch.Tensor \[N, C_in, H, W\], got NoneType"),
        (_X, _W[:, :1], _B, ValueError, r"weight must have shape \[any, 2, 1, 1\] \(C_in is the channels of x\), got"),
        (_X, torch.zeros(3, 2, 3, 3), _B, ValueError, r"weight must have shape \[any, 2, 1, 1\]"),
        (_X, _W[:0], _B[:0], ValueError, r"weight must have at least one channel in and out, got \[0, 2, 1, 1\]"),
        (_X, _W, _B[:2], ValueError, r"bias must have shape \[3\] \(one per output channel of weight\), got \[2\]"),
        (_X, _W.half(), _B, TypeError, "weight must be float32 like x, got float16"),
        (_X, _W, _B.to("meta"), ValueError, "bias must be on cpu like x, got meta"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(
    x: Any, weight: Any, bias: Any, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        uk.conv1x1(x, weight, bias)
