"""weighted_cross_entropy and head_cross_entropy: torch's cross_entropy for every argument, and what torch lacks."""

import importlib
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import unet_kernels as uk
from tests.proof.memory import LAYOUTS, awkward, guarded_launch
from tests.proof.order import assert_order_does_not_matter
from tests.proof.yardstick import assert_as_close_as, assert_gradient, assert_same_bits
from unet_kernels import reference
from unet_kernels.weighted_cross_entropy import (
    MOST_CHANNELS,
    MOST_CLASSES,
    MOST_HEAD_CLASSES,
    launch_head_cross_entropy_bwd,
    launch_head_cross_entropy_fwd,
    launch_weighted_cross_entropy_bwd,
    launch_weighted_cross_entropy_fwd,
)

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
    # a plain tensor on a CPU goes to ATen's own autograd
    monkeypatch.setattr("unet_kernels._checks.ordinary_on_cpu", lambda tensor: False)
    asked: list[list[bool]] = []
    real = torch.ops.aten.convolution_backward

    def noted(*args: Any) -> Any:
        asked.append(list(args[-1]))
        return real(*args)

    monkeypatch.setattr(torch.ops.aten, "convolution_backward", noted)
    uk.head_cross_entropy(x, weight, bias, target).backward()
    assert asked == [[False, True, False]]


@pytest.mark.parametrize("traced", [False, True], ids=["door", "op"])
def test_second_derivatives_are_torchs(traced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if traced:
        monkeypatch.setattr("unet_kernels._checks.ordinary_on_cpu", lambda tensor: False)
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


# ---- the Triton kernels

# what is compiled ahead of time; before every commit, one of them
AHEAD = [torch.bfloat16, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float32, torch.float16))]


def _module() -> ModuleType:
    # the kernels' place in the package is shadowed by the function of the same name
    return importlib.import_module("unet_kernels.weighted_cross_entropy")


