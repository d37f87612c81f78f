"""The paper's augmentation: one random map for an image and its cells, drawn on the CPU, applied in one pass.

Elastic deformation of a coarse 3 x 3 grid with displacements of 10 px standard deviation, rotation, mirror, shift,
and a grey-value table. Draws depend on (seed, epoch, index) alone, never on workers, ranks or the device; nor does
what is made of them, bit for bit.
"""

import hashlib
import math

import torch
from torch import Tensor

import unet_kernels

from .sending import sent

__all__ = ["ElasticWarp"]

# A bicubic map's slope along a row or column is at most so many times the largest step between neighbouring points of
# its grid: 1.5 for the derivatives of Keys' taps along it, 1.375 for the taps across (docs/mathematics.md, section 6).
_STEEPEST = 1.5 * 1.375
# what would fold is scaled down to this share of where it would begin to
_SHORT_OF_FOLDING = 0.95
# places at which a cell is looked for before all of its pixels are listed
_LOOKS = 512


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
        foreground: share of the tiles that lie around a pixel of a cell, each pixel as likely as any other; the others
            lie anywhere. For images that are mostly empty.
        fold: let a map fold, that is, show a part of the image mirrored and more than once. By default a drawn
            displacement that would fold at any pixel is scaled down to 95 % of where it would begin to. One of 10 px
            over a tile of 572 never would; over small tiles many would.
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
        foreground: float = 0.0,
        fold: bool = False,
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
        if not 0 <= foreground <= 1:
            raise ValueError(f"foreground must lie between 0 and 1, got {foreground}")
        self.foreground, self.fold = float(foreground), fold
        self.grid, self.sigma_px, self.rotate, self.mirror = grid, float(sigma_px), rotate, mirror
        self.grey, self.zoom, self.noise, self.order = float(grey), float(zoom), float(noise), order

    @staticmethod
    def generator(seed: int, epoch: int, index: int) -> torch.Generator:
        """A CPU generator that depends on the three numbers alone."""
        digest = hashlib.sha256(f"{seed} {epoch} {index}".encode()).digest()
        return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def draw(
        self, n: int, size: tuple[int, int], generator: torch.Generator, *, tile: int | tuple[int, int] | None = None
    ) -> Tensor:
        """Displacements [n, 2, gh, gw], pixels, rows first, of a grid that spans images of `size`.

        With `tile`, the points lie about as far apart as `grid` points over one tile (in whole intervals of the
        image), however large the image is.
        """
        tile = size if tile is None else tile
        sides = (tile, tile) if isinstance(tile, int) else tile
        points = [
            max(2, round((full - 1) / max(1, side - 1) * (self.grid - 1)) + 1)
            for full, side in zip(size, sides, strict=True)
        ]
        return _normal(generator, n, 2, *points) * self.sigma_px

    def draw_affine(self, n: int, generator: torch.Generator) -> Tensor:
        """Rotations, mirrors and zooms [n, 2, 3] about the image's centre; the last column, a shift, is 0."""
        angle, side, size = _uniform(generator, 3, n).double()
        angle = angle * (2 * math.pi if self.rotate else 0.0)
        mirrored = torch.where(side < 0.5, -1.0, 1.0) if self.mirror else torch.ones_like(side)
        # what is read over a smaller distance comes out larger
        distance = self.zoom ** (1 - 2 * size)
        cos, sin = distance * angle.cos(), distance * angle.sin()
        matrix = torch.zeros(n, 2, 3, dtype=torch.float32, device="cpu")
        matrix[:, 0, 0], matrix[:, 0, 1] = cos, -sin * mirrored
        matrix[:, 1, 0], matrix[:, 1, 1] = sin, cos * mirrored
        return matrix

    def draw_table(self, n: int, generator: torch.Generator) -> Tensor:
        """Grey-value tables [n, 256] over 0 to 1: monotone, straight between five knots, like Freiburg's.

        For `apply` to a uint8 (uint16) image times 255 (65535), as `draw_tile` does.
        """
        ends, inner = (_uniform(generator, n, count).double() for count in (2, 4))
        black = 0.2 * self.grey * (2 * ends[:, :1] - 1)
        white = 1 + 0.2 * self.grey * (2 * ends[:, 1:] - 1)
        # slopes between 2/3 and 3/2 at full strength, one for each quarter of the range
        slope = torch.exp(self.grey * math.log(1.5) * (2 * inner - 1))
        rise = torch.cat([torch.zeros_like(slope[:, :1]), slope.cumsum(1)], 1) / slope.sum(1, keepdim=True)
        curve = torch.nn.functional.interpolate(rise[:, None], 256, mode="linear", align_corners=True)[:, 0]
        return (black + (white - black) * curve).float()

    @staticmethod
    def folded(displacement: Tensor, size: tuple[int, int], *, out_size: int | tuple[int, int] | None = None) -> Tensor:
        """Share of the output's pixels at which each elastic map folds, [n]: where its Jacobian is not positive.

        Args:
            displacement: [n, 2, gh, gw], as of `draw`.
            size: of the image.
            out_size: of the window in its middle that is looked at; default: the image's.
        """
        if _cannot_fold(displacement, size):
            return torch.zeros(len(displacement), dtype=torch.float64, device=displacement.device)
        trace, determinant = _stretch(displacement, size, out_size)
        # NaN is not positive either
        return (~(1 + trace + determinant > 0)).double().mean((1, 2))

    @staticmethod
    def unfolded(
        displacement: Tensor, size: tuple[int, int], *, out_size: int | tuple[int, int] | None = None
    ) -> Tensor:
        """The displacements, those scaled down whose map would fold at some pixel; arguments as of `folded`."""
        if _cannot_fold(displacement, size):
            return displacement
        trace, determinant = _stretch(displacement, size, out_size)
        # det(1 + s u') reaches 0 where -1 / s is an eigenvalue of u'
        root = trace.square() / 4 - determinant
        lowest = torch.where(root >= 0, trace / 2 - root.clamp(min=0).sqrt(), 0).amin((1, 2))
        scale = torch.where(lowest <= -1, -_SHORT_OF_FOLDING / lowest, 1)
        return displacement * scale.to(displacement.dtype).view(-1, 1, 1, 1)

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
        """A training tile around a random centre: (image [C, *tile_in], instances [*tile_in]), in one pass.

        Args:
            image: [C, H, W], on any device; floating, about 0 to 1, or uint8 or uint16, whose range the table and the
                noise refer to.
            instances: [H, W], any integer dtype, beside it.
            tile_in: side, or rows and columns, of what comes out; beyond the image it is mirrored.
            tile_out: side, or rows and columns, of what the net will answer for: the centre is uniform among those
                that keep it inside the image, where the image is large enough; or, of a share `foreground` of the
                tiles, as near as that allows to a pixel of a cell.
            grid_tile: the grid's points lie as far apart as over a tile of this size; None is tile_in.
            generator: all randomness comes from it.
        """
        height, width = instances.shape
        displacement = self.draw(1, (height, width), generator, tile=grid_tile or tile_in)
        if not self.fold:
            displacement = self.unfolded(displacement, (height, width), out_size=tile_in)
        matrix = self.draw_affine(1, generator)
        lut = self.draw_table(1, generator)
        where = _uniform(generator, 2)
        sd = self.noise * _uniform(generator, 1)
        span = torch.tensor([height, width], dtype=torch.float32, device="cpu") - 1
        answered = (tile_out, tile_out) if isinstance(tile_out, int) else tile_out
        half = torch.minimum((torch.tensor(answered, dtype=torch.float32, device="cpu") - 1) / 2, span / 2)
        centre = half + where * (span - 2 * half)
        if self.foreground and _uniform(generator, 1) < self.foreground:
            pixel = _cell_pixel(instances, generator)
            centre = centre if pixel is None else torch.minimum(torch.maximum(pixel, half), span - half)
        # the warp reads at M (p - c) + shift + c, so the tile's centre c reads at c + shift
        matrix[0, :, 2] = centre - span / 2
        device, top = image.device, _highest(image.dtype)
        out, labels = self.apply(
            image[None],
            sent(displacement, device),
            labels=instances[None],
            matrix=sent(matrix, device),
            lut=sent(top * lut, device) if self.grey else None,
            out_size=tile_in,
        )
        if self.noise:
            noise = sent(top * sd * _normal(generator, *out.shape), device)
            if image.is_floating_point():
                out = out + noise.to(out.dtype)
            else:
                out = (out.float() + noise).round().clamp(0, top).to(out.dtype)
        return out[0], labels[0]


