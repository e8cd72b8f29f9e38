"""The convolution ops with the Triton kernels: fastres/kernels/aten.py."""

from __future__ import annotations

from fastres.kernels import aten
from fastres.kernels.triton import batch_norm, elementwise

conv_bias_act = aten.conv_bias_act(elementwise.add_act)
conv_bn_act = aten.conv_bn_act(batch_norm.bn_act)
conv_bn_act_backward = aten.conv_bn_act_backward(batch_norm.bn_act_backward)