def _both(
    launch: bool, dtype: torch.dtype, maps: tuple[Any, ...], reduction: str, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Loss and gradient in a dtype, by our kernels or by ATen's autograd of the specification."""
    logits, target, pixel_weight, weight = maps
    logits = logits.detach().to(dtype) if logits.dtype != dtype else logits.detach()
    rest = (target, pixel_weight, weight)
    shape = target.shape if reduction == "none" else ()
    dloss = torch.linspace(0.5, 2, target.numel()).reshape(target.shape) if shape else torch.tensor(1.5)
    dloss = dloss.to(logits.device, torch.float64 if dtype == torch.float64 else torch.float32)
    if launch:
        loss, denominator = guarded_launch(launch_weighted_cross_entropy_fwd, logits, *rest, ignore_index, reduction)
        return loss, guarded_launch(launch_weighted_cross_entropy_bwd, dloss, logits, *rest, denominator, ignore_index)
    leaf = logits.clone(memory_format=torch.preserve_format).requires_grad_()
    loss = reference.weighted_cross_entropy(leaf, *rest, ignore_index, reduction)
    return loss.detach(), torch.autograd.grad(loss, leaf, dloss)[0]


# N, K, H, W: of one program and of several, of few classes and of many, of a last block that is not full
SHAPES = {
    "one pixel": (1, 2, 1, 1),
    "one class": (1, 1, 3, 4),
    "cells and background": (2, 2, 7, 9),
    "several programs": (2, 2, 30, 37),
    "a prime of classes": (1, 5, 13, 31),
    "many classes": (1, 200, 3, 5),
    "as many as there may be": (1, 256, 2, 5),
}


def _drawn(shape: tuple[int, ...], *, weighted: bool, device: torch.device) -> tuple[Any, ...]:
    n, k, h, w = shape
    logits = (torch.randn(n, k, h, w, dtype=torch.float64) * 3).to(device)
    target = torch.randint(0, k, (n, h, w)).to(device)
    if h * w > 1:
        target[torch.rand(n, h, w).to(device) < 0.2] = -100
    pixel_weight = (torch.rand(n, h, w) * 10).to(device) if weighted else None
    weight = torch.linspace(0.5, 3, k).to(device) if weighted else None
    return logits, target, pixel_weight, weight


@pytest.mark.interpreter
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("reduction", [*REDUCTIONS, "weighted_mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_are_as_near_as_torch(
    shape: str, dtype: torch.dtype, reduction: str, weighted: bool, device: torch.device
) -> None:
    logits, *rest = _drawn(SHAPES[shape], weighted=weighted, device=device)
    # what a narrow dtype does to the logits is not the loss's doing
    maps = (logits.to(dtype).double(), *rest)
    exact, torchs, ours = (
        _both(launch, kind, maps, reduction) for launch, kind in ((False, torch.float64), (False, dtype), (True, dtype))
    )
    assert_as_close_as(torchs[0], ours[0], exact[0])
    assert_gradient(torchs[1], ours[1], exact[1])
    assert ours[1].stride() == torchs[1].stride()


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_the_kernels_take_any_strides(layout: str, reduction: str, device: torch.device) -> None:
    logits, target, pixel_weight, weight = _drawn((2, 3, 6, 7), weighted=True, device=device)
    want = _both(True, torch.float32, (logits.float(), target, pixel_weight, weight), reduction)
    odd = awkward(logits.float(), layout)
    flipped = target.transpose(1, 2).contiguous().transpose(1, 2)
    got = _both(True, torch.float32, (odd, flipped, pixel_weight.expand(2, 6, 7), weight), reduction)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    # a gradient that is one number for all, as of a sum
    loss, denominator = launch_weighted_cross_entropy_fwd(odd, target, None, None, -100, "none")
    one = launch_weighted_cross_entropy_bwd(
        torch.ones((), device=device).expand(loss.shape), odd, target, None, None, denominator, -100
    )
    whole = launch_weighted_cross_entropy_bwd(torch.ones_like(loss), odd, target, None, None, denominator, -100)
    assert_same_bits(one, whole)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64], ids=str
)
def test_the_kernels_take_any_integers(dtype: torch.dtype, device: torch.device) -> None:
    logits, target = torch.randn(1, 2, 5, 6, device=device), torch.randint(0, 2, (1, 5, 6), device=device)
    for ignore_index in (-100, 1, 2**40):
        want = _both(True, torch.float32, (logits, target, None, None), "mean", ignore_index)
        got = _both(True, torch.float32, (logits, target.to(dtype), None, None), "mean", ignore_index)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.interpreter
