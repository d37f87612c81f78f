"""Which tile comes when: random places of random images, warped; the same whatever the workers, ranks or device."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from . import geometry
from .augment import ElasticWarp
from .config import TrainConfig
from .data import target_of
from .tiling import covering_tile, cut_tile

__all__ = ["Sampler"]

# where whole images are drawn, the elastic grid is that of the paper's tile, whatever tiles they are cut into
_GRID_TILE = 572


class Slice(Protocol):
    """What a tile is cut from: `unet_fast.data.Example`, or one that lies on a device."""

    @property
    def image(self) -> Tensor: ...
    @property
    def instances(self) -> Tensor: ...
    @property
    def class_of(self) -> Tensor: ...
    @property
    def one_kind(self) -> bool: ...
    @property
    def name(self) -> str: ...


class Sampler:
    """Batches by their step: they depend on (seed, step) alone, so that a resumed run sees what it would have seen.

    Args:
        examples: what is trained on; a large image comes as often as it has tiles.
        config: batch, seed, depth and all of the augmentation; with accumulate "image" whole images are drawn.
        tile: side of what goes into the net.
    """

    def __init__(self, examples: Sequence[Slice], config: TrainConfig, tile: int) -> None:
        self.examples, self.config, self.tile = examples, config, tile
        self.tile_out = self._answered(tile)
        self.warp = ElasticWarp(
            config.grid,
            config.elastic,
            rotate=config.rotate,
            mirror=config.mirror,
            grey=config.grey,
            zoom=config.zoom,
            noise=config.noise,
            foreground=config.foreground,
        )
        self.whole = config.accumulate == "image"
        for side in {n for e in examples for n in self._covering(e)} if self.whole else ():
            # refused here, before anything is written
            cut_tile(side, tile, depth=config.depth, up_mode=config.up_mode)
        tiles = [e.instances.numel() / self.tile_out**2 for e in examples]
        # a large image comes as often as it has tiles
        self.order = [i for i, n in enumerate(tiles) for _ in range(1 if self.whole else max(1, round(n)))]
        self.per_epoch = -(-len(self.order) // config.batch)

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """(image [N, C, H, W], instances [N, H, W], target [N, H, W]) of a step."""
        image, instances, target = (torch.stack(parts) for parts in zip(*self.drawn(step), strict=True))
        return image, instances, target

    def drawn(self, step: int, share: range | None = None) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(image [C, H, W], instances [H, W], target [H, W]) of each tile of a step, or of each whole image.

        `share`: of the tiles with these numbers only.
        """
        return [
            self._draw(step * self.config.batch + i) for i in (range(self.config.batch) if share is None else share)
        ]

    def pixels(self, step: int) -> int:
        """How many pixels the net answers for in a step, ignored ones too."""
        if not self.whole:
            return self.config.batch * self.tile_out**2
        counts = range(step * self.config.batch, (step + 1) * self.config.batch)
        sides = (self._sides(self._example(count)[0])[0] for count in counts)
        return sum(self._answered(height) * self._answered(width) for height, width in sides)

    def folding(self, tries: int = 24) -> dict[str, float]:
        """How often the elastic maps fold as they are drawn, before they are scaled down so that they do not.

        "maps": the share of them that do; "pixels": the share of all their output's pixels where they do.
        """
        shares = []
        for i in range(tries):
            example = self.examples[i % len(self.examples)]
            sides, grid_tile = self._sides(example)
            height, width = example.instances.shape
            generator = ElasticWarp.generator(self.config.seed, -2, i)
            displacement = self.warp.draw(1, (height, width), generator, tile=grid_tile)
            shares.append(float(self.warp.folded(displacement, (height, width), out_size=sides)))
        return {"maps": sum(s > 0 for s in shares) / tries, "pixels": sum(shares) / tries}

    def _sides(self, example: Slice) -> tuple[tuple[int, int], int]:
        """(rows and columns of what is drawn of an example, the tile that its elastic grid is laid over)."""
        return (self._covering(example), _GRID_TILE) if self.whole else ((self.tile, self.tile), self.tile)

    def _answered(self, side: int) -> int:
        """Side of what the net says of a tile."""
        return side if self.config.padding == "same" else geometry.output_size(side, self.config.depth)

    def _covering(self, example: Slice) -> tuple[int, int]:
        return covering_tile(example.instances.shape, depth=self.config.depth, up_mode=self.config.up_mode)

    def _example(self, count: int) -> tuple[Slice, int, int]:
        """What the tile of that number is cut from, its epoch, and its place there."""
        epoch, index = divmod(count, len(self.order))
        shuffled = torch.randperm(
            len(self.order), generator=ElasticWarp.generator(self.config.seed, epoch, -1), device="cpu"
        )
        return self.examples[self.order[int(shuffled[index])]], epoch, index

    def _draw(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        example, epoch, index = self._example(count)
        # of one that lies on a device each look makes it anew
        picture, cells = example.image, example.instances
        generator = ElasticWarp.generator(self.config.seed, epoch, index)
        sides, grid_tile = self._sides(example)
        answered = tuple(self._answered(n) for n in sides)
        image, instances = self.warp.draw_tile(
            picture, cells, sides, (answered[0], answered[1]), generator, grid_tile=grid_tile
        )
        return image, instances, target_of(instances[None], example.class_of, one_kind=example.one_kind)[0]
