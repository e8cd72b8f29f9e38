"""Bad input: an error of eager's type, the same message where eager has one, and nothing half-changed."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from _compare import (
    MODES,
    assert_same,
    block,
    buffers,
    check,
    check_error,
    image,
    kinds,
    libraries,
    modes,
    network,
    set_mode,
    some_kernels,
)
from torch import nn

from fastres import functional
from fastres.nn import AddAct, BnAct2d, ConvBnAct2d


@pytest.fixture(autouse=True)
def _kernels():
    with some_kernels():
        yield


def statistics(channels=16):
    return torch.zeros(channels), torch.ones(channels)


def conv(channels=16, out=16, size=3):
    return torch.randn(out, channels, size, size)


def eager_bn_act(x, mean, var, weight=None, bias=None, residual=None, *, training=False, momentum=0.1, eps=1e-5):
    y = nn.functional.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    return F.relu(y if residual is None else y + residual)


def fails(function, *args, **options):
    with pytest.raises(Exception) as info:
        function(*args, **options)
    return info.value


def assert_same_error(fused, eager, *args, same_message=True, **options):
    """Both raise the same kind of error, and neither touches the running statistics among `args`."""
    before = [a.clone() if isinstance(a, torch.Tensor) and a.device.type == "cpu" else None for a in args]
    error, want = fails(fused, *args, **options), fails(eager, *args, **options)
    assert type(error) is type(want), f"eager raised {want!r}, fused {error!r}"
    if same_message:
        assert str(error) == str(want)
    for a, b in zip(args, before, strict=True):
        assert b is None or torch.equal(a, b)
    return error


RANKS = {1: (16,), 2: (4, 16), 3: (4, 16, 7), 5: (4, 16, 3, 3, 3)}


@modes
@pytest.mark.parametrize("rank", RANKS)
def test_rank_of_a_models_input(rank, mode):
    check_error(block(), torch.randn(RANKS[rank]), mode)
    check_error(network(), torch.randn(RANKS[rank]), mode)


@pytest.mark.parametrize("rank", RANKS)
def test_rank_in_the_functions(rank):
    """nn.BatchNorm2d's message; the ops take [N, C, H, W] only."""
    x = torch.randn(RANKS[rank])
    want = fails(nn.BatchNorm2d(16), x)
    for call in (
        lambda: functional.bn_act(x, *statistics()),
        lambda: functional.bn_act(x, *statistics(), training=True),
        lambda: functional.bn_act_maxpool(x, *statistics()),
        lambda: functional.conv_bn_act(x, conv(), *statistics()),
        lambda: functional.conv_bias_act(x, conv()),
        lambda: functional.add_act(x, x),
    ):
        error = fails(call)
        assert type(error) is ValueError and str(error) == str(want)


@modes
@kinds
def test_channels_of_a_models_input(kind, mode):
    """Eager's own message: it names the weight, and the channels that were expected and given."""
    error = check_error(block(kind=kind), image(12), mode)
    assert "expected input[3, 12, 7, 7] to have 16 channels, but got 12 channels instead" in str(error)
    check_error(network(), image(1, size=32), mode)
    check_error(block(stride=2), image(8), mode)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("wrong", ["running_mean", "running_var", "weight", "bias"])
def test_channels_in_the_functions(wrong, training):
    arguments = {name: torch.ones(16) for name in ("running_mean", "running_var", "weight", "bias")}
    arguments[wrong] = torch.ones(15)
    error = fails(functional.bn_act, image(), **arguments, training=training)
    want = fails(F.batch_norm, image(), **arguments, training=training)
    assert type(error) is type(want) is RuntimeError
    assert str(error) == str(want) or f"{wrong} should contain 16 elements not 15" in str(error)
    for function in (functional.conv_bn_act, functional.bn_act_maxpool):
        options = {"conv_weight": conv()} if function is functional.conv_bn_act else {}
        assert isinstance(fails(function, image(), **arguments, training=training, **options), RuntimeError)


