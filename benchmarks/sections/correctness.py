"""Do the tests pass on this device? A wrong kernel's speed is of no interest.

A process of its own: a kernel that reads out of bounds takes its CUDA context with it, and the report must go on.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.sections import Context, Failed

TITLE = "Do the tests pass here?"
ORDER = 10
SECONDS = 120.0

# what runs on the device; the rest of the tests never leaves the CPU, nor does ahead-of-time compilation: both are CI's
LANE = (
    *("tests/unet_kernels", "tests/proof", "tests/unet_fast/test_model_on_device.py"),
    # forward and backward of a small whole net, ours only
    "tests/benchmarks/test_gradients_of_a_net.py",
    *("-k", "not compiled_code and not spill and not instruction and not inductor and not native and not homotopic"),
)
# a look at whether the kernels' tests start; the interpreter's whole lane is CI's own step
SMOKE_LANE = ("tests/unet_kernels", "-m", "interpreter", "-k", "crop_concat", "-x")
SMOKE_TIMEOUT_S = 30.0

NOTHING_COLLECTED = 5


def run(context: Context) -> dict[str, Any]:
    on_cpu, smoke = context.device.type == "cpu", context.smoke
    lane = (*(SMOKE_LANE if smoke else LANE), "--device", context.device.type)
    timeout_s = SMOKE_TIMEOUT_S if smoke else max(30.0, min(1.3 * SECONDS, context.left_s - 30))
    code, output = run_pytest(lane, {"TRITON_INTERPRET": "1"} if smoke and on_cpu else {}, timeout_s)
    context.out.mkdir(parents=True, exist_ok=True)
    (context.out / "pytest.log").write_text("\n".join(output))
    if smoke and code in (None, NOTHING_COLLECTED):
        said = "collected no tests" if code else f"did not end within {SMOKE_TIMEOUT_S:.0f} s"
        return {"headline": f"says nothing: the smoke lane {said}", "output": output[-60:]}
    return judge(code, output)


def run_pytest(lane: Sequence[str], extra: dict[str, str], timeout_s: float) -> tuple[int | None, list[str]]:
    """(exit code, lines of output) of pytest on a lane; the code is None where it ran out of time."""
    command = [sys.executable, "-m", "pytest", *lane, "-q", "-p", "no:cacheprovider", "--tb=short"]
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"} | extra
    # a machine's other plugins may warn, and here warnings are errors
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    # pytest cuts what it says of a failure to the width of a terminal
    environment["COLUMNS"] = "300"
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # a session of its own, so that what the tests start can be ended with them
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
        return process.returncode, output.splitlines()
    except subprocess.TimeoutExpired:
        # pytest answers an interrupt with its summary: what failed until then is named
        os.killpg(process.pid, signal.SIGINT)
        try:
            output, _ = process.communicate(timeout=15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        return None, output.splitlines()
    except BaseException:
        # in a session of its own it would outlive us, on the GPU
        os.killpg(process.pid, signal.SIGKILL)
        raise


def judge(code: int | None, output: list[str]) -> dict[str, Any]:
    """What pytest said, as data; Failed unless every test that ran passed."""
    counts = count(output)
    failing = [line for line in output if line.startswith(("FAILED ", "ERROR "))]
    counted = ", ".join(f"{n} {kind}" for kind, n in counts.items()) or "no counts"
    result = {
        "headline": counted,
        "counts": counts,
        "exit code": "timed out" if code is None else code,
        "failing": failing,
        "output": output[-60:],
    }
    if code != 0:
        raise Failed(f"pytest {'ran out of time' if code is None else f'ended with {code}'}: {counted}", result)
    return result


def count(output: Sequence[str]) -> dict[str, int]:
    """{"passed": 12, "failed": 1, ...} from pytest's last line that counts."""
    kinds = r"(passed|failed|skipped|errors?|xfailed|xpassed|deselected|warnings?)"
    for line in reversed(output):
        found = re.findall(rf"(\d+) {kinds}\b", line)
        if found and re.search(r" in [\d.]+s", line):
            return {kind: int(n) for n, kind in found}
    return {}
