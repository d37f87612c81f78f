"""The kernels of a 3x3 convolution's dx: every way to cut it equals torch's; compiled, none spills."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.proof.memory import LAYOUTS, awkward, guarded_launch
from tests.proof.order import assert_order_does_not_matter
from tests.proof.properties import given, st
from tests.proof.yardstick import assert_gradient, assert_same_bits
from unet_kernels import _conv3x3_dx, _conv3x3_fwd, _triton
from unet_kernels._conv3x3_dx import launch_conv3x3_dx, ours, question
from unet_kernels._conv3x3_fwd import Blocks

pytestmark = pytest.mark.usefixtures("on_device")

GOLDEN = Path(__file__).parent / "golden" / "conv3x3_dx.json"

# every kernel in every variant, at sizes that the interpreter bears
VARIANTS = {
    "pointers": Blocks("pointers", 128, 32, 16, 4, 3),
    "pointers, split": Blocks("pointers", 128, 32, 16, 4, 3, splits=3),
    "descriptors": Blocks("descriptors", 128, 32, 16, 4, 3),
    "descriptors, weight first": Blocks("descriptors", 128, 32, 16, 4, 3, weight_first=True),
    "descriptors, split": Blocks("descriptors", 128, 32, 16, 4, 3, splits=4),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

every_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(autouse=True)
def what_runs_here(request: pytest.FixtureRequest, device: torch.device) -> None:
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if _triton.INTERPRETED and parameters.get("dtype") == torch.bfloat16:
        pytest.skip("the interpreter's bfloat16 arithmetic is wrong")
    if "descriptors" in str(parameters.get("variant")) and device.type == "cuda" and _triton.chip(device) != 90:
        pytest.skip("descriptors are for sm_90")


def _made(n: int, c_out: int, h: int, w: int, c_in: int, dtype: torch.dtype, layout: str = "channels_last") -> Any:
    """(dz, weight, x): x is a ReLU's result."""
    dz, weight = torch.randn(n, c_out, h - 2, w - 2), torch.randn(c_out, c_in, 3, 3) / (3 * c_out**0.5)
    x = torch.randn(n, c_in, h, w).relu()
    return [awkward(t.to(dtype), layout) for t in (dz, weight, x)]


def _torchs(dz: Tensor, weight: Tensor, x: Tensor, mask: bool) -> Tensor:
    dx = torch.nn.grad.conv2d_input(x.shape, weight, dz)
    return torch.where(x <= 0, 0, dx) if mask else dx


