"""Every address that a launch reads and writes, program by program: what no poison and no shuffling can show.

The interpreter runs one program after another on plain memory, so a read outside a buffer whose value is thrown away,
or two programs that update one value, give the right answer there and not on a GPU. Here the addresses themselves are
looked at: each must lie in a tensor of the launch, none may be written by one program and touched by another (atomics
excepted), and each value of an output must have been written.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor

__all__ = ["Watch", "watched"]


@dataclass
class _Accesses:
    """Addresses and the program that touched them, in pieces."""

    addresses: list[np.ndarray] = field(default_factory=list)
    programs: list[np.ndarray] = field(default_factory=list)

    def note(self, addresses: np.ndarray, program: int) -> None:
        self.addresses.append(addresses)
        self.programs.append(np.full(addresses.shape, program))

    def joined(self) -> tuple[np.ndarray, np.ndarray]:
        """Each (address, program) once, sorted."""
        if not self.addresses:
            return np.empty(0, np.uint64), np.empty(0, np.int64)
        both = np.stack([np.concatenate(self.addresses), np.concatenate(self.programs).astype(np.uint64)])
        both = np.unique(both, axis=1)
        return both[0], both[1].astype(np.int64)


class Watch:
    """What the launches inside a `watched` block did."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.written: list[np.ndarray] = []
        self._reads, self._writes = _Accesses(), _Accesses()
        self._starts, self._ends = np.empty(0, np.uint64), np.empty(0, np.uint64)

    def begin(self, arguments: list[Any]) -> None:
        """A launch with these arguments starts."""
        tensors = [getattr(a, "base", a) for a in arguments]
        spans = sorted(_span(t) for t in tensors if isinstance(t, Tensor) and t.numel())
        self._starts, self._ends = (np.array([s[i] for s in spans], np.uint64) for i in (0, 1))
        self._reads, self._writes = _Accesses(), _Accesses()

    def end(self) -> None:
        """It ended: look for programs that met."""
        read, reader = self._reads.joined()
        wrote, writer = self._writes.joined()
        self.written.append(wrote)
        if np.unique(wrote).size < wrote.size:
            twice = wrote.size - np.unique(wrote).size
            self.faults.append(f"{twice} values are written by more than one program")
        if wrote.size and read.size:
            at = np.minimum(np.searchsorted(wrote, read), wrote.size - 1)
            met = (wrote[at] == read) & (writer[at] != reader)
            if met.any():
                self.faults.append(f"{int(met.sum())} values are written by one program and read by another")

    def touch(self, pointers: np.ndarray, mask: np.ndarray, size: int, program: int, kind: str) -> np.ndarray:
        """Note an access and return the mask without what lies outside every tensor."""
        pointers, mask = np.broadcast_arrays(pointers.astype(np.uint64), mask.astype(bool))
        at = np.searchsorted(self._starts, pointers, side="right") - 1
        inside = (at >= 0) & (pointers + np.uint64(size) <= self._ends[np.maximum(at, 0)]) if self._ends.size else False
        outside = int((mask & ~inside).sum())
        if outside:
            self.faults.append(f"{outside} values {kind} outside every tensor of the launch")
        mask = mask & inside
        if kind != "updated atomically":
            (self._reads if kind == "read" else self._writes).note(pointers[mask], program)
        elif mask.any():
            self.written.append(np.unique(pointers[mask]))
        return mask

    def assert_clean(self) -> None:
        assert not self.faults, "; ".join(dict.fromkeys(self.faults))

    def assert_written(self, tensor: Tensor, what: str) -> None:
        """Each value of `tensor` was stored by some launch."""
        offsets = np.zeros(1, np.int64)
        for n, stride in zip(tensor.shape, tensor.stride(), strict=True):
            offsets = (offsets[:, None] + np.arange(n) * stride).reshape(-1)
        wanted = (tensor.data_ptr() + offsets * tensor.element_size()).astype(np.uint64)
        written = np.concatenate(self.written) if self.written else np.empty(0, np.uint64)
        missing = int((~np.isin(wanted, written)).sum())
        assert not missing, f"{what}: {missing} of {wanted.size} values were never written"


def _span(tensor: Tensor) -> tuple[int, int]:
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


@contextmanager
def watched() -> Iterator[Watch]:
    """Watch the launches of the block; under the interpreter only."""
    import triton.language as tl
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

    watch = Watch()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    atomic, call = InterpreterBuilder.create_atomic_rmw, GridExecutor.__call__

    def program(builder: Any) -> int:
        (x, y, z), (_, ny, nz) = builder.grid_idx, builder.grid_dim
        return (x * ny + y) * nz + z

    def watched_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        watch.begin([*args, *kwargs.values()])
        result = call(self, *args, **kwargs)
        watch.end()
        return result

    def inside(builder: Any, pointers: Any, mask: Any, kind: str) -> Any:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        # a box of a descriptor comes with a mask in numpy's own form
        asked = mask.data if isinstance(mask, TensorHandle) else mask
        return TensorHandle(watch.touch(pointers.data, asked, max(size, 1), program(builder), kind), tl.int1)

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        return load(self, pointers, inside(self, pointers, mask, "read"), *rest, **named)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        return store(self, pointers, value, inside(self, pointers, mask, "written"), *rest, **named)

    def watched_atomic(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return atomic(self, op, pointers, value, inside(self, pointers, mask, "updated atomically"), *rest)

    with (
        mock.patch.object(GridExecutor, "__call__", watched_call),
        mock.patch.multiple(
            InterpreterBuilder,
            create_masked_load=watched_load,
            create_masked_store=watched_store,
            create_atomic_rmw=watched_atomic,
        ),
    ):
        yield watch
