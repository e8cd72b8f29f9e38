"""Cases E7 to E11: sizes, devices, and tensors that are not plain."""

import copy
import operator

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
    image,
    layouts,
    libraries,
    modes,
    network,
    set_mode,
    some_kernels,
    watched,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastres
from fastres import functional
from fastres.layout import mask_bytes
from fastres.testing import LAYOUTS


@pytest.fixture(autouse=True)
def _kernels():
    with some_kernels():
        yield


@pytest.mark.parametrize("shape", [(2**15 + 1, 64, 32, 32), (1, 1, 2**16, 2**15 + 1), (2**31 + 8, 1, 1, 1)], ids=str)
def test_e7_more_than_2_to_31_values(shape):
    """Sizes, masks and strides of outputs nobody here has the memory for."""
    x = torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=True)
    channels = [torch.empty(shape[1], device="meta", requires_grad=i > 1) for i in range(4)]
    y = functional.bn_act(x, *channels, residual=torch.empty_like(x), training=True)
    assert y.shape == x.shape and y.stride() == x.stride() and y.numel() > 2**31
    y.sum().backward()
    assert x.grad.shape == x.shape
    n, c, h, w = shape
    assert mask_bytes(x) == n * c * -(-h * w // 8) > 2**28
    assert functional.add_act(x, x).numel() == x.numel()
    pooled = functional.bn_act_maxpool(x, *channels) if min(h, w) > 1 else None
    assert pooled is None or pooled.shape == (n, c, (h + 1) // 2, (w + 1) // 2)


@modes
def test_e8_batch_of_more_than_65535(mode):
    check(block(kind="BasicBlock", width=2), image(2, n=65_537, size=1), mode, tolerance=1e-4)


@layouts
def test_e8_batch_of_more_than_65535_in_the_ops(layout):
    x = image(3, n=70_001, size=2).contiguous(memory_format=LAYOUTS[layout])
    running = [torch.zeros(3), torch.ones(3)]
    for function, plain in (
        (functional.bn_act, lambda y: F.relu(y)),
        (functional.bn_act_maxpool, lambda y: F.max_pool2d(F.relu(y), 3, 2, 1)),
    ):
        got = function(x, *(t.clone() for t in running), training=True)
        want = plain(F.batch_norm(x, *(t.clone() for t in running), training=True))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(functional.add_act(x, x), F.relu(x + x))


@modes
@pytest.mark.parametrize("moved", ["input", "model", "conv1", "bn2", "conv3", "downsample"])
def test_e9_mixed_devices(moved, mode):
    """Eager's error, and nothing counted that eager does not count. The meta device stands for a second one."""
    model, x = block(stride=2), image()
    if moved == "input":
        x = x.to("meta")
    else:
        operator.attrgetter(moved)(model).to("meta") if moved != "model" else model.to("meta")
    eager, fused = set_mode(copy.deepcopy(model), mode), set_mode(copy.deepcopy(model), mode)
    fastres.fuse_(fused)
    outcomes = []
    for m in (eager, fused):
        try:
            with torch.set_grad_enabled(mode != "inference"):
                outcomes.append(m(x).shape)
        except Exception as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]
    if moved == "downsample":
        return  # computed last in eager and earlier here: bn3 has not counted a batch that it never saw
    counters = [
        [bn.num_batches_tracked.tolist() for bn in batch_norms(m) if bn.running_var.device.type == "cpu"]
        for m in (eager, fused)
    ]
    assert counters[0] == counters[1]


def described(t):
    return t.shape, t.dtype, t.device, t.stride(), t.requires_grad


@libraries
@modes
@layouts
def test_e10_meta(library, mode, layout):
    eager = set_mode(network(library).to("meta"), mode)
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    x = torch.empty(3, 3, 32, 32, device="meta").contiguous(memory_format=LAYOUTS[layout])
    with torch.set_grad_enabled(mode != "inference"):
        want, got = eager(x), fused(x)
    assert described(got) == described(want)
    if got.requires_grad:
        got.sum().backward()
        assert all(p.grad.shape == p.shape for p in fused.parameters())


@modes
@layouts
def test_e10_fake_tensors(mode, layout):
    outcomes = []
    for fuse in (False, True):
        with FakeTensorMode():
            model = set_mode(network(), mode)
            if fuse:
                fastres.fuse_(model)
            x = image(3, size=32).contiguous(memory_format=LAYOUTS[layout])
            with torch.set_grad_enabled(mode != "inference"):
                outcomes.append(described(model(x)))
    assert outcomes[0] == outcomes[1]


@layouts
def test_e10_functions_on_the_meta_device(layout):
    """Shapes, dtypes and strides are those of the real call."""
    order = LAYOUTS[layout]

    def results(device):
        x = torch.empty(3, 16, 7, 7, device=device).contiguous(memory_format=order)
        channels = [torch.ones(16, device=device) for _ in range(4)]
        weight = torch.ones(16, 16, 3, 3, device=device)
        return (
            functional.bn_act(x, *channels, residual=x, training=True),
            functional.add_act(x, x),
            functional.conv_bias_act(x, weight, channels[0], x, padding=1),
            functional.conv_bn_act(x, weight, *channels, residual=x, padding=1),
            functional.conv_bn_act(x, weight, *channels, residual=x, padding=1, training=True),
            functional.bn_act_maxpool(x, *channels),
        )

    for meta, real in zip(results("meta"), results("cpu"), strict=True):
        assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())


