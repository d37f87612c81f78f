"""The gradients in the report: each as the net asks for it, its model within reason, and what fails a section."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import unet_kernels
from benchmarks import derivatives as module
from benchmarks import harness
from benchmarks.cases import results
from benchmarks.derivatives import derivatives, derived, given
from benchmarks.levels import PAPER_FEATURES
from benchmarks.predicted import main, predicted_derivative_us, step_us
from benchmarks.sections import Context, Failed, _rows, gradients, whole_net

CPU = torch.device("cpu")
FEATURES = (4, 8, 8, 16, 16)
H200 = (790.0, 4300.0, 132)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    far = harness.time.monotonic() + 600
    return Context(CPU, True, tmp_path, far, (torch.float32,), harness.Roof(CPU, small=True))


# which there are


def test_every_layer_has_its_gradients():
    found = list(derivatives(572, PAPER_FEATURES))
    assert Counter(d.of for d in found) == {"dx": 22, "dweight": 23, "pool": 4}
    assert found[0].name == "dweight of level0.contracting.conv1", "an image has no gradient"
    assert Counter(d.op for d in found if d.of != "pool") == {
        "conv3x3_dx": 17,
        "conv3x3_dweight": 18,
        "up_conv_dx": 4,
        "up_conv_dweight": 4,
        "conv1x1_dx": 1,
        "conv1x1_dweight": 1,
    }
    assert sum(d.flops for d in found if d.of == "dweight") == 300_856_848_896


def test_what_a_relu_made_hands_its_gradient_back_masked():
    masked = {d.case.layer.name: d.masked for d in derivatives(572, PAPER_FEATURES) if d.of == "dx"}
    assert not masked["level1.contracting.conv1"], "made of maxima"
    assert masked["level1.contracting.conv2"]
    assert masked["level1.expanding.up"]
    assert not masked["level1.expanding.conv1"], "made of an up-convolution and a window whose gradient is masked later"
    assert masked["level1.expanding.conv2"]
    assert masked["level0.expanding.head"]


@pytest.mark.parametrize("op", sorted({d.op for d in derivatives(188, FEATURES)}))
def test_a_gradient_in_plain_torch_and_by_our_op_is_the_same(op):
    for derivative in (d for d in derivatives(188, FEATURES) if d.op == op):
        by_torch, by_us = derived(derivative, given(derivative, torch.float64, CPU))
        for ours, theirs in zip(results(by_us()), results(by_torch()), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_fewest_bytes_of_a_gradient():
    found = {d.name: d for d in derivatives(572, PAPER_FEATURES)}
    x, dz, parameters = 64 * 570**2, 64 * 568**2, 9 * 64 * 64 + 64
    assert found["dweight of level0.contracting.conv2"].min_bytes(2) == 2 * (x + dz + parameters)
    assert found["dx of level0.contracting.conv2"].min_bytes(2) == 2 * (2 * x + dz + parameters), "x is the mask"
    assert found["pool of level0.contracting.conv2"].min_bytes(2) == 2 * 64 * (2 * 568**2 + 392**2 + 284**2)


# what they should take


@pytest.mark.parametrize(("itemsize", "tflops"), [(2, 790.0), (4, 400.0)], ids=["bfloat16", "tf32"])
@pytest.mark.parametrize("derivative", list(derivatives(572, PAPER_FEATURES)), ids=lambda d: d.name)
def test_no_gradient_is_predicted_to_beat_its_floor(derivative, itemsize, tflops):
    us = predicted_derivative_us(derivative, tflops, *H200[1:], itemsize)
    floor_us = max(derivative.flops / tflops / 1e6, derivative.min_bytes(itemsize) / 4300e3)
    assert math.isfinite(us)
    assert us > floor_us
    if derivative.of == "dweight" and floor_us > 10:
        assert us < 5 * floor_us


def test_a_step_is_the_sum_of_its_parts(capsys):
    parts = step_us(*H200)
    assert parts["gradients"] == sum(predicted_derivative_us(d, *H200) for d in derivatives(572, PAPER_FEATURES))
    assert 618 < parts["forward"] < 800, "more than without gradients: whole maps are kept"
    assert parts["optimizer"] == pytest.approx(22 * 31_030_658 / 4300e3)
    main()
    forward, gradient, step = capsys.readouterr().out.split("\n\n")
    assert forward.splitlines()[-1].startswith("| all | ")
    assert len(gradient.splitlines()) == 2 + 49 + 4
    assert step.splitlines()[-1] == f"| all | {sum(parts.values()):.0f} | |"


# the sections


def test_the_section_times_every_gradient(context, tmp_path):
    found = gradients.run(context)
    assert found["cases"] == "49 of 49"
    assert [row["gradient"] for row in found["gradients"]] == [d.name for d in derivatives(188, FEATURES)]
    assert all(row["ours_us"] > 0 and row["way"] == "ATen" for row in found["gradients"])
    by_kind = {t["of"]: t for t in found["totals"]}
    assert [by_kind[of]["gradients"] for of in (*module.OF, "all")] == [22, 23, 4, 49]
    assert by_kind["all"]["torch_us"] == pytest.approx(sum(row["torch_us"] for row in found["gradients"]))
    assert by_kind["all"]["predicted_us"] is None, "the model is a GPU's"
    assert not list(tmp_path.iterdir()), "a CPU has no table of choices"


def test_a_gradient_that_is_slower_than_torchs_fails_the_section(context, monkeypatch):
    row = {"gradient": "dx of level0", "dtype": "float32", "spread": "0.80..0.90", "slower": True}
    row |= dict.fromkeys(("floor_us", "predicted_us", "torch_us", "ours_us", "best kernel_us"), 1.0)
    monkeypatch.setattr(gradients, "_row", lambda *_: row)
    with pytest.raises(Failed, match=r"49 gradients are slower than torch's: dx of level0, float32: 0.80..0.90"):
        gradients.run(replace(context, smoke=False))


def test_the_ways_of_both_maps_of_a_concatenation_are_one_row_each(monkeypatch):
    times = {"ATen": 9.0, "pointers 1": 4.0, "pointers 2": 3.0}
    table = {"conv3x3_dx: a": {"device_us": times, "called_us": times, "refused": {"descriptors": "NaN elsewhere"}}}
    monkeypatch.setattr(unet_kernels, "choices", lambda device: {"rows": table})
    on_cuda: Any = SimpleNamespace(device=torch.device("cuda"))
    twice = [("conv3x3_dx", "a", "pointers 2")] * 2
    ways = _rows.Ways.of(on_cuda, twice, "conv3x3_dx", 12_000_000, {"gradient": "dx"})
    assert [row["way"] for row in ways.rows] == ["ATen", "pointers 1", "pointers 2", "descriptors"]
    assert ways.rows[2] == {"gradient": "dx", "way": "pointers 2", "us": 3.0, "called_us": 3.0, "tflops": 2.0}
    assert (ways.best, ways.best_us) == ("pointers 2", 6.0)
    apart = _rows.Ways.of(on_cuda, [("conv3x3_relu", "b", "ATen")], "conv3x3_relu_pool", 1, {})
    assert (apart.rows, apart.best, apart.best_us) == ([], None, None)


def test_steps_are_captured_in_16_bits_and_the_dear_variants_come_last():
    on_cuda: Any = SimpleNamespace(device=torch.device("cuda"), smoke=False)
    found = list(whole_net._variants(on_cuda))
    captured = [precision for precision, mode, how in found if (mode, how) == ("training", "graph")]
    assert captured == ["bfloat16", "bfloat16 autocast", "float32"]
    assert ("bfloat16 autocast", "training", "graph against compile") in found
    seconds = [whole_net._compile_seconds(how) for _, _, how in found]
    assert seconds[:11] == [0.0] * 11
    assert all(seconds[11:])
    assert len(whole_net._repeats(on_cuda)) == 4


@pytest.mark.parametrize("precision", ["bfloat16", "bfloat16 autocast"])
def test_a_step_as_it_is_captured(precision, context):
    row = whole_net._Nets(context).row(precision, "training", "graph")
    assert row["plain_ms"] > 0
    assert row["ours_peak_bytes"] is None, "of a graph it says nothing"


def test_a_gradient_in_other_bits_fails_the_section(context, monkeypatch):
    monkeypatch.setattr(whole_net, "_variants", lambda _: [])
    assert [row["steps"] for row in whole_net.run(context)["gradients made again"]] == ["3 of 3"] * 2
    made, calls = whole_net._Nets._gradients, []

    def other_bits(*args: Any) -> tuple[torch.Tensor, ...]:
        calls.append(0)
        # -0 is 0 by value
        return (*made(*args)[:-1], torch.full((2,), -0.0 if len(calls) % 2 else 0.0))

    monkeypatch.setattr(whole_net._Nets, "_gradients", other_bits)
    said = "gradients are not the same bits every time: bfloat16 autocast, automatic: step 2: head.bias"
    with pytest.raises(Failed, match=said):
        whole_net.run(context)
