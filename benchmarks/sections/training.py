"""Is a whole training run on this device the same when it is interrupted, and does the device wait for its tiles?

Drawn cells, a net of the paper's depth. "interrupted": a deterministic run that stops half-way and is resumed against
one that does not; the weights must be the same bits. "tiles": steps a second, and the share of the time in which the
device was at work, with images that lie on it, on the host, and drawn ahead by threads there; the same bits as well.
"precisions": the loss after as many steps in each; float16 and bfloat16 end within a few hundredths of float32.
predict (H200, bfloat16, the paper's net at tile 572): images on the device, 250 to 330 steps a second with calls and
not a graph, busy above 0.9; on the host with two threads, bound by drawing, some 200 steps a second, busy 0.6.
"""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.sections import Context, Failed, affordable, short
from unet_fast import TrainConfig, synthetic, train
from unet_fast import run as running
from unet_fast.files import write_tiff

TITLE = "Training: interrupted, fed, in each precision"
ORDER = 88
SECONDS = 90.0

# how tiles come to the net
WAYS: dict[str, dict[str, Any]] = {
    "on the device": {"images_on": "device"},
    "on the host": {"images_on": "host", "workers": 0},
    "on the host, 2 threads": {"images_on": "host", "workers": 2},
    "on the host, 4 threads": {"images_on": "host", "workers": 4},
}


def run(context: Context) -> dict[str, Any]:
    with TemporaryDirectory() as place:
        data = _drawn(Path(place), 128 if context.smoke else 700)
        config = _config(context, data)
        # what is timed once would else be timed in the first run alone
        _trained(config.with_(steps=2, out=data / "first"))
        interrupted = _interrupted(config, data)
        tiles = [_fed(config, data, name) for name in affordable(context, list(WAYS)[: 2 if context.smoke else None])]
        names = [short(dtype) for dtype in context.dtypes]
        precisions = [_in_precision(config, data, name) for name in affordable(context, names)]
    result = {
        "headline": f"resumed: {interrupted}; busy {tiles[0]['busy']:.2f} with images {tiles[0]['images']}",
        "resumed": interrupted,
        "tile_in": config.tile,
        "tiles": tiles,
        "precisions": precisions,
    }
    if interrupted != "the same bits":
        raise Failed(f"a run that was interrupted ended with {interrupted}", result)
    if len({row["weights"] for row in tiles}) > 1:
        raise Failed("where the images lie changes the bits", result)
    if any(row["skipped"] and row["precision"] != "float16" for row in precisions):
        raise Failed("steps were skipped", result)
    return result


def _drawn(place: Path, size: int) -> Path:
    for kind in ("images", "labels"):
        (place / kind).mkdir()
    for seed in range(4):
        image, instances = synthetic.cells(size, seed=seed)
        grey = np.clip(255 * (image - image.min()) / np.ptp(image), 0, 255).astype(np.uint8)
        write_tiff(place / "images" / f"{seed}.tif", grey, "YX")
        write_tiff(place / "labels" / f"{seed}.tif", instances.astype(np.uint16), "YX")
    return place


def _config(context: Context, data: Path) -> TrainConfig:
    return TrainConfig(
        images=data / "images",
        labels=data / "labels",
        out=data / "run",
        features=(4, 8, 8) if context.smoke else context.features,
        tile=60 if context.smoke else context.tile_in,
        steps=6 if context.smoke else 120,
        log_every=3 if context.smoke else 60,
        validate_every=6 if context.smoke else 120,
        validation=0.25,
        device=str(context.device),
        deterministic=True,
    )


def _trained(config: TrainConfig, *, resume: bool = False) -> tuple[str, list[dict[str, float | None]]]:
    """A digest of the last weights, and the log."""
    kept: dict[str, Tensor] = {}
    whole = running.Run.keep_state

    def noted(it: running.Run) -> None:
        kept.update(it.model.state_dict())
        whole(it)

    running.Run.keep_state = noted  # type: ignore[method-assign]
    try:
        result = train(config, resume=resume, progress=False)
    finally:
        running.Run.keep_state = whole  # type: ignore[method-assign]
    digest = hashlib.sha256()
    for name in sorted(kept):
        digest.update(kept[name].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16], result.log


def _interrupted(config: TrainConfig, data: Path) -> str:
    want, _ = _trained(config.with_(out=data / "whole"))
    step = running.Run.one_step

    def struck(it: running.Run, *arguments: Any) -> None:
        if it.step == (config.steps or 0) // 2:
            raise KeyboardInterrupt
        step(it, *arguments)

    running.Run.one_step = struck  # type: ignore[method-assign]
    try:
        _unless_interrupted(lambda: _trained(config.with_(out=data / "stopped")))
    finally:
        running.Run.one_step = step  # type: ignore[method-assign]
    found, _ = _trained(config.with_(out=data / "stopped"), resume=True)
    return "the same bits" if found == want else "other bits"


def _unless_interrupted(work: Callable[[], Any]) -> None:
    try:
        work()
    except KeyboardInterrupt:
        return
    raise AssertionError("the run was not interrupted")


def _fed(config: TrainConfig, data: Path, name: str) -> dict[str, Any]:
    out = data / name.replace(" ", "_").replace(",", "")
    weights, log = _trained(config.with_(out=out, **WAYS[name]))
    # the first row is of the first steps, which make what is kept
    first, last = log[0], log[-1]
    seconds = (last["seconds"] or 0.0) - (first["seconds"] or 0.0)
    steps = (last["step"] or 0.0) - (first["step"] or 0.0)
    return {"images": name, "busy": last["busy"], "steps_per_s": steps / max(seconds, 1e-9), "weights": weights}


def _in_precision(config: TrainConfig, data: Path, name: str) -> dict[str, Any]:
    started = time.perf_counter()
    _, log = _trained(config.with_(out=data / f"in_{name}", precision=name, deterministic=False))
    skipped = sum(row["skipped"] or 0 for row in log)
    seconds = time.perf_counter() - started
    return {"precision": name, "loss": log[-1]["loss"], "skipped": skipped, "seconds": seconds}
