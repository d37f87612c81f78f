"""weighted_cross_entropy and head_cross_entropy: torch's cross_entropy for every argument, and what torch lacks."""

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import unet_kernels as uk
from tests.proof.yardstick import assert_gradient

pytestmark = pytest.mark.usefixtures("on_device")

REDUCTIONS = ("none", "sum", "mean")


def _maps(classes: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    logits = (torch.randn(2, classes, 5, 4, dtype=torch.float64) * 3).to(dtype)
    target = torch.randint(0, classes, (2, 5, 4))
    target[0, 0, :2], target[1, 3, 3] = -100, -100
    return logits, target


@pytest.mark.parametrize(
    ("reduction", "weighted", "ignore_index"), list(product(REDUCTIONS, (False, True), (-100, 1, 255)))
)
def test_equals_torch_for_every_argument_it_has(reduction: str, weighted: bool, ignore_index: int) -> None:
    logits, target = _maps()
    target = torch.where(target == -100, ignore_index, target)
    settings: dict[str, Any] = {"reduction": reduction, "ignore_index": ignore_index}
    weight = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64) if weighted else None
    results = []
    for call in (F.cross_entropy, uk.weighted_cross_entropy):
        leaf = logits.clone().requires_grad_()
        loss = call(leaf, target, weight=weight, **settings)
        results.append((loss, torch.autograd.grad(loss.sum(), leaf)[0]))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def _by_hand(logits: Tensor, target: Tensor, pixel_weight: Tensor, weight: Tensor, reduction: str) -> Tensor:
    valid = target != -100
    t = torch.where(valid, target, 0)
    nll = -torch.log(torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)).gather(1, t[:, None])[:, 0]
    factor = weight[t] * valid
    total = nll * factor * pixel_weight
    if reduction == "none":
        return total
    denominator = {"sum": 1.0, "mean": factor.sum(), "weighted_mean": (factor * pixel_weight).sum()}[reduction]
    return total.sum() / denominator


@pytest.mark.parametrize("reduction", [*REDUCTIONS, "weighted_mean"])
def test_pixel_weights_multiply_and_only_weighted_mean_divides_by_them(reduction: str) -> None:
    logits, target = _maps()
    pixel_weight = torch.rand(2, 5, 4, dtype=torch.float64) * 10
    weight = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    leaf = logits.clone().requires_grad_()
    got = uk.weighted_cross_entropy(leaf, target, pixel_weight, weight=weight, reduction=reduction)
    other = logits.clone().requires_grad_()
    want = _by_hand(other, target, pixel_weight, weight, reduction)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), leaf)[0], torch.autograd.grad(want.sum(), other)[0], rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("reduction", ["sum", "mean", "weighted_mean"])
def test_no_valid_pixel_gives_zero_and_no_gradient(reduction: str) -> None:
    logits = torch.randn(1, 2, 3, 3, requires_grad=True)
    loss = uk.weighted_cross_entropy(logits, torch.full((1, 3, 3), -100), torch.ones(1, 3, 3), reduction=reduction)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_pixel_weight_gets_no_gradient() -> None:
    logits, target = _maps()
    pixel_weight = torch.rand(2, 5, 4, requires_grad=True)
    loss = uk.weighted_cross_entropy(logits.requires_grad_(), target, pixel_weight)
    loss.backward()
    assert pixel_weight.grad is None


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_stable_for_huge_logits(size: float) -> None:
    logits = torch.tensor([size, 0.0]).view(1, 2, 1, 1).requires_grad_()
    for target in (0, 1):
        loss = uk.weighted_cross_entropy(logits, torch.full((1, 1, 1), target))
        assert loss.item() == pytest.approx(max(0.0, size * (2 * target - 1)))
        assert torch.autograd.grad(loss, logits)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bit_logits_are_summed_in_float32(dtype: torch.dtype) -> None:
    # 90,000 pixels of loss 0.69 are more than fp16 holds
    logits = torch.zeros(1, 2, 300, 300, dtype=dtype, requires_grad=True)
    loss = uk.weighted_cross_entropy(logits, torch.zeros(1, 300, 300, dtype=torch.uint8), reduction="sum")
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(90_000 * 0.693147, rel=1e-5)
    loss.backward()
    assert logits.grad.dtype == dtype


