"""How long do a forward pass and a training step of the paper's net take, and in how much memory?

FastUNet against `plain_unet.PlainUNet` with the same weights, channels_last, batch 1: eager, replayed as a CUDA graph
(of a step, forward, loss, backward and optimizer are one graph), and under torch.compile. "graph against ...": ours as
it is, plain compiled, both as CUDA graphs. Memory is what the call holds above weights and momentum; a step's gradients
count; of a graph, which holds its memory as long as it lives, it would say nothing.
Then the gradients of one step are made again and again, and must be the same bits: with what FastUNet chooses, where
cuDNN wins by its algorithms that add in a fixed order, and with our kernels only.
predict (H200, bfloat16): plain forward with a graph 1.1 to 1.4 ms, compiled 0.95 to 1.2 ms, ours 0.60 to 0.70 ms; a
step with a graph 4 to 5 ms, ours 2.6 to 2.9 (`benchmarks.predicted`).
"""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unet_kernels
from benchmarks.harness import Paired, channels_last, expect_as_close, paired, peak_bytes
from benchmarks.levels import layers
from benchmarks.plain_unet import PlainUNet
from benchmarks.sections import Context, Failed, affordable
from benchmarks.sections._rows import keep_choices
from unet_fast import FastUNet

TITLE = "The whole net: FastUNet against plain torch"
ORDER = 24
SECONDS = 150.0

# what compiling for one variant may take; it is started only if as much time is left
COMPILE_SECONDS = {"": 0.0, "compile": 60.0, "max-autotune-no-cudagraphs": 75.0}

NAMES = ("plain", "ours")
PRECISIONS = ("bfloat16", "bfloat16 autocast", "float32")
MODES = ("inference", "training")

# gradients that must be the same bits, and what is kept of the section's time for them
REPEATS, REPEATS_SECONDS = 250, 25.0

Forward = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Step = Callable[[], Any]


def run(context: Context) -> dict[str, Any]:
    # no more than its share: sections come after it
    whole = replace(context, deadline=min(context.deadline, time.monotonic() + SECONDS))
    context = whole if context.smoke else replace(whole, deadline=whole.deadline - REPEATS_SECONDS)
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
    repeats = [nets.repeated(*each, whole) for each in _repeats(context)]
    keep_choices(context)
    result = {
        "headline": _headline(rows, repeats),
        "tile_in": context.tile_in,
        "variants": f"{len(rows)} of {len(variants)}",
        "times": rows,
        "gradients made again": repeats,
        "refused": refused,
    }
    unequal = [f"{row['precision']}, {row['kernels']}: {row['differs']}" for row in repeats if row["differs"]]
    if unequal:
        raise Failed(f"gradients are not the same bits every time: {unequal[0]}", result)
    if refused:
        raise Failed(f"{len(refused)} variants could not run: {refused[0]}", result)
    return result


def _headline(rows: list[dict[str, Any]], repeats: list[dict[str, Any]]) -> str:
    said = []
    for mode in MODES:
        # 16-bit weights train badly
        useful = [row for row in rows if row["mode"] == mode and (mode, row["precision"]) != ("training", "bfloat16")]
        if best := min(useful, key=lambda row: row["ours_ms"], default=None):
            how = f"{best['precision']}, {best['how']}"
            said.append(f"{mode} at its best {best['ours_ms']:.3g} ms ({how}), plain torch {best['plain_ms']:.3g}")
    if repeats:
        unequal = sum(bool(row["differs"]) for row in repeats)
        said.append(f"gradients made again differ in {unequal} of {len(repeats)} series")
    return "; ".join(said) or "nothing could be timed"


def _variants(context: Context) -> Iterator[tuple[str, str, str]]:
    """(precision, mode, how), the dear ones last."""
    on_cuda = context.device.type == "cuda"
    against = ("graph against compile", "graph against max-autotune-no-cudagraphs")
    for how in ("graph", "eager", *against, "compile"):
        if ("graph" in how and not on_cuda) or (_compile_seconds(how) and context.smoke):
            continue
        for precision, mode in _asked(how):
            yield precision, mode, how


def _asked(how: str) -> list[tuple[str, str]]:
    """(precision, mode) of what is of interest."""
    # compiling takes long: what the goals are about
    if "max-autotune" in how:
        return [("bfloat16", "inference")]
    if "against" in how:
        return [("bfloat16", "inference"), ("bfloat16 autocast", "training"), ("bfloat16", "training")]
    every = list(product(PRECISIONS, MODES))
    # 16-bit weights train badly; as a graph their step shows what one costs in which nothing is cast
    return every if how == "graph" else [each for each in every if each != ("bfloat16", "training")]


