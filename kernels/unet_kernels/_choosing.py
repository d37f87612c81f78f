"""Which of several ways to compute an op runs: the fastest on this device, measured once a shape and remembered.

An op *asks* a question: its name, the shape as a few words (`case`), and the ways there are, ours and ATen's. Ways that
were never timed here for such a shape are timed at the first call, on random numbers of the same shapes and strides.
Before it is timed, a way's result must be as near to the exact one as ATen's is, with NaN where ATen has it, or it may
not win. Two times are kept, because a launch costs the host more than a small kernel the device: the device's own,
which decides inside a CUDA graph, and that of calls one after another, which decides elsewhere. A tie goes to ATen.

The times stand in a table that a person can read, one file per device and versions: what the package brings
(`tuned/`), and beside it what this machine has measured, in the user's cache. Nothing is measured while a graph is
captured or compiled, on fake tensors, or by one of several ranks: then a case without a row goes to ATen.

`using("ours")` allows our kernels only, `using("reference")` none; UNET_FAST_KERNELS says it for a whole process.
"""

import functools
import hashlib
import json
import math
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import _checks, _triton

__all__ = [
    "SWITCHES",
    "Question",
    "Row",
    "Way",
    "adopt",
    "arithmetic",
    "asked",
    "by_device_time",
    "choices",
    "chooses_derivatives",
    "circumstances",
    "computed",
    "decide",
    "derives",
    "fastest",
    "indexed",
    "octave",
    "ordinary_on_cpu",
    "parameters",
    "recorded",
    "row",
    "run",
    "table_path",
    "using",
    "which",
    "why_too_large",
]

SWITCHES = ("automatic", "reference", "ours")
# ours must be this much faster than ATen: less is noise
MARGIN = 0.98
_KERNELS = (
    "_choosing", "_conv3x3_dx", "_conv3x3_fwd", "_dweight", "_layout", "_triton", "bias_relu", "conv1x1",
    "conv3x3_relu", "conv3x3_relu_pool", "crop_concat", "max_pool2x2", "up_conv",
)  # fmt: skip
# a larger map is timed by its first rows: what wins there wins on more of them
MOST_PIXELS = 1 << 19
# kernels count pixels in 32 bits, rounded up to a block; some have a program for each channel along an axis of so many
MOST_COUNTED, MOST_CHANNELS = (1 << 31) - (1 << 14), (1 << 16) - 1
# what allocators and libraries say where memory is all that is missing
_NO_ROOM = ("out of memory", "ALLOC_FAILED")


@dataclass(frozen=True, slots=True)
class Way:
    """One way to compute an op: `run` takes the op's arguments; `name` is what the table knows it by."""

    name: str
    run: Callable[..., Any]
    ours: bool


@dataclass(frozen=True, slots=True)
class Question:
    """An op for a shape: `ways` to compute it, the most promising of each kind first; `exact` computes it in any dtype.

    `cut` gives the arguments of the first so many lines of the maps, for timing. A result must have ATen's strides,
    unless `any_strides`.
    """

    op: str
    case: str
    ways: Callable[[], list[Way]]
    exact: Callable[..., Any]
    cut: Callable[[tuple[Any, ...], int], tuple[Any, ...]]
    any_strides: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured of a case: microseconds by way, on the device and as called; the ways refused, and why."""

    device_us: dict[str, float] = field(default_factory=dict)
    called_us: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


# the switch


def _from_environment() -> str:
    told = os.environ.get("UNET_FAST_KERNELS", "automatic")
    if told not in SWITCHES:
        raise ValueError(f"UNET_FAST_KERNELS must be one of {', '.join(SWITCHES)}, got {told!r}")
    return told


_switch = _from_environment()


def which() -> str:
    """The switch: "automatic", "reference" or "ours"."""
    return _switch


@contextmanager
def using(kernels: str) -> Iterator[None]:
    """Inside the block, compute by what is fastest ("automatic"), by plain PyTorch ("reference"), or by "ours" only.

    It holds for the whole process, autograd's threads included. With "ours", an op that has no kernel for its
    arguments raises RuntimeError and says why. Triton's interpreter (TRITON_INTERPRET=1) runs ours on CPU tensors.

    Raises:
        ValueError: there is no such switch.
    """
    global _switch
    _checks.expect_choice("kernels", kernels, SWITCHES)
    before, _switch = _switch, kernels
    try:
        yield
    finally:
        _switch = before


def circumstances() -> tuple[Any, ...]:
    """What besides its arguments decides the bits of an op: the switch, and how torch multiplies float32."""
    return _switch, *(_triton.precision(torch.float32, of_products) for of_products in (False, True))


def ordinary_on_cpu(tensor: Tensor) -> bool:
    """Whether a door may call ATen's own autograd at once: see `_checks.ordinary_on_cpu`. Not where ours is wanted."""
    return _switch != "ours" and _checks.ordinary_on_cpu(tensor)


