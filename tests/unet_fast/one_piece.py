"""What tiles must join to, made without the package's tiler: one forward pass over a window of the endless image.

The image goes on by walking to and fro over its pixels; versions are made by numpy's flips, and by complex numbers.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tests.unet_fast.test_tiling import picture, tile_that_keeps, to_and_fro
from unet_fast import FastUNet, geometry

__all__ = ["averaged", "d4", "grey_net", "one_piece", "picture", "rot7", "softmax", "tile_that_keeps", "tiny"]

# rows and columns of an endless image, index arrays that are broadcast, to its pixels [C, R, S]
Endless = Callable[[NDArray[np.intp], NDArray[np.intp]], NDArray[Any]]


def tiny(depth: int = 1, channels: int = 1, classes: int = 2, *, width: int = 2, **more: Any) -> FastUNet:
    """A small float64 net whose every level is felt in its output, which spreads around 0 by 1."""
    # the first seed that shuts no layer for good
    return next(net for seed in range(100) if (net := _seeded(seed, depth, channels, classes, width, more)))


def _seeded(seed: int, depth: int, channels: int, classes: int, width: int, more: dict[str, Any]) -> FastUNet | None:
    torch.manual_seed(seed)
    model = FastUNet(channels, classes, (width,) * (depth + 1), **more).double().eval()
    spreads: list[float] = []

    def to_unit_spread(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        # neither growing nor fading from level to level: a ReLU scales with what comes in
        spreads.append(spread := max(float(output.std()), 1e-9))
        for parameter in module.parameters():
            parameter.div_(spread)
        return output / spread

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.2, 0.2)
            elif not name.startswith("head"):
                # more is added than taken away
                parameter.copy_(parameter.abs() * torch.where(torch.rand_like(parameter) < 0.25, -1.0, 1.0))
        convolutions = (each for each in model.modules() if isinstance(each, nn.Conv2d | nn.ConvTranspose2d))
        handles = [each.register_forward_hook(to_unit_spread) for each in convolutions]
        side = next(side for side in range(1, 1000) if _answers(model, side))
        logits = model(torch.from_numpy(picture(1, channels, side, side + 4 * 2**depth)))
        for handle in handles:
            handle.remove()
        model.head.bias.sub_(logits.mean((0, 2, 3)))
    return model if min(spreads) > 0.01 else None


def _answers(model: FastUNet, side: int) -> bool:
    try:
        # two steps: a spread needs several pixels
        return geometry.output_size(side, model.depth) > 2 * 2**model.depth
    except ValueError:
        return False


def grey_net(features: Sequence[int] = (8, 8, 8), **more: Any) -> FastUNet:
    """A float32 net whose memory is counted."""
    torch.manual_seed(1)
    return FastUNet(features=features, **more).eval()


def answer(model: nn.Module, endless: Endless, rows: tuple[int, int], columns: tuple[int, int]) -> NDArray[np.float64]:
    """Logits of rows and columns (first, last) of an endless image whose pixel (0, 0) begins a pooling cell."""
    depth, step = model.depth, geometry.step_multiple(model.depth)
    resize, same = getattr(model, "up_mode", "deconv") == "resize", getattr(model, "padding", "valid") == "same"
    # so wide a frame, in whole steps, that no padded zero is felt inside it; or what the convolutions take
    before = 8 * step if same else geometry.halo(depth)
    spans, firsts = [], []
    for first, last in (rows, columns):
        start = first // step * step - before
        # and more on the right than what resize repeats there can reach
        side = last + 1 - start + before + (8 * step if same else step * resize)
        side = -(-side // step) * step if same else geometry.legal_sizes(side, side + step, depth)[0]
        spans.append(np.arange(start, start + side))
        firsts.append(first - start - (0 if same else before))
    like = next(model.parameters())
    with torch.no_grad():
        logits = model(torch.from_numpy(endless(spans[0][:, None], spans[1])[None]).to(like.dtype))[0]
    high, wide = (last + 1 - first for first, last in (rows, columns))
    kept = logits[:, firsts[0] : firsts[0] + high, firsts[1] : firsts[1] + wide]
    assert kept.shape[1:] == (high, wide)
    return kept.double().numpy()


def mirrored(image: NDArray[Any]) -> Endless:
    """[C, H, W] without end."""

    def endless(rows: NDArray[np.intp], columns: NDArray[np.intp]) -> NDArray[Any]:
        places = []
        for index, n in zip((rows, columns), image.shape[1:], strict=True):
            far = max(0, -int(index.min()))
            walk = np.array(to_and_fro(n, -far, far + max(0, int(index.max())) + 1))
            places.append(walk[index + far])
        return image[:, places[0], places[1]]

    return endless


def one_piece(model: nn.Module, image: NDArray[Any]) -> NDArray[np.float64]:
    """Logits [K, H, W] of an image [C, H, W] by one forward pass in the model's own dtype."""
    return answer(model, mirrored(image), (0, image.shape[1] - 1), (0, image.shape[2] - 1))


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(logits - logits.max(0))
    return powers / powers.sum(0)


