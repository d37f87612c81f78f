"""Connected components of masks: instances where only cell and background are labelled.

mask [N, H, W] -> ids int32 [N, H, W]; in each slice 1, 2 .. in the order of the components' first pixels (rows first),
0 = background, -1 = ignore. No gradient. docs/mathematics.md, section 7.
"""

import torch
from torch import Tensor

from . import _checks, _native, reference

__all__ = ["connected_components"]


def launch_cpu(mask: Tensor, connectivity: int) -> Tensor:
    """The C++ kernel: mask [N, H, W] uint8 of 0 and 1, contiguous, on a CPU."""
    ids = torch.empty(mask.shape, dtype=torch.int32, device="cpu")
    _native.native().unet_connected_components_cpu(mask.data_ptr(), *mask.shape, connectivity, ids.data_ptr())
    return ids


def launch_cuda(mask: Tensor, connectivity: int) -> Tensor:
    """The CUDA kernel: mask [N, H, W] uint8 of 0 and 1, contiguous, on a GPU."""
    roots = torch.empty(mask.shape, dtype=torch.int32, device=mask.device)
    with torch.cuda.device(mask.device):
        stream = torch.cuda.current_stream().cuda_stream
        status = _native.cuda().unet_connected_components_cuda(
            mask.data_ptr(), *mask.shape, connectivity, roots.data_ptr(), stream
        )
    if status:
        raise RuntimeError(f"connected_components: {_native.cuda().unet_cuda_error_text(status).decode()}")
    return reference.number_roots(roots)


@torch.library.custom_op("unet::connected_components", mutates_args=())
def _op(mask: Tensor, connectivity: int) -> Tensor:
    ours = not _native.why_not(mask.device)
    if mask.is_cuda:
        ours = not _native.why_not_cuda(mask.device)
    inside = _checks.above_zero(mask)
    if not ours or mask.numel() == 0:
        ids = reference.connected_components(inside, connectivity)
    else:
        launch = launch_cuda if mask.is_cuda else launch_cpu
        ids = launch(inside.to(torch.uint8).contiguous(), connectivity)
    return torch.where(mask < 0, -1, ids).contiguous() if mask.dtype.is_signed else ids.contiguous()


@_op.register_fake
def _(mask: Tensor, connectivity: int) -> Tensor:
    return torch.empty(mask.shape, dtype=torch.int32, device=mask.device)


def connected_components(mask: Tensor, *, connectivity: int = 4) -> Tensor:
    """Connected components of each slice of a mask.

    Args:
        mask: [N, H, W], boolean or integer: above 0 is inside, negative is ignored; a slice has less than 2^31 pixels.
        connectivity: 4 (pixels that share an edge) or 8 (corners too).

    Returns:
        int32 [N, H, W]: ids 1, 2 .. in the order of first pixels, beginning again in every slice; 0 = background;
        -1 where mask is negative.

    Raises:
        TypeError: mask is neither boolean nor integer.
        ValueError: mask is not 3-D or has slices that are too large, or connectivity is neither 4 nor 8.

    >>> connected_components(torch.tensor([[[1, 0], [0, 1]]])).tolist()
    [[[1, 0], [0, 2]]]
    >>> connected_components(torch.tensor([[[1, 0], [0, 1]]]), connectivity=8).tolist()
    [[[1, 0], [0, 1]]]
    """
    _checks.expect_mask("mask", mask)
    _checks.expect_choice("connectivity", connectivity, (4, 8))
    return _op(mask, connectivity)
