"""What is asked of every op alike: one schema that opcheck, gradcheck, torch.compile and torch.export agree with."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import unet_kernels as uk
from tests.unet_kernels.cases import CASES, Case

pytestmark = pytest.mark.usefixtures("on_device")

every_op = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
differentiable = {name: case for name, case in CASES.items() if case.differentiable}
every_differentiable_op = pytest.mark.parametrize("case", differentiable.values(), ids=differentiable.keys())


def _leaves(result: Any) -> list[Tensor]:
    return pytree.tree_leaves(result)


def _assert_equal(a: Any, b: Any) -> None:
    for x, y in zip(_leaves(a), _leaves(b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def _floating(result: Any) -> list[Tensor]:
    return [t for t in _leaves(result) if t.is_floating_point()]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    # every case compiles one and the same lambda, which is not what the recompilation limit is about
    torch._dynamo.reset()


class _Recorded(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the unet ops that a call dispatches, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "unet":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def _op_arguments(case: Case, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, tuple[Any, ...]]:
    """The op that the public function calls, and the arguments it hands over."""
    monkeypatch.setattr("unet_kernels._checks.ordinary_on_cpu", lambda tensor: False)
    with _Recorded() as seen:
        case(case.tensors(torch.float64))
    return next((func, args) for func, args in seen.calls if case.op in func.name())


@pytest.mark.slow
@every_op
def test_operator_is_well_formed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    op, args = _op_arguments(case, monkeypatch)
    floating = set(case.differentiable)
    names = [a.name for a in op._schema.arguments]
    args = tuple(
        a.detach().clone(memory_format=torch.preserve_format).requires_grad_(n in floating)
        if isinstance(a, Tensor)
        else a
        # what has a default is not among what the door hands over
        for n, a in zip(names, args, strict=False)
    )
    torch.library.opcheck(op, args)


@every_op
def test_every_op_has_a_schema_under_its_own_name(case: Case) -> None:
    assert case.op in uk.OPS
    assert hasattr(torch.ops.unet, case.op)


@every_differentiable_op
def test_gradient_is_the_derivative(case: Case) -> None:
    tensors = case.tensors(torch.float64, grad=True)
    names = list(tensors)

    def call(*values: Tensor) -> list[Tensor]:
        return _floating(case(dict(zip(names, values, strict=True))))

    assert torch.autograd.gradcheck(call, tuple(tensors.values()), nondet_tol=0.0, atol=1e-6)


@every_differentiable_op
def test_the_op_and_the_door_have_one_derivative(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    # on a plain CPU tensor the door may hand straight to ATen's autograd; the op must agree with it
    def gradients() -> list[Tensor]:
        torch.manual_seed(1)
        tensors = case.tensors(torch.float64, grad=True)
        results = _floating(case(tensors))
        wanted = [tensors[n] for n in case.differentiable]
        return list(torch.autograd.grad([r.sum() for r in results], wanted))

    through_the_door = gradients()
    monkeypatch.setattr("unet_kernels._checks.ordinary_on_cpu", lambda tensor: False)
    _assert_equal(through_the_door, gradients())


@pytest.mark.parametrize(
    ("case", "name"), [pytest.param(c, n, id=f"{i} {n}") for i, c in differentiable.items() for n in c.differentiable]
)
def test_only_the_gradient_that_is_wanted(case: Case, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unet_kernels._checks.ordinary_on_cpu", lambda tensor: False)
    tensors = case.tensors(torch.float64, grad=True)
    everything = torch.autograd.grad(sum(r.sum() for r in _floating(case(tensors))), tensors[name])
    alone = {n: t.detach().requires_grad_(n == name) for n, t in tensors.items() if t.is_floating_point()}
    result = case({**tensors, **alone})
    _assert_equal(everything, torch.autograd.grad(sum(r.sum() for r in _floating(result)), alone[name]))


@pytest.mark.slow
@every_op
def test_compiles_in_one_graph(case: Case) -> None:
    tensors = case.tensors(grad=True)
    compiled = torch.compile(lambda t: case(t), backend="aot_eager", fullgraph=True)
    _assert_equal(compiled(tensors), case(tensors))


@pytest.mark.slow
@every_differentiable_op
def test_compiled_gradients_are_the_eager_ones(case: Case) -> None:
    compiled = torch.compile(lambda t: case(t), backend="aot_eager", fullgraph=True)
    gradients = []
    for call in (compiled, case):
        tensors = case.tensors(grad=True)
        torch.manual_seed(1)
        results = _floating(call({n: t.detach().requires_grad_(t.requires_grad) for n, t in tensors.items()}))
        assert all(r.requires_grad for r in results)
        fixed = {n: t.detach().requires_grad_(n in case.differentiable) for n, t in _fixed(case).items()}
        total = sum(r.sum() for r in _floating(call(fixed)))
        gradients.append(torch.autograd.grad(total, [fixed[n] for n in case.differentiable]))
    _assert_equal(gradients[0], gradients[1])


def _fixed(case: Case) -> dict[str, Tensor]:
    torch.manual_seed(2)
    return case.tensors()


@every_op
def test_exports(case: Case) -> None:
    class Net(torch.nn.Module):
        def forward(self, tensors: dict[str, Tensor]) -> Any:
            return case(tensors)

    tensors = _fixed(case)
    exported = torch.export.export(Net(), (tensors,))
    targets = {str(node.target) for node in exported.graph.nodes}
    assert f"unet.{case.op}.default" in targets
    _assert_equal(exported.module()(tensors), case(tensors))


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_fake_and_real_agree_in_shape_dtype_and_strides(case: Case, dtype: torch.dtype) -> None:
    tensors = case.tensors(dtype)
    real = _leaves(case(tensors))
    with FakeTensorMode() as mode:
        fake = _leaves(case({n: mode.from_tensor(t) for n, t in tensors.items()}))
    assert [(f.shape, f.dtype, f.stride()) for f in fake] == [(r.shape, r.dtype, r.stride()) for r in real]


@every_differentiable_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_one_dtype_real_and_fake(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    tensors = case.tensors(grad=True)
    with torch.autocast(device.type, dtype=dtype):
        real = _floating(case(tensors))
        with FakeTensorMode() as mode:
            fake = _floating(case({n: mode.from_tensor(t) for n, t in tensors.items()}))
    convolves = case.op.startswith(("conv", "up_conv"))
    assert real[0].dtype == (dtype if convolves else torch.float32)
    assert [f.dtype for f in fake] == [r.dtype for r in real]
    sum(r.float().sum() for r in real).backward()
    assert all(tensors[n].grad.dtype == torch.float32 for n in case.differentiable)


@every_op
def test_an_expanded_gradient_is_accepted(case: Case) -> None:
    # .sum().backward() hands over a gradient whose strides are all 0
    tensors = case.tensors(grad=bool(case.differentiable))
    result = _floating(case(tensors))
    if not case.differentiable:
        assert not any(r.requires_grad for r in result)
        return
    sum(r.sum() for r in result).backward()
    assert all(tensors[n].grad is not None and tensors[n].grad.isfinite().all() for n in case.differentiable)


@every_op
def test_inputs_are_not_changed(case: Case) -> None:
    tensors = case.tensors()
    before = {n: t.clone() for n, t in tensors.items()}
    case(tensors)
    assert all(torch.equal(before[n], tensors[n]) for n in tensors)


@pytest.mark.slow
def test_inductor_compiles_a_training_step(no_compiler: str) -> None:
    if no_compiler:
        pytest.skip(no_compiler)
    from unet_fast import FastUNet

    net = FastUNet(features=(4, 8), up_mode="resize")
    x, target = torch.rand(1, 1, 36, 36), torch.randint(0, 2, (1, 20, 20))

    def loss(x: Tensor) -> Tensor:
        return uk.weighted_cross_entropy(net(x), target, torch.rand(1, 20, 20).fill_(2.0))

    want = torch.autograd.grad(loss(x), list(net.parameters()))
    compiled = torch.compile(loss, fullgraph=True)
    _assert_equal(torch.autograd.grad(compiled(x), list(net.parameters())), want)
