"""What this machine has, and which lane each op takes on it and why."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import unet_kernels

from . import __version__

__all__ = ["examine", "render"]

LIBRARIES = ("torch", "triton", "numpy")


def examine() -> dict[str, Any]:
    """Everything `unet-fast doctor` shows, as JSON-able data."""
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    return {
        "unet_fast": __version__,
        "python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        "libraries": {name: _version(name) for name in LIBRARIES},
        "devices": {str(device): _describe(device) for device in devices},
        "no_cuda": _why_no_cuda(),
        "native": unet_kernels.native_libraries(),
        "ops": {op: {str(device): _lane(op, device) for device in devices} for op in unet_kernels.OPS},
    }


def render(found: dict[str, Any]) -> str:
    """The same for a reader."""
    lines = [f"unet-fast {found['unet_fast']}", f"  python    {found['python']}"]
    lines += [f"  {name:<9} {value}" for name, value in found["libraries"].items()]
    lines += ["", "devices"]
    lines += [f"  {name:<9} {value}" for name, value in found["devices"].items()]
    if found["no_cuda"]:
        lines.append(f"  {'cuda':<9} none: {found['no_cuda']}")
    lines += ["", "native libraries"]
    lines += [f"  {name:<12} {value}" for name, value in found["native"].items()]
    for device in found["devices"]:
        lines += ["", f"what each op runs on {device}"]
        for op, lanes in found["ops"].items():
            lane, reason = lanes[device]
            lines.append(f"  {op:<23} {lane:<7} {reason}")
    return "\n".join(lines)


def _lane(op: str, device: torch.device) -> list[str]:
    return list(unet_kernels.lane(op, device, torch.float32))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{_processor()}, {torch.get_num_threads()} threads"
    about = torch.cuda.get_device_properties(device)
    return f"{about.name}, sm_{about.major}{about.minor}, {about.total_memory / 1e9:.1f} GB"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            names = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _why_no_cuda() -> str:
    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) was built without CUDA"
    return f"torch was built for CUDA {torch.version.cuda}, but finds no device (driver missing or too old?)"
