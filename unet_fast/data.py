"""Labelled images for training: what the labels mean, and images and instances in the form the trainer takes.

Every label image becomes `instances` (a cell is an id; 0 background, negative ignored) with a table of the class of
each id, so that binary masks, class maps and instance maps are trained by one rule: the border between two cells is
weighed whatever their class, and a gap cut between them is background.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

import unet_kernels

from .errors import BadInput
from .files import Stack, read_stack
from .normalisation import Normalisation
from .pairs import Pairing, pair

__all__ = [
    "LABEL_KINDS",
    "Example",
    "Grey",
    "Labelled",
    "agreed",
    "check_finite",
    "check_same_size",
    "class_balance",
    "instances_of",
    "label_facts",
    "label_ids",
    "label_values",
    "read_labelled",
    "read_labels",
    "split",
    "target_of",
    "understand",
]

LABEL_KINDS = ("auto", "binary", "class", "instance")

# fewer different ids than this in every image: classes and instances cannot be told apart
_FEW = 5


@dataclass(frozen=True, slots=True)
class Grey:
    """Grey values as a file of whole numbers has them, and what becomes of them: `Normalisation`'s, to the last bit.

    values [C, H, W] uint8 or uint16; low and span [C, 1, 1] float64, NaN where they are taken as they are.
    """

    values: Tensor
    low: Tensor
    span: Tensor

    def normalised(self, here: Any = ...) -> Tensor:
        """(values - low) / span, from 0 to 1, in float64; float32 comes out. Of a part, if one likes."""
        values = self.values[here].double()
        scaled = ((values - self.low) / self.span).clamp(0, 1)
        return torch.where(self.low.isnan(), values, scaled).float()


@dataclass(frozen=True, slots=True)
class Example:
    """One slice to learn from.

    image [C, H, W] float32, normalised; instances [H, W] int32; class_of [highest id + 1] int64, the class of each id;
    grey: what the image was made of, where that takes less memory.
    """

    name: str
    image: Tensor
    instances: Tensor
    class_of: Tensor
    grey: Grey | None = None

    @property
    def one_kind(self) -> bool:
        """Whether all cells are of one class."""
        return int(self.class_of.max()) <= 1

    def target(self) -> Tensor:
        """Class of each pixel [H, W] int64: that of its cell, 0 in background and gaps, -1 where ignored."""
        return target_of(self.instances[None], self.class_of)[0]

    def rows(self, first: int, stop: int) -> "Example":
        """Some of its rows, as an example."""
        grey = self.grey and Grey(self.grey.values[:, first:stop], self.grey.low, self.grey.span)
        name = f"{self.name} rows {first}-{stop - 1}"
        return Example(name, self.image[:, first:stop], self.instances[first:stop], self.class_of, grey)


def target_of(instances: Tensor, class_of: Tensor, *, one_kind: bool | None = None) -> Tensor:
    """Class ids [N, H, W] int64 of instances [N, H, W], -1 where ignored.

    `one_kind`: whether no class is above 1, for who knows it without asking the device.

    Where two cells of one kind touch, a gap of background is cut between them. Of several classes no gap is cut: cells
    of one class are its connected parts and never touch, and what lies beside another class belongs there.
    """
    one_kind = bool(class_of.max() <= 1) if one_kind is None else one_kind
    cut = (unet_kernels.cut_gap(instances) if one_kind else instances).long()
    return torch.where(cut < 0, -1, class_of[cut.clamp(min=0)])


@dataclass(frozen=True, slots=True)
class Labelled:
    """What was read, and what it was understood to be."""

    examples: list[Example]
    kind: str
    classes: int
    channels: int
    pairing: Pairing
    facts: dict[str, Any]


def read_labelled(
    images: Path,
    labels: Path,
    *,
    kind: str = "auto",
    ignore: int | None = None,
    axes: str | None = None,
    normalisation: Normalisation | None = None,
) -> Labelled:
    """Read images and labels, check all that training would trip over, and say what the labels are.

    Args:
        images: a file, or a folder; `unet_fast.pairs` says which layouts.
        labels: likewise.
        kind: "binary": 0 and one other value, whose 4-connected components are the cells. "class": the values are
            classes. "instance": the values are cells. "auto": found out, or refused where it cannot be.
        ignore: a label value that is not trained on. Negative values are ignored always.
        axes: of the image files, where they do not say.
        normalisation: applied to the images; default `Normalisation()`.

    Raises:
        BadInput: files without partner, sizes that differ, NaN or infinite pixels, labels that fit no kind, ...
    """
    if kind not in LABEL_KINDS:
        raise BadInput(f"label kind must be one of {', '.join(LABEL_KINDS)}, got {kind!r}")
    pairing = pair(images, labels)
    refuse_unmatched(pairing, images, labels)
    stacks = [(read_stack(i, axes=axes), read_labels(m, axes)) for i, m in pairing.pairs]
    channels = _one_number_of_channels([s for s, _ in stacks])
    maps = [label_values(picture, label, ignore) for picture, label in stacks]
    facts = label_facts(maps)
    if pairing.tracking and kind == "auto":
        kind = "instance"
    kind = understand(facts, labels) if kind == "auto" else agreed(kind, facts, labels)
    normalise = normalisation or Normalisation()
    examples = []
    for (picture, _), values in zip(stacks, maps, strict=True):
        for name, plane, ids in zip(picture.names, picture.pixels, values, strict=True):
            image = torch.from_numpy(normalise(plane))
            examples.append(Example(name, image, *instances_of(ids, kind), _grey(plane, normalise)))
    if not any((e.instances > 0).any() for e in examples):
        raise BadInput(f"{labels} has no cell in any of {len(examples)} label images; there is nothing to learn")
    classes = facts["highest"] + 1 if kind == "class" else 2
    return Labelled(examples, kind, classes, channels, pairing, facts)


def _grey(plane: np.ndarray[Any, Any], normalisation: Normalisation) -> Grey | None:
    """Of a slice [C, H, W]; None where its file has other numbers than 8 or 16 bits, 0 and above."""
    if plane.dtype not in (np.uint8, np.uint16):
        return None
    # in this machine's order of bytes, and nobody else's memory
    values = torch.from_numpy(plane.astype(plane.dtype.newbyteorder("=")))
    low, span = (torch.from_numpy(each) for each in normalisation.ends(plane))
    return Grey(values, low, span)


def refuse_unmatched(pairing: Pairing, images: Path, labels: Path) -> None:
    """Raise BadInput unless every image has labels and every label file an image."""
    if pairing.lone_labels:
        raise BadInput(f"{labels} has {_files(pairing.lone_labels)} without an image in {images}")
    if pairing.lone_images and not pairing.tracking:
        raise BadInput(f"{images} has {_files(pairing.lone_images)} without labels in {labels}")
    if not pairing.pairs:
        raise BadInput(f"{images} and {labels} have no name in common")


def _files(paths: Sequence[Path]) -> str:
    names = ", ".join(p.name for p in paths[:3])
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return f"{len(paths)} file{'s' if len(paths) > 1 else ''} ({names}{more})"


def _one_number_of_channels(stacks: Sequence[Stack]) -> int:
    first = stacks[0]
    for stack in stacks:
        if stack.pixels.shape[1] != first.pixels.shape[1]:
            raise BadInput(
                f"{stack.path} has {_channels(stack)} and {first.path.name} has {_channels(first)}; "
                f"all images must have the same number"
            )
    return first.pixels.shape[1]


def _channels(stack: Stack) -> str:
    count = stack.pixels.shape[1]
    return f"{count} channel{'s' if count > 1 else ''}"


def check_finite(stack: Stack) -> None:
    """Raise BadInput where a pixel is NaN or infinite, naming the first."""
    if stack.pixels.dtype.kind == "f" and not np.isfinite(stack.pixels).all():
        z, _, row, column = np.argwhere(~np.isfinite(stack.pixels))[0]
        count = int((~np.isfinite(stack.pixels)).sum())
        where = f"{stack.names[z]} row {row} column {column}"
        raise BadInput(f"{stack.path} has {count} NaN or infinite pixels, the first at {where}; replace them first")


def read_labels(path: Path, axes: str | None = None) -> Stack:
    """A label file; `axes` are its images': without the channels they hold here too, if there are as many."""
    if axes is None:
        return read_stack(path, labels=True)
    try:
        return read_stack(path, axes=axes.replace("C", ""), labels=True)
    except BadInput:
        # of another number of axes: what the file itself says
        return read_stack(path, labels=True)


