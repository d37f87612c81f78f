"""How well a model does on images that it is not trained on, while it is trained."""

from collections.abc import Sequence

import numpy as np

import unet_kernels

from . import geometry, metrics
from .cells import find_cells
from .data import Example
from .inference import predict
from .loss import BorderWeightedCrossEntropy
from .model import FastUNet
from .tiling import covering_tile, plan_tiles

__all__ = ["Validation"]


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

    def scores(self, model: FastUNet, largest_tile: int | None = None) -> dict[str, float | None]:
        """The columns val_... of a log's row; predicted in tiles of the usual size, or of `largest_tile` if smaller."""
        if not self.examples:
            return {}
        normalisation, model.normalisation = model.normalisation, None  # the examples are normalised already
        try:
            return self._scores(model, largest_tile)
        finally:
            model.normalisation = normalisation

    def _scores(self, model: FastUNet, largest_tile: int | None) -> dict[str, float | None]:
        total, pixels, cells = 0.0, 0, metrics.InstanceScores()
        probabilities, truths = [], []
        hits = np.zeros((3, model.out_channels))
        for example, target, weight in zip(self.examples, self.targets, self.weights, strict=True):
            tile_in = _tile_for(example, model, largest_tile)
            logits = predict(model, example.image, axes="CYX", tile_in=tile_in, output="logits")[None]
            if not logits.isfinite().all():
                raise FloatingPointError(f"the net's answer to {example.name} is not finite")
            valid = target.masked_fill(target < 0, -100)
            total += float(unet_kernels.weighted_cross_entropy(logits, valid, weight, reduction="sum"))
            pixels += int((target >= 0).sum())
            found = logits[0].argmax(0)
            here = target[0] >= 0
            for c in range(model.out_channels):
                a, b = (found == c)[here], (target[0] == c)[here]
                hits[:, c] += int((a & b).sum()), int(a.sum()), int(b.sum())
            if model.out_channels == 2:
                p = (logits[0, 1] - logits[0, 0]).sigmoid()
                probabilities.append(p[here].numpy())
                truths.append((example.instances > 0)[here].numpy())
            cells += metrics.instance_scores(find_cells(found.numpy()), example.instances.numpy())
        union = hits[1] + hits[2] - hits[0]
        iou = float(np.mean([hits[0, c] / union[c] for c in range(1, len(union)) if union[c]] or [1.0]))
        scores: dict[str, float | None] = {
            "val_loss": total / max(1, pixels),
            "val_iou": iou,
            "val_cell_iou": cells.mean_iou,
            "val_ap50": cells.average_precision["0.50"],
        }
        if truths:
            pooled = np.concatenate(probabilities)[None], np.concatenate(truths)[None]
            parts = metrics.pixel_error(*pooled, parts=True)
            scores |= {"val_pixel_error": parts["error"], "val_threshold": parts["threshold"]}
        return scores


def _tile_for(example: Example, model: FastUNet, largest: int | None) -> int | None:
    usual = max(plan_tiles(example.instances.shape, model=model).tile_in)
    if largest is None or usual <= largest:
        return None
    # a tile that is to join others keeps one step of pixels at least
    step = (geometry.step_multiple(model.depth),) * 2
    return max(largest, *covering_tile(step, depth=model.depth, up_mode=model.up_mode))
