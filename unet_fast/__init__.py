"""A U-Net package for labs: exact, fast, and inside a memory budget.

Names are resolved when they are first used (PEP 562): `import unet_fast` loads no torch, so that the command line
answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import geometry, memory, metrics
    from .augment import ElasticWarp
    from .compat import SameSize, sliding_window_inference
    from .config import TrainConfig
    from .data import class_balance
    from .inference import predict
    from .loss import BorderWeightedCrossEntropy
    from .model import FastUNet
    from .normalisation import Normalisation
    from .replay import Replayed, ReplayedStep
    from .storage import load, save
    from .tiling import plan_tiles
    from .training import train

__all__ = [
    "BorderWeightedCrossEntropy",
    "ElasticWarp",
    "FastUNet",
    "Normalisation",
    "Replayed",
    "ReplayedStep",
    "SameSize",
    "TrainConfig",
    "__version__",
    "class_balance",
    "geometry",
    "load",
    "memory",
    "metrics",
    "plan_tiles",
    "predict",
    "save",
    "sliding_window_inference",
    "train",
]

__version__ = "0.1.0"

_HOMES = {
    "BorderWeightedCrossEntropy": "loss",
    "ElasticWarp": "augment",
    "FastUNet": "model",
    "Normalisation": "normalisation",
    "Replayed": "replay",
    "ReplayedStep": "replay",
    "SameSize": "compat",
    "TrainConfig": "config",
    "class_balance": "data",
    "load": "storage",
    "plan_tiles": "tiling",
    "predict": "inference",
    "save": "storage",
    "sliding_window_inference": "compat",
    "train": "training",
}
_MODULES = ("geometry", "memory", "metrics")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
