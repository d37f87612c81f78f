"""The operations of a U-Net, on tensors. This page is the only door.

Each op has a specification in plain PyTorch (`unet_kernels.reference`), which is also its CPU implementation, and is
registered as `torch.ops.unet.<name>`, so that autograd, torch.compile, torch.export and DDP see one schema. Kernels
are put underneath without changing a signature; `lane` says which one an op takes on a device, and why.
"""

from ._aten import multiplies_in
from ._choosing import adopt, by_device_time, choices, chooses_derivatives, circumstances, recorded, using
from ._lanes import OPS, Explanation, explain, lane
from ._native import NativeLibraryMissing
from ._native import describe as native_libraries
from .border_weight import border_weight, cut_gap, two_nearest_cells
from .connected_components import connected_components
from .conv1x1 import conv1x1
from .conv3x3_relu import conv3x3_relu, conv3x3_relu_cat
from .conv3x3_relu_pool import conv3x3_relu_pool, one_pass_pays
from .crop_concat import crop_concat
from .elastic_warp import elastic_warp, warp_jacobian
from .homotopic_warp import ERROR_KINDS, homotopic_warp
from .max_pool2x2 import max_pool2x2, window_and_pool
from .rand_sums import rand_sums, watershed_cells
from .up_conv import up_conv
from .weighted_cross_entropy import head_cross_entropy, weighted_cross_entropy

__all__ = [
    "ERROR_KINDS",
    "OPS",
    "Explanation",
    "NativeLibraryMissing",
    "adopt",
    "border_weight",
    "by_device_time",
    "choices",
    "chooses_derivatives",
    "circumstances",
    "connected_components",
    "conv1x1",
    "conv3x3_relu",
    "conv3x3_relu_cat",
    "conv3x3_relu_pool",
    "crop_concat",
    "cut_gap",
    "elastic_warp",
    "explain",
    "head_cross_entropy",
    "homotopic_warp",
    "lane",
    "max_pool2x2",
    "multiplies_in",
    "native_libraries",
    "one_pass_pays",
    "rand_sums",
    "recorded",
    "two_nearest_cells",
    "up_conv",
    "using",
    "warp_jacobian",
    "watershed_cells",
    "weighted_cross_entropy",
    "window_and_pool",
]