def label_values(picture: Stack, label: Stack, ignore: int | None) -> np.ndarray[Any, Any]:
    """Ids [D, H, W] int64, -1 where ignored."""
    check_finite(picture)
    check_same_size(picture, label)
    return label_ids(label, ignore)


def check_same_size(picture: Stack, label: Stack) -> None:
    """Raise BadInput unless labels have their image's slices, rows and columns."""
    a, b = picture.pixels.shape, label.pixels.shape
    if (a[0], *a[2:]) != (b[0], *b[2:]):
        raise BadInput(f"{label.path} is {_described(b)}, {picture.path.name} is {_described(a)}")


def label_ids(label: Stack, ignore: int | None) -> np.ndarray[Any, Any]:
    """As `label_values`, of a label file by itself."""
    check_finite(label)
    values = label.pixels[:, 0]
    if values.dtype.kind == "f" and not (values == np.round(values)).all():
        odd = values[values != np.round(values)].flat[0]
        raise BadInput(f"{label.path} must hold whole numbers as labels, got {odd:g}")
    if values.dtype.kind != "i" and values.size and values.max() >= 2**31:
        raise BadInput(f"{label.path} has label {values.max():.0f}, which does not fit 32 bits")
    if values.dtype.kind == "f":
        values = values.clip(min=-(2**31))  # what a file writes for "nothing" may be -3e38
    values = values.astype(np.int64)
    if ignore is not None:
        values = np.where(values == ignore, -1, values)
    return np.where(values < 0, -1, values)