class Tagged(torch.Tensor):
    """A subclass that nobody knows."""


@libraries
@modes
def test_e11_unknown_subclass(library, mode):
    eager = set_mode(block(library, stride=2), mode)
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    x = image().as_subclass(Tagged)
    with watched() as seen, torch.set_grad_enabled(mode != "inference"):
        got = fused(x)
        want = eager(x)
    assert_path(seen, "eager", "Tagged")
    assert type(got) is type(want) is Tagged
    torch.testing.assert_close(got.as_subclass(torch.Tensor), want.as_subclass(torch.Tensor))


@modes
def test_e11_subclass_as_weight(mode):
    def tag(model):
        model.conv2.weight = nn.Parameter(model.conv2.weight.detach().as_subclass(Tagged))

    eager, fused = block(), block()
    fused.load_state_dict(eager.state_dict())
    fastres.fuse_(fused)
    x = image()
    outcomes = []
    for model in (eager, fused):
        tag(set_mode(model, mode))
        with watched() as seen, torch.set_grad_enabled(mode != "inference"):
            outcomes.append(model(x))
    assert_path(seen, "eager", "Tagged|Parameter")
    assert type(outcomes[0]) is type(outcomes[1])
    torch.testing.assert_close(*(y.as_subclass(torch.Tensor) for y in outcomes))


@pytest.mark.filterwarnings("ignore:.*quantized.*", "ignore:The PyTorch API of nested tensors.*")
@modes
@pytest.mark.parametrize("kind", ["quantized", "sparse", "mkldnn", "nested", "jagged"])
def test_e11_other_tensors(kind, mode):
    """Eager's result or eager's error: nothing that is not strided gets near a kernel."""
    x = image()
    x = {
        "quantized": lambda: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
        "sparse": lambda: x.to_sparse(),
        "mkldnn": lambda: x.to_mkldnn(),
        "nested": lambda: torch.nested.nested_tensor([x[0], x[1]]),
        "jagged": lambda: torch.nested.nested_tensor([x[0], x[1]], layout=torch.jagged),
    }[kind]()
    eager = set_mode(block(), mode)
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    outcomes = []
    for model in (eager, fused):
        try:
            with watched() as seen, torch.set_grad_enabled(mode != "inference"):
                outcomes.append(described(model(x).to_dense()))
        except Exception as error:
            outcomes.append((type(error), str(error)))
    assert_path(seen, "eager")
    assert outcomes[0] == outcomes[1]
    assert_same(buffers(fused), buffers(eager))


@libraries
def test_e11_fx_proxy(library):
    """symbolic_trace goes through the original forwards: torch.fx users get the graph they know."""
    eager = network(library).eval()
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    graphs = [torch.fx.symbolic_trace(model) for model in (eager, fused)]
    assert [(n.op, str(n.target)) for n in graphs[1].graph.nodes] == [
        (n.op, str(n.target)) for n in graphs[0].graph.nodes
    ]
    x = image(3, size=32)
    torch.testing.assert_close(graphs[1](x), eager(x))


def test_e11_feature_extractor():
    """torchvision's create_feature_extractor is built on it."""
    eager = network("torchvision").eval()
    from torchvision.models.feature_extraction import create_feature_extractor

    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    x = image(3, size=32)
    want, got = (create_feature_extractor(model, {"layer1.0.bn2": "a", "layer2": "b"})(x) for model in (eager, fused))
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)


@modes
def test_e11_dtensor(mode, tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("torch was built without distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_module, distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        outcomes = []
        plain = set_mode(block(kind="BasicBlock"), mode)
        x = image()
        for fuse in (False, True):
            model = copy.deepcopy(plain)
            if fuse:
                fastres.fuse_(model)
            model = distribute_module(model, mesh)
            with watched() as seen, torch.set_grad_enabled(mode != "inference"):
                try:
                    outcomes.append(model(distribute_tensor(x, mesh)).to_local().detach())
                except Exception as error:
                    outcomes.append(type(error))
        assert_path(seen, "eager", "DTensor")
        if isinstance(outcomes[0], torch.Tensor):
            torch.testing.assert_close(*outcomes)
        else:
            assert outcomes[0] == outcomes[1]
    finally:
        torch.distributed.destroy_process_group()
