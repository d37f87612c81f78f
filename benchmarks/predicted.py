"""What a layer of ours should take, before anybody measured it: a model with three terms, printed as a table.

    us = max(arithmetic / (rate x share of a main loop) / share of the last wave, bytes / copy rate) + 2.5

Arithmetic counts the junk pixels at the ends of lines and the last block's padding. A main loop reaches 0.80 of a large
product's rate where it is 128 channels wide, or has the weight first; 0.62 with 64. The last wave: two blocks a
multiprocessor, and those that are left over take as long as all. 2.5 us are start and end of a launch. With one input
channel, and for 1x1, three quarters of the copy rate.

    python -m benchmarks.predicted [TFLOPS GBPS PROCESSORS]        default: an H200, 790 4300 132

A prediction is to be overturned by `benchmarks/results`.
"""

import math
import sys
from itertools import product

from benchmarks.cases import Case, cases
from benchmarks.levels import PAPER_FEATURES, Layer

__all__ = ["predicted_us"]

LAUNCH_US = 2.5
# pixels and channels of a block, and the share of a large product's rate that its main loop reaches
BLOCKS = (((128, 128), 0.80), ((256, 64), 0.80), ((128, 256), 0.80), ((64, 128), 0.74), ((128, 64), 0.62))


def predicted_us(case: Case, tflops: float, gbps: float, processors: int, itemsize: int = 2) -> float:
    """Microseconds of a layer by our kernels, bias and ReLU (window and maxima) included."""
    layer = case.layer
    moved = layer.min_bytes(itemsize)
    if case.window:
        # of the map only the window is written, and the maxima
        written = case.window**2 + (layer.size_out // 2) ** 2
        moved += layer.c_out * (written - layer.size_out**2) * itemsize
    if layer.kind == "head" or layer.c_in < 16:
        return moved / (0.75 * gbps) / 1e3 + LAUNCH_US
    arithmetic_us = min(_arithmetic_us(layer, *block, splits, tflops, processors) for block, splits in _ways(layer))
    return max(arithmetic_us, moved / gbps / 1e3) + LAUNCH_US


def _ways(layer: Layer) -> list[tuple[tuple[tuple[int, int], float], int]]:
    wide = 4 * layer.c_out if layer.kind == "up" else layer.c_out
    blocks = [block for block in BLOCKS if block[0][1] <= wide]
    return [
        (block, splits)
        for block, splits in product(blocks, (1, 2, 3, 4, 6, 8))
        if splits == 1 or _k(layer) >= 512 * splits
    ]


def _k(layer: Layer) -> int:
    return layer.c_in * (1 if layer.kind == "up" else 9)


def _arithmetic_us(
    layer: Layer, block: tuple[int, int], share: float, splits: int, tflops: float, processors: int
) -> float:
    # a map's lines one behind the other: two junk pixels end each
    pixels = layer.size_in**2 if layer.kind == "up" else (layer.size_out - 1) * layer.size_in + layer.size_out
    wide = 4 * layer.c_out if layer.kind == "up" else layer.c_out
    blocks = math.ceil(pixels / block[0]) * math.ceil(wide / block[1]) * splits
    waves = math.ceil(blocks / (2 * processors))
    of_a_block = 2 * block[0] * block[1] * _k(layer) / splits
    return waves * 2 * processors * of_a_block / (share * tflops) / 1e6


def main() -> None:
    tflops, gbps, processors = map(float, sys.argv[1:4]) if len(sys.argv) == 4 else (790.0, 4300.0, 132.0)
    print("| layer | channels | pixels | predicted us | TFLOP/s | measured |\n|---|---|---|---|---|---|")
    total = 0.0
    for case in cases(572, PAPER_FEATURES):
        layer = case.layer
        us = predicted_us(case, tflops, gbps, int(processors))
        total += us
        channels, pixels = f"{layer.c_in} -> {layer.c_out}", f"{layer.size_in} -> {layer.size_out}"
        print(f"| {layer.name} | {channels} | {pixels} | {us:.1f} | {layer.flops / us / 1e6:.0f} | |")
    print(f"| all | | | {total:.0f} | | |")


if __name__ == "__main__":
    main()
