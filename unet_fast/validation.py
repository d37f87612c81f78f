"""How well a model does on images that it is not trained on, while it is trained."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import unet_kernels

from . import geometry, metrics
from .cells import find_cells
from .data import Example
from .distribution import Ranks
from .inference import predict
from .loss import BorderWeightedCrossEntropy
from .metrics import ChallengeCounts
from .model import FastUNet
from .tiling import covering_tile, plan_tiles

__all__ = ["SCORES", "Judged", "Judgement", "Validation"]

# pictures of a run: so many images, of at most so many pixels a side
_PICTURES, _PICTURE_SIDE = 4, 512

# the columns of an image's row
SCORES = ("image", "loss", "iou", "pixel_error", "cell_iou", "ap50")


@dataclass(frozen=True, eq=False)
class Judged:
    """One image: what its scores are made of, so that images can be pooled.

    loss: summed over `pixels`; hits: intersections, found and true pixels of each class, [3, K]; counts: for the pixel
    error, of two classes; found: [H, W] ids of the cells that were found.
    """

    name: str
    loss: float
    pixels: int
    hits: NDArray[np.int64]
    counts: ChallengeCounts | None
    cells: metrics.InstanceScores
    found: NDArray[np.int32]

    def scores(self) -> dict[str, Any]:
        """A row of `SCORES`; None where there is no such score."""
        return {"image": self.name} | {k.removeprefix("val_"): v for k, v in _pooled([self]).items() if k in _SHOWN}


_SHOWN = tuple(f"val_{name}" for name in SCORES[1:])


@dataclass(frozen=True, eq=False)
class Judgement:
    """Of all images: `scores`, the columns val_... of a log's row, and each `image`."""

    scores: dict[str, float | None]
    images: list[Judged]


class Validation:
    """Scores of a model on the held-out block, by tiled prediction.

    Args:
        examples: the block; none, and there are no scores.
        loss: what is trained on, evaluated here on whole images.
    """

    def __init__(self, examples: Sequence[Example], loss: BorderWeightedCrossEntropy) -> None:
        self.examples = list(examples)
        # the weights of a slice do not change: made once
        self.targets = [e.target()[None] for e in self.examples]
        self.weights = [loss.weight(e.instances[None], t) for e, t in zip(self.examples, self.targets, strict=True)]

    def judge(self, model: FastUNet, largest_tile: int | None = None, ranks: Ranks | None = None) -> Judgement:
        """How well it does; predicted in tiles of the usual size, or of `largest_tile` if smaller.

        With several processes each predicts some of the images, and all know all scores. A score that is no number,
        because what the net says is none, is NaN.
        """
        ranks = ranks or Ranks()
        normalisation, model.normalisation = model.normalisation, None  # the examples are normalised already
        try:
            mine = [(i, self._of(i, model, largest_tile)) for i in range(ranks.rank, len(self.examples), ranks.world)]
        finally:
            model.normalisation = normalisation
        images = [judged for _, judged in sorted(ranks.gathered(mine), key=lambda pair: pair[0])]
        return Judgement(_pooled(images) if images else {}, images)

    def overlays(self, judged: Judgement) -> dict[str, Any]:
        """Some of the images, evenly from first to last, and their middle where they are large, for pictures.

        names [n]; and of each i below n, [H, W]: image_i float32, truth_i and found_i int32 ids, weight_i float16.
        """
        count = len(judged.images)
        chosen = sorted({round(i) for i in np.linspace(0, count - 1, min(_PICTURES, count))})
        shown: dict[str, Any] = {"names": np.array([judged.images[i].name for i in chosen])}
        for number, i in enumerate(chosen):
            example = self.examples[i]
            sides = [(n, min(n, _PICTURE_SIDE)) for n in example.instances.shape]
            here = tuple(slice((n - m) // 2, (n - m) // 2 + m) for n, m in sides)
            shown |= {
                f"image_{number}": example.image[0].numpy()[here].astype(np.float32),
                f"truth_{number}": example.instances.numpy()[here],
                f"found_{number}": judged.images[i].found[here],
                f"weight_{number}": self.weights[i][0].numpy()[here].astype(np.float16),
            }
        return shown

    def _of(self, number: int, model: FastUNet, largest_tile: int | None) -> Judged:
        example, target, weight = self.examples[number], self.targets[number], self.weights[number]
        tile_in = _tile_for(example, model, largest_tile)
        logits = predict(model, example.image, axes="CYX", tile_in=tile_in, output="logits")[None]
        valid = target.masked_fill(target < 0, -100)
        loss = unet_kernels.weighted_cross_entropy(logits, valid, weight, reduction="sum")
        answer = logits[0].argmax(0)
        here = target[0] >= 0
        hits = np.zeros((3, model.out_channels), np.int64)
        for c in range(model.out_channels):
            a, b = (answer == c)[here], (target[0] == c)[here]
            hits[:, c] = int((a & b).sum()), int(a.sum()), int(b.sum())
        counts = None
        if model.out_channels == 2 and bool(logits.isfinite().all()):
            p = (logits[0, 1] - logits[0, 0]).sigmoid().float()
            cell = (example.instances > 0)[here].numpy().astype(np.int8)
            counts = ChallengeCounts.of(p[here].numpy()[None, None], cell[None, None], ("areas",))
        found = find_cells(answer.numpy())
        cells = metrics.InstanceScores() + metrics.instance_scores(found, example.instances.numpy())
        total = float(loss) if bool(logits.isfinite().all()) else math.nan
        return Judged(example.name, total, int(here.sum()), hits, counts, cells, found.astype(np.int32))


def _pooled(images: Sequence[Judged]) -> dict[str, float | None]:
    hits, cells = sum((each.hits for each in images[1:]), start=images[0].hits), metrics.InstanceScores()
    for each in images:
        cells += each.cells
    union = hits[1] + hits[2] - hits[0]
    iou = float(np.mean([hits[0, c] / union[c] for c in range(1, len(union)) if union[c]] or [1.0]))
    scores: dict[str, float | None] = {
        "val_loss": math.fsum(each.loss for each in images) / max(1, sum(each.pixels for each in images)),
        "val_iou": iou,
        "val_cell_iou": cells.mean_iou,
        "val_ap50": cells.average_precision["0.50"],
    }
    counts = [each.counts for each in images if each.counts is not None]
    if len(counts) == len(images) and any(each.cell_pixels for each in counts):
        parts = ChallengeCounts.pooled(counts).pixel_error()
        scores |= {"val_pixel_error": parts["error"], "val_threshold": parts["threshold"]}
    return scores


def _tile_for(example: Example, model: FastUNet, largest: int | None) -> int | None:
    usual = max(plan_tiles(example.instances.shape, model=model).tile_in)
    if largest is None or usual <= largest:
        return None
    # a tile that is to join others keeps one step of pixels at least
    step = (geometry.step_multiple(model.depth),) * 2
    return max(largest, *covering_tile(step, depth=model.depth, up_mode=model.up_mode))
