"""What do loss and gradient cost beside torch's: from logits, and from the last features with the head on the way?

predict: from features 2.5 to 4 times torch's chain of convolution, softmax, gather and products, because logits are
never stored; loss, head and weights together below 2 % of a training step.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import unet_kernels
from benchmarks.harness import channels_last, paired, relative_error
from benchmarks.sections import Context, affordable, short

TITLE = "Loss and gradient, from logits and from features"
ORDER = 38
SECONDS = 25.0

CHANNELS, CLASSES = 64, 2


def run(context: Context) -> dict[str, Any]:
    side = 20 if context.smoke else 388
    dtypes = context.dtypes if context.device.type == "cuda" else context.dtypes[:1]
    cases = list(itertools.product(dtypes, ("logits", "features")))
    rows = [_row(context, side, *case) for case in affordable(context, cases)]
    headline = ", ".join(f"{row['from']} {row['dtype']} {row['torch/ours']:.2f}" for row in rows)
    lanes = {op: unet_kernels.lane(op, context.device) for op in ("weighted_cross_entropy", "head_cross_entropy")}
    return {"headline": f"torch's time over ours: {headline}", "lanes": lanes, "steps": rows}


def _row(context: Context, side: int, dtype: torch.dtype, source: str) -> dict[str, Any]:
    leaves, of_torch, of_ours = steps(side, dtype, source, context.device)
    exact_leaves, exact, _ = steps(side, torch.float64, source, context.device, leaves)
    errors = {}
    wants = step_of(exact, exact_leaves)()
    names = ("loss", *("x", "weight", "bias")[: len(leaves)])
    for name, theirs, ours, want in zip(
        names, step_of(of_torch, leaves)(), step_of(of_ours, leaves)(), wants, strict=True
    ):
        errors[name] = {"ours": relative_error(ours, want), "torch": relative_error(theirs, want)}
        if errors[name]["ours"] > 2 * errors[name]["torch"] + 2 * torch.finfo(theirs.dtype).eps:
            raise AssertionError(f"{name} from {source}, {dtype}: {errors[name]}")
    found = paired(step_of(of_torch, leaves), step_of(of_ours, leaves), context.device, **context.effort)
    return {
        "from": source,
        "dtype": short(dtype),
        "torch_us": found.a.median_us,
        "ours_us": found.b.median_us,
        "torch/ours": found.ratio,
        "spread": f"{found.ratio_min:.2f}..{found.ratio_max:.2f}",
        "relative errors": errors,
        "how": found.b.how,
    }


Loss = Callable[..., Tensor]


def steps(
    side: int, dtype: torch.dtype, source: str, device: torch.device, like: Sequence[Tensor] | None = None
) -> tuple[list[Tensor], Loss, Loss]:
    """(leaves, torch's loss of them, ours): the leaves drawn, or `like` in another dtype."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shapes = [(1, CLASSES, side, side)]
    if source == "features":
        shapes = [(1, CHANNELS, side, side), (CLASSES, CHANNELS, 1, 1), (CLASSES,)]
    made = [drawn(*shape) / (CHANNELS**0.5 if shape[0] == CLASSES and len(shape) == 4 else 1.0) for shape in shapes]
    target = (drawn(1, side, side) > 0).long().to(device)
    pixel_weight = 1 + 5 * torch.rand(1, side, side, generator=generator).to(device)
    leaves = [t.detach().to(device, dtype) for t in (made if like is None else like)]
    leaves = [channels_last(t) if t.dim() == 4 else t for t in leaves]
    for leaf in leaves:
        leaf.requires_grad_()

    def of_torch(x: Tensor, *head: Tensor) -> Tensor:
        logits = F.conv2d(x, *head) if head else x
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return (F.cross_entropy(wide, target, reduction="none") * pixel_weight).mean()

    def of_ours(x: Tensor, *head: Tensor) -> Tensor:
        if head:
            return unet_kernels.head_cross_entropy(x, *head, target, pixel_weight)
        return unet_kernels.weighted_cross_entropy(x, target, pixel_weight)

    return leaves, of_torch, of_ours


def step_of(loss: Loss, leaves: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    def step() -> list[Tensor]:
        value = loss(*leaves)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    return step
