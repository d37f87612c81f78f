"""Proves that a run leaves what it promises, that an interrupted one ends as if it had not been, and that it learns.

Nets of a few channels on drawn cells of 64 pixels; interruptions at every kind of place; damage to what lies on disk.
"""

import csv
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import unet_kernels as uk
from unet_fast import (
    BorderWeightedCrossEntropy,
    FastUNet,
    TrainConfig,
    checkpoints,
    class_balance,
    load,
    metrics,
    predict,
    synthetic,
    train,
    training,
    validation,
)
from unet_fast import (
    run as running,
)
from unet_fast.cells import find_cells
from unet_fast.data import read_labelled, split
from unet_fast.errors import BadInput
from unet_fast.files import write_tiff
from unet_fast.normalisation import Normalisation
from unet_fast.sampling import Sampler
from unet_fast.storage import MODEL, read_tensors
from unet_fast.validation import Validation

STATE_FILES = ("MANIFEST.json", "optimizer.safetensors", "state.json", "weights.safetensors")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images of touching cells, with instances."""
    place = tmp_path_factory.mktemp("drawn")
    for kind in ("images", "labels"):
        (place / kind).mkdir()
    for seed in range(4):
        image, instances = synthetic.cells(64, seed=seed, radius_px=(7.0, 9.0))
        write_tiff(place / "images" / f"{seed}.tif", image, "YX")
        write_tiff(place / "labels" / f"{seed}.tif", instances.astype(np.uint16), "YX")
    return place


def config(drawn: Path, out: Path, **more: Any) -> TrainConfig:
    usual: dict[str, Any] = {
        "label_kind": "instance", "features": (2, 3), "steps": 7, "validate_every": 3, "log_every": 2,
        "validation": 0.25, "device": "cpu",
    }  # fmt: skip
    return TrainConfig(images=drawn / "images", labels=drawn / "labels", out=out, **{**usual, **more})


def digest(path: Path) -> str:
    """sha256 of all tensors of a file."""
    return sha256_of(read_tensors(path)[0])


def sha256_of(tensors: dict[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode() + tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def outcome(run: Path) -> tuple[list[str], str, str, list[dict[str, Any]]]:
    """All that a run came to, but for how long it took: names, the best and the last weights, the log."""
    names = sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file())
    clocks = ("seconds", "busy")
    log = [{k: v for k, v in row.items() if k not in clocks} for row in training.read_log(run / "log.csv")]
    last = checkpoints.read(checkpoints.checkpoints(run)[-1])
    return (
        names,
        digest(run / MODEL),
        sha256_of({**last.weights, **{f"m.{k}": v for k, v in last.optimizer.items()}}),
        log,
    )


@pytest.fixture(scope="module")
def finished(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed; not to be changed."""
    run = tmp_path_factory.mktemp("finished") / "run"
    train(config(drawn, run), progress=False)
    return run


@pytest.fixture(autouse=True)
def no_page(blank_page: None) -> None:
    """`finished` has a real one."""


# ---- what lies there


def test_a_run_leaves_its_settings_its_log_its_best_model_and_two_states(drawn: Path, finished: Path) -> None:
    names, _, _, _ = outcome(finished)
    assert names == [
        *(f"checkpoints/{step}/{name}" for step in ("00000006", "00000007") for name in STATE_FILES),
        "config.toml",
        "curves.png",
        "log.csv",
        MODEL,
        "overlays.npz",
        "report.html",
        "run.json",
        "scores.csv",
    ]
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    settings = TrainConfig.read(finished / "config.toml")
    # a net of one pooling covers 64 pixels with 80
    assert settings == config(drawn, finished, tile=80, classes=2, precision="float32")
    about = json.loads((finished / "run.json").read_text())
    assert about["labels_understood_as"] == "instance"
    assert about["classes"] == 2
    assert about["training"] == ["0.tif", "1.tif", "2.tif"]
    assert about["validation"] == ["3.tif"]
    model = load(finished)
    assert about["parameters"] == sum(p.numel() for p in model.parameters())
    assert about["net"] == model.settings
    assert model.normalisation == Normalisation()
    assert about["class_weights"] == pytest.approx(
        class_balance(split(read_labelled(drawn / "images", drawn / "labels", kind="instance").examples, 0.25)[0])
    )


def test_the_log_has_the_columns_of_the_contract(finished: Path) -> None:
    with (finished / "log.csv").open(newline="") as file:
        header, *rows = list(csv.reader(file))
    assert tuple(header) == training.LOG_COLUMNS
    assert header == [
        "step", "epoch", "lr", "loss", "skipped", "val_loss", "val_iou", "val_pixel_error", "val_threshold",
        "val_cell_iou", "val_ap50", "best", "scale", "busy", "seconds",
    ]  # fmt: skip
    log = training.read_log(finished / "log.csv")
    assert len(log) == len(rows)
    # every 2 for the log, every 3 for validation, and the last
    assert [row["step"] for row in log] == [2, 3, 4, 6, 7]
    assert [row["epoch"] for row in log] == [0, 0, 1, 1, 2]
    for row in log:
        checked = row["step"] in (3, 6, 7)
        assert all((row[name] is not None) == checked for name in ("val_loss", "val_iou", "val_pixel_error", "best"))
        assert row["loss"] is not None
        assert math.isfinite(row["loss"])
    assert log[2 - 1]["best"] == 1
    assert log[-1]["lr"] == 0


