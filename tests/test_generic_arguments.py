"""Units that are called with more than one tensor: numbers, and tensors for arguments that have a default."""

import copy

import pytest
import torch
from _blocks import WIDTH, conv3
from _compare import MODES, assert_path, assert_same, image, randomise, some_kernels, step, watched
from torch import nn
from torch.nn import functional as F

import fastres
from fastres.recipes import units

modes = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(autouse=True)
def _kernels():
    with some_kernels():
        yield


class ConvReLU(nn.Sequential):
    def __init__(self):
        super().__init__(conv3(), nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True))


class Decoder(nn.Module):
    """As UnetDecoderBlock of segmentation_models_pytorch."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = ConvReLU(), ConvReLU()

    def forward(self, x, height, width, skip=None, scale=1.0):
        x = F.interpolate(x, size=(height, width), mode="nearest")
        if skip is not None:
            x = x + skip
        return self.conv2(self.conv1(x)) * scale


class Net(nn.Module):
    """Calls a decoder as a network does."""

    def __init__(self, call):
        super().__init__()
        self.decoder, self.call = Decoder(), call

    def forward(self, x):
        return self.call(self.decoder, x)


def skip(x, size=9):
    return F.interpolate(x, size=(size, size)) * 0.5


CALLS = {
    "numbers": lambda m, x: m(x, 9, 9),
    "names": lambda m, x: m(x, width=9, height=9),
    "skip": lambda m, x: m(x, 9, 9, skip(x)),
    "skip by name": lambda m, x: m(x, 9, 9, skip=skip(x)),
    "numbers of the input": lambda m, x: m(x, x.shape[2] + 2, x.shape[3] + 2, skip(x)),
    "with and without": lambda m, x: m(m(x, 9, 9, skip(x)), 7, 7),
    "two sizes": lambda m, x: m(m(x, 9, 9, skip(x)), 5, 5, skip(x, 5)),
    "default given": lambda m, x: m(x, 9, 9, None, 1.0),
}


@modes
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_fused(call, mode):
    model = randomise(Net(call))
    eager = copy.deepcopy(model)
    assert fastres.fuse_(model).fused == 6
    for _ in range(3):
        x = image(WIDTH)
        with watched() as seen:
            got = step(model, x, mode)
        assert_same(got, step(eager, x, mode), tolerance=1e-4)
        decoders = [reason for module, reason in seen if isinstance(module, Decoder)]
        assert decoders and not any(decoders)


class Merge(nn.Module):
    """As the decoders of UNet++ and DeepLab: a list of features."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = ConvReLU(), ConvReLU()

    def forward(self, features, extra=None):
        first, rest = features[0], features[1:]
        y = self.last(self.conv(first) + rest[-1])
        features.append(y)
        return y if extra is None else y + extra


@modes
@pytest.mark.parametrize("kind", ["list", "extra"])
def test_lists_of_tensors(kind, mode):
    model = randomise(Merge())
    eager = copy.deepcopy(model)
    assert fastres.fuse_(model).fused == 6
    for size in (7, 5, 7):
        outcomes = []
        for m in (model, eager):
            torch.manual_seed(1)
            features = [image(WIDTH, size=size) for _ in range(3)]
            extra = (features[2],) if kind == "extra" else ()
            with watched() as seen, torch.set_grad_enabled(mode != "inference"):
                y = m.train(mode == "train")(features, *extra)
            if m is model:
                assert_path(seen, "fast")
            assert len(features) == 4
            if mode != "inference":
                m.zero_grad()
                y.sum().backward()
            outcomes.append([y, features[3], *(p.grad for p in m.parameters() if p.grad is not None)])
        for a, b in zip(*outcomes, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    for m in (model, eager):
        with pytest.raises((IndexError, AttributeError)):
            m([])
        with pytest.raises(AttributeError):
            m((image(WIDTH), image(WIDTH)))  # a tuple has no append


OTHERS = {
    "another number": lambda m, x: m(x, 9, 9, None, 2.0),
    "a tensor for a number": lambda m, x: m(x, 9, 9, None, torch.tensor(2.0)),
    "a flag": lambda m, x: m(x, 9, True, skip=None),
    "a list": lambda m, x: m(x, 9, 9, skip=[1.0]),
}


@pytest.mark.parametrize("call", OTHERS.values(), ids=OTHERS)
def test_what_eager_says(call):
    """The results of eager, or its error."""
    model = randomise(Net(call)).eval()
    eager = copy.deepcopy(model)
    fastres.fuse_(model)
    x, outcomes = image(WIDTH), []
    for m in (eager, model):
        try:
            with torch.no_grad():
                outcomes.append(m(x))
        except Exception as error:
            outcomes.append((type(error), str(error)))
    if isinstance(outcomes[0], torch.Tensor):
        torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-5, atol=1e-5)
    else:
        assert outcomes[0] == outcomes[1]


def test_errors_of_wrong_calls():
    model = randomise(Decoder())
    fastres.fuse_(model)
    x = image(WIDTH)
    for args, kwargs in (
        ((), {}),
        ((x,), {}),
        ((x, 9, 9), {"height": 9}),
        ((x, 9, 9, None, 1.0, 2), {}),
        ((x, 9, 9), {"y": 1}),
    ):
        with pytest.raises(TypeError):
            model(*args, **kwargs)


def test_one_graph_for_all_numbers():
    model = randomise(Decoder()).eval()
    eager = copy.deepcopy(model)
    fastres.fuse_(model)
    x = image(WIDTH)
    with torch.no_grad():
        for size in range(3, 3 + 2 * units.MADE // 3):
            with watched() as seen:
                got = model(x, size, size, skip(x, size))
            assert_path(seen, "fast")
            torch.testing.assert_close(got, eager(x, size, size, skip(x, size)), rtol=1e-4, atol=1e-5)


class PositionOnly(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = conv3(), nn.BatchNorm2d(WIDTH)

    def forward(self, x, /, *, scale=None):
        y = F.relu(self.bn(self.conv(x)))
        return y if scale is None else y * scale


@modes
def test_arguments_by_position_and_by_name_only(mode):
    model = randomise(PositionOnly())
    eager = copy.deepcopy(model)
    assert fastres.fuse_(model).fused == 3
    x, scale = image(WIDTH), torch.full((1, WIDTH, 1, 1), 2.0)
    for kwargs in ({}, {"scale": scale}, {"scale": None}, {"scale": 2.0}):
        outcomes = []
        for m in (model, eager):
            with torch.no_grad():
                outcomes.append(m.train(mode == "train")(x, **kwargs))
        torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError):
        model(x, scale)
