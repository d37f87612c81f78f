"""Proves that a budget becomes the largest tiles that it has room for, by the forecast that goes with it."""

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.proof.properties import given, settings, st
from tests.unet_fast.one_piece import grey_net, tiny
from unet_fast import FastUNet, fitting, plan_tiles
from unet_fast.errors import BadInput
from unet_fast.fitting import fit, held_to, parameter_of
from unet_fast.measuring import CONTEXT_BYTES, Measured, Meter
from unet_fast.memory import estimate
from unet_fast.sources import ArraySource
from unet_fast.tiling import Cutter
from unet_fast.units import bytes_of

some = settings(derandomize=True, database=None, deadline=None, max_examples=60)
few = settings(derandomize=True, database=None, deadline=None, max_examples=25)

TTAS = st.sampled_from(["none", "d4", "rot7"])


def source_of(*shape: int) -> ArraySource:
    """[D, C, H, W] of a byte."""
    return ArraySource(np.broadcast_to(np.zeros(1, np.uint8), shape))


def unmade(features: tuple[int, ...], **settings_: Any) -> FastUNet:
    """A net without weights."""
    with torch.device("meta"):
        return FastUNet(features=features, **settings_)


def forecast(model: nn.Module, source: ArraySource, tta: str, side: int, batch: int) -> float:
    """Bytes of a prediction with tiles of a side: of those in flight, and of what is remembered of very many."""
    many = max(0, fitting._tiles(Cutter.of(model, tta), side, source.shape) - fitting._FEW)
    return fitting._Need(model, source, 1, 0)(side, batch) + fitting._PER_TILE * many


NETS: dict[str, Any] = {
    "features": st.sampled_from([(4, 8), (16, 32, 64), (32, 64, 128, 256), (64, 128, 256, 512, 1024)]),
    "up_mode": st.sampled_from(["deconv", "resize"]),
    "shape": st.tuples(st.integers(1, 3), st.just(1), st.integers(1, 4000), st.integers(1, 4000)),
    "batch": st.one_of(st.none(), st.integers(1, 4)),
    "tta": TTAS,
}


@given(**NETS, budget=st.integers(25, 3000).map(lambda n: n * 10**6))
@some
def test_tiles_fit_by_their_own_forecast_and_are_no_larger_than_usual(
    features: tuple[int, ...], up_mode: str, shape: tuple[int, int, int, int], batch: int | None, tta: str, budget: int
) -> None:
    model, source = unmade(features, up_mode=up_mode), source_of(*shape)
    cutter = Cutter.of(model, tta)
    usual = plan_tiles(shape, model=model, tta=tta)

    def need(side: int, batch: int) -> float:
        return forecast(model, source, tta, side, batch)

    try:
        found = fit(model, source, memory=budget, batch=batch, tta=tta)
    except BadInput:
        least = cutter.smallest(min(cutter.step, max(shape[2:])))
        assert need(least, batch or 1) > 0.95 * budget
        return
    plan, side = found.plan, max(found.plan.tile_in)
    assert found.batch == (batch or 1)
    assert plan.shape == shape[2:]
    assert need(side, found.batch) <= 0.95 * budget
    assert all(a <= b for a, b in zip(plan.tile_in, usual.tile_in, strict=True))
    assert len(plan) >= len(usual)
    if plan != usual:
        # the next larger tile is too large: else there were fewer of these
        larger = plan_tiles(shape, tile_in=side + cutter.step, model=model, tta=tta)
        assert len(larger) == len(plan) or need(side + cutter.step, found.batch) > 0.95 * budget


@given(**NETS)
@few
def test_more_memory_never_makes_more_tiles(
    features: tuple[int, ...], up_mode: str, shape: tuple[int, int, int, int], batch: int | None, tta: str
) -> None:
    model, source, before = unmade(features, up_mode=up_mode), source_of(*shape), None
    for megabytes in (40, 60, 90, 150, 300, 700, 2000, 10_000):
        try:
            plan = fit(model, source, memory=f"{megabytes}MB", batch=batch, tta=tta).plan
        except BadInput:
            # what was enough is enough
            assert before is None
            continue
        if before is not None:
            assert len(plan) <= len(before)
            assert all(now >= then for now, then in zip(plan.tile_in, before.tile_in, strict=True))
        before = plan
    assert before is not None
    assert before == plan_tiles(shape, model=model, tta=tta)


