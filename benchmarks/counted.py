"""Steps under fake tensors, and what torch's own MemTracker says that they take."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

__all__ = ["dynamic_peak"]


def dynamic_peak(
    make: Callable[[], nn.Module],
    tile_in: tuple[int, int] | int,
    dtype: torch.dtype,
    *,
    batch: int = 1,
    training: bool = True,
    autocast: bool = False,
) -> int:
    """Bytes above weights and momentum: of the second of two steps of SGD, or of a forward without gradients.

    `autocast`: weights stay float32, and `dtype` is torch.autocast's.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if autocast else dtype)
    cast = torch.autocast("cpu", dtype, enabled=autocast)
    rows, columns = (tile_in, tile_in) if isinstance(tile_in, int) else tile_in
    try:
        with FakeTensorMode():
            net = make().train(training)
            x = torch.randn(batch, 1, rows, columns)
            tracker = MemTracker()
            if training:
                target = torch.zeros(batch, *net(x).shape[2:], dtype=torch.long)
                optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.99)
                tracker.track_external(net, optimizer, x, target)
                with tracker:
                    for step in range(2):
                        # nobody holds the logits while the backward runs
                        F.cross_entropy(_called(net, x, cast).float(), target).backward()
                        optimizer.step()
                        optimizer.zero_grad()
                        if step == 0:
                            tracker.reset_mod_stats()
            else:
                tracker.track_external(net, x)
                with tracker, torch.no_grad(), cast:
                    net(x)
        (peak,) = tracker.get_tracker_snapshot("peak").values()
    finally:
        torch.set_default_dtype(before)
    parts = {str(name): size for name, size in peak.items()}
    static = sum(size for name, size in parts.items() if name.endswith(("PARAM", "OPT")))
    return parts["Total"] - static


def _called(net: nn.Module, x: torch.Tensor, context: AbstractContextManager[object]) -> torch.Tensor:
    with context:
        return net(x)
