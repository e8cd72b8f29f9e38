"""The algebraic batch norm: conv1x1_bn_act against float64 and beside eager, and where functional.conv_bn_act takes
it."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import graph

import fastres
from fastres import functional, ops
from fastres.kernels import convolution, extension
from fastres.testing import budget, relative_error

NHWC = torch.channels_last
#: (images, channels, height, width, output channels)
SHAPES = [(2, 64, 14, 14, 256), (3, 17, 7, 5, 68), (2, 3, 9, 11, 13), (1, 16, 12, 12, 65), (2, 130, 9, 9, 520)]
NAMES = ("y", "grad_x", "grad_conv_weight", "grad_weight", "grad_bias", "grad_residual")

needs_extension = pytest.mark.skipif(
    not extension.available(), reason=f"compiled kernels are not loaded: {extension.load_error()}"
)


def tensors(shape, mean=0.0, std=1.0):
    n, c, h, w, k = shape
    x = (torch.randn(n, c, h, w) * std + mean).relu().contiguous(memory_format=NHWC)
    conv_weight = torch.randn(k, c, 1, 1) / c**0.5
    weight, bias = torch.rand(k) + 0.5, torch.randn(k)
    weight[0], weight[1] = 0.0, -1.0
    residual, grad_y = (torch.randn(n, k, h, w).contiguous(memory_format=NHWC) for _ in range(2))
    return x, conv_weight, weight, bias, residual, grad_y


def statistics(k):
    torch.manual_seed(1)
    return torch.randn(k), torch.rand(k) + 0.5


def eager(x, conv_weight, weight, bias, residual, *, training, relu):
    mean, var = (None, None) if training else (t.to(x.dtype) for t in statistics(len(weight)))
    y = F.batch_norm(F.conv2d(x, conv_weight), mean, var, weight, bias, training)
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y


def raw_op(x, conv_weight, weight, bias, residual, *, training, relu):
    mean, var = statistics(len(weight))
    return ops.conv1x1_bn_act.call(x, conv_weight, weight, bias, mean, var, residual, training, 1e-5, relu, relu)[0]


def run(function, values, dtype, **options):
    *values, grad_y = (t if t is None else t.detach().to(dtype) for t in values)
    values = [t if t is None else t.requires_grad_() for t in values]
    y = function(*values, **options)
    inputs = [t for t in values if t is not None]
    return [y.detach(), *torch.autograd.grad(y, inputs, grad_y)]


def assert_as_exact_as_eager(function, values, **options):
    got, witness = run(function, values, torch.float32, **options), run(eager, values, torch.float32, **options)
    for name, *each in zip(NAMES, got, run(eager, values, torch.float64, **options), witness, strict=False):
        ours, truth, theirs = each
        assert ours.stride() == theirs.stride() or name == "grad_conv_weight", name  # 1x1: any of them is dense
        error = relative_error(ours, truth)
        assert error <= budget(relative_error(theirs, truth), torch.float32, summed=True), (name, error)


@needs_extension
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "identity"])
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape, training, with_residual, relu):
    values = tensors(shape)
    if not with_residual:
        values = (*values[:4], None, values[5])
    with fastres.use_kernels("cpu"):
        assert_as_exact_as_eager(raw_op, values, training=training, relu=relu)


@needs_extension
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "identity"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_half_precision_is_storage(shape, dtype, training, relu):
    """Against float64 on the same stored values; eager's half-precision operations are the witness."""
    x, conv_weight, weight, bias, residual, grad_y = tensors(shape)
    values = [t.to(dtype).float() for t in (x, conv_weight)] + [weight, bias, residual.to(dtype).float()]
    values.append(grad_y.to(dtype).float())

    def outcome(function, dtype, affine):
        inputs = [t.to(affine if i in (2, 3) else dtype) for i, t in enumerate(values)]
        inputs = [t.detach().requires_grad_() for t in inputs[:5]] + inputs[5:]
        y = function(*inputs[:5], training=training, relu=relu)
        return [y.detach(), *torch.autograd.grad(y, inputs[:5], inputs[5])]

    def half(x, *rest, training, relu):  # float32 statistics, as under autocast
        mean, var = (None, None) if training else statistics(len(rest[1]))
        y = F.batch_norm(F.conv2d(x, rest[0]), mean, var, rest[1], rest[2], training) + rest[3]
        return F.relu(y) if relu else y

    with fastres.use_kernels("cpu"):
        got = outcome(raw_op, dtype, torch.float32)
    truth, witness = outcome(eager, torch.float64, torch.float64), outcome(half, dtype, torch.float32)
    for name, ours, exact, theirs in zip(NAMES, got, truth, witness, strict=True):
        assert ours.dtype is theirs.dtype, name
        error = relative_error(ours, exact)
        assert error <= budget(relative_error(theirs, exact), dtype, summed=True), (name, error)
    if relu:
        assert torch.equal(got[5] != 0, (got[0] > 0) & (values[5].to(dtype) != 0))


