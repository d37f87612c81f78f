"""How long do a forward pass and a training step of the paper's net take, and in how much memory?

FastUNet against `plain_unet.PlainUNet` with the same weights, channels_last, batch 1: eager, replayed as a CUDA graph
(inference), and under torch.compile. "graph against ...": ours as it is, plain compiled, both as CUDA graphs. Memory
is what the call holds above weights and momentum; a step's gradients count.
predict (H200, bfloat16): plain forward with a graph 1.1 to 1.4 ms, compiled 0.95 to 1.2 ms, ours 0.60 to 0.70 ms; a
step 4 to 5 ms, ours less by what the forward saves while its backward is ATen's.
"""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unet_kernels
from benchmarks.harness import Paired, channels_last, expect_as_close, paired, peak_bytes
from benchmarks.levels import layers
from benchmarks.plain_unet import PlainUNet
from benchmarks.sections import Context, Failed, affordable
from unet_fast import FastUNet

TITLE = "The whole net: FastUNet against plain torch"
ORDER = 24
SECONDS = 150.0

# what compiling for one variant may take; it is started only if as much time is left
COMPILE_SECONDS = {"": 0.0, "compile": 60.0, "max-autotune-no-cudagraphs": 75.0}

NAMES = ("plain", "ours")
PRECISIONS = ("bfloat16", "bfloat16 autocast", "float32")

Forward = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Step = Callable[[], Any]


def run(context: Context) -> dict[str, Any]:
    # no more than its share: sections come after it
    context = replace(context, deadline=min(context.deadline, time.monotonic() + SECONDS))
    nets = _Nets(context)
    variants = list(_variants(context))
    rows, refused = [], []
    for precision, mode, how in affordable(context, variants):
        if context.left_s < _compile_seconds(how):
            continue
        try:
            rows.append(nets.row(precision, mode, how))
        except Exception as error:
            if how == "eager":
                raise
            # a compiler or a capture may refuse, and must not take with it what was measured before
            said = (str(error).splitlines() or [""])[0]
            refused.append(f"{mode}, {precision}, {how}: {type(error).__name__}: {said}")
    result = {
        "headline": _headline(rows),
        "tile_in": context.tile_in,
        "variants": f"{len(rows)} of {len(variants)}",
        "times": rows,
        "refused": refused,
    }
    if refused:
        raise Failed(f"{len(refused)} variants could not run: {refused[0]}", result)
    return result


def _headline(rows: list[dict[str, Any]]) -> str:
    said = []
    for mode in ("inference", "training"):
        best = min((row for row in rows if row["mode"] == mode), key=lambda row: row["ours_ms"], default=None)
        if best:
            how = f"{best['precision']}, {best['how']}"
            said.append(f"{mode} at its best {best['ours_ms']:.3g} ms ({how}), plain torch {best['plain_ms']:.3g}")
    return "; ".join(said) or "nothing could be timed"


def _variants(context: Context) -> Iterator[tuple[str, str, str]]:
    """(precision, mode, how), the dear ones last."""
    on_cuda = context.device.type == "cuda"
    against = ("graph against compile", "graph against max-autotune-no-cudagraphs")
    for how in ("graph", "eager", *against, "compile"):
        if ("graph" in how and not on_cuda) or (_compile_seconds(how) and context.smoke):
            continue
        # compiling takes long: what the goals are about
        for precision in PRECISIONS[:1] if "against" in how else PRECISIONS:
            for mode in ("inference", "training"):
                # 16-bit weights train badly: only a forward is of interest
                if mode == "inference" or ("graph" not in how and precision != "bfloat16"):
                    yield precision, mode, how


def _compile_seconds(how: str) -> float:
    return COMPILE_SECONDS[how.rpartition("against ")[2] if "against" in how else how if how == "compile" else ""]


