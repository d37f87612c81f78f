"""Up-convolution: twice the rows and columns, usually half the channels. Two readings of the paper's one sentence.

"deconv" (what the authors' release does): ConvTranspose2d(2, stride 2), one tap reaches each output,

    y[n, co, 2h + a, 2w + b] = bias[co] + sum_ci x[n, ci, h, w] weight[ci, co, a, b]

"resize" (what the paper's text says): a 2x2 convolution of the map doubled by repetition, its bottom and right edge
repeated once more so that nothing is invented and 2H x 2W comes out. The doubled map is never stored: output phase
(a, b) only ever sees source pixels (h .. h + a, w .. w + b), so it is a (1 + a) x (1 + b) convolution of x itself with
the taps that fall on one source pixel summed beforehand. That is 9 taps a source pixel instead of 16. (On a plain CPU
tensor smaller than its weight the expression itself is cheaper, and is what runs.)
Derivation: docs/mathematics.md, section 3.

`_fwd_kernel` does both: a program makes BLOCK_N channels of one phase (a, b) of BLOCK_P source pixels, a product of
[BLOCK_P, C_in] and [C_in, BLOCK_N] for each of the phase's taps, and stores each row where the phase has its pixels:
every second one of every second line.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _aten, _checks, _choosing, _conv3x3_fwd, _dweight, _layout, _triton, reference
from ._choosing import Question, Way
from ._triton import jit, tl

__all__ = ["launch_up_conv_dx", "launch_up_conv_fwd", "question", "question_dx", "up_conv"]

# the one with all four taps first: it alone sees the weight as it is, and so chooses ATen's memory format
PHASES = ((1, 1), (1, 0), (0, 1), (0, 0))


@jit
def _fwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, bias_ptr, y_ptr,
    H, W, pixels, C_in, C_out,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_wt, stride_wi, stride_wo,
    stride_yn, stride_yc, stride_yh, stride_yw,
    RESIZE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # weight: one [C_in, C_out] matrix per phase, or per phase and tap: 1 + 2 + 2 + 4 of them
    blocks_n = tl.cdiv(C_out, BLOCK_N)
    i = tl.program_id(0) // blocks_n * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    co = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    phase = tl.program_id(1)
    a, b = phase // 2, phase % 2
    p = tl.minimum(i, pixels - 1)
    n, h, w = (p // W // H).to(tl.int64), (p // W % H).to(tl.int64), (p % W).to(tl.int64)
    x_rows = x_ptr + (n * stride_xn + h * stride_xh + w * stride_xw)[:, None]  # [BLOCK_P, 1]
    w_columns = weight_ptr + (tl.minimum(co, C_out - 1).to(tl.int64) * stride_wo)[None, :]  # [1, BLOCK_N]
    if RESIZE:
        # the last line (column) is repeated: a step beyond it leads nowhere
        down = tl.where(h < H - 1, stride_xh, 0)[:, None]
        right = tl.where(w < W - 1, stride_xw, 0)[:, None]
        taps = (1 + a) * (1 + b)
        first = phase * (phase + 1) // 2 - phase // 3
    else:
        taps = 1
        first = phase
    blocks_k = tl.cdiv(C_in, BLOCK_K)
    acc = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for k in range(taps * blocks_k):
        tap = k // blocks_k
        c = k % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        x_at = x_rows + (c.to(tl.int64) * stride_xc)[None, :]
        if RESIZE:
            x_at += tap // (1 + b) * down + tap % (1 + b) * right
        w_at = w_columns + tl.cast(first + tap, tl.int64) * stride_wt + (c.to(tl.int64) * stride_wi)[:, None]
        if EVEN:
            x, weight = tl.load(x_at), tl.load(w_at)
        else:
            x = tl.load(x_at, mask=(c < C_in)[None, :], other=0.0)
            weight = tl.load(w_at, mask=(c < C_in)[:, None], other=0.0)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
    acc += tl.load(bias_ptr + co, mask=co < C_out, other=0.0).to(tl.float32)[None, :]
    y_rows = y_ptr + (n * stride_yn + (2 * h + a) * stride_yh + (2 * w + b) * stride_yw)[:, None]
    y_at = y_rows + (co.to(tl.int64) * stride_yc)[None, :]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=(i < pixels)[:, None] & (co < C_out)[None, :])


@jit
def _dx_kernel(  # type: ignore[no-untyped-def]
    dy_ptr, weight_ptr, x_ptr, dx_ptr,
    H, W, pixels, H_x, W_x, C_out, C_in,
    stride_yn, stride_yc, stride_yh, stride_yw,
    stride_wt, stride_wi, stride_wo,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_dn, stride_dc, stride_dh, stride_dw,
    RESIZE: tl.constexpr, MASK: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # dx is H x W; of "resize" that is one line and one column more than x, those that were repeated
    blocks_n = tl.cdiv(C_in, BLOCK_N)
    i = tl.program_id(0) // blocks_n * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    ci = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    p = tl.minimum(i, pixels - 1)
    # of the nine (four) products of a pixel: whether there is such a pixel of dy
    row, column = p // W % H, p % W
    n, h, w = (p // W // H).to(tl.int64), row.to(tl.int64), column.to(tl.int64)
    y_rows = dy_ptr + (n * stride_yn + 2 * h * stride_yh + 2 * w * stride_yw)[:, None]  # [BLOCK_P, 1]
    wanted = ci < C_in
    w_rows = weight_ptr + (ci.to(tl.int64) * stride_wi)[:, None]  # [BLOCK_N, 1]
    blocks_k = tl.cdiv(C_out, BLOCK_K)
    acc = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for k in range((9 if RESIZE else 4) * blocks_k):
        tap = k // blocks_k
        c = k % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        if RESIZE:
            # taps 0; 1 and 2; 3 and 4; 5 to 8 are those of the phases (0, 0), (0, 1), (1, 0), (1, 1)
            phase = (tap >= 1).to(tl.int32) + (tap >= 3).to(tl.int32) + (tap >= 5).to(tl.int32)
            a, b = phase // 2, phase % 2
            within = tap - (phase * (phase + 1) // 2 - phase // 3)
            down, right = within // (1 + b), within % (1 + b)
            there = (row >= down) & (row - down < H_x) & (column >= right) & (column - right < W_x)
            # the source pixel (h - down, w - right) made the pixels of this phase that saw (h, w)
            y_h, y_w = tl.cast(a - 2 * down, tl.int64), tl.cast(b - 2 * right, tl.int64)
        else:
            there = i < pixels
            y_h, y_w = tl.cast(tap // 2, tl.int64), tl.cast(tap % 2, tl.int64)
        y_at = y_rows + (y_h * stride_yh + y_w * stride_yw) + (c.to(tl.int64) * stride_yc)[None, :]
        w_at = w_rows + tl.cast(tap, tl.int64) * stride_wt + (c.to(tl.int64) * stride_wo)[None, :]
        if EVEN:
            dy = tl.load(y_at, mask=there[:, None], other=0.0)
            weight = tl.load(w_at, mask=wanted[:, None], other=0.0)
        else:
            dy = tl.load(y_at, mask=there[:, None] & (c < C_out)[None, :], other=0.0)
            weight = tl.load(w_at, mask=wanted[:, None] & (c < C_out)[None, :], other=0.0)
        acc = tl.dot(dy, tl.trans(weight), acc, input_precision=PRECISION)
    stored = (i < pixels)[:, None] & wanted[None, :]
    ci = ci.to(tl.int64)
    if MASK:
        x_at = x_ptr + (n * stride_xn + h * stride_xh + w * stride_xw)[:, None] + (ci * stride_xc)[None, :]
        # not `x > 0`: a NaN lets its gradient through
        acc = tl.where(tl.load(x_at, mask=stored, other=0.0) <= 0, 0.0, acc)
    dx_at = dx_ptr + (n * stride_dn + h * stride_dh + w * stride_dw)[:, None] + (ci * stride_dc)[None, :]
    tl.store(dx_at, acc.to(dx_ptr.dtype.element_ty), mask=stored)


@dataclass(frozen=True, slots=True)
class Blocks:
    """What a program makes: BLOCK_P source pixels times BLOCK_N channels, BLOCK_K channels a step."""

    BLOCK_P: int
    BLOCK_N: int
    BLOCK_K: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"pointers {self.BLOCK_P}x{self.BLOCK_N}x{self.BLOCK_K}, {self.warps} warps, {self.stages} stages"


# what compiles without spills on every chip, the most promising first
_TABLE = {
    "16 bits": (Blocks(128, 128, 64, 8, 3), Blocks(128, 64, 64, 4, 3), Blocks(64, 128, 64, 4, 3)),
    "tf32": (Blocks(128, 64, 32, 4, 3), Blocks(64, 64, 32, 4, 3)),
    "ieee": (Blocks(64, 64, 32, 4, 3),),
}


def blocks_for(dtype: torch.dtype, precision: str, C_in: int, C_out: int) -> list[Blocks]:
    found = []
    for blocks in _TABLE[precision if dtype == torch.float32 else "16 bits"]:
        BLOCK_N, BLOCK_K = (
            min(block, max(16, 1 << (channels - 1).bit_length()))
            for block, channels in ((blocks.BLOCK_N, C_out), (blocks.BLOCK_K, C_in))
        )
        found.append(Blocks(blocks.BLOCK_P, BLOCK_N, BLOCK_K, blocks.warps, blocks.stages))
    return list(dict.fromkeys(found))


def launch_up_conv_fwd(x: Tensor, weight: Tensor, bias: Tensor, mode: str, blocks: Blocks) -> Tensor:
    N, C_in, H, W = x.shape
    C_out = weight.shape[1 if mode == "deconv" else 0]
    y = _layout.empty_convolved((N, C_out, 2 * H, 2 * W), weight, x)
    if y.numel() == 0:
        return y
    if mode == "deconv":
        taps, axes = _as_matrices(weight), (0, 1, 2)
    else:
        taps, axes = _summed_by_phase(weight), (0, 2, 1)
    pixels = N * H * W
    # one program per block of source pixels and channels, per phase
    grid = (-(-pixels // blocks.BLOCK_P) * -(-C_out // blocks.BLOCK_N), 4)
    with _triton.on_device(x):
        _fwd_kernel[grid](
            x, taps, bias, y, H, W, pixels, C_in, C_out,
            *x.stride(), *(taps.stride(axis) for axis in axes), *y.stride(),
            RESIZE=mode == "resize", EVEN=C_in % blocks.BLOCK_K == 0, PRECISION=_triton.precision(x.dtype),
            BLOCK_P=blocks.BLOCK_P, BLOCK_N=blocks.BLOCK_N, BLOCK_K=blocks.BLOCK_K,
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
    return y


def launch_up_conv_dx(dy: Tensor, weight: Tensor, x: Tensor, mask: bool, mode: str, blocks: Blocks) -> Tensor:
    """dx in x's layout; with `mask` zero where x, then a ReLU's result, is."""
    N, C_in, H_x, W_x = x.shape
    C_out = dy.shape[1]
    resize = mode == "resize"
    # what the repeated line and column were given is added to those that they repeat
    H, W = (H_x + 1, W_x + 1) if resize else (H_x, W_x)
    dx = torch.empty((N, C_in, H, W), dtype=dy.dtype, device=dy.device, memory_format=_layout.of(x))
    if dx.numel() == 0:
        return dx[:, :, :H_x, :W_x]
    taps, axes = (_summed_by_phase(weight), (0, 2, 1)) if resize else (_as_matrices(weight), (0, 1, 2))
    pixels = N * H * W
    # one program per block of pixels and channels
    grid = (-(-pixels // blocks.BLOCK_P) * -(-C_in // blocks.BLOCK_N),)
    with _triton.on_device(dy):
        _dx_kernel[grid](
            dy, taps, x, dx, H, W, pixels, H_x, W_x, C_out, C_in,
            *dy.stride(), *(taps.stride(axis) for axis in axes), *x.stride(), *dx.stride(),
            RESIZE=resize, MASK=mask and not resize, EVEN=C_out % blocks.BLOCK_K == 0,
            PRECISION=_triton.precision(dy.dtype),
            BLOCK_P=blocks.BLOCK_P, BLOCK_N=blocks.BLOCK_N, BLOCK_K=blocks.BLOCK_K,
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
    if not resize:
        return dx
    return _aten.masked(_folded(dx), x) if mask else _folded(dx)


def _as_matrices(weight: Tensor) -> Tensor:
    """weight [C_in, C_out, 2, 2] as [phase, C_in, C_out]: a view, where it lies in one of ATen's two formats."""
    return weight.permute(2, 3, 0, 1).flatten(0, 1)


