"""The gradient of a large image is the sum of its tiles' gradients, to rounding: any image can be trained on in pieces.

The loss is a sum over pixels and the net has no batch statistics, so tiles that start on the max-pool grid and count
each output pixel once give the gradient of the whole.
"""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import unet_kernels
from unet_fast import FastUNet, geometry


def _gradient(net: FastUNet, pieces: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
    """Of the summed loss of (image, target, pixel_weight) pieces, a backward each."""
    net.zero_grad()
    for image, target, weight in pieces:
        logits = net(image)
        loss = unet_kernels.weighted_cross_entropy(
            logits[:, :, : target.shape[1], : target.shape[2]], target, weight, reduction="sum"
        )
        loss.backward()
    return [p.grad.clone() for p in net.parameters()]


@pytest.mark.parametrize("recompute", ["none", "level"])
@pytest.mark.parametrize(("depth", "keep"), [(1, (10, 16)), (2, (16, 24)), (3, (24, 16))])
def test_tiles_add_up_to_the_gradient_of_the_whole_image(depth: int, keep: tuple[int, int], recompute: str) -> None:
    torch.manual_seed(0)
    net = FastUNet(1, 3, tuple(2 + level for level in range(depth + 1)), recompute=recompute).double()
    halo = geometry.halo(depth)
    rows, columns = (next(n for n in geometry.legal_sizes(1, 999, depth) if n - 2 * halo > 2 * k + 4) for k in keep)
    out = (rows - 2 * halo, columns - 2 * halo)
    image = torch.randn(1, 1, rows, columns, dtype=torch.float64)
    target, weight = torch.randint(0, 3, (1, *out)), torch.rand(1, *out, dtype=torch.float64)
    whole = _gradient(net, [(image, target, weight)])

    # the last tile of a row reads zeros beyond the image, for outputs that nobody counts
    padded = F.pad(image, (0, 200, 0, 200))
    pieces = []
    for top, left in product(range(0, out[0], keep[0]), range(0, out[1], keep[1])):
        part = (slice(None), slice(top, min(top + keep[0], out[0])), slice(left, min(left + keep[1], out[1])))
        sides = [
            next(n for n in geometry.legal_sizes(1, 999, depth) if n >= s.stop - s.start + 2 * halo) for s in part[1:]
        ]
        window = padded[:, :, top : top + sides[0], left : left + sides[1]]
        pieces.append((window, target[part], weight[part]))
    assert len(pieces) > 4
    for one, tiled in zip(whole, _gradient(net, pieces), strict=True):
        assert (one - tiled).norm() <= 1e-10 * one.norm()


def test_a_tile_off_the_grid_gives_another_gradient() -> None:
    # that a shift by one pixel is seen shows that the test above could fail
    torch.manual_seed(0)
    net = FastUNet(1, 2, (2, 3, 4)).double()
    image, target = torch.randn(1, 1, 76, 76, dtype=torch.float64), torch.randint(0, 2, (1, 36, 36))
    weight = torch.ones(1, 36, 36, dtype=torch.float64)
    whole = _gradient(net, [(image, target, weight)])
    for start, same in ((16, True), (17, False)):
        parts = [(0, start), (start, 36)]
        padded = F.pad(image, (0, 99, 0, 99))
        pieces = []
        for (top, bottom), (left, right) in product(parts, parts):
            sides = [
                next(n for n in geometry.legal_sizes(1, 999, 2) if n >= s + 40) for s in (bottom - top, right - left)
            ]
            window = padded[:, :, top : top + sides[0], left : left + sides[1]]
            pieces.append((window, target[:, top:bottom, left:right], weight[:, top:bottom, left:right]))
        tiled = _gradient(net, pieces)
        worst = max(float((a - b).norm() / a.norm()) for a, b in zip(whole, tiled, strict=True))
        assert (worst < 1e-10) is same
