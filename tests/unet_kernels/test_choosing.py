"""The fastest way is chosen, remembered and explained, a wrong one never. The GPU is pretended, its clock a table."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import unet_kernels as uk
from tests.proof.properties import given, st
from unet_kernels import _choosing, _triton
from unet_kernels._choosing import Question, Row, Way

CUDA = torch.device("cuda", 0)


@dataclass
class _Gpu:
    """What the tests say of the GPU that is not there."""

    capturing: bool = False
    # microseconds of a way: (on the device, as called)
    us: dict[str, tuple[float, float]] = field(default_factory=dict)
    timed: list[str] = field(default_factory=list)
    name: str = "Pretended GPU"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[_Gpu]:
    gpu = _Gpu()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu.capturing)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu.name)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def clock(which: int) -> Callable[..., float]:
        def read(call: Any, *_: float) -> float:
            gpu.timed.append(call.func.name)
            return gpu.us[call.func.name][which]

        return read

    monkeypatch.setattr(_choosing, "_device_us", clock(0))
    monkeypatch.setattr(_choosing, "_called_us", clock(1))
    _forget()
    yield gpu
    _forget()


def _forget() -> None:
    """As a new process."""
    _choosing._rows.cache_clear()
    _choosing._about.cache_clear()
    _choosing._decided.clear()
    _choosing._ran.clear()
    _choosing._waiting.clear()
    _choosing._passing.clear()


@dataclass(frozen=True)
class _Doubling:
    """A way to double x, under its own name so that the clock knows it."""

    name: str
    how: Callable[[Tensor], Tensor] = lambda x: x + x

    def __call__(self, x: Tensor) -> Tensor:
        return self.how(x)


def _question(*ways: _Doubling, case: str = "a case") -> Question:
    """The first is ATen's."""
    offered = [Way(way.name, way, ours=i > 0) for i, way in enumerate(ways)]
    return Question("doubling", case, lambda: offered, lambda x: 2 * x, lambda given, lines: (given[0][:, :, :lines],))


ATEN, FAST, SLOW = _Doubling("ATen"), _Doubling("fast"), _Doubling("slow")
X = torch.rand(1, 2, 6, 5)


def _chosen(question: Question, x: Tensor = X) -> str:
    return _choosing.decide(question, CUDA, (x,)).name


def test_the_fastest_is_chosen_and_its_result_returned(gpu: _Gpu) -> None:
    gpu.us = {"ATen": (9, 9), "slow": (20, 20), "fast": (5, 5)}
    question = _question(ATEN, SLOW, FAST)
    assert _chosen(question) == "fast"
    assert torch.equal(_choosing.run(question, CUDA, (X,)), 2 * X)


def test_inside_a_graph_the_devices_time_decides_and_outside_it_the_call(gpu: _Gpu) -> None:
    # a launch that costs the host more than the kernel the device
    gpu.us = {"ATen": (9, 10), "fast": (5, 40)}
    question = _question(ATEN, FAST)
    assert _chosen(question) == "ATen"
    gpu.capturing = True
    assert _chosen(question) == "fast"


@pytest.mark.parametrize(("ours", "chosen"), [(9.9, "ATen"), (9.7, "fast")])
def test_a_tie_goes_to_aten(gpu: _Gpu, ours: float, chosen: str) -> None:
    gpu.us = {"ATen": (10, 10), "fast": (ours, ours)}
    assert _chosen(_question(ATEN, FAST)) == chosen


def test_it_is_measured_once_and_kept_for_the_next_process(gpu: _Gpu) -> None:
    gpu.us = {"ATen": (9, 9), "fast": (5, 5)}
    question = _question(ATEN, FAST)
    assert _chosen(question) == _chosen(question) == "fast"
    assert gpu.timed == ["ATen", "ATen", "fast", "fast"]
    _forget()
    # another clock would say otherwise; nobody asks it
    gpu.us = {"ATen": (1, 1), "fast": (5, 5)}
    assert _chosen(question) == "fast"
    assert len(gpu.timed) == 4


def test_a_person_can_read_the_table(gpu: _Gpu) -> None:
    gpu.us = {"ATen": (9, 9.5), "fast": (5, 5.5)}
    _chosen(_question(ATEN, FAST, _Doubling("wrong", lambda x: 3 * x), case="4 channels, 2^5 pixels, float32"))
    path = _choosing.table_path(CUDA)
    assert path.name.startswith("Pretended-GPU_torch")
    table = json.loads(path.read_text())
    assert table["about"]["device"] == "Pretended GPU"
    [(case, row)] = table["rows"].items()
    assert case == "doubling: 4 channels, 2^5 pixels, float32"
    assert row["device_us"] == {"ATen": 9, "fast": 5}
    assert row["called_us"] == {"ATen": 9.5, "fast": 5.5}
    assert row["refused"]["wrong"].startswith("error ")