def _summed_by_phase(weight: Tensor) -> Tensor:
    """The nine matrices [C_out, C_in] of the four phases, one behind the other in the order of phases and taps."""
    in_order = ((0, 0), (0, 1), (1, 0), (1, 1))
    return torch.cat([_summed(weight, a, b).permute(2, 3, 0, 1).flatten(0, 1) for a, b in in_order])


def question(x: Tensor, weight: Tensor, bias: Tensor, mode: str) -> Question:
    C_in, C_out = x.shape[1], weight.shape[1 if mode == "deconv" else 0]

    def ways() -> list[Way]:
        found = [Way("ATen", reference.up_conv, False)]
        if mode == "resize":
            found.append(Way("ATen, by phase", _by_phase, False))
        for blocks in blocks_for(x.dtype, _triton.precision(x.dtype), C_in, C_out):
            found.append(Way(str(blocks), functools.partial(launch_up_conv_fwd, blocks=blocks), True))
        return found

    def cut(arguments: tuple[Any, ...], lines: int) -> tuple[Any, ...]:
        return (arguments[0][:, :, :lines], *arguments[1:])

    pixels = _choosing.octave(x.shape[0] * x.shape[2] * x.shape[3])
    of_weight = "" if _layout.suggests_channels_last(weight) else ", weight in other strides"
    case = f"{mode}, {C_in} -> {C_out}, {pixels}, {_choosing.arithmetic(x.dtype)}, {_layout.words(x)}{of_weight}"
    return Question("up_conv", case, ways, reference.up_conv, cut)


