"""Replayed: the net's own bits, captured once for one shape, and never where it cannot be trusted.

No GPU is needed: a CPU tensor says it lies on one, and a graph that is replayed calls what was captured.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import unet_kernels
from unet_fast import FastUNet, Replayed, ReplayedStep, replay
from unet_kernels import _choosing


class _OnGpu(Tensor):
    """A CPU tensor that claims to be on a GPU."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0)


def _x(side: int = 36, batch: int = 1) -> Tensor:
    return torch.rand(batch, 1, side, side).as_subclass(_OnGpu)


class _Net(FastUNet):
    """Counts its calls, takes CPU tensors for what they are."""

    def __init__(self) -> None:
        super().__init__(features=(4, 8))
        self.calls = 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        assert _choosing._here.by_device_time, "called by other kernels than replayed"
        return super().forward(x.as_subclass(Tensor))


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A number for each capture: how often it was replayed."""
    replays: list[int] = []

    def captured(work: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, Callable[[], Any]]:
        result, number = work(), len(replays)
        replays.append(0)

        def again() -> None:
            replays[number] += 1
            result.copy_(work())

        return result, again

    monkeypatch.setattr(replay, "captured", captured)
    return replays


def test_from_some_call_on_a_graph_is_replayed_and_gives_the_nets_bits(captures: list[int]) -> None:
    net = _Net()
    replayed = Replayed(net, after=3)
    inputs = [_x() for _ in range(6)]
    results = [replayed(x) for x in inputs]
    # one replay was the look whether its bits are the net's
    assert captures == [1 + 3]
    with torch.no_grad(), _choosing.by_device_time():
        for x, result in zip(inputs, results, strict=True):
            assert torch.equal(result, net(x))


def test_a_result_is_the_callers_own(captures: list[int]) -> None:
    replayed = Replayed(_Net(), after=0)
    first = replayed(_x())
    before = first.clone()
    replayed(_x())
    assert torch.equal(first, before)


def test_one_shape_is_captured_and_others_are_called(captures: list[int]) -> None:
    net = _Net()
    replayed = Replayed(net, after=1)
    for x in (_x(36), _x(36), _x(44), _x(44), _x(44), _x(36), _x(36, batch=2)):
        assert replayed(x).shape[2] == x.shape[2] - 16
    assert captures == [1 + 2]


def test_on_a_cpu_the_net_is_called() -> None:
    net = FastUNet(features=(4, 8)).eval()
    x = torch.rand(1, 1, 36, 36)
    replayed = Replayed(net, after=0)
    result = replayed(x)
    assert torch.equal(result, net(x))
    assert not result.requires_grad
    assert not replayed.refused


@pytest.mark.parametrize("captured_before", [False, True])
@pytest.mark.parametrize("how", ["training", "hook", "autocast"])
def test_what_a_graph_would_not_repeat_is_called(
    how: str, captured_before: bool, captures: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = _Net()
    replayed = Replayed(net, after=0)
    if captured_before:
        replayed(_x())
    before, replays = net.calls, list(captures)
    if how == "training":
        net.train()
    elif how == "hook":
        net.head.register_forward_hook(lambda *_: None)
    else:
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    replayed(_x())
    assert net.calls == before + 1
    assert captures == replays
    assert not replayed.refused


def test_what_decides_the_bits_besides_the_input_is_part_of_the_shape(captures: list[int]) -> None:
    net = _Net()
    replayed = Replayed(net, after=0)
    replayed(_x())
    before = net.calls
    with unet_kernels.using("reference"):
        replayed(_x())
    assert net.calls == before + 1
    assert captures == [1 + 1]


def test_another_module_is_called(captures: list[int]) -> None:
    replayed = Replayed(torch.nn.Identity().eval(), after=0)
    x = _x()
    assert replayed(x) is x
    assert replayed.refused == "only a FastUNet is known to do the same every time"


@pytest.mark.parametrize("said", ["CUDA out of memory. Tried", "operation not permitted when stream is capturing"])
def test_a_capture_that_fails_is_not_tried_again(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def fails(*_: Any) -> Any:
        tried.append(1)
        raise RuntimeError(f"{said}\nand more")

    monkeypatch.setattr(replay, "captured", fails)
    net = _Net()
    replayed = Replayed(net, after=1)
    results = [replayed(_x()) for _ in range(4)]
    assert len(tried) == 1
    # and once for the bits that a graph would have to have
    assert net.calls == len(results) + 1 == 5
    assert replayed.refused == said


def test_where_memory_runs_out_beside_a_graph_the_graph_goes(captures: list[int]) -> None:
    net = _Net()
    replayed = Replayed(net, after=0)
    replayed(_x())
    assert replayed._graph is not None
    forward, tried = net.forward, []

    def full(x: Tensor) -> Tensor:
        if replayed._graph is not None:
            tried.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(x)

    net.forward = full
    assert replayed(_x(44)).shape[2] == 28
    assert len(tried) == 1
    assert replayed.refused == "memory ran out"
    net.forward = lambda x: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))
    # without a graph there is nothing to give
    with pytest.raises(torch.OutOfMemoryError):
        replayed(_x(44))


def test_a_graph_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    # what a kernel's workspace outside the graph would do: the first result over and over
    monkeypatch.setattr(replay, "captured", lambda work, device: (work(), lambda: None))
    net = _Net()
    replayed = Replayed(net, after=0)
    x = _x()
    with torch.no_grad(), _choosing.by_device_time():
        assert torch.equal(replayed(x), net(x))
    assert replayed.refused == "the graph's bits are not the net's"


def test_prediction_goes_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    from unet_fast import inference, predict

    calls = []

    class Counting(Replayed):
        def __call__(self, x: Tensor) -> Tensor:
            calls.append(tuple(x.shape))
            return super().__call__(x)

    monkeypatch.setattr(inference, "Replayed", Counting)
    net = FastUNet(features=(4, 8))
    predict(net, np.random.default_rng(0).random((90, 70), np.float32), tile_in=52)
    assert len(calls) > 4
    assert set(calls) == {(1, 1, 52, 52)}


# a training step


class _NothingAsked(TorchDispatchMode):
    """Raises where the host asks for a value, as a capture does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a capture forbids it"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for each capture of a step: how often it was replayed."""
    replays: list[int] = []

    def captured(work: Callable[[], Tensor], device: Any, rehearsal: Callable[[], Any]) -> Any:
        number = len(replays)
        replays.append(0)
        rehearsal()
        # a capture computes nothing
        value = torch.empty(())

        def again() -> None:
            replays[number] += 1
            with _NothingAsked():
                value.copy_(work())

        return value, again

    monkeypatch.setattr(replay, "captured", captured)
    return replays