CONVOLUTIONS = {
    "channels": ((8, 12, 3, 3), None, {}),
    "groups": ((8, 16, 3, 3), None, {"groups": 2}),
    "outputs_and_groups": ((7, 8, 3, 3), None, {"groups": 2}),
    "bias": ((8, 16, 3, 3), (7,), {}),
    "bias_rank": ((8, 16, 3, 3), (8, 1), {}),
    "kernel_larger_than_image": ((8, 16, 9, 9), None, {}),
    "dilated_kernel_larger_than_image": ((8, 16, 3, 3), None, {"dilation": 5}),
    "weight_rank": ((8, 16, 3), None, {}),
    "negative_padding": ((8, 16, 3, 3), None, {"padding": -1}),
    "zero_stride": ((8, 16, 3, 3), None, {"stride": 0}),
    "negative_stride": ((8, 16, 3, 3), None, {"stride": -1}),
    "zero_dilation": ((8, 16, 3, 3), None, {"dilation": 0}),
    "zero_groups": ((8, 16, 3, 3), None, {"groups": 0}),
    "negative_groups": ((8, 16, 3, 3), None, {"groups": -1}),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution_in_the_functions(case):
    shape, bias_shape, options = CONVOLUTIONS[case]
    x, weight = image(), torch.randn(shape)
    bias = None if bias_shape is None else torch.randn(bias_shape)
    want = fails(F.conv2d, x, weight, bias, **options)
    channels = statistics(shape[0])
    for training in (True, False):
        for gradient in (True, False):
            with torch.set_grad_enabled(gradient):
                weight.requires_grad_(gradient)
                error = fails(
                    functional.conv_bn_act, x, weight, *channels, conv_bias=bias, training=training, **options
                )
                assert type(error) is type(want), f"eager raised {want!r}, fused {error!r}"
                error = fails(functional.conv_bias_act, x, weight, bias, **options)
                assert type(error) is type(want), f"eager raised {want!r}, fused {error!r}"
    assert torch.equal(channels[0], torch.zeros(shape[0])) and torch.equal(channels[1], torch.ones(shape[0]))


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
def test_geometry_of_another_length(name):
    for value in ((1, 1, 1), (), "same"):
        for function in (functional.conv_bias_act, functional.conv_bn_act):
            arguments = (image(), conv()) if function is functional.conv_bias_act else (image(), conv(), *statistics())
            error = fails(function, *arguments, **{name: value})
            assert isinstance(error, (ValueError, RuntimeError)) and name in str(error)


RESIDUALS = {
    "shape": lambda: torch.randn(3, 16, 9, 9),
    "batch": lambda: torch.randn(2, 16, 7, 7),
    "channels": lambda: torch.randn(3, 8, 7, 7),
    "smaller": lambda: torch.randn(3, 16, 3, 3),
    "device": lambda: torch.randn(3, 16, 7, 7, device="meta"),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_residual_in_the_functions(residual, training):
    """RuntimeError as of `y + residual`, and before the running statistics are touched."""
    x, other, running = image(), RESIDUALS[residual](), statistics()
    calls = (
        lambda: functional.bn_act(x, *running, residual=other, training=training),
        lambda: functional.conv_bn_act(x, conv(), *running, residual=other, padding=1, training=training),
        lambda: functional.conv_bias_act(x, conv(), residual=other, padding=1),
        lambda: functional.add_act(x, other),
    )
    for call in calls:
        for gradient in (True, False):
            x.requires_grad_(gradient)
            with torch.set_grad_enabled(gradient):
                assert type(fails(call)) is RuntimeError
    assert torch.equal(running[0], torch.zeros(16)) and torch.equal(running[1], torch.ones(16))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.complex64], ids=str)
