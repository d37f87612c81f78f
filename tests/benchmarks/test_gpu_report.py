"""The GPU report: finds its sections, keeps what it measured whatever happens, and its arithmetic is the paper's."""

import json
import os
import runpy
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import unet_kernels
from benchmarks import gpu_report, harness
from benchmarks.cases import calls, cases, inputs, results
from benchmarks.levels import PAPER_FEATURES, concats, layers
from benchmarks.machine import machine
from benchmarks.plain_unet import PlainUNet
from benchmarks.predicted import predicted_us
from benchmarks.report import Report
from benchmarks.sections import Context, Failed, Section, Skipped, correctness, discover, environment
from unet_fast import FastUNet

CPU = torch.device("cpu")


def section(name: str, run: Callable[[Context], dict[str, Any]], seconds: float = 0.0) -> Section:
    return Section(name, f"the {name} section", 0, seconds, run)


def says(context: Context) -> dict[str, Any]:
    return {"headline": "measured", "rows": [{"layer": "a|b", "us": 1.5}]}


def raises(error: BaseException) -> Callable[[Context], dict[str, Any]]:
    def run(context: Context) -> dict[str, Any]:
        raise error

    return run


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(CPU, True, tmp_path, time.monotonic() + 60, (torch.float32,), harness.Roof(CPU, small=True))


@pytest.fixture
def written(tmp_path: Path) -> Report:
    return Report(tmp_path, "a_name", {"device": "a device"})


def on_disk(folder: Path) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in json.loads((folder / "report.json").read_text())["sections"]}


# discovery


def test_every_section_of_the_first_gpu_run_is_found_in_order():
    names = [s.name for s in discover()]
    first = ["environment", "correctness", "roof", "layers", "whole_net", "gradients"]
    assert names[: len(first)] == first, "what says the most comes first: the last sections may find no time"