class _Trained(FastUNet):
    def __init__(self) -> None:
        torch.manual_seed(5)
        super().__init__(features=(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        assert _choosing._here.by_device_time, "called by other kernels than replayed"
        return super().forward(x.as_subclass(Tensor))


def _loss(logits: Tensor, target: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, target.as_subclass(Tensor))


def _tile(side: int = 36, *, on_gpu: bool = True) -> tuple[Tensor, Tensor]:
    image, target = torch.rand(1, 1, side, side), torch.randint(0, 2, (1, side - 16, side - 16))
    return (image.as_subclass(_OnGpu), target.as_subclass(_OnGpu)) if on_gpu else (image, target)


def _trained(steps: int, *, replayed: bool, momentum: float = 0.9, rates: tuple[float, ...] = ()) -> list[Tensor]:
    """The losses and then the weights of a net after these steps, in tiles that say they lie on a GPU or do not."""
    net = _Trained()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=momentum)
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))
    step = ReplayedStep(net, optimizer, _loss, after=2)
    losses = []
    for number in range(steps):
        if number < len(rates):
            optimizer.param_groups[0]["lr"] = rates[number]
        losses.append(step(*_tile(on_gpu=replayed)))
        assert all(p.grad is not None for p in net.parameters())
        if number % 2:
            optimizer.zero_grad()
        if not rates:
            warm.step()
    assert not step.refused
    return [*losses, *(p.detach().clone() for p in net.parameters())]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("rates", [(), (0.1, 0.1, 0.1, 0.1, 0.3, 0.02)], ids=["scheduled", "set"])