@needs_extension
def test_large_means():
    """The covariance is taken around a point near the mean, so statistics lose nothing to a mean of 1000 deviations."""
    values = tensors((4, 64, 14, 14, 256), mean=100.0, std=0.1)
    x, conv_weight = values[0].double(), values[1].double()
    with fastres.use_kernels("cpu"):
        _, mean, var, *_ = ops.conv1x1_bn_act.op(*values[:4], None, None, None, True, 1e-5, False, False)
        assert_as_exact_as_eager(raw_op, values, training=True, relu=True)
    true_var, true_mean = torch.var_mean(F.conv2d(x, conv_weight), (0, 2, 3), correction=0)
    assert relative_error(mean, true_mean) < 1e-9
    assert relative_error(var, true_var) < 1e-9


@needs_extension
@pytest.mark.parametrize("broken", ["x", "conv_weight", "grad_y"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_what_is_not_finite_stays_so(value, broken):
    values = list(tensors((2, 16, 8, 8, 64)))
    position = {"x": 0, "conv_weight": 1, "grad_y": 5}[broken]
    values[position][0, 1, 0, 0] = value
    with fastres.use_kernels("cpu"):
        got = run(raw_op, values, torch.float32, training=True, relu=True)
    want = run(eager, values, torch.float32, training=True, relu=True)
    for name, ours, theirs in zip(NAMES, got, want, strict=True):
        bad = ~torch.isfinite(theirs)
        assert torch.isfinite(ours)[bad].sum() == 0, f"{name}: finite where eager is not"


@needs_extension
def test_bitwise_the_same_for_any_number_of_threads():
    values = tensors((4, 64, 28, 28, 256))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(raw_op, values, torch.float32, training=True, relu=True))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
def test_reference(training):
    """In float64, where the reference serves: gradients, and gradients of gradients."""
    *inputs, _ = (t.double().requires_grad_() for t in tensors((2, 2, 3, 2, 5)))
    function = lambda *args: raw_op(*args, training=training, relu=True)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def ops_of(y):
    """Names of the autograd nodes behind y."""
    seen, nodes = set(), [y.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None:
            seen.add(type(node).__name__.removesuffix("Backward"))
            nodes += [n for n, _ in node.next_functions]
    return seen


@needs_extension
def test_when_it_serves(monkeypatch):
    def served(shape=(2, 16, 8, 8, 64), *, dtype=torch.float32, layout=NHWC, **options):
        n, c, h, w, k = shape
        x = torch.randn(n, c, h, w, dtype=dtype).contiguous(memory_format=layout)
        weight = torch.randn(k, c, 1, 1, dtype=dtype, requires_grad=True)
        y = functional.conv_bn_act(x, weight, *statistics(k), training=options.pop("training", True), **options)
        return "conv1x1_bn_act" in ops_of(y)

    assert served() and served(training=False)
    assert not served((2, 16, 8, 8, 48)), "hardly an expansion"
    assert not served((1, 16, 8, 8, 64), stride=2) and not served(conv_bias=torch.zeros(64))
    assert not served((1, 64, 8, 8, 256)), "few pixels: products over channels would cost more than the convolution"
    assert not served(layout=torch.contiguous_format)
    for faster in (True, False):
        monkeypatch.setattr(convolution, "onednn_convolves", lambda dtype, fast=faster: fast and dtype.itemsize == 2)
        assert served() and served(dtype=torch.bfloat16) is not faster
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert served() is not faster
    with fastres.use_kernels("reference"):
        assert not served()


@needs_extension
def test_through_the_functional_api():
    def function(x, conv_weight, weight, bias, residual, *, training, relu):
        act = "relu" if relu else "identity"
        return functional.conv_bn_act(
            x, conv_weight, *statistics(len(weight)), weight, bias, residual, training=training, act=act
        )

    assert_as_exact_as_eager(function, tensors((2, 32, 16, 16, 128)), training=True, relu=True)


@needs_extension
def test_running_statistics():
    x, conv_weight, weight, bias, *_ = tensors((2, 16, 8, 8, 64))
    mean, var = torch.zeros(64), torch.ones(64)
    true_mean, true_var = torch.zeros(64).double(), torch.ones(64).double()
    y = functional.conv_bn_act(x, conv_weight.requires_grad_(), mean, var, weight, bias, training=True, momentum=0.3)
    F.batch_norm(F.conv2d(x.double(), conv_weight.double()), true_mean, true_var, training=True, momentum=0.3)
    assert "conv1x1_bn_act" in ops_of(y)
    assert relative_error(mean, true_mean) < 1e-6 and relative_error(var, true_var) < 1e-6


# What the next op computes again instead of saving it (fastres/ops/recompute.py)


def chain(x, first, second, write=None, recompute=True):
    y = functional.conv_bn_act(x, first, None, None, training=True, padding=1, recompute=recompute)
    if write is not None:
        y = write(y)
    return functional.conv_bn_act(y, second, None, None, training=True, padding=1)


def chain_tensors():
    x = torch.randn(2, 16, 9, 9).contiguous(memory_format=NHWC).requires_grad_()
    return x, *((torch.randn(16, 16, 3, 3) / 12).requires_grad_() for _ in range(2))


def saved_bytes(function):
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with graph.saved_tensors_hooks(pack, lambda t: t):
        y = function()
    return sum(storages.values()), y


def test_recompute_is_bitwise_the_same_and_saves_memory():
    values = chain_tensors()
    bytes_with, y = saved_bytes(lambda: chain(*values))
    bytes_without, plain = saved_bytes(lambda: chain(*values, recompute=False))
    assert bytes_without - bytes_with == values[0].nbytes
    assert torch.equal(y, plain)
    for a, b in zip(
        torch.autograd.grad(y.sin().sum(), values), torch.autograd.grad(plain.sin().sum(), values), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "write",
    [lambda y: y.mul_(2), lambda y: y * 2, lambda y: torch.no_grad()(lambda: y.mul_(2))(), lambda y: y[:, :, 1:]],
    ids=["in place", "another tensor", "without gradients", "slice"],
)
def test_recompute_sees_that_its_input_is_no_longer_what_was_made(write):
    values = chain_tensors()
    got = torch.autograd.grad(chain(*values, write).sin().sum(), values)
    want = torch.autograd.grad(chain(*values, write, recompute=False).sin().sum(), values)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_recompute_and_gradients_of_gradients():
    values = chain_tensors()

    def penalty(recompute):
        grads = torch.autograd.grad(chain(*values, recompute=recompute).square().sum(), values, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), values)

    for got, want in zip(penalty(True), penalty(False), strict=True):
        assert relative_error(got, want) < 1e-5


def test_recompute_frees_what_it_holds():
    """Backward frees the raw output although the next op holds it too; and nothing keeps a graph alive."""
    import gc
    import weakref

    values = chain_tensors()
    y = chain(*values)
    node = y.grad_fn
    raw = weakref.ref(node.saved_tensors[0])
    y.sum().backward()
    gc.disable()
    try:
        del y, node
        assert raw() is None
    finally:
        gc.enable()
