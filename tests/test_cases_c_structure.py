"""Cases C1 to C8: modules that are shared, used elsewhere, subclassed or patched."""

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
    libraries,
    modes,
    network,
    randomise,
    resnet,
    some_kernels,
    step,
    watched,
)
from torch import nn

import fastres


@pytest.fixture(autouse=True)
def _kernels():
    with some_kernels():
        yield


@libraries
@modes
def test_c1_convolution_shared_by_two_batch_norms(library, mode):
    """Each site folds its own batch norm; the weights stay what they were."""
    model = block(library, "BasicBlock")
    model.conv2 = model.conv1
    weight = model.conv1.weight.detach().clone()
    fused = check(model, image(), mode, steps=3)
    assert fused.conv1 is fused.conv2 and torch.equal(fused.conv1.weight, weight)


@modes
def test_c1_convolution_also_used_alone(mode):
    model = nn.ModuleDict({"block": block("fastres", "BasicBlock")})
    model["conv"] = model["block"].conv1
    eager, fused = model, copy.deepcopy(model)
    fastres.fuse_(fused)
    assert fused["conv"] is fused["block"].conv1
    x = image()
    outcomes = []
    for m in (fused, eager):
        outcomes.append(step(m, x, mode, call=lambda x, m=m: m["block"](m["conv"](x)) + m["conv"](x)))
    assert_same(*outcomes)


@libraries
@modes
def test_c2_batch_norm_called_twice(library, mode):
    """Two updates of the statistics in one forward, in the order of the forward."""
    model = block(library, "BasicBlock")
    model.bn2 = model.bn1
    fused = check(model, image(), mode, steps=2)
    assert int(fused.bn1.num_batches_tracked) == (4 if mode == "train" else 0)


@kinds
@modes
def test_c2_batch_norm_shared_with_the_shortcut(kind, mode):
    """Eager normalises the branch first and the shortcut then: running statistics tell the difference."""
    model = block(kind=kind, stride=2)
    last = "bn3" if kind == "Bottleneck" else "bn2"
    model.downsample[1] = getattr(model, last)
    check(model, image(), mode, steps=2, path="eager" if mode == "train" else "any", reason="shortcut|shared|same")


@libraries
@modes
def test_c3_module_under_two_names(library, mode):
    inner = block(library)
    model = nn.Sequential(inner, nn.Identity(), inner)
    model.again = inner.conv1
    keys = list(model.state_dict())
    assert sum(key.endswith("conv1.weight") for key in keys) == 2 and "again.weight" in keys
    fused = copy.deepcopy(model)
    fastres.fuse_(fused)
    assert fused[0] is fused[2] and fused.again is fused[0].conv1
    assert list(fused.state_dict()) == keys
    for m in (model, fused):
        del m.again  # registered behind the Identity, it would run
    check(model, image(), mode, steps=2)


@modes
def test_c4_convolutions_output_used_elsewhere(mode):
    """A hook, or a forward of their own, takes the convolution's output: it has to exist, and be eager's."""
    model = network()
    fused = copy.deepcopy(model)
    fastres.fuse_(fused)
    taken = {}
    for name, m in (("eager", model), ("fused", fused)):
        m.conv1.register_forward_hook(lambda module, args, y, name=name: taken.__setitem__(name, y.detach().clone()))
    x = image(3, size=32)
    want = step(model, x, mode)
    with watched() as seen:
        got = step(fused, x, mode)
    assert_path(seen, "fast")  # the stem's convolution is called as a module: hooks on it cost nothing
    torch.testing.assert_close(taken["fused"], taken["eager"])
    assert_same(got, want)


@modes
def test_c4_block_that_returns_its_convolutions_output(mode):
    class Taps(resnet("fastres").BasicBlock):
        def forward(self, x):
            raw = self.conv1(x)
            return self.relu(self.bn2(self.conv2(self.relu(self.bn1(raw)))) + x) + raw

    check(randomise(Taps(16, 16)), image(), mode)  # its second convolution runs fused, its first is called


class PreActivation(nn.Module):
    """He et al. 2016: batch norm and ReLU come first. An in-place ReLU changes what the shortcut adds, in eager too."""

    def __init__(self, inplace=False, after_conv=False):
        super().__init__()
        self.bn, self.relu, self.conv = nn.BatchNorm2d(16), nn.ReLU(inplace), nn.Conv2d(16, 16, 3, padding=1)
        self.after_conv = after_conv

    def forward(self, x):
        if self.after_conv:
            return self.bn(self.relu(self.conv(x)))
        normed = self.bn(x)
        return self.conv(self.relu(normed)) + normed


@modes
@pytest.mark.parametrize("after_conv", [False, True], ids=["bn_relu_conv", "conv_relu_bn"])
def test_c5_never_folded_across_a_relu(after_conv, mode):
    model = nn.Sequential(randomise(PreActivation(after_conv=after_conv)), block())
    check(model, image(), mode)
    layers = [nn.Conv2d(16, 16, 1), nn.ReLU(), nn.BatchNorm2d(16), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1)]
    check(nn.Sequential(randomise(nn.Sequential(*layers)), block()), image(), mode, tolerance=1e-4)