def test_the_rate_rises_and_falls_as_documented(drawn: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = config(drawn, run, steps=20, log_every=1, validate_every=20, warmup=0.25, lr=0.01, validation=0)
    rates = [row["lr"] for row in train(settings, progress=False).log]
    # the rate of the step to come: 6 steps up to lr (5 of 20 warm), half a cosine down to 0
    want = [0.01 * (s + 1) / 6 for s in range(1, 5)]
    want += [0.005 * (1 + math.cos(math.pi * (s - 5) / 15)) for s in range(5, 21)]
    assert rates == pytest.approx(want, rel=1e-5, abs=1e-9)


def test_what_train_returns_is_the_best_model_by_its_own_log(finished: Path, drawn: Path, tmp_path: Path) -> None:
    result = train(config(drawn, tmp_path / "run"), progress=False)
    bests = [row["step"] for row in result.log if row["best"]]
    assert result.best_step == bests[-1]
    assert result.run == tmp_path / "run"
    assert not result.model.training
    # the same seed, the same bits, in another place
    assert outcome(result.run) == outcome(finished)


def test_validation_scores_are_those_that_predict_and_metrics_give(drawn: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = train(config(drawn, run, steps=6, validate_every=6, lr=0.01), progress=False)
    [row] = [row for row in result.log if row["step"] == 6]
    held = read_labelled(drawn / "images", drawn / "labels", kind="instance").examples[3]
    model = load(run)
    model.normalisation = None
    # in one tile; training validates with whatever tiles there are
    logits = torch.from_numpy(predict(model, held.image.numpy(), axes="CYX", output="logits")).double()
    target, cells = held.target(), held.instances
    balance = torch.tensor(json.loads((run / "run.json").read_text())["class_weights"], dtype=torch.float64)
    weight = uk.border_weight(cells[None], class_weight=(0.0, 0.0))[0].double() + balance[target]
    picked = -logits.log_softmax(0).gather(0, target[None])[0]
    found = logits.argmax(0).numpy()
    a, b = found == 1, target.numpy() == 1
    scores = metrics.instance_scores(find_cells(found), cells.numpy())
    want = {
        "val_loss": float((weight * picked).mean()),
        "val_iou": (a & b).sum() / (a | b).sum(),
        "val_pixel_error": metrics.pixel_error(logits.softmax(0)[1].numpy(), (cells > 0).numpy()),
        "val_threshold": metrics.pixel_error(logits.softmax(0)[1].numpy(), (cells > 0).numpy(), parts=True)[
            "threshold"
        ],
        "val_cell_iou": scores.mean_iou,
        "val_ap50": scores.average_precision["0.50"],
    }
    assert {k: row[k] for k in want} == pytest.approx(want, rel=1e-4, abs=1e-6)


# ---- interrupted and resumed


def _after(count: int, method: Callable[..., Any]) -> Callable[..., Any]:
    """`method`, which a KeyboardInterrupt hits as it is called for the count-th time."""
    calls = iter(range(1, 10**6))

    def struck(*arguments: Any, **named: Any) -> Any:
        if next(calls) == count:
            raise KeyboardInterrupt
        return method(*arguments, **named)

    return struck


def _half_an_update(count: int) -> Callable[..., Any]:
    calls = iter(range(1, 10**6))
    whole = torch.optim.SGD.step

    def struck(optimizer: Any, *arguments: Any) -> Any:
        if next(calls) == count:
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0].add_(1)
            raise KeyboardInterrupt
        return whole(optimizer, *arguments)

    return struck


INTERRUPTIONS: dict[str, tuple[Any, str, Callable[[Callable[..., Any]], Callable[..., Any]]]] = {
    "before the first step": (running.Run, "one_step", lambda m: _after(1, m)),
    "before a step": (running.Run, "one_step", lambda m: _after(5, m)),
    "after a logged step": (running.Run, "one_step", lambda m: _after(3, m)),
    "in a forward pass": (FastUNet, "forward", lambda m: _after(2, m)),
    "in the first validation": (Validation, "judge", lambda m: _after(1, m)),
    "in a later validation": (Validation, "judge", lambda m: _after(2, m)),
    "in the last validation": (Validation, "judge", lambda m: _after(3, m)),
    "as the best model is written": (running, "save", lambda m: _after(1, m)),
    "as the log is written": (running.Run, "_write_log", lambda m: _after(4, m)),
    "as a state is written": (running.Run, "keep_state", lambda m: _after(2, m)),
    "in the middle of an update": (torch.optim.SGD, "step", lambda m: _half_an_update(5)),
}
QUICK = ("before a step", "in a later validation", "as a state is written", "in the middle of an update")


@pytest.mark.parametrize(
    "where", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in INTERRUPTIONS]
)
def test_an_interrupted_run_ends_with_the_bits_of_one_that_was_not(
    where: str, drawn: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    owner, name, strike = INTERRUPTIONS[where]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, strike(getattr(owner, name)))
        with pytest.raises(KeyboardInterrupt):
            train(config(drawn, run), progress=False)
    assert (run / "checkpoints").is_dir()
    assert list((run / "checkpoints").iterdir()), "an interrupted run leaves a state"
    # whatever the caller's random numbers have become
    torch.manual_seed(5)
    train(config(drawn, run), resume=True, progress=False)
    (names, *rest), (want, *other) = outcome(run), outcome(finished)
    assert rest == other
    assert {n for n in names if "checkpoints" not in n} == {n for n in want if "checkpoints" not in n}


