"""Cases E1 to E3: strides, layouts, NaN and Inf."""

import copy

import pytest
import torch
import torch.nn.functional as F
from _compare import (
    assert_path,
    assert_same,
    block,
    check,
    image,
    kinds,
    layouts,
    modes,
    network,
    plainly,
    randomise,
    some_kernels,
    step,
    watched,
)
from torch import nn

import fastres
from fastres import functional
from fastres.nn import AddAct, BnAct2d, ConvBnAct2d
from fastres.testing import LAYOUTS

trained = pytest.mark.parametrize("mode", ["train", "eval"])


@pytest.fixture(autouse=True)
def _kernels():
    with some_kernels():
        yield


def both(model, x, mode, call=None):
    """Outcomes of the eager and of the fused model, and the path taken; `call(model, x)` is what runs."""
    eager, fused = copy.deepcopy(model), copy.deepcopy(model)
    fastres.fuse_(fused)
    run = call or (lambda model, x: model(x))
    want = step(eager, x, mode, call=lambda x: run(eager, x))
    with watched() as seen:
        got = step(fused, x, mode, call=lambda x: run(fused, x))
    return got, want, seen


#: Views with 16 channels of some larger storage.
VIEWS = {
    "every_second_column": lambda: torch.randn(3, 16, 7, 14)[..., ::2],
    "every_second_image": lambda: torch.randn(6, 16, 7, 7)[::2],
    "channels_of_more": lambda: torch.randn(3, 40, 7, 7)[:, 8:24],
    "channels_of_more_channels_last": lambda: torch.randn(3, 40, 7, 7).contiguous(memory_format=torch.channels_last)[
        :, 8:24
    ],
    "cropped": lambda: torch.randn(3, 16, 11, 11)[:, :, 2:9, 3:10],
    "transposed": lambda: torch.randn(3, 16, 7, 7).transpose(2, 3),
    "channels_first_of_all": lambda: torch.randn(16, 3, 7, 7).transpose(0, 1),
    "width_before_height": lambda: torch.randn(3, 7, 7, 16).permute(0, 3, 2, 1),
    "expanded_batch": lambda: torch.randn(1, 16, 7, 7).expand(3, -1, -1, -1),
    "expanded_image": lambda: torch.randn(3, 16, 1, 1).expand(-1, -1, 7, 7),
    "offset": lambda: torch.randn(3 * 16 * 49 + 5)[5:].view(3, 16, 7, 7),
    "unaligned_channels_last": lambda: torch.randn(3 * 16 * 49 + 3)[3:].view(3, 7, 7, 16).permute(0, 3, 1, 2),
}


@modes
@pytest.mark.parametrize("view", VIEWS)
def test_e1_input(view, mode):
    for kind in ("BasicBlock", "Bottleneck"):
        for stride in (1, 2):
            got, want, seen = both(block(kind=kind, stride=stride), VIEWS[view](), mode)
            assert_path(seen, "fast")
            assert_same(got, want)


class PlainAddAct(AddAct):
    def forward(self, x, residual):
        return F.relu(x + residual)


@modes
@pytest.mark.parametrize("view", VIEWS)
def test_e1_modules(view, mode):
    """Views as input, as residual and as both. `step` sees to it that the input is not written to."""
    bn = randomise(BnAct2d(nn.BatchNorm2d(16)))
    x, residual = VIEWS[view](), VIEWS[view]()
    before = residual.clone()
    for a, b in ((x, residual), (image(), residual), (x, image())):
        for module, eager in ((copy.deepcopy(bn), plainly(bn)), (AddAct(), PlainAddAct())):
            want = step(eager, a, mode, call=lambda x, m=eager, b=b: m(x, b))
            got = step(module, a, mode, call=lambda x, m=module, b=b: m(x, b))
            assert_same(got, want)
    assert torch.equal(residual, before)


#: What follows the model, and the gradient that it sends back.
TAILS = {
    "sum": lambda y: y.sum(),  # strides 0
    "mean_of_a_channel": lambda y: y[:, 3].mean(),
    "transposed": lambda y: y.transpose(2, 3),
    "permuted": lambda y: y.permute(0, 2, 3, 1),
    "every_second": lambda y: y[:, ::2, :, ::2],
    "expanded": lambda y: y.unsqueeze(0).expand(2, -1, -1, -1, -1),
    "channel_means": lambda y: y.mean((2, 3)),
    "negated_view": lambda y: torch._neg_view(y),
}


@kinds
@trained
@layouts
@pytest.mark.parametrize("tail", TAILS)
def test_e1_gradient_of_the_output(kind, tail, mode, layout):
    x = image().contiguous(memory_format=LAYOUTS[layout])
    got, want, seen = both(block(kind=kind, stride=2), x, mode, lambda model, x: TAILS[tail](model(x)))
    assert_path(seen, "fast")
    assert_same(got, want)


@trained
def test_e1_gradient_of_the_stems_output(mode):
    got, want, _ = both(network(), image(3, size=32), mode, lambda model, x: model(x).sum())
    assert_same(got, want)


@modes
def test_e1_negated_and_conjugate_views(mode):
    got, want, _ = both(block(), torch._neg_view(image()), mode)
    assert_same(got, want)
    assert_same(*both(block(), torch.view_as_complex(torch.randn(3, 16, 7, 7, 2)).conj().imag, mode)[:2])