def chooses_derivatives(x: Tensor) -> bool:
    """Whether derivatives of what is made of x will be chosen among ours and ATen's: then masks need no pass."""
    if torch.compiler.is_compiling() or not _checks.is_real(x) or _checks.transformed():
        return False
    return torch.is_grad_enabled() and asked(x.device) and not _triton.why_no_dot(x.device, x.dtype)


def parameters(x: Tensor, weight: Tensor, bias: Tensor, whose: str = "x") -> tuple[Tensor, Tensor]:
    """A convolution's parameters as its op wants them beside x, which autocast has cast: in x's dtype.

    But where the derivative may be ours, float32 parameters stay as they are beside 16 bits: the op casts them, and
    hands back float32 gradients, which our kernels (not ATen's) never round to 16 bits.

    Raises:
        TypeError, ValueError: they are not x's dtype, and there is no autocast; or on another device.
    """
    in_float32 = weight.dtype == bias.dtype == torch.float32
    if in_float32 and x.dtype.itemsize == 2 and _checks.autocast_enabled(x) and asked(x.device):
        _checks.expect_device("weight", weight, whose, x)
        _checks.expect_device("bias", bias, whose, x)
        return weight, bias
    if _checks.autocast_enabled(x):
        weight, bias = _checks.autocast(weight, bias)
    _checks.expect_like("weight", weight, whose, x)
    _checks.expect_like("bias", bias, whose, x)
    return weight, bias


class _Here(threading.local):
    """What a thread has asked for."""

    by_device_time = False


_here = _Here()


@contextmanager
def by_device_time() -> Iterator[None]:
    """Inside the block, what takes the device the least time is chosen, as inside a CUDA graph.

    So that a net that is called computes the very bits of the same net replayed. It holds for this thread, and for what
    is computed without gradients.
    """
    before, _here.by_device_time = _here.by_device_time, True
    try:
        yield
    finally:
        _here.by_device_time = before


# answering


def computed(
    question: Callable[..., Question],
    reference: Callable[..., Any],
    arguments: tuple[Any, ...],
    why_not: Callable[[torch.device, torch.dtype], str] = _triton.why_no_dot,
) -> Any:
    """What an op is: the answer to its question where there is a choice, else its reference.

    Raises:
        RuntimeError: ours is wanted, and there is none for these arguments.
    """
    x = arguments[0]
    if not asked(x.device) or x.shape[0] == 0:
        return reference(*arguments)
    if refusal := why_not(x.device, x.dtype) or why_too_large(x):
        if _switch == "ours":
            raise RuntimeError(f"kernels must be 'automatic' or 'reference' here, got 'ours': {refusal}")
        return reference(*arguments)
    return run(question(*arguments), x.device, arguments)


def why_too_large(x: Tensor) -> str:
    """Why no kernel of ours takes a map, or "": its pixels are counted in 32 bits."""
    N, C, H, W = x.shape
    if N * (H + 1) * (W + 1) > MOST_COUNTED or C > MOST_CHANNELS:
        return f"a map of {N} x {C} x {H} x {W} has more than {MOST_COUNTED} pixels or {MOST_CHANNELS} channels"
    return ""


_records: list[list[tuple[str, str, str]]] = []


@contextmanager
def recorded() -> Iterator[list[tuple[str, str, str]]]:
    """A list that grows by (op, case, way) with every call of an op that had a choice."""
    record: list[tuple[str, str, str]] = []
    _records.append(record)
    try:
        yield record
    finally:
        # this very list: an equal one may be somebody else's
        del _records[next(i for i, each in enumerate(_records) if each is record)]


def asked(device: torch.device) -> bool:
    """Whether there is anything to choose: on CUDA, unless the reference is wanted; elsewhere, if ours is."""
    return _switch == "ours" or (device.type == "cuda" and _switch != "reference")


def derives(*tensors: Tensor) -> bool:
    """Whether the derivative of an op, made of these tensors, is a choice. One that is derived again is ATen's.

    Raises:
        RuntimeError: ours is wanted of a derivative that is to be derived again.
    """
    if not asked(tensors[0].device):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        if _switch == "ours":
            said = "a derivative that is derived again (create_graph=True) has no kernel of ours"
            raise RuntimeError(f"kernels must be 'automatic' or 'reference' here, got 'ours': {said}")
        return False
    return True


