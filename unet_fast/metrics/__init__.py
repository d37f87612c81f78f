"""How good a segmentation is: of pixels, of objects, and of cells that touch.

    warping_error       (splits + mergers) / pixels, least of ten thresholds    0 is perfect   ISBI 2012 (EM challenge)
    rand_error          1 - max foreground-restricted Rand F-score              0 is perfect   ISBI 2012
    pixel_error         1 - max F1 over eleven thresholds                       0 is perfect   ISBI 2012
    v_rand, v_info      max Rand and information F-scores, borders thinned      1 is perfect   ISBI 2012, since 2014
    iou, dice           overlap of foregrounds                                  1 is perfect   Jaccard 1912; Dice 1945
    seg                 mean Jaccard index of true objects                      1 is perfect   Cell Tracking Challenge
    instance_scores     mean IoU, average precision, and what became of touching cells
    adapted_rand_error  1 - Rand F-score in scikit-image's sense                0 is perfect   SNEMI3D

Every function takes (prediction, truth), both [H, W] or both [D, H, W]; a stack is D slices (frames) that share counts
and no objects. truth > 0 (255 too) is cell, 0 background; pixels of negative truth are ignored: in both images they
count as nothing at all. Polarity: a prediction is the probability of *cell*, in [0, 1], or a mask of it; where
instances are compared it holds ids, 0 = background. Values are counted in whole numbers and divided last. With
`parts=True` a function returns what its number is made of, ready for JSON.
"""

from .areas import dice, iou
from .challenge import (
    error_places,
    pixel_error,
    rand_error,
    v_info,
    v_rand,
    warping_error,
    warping_map,
)
from .counts import ChallengeCounts
from .instances import InstanceScores, adapted_rand_error, components, instance_scores, seg

__all__ = [
    "ChallengeCounts",
    "InstanceScores",
    "adapted_rand_error",
    "components",
    "dice",
    "error_places",
    "instance_scores",
    "iou",
    "pixel_error",
    "rand_error",
    "seg",
    "v_info",
    "v_rand",
    "warping_error",
    "warping_map",
]