def test_a_new_module_is_a_section_and_a_broken_one_is_seen(tmp_path, monkeypatch):
    package = tmp_path / "made_up_sections"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "late.py").write_text("TITLE, ORDER, SECONDS = 'Late', 9, 1.0\ndef run(context): return {}\n")
    (package / "early.py").write_text("TITLE, ORDER, SECONDS = 'Early', 1, 1.0\ndef run(context): return {}\n")
    (package / "arithmetic.py").write_text("def helper(): return 1\n")
    (package / "_hidden.py").write_text("raise RuntimeError('never imported')\n")
    (package / "broken.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = discover(import_module("made_up_sections"))
    assert [s.name for s in found] == ["early", "late", "broken"]
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        found[-1].run(None)


# what is kept


def test_what_was_measured_before_an_interruption_is_on_disk(context, written, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        gpu_report.run_sections(
            [section("first", says), section("second", raises(KeyboardInterrupt()))], context, written
        )
    assert list(on_disk(tmp_path)) == ["first"]
    assert on_disk(tmp_path)["first"]["result"]["rows"] == [{"layer": "a|b", "us": 1.5}]
    assert "a\\|b" in (tmp_path / "report.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_a_failing_section_is_recorded_and_the_run_goes_on(context, written, tmp_path):
    sections = [
        section("wrong", raises(ValueError("the reason"))),
        section("half", raises(Failed("two tests failed", {"failing": ["a", "b"]}))),
        section("absent", raises(Skipped("no kernel here"))),
        section("last", says),
    ]
    gpu_report.run_sections(sections, context, written)
    found = on_disk(tmp_path)
    assert {name: entry["status"] for name, entry in found.items()} == {
        "wrong": "failed",
        "half": "failed",
        "absent": "skipped",
        "last": "done",
    }
    assert found["wrong"]["reason"].startswith("ValueError: the reason\nTraceback")
    assert found["half"]["result"] == {"failing": ["a", "b"]}
    assert found["absent"]["reason"] == "no kernel here"
    assert all(entry["seconds"] >= 0 for entry in found.values())


@pytest.mark.parametrize(("run", "code"), [(says, 0), (raises(Skipped("no")), 0), (raises(ValueError("no")), 1)])
def test_the_exit_code_says_whether_a_section_failed(run, code, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "discover", lambda: [section("only", run)])
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    assert gpu_report.main(["--device", "cpu", "--smoke", "--out", str(tmp_path / "new")]) == code
    facts = json.loads((tmp_path / "new" / "report.json").read_text())
    assert facts["machine"]["torch"] == torch.__version__
    assert facts["name"].startswith("CPU_20")


def test_a_section_that_does_not_fit_is_skipped_and_a_shorter_one_runs(context, written, tmp_path):
    sections = [section("long", says, seconds=600), section("short", says, seconds=1)]
    hasty = Context(CPU, False, tmp_path, time.monotonic() + 10, context.dtypes, context.roof)
    gpu_report.run_sections(sections, hasty, written)
    assert on_disk(tmp_path)["long"]["status"] == "skipped"
    assert on_disk(tmp_path)["long"]["reason"].startswith("needs about 600 s, ")
    assert on_disk(tmp_path)["short"]["status"] == "done"


def test_nothing_is_timed_on_a_lost_cuda_context(context, written, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "_context_is_lost", lambda device: True)
    sections = [section("wild", raises(RuntimeError("an illegal memory access"))), section("next", says)]
    gpu_report.run_sections(sections, context, written)
    assert on_disk(tmp_path)["next"]["reason"] == "the CUDA context was lost in wild"


def test_an_unknown_section_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu_report.main(["--out", "nowhere", "--device", "cpu", "--only", "no_such"])
    assert "invalid choice: 'no_such'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_one_sentence_and_exit_code_2(tmp_path, capsys):
    assert gpu_report.main(["--device", "cuda", "--out", str(tmp_path)]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# the sections' own reading


def test_the_counts_of_pytest_are_read():
    output = ["....F", "FAILED tests/test_a.py::test_b[x] - assert 1 == 2", "1 failed, 12 passed, 3 skipped in 4.56s"]
    with pytest.raises(Failed, match="ended with 1: 1 failed, 12 passed, 3 skipped") as caught:
        correctness.judge(1, output)
    assert caught.value.result["failing"] == ["FAILED tests/test_a.py::test_b[x] - assert 1 == 2"]
    assert correctness.judge(0, ["9 passed in 61.20s (0:01:01)"])["counts"] == {"passed": 9}
    with pytest.raises(Failed, match="ran out of time"):
        correctness.judge(None, ["...."])


@pytest.mark.slow
def test_a_pytest_that_hangs_is_ended(tmp_path):
    (tmp_path / "test_sleep.py").write_text("import time\ndef test_sleep(): time.sleep(60)\n")
    started = time.monotonic()
    code, _ = correctness.run_pytest([str(tmp_path), "-c", os.devnull], {}, timeout_s=2.0)
    assert code is None
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(("code", "said"), [(5, "collected no tests"), (None, "did not end within 30 s")])
def test_a_smoke_run_without_an_answer_says_so(code, said, context, monkeypatch):
    monkeypatch.setattr(correctness, "run_pytest", lambda lane, extra, timeout_s: (code, ["the output"]))
    assert correctness.run(context) == {
        "headline": f"says nothing: the smoke lane {said}",
        "output": ["the output"],
    }


def test_the_environment_names_every_op_and_the_machine(context):
    found = environment.run(context)
    assert [row["op"] for row in found["lanes"]] == list(unet_kernels.OPS)
    assert found["lanes"][0]["float32"] == "torch"
    assert machine()["commit"]


# arithmetic


def test_the_table_is_the_papers_net():
    table = layers(572)
    assert len(table) == 23, "the paper: 23 convolutional layers in total"
    assert sum(layer.flops for layer in table) == 300_856_848_896
    assert sum(layer.parameters for layer in table) == 31_030_658
    assert round(sum(layer.min_bytes(2) for layer in table) / 1e6, 1) == 581.9
    assert table[-1].size_out == 388
    by_name = {layer.name: layer for layer in table}
    assert by_name["level4.contracting.conv2"].size_out == 28
    assert by_name["level0.expanding.conv1"].c_in == 128


def test_the_concatenations_are_the_papers():
    assert [(c.name, c.c_up + c.c_skip, c.size, c.skip_size) for c in concats(572)] == [
        ("level0", 128, 392, 568),
        ("level1", 256, 200, 280),
        ("level2", 512, 104, 136),
        ("level3", 1024, 56, 64),
    ]
    assert concats(572)[0].min_bytes(2) == 2 * 128 * 392 * 392 * 2


def test_an_illegal_tile_has_no_table():
    with pytest.raises(ValueError, match="nearest are 556 and 572"):
        layers(570)


def test_the_baseline_is_the_same_function():
    fast, plain = FastUNet(features=(4, 8, 16)), PlainUNet((4, 8, 16))
    plain.load_state_dict(fast.state_dict())
    image = torch.randn(2, 1, 60, 76)
    torch.testing.assert_close(fast(image), plain(image))


# measuring


def test_a_ratio_is_the_time_of_the_first_over_that_of_the_second():
    found = harness.paired(lambda: time.sleep(0.004), lambda: time.sleep(0.001), CPU, repeats=6, budget_s=1.0)
    assert 1.5 < found.ratio < 6
    assert found.ratio_min <= found.ratio <= found.ratio_max
    assert found.rounds == 3
    assert 0.004 <= found.a.min_s <= found.a.median_s <= found.a.max_s


def test_measuring_stops_with_its_budget_but_never_before_the_third():
    assert harness.measure(lambda: time.sleep(0.01), CPU, repeats=50, budget_s=0.0).repeats == 3
    assert harness.measure(lambda: None, CPU, repeats=5, budget_s=10.0).repeats == 5


def test_a_short_cuda_function_is_replayed_and_timed_per_call(monkeypatch):
    launched: list[int] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = len(launched)

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: "Event") -> float:
            # 20 us a launch, in ms
            return 0.02 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(harness, "WARM_UP_S", 0.0)
    monkeypatch.setattr(harness, "_larger_than_l2", lambda device: torch.empty(8))

    def replayable(fn, device, calls):
        return lambda: [fn() for _ in range(calls)]

    monkeypatch.setattr(harness, "replayable", replayable)
    gpu = torch.device("cuda")
    warm = harness.measure(lambda: launched.append(0), gpu, repeats=3)
    assert (warm.median_s, warm.calls, warm.how) == (pytest.approx(20e-6), 100, "graph replay")
    cold = harness.measure(lambda: launched.append(0), gpu, repeats=3, cold=True)
    assert (cold.median_s, cold.calls, cold.how) == (pytest.approx(20e-6), 1, "graph replay, cold")
    eager = harness.measure(lambda: launched.append(0), gpu, repeats=3, graph=False)
    assert (eager.median_s, eager.how) == (pytest.approx(20e-6), "events")

    def refuse(fn, device, calls):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(harness, "replayable", refuse)
    refused = harness.measure(lambda: launched.append(0), gpu, repeats=3)
    assert refused.how == "events (no graph: operation not permitted when stream is capturing)"
    with pytest.raises(RuntimeError, match="not permitted"):
        harness.measure(lambda: launched.append(0), gpu, repeats=3, graph=True)


def test_the_peak_is_what_is_held_at_once():
    def two_at_once() -> None:
        a = torch.empty(1_000_000, dtype=torch.uint8)
        b = torch.empty(2_000_000, dtype=torch.uint8)
        del a, b
        torch.empty(500_000, dtype=torch.uint8)

    peak = harness.peak_bytes(two_at_once, CPU)
    assert peak.allocated_bytes == pytest.approx(3_000_000, rel=1e-3)
    assert peak.reserved_bytes is None


def test_the_roof_is_measured_once_and_bounds_both_ways():
    roof = harness.Roof(CPU, small=True)
    assert 0.1 < roof.copy_gbps() < 10_000
    assert 0 < roof.matmul_tflops(torch.float32) < 1000
    assert roof.copy_gbps() == harness.Roof(CPU, small=True).copy_gbps()
    assert roof.floor_s(0, 1e9, torch.float32) == pytest.approx(1 / roof.copy_gbps())
    assert roof.floor_s(1e12, 0, torch.float32) == pytest.approx(1 / roof.matmul_tflops(torch.float32))


def test_the_gate_is_red_for_what_differs():
    exact = torch.randn(8, 3, 4, 4, dtype=torch.float64)
    torchs = exact.to(torch.bfloat16)
    assert harness.expect_as_close(torchs.clone(), torchs, exact, "a copy")["error"] < 1e-2
    with pytest.raises(harness.Unequal, match="relative error 1"):
        harness.expect_as_close(torchs * 0, torchs, exact, "zeros")
    with pytest.raises(harness.Unequal, match="relative error nan"):
        harness.expect_as_close(torchs * float("nan"), torchs, exact, "NaN")
    with pytest.raises(harness.Unequal, match="the values differ"):
        harness.expect_same(torchs + 1, torchs, "moved")
    with pytest.raises(harness.Unequal, match="the strides differ"):
        harness.expect_same(harness.channels_last(torchs), torchs, "turned")


def test_one_channel_can_be_channels_last():
    x = harness.channels_last(torch.randn(1, 1, 5, 7))
    assert x.stride() == (35, 1, 7, 1)


def test_the_clock_waits_for_cuda_only_where_it_is_in_use(monkeypatch):
    waited: list[int] = []
    for in_use in (False, True):
        fake = SimpleNamespace(is_initialized=lambda in_use=in_use: in_use, synchronize=lambda: waited.append(1))
        monkeypatch.setattr(torch, "cuda", fake)
        assert harness.gpu_clock() > 0
    assert waited == [1]


# layers as the net calls them


def test_the_net_has_so_many_layers_of_each_kind():
    found = list(cases(572, PAPER_FEATURES))
    counts = {"conv3x3_relu": 10, "conv3x3_relu_cat": 4, "conv3x3_relu_pool": 4, "up_conv": 4, "conv1x1": 1}
    assert Counter(case.op for case in found) == counts
    # what of each skip the way up sees, figure 1 of the paper
    assert [case.window for case in found if case.window] == [392, 200, 104, 56]


@pytest.mark.parametrize("op", ["conv3x3_relu", "conv3x3_relu_cat", "conv3x3_relu_pool", "up_conv", "conv1x1"])
def test_a_layer_in_plain_torch_and_by_our_op_is_the_same(op):
    case = next(case for case in cases(188, (4, 8, 8, 16, 16)) if case.op == op)
    maps, weight, bias = inputs(case, torch.float64, torch.device("cpu"))
    _, by_torch, by_us = calls(case, maps, weight, bias)
    for ours, theirs in zip(results(by_us()), results(by_torch()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_no_layer_is_predicted_to_beat_its_floor():
    total = 0.0
    for case in cases(572, PAPER_FEATURES):
        us = predicted_us(case, 790.0, 4300.0, 132)
        assert us > case.layer.flops / 790e6
        total += us
    assert 381 < total < 700


def test_a_layer_that_is_slower_than_torchs_fails_the_section(context, monkeypatch):
    row = {"layer": "level0", "dtype": "bfloat16", "spread": "0.80..0.90", "slower": True}
    row |= dict.fromkeys(("floor_us", "conv_us", "torch_us", "ours_us"), 1.0)
    section = import_module("benchmarks.sections.layers")
    monkeypatch.setattr(section, "_row", lambda *_: row)
    with pytest.raises(Failed, match=r"layers are slower than torch's: level0, bfloat16: 0.80..0.90"):
        section.run(replace(context, smoke=False))


# the whole of it


@pytest.mark.slow
def test_the_smoke_run_goes_through(tmp_path, monkeypatch, capsys):
    # a few tests of one file say that the lane starts; all are the interpreter's lane itself
    few = ("tests/unet_kernels/test_crop_concat.py", "-m", "interpreter", "-k", "order_of_programs", "-x")
    monkeypatch.setattr(correctness, "SMOKE_LANE", few)
    # the report has its process to itself, here others follow
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["gpu_report", "--device", "cpu", "--smoke", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(gpu_report.__file__, run_name="__main__")
    assert ended.value.code == 0, capsys.readouterr().out
    found = on_disk(tmp_path)
    assert {entry["status"] for name, entry in found.items() if name != "bias_relu"} == {"done"}
    assert found["correctness"]["result"]["counts"]["passed"] == 1, "the lane ran"
    assert found["bias_relu"]["status"] == "skipped", "no Triton kernel runs on a CPU without the interpreter"
    assert len(list(tmp_path.iterdir())) <= 8
    assert (tmp_path / "report.md").stat().st_size < 1e6
