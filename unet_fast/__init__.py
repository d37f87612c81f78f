"""A U-Net package for labs: exact, fast, and inside a memory budget.

Names are resolved when they are first used (PEP 562): `import unet_fast` loads no torch, so that the command line
answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import geometry
    from .model import FastUNet

__all__ = ["FastUNet", "__version__", "geometry"]

__version__ = "0.1.0"

_HOMES = {"FastUNet": "model"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    if name == "geometry":
        return import_module(".geometry", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
