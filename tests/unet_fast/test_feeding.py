"""Proves that tiles are the same bits wherever the images lie and whoever draws them."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unet_fast import TrainConfig, synthetic, train
from unet_fast.data import Example, read_labelled
from unet_fast.feeding import Feed, Resident, resident, resident_bytes
from unet_fast.files import write_tiff
from unet_fast.normalisation import Normalisation
from unet_fast.sampling import Sampler

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[np.uint8, np.uint16, np.float32], ids=lambda dtype: dtype.__name__)
def drawn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of one kind of number, of two channels, and labels."""
    place = tmp_path_factory.mktemp("drawn")
    for kind in ("images", "labels"):
        (place / kind).mkdir()
    for seed in range(3):
        image, instances = synthetic.cells(64, seed=seed, radius_px=(7.0, 9.0))
        grey = (image - image.min()) / (image.max() - image.min())
        top = {np.uint8: 255, np.uint16: 40_000}.get(request.param, 3.7)
        both = np.stack([grey * top, (1 - grey) * top]).astype(request.param)
        write_tiff(place / "images" / f"{seed}.tif", both, "CYX")
        write_tiff(place / "labels" / f"{seed}.tif", instances.astype(np.uint16), "YX")
    return place


def config(place: Path, out: Path, **more: Any) -> TrainConfig:
    usual: dict[str, Any] = {
        "label_kind": "instance", "features": (2, 3), "steps": 4, "validate_every": 2, "log_every": 2, "batch": 2,
        "validation": 0.34, "device": "cpu", "tile": 36, "axes": "CYX", "noise": 0.1, "foreground": 0.5,
    }  # fmt: skip
    return TrainConfig(images=place / "images", labels=place / "labels", out=out, **{**usual, **more})


def examples_of(place: Path, **normalisation: Any) -> list[Example]:
    made = Normalisation(**normalisation)
    return read_labelled(place / "images", place / "labels", kind="instance", axes="CYX", normalisation=made).examples


def same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(
        x.dtype == y.dtype and torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


@pytest.mark.parametrize(
    "normalisation", [{}, {"kind": "range", "low": 3.0, "high": 777.5}, {"kind": "none"}], ids=lambda n: n.get("kind")
)
def test_what_lies_on_a_device_is_the_example_to_the_last_bit(normalisation: dict[str, Any], drawn: Path) -> None:
    for example in examples_of(drawn, **normalisation):
        there = Resident(example, CPU)
        assert there.image.dtype == torch.float32
        assert torch.equal(there.image, example.image)
        assert torch.equal(there.instances, example.instances)
        assert there.instances.dtype == torch.int32
        assert torch.equal(there.class_of, example.class_of)
        assert there.one_kind == example.one_kind
        # of the file's own size, and ids of two bytes
        size = 4 if example.grey is None else example.grey.values.element_size()
        pixels = example.instances.numel()
        assert there.nbytes == pixels * 2 * size + pixels * 2 + example.class_of.numel() * 8
        assert (example.grey is None) == (size == 4)


def test_an_image_normalised_in_strips_is_the_same(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unet_fast import feeding

    [example, *_] = examples_of(drawn)
    for pixels in (1, 700, 10**9):
        monkeypatch.setattr(feeding, "_CHUNK", pixels)
        assert torch.equal(Resident(example, CPU).image, example.image)


@given(
    st.integers(0, 2**16 - 1),
    st.integers(0, 2**16 - 1),
    st.sampled_from([np.uint8, np.uint16]),
    st.sampled_from(["percentile", "range", "none"]),
)
def test_any_grey_values_are_normalised_alike(low: int, high: int, dtype: Any, kind: str) -> None:
    from unet_fast.data import _grey

    rng = np.random.default_rng(low * 7 + high)
    top = np.iinfo(dtype).max
    plane = rng.integers(min(low, high) % (top + 1), top + 1, (2, 5, 6)).astype(dtype)
    plane[1] = plane[1, 0, 0]  # of one grey value
    ends = {"low": float(min(low, high)), "high": float(max(low, high) + 1)} if kind == "range" else {}
    normalisation = Normalisation(kind, **ends)
    grey = _grey(plane, normalisation)
    assert grey is not None
    assert torch.equal(grey.normalised(), torch.from_numpy(normalisation(plane)))


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("workers", [0, 1, 4])
def test_the_stream_is_the_same_whoever_draws_it(workers: int, where: str, drawn: Path) -> None:
    examples, settings = examples_of(drawn), config(drawn, drawn / "no")
    want = [Sampler(examples, settings, 36).drawn(step) for step in range(7)]
    sampler = Sampler(resident(examples, CPU, where), settings, 36)
    feed = Feed(sampler, range(2), CPU, workers)
    assert all(same(feed.take(step, 7), want[step]) for step in range(7))
    feed.close()
    # not every step from the first one on, and of a part of the tiles
    feed = Feed(sampler, range(1, 2), CPU, workers)
    assert all(same(feed.take(step, 7), want[step][1:]) for step in (3, 4, 6))
    feed.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("tiles")]


def test_nothing_is_drawn_beyond_the_last_step(drawn: Path) -> None:
    sampler, taken = Sampler(examples_of(drawn), config(drawn, drawn / "no"), 36), []
    whole = sampler.drawn

    def noted(step: int, share: range | None = None) -> list[tuple[Tensor, Tensor, Tensor]]:
        taken.append(step)
        return whole(step, share)

    sampler.drawn = noted  # type: ignore[method-assign]
    feed = Feed(sampler, range(2), CPU, workers=3)
    for step in range(5):
        feed.take(step, 5)
    feed.close()
    assert sorted(taken) == [0, 1, 2, 3, 4]


def test_what_fails_in_a_thread_fails_where_it_is_asked_for(drawn: Path) -> None:
    sampler = Sampler(examples_of(drawn), config(drawn, drawn / "no"), 36)

    def broken(step: int, share: range | None = None) -> Any:
        raise MemoryError("no room for a tile")

    sampler.drawn = broken  # type: ignore[method-assign]
    feed = Feed(sampler, range(2), CPU, workers=2)
    with pytest.raises(MemoryError, match="no room for a tile"):
        feed.take(0, 5)
    feed.close()


def test_where_images_lie_is_as_asked_and_by_itself_on_the_host_of_a_cpu(drawn: Path) -> None:
    examples = examples_of(drawn)
    assert all(isinstance(e, Resident) for e in resident(examples, CPU, "device"))
    assert resident(examples, CPU, "host") is examples
    assert resident(examples, CPU, "auto") is examples
    held = sum(Resident(e, CPU).nbytes for e in examples)
    # what it takes to look at one is counted too
    assert resident_bytes(examples) > held


@pytest.mark.slow
def test_a_run_is_the_same_bits_whoever_draws_its_tiles(drawn: Path, tmp_path: Path, blank_page: None) -> None:
    weights = []
    for number, more in enumerate(({}, {"workers": 2}, {"images_on": "device"})):
        result = train(config(drawn, tmp_path / str(number), **more), progress=False)
        weights.append(result.model.state_dict())
    for other in weights[1:]:
        assert all(torch.equal(other[name], weights[0][name]) for name in weights[0])


def test_who_draws_may_change_on_resume(drawn: Path, tmp_path: Path, blank_page: None) -> None:
    first = train(config(drawn, tmp_path / "run"), progress=False)
    again = train(config(drawn, tmp_path / "run", workers=1, images_on="device"), resume=True, progress=False)
    assert again.log == first.log