# what may not win


def _loses_nan(x: Tensor) -> Tensor:
    return torch.nan_to_num(x + x, nan=0.0)


def _forgets_the_last(x: Tensor) -> Tensor:
    y = torch.full_like(x, torch.nan)
    y[:, :, :-1] = 2 * x[:, :, :-1]
    return y


def _raises(x: Tensor) -> Tensor:
    raise RuntimeError("PTXAS error: too many registers\nand more")


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (lambda x: 2.01 * x, r"^error .*, ATen's own is"),
        (_loses_nan, "^NaN elsewhere than ATen has it$"),
        (_forgets_the_last, "^NaN elsewhere than ATen has it$"),
        (lambda x: (x + x)[:, :1], r"^gives \[1, 1, 6, 5\] torch.float32, not \[1, 2, 6, 5\] torch.float32$"),
        (lambda x: (x + x).half(), r"^gives .* torch.float16, not .* torch.float32$"),
        (_raises, "^RuntimeError: PTXAS error: too many registers$"),
    ],
    ids=["error", "NaN", "unwritten", "shape", "dtype", "raises"],
)
def test_a_wrong_way_never_wins_however_fast(gpu: _Gpu, how: Callable[[Tensor], Tensor], reason: str) -> None:
    gpu.us = {"ATen": (9, 9), "wrong": (0.1, 0.1), "fast": (5, 5)}
    question = _question(ATEN, _Doubling("wrong", how), FAST)
    assert _chosen(question) == "fast"
    assert "wrong" not in gpu.timed
    refused = _choosing.row(question, CUDA).refused
    assert re.search(reason, refused["wrong"]), refused


def test_atens_own_rounding_is_the_yardstick(gpu: _Gpu) -> None:
    gpu.us = {"ATen": (9, 9), "as good": (5, 5)}
    x = torch.rand(1, 2, 6, 5).half()
    # a third is rounded once by both; the product of rounded numbers is not better than that
    third = Question(
        "thirds",
        "a case",
        lambda: [
            Way("ATen", _Doubling("ATen", lambda x: x / 3), False),
            Way("as good", _Doubling("as good", lambda x: (x.float() * (1 / 3)).half()), True),
        ],
        lambda x: x / 3,
        lambda given, lines: given,
    )
    assert _chosen(third, x) == "as good"


def test_ours_alone_refuses_to_run_what_is_wrong(gpu: _Gpu) -> None:
    gpu.us = {"ATen": (9, 9), "fast": (5, 5)}
    wrong = _question(ATEN, _Doubling("wrong", lambda x: 3 * x))
    with (
        uk.using("ours"),
        pytest.raises(RuntimeError, match="doubling has no kernel of ours that may run for a case: wrong: error"),
    ):
        _chosen(_question(ATEN, _Doubling("wrong", lambda x: 3 * x), _Doubling("wrong too", lambda x: -x)))
    # with one way of ours there is nothing to choose; it still may not run once it is known to be wrong
    gpu.us["right"] = (20, 20)
    with uk.using("ours"):
        assert _chosen(_question(ATEN, _Doubling("right"), case="another")) == "right"
    assert _chosen(wrong) == "ATen"


# when nothing is measured


def test_nothing_is_measured_while_a_graph_is_captured(gpu: _Gpu) -> None:
    gpu.us, gpu.capturing = {"ATen": (9, 9), "fast": (5, 5)}, True
    question = _question(ATEN, FAST)
    assert _chosen(question) == "ATen"
    with uk.using("ours"):
        assert _chosen(question) == "fast"
    assert not gpu.timed
    gpu.capturing = False
    assert _chosen(question) == "fast"
    assert gpu.timed


