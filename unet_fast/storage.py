"""Models on disk: safetensors, with the net's settings and normalisation in the header and a checksum over all."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import __version__
from .errors import BadInput
from .files import replacing
from .model import FastUNet
from .normalisation import Normalisation

__all__ = ["MODEL", "load", "pick_device", "read_tensors", "save", "write_tensors"]

MODEL = "model.safetensors"


def save(model: FastUNet, path: str | Path) -> None:
    """Write a model with its settings, and its normalisation if it has one, to one safetensors file.

    Args:
        model: the net; its weights are saved contiguous, in their dtype.
        path: a file, or an existing folder, in which the file is `model.safetensors`.

    Raises:
        BadInput: the place cannot be written; what was there stays as it was.
    """
    path = Path(path)
    about = {
        "net": model.settings,
        "normalisation": model.normalisation.as_dict() if model.normalisation else None,
        "version": __version__,
    }
    write_tensors(path / MODEL if path.is_dir() else path, model.state_dict(), about)


def load(path: str | Path) -> FastUNet:
    """Read a model that `save` wrote: a file, or a folder (such as a training run) with `model.safetensors` in it.

    Raises:
        BadInput: there is none, it is damaged (a checksum covers every byte of the weights), or it is of another kind.
    """
    path = Path(path)
    path = path / MODEL if path.is_dir() else path
    tensors, about = read_tensors(path)
    try:
        # its first weights are thrown away: the caller's generator need not notice
        with torch.random.fork_rng([]):
            model = FastUNet(**about["net"])
        # in its own dtype first: a float64 weight must not pass through float32
        model.to(next(iter(tensors.values())).dtype)
        model.load_state_dict(tensors)
        if about["normalisation"]:
            model.normalisation = Normalisation(**about["normalisation"])
    except (KeyError, TypeError, ValueError, RuntimeError, StopIteration) as error:
        raise BadInput(f"{path} does not hold a FastUNet this version can build: {error}") from error
    return model.eval()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors and a JSON record to one safetensors file, whole or not at all."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"unet_fast": json.dumps(about), "sha256": _digest(plain, json.dumps(about))}
    with replacing(path) as temporary:
        try:
            save_file(plain, temporary, metadata=header)
        except SafetensorError as error:
            raise OSError(str(error)) from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the record of a file that `write_tensors` wrote, checked against its checksum."""
    if not path.is_file():
        raise BadInput(f"{path} does not exist; expected a model that unet-fast train or unet_fast.save wrote")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInput(f"{path} is damaged or no safetensors file: {error}") from error
    if "unet_fast" not in header:
        raise BadInput(f"{path} was not written by unet_fast: its header has no settings")
    if header.get("sha256") != _digest(tensors, header["unet_fast"]):
        raise BadInput(f"{path} is damaged: its checksum does not fit its contents")
    return tensors, json.loads(header["unet_fast"])


def _digest(tensors: Mapping[str, Tensor], about: str) -> str:
    digest = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU where there is one. BadInput where it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device