@given(**NETS)
@few
def test_what_a_refusal_asks_for_is_enough_and_no_more_than_needed(
    features: tuple[int, ...], up_mode: str, shape: tuple[int, int, int, int], batch: int | None, tta: str
) -> None:
    model, source = unmade(features, up_mode=up_mode), source_of(*shape)
    with pytest.raises(BadInput) as caught:
        fit(model, source, memory=1000, batch=batch, tta=tta)
    sentence = re.fullmatch(
        r"memory must be at least ([\d.]+ [GM]?B), for tiles of (\d+) x (\d+), got 1000 B", str(caught.value)
    )
    assert sentence, str(caught.value)
    assert fit(model, source, memory=sentence[1], batch=batch, tta=tta).batch == (batch or 1)
    # to the digits that are written
    side = int(sentence[2])
    exactly = forecast(model, source, tta, side, batch or 1) / 0.95
    assert side == int(sentence[3])
    assert exactly <= bytes_of(sentence[1]) < 1.02 * exactly + 10**6
    with pytest.raises(BadInput, match="memory must be at least"):
        fit(model, source, memory=int(exactly) - 1, batch=batch, tta=tta)
    assert max(fit(model, source, memory=int(exactly) + 1, batch=batch, tta=tta).plan.tile_in) == side


@pytest.mark.parametrize("shape", [(1, 3000), (3000, 1), (3, 17), (15, 16)], ids=str)
def test_an_image_narrower_than_a_step_needs_what_its_longer_side_needs(shape: tuple[int, int]) -> None:
    model, source = unmade((32, 32, 32, 32, 32)), source_of(1, 1, *shape)
    need = fitting._Need(model, source, 1, 0)
    # 188 answers for 4 pixels, 204 for a step of 16
    assert need(204, 1) > 1.02 * need(188, 1)
    with pytest.raises(BadInput, match="for tiles of 204 x 204"):
        fit(model, source, memory=(need(188, 1) + need(204, 1)) / 2 / 0.95)
    assert max(fit(model, source, memory=need(204, 1) / 0.95 + 1).plan.tile_in) == 204


def test_an_image_that_one_small_tile_covers_needs_no_more() -> None:
    model, source = unmade((32, 32, 32, 32, 32)), source_of(1, 1, 3, 4)
    need = fitting._Need(model, source, 1, 0)
    assert fit(model, source, memory=need(188, 1) / 0.95 + 1).plan.tile_in == (188, 188)


def test_without_a_budget_tiles_are_those_of_the_plan() -> None:
    model, source = grey_net(), source_of(2, 1, 300, 200)
    assert fit(model, source) == fitting.Fit(plan_tiles((300, 200), model=model), 1)
    assert fit(model, source, tile_in=76, batch=3).plan.tile_in == (76, 76)
    assert fit(model, source, tile_in=(76, 60), batch=3, tta="d4") == fitting.Fit(
        plan_tiles((300, 200), model=model, tile_in=(76, 60), batch=3, tta="d4"), 3
    )


@pytest.mark.parametrize(
    ("settings_", "sentence"),
    [
        ({"memory": "1GB", "tile_in": 76}, "memory chooses the tile; give one of memory and tile_in"),
        ({"memory": "6 apples"}, "memory must be a size such as 6GB, 500MB or 4GiB, got 6 apples"),
        ({"memory": 0}, "memory must be a size such as 6GB, 500MB or 4GiB, got 0"),
        ({"memory": -5}, "memory must be a size such as 6GB, 500MB or 4GiB, got -5"),
        ({"memory": "1GB", "tta": "d8"}, "tta must be one of none, d4, rot7, got 'd8'"),
    ],
    ids=str,
)
def test_what_is_no_budget_is_refused_in_a_sentence(settings_: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput) as caught:
        fit(grey_net(), source_of(1, 1, 90, 90), **settings_)
    assert str(caught.value) == sentence


def test_what_lies_beside_and_what_comes_out_counts() -> None:
    model, source = unmade((16, 32, 64)), source_of(1, 1, 2000, 2000)
    need = fitting._Need(model, source, 1, 0)(300, 1)
    assert fitting._Need(model, source, 1, 10**8)(300, 1) == need + 10**8
    assert fitting._Need(model, source, 9, 0)(300, 1) == need + 3 * 8 * 300**2
    held = ArraySource(np.zeros((1, 1, 200, 200)), held=10**7)
    assert fitting._Need(model, held, 1, 0)(300, 1) == need + 10**7
    for more in ({"beside": 10**8}, {"bytes_out": 100}):
        assert len(fit(model, source, memory="150MB", **more).plan) > len(fit(model, source, memory="150MB").plan)
    # each tile of a batch has maps of its own
    assert fitting._Need(model, source, 1, 0)(300, 4) > 2 * need
    assert len(fit(model, source, memory="150MB", batch=4).plan) > len(fit(model, source, memory="150MB").plan)


