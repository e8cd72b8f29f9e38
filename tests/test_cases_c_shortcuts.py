"""Cases C9 to C12: shortcuts and residuals of every kind, nesting, wrapping, copies."""

import copy
from functools import partial

import _blocks
import pytest
import torch
from _compare import (
    assert_path,
    assert_same,
    batch_norms,
    block,
    buffers,
    check,
    check_error,
    image,
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


def downsamples():
    return {
        "none": None,
        "identity": nn.Identity(),
        "resnet_d": nn.Sequential(
            nn.AvgPool2d(2, 2, ceil_mode=True), nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)
        ),
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
    check_error(model, image(), mode, same_message=False, same_state=residual != "none")


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
    """A subclass with FloatFunctional.add_relu: left alone, and computes the same."""
    resnet("torchvision")
    from torchvision.models.quantization import resnet as quantizable

    model = randomise(quantizable.QuantizableBottleneck(16, 4))
    report = fastres.fuse_(copy.deepcopy(model))
    assert report.fused == 0 and all(row.reason for row in report.rows)
    check(nn.Sequential(model, block("torchvision")), image(), mode)


@modes
@pytest.mark.parametrize("style", ["transformers", "mmcv", "detectron2"])
def test_c11_blocks_of_other_libraries(style, mode):
    """Written as they write them; more in test_generic_blocks.py."""
    model = randomise(_blocks.BLOCKS[style](1 if style == "mmcv" else 2))
    fused = check(model, image(_blocks.WIDTH), mode)
    assert all(row.fused for row in fastres.fuse_(fused).rows)


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
        nn.ModuleDict(
            {"list": nn.ModuleList([nn.Sequential(block(), nn.Sequential(block("torchvision", "BasicBlock")))])}
        )["list"][0],
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
