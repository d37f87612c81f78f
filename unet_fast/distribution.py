"""The processes of one run: `torchrun --nproc-per-node 2 -m unet_fast train ...` starts them, one a GPU.

Each takes its share of a step's tiles and adds up its gradients with the others' (DistributedDataParallel); the first
one ("main") alone writes. What they tell one another beside gradients goes through a group of its own, on the CPU.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .errors import BadInput

__all__ = ["Ranks"]

T = TypeVar("T")

# the main process may try tiles, validate and write for longer than others wait by themselves
_PATIENCE, _GRADIENT_PATIENCE = timedelta(days=2), timedelta(minutes=30)
# what backends say of a process that is gone
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "connection was aborted")


class Ranks:
    """This process among those of the run: `rank` of `world`; alone it is 0 of 1, and nothing is sent.

    >>> Ranks().main
    True
    """

    def __init__(self, rank: int = 0, world: int = 1, local_rank: int = 0) -> None:
        self.rank, self.world, self.local_rank = rank, world, local_rank
        self._host: Any = None
        # a signal asked this process to end
        self.stopping = False

    @classmethod
    def of_environment(cls) -> "Ranks":
        """As torchrun started it; without torchrun it is alone."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        if not all(name in os.environ for name in (*names, "MASTER_ADDR", "MASTER_PORT")):
            return cls()
        try:
            return cls(*(int(os.environ[name]) for name in names))
        except ValueError:
            said = ", ".join(f"{name}={os.environ[name]}" for name in names)
            raise BadInput(f"{', '.join(names)} must be whole numbers, as torchrun sets them, got {said}") from None

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """Each process's own GPU.

        Raises:
            BadInput: all are to take one and the same; there are too few.
        """
        if self.world > 1 and name.startswith("cuda:"):
            raise BadInput(f"device must be cuda where {self.world} processes take a GPU each, got {name}")
        if self.world == 1 or name not in ("auto", "cuda"):
            return name
        if not torch.cuda.is_available():
            return "cpu" if name == "auto" else name
        if self.local_rank >= torch.cuda.device_count():
            raise BadInput(
                f"--nproc-per-node must be at most the {torch.cuda.device_count()} GPUs of this machine, got a process "
                f"number {self.local_rank}"
            )
        return f"cuda:{self.local_rank}"

    @contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """Inside the block the processes know one another."""
        if self.world == 1:
            yield
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_GRADIENT_PATIENCE)
        try:
            self._host = dist.new_group(backend="gloo", timeout=_PATIENCE)
            yield
        except RuntimeError as error:
            if self.main or not any(words in str(error) for words in _LOST):
                raise
            raise BadInput("another process of this run has ended, and says why") from error
        finally:
            self._host = None
            dist.destroy_process_group()

    def share(self, batch: int) -> range:
        """Which of a step's tiles are this process's.

        Raises:
            BadInput: they cannot be shared evenly.
        """
        each, left = divmod(batch, self.world)
        if left:
            better = -(-batch // self.world) * self.world
            raise BadInput(f"batch must be a multiple of the {self.world} processes, got {batch}; use {better}")
        return range(self.rank * each, (self.rank + 1) * each)

    def wrapped(self, model: nn.Module) -> nn.Module:
        """What is called instead of the model, so that backward passes end with the mean of all gradients."""
        if self.world == 1:
            return model
        device = next(model.parameters()).device
        return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum of all processes' tensors, in its place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` gives in the main process, in all of them."""
        if self.world == 1:
            return make()
        made: list[Any] = [make() if self.main else None]
        dist.broadcast_object_list(made, src=0, group=self._host)
        return made[0]

    def gathered(self, part: list[T]) -> list[T]:
        """All processes' lists, one after another, in all of them."""
        if self.world == 1:
            return part
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, part, group=self._host)
        return [each for one in parts for each in one]

    def any_stopping(self) -> bool:
        """Whether a signal has reached any of them: they end after the same step, or gradients wait for ever."""
        if self.world == 1:
            return self.stopping
        flag = torch.tensor(int(self.stopping))
        dist.all_reduce(flag, group=self._host)
        return bool(flag)

    def wait(self) -> None:
        """Until all are here."""
        if self.world > 1:
            dist.barrier(group=self._host)
