"""Predictions on disk against the truth on disk: scores of every image and overall, and where cells went wrong."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import unet_kernels

from . import figures, metrics
from .data import agreed, check_same_size, label_facts, label_values, read_labels, understand
from .errors import BadInput
from .files import Stack, list_images, read_stack, writable_folder
from .pairs import Pairing, pair
from .scores import Report

__all__ = ["METRICS", "evaluate"]

Array = NDArray[Any]

# what is counted of an image's pixels for each of the challenge's scores
_CHALLENGE = {
    "pixel_error": "areas",
    "warping_error": "warping",
    "rand_error": "segments",
    "v_rand": "thinned",
    "v_info": "thinned",
}
_OF_CELLS = ("seg", "adapted_rand_error", "cells")
METRICS = ("iou", "dice", *_CHALLENGE, *_OF_CELLS)

# what is shown unless something else is asked for, by what the truth holds
_DEFAULT = {
    "binary": ("iou", "dice", *_CHALLENGE, "cells"),
    "instance": ("iou", "dice", "pixel_error", "seg", "cells"),
    "class": ("iou", "dice", "pixel_error"),
}


def evaluate(
    prediction: Path,
    truth: Path,
    *,
    kind: str = "auto",
    ignore: int | None = None,
    axes: str | None = None,
    wanted: Sequence[str] | None = None,
    figure: Path | None = None,
    images: Path | None = None,
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
        wanted: of `METRICS`, or "all" that the truth allows; None: the area's scores and those of cells, and for a mask
            all of the EM challenge's. Warping, Rand and information scores know no touching cells: where the truth (or
            the prediction) has cell ids, a border is cut between those that touch first, as it is for training
            (`unet_kernels.cut_gap`).
        figure: where to draw splits (red) and mergers (blue) at the threshold of the overall warping error: a TIFF of
            every image, or a picture (PNG, PDF, SVG) of the six with the most.
        images: what the predictions were made from, to draw on; None: the probability of cell.

    Returns:
        iou, dice (of the cells' area, or the mean over classes), the EM challenge's scores, each with the threshold it
        chose, SEG, adapted Rand error, and what `unet_fast.metrics.instance_scores` counts. `overall` pools images, it
        does not average their scores; but V_Rand, V_Info and adapted Rand error are means over slices by definition.

    Raises:
        BadInput: nothing to compare, files that cannot be read, sizes that differ, truth that cannot be understood or
            has no cell, or a metric that its kind does not have.
    """
    for name in wanted or ():
        if name not in (*METRICS, "all"):
            raise BadInput(f"metrics must be of {', '.join(METRICS)}, or all, got {name!r}")
    if figure is not None and figure.suffix.lower() not in _FIGURES:
        raise BadInput(f"figure must end in {', '.join(_FIGURES)}, got {figure.name}")
    if figure is None and images is not None:
        raise BadInput("images are for the figure to be drawn on; name a figure")
    if figure is not None:
        writable_folder(figure.parent)
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
    if facts["highest"] == 0 and kind != "class":
        raise BadInput(f"{truth} must have a cell to be found, got none in any image")
    scored = _applicable(wanted, kind, classes, figure is not None)
    masks = kind != "class" and not pairing.tracking and _are_masks(prediction, [stack for stack, _ in stacks])
    backgrounds = None
    if images is not None:
        backgrounds = _backgrounds(
            images, [(label, stack) for (_, label), (stack, _) in zip(pairing.pairs, stacks, strict=True)]
        )

    counters, pictures = [], []
    for (stack, _), values in zip(stacks, truths, strict=True):
        for name, planes, ids in zip(stack.names, stack.pixels, values, strict=True):
            picture = _Image.of(name, planes, ids, kind, classes, masks)
            counters.append(_Counts.of(picture, classes, scored))
            if figure is not None:
                pictures.append(picture)
    overall = _Counts.pooled(counters).row()
    for name in (*(wanted or ()), *(["warping_error"] if figure is not None else [])):
        if name in _CHALLENGE and name not in overall:
            left = " once a border is cut between those that touch" if kind == "instance" else ""
            raise BadInput(f"{truth} must have a cell for {name}, got none{left}")
    if figure is not None:
        _draw(figure, pictures, overall, backgrounds)
    return Report(
        [c.row() for c in counters],
        overall,
        kind,
        [p.name for p in pairing.lone_labels],
        [p.name for p in pairing.lone_images],
    )


