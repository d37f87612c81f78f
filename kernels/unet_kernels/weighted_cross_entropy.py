"""Softmax cross-entropy with a weight per pixel (Eq. 1 with its minus sign), from logits or from the last features.

    l[n, h, w] = pixel_weight[n, h, w] weight[t] (logsumexp_k z[n, k, h, w] - z[n, t, h, w]),   t = target[n, h, w]

z [N, K, H, W], target and pixel_weight [N, H, W]; all arithmetic in float32 (float64 for float64 logits).
Backward keeps what came in: dz = (softmax(z) - onehot(t)) x the pixel's share of the loss. `head_cross_entropy` also
makes z, by a 1x1 convolution, and makes it again in the backward instead of keeping it.
Derivation: docs/mathematics.md, section 4.

On CUDA `_fwd_kernel` reads logits, target and weights once, BLOCK_P pixels with all their classes a program, and leaves
three sums a program, which `_total_kernel` adds in one order; `_bwd_kernel` reads the same again and writes dz. Sums of
fixed order, so that the same input gives the same bits. `_head_fwd_kernel` and `_head_bwd_kernel` make z of BLOCK_P
pixels where it is needed, by a product of [BLOCK_P, C] and [C, K]; the latter walks over blocks and leaves one partial
gradient of weight and bias a program.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks, _triton, reference
from ._triton import jit, tl

__all__ = [
    "REDUCTIONS",
    "head_cross_entropy",
    "launch_head_cross_entropy_bwd",
    "launch_head_cross_entropy_fwd",
    "launch_weighted_cross_entropy_bwd",
    "launch_weighted_cross_entropy_fwd",
    "weighted_cross_entropy",
]

REDUCTIONS = ("none", "sum", "mean", "weighted_mean")
# classes of a pixel that one program holds
MOST_CLASSES = 256
# channels and classes of a pixel, where its logits are made on the way
MOST_CHANNELS, MOST_HEAD_CLASSES = 128, 16
# programs of the head's backward: each leaves a partial gradient
HEAD_PROGRAMS = 512
# integers that a kernel reads as they are; others are widened first
_READABLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@jit
def _factors(  # type: ignore[no-untyped-def]
    target_ptr, pixel_weight_ptr, class_weight_ptr, K, ignore_index, at_target, at_weight, inside,
    PIXEL_WEIGHT: tl.constexpr, CLASS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """(which pixels count, the class of each, class factor, class factor times pixel weight); NaN for no such class."""
    target = tl.load(target_ptr + at_target, mask=inside, other=0).to(tl.int64)
    valid = inside & (target != ignore_index)
    known = (target >= 0) & (target < K)
    if CLASS_WEIGHT:
        class_factor = tl.load(class_weight_ptr + target, mask=valid & known, other=0.0).to(tl.float32)
    else:
        class_factor = tl.where(valid, 1.0, 0.0)
    class_factor = tl.where(valid & (known == 0), float("nan"), class_factor)
    factor = class_factor
    if PIXEL_WEIGHT:
        # the weight of an ignored pixel may be NaN: it is not read
        factor = factor * tl.load(pixel_weight_ptr + at_weight, mask=valid, other=0.0).to(tl.float32)
    return valid, target, class_factor, factor


@jit
def _fwd_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, target_ptr, pixel_weight_ptr, class_weight_ptr, loss_ptr, denominator_ptr, sums_ptr,
    W, pixels, K, ignore_index, programs,
    stride_zn, stride_zk, stride_zh, stride_zw,
    stride_tn, stride_th, stride_tw,
    stride_wn, stride_wh, stride_ww,
    PIXEL_WEIGHT: tl.constexpr, CLASS_WEIGHT: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P] pixels of one image
    n = tl.program_id(1).to(tl.int64)
    h, w = (p // W).to(tl.int64), (p % W).to(tl.int64)
    inside = p < pixels
    valid, target, class_factor, factor = _factors(
        target_ptr, pixel_weight_ptr, class_weight_ptr, K, ignore_index,
        n * stride_tn + h * stride_th + w * stride_tw, n * stride_wn + h * stride_wh + w * stride_ww, inside,
        PIXEL_WEIGHT, CLASS_WEIGHT,
    )  # fmt: skip
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    at = (n * stride_zn + h * stride_zh + w * stride_zw)[:, None] + k[None, :] * stride_zk
    z = tl.load(logits_ptr + at, mask=inside[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
    z = tl.where((k < K)[None, :], z, -float("inf"))
    # without its largest no exponential overflows
    top = tl.max(z, axis=1)
    log_sum = tl.log(tl.sum(tl.exp(z - top[:, None]), axis=1))
    of_target = tl.sum(tl.where(k[None, :] == target[:, None], z, 0.0), axis=1)
    loss = tl.where(valid, ((top - of_target) + log_sum) * factor, 0.0)
    if SUMS:
        # [3, programs]
        out = sums_ptr + n * tl.num_programs(0) + tl.program_id(0)
        tl.store(out, tl.sum(loss, axis=0))
        tl.store(out + programs, tl.sum(class_factor, axis=0))
        tl.store(out + 2 * programs, tl.sum(factor, axis=0))
    else:
        tl.store(loss_ptr + n * pixels + p, loss, mask=inside)
        first = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
        tl.store(denominator_ptr, 1.0, mask=first)


@jit
def _total_kernel(  # type: ignore[no-untyped-def]
    sums_ptr, loss_ptr, denominator_ptr, programs, BY: tl.constexpr, BLOCK: tl.constexpr
):
    """One program. BY: 0 divides by nothing, 1 by the class factors, 2 by class factors times pixel weights."""
    total = tl.zeros([BLOCK], tl.float64)
    divisor = tl.zeros([BLOCK], tl.float64)
    start = 0
    while start < programs:
        i = start + tl.arange(0, BLOCK)
        total += tl.load(sums_ptr + i, mask=i < programs, other=0.0)
        if BY:
            divisor += tl.load(sums_ptr + BY * programs + i, mask=i < programs, other=0.0)
        start += BLOCK
    loss, denominator = tl.sum(total, axis=0), tl.sum(divisor, axis=0)
    if BY:
        # nothing to average is 0
        loss = tl.where(denominator == 0.0, 0.0, loss / tl.where(denominator == 0.0, 1.0, denominator))
        tl.store(denominator_ptr, denominator.to(tl.float32))
    else:
        tl.store(denominator_ptr, 1.0)
    tl.store(loss_ptr, loss.to(tl.float32))


@jit
def _bwd_kernel(  # type: ignore[no-untyped-def]
    dloss_ptr, logits_ptr, target_ptr, pixel_weight_ptr, class_weight_ptr, denominator_ptr, dlogits_ptr,
    W, pixels, K, ignore_index,
    stride_ln, stride_lh, stride_lw,
    stride_zn, stride_zk, stride_zh, stride_zw,
    stride_tn, stride_th, stride_tw,
    stride_wn, stride_wh, stride_ww,
    stride_dn, stride_dk, stride_dh, stride_dw,
    PIXEL_WEIGHT: tl.constexpr, CLASS_WEIGHT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P] pixels of one image
    n = tl.program_id(1).to(tl.int64)
    h, w = (p // W).to(tl.int64), (p % W).to(tl.int64)
    inside = p < pixels
    valid, target, _class_factor, factor = _factors(
        target_ptr, pixel_weight_ptr, class_weight_ptr, K, ignore_index,
        n * stride_tn + h * stride_th + w * stride_tw, n * stride_wn + h * stride_wh + w * stride_ww, inside,
        PIXEL_WEIGHT, CLASS_WEIGHT,
    )  # fmt: skip
    denominator = tl.load(denominator_ptr)
    dloss = tl.load(dloss_ptr + n * stride_ln + h * stride_lh + w * stride_lw, mask=valid, other=0.0)
    share = tl.where(denominator == 0.0, 0.0, factor / tl.where(denominator == 0.0, 1.0, denominator)) * dloss
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    there = inside[:, None] & (k < K)[None, :]
    at = (n * stride_zn + h * stride_zh + w * stride_zw)[:, None] + k[None, :] * stride_zk
    z = tl.load(logits_ptr + at, mask=there, other=0.0).to(tl.float32)
    z = tl.where((k < K)[None, :], z, -float("inf"))
    e = tl.exp(z - tl.max(z, axis=1)[:, None])
    softmax = e / tl.sum(e, axis=1)[:, None]
    dz = softmax * share[:, None] - tl.where(k[None, :] == target[:, None], share[:, None], 0.0)
    at = (n * stride_dn + h * stride_dh + w * stride_dw)[:, None] + k[None, :] * stride_dk
    tl.store(dlogits_ptr + at, dz.to(dlogits_ptr.dtype.element_ty), mask=there)


@jit
def _head(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, bias_ptr, at, inside, C, K, stride_xc, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr
):
    """(x [BLOCK_P, BLOCK_C], weight [BLOCK_K, BLOCK_C], logits [BLOCK_P, BLOCK_K], -inf beyond K)."""
    c, k = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    at = at[:, None] + c.to(tl.int64)[None, :] * stride_xc
    x = tl.load(x_ptr + at, mask=inside[:, None] & (c < C)[None, :], other=0.0)
    weight = tl.load(weight_ptr + k[:, None] * C + c[None, :], mask=(k < K)[:, None] & (c < C)[None, :], other=0.0)
    bias = tl.load(bias_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    z = tl.dot(x, tl.trans(weight), input_precision="ieee") + bias[None, :]
    return x, weight, tl.where((k < K)[None, :], z, -float("inf"))


@jit
def _head_fwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, bias_ptr, target_ptr, pixel_weight_ptr, class_weight_ptr, loss_ptr, denominator_ptr, sums_ptr,
    W, pixels, C, K, ignore_index, programs,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_tn, stride_th, stride_tw,
    stride_wn, stride_wh, stride_ww,
    PIXEL_WEIGHT: tl.constexpr, CLASS_WEIGHT: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P] pixels of one image
    n = tl.program_id(1).to(tl.int64)
    h, w = (p // W).to(tl.int64), (p % W).to(tl.int64)
    inside = p < pixels
    valid, target, class_factor, factor = _factors(
        target_ptr, pixel_weight_ptr, class_weight_ptr, K, ignore_index,
        n * stride_tn + h * stride_th + w * stride_tw, n * stride_wn + h * stride_wh + w * stride_ww, inside,
        PIXEL_WEIGHT, CLASS_WEIGHT,
    )  # fmt: skip
    at = n * stride_xn + h * stride_xh + w * stride_xw
    _x, _weight, z = _head(x_ptr, weight_ptr, bias_ptr, at, inside, C, K, stride_xc, BLOCK_C, BLOCK_K)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    top = tl.max(z, axis=1)
    log_sum = tl.log(tl.sum(tl.exp(z - top[:, None]), axis=1))
    of_target = tl.sum(tl.where(k[None, :] == target[:, None], z, 0.0), axis=1)
    loss = tl.where(valid, ((top - of_target) + log_sum) * factor, 0.0)
    if SUMS:
        # [3, programs]
        out = sums_ptr + n * tl.num_programs(0) + tl.program_id(0)
        tl.store(out, tl.sum(loss, axis=0))
        tl.store(out + programs, tl.sum(class_factor, axis=0))
        tl.store(out + 2 * programs, tl.sum(factor, axis=0))
    else:
        tl.store(loss_ptr + n * pixels + p, loss, mask=inside)
        first = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
        tl.store(denominator_ptr, 1.0, mask=first)


@jit
def _head_bwd_kernel(  # type: ignore[no-untyped-def]
    dloss_ptr, x_ptr, weight_ptr, bias_ptr, target_ptr, pixel_weight_ptr, class_weight_ptr, denominator_ptr,
    dx_ptr, dweight_ptr, dbias_ptr,
    W, pixels, blocks, C, K, ignore_index,
    stride_ln, stride_lh, stride_lw,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_tn, stride_th, stride_tw,
    stride_wn, stride_wh, stride_ww,
    stride_dn, stride_dc, stride_dh, stride_dw,
    PIXEL_WEIGHT: tl.constexpr, CLASS_WEIGHT: tl.constexpr, MAP: tl.constexpr, DX: tl.constexpr, DWEIGHT: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # blocks: of all images, each of one image
    per_image = tl.cdiv(pixels, BLOCK_P)
    k, c = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_C)
    denominator = tl.load(denominator_ptr)
    # after the products: what narrow numbers hold is of the size of a weight, not of a share of a mean
    exactly = tl.full([], 1.0, tl.float64)
    if not MAP:
        exactly = tl.load(dloss_ptr).to(tl.float64)
    exactly = tl.where(denominator == 0.0, 0.0, exactly / tl.where(denominator == 0.0, 1.0, denominator).to(tl.float64))
    scale = exactly.to(tl.float32)
    dweight = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    # pixel by pixel until the end, and in float64 then: a sum of many that nearly cancel
    dz_sum = tl.zeros([BLOCK_P, BLOCK_K], tl.float32)
    block = tl.program_id(0)
    while block < blocks:
        p = (block % per_image) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
        n = (block // per_image).to(tl.int64)
        h, w = (p // W).to(tl.int64), (p % W).to(tl.int64)
        inside = p < pixels
        valid, target, _class_factor, share = _factors(
            target_ptr, pixel_weight_ptr, class_weight_ptr, K, ignore_index,
            n * stride_tn + h * stride_th + w * stride_tw, n * stride_wn + h * stride_wh + w * stride_ww, inside,
            PIXEL_WEIGHT, CLASS_WEIGHT,
        )  # fmt: skip
        if MAP:
            share *= tl.load(dloss_ptr + n * stride_ln + h * stride_lh + w * stride_lw, mask=valid, other=0.0)
        at = n * stride_xn + h * stride_xh + w * stride_xw
        x, weight, z = _head(x_ptr, weight_ptr, bias_ptr, at, inside, C, K, stride_xc, BLOCK_C, BLOCK_K)
        e = tl.exp(z - tl.max(z, axis=1)[:, None])
        softmax = e / tl.sum(e, axis=1)[:, None]
        onehot = k.to(tl.int64)[None, :] == target[:, None]
        dz = softmax * share[:, None] - tl.where(onehot, share[:, None], 0.0)
        dz_sum += dz
        size = 1.0
        if x.dtype == tl.float16:
            # its exponents end at 65504 and at 6e-8: by the block's largest share, which is multiplied in again
            largest = tl.max(tl.abs(share), axis=0)
            size = tl.where((largest > 0.0) & (largest < 3e38), largest, 1.0)
        narrow = (dz / size).to(x.dtype)
        if DX:
            dx = tl.dot(narrow, weight, input_precision="ieee") * (size * scale)
            at = (n * stride_dn + h * stride_dh + w * stride_dw)[:, None] + c.to(tl.int64)[None, :] * stride_dc
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside[:, None] & (c < C)[None, :])
        if DWEIGHT:
            dweight += tl.dot(tl.trans(narrow), x, input_precision="ieee") * size
        block += tl.num_programs(0)
    out = tl.program_id(0) * K
    # an error of the factor would be the same in all partial sums
    dbias = tl.sum(dz_sum.to(tl.float64), axis=0) * exactly
    tl.store(dbias_ptr + out + k, dbias.to(tl.float32), mask=k < K)
    if DWEIGHT:
        out = (out + k)[:, None] * C + c[None, :]
        dweight = (dweight.to(tl.float64) * exactly).to(tl.float32)
        tl.store(dweight_ptr + out, dweight, mask=(k < K)[:, None] & (c < C)[None, :])


def blocks(K: int) -> tuple[int, int]:
    """(BLOCK_P, BLOCK_K): all classes of a pixel in one program, 2048 values at most, and 512 pixels."""
    BLOCK_K = max(2, 1 << (K - 1).bit_length())
    return min(512, 2048 // BLOCK_K), BLOCK_K


def why_not(logits: Tensor) -> str:
    """Why the Triton kernels cannot take logits [N, K, H, W], or "" if they can."""
    if logits.shape[1] > MOST_CLASSES:
        return f"more than {MOST_CLASSES} classes are left to torch"
    if logits.shape[0] >= 2**16 or logits.shape[2] * logits.shape[3] >= 2**31 - 512:
        return "so many pixels are left to torch"
    return _triton.why_not(logits.device, logits.dtype)


def launch_weighted_cross_entropy_fwd(
    logits: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """(loss, what it was divided by), both float32."""
    N, K, H, W = logits.shape
    denominator = torch.empty((), dtype=torch.float32, device=logits.device)
    none = reduction == "none"
    loss = torch.empty((N, H, W) if none else (), dtype=torch.float32, device=logits.device)
    BLOCK_P, BLOCK_K = blocks(K)
    grid = (-(-H * W // BLOCK_P), N)
    programs = grid[0] * N
    sums = torch.empty((3, programs), dtype=torch.float32, device=logits.device)
    target, pixel_weight, weight, strides = _arguments(target, pixel_weight, weight)
    with _triton.on_device(logits):
        if programs:
            _fwd_kernel[grid](
                logits, target, pixel_weight, weight, loss, denominator, sums,
                W, H * W, K, ignore_index, programs,
                *logits.stride(), *strides,
                PIXEL_WEIGHT=pixel_weight is not None, CLASS_WEIGHT=weight is not None, SUMS=not none,
                BLOCK_P=BLOCK_P, BLOCK_K=BLOCK_K, num_warps=4,
            )  # fmt: skip
        _reduce(sums, loss, denominator, reduction)
    return loss, denominator


def launch_weighted_cross_entropy_bwd(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    weight: Tensor | None,
    denominator: Tensor,
    ignore_index: int,
) -> Tensor:
    """The gradient of logits, in their dtype and strides."""
    N, K, H, W = logits.shape
    dlogits = torch.empty_like(logits)
    if not logits.numel():
        return dlogits
    BLOCK_P, BLOCK_K = blocks(K)
    target, pixel_weight, weight, strides = _arguments(target, pixel_weight, weight)
    with _triton.on_device(logits):
        _bwd_kernel[(-(-H * W // BLOCK_P), N)](
            dloss, logits, target, pixel_weight, weight, denominator, dlogits,
            W, H * W, K, ignore_index,
            *(dloss.stride() if dloss.dim() else (0, 0, 0)), *logits.stride(), *strides, *dlogits.stride(),
            PIXEL_WEIGHT=pixel_weight is not None, CLASS_WEIGHT=weight is not None,
            BLOCK_P=BLOCK_P, BLOCK_K=BLOCK_K, num_warps=4,
        )  # fmt: skip
    return dlogits


def head_blocks(C: int, K: int, values: int) -> tuple[int, int, int]:
    """(BLOCK_P, BLOCK_C, BLOCK_K): all channels and classes of a pixel in one program, and so many values of x."""
    BLOCK_C, BLOCK_K = (max(16, 1 << (count - 1).bit_length()) for count in (C, K))
    return max(16, min(128, values // BLOCK_C)), BLOCK_C, BLOCK_K


def head_why_not(x: Tensor, weight: Tensor) -> str:
    """Why the Triton kernels cannot take x [N, C, H, W] and weight [K, C, 1, 1], or "" if they can."""
    if x.shape[1] > MOST_CHANNELS or weight.shape[0] > MOST_HEAD_CLASSES:
        return f"more than {MOST_CHANNELS} channels or {MOST_HEAD_CLASSES} classes are left to torch"
    return why_not(x[:, :1]) or _triton.why_no_dot(x.device, x.dtype)


def launch_head_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """(loss, what it was divided by), both float32."""
    N, C, H, W = x.shape
    K = weight.shape[0]
    none = reduction == "none"
    loss = torch.empty((N, H, W) if none else (), dtype=torch.float32, device=x.device)
    denominator = torch.empty((), dtype=torch.float32, device=x.device)
    BLOCK_P, BLOCK_C, BLOCK_K = head_blocks(C, K, 4096)
    grid = (-(-H * W // BLOCK_P), N)
    programs = grid[0] * N
    sums = torch.empty((3, programs), dtype=torch.float32, device=x.device)
    target, pixel_weight, class_weight, strides = _arguments(target, pixel_weight, class_weight)
    with _triton.on_device(x):
        if programs:
            _head_fwd_kernel[grid](
                x, weight.reshape(K, C).contiguous(), bias.contiguous(), target, pixel_weight, class_weight,
                loss, denominator, sums,
                W, H * W, C, K, ignore_index, programs,
                *x.stride(), *strides,
                PIXEL_WEIGHT=pixel_weight is not None, CLASS_WEIGHT=class_weight is not None, SUMS=not none,
                BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C, BLOCK_K=BLOCK_K, num_warps=4,
            )  # fmt: skip
        _reduce(sums, loss, denominator, reduction)
    return loss, denominator


def launch_head_cross_entropy_bwd(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    class_weight: Tensor | None,
    denominator: Tensor,
    ignore_index: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias, those that are needed; the others are empty."""
    N, C, H, W = x.shape
    K = weight.shape[0]
    dx = torch.empty_like(x) if needs[0] else x.new_empty(0)
    BLOCK_P, BLOCK_C, BLOCK_K = head_blocks(C, K, 2048)
    blocks = -(-H * W // BLOCK_P) * N
    programs = min(blocks, HEAD_PROGRAMS)
    dweight = torch.empty((programs, K, C) if needs[1] else (0,), dtype=torch.float32, device=x.device)
    dbias = torch.empty((programs, K), dtype=torch.float32, device=x.device)
    target, pixel_weight, class_weight, strides = _arguments(target, pixel_weight, class_weight)
    if programs:
        with _triton.on_device(x):
            _head_bwd_kernel[(programs,)](
                dloss, x, weight.reshape(K, C).contiguous(), bias.contiguous(),
                target, pixel_weight, class_weight, denominator, dx, dweight, dbias,
                W, H * W, blocks, C, K, ignore_index,
                *(dloss.stride() if dloss.dim() else (0, 0, 0)), *x.stride(), *strides,
                *(dx.stride() if needs[0] else (0, 0, 0, 0)),
                PIXEL_WEIGHT=pixel_weight is not None, CLASS_WEIGHT=class_weight is not None, MAP=dloss.dim() > 0,
                DX=bool(needs[0]), DWEIGHT=bool(needs[1]),
                BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C, BLOCK_K=BLOCK_K, num_warps=4,
            )  # fmt: skip
    # partial sums, added in one order
    total: dict[str, Any] = {"dim": 0, "dtype": torch.float64}
    of_weight = dweight.sum(**total).to(weight.dtype).reshape(weight.shape) if needs[1] else x.new_empty(0)
    return dx, of_weight, dbias.sum(**total).to(bias.dtype) if needs[2] else x.new_empty(0)


def _reduce(sums: Tensor, loss: Tensor, denominator: Tensor, reduction: str) -> None:
    """Loss and denominator of the three sums of each program."""
    if reduction == "none":
        if not loss.numel():
            denominator.fill_(1)
        return
    by = {"sum": 0, "mean": 1, "weighted_mean": 2}[reduction]
    _total_kernel[(1,)](sums, loss, denominator, sums.shape[1], BY=by, BLOCK=1024, num_warps=4)


def _arguments(
    target: Tensor, pixel_weight: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, tuple[int, ...]]:
    """target, pixel_weight and weight as the kernels read them, and the strides of the first two."""
    if target.dtype not in _READABLE:
        target = target.long()
    weight = None if weight is None else weight.contiguous()
    return (
        target,
        pixel_weight,
        weight,
        (*target.stride(), *((0, 0, 0) if pixel_weight is None else pixel_weight.stride())),
    )


@torch.library.custom_op("unet::weighted_cross_entropy", mutates_args=())
@_checks.outside_autocast
def _op(
    logits: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    _expect_classes(target, logits.shape[1], ignore_index)
    return _with_denominator(logits, target, pixel_weight, weight, ignore_index, reduction)


def _with_denominator(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    # a map of losses in rows, whatever strides the target has: as the kernels write it
    return reference.weighted_cross_entropy(logits, *rest).contiguous(), reference.denominator(logits, *rest)


def _fake_loss(maps: Tensor, target: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if maps.dtype == torch.float64 else torch.float32
    loss = maps.new_empty(target.shape if reduction == "none" else (), dtype=dtype)
    return loss, maps.new_empty((), dtype=dtype)


@_op.register_kernel("cuda")
@_checks.outside_autocast
def _cuda(
    logits: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    arguments = (logits, target, pixel_weight, weight, ignore_index, reduction)
    return _with_denominator(*arguments) if why_not(logits) else launch_weighted_cross_entropy_fwd(*arguments)


@_op.register_fake
def _(logits: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _fake_loss(logits, target, rest[-1])


@torch.library.custom_op("unet::weighted_cross_entropy_backward", mutates_args=())
@_checks.outside_autocast
def _backward_op(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    weight: Tensor | None,
    denominator: Tensor,
    ignore_index: int,
) -> Tensor:
    return _logits_gradient(dloss, logits, target, pixel_weight, weight, denominator, ignore_index)


@_backward_op.register_kernel("cuda")
@_checks.outside_autocast
def _backward_cuda(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    weight: Tensor | None,
    denominator: Tensor,
    ignore_index: int,
) -> Tensor:
    arguments = (dloss, logits, target, pixel_weight, weight, denominator, ignore_index)
    return _logits_gradient(*arguments) if why_not(logits) else launch_weighted_cross_entropy_bwd(*arguments)


@_backward_op.register_fake
def _(dloss: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(logits)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.ignore_index = inputs
    ctx.save_for_backward(*tensors)


@_checks.outside_autocast
def _second(ctx: Any, ddlogits: Tensor) -> tuple[Tensor | None, ...]:
    """Of the derivative's own formula, by ATen: rarely wanted, and then right rather than fast."""
    saved = ctx.saved_tensors
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in saved[:2]]
        arguments = (*leaves, *saved[2:], ctx.ignore_index)
        dlogits = _logits_gradient(*arguments)
        return *torch.autograd.grad(dlogits, leaves, ddlogits), None, None, None, None, None


_backward_op.register_autograd(_second, setup_context=_setup_backward)


@torch.library.custom_op("unet::head_cross_entropy", mutates_args=())
@_checks.outside_autocast
def _head_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    _expect_classes(target, weight.shape[0], ignore_index)
    return _head_with_denominator(x, weight, bias, target, pixel_weight, class_weight, ignore_index, reduction)


def _head_with_denominator(x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _with_denominator(F.conv2d(x, weight, bias), *rest)


@_head_op.register_kernel("cuda")
@_checks.outside_autocast
def _head_cuda(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    arguments = (x, weight, bias, target, pixel_weight, class_weight, ignore_index, reduction)
    return _head_with_denominator(*arguments) if head_why_not(x, weight) else launch_head_cross_entropy_fwd(*arguments)


@_head_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _fake_loss(x, target, rest[-1])


def _expect_classes(target: Tensor, classes: int, ignore_index: int) -> None:
    # on a GPU this would wait for it; there the loss is NaN
    if target.device.type != "cpu" or target.numel() == 0:
        return
    low, high = target.long().aminmax()
    if low >= 0 and high < classes:
        return
    # some pixel is no class: ignored, or wrong
    low, high = reference.chosen(target, ignore_index)[1].aminmax()
    if low < 0 or high >= classes:
        wrong = int(low if low < 0 else high)
        raise ValueError(
            f"target must hold class ids 0 to {classes - 1} (one per channel of logits) or ignore_index "
            f"{ignore_index}, got {wrong}"
        )


def _logits_gradient(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    weight: Tensor | None,
    denominator: Tensor,
    ignore_index: int,
) -> Tensor:
    wide = reference.at_least_float32(logits)
    valid, index = reference.chosen(target, ignore_index)
    _, share = reference.pixel_factors(wide, valid, index, pixel_weight, weight)
    # what an ignored pixel's loss is multiplied by does not matter, be it NaN
    share = torch.where(valid, reference.over(share, denominator) * dloss, 0).unsqueeze(1)
    dlogits = (F.softmax(wide, dim=1) * share).scatter_add_(1, index, -share)
    return torch.empty_like(logits).copy_(dlogits)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.ignore_index, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx: Any, dloss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    dlogits = _backward_op(dloss, *ctx.saved_tensors, ctx.ignore_index) if ctx.needs_input_grad[0] else None
    return dlogits, None, None, None, None, None


@torch.library.custom_op("unet::head_cross_entropy_backward", mutates_args=())
@_checks.outside_autocast
def _head_backward_op(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    class_weight: Tensor | None,
    denominator: Tensor,
    ignore_index: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = (dloss, x, weight, bias, target, pixel_weight, class_weight, denominator, ignore_index, needs)
    return _head_gradients(*arguments)


def _head_gradients(
    dloss: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *of_loss, needs = rest
    dlogits = _logits_gradient(dloss, F.conv2d(x, weight, bias), *of_loss)
    gradients = torch.ops.aten.convolution_backward(
        dlogits, x, weight, [weight.shape[0]], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, list(needs)
    )
    # in the strides that the kernels write
    dx, dweight, dbias = (
        made if d is None else d if d.stride() == made.stride() else made.copy_(d)
        for made, d in zip(_made_gradients(x, weight, bias, needs), gradients, strict=True)
    )
    return dx, dweight, dbias


def _made_gradients(x: Tensor, weight: Tensor, bias: Tensor, needs: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients: an op returns tensors, and one that nobody needs is empty."""
    return (
        torch.empty_like(x) if needs[0] else x.new_empty(0),
        weight.new_empty(weight.shape) if needs[1] else x.new_empty(0),
        bias.new_empty(bias.shape) if needs[2] else x.new_empty(0),
    )


@_head_backward_op.register_kernel("cuda")
@_checks.outside_autocast
def _head_backward_cuda(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    class_weight: Tensor | None,
    denominator: Tensor,
    ignore_index: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = (dloss, x, weight, bias, target, pixel_weight, class_weight, denominator, ignore_index, needs)
    return _head_gradients(*arguments) if head_why_not(x, weight) else launch_head_cross_entropy_bwd(*arguments)


@_head_backward_op.register_fake
def _(dloss: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _made_gradients(x, weight, bias, rest[-1])


def _setup_head_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.ignore_index, ctx.needs = inputs
    ctx.save_for_backward(*tensors)


@_checks.outside_autocast
def _head_second(ctx: Any, *second: Tensor) -> tuple[Tensor | None, ...]:
    """As `_second`."""
    saved = ctx.saved_tensors
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in saved[:4]]
        gradients = _head_gradients(*leaves, *saved[4:], ctx.ignore_index, ctx.needs)
        wanted = [i for i, needed in enumerate(ctx.needs) if needed]
        found = torch.autograd.grad(
            [gradients[i] for i in wanted], leaves, [second[i] for i in wanted], allow_unused=True
        )
        return *found, None, None, None, None, None, None


_head_backward_op.register_autograd(_head_second, setup_context=_setup_head_backward)


def _head_backward(ctx: Any, dloss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    if not any(needs):
        return (None,) * 8
    gradients = _head_backward_op(dloss, *ctx.saved_tensors, ctx.ignore_index, needs)
    return (*(d if needed else None for d, needed in zip(gradients, needs, strict=True)), *(None,) * 5)


_op.register_autograd(_backward, setup_context=_setup)
_head_op.register_autograd(_head_backward, setup_context=_setup)


def weighted_cross_entropy(
    logits: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Softmax cross-entropy, each pixel weighted: Eq. 1 of Ronneberger et al. 2015, with its minus sign.

    Args:
        logits: [N, K, H, W]; float32, float16, bfloat16 or float64.
        target: [N, H, W], any integer dtype or bool: class ids 0 to K - 1, or ignore_index.
        pixel_weight: [N, H, W], floating, or None for 1 everywhere. It gets no gradient.
        weight: [K], floating, one factor per class as in torch's cross_entropy, or None.
        ignore_index: pixels with this target weigh nothing.
        reduction: "none": [N, H, W], 0 where ignored. "sum": the paper's. "mean": torch's, the sum over the sum of
            weight[target] over valid pixels (their number when weight is None), pixel_weight never in the
            denominator. "weighted_mean": the sum over the sum of pixel_weight * weight[target].

    Returns:
        The loss in float32 (float64 for float64 logits); 0 where there is no valid pixel. Differentiable in logits.
        A class id out of range is a ValueError on a CPU; on a GPU nobody waits for it, and it makes the loss NaN.

    Raises:
        TypeError: an argument is no tensor, or has the wrong kind of dtype.
        ValueError: a shape, a device, a class id or the reduction does not fit.

    >>> logits = torch.tensor([0.0, 0.0]).view(1, 2, 1, 1)
    >>> round(weighted_cross_entropy(logits, torch.zeros(1, 1, 1, dtype=torch.int64)).item(), 4)
    0.6931
    """
    _checks.expect_float("logits", logits, "N, K, H, W")
    ignore_index = _checks.expect_whole("ignore_index", ignore_index)
    _expect_loss_arguments(target, pixel_weight, "weight", weight, reduction, "logits", logits)
    if weight is not None:
        _checks.expect_size("weight", weight, (logits.shape[1],), "(one per class, K channels of logits)")
    logits = _checks.autocast_to_float32(logits)
    if _checks.transformed():
        return reference.weighted_cross_entropy(logits, target, pixel_weight, weight, ignore_index, reduction)
    if _checks.ordinary_on_cpu(logits):
        # ATen's own derivative, which keeps the softmax's logarithm and so needs no second one
        _expect_classes(target, logits.shape[1], ignore_index)
        return reference.weighted_cross_entropy(logits, target, pixel_weight, weight, ignore_index, reduction)
    return _op(logits, target, pixel_weight, weight, ignore_index, reduction)[0]


def head_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """`weighted_cross_entropy(conv2d(x, weight, bias), target, pixel_weight, weight=class_weight, ...)`.

    On a GPU the logits are never stored: the backward makes them again. Under autocast x, weight and bias are cast to
    its dtype; the loss is computed in float32 all the same.

    Args:
        x: [N, C, H, W], the last features; float32, float16, bfloat16 or float64.
        weight: [K, C, 1, 1], dtype and device of x.
        bias: [K], likewise.
        target: [N, H, W], any integer dtype or bool: class ids 0 to K - 1, or ignore_index.
        pixel_weight: [N, H, W], floating, or None.
        class_weight: [K], floating, or None.
        ignore_index: pixels with this target weigh nothing.
        reduction: as in `weighted_cross_entropy`.

    Returns:
        The loss in float32 (float64 for float64 features). Differentiable in x, weight and bias.

    Raises:
        TypeError: an argument is no tensor, or has the wrong kind of dtype.
        ValueError: a shape, a device, a class id or the reduction does not fit.
    """
    _checks.expect_float("x", x, "N, C, H, W")
    _checks.expect_float("weight", weight, "K, C, 1, 1")
    _checks.expect_size("weight", weight, (-1, x.shape[1], 1, 1), "(C is the channels of x)")
    _checks.expect_float("bias", bias, "K")
    _checks.expect_size("bias", bias, (weight.shape[0],), "(one per class, K rows of weight)")
    ignore_index = _checks.expect_whole("ignore_index", ignore_index)
    _expect_loss_arguments(target, pixel_weight, "class_weight", class_weight, reduction, "x", x)
    if class_weight is not None:
        _checks.expect_size("class_weight", class_weight, (weight.shape[0],), "(one per class, K rows of weight)")
    x, weight, bias = _checks.autocast(x, weight, bias)
    _checks.expect_like("weight", weight, "x", x)
    _checks.expect_like("bias", bias, "x", x)
    arguments = (x, weight, bias, target, pixel_weight, class_weight, ignore_index, reduction)
    if _checks.transformed():
        return reference.head_cross_entropy(*arguments)
    if _checks.ordinary_on_cpu(x):
        # as above; on a CPU making the logits again costs more than keeping so few of them
        _expect_classes(target, weight.shape[0], ignore_index)
        return reference.head_cross_entropy(*arguments)
    return _head_op(*arguments)[0]


def _expect_loss_arguments(
    target: Tensor,
    pixel_weight: Tensor | None,
    class_weight_name: str,
    class_weight: Tensor | None,
    reduction: str,
    maps_name: str,
    maps: Tensor,
) -> None:
    _checks.expect_choice("reduction", reduction, REDUCTIONS)
    size = (maps.shape[0], *maps.shape[2:])
    # a bool too: `cut_gap(instances) > 0` is a target
    _checks.expect_tensor("target", target, "N, H, W", (*_checks.INTEGERS, torch.bool), "an integer tensor")
    _checks.expect_size("target", target, size, f"(N, H, W of {maps_name})")
    _checks.expect_device("target", target, maps_name, maps)
    if pixel_weight is not None:
        _checks.expect_float("pixel_weight", pixel_weight, "N, H, W")
        _checks.expect_size("pixel_weight", pixel_weight, size, f"(N, H, W of {maps_name})")
        _checks.expect_device("pixel_weight", pixel_weight, maps_name, maps)
    if class_weight is not None:
        _checks.expect_float(class_weight_name, class_weight, "K")
        _checks.expect_device(class_weight_name, class_weight, maps_name, maps)