def test_nor_while_a_compiler_traces_or_by_one_of_several_ranks(gpu: _Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.us = {"ATen": (9, 9), "fast": (5, 5)}
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert _chosen(_question(ATEN, FAST)) == "ATen"
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_world_size", lambda: 2)
        assert _chosen(_question(ATEN, FAST)) == "ATen"
        # what is known already is used by all of them alike
        patch.setattr(torch.distributed, "get_world_size", lambda: 1)
        assert _chosen(_question(ATEN, FAST)) == "fast"
        patch.setattr(torch.distributed, "get_world_size", lambda: 2)
        assert _chosen(_question(ATEN, FAST)) == "fast"


def test_without_memory_to_measure_in_aten_serves_until_there_is(gpu: _Gpu) -> None:
    gpu.us = {"ATen": (9, 9), "fast": (5, 5)}
    full, tried = True, 0

    def needs_room(x: Tensor) -> Tensor:
        nonlocal tried
        tried += 1
        if full:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return x + x

    question = _question(ATEN, _Doubling("fast", needs_room))
    # not at every call: a failure costs more than a layer
    for attempt, calls in enumerate((9, 65), 1):
        for _ in range(calls):
            assert _chosen(question) == "ATen"
        assert tried == attempt
    assert _choosing.row(question, CUDA) is None
    full = False
    assert [_chosen(question) for _ in range(513)][-1] == "fast"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")]
)
def test_what_consists_of_what_found_no_memory_is_not_timed(gpu: _Gpu, error: Exception) -> None:
    gpu.us = {"ATen": (9, 9), "fast": (5, 5), "of another": (3, 3)}

    def fails(x: Tensor) -> Tensor:
        raise error

    inner = _question(ATEN, _Doubling("fast", fails), case="inner")
    outer = _question(ATEN, _Doubling("of another", lambda x: _choosing.run(inner, CUDA, (x,))), case="outer")
    assert _chosen(outer) == "ATen"
    assert _choosing.row(outer, CUDA) is _choosing.row(inner, CUDA) is None


def test_what_was_refused_by_an_accident_is_not_remembered_on_disk(gpu: _Gpu) -> None:
    gpu.us = {"ATen": (9, 9), "fast": (5, 5), "raises": (1, 1)}
    question = _question(ATEN, _Doubling("raises", _raises), FAST)
    assert _chosen(question) == "fast"
    _chosen(_question(ATEN, FAST, case="another"))
    assert json.loads(_choosing.table_path(CUDA).read_text())["rows"].keys() == {"doubling: another"}


def test_where_nothing_could_be_timed_aten_serves(gpu: _Gpu) -> None:
    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("no compiler")

    clumsy = iter(range(100))

    def once(x: Tensor) -> Tensor:
        # the first gives the yardstick
        return x + x if next(clumsy) == 0 else broken(x)

    assert _chosen(_question(_Doubling("ATen", once), _Doubling("fast", broken))) == "ATen"
    assert _chosen(_question(_Doubling("ATen", broken), FAST, case="not even once")) == "ATen"


def test_other_strides_may_not_win_where_they_matter(gpu: _Gpu) -> None:
    gpu.us = {"ATen": (9, 9), "turned": (5, 5)}
    turned = _Doubling("turned", lambda x: (x + x).contiguous(memory_format=torch.channels_last))
    question = _question(ATEN, turned)
    assert _chosen(question) == "ATen"
    row = _choosing.row(question, CUDA)
    assert row is not None
    assert row.refused["turned"] == "strides [60, 1, 10, 2], not [60, 30, 5, 1]"
    anyhow = replace(_question(ATEN, turned, case="anyhow"), any_strides=True)
    assert _chosen(anyhow) == "turned"
    # an axis of one value has none
    assert _chosen(_question(ATEN, turned, case="one channel"), torch.rand(1, 1, 6, 5)) == "turned"


def test_a_capture_takes_what_has_run_before(gpu: _Gpu) -> None:
    ran: list[str] = []

    def noted(name: str) -> _Doubling:
        return _Doubling(name, lambda x: ran.append(name) or x + x)

    gpu.us = {"ATen": (9, 10), "fast": (5, 40)}
    question = _question(noted("ATen"), noted("fast"))
    assert _chosen(question) == "ATen"
    # a new process, which reads the table: before a capture it calls, and loads what the capture will take
    _forget()
    ran.clear()
    assert _chosen(question) == "ATen"
    assert ran == ["fast"]
    gpu.capturing = True
    assert _chosen(question) == "fast"
    # and one that captures without having called loads nothing
    _forget()
    assert _chosen(question) == "ATen"
    gpu.capturing = False
    with _choosing.by_device_time():
        assert _chosen(question) == "fast"
    gpu.capturing = True
    assert _chosen(question) == "fast"


