"""Cases C1 to C12: how modules are wired: shared, subclassed, replaced, nested, wrapped; and residuals of every kind."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from _compare import (
    assert_path,
    assert_same,
    batch_norms,
    block,
    buffers,
    check,
    check_error,
    image,
    kinds,
    libraries,
    modes,
    network,
    randomise,
    resnet,
    set_mode,
    some_kernels,
    step,
    watched,
)
from torch import nn

import fastres
from fastres.nn import ConvBnAct2d


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
    check(model, image(), mode, steps=2)


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

    check(randomise(Taps(16, 16)), image(), mode, path="none")


class PreActivation(nn.Module):
    """He et al. 2016: batch norm and ReLU before the convolution. The in-place ReLU changes what the shortcut adds, in eager too."""

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
    """`step` compares x's values and version counter; here the shortcut's tensor too, which ReLU(inplace=True) would spoil."""
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
    check(nn.Sequential(model), image(), mode, path="none")
    report = fastres.fuse_(nn.Sequential(model))
    assert report.fused == 0 and all("Scaled" in row.reason for row in report.rows)


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
    """Before the swap, it is seen by what the forward does; the block then is left alone and the report says why."""
    cls = resnet(library).Bottleneck
    original = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, x: original(self, x) * 2)
    model = block(library)
    report = fastres.fuse_(nn.Sequential(copy.deepcopy(model)))
    assert report.fused == 0 and "Bottleneck.forward is not the one" in report.rows[0].reason
    check(nn.Sequential(model), image(), mode, path="none")


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
    check(model, image(), mode, after=replace if late else None, path="eager", reason="BatchNormAct2d")
    shortcut = block(stride=2)
    shortcut.downsample[1] = BatchNormAct2d(16)
    check(shortcut, image(), mode)


def downsamples():
    return {
        "none": None,
        "identity": nn.Identity(),
        "resnet_d": nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True), nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)),
        "identity_conv_bn": nn.Sequential(nn.Identity(), nn.Conv2d(16, 16, 1, 2, bias=False), nn.BatchNorm2d(16)),
        "conv_only": nn.Conv2d(16, 16, 1, 2),
        "conv_in_sequential": nn.Sequential(nn.Conv2d(16, 16, 1, 2)),
        "conv_bn_relu": nn.Sequential(nn.Conv2d(16, 16, 1, 2), nn.BatchNorm2d(16), nn.ReLU()),
        "conv_group_norm": nn.Sequential(nn.Conv2d(16, 16, 1, 2), nn.GroupNorm(4, 16)),
        "bn_conv": nn.Sequential(nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1, 2)),
        "fused_module": ConvBnAct2d(nn.Conv2d(16, 16, 1, 2), nn.BatchNorm2d(16), act="identity"),
        "max_pool": nn.MaxPool2d(1, 2),
    }


@libraries
@modes
@pytest.mark.parametrize("downsample", downsamples())
def test_c9_shortcuts(library, downsample, mode):
    stride = 1 if downsample in ("none", "identity") else 2
    model = block(library, "BasicBlock" if library == "torchvision" else "Bottleneck", stride=stride)
    model.downsample = downsamples()[downsample]
    check(randomise(model), image(size=8), mode)


class Shortcut(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


#: What a shortcut may return, and eager adds by its own rules.
RESIDUALS = {
    "channels_broadcast": lambda x: x.mean((2, 3), keepdim=True),
    "batch_broadcast": lambda x: x.mean(0, keepdim=True),
    "one_channel": lambda x: x.mean(1, keepdim=True),
    "fewer_dimensions": lambda x: x.mean(0),
    "scalar": lambda x: x.mean(),
    "float64": lambda x: x.double(),
    "bfloat16": lambda x: x.bfloat16(),
    "float16": lambda x: x.half(),
    "integer": lambda x: (x * 4).int(),
    "bool": lambda x: x > 0,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3),
    "strided": lambda x: x.repeat(1, 1, 1, 2)[..., ::2],
    "expanded": lambda x: x[:, :, :, :1].expand_as(x),
    "number": lambda x: 0.5,
    "input_itself": lambda x: x,
}


@modes
@pytest.mark.parametrize("residual", RESIDUALS)
def test_c10_residual_of_another_kind(residual, mode):
    """`out += identity` broadcasts, and keeps out's dtype and layout."""
    for kind, layout in (("Bottleneck", torch.contiguous_format), ("BasicBlock", torch.channels_last)):
        eager = block(kind=kind)
        eager.downsample = Shortcut(RESIDUALS[residual])
        fused = copy.deepcopy(eager)
        fastres.fuse_(fused)
        x = image().contiguous(memory_format=layout)
        assert_same(step(fused, x, mode), step(eager, x, mode))


MISFITS = {
    "larger_image": lambda x: torch.cat([x, x], 2),
    "smaller_image": lambda x: x[:, :, :3, :3],
    "more_images": lambda x: torch.cat([x, x]),
    "fewer_channels": lambda x: x[:, :5],
    "five_dimensions": lambda x: x.unsqueeze(0).expand(2, -1, -1, -1, -1),
    "complex": lambda x: torch.complex(x, x),
    "none": lambda x: None,
}


@modes
@pytest.mark.parametrize("residual", MISFITS)
def test_c10_residual_that_eager_refuses(residual, mode):
    """The same kind of error, and the batch norms before the addition as eager leaves them."""
    model = block()
    model.downsample = Shortcut(MISFITS[residual])
    check_error(model, image(), mode, same_message=False)


