"""Buffers that notice: poison where a kernel should have written, canaries where it should not have been."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.proof.watch import watched
from tests.proof.yardstick import assert_same_bits
from unet_kernels import _triton

__all__ = ["LAYOUTS", "awkward", "guarded_launch"]

MARGIN = 64


class _Guarded:
    """A tensor in the middle of a larger buffer; the rest is poison and must stay as it is."""

    def __init__(self, shape: Any, stride: Any, dtype: torch.dtype, device: torch.device) -> None:
        span = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if 0 not in shape else 0
        self.buffer = torch.full((span + 2 * MARGIN,), _poison(dtype), dtype=dtype, device=device)
        self.tensor = self.buffer.as_strided(shape, stride, MARGIN)
        self.outside = torch.ones_like(self.buffer, dtype=torch.bool)
        self.outside.as_strided(shape, stride, MARGIN).fill_(False)

    @classmethod
    def around(cls, tensor: Tensor) -> "_Guarded":
        guarded = cls(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        guarded.tensor.copy_(tensor)
        return guarded

    def assert_intact(self, what: str) -> None:
        touched = self.buffer[self.outside]
        untouched = torch.full_like(touched, _poison(touched.dtype))
        try:
            assert_same_bits(touched, untouched)
        except AssertionError as error:
            raise AssertionError(f"{what}: wrote outside its buffer ({error})") from None


def _poison(dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return True
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max


@contextmanager
def _guarded_allocations() -> Iterator[list[_Guarded]]:
    """torch.empty and its sisters hand out poisoned tensors between canaries."""
    made: list[_Guarded] = []
    real = {name: getattr(torch, name) for name in ("empty", "empty_like", "empty_strided")}

    def guard(fresh: Tensor) -> Tensor:
        made.append(_Guarded(fresh.shape, fresh.stride(), fresh.dtype, fresh.device))
        return made[-1].tensor

    def patched(name: str) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: guard(real[name](*args, **kwargs))

    with mock.patch.multiple(torch, **{name: patched(name) for name in real}):
        yield made


def guarded_launch(launcher: Callable[..., Any], *args: Any, mutates: tuple[int, ...] = (), **kwargs: Any) -> Any:
    """Run a launcher with canaries round every tensor and every output poisoned; what it does is checked.

    Assertion errors: an input that was changed; a write outside a buffer; a result that torch.empty (or a sister of
    it) did not allocate, and so nobody guards. Under the interpreter, where addresses can be watched, also: any access
    outside the tensors of the launch, programs that meet at one value, an output value that no launch stored. On a GPU
    a read outside an input finds NaN (the largest integer), and so does who reads an output that was not written.

    Args:
        launcher: allocates by torch.empty, torch.empty_like or torch.empty_strided, and launches.
        mutates: positions among `args` of the tensors that the launcher may write.
    """
    guards = [_Guarded.around(a) if isinstance(a, Tensor) else None for a in args]
    placed = [a if g is None else g.tensor for a, g in zip(args, guards, strict=True)]
    watching = watched() if _triton.INTERPRETED else nullcontext()
    with _guarded_allocations() as made, watching as watch:
        result = launcher(*placed, **kwargs)
    for i, guard in enumerate(guards):
        if guard is None:
            continue
        guard.assert_intact(f"argument {i}")
        if i not in mutates:
            assert_same_bits(guard.tensor, args[i])
    for i, guard in enumerate(made):
        guard.assert_intact(f"allocation {i}")
    if watch is not None:
        watch.assert_clean()
    ours = {g.buffer.untyped_storage().data_ptr(): g in made for g in [*made, *filter(None, guards)]}
    for i, tensor in enumerate(tree_leaves(result)):
        storage = tensor.untyped_storage().data_ptr()
        assert storage in ours, (
            f"result {i} was not allocated by torch.empty, empty_like or empty_strided: nobody guards it"
        )
        if watch is not None and ours[storage]:
            watch.assert_written(tensor, f"result {i}")
    return result


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _window(t: Tensor) -> Tensor:
    """The same values as a window of something larger: neither dense nor aligned."""
    larger = t.new_full([n + 3 for n in t.shape], _poison(t.dtype))
    window = larger[tuple(slice(1, n + 1) for n in t.shape)]
    return window.copy_(t)


def _window_channels_last(t: Tensor) -> Tensor:
    n, c, h, w = t.shape
    larger = t.new_full((n, h + 3, w + 5, c), _poison(t.dtype)).permute(0, 3, 1, 2)
    return larger[:, :, 1 : h + 1, 2 : w + 2].copy_(t)


def _transposed(t: Tensor) -> Tensor:
    return t.transpose(2, 3).contiguous().transpose(2, 3)


# name -> the same 4-D values in other strides
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": _channels_last,
    "window": _window,
    "window of channels_last": _window_channels_last,
    "transposed": _transposed,
}


def awkward(t: Tensor, layout: str) -> Tensor:
    """t [N, C, H, W] in one of `LAYOUTS`."""
    return LAYOUTS[layout](t)
