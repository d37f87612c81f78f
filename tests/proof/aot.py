"""Kernels compiled for real chips on a machine that has none, and what the chip's own code says about them.

`recorded` runs a launcher on meta tensors and notes what it would have launched; `compiled` compiles exactly that,
specialised as a launch would specialise it; `Budget.check` reads registers, stack and shared memory from the cubin and
looks for instructions in the SASS.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

__all__ = ["CHIPS", "ELEMENTWISE_CHIPS", "Budget", "Compiled", "Launch", "all_recorded", "compiled", "recorded"]

# compute capability -> bytes of shared memory one block may have
SHARED_BYTES = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448}
CHIPS = (80, 86, 89, 90)
ELEMENTWISE_CHIPS = (75, *CHIPS)

_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.uint16: "u16",
}
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion")


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its grid, its arguments by name, its options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]


@dataclass(frozen=True)
class Compiled:
    """A kernel as one chip will run it."""

    capability: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    cubin: bytes = field(repr=False)
    ptx: str = field(repr=False)

    @cached_property
    def sass(self) -> str:
        return _cuobjdump(self.cubin, "-sass")

    def count(self, instruction: str) -> int:
        """How often a SASS instruction (a regular expression, such as r"LDG\\.E\\.128") occurs."""
        return len(re.findall(instruction, self.sass))

    def loop(self, instruction: str) -> str:
        """The innermost loop that an instruction occurs in, as SASS; "" if it occurs in none."""
        lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", self.sass)]
        places = [at for at, text in lines if re.search(instruction, text)]
        jumps = [(int(to[1], 16), at) for at, text in lines if (to := re.search(r"\bBRA\S*\s.*?(0x[0-9a-f]+)", text))]
        around = [(to, at) for to, at in jumps if to <= at and any(to <= place <= at for place in places)]
        if not around:
            return ""
        first, last = min(around, key=lambda span: span[1] - span[0])
        return "\n".join(text for at, text in lines if first <= at <= last)


@dataclass(frozen=True)
class Budget:
    """What a kernel may use of a chip, and which instructions it must (or must not) be made of."""

    registers: int
    stack_bytes: int = 0
    shared_bytes: int | None = None
    must_have: tuple[str, ...] = ()
    must_not_have: tuple[str, ...] = ()
    # an instruction of the main loop, and what else must (not) be in the innermost loop around it
    main_loop: str = ""
    loop_must_have: tuple[str, ...] = ()
    loop_must_not_have: tuple[str, ...] = ()

    def check(self, code: Compiled) -> None:
        """Raise AssertionError with everything that is over."""
        shared = SHARED_BYTES[code.capability] if self.shared_bytes is None else self.shared_bytes
        over = [
            f"{name} {used}, budget {allowed}"
            for name, used, allowed in (
                ("registers", code.registers, self.registers),
                ("stack bytes (spills)", code.stack_bytes, self.stack_bytes),
                ("shared bytes", code.shared_bytes, shared),
            )
            if used > allowed
        ]
        over += [f"no {wanted}" for wanted in self.must_have if not code.count(wanted)]
        over += [f"{code.count(banned)} x {banned}" for banned in self.must_not_have if code.count(banned)]
        if self.main_loop:
            loop = code.loop(self.main_loop)
            over += [] if loop else [f"{self.main_loop} is in no loop"]
            over += [f"no {wanted} in the main loop" for wanted in self.loop_must_have if not re.search(wanted, loop)]
            over += [f"{banned} in the main loop" for banned in self.loop_must_not_have if re.search(banned, loop)]
        assert not over, f"sm_{code.capability}: " + "; ".join(over)


class _Recorder:
    """Stands where the kernel stands, and notes what it is asked to do."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
            names = self.kernel.arg_names
            arguments = dict(zip(names, args, strict=False)) | kwargs
            assert set(arguments) == set(names), f"arguments {set(arguments) ^ set(names)} do not fit the kernel"
            self.launches.append(Launch(self.kernel, grid, {n: arguments[n] for n in names}, options))

        return launch


def recorded(module: ModuleType, kernel: str, call: Callable[[], Any]) -> list[Launch]:
    """The launches of `module.<kernel>` that `call` makes; nothing runs, so its tensors may be on the meta device."""
    launches = [launch for launch in all_recorded(module, call) if launch.kernel is getattr(module, kernel)]
    assert launches, f"{kernel} was not launched"
    return launches


def all_recorded(module: ModuleType, call: Callable[[], Any]) -> list[Launch]:
    """Likewise the launches of every kernel in `module`."""
    launches: list[Launch] = []
    kernels = {name: value for name, value in vars(module).items() if hasattr(value, "arg_names")}
    with mock.patch.multiple(module, **{name: _Recorder(value, launches) for name, value in kernels.items()}):
        call()
    return launches


def compiled(launch: Launch, capability: int) -> Compiled:
    """Compile a launch for a chip, specialised as Triton would: 1 is a constant, multiples of 16 are known to be."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, (name, value) in enumerate(launch.arguments.items()):
        constexpr = launch.kernel.params[i].is_constexpr or (isinstance(value, int) and value == 1)
        signature[name] = "constexpr" if constexpr or value is None else _type(value)
        if signature[name] == "constexpr":
            constants[(i,)] = value
        elif not hasattr(value, "block_shape") and _divisible(value):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    cubin = made.asm["cubin"]
    usage = re.search(r"REG:(\d+) STACK:(\d+)", _cuobjdump(cubin, "--dump-resource-usage"))
    assert usage is not None, "cuobjdump printed no resource usage"
    registers, stack = map(int, usage.groups())
    return Compiled(capability, registers, stack, made.metadata.shared, cubin, made.asm["ptx"])


def _divisible(value: Any) -> bool:
    """Whether a launch would tell the compiler that 16 divides this: an address, or a whole number."""
    if isinstance(value, Tensor):
        # an allocation begins on more than 16 bytes, a view where it likes
        return value.storage_offset() * value.element_size() % 16 == 0
    return isinstance(value, int) and not isinstance(value, bool) and value % 16 == 0


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    if hasattr(value, "block_shape"):
        return f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _cuobjdump(cubin: bytes, what: str) -> str:
    # it comes with Triton's wheel: no CUDA toolkit is needed
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout
