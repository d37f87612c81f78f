"""How far is each gradient of the net from its floor, by ATen and by every kernel of ours?

channels_last, as the net's backward asks: dx with the mask of the ReLU that made x, dweight with the bias's gradient,
and of a contracting level's last map the gradient that its window and its maxima hand back. "torch" is what autograd
computes in plain PyTorch, at its best: cuDNN's gradient, the mask as a pass of its own, of a concatenation both maps
at once. "ours" is what our op takes after it has measured all the ways there are; "best kernel" the fastest of our
kernels, "predicted" what it should take (`benchmarks.predicted`, by this device's own rates). Times are the device's
own, paired and cold. The floor is the longer of arithmetic at the measured matrix rate and the fewest bytes at the
measured copy rate.
"""

import itertools
import time
from dataclasses import replace
from typing import Any

import torch

from benchmarks.derivatives import OF, Derivative, derivatives, derived, given
from benchmarks.predicted import predicted_derivative_us
from benchmarks.sections import Context, affordable, short
from benchmarks.sections._rows import Ways, compared, keep_choices, predicted, promised, total

TITLE = "The gradients of every layer, by every way there is"
ORDER = 25
SECONDS = 150.0


def run(context: Context) -> dict[str, Any]:
    # no more than its share: the whole net comes after it
    context = replace(context, deadline=min(context.deadline, time.monotonic() + SECONDS))
    # float16 last: its kernels are bfloat16's
    dtypes = sorted(context.dtypes, key=lambda dtype: dtype == torch.float16)
    wanted = list(itertools.product(dtypes, derivatives(context.tile_in, context.features)))
    rows: list[dict[str, Any]] = []
    tried: list[dict[str, Any]] = []
    for dtype, derivative in affordable(context, wanted):
        rows.append(_row(context, dtype, derivative, tried))
    totals = [t for dtype in dtypes for of in (*OF, "all") if (t := _total(rows, short(dtype), of))["gradients"]]
    said = "; ".join(
        f"{t['dtype']}: ours {t['ours_us']:.0f} us, torch {t['torch_us']:.0f}, floor {t['floor_us']:.0f}"
        for t in totals
        if t["of"] == "all"
    )
    keep_choices(context)
    result = {
        "headline": said or "nothing could be timed",
        "cases": f"{len(rows)} of {len(wanted)}",
        "totals": totals,
        "gradients": rows,
        "ways": tried,
    }
    return promised(context, result, rows, "gradient")


def _total(rows: list[dict[str, Any]], dtype: str, of: str) -> dict[str, Any]:
    of_dtype = [row for row in rows if row["dtype"] == dtype]
    counted = [row for row in of_dtype if of == "all" or row["gradient"].startswith(f"{of} of ")]
    columns = ("floor_us", "predicted_us", "torch_us", "ours_us", "best kernel_us")
    return {"dtype": dtype, "of": of, "gradients": len(counted), **total(counted, columns)}


def _row(context: Context, dtype: torch.dtype, derivative: Derivative, tried: list[dict[str, Any]]) -> dict[str, Any]:
    tensors = given(derivative, dtype, context.device)
    by_torch, by_us = derived(derivative, tensors)

    def exact() -> Any:
        # made where it is needed, so that nobody holds it while others are timed
        return derived(derivative, [t.double() for t in tensors])[0]()

    both = compared(context, by_torch, by_us, exact, f"{derivative.name} {dtype}")
    flops, ours = derivative.flops, both.found.b
    floor_us = context.roof.floor_s(flops, derivative.min_bytes(dtype.itemsize), dtype) * 1e6
    named = {"gradient": derivative.name, "dtype": short(dtype)}
    ways = Ways.of(context, both.record, derivative.op, flops, named)
    tried += ways.rows
    return {
        **named,
        "gflop": flops / 1e9 if flops else None,
        "floor_us": floor_us,
        "predicted_us": predicted(context, dtype, predicted_derivative_us, derivative),
        **both.columns,
        "best kernel": ways.best,
        "best kernel_us": ways.best_us,
        "ours_tflops": flops / ours.median_s / 1e12 if flops else None,
        "floor/ours": floor_us / ours.median_us,
        **both.errors,
        "masked": None if derivative.of == "dweight" else derivative.masked,
        "how": ours.how,
    }
