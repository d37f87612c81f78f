"""What compiled kernels use of a chip, kept in a file: registers, stack and shared memory, by Triton's version."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import triton

from tests.proof.aot import Compiled

__all__ = ["assert_as_recorded", "assert_complete", "record"]


def _used(code: Compiled) -> list[int]:
    return [code.registers, code.stack_bytes, code.shared_bytes]


def assert_as_recorded(path: Path, name: str, code: Compiled, module: str) -> None:
    """`code` uses what the file says; skips where this Triton has no record."""
    recorded = json.loads(path.read_text()).get(triton.__version__)
    if recorded is None:
        pytest.skip(f"no registers recorded for Triton {triton.__version__}: python -m {module} records them")
    want, used = recorded[name], _used(code)
    assert used == want, f"[registers, stack, shared bytes] {used}, recorded {want}; python -m {module} records anew"


def assert_complete(path: Path, names: Iterable[str]) -> None:
    """Nothing is recorded that is not compiled, and nothing compiled that is not recorded."""
    for version, recorded in json.loads(path.read_text()).items():
        assert set(recorded) == set(names), version


def record(path: Path, names: Iterable[str], code: Callable[[str], Compiled]) -> None:
    """Write what the kernels use into the file, for the Triton that is installed."""
    golden = json.loads(path.read_text()) if path.exists() else {}
    golden[triton.__version__] = {name: _used(code(name)) for name in names}
    path.parent.mkdir(exist_ok=True)
    lines = [
        f' "{version}": {{\n' + ",\n".join(f"  {json.dumps(n)}: {u}" for n, u in sorted(used.items())) + "\n }"
        for version, used in sorted(golden.items())
    ]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