def _uniform(generator: torch.Generator, *shape: int) -> Tensor:
    """Numbers from 0 to 1, wherever torch's default device and dtype are."""
    return torch.rand(shape, dtype=torch.float32, generator=generator, device="cpu")


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal numbers, likewise; rounded from float64, whose last bits alone depend on the processor."""
    return torch.randn(shape, dtype=torch.float64, generator=generator, device="cpu").float()


def _highest(dtype: torch.dtype) -> float:
    """Of a grey value."""
    return 1.0 if dtype.is_floating_point else float(torch.iinfo(dtype).max)


def _cannot_fold(displacement: Tensor, size: tuple[int, int]) -> bool:
    """Whether the steps between neighbouring points of the grids are so small that no map can fold; sufficient only."""
    slopes = torch.zeros(len(displacement), 2, dtype=displacement.dtype, device="cpu")
    for axis, pixels in ((2, size[0]), (3, size[1])):
        points_per_pixel = (displacement.shape[axis] - 1) / max(1, pixels - 1)
        slopes = slopes + displacement.diff(dim=axis).abs().amax((2, 3)).cpu() * points_per_pixel
    # a component's slopes along both axes are less than 1 together: the Jacobian is diagonally dominant
    # written so that NaN may fold
    return bool((_STEEPEST * slopes < 1).all())


def _stretch(
    displacement: Tensor, size: tuple[int, int], out_size: int | tuple[int, int] | None
) -> tuple[Tensor, Tensor]:
    """Trace and determinant of u' at every output pixel, [n, h, w]."""
    jacobian = unet_kernels.warp_jacobian(displacement, size, out_size=out_size)
    yy, xx = jacobian[:, 0, 0] - 1, jacobian[:, 1, 1] - 1
    return yy + xx, yy * xx - jacobian[:, 0, 1] * jacobian[:, 1, 0]


def _cell_pixel(instances: Tensor, generator: torch.Generator) -> Tensor | None:
    """Row and column of a cell's pixel, each as likely as any other; None where there is no cell."""
    size = torch.tensor(instances.shape, device="cpu")
    places = torch.minimum((_uniform(generator, _LOOKS, 2) * size).long(), size - 1)
    found = (instances[tuple(places.T.to(instances.device))].long() > 0).nonzero()
    if not len(found):
        # few pixels of many: all of them
        places = (instances.long() > 0).nonzero().cpu()
        if not len(places):
            return None
        found = torch.randint(len(places), (1, 1), generator=generator, device="cpu")
    return places[int(found[0, 0])].float()