@modes
def test_c6_in_place_relu_before_a_shortcut(mode):
    check(nn.Sequential(randomise(PreActivation(inplace=True)), block()), image(), mode)


@libraries
@kinds
@modes
def test_c6_input_and_shortcut_are_never_written(library, kind, mode):
    """`step` compares x's values and version; here the shortcut's too, which ReLU(inplace=True) would spoil."""
    model = block(library, kind)
    shortcut = image()

    class Constant(nn.Module):
        def forward(self, x):
            return shortcut

    model.downsample = Constant()
    before, version = shortcut.clone(), shortcut._version
    check(model, image(), mode)
    assert torch.equal(shortcut, before) and shortcut._version == version


@modes
def test_c6_input_made_by_an_in_place_relu(mode):
    check(nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU(inplace=True), block()), image(), mode)


@libraries
@kinds
@modes
def test_c7_subclass_with_its_own_forward(library, kind, mode):
    base = getattr(resnet(library), kind)

    class Scaled(base):
        def forward(self, x):
            return super().forward(x) * 0.5

    model = randomise(Scaled(16, 16 // base.expansion))
    check(nn.Sequential(model), image(), mode)


@modes
def test_c7_subclass_without_a_forward(mode):
    """Unknown all the same: left alone or fused, it has to compute the same."""
    model = randomise(type("Mine", (resnet("fastres").Bottleneck,), {})(16, 4))
    x, fused = image(), copy.deepcopy(model)
    fastres.fuse_(fused)
    assert_same(step(fused, x, mode), step(model, x, mode))


@libraries
@modes
def test_c7_forward_patched_on_the_class(library, mode, monkeypatch):
    """Before the swap, it is seen by what the forward does; the block then is traced as it is."""
    cls = resnet(library).Bottleneck
    original = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, x: original(self, x) * 2)
    model = block(library)
    fused = check(nn.Sequential(model), image(), mode)
    assert isinstance(fused[0], fastres.recipes.units.Unit)


@modes
@pytest.mark.parametrize("late", [False, True], ids=["before_fuse_", "after_fuse_"])
def test_c7_forward_bound_to_an_instance(late, mode):
    """Of the block: it is what runs, before and after. Of a child: the block's own forward calls it."""

    def bind(module):
        original = type(module).forward
        module.forward = lambda x: original(module, x) * 2

    outcomes = []
    for fuse in (True, False):
        torch.manual_seed(0)
        inner, outer, plain = block(), block(), block()
        model = nn.Sequential(inner, outer, plain)
        if fuse and late:
            fastres.fuse_(model)
        bind(inner.conv2)
        if not (fuse and late):
            bind(outer)
        if fuse:
            fastres.fuse_(model)
        if fuse and late:
            eager_forward = resnet("fastres").Bottleneck.forward
            outer.forward = lambda x, outer=outer, f=eager_forward: f(outer, x) * 2
        x = torch.randn(3, 16, 7, 7, generator=torch.Generator().manual_seed(1))
        with watched() as seen:
            outcomes.append(step(model, x, mode))
    assert not seen
    assert_same(*outcomes)


@modes
@pytest.mark.parametrize("name", ["Conv2d", "BatchNorm2d", "ReLU"])
def test_c7_childs_forward_patched_on_the_class(name, mode, monkeypatch):
    """Profilers and quantisers do this to torch.nn's classes: the patch has to run."""
    cls = getattr(nn, name)
    original = cls.forward
    calls = []
    monkeypatch.setattr(cls, "forward", lambda self, x: calls.append(self) or original(self, x) * 0.5)
    eager = block(stride=2)
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    x = image()
    want = step(eager, x, mode)
    count = len(calls)
    assert_same(step(fused, x, mode), want)
    assert len(calls) == 2 * count > 0


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm's: with an activation inside."""

    def forward(self, x):
        return F.leaky_relu(super().forward(x), 0.1)


@modes
@pytest.mark.parametrize("late", [False, True], ids=["before_fuse_", "after_fuse_"])
def test_c8_subclass_of_batch_norm(late, mode):
    def replace(model):
        model.bn2 = BatchNormAct2d(4)
        with torch.no_grad():
            model.bn2.weight.fill_(0.7)

    model = block(stride=2)
    if not late:
        replace(model)
    if late:
        check(model, image(), mode, after=replace, path="eager", reason="BatchNormAct2d")
    else:
        check(model, image(), mode)  # all but this one
        assert "BatchNormAct2d" in next(row.reason for row in fastres.fuse_(model).rows if row.name == "bn2")
    shortcut = block(stride=2)
    shortcut.downsample[1] = BatchNormAct2d(16)
    check(shortcut, image(), mode, path="block")