@pytest.mark.parametrize("reduction", ["sum", "mean", "weighted_mean"])
def test_the_kernels_give_zero_without_a_valid_pixel(reduction: str, device: torch.device) -> None:
    logits, weight = torch.randn(1, 2, 3, 3, device=device), torch.full((1, 3, 3), torch.nan, device=device)
    target = torch.full((1, 3, 3), -100, device=device)
    loss, gradient = _both(True, torch.float32, (logits, target, weight, None), reduction)
    assert loss.item() == 0
    assert torch.equal(gradient, torch.zeros_like(logits))
    # nor where there is no pixel at all
    empty = (logits[:, :, :0], target[:, :0], None, None)
    assert _both(True, torch.float32, empty, reduction)[0].item() == 0


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nan_and_huge_logits_go_where_the_references_go(device: torch.device) -> None:
    logits, target, pixel_weight, weight = _drawn((1, 3, 6, 7), weighted=True, device=device)
    logits = logits.float()
    logits[0, 0, 0, 0], logits[0, 1, 1, 1], logits[0, 2, 2, 2], logits[0, :, 3, 3] = (
        torch.nan, torch.inf, -torch.inf, -torch.inf,
    )  # fmt: skip
    logits[0, 0, 4], logits[0, 1, 5] = 1e4, -1e4
    target[0, 0, 0], target[0, 2, 2], target[0, 5] = 1, 0, 1
    maps = (logits, target, pixel_weight, weight)
    for ours, theirs in zip(
        _both(True, torch.float32, maps, "none"), _both(False, torch.float32, maps, "none"), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.interpreter
@pytest.mark.parametrize("wrong", [2, -1, 200])
def test_a_class_that_there_is_not_makes_the_loss_nan(wrong: int, device: torch.device) -> None:
    logits, target = torch.randn(1, 2, 4, 4, device=device), torch.zeros(1, 4, 4, dtype=torch.int64, device=device)
    target[0, 1, 2] = wrong
    for weight in (None, torch.ones(2, device=device)):
        for reduction in ("sum", "mean"):
            loss, gradient = _both(True, torch.float32, (logits, target, None, weight), reduction)
            assert loss.isnan()
            assert gradient[0, :, 1, 2].isnan().all()


@pytest.mark.interpreter
def test_the_order_of_programs_does_not_matter(device: torch.device) -> None:
    logits, *rest = _drawn((2, 2, 30, 37), weighted=True, device=device)
    logits = logits.float()
    assert_order_does_not_matter(
        lambda: torch.stack(launch_weighted_cross_entropy_fwd(logits, *rest, -100, "weighted_mean")), seeds=3
    )


@pytest.mark.interpreter
def test_on_cuda_the_ops_take_the_kernels_and_otherwise_say_why_not(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = _module()
    logits, *rest = _drawn((1, 3, 6, 7), weighted=True, device=device)
    logits = logits.float()
    want = _both(False, torch.float32, (logits, *rest), "mean")
    for refusal in ("", "too old"):
        monkeypatch.setattr("unet_kernels._triton.why_not", lambda *about, refusal=refusal: refusal)
        loss, denominator = module._cuda(logits, *rest, -100, "mean")
        gradient = module._backward_cuda(torch.tensor(1.5, device=device), logits, *rest, denominator, -100)
        torch.testing.assert_close((loss, gradient), want, rtol=1e-5, atol=1e-7)


def test_what_the_kernels_cannot_take_is_left_to_torch() -> None:
    assert "classes" in _module().why_not(torch.empty(1, MOST_CLASSES + 1, 2, 2, device="meta"))
    assert "pixels" in _module().why_not(torch.empty(1, 2, 2**16, 2**16, device="meta"))


@pytest.mark.parametrize("classes", [2, *(pytest.param(many, marks=pytest.mark.slow) for many in (16, 256))])
@pytest.mark.parametrize("dtype", AHEAD, ids=str)
def test_compiled_code_is_within_budget(classes: int, dtype: torch.dtype) -> None:
    from tests.proof import aot

    module = _module()
    logits = torch.empty(1, classes, 388, 388, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)
    target = torch.empty(1, 388, 388, dtype=torch.int64, device="meta")
    weight, balance = torch.empty(1, 388, 388, device="meta"), torch.empty(classes, device="meta")
    scalar = torch.empty((), device="meta")
    kernels = {
        "_fwd_kernel": lambda: launch_weighted_cross_entropy_fwd(logits, target, weight, balance, -100, "none"),
        "_bwd_kernel": lambda: launch_weighted_cross_entropy_bwd(scalar, logits, target, weight, balance, scalar, -100),
    }
    for name, call in kernels.items():
        [launch] = aot.recorded(module, name, call)
        for chip in aot.ELEMENTWISE_CHIPS:
            aot.Budget(registers=128, shared_bytes=8192).check(aot.compiled(launch, chip))


# ---- the head's Triton kernels


def _head_of(
    launch: bool, dtype: torch.dtype, maps: tuple[Any, ...], reduction: str, needs: tuple[bool, ...] = (True,) * 3
) -> list[Tensor]:
    """Loss and the gradients of x, weight and bias, by our kernels or by ATen's autograd of the specification."""
    *tensors, target, pixel_weight, class_weight = maps
    tensors = [t.detach().to(dtype) for t in tensors]
    rest = (target, pixel_weight, class_weight)
    dloss = torch.linspace(0.5, 2, target.numel()).reshape(target.shape)
    dloss = (dloss if reduction == "none" else torch.tensor(1.5)).to(target.device)
    if launch:
        loss, denominator = guarded_launch(launch_head_cross_entropy_fwd, *tensors, *rest, -100, reduction)
        gradients = launch_head_cross_entropy_bwd(dloss, *tensors, *rest, denominator, -100, needs)
        return [loss, *gradients]
    leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
    loss = reference.head_cross_entropy(*leaves, *rest, -100, reduction)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, dloss.to(loss.dtype))]


