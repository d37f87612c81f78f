"""Centre-crop a skip map, lay it behind the map from below: one read and one write per value.

    y[n, c, h, w] = up[n, c, h, w]                                for c < C_up
                    skip[n, c - C_up, h + top, w + left]          otherwise,  top = (H_skip - H) // 2, left likewise

up [N, C_up, H, W], skip [N, C_skip, >= H, >= W] in any strides; y [N, C_up + C_skip, H, W] in the strides that
torch.cat would give. Nothing is accumulated and nothing saved but shapes. Traffic: 2 x bytes of y.
One program copies BLOCK_W pixels of one row times BLOCK_C channels, all of them from one of the two maps.
"""

from typing import Any

import torch
from torch import Tensor

from . import _checks, _layout, _triton, reference
from ._triton import jit, tl

__all__ = ["crop_concat", "launch_crop_concat_fwd"]


@jit
def _fwd_kernel(  # type: ignore[no-untyped-def]
    up_ptr, skip_ptr, y_ptr,
    H, W, C_up, C_skip, top, left,
    stride_un, stride_uc, stride_uh, stride_uw,
    stride_sn, stride_sc, stride_sh, stride_sw,
    stride_yn, stride_yc, stride_yh, stride_yw,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    n, h = line // H, line % H
    w = (tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)).to(tl.int64)  # [BLOCK_W]
    block = tl.program_id(2)
    up_blocks = tl.cdiv(C_up, BLOCK_C)
    y_row = y_ptr + n * stride_yn + h * stride_yh + w[:, None] * stride_yw  # [BLOCK_W, 1]
    # a program's channels all come from one map, so the choice is a branch and not a mask
    if block < up_blocks:
        c = (block * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)  # [BLOCK_C]
        inside = (w < W)[:, None] & (c < C_up)[None, :]
        up_row = up_ptr + n * stride_un + h * stride_uh + w[:, None] * stride_uw
        up = tl.load(up_row + c[None, :] * stride_uc, mask=inside, other=0)
        tl.store(y_row + c[None, :] * stride_yc, up, mask=inside)
    else:
        c = ((block - up_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
        inside = (w < W)[:, None] & (c < C_skip)[None, :]
        skip_row = skip_ptr + n * stride_sn + (h + top) * stride_sh + (w + left)[:, None] * stride_sw
        skip = tl.load(skip_row + c[None, :] * stride_sc, mask=inside, other=0)
        tl.store(y_row + (C_up + c)[None, :] * stride_yc, skip, mask=inside)


def blocks(C_up: int, C_skip: int, channels_last: bool) -> tuple[int, int]:
    """(BLOCK_W, BLOCK_C): 4096 values a program, the longer side along the axis that is contiguous in memory."""
    if not channels_last:
        return 512, 8
    widest = 1 << (max(C_up, C_skip, 8) - 1).bit_length()
    BLOCK_C = min(128, widest)
    return 4096 // BLOCK_C, BLOCK_C


def launch_crop_concat_fwd(up: Tensor, skip: Tensor) -> Tensor:
    N, C_up, H, W = up.shape
    C_skip = skip.shape[1]
    channels_last = _layout.suggests_channels_last(up) and _layout.suggests_channels_last(skip)
    y = torch.empty(
        (N, C_up + C_skip, H, W),
        dtype=up.dtype,
        device=up.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
    if y.numel() == 0:
        return y
    BLOCK_W, BLOCK_C = blocks(C_up, C_skip, channels_last)
    up_blocks, skip_blocks = -(-C_up // BLOCK_C), -(-C_skip // BLOCK_C)
    # one program per row, BLOCK_W pixels of it, and BLOCK_C channels of one of the two maps
    grid = (N * H, -(-W // BLOCK_W), up_blocks + skip_blocks)
    top, left = (skip.shape[2] - H) // 2, (skip.shape[3] - W) // 2
    with _triton.on_device(up):
        _fwd_kernel[grid](
            up, skip, y,
            H, W, C_up, C_skip, top, left,
            *up.stride(), *skip.stride(), *y.stride(),
            BLOCK_W=BLOCK_W, BLOCK_C=BLOCK_C, num_warps=4,
        )  # fmt: skip
    return y


@torch.library.custom_op("unet::crop_concat", mutates_args=())
def _op(up: Tensor, skip: Tensor) -> Tensor:
    return reference.crop_concat(up, skip)


@_op.register_kernel("cuda")
def _cuda(up: Tensor, skip: Tensor) -> Tensor:
    if _triton.why_not(up.device, up.dtype):
        return reference.crop_concat(up, skip)
    return launch_crop_concat_fwd(up, skip)


_op.register_fake(reference.crop_concat)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    up, skip = inputs
    ctx.up_channels, ctx.skip_size = up.shape[1], skip.shape


@_checks.outside_autocast
def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
    for_up, for_skip = ctx.needs_input_grad
    dup = dy[:, : ctx.up_channels] if for_up else None
    dskip = reference.uncrop(dy[:, ctx.up_channels :], ctx.skip_size) if for_skip else None
    return dup, dskip


_op.register_autograd(_backward, setup_context=_setup)


def crop_concat(up: Tensor, skip: Tensor) -> Tensor:
    """The centre of skip behind up, along the channels.

    Equals `torch.cat([up, centre_crop(skip)], 1)`, strides included; where a margin is odd the window lies one pixel
    nearer to the top (left). Values are copied, so every NaN and infinity arrives.

    Args:
        up: [N, C_up, H, W]; float32, float16, bfloat16 or float64.
        skip: [N, C_skip, at least H, at least W], dtype and device of up.

    Returns:
        [N, C_up + C_skip, H, W]. Differentiable; skip's gradient is zero outside the window.

    Raises:
        TypeError: an argument is no tensor, or the dtypes differ.
        ValueError: batch sizes or devices differ, or skip is smaller than up.

    >>> crop_concat(torch.zeros(1, 64, 392, 392), torch.zeros(1, 64, 568, 568)).shape
    torch.Size([1, 128, 392, 392])
    """
    _checks.expect_cover(up, skip)
    # torch.autocast promotes torch.cat's arguments to the wider dtype; so does this door
    if up.dtype != skip.dtype and _checks.autocast_enabled(up):
        wider = torch.promote_types(up.dtype, skip.dtype)
        up, skip = up.to(wider), skip.to(wider)
    _checks.expect_like("skip", skip, "up", up)
    if _checks.transformed() or _checks.ordinary_on_cpu(up):
        return reference.crop_concat(up, skip)
    return _op(up, skip)