def _assert_near(got: Tensor, dz: Tensor, weight: Tensor, x: Tensor, mask: bool) -> None:
    exact = _torchs(dz.double(), weight.double(), x.double(), mask)
    assert_gradient(_torchs(dz, weight, x, mask), got, exact)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "size", [(2, 9, 11), *(pytest.param(s, marks=pytest.mark.slow) for s in ((1, 3, 3), (1, 4, 70)))], ids=str
)
@every_variant
def test_every_variant_is_as_near_as_torch(variant: str, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    # (N, H, W): dz of one pixel; a batch of odd sizes; lines longer than a block
    tensors = _made(size[0], 32, *size[1:], 40, dtype)
    got = guarded_launch(lambda *t: launch_conv3x3_dx(*t, True, 0, VARIANTS[variant]), *tensors)
    _assert_near(got, *tensors, True)


@pytest.mark.interpreter
@pytest.mark.parametrize("mask", [False, True])
@every_variant
def test_of_two_maps_each_has_its_channels_of_the_weight(variant: str, mask: bool) -> None:
    dz, weight, x = _made(2, 16, 7, 8, 40, torch.float32)
    # those of the second map do not begin at a block
    skip = x[:, 24:].contiguous(memory_format=torch.channels_last)
    got = guarded_launch(lambda *t: launch_conv3x3_dx(*t, mask, 24, VARIANTS[variant]), dz, weight, skip)
    _assert_near(got, dz, weight[:, 24:], skip, mask)


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", [v for v, b in VARIANTS.items() if b.kernel == "pointers"])
def test_addresses_may_have_any_strides(variant: str, layout: str) -> None:
    # prime channels: the last step is masked
    tensors = _made(2, 13, 6, 7, 7, torch.float32, layout)
    got = guarded_launch(lambda *t: launch_conv3x3_dx(*t, True, 0, VARIANTS[variant]), *tensors)
    _assert_near(got, *tensors, True)


@pytest.mark.interpreter
@every_variant
def test_dz_may_be_one_value_for_all(variant: str) -> None:
    # what .sum().backward() hands back
    _, weight, x = _made(1, 16, 6, 7, 16, torch.float32)
    dz = torch.full((1, 1, 1, 1), 0.5).expand(1, 16, 4, 5)
    _assert_near(launch_conv3x3_dx(dz, weight, x, False, 0, VARIANTS[variant]), dz, weight, x, False)


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@every_variant
def test_nan_goes_where_torchs_goes_and_through_the_mask(variant: str) -> None:
    dz, weight, x = _made(1, 16, 9, 8, 24, torch.float32)
    dz[0, 3, 2, 4], dz[0, 1, 6, 5], x[0, 5, 8, 1] = torch.nan, torch.inf, torch.nan
    got = guarded_launch(lambda *t: launch_conv3x3_dx(*t, True, 0, VARIANTS[variant]), dz, weight, x)
    _assert_near(got, dz, weight, x, True)


@pytest.mark.interpreter
@pytest.mark.parametrize("variant", ["pointers, split", "descriptors"])
def test_the_order_of_programs_does_not_matter(variant: str) -> None:
    tensors = _made(1, 16, 9, 12, 40, torch.float32)
    assert_order_does_not_matter(
        lambda: guarded_launch(lambda *t: launch_conv3x3_dx(*t, True, 0, VARIANTS[variant]), *tensors), seeds=2
    )


@pytest.mark.interpreter
@pytest.mark.parametrize("axis", range(4), ids="NCHW")
def test_addresses_beyond_two_to_the_31(axis: int) -> None:
    # the last two values along the axis lie beyond 2^31 elements; the pages in between are never touched
    shape, stride = [1, 1, 2, 2], [1, 1, 1, 1]
    shape[axis] = 2
    stride[axis] = 2**31 + 64
    stride[3 if axis != 3 else 2] = 1 if axis != 2 else 4
    if axis < 2:
        stride[2] = 2
    dz = torch.empty(2**31 + 4096, dtype=torch.float16).as_strided(shape, stride)
    dz.copy_(torch.randn(shape))
    _, weight, x = _made(shape[0], shape[1], 4, 4, 2, torch.float16)
    got = launch_conv3x3_dx(dz, weight, x, False, 0, VARIANTS["pointers"])
    _assert_near(got, dz.contiguous(), weight, x, False)


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
    # whole numbers, whose sums are exact in any order
    tensors = [t.copy_(torch.randint(-3, 4, t.shape)) for t in _made(n, c_out, h, w, c_in, torch.float32, layout)]
    # on a GPU it is asked about that one
    with _triton.pretending(chip if _triton.INTERPRETED else 0):
        offered = ours(*tensors[:2], c_in)
    assert offered
    for blocks in {blocks.kernel: blocks for blocks in reversed(offered)}.values():
        got = launch_conv3x3_dx(*tensors, True, 0, blocks)
        assert torch.equal(got.double(), _torchs(*(t.double() for t in tensors), True)), blocks


@pytest.mark.interpreter
def test_the_same_bits_every_time() -> None:
    tensors = _made(1, 16, 8, 9, 24, torch.float16)
    for variant in VARIANTS.values():
        first, again = (launch_conv3x3_dx(*tensors, True, 0, variant) for _ in range(2))
        assert_same_bits(first, again)


def test_descriptors_are_offered_where_pixels_begin_evenly_only() -> None:
    dz, weight, _ = _made(1, 64, 20, 20, 64, torch.bfloat16)

    def kernels(dz: Tensor, weight: Tensor) -> set[str]:
        with _triton.pretending(90):
            return {blocks.kernel for blocks in ours(dz, weight, 64)}

    # dz may lie anyhow: it is copied
    assert kernels(dz, weight) == kernels(dz.contiguous(), weight) == {"descriptors", "pointers"}
    assert kernels(dz, weight.contiguous()) == {"pointers"}
    assert kernels(dz[:, :12], weight[:12]) == {"pointers"}
    with _triton.pretending(86):
        assert {blocks.kernel for blocks in ours(dz, weight, 64)} == {"pointers"}


def test_a_copy_that_a_budget_does_not_know_of_is_not_made() -> None:
    def made(side: int) -> tuple[set[str], str]:
        dz, weight = (
            torch.empty(s, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
            for s in ((1, 64, side - 2, side - 2), (64, 64, 3, 3))
        )
        x = torch.empty(1, 64, side, side, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
        with _triton.pretending(90):
            return {b.kernel for b in ours(dz, weight, 64)}, question(dz, weight, x, True, 0).case

    (small, of_small), (large, of_large) = made(568), made(1944)
    assert small == {"descriptors", "pointers"}
    assert large == {"pointers"}
    # what runs unasked is kept by case
    assert of_small != of_large.replace("2^19", "2^18.5")
    assert "no descriptors" in of_large


# ahead of time


def _launches() -> Iterator[tuple[str, int, torch.dtype, str, Blocks, bool]]:
    """(name, chip, dtype, precision, blocks, whether masked) of what the tables hold."""
    for kind, dtype in (("16 bits", torch.bfloat16), ("tf32", torch.float32), ("ieee", torch.float32)):
        for chip in (80, 86, 89, 90):
            for i, blocks in enumerate(dict.fromkeys(sum(_conv3x3_fwd._TABLE[kind][chip // 10], ()))):
                # one code generator makes sm_80, 86 and 89: each has a part of the table
                if blocks.taps == 1 and (chip in (80, 90) or i % 2 == (chip == 89)):
                    asked = replace(blocks, splits=3 if chip == 86 else 1)
                    name = f"{kind}, sm_{chip}, {asked}"
                    yield name, chip, dtype, kind, asked, chip != 86


AHEAD = {name: rest for name, *rest in _launches()}


def _code(name: str) -> Any:
    from tests.proof import aot

    chip, dtype, kind, blocks, mask = AHEAD[name]
    c_in, c_out = (256, 256) if blocks.BLOCK_N > 64 else (64, 64)

    def empty(*shape: int) -> Tensor:
        _, c, h, w = shape
        return torch.empty_strided(shape, (c * h * w, 1, w * c, c), dtype=dtype, device="meta")

    dz, weight, x = empty(1, c_out, 98, 98), empty(c_out, c_in, 3, 3), empty(1, c_in, 100, 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_triton, "precision", lambda dtype: kind if dtype == torch.float32 else "ieee")
        launches = aot.all_recorded(_conv3x3_dx, lambda: launch_conv3x3_dx(dz, weight, x, mask, 0, blocks))
    return aot.compiled(next(each for each in launches if "margin" not in each.kernel.__name__), chip)


QUICK = ("16 bits, sm_90, descriptors 128x128x64", "16 bits, sm_86, pointers 128x64x64")


@pytest.mark.parametrize("name", [n if n.startswith(QUICK) else pytest.param(n, marks=pytest.mark.slow) for n in AHEAD])
def test_compiled_code_is_within_budget_and_as_recorded(name: str) -> None:
    from tests.proof import aot, golden

    chip, _, kind, blocks, _ = AHEAD[name]
    code = _code(name)
    product = "FFMA" if kind == "ieee" else "HGMMA" if chip == 90 else "HMMA"
    fetched = "UTMALDG" if blocks.kernel == "descriptors" else r"LDGSTS\.E(\.BYPASS)?(\.LTC128B)?\.128"
    # operands of an HGMMA come from shared memory as they are; tf32 wants the weight turned, which takes registers
    banned = ("LDSM", r"\bLDL", r"\bSTL") if product == "HGMMA" else (r"\bLDL", r"\bSTL")
    wide = () if kind == "tf32" and chip == 90 else (fetched,)
    aot.Budget(
        registers=255,
        must_have=(r"STG\.E\.128",),
        main_loop=product,
        loop_must_have=wide,
        loop_must_not_have=banned,
    ).check(code)
    golden.assert_as_recorded(GOLDEN, name, code, __name__)


def test_nothing_is_recorded_that_is_not_compiled() -> None:
    from tests.proof import golden

    golden.assert_complete(GOLDEN, AHEAD)


if __name__ == "__main__":
    from tests.proof import golden

    golden.record(GOLDEN, AHEAD, _code)
