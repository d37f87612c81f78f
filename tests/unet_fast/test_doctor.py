"""What doctor says of a net's layers is what the net does: the same ops, the same cases, in the same order."""

from pathlib import Path
from typing import Any

import pytest
import torch

import unet_kernels
from unet_fast import FastUNet, doctor, save
from unet_fast.errors import BadInput
from unet_kernels import _choosing, _triton


def _layers(**settings: Any) -> list[dict[str, Any]]:
    return doctor.examine_layers(**settings)["layers"]


@pytest.mark.interpreter
@pytest.mark.skipif(not _triton.INTERPRETED, reason="a CPU runs ours under the interpreter only")
@pytest.mark.parametrize("up_mode", ["deconv", "resize"])
def test_the_net_asks_what_doctor_says_it_asks(up_mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = FastUNet(features=(16, 16, 32), up_mode=up_mode).eval()
    save(net, tmp_path / "net.safetensors")
    with torch.no_grad(), unet_kernels.using("ours"), unet_kernels.recorded() as record:
        net(torch.rand(1, 1, 44, 44))
    told = _layers(model=tmp_path / "net.safetensors", tile=44, precision="float32", chip="sm_86")

    def plain(case: str) -> str:
        # float32 is tf32 on the chip; and a skip that was made in one pass with its maxima is no window any more
        return case.replace("float32 as tf32", "float32").replace("channels_last, a window", "channels_last")

    said = {(row["op"], plain(row["case"])) for row in told}
    assert {(op, plain(case)) for op, case, _ in record} <= said
    # what is told of beside it: those layers as two passes
    assert {op for op, _ in said} == {op for op, _, _ in record} | {"max_pool2x2"}


def test_every_layer_is_told_of_in_order() -> None:
    net = FastUNet(features=(8, 16, 32))
    rows = _layers(features=(8, 16, 32), tile=60, chip="sm_90")
    told = [row["layer"] for row in rows if "pool" not in row["layer"]]
    convolutions = [
        name for name, m in net.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.ConvTranspose2d)
    ]
    assert sorted(told) == sorted(convolutions)
    assert told[0] == "down.0.conv1"
    assert told[-1] == "head"
    assert [row["layer"] for row in rows if row["op"] == "max_pool2x2"] == ["down.0.pool", "down.1.pool"]


@pytest.mark.parametrize("chip", doctor.CHIPS)
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_a_chip_that_is_not_here_has_something_of_ours_for_every_layer(chip: str, precision: str) -> None:
    for row in _layers(features=(64, 128), tile=60, chip=chip, precision=precision):
        assert row["ours"], row["layer"]
        assert row["ways"][0] in ("ATen", "apart")
        # the copy engine is sm_90's, and takes maps that lie as matrices; of float32 with all its bits it gains nothing
        matrices = chip == "sm_90" and row["op"] == "conv3x3_relu" and ", channels_last" in row["case"]
        matrices = matrices and "unaligned" not in row["case"]
        matrices = matrices and precision != "float32"
        assert ("descriptors" in " ".join(row["ours"])) == matrices


def test_without_skips_no_map_is_joined() -> None:
    net = FastUNet(features=(8, 16), skips=False)
    rows = [op for _, op, _ in doctor._questions(net, 44, doctor._Arguments(torch.float32, torch.device("cpu")), set())]
    assert "conv3x3_relu_cat" not in rows


def test_what_was_measured_is_shown_with_its_times(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = "pointers 128x64x64, 4 warps, 3 stages"

    def explain(op: str, *_: Any) -> unet_kernels.Explanation:
        us = {"ATen": 9.0, ours: 5.0}
        return unet_kernels.Explanation(
            op, "a case", "ATen", ours, "9.0 us; next ...", ("ATen", ours), (ours,), us, us, {}
        )

    monkeypatch.setattr(unet_kernels, "explain", explain)
    shown = doctor.render_layers(doctor.examine_layers(features=(8, 16), tile=44, device="cpu"))
    line = next(line for line in shown.splitlines() if "down.0.conv2 " in line)
    assert line.split()[1] == "ATen"
    assert ours in line
    assert "9.0 us" in line
    assert "measured at the first call" not in shown


def test_on_a_cpu_every_layer_says_why_it_is_aten() -> None:
    found = doctor.examine_layers(features=(8, 16), tile=44, device="cpu")
    assert all(row["called"] == "ATen" and "cpu" in row["why"].lower() for row in found["layers"])
    assert "features 8,16, tile 44, bfloat16" in doctor.render_layers(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"tile": 573}, "tile 573 cannot be pooled 4 times; nearest are 572 and 588"),
        ({"chip": "sm_77"}, "chip must be one of sm_80, sm_86, sm_89, sm_90, got 'sm_77'"),
        ({"measure": True, "device": "cpu"}, "measure needs the GPU it is about, got cpu"),
        ({"measure": True, "chip": "sm_90"}, "measure needs the GPU it is about, got sm_90"),
        ({"model": Path("nowhere")}, "nowhere"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        doctor.examine_layers(**settings)


def test_a_padded_net_runs_on_aten(tmp_path: Path) -> None:
    save(FastUNet(features=(4, 8), padding="same"), tmp_path / "same.safetensors")
    with pytest.raises(BadInput, match="has padding 'same'; it runs on ATen, layer by layer"):
        doctor.examine_layers(model=tmp_path / "same.safetensors", tile=44)


def test_measuring_runs_the_net_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(doctor, "_measure", lambda net, tile, dtype, device: ran.append((tile, dtype, device.type)))
    monkeypatch.setattr(doctor, "pick_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(
        unet_kernels,
        "explain",
        lambda op, *_: unet_kernels.Explanation(op, "", "ATen", "ATen", "", ("ATen",), (), {}, {}, {}),
    )
    doctor.examine_layers(features=(8, 16), tile=44, precision="float16", measure=True)
    assert ran == [(44, torch.float16, "cuda")]
    assert _choosing.which() == "automatic"
