"""The operations of a U-Net, on tensors. This page is the only door.

Each op has a specification in plain PyTorch (`unet_kernels.reference`), which is also its CPU implementation, and is
registered as `torch.ops.unet.<name>`, so that autograd, torch.compile, torch.export and DDP see one schema. Kernels
are put underneath without changing a signature; `lane` says which one an op takes on a device, and why.
"""

from ._lanes import OPS, lane
from ._native import NativeLibraryMissing
from ._native import describe as native_libraries
from .border_weight import border_weight, cut_gap, two_nearest_cells
from .connected_components import connected_components
from .conv3x3_relu import conv3x3_relu, conv3x3_relu_cat
from .crop_concat import crop_concat
from .elastic_warp import elastic_warp, warp_jacobian
from .homotopic_warp import ERROR_KINDS, homotopic_warp
from .max_pool2x2 import max_pool2x2
from .rand_sums import rand_sums, watershed_cells
from .up_conv import up_conv
from .weighted_cross_entropy import head_cross_entropy, weighted_cross_entropy

__all__ = [
    "ERROR_KINDS",
    "OPS",
    "NativeLibraryMissing",
    "border_weight",
    "connected_components",
    "conv3x3_relu",
    "conv3x3_relu_cat",
    "crop_concat",
    "cut_gap",
    "elastic_warp",
    "head_cross_entropy",
    "homotopic_warp",
    "lane",
    "max_pool2x2",
    "native_libraries",
    "rand_sums",
    "two_nearest_cells",
    "up_conv",
    "warp_jacobian",
    "watershed_cells",
    "weighted_cross_entropy",
]