class _Nets:
    """Two nets with one set of weights, an image, its labels and weights, and the answer in float64."""

    def __init__(self, context: Context) -> None:
        self.context, device = context, context.device
        self.fast = FastUNet(features=context.features).to(device)
        self.plain = PlainUNet(context.features).to(device)
        self.plain.load_state_dict(self.fast.state_dict())
        exact = PlainUNet(context.features).to(device).double()
        exact.load_state_dict(self.fast.state_dict())
        for parameter in self.plain.parameters():
            parameter.data = channels_last(parameter.data) if parameter.dim() == 4 else parameter.data
        table = layers(context.tile_in, context.features)
        side = table[-1].size_out
        # by precision: bfloat16 weights are copies of their own
        self.pairs = dict.fromkeys(PRECISIONS, (self.plain, self.fast))
        self.pairs["bfloat16"] = tuple(copy.deepcopy(net).bfloat16() for net in (self.plain, self.fast))
        self.image = channels_last(torch.randn(1, 1, context.tile_in, context.tile_in, device=device))
        self.target = torch.randint(0, 2, (1, side, side), device=device)
        self.pixel_weight = 1 + torch.rand(1, side, side, device=device)
        forward = sum(layer.flops for layer in table)
        # the image needs no gradient, so the first layer has two products and not three
        self.flops = {"inference": forward, "training": 3 * forward - table[0].flops}
        self.exact = {mode: self._answer(exact, exact, "float64", mode, _plain_loss) for mode in self.flops}

    def row(self, precision: str, mode: str, how: str) -> dict[str, Any]:
        """Times and memory of both nets in one variant, after the gate."""
        device = self.context.device
        of_plain, of_ours = self.pairs[precision]
        plain, fast = of_plain, of_ours
        if "against" in how:
            by = how.rpartition("against ")[2]
            plain = torch.compile(of_plain, dynamic=False, mode=None if by == "compile" else by)
        elif how == "compile":
            plain, fast = torch.compile(of_plain), torch.compile(of_ours)
        errors = expect_as_close(
            self._answer(of_ours, fast, precision, mode, _our_loss),
            self._answer(of_plain, plain, precision, mode, _plain_loss),
            self.exact[mode],
            f"{mode}, {precision}, {how}",
        )
        if mode == "inference":
            works = self._inference(plain, precision), self._inference(fast, precision)
        else:
            works = (
                self._training(of_plain, plain, precision, _plain_loss),
                self._training(of_ours, fast, precision, _our_loss),
            )
        found: Paired = paired(*works, device, graph="graph" in how, **self.context.effort)
        # a graph holds its memory from capture to the end: what a call adds would say nothing
        peaks = [None, None] if "graph" in how else [peak_bytes(work, device) for work in works]
        return {
            "mode": mode,
            "precision": precision,
            "how": how,
            "plain_ms": found.a.median_s * 1e3,
            "ours_ms": found.b.median_s * 1e3,
            "plain/ours": found.ratio,
            "spread": f"{found.ratio_min:.2f}..{found.ratio_max:.2f}",
            "ours_tflops": self.flops[mode] / found.b.median_s / 1e12,
            **{f"{name}_peak_bytes": peak and peak.allocated_bytes for name, peak in zip(NAMES, peaks, strict=True)},
            **{f"{name}_reserved_bytes": peak and peak.reserved_bytes for name, peak in zip(NAMES, peaks, strict=True)},
            **errors,
        }

    def _answer(self, net: nn.Module, called: Forward, precision: str, mode: str, loss: Loss) -> Tensor:
        """What the gate compares: the logits, or the gradients of all parameters as one vector."""
        image = self.image.double().contiguous() if precision == "float64" else self._image(precision)
        with torch.set_grad_enabled(mode == "training"), self._autocast(precision):
            logits = called(image)
        if mode == "inference":
            return logits
        with self._autocast(precision):
            value = loss(logits, self.target, self.pixel_weight)
        gradients = torch.autograd.grad(value, list(net.parameters()))
        return torch.cat([gradient.double().flatten() for gradient in gradients])

    def _inference(self, called: Forward, precision: str) -> Step:
        @torch.no_grad()
        def forward() -> Tensor:
            with self._autocast(precision):
                return called(image)

        image = self._image(precision)
        return forward

    def _training(self, net: nn.Module, called: Forward, precision: str, loss: Loss) -> Step:
        # a rate of 0 costs as much as any other, and leaves both nets as they are
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.99)

        def step() -> None:
            with self._autocast(precision):
                value = loss(called(self.image), self.target, self.pixel_weight)
            value.backward()
            optimizer.step()
            # after, not before: a step's peak then contains its gradients
            optimizer.zero_grad(set_to_none=True)

        return step

    def _image(self, precision: str) -> Tensor:
        return self.image.bfloat16() if precision == "bfloat16" else self.image

    def _autocast(self, precision: str) -> AbstractContextManager[Any]:
        if "autocast" not in precision:
            return nullcontext()
        return torch.autocast(self.context.device.type, dtype=torch.bfloat16)


def _plain_loss(logits: Tensor, target: Tensor, pixel_weight: Tensor) -> Tensor:
    return (F.cross_entropy(logits, target, reduction="none") * pixel_weight).mean()


def _our_loss(logits: Tensor, target: Tensor, pixel_weight: Tensor) -> Tensor:
    return unet_kernels.weighted_cross_entropy(logits, target, pixel_weight)