@modes
@pytest.mark.parametrize("residual", ["channels_broadcast", "fewer_dimensions", "float64", "bfloat16", "transposed"])
def test_c10_residual_of_the_modules(residual, mode):
    """fastres.nn.ConvBnAct2d computes act(bn(conv(x)) + residual): the same whichever path its call takes."""
    module = randomise(ConvBnAct2d(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)))
    eager = copy.deepcopy(module)
    eager.bn.register_forward_hook(lambda *args: None)  # keeps it on the plain path
    x = image()
    shortcut = RESIDUALS[residual](image())
    outcomes = [step(m, x, mode, call=lambda x, m=m: m(x, shortcut)) for m in (module, eager)]
    assert_same(*outcomes)


@modes
def test_c11_quantizable_torchvision(mode):
    """A subclass with FloatFunctional.add_relu: left alone, computes the same, and can still be prepared for quantisation."""
    resnet("torchvision")
    from torchvision.models.quantization import resnet as quantizable

    model = randomise(quantizable.QuantizableBottleneck(16, 4))
    report = fastres.fuse_(copy.deepcopy(model))
    assert report.fused == 0 and all(row.reason for row in report.rows)
    check(nn.Sequential(model, block("torchvision")), image(), mode)


@libraries
@modes
def test_c12_fused_twice(library, mode):
    model = network(library)
    reference = fastres.fuse_(copy.deepcopy(model))

    def again(m):
        if any(isinstance(module, fastres.fuse.FusedModule) for module in m.modules()):
            classes = [type(module) for module in m.modules()]
            report = fastres.fuse_(m)
            assert [type(module) for module in m.modules()] == classes
            assert report.rows == reference.rows

    check(model, image(3, size=32), mode, after=again)


@modes
def test_c12_at_any_depth(mode):
    model = nn.Sequential(
        nn.ModuleDict({"list": nn.ModuleList([nn.Sequential(block(), nn.Sequential(block("torchvision", "BasicBlock")))])})["list"][0],
        block(stride=2),
    )
    fused = check(model, image(), mode)
    assert [type(m).__name__ for m in fused.modules()].count("FusedBottleneck") == 2
    check(nn.Sequential(nn.Sequential(nn.Sequential(model))), image(), mode)


@modes
def test_c12_parts_swapped_at_different_times(mode):
    eager = nn.Sequential(block(), block(stride=2), block(kind="BasicBlock"))
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused[1])
    x = image()
    with watched() as seen:
        assert_same(step(fused, x, mode), step(eager, x, mode))
    assert {module for module, _ in seen} == {fused[1], fused[1].downsample}
    fastres.fuse_(fused)
    with watched() as seen:
        assert_same(step(fused, x, mode), step(eager, x, mode))
    assert {module for module, _ in seen} == {*fused, fused[1].downsample}


@pytest.fixture
def process_group(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("torch was built without distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("when", ["before", "after"])
def test_c12_distributed_data_parallel(process_group, when):
    """The swap before the wrapping and after it; two steps, with buffers broadcast."""
    eager = nn.Sequential(block(), block(stride=2))
    fused = copy.deepcopy(eager)
    if when == "before":
        fastres.fuse_(fused)
    wrapped = nn.parallel.DistributedDataParallel(fused)
    if when == "after":
        fastres.fuse_(wrapped)
    reference = nn.parallel.DistributedDataParallel(eager)
    for mode in ("train", "train", "inference"):
        x = image()
        want = step(reference, x, mode)
        with watched() as seen:
            got = step(wrapped, x, mode)
        assert_path(seen, "fast")
        assert_same(got, want)


@libraries
@modes
def test_c12_ema_copy(library, mode):
    """torch.optim.swa_utils deep-copies the model it averages: the copy is fused as well, with weights of its own."""
    model = network(library)
    fused = copy.deepcopy(model)
    fastres.fuse_(fused)
    averages = []
    for m in (fused, model):
        average = torch.optim.swa_utils.AveragedModel(m, use_buffers=True)
        with torch.no_grad():
            m.layer1[0].conv1.weight.mul_(1.5)
        average.update_parameters(m)
        averages.append(average)
    x = image(3, size=32)
    want = step(averages[1], x, mode)
    with watched() as seen:
        got = step(averages[0], x, mode)
    assert_path(seen, "fast")
    assert_same(got, want)
    assert averages[0].module.layer1[0].conv1.weight is not fused.layer1[0].conv1.weight


@modes
def test_c12_children_called_one_by_one(mode):
    """As torchvision's IntermediateLayerGetter does: the stem's children are modules like any other."""
    resnet("torchvision")
    from torchvision.models._utils import IntermediateLayerGetter

    eager = network("torchvision")
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    layers = {"layer1": "a", "layer3": "b"}
    x = image(3, size=32)
    with torch.set_grad_enabled(mode != "inference"):
        want = IntermediateLayerGetter(set_mode(eager, mode), layers)(x)
        with watched() as seen:
            got = IntermediateLayerGetter(set_mode(fused, mode), layers)(x)
    assert_path(seen, "fast")
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-3, atol=1e-4)
    assert_same(buffers(fused), buffers(eager))


@modes
def test_c12_resnext_and_wide_resnet(mode):
    check(nn.Sequential(*network(norm_layer=partial(nn.BatchNorm2d, eps=1e-3)).layer1), image(64), mode)
    check(block("torchvision", "Bottleneck", 64, groups=4, base_width=8), image(64), mode)
    check(block("torchvision", "Bottleneck", 64, base_width=128), image(64), mode)
    assert len(batch_norms(block(stride=2))) == 4
