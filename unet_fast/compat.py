"""FastUNet where code expects something else: outputs of the input's size, or MONAI's sliding windows."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import geometry
from .errors import BadInput
from .progress import Progress
from .tiling import Cutter, Tile, mirrored

__all__ = ["SameSize", "sliding_window_inference"]


class SameSize(nn.Module):
    """A net of unpadded convolutions that answers for every pixel of its input: mirror, run, crop.

    Takes [N, C, H, W] of any size from 1 x 1 to [N, K, H, W]; the image goes on by reflection (1234 -> 32123432), also
    where the halo is longer than the image; equal to `unet_fast.predict(..., output="logits")` in one piece, without
    the normalisation. Gradients flow through, so that it can be trained with a loss on images of equal size.

    Args:
        model: a FastUNet, or a module with its geometry (`depth`, `up_mode`, `padding`).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or 0 in x.shape[2:]:
            raise BadInput(f"x must be [N, C, H, W] with at least one row and one column, got {list(x.shape)}")
        cutter = Cutter.of(self.model)
        sides = [cutter.smallest(n) for n in x.shape[2:]]
        logits = _checked("model", self.model(_window(x, 0, 0, sides, cutter)), sides, cutter)
        first = cutter.halo if cutter.same else 0
        return logits[..., first : first + x.shape[2], first : first + x.shape[3]]


def _window(x: Tensor, row: int, column: int, sides: Sequence[int], cutter: Cutter) -> Tensor:
    """What goes into the net for the tile whose output begins at (row, column)."""
    for axis, (start, side) in enumerate(zip((row, column), sides, strict=True), 2):
        index = mirrored(start - cutter.halo, side, x.shape[axis])
        x = x.index_select(axis, torch.from_numpy(index).to(x.device))
    return x


def _one_tensor(name: str, found: Any) -> Tensor:
    """What came out, if it is logits."""
    if not isinstance(found, Tensor) or found.ndim != 4:
        got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise BadInput(f"{name} must give one tensor [B, K, h, w], got {got}")
    return found


def _checked(name: str, found: Any, sides: Sequence[int], cutter: Cutter) -> Tensor:
    """What came out for windows of these sides, if it has the size that is expected."""
    logits = _one_tensor(name, found)
    expected = [side if cutter.same else side - 2 * cutter.halo for side in sides]
    if list(logits.shape[2:]) != expected:
        came, went, due = (" x ".join(str(n) for n in pair) for pair in (logits.shape[2:], sides, expected))
        raise BadInput(f"{name} gives {came} pixels for {went}, not the {due} of a U-Net of depth {cutter.depth}")
    return logits


