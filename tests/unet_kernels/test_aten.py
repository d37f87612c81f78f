"""ATen's convolutions on a CPU that cannot multiply 16 bits: none of them is asked for in 16 bits."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.proof.memory import awkward
from unet_kernels import _aten, conv1x1, conv3x3_relu, conv3x3_relu_cat, lane, multiplies_in, reference, up_conv

NARROW = (torch.bfloat16, torch.float16)
Op = Callable[..., Tensor]

# op, its specification, shapes of its tensors
OPS: dict[str, tuple[Op, Op, list[tuple[int, ...]]]] = {
    "conv3x3_relu": (conv3x3_relu, reference.conv3x3_relu, [(2, 5, 9, 8), (7, 5, 3, 3), (7,)]),
    "conv3x3_relu_cat": (
        conv3x3_relu_cat,
        reference.conv3x3_relu_cat,
        [(2, 3, 6, 8), (2, 2, 10, 8), (7, 5, 3, 3), (7,)],
    ),
    "up_conv deconv": (
        lambda *t: up_conv(*t, mode="deconv"),
        lambda *t: reference.up_conv(*t, "deconv"),
        [(2, 5, 6, 4), (5, 3, 2, 2), (3,)],
    ),
    "up_conv resize": (
        lambda *t: up_conv(*t, mode="resize"),
        lambda *t: reference.up_conv(*t, "resize"),
        [(2, 5, 6, 4), (3, 5, 2, 2), (3,)],
    ),
    "conv1x1": (conv1x1, reference.conv1x1, [(2, 5, 6, 4), (3, 5, 1, 1), (3,)]),
}


@pytest.fixture(params=[False, True], ids=["cannot multiply", "can multiply"])
def can(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(_aten, "_has_arithmetic", lambda dtype: request.param)
    return bool(request.param)


def _asked_for(work: Callable[[], object]) -> set[str]:
    """Dtypes of the maps of ATen's convolutions, there and back."""
    with torch.profiler.profile(record_shapes=True, acc_events=True) as found:
        work()
    return {
        event.dtypes()[0]
        for event in found.profiler.kineto_results.events()
        if event.name() in ("aten::convolution", "aten::convolution_backward")
    }


def _tensors(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    made = [torch.randn(shape).to(dtype) for shape in shapes]
    return [(awkward(t, "channels_last") if t.dim() == 4 else t).requires_grad_() for t in made]


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_what_a_processor_cannot_multiply_is_not_asked_of_it(
    name: str, dtype: torch.dtype, autocast: bool, can: bool
) -> None:
    op, _, shapes = OPS[name]
    tensors = _tensors(shapes, torch.float32 if autocast else dtype)

    def there_and_back() -> None:
        with torch.autocast("cpu", dtype, enabled=autocast):
            y = op(*tensors)
        assert y.dtype == dtype
        y.float().square().sum().backward()

    there_and_back()
    asked = _asked_for(there_and_back)
    assert asked == {{torch.bfloat16: "c10::BFloat16", torch.float16: "c10::Half"}[dtype] if can else "float"}
    assert all(t.grad is not None and t.grad.dtype == t.dtype and t.grad.shape == t.shape for t in tensors)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_through_float32_is_rounded_once(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_aten, "_has_arithmetic", lambda dtype: False)
    op, spec, shapes = OPS[name]
    tensors = _tensors(shapes, dtype)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    y, want = op(*tensors), spec(*wide)
    assert y.stride() == want.stride()
    dy = torch.randn(y.shape).to(dtype)
    y.backward(dy)
    # through the ReLU's mask of the rounded map
    want.backward(dy.double() if "relu" not in name else torch.where(y > 0, dy, 0).double())
    unit = torch.finfo(dtype).eps
    for got, exact in zip((y, *(t.grad for t in tensors)), (want, *(t.grad for t in wide)), strict=True):
        assert got is not None
        assert exact is not None
        # half a unit in the last place, and what float32 loses in the sum
        assert bool(((got.double() - exact).abs() <= 0.51 * unit * exact.abs() + 1e-5).all())


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_the_lane_says_so(dtype: torch.dtype, can: bool) -> None:
    plain = str(dtype).removeprefix("torch.")
    assert multiplies_in("cpu", dtype) == (dtype if can else torch.float32)
    assert multiplies_in("cuda", dtype) == dtype
    assert multiplies_in("cpu", torch.float32) == torch.float32
    for op in ("conv3x3_relu", "conv3x3_relu_cat", "conv3x3_relu_pool", "up_conv", "conv1x1"):
        assert (plain in lane(op, "cpu", dtype)[1]) == (not can)
        assert plain not in lane(op, "cpu")[1]
    assert plain not in lane("max_pool2x2", "cpu", dtype)[1]
