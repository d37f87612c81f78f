"""A net's forward, or a whole training step, as one CUDA graph: what a host spends on each launch is spent once.

On a fast GPU a forward of the paper's net is over before its thirty launches are made one by one, and a step before its
two hundred. A graph holds for one shape of input, and keeps the memory of one forward, or step, as long as it lives.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import unet_kernels

from .measuring import give_back, is_out_of_memory
from .model import FastUNet

__all__ = ["Replayed", "ReplayedStep"]


class Replayed:
    """`net` without gradients, from some call on replayed as a CUDA graph where that is possible; elsewhere called.

    Replayed or called, the same kernels run, those that take the device the least time, so the same bits come out; a
    graph whose bits differ is not used. One shape of input is captured, the first that was seen `after` times; others
    are called, and so is the net while it is in training mode, has hooks, or is called under autocast. Its parameters
    may change between calls, and must stay where they are in memory.

    Args:
        net: a FastUNet. Any other module is only called.
        after: calls of one shape before it is captured, which costs some four of them.

    Attributes:
        refused: why there is no graph and will be none, or "".

    >>> Replayed(FastUNet(features=(4, 8)).eval())(torch.zeros(1, 1, 36, 44)).shape
    torch.Size([1, 2, 20, 28])
    """

    def __init__(self, net: nn.Module, after: int = 8) -> None:
        self.net, self.after = net, after
        self.refused = ""
        self._seen: dict[tuple[Any, ...], int] = {}
        self._graph: _Graph | None = None

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """What `net(x)` is. The result is the caller's own: a later call does not change it."""
        if x.device.type != "cuda" or self.refused or _only_called(self.net):
            return self._called(x)
        key = _key(x)
        if self._graph is not None:
            return self._graph(x) if self._graph.key == key else self._called(x)
        self._seen[key] = self._seen.get(key, 0) + 1
        if self._seen[key] > self.after:
            self._capture(x)
            return self(x)
        return self._called(x)

    def _called(self, x: Tensor) -> Tensor:
        with unet_kernels.by_device_time():
            try:
                return self.net(x)
            except RuntimeError as error:
                if self._graph is None or not is_out_of_memory(error):
                    raise
            # there is no room for a call beside what the graph holds
            self._give_up("memory ran out")
            return self.net(x)

    def _give_up(self, why: str) -> None:
        self.refused, self._graph = why, None
        give_back()
        torch.cuda.empty_cache()

    def _capture(self, x: Tensor) -> None:
        if not isinstance(self.net, FastUNet):
            self.refused = "only a FastUNet is known to do the same every time"
            return
        # by another input, and called first: beside a graph there may be no room to call
        other = x.flip(-1)
        want = self._called(other)
        why = ""
        try:
            self._graph = _Graph(self._called, x)
            if not torch.equal(self._graph(other).nan_to_num(), want.nan_to_num()):
                why = "the graph's bits are not the net's"
        except RuntimeError as error:
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
        # not in the except clause: the error holds on to what was made
        if why:
            self._give_up(why)


