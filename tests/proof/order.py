"""Programs of a launch run in any order on a GPU. The interpreter runs them one after another: shuffle them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from random import Random
from typing import Any
from unittest import mock

from torch import Tensor

from tests.proof.yardstick import assert_same_bits

__all__ = ["assert_order_does_not_matter", "shuffled"]


@contextmanager
def shuffled(seed: int) -> Iterator[None]:
    """Under the interpreter, run the programs of every launch in an order drawn from `seed`."""
    from triton.runtime.interpreter import InterpreterBuilder

    real = InterpreterBuilder.set_grid_idx
    orders: dict[tuple[int, ...], dict[tuple[int, ...], tuple[int, ...]]] = {}

    def order(grid: tuple[int, ...]) -> dict[tuple[int, ...], tuple[int, ...]]:
        if grid not in orders:
            programs = list(product(*map(range, grid)))
            drawn = list(programs)
            Random(seed).shuffle(drawn)
            orders[grid] = dict(zip(programs, drawn, strict=True))
        return orders[grid]

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        real(self, *order(tuple(self.grid_dim))[x, y, z])

    with mock.patch.object(InterpreterBuilder, "set_grid_idx", set_grid_idx):
        yield


def assert_order_does_not_matter(run: Callable[[], Tensor], seeds: int = 5) -> None:
    """The same bits in the usual order and in `seeds` shuffled ones.

    Raises:
        AssertionError: some program read what another one writes.
    """
    want = run()
    for seed in range(seeds):
        with shuffled(seed):
            got = run()
        try:
            assert_same_bits(got, want)
        except AssertionError as error:
            raise AssertionError(f"the result depends on the order of the programs, seed {seed}: {error}") from None
