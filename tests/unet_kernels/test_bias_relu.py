"""bias_relu: one pass, NaN through, as near as torch's two passes; and wide loads on every chip."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.proof.memory import guarded_launch
from tests.proof.order import assert_order_does_not_matter
from tests.proof.yardstick import assert_as_close_as
from unet_kernels import bias_relu
from unet_kernels.bias_relu import launch_bias_relu_

SHAPES = {
    "one value": (1, 1, 1, 1),
    "odd": (2, 3, 5, 7),
    "prime channels": (1, 13, 9, 11),
    "two blocks": (1, 8, 16, 17),
}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def _torchs(y: Tensor, bias: Tensor, relu: bool) -> Tensor:
    z = y + bias[:, None, None]
    return F.relu(z) if relu else z


@pytest.mark.interpreter
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "no relu"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_as_near_as_torch(shape: str, layout: str, dtype: torch.dtype, relu: bool, device: torch.device) -> None:
    y = torch.randn(SHAPES[shape], device=device).to(dtype).contiguous(memory_format=FORMATS[layout])
    bias = torch.randn(y.shape[1], device=device).to(dtype)
    got = guarded_launch(launch_bias_relu_, y, bias, relu, mutates=(0,))
    assert_as_close_as(_torchs(y, bias, relu), got, _torchs(y.double(), bias.double(), relu))
    assert got.stride() == y.stride()


@pytest.mark.gpu
@pytest.mark.interpreter
def test_as_near_as_torch_in_bfloat16(device: torch.device) -> None:
    y = torch.randn(2, 64, 30, 31, device=device).bfloat16().contiguous(memory_format=torch.channels_last)
    bias = torch.randn(64, device=device).bfloat16()
    got = launch_bias_relu_(y.clone(), bias)
    assert_as_close_as(_torchs(y, bias, True), got, _torchs(y.double(), bias.double(), True))


@pytest.mark.interpreter
def test_nan_and_infinity_pass_as_in_torch(device: torch.device) -> None:
    y = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0, -1.0], device=device).view(1, 1, 2, 3)
    bias = torch.zeros(1, device=device)
    got = guarded_launch(launch_bias_relu_, y, bias, mutates=(0,))
    assert_as_close_as(_torchs(y, bias, True), got, _torchs(y.double(), bias.double(), True))
    assert got[0, 0, 0, 0].isnan()


@pytest.mark.interpreter
def test_the_order_of_programs_does_not_matter(device: torch.device) -> None:
    y, bias = torch.randn(1, 8, 16, 17, device=device), torch.randn(8, device=device)
    assert_order_does_not_matter(lambda: launch_bias_relu_(y.clone(), bias))


@pytest.mark.interpreter
def test_an_empty_map_launches_nothing(device: torch.device) -> None:
    assert launch_bias_relu_(torch.empty(0, 3, 4, 4, device=device), torch.zeros(3, device=device)).shape[0] == 0


def test_a_map_that_is_not_dense_is_refused() -> None:
    with pytest.raises(ValueError, match="y must be dense, contiguous or channels_last, got strides"):
        launch_bias_relu_(torch.zeros(1, 2, 4, 8)[:, :, :, ::2], torch.zeros(2))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["channels_last", pytest.param("contiguous", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_compiled_code_is_within_budget(layout: str, dtype: torch.dtype) -> None:
    from tests.proof import aot

    y = torch.empty(1, 64, 568, 568, dtype=dtype, device="meta").contiguous(memory_format=FORMATS[layout])
    bias = torch.empty(64, dtype=dtype, device="meta")
    [launch] = aot.recorded(bias_relu, "_fwd_kernel", lambda: launch_bias_relu_(y, bias))
    wide = (r"STG\.E\.128",) if dtype == torch.float32 else (r"STG\.E\.(128|64)",)
    for chip in aot.ELEMENTWISE_CHIPS:
        # a minimum or maximum would be a ReLU that turns NaN into 0, which the interpreter cannot show
        budget = aot.Budget(registers=64, shared_bytes=2048, must_have=wide, must_not_have=(r"[FH]MNMX",))
        budget.check(aot.compiled(launch, chip))
