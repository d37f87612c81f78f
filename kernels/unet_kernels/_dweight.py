"""Kernels of the gradients of a convolution's weight and bias, and the ways they are launched.

    dweight[co, ci, r, s] = sum_p dz[co, p] x[ci, p + (r, s)]        dbias[co] = sum_p dz[co, p]

over all pixels p of dz, of all images: products as long as the map has pixels, and as small as a filter. They are cut
into strips of pixels; each program adds up one strip for one block of the filter in float32, and `_finish_kernel` adds
the strips in one order, so that the same bits come out every time. The bias is the sum of a block that lies there
anyway. Only pixels that exist are multiplied: a NaN reaches those taps that saw it, and no other.

`_pointers_kernel`  any strides, any chip with tensor cores; one tap a program, or the three of a row, or all nine,
                    which share the block of dz. A deconvolution's taps step over dz instead (docs/mathematics.md,
                    section 3): two strides say where a tap finds either map.
`_direct_kernel`    one to four input channels: all taps in one product.

`Blocks` as in the forward: BLOCK_P pixels a step, of BLOCK_N output and BLOCK_K input channels, `splits` strips.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import _aten, _checks, _choosing, _layout, _triton
from ._choosing import Question, Way
from ._conv3x3_fwd import MOST_DIRECT_CHANNELS, Blocks
from ._triton import jit, tl

__all__ = [
    "CONV3X3",
    "DECONV2X2",
    "Filter",
    "blocks_for",
    "dweight",
    "launch_dweight",
    "of_parameters",
    "ours",
    "question",
]

# float32 partial sums that a launch may hold at once
MOST_PARTIAL_BYTES = 32 << 20


@jit
def _tap(acc, dz, x_rows, step, known, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    x = tl.load(x_rows + step, mask=known, other=0.0)
    return tl.dot(tl.trans(dz), x, acc, input_precision=PRECISION)


@jit
def _row_of_taps(  # type: ignore[no-untyped-def]
    acc0, acc1, acc2, dz, x_rows, step, known, PRECISION: tl.constexpr
):  # fmt: skip
    acc0 = _tap(acc0, dz, x_rows, 0, known, PRECISION)
    acc1 = _tap(acc1, dz, x_rows, step, known, PRECISION)
    acc2 = _tap(acc2, dz, x_rows, 2 * step, known, PRECISION)
    return acc0, acc1, acc2


@jit
def _store(acc, out_rows, step, inside):  # type: ignore[no-untyped-def]
    tl.store(out_rows + step, acc.to(out_rows.dtype.element_ty), mask=inside)


@jit
def _pointers_kernel(  # type: ignore[no-untyped-def]
    dz_ptr, x_ptr, out_ptr, dbias_ptr,
    rows, columns, pixels, C_out, C_in, steps,
    stride_zn, stride_zc, stride_zh, stride_zw, stride_zr, stride_zs,
    stride_xn, stride_xc, stride_xh, stride_xw, stride_xr, stride_xs,
    stride_oo, stride_oi, stride_or, stride_os, stride_osplit,
    ACROSS: tl.constexpr, TAPS: tl.constexpr, GROUPS: tl.constexpr, BIAS: tl.constexpr, BIASES: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # GROUPS programs share the taps of a block of the filter, TAPS each; ACROSS taps make a row
    blocks_k = tl.cdiv(C_in, BLOCK_K)
    group = tl.program_id(0) % GROUPS
    block_k = tl.program_id(0) // GROUPS % blocks_k
    co = tl.program_id(0) // GROUPS // blocks_k * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    ci = block_k * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    tap = group * TAPS
    r, s = (tap // ACROSS).to(tl.int64), (tap % ACROSS).to(tl.int64)
    z_columns = dz_ptr + r * stride_zr + s * stride_zs + (co.to(tl.int64) * stride_zc)[None, :]
    x_columns = x_ptr + r * stride_xr + s * stride_xs + (ci.to(tl.int64) * stride_xc)[None, :]
    of_dz, of_x = (co < C_out)[None, :], (ci < C_in)[None, :]
    acc0 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    if TAPS > 1:
        acc1, acc2 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32), tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    if TAPS > 3:
        acc3, acc4 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32), tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        acc5, acc6 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32), tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        acc7, acc8 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32), tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    if BIAS:
        whole = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    first = tl.program_id(1) * steps
    last = tl.minimum(first + steps, tl.cdiv(pixels, BLOCK_P))
    for k in range(first, last):
        i = k * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
        known = (i < pixels)[:, None]
        n, h = (i // (rows * columns)).to(tl.int64), (i // columns % rows).to(tl.int64)
        w = (i % columns).to(tl.int64)
        z_at = z_columns + (n * stride_zn + h * stride_zh + w * stride_zw)[:, None]
        dz = tl.load(z_at, mask=known & of_dz, other=0.0)
        x_rows = x_columns + (n * stride_xn + h * stride_xh + w * stride_xw)[:, None]
        known = known & of_x
        if TAPS == 1:
            acc0 = _tap(acc0, dz, x_rows, 0, known, PRECISION)
        else:
            acc0, acc1, acc2 = _row_of_taps(acc0, acc1, acc2, dz, x_rows, stride_xs, known, PRECISION)
        if TAPS > 3:
            x_rows += stride_xr
            acc3, acc4, acc5 = _row_of_taps(acc3, acc4, acc5, dz, x_rows, stride_xs, known, PRECISION)
            x_rows += stride_xr
            acc6, acc7, acc8 = _row_of_taps(acc6, acc7, acc8, dz, x_rows, stride_xs, known, PRECISION)
        if BIAS:
            whole += dz.to(tl.float32)
    inside = (co < C_out)[:, None] & (ci < C_in)[None, :]
    out_rows = out_ptr + tl.program_id(1).to(tl.int64) * stride_osplit + r * stride_or + s * stride_os
    out_rows += (co.to(tl.int64) * stride_oo)[:, None] + (ci.to(tl.int64) * stride_oi)[None, :]
    _store(acc0, out_rows, 0, inside)
    if TAPS > 1:
        _store(acc1, out_rows, stride_os, inside)
        _store(acc2, out_rows, 2 * stride_os, inside)
    if TAPS > 3:
        out_rows += stride_or
        _store(acc3, out_rows, 0, inside)
        _store(acc4, out_rows, stride_os, inside)
        _store(acc5, out_rows, 2 * stride_os, inside)
        out_rows += stride_or
        _store(acc6, out_rows, 0, inside)
        _store(acc7, out_rows, stride_os, inside)
        _store(acc8, out_rows, 2 * stride_os, inside)
    if BIAS:
        # [splits, BIASES, C_out]: of the groups that saw all of dz, the first; of others, each its own
        mine = (co < C_out) & (block_k == 0) & (group < BIASES)
        at = dbias_ptr + (tl.program_id(1).to(tl.int64) * BIASES + group) * C_out + co
        tl.store(at, tl.sum(whole, axis=0).to(dbias_ptr.dtype.element_ty), mask=mine)


@jit
def _direct_kernel(  # type: ignore[no-untyped-def]
    dz_ptr, x_ptr, out_ptr, dbias_ptr,
    rows, columns, pixels, C_out, C_in, steps,
    stride_zn, stride_zc, stride_zh, stride_zw,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_oo, stride_oi, stride_or, stride_os, stride_osplit,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    co = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    # what the taps of all channels see
    k = tl.arange(0, BLOCK_K).to(tl.int64)  # [BLOCK_K]
    c, r, s = k // 9, k % 9 // 3, k % 3
    tap = (c * stride_xc + r * stride_xh + s * stride_xw)[None, :]
    of_tap = (k < 9 * C_in)[None, :]
    z_columns = dz_ptr + (co.to(tl.int64) * stride_zc)[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    if BIAS:
        whole = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    first = tl.program_id(1) * steps
    last = tl.minimum(first + steps, tl.cdiv(pixels, BLOCK_P))
    for step in range(first, last):
        i = step * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
        known = (i < pixels)[:, None]
        n, h = (i // (rows * columns)).to(tl.int64), (i // columns % rows).to(tl.int64)
        w = (i % columns).to(tl.int64)
        z_at = z_columns + (n * stride_zn + h * stride_zh + w * stride_zw)[:, None]
        dz = tl.load(z_at, mask=known & (co < C_out)[None, :], other=0.0)
        x_at = x_ptr + (n * stride_xn + h * stride_xh + w * stride_xw)[:, None] + tap
        x = tl.load(x_at, mask=known & of_tap, other=0.0)
        acc = tl.dot(tl.trans(dz), x, acc, input_precision=PRECISION)
        if BIAS:
            # not as a product with ones: tf32 would round it
            whole += dz.to(tl.float32)
    at = out_ptr + tl.program_id(1).to(tl.int64) * stride_osplit + (co.to(tl.int64) * stride_oo)[:, None]
    at += (c * stride_oi + r * stride_or + s * stride_os)[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=(co < C_out)[:, None] & of_tap)
    if BIAS:
        at = dbias_ptr + tl.program_id(1).to(tl.int64) * C_out + co
        tl.store(at, tl.sum(whole, axis=0).to(dbias_ptr.dtype.element_ty), mask=co < C_out)


@jit
def _finish_kernel(  # type: ignore[no-untyped-def]
    partial_ptr, dweight_ptr, biases_ptr, dbias_ptr,
    C_out, C_in, taps, across, splits, biases, blocks,
    stride_wo, stride_wi, stride_wr, stride_ws,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # partial: [splits, C_out, taps, C_in], biases: [biases, C_out]; each added in one order
    block = tl.program_id(0).to(tl.int64)
    acc = tl.zeros([BLOCK], tl.float32)
    if block < blocks:
        i = block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
        values = tl.cast(C_out, tl.int64) * taps * C_in
        for split in range(splits):
            acc += tl.load(partial_ptr + tl.cast(split, tl.int64) * values + i, mask=i < values, other=0.0)
        ci, tap, co = i % C_in, i // C_in % taps, i // C_in // taps
        at = dweight_ptr + co * stride_wo + ci * stride_wi + tap // across * stride_wr + tap % across * stride_ws
        tl.store(at, acc.to(dweight_ptr.dtype.element_ty), mask=i < values)
    else:
        co = (block - blocks) * BLOCK + tl.arange(0, BLOCK)
        for k in range(biases):
            acc += tl.load(biases_ptr + tl.cast(k, tl.int64) * C_out + co, mask=co < C_out, other=0.0)
        tl.store(dbias_ptr + co, acc.to(dbias_ptr.dtype.element_ty), mask=co < C_out)


@dataclass(frozen=True, slots=True)
class Filter:
    """What the taps of a filter read: the shape of its weight [o, i, R, S], and how its taps step over the two maps.

    Of a convolution tap (r, s) finds x (r, s) further on; of a deconvolution x stays, and dz is `stride` times as
    large, (r, s) further on.
    """

    rows: int
    columns: int
    deconvolves: bool = False

    @property
    def taps(self) -> int:
        return self.rows * self.columns


CONV3X3, DECONV2X2, CONV1X1 = Filter(3, 3), Filter(2, 2, deconvolves=True), Filter(1, 1)

_pointers = functools.partial(Blocks, "pointers")


# What compiles without spills into a chip's shared memory (tests/unet_kernels/test_dweight.py holds it), the most
# promising first: [sixteen bits or "tf32" or "ieee"][chip's generation][few channels on both sides (64) or many]
_TABLE: dict[str, dict[int, tuple[tuple[Blocks, ...], tuple[Blocks, ...]]]] = {
    "16 bits": {
        8: (
            (_pointers(64, 64, 64, 8, 3, taps=3), _pointers(64, 64, 64, 4, 3)),
            (_pointers(64, 128, 128, 8, 3), _pointers(32, 128, 64, 8, 3, taps=3), _pointers(64, 64, 64, 4, 3)),
        ),
        9: (
            (
                _pointers(64, 64, 64, 8, 2, taps=9),
                _pointers(64, 64, 64, 8, 3, taps=3),
                _pointers(64, 64, 64, 4, 4),
            ),
            (
                _pointers(64, 128, 128, 8, 4),
                _pointers(64, 128, 256, 8, 3),
                _pointers(64, 128, 64, 8, 2, taps=3),
                _pointers(64, 64, 64, 4, 4),
            ),
        ),
    },
    "tf32": dict.fromkeys(
        (8, 9),
        (
            (_pointers(32, 64, 64, 8, 2, taps=3), _pointers(32, 64, 64, 8, 3)),
            (_pointers(32, 128, 64, 8, 3), _pointers(32, 64, 64, 8, 3)),
        ),
    ),
    "ieee": dict.fromkeys((8, 9), ((_pointers(32, 64, 64, 8, 2),), (_pointers(32, 64, 64, 8, 2),))),
}


def blocks_for(
    dtype: torch.dtype,
    precision: str,
    chip: int,
    filter_: Filter,
    C_in: int,
    C_out: int,
    pixels: int,
    processors: int,
) -> list[Blocks]:
    """Ways to cut the gradient of a weight [C_out, C_in] x `filter_` over `pixels` pixels, the most promising first."""
    few, many = _TABLE[precision if dtype == torch.float32 else "16 bits"][9 if chip == 90 else 8]
    wide_out, wide_in = _power_of_two(C_out), _power_of_two(C_in)
    found = [
        replace(blocks, BLOCK_N=min(blocks.BLOCK_N, wide_out), BLOCK_K=min(blocks.BLOCK_K, wide_in))
        for blocks in (few if max(C_in, C_out) <= 64 else many)
        if blocks.taps == 1 or filter_ == CONV3X3
    ]
    if C_in <= MOST_DIRECT_CHANNELS and filter_ == CONV3X3:
        BLOCK_P = 32 if dtype == torch.float32 else 128
        found.insert(0, Blocks("direct", BLOCK_P, min(64, wide_out), _power_of_two(9 * C_in), 8, 2))
    # of what narrow channels make the same but for its stages, the first
    found = list({replace(blocks, stages=0): blocks for blocks in reversed(found)}.values())[::-1]
    found = [s for blocks in found for s in _split(blocks, filter_, C_in, C_out, pixels, processors)]
    return list(dict.fromkeys(found))


def _power_of_two(n: int) -> int:
    """The next power of two, at least 16: what a product of matrices takes."""
    return max(16, 1 << (n - 1).bit_length())


def _split(blocks: Blocks, filter_: Filter, C_in: int, C_out: int, pixels: int, processors: int) -> Iterator[Blocks]:
    """`blocks` with as many strips as fill the chip evenly, with one and with two programs a multiprocessor."""
    in_filter = -(-C_out // blocks.BLOCK_N)
    if blocks.kernel != "direct":
        in_filter *= -(-C_in // blocks.BLOCK_K) * filter_.taps // blocks.taps
    # each with enough steps to be worth its start; partial sums within bounds
    steps = -(-pixels // blocks.BLOCK_P)
    most = max(1, min(steps // 8, MOST_PARTIAL_BYTES // (4 * C_out * C_in * filter_.taps)))
    for places in (processors, 2 * processors):

        def busy(splits: int, places: int = places) -> float:
            programs = in_filter * splits
            return programs / (-(-programs // places) * places)

        # the last program of a wave is waited for by all; more strips than need be are more sums to add up
        tried = {min(most, max(1, waves * places // in_filter)) for waves in (1, 2, 3, 4)}
        yield replace(blocks, splits=min(tried, key=lambda splits: (-round(busy(splits), 1), splits)))


def ours(dz: Tensor, x: Tensor, filter_: Filter = CONV3X3) -> list[Blocks]:
    """Our launches that can make the gradient, the most promising first."""
    smaller = x if filter_.deconvolves else dz
    pixels = smaller.shape[0] * smaller.shape[2] * smaller.shape[3]
    precision, chip, processors = _triton.precision(x.dtype), _triton.chip(x.device), _triton.processors(x.device)
    return blocks_for(x.dtype, precision, chip, filter_, x.shape[1], dz.shape[1], pixels, processors)


def launch_dweight(
    dz: Tensor, x: Tensor, dweight: Tensor, with_bias: bool, blocks: Blocks, filter_: Filter = CONV3X3
) -> Tensor | None:
    """Fills dweight, [C_out, C_in, R, S] in any strides, and returns dbias [C_out] of its dtype if it is wanted.

    Args:
        dz: [N, C_out, rows, columns]; of a deconvolution, those are R and S times x's.
        x: [N, C_in, rows + R - 1, columns + S - 1]; of a deconvolution [N, C_in, rows / R, columns / S].
    """
    C_out, C_in = dz.shape[1], x.shape[1]
    R, S = filter_.rows, filter_.columns
    smaller = x if filter_.deconvolves else dz
    N, _, rows, columns = smaller.shape
    pixels = N * rows * columns
    steps_in_all = -(-pixels // blocks.BLOCK_P)
    steps = max(1, -(-steps_in_all // blocks.splits))
    # no strip is empty
    splits = max(1, -(-steps_in_all // steps))
    biases = filter_.taps if filter_.deconvolves else 1
    dbias = torch.empty(C_out, dtype=dweight.dtype, device=dz.device) if with_bias else None
    partial, out_strides = dweight, (*dweight.stride(), 0)
    of_bias = dbias
    if splits > 1:
        partial = torch.empty((splits, C_out, R, S, C_in), dtype=torch.float32, device=dz.device)
        split, o, r, s, i = partial.stride()
        out_strides = (o, i, r, s, split)
    if with_bias and splits * biases > 1:
        of_bias = torch.empty((splits, biases, C_out), dtype=torch.float32, device=dz.device)
    z_n, z_c, z_h, z_w = dz.stride()
    x_n, x_c, x_h, x_w = x.stride()
    given = (partial, of_bias, rows, columns, pixels, C_out, C_in, steps)
    what: dict[str, Any] = {
        "PRECISION": _triton.precision(dz.dtype),
        "BLOCK_P": blocks.BLOCK_P, "BLOCK_N": blocks.BLOCK_N, "BLOCK_K": blocks.BLOCK_K,
        "num_warps": blocks.warps, "num_stages": blocks.stages,
    }  # fmt: skip
    in_filter = -(-C_out // blocks.BLOCK_N)
    with _triton.on_device(dz):
        if blocks.kernel == "direct":
            # one program per block of output channels, per strip
            _direct_kernel[(in_filter, splits)](
                dz, x, *given, *dz.stride(), *x.stride(), *out_strides, BIAS=with_bias, **what
            )
        else:
            if filter_.deconvolves:
                z_steps, x_steps = (z_n, z_c, R * z_h, S * z_w, z_h, z_w), (x_n, x_c, x_h, x_w, 0, 0)
            else:
                z_steps, x_steps = (z_n, z_c, z_h, z_w, 0, 0), (x_n, x_c, x_h, x_w, x_h, x_w)
            groups = filter_.taps // blocks.taps
            # one program per group of taps of a block of the filter, per strip
            _pointers_kernel[(in_filter * -(-C_in // blocks.BLOCK_K) * groups, splits)](
                dz, x, *given, *z_steps, *x_steps, *out_strides,
                ACROSS=S, TAPS=blocks.taps, GROUPS=groups, BIAS=with_bias, BIASES=biases, **what,
            )  # fmt: skip
    _finish(partial, dweight, of_bias, dbias, splits, biases, filter_)
    return dbias


def _finish(
    partial: Tensor, dweight: Tensor, of_bias: Tensor | None, dbias: Tensor | None,
    splits: int, biases: int, filter_: Filter,
) -> None:  # fmt: skip
    C_out, C_in = dweight.shape[:2]
    BLOCK = 1024
    of_weight = -(-dweight.numel() // BLOCK) if splits > 1 else 0
    of_biases = -(-C_out // BLOCK) if of_bias is not dbias else 0
    if not of_weight + of_biases:
        return
    # one program per BLOCK values of dweight, and then of dbias
    with _triton.on_device(dweight):
        _finish_kernel[(of_weight + of_biases,)](
            partial, dweight, of_bias, dbias, C_out, C_in, filter_.taps, filter_.columns, splits, splits * biases,
            of_weight, *dweight.stride(), BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip


# the choice


def _launched(
    dz: Tensor, weight: Tensor, with_bias: bool, x: Tensor, skip: Tensor | None, blocks: Blocks, filter_: Filter
) -> tuple[Tensor, Tensor]:
    """(dweight in weight's strides, dbias; or an empty one)."""
    dweight = torch.empty_like(weight)
    # [C_out, C_in, R, S]
    found = dweight.transpose(0, 1) if filter_.deconvolves else dweight
    dbias = launch_dweight(dz, x, found[:, : x.shape[1]], with_bias, blocks, filter_)
    if skip is not None:
        launch_dweight(dz, skip, found[:, x.shape[1] :], False, blocks, filter_)
    return dweight, dz.new_empty(0, dtype=weight.dtype) if dbias is None else dbias


def _by_aten(
    dz: Tensor, weight: Tensor, with_bias: bool, x: Tensor, skip: Tensor | None, deconvolves: bool
) -> tuple[Tensor, Tensor]:
    narrow, channels = weight.to(dz.dtype), x.shape[1]
    stride = 2 if deconvolves else 1
    if skip is None:
        _, dweight, dbias = _aten.convolution_backward(dz, x, narrow, [False, True, with_bias], stride, deconvolves)
    else:
        _, of_x, dbias = _aten.convolution_backward(dz, x, narrow[:, :channels], [False, True, with_bias])
        of_skip = _aten.convolution_backward(dz, skip, narrow[:, channels:], [False, True, False])[1]
        assert of_x is not None
        assert of_skip is not None
        dweight = torch.cat([of_x, of_skip], 1)
    assert dweight is not None
    return dweight.to(weight.dtype), (dz.new_empty(0) if dbias is None else dbias).to(weight.dtype)


def question(
    dz: Tensor, weight: Tensor, with_bias: bool, x: Tensor, skip: Tensor | None, deconvolves: bool
) -> Question:
    filter_ = DECONV2X2 if deconvolves else CONV3X3 if weight.shape[2] == 3 else CONV1X1

    def ways() -> list[Way]:
        found = [Way("ATen", _by_aten, False)]
        for blocks in ours(dz, x, filter_):
            found.append(Way(str(blocks), functools.partial(_by_us, blocks=blocks, filter_=filter_), True))
        return found

    def cut(arguments: tuple[Any, ...], lines: int) -> tuple[Any, ...]:
        dz, weight, with_bias, x, skip, deconvolves = arguments
        of_x = lines // 2 if deconvolves else lines + filter_.rows - 1
        return (
            dz[:, :, : 2 * of_x if deconvolves else lines],
            weight,
            with_bias,
            x[:, :, :of_x],
            None if skip is None else skip[:, :, :of_x],
            deconvolves,
        )

    maps = [x] if skip is None else [x, skip]
    said = [
        f"{' + '.join(str(t.shape[1]) for t in maps)} -> {dz.shape[1]}",
        _choosing.octave(dz.shape[0] * dz.shape[2] * dz.shape[3]),
        _choosing.arithmetic(dz.dtype),
        _layout.words(dz, *maps),
        *(["in float32"] if weight.dtype != dz.dtype else []),
        *([] if _layout.suggests_channels_last(weight) else ["weight in other strides"]),
        *([] if with_bias else ["without bias"]),
    ]
    op = {DECONV2X2: "up_conv", CONV3X3: "conv3x3", CONV1X1: "conv1x1"}[filter_]
    if deconvolves:
        said.insert(0, "deconv")
    return Question(f"{op}_dweight", ", ".join(said), ways, _by_aten, cut, any_strides=True)


def _by_us(
    dz: Tensor, weight: Tensor, with_bias: bool, x: Tensor, skip: Tensor | None, deconvolves: bool,
    *, blocks: Blocks, filter_: Filter,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _launched(dz, weight, with_bias, x, skip, blocks, filter_)


def _computed(
    dz: Tensor, weight: Tensor, with_bias: bool, x: Tensor, skip: Tensor | None, deconvolves: bool
) -> tuple[Tensor, Tensor]:
    given = dz, weight, with_bias, x, skip, deconvolves
    dweight, dbias = _choosing.computed(question, _by_aten, given)
    return _as(weight, dweight), dbias


def _as(weight: Tensor, dweight: Tensor) -> Tensor:
    """dweight in the strides of weight."""
    if dweight.stride() == weight.stride():
        return dweight
    return torch.empty_like(weight).copy_(dweight)


@torch.library.custom_op("unet::dweight", mutates_args=())
def _op(
    dz: Tensor, weight: Tensor, with_bias: bool, x: Tensor, skip: Tensor | None, deconvolves: bool
) -> tuple[Tensor, Tensor]:
    return _computed(dz, weight, with_bias, x, skip, deconvolves)


@_op.register_fake
def _(
    dz: Tensor, weight: Tensor, with_bias: bool, x: Tensor, skip: Tensor | None, deconvolves: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), dz.new_empty(dz.shape[1] if with_bias else 0, dtype=weight.dtype)


def dweight(
    dz: Tensor, weight: Tensor, x: Tensor, skip: Tensor | None = None, *, with_bias: bool, deconvolves: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(dweight, dbias if it is wanted), by the fastest way, in the dtype and strides of weight, which may be wider.

    Args:
        dz: [N, C_out, H_out, W_out].
        x, skip: what the convolution read: a map, or two of one size.
        deconvolves: it was a 2x2 deconvolution.
    """
    found, of_bias = _checks.untraced(_op, _computed, dz, weight, with_bias, x, skip, deconvolves)
    return found, of_bias if with_bias else None


def of_parameters(
    dz: Tensor, weight: Tensor, x: Tensor, skip: Tensor | None, for_weight: bool, for_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """`dweight`, each of the two where it is needed."""
    if for_weight:
        return dweight(dz, weight, x, skip, with_bias=for_bias)
    return None, dz.sum((0, 2, 3), dtype=torch.float32).to(weight.dtype) if for_bias else None
