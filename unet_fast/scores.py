"""Scores of images as a person reads them, a table, and as a program does: data, or comma-separated values."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import replacing

__all__ = ["Report", "table"]

# a column of the table: its key in a row, its heading, its format; a block of columns is never torn
_BLOCKS = (
    (
        ("iou", "IoU", ".3f"),
        ("dice", "Dice", ".3f"),
        ("pixel_error", "pixel error", ".4f"),
        ("warping_error", "warping", ".6f"),
        ("rand_error", "Rand", ".4f"),
        ("v_rand", "V_Rand", ".4f"),
        ("v_info", "V_Info", ".4f"),
    ),
    (
        ("seg", "SEG", ".3f"),
        ("adapted_rand_error", "adapted Rand", ".4f"),
        ("cell_iou", "cell IoU", ".3f"),
        ("ap50", "AP 0.5", ".3f"),
        ("ap", "AP .5-.9", ".3f"),
        ("true_cells", "cells", "d"),
        ("predicted_cells", "found", "d"),
        ("touching_pairs", "touching", "d"),
        ("merged_pairs", "merged", "d"),
        ("split_cells", "split", "d"),
    ),
)
_WIDTH = 110


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
        """Rows of text, one an image, `overall` last, in two parts if that is wide; and the thresholds chosen."""
        parts = []
        for part in table([*self.images, self.overall]).split("\n\n"):
            lines = part.splitlines()
            rule = "-" * len(lines[0])
            parts.append("\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]]))
        ending = "_threshold"
        chosen = {key.removesuffix(ending): value for key, value in self.overall.items() if key.endswith(ending)}
        shown = ", ".join(f"{name} {threshold:.1f}" for name, threshold in chosen.items())
        return "\n\n".join(parts) + (f"\n\nthreshold chosen overall: {shown}" if shown else "")

    def write_csv(self, path: Path) -> None:
        """A row an image, `overall` last; a column for every score, empty where an image has none."""
        rows = [*self.images, self.overall]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with replacing(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A heading and a line for each row of scores; columns that no row has are left out.

    Blocks of columns that are too wide side by side follow each other, with an empty line between.
    """
    blocks = [[c for c in block if any(row.get(c[0]) is not None for row in rows)] for block in _BLOCKS]
    whole = _lines(rows, [column for block in blocks for column in block])
    if len(whole[0]) <= _WIDTH:
        return "\n".join(whole)
    return "\n\n".join("\n".join(_lines(rows, block)) for block in blocks if block)


def _lines(rows: Sequence[dict[str, Any]], columns: Sequence[tuple[str, str, str]]) -> list[str]:
    cells = [["", *(heading for _, heading, _ in columns)]]
    cells += [[r["name"], *(format(r[k], f) if r.get(k) is not None else "-" for k, _, f in columns)] for r in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