class _Graph:
    """What `work` does with inputs like x, captured; called, it replays it."""

    def __init__(self, work: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self.key = _key(x)
        self.inputs = torch.empty_like(x).copy_(x)
        self.result, self.replay = captured(lambda: work(self.inputs), x.device)

    def __call__(self, x: Tensor) -> Tensor:
        self.inputs.copy_(x)
        self.replay()
        return self.result.clone()


def _key(x: Tensor) -> tuple[Any, ...]:
    return tuple(x.shape), x.dtype, x.device, *unet_kernels.circumstances()


def _only_called(net: nn.Module) -> bool:
    """Whether a graph would do something else than a call: dropout, hooks, another dtype."""
    return net.training or _hooked(net) or torch.is_autocast_enabled("cuda")


class ReplayedStep:
    """Forward, loss, backward and update of a net, from some step on replayed as a CUDA graph; elsewhere called.

    Tiles of one shape are captured, the first that was seen `after` times; others are called, and so is a net with
    hooks, or one of which something else was changed than numbers. Replayed or called, the same kernels run: before a
    graph is used, its step is made both ways from the same weights, and a graph whose weights differ in one bit is not
    used. A graph wants the rates of the optimizer as tensors on the GPU, which schedulers know how to fill, and of SGD
    the fused update: both are set when it is captured. There is no loss scaling.

    Args:
        net: the net that is trained.
        optimizer: of its parameters; torch.optim.SGD, or one that is `capturable`.
        loss: takes logits and what else a step is called with; returns a number.
        dtype: of the maps, under torch.autocast; None for that of the parameters.
        after: steps of one shape before it is captured, at least one.

    Attributes:
        refused: why there is no graph and will be none, or "".

    >>> net = FastUNet(features=(4, 8))
    >>> step = ReplayedStep(net, torch.optim.SGD(net.parameters(), lr=0.1), torch.nn.functional.cross_entropy)
    >>> step(torch.zeros(1, 1, 36, 36), torch.zeros(1, 20, 20, dtype=torch.long)).dim()
    0
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[..., Tensor],
        *,
        dtype: torch.dtype | None = None,
        after: int = 3,
    ) -> None:
        self.net, self.optimizer, self.loss, self.dtype, self.after = net, optimizer, loss, dtype, max(after, 1)
        self.refused = ""
        self._seen: dict[tuple[Any, ...], int] = {}
        self._graph: _GraphOfAStep | None = None

    def __call__(self, image: Tensor, *targets: Tensor) -> Tensor:
        """Make one step; returns the loss before it, which is the caller's own."""
        given = [image, *targets]
        if image.device.type != "cuda" or self.refused or _hooked(self.net):
            return self._step(given)
        if self._graph is None:
            shapes = _shapes(given)
            self._seen[shapes] = self._seen.get(shapes, 0) + 1
            # a first step makes what the optimizer keeps, and so may one of another shape
            return self._captured(given) if self._seen[shapes] > self.after else self._step(given)
        _hold_rates(self.optimizer, self._graph.rates)
        if self._key(given) == self._graph.key:
            return self._graph(given)
        try:
            return self._step(given)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # there is no room for a called step beside what the graph holds
        self._give_up("memory ran out")
        return self._step(given)

    def _step(self, given: list[Tensor]) -> Tensor:
        kind, deterministic = given[0].device.type, torch.backends.cudnn.deterministic
        self.optimizer.zero_grad(set_to_none=True)
        # a graph is compared with a called step by bits
        torch.backends.cudnn.deterministic = True
        try:
            # in this thread, so that gradients too are by what takes the device the least time
            with unet_kernels.by_device_time(), torch.autograd.set_multithreading_enabled(False):
                # a cast that is remembered from one step would be the weight of another
                with torch.autocast(kind, self.dtype, enabled=self.dtype is not None, cache_enabled=False):
                    logits = self.net(given[0])
                value = self.loss(logits, *given[1:])
                value.backward()
        finally:
            torch.backends.cudnn.deterministic = deterministic
        self.optimizer.step()
        return value.detach()

    def _captured(self, given: list[Tensor]) -> Tensor:
        """The step that is captured, made once: by the graph if it is as good, else as it was called."""
        device, called = given[0].device, _State(self.net, self.optimizer, given[0].device)
        groups = [dict(group) for group in self.optimizer.param_groups]
        graph = _GraphOfAStep(given, _tensor_rates(self.optimizer))
        before, after, value = called.copied(), [], torch.empty(0)

        def rehearsal() -> None:
            nonlocal value
            value = self._step(graph.inputs).clone()
            after.extend(called.copied())
            called.restore(before)
            self.optimizer.zero_grad(set_to_none=True)

        why = ""
        try:
            graph.value, graph.replay = captured(lambda: self._step(graph.inputs), device, rehearsal)
            graph.key, graph.held = self._key(given), called.tensors
            graph.replay()
            graph.gradients = [(p, p.grad) for p in self.net.parameters()]
            if not _same_bits([graph.value, *called.copied()], [value, *after]):
                why = "the graph's bits are not the step's"
        except Exception as error:
            if not after:
                # the step itself fails, and says so
                called.restore(before)
                _put_back(self.optimizer, groups)
                raise
            why = (str(error).splitlines() or [type(error).__name__])[0]
        # not in the except clause: the error holds on to what was made
        if not why:
            self._graph = graph
            return graph.value.clone()
        graph.release()
        self._give_up(why)
        called.restore(after)
        _put_back(self.optimizer, groups)
        return value

    def _give_up(self, why: str) -> None:
        self.refused, self._graph = why, None
        self.optimizer.zero_grad(set_to_none=True)
        give_back()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _key(self, given: list[Tensor]) -> tuple[Any, ...]:
        """All that a graph was captured with and cannot see change: places, settings, what is trained."""
        settings = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in self.optimizer.param_groups]
        members = tuple(tuple(map(id, group["params"])) for group in self.optimizer.param_groups)
        places = tuple(t.data_ptr() for t in _State(self.net, self.optimizer, given[0].device).tensors)
        trained = tuple(p.requires_grad for p in self.net.parameters())
        modes = tuple(module.training for module in self.net.modules())
        return _shapes(given), places, members, trained, modes, str(settings), *unet_kernels.circumstances()


