"""Predictions on disk against the truth on disk: a table per image and overall."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import metrics
from .data import agreed, label_facts, label_values, read_labels, understand
from .errors import BadInput
from .files import list_images, read_stack
from .pairs import Pairing, pair

__all__ = ["METRICS", "Report", "evaluate", "table"]

METRICS = ("iou", "dice", "pixel_error", "cells")

# a column of the table: its key in a row, its heading, its format
_COLUMNS = (
    ("iou", "IoU", ".3f"),
    ("dice", "Dice", ".3f"),
    ("pixel_error", "pixel error", ".4f"),
    ("cell_iou", "cell IoU", ".3f"),
    ("ap50", "AP 0.5", ".3f"),
    ("ap", "AP .5-.9", ".3f"),
    ("true_cells", "cells", "d"),
    ("predicted_cells", "found", "d"),
    ("touching_pairs", "touching", "d"),
    ("merged_pairs", "merged", "d"),
    ("split_cells", "split", "d"),
)


@dataclass(frozen=True, slots=True)
class Report:
    """Scores of each image (a slice of a stack is one) and of all of them pooled."""

    images: list[dict[str, Any]]
    overall: dict[str, Any]
    understood_as: str
    without_prediction: list[str] = field(default_factory=list)
    without_truth: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {
            "overall": self.overall,
            "images": self.images,
            "labels_understood_as": self.understood_as,
            "truth_without_prediction": self.without_prediction,
            "prediction_without_truth": self.without_truth,
        }

    def table(self) -> str:
        """Rows of text, one an image, `overall` last."""
        lines = table([*self.images, self.overall]).splitlines()
        rule = "-" * len(lines[0])
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A heading and a line for each row of scores; columns that no row has are left out."""
    shown = [c for c in _COLUMNS if any(row.get(c[0]) is not None for row in rows)]
    cells = [["", *(heading for _, heading, _ in shown)]]
    cells += [[r["name"], *(format(r[k], f) if r.get(k) is not None else "-" for k, _, f in shown)] for r in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    )


def evaluate(
    prediction: Path,
    truth: Path,
    *,
    kind: str = "auto",
    ignore: int | None = None,
    axes: str | None = None,
    wanted: Sequence[str] = METRICS,
) -> Report:
    """Score predictions against labels.

    Args:
        prediction: a file or folder. Floating files are probabilities: of the cell (one channel, or the second of
            two), or one channel per class. Whole numbers are labels or cell ids: 0 and one other value is a mask, whose
            4-connected components are the cells.
        truth: a file or folder of labels.
        kind: what the truth's values are, as in `unet_fast.data.read_labelled`.
        ignore: a truth value whose pixels do not count.
        axes: of the truth's files, where they do not say.
        wanted: of `METRICS`.

    Returns:
        iou, dice (of the cells' area, or the mean over classes), pixel_error (1 - the greatest F1 over thresholds),
        and what `unet_fast.metrics.instance_scores` counts.

    Raises:
        BadInput: nothing to compare, files that cannot be read, sizes that differ, truth that cannot be understood.
    """
    for name in wanted:
        if name not in METRICS:
            raise BadInput(f"metrics must be of {', '.join(METRICS)}, got {name!r}")
    pairing = _paired(prediction, truth)
    if not pairing.pairs:
        raise BadInput(f"{prediction} and {truth} have no name in common")
    stacks = [(read_stack(p, labels=_looks_like_labels(p)), read_labels(t, axes)) for p, t in pairing.pairs]
    truths = [label_values(p, t, ignore) for p, t in stacks]
    facts = label_facts(truths)
    if kind == "auto":
        kind = "instance" if pairing.tracking else understand(facts, truth)
    else:
        kind = agreed(kind, facts, truth)
    classes = max(2, facts["highest"] + 1) if kind == "class" else 2
    counters = [
        _Counts.of(name, planes, ids, kind, classes, wanted)
        for (stack, _), values in zip(stacks, truths, strict=True)
        for name, planes, ids in zip(stack.names, stack.pixels, values, strict=True)
    ]
    return Report(
        [c.row() for c in counters],
        _Counts.pooled(counters).row(),
        kind,
        [p.name for p in pairing.lone_labels],
        [p.name for p in pairing.lone_images],
    )


def _paired(prediction: Path, truth: Path) -> Pairing:
    if prediction.exists() and truth.exists() and prediction.samefile(truth):
        # the truth against itself: the sanity check that everything is perfect
        return Pairing([(path, path) for path in list_images(truth)], [], [])
    return pair(prediction, truth)