def test_residual_of_another_dtype_in_the_functions(dtype):
    """They say so; the modules and blocks take whatever eager's addition takes (case C10)."""
    x, other, running = image(), torch.ones(3, 16, 7, 7, dtype=dtype), statistics()
    for call in (
        lambda: functional.bn_act(x, *running, residual=other, training=True),
        lambda: functional.conv_bias_act(x, conv(), residual=other, padding=1),
        lambda: functional.conv_bn_act(x, conv(), *running, residual=other, padding=1),
        lambda: functional.add_act(x, other),
    ):
        error = fails(call)
        assert type(error) is RuntimeError and re.search(r"residual must have the input's dtype", str(error))
    assert torch.equal(running[0], torch.zeros(16))


@modes
@pytest.mark.parametrize("residual", RESIDUALS)
def test_residual_of_the_modules(residual, mode):
    """Whatever the plain path does, and the batch norm left as the plain path leaves it."""
    other, bn = RESIDUALS[residual](), nn.BatchNorm2d(16)
    for module in (ConvBnAct2d(nn.Conv2d(16, 16, 1), bn), BnAct2d(bn), AddAct()):
        plain, outcomes = copy.deepcopy(module), []
        for child in plain.children():
            child.register_forward_hook(lambda *args: None)
        torch.manual_seed(0)
        x = image()
        for m in (module, plain):
            try:
                with torch.set_grad_enabled(mode != "inference"):
                    outcomes.append(set_mode(m, mode)(x, other).device)
            except Exception as error:
                outcomes.append(type(error))
        assert outcomes[0] == outcomes[1]
        assert outcomes[0] is RuntimeError or residual == "device"  # torch lets `y += meta` pass
        assert_same(buffers(module), buffers(plain))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("eps", [-1e-5, -1.0, 0.0])
def test_eps_in_the_functions(eps, training):
    if eps == 0.0 and not training:
        assert functional.bn_act(image(), *statistics(), eps=0.0).shape == (3, 16, 7, 7)
        return
    x = image()
    error = assert_same_error(functional.bn_act, eager_bn_act, x, *statistics(), eps=eps, training=training)
    assert type(error) is ValueError
    for call in (
        lambda: functional.conv_bn_act(x, conv(), *statistics(), eps=eps, training=training),
        lambda: functional.bn_act_maxpool(x, *statistics(), eps=eps, training=training),
    ):
        assert str(fails(call)) == str(error)


@modes
@pytest.mark.parametrize("where", ["bn1", "bn3", "downsample.1"])
def test_negative_eps_of_a_module(where, mode):
    model = block(stride=2)
    model.get_submodule(where).eps = -1e-3
    # Eager computes the shortcut last: here its error comes before the last batch norm has seen the batch.
    error = check_error(model, image(), mode, same_state=where != "downsample.1")
    assert type(error) is ValueError and "eps" in str(error)


DTYPES = [torch.int64, torch.int8, torch.bool, torch.complex64]


@modes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_of_a_models_input(dtype, mode):
    check_error(block(), image().to(dtype), mode)
    check_error(network(), image(3, size=32).to(dtype), mode)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_in_the_functions(dtype, training):
    x = image().to(dtype)
    want = fails(F.batch_norm, x, *statistics(), training=training)
    for call in (
        lambda: functional.bn_act(x, *statistics(), training=training),
        lambda: functional.bn_act_maxpool(x, *statistics(), training=training),
        lambda: functional.conv_bn_act(x, conv().to(dtype), *statistics(), training=training),
    ):
        error = fails(call)
        assert isinstance(error, (NotImplementedError, RuntimeError)), error
        assert isinstance(want, (NotImplementedError, RuntimeError)), want


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
def test_mixed_dtypes_in_the_functions(name):
    """fp32 input with other parameters, float64 with fp32 ones: eager's RuntimeError."""
    for x, dtype in ((image(), torch.bfloat16), (image(), torch.float64), (image().double(), torch.float32)):
        arguments = {n: torch.ones(16, dtype=x.dtype) for n in ("running_mean", "running_var", "weight", "bias")}
        arguments[name] = arguments[name].to(dtype)
        for training in (True, False):
            assert type(fails(functional.bn_act, x, **arguments, training=training)) is RuntimeError
            assert type(fails(F.batch_norm, x, **arguments, training=training)) is RuntimeError


