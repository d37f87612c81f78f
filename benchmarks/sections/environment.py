"""What is this machine, and which implementation does each op take on it?"""

from typing import Any

import torch

import unet_kernels
from benchmarks.machine import machine
from benchmarks.sections import Context, short

TITLE = "The machine, and the lane of every op"
ORDER = 0
SECONDS = 5.0


def run(context: Context) -> dict[str, Any]:
    rows = [_row(op, context) for op in unet_kernels.OPS]
    ours = sum(bool({"triton", "native"} & set(row.values())) for row in rows)
    return {
        "headline": f"{ours} of {len(rows)} ops run a kernel of ours",
        **machine(),
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "convolutions may use tf32": torch.backends.cudnn.allow_tf32,
        "lanes": rows,
    }


def _row(op: str, context: Context) -> dict[str, Any]:
    """The op's lane by dtype, and the reasons given."""
    lanes = {short(dtype): unet_kernels.lane(op, context.device, dtype) for dtype in context.dtypes}
    reasons = dict.fromkeys(reason for _, reason in lanes.values())
    return {"op": op, **{name: kind for name, (kind, _) in lanes.items()}, "because": "; ".join(reasons)}