def run(question: Question, device: torch.device, arguments: tuple[Any, ...]) -> Any:
    """The op's result, by the way that is chosen for it.

    Raises:
        RuntimeError: ours is wanted, and there is none for these arguments.
    """
    way = decide(question, device, arguments)
    for record in _records:
        record.append((question.op, question.case, way.name))
    return way.run(*arguments)


_decided: dict[tuple[Any, ...], Way] = {}
# what has run in this process outside a capture, and so is compiled and loaded: (op, case, device, name)
_ran: set[tuple[Any, ...]] = set()


def decide(question: Question, device: torch.device, arguments: tuple[Any, ...] | None = None) -> Way:
    """The way that is chosen; without `arguments` nothing is measured."""
    on_cuda = device.type == "cuda"
    capturing = on_cuda and torch.cuda.is_current_stream_capturing()
    by_device = capturing or _here.by_device_time
    key = (question.op, question.case, device, _switch, by_device)
    if key in _decided:
        return _decided[key]
    ways = _allowed(question)
    if not ways:
        raise RuntimeError(f"{question.op} has no kernel of ours for {question.case} on {device}")
    known = row(question, device) if on_cuda else None
    if known is None and on_cuda and arguments is not None and len(ways) > 1 and _may_measure(capturing):
        known = _measured(question, device, arguments)
    if known is None:
        # ATen where it may, until it is known better; not remembered: the next call may measure
        return next((way for way in ways if not way.ours), ways[0])
    way = fastest(question, known, known.device_us if by_device else known.called_us)
    if on_cuda:
        place = (question.op, question.case, device)
        if capturing and (*place, way.name) not in _ran:
            # its first launch loads it, which a capture forbids
            loaded = {name: t for name, t in known.device_us.items() if (*place, name) in _ran}
            return fastest(question, known, loaded) if loaded else next((w for w in ways if not w.ours), ways[0])
        _ran.add((*place, way.name))
        if not by_device and arguments is not None:
            # whoever captures calls first
            _load(fastest(question, known, known.device_us), place, arguments)
    _decided[key] = way
    return way


def _load(way: Way, place: tuple[Any, ...], arguments: tuple[Any, ...]) -> None:
    """Run what a capture would choose, once."""
    if (*place, way.name) in _ran or not _may_measure(capturing=False):
        return
    try:
        with torch.no_grad():
            way.run(*arguments)
    except RuntimeError:
        return
    _ran.add((*place, way.name))


def fastest(question: Question, known: Row, us: dict[str, float]) -> Way:
    """The way that the switch allows and these times favour; ATen's where nothing has a time."""
    ways = _allowed(question)
    timed = [way for way in ways if way.name in us]
    if not timed and _switch != "ours":
        return next(way for way in ways if not way.ours)
    if not timed:
        refused = "; ".join(f"{way.name}: {known.refused.get(way.name, 'not timed')}" for way in ways)
        raise RuntimeError(f"{question.op} has no kernel of ours that may run for {question.case}: {refused}")
    return min(timed, key=lambda way: us[way.name] * (1.0 if way.ours else MARGIN))


def _allowed(question: Question) -> list[Way]:
    ways = [way for way in question.ways() if way.ours or _switch != "ours"]
    return [way for way in ways if not way.ours] if _switch == "reference" else ways


def _may_measure(capturing: bool) -> bool:
    if capturing or torch.compiler.is_compiling():
        return False
    # ranks that measure choose differently, and wait for one another meanwhile
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not (distributed and torch.distributed.get_world_size() > 1)


def octave(pixels: int) -> str:
    """How large a map is, to half an octave: tiles of nearly one size share a row."""
    return f"2^{min(round(2 * math.log2(max(pixels, 1))) / 2, math.log2(MOST_PIXELS)):g} pixels"


def arithmetic(dtype: torch.dtype) -> str:
    """What products are computed in: bfloat16, float16, float32, or "float32 as tf32"."""
    plain = str(dtype).removeprefix("torch.")
    return f"{plain} as tf32" if _triton.precision(dtype) == "tf32" else plain


# measuring


# one at a time; a way may consist of ops that have choices of their own
_measuring = threading.RLock()
_depth = 0
# calls of a case until it is tried again, and that number when it is: each failure costs more than the calls it spares
_waiting: dict[tuple[Any, ...], tuple[int, int]] = {}