def _applicable(wanted: Sequence[str] | None, kind: str, classes: int, drawn: bool) -> Sequence[str]:
    """What is scored, in the order of METRICS; what the truth does not allow is refused by name."""
    allowed = [
        name
        for name in METRICS
        if not (name in _OF_CELLS and kind == "class") and not (name in _CHALLENGE and classes > 2)
    ]
    if wanted is None:
        wanted = [name for name in _DEFAULT[kind] if name in allowed]
    elif "all" in wanted:
        wanted = allowed
    for name in wanted:
        if name not in allowed:
            raise BadInput(f"{name} needs cells and background, the truth was understood as {classes} classes")
    if drawn and "warping_error" not in allowed:
        raise BadInput(f"a figure needs cells and background, the truth was understood as {classes} classes")
    return [name for name in METRICS if name in wanted or (drawn and name == "warping_error")]


def _paired(prediction: Path, truth: Path) -> Pairing:
    if prediction.exists() and truth.exists() and prediction.samefile(truth):
        # the truth against itself: the sanity check that everything is perfect
        return Pairing([(path, path) for path in list_images(truth)], [], [])
    return pair(prediction, truth)


def _looks_like_labels(path: Path) -> bool:
    # a palette's indices are the labels, and JPEG changes them; a TIFF's channels may be probabilities
    return path.suffix.lower() in (".png", ".jpg", ".jpeg")


def _are_masks(prediction: Path, stacks: Sequence[Stack]) -> bool:
    """Whether predictions of whole numbers are masks, whose components are the cells, or ids of cells.

    Decided once for all of them: one image with a single cell does not make its id a mask.
    """
    whole = [stack.pixels[:, 0] for stack in stacks if stack.pixels.dtype.kind != "f"]
    facts = label_facts(whole)
    if facts["in_one_piece"] is not None and facts["in_one_piece"] < 0.5:
        raise BadInput(
            f"{prediction} holds neither masks nor cell ids: {1 - facts['in_one_piece']:.0%} of its values lie in "
            "several pieces; probabilities in grey values, divided by the greatest, must be saved as float32"
        )
    return len(facts["values"]) <= 1


@dataclass(frozen=True)
class _Image:
    """A prediction and its truth, [H, W] each."""

    name: str
    target: Array  # class, or 1 for cell; -1 ignored
    found: Array  # likewise, predicted
    probability: Array  # of cell
    true_cells: Array | None  # ids, -1 ignored; None where there are classes
    found_cells: Array | None

    @classmethod
    def of(cls, name: str, planes: Array, ids: Array, kind: str, classes: int, masks: bool) -> "_Image":
        probability, labels = _prediction(name, planes, kind, classes)
        if kind == "class":
            return cls(name, ids.astype(np.int16), labels.astype(np.int16), probability, None, None)
        mask = np.where(ids < 0, -1, ids > 0).astype(np.int8)
        cells = ids.astype(np.int32) if kind == "instance" else metrics.components(mask)
        # what is no whole number was cut at a threshold
        single = masks or planes.dtype.kind == "f"
        found = metrics.components(labels > 0) if single else _renumbered(labels)
        return cls(name, mask, (labels > 0).astype(np.int8), probability, cells, found)

    def bordered(self) -> tuple[Array, Array]:
        """Probability and truth as the EM challenge has them: with a border between cells that touch."""
        if self.true_cells is None or self.found_cells is None:
            return self.probability, self.target
        lost = (_cut(self.found_cells) == 0) & (self.found_cells > 0)
        return np.where(lost, 0, self.probability), np.where(self.target < 0, -1, _cut(self.true_cells) > 0)


def _renumbered(ids: Array) -> Array:
    """The same cells with ids that fit 32 bits."""
    if ids.max() < 2**31:
        return ids.astype(np.int32)
    values, numbers = np.unique(ids, return_inverse=True)
    return numbers.reshape(ids.shape).astype(np.int32) + np.int32(values[0] != 0)


def _cut(cells: Array) -> Array:
    return unet_kernels.cut_gap(torch.from_numpy(cells)[None])[0].numpy()


@dataclass
class _Counts:
    """What one image adds to the pool."""

    name: str
    wanted: Sequence[str]
    hits: Array
    areas: metrics.ChallengeCounts | None
    borders: metrics.ChallengeCounts | None
    cells: metrics.InstanceScores | None
    jaccard: list[float]
    adapted_rand: list[float]

    @classmethod
    def of(cls, image: _Image, classes: int, wanted: Sequence[str]) -> "_Counts":
        counted = image.target >= 0
        hits = np.array(
            [
                [
                    int(((image.found == c) & (image.target == c) & counted).sum()),
                    *(int((m[counted] == c).sum()) for m in (image.found, image.target)),
                ]
                for c in range(1, classes)
            ]
        )
        areas = _counted((image.probability, image.target), ["areas"]) if "pixel_error" in wanted else None
        needed = {what for name, what in _CHALLENGE.items() if name in wanted} - {"areas"}
        borders = _counted(image.bordered(), needed) if needed else None
        cells, jaccard, adapted_rand = None, [], []
        if image.true_cells is not None and image.found_cells is not None:
            ids = (image.found_cells, image.true_cells)
            if "cells" in wanted:
                cells = metrics.instance_scores(*ids)
            if (image.true_cells > 0).any():
                if "seg" in wanted:
                    jaccard = metrics.seg(*ids, parts=True)["jaccard"]
                if "adapted_rand_error" in wanted:
                    adapted_rand = [metrics.adapted_rand_error(*ids)]
        return cls(image.name, wanted, hits, areas, borders, cells, jaccard, adapted_rand)

    @classmethod
    def pooled(cls, parts: Sequence["_Counts"]) -> "_Counts":
        def all_of(name: str) -> list[Any]:
            return [each for each in (getattr(part, name) for part in parts) if each is not None]

        return cls(
            "overall",
            parts[0].wanted,
            np.sum([p.hits for p in parts], axis=0),
            metrics.ChallengeCounts.pooled(all_of("areas")) if all_of("areas") else None,
            metrics.ChallengeCounts.pooled(all_of("borders")) if all_of("borders") else None,
            sum(all_of("cells"), metrics.InstanceScores()) if all_of("cells") else None,
            [value for part in parts for value in part.jaccard],
            [value for part in parts for value in part.adapted_rand],
        )

    def row(self) -> dict[str, Any]:
        both, found, true = self.hits.T
        row: dict[str, Any] = {"name": self.name}
        present = (found + true) > 0
        if "iou" in self.wanted:
            row["iou"] = _mean(both[present] / (found + true - both)[present])
        if "dice" in self.wanted:
            row["dice"] = _mean(2 * both[present] / (found + true)[present])
        for name in _CHALLENGE:
            counts = self.areas if name == "pixel_error" else self.borders
            if name in self.wanted and counts is not None and counts.cell_pixels:
                row |= _challenge_row(name, getattr(counts, name)())
        if self.jaccard:
            row["seg"] = math.fsum(self.jaccard) / len(self.jaccard)
        if self.adapted_rand:
            row["adapted_rand_error"] = math.fsum(self.adapted_rand) / len(self.adapted_rand)
        if self.cells is not None:
            row |= {
                "cell_iou": self.cells.mean_iou,
                "ap50": self.cells.average_precision["0.50"],
                "ap": self.cells.mean_average_precision,
            }
            counted = ("true_cells", "predicted_cells", "touching_pairs", "merged_pairs", "split_cells")
            row |= {key: getattr(self.cells, key) for key in counted}
            # detections at an IoU of 0.5 and above
            tp = self.cells.matched[0]
            row |= {"detected": tp, "missed": self.cells.true_cells - tp, "false": self.cells.predicted_cells - tp}
        return row