def test_a_thread_that_wants_the_devices_time_leaves_others_alone() -> None:
    seen: list[bool] = []
    with _choosing.by_device_time():
        thread = threading.Thread(target=lambda: seen.append(_choosing._here.by_device_time))
        thread.start()
        thread.join()
        assert _choosing._here.by_device_time
    assert seen == [False]
    assert not _choosing._here.by_device_time


def test_records_inside_records_end_where_they_began() -> None:
    with uk.recorded() as outer:
        with uk.recorded():
            pass
        assert any(each is outer for each in _choosing._records)


@pytest.mark.parametrize("shape", [(1, 1, 50_000, 50_000), (70_000, 1, 200, 200), (1, 70_000, 3, 3)], ids=str)
def test_a_map_too_large_for_our_kernels_is_atens(shape: tuple[int, ...]) -> None:
    assert "more than" in _choosing.why_too_large(torch.empty(shape, device="meta"))
    assert not _choosing.why_too_large(torch.empty(1, 64, 10_000, 10_000, device="meta"))


def test_measuring_leaves_the_callers_numbers_alone(gpu: _Gpu) -> None:
    gpu.us = {"ATen": (9, 9), "fast": (5, 5)}
    x = X.clone()
    torch.manual_seed(1)
    want = torch.rand(3)
    torch.manual_seed(1)
    _chosen(_question(ATEN, FAST), x)
    assert torch.equal(torch.rand(3), want)
    assert torch.equal(x, X)


def test_it_is_measured_on_the_shapes_and_strides_it_was_called_with(gpu: _Gpu) -> None:
    gpu.us = {"ATen": (9, 9), "seen": (5, 5)}
    seen: list[Tensor] = []
    x = torch.rand(2, 8, 9, 10).to(memory_format=torch.channels_last)[:, 1:4, 2:]
    _chosen(_question(ATEN, _Doubling("seen", lambda x: seen.append(x) or x + x)), x)
    assert (seen[0].shape, seen[0].stride()) == (x.shape, x.stride())
    assert seen[0].isnan().sum() == 1
    # a value for all of an axis cannot be filled; any strides do
    _chosen(
        _question(ATEN, _Doubling("seen", lambda x: seen.append(x) or x + x), case="expanded"), x.expand(-1, -1, -1, 10)
    )
    _chosen(
        _question(ATEN, _Doubling("seen", lambda x: seen.append(x) or x + x), case="of one"),
        X[:1, :1, :1].expand(1, 2, 6, 5),
    )
    assert seen[-1].shape == (1, 2, 6, 5)


def test_a_large_map_is_measured_by_its_first_lines(gpu: _Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.us = {"ATen": (9, 9), "seen": (5, 5)}
    monkeypatch.setattr(_choosing, "MOST_PIXELS", 200)
    seen: list[Tensor] = []
    _chosen(_question(ATEN, _Doubling("seen", lambda x: seen.append(x) or x + x)), torch.rand(1, 1, 100, 10))
    assert seen[0].shape == (1, 1, 20, 10)


def test_sizes_that_are_nearly_one_share_a_row() -> None:
    assert _choosing.octave(568 * 568) == _choosing.octave(572 * 572) == "2^18.5 pixels"
    assert _choosing.octave(280 * 280) != _choosing.octave(568 * 568)
    # from some size on what wins keeps winning
    assert _choosing.octave(2048 * 2048) == _choosing.octave(10_000 * 10_000)
    assert _choosing.octave(1) == _choosing.octave(0) == "2^0 pixels"


# the table on disk


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"about": {}, "rows": {}}', '{"rows": {"doubling: a case": {}}}'],
    ids=["empty", "torn", "a list", "null", "of nothing", "of nobody"],
)
def test_a_table_that_is_not_ours_is_not_believed(gpu: _Gpu, text: str) -> None:
    gpu.us = {"ATen": (9, 9), "fast": (5, 5)}
    path = _choosing.table_path(CUDA)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert _chosen(_question(ATEN, FAST)) == "fast"
    assert json.loads(path.read_text())["rows"].keys() == {"doubling: a case"}


@pytest.mark.parametrize("rows", [[], {"doubling: a case": {"us": {}}}, {"doubling: a case": 3}], ids=str)
def test_nor_one_whose_rows_are_damaged(gpu: _Gpu, rows: Any) -> None:
    gpu.us = {"ATen": (9, 9), "fast": (5, 5)}
    _chosen(_question(ATEN, FAST))
    path = _choosing.table_path(CUDA)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rows": rows}))
    _forget()
    assert _chosen(_question(ATEN, FAST)) == "fast"
    assert len(gpu.timed) == 8


