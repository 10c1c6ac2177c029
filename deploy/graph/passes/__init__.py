"""One rewrite a file; ``PASSES`` lists them all. ``deploy.graph.pipeline`` says which run for a target, and why."""

from __future__ import annotations

from deploy.graph.base import GraphPass
from deploy.graph.passes.constant_axes import CONSTANT_AXES
from deploy.graph.passes.fold_constants import FOLD_CONSTANTS
from deploy.graph.passes.fold_preprocess import FOLD_PREPROCESS
from deploy.graph.passes.fuse_batch_norm import FUSE_BATCH_NORM
from deploy.graph.passes.fuse_gelu import FUSE_GELU
from deploy.graph.passes.fuse_group_norm import FUSE_GROUP_NORM
from deploy.graph.passes.fuse_layer_norm import FUSE_LAYER_NORM
from deploy.graph.passes.lift_bias import LIFT_BIAS
from deploy.graph.passes.remove_casts import REMOVE_CASTS
from deploy.graph.passes.remove_reshapes import REMOVE_RESHAPES
from deploy.graph.passes.share_initializers import SHARE_INITIALIZERS

PASSES: tuple[GraphPass, ...] = (
    FOLD_CONSTANTS,
    CONSTANT_AXES,
    FOLD_PREPROCESS,
    FUSE_BATCH_NORM,
    FUSE_LAYER_NORM,
    FUSE_GROUP_NORM,
    FUSE_GELU,
    REMOVE_CASTS,
    REMOVE_RESHAPES,
    SHARE_INITIALIZERS,
    LIFT_BIAS,
)

__all__ = [
    "CONSTANT_AXES",
    "FOLD_CONSTANTS",
    "FOLD_PREPROCESS",
    "FUSE_BATCH_NORM",
    "FUSE_GELU",
    "FUSE_GROUP_NORM",
    "FUSE_LAYER_NORM",
    "LIFT_BIAS",
    "PASSES",
    "REMOVE_CASTS",
    "REMOVE_RESHAPES",
    "SHARE_INITIALIZERS",
]
