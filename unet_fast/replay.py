"""A net's forward as one CUDA graph: some thirty launches become one, and what a host spends on each is spent once.

On a fast GPU a forward of the paper's net is over before its launches are made one by one. A graph holds for one shape
of input, and keeps the memory of one forward as long as it lives.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import unet_kernels

from .measuring import give_back, is_out_of_memory
from .model import FastUNet

__all__ = ["Replayed"]


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
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    return net.training or hooked or torch.is_autocast_enabled("cuda")


def captured(work: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, Callable[[], Any]]:
    """(where the result of `work` lies, what computes it anew)."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # libraries allocate their workspace at a stream's first use, which a capture would forbid
            work()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        # the graph takes memory of its own: what the calls took goes back first
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads read windows into pinned memory meanwhile
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = work()
    return result, graph.replay