@torch.library.custom_op("unet::up_conv", mutates_args=())
@_checks.outside_autocast
def _op(x: Tensor, weight: Tensor, bias: Tensor, mode: str, mask_dx: bool = False) -> Tensor:
    # without a choice, by phase: the doubled map is four times the one it is made of
    plain = reference.up_conv if mode == "deconv" else _by_phase
    given = x, weight.to(x.dtype), bias.to(x.dtype), mode
    return _choosing.computed(question, _aten.through_float32(plain), given)


def _by_phase(x: Tensor, weight: Tensor, bias: Tensor, mode: str) -> Tensor:
    padded = F.pad(x, (0, 1, 0, 1), mode="replicate")
    height, width = x.shape[-2:]
    phases = [F.conv2d(_seen(padded, a, b, height, width), _summed(weight, a, b), bias) for a, b in PHASES]
    y = _doubled(phases[0])
    for (a, b), phase in zip(PHASES, phases, strict=True):
        y[:, :, a::2, b::2] = phase
    return y


def _doubled(phase: Tensor) -> Tensor:
    """An empty map of twice the rows and columns, in the memory format of phase, which a convolution chose."""
    n, c, height, width = phase.shape
    # not `is_contiguous`: with one channel or one pixel both formats are contiguous, and strides say which is meant
    channels_last = phase.stride(1) == 1 and phase.stride(3) == c
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((n, c, 2 * height, 2 * width), dtype=phase.dtype, device=phase.device, memory_format=layout)


