"""What a layer of ours, and each of its gradients, should take before anybody measured it: models of a few terms.

    forward  us = max(arithmetic / (rate x share of a main loop) / share of the last wave, bytes / copy rate) + 2.5

Arithmetic counts the junk pixels at the ends of lines and the last block's padding. A main loop reaches 0.80 of a large
product's rate where it is 128 channels wide, or has the weight first; 0.62 with 64. The last wave: two blocks a
multiprocessor, and those that are left over take as long as all. 2.5 us are start and end of a launch. With one input
channel, and for 1x1, three quarters of the copy rate.

    dx       as the forward with its channels exchanged, and the pass that copies dz with a margin (read, written, a
             launch); or by addresses, without that pass and without junk pixels. A concatenation's is two.
    dweight  us = max(arithmetic as above, operands / 8 TB/s, bytes / copy rate) + partial sums / copy rate + 2 x 2.5

By addresses a main loop reaches 0.70 where it is 128 channels wide, else 0.60. dweight's operands come out of the
second-level cache: BM BN / (BM + BN) FLOP a byte with one tap a load, taps BM BN / (taps BM + BN) where taps share a
block of dz. Its blocks and strips are those that `_dweight.blocks_for` offers an sm_90; two fit a multiprocessor
where their sums are no more than 128 x 128, else one. Partial sums are written and read once; the second launch adds
them up. Window and maxima: bytes at three quarters of the copy rate, as everything that only moves values.
A step keeps whole maps and takes the maxima by a pass of their own; its optimizer moves 22 bytes a parameter
(weight, momentum and gradient read, two of them written, a copy in 16 bits).

    python -m benchmarks.predicted [TFLOPS GBPS PROCESSORS]        default: an H200, 790 4300 132

A prediction is to be overturned by `benchmarks/results`.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch

from benchmarks.cases import Case, cases
from benchmarks.derivatives import OF, Derivative, derivatives
from benchmarks.levels import PAPER_FEATURES, Layer
from unet_kernels import _dweight
from unet_kernels._conv3x3_fwd import Blocks

__all__ = ["predicted_derivative_us", "predicted_us", "step_us"]

LAUNCH_US = 2.5
# pixels and channels of a block, and the share of a large product's rate that its main loop reaches
BLOCKS = (((128, 128), 0.80), ((256, 64), 0.80), ((128, 256), 0.80), ((64, 128), 0.74), ((128, 64), 0.62))
# where each operand is fetched by its address
BY_ADDRESS = (((128, 128), 0.70), ((64, 128), 0.70), ((128, 64), 0.60))
# of the copy rate, where little but bytes is moved
SHARE_OF_COPY = 0.75
L2_GBPS = 8000.0
OPTIMIZER_BYTES = 22


def predicted_us(case: Case, tflops: float, gbps: float, processors: int, itemsize: int = 2) -> float:
    """Microseconds of a layer by our kernels, bias and ReLU (window and maxima) included."""
    layer = case.layer
    moved = layer.min_bytes(itemsize)
    if case.window:
        # of the map only the window is written, and the maxima
        written = case.window**2 + (layer.size_out // 2) ** 2
        moved += layer.c_out * (written - layer.size_out**2) * itemsize
    if layer.kind == "head" or layer.c_in < 16:
        return _moved_us(moved, SHARE_OF_COPY * gbps) + LAUNCH_US
    wide = 4 * layer.c_out if layer.kind == "up" else layer.c_out
    k = layer.c_in * (1 if layer.kind == "up" else 9)
    made = _Product(_pixels(layer), wide, k)
    return max(made.arithmetic_us(BLOCKS, tflops, processors), _moved_us(moved, gbps)) + LAUNCH_US


def predicted_derivative_us(
    derivative: Derivative, tflops: float, gbps: float, processors: int, itemsize: int = 2
) -> float:
    """Microseconds of a gradient by our kernels."""
    layer = derivative.case.layer
    if derivative.of == "pool" or (derivative.of == "dx" and layer.kind == "head"):
        return _moved_us(derivative.min_bytes(itemsize), SHARE_OF_COPY * gbps) + LAUNCH_US
    predicted = _dx_us if derivative.of == "dx" else _dweight_us
    return predicted(derivative, tflops, gbps, processors, itemsize)


def step_us(tflops: float, gbps: float, processors: int, itemsize: int = 2) -> dict[str, float]:
    """Microseconds of a training step of the paper's net, by part."""
    rates, tile = (tflops, gbps, processors, itemsize), (572, PAPER_FEATURES)
    whole = [replace(case, window=0) for case in cases(*tile)]
    # each maximum is of four values
    maxima = (5 * case.layer.c_out * (case.layer.size_out // 2) ** 2 * itemsize for case in cases(*tile) if case.window)
    forward = sum(predicted_us(case, *rates) for case in whole)
    forward += sum(_moved_us(moved, SHARE_OF_COPY * gbps) + LAUNCH_US for moved in maxima)
    gradients = sum(predicted_derivative_us(derivative, *rates) for derivative in derivatives(*tile))
    optimizer = _moved_us(OPTIMIZER_BYTES * sum(case.layer.parameters for case in whole), gbps)
    return {"forward": forward, "gradients": gradients, "optimizer": optimizer}


def _moved_us(moved_bytes: float, gbps: float) -> float:
    return moved_bytes / gbps / 1e3


def _pixels(layer: Layer) -> int:
    """What a forward computes: a map's lines one behind the other, two junk pixels at the end of each."""
    return layer.size_in**2 if layer.kind == "up" else (layer.size_out - 1) * layer.size_in + layer.size_out


@dataclass(frozen=True, slots=True)
class _Product:
    """Of [pixels, k] and [k, wide], cut into blocks."""

    pixels: int
    wide: int
    k: int

    def arithmetic_us(
        self,
        blocks: Iterable[tuple[tuple[int, int], float]],
        tflops: float,
        processors: int,
        splits: tuple[int, ...] = (1, 2, 3, 4, 6, 8),
    ) -> float:
        """By the best of `blocks`, each whole or split among programs of at least 512 of k."""
        ways = product(((b, share) for b, share in blocks if b[1] <= self.wide), splits)
        return min(self._us(*way, n, tflops, processors) for way, n in ways if n == 1 or self.k >= 512 * n)

    def _us(self, block: tuple[int, int], share: float, splits: int, tflops: float, processors: int) -> float:
        blocks = math.ceil(self.pixels / block[0]) * math.ceil(self.wide / block[1]) * splits
        return _waves_us(blocks, 2 * processors, 2 * block[0] * block[1] * self.k / splits, share * tflops)


def _waves_us(blocks: int, at_a_time: int, flops_of_one: float, tflops: float) -> float:
    return math.ceil(blocks / at_a_time) * at_a_time * flops_of_one / tflops / 1e6


def _maps(derivative: Derivative) -> int:
    return 2 if derivative.case.concat else 1


def _dx_us(derivative: Derivative, tflops: float, gbps: float, processors: int, itemsize: int) -> float:
    layer, maps = derivative.case.layer, _maps(derivative)
    moved_us = _moved_us(derivative.min_bytes(itemsize) / maps, gbps)
    if layer.kind == "up":
        # all four taps of a pixel are its own: one product, which nobody splits
        made = _Product(layer.size_in**2, layer.c_in, 4 * layer.c_out)
        return max(made.arithmetic_us(BLOCKS, tflops, processors, splits=(1,)), moved_us) + LAUNCH_US
    wide, margin = layer.size_out + 4, layer.c_out * (layer.size_out**2 + (layer.size_out + 4) ** 2) * itemsize
    turned = Layer("", layer.kind, layer.c_out, layer.c_in // maps, wide, layer.size_in)
    boxes = _Product(_pixels(turned), turned.c_out, 9 * turned.c_in)
    addresses = _Product(layer.size_in**2, turned.c_out, 9 * turned.c_in)
    by_boxes = max(boxes.arithmetic_us(BLOCKS, tflops, processors), moved_us) + _moved_us(margin, gbps) + LAUNCH_US
    by_address = max(addresses.arithmetic_us(BY_ADDRESS, tflops, processors), moved_us)
    return maps * (min(by_boxes, by_address) + LAUNCH_US)


def _dweight_us(derivative: Derivative, tflops: float, gbps: float, processors: int, itemsize: int) -> float:
    layer, maps = derivative.case.layer, _maps(derivative)
    kind = {"conv3x3": _dweight.CONV3X3, "up": _dweight.DECONV2X2, "head": _dweight.CONV1X1}[layer.kind]
    pixels = (layer.size_in if layer.kind == "up" else layer.size_out) ** 2
    filter_ = _Filter(layer.c_out, layer.c_in // maps, kind.taps, pixels)
    simple = layer.kind == "head" or layer.c_in < 16
    moved_us = _moved_us(derivative.min_bytes(itemsize) / maps, SHARE_OF_COPY * gbps if simple else gbps)
    dtype = torch.bfloat16 if itemsize == 2 else torch.float32
    ways = _dweight.blocks_for(dtype, "tf32", 90, kind, filter_.c_in, filter_.c_out, pixels, processors)
    return maps * min(filter_.us(blocks, moved_us, tflops, gbps, processors, itemsize) for blocks in ways)


@dataclass(frozen=True, slots=True)
class _Filter:
    """A filter's gradient: as many products of [c_out, pixels] and [pixels, c_in] as it has taps."""

    c_out: int
    c_in: int
    taps: int
    pixels: int

    def us(self, blocks: Blocks, moved_us: float, tflops: float, gbps: float, processors: int, itemsize: int) -> float:
        n, k, taps = blocks.BLOCK_N, blocks.BLOCK_K, blocks.taps
        if blocks.kernel == "direct":
            # all taps lie side by side
            programs, arithmetic = math.ceil(self.c_out / n), 1
        else:
            programs = math.ceil(self.c_out / n) * math.ceil(self.c_in / k) * self.taps // taps
            arithmetic = taps
        steps = math.ceil(math.ceil(self.pixels / blocks.BLOCK_P) / blocks.splits)
        of_one = 2 * n * k * arithmetic * steps * blocks.BLOCK_P
        at_a_time = processors * (2 if taps * n * k <= 128 * 128 else 1)
        share = 0.70 if max(n, k) >= 128 else 0.60
        arithmetic_us = _waves_us(programs * blocks.splits, at_a_time, of_one, share * tflops)
        # BM is the side that is loaded for each tap, of x
        flop_per_byte = 2 / itemsize * taps * k * n / (taps * k + n)
        operands_us = programs * blocks.splits * of_one / flop_per_byte / L2_GBPS / 1e3
        partial = 2 * 4 * blocks.splits * self.c_out * self.c_in * self.taps if blocks.splits > 1 else 0
        us = max(arithmetic_us, operands_us, moved_us) + _moved_us(partial, gbps) + LAUNCH_US
        return us + LAUNCH_US * (blocks.splits > 1)


# the tables


def _forward_lines(tflops: float, gbps: float, processors: int) -> Iterator[str]:
    yield "| layer | channels | pixels | predicted us | TFLOP/s | measured |"
    yield "|---|---|---|---|---|---|"
    total = 0.0
    for case in cases(572, PAPER_FEATURES):
        layer = case.layer
        us = predicted_us(case, tflops, gbps, processors)
        total += us
        yield f"| {layer.name} | {_size(layer)} | {us:.1f} | {layer.flops / us / 1e6:.0f} | |"
    yield f"| all | | | {total:.0f} | | |"


def _gradient_lines(tflops: float, gbps: float, processors: int) -> Iterator[str]:
    yield "| gradient | channels | pixels | floor us | predicted us | TFLOP/s | measured |"
    yield "|---|---|---|---|---|---|---|"
    sums = {of: [0.0, 0.0] for of in OF}
    for derivative in derivatives(572, PAPER_FEATURES):
        us = predicted_derivative_us(derivative, tflops, gbps, processors)
        floor_us = max(derivative.flops / tflops / 1e6, _moved_us(derivative.min_bytes(2), gbps))
        sums[derivative.of][0] += floor_us
        sums[derivative.of][1] += us
        rate = f" {derivative.flops / us / 1e6:.0f}" if derivative.flops else ""
        yield f"| {derivative.name} | {_size(derivative.case.layer)} | {floor_us:.1f} | {us:.1f} |{rate} | |"
    sums["all"] = [sum(column) for column in zip(*sums.values(), strict=True)]
    for of, (floor_us, us) in sums.items():
        yield f"| {'all' if of == 'all' else f'all {of}'} | | | {floor_us:.0f} | {us:.0f} | | |"


def _step_lines(tflops: float, gbps: float, processors: int) -> Iterator[str]:
    yield "| a training step | predicted us | measured |"
    yield "|---|---|---|"
    parts = step_us(tflops, gbps, processors)
    for name, us in (parts | {"all": sum(parts.values())}).items():
        yield f"| {name} | {us:.0f} | |"


def _size(layer: Layer) -> str:
    return f"{layer.c_in} -> {layer.c_out} | {layer.size_in} -> {layer.size_out}"


def main() -> None:
    tflops, gbps, processors = map(float, sys.argv[1:4]) if len(sys.argv) == 4 else (790.0, 4300.0, 132.0)
    tables: tuple[Callable[[float, float, int], Iterator[str]], ...] = (_forward_lines, _gradient_lines, _step_lines)
    print("\n\n".join("\n".join(lines(tflops, gbps, int(processors))) for lines in tables))


if __name__ == "__main__":
    main()
