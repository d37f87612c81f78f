"""Is it right, and how fast is it, on this GPU? One command, a quarter of an hour, the answers as data.

    PYTHONPATH=.:kernels python -m benchmarks.gpu_report --out DIR [--minutes 16] [--only SECTION ...]

Each section of `benchmarks.sections` is run in turn; report.json and report.md are saved after each. A section that
fails is recorded and the run goes on. Exit codes: 0 all went well, 1 a section failed, 2 it could not start.
`--device cpu --smoke` runs every section at tiny sizes: it proves the script, not the speed.
"""

import argparse
import gc
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.harness import Roof
from benchmarks.machine import machine, slug
from benchmarks.report import Entry, Report
from benchmarks.sections import Context, Failed, Section, Skipped, discover

__all__ = ["main", "run_sections"]

DTYPES = {
    "cuda": (torch.bfloat16, torch.float16, torch.float32),
    # float16 products take a hundred times as long on most CPUs
    "cpu": (torch.float32, torch.bfloat16),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the report; returns the exit code."""
    sections = discover()
    parser = _parser(sections)
    chosen = parser.parse_args(arguments)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch sees no CUDA device here; --device cpu --smoke tries the script.", file=sys.stderr)
        return 2
    # a polite kill ends what the sections started, too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    device = torch.device(chosen.device)
    if device.type == "cuda":
        # the baseline at its best: cuDNN picks its algorithm by trying
        torch.backends.cudnn.benchmark = True
    elif chosen.smoke:
        # tiny work on shared cores is faster without threads that wait for each other
        torch.set_num_threads(1)
    torch.manual_seed(20150518)
    context = Context(
        device=device,
        smoke=chosen.smoke,
        out=chosen.out,
        deadline=time.monotonic() + 60 * chosen.minutes,
        dtypes=DTYPES[device.type],
        roof=Roof(device, small=chosen.smoke),
    )
    facts = machine() | {"device_used": device.type, "smoke": chosen.smoke, "threads": torch.get_num_threads()}
    written = Report(chosen.out, slug(device) + ("_smoke" if chosen.smoke else ""), facts)
    run_sections([s for s in sections if not chosen.only or s.name in chosen.only], context, written)
    print(f"to keep it: cp {chosen.out}/report.json benchmarks/results/{written.name}.json")
    return 1 if written.failed else 0


def run_sections(sections: Sequence[Section], context: Context, written: Report) -> None:
    """Run each section that still fits before the deadline, saving after each."""
    lost = ""
    for section in sections:
        started = time.monotonic()
        needed_s, left_s = section.expected_s(context.smoke), context.left_s
        if lost:
            entry = Entry(section.name, section.title, report.SKIPPED, 0.0, f"the CUDA context was lost in {lost}")
        elif needed_s > left_s:
            reason = f"needs about {needed_s:.0f} s, {max(left_s, 0):.0f} s are left"
            entry = Entry(section.name, section.title, report.SKIPPED, 0.0, reason)
        else:
            entry = _run(section, context, started)
        written.add(entry)
        _say(entry)
        if entry.status == report.FAILED and not lost and _context_is_lost(context.device):
            lost = section.name


def _run(section: Section, context: Context, started: float) -> Entry:
    status, reason = report.DONE, ""
    try:
        result = section.run(context)
    except Skipped as why:
        status, reason, result = report.SKIPPED, str(why), {}
    except Failed as why:
        status, reason, result = report.FAILED, str(why), why.result
    except Exception as error:
        # the first line is what a person reads, the traceback follows it
        status, reason, result = report.FAILED, f"{type(error).__name__}: {error}\n{traceback.format_exc()}", {}
    gc.collect()
    return Entry(section.name, section.title, status, round(time.monotonic() - started, 2), reason, result)


def _context_is_lost(device: torch.device) -> bool:
    """After an illegal access every later CUDA call of the process fails, and times nothing."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
        torch.ones(1, device=device).sum().item()
    except RuntimeError:
        return True
    return False


def _say(entry: Entry) -> None:
    said = entry.result.get("headline") or (entry.reason.splitlines() or [""])[0]
    print(f"{entry.name:<12} {entry.status:<8} {entry.seconds:6.1f} s  {said}", flush=True)


def _parser(sections: Sequence[Section]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where report.json and report.md go")
    parser.add_argument("--minutes", type=float, default=16.0, help="sections that do not fit are skipped (default 16)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: proves the script, not the speed")
    names = [section.name for section in sections]
    parser.add_argument("--only", nargs="+", choices=names, metavar="SECTION", help=f"of {', '.join(names)}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