def _seen(padded: Tensor, a: int, b: int, height: int, width: int) -> Tensor:
    return padded[:, :, : height + a, : width + b]


def _summed(weight: Tensor, a: int, b: int) -> Tensor:
    """The taps of phase (a, b): those that read one source pixel are summed (in float32 for 16-bit weights)."""
    axes = [axis for axis, phase in ((2, a), (3, b)) if phase == 0]
    if not axes:
        return weight
    wide = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
    return wide.sum(axes, keepdim=True).to(weight.dtype)


@_op.register_fake
@_checks.outside_autocast
def _(x: Tensor, weight: Tensor, bias: Tensor, mode: str, mask_dx: bool = False) -> Tensor:
    # a fake whose body is the ATen composite gets the strides right
    return reference.up_conv(x, weight.to(x.dtype), bias.to(x.dtype), mode)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.mode, ctx.mask = inputs
    ctx.save_for_backward(x, weight)


@_checks.outside_autocast
def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
    if not _choosing.derives(dy, x, weight):
        return *_by_aten(dy, x, weight, [for_x, for_weight, for_bias], ctx.mask, ctx.mode), None, None
    dx = _checks.untraced(_dx_op, _dx, dy, weight, x, ctx.mask, ctx.mode) if for_x else None
    if for_weight and ctx.mode == "deconv":
        return dx, *_dweight.dweight(dy, weight, x, with_bias=for_bias, deconvolves=True), None, None
    dweight = _checks.untraced(_resize_dweight_op, _resize_dweight, dy, weight, x) if for_weight else None
    dbias = dy.sum((0, 2, 3), dtype=torch.float32).to(weight.dtype) if for_bias else None
    return dx, dweight, dbias, None, None


