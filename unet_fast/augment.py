"""The paper's augmentation: one random map for an image and its cells, drawn on the CPU, applied in one pass.

Elastic deformation of a coarse 3 x 3 grid with displacements of 10 px standard deviation, rotation, mirror, shift,
and a grey-value table. Draws depend on (seed, epoch, index) alone, never on workers, ranks or the device.
"""

import hashlib
import math

import torch
from torch import Tensor

import unet_kernels

__all__ = ["ElasticWarp"]


class ElasticWarp:
    """Random elastic maps as in section 3.1 of Ronneberger et al. 2015.

    Args:
        grid: points of the coarse grid per side of one tile.
        sigma_px: standard deviation of a point's displacement, pixels, per axis; 0 for none.
        rotate: rotation by any angle.
        mirror: half of the maps are mirrored.
        grey: strength of the grey-value table, 0 (none) to 1: black and white points move by up to 0.2 `grey` of the
            range and a monotone curve of three inner knots bends between them.
        zoom: the greatest enlargement, 1 for none; sizes are drawn from 1 / zoom to zoom, evenly on either side of 1.
        noise: greatest sd of Gaussian noise added to a tile, in units of the image's range. A warp averages
            neighbouring pixels: without new noise the net never sees images as noisy as those it will judge.
        order: interpolation of the image, 1 (linear) or 3 (cubic, which blurs less).
    """

    def __init__(
        self,
        grid: int = 3,
        sigma_px: float = 10.0,
        *,
        rotate: bool = True,
        mirror: bool = True,
        grey: float = 0.5,
        zoom: float = 1.0,
        noise: float = 0.0,
        order: int = 3,
    ) -> None:
        if grid < 2:
            raise ValueError(f"grid must have at least 2 points a side, got {grid}")
        if not (math.isfinite(sigma_px) and sigma_px >= 0):
            raise ValueError(f"sigma_px must be 0 or more, got {sigma_px}")
        if not 0 <= grey <= 1:
            raise ValueError(f"grey must lie between 0 and 1, got {grey}")
        if not 1 <= zoom <= 4:
            raise ValueError(f"zoom must lie between 1 and 4, got {zoom}")
        if not (math.isfinite(noise) and noise >= 0):
            raise ValueError(f"noise must be 0 or more, got {noise}")
        self.grid, self.sigma_px, self.rotate, self.mirror = grid, float(sigma_px), rotate, mirror
        self.grey, self.zoom, self.noise, self.order = float(grey), float(zoom), float(noise), order

    @staticmethod
    def generator(seed: int, epoch: int, index: int) -> torch.Generator:
        """A CPU generator that depends on the three numbers alone."""
        digest = hashlib.sha256(f"{seed} {epoch} {index}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def draw(
        self, n: int, size: tuple[int, int], generator: torch.Generator, *, tile: int | tuple[int, int] | None = None
    ) -> Tensor:
        """Displacements [n, 2, gh, gw], pixels, rows first, of a grid that spans images of `size`.

        With `tile`, the points lie as far apart as `grid` points over one tile, however large the image is.
        """
        tile = size if tile is None else tile
        sides = (tile, tile) if isinstance(tile, int) else tile
        points = [
            max(2, round((full - 1) / max(1, side - 1) * (self.grid - 1)) + 1)
            for full, side in zip(size, sides, strict=True)
        ]
        return torch.randn(n, 2, *points, generator=generator) * self.sigma_px

    def draw_affine(self, n: int, generator: torch.Generator) -> Tensor:
        """Rotations, mirrors and zooms [n, 2, 3] about the image's centre; the last column, a shift, is 0."""
        angle, side, size = torch.rand(3, n, generator=generator)
        angle = angle * (2 * math.pi if self.rotate else 0.0)
        mirrored = torch.where(side < 0.5, -1.0, 1.0) if self.mirror else torch.ones(n)
        # what is read over a smaller distance comes out larger
        distance = self.zoom ** (1 - 2 * size)
        cos, sin = distance * angle.cos(), distance * angle.sin()
        matrix = torch.zeros(n, 2, 3)
        matrix[:, 0, 0], matrix[:, 0, 1] = cos, -sin * mirrored
        matrix[:, 1, 0], matrix[:, 1, 1] = sin, cos * mirrored
        return matrix

    def draw_table(self, n: int, generator: torch.Generator) -> Tensor:
        """Grey-value tables [n, 256] over 0 to 1: monotone, straight between five knots, like Freiburg's."""
        ends, inner = torch.rand(n, 2, generator=generator), torch.rand(n, 4, generator=generator)
        black = 0.2 * self.grey * (2 * ends[:, :1] - 1)
        white = 1 + 0.2 * self.grey * (2 * ends[:, 1:] - 1)
        # slopes between 2/3 and 3/2 at full strength, one for each quarter of the range
        slope = torch.exp(self.grey * math.log(1.5) * (2 * inner - 1))
        rise = torch.cat([torch.zeros(n, 1), slope.cumsum(1)], 1) / slope.sum(1, keepdim=True)
        curve = torch.nn.functional.interpolate(rise[:, None], 256, mode="linear", align_corners=True)[:, 0]
        return black + (white - black) * curve

    def apply(
        self,
        image: Tensor,
        displacement: Tensor,
        *,
        labels: Tensor | None = None,
        matrix: Tensor | None = None,
        lut: Tensor | None = None,
        out_size: int | tuple[int, int] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`unet_kernels.elastic_warp` with this object's interpolation order."""
        return unet_kernels.elastic_warp(
            image, displacement, labels=labels, matrix=matrix, lut=lut, out_size=out_size, order=self.order
        )

    def draw_tile(
        self,
        image: Tensor,
        instances: Tensor,
        tile_in: int | tuple[int, int],
        tile_out: int | tuple[int, int],
        generator: torch.Generator,
        *,
        grid_tile: int | tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A training tile around a random centre: (image [C, *tile_in], instances [*tile_in]).

        Args:
            image: [C, H, W] floating, about 0 to 1.
            instances: [H, W].
            tile_in: side, or rows and columns, of what comes out; beyond the image it is mirrored.
            tile_out: side, or rows and columns, of what the net will answer for: the centre is uniform among those
                that keep it inside the image, where the image is large enough.
            grid_tile: the grid's points lie as far apart as over a tile of this size; None is tile_in.
            generator: all randomness comes from it.
        """
        height, width = instances.shape
        displacement = self.draw(1, (height, width), generator, tile=grid_tile or tile_in)
        matrix = self.draw_affine(1, generator)
        lut = self.draw_table(1, generator)
        where = torch.rand(2, generator=generator)
        sd = self.noise * torch.rand(1, generator=generator)
        span = torch.tensor([float(height), float(width)]) - 1
        answered = (tile_out, tile_out) if isinstance(tile_out, int) else tile_out
        half = torch.minimum((torch.tensor(answered, dtype=torch.float32) - 1) / 2, span / 2)
        # the warp reads at M (p - c) + shift + c, so the tile's centre c reads at c + shift
        matrix[0, :, 2] = half + where * (span - 2 * half) - span / 2
        out, labels = self.apply(
            image[None],
            displacement,
            labels=instances[None],
            matrix=matrix,
            lut=lut if self.grey else None,
            out_size=tile_in,
        )
        if self.noise:
            out = out + sd * torch.randn(out.shape, generator=generator)
        return out[0], labels[0]
