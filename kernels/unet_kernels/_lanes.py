"""Which implementation an op takes on a device, and why: what `unet-fast doctor` prints."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from . import _aten, _choosing, _native, _triton
from .conv1x1 import question as of_conv1x1
from .conv3x3_relu import question as of_conv3x3_relu
from .conv3x3_relu import question_cat as of_conv3x3_relu_cat
from .conv3x3_relu_pool import question as of_conv3x3_relu_pool
from .max_pool2x2 import question as of_max_pool2x2
from .up_conv import question as of_up_conv

__all__ = ["OPS", "Explanation", "explain", "lane"]

OPS = (
    "conv3x3_relu",
    "conv3x3_relu_cat",
    "conv3x3_relu_pool",
    "up_conv",
    "conv1x1",
    "max_pool2x2",
    "crop_concat",
    "weighted_cross_entropy",
    "head_cross_entropy",
    "two_nearest_cells",
    "cut_gap",
    "border_weight",
    "elastic_warp",
    "connected_components",
)


def _labels(device: torch.device, dtype: torch.dtype | None) -> str:
    # ids are 32 bits wide, whatever dtype the maps have
    return _triton.why_not(device)


# the ops that have a kernel of ours, each with the question its CUDA implementation asks before it takes that kernel;
# beyond a size that its module names, an op goes to ATen all the same
_KERNELS: dict[str, Callable[[torch.device, torch.dtype | None], str]] = {
    "crop_concat": _triton.why_not,
    "weighted_cross_entropy": _triton.why_not,
    "head_cross_entropy": _triton.why_no_dot,
    "two_nearest_cells": _labels,
    "cut_gap": _labels,
    "border_weight": _labels,
    "elastic_warp": _triton.why_not,
}
# the ops that measure, a shape at a time, whether a kernel of ours or ATen is faster: what each asks
_QUESTIONS: dict[str, Callable[..., _choosing.Question]] = {
    "conv3x3_relu": of_conv3x3_relu,
    "conv3x3_relu_cat": of_conv3x3_relu_cat,
    "conv3x3_relu_pool": of_conv3x3_relu_pool,
    "up_conv": of_up_conv,
    "conv1x1": of_conv1x1,
    "max_pool2x2": of_max_pool2x2,
}
_CONVOLUTIONS = ("conv3x3_relu", "conv3x3_relu_cat", "conv3x3_relu_pool", "up_conv", "conv1x1")
_CUDA: dict[str, Callable[[torch.device], str]] = {"connected_components": _native.why_not_cuda}


def _single(device: torch.device, dtype: torch.dtype | None) -> str:
    return "float64 is left to torch" if dtype == torch.float64 else _native.why_not(device)


# likewise on a CPU
_NATIVE: dict[str, Callable[[torch.device, torch.dtype | None], str]] = {
    "two_nearest_cells": _native.why_not,
    "border_weight": _native.why_not,
    "elastic_warp": _single,
    "connected_components": _native.why_not,
}


def lane(op: str, device: torch.device | str, dtype: torch.dtype | None = None) -> tuple[str, str]:
    """("triton", "native", "torch" or "measured", the reason in a few words) for an op of `OPS`.

    Raises:
        ValueError: there is no such op.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    device = torch.device(device)
    if device.type == "cpu" and op in _NATIVE:
        refusal = _NATIVE[op](device, dtype)
        return ("torch", refusal) if refusal else ("native", "our C++ kernel")
    if op in _CONVOLUTIONS and dtype is not None and _aten.multiplies_in(device, dtype) != dtype:
        return "torch", f"ATen in float32, rounded; this CPU has no arithmetic in {_choosing.arithmetic(dtype)}"
    if device.type != "cuda":
        return "torch", f"ATen, the reference; {device.type} has no kernel of ours yet"
    if op in _CUDA:
        refusal = _CUDA[op](device)
        return ("torch", refusal) if refusal else ("native", "our CUDA kernel")
    if op in _QUESTIONS:
        refusal = (_triton.why_not if op == "max_pool2x2" else _triton.why_no_dot)(device, dtype)
        return ("torch", refusal) if refusal else ("measured", "ours or ATen's, whichever is faster for the shape")
    refusal = _KERNELS[op](device, dtype)
    return ("torch", refusal) if refusal else ("triton", "our kernel")


@dataclass(frozen=True, slots=True)
class Explanation:
    """What an op does with a shape: the way it takes when called, and inside a CUDA graph; why; out of what."""

    op: str
    case: str
    called: str
    captured: str
    why: str
    ways: tuple[str, ...]
    ours: tuple[str, ...]
    called_us: dict[str, float]
    device_us: dict[str, float]
    refused: dict[str, str]


def explain(
    op: str, device: torch.device | str, arguments: Callable[[], tuple[Any, ...]], chip: int = 0
) -> Explanation:
    """What an op that measures (`lane` says "measured") will do with a shape, and why. Nothing is computed.

    Args:
        op: of `OPS`.
        device: where; of "cuda" with a `chip` nothing needs to be there.
        arguments: makes the op's arguments, on `device`; called under fake tensors.
        chip: a compute capability (80, 86, 89, 90) to ask about instead of the device's own.

    Raises:
        ValueError: there is no such op, or it measures nothing.
    """
    if op not in _QUESTIONS:
        raise ValueError(f"op must be one of {', '.join(_QUESTIONS)}, got {op!r}")
    device = torch.device(device)
    if not chip and torch.cuda.is_available():
        device = _choosing.indexed(device)
    with FakeTensorMode(), _triton.pretending(chip):
        made = arguments()
        kind, reason = lane(op, device, made[0].dtype)
        if kind != "measured":
            return Explanation(op, "", "ATen", "ATen", reason, ("ATen",), (), {}, {}, {})
        question = _QUESTIONS[op](*made)
        offered = question.ways()
        ways = tuple(way.name for way in offered)
        ours = tuple(way.name for way in offered if way.ours)
        row = None if chip else _choosing.row(question, device)
        if row is None:
            called = captured = ways[0]
            why = "not measured here yet: the first call will"
        else:
            called, captured = (_choosing.fastest(question, row, us).name for us in (row.called_us, row.device_us))
            why = _why(called, row.called_us)
    row = row or _choosing.Row()
    times = (row.called_us, row.device_us, row.refused)
    return Explanation(op, question.case, called, captured, why, ways, ours, *times)


def _why(chosen: str, us: dict[str, float]) -> str:
    others = sorted((t, name) for name, t in us.items() if name != chosen)
    if not others:
        return "all else was refused"
    return f"{us[chosen]:.1f} us; next {others[0][1]}, {others[0][0]:.1f} us"
