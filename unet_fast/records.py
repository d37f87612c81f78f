"""What a run was made of, so that it can be made again: `RUN/run.json`."""

import hashlib
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import __version__

__all__ = ["about_data", "about_machine"]

# a larger file is known by its size, and its first and last so many bytes
_WHOLE_BYTES, _END_BYTES = 10**9, 1 << 20


def about_machine(device: torch.device) -> dict[str, Any]:
    """The device, versions of all that computes, installed packages, and the commit this package is at, if any."""
    return {
        "command": sys.argv,
        "device": str(device),
        "hardware": _hardware(device),
        "git": _commit(),
        "versions": {
            "unet_fast": __version__,
            "torch": torch.__version__,
            "triton": _version("triton"),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "packages": sorted(
            {f"{d.metadata['Name']}=={d.version}" for d in metadata.distributions() if d.metadata["Name"]}
        ),
    }


def about_data(files: Iterable[Path]) -> dict[str, str]:
    """sha256 of each file, by its path; of files above a gigabyte, of their size, first and last megabyte."""
    return {str(path): _digest(path) for path in dict.fromkeys(files)}


def _digest(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _WHOLE_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(f"{size}".encode() + file.read(_END_BYTES))
        file.seek(-_END_BYTES, 2)
        digest.update(file.read())
    return f"{digest.hexdigest()} (size and ends of {size} bytes)"


def _hardware(device: torch.device) -> dict[str, Any]:
    about: dict[str, Any] = {"system": platform.platform(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        about |= {"gpu": card.name, "compute_capability": f"{card.major}.{card.minor}", "memory": card.total_memory}
        about["driver"] = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return about


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the sources this runs from, with a + where they differ from it."""
    here = str(Path(__file__).parent)
    tracked = _said("git", "-C", here, "ls-files", "--error-unmatch", Path(__file__).name)
    commit = _said("git", "-C", here, "rev-parse", "HEAD") if tracked else None
    changed = _said("git", "-C", here, "status", "--porcelain", "--untracked-files=no", ".") if commit else None
    return commit and f"{commit}{'+' if changed else ''}"


def _said(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None
