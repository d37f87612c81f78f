"""One small call of every op, for what is asked of all of them alike."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import unet_kernels as uk

__all__ = ["CASES", "Case"]


@dataclass(frozen=True)
class Case:
    """A public function, a way to make its tensors, and what else it is called with."""

    op: str
    call: Callable[..., Any]
    make: Callable[[torch.dtype], dict[str, Tensor]]
    settings: dict[str, Any]
    differentiable: tuple[str, ...] = ()

    def tensors(self, dtype: torch.dtype = torch.float32, grad: bool = False) -> dict[str, Tensor]:
        made = self.make(dtype)
        return {n: t.requires_grad_(True) if grad and n in self.differentiable else t for n, t in made.items()}

    def __call__(self, tensors: dict[str, Tensor]) -> Any:
        return self.call(**tensors, **self.settings)


def _conv(dtype: torch.dtype) -> dict[str, Tensor]:
    x, weight, bias = torch.randn(2, 3, 7, 6), torch.randn(4, 3, 3, 3), torch.randn(4)
    return {
        "x": x.to(dtype, memory_format=torch.channels_last),
        "weight": weight.to(dtype, memory_format=torch.channels_last),
        "bias": bias.to(dtype),
    }


def _cat(dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "up": torch.randn(2, 2, 5, 4).to(dtype),
        "skip": torch.randn(2, 3, 8, 9).to(dtype),
        "weight": torch.randn(4, 5, 3, 3).to(dtype),
        "bias": torch.randn(4).to(dtype),
    }


def _up(dtype: torch.dtype) -> dict[str, Tensor]:
    x, weight = torch.randn(2, 3, 4, 5), torch.randn(3, 3, 2, 2)
    return {"x": x.to(dtype), "weight": weight.to(dtype), "bias": torch.randn(3).to(dtype)}


def _loss(dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "logits": torch.randn(2, 3, 4, 5).to(dtype),
        "target": torch.tensor([0, 1, 2, -100]).repeat(10).view(2, 4, 5),
        "pixel_weight": torch.rand(2, 4, 5),
        "weight": torch.tensor([0.5, 1.0, 2.0]),
    }


def _head(dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "x": torch.randn(2, 5, 4, 5).to(dtype),
        "weight": torch.randn(3, 5, 1, 1).to(dtype),
        "bias": torch.randn(3).to(dtype),
        "target": torch.tensor([0, 1, 2, -100]).repeat(10).view(2, 4, 5),
        "pixel_weight": torch.rand(2, 4, 5),
        "class_weight": torch.tensor([0.5, 1.0, 2.0]),
    }


def _instances(dtype: torch.dtype) -> dict[str, Tensor]:
    return {"instances": torch.randint(-1, 4, (2, 7, 6), dtype=torch.int32)}


def _mask(dtype: torch.dtype) -> dict[str, Tensor]:
    return {"mask": torch.randint(-1, 2, (2, 7, 6), dtype=torch.int32)}


def _warp(dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "image": torch.rand(2, 3, 7, 6).to(dtype),
        # kept off whole pixels, where linear interpolation has no derivative
        "displacement": (torch.rand(2, 2, 3, 3) * 0.3 + 0.2).to(dtype),
        "labels": torch.randint(0, 5, (2, 7, 6), dtype=torch.int32),
        "matrix": torch.tensor([[0.97, 0.05, 0.1], [-0.04, 1.02, 0.2]]).expand(2, 2, 3).clone().to(dtype),
    }


def _case(op: str, make: Any, differentiable: tuple[str, ...], **settings: Any) -> Case:
    return Case(op, getattr(uk, op), make, settings, differentiable)


def _conv1x1(dtype: torch.dtype) -> dict[str, Tensor]:
    return _conv(dtype) | {"weight": torch.randn(4, 3, 1, 1).to(dtype)}


_XWB = ("x", "weight", "bias")
CASES: dict[str, Case] = {
    "conv3x3_relu": _case("conv3x3_relu", _conv, _XWB),
    "conv3x3_relu without relu": _case("conv3x3_relu", _conv, _XWB, relu=False),
    "conv3x3_relu_cat": _case("conv3x3_relu_cat", _cat, ("up", "skip", "weight", "bias")),
    "conv1x1": _case("conv1x1", _conv1x1, _XWB),
    "up_conv deconv": _case("up_conv", _up, _XWB, mode="deconv"),
    "up_conv resize": _case("up_conv", _up, _XWB, mode="resize"),
    "max_pool2x2": _case("max_pool2x2", lambda d: {"x": _conv(d)["x"]}, ("x",)),
    "crop_concat": _case(
        "crop_concat", lambda d: {k: v for k, v in _cat(d).items() if k in ("up", "skip")}, ("up", "skip")
    ),
    "weighted_cross_entropy": _case("weighted_cross_entropy", _loss, ("logits",)),
    "weighted_cross_entropy none": _case("weighted_cross_entropy", _loss, ("logits",), reduction="none"),
    "head_cross_entropy": _case("head_cross_entropy", _head, _XWB, reduction="weighted_mean"),
    "two_nearest_cells": _case("two_nearest_cells", _instances, ()),
    "cut_gap": _case("cut_gap", _instances, ()),
    "border_weight": _case("border_weight", _instances, (), class_weight=(0.5, 2.0)),
    "connected_components": _case("connected_components", _mask, ()),
    "connected_components of corners": _case(
        "connected_components", lambda d: {"mask": _mask(d)["mask"] > 0}, (), connectivity=8
    ),
    "elastic_warp": _case("elastic_warp", _warp, ("image", "displacement", "matrix")),
    "elastic_warp order 3": _case("elastic_warp", _warp, ("image", "displacement", "matrix"), order=3, out_size=(5, 9)),
}
