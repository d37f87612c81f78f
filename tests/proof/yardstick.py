"""How near is near enough, without a guessed epsilon."""

import torch
from torch import Tensor

__all__ = ["assert_as_close_as", "assert_gradient", "assert_same_bits"]


def assert_as_close_as(torchs: Tensor, ours: Tensor, exact: Tensor) -> None:
    """|ours - exact| <= 2 |torchs - exact| + one unit in the last place, judged by the worst value.

    Args:
        torchs: torch's result in the dtype under test.
        ours: the kernel's, same shape and dtype.
        exact: the same computed in float64.

    NaN and infinities must sit where torch has them.
    """
    assert ours.shape == torchs.shape == exact.shape, f"shapes {ours.shape}, {torchs.shape}, {exact.shape}"
    assert ours.dtype == torchs.dtype, f"dtype {ours.dtype}, torch gives {torchs.dtype}"
    assert torch.equal(ours.isnan(), torchs.isnan()), (
        f"{int((ours.isnan() != torchs.isnan()).sum())} values are NaN in one and not in the other"
    )
    infinite = torchs.isinf()
    assert torch.equal(ours[infinite], torchs[infinite]), "infinities differ from torch's"
    finite = torchs.isfinite() & exact.isfinite()
    assert torch.equal(ours.isfinite() & exact.isfinite(), finite), "finite values differ from torch's"
    if not finite.any():
        return
    unit = torch.finfo(ours.dtype).eps
    ours, torchs, exact = (t[finite].double() for t in (ours, torchs, exact))
    honest = (torchs - exact).abs().max()
    budget = 2 * honest + unit * exact.abs().max()
    error = (ours - exact).abs().max()
    assert error <= budget, f"error {error:.3e}, torch's own is {honest:.3e}, budget {budget:.3e}"


def assert_gradient(torchs: Tensor, ours: Tensor, exact: Tensor) -> None:
    """`assert_as_close_as`, and the gradient as one vector: length of the error, direction, and bias with its sign.

    A per-value bound passes an error that points the same way everywhere; an optimizer does not.
    """
    assert_as_close_as(torchs, ours, exact)
    if not exact.isfinite().all() or exact.norm() == 0:
        return
    eps = torch.finfo(ours.dtype).eps
    ours, torchs, exact = ours.double().flatten(), torchs.double().flatten(), exact.double().flatten()

    def relative(t: Tensor) -> float:
        return float((t - exact).norm() / exact.norm())

    def bias(t: Tensor) -> float:
        return float((t - exact).mean().abs() / exact.abs().mean())

    assert relative(ours) <= 2 * relative(torchs) + eps, (
        f"relative L2 {relative(ours):.3e}, torch {relative(torchs):.3e}"
    )
    cosine = float(ours @ exact / (ours.norm() * exact.norm()))
    assert cosine >= 1 - max(2 * relative(torchs) ** 2, eps), f"cosine {cosine}"
    assert bias(ours) <= 2 * bias(torchs) + eps, f"signed bias {bias(ours):.3e}, torch {bias(torchs):.3e}"


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    """Equal as bytes: NaN equals the same NaN, and -0 is not 0."""
    assert a.shape == b.shape, f"shapes {a.shape}, {b.shape}"
    assert a.dtype == b.dtype, f"dtypes {a.dtype}, {b.dtype}"
    # a copy, because a single value may come with any stride
    a, b = (t.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8) for t in (a, b))
    assert torch.equal(a, b), f"{int((a != b).sum())} bytes of {a.numel()} differ"
