"""What a number was measured on: device, driver, versions, commit, date. A result without it is a rumour."""

import functools
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["ROOT", "commit", "machine", "slug"]

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def machine() -> dict[str, Any]:
    """Device, versions, commit and date (UTC); "unknown" or None where this machine cannot say."""
    on_cuda = torch.cuda.is_available()
    properties = torch.cuda.get_device_properties(0) if on_cuda else None
    return {
        "device": properties.name if properties else "CPU",
        "capability": f"sm_{properties.major}{properties.minor}" if properties else None,
        "memory_bytes": properties.total_memory if properties else None,
        "multiprocessors": properties.multi_processor_count if properties else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_cuda else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_cuda else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@functools.cache
def commit() -> str:
    """Twelve digits of the commit, "-dirty" behind them where the tree differs; "unknown" outside a repository."""
    # a tree that was copied without its history is told
    if told := os.environ.get("UNET_FAST_COMMIT"):
        return told
    found = _output("git", "rev-parse", "--short=12", "HEAD")
    if found == "unknown":
        return found
    return f"{found}-dirty" if _output("git", "status", "--porcelain") else found


def slug(device: torch.device) -> str:
    """device_date_commit, for the name of a result."""
    facts = machine()
    name = facts["device"] if device.type == "cuda" else "CPU"
    plain = "".join(c if c.isalnum() else "-" for c in name)
    return f"{plain}_{facts['date'][:10]}_{facts['commit']}"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _cpu_model() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
