"""conv_bias_act through cuDNN's fused convolutions: what is asked of cuDNN, and what happens where it has no engine."""

import pytest
import torch
import torch.nn.functional as F

import fastres
from fastres.kernels import cudnn

OPTIONS = ([2, 1], [1, 0], [1, 1], 1, True)


def stand_in(x, weight, bias, residual, geometry):
    """What cuDNN computes."""
    y = F.conv2d(x, weight, bias, *geometry)
    return F.relu(y if residual is None else y + residual)


@pytest.fixture(autouse=True)
def nothing_refused(monkeypatch):
    monkeypatch.setattr(cudnn, "_refused", set())


def tensors(with_residual):
    x, weight = torch.randn(2, 8, 7, 6).contiguous(memory_format=torch.channels_last), torch.randn(4, 8, 3, 3)
    bias = torch.randn(4)
    residual = torch.randn(2, 4, 4, 4).contiguous(memory_format=torch.channels_last) if with_residual else None
    return x, weight, bias, residual


@pytest.mark.parametrize("with_residual", [False, True])
def test_operators_that_are_called(monkeypatch, with_residual):
    """Their arguments, in the order of ATen's schemas."""
    asked = []

    def record(name):
        return lambda *args: asked.append((name, args)) or stand_in(x, weight, bias, residual, args[-4:])

    for name in ("cudnn_convolution_relu", "cudnn_convolution_add_relu"):
        monkeypatch.setattr(torch.ops.aten, name, record(name))
    x, weight, bias, residual = tensors(with_residual)
    y = cudnn.conv_bias_act(x, weight, bias, residual, *OPTIONS)
    assert y.is_contiguous(memory_format=torch.channels_last)
    ((name, args),) = asked
    if with_residual:
        assert name == "cudnn_convolution_add_relu" and args[2] is residual and args[3] == 1.0 and args[4] is bias
    else:
        assert name == "cudnn_convolution_relu" and args[2] is bias
    assert args[0] is x and args[-4:] == OPTIONS[:-1]


@pytest.mark.parametrize("with_residual", [False, True])
def test_without_an_engine_the_call_is_served_and_remembered(monkeypatch, with_residual):
    def refuse(*args):
        raise RuntimeError("FIND was unable to find an engine to execute this computation")

    monkeypatch.setattr(cudnn, "_fused", refuse)
    args = (*tensors(with_residual), *OPTIONS)
    assert cudnn.why_not(*args) is None
    torch.testing.assert_close(cudnn.conv_bias_act(*args), stand_in(*args[:4], OPTIONS[:-1]))
    assert cudnn.why_not(*args) == "cuDNN has no engine for it"
    assert cudnn.why_not(args[0][:1], *args[1:]) is None  # another shape


def test_other_errors_are_raised(monkeypatch):
    def fail(*args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cudnn, "_fused", fail)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        cudnn.conv_bias_act(*tensors(False), *OPTIONS)
    assert not cudnn._refused


def test_reasons(monkeypatch):
    x, weight, bias, _ = tensors(False)
    geometry = OPTIONS[:-1]
    assert cudnn.why_not(x, weight, bias, None, *geometry, False) == "there is no ReLU to fuse"
    assert "float64" in cudnn.why_not(x.double(), weight.double(), bias, None, *OPTIONS)
    assert "torch.float16 weight" in cudnn.why_not(x, weight.half(), bias, None, *OPTIONS)
    assert cudnn.why_not(x[:0], weight, bias, None, *OPTIONS) == "empty batch"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cudnn.unavailable() == "this PyTorch is built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cudnn.unavailable() == "no CUDA device"


def test_graphed_on_a_cpu():
    model = fastres.models.resnet18(num_classes=3).eval()
    x = torch.randn(1, 3, 32, 32)
    run = fastres.graphed(model, x)
    with torch.no_grad():
        assert torch.equal(run(x), model(x)) and not run(x).requires_grad
    model.layer1[0].train()
    with pytest.raises(ValueError, match="training mode"):
        run(x)
