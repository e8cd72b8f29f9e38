"""Cases E4 to E6: float64, half precision, autocast, and dtypes that do not fit."""

import copy

import pytest
import torch
import torch.nn.functional as F
from _compare import (
    assert_parity,
    assert_path,
    batch_norms,
    block,
    buffers,
    check,
    check_error,
    check_numbers,
    image,
    kinds,
    layouts,
    libraries,
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
from fastres.nn import BnAct2d
from fastres.testing import LAYOUTS, budget, relative_error


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


@libraries
@kinds
@modes
def test_e4_float64(library, kind, mode):
    check(block(library, kind, stride=2).double(), image().double(), mode, tolerance=1e-13)


def test_e4_gradcheck_of_a_block():
    model = block(kind="BasicBlock", width=2, stride=2).double()
    fastres.fuse_(model)
    for training in (True, False):
        model.train(training)
        x = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
        with watched() as seen:
            torch.autograd.gradcheck(model, x, fast_mode=True)
        assert_path(seen, "fast")


@pytest.mark.filterwarnings("ignore:Complex modules:UserWarning")
@modes
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn], ids=str)
def test_e4_other_dtypes_are_eagers_errors(dtype, mode):
    x = (image() * 10).to(dtype)
    check_error(block(), x, mode)
    check_error(network(), torch.ones(2, 3, 32, 32).to(dtype), mode)
    if dtype is torch.complex64:
        check_error(block().to(dtype), x, mode)


@libraries
@kinds
@modes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_e5_half_model(library, kind, mode, dtype):
    """Parameters and statistics in half precision, arithmetic in fp32: at most twice eager's error."""
    check_numbers(block(library, kind, stride=2).to(dtype), image().to(dtype), mode)


@layouts
@modes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_e5_half_network(mode, dtype, layout):
    x = image(3, size=32).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    model = network().to(dtype)
    truth = step(copy.deepcopy(model).double(), x.double(), mode)
    got, want, seen = both(model, x, mode)
    assert_path(seen, "fast")
    assert relative_error(got["y"], truth["y"]) <= budget(relative_error(want["y"], truth["y"]), dtype)
    for name, t in buffers(model).items():
        assert got[name].dtype is t.dtype


@layouts
def test_e5_running_var_underflows_as_in_eager(layout):
    """A variance of 1e-9 is no fp16 number: the running one goes to 0, the output uses the real one."""
    x = (torch.randn(8, 16, 9, 9) * 3e-5).half().contiguous(memory_format=LAYOUTS[layout])
    module = BnAct2d(nn.BatchNorm2d(16, momentum=1.0).half(), act="identity")
    eager = copy.deepcopy(module.bn)
    with watched() as seen:
        y = module(x)
    assert_path(seen, "fast")
    want = eager(x)
    assert torch.equal(module.bn.running_var, eager.running_var) and not module.bn.running_var.any()
    truth = F.batch_norm(x.double(), None, None, training=True)
    assert relative_error(y, truth) <= budget(relative_error(want, truth), torch.float16)


def autocast(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


@libraries
@kinds
@modes
def test_e6_autocast(library, kind, mode):
    """bf16 activations, fp32 parameters; backward outside autocast. Judged against float64, as eager is."""
    model = block(library, kind, stride=2)
    x = image()
    truth = step(copy.deepcopy(model).double(), x.double(), mode)
    got, want, seen = both(model, x, mode, autocast)
    assert_path(seen, "fast")
    assert got["y"].dtype is torch.bfloat16
    assert_parity(got, want, truth, torch.bfloat16)


@modes
def test_e6_autocast_of_a_model(mode):
    model, x = network(), image(3, size=32)
    truth = step(copy.deepcopy(model).double(), x.double(), mode)
    got, want, seen = both(model, x, mode, autocast)
    assert_path(seen, "fast")
    assert got["y"].dtype is want["y"].dtype
    assert relative_error(got["y"], truth["y"]) <= budget(relative_error(want["y"], truth["y"]), torch.bfloat16)


@modes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_e6_half_input_with_fp32_batch_norm(mode, dtype):
    """Batch norm takes it without autocast too."""
    module = randomise(BnAct2d(nn.BatchNorm2d(16)))
    x, residual = image().to(dtype), image().to(dtype)
    eager = plainly(module)
    truth = step(copy.deepcopy(eager).double(), x.double(), mode)
    with watched() as seen:
        got = step(module, x, mode)
    assert_path(seen, "fast")
    assert_parity(got, step(eager, x, mode), truth, dtype)
    shape = module(x, residual)
    assert shape.dtype is dtype


#: (input, convolutions, batch norms' affine parameters, running statistics)
MIXTURES = {
    "half_parameters": (torch.float32, torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "half_input": (torch.bfloat16, torch.float32, torch.float32, torch.float32),
    "half_convolutions": (torch.float32, torch.bfloat16, torch.float32, torch.float32),
    "half_batch_norms": (torch.float32, torch.float32, torch.bfloat16, torch.bfloat16),
    "half_affine": (torch.float32, torch.float32, torch.bfloat16, torch.float32),
    "half_statistics": (torch.float32, torch.float32, torch.float32, torch.bfloat16),
    "half_but_for_batch_norms": (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32),
    "half_but_for_statistics": (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32),
    "half_but_for_affine": (torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16),
    "other_half_batch_norms": (torch.bfloat16, torch.bfloat16, torch.float16, torch.float16),
    "double_input": (torch.float64, torch.float32, torch.float32, torch.float32),
    "double_convolutions": (torch.float64, torch.float64, torch.float32, torch.float32),
    "double_batch_norms": (torch.float32, torch.float32, torch.float64, torch.float64),
    "double_statistics": (torch.float32, torch.float32, torch.float32, torch.float64),
}


@modes
@pytest.mark.parametrize("mixture", MIXTURES)
def test_e6_mixed_dtypes(mixture, mode):
    """Whatever eager takes, with the same result; and its error where it does not."""
    x_dtype, conv_dtype, affine_dtype, statistics_dtype = MIXTURES[mixture]
    model = block(stride=2)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(conv_dtype)
    for bn in batch_norms(model):
        bn.to(affine_dtype)
        bn.running_mean, bn.running_var = bn.running_mean.to(statistics_dtype), bn.running_var.to(statistics_dtype)
    x = image().to(x_dtype)
    try:
        want = step(copy.deepcopy(model), x, mode)
    except Exception:
        check_error(model, x, mode, same_message=False)
        return
    truth = step(copy.deepcopy(model).double(), x.double(), mode)
    assert_parity(both(model, x, mode)[0], want, truth, x_dtype)