@pytest.mark.slow
def test_maps_that_are_made_again_change_no_bit_and_may_be_asked_for_at_any_time(
    drawn: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(running.Run, "one_step", _after(4, running.Run.one_step))
        with pytest.raises(KeyboardInterrupt):
            train(config(drawn, run, recompute="level"), progress=False)
    train(config(drawn, run, recompute="none"), resume=True, progress=False)
    weights, wanted = load(run).state_dict(), load(finished).state_dict()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


def test_killed_where_it_stood_a_run_ends_the_same(
    drawn: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        # what SIGKILL leaves: no handler ran
        patch.setattr(running.Run, "keep_state", _once(running.Run.keep_state))
        patch.setattr(running.Run, "one_step", _after(6, running.Run.one_step))
        with pytest.raises(KeyboardInterrupt):
            train(config(drawn, run), progress=False)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["00000003"]
    train(training.resumed_config(run), resume=True, progress=False)
    assert outcome(run)[1:] == outcome(finished)[1:]


def _once(method: Callable[..., Any]) -> Callable[..., Any]:
    calls: Iterator[int] = iter(range(10**6))
    return lambda *arguments: method(*arguments) if next(calls) == 0 else None


def test_a_finished_run_resumed_is_as_it_was(drawn: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = train(config(drawn, run), progress=False)
    before = outcome(run)
    again = train(config(drawn, run), resume=True, progress=False)
    assert outcome(run) == before
    assert again.best_step == first.best_step


@pytest.mark.parametrize("damage", ["truncated", "a flipped bit", "emptied"])
def test_a_damaged_state_falls_back_to_the_one_before(
    damage: str, drawn: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(config(drawn, run), progress=False)
    before = outcome(run)
    newest = run / "checkpoints" / "00000007" / "weights.safetensors"
    whole = newest.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 4
    newest.write_bytes({"truncated": whole[:-3], "a flipped bit": bytes(flipped), "emptied": b""}[damage])
    train(config(drawn, run), resume=True, progress=False)
    assert "00000007/weights.safetensors is damaged: it" in capsys.readouterr().err
    # the damaged one is no longer among the last two, which are as they were
    assert outcome(run)[1:] == before[1:]
    for state in checkpoints.checkpoints(run):
        (state / "state.json").write_bytes(b"")
    with pytest.raises(BadInput, match="has no checkpoint that is whole"):
        train(config(drawn, run), resume=True, progress=False)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "lr": ({"lr": 0.5}, "lr was 0.002 when the run began and is 0.5 now; it cannot change"),
    "features": ({"features": (2, 4)}, r"features was \[2, 3\] when the run began and is \[2, 4\] now"),
    "steps": ({"steps": 9}, "steps was 7 when the run began and is 9 now"),
    "epochs": ({"steps": None, "epochs": 3}, "steps was 7 when the run began and is 9 now"),
    "seed": ({"seed": 1}, "seed was 0 when the run began and is 1 now"),
    "tile": ({"tile": 84}, "tile was 80 when the run began and is 84 now"),
    "ignore": ({"ignore": 3}, "ignore was None when the run began and is 3 now"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_run_does_not_go_on_with_other_settings(case: str, drawn: Path, finished: Path) -> None:
    changes, sentence = CHANGES[case]
    before = outcome(finished)
    with pytest.raises(BadInput, match=sentence):
        train(config(drawn, finished, **changes), resume=True, progress=False)
    assert outcome(finished) == before


def test_a_resumed_run_computes_by_the_choices_it_began_with(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, adopted = {"about": {"device": "a GPU"}, "rows": {}}, []
    monkeypatch.setattr(uk, "choices", lambda device: table)
    monkeypatch.setattr(uk, "adopt", lambda kept, device: adopted.append(kept))
    train(config(drawn, tmp_path / "run"), progress=False)
    assert not adopted
    train(config(drawn, tmp_path / "run"), resume=True, progress=False)
    assert adopted == [table]


def test_what_is_left_open_on_resume_is_as_it_was(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"tile": 36, "ignore": 2, "validate_every": 2, "steps": 5}
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(config(drawn, whole, **settings), progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(running.Run, "one_step", _after(4, running.Run.one_step))
        with pytest.raises(KeyboardInterrupt):
            train(config(drawn, run, **settings), progress=False)
    train(config(drawn, run, **dict.fromkeys(settings)), resume=True, progress=False)
    assert outcome(run)[1:] == outcome(whole)[1:]


@pytest.mark.slow
def test_a_run_counted_in_epochs_is_resumed_by_the_same_words(drawn: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = config(drawn, run, steps=None, epochs=2)
    result = train(settings, progress=False)
    assert result.log[-1]["step"] == 6
    assert train(settings, resume=True, progress=False).log == result.log
    assert train(training.resumed_config(run, epochs=2), resume=True, progress=False).log == result.log


def test_data_may_have_moved(drawn: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config(drawn, run), progress=False)
    before = outcome(run)
    moved = drawn.rename(drawn.with_name("moved"))
    try:
        run = run.rename(tmp_path / "elsewhere")
        settings = training.resumed_config(run, images=moved / "images", labels=moved / "labels")
        assert settings.out == run
        train(settings, resume=True, progress=False)
    finally:
        moved.rename(drawn)
    assert outcome(run) == before


# ---- refused


def test_a_run_in_the_way_is_not_overwritten(drawn: Path, finished: Path, tmp_path: Path) -> None:
    before = outcome(finished)
    with pytest.raises(BadInput, match="holds a run already; --resume continues it, or choose another --out"):
        train(config(drawn, finished), progress=False)
    assert outcome(finished) == before
    with pytest.raises(BadInput, match="has no checkpoint to resume from"):
        train(config(drawn, tmp_path / "nothing"), resume=True, progress=False)
    assert not (tmp_path / "nothing").exists()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "too few classes": ({"label_kind": "class", "classes": 2}, r"classes is 2, but the labels go up to class \d"),
    "a class without a pixel": ({"classes": 3}, "the training set has no pixel of class 2; train with classes 2"),
    "a range without ends": ({"normalisation": "range", "low": 0.0}, "normalisation range needs low and high"),
    "no images": ({"images": Path("/nowhere")}, "/nowhere does not exist"),
    "no device": ({"device": "abacus"}, "device abacus cannot be used here"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_on_is_refused_before_anything_is_written(
    case: str, drawn: Path, tmp_path: Path
) -> None:
    changes, sentence = REFUSED[case]
    run = tmp_path / "run"
    with pytest.raises(BadInput, match=sentence):
        train(config(drawn, run).with_(**changes), progress=False)
    assert not [p for p in run.rglob("*") if p.is_file()]


def test_a_run_that_diverges_says_so_and_keeps_no_wreck(drawn: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = config(drawn, run, lr=1e30, clip=0, warmup=0, log_every=1, most_skipped=4, validate_every=7)
    with pytest.raises(BadInput) as raised:
        train(settings, progress=False)
    said = "4 steps in a row had a loss or a gradient that is no number, at step 5; "
    said += "a run with a smaller lr than 1e+30 is needed"
    assert str(raised.value) == said
    assert not list(run.rglob("*.safetensors"))


def test_a_net_that_says_no_number_is_never_the_best_model(drawn: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = config(drawn, run, lr=1e30, clip=0, warmup=0, log_every=1, steps=3, validate_every=1)
    with pytest.raises(BadInput, match="no model was ever worth saving: what the net says is no number, at step 3"):
        train(settings, progress=False)
    assert not (run / MODEL).exists()
    log = training.read_log(run / "log.csv")
    assert [row["skipped"] for row in log] == [0, 1, 1]
    assert [row["best"] for row in log] == [0, 0, 0]
    assert all(math.isnan(row["val_loss"] or 0.0) for row in log)
    assert not checkpoints.checkpoints(run)


def test_an_update_that_throws_the_net_away_is_noticed_before_it_is_saved(drawn: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # the loss of the first step is a number; the weights after it are not
    settings = config(
        drawn, run, lr=3e38, momentum=0, clip=1e30, warmup=0, steps=2, validate_every=1, border_weight=1e4
    )
    with pytest.raises(BadInput, match="the weights became infinite or no number, at step 1; a run with a smaller lr"):
        train(settings, progress=False)
    assert not list(run.rglob("*.safetensors"))


# ---- what is learnt


def easy(place: Path, count: int, *, levels: int = 2, size: int = 48) -> Path:
    """Images whose grey value is the class."""
    for kind in ("images", "labels"):
        (place / kind).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        labels = np.zeros((size, size), np.uint8)
        for c in range(1, levels):
            y, x = rng.integers(0, size - 16, 2)
            labels[y : y + 16, x : x + 16] = c
        grey = (labels * (200 // (levels - 1)) + rng.integers(0, 20, labels.shape)).astype(np.uint8)
        write_tiff(place / "images" / f"{i}.tif", grey, "YX")
        write_tiff(place / "labels" / f"{i}.tif", labels, "YX")
    return place


def test_the_loss_goes_down_where_grey_is_the_answer(tmp_path: Path) -> None:
    place = easy(tmp_path / "easy", 4)
    settings = config(
        place, tmp_path / "run", label_kind="binary", steps=80, momentum=0.9, lr=0.03, log_every=10, dropout=0.0,
        features=(4, 6), validate_every=40, grey=0.0,
    )  # fmt: skip
    result = train(settings, progress=False)
    assert result.log[-1]["loss"] < 0.4 * result.log[0]["loss"]
    assert result.log[-1]["val_iou"] > 0.8


def test_three_classes_train_and_are_told_apart(tmp_path: Path) -> None:
    place = easy(tmp_path / "easy", 4, levels=3)
    settings = config(
        place, tmp_path / "run", label_kind="class", steps=150, momentum=0.9, lr=0.05, dropout=0.0, grey=0.0,
        features=(4, 6), validate_every=75,
    )  # fmt: skip
    result = train(settings, progress=False)
    assert result.model.out_channels == 3
    assert result.log[-1]["loss"] < 0.65 * result.log[0]["loss"]
    # of two classes only: probability of a cell has no single channel
    assert all(row["val_pixel_error"] is None for row in result.log)
    assert result.log[-1]["val_iou"] > 0.4


def test_one_image_is_split_by_rows(drawn: Path, tmp_path: Path) -> None:
    settings = config(drawn, tmp_path / "run", steps=2, batch=2, border_weight=0.0).with_(
        images=drawn / "images" / "0.tif", labels=drawn / "labels" / "0.tif"
    )
    result = train(settings, progress=False)
    about = json.loads((result.run / "run.json").read_text())
    assert about["training"] == ["0.tif rows 0-47"]
    assert about["validation"] == ["0.tif rows 48-63"]
    assert all(math.isfinite(row["loss"] or math.nan) for row in result.log)


def test_without_validation_the_last_model_is_the_best(drawn: Path, tmp_path: Path) -> None:
    result = train(config(drawn, tmp_path / "run", validation=0.0), progress=False)
    assert result.best_step == 7
    last = checkpoints.read(result.run / "checkpoints" / "00000007").weights
    for name, value in result.model.state_dict().items():
        assert torch.equal(value, last[name])
    assert all(row["val_iou"] is None for row in result.log)


def test_another_seed_is_another_run(drawn: Path, finished: Path, tmp_path: Path) -> None:
    train(config(drawn, tmp_path / "run", seed=1), progress=False)
    assert outcome(tmp_path / "run")[1:] != outcome(finished)[1:]


def test_the_trained_model_has_the_normalisation_of_training(drawn: Path, tmp_path: Path) -> None:
    settings = config(drawn, tmp_path / "run", steps=1, normalisation="range", low=0.0, high=300.0)
    assert train(settings, progress=False).model.normalisation == Normalisation("range", 0.0, 300.0)


# ---- the sampler, and a step


def sampler(drawn: Path, **more: Any) -> Sampler:
    examples = read_labelled(drawn / "images", drawn / "labels", kind="instance").examples
    settings = config(drawn, Path("run"), **more)
    return Sampler(examples, settings, settings.tile or 80)


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_batch_depends_on_seed_and_step_alone(drawn: Path) -> None:
    fresh = [sampler(drawn).batch(step) for step in (0, 3, 11)]
    used = sampler(drawn)
    for step in (11, 5, 0, 3):
        torch.manual_seed(step + 100)
        np.random.seed(step)
        before = torch.get_rng_state()
        used.batch(step)
        # and it takes nothing from anybody
        assert torch.equal(torch.get_rng_state(), before)
    assert all(same(used.batch(step), want) for step, want in zip((0, 3, 11), fresh, strict=True))
    assert not same(used.batch(0), used.batch(4))
    assert not same(sampler(drawn, seed=1).batch(0), fresh[0])


def test_tiles_are_drawn_to_cells_where_that_is_asked_for(drawn: Path) -> None:
    def shares(foreground: float) -> list[float]:
        settings = config(drawn, drawn / "no", foreground=foreground, elastic=0.0, grey=0.0)
        sampler = Sampler(read_labelled(drawn / "images", drawn / "labels", kind="instance").examples, settings, 20)
        middles = [sampler.batch(step)[1][0, 8:12, 8:12] for step in range(60)]
        return [float((m > 0).any()) for m in middles]

    # a pixel is anyone's as often as there are pixels of cells; drawn to cells, always
    assert np.mean(shares(0.0)) < 0.9
    assert np.mean(shares(1.0)) == 1


def test_what_folds_is_reported(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for elastic, folds in ((10.0, True), (1.0, False)):
        train(config(drawn, tmp_path / str(elastic), steps=1, elastic=elastic))
        found = json.loads((tmp_path / str(elastic) / "run.json").read_text())["folding"]
        assert (found["maps"] > 0) is (found["pixels"] > 0) is folds
        said = capsys.readouterr().err
        assert (f"elastic maps of {elastic:g} px fold: {found['maps']:.0%} of them" in said) is folds
    # what is looked at is nobody's draw
    examples = read_labelled(drawn / "images", drawn / "labels", kind="instance").examples
    sampler = Sampler(examples, config(drawn, tmp_path / "no"), 80)
    before = sampler.batch(0)[0]
    assert sampler.folding() == sampler.folding()
    assert torch.equal(sampler.batch(0)[0], before)


def test_a_batch_of_two_holds_the_tiles_of_two_steps(drawn: Path) -> None:
    one, two = sampler(drawn), sampler(drawn, batch=2)
    assert two.per_epoch == 2
    for step in range(3):
        parts = zip(one.batch(2 * step), one.batch(2 * step + 1), strict=True)
        assert same(two.batch(step), tuple(torch.cat(pair) for pair in parts))


def test_every_image_comes_once_an_epoch_and_large_ones_as_often_as_they_have_tiles(drawn: Path) -> None:
    few = sampler(drawn)
    assert few.order == [0, 1, 2, 3]
    # a tile of 36 answers for 20 of 64 pixels
    many = sampler(drawn, tile=36)
    assert [many.order.count(i) for i in range(4)] == [round(64**2 / 20**2)] * 4
    image, instances, target = many.batch(0)
    assert image.shape == (1, 1, 36, 36)
    assert instances.shape == target.shape == (1, 36, 36)
    assert target.dtype == torch.int64


def test_ignored_pixels_do_not_reach_the_weights(drawn: Path) -> None:
    instances = torch.zeros(1, 36, 36, dtype=torch.int32)
    instances[:, 8:20, 8:18] = 1
    instances[:, 10:30, 22:30] = -1
    target = (instances > 0).long()
    loss = BorderWeightedCrossEntropy(class_weight=(0.5, 2.0))
    torch.manual_seed(0)
    model = FastUNet(features=(2,))
    x = torch.randn(1, 1, 40, 40)
    gradients = []
    for hidden in (0, 1):
        wrong = torch.where(instances < 0, hidden, target)
        model.zero_grad()
        loss(model(x), instances, wrong).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert any(g.any() for g in gradients[0])


def test_long_gradients_are_cut_to_the_clip(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []
    whole = torch.optim.SGD.step

    def noted(optimizer: Any, *arguments: Any) -> Any:
        parts = [p.grad.norm() for p in optimizer.param_groups[0]["params"]]
        norms.append(float(torch.stack(parts).norm()))
        return whole(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", noted)
    train(config(drawn, tmp_path / "a", steps=4, clip=1e-3), progress=False)
    assert norms == pytest.approx([1e-3] * 4, rel=1e-3)
    norms.clear()
    train(config(drawn, tmp_path / "b", steps=4, clip=0.0), progress=False)
    assert min(norms) > 1e-2


def test_dropout_is_on_and_belongs_to_the_step(drawn: Path, finished: Path, tmp_path: Path) -> None:
    assert load(finished).settings["dropout"] == 0.5
    train(config(drawn, tmp_path / "run", dropout=0.0), progress=False)
    assert outcome(tmp_path / "run")[1:] != outcome(finished)[1:]


def test_a_validation_block_without_a_cell_is_refused(drawn: Path, tmp_path: Path) -> None:
    places = tmp_path / "images", tmp_path / "labels"
    for place in places:
        shutil.copytree(drawn / place.name, place)
    last = sorted(places[1].iterdir())[-1]
    write_tiff(last, np.zeros((64, 64), np.uint16), "YX")
    with pytest.raises(BadInput, match=r"the validation block, 3\.tif to 3\.tif, has no cell to be judged by"):
        train(config(tmp_path, tmp_path / "run"), progress=False)
    assert not (tmp_path / "run").exists()
    assert train(config(tmp_path, tmp_path / "run", validation=0.0), progress=False).best_step == 7


def test_a_run_does_not_go_on_with_other_data(drawn: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    for name in ("images", "labels"):
        shutil.copytree(drawn / name, tmp_path / name)
    # elsewhere, but the same
    train(config(tmp_path, tmp_path / "run"), resume=True, progress=False)
    image, _ = synthetic.cells(64, seed=77, radius_px=(7.0, 9.0))
    write_tiff(tmp_path / "images" / "0.tif", image, "YX")
    with pytest.raises(BadInput, match=r"are not what the run in .* began with"):
        train(config(tmp_path, tmp_path / "run"), resume=True, progress=False)


def test_training_leaves_the_callers_generator_alone(drawn: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(config(drawn, tmp_path / "run"), progress=False)
    assert torch.equal(torch.get_rng_state(), before)


# ---- several at one place, signals, places that cannot be written


def test_a_second_run_at_one_place_is_refused(drawn: Path, tmp_path: Path) -> None:
    from unet_fast.journal import FOLDER, locked

    run = tmp_path / "run"
    run.mkdir()
    with locked(run / FOLDER / "lock"), pytest.raises(BadInput, match=r"run is being written to by process \d+ on "):
        train(config(drawn, run), progress=False)
    assert not [p for p in run.rglob("*") if p.is_file()]
    train(config(drawn, run, steps=1), progress=False)
    assert not (run / FOLDER).exists()


def test_a_run_directory_that_cannot_be_written_is_a_sentence(drawn: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o555)
    # who may write anywhere may not write there
    place = Path("/proc/unet_fast_run") if os.geteuid() == 0 else tmp_path / "run"
    with pytest.raises(BadInput, match=f"{place} cannot be ") as refused:
        train(config(drawn, place), progress=False)
    assert "\n" not in str(refused.value)


def test_a_file_where_the_run_should_be_is_a_sentence(drawn: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("notes")
    with pytest.raises(BadInput, match="run"):
        train(config(drawn, tmp_path / "run"), progress=False)
    assert (tmp_path / "run").read_text() == "notes"


def test_sigterm_keeps_the_state_as_ctrl_c_does(
    drawn: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, whole = tmp_path / "run", running.Run.one_step
    before = signal.getsignal(signal.SIGTERM)

    def terminated(it: running.Run, *arguments: Any) -> None:
        if it.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        whole(it, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(running.Run, "one_step", terminated)
        with pytest.raises(KeyboardInterrupt):
            train(config(drawn, run), progress=False)
    assert signal.getsignal(signal.SIGTERM) is before
    assert checkpoints.newest(run).about["step"] == 5
    train(training.resumed_config(run), resume=True, progress=False)
    assert outcome(run)[1:] == outcome(finished)[1:]


def test_between_validations_a_state_is_kept_after_some_minutes(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, steps = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    whole, kept = running.Run.one_step, running.Run.keep_state

    def minute(it: running.Run, *arguments: Any) -> None:
        now[0] += 60
        whole(it, *arguments)

    def noted(it: running.Run) -> None:
        steps.append(it.step)
        kept(it)

    monkeypatch.setattr(running.Run, "one_step", minute)
    monkeypatch.setattr(running.Run, "keep_state", noted)
    train(config(drawn, tmp_path / "run", steps=12, validate_every=6, keep_minutes=2.5), progress=False)
    assert steps == [3, 6, 9, 12]


# ---- resumed with something else


def test_a_state_of_another_net_is_refused_and_the_difference_listed(drawn: Path, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    train(config(drawn, run), progress=False)
    train(config(drawn, other, features=(2, 4, 8)), progress=False)
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(other / "checkpoints", run / "checkpoints")
    # as if its settings had been these
    state = checkpoints.newest(run)
    about = {**state.about, "config": {**state.about["config"], "features": [2, 3], "tile": 80}}
    checkpoints.keep(run, 8, checkpoints.State(state.weights, state.optimizer, about))
    with pytest.raises(BadInput) as refused:
        train(config(drawn, run), resume=True, progress=False)
    said = str(refused.value)
    assert "checkpoints/00000008 is of another net: " in said
    assert "down.2.conv1.weight is one too many" in said
    assert said.endswith(" more differ")
    assert "\n" not in said
    with pytest.raises(BadInput, match=r"features was \[2, 4, 8\] when the run began and is \[2, 3\] now"):
        train(config(drawn, other), resume=True, progress=False)


def test_changed_data_are_refused_unless_told(drawn: Path, tmp_path: Path) -> None:
    place, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(drawn, place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running.Run, "one_step", _after(5, running.Run.one_step))
        with pytest.raises(KeyboardInterrupt):
            train(config(place, run), progress=False)
    image, instances = synthetic.cells(64, seed=9, radius_px=(7.0, 9.0))
    write_tiff(place / "images" / "1.tif", image, "YX")
    write_tiff(place / "labels" / "1.tif", instances.astype(np.uint16), "YX")
    with pytest.raises(BadInput, match=r"are not what the run in .* began with; .* unless --accept-changed-data says"):
        train(config(place, run), resume=True, progress=False)
    assert checkpoints.newest(run).about["step"] == 4
    result = train(config(place, run), resume=True, progress=False, accept_changed_data=True)
    assert result.log[-1]["step"] == 7


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("steps = [", "config.toml cannot be read as TOML"),
        ("stepz = 5\n", "config has the unknown key 'stepz'; did you mean 'steps'?"),
        ("", "images and labels must be given"),
        ("\0\0", "config.toml cannot be read as TOML"),
    ],
)
def test_a_corrupted_config_is_one_sentence(text: str, sentence: str, drawn: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config(drawn, run, steps=1), progress=False)
    (run / "config.toml").write_text(text)
    with pytest.raises(BadInput) as refused:
        training.resumed_config(run)
    assert sentence in str(refused.value)
    # with the words of the beginning it goes on all the same: the states know the settings
    train(config(drawn, run, steps=1), resume=True, progress=False)
    assert training.resumed_config(run).steps == 1


# ---- what is told about it


def test_the_record_says_what_the_run_was_made_of(drawn: Path, finished: Path) -> None:
    record = json.loads((finished / "run.json").read_text())
    for kind in ("images", "labels"):
        for path in (drawn / kind).iterdir():
            assert record["data"][str(path)] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(record["data"]) == 8
    assert f"torch=={torch.__version__.split('+')[0]}" in " ".join(record["packages"])
    assert record["versions"]["torch"] == torch.__version__
    assert record["seed"] == 0
    assert record["processes"] == 1
    assert record["device"] == "cpu"
    assert record["command"]
    assert record["began"]
    assert "continued" not in record


def test_a_continued_run_says_when_and_where(drawn: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running.Run, "one_step", _after(5, running.Run.one_step))
        with pytest.raises(KeyboardInterrupt):
            train(config(drawn, run), progress=False)
    for _ in range(2):
        train(config(drawn, run), resume=True, progress=False)
    record = json.loads((run / "run.json").read_text())
    assert [each["step"] for each in record["continued"]] == [4, 7]
    assert all(each["versions"]["torch"] == torch.__version__ for each in record["continued"])


def test_scores_and_overlays_are_those_of_the_best_model(drawn: Path, finished: Path) -> None:
    with (finished / "scores.csv").open(newline="") as file:
        [row] = list(csv.DictReader(file))
    assert list(row) == ["image", "loss", "iou", "pixel_error", "cell_iou", "ap50"]
    assert row["image"] == "3.tif"
    best = [r for r in training.read_log(finished / "log.csv") if r["best"]][-1]
    for name in ("loss", "iou", "pixel_error", "cell_iou", "ap50"):
        assert float(row[name]) == pytest.approx(best[f"val_{name}"], rel=1e-5)
    with np.load(finished / "overlays.npz", allow_pickle=False) as shown:
        assert shown["names"].tolist() == ["3.tif"]
        assert shown["step"] == best["step"]
        held = read_labelled(drawn / "images", drawn / "labels", kind="instance").examples[3]
        assert np.array_equal(shown["image_0"], held.image[0].numpy())
        assert np.array_equal(shown["truth_0"], held.instances.numpy())
        found = predict(load(finished), drawn_image(drawn, 3))
        assert np.array_equal(shown["found_0"], find_cells(found))
        assert shown["weight_0"].max() > 1


def drawn_image(drawn: Path, number: int) -> Any:
    from unet_fast.files import read_stack

    return read_stack(drawn / "images" / f"{number}.tif").pixels[0, 0]


def test_large_images_show_their_middle_and_many_show_four(drawn: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "_PICTURE_SIDE", 40)
        patch.setattr(validation, "_PICTURES", 2)
        train(config(drawn, tmp_path / "run", steps=1, validation=0.75), progress=False)
    with np.load(tmp_path / "run" / "overlays.npz", allow_pickle=False) as shown:
        assert shown["names"].tolist() == ["1.tif", "3.tif"]
        last = read_labelled(drawn / "images", drawn / "labels", kind="instance").examples[3]
        assert np.array_equal(shown["image_1"], last.image[0, 12:52, 12:52].numpy())


def test_curves_for_tensorboard_are_those_of_the_log(drawn: Path, tmp_path: Path) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running.Run, "one_step", _after(6, running.Run.one_step))
        with pytest.raises(KeyboardInterrupt):
            train(config(drawn, run, tensorboard=True), progress=False)
    result = train(config(drawn, run, tensorboard=True), resume=True, progress=False)
    events = reading.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for name, tag in (("loss", "loss"), ("val_iou", "validation/iou"), ("skipped", "skipped")):
        shown = {event.step: event.value for event in events.Scalars(tag)}
        want = {int(row["step"]): row[name] for row in result.log if row[name] is not None}
        assert shown == pytest.approx(want, rel=1e-5)


def test_without_tensorboard_the_extra_is_named(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(BadInput, match=r"pip install 'unet-fast\[tb\]'"):
        train(config(drawn, tmp_path / "run", tensorboard=True), progress=False)


# ---- ablations and determinism


@pytest.mark.parametrize("more", [{"skips": False}, {"padding": "same"}, {"padding": "same", "skips": False}], ids=str)
def test_the_papers_ablations_train_and_predict(more: dict[str, Any], drawn: Path, tmp_path: Path) -> None:
    result = train(config(drawn, tmp_path / "run", **more, dropout=0.0, momentum=0.9), progress=False)
    assert all(result.model.settings[name] == value for name, value in more.items())
    assert all(math.isfinite(row["loss"] or math.nan) for row in result.log)
    assert predict(result.model, drawn_image(drawn, 0)).shape == (64, 64)


def test_a_padded_net_answers_for_all_of_its_tile(drawn: Path) -> None:
    padded = sampler(drawn, padding="same", tile=36)
    assert padded.tile_out == 36
    assert padded.pixels(0) == 36**2
    for more in ({"memory": "1GB"}, {"accumulate": "image"}):
        with pytest.raises(BadInput, match="padding must be valid with"):
            config(drawn, Path("run"), padding="same", **more)


def test_deterministic_is_for_the_run_alone(drawn: Path, finished: Path, tmp_path: Path) -> None:
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        whole = running.Run.one_step

        def noted(it: running.Run, *arguments: Any) -> None:
            seen.append(torch.are_deterministic_algorithms_enabled())
            whole(it, *arguments)

        patch.setattr(running.Run, "one_step", noted)
        train(config(drawn, tmp_path / "run", deterministic=True), progress=False)
    assert all(seen)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    # a CPU is so anyway
    assert outcome(tmp_path / "run")[1:] == outcome(finished)[1:]


# ---- what a fresh reader found


def _interrupted_at(step: int, settings: TrainConfig, **more: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running.Run, "one_step", _after(step + 1, running.Run.one_step))
        with pytest.raises(KeyboardInterrupt):
            train(settings, progress=False, **more)


def test_after_a_fallback_new_states_are_kept_and_the_damaged_set_aside(drawn: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = config(drawn, run, steps=20, validate_every=2)
    _interrupted_at(3, settings)
    for step in ("00000010", "00000011"):
        shutil.copytree(run / "checkpoints" / "00000003", run / "checkpoints" / step)
        (run / "checkpoints" / step / "state.json").write_bytes(b"?")
    (run / "checkpoints" / "00000099").write_text("a file is no state")
    _interrupted_at(2, settings, resume=True)
    assert checkpoints.newest(run).about["step"] == 5
    assert [p.name for p in checkpoints.checkpoints(run)][-2:] == ["00000004", "00000005"]
    assert {p.name for p in (run / "checkpoints").iterdir()} >= {"damaged-00000010", "damaged-00000011"}


def test_the_page_ends_no_run_whatever_the_folder_is_called(drawn: Path, tmp_path: Path) -> None:
    from unet_fast.report import write_report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "write_report", write_report)
        train(config(drawn, tmp_path / "r$x^$", steps=1), progress=False)
        assert (tmp_path / "r$x^$" / "report.html").exists()
        patch.setattr(running, "write_report", lambda place: 1 / 0)
        assert train(config(drawn, tmp_path / "other", steps=1), progress=False).best_step == 1


def test_no_wreck_is_kept_as_the_newest_state(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, whole = tmp_path / "run", running.Run.one_step

    def wrecked(it: running.Run, *arguments: Any) -> None:
        if it.step == 5:
            with torch.no_grad():
                next(it.model.parameters()).fill_(math.inf)
        if it.step == 7:
            raise KeyboardInterrupt
        whole(it, *arguments)

    settings = config(drawn, run, steps=12, validate_every=4, keep_minutes=1e-9)
    with monkeypatch.context() as patch:
        patch.setattr(running.Run, "one_step", wrecked)
        with pytest.raises(KeyboardInterrupt):
            train(settings, progress=False)
    assert "the last steps had no usable gradient; the state before them is kept" in capsys.readouterr().err
    assert checkpoints.newest(run).about["step"] == 5
    assert train(settings, resume=True, progress=False).log[-1]["step"] == 12


def test_states_from_which_nothing_came_are_set_aside_where_there_are_others(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, whole = tmp_path / "run", running.Run.one_step

    def lost(it: running.Run, *arguments: Any) -> None:
        whole(it, *arguments)
        if it.step == 6:
            with torch.no_grad():
                next(it.model.parameters()).fill_(1e38)

    settings = config(drawn, run, steps=20, validate_every=50, keep_minutes=1e-9, most_skipped=3)
    with monkeypatch.context() as patch:
        patch.setattr(running.Run, "one_step", lost)
        with pytest.raises(BadInput, match="3 steps in a row"):
            train(settings, progress=False)
    assert (run / "checkpoints" / "doubtful-00000006").is_dir()
    assert checkpoints.newest(run).about["step"] == 5
    assert train(settings, resume=True, progress=False).log[-1]["step"] == 20


def test_the_best_model_is_that_of_the_state_gone_on_from(drawn: Path, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    best = read_tensors(run / MODEL)[0]
    # of steps that were lost with a later state
    model = load(run)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    running.save(model, run / MODEL)
    train(config(drawn, run), resume=True, progress=False)
    assert all(torch.equal(read_tensors(run / MODEL)[0][k], best[k]) for k in best)


def test_with_changed_data_the_record_and_the_best_are_those_of_the_new(drawn: Path, tmp_path: Path) -> None:
    place, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(drawn, place)
    _interrupted_at(4, config(place, run))
    image, instances = synthetic.cells(64, seed=9, radius_px=(7.0, 9.0))
    write_tiff(place / "images" / "4.tif", image, "YX")
    write_tiff(place / "labels" / "4.tif", instances.astype(np.uint16), "YX")
    result = train(config(place, run), resume=True, progress=False, accept_changed_data=True)
    record = json.loads((run / "run.json").read_text())
    assert record["validation"] == ["4.tif"]
    assert len(record["data"]) == 10
    assert [each["data_changed"] for each in record["continued"]] == [True]
    assert result.best_step > 4


def test_names_that_are_no_text(drawn: Path, tmp_path: Path) -> None:
    place = tmp_path / "data"
    shutil.copytree(drawn, place)
    odd = b"4\xff.tif".decode("utf-8", "surrogateescape")
    for kind in ("images", "labels"):
        shutil.copy(place / kind / "3.tif", place / kind / odd)
    result = train(config(place, tmp_path / "run", steps=2), progress=False)
    assert b"4\xff.tif" in (result.run / "scores.csv").read_bytes()
    with pytest.raises(BadInput, match="images must be a path that is text in UTF-8"):
        config(tmp_path / odd, tmp_path / "run")


def test_what_a_kill_left_beside_the_files_is_swept(drawn: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config(drawn, run, steps=1), progress=False)
    (run / ".model-ab12.safetensors").write_bytes(b"half")
    (run / ".log-x.csv").write_bytes(b"half")
    (run / ".trial-1").mkdir()
    (run / ".mine.csv").write_bytes(b"somebody's")
    train(config(drawn, run, steps=1), resume=True, progress=False)
    assert sorted(p.name for p in run.iterdir() if p.name.startswith(".")) == [".mine.csv"]


def test_a_run_that_never_took_a_step_saves_no_model(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = running.Run.gradient

    def poisoned(run: running.Run, drawn: Any, tiles: int | None = None) -> Tensor:
        return whole(run, [(image * math.nan, *others) for image, *others in drawn], tiles)

    monkeypatch.setattr(running.Run, "gradient", poisoned)
    with pytest.raises(BadInput, match="no model was ever worth saving"):
        train(config(drawn, tmp_path / "run", most_skipped=100), progress=False)
    assert not (tmp_path / "run" / MODEL).exists()


@pytest.mark.parametrize(
    "spoil",
    [lambda a: [], lambda a: {k: v for k, v in a.items() if k != "step"}, lambda a: {**a, "step": "six"},
     lambda a: {**a, "stepper": {}}],
)  # fmt: skip
def test_a_state_that_says_something_else_is_a_sentence(
    spoil: Callable[[Any], Any], drawn: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(config(drawn, run, steps=1), progress=False)
    state = checkpoints.newest(run)
    checkpoints.keep(run, 1, checkpoints.State(state.weights, state.optimizer, spoil(state.about)))
    with pytest.raises(BadInput, match="is of no run of this version: it has no usable"):
        train(config(drawn, run, steps=1), resume=True, progress=False)


def test_ctrl_c_on_a_full_disk_is_still_ctrl_c(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> Path:
        raise BadInput("the disk is full")

    monkeypatch.setattr(running, "keep", full)
    _interrupted_at(2, config(drawn, tmp_path / "run"))
    assert "note: the disk is full" in capsys.readouterr().err


def test_a_run_in_a_budget_that_came_down_goes_on_by_the_words_it_began_with(drawn: Path, tmp_path: Path) -> None:
    before = {**config(drawn, tmp_path, tile=36, memory="2GB").as_dict()}
    now = config(drawn, tmp_path, tile=80, memory="2GB")
    assert training._continued(now, before).tile == 36


def test_the_record_has_the_choices_that_were_made(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = iter([{"rows": {}}, *({"rows": {"op": "ours"}} for _ in range(50))])
    monkeypatch.setattr(uk, "choices", lambda device: next(tables))
    train(config(drawn, tmp_path / "run", steps=1), progress=False)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["kernels"] == {"rows": {"op": "ours"}}


@pytest.mark.gpu
@pytest.mark.parametrize("images_on", ["device", "host"])
def test_on_a_gpu_a_deterministic_run_goes_on_bit_for_bit(images_on: str, drawn: Path, tmp_path: Path) -> None:
    more = {"device": "cuda", "deterministic": True, "images_on": images_on}
    train(config(drawn, tmp_path / "whole", **more), progress=False)
    _interrupted_at(4, config(drawn, tmp_path / "run", **more))
    train(config(drawn, tmp_path / "run", **more), resume=True, progress=False)
    assert outcome(tmp_path / "run")[1:] == outcome(tmp_path / "whole")[1:]
    assert training.resumed_config(tmp_path / "run").precision == "bfloat16"