def _by_aten(
    dy: Tensor, x: Tensor, weight: Tensor, needs: list[bool], mask: bool, mode: str
) -> tuple[Tensor | None, ...]:
    """(dx, dweight, dbias), each where it is needed, the parameters' in their own dtype."""
    narrow = weight.to(dy.dtype)
    x = _aten.made_by_relu(x) if mask else x
    dx: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None
    if mode == "deconv":
        dx, dweight, dbias = _aten.convolution_backward(dy, x, narrow, needs, stride=2, transposed=True)
    else:
        dx, dweight = _resize_backward(dy, x, narrow, needs)
        dbias = dy.sum((0, 2, 3)) if needs[2] else None
    dx = _aten.masked(dx, x) if dx is not None and mask else dx
    return dx, *(t if t is None else t.to(weight.dtype) for t in (dweight, dbias))


# of the gradients, which way


def _dx_by_aten(dy: Tensor, weight: Tensor, x: Tensor, mask: bool, mode: str) -> Tensor:
    dx = _by_aten(dy, x, weight, [True, False, False], mask, mode)[0]
    assert dx is not None
    return dx


def _dx_by_us(dy: Tensor, weight: Tensor, x: Tensor, mask: bool, mode: str, blocks: Blocks) -> Tensor:
    return launch_up_conv_dx(dy, weight, x, mask, mode, blocks)


