"""What does the warp of a training tile cost beside the pipelines that others compose, and beside a training step?

The same displacements, image and labels by F.interpolate and two calls of grid_sample, which must give nearly the same,
and by kornia's elastic transform, which deforms another way (Simard's smoothed noise) and so is timed only.
predict (H200): 572 x 572, order 3, with labels 5 to 8 us, bound by the launch and its arithmetic (no fma), at least 5
times grid_sample's pipeline (a dozen launches) and 30 times kornia's, below 1 % of a training step; with the gradient
of the displacement 40 us, of the image 0.2 to 0.3 ms.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import unet_kernels
from benchmarks.harness import measure, paired
from benchmarks.sections import Context, affordable
from unet_fast import ElasticWarp, FastUNet
from unet_kernels import reference

TITLE = "The elastic warp of a training tile"
ORDER = 44
SECONDS = 25.0

Pair = tuple[Tensor, Tensor]


def run(context: Context) -> dict[str, Any]:
    side = 64 if context.smoke else 572
    cases = list(itertools.product((torch.float32, torch.uint8), (1, 3), (False, True)))
    step_s = _training_step_s(context)
    rows = [_row(context, side, *case, step_s) for case in affordable(context, cases)]
    headline = ", ".join(
        f"order {row['order']} {row['image']}{' affine' if row['affine'] else ''} {row['ours_us']:.0f} us"
        for row in rows
    )
    lane = unet_kernels.lane("elastic_warp", context.device)
    gradients = [_gradients(context, side, order) for order in affordable(context, (1, 3))]
    return {"headline": headline, "lane": lane, "warps": rows, "gradients": gradients}


def _row(context: Context, side: int, dtype: torch.dtype, order: int, affine: bool, step_s: float) -> dict[str, Any]:
    image, displacement, labels, matrix = operands(side, dtype, context.device, affine=affine)

    def ours() -> Pair:
        return unet_kernels.elastic_warp(image, displacement, labels=labels, matrix=matrix, order=order)

    want = reference.elastic_warp(
        *(None if t is None else t.cpu() for t in (image, displacement, labels, matrix)), None, None, order
    )
    for got, theirs, name in zip(ours(), want, ("image", "labels"), strict=True):
        if not torch.equal(got.cpu(), theirs):
            different = int((got.cpu() != theirs).sum())
            raise AssertionError(f"{side} x {side}, order {order}: {different} pixels of the {name} are not the CPU's")
    by_grid_sample = grid_sample_pipeline(image, displacement, labels, matrix, order)
    expect_near(ours(), by_grid_sample())
    found = paired(by_grid_sample, ours, context.device, **context.effort)
    by_kornia = kornia_pipeline(image, labels)
    kornia_s = None if isinstance(by_kornia, str) else measure(by_kornia, context.device, **context.effort).median_s
    return {
        "image": str(dtype).removeprefix("torch."),
        "order": order,
        "affine": affine,
        "ours_us": found.b.median_us,
        "grid_sample/ours": found.ratio,
        "spread": f"{found.ratio_min:.2f}..{found.ratio_max:.2f}",
        "kornia/ours": by_kornia if kornia_s is None else kornia_s / found.b.median_s,
        "share of a training step": found.b.median_s / step_s,
        "how": found.b.how,
    }


def _gradients(context: Context, side: int, order: int) -> dict[str, Any]:
    image, displacement, _, _ = operands(side, torch.float32, context.device, affine=False)
    row: dict[str, Any] = {"order": order}
    for name, leaf in (("image", image), ("displacement", displacement)):
        leaf = leaf.detach().requires_grad_()
        other = (leaf, displacement) if name == "image" else (image, leaf)

        def gradient(leaf: Tensor = leaf, other: tuple[Tensor, Tensor] = other) -> Tensor:
            return torch.autograd.grad(unet_kernels.elastic_warp(*other, order=order).square().sum(), leaf)[0]

        if not torch.equal(gradient(), gradient()):
            raise AssertionError(f"order {order}: the gradient of the {name} differs from call to call")
        row[f"forward and gradient of the {name}_us"] = measure(gradient, context.device, **context.effort).median_us
    return row


def _training_step_s(context: Context) -> float:
    """Of the net that the tile is for, in the precision that trains fastest there."""
    net = FastUNet(features=context.features).to(context.device)
    image = torch.rand(1, 1, context.tile_in, context.tile_in, device=context.device)

    def step() -> None:
        with torch.autocast(context.device.type, torch.bfloat16):
            logits = net(image)
        logits.float().square().mean().backward()

    return measure(step, context.device, graph=False, **context.effort).median_s


# what the peers do


def operands(
    side: int, dtype: torch.dtype, device: torch.device, *, affine: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(image, displacement, labels, matrix): the paper's 3 x 3 grid of 10 px, and a turn by a third."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 1, side, side, generator=generator)
    image = image if dtype.is_floating_point else image * torch.iinfo(dtype).max
    labels = torch.arange(side**2, dtype=torch.int32).view(1, side, side) // 97
    displacement = ElasticWarp().draw(1, (side, side), generator) * side / 572
    turn = torch.tensor([[[0.5, -(0.75**0.5), 0.0], [0.75**0.5, 0.5, 0.0]]])
    return (
        image.to(device, dtype), displacement.to(device), labels.to(device), turn.to(device) if affine else None,
    )  # fmt: skip


def grid_sample_pipeline(
    image: Tensor, displacement: Tensor, labels: Tensor, matrix: Tensor | None, order: int
) -> Callable[[], Pair]:
    """The field by F.interpolate, then a grid_sample for the image and one for the labels."""
    height, width = image.shape[-2:]
    mode = "bilinear" if order == 1 else "bicubic"
    y = torch.arange(height, device=image.device, dtype=torch.float32)[:, None]
    x = torch.arange(width, device=image.device, dtype=torch.float32)
    centre = (height - 1) / 2, (width - 1) / 2
    options: dict[str, Any] = {"padding_mode": "reflection", "align_corners": True}

    def warp() -> Pair:
        u = F.interpolate(displacement, size=(height, width), mode="bicubic", align_corners=True)
        q_y, q_x = y + u[:, 0] - centre[0], x + u[:, 1] - centre[1]
        if matrix is not None:
            (a, b, c), (d, e, f) = matrix[0]
            q_y, q_x = a * q_y + b * q_x + c, d * q_y + e * q_x + f
        where = torch.stack([q_x / centre[1], q_y / centre[0]], -1)
        out = F.grid_sample(image.float(), where, mode=mode, **options)
        ids = F.grid_sample(labels[:, None].float(), where, mode="nearest", **options)[:, 0].to(labels.dtype)
        if not image.is_floating_point():
            out = out.round().clamp(0, torch.iinfo(image.dtype).max)
        return out.to(image.dtype), ids

    return warp


def kornia_pipeline(image: Tensor, labels: Tensor) -> Callable[[], Any] | str:
    """kornia's elastic transform of image and mask, or why there is none."""
    try:
        from kornia.augmentation import AugmentationSequential, RandomElasticTransform
        from kornia.constants import DataKey
    except ImportError as error:
        return f"no kornia ({error})"
    both = AugmentationSequential(
        RandomElasticTransform(p=1.0, align_corners=True),
        data_keys=["input", "mask"],
        extra_args={DataKey.MASK: {"resample": "nearest", "align_corners": True}},
    )
    scale = 1.0 if image.is_floating_point() else 1 / torch.iinfo(image.dtype).max
    return lambda: both(image.float() * scale, labels[:, None].float())


def expect_near(ours: Pair, theirs: Pair) -> None:
    """grid_sample's coordinates pass through -1 .. 1 and back: some digits less, and another pixel at a half.

    Beyond the image it mirrors positions, not pixels, which is the same.
    """
    unit = 1.0 if ours[0].is_floating_point() else float(torch.iinfo(ours[0].dtype).max)
    apart = (ours[0].float() - theirs[0].float()).abs().max() / unit
    other = (ours[1] != theirs[1]).float().mean()
    if apart > 0.02 or other > 0.001:
        raise AssertionError(
            f"grid_sample's image is {float(apart):.3g} apart, {float(other):.2%} of its labels differ"
        )
