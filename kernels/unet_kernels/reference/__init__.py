"""Every op in plain PyTorch: the specification, and the CPU implementation.

Written to be read beside docs/mathematics.md, differentiable by autograd wherever a derivative exists, right for any
floating dtype (float64 included), any strides and any device. No function here checks its arguments: the public doors
do. Symbols: N batch, C channels, K classes, H rows, W columns; rows always come first.
"""

from .border import border_limit, border_sum, border_weight, cut_gap, two_nearest_cells
from .components import connected_components, number_roots
from .convolution import (
    conv1x1,
    conv3x3_relu,
    conv3x3_relu_cat,
    conv3x3_relu_pool,
    crop_concat,
    crop_to,
    max_pool2x2,
    uncrop,
    up_conv,
)
from .loss import (
    at_least_float32,
    chosen,
    denominator,
    head_cross_entropy,
    over,
    pixel_factors,
    weighted_cross_entropy,
)
from .warp import (
    displaced,
    elastic_warp,
    elastic_warp_gradients,
    grid_gradient,
    highest_grey,
    jacobian,
    points_per_pixel,
    transformed,
)

__all__ = [
    "at_least_float32",
    "border_limit",
    "border_sum",
    "border_weight",
    "chosen",
    "connected_components",
    "conv1x1",
    "conv3x3_relu",
    "conv3x3_relu_cat",
    "conv3x3_relu_pool",
    "crop_concat",
    "crop_to",
    "cut_gap",
    "denominator",
    "displaced",
    "elastic_warp",
    "elastic_warp_gradients",
    "grid_gradient",
    "head_cross_entropy",
    "highest_grey",
    "jacobian",
    "max_pool2x2",
    "number_roots",
    "over",
    "pixel_factors",
    "points_per_pixel",
    "transformed",
    "two_nearest_cells",
    "uncrop",
    "up_conv",
    "weighted_cross_entropy",
]
