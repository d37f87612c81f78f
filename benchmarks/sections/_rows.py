"""What the sections of the layers and of their gradients share: the gate, the ways behind an op, the promise."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

import unet_kernels
from benchmarks.cases import Call, results
from benchmarks.harness import Paired, expect_as_close, paired
from benchmarks.sections import Context, Failed

__all__ = ["Compared", "Ways", "compared", "keep_choices", "predicted", "promised", "total"]

# (op, case, way) of each call of an op that had a choice
Record = list[tuple[str, str, str]]


@dataclass(frozen=True, slots=True)
class Compared:
    """Both errors, both times, and what our call was made of."""

    errors: dict[str, float]
    found: Paired
    record: Record

    @property
    def columns(self) -> dict[str, Any]:
        """Those of a row's columns that every comparison has."""
        found = self.found
        return {
            "torch_us": found.a.median_us,
            "ours_us": found.b.median_us,
            "torch/ours": found.ratio,
            "spread": f"{found.ratio_min:.2f}..{found.ratio_max:.2f}",
            # the promise: never slower than torch. What varies around 1 is a draw
            "slower": found.ratio_max < 1.0,
            "way": ", then ".join(way for _, _, way in self.record) or "ATen",
        }


def compared(context: Context, by_torch: Call, by_us: Call, exact: Call, what: str) -> Compared:
    """torch against ours, cold, after ours was found as near to the exact result as torch's is."""
    device = context.device
    with torch.no_grad(), unet_kernels.by_device_time():
        # measures the ways that have no time yet, and what they call meanwhile is no part of the record
        by_us()
        with unet_kernels.recorded() as record:
            ours = results(by_us())
        errors = [
            expect_as_close(one, theirs, true, what)
            for one, theirs, true in zip(ours, results(by_torch()), results(_untried(exact)), strict=True)
        ]
        del ours
        found = paired(by_torch, by_us, device, cold=True, **context.effort)
    return Compared(max(errors, key=lambda both: both["error"]), found, list(record))


def _untried(exact: Call) -> Any:
    """Its result by cuDNN's first algorithm: trying them all in float64 takes longer than all that is timed."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        return exact()
    finally:
        torch.backends.cudnn.benchmark = before


@dataclass(frozen=True, slots=True)
class Ways:
    """What an op measured of the cases that a call had: `rows` of the table of ways, and the fastest of our kernels."""

    rows: list[dict[str, Any]]
    best: str | None
    best_us: float | None

    @classmethod
    def of(cls, context: Context, record: Record, op: str, flops: int, named: dict[str, Any]) -> "Ways":
        """Args: flops: of the whole call; named: the first columns of each row."""
        table = unet_kernels.choices(context.device)["rows"] if context.device.type == "cuda" else {}
        # of a layer that was taken apart the record names its parts
        cases = [case for called, case, _ in record if called == op and f"{op}: {case}" in table]
        rows: list[dict[str, Any]] = []
        best: list[tuple[str, float]] = []
        for case in cases:
            known = table[f"{op}: {case}"]
            of_case = [
                {"way": way, "us": us, "called_us": known["called_us"][way], "tflops": flops / len(cases) / us / 1e6}
                for way, us in known["device_us"].items()
            ]
            of_case += [{"way": way, "refused": why} for way, why in known["refused"].items()]
            # both maps of a concatenation may be one case
            rows += [row for row in ({**named, **each} for each in of_case) if row not in rows]
            ours = [(row["us"], row["way"]) for row in of_case if "us" in row and _is_ours(row["way"])]
            if ours:
                us, way = min(ours)
                best.append((way, us))
        # no sum where one of the parts has no kernel of ours
        whole = bool(best) and len(best) == len(cases)
        names = dict.fromkeys(way for way, _ in best)
        return cls(rows, ", then ".join(names) if whole else None, sum(us for _, us in best) if whole else None)


def _is_ours(way: str) -> bool:
    return not way.startswith(("ATen", "cuDNN", "apart"))


def predicted(context: Context, dtype: torch.dtype, model: Callable[..., float], work: Any) -> float | None:
    """Microseconds by a model of `benchmarks.predicted` with this device's own rates."""
    if context.device.type != "cuda":
        return None
    processors = torch.cuda.get_device_properties(context.device).multi_processor_count
    rates = context.roof.convolution_tflops(dtype), context.roof.copy_gbps()
    return model(work, *rates, processors, dtype.itemsize)


def total(rows: Iterable[dict[str, Any]], columns: Iterable[str]) -> dict[str, Any]:
    """The sums of some columns; none of a column that a row lacks."""
    rows = list(rows)
    values = {column: [row[column] for row in rows] for column in columns}
    return {column: None if None in of_rows else sum(of_rows) for column, of_rows in values.items()}


def promised(context: Context, result: dict[str, Any], rows: list[dict[str, Any]], what: str) -> dict[str, Any]:
    """The result, and in it the names of those rows that are slower than torch.

    Raises:
        Failed: there is one.
    """
    # a smoke run proves no speed
    counted = [] if context.smoke else rows
    slower = [f"{row[what]}, {row['dtype']}: {row['spread']}" for row in counted if row["slower"]]
    result = {"headline": result.pop("headline"), "slower than torch": slower, **result}
    if slower:
        raise Failed(f"{len(slower)} {what}s are slower than torch's: {slower[0]}", result)
    return result


def keep_choices(context: Context) -> None:
    """`tuning.json` in the report's folder: all that was measured until now."""
    if context.device.type == "cuda":
        table = json.dumps(unet_kernels.choices(context.device), indent=1)
        context.out.mkdir(parents=True, exist_ok=True)
        (context.out / "tuning.json").write_text(table + "\n")