def _described(shape: tuple[int, ...]) -> str:
    slices = f"{shape[0]} slices of " if shape[0] > 1 else ""
    return f"{slices}{shape[2]}x{shape[3]}"


def label_facts(maps: Iterable[np.ndarray[Any, Any]]) -> dict[str, Any]:
    """What the label values look like: different values, most ids in one slice, share of ids in one piece."""
    values: set[int] = set()
    most, whole, counted, ignored = 0, 0, 0, 0
    for stack in maps:
        for plane in stack:
            here = np.unique(plane)
            ignored += int((plane < 0).sum())
            here = here[here > 0]
            values.update(here.tolist())
            most = max(most, len(here))
            if len(here) >= _FEW:
                # pieces of an id = pieces of the map cut where ids change, 8-connected so that thin cells are one
                pieces = sum(ndimage.label(plane[box] == i, np.ones((3, 3)))[1] == 1 for i, box in _boxes(plane))
                whole, counted = whole + int(pieces), counted + len(here)
    return {
        "values": sorted(values),
        "highest": max(values, default=0),
        "most_in_one_image": most,
        "in_one_piece": whole / counted if counted else None,
        "ignored_pixels": ignored,
    }


def _boxes(plane: np.ndarray[Any, Any]) -> Iterable[tuple[int, Any]]:
    ids, compact = np.unique(np.maximum(plane, 0), return_inverse=True)
    compact = compact.reshape(plane.shape)
    offset = int(ids[0] == 0)
    boxes = ndimage.find_objects(compact + (1 - offset))
    return [(int(i), box) for i, box in zip(ids[offset:], boxes, strict=True) if box is not None]


