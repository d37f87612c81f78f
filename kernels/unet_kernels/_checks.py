"""Door-keepers of the public functions: type, then shape, then dtype, then device; one sentence each.

An error names the argument, what was expected and what came. Nothing here reads a tensor's values, so a door costs
microseconds, never waits for a GPU, and is traced by torch.compile without a graph break.
"""

import math
from collections.abc import Callable, Sequence
from functools import wraps
from numbers import Real
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "FLOATS",
    "INTEGERS",
    "above_zero",
    "autocast",
    "autocast_enabled",
    "autocast_to_float32",
    "expect_choice",
    "expect_cover",
    "expect_device",
    "expect_float",
    "expect_integer",
    "expect_like",
    "expect_mask",
    "expect_number",
    "expect_on_cpu",
    "expect_size",
    "expect_tensor",
    "expect_whole",
    "is_real",
    "ordinary_on_cpu",
    "outside_autocast",
    "transformed",
    "untraced",
]

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)


def expect_tensor(name: str, value: Any, axes: str, dtypes: Sequence[torch.dtype], kind: str) -> None:
    """`value` is a tensor with the named axes ("N, C, H, W") and one of the dtypes, which a person calls `kind`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor [{axes}], got {type(value).__name__}")
    rank = axes.count(",") + 1
    if value.dim() != rank:
        raise ValueError(f"{name} must be {rank}-D [{axes}], got {value.dim()}-D {list(value.shape)}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be {kind}, got {_plain(value.dtype)}{_hint(value.dtype, kind)}")


def expect_float(name: str, value: Any, axes: str) -> None:
    expect_tensor(name, value, axes, FLOATS, "floating (float32, float16, bfloat16 or float64)")


def expect_integer(name: str, value: Any, axes: str) -> None:
    expect_tensor(name, value, axes, INTEGERS, "an integer tensor")


def expect_mask(name: str, value: Any) -> None:
    """`value` is a stack of slices [N, H, W], boolean or integer, of a size whose places fit 32 bits."""
    expect_tensor(name, value, "N, H, W", (torch.bool, *INTEGERS), "boolean or an integer tensor")
    if value.shape[1] * value.shape[2] >= 2**31:
        raise ValueError(f"{name} must have less than 2^31 pixels a slice, got {list(value.shape)}")


def above_zero(value: Tensor) -> Tensor:
    """value > 0, of any integer type: torch compares no unsigned integers wider than a byte."""
    return value > 0 if value.dtype.is_signed else value.bool()


def expect_on_cpu(name: str, value: Tensor) -> None:
    if value.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, got {value.device}; .cpu() brings it there")


def expect_size(name: str, value: Tensor, sizes: Sequence[int], reason: str) -> None:
    """`value` has exactly these sizes; -1 stands for any."""
    if len(value.shape) != len(sizes) or any(
        want != -1 and have != want for have, want in zip(value.shape, sizes, strict=True)
    ):
        wanted = ", ".join("any" if s == -1 else str(s) for s in sizes)
        raise ValueError(f"{name} must have shape [{wanted}] {reason}, got {list(value.shape)}")


def expect_like(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """`value` has the dtype and lies on the device of `other`."""
    if value.dtype != other.dtype:
        raise TypeError(f"{name} must be {_plain(other.dtype)} like {other_name}, got {_plain(value.dtype)}")
    expect_device(name, value, other_name, other)


def expect_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} must be on {other.device} like {other_name}, got {value.device}")


def expect_cover(up: Tensor, skip: Tensor) -> None:
    """`skip` is a map that up's window can be cut out of: same batch, at least its rows and columns."""
    expect_float("up", up, "N, C_up, H, W")
    expect_float("skip", skip, "N, C_skip, H, W")
    if skip.shape[0] != up.shape[0]:
        raise ValueError(f"skip must have the batch size of up, {up.shape[0]}, got {skip.shape[0]}")
    if skip.shape[2] < up.shape[2] or skip.shape[3] < up.shape[3]:
        raise ValueError(
            f"skip must cover up: up is {up.shape[2]}x{up.shape[3]}, got skip {skip.shape[2]}x{skip.shape[3]}"
        )