def d4(model: nn.Module, image: NDArray[Any]) -> NDArray[np.float64]:
    """The mean of the probabilities of the square's 8 symmetries, each made by numpy and undone by numpy."""
    found = []
    for turn in range(4):
        for flip in (False, True):
            version = np.rot90(image[:, :, ::-1] if flip else image, turn, (1, 2)).copy()
            back = np.rot90(softmax(one_piece(model, version)), -turn, (1, 2))
            found.append(back[:, :, ::-1] if flip else back)
    return np.mean(found, 0)


def rot7(model: nn.Module, image: NDArray[Any], angles: Sequence[float] | None = None) -> NDArray[np.float64]:
    """The mean of the probabilities of 7 rotations, each interpolated onto a canvas that holds all of it, and back."""
    angles = [360 * k / 7 for k in range(7)] if angles is None else angles
    return np.mean([_rotated(model, image, each) for each in angles], 0)


def _rotated(model: nn.Module, image: NDArray[Any], degrees: float) -> NDArray[np.float64]:
    height, width = image.shape[1:]
    endless = mirrored(image)
    # counter-clockwise where the imaginary axis points up and rows count downwards
    turn = complex(math.cos(math.radians(degrees)), math.sin(math.radians(degrees)))

    def plane(rows: Any, columns: Any) -> Any:
        return (columns - (width - 1) / 2) + 1j * ((height - 1) / 2 - rows)

    def places(z: Any) -> tuple[Any, Any]:
        return (height - 1) / 2 - z.imag, z.real + (width - 1) / 2

    def linear(sample: Callable[[Any, Any], Any], rows: Any, columns: Any) -> Any:
        y, x = np.floor(rows).astype(int), np.floor(columns).astype(int)
        v, u = rows - y, columns - x
        return (
            (1 - v) * (1 - u) * sample(y, x)
            + (1 - v) * u * sample(y, x + 1)
            + v * (1 - u) * sample(y + 1, x)
            + v * u * sample(y + 1, x + 1)
        )

    def version(rows: NDArray[np.intp], columns: NDArray[np.intp]) -> NDArray[np.float64]:
        # rotated counter-clockwise, a pixel comes from where it was before
        return linear(endless, *places(plane(rows, columns) / turn))

    own = plane(np.arange(height)[:, None], np.arange(width)[None])
    rows, columns = places(own * turn)
    box = [(math.floor(each.min()) - 1, math.ceil(each.max()) + 2) for each in (rows, columns)]
    found = softmax(answer(model, version, *box))
    (top, _), (left, _) = box
    return linear(lambda y, x: found[:, y - top, x - left], rows, columns)


def averaged(tta: str, model: nn.Module, image: NDArray[Any]) -> NDArray[np.float64]:
    return {"none": lambda *a: softmax(one_piece(*a)), "d4": d4, "rot7": rot7}[tta](model, image)
