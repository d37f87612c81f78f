"""Directories of training runs, as training leaves them; the names in them are as bad as names can be."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unet_fast import synthetic
from unet_fast.config import TrainConfig

SCRIPT = "<script>alert(1)</script>.tif"
QUOTES = '"\' onerror=\'alert(2)\' " onload="alert(3)" &amp;&lt;.tif'
LONG = "ü" * 125 + ".tif"
ODD = "{{ 7 * 7 }}{% raw %} \u202egpj.exe \ud7ff 細胞 -->]]></style>.tif"
HOSTILE = (SCRIPT, QUOTES, LONG, ODD)

COLUMNS = ("step", "epoch", "lr", "loss", "val_loss", "val_iou", "val_pixel_error", "val_threshold", "val_cell_iou")
COLUMNS += ("val_ap50", "best", "seconds", "skipped", "busy")
FILES = ("config.toml", "run.json", "log.csv", "scores.csv", "overlays.npz", "model.safetensors")


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns or list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def log(steps: int = 400, every: int = 20, done: int | None = None, **more: Any) -> list[dict[str, Any]]:
    """A good run: the loss falls and becomes level; each second row is a validation."""
    rows, best = [], np.inf
    for step in range(every, (done or steps) + 1, every):
        share = step / steps
        loss = 0.15 + 0.6 * float(np.exp(-6 * share)) + 0.01 * float(np.sin(step))
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
        row |= {"step": step, "epoch": step // 10, "lr": f"{0.002 * (1 - share):.6g}", "loss": f"{loss:.6g}"}
        row |= {"seconds": f"{step / 2:.1f}", "skipped": 0, "busy": f"{0.93 + 0.02 * float(np.sin(step)):.3g}"}
        if step % (2 * every) == 0:
            val = 0.2 + 0.6 * float(np.exp(-5 * share)) + 0.004 * float(np.cos(3 * step))
            row |= {"val_loss": f"{val:.6g}", "val_iou": f"{0.95 - 0.5 * val:.6g}", "best": int(val < best)}
            row |= {"val_pixel_error": f"{0.2 * val:.6g}", "val_threshold": "0.4", "val_cell_iou": f"{0.9 - val:.6g}"}
            row |= {"val_ap50": f"{0.98 - val:.6g}"}
            best = min(best, val)
        rows.append({**row, **more})
    return rows


def write_run(
    run: Path,
    *,
    names: Sequence[str] = HOSTILE,
    size: int = 96,
    noise: bool = False,
    rows: Sequence[Mapping[str, Any]] | None = None,
    without: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
    record: Mapping[str, Any] | None = None,
) -> Path:
    """All files of a finished run whose validation images have these names; `without` some of them."""
    run.mkdir(parents=True, exist_ok=True)
    settings = TrainConfig.from_dict(
        {
            "images": str(run.parent / names[0].replace("/", "_")),
            "labels": "labels",
            "out": str(run),
            "steps": 400,
            "features": [16, 32, 64],
            "momentum": 0.9,
            "lr": 0.02,
            "tile": 92,
            **(config or {}),
        }
    )
    (run / "config.toml").write_text(settings.to_toml(), encoding="utf-8")
    about = {
        "command": ["unet-fast", "train", "--images", names[0]],
        "labels_understood_as": "instance",
        "classes": 2,
        "class_weights": [0.71, 1.62],
        "training": [f"t{i}.tif" for i in range(30)],
        "validation": list(names),
        "parameters": 1_234_567,
        "net": {"in_channels": 1, "out_channels": 2, "features": [16, 32, 64], names[0]: names[1 % len(names)]},
        "device": "cpu",
        "versions": {"unet_fast": "0.1.0", "torch": "2.13.0"},
        "data": dict.fromkeys(names, "0" * 64),
        "packages": ["numpy==2.3.5", names[0]],
        "git": None,
        "kernels": None,
        "processes": 1,
        "something_new": [{"a": names[0]}, 2.5, True],
        **(record or {}),
    }
    (run / "run.json").write_text(json.dumps(about), encoding="utf-8")
    write_rows(run / "log.csv", log() if rows is None else rows, COLUMNS)
    scores = [
        {
            "image": name,
            "loss": f"{0.31 - 0.02 * i:.6g}",
            "iou": f"{0.8 + 0.03123 * i:.6g}",
            "pixel_error": f"{0.05 - 0.01 * i:.6g}",
            "cell_iou": f"{0.7 + 0.05 * i:.6g}",
            "ap50": "" if i == 1 else f"{0.75 + 0.05 * i:.6g}",
        }
        for i, name in enumerate(names)
    ]
    write_rows(run / "scores.csv", scores)
    arrays: dict[str, Any] = {"names": np.array(names), "step": 400}
    generator = np.random.default_rng(0)
    for i in range(len(names)):
        image, ids = synthetic.cells(size, seed=i)
        arrays[f"image_{i}"] = generator.random((size, size), np.float32) if noise else image
        arrays[f"truth_{i}"] = ids
        arrays[f"found_{i}"] = np.roll(ids, 1, axis=1)
        if noise:
            weight = generator.random((size, size)) * 11
        else:
            weight = 1 + 10 * np.exp(-((np.arange(size)[:, None] - size / 2) ** 2 + np.zeros((size, size))) / 50)
        arrays[f"weight_{i}"] = weight.astype(np.float16)
    np.savez_compressed(run / "overlays.npz", **arrays)
    (run / "model.safetensors").write_bytes(b"a model")
    (run / "checkpoints").mkdir(exist_ok=True)
    (run / "checkpoints" / "00000400.safetensors").write_bytes(b"a state")
    for name in without:
        (run / name).unlink()
    return run
