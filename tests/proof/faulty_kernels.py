"""Kernels with one fault each, for `test_catches.py`. They stand apart: a kernel's source must be in a file."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def reads_outside(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # one too far at the end
    pair = tl.load(x_ptr + i, mask=i < size, other=0.0) + tl.load(x_ptr + i + 1, mask=i < size, other=0.0)
    tl.store(y_ptr + i, pair, mask=i < size)


@triton.jit
def writes_outside(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < size, other=0.0), mask=i <= size)


@triton.jit
def forgets_the_last(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < size, other=0.0), mask=i < size - 1)


@triton.jit
def changes_its_input(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < size, other=0.0)
    tl.store(x_ptr + i, x + 1, mask=i < size)
    tl.store(y_ptr + i, x, mask=i < size)


@triton.jit
def races(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    # a running sum through memory: right only if the programs happen to run in order
    p = tl.program_id(0)
    i = p * BLOCK + tl.arange(0, BLOCK)
    before = tl.load(y_ptr + p * BLOCK - 1, mask=p > 0, other=0.0)
    x = tl.load(x_ptr + i, mask=i < size, other=0.0)
    tl.store(y_ptr + i, x + before, mask=i < size)


@triton.jit
def reads_outside_and_forgets(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    # the right answer, and on a GPU perhaps an illegal address
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i), mask=i < size)


@triton.jit
def loses_updates(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    # every program adds to one value without an atomic: right one after another, and only then
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < size, other=0.0)
    tl.store(y_ptr + i, x, mask=i < size)
    tl.store(y_ptr, tl.load(y_ptr) + 0.0 * tl.sum(x))


@triton.jit
def nan_becomes_zero(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    # the interpreter's maximum keeps NaN, a GPU's does not
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < size, other=0.0)
    tl.store(y_ptr + i, tl.maximum(x, 0.0), mask=i < size)


@triton.jit
def is_right(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < size, other=0.0), mask=i < size)


@triton.jit
def spills(a_ptr, b_ptr, c_ptr, BLOCK: tl.constexpr):
    # a product whose accumulator alone, 256 x 256 values over 4 warps, is twice the registers there are
    i, j = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for _ in range(4):
        a = tl.load(a_ptr + i[:, None] * BLOCK + j[None, :])
        b = tl.load(b_ptr + i[:, None] * BLOCK + j[None, :])
        acc = tl.dot(a, b, acc)
        a_ptr += BLOCK
    tl.store(c_ptr + i[:, None] * BLOCK + j[None, :], acc)


@triton.jit
def loads_one_by_one(x_ptr, y_ptr, step, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i * step, mask=i < size, other=0.0), mask=i < size)


def launch(kernel, x: Tensor) -> Tensor:
    return _launch(kernel, x, torch.empty_like(x))


def launch_unguarded(kernel, x: Tensor) -> Tensor:
    return _launch(kernel, x, x.new_empty(x.shape))


def _launch(kernel, x: Tensor, y: Tensor) -> Tensor:
    kernel[(triton.cdiv(x.numel(), 16),)](x, y, x.numel(), BLOCK=16)
    return y