# N, C, K, H, W
HEADS = {
    "one pixel": (1, 4, 2, 1, 1),
    "the paper's": (1, 64, 2, 9, 15),
    "several blocks of several images": (2, 16, 3, 17, 19),
    "few channels": (1, 3, 2, 8, 20),
    "many of both": (1, 100, 12, 5, 7),
}


def _head_maps(shape: tuple[int, ...], *, weighted: bool, device: torch.device) -> tuple[Any, ...]:
    n, c, k, h, w = shape
    x = torch.randn(n, c, h, w, dtype=torch.float64)
    weight, bias = torch.randn(k, c, 1, 1, dtype=torch.float64) / c**0.5, torch.randn(k, dtype=torch.float64)
    _, target, pixel_weight, class_weight = _drawn((n, k, h, w), weighted=weighted, device=device)
    return x.to(device), weight.to(device), bias.to(device), target, pixel_weight, class_weight


@pytest.mark.interpreter
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("reduction", ["none", "mean", "weighted_mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", HEADS)
def test_the_heads_kernels_are_as_near_as_torch(
    shape: str, dtype: torch.dtype, reduction: str, weighted: bool, device: torch.device
) -> None:
    *tensors, target, pixel_weight, class_weight = _head_maps(HEADS[shape], weighted=weighted, device=device)
    maps = (*(t.to(dtype).double() for t in tensors), target, pixel_weight, class_weight)
    exact, torchs, ours = (
        _head_of(launch, kind, maps, reduction)
        for launch, kind in ((False, torch.float64), (False, dtype), (True, dtype))
    )
    assert_as_close_as(torchs[0], ours[0], exact[0])
    for theirs, got, want in zip(torchs[1:], ours[1:], exact[1:], strict=True):
        assert_gradient(theirs, got, want)
    assert ours[1].stride() == tensors[0].stride()


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_heads_kernels_take_any_strides(layout: str, device: torch.device) -> None:
    x, *rest = _head_maps((2, 5, 3, 6, 7), weighted=True, device=device)
    want = _head_of(True, torch.float32, (x, *rest), "mean")
    got = _head_of(True, torch.float32, (awkward(x.float(), layout), *rest), "mean")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.interpreter
@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_the_heads_kernels_make_only_what_is_needed(needs: tuple[bool, ...], device: torch.device) -> None:
    maps = _head_maps((1, 5, 2, 6, 7), weighted=True, device=device)
    want, got = _head_of(True, torch.float32, maps, "sum"), _head_of(True, torch.float32, maps, "sum", needs)
    for needed, all_of_it, part in zip(needs, want[1:], got[1:], strict=True):
        if needed:
            assert_same_bits(part, all_of_it)
        else:
            assert part.numel() == 0


@pytest.mark.interpreter
def test_one_program_of_the_head_takes_many_blocks_in_order(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = _head_maps((2, 4, 2, 20, 30), weighted=True, device=device)
    want = _head_of(True, torch.float32, maps, "mean")
    monkeypatch.setattr(_module(), "HEAD_PROGRAMS", 3)
    got = _head_of(True, torch.float32, maps, "mean")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    again = _head_of(True, torch.float32, maps, "mean")
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.interpreter
@pytest.mark.parametrize("size", [1e-8, 1e-4, 1e6])
def test_shares_that_float16_does_not_hold_are_not_lost_by_the_head(size: float, device: torch.device) -> None:
    # float16 ends at 6e-8 and at 65504
    x, weight, bias, target, *_ = _head_maps((1, 16, 2, 24, 24), weighted=False, device=device)
    pixel_weight = size * (1 + torch.rand(target.shape)).to(device)
    maps = (x, weight, bias, target, pixel_weight, None)
    # divided by the weights themselves, so that float16 holds the results
    exact, ours = (
        _head_of(launch, dtype, maps, "weighted_mean")
        for launch, dtype in ((False, torch.float64), (True, torch.float16))
    )
    for got, want in zip(ours[1:], exact[1:], strict=True):
        assert ((got.double() - want).norm() / want.norm()).item() < 5e-3


@pytest.mark.interpreter
def test_a_gradient_of_an_ignored_pixels_loss_does_not_matter(device: torch.device) -> None:
    x, weight, bias, target, pixel_weight, class_weight = _head_maps((1, 5, 2, 6, 7), weighted=True, device=device)
    tensors, rest = [t.float() for t in (x, weight, bias)], (target, pixel_weight, class_weight)
    dloss = torch.where(target == -100, torch.nan, 1.0)
    one = torch.ones((), device=device)
    for gradient in launch_head_cross_entropy_bwd(dloss, *tensors, *rest, one, -100, (True,) * 3):
        assert gradient.isfinite().all()
    logits = F.conv2d(*tensors)
    assert launch_weighted_cross_entropy_bwd(dloss, logits, *rest, one, -100).isfinite().all()
    assert _module()._logits_gradient(dloss, logits, *rest, one, -100).isfinite().all()
    leaf = logits.detach().requires_grad_()
    loss = uk.weighted_cross_entropy(leaf, target, pixel_weight, weight=class_weight, reduction="none")
    assert torch.autograd.grad(loss, leaf, dloss)[0].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("pixel_weight", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_ops_and_their_fakes_agree_about_strides(pixel_weight: bool, channels_last: bool) -> None:
    target = torch.randint(0, 3, (2, 6, 5)).transpose(1, 2)
    weights = torch.rand(2, 6, 5).transpose(1, 2) if pixel_weight else None
    logits, head = torch.randn(2, 3, 5, 6, requires_grad=True), torch.randn(3, 4, 1, 1, requires_grad=True)
    x, bias = torch.randn(2, 4, 6, 5).transpose(2, 3).requires_grad_(), torch.randn(3, requires_grad=True)
    if channels_last:
        head = head.detach().to(memory_format=torch.channels_last).requires_grad_()
    arguments = (target, weights, None, -100, "none")
    torch.library.opcheck(torch.ops.unet.weighted_cross_entropy.default, (logits, *arguments))
    torch.library.opcheck(torch.ops.unet.head_cross_entropy.default, (x, head, bias, *arguments))
    loss, _ = torch.ops.unet.head_cross_entropy(x, head, bias, *arguments)
    assert loss.is_contiguous()
    dx, *_ = torch.autograd.grad(loss.sum(), (x, head, bias))
    assert dx.stride() == x.stride()


def test_the_fallback_on_cuda_computes_outside_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    module = _module()
    monkeypatch.setattr(module, "head_why_not", lambda *about: "no")
    maps = [t.float() if t is not None and t.is_floating_point() else t
            for t in _head_maps((1, 5, 2, 6, 7), weighted=True, device=torch.device("cpu"))]  # fmt: skip
    loss, denominator = module._head_cuda(*maps, -100, "mean")
    want = module._head_backward_cuda(torch.tensor(1.5), *maps, denominator, -100, [True] * 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module._head_cuda(*maps, -100, "mean")[0], loss)
        got = module._head_backward_cuda(torch.tensor(1.5), *maps, denominator, -100, [True] * 3)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nan_goes_where_the_references_goes_through_the_head(device: torch.device) -> None:
    maps = _head_maps((1, 5, 2, 6, 7), weighted=True, device=device)
    maps[0][0, 2, 1, 1], maps[3][0, 1, 1] = torch.nan, 1
    ours, theirs = (_head_of(launch, torch.float32, maps, "none") for launch in (True, False))
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.interpreter
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_head_of_nothing_is_zero(reduction: str, device: torch.device) -> None:
    x, weight, bias, target, *_ = _head_maps((1, 5, 2, 6, 7), weighted=False, device=device)
    empty = (x[:, :, :0], weight, bias, target[:, :0], None, None)
    loss, dx, dweight, dbias = _head_of(True, torch.float32, empty, reduction)
    assert loss.item() == 0
    assert dx.shape == (1, 5, 0, 7)
    assert not dweight.any()
    assert not dbias.any()
    assert dweight.shape == weight.shape


@pytest.mark.interpreter
def test_on_cuda_the_heads_ops_take_the_kernels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    module = _module()
    maps = [
        t.float() if t is not None and t.is_floating_point() else t
        for t in _head_maps((1, 5, 2, 6, 7), weighted=True, device=device)
    ]
    want = _head_of(False, torch.float32, tuple(maps), "mean")
    for refusal in ("", "too old"):
        monkeypatch.setattr(module, "head_why_not", lambda *about, refusal=refusal: refusal)
        loss, denominator = module._head_cuda(*maps, -100, "mean")
        gradients = module._head_backward_cuda(
            torch.tensor(1.5, device=device), *maps, denominator, -100, [True, True, True]
        )
        torch.testing.assert_close([loss, *gradients], want, rtol=1e-5, atol=1e-6)


def test_what_the_heads_kernels_cannot_take_is_left_to_torch() -> None:
    why_not = _module().head_why_not
    x, weight = torch.empty(1, 4, 2, 2), torch.empty(2, 4, 1, 1)
    assert "channels" in why_not(torch.empty(1, MOST_CHANNELS + 1, 2, 2), weight)
    assert "classes" in why_not(x, torch.empty(MOST_HEAD_CLASSES + 1, 4, 1, 1))
    assert "cpu" in why_not(x, weight)


def test_second_derivatives_of_the_head() -> None:
    _, target = _maps()
    x = torch.randn(2, 4, 5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, 1, 1, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradgradcheck(lambda *tensors: uk.head_cross_entropy(*tensors, target), (x, weight, bias))


@pytest.mark.parametrize(("channels", "classes"), [(64, 2), pytest.param(128, 16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", AHEAD, ids=str)
def test_compiled_code_of_the_head_is_within_budget(channels: int, classes: int, dtype: torch.dtype) -> None:
    from tests.proof import aot

    module = _module()
    x = torch.empty(1, channels, 388, 388, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)
    head = (
        torch.empty(classes, channels, 1, 1, dtype=dtype, device="meta"),
        torch.empty(classes, dtype=dtype, device="meta"),
    )
    target = torch.empty(1, 388, 388, dtype=torch.int64, device="meta")
    weight, balance = torch.empty(1, 388, 388, device="meta"), torch.empty(classes, device="meta")
    scalar, rest = torch.empty((), device="meta"), (target, weight, balance)
    kernels = {
        "_head_fwd_kernel": lambda: launch_head_cross_entropy_fwd(x, *head, *rest, -100, "none"),
        "_head_bwd_kernel": lambda: launch_head_cross_entropy_bwd(
            scalar, x, *head, *rest, scalar, -100, (True, True, True)
        ),
    }
    for name, call in kernels.items():
        [launch] = aot.recorded(module, name, call)
        for chip in aot.CHIPS:
            aot.Budget(registers=255).check(aot.compiled(launch, chip))


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["none", "weighted_mean"])
def test_the_derivatives_are_well_formed_operators(reduction: str) -> None:
    x, weight, bias, target, pixel_weight, class_weight = _head_maps(
        (1, 5, 3, 4, 6), weighted=True, device=torch.device("cpu")
    )
    logits = F.conv2d(x, weight, bias)
    loss = reference.weighted_cross_entropy(logits, target, pixel_weight, class_weight, -100, reduction)
    denominator = reference.denominator(logits, target, pixel_weight, class_weight, -100, reduction)
    dloss, rest = torch.rand_like(loss), (target, pixel_weight, class_weight, denominator, -100)
    torch.library.opcheck(torch.ops.unet.weighted_cross_entropy_backward.default, (dloss, logits, *rest))
    for needs in ([True, True, True], [False, True, False]):
        torch.library.opcheck(
            torch.ops.unet.head_cross_entropy_backward.default, (dloss, x, weight, bias, *rest, needs)
        )
