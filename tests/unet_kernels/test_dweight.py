"""The kernels of the weights' and biases' gradients: every way to cut them equals torch's; compiled, none spills."""

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
from tests.proof.yardstick import assert_gradient, assert_same_bits
from unet_kernels import _dweight, _triton
from unet_kernels._conv3x3_fwd import Blocks
from unet_kernels._dweight import CONV1X1, CONV3X3, DECONV2X2, Filter, blocks_for, launch_dweight, ours

pytestmark = pytest.mark.usefixtures("on_device")

GOLDEN = Path(__file__).parent / "golden" / "dweight.json"

# every kernel in every variant, at sizes that the interpreter bears
VARIANTS = {
    "one tap": Blocks("pointers", 64, 32, 32, 4, 3),
    "one tap, strips": Blocks("pointers", 32, 32, 32, 4, 3, splits=3),
    "a row of taps, strips": Blocks("pointers", 32, 32, 32, 4, 2, taps=3, splits=2),
    "all taps": Blocks("pointers", 64, 32, 32, 4, 2, taps=9),
    "all taps, strips": Blocks("pointers", 32, 32, 32, 4, 2, taps=9, splits=3),
    "direct": Blocks("direct", 64, 32, 32, 4, 2),
    "direct, strips": Blocks("direct", 32, 32, 32, 4, 2, splits=3),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

every_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(autouse=True)
def what_runs_here(request: pytest.FixtureRequest) -> None:
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if _triton.INTERPRETED and parameters.get("dtype") == torch.bfloat16:
        pytest.skip("the interpreter's bfloat16 arithmetic is wrong")


def _channels(variant: str) -> int:
    return 3 if "direct" in variant else 40


def _made(n: int, c_in: int, h: int, w: int, c_out: int, dtype: torch.dtype, layout: str = "channels_last") -> Any:
    """(dz, x, a weight in whose strides the gradient comes)."""
    made = torch.randn(n, c_out, h - 2, w - 2), torch.randn(n, c_in, h, w).relu(), torch.zeros(c_out, c_in, 3, 3)
    return [awkward(t.to(dtype), layout) for t in made]


def _launched(dz: Tensor, x: Tensor, weight: Tensor, blocks: Blocks, filter_: Filter = CONV3X3) -> Any:
    """(dweight, dbias)."""
    dweight = torch.empty_like(weight)
    found = dweight.transpose(0, 1) if filter_.deconvolves else dweight
    return dweight, launch_dweight(dz, x, found, True, blocks, filter_)


def _torchs(dz: Tensor, x: Tensor, weight: Tensor, deconvolves: bool = False) -> list[Tensor]:
    weight, bias = weight.detach().clone().requires_grad_(), weight.new_zeros(dz.shape[1]).requires_grad_()
    y = F.conv_transpose2d(x, weight, bias, stride=2) if deconvolves else F.conv2d(x, weight, bias)
    return list(torch.autograd.grad(y, [weight, bias], dz))


def _assert_near(got: Any, dz: Tensor, x: Tensor, weight: Tensor, deconvolves: bool = False) -> None:
    exact = _torchs(dz.double(), x.double(), weight.double(), deconvolves)
    for gradient, torchs, true in zip(got, _torchs(dz, x, weight, deconvolves), exact, strict=True):
        assert_gradient(torchs, gradient, true)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "size", [(2, 9, 11), *(pytest.param(s, marks=pytest.mark.slow) for s in ((1, 3, 3), (1, 4, 70)))], ids=str
)
@every_variant
def test_every_variant_is_as_near_as_torch(variant: str, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    # (N, H, W): dz of one pixel; a batch of odd sizes; lines longer than a step
    tensors = _made(size[0], _channels(variant), *size[1:], 40, dtype)
    _assert_near(guarded_launch(lambda *t: _launched(*t, VARIANTS[variant]), *tensors), *tensors)


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", ["one tap, strips", "all taps", "direct, strips"])
def test_addresses_may_have_any_strides_and_the_gradient_the_weights(variant: str, layout: str) -> None:
    tensors = _made(2, 3 if "direct" in variant else 13, 6, 7, 7, torch.float32, layout)
    got = guarded_launch(lambda *t: _launched(*t, VARIANTS[variant]), *tensors)
    _assert_near(got, *tensors)
    if layout in ("contiguous", "channels_last"):
        assert got[0].stride() == tensors[2].stride()


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "window of channels_last"])
@pytest.mark.parametrize("splits", [1, 3])
def test_of_a_deconvolution(splits: int, layout: str) -> None:
    x, weight, dz = torch.randn(2, 13, 5, 6), torch.zeros(13, 20, 2, 2), torch.randn(2, 20, 10, 12)
    dz, x, weight = (awkward(t, layout) for t in (dz, x, weight))
    blocks = Blocks("pointers", 32, 32, 16, 4, 3, splits=splits)
    got = guarded_launch(lambda *t: _launched(*t, blocks, DECONV2X2), dz, x, weight)
    _assert_near(got, dz, x, weight, True)