@pytest.mark.parametrize("x", ["abc", None, 3, [1.0]], ids=repr)
def test_no_tensor(x):
    for model in (block(), network()):
        for mode in MODES:
            check_error(model, x, mode)


@libraries
@kinds
def test_one_value_per_channel(library, kind):
    error = check_error(block(library, kind), image(n=1, size=1), "train")
    assert type(error) is ValueError
    assert (
        str(error) == f"Expected more than 1 value per channel when training, got input size {(batch_norm_size(kind))}"
    )


def batch_norm_size(kind):
    return torch.Size((1, 16 if kind == "BasicBlock" else 4, 1, 1))


def test_one_value_per_channel_in_the_functions():
    x = torch.randn(1, 16, 1, 1)
    error = assert_same_error(functional.bn_act, eager_bn_act, x, *statistics(), training=True)
    assert type(error) is ValueError
    for call in (
        lambda: functional.conv_bn_act(x, conv(size=1), *statistics(), training=True),
        lambda: functional.bn_act_maxpool(x, *statistics(), training=True, kernel_size=1, stride=1, padding=0),
    ):
        assert str(fails(call)) == str(error)
    assert functional.bn_act(x, *statistics()).shape == x.shape


@modes
@pytest.mark.parametrize("shape", [(0, 16, 7, 7), (3, 16, 0, 7), (3, 16, 7, 0), (0, 16, 0, 0)], ids=str)
def test_empty_batch_or_image(shape, mode):
    """An empty batch is fine; an empty image is what eager makes of it."""
    model, x = block(), torch.randn(shape)
    eager = copy.deepcopy(model)
    try:
        with torch.set_grad_enabled(mode != "inference"):
            set_mode(eager, mode)(x)
    except Exception:
        check_error(model, x, mode)
    else:
        check(model, x, mode, path="any")


def test_empty_batch_in_the_functions():
    running = statistics()
    x = torch.randn(0, 16, 7, 7, requires_grad=True)
    for call in (
        lambda: functional.bn_act(x, *running, residual=x, training=True),
        lambda: functional.bn_act_maxpool(x, *running, training=True),
        lambda: functional.conv_bn_act(x, conv(), *running, residual=x, padding=1, training=True),
        lambda: functional.conv_bias_act(x, conv(), residual=x, padding=1),
        lambda: functional.add_act(x, x),
    ):
        y = call()
        assert y.shape[:2] == (0, 16) and y.requires_grad
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert gradient.shape == x.shape
    assert torch.equal(running[0], torch.zeros(16)) and torch.equal(running[1], torch.ones(16))


WINDOWS = [(0, 1, 0), (3, 0, 1), (3, 2, 2), (3, 2, -1), (20, 2, 1), (9, 2, 0), (-1, 1, 0)]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_pooling_window(window):
    kernel_size, stride, padding = window
    running = statistics()
    options = {"kernel_size": kernel_size, "stride": stride, "padding": padding}
    error = fails(functional.bn_act_maxpool, image(), *running, training=True, **options)
    assert type(error) is RuntimeError and len(str(error)) < 300
    assert torch.equal(running[0], torch.zeros(16))


@pytest.mark.parametrize("act", ["silu", "", None, "ReLU", True], ids=repr)
def test_activation(act):
    for call in (
        lambda: functional.bn_act(image(), *statistics(), act=act),
        lambda: functional.add_act(image(), image(), act=act),
        lambda: functional.conv_bias_act(image(), conv(), act=act),
        lambda: functional.conv_bn_act(image(), conv(), *statistics(), act=act),
        lambda: functional.bn_act_maxpool(image(), *statistics(), act=act),
    ):
        error = fails(call)
        assert type(error) is ValueError and "'relu', 'identity'" in str(error)
