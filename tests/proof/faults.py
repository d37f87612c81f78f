"""A process that is killed, a disk that is full, a machine that loses its power: at any call, and each in turn.

A small library (`faults.c`) is loaded before libc into a process that has imported everything and does nothing but
fork. Each child is armed to be killed before, in the middle of or after its n-th call that changes a disk, or to find
the disk full from there on; it then runs `predict_files`, trains, or keeps a state, and reports, if it lives, what
became of it. A fork costs some milliseconds, so that every call of a run can be tried.
"""

import ctypes
import faulthandler
import gc
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any, Self

__all__ = ["HOW", "Forks", "Ran", "build", "cut_power", "durable_now", "state_of"]

# as in faults.c
HOW = ("count", "before", "half", "after", "full")

_SECONDS_BETWEEN_SIGNALS = 2e-3
# a run that takes longer will never end
_SECONDS_AT_MOST = 60.0

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_suffix(".c")


def build(folder: Path) -> Path | str:
    """The library, or why there is none."""
    library = folder / "faults.so"
    compiler = os.environ.get("CC", "cc")
    if not sys.platform.startswith("linux"):
        return "calls are counted on Linux only"
    try:
        done = subprocess.run(
            [
                compiler,
                "-O1",
                "-Wall",
                "-Wextra",
                "-Werror",
                "-shared",
                "-fPIC",
                str(SOURCE),
                "-o",
                str(library),
                "-ldl",
            ],
            capture_output=True,
            text=True,
        )
    except OSError as error:
        return f"no C compiler: {error}"
    assert done.returncode == 0, done.stderr
    return library


@dataclass(frozen=True)
class Ran:
    """What became of one run.

    killed: by a signal; nothing else is known then. Its `calls` that change a disk, one by one in `trace`; `forwards`:
    how many windows went through the net in each pass; the `error`'s type and what it `said`; statuses of the files.
    """

    killed: bool = False
    calls: int = 0
    seconds: float = 0.0
    forwards: list[int] = field(default_factory=list)
    error: str | None = None
    said: str = ""
    stderr: str = ""
    statuses: list[str] = field(default_factory=list)
    trace: list[str] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return not self.killed and self.error is None

    def __str__(self) -> str:
        return "killed" if self.killed else f"{self.error}: {self.said}" if self.error else f"done {self.statuses}"