def _repeats(context: Context) -> list[tuple[str, str]]:
    """(precision, kernels) of the gradients that are made again."""
    kernels = ("automatic", "ours") if context.device.type == "cuda" else ("automatic",)
    return list(product(PRECISIONS[1:], kernels))


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
        self.pairs: dict[str, tuple[nn.Module, nn.Module]] = dict.fromkeys(PRECISIONS, (self.plain, self.fast))
        self.pairs["bfloat16"] = copy.deepcopy(self.plain).bfloat16(), copy.deepcopy(self.fast).bfloat16()
        self.image = channels_last(torch.randn(1, 1, context.tile_in, context.tile_in, device=device))
        self.target = torch.randint(0, 2, (1, side, side), device=device)
        self.pixel_weight = 1 + torch.rand(1, side, side, device=device)
        forward = sum(layer.flops for layer in table)
        # the image needs no gradient, so the first layer has two products and not three
        self.flops = {"inference": forward, "training": 3 * forward - table[0].flops}
        self.exact = {mode: self._answer(exact, exact, "float64", mode, _plain_loss, False) for mode in self.flops}

    def row(self, precision: str, mode: str, how: str) -> dict[str, Any]:
        """Times and memory of both nets in one variant, after the gate."""
        device = self.context.device
        of_plain, of_ours = self.pairs[precision]
        plain: Forward = of_plain
        fast: Forward = of_ours
        if "against" in how:
            by = how.rpartition("against ")[2]
            plain = torch.compile(of_plain, dynamic=False, mode=None if by == "compile" else by)
        elif how == "compile":
            plain, fast = torch.compile(of_plain), torch.compile(of_ours)
        captured = "graph" in how
        errors = expect_as_close(
            self._answer(of_ours, fast, precision, mode, _our_loss, captured),
            self._answer(of_plain, plain, precision, mode, _plain_loss, captured),
            self.exact[mode],
            f"{mode}, {precision}, {how}",
        )
        if mode == "inference":
            works = self._inference(plain, precision, captured), self._inference(fast, precision, captured)
        else:
            works = (
                self._training(of_plain, plain, precision, _plain_loss, captured),
                self._training(of_ours, fast, precision, _our_loss, captured),
            )
        found: Paired = paired(*works, device, graph=captured, **self.context.effort)
        # a graph holds its memory from capture to the end: what a call adds would say nothing
        peaks = [None, None] if captured else [peak_bytes(work, device) for work in works]
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

    def repeated(self, precision: str, kernels: str, context: Context) -> dict[str, Any]:
        """The gradients of a step of ours, made again and again: which of them came out in other bits, and when."""
        before, torch.backends.cudnn.deterministic = torch.backends.cudnn.deterministic, True
        wanted = 3 if context.smoke else REPEATS
        try:
            with unet_kernels.using(kernels):
                steps, differs = self._until_unequal(self.pairs[precision][1], precision, wanted, context)
        except RuntimeError as error:
            # "ours" has no kernel for a layer, say; the times before it are worth keeping
            steps, differs = 0, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        finally:
            torch.backends.cudnn.deterministic = before
        return {"precision": precision, "kernels": kernels, "steps": f"{steps} of {wanted}", "differs": differs}

    def _until_unequal(self, net: nn.Module, precision: str, wanted: int, context: Context) -> tuple[int, str]:
        # makes the choices: what is computed while ways are measured may not be the way that wins
        self._gradients(net, net, precision, _our_loss)
        first = self._gradients(net, net, precision, _our_loss)
        for step in range(2, wanted + 1):
            if context.left_s < 1:
                return step - 1, ""
            again = self._gradients(net, net, precision, _our_loss)
            unequal = torch.stack([_other_bits(*both) for both in zip(first, again, strict=True)]).tolist()
            if any(unequal):
                names = (name for (name, _), other in zip(net.named_parameters(), unequal, strict=True) if other)
                return step, f"step {step}: {', '.join(names)}"
        return wanted, ""

    def _answer(self, net: nn.Module, called: Forward, precision: str, mode: str, loss: Loss, captured: bool) -> Tensor:
        """What the gate compares: the logits, or the gradients of all parameters as one vector."""
        if mode == "inference":
            return self._inference(called, precision, captured)()
        gradients = self._gradients(net, called, precision, loss, captured)
        return torch.cat([gradient.double().flatten() for gradient in gradients])

    @torch.enable_grad()
    def _gradients(
        self, net: nn.Module, called: Forward, precision: str, loss: Loss, captured: bool = False
    ) -> tuple[Tensor, ...]:
        with self._autocast(precision, captured):
            value = loss(called(self._image(precision)), self.target, self.pixel_weight)
        return torch.autograd.grad(value, list(net.parameters()))

    def _inference(self, called: Forward, precision: str, captured: bool) -> Step:
        @torch.no_grad()
        def forward() -> Tensor:
            with self._autocast(precision, captured):
                return called(image)

        image = self._image(precision)
        return forward

    def _training(self, net: nn.Module, called: Forward, precision: str, loss: Loss, captured: bool) -> Step:
        # a rate of 0 costs as much as any other, and leaves both nets as they are
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.99)
        image = self._image(precision)

        def step() -> None:
            with self._autocast(precision, captured):
                value = loss(called(image), self.target, self.pixel_weight)
            value.backward()
            optimizer.step()
            # after, not before: a step's peak then contains its gradients
            optimizer.zero_grad(set_to_none=True)

        return step

    def _image(self, precision: str) -> Tensor:
        if precision == "float64":
            return self.image.double().contiguous()
        return self.image.bfloat16() if precision == "bfloat16" else self.image

    def _autocast(self, precision: str, captured: bool = False) -> AbstractContextManager[Any]:
        if "autocast" not in precision:
            return nullcontext()
        # what was cast before a capture would be missing from the graph; the gate does as the timed call, because a
        # compiled net is compiled anew for another setting
        return torch.autocast(self.context.device.type, dtype=torch.bfloat16, cache_enabled=not captured)


def _other_bits(a: Tensor, b: Tensor) -> Tensor:
    """Whether any bit differs: a NaN equals itself, and -0 is not 0."""
    as_integers = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return (a.view(as_integers) != b.view(as_integers)).any()


def _plain_loss(logits: Tensor, target: Tensor, pixel_weight: Tensor) -> Tensor:
    return (F.cross_entropy(logits, target, reduction="none") * pixel_weight).mean()


def _our_loss(logits: Tensor, target: Tensor, pixel_weight: Tensor) -> Tensor:
    return unet_kernels.weighted_cross_entropy(logits, target, pixel_weight)