def test_float32_gradients_are_as_near_as_torchs() -> None:
    logits, target = _maps(dtype=torch.float32)
    results = []
    for call, dtype in (
        (F.cross_entropy, torch.float32),
        (uk.weighted_cross_entropy, torch.float32),
        (F.cross_entropy, torch.float64),
    ):
        leaf = logits.to(dtype).requires_grad_()
        results.append(torch.autograd.grad(call(leaf, target), leaf)[0])
    assert_gradient(*results)


def test_nan_goes_where_torchs_goes() -> None:
    logits, target = _maps(dtype=torch.float32)
    logits[0, 1, 2, 2], logits[1, 0, 4, 1] = torch.nan, torch.inf
    found = []
    for call in (F.cross_entropy, uk.weighted_cross_entropy):
        leaf = logits.clone().requires_grad_()
        loss = call(leaf, target, reduction="none")
        found.append((loss.isnan(), torch.autograd.grad(loss.sum(), leaf)[0].isnan()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_any_integer_dtype_is_a_target(dtype: torch.dtype) -> None:
    logits, target = _maps()
    target = target.clamp(min=0)
    want = uk.weighted_cross_entropy(logits, target)
    assert torch.equal(uk.weighted_cross_entropy(logits, target.to(dtype)), want)


def test_nan_in_the_weight_of_an_ignored_pixel_does_not_leak() -> None:
    logits, target = _maps()
    pixel_weight = torch.where(target == -100, torch.nan, 1.0)
    for reduction in ("none", "sum", "mean", "weighted_mean"):
        leaf = logits.clone().requires_grad_()
        loss = uk.weighted_cross_entropy(leaf, target, pixel_weight, reduction=reduction)
        assert loss.isfinite().all()
        assert torch.autograd.grad(loss.sum(), leaf)[0].isfinite().all()


def test_a_bool_map_is_a_target() -> None:
    logits = torch.randn(1, 2, 3, 3)
    target = torch.rand(1, 3, 3) > 0.5
    assert torch.equal(uk.weighted_cross_entropy(logits, target), uk.weighted_cross_entropy(logits, target.long()))


@pytest.mark.parametrize("traced", [False, True], ids=["door", "op"])
def test_under_autocast_the_loss_is_float32_and_its_gradient_that_of_its_forward(
    traced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if traced:
        monkeypatch.setattr("unet_kernels._checks.ordinary_on_cpu", lambda tensor: False)
    x, target = torch.randn(1, 6, 5, 4, requires_grad=True), torch.randint(0, 3, (1, 5, 4))
    weight, bias = torch.randn(3, 6, 1, 1, requires_grad=True), torch.randn(3, requires_grad=True)
    plain = uk.head_cross_entropy(x, weight, bias, target)
    want = torch.autograd.grad(plain, (x, weight, bias), retain_graph=True)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        got = torch.autograd.grad(plain, (x, weight, bias))
        logits = torch.randn(1, 3, 5, 4, dtype=torch.bfloat16)
        loss = uk.weighted_cross_entropy(logits, target)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert loss.dtype == torch.float32
    assert torch.equal(loss, uk.weighted_cross_entropy(logits.float(), target))


def test_the_head_makes_only_the_gradients_that_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    x, target = torch.randn(1, 6, 5, 4), torch.randint(0, 3, (1, 5, 4))
    weight, bias = torch.randn(3, 6, 1, 1, requires_grad=True), torch.randn(3)
    asked: list[list[bool]] = []
    real = torch.ops.aten.convolution_backward

    def noted(*args: Any) -> Any:
        asked.append(list(args[-1]))
        return real(*args)

    monkeypatch.setattr(torch.ops.aten, "convolution_backward", noted)
    uk.head_cross_entropy(x, weight, bias, target).backward()
    assert asked == [[False, True, False]]


def test_second_derivatives_are_torchs() -> None:
    logits, target = _maps()
    weight = torch.rand(2, 5, 4, dtype=torch.float64)
    torch.autograd.gradgradcheck(lambda z: uk.weighted_cross_entropy(z, target, weight), logits.requires_grad_())


def test_torch_func_takes_the_loss_apart() -> None:
    logits, target = _maps()
    leaf = logits.clone().requires_grad_()
    want = torch.autograd.grad(uk.weighted_cross_entropy(leaf, target), leaf)[0]
    assert torch.equal(torch.func.grad(lambda z: uk.weighted_cross_entropy(z, target))(logits), want)


def test_class_156_of_a_uint8_map_is_not_minus_100() -> None:
    logits = torch.randn(1, 200, 2, 2)
    target = torch.full((1, 2, 2), 156)
    want = F.cross_entropy(logits, target)
    torch.testing.assert_close(uk.weighted_cross_entropy(logits, target.to(torch.uint8)), want)


@pytest.mark.parametrize("reduction", [*REDUCTIONS, "weighted_mean"])
def test_the_head_equals_its_two_steps(reduction: str) -> None:
    _, target = _maps()
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    weight, bias = torch.randn(3, 6, 1, 1, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    pixel_weight, class_weight = torch.rand(2, 5, 4), torch.tensor([1.0, 2.0, 0.5])

    def two_steps(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logits = F.conv2d(x, weight, bias)
        return uk.weighted_cross_entropy(logits, target, pixel_weight, weight=class_weight, reduction=reduction)

    def one(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return uk.head_cross_entropy(
            x, weight, bias, target, pixel_weight, class_weight=class_weight, reduction=reduction
        )

    results = []
    for call in (two_steps, one):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        loss = call(*leaves)
        results.append([loss, *torch.autograd.grad(loss.sum(), leaves)])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


_Z, _T = torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("logits", "target", "settings", "error", "sentence"),
    [
        (_Z[0], _T, {}, ValueError, r"logits must be 4-D \[N, K, H, W\], got 3-D"),
        (_Z, _T.float(), {}, TypeError, "target must be an integer tensor, got float32; ids are whole numbers"),
        (_Z, _T[:, 1:], {}, ValueError, r"target must have shape \[1, 3, 3\] \(N, H, W of logits\), got \[1, 2, 3\]"),
        (_Z, _T + 2, {}, ValueError, r"target must hold class ids 0 to 1 .* or ignore_index -100, got 2"),
        (_Z, _T - 1, {}, ValueError, "target must hold class ids 0 to 1 .*got -1"),
        (_Z, _T, {"pixel_weight": _T}, TypeError, "pixel_weight must be floating"),
        (_Z, _T, {"pixel_weight": _Z[0]}, ValueError, r"pixel_weight must have shape \[1, 3, 3\]"),
        (_Z, _T, {"weight": torch.ones(3)}, ValueError, r"weight must have shape \[2\] \(one per class"),
        (
            _Z,
            _T,
            {"reduction": "average"},
            ValueError,
            "reduction must be 'none' or 'sum' or 'mean' or 'weighted_mean'",
        ),
        (_Z, _T, {"ignore_index": 1.0}, TypeError, "ignore_index must be a whole number, got 1.0"),
        (_Z, _T, {"ignore_index": 2**70}, ValueError, "ignore_index must fit 64 bits, got 1180591620717411303424"),
        (_Z, _T.to("meta"), {}, ValueError, "target must be on cpu like logits, got meta"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(
    logits: Any, target: Any, settings: Any, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        uk.weighted_cross_entropy(logits, target, **settings)


def test_the_head_refuses_a_weight_that_does_not_fit() -> None:
    x, bias, target = torch.zeros(1, 4, 3, 3), torch.zeros(2), torch.zeros(1, 3, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"weight must have shape \[any, 4, 1, 1\]"):
        uk.head_cross_entropy(x, torch.zeros(2, 3, 1, 1), bias, target)
    with pytest.raises(ValueError, match=r"class_weight must have shape \[2\]"):
        uk.head_cross_entropy(x, torch.zeros(2, 4, 1, 1), bias, target, class_weight=torch.ones(3))