def question_dx(dy: Tensor, weight: Tensor, x: Tensor, mask: bool, mode: str) -> Question:
    def ways() -> list[Way]:
        found = [Way("ATen", _dx_by_aten, False)]
        for blocks in blocks_for(dy.dtype, _triton.precision(dy.dtype), dy.shape[1], x.shape[1]):
            found.append(Way(str(blocks), functools.partial(_dx_by_us, blocks=blocks), True))
        return found

    def cut(arguments: tuple[Any, ...], lines: int) -> tuple[Any, ...]:
        dy, weight, x, *rest = arguments
        return (dy[:, :, : lines // 2 * 2], weight, x[:, :, : lines // 2], *rest)

    case = f"{_gradients_case(dy, weight, x, mode)}{', masked' if mask else ''}"
    return Question("up_conv_dx", case, ways, _dx_by_aten, cut, any_strides=True)


def _gradients_case(dy: Tensor, weight: Tensor, x: Tensor, mode: str) -> str:
    pixels = _choosing.octave(x.shape[0] * x.shape[2] * x.shape[3])
    of_weight = "" if _layout.suggests_channels_last(weight) else ", weight in other strides"
    laid_out = f"{_layout.words(dy, x)}{of_weight}"
    return f"{mode}, {dy.shape[1]} -> {x.shape[1]}, {pixels}, {_choosing.arithmetic(dy.dtype)}, {laid_out}"


def _dx(dy: Tensor, weight: Tensor, x: Tensor, mask: bool, mode: str) -> Tensor:
    dx = _choosing.computed(question_dx, _dx_by_aten, (dy, weight.to(dy.dtype), x, mask, mode))
    return dx.contiguous(memory_format=_layout.of(x))


@torch.library.custom_op("unet::up_conv_dx", mutates_args=())
def _dx_op(dy: Tensor, weight: Tensor, x: Tensor, mask: bool, mode: str) -> Tensor:
    return _dx(dy, weight, x, mask, mode)


@_dx_op.register_fake
def _(dy: Tensor, weight: Tensor, x: Tensor, mask: bool, mode: str) -> Tensor:
    return _layout.empty_as(x, dy.dtype)


def _resize_dweight_by_aten(dy: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    dweight = _resize_backward(dy, x, weight.to(dy.dtype), [False, True])[1]
    assert dweight is not None
    return dweight.to(weight.dtype)


def _resize_dweight_by_us(dy: Tensor, weight: Tensor, x: Tensor, blocks: _conv3x3_fwd.Blocks) -> Tensor:
    """Phase by phase: each is a convolution of one, two or four taps; what a summed tap gets, every tap in it gets."""
    height, width = x.shape[-2:]
    padded = F.pad(x, (0, 1, 0, 1), mode="replicate")
    dweight = torch.zeros(weight.shape, dtype=torch.float32, device=x.device)
    for a, b in PHASES:
        of_phase = torch.empty((*weight.shape[:2], 1 + a, 1 + b), dtype=torch.float32, device=x.device)
        seen, taps = _seen(padded, a, b, height, width), _dweight.Filter(1 + a, 1 + b)
        _dweight.launch_dweight(dy[:, :, a::2, b::2], seen, of_phase, False, blocks, taps)
        dweight.add_(of_phase)
    return torch.empty_like(weight).copy_(dweight)


def question_resize_dweight(dy: Tensor, weight: Tensor, x: Tensor) -> Question:
    def ways() -> list[Way]:
        found = [Way("ATen", _resize_dweight_by_aten, False)]
        for blocks in _dweight.ours(dy[:, :, ::2, ::2], x, _dweight.Filter(2, 2)):
            found.append(Way(str(blocks), functools.partial(_resize_dweight_by_us, blocks=blocks), True))
        return found

    def cut(arguments: tuple[Any, ...], lines: int) -> tuple[Any, ...]:
        dy, weight, x = arguments
        return (dy[:, :, : lines // 2 * 2], weight, x[:, :, : lines // 2])

    wide = ", in float32" if weight.dtype != dy.dtype else ""
    case = f"{_gradients_case(dy, weight, x, 'resize')}{wide}"
    return Question("up_conv_dweight", case, ways, _resize_dweight_by_aten, cut, any_strides=True)


def _resize_dweight(dy: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    found = _choosing.computed(question_resize_dweight, _resize_dweight_by_aten, (dy, weight, x))
    return found if found.stride() == weight.stride() else torch.empty_like(weight).copy_(found)


@torch.library.custom_op("unet::up_conv_resize_dweight", mutates_args=())
def _resize_dweight_op(dy: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    return _resize_dweight(dy, weight, x)


@_resize_dweight_op.register_fake
def _(dy: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(weight)


# as a whole: its parts add up in float32
@_aten.through_float32
def _resize_backward(dy: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor | None, Tensor | None]:
    height, width = x.shape[-2:]
    padded = F.pad(x, (0, 1, 0, 1), mode="replicate")
    dpadded, dweight = torch.zeros_like(padded), torch.zeros_like(weight)
    for a, b in PHASES:
        taps, seen = _summed(weight, a, b), _seen(padded, a, b, height, width)
        dseen, dtaps, _ = _aten.convolution_backward(dy[:, :, a::2, b::2], seen, taps, [*needs[:2], False])
        if needs[0]:
            _seen(dpadded, a, b, height, width).add_(dseen)
        if needs[1]:
            # a summed tap hands its gradient to every tap in the sum
            dweight.add_(dtaps)
    if not needs[0]:
        return None, dweight if needs[1] else None
    return _folded(dpadded), dweight if needs[1] else None


def _folded(dpadded: Tensor) -> Tensor:
    """The gradient of a map of that of its padding: the repeated edge gives back to the row (column) it repeats."""
    height, width = dpadded.shape[2] - 1, dpadded.shape[3] - 1
    dpadded[:, :, height - 1].add_(dpadded[:, :, height])
    dpadded[:, :, :, width - 1].add_(dpadded[:, :, :, width])
    return dpadded[:, :, :height, :width]


_op.register_autograd(_backward, setup_context=_setup)


def up_conv(x: Tensor, weight: Tensor, bias: Tensor, *, mode: str, mask_dx: bool = False) -> Tensor:
    """2x2 up-convolution.

    Args:
        x: [N, C_in, H, W], H and W at least 1; float32, float16, bfloat16 or float64.
        weight: "deconv": [C_in, C_out, 2, 2], as nn.ConvTranspose2d keeps it. "resize": [C_out, C_in, 2, 2], as
            nn.Conv2d keeps it. Dtype and device of x.
        bias: [C_out], likewise.
        mode: "deconv" equals `conv_transpose2d(x, weight, bias, stride=2)`; "resize" equals
            `conv2d(pad(interpolate(x, scale_factor=2), (0, 1, 0, 1), "replicate"), weight, bias)`.
        mask_dx: as of `conv3x3_relu`: a ReLU made x, and its mask is applied to x's gradient.

    Returns:
        [N, C_out, 2 H, 2 W], dtype of x, in the strides of those expressions. Differentiable in x, weight and bias.
        Under autocast the arguments are cast to its dtype.

    Raises:
        TypeError: an argument is no tensor, or its dtype is not floating or differs from x's.
        ValueError: a shape or device does not fit, or mode is neither of the two.

    >>> up_conv(torch.zeros(1, 1024, 28, 28), torch.zeros(1024, 512, 2, 2), torch.zeros(512), mode="deconv").shape
    torch.Size([1, 512, 56, 56])
    """
    _checks.expect_choice("mode", mode, ("deconv", "resize"))
    _checks.expect_float("x", x, "N, C_in, H, W")
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"x must have at least one row and one column, got {x.shape[2]}x{x.shape[3]}")
    channels, outputs = x.shape[1], 1 if mode == "deconv" else 0
    _checks.expect_float("weight", weight, "C_in, C_out, 2, 2" if mode == "deconv" else "C_out, C_in, 2, 2")
    wanted = (channels, -1, 2, 2) if mode == "deconv" else (-1, channels, 2, 2)
    _checks.expect_size("weight", weight, wanted, f'for mode "{mode}" (C_in is the channels of x)')
    _checks.expect_float("bias", bias, "C_out")
    _checks.expect_size("bias", bias, (weight.shape[outputs],), "(one per output channel of weight)")
    if weight.numel() < 1:
        raise ValueError(f"weight must have at least one channel in and out, got {list(weight.shape)}")
    (x,) = _checks.autocast(x)
    weight, bias = _choosing.parameters(x, weight, bias)
    if _checks.transformed():
        return reference.up_conv(x, weight, bias, mode)
    if mask_dx:
        return _op(x, weight, bias, mode, mask_dx)
    ordinary = _choosing.ordinary_on_cpu(x) and not _aten.is_narrow(x)
    # four products with sums of a weight that is larger than the map cost more than doubling the map
    if ordinary and (mode == "deconv" or x.numel() < weight.numel()):
        return reference.up_conv(x, weight, bias, mode)
    return _op(x, weight, bias, mode)
