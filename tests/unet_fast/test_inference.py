"""Proves that prediction is the same whatever it runs through: tiles, budgets, batches, disks, threads, and hard times.

What it must equal is one forward pass over the endless mirrored image (`one_piece`), in float64; in narrower dtypes the
error against float64 is at most twice that of one pass in the same dtype.
"""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tests.proof.properties import given, settings, st
from tests.proof.yardstick import assert_as_close_as
from tests.unet_fast.one_piece import averaged, grey_net, one_piece, picture, softmax, tile_that_keeps, tiny
from unet_fast import FastUNet, Normalisation, fitting, geometry, inference, plan_tiles, predict
from unet_fast.greys import Greys
from unet_fast.inference import Answer, Inference, evaluating, grouped
from unet_fast.sources import ArraySource
from unet_fast.units import bytes_of

few = settings(derandomize=True, database=None, deadline=None, max_examples=20)
some = settings(derandomize=True, database=None, deadline=None, max_examples=40)
many = settings(derandomize=True, database=None, deadline=None, max_examples=60)


def tiles_for(model: FastUNet, shape: Sequence[int], cuts: Sequence[int]) -> list[int]:
    """Sides that cut an image into about so many rows and columns of tiles."""
    step = geometry.step_multiple(model.depth)
    return [tile_that_keeps(model, max(1, n // (cut * step))) for n, cut in zip(shape, cuts, strict=True)]


def assert_exact(got: NDArray[Any], want: NDArray[Any]) -> None:
    assert (got.shape, got.dtype) == (want.shape, np.float64)
    assert np.abs(got - want).max() <= 1e-9 * want.std() + 1e-13


# ---- the same as in one piece


@pytest.mark.parametrize(
    ("depth", "up_mode", "padding"),
    [
        (1, "deconv", "valid"),
        (2, "resize", "same"),
        (3, "deconv", "same"),
        (4, "resize", "valid"),
        (5, "deconv", "valid"),
    ],
)
def test_the_nets_of_these_tests_feel_their_whole_halo(depth: int, up_mode: str, padding: str) -> None:
    model = tiny(depth, up_mode=up_mode, padding=padding)
    halo, step = geometry.halo(depth), geometry.step_multiple(depth)
    image = picture(1, 1, 4 * halo + 8 * step)
    middle = image.shape[2] // 2 // step * step
    near = slice(middle - step, middle + 2 * step)
    want = one_piece(model, image)[:, 0, near]
    for place in (middle - halo + 4, middle + halo - 4 + step // 2):
        other = image.copy()
        other[..., place] += 30
        # a thousand times what the tests of this file let pass
        assert np.abs(one_piece(model, other)[:, 0, near] - want).max() > 1e-6


ANY_SIZE: dict[str, Any] = {
    "height": st.integers(1, 700),
    "width": st.integers(1, 700),
    "depth": st.integers(1, 5),
    "channels": st.integers(1, 3),
    "classes": st.integers(1, 3),
    "up_mode": st.sampled_from(["deconv", "resize"]),
    "padding": st.sampled_from(["valid", "same"]),
    "cuts": st.tuples(st.integers(1, 6), st.integers(1, 6)),
    "batch": st.integers(1, 5),
}


@pytest.mark.slow
@given(**ANY_SIZE)
@many
def test_images_of_any_size_in_any_tiles_are_as_in_one_piece(
    height: int, width: int, depth: int, channels: int, classes: int, up_mode: str, padding: str,
    cuts: tuple[int, int], batch: int,
) -> None:  # fmt: skip
    model = tiny(depth, channels, classes, up_mode=up_mode, padding=padding)
    image = picture(channels, height, width)
    tiles = tiles_for(model, (height, width), cuts)
    got = predict(model, image, axes="CYX", tile_in=tiles, output="logits", batch=batch)
    assert_exact(got, one_piece(model, image))


@pytest.mark.slow
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 2), st.integers(1, 60), st.integers(1, 60)),
    depth=st.integers(0, 3),
    up_mode=st.sampled_from(["deconv", "resize"]),
    padding=st.sampled_from(["valid", "same"]),
    steps=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    batch=st.integers(1, 7),
    output=st.sampled_from(["labels", "probabilities", "logits"]),
)
@some
def test_stacks_in_batches_across_slices_are_as_slice_by_slice(
    shape: tuple[int, int, int, int], depth: int, up_mode: str, padding: str, steps: tuple[int, int], batch: int,
    output: str,
) -> None:  # fmt: skip
    model, image = tiny(depth, shape[1], 3, up_mode=up_mode, padding=padding), picture(*shape)
    # as little as a tile can keep, wherever there are not too many then
    step = geometry.step_multiple(depth)
    steps = tuple(max(each, n // (12 * step)) for each, n in zip(steps, shape[2:], strict=True))
    tiles = [tile_that_keeps(model, each) for each in steps]
    got = predict(model, image, axes="ZCYX", tile_in=tiles, output=output, batch=batch)
    want = np.stack([one_piece(model, each) for each in image])
    if output == "labels":
        assert np.array_equal(got, want.argmax(1))
    else:
        assert_exact(got, want if output == "logits" else np.stack([softmax(each) for each in want]))


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("up_mode", ["deconv", "resize"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes_err_no_more_in_tiles_than_in_one_piece(dtype: torch.dtype, up_mode: str, padding: str) -> None:
    for depth in (1, 3):
        model = tiny(depth, 2, 2, width=4, up_mode=up_mode, padding=padding).to(dtype)
        image = torch.from_numpy(picture(2, 50, 40)).to(dtype).double().numpy()
        torchs = torch.from_numpy(one_piece(model, image)).to(dtype)
        exact = torch.from_numpy(one_piece(tiny_like(model).double(), image))
        for steps, batch in ((1, 4), (3, 1)):
            tile = tile_that_keeps(model, steps)
            got = predict(model, image, axes="CYX", tile_in=tile, output="logits", batch=batch)
            assert got.dtype == np.float32
            assert_as_close_as(torchs, torch.from_numpy(got).to(dtype), exact)


def tiny_like(model: FastUNet) -> FastUNet:
    """Its copy."""
    copy = FastUNet(**model.settings).eval().to(next(model.parameters()).dtype)
    copy.load_state_dict(model.state_dict())
    return copy


@pytest.mark.parametrize(
    ("up_mode", "padding", "budgets"),
    [
        ("deconv", "valid", ("36MB", "42MB", "1GB")),
        ("resize", "valid", ("36MB", "42MB", "1GB")),
        # measured, in a process whose heap moves by a megabyte
        pytest.param("resize", "same", ("16MB", "1GB"), marks=pytest.mark.slow),
    ],
)
def test_a_budget_changes_tiles_and_nothing_else(up_mode: str, padding: str, budgets: Sequence[str]) -> None:
    model = grey_net((6, 8, 8), up_mode=up_mode, padding=padding)
    image = picture(150, 220).astype(np.float32)
    torchs = torch.from_numpy(one_piece(model, image[None])).float()
    exact = torch.from_numpy(one_piece(tiny_like(model).double(), image[None].astype(np.float64)))
    source, sides = ArraySource(image[None, None]), set()
    for memory in budgets:
        sides.add(fitting.fit(model, source, memory=memory, bytes_out=8).plan.tile_in)
        got = predict(model, image, memory=memory, output="logits")
        assert_as_close_as(torchs, torch.from_numpy(got), exact)
    assert len(sides) == len(budgets)


# ---- streams


class Looked:
    """Only a shape, a dtype, and slices; remembers which were asked for."""

    def __init__(self, values: NDArray[Any]) -> None:
        self.values, self.shape, self.dtype = values, values.shape, values.dtype
        self.asked: list[tuple[Any, ...]] = []

    def __getitem__(self, where: Any) -> NDArray[Any]:
        self.asked.append(where)
        for each, n in zip(where, self.shape, strict=True):
            # a slice of the stack, all channels, or a window inside the image
            assert isinstance(each, int) or each == slice(None) or (0 <= each.start < each.stop <= n and not each.step)
        return self.values[where]

    def largest(self) -> tuple[int, int]:
        """Rows and columns that were asked for at once."""
        spans = [[each.stop - each.start for each in where[-2:]] for where in self.asked]
        return max(rows for rows, _ in spans), max(columns for _, columns in spans)


@pytest.mark.parametrize("tta", ["none", "d4", pytest.param("rot7", marks=pytest.mark.slow)])
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_no_more_than_a_window_is_read_at_a_time(tta: str, padding: str) -> None:
    model = tiny(1, padding=padding)
    image = Looked(np.random.default_rng(0).integers(0, 255, (2, 130, 90)).astype(np.uint8))
    model.normalisation = Normalisation("range", low=0, high=255)
    plan = plan_tiles(image.shape, tile_in=44, model=model, tta=tta)
    got = predict(model, image, axes="ZYX", tile_in=44, tta=tta)
    # a turned window lies in a box of its diagonal, and a pixel on either side to interpolate from
    side = plan.tile_in[0] if tta != "rot7" else int(np.ceil(2**0.5 * plan.tile_in[0])) + 4
    assert max(image.largest()) <= side
    # each tile reads once for each version
    assert len(image.asked) == 2 * len(plan) * {"none": 1, "d4": 8, "rot7": 7}[tta]
    assert np.array_equal(got, predict(model, image.values, axes="ZYX", tile_in=44, tta=tta))


def test_percentiles_and_the_search_for_nan_read_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unet_fast.greys._BAND", 4000)
    model = tiny(1)
    model.normalisation = Normalisation()
    image = Looked(picture(300, 200).astype(np.float32))
    got = predict(model, image, tile_in=44, output="probabilities")
    assert image.largest() == (44, 200)
    assert all((rows.stop - rows.start) * (columns.stop - columns.start) <= 4000 for rows, columns in image.asked)
    np.testing.assert_allclose(
        got, predict(model, image.values, tile_in=44, output="probabilities"), rtol=0, atol=1e-12
    )


def _mapped(values: NDArray[Any], place: Path) -> Any:
    found = np.memmap(place / "image.dat", values.dtype, "w+", shape=values.shape)
    found[:] = values
    found.flush()
    return np.memmap(place / "image.dat", values.dtype, "r", shape=values.shape)


def _zarr(values: NDArray[Any], place: Path) -> Any:
    zarr = pytest.importorskip("zarr")
    return zarr.create_array(str(place / "image.zarr"), data=values, chunks=(1,) * (values.ndim - 2) + (16, 20))


IMAGES: dict[str, Callable[[NDArray[Any], Path], Any]] = {
    "a tensor": lambda values, _: torch.from_numpy(values),
    "a tensor that wants gradients": lambda values, _: torch.from_numpy(values).requires_grad_(),
    "np.memmap": _mapped,
    "Zarr": _zarr,
    "anything with slices": lambda values, _: Looked(values),
    "nested lists": lambda values, _: values.tolist(),
    "the other byte order": lambda values, _: values.astype(">f8"),
    "strides": lambda values, _: np.repeat(values, 2, -1)[..., ::2],
}


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["YX", "ZYX", "YXC", "ZCYX"])
@pytest.mark.parametrize("kind", IMAGES)
def test_an_image_may_be_anything_that_has_slices(kind: str, axes: str, tmp_path: Path) -> None:
    sizes = {"Z": 2, "C": 2, "Y": 45, "X": 50}
    values = picture(*(sizes[axis] for axis in axes))
    model = tiny(1, 2 if "C" in axes else 1)
    want = predict(model, values, axes=axes, tile_in=28, output="logits")
    got = predict(model, IMAGES[kind](values, tmp_path), axes=axes, tile_in=28, output="logits")
    assert np.array_equal(np.asarray(got), want)


def _out_zarr(shape: Sequence[int], dtype: Any, place: Path) -> Any:
    zarr = pytest.importorskip("zarr")
    return zarr.create_array(
        str(place / "out.zarr"), shape=shape, dtype=dtype, chunks=(1,) * (len(shape) - 2) + (16, 20)
    )


OUTS: dict[str, Callable[[Sequence[int], Any, Path], Any]] = {
    "np.memmap": lambda shape, dtype, place: np.memmap(place / "out.dat", dtype, "w+", shape=tuple(shape)),
    "Zarr": _out_zarr,
    "a tensor": lambda shape, dtype, _: torch.zeros(*shape, dtype=getattr(torch, np.dtype(dtype).name)),
    "a wider array": lambda shape, dtype, _: np.zeros(shape, np.float64),
}


@pytest.mark.parametrize("stack", [False, True])
@pytest.mark.parametrize("output", ["labels", "probabilities"])
@pytest.mark.parametrize("kind", OUTS)
def test_a_result_may_go_anywhere_that_has_slices(kind: str, output: str, stack: bool, tmp_path: Path) -> None:
    values, model = picture(*((2,) if stack else ()), 45, 50), tiny(1, classes=3)
    axes = "ZYX" if stack else "YX"
    want = predict(model, values, axes=axes, output=output)
    out = OUTS[kind](want.shape, want.dtype, tmp_path)
    assert predict(model, values, axes=axes, output=output, tile_in=28, batch=2, out=out) is out
    np.testing.assert_allclose(np.asarray(out[:]), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tta", ["none", "d4", "rot7"])
def test_pixels_without_a_value_become_the_dark_end_of_the_range(tta: str) -> None:
    model, image = tiny(1), 100 * picture(40, 50)
    model.normalisation = Normalisation("range", low=-50, high=150)
    bad = image.copy()
    bad[3, 4], bad[10:20, 12], bad[39, 49], bad[0, 0] = np.nan, np.nan, np.inf, -np.inf
    filled = image.copy()
    filled[3, 4], filled[10:20, 12], filled[39, 49], filled[0, 0] = -50, -50, 150, -50
    with pytest.raises(ValueError, match="13 NaN or infinite pixels, the first at image row 0 column 0"):
        predict(model, bad, tta=tta)
    got = predict(model, bad, nan="fill", tile_in=36, output="probabilities", tta=tta)
    assert np.array_equal(got, predict(model, filled, tile_in=36, output="probabilities", tta=tta))
    assert np.isfinite(got).all()
    with pytest.raises(ValueError, match="nan must be one of refuse, fill, got 'ignore'"):
        predict(model, bad, nan="ignore")


def test_pixels_without_a_value_count_towards_no_percentile() -> None:
    model, image = tiny(1), picture(40, 50)
    model.normalisation = Normalisation("percentile", low=10, high=90)
    bad = image.copy()
    bad[:10] = np.nan
    low, high = np.percentile(image[10:], [10, 90])
    model.normalisation = None
    want = predict(model, np.where(np.isnan(bad), 0, np.clip((image - low) / (high - low), 0, 1)), output="logits")
    model.normalisation = Normalisation("percentile", low=10, high=90)
    np.testing.assert_allclose(predict(model, bad, nan="fill", output="logits"), want, rtol=0, atol=1e-6)


# ---- threads


class Fails:
    """An image, or a place for a result, whose k-th access raises."""

    def __init__(self, values: NDArray[Any], at: int, error: BaseException, *, times: int = 1) -> None:
        self.values, self.shape, self.dtype = values, values.shape, values.dtype
        self.at, self.error, self.calls, self.times = at, error, 0, times

    def _call(self) -> None:
        self.calls += 1
        if self.at <= self.calls < self.at + self.times:
            raise self.error

    def __getitem__(self, where: Any) -> NDArray[Any]:
        self._call()
        return self.values[where]

    def __setitem__(self, where: Any, what: Any) -> None:
        self._call()
        self.values[where] = what


class Hooked:
    """Does something before each forward pass of a net, with its number from 1 and what comes in."""

    def __init__(self, model: nn.Module, act: Callable[[int, Tensor], None]) -> None:
        self.calls, self.act, self.sides = 0, act, list[tuple[int, ...]]()
        self.handle = model.register_forward_pre_hook(self._before)

    def _before(self, _: nn.Module, arguments: tuple[Tensor]) -> None:
        self.calls += 1
        self.sides.append(tuple(arguments[0].shape))
        self.act(self.calls, arguments[0])

    def __enter__(self) -> "Hooked":
        return self

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


@pytest.fixture
def all_as_before() -> Any:
    """No thread is left, and gradients are as they were."""
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before
    assert torch.is_grad_enabled()


class Away(Exception):
    """Of no kind that anybody knows."""


ERRORS: dict[str, BaseException] = {
    "the disk": OSError(5, "Input/output error"),
    "a bug": RuntimeError("in the middle"),
    "anything": Away("gone"),
    "the end": StopIteration("none left"),
    "a signal": KeyboardInterrupt(),
}


@pytest.mark.usefixtures("all_as_before")
@pytest.mark.parametrize("tta", ["none", "d4"])
@pytest.mark.parametrize("at", [1, 2, 5, 16])
@pytest.mark.parametrize("error", ERRORS)
def test_what_goes_wrong_with_a_reader_or_a_writer_reaches_the_caller(error: str, at: int, tta: str) -> None:
    model, image = tiny(1, dropout=0.5).train(), picture(40, 40)
    model.down[1].eval()
    before = [module.training for module in model.modules()]
    raised = ERRORS[error]
    # 4 x 4 tiles
    reader, writer = Fails(image, at, raised), Fails(np.zeros((40, 40), np.uint8), at, raised)
    # a generator may not raise it
    kind = (RuntimeError, StopIteration) if error == "the end" else type(raised)
    with pytest.raises(kind) as caught:
        predict(model, reader, tile_in=28 if tta == "none" else 30, tta=tta)
    assert raised in (caught.value, caught.value.__cause__)
    with pytest.raises(type(raised)) as caught:
        predict(model, image, out=writer, tile_in=28 if tta == "none" else 30, tta=tta)
    assert caught.value is raised
    assert [module.training for module in model.modules()] == before


@pytest.mark.usefixtures("all_as_before")
@pytest.mark.parametrize("tta", ["none", "rot7"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), Away("gone"), RuntimeError("a shape"), SystemExit(2)], ids=repr)
def test_what_goes_wrong_in_the_net_reaches_the_caller(error: BaseException, tta: str) -> None:
    model, image = tiny(1).train(), picture(40, 40)

    def fails(call: int, _: Tensor) -> None:
        if call == 5:
            raise error

    out = np.zeros((40, 40), np.uint8)
    with Hooked(model, fails), pytest.raises(type(error)) as caught:
        predict(model, image, tile_in=28 if tta == "none" else 36, tta=tta, out=out)
    assert caught.value is error
    assert all(module.training for module in model.modules())


@pytest.mark.usefixtures("all_as_before")
def test_a_reader_that_waits_and_a_writer_that_is_slow_end_too() -> None:
    class Slow(Fails):
        def _call(self) -> None:
            time.sleep(0.01)
            super()._call()

    image = picture(40, 40)
    want = predict(tiny(1), image, tile_in=28)
    out = Slow(np.zeros((40, 40), np.uint8), 0, Away())
    assert predict(tiny(1), image, tile_in=28, out=out) is out
    assert np.array_equal(out.values, want)
    assert np.array_equal(predict(tiny(1), Slow(image, 0, Away()), tile_in=28), want)
    with pytest.raises(Away):
        predict(tiny(1), image, tile_in=28, out=Slow(np.zeros((40, 40), np.uint8), 3, Away()))


def test_all_that_was_finished_before_an_error_was_written() -> None:
    model, image, out = tiny(1), picture(40, 40), np.full((40, 40), 9, np.uint8)

    def fails(call: int, _: Tensor) -> None:
        if call == 6:
            raise Away

    plan = plan_tiles(image.shape, tile_in=28, model=model)
    with Hooked(model, fails), pytest.raises(Away):
        predict(model, image, tile_in=28, out=out)
    want = predict(model, image, tile_in=28)
    for number, tile in enumerate(plan.tiles()):
        place = np.s_[tile.row : tile.row + tile.rows, tile.column : tile.column + tile.columns]
        assert np.array_equal(out[place], want[place] if number < 5 else np.full((tile.rows, tile.columns), 9))


# ---- where memory runs out


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is not given back to the system each time, which takes long in a process of many tests."""
    monkeypatch.setattr(inference, "give_back", lambda: None)


REFUSALS = {
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore"),
    "a CPU": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes."),
    "Python": MemoryError(),
    "C++": RuntimeError("std::bad_alloc"),
}


@pytest.mark.slow
@pytest.mark.usefixtures("all_as_before", "hasty")
@pytest.mark.parametrize(
    ("tta", "tile", "batch", "kind"),
    [
        *(("none", tile, batch, kind) for tile, batch in ((36, 1), (28, 3), (None, 1)) for kind in REFUSALS),
        ("d4", 40, 1, "torch"),
        ("d4", 40, 3, "a CPU"),
        ("rot7", 52, 1, "torch"),
    ],
)
def test_an_allocator_that_refuses_once_makes_tiles_smaller_and_changes_nothing(
    tta: str, tile: int | None, batch: int, kind: str
) -> None:
    model, image = tiny(1), picture(*{"none": (35, 30), "d4": (25, 35), "rot7": (25, 20)}[tta])
    want = averaged(tta, model, image[None])
    with Hooked(model, lambda *_: None) as hook:
        predict(model, image, tile_in=tile, batch=batch, tta=tta)
    usual, calls = hook.sides[0], hook.calls
    assert calls > 1 or tile is None
    for at in range(1, calls + 1):

        def refuses(call: int, _: Tensor, at: int = at) -> None:
            if call == at:
                raise REFUSALS[kind]

        with Hooked(model, refuses) as hook:
            got = predict(model, image, tile_in=tile, batch=batch, tta=tta, output="probabilities")
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
        # only then does anything become smaller, tiles or their number
        sides = hook.sides
        assert all(each[1:] == usual[1:] for each in sides[:at])
        assert len(sides) > at
        assert all(
            each[0] < usual[0] or max(each[2:]) < max(usual[2:]) for each in sides[at:] if sides[at - 1] == usual
        )


class Counted:
    """A place for labels that counts how often each was written."""

    def __init__(self, *shape: int) -> None:
        self.shape, self.times = shape, np.zeros(shape, int)

    def __setitem__(self, where: Any, _: Any) -> None:
        self.times[where] += 1


@pytest.mark.usefixtures("all_as_before", "hasty")
@pytest.mark.parametrize(("tta", "batch"), [("none", 1), ("none", 2), ("d4", 1)])
def test_what_was_finished_before_memory_ran_out_is_not_done_again(tta: str, batch: int) -> None:
    model, image = tiny(1), picture(45, 50)
    for at in (1, 2, 5, 9):

        def refuses(call: int, _: Tensor, at: int = at) -> None:
            if call == at:
                raise torch.OutOfMemoryError("out of memory")

        with Hooked(model, refuses):
            out = predict(model, image, tile_in=36, batch=batch, tta=tta, out=Counted(45, 50))
        assert (out.times == 1).all()


@pytest.mark.usefixtures("all_as_before", "hasty")
@pytest.mark.parametrize("tta", ["none", "d4", "rot7"])
def test_an_allocator_that_refuses_large_tiles_gets_smaller_and_smaller_ones(tta: str) -> None:
    model, image = tiny(1, 1, 3), picture(2, 33, 50)
    want = np.stack([averaged(tta, model, each[None]) for each in image])

    def refuses(_: int, x: Tensor) -> None:
        if x.numel() > 36**2:
            raise torch.OutOfMemoryError("out of memory")

    with Hooked(model, refuses) as hook:
        got = predict(model, image, axes="ZYX", batch=4, tta=tta, output="probabilities")
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
    assert hook.sides[-1][2] <= 36 < hook.sides[0][2]


@pytest.mark.usefixtures("all_as_before", "hasty")
@pytest.mark.parametrize(("tta", "shape"), [("none", (40, 40)), ("none", (1, 1)), ("d4", (40, 40)), ("rot7", (9, 40))])
def test_where_nothing_smaller_is_possible_memory_has_run_out(tta: str, shape: tuple[int, int]) -> None:
    model = tiny(2)

    def refuses(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore of it")

    with (
        Hooked(model, refuses) as hook,
        pytest.raises(MemoryError, match=r"^CUDA out of memory\.; tiles of (\d+) x \d+ are the smallest there are$"),
    ):
        predict(model, picture(*shape), tta=tta, tile_in=100, batch=2)
    assert min(hook.sides[-1][2:]) < 100
    # and that size does work
    predict(model, picture(*shape), tta=tta, tile_in=hook.sides[-1][2:])


@pytest.mark.usefixtures("all_as_before", "hasty")
@pytest.mark.parametrize("error", [MemoryError("no room"), torch.OutOfMemoryError("out of memory")], ids=repr)
@pytest.mark.parametrize("at", [1, 2, 7, 16])
def test_a_reader_or_writer_without_memory_is_given_another_chance(at: int, error: BaseException) -> None:
    # whole numbers are not searched for NaN
    model, image = tiny(1), np.random.default_rng(0).integers(-9, 9, (45, 50))
    want = predict(model, image, tile_in=36, output="probabilities")
    got = predict(model, Fails(image, at, error), tile_in=36, output="probabilities")
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
    out = Fails(np.zeros((2, 45, 50)), at, error)
    predict(model, image, tile_in=36, output="probabilities", out=out)
    np.testing.assert_allclose(out.values, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("words", ["illegal memory access", "Unsupported memory format option", "a shape"])
def test_other_errors_are_no_lack_of_memory(words: str) -> None:
    model, calls = tiny(1), []

    def fails(call: int, _: Tensor) -> None:
        calls.append(call)
        raise RuntimeError(words)

    with Hooked(model, fails), pytest.raises(RuntimeError, match=words):
        predict(model, picture(40, 40), tile_in=36)
    assert calls == [1]


class TakesTooMuch:
    """A watch that sees too much after these groups."""

    def __init__(self, *after: int) -> None:
        self.after, self.looks, self.restarts = after, 0, 0

    @property
    def above(self) -> int:
        return 10**9 if self.looks in self.after else 0

    def restart(self) -> None:
        self.restarts += 1


def _watched(model: FastUNet, image: NDArray[Any], watch: Any) -> tuple[NDArray[Any], list[str], list[Any]]:
    greys = Greys(ArraySource(image[None, None]), None, wide=True)
    plan = plan_tiles(image.shape, tile_in=36, model=model)
    got, said, changes = np.full((2, *image.shape), np.nan), list[str](), list[Any]()

    def take(group: Any, results: Any) -> None:
        for tile, result in zip(group, results, strict=True):
            got[:, tile.row : tile.row + tile.rows, tile.column : tile.column + tile.columns] = result

    class Counts(Inference):
        __slots__ = ()

        def _stay_inside(self) -> None:
            watch.looks += 1
            super()._stay_inside()

    with evaluating(model):
        work = Counts(
            model, greys, Answer.of(model, "logits", None), watch=watch, budget=10**8, say=said.append,
            changed=lambda *now: changes.append(now),
        )  # fmt: skip
        work.run(grouped(plan.tiles(), 2), plan.tile_in, take)
    return got, said, changes


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("after", [(1,), (2,), (1, 2), (1, 2, 3)])
def test_tiles_become_smaller_where_a_budget_was_exceeded(after: tuple[int, ...]) -> None:
    model, image = tiny(1), picture(45, 50)
    watch = TakesTooMuch(*after)
    got, said, changes = _watched(model, image, watch)
    assert_exact(got, one_piece(model, image[None]))
    assert watch.restarts == len(after) == len(changes)
    # once is enough
    assert said == ["1.00 GB were taken, of 100 MB; goes on with tiles of 36 x 36"]
    assert changes[:2] == [((36, 36), 1), ((24, 24), 1)][: len(after)]


def test_a_budget_that_the_last_tile_exceeded_is_no_error() -> None:
    model, image = tiny(1), picture(20, 20)
    got, _, _ = _watched(model, image, TakesTooMuch(1))
    assert_exact(got, one_piece(model, image[None]))


# ---- memory that is really taken

TAKES = """
    import sys
    import numpy as np, torch
    from unet_fast import FastUNet, Normalisation, predict

    torch.set_num_threads(1)
    torch.manual_seed(0)
    features, side, budget, tta, place = eval(sys.argv[1])
    model = FastUNet(features=features).eval()
    model.normalisation = Normalisation()
    image = np.memmap(place + "/image.dat", np.uint8, "r", shape=(side, side))
    out = np.memmap(place + "/out.dat", np.uint8, "w+", shape=(side, side))
    # what torch builds at its first call
    predict(model, np.zeros((30, 30), np.uint8))
    print("ready", flush=True)
    sys.stdin.readline()
    predict(model, image, memory=budget, out=out, tta=tta)
    print("done", flush=True)
    sys.stdin.readline()
"""


def anonymous(process: int) -> int:
    """Bytes that a process has allocated, as Linux tells others."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("features", "side", "budget", "tta"),
    [
        ((4, 8, 16), 3000, "200MB", "none"),
        # its first maps in one piece: 256 MB each
        ((16, 32, 64, 64), 2000, "200MB", "none"),
        ((16, 32, 64), 700, "100MB", "d4"),
        ((16, 32, 64), 700, "100MB", "rot7"),
    ],
    ids=str,
)
def test_a_budget_holds_as_seen_from_outside(
    features: tuple[int, ...], side: int, budget: str, tta: str, tmp_path: Path
) -> None:
    image = np.memmap(tmp_path / "image.dat", np.uint8, "w+", shape=(side, side))
    image[:] = np.random.default_rng(0).integers(0, 255, (side, side), np.uint8)
    image.flush()
    arguments = repr((features, side, budget, tta, str(tmp_path)))
    process = subprocess.Popen(
        [sys.executable, "-c", dedent(TAKES), arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        before, most, done = anonymous(process.pid), 0, list[str]()
        process.stdin.write("\n")
        process.stdin.flush()
        waits = threading.Thread(target=lambda: done.append(process.stdout.readline()))
        waits.start()
        while waits.is_alive():
            most = max(most, anonymous(process.pid))
            time.sleep(0.002)
        process.stdin.close()
    assert (done, process.returncode) == (["done\n"], 0)
    # more than the tiles' maps were seen, and less than the budget
    assert 5e6 < most - before < bytes_of(budget)
    out = np.memmap(tmp_path / "out.dat", np.uint8, "r", shape=(side, side))
    assert len(np.unique(out)) == 2