def sliding_window_inference(
    inputs: Tensor,
    roi_size: int | Sequence[int | None] | None,
    sw_batch_size: int,
    predictor: Callable[..., Tensor],
    overlap: float | Sequence[float] = 0.25,  # noqa: ARG001 (tiles that are exact need none)
    mode: str = "constant",  # noqa: ARG001
    sigma_scale: float | Sequence[float] = 0.125,  # noqa: ARG001
    padding_mode: str = "constant",  # noqa: ARG001
    cval: float = 0.0,  # noqa: ARG001
    sw_device: torch.device | str | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    roi_weight_map: Tensor | None = None,
    process_fn: Callable[..., Any] | None = None,
    buffer_steps: int | None = None,  # noqa: ARG001
    buffer_dim: int = -1,  # noqa: ARG001
    with_coord: bool = False,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """MONAI's `sliding_window_inference`, right for nets of unpadded convolutions: same arguments, exact answers.

    MONAI takes an output that is smaller than its window for a zoomed one, and returns an image of another size. Here a
    window's output is what it is, the answer for its middle; windows abut on the pooling grid, each pixel is computed
    once and is equal to one pass over the whole image, so that there is nothing to blend: `overlap`, `mode`,
    `sigma_scale`, `buffer_steps` and `buffer_dim` are accepted and change nothing, and neither do `padding_mode` and
    `cval`: the image goes on by reflection.

    Args:
        inputs: [N, C, H, W].
        roi_size: rows and columns of a window, or both; the largest legal size up to it is taken, the smallest there is
            if it is below that; at most what covers the image, which is also taken for None, 0 and less.
        sw_batch_size: windows that go through the predictor together.
        predictor: a FastUNet, or any callable on [B, C, h, w] whose output is a U-Net's: smaller by twice a halo of
            6 * 2^depth - 4.
        sw_device, device: of the windows, and of the result; None: the inputs'.
        progress: show progress on stderr.
        roi_weight_map, process_fn, with_coord: refused if given.
        args, kwargs: handed to the predictor.

    Returns:
        [N, K, H, W] of the predictor's dtype.

    Raises:
        BadInput: inputs of other than four axes, an argument that cannot be kept, a predictor of another geometry.
    """
    if inputs.ndim != 4 or 0 in inputs.shape:
        raise BadInput(f"inputs must be [N, C, H, W], got {list(inputs.shape)}")
    if roi_weight_map is not None or process_fn is not None or with_coord:
        raise BadInput("roi_weight_map, process_fn and with_coord cannot be kept: nothing is blended here")
    if sw_batch_size < 1:
        raise BadInput(f"sw_batch_size must be 1 or more, got {sw_batch_size}")
    asked = list(roi_size) if isinstance(roi_size, Iterable) else [roi_size, roi_size]
    if len(asked) != 2 or not all(side is None or hasattr(side, "__index__") for side in asked):
        raise BadInput(f"roi_size must be one side or rows and columns, got {roi_size!r}")
    on = torch.device(sw_device) if sw_device is not None else inputs.device
    cutter = _cutter(predictor, inputs, on, args, kwargs)
    covering = [cutter.smallest(n) for n in inputs.shape[2:]]
    tile_in = [
        min(cutter.legal(side), most) if side is not None and side > 0 else most
        for side, most in zip(asked, covering, strict=True)
    ]
    steps = [
        n if cutter.right(side) >= n else cutter.keep(side) for side, n in zip(tile_in, inputs.shape[2:], strict=True)
    ]
    tiles = [
        Tile(sample, row, column, min(steps[0], inputs.shape[2] - row), min(steps[1], inputs.shape[3] - column))
        for sample in range(len(inputs))
        for row in range(0, inputs.shape[2], steps[0])
        for column in range(0, inputs.shape[3], steps[1])
    ]
    out: Tensor | None = None
    first = cutter.halo if cutter.same else 0
    with Progress("predict", len(tiles), shown=progress) as bar:
        for start in range(0, len(tiles), sw_batch_size):
            group = tiles[start : start + sw_batch_size]
            windows = [_window(inputs[t.z : t.z + 1], t.row, t.column, tile_in, cutter) for t in group]
            found = _checked("predictor", predictor(torch.cat(windows).to(on), *args, **kwargs), tile_in, cutter)
            if out is None:
                shape = (len(inputs), found.shape[1], *inputs.shape[2:])
                out = torch.empty(shape, dtype=found.dtype, device=device or inputs.device)
            for tile, each in zip(group, found, strict=True):
                part = each[:, first : first + tile.rows, first : first + tile.columns]
                out[tile.z, :, tile.row : tile.row + tile.rows, tile.column : tile.column + tile.columns] = part
            bar.advance(by=len(group))
    assert out is not None
    return out


def _cutter(
    predictor: Callable[..., Tensor], inputs: Tensor, on: torch.device, args: Sequence[Any], kwargs: dict[str, Any]
) -> Cutter:
    """By the predictor's own attributes, or by what comes out of one small window."""
    if hasattr(predictor, "depth"):
        return Cutter.of(predictor)  # type: ignore[arg-type]
    # can be pooled up to five times
    [side] = geometry.legal_sizes(380, 380, 5)
    with torch.no_grad():
        window = inputs.new_zeros((1, inputs.shape[1], side, side), device=on)
        found = _one_tensor("predictor", predictor(window, *args, **kwargs))
    for depth in range(6):
        if list(found.shape[2:]) == [side - 2 * geometry.halo(depth)] * 2:
            # it does not say how it goes up: what is right for "resize" is right for "deconv"
            return Cutter(depth, "resize", "valid")
    raise BadInput(
        f"predictor gives {found.shape[2]} x {found.shape[3]} pixels for {side} x {side}, which no U-Net of unpadded "
        f"convolutions does; for nets that keep the size, MONAI's own sliding_window_inference is the right one"
    )
