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
    hooks. Replayed or called, the same kernels run: before a graph is used, its step is made both ways from the same
    weights, and a graph whose weights differ in one bit is not used. For that the rates of the optimizer become tensors
    on the GPU, which schedulers know how to fill; after a replay `p.grad` are the graph's own.

    Args:
        net: the net that is trained; its parameters stay where they are in memory.
        optimizer: of its parameters; torch.optim.SGD, or one that is `capturable`.
        loss: takes logits and what else a step is called with; returns a number.
        dtype: of the maps, under torch.autocast; None for that of the parameters.
        after: steps of one shape before it is captured.

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
        self.net, self.optimizer, self.loss, self.dtype, self.after = net, optimizer, loss, dtype, after
        self.refused = ""
        self._seen: dict[tuple[Any, ...], int] = {}
        self._key: tuple[Any, ...] = ()
        self._inputs: list[Tensor] = []
        self._rates: list[Tensor] = []
        self._replay: Callable[[], Any] | None = None
        self._value = torch.empty(0)

    def __call__(self, image: Tensor, *targets: Tensor) -> Tensor:
        """Make one step; returns the loss before it, which is the caller's own."""
        given = [image, *targets]
        if image.device.type != "cuda" or self.refused or _hooked(self.net):
            return self._step(given)
        key = self._key_of(given)
        if self._replay is None:
            self._seen[key] = self._seen.get(key, 0) + 1
            if self._seen[key] > self.after:
                return self._captured(given, key)
            return self._step(given)
        if key != self._key:
            return self._step(given)
        for lies, comes in zip(self._inputs, given, strict=True):
            lies.copy_(comes)
        self._hold_rates()
        self._replay()
        return self._value.clone()

    def _step(self, given: list[Tensor]) -> Tensor:
        kind = given[0].device.type
        self.optimizer.zero_grad(set_to_none=True)
        # in this thread, so that gradients too are by what takes the device the least time
        with unet_kernels.by_device_time(), torch.autograd.set_multithreading_enabled(False):
            # a cast that is remembered from one step would be the weight of another
            with torch.autocast(kind, self.dtype, enabled=self.dtype is not None, cache_enabled=False):
                logits = self.net(given[0])
            value = self.loss(logits, *given[1:])
            value.backward()
        self.optimizer.step()
        return value.detach()

    def _captured(self, given: list[Tensor], key: tuple[Any, ...]) -> Tensor:
        """The step that is captured, made once: by the graph if it is as good, else as it was called."""
        device = given[0].device
        self._inputs = [t.clone() for t in given]
        self._make_rates()
        before = self._state()
        called: dict[str, Any] = {}

        def rehearsal() -> None:
            called["value"] = self._step(self._inputs).clone()
            called["state"] = self._state()
            self._restore(before)
            self.optimizer.zero_grad(set_to_none=True)

        why = ""
        try:
            self._value, replay = captured(lambda: self._step(self._inputs), device, rehearsal)
            replay()
            same = torch.equal(self._value.nan_to_num(), called["value"].nan_to_num())
            if not (same and _equal(self._state(), called["state"])):
                why = "the graph's bits are not the step's"
            self._replay, self._key = replay, key
        except RuntimeError as error:
            if "state" not in called:
                raise
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
        # not in the except clause: the error holds on to what was made
        if why:
            self.refused, self._replay, self._value = why, None, called["value"]
            self.optimizer.zero_grad(set_to_none=True)
            self._restore(called["state"])
            give_back()
        return self._value.clone()

    def _key_of(self, given: list[Tensor]) -> tuple[Any, ...]:
        groups = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in self.optimizer.param_groups]
        places = tuple(p.data_ptr() for p in self.net.parameters())
        shapes = tuple((tuple(t.shape), t.dtype, t.device) for t in given)
        return shapes, places, self.net.training, str(groups), *unet_kernels.circumstances()

    def _make_rates(self) -> None:
        made = [(group["lr"], group["params"][0].device) for group in self.optimizer.param_groups]
        self._rates = [torch.as_tensor(rate, dtype=torch.float32, device=device) for rate, device in made]
        self._hold_rates()

    def _hold_rates(self) -> None:
        """What a caller has put in the place of a rate is written into it: a graph knows the tensor."""
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            if group["lr"] is not rate:
                rate.fill_(group["lr"])
                group["lr"] = rate

    def _tensors(self) -> list[Tensor]:
        of_optimizer = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        return [*self.net.parameters(), *of_optimizer]

    def _state(self) -> list[Tensor]:
        """Copies on the host of all that a step changes: there may be no room for them beside the net."""
        copies = [t.detach().to("cpu", copy=True) for t in self._tensors()]
        return [*copies, torch.cuda.get_rng_state()] if torch.cuda.is_available() else copies

    @torch.no_grad()
    def _restore(self, state: list[Tensor]) -> None:
        tensors = self._tensors()
        for t, copy in zip(tensors, state, strict=False):
            t.copy_(copy)
        if len(state) > len(tensors):
            torch.cuda.set_rng_state(state[-1])


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(s.nan_to_num(), t.nan_to_num()) if s.is_floating_point() else torch.equal(s, t)
        for s, t in zip(a, b, strict=True)
    )


def _hooked(net: nn.Module) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in net.modules())


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
