"""The ops of fastres. Importing this package registers them as torch.ops.fastres.*; fastres.functional is how to call
them."""

from fastres.ops import (
    add_act,
    bn_act,
    bn_act_maxpool,
    bn_add_bn_act,
    cast_weights,
    conv1x1_bn_act,
    conv_bias_act,
    conv_bn_act,
    flops,
    recompute,
    synchronised,
    update_running_stats,
)

__all__ = [
    "add_act",
    "bn_act",
    "bn_act_maxpool",
    "bn_add_bn_act",
    "cast_weights",
    "conv1x1_bn_act",
    "conv_bias_act",
    "conv_bn_act",
    "flops",
    "recompute",
    "synchronised",
    "update_running_stats",
]