def test_other_versions_or_other_kernels_measure_anew(gpu: _Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.us = {"ATen": (9, 9), "fast": (5, 5)}
    _chosen(_question(ATEN, FAST))
    path = _choosing.table_path(CUDA)
    _forget()
    monkeypatch.setattr(_choosing, "_fingerprint", lambda: "of other kernels")
    gpu.us["fast"] = (50, 50)
    assert _chosen(_question(ATEN, FAST)) == "ATen"
    _forget()
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert _choosing.table_path(CUDA) != path


def test_comments_do_not_make_other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    before = _choosing._fingerprint()
    real = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, **kw: real(self, **kw) + "\n    # said more clearly\n")
    assert _choosing._fingerprint() == before
    monkeypatch.setattr(Path, "read_text", lambda self, **kw: real(self, **kw) + "\nx = 1\n")
    assert _choosing._fingerprint() != before


def test_what_another_process_measured_meanwhile_stays(gpu: _Gpu) -> None:
    gpu.us = {"ATen": (9, 9), "fast": (5, 5)}
    _chosen(_question(ATEN, FAST, case="here"))
    path = _choosing.table_path(CUDA)
    table = json.loads(path.read_text())
    table["rows"]["doubling: there"] = table["rows"]["doubling: here"]
    path.write_text(json.dumps(table))
    _chosen(_question(ATEN, FAST, case="here again"))
    rows = json.loads(path.read_text())["rows"]
    assert rows.keys() == {"doubling: here", "doubling: there", "doubling: here again"}
    assert not list(path.parent.glob("*.tmp"))


def test_a_cache_that_cannot_be_written_costs_nothing_but_the_next_measurement(gpu: _Gpu, tmp_path: Path) -> None:
    gpu.us = {"ATen": (9, 9), "fast": (5, 5)}
    (tmp_path / "unet_fast").write_text("a file where a folder should be")
    assert _chosen(_question(ATEN, FAST)) == _chosen(_question(ATEN, FAST)) == "fast"
    assert len(gpu.timed) == 4


def test_the_tables_that_the_package_brings_can_be_read() -> None:
    for path in (Path(_choosing.__file__).parent / "tuned").glob("*.json"):
        table = json.loads(path.read_text())
        assert set(table) == {"about", "rows"}
        assert all(Row(**row).device_us for row in table["rows"].values())


def test_choices_can_be_taken_along(gpu: _Gpu) -> None:
    gpu.us = {"ATen": (9, 9), "fast": (5, 5)}
    _chosen(_question(ATEN, FAST))
    taken = uk.choices(CUDA)
    _forget()
    _choosing.table_path(CUDA).unlink()
    gpu.us = {"ATen": (1, 1), "fast": (5, 5)}
    assert uk.adopt(json.loads(json.dumps(taken)), CUDA)
    assert _chosen(_question(ATEN, FAST)) == "fast"
    # of another device they say nothing
    _forget()
    gpu.name = "Another GPU"
    assert not uk.adopt(taken, CUDA)
    assert _chosen(_question(ATEN, FAST)) == "ATen"


# the switch


def test_reference_takes_aten_and_ours_takes_ours_whatever_the_clock_says(gpu: _Gpu) -> None:
    gpu.us = {"ATen": (9, 9), "slow": (20, 20), "fast": (5, 5)}
    with uk.using("reference"):
        assert _chosen(_question(ATEN, SLOW, FAST)) == "ATen"
    gpu.us = {"ATen": (1, 1), "slow": (20, 20), "fast": (5, 5)}
    with uk.using("ours"):
        assert _chosen(_question(ATEN, SLOW, FAST)) == "fast"
    assert _chosen(_question(ATEN, SLOW, FAST)) == "ATen"


def test_the_switch_goes_back_also_after_an_error() -> None:
    assert _choosing.which() == "automatic"

    def fails() -> None:
        with uk.using("ours"):
            with uk.using("reference"):
                assert _choosing.which() == "reference"
            assert _choosing.which() == "ours"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert _choosing.which() == "automatic"


def test_an_unknown_switch_is_refused() -> None:
    with (
        pytest.raises(ValueError, match="kernels must be 'automatic' or 'reference' or 'ours', got 'fastest'"),
        uk.using("fastest"),
    ):
        pass