def _measured(question: Question, device: torch.device, arguments: tuple[Any, ...]) -> Row | None:
    """A new row of the table; None where there is no memory to measure in."""
    global _depth
    key = (question.op, question.case, device)
    left, then = _waiting.get(key, (0, 8))
    if left and not _depth:
        _waiting[key] = (left - 1, then)
        return None
    with _measuring:
        # another thread may have, meanwhile
        if (known := row(question, device)) is not None:
            return known
        _depth += 1
        try:
            with torch.cuda.device(device), torch.no_grad(), torch.autocast("cuda", enabled=False):
                measured, lasting = _time_all(question, arguments)
        except Exception as error:
            _waiting[key] = (then, 8 * then)
            # what is measured outside of this would be timed with a failure inside
            if _depth > 1 and _is_no_room(error):
                raise
            # what ATen cannot do the caller will hear from ATen
            return None
        finally:
            _depth -= 1
            # what it took is of sizes that nobody will ask for again
            torch.cuda.empty_cache()
        _waiting.pop(key, None)
        _remember(question, device, measured, lasting)
    return measured


def _is_no_room(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _NO_ROOM)


def _time_all(question: Question, arguments: tuple[Any, ...]) -> tuple[Row, bool]:
    """The row, and whether it lasts: what a compiler or a launch refused today, it may do tomorrow."""
    x, lasting = arguments[0], True
    lines = max(8, MOST_PIXELS // (x.shape[0] * x.shape[3]))
    sample = _random_like(question.cut(arguments, lines) if x.shape[2] > lines else arguments)
    ways = question.ways()
    plain = next(way for way in ways if not way.ours)
    want = pytree.tree_leaves(plain.run(*sample))
    exact = pytree.tree_leaves(question.exact(*_widened(sample)))
    found = Row()
    for way in ways:
        try:
            _poison(want)
            got = pytree.tree_leaves(way.run(*sample))
            refusal = next(filter(None, map(_too_far, got, want, exact)), "")
            if not refusal and not question.any_strides:
                refusal = next(filter(None, map(_lies_otherwise, got, want)), "")
            del got
            if refusal:
                found.refused[way.name] = refusal
                continue
            call = functools.partial(way.run, *sample)
            called_us = _called_us(call)
            found.device_us[way.name], found.called_us[way.name] = _device_us(call, called_us), called_us
        except Exception as error:
            if _is_no_room(error):
                raise
            # a compiler or a launch may refuse one way, and the others go on
            found.refused[way.name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            lasting = False
    return found, lasting


def _random_like(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Random numbers in the same shapes and strides, one of them NaN; the global generator is left alone."""
    generators: dict[torch.device, torch.Generator] = {}

    def made(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        generator = generators.setdefault(t.device, torch.Generator(t.device).manual_seed(20150518))
        # an expanded axis holds one value for all
        fresh = (
            torch.empty_like(t)
            if 0 in t.stride()
            else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
        )
        return fresh.copy_(torch.randn(t.shape, generator=generator, device=t.device))

    first, *rest = map(made, arguments)
    first[0, 0, first.shape[2] // 2, first.shape[3] // 2] = torch.nan
    return (first, *rest)


def _widened(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """In a precision beside which the op's own error shows: float32 for 16 bits, else float64."""
    return tuple(
        t.to(torch.float64 if t.dtype == torch.float32 else torch.float32) if isinstance(t, Tensor) else t
        for t in arguments
    )


def _poison(results: Sequence[Tensor]) -> None:
    """Leave NaN where the allocator will probably put the next results: a value that is never written then shows."""
    stale = [torch.full((t.numel() * t.element_size(),), 0xFF, dtype=torch.uint8, device=t.device) for t in results]
    del stale


def _too_far(got: Tensor, want: Tensor, exact: Tensor) -> str:
    """Why a result may not win, or "": an error above twice ATen's own, or NaN elsewhere."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"gives {list(got.shape)} {got.dtype}, not {list(want.shape)} {want.dtype}"
    if want.numel() == 0:
        return ""
    if not torch.equal(got.isnan(), want.isnan()):
        return "NaN elsewhere than ATen has it"
    known = ~exact.isnan()
    exact = torch.where(known, exact, 0)

    def errors(t: Tensor) -> tuple[float, float]:
        off = torch.where(known, t.to(exact.dtype), 0) - exact
        return float(off.abs().max()), float(off.norm())

    unit = torch.finfo(want.dtype).eps
    for of_ours, of_atens, size in zip(
        errors(got), errors(want), (float(exact.abs().max()), float(exact.norm())), strict=True
    ):
        # written so that NaN fails too
        if not of_ours <= 2 * of_atens + unit * size:
            return f"error {of_ours:.2e}, ATen's own is {of_atens:.2e}"
    return ""


def _lies_otherwise(got: Tensor, want: Tensor) -> str:
    """Why a result in other strides may not win, or "": what was compiled around the op relies on ATen's."""

    def strides(t: Tensor) -> list[int]:
        return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]

    return "" if strides(got) == strides(want) else f"strides {list(got.stride())}, not {list(want.stride())}"


def _device_us(call: Callable[[], Any], called_us: float) -> float:
    """Microseconds of the device's own work: launches queue up behind a pause, and so none is waited for."""
    calls, spent = 10, []
    # twice what the host may need for them, at no more than 2 GHz
    pause = max(4_000_000, round(2 * calls * called_us * 2000))
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(pause)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        spent.append(start.elapsed_time(end) * 1e3 / calls)
    return round(min(spent), 3)


def _called_us(call: Callable[[], Any]) -> float:
    """Microseconds a call where calls follow one another: the host's or the device's, whichever is longer."""
    calls, spent = 10, []
    for _ in range(3):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        spent.append((time.perf_counter() - started) * 1e6 / calls)
    return round(min(spent), 3)


# the table


def row(question: Question, device: torch.device) -> Row | None:
    """What is known of a question."""
    return _rows(device).get(f"{question.op}: {question.case}")


# rows that this process keeps to itself
_passing: set[str] = set()


def _remember(question: Question, device: torch.device, measured: Row, lasting: bool) -> None:
    name = f"{question.op}: {question.case}"
    _rows(device)[name] = measured
    if not lasting:
        _passing.add(name)
        return
    path = table_path(device)
    try:
        # what another process has measured meanwhile stays
        mine = {case: known for case, known in _rows(device).items() if case not in _passing}
        rows = _read(path, device) | mine
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        beside.write_text(_written(rows, device), encoding="utf-8")
        os.replace(beside, path)
    except OSError:
        # a cache that cannot be written is measured again by the next process
        return


@functools.cache
def _rows(device: torch.device) -> dict[str, Row]:
    """All that is known of this device: what the package brings, and over it what was measured here."""
    path = table_path(device)
    return _read(Path(__file__).parent / "tuned" / path.name, device) | _read(path, device)


def choices(device: torch.device | str) -> dict[str, Any]:
    """The table of a device, as JSON-able data: versions, and times by op and case. For a run's record."""
    device = indexed(device)
    return json.loads(_written(_rows(device), device))


def adopt(table: dict[str, Any] | None, device: torch.device | str) -> bool:
    """Choose by this table (from `choices`) from now on, where it was made on such a device by these versions.

    So that a run that is resumed computes as it did before, whatever the clock says today. Returns whether it fits.
    """
    device = indexed(device)
    rows = _parsed(table, device)
    _rows(device).update(rows)
    _decided.clear()
    return bool(rows)


def indexed(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def table_path(device: torch.device) -> Path:
    """Where the table of a device is kept: $XDG_CACHE_HOME, or ~/.cache."""
    about = _about(device)
    name = "_".join([about["device"], f"torch{about['torch']}", f"triton{about['triton']}", f"cudnn{about['cudnn']}"])
    plain = "".join(c if c.isalnum() or c in "._" else "-" for c in name)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unet_fast" / "kernels" / f"{plain}.json"


@functools.cache
def _about(device: torch.device) -> dict[str, str]:
    """What a time holds for. The kernels' own text is part of it: another kernel has another time."""
    on_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else platform.machine(),
        "torch": torch.__version__.split("+")[0],
        "triton": getattr(_triton.triton, "__version__", "absent"),
        "cudnn": str(torch.backends.cudnn.version()) if on_cuda else "none",
        "kernels": _fingerprint(),
    }


def _fingerprint() -> str:
    """Of the text of the kernels there is a choice of, without its comments."""
    sources = [(Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8") for name in _KERNELS]
    lines = (line.strip() for source in sources for line in source.splitlines())
    return hashlib.sha256("\n".join(line for line in lines if line and line[0] != "#").encode()).hexdigest()[:12]


def _written(rows: dict[str, Row], device: torch.device) -> str:
    return (
        json.dumps({"about": _about(device), "rows": {k: asdict(r) for k, r in sorted(rows.items())}}, indent=1) + "\n"
    )


def _read(path: Path, device: torch.device) -> dict[str, Row]:
    try:
        return _parsed(json.loads(path.read_text(encoding="utf-8")), device)
    except (OSError, ValueError):
        return {}


def _parsed(table: Any, device: torch.device) -> dict[str, Row]:
    """The rows of a table that was made on such a device by these versions; of any other, none."""
    if not isinstance(table, dict) or table.get("about") != _about(device):
        return {}
    try:
        return {str(case): Row(**known) for case, known in table["rows"].items()}
    except (AttributeError, KeyError, TypeError):
        return {}
