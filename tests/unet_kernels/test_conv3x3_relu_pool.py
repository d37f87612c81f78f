"""conv3x3_relu_pool: a window of the convolution and the maxima of all of it, in one pass or in two, the same."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import unet_kernels as uk
from tests.proof.properties import given, st
from unet_kernels import _choosing, _triton, reference

pytestmark = pytest.mark.usefixtures("on_device")

one_pass = pytest.mark.skipif(not _triton.INTERPRETED, reason="one pass is a kernel of ours")


def _made(c_in: int = 16, h: int = 10, w: int = 13, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    x, weight, bias = torch.randn(2, c_in, h, w), torch.randn(8, c_in, 3, 3) / (3 * c_in**0.5), torch.randn(8)
    layout = torch.channels_last
    return [x.to(dtype, memory_format=layout), weight.to(dtype, memory_format=layout), bias.to(dtype)]


@given(h=st.integers(4, 9), w=st.integers(4, 9), rows=st.integers(1, 7), columns=st.integers(1, 7), relu=st.booleans())
def test_it_is_the_window_and_the_maxima(h: int, w: int, rows: int, columns: int, relu: bool) -> None:
    x, weight, bias = _made(3, h, w, torch.float64)
    rows, columns = min(rows, h - 2), min(columns, w - 2)
    window, pooled = uk.conv3x3_relu_pool(x, weight, bias, rows=rows, columns=columns, relu=relu)
    y = F.conv2d(x, weight, bias)
    y = torch.relu(y) if relu else y
    top, left = (h - 2 - rows) // 2, (w - 2 - columns) // 2
    torch.testing.assert_close(window, y[:, :, top : top + rows, left : left + columns], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pooled, F.max_pool2d(y, 2), rtol=1e-12, atol=1e-12)


def test_its_gradient_is_that_of_the_two() -> None:
    def gradients(call: Any) -> Any:
        torch.manual_seed(3)
        leaves = [t.double().requires_grad_() for t in _made()]
        window, pooled = call(*leaves)
        return torch.autograd.grad(window.sin().sum() + pooled.cos().sum(), leaves)

    def apart(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        y = torch.relu(F.conv2d(x, weight, bias))
        return y[:, :, 2:6, 3:8], F.max_pool2d(y, 2)

    for a, b in zip(gradients(lambda *t: uk.conv3x3_relu_pool(*t, rows=4, columns=5)), gradients(apart), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_on_a_cpu_the_window_is_a_view_and_nothing_is_copied() -> None:
    with torch.no_grad():
        window, _ = uk.conv3x3_relu_pool(*_made(), rows=4, columns=5)
    assert window._base is not None or window.untyped_storage().nbytes() > 4 * window.numel()


def test_it_compiles_and_exports_as_the_two() -> None:
    class Net(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Any:
            return uk.conv3x3_relu_pool(x, weight, bias, rows=4, columns=5)

    tensors = tuple(_made())
    want = Net()(*tensors)
    with torch.no_grad():
        for net in (
            torch.export.export(Net(), tensors).module(),
            torch.compile(Net(), backend="aot_eager", fullgraph=True),
        ):
            for a, b in zip(net(*tensors), want, strict=True):
                torch.testing.assert_close(a, b)


def test_the_operator_is_well_formed() -> None:
    x, weight, bias = _made()
    torch.library.opcheck(
        torch.ops.unet.conv3x3_relu_pool, (x, weight, bias, True, 4, 5), test_utils=("test_schema", "test_faketensor")
    )


def _in_one_pass(tensors: list[Tensor], **sizes: int) -> tuple[Any, list[Any]]:
    with uk.using("ours"), uk.recorded() as record:
        return uk.conv3x3_relu_pool(*tensors, **sizes), record


@pytest.mark.interpreter
@one_pass
def test_ours_makes_both_in_one_pass_where_no_gradient_is_wanted() -> None:
    tensors = _made()
    with torch.no_grad():
        (window, pooled), record = _in_one_pass(tensors, rows=4, columns=5)
    assert [op for op, _, _ in record] == ["conv3x3_relu_pool"]
    want = reference.conv3x3_relu_pool(*tensors, True, 4, 5)
    torch.testing.assert_close(window, want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pooled, want[1], rtol=1e-5, atol=1e-5)
    # nothing else of the convolution is kept alive
    assert window.untyped_storage().nbytes() == 4 * window.numel()


@pytest.mark.interpreter
@one_pass
def test_ours_takes_two_passes_where_a_gradient_is_wanted() -> None:
    tensors = [t.requires_grad_() for t in _made()]
    (window, pooled), record = _in_one_pass(tensors, rows=4, columns=5)
    assert [op for op, _, _ in record] == ["conv3x3_relu", "max_pool2x2"]
    (window.sum() + pooled.sum()).backward()
    assert all(t.grad is not None for t in tensors)


_X, _W, _B = torch.zeros(1, 2, 6, 7), torch.zeros(3, 2, 3, 3), torch.zeros(3)


@pytest.mark.parametrize(
    ("x", "rows", "columns", "sentence"),
    [
        (_X, 5, 5, "rows must be between 1 and those of y, 4, got 5"),
        (_X, 4, 0, "columns must be between 1 and those of y, 5, got 0"),
        (_X[:, :, :3], 1, 1, "x must be at least 4x4, so that y has two rows and columns, got 3x7"),
        (_X[:, :1], 4, 5, r"weight must have shape \[any, 1, 3, 3\] \(C_in is the channels of x\)"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(x: Tensor, rows: int, columns: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        uk.conv3x3_relu_pool(x, _W, _B, rows=rows, columns=columns)


def test_it_is_decided_in_the_dtype_it_will_have(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[object, ...]] = []

    def decide(question: object, device: torch.device, arguments: tuple[Tensor, ...]) -> _choosing.Way:
        seen.append((*(t.dtype for t in arguments[:3]), torch.is_autocast_enabled("cpu")))
        return _choosing.Way("apart", lambda *_: None, False)

    monkeypatch.setattr(_choosing, "decide", decide)
    monkeypatch.setattr(_choosing, "asked", lambda device: True)
    monkeypatch.setattr(_triton, "why_no_dot", lambda device, dtype: "")
    x, weight, bias = torch.rand(1, 16, 8, 8).bfloat16(), torch.rand(16, 16, 3, 3), torch.rand(16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        uk.one_pass_pays(x, weight, bias, rows=4, columns=4)
    assert seen == [(torch.bfloat16, torch.bfloat16, torch.bfloat16, False)]
