"""The harness catches what it is there to catch: each fault is planted, and must be found."""

import pytest
import torch
from torch import Tensor

from tests.proof import faulty_kernels as faulty
from tests.proof.memory import _Guarded, _guarded_allocations, guarded_launch
from tests.proof.order import assert_order_does_not_matter
from tests.proof.yardstick import assert_as_close_as, assert_gradient, assert_same_bits
from unet_kernels import _triton


@pytest.fixture
def x(device: torch.device) -> Tensor:
    return torch.rand(40, device=device)


interpreted = pytest.mark.interpreter


# what only watched addresses can show; on a GPU the canaries and the poison remain
only_interpreted = pytest.mark.skipif(
    not _triton.INTERPRETED, reason="addresses are watched under the interpreter only"
)


@interpreted
def test_a_right_kernel_passes(x: Tensor) -> None:
    assert_same_bits(guarded_launch(faulty.launch, faulty.is_right, x), x)


@interpreted
@only_interpreted
def test_a_read_outside_is_caught(x: Tensor) -> None:
    with pytest.raises(AssertionError, match="1 values read outside every tensor of the launch"):
        guarded_launch(faulty.launch, faulty.reads_outside, x)


@interpreted
@only_interpreted
def test_a_read_outside_whose_value_is_thrown_away_is_caught(x: Tensor) -> None:
    with pytest.raises(AssertionError, match="8 values read outside every tensor of the launch"):
        guarded_launch(faulty.launch, faulty.reads_outside_and_forgets, x)


@interpreted
def test_a_read_outside_finds_nan(x: Tensor) -> None:
    # what is left of it where addresses cannot be watched
    guarded = _Guarded.around(x)
    y = faulty.launch(faulty.reads_outside, guarded.tensor)
    want = x + torch.cat([x[1:], x.new_zeros(1)])
    with pytest.raises(AssertionError, match="1 values are NaN in one and not in the other"):
        assert_as_close_as(want, y, want.double())


@interpreted
@only_interpreted
def test_a_write_outside_is_caught(x: Tensor) -> None:
    with pytest.raises(AssertionError, match="1 values written outside every tensor of the launch"):
        guarded_launch(faulty.launch, faulty.writes_outside, x)


@interpreted
def test_a_write_outside_kills_the_canary(x: Tensor) -> None:
    with _guarded_allocations() as made:
        faulty.launch(faulty.writes_outside, x)
    with pytest.raises(AssertionError, match="allocation 0: wrote outside its buffer"):
        made[0].assert_intact("allocation 0")


@interpreted
@only_interpreted
def test_a_value_never_written_is_caught(x: Tensor) -> None:
    with pytest.raises(AssertionError, match="result 0: 1 of 40 values were never written"):
        guarded_launch(faulty.launch, faulty.forgets_the_last, x)


@interpreted
def test_a_value_never_written_is_poison(x: Tensor) -> None:
    with _guarded_allocations():
        y = faulty.launch(faulty.forgets_the_last, x)
    with pytest.raises(AssertionError, match="1 values are NaN in one and not in the other"):
        assert_as_close_as(x, y, x.double())


@interpreted
def test_a_result_that_nobody_guards_is_refused(x: Tensor) -> None:
    with pytest.raises(AssertionError, match=r"result 0 was not allocated by torch\.empty"):
        guarded_launch(faulty.launch_unguarded, faulty.is_right, x)


@interpreted
@only_interpreted
def test_an_update_that_can_be_lost_is_a_race(x: Tensor) -> None:
    with pytest.raises(AssertionError, match="written by more than one program"):
        guarded_launch(faulty.launch, faulty.loses_updates, x)


@interpreted
@only_interpreted
def test_reading_what_another_program_writes_is_a_race(x: Tensor) -> None:
    with pytest.raises(AssertionError, match="2 values are written by one program and read by another"):
        guarded_launch(faulty.launch, faulty.races, x)


