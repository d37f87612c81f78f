"""What a FastUNet makes of a tile: the size of every map, and the arithmetic of every convolution. Plain integers.

Names are those of the layers (`down.0.conv1`, ..., `head`); beside them stand `input`, `pool.{level}` and
`skip.{level}`, the window that the expanding path sees of a skip.
"""

from dataclasses import dataclass

from .model import FastUNet

__all__ = ["Convolution", "Layers", "Shape"]


@dataclass(frozen=True, slots=True)
class Shape:
    """Of one map of one tile."""

    channels: int
    rows: int
    columns: int

    @property
    def values(self) -> int:
        return self.channels * self.rows * self.columns


@dataclass(frozen=True, slots=True)
class Convolution:
    """`weight` values, and FLOP (one multiply-add is 2) that one tile takes forward; bias and ReLU are not counted."""

    weight: int
    flop: int


class Layers:
    """All maps and convolutions of a net for a tile of rows x columns, both legal; padding is "valid".

    Attributes:
        maps: what each layer makes.
        convolutions: those of the net, in the order of the forward.
    """

    def __init__(self, net: FastUNet, rows: int, columns: int) -> None:
        settings = net.settings
        self.maps: dict[str, Shape] = {"input": Shape(net.in_channels, rows, columns)}
        self.convolutions: dict[str, Convolution] = {}
        before, size = net.in_channels, (rows, columns)
        for level, width in enumerate(net.features):
            if level:
                size = (size[0] // 2, size[1] // 2)
                self.maps[f"pool.{level}"] = Shape(before, *size)
            for part in ("conv1", "conv2"):
                size = (size[0] - 2, size[1] - 2)
                self._add(f"down.{level}.{part}", before, width, size, 9)
                before = width
        for level in reversed(range(net.depth)):
            width, last = net.features[level], settings["last_up_channels"]
            arriving = last if level == 0 and last is not None else width
            size = (2 * size[0], 2 * size[1])
            # deconv: one tap reaches each output; resize by phase: 9 products for 4 outputs
            reach = 1.0 if net.up_mode == "deconv" else 9 / 4
            self._add(f"up.{level}.up", before, arriving, size, 4, reach)
            self.maps[f"skip.{level}"] = Shape(width, *size)
            before = arriving + width if settings["skips"] else arriving
            for part in ("conv1", "conv2"):
                size = (size[0] - 2, size[1] - 2)
                self._add(f"up.{level}.{part}", before, width, size, 9)
                before = width
        self._add("head", before, net.out_channels, size, 1)

    def _add(
        self, name: str, before: int, after: int, size: tuple[int, int], taps: int, reach: float | None = None
    ) -> None:
        self.maps[name] = Shape(after, *size)
        products = before * after * size[0] * size[1] * (taps if reach is None else reach)
        self.convolutions[name] = Convolution(before * after * taps, round(2 * products))

    def flop(self, mode: str = "train", *, again: bool = False) -> int:
        """FLOP of one tile: a forward, or a training step.

        Args:
            mode: "predict", or "train": each convolution forward, and by its input and its weight backward; the image
                needs no gradient.
            again: in training, all but the head forward a second time, as with recompute="level".
        """
        each = [convolution.flop for convolution in self.convolutions.values()]
        forward = sum(each)
        if mode == "predict":
            return forward
        return 3 * forward - each[0] + (forward - each[-1] if again else 0)
