"""Forward kernels of the unpadded 3x3 convolution, with bias and ReLU in the epilogue, and the ways they are launched.

Every pixel's value is a product over 9 C_in numbers, and the pixels of a map lie in memory as rows of a matrix, C_in
wide: what tap (r, s) sees of a block of pixels is that same block, r rows of the image and s pixels further on. So a
convolution is nine products of shifted blocks, summed where they are made (docs/mathematics.md, section 2).

`_pointers_kernel`     any strides, any chip with tensor cores: every pixel of a block has its address, looked up once.
                       A second map beside the first (the concatenation that is never stored), the 2x2 maxima of the
                       result in the same pass, or three taps that share one load.
`_descriptors_kernel`  sm_90: the blocks are boxes of a matrix that the chip's copy engine (TMA) fetches. A map's lines
                       follow one another, so a block runs over the ends of lines and computes two junk pixels a line.
`_finish_kernel`       adds up what several programs made of one pixel (split), with bias and ReLU.
`_direct_kernel`       one to four input channels: all taps at once, bound by what is written.

All sums are float32. `Blocks` names a launch; `blocks_for` lists those worth trying on a chip for a shape.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import _choosing, _layout, _triton
from ._triton import jit, tl

__all__ = [
    "MOST_DIRECT_CHANNELS",
    "Blocks",
    "blocks_for",
    "case_of",
    "launch_conv3x3_fwd",
    "launch_conv3x3_pool_fwd",
    "makes_maxima",
    "ours",
    "why_not_blocks",
]

MOST_DIRECT_CHANNELS = 4
# float32 partial sums that a split launch may hold at once
MOST_PARTIAL_BYTES = 64 << 20


@jit
def _products(  # type: ignore[no-untyped-def]
    acc, x_rows, w_rows, C, first, last,
    stride_xc, stride_xh, stride_xw, stride_wi, stride_wr, stride_ws,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + steps first to last of sum over (channels, taps): nine steps, one per tap, for each BLOCK_K channels."""
    for k in range(first, last):
        r, s = tl.cast(k % 9 // 3, tl.int64), tl.cast(k % 3, tl.int64)
        c = k // 9 * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        x_at = x_rows + (r * stride_xh + s * stride_xw) + (c.to(tl.int64) * stride_xc)[None, :]
        w_at = w_rows + (r * stride_wr + s * stride_ws) + (c.to(tl.int64) * stride_wi)[None, :]
        if EVEN:
            x, w = tl.load(x_at), tl.load(w_at)
        else:
            x = tl.load(x_at, mask=(c < C)[None, :], other=0.0)
            w = tl.load(w_at, mask=(c < C)[None, :], other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
    return acc


@jit
def _products_of_rows(  # type: ignore[no-untyped-def]
    acc0, acc1, acc2, x_rows, w_rows, C,
    stride_xc, stride_xh, stride_wi, stride_wr, stride_ws,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Likewise for each of the three taps of a row by itself: they read the same pixels, one load for the three."""
    for k in range(3 * tl.cdiv(C, BLOCK_K)):
        r = tl.cast(k % 3, tl.int64)
        c = k // 3 * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        x_at = x_rows + r * stride_xh + (c.to(tl.int64) * stride_xc)[None, :]
        w_at = w_rows + r * stride_wr + (c.to(tl.int64) * stride_wi)[None, :]
        if EVEN:
            x = tl.load(x_at)
            w0, w1, w2 = tl.load(w_at), tl.load(w_at + stride_ws), tl.load(w_at + 2 * stride_ws)
        else:
            known = (c < C)[None, :]
            x = tl.load(x_at, mask=known, other=0.0)
            w0 = tl.load(w_at, mask=known, other=0.0)
            w1 = tl.load(w_at + stride_ws, mask=known, other=0.0)
            w2 = tl.load(w_at + 2 * stride_ws, mask=known, other=0.0)
        acc0 = tl.dot(x, tl.trans(w0), acc0, input_precision=PRECISION)
        acc1 = tl.dot(x, tl.trans(w1), acc1, input_precision=PRECISION)
        acc2 = tl.dot(x, tl.trans(w2), acc2, input_precision=PRECISION)
    return acc0, acc1, acc2


@jit
def _joined(acc0, acc1, acc2, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tap s of a row belongs to the pixel s further on in the block; of the last two pixels nothing is right."""
    i = tl.arange(0, BLOCK_P)[:, None] + tl.zeros([BLOCK_P, BLOCK_N], tl.int32)
    after1, after2 = tl.minimum(i + 1, BLOCK_P - 1), tl.minimum(i + 2, BLOCK_P - 1)
    return acc0 + tl.gather(acc1, after1, axis=0) + tl.gather(acc2, after2, axis=0)


@jit
def _with_bias(acc, bias_ptr, co, C_out, RELU: tl.constexpr):  # type: ignore[no-untyped-def]
    acc += tl.load(bias_ptr + co, mask=co < C_out, other=0.0).to(tl.float32)[None, :]
    if RELU:
        # not a maximum: that turns NaN into 0 on a GPU, and a diverged net would look healthy
        acc = tl.where(acc < 0, 0.0, acc)
    return acc


@jit
def _share(count, before, steps, SPLIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """(first, last): which of `count` steps, which come after `before` others, this program takes."""
    if SPLIT:
        first = tl.maximum(tl.program_id(1) * steps - before, 0)
        last = tl.minimum((tl.program_id(1) + 1) * steps - before, count)
    else:
        first, last = 0, count
    return first, last


@jit
def _pointers_kernel(  # type: ignore[no-untyped-def]
    x_ptr, skip_ptr, weight_ptr, bias_ptr, y_ptr, pooled_ptr,
    H_out, W_out, line, pixels, C_x, C_skip, C_out, steps,
    top, left, H_y, W_y,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_sn, stride_sc, stride_sh, stride_sw,
    stride_wo, stride_wi, stride_wr, stride_ws,
    stride_yn, stride_yc, stride_yh, stride_yw, stride_ysplit,
    stride_pn, stride_pc, stride_ph, stride_pw,
    CAT: tl.constexpr, POOL: tl.constexpr, SPLIT: tl.constexpr, TAPS: tl.constexpr,
    RELU: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks_n = tl.cdiv(C_out, BLOCK_N)
    block_p, block_n = tl.program_id(0) // blocks_n, tl.program_id(0) % blocks_n
    co = block_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    # three taps a load: neighbouring blocks share the two pixels of which a block knows only a part
    own: tl.constexpr = BLOCK_P if TAPS == 1 else BLOCK_P - 2
    i = block_p * own + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    # beyond the last pixel (channel) the last one is computed again and not stored: addresses stay inside, unmasked
    p = tl.minimum(i, pixels - 1)
    if POOL:
        # the four pixels of a maximum lie one behind the other
        across = (W_out + 1) // 2
        down = (H_out + 1) // 2
        n = (p // 4 // (across * down)).to(tl.int64)
        h = (p // 4 // across % down * 2 + p // 2 % 2).to(tl.int64)
        w = (p // 4 % across * 2 + p % 2).to(tl.int64)
        stored = (i < pixels) & (h < H_out) & (w < W_out)
        x_h, x_w = tl.minimum(h, H_out - 1), tl.minimum(w, W_out - 1)
    else:
        n = (p // (H_out * line)).to(tl.int64)
        h = (p // line % H_out).to(tl.int64)
        w = (p % line).to(tl.int64)
        stored = (i < pixels) & (w < W_out)
        if TAPS == 3:
            stored = stored & (tl.arange(0, BLOCK_P) < own)
        x_h, x_w = h, w
    x_rows = x_ptr + (n * stride_xn + x_h * stride_xh + x_w * stride_xw)[:, None]  # [BLOCK_P, 1]
    skip_rows = skip_ptr + (n * stride_sn + x_h * stride_sh + x_w * stride_sw)[:, None] if CAT else x_rows
    w_rows = weight_ptr + (tl.minimum(co, C_out - 1).to(tl.int64) * stride_wo)[:, None]  # [BLOCK_N, 1]
    w_rows_of_skip = w_rows + C_x * stride_wi
    acc = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    if TAPS == 3:
        acc1 = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
        acc2 = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
        acc, acc1, acc2 = _products_of_rows(
            acc, acc1, acc2, x_rows, w_rows, C_x, stride_xc, stride_xh, stride_wi, stride_wr, stride_ws,
            EVEN, PRECISION, BLOCK_K,
        )  # fmt: skip
        if CAT:
            acc, acc1, acc2 = _products_of_rows(
                acc, acc1, acc2, skip_rows, w_rows_of_skip, C_skip,
                stride_sc, stride_sh, stride_wi, stride_wr, stride_ws, EVEN, PRECISION, BLOCK_K,
            )  # fmt: skip
        acc = _joined(acc, acc1, acc2, BLOCK_P, BLOCK_N)
    else:
        of_x = 9 * tl.cdiv(C_x, BLOCK_K)
        first, last = _share(of_x, 0, steps, SPLIT)
        acc = _products(
            acc, x_rows, w_rows, C_x, first, last,
            stride_xc, stride_xh, stride_xw, stride_wi, stride_wr, stride_ws, EVEN, PRECISION, BLOCK_K,
        )  # fmt: skip
        if CAT:
            first, last = _share(9 * tl.cdiv(C_skip, BLOCK_K), of_x, steps, SPLIT)
            acc = _products(
                acc, skip_rows, w_rows_of_skip, C_skip, first, last,
                stride_sc, stride_sh, stride_sw, stride_wi, stride_wr, stride_ws, EVEN, PRECISION, BLOCK_K,
            )  # fmt: skip
    known = co < C_out
    if SPLIT:
        # a share of the sum; bias and ReLU wait for the whole
        y_ptr += tl.program_id(1).to(tl.int64) * stride_ysplit
    else:
        acc = _with_bias(acc, bias_ptr, co, C_out, RELU)
    y_c = (co.to(tl.int64) * stride_yc)[None, :]
    if POOL:
        quads = tl.reshape(acc, [BLOCK_P // 4, 4, BLOCK_N])
        # a maximum knows no NaN on a GPU
        lost = tl.max((quads != quads).to(tl.int32), axis=1)
        largest = tl.max(tl.where(quads != quads, -float("inf"), quads), axis=1)
        largest = tl.where(lost > 0, float("nan"), largest)
        q = block_p * (BLOCK_P // 4) + tl.arange(0, BLOCK_P // 4)
        n_q, h_q, w_q = (
            (q // (across * down)).to(tl.int64),
            (q // across % down).to(tl.int64),
            (q % across).to(tl.int64),
        )
        whole = (q < pixels // 4) & (2 * h_q + 1 < H_out) & (2 * w_q + 1 < W_out)
        at = pooled_ptr + (n_q * stride_pn + h_q * stride_ph + w_q * stride_pw)[:, None]
        at += (co.to(tl.int64) * stride_pc)[None, :]
        tl.store(at, largest.to(pooled_ptr.dtype.element_ty), mask=whole[:, None] & known[None, :])
        # of the map itself only the window is wanted
        h, w = h - top, w - left
        stored = stored & (h >= 0) & (h < H_y) & (w >= 0) & (w < W_y)
    y_rows = y_ptr + (n * stride_yn + h * stride_yh + w * stride_yw)[:, None]
    tl.store(y_rows + y_c, acc.to(y_ptr.dtype.element_ty), mask=stored[:, None] & known[None, :])


@jit
def _boxes(  # type: ignore[no-untyped-def]
    acc, x_desc, weight_desc, row, pitch, co0, c0, C, first, last,
    WEIGHT_FIRST: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`_products` of boxes; x's channels are those from c0 on among the weight's C."""
    for k in range(first, last):
        c = k // 9 * BLOCK_K
        x = x_desc.load([row + k % 9 // 3 * pitch + k % 3, c])
        weight = weight_desc.load([co0, k % 9 * C + c0 + c])
        if WEIGHT_FIRST:
            acc = tl.dot(weight, x.T, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x, weight.T, acc, input_precision=PRECISION)
    return acc


@jit
def _boxes_of_rows(  # type: ignore[no-untyped-def]
    acc0, acc1, acc2, x_desc, weight_desc, row, pitch, co0, c0, C, count,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`_products_of_rows` of boxes."""
    for k in range(count):
        c = k // 3 * BLOCK_K
        x = x_desc.load([row + k % 3 * pitch, c])
        of = k % 3 * 3 * C + c0 + c
        acc0 = tl.dot(x, weight_desc.load([co0, of]).T, acc0, input_precision=PRECISION)
        acc1 = tl.dot(x, weight_desc.load([co0, of + C]).T, acc1, input_precision=PRECISION)
        acc2 = tl.dot(x, weight_desc.load([co0, of + 2 * C]).T, acc2, input_precision=PRECISION)
    return acc0, acc1, acc2


@jit
def _descriptors_kernel(  # type: ignore[no-untyped-def]
    x_desc, skip_desc, weight_desc, bias_ptr, y_ptr,
    H_out, W_out, pitch, rows, C_x, C_skip, C_out, steps,
    stride_yn, stride_yc, stride_yh, stride_yw, stride_ysplit,
    CAT: tl.constexpr, SPLIT: tl.constexpr, TAPS: tl.constexpr, WEIGHT_FIRST: tl.constexpr,
    RELU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # x_desc: [images x rows, C_x], a row per pixel, `pitch` of them a line; weight_desc: [C_out, 9 (C_x + C_skip)]
    blocks_n = tl.cdiv(C_out, BLOCK_N)
    block_p, block_n = tl.program_id(0) // blocks_n, tl.program_id(0) % blocks_n
    own: tl.constexpr = BLOCK_P if TAPS == 1 else BLOCK_P - 2
    m, co0 = block_p * own, block_n * BLOCK_N
    row = tl.program_id(2) * rows + m
    C = C_x + C_skip if CAT else C_x
    if TAPS == 3:
        acc = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
        acc1 = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
        acc2 = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
        acc, acc1, acc2 = _boxes_of_rows(
            acc, acc1, acc2, x_desc, weight_desc, row, pitch, co0, 0, C, 3 * (C_x // BLOCK_K), PRECISION, BLOCK_K
        )
        if CAT:
            of_skip = 3 * (C_skip // BLOCK_K)
            acc, acc1, acc2 = _boxes_of_rows(
                acc, acc1, acc2, skip_desc, weight_desc, row, pitch, co0, C_x, C, of_skip, PRECISION, BLOCK_K
            )
        acc = _joined(acc, acc1, acc2, BLOCK_P, BLOCK_N)
    else:
        # with few output channels the weight is the better first operand: the second may be 256 wide
        acc = tl.zeros([BLOCK_N, BLOCK_P], tl.float32) if WEIGHT_FIRST else tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
        of_x = 9 * (C_x // BLOCK_K)
        first, last = _share(of_x, 0, steps, SPLIT)
        acc = _boxes(acc, x_desc, weight_desc, row, pitch, co0, 0, C, first, last, WEIGHT_FIRST, PRECISION, BLOCK_K)
        if CAT:
            first, last = _share(9 * (C_skip // BLOCK_K), of_x, steps, SPLIT)
            acc = _boxes(
                acc, skip_desc, weight_desc, row, pitch, co0, C_x, C, first, last, WEIGHT_FIRST, PRECISION, BLOCK_K
            )
        if WEIGHT_FIRST:
            acc = tl.trans(acc)
    co = co0 + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    if SPLIT:
        y_ptr += tl.program_id(1).to(tl.int64) * stride_ysplit
    else:
        acc = _with_bias(acc, bias_ptr, co, C_out, RELU)
    at = m + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    h, w = (at // pitch).to(tl.int64), (at % pitch).to(tl.int64)
    # two junk pixels end each line
    stored = (h < H_out) & (w < W_out) & (tl.arange(0, BLOCK_P) < own)
    y_rows = y_ptr + (tl.program_id(2).to(tl.int64) * stride_yn + h * stride_yh + w * stride_yw)[:, None]
    y_at = y_rows + (co.to(tl.int64) * stride_yc)[None, :]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=stored[:, None] & (co < C_out)[None, :])


@jit
def _finish_kernel(  # type: ignore[no-untyped-def]
    partial_ptr, bias_ptr, y_ptr,
    H_out, W_out, C_out, values, splits,
    stride_yn, stride_yc, stride_yh, stride_yw,
    RELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # partial: [splits, N, H_out, W_out, C_out], added in one order
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = i < values
    acc = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        acc += tl.load(partial_ptr + tl.cast(split, tl.int64) * values + i, mask=inside, other=0.0)
    co, p = i % C_out, i // C_out
    acc += tl.load(bias_ptr + co, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        acc = tl.where(acc < 0, 0.0, acc)
    n, h, w = p // W_out // H_out, p // W_out % H_out, p % W_out
    y_at = y_ptr + n * stride_yn + co * stride_yc + h * stride_yh + w * stride_yw
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _direct_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, bias_ptr, y_ptr,
    H_out, W_out, pixels, C_in, C_out,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_wo, stride_wi, stride_wr, stride_ws,
    stride_yn, stride_yc, stride_yh, stride_yw,
    RELU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    p = tl.minimum(i, pixels - 1)
    n, h, w = (p // (H_out * W_out)).to(tl.int64), (p // W_out % H_out).to(tl.int64), (p % W_out).to(tl.int64)
    co = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    # what the taps of all channels see, gathered: there are so few that one product does it
    k = tl.arange(0, BLOCK_K).to(tl.int64)  # [BLOCK_K]
    c, r, s = k // 9, k % 9 // 3, k % 3
    there = (k < 9 * C_in)[None, :]
    x_at = (n * stride_xn + h * stride_xh + w * stride_xw)[:, None] + (c * stride_xc + r * stride_xh + s * stride_xw)
    w_at = (tl.minimum(co, C_out - 1).to(tl.int64) * stride_wo)[:, None]
    w_at += (c * stride_wi + r * stride_wr + s * stride_ws)[None, :]
    x = tl.load(x_ptr + x_at, mask=there, other=0.0)
    weight = tl.load(weight_ptr + w_at, mask=there, other=0.0)
    acc = tl.dot(x, tl.trans(weight), input_precision=PRECISION)
    acc = _with_bias(acc, bias_ptr, co, C_out, RELU)
    y_at = y_ptr + (n * stride_yn + h * stride_yh + w * stride_yw)[:, None] + (co.to(tl.int64) * stride_yc)[None, :]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=(i < pixels)[:, None] & (co < C_out)[None, :])


@dataclass(frozen=True, slots=True)
class Blocks:
    """How a launch cuts its work: BLOCK_P pixels of BLOCK_N channels a program, BLOCK_K channels a step, by `kernel`.

    `taps` that share one load, whether the `weight` comes `first` in the product, and how many programs `split` one
    block's steps among them.
    """

    kernel: str
    BLOCK_P: int
    BLOCK_N: int
    BLOCK_K: int
    warps: int
    stages: int
    taps: int = 1
    weight_first: bool = False
    splits: int = 1

    def __str__(self) -> str:
        said = [f"{self.kernel} {self.BLOCK_P}x{self.BLOCK_N}x{self.BLOCK_K}"]
        said += [f"{self.taps} taps a load"] if self.taps > 1 else []
        said += ["weight first"] if self.weight_first else []
        said += [f"{self.splits} splits"] if self.splits > 1 else []
        return ", ".join([*said, f"{self.warps} warps", f"{self.stages} stages"])


_pointers = functools.partial(Blocks, "pointers")
_descriptors = functools.partial(Blocks, "descriptors")


# What compiles without spills into a chip's shared memory (tests/unet_kernels/test_conv3x3_fwd.py holds it), the most
# promising first: [sixteen bits or "tf32" or "ieee"][chip's generation][few output channels (64) or many]
_TABLE: dict[str, dict[int, tuple[tuple[Blocks, ...], tuple[Blocks, ...]]]] = {
    "16 bits": {
        8: (
            (_pointers(128, 64, 64, 4, 3), _pointers(256, 64, 64, 8, 3), _pointers(128, 64, 32, 8, 3, taps=3)),
            (
                _pointers(128, 128, 64, 8, 3),
                _pointers(128, 256, 32, 8, 3),
                _pointers(128, 64, 64, 4, 3),
                _pointers(64, 128, 64, 4, 3),
            ),
        ),
        9: (
            (
                _descriptors(256, 64, 64, 4, 3, weight_first=True),
                _descriptors(128, 64, 64, 4, 3, taps=3),
                _descriptors(256, 64, 64, 8, 3, taps=3),
                _descriptors(256, 64, 64, 8, 3),
                _pointers(128, 64, 64, 4, 3),
                _pointers(256, 64, 64, 8, 3),
            ),
            (
                _descriptors(128, 128, 64, 4, 3),
                _descriptors(128, 256, 64, 8, 3),
                _descriptors(256, 128, 64, 8, 3),
                _descriptors(64, 128, 64, 4, 4),
                _pointers(128, 128, 64, 8, 3),
                _pointers(64, 128, 64, 4, 3),
            ),
        ),
    },
    "tf32": {
        8: (
            (_pointers(128, 64, 32, 4, 3), _pointers(128, 64, 32, 8, 3, taps=3), _pointers(64, 64, 32, 4, 3)),
            (_pointers(128, 128, 32, 8, 3), _pointers(64, 64, 32, 4, 3)),
        ),
        9: (
            (
                _descriptors(128, 64, 32, 4, 3),
                _descriptors(128, 64, 32, 8, 3, taps=3),
                _pointers(128, 64, 32, 8, 3),
            ),
            (
                _descriptors(128, 128, 32, 8, 3),
                _descriptors(128, 64, 32, 4, 3),
                _pointers(128, 128, 32, 8, 3),
                _pointers(64, 64, 32, 4, 3),
            ),
        ),
    },
}
_TABLE["ieee"] = dict.fromkeys((8, 9), ((_pointers(64, 64, 32, 4, 3),), (_pointers(64, 64, 32, 4, 3),)))


def blocks_for(
    dtype: torch.dtype, precision: str, chip: int, channels: tuple[int, ...], C_out: int, pixels: int, processors: int
) -> list[Blocks]:
    """Ways to cut a convolution of `pixels` output pixels, the most promising first.

    Args:
        dtype: float32, float16 or bfloat16; of float32, `precision` says whether products may be "tf32" or are "ieee".
        chip: compute capability, 80 or more.
        channels: C_in, of each of the maps that are read.
        processors: how many multiprocessors there are to be kept busy.
    """
    kind = precision if dtype == torch.float32 else "16 bits"
    few, many = _TABLE[kind][9 if chip == 90 else 8]
    found = [_fitted(blocks, channels, C_out) for blocks in (few if C_out <= 64 else many)]
    found += [s for blocks in found for s in _split(blocks, channels, C_out, pixels, processors)]
    if len(channels) == 1 and channels[0] <= MOST_DIRECT_CHANNELS:
        BLOCK_N, BLOCK_K = min(64, _power_of_two(C_out)), _power_of_two(9 * channels[0])
        sizes = (64, 32) if dtype == torch.float32 else (128, 64)
        found[:0] = [Blocks("direct", BLOCK_P, BLOCK_N, BLOCK_K, 4, 1) for BLOCK_P in sizes]
    return list(dict.fromkeys(found))


def _fitted(blocks: Blocks, channels: tuple[int, ...], C_out: int) -> Blocks:
    """`blocks` no wider than there are channels; where they can be, steps that divide the channels evenly."""
    even = [k for k in (64, 32, 16) if k <= blocks.BLOCK_K and all(c % k == 0 for c in channels)]
    BLOCK_K = even[0] if even else min(blocks.BLOCK_K, 32, _power_of_two(max(channels)))
    return replace(blocks, BLOCK_K=BLOCK_K, BLOCK_N=min(blocks.BLOCK_N, _power_of_two(C_out)))


def _power_of_two(n: int) -> int:
    """The next power of two, at least 16: what a product of matrices takes."""
    return max(16, 1 << (n - 1).bit_length())


def _split(blocks: Blocks, channels: tuple[int, ...], C_out: int, pixels: int, processors: int) -> Iterator[Blocks]:
    """`blocks` with several programs to a block, where there are too few blocks to keep the chip busy."""
    programs = -(-pixels // blocks.BLOCK_P) * -(-C_out // blocks.BLOCK_N)
    if blocks.taps > 1 or programs >= processors:
        return
    # two programs a multiprocessor; each with enough steps to be worth its start; partial sums within bounds
    most = min(8, _steps(blocks, channels) // 8, MOST_PARTIAL_BYTES // max(1, 4 * pixels * C_out))
    splits = min(most, max(2, round(2 * processors / programs)))
    if splits > 1:
        yield replace(blocks, splits=splits)


def _steps(blocks: Blocks, channels: tuple[int, ...]) -> int:
    return 9 * sum(-(-c // blocks.BLOCK_K) for c in channels)


def makes_maxima(blocks: Blocks, dtype: torch.dtype) -> bool:
    """Whether a launch cut like this can also make the 2x2 maxima of its result.

    They need two lines at once, so pixels in an order of their own, whole sums, and registers beside the sums'.
    """
    sums = blocks.BLOCK_P * blocks.BLOCK_N // (32 * blocks.warps)
    whole = blocks.kernel == "pointers" and blocks.taps == 1 and blocks.splits == 1
    return whole and sums <= (32 if dtype == torch.float32 else 64)


def why_not_blocks(blocks: Blocks, x: Tensor, weight: Tensor, skip: Tensor | None) -> str:
    """Why a launch cannot be cut like this, or "" if it can: descriptors want maps and a weight laid out for them."""
    if blocks.kernel != "descriptors":
        return ""
    maps = [x] if skip is None else [x, skip]
    if refusal := _why_no_descriptors(maps, weight):
        return refusal
    if any(t.shape[1] % blocks.BLOCK_K for t in maps):
        return f"the channels are no multiple of {blocks.BLOCK_K}"
    return ""


def _why_no_descriptors(maps: Sequence[Tensor], weight: Tensor) -> str:
    """Why no descriptors name these, or ""; whatever it asks for is part of a case, as decisions are kept by case."""
    pitches = [_layout.pitch(t) for t in maps]
    if 0 in pitches or len(set(pitches)) > 1:
        return "the maps' lines are not equally long and one behind the other, channels last"
    if maps[0].shape[0] > 1 and len({_layout.rows(t) for t in maps}) > 1:
        return "the maps' images are not equally far apart"
    if not _layout.is_matrix(weight):
        return "the weight is not dense in channels_last"
    # a box's place is counted in 32 bits
    if any(_layout.rows(t) * t.shape[0] >= 2**31 for t in maps):
        return "more than 2^31 pixels"
    # images are the third axis of a grid
    return "" if maps[0].shape[0] < 2**16 else "more than 65535 images"


def case_of(maps: Sequence[Tensor], weight: Tensor, relu: bool) -> str:
    """What of a convolution's arguments decides which way is the fastest, in words."""
    x = maps[0]
    channels = " + ".join(str(t.shape[1]) for t in maps)
    pixels = x.shape[0] * (x.shape[2] - 2) * (x.shape[3] - 2)
    laid_out = _layout.words(*maps, weight=weight)
    if laid_out == "channels_last" and _why_no_descriptors(maps, weight):
        laid_out = "channels_last, a window"
    return ", ".join(
        [
            f"{channels} -> {weight.shape[0]}",
            _choosing.octave(pixels),
            _choosing.arithmetic(x.dtype),
            laid_out,
            *(["relu"] if relu else []),
        ]
    )


def ours(x: Tensor, weight: Tensor, skip: Tensor | None = None) -> list[Blocks]:
    """Our launches that can take these maps, the most promising first."""
    channels = (x.shape[1],) if skip is None else (x.shape[1], skip.shape[1])
    pixels = x.shape[0] * (x.shape[2] - 2) * (x.shape[3] - 2)
    chip, processors = _triton.chip(x.device), _triton.processors(x.device)
    found = blocks_for(x.dtype, _triton.precision(x.dtype), chip, channels, weight.shape[0], pixels, processors)
    return [blocks for blocks in found if not why_not_blocks(blocks, x, weight, skip)]


def launch_conv3x3_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, relu: bool, blocks: Blocks, skip: Tensor | None = None
) -> Tensor:
    """y [N, C_out, H - 2, W - 2] of x, or of x and the window `skip` of x's size beside it, in ATen's strides."""
    N, _, H, W = x.shape
    C_out = weight.shape[0]
    y = _layout.empty_convolved((N, C_out, H - 2, W - 2), weight, *([x] if skip is None else [x, skip]))
    if y.numel() == 0:
        return y
    if blocks.kernel == "direct":
        _launch_direct(x, weight, bias, relu, blocks, y)
    elif blocks.splits == 1:
        _launch(x, skip, weight, bias, relu, blocks, y)
    else:
        _launch_split(x, skip, weight, bias, relu, blocks, y)
    return y


def launch_conv3x3_pool_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, relu: bool, rows: int, columns: int, blocks: Blocks
) -> tuple[Tensor, Tensor]:
    """(the centred [rows, columns] window of y, the 2x2 maxima of all of y), both dense in channels_last."""
    N, _, H, W = x.shape
    C_out = weight.shape[0]
    y = _layout.empty_channels_last((N, C_out, rows, columns), x)
    pooled = _layout.empty_channels_last((N, C_out, (H - 2) // 2, (W - 2) // 2), x)
    if y.numel() or pooled.numel():
        _launch(x, None, weight, bias, relu, blocks, y, pooled)
    return y, pooled


def _launch(
    x: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor, relu: bool, blocks: Blocks, y: Tensor,
    pooled: Tensor | None = None,
) -> None:  # fmt: skip
    """Into y [N, C_out, H_out, W_out] (with `pooled`, its window), or y [splits, N, H_out, W_out, C_out]."""
    N, C_x, H, W = x.shape
    C_out, C_skip = weight.shape[0], 0 if skip is None else skip.shape[1]
    H_out, W_out = H - 2, W - 2
    channels = (C_x,) if skip is None else (C_x, C_skip)
    own = blocks.BLOCK_P if blocks.taps == 1 else blocks.BLOCK_P - 2
    blocks_n = -(-C_out // blocks.BLOCK_N)
    steps = -(-_steps(blocks, channels) // blocks.splits)
    what: dict[str, Any] = {
        "CAT": skip is not None, "SPLIT": blocks.splits > 1, "TAPS": blocks.taps, "RELU": relu,
        "PRECISION": _triton.precision(x.dtype),
        "BLOCK_P": blocks.BLOCK_P, "BLOCK_N": blocks.BLOCK_N, "BLOCK_K": blocks.BLOCK_K,
        "num_warps": blocks.warps, "num_stages": blocks.stages,
    }  # fmt: skip
    stride_ysplit, *strides_y = (0, *y.stride()) if y.dim() == 4 else [y.stride(axis) for axis in (0, 1, 4, 2, 3)]
    if blocks.kernel == "descriptors":
        pitch, rows = _layout.pitch(x), _layout.rows(x)
        # one program per block of pixels (junk included) and channels, per share of its steps, per image
        grid: tuple[int, ...] = (-(-((H_out - 1) * pitch + W_out) // own) * blocks_n, blocks.splits, N)
        with _triton.on_device(x):
            _descriptors_kernel[grid](
                _layout.matrix_of_pixels(x, blocks.BLOCK_P, blocks.BLOCK_K),
                None if skip is None else _layout.matrix_of_pixels(skip, blocks.BLOCK_P, blocks.BLOCK_K),
                _layout.matrix_of_weight(weight, blocks.BLOCK_N, blocks.BLOCK_K), bias, y,
                H_out, W_out, pitch, rows, C_x, C_skip, C_out, steps, *strides_y, stride_ysplit,
                WEIGHT_FIRST=blocks.weight_first, **what,
            )  # fmt: skip
        return
    # three taps a load need their pixels one behind the other, a line's last two with them
    line = W if blocks.taps > 1 else W_out
    pixels = N * H_out * line
    window: tuple[int, ...] = (0, 0, H_out, W_out)
    strides_pooled: tuple[int, ...] = (0, 0, 0, 0)
    strides_skip = strides_pooled if skip is None else skip.stride()
    if pooled is not None:
        pixels = N * ((H_out + 1) // 2) * ((W_out + 1) // 2) * 4
        window = ((H_out - y.shape[2]) // 2, (W_out - y.shape[3]) // 2, y.shape[2], y.shape[3])
        strides_pooled = pooled.stride()
    # one program per block of pixels and channels, per share of its steps
    grid = (-(-pixels // own) * blocks_n, blocks.splits)
    with _triton.on_device(x):
        _pointers_kernel[grid](
            x, skip, weight, bias, y, pooled,
            H_out, W_out, line, pixels, C_x, C_skip, C_out, steps, *window,
            *x.stride(), *strides_skip, *weight.stride(), *strides_y, stride_ysplit, *strides_pooled,
            POOL=pooled is not None, EVEN=all(c % blocks.BLOCK_K == 0 for c in channels), **what,
        )  # fmt: skip


def _launch_split(
    x: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor, relu: bool, blocks: Blocks, y: Tensor
) -> None:
    N, C_out, H_out, W_out = y.shape
    partial = torch.empty((blocks.splits, N, H_out, W_out, C_out), dtype=torch.float32, device=y.device)
    _launch(x, skip, weight, bias, False, blocks, partial)
    BLOCK = 1024
    # one program per BLOCK values of y
    with _triton.on_device(y):
        _finish_kernel[(-(-y.numel() // BLOCK),)](
            partial, bias, y, H_out, W_out, C_out, y.numel(), blocks.splits, *y.stride(),
            RELU=relu, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip


def _launch_direct(x: Tensor, weight: Tensor, bias: Tensor, relu: bool, blocks: Blocks, y: Tensor) -> None:
    N, C_out, H_out, W_out = y.shape
    pixels = N * H_out * W_out
    # one program per block of pixels, of channels
    grid = (-(-pixels // blocks.BLOCK_P), -(-C_out // blocks.BLOCK_N))
    with _triton.on_device(x):
        _direct_kernel[grid](
            x, weight, bias, y, H_out, W_out, pixels, x.shape[1], C_out, *x.stride(), *weight.stride(), *y.stride(),
            RELU=relu, PRECISION=_triton.precision(x.dtype),
            BLOCK_P=blocks.BLOCK_P, BLOCK_N=blocks.BLOCK_N, BLOCK_K=blocks.BLOCK_K, num_warps=blocks.warps,
        )  # fmt: skip
