"""What the ops' gradients promise together: masks, second derivatives, tracing; not what each kernel computes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import unet_kernels as uk
from tests.proof.memory import awkward
from unet_kernels import _choosing, reference

pytestmark = pytest.mark.usefixtures("on_device")


def _maps(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    shapes = {"x": (2, 5, 8, 7), "w3": (6, 5, 3, 3), "w1": (3, 5, 1, 1), "deconv": (5, 4, 2, 2), "resize": (4, 5, 2, 2)}
    made = {name: awkward(torch.randn(shape).to(dtype), "channels_last") for name, shape in shapes.items()}
    return made | {"x": made["x"].relu_()}


READERS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "conv3x3_relu": ("w3", lambda x, w, **how: uk.conv3x3_relu(x, w, w.new_zeros(6), **how)),
    "conv3x3_relu without relu": ("w3", lambda x, w, **how: uk.conv3x3_relu(x, w, w.new_zeros(6), relu=False, **how)),
    "conv1x1": ("w1", lambda x, w, **how: uk.conv1x1(x, w, w.new_zeros(3), **how)),
    "up_conv deconv": ("deconv", lambda x, w, **how: uk.up_conv(x, w, w.new_zeros(4), mode="deconv", **how)),
    "up_conv resize": ("resize", lambda x, w, **how: uk.up_conv(x, w, w.new_zeros(4), mode="resize", **how)),
}
every_reader = pytest.mark.parametrize(("weight", "call"), READERS.values(), ids=READERS)


@every_reader
def test_a_reader_that_promises_masks_hands_back_a_masked_gradient(weight: str, call: Callable[..., Tensor]) -> None:
    tensors = _maps()
    pair = []
    for how in ({}, {"mask_dx": True}):
        x, w = (tensors[name].detach().clone().requires_grad_() for name in ("x", weight))
        y = call(x, w, **how)
        pair.append((y.detach(), *torch.autograd.grad(y.square().sum(), [x, w])))
    (y, dx, dw), (y_masked, dx_masked, dw_masked) = pair
    torch.testing.assert_close(y, y_masked)
    torch.testing.assert_close(dx_masked, torch.where(tensors["x"] <= 0, 0, dx))
    torch.testing.assert_close(dw, dw_masked)


@every_reader
def test_a_chain_of_promises_is_the_derivative(weight: str, call: Callable[..., Tensor]) -> None:
    tensors = _maps()
    below = torch.randn(5, 5, 3, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    pair = []
    for first, second in (({}, {}), ({"dy_masked": True}, {"mask_dx": True})):
        leaves = [t.detach().clone().requires_grad_() for t in (tensors["x"], *below, tensors[weight])]
        hidden = uk.conv3x3_relu(*leaves[:3], **first)
        pair.append(torch.autograd.grad(call(hidden, leaves[3], **second).square().sum(), leaves))
    for a, b in zip(*pair, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@every_reader
def test_a_chain_of_promises_has_second_derivatives(weight: str, call: Callable[..., Tensor]) -> None:
    # what a second derivative adds to the map between must pass the mask, too
    tensors = _maps()
    below = torch.randn(5, 5, 3, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    pair = []
    for first, second in (({}, {}), ({"dy_masked": True}, {"mask_dx": True})):
        leaves = [t.detach().clone().requires_grad_() for t in (tensors["x"], *below, tensors[weight])]
        y = call(uk.conv3x3_relu(*leaves[:3], **first), leaves[3], **second)
        gradients = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        pair.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves))
    for a, b in zip(*pair, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_window_and_pool_keep_their_promise_under_a_compiler() -> None:
    x = torch.randn(1, 3, 6, 7).relu_()
    # a ReLU's result at its kink, where the maximum of a window is zero
    x[:, :, :2] = 0

    def gradient(call: Callable[..., Any]) -> Tensor:
        leaf = x.clone().requires_grad_()
        window, pooled = call(leaf)
        return torch.autograd.grad((window.sum() + 2 * pooled.sum()), leaf)[0]

    def both(t: Tensor) -> Any:
        return uk.window_and_pool(t, rows=6, columns=3, mask_dx=True)

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradient(both), gradient(compiled))


def test_masked_dy_needs_no_result_to_be_kept() -> None:
    kept: list[Tensor] = []
    tensors = _maps(torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = uk.conv3x3_relu(tensors["x"], tensors["w3"].requires_grad_(), torch.zeros(6), dy_masked=True)
    assert y.data_ptr() not in {t.data_ptr() for t in kept}


def test_a_second_derivative_is_atens_and_refused_where_ours_is_wanted() -> None:
    x, w = torch.randn(1, 2, 5, 5, dtype=torch.float64), torch.randn(3, 2, 3, 3, dtype=torch.float64)

    def penalised(kernels: str) -> Tensor:
        leaf, weight = (t.to(torch.float32).requires_grad_() for t in (x, w))
        y = torch.ops.unet.conv3x3_relu(leaf, weight, torch.zeros(3), True)
        with uk.using(kernels):
            (dx,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
            return torch.autograd.grad(dx.square().sum(), weight)[0]

    leaf, weight = (t.detach().clone().float().requires_grad_() for t in (x, w))
    (dx,) = torch.autograd.grad(F.conv2d(leaf, weight).relu().square().sum(), leaf, create_graph=True)
    torch.testing.assert_close(penalised("automatic"), torch.autograd.grad(dx.square().sum(), weight)[0])
    with pytest.raises(RuntimeError, match="derived again \\(create_graph=True\\) has no kernel of ours"):
        penalised("ours")


def _calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    tensors = _maps(torch.float32)
    x, ops = tensors["x"], torch.ops.unet
    dz, dy = torch.randn(2, 6, 6, 5), torch.randn(2, 4, 16, 14)
    window, pooled = torch.randn(2, 5, 4, 3), torch.randn(2, 5, 4, 3)
    return {
        "conv3x3_dx": (ops.conv3x3_dx, (dz, tensors["w3"], x, True, 0)),
        "conv3x3_dx of two maps": (ops.conv3x3_dx, (dz, tensors["w3"], x[:, 2:], False, 2)),
        "dweight": (ops.dweight, (dz, tensors["w3"], True, x, None, False)),
        "dweight of two maps": (ops.dweight, (dz, tensors["w3"], False, x[:, :2], x[:, 2:], False)),
        "dweight in float32": (ops.dweight, (dz.half(), tensors["w3"], True, x.half(), None, False)),
        "dweight of a deconvolution": (ops.dweight, (dy, tensors["deconv"], True, x, None, True)),
        "up_conv_dx deconv": (ops.up_conv_dx, (dy, tensors["deconv"], x, True, "deconv")),
        "up_conv_dx resize": (ops.up_conv_dx, (dy, tensors["resize"], x, True, "resize")),
        "up_conv_resize_dweight": (ops.up_conv_resize_dweight, (dy, tensors["resize"], x)),
        "conv1x1_dx": (ops.conv1x1_dx, (torch.randn(2, 3, 8, 7), tensors["w1"], x, True)),
        "max_pool2x2_dx": (ops.max_pool2x2_dx, (torch.randn(2, 5, 4, 3), x, window, True)),
        "max_pool2x2_dx alone": (ops.max_pool2x2_dx, (pooled, x.contiguous(), None, False)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", list(_calls()))
def test_every_gradient_is_a_well_formed_op(name: str) -> None:
    op, arguments = _calls()[name]
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.interpreter
@pytest.mark.parametrize("name", list(_calls()))
def test_ours_and_atens_agree_and_lie_alike(name: str) -> None:
    op, arguments = _calls()[name]
    with uk.using("reference"):
        want = op(*arguments)
    with uk.using("ours"):
        got = op(*arguments)
    for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (want, got)), strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


@pytest.mark.interpreter
@pytest.mark.slow
def test_compiled_code_derives_by_our_ops() -> None:
    x, w, bias = torch.randn(1, 16, 8, 9), torch.randn(16, 16, 3, 3) / 12, torch.zeros(16)

    def gradients(call: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in (x, w, bias)]
        return list(torch.autograd.grad(call(*leaves).square().sum(), leaves))

    want = gradients(lambda *t: reference.conv3x3_relu(*t))
    with uk.using("ours"), uk.recorded() as record:
        got = gradients(torch.compile(lambda *t: uk.conv3x3_relu(*t), backend="aot_eager", fullgraph=True))
    assert {op for op, _, _ in record} == {"conv3x3_relu", "conv3x3_dx", "conv3x3_dweight"}
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_choice_of_gradients_is_there_where_there_is_one_of_ways() -> None:
    x = torch.zeros(1, 1, 4, 4)
    assert not uk.chooses_derivatives(x)
    with uk.using("ours"):
        # no interpreter, no kernel: on a CPU there is nothing to choose, and it says so when it is asked to compute
        assert uk.chooses_derivatives(x) == (_choosing._triton.why_no_dot(x.device, x.dtype) == "")
        with torch.no_grad():
            assert not uk.chooses_derivatives(x)
