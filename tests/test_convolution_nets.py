"""Every convolution of the ResNets, ResNeXts, Wide ResNets and CIFAR ResNets against float64, in its full size."""

import pytest
import torch
from _convolution import NHWC, Conv, by_functions, check, fused, square
from torch import nn

from fastres import models
from fastres.kernels import convolution


def of_models():
    """Every distinct convolution of the models for ImageNet at 224 pixels, from the models themselves."""
    found = {}

    def note(module, args, y):
        where = (module.stride, module.padding, module.dilation, module.groups)
        found[Conv(tuple(args[0].shape), tuple(module.weight.shape), *where)] = None

    with torch.device("meta"):
        for name in models.list_models():
            if models.image_size(name) != 224 or name.startswith("plain") or name.endswith("_v2"):
                continue  # v2 and plain networks have the convolutions of v1.5
            model = models.create_model(name, fused=False)
            for module in model.modules():
                if isinstance(module, nn.Conv2d):
                    module.register_forward_hook(note)
            model(torch.empty(1, 3, 224, 224))
    return list(found)


#: ResNet-20 to -1202 at 32 pixels, with both kinds of shortcuts.
CIFAR = [
    square(3, 16, 3, 1, 1, 32),
    square(16, 16, 3, 1, 1, 32),
    square(16, 32, 3, 2, 1, 32),
    square(16, 32, 1, 2, 0, 32),
    square(32, 32, 3, 1, 1, 16),
    square(32, 64, 3, 2, 1, 16),
    square(32, 64, 1, 2, 0, 16),
    square(64, 64, 3, 1, 1, 8),
]


@pytest.mark.slow
@pytest.mark.parametrize("conv", [*of_models(), *CIFAR], ids=str)
def test_convolutions_of_networks(conv):
    """By the public functions; without groups by our own kernels, which must not depend on the layout of the weight."""
    tensors = conv.tensors()
    got = by_functions(conv, tensors)
    check(conv, tensors, got, conv.methods())
    if conv.groups > 1:
        return
    x, weight, *rest = tensors
    assert convolution.why_not(x, weight, None, None, *conv.geometry) is None
    for layout in (NHWC, torch.contiguous_format):
        other = fused(conv, (x, weight.contiguous(memory_format=layout), *rest))
        assert all(torch.equal(a, b) for a, b in zip(got, other, strict=True)), layout
