"""How far is each layer of the net from its floor, by every way there is: ATen's, compiled, and ours?

Forward, channels_last, as the net calls it: the expanding path's first convolutions read up and a window of the skip,
the contracting path's second ones hand on a window and the maxima. "torch" is the layer in plain PyTorch; "ours" is the
way that our op takes after it has measured all there are; "best kernel" the fastest of our kernels, "predicted" what
it should take (`benchmarks.predicted`, by this device's own rates). Times are the
device's own, the paired ones cold. The floor is the longer of arithmetic at the measured matrix rate and the fewest
bytes at the measured copy rate.

`tuning.json` in the report's folder is the table that all this fills: put into `kernels/unet_kernels/tuned/` it comes
with the package, and nobody measures on such a device again.
"""

import itertools
from typing import Any

import torch

import unet_kernels
from benchmarks.cases import Case, calls, cases, inputs
from benchmarks.harness import measure
from benchmarks.predicted import predicted_us
from benchmarks.sections import Context, affordable, short
from benchmarks.sections._rows import Ways, compared, keep_choices, predicted, promised, total

TITLE = "Every layer of the net, by every way there is, against its floor"
ORDER = 22
SECONDS = 150.0


def run(context: Context) -> dict[str, Any]:
    every = [case for case in cases(context.tile_in, context.features) if case.layer.kind != "head"]
    wanted = list(itertools.product(context.dtypes, every))
    rows: list[dict[str, Any]] = []
    tried: list[dict[str, Any]] = []
    for dtype, case in affordable(context, wanted):
        rows.append(_row(context, dtype, case, tried))
    totals = [_total(rows, short(dtype)) for dtype in context.dtypes]
    said = "; ".join(
        f"{t['dtype']}: ours {t['ours_us']:.0f} us, torch {t['torch_us']:.0f}, bare convolutions {t['conv_us']:.0f}, "
        f"floor {t['floor_us']:.0f}"
        for t in totals
    )
    keep_choices(context)
    result = {
        "headline": said,
        "cases": f"{len(rows)} of {len(wanted)}",
        "totals": totals,
        "layers": rows,
        "ways": tried,
    }
    return promised(context, result, rows, "layer")


def _total(rows: list[dict[str, Any]], dtype: str) -> dict[str, Any]:
    of_dtype = [row for row in rows if row["dtype"] == dtype]
    columns = ("floor_us", "conv_us", "torch_us", "ours_us")
    return {"dtype": dtype, "layers": len(of_dtype), **total(of_dtype, columns)}


def _row(context: Context, dtype: torch.dtype, case: Case, tried: list[dict[str, Any]]) -> dict[str, Any]:
    device, layer = context.device, case.layer
    maps, weight, bias = inputs(case, dtype, device)
    bare, by_torch, by_us = calls(case, maps, weight, bias)

    def exact() -> Any:
        # made where it is needed, so that nobody holds it while others are timed
        return calls(case, [m.double() for m in maps], weight.double(), bias.double())[1]()

    both = compared(context, by_torch, by_us, exact, f"{layer.name} {dtype}")
    with torch.no_grad(), unet_kernels.by_device_time():
        conv = measure(bare, device, cold=True, **context.effort)
        compiled_us = None
        if device.type == "cuda" and dtype == torch.bfloat16:
            compiled = torch.compile(by_torch, dynamic=False)
            compiled_us = measure(compiled, device, cold=True, **context.effort).median_us
    floor_us = context.roof.floor_s(layer.flops, layer.min_bytes(dtype.itemsize), dtype) * 1e6
    named = {"layer": layer.name, "dtype": short(dtype)}
    ways = Ways.of(context, both.record, case.op, layer.flops, named)
    tried += ways.rows
    ours = both.found.b
    return {
        "layer": layer.name,
        "op": case.op,
        "dtype": short(dtype),
        "gflop": layer.flops / 1e9,
        "floor_us": floor_us,
        "predicted_us": predicted(context, dtype, predicted_us, case),
        "conv_us": conv.median_us,
        "compiled_us": compiled_us,
        **both.columns,
        "best kernel": ways.best,
        "best kernel_us": ways.best_us,
        "ours_tflops": layer.flops / ours.median_s / 1e12,
        "floor/conv": floor_us / conv.median_us,
        "floor/ours": floor_us / ours.median_us,
        **both.errors,
        "how": ours.how,
    }
