"""The forward kernels of the 3x3 convolution: every way to cut it equals the reference; compiled, none spills."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.proof.memory import LAYOUTS, awkward, guarded_launch
from tests.proof.order import assert_order_does_not_matter
from tests.proof.properties import given, st
from tests.proof.yardstick import assert_as_close_as, assert_same_bits
from unet_kernels import _conv3x3_fwd, _layout, _triton, reference
from unet_kernels._conv3x3_fwd import (
    Blocks,
    blocks_for,
    case_of,
    launch_conv3x3_fwd,
    launch_conv3x3_pool_fwd,
    makes_maxima,
    ours,
    why_not_blocks,
)

pytestmark = pytest.mark.usefixtures("on_device")

GOLDEN = Path(__file__).parent / "golden" / "conv3x3_fwd.json"

# every kernel in every variant, at sizes that the interpreter bears
VARIANTS = {
    "pointers": Blocks("pointers", 64, 32, 16, 4, 3),
    "pointers, 3 taps a load": Blocks("pointers", 64, 32, 16, 4, 3, taps=3),
    "pointers, split": Blocks("pointers", 64, 32, 16, 4, 3, splits=3),
    "descriptors": Blocks("descriptors", 64, 32, 16, 4, 3),
    "descriptors, 3 taps a load": Blocks("descriptors", 64, 32, 16, 4, 3, taps=3),
    "descriptors, weight first": Blocks("descriptors", 64, 32, 16, 4, 3, weight_first=True),
    "descriptors, split": Blocks("descriptors", 64, 32, 16, 4, 3, splits=4),
    "direct": Blocks("direct", 64, 16, 32, 4, 1),
}
POINTERS = {name: blocks for name, blocks in VARIANTS.items() if blocks.kernel == "pointers"}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def no_arithmetic_that_the_interpreter_gets_wrong(request: pytest.FixtureRequest) -> None:
    parameters = getattr(request.node, "callspec", None)
    if _triton.INTERPRETED and parameters and parameters.params.get("dtype") == torch.bfloat16:
        pytest.skip("the interpreter's bfloat16 arithmetic is wrong")


@pytest.fixture(autouse=True)
def no_descriptors_where_the_chip_has_none(request: pytest.FixtureRequest, device: torch.device) -> None:
    parameters = getattr(request.node, "callspec", None)
    descriptors = parameters is not None and "descriptors" in str(parameters.params.get("variant"))
    if descriptors and device.type == "cuda" and _triton.chip(device) != 90:
        pytest.skip("descriptors are for sm_90")


def _channels(variant: str) -> int:
    return 3 if variant == "direct" else 32


def _made(n: int, c_in: int, h: int, w: int, c_out: int, dtype: torch.dtype, layout: str = "channels_last") -> Any:
    weight, bias = torch.randn(c_out, c_in, 3, 3) / (3 * c_in**0.5), torch.randn(c_out)
    x = awkward(torch.randn(n, c_in, h, w).to(dtype), layout)
    return [x, awkward(weight.to(dtype), layout), bias.to(dtype)]


def _whole_numbers(tensors: list[Tensor]) -> list[Tensor]:
    """The same with small whole numbers in them, whose sums are exact in any order."""
    return [t.copy_(torch.randint(-3, 4, t.shape)) for t in tensors]


def _assert_near(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor, relu: bool = True) -> None:
    want = reference.conv3x3_relu(x, weight, bias, relu)
    assert_as_close_as(want, got, reference.conv3x3_relu(x.double(), weight.double(), bias.double(), relu))


@pytest.mark.interpreter
@every_dtype
@pytest.mark.parametrize("size", [(1, 3, 3), (2, 9, 11), (1, 4, 70)], ids=str)
@every_variant
def test_every_variant_is_as_near_as_torch(variant: str, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    # (N, H, W): one pixel out; a batch of odd sizes; lines longer than a block
    tensors = _made(size[0], _channels(variant), *size[1:], 40, dtype)
    got = guarded_launch(lambda *t: launch_conv3x3_fwd(*t, True, VARIANTS[variant]), *tensors)
    _assert_near(got, *tensors)


@pytest.mark.interpreter
@pytest.mark.parametrize("margin", [0, 5], ids=["two maps alike", "a window"])
@every_variant
def test_the_concatenation_is_read_where_it_lies(variant: str, margin: int) -> None:
    if variant == "direct":
        pytest.skip("the direct kernel reads one map")
    up, weight, bias = _made(2, 32, 8, 9, 24, torch.float32)
    weight = awkward(torch.randn(24, 48, 3, 3) / 20, "channels_last")
    larger = awkward(torch.randn(2, 16, 8 + margin, 9 + margin), "channels_last")
    skip = reference.crop_to(larger, 8, 9)
    blocks = VARIANTS[variant]
    if margin and blocks.kernel == "descriptors":
        # lines of another length: such a launch is refused, and is not among those offered
        assert "lines are not equally long" in why_not_blocks(blocks, up, weight, skip)
        assert all(b.kernel != "descriptors" for b in ours(up, weight, skip))
        return
    assert why_not_blocks(blocks, up, weight, skip) == ""
    got = guarded_launch(lambda *t: launch_conv3x3_fwd(*t[:3], True, blocks, t[3]), up, weight, bias, skip)
    _assert_near(got, torch.cat([up, skip], 1), weight, bias)


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", [*POINTERS, "direct"])
def test_addresses_may_have_any_strides(variant: str, layout: str) -> None:
    tensors = _made(2, 3 if variant == "direct" else 13, 6, 7, 7, torch.float32, layout)
    # prime channels: the last step is masked
    got = guarded_launch(lambda *t: launch_conv3x3_fwd(*t, True, VARIANTS[variant]), *tensors)
    _assert_near(got, *tensors)
    assert got.stride() == reference.conv3x3_relu(*tensors).stride()


@pytest.mark.interpreter
@pytest.mark.parametrize("variant", [v for v, b in VARIANTS.items() if b.kernel == "descriptors"])
def test_descriptors_read_windows_of_wider_maps(variant: str) -> None:
    larger = awkward(torch.randn(2, 32, 12, 14), "channels_last")
    x = larger[:, :, 2:9, 3:11]
    _, weight, bias = _made(1, 32, 5, 5, 16, torch.float32)
    assert _layout.pitch(x) == 14
    got = guarded_launch(lambda *t: launch_conv3x3_fwd(*t, True, VARIANTS[variant]), x, weight, bias)
    _assert_near(got, x, weight, bias)


@pytest.mark.interpreter
@every_variant
def test_without_relu_negative_values_stay(variant: str) -> None:
    tensors = _made(1, _channels(variant), 5, 6, 16, torch.float32)
    got = launch_conv3x3_fwd(*tensors, False, VARIANTS[variant])
    _assert_near(got, *tensors, relu=False)
    assert (got < 0).any()


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@every_variant
def test_nan_and_infinity_go_where_torchs_go(variant: str) -> None:
    x, weight, bias = _made(1, _channels(variant), 7, 9, 16, torch.float32)
    x[0, 0, 2, 3], x[0, 1, 5, 7], x[0, 1, 6, 0] = torch.nan, torch.inf, -torch.inf
    # a filter that meets an infinity with a zero
    weight[3] = 0
    got = guarded_launch(lambda *t: launch_conv3x3_fwd(*t, True, VARIANTS[variant]), x, weight, bias)
    _assert_near(got, x, weight, bias)


@pytest.mark.interpreter
@pytest.mark.parametrize("variant", ["pointers, split", "descriptors, 3 taps a load", "direct"])
def test_the_order_of_programs_does_not_matter(variant: str) -> None:
    tensors = _made(1, _channels(variant), 9, 12, 40, torch.float32)
    assert_order_does_not_matter(
        lambda: guarded_launch(lambda *t: launch_conv3x3_fwd(*t, True, VARIANTS[variant]), *tensors), seeds=2
    )


@pytest.mark.interpreter
@pytest.mark.parametrize("variant", ["pointers", "direct"])
@pytest.mark.parametrize("axis", range(4), ids="NCHW")
def test_addresses_beyond_two_to_the_31(axis: int, variant: str) -> None:
    # the last two values along the axis lie beyond 2^31 elements; the pages in between are never touched
    shape, stride = [1, 1, 3, 3], [1, 1, 1, 1]
    shape[axis] = max(shape[axis], 2)
    stride[axis] = 2**31 // (shape[axis] - 1) + 64
    stride[3 if axis != 3 else 2] = 1 if axis != 2 else 4
    if axis < 2:
        stride[2] = 3
    storage = torch.empty(2**31 + 4096, dtype=torch.float16)
    x = storage.as_strided(shape, stride)
    x.copy_(torch.randn(shape))
    weight, bias = torch.randn(2, shape[1], 3, 3).half(), torch.zeros(2).half()
    got = launch_conv3x3_fwd(x, weight, bias, False, VARIANTS[variant])
    _assert_near(got, x.contiguous(), weight, bias, relu=False)


@pytest.mark.interpreter
def test_an_empty_batch_launches_nothing() -> None:
    for blocks in (b for b in VARIANTS.values() if b.kernel != "descriptors"):
        y = launch_conv3x3_fwd(torch.empty(0, 16, 5, 5), torch.empty(8, 16, 3, 3), torch.empty(8), True, blocks)
        assert y.shape == (0, 8, 3, 3)


@pytest.mark.interpreter
@every_dtype
@pytest.mark.parametrize("size", [(2, 9, 11), (1, 10, 12), (1, 4, 5)], ids=str)
def test_the_maxima_come_out_of_the_same_pass(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, weight, bias = _whole_numbers(_made(size[0], 16, *size[1:], 24, dtype))
    rows, columns = min(3, size[1] - 2), min(4, size[2] - 2)
    window, pooled = guarded_launch(
        lambda *t: launch_conv3x3_pool_fwd(*t, True, rows, columns, VARIANTS["pointers"]), x, weight, bias
    )
    y = reference.conv3x3_relu(x.double(), weight.double(), bias.double())
    assert torch.equal(window, reference.crop_to(y, rows, columns).to(dtype))
    assert torch.equal(pooled, F.max_pool2d(y, 2).to(dtype))
    for t in (window, pooled):
        assert t.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_maximum_of_nan_is_nan_and_of_infinity_infinite() -> None:
    x, weight, bias = _made(1, 16, 8, 8, 16, torch.float32)
    x[0, 0, 0, 0], x[0, 1, 7, 7] = torch.nan, torch.inf
    window, pooled = launch_conv3x3_pool_fwd(x, weight, bias, True, 6, 6, VARIANTS["pointers"])
    # one NaN among four, and four infinities or NaN
    assert_same_bits(pooled.isnan(), F.max_pool2d(window, 2).isnan())
    torch.testing.assert_close(pooled, F.max_pool2d(window, 2), equal_nan=True, rtol=0, atol=0)


@pytest.mark.interpreter
@given(
    c_in=st.integers(1, 40),
    c_out=st.integers(1, 40),
    h=st.integers(3, 9),
    w=st.integers(3, 9),
    n=st.integers(1, 2),
    layout=st.sampled_from(list(LAYOUTS)),
    chip=st.sampled_from([80, 90]),
)
def test_whatever_is_offered_for_a_shape_is_right(
    c_in: int, c_out: int, h: int, w: int, n: int, layout: str, chip: int
) -> None:
    tensors = _whole_numbers(_made(n, c_in, h, w, c_out, torch.float32, layout))
    want = reference.conv3x3_relu(*(t.double() for t in tensors))
    # on a GPU it is asked about that one
    with _triton.pretending(chip if _triton.INTERPRETED else 0):
        offered = ours(*tensors[:2])
    assert offered
    # the first few: at these sizes the rest differs in block shapes only
    for blocks in offered[:2]:
        got = launch_conv3x3_fwd(*tensors, True, blocks)
        assert torch.equal(got.double(), want), blocks
        assert got.stride() == reference.conv3x3_relu(*tensors).stride()


@pytest.mark.interpreter
@given(
    c_up=st.sampled_from([16, 24, 32]),
    c_skip=st.sampled_from([16, 32]),
    h=st.integers(3, 7),
    w=st.integers(3, 7),
    n=st.integers(1, 3),
    taller=st.sampled_from([0, 2, 5]),
    wider=st.sampled_from([0, 0, 3]),
    chip=st.sampled_from([80, 90]),
)
def test_whatever_is_offered_for_two_maps_is_right(
    c_up: int, c_skip: int, h: int, w: int, n: int, taller: int, wider: int, chip: int
) -> None:
    up, weight, bias = _whole_numbers(_made(n, c_up, h, w, 16, torch.float32))
    skip, weight_of_skip, _ = _whole_numbers(_made(n, c_skip, h + taller, w + wider, 16, torch.float32))
    weight = awkward(torch.cat([weight, weight_of_skip], 1), "channels_last")
    want = reference.conv3x3_relu_cat(up.double(), skip.double(), weight.double(), bias.double())
    window = reference.crop_to(skip, h, w)
    with _triton.pretending(chip if _triton.INTERPRETED else 0):
        offered = ours(up, weight, window)
    assert offered
    # one of each kind: at these sizes the rest differs in block shapes only
    for blocks in {blocks.kernel: blocks for blocks in reversed(offered)}.values():
        got = launch_conv3x3_fwd(up, weight, bias, True, blocks, window)
        assert torch.equal(got.double(), want), blocks


# what is offered


def _case(up: Tensor, skip: Tensor, weight: Tensor) -> str:
    return case_of([up, reference.crop_to(skip, *up.shape[2:])], weight, True)


def test_what_descriptors_cannot_name_is_another_case() -> None:
    def made(n: int, c: int, h: int, w: int) -> Tensor:
        return torch.empty(n, c, h, w, device="meta", memory_format=torch.channels_last)

    weight = made(16, 32, 3, 3)
    dense = _case(made(2, 16, 6, 6), made(2, 16, 6, 6), weight)
    assert dense.endswith("channels_last, relu")
    # a decision is kept by case, and what is decided runs unasked
    taller = _case(made(2, 16, 6, 6), made(2, 16, 10, 6), weight)
    assert taller.endswith("channels_last, a window, relu")
    # of one image the rest is never reached
    assert _case(made(1, 16, 6, 6), made(1, 16, 10, 6), weight).endswith("channels_last, relu")
    assert case_of([made(70_000, 16, 5, 5)], made(16, 16, 3, 3), True).endswith("a window, relu")
    unaligned = torch.empty(2, 6, 6, 6, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    cases = {case_of([t], torch.empty(16, 6, 3, 3), True) for t in (unaligned, unaligned.contiguous())}
    assert len(cases) == 2


def test_descriptors_are_offered_where_a_map_is_a_matrix_only() -> None:
    weight = awkward(torch.empty(64, 64, 3, 3, dtype=torch.bfloat16), "channels_last")

    def kernels(x: Tensor, w: Tensor = weight) -> set[str]:
        with _triton.pretending(90):
            return {blocks.kernel for blocks in ours(x, w)}

    x = awkward(torch.empty(1, 64, 20, 20, dtype=torch.bfloat16), "channels_last")
    assert kernels(x) == {"descriptors", "pointers"}
    assert kernels(x.contiguous()) == {"pointers"}
    assert kernels(x, weight.contiguous()) == {"pointers"}
    # twelve channels begin every other pixel at 8 bytes
    assert kernels(x[:, :12], weight[:, :12]) == {"pointers"}
    assert kernels(x[:, 1:33], weight[:, :32].contiguous(memory_format=torch.channels_last)) == {"pointers"}
    with _triton.pretending(86):
        assert {blocks.kernel for blocks in ours(x, weight)} == {"pointers"}


def test_few_blocks_are_split_among_programs_and_many_are_not() -> None:
    def splits(pixels: int) -> set[int]:
        found = blocks_for(torch.bfloat16, "ieee", 90, (1024,), 1024, pixels, 132)
        return {blocks.splits for blocks in found}

    # the bottom of the paper's net at tile 572, and its first level
    assert max(splits(28 * 28)) > 1
    assert splits(568 * 568) == {1}
    # every share is worth its start, and partial sums stay within bounds
    for blocks in blocks_for(torch.bfloat16, "ieee", 90, (64,), 64, 100, 132):
        assert 9 * 64 // blocks.BLOCK_K // blocks.splits >= 4


@given(c_in=st.integers(1, 300), c_out=st.integers(1, 300), chip=st.sampled_from([80, 86, 89, 90, 100, 120]))
def test_something_is_offered_for_every_width(c_in: int, c_out: int, chip: int) -> None:
    for dtype, precision in ((torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")):
        found = blocks_for(dtype, precision, chip, (c_in,), c_out, 10_000, 132)
        assert any(blocks.kernel == "pointers" for blocks in found)
        assert len(found) == len({str(blocks) for blocks in found}), "two ways share a name"
        # a product of matrices takes 16 at least; nothing is wider than it need be
        assert all(blocks.BLOCK_N >= 16 and blocks.BLOCK_K >= 16 for blocks in found)


# ahead of time


def _launches() -> Iterator[tuple[str, int, torch.dtype, str, Blocks, str]]:
    """(name, chip, dtype, precision, blocks, what is asked of the kernel) of what the tables hold."""
    for kind, dtype in (("16 bits", torch.bfloat16), ("tf32", torch.float32), ("ieee", torch.float32)):
        for chip in (80, 86, 89, 90):
            for blocks in dict.fromkeys(sum(_conv3x3_fwd._TABLE[kind][chip // 10], ())):
                for asked in _asked(blocks, chip, dtype):
                    yield f"{kind}, sm_{chip}, {blocks}, {asked}", chip, dtype, kind, blocks, asked
            for c_in, BLOCK_P in ((1, 64), (3, 64), (1, 128)):
                if (dtype, BLOCK_P) != (torch.float32, 128):
                    blocks = Blocks("direct", BLOCK_P, 64, 16 if c_in == 1 else 32, 4, 1)
                    yield f"{kind}, sm_{chip}, {blocks}, {c_in} in", chip, dtype, kind, blocks, f"{c_in} in"


def _asked(blocks: Blocks, chip: int, dtype: torch.dtype) -> tuple[str, ...]:
    # one code generator makes sm_80, 86 and 89: what is asked is shared out among them
    if blocks.taps == 3 or blocks.weight_first:
        return ("one map", "two maps") if chip in (80, 90) else ("one map",)
    pool = ("maxima",) if makes_maxima(blocks, dtype) else ()
    if chip == 90:
        return "one map", "two maps, split", *pool
    return {80: ("one map", *pool), 86: ("two maps, split",), 89: ("two maps",)}[chip]


AHEAD = {name: rest for name, *rest in _launches()}


def _code(chip: int, dtype: torch.dtype, kind: str, blocks: Blocks, asked: str) -> Any:
    from tests.proof import aot

    many = blocks.BLOCK_N > 64
    c_in, c_out = (256, 256) if many else (64, 64)
    if blocks.kernel == "direct":
        c_in = int(asked.split()[0])
    c_skip = c_in if "two maps" in asked else 0

    def empty(*shape: int) -> Tensor:
        _, c, h, w = shape
        return torch.empty_strided(shape, (c * h * w, 1, w * c, c), dtype=dtype, device="meta")

    x, weight, bias = empty(1, c_in, 100, 100), empty(c_out, c_in + c_skip, 3, 3), torch.empty(c_out, dtype=dtype)
    skip = empty(1, c_skip, 100, 100) if c_skip else None
    blocks = replace(blocks, splits=3) if "split" in asked else blocks

    def call() -> None:
        if asked == "maxima":
            launch_conv3x3_pool_fwd(x, weight, bias.to("meta"), True, 50, 50, blocks)
        else:
            launch_conv3x3_fwd(x, weight, bias.to("meta"), True, blocks, skip)

    precision = kind if dtype == torch.float32 else "ieee"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_triton, "precision", lambda dtype: precision)
        launch = aot.all_recorded(_conv3x3_fwd, call)[0]
    return aot.compiled(launch, chip)


def _budget(chip: int, kind: str, blocks: Blocks) -> Any:
    from tests.proof import aot

    wide = (r"STG\.E\.128",)
    if blocks.kernel == "direct":
        return aot.Budget(registers=255, must_have=wide)
    product = "FFMA" if kind == "ieee" else "HGMMA" if chip == 90 else "HMMA"
    fetched = "UTMALDG" if blocks.kernel == "descriptors" else r"LDGSTS\.E(\.BYPASS)?(\.LTC128B)?\.128"
    # operands of an HGMMA come from shared memory as they are: what is loaded into registers first is loaded twice
    banned = ("LDSM", r"\bLDL", r"\bSTL") if product == "HGMMA" else (r"\bLDL", r"\bSTL")
    return aot.Budget(
        registers=255, must_have=wide, main_loop=product, loop_must_have=(fetched,), loop_must_not_have=banned
    )


QUICK = ("16 bits, sm_90, descriptors 128x128x64, 4 warps, 3 stages, one map", "16 bits, sm_86, pointers 128x64x64")


@pytest.mark.parametrize("name", [n if n.startswith(QUICK) else pytest.param(n, marks=pytest.mark.slow) for n in AHEAD])
def test_compiled_code_is_within_budget_and_as_recorded(name: str) -> None:
    import triton

    chip, dtype, kind, blocks, asked = AHEAD[name]
    code = _code(chip, dtype, kind, blocks, asked)
    _budget(chip, kind, blocks).check(code)
    recorded = json.loads(GOLDEN.read_text()).get(triton.__version__)
    if recorded is None:
        pytest.skip(f"no registers recorded for Triton {triton.__version__}: python -m {__name__} records them")
    want = recorded[name]
    used = [code.registers, code.stack_bytes, code.shared_bytes]
    assert used == want, f"[registers, stack, shared bytes] {used}, recorded {want}; python -m {__name__} records anew"


def test_nothing_is_recorded_that_is_not_compiled() -> None:
    for version, recorded in json.loads(GOLDEN.read_text()).items():
        assert set(recorded) == set(AHEAD), version


def _record() -> None:
    """Write what the kernels use into the golden file, for the Triton that is installed."""
    import triton

    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    golden[triton.__version__] = {
        name: [code.registers, code.stack_bytes, code.shared_bytes]
        for name, rest in AHEAD.items()
        for code in [_code(*rest)]
    }
    GOLDEN.parent.mkdir(exist_ok=True)
    lines = [
        f' "{version}": {{\n' + ",\n".join(f"  {json.dumps(n)}: {u}" for n, u in sorted(used.items())) + "\n }"
        for version, used in sorted(golden.items())
    ]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    _record()