@pytest.mark.parametrize("told", ["ours", "reference", "automatic"])
def test_the_environment_says_it_for_a_process(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNET_FAST_KERNELS", told)
    assert _choosing._from_environment() == told


def test_the_environment_is_refused_in_a_sentence_and_may_be_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNET_FAST_KERNELS", "fast")
    with pytest.raises(ValueError, match="UNET_FAST_KERNELS must be one of automatic, reference, ours, got 'fast'"):
        _choosing._from_environment()
    monkeypatch.delenv("UNET_FAST_KERNELS")
    assert _choosing._from_environment() == "automatic"


@pytest.mark.skipif(_triton.INTERPRETED, reason="the interpreter runs ours on a CPU")
def test_ours_on_a_cpu_says_what_it_needs() -> None:
    with (
        uk.using("ours"),
        pytest.raises(
            RuntimeError,
            match="kernels must be 'automatic' or 'reference' here, got 'ours': Triton kernels run on CUDA",
        ),
    ):
        uk.conv3x3_relu(torch.rand(1, 16, 5, 5), torch.rand(16, 16, 3, 3), torch.rand(16))


@given(st.sampled_from(["automatic", "reference"]))
def test_on_a_cpu_the_other_two_are_the_reference(kernels: str) -> None:
    x, weight, bias = torch.rand(1, 3, 5, 5), torch.rand(4, 3, 3, 3), torch.rand(4)
    with uk.using(kernels), uk.recorded() as record:
        y = uk.conv3x3_relu(x, weight, bias)
    assert torch.equal(y, torch.relu(torch.nn.functional.conv2d(x, weight, bias)))
    assert not record


def test_what_was_called_is_recorded(gpu: _Gpu) -> None:
    gpu.us = {"ATen": (9, 9), "fast": (5, 5)}
    question = _question(ATEN, FAST)
    with uk.recorded() as record:
        for _ in range(2):
            _choosing.run(question, CUDA, (X,))
    _choosing.run(question, CUDA, (X,))
    assert record == [("doubling", "a case", "fast")] * 2


# explanations


def _conv(c_in: int = 64, side: int = 100, dtype: torch.dtype = torch.bfloat16) -> Callable[[], tuple[Any, ...]]:
    def made() -> tuple[Any, ...]:
        x = torch.empty(1, c_in, side, side, dtype=dtype, device="cuda", memory_format=torch.channels_last)
        weight = torch.empty(64, c_in, 3, 3, dtype=dtype, device="cuda", memory_format=torch.channels_last)
        return x, weight, torch.empty(64, dtype=dtype, device="cuda"), True

    return made


def test_a_chip_that_is_not_here_is_explained() -> None:
    found = uk.explain("conv3x3_relu", "cuda", _conv(), chip=90)
    assert found.case == "64 -> 64, 2^13 pixels, bfloat16, channels_last, relu"
    assert found.called == found.captured == "ATen"
    assert found.why == "not measured here yet: the first call will"
    assert "descriptors 256x64x64, weight first, 4 warps, 3 stages" in found.ways
    assert not any("descriptors" in way for way in uk.explain("conv3x3_relu", "cuda", _conv(), chip=86).ways)
    assert uk.explain("conv3x3_relu", "cuda", _conv(), chip=75).why == "the device is older than sm_80"
    assert uk.explain("conv3x3_relu", "cuda", _conv(dtype=torch.float64), chip=90).why == "float64 is left to torch"


def test_what_was_measured_is_explained(gpu: _Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(_triton, "processors", lambda device: 132)
    ways = uk.explain("conv3x3_relu", CUDA, _conv()).ways
    ours = ways[-1]
    case = "conv3x3_relu: 64 -> 64, 2^13 pixels, bfloat16, channels_last, relu"
    row = Row({"ATen": 9.0, ours: 5.0}, {"ATen": 10.0, ours: 12.0}, {ways[-2]: "error 1.0, ATen's own is 0.1"})
    _choosing._rows(CUDA)[case] = row
    found = uk.explain("conv3x3_relu", CUDA, _conv())
    assert (found.called, found.captured) == ("ATen", ours)
    assert found.why == f"10.0 us; next {ours}, 12.0 us"
    assert found.device_us == row.device_us
    assert found.refused == row.refused


def test_an_op_that_measures_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"op must be one of conv3x3_relu, .*, got 'cut_gap'"):
        uk.explain("cut_gap", "cpu", lambda: (torch.zeros(1, 2, 3),))


def test_a_result_without_values_is_as_good_as_any() -> None:
    # the gradient of a bias that nobody wants
    empty = torch.empty(0)
    assert _choosing._too_far(empty, empty, empty.double()) == ""
    assert "gives" in _choosing._too_far(torch.empty(1), empty, empty.double())