@pytest.mark.interpreter
@every_variant
def test_of_two_maps_each_fills_its_part(variant: str) -> None:
    if "direct" in variant:
        pytest.skip("maps of a few channels are not concatenated")
    dz, x, weight = _made(2, 40, 6, 7, 16, torch.float32)

    def both(dz: Tensor, x: Tensor, weight: Tensor) -> Any:
        dweight = torch.empty_like(weight)
        dbias = launch_dweight(dz, x[:, :24], dweight[:, :24], True, VARIANTS[variant])
        assert launch_dweight(dz, x[:, 24:], dweight[:, 24:], False, VARIANTS[variant]) is None
        return dweight, dbias

    _assert_near(guarded_launch(both, dz, x, weight), dz, x, weight)


@pytest.mark.interpreter
@every_variant
def test_in_float32_nothing_is_rounded_to_sixteen_bits(variant: str) -> None:
    dz, x, weight = _made(1, _channels(variant), 8, 9, 16, torch.float16)
    got = _launched(dz, x, weight.float(), VARIANTS[variant])
    for gradient, exact in zip(got, _torchs(dz.double(), x.double(), weight.double()), strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@every_variant
def test_nan_reaches_the_taps_that_saw_it_and_no_other(variant: str) -> None:
    dz, x, weight = _made(1, _channels(variant), 7, 9, 16, torch.float32)
    # the corner is seen by one tap, the last column by one of each row
    x[0, 0, 0, 0], x[0, 1, 3, 8], x[0, 2, 6, 7] = torch.nan, torch.inf, torch.nan
    _assert_near(guarded_launch(lambda *t: _launched(*t, VARIANTS[variant]), dz, x, weight), dz, x, weight)
    x, dz = x.nan_to_num(0, 0, 0), dz.clone()
    dz[0, 3, 4, 6] = torch.nan
    _assert_near(guarded_launch(lambda *t: _launched(*t, VARIANTS[variant]), dz, x, weight), dz, x, weight)


@pytest.mark.interpreter
@every_variant
def test_dz_may_be_one_value_for_all(variant: str) -> None:
    # what .sum().backward() hands back
    _, x, weight = _made(1, _channels(variant), 6, 7, 16, torch.float32)
    dz = torch.full((1, 1, 1, 1), 0.5).expand(1, 16, 4, 5)
    _assert_near(_launched(dz, x, weight, VARIANTS[variant]), dz, x, weight)


@pytest.mark.interpreter
@pytest.mark.parametrize("variant", ["one tap, strips", "direct, strips"])
def test_the_order_of_programs_does_not_matter_and_bits_repeat(variant: str) -> None:
    tensors = _made(1, _channels(variant), 9, 12, 40, torch.float32)
    assert_order_does_not_matter(
        lambda: guarded_launch(lambda *t: _launched(*t, VARIANTS[variant])[0], *tensors), seeds=2
    )
    for a, b in zip(*(_launched(*tensors, VARIANTS[variant]) for _ in range(2)), strict=True):
        assert_same_bits(a, b)


@pytest.mark.interpreter
@pytest.mark.parametrize("which", ["dz", "x"])
@pytest.mark.parametrize("axis", range(4), ids="NCHW")
def test_addresses_beyond_two_to_the_31(axis: int, which: str) -> None:
    def far(*shape: int) -> Tensor:
        """Its last values along the axis lie beyond 2^31 elements; the pages in between are never touched."""
        stride = [1, 1, 1, 1]
        stride[axis] = 2**31 // (shape[axis] - 1) + 64
        stride[3 if axis != 3 else 2] = 1 if axis != 2 else 8
        if axis < 2:
            stride[2] = shape[3]
        t = torch.empty(2**31 + 4096, dtype=torch.float16).as_strided(shape, stride)
        return t.copy_(torch.randn(shape))

    n, c = (2, 1) if axis == 0 else (1, 2)
    dz = far(n, c, 2, 2) if which == "dz" else torch.randn(n, c, 2, 2).half()
    x = far(n, c, 4, 4) if which == "x" else torch.randn(n, c, 4, 4).half()
    weight = torch.zeros(c, c, 3, 3).half()
    got = _launched(dz, x, weight, VARIANTS["one tap"])
    _assert_near(got, dz.contiguous(), x.contiguous(), weight)


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
    dz, x, weight = (t.copy_(torch.randint(-3, 4, t.shape)) for t in _made(n, c_in, h, w, c_out, torch.float32, layout))
    # on a GPU it is asked about that one
    with _triton.pretending(chip if _triton.INTERPRETED else 0):
        offered = ours(dz, x)
    assert offered
    want = _torchs(dz.double(), x.double(), weight.double())
    # one of each kind: at these sizes the rest differs in block shapes only
    for blocks in {(blocks.kernel, blocks.taps): blocks for blocks in reversed(offered)}.values():
        for a, b in zip(_launched(dz, x, weight, blocks), want, strict=True):
            assert torch.equal(a.double(), b), blocks


# what is offered


@given(
    c_in=st.integers(1, 1100),
    c_out=st.integers(1, 1100),
    pixels=st.integers(1, 400_000),
    chip=st.sampled_from([80, 86, 89, 90, 100, 120]),
    filter_=st.sampled_from([CONV3X3, DECONV2X2, CONV1X1]),
)
def test_something_is_offered_for_every_width(c_in: int, c_out: int, pixels: int, chip: int, filter_: Filter) -> None:
    for dtype, precision in ((torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")):
        found = blocks_for(dtype, precision, chip, filter_, c_in, c_out, pixels, 132)
        assert any(blocks.kernel == "pointers" and blocks.taps == 1 for blocks in found)
        assert len(found) == len({str(blocks) for blocks in found}), "two ways share a name"
        for blocks in found:
            assert min(blocks.BLOCK_N, blocks.BLOCK_K) >= 16
            # partial sums stay within bounds, and no strip is too short to be worth its start
            if blocks.splits > 1:
                assert 4 * c_in * c_out * filter_.taps * blocks.splits <= _dweight.MOST_PARTIAL_BYTES
                assert pixels / blocks.BLOCK_P / blocks.splits > 7


def test_a_small_filter_over_many_pixels_is_cut_into_strips() -> None:
    # the first level of the paper's net at tile 572, and its bottom
    first, *_ = blocks_for(torch.bfloat16, "ieee", 90, CONV3X3, 64, 64, 568 * 568, 132)
    assert first.taps == 9
    assert first.splits >= 132
    bottom, *_ = blocks_for(torch.bfloat16, "ieee", 90, CONV3X3, 1024, 1024, 28 * 28, 132)
    assert bottom.splits == 1


# ahead of time


def _launches() -> Iterator[tuple[str, int, torch.dtype, str, Blocks]]:
    """(name, chip, dtype, precision, blocks) of what the tables hold."""
    for kind, dtype in (("16 bits", torch.bfloat16), ("tf32", torch.float32), ("ieee", torch.float32)):
        for chip in (80, 86, 89, 90):
            for i, blocks in enumerate(dict.fromkeys(sum(_dweight._TABLE[kind][chip // 10], ()))):
                # one code generator makes sm_80, 86 and 89: each of the latter has a part of the table
                if chip in (80, 90) or i % 2 == (chip == 89):
                    yield f"{kind}, sm_{chip}, {blocks}", chip, dtype, kind, blocks
            if chip in (80, 90):
                for c_in in (1, 3):
                    with _triton.pretending(chip):
                        direct = blocks_for(dtype, kind, chip, CONV3X3, c_in, 64, 100_000, 132)[0]
                    blocks = replace(direct, splits=1)
                    yield f"{kind}, sm_{chip}, {blocks}, {c_in} in", chip, dtype, kind, blocks


AHEAD = {name: rest for name, *rest in _launches()}


def _code(name: str) -> Any:
    from tests.proof import aot

    chip, dtype, kind, blocks = AHEAD[name]
    c_in, c_out = (256, 256) if max(blocks.BLOCK_N, blocks.BLOCK_K) > 64 else (64, 64)
    if blocks.kernel == "direct":
        c_in = int(name.split()[-2])

    def empty(*shape: int) -> Tensor:
        _, c, h, w = shape
        return torch.empty_strided(shape, (c * h * w, 1, w * c, c), dtype=dtype, device="meta")

    dz, x, weight = empty(1, c_out, 98, 98), empty(1, c_in, 100, 100), empty(c_out, c_in, 3, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_triton, "precision", lambda dtype: kind if dtype == torch.float32 else "ieee")
        launches = aot.all_recorded(_dweight, lambda: _launched(dz, x, weight, blocks))
    return aot.compiled(launches[0], chip)


QUICK = ("16 bits, sm_90, pointers 64x64x64, 9 taps", "16 bits, sm_86, pointers 64x64x64, 3 taps")


@pytest.mark.parametrize("name", [n if n.startswith(QUICK) else pytest.param(n, marks=pytest.mark.slow) for n in AHEAD])
def test_compiled_code_is_within_budget_and_as_recorded(name: str) -> None:
    from tests.proof import aot, golden

    chip, _, kind, blocks = AHEAD[name]
    code = _code(name)
    product = "FFMA" if kind == "ieee" else "HGMMA" if chip == 90 else "HMMA"
    banned = ("LDSM", r"\bLDL", r"\bSTL") if product == "HGMMA" else (r"\bLDL", r"\bSTL")
    # maps come through asynchronous copies; tf32 on sm_90 wants both turned, and one channel is copied by itself
    copied = r"LDGSTS\.E" if kind == "tf32" else r"LDGSTS\.E(\.BYPASS)?(\.LTC128B)?\.128"
    narrow = blocks.kernel == "direct"
    aot.Budget(
        registers=255,
        main_loop=product,
        loop_must_have=() if narrow else (copied,),
        loop_must_not_have=banned,
    ).check(code)
    golden.assert_as_recorded(GOLDEN, name, code, __name__)


def test_nothing_is_recorded_that_is_not_compiled() -> None:
    from tests.proof import golden

    golden.assert_complete(GOLDEN, AHEAD)


if __name__ == "__main__":
    from tests.proof import golden

    golden.record(GOLDEN, AHEAD, _code)
