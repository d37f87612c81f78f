"""Kernels of the gradient that an unpadded 3x3 convolution hands back to its input, and the ways they are launched.

    dx[n, ci, h, w] = sum_{co, r, s} dz[n, co, h - r, w - s] weight[co, ci, r, s]        dz is zero where there is none

That is the forward's product once more: the shifted blocks are of dz, the shifts negative, and the weight is read with
its channels exchanged, where it lies (docs/mathematics.md, section 2). What made x is usually a ReLU; then its mask,
[not (x <= 0)], is applied where a block is finished (`MASK`), and no pass over the map is needed for it.

`_pointers_kernel`     any strides (an expanded dz too), any chip with tensor cores: which of the nine pixels that saw a
                       pixel exist is worked out once, as nine bits, and what does not exist is loaded as zero.
`_descriptors_kernel`  sm_90: boxes fetched by the copy engine out of a copy of dz with two zero pixels all around it
                       (`_margin_kernel`), in which a full correlation is a valid convolution.
`_finish_kernel`       adds up what several programs made of one pixel (split).

All sums are float32. Of a concatenation each map's gradient is a launch of its own, over its channels of the weight.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _aten, _checks, _choosing, _conv3x3_fwd, _layout, _triton
from ._choosing import Question, Way
from ._conv3x3_fwd import Blocks
from ._triton import jit, tl

__all__ = ["dx", "launch_conv3x3_dx", "ours", "question"]

# the copy of dz that descriptors read
MOST_MARGIN_BYTES = 64 << 20


@jit
def _masked(acc, x_at, inside):  # type: ignore[no-untyped-def]
    """acc where the ReLU that made x let it through; not `x > 0`, so that a NaN in x lets its gradient through."""
    x = tl.load(x_at, mask=inside, other=0.0)
    return tl.where(x <= 0, 0.0, acc)


@jit
def _share(count, steps, SPLIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """(first, last): which of `count` steps this program takes."""
    if SPLIT:
        first = tl.program_id(1) * steps
        last = tl.minimum(first + steps, count)
    else:
        first, last = 0, count
    return first, last


@jit
def _pointers_kernel(  # type: ignore[no-untyped-def]
    dz_ptr, weight_ptr, x_ptr, dx_ptr,
    H, W, pixels, C_out, C_in, steps,
    stride_zn, stride_zc, stride_zh, stride_zw,
    stride_wo, stride_wi, stride_wr, stride_ws,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_dn, stride_dc, stride_dh, stride_dw, stride_dsplit,
    MASK: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks_n = tl.cdiv(C_in, BLOCK_N)
    i = tl.program_id(0) // blocks_n * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    ci = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    # beyond the last pixel the last one is computed again and not stored: addresses stay inside, unmasked
    p = tl.minimum(i, pixels - 1)
    row, column = p // W % H, p % W
    n, h, w = (p // (H * W)).to(tl.int64), row.to(tl.int64), column.to(tl.int64)
    # bit 3 r + s: whether dz has the pixel (h - r, w - s)
    down = tl.where(row < H - 2, 0b000000111, 0)
    down += tl.where((row >= 1) & (row < H - 1), 0b000111000, 0) + tl.where(row >= 2, 0b111000000, 0)
    across = tl.where(column < W - 2, 0b001001001, 0)
    across += tl.where((column >= 1) & (column < W - 1), 0b010010010, 0) + tl.where(column >= 2, 0b100100100, 0)
    seen = down & across
    z_rows = dz_ptr + (n * stride_zn + h * stride_zh + w * stride_zw)[:, None]  # [BLOCK_P, 1]
    # not so the channels: what is clamped is no longer known to lie side by side
    w_columns = weight_ptr + (ci.to(tl.int64) * stride_wi)[None, :]  # [1, BLOCK_N]
    wanted = (ci < C_in)[None, :]
    acc = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    first, last = _share(9 * tl.cdiv(C_out, BLOCK_K), steps, SPLIT)
    for k in range(first, last):
        r, s = tl.cast(k % 9 // 3, tl.int64), tl.cast(k % 3, tl.int64)
        c = k // 9 * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        there = (((seen >> (k % 9)) & 1) == 1)[:, None]
        z_at = z_rows - (r * stride_zh + s * stride_zw) + (c.to(tl.int64) * stride_zc)[None, :]
        w_at = w_columns + (r * stride_wr + s * stride_ws) + (c.to(tl.int64) * stride_wo)[:, None]
        if EVEN:
            dz, weight = tl.load(z_at, mask=there, other=0.0), tl.load(w_at, mask=wanted, other=0.0)
        else:
            dz = tl.load(z_at, mask=there & (c < C_out)[None, :], other=0.0)
            weight = tl.load(w_at, mask=(c < C_out)[:, None] & wanted, other=0.0)
        acc = tl.dot(dz, weight, acc, input_precision=PRECISION)
    stored = (i < pixels)[:, None] & wanted
    if SPLIT:
        dx_ptr += tl.program_id(1).to(tl.int64) * stride_dsplit
    elif MASK:
        x_at = x_ptr + (n * stride_xn + h * stride_xh + w * stride_xw)[:, None]
        acc = _masked(acc, x_at + (ci.to(tl.int64) * stride_xc)[None, :], stored)
    dx_at = dx_ptr + (n * stride_dn + h * stride_dh + w * stride_dw)[:, None] + (ci.to(tl.int64) * stride_dc)[None, :]
    tl.store(dx_at, acc.to(dx_ptr.dtype.element_ty), mask=stored)


@jit
def _descriptors_kernel(  # type: ignore[no-untyped-def]
    dz_desc, weight_desc, x_ptr, dx_ptr,
    H, W, pitch, rows, C_out, C_weight, first_ci, C_in, steps,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_dn, stride_dc, stride_dh, stride_dw, stride_dsplit,
    MASK: tl.constexpr, SPLIT: tl.constexpr, WEIGHT_FIRST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # dz_desc: [images x rows, C_out], margins included, `pitch` of them a line; weight_desc: [C_out, 9 C_weight]
    blocks_n = tl.cdiv(C_in, BLOCK_N)
    m, ci0 = tl.program_id(0) // blocks_n * BLOCK_P, tl.program_id(0) % blocks_n * BLOCK_N
    row = tl.program_id(2) * rows + m
    acc = tl.zeros([BLOCK_N, BLOCK_P], tl.float32) if WEIGHT_FIRST else tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    first, last = _share(9 * (C_out // BLOCK_K), steps, SPLIT)
    for k in range(first, last):
        c = k // 9 * BLOCK_K
        dz = dz_desc.load([row + k % 9 // 3 * pitch + k % 3, c])
        # the weight turned by half a turn: tap 8 - t meets what the shift of tap t shows
        weight = weight_desc.load([c, (8 - k % 9) * C_weight + first_ci + ci0])
        if WEIGHT_FIRST:
            acc = tl.dot(weight.T, dz.T, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(dz, weight, acc, input_precision=PRECISION)
    if WEIGHT_FIRST:
        acc = tl.trans(acc)
    at = m + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    ci = ci0 + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    n, h, w = tl.program_id(2).to(tl.int64), (at // pitch).to(tl.int64), (at % pitch).to(tl.int64)
    # two junk pixels end each line
    stored = ((h < H) & (w < W))[:, None] & (ci < C_in)[None, :]
    if SPLIT:
        dx_ptr += tl.program_id(1).to(tl.int64) * stride_dsplit
    elif MASK:
        x_at = x_ptr + (n * stride_xn + h * stride_xh + w * stride_xw)[:, None]
        acc = _masked(acc, x_at + (ci.to(tl.int64) * stride_xc)[None, :], stored)
    dx_at = dx_ptr + (n * stride_dn + h * stride_dh + w * stride_dw)[:, None] + (ci.to(tl.int64) * stride_dc)[None, :]
    tl.store(dx_at, acc.to(dx_ptr.dtype.element_ty), mask=stored)


@jit
def _margin_kernel(  # type: ignore[no-untyped-def]
    dz_ptr, wide_ptr,
    H, W, pixels, C,
    stride_zn, stride_zc, stride_zh, stride_zw,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # wide: [N, H, W, C], dz [N, C, H - 4, W - 4] in its middle, zeros around it
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)  # [BLOCK_C]
    n, h, w = (p // W // H).to(tl.int64), (p // W % H).to(tl.int64) - 2, (p % W).to(tl.int64) - 2
    there = (h >= 0) & (h < H - 4) & (w >= 0) & (w < W - 4)
    stored = (p < pixels)[:, None] & (c < C)[None, :]
    z_at = dz_ptr + (n * stride_zn + h * stride_zh + w * stride_zw)[:, None] + (c * stride_zc)[None, :]
    dz = tl.load(z_at, mask=stored & there[:, None], other=0.0)
    tl.store(wide_ptr + p.to(tl.int64)[:, None] * C + c[None, :], dz, mask=stored)


@jit
def _finish_kernel(  # type: ignore[no-untyped-def]
    partial_ptr, x_ptr, dx_ptr,
    H, W, C, values, splits,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_dn, stride_dc, stride_dh, stride_dw,
    MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # partial: [splits, N, H, W, C], added in one order
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = i < values
    acc = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        acc += tl.load(partial_ptr + tl.cast(split, tl.int64) * values + i, mask=inside, other=0.0)
    c, p = i % C, i // C
    n, h, w = p // W // H, p // W % H, p % W
    if MASK:
        acc = _masked(acc, x_ptr + n * stride_xn + c * stride_xc + h * stride_xh + w * stride_xw, inside)
    dx_at = dx_ptr + n * stride_dn + c * stride_dc + h * stride_dh + w * stride_dw
    tl.store(dx_at, acc.to(dx_ptr.dtype.element_ty), mask=inside)


def ours(dz: Tensor, weight: Tensor, channels: int) -> list[Blocks]:
    """Our launches that can make the gradient of `channels` channels, the most promising first."""
    N, C_out, H_out, W_out = dz.shape
    chip, processors = _triton.chip(dz.device), _triton.processors(dz.device)
    pixels = N * (H_out + 2) * (W_out + 2)
    # the forward's table, the channels exchanged
    found = _conv3x3_fwd.blocks_for(dz.dtype, _triton.precision(dz.dtype), chip, (C_out,), channels, pixels, processors)
    found = [blocks for blocks in found if blocks.kernel != "direct" and blocks.taps == 1]
    if _why_no_descriptors(dz, weight):
        return [blocks for blocks in found if blocks.kernel == "pointers"]
    return [blocks for blocks in found if blocks.kernel == "pointers" or C_out % blocks.BLOCK_K == 0]


def _why_no_descriptors(dz: Tensor, weight: Tensor) -> str:
    N, C_out, H_out, W_out = dz.shape
    if not _layout.is_matrix(weight):
        return "the weight is not dense in channels_last"
    if C_out * dz.element_size() % 16:
        return "a pixel does not begin at a multiple of 16 bytes"
    # a copy as large as the largest map would not be in what a step is counted to take
    if N * (H_out + 4) * (W_out + 4) * C_out * dz.element_size() > MOST_MARGIN_BYTES:
        return f"the copy with its margin would take more than {MOST_MARGIN_BYTES >> 20} MiB"
    # images are the third axis of a grid
    return "" if N < 2**16 else "more than 65535 images"


def launch_conv3x3_dx(dz: Tensor, weight: Tensor, x: Tensor, mask: bool, first: int, blocks: Blocks) -> Tensor:
    """dx of x [N, C, H, W], which met the channels of weight [C_out, C_in, 3, 3] from `first` on; dz [N, C_out, ...].

    In x's layout; with `mask` zero where x, then a ReLU's result, is.
    """
    dx = _layout.empty_as(x, dz.dtype)
    if dx.numel() == 0:
        return dx
    N, C, H, W = dx.shape
    if blocks.splits == 1:
        _launch(dz, weight, x, mask, first, blocks, dx, dx.stride(), 0)
        return dx
    partial = torch.empty((blocks.splits, N, H, W, C), dtype=torch.float32, device=dz.device)
    split, n, h, w, c = partial.stride()
    _launch(dz, weight, x, False, first, blocks, partial, (n, c, h, w), split)
    BLOCK = 1024
    # one program per BLOCK values of dx
    with _triton.on_device(dz):
        _finish_kernel[(-(-dx.numel() // BLOCK),)](
            partial, x, dx, H, W, C, dx.numel(), blocks.splits, *x.stride(), *dx.stride(),
            MASK=mask, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return dx


def _launch(
    dz: Tensor, weight: Tensor, x: Tensor, mask: bool, first: int, blocks: Blocks,
    out: Tensor, strides: Sequence[int], stride_split: int,
) -> None:  # fmt: skip
    N, channels, H, W = x.shape
    C_out = dz.shape[1]
    blocks_n = -(-channels // blocks.BLOCK_N)
    steps = -(-9 * -(-C_out // blocks.BLOCK_K) // blocks.splits)
    what: dict[str, Any] = {
        "MASK": mask, "SPLIT": blocks.splits > 1, "PRECISION": _triton.precision(dz.dtype),
        "BLOCK_P": blocks.BLOCK_P, "BLOCK_N": blocks.BLOCK_N, "BLOCK_K": blocks.BLOCK_K,
        "num_warps": blocks.warps, "num_stages": blocks.stages,
    }  # fmt: skip
    if blocks.kernel == "descriptors":
        wide = _with_margin(dz)
        pitch, rows = W + 2, (H + 2) * (W + 2)
        # one program per block of pixels (junk included) and channels, per share of its steps, per image
        grid: tuple[int, ...] = (-(-((H - 1) * pitch + W) // blocks.BLOCK_P) * blocks_n, blocks.splits, N)
        with _triton.on_device(dz):
            _descriptors_kernel[grid](
                _triton.descriptor(wide, [N * rows, C_out], [C_out, 1], [blocks.BLOCK_P, blocks.BLOCK_K]),
                _layout.matrix_of_weight(weight, blocks.BLOCK_K, blocks.BLOCK_N), x, out,
                H, W, pitch, rows, C_out, weight.shape[1], first, channels, steps,
                *x.stride(), *strides, stride_split, WEIGHT_FIRST=blocks.weight_first, **what,
            )  # fmt: skip
        return
    pixels = N * H * W
    # one program per block of pixels and channels, per share of its steps
    grid = (-(-pixels // blocks.BLOCK_P) * blocks_n, blocks.splits)
    with _triton.on_device(dz):
        _pointers_kernel[grid](
            dz, weight[:, first:], x, out, H, W, pixels, C_out, channels, steps,
            *dz.stride(), *weight.stride(), *x.stride(), *strides, stride_split,
            EVEN=C_out % blocks.BLOCK_K == 0, **what,
        )  # fmt: skip


def _with_margin(dz: Tensor) -> Tensor:
    """dz in the middle of two pixels of zeros on each side, as rows of pixels."""
    N, C, H_out, W_out = dz.shape
    H, W = H_out + 4, W_out + 4
    wide = torch.empty((N, H, W, C), dtype=dz.dtype, device=dz.device)
    BLOCK_C = min(128, max(8, 1 << (C - 1).bit_length()))
    BLOCK_P = 4096 // BLOCK_C
    # one program per block of pixels, of channels
    with _triton.on_device(dz):
        _margin_kernel[(-(-N * H * W // BLOCK_P), -(-C // BLOCK_C))](
            dz, wide, H, W, N * H * W, C, *dz.stride(), BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C, num_warps=4
        )
    return wide


# the choice


def _by_aten(dz: Tensor, weight: Tensor, x: Tensor, mask: bool, first: int) -> Tensor:
    of_x = weight[:, first : first + x.shape[1]]
    dx = _aten.convolution_backward(dz, x, of_x, [True, False, False])[0]
    assert dx is not None
    return _aten.masked(dx, x) if mask else dx


def question(dz: Tensor, weight: Tensor, x: Tensor, mask: bool, first: int) -> Question:
    def ways() -> list[Way]:
        found = [Way("ATen", _by_aten, False)]
        for blocks in ours(dz, weight, x.shape[1]):
            found.append(Way(str(blocks), functools.partial(launch_conv3x3_dx, blocks=blocks), True))
        return found

    def cut(arguments: tuple[Any, ...], lines: int) -> tuple[Any, ...]:
        dz, weight, x, *rest = arguments
        return (dz[:, :, :lines], weight, x[:, :, : lines + 2], *rest)

    of_all = f" of {weight.shape[1]}" if weight.shape[1] > x.shape[1] else ""
    said = [
        f"{dz.shape[1]} -> {x.shape[1]}{of_all}",
        _choosing.octave(dz.shape[0] * dz.shape[2] * dz.shape[3]),
        _choosing.arithmetic(dz.dtype),
        _layout.words(dz, x, weight=weight),
        *(["no descriptors"] if _why_no_descriptors(dz, weight) else []),
        *(["masked"] if mask else []),
    ]
    # the op gives x's layout, whoever made it
    return Question("conv3x3_dx", ", ".join(said), ways, _by_aten, cut, any_strides=True)


def _computed(dz: Tensor, weight: Tensor, x: Tensor, mask: bool, first: int) -> Tensor:
    def why_not(device: torch.device, dtype: torch.dtype) -> str:
        # x has more pixels than dz
        return _triton.why_no_dot(device, dtype) or _choosing.why_too_large(x)

    dx = _choosing.computed(question, _by_aten, (dz, weight.to(dz.dtype), x, mask, first), why_not)
    return dx.contiguous(memory_format=_layout.of(x))


@torch.library.custom_op("unet::conv3x3_dx", mutates_args=())
def _op(dz: Tensor, weight: Tensor, x: Tensor, mask: bool, first: int) -> Tensor:
    return _computed(dz, weight, x, mask, first)


@_op.register_fake
def _(dz: Tensor, weight: Tensor, x: Tensor, mask: bool, first: int) -> Tensor:
    return _layout.empty_as(x, dz.dtype)


def dx(dz: Tensor, weight: Tensor, x: Tensor, *, mask: bool = False, first: int = 0) -> Tensor:
    """The gradient of x, by the fastest way: see `launch_conv3x3_dx`. weight may be wider than dz."""
    return _checks.untraced(_op, _computed, dz, weight, x, mask, first)
