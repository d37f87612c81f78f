"""What are the two rates that nothing on this device can beat?"""

from typing import Any

import torch

from benchmarks.sections import Context, short

TITLE = "Ceilings: a large copy, a large matrix product"
ORDER = 20
SECONDS = 15.0


def run(context: Context) -> dict[str, Any]:
    copy_gbps = context.roof.copy_gbps()
    rows = [{"product in": short(d), "tflops": context.roof.matmul_tflops(d)} for d in context.dtypes]
    if context.device.type == "cuda":
        rows.append({"product in": "tf32", "tflops": context.roof.matmul_tflops(torch.float32, tf32=True)})
    products = ", ".join(f"{row['product in']} {row['tflops']:.3g}" for row in rows)
    return {
        "headline": f"copy {copy_gbps:.0f} GB/s; TFLOP/s: {products}",
        "copy_gbps": copy_gbps,
        "products": rows,
    }
