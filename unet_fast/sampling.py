"""Which tile comes when: random places of random images, warped; the same whatever the workers, ranks or device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import geometry
from .augment import ElasticWarp
from .config import TrainConfig
from .data import Example, target_of

__all__ = ["Sampler"]


class Sampler:
    """Batches by their step: they depend on (seed, step) alone, so that a resumed run sees what it would have seen.

    Args:
        examples: what is trained on; a large image comes as often as it has tiles.
        config: batch, seed, depth and all of the augmentation.
        tile: side of what goes into the net.
    """

    def __init__(self, examples: Sequence[Example], config: TrainConfig, tile: int) -> None:
        self.examples, self.config, self.tile = examples, config, tile
        self.tile_out = geometry.output_size(tile, config.depth)
        self.warp = ElasticWarp(
            config.grid,
            config.elastic,
            rotate=config.rotate,
            mirror=config.mirror,
            grey=config.grey,
            zoom=config.zoom,
            noise=config.noise,
        )
        # a large image comes as often as it has tiles
        self.order = [
            i for i, e in enumerate(examples) for _ in range(max(1, round(e.instances.numel() / self.tile_out**2)))
        ]
        self.per_epoch = -(-len(self.order) // config.batch)

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """(image [N, C, H, W], instances [N, H, W], target [N, H, W]) of a step."""
        tiles = [self._tile(step * self.config.batch + i) for i in range(self.config.batch)]
        image, instances, target = (torch.stack(parts) for parts in zip(*tiles, strict=True))
        return image, instances, target

    def _tile(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        epoch, index = divmod(count, len(self.order))
        shuffled = torch.randperm(len(self.order), generator=ElasticWarp.generator(self.config.seed, epoch, -1))
        example = self.examples[self.order[int(shuffled[index])]]
        generator = ElasticWarp.generator(self.config.seed, epoch, index)
        image, instances = self.warp.draw_tile(example.image, example.instances, self.tile, self.tile_out, generator)
        return image, instances, target_of(instances[None], example.class_of)[0]