def _looks_like_labels(path: Path) -> bool:
    # a palette's indices are the labels; a TIFF's channels may be probabilities
    return path.suffix.lower() == ".png"


@dataclass
class _Counts:
    """What one image adds to the pool."""

    name: str
    wanted: Sequence[str]
    hits: np.ndarray[Any, Any]
    probability: np.ndarray[Any, Any] | None
    cell: np.ndarray[Any, Any]
    cells: metrics.InstanceScores | None

    @classmethod
    def of(
        cls,
        name: str,
        planes: np.ndarray[Any, Any],
        ids: np.ndarray[Any, Any],
        kind: str,
        classes: int,
        wanted: Sequence[str],
    ) -> "_Counts":
        counted = ids >= 0
        probability, labels = _prediction(name, planes, kind, classes)
        target = ids if kind == "class" else (ids > 0).astype(np.int64)
        found = labels if kind == "class" else labels > 0
        hits = np.array(
            [
                [
                    int(((found == c) & (target == c) & counted).sum()),
                    *(int((m[counted] == c).sum()) for m in (found, target)),
                ]
                for c in range(1, classes)
            ]
        )
        cells = None
        if "cells" in wanted and kind != "class":
            true_cells = ids if kind == "instance" else np.where(counted, metrics.components(ids > 0), -1)
            cells = metrics.instance_scores(_cells(labels), true_cells)
        single = classes == 2
        return cls(name, wanted, hits, probability[counted] if single else None, (target > 0)[counted], cells)

    @classmethod
    def pooled(cls, parts: Sequence["_Counts"]) -> "_Counts":
        probabilities = [p.probability for p in parts if p.probability is not None]
        cells = [p.cells for p in parts if p.cells is not None]
        return cls(
            "overall",
            parts[0].wanted,
            np.sum([p.hits for p in parts], axis=0),
            np.concatenate(probabilities) if probabilities else None,
            np.concatenate([p.cell for p in parts]),
            sum(cells, metrics.InstanceScores()) if cells else None,
        )

    def row(self) -> dict[str, Any]:
        both, found, true = self.hits.T
        row: dict[str, Any] = {"name": self.name}
        present = (found + true) > 0
        if "iou" in self.wanted:
            row["iou"] = _mean(both[present] / (found + true - both)[present])
        if "dice" in self.wanted:
            row["dice"] = _mean(2 * both[present] / (found + true)[present])
        if "pixel_error" in self.wanted and self.probability is not None and self.cell.any():
            row["pixel_error"] = metrics.pixel_error(self.probability[None], self.cell[None])
        if self.cells is not None:
            row |= {
                "cell_iou": self.cells.mean_iou,
                "ap50": self.cells.average_precision["0.50"],
                "ap": self.cells.mean_average_precision,
            }
            counted = ("true_cells", "predicted_cells", "touching_pairs", "merged_pairs", "split_cells")
            row |= {key: getattr(self.cells, key) for key in counted}
        return row


def _mean(values: np.ndarray[Any, Any]) -> float:
    # nothing there and nothing found: nothing is wrong
    return float(values.mean()) if len(values) else 1.0


def _prediction(
    name: str, planes: np.ndarray[Any, Any], kind: str, classes: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(probability of cell, labels) of one predicted image [C, H, W]."""
    if planes.dtype.kind == "f":
        if planes.min() < 0 or planes.max() > 1:
            raise BadInput(f"{name} must hold probabilities between 0 and 1, got {planes.min():g} to {planes.max():g}")
        if len(planes) > 2 or (len(planes) == 2 and kind == "class"):
            return 1 - planes[0], planes.argmax(0)
        return planes[-1], (planes[-1] > 0.5).astype(np.int64)
    if len(planes) != 1:
        raise BadInput(f"{name} holds {len(planes)} channels of whole numbers; expected one channel of labels")
    labels = planes[0].astype(np.int64)
    if labels.min() < 0:
        raise BadInput(f"{name} must hold labels of 0 and above, got {labels.min()}")
    if kind == "class" and labels.max() >= classes:
        raise BadInput(
            f"{name} has label {labels.max()}, the truth has classes 0 to {classes - 1}; are these cell ids?"
        )
    return (labels > 0).astype(np.float32), labels


def _cells(labels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Cell ids as they are; of a mask, its components."""
    positive = labels[labels > 0]
    is_mask = positive.size == 0 or bool((positive == positive[0]).all())
    return metrics.components(labels > 0) if is_mask else labels