# ---- on a GPU, whose arithmetic needs none


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    here = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    monkeypatch.setattr(fitting, "parameter_of", lambda _: here)


@pytest.mark.usefixtures("as_on_a_gpu")
@given(budget=st.integers(800, 40_000).map(lambda n: n * 10**6), tta=TTAS, slices=st.integers(1, 3))
@few
def test_a_gpu_gets_the_largest_tile_and_then_as_many_as_there_is_room_for(budget: int, tta: str, slices: int) -> None:
    model = unmade((32, 64, 128, 256))
    found = fit(model, source_of(slices, 1, 3000, 2500), memory=budget, tta=tta)
    side, tiles = max(found.plan.tile_in), slices * len(found.plan)

    def total(side: int, batch: int) -> int:
        return estimate(model, side, mode="predict", batch=batch).total + CONTEXT_BYTES

    assert total(side, found.batch) <= 0.95 * budget
    assert 1 <= found.batch <= min(32, tiles)
    if found.batch < min(32, tiles):
        assert total(side, found.batch + 1) > 0.95 * budget
    if len(found.plan) > 1:
        fewer = plan_tiles((3000, 2500), tile_in=side + 8, model=model, tta=tta)
        assert total(side + 8, 1) > 0.95 * budget or len(fewer) == len(found.plan)
    # a number that was asked for is kept, and tiles are smaller
    if total(Cutter.of(model, tta).smallest(8), 5) <= 0.95 * budget:
        five = fit(model, source_of(slices, 1, 3000, 2500), memory=budget, tta=tta, batch=5)
        assert five.batch == 5
        assert total(max(five.plan.tile_in), 5) <= 0.95 * budget
        assert len(five.plan) >= len(found.plan)


# ---- nets that nobody can count