def _counted(pair: tuple[Array, Array], wanted: Collection[str]) -> metrics.ChallengeCounts:
    probability, target = pair
    truth = np.where(target < 0, -1, target > 0).astype(np.int8)
    # what is predicted on ignored pixels counts as background
    return metrics.ChallengeCounts.of(np.where(truth < 0, 0, probability).astype(np.float32)[None], truth[None], wanted)


def _challenge_row(name: str, scores: dict[str, Any]) -> dict[str, Any]:
    """name itself, and under its name the threshold chosen and the halves: mergers and splits."""
    row = {name: scores.get("error", scores.get(name)), f"{name}_threshold": scores["threshold"]}
    if name == "warping_error":
        return row | {"split_pixels": scores["split"], "merge_pixels": scores["merge"]}
    return row | {f"{name}_precision": scores["precision"], f"{name}_recall": scores["recall"]}


_FIGURES = (".png", ".pdf", ".svg", ".tif", ".tiff")
_MOST = 6


def _draw(path: Path, pictures: Sequence[_Image], overall: dict[str, Any], backgrounds: list[Array] | None) -> None:
    """Splits and mergers of every image, or, in a picture, of those with the most."""
    threshold = overall["warping_error_threshold"]
    drawn = []
    for i, picture in enumerate(pictures):
        probability, target = picture.bordered()
        kinds = metrics.warping_map(np.where(target < 0, 0, probability), target.astype(np.int8), threshold)
        grey = picture.probability if backgrounds is None else backgrounds[i]
        places = metrics.error_places(kinds)
        title = f"{picture.name}: {_several(places['split'], 'split')}, {_several(places['merge'], 'merger')}"
        drawn.append((title, grey, kinds, sum(places.values())))
    if path.suffix.lower() not in (".tif", ".tiff"):
        drawn = sorted(drawn, key=lambda each: -each[3])[:_MOST]
    figures.draw_errors(path, [each[:3] for each in drawn], threshold)


def _several(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _backgrounds(images: Path, compared: Sequence[tuple[Path, Stack]]) -> list[Array]:
    """The image of each slice that is compared, [H, W], channels averaged; (label file, prediction) each."""
    first = compared[0][0]
    partner = {label: image for image, label in pair(images, first if images.is_file() else first.parent).pairs}
    planes = []
    for label, prediction in compared:
        if label not in partner:
            raise BadInput(f"{images} has no image for {label.name}")
        image = read_stack(partner[label])
        check_same_size(image, prediction)
        planes += [channels.mean(axis=0) for channels in image.pixels]
    return planes


def _mean(values: Array) -> float:
    # nothing there and nothing found: nothing is wrong
    return float(values.mean()) if len(values) else 1.0


def _prediction(name: str, planes: Array, kind: str, classes: int) -> tuple[Array, Array]:
    """(probability of cell, labels) of one predicted image [C, H, W]."""
    if planes.dtype.kind == "f":
        if planes.min() < 0 or planes.max() > 1:
            raise BadInput(f"{name} must hold probabilities between 0 and 1, got {planes.min():g} to {planes.max():g}")
        if len(planes) > 2 or (len(planes) == 2 and kind == "class"):
            return 1 - planes[0], planes.argmax(0)
        return planes[-1], (planes[-1] > 0.5).astype(np.int64)
    if len(planes) != 1:
        raise BadInput(f"{name} holds {len(planes)} channels of whole numbers; expected one channel of labels")
    if planes.dtype == np.uint64 and planes.max() >= 2**63:
        raise BadInput(f"{name} has label {planes.max()}, which does not fit 63 bits; renumber them from 1")
    labels = planes[0].astype(np.int64)
    if labels.min() < 0:
        raise BadInput(f"{name} must hold labels of 0 and above, got {labels.min()}")
    if kind == "class" and labels.max() >= classes:
        raise BadInput(
            f"{name} has label {labels.max()}, the truth has classes 0 to {classes - 1}; are these cell ids?"
        )
    return (labels > 0).astype(np.float32), labels
