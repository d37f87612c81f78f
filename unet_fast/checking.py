"""`check-data`: look at images and labels before training does, and list everything it would trip over."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .data import (
    LABEL_KINDS,
    Example,
    agreed,
    check_finite,
    check_same_size,
    class_balance,
    instances_of,
    label_facts,
    label_ids,
    read_labels,
    understand,
)
from .errors import BadInput
from .files import Stack, read_stack
from .pairs import Pairing, pair

__all__ = ["Findings", "check_data"]


@dataclass(slots=True)
class Findings:
    """What lies there. `problems` are sentences: training refuses each of them; `remarks` it would live with."""

    pairs: int = 0
    slices: int = 0
    shapes: dict[str, int] = field(default_factory=dict)
    grey_values: str = ""
    labels: dict[str, Any] = field(default_factory=dict)
    understood_as: str | None = None
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    unmatched_images: list[str] = field(default_factory=list)
    unmatched_labels: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def render(self) -> str:
        """The findings as text for a reader."""
        lines = [f"pairs of files   {self.pairs}, {self.slices} slices in all"]
        lines += [f"{count:8d} x       {shape}" for shape, count in self.shapes.items()]
        if self.grey_values:
            lines.append(f"grey values      {self.grey_values}")
        facts = self.labels
        if facts:
            values = facts["values"]
            shown = ", ".join(map(str, values[:8])) + (f", ... {values[-1]}" if len(values) > 8 else "")
            lines.append(
                f"label values     0, {shown} ({len(values)} beside 0)" if values else "label values     only 0"
            )
            lines.append(f"labelled pixels  {facts['share']:.1%}")
            if facts.get("cells"):
                sizes = f"{facts['smallest']} to {facts['largest']} pixels, median {facts['median']:.0f}"
                lines.append(f"cells            {facts['cells']}, {sizes}")
            elif "cells" in facts:
                lines.append("cells            none")
        meanings = {
            "binary": "a mask: its 4-connected parts are the cells",
            "class": "classes: every value is a kind of pixel",
            "instance": "instances: every value is a cell",
        }
        if self.understood_as:
            lines.append(f"understood as    {meanings[self.understood_as]}")
        for title, names in (
            ("images without labels", self.unmatched_images),
            ("labels without image", self.unmatched_labels),
        ):
            if names:
                lines.append(f"{title}: {', '.join(names)}")
        lines += [f"note: {remark}" for remark in self.remarks]
        lines += [f"problem: {problem}" for problem in self.problems]
        lines.append(
            "nothing stands in the way of training" if not self.problems else f"{len(self.problems)} to mend first"
        )
        return "\n".join(lines)


def check_data(
    images: Path, labels: Path, *, kind: str = "auto", ignore: int | None = None, axes: str | None = None
) -> Findings:
    """Read everything, stop at nothing, and say what was found.

    Args:
        images: as for training.
        labels: likewise.
        kind: likewise; "auto" says what it understood.
        ignore: likewise.
        axes: likewise.

    Raises:
        BadInput: there is nothing to look at.
    """
    if kind not in LABEL_KINDS:
        raise BadInput(f"label kind must be one of {', '.join(LABEL_KINDS)}, got {kind!r}")
    pairing = pair(images, labels)
    found = Findings(
        pairs=len(pairing.pairs),
        unmatched_images=[p.name for p in pairing.lone_images],
        unmatched_labels=[p.name for p in pairing.lone_labels],
    )
    _judge_pairing(found, pairing, images, labels)
    shapes: Counter[str] = Counter()
    channels: Counter[int] = Counter()
    lows, highs, maps = [], [], []
    for image_path, label_path in pairing.pairs:
        picture = label = None
        with _noted(found):
            picture = read_stack(image_path, axes=axes)
            shapes[_kind_of(picture)] += 1
            channels[picture.pixels.shape[1]] += 1
            found.slices += len(picture.pixels)
            finite = picture.pixels[np.isfinite(picture.pixels)]
            if finite.size:
                lows.append(finite.min())
                highs.append(finite.max())
                if lows[-1] == highs[-1]:
                    found.remarks.append(f"{image_path.name} has one grey value everywhere, {lows[-1]}")
            check_finite(picture)
        with _noted(found):
            label = read_labels(label_path, axes)
            maps.append(label_ids(label, ignore))
        if picture is not None and label is not None:
            with _noted(found):
                check_same_size(picture, label)
    found.shapes = dict(shapes.most_common())
    if lows:
        found.grey_values = f"{min(lows):g} to {max(highs):g}"
    if len(channels) > 1:
        counts = ", ".join(f"{n} in {files} files" for n, files in channels.most_common())
        found.problems.append(f"images have different numbers of channels: {counts}")
    if maps:
        _judge_labels(found, maps, labels, kind, tracking=pairing.tracking)
    return found


@contextmanager
def _noted(found: Findings) -> Iterator[None]:
    try:
        yield
    except BadInput as error:
        found.problems.append(str(error))


def _judge_pairing(found: Findings, pairing: Pairing, images: Path, labels: Path) -> None:
    if not pairing.pairs:
        found.problems.append(f"{images} and {labels} have no name in common")
    if pairing.lone_labels:
        found.problems.append(f"{len(pairing.lone_labels)} label files have no image")
    if pairing.lone_images:
        said = f"{len(pairing.lone_images)} images have no labels"
        (found.remarks if pairing.tracking else found.problems).append(said)


def _kind_of(stack: Stack) -> str:
    slices, channels, rows, columns = stack.pixels.shape
    many = f"{slices} slices of " if stack.is_stack else ""
    colours = f", {channels} channels" if channels > 1 else ""
    return f"{many}{rows} x {columns} {stack.pixels.dtype}{colours}"


def _judge_labels(
    found: Findings, maps: list[np.ndarray[Any, Any]], labels: Path, kind: str, *, tracking: bool
) -> None:
    facts = label_facts(maps)
    found.labels = facts | {"share": sum(int((m > 0).sum()) for m in maps) / sum(m.size for m in maps)}
    try:
        if kind == "auto":
            found.understood_as = "instance" if tracking else understand(facts, labels)
        else:
            found.understood_as = agreed(kind, facts, labels)
    except BadInput as error:
        found.problems.append(str(error))
        return
    planes = [plane for stack in maps for plane in stack]
    sizes: list[int] = []
    empty = 0
    examples = []
    for plane in planes:
        examples.append(Example("", torch.empty(0), *instances_of(plane, found.understood_as)))
        here = np.bincount(examples[-1].instances.clamp(min=0).flatten().numpy())[1:]
        sizes += here[here > 0].tolist()
        empty += not here.any()
    found.labels |= {"cells": len(sizes)}
    if sizes:
        found.labels |= {"smallest": min(sizes), "median": float(np.median(sizes)), "largest": max(sizes)}
        tiny = sum(size < 10 for size in sizes)
        if tiny:
            found.remarks.append(f"{tiny} of {len(sizes)} cells are smaller than 10 pixels")
        with _noted(found):
            class_balance(examples)
    else:
        found.problems.append(f"{labels} has no cell in any of {len(planes)} label images; there is nothing to learn")
    last = planes[-max(1, round(0.1 * len(planes))) :]
    if sizes and len(planes) > 1 and not any((plane > 0).any() for plane in last):
        found.remarks.append("the last tenth, the usual validation block, has no cell: train with another --validation")
    if empty and sizes:
        found.remarks.append(f"{empty} of {len(planes)} slices have no cell")
