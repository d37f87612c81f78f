"""Does a training step take the memory that `unet_fast.memory` counts, also on a 6 GB card?

On a GPU the allocator is held to what such a card leaves (6e9 bytes less 0.5e9 of context), and the largest tile that
is counted to fit is tried too. predict: what is allocated within 3 % of the count; what is reserved up to 10 % more. A
CPU's operations take other paths, and a smoke run's maps are no larger than their copies: there the figures prove the
script only.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.harness import peak_bytes
from benchmarks.sections import Context, affordable
from unet_fast import FastUNet, geometry
from unet_fast.measuring import CONTEXT_BYTES, is_out_of_memory
from unet_fast.memory import estimate, largest_tile

TITLE = "Memory: counted and taken, under the memory of a 6 GB card"
ORDER = 85
SECONDS = 60.0

CARD_BYTES = 6_000_000_000
# name: dtype of the maps, whether the weights stay float32
PRECISIONS = {
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "bfloat16 autocast": (torch.bfloat16, True),
}


def run(context: Context) -> dict[str, Any]:
    cases = [
        (precision, how, tile) for precision in PRECISIONS for how in ("none", "level") for tile in _tiles(context)
    ]
    with _card(context.device):
        rows = [_row(context, *case) for case in affordable(context, cases)]
    shares = [row["allocated/counted"] for row in rows if row["fits"]] or [0.0]
    fits = sum(row["fits"] for row in rows)
    said = f"steps take {min(shares):.3f} to {max(shares):.3f} of what was counted; {fits} of {len(rows)} fit 6 GB"
    return {"headline": said, "card_bytes": CARD_BYTES, "context_bytes": CONTEXT_BYTES, "steps": rows}


def _tiles(context: Context) -> list[int | None]:
    """None: the largest that is counted to fit."""
    return [188] if context.smoke or context.device.type != "cuda" else [188, 572, 1084, None]


@contextmanager
def _card(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((CARD_BYTES - CONTEXT_BYTES) / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        torch.cuda.empty_cache()


def _row(context: Context, precision: str, recompute: str, tile_in: int | None) -> dict[str, Any]:
    dtype, autocast = PRECISIONS[precision]
    device, own = context.device, torch.float32 if autocast else dtype
    net = FastUNet(features=context.features, recompute=recompute).to(device, own)
    ways = {"dtype": dtype, "autocast": autocast}
    largest = tile_in is None
    tile = largest_tile(CARD_BYTES, net, context=CONTEXT_BYTES, **ways) if tile_in is None else tile_in
    side = geometry.output_size(tile, net.depth)
    x = torch.randn(1, 1, tile, tile, device=device).to(own)
    target = torch.zeros(1, side, side, dtype=torch.long, device=device)
    # weights move by nothing: the optimizer's bytes are what is asked for
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.99)

    def logits() -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=autocast):
            return net(x)

    def step() -> None:
        # nobody holds the logits while the backward runs
        F.cross_entropy(logits().float(), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    found = estimate(net, tile, **ways)
    row = {"tile_in": tile, "largest that is counted to fit": largest, "precision": precision, "recompute": recompute}
    row |= {"counted_bytes": found.total, "peak at": found.peak_at}
    try:
        step()
        # above weights, momentum, tile and labels, which are held before and after
        taken = peak_bytes(step, device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return row | {"fits": False, "allocated_bytes": None, "reserved_bytes": None, "allocated/counted": None}
    held = found.weights + found.optimizer + found.input
    allocated = held + taken.allocated_bytes
    return row | {
        "fits": True,
        "allocated_bytes": allocated,
        "reserved_bytes": torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None,
        "allocated/counted": allocated / found.total,
    }