class Forks:
    """The process that forks, and the library in it."""

    def __init__(self, library: Path) -> None:
        one = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
        # large pages, where there are such, are copied and freed in a fraction of the time
        large = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "PYTHONMALLOC": "malloc"}
        path = os.pathsep.join([*sys.path, str(ROOT), str(ROOT / "kernels")])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.proof.faults", str(library)],
            cwd=ROOT,
            env={**os.environ, **one, **large, "LD_PRELOAD": str(library), "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _ask(self, **question: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question, default=str) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the process that forks has ended"
        return json.loads(answer)

    def start(self, images: Path, out: Path, **job: Any) -> int:
        """Run `predict_files` in a child, which is in the middle of it when this returns; its number.

        Args:
            images, out: of `predict_files`; so is every other argument that is not one of these:
            model: a file.
            at, how: the call at which the fault comes (from 1 on), and which, one of HOW.
            durable: a folder for what a power cut would leave.
            every_s: seconds between two commits of the journal.
            sleep_s: that each pass takes longer; the child is in the first one then when this returns.
            refuse: passes, from 1 on, at which memory runs out; `refuse_as` "cuda" or "cpu".
            limit: of RLIMIT_FSIZE, bytes.
            after_s: seconds from the run's beginning on after which it gets `signals`, SIGKILL where none are named.
        """
        return int(self._ask(do="start", images=images, out=out, **job))

    def train(self, settings: Mapping[str, Any], **job: Any) -> int:
        """Run `unet_fast.train` in a child; its number.

        Args:
            settings: of `TrainConfig`; and `resume`.
            at, how, limit, after_s, signals: as in `start`.
        """
        return int(self._ask(do="start", out=settings["out"], training=dict(settings), **job))

    def keep(self, out: Path, step: int, **job: Any) -> Ran:
        """Keep a state of a small net in a child (`unet_fast.checkpoints.keep`), whose numbers are all `step`."""
        return self.wait(int(self._ask(do="start", out=out, keeping=step, **job)))

    def wait(self, number: int) -> Ran:
        return Ran(**self._ask(do="wait", number=number))

    def run(self, images: Path, out: Path, **job: Any) -> Ran:
        return self.wait(self.start(images, out, **job))


# ---- what a power cut leaves


def durable_now(folder: Path, copies: Path) -> Path:
    """All that lies in a folder is on the disk for good; a folder for copies of what is."""
    shutil.rmtree(copies, ignore_errors=True)
    copies.mkdir()
    for path in folder.rglob("*"):
        if path.is_file():
            shutil.copyfile(path, copies / str(path.stat().st_ino))
    return copies


def cut_power(folder: Path, copies: Path, *, zeros: bool) -> None:
    """Of each file in a folder only what was synced is left; with `zeros`, its length and nothing but zeros there."""
    for path in folder.rglob("*"):
        if not path.is_file():
            continue
        about = path.stat()
        copy = copies / str(about.st_ino)
        left = copy.read_bytes() if copy.exists() else b""
        if zeros:
            left = left[: about.st_size].ljust(about.st_size, b"\0")
        if path.read_bytes() != left:
            path.write_bytes(left)


# ---- in the process that forks


def _serve(library: str) -> None:
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from unet_fast import journal, prediction, training  # noqa: F401 (once, for all children)

    faults = ctypes.CDLL(library)
    children: dict[int, _Child] = {}
    for line in sys.stdin:
        # a child that collected garbage would copy every page
        gc.collect()
        gc.freeze()
        question = json.loads(line)
        if question.pop("do") == "start":
            answer: Any = _start(faults, question, children)
        else:
            answer = _wait(question["number"], children.pop(question["number"]))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


@dataclass
class _Child:
    """Where it reports, and what it gets when."""

    report: int
    began: float
    after_s: float | None
    signals: list[int]


def _start(faults: ctypes.CDLL, job: dict[str, Any], children: dict[int, _Child]) -> int:
    after_s, signals = job.pop("after_s", None), job.pop("signals", [signal.SIGKILL])
    if "model" in job:
        _loaded(job["model"])
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        with os.fdopen(writing, "w") as report:
            try:
                json.dump(_run(faults, report, **job), report)
            except BaseException as error:
                # a fault of this file; or one signal more, just after the run
                json.dump({"error": type(error).__name__, "said": traceback.format_exc()}, report)
            report.flush()
            os._exit(0)
    os.close(writing)
    # a run that has begun says so
    os.read(reading, 1)
    children[child] = _Child(reading, time.monotonic(), after_s, signals)
    return child


@cache
def _loaded(model: str) -> Any:
    # with one thread torch starts no others, which would not survive a fork
    from unet_fast import storage

    return storage.load(model)


def _wait(number: int, child: _Child) -> dict[str, Any]:
    for each in child.signals if child.after_s is not None else []:
        time.sleep(max(0.0, child.began + (child.after_s or 0.0) - time.monotonic()))
        os.kill(number, each)
        child.began += _SECONDS_BETWEEN_SIGNALS
    with os.fdopen(child.report) as report:
        if not select.select([report], [], [], _SECONDS_AT_MOST)[0]:
            # where it hangs goes to stderr
            os.kill(number, signal.SIGUSR1)
            time.sleep(1)
            os.kill(number, signal.SIGKILL)
            os.waitpid(number, 0)
            return {"error": "Hung", "said": f"after {_SECONDS_AT_MOST} seconds"}
        said = report.read()
    _, status = os.waitpid(number, 0)
    if os.WIFSIGNALED(status):
        return {"killed": True}
    answer: dict[str, Any] = json.loads(said)
    # what a run imports, the next ones find
    for name in answer.pop("modules", []):
        if name not in sys.modules:
            _import(name)
    return answer


def _import(name: str) -> None:
    try:
        __import__(name)
    except ImportError:
        sys.modules.pop(name, None)


def _run(
    faults: ctypes.CDLL, report: Any, *, out: str, images: str = "", model: str = "",
    training: dict[str, Any] | None = None, keeping: int | None = None, at: int = 0, how: str = "count",
    durable: str = "", every_s: float = 0.0, sleep_s: float = 0.0, refuse: Mapping[str, str] | None = None,
    limit: int | None = None, traced: bool = False, **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    import torch

    from unet_fast import journal, prediction

    before = set(sys.modules)
    net = _loaded(model) if model else torch.nn.Identity()
    journal._SECONDS_BETWEEN_SYNCS = every_s
    forwards: list[int] = []
    forward, refuse = net.forward, refuse or {}

    def counted(windows: torch.Tensor) -> torch.Tensor:
        forwards.append(len(windows))
        if sleep_s and len(forwards) == 1:
            _say(report)
        kind = refuse.get(str(len(forwards)))
        if kind is not None:
            raise _refusal(kind)
        time.sleep(sleep_s)
        return forward(windows)

    net.forward = counted  # type: ignore[method-assign]
    folder = next(p for p in Path(out).parents if p.exists())
    trace = os.memfd_create("trace") if traced else -1
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    error, said, statuses = None, "", []
    faulthandler.register(signal.SIGUSR1, sys.__stderr__)
    sys.stderr = StringIO()
    if not sleep_s:
        _say(report)
    began = time.monotonic()
    faults.faults_arm(ctypes.c_long(at), HOW.index(how), os.fsencode(str(folder)), os.fsencode(durable), trace)
    try:
        # here and nowhere else
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if training is not None:
            statuses = [_train(**training)]
        elif keeping is not None:
            statuses = [_keep(Path(out), keeping)]
        else:
            summary = prediction.predict_files(net, Path(images), Path(out), **settings)
            statuses = [file.status for file in summary.files]
    except BaseException as raised:
        error, said = type(raised).__name__, str(raised)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    calls = faults.faults_disarm()
    return {
        "calls": calls,
        "seconds": time.monotonic() - began,
        "forwards": forwards,
        "error": error,
        "said": said,
        "stderr": sys.stderr.getvalue(),
        "statuses": statuses,
        "trace": _read(trace) if traced else [],
        "modules": sorted(set(sys.modules) - before),
    }


def _train(*, resume: bool = False, **settings: Any) -> str:
    from unet_fast import training
    from unet_fast.config import TrainConfig

    config = TrainConfig.from_dict(settings)
    # a run that was killed before its first state begins again
    training.train(config, resume=resume, progress=False)
    return "trained"


def state_of(step: int) -> Any:
    """A state whose numbers are all `step`."""
    import torch

    from unet_fast.checkpoints import State

    weights = {f"layer{i}.weight": torch.full((3, 5, i + 1), float(step)) for i in range(3)}
    return State(weights, {name: t + 0.5 for name, t in weights.items()}, {"step": step, "log": [step] * 50})


def _keep(out: Path, step: int) -> str:
    from unet_fast.checkpoints import keep

    return keep(out, step, state_of(step)).name


def _say(report: Any) -> None:
    """That the run has begun."""
    report.write("\n")
    report.flush()


def _refusal(kind: str) -> Exception:
    import torch

    if kind == "cuda":
        return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: 12 bytes")


def _read(trace: int) -> list[str]:
    os.lseek(trace, 0, os.SEEK_SET)
    with os.fdopen(trace) as file:
        return file.read().splitlines()


if __name__ == "__main__":
    _serve(sys.argv[1])