def understand(facts: dict[str, Any], labels: Path) -> str:
    """The kind of labels, from `label_facts`.

    Raises:
        BadInput: class ids and instance ids cannot be told apart.
    """
    values = facts["values"]
    if len(values) <= 1:
        return "binary"
    if facts["most_in_one_image"] >= _FEW and facts["in_one_piece"] >= 0.95:
        return "instance"
    shown = ", ".join(map(str, values[:6])) + (", ..." if len(values) > 6 else "")
    raise BadInput(
        f"{labels} has the values 0, {shown}, which can be classes or cells; "
        f"say --label-kind class or --label-kind instance (or binary, if they are one mask)"
    )


def agreed(kind: str, facts: dict[str, Any], labels: Path) -> str:
    values = facts["values"]
    if kind == "binary" and len(values) > 1:
        shown = ", ".join(map(str, values[:6])) + (", ..." if len(values) > 6 else "")
        raise BadInput(f"{labels} must hold 0 and one other value to be binary, got 0, {shown}")
    if kind == "class" and facts["highest"] > 255:
        raise BadInput(f"{labels} has class {facts['highest']}; classes go from 0 to 255, are these instances?")
    return kind


def instances_of(values: np.ndarray[Any, Any], kind: str) -> tuple[Tensor, Tensor]:
    """(instances [H, W] int32 with ids 1 .. n, class_of [n + 1]) of one plane of label values."""
    if kind == "instance":
        ids, compact = np.unique(np.maximum(values, 0), return_inverse=True)
        instances = compact.reshape(values.shape).astype(np.int32) + int(ids[0] != 0)
        class_of = [0, *[1] * int(instances.max())]
    else:
        instances, class_of = np.zeros(values.shape, np.int32), [0]
        for c in np.unique(values[values > 0]):
            found, count = ndimage.label(values == c)
            instances[found > 0] = found[found > 0] + (len(class_of) - 1)
            class_of += [1 if kind == "binary" else int(c)] * count
    instances[values < 0] = -1
    return torch.from_numpy(instances), torch.tensor(class_of, dtype=torch.int64)


def split(examples: Sequence[Example], share: float) -> tuple[list[Example], list[Example]]:
    """(training, validation): the last `share` of the examples, in order, is for validation.

    Neighbouring slices show the same cells, so the block is contiguous. A single example gives the rows at its bottom.
    """
    if share == 0:
        return list(examples), []
    if len(examples) > 1:
        count = min(len(examples) - 1, max(1, round(share * len(examples))))
        return list(examples[:-count]), list(examples[-count:])
    only = examples[0]
    rows = only.image.shape[1]
    if rows == 1:
        return [only], []
    cut = rows - min(rows - 1, max(1, round(share * rows)))
    return [only.rows(0, cut)], [only.rows(cut, rows)]


def class_balance(dataset: Iterable[Any]) -> tuple[float, ...]:
    """w_c = 1 / (K f_c) over a training set, f_c the share of class c among pixels that are not ignored.

    With two classes that is 0.5 / f_c: (background, cell). Over the whole set and never per tile, so that the gradient
    does not depend on how images are cut.

    Args:
        dataset: examples (`Example`), or instances [H, W] (tensors or arrays), whose cells are one class.

    Raises:
        BadInput: a class up to the highest has no pixel at all, so that no weight balances it.
    """
    counts = torch.zeros(2, dtype=torch.int64)
    for item in dataset:
        if not isinstance(item, Example):
            ids = torch.as_tensor(item)
            item = Example("", ids[None].float(), ids, torch.ones(max(1, int(ids.max()) + 1), dtype=torch.int64))
            item.class_of[0] = 0
        target = item.target()
        here = torch.bincount(target[target >= 0].flatten(), minlength=len(counts))
        counts = torch.nn.functional.pad(counts, (0, len(here) - len(counts))) + here
    if (counts == 0).any():
        missing = int((counts == 0).nonzero()[0])
        what = "background" if missing == 0 else f"class {missing}"
        raise BadInput(f"the training set has no pixel of {what}; it cannot be told from the rest")
    return tuple((counts.sum() / (len(counts) * counts.double())).tolist())
