"""What is trained on: data that were read, understood, and found fit for it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .config import TrainConfig
from .data import Example, Labelled, class_balance, read_labelled, split
from .errors import BadInput
from .feeding import resident
from .loss import BorderWeightedCrossEntropy
from .model import FastUNet
from .normalisation import Normalisation
from .sampling import Sampler
from .units import bytes_of
from .validation import Validation

__all__ = ["Task", "prepare"]


@dataclass(frozen=True, slots=True)
class Task:
    """What is trained on, and where; the same for every way of training."""

    data: Labelled
    data_digest: str
    learn: list[Example]
    classes: int
    weights: tuple[float, ...]
    normalisation: Normalisation
    loss: BorderWeightedCrossEntropy
    validation: Validation
    device: torch.device

    def model(self, config: TrainConfig) -> FastUNet:
        """The net with its first weights: drawn on the CPU, so that they are the same on every device."""
        with torch.random.fork_rng([]):
            torch.manual_seed(config.seed)
            model = FastUNet(
                self.data.channels,
                self.classes,
                config.features,
                up_mode=config.up_mode,
                dropout=config.dropout,
                skips=config.skips,
                padding=config.padding,
            )
        model.to(self.device)
        model.recompute = config.recompute or "none"
        model.normalisation = self.normalisation
        return model

    def sampler(self, config: TrainConfig) -> Sampler:
        """Of tiles from the host."""
        assert config.tile is not None
        return Sampler(self.learn, config, config.tile)

    def feeding_sampler(self, config: TrainConfig) -> Sampler:
        """The same tiles, from wherever the images lie best."""
        assert config.tile is not None
        budget = None if config.memory is None else bytes_of(config.memory)
        return Sampler(resident(self.learn, self.device, config.images_on, budget), config, config.tile)


def prepare(config: TrainConfig, device: torch.device) -> Task:
    """Read the data, understand them, and refuse what cannot be trained on.

    Raises:
        BadInput: see `unet_fast.data.read_labelled`; no cell to learn from or to be judged by; a class without a pixel.
    """
    normalisation = _normalisation(config)
    data = read_labelled(
        config.images,
        config.labels,
        kind=config.label_kind,
        ignore=config.ignore,
        axes=config.axes,
        normalisation=normalisation,
    )
    classes = _classes(config, data)
    learn, held_out = split(data.examples, config.validation)
    if not any((e.instances > 0).any() for e in learn):
        raise BadInput(f"{config.labels} has no cell outside the validation block; use a smaller validation share")
    if held_out and not any((e.instances > 0).any() for e in held_out):
        block = f"the validation block, {held_out[0].name} to {held_out[-1].name},"
        share = f"another validation share than {config.validation:g}"
        raise BadInput(f"{block} has no cell to be judged by; use {share}, or 0 for none")
    weights = class_balance(learn) if config.balance else (1.0,) * classes
    if len(weights) < classes:
        raise BadInput(f"the training set has no pixel of class {classes - 1}; train with classes {len(weights)}")
    loss = BorderWeightedCrossEntropy(
        config.border_weight,
        config.border_sigma,
        class_weight=weights,
        region=config.border_region,
        gap=data.kind != "class",
    )
    return Task(
        data=data,
        data_digest=_digest(data.examples),
        learn=list(learn),
        classes=classes,
        weights=tuple(weights),
        normalisation=normalisation,
        loss=loss,
        validation=Validation(held_out, loss),
        device=device,
    )


def _normalisation(config: TrainConfig) -> Normalisation:
    given = {name: v for name, v in (("low", config.low), ("high", config.high)) if v is not None}
    if config.normalisation == "range" and len(given) < 2:
        raise BadInput("normalisation range needs low and high, the grey values that become 0 and 1")
    return Normalisation(config.normalisation, **given)


def _classes(config: TrainConfig, data: Labelled) -> int:
    if config.classes is None:
        return data.classes
    if config.classes < data.classes:
        raise BadInput(f"classes is {config.classes}, but the labels go up to class {data.classes - 1}")
    return config.classes


def _digest(examples: Sequence[Example]) -> str:
    """sha256 of all images, as they are trained on, and of their labels."""
    digest = hashlib.sha256()
    for example in examples:
        for part in (example.image, example.instances, example.class_of):
            digest.update(part.contiguous().numpy().tobytes())
    return digest.hexdigest()
