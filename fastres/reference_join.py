"""What bn_add_bn_act means: the two branches of a block with a projection, each behind a batch norm of its own, joined.

    y = act(batch_norm(x) + batch_norm(other))

Computed in float64 and rounded once, like everything in reference.py, where the formulas are. Both branches are
[N, C, H, W] of one dtype; what has `other` in its name belongs to the second.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastres import layout
from fastres.reference import _activate, _bn_gradients, normalise, statistics, vector_dtype


def bn_add_bn_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    other: Tensor,
    other_weight: Tensor | None,
    other_bias: Tensor | None,
    other_running_mean: Tensor | None,
    other_running_var: Tensor | None,
    training: bool,
    other_training: bool,
    eps: float,
    other_eps: float,
    relu: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns y in x's layout, the mean and biased variance used of either branch (float64 [C]), and the 1-bit mask of
    what the ReLU gets (empty unless asked for)."""
    x = layout.dense(x)
    mean, var = statistics(x, running_mean, running_var, training)
    other_mean, other_var = statistics(other, other_running_mean, other_running_var, other_training)
    z = normalise(x, weight, bias, mean, var, eps)
    z = z + normalise(other, other_weight, other_bias, other_mean, other_var, other_eps)
    mask = layout.pack_mask(~(z <= 0), layout.is_channels_last(x)) if save_mask else x.new_empty(0, dtype=torch.uint8)
    return torch.empty_like(x).copy_(_activate(z, relu)), mean, var, other_mean, other_var, mask


def bn_add_bn_act_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    other: Tensor,
    other_weight: Tensor | None,
    other_mean: Tensor,
    other_var: Tensor,
    mask: Tensor | None,
    training: bool,
    other_training: bool,
    eps: float,
    other_eps: float,
    need_x: bool,
    need_affine: bool,
    need_other: bool,
    need_other_affine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns grad_x, grad_weight, grad_bias, and the same of the other branch; empty where not needed.

    Args:
        mask: of the forward; None without a ReLU.
    """
    x = layout.dense(x)
    g = grad_y.double()
    if mask is not None:
        g = torch.where(layout.unpack_mask(mask, x.shape, layout.is_channels_last(x)), g, 0.0)
    vector, found = vector_dtype(x), []
    for values, gamma, moments, mode, need, affine in (
        (x, weight, (mean, var), (training, eps), need_x, need_affine),
        (other, other_weight, (other_mean, other_var), (other_training, other_eps), need_other, need_other_affine),
    ):
        grad, grad_weight, grad_bias = _bn_gradients(g, values, gamma, *moments, *mode)
        found.append(torch.empty_like(x).copy_(grad) if need else x.new_empty(0))
        found += [v.to(vector) if affine else x.new_empty(0, dtype=vector) for v in (grad_weight, grad_bias)]
    return found[0], found[1], found[2], found[3], found[4], found[5]