class Blur(nn.Module):
    """Of a U-Net's geometry at depth 0, and of no other kind."""

    depth, in_channels, out_channels = 0, 1, 2

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, width, 3), nn.Conv2d(width, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


class Wrapped(nn.Module):
    """A FastUNet that does not look like one."""

    def __init__(self, model: FastUNet) -> None:
        super().__init__()
        self.model = model
        self.depth, self.in_channels, self.out_channels = model.depth, model.in_channels, model.out_channels
        self.up_mode, self.padding = model.up_mode, model.padding

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def measured(monkeypatch: pytest.MonkeyPatch, per_pixel: float, always: float = 0.0) -> list[int]:
    """A net that takes so many bytes for each pixel of its tile, as a meter sees it; the sides that were measured."""
    sides: list[int] = []

    class Sees(Meter):
        def __init__(self, _: torch.device) -> None:
            pass

        def measure(self, work: Any, **_: Any) -> Measured:
            [tile] = [cell.cell_contents for cell in work.__closure__ if isinstance(cell.cell_contents, Tensor)]
            work()
            sides.append(tile.shape[-1])
            return Measured(int(per_pixel * tile.shape[-1] ** 2 + always), 0.1)

    monkeypatch.setattr(fitting, "Meter", Sees)
    return sides


@pytest.mark.parametrize(
    "model",
    [Blur(), Wrapped(tiny(1)), tiny(2, padding="same").float(), tiny(1)],
    ids=["another module", "a net inside", "same", "float64"],
)
@pytest.mark.parametrize("tta", ["none", "d4", "rot7"])
def test_what_cannot_be_counted_is_measured_on_two_small_tiles(
    model: nn.Module, tta: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    per_pixel, always = 900.0, 1e6
    sides = measured(monkeypatch, per_pixel, always)
    source, cutter = source_of(1, 1, 900, 700), Cutter.of(model, tta)
    tiles = []
    for budget in (7e6, 20e6, 60e6, 150e6, 1e9):
        side = max(fit(model, source, memory=budget, tta=tta).plan.tile_in)
        windows = side**2 * (3 * (4 + 1) + 24)
        assert per_pixel * side**2 + always + windows <= budget
        tiles.append(side)
        # each once, and small
        assert len(sides) == len(set(sides)) == 2
        assert max(sides) < 300
        sides.clear()
    assert tiles == sorted(tiles)
    assert tiles[0] < tiles[-1] == max(plan_tiles((900, 700), model=model, tta=tta).tile_in)
    with pytest.raises(BadInput) as caught:
        fit(model, source, memory="1MB", tta=tta)
    needed = re.search("at least (.*), for tiles of", str(caught.value))
    assert needed
    least = cutter.smallest(cutter.step)
    # what is written is a tenth of a megabyte above at most, which is room for tiles a little larger
    assert least <= max(fit(model, source, memory=needed[1], tta=tta).plan.tile_in) < least + 16


def test_memory_that_grows_faster_than_tiles_is_not_underestimated(monkeypatch: pytest.MonkeyPatch) -> None:
    # between both measurements a line, from the second on never less than it
    measured(monkeypatch, 500.0)
    need = fitting._Need(Blur(), source_of(1, 1, 500, 500), 1, 0)
    found = [need(side, 1) for side in range(5, 500)]
    assert found == sorted(found)
    for side, bytes_ in zip(range(5, 500), found, strict=True):
        assert bytes_ >= 500 * side**2
    assert need(300, 3) >= 2.9 * need(300, 1) - 24 * 300**2 * 2


@pytest.mark.slow
@pytest.mark.skipif(Meter(torch.device("cpu")).peak() is None, reason="needs /proc")
def test_a_real_net_that_is_measured_takes_about_what_it_counts() -> None:
    model = grey_net((16, 32, 32))
    source = source_of(1, 1, 900, 700)
    counted = estimate(model, 412, mode="predict").dynamic
    found = fitting._Need(Wrapped(model), source, 1, 0)._measured(412)
    assert 0.9 * counted < found < 4 * counted


@pytest.mark.slow
@pytest.mark.skipif(Meter(torch.device("cpu")).peak() is None, reason="needs /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_net_takes_no_more_than_it_is_forecast_to(dtype: torch.dtype) -> None:
    model = grey_net((16, 32, 32)).to(dtype)
    tile = torch.rand(1, 1, 412, 412).to(dtype)
    with torch.no_grad():
        taken = Meter(torch.device("cpu")).measure(lambda: model(tile), calls=2).bytes
    assert taken is not None
    assert taken <= fitting._Need(model, source_of(1, 1, 900, 700), 1, 0)._counted(412, 1)


def test_where_nothing_can_be_measured_a_tile_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "Meter", lambda _: SimpleNamespace(measure=lambda *_, **__: Measured(None, 0.1)))
    with pytest.raises(BadInput, match="memory cannot be measured on this system for such a model; give tile_in"):
        fit(Blur(), source_of(1, 1, 90, 90), memory="1GB")
    assert fit(Blur(), source_of(1, 1, 90, 90), tile_in=20).plan.tile_in == (20, 20)
    assert fit(grey_net(), source_of(1, 1, 90, 90), memory="1GB").batch == 1


def test_a_net_without_parameters_is_a_cpus_float32() -> None:
    class Middle(nn.Module):
        depth, in_channels, out_channels = 0, 1, 1

        def forward(self, x: Tensor) -> Tensor:
            return x[..., 2:-2, 2:-2]

    like = parameter_of(Middle())
    assert (like.dtype, like.device.type) == (torch.float32, "cpu")
    buffered = Middle()
    buffered.register_buffer("table", torch.zeros(1, dtype=torch.float64))
    assert parameter_of(buffered).dtype == torch.float64


# ---- being held to it


def test_a_budget_is_watched_while_it_lasts() -> None:
    cpu = torch.device("cpu")
    with held_to(None, cpu) as nothing:
        assert nothing == (None, 0)
    with held_to("60MB", cpu) as (watch, budget):
        assert budget == 60_000_000
        assert watch is not None
        if not watch.wanted:
            pytest.skip("needs /proc")
        assert watch.above < budget
        held = np.ones(20_000_000)
        for _ in range(1000):
            if watch.above > budget:
                break
            watch._done.wait(0.01)
        assert 100e6 < watch.above < 400e6
        del held
        watch.restart()
        assert watch.above < budget
    with held_to("60MB", cpu, beside=50_000_000) as (watch, _):
        assert watch is not None
        held = np.ones(1)
        for _ in range(1000):
            if watch.greatest:
                break
            watch._done.wait(0.01)
        # what the process holds already counts
        assert watch.above >= 45_000_000
        del held
    with pytest.raises(BadInput, match="memory must be a size such as"), held_to("much", cpu):
        raise AssertionError
