"""Forwards that compare sizes of their input with numbers: their graphs hold for those sizes."""

import copy

import pytest
import torch
from _blocks import WIDTH, Block, conv3
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


SIZES = {
    "shape[1]": (lambda x: x.shape[1], WIDTH, lambda x: x[:, :3]),
    "size(-3)": (lambda x: x.size(-3), WIDTH, lambda x: x[:, :3]),
    "ndim": (lambda x: x.ndim, 4, lambda x: x[0]),
    "dim()": (lambda x: x.dim(), 4, lambda x: x[0]),
}


@modes
@pytest.mark.parametrize("asked", SIZES)
def test_sizes_that_are_compared(asked, mode):
    ask, value, other = SIZES[asked]

    class Asks(Block):  # as the embeddings of Hugging Face's ResNet
        def forward(self, x):
            if ask(x) != self.value:
                raise ValueError(f"{ask(x)} instead of {self.value}")
            return self.run(x)

    model = randomise(Asks())
    model.value = value
    eager, x = copy.deepcopy(model), image(WIDTH, size=8)
    report = fastres.fuse_(model)
    assert report.fused == report.total == 3
    with watched() as seen:
        assert_same(step(model, x, mode), step(eager, x, mode))
    assert_path(seen, "fast")
    for m in (eager, model):
        with pytest.raises(ValueError, match=f"instead of {value}"), watched() as seen:
            m(other(x))
    assert len(seen) == 1 and "does not trace: ValueError" in seen[0][1]
    with watched() as seen:  # what was refused then does not count for others
        assert_same(step(model, x, mode), step(eager, x, mode))
    assert_path(seen, "fast")
    model.value = eager.value = 3  # another graph, for images that the convolution does not take
    for m in (eager, model):
        with pytest.raises(ValueError, match=f"{value} instead of 3"):
            m(x)


class SizeIsRead(Block):
    """What is compared is read elsewhere too; equality chooses one of two ways."""

    def forward(self, x):
        channels = x.shape[1]
        if channels == WIDTH:
            return self.run(x) / channels
        return x


@modes
def test_a_size_that_is_compared_and_read(mode):
    model = randomise(SizeIsRead())
    eager = copy.deepcopy(model)
    assert fastres.fuse_(model).fused == 3
    for x in (image(WIDTH), image(WIDTH)[:, :3], image(WIDTH, size=5)):
        with torch.no_grad():
            torch.testing.assert_close(
                model.train(mode == "train")(x), eager.train(mode == "train")(x), rtol=1e-5, atol=1e-5
            )


class TwoWays(Block):
    """As DecoderBlock of Linknet: other sizes, another graph."""

    def forward(self, x, skip):
        y = self.run(x)
        if skip.shape[1] != 0:
            y = y + skip
        return F.relu(self.bn(self.conv(y))) if x.size(0) == 3 else y


@modes
def test_two_ways(mode):
    model = randomise(TwoWays())
    eager = copy.deepcopy(model)
    report = fastres.fuse_(model)
    assert report.fused >= 3
    x = image(WIDTH)
    for _ in range(3):
        for args in ((x, x), (x, x[:, :0]), (x[:2], x[:2]), (x[:2], x[:2, :0])):
            outcomes = []
            for m in (model, eager):
                with torch.no_grad(), watched() as seen:
                    outcomes.append(m.train(mode == "train")(*args))
                if m is model:
                    assert_path(seen, "fast")
            torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-5)
    assert fastres.fuse_(model).rows == report.rows  # whatever graphs calls have needed since
    known = units._known[model]
    made = known.made
    for wrong in ((x, [x]), (x, 3), (x, None)):
        for _ in range(5):
            for m in (model, eager):
                with pytest.raises(AttributeError):
                    m(*wrong)
    assert known.made == made  # none of them is traced


class Stem(Block):
    def forward(self, x):
        if x.shape[1] != WIDTH:
            raise ValueError("channels")
        return self.run(x)


class Whole(nn.Module):
    """Its stem compares a size of what is no argument of the whole."""

    def __init__(self):
        super().__init__()
        self.first, self.stem, self.bn = conv3(), Stem(), nn.BatchNorm2d(WIDTH)

    def forward(self, x):
        return F.relu(self.bn(self.stem(self.first(x))) + x)


@modes
def test_inside_of_a_parent(mode):
    model = randomise(Whole())
    eager, x = copy.deepcopy(model), image(WIDTH)
    report = fastres.fuse_(model)
    assert report.fused >= 6 and isinstance(model, units.Unit) and isinstance(model.stem, units.Unit)
    with watched() as seen:
        assert_same(step(model, x, mode), step(eager, x, mode))
    assert_path(seen, "fast")


class Compares(Block):
    """A number that is none of a size, and a size with one that is not known: refused."""

    def __init__(self, other):
        super().__init__()
        self.other = other

    def forward(self, x):
        return self.run(x) if self.other(x) else x


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x.shape[1] == x.shape[2],
        lambda x: x.sum() == 0,
        lambda x: x.relu().shape[1] == 8,
        lambda x: x.shape == 4,
    ],
    ids=["two sizes", "a value", "of a result", "all sizes"],
)
def test_other_comparisons_are_refused(other):
    report = fastres.fuse_(randomise(Compares(other)))
    assert report.fused == 0 and all("TraceError" in row.reason for row in report.rows)
