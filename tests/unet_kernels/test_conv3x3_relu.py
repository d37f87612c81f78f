"""conv3x3_relu and conv3x3_relu_cat: equal to torch's expression, strides included; laws of a valid convolution."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import unet_kernels as uk
from tests.proof.memory import LAYOUTS, awkward
from tests.proof.yardstick import assert_as_close_as, assert_gradient, assert_same_bits
from unet_kernels import _conv3x3_cpu, reference

# N, C_in, H, W, C_out
CASES = {
    "one pixel out": (1, 4, 3, 3, 5),
    "odd": (2, 3, 7, 5, 4),
    "prime channels": (1, 13, 6, 9, 7),
    "one channel in": (2, 1, 8, 8, 3),
    "empty batch": (0, 3, 5, 5, 4),
    "more weight than map": (1, 96, 6, 6, 96),
    "empty batch, more weight": (0, 96, 6, 6, 96),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _made(case: str, dtype: torch.dtype, layout: str, device: Any) -> list[Tensor]:
    n, c_in, h, w, c_out = CASES[case]
    x, weight, bias = torch.randn(n, c_in, h, w), torch.randn(c_out, c_in, 3, 3) / (3 * c_in**0.5), torch.randn(c_out)
    x, weight = (awkward(t.to(device, dtype), layout) for t in (x, weight))
    return [x, weight, bias.to(device, dtype)]


def _torchs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.relu(F.conv2d(x, weight, bias))


def _gradients(call: Any, tensors: list[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    return list(torch.autograd.grad(call(*leaves), leaves, dy.to(leaves[0].dtype)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_near_as_torch_and_in_its_strides(case: str, layout: str, dtype: torch.dtype, device: torch.device) -> None:
    tensors = _made(case, dtype, layout, device)
    want = _torchs(*tensors)
    got = uk.conv3x3_relu(*tensors)
    assert_as_close_as(want, got, _torchs(*(t.double() for t in tensors)))
    # of an axis of one value the stride means nothing, and torch's own in-place ReLU leaves it as it is
    assert [s for s, n in zip(got.stride(), got.shape, strict=True) if n > 1] == [
        s for s, n in zip(want.stride(), want.shape, strict=True) if n > 1
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_as_near_as_torchs(case: str, layout: str, dtype: torch.dtype, device: torch.device) -> None:
    tensors = _made(case, dtype, layout, device)
    dy = torch.randn_like(_torchs(*tensors))
    exact = _gradients(_torchs, [t.double() for t in tensors], dy)
    if dtype == torch.bfloat16:
        # the mask of a 16-bit y differs from the exact one's where y rounds to 0: judge what follows from the mask
        dy = torch.where(_torchs(*tensors) > 0, dy, 0)
        exact = _gradients(lambda *t: F.conv2d(*t), [t.double() for t in tensors], dy)
    torchs = _gradients(_torchs, tensors, dy)
    ours = _gradients(uk.conv3x3_relu, tensors, dy)
    for a, b, c in zip(torchs, ours, exact, strict=True):
        assert_gradient(a, b, c)


@pytest.mark.parametrize("cat", [False, True], ids=["one map", "two maps"])
@pytest.mark.parametrize(
    ("side", "way", "wide"),
    [(6, "_product", True), (24, "_turned", True), (50, "", True), (24, "_product", False), (50, "_product", False)],
)
def test_every_way_to_the_weight_gradient_is_the_derivative(
    side: int, way: str, wide: bool, cat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    monkeypatch.setattr(_conv3x3_cpu, "WIDE_VECTORS", wide)
    for name in ("_product", "_turned"):
        real = getattr(_conv3x3_cpu, name)
        monkeypatch.setattr(_conv3x3_cpu, name, lambda *t, name=name, real=real: taken.append(name) or real(*t))
    c_in = 256 if cat else 128
    # narrow vectors are a matter of float32: whole numbers, whose sums are exact
    dtype = torch.float64 if wide else torch.float32
    x = awkward(torch.randn(1, c_in, side, side, dtype=dtype), "channels_last")
    weight, bias = torch.randn(256, c_in, 3, 3, dtype=dtype), torch.randn(256, dtype=dtype)
    if dtype == torch.float32:
        x, weight, bias = x.round(), weight.round(), bias.round()
    maps = [x[:, :128], x[:, 128:]] if cat else [x]
    tensors = [*maps, awkward(weight, "channels_last"), bias]
    spelled_out = (lambda a, b, *rest: _torchs(torch.cat([a, b], 1), *rest)) if cat else _torchs
    ours = uk.conv3x3_relu_cat if cat else uk.conv3x3_relu
    dy = torch.randn_like(spelled_out(*tensors)).round()
    pairs = list(zip(*(_gradients(f, tensors, dy) for f in (spelled_out, ours)), strict=True))
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    assert set(taken) == ({way} if way else set())
    assert pairs[len(maps)][1].stride() == tensors[len(maps)].stride()


@pytest.mark.slow
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_weight_that_costs_more_to_turn_than_to_use_is_used_as_it_lies(batch: int, relu: bool) -> None:
    x = awkward(torch.randn(batch, 1024, 6, 5), "channels_last")
    weight, bias = awkward(torch.randn(512, 1024, 3, 3) / 96, "channels_last"), torch.randn(512)
    assert _conv3x3_cpu._turning_costs_more(x, weight)
    got, want = uk.conv3x3_relu(x, weight, bias, relu=relu), reference.conv3x3_relu(x, weight, bias, relu)
    assert_as_close_as(want, got, reference.conv3x3_relu(x.double(), weight.double(), bias.double(), relu))
    assert got.stride() == want.stride()
    dy = torch.randn_like(want)
    exact = _gradients(lambda *t: reference.conv3x3_relu(*t, relu), [t.double() for t in (x, weight, bias)], dy)
    pairs = (
        _gradients(lambda *t, f=f: f(*t, relu=relu), [x, weight, bias], dy)
        for f in (reference.conv3x3_relu, uk.conv3x3_relu)
    )
    for a, b, c in zip(*pairs, exact, strict=True):
        assert_gradient(a, b, c)
    # a contiguous weight, or more pixels, are ATen's
    assert not uk.conv3x3_relu(x, weight.contiguous(), bias).isnan().any()
    assert not _conv3x3_cpu._turning_costs_more(awkward(torch.randn(1, 1024, 17, 17), "channels_last"), weight)


def test_what_needs_no_relu_keeps_no_output() -> None:
    kept: list[Tensor] = []
    x, weight, bias = _made("more weight than map", torch.float32, "channels_last", "cpu")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = uk.conv3x3_relu(x, weight.requires_grad_(), bias, relu=False)
    assert y.data_ptr() not in {t.data_ptr() for t in kept}


@pytest.mark.parametrize("op", ["conv3x3_relu", "up_conv"])
def test_an_op_called_directly_under_autocast_keeps_its_dtype(op: str) -> None:
    if op == "conv3x3_relu":
        x, weight, bias = _made("odd", torch.float32, "channels_last", "cpu")
        call, settings = torch.ops.unet.conv3x3_relu, (True,)
    else:
        x, weight, bias = torch.randn(1, 3, 4, 4), torch.randn(3, 2, 2, 2), torch.randn(2)
        call, settings = torch.ops.unet.up_conv, ("deconv",)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call(*leaves, *settings)
        y.sum().backward()
    assert y.dtype == torch.float32
    assert all(t.grad is not None for t in leaves)


def test_without_relu_nothing_is_clamped() -> None:
    tensors = _made("odd", torch.float64, "contiguous", "cpu")
    assert torch.equal(uk.conv3x3_relu(*tensors, relu=False), F.conv2d(*tensors))


def test_nan_passes_forward_and_backward_as_in_torch() -> None:
    x, weight, bias = _made("odd", torch.float32, "channels_last", "cpu")
    x[0, 0, 2, 2] = torch.nan
    dy = torch.ones_like(_torchs(x, weight, bias))
    assert torch.equal(uk.conv3x3_relu(x, weight, bias).isnan(), _torchs(x, weight, bias).isnan())
    for a, b in zip(*(_gradients(f, [x, weight, bias], dy) for f in (_torchs, uk.conv3x3_relu)), strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        torch.testing.assert_close(a, b, equal_nan=True)


def test_the_gradient_at_zero_is_zero() -> None:
    x = torch.zeros(1, 1, 3, 3, requires_grad=True)
    uk.conv3x3_relu(x, torch.ones(1, 1, 3, 3), torch.zeros(1)).backward(torch.ones(1, 1, 1, 1))
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_shifting_the_input_shifts_the_output() -> None:
    x, weight, bias = _made("prime channels", torch.float64, "contiguous", "cpu")
    y = uk.conv3x3_relu(x, weight, bias)
    shifted = uk.conv3x3_relu(x[:, :, 1:, 2:], weight, bias)
    torch.testing.assert_close(shifted, y[:, :, 1:, 2:], rtol=1e-12, atol=1e-12)


def test_nothing_outside_the_receptive_field_matters() -> None:
    x, weight, bias = _made("prime channels", torch.float64, "contiguous", "cpu")
    before = uk.conv3x3_relu(x, weight, bias)[:, :, 1, 2]
    x[:, :, 4:], x[:, :, :1], x[:, :, :, 5:], x[:, :, :, :2] = 1e9, 1e9, 1e9, 1e9
    assert torch.equal(before, uk.conv3x3_relu(x, weight, bias)[:, :, 1, 2])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("margins", [(0, 0), (3, 4)], ids=["window", "whole skip"])
def test_the_concatenating_one_equals_the_concatenation(layout: str, margins: tuple[int, int]) -> None:
    up = awkward(torch.randn(2, 3, 6, 5, dtype=torch.float64), layout)
    skip = awkward(torch.randn(2, 4, 6 + margins[0], 5 + margins[1], dtype=torch.float64), layout)
    weight, bias = torch.randn(5, 7, 3, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)

    def spelled_out(up: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        top, left = margins[0] // 2, margins[1] // 2
        return _torchs(torch.cat([up, skip[:, :, top : top + 6, left : left + 5]], 1), weight, bias)

    want = spelled_out(up, skip, weight, bias)
    got = uk.conv3x3_relu_cat(up, skip, weight, bias)
    assert_same_bits(got, want)
    assert got.stride() == want.stride()
    dy = torch.randn_like(want)
    pairs = zip(*(_gradients(f, [up, skip, weight, bias], dy) for f in (spelled_out, uk.conv3x3_relu_cat)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_concatenation_is_not_kept() -> None:
    up, skip = torch.randn(1, 8, 20, 20, requires_grad=True), torch.randn(1, 8, 20, 20)
    weight, bias = torch.randn(4, 16, 3, 3, requires_grad=True), torch.randn(4)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        uk.conv3x3_relu_cat(up, skip, weight, bias)
    assert all(t.shape[1] != 16 or t.shape == weight.shape for t in kept)
    assert {t.data_ptr() for t in kept} >= {up.data_ptr(), skip.data_ptr()}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", ["odd", "more weight than map", "one channel in"])
def test_weight_gradients_come_in_the_weights_strides(case: str, layout: str) -> None:
    x, weight, bias = _made(case, torch.float32, layout, "cpu")
    weight = torch.nn.Parameter(weight)
    uk.conv3x3_relu(x, weight, bias).sum().backward()
    assert weight.grad.stride() == weight.stride()


@pytest.mark.gpu
def test_large_maps_and_repeats(device: torch.device) -> None:
    x, weight, bias = (t.to(device) for t in (torch.randn(1, 64, 570, 570), torch.randn(64, 64, 3, 3), torch.randn(64)))
    want = _torchs(x, weight, bias)
    for _ in range(20):
        assert_same_bits(uk.conv3x3_relu(x, weight, bias), want)


_X, _W, _B = torch.zeros(1, 2, 5, 5), torch.zeros(3, 2, 3, 3), torch.zeros(3)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "error", "sentence"),
    [
        (None, _W, _B, TypeError, r"x must be a torch.Tensor \[N, C_in, H, W\], got NoneType"),
        (_X[0], _W, _B, ValueError, r"x must be 4-D \[N, C_in, H, W\], got 3-D \[2, 5, 5\]"),
        (_X.int(), _W, _B, TypeError, "x must be floating .*got int32"),
        (_X[:, :, :2], _W, _B, ValueError, "x must be at least 3x3 for a valid 3x3 convolution, got 2x5"),
        (_X, _W[:0], _B[:0], ValueError, r"weight must have at least one channel in and out, got \[0, 2, 3, 3\]"),
        (_X, _W[:, :1], _B, ValueError, r"weight must have shape \[any, 2, 3, 3\] \(C_in is the channels of x\), got"),
        (_X, _W[..., :2], _B, ValueError, r"weight must have shape \[any, 2, 3, 3\] .*got \[3, 2, 3, 2\]"),
        (_X, _W, _B[:2], ValueError, r"bias must have shape \[3\] \(one per output channel of weight\), got \[2\]"),
        (_X, _W.half(), _B, TypeError, "weight must be float32 like x, got float16"),
        (_X, _W, _B.double(), TypeError, "bias must be float32 like x, got float64"),
        (_X, _W.to("meta"), _B, ValueError, "weight must be on cpu like x, got meta"),
        (_X, _W, None, TypeError, r"bias must be a torch.Tensor \[C_out\], got NoneType"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(
    x: Any, weight: Any, bias: Any, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        uk.conv3x3_relu(x, weight, bias)


def test_the_concatenating_one_names_both_maps() -> None:
    with pytest.raises(ValueError, match="the channels of up and skip together"):
        uk.conv3x3_relu_cat(_X, _X, _W, _B)
    with pytest.raises(ValueError, match="up must have at least one channel"):
        uk.conv3x3_relu_cat(_X[:, :0], _X, _W, _B)
    with pytest.raises(ValueError, match="skip must cover up"):
        uk.conv3x3_relu_cat(_X, _X[:, :, 1:], torch.zeros(3, 4, 3, 3), _B)
    with pytest.raises(TypeError, match="skip must be float32 like up, got float16"):
        uk.conv3x3_relu_cat(_X, _X.half(), torch.zeros(3, 4, 3, 3), _B)
