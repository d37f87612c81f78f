"""Steps under fake tensors, and what torch's own MemTracker says that they take."""

from collections.abc import Callable

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
) -> int:
    """Bytes above weights and momentum: of the second of two steps of SGD, or of a forward without gradients."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
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
                        F.cross_entropy(net(x).float(), target).backward()
                        optimizer.step()
                        optimizer.zero_grad()
                        if step == 0:
                            tracker.reset_mod_stats()
            else:
                tracker.track_external(net, x)
                with tracker, torch.no_grad():
                    net(x)
        (peak,) = tracker.get_tracker_snapshot("peak").values()
    finally:
        torch.set_default_dtype(before)
    parts = {str(name): size for name, size in peak.items()}
    static = sum(size for name, size in parts.items() if name.endswith(("PARAM", "OPT")))
    return parts["Total"] - static