def expect_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """`value` is one of `choices`, in type too: 1.0 and True are not 1."""
    if not any(type(value) is type(c) and value == c for c in choices):
        listed = " or ".join(repr(c) for c in choices)
        raise ValueError(f"{name} must be {listed}, got {value!r}")


def expect_number(name: str, value: object, *, low: float, strictly: bool = False) -> float:
    """`value` is a finite real number, at least (or, strictly, above) `low`; returned as a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    # written so that NaN fails too
    if not (low < number < math.inf if strictly else low <= number < math.inf):
        raise ValueError(f"{name} must be {'above' if strictly else 'at least'} {low:g} and finite, got {value}")
    return number


def expect_whole(name: str, value: Any) -> int:
    """`value` is a whole number that fits 64 bits, Python's or numpy's; returned as an int."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or isinstance(value, Tensor):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    whole = int(value.__index__())
    if not -(2**63) <= whole < 2**63:
        raise ValueError(f"{name} must fit 64 bits, got {whole}")
    return whole


def ordinary_on_cpu(tensor: Tensor) -> bool:
    """Whether this is a plain CPU tensor outside any tracing, where ATen's own autograd may be called directly.

    Dispatching a custom op costs some 80 us forward and backward; ATen's autograd costs 20
    (docs/findings/0001-cpu-dispatch.md). Fake tensors and torch.compile see the op.
    """
    return tensor.device.type == "cpu" and is_real(tensor) and not torch.compiler.is_compiling()


def is_real(tensor: Tensor) -> bool:
    """Whether there are values behind a tensor, as there are none behind a fake one."""
    return type(tensor) in (Tensor, torch.nn.Parameter)


def untraced(op: Callable[..., Any], body: Callable[..., Any], *arguments: Any) -> Any:
    """What an op does: itself where it must be seen (torch.compile, fake tensors), else without its dispatch."""
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    seen = torch.compiler.is_compiling() or not all(map(is_real, tensors))
    return (op if seen else body)(*arguments)


def transformed() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp) is at work: it takes ATen's operations apart, not ours."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def outside_autocast(computation: Callable[..., Any]) -> Callable[..., Any]:
    """An op and its derivative compute in the dtypes they are given, whatever autocast says where they are called.

    The doors cast; what lies behind them does not, so that forward and backward cannot disagree.
    """

    @wraps(computation)
    def computed(*args: Any, **kwargs: Any) -> Any:
        tensor = next(a for a in args if isinstance(a, Tensor))
        if not autocast_enabled(tensor):
            return computation(*args, **kwargs)
        with torch.autocast(tensor.device.type, enabled=False):
            return computation(*args, **kwargs)

    return computed


def autocast_enabled(tensor: Tensor) -> bool:
    """Whether torch.autocast is on where the tensor lies."""
    kind = tensor.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as torch.autocast would hand them to a convolution: in its dtype, float64 left alone."""
    if not autocast_enabled(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def autocast_to_float32(tensor: Tensor) -> Tensor:
    """The tensor as torch.autocast would hand it to a loss."""
    return tensor.float() if autocast_enabled(tensor) and tensor.dtype != torch.float64 else tensor


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _hint(dtype: torch.dtype, kind: str) -> str:
    if kind == "an integer tensor" and dtype == torch.bool:
        return "; label its components first, or .to(torch.int32) if all that is True is one cell"
    if kind == "an integer tensor" and dtype.is_floating_point:
        return "; ids are whole numbers, .to(torch.int32) if these are"
    if kind.startswith("floating") and not dtype.is_floating_point:
        return "; .float() makes it so"
    return ""
