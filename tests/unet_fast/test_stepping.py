"""Proves that a step is the gradient of the mean over all pixels that count, however its tiles are shared and scaled,
and that a loss or a gradient that is no number changes nothing, is counted, and ends a run in the end.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from unet_fast import FastUNet, TrainConfig, checkpoints, synthetic, train
from unet_fast.distribution import Ranks
from unet_fast.errors import BadInput
from unet_fast.files import write_tiff
from unet_fast.run import Run
from unet_fast.stepping import Stepper
from unet_fast.task import prepare

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of touching cells; parts of some are ignored, so that tiles do not count alike."""
    place = tmp_path_factory.mktemp("drawn")
    for kind in ("images", "labels"):
        (place / kind).mkdir()
    for seed in range(4):
        image, instances = synthetic.cells(64, seed=seed, radius_px=(7.0, 9.0))
        ids = instances.astype(np.int32)
        ids[: 16 * (seed % 3)] = -1
        write_tiff(place / "images" / f"{seed}.tif", image, "YX")
        write_tiff(place / "labels" / f"{seed}.tif", np.where(ids < 0, 999, ids).astype(np.uint16), "YX")
    return place


@pytest.fixture(autouse=True)
def no_page(blank_page: None) -> None:
    pass


def config(drawn: Path, out: Path, **more: Any) -> TrainConfig:
    usual: dict[str, Any] = {
        "label_kind": "instance", "ignore": 999, "features": (2, 3), "steps": 6, "validate_every": 3, "log_every": 1,
        "validation": 0.25, "device": "cpu", "tile": 36, "classes": 2,
    }  # fmt: skip
    return TrainConfig(images=drawn / "images", labels=drawn / "labels", out=out, **{**usual, **more})


def run_of(settings: TrainConfig) -> Run:
    return Run(settings, prepare(settings, CPU))


def gradient(run: Run) -> tuple[float, list[Tensor]]:
    loss = run.gradient(run.feed.take(run.step, run.steps))
    return float(loss), [p.grad.clone() for p in run.model.parameters() if p.grad is not None]


# ---- what a step is


@pytest.mark.parametrize("at_once", [1, 2, 3, None])
def test_tiles_of_a_step_are_one_mean_however_many_go_through_the_net_together(
    at_once: int | None, drawn: Path, tmp_path: Path
) -> None:
    settings = config(drawn, tmp_path, batch=6, dropout=0.0, clip=0.0)
    run = run_of(settings)
    image, instances, target = run.sampler.batch(0)
    # some tiles have more ignored pixels than others: a mean of means would be another
    valid = [int((t >= 0).sum()) for t in target[:, 8:-8, 8:-8]]
    assert len(set(valid)) > 1
    want = run.loss(run.model(image), instances, target)
    want.backward()
    wanted = [p.grad.clone() for p in run.model.parameters() if p.grad is not None]
    loss, found = gradient(run_of(settings.with_(at_once=at_once)))
    assert loss == pytest.approx(float(want.detach()), rel=1e-5)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_scaled_loss_gives_the_gradient_of_float32_to_the_maps_precision(
    precision: str, drawn: Path, tmp_path: Path
) -> None:
    settings = config(drawn, tmp_path, batch=2, dropout=0.0, clip=0.0)
    loss, want = gradient(run_of(settings))
    near, found = gradient(run_of(settings.with_(precision=precision)))
    assert near == pytest.approx(loss, rel=0.02)
    top = max(float(w.abs().max()) for w in want)
    assert all(float((a - b).abs().max()) < 0.05 * top for a, b in zip(found, want, strict=True))
    assert all(a.dtype == torch.float32 for a in found)


def test_where_all_is_ignored_the_loss_and_the_gradient_are_zero(drawn: Path, tmp_path: Path) -> None:
    run = run_of(config(drawn, tmp_path, dropout=0.0))
    [(image, instances, target)] = run.feed.take(0, 1)
    loss = run.gradient([(image, torch.full_like(instances, -1), torch.full_like(target, -1))])
    assert float(loss) == 0
    assert not any(p.grad.any() for p in run.model.parameters() if p.grad is not None)
    run.stepper.update(0.1)
    assert run.stepper.counts() == {"skipped": 0, "longest": 0}


# ---- no number


