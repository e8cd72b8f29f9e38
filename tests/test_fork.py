"""conv_bn_act(fork=...): the input comes back for the shortcut, and backward adds its two gradients up."""

import pytest
import torch
from _compare import image, some_kernels

from fastres import functional
from fastres.testing import LAYOUTS, relative_error


@pytest.fixture(autouse=True)
def kernels():
    with some_kernels():
        yield


def convolution(size, groups=1):
    return (torch.randn(16, 16 // groups, size, size) / 8).requires_grad_()


def run(x, weight, use, *, forked, groups=1):
    """use(y, shortcut) of a convolution's output and of its input, which came back or is x itself."""
    fork = [] if forked else None
    options = {"padding": weight.shape[2] // 2, "groups": groups, "fork": fork}
    y = functional.conv_bn_act(x, weight, None, None, training=True, **options)
    return use(y, fork[0] if forked else x)


USES = {
    "both": lambda y, shortcut: (y * shortcut.sin()).sum(),
    "only the convolution": lambda y, shortcut: y.sin().sum(),
    "only the shortcut": lambda y, shortcut: shortcut.sin().sum() + 0 * y.detach().sum(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize(("size", "groups"), [(3, 1), (1, 1), (3, 16), (3, 2)], ids=str)
def test_gradients(size, groups, use, layout):
    x = image(order=LAYOUTS[layout]).requires_grad_()
    weight = convolution(size, groups)
    grads = []
    for forked in (True, False):
        x.grad = weight.grad = None
        run(x, weight, use, forked=forked, groups=groups).backward()
        grads.append((x.grad, weight.grad))
    for got, want in zip(*grads, strict=True):
        assert (got is None) == (want is None)
        assert got is None or relative_error(got, want) < 1e-6


def test_gradients_of_gradients():
    x, weight = image(size=4).double().requires_grad_(), convolution(3).detach().double().requires_grad_()

    def penalty(forked):
        loss = run(x, weight, USES["both"], forked=forked)
        grads = torch.autograd.grad(loss, (x, weight), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), (x, weight))

    for got, want in zip(penalty(True), penalty(False), strict=True):
        assert relative_error(got, want) < 1e-10


def test_the_input_itself_where_nothing_is_recorded():
    x, weight = image(), convolution(3)
    for training in (True, False):
        fork = []
        mean, var = torch.zeros(16), torch.ones(16)
        with torch.no_grad():
            functional.conv_bn_act(x, weight, mean, var, training=training, padding=1, fork=fork)
        assert len(fork) == 1 and fork[0] is x
    fork = [weight]
    functional.conv_bn_act(x, weight, None, None, training=True, padding=1, fork=fork)
    assert fork[0] is weight and fork[1] is x  # which needs no gradient; what was in the list stays


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(dtype):
    """Where autocast converts the input, the shortcut stays what it is in eager: the input as it was."""
    x, weight = image().to(dtype).requires_grad_(), convolution(3)
    fork = []
    with torch.autocast("cpu", torch.bfloat16):
        y = functional.conv_bn_act(x, weight, None, None, training=True, padding=1, fork=fork)
    assert y.dtype is torch.bfloat16 and fork[0].dtype is dtype
    (y.float().sum() + fork[0].float().sum()).backward()
    assert x.grad.dtype is dtype and weight.grad.dtype is torch.float32


def test_hooks_and_retained_graphs_see_one_gradient():
    x, weight, seen = image().requires_grad_(), convolution(3), []
    x.register_hook(lambda g: seen.append(g.clone()))
    loss = run(x, weight, USES["both"], forked=True)
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    loss.backward()
    assert len(seen) == 2 and torch.equal(seen[0], first) and torch.equal(x.grad, 2 * first)


def test_the_shortcut_is_not_taken_for_the_output():
    """Both are results of one node, of one shape, and the output is offered to be computed again."""
    x = image().requires_grad_()
    weights = [convolution(3), convolution(1), convolution(3)]

    def block(forked):
        fork = [] if forked else None
        options = {"training": True, "padding": 1}
        y = functional.conv_bn_act(x, weights[0], None, None, recompute=forked, fork=fork, **options)
        shortcut = functional.conv_bn_act(fork[0] if forked else x, weights[1], None, None, training=True)
        y = functional.conv_bn_act(y, weights[2], None, None, residual=shortcut, **options)
        return torch.autograd.grad(y.sin().sum(), (x, *weights))

    for got, want in zip(block(True), block(False), strict=True):
        assert relative_error(got, want) < 1e-6
