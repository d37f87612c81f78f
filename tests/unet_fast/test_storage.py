"""Proves that a saved model comes back bit for bit or not at all: every byte counts, a failed write changes none."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import unet_fast
from unet_fast import FastUNet, Normalisation, load, save, storage
from unet_fast.errors import BadInput

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "channels and classes": {"in_channels": 3, "out_channels": 5},
    "one level": {"features": (4,)},
    "three levels": {"features": (2, 3, 4)},
    "same": {"padding": "same"},
    "resize": {"up_mode": "resize"},
    "activation": {"up_activation": True},
    "last up channels": {"last_up_channels": 7},
    "no skips": {"skips": False},
    "dropout": {"dropout": 0.25},
    "all of it": {
        "in_channels": 2, "out_channels": 4, "features": (2, 3, 4), "padding": "same", "up_mode": "resize",
        "up_activation": True, "last_up_channels": 5, "skips": False, "dropout": 0.125,
    },
}  # fmt: skip


def net(**settings: Any) -> FastUNet:
    model = FastUNet(**{"features": (2, 3), **settings})
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def bits(model: FastUNet) -> dict[str, bytes]:
    return {k: v.reshape(-1).view(torch.uint8).numpy().tobytes() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("case", SETTINGS)
def test_every_setting_comes_back(case: str, tmp_path: Path) -> None:
    model = net(**SETTINGS[case])
    save(model, tmp_path / "net.safetensors")
    again = load(tmp_path / "net.safetensors")
    assert again.settings == model.settings
    assert bits(again) == bits(model)
    assert not again.training
    x = torch.randn(1, model.in_channels, 44, 44)
    assert torch.equal(again(x), model.eval()(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_dtype_comes_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    model = net().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            # what float32 has no room for
            parameter.add_(torch.rand(parameter.shape, dtype=torch.float64) * 1e-9)
        model.head.bias[0] = torch.nan
        model.head.bias[1] = -torch.inf
    save(model, tmp_path)
    again = load(tmp_path)
    assert {p.dtype for p in again.parameters()} == {dtype}
    assert bits(again) == bits(model)


@pytest.mark.parametrize(
    "normalisation",
    [
        None,
        Normalisation(),
        Normalisation("percentile", low=0.1 + 0.2, high=99.9),
        Normalisation("range", low=-17.25, high=65535),
        Normalisation("none"),
    ],
    ids=str,
)
def test_the_normalisation_comes_back(normalisation: Normalisation | None, tmp_path: Path) -> None:
    model = net()
    model.normalisation = normalisation
    save(model, tmp_path)
    assert load(tmp_path).normalisation == normalisation
    image = np.random.default_rng(0).integers(0, 1000, (30, 20))
    assert np.array_equal(
        unet_fast.predict(load(tmp_path), image, output="logits"), unet_fast.predict(model, image, output="logits")
    )


def test_weights_come_back_in_channels_last_memory_and_lie_contiguous_in_the_file(tmp_path: Path) -> None:
    model = net(features=(4, 6))
    save(model, tmp_path)
    for (name, a), b in zip(load(tmp_path).named_parameters(), model.parameters(), strict=True):
        assert a.stride() == b.stride(), name
    with safe_open(tmp_path / storage.MODEL, framework="pt") as file:
        for name, p in model.state_dict().items():
            assert torch.equal(file.get_tensor(name), p.contiguous())


def test_saving_what_was_loaded_gives_the_same_weights_in_the_same_order(tmp_path: Path) -> None:
    save(net(), tmp_path / "a.safetensors")
    save(load(tmp_path / "a.safetensors"), tmp_path / "b.safetensors")
    # behind the header, whose entries have no order
    a, b = ((tmp_path / f"{name}.safetensors").read_bytes() for name in "ab")
    assert len(a) == len(b)
    assert a[8 + int.from_bytes(a[:8], "little") :] == b[8 + int.from_bytes(b[:8], "little") :]
    assert storage.read_tensors(tmp_path / "a.safetensors")[1] == storage.read_tensors(tmp_path / "b.safetensors")[1]


def test_a_folder_holds_the_model_under_its_usual_name(tmp_path: Path) -> None:
    save(net(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [storage.MODEL]
    assert bits(load(tmp_path)) == bits(load(str(tmp_path / storage.MODEL)))


def test_saving_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = net(dropout=0.5)
    before, strides = bits(model), [p.stride() for p in model.parameters()]
    save(model, tmp_path)
    assert bits(model) == before
    assert [p.stride() for p in model.parameters()] == strides
    assert model.training


def test_the_header_says_in_json_what_the_net_is(tmp_path: Path) -> None:
    model = net()
    save(model, tmp_path)
    with safe_open(tmp_path / storage.MODEL, framework="pt") as file:
        about = json.loads(file.metadata()["unet_fast"])
    assert about == {"net": model.settings, "normalisation": None, "version": unet_fast.__version__}


# ---- damage


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = net()
    model.normalisation = Normalisation()
    path = tmp_path / "net.safetensors"
    save(model, path)
    return path


def test_one_flipped_bit_anywhere_is_refused(saved: Path) -> None:
    whole = saved.read_bytes()
    rng = np.random.default_rng(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [0, 1, 3, 7, 8, header - 1, header, len(whole) - 1]
    places += rng.integers(8, header, 60).tolist() + rng.integers(header, len(whole), 60).tolist()
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        saved.write_bytes(damaged)
        with pytest.raises(BadInput, match=str(saved)):
            load(saved)
    saved.write_bytes(whole)
    load(saved)


def test_a_truncated_or_longer_file_is_refused(saved: Path) -> None:
    whole = saved.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in (0, 1, 7, 8, header // 2, header, header + 1, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:length])
        with pytest.raises(BadInput, match="is damaged or no safetensors file"):
            load(saved)
    saved.write_bytes(whole + b"\0")
    with pytest.raises(BadInput, match="is damaged or no safetensors file"):
        load(saved)


def test_other_files_are_refused_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    with pytest.raises(BadInput, match=r"net\.safetensors does not exist; expected a model that unet-fast train"):
        load(path)
    with pytest.raises(BadInput, match=r"model\.safetensors does not exist"):
        load(tmp_path)
    path.write_text("a picture, perhaps")
    with pytest.raises(BadInput, match="is damaged or no safetensors file"):
        load(path)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(BadInput, match="was not written by unet_fast: its header has no settings"):
        load(path)
    storage.write_tensors(path, {"net.weight": torch.ones(2)}, {"step": 7})
    with pytest.raises(BadInput, match="does not hold a FastUNet this version can build"):
        load(path)
    storage.write_tensors(path, {}, {"net": net().settings, "normalisation": None})
    with pytest.raises(BadInput, match="does not hold a FastUNet this version can build"):
        load(path)


@pytest.mark.parametrize(
    "change",
    [{"features": [2, 4]}, {"out_channels": 3}, {"colour": 1}, {"features": []}, {"skips": False}],
    ids=str,
)
def test_settings_that_do_not_fit_the_weights_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    model = net()
    path = tmp_path / "net.safetensors"
    storage.write_tensors(path, model.state_dict(), {"net": {**model.settings, **change}, "normalisation": None})
    with pytest.raises(BadInput, match="does not hold a FastUNet this version can build"):
        load(path)


# ---- writing


def test_a_failed_write_leaves_the_old_file_and_nothing_else(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = saved.read_bytes()

    def full(tensors: Any, path: Path, **rest: Any) -> None:
        Path(path).write_bytes(b"half of i")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(BadInput, match=r"net\.safetensors cannot be written: No space left on device"):
        save(net(), saved)
    assert saved.read_bytes() == whole
    assert os.listdir(saved.parent) == [saved.name]

    def interrupted(tensors: Any, path: Path, **rest: Any) -> None:
        Path(path).write_bytes(b"half of i")
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(net(), saved)
    assert saved.read_bytes() == whole
    assert os.listdir(saved.parent) == [saved.name]


def test_a_place_that_cannot_be_written_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"nowhere/net\.safetensors cannot be written: No such file or directory"):
        save(net(), tmp_path / "nowhere" / "net.safetensors")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be written: Not a directory"):
        save(net(), tmp_path / "file" / "net.safetensors")


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002], ids=oct)
def test_others_may_read_it_where_the_umask_lets_them(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        save(net(), tmp_path)
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / storage.MODEL).stat().st_mode) == 0o666 & ~mask


def test_a_device_that_is_not_there_is_named() -> None:
    assert storage.pick_device("cpu") == torch.device("cpu")
    assert storage.pick_device("auto").type in ("cpu", "cuda")
    with pytest.raises(BadInput, match="device abacus cannot be used here"):
        storage.pick_device("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(BadInput, match="device cuda cannot be used here"):
            storage.pick_device("cuda")