def test_a_replayed_step_does_what_a_called_one_does(
    rates: tuple[float, ...], momentum: float, graphs: list[int]
) -> None:
    called = _trained(6, replayed=False, momentum=momentum, rates=rates)
    assert graphs == []
    replayed = _trained(6, replayed=True, momentum=momentum, rates=rates)
    # the third step is the one that was captured
    assert graphs == [4]
    for a, b in zip(called, replayed, strict=True):
        # a rate that is a tensor is rounded to float32, and the fused update rounds elsewhere
        torch.testing.assert_close(a, b.as_subclass(Tensor), rtol=1e-5, atol=1e-6)


def _refusing(how: str) -> Callable[..., Any]:
    def captured(work: Callable[[], Tensor], device: Any, rehearsal: Callable[[], Any]) -> Any:
        rehearsal()
        if how == "another":
            return torch.empty(()), lambda: None
        raise (RuntimeError if how == "fails" else ValueError)("operation not permitted when stream is capturing")

    return captured


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("how", ["another", "fails", "is refused"])
def test_a_graph_that_will_not_do_is_not_used_and_the_step_is_made(
    how: str, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "captured", _refusing(how))
    nets = [_Trained(), _Trained()]
    optimizers = [make(net.parameters(), lr=0.125) for net in nets]
    steps = [ReplayedStep(n, o, _loss, after=0) for n, o in zip(nets, optimizers, strict=True)]
    for number in range(3):
        image, target = _tile(on_gpu=False)
        loss = steps[0](image.as_subclass(_OnGpu), target.as_subclass(_OnGpu))
        torch.testing.assert_close(loss.as_subclass(Tensor), steps[1](image, target), rtol=1e-5, atol=1e-6)
        assert bool(steps[0].refused) == (number > 0)
    assert ("bits" if how == "another" else "not permitted") in steps[0].refused
    # and the optimizer is what it was
    assert optimizers[0].param_groups[0]["lr"] == 0.125
    assert isinstance(optimizers[0].param_groups[0]["lr"], float)
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["hook", "shape", "frozen", "evaluating", "loaded", "setting"])
def test_a_step_that_a_graph_would_not_repeat_is_called(how: str, graphs: list[int]) -> None:
    net = _Trained()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    step = ReplayedStep(net, optimizer, _loss, after=1)
    step(*_tile())
    step(*_tile())
    assert graphs == [1]
    if how == "hook":
        net.head.register_forward_hook(lambda *_: None)
    elif how == "frozen":
        net.head.requires_grad_(False)
    elif how == "evaluating":
        net.down[0].eval()
    elif how == "loaded":
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif how == "setting":
        optimizer.param_groups[0]["momentum"] = 0.5
    step(*_tile(44 if how == "shape" else 36))
    assert graphs == [1]
    assert not step.refused


def test_a_step_that_fails_says_so_and_undoes_nothing_else(graphs: list[int]) -> None:
    net = _Trained()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    failing = False

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        if failing:
            raise KeyError("no such class")
        return _loss(logits, target)

    step = ReplayedStep(net, optimizer, loss, after=1)
    step(*_tile())
    failing, before = True, [p.detach().clone() for p in net.parameters()]
    with pytest.raises(KeyError, match="no such class"):
        step(*_tile())
    assert isinstance(optimizer.param_groups[0]["lr"], float)
    for a, b in zip(before, net.parameters(), strict=True):
        assert torch.equal(a, b)