@interpreted
def test_a_changed_input_is_noticed(x: Tensor) -> None:
    with pytest.raises(AssertionError, match="bytes of 160 differ"):
        guarded_launch(faulty.launch, faulty.changes_its_input, x)


@interpreted
def test_a_race_depends_on_the_order(x: Tensor) -> None:
    if x.is_cuda:
        pytest.skip("a GPU runs programs in its own order, which may happen to be the same twice")
    with pytest.raises(AssertionError, match="depends on the order of the programs"):
        assert_order_does_not_matter(lambda: faulty.launch(faulty.races, x))


@interpreted
def test_a_right_kernel_does_not_depend_on_the_order(x: Tensor) -> None:
    assert_order_does_not_matter(lambda: guarded_launch(faulty.launch, faulty.is_right, x))


def test_a_spill_is_over_budget() -> None:
    from tests.proof import aot

    a = torch.empty(256, 256, dtype=torch.float16, device="meta")
    launch = aot.Launch(
        faulty.spills, (1,), {"a_ptr": a, "b_ptr": a, "c_ptr": a.float(), "BLOCK": 256}, {"num_warps": 4}
    )
    code = aot.compiled(launch, 80)
    with pytest.raises(AssertionError, match=r"stack bytes \(spills\) \d+, budget 0"):
        aot.Budget(registers=255).check(code)


def test_a_missing_or_banned_instruction_is_over_budget() -> None:
    from tests.proof import aot

    x = torch.empty(1024, dtype=torch.float16, device="meta")
    arguments = {"x_ptr": x, "y_ptr": x, "step": 3, "size": 1024, "BLOCK": 1024}
    code = aot.compiled(aot.Launch(faulty.loads_one_by_one, (1,), arguments, {"num_warps": 4}), 80)
    with pytest.raises(AssertionError, match=r"no LDG\\.E\\.128"):
        aot.Budget(registers=255, must_have=(r"LDG\.E\.128",)).check(code)
    with pytest.raises(AssertionError, match=r"x LDG\\.E\\.U16"):
        aot.Budget(registers=255, must_not_have=(r"LDG\.E\.U16",)).check(code)


def test_a_relu_that_loses_nan_is_over_budget() -> None:
    from tests.proof import aot

    x = torch.empty(1024, device="meta")
    arguments = {"x_ptr": x, "y_ptr": x, "size": 1024, "BLOCK": 1024}
    code = aot.compiled(aot.Launch(faulty.nan_becomes_zero, (1,), arguments, {"num_warps": 4}), 80)
    with pytest.raises(AssertionError, match=r"x \[FH\]MNMX"):
        aot.Budget(registers=255, must_not_have=(r"[FH]MNMX",)).check(code)


def test_an_error_of_three_times_torchs_is_too_much() -> None:
    exact = torch.rand(1000, dtype=torch.float64)
    torchs = exact.half()
    worst = float((torchs.double() - exact).abs().max())
    assert_as_close_as(torchs, (exact + worst).half(), exact)
    with pytest.raises(AssertionError, match="error"):
        assert_as_close_as(torchs, (exact + 8 * worst).half(), exact)


def test_a_small_error_in_one_direction_is_a_bias() -> None:
    exact = torch.randn(100_000, dtype=torch.float64)
    torchs = exact.float()
    unbiased = float((torchs.double() - exact).abs().max())
    leaning = (exact + 0.9 * unbiased).float()
    assert_as_close_as(torchs, leaning, exact)
    with pytest.raises(AssertionError, match=r"relative L2|signed bias"):
        assert_gradient(torchs, leaning, exact)


def test_nan_where_torch_has_none_is_an_error() -> None:
    want = torch.ones(3)
    with pytest.raises(AssertionError, match="NaN"):
        assert_as_close_as(want, torch.tensor([1.0, float("nan"), 1.0]), want.double())


def test_an_infinity_of_the_other_sign_is_an_error() -> None:
    want = torch.tensor([float("inf")])
    with pytest.raises(AssertionError, match="infinities"):
        assert_as_close_as(want, -want, want.double())