class _GraphOfAStep:
    """A captured step: where its inputs, its result, its rates and its gradients lie."""

    def __init__(self, given: list[Tensor], rates: list[Tensor]) -> None:
        self.inputs, self.rates = [t.clone() for t in given], rates
        self.value, self.replay = torch.empty(0), lambda: None
        self.key: tuple[Any, ...] = ()
        self.gradients: list[tuple[nn.Parameter, Tensor | None]] = []
        # what is not held might be given to another
        self.held: list[Tensor] = []

    def release(self) -> None:
        """Let go of all that it holds on the GPU."""
        self.inputs, self.gradients, self.held = [], [], []
        self.value, self.replay = torch.empty(0), lambda: None

    def __call__(self, given: list[Tensor]) -> Tensor:
        for lies, comes in zip(self.inputs, given, strict=True):
            lies.copy_(comes)
        self.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return self.value.clone()


class _State:
    """All that a step changes, copied to the host: there may be no room for it beside the net."""

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        kept = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        self.tensors: list[Tensor] = [*net.parameters(), *net.buffers(), *kept]
        self.device = device if torch.cuda.is_available() else None

    def copied(self) -> list[Tensor]:
        copies = [t.detach().to("cpu", copy=True) for t in self.tensors]
        return copies if self.device is None else [torch.cuda.get_rng_state(self.device), *copies]

    @torch.no_grad()
    def restore(self, copies: list[Tensor]) -> None:
        if self.device is not None:
            torch.cuda.set_rng_state(copies[0], self.device)
        for t, copy in zip(self.tensors, copies[len(copies) - len(self.tensors) :], strict=True):
            t.copy_(copy)


def _tensor_rates(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The rates of the groups, which are tensors from now on; SGD updates by its fused kernel, which takes them."""
    rates = []
    for group in optimizer.param_groups:
        device = group["params"][0].device
        rates.append(torch.as_tensor(group["lr"], dtype=torch.float32, device=device).clone())
        if isinstance(optimizer, torch.optim.SGD):
            # its other ways ask the host for the rate, which a capture forbids
            group["fused"], group["foreach"] = True, False
    _hold_rates(optimizer, rates)
    return rates


def _hold_rates(optimizer: torch.optim.Optimizer, rates: list[Tensor]) -> None:
    """What a caller has put in the place of a rate is written into it: a graph knows the tensor."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if group["lr"] is not rate:
            rate.fill_(group["lr"])
            group["lr"] = rate


def _put_back(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        group.update(before)


def _shapes(given: list[Tensor]) -> tuple[Any, ...]:
    return tuple((tuple(t.shape), t.dtype, t.device) for t in given)


def _same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    def as_bytes(t: Tensor) -> Tensor:
        return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8)

    return all(torch.equal(as_bytes(s), as_bytes(t)) for s, t in zip(a, b, strict=True))


def _hooked(net: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for module in net.modules() for kind in kinds)


def captured(
    work: Callable[[], Tensor], device: torch.device, rehearsal: Callable[[], Any] | None = None
) -> tuple[Tensor, Callable[[], Any]]:
    """(where the result of `work` lies, what computes it anew); the rehearsal, or the work, is done once before."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # libraries allocate their workspace at a stream's first use, which a capture would forbid
            (rehearsal or work)()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        # the graph takes memory of its own: what the calls took goes back first
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads read windows into pinned memory meanwhile
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = work()
    return result, graph.replay