def stepper(precision: str = "float32", **more: Any) -> Stepper:
    torch.manual_seed(1)
    settings: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.0, "clip": 0.0, **more}
    return Stepper(FastUNet(features=(2, 3), dropout=0.0), Ranks(), precision=precision, **settings)


def one_update(it: Stepper, spoil: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None) -> float:
    """A step on random pixels; `spoil` changes (image, weight)."""
    generator = torch.Generator().manual_seed(7)
    image = torch.rand(1, 1, 36, 36, generator=generator)
    weight = torch.ones(1, 20, 20)
    if spoil is not None:
        image, weight = spoil(image, weight)
    target = (image[:, 0, 8:-8, 8:-8].nan_to_num() > 0.5).long()
    it.begin()
    it.add(it.logits(image), target, weight, 400)
    loss = it.gather(400)
    it.update(0.1)
    return float(loss)


def everything(it: Stepper) -> list[Tensor]:
    return [t.detach().clone() for t in (*it.model.parameters(), *it.tensors().values())]


def with_nan(image: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    image[0, 0, 18, 18] = math.nan
    return image, weight


def with_infinity(image: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    image[0, 0, 3, 3] = math.inf
    return image, weight


def with_endless_weight(image: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    weight[0, 5, 5] = math.inf
    return image, weight


def with_large_image(image: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return image * 1e38, weight


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("spoil", [with_nan, with_infinity, with_endless_weight, with_large_image])
def test_a_step_whose_loss_or_gradient_is_no_number_changes_nothing(
    spoil: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], first: bool, precision: str
) -> None:
    it = stepper(precision)
    if not first:
        assert math.isfinite(one_update(it))
    before = everything(it)
    one_update(it, spoil)
    assert all(torch.equal(a, b) for a, b in zip(everything(it), before, strict=True))
    assert it.counts() == {"skipped": 1, "longest": 1}
    # the next one that is good is as if there had been none
    other = stepper(precision)
    if precision == "float16":
        other.scale.copy_(it.scale)
    if not first:
        one_update(other)
        other.scale.copy_(it.scale)
    one_update(it)
    one_update(other)
    for a, b in zip(everything(it), everything(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert it.counts()["longest"] == 1
    assert it.counts()["longest"] == 0


def test_a_gradient_that_is_no_number_though_the_loss_is(monkeypatch: pytest.MonkeyPatch) -> None:
    it = stepper()
    before = everything(it)
    it.model.head.bias.register_hook(lambda grad: torch.full_like(grad, math.inf))  # type: ignore[union-attr]
    assert math.isfinite(one_update(it))
    assert all(torch.equal(a, b) for a, b in zip(everything(it), before, strict=True))
    assert it.counts()["skipped"] == 1


def test_the_scale_of_float16_falls_at_once_and_rises_with_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    from unet_fast import stepping

    monkeypatch.setattr(stepping, "_PATIENT_STEPS", 3)
    it = stepper("float16")
    scales = []
    for spoil in (None, with_nan, with_nan, None, None, None, None, None, None):
        one_update(it, spoil)
        scales.append(float(it.scale) / 2**16)
    assert scales == [1, 0.5, 0.25, 0.25, 0.25, 0.5, 0.5, 0.5, 1]
    it.scale.fill_(2.0**24)
    for _ in range(4):
        one_update(it)
    assert float(it.scale) <= 2.0**24
    # float32 and bfloat16 have none
    plain = stepper("bfloat16")
    one_update(plain, with_nan)
    assert float(plain.scale) == 1


def test_float16_recovers_from_activations_that_are_too_large() -> None:
    it = stepper("float16", clip=1.0)
    for number in range(100):
        one_update(it, (lambda i, w: (i * 1e5, w)) if number % 10 == 0 else None)
    assert all(bool(p.isfinite().all()) for p in it.model.parameters())
    counts = it.counts()
    assert 1 <= counts["skipped"] <= 40
    # it learns between them
    assert one_update(it) < one_update(stepper("float16"))


def test_gradients_are_cut_by_their_own_length_and_not_by_the_scaled_one() -> None:
    moved = {}
    for precision in ("float32", "float16"):
        it = stepper(precision, clip=1e-2, momentum=0.0)
        before = everything(it)[: len(it.parameters)]
        one_update(it)
        change = [a - b for a, b in zip(everything(it), before, strict=False)]
        moved[precision] = float(torch.cat([c.flatten() for c in change]).norm())
    assert moved == pytest.approx(dict.fromkeys(moved, 0.1 * 1e-2), rel=0.01)


def test_a_state_goes_on_where_it_was() -> None:
    a, b = stepper("float16"), stepper("float16")
    for spoil in (None, with_nan, None):
        one_update(a, spoil)
    b.model.load_state_dict(a.model.state_dict())
    b.restore({k: v.clone() for k, v in a.tensors().items()}, a.state())
    assert b.state() == a.state()
    for it in (a, b):
        one_update(it, with_nan)
        one_update(it)
    assert all(torch.equal(x, y) for x, y in zip(everything(a), everything(b), strict=True))
    assert a.state() == b.state()


# ---- in a run


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """Steps whose images come with a NaN."""
    steps: set[int] = set()
    whole = Run.gradient

    def gradient(run: Run, drawn: Any, tiles: int | None = None) -> Tensor:
        if run.step in steps:
            drawn = [(image.clone().index_fill_(2, torch.tensor(18), math.nan), *rest) for image, *rest in drawn]
        return whole(run, drawn, tiles)

    monkeypatch.setattr(Run, "gradient", gradient)
    return steps


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_skipped_steps_are_counted_shown_and_survive_a_resumption(
    precision: str, drawn: Path, tmp_path: Path, poisoned: set[int], capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned |= {1, 2, 4}
    settings = config(drawn, tmp_path / "run", precision=precision)
    result = train(settings)
    assert [row["skipped"] for row in result.log] == [0, 1, 1, 0, 1, 0]
    assert [math.isnan(row["loss"] or 0.0) for row in result.log] == [False, True, True, False, True, False]
    said = capsys.readouterr().err
    assert "note: 1 step up to 2 changed nothing: no usable gradient\n" in said
    assert "note: 1 step up to 5 changed nothing: no usable gradient, 3 in all\n" in said
    assert all(bool(p.isfinite().all()) for p in result.model.parameters())
    state = checkpoints.newest(result.run).about["stepper"]
    assert state["skipped"] == 3
    assert state["scale"] == (2.0**13 if precision == "float16" else 1.0)
    again = train(settings, resume=True, progress=False)
    assert str(again.log) == str(result.log)


def test_after_so_many_in_a_row_the_run_ends_and_the_last_good_state_goes_on(
    drawn: Path, tmp_path: Path, poisoned: set[int]
) -> None:
    whole = train(config(drawn, tmp_path / "whole"), progress=False)
    settings = config(drawn, tmp_path / "run", most_skipped=2)
    poisoned |= {3, 4}
    with pytest.raises(BadInput) as refused:
        train(settings, progress=False)
    said = "2 steps in a row had a loss or a gradient that is no number, at step 5; "
    said += "a run with a smaller lr than 0.002 is needed"
    assert str(refused.value) == f"{said} ({settings.out} keeps the last good state)"
    assert checkpoints.newest(settings.out).about["step"] == 3
    # what was wrong with these images is mended
    poisoned.clear()
    result = train(settings, resume=True, progress=False)
    assert [row["loss"] for row in result.log] == [row["loss"] for row in whole.log]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(result.model.state_dict()[name], value)


def test_one_now_and_then_does_not_end_it(drawn: Path, tmp_path: Path, poisoned: set[int]) -> None:
    poisoned |= {0, 2, 4}
    assert len(train(config(drawn, tmp_path / "run", most_skipped=2), progress=False).log) == 6


@pytest.mark.slow
def test_nothing_leaks_over_hundreds_of_steps(drawn: Path, tmp_path: Path) -> None:
    import os

    from unet_fast.measuring import _held, give_back

    settings = config(drawn, tmp_path, steps=700, log_every=10_000, validate_every=10_000, workers=2)
    run = run_of(settings)

    def files() -> int:
        return len(os.listdir("/proc/self/fd"))

    held = []
    for number in range(700):
        run.one_step()
        run.losses.clear()
        if number in (199, 699):
            give_back()
            held.append((_held(), files()))
    run.feed.close()
    (before, open_before), (after, open_after) = held
    assert open_before == open_after
    assert (after - before) / 500 < 10_000, f"{(after - before) / 500:.0f} bytes a step"
