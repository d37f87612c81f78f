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
import json
from typing import Any

import torch

import unet_kernels
from benchmarks.cases import Case, calls, cases, inputs, results
from benchmarks.harness import expect_as_close, measure, paired
from benchmarks.predicted import predicted_us
from benchmarks.sections import Context, Failed, affordable, short

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
    if context.device.type == "cuda":
        table = json.dumps(unet_kernels.choices(context.device), indent=1)
        context.out.mkdir(parents=True, exist_ok=True)
        (context.out / "tuning.json").write_text(table + "\n")
    # the promise: never slower than torch. What varies around 1 is a draw
    slower = [f"{row['layer']}, {row['dtype']}: {row['spread']}" for row in rows if row["slower"]]
    result = {
        "headline": said,
        "cases": f"{len(rows)} of {len(wanted)}",
        "slower than torch": slower,
        "totals": totals,
        "layers": rows,
        "ways": tried,
    }
    if slower and not context.smoke:
        raise Failed(f"{len(slower)} layers are slower than torch's: {slower[0]}", result)
    return result


def _total(rows: list[dict[str, Any]], dtype: str) -> dict[str, Any]:
    of_dtype = [row for row in rows if row["dtype"] == dtype]
    columns = ("floor_us", "conv_us", "torch_us", "ours_us")
    return {"dtype": dtype, "layers": len(of_dtype), **{c: sum(row[c] for row in of_dtype) for c in columns}}


def _row(context: Context, dtype: torch.dtype, case: Case, tried: list[dict[str, Any]]) -> dict[str, Any]:
    device, layer = context.device, case.layer
    maps, weight, bias = inputs(case, dtype, device)
    bare, by_torch, by_us = calls(case, maps, weight, bias)
    exact = calls(case, [m.double() for m in maps], weight.double(), bias.double())[1]()
    with torch.no_grad(), unet_kernels.by_device_time(), unet_kernels.recorded() as record:
        errors = [
            expect_as_close(ours, theirs, true, f"{layer.name} {dtype}")
            for ours, theirs, true in zip(results(by_us()), results(by_torch()), results(exact), strict=True)
        ]
        del exact
        conv = measure(bare, device, cold=True, **context.effort)
        compiled_us = None
        if device.type == "cuda" and dtype == torch.bfloat16:
            compiled = torch.compile(by_torch, dynamic=False)
            compiled_us = measure(compiled, device, cold=True, **context.effort).median_us
        found = paired(by_torch, by_us, device, cold=True, **context.effort)
    floor_us = context.roof.floor_s(layer.flops, layer.min_bytes(dtype.itemsize), dtype) * 1e6
    ways = _ways(case, record, context)
    tried += [
        {"layer": layer.name, "dtype": short(dtype), "way": name, **times, "tflops": layer.flops / times["us"] / 1e6}
        for name, times in ways["us"].items()
    ]
    tried += [
        {"layer": layer.name, "dtype": short(dtype), "way": name, "refused": why}
        for name, why in ways["refused"].items()
    ]
    return {
        "layer": layer.name,
        "op": case.op,
        "dtype": short(dtype),
        "gflop": layer.flops / 1e9,
        "floor_us": floor_us,
        "predicted_us": _predicted_us(context, dtype, case),
        "conv_us": conv.median_us,
        "torch_us": found.a.median_us,
        "compiled_us": compiled_us,
        "ours_us": found.b.median_us,
        "torch/ours": found.ratio,
        "spread": f"{found.ratio_min:.2f}..{found.ratio_max:.2f}",
        "slower": found.ratio_max < 1.0,
        "way": ", then ".join(way for op, _, way in record[: 1 if case.op != "conv3x3_relu_pool" else 2]) or "ATen",
        "best kernel": ways["best"],
        "best kernel_us": ways["best_us"],
        "ours_tflops": layer.flops / found.b.median_s / 1e12,
        "floor/conv": floor_us / conv.median_us,
        "floor/ours": floor_us / found.b.median_us,
        **errors[0],
        "how": found.b.how,
    }


def _predicted_us(context: Context, dtype: torch.dtype, case: Case) -> float | None:
    if context.device.type != "cuda":
        return None
    processors = torch.cuda.get_device_properties(context.device).multi_processor_count
    rates = context.roof.convolution_tflops(dtype), context.roof.copy_gbps()
    return predicted_us(case, *rates, processors, dtype.itemsize)


def _ways(case: Case, record: list[tuple[str, str, str]], context: Context) -> dict[str, Any]:
    """What the op measured of this shape: microseconds by way, the fastest of our kernels, who was refused."""
    rows = unet_kernels.choices(context.device)["rows"] if context.device.type == "cuda" else {}
    known = next((rows[f"{op}: {what}"] for op, what, _ in record if op == case.op and f"{op}: {what}" in rows), None)
    if known is None:
        # of a layer that was taken apart the record names its parts
        return {"us": {}, "best": None, "best_us": None, "refused": {}}
    device_us, called_us = known["device_us"], known["called_us"]
    ours = {name: us for name, us in device_us.items() if not name.startswith(("ATen", "cuDNN", "apart"))}
    best = min(ours, key=lambda name: ours[name], default=None)
    us = {name: {"us": device_us[name], "called_us": called_us[name]} for name in device_us}
    return {"us": us, "best": best, "best_us": best and ours[best], "refused": known["refused"]}