SHAPES = {
    "usual": (3, 16, 7, 7),
    "one_pixel": (3, 16, 1, 1),
    "one_column": (3, 16, 5, 1),
    "one_row": (3, 16, 1, 5),
    "one_image": (1, 16, 7, 7),
}


def to_layout(model, name):
    return model.to(memory_format=LAYOUTS[name])


@modes
@layouts
@pytest.mark.parametrize("weight_layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_e2_layouts(shape, weight_layout, layout, mode):
    """The output has eager's strides, where they are ambiguous too; activations and weights in either layout."""
    x = torch.randn(SHAPES[shape]).contiguous(memory_format=LAYOUTS[layout])
    for kind in ("BasicBlock", "Bottleneck"):
        check(to_layout(block(kind=kind), weight_layout), x, mode)
        if mode != "train" or x.shape[2:].numel() > 1:
            check(to_layout(block(kind=kind, stride=2), weight_layout), x, mode)


@modes
@layouts
@pytest.mark.parametrize("size", [1, 6])
def test_e2_one_channel(size, layout, mode):
    """C = 1: contiguous and channels_last are the same bytes."""
    x = torch.randn(3, 1, size, size).contiguous(memory_format=LAYOUTS[layout])
    check(block(kind="BasicBlock", width=1), x, mode)
    check(to_layout(block(kind="BasicBlock", width=1), "channels_last"), x, mode)
    module = ConvBnAct2d(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8))
    eager = plainly(module)
    assert_same(step(module, x, mode), step(eager, x, mode), 1e-4)


@modes
@layouts
@pytest.mark.parametrize("weight_layout", LAYOUTS)
def test_e2_layouts_of_a_model(weight_layout, layout, mode):
    x = image(3, size=32).contiguous(memory_format=LAYOUTS[layout])
    check(to_layout(network(), weight_layout), x, mode)
    taps = lambda model, x: model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(x)))))  # noqa: E731
    assert_same(*both(to_layout(network(), weight_layout), x, mode, taps)[:2])


@modes
@layouts
@pytest.mark.parametrize("shape", SHAPES)
def test_e2_mixed_between_the_branches(shape, layout, mode):
    """The shortcut in the other layout than the branch: the sum has the branch's, as eager's `+=`."""
    other = [name for name in LAYOUTS if name != layout][0]

    class Convert(nn.Module):
        def forward(self, x):
            return x.contiguous(memory_format=LAYOUTS[other])

    model = block()
    model.downsample = Convert()
    check(model, torch.randn(SHAPES[shape]).contiguous(memory_format=LAYOUTS[layout]), mode)


def poisoned(x, value):
    x = x.clone()
    x[0, 1, 2, 3] = value
    x[-1, -1, 0, 0] = value
    return x


@kinds
@modes
@layouts
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_e3_nan_and_inf_in_the_input(kind, value, mode, layout):
    x = poisoned(image(), value).contiguous(memory_format=LAYOUTS[layout])
    for stride in (1, 2):
        got, want, seen = both(block(kind=kind, stride=stride), x, mode)
        assert_path(seen, "fast")
        assert not bool(want["y"].isfinite().all())
        assert_same(got, want)


@modes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize(
    "where", ["conv1.weight", "bn1.weight", "bn2.bias", "bn3.running_mean", "bn3.running_var", "downsample.0.weight"]
)
def test_e3_nan_and_inf_in_the_weights(where, value, mode):
    """A model that has diverged must not look healthy."""
    model = block(stride=2)
    tensor = dict(model.named_parameters()) | dict(model.named_buffers())
    tensor[where].data.view(-1)[1] = value
    got, want, _ = both(model, image(), mode)
    if value == value:  # Inf - Inf depends on the order of the arithmetic, which is not eager's
        assert bool(got["y"].isfinite().all()) == bool(want["y"].isfinite().all())
    else:
        assert_same(got, want)


@modes
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_e3_nan_and_inf_in_a_model(value, mode):
    x = image(3, size=32)
    x[0, 0, 5, 5] = value
    got, want, _ = both(network(), x, mode)
    assert_same(got, want)


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_e3_backward_of_relu(dtype, layout, with_residual):
    """Zero where the result is <= 0, else passed: NaN passes, and at exactly 0 the gradient is 0."""
    x = torch.randn(2, 16, 4, 4)
    x[:, 0], x[:, 1], x[0, 2, 1, 1] = 0.0, -0.0, float("nan")
    x = x.to(dtype).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    residual = torch.zeros_like(x, requires_grad=True) if with_residual else None
    mean, var = torch.zeros(16), torch.ones(16)
    grads = []
    for fused in (True, False):
        if fused:
            y = functional.bn_act(x, mean, var, residual=residual, eps=0.0)
        else:
            y = F.batch_norm(x, mean, var, eps=0.0)
            y = F.relu(y if residual is None else y + residual)
        grads.append(torch.autograd.grad(y, [t for t in (x, residual) if t is not None], torch.ones_like(y)))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)
        assert not got[:, :2].any() and got[0, 2, 1, 1] == 1
    total = functional.add_act(x, x.detach())
    want = F.relu(x + x.detach())
    assert torch.equal(*(torch.autograd.grad(y, x, torch.ones_like(y))[0] for y in (total, want)))
