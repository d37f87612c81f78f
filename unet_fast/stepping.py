"""One step of training: gradients of a step's tiles added up, checked, scaled and applied, in any precision.

Weights, gradients, momentum and losses are float32; the maps have the precision that is asked for. A step whose loss or
gradient is no number changes nothing: it is counted, and the host need not wait for the device to know.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import unet_kernels

from .distribution import Ranks
from .planning import PRECISIONS

__all__ = ["Stepper"]

# float16's smallest gradient is 6e-8: the loss is multiplied by this at first, by half of it after a gradient that was
# no number, and by twice as much after so many that were
_FIRST_SCALE, _PATIENT_STEPS = 2.0**16, 2000
# beyond that a float32 loss of a bad start would not fit any more
_LARGEST_SCALE = 2.0**24


class Stepper:
    """Adds up gradients tile by tile, and updates the weights by SGD with momentum.

    Args:
        model: the net, on its device.
        ranks: the processes among which a step's tiles are shared.
        precision: of the maps, a key of `PRECISIONS`; float16 with a loss that is scaled up.
        momentum, weight_decay: of SGD.
        clip: a longer gradient is scaled down to this length; 0: never.
    """

    def __init__(
        self, model: nn.Module, ranks: Ranks, *, precision: str, momentum: float, weight_decay: float, clip: float
    ) -> None:
        self.model, self.ranks, self.precision, self.clip = model, ranks, precision, clip
        self.called = ranks.wrapped(model)
        self.device = next(model.parameters()).device
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.SGD(
            self.parameters, lr=0.0, momentum=momentum, weight_decay=weight_decay, fused=True
        )
        for p in self.parameters:
            # what SGD would make at its first step, were that not skipped
            self.optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        first = _FIRST_SCALE if precision == "float16" else 1.0
        self.scale = torch.tensor(first, dtype=torch.float64, device=self.device)
        # steps since the scale was changed; skipped in all; skipped in a row, now and at most since `count`
        self.steady, self.skipped, self.in_a_row, self.longest = (
            torch.zeros((), dtype=torch.int64, device=self.device) for _ in range(4)
        )

    # ---- a step

    def begin(self) -> None:
        """No gradient yet."""
        self.model.train()
        self.optimizer.zero_grad()
        self._sums = torch.zeros(2, dtype=torch.float64, device=self.device)

    def logits(self, image: Tensor, *, last: bool = True) -> Tensor:
        """Of tiles [N, C, H, W]; `last`: of the step, so that gradients are added up with the other processes'."""
        dtype = PRECISIONS[self.precision]
        with (
            torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32),
            nullcontext() if last else self._alone(),
        ):
            made: Tensor = self.called(image)
        return made

    def add(self, logits: Tensor, target: Tensor, weight: Tensor, pixels: int, *, last: bool = True) -> None:
        """The gradient of some tiles' loss.

        Args:
            logits: [N, K, h, w].
            target: class ids [N, h, w], negative where ignored.
            weight: float32 [N, h, w].
            pixels: of all tiles of the step, ignored ones too: the sum is divided by it at once, so that it stays
                small, and by the number of those that count in the end.
            last: as in `logits`.
        """
        loss = unet_kernels.weighted_cross_entropy(logits, target, weight, reduction="sum")
        with nullcontext() if last else self._alone():
            (loss * (self.scale / pixels)).backward()
        with torch.no_grad():
            self._sums += torch.stack([loss.detach().double(), (target >= 0).sum().double()])

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self.called.no_sync() if self.ranks.world > 1 else nullcontext():  # type: ignore[operator]
            yield

    @torch.no_grad()
    def gather(self, pixels: int) -> Tensor:
        """All processes' gradients as one, of the mean over the pixels that count, no longer than `clip`; its loss.

        `pixels`: as in `add`.
        """
        total, valid = self.ranks.add_up(self._sums).unbind()
        valid = valid.clamp(min=1)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        # DistributedDataParallel gives the mean over the processes
        factor = self.ranks.world * pixels / (valid * self.scale)
        length = torch.nn.utils.get_total_norm(gradients) * factor
        self._good = length.isfinite() & total.isfinite()
        if self.clip:
            factor = factor * (self.clip / (length + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))
        return (total / valid).float()

    @torch.no_grad()
    def update(self, lr: float) -> None:
        """Change the weights, unless loss or gradient is no number."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # fused SGD looks at it on the device, and changes nothing where it is 1
        self.optimizer.found_inf = (~self._good).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self._count(self._good)

    def _count(self, good: Tensor) -> None:
        self.skipped += ~good
        self.in_a_row = torch.where(good, 0, self.in_a_row + 1)
        self.longest = torch.maximum(self.longest, self.in_a_row)
        if self.precision == "float16":
            self.steady = torch.where(good, self.steady + 1, 0)
            grown = self.steady >= _PATIENT_STEPS
            self.scale = torch.where(good, torch.where(grown, 2 * self.scale, self.scale), self.scale / 2)
            self.scale = self.scale.clamp(max=_LARGEST_SCALE)
            self.steady = torch.where(grown, 0, self.steady)

    def counts(self) -> dict[str, int]:
        """Skipped steps: of the whole run ("skipped"), and in a row at most since this was last asked ("longest")."""
        found = {"skipped": int(self.skipped), "longest": int(self.longest)}
        self.longest = self.in_a_row.clone()
        return found

    # ---- what a run keeps of it

    def tensors(self) -> dict[str, Tensor]:
        """The momentum of each parameter, by its name."""
        names = self.model.named_parameters()
        return {name: self.optimizer.state[p]["momentum_buffer"] for name, p in names}

    def state(self) -> dict[str, Any]:
        """What else it knows, JSON-able."""
        return {name: getattr(self, name).item() for name in ("scale", "steady", "skipped", "in_a_row")}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """As `tensors` and `state` were."""
        for name, p in self.model.named_parameters():
            # in the parameter's own strides
            self.optimizer.state[p]["momentum_buffer"].copy_(tensors[name])
        for name, value in state.items():
            getattr(self, name).fill_(value)
        self.longest = self.in_a_row.clone()


def mean_of_finite(losses: Iterable[Tensor]) -> float:
    """NaN where there is none."""
    values = [v for v in torch.stack(list(losses)).tolist() if math.isfinite(v)]
    return sum(values) / len(values) if values else math.nan
